"""Convolution, scan and gated norm on the Triton kernels of each, with one gradient between them.

Registered as torch.ops.mamba2_apps.conv_ssd_norm_triton and ..._backward. Arguments are taken as
checked: `conv_ssd_norm.py` does that and says what the op computes. Kept for the backward beside
the inputs: what the scan gave. The convolution is done again there, as in mamba_ssm, and so is the
norm's output where a projection needs it: each would be a fifth of what a block keeps.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · d_model d
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import causal_conv1d_triton, gated_rms_norm_triton, norm_linear_triton, ssd_triton
from .dispatch import is_plain
from .registration import register


class _Sizes(NamedTuple):
    h: int
    p: int
    g: int
    n: int
    directions: int

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (b, l, h p), x B C (b, l, h p + 2 g n) and dt (b, l, h), or (2, b, l, h): views."""
        h, p, g, n, directions = self
        b, l, e = rows.shape
        steps, first, inner = (l * e, e, 1), rows.storage_offset(), h * p
        channels = inner + 2 * g * n
        z = rows.as_strided((b, l, inner), steps, first)
        xBC = rows.as_strided((b, l, channels), steps, first + inner)
        first += inner + channels
        if directions == 1:
            return z, xBC, rows.as_strided((b, l, h), steps, first)
        return z, xBC, rows.as_strided((2, b, l, h), (h, *steps), first)

    def split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, l, h, p), B and C (b, l, g, n): views."""
        h, p, g, n, _ = self
        b, l, e = xBC.shape
        first = xBC.storage_offset()
        x = xBC.as_strided((b, l, h, p), (l * e, e, p, 1), first)
        B, C = (
            xBC.as_strided((b, l, g, n), (l * e, e, n, 1), first + h * p + i * g * n)
            for i in range(2)
        )
        return x, B, C


def _forward(
    zxBCdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    norm_weight: Tensor,
    projection: Tensor | None,
    cu_seqlens: Tensor | None,
    headdim: int,
    ngroups: int,
    d_state: int,
    low: float,
    high: float,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor]:
    """y (b, l, h p), or its products (b, l, d), and for the backward what the scan gave."""
    z, scanned = _scanned(
        zxBCdt, conv_weight, conv_bias, dt_bias, A, D, cu_seqlens, headdim, ngroups, d_state, low,
        high,
    )  # fmt: skip
    norm = eps, group_size, norm_before_gate
    return _normed(scanned, z, norm_weight, projection, *norm), scanned


def _scanned(
    zxBCdt, conv_weight, conv_bias, dt_bias, A, D, cu_seqlens, headdim, ngroups, d_state, low, high
) -> tuple[Tensor, Tensor]:
    """z, a view, and what the scan gives, (b, l, h p). The convolution's output ends in here."""
    sizes = _Sizes(A.shape[-1], headdim, ngroups, d_state, A.dim())
    z, xBC, dt = sizes.parts(zxBCdt.contiguous())
    x, B, C = sizes.split(_convolved(xBC, conv_weight, conv_bias, cu_seqlens))
    scanned, _, _ = ssd_triton._forward(
        x, dt, A, B, C, D, None, dt_bias, None, cu_seqlens, True, low, high, False, False, False
    )
    return z, scanned.view(z.shape)


