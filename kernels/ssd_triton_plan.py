"""How a shape is cut: rules from sizes to chunks, grids, splits and workspaces, never a search.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · chunk q

One design for two regimes: where rows × heads fill the GPU each is walked whole, and where they do
not a row is cut into segments that are scanned at once.
"""

from dataclasses import dataclass, replace

import torch
import triton

from .dispatch import HALF

MOST_CHUNK = 128  # tokens
STEP_TOKENS = 1024
MOST_WORKSPACE = 140_000_000  # bytes a direction, beyond which a backward takes a batch in parts
MOST_STATES = 140_000_000  # bytes beyond which a forward that stores states does
MOST_CHAINED = 16  # segments whose states each walk adds up itself
CHUNKED_DSTATE = 65  # from which the forward of both directions stores states


def stores_states(directions: int, n: int) -> bool:
    """Whether a forward goes through stored states, rather than walk with the state in registers.

    Both directions share more of the work that way; the registers of a walk at dstate 128 are full.
    """
    return directions == 2 and n >= CHUNKED_DSTATE


@dataclass(frozen=True)
class Tiling:
    """How tokens are cut, and the warps and stages of each kernel."""

    forward_chunk: int
    chunk: int  # tokens between the states that a backward stores
    tile: int  # tokens of a program of the quadratic kernels: chunk or chunk / 2
    forward_warps: int = 4
    forward_stages: int = 2
    scan_warps: int = 4
    scan_stages: int = 2
    backward_warps: int = 4
    backward_stages: int = 3
    shared_warps: int = 8
    shared_stages: int = 3
    scan_programs: int = 2  # programs per multiprocessor below which a row is cut into segments
    least_segment: int = 4  # of this many chunks or more
    forward_programs: int = 6  # and below which the heads of a group are split over programs
    backward_programs: int = 4
    shared_programs: int = 2


def tiling(l: int, n: int, directions: int, dtype: torch.dtype) -> Tiling:
    """The rule: tiles of 64 in chunks of 128; float32, whose products are dearer, half of each."""
    if dtype == torch.float32:
        return Tiling(
            forward_chunk=32, chunk=64, tile=32, forward_stages=1, backward_stages=1,
            shared_stages=1, shared_warps=4,
        )  # fmt: skip
    # As many stages as leave shared memory for two programs; tiles over dstate leave for none.
    stages = 1 if n > 128 else 2 if directions == 2 and n > 64 else 3
    forward_stages = 3 if n <= 64 else 2
    if l > 64:
        return Tiling(64, chunk=128, tile=64, forward_stages=forward_stages, backward_stages=stages)
    return Tiling(
        64, chunk=64, tile=64, forward_stages=forward_stages, backward_stages=stages,
        shared_warps=4,
    )  # fmt: skip


