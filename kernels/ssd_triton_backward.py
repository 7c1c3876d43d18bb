"""Triton kernels for the gradients of the SSD, once S and R of every chunk are known.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · tile q

S and R are stored per chunk of `CHUNK` tokens (see ssd_triton_scan); a program owns a tile of
q = CHUNK or CHUNK / 2 tokens and the heads of a group. In the second case the tile's own S or R is
what the stored one becomes over the chunk's other tile: one more product instead of twice the
memory. With t the row of y, j of x, G = x dyᵀ, L = exp(cum_t - cum_j) where t is not before j in
scan order, and everything held transposed, as (j, t), so that no accumulator is ever transposed to
become an operand:

    dx_j = Σ_t (B_j·C_t) L dt_j dy_t + decay_out_j dt_j R B_j + D dy_j
    dB_j = Σ_heads Σ_t G L dt_j C_t + decay_out_j dt_j Rᵀ x_j
    dC_t = Σ_heads Σ_j G L dt_j B_j + decay_in_t Sᵀ dy_t
    dcum = (row sums - column sums of G ∘ L ∘ B Cᵀ dt) + the same of the two state terms

The row and column sums come from the same registers, so that what cancels between them cancels
exactly. Sums over chunks are written per tile and added up in a fixed order: no atomics.
"""

import triton
import triton.language as tl

from .ssd_triton_forward import load_tile, products, tokens_of
from .ssd_triton_scan import LOG2E, UNSPECIALIZED, softplus


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
    sigmoid = tl.sigmoid(gate)
    tl.store(dy + at, (grad * gate * sigmoid).to(dy.dtype.element_ty), mask=inside)
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dz + at, (grad * u * slope).to(dz.dtype.element_ty), mask=inside)


@triton.jit
def _stored(
    states, ws, fade_off, carried_off, line, slots, slot, segments, segment_slots, at, mask, size,
    SEGMENTED: tl.constexpr,
):  # fmt: skip
    """A stored S or R (float32), with what its segment was entered by."""
    value = tl.load(states + (line * slots + slot) * size + at, mask=mask, other=0.0)
    value = value.to(tl.float32)
    if SEGMENTED:
        fade = tl.load(ws + fade_off + line * slots + slot)
        source = states + carried_off + (line * segments + slot // segment_slots) * size
        value += fade * tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=UNSPECIALIZED)
