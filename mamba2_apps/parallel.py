"""Several devices: one sequence split over them, or each weight.

Context parallelism splits one sequence over the ranks of a process group, slice i on rank i.

A state space layer needs little from the other slices: the state that enters, and the few tokens
that the convolution looks back at. Every rank scans its slice from a zero state; the ranks exchange
their final states with the decay over their slices; each works out the state that enters its slice
and adds what that state gives to the outputs. What is exchanged does not grow with the length.
This is the block decomposition of Dao and Gu (2024, section 6) with ranks for blocks; in the
reverse direction the state enters from the right.

    context = split_sequence(model.backbone, group)     # once
    piece = context.shard(embeddings)                   # rank i's slice
    hidden = model.backbone(piece)                      # that slice of what one device would give

The objective is the mean over the ranks of each rank's loss, as DistributedDataParallel over all
ranks averages gradients; with slices of equal length that is the mean over all tokens. Every rank
must run the backward pass.

Dimensions: batch b · seqlen l (of a slice) · nheads h · headdim p · ngroups g · dstate n ·
directions r · ranks w
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from mamba2_apps import kernels
from mamba2_apps.attention import Attention
from mamba2_apps.kernels.state_outputs import add_state_outputs


class ContextParallel:
    """The operators of a mixer, over a sequence that is split over the ranks of `group`.

    They take the place of `mamba2_apps.kernels`' operators of the same names. `bytes_sent` counts
    what this rank has sent in forward and backward passes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.bytes_sent = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "ContextParallel":
        return self  # a process group cannot be copied, and its counterpart is the same one

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's slice of a whole sequence. Raises ValueError where slices would differ."""
        length = x.shape[dim]
        if length % self.size:
            raise ValueError(
                f"a sequence of {length} does not split into {self.size} equal slices; pad it to "
                f"{length + -length % self.size}, or crop it"
            )
        return x.chunk(self.size, dim)[self.rank]

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole of what every rank has a slice of, differentiable."""
        return torch.cat(list(self._gathered(x)), dim)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, differentiable."""
        return self._gathered(x).sum(0)

    def causal_conv1d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
        initial_states: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        reverse: bool = False,
        return_final_states: bool = False,
    ) -> Any:
        """As `kernels.causal_conv1d`; the window reaches into the slice before, or after."""
        _refuse(initial_states, cu_seqlens, return_final_states)
        halo = weight.shape[1] - 1
        if x.shape[1] < halo:
            raise ValueError(
                f"a slice has {x.shape[1]} tokens, expected at least {halo}, the window of the "
                "convolution; use fewer ranks"
            )
        edge = x[:, :halo].flip(1) if reverse else x[:, x.shape[1] - halo :]
        neighbour = self.rank + 1 if reverse else self.rank - 1
        exists = 0 <= neighbour < self.size
        # Multiplied by 0 where there is none, so that every rank takes part in the backward pass.
        before = self._gathered(edge)[neighbour if exists else 0] * float(exists)
        return kernels.causal_conv1d(
            x, weight, bias, activation=activation, initial_states=before, reverse=reverse
        )

    def ssd(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        *,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        initial_states: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_final_states: bool = False,
    ) -> Any:
        """As `kernels.ssd`, over the whole sequence."""
        _refuse(initial_states, cu_seqlens, return_final_states)
        options: dict[str, Any] = {"dt_softplus": dt_softplus, "dt_limit": dt_limit}
        y, states = kernels.ssd(
            x, dt, A, B, C, D=D, dt_bias=dt_bias, return_final_states=True, **options
        )
        decays = log_decays(dt, A, dt_bias, **options).cumsum(1)
        entering = self._entering(states[None], decays[:, -1][None])
        return add_state_outputs(y, entering, C.to(y.dtype), decays[None])

    def ssd_bidirectional(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        *,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        initial_states: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_final_states: bool = False,
    ) -> Any:
        """As `kernels.ssd_bidirectional`, over the whole sequence; one exchange for both scans."""
        _refuse(initial_states, cu_seqlens, return_final_states)
        options: dict[str, Any] = {"dt_softplus": dt_softplus, "dt_limit": dt_limit}
        y, states = kernels.ssd_bidirectional(
            x, dt, A, B, C, D=D, dt_bias=dt_bias, return_final_states=True, **options
        )
        bias = (None, None) if dt_bias is None else dt_bias
        steps = [log_decays(dt[i], A[i], bias[i], **options) for i in (0, 1)]
        forward, reverse = steps[0].cumsum(1), steps[1].flip(1).cumsum(1).flip(1)
        totals = torch.stack([forward[:, -1], reverse[:, 0]])
        decays = torch.stack([forward, reverse])
        return add_state_outputs(y, self._entering(states, totals), C.to(y.dtype), decays)

    def _entering(self, states: Tensor, totals: Tensor) -> Tensor:
        """The states that enter this rank's slice, (r, b, h, p, n).

        states (r, b, h, p, n) are the final ones of the slice, from zero, and totals (r, b, h) the
        logarithms of the decay over it. Direction 0 scans forward, 1 in reverse.
        """
        totals = totals.to(states.dtype)
        gathered = self._gathered(torch.cat([states.flatten(), totals.flatten()]))
        of_ranks = gathered[:, : states.numel()].unflatten(1, states.shape)
        decay_of_ranks = gathered[:, states.numel() :].unflatten(1, totals.shape).exp()
        entering = []
        for direction in range(len(states)):
            earlier = range(self.rank) if direction == 0 else range(self.size - 1, self.rank, -1)
            state = 0 * of_ranks[0, direction]  # keeps every rank in the backward pass
            for j in earlier:
                state = decay_of_ranks[j, direction, ..., None, None] * state
                state = state + of_ranks[j, direction]
            entering.append(state)
        return torch.stack(entering)

    def _gathered(self, x: Tensor) -> Tensor:
        """(w, …): x of every rank."""
        return _Gather.apply(x, self)  # type: ignore[no-any-return]


