"""The SSD on Triton: shapes to launches, workspaces, and registration with torch.library.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · chunk q

A forward is two launches (states, then y), a backward three (S and R, then the gradients, then the
ordered sums), one more each where batch × heads is too small to fill the GPU and the sequence is
cut into segments, one more in a backward with z. Both directions share all of them. How a shape is
cut is a rule of its sizes (`_plan`), not a search. Nothing large is kept from forward to backward:
chunk states are computed again, which costs less than their memory.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import ssd_triton_interpreter  # noqa: F401
from .ssd_triton_backward import chunk_backward_kernel, gate_backward_kernel, reduce_kernel
from .ssd_triton_forward import chunk_forward_kernel
from .ssd_triton_scan import carry_segments_kernel, scan_kernel

SUM_BLOCK = 1024
GATE_BLOCK = 1024
SEGMENT_BLOCK = 32
STATE_BLOCK = 64


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
    y, states, _ = torch.ops.mamba2_apps.ssd_triton_forward(
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
    y, states, _ = torch.ops.mamba2_apps.ssd_triton_forward(
        x, dt, A, B, C, D, None, dt_bias, initial_states, cu_seqlens, dt_softplus,
        float(dt_limit[0]), float(dt_limit[1]), False, return_final_states, False,
    )  # fmt: skip
    return y, states if return_final_states else None


@dataclass(frozen=True)
class Tiling:
    """How tokens, headdim and dstate are cut, and the warps and stages of each kernel."""

    chunk: int  # tokens between stored states
    tile: int  # tokens of a program of the backward kernel: chunk or chunk / 2
    scan_warps: int = 4
    scan_stages: int = 3
    forward_warps: int = 8
    forward_stages: int = 2
    backward_warps: int = 8
    backward_stages: int = 1
    scan_programs: int = 2  # programs per multiprocessor below which a row is cut into segments
    least_segment: int = 4  # of this many chunks or more
    forward_programs: int = 4  # and below which the heads of a group are split over programs
    backward_programs: int = 2


def tiling(l: int, dtype: torch.dtype) -> Tiling:
    """The rule: halves of 64 in chunks of 128; float32 takes half of each, its products need it."""
    if dtype == torch.float32:
        return Tiling(chunk=64, tile=32, scan_stages=2, forward_stages=1)
    return Tiling(chunk=128, tile=64) if l > 64 else Tiling(chunk=64, tile=64, forward_warps=4)


@dataclass(frozen=True)
class Plan:
    """Everything about a call that follows from its shapes: grids, offsets, constants."""

    tiling: Tiling
    slots: int
    segments: int
    segment_slots: int
    scan_grid: int
    forward_splits: int
    forward_heads: int
    backward_splits: int
    backward_heads: int
    tiles: int
    offsets: dict[str, int]  # into the float32 workspace, in elements
    carried: int  # offset of what enters each segment, in the workspace of states
    floats: int
    states: int


@functools.lru_cache(maxsize=1024)
def _plan(
    rows: int, nseq: int, l: int, h: int, p: int, g: int, n: int, directions: int, merged: bool,
    backward: bool, d_rows: int, dtype: torch.dtype, processors: int, tiling: Tiling,
) -> Plan:  # fmt: skip
    q = tiling.chunk
    packed = nseq > 0
    slots = l // q + nseq if packed else -(-l // q)
    kinds = 2 if backward else 1
    lines = kinds * directions * rows * h
    blocks = -(-p // _p_block(p)) * -(-n // _scan_n_block(n))

    segments = max(
        1, min(tiling.scan_programs * processors // (lines * blocks), slots // tiling.least_segment)
    )
    segment_slots = -(-slots // segments)
    segments = -(-slots // segment_slots)

    group_heads = h // g
    forward_splits, forward_heads = _split(
        group_heads, rows * slots * g, tiling.forward_programs * processors
    )
    tiles = slots * (q // tiling.tile)
    served = 1 if merged else directions  # programs of the backward kernel per tile
    backward_splits, backward_heads = _split(
        group_heads, served * rows * tiles * g, tiling.backward_programs * processors
    )

    offsets, floats = {}, 0

    def reserve(name: str, size: int) -> None:
        nonlocal floats
        offsets[name] = floats
        floats += -(-size // 32) * 32

    reserve("cum", directions * rows * h * slots * q)
    reserve("dtp", directions * rows * h * slots * q)
    segmented = segments > 1
    reserve("fade", lines * slots * segmented)
    reserve("marks", lines * segments * 4 * segmented)
    reserve("carry", lines * segments * p * n * segmented)
    if backward:
        reserve("dA", directions * h * rows * tiles)
        reserve("dbias", directions * h * rows * tiles)
        reserve("dD", d_rows * served * rows * tiles)
        split_size = backward_splits * 2 * served * rows * l * g * n
        reserve("dBC", split_size if backward_splits > 1 else 0)
    carried = -(-lines * slots * p * n // 32) * 32
    return Plan(
        tiling, slots, segments, segment_slots, lines * blocks * segments,
        forward_splits, forward_heads, backward_splits, backward_heads, tiles,
        offsets, carried, floats, carried + lines * segments * p * n * segmented,
    )  # fmt: skip


def _split(heads: int, programs: int, wanted: int) -> tuple[int, int]:
    """(splits, heads per program) of a group's heads so that `wanted` programs run, if it can."""
    splits = min(heads, max(1, -(-wanted // programs)))
    per_program = -(-heads // splits)
    return -(-heads // per_program), per_program


def _power_of_two(size: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(size)))


def _p_block(p: int) -> int:
    return _power_of_two(p, 64)


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


class _Call:
    """One call's sizes, strides and constants, as the kernels take them."""

    def __init__(self, x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, softplus,
                 low, high, reverse, backward: bool):  # fmt: skip
        self.directions = 2 if dt.dim() == 4 else 1
        b, l, h, p = self.shape = x.shape[-4:]
        g, n = B.shape[-2:]
        self.x, self.dt, self.B, self.C = x, dt, B, C
        self.A, self.D, self.dt_bias = A.contiguous(), _dense(D), _dense(dt_bias)
        self.cu_seqlens = _dense(cu_seqlens)
        self.initial_states = _dense(initial_states)
        self.sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.shared = not (x.dim() == 5 or B.dim() == 5 or C.dim() == 5)
        self.merged = self.directions == 1 or self.shared
        self.low, self.high, self.softplus = low, high, softplus
        self.reverse = int(reverse)
        self.b, self.l, self.h, self.p, self.g, self.n = b, l, h, p, g, n
        self.d_rows = 0 if D is None else D.numel()
        self.nseq = 0 if cu_seqlens is None else self.sequences
        self.plan = _plan(
            b, self.nseq, l, h, p, g, n, self.directions, self.merged, backward, self.d_rows,
            x.dtype, _processors(x.device), tiling(l, x.dtype),
        )  # fmt: skip
        self.floats = torch.empty(self.plan.floats, dtype=torch.float32, device=x.device)
        self.states = torch.empty(self.plan.states, dtype=x.dtype, device=x.device)
        self.inputs = (*_strides(x, 5), *_strides(B, 5), *_strides(C, 5))
        self.p_block, self.n_block = _p_block(p), _n_block(n, x.dtype)

    def empty_states(self) -> Tensor:
        pair = (2,) if self.directions == 2 else ()
        shape = (*pair, self.sequences, self.h, self.p, self.n)
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def scan(self, dy: Tensor | None, final, dfinal, dinit) -> None:
        """States of all chunks: S, and R too when `dy` is given."""
        plan, cut, offsets = self.plan, self.plan.tiling, self.plan.offsets
        backward = dy is not None
        unused = self.floats
        scan_kernel[(plan.scan_grid,)](
            self.x, self.B, dy if backward else unused, self.C, self.dt, self.A,
            _or(self.dt_bias, unused), _or(self.initial_states, unused), _or(final, unused),
            _or(dfinal, unused), _or(dinit, unused), _or(self.cu_seqlens, unused),
            self.floats, self.states,
            *self.inputs, *(_strides(dy, 4) if backward else (0, 0, 0, 0)), *_strides(self.dt, 4),
            offsets["cum"], offsets["dtp"], offsets["fade"], offsets["marks"], offsets["carry"],
            self.low, self.high, self.l, self.nseq, plan.slots, self.b, self.h, self.h // self.g,
            plan.segments, plan.segment_slots, self.reverse, self.p, self.n,
            self.directions, backward, self.dt_bias is not None,
            self.initial_states is not None, final is not None, dfinal is not None,
            dinit is not None, self.softplus, self.cu_seqlens is not None,
            plan.segments > 1, -(-self.p // self.p_block), -(-self.n // _scan_n_block(self.n)),
            cut.chunk, self.p_block, _scan_n_block(self.n), _precision(self.x.dtype),
            cut.scan_stages, num_warps=cut.scan_warps,
        )  # fmt: skip
        if plan.segments > 1:
            lines = (1 + backward) * self.directions * self.b * self.h
            carry_segments_kernel[(lines * -(-self.p * self.n // STATE_BLOCK),)](
                self.floats, self.states, _or(final, unused), _or(dinit, unused),
                offsets["marks"], offsets["carry"], plan.carried, self.nseq, self.b, self.h,
                plan.segments, self.reverse, self.p, self.n,
                self.directions, self.cu_seqlens is not None, final is not None,
                dinit is not None, SEGMENT_BLOCK, STATE_BLOCK,
            )  # fmt: skip

    def forward(self, z: Tensor | None, y: Tensor, ungated: Tensor | None) -> None:
        plan, cut, offsets = self.plan, self.plan.tiling, self.plan.offsets
        unused = self.floats
        chunk_forward_kernel[(self.b * plan.slots * self.g * plan.forward_splits,)](
            self.x, self.B, self.C, _or(self.D, unused), _or(z, unused), y, _or(ungated, unused),
            _or(self.cu_seqlens, unused), self.floats, self.states,
            *self.inputs, *(_strides(z, 4) if z is not None else (0, 0, 0, 0)),
            offsets["cum"], offsets["dtp"], offsets["fade"], plan.carried,
            self.l, self.nseq, plan.slots, self.b, self.h, self.h // self.g, plan.forward_heads,
            plan.forward_splits, plan.segments, plan.segment_slots, self.reverse, self.p, self.n,
            self.directions, self.shared, self.D is not None, _is_matrix(self.D), z is not None,
            ungated is not None, self.cu_seqlens is not None, plan.segments > 1,
            -(-self.p // self.p_block), -(-self.n // self.n_block), cut.chunk, self.p_block,
            self.n_block, _precision(self.x.dtype), cut.forward_stages,
            num_warps=cut.forward_warps,
        )  # fmt: skip

    def backward(self, dy: Tensor, dx, dB, dC, ddt, dA, dbias, dD) -> None:
        plan, cut, offsets = self.plan, self.plan.tiling, self.plan.offsets
        unused = self.floats
        split = plan.backward_splits > 1
        served = 1 if self.merged else 2
        n_tiles = -(-self.n // self.n_block)
        programs = served * self.b * plan.tiles * self.g * n_tiles * plan.backward_splits
        chunk_backward_kernel[(programs,)](
            self.x, self.B, self.C, self.dt, self.A, _or(self.dt_bias, unused),
            _or(self.D, unused), dy, dx, dB, dC, ddt, _or(self.cu_seqlens, unused),
            self.floats, self.states,
            *self.inputs, *_strides(dy, 4), *_strides(self.dt, 4),
            offsets["cum"], offsets["dtp"], offsets["fade"], plan.carried, offsets["dA"],
            offsets["dbias"], offsets["dD"], offsets["dBC"],
            self.low, self.high, self.l, self.nseq, plan.slots, self.b, self.h, self.h // self.g,
            plan.backward_heads, plan.backward_splits, plan.tiles, plan.segments,
            plan.segment_slots, self.reverse, self.p, self.n,
            self.directions, self.directions // served, self.dt_bias is not None,
            self.D is not None, _is_matrix(self.D), self.softplus, self.cu_seqlens is not None,
            plan.segments > 1, split, -(-self.p // self.p_block), n_tiles, cut.chunk, cut.tile,
            self.p_block, self.n_block, _precision(self.x.dtype), cut.backward_stages,
            num_warps=cut.backward_warps,
        )  # fmt: skip
        has_bias = self.dt_bias is not None
        programs = self.directions * self.h * (1 + has_bias) + self.d_rows
        if split:
            programs += -(-dB.numel() // SUM_BLOCK)
        reduce_kernel[(programs,)](
            self.floats, dA, _or(dbias, unused), _or(dD, unused), dB, dC,
            offsets["dA"], offsets["dbias"], offsets["dD"], offsets["dBC"], self.h, self.d_rows,
            self.b * plan.tiles, served * self.b * plan.tiles, plan.backward_splits, dB.numel(),
            self.directions, has_bias, self.D is not None, split, SUM_BLOCK,
        )  # fmt: skip


def _forward(
    x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, dt_softplus, low, high, reverse,
    return_final_states, save_ungated,
):  # fmt: skip
    with _on(x.device):
        call = _Call(x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, dt_softplus,
                     low, high, reverse, backward=False)  # fmt: skip
        y = torch.empty(call.shape, dtype=x.dtype, device=x.device)
        final = call.empty_states() if return_final_states else None
        ungated = torch.empty_like(y) if save_ungated else None
        call.scan(None, final, None, None)
        call.forward(z, y, ungated)
    return y, _present(final, y), _present(ungated, y)


def _backward(
    dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, ungated, dt_softplus,
    low, high, reverse,
):  # fmt: skip
    with _on(x.device):
        call = _Call(x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, dt_softplus,
                     low, high, reverse, backward=True)  # fmt: skip
        dz = None
        if z is not None:
            dout, dz = dy, torch.empty(call.shape, dtype=z.dtype, device=z.device)
            dy = torch.empty_like(dz)
            count = dz.numel()
            gate_backward_kernel[(-(-count // GATE_BLOCK),)](
                dout, z, ungated, dy, dz, *_strides(dout, 4), *_strides(z, 4),
                call.l, call.h, call.p, count, GATE_BLOCK,
            )  # fmt: skip
        dinit = call.empty_states() if initial_states is not None else None
        dfinal = None if dfinal is None else dfinal.contiguous()
        call.scan(dy, None, dfinal, dinit)

        def empty(like, paired):
            shape = (2, *like.shape) if paired and like.dim() == 4 else like.shape
            return torch.empty(shape, dtype=like.dtype, device=like.device)

        paired = not call.merged
        dx, dB, dC = empty(x, paired), empty(B, paired), empty(C, paired)
        ddt, dA = empty(dt, False), empty(A, False)
        dbias = None if dt_bias is None else empty(dt_bias, False)
        dD = None if D is None else empty(D, False)
        call.backward(dy, dx, dB, dC, ddt, dA, dbias, dD)
        if paired:
            dx, dB, dC = (
                grad.sum(0) if like.dim() == 4 else grad
                for grad, like in ((dx, x), (dB, B), (dC, C))
            )
        if dinit is not None:
            dinit = dinit.to(initial_states.dtype)
    optional = (_present(t, x) for t in (dD, dz, dbias, dinit))
    return dx, ddt, dA, dB, dC, *optional


def _strides(t: Tensor, dims: int) -> tuple[int, ...]:
    """Strides with a 0 in front for the direction where `t` has none."""
    strides = t.stride()
    return strides if len(strides) == dims else (0, *strides)


def _or(t: Tensor | None, unused: Tensor) -> Tensor:
    return unused if t is None else t


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _is_matrix(D: Tensor | None) -> bool:
    return D is not None and D.dim() == 2


def _present(t: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors only: an empty one stands for none."""
    return torch.empty(0, dtype=like.dtype, device=like.device) if t is None else t


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else torch.device(device)


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
    optional = (
        x.new_empty((0,)) if t is None else t.new_empty(t.shape)
        for t in (D, z, dt_bias, initial_states)
    )
    return *(t.new_empty(t.shape) for t in (x, dt, A, B, C)), *optional


def _save(ctx, inputs, output) -> None:
    *tensors, dt_softplus, low, high, reverse, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[2])
    ctx.settings = (dt_softplus, low, high, reverse)


def _autograd(ctx, dy, dfinal, _):
    x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, ungated = ctx.saved_tensors
    if dy is None:
        dy = x.new_zeros(()).expand(x.shape[-4:])
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinit = torch.ops.mamba2_apps.ssd_triton_backward(
        dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, ungated,
        *ctx.settings,
    )  # fmt: skip
    return (
        dx, ddt, dA, dB, dC,
        None if D is None else dD,
        None if z is None else dz,
        None if dt_bias is None else dbias,
        None if initial_states is None else dinit,
        *(None,) * 7,
    )  # fmt: skip


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
    f" -> ({', '.join(['Tensor'] * 9)})"
)
for _key in ("CUDA", "CPU"):
    _library.impl("ssd_triton_forward", _forward, _key)
    _library.impl("ssd_triton_backward", _backward, _key)
torch.library.register_fake("mamba2_apps::ssd_triton_forward", _fake_forward, lib=_library)
torch.library.register_fake("mamba2_apps::ssd_triton_backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "mamba2_apps::ssd_triton_forward", _autograd, setup_context=_save, lib=_library
)
