"""The SSD on Triton: shapes to launches, workspaces, and registration with torch.library.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · chunk q

A forward is two launches (states, then y); a backward is five (S and R, then dx, then dB and dC,
then ddt, then the ordered sums). One more each where batch × heads is too small to fill the GPU and
the sequence is cut into segments, and one more in a backward with z. Both directions share all of
them. How a shape is cut is a rule of its sizes (`plan_of`), not a search. Nothing large is kept
from forward to backward: chunk states are computed again, which costs less than their memory.

A small shape takes less time on the GPU than Triton's launcher takes to look at sixty arguments, so
what follows from shapes, strides and flags alone is prepared once (`_prepare`), and the kernels
compiled for it are kept and called directly.
"""

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from . import ssd_triton_interpreter  # noqa: F401
from .dispatch import HALF, interpreting
from .ssd_triton_backward import (
    chunk_backward_kernel,
    gate_backward_kernel,
    reduce_kernel,
    shared_backward_kernel,
    step_backward_kernel,
)
from .ssd_triton_forward import chunk_forward_kernel
from .ssd_triton_scan import carry_segments_kernel, scan_kernel

SUM_BLOCK = 1024
GATE_BLOCK = 1024
SEGMENT_BLOCK = 32
STATE_BLOCK = 64
STEP_TOKENS = 1024


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
    y, states, _ = _forward_op(
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
    y, states, _ = _forward_op(
        x, dt, A, B, C, D, None, dt_bias, initial_states, cu_seqlens, dt_softplus,
        float(dt_limit[0]), float(dt_limit[1]), False, return_final_states, False,
    )  # fmt: skip
    return y, states if return_final_states else None


@dataclass(frozen=True)
class Tiling:
    """How tokens are cut, and the warps and stages of each kernel."""

    chunk: int  # tokens between stored states
    tile: int  # tokens of a program of the quadratic kernels: chunk or chunk / 2
    scan_warps: int = 4
    scan_stages: int = 2
    forward_warps: int = 4
    forward_stages: int = 3
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
            chunk=64, tile=32, forward_stages=1, backward_stages=1, shared_stages=1, shared_warps=4
        )
    # As many stages as leave shared memory for two programs; tiles over dstate leave for none.
    stages = 1 if n > 128 else 2 if directions == 2 and n > 64 else 3
    if l > 64:
        return Tiling(chunk=128, tile=64, forward_stages=stages, backward_stages=stages)
    return Tiling(chunk=64, tile=64, forward_stages=stages, backward_stages=stages, shared_warps=4)


@dataclass(frozen=True)
class Plan:
    """Everything about a call that follows from its sizes: grids, offsets, splits."""

    slots: int  # chunks a row
    tiles: int
    segments: int
    segment_slots: int
    lines: int  # kinds of state × directions × rows × heads
    state_tiles: tuple[int, int]  # of the scan, over headdim and dstate
    p_tiles: int
    n_tiles: int
    served: int  # directions that the quadratic backward kernels run one at a time
    forward_split: tuple[int, int]  # programs per group of heads, heads per program
    backward_split: tuple[int, int]
    shared_split: tuple[int, int]
    step_slots: int
    offsets: dict[str, int]  # into the float32 workspace, in elements
    floats: int
    carried: int  # offsets into the workspace of x's dtype
    mix: int
    states: int


