"""A gated RMS norm and the projection after it in one pass over the tokens.

    out = W (x silu(z) w / rms(x silu(z)))

The root mean square of a token is a factor of its whole row, so it can come after the product: a
program multiplies rows of x silu(z) w by W while it adds up their squares, and divides at the end.
The norm's output, which alone would be written and read once more, never reaches memory. There is
no backward here: `conv_ssd_norm_triton` has it.

Dimensions: rows m (tokens) · channels k · outputs n
"""

from operator import itemgetter

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Launch, Prepared, on, prepare
from .sigmoid_triton import sigmoid

# A program holds all outputs of its rows, so that each row is read and gated once.
MOST_OUTPUTS = 256
ROWS, CHANNELS, WARPS, STAGES = 64, 32, 4, 3


def serves(x: Tensor, projection: Tensor, group_size: int, norm_before_gate: bool) -> bool:
    """Whether `norm_linear` takes these; what it does not take, norm and product take in turn.

    bfloat16 only: rows that are not normalised yet may leave float16's range, and float32 is for
    those who want its digits.
    """
    outputs, channels = projection.shape
    return (
        x.dtype == torch.bfloat16
        and group_size == channels
        and not norm_before_gate
        and channels % CHANNELS == 0
        and outputs <= MOST_OUTPUTS
    )


@triton.jit(do_not_specialize=["n_rows", "eps"])
def _kernel(
    x_ptr, z_ptr, weight_ptr, projection_ptr, out_ptr, n_rows, stride_x, stride_z, eps,
    K: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = (row < n_rows)[:, None]
    c, n = tl.arange(0, CHANNELS), tl.arange(0, OUTPUTS)
    x_at = x_ptr + row.to(tl.int64)[:, None] * stride_x + c[None, :]
    z_at = z_ptr + row.to(tl.int64)[:, None] * stride_z + c[None, :]
    projection_at = projection_ptr + n[None, :] * K + c[:, None]
    squares = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for first in tl.range(0, K, CHANNELS, num_stages=STAGES):
        x = tl.load(x_at + first, mask=known, other=0.0).to(tl.float32)
        z = tl.load(z_at + first, mask=known, other=0.0).to(tl.float32)
        projection = tl.load(projection_at + first, mask=(n < N)[None, :], other=0.0)
        v = x * (z * sigmoid(z))
        squares += tl.sum(v * v, axis=1)
        v *= tl.load(weight_ptr + first + c).to(tl.float32)[None, :]
        acc = tl.dot(v.to(projection.dtype), projection, acc)
    acc *= (1.0 / tl.sqrt_rn(squares / K + eps))[:, None]
    out_at = out_ptr + row.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=known & (n < N)[None, :])


class _NormLinear(Prepared):
    # x, z, weight, projection, out
    ALL = itemgetter(0, 1, 2, 3, 4)

    def __init__(self, tensors, eps: float) -> None:
        x, z, _, projection, _ = tensors
        super().__init__(x.device)
        outputs, channels = projection.shape
        rest = (
            x.shape[0], x.stride(0), z.stride(0), eps, channels, outputs, ROWS, CHANNELS,
            max(16, triton.next_power_of_2(outputs)), STAGES,
        )  # fmt: skip
        self.launches = [Launch(_kernel, triton.cdiv(x.shape[0], ROWS), WARPS, self.ALL, rest)]


def norm_linear(x: Tensor, z: Tensor, weight: Tensor, projection: Tensor, eps: float) -> Tensor:
    """(b, l, n) from x and z (b, l, k), weight (k,), projection (n, k); see `serves`.

    Rows of x and z lie a constant stride apart, channels side by side.
    """
    with on(x.device):
        out = x.new_empty(*x.shape[:2], projection.shape[0])
        rows = (x.shape[0] * x.shape[1], x.shape[2])
        tensors = (
            x.as_strided(rows, (x.stride(1), 1)), z.as_strided(rows, (z.stride(1), 1)),
            weight.contiguous(), projection.contiguous(), out,
        )  # fmt: skip
        prepare(_NormLinear, tensors, eps).run(tensors)
    return out
