"""The two projections of a block with all that stands beside them, without gradients.

    first:   x, B, C, dt = W_in (r w / rms(r))             r: the residual stream
    second:  r + W_out (v w' / rms(v)),   v = y silu(z)    y: what the scan gave
                                          z = W_z (r w / rms(r))

The root mean square of a token is a factor of its whole row, so it can come after the product: a
program multiplies r w, or v w', while it adds up the squares of r or v. Norms, gate and addition
then never write anything of their own, and z, which the second kernel computes, is not written: its
product costs less than its bytes.

Dimensions: tokens m · width of the residual stream d · inner channels h p
"""

# mypy: disable-error-code="assignment"
# (a kernel's tuples grow, and Triton takes no annotation that would say so)

from operator import itemgetter
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .block import DT_OF_PADDING, PIECE
from .launching import Launch, Prepared, dot_precision
from .sigmoid_triton import sigmoid


class Tiles(NamedTuple):
    """How a kernel is cut; all powers of two but the stages."""

    rows: int  # tokens a program
    columns: int  # outputs (first kernel) or inner channels (second) a step of its loop
    warps: int
    stages: int  # of the pipeline of loads


NORM_LINEAR = Tiles(rows=64, columns=64, warps=4, stages=3)
GATED_LINEAR = Tiles(rows=128, columns=64, warps=8, stages=3)
# Of both weights, shared memory holds three stages up to this width of the residual stream.
MOST_STAGED = 192
# Below so many programs, two a multiprocessor of an H100, the first kernel divides its outputs too.
MANY_PROGRAMS = 264