def plan_of(
    rows: int, nseq: int, l: int, h: int, p: int, g: int, n: int, directions: int, merged: bool,
    backward: bool, d_rows: int, dtype: torch.dtype, processors: int,
) -> tuple[Tiling, Plan]:  # fmt: skip
    cut = tiling(l, n, directions, dtype)
    q = cut.chunk
    slots = l // q + nseq if nseq else -(-l // q)
    tiles = slots * (q // cut.tile)
    lines = (1 + backward) * directions * rows * h
    state_tiles = -(-p // _p_block(p, dtype)), -(-n // _scan_n_block(n))
    p_tiles, n_tiles = -(-p // _p_block(p, dtype)), -(-n // _n_block(n, dtype))
    served = 1 if merged else directions

    programs = lines * state_tiles[0] * state_tiles[1]
    segments = max(1, min(cut.scan_programs * processors // programs, slots // cut.least_segment))
    segment_slots = -(-slots // segments)
    segments = -(-slots // segment_slots)
    segmented = segments > 1
    if segmented and directions == 2 and n > 64 and dtype != torch.float32:
        # What entered a segment is staged beside S and R: a third stage would not fit.
        cut = replace(cut, shared_stages=2)

    def split(programs: int, per_processor: int) -> tuple[int, int]:
        splits = min(h // g, max(1, -(-per_processor * processors // programs)))
        each = -(-(h // g) // splits)
        return -(-(h // g) // each), each

    forward_split = split(rows * tiles * g, cut.forward_programs)
    backward_split = split(served * rows * tiles * g, cut.backward_programs)
    shared_split = split(2 * served * rows * slots * g * n_tiles, cut.shared_programs)
    step_slots = 1 if nseq else max(1, min(STEP_TOKENS // q, triton.next_power_of_2(slots)))

    offsets: dict[str, int] = {}
    floats = 0

    def reserve(name: str, size: int) -> None:
        nonlocal floats
        offsets[name] = floats
        floats += -(-size // 32) * 32

    vector = directions * rows * h * slots * q
    reserve("cum", vector)
    reserve("dtp", vector)
    reserve("fade", lines * slots * segmented)
    reserve("marks", lines * segments * 4 * segmented)
    reserve("carry", lines * segments * p * n * segmented)
    if backward:
        for name in ("row", "far", "column", "column_far"):
            reserve(name, vector)
        reserve("into", n_tiles * vector)
        reserve("out", n_tiles * vector)
        reserve("overlap", n_tiles * vector // q)
        reserve("dA", directions * h * rows * -(-slots // step_slots))
        reserve("dbias", directions * h * rows * -(-slots // step_slots))
        reserve("dD", d_rows * served * rows * tiles)
        split_size = shared_split[0] * served * rows * l * g * n * (shared_split[0] > 1)
        reserve("dB", split_size)
        reserve("dC", split_size)
    carried = -(-lines * slots * p * n // 32) * 32
    mix = carried + -(-lines * segments * p * n * segmented // 32) * 32
    states = mix + served * rows * g * backward_split[0] * slots * q * q * backward
    return cut, Plan(
        slots, tiles, segments, segment_slots, lines, state_tiles, p_tiles, n_tiles, served,
        forward_split, backward_split, shared_split, step_slots, offsets, floats, carried, mix,
        states,
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


Launch = tuple[Any, int, int, tuple]  # kernel, programs, warps, arguments


class _Prepared:
    """What calls of equal shapes, strides and flags have in common."""

    def __init__(self, tensors: tuple[Any, ...], settings: tuple, dy: Tensor | None,
                 has_final: bool, has_dfinal: bool):  # fmt: skip
        x, dt, _, B, C, D, z, dt_bias, initial_states, cu_seqlens = tensors
        softplus, low, high, reverse = settings
        self.backward = dy is not None
        self.directions = 2 if dt.dim() == 4 else 1
        self.shape = b, l, h, p = tuple(x.shape[-4:])
        g, n = B.shape[-2:]
        packed = cu_seqlens is not None
        self.sequences = cu_seqlens.shape[0] - 1 if packed else b
        shared = not (x.dim() == 5 or B.dim() == 5 or C.dim() == 5)
        x_shared = x.dim() == 4
        self.merged = self.directions == 1 or shared
        d_rows = 0 if D is None else D.numel()
        self.cut, self.plan = cut, plan = plan_of(
            b, self.sequences if packed else 0, l, h, p, g, n, self.directions, self.merged,
            self.backward, d_rows, x.dtype, _processors(x.device),
        )  # fmt: skip
        pair = (2,) if self.directions == 2 else ()
        self.state_shape = (*pair, self.sequences, h, p, n)
        self.compiled: dict[Any, Any] = {}
        self.device_index = x.device.index

        at = plan.offsets
        inputs = (*_strides(x, 5), *_strides(B, 5), *_strides(C, 5))
        of_dy = (0, 0, 0, 0) if dy is None else dy.stride()
        of_dt = _strides(dt, 4)
        dot = _precision(x.dtype)
        p_block, n_block, q = _p_block(p, x.dtype), _n_block(n, x.dtype), cut.chunk
        reverse = int(reverse)
        nseq = self.sequences if packed else 0
        group_heads = h // g
        each = self.directions // plan.served
        segmented = plan.segments > 1
        segments = plan.segments, plan.segment_slots
        has_bias = dt_bias is not None
        d_matrix = D is not None and D.dim() == 2

        self.scan_grid = plan.lines * plan.state_tiles[0] * plan.state_tiles[1] * plan.segments
        self.scan_args = (
            *inputs, *of_dy, *of_dt, at["cum"], at["dtp"], at["fade"], at["marks"], at["carry"],
            low, high, l, nseq, plan.slots, b, h, group_heads, *segments, reverse, p, n,
            self.directions, self.backward, has_bias, initial_states is not None, has_final,
            has_dfinal, self.backward and initial_states is not None, softplus, packed, segmented,
            *plan.state_tiles, q, p_block, _scan_n_block(n), dot, cut.scan_stages,
        )  # fmt: skip
        self.carry_grid = plan.lines * -(-p * n // STATE_BLOCK) if segmented else 0
        self.carry_args = (
            at["marks"], at["carry"], plan.carried, nseq, b, h, plan.segments, reverse, p, n,
            self.directions, packed, has_final, self.backward and initial_states is not None,
            max(2, min(SEGMENT_BLOCK, triton.next_power_of_2(plan.segments))), STATE_BLOCK,
        )  # fmt: skip
        if not self.backward:
            self.forward_grid = b * plan.tiles * g * plan.forward_split[0]
            self.forward_args = (
                *inputs, *((0, 0, 0, 0) if z is None else z.stride()),
                at["cum"], at["dtp"], at["fade"], plan.carried, l, nseq, plan.slots, b, h,
                group_heads, plan.forward_split[1], plan.forward_split[0], plan.tiles, *segments,
                reverse, p, n, self.directions, shared, x_shared, D is not None, d_matrix,
                z is not None,
            )  # fmt: skip
            self.forward_constants = (
                packed, segmented, plan.p_tiles, plan.n_tiles, q, cut.tile, p_block, n_block, dot,
                cut.forward_stages,
            )  # fmt: skip
            return

        splits, per_program = plan.backward_split
        blocks = (
            self.directions // plan.served * (cut.chunk // cut.tile - 1) + cut.chunk // cut.tile
        )
        jobs = plan.slots * (cut.chunk // cut.tile + blocks)
        self.chunk_grid = plan.served * b * jobs * g * splits
        self.chunk_args = (
            *inputs, *of_dy, at["cum"], at["dtp"], at["fade"], plan.carried, at["row"], at["far"],
            at["column"], at["column_far"], at["dD"], plan.mix, l, nseq, plan.slots, b, h,
            group_heads, per_program, splits, plan.tiles, *segments, reverse, p, n,
            self.directions, each, x_shared, D is not None, d_matrix, packed, segmented,
            plan.p_tiles, plan.n_tiles, q, cut.tile, p_block, n_block, dot, cut.backward_stages,
            blocks,
        )  # fmt: skip
        self.split, per_program = plan.shared_split
        self.shared_grid = 2 * plan.served * b * plan.slots * g * plan.n_tiles * self.split
        self.shared_args = (
            *inputs, *of_dy, at["cum"], at["dtp"], at["fade"], plan.carried, at["into"], at["out"],
            at["overlap"], plan.mix, *((at["dB"], at["dC"]) if self.split > 1 else (0, 0)),
            l, nseq, plan.slots, b, h, group_heads, per_program, self.split, splits, *segments,
            reverse, p, n, self.directions, each, packed, segmented, plan.p_tiles, plan.n_tiles, q,
            cut.tile, p_block, n_block, dot, cut.shared_stages,
        )  # fmt: skip
        blocks = -(-plan.slots // plan.step_slots)
        self.step_grid = self.directions * b * h * blocks
        self.step_args = (
            *of_dt, at["dtp"], at["row"], at["far"], at["column"], at["column_far"], at["into"],
            at["out"], at["overlap"], at["dA"], at["dbias"], low, high, l, nseq, plan.slots, b,
            h, reverse, self.directions, has_bias, softplus, packed, plan.n_tiles, q, cut.tile,
            plan.step_slots,
        )  # fmt: skip
        size = plan.served * b * l * g * n
        self.reduce_grid = self.directions * h * (1 + has_bias) + d_rows
        if self.split > 1:
            self.reduce_grid += -(-size // SUM_BLOCK)
        self.reduce_args = (
            at["dA"], at["dbias"], at["dD"], at["dB"], at["dC"], h, d_rows, b * blocks,
            plan.served * b * plan.tiles, self.split, size, self.directions, has_bias,
            D is not None, self.split > 1, SUM_BLOCK,
        )  # fmt: skip

    def workspaces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (
            torch.empty(self.plan.floats, dtype=torch.float32, device=x.device),
            torch.empty(self.plan.states, dtype=x.dtype, device=x.device),
        )

    def scan(self, tensors, dy, final, dfinal, dinit, floats, states) -> list[Launch]:
        """States of all chunks: S, and in a backward pass R too."""
        x, dt, A, B, C, _, _, dt_bias, initial_states, cu_seqlens = tensors
        final, dinit = _or(final, floats), _or(dinit, floats)
        scan = (
            scan_kernel, self.scan_grid, self.cut.scan_warps,
            (x, B, _or(dy, x), C, dt, A, _or(dt_bias, floats), _or(initial_states, floats), final,
             _or(dfinal, floats), dinit, _or(cu_seqlens, floats), floats, states, *self.scan_args),
        )  # fmt: skip
        if not self.carry_grid:
            return [scan]
        carry = floats, states, final, dinit, *self.carry_args
        return [scan, (carry_segments_kernel, self.carry_grid, 4, carry)]

    def run(self, variant, launches: list[Launch]) -> None:
        """kernel[grid](*args) for each, but Triton looks at the arguments the first time only.

        `variant` is what the compiled kernels depend on beside what was prepared.
        """
        compiled = self.compiled.get(variant)
        if compiled is None:
            self.compiled[variant] = self._first_run(launches)
        elif compiled and not _is_watched():
            stream = driver.active.get_current_stream(self.device_index)
            for kernel, (_, grid, _, args) in zip(compiled, launches, strict=True):
                kernel.run(
                    grid, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None,
                    *args,
                )  # fmt: skip
        else:  # the interpreter, or a profiler that wants to know more
            for kernel, grid, warps, args in launches:
                kernel[(grid,)](*args, num_warps=warps)

    def _first_run(self, launches: list[Launch]) -> list[Any]:
        if interpreting():
            for kernel, grid, _, args in launches:
                kernel[(grid,)](*args)
            return []
        # The compiler leaves Python's lock: what is not in Triton's cache compiles side by side.
        device = torch.cuda.current_device()

        def compile_one(launch: Launch) -> None:
            kernel, grid, warps, args = launch
            torch.cuda.set_device(device)
            kernel.warmup(*args, grid=(grid,), num_warps=warps)

        with ThreadPoolExecutor(len(launches)) as pool:
            list(pool.map(compile_one, launches))
        return [kernel[(grid,)](*args, num_warps=warps) for kernel, grid, warps, args in launches]


def _is_watched() -> bool:
    """Whether a profiler asked Triton to be told of launches."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


_prepared: dict[Any, _Prepared] = {}
_MOST_PREPARED = 4096


def _prepare(tensors, settings, dy, has_final, has_dfinal) -> _Prepared:
    """The prepared call for these shapes, strides, dtypes and flags, made on its first use."""
    key = (
        settings, has_final, has_dfinal, torch.backends.cuda.matmul.allow_tf32, tensors[0].device,
        None if dy is None else dy.stride(),
        *[None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors],
    )  # fmt: skip
    prepared = _prepared.get(key)
    if prepared is None:
        if len(_prepared) >= _MOST_PREPARED:
            _prepared.clear()
        prepared = _Prepared(tensors, settings, dy, has_final, has_dfinal)
        _prepared[key] = prepared
    return prepared


def _alignment(*tensors: Tensor | None):
    """None when all pointers are multiples of 16, as Triton prefers, else which are not."""
    union = 0
    for t in tensors:
        if t is not None:
            union |= t.data_ptr()
    if union % 16 == 0:
        return None
    return tuple(t is not None and t.data_ptr() % 16 for t in tensors)


def _dense(tensors):
    """x, dt, B, C and z as they are, the small tensors (A, D, …) without gaps."""
    x, dt, A, B, C, D, z, *rest = tensors
    A, D, *rest = (t if t is None or t.is_contiguous() else t.contiguous() for t in (A, D, *rest))
    return (x, dt, A, B, C, D, z, *rest)


def _forward(
    x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, dt_softplus, low, high, reverse,
    return_final_states, save_ungated,
):  # fmt: skip
    with _on(x.device):
        tensors = _dense((x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens))
        settings = dt_softplus, low, high, reverse
        call = _prepare(tensors, settings, None, return_final_states, False)
        alignment = _alignment(*tensors)
        floats, states = call.workspaces(x)
        y = torch.empty(call.shape, dtype=x.dtype, device=x.device)
        final = ungated = None
        if return_final_states:
            final = torch.empty(call.state_shape, dtype=torch.float32, device=x.device)
        if save_ungated:
            ungated = torch.empty_like(y)
        launches = call.scan(tensors, None, final, None, None, floats, states)
        arguments = (
            x, B, C, _or(tensors[5], floats), _or(z, y), y, _or(ungated, y),
            _or(tensors[9], floats), floats, states, *call.forward_args, save_ungated,
            *call.forward_constants,
        )  # fmt: skip
        launches.append(
            (chunk_forward_kernel, call.forward_grid, call.cut.forward_warps, arguments)
        )
        call.run((alignment, save_ungated), launches)
    return y, _present(final, y), _present(ungated, y)


def _backward(
    dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, ungated, dt_softplus,
    low, high, reverse,
):  # fmt: skip
    with _on(x.device):
        tensors = _dense((x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens))
        _, _, A_, _, _, D_, _, dt_bias_, _, cu_seqlens_ = tensors
        settings = dt_softplus, low, high, reverse
        dz = None
        if z is not None:
            dy, dz = _gate_backward(dy, z, ungated)
        dfinal = None if dfinal is None else dfinal.contiguous()
        call = _prepare(tensors, settings, dy, False, dfinal is not None)
        alignment = _alignment(*tensors, dy, dfinal)
        floats, states = call.workspaces(x)
        dinit = None
        if initial_states is not None:
            dinit = torch.empty(call.state_shape, dtype=torch.float32, device=x.device)
        launches = call.scan(tensors, dy, None, dfinal, dinit, floats, states)

        dx, dB, dC = (_gradient(t, not call.merged) for t in (x, B, C))
        ddt, dA = _gradient(dt), _gradient(A)
        dbias = None if dt_bias is None else _gradient(dt_bias)
        dD = None if D is None else _gradient(D)
        cut, cu = call.cut, _or(cu_seqlens_, floats)
        shared = (floats, floats) if call.split > 1 else (dB, dC)
        launches += [
            (chunk_backward_kernel, call.chunk_grid, cut.backward_warps,
             (x, B, C, _or(D_, floats), dy, dx, cu, floats, states, *call.chunk_args)),
            (shared_backward_kernel, call.shared_grid, cut.shared_warps,
             (x, B, C, dy, *shared, cu, floats, states, *call.shared_args)),
            (step_backward_kernel, call.step_grid, 4,
             (dt, A_, _or(dt_bias_, floats), ddt, cu, floats, *call.step_args)),
            (reduce_kernel, call.reduce_grid, 4,
             (floats, dA, _or(dbias, floats), _or(dD, floats), dB, dC, *call.reduce_args)),
        ]  # fmt: skip
        call.run(alignment, launches)
        if not call.merged:
            dx, dB, dC = (
                grad.sum(0) if like.dim() == 4 else grad
                for grad, like in ((dx, x), (dB, B), (dC, C))
            )
        if dinit is not None:
            dinit = dinit.to(initial_states.dtype)
    return [t for t in (dx, ddt, dA, dB, dC, dD, dz, dbias, dinit) if t is not None]


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


def _or(t: Tensor | None, unused: Tensor) -> Tensor:
    return unused if t is None else t


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
    which takes longer than a small forward.
    """

    @staticmethod
    def forward(ctx, keys, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = _forward_op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)
        *tensors, dt_softplus, low, high, reverse, _, _ = inputs
        ctx.set_materialize_grads(False)
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
        grads = iter(_backward_op(dy, dfinal, *tensors, ungated, *ctx.settings))
        *differentiable, _ = tensors  # cu_seqlens has none
        return None, *(None if t is None else next(grads) for t in differentiable), *(None,) * 7


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
    _library.impl("ssd_triton_forward", _forward, _key)
    _library.impl("ssd_triton_backward", _backward, _key)
torch.library.register_fake("mamba2_apps::ssd_triton_forward", _fake_forward, lib=_library)
torch.library.register_fake("mamba2_apps::ssd_triton_backward", _fake_backward, lib=_library)
_library.impl("ssd_triton_forward", _autograd, "Autograd", with_keyset=True)
_forward_op = torch.ops.mamba2_apps.ssd_triton_forward.default
_backward_op = torch.ops.mamba2_apps.ssd_triton_backward.default