class _Workspace:
    """Offsets into one float32 allocation, in elements; each part starts at a multiple of 32."""

    def __init__(self) -> None:
        self.at: dict[str, int] = {}
        self.size = 0

    def reserve(self, name: str, elements: int) -> None:
        self.at[name] = self.size
        self.size += -(-elements // 32) * 32


def _cut_into_segments(
    programs: int, slots: int, cut: Tiling, processors: int
) -> tuple[int, int]:  # segments, slots per segment
    segments = max(1, min(cut.scan_programs * processors // programs, slots // cut.least_segment))
    segment_slots = -(-slots // segments)
    return -(-slots // segment_slots), segment_slots


@dataclass(frozen=True)
class ForwardPlan:
    """Everything about a forward that follows from its sizes."""

    slots: int  # chunks a row
    segments: int
    segment_slots: int
    chained: bool  # whether a walk adds up what the segments before it left
    joined: int  # chunks that a step of the scan takes together
    lines: int  # directions × rows × heads
    p_tiles: int
    n_tiles: int
    scan_n_tiles: int
    offsets: dict[str, int]
    floats: int


def forward_plan(
    rows: int, nseq: int, l: int, h: int, p: int, n: int, directions: int, dtype: torch.dtype,
    processors: int,
) -> tuple[Tiling, ForwardPlan]:  # fmt: skip
    cut = tiling(l, n, directions, dtype)
    q = cut.forward_chunk
    slots = l // q + nseq if nseq else -(-l // q)
    p_tiles = -(-p // p_block(p, dtype))
    segments, segment_slots = _cut_into_segments(rows * h * p_tiles, slots, cut, processors)
    # The scan that comes before the walks keeps nothing of a chunk but the state, so that longer
    # ones cost it no registers; a pack lays its sequences out in chunks of the walks.
    joined = 1 if nseq else cut.chunk // q
    segment_slots = -(-segment_slots // joined) * joined
    segments = -(-slots // segment_slots)
    lines = directions * rows * h
    chained = segments <= MOST_CHAINED
    workspace = _Workspace()
    if segments > 1:
        workspace.reserve("marks", lines * segments * 4)
        workspace.reserve("carry", lines * segments * p * n)
        workspace.reserve("carried", lines * segments * p * n * (not chained))
    n_tiles, scan_n_tiles = -(-n // n_block(n, dtype)), -(-n // scan_n_block(n))
    return cut, ForwardPlan(
        slots, segments, segment_slots, chained, joined, lines, p_tiles, n_tiles, scan_n_tiles,
        workspace.at, workspace.size,
    )  # fmt: skip


@dataclass(frozen=True)
class ChunkedPlan:
    """Everything about a forward through stored states that follows from its sizes."""

    part: int  # rows of the batch at a time
    slots: int
    tiles: int
    segments: int
    segment_slots: int
    state_tiles: tuple[int, int]  # of the scan, over headdim and dstate
    p_tiles: int
    n_tiles: int
    split: tuple[int, int]  # programs per group of heads, heads per program
    offsets: dict[str, int]
    floats: int
    carried: int  # offset into the states, in their dtype


def chunked_plan(
    rows: int, nseq: int, l: int, h: int, p: int, g: int, n: int, dtype: torch.dtype,
    processors: int,
) -> tuple[Tiling, ChunkedPlan]:  # fmt: skip
    """The whole batch at once, or in parts of a limited workspace."""
    cut = tiling(l, n, 2, dtype)
    q = cut.chunk
    slots = l // q + nseq if nseq else -(-l // q)
    tiles = slots * (q // cut.tile)
    row = 2 * h * slots * (p * n * dtype.itemsize + 8 * q)
    part = -(-rows // min(rows, -(-rows * row // MOST_STATES)))
    lines = 2 * part * h
    state_tiles = -(-p // p_block(p, dtype)), -(-n // scan_n_block(n))
    p_tiles, n_tiles = -(-p // p_block(p, dtype)), -(-n // n_block(n, dtype))
    segments, segment_slots = _cut_into_segments(
        lines * state_tiles[0] * state_tiles[1], slots, cut, processors
    )
    segmented = segments > 1
    workspace = _Workspace()
    workspace.reserve("cum", lines * slots * q)
    workspace.reserve("dtp", lines * slots * q)
    workspace.reserve("fade", lines * slots * segmented)
    workspace.reserve("marks", lines * segments * 4 * segmented)
    workspace.reserve("carry", lines * segments * p * n * segmented)
    carried = -(-lines * slots * p * n // 32) * 32
    halves = carried + lines * segments * p * n * segmented
    workspace.reserve("states", -(-halves * dtype.itemsize // 4))
    split = _split(h // g, part * tiles * g, cut.forward_programs * processors)
    return cut, ChunkedPlan(
        part, slots, tiles, segments, segment_slots, state_tiles, p_tiles, n_tiles, split,
        workspace.at, workspace.size, carried,
    )  # fmt: skip


def _split(heads: int, programs: int, wanted: int) -> tuple[int, int]:
    """Programs that share the heads of a group, and heads a program."""
    splits = min(heads, max(1, -(-wanted // programs)))
    each = -(-heads // splits)
    return -(-heads // each), each


@dataclass(frozen=True)
class BackwardPlan:
    """Everything about a backward that follows from its sizes: grids, offsets, splits."""

    part: int  # rows of the batch at a time
    slots: int  # chunks a row
    tiles: int
    segments: int
    segment_slots: int
    state_tiles: tuple[int, int]  # of the scan, over headdim and dstate
    p_tiles: int
    n_tiles: int
    served: int  # directions that the quadratic kernels run one at a time
    chunk_split: tuple[int, int]  # programs per group of heads, heads per program
    shared_split: tuple[int, int]
    step_slots: int
    offsets: dict[str, int]
    floats: int
    carried: int  # offsets into the states, in their dtype
    mix: int


def backward_plan(
    rows: int, nseq: int, l: int, h: int, p: int, g: int, n: int, directions: int, merged: bool,
    d_rows: int, dtype: torch.dtype, processors: int,
) -> tuple[Tiling, BackwardPlan]:  # fmt: skip
    """The whole batch at once, or in parts of a limited workspace."""
    sizes = rows, nseq, l, h, p, g, n, directions, merged, d_rows, dtype, processors
    _, plan = _part_plan(rows, *sizes)
    parts = min(rows, -(-plan.floats * 4 // (MOST_WORKSPACE * directions)))
    return _part_plan(-(-rows // parts), *sizes)


def _part_plan(
    rows: int, batch: int, nseq: int, l: int, h: int, p: int, g: int, n: int, directions: int,
    merged: bool, d_rows: int, dtype: torch.dtype, processors: int,
) -> tuple[Tiling, BackwardPlan]:  # fmt: skip
    cut = tiling(l, n, directions, dtype)
    q = cut.chunk
    slots = l // q + nseq if nseq else -(-l // q)
    tiles = slots * (q // cut.tile)
    lines = 2 * directions * rows * h  # kinds of state × directions × rows × heads
    state_tiles = -(-p // p_block(p, dtype)), -(-n // scan_n_block(n))
    p_tiles, n_tiles = -(-p // p_block(p, dtype)), -(-n // n_block(n, dtype))
    served = 1 if merged else directions
    segments, segment_slots = _cut_into_segments(
        lines * state_tiles[0] * state_tiles[1], slots, cut, processors
    )
    segmented = segments > 1
    if segmented and directions == 2 and n > 64 and dtype != torch.float32:
        # What entered a segment is staged beside S and R: a third stage would not fit.
        cut = replace(cut, shared_stages=2)

    chunk_split = _split(h // g, served * rows * tiles * g, cut.backward_programs * processors)
    shared_split = 1, h // g
    if rows == batch:  # parts are there to save memory, which splits would take
        programs = 2 * served * rows * slots * g * n_tiles
        shared_split = _split(h // g, programs, cut.shared_programs * processors)
    step_slots = 1 if nseq else max(1, min(STEP_TOKENS // q, triton.next_power_of_2(slots)))

    workspace = _Workspace()
    vector = directions * rows * h * slots * q
    for name in ("cum", "dtp", "row", "far", "column", "column_far"):
        workspace.reserve(name, vector)
    workspace.reserve("into", n_tiles * vector)
    workspace.reserve("out", n_tiles * vector)
    workspace.reserve("overlap", n_tiles * vector // q)
    workspace.reserve("fade", lines * slots * segmented)
    workspace.reserve("marks", lines * segments * 4 * segmented)
    workspace.reserve("carry", lines * segments * p * n * segmented)
    workspace.reserve("dA", directions * h * batch * -(-slots // step_slots))
    workspace.reserve("dbias", directions * h * batch * -(-slots // step_slots))
    workspace.reserve("dD", d_rows * served * batch * tiles)
    partial = shared_split[0] * served * batch * l * g * n * (shared_split[0] > 1)
    workspace.reserve("dB", partial)
    workspace.reserve("dC", partial)
    carried = -(-lines * slots * p * n // 32) * 32
    mix = carried + -(-lines * segments * p * n * segmented // 32) * 32
    halves = mix + served * rows * g * chunk_split[0] * slots * q * q
    workspace.reserve("states", -(-halves * dtype.itemsize // 4))
    return cut, BackwardPlan(
        rows, slots, tiles, segments, segment_slots, state_tiles, p_tiles, n_tiles, served,
        chunk_split, shared_split, step_slots, workspace.at, workspace.size, carried, mix,
    )  # fmt: skip


def _power_of_two(size: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(size)))


def p_block(p: int, dtype: torch.dtype) -> int:
    # Hopper's wgmma with fewer columns was compiled (Triton 3.6, two tiles over dstate, both
    # directions) to read past the end of shared memory, as compute-sanitizer found.
    return 64 if dtype in HALF else _power_of_two(p, 64)


def scan_n_block(n: int) -> int:
    return _power_of_two(n, 64)


def n_block(n: int, dtype: torch.dtype) -> int:
    return _power_of_two(n, 64 if dtype == torch.float32 else 128)
