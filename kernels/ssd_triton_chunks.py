"""Triton kernel for y in both directions, once the states that enter every chunk are stored.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · tile q

    y_t = Σ_j (C_t·B_j) W_tj x_j + Σ_directions exp(cum_t) S C_t + D x_t
    W_tj = Σ_directions exp(cum_t - cum_j) dt_j where j is not after t in that direction's order

with cum the running sum of dt' A within the chunk in scan order. A program owns the q = CHUNK or
CHUNK / 2 rows t of a tile and several heads of a group, which share C Bᵀ. It sees its own tile
under the two-sided mask W and the chunk's other tile, which one direction has behind it, whole.
Shared x, B and C need one product for both directions.
"""

import triton
import triton.language as tl

from .ssd_triton_scan import (
    UNSPECIALIZED,
    chunk_of,
    is_inside,
    load_rows,
    not_hoisted,
    products,
    tile_mask,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def chunk_forward_kernel(
    x, B, C, D, y, cu_ptr, ws, states,
    x_sd, x_sb, x_sl, x_sh, x_sp, B_sd, B_sb, B_sl, B_sg, B_sn,
    C_sd, C_sb, C_sl, C_sg, C_sn, cum_off, dtp_off, fade_off, carried_off,
    l, nseq, slots, first_row, rows, heads, heads_per_group, heads_per_program, splits, tiles,
    segments, segment_slots, p, n,
    SHARED: tl.constexpr, X_SHARED: tl.constexpr, HAS_D: tl.constexpr, D_MATRIX: tl.constexpr,
    PACKED: tl.constexpr, SEGMENTED: tl.constexpr, FULL: tl.constexpr, P_TILES: tl.constexpr,
    N_TILES: tl.constexpr, CHUNK: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr,
    NB: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = CHUNK // Q
    pid = tl.program_id(0)
    split = pid % splits
    pid = pid // splits
    groups = heads // heads_per_group
    group = (pid % groups).to(tl.int64)
    pid = pid // groups
    tile = pid % tiles
    row = (pid // tiles).to(tl.int64)
    slot = tile // TILES
    half = tile % TILES
    first_head = group.to(tl.int32) * heads_per_group + split * heads_per_program
    head_count = tl.minimum(heads_per_program, heads_per_group - split * heads_per_program)
    before = 1 - half  # the direction in which the chunk's other tile comes before this one
    whole_row = first_row + row  # of the batch, of which this launch sees a part

    r = tl.arange(0, Q)
    n_offs = tl.arange(0, NB)
    r_own = half * Q + r
    r_other = (1 - half) * Q + r
    chunk, start, end = chunk_of(cu_ptr, slot, l, nseq, PACKED, CHUNK)
    valid = is_inside(chunk, r_own, start, end, PACKED)
    other_valid = is_inside(chunk, r_other, start, end, PACKED)
    base = chunk.to(tl.int64)
    B_at = B + whole_row * B_sb + group * B_sg + base * B_sl
    C_at = C + whole_row * C_sb + group * C_sg + base * C_sl
    cb = products(C_at, C_sl, C_sn, r_own, valid, B_at, B_sl, B_sn, r_own, valid, n,
                  FULL, N_TILES, Q, NB, DOT)  # fmt: skip
    c = load_rows(C_at, r_own, C_sl, valid, n_offs, C_sn, n_offs < n, FULL)
    cb = cb.to(c.dtype)  # half the registers, and rounded after weighting anyway
    cb_back = cb
    c_back = c
    if not SHARED:
        cb_back = products(C_at + C_sd, C_sl, C_sn, r_own, valid, B_at + B_sd, B_sl, B_sn, r_own,
                           valid, n, FULL, N_TILES, Q, NB, DOT).to(c.dtype)  # fmt: skip
        c_back = load_rows(C_at + C_sd, r_own, C_sl, valid, n_offs, C_sn, n_offs < n, FULL)
    cb_other = cb
    if TILES == 2:
        cb_other = products(
            C_at + before * C_sd, C_sl, C_sn, r_own, valid, B_at + before * B_sd, B_sl, B_sn,
            r_other, other_valid, n, FULL, N_TILES, Q, NB, DOT,
        ).to(c.dtype)  # fmt: skip

    for item in tl.range(0, head_count * P_TILES, num_stages=STAGES):
        head = (first_head + item // P_TILES).to(tl.int64)
        p_offs = item % P_TILES * PB + tl.arange(0, PB)
        p_mask = p_offs < p
        x_at = x + whole_row * x_sb + head * x_sh + base * x_sl
        xt = load_rows(x_at, r_own, x_sl, valid, p_offs, x_sp, p_mask, FULL)
        acc = tl.zeros((Q, PB), dtype=tl.float32)
        if HAS_D:
            skipped = xt.to(tl.float32)
            if not X_SHARED:
                skipped += load_rows(
                    x_at + x_sd, r_own, x_sl, valid, p_offs, x_sp, p_mask, FULL
                ).to(tl.float32)
            if D_MATRIX:
                d = tl.load(D + head * p + p_offs, mask=p_mask, other=0.0).to(tl.float32)
                acc = skipped * d[None, :]
            else:
                acc = skipped * tl.load(D + head).to(tl.float32)
        mix = tl.zeros((Q, Q), dtype=tl.float32)
        order = not_hoisted(r, item)
        for direction in tl.static_range(2):
            line = (direction * rows + row) * heads + head
            cum = tl.load(ws + cum_off + (line * slots + slot) * CHUNK + r_own)
            dt = tl.load(ws + dtp_off + (line * slots + slot) * CHUNK + r_own)
            seen = (order[:, None] - order[None, :]) * (1 - 2 * direction) >= 0
            decay = tl.where(seen, tl.exp2(cum[:, None] - cum[None, :]), 0.0) * dt[None, :]

            # What the state that entered the chunk gives.
            given = tl.zeros((Q, PB), dtype=tl.float32)
            state_at = states + (line * slots + slot) * p * n
            for n_tile in tl.static_range(N_TILES):
                offs = n_tile * NB + tl.arange(0, NB)
                at = offs[:, None] + p_offs[None, :] * n
                mask = (offs < n)[:, None] & p_mask[None, :]
                state = tl.load(state_at + at, mask=mask, other=0.0)
                if SEGMENTED:
                    fade = tl.load(ws + fade_off + line * slots + slot)
                    segment = slot // segment_slots
                    source = states + carried_off + (line * segments + segment) * p * n
                    carried = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
                    state = (state.to(tl.float32) + fade * carried).to(state.dtype)
                ct = c
                if not SHARED and direction == 1:
                    ct = c_back
                if N_TILES > 1:
                    ct = load_rows(
                        C_at + direction * C_sd, r_own, C_sl, valid, offs, C_sn, offs < n, FULL
                    )
                given = tl.dot(ct, state, given, input_precision=DOT)
            acc += given * tl.exp2(cum)[:, None]

            if SHARED:
                mix += decay
            else:
                if direction == 1:
                    xt = load_rows(x_at + x_sd, r_own, x_sl, valid, p_offs, x_sp, p_mask, FULL)
                    acc = tl.dot(
                        (cb_back.to(tl.float32) * decay).to(xt.dtype), xt, acc, input_precision=DOT
                    )
                else:
                    acc = tl.dot(
                        (cb.to(tl.float32) * decay).to(xt.dtype), xt, acc, input_precision=DOT
                    )
        if SHARED:
            acc = tl.dot((cb.to(tl.float32) * mix).to(xt.dtype), xt, acc, input_precision=DOT)
        if TILES == 2:
            # Always true, but the compiler cannot know: it would load this part far ahead as well,
            # into shared memory that a second program on the multiprocessor needs.
            if half >= 0:
                far_line = (before * rows + row) * heads + head
                far_at = (far_line * slots + slot) * CHUNK
                cum_own = tl.load(ws + cum_off + far_at + r_own)
                cum_far = tl.load(ws + cum_off + far_at + r_other)
                dt_far = tl.load(ws + dtp_off + far_at + r_other)
                far = tl.exp2(cum_own[:, None] - cum_far[None, :]) * dt_far[None, :]
                x_far = load_rows(
                    x_at + before * x_sd, r_other, x_sl, other_valid, p_offs, x_sp, p_mask, FULL
                )
                acc = tl.dot(
                    (cb_other.to(tl.float32) * far).to(x_far.dtype), x_far, acc, input_precision=DOT
                )
        out = y + ((whole_row * l + base) * heads + head) * p
        at = r_own[:, None] * (heads * p) + p_offs[None, :]
        tl.store(out + at, acc.to(y.dtype.element_ty), mask=tile_mask(valid, p_mask, FULL))
