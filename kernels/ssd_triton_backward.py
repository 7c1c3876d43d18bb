"""Triton kernels for the gradients of the SSD, once S and R of every chunk are known.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · tile q

With t the row of y, j of x, G = x dyᵀ, L = exp(cum_t - cum_j) where t is not before j in scan
order, sums over t and j within a chunk, and d_in, d_out the decay from the chunk's start to t and
from j to its end:

    dx_j = Σ_t (B_j·C_t) L dt_j dy_t + d_out_j dt_j R B_j + D dy_j        chunk_backward_kernel
    M_jt = Σ_heads G L dt_j                                               chunk_backward_kernel
    dB_j = Σ_t M_jt C_t + Σ_heads d_out_j dt_j Rᵀ x_j                     shared_backward_kernel
    dC_t = Σ_j M_jt B_j + Σ_heads d_in_t Sᵀ dy_t                          shared_backward_kernel
    dcum = row - column sums of G ∘ L ∘ B Cᵀ dt and of the state terms    step_backward_kernel

A tile of the first kernel is q = CHUNK or CHUNK / 2 rows j against its own columns t, and against
the chunk's other tile where that comes later in scan order. dx, M, and the state terms of dB and dC
are computed by programs of their own, so that each fits in registers. Everything quadratic is held
as (j, t), and M goes through memory, so that no accumulator is ever transposed to become an
operand. Row and column sums come from the same registers: what cancels between them cancels. Sums
over chunks are written per block and added up in a fixed order: no atomics.
"""

import triton
import triton.language as tl

