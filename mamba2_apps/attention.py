"""Softmax attention for the hybrid backbones, with the parameters of mamba_ssm's MHA.

The Mamba-2 paper's best language model is a hybrid: a few of its layers are these (section 9.2.3).

batch b · seqlen l · heads h · key-value heads k · head_dim p · d_model d · cache length c
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba2_apps.checks import check_call, is_count, require
from mamba2_apps.kernels import causal_conv1d
from mamba2_apps.mixer import last_inputs
from mamba2_apps.padding import LeftAligned, data_positions


class AttentionState(NamedTuple):
    """What causal attention carries: every key and value so far, so it grows with the sequence.

    Row i's first lengths[i] entries are data. A piece with padding makes the cache longer by the
    padding too.
    """

    keys: Tensor  # (b, c, k, p), rotated
    values: Tensor  # (b, c, k, p)
    lengths: Tensor  # (b,) int64
    conv: Tensor  # (b, d_conv - 1, (h + 2k) p) the convolution's last inputs; (b, 0, …) without one


class Attention(nn.Module):
    """Multi-head attention through scaled_dot_product_attention.

    Args:
        d_model: width of the input and the output.
        num_heads: query heads.
        num_heads_kv: key and value heads, a divisor of num_heads. None: as many.
        head_dim: channels of a head. None: d_model // num_heads.
        mlp_dim: inner channels of a gated MLP beside the attention, half of them gates; even.
            (mamba_ssm rounds this up to a multiple of 256.)
        qkv_proj_bias: a bias in in_proj.
        out_proj_bias: a bias in out_proj.
        softmax_scale: factor on the scores. None: 1 / sqrt(head_dim).
        causal: each token sees itself and what came before.
        d_conv: width of a causal convolution over queries, keys and values. 0: none.
        rotary_emb_dim: channels of a head that rotary position embedding turns, even. 0: none.
        rotary_emb_base: its base.
        rotary_emb_interleaved: turn neighbouring channels instead of the two halves.
        device: where the parameters lie.
        dtype: the parameters' type.

    Raises:
        ValueError: a value that no attention layer can have; the message names it.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = False,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require(is_count(num_heads), "num_heads", num_heads, "an integer of at least 1")
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        require(
            is_count(num_heads_kv) and num_heads % num_heads_kv == 0,
            "num_heads_kv",
            num_heads_kv,
            f"a divisor of num_heads={num_heads}",
        )
        if head_dim is None:
            require(
                d_model % num_heads == 0,
                "num_heads",
                num_heads,
                f"a divisor of d_model={d_model}, or a head_dim of its own",
            )
            head_dim = d_model // num_heads
        require(is_count(head_dim), "head_dim", head_dim, "an integer of at least 1")
        require(is_count(mlp_dim, 0) and mlp_dim % 2 == 0, "mlp_dim", mlp_dim, "even, 0 for none")
        require(is_count(d_conv, 0), "d_conv", d_conv, "an integer of at least 0")
        require(
            is_count(rotary_emb_dim, 0) and rotary_emb_dim % 2 == 0 and rotary_emb_dim <= head_dim,
            "rotary_emb_dim",
            rotary_emb_dim,
            f"even and at most head_dim={head_dim}",
        )
        require(rotary_emb_base > 0, "rotary_emb_base", rotary_emb_base, "above 0")

        self.d_model = d_model
        self.num_heads = num_heads
        self.num_heads_kv = num_heads_kv
        self.head_dim = head_dim
        self.mlp_dim = mlp_dim
        self.softmax_scale = softmax_scale
        self.causal = causal
        self.d_conv = d_conv
        self.rotary_emb_dim = rotary_emb_dim
        self.rotary_emb_base = rotary_emb_base
        self.rotary_emb_interleaved = rotary_emb_interleaved

        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        qkv_dim = self.qkv_dim = head_dim * (num_heads + 2 * num_heads_kv)
        self.in_proj = nn.Linear(d_model, qkv_dim + mlp_dim, bias=qkv_proj_bias, **kwargs)
        if d_conv > 0:
            # Only its parameters are used: the convolution runs channels-last.
            self.conv1d = nn.Conv1d(qkv_dim, qkv_dim, d_conv, groups=qkv_dim, **kwargs)
        self.out_proj = nn.Linear(
            head_dim * num_heads + mlp_dim // 2, d_model, bias=out_proj_bias, **kwargs
        )

    def init_state(self, batch_size: int) -> AttentionState:
        """The state before any token: an empty cache."""
        self._require_causal("init_state")
        weight = self.in_proj.weight
        empty = weight.new_zeros(batch_size, 0, self.num_heads_kv, self.head_dim)
        lengths = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        conv = weight.new_zeros(batch_size, max(self.d_conv - 1, 0), self.qkv_dim)
        return AttentionState(empty, empty.clone(), lengths, conv)

    def forward(
        self,
        u: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: AttentionState | None = None,
        return_state: bool = False,
    ) -> Any:
        """Mixes along the sequence; the arguments are those of Mamba2.forward.

        A pack builds an (l, l) mask of which token sees which, and carries no state.

        Returns:
            (b, l, d_model), or that and an AttentionState.

        Raises:
            ValueError: as Mamba2.forward, and a state together with cu_seqlens.
        """
        check_call(u, self.d_model, mask, lengths, cu_seqlens)
        if state is not None or return_state:
            self._require_causal("state" if state is not None else "return_state")
            if cu_seqlens is not None:
                raise ValueError(
                    "cu_seqlens: attention layers carry no state through a pack; give the "
                    "sequences as rows with a mask"
                )
        if mask is None:
            out, final_state = self._attend(u, lengths, cu_seqlens, state, return_state)
        else:
            rows = LeftAligned(mask, *u.shape[:2])
            out, final_state = self._attend(rows.align(u), rows.lengths, None, state, return_state)
            out = rows.restore(out)
        return (out, final_state) if return_state else out

    def step(self, u: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """One token: u (b, d_model) and a state to (b, d_model) and the state after it."""
        out, state = self(u[:, None], state=state, return_state=True)
        return out[:, 0], state

    def _attend(
        self,
        u: Tensor,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        state: AttentionState | None,
        return_state: bool,
    ) -> tuple[Tensor, AttentionState | None]:
        qkv, mlp = self.in_proj(u).split([self.qkv_dim, self.mlp_dim], dim=-1)
        qkv, window = self._convolve(qkv, lengths, cu_seqlens, state, return_state)
        heads = [self.num_heads, self.num_heads_kv, self.num_heads_kv]
        query, key, value = qkv.unflatten(-1, (sum(heads), self.head_dim)).split(heads, dim=2)
        if self.rotary_emb_dim > 0:
            cos, sin = self._rotations(u, cu_seqlens, state)
            query, key = self._rotate(query, cos, sin), self._rotate(key, cos, sin)

        visible = self._visible(u, lengths, cu_seqlens, state)
        final_state = None
        if state is not None or return_state:
            key, value, total = _append(state, key, value, lengths)
            final_state = AttentionState(key, value, total, window)
        y = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=visible,
            is_causal=self.causal and visible is None,
            scale=self.softmax_scale,
            enable_gqa=self.num_heads_kv < self.num_heads,
        )
        y = y.transpose(1, 2).flatten(2)
        if self.mlp_dim > 0:
            up, gate = mlp.chunk(2, dim=-1)
            y = torch.cat([y, up * F.silu(gate)], dim=-1)
        return self.out_proj(y), final_state if return_state else None

    def _convolve(
        self,
        qkv: Tensor,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        state: AttentionState | None,
        return_state: bool,
    ) -> tuple[Tensor, Tensor]:
        if self.d_conv == 0:
            return qkv, qkv[:, :0]
        before = None if state is None else state.conv
        y, window = causal_conv1d(
            qkv,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_states=before,
            cu_seqlens=cu_seqlens,
            return_final_states=True,
        )
        if lengths is not None and return_state:
            window = last_inputs(qkv, before, lengths, self.d_conv - 1)
        return y, window

    def _rotations(
        self, u: Tensor, cu_seqlens: Tensor | None, state: AttentionState | None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, (b or 1, l, 1, rotary_emb_dim / 2), float32 (float64 in a float64 model)."""
        position = torch.arange(u.shape[1], device=u.device)
        if cu_seqlens is not None:
            position = position - cu_seqlens[_sequence_of_token(cu_seqlens, u.shape[1])]
        if state is not None:
            position = position + state.lengths[:, None]
        dtype = torch.promote_types(u.dtype, torch.float32)
        half = self.rotary_emb_dim // 2
        exponent = torch.arange(half, device=u.device, dtype=dtype) / half
        angle = position[..., None].to(dtype) * torch.exp(
            -math.log(self.rotary_emb_base) * exponent
        )
        angle = angle[..., None, :] if angle.ndim == 3 else angle[None, :, None, :]
        return angle.cos(), angle.sin()

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary position embedding (Su et al. 2021) over the first channels of each head."""
        turned, rest = x.split([self.rotary_emb_dim, self.head_dim - self.rotary_emb_dim], dim=-1)
        if self.rotary_emb_interleaved:
            first, second = turned.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            first, second = turned.chunk(2, dim=-1)
        pair = (first * cos - second * sin, first * sin + second * cos)
        turned = (
            torch.stack(pair, dim=-1).flatten(-2)
            if self.rotary_emb_interleaved
            else torch.cat(pair, dim=-1)
        )
        return torch.cat([turned.to(x.dtype), rest], dim=-1)

    def _visible(
        self,
        u: Tensor,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        state: AttentionState | None,
    ) -> Tensor | None:
        """Which key each query sees, (b or 1, 1, l, c + l or 1) bool; None: all, or all before it.

        Trailing padding lies in the future of all data, so causal attention needs no mask for it.
        """
        seqlen = u.shape[1]
        if cu_seqlens is not None:
            sequence = _sequence_of_token(cu_seqlens, seqlen)
            same = sequence[:, None] == sequence
            return (same.tril() if self.causal else same)[None, None]
        if state is not None:
            query = state.lengths[:, None] + torch.arange(seqlen, device=u.device)
            key = torch.arange(state.keys.shape[1] + seqlen, device=u.device)
            return (key <= query[..., None])[:, None]
        if self.causal or lengths is None:
            return None
        # A row without data sees its first, padded token: a softmax over nothing would be NaN.
        return data_positions(lengths.clamp(min=1), seqlen)[:, None, None]

    def _require_causal(self, what: str) -> None:
        if not self.causal:
            raise ValueError(f"{what}: attention that is not causal has no state to carry")


def _append(
    state: AttentionState | None, key: Tensor, value: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with the new ones behind each row's old data, and the number of data."""
    batch, seqlen = key.shape[:2]
    added = lengths if lengths is not None else torch.full((batch,), seqlen, device=key.device)
    if state is None:
        return key, value, added
    place = state.lengths[:, None] + torch.arange(seqlen, device=key.device)
    place = place[:, :, None, None].expand_as(key)

    def grow(cache: Tensor, new: Tensor) -> Tensor:
        return F.pad(cache.to(new.dtype), (0, 0, 0, 0, 0, seqlen)).scatter(1, place, new)

    return grow(state.keys, key), grow(state.values, value), state.lengths + added


def _sequence_of_token(cu_seqlens: Tensor, seqlen: int) -> Tensor:
    """(l,) which packed sequence each token belongs to."""
    token = torch.arange(seqlen, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], token, right=True)
