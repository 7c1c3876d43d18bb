"""A block's two weights in the dtype of its products: one launch, where autocast would take two."""

from operator import itemgetter

import triton
import triton.language as tl
from torch import Tensor

from .launching import Launch, Prepared

BLOCK, WARPS = 1024, 4


@triton.jit
def cast_kernel(first_ptr, second_ptr, out_ptr, n_first, n_second, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of_first = at < n_first
    value = tl.load(first_ptr + at, mask=of_first, other=0.0)
    rest = at - n_first
    value += tl.load(second_ptr + rest, mask=(rest >= 0) & (rest < n_second), other=0.0)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=rest < n_second)


class Cast(Prepared):
    # first, second, and room for both one after the other
    ALL = itemgetter(0, 1, 2)

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__(first.device)
        sizes = first.numel(), second.numel()
        programs = triton.cdiv(sum(sizes), BLOCK)
        self.launches = [Launch(cast_kernel, programs, WARPS, self.ALL, (*sizes, BLOCK))]
