"""The launches of an SSD call, from its shapes, strides and flags.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · chunk q
"""

import functools
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor

from . import ssd_triton_interpreter  # noqa: F401
from . import ssd_triton_plan as planning
from .launching import Launch, Prepared, dot_precision
from .ssd_triton_backward import (
    chunk_backward_kernel,
    reduce_kernel,
    shared_backward_kernel,
    step_backward_kernel,
)
from .ssd_triton_chunks import chunk_forward_kernel
from .ssd_triton_forward import forward_kernel
from .ssd_triton_scan import carry_segments_kernel, scan_kernel
from .ssd_triton_segments import segment_states_kernel

FAR = 2**31
SUM_BLOCK = 1024
SEGMENT_BLOCK = 32
STATE_BLOCK = 64


@functools.lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


class _WithStates(Prepared):
    """A call whose workspace may hold states, which are of x's dtype."""

    states = 0  # offset into the workspace

    def __init__(self, x: Tensor) -> None:
        super().__init__(x.device)
        self.dtype = x.dtype

    def states_in(self, workspace: Tensor) -> Tensor:
        return workspace[self.states :].view(self.dtype)


class _Call:
    """What the arguments of a call say, whatever their values."""

    def __init__(self, tensors: Sequence[Any], settings: tuple) -> None:
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
        self.dot = dot_precision(x.dtype)
        self.p_block, self.n_block = (
            planning.p_block(self.p, x.dtype),
            planning.n_block(self.n, x.dtype),
        )
        # Whether no tile reaches beyond the last channel or the last of the state.
        self.full = self.p % self.p_block == 0 and self.n % self.n_block == 0
        scan_n_block = planning.scan_n_block(self.n)
        self.scan_full = self.p % self.p_block == 0 and self.n % scan_n_block == 0
        self.processors = _processors(x.device)
        self.far = any(_is_far(t) for t in (x, B, C, z, dt.unsqueeze(-1)))
        pair = (2,) if self.directions == 2 else ()
        self.state_shape = (*pair, self.nseq or self.b, self.h, self.p, self.n)


