"""The SSD on Triton: shapes to launches, workspaces, and registration with torch.library.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · chunk q

A forward is one launch, or three where batch × heads is too small to fill the GPU: then the
sequence is cut into segments, whose states come first. A backward is five (S and R, then dx, then
dB and dC, then ddt, then the ordered sums), six in segments, one more with z; a batch whose chunk
states would take much memory is taken in parts, which repeat all launches but the last. Both
directions share all of them. How a shape is cut is a rule of its sizes (`forward_plan`,
`backward_plan`), not a search. Nothing but the inputs is kept from forward to backward: states are
computed again, which costs less than their memory.

A small shape takes less time on the GPU than the host takes to look at the arguments, so what
follows from shapes, strides and flags alone is prepared once (`_prepare`), the kernels compiled for
it are kept and called with bare addresses, and tensors without a subclass or a mode to hear of them
pass by torch's dispatcher.
"""

import contextlib
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from . import ssd_triton_interpreter  # noqa: F401
from .dispatch import HALF, interpreting, is_plain
from .ssd_triton_backward import (
    chunk_backward_kernel,
    gate_backward_kernel,
    reduce_kernel,
    shared_backward_kernel,
    step_backward_kernel,
)
from .ssd_triton_chunks import chunk_forward_kernel
from .ssd_triton_forward import forward_kernel
from .ssd_triton_scan import carry_segments_kernel, scan_kernel

SUM_BLOCK = 1024
GATE_BLOCK = 1024
SEGMENT_BLOCK = 32
STATE_BLOCK = 64
STEP_TOKENS = 1024
MOST_WORKSPACE = 140_000_000  # bytes a direction, beyond which a backward takes a batch in parts
MOST_STATES = 140_000_000  # bytes beyond which a forward that stores states does
CHUNKED_DSTATE = 65  # from which the forward of both directions stores states


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    reverse: bool,
    return_final_states: bool,
) -> tuple[Tensor, Tensor | None]:
    """`kernels.ssd` on arguments that are already checked; the states are None unless asked for."""
    trained = z is not None and torch.is_grad_enabled()
    y, states, _ = _call(
        x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, dt_softplus,
        float(dt_limit[0]), float(dt_limit[1]), reverse, return_final_states, trained,
    )  # fmt: skip
    return y, states if return_final_states else None


def ssd_bidirectional(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    return_final_states: bool,
) -> tuple[Tensor, Tensor | None]:
    """`kernels.ssd_bidirectional` on checked arguments; the states are None unless asked for."""
    y, states, _ = _call(
        x, dt, A, B, C, D, None, dt_bias, initial_states, cu_seqlens, dt_softplus,
        float(dt_limit[0]), float(dt_limit[1]), False, return_final_states, False,
    )  # fmt: skip
    return y, states if return_final_states else None