def split_sequence(module: nn.Module, group: dist.ProcessGroup | None = None) -> ContextParallel:
    """Make a module take slices of sequences from now on, and give slices of its outputs.

    Mixers exchange states, and heads that pool do so over all slices. Masks, packs and carried
    states are refused then.

    Args:
        module: a Backbone, or a model whose other parts work token by token. Its `adapter` and
            `head` say so by an attribute `token_by_token`, and so may any part.
        group: whose ranks share each sequence, the "cp" dimension of a device mesh, say; None: all
            ranks.

    Raises ValueError for attention layers, which would need every key, and for parts that look
    along the sequence: slices of their inputs are not enough for their outputs' slices.
    """
    context = ContextParallel(group)
    for name, part in module.named_modules():
        if isinstance(part, Attention):
            raise ValueError(f"{name} is attention; a split sequence needs Mamba-2 layers only")
        if not _takes_slices(part, name.rpartition(".")[2]):
            raise ValueError(
                f"{name or 'the model'} ({type(part).__name__}) looks along the sequence, beside "
                "the backbone, and cannot take a slice of it; split the backbone alone, and give "
                "it slices of the embeddings"
            )
        if hasattr(part, "context_parallel"):
            part.context_parallel = context  # type: ignore[assignment]
    return context


def _takes_slices(part: nn.Module, name: str) -> bool:
    """Whether a part that is called `name` in its model gives from a slice what it gives there from
    the whole sequence."""
    if hasattr(part, "token_by_token"):
        return bool(part.token_by_token)
    if name not in ("adapter", "head") or hasattr(part, "context_parallel"):
        return True
    return isinstance(part, nn.Linear | nn.Embedding | nn.Identity)


def shard_parameters(module: LightningModule) -> None:
    """Give each device a part of every weight (FSDP2), block by block.

    A LightningModule's `configure_model` under ModelParallelStrategy.
    """
    mesh = module.device_mesh["data_parallel"]  # type: ignore[index]
    model: Any = module.model
    for block in model.backbone.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in ("features", "embed"):
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def log_decays(
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    *,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> Tensor:
    """Logarithm of each token's decay, dt' A (b, l, h), in float32 at least."""
    wide = torch.promote_types(dt.dtype, torch.float32)
    steps = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
    steps = F.softplus(steps) if dt_softplus else steps
    return steps.clamp(*dt_limit) * A.to(wide)


class _Gather(torch.autograd.Function):
    """All ranks' tensors on every rank; in the backward pass each gets the sum of its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ContextParallel) -> Tensor:
        ctx.context = context
        x = x.contiguous()
        out = x.new_empty(context.size, *x.shape)
        dist.all_gather(list(out.unbind(0)), x, group=context.group)
        context.bytes_sent += x.numel() * x.element_size() * (context.size - 1)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        context = ctx.context
        grad = grad.contiguous()
        dist.all_reduce(grad, group=context.group)
        context.bytes_sent += grad.numel() * grad.element_size()
        return grad[context.rank], None


def _refuse(states: Tensor | None, cu_seqlens: Tensor | None, return_states: bool) -> None:
    for name, given in (
        ("a carried state", states is not None or return_states),
        ("cu_seqlens", cu_seqlens is not None),
    ):
        if given:
            raise ValueError(f"{name} cannot be used on a sequence that is split over ranks")
