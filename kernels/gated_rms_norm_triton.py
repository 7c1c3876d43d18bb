"""RMS normalisation with a gate in Triton, forward and backward.

Registered as torch.ops.mamba2_apps.gated_rms_norm_triton and ..._backward. Arguments are taken as
checked: `gated_rms_norm.py` does that and says what the op computes.

Each program holds whole groups of channels: one read of every input, one write of every output.
The backward computes the statistics anew, which costs no traffic, so nothing is saved beside the
inputs. Its programs walk over many rows and keep their share of dweight in registers; a second
kernel adds those shares in a fixed order.
"""

from operator import itemgetter

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import is_plain
from .launching import Launch, Prepared, on, prepare
from .registration import register
from .sigmoid_triton import sigmoid

# Elements that a program works on at once, where a group is not larger, and elements a thread.
FORWARD_TILE = 2048
FORWARD_THREAD = 16
BACKWARD_TILE = 512  # many small programs hide each other's loads
BACKWARD_THREAD = 32
MOST_ROWS = 16
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
        gate = z * sigmoid(z)
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
    dy_ptr, x_ptr, weight_ptr, z_ptr, dx_ptr, dz_ptr, y_ptr, partial_ptr,
    n_rows, n_steps, d, size, stride_dy, stride_x, stride_z, stride_dz, eps,
    NORM_BEFORE_GATE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx, dz and, where it is given a place, y of n_steps * ROWS rows of one group, and their share
    of dweight.
    """
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
            s = sigmoid(z)
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
        if y_ptr is not None:
            y = n * weight
            if z_ptr is not None and NORM_BEFORE_GATE:
                y *= gate
            tl.store(y_ptr + offset, y, mask=mask)
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


class _Forward(Prepared):
    # x, weight, z, y
    ALL = itemgetter(0, 1, 2, 3)

    def __init__(self, tensors, eps: float, size: int, norm_before_gate: bool) -> None:
        x, _, z, _ = tensors
        super().__init__(x.device)
        n_rows, d = x.shape
        channels = triton.next_power_of_2(size)
        rows = max(1, min(MOST_ROWS, FORWARD_TILE // channels))
        warps = min(32, max(4, rows * channels // (32 * FORWARD_THREAD)))
        rest = (
            n_rows, d, size, x.stride(0), 0 if z is None else z.stride(0), eps, norm_before_gate,
            rows, channels,
        )  # fmt: skip
        programs = triton.cdiv(n_rows, rows) * (d // size)
        self.launches = [Launch(_forward_kernel, programs, warps, self.ALL, rest)]


class _Backward(Prepared):
    # dy, x, weight, z, dx, dz, y, partials, dweight
    WALK = itemgetter(0, 1, 2, 3, 4, 5, 6, 7)
    SUM = itemgetter(7, 8)

    def __init__(self, tensors, eps: float, size: int, norm_before_gate: bool) -> None:
        dy, x, _, z, _, dz, _ = tensors
        super().__init__(x.device)
        n_rows, d = x.shape
        channels = triton.next_power_of_2(size)
        rows = max(1, min(MOST_ROWS, BACKWARD_TILE // channels))
        warps = min(32, max(2, rows * channels // (32 * BACKWARD_THREAD)))
        n_groups = d // size
        n_steps = triton.cdiv(n_rows, rows * max(1, BACKWARD_PROGRAMS // n_groups))
        n_partials = triton.cdiv(n_rows, rows * n_steps)
        self.partials = n_partials, d
        strides = dy.stride(0), x.stride(0), *((0, 0) if z is None else (z.stride(0), dz.stride(0)))
        walk = n_rows, n_steps, d, size, *strides, eps, norm_before_gate, rows, channels
        programs = n_partials * n_groups
        self.launches = [
            Launch(_backward_kernel, programs, warps, self.WALK, walk),
            Launch(_sum_partials_kernel, triton.cdiv(d, 16), 4, self.SUM, (n_partials, d, 256, 16)),
        ]


def _rows(t: Tensor) -> Tensor:
    """`t` as (rows, d) with channels side by side; a view if it can be."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _forward(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    with on(x.device):
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tensors = _rows(x), weight.contiguous(), None if z is None else _rows(z), y
        call = prepare(_Forward, tensors, eps, group_size, norm_before_gate)
        call.run(tensors)
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
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and z; z's in `dz` where that is given, a part of wider rows.

    Where `y` is given, contiguous and as large as x, the forward's result is written there again.
    """
    with on(x.device):
        dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
        if dz is None:
            dz = x.new_empty(0) if z is None else x.new_empty(z.shape)
        to_dz = None if z is None else dz.view(-1, x.shape[-1])
        x, z = _rows(x), None if z is None else _rows(z)
        dy, weight = _rows(dy), weight.contiguous()
        tensors = dy, x, weight, z, dx, to_dz, y
        call = prepare(_Backward, tensors, eps, group_size, norm_before_gate)
        partials = torch.empty(call.partials, dtype=torch.float32, device=x.device)
        call.run((*tensors, partials, dweight))
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


_Direct = register(
    "gated_rms_norm_triton",
    "(Tensor x, Tensor weight, Tensor? z, float eps, SymInt group_size, bool norm_before_gate) "
    "-> Tensor",
    _forward,
    _forward_fake,
    "(Tensor dy, Tensor x, Tensor weight, Tensor? z, float eps, SymInt group_size, "
    "bool norm_before_gate) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _differentiate,
    _setup_context,
)


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
