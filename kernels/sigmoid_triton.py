"""The logistic function inside Triton kernels."""

import torch
import triton
import triton.language as tl

from .dispatch import interpreting

_PTX = tl.constexpr(not interpreting() and torch.version.cuda is not None)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), float32.

    Triton's guards ranges of exp and of the division that make no difference here, in more
    instructions than the rest takes, and kernels that are otherwise bound by memory wait for them.
    Both approximations err by 2 units in the last place; where exp overflows, its reciprocal is 0.
    """
    if _PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; "
            "add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.sigmoid(x)
