"""The shared backbone: a pre-norm residual stack of Mamba-2 blocks, attention where asked for.

Parameters are named as in mamba_ssm's MixerModel without its embedding, so that checkpoints map one
to one.

batch b · seqlen l · d_model d
"""

import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mamba2_apps import layouts
from mamba2_apps.attention import Attention, AttentionState
from mamba2_apps.checkpoint import (
    BACKBONE_FORMAT,
    HubUpload,
    cast_weights,
    load_weights,
    write_folder,
)
from mamba2_apps.checks import check_call, has_hooks, is_count, require
from mamba2_apps.mixer import Mamba2, Mamba2State
from mamba2_apps.padding import LeftAligned

BackboneState = tuple[Mamba2State | AttentionState, ...]


@dataclass(frozen=True)
class BackboneConfig:
    """What a Backbone is built from; checked at creation. The names are mamba_ssm's.

    Args:
        d_model: width of the residual stream.
        n_layer: number of blocks.
        d_state: state size of a head's channel.
        d_conv: width of the short convolution.
        expand: inner width over d_model.
        headdim: channels of a head.
        ngroups: groups of heads that share B and C.
        bidirectional: scan both ways; attention layers then see the whole sequence.
        d_intermediate: inner width of a SwiGLU after each mixer. 0: none. (mamba_ssm rounds it up
            to a multiple of 128.)
        attn_layer_idx: indices of the blocks that mix by attention.
        attn_cfg: options of those, as in mamba_ssm's MHA. None: heads of 64 with rotary embedding.
        norm_eps: epsilon of every norm.
        residual_in_fp32: keep the residual stream in float32 beside half-precision blocks.
        gradient_checkpointing: in training, keep only the residual stream between blocks and
            compute the rest again in the backward pass.
        drop_path: chance that training skips a row's last block; it rises linearly from 0 at the
            first.
        d_ssm: inner channels that pass through the state space. None: all.
        conv_init: the convolution's weights start uniform in ±conv_init. None: torch's default.
        A_init_range: -A starts uniform in this range.
        D_has_hdim: one D per channel instead of one per head.
        rmsnorm: normalise a mixer's output beside its gate.
        norm_before_gate: norm(y) * silu(z) instead of norm(y * silu(z)).
        dt_min: least step size at the start.
        dt_max: largest step size at the start.
        dt_init_floor: step sizes below this are raised to it at the start.
        dt_limit: range that step sizes are clamped to.
        bias: biases in the mixers' projections.
        conv_bias: a bias in the convolution.
        conv_per_direction: a convolution for each direction of a bidirectional mixer.

    Raises:
        ValueError: an impossible value, named.
        TypeError: an unknown name.
    """

    d_model: int
    n_layer: int
    _: KW_ONLY
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    bidirectional: bool = False
    d_intermediate: int = 0
    attn_layer_idx: tuple[int, ...] = ()
    attn_cfg: dict[str, Any] | None = None
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    gradient_checkpointing: bool = False
    drop_path: float = 0.0
    d_ssm: int | None = None
    conv_init: float | None = None
    A_init_range: tuple[float, float] = (1.0, 16.0)
    D_has_hdim: bool = False
    rmsnorm: bool = True
    norm_before_gate: bool = False
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_limit: tuple[float, float] = (0.0, math.inf)
    bias: bool = False
    conv_bias: bool = True
    conv_per_direction: bool = False

    def __post_init__(self) -> None:
        for name in ("attn_layer_idx", "A_init_range", "dt_limit"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is bool:
                require(isinstance(value, bool), field.name, value, "True or False")
        require(is_count(self.n_layer), "n_layer", self.n_layer, "an integer of at least 1")
        require(
            is_count(self.d_intermediate, 0),
            "d_intermediate",
            self.d_intermediate,
            "an integer of at least 0",
        )
        require(0 <= self.drop_path < 1, "drop_path", self.drop_path, "at least 0 and below 1")
        layers = set(self.attn_layer_idx)
        require(
            all(is_count(i, 0) and i < self.n_layer for i in layers)
            and len(layers) == len(self.attn_layer_idx),
            "attn_layer_idx",
            self.attn_layer_idx,
            f"different indices from 0 to {self.n_layer - 1}",
        )
        # The blocks check their own options; on the meta device that costs no memory.
        Mamba2(**self.mixer_options(), device="meta")
        if self.attn_layer_idx or self.attn_cfg is not None:
            options = self.attention_options()
            try:
                Attention(**options, device="meta")
            except ValueError as error:
                raise ValueError(f"attn_cfg: {error}") from error

    def mixer_options(self) -> dict[str, Any]:
        """Keyword arguments of this config's Mamba2 blocks."""
        return {name: getattr(self, name) for name in _options_of(Mamba2)}

    def attention_options(self) -> dict[str, Any]:
        """Keyword arguments of this config's Attention blocks."""
        causal = not self.bidirectional
        if self.attn_cfg is None:
            require(
                self.d_model % 64 == 0,
                "d_model",
                self.d_model,
                "a multiple of 64 for attention layers with attn_cfg=None, which have heads of 64",
            )
            cfg = {"num_heads": self.d_model // 64, "rotary_emb_dim": 64}
            cfg |= {"qkv_proj_bias": False, "out_proj_bias": False}
        else:
            cfg = dict(self.attn_cfg)
            require(
                cfg.pop("causal", causal) == causal,
                "attn_cfg",
                self.attn_cfg,
                f"causal={causal}, as bidirectional={self.bidirectional} says, or no causal",
            )
            known = [name for name in _options_of(Attention) if name not in ("d_model", "causal")]
            unknown = sorted(cfg.keys() - set(known))
            require(not unknown, "attn_cfg", unknown, f"among {', '.join(known)}")
            require("num_heads" in cfg, "attn_cfg", self.attn_cfg, "num_heads in it")
        return {"d_model": self.d_model, "causal": causal} | cfg

    def to_dict(self) -> dict[str, Any]:
        """Plain values for strict JSON; no upper limit of dt_limit is None there."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        low, high = self.dt_limit
        return values | {
            "attn_layer_idx": list(self.attn_layer_idx),
            "A_init_range": list(self.A_init_range),
            "dt_limit": [low, None if high == math.inf else high],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that `to_dict` described. Raises ValueError or TypeError as the class does."""
        values = dict(values)
        if "dt_limit" in values:
            low, high = values["dt_limit"]
            values["dt_limit"] = (low, math.inf if high is None else high)
        return cls(**values)


class RMSNorm(nn.RMSNorm):
    """RMSNorm of the residual stream: computed in the stream's type, returned in the weight's."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        return y.to(self.weight.dtype)


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020): fc2(up * silu(gate)), (up, gate) = fc1(x)."""

    def __init__(
        self, d_model: int, d_intermediate: int, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.fc1 = nn.Linear(d_model, 2 * d_intermediate, **kwargs)
        self.fc2 = nn.Linear(d_intermediate, d_model, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(up * F.silu(gate))


class Block(nn.Module):
    """residual + mixer(norm(residual)), and the same with an MLP where the config has one."""

    def __init__(
        self, config: BackboneConfig, index: int, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.drop_path = config.drop_path * index / max(1, config.n_layer - 1)
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps, **kwargs)
        self.mixer: Any = (
            Attention(**config.attention_options(), **kwargs)
            if index in config.attn_layer_idx
            else Mamba2(**config.mixer_options(), **kwargs)
        )
        self.mlp: GatedMLP | None = None
        if config.d_intermediate > 0:
            self.norm2 = RMSNorm(config.d_model, eps=config.norm_eps, **kwargs)
            self.mlp = GatedMLP(config.d_model, config.d_intermediate, **kwargs)

    def forward(
        self,
        residual: Tensor,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: Any = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Any]:
        """(b, l, d) to (b, l, d) and the mixer's state, None unless asked for."""
        if state is None and not return_state and self._is_one_operator(residual, lengths):
            return self._mlp(self.mixer.add_to(residual, self.norm, lengths, cu_seqlens)), None
        mixed = self.mixer(
            self.norm(residual),
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=return_state,
        )
        mixed, state = mixed if return_state else (mixed, None)
        return self._mlp(residual + self._drop(mixed)), state

    def step(self, residual: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token, (b, d)."""
        mixed, state = self.mixer.step(self.norm(residual), state)
        return self._mlp(residual + mixed), state

    def _is_one_operator(self, residual: Tensor, lengths: Tensor | None) -> bool:
        """Whether the mixer's operator takes the norm before it and the addition after it, too."""
        return (
            isinstance(self.mixer, Mamba2)
            and type(self.norm) is RMSNorm
            and not has_hooks(self.norm)
            and not (self.training and self.drop_path > 0)
            and self.mixer.adds_itself(residual, lengths)
        )

    def _mlp(self, residual: Tensor) -> Tensor:
        if self.mlp is None:
            return residual
        return residual + self._drop(self.mlp(self.norm2(residual)))

    def _drop(self, branch: Tensor) -> Tensor:
        """Stochastic depth (Huang et al. 2016): whole rows, the kept ones scaled up."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        kept = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(keep)
        return branch * (kept / keep)


class Backbone(HubUpload, nn.Module):
    """A stack of Mamba-2 blocks over (b, l, d_model); hidden states after a final norm.

    Args:
        config: sizes and options.
        device: where the parameters lie.
        dtype: the parameters' type; A_log, D and dt_bias start as float32 whatever it is.
    """

    def __init__(
        self, config: BackboneConfig, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layers: Any = nn.ModuleList(Block(config, i, **kwargs) for i in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, eps=config.norm_eps, **kwargs)
        self._scale_for_depth()

    def reset_parameters(self) -> None:
        """Draws every parameter anew, for a backbone moved from the meta device by `to_empty`."""
        for module in reversed(list(self.modules())):  # parts before the whole that adjusts them
            reset: Any = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()
        self._scale_for_depth()

    @torch.no_grad()
    def _scale_for_depth(self) -> None:
        """GPT-2's rule, as in mamba_ssm: projections into the residual stream shrink with depth."""
        residuals = self.config.n_layer * (1 if self.config.d_intermediate == 0 else 2)
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                parameter.div_(math.sqrt(residuals))
            elif name.endswith(("_proj.bias", "fc1.bias", "fc2.bias")):
                parameter.zero_()

    def init_state(self, batch_size: int) -> BackboneState:
        """The state before any token, for batch_size rows (or packed sequences)."""
        self._require_causal("init_state")
        return tuple(layer.mixer.init_state(batch_size) for layer in self.layers)

    def forward(
        self,
        embeddings: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: BackboneState | None = None,
        return_state: bool = False,
    ) -> Any:
        """Hidden states of a batch of sequences.

        Args:
            embeddings: (b, l, d_model), or (1, total, d_model) with cu_seqlens.
            mask: (b, l) bool, True where there is data: one run of True in a row, padding before,
                after or both. Outputs at data are those of the row without its padding, whatever
                the padding holds (NaN too), and 0 at padding; a row without data is all 0. Gaps are
                looked for where the mask lies on the CPU, elsewhere only under
                MAMBA2_APPS_DEBUG=1.
            cu_seqlens: (nseq + 1,) int32, where packed sequences begin and end, from 0 to total.
            state: what came before, from `init_state` or an earlier call; it is not modified.
                Pieces of any length give what one pass gives. Causal backbones only. An attention
                layer's state is a key-value cache: it grows by each piece, padding included.
            return_state: also return the state after each row's last data; it passes through
                padding as if that were not there.

        Returns:
            hidden (b, l, d_model), in the parameters' type; or (hidden, state).

        Raises:
            ValueError: mask and cu_seqlens together, a state asked of a bidirectional backbone, a
                pack and a state with attention layers, shapes or types that do not fit, a mask with
                gaps.
        """
        check_call(embeddings, self.config.d_model, mask, None, cu_seqlens)
        if state is not None or return_state:
            self._require_causal("state" if state is not None else "return_state")
        if state is not None:
            self._check_state(state)
        rows = None if mask is None else LeftAligned(mask, *embeddings.shape[:2])
        lengths = None if rows is None else rows.lengths
        residual = self._residual(embeddings if rows is None else rows.align(embeddings))
        states = []
        for i, layer in enumerate(self.layers):
            inputs = (
                residual,
                lengths,
                cu_seqlens,
                None if state is None else state[i],
                return_state,
            )
            if self.config.gradient_checkpointing and self.training and torch.is_grad_enabled():
                residual, layer_state = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                residual, layer_state = layer(*inputs)
            states.append(layer_state)
        hidden = self.norm_f(residual)
        if rows is not None:
            hidden = rows.restore(hidden)
        return (hidden, tuple(states)) if return_state else hidden

    def step(self, embedding: Tensor, state: BackboneState) -> tuple[Tensor, BackboneState]:
        """One token: embedding (b, d_model) and a state to hidden and the state after it.

        The state passed in is not modified. Raises ValueError for a bidirectional backbone.
        """
        self._require_causal("step")
        self._check_state(state)
        if embedding.ndim != 2 or embedding.shape[-1] != self.config.d_model:
            raise ValueError(
                f"embedding: expected (batch, {self.config.d_model}), got {tuple(embedding.shape)}"
            )
        residual = self._residual(embedding)
        states = []
        for layer, layer_state in zip(self.layers, state, strict=True):
            residual, layer_state = layer.step(residual, layer_state)
            states.append(layer_state)
        return self.norm_f(residual), tuple(states)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors into the directory `path`, each atomically."""
        write_folder(path, BACKBONE_FORMAT, {"config": self.config.to_dict()}, self.state_dict())

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A backbone from a checkpoint, in eval mode.

        Read are what `save_pretrained` wrote, Hugging Face's Mamba2 folders and state-spaces'
        (see `mamba2_apps.layouts`), by path or by name on the Hub. An embedding table and an output
        head are left out: `mamba2_apps.language.LanguageModel` takes them too. dtype None
        keeps what is stored; A_log, D and dt_bias are only ever widened.

        Raises:
            FileNotFoundError: no such directory or repository, or a file missing in it.
            ValueError: a damaged file, a layout that is not known, weights that do not fit.
        """
        backbone = cls.from_checkpoint(layouts.read(path_or_repo))
        cast_weights(backbone, dtype)
        return backbone.to(device)

    @classmethod
    def from_checkpoint(cls, checkpoint: layouts.Checkpoint) -> Self:
        """A backbone with the tensors of a checkpoint that was read, in eval mode."""
        try:
            config = BackboneConfig.from_dict(checkpoint.config)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{checkpoint.folder}: its config.json describes no backbone: {error}"
            ) from error
        backbone = cls(config, device="meta")
        load_weights(backbone, checkpoint.backbone, checkpoint.folder, assign=True)
        return backbone.eval()

    def _residual(self, embeddings: Tensor) -> Tensor:
        # Additions keep their operands' strides: the tokens of an adapter that convolves, which are
        # transposed, would be copied again in every block.
        embeddings = embeddings.contiguous()
        if not self.config.residual_in_fp32:
            return embeddings
        return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))

    def _check_state(self, state: BackboneState) -> None:
        if len(state) != self.config.n_layer:
            raise ValueError(
                f"state: expected {self.config.n_layer} entries, one a layer, got {len(state)}"
            )

    def _require_causal(self, what: str) -> None:
        if self.config.bidirectional:
            raise ValueError(
                f"{what}: a bidirectional backbone has no state to carry, its reverse direction "
                "begins at the end; build it with bidirectional=False"
            )


def _options_of(module: type[nn.Module]) -> list[str]:
    names = list(inspect.signature(module).parameters)
    return [name for name in names if name not in ("device", "dtype")]
