"""Triton kernel for y: each program walks a row with the state in registers.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · chunk q

    y_t = Σ_j (C_t·B_j) exp(cum_t - cum_j) dt_j x_j + exp(cum_t) S C_t + D x_t
    S  ← exp(cum_q) S + Σ_j exp(cum_q - cum_j) dt_j B_j x_jᵀ

with cum the running sum of dt' A within a chunk in scan order, and j from the chunk's start to t in
scan order. A program owns a row (or one of its segments), a head and a tile of headdim, reads every
input and writes every output once, and stores no state but those asked for. A scan against time is
the same walk from the other end, its tiles' rows turned into scan order as they are loaded.

The SSD is a sum over directions and over blocks of dstate: the program walks once for each and adds
to the y that it wrote itself. Where both directions share x, B and C, the first walk does what lies
inside the chunks for both, with one C Bᵀ under a two-sided mask of decays, and the second only what
the state gives.
"""

import triton
import triton.language as tl

from .sigmoid_triton import sigmoid
from .ssd_triton_scan import (
    LOG2E,
    UNSPECIALIZED,
    decays,
    decays_both_ways,
    enter_slot,
    find_sequence,
    is_inside,
    load_rows,
    not_hoisted,
    step_sizes,
    tile_mask,
)
from .ssd_triton_segments import entering_state