class Forward(_WithStates):
    # x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, y, ungated, final, workspace
    SCAN = itemgetter(0, 3, 0, 4, 1, 2, 7, 8, 12, 13, 13, 9, 13, 13)
    STATES = itemgetter(0, 3, 1, 2, 7, 8, 13)
    CARRY = itemgetter(13, 13, 12, 13)
    WALK = itemgetter(0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 9, 13)

    def __init__(self, tensors, settings, has_final: bool, save_ungated: bool) -> None:
        super().__init__(tensors[0])
        c = _Call(tensors, settings)
        self.shape, self.state_shape, self.far = c.shape, c.state_shape, c.far
        self.cut, self.plan = cut, plan = planning.forward_plan(
            c.b, c.nseq, c.l, c.h, c.p, c.n, c.directions, c.dtype, c.processors
        )
        self.floats, at = plan.floats, plan.offsets
        segmented = plan.segments > 1
        self.launches = self._of_segments(c) if segmented else []
        both = c.directions == 2 and c.merged and plan.n_tiles == 1
        walk = (
            *c.inputs, *c.of_z, *c.of_dt, *(at.get(k, 0) for k in ("marks", "carry", "carried")),
            c.low, c.high, c.l, c.nseq, plan.slots, c.b, c.h, c.h // c.g, plan.segments,
            plan.segment_slots, c.reverse, c.p, c.n, c.directions, both, c.x_shared, c.has_bias,
            c.has_d, c.d_matrix, tensors[6] is not None, save_ungated, c.has_init, has_final,
            c.softplus, c.packed, segmented, plan.chained, c.full, plan.p_tiles, plan.n_tiles,
            cut.forward_chunk, c.p_block, c.n_block, c.dot, cut.forward_stages,
        )  # fmt: skip
        programs = c.b * c.h * plan.p_tiles * plan.segments
        self.launches.append(Launch(forward_kernel, programs, cut.forward_warps, self.WALK, walk))

    def _of_segments(self, c: _Call) -> list[Launch]:
        """What comes before the walks: the states that segments leave, and what enters each."""
        cut, plan, at = self.cut, self.plan, self.plan.offsets
        slots, segment_slots = -(-plan.slots // plan.joined), plan.segment_slots // plan.joined
        blocks = (
            plan.p_tiles, plan.scan_n_tiles, cut.forward_chunk * plan.joined, c.p_block,
            planning.scan_n_block(c.n), c.dot, cut.scan_stages,
        )  # fmt: skip
        programs = c.b * c.h * plan.p_tiles * plan.scan_n_tiles * plan.segments
        if c.directions == 2 and c.merged and not c.packed:
            states = (
                *c.inputs[1:5], *c.inputs[6:10], *c.of_dt, at["marks"], at["carry"], c.low, c.high,
                c.l, slots, c.b, c.h, c.h // c.g, plan.segments, segment_slots, c.p, c.n,
                c.has_bias, c.has_init, c.softplus, c.scan_full, *blocks,
            )  # fmt: skip
            kernel: Any = segment_states_kernel
            pick: itemgetter[Any] = self.STATES
        else:
            states = (
                *c.inputs, 0, 0, 0, 0, *c.of_dt, 0, 0, 0, at["marks"], at["carry"], c.low, c.high,
                c.l, c.nseq, slots, 0, c.b, c.b, c.h, c.h // c.g, plan.segments, segment_slots,
                c.reverse, c.p, c.n, c.directions, False, False, c.has_bias, c.has_init, False,
                False, False, c.softplus, c.packed, True, c.scan_full, *blocks,
            )  # fmt: skip
            kernel, pick = scan_kernel, self.SCAN
            programs *= c.directions
        launches = [Launch(kernel, programs, cut.scan_warps, pick, states)]
        if not plan.chained:
            carry = (
                at["marks"], at["carry"], at["carried"], c.nseq, c.b, c.b, c.h, plan.segments,
                c.reverse, c.p, c.n, c.directions, c.packed, False, False,
                _segment_block(plan.segments), STATE_BLOCK,
            )  # fmt: skip
            blocks_of_state = plan.lines * -(-c.p * c.n // STATE_BLOCK)
            launches.append(Launch(carry_segments_kernel, blocks_of_state, 4, self.CARRY, carry))
        return launches


class ChunkedForward(_WithStates):
    # As Forward, and the states.
    SCAN = itemgetter(0, 3, 0, 4, 1, 2, 7, 8, 12, 13, 13, 9, 13, 14)
    CARRY = itemgetter(13, 14, 12, 13)
    CHUNK = itemgetter(0, 3, 4, 5, 10, 9, 13, 14)

    def __init__(self, tensors, settings, has_final: bool, save_ungated: bool) -> None:
        super().__init__(tensors[0])
        self.call = c = _Call(tensors, settings)
        self.shape, self.state_shape, self.far = c.shape, c.state_shape, c.far
        self.cut, self.plan = planning.chunked_plan(
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
            c.softplus, c.packed, segmented, c.scan_full, *plan.state_tiles, cut.chunk, c.p_block,
            planning.scan_n_block(c.n), c.dot, cut.scan_stages,
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
            c.merged, c.x_shared, c.has_d, c.d_matrix, c.packed, segmented, c.full, plan.p_tiles,
            plan.n_tiles, cut.chunk, cut.tile, c.p_block, c.n_block, c.dot, cut.backward_stages,
        )  # fmt: skip
        programs = rows * plan.tiles * c.g * splits
        launches.append(Launch(chunk_forward_kernel, programs, 4, self.CHUNK, chunk))
        return launches


class Backward(_WithStates):
    # x, dt, A, B, C, D, dt_bias, initial_states, cu_seqlens, dy, dfinal, workspace, states,
    # dx, ddt, dA, dB, dC, dD, dbias, dinit
    SCAN = itemgetter(0, 3, 9, 4, 1, 2, 6, 7, 11, 10, 20, 8, 11, 12)
    CARRY = itemgetter(11, 12, 11, 20)
    CHUNK = itemgetter(0, 3, 4, 5, 9, 13, 8, 11, 12)
    SHARED = itemgetter(0, 3, 4, 9, 16, 17, 8, 11, 12)
    SHARED_SPLIT = itemgetter(0, 3, 4, 9, 11, 11, 8, 11, 12)
    STEP = itemgetter(1, 2, 6, 14, 8, 11)
    REDUCE = itemgetter(11, 15, 19, 18, 16, 17)

    def __init__(self, tensors, settings, has_dfinal: bool, layout: Any) -> None:
        super().__init__(tensors[0])
        *tensors, dy = tensors
        self.call = c = _Call(tensors, settings)
        contiguous = c.h * c.p, c.g * c.n, c.b * c.l * c.h, c.h
        self.dx_sl, self.shared_sl, *of_ddt = layout or contiguous
        self.of_ddt = tuple(of_ddt)
        self.far = c.far or _is_far(dy)
        self.merged, self.state_shape = c.merged, c.state_shape
        self.of_dy = dy.stride()
        self.cut, self.plan = planning.backward_plan(
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
            c.g * c.n, self.shared_sl, c.directions, c.has_bias, c.has_d, splits > 1, SUM_BLOCK,
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
            c.softplus, c.packed, segmented, c.scan_full, *plan.state_tiles, cut.chunk, c.p_block,
            planning.scan_n_block(c.n), c.dot, cut.scan_stages,
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
            plan.tiles, *segments, c.reverse, self.dx_sl, c.p, c.n, c.directions, each,
            c.x_shared, c.has_d, c.d_matrix, c.packed, segmented, c.full, *blocks,
            cut.backward_stages,
            squares,
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
            shared_splits, splits, *segments, c.reverse,
            c.g * c.n if partial else self.shared_sl, c.p, c.n, c.directions, each, c.packed,
            segmented, c.full, *blocks, cut.shared_stages,
        )  # fmt: skip
        programs = 2 * plan.served * rows * plan.slots * c.g * plan.n_tiles * shared_splits
        pick = self.SHARED_SPLIT if partial else self.SHARED
        launches.append(Launch(shared_backward_kernel, programs, cut.shared_warps, pick, shared))

        step = (
            *c.of_dt, at["dtp"], at["row"], at["far"], at["column"], at["column_far"], at["into"],
            at["out"], at["overlap"], at["dA"], at["dbias"], c.low, c.high, *sizes, c.reverse,
            *self.of_ddt, c.directions, c.has_bias, c.softplus, c.packed, plan.n_tiles, cut.chunk,
            cut.tile, plan.step_slots,
        )  # fmt: skip
        programs = c.directions * rows * c.h * -(-plan.slots // plan.step_slots)
        launches.append(Launch(step_backward_kernel, programs, 4, self.STEP, step))
        return launches


def _strides(t: Tensor, dims: int) -> tuple[int, ...]:
    """Strides with a 0 in front for the direction where `t` has none."""
    strides = t.stride()
    return strides if len(strides) == dims else (0, *strides)


def _is_far(t: Tensor | None) -> bool:
    """Whether 32 bits are too few for the distances inside a chunk of a tensor (…, l, h, p)."""
    if t is None:
        return False
    return planning.MOST_CHUNK * t.stride(-3) + t.shape[-1] * t.stride(-1) >= FAR


def _segment_block(segments: int) -> int:
    return max(2, min(SEGMENT_BLOCK, triton.next_power_of_2(segments)))
