"""Rows of different lengths in one batch: a mask of data becomes rows whose data come first.

batch b · seqlen l · d_model d
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2_apps.kernels.dispatch import can_read


class LeftAligned:
    """Rotates the rows of a masked batch so that their data come first, and back.

    After `align` all padding trails. A causal model then needs no mask for its outputs, and a
    window or a state carried in from an earlier piece stands right before a row's first token.

    mask (b, l) bool, True where there is data: one run of True in a row, anywhere in it, or none.
    A mistake raises ValueError. Gaps are looked for where the mask lies on the CPU, and elsewhere
    only under MAMBA2_APPS_DEBUG=1, since a look there waits for the device; never under
    torch.compile.
    """

    def __init__(self, mask: Tensor, batch: int, seqlen: int) -> None:
        if mask.dtype != torch.bool or tuple(mask.shape) != (batch, seqlen):
            raise ValueError(
                f"mask: expected a bool tensor ({batch}, {seqlen}), True where there is data, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        self.mask = mask
        self.lengths = mask.sum(1)
        if can_read(mask):
            _check_one_run(mask, self.lengths)
        self._start = mask.int().argmax(1, keepdim=True)

    def align(self, x: Tensor) -> Tensor:
        """(b, l, d) with the data of each row first and zeros after them, whatever padding held."""
        return self._rotate(torch.where(self.mask[..., None], x, 0), self._start)

    def restore(self, x: Tensor) -> Tensor:
        """Undoes `align`: data back at their places, zeros at padding."""
        return torch.where(self.mask[..., None], self._rotate(x, -self._start), 0)

    def _rotate(self, x: Tensor, by: Tensor) -> Tensor:
        seqlen = x.shape[1]
        index = (torch.arange(seqlen, device=x.device) + by) % seqlen
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def data_positions(lengths: Tensor, seqlen: int) -> Tensor:
    """(b, l) bool, True at the first lengths[i] positions of row i; lengths (b,)."""
    return torch.arange(seqlen, device=lengths.device) < lengths[:, None]


def _check_one_run(mask: Tensor, lengths: Tensor) -> None:
    ends = mask & ~F.pad(mask, (0, 1))[:, 1:]
    gaps = ends.sum(1) > 1
    if gaps.any():
        row = int(gaps.nonzero()[0])
        raise ValueError(
            f"mask: row {row} has {int(ends[row].sum())} runs of True, expected one; "
            "put padding before or after the data, not between"
        )
