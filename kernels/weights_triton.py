"""A block's two weights in the dtype of its products: one launch, where autocast would take two."""

from operator import itemgetter

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Launch, Prepared, on, prepare

BLOCK, WARPS = 1024, 4


@triton.jit
def _kernel(first_ptr, second_ptr, out_ptr, n_first, n_second, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of_first = at < n_first
    value = tl.load(first_ptr + at, mask=of_first, other=0.0)
    rest = at - n_first
    value += tl.load(second_ptr + rest, mask=(rest >= 0) & (rest < n_second), other=0.0)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=rest < n_second)


class _Cast(Prepared):
    ALL = itemgetter(0, 1, 2)

    def __init__(self, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
        first, second, out = tensors
        super().__init__(out.device)
        programs = triton.cdiv(out.numel(), BLOCK)
        rest = first.numel(), second.numel(), BLOCK
        self.launches = [Launch(_kernel, programs, WARPS, self.ALL, rest)]


def cast_both(first: Tensor, second: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both without gaps and in dtype; as they are where they are so."""
    first, second = first.contiguous(), second.contiguous()
    if first.dtype == second.dtype == dtype:
        return first, second
    with on(first.device):
        out = torch.empty(first.numel() + second.numel(), dtype=dtype, device=first.device)
        tensors = first, second, out
        prepare(_Cast, tensors).run(tensors)
    parts = out.split([first.numel(), second.numel()])
    return parts[0].view(first.shape), parts[1].view(second.shape)