@triton.jit
def _weighted(
    residual_ptr, norm_ptr, row, known, eps,
    D: tl.constexpr, DTYPE: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """r w of some tokens as d / PIECE tiles (rows, PIECE), and 1 / rms(r) (rows,)."""
    k = tl.arange(0, PIECE)
    at = residual_ptr + row.to(tl.int64)[:, None] * D + k[None, :]
    squares = tl.zeros(row.shape, tl.float32)
    tiles = ()
    for i in tl.static_range(D // PIECE):
        r = tl.load(at + i * PIECE, mask=known, other=0.0).to(tl.float32)
        squares += tl.sum(r * r, axis=1)
        r *= tl.load(norm_ptr + i * PIECE + k).to(tl.float32)[None, :]
        tiles = tiles + (r.to(DTYPE),)
    return tiles, 1.0 / tl.sqrt_rn(squares / D + eps)


@triton.jit(do_not_specialize=["n_rows", "l", "n_splits", "eps"])
def norm_linear_kernel(
    residual_ptr, norm_ptr, weight_ptr, lengths_ptr, out_ptr, n_rows, l, n_splits, eps,
    D: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, FIRST_DT: tl.constexpr,
    DT_OF_PADDING: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Every n_splits-th block of outputs of a tile of tokens; columns from N to STRIDE are 0."""
    split = tl.program_id(0) % n_splits
    row = (tl.program_id(0) // n_splits) * ROWS + tl.arange(0, ROWS)
    known = (row < n_rows)[:, None]
    tiles, scale = _weighted(
        residual_ptr, norm_ptr, row, known, eps, D, weight_ptr.dtype.element_ty, PIECE
    )
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + row // l, mask=row < n_rows, other=0)
        padding = (row % l >= length)[:, None]
    k, n = tl.arange(0, PIECE), tl.arange(0, COLUMNS)
    out_at = out_ptr + row.to(tl.int64)[:, None] * STRIDE
    for block in tl.range(split, tl.cdiv(STRIDE, COLUMNS), n_splits, num_stages=STAGES):
        column = block * COLUMNS + n
        weight_at = weight_ptr + column[None, :] * D + k[:, None]
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for i in tl.static_range(D // PIECE):
            weight = tl.load(weight_at + i * PIECE, mask=(column < N)[None, :], other=0.0)
            acc = tl.dot(tiles[i], weight, acc, input_precision=DOT)
        acc *= scale[:, None]
        if lengths_ptr is not None:
            fill = tl.where(column < FIRST_DT, 0.0, DT_OF_PADDING)[None, :]
            acc = tl.where(padding, fill, acc)
        mask = known & (column < STRIDE)[None, :]
        tl.store(out_at + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows", "eps", "gate_eps"])
def gated_linear_kernel(
    y_ptr, residual_ptr, norm_ptr, gate_ptr, gate_norm_ptr, weight_ptr, out_ptr,
    n_rows, eps, gate_eps,
    D: tl.constexpr, INNER: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """All outputs of a tile of tokens; gate_ptr is the part of W_in that gives z."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = (row < n_rows)[:, None]
    c, n = tl.arange(0, CHANNELS), tl.arange(0, PIECE)
    y_at = y_ptr + row.to(tl.int64)[:, None] * INNER + c[None, :]
    weight_at = weight_ptr + n[None, :] * INNER + c[:, None]
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    tiles, scale = _weighted(residual_ptr, norm_ptr, row, known, eps, D, DTYPE, PIECE)
    gate_at = gate_ptr + c[None, :] * D + n[:, None]
    squares = tl.zeros([ROWS], tl.float32)
    accs = ()
    for _ in tl.static_range(D // PIECE):
        accs = accs + (tl.zeros([ROWS, PIECE], tl.float32),)
    for first in tl.range(0, INNER, CHANNELS, num_stages=STAGES):
        y = tl.load(y_at + first, mask=known, other=0.0).to(tl.float32)
        z = tl.zeros([ROWS, CHANNELS], tl.float32)
        for i in tl.static_range(D // PIECE):
            gate = tl.load(gate_at + first * D + i * PIECE)
            z = tl.dot(tiles[i], gate, z, input_precision=DOT)
        z *= scale[:, None]
        v = y * (z * sigmoid(z))
        squares += tl.sum(v * v, axis=1)
        v *= tl.load(gate_norm_ptr + first + c).to(tl.float32)[None, :]
        sums = ()
        for j in tl.static_range(D // PIECE):
            weight = tl.load(weight_at + j * PIECE * INNER + first)
            sums = sums + (tl.dot(v.to(DTYPE), weight, accs[j], input_precision=DOT),)
        accs = sums
    gate_scale = (1.0 / tl.sqrt_rn(squares / INNER + gate_eps))[:, None]
    at = row.to(tl.int64)[:, None] * D + n[None, :]
    for j in tl.static_range(D // PIECE):
        r = tl.load(residual_ptr + at + j * PIECE, mask=known, other=0.0).to(tl.float32)
        out = r + accs[j] * gate_scale
        tl.store(out_ptr + at + j * PIECE, out.to(out_ptr.dtype.element_ty), mask=known)


class NormLinear(Prepared):
    """W (r w / rms(r)) as (b, l, e rounded up), from r (b, l, d), w (d,) and W (e, d).

    Further columns are 0. With lengths (b,), tokens at and after lengths[i] get 0, and
    DT_OF_PADDING in the columns from first_dt.
    """

    # residual, norm_weight, weight, lengths, out
    ALL = itemgetter(0, 1, 2, 3, 4)

    def __init__(
        self, residual: Tensor, weight: Tensor, out: Tensor, first_dt: int, eps: float,
        tiles: Tiles, many_programs: int,
    ) -> None:  # fmt: skip
        super().__init__(residual.device)
        b, l, d = residual.shape
        stride, row_tiles = out.shape[2], triton.cdiv(b * l, tiles.rows)
        n_splits = min(triton.cdiv(many_programs, row_tiles), triton.cdiv(stride, tiles.columns))
        rest = (
            b * l, l, n_splits, eps, d, weight.shape[0], stride, first_dt, DT_OF_PADDING, PIECE,
            tiles.rows, tiles.columns, tiles.stages, dot_precision(weight.dtype),
        )  # fmt: skip
        self.launches = [
            Launch(norm_linear_kernel, row_tiles * n_splits, tiles.warps, self.ALL, rest)
        ]


class GatedLinear(Prepared):
    """r + W (v w' / rms(v)), v = y silu(gate (r w / rms(r))), (b, l, d) of r's dtype.

    y (b, l, h p), gate (h p or more, d), of which the first rows count, W (d, h p), w' (h p,).
    """

    # y, residual, norm_weight, gate, gate_norm_weight, weight, out
    ALL = itemgetter(0, 1, 2, 3, 4, 5, 6)

    def __init__(
        self, residual: Tensor, weight: Tensor, eps: float, gate_eps: float, tiles: Tiles
    ) -> None:
        super().__init__(residual.device)
        b, l, d = residual.shape
        stages = tiles.stages if d <= MOST_STAGED else min(tiles.stages, 2)
        rest = (
            b * l, eps, gate_eps, *weight.shape, PIECE, tiles.rows, tiles.columns, stages,
            dot_precision(weight.dtype),
        )  # fmt: skip
        programs = triton.cdiv(b * l, tiles.rows)
        self.launches = [Launch(gated_linear_kernel, programs, tiles.warps, self.ALL, rest)]


def row_length(outputs: int) -> int:
    """Of what NormLinear gives: Triton asks of a stride whether 16 divides it for whole vectors."""
    return -(-outputs // 16) * 16
