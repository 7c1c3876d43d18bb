"""RMS normalisation with a gate, as between the SSD and the output projection of Mamba-2."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import (
    accumulate_dtype,
    autocast,
    check_parameter_dtype,
    check_same_dtype,
    check_tensor,
    is_exporting,
    no_autocast,
    resolve_backend,
)


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """norm(x · silu(z)) · weight, or norm(x) · weight · silu(z) with norm_before_gate.

    norm(v) = v / sqrt(mean(v²) + eps) over each group of group_size channels, in float32
    (float64 for float64 x); without z there is no gate.

    Args:
        x: (..., d), float32, bfloat16, float16, or float64 (torch backend), any strides.
        weight: (d,), x's dtype or float32.
        z: like x.
        group_size: a divisor of d; all d channels where None.
        backend: "auto", "triton" or "torch"; see `dispatch.resolve_backend`.

    Returns:
        (..., d) in x's dtype.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as above.
        RuntimeError: the backend asked for cannot run here.
    """
    x, z = autocast(x, z)
    _check(x, weight, z, eps, group_size)
    if resolve_backend(backend, x) == "triton":
        from . import gated_rms_norm_triton

        return gated_rms_norm_triton.gated_rms_norm(x, weight, z, eps, group_size, norm_before_gate)
    wide = accumulate_dtype(x)
    size = group_size or x.shape[-1]
    gate = None if z is None else z.to(wide)
    norm = _normalise if is_exporting() else normalise_and_gate
    with no_autocast(x):
        return norm(x.to(wide), weight.to(wide), gate, eps, size, norm_before_gate).to(x.dtype)


def _check(x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int | None) -> None:
    check_same_dtype(x, z=z)
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., d) with no empty dimension")
    d = x.shape[-1]
    check_tensor("weight", weight, (d,), x)
    if z is not None:
        check_tensor("z", z, tuple(x.shape), x)
    check_parameter_dtype(x, weight=weight)
    if group_size is not None and (group_size < 1 or d % group_size):
        raise ValueError(f"group_size is {group_size}, expected a divisor of x's {d} channels")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, expected a number >= 0")


def _normalise(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, size: int, norm_before_gate: bool
) -> Tensor:
    """The definition, in operations that decompose to ATen for export."""
    if z is not None and not norm_before_gate:
        x = x * F.silu(z)
    y = F.rms_norm(x.unflatten(-1, (-1, size)), (size,), None, eps).flatten(-2) * weight
    return y if z is None or not norm_before_gate else y * F.silu(z)


@torch.library.custom_op("mamba2_apps::normalise_and_gate", mutates_args=())
def normalise_and_gate(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, size: int, norm_before_gate: bool
) -> Tensor:
    """`_normalise`, a block of rows at a time so that its steps find their data in the cache."""
    y = x.new_empty(x.shape)
    xs, zs, ys = (_rows(t, size) for t in (x, z, y))
    weight = weight.view(-1, size)
    for block in _blocks(ys):
        v, out, gate = xs[block], ys[block], None if z is None else F.silu(zs[block])
        if gate is not None and not norm_before_gate:
            v = v * gate
        torch.mul(v, _rstd(v, eps), out=out)
        out *= weight
        if gate is not None and norm_before_gate:
            out *= gate
    return y


@normalise_and_gate.register_fake
def _(x, weight, z, eps, size, norm_before_gate):
    return x.new_empty(x.shape)


@torch.library.custom_op("mamba2_apps::normalise_and_gate_backward", mutates_args=())
def normalise_and_gate_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    eps: float,
    size: int,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and z (an empty tensor where there is no gate)."""
    dx, dz = x.new_empty(x.shape), x.new_empty(0 if z is None else x.shape)
    dys, xs, dxs = (_rows(t, size) for t in (dy, x, dx))
    dweight, weight = torch.zeros_like(weight), weight.view(-1, size)
    if z is not None:
        zs, dzs = _rows(z, size), _rows(dz, size)
    for block in _blocks(dxs):
        dy_block, v = dys[block], xs[block]
        gate = None if z is None else F.silu(zs[block])
        if gate is not None and not norm_before_gate:
            v = v * gate
        rstd = _rstd(v, eps)
        normed = v * rstd
        if gate is not None and norm_before_gate:
            dgate = dy_block * normed * weight
            dy_block = dy_block * gate
        dweight += (dy_block * normed).sum(0).flatten()
        dnormed = dy_block * weight
        dv = dnormed.addcmul_(normed, (dnormed * normed).mean(-1, keepdim=True), value=-1)
        dv.mul_(rstd)
        if gate is not None and not norm_before_gate:
            dgate = dv * xs[block]
            dv.mul_(gate)
        dxs[block] = dv
        if gate is not None:
            torch.ops.aten.silu_backward(dgate, zs[block], grad_input=dzs[block])
    return dx, dweight, dz


@normalise_and_gate_backward.register_fake
def _(dy, x, weight, z, eps, size, norm_before_gate):
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0 if z is None else x.shape),
    )


def _save(ctx, inputs, output):
    x, weight, z, *ctx.options = inputs
    ctx.save_for_backward(x, weight, z)


def _differentiate(ctx, dy):
    x, weight, z = ctx.saved_tensors
    dx, dweight, dz = torch.ops.mamba2_apps.normalise_and_gate_backward(
        dy, x, weight, z, *ctx.options
    )
    return dx, dweight, None if z is None else dz, None, None, None


normalise_and_gate.register_autograd(_differentiate, setup_context=_save)


def _rstd(v: Tensor, eps: float) -> Tensor:
    return v.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _rows(t: Tensor | None, size: int) -> Tensor | None:
    """(..., d) → (rows, groups, size)."""
    return None if t is None else t.reshape(-1, t.shape[-1] // size, size)


def _blocks(t: Tensor, elements: int = 2**17) -> Iterator[slice]:
    step = max(1, elements // t.shape[1:].numel())
    return (slice(i, i + step) for i in range(0, t.shape[0], step))
