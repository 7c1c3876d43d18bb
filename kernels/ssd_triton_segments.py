"""Triton kernels for what the segments of a row, which are walked at once, give one another.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · chunk q

Where both directions share x and B, one pass in the order of time gives both of their states. In
time order the state is scaled from chunk to chunk. Against it, what a token leaves behind is scaled
by the decays of the tokens before it, which the pass has seen: its part is added once and for all.
"""

import triton
import triton.language as tl

from .ssd_triton_scan import (
    LOG2E,
    UNSPECIALIZED,
    is_inside,
    load_of_both,
    load_rows,
    step_sizes_of_both,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def segment_states_kernel(
    x, B, dt, A, dt_bias, init, ws,
    x_sb, x_sl, x_sh, x_sp, B_sb, B_sl, B_sg, B_sn, dt_sd, dt_sb, dt_sl, dt_sh,
    marks_off, carry_off, low, high, l, slots, rows, heads, heads_per_group, segments,
    segment_slots, p, n,
    HAS_BIAS: tl.constexpr, HAS_INIT: tl.constexpr, SOFTPLUS: tl.constexpr, FULL: tl.constexpr,
    P_TILES: tl.constexpr, N_TILES: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr,
    NB: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state that leaves each segment in either direction, of nothing that entered it."""
    pid = tl.program_id(0)
    n_start = pid % N_TILES * NB
    pid = pid // N_TILES
    p_start = pid % P_TILES * PB
    pid = pid // P_TILES
    head = (pid % heads).to(tl.int64)
    pid = pid // heads
    segment = pid % segments
    row = (pid // segments).to(tl.int64)
    order = tl.arange(0, Q)
    p_offs = p_start + tl.arange(0, PB)
    n_offs = n_start + tl.arange(0, NB)
    p_mask = p_offs < p
    n_mask = n_offs < n
    tile = p_offs.to(tl.int64)[None, :] * n + n_offs[:, None]
    tile_mask = p_mask[None, :] & n_mask[:, None]
    x_at = x + row * x_sb + head * x_sh
    B_at = B + row * B_sb + head // heads_per_group * B_sg
    dt_at = dt + row * dt_sb + head * dt_sh
    a_log2 = load_of_both(A + head, 0.0, heads, True) * LOG2E
    bias = load_of_both(dt_bias + head, 0.0, heads, HAS_BIAS)

    begin = segment * segment_slots
    count = tl.minimum(segment_slots, slots - begin)
    to_later = tl.zeros((NB, PB), dtype=tl.float32)
    to_earlier = tl.zeros((NB, PB), dtype=tl.float32)
    if HAS_INIT:
        source = init + (row * heads + head) * p * n
        begins = tile_mask & (segment == 0)
        to_later = tl.load(source + tile, mask=begins, other=0.0).to(tl.float32)
    later_fade = 0.0
    earlier_fade = 0.0
    known = is_inside(begin * Q, order, 0, l, False)
    dt_tile = order[:, None] * dt_sl + tl.arange(0, 2)[None, :] * dt_sd
    raw = tl.load(dt_at + (begin * Q).to(tl.int64) * dt_sl + dt_tile, mask=known[:, None])
    for i in tl.range(0, count, num_stages=STAGES):
        chunk = (begin + i) * Q
        base = chunk.to(tl.int64)
        valid = is_inside(chunk, order, 0, l, False)
        size, cum, total, kept, upto, lost = step_sizes_of_both(
            raw, valid, bias, a_log2, low, high, SOFTPLUS
        )
        # The next step sizes: too few bytes for the compiler to load them ahead.
        known = is_inside(chunk + Q, order, 0, l, False) & (i + 1 < count)
        raw = tl.load(dt_at + (base + Q) * dt_sl + dt_tile, mask=known[:, None])

        xt = load_rows(x_at + base * x_sl, order, x_sl, valid, p_offs, x_sp, p_mask, FULL)
        bt = load_rows(B_at + base * B_sl, order, B_sl, valid, n_offs, B_sn, n_mask, FULL)
        # Weighted is the right factor: wgmma takes the left one from registers, and then waits for
        # each 16 tokens' product before the next.
        values = xt.to(tl.float32)
        weighted = (values * (tl.exp2(total - cum) * size)[:, None]).to(xt.dtype)
        to_later = tl.dot(tl.trans(bt), weighted, to_later * tl.exp2(total), input_precision=DOT)
        weighted = (values * (tl.exp2(earlier_fade + upto) * kept)[:, None]).to(xt.dtype)
        to_earlier = tl.dot(tl.trans(bt), weighted, to_earlier, input_precision=DOT)
        later_fade += total
        earlier_fade += lost

    if HAS_INIT:
        source = init + ((rows + row) * heads + head) * p * n
        begins = tile_mask & (segment == segments - 1)
        given = tl.load(source + tile, mask=begins, other=0.0).to(tl.float32)
        to_earlier += given * tl.exp2(earlier_fade)
    line = row * heads + head
    _leave(ws, marks_off, carry_off, line * segments + segment, to_later, later_fade, tile,
           tile_mask, p, n)  # fmt: skip
    line += rows * heads
    _leave(ws, marks_off, carry_off, line * segments + segment, to_earlier, earlier_fade, tile,
           tile_mask, p, n)  # fmt: skip


@triton.jit
def _leave(ws, marks_off, carry_off, at, state, fade, tile, tile_mask, p, n):
    tl.store(ws + carry_off + at * p * n + tile, state, mask=tile_mask)
    tl.store(ws + marks_off + at * 4, tl.exp2(fade))


@triton.jit
def entering_state(
    ws, marks_off, carry_off, line, segment, segments, descending, tile, tile_mask, p, n,
    NB: tl.constexpr, PB: tl.constexpr,
):  # fmt: skip
    """What the segments before this one in scan order left, (n, p) like `tile`."""
    state = tl.zeros((NB, PB), dtype=tl.float32)
    for i in tl.range(0, tl.where(descending, segments - 1 - segment, segment)):
        at = line * segments + tl.where(descending, segments - 1 - i, i)
        left = tl.load(ws + carry_off + at * p * n + tile, mask=tile_mask, other=0.0)
        state = state * tl.load(ws + marks_off + at * 4) + left
    return state
