"""The gated norm on plain torch operations, with its own backward.

A block of rows at a time passes through all steps while it is in the cache.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .arena import Arena

BLOCK_ELEMENTS = 2**18


def define(
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
    """`define`, a block of rows at a time."""
    y = x.new_empty(x.shape)
    xs, ys, weight = _rows(x, size), _rows(y, size), weight.view(-1, size)
    zs = None if z is None else _rows(z, size)
    with Arena(x) as arena:
        for block in _blocks(ys):
            v, out = xs[block], ys[block]
            gate = None if zs is None else _silu(zs[block], arena)
            if gate is not None and not norm_before_gate:
                v = torch.mul(v, gate, out=gate)
            torch.mul(v, _rstd(v, eps), out=out)
            out *= weight
            if gate is not None and norm_before_gate:
                out *= gate
            arena.clear()
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
    dweight = torch.zeros_like(weight)
    dys, xs, dxs, weight = _rows(dy, size), _rows(x, size), _rows(dx, size), weight.view(-1, size)
    zs, dzs = (None, None) if z is None else (_rows(z, size), _rows(dz, size))
    with Arena(x) as arena:
        for block in _blocks(dxs):
            dv, out = dys[block], dxs[block]
            gate = None if zs is None else _silu(zs[block], arena)
            gated = xs[block]
            if gate is not None and not norm_before_gate:
                gated = torch.mul(gated, gate, out=arena(*gate.shape))
            rstd = _rstd(gated, eps)
            normed = torch.mul(gated, rstd, out=arena(*out.shape))
            product = arena(*out.shape)
            if gate is not None and norm_before_gate:
                dgate = torch.mul(dv, normed, out=arena(*out.shape)).mul_(weight)
                dv = torch.mul(dv, gate, out=gate)
            dweight += torch.mul(dv, normed, out=product).sum(0).flatten()
            along = product.mul_(weight).mean(-1, keepdim=True)
            torch.mul(dv, weight, out=out)
            out.addcmul_(normed, along, value=-1).mul_(rstd)
            if gate is not None and not norm_before_gate:
                dgate = torch.mul(out, xs[block], out=product)
                out *= gate
            if zs is not None and dzs is not None:
                torch.ops.aten.silu_backward(dgate, zs[block], grad_input=dzs[block])
            arena.clear()
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


def _silu(z: Tensor, arena: Arena) -> Tensor:
    return torch.ops.aten.silu.out(z, out=arena(*z.shape))


def _rstd(v: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return norm.square_().div_(v.shape[-1]).add_(eps).rsqrt_()


def _rows(t: Tensor, size: int) -> Tensor:
    """(..., d) → (rows, groups, size)."""
    return t.reshape(-1, t.shape[-1] // size, size)


def _blocks(t: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // t.shape[1:].numel())
    return (slice(i, i + step) for i in range(0, t.shape[0], step))
