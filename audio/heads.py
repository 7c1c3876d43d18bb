"""Heads over the tokens of a clip that know how a sound changes, as well as what it is.

batch b · seqlen l · d_model d
"""

import torch
from torch import Tensor, nn

from mamba2_apps.heads import pool_tokens


class StatisticsHead(nn.Module):
    """One answer for a clip, (b, n_outputs), from the mean and deviation of its tokens over time.

    As in the statistics pooling of speaker recognition (Snyder et al. 2018). Padding counts for
    nothing.

    Args:
        d_model: width of the states.
        n_outputs: classes or tags.
        dropout: part of the statistics that training sets to 0.
    """

    pool = "mean"
    least = 1e-5
    """Added to a variance, whose root has no gradient at 0."""

    def __init__(self, d_model: int, n_outputs: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"head.dropout is {dropout}, expected at least 0 and below 1")
        self.dropout = nn.Dropout(dropout)
        self.proj = nn.Linear(2 * d_model, n_outputs)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states (b, l, d), True in mask (b, l) where there is data, to (b, n_outputs)."""
        mean = pool_tokens(hidden, mask, "mean")
        variance = pool_tokens((hidden - mean[:, None]).square(), mask, "mean")
        pooled = torch.cat([mean, (variance + self.least).sqrt()], -1)
        return self.proj(self.dropout(pooled))
