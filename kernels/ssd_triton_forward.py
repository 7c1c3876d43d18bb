"""Triton kernel for y: attention within a chunk plus what the state that enters it gives.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · tile q

    y_t = Σ_j (C_t·B_j) exp(cum_t - cum_j) dt_j x_j + exp(cum_t) S C_t + D x_t

with cum the running sum of dt' A within the chunk in scan order, and j from the chunk's start to t
in scan order. A program owns the q = CHUNK or CHUNK / 2 rows t of a tile and several heads of a
group, which share C Bᵀ. It sees its own tile under a triangular mask and the chunk's other tile,
where that comes before it, whole. With both directions at once the mask is two-sided, the other
tile always counts (for one direction), and shared x, B and C need one product for both.
"""

import triton
import triton.language as tl

from .ssd_triton_scan import UNSPECIALIZED, find_sequence, sequence_start


@triton.jit
def load_tile(pointer, token, row_stride, valid, offs, stride, mask):
    """(tokens, columns) of a tensor with the given strides, 0 outside."""
    return tl.load(
        pointer + token[:, None] * row_stride + offs.to(tl.int64)[None, :] * stride,
        mask=valid[:, None] & mask[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def tokens_of(cu_ptr, slot, row_in_slot, l, nseq, PACKED: tl.constexpr, CHUNK: tl.constexpr):
    """Token indices (int64) of a slot's rows and which of them lie in the slot's sequence."""
    start = 0
    end = l
    first_slot = 0
    if PACKED:
        sequence = find_sequence(cu_ptr, slot, nseq, l, CHUNK)
        start = sequence_start(cu_ptr, sequence, l)
        end = sequence_start(cu_ptr, sequence + 1, l)
        first_slot = start // CHUNK + sequence
    token = start + (slot - first_slot) * CHUNK + row_in_slot
    return token.to(tl.int64), (token >= start) & (token < end)


@triton.jit
def not_hoisted(offs, item):
    """`offs` again, as far as anyone can tell changing with the loop: item stays below 2³⁰.

    A mask made of it is computed anew each time, which is cheap, and not kept in a register for
    each of its elements through a loop that is short of them.
    """
    return offs + (item >> 30)


@triton.jit
def products(
    left, left_sl, left_sn, left_token, left_valid, right, right_sl, right_sn, right_token,
    right_valid, n, N_TILES: tl.constexpr, Q: tl.constexpr, NB: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """left rightᵀ over dstate: (q, q), float32."""
    result = tl.zeros((Q, Q), dtype=tl.float32)
    for tile in tl.static_range(N_TILES):
        offs = tile * NB + tl.arange(0, NB)
        a = load_tile(left, left_token, left_sl, left_valid, offs, left_sn, offs < n)
        b = load_tile(right, right_token, right_sl, right_valid, offs, right_sn, offs < n)
        result = tl.dot(a, tl.trans(b), result, input_precision=DOT)
    return result


@triton.jit(do_not_specialize=UNSPECIALIZED)
def chunk_forward_kernel(
    x, B, C, D, z, y, ungated, cu_ptr, ws, states,
    x_sd, x_sb, x_sl, x_sh, x_sp, B_sd, B_sb, B_sl, B_sg, B_sn,
    C_sd, C_sb, C_sl, C_sg, C_sn, z_sb, z_sl, z_sh, z_sp,
    cum_off, dtp_off, fade_off, carried_off,
    l, nseq, slots, rows, heads, heads_per_group, heads_per_program, splits, tiles,
    segments, segment_slots, reverse, p, n,
    DIRECTIONS: tl.constexpr, SHARED: tl.constexpr, X_SHARED: tl.constexpr, HAS_D: tl.constexpr,
    D_MATRIX: tl.constexpr, HAS_Z: tl.constexpr, SAVE: tl.constexpr, PACKED: tl.constexpr,
    SEGMENTED: tl.constexpr, P_TILES: tl.constexpr, N_TILES: tl.constexpr, CHUNK: tl.constexpr,
    Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
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
    # The direction in which the other tile comes before this one, and whether that is scanned.
    before = 0
    has_other = half != reverse
    if DIRECTIONS == 2:
        before = 1 - half
        has_other = half >= 0

    r = tl.arange(0, Q)
    n_offs = tl.arange(0, NB)
    r_own = half * Q + r
    r_other = (1 - half) * Q + r
    token, valid = tokens_of(cu_ptr, slot, r_own, l, nseq, PACKED, CHUNK)
    other, other_valid = tokens_of(cu_ptr, slot, r_other, l, nseq, PACKED, CHUNK)
    B_at = B + row * B_sb + group * B_sg
    C_at = C + row * C_sb + group * C_sg
    cb = products(C_at, C_sl, C_sn, token, valid, B_at, B_sl, B_sn, token, valid, n,
                  N_TILES, Q, NB, DOT)  # fmt: skip
    c = load_tile(C_at, token, C_sl, valid, n_offs, C_sn, n_offs < n)
    cb = cb.to(c.dtype)  # half the registers, and rounded after weighting anyway
    cb_back = cb
    c_back = c
    if not SHARED:
        cb_back = products(C_at + C_sd, C_sl, C_sn, token, valid, B_at + B_sd, B_sl, B_sn, token,
                           valid, n, N_TILES, Q, NB, DOT).to(c.dtype)  # fmt: skip
        c_back = load_tile(C_at + C_sd, token, C_sl, valid, n_offs, C_sn, n_offs < n)
    cb_other = cb
    if TILES == 2:
        cb_other = products(
            C_at + before * C_sd, C_sl, C_sn, token, valid, B_at + before * B_sd, B_sl, B_sn, other,
            other_valid & has_other, n, N_TILES, Q, NB, DOT,
        ).to(c.dtype)  # fmt: skip

    for item in tl.range(0, head_count * P_TILES, num_stages=STAGES):
        head = (first_head + item // P_TILES).to(tl.int64)
        p_offs = item % P_TILES * PB + tl.arange(0, PB)
        p_mask = p_offs < p
        x_at = x + row * x_sb + head * x_sh
        xt = load_tile(x_at, token, x_sl, valid, p_offs, x_sp, p_mask)
        acc = tl.zeros((Q, PB), dtype=tl.float32)
        if HAS_D:
            skipped = xt.to(tl.float32)
            if not X_SHARED:
                skipped += load_tile(x_at + x_sd, token, x_sl, valid, p_offs, x_sp, p_mask).to(
                    tl.float32
                )
            if D_MATRIX:
                d = tl.load(D + head * p + p_offs, mask=p_mask, other=0.0).to(tl.float32)
                acc = skipped * d[None, :]
            else:
                acc = skipped * tl.load(D + head).to(tl.float32)
        mix = tl.zeros((Q, Q), dtype=tl.float32)
        order = not_hoisted(r, item)
        for direction in tl.static_range(DIRECTIONS):
            line = (direction * rows + row) * heads + head
            cum = tl.load(ws + cum_off + (line * slots + slot) * CHUNK + r_own)
            dt = tl.load(ws + dtp_off + (line * slots + slot) * CHUNK + r_own)
            sign = 1 - 2 * reverse
            if DIRECTIONS == 2:
                sign = 1 - 2 * direction
            seen = (order[:, None] - order[None, :]) * sign >= 0
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
                    ct = load_tile(
                        C_at + direction * C_sd, token, C_sl, valid, offs, C_sn, offs < n
                    )
                given = tl.dot(ct, state, given, input_precision=DOT)
            acc += given * tl.exp2(cum)[:, None]

            if SHARED:
                mix += decay
            else:
                if direction == 1:
                    xt = load_tile(x_at + x_sd, token, x_sl, valid, p_offs, x_sp, p_mask)
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
            if has_other:
                far_line = (before * rows + row) * heads + head
                far_at = (far_line * slots + slot) * CHUNK
                cum_own = tl.load(ws + cum_off + far_at + r_own)
                cum_far = tl.load(ws + cum_off + far_at + r_other)
                dt_far = tl.load(ws + dtp_off + far_at + r_other)
                far = tl.exp2(cum_own[:, None] - cum_far[None, :]) * dt_far[None, :]
                x_far = load_tile(
                    x_at + before * x_sd, other, x_sl, other_valid, p_offs, x_sp, p_mask
                )
                acc = tl.dot(
                    (cb_other.to(tl.float32) * far).to(x_far.dtype), x_far, acc, input_precision=DOT
                )
        at = ((row * l + token) * heads + head)[:, None] * p + p_offs[None, :]
        mask = valid[:, None] & p_mask[None, :]
        if HAS_Z:
            if SAVE:
                tl.store(ungated + at, acc.to(ungated.dtype.element_ty), mask=mask)
            gate = load_tile(
                z + row * z_sb + head * z_sh, token, z_sl, valid, p_offs, z_sp, p_mask
            ).to(tl.float32)
            acc *= gate * tl.sigmoid(gate)
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)
