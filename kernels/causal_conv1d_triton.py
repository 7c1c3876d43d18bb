"""The causal depthwise convolution in Triton, forward and backward.

Registered as torch.ops.mamba2_apps.causal_conv1d_triton and ..._backward. Arguments are taken as
checked: `causal_conv1d.py` does that and says what the op computes.

Dimension legend: batch b · seqlen l · channels d · width w
    q  place of a token in scan order: its index, or counted from the end where the scan is reversed
    m  place of a sequence in scan order; a sequence is one row of the batch unless packed
    pos  place of a token in its own sequence, in scan order
    tap k  the input k tokens before the current one, which meets weight[:, w - 1 - k]

Both passes: one program for RUNS runs of `run` tokens × channels, walked token by token in step.
Forward: the last w inputs stay in registers, so that x is read once, but for w - 1 tokens before
each run, and y is written once.
Backward: the w gradients of inputs still open stay there too, so that x and dy are read once, dx is
written once and silu'(z) is computed once, but for w - 1 tokens after each run. Sums over tokens
leave each program as fp32 partials, which a second kernel adds in a fixed order.
"""

# mypy: disable-error-code="assignment"
# (a kernel's tuples grow, and Triton takes no annotation that would say so)

from operator import itemgetter
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import is_plain
from .launching import Launch, Prepared, on, prepare
from .registration import register
from .sigmoid_triton import sigmoid


class Cut(NamedTuple):
    """How the tokens and channels of a call are cut into programs."""

    channels: int  # a program
    runs: int  # a program; fewer for wide filters, whose taps take the registers
    stretch: int  # tokens of a run that are loaded at once; 1 for filters wider than 4 taps, whose
    # unrolled code would take many seconds to compile
    warps: int
    min_run: int  # tokens
    max_run: int  # tokens; shorter runs where these leave too few programs to fill a GPU
    programs: int  # enough to fill it


FORWARD = Cut(channels=128, runs=1, stretch=16, warps=1, min_run=16, max_run=16, programs=1)
BACKWARD = Cut(channels=64, runs=4, stretch=4, warps=1, min_run=8, max_run=61, programs=1024)


@triton.jit
def _sequence_bounds(cu_ptr, m, n_seq, l, REVERSE: tl.constexpr):
    """Index of the m-th sequence of the scan and where it starts and ends, in scan order."""
    if cu_ptr is None:
        index = m
        start = m * 0
        end = start + l
    elif REVERSE:
        index = n_seq - 1 - m
        start = l - tl.load(cu_ptr + index + 1)
        end = l - tl.load(cu_ptr + index)
    else:
        index = m
        start = tl.load(cu_ptr + index)
        end = tl.load(cu_ptr + index + 1)
    return index, start, end


@triton.jit
def _sequence_of(cu_ptr, q, n_seq, n_halvings, l, REVERSE: tl.constexpr):
    """Place m of the sequence that holds token q, by bisection; 0 <= m < n_seq for any values."""
    low = q * 0
    high = low + n_seq - 1
    i = 0
    while i < n_halvings:
        middle = (low + high + 1) // 2
        _, start, _ = _sequence_bounds(cu_ptr, middle, n_seq, l, REVERSE)
        begun = start <= q
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
        i += 1
    return low


@triton.jit
def _token(q, l, REVERSE: tl.constexpr):
    """Index of the token at place q."""
    token = q
    if REVERSE:
        token = l - 1 - q
    return token.to(tl.int64)


@triton.jit
def _load_token(ptr, q, c, l, d, stride_l, stride_d, REVERSE: tl.constexpr, wanted):
    """Tokens q of a (l, d) tensor in fp32, 0 where not wanted or outside the tensor."""
    mask = wanted & (q >= 0) & (q < l) & (c < d)
    offset = _token(q, l, REVERSE) * stride_l + c * stride_d
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_state(ptr, index, slot, c, d, WIDTH: tl.constexpr, wanted):
    """Rows `slot` of state `index` in a (nseq, w - 1, d) tensor in fp32, 0 where not wanted."""
    mask = wanted & (slot >= 0) & (slot < WIDTH - 1) & (c < d)
    row = index.to(tl.int64) * (WIDTH - 1) + slot
    return tl.load(ptr + row * d + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["l", "n_seq", "n_halvings", "n_tiles", "n_tile_programs", "run"])