def chunk_backward_kernel(
    x, B, C, dt, A, dt_bias, D, dy, dx, dB, dC, ddt, cu_ptr, ws, states,
    x_sd, x_sb, x_sl, x_sh, x_sp, B_sd, B_sb, B_sl, B_sg, B_sn,
    C_sd, C_sb, C_sl, C_sg, C_sn, dy_sb, dy_sl, dy_sh, dy_sp, dt_sd, dt_sb, dt_sl, dt_sh,
    cum_off, dtp_off, fade_off, carried_off, dA_off, dbias_off, dD_off, dBC_off,
    low, high, l, nseq, slots, rows, heads, heads_per_group, heads_per_program, splits, tiles,
    segments, segment_slots, reverse, p, n,
    SCANS: tl.constexpr, DIRECTIONS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr,
    D_MATRIX: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr,
    SEGMENTED: tl.constexpr, SPLIT: tl.constexpr, P_TILES: tl.constexpr, N_TILES: tl.constexpr,
    CHUNK: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """SCANS directions exist; a program serves all of them (DIRECTIONS == SCANS) or one."""
    TILES: tl.constexpr = CHUNK // Q
    pid = tl.program_id(0)
    split = pid % splits
    pid = pid // splits
    own = pid % N_TILES
    pid = pid // N_TILES
    groups = heads // heads_per_group
    group = (pid % groups).to(tl.int64)
    pid = pid // groups
    tile = pid % tiles
    pid = pid // tiles
    row = (pid % rows).to(tl.int64)
    base = (pid // rows).to(tl.int64)  # the direction, where a program serves one of two
    if SCANS > DIRECTIONS:
        reverse = base.to(tl.int32)
    slot = tile // TILES
    half = tile % TILES
    first_head = group.to(tl.int32) * heads_per_group + split * heads_per_program
    head_count = tl.minimum(heads_per_program, heads_per_group - split * heads_per_program)

    r = tl.arange(0, Q)
    r_slot = half * Q + r
    token, valid = tokens_of(cu_ptr, slot, r_slot, l, nseq, PACKED, CHUNK)
    r_other = (1 - half) * Q + r
    other, other_valid = token, valid
    if TILES == 2:
        other, other_valid = tokens_of(cu_ptr, slot, r_other, l, nseq, PACKED, CHUNK)
    B_at = B + base * B_sd + row * B_sb + group * B_sg
    C_at = C + base * C_sd + row * C_sb + group * C_sg
    bc = products(B_at, B_sl, B_sn, C_at, C_sl, C_sn, token, valid, n, N_TILES, Q, NB, DOT)
    own_offs = own * NB + tl.arange(0, NB)
    b_own = load_tile(B_at, token, B_sl, valid, own_offs, B_sn, own_offs < n)
    c_own = load_tile(C_at, token, C_sl, valid, own_offs, C_sn, own_offs < n)
    dbc = tl.zeros((Q, Q), dtype=tl.float32)
    db = tl.zeros((Q, NB), dtype=tl.float32)
    dc = tl.zeros((NB, Q), dtype=tl.float32)
    ddt_0 = tl.zeros((Q,), dtype=tl.float32)
    ddt_1 = tl.zeros((Q,), dtype=tl.float32)
    dA_0 = 0.0
    dA_1 = 0.0
    dD_sum = 0.0
    partials = rows * tiles  # partial sums per head
    partial = row * tiles + tile

    for item in tl.range(0, head_count * P_TILES, num_stages=STAGES):
        head = (first_head + item // P_TILES).to(tl.int64)
        p_tile = item % P_TILES
        keep = tl.where(p_tile == 0, 0.0, 1.0)  # sums over headdim start anew with each head
        p_offs = p_tile * PB + tl.arange(0, PB)
        p_mask = p_offs < p
        x_at = x + base * x_sd + row * x_sb + head * x_sh
        dy_at = dy + row * dy_sb + head * dy_sh
        xt = load_tile(x_at, token, x_sl, valid, p_offs, x_sp, p_mask)
        dyt = load_tile(dy_at, token, dy_sl, valid, p_offs, dy_sp, p_mask)
        g = tl.dot(xt, tl.trans(dyt), input_precision=DOT)
        gbc = g * bc
        mix = tl.zeros((Q, Q), dtype=tl.float32)
        dx_t = tl.zeros((PB, Q), dtype=tl.float32)

        for direction in tl.static_range(DIRECTIONS):
            backwards = reverse
            if DIRECTIONS == 2:
                backwards = direction
            line = ((base + direction) * rows + row) * heads + head
            gradient_line = line + SCANS * rows * heads
            cum_at = ws + cum_off + (line * slots + slot) * CHUNK
            dtp_at = ws + dtp_off + (line * slots + slot) * CHUNK
            cum = tl.load(cum_at + r_slot)
            dtp = tl.load(dtp_at + r_slot)
            is_first = half == backwards  # of two tiles, the first in scan order
            cum_out = tl.load(cum_at + half * Q + (1 - backwards) * (Q - 1))
            cum_in = 0.0
            if TILES == 2:
                edge = half * Q - 1 + backwards * (Q + 1)
                cum_in = tl.load(cum_at + edge, mask=is_first == 0, other=0.0)
            seen = (r[None, :] - r[:, None]) * (1 - 2 * backwards) >= 0
            decay = tl.where(seen, tl.exp2(cum[None, :] - cum[:, None]), 0.0)
            e = gbc * decay
            column = tl.sum(e, 1)
            inner = tl.sum(e * dtp[:, None], 0)
            mix += decay * dtp[:, None]

            decay_in = tl.exp2(cum - cum_in)
            decay_out = tl.exp2(cum_out - cum)
            whole = tl.exp2(cum_out - cum_in)
            s_dot_r = 0.0
            for n_tile in tl.static_range(N_TILES):
                n_offs = n_tile * NB + tl.arange(0, NB)
                n_mask = n_offs < n
                bt = b_own
                ct = c_own
                if N_TILES > 1:
                    bt = load_tile(B_at, token, B_sl, valid, n_offs, B_sn, n_mask)
                    ct = load_tile(C_at, token, C_sl, valid, n_offs, C_sn, n_mask)
                s = _stored(
                    states, ws, fade_off, carried_off, line, slots, slot, segments, segment_slots,
                    n_offs[:, None] + p_offs[None, :] * n, n_mask[:, None] & p_mask[None, :],
                    p * n, SEGMENTED,
                )  # fmt: skip
                rr = _stored(
                    states, ws, fade_off, carried_off, gradient_line, slots, slot, segments,
                    segment_slots, p_offs[:, None] * n + n_offs[None, :],
                    p_mask[:, None] & n_mask[None, :], p * n, SEGMENTED,
                )  # fmt: skip
                if TILES == 2:
                    cum_other = tl.load(cum_at + r_other)
                    if is_first:
                        # R of the chunk's end, brought back over the other tile.
                        cum_end = tl.load(cum_at + (1 - backwards) * (CHUNK - 1))
                        dyo = load_tile(dy_at, other, dy_sl, other_valid, p_offs, dy_sp, p_mask).to(
                            tl.float32
                        )
                        weighted = (dyo * tl.exp2(cum_other - cum_out)[:, None]).to(xt.dtype)
                        co = load_tile(C_at, other, C_sl, other_valid, n_offs, C_sn, n_mask)
                        rr = tl.dot(
                            tl.trans(weighted), co, rr * tl.exp2(cum_end - cum_out),
                            input_precision=DOT,
                        )  # fmt: skip
                    else:
                        # S of the chunk's start, brought forward over the other tile.
                        dto = tl.load(dtp_at + r_other) * tl.exp2(cum_in - cum_other)
                        xo = load_tile(x_at, other, x_sl, other_valid, p_offs, x_sp, p_mask).to(
                            tl.float32
                        )
                        weighted = (xo * dto[:, None]).to(xt.dtype)
                        bo = load_tile(B_at, other, B_sl, other_valid, n_offs, B_sn, n_mask)
                        s = tl.dot(tl.trans(bo), weighted, s * tl.exp2(cum_in), input_precision=DOT)
                s = s.to(xt.dtype)
                rr = rr.to(xt.dtype)
                dc_part = tl.dot(s, tl.trans(dyt), input_precision=DOT) * decay_in[None, :]
                inner += tl.sum(dc_part * tl.trans(ct).to(tl.float32), 0)
                db_part = tl.dot(xt, rr, input_precision=DOT) * decay_out[:, None]
                left = tl.sum(db_part * bt.to(tl.float32), 1)
                column += left
                s_dot_r += tl.sum(left * dtp) + whole * tl.sum(
                    tl.sum(s.to(tl.float32) * tl.trans(rr).to(tl.float32), 1)
                )
                dx_t += tl.dot(rr, tl.trans(bt), input_precision=DOT) * (decay_out * dtp)[None, :]
                if N_TILES == 1:
                    dc += dc_part
                    db += db_part * dtp[:, None]
                else:
                    dc += tl.where(own == n_tile, dc_part, 0.0)
                    db += tl.where(own == n_tile, db_part * dtp[:, None], 0.0)

            # dcum per token, then the sum over the tokens not before it in scan order.
            dcum = inner - dtp * column
            running = tl.cumsum(dcum, 0)
            da = tl.where(backwards == 1, running, tl.sum(dcum, 0) - running + dcum) + s_dot_r
            a = tl.load(A + (base + direction) * heads + head).to(tl.float32)
            ddtp = a * da + column
            dt_at = dt + (base + direction) * dt_sd + row * dt_sb + head * dt_sh
            raw = tl.load(dt_at + token * dt_sl, mask=valid, other=0.0).to(tl.float32)
            if HAS_BIAS:
                raw += tl.load(dt_bias + (base + direction) * heads + head).to(tl.float32)
            active = raw
            if SOFTPLUS:
                active = softplus(raw)
                ddtp *= tl.sigmoid(raw)
            live = valid & (active >= low) & (active <= high)
            ddtp = tl.where(live, ddtp, 0.0)
            dA = tl.sum(da * dtp)
            if direction == 0:
                ddt_0 = ddt_0 * keep + ddtp
                dA_0 = dA_0 * keep + dA
                ddtp = ddt_0
                dA = dA_0
            else:
                ddt_1 = ddt_1 * keep + ddtp
                dA_1 = dA_1 * keep + dA
                ddtp = ddt_1
                dA = dA_1
            if own == 0:
                line_of_head = (base + direction) * heads + head
                at = (((base + direction) * rows + row) * l + token) * heads + head
                tl.store(ddt + at, ddtp.to(ddt.dtype.element_ty), mask=valid)
                tl.store(ws + dA_off + line_of_head * partials + partial, dA)
                if HAS_BIAS:
                    tl.store(ws + dbias_off + line_of_head * partials + partial, tl.sum(ddtp))

        dx_acc = tl.dot((bc * mix).to(xt.dtype), dyt, tl.trans(dx_t), input_precision=DOT)
        dbc += g * mix
        if HAS_D:
            of_D = xt.to(tl.float32) * dyt.to(tl.float32)
            if D_MATRIX:
                d = tl.load(D + head * p + p_offs, mask=p_mask, other=0.0).to(tl.float32)
                dx_acc += dyt.to(tl.float32) * d[None, :]
                if own == 0:
                    at = (head * p + p_offs) * (SCANS // DIRECTIONS) + base
                    tl.store(ws + dD_off + at * partials + partial, tl.sum(of_D, 0), mask=p_mask)
            else:
                dx_acc += dyt.to(tl.float32) * tl.load(D + head).to(tl.float32)
                dD_sum = dD_sum * keep + tl.sum(tl.sum(of_D, 1))
                if own == 0:
                    at = head * (SCANS // DIRECTIONS) + base
                    tl.store(ws + dD_off + at * partials + partial, dD_sum)
        if own == 0:
            at = (((base * rows + row) * l + token) * heads + head)[:, None] * p + p_offs[None, :]
            tl.store(dx + at, dx_acc.to(dx.dtype.element_ty), mask=valid[:, None] & p_mask[None, :])

    dbc = dbc.to(b_own.dtype)
    db = tl.dot(dbc, c_own, db, input_precision=DOT)
    dc = tl.dot(tl.trans(b_own), dbc, dc, input_precision=DOT)
    at = ((base * rows + row) * l + token) * groups + group
    b_at = at[:, None] * n + own_offs[None, :]
    c_at = at[None, :] * n + own_offs[:, None]
    b_mask = valid[:, None] & (own_offs < n)[None, :]
    c_mask = valid[None, :] & (own_offs < n)[:, None]
    if SPLIT:
        size = (SCANS // DIRECTIONS) * rows.to(tl.int64) * l * groups * n
        parts = ws + dBC_off + split * size
        tl.store(parts + b_at, db, mask=b_mask)
        tl.store(parts + splits * size + c_at, dc, mask=c_mask)
    else:
        tl.store(dB + b_at, db.to(dB.dtype.element_ty), mask=b_mask)
        tl.store(dC + c_at, dc.to(dC.dtype.element_ty), mask=c_mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def reduce_kernel(
    ws, dA, dbias, dD, dB, dC, dA_off, dbias_off, dD_off, dBC_off, heads, D_rows, partials,
    D_partials, splits, size,
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
            parts = ws + dBC_off + split * size
            b_total += tl.load(parts + at, mask=inside, other=0.0)
            c_total += tl.load(parts + splits * size + at, mask=inside, other=0.0)
        tl.store(dB + at, b_total.to(dB.dtype.element_ty), mask=inside)
        tl.store(dC + at, c_total.to(dC.dtype.element_ty), mask=inside)