from .sigmoid_triton import sigmoid
from .ssd_triton_scan import (
    UNSPECIALIZED,
    chunk_of,
    is_inside,
    load_rows,
    not_hoisted,
    products,
    softplus,
    tile_mask,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gate_backward_kernel(
    dout, z, ungated, dy, dz, so_b, so_l, so_h, so_p, sz_b, sz_l, sz_h, sz_p, l, heads, p, count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y = u silu(z): dy for the scan below the gate, and dz."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    i = at % p
    head = at // p % heads
    token = at // p // heads % l
    row = at // p // heads // l
    grad = tl.load(
        dout + row * so_b + token * so_l + head * so_h + i * so_p, mask=inside, other=0.0
    ).to(tl.float32)
    gate = tl.load(
        z + row * sz_b + token * sz_l + head * sz_h + i * sz_p, mask=inside, other=0.0
    ).to(tl.float32)
    u = tl.load(ungated + at, mask=inside, other=0.0).to(tl.float32)
    opened = sigmoid(gate)
    tl.store(dy + at, (grad * gate * opened).to(dy.dtype.element_ty), mask=inside)
    slope = opened * (1.0 + gate * (1.0 - opened))
    tl.store(dz + at, (grad * u * slope).to(dz.dtype.element_ty), mask=inside)


@triton.jit
def _stored(
    states, ws, fade_off, carried_off, line, slots, slot, segments, segment_slots, at, mask, size,
    SEGMENTED: tl.constexpr,
):  # fmt: skip
    """A stored S or R, with what its segment was entered by."""
    value = tl.load(states + (line * slots + slot) * size + at, mask=mask, other=0.0)
    if SEGMENTED:
        fade = tl.load(ws + fade_off + line * slots + slot)
        source = states + carried_off + (line * segments + slot // segment_slots) * size
        carried = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) + fade * carried).to(value.dtype)
    return value


@triton.jit
def _input_gradient(
    B_at, B_sl, B_sn, C_at, C_sl, C_sn, D, dy_row, dy_sl, dy_sh, dy_sp, dx, cu_ptr, ws, states,
    cum_off, dtp_off, fade_off, carried_off, l, nseq, slots, rows, row, dx_row, base, tile, heads,
    first_head, head_count, segments, segment_slots, reverse, skips, dx_sl, p, n,
    SCANS: tl.constexpr, DIRECTIONS: tl.constexpr, HAS_D: tl.constexpr, D_MATRIX: tl.constexpr,
    PACKED: tl.constexpr, SEGMENTED: tl.constexpr, FULL: tl.constexpr, P_TILES: tl.constexpr,
    N_TILES: tl.constexpr, CHUNK: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr,
    NB: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx of one tile: the forward kernel with dy for x, R for S, B and C exchanged, time turned."""
    TILES: tl.constexpr = CHUNK // Q
    slot = tile // TILES
    half = tile % TILES
    # The direction in which the other tile comes after this one, and whether that is scanned.
    after = base.to(tl.int32)
    has_other = half == reverse
    if DIRECTIONS == 2:
        after = half
        has_other = half >= 0
    r = tl.arange(0, Q)
    r_own = half * Q + r
    r_other = (1 - half) * Q + r
    chunk, start, end = chunk_of(cu_ptr, slot, l, nseq, PACKED, CHUNK)
    valid = is_inside(chunk, r_own, start, end, PACKED)
    other_valid = is_inside(chunk, r_other, start, end, PACKED)
    base_token = chunk.to(tl.int64)
    B_at += base_token * B_sl
    C_at += base_token * C_sl
    dy_row += base_token * dy_sl
    n_offs = tl.arange(0, NB)
    b = load_rows(B_at, r_own, B_sl, valid, n_offs, B_sn, n_offs < n, FULL)
    bc = products(B_at, B_sl, B_sn, r_own, valid, C_at, C_sl, C_sn, r_own, valid, n,
                  FULL, N_TILES, Q, NB, DOT).to(b.dtype)  # fmt: skip
    bc_far = bc
    if TILES == 2:
        bc_far = products(B_at, B_sl, B_sn, r_own, valid, C_at, C_sl, C_sn, r_other,
                          other_valid & has_other, n, FULL, N_TILES, Q, NB, DOT)  # fmt: skip
        bc_far = bc_far.to(b.dtype)

    for item in tl.range(0, head_count * P_TILES, num_stages=STAGES):
        head = (first_head + item // P_TILES).to(tl.int64)
        p_offs = item % P_TILES * PB + tl.arange(0, PB)
        p_mask = p_offs < p
        dy_at = dy_row + head * dy_sh
        dyt = load_rows(dy_at, r_own, dy_sl, valid, p_offs, dy_sp, p_mask, FULL)
        acc = tl.zeros((Q, PB), dtype=tl.float32)
        if HAS_D:
            if D_MATRIX:
                d = tl.load(D + head * p + p_offs, mask=p_mask, other=0.0).to(tl.float32)
                acc = dyt.to(tl.float32) * (d * skips)[None, :]
            else:
                acc = dyt.to(tl.float32) * (tl.load(D + head).to(tl.float32) * skips)
        mix = tl.zeros((Q, Q), dtype=tl.float32)
        order = not_hoisted(r, item)
        for direction in tl.static_range(DIRECTIONS):
            backwards = reverse
            if DIRECTIONS == 2:
                backwards = direction
            line = ((base + direction) * rows + row) * heads + head
            at = (line * slots + slot) * CHUNK
            given = tl.zeros((Q, PB), dtype=tl.float32)
            for n_tile in tl.static_range(N_TILES):
                offs = n_tile * NB + tl.arange(0, NB)
                leaving = _stored(
                    states, ws, fade_off, carried_off, line + SCANS * rows * heads, slots, slot,
                    segments, segment_slots, p_offs[None, :] * n + offs[:, None],
                    p_mask[None, :] & (offs < n)[:, None], p * n, SEGMENTED,
                )  # fmt: skip
                bt = b
                if N_TILES > 1:
                    bt = load_rows(B_at, r_own, B_sl, valid, offs, B_sn, offs < n, FULL)
                given = tl.dot(bt, leaving, given, input_precision=DOT)
            cum = tl.load(ws + cum_off + at + r_own)
            dt = tl.load(ws + dtp_off + at + r_own)
            cum_end = tl.load(ws + cum_off + at + (1 - backwards) * (CHUNK - 1))
            acc += given * (tl.exp2(cum_end - cum) * dt)[:, None]
            seen = (order[None, :] - order[:, None]) * (1 - 2 * backwards) >= 0
            mix += tl.where(seen, tl.exp2(cum[None, :] - cum[:, None]) * dt[:, None], 0.0)
        acc = tl.dot((bc.to(tl.float32) * mix).to(dyt.dtype), dyt, acc, input_precision=DOT)
        if TILES == 2:
            if has_other:
                far_line = (after * rows + row) * heads + head
                far_at = (far_line * slots + slot) * CHUNK
                cum_own = tl.load(ws + cum_off + far_at + r_own)
                dt_own = tl.load(ws + dtp_off + far_at + r_own)
                cum_far = tl.load(ws + cum_off + far_at + r_other)
                dy_far = load_rows(dy_at, r_other, dy_sl, other_valid, p_offs, dy_sp, p_mask, FULL)
                far = tl.exp2(cum_far[None, :] - cum_own[:, None]) * dt_own[:, None]
                far *= bc_far.to(tl.float32)
                acc = tl.dot(far.to(dy_far.dtype), dy_far, acc, input_precision=DOT)
        out = dx + (dx_row * l + base_token) * dx_sl + head * p
        at = r_own[:, None] * dx_sl + p_offs[None, :]
        tl.store(out + at, acc.to(dx.dtype.element_ty), mask=tile_mask(valid, p_mask, FULL))


@triton.jit
def _mixing_gradient(
    x_row, x_sl, x_sh, x_sp, B_at, B_sl, B_sn, C_at, C_sl, C_sn, dy_row, dy_sl, dy_sh, dy_sp,
    cu_ptr, ws, matrix, cum_off, dtp_off, row_off, far_off, column_off, column_far_off, dD_off,
    l, nseq, slots, rows, row, base, dD_row, dD_rows, slot, half, heads, first_head, head_count,
    tiles, reverse, after, skips, p, n,
    SCANS: tl.constexpr, DIRECTIONS: tl.constexpr, FAR: tl.constexpr, HAS_D: tl.constexpr,
    D_MATRIX: tl.constexpr, PACKED: tl.constexpr, FULL: tl.constexpr, P_TILES: tl.constexpr,
    N_TILES: tl.constexpr, CHUNK: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr,
    NB: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """M of a block: rows j of tile `half`, columns t of the same tile or (FAR) of the other.

    And the block's row and column sums for dcum, and dD.
    """
    r = tl.arange(0, Q)
    r_own = half * Q + r
    r_t = r_own
    if FAR:
        r_t = (1 - half) * Q + r
    chunk, start, end = chunk_of(cu_ptr, slot, l, nseq, PACKED, CHUNK)
    valid = is_inside(chunk, r_own, start, end, PACKED)
    valid_t = is_inside(chunk, r_t, start, end, PACKED)
    base_token = chunk.to(tl.int64)
    x_row += base_token * x_sl
    dy_row += base_token * dy_sl
    bc = products(B_at + base_token * B_sl, B_sl, B_sn, r_own, valid, C_at + base_token * C_sl,
                  C_sl, C_sn, r_t, valid_t, n, FULL, N_TILES, Q, NB, DOT)  # fmt: skip
    total = tl.zeros((Q, Q), dtype=tl.float32)
    # Sums over headdim, which start anew with each head.
    row_0 = tl.zeros((Q,), dtype=tl.float32)
    row_1 = tl.zeros((Q,), dtype=tl.float32)
    column_0 = tl.zeros((Q,), dtype=tl.float32)
    column_1 = tl.zeros((Q,), dtype=tl.float32)
    dD_sum = 0.0
    for item in tl.range(0, head_count * P_TILES, num_stages=STAGES):
        head = (first_head + item // P_TILES).to(tl.int64)
        p_tile = item % P_TILES
        p_offs = p_tile * PB + tl.arange(0, PB)
        p_mask = p_offs < p
        keep = tl.where(p_tile == 0, 0.0, 1.0)
        xt = load_rows(x_row + head * x_sh, r_own, x_sl, valid, p_offs, x_sp, p_mask, FULL)
        dyt = load_rows(dy_row + head * dy_sh, r_t, dy_sl, valid_t, p_offs, dy_sp, p_mask, FULL)
        g = tl.dot(xt, tl.trans(dyt), input_precision=DOT)
        if FAR:
            line = (after * rows + row) * heads + head
            at = (line * slots + slot) * CHUNK
            cum = tl.load(ws + cum_off + at + r_own)
            cum_t = tl.load(ws + cum_off + at + r_t)
            dt = tl.load(ws + dtp_off + at + r_own)
            weighted = g * tl.exp2(cum_t[None, :] - cum[:, None])
            e = weighted * bc
            row_0 = row_0 * keep + tl.sum(e * dt[:, None], 0)
            column_0 = column_0 * keep + tl.sum(e, 1)
            tl.store(ws + far_off + at + r_t, row_0)
            tl.store(ws + column_far_off + at + r_own, column_0)
            total += weighted * dt[:, None]
        else:
            if HAS_D:
                of_D = xt.to(tl.float32) * dyt.to(tl.float32) * skips
                partials = dD_rows * tiles
                partial = dD_row * tiles + slot * (CHUNK // Q) + half
                if D_MATRIX:
                    tl.store(
                        ws + dD_off + (head * p + p_offs) * partials + partial, tl.sum(of_D, 0),
                        mask=p_mask,
                    )  # fmt: skip
                else:
                    dD_sum = dD_sum * keep + tl.sum(tl.sum(of_D, 1))
                    tl.store(ws + dD_off + head * partials + partial, dD_sum)
            order = not_hoisted(r, item)
            for direction in tl.static_range(DIRECTIONS):
                backwards = reverse
                if DIRECTIONS == 2:
                    backwards = direction
                line = ((base + direction) * rows + row) * heads + head
                at = (line * slots + slot) * CHUNK
                cum = tl.load(ws + cum_off + at + r_own)
                dt = tl.load(ws + dtp_off + at + r_own)
                seen = (order[None, :] - order[:, None]) * (1 - 2 * backwards) >= 0
                weighted = g * tl.where(seen, tl.exp2(cum[None, :] - cum[:, None]), 0.0)
                e = weighted * bc
                row_sum = tl.sum(e * dt[:, None], 0)
                column_sum = tl.sum(e, 1)
                total += weighted * dt[:, None]
                if direction == 0:
                    row_0 = row_0 * keep + row_sum
                    column_0 = column_0 * keep + column_sum
                    tl.store(ws + row_off + at + r_own, row_0)
                    tl.store(ws + column_off + at + r_own, column_0)
                else:
                    row_1 = row_1 * keep + row_sum
                    column_1 = column_1 * keep + column_sum
                    tl.store(ws + row_off + at + r_own, row_1)
                    tl.store(ws + column_off + at + r_own, column_1)
    tl.store(matrix + r_own[:, None] * CHUNK + r_t[None, :], total.to(matrix.dtype.element_ty))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def chunk_backward_kernel(
    x, B, C, D, dy, dx, cu_ptr, ws, states,
    x_sd, x_sb, x_sl, x_sh, x_sp, B_sd, B_sb, B_sl, B_sg, B_sn,
    C_sd, C_sb, C_sl, C_sg, C_sn, dy_sb, dy_sl, dy_sh, dy_sp,
    cum_off, dtp_off, fade_off, carried_off, row_off, far_off, column_off, column_far_off, dD_off,
    mix_off, l, nseq, slots, first_row, rows, batch, heads, heads_per_group, heads_per_program,
    splits, tiles, segments, segment_slots, reverse, dx_sl, p, n,
    SCANS: tl.constexpr, DIRECTIONS: tl.constexpr, X_SHARED: tl.constexpr, HAS_D: tl.constexpr,
    D_MATRIX: tl.constexpr, PACKED: tl.constexpr, SEGMENTED: tl.constexpr, FULL: tl.constexpr,
    P_TILES: tl.constexpr, N_TILES: tl.constexpr, CHUNK: tl.constexpr, Q: tl.constexpr,
    PB: tl.constexpr, NB: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Per chunk TILES programs for dx and BLOCKS for M and the sums of dcum, in one launch.

    SCANS directions exist; a program serves all of them (DIRECTIONS == SCANS) or one.
    """
    TILES: tl.constexpr = CHUNK // Q
    pid = tl.program_id(0)
    split = pid % splits
    pid = pid // splits
    groups = heads // heads_per_group
    group = (pid % groups).to(tl.int64)
    pid = pid // groups
    job = pid % (TILES + BLOCKS)
    pid = pid // (TILES + BLOCKS)
    slot = pid % slots
    pid = pid // slots
    row = (pid % rows).to(tl.int64)
    base = (pid // rows).to(tl.int64)  # the direction, where a program serves one of two
    skips = 1.0
    if SCANS > DIRECTIONS:
        reverse = base.to(tl.int32)
        if X_SHARED:
            skips = tl.where(base == 0, 1.0, 0.0)  # D x counts once
    first_head = group.to(tl.int32) * heads_per_group + split * heads_per_program
    head_count = tl.minimum(heads_per_program, heads_per_group - split * heads_per_program)
    whole_row = first_row + row  # of the batch, of which these launches see a part
    target_row = base * batch + whole_row
    target_rows = (SCANS // DIRECTIONS) * batch
    x_row = x + base * x_sd + whole_row * x_sb
    dy_row = dy + whole_row * dy_sb
    B_at = B + base * B_sd + whole_row * B_sb + group * B_sg
    C_at = C + base * C_sd + whole_row * C_sb + group * C_sg
    matrix = ((base * rows + row) * groups + group) * splits + split
    matrix = states + mix_off + (matrix * slots + slot) * CHUNK * CHUNK
    block = job - TILES
    if job < TILES:
        _input_gradient(
            B_at, B_sl, B_sn, C_at, C_sl, C_sn, D, dy_row, dy_sl, dy_sh, dy_sp, dx, cu_ptr, ws,
            states, cum_off, dtp_off, fade_off, carried_off, l, nseq, slots, rows, row, target_row,
            base, slot * TILES + job, heads, first_head, head_count, segments, segment_slots,
            reverse, skips, dx_sl, p, n,
            SCANS, DIRECTIONS, HAS_D, D_MATRIX, PACKED, SEGMENTED, FULL, P_TILES, N_TILES, CHUNK, Q,
            PB, NB, DOT, STAGES,
        )  # fmt: skip
    elif block < TILES:
        _mixing_gradient(
            x_row, x_sl, x_sh, x_sp, B_at, B_sl, B_sn, C_at, C_sl, C_sn, dy_row, dy_sl, dy_sh,
            dy_sp, cu_ptr, ws, matrix, cum_off, dtp_off, row_off, far_off, column_off,
            column_far_off, dD_off, l, nseq, slots, rows, row, base, target_row, target_rows, slot,
            block, heads, first_head, head_count, tiles, reverse, base.to(tl.int32), skips, p, n,
            SCANS, DIRECTIONS, False, HAS_D, D_MATRIX, PACKED, FULL, P_TILES, N_TILES, CHUNK, Q, PB,
            NB, DOT, STAGES,
        )  # fmt: skip
    else:
        half = reverse  # the tile that another follows in scan order
        after = base.to(tl.int32)
        if DIRECTIONS == 2:
            half = block - TILES
            after = half
        _mixing_gradient(
            x_row, x_sl, x_sh, x_sp, B_at, B_sl, B_sn, C_at, C_sl, C_sn, dy_row, dy_sl, dy_sh,
            dy_sp, cu_ptr, ws, matrix, cum_off, dtp_off, row_off, far_off, column_off,
            column_far_off, dD_off, l, nseq, slots, rows, row, base, target_row, target_rows, slot,
            half, heads, first_head, head_count, tiles, reverse, after, skips, p, n,
            SCANS, DIRECTIONS, True, HAS_D, D_MATRIX, PACKED, FULL, P_TILES, N_TILES, CHUNK, Q, PB,
            NB, DOT, STAGES,
        )  # fmt: skip


@triton.jit
def _shared_side(
    V, v_sl, v_sp, v_sh, U, u_sl, u_sn, O, o_sl, o_sn, matrix, matrix_row, matrix_column, target,
    cum_at, dtp_at, vector, overlap, states, ws, fade_off, carried_off, line, valid, slot,
    slots, rows, heads, target_sl, first_head, head_count, mix_splits, segments, segment_slots,
    backwards_of_one, own, p, n,
    SCANS: tl.constexpr, DIRECTIONS: tl.constexpr, OF_B: tl.constexpr, SEGMENTED: tl.constexpr,
    FULL: tl.constexpr, P_TILES: tl.constexpr, CHUNK: tl.constexpr, Q: tl.constexpr,
    PB: tl.constexpr, NB: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dB (V = x, U = B, O = C) or dC (V = dy, U = C, O = B) of one chunk and block of dstate."""
    r = tl.arange(0, CHUNK)
    n_offs = own * NB + tl.arange(0, NB)
    n_mask = n_offs < n
    u = load_rows(U, r, u_sl, valid, n_offs, u_sn, n_mask, FULL)
    acc = tl.zeros((CHUNK, NB), dtype=tl.float32)
    sum_0 = tl.zeros((CHUNK,), dtype=tl.float32)
    sum_1 = tl.zeros((CHUNK,), dtype=tl.float32)
    met_0 = 0.0
    met_1 = 0.0
    for item in tl.range(0, head_count * P_TILES, num_stages=STAGES):
        head = (first_head + item // P_TILES).to(tl.int64)
        p_tile = item % P_TILES
        p_offs = p_tile * PB + tl.arange(0, PB)
        p_mask = p_offs < p
        keep = tl.where(p_tile == 0, 0.0, 1.0)
        v = load_rows(V + head * v_sh, r, v_sl, valid, p_offs, v_sp, p_mask, FULL)
        for direction in tl.static_range(DIRECTIONS):
            backwards = backwards_of_one
            if DIRECTIONS == 2:
                backwards = direction
            this = line + direction * rows * heads + head
            gradient = this + SCANS * rows * heads
            at = p_offs[:, None] * n + n_offs[None, :]
            mask = p_mask[:, None] & n_mask[None, :]
            w = _stored(
                states, ws, fade_off, carried_off, gradient if OF_B else this, slots, slot,
                segments, segment_slots, at, mask, p * n, SEGMENTED,
            )  # fmt: skip
            cum = tl.load(cum_at + (this * slots + slot) * CHUNK + r)
            part = tl.dot(v, w, input_precision=DOT)
            if OF_B:
                cum_end = tl.load(
                    cum_at + (this * slots + slot) * CHUNK + (1 - backwards) * (CHUNK - 1)
                )
                part *= tl.exp2(cum_end - cum)[:, None]
                dt = tl.load(dtp_at + (this * slots + slot) * CHUNK + r)
                acc += part * dt[:, None]
                s = _stored(
                    states, ws, fade_off, carried_off, this, slots, slot, segments, segment_slots,
                    at, mask, p * n, SEGMENTED,
                )  # fmt: skip
                met = tl.sum(tl.sum(s.to(tl.float32) * w.to(tl.float32), 1)) * tl.exp2(cum_end)
                if direction == 0:
                    met_0 = met_0 * keep + met
                    met = met_0
                else:
                    met_1 = met_1 * keep + met
                    met = met_1
                tl.store(overlap + this * slots + slot, met)
            else:
                part *= tl.exp2(cum)[:, None]
                acc += part
            sums = tl.sum(part * u.to(tl.float32), 1)
            if direction == 0:
                sum_0 = sum_0 * keep + sums
                sums = sum_0
            else:
                sum_1 = sum_1 * keep + sums
                sums = sum_1
            tl.store(vector + (this * slots + slot) * CHUNK + r, sums)

    o = load_rows(O, r, o_sl, valid, n_offs, o_sn, n_mask, FULL)
    m_at = r[:, None] * matrix_row + r[None, :] * matrix_column
    # The tile that no other follows has no block outside the diagonal, unless both directions do.
    later = (r[None, :] // Q - r[:, None] // Q) * (1 - 2 * backwards_of_one)
    if not OF_B:
        later = -later
    written = (later >= 0) | (DIRECTIONS == 2)
    for _ in tl.range(0, mix_splits, num_stages=1):
        m = tl.load(matrix + m_at, mask=written, other=0.0)
        matrix += slots.to(tl.int64) * CHUNK * CHUNK
        acc = tl.dot(m, o, acc, input_precision=DOT)
    tl.store(
        target + (r[:, None] * target_sl + n_offs[None, :]), acc.to(target.dtype.element_ty),
        mask=tile_mask(valid, n_mask, FULL),
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def shared_backward_kernel(
    x, B, C, dy, dB, dC, cu_ptr, ws, states,
    x_sd, x_sb, x_sl, x_sh, x_sp, B_sd, B_sb, B_sl, B_sg, B_sn,
    C_sd, C_sb, C_sl, C_sg, C_sn, dy_sb, dy_sl, dy_sh, dy_sp,
    cum_off, dtp_off, fade_off, carried_off, into_off, out_off, overlap_off, mix_off,
    dB_off, dC_off,
    l, nseq, slots, first_row, rows, batch, heads, heads_per_group, heads_per_program, splits,
    mix_splits, segments, segment_slots, reverse, target_sl, p, n,
    SCANS: tl.constexpr, DIRECTIONS: tl.constexpr, PACKED: tl.constexpr,
    SEGMENTED: tl.constexpr, FULL: tl.constexpr, P_TILES: tl.constexpr, N_TILES: tl.constexpr,
    CHUNK: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dB and dC, which heads share; and Σ_n of their state terms with B and C, for the steps.

    With splits > 1 the targets are float32 partial sums, one per split.
    """
    pid = tl.program_id(0)
    split = pid % splits
    pid = pid // splits
    own = pid % N_TILES
    pid = pid // N_TILES
    groups = heads // heads_per_group
    group = (pid % groups).to(tl.int64)
    pid = pid // groups
    slot = pid % slots
    pid = pid // slots
    row = (pid % rows).to(tl.int64)
    pid = pid // rows
    base = (pid % (SCANS // DIRECTIONS)).to(tl.int64)
    kind = pid // (SCANS // DIRECTIONS)
    if SCANS > DIRECTIONS:
        reverse = base.to(tl.int32)
    first_head = group.to(tl.int32) * heads_per_group + split * heads_per_program
    head_count = tl.minimum(heads_per_program, heads_per_group - split * heads_per_program)
    chunk, start, end = chunk_of(cu_ptr, slot, l, nseq, PACKED, CHUNK)
    valid = is_inside(chunk, tl.arange(0, CHUNK), start, end, PACKED)
    token = chunk.to(tl.int64)
    whole_row = first_row + row  # of the batch, of which these launches see a part
    B_at = B + base * B_sd + whole_row * B_sb + group * B_sg + token * B_sl
    C_at = C + base * C_sd + whole_row * C_sb + group * C_sg + token * C_sl
    line = (base * rows + row) * heads
    vectors = SCANS * rows.to(tl.int64) * heads * slots
    # The quadratic part belongs to the first split alone.
    mixes = tl.where(split == 0, mix_splits, 0)
    matrix = (base * rows + row) * groups + group
    matrix = states + mix_off + (matrix * mix_splits * slots + slot) * CHUNK * CHUNK
    target_row = (split * (SCANS // DIRECTIONS) + base) * batch + whole_row
    shift = (target_row * l + token) * target_sl + group * n
    if kind == 0:
        _shared_side(
            x + base * x_sd + whole_row * x_sb + token * x_sl, x_sl, x_sp, x_sh, B_at, B_sl, B_sn,
            C_at, C_sl, C_sn, matrix, CHUNK, 1, dB + dB_off + shift, ws + cum_off, ws + dtp_off,
            ws + out_off + own * vectors * CHUNK, ws + overlap_off + own * vectors,
            states, ws, fade_off, carried_off, line, valid, slot, slots, rows, heads,
            target_sl, first_head, head_count, mixes, segments, segment_slots, reverse, own, p, n,
            SCANS, DIRECTIONS, True, SEGMENTED, FULL, P_TILES, CHUNK, Q, PB, NB, DOT, STAGES,
        )  # fmt: skip
    else:
        _shared_side(
            dy + whole_row * dy_sb + token * dy_sl, dy_sl, dy_sp, dy_sh, C_at, C_sl, C_sn, B_at,
            B_sl, B_sn, matrix, 1, CHUNK, dC + dC_off + shift, ws + cum_off, ws + dtp_off,
            ws + into_off + own * vectors * CHUNK, ws + overlap_off,
            states, ws, fade_off, carried_off, line, valid, slot, slots, rows, heads,
            target_sl, first_head, head_count, mixes, segments, segment_slots, reverse, own, p, n,
            SCANS, DIRECTIONS, False, SEGMENTED, FULL, P_TILES, CHUNK, Q, PB, NB, DOT, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def step_backward_kernel(
    dt, A, dt_bias, ddt, cu_ptr, ws, dt_sd, dt_sb, dt_sl, dt_sh,
    dtp_off, row_off, far_off, column_off, column_far_off, into_off, out_off,
    overlap_off, dA_off, dbias_off,
    low, high, l, nseq, slots, first_row, rows, batch, heads, reverse, ddt_sd, ddt_sl,
    DIRECTIONS: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr, N_TILES: tl.constexpr, CHUNK: tl.constexpr, Q: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """ddt of one head and SLOTS chunks, and their part of the sums for dA and d(dt_bias)."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(slots, SLOTS)
    block = pid % blocks
    pid = pid // blocks
    line = pid.to(tl.int64)  # direction, row, head
    head = line % heads
    row = line // heads % rows
    direction = line // heads // rows
    if DIRECTIONS == 2:
        reverse = direction.to(tl.int32)
    r = tl.arange(0, CHUNK)
    slot = block * SLOTS + tl.arange(0, SLOTS)
    if PACKED:
        chunk, start, end = chunk_of(cu_ptr, block, l, nseq, PACKED, CHUNK)
        inside = is_inside(chunk, r, start, end, PACKED)[None, :]
        token = (chunk + r).to(tl.int64)[None, :]
    else:
        token = (slot[:, None] * CHUNK + r[None, :]).to(tl.int64)
        inside = token < l
    known = slot < slots
    valid = inside & known[:, None]
    at = (line * slots + slot)[:, None] * CHUNK + r[None, :]
    mask = known[:, None] & (r >= 0)[None, :]
    vectors = DIRECTIONS * rows.to(tl.int64) * heads * slots

    dtp = tl.load(ws + dtp_off + at, mask=mask, other=0.0)
    column = tl.load(ws + column_off + at, mask=mask, other=0.0)
    dcum = tl.load(ws + row_off + at, mask=mask, other=0.0)
    if CHUNK > Q:
        later = (r >= Q) != (reverse != 0)  # the tile that another precedes in scan order
        dcum += tl.load(ws + far_off + at, mask=mask & later[None, :], other=0.0)
        earlier = mask & (later == 0)[None, :]
        column += tl.load(ws + column_far_off + at, mask=earlier, other=0.0)
    leaving = tl.zeros((SLOTS,), dtype=tl.float32)
    for tile in tl.static_range(N_TILES):
        dcum += tl.load(ws + into_off + tile * vectors * CHUNK + at, mask=mask, other=0.0)
        out = tl.load(ws + out_off + tile * vectors * CHUNK + at, mask=mask, other=0.0)
        column += out
        overlap = ws + overlap_off + tile * vectors + line * slots + slot
        leaving += tl.sum(out * dtp, 1) + tl.load(overlap, mask=known, other=0.0)
    dcum -= dtp * column

    # The sum over the tokens not before this one in scan order.
    running = tl.cumsum(dcum, 1)
    whole = tl.sum(dcum, 1)[:, None]
    da = tl.where(reverse != 0, running, whole - running + dcum) + leaving[:, None]
    ddt_value = tl.load(A + direction * heads + head).to(tl.float32) * da + column
    row += first_row  # of the batch, of which this launch sees a part
    dt_at = dt + direction * dt_sd + row * dt_sb + head * dt_sh
    raw = tl.load(dt_at + token * dt_sl, mask=valid, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(dt_bias + direction * heads + head).to(tl.float32)
    active = raw
    if SOFTPLUS:
        active = softplus(raw)
        ddt_value *= sigmoid(raw)
    ddt_value = tl.where(valid & (active >= low) & (active <= high), ddt_value, 0.0)
    at = direction * ddt_sd + (row * l + token) * ddt_sl + head
    tl.store(ddt + at, ddt_value.to(ddt.dtype.element_ty), mask=valid)
    partial = ((direction * heads + head) * batch + row) * blocks + block
    tl.store(ws + dA_off + partial, tl.sum(tl.sum(da * dtp, 1)))
    if HAS_BIAS:
        tl.store(ws + dbias_off + partial, tl.sum(tl.sum(ddt_value, 1)))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def reduce_kernel(
    ws, dA, dbias, dD, dB, dC, dA_off, dbias_off, dD_off, dB_off, dC_off, heads, D_rows, partials,
    D_partials, splits, size, width, target_sl,
    SCANS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums added up in order: dA, d(dt_bias) and dD by row, then dB and dC by block."""
    pid = tl.program_id(0)
    lines = SCANS * heads
    sums = lines
    if HAS_BIAS:
        sums += lines
    if HAS_D:
        sums += D_rows
    offs = tl.arange(0, BLOCK)
    if pid < sums:
        count = partials
        source = ws + dA_off + pid.to(tl.int64) * partials
        index = pid
        section = 0
        if HAS_BIAS:
            if (pid >= lines) & (pid < 2 * lines):
                section = 1
                index = pid - lines
                source = ws + dbias_off + index.to(tl.int64) * partials
        if HAS_D:
            if pid >= sums - D_rows:
                section = 2
                index = pid - (sums - D_rows)
                count = D_partials
                source = ws + dD_off + index.to(tl.int64) * D_partials
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, count, BLOCK):
            total += tl.load(source + start + offs, mask=start + offs < count, other=0.0)
        result = tl.sum(total, 0)
        if section == 0:
            tl.store(dA + index, result.to(dA.dtype.element_ty))
        elif section == 1:
            tl.store(dbias + index, result.to(dbias.dtype.element_ty))
        else:
            tl.store(dD + index, result.to(dD.dtype.element_ty))
    elif SPLIT:
        at = (pid - sums).to(tl.int64) * BLOCK + offs
        inside = at < size
        b_total = tl.zeros((BLOCK,), dtype=tl.float32)
        c_total = tl.zeros((BLOCK,), dtype=tl.float32)
        for split in range(0, splits):
            b_total += tl.load(ws + dB_off + split * size + at, mask=inside, other=0.0)
            c_total += tl.load(ws + dC_off + split * size + at, mask=inside, other=0.0)
        at = at // width * target_sl + at % width
        tl.store(dB + at, b_total.to(dB.dtype.element_ty), mask=inside)
        tl.store(dC + at, c_total.to(dC.dtype.element_ty), mask=inside)
