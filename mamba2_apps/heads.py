"""Heads: hidden states to answers. A head knows no domain and no loss.

Every head is called with hidden (b, l, d_model), as a Backbone returns it, and a mask (b, l) bool,
True where there is data, or None when all of it is. Logits and values are returned as they are:
softmax, sigmoid and the like belong to the loss and the report.

batch b · seqlen l · d_model d
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from mamba2_apps.parallel import ContextParallel

Pool = int | str


def pool_tokens(hidden: Tensor, mask: Tensor | None, pool: Pool) -> Tensor:
    """One vector for each row, (b, d).

    pool is "mean" over the row's data, "last" for its last data token, or the index of a token (a
    class token, say). A row without data gives zeros with "mean" and "last".
    """
    if isinstance(pool, int):
        return hidden[:, pool]
    if mask is None:
        return hidden.mean(1) if pool == "mean" else hidden[:, -1]
    if pool == "mean":
        total = torch.where(mask[..., None], hidden, 0).sum(1)
        return total / mask.sum(1, keepdim=True).clamp(min=1)
    position = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, position, 0).amax(1)
    token = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
    return torch.where(mask.any(1, keepdim=True), token, 0)


def check_pool(pool: Pool) -> Pool:
    """pool itself; ValueError unless it is "mean", "last" or an integer."""
    if pool in ("mean", "last") or (isinstance(pool, int) and not isinstance(pool, bool)):
        return pool
    raise ValueError(f"pool={pool!r}: expected 'mean', 'last' or the index of a token")


class PooledHead(nn.Module):
    """One answer for a sequence, (b, n_outputs): classes, labels or regression targets."""

    def __init__(self, d_model: int, n_outputs: int, *, pool: Pool = "mean") -> None:
        super().__init__()
        self.pool = check_pool(pool)
        self.proj = nn.Linear(d_model, n_outputs)
        # Set by `mamba2_apps.parallel.split_sequence`.
        self.context_parallel: ContextParallel | None = None

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        pooled = pool_tokens(hidden, mask, self.pool)
        if self.context_parallel is not None:
            if self.pool != "mean":
                raise ValueError(
                    f"pool is {self.pool!r}; over a sequence that is split over ranks only 'mean'"
                )
            pooled = self.context_parallel.sum(pooled) / self.context_parallel.size
        return self.proj(pooled)


class TokenHead(nn.Module):
    """An answer for each token, (b, l, n_outputs): classes or values; 0 at padding."""

    token_by_token = True

    def __init__(self, d_model: int, n_outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_model, n_outputs)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        outputs = self.proj(hidden)
        return outputs if mask is None else torch.where(mask[..., None], outputs, 0)


class CTCHead(nn.Module):
    """Log-probabilities for connectionist temporal classification, (b, l, 1 + n_labels).

    Index `blank` is 0, label i is at 1 + i. In float32 at least, as torch's ctc_loss takes them
    once transposed to (l, b, 1 + n_labels). At padding all mass is on blank, so a greedy reading
    needs no lengths.
    """

    blank = 0
    token_by_token = True

    def __init__(self, d_model: int, n_labels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_model, 1 + n_labels)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        logits = self.proj(hidden)
        wide = torch.promote_types(logits.dtype, torch.float32)
        scores = F.log_softmax(logits, dim=-1, dtype=wide)
        if mask is None:
            return scores
        silent = torch.full_like(scores[0, 0], torch.finfo(wide).min)
        silent[self.blank] = 0
        return torch.where(mask[..., None], scores, silent)


class TrackHead(nn.Module):
    """Values along a sequence in bins of bin_size tokens, (b, ceil(l / bin_size), n_tracks).

    A bin is the mean over its data tokens before the projection; a bin without data is 0.
    """

    def __init__(self, d_model: int, n_tracks: int, *, bin_size: int = 1) -> None:
        super().__init__()
        if bin_size < 1:
            raise ValueError(f"bin_size={bin_size!r}: expected at least 1 token")
        self.bin_size = bin_size
        self.proj = nn.Linear(d_model, n_tracks)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        short = -hidden.shape[1] % self.bin_size
        hidden = F.pad(torch.where(mask[..., None], hidden, 0), (0, 0, 0, short))
        count = F.pad(mask, (0, short)).unflatten(1, (-1, self.bin_size)).sum(2)[..., None]
        means = hidden.unflatten(1, (-1, self.bin_size)).sum(2) / count.clamp(min=1)
        return torch.where(count > 0, self.proj(means), 0)


class LanguageModelHead(nn.Module):
    """Logits over a vocabulary for each token, (b, l, vocab_size), without bias.

    tied_to: an embedding table whose weight this head shares, as one parameter of the model.
    """

    token_by_token = True

    def __init__(
        self, d_model: int, vocab_size: int, *, tied_to: nn.Embedding | None = None
    ) -> None:
        super().__init__()
        self.proj = nn.Linear(d_model, vocab_size, bias=False)
        if tied_to is not None:
            if tied_to.weight.shape != self.proj.weight.shape:
                raise ValueError(
                    f"tied_to: its weight is {tuple(tied_to.weight.shape)}, expected "
                    f"(vocab_size, d_model) = ({vocab_size}, {d_model})"
                )
            self.proj.weight = tied_to.weight

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.proj(hidden)


class EmbeddingHead(nn.Module):
    """One vector for a sequence, (b, d_model), of length 1 when normalize is set."""

    def __init__(self, *, pool: Pool = "mean", normalize: bool = False) -> None:
        super().__init__()
        self.pool = check_pool(pool)
        self.normalize = normalize

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        pooled = pool_tokens(hidden, mask, self.pool)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled
