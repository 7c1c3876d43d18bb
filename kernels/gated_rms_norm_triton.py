"""RMS normalisation with a gate in Triton, forward and backward.

Registered as torch.ops.mamba2_apps.gated_rms_norm_triton and ..._backward. Arguments are taken as
checked: `gated_rms_norm.py` does that and says what the op computes.

Each program holds whole groups of channels: one read of every input, one write of every output.
The backward computes the statistics anew, which costs no traffic, so nothing is saved beside the
inputs. Its programs walk over many rows and keep their share of dweight in registers; a second
kernel adds those shares in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import is_plain

TILE = 2048  # elements a program works on at once, where a group is not larger
MOST_ROWS = 16
FORWARD_THREAD = 16  # elements a thread; the backward holds five tensors of them in registers
BACKWARD_THREAD = 8
BACKWARD_PROGRAMS = 1024  # at most, so that the shares of dweight stay few beside the rows


@triton.jit
def _load_rows(ptr, rows, c, n_rows, size, stride, first):
    """(rows, group_size) of one group in fp32, 0 outside."""
    mask = (rows < n_rows) & (c < size)
    offset = rows.to(tl.int64) * stride + first + c
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n_rows", "eps"])
def _forward_kernel(
    x_ptr, weight_ptr, z_ptr, y_ptr, n_rows, d, size, stride_x, stride_z, eps,
    NORM_BEFORE_GATE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n_groups = d // size
    first = (tl.program_id(0) % n_groups) * size
    rows = (tl.program_id(0) // n_groups) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, CHANNELS)[None, :]

    v = _load_rows(x_ptr, rows, c, n_rows, size, stride_x, first)
    weight = tl.load(weight_ptr + first + c, mask=c < size, other=0.0).to(tl.float32)
    if z_ptr is not None:
        z = _load_rows(z_ptr, rows, c, n_rows, size, stride_z, first)
        gate = z * tl.sigmoid(z)
        if not NORM_BEFORE_GATE:
            v *= gate
    scale = 1.0 / tl.sqrt_rn(tl.sum(v * v, axis=1) / size + eps)
    y = v * scale[:, None] * weight
    if z_ptr is not None and NORM_BEFORE_GATE:
        y *= gate
    offset = rows.to(tl.int64) * d + first + c
    tl.store(y_ptr + offset, y, mask=(rows < n_rows) & (c < size))


@triton.jit(do_not_specialize=["n_rows", "n_steps", "eps"])
def _backward_kernel(
    dy_ptr, x_ptr, weight_ptr, z_ptr, dx_ptr, dz_ptr, partial_ptr,
    n_rows, n_steps, d, size, stride_dy, stride_x, stride_z, stride_dz, eps,
    NORM_BEFORE_GATE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx and dz of n_steps * ROWS rows of one group, and their share of dweight."""
    n_groups = d // size
    first = (tl.program_id(0) % n_groups) * size
    share = tl.program_id(0) // n_groups
    rows = share * n_steps * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, CHANNELS)[None, :]
    weight = tl.load(weight_ptr + first + c, mask=c < size, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, CHANNELS], tl.float32)

    step = 0
    while step < n_steps:
        offset = rows.to(tl.int64) * d + first + c
        mask = (rows < n_rows) & (c < size)
        x = _load_rows(x_ptr, rows, c, n_rows, size, stride_x, first)
        dy = _load_rows(dy_ptr, rows, c, n_rows, size, stride_dy, first)
        v = x
        if z_ptr is not None:
            z = _load_rows(z_ptr, rows, c, n_rows, size, stride_z, first)
            s = tl.sigmoid(z)
            gate = z * s
            dgate = s * (1.0 + z * (1.0 - s))  # d silu(z) / dz
            if NORM_BEFORE_GATE:
                dz = dy * weight * dgate
                dy *= gate
            else:
                v = x * gate
        # With n = v / rms: dv = (dn - n mean(dn n)) / rms.
        dn = dy * weight
        scale = (1.0 / tl.sqrt_rn(tl.sum(v * v, axis=1) / size + eps))[:, None]
        n = v * scale
        dv = scale * (dn - n * (tl.sum(dn * n, axis=1) / size)[:, None])
        dweight += dy * n
        if z_ptr is not None:
            if NORM_BEFORE_GATE:
                dz *= n
            else:
                dz = dv * x * dgate
                dv *= gate
            at = rows.to(tl.int64) * stride_dz + first + c
            tl.store(dz_ptr + at, dz, mask=mask)
        tl.store(dx_ptr + offset, dv, mask=mask)
        rows += ROWS
        step += 1

    c = tl.arange(0, CHANNELS)
    offset = share.to(tl.int64) * d + first + c
    tl.store(partial_ptr + offset, tl.sum(dweight, axis=0), mask=c < size)


@triton.jit(do_not_specialize=["n_partials"])
def _sum_partials_kernel(
    partial_ptr, dweight_ptr, n_partials, d, PARTIALS: tl.constexpr, CHANNELS: tl.constexpr
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.arange(0, PARTIALS)[:, None]
    total = tl.zeros([PARTIALS, CHANNELS], tl.float32)
    i = 0
    while i < n_partials:
        mask = (i + row < n_partials) & (c[None, :] < d)
        offset = (i + row).to(tl.int64) * d + c[None, :]
        total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
        i += PARTIALS
    tl.store(dweight_ptr + c, tl.sum(total, axis=0), mask=c < d)


def _rows(t: Tensor) -> tuple[Tensor, int]:
    """`t` as (rows, d) with channels side by side, and how far rows are apart; a view if it can."""
    t = t.reshape(-1, t.shape[-1])
    if t.stride(1) != 1 and t.shape[1] > 1:
        t = t.contiguous()
    return t, t.stride(0)


def _blocks(size: int, thread: int) -> tuple[int, int, int]:
    """Rows and channels of a tile, and its warps."""
    channels = triton.next_power_of_2(size)
    rows = max(1, min(MOST_ROWS, TILE // channels))
    return rows, channels, min(32, max(4, rows * channels // (32 * thread)))


def _forward(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    y = x.new_empty(x.shape)
    x, stride_x = _rows(x)
    z, stride_z = (None, 0) if z is None else _rows(z)
    n_rows, d = x.shape
    rows, channels, warps = _blocks(group_size, FORWARD_THREAD)
    with torch.cuda.device_of(x):
        _forward_kernel[(triton.cdiv(n_rows, rows) * (d // group_size),)](
            x,
            weight.contiguous(),
            z,
            y,
            n_rows,
            d,
            group_size,
            stride_x,
            stride_z,
            eps,
            NORM_BEFORE_GATE=norm_before_gate,
            ROWS=rows,
            CHANNELS=channels,
            num_warps=warps,
        )
    return y


def _forward_fake(x, weight, z, eps, group_size, norm_before_gate) -> Tensor:
    return x.new_empty(x.shape)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    dz: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and z; z's in `dz` where that is given, a part of wider rows."""
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    if dz is None:
        dz = x.new_empty(0) if z is None else z.new_empty(z.shape)
    stride_dz = dz.shape[-1] if dz.dim() < 2 else dz.stride(-2)
    dy, stride_dy = _rows(dy)
    x, stride_x = _rows(x)
    z, stride_z = (None, 0) if z is None else _rows(z)
    n_rows, d = x.shape
    n_groups = d // group_size
    rows, channels, warps = _blocks(group_size, BACKWARD_THREAD)
    n_steps = triton.cdiv(n_rows, rows * max(1, BACKWARD_PROGRAMS // n_groups))
    n_partials = triton.cdiv(n_rows, rows * n_steps)
    partials = x.new_empty(n_partials, d, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward_kernel[(n_partials * n_groups,)](
            dy,
            x,
            weight.contiguous(),
            z,
            dx,
            None if z is None else dz,
            partials,
            n_rows,
            n_steps,
            d,
            group_size,
            stride_dy,
            stride_x,
            stride_z,
            stride_dz,
            eps,
            NORM_BEFORE_GATE=norm_before_gate,
            ROWS=rows,
            CHANNELS=channels,
            num_warps=warps,
        )
        _sum_partials_kernel[(triton.cdiv(d, 16),)](
            partials, dweight, n_partials, d, PARTIALS=256, CHANNELS=16, num_warps=4
        )
    return dx, dweight, dz


def _backward_fake(
    dy, x, weight, z, eps, group_size, norm_before_gate
) -> tuple[Tensor, Tensor, Tensor]:
    dz = x.new_empty(0) if z is None else z.new_empty(z.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dz


def _setup_context(ctx, inputs, output) -> None:
    x, weight, z, ctx.eps, ctx.group_size, ctx.norm_before_gate = inputs
    ctx.save_for_backward(x, weight, z)


def _differentiate(ctx, dy):
    x, weight, z = ctx.saved_tensors
    direct = not torch.is_grad_enabled() and is_plain(dy, x, weight, z)
    run = _backward if direct else torch.ops.mamba2_apps.gated_rms_norm_triton_backward
    dx, dweight, dz = run(dy, x, weight, z, ctx.eps, ctx.group_size, ctx.norm_before_gate)
    return dx, dweight, None if z is None else dz, None, None, None


class _Direct(torch.autograd.Function):
    """The operator for tensors that need no dispatcher, which takes longer than a small call."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_differentiate)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError('the Triton backend has no second derivatives; use backend="torch"')


_OP = "mamba2_apps::gated_rms_norm_triton"
torch.library.define(
    _OP,
    "(Tensor x, Tensor weight, Tensor? z, float eps, SymInt group_size, bool norm_before_gate) "
    "-> Tensor",
)
torch.library.impl(_OP, ("cpu", "cuda"))(_forward)
torch.library.register_fake(_OP)(_forward_fake)
torch.library.register_autograd(_OP, _differentiate, setup_context=_setup_context)
torch.library.define(
    f"{_OP}_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor? z, float eps, SymInt group_size, "
    "bool norm_before_gate) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl(f"{_OP}_backward", ("cpu", "cuda"))(_backward)
torch.library.register_fake(f"{_OP}_backward")(_backward_fake)
torch.library.register_autograd(f"{_OP}_backward", _no_second_derivative)


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
) -> Tensor:
    """y (..., d) of x's dtype; x and z (..., d) with any strides, weight (d,)."""
    run = _Direct.apply if is_plain(x, weight, z) else torch.ops.mamba2_apps.gated_rms_norm_triton
    return run(x, weight, z, eps, group_size or x.shape[-1], norm_before_gate)