def _normed(
    scanned: Tensor,
    z: Tensor,
    weight: Tensor,
    projection: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    if projection is not None:
        projection = projection.to(scanned.dtype)
        if norm_linear_triton.serves(scanned, projection, group_size, norm_before_gate):
            return norm_linear_triton.norm_linear(scanned, z, weight, projection, eps)
    y = gated_rms_norm_triton._forward(scanned, weight, z, eps, group_size, norm_before_gate)
    return y if projection is None else F.linear(y, projection)


def _convolved(
    xBC: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    return causal_conv1d_triton._forward(xBC, weight, bias, True, None, cu_seqlens, False, False)[0]


def _forward_fake(
    zxBCdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, projection, *rest
) -> tuple[Tensor, Tensor]:
    b, l, _ = zxBCdt.shape
    inner = norm_weight.shape[0]
    outputs = inner if projection is None else projection.shape[0]
    return zxBCdt.new_empty(b, l, outputs), zxBCdt.new_empty(b, l, inner)


def _backward(
    dout: Tensor,
    zxBCdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    norm_weight: Tensor,
    projection: Tensor | None,
    cu_seqlens: Tensor | None,
    scanned: Tensor,
    headdim: int,
    ngroups: int,
    d_state: int,
    low: float,
    high: float,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    projection_trains: bool,
) -> list[Tensor]:
    """Gradients of the tensors in the forward's order, without those that are not there.

    The projection's is there where it trains.
    """
    sizes = _Sizes(A.shape[-1], headdim, ngroups, d_state, A.dim())
    zxBCdt = zxBCdt.contiguous()
    gradient = torch.empty_like(zxBCdt)
    (z, xBC, dt), (dz, dxBC, ddt) = sizes.parts(zxBCdt), sizes.parts(gradient)
    dscanned, dnorm_weight, dprojection = _norm_backward(
        dout, scanned, z, norm_weight, projection, eps, group_size, norm_before_gate,
        projection_trains, dz,
    )  # fmt: skip
    mixed = _convolved(xBC, conv_weight, conv_bias, cu_seqlens)
    dmixed = torch.empty_like(mixed)
    (x, B, C), (dx, dB, dC) = sizes.split(mixed), sizes.split(dmixed)
    used = z.shape[2] + xBC.shape[2] + A.numel()
    if used < zxBCdt.shape[2]:
        gradient[..., used:].zero_()
    _, _, dA, _, _, dD, _, ddt_bias, _ = ssd_triton._backward(
        dscanned.view(x.shape), None, x, dt, A, B, C, D, None, dt_bias, None, cu_seqlens, None,
        True, low, high, False, into=(dx, ddt, dB, dC),
    )  # fmt: skip
    _, dconv_weight, dconv_bias, _ = causal_conv1d_triton._backward(
        dmixed, None, xBC, conv_weight, conv_bias, True, None, cu_seqlens, False, dx=dxBC
    )
    gradients = [gradient, dconv_weight]
    if conv_bias is not None:
        gradients.append(dconv_bias)
    gradients += [ddt_bias, dA]
    if D is not None:
        gradients.append(dD)
    gradients.append(dnorm_weight)
    if dprojection is not None:
        gradients.append(dprojection)
    return gradients


def _norm_backward(
    dout: Tensor,
    scanned: Tensor,
    z: Tensor,
    weight: Tensor,
    projection: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    projection_trains: bool,
    dz: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of what the scan gave, of the norm's weight and of the projection; z's in `dz`.

    y and its gradient live in here only: what comes after needs room of its own.
    """
    rows = dout.flatten(0, 1)
    dy = rows if projection is None else rows @ projection.to(rows.dtype)
    y = torch.empty_like(scanned) if projection_trains else None
    dscanned, dweight, _ = gated_rms_norm_triton._backward(
        dy, scanned, weight, z, eps, group_size, norm_before_gate, dz=dz, y=y
    )
    if projection is None or y is None:
        return dscanned, dweight, None
    return dscanned, dweight, (rows.T @ y.flatten(0, 1)).to(projection.dtype)


def _backward_fake(dout, *inputs) -> list[Tensor]:
    *others, projection = inputs[:8]
    with_gradient = [*others, projection if inputs[-1] else None]
    return [t.new_empty(t.shape) for t in with_gradient if t is not None]


def _setup_context(ctx, inputs, output) -> None:
    tensors, ctx.settings = inputs[:9], inputs[9:]
    _, scanned = output
    ctx.mark_non_differentiable(scanned)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, scanned)


def _differentiate(ctx, dout, _):
    saved = ctx.saved_tensors
    direct = not torch.is_grad_enabled() and is_plain(dout, *saved)
    run: Any = _backward if direct else torch.ops.mamba2_apps.conv_ssd_norm_triton_backward
    trains = saved[7] is not None and ctx.needs_input_grad[7]
    given = iter(run(dout, *saved, *ctx.settings, trains))
    gradients = [None if t is None else next(given) for t in saved[:7]]
    # cu_seqlens and the settings have none.
    return *gradients, next(given) if trains else None, *(None,) * 9


_TENSORS = (
    "Tensor zxBCdt, Tensor conv_weight, Tensor? conv_bias, Tensor dt_bias, Tensor A, Tensor? D, "
    "Tensor norm_weight, Tensor? projection, Tensor? cu_seqlens"
)
_SETTINGS = (
    "SymInt headdim, SymInt ngroups, SymInt d_state, float low, float high, float eps, "
    "SymInt group_size, bool norm_before_gate"
)
_Direct = register(
    "conv_ssd_norm_triton",
    f"({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    f"(Tensor dout, {_TENSORS}, Tensor scanned, {_SETTINGS}, bool projection_trains) -> Tensor[]",
    _backward,
    _backward_fake,
    _differentiate,
    _setup_context,
)


def conv_ssd_norm(*inputs: Any) -> Tensor:
    """`kernels.conv_ssd_norm` on checked arguments, in the order of `_forward`."""
    run = _Direct.apply if is_plain(*inputs[:9]) else torch.ops.mamba2_apps.conv_ssd_norm_triton
    y, _ = run(*inputs)
    return y
