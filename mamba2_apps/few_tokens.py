"""A causal backbone on a few tokens of a stream, in plain operations.

On a CPU the operators' checks, blocks and dispatch cost several times what the arithmetic of a few
tokens does, and so does each small operation: about 5 µs, as the weights that every layer reads
drive the code out of the caches. Here is the same arithmetic in some forty operations a layer: one
chunk of the quadratic form of the state space duality, and what the state gives to it.

batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · rows r = b g
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2_apps.checks import is_linear
from mamba2_apps.kernels.dispatch import is_exporting

FEW = 16


def serves(mixer: Any, u: Tensor) -> bool:
    """Whether `FewTokens` may take the place of the operators: a few float32 tokens, on a CPU, no
    gradients.
    """
    return (
        u.shape[1] <= FEW
        and u.device.type == "cpu"
        and u.dtype == mixer.in_proj.weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and mixer.context_parallel is None
        and is_linear(mixer.in_proj)
        and is_linear(mixer.out_proj)
        and not is_exporting()
        and not torch.compiler.is_compiling()
    )


class FewTokensBackbone:
    """A causal backbone for the time of a stream, its weights as they are now.

    Backbones with attention or MLPs, and whatever `serves` refuses, are called as they are.
    """

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone
        self.blocks: list[tuple[_Norm, FewTokens]] = []
        config = backbone.config
        if config.attn_layer_idx or config.d_intermediate:
            return
        with torch.no_grad():
            for block in backbone.layers:
                norm = _Norm(block.norm.weight, config.d_model, config.norm_eps)
                self.blocks.append((norm, FewTokens(block.mixer)))
            self.norm = _Norm(backbone.norm_f.weight, config.d_model, config.norm_eps)

    def __call__(self, embeddings: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Hidden states (b, l, d_model) and the state after them; `state` is not modified."""
        backbone = self.backbone
        plain = self.blocks and serves(backbone.layers[0].mixer, embeddings)
        if not plain or backbone.training:
            return backbone(embeddings, state=state, return_state=True)
        residual, states = embeddings.contiguous(), []
        for (norm, mixer), before in zip(self.blocks, state, strict=True):
            mixed, *after = mixer.mix(norm(residual), *before)
            residual = residual + mixed
            states.append(type(before)(*after))
        return self.norm(residual), tuple(states)


