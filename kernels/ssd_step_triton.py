"""One token of the SSD recurrence in Triton, for decoding and streams.

Registered as torch.ops.mamba2_apps.ssd_step_triton. Arguments are taken as checked: `ssd.py` does
that and says what the op computes. A step reads the state once and writes it once, and nothing
else is of any size; one program holds a block of a head's channels with all its dstate. The
gradient, which decoding does not ask for, is written in plain torch operations.

Dimension legend: batch b · nheads h · headdim p · ngroups g · dstate n
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sigmoid_triton import sigmoid

TILE = 2048  # elements of the state a program


@triton.jit
def _softplus(v):
    """log(1 + exp(v)), with log1p by Kahan's correction, exact where exp(v) is tiny."""
    u = tl.exp(tl.where(v > 20.0, 0.0, v))
    w = 1.0 + u
    log1p = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(v > 20.0, v, log1p)


@triton.jit
def _step_kernel(
    state_ptr, x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, y_ptr, next_ptr,
    nheads, headdim, ngroups, dstate,
    stride_x, stride_dt, stride_b, stride_c, stride_z, dt_min, dt_max,
    SOFTPLUS: tl.constexpr, D_PER_CHANNEL: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(headdim, P)
    block = tl.program_id(0) % n_blocks
    head = (tl.program_id(0) // n_blocks) % nheads
    batch = (tl.program_id(0) // n_blocks // nheads).to(tl.int64)
    group = head // (nheads // ngroups)
    p = block * P + tl.arange(0, P)
    n = tl.arange(0, N)
    has_p = p < headdim
    has_n = n < dstate
    channel = head * headdim + p

    dt = tl.load(dt_ptr + batch * stride_dt + head).to(tl.float32)
    if bias_ptr is not None:
        dt += tl.load(bias_ptr + head).to(tl.float32)
    if SOFTPLUS:
        dt = _softplus(dt)
    # Not minimum and maximum, which would swallow a NaN.
    dt = tl.where(dt < dt_min, dt_min, tl.where(dt > dt_max, dt_max, dt))
    decay = tl.exp(dt * tl.load(a_ptr + head).to(tl.float32))

    x = tl.load(x_ptr + batch * stride_x + channel, mask=has_p, other=0.0).to(tl.float32)
    B = tl.load(b_ptr + batch * stride_b + group * dstate + n, mask=has_n, other=0.0)
    C = tl.load(c_ptr + batch * stride_c + group * dstate + n, mask=has_n, other=0.0)
    offset = (batch * nheads * headdim + channel)[:, None] * dstate + n[None, :]
    mask = has_p[:, None] & has_n[None, :]
    state = tl.load(state_ptr + offset, mask=mask, other=0.0)
    state = decay * state + (dt * x)[:, None] * B.to(tl.float32)[None, :]
    tl.store(next_ptr + offset, state, mask=mask)

    y = tl.sum(state * C.to(tl.float32)[None, :], axis=1)
    if d_ptr is not None:
        if D_PER_CHANNEL:
            y += tl.load(d_ptr + channel, mask=has_p, other=0.0).to(tl.float32) * x
        else:
            y += tl.load(d_ptr + head).to(tl.float32) * x
    if z_ptr is not None:
        z = tl.load(z_ptr + batch * stride_z + channel, mask=has_p, other=0.0).to(tl.float32)
        y *= z * sigmoid(z)
    tl.store(y_ptr + batch * nheads * headdim + channel, y, mask=has_p)


def _by_row(t: Tensor) -> tuple[Tensor, int]:
    """`t` with each batch entry in one piece, and how far entries are apart."""
    if not (t.is_contiguous() or t[0].is_contiguous()):
        t = t.contiguous()
    return t, t.stride(0)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    (b, h, p), (g, n) = x.shape, B.shape[1:]
    y, new_state = _step_fake(state, x)
    x, stride_x = _by_row(x)
    dt, stride_dt = _by_row(dt)
    B, stride_b = _by_row(B)
    C, stride_c = _by_row(C)
    z, stride_z = (None, 0) if z is None else _by_row(z)
    block_n = triton.next_power_of_2(n)
    block_p = min(triton.next_power_of_2(p), max(1, TILE // block_n))
    with torch.cuda.device_of(x):
        _step_kernel[(b * h * triton.cdiv(p, block_p),)](
            state.contiguous(),
            x,
            dt,
            A.contiguous(),
            B,
            C,
            _contiguous(D),
            z,
            _contiguous(dt_bias),
            y,
            new_state,
            h,
            p,
            g,
            n,
            stride_x,
            stride_dt,
            stride_b,
            stride_c,
            stride_z,
            dt_min,
            dt_max,
            SOFTPLUS=dt_softplus,
            D_PER_CHANNEL=D is not None and D.dim() == 2,
            P=block_p,
            N=block_n,
            num_warps=4,
        )
    return y, new_state


def _step_fake(state, x, *others) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.dt_softplus, ctx.dt_min, ctx.dt_max = inputs
    ctx.save_for_backward(*tensors, output[1])


def _wide(t):
    return None if t is None else t.float()


def _differentiate(ctx, dy, dnext):
    inputs = ctx.saved_tensors
    state, x, dt, A, B, C, D, z, dt_bias, new_state = map(_wide, inputs)
    per_head = x.shape[1] // B.shape[1]
    B, C = (t.repeat_interleave(per_head, 1) for t in (B, C))

    raw = dt if dt_bias is None else dt + dt_bias
    wide = torch.nn.functional.softplus(raw) if ctx.dt_softplus else raw
    step = wide.clamp(ctx.dt_min, ctx.dt_max)
    decay = torch.exp(step * A)

    dy, dD, dz = dy.float(), None, None
    if z is not None:
        y = (new_state @ C[..., None])[..., 0]
        if D is not None:
            y = y + (D if D.dim() == 2 else D[:, None]) * x
        dz = torch.ops.aten.silu_backward(dy * y, z)
        dy = dy * torch.nn.functional.silu(z)
    dnew = dnext + dy[..., None] * C[:, :, None]
    dscaled_x = (dnew @ B[..., None])[..., 0]
    dx = dscaled_x * step[..., None]
    if D is not None:
        dx = dx + (D if D.dim() == 2 else D[:, None]) * dy
        dD = (dy * x).sum((0,) if D.dim() == 2 else (0, 2))
    dlog_decay = (dnew * state).sum((2, 3)) * decay
    ddt = (dscaled_x * x).sum(2) + dlog_decay * A
    ddt = ddt * ((wide >= ctx.dt_min) & (wide <= ctx.dt_max))
    if ctx.dt_softplus:
        ddt = ddt * torch.sigmoid(raw)
    dB = ((step[..., None] * x)[:, :, None] @ dnew)[:, :, 0]
    dC = (dy[:, :, None] @ new_state)[:, :, 0]
    dB, dC = (t.unflatten(1, (-1, per_head)).sum(2) for t in (dB, dC))
    gradients = (
        decay[..., None, None] * dnew,
        dx,
        ddt,
        (dlog_decay * step).sum(0),
        dB,
        dC,
        dD,
        dz,
        None if dt_bias is None else ddt.sum(0),
    )
    typed = (
        None if t is None else t.to(like.dtype)
        for t, like in zip(gradients, inputs[:9], strict=True)
    )
    return *typed, None, None, None


_OP = "mamba2_apps::ssd_step_triton"
torch.library.define(
    _OP,
    "(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, bool dt_softplus, float dt_min, float dt_max) -> (Tensor, Tensor)",
)
torch.library.impl(_OP, ("cpu", "cuda"))(_step)
torch.library.register_fake(_OP)(_step_fake)
torch.library.register_autograd(_OP, _differentiate, setup_context=_setup_context)


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """y (b, h, p) in x's dtype and the next state (b, h, p, n) in float32.

    state (b, h, p, n) float32, x and z (b, h, p), dt (b, h), A and dt_bias (h,), B and C (b, g, n),
    D (h,) or (h, p); any strides.
    """
    return torch.ops.mamba2_apps.ssd_step_triton(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, *map(float, dt_limit)
    )
