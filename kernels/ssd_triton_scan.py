"""Triton kernels that carry the state from chunk to chunk, forward and backward in time.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · chunk q

Two recurrences over chunks share one kernel:

    S, the state            S ← exp(Σa) S + Σ_t exp(a_{t+1} + … + a_q) dt_t x_t B_tᵀ   in scan order
    R, the gradient of it   R ← exp(Σa) R + Σ_t exp(a_1 + … + a_t) dy_t C_tᵀ           against it

with a = dt' A. What is stored per chunk is the value that enters it (S: the state before its first
token; R: the gradient of the state after its last). A row of tokens (one batch entry, or a whole
pack) is laid out in slots of one chunk each. A pack gives sequence s the slots from
cu_seqlens[s] // q + s on: enough for any alignment, known without a search, and bounded by
l // q + nseq, so nothing is read back to the host.

Where batch × heads cannot fill the GPU a row is cut into segments that are scanned at once from
zero; `carry_segments` then runs over the segments, and readers of a chunk's state add the carried
part times the decay since the segment began.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Arguments that change from call to call: no new compilation for each of their values.
UNSPECIALIZED = (
    "l", "nseq", "slots", "first_row", "rows", "batch", "segments", "segment_slots", "reverse",
    "low", "high", "dt_sd", "dt_sb", "dt_sl", "dt_sh", "tiles", "heads_per_program", "splits",
    "partials", "mix_splits", "ddt_sd", "ddt_sl", "width",
)  # fmt: skip


@triton.jit
def softplus(x):
    """max(x, 0) + log1p(exp(-|x|)); log1p by the series of 2 atanh(u / (2 + u)), |.| ≤ 1/3."""
    u = tl.exp(-tl.abs(x))
    w = u / (2.0 + u)
    w2 = w * w
    series = 1.0 / 13 + w2 * (1.0 / 15)
    series = 1.0 / 11 + w2 * series
    series = 1.0 / 9 + w2 * series
    series = 1.0 / 7 + w2 * series
    series = 1.0 / 5 + w2 * series
    series = 1.0 / 3 + w2 * series
    return tl.maximum(x, 0.0) + 2.0 * w * (1.0 + w2 * series)


@triton.jit
def sequence_start(cu_ptr, s, l):
    """cu_seqlens[s], kept inside the row whatever it holds."""
    return tl.minimum(tl.maximum(tl.load(cu_ptr + s), 0), l)


@triton.jit
def find_sequence(cu_ptr, slot, nseq, l, Q: tl.constexpr):
    """The sequence that owns `slot`: the largest s with cu_seqlens[s] // Q + s <= slot."""
    low = 0
    high = nseq - 1
    while low < high:
        middle = (low + high + 1) // 2
        if sequence_start(cu_ptr, middle, l) // Q + middle <= slot:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def tile_mask(valid, mask, FULL: tl.constexpr):
    """Which elements of a tile exist: with FULL the columns of `mask` all do."""
    rows = valid[:, None]
    if not FULL:
        rows = rows & mask[None, :]
    return rows


@triton.jit
def load_rows(pointer, row, row_stride, valid, offs, stride, mask, FULL: tl.constexpr):
    """(rows, columns) of a tensor with the given strides, 0 outside.

    `pointer` is at the first of a chunk's rows: 32 bits are enough for what is added to it.
    """
    return tl.load(
        pointer + (row[:, None] * row_stride + offs[None, :] * stride),
        mask=tile_mask(valid, mask, FULL), other=0.0,
    )  # fmt: skip


@triton.jit
def is_inside(first, row, start, end, PACKED: tl.constexpr):
    """Whether tokens first + row belong to the sequence from start to end."""
    inside = row < end - first
    if PACKED:  # start is 0 otherwise
        inside &= row >= start - first
    return inside


