"""Models of DNA: one strand or both.

A model with `strands="equivariant"` puts both strands on the batch axis through one set of weights
and joins them at the head, so that f(RC x) = RC f(x) for outputs along the sequence and
f(RC x) = f(x) for pooled ones, whatever the weights: Caduceus' symmetry (Schiff et al. 2024) for
Mamba-2, with padding, packing and gradient checkpointing. `strand_mixing` lets the strands see each
other between the blocks; the matrix [[1, B], [B, 1]] commutes with swapping them.

Dimensions: batch b · seqlen l · d_model d · outputs k
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mamba2_apps.backbone import Backbone, BackboneConfig
from mamba2_apps.heads import LanguageModelHead, TokenHead, TrackHead, check_pool, pool_tokens

Strands = Literal["single", "average", "equivariant"]


class DNAModel(nn.Module):
    """adapter ∘ backbone ∘ head over the strand that is given, or over both.

    Args:
        num_outputs: outputs of the head, such as classes; 0, for data without labels: the
            vocabulary of the adapter.
        adapter: called with d_model, gives a module (ids (b, l), mask) -> (embeddings (b, l, d),
            mask).
        backbone: sizes of the Mamba-2 backbone.
        head: called with d_model and num_outputs, gives a module (hidden (b, l, d), mask) ->
            outputs.
        strands: single: the strand that is given. equivariant: both, in training and use; the
            backbone is bidirectional. average: single while training, and the mean over both
            strands in use (Caduceus-Ph), which a causal model can do for pooled answers only.
        strand_mixing: let the strands of an equivariant model see each other after every block.
        strand_pairs: pairs of outputs that trade places on the other strand, such as [[1, 2]] for
            genes on + and on -; other outputs mean the same on both. "halves": the second half are
            the first half's counterparts.
        packed: run the sequences of a padded batch end to end through the backbone, which saves the
            time and memory of padding. Not with attention layers.

    Raises ValueError for an equivariant causal model, or tokens without a reverse complement.
    """

    def __init__(
        self,
        num_outputs: int,
        *,
        adapter: Callable[[int], nn.Module],
        backbone: BackboneConfig,
        head: Callable[[int, int], nn.Module],
        strands: Strands = "single",
        strand_mixing: bool = False,
        strand_pairs: list[list[int]] | Literal["halves"] | None = None,
        packed: bool = False,
    ) -> None:
        super().__init__()
        _check_strands(strands, strand_mixing, backbone)
        self.strands, self.packed = strands, packed
        tokens: Any = adapter(backbone.d_model)
        self.adapter: Any = tokens
        self.backbone = Backbone(backbone)
        num_outputs = num_outputs or tokens.target_size
        self.head: Any = head(backbone.d_model, num_outputs)
        if strands == "average" and not backbone.bidirectional and _answers_along(self.head):
            raise ValueError(
                "model.strands is average, the backbone causal and the head answers for each base: "
                "what comes before a base on the other strand is its future; set strands single, "
                "or model.backbone.bidirectional true"
            )
        if not backbone.bidirectional and getattr(tokens, "conv", None) is not None:
            raise ValueError(
                "adapter.context shows a causal model the tokens after each one; set it to 0, or "
                "model.backbone.bidirectional true"
            )
        if not backbone.bidirectional and getattr(tokens, "phase", None) is not None:
            raise ValueError(
                "adapter.period counts from the first token that a call is given, which a causal "
                "model's carried state does not know; set it to 0, or model.backbone.bidirectional "
                "true"
            )
        if packed and backbone.attn_layer_idx:
            raise ValueError("model.packed is true; attention layers take padded batches only")
        if strands != "single":
            complement: Tensor = tokens.complement  # raises for tokens without one
            self.register_buffer("_complement", complement, persistent=False)
            swap = (
                complement
                if isinstance(self.head, LanguageModelHead)
                else _swap(strand_pairs or [], num_outputs)
            )
            self.register_buffer("_swap", swap, persistent=False)
        self.mixing = (
            nn.ModuleList(StrandMixing(backbone.d_model) for _ in range(backbone.n_layer))
            if strand_mixing
            else None
        )
        if self.mixing is not None:
            # The backbone stays a plain one, which other models can load.
            for layer, mixing in zip(self.backbone.layers, self.mixing, strict=True):
                layer.register_forward_hook(mixing.after_block)  # type: ignore[attr-defined]

    @property
    def token_by_token(self) -> bool:
        """Whether it does nothing along the sequence beside its backbone: the other strand begins
        where this one ends."""
        return self.strands == "single" and not self.packed

    @property
    def both_strands(self) -> bool:
        """Whether the next call runs the other strand, too."""
        return self.strands == "equivariant" or (self.strands == "average" and not self.training)

    def features(
        self, inputs: Tensor, mask: Tensor | None = None, hide: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states (b, l, d) after the final norm, and the mask (b, l) of their tokens.

        Of both strands, their mean at each base: RC x gives them in reversed order.
        """
        hidden, _ = self.strand_features(inputs, mask, hide)
        if self.both_strands:
            forward, reverse = _strands(hidden)
            hidden = (forward + reverse.flip(1)) / 2
        return hidden, mask

    def strand_features(
        self, inputs: Tensor, mask: Tensor | None = None, hide: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states and mask of each strand in its own direction, for `answer`.

        Of one strand (b, l, d). Of both (2 b, l, d), the other strand in the second half; a base
        that is hidden (hide (b, l) bool) is hidden there, too.
        """
        if self.both_strands:
            inputs = torch.cat([inputs, self._complement[inputs].flip(1)])  # type: ignore[index]
            mask, hide = _with_flipped(mask), _with_flipped(hide)
        options = {} if hide is None else {"hide": hide}
        embeddings, mask = self.adapter(inputs, mask, **options)
        if self.packed and mask is not None:
            return _through_pack(self.backbone, embeddings, mask), mask
        return self.backbone(embeddings, mask=mask), mask

    def answer(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Outputs of the head for what `strand_features` gave."""
        outputs = self.head(hidden, mask)
        if not self.both_strands:
            return outputs
        forward, reverse = _strands(outputs)
        if outputs.dim() == 3:
            self._check_bins(hidden)
            reverse = reverse.flip(1)
        return (forward + reverse.index_select(-1, self._swap)) / 2  # type: ignore[arg-type]

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, hide: Tensor | None = None
    ) -> Tensor:
        return self.answer(*self.strand_features(inputs, mask, hide))

    def embed(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """One vector (b, d) per input, pooled as the head pools, the same for both strands."""
        hidden, mask = self.strand_features(inputs, mask)
        pooled = pool_tokens(hidden, mask, getattr(self.head, "pool", "mean"))
        return _strands(pooled).mean(0) if self.both_strands else pooled

    def token_mask(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Which tokens (b, l) hold data: `mask` itself."""
        return mask

    def _check_bins(self, hidden: Tensor) -> None:
        bin_size = self.head.bin_size if isinstance(self.head, TrackHead) else 1
        if hidden.shape[1] % bin_size:
            raise ValueError(
                f"{hidden.shape[1]} tokens are no multiple of head.bin_size, {bin_size}: the bins "
                "of the two strands would not meet; cut or pad the input"
            )


class StrandMixing(nn.Module):
    """h + B norm(h') for each token, h' the hidden state of the other strand at the same base."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model)
        self.proj = nn.Linear(d_model, d_model, bias=False)
        nn.init.normal_(self.proj.weight, std=0.1 * d_model**-0.5)

    def forward(self, residual: Tensor, partner: Tensor) -> Tensor:
        """residual (r, l, d); partner (r, l) int64: flat index of each token's other strand."""
        flat = residual.flatten(0, 1)
        other = flat.index_select(0, partner.flatten()).reshape(residual.shape)
        return residual + self.proj(self.norm(other.to(self.proj.weight.dtype)))

    def after_block(self, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """A forward hook of a Block: mixes what it gives back."""
        residual, state = output
        _, lengths, cu_seqlens, *_ = inputs
        partner = (
            _partner_in_pack(cu_seqlens, residual.shape[1])
            if cu_seqlens is not None
            else _partner_in_rows(residual, lengths)
        )
        return self(residual, partner), state


class CenterHead(nn.Module):
    """One answer for a window around a site, (b, n_outputs), from the tokens around its middle.

    The states of the `width` middle tokens, each at its own place, and the mean over all tokens.
    Inputs have one length, without padding.

    Args:
        d_model: width of the states.
        n_outputs: answers.
        width: tokens in the middle whose places count.
        hidden: width of a hidden layer before the answer; 0: none.
        dropout: part of the values before each layer that training sets to 0.
    """

    pool = "mean"

    def __init__(
        self,
        d_model: int,
        n_outputs: int,
        *,
        width: int = 2,
        hidden: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"head.width is {width}, expected at least 1 token")
        if hidden < 0:
            raise ValueError(f"head.hidden is {hidden}, expected 0 or more")
        self.width = width
        self.dropout = nn.Dropout(dropout)
        inputs = (width + 1) * d_model
        self.hidden = (
            nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Dropout(dropout))
            if hidden
            else nn.Identity()
        )
        self.proj = nn.Linear(hidden or inputs, n_outputs)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        length = hidden.shape[1]
        if length < self.width:
            raise ValueError(f"{length} tokens, expected at least head.width, {self.width}")
        if mask is not None and not bool(mask.all()):
            raise ValueError("inputs of different lengths have no common middle; cut them alike")
        start = (length - self.width) // 2
        middle = hidden[:, start : start + self.width].flatten(1)
        return self.proj(self.hidden(self.dropout(torch.cat([middle, hidden.mean(1)], -1))))


class MLPHead(nn.Module):
    """An answer for each token or, with `pool`, for the input, through one hidden layer.

    (b, l, n_outputs) with pool None, else (b, n_outputs).
    """

    def __init__(
        self,
        d_model: int,
        n_outputs: int,
        *,
        pool: str | int | None = None,
        expand: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if pool is not None:
            self.pool = check_pool(pool)
        self.along = pool is None
        self.layers = nn.Sequential(
            nn.Linear(d_model, expand * d_model),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(expand * d_model, n_outputs),
        )

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.along:
            return self.layers(pool_tokens(hidden, mask, self.pool))
        outputs = self.layers(hidden)
        return outputs if mask is None else torch.where(mask[..., None], outputs, 0)


def _check_strands(strands: str, strand_mixing: bool, backbone: BackboneConfig) -> None:
    if strands not in ("single", "average", "equivariant"):
        raise ValueError(f"model.strands is {strands!r}, expected single, average or equivariant")
    if strands == "equivariant" and not backbone.bidirectional:
        raise ValueError(
            "model.strands is equivariant but the backbone is causal: what comes before a base on "
            "the other strand is its future; set model.backbone.bidirectional true, or strands "
            "average, which averages pooled answers"
        )
    if strand_mixing and strands != "equivariant":
        raise ValueError(f"model.strand_mixing needs strands equivariant, not {strands}")


def _answers_along(head: nn.Module) -> bool:
    """Whether a head answers for each token and not for the whole input."""
    return isinstance(head, TokenHead | TrackHead | LanguageModelHead) or getattr(
        head, "along", False
    )


def _swap(pairs: list[list[int]] | str, k: int) -> Tensor:
    """(k,) int64: the output that each output becomes on the other strand."""
    if isinstance(pairs, str):
        if pairs != "halves" or k % 2:
            raise ValueError(
                f"model.strand_pairs is {pairs!r} for {k} outputs, which are no halves"
            )
        return torch.arange(k).roll(k // 2)
    swap = torch.arange(k)
    for pair in pairs:
        if len(pair) != 2 or not all(0 <= i < k for i in pair) or any(swap[i] != i for i in pair):
            raise ValueError(
                f"model.strand_pairs has {pair}, expected two outputs of 0 to {k - 1} that are in "
                "no other pair"
            )
        swap[pair] = swap[pair[::-1]]
    return swap


def _strands(rows: Tensor) -> Tensor:
    """(2, b, …) of rows (2 b, …); `chunk` would fix the batch size of an exported graph."""
    return rows.unflatten(0, (2, -1))


def _with_flipped(values: Tensor | None) -> Tensor | None:
    return None if values is None else torch.cat([values, values.flip(1)])


def _through_pack(backbone: Backbone, embeddings: Tensor, mask: Tensor) -> Tensor:
    """Hidden states (b, l, d), 0 at padding, of rows that were run end to end."""
    # The one look at the device: every indexing by the mask itself would be another.
    lengths = [length for length in mask.sum(1).tolist() if length]
    if not lengths:
        return embeddings.new_zeros(embeddings.shape)
    ends = list(accumulate(lengths, initial=0))
    places = torch.nonzero_static(mask.flatten(), size=ends[-1])[:, 0]
    tokens = embeddings.flatten(0, 1)
    packed = backbone(
        tokens.index_select(0, places)[None],
        cu_seqlens=torch.tensor(ends, dtype=torch.int32).to(mask.device, non_blocking=True),
    )[0]
    hidden = packed.new_zeros(tokens.shape[0], packed.shape[1]).index_copy(0, places, packed)
    return hidden.unflatten(0, mask.shape)


def _partner_in_rows(residual: Tensor, lengths: Tensor | None) -> Tensor:
    """(r, l): flat index of the same base in the row of the other strand; data come first."""
    rows, length = residual.shape[:2]
    position = torch.arange(length, device=residual.device)
    if lengths is None:
        mirrored = (length - 1 - position).expand(rows, -1)
    else:
        mirrored = torch.where(
            position < lengths[:, None], lengths[:, None] - 1 - position, position
        )
    other = _strands(torch.arange(rows, device=residual.device)).flip(0).flatten()
    return other[:, None] * length + mirrored


def _partner_in_pack(cu_seqlens: Tensor, total: int) -> Tensor:
    """(1, total): index of the same base in the sequence of the other strand."""
    position = torch.arange(total, device=cu_seqlens.device)
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    sequence = torch.searchsorted(ends, position, right=True)
    other = (sequence + len(starts) // 2) % len(starts)
    return (starts[other] + ends[sequence] - 1 - position)[None]