class FewTokens:
    """A causal Mamba2 with its weights as they are now, in the shapes that `mix` wants."""

    def __init__(self, mixer: Any) -> None:
        self.groups, self.d_conv, self.dt_limit = mixer.ngroups, mixer.d_conv, mixer.dt_limit
        self.sizes = mixer._split_sizes
        self.conv_sizes = [mixer.d_ssm, *[mixer.ngroups * mixer.d_state] * 2]
        self.project_in = mixer.in_proj.weight, mixer.in_proj.bias
        self.project_out = mixer.out_proj.weight, mixer.out_proj.bias
        self.taps = mixer.conv1d.weight.squeeze(1).t().contiguous()  # (d_conv, conv_dim)
        self.conv_bias = mixer.conv1d.bias
        self.dt_bias, self.A = mixer.dt_bias, mixer._decay_rates()
        self.D = mixer.D if mixer.D_has_hdim else mixer.D.repeat_interleave(mixer.headdim)
        self.norm: _Norm | None = None
        self.gates_first = True
        if mixer.norm is not None:
            self.norm = _Norm(mixer.norm.weight, mixer.norm.group_size, mixer.norm.eps)
            self.gates_first = not mixer.norm.norm_before_gate

    def mix(self, u: Tensor, window: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs (b, l, d_model), and the convolution's window and the state after them.

        Args:
            u: (b, l, d_model).
            window: (b, d_conv - 1, conv_dim), the inputs before.
            state: (b, h, p, n) float32. Neither is modified.
        """
        projected = _linear(u, *self.project_in).contiguous()
        *mlp, z, xBC, dt = projected.split_with_sizes(self.sizes, 2)
        inputs = torch.cat([window, xBC], 1)
        mixed = (inputs.unfold(1, self.d_conv, 1).mT * self.taps).sum(2)
        if self.conv_bias is not None:
            mixed.add_(self.conv_bias)
        x, B, C = F.silu(mixed, inplace=True).split_with_sizes(self.conv_sizes, 2)
        dt = F.softplus(dt + self.dt_bias)
        if self.dt_limit != (0.0, torch.inf):
            dt = dt.clamp(*self.dt_limit)
        y, after = self._scan(x, dt, B, C, state)
        y = self._gate(y.addcmul_(x, self.D), F.silu(z, inplace=True))
        if mlp:
            gate, value = mlp
            y = torch.cat([F.silu(gate) * value, y], dim=-1)
        return _linear(y, *self.project_out), inputs.narrow(1, u.shape[1], window.shape[1]), after

    def _scan(
        self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """y (b, l, h p) of state_t C_t, and the last state."""
        steps = dt * self.A
        if self.groups > 1:
            x, B, C, dt, steps = (self._by_group(t) for t in (x, B, C, dt, steps))
        rows, length, heads = dt.shape
        x = x.view(rows, length, heads, -1) * dt.unsqueeze(3)
        before = state.reshape(rows, x.shape[2] * x.shape[3], -1)  # (r, h p / g, n)
        total = steps.cumsum(1).mT.contiguous()  # (r, h / g, l), falling
        # Above the diagonal exp may overflow; tril drops what it holds there.
        weight = (total.unsqueeze(3) - total.unsqueeze(2)).exp_().tril_()
        decay = total.exp_().unsqueeze(3)
        # One product with the states for all heads of a group.
        y = torch.bmm(C, before.mT).view(x.shape)
        left = (x * weight.select(2, -1).mT.unsqueeze(3)).view(rows, length, -1)
        after = before.view(rows, heads, -1) * decay.select(2, -1)
        after = after.view(before.shape).baddbmm_(left.mT, B)
        scores = weight.mul_(torch.bmm(C, B.mT).unsqueeze(1)).view(-1, length, length)
        within = torch.bmm(scores, x.transpose(1, 2).reshape(rows * heads, length, -1))
        carried = y.transpose(1, 2)
        carried.mul_(decay).add_(within.view(carried.shape))
        y = y.view(rows, length, -1)
        return self._by_token(y) if self.groups > 1 else y, after.view(state.shape)

    def _by_group(self, t: Tensor) -> Tensor:
        """(b, l, g w) to (b g, l, w)."""
        return t.unflatten(2, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def _by_token(self, t: Tensor) -> Tensor:
        """(b g, l, w) to (b, l, g w)."""
        return t.unflatten(0, (-1, self.groups)).transpose(1, 2).flatten(2)

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        """y (b, l, h p), which is overwritten, normed beside its gate z, which had its SiLU."""
        if self.gates_first:
            y.mul_(z)
        if self.norm is not None:
            y = self.norm(y)
        return y if self.gates_first else y.mul_(z)


class _Norm:
    """RMSNorm over groups of `size` channels, in half of F.rms_norm's operations."""

    def __init__(self, weight: Tensor, size: int, eps: float) -> None:
        self.size = size
        self.weight = weight * size**0.5  # the vectors' length takes the place of their rms
        # As a tensor: an operation with a Python number makes one of it each time.
        self.least = weight.new_tensor((size * eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        groups = x if self.size == x.shape[-1] else x.unflatten(-1, (-1, self.size))
        length = torch.linalg.vector_norm(groups, dim=-1, keepdim=True)
        return (groups / torch.hypot(length, self.least)).view(x.shape).mul_(self.weight)


def _linear(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with the weights on the left: few columns take half the time of few rows."""
    rows = torch.mm(weight, u.reshape(-1, u.shape[2]).t()).t()
    if bias is not None:
        rows.add_(bias)
    return rows.view(u.shape[0], u.shape[1], -1)