def _forward_kernel(
    x_ptr, w_ptr, bias_ptr, initial_ptr, cu_ptr, y_ptr, final_ptr,
    l, d, n_seq, n_halvings, n_tiles, n_tile_programs, run, stride_xb, stride_xl, stride_xd,
    WIDTH: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr,
    RUNS: tl.constexpr, STRETCH: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Programs for the tiles of y come first, then those for the final states."""
    program = tl.program_id(0)
    n_blocks = tl.cdiv(d, CHANNELS)
    block = program % n_blocks
    if program < n_tile_programs:
        _forward_tile(
            x_ptr, w_ptr, bias_ptr, initial_ptr, cu_ptr, y_ptr, block, program // n_blocks,
            l, d, n_seq, n_halvings, n_tiles, run, stride_xb, stride_xl, stride_xd,
            WIDTH, SILU, REVERSE, RUNS, STRETCH, CHANNELS,
        )  # fmt: skip
    elif final_ptr is not None:
        _final_state(
            x_ptr, initial_ptr, cu_ptr, final_ptr, block, (program - n_tile_programs) // n_blocks,
            l, d, n_seq, stride_xb, stride_xl, stride_xd, WIDTH, REVERSE, CHANNELS, SLOTS,
        )  # fmt: skip


@triton.jit
def _forward_tile(
    x_ptr, w_ptr, bias_ptr, initial_ptr, cu_ptr, y_ptr, block, tile,
    l, d, n_seq, n_halvings, n_tiles, run, stride_xb, stride_xl, stride_xd,
    WIDTH: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr,
    RUNS: tl.constexpr, STRETCH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y of RUNS runs of tokens; a run is a multiple of STRETCH."""
    c = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    batch = tile // n_tiles
    q = ((tile % n_tiles) * RUNS + tl.arange(0, RUNS)[:, None]) * run
    m = batch + q * 0
    if cu_ptr is not None:
        m = _sequence_of(cu_ptr, q, n_seq, n_halvings, l, REVERSE)
    index, start, end = _sequence_bounds(cu_ptr, m, n_seq, l, REVERSE)
    x_ptr += batch.to(tl.int64) * stride_xb
    y_ptr += batch.to(tl.int64) * l * d
    x_step = stride_xl
    y_step = d
    if REVERSE:
        x_step = -stride_xl
        y_step = -d

    bias = tl.zeros([RUNS, CHANNELS], tl.float32)
    if bias_ptr is not None:
        # In one dimension: as a row its alignment would decide the layout of x's loads.
        at = block * CHANNELS + tl.arange(0, CHANNELS)
        bias += tl.load(bias_ptr + at, mask=at < d, other=0.0).to(tl.float32)[None, :]
    weights = ()  # by tap
    before = ()  # the inputs 1 … w - 1 tokens back, with those of the initial state
    for k in tl.static_range(WIDTH):
        w = tl.load(w_ptr + c * WIDTH + (WIDTH - 1 - k), mask=c < d, other=0.0)
        weights = weights + (w.to(tl.float32),)
        if k > 0:
            pos = q - start
            tap = _load_token(x_ptr, q - k, c, l, d, stride_xl, stride_xd, REVERSE, pos >= k)
            if initial_ptr is not None:
                slot = pos - k + WIDTH - 1
                tap += _load_state(initial_ptr, index, slot, c, d, WIDTH, pos < k)
            before = before + (tap,)

    i = 0
    while i < run:
        token = _token(q, l, REVERSE)
        x_at = x_ptr + token * stride_xl + c * stride_xd
        y_at = y_ptr + token * d + c
        # All loads of a stretch are on their way before its first token is worked on.
        xs = ()
        for u in tl.static_range(STRETCH):
            xs = xs + (tl.load(x_at, mask=(q + u < l) & (c < d), other=0.0),)
            x_at += x_step
        for u in tl.static_range(STRETCH):
            window = (xs[u].to(tl.float32),) + before
            z = bias
            for k in tl.static_range(WIDTH):
                z += weights[k] * window[k]
            if SILU:
                z *= sigmoid(z)
            tl.store(y_at, z, mask=(q < l) & (c < d))
            y_at += y_step
            before = window[:-1]
            q += 1
            if cu_ptr is not None:
                m = tl.where((q >= end) & (m < n_seq - 1), m + 1, m)
                index, start, end = _sequence_bounds(cu_ptr, m, n_seq, l, REVERSE)
                before = ()
                for k in tl.static_range(1, WIDTH):
                    tap = tl.where(q == start, 0.0, window[k - 1])
                    if initial_ptr is not None:
                        slot = q - start - k + WIDTH - 1
                        tap += _load_state(initial_ptr, index, slot, c, d, WIDTH, q == start)
                    before = before + (tap,)
        i += STRETCH


@triton.jit
def _final_state(
    x_ptr, initial_ptr, cu_ptr, final_ptr, block, m,
    l, d, n_seq, stride_xb, stride_xl, stride_xd,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The last w - 1 inputs of one sequence, with what is left of its initial state."""
    c = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    index, start, end = _sequence_bounds(cu_ptr, m, n_seq, l, REVERSE)
    if cu_ptr is None:
        x_ptr += m.to(tl.int64) * stride_xb
    slot = tl.arange(0, SLOTS)[:, None]
    pos = end - start - (WIDTH - 1) + slot
    own = (slot < WIDTH - 1) & (pos >= 0)
    state = _load_token(x_ptr, start + pos, c, l, d, stride_xl, stride_xd, REVERSE, own)
    if initial_ptr is not None:
        left = (slot < WIDTH - 1) & (pos < 0)
        state += _load_state(initial_ptr, index, pos + WIDTH - 1, c, d, WIDTH, left)
    row = index.to(tl.int64) * (WIDTH - 1) + slot
    tl.store(final_ptr + row * d + c, state, mask=(slot < WIDTH - 1) & (c < d))


@triton.jit
def _silu_gradient(z):
    s = sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


@triton.jit(do_not_specialize=["l", "n_seq", "n_halvings", "n_tiles", "n_tile_programs", "run"])
def _backward_kernel(
    dy_ptr, dfinal_ptr, x_ptr, w_ptr, bias_ptr, initial_ptr, cu_ptr,
    dx_ptr, partial_ptr, dinitial_ptr, l, d, n_seq, n_halvings, n_tiles, n_tile_programs, run,
    stride_xb, stride_xl, stride_xd, stride_dyb, stride_dyl, stride_dyd, stride_dxb, stride_dxl,
    WIDTH: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr,
    RUNS: tl.constexpr, STRETCH: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Programs for the tiles of dx come first, then those for the initial states."""
    program = tl.program_id(0)
    n_blocks = tl.cdiv(d, CHANNELS)
    block = program % n_blocks
    if program < n_tile_programs:
        _backward_tile(
            dy_ptr, dfinal_ptr, x_ptr, w_ptr, bias_ptr, initial_ptr, cu_ptr, dx_ptr, partial_ptr,
            block, program // n_blocks, l, d, n_seq, n_halvings, n_tiles, run,
            stride_xb, stride_xl, stride_xd, stride_dyb, stride_dyl, stride_dyd, stride_dxb,
            stride_dxl, WIDTH, SILU, REVERSE, RUNS, STRETCH, CHANNELS,
        )  # fmt: skip
    elif dinitial_ptr is not None:
        _backward_initial_state(
            dy_ptr, dfinal_ptr, x_ptr, w_ptr, bias_ptr, initial_ptr, cu_ptr, dinitial_ptr,
            block, (program - n_tile_programs) // n_blocks, l, d, n_seq,
            stride_xb, stride_xl, stride_xd, stride_dyb, stride_dyl, stride_dyd,
            WIDTH, SILU, REVERSE, CHANNELS, SLOTS,
        )  # fmt: skip


@triton.jit
def _backward_tile(
    dy_ptr, dfinal_ptr, x_ptr, w_ptr, bias_ptr, initial_ptr, cu_ptr, dx_ptr, partial_ptr,
    block, tile, l, d, n_seq, n_halvings, n_tiles, run,
    stride_xb, stride_xl, stride_xd, stride_dyb, stride_dyl, stride_dyd, stride_dxb, stride_dxl,
    WIDTH: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr,
    RUNS: tl.constexpr, STRETCH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx of RUNS runs of tokens, and their share of dweight and dbias."""
    c = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    batch = tile // n_tiles
    q = ((tile % n_tiles) * RUNS + tl.arange(0, RUNS)[:, None]) * run
    m = batch + q * 0
    if cu_ptr is not None:
        m = _sequence_of(cu_ptr, q, n_seq, n_halvings, l, REVERSE)
    index, start, end = _sequence_bounds(cu_ptr, m, n_seq, l, REVERSE)
    x_ptr += batch.to(tl.int64) * stride_xb
    dy_ptr += batch.to(tl.int64) * stride_dyb
    dx_ptr += batch.to(tl.int64) * stride_dxb

    zero = tl.zeros([RUNS, CHANNELS], tl.float32)
    bias = tl.zeros([1, CHANNELS], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c < d, other=0.0).to(tl.float32)
    weights = ()  # by tap
    before = ()  # the inputs 1 … w - 1 tokens back
    opened = ()  # gradients of the inputs 0 … w - 1 tokens back, as far as they are summed
    dweights = ()  # by tap
    for k in tl.static_range(WIDTH):
        w = tl.load(w_ptr + c * WIDTH + (WIDTH - 1 - k), mask=c < d, other=0.0)
        weights = weights + (w.to(tl.float32),)
        opened = opened + (zero,)
        dweights = dweights + (zero,)
        if k > 0:
            before = before + (
                _load_token(x_ptr, q - k, c, l, d, stride_xl, stride_xd, REVERSE, c < d),
            )
    dbias = zero

    i = 0
    while i < run + WIDTH - 1:
        # All loads of a stretch are on their way before its first token is worked on.
        xs = ()
        dys = ()
        for u in tl.static_range(STRETCH):
            ahead = q + u
            mask = (ahead < l) & (c < d)
            at = _token(ahead, l, REVERSE)
            xs = xs + (tl.load(x_ptr + at * stride_xl + c * stride_xd, mask=mask, other=0.0),)
            dys = dys + (tl.load(dy_ptr + at * stride_dyl + c * stride_dyd, mask=mask, other=0.0),)
        for u in tl.static_range(STRETCH):
            pos = q - start
            window = (xs[u].to(tl.float32),) + before
            taps = ()
            z = zero + bias
            for k in tl.static_range(WIDTH):
                tap = tl.where(pos >= k, window[k], 0.0)
                if initial_ptr is not None and k > 0:
                    slot = pos - k + WIDTH - 1
                    outside = (pos < k) & (q < l)
                    tap += _load_state(initial_ptr, index, slot, c, d, WIDTH, outside)
                z += weights[k] * tap
                taps = taps + (tap,)
            dz = dys[u].to(tl.float32)
            if SILU:
                dz *= _silu_gradient(z)
            dz = tl.where(q < l, dz, 0.0)

            entering = zero
            if dfinal_ptr is not None:
                slot = pos - (end - start) + WIDTH - 1
                entering = _load_state(dfinal_ptr, index, slot, c, d, WIDTH, q < l)
            mine = tl.where(i < run, dz, 0.0)
            dbias += mine
            older = (entering,) + opened[:-1]
            opened = ()
            sums = ()
            for k in tl.static_range(WIDTH):
                opened = opened + (older[k] + tl.where(pos >= k, weights[k] * dz, 0.0),)
                sums = sums + (dweights[k] + mine * taps[k],)
            dweights = sums

            closed = q - (WIDTH - 1)
            tl.store(
                dx_ptr + _token(closed, l, REVERSE) * stride_dxl + c,
                opened[WIDTH - 1],
                mask=(i >= WIDTH - 1) & (i < run + WIDTH - 1) & (closed < l) & (c < d),
            )
            before = window[:-1]
            q += 1
            i += 1
            if cu_ptr is not None:
                m = tl.where((q >= end) & (m < n_seq - 1), m + 1, m)
                index, start, end = _sequence_bounds(cu_ptr, m, n_seq, l, REVERSE)

    ROWS_OF_PARTIAL: tl.constexpr = WIDTH + (bias_ptr is not None)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    partial_ptr += tile.to(tl.int64) * ROWS_OF_PARTIAL * d + c
    for k in tl.static_range(WIDTH):
        tl.store(partial_ptr + (WIDTH - 1 - k) * d, tl.sum(dweights[k], axis=0), mask=c < d)
    if bias_ptr is not None:
        tl.store(partial_ptr + WIDTH * d, tl.sum(dbias, axis=0), mask=c < d)


@triton.jit
def _backward_initial_state(
    dy_ptr, dfinal_ptr, x_ptr, w_ptr, bias_ptr, initial_ptr, cu_ptr, dinitial_ptr,
    block, m, l, d, n_seq,
    stride_xb, stride_xl, stride_xd, stride_dyb, stride_dyl, stride_dyd,
    WIDTH: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr,
    CHANNELS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Gradient of one sequence's initial state, from its first w - 1 tokens."""
    c = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    index, start, end = _sequence_bounds(cu_ptr, m, n_seq, l, REVERSE)
    if cu_ptr is None:
        x_ptr += m.to(tl.int64) * stride_xb
        dy_ptr += m.to(tl.int64) * stride_dyb

    k = tl.arange(0, SLOTS)[:, None]
    taps = (k < WIDTH) & (c < d)
    by_tap = tl.load(w_ptr + c * WIDTH + (WIDTH - 1 - k), mask=taps, other=0.0).to(tl.float32)
    bias = tl.zeros([CHANNELS], tl.float32)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c < d, other=0.0).to(tl.float32)
    dinitial = tl.zeros([SLOTS, CHANNELS], tl.float32)
    if dfinal_ptr is not None:
        dinitial += _load_state(dfinal_ptr, index, k - (end - start), c, d, WIDTH, k < WIDTH - 1)
    pos = start * 0
    while (pos < WIDTH - 1) & (pos < end - start):
        q = start + pos + k * 0
        dz = _load_token(dy_ptr, q, c, l, d, stride_dyl, stride_dyd, REVERSE, k == 0)
        dz = tl.sum(dz, axis=0)[None, :]
        if SILU:
            tap = _load_token(
                x_ptr, q - k, c, l, d, stride_xl, stride_xd, REVERSE, taps & (k <= pos)
            )
            early = taps & (k > pos)
            tap += _load_state(initial_ptr, index, pos - k + WIDTH - 1, c, d, WIDTH, early)
            dz *= _silu_gradient(bias + tl.sum(by_tap * tap, axis=0)[None, :])
        later = taps & (k >= pos)
        w = tl.load(w_ptr + c * WIDTH + (k - pos), mask=later, other=0.0).to(tl.float32)
        dinitial += w * dz
        pos += 1
    row = index.to(tl.int64) * (WIDTH - 1) + k
    tl.store(dinitial_ptr + row * d + c, dinitial, mask=(k < WIDTH - 1) & (c < d))


@triton.jit
def _sum_partials_kernel(
    partial_ptr,
    dw_ptr,
    dbias_ptr,
    n_partials,
    d,
    WIDTH: tl.constexpr,
    PARTIALS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One row of dweight's taps or dbias: the partials (n_partials, w [+ 1], d) in fixed order."""
    ROWS_OF_PARTIAL: tl.constexpr = WIDTH + (dbias_ptr is not None)
    tap = tl.program_id(0) % ROWS_OF_PARTIAL
    c = (tl.program_id(0) // ROWS_OF_PARTIAL) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.arange(0, PARTIALS)[:, None]
    total = tl.zeros([PARTIALS, CHANNELS], tl.float32)
    i = 0
    while i < n_partials:
        offset = ((i + row).to(tl.int64) * ROWS_OF_PARTIAL + tap) * d + c[None, :]
        mask = (i + row < n_partials) & (c[None, :] < d)
        total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
        i += PARTIALS
    total = tl.sum(total, axis=0)
    tl.store(dw_ptr + c * WIDTH + tap, total, mask=(c < d) & (tap < WIDTH))
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, total, mask=(c < d) & (tap == WIDTH))


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _pack(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """How many sequences there are, and how many halvings find one of them."""
    n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return n_seq, (n_seq - 1).bit_length()


def _divide(cut: Cut, x: Tensor, width: int) -> tuple[int, int, int, int]:
    """Channels a program, runs a program, tokens a stretch and at most how many a run."""
    b, l, d = x.shape
    channels = min(cut.channels, triton.next_power_of_2(d))
    runs = max(1, min(cut.runs, 32 // triton.next_power_of_2(width)))
    run = b * l * triton.cdiv(d, channels) // (runs * cut.programs)
    stretch = cut.stretch if width <= 4 else 1
    return channels, runs, stretch, min(cut.max_run, max(cut.min_run, run))


class _Forward(Prepared):
    # x, weight, bias, initial_states, cu_seqlens, y, final
    ALL = itemgetter(0, 1, 2, 3, 4, 5, 6)

    def __init__(self, tensors, silu: bool, reverse: bool) -> None:
        x, weight, _, initial_states, cu_seqlens, _, final = tensors
        super().__init__(x.device)
        (b, l, d), width = x.shape, weight.shape[1]
        n_seq, n_halvings = _pack(x, cu_seqlens)
        channels, runs, stretch, run = _divide(FORWARD, x, width)
        if cu_seqlens is not None and initial_states is not None:
            stretch = triton.cdiv(stretch, 2)  # 16 such tokens, unrolled, take 10 s to compile
        run = triton.cdiv(run, stretch) * stretch
        n_blocks, n_tiles = triton.cdiv(d, channels), triton.cdiv(l, runs * run)
        programs = b * n_tiles * n_blocks
        rest = (
            l, d, n_seq, n_halvings, n_tiles, programs, run, *x.stride(), width, silu, reverse,
            runs, stretch, channels, triton.next_power_of_2(width),
        )  # fmt: skip
        programs += (final is not None) * n_seq * n_blocks
        self.launches = [Launch(_forward_kernel, programs, FORWARD.warps, self.ALL, rest)]


class _Backward(Prepared):
    # dy, dfinal, x, weight, bias, initial_states, cu_seqlens, dx, partials, dinitial, dweight,
    # dbias
    WALK = itemgetter(0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    SUM = itemgetter(8, 10, 11)

    def __init__(self, tensors, silu: bool, reverse: bool) -> None:
        dy, _, x, weight, bias, initial_states, cu_seqlens, dx = tensors
        super().__init__(x.device)
        (b, l, d), width = x.shape, weight.shape[1]
        n_seq, n_halvings = _pack(x, cu_seqlens)
        channels, runs, stretch, run = _divide(BACKWARD, x, width)
        n_blocks, n_tiles = triton.cdiv(d, channels), triton.cdiv(l, runs * run)
        run = triton.cdiv(l, runs * n_tiles)
        rows = width + (bias is not None)
        self.partials = b * n_tiles, rows, d
        programs = b * n_tiles * n_blocks
        walk = (
            l, d, n_seq, n_halvings, n_tiles, programs, run, *x.stride(), *dy.stride(),
            *dx.stride()[:2], width, silu, reverse, runs, stretch, channels,
            triton.next_power_of_2(width),
        )  # fmt: skip
        programs += (initial_states is not None) * n_seq * n_blocks
        total = b * n_tiles, d, width, 128, 32
        self.launches = [
            Launch(_backward_kernel, programs, BACKWARD.warps, self.WALK, walk),
            Launch(_sum_partials_kernel, rows * triton.cdiv(d, 32), 4, self.SUM, total),
        ]


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    return_final_states: bool,
) -> tuple[Tensor, Tensor]:
    with on(x.device):
        (b, l, d), width = x.shape, weight.shape[1]
        n_seq, _ = _pack(x, cu_seqlens)
        y = torch.empty((b, l, d), dtype=x.dtype, device=x.device)
        final = x.new_empty((n_seq, width - 1, d) if return_final_states else (0,))
        tensors = (
            x, weight.contiguous(), _contiguous(bias),
            _contiguous(initial_states) if width > 1 else None, _contiguous(cu_seqlens), y,
            final if final.numel() > 0 else None,
        )  # fmt: skip
        prepare(_Forward, tensors, silu, reverse).run(tensors)
    return y, final


def _forward_fake(
    x, weight, bias, silu, initial_states, cu_seqlens, reverse, return_final_states
) -> tuple[Tensor, Tensor]:
    n_seq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_shape = (n_seq, weight.shape[1] - 1, x.shape[2]) if return_final_states else (0,)
    return x.new_empty(x.shape), x.new_empty(final_shape)


def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the initial states; x's in `dx` where that is given."""
    with on(x.device):
        dx = x.new_empty(x.shape) if dx is None else dx
        dweight, dbias, dinitial = (
            x.new_empty(0) if t is None else t.new_empty(t.shape)
            for t in (weight, bias, initial_states)
        )
        carried = dinitial.numel() > 0
        # The output is empty where no final states were asked for, and so may its gradient be.
        has_final = dfinal is not None and dfinal.numel() > 0
        tensors = (
            dy, _contiguous(dfinal) if has_final else None, x, weight.contiguous(),
            _contiguous(bias), _contiguous(initial_states) if carried else None,
            _contiguous(cu_seqlens), dx,
        )  # fmt: skip
        call = prepare(_Backward, tensors, silu, reverse)
        partials = torch.empty(call.partials, dtype=torch.float32, device=x.device)
        of_initial, of_bias = dinitial if carried else None, None if bias is None else dbias
        call.run((*tensors, partials, of_initial, dweight, of_bias))
    return dx, dweight, dbias, dinitial


def _backward_fake(
    dy, dfinal, x, weight, bias, silu, initial_states, cu_seqlens, reverse
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0)
        if initial_states is None
        else initial_states.new_empty(initial_states.shape),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, silu, initial_states, cu_seqlens, reverse, _ = inputs
    ctx.save_for_backward(x, weight, bias, initial_states, cu_seqlens)
    ctx.silu, ctx.reverse = silu, reverse
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dfinal):
    x, weight, bias, initial_states, cu_seqlens = ctx.saved_tensors
    direct = not torch.is_grad_enabled() and is_plain(dy, dfinal, x, weight)
    run = _backward if direct else torch.ops.mamba2_apps.causal_conv1d_triton_backward
    dx, dweight, dbias, dinitial = run(
        torch.zeros_like(x) if dy is None else dy,
        dfinal,
        x,
        weight,
        bias,
        ctx.silu,
        initial_states,
        cu_seqlens,
        ctx.reverse,
    )
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None,
        None if initial_states is None else dinitial,
        None,
        None,
        None,
    )


_Direct = register(
    "causal_conv1d_triton",
    "(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_states, "
    "Tensor? cu_seqlens, bool reverse, bool return_final_states) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    "(Tensor dy, Tensor? dfinal, Tensor x, Tensor weight, Tensor? bias, bool silu, "
    "Tensor? initial_states, Tensor? cu_seqlens, bool reverse) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _differentiate,
    _setup_context,
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    return_final_states: bool,
) -> tuple[Tensor, Tensor | None]:
    """y (b, l, d) and, when asked for, the final states (b or nseq, w - 1, d), both of x's dtype.

    x (b, l, d) with any strides, weight (d, w), bias (d,), activation None or "silu",
    initial_states (b or nseq, w - 1, d), cu_seqlens (nseq + 1,) int32 with b == 1.
    """
    tensors = x, weight, bias, initial_states, cu_seqlens
    run = _Direct.apply if is_plain(*tensors) else torch.ops.mamba2_apps.causal_conv1d_triton
    y, final = run(
        x,
        weight,
        bias,
        activation == "silu",
        initial_states,
        cu_seqlens,
        reverse,
        return_final_states,
    )
    return y, final if return_final_states else None