@triton.jit
def chunk_of(cu_ptr, slot, l, nseq, PACKED: tl.constexpr, CHUNK: tl.constexpr):
    """The first token of a slot, and where the slot's sequence starts and ends."""
    start = 0
    end = l
    first_slot = 0
    if PACKED:
        sequence = find_sequence(cu_ptr, slot, nseq, l, CHUNK)
        start = sequence_start(cu_ptr, sequence, l)
        end = sequence_start(cu_ptr, sequence + 1, l)
        first_slot = start // CHUNK + sequence
    return start + (slot - first_slot) * CHUNK, start, end


@triton.jit
def products(
    left, left_sl, left_sn, left_row, left_valid, right, right_sl, right_sn, right_row,
    right_valid, n, FULL: tl.constexpr, N_TILES: tl.constexpr, Q: tl.constexpr, NB: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """left rightᵀ over dstate: (q, q), float32."""
    result = tl.zeros((Q, Q), dtype=tl.float32)
    for tile in tl.static_range(N_TILES):
        offs = tile * NB + tl.arange(0, NB)
        a = load_rows(left, left_row, left_sl, left_valid, offs, left_sn, offs < n, FULL)
        b = load_rows(right, right_row, right_sl, right_valid, offs, right_sn, offs < n, FULL)
        result = tl.dot(a, tl.trans(b), result, input_precision=DOT)
    return result


@triton.jit
def not_hoisted(offs, item):
    """`offs` again, as far as anyone can tell changing with the loop: item stays below 2³⁰.

    A mask made of it is computed anew each time, which is cheap, and not kept in a register for
    each of its elements through a loop that is short of them.
    """
    return offs + (item >> 30)


@triton.jit
def decays(like, seen, later, earlier):
    """2^(later - earlier) where seen, else 0, for a product `like` of finite numbers.

    The look at `like` makes the compiler compute each element in the thread that holds that of the
    product, instead of moving them all there through shared memory.
    """
    return tl.exp2(tl.where(seen & (like == like), later - earlier, float("-inf")))


@triton.jit
def decays_both_ways(like, seen, later, earlier, end, begin):
    """2^(later - earlier) where seen, else 2^(end - begin), as `decays`."""
    return tl.exp2(tl.where(seen & (like == like), later - earlier, end - begin))


@triton.jit
def enter_slot(cu_ptr, sequence, slot, descending, nseq, l, PACKED: tl.constexpr, Q: tl.constexpr):
    """The sequence of a slot, given that of the slot before it in scan order.

    With it where it starts and ends, and its first slot.
    """
    start = slot * 0
    end = start + l
    first_slot = slot * 0
    if PACKED:
        here = sequence_start(cu_ptr, sequence, l) // Q + sequence
        after = sequence_start(cu_ptr, sequence + 1, l) // Q + sequence + 1
        step = tl.where(descending, -(slot < here).to(tl.int32), (slot >= after).to(tl.int32))
        sequence = tl.minimum(tl.maximum(sequence + step, 0), nseq - 1)
        start = sequence_start(cu_ptr, sequence, l)
        end = sequence_start(cu_ptr, sequence + 1, l)
        first_slot = start // Q + sequence
    return sequence, start, end, first_slot


@triton.jit
def _sum_and_last(a, size, next_a, next_size):
    return a + next_a, next_size


@triton.jit
def step_sizes(raw, valid, bias, a_log2, low, high, SOFTPLUS: tl.constexpr):
    """dt' of a chunk's tokens, 0 where there are none; the running sum of dt' A and the whole."""
    dt = raw.to(tl.float32) + bias
    if SOFTPLUS:
        dt = softplus(dt)
    dt = tl.where(valid, tl.minimum(tl.maximum(dt, low), high), 0.0)
    a = dt * a_log2
    # dt' goes through the running sum unchanged: the compiler would otherwise compute softplus
    # anew for each row of a tile, in every thread that holds a part of it.
    cum, size = tl.associative_scan((a, dt), 0, _sum_and_last)
    return size, cum, tl.sum(a, 0)


@triton.jit
def load_of_both(pointer, value, heads, USED: tl.constexpr):
    """A head's number of each direction, (2,) float32; `value` where there are none."""
    if USED:
        return tl.load(pointer + tl.arange(0, 2) * heads).to(tl.float32)
    return tl.full((2,), value, tl.float32)


@triton.jit
def step_sizes_of_both(raw, valid, bias, a_log2, low, high, SOFTPLUS: tl.constexpr):
    """`step_sizes` of both directions, side by side in raw (q, 2), bias and a_log2 (2,).

    All in the order of time. The running sum of the second direction is up to each token, not over
    it: against time a token's own decay is not between it and the earlier ones.
    """
    size, cum, total = step_sizes(
        raw, valid[:, None], bias[None, :], a_log2[None, :], low, high, SOFTPLUS
    )
    cum -= size * a_log2[None, :] * tl.arange(0, 2)[None, :]
    size, other_size = tl.split(size)
    cum, upto = tl.split(cum)
    total, other_total = tl.split(total)
    return size, cum, total, other_size, upto, other_total


@triton.jit
def _scan(
    X, x_sl, x_sp, V, v_sl, v_sn, DT, dt_sl, bias, a_log2, low, high,
    INIT, FINAL, STATES, CUM, DTP, FADE, MARKS, CARRY,
    cu_ptr, state_row, l, nseq, slots, segment, segment_slots, head, heads, reverse,
    p_start, n_start, p, n,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, SEGMENTED: tl.constexpr, FULL: tl.constexpr,
    STORES: tl.constexpr, HAS_INIT: tl.constexpr, HAS_FINAL: tl.constexpr, GRADIENT: tl.constexpr,
    Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One segment of one row, head and direction; pointers already point at that row and head."""
    order = tl.arange(0, Q)
    # Tile rows are in scan order: against time for a reverse scan.
    row = tl.where(reverse != 0, Q - 1 - order, order)
    p_offs = p_start + tl.arange(0, PB)
    n_offs = n_start + tl.arange(0, NB)
    p_mask = p_offs < p
    n_mask = n_offs < n
    tile = p_offs.to(tl.int64)[:, None] * n + n_offs[None, :]
    tile_mask = p_mask[:, None] & n_mask[None, :]
    first_tile = (p_start == 0) & (n_start == 0)
    descending = reverse != 0
    if GRADIENT:
        descending = reverse == 0

    begin = segment * segment_slots
    count = tl.minimum(segment_slots, slots - begin)
    entry_slot = begin + tl.where(descending, count - 1, 0)
    exit_slot = begin + tl.where(descending, 0, count - 1)
    row_entry = tl.where(descending, slots - 1, 0)
    row_exit = tl.where(descending, 0, slots - 1)
    sequence = state_row
    if PACKED:
        sequence = find_sequence(cu_ptr, entry_slot, nseq, l, Q)
    first_sequence = sequence
    state = tl.zeros((PB, NB), dtype=tl.float32)
    alive = 1.0  # 0 once a sequence has begun in this segment: nothing older is carried past it
    if not PACKED:
        alive = tl.where(entry_slot == row_entry, 0.0, 1.0)
        if HAS_INIT:
            source = INIT + (sequence.to(tl.int64) * heads + head) * p * n
            begins = tile_mask & (entry_slot == row_entry)
            state = tl.load(source + tile, mask=begins, other=0.0).to(tl.float32)
    fade = 0.0
    ended = -1.0

    sequence, start, end, first_slot = enter_slot(
        cu_ptr, sequence, entry_slot, descending, nseq, l, PACKED, Q
    )
    chunk = start + (entry_slot - first_slot) * Q
    known = is_inside(chunk, row, start, end, PACKED)
    raw = tl.load(DT + chunk.to(tl.int64) * dt_sl + row * dt_sl, mask=known, other=0.0)
    for i in tl.range(0, count, num_stages=STAGES):
        slot = begin + tl.where(descending, count - 1 - i, i)
        if PACKED:
            last_slot = end // Q + sequence
            enters = slot == tl.where(descending, last_slot, first_slot)
            leaves = slot == tl.where(descending, first_slot, last_slot)
            alive = tl.where(enters, 0.0, alive)
            if HAS_INIT:
                source = INIT + (sequence.to(tl.int64) * heads + head) * p * n
                given = tl.load(source + tile, mask=tile_mask & enters, other=0.0).to(tl.float32)
                state = tl.where(enters, given, state)
            else:
                state = tl.where(enters, 0.0, state)

        chunk = start + (slot - first_slot) * Q
        valid = is_inside(chunk, row, start, end, PACKED)
        base = chunk.to(tl.int64)
        dt, cum, total = step_sizes(raw, valid, bias, a_log2, low, high, SOFTPLUS)
        this_sequence = sequence
        # The next chunk's step sizes: too few bytes for the compiler to load them ahead.
        next_slot = begin + tl.where(descending, count - 2 - i, i + 1)
        sequence, start, end, first_slot = enter_slot(
            cu_ptr, sequence, next_slot, descending, nseq, l, PACKED, Q
        )
        chunk = start + (next_slot - first_slot) * Q
        known = is_inside(chunk, row, start, end, PACKED) & (i + 1 < count)
        raw = tl.load(DT + chunk.to(tl.int64) * dt_sl + row * dt_sl, mask=known, other=0.0)
        if GRADIENT:
            weight = tl.exp2(cum)
        else:
            weight = tl.exp2(total - cum) * dt
            if STORES and first_tile:
                tl.store(CUM + slot * Q + row, cum)
                tl.store(DTP + slot * Q + row, dt)
        if STORES:
            stored = STATES + slot.to(tl.int64) * p * n
            tl.store(stored + tile, state.to(STATES.dtype.element_ty), mask=tile_mask)
        if SEGMENTED:
            if STORES and first_tile:
                tl.store(FADE + slot, tl.where(alive > 0.0, tl.exp2(fade), 0.0))
            fade += total

        x_mask = valid[None, :]
        if not FULL:
            x_mask = x_mask & p_mask[:, None]
        x_at = X + base * x_sl + (row[None, :] * x_sl + p_offs[:, None] * x_sp)
        x = tl.load(x_at, mask=x_mask, other=0.0)
        v = load_rows(V + base * v_sl, row, v_sl, valid, n_offs, v_sn, n_mask, FULL)
        weighted = (x.to(tl.float32) * weight[None, :]).to(x.dtype)
        state = tl.dot(weighted, v, state * tl.exp2(total), input_precision=DOT)

        if PACKED:
            if HAS_FINAL:
                target = FINAL + (this_sequence.to(tl.int64) * heads + head) * p * n
                tl.store(target + tile, state, mask=tile_mask & leaves)
            if SEGMENTED:
                faded = tl.where(alive > 0.0, tl.exp2(fade), 0.0)
                ended = tl.where(leaves & (ended < 0.0), faded, ended)

    leaving = tl.where(alive > 0.0, tl.exp2(fade), 0.0)
    if not PACKED:
        if HAS_FINAL:
            target = FINAL + (sequence.to(tl.int64) * heads + head) * p * n
            tl.store(target + tile, state, mask=tile_mask & (exit_slot == row_exit))
        if SEGMENTED:
            ended = tl.where(exit_slot == row_exit, leaving, -1.0)
    if SEGMENTED:
        target = CARRY + segment.to(tl.int64) * p * n
        tl.store(target + tile, state, mask=tile_mask)
        if first_tile:
            marks = MARKS + segment * 4
            tl.store(marks, leaving)
            tl.store(marks + 1, ended)
            tl.store(marks + 2, first_sequence.to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def scan_kernel(
    x, B, dy, C, dt, A, dt_bias, init, final, dfinal, dinit, cu_ptr, ws, states,
    x_sd, x_sb, x_sl, x_sh, x_sp, B_sd, B_sb, B_sl, B_sg, B_sn,
    C_sd, C_sb, C_sl, C_sg, C_sn, dy_sb, dy_sl, dy_sh, dy_sp, dt_sd, dt_sb, dt_sl, dt_sh,
    cum_off, dtp_off, fade_off, marks_off, carry_off,
    low, high, l, nseq, slots, first_row, rows, batch, heads, heads_per_group, segments,
    segment_slots, reverse, p, n,
    DIRECTIONS: tl.constexpr, BACKWARD: tl.constexpr, STORES: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INIT: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_DFINAL: tl.constexpr,
    HAS_DINIT: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr,
    SEGMENTED: tl.constexpr, FULL: tl.constexpr, P_TILES: tl.constexpr, N_TILES: tl.constexpr,
    Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """S of every chunk, and in a backward pass R too: all directions and kinds in one launch."""
    pid = tl.program_id(0)
    n_start = pid % N_TILES * NB
    pid = pid // N_TILES
    p_start = pid % P_TILES * PB
    pid = pid // P_TILES
    head = (pid % heads).to(tl.int64)
    pid = pid // heads
    segment = pid % segments
    pid = pid // segments
    line = pid // rows  # kind and direction
    part_row = (pid % rows).to(tl.int64)
    row = first_row + part_row
    direction = (line % DIRECTIONS).to(tl.int64)
    kind = line // DIRECTIONS
    if DIRECTIONS == 2:
        reverse = direction.to(tl.int32)

    sequences = batch
    if PACKED:
        sequences = nseq
    state_shift = direction * sequences * heads * p * n  # direction is int64
    one = (direction * rows + part_row) * heads + head  # this direction, row and head
    this = (line * rows + part_row) * heads + head  # and this kind
    group = head // heads_per_group
    dt_at = dt + direction * dt_sd + row * dt_sb + head * dt_sh
    a_log2 = tl.load(A + direction * heads + head).to(tl.float32) * LOG2E
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(dt_bias + direction * heads + head).to(tl.float32)
    cum_at = ws + cum_off + one * slots * Q
    dtp_at = ws + dtp_off + one * slots * Q
    fade_at = ws + fade_off + this * slots
    marks_at = ws + marks_off + this * segments * 4
    carry_at = ws + carry_off + this * segments * p * n
    states_at = states + this * slots * p * n
    if kind == 0:
        _scan(
            x + direction * x_sd + row * x_sb + head * x_sh, x_sl, x_sp,
            B + direction * B_sd + row * B_sb + group * B_sg, B_sl, B_sn,
            dt_at, dt_sl, bias, a_log2, low, high,
            init + state_shift, final + state_shift,
            states_at, cum_at, dtp_at, fade_at, marks_at, carry_at,
            cu_ptr, row.to(tl.int32), l, nseq, slots, segment, segment_slots, head, heads, reverse,
            p_start, n_start, p, n,
            SOFTPLUS, PACKED, SEGMENTED, FULL, STORES, HAS_INIT, HAS_FINAL, False, Q, PB, NB, DOT,
            STAGES,
        )  # fmt: skip
    elif BACKWARD:
        _scan(
            dy + row * dy_sb + head * dy_sh, dy_sl, dy_sp,
            C + direction * C_sd + row * C_sb + group * C_sg, C_sl, C_sn,
            dt_at, dt_sl, bias, a_log2, low, high,
            dfinal + state_shift, dinit + state_shift,
            states_at, cum_at, dtp_at, fade_at, marks_at, carry_at,
            cu_ptr, row.to(tl.int32), l, nseq, slots, segment, segment_slots, head, heads, reverse,
            p_start, n_start, p, n,
            SOFTPLUS, PACKED, SEGMENTED, FULL, STORES, HAS_DFINAL, HAS_DINIT, True, Q, PB, NB, DOT,
            STAGES,
        )  # fmt: skip


@triton.jit
def _chain(decay, value, next_decay, next_value):
    return decay * next_decay, value * next_decay + next_value


@triton.jit(do_not_specialize=UNSPECIALIZED)
def carry_segments_kernel(
    ws, states, final, dinit, marks_off, carry_off, carried_off,
    nseq, rows, batch, heads, segments, reverse, p, n,
    DIRECTIONS: tl.constexpr, PACKED: tl.constexpr, HAS_FINAL: tl.constexpr,
    HAS_DINIT: tl.constexpr, SEGMENT_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What enters each segment, in state dtype, and the final states of what ends in a segment."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(p * n, BLOCK)
    offs = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = offs < p * n
    this = (pid // blocks).to(tl.int64)  # kind, direction, row, head
    head = this % heads
    line = this // (heads * rows)
    direction = line % DIRECTIONS
    kind = line // DIRECTIONS
    if DIRECTIONS == 2:
        reverse = direction.to(tl.int32)
    descending = (kind == 1) != (reverse != 0)
    sequences = batch
    if PACKED:
        sequences = nseq
    marks = ws + marks_off + this * segments * 4
    carry = ws + carry_off + this * segments * p * n
    carried = states + carried_off + this * segments * p * n

    entering = tl.zeros((1, BLOCK), dtype=tl.float32)
    for base in range(0, segments, SEGMENT_BLOCK):
        order = base + tl.arange(0, SEGMENT_BLOCK)
        known = order < segments
        at = tl.where(descending, segments - 1 - order, order)
        before = tl.where(descending, at + 1, at - 1)
        # Row 0 of each block continues from `entering`, which already includes the row before it.
        chained = known & (order > base)
        decay = tl.load(marks + before * 4, mask=chained, other=1.0)
        value = tl.load(
            carry + before.to(tl.int64)[:, None] * (p * n) + offs[None, :],
            mask=chained[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        decay = tl.broadcast_to(decay[:, None], (SEGMENT_BLOCK, BLOCK))
        decay, value = tl.associative_scan((decay, value), 0, _chain)
        value += decay * entering
        tl.store(
            carried + at.to(tl.int64)[:, None] * (p * n) + offs[None, :],
            value.to(states.dtype.element_ty), mask=known[:, None] & inside[None, :],
        )  # fmt: skip
        if HAS_FINAL or HAS_DINIT:
            ended = tl.load(marks + at * 4 + 1, mask=known, other=-1.0)
            sequence = tl.load(marks + at * 4 + 2, mask=known, other=0.0).to(tl.int32, bitcast=True)
            where = ((direction * sequences + sequence) * heads + head) * p * n
            where = where[:, None] + offs[None, :]
            corrected = (ended > 0.0)[:, None] & inside[None, :]
            if HAS_FINAL:
                mask = corrected & (kind == 0)
                local = tl.load(final + where, mask=mask, other=0.0)
                tl.store(final + where, local + ended[:, None] * value, mask=mask)
            if HAS_DINIT:
                mask = corrected & (kind == 1)
                local = tl.load(dinit + where, mask=mask, other=0.0)
                tl.store(dinit + where, local + ended[:, None] * value, mask=mask)
        last = tl.sum(tl.where((order == base + SEGMENT_BLOCK - 1)[:, None], value, 0.0), 0)
        tail = base + SEGMENT_BLOCK - 1
        tail = tl.where(descending, segments - 1 - tail, tail)
        more = base + SEGMENT_BLOCK < segments
        faded = tl.load(marks + tail * 4, mask=more, other=0.0)
        local = tl.load(carry + tail.to(tl.int64) * (p * n) + offs, mask=inside & more, other=0.0)
        entering = (last * faded + local)[None, :]