def _call(*inputs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not is_plain(*inputs[:10]):
        return _forward_op(*inputs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:10]):
        return _SSD.apply(None, *inputs)
    return _forward(*inputs)


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
    p_tiles = -(-p // _p_block(p, dtype))
    segments, segment_slots = _cut_into_segments(rows * h * p_tiles, slots, cut, processors)
    lines = directions * rows * h
    workspace = _Workspace()
    if segments > 1:
        workspace.reserve("marks", lines * segments * 4)
        workspace.reserve("carry", lines * segments * p * n)
        workspace.reserve("carried", lines * segments * p * n)
    n_tiles, scan_n_tiles = -(-n // _n_block(n, dtype)), -(-n // _scan_n_block(n))
    return cut, ForwardPlan(
        slots, segments, segment_slots, lines, p_tiles, n_tiles, scan_n_tiles, workspace.at,
        workspace.size,
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
    state_tiles = -(-p // _p_block(p, dtype)), -(-n // _scan_n_block(n))
    p_tiles, n_tiles = -(-p // _p_block(p, dtype)), -(-n // _n_block(n, dtype))
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
    state_tiles = -(-p // _p_block(p, dtype)), -(-n // _scan_n_block(n))
    p_tiles, n_tiles = -(-p // _p_block(p, dtype)), -(-n // _n_block(n, dtype))
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


def _p_block(p: int, dtype: torch.dtype) -> int:
    # Hopper's wgmma with fewer columns was compiled (Triton 3.6, two tiles over dstate, both
    # directions) to read past the end of shared memory, as compute-sanitizer found.
    return 64 if dtype in HALF else _power_of_two(p, 64)


def _scan_n_block(n: int) -> int:
    return _power_of_two(n, 64)


def _n_block(n: int, dtype: torch.dtype) -> int:
    return _power_of_two(n, 64 if dtype == torch.float32 else 128)


@functools.lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _precision(dtype: torch.dtype) -> str:
    """tf32 where torch's own products may use it, else three tf32 products for float32 accuracy."""
    if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "tf32x3"


class Launch(NamedTuple):
    kernel: Any
    programs: int
    warps: int
    tensors: itemgetter  # which of the call's tensors come first
    rest: tuple  # the arguments after them


class _Prepared:
    """Launches that calls of equal shapes, strides and flags have in common."""

    launches: list[Launch]
    states = 0  # offset into the workspace

    def __init__(self, x: Tensor) -> None:
        self.device_index = x.device.index
        self.dtype = x.dtype
        self.compiled: dict[Any, list[Any]] = {}

    def states_in(self, workspace: Tensor) -> Tensor:
        """Where a workspace holds states, which are of x's dtype."""
        return workspace[self.states :].view(self.dtype)

    def run(self, tensors: Sequence[Tensor]) -> None:
        """kernel[grid](*args) for each, but Triton looks at the arguments the first time only."""
        pointers = [t.data_ptr() for t in tensors]
        union = 0
        for pointer in pointers:
            union |= pointer
        # Triton compiles for pointers that are multiples of 16, and again for each set that is not.
        aligned = None if union % 16 == 0 else tuple(pointer % 16 == 0 for pointer in pointers)
        compiled = self.compiled.get(aligned)
        if compiled is None:
            self.compiled[aligned] = self._first_run(tensors)
        elif compiled and not _is_watched():
            stream = driver.active.get_current_stream(self.device_index)
            for run, function, metadata, programs, pick, rest in compiled:
                run(
                    programs, 1, 1, stream, function, metadata, None, None, None,
                    *pick(pointers), *rest,
                )  # fmt: skip
        else:  # the interpreter, or a profiler that wants to know more
            for kernel, programs, warps, pick, rest in self.launches:
                kernel[(programs,)](*pick(tensors), *rest, num_warps=warps)

    def _first_run(self, tensors: Sequence[Tensor]) -> list[Any]:
        if interpreting():
            for kernel, programs, _, pick, rest in self.launches:
                kernel[(programs,)](*pick(tensors), *rest)
            return []
        # The compilers leave Python's lock: what is not in Triton's cache is built side by side.
        device = torch.cuda.current_device()

        def build(launch: Launch) -> None:
            kernel, programs, warps, pick, rest = launch
            torch.cuda.set_device(device)
            kernel.warmup(*pick(tensors), *rest, grid=(programs,), num_warps=warps)._init_handles()

        distinct = {launch.kernel: launch for launch in self.launches}
        with ThreadPoolExecutor(len(distinct)) as pool:
            list(pool.map(build, distinct.values()))
        compiled = []
        for kernel, programs, warps, pick, rest in self.launches:
            built = kernel[(programs,)](*pick(tensors), *rest, num_warps=warps)
            compiled.append(
                (built.run, built.function, built.packed_metadata, programs, pick, rest)
            )
        return compiled


class _Call:
    """What the arguments of a call say, whatever their values."""

    def __init__(self, tensors: tuple[Any, ...], settings: tuple) -> None:
        x, dt, _, B, C, D, z, dt_bias, initial_states, cu_seqlens = tensors
        self.softplus, self.low, self.high, reverse = settings
        self.reverse = int(reverse)
        self.directions = 2 if dt.dim() == 4 else 1
        self.b, self.l, self.h, self.p = self.shape = tuple(x.shape[-4:])
        self.g, self.n = B.shape[-2:]
        self.packed = cu_seqlens is not None
        self.nseq = cu_seqlens.shape[0] - 1 if self.packed else 0
        self.x_shared = x.dim() == 4
        self.merged = self.directions == 1 or not (x.dim() == 5 or B.dim() == 5 or C.dim() == 5)
        self.has_bias, self.has_init = dt_bias is not None, initial_states is not None
        self.has_d, self.d_matrix = D is not None, D is not None and D.dim() == 2
        self.d_rows = 0 if D is None else D.numel()
        self.inputs = (*_strides(x, 5), *_strides(B, 5), *_strides(C, 5))
        self.of_dt = _strides(dt, 4)
        self.of_z = (0, 0, 0, 0) if z is None else z.stride()
        self.dtype = x.dtype
        self.dot = _precision(x.dtype)
        self.p_block, self.n_block = _p_block(self.p, x.dtype), _n_block(self.n, x.dtype)
        self.processors = _processors(x.device)
        pair = (2,) if self.directions == 2 else ()
        self.state_shape = (*pair, self.nseq or self.b, self.h, self.p, self.n)


class _Forward(_Prepared):
    # x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, y, ungated, final, workspace
    SCAN = itemgetter(0, 3, 0, 4, 1, 2, 7, 8, 12, 13, 13, 9, 13, 13)
    CARRY = itemgetter(13, 13, 12, 13)
    WALK = itemgetter(0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 9, 13)

    def __init__(self, tensors, settings, has_final: bool, save_ungated: bool) -> None:
        super().__init__(tensors[0])
        c = _Call(tensors, settings)
        self.shape, self.state_shape = c.shape, c.state_shape
        self.cut, self.plan = cut, plan = forward_plan(
            c.b, c.nseq, c.l, c.h, c.p, c.n, c.directions, c.dtype, c.processors
        )
        self.floats, at = plan.floats, plan.offsets
        segmented = plan.segments > 1
        segments = plan.segments, plan.segment_slots
        self.launches = []
        if segmented:
            scan = (
                *c.inputs, 0, 0, 0, 0, *c.of_dt, 0, 0, 0, at["marks"], at["carry"], c.low, c.high,
                c.l, c.nseq, plan.slots, 0, c.b, c.b, c.h, c.h // c.g, *segments, c.reverse, c.p,
                c.n, c.directions, False, False, c.has_bias, c.has_init, has_final, False, False,
                c.softplus, c.packed, True, plan.p_tiles, plan.scan_n_tiles, cut.forward_chunk,
                c.p_block, _scan_n_block(c.n), c.dot, cut.scan_stages,
            )  # fmt: skip
            programs = plan.lines * plan.p_tiles * plan.scan_n_tiles * plan.segments
            carry = (
                at["marks"], at["carry"], at["carried"], c.nseq, c.b, c.b, c.h, plan.segments,
                c.reverse, c.p, c.n, c.directions, c.packed, has_final, False,
                _segment_block(plan.segments), STATE_BLOCK,
            )  # fmt: skip
            blocks = plan.lines * -(-c.p * c.n // STATE_BLOCK)
            self.launches = [
                Launch(scan_kernel, programs, cut.scan_warps, self.SCAN, scan),
                Launch(carry_segments_kernel, blocks, 4, self.CARRY, carry),
            ]
        walk = (
            *c.inputs, *c.of_z, *c.of_dt, at.get("carried", 0), c.low, c.high, c.l, c.nseq,
            plan.slots, c.b, c.h, c.h // c.g, *segments, c.reverse, c.p, c.n, c.directions,
            c.x_shared, c.has_bias, c.has_d, c.d_matrix, tensors[6] is not None, save_ungated,
            c.has_init, has_final and not segmented, c.softplus, c.packed, segmented, plan.p_tiles,
            plan.n_tiles, cut.forward_chunk, c.p_block, c.n_block, c.dot, cut.forward_stages,
        )  # fmt: skip
        programs = c.b * c.h * plan.p_tiles * plan.segments
        self.launches.append(Launch(forward_kernel, programs, cut.forward_warps, self.WALK, walk))


class _ChunkedForward(_Prepared):
    # As _Forward, and the states.
    SCAN = itemgetter(0, 3, 0, 4, 1, 2, 7, 8, 12, 13, 13, 9, 13, 14)
    CARRY = itemgetter(13, 14, 12, 13)
    CHUNK = itemgetter(0, 3, 4, 5, 10, 9, 13, 14)

    def __init__(self, tensors, settings, has_final: bool, save_ungated: bool) -> None:
        super().__init__(tensors[0])
        self.call = c = _Call(tensors, settings)
        self.shape, self.state_shape = c.shape, c.state_shape
        self.cut, self.plan = chunked_plan(
            c.b, c.nseq, c.l, c.h, c.p, c.g, c.n, c.dtype, c.processors
        )
        self.floats, self.states = self.plan.floats, self.plan.offsets["states"]
        self.launches = []
        for first in range(0, c.b, self.plan.part):
            self.launches += self._of_part(first, min(self.plan.part, c.b - first), has_final)

    def _of_part(self, first: int, rows: int, has_final: bool) -> list[Launch]:
        c, cut, plan, at = self.call, self.cut, self.plan, self.plan.offsets
        segmented = plan.segments > 1
        segments = plan.segments, plan.segment_slots
        lines = 2 * rows * c.h
        scan = (
            *c.inputs, 0, 0, 0, 0, *c.of_dt, at["cum"], at["dtp"], at["fade"], at["marks"],
            at["carry"], c.low, c.high, c.l, c.nseq, plan.slots, first, rows, c.b, c.h, c.h // c.g,
            *segments, 0, c.p, c.n, 2, False, True, c.has_bias, c.has_init, has_final, False, False,
            c.softplus, c.packed, segmented, *plan.state_tiles, cut.chunk, c.p_block,
            _scan_n_block(c.n), c.dot, cut.scan_stages,
        )  # fmt: skip
        programs = lines * plan.state_tiles[0] * plan.state_tiles[1] * plan.segments
        launches = [Launch(scan_kernel, programs, cut.scan_warps, self.SCAN, scan)]
        if segmented:
            carry = (
                at["marks"], at["carry"], plan.carried, c.nseq, rows, c.b, c.h, plan.segments, 0,
                c.p, c.n, 2, c.packed, has_final, False, _segment_block(plan.segments), STATE_BLOCK,
            )  # fmt: skip
            programs = lines * -(-c.p * c.n // STATE_BLOCK)
            launches.append(Launch(carry_segments_kernel, programs, 4, self.CARRY, carry))
        splits, per_program = plan.split
        chunk = (
            *c.inputs, at["cum"], at["dtp"], at["fade"], plan.carried, c.l, c.nseq, plan.slots,
            first, rows, c.h, c.h // c.g, per_program, splits, plan.tiles, *segments, c.p, c.n,
            c.merged, c.x_shared, c.has_d, c.d_matrix, c.packed, segmented, plan.p_tiles,
            plan.n_tiles, cut.chunk, cut.tile, c.p_block, c.n_block, c.dot, cut.backward_stages,
        )  # fmt: skip
        programs = rows * plan.tiles * c.g * splits
        launches.append(Launch(chunk_forward_kernel, programs, 4, self.CHUNK, chunk))
        return launches


class _Backward(_Prepared):
    # x, dt, A, B, C, D, dt_bias, initial_states, cu_seqlens, dy, dfinal, workspace, states,
    # dx, ddt, dA, dB, dC, dD, dbias, dinit
    SCAN = itemgetter(0, 3, 9, 4, 1, 2, 6, 7, 11, 10, 20, 8, 11, 12)
    CARRY = itemgetter(11, 12, 11, 20)
    CHUNK = itemgetter(0, 3, 4, 5, 9, 13, 8, 11, 12)
    SHARED = itemgetter(0, 3, 4, 9, 16, 17, 8, 11, 12)
    SHARED_SPLIT = itemgetter(0, 3, 4, 9, 11, 11, 8, 11, 12)
    STEP = itemgetter(1, 2, 6, 14, 8, 11)
    REDUCE = itemgetter(11, 15, 19, 18, 16, 17)

    def __init__(self, tensors, settings, dy: Tensor, has_dfinal: bool) -> None:
        super().__init__(tensors[0])
        self.call = c = _Call(tensors, settings)
        self.merged, self.state_shape = c.merged, c.state_shape
        self.of_dy = dy.stride()
        self.cut, self.plan = backward_plan(
            c.b, c.nseq, c.l, c.h, c.p, c.g, c.n, c.directions, c.merged, c.d_rows, c.dtype,
            c.processors,
        )  # fmt: skip
        plan = self.plan
        self.floats, self.states = plan.floats, plan.offsets["states"]
        self.launches = []
        for first in range(0, c.b, plan.part):
            self.launches += self._of_part(first, min(plan.part, c.b - first), has_dfinal)
        at, splits = plan.offsets, plan.shared_split[0]
        size = plan.served * c.b * c.l * c.g * c.n
        reduce = (
            at["dA"], at["dbias"], at["dD"], at["dB"], at["dC"], c.h, c.d_rows,
            c.b * -(-plan.slots // plan.step_slots), plan.served * c.b * plan.tiles, splits, size,
            c.directions, c.has_bias, c.has_d, splits > 1, SUM_BLOCK,
        )  # fmt: skip
        programs = c.directions * c.h * (1 + c.has_bias) + c.d_rows
        programs += -(-size // SUM_BLOCK) * (splits > 1)
        self.launches.append(Launch(reduce_kernel, programs, 4, self.REDUCE, reduce))

    def _of_part(self, first: int, rows: int, has_dfinal: bool) -> list[Launch]:
        """All launches but the last for `rows` rows of the batch."""
        c, cut, plan, at = self.call, self.cut, self.plan, self.plan.offsets
        segmented = plan.segments > 1
        segments = plan.segments, plan.segment_slots
        lines = 2 * c.directions * rows * c.h
        sizes = c.l, c.nseq, plan.slots, first, rows, c.b, c.h
        blocks = plan.p_tiles, plan.n_tiles, cut.chunk, cut.tile, c.p_block, c.n_block, c.dot
        entered = at["cum"], at["dtp"], at["fade"], plan.carried
        scan = (
            *c.inputs, *self.of_dy, *c.of_dt, at["cum"], at["dtp"], at["fade"], at["marks"],
            at["carry"], c.low, c.high, *sizes, c.h // c.g, *segments, c.reverse, c.p, c.n,
            c.directions, True, True, c.has_bias, c.has_init, False, has_dfinal, c.has_init,
            c.softplus, c.packed, segmented, *plan.state_tiles, cut.chunk, c.p_block,
            _scan_n_block(c.n), c.dot, cut.scan_stages,
        )  # fmt: skip
        programs = lines * plan.state_tiles[0] * plan.state_tiles[1] * plan.segments
        launches = [Launch(scan_kernel, programs, cut.scan_warps, self.SCAN, scan)]
        if segmented:
            carry = (
                at["marks"], at["carry"], plan.carried, c.nseq, rows, c.b, c.h, plan.segments,
                c.reverse, c.p, c.n, c.directions, c.packed, False, c.has_init,
                _segment_block(plan.segments), STATE_BLOCK,
            )  # fmt: skip
            programs = lines * -(-c.p * c.n // STATE_BLOCK)
            launches.append(Launch(carry_segments_kernel, programs, 4, self.CARRY, carry))

        each = c.directions // plan.served
        splits, per_program = plan.chunk_split
        tiles = cut.chunk // cut.tile
        squares = each * (tiles - 1) + tiles
        chunk = (
            *c.inputs, *self.of_dy, *entered, at["row"], at["far"], at["column"],
            at["column_far"], at["dD"], plan.mix, *sizes, c.h // c.g, per_program, splits,
            plan.tiles, *segments, c.reverse, c.p, c.n, c.directions, each, c.x_shared, c.has_d,
            c.d_matrix, c.packed, segmented, *blocks, cut.backward_stages, squares,
        )  # fmt: skip
        programs = plan.served * rows * plan.slots * (tiles + squares) * c.g * splits
        launches.append(
            Launch(chunk_backward_kernel, programs, cut.backward_warps, self.CHUNK, chunk)
        )

        shared_splits, per_program = plan.shared_split
        partial = shared_splits > 1
        shared = (
            *c.inputs, *self.of_dy, *entered, at["into"], at["out"], at["overlap"], plan.mix,
            at["dB"] * partial, at["dC"] * partial, *sizes, c.h // c.g, per_program,
            shared_splits, splits, *segments, c.reverse, c.p, c.n, c.directions, each, c.packed,
            segmented, *blocks, cut.shared_stages,
        )  # fmt: skip
        programs = 2 * plan.served * rows * plan.slots * c.g * plan.n_tiles * shared_splits
        pick = self.SHARED_SPLIT if partial else self.SHARED
        launches.append(Launch(shared_backward_kernel, programs, cut.shared_warps, pick, shared))

        step = (
            *c.of_dt, at["dtp"], at["row"], at["far"], at["column"], at["column_far"], at["into"],
            at["out"], at["overlap"], at["dA"], at["dbias"], c.low, c.high, *sizes, c.reverse,
            c.directions, c.has_bias, c.softplus, c.packed, plan.n_tiles, cut.chunk, cut.tile,
            plan.step_slots,
        )  # fmt: skip
        programs = c.directions * rows * c.h * -(-plan.slots // plan.step_slots)
        launches.append(Launch(step_backward_kernel, programs, 4, self.STEP, step))
        return launches


def _segment_block(segments: int) -> int:
    return max(2, min(SEGMENT_BLOCK, triton.next_power_of_2(segments)))


def _is_watched() -> bool:
    """Whether a profiler asked Triton to be told of launches."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


_prepared: dict[Any, Any] = {}
_MOST_PREPARED = 4096


def _prepare(make: type, tensors, settings, dy: Tensor | None, *flags: bool) -> Any:
    """The prepared call for these shapes, strides, dtypes and flags, made on its first use."""
    key = (
        make, settings, flags, torch.backends.cuda.matmul.allow_tf32, tensors[0].device,
        None if dy is None else dy.stride(),
        *[None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors],
    )  # fmt: skip
    prepared = _prepared.get(key)
    if prepared is None:
        if len(_prepared) >= _MOST_PREPARED:
            _prepared.clear()
        rest = flags if dy is None else (dy, *flags)
        prepared = _prepared[key] = make(tensors, settings, *rest)
    return prepared


def _dense(tensors):
    """x, dt, B, C and z as they are, the small tensors (A, D, …) without gaps."""
    x, dt, A, B, C, D, z, *rest = tensors
    A, D, *rest = (t if t is None or t.is_contiguous() else t.contiguous() for t in (A, D, *rest))
    return (x, dt, A, B, C, D, z, *rest)


def _forward(
    x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, dt_softplus, low, high, reverse,
    return_final_states, save_ungated,
):  # fmt: skip
    """y, the final states and y before the gate; None for what was not asked for."""
    with _on(x.device):
        tensors = _dense((x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens))
        settings = dt_softplus, low, high, reverse
        design = _ChunkedForward if dt.dim() == 4 and B.shape[-1] >= CHUNKED_DSTATE else _Forward
        call = _prepare(design, tensors, settings, None, return_final_states, save_ungated)
        y = torch.empty(call.shape, dtype=x.dtype, device=x.device)
        final = ungated = workspace = states = None
        if return_final_states:
            final = torch.empty(call.state_shape, dtype=torch.float32, device=x.device)
        if save_ungated:
            ungated = torch.empty_like(y)
        if call.floats:
            workspace = torch.empty(call.floats, dtype=torch.float32, device=x.device)
            states = call.states_in(workspace)
        call.run([y if t is None else t for t in (*tensors, y, ungated, final, workspace, states)])
    return y, final, ungated


def _backward(
    dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, ungated, dt_softplus,
    low, high, reverse,
):  # fmt: skip
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_states, None for what is not there."""
    with _on(x.device):
        tensors = _dense((x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens))
        settings = dt_softplus, low, high, reverse
        dz = dinit = None
        if z is not None:
            dy, dz = _gate_backward(dy, z, ungated)
        dfinal = None if dfinal is None else dfinal.contiguous()
        call = _prepare(_Backward, tensors, settings, dy, dfinal is not None)
        workspace = torch.empty(call.floats, dtype=torch.float32, device=x.device)
        states = call.states_in(workspace)
        dx, dB, dC = (_gradient(t, not call.merged) for t in (x, B, C))
        ddt, dA = _gradient(dt), _gradient(A)
        dbias = None if dt_bias is None else _gradient(dt_bias)
        dD = None if D is None else _gradient(D)
        if initial_states is not None:
            dinit = torch.empty(call.state_shape, dtype=torch.float32, device=x.device)
        x_, dt_, A_, B_, C_, D_, _, *small = tensors
        call.run([
            workspace if t is None else t
            for t in (x_, dt_, A_, B_, C_, D_, *small, dy, dfinal, workspace, states,
                      dx, ddt, dA, dB, dC, dD, dbias, dinit)
        ])  # fmt: skip
        if not call.merged:
            dx, dB, dC = (
                grad.sum(0) if like.dim() == 4 else grad
                for grad, like in ((dx, x), (dB, B), (dC, C))
            )
        if dinit is not None:
            dinit = dinit.to(initial_states.dtype)
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dinit


def _gate_backward(dout: Tensor, z: Tensor, ungated: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y = u silu(z) for u and z."""
    _, l, h, p = z.shape
    dz = _gradient(z)
    dy = torch.empty_like(dz)
    count = dz.numel()
    gate_backward_kernel[(-(-count // GATE_BLOCK),)](
        dout, z, ungated, dy, dz, *dout.stride(), *z.stride(), l, h, p, count, GATE_BLOCK
    )
    return dy, dz


def _gradient(like: Tensor, paired: bool = False) -> Tensor:
    """Room for the gradient of `like`, one for each direction if `paired` and not so already."""
    shape = (2, *like.shape) if paired and like.dim() == 4 else like.shape
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _strides(t: Tensor, dims: int) -> tuple[int, ...]:
    """Strides with a 0 in front for the direction where `t` has none."""
    strides = t.stride()
    return strides if len(strides) == dims else (0, *strides)


def _present(t: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors only: an empty one stands for none."""
    return torch.empty(0, dtype=like.dtype, device=like.device) if t is None else t


def _on(device: torch.device) -> Any:
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def _fake_forward(
    x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, dt_softplus, low, high, reverse,
    return_final_states, save_ungated,
):  # fmt: skip
    b, l, h, p = x.shape[-4:]
    y = x.new_empty((b, l, h, p))
    pair = (2,) if dt.dim() == 4 else ()
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = (*pair, sequences, h, p, B.shape[-1])
    final = x.new_empty(states if return_final_states else (0,), dtype=torch.float32)
    if not return_final_states:
        final = x.new_empty((0,))
    return y, final, x.new_empty((b, l, h, p) if save_ungated else (0,))


def _fake_backward(
    dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, ungated, dt_softplus,
    low, high, reverse,
):  # fmt: skip
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    return [t.new_empty(t.shape) for t in inputs if t is not None]


class _SSD(torch.autograd.Function):
    """The gradient of ssd_triton_forward, below which it runs again without autograd.

    torch.library.register_autograd does the same, but reads the operator's schema on every call,
    which takes longer than a small forward. Without dispatch keys it calls the kernels itself.
    """

    @staticmethod
    def forward(ctx, keys, *inputs):
        if keys is None:
            output = _forward(*inputs)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                output = _forward_op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)
        *tensors, dt_softplus, low, high, reverse, _, _ = inputs
        ctx.set_materialize_grads(False)
        if output[2] is not None:
            ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors, output[2])
        ctx.settings = dt_softplus, low, high, reverse
        return output

    @staticmethod
    def backward(ctx, dy, dfinal, _):
        *tensors, ungated = ctx.saved_tensors
        if dy is None:
            x = tensors[0]
            dy = x.new_zeros(()).expand(x.shape[-4:])
        if is_plain(dy, dfinal, *tensors):
            grads = _backward(dy, dfinal, *tensors, ungated, *ctx.settings)
            return None, *grads, *(None,) * 7
        given = iter(_backward_op(dy, dfinal, *tensors, _present(ungated, dy), *ctx.settings))
        *differentiable, _ = tensors  # cu_seqlens has none
        return None, *(None if t is None else next(given) for t in differentiable), *(None,) * 7


def _forward_as_op(*inputs):
    y, final, ungated = _forward(*inputs)
    return y, _present(final, y), _present(ungated, y)


def _backward_as_op(*inputs):
    return [t for t in _backward(*inputs) if t is not None]


def _autograd(keys, *inputs):
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
        return _SSD.apply(keys, *inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)


_TENSORS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_states, Tensor? cu_seqlens"
)
_SETTINGS = "bool dt_softplus, float low, float high, bool reverse"
_library = torch.library.Library("mamba2_apps", "FRAGMENT")
_library.define(
    f"ssd_triton_forward({_TENSORS}, {_SETTINGS}, bool return_final_states, bool save_ungated)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"ssd_triton_backward(Tensor dy, Tensor? dfinal, {_TENSORS}, Tensor ungated, {_SETTINGS})"
    " -> Tensor[]"
)
for _key in ("CUDA", "CPU"):
    _library.impl("ssd_triton_forward", _forward_as_op, _key)
    _library.impl("ssd_triton_backward", _backward_as_op, _key)
torch.library.register_fake("mamba2_apps::ssd_triton_forward", _fake_forward, lib=_library)
torch.library.register_fake("mamba2_apps::ssd_triton_backward", _fake_backward, lib=_library)
_library.impl("ssd_triton_forward", _autograd, "Autograd", with_keyset=True)
_forward_op = torch.ops.mamba2_apps.ssd_triton_forward.default
_backward_op = torch.ops.mamba2_apps.ssd_triton_backward.default