@triton.jit
def _walk(
    x, dt, A, B, C, D, z, dt_bias, init, y, ungated, final, cu_ptr, ws,
    x_sd, x_sb, x_sl, x_sh, x_sp, B_sd, B_sb, B_sl, B_sg, B_sn,
    C_sd, C_sb, C_sl, C_sg, C_sn, z_sb, z_sl, z_sh, z_sp, dt_sd, dt_sb, dt_sl, dt_sh,
    marks_off, carry_off, carried_off, low, high, l, nseq, slots, rows, heads, heads_per_group,
    segments, segment_slots, reverse, p, n, p_offs, head, row, segment, direction, n_tile, walk,
    walks,
    INSIDE: tl.constexpr, X_SHARED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr, D_MATRIX: tl.constexpr, HAS_Z: tl.constexpr, SAVE: tl.constexpr,
    HAS_INIT: tl.constexpr, HAS_FINAL: tl.constexpr, SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr, SEGMENTED: tl.constexpr, CHAINED: tl.constexpr, FULL: tl.constexpr,
    ADDS: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One walk along a row or segment, which writes y, or adds to it where `walk` > 0.

    INSIDE says for how many directions (0, 1 or 2) it does what lies inside the chunks.
    """
    group = head // heads_per_group
    p_mask = p_offs < p
    sequences = rows
    if PACKED:
        sequences = nseq
    order = tl.arange(0, Q)
    begin = segment * segment_slots
    count = tl.minimum(segment_slots, slots - begin)
    if HAS_D:
        if D_MATRIX:
            d = tl.load(D + head * p + p_offs, mask=p_mask, other=0.0).to(tl.float32)
        else:
            d = tl.full((PB,), 1.0, tl.float32) * tl.load(D + head).to(tl.float32)
    descending = reverse != 0
    # Tile rows are in scan order: against time for a reverse scan.
    tile_row = tl.where(descending, Q - 1 - order, order)
    n_offs = n_tile * NB + tl.arange(0, NB)
    n_mask = n_offs < n
    x_at = x + direction * x_sd + row * x_sb + head * x_sh
    B_at = B + direction * B_sd + row * B_sb + group * B_sg
    C_at = C + direction * C_sd + row * C_sb + group * C_sg
    dt_at = dt + direction * dt_sd + row * dt_sb + head * dt_sh
    a_log2 = tl.load(A + direction * heads + head).to(tl.float32) * LOG2E
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(dt_bias + direction * heads + head).to(tl.float32)
    if INSIDE == 2:  # the other direction's steps, in the order of this one
        other_a_log2 = tl.load(A + heads + head).to(tl.float32) * LOG2E
        other_bias = 0.0
        if HAS_BIAS:
            other_bias = tl.load(dt_bias + heads + head).to(tl.float32)
    # D x counts once, and once for each x.
    skips = n_tile == 0
    if X_SHARED:
        skips = walk == 0

    entry_slot = begin + tl.where(descending, count - 1, 0)
    row_entry = tl.where(descending, slots - 1, 0)
    state_tile = p_offs[None, :] * n + n_offs[:, None]
    state_mask = n_mask[:, None] & p_mask[None, :]
    state = tl.zeros((NB, PB), dtype=tl.float32)
    if SEGMENTED:
        line = (direction * rows + row) * heads + head
        if CHAINED:
            state = entering_state(
                ws, marks_off, carry_off, line, segment, segments, descending, state_tile,
                state_mask, p, n, NB, PB,
            )  # fmt: skip
        else:
            carried = ws + carried_off + (line * segments + segment) * p * n
            state = tl.load(carried + state_tile, mask=state_mask, other=0.0)
    sequence = row.to(tl.int32)
    if PACKED:
        sequence = find_sequence(cu_ptr, entry_slot, nseq, l, Q)
    elif HAS_INIT:
        source = init + ((direction * sequences + sequence) * heads + head) * p * n
        begins = state_mask & (entry_slot == row_entry)
        state += tl.load(source + state_tile, mask=begins, other=0.0).to(tl.float32)

    sequence, start, end, first_slot = enter_slot(
        cu_ptr, sequence, entry_slot, descending, nseq, l, PACKED, Q
    )
    chunk = start + (entry_slot - first_slot) * Q
    known = is_inside(chunk, tile_row, start, end, PACKED)
    steps = dt_at + chunk.to(tl.int64) * dt_sl + tile_row * dt_sl
    raw = tl.load(steps, mask=known, other=0.0)
    if INSIDE == 2:
        other_raw = tl.load(steps + dt_sd, mask=known, other=0.0)
    for i in tl.range(0, count, num_stages=STAGES):
        slot = begin + tl.where(descending, count - 1 - i, i)
        if PACKED:
            last_slot = end // Q + sequence
            enters = slot == tl.where(descending, last_slot, first_slot)
            leaves = slot == tl.where(descending, first_slot, last_slot)
            if HAS_INIT:
                source = init + ((direction * sequences + sequence) * heads + head) * p * n
                given = tl.load(source + state_tile, mask=state_mask & enters, other=0.0)
                state = tl.where(enters, given.to(tl.float32), state)
            else:
                state = tl.where(enters, 0.0, state)
        chunk = start + (slot - first_slot) * Q
        valid = is_inside(chunk, tile_row, start, end, PACKED)
        base = chunk.to(tl.int64)
        size, cum, total = step_sizes(raw, valid, bias, a_log2, low, high, SOFTPLUS)
        if INSIDE == 2:
            other_size, upto, _ = step_sizes(
                other_raw, valid, other_bias, other_a_log2, low, high, SOFTPLUS
            )
            # Against time token t's own decay is not between it and the earlier ones.
            upto -= other_size * other_a_log2
            # With the step sizes in the exponents, which are fewer values to hold.
            lead = cum - tl.log2(size)
            lag = upto + tl.log2(other_size)
        this_sequence = sequence
        # The next chunk's step sizes: too few bytes for the compiler to load them ahead.
        next_slot = begin + tl.where(descending, count - 2 - i, i + 1)
        sequence, start, end, first_slot = enter_slot(
            cu_ptr, sequence, next_slot, descending, nseq, l, PACKED, Q
        )
        chunk = start + (next_slot - first_slot) * Q
        known = is_inside(chunk, tile_row, start, end, PACKED) & (i + 1 < count)
        steps = dt_at + chunk.to(tl.int64) * dt_sl + tile_row * dt_sl
        raw = tl.load(steps, mask=known, other=0.0)
        if INSIDE == 2:
            other_raw = tl.load(steps + dt_sd, mask=known, other=0.0)

        xt = load_rows(x_at + base * x_sl, tile_row, x_sl, valid, p_offs, x_sp, p_mask, FULL)
        bt = load_rows(B_at + base * B_sl, tile_row, B_sl, valid, n_offs, B_sn, n_mask, FULL)
        ct = load_rows(C_at + base * C_sl, tile_row, C_sl, valid, n_offs, C_sn, n_mask, FULL)
        if INSIDE > 0:
            scores = tl.dot(ct, tl.trans(bt), input_precision=DOT)
            at_row = not_hoisted(order, i)[:, None]
            seen = at_row >= order[None, :]
            if INSIDE == 1:
                scores *= decays(scores, seen, cum[:, None], cum[None, :]) * size[None, :]
            else:
                weight = decays_both_ways(
                    scores, seen, cum[:, None], lead[None, :], lag[None, :], upto[:, None]
                )
                # A token reads itself in both directions.
                own = at_row == order[None, :]
                scores *= weight + tl.where(own, other_size[:, None], 0.0)
        acc = tl.dot(ct, state.to(ct.dtype), input_precision=DOT) * tl.exp2(cum)[:, None]
        if INSIDE > 0:
            acc = tl.dot(scores.to(xt.dtype), xt, acc, input_precision=DOT)
        weighted = xt.to(tl.float32) * (tl.exp2(total - cum) * size)[:, None]
        state = tl.dot(
            tl.trans(bt), weighted.to(xt.dtype), state * tl.exp2(total), input_precision=DOT
        )

        if HAS_D:
            acc += xt.to(tl.float32) * tl.where(skips, d, 0.0)[None, :]
        out = ((row * l + base) * heads + head) * p
        at = tile_row[:, None] * (heads * p) + p_offs[None, :]
        mask = tile_mask(valid, p_mask, FULL)
        if ADDS:
            acc += tl.load(y + out + at, mask=mask & (walk > 0), other=0.0).to(tl.float32)
        if HAS_Z:
            if SAVE:
                tl.store(ungated + out + at, acc.to(ungated.dtype.element_ty), mask=mask)
            z_at = z + row * z_sb + head * z_sh + base * z_sl
            gate = load_rows(z_at, tile_row, z_sl, valid, p_offs, z_sp, p_mask, FULL).to(tl.float32)
            gate *= sigmoid(gate)
            acc *= tl.where(walk == walks - 1, gate, 1.0)
        tl.store(y + out + at, acc.to(y.dtype.element_ty), mask=mask)
        if PACKED and HAS_FINAL:
            target = final + ((direction * sequences + this_sequence) * heads + head) * p * n
            tl.store(target + state_tile, state, mask=state_mask & leaves)

    if HAS_FINAL and not PACKED:
        target = final + ((direction * sequences + sequence) * heads + head) * p * n
        row_exit = tl.where(descending, 0, segments - 1)
        tl.store(target + state_tile, state, mask=state_mask & (segment == row_exit))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    x, dt, A, B, C, D, z, dt_bias, init, y, ungated, final, cu_ptr, ws,
    x_sd, x_sb, x_sl, x_sh, x_sp, B_sd, B_sb, B_sl, B_sg, B_sn,
    C_sd, C_sb, C_sl, C_sg, C_sn, z_sb, z_sl, z_sh, z_sp, dt_sd, dt_sb, dt_sl, dt_sh,
    marks_off, carry_off, carried_off, low, high, l, nseq, slots, rows, heads, heads_per_group,
    segments, segment_slots, reverse, p, n,
    DIRECTIONS: tl.constexpr, MERGED: tl.constexpr, X_SHARED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr, D_MATRIX: tl.constexpr, HAS_Z: tl.constexpr, SAVE: tl.constexpr,
    HAS_INIT: tl.constexpr, HAS_FINAL: tl.constexpr, SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr, SEGMENTED: tl.constexpr, CHAINED: tl.constexpr, FULL: tl.constexpr,
    P_TILES: tl.constexpr, N_TILES: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr,
    NB: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    WALKS: tl.constexpr = DIRECTIONS * N_TILES
    pid = tl.program_id(0)
    p_offs = pid % P_TILES * PB + tl.arange(0, PB)
    pid = pid // P_TILES
    head = (pid % heads).to(tl.int64)
    pid = pid // heads
    row = (pid % rows).to(tl.int64)
    segment = pid // rows
    if MERGED:
        for number in tl.static_range(2):
            walk = pid * 0 + number
            _walk(
                x, dt, A, B, C, D, z, dt_bias, init, y, ungated, final, cu_ptr, ws,
                x_sd, x_sb, x_sl, x_sh, x_sp, B_sd, B_sb, B_sl, B_sg, B_sn,
                C_sd, C_sb, C_sl, C_sg, C_sn, z_sb, z_sl, z_sh, z_sp, dt_sd, dt_sb, dt_sl, dt_sh,
                marks_off, carry_off, carried_off, low, high, l, nseq, slots, rows, heads,
                heads_per_group, segments, segment_slots, walk, p, n, p_offs, head, row, segment,
                walk.to(tl.int64), walk * 0, walk, 2, 2 - 2 * number, X_SHARED, HAS_BIAS,
                HAS_D and number == 0, D_MATRIX, HAS_Z, SAVE, HAS_INIT, HAS_FINAL, SOFTPLUS, PACKED,
                SEGMENTED, CHAINED, FULL, number > 0, Q, PB, NB, DOT, STAGES,
            )  # fmt: skip
            tl.debug_barrier()  # another thread may read back what this one wrote to y
    else:
        for number in tl.range(0, WALKS):
            walk = pid * 0 + number  # the interpreter counts in Python
            if DIRECTIONS == 2:
                reverse = walk // N_TILES
            _walk(
                x, dt, A, B, C, D, z, dt_bias, init, y, ungated, final, cu_ptr, ws,
                x_sd, x_sb, x_sl, x_sh, x_sp, B_sd, B_sb, B_sl, B_sg, B_sn,
                C_sd, C_sb, C_sl, C_sg, C_sn, z_sb, z_sl, z_sh, z_sp, dt_sd, dt_sb, dt_sl, dt_sh,
                marks_off, carry_off, carried_off, low, high, l, nseq, slots, rows, heads,
                heads_per_group, segments, segment_slots, reverse, p, n, p_offs, head, row, segment,
                (walk // N_TILES).to(tl.int64), walk % N_TILES, walk, WALKS, 1, X_SHARED, HAS_BIAS,
                HAS_D, D_MATRIX, HAS_Z, SAVE, HAS_INIT, HAS_FINAL, SOFTPLUS, PACKED, SEGMENTED,
                CHAINED, FULL, WALKS > 1, Q, PB, NB, DOT, STAGES,
            )  # fmt: skip
            if WALKS > 1:
                tl.debug_barrier()
