"""The public SSD operators: arguments are checked, a backend is chosen, the backend runs.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import (
    accumulate_dtype,
    autocast,
    check_cu_seqlens,
    check_limits,
    check_parameter_dtype,
    check_same_dtype,
    check_tensor,
    is_exporting,
    no_autocast,
    resolve_backend,
)

INFINITY = float("inf")


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INFINITY),
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_final_states: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan a sequence with the state space duality of Mamba-2 (arXiv:2405.21060).

        dt'_t   = clamp(f(dt_t + dt_bias), *dt_limit)     f softplus if dt_softplus, else identity
        state_t = exp(dt'_t A) state_{t-1} + dt'_t x_t B_tᵀ
        y_t     = (state_t C_t + D x_t) · silu(z_t)       the gate only where z is given

    Head i reads group i // (h // g) of B and C.

    Args:
        x: (b, l, h, p), float32, bfloat16, float16, or float64 (torch backend), any strides.
        dt: (b, l, h), x's dtype.
        A: (h,), negative.
        B, C: (b, l, g, n), x's dtype; h is divisible by g.
        D: (h,) or (h, p).
        z: (b, l, h, p), x's dtype.
        dt_bias: (h,).
        dt_limit: least and largest step, the least not below 0.
        initial_states: (b, h, p, n), or (nseq, h, p, n) when packed.
        cu_seqlens: (nseq + 1,) int32, rising from 0 to l: packs nseq sequences along l, b = 1.
        reverse: scan from the end; equal to flip, scan, flip.
        return_final_states: return the state after the last token scanned as well.
        backend: "auto", "triton" or "torch"; see `dispatch.resolve_backend`.
            A, D, dt_bias and initial_states may be float32 beside half-precision x.

    Returns:
        y (b, l, h, p) in x's dtype; with return_final_states also the states, shaped as
        initial_states, float32 (float64 for float64 x). Under autocast to a half type x is cast to
        it and y comes out in it.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as above.
        RuntimeError: the backend asked for cannot run here.
    """
    x, dt, B, C, z = autocast(x, dt, B, C, z)
    _check_scan(x, dt, A, B, C, D, z, dt_bias, dt_limit, initial_states, cu_seqlens, directions=1)
    if resolve_backend(backend, x) == "triton":
        from . import ssd_triton

        y, states = ssd_triton.ssd(
            x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens,
            dt_softplus, dt_limit, reverse, return_final_states,
        )  # fmt: skip
    else:
        with no_autocast(x):
            y, states = _ssd_torch(
                x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens,
                dt_softplus, dt_limit, reverse, return_final_states,
            )  # fmt: skip
    return y if states is None else (y, states)


def ssd_bidirectional(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INFINITY),
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan a sequence from both ends in one call and add the two.

    y = ssd(index 0, D=None) + ssd(index 1, reverse=True, D=None) + D x, so token t is in both
    scans. Where x is per direction the last term is D (x[0] + x[1]).

    Args:
        x: (b, l, h, p) shared by the directions, or (2, b, l, h, p).
        dt: (2, b, l, h), x's dtype.
        A, dt_bias: (2, h), A negative.
        B, C: (b, l, g, n), or (2, b, l, g, n) per direction; each on its own.
        D: (h,) or (h, p).
        initial_states: (2, b, h, p, n), or (2, nseq, h, p, n) when packed.
        Others as in `ssd`.

    Returns:
        y (b, l, h, p) in x's dtype; with return_final_states also states shaped as initial_states.

    Raises:
        ValueError, RuntimeError: as `ssd`.
    """
    x, dt, B, C = autocast(x, dt, B, C)
    _check_scan(
        x, dt, A, B, C, D, None, dt_bias, dt_limit, initial_states, cu_seqlens, directions=2
    )
    if resolve_backend(backend, x) == "triton":
        from . import ssd_triton

        y, states = ssd_triton.ssd_bidirectional(
            x, dt, A, B, C, D, dt_bias, initial_states, cu_seqlens,
            dt_softplus, dt_limit, return_final_states,
        )  # fmt: skip
    else:
        with no_autocast(x):
            y, states = _ssd_bidirectional_torch(
                x, dt, A, B, C, D, dt_bias, initial_states, cu_seqlens,
                dt_softplus, dt_limit, return_final_states,
            )  # fmt: skip
    return y if states is None else (y, states)


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INFINITY),
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `ssd`: the recurrent form, for decoding and streams.

    Args:
        state: (b, h, p, n), float32 (float64 for float64 x); not modified.
        x, z: (b, h, p).
        dt: (b, h).
        B, C: (b, g, n).
        Others as in `ssd`.

    Returns:
        y (b, h, p) in x's dtype and the next state (b, h, p, n).

    Raises:
        ValueError, RuntimeError: as `ssd`.
    """
    x, dt, B, C, z = autocast(x, dt, B, C, z)
    _check_step(state, x, dt, A, B, C, D, z, dt_bias, dt_limit)
    if resolve_backend(backend, x) == "triton":
        from . import ssd_step_triton

        return ssd_step_triton.ssd_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit)
    with no_autocast(x):
        return _step_torch(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit)


def _step_torch(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit):
    wide = accumulate_dtype(x)
    dt = _discretise(dt, dt_bias, dt_softplus, dt_limit, wide)
    xw, A, B, C = (t.to(wide) for t in (x, A, B, C))
    B, C = (t.repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (B, C))
    decay = torch.exp(dt * A)[..., None, None]
    state = decay * state + (dt[..., None] * xw)[..., None] * B[:, :, None]
    y = (state @ C[..., None])[..., 0]
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(wide) * xw
    return (y if z is None else y * F.silu(z.to(wide))).to(x.dtype), state


def _ssd_torch(
    x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, dt_softplus, dt_limit, reverse,
    return_final_states,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    from . import ssd_torch

    wide = accumulate_dtype(x)
    dt = _discretise(dt, dt_bias, dt_softplus, dt_limit, wide)
    xw, A, B, C = (t.to(wide) for t in (x, A, B, C))
    if initial_states is not None:
        initial_states = initial_states.to(wide)
    if D is not None:
        D = (D if D.dim() == 2 else D[:, None]).to(wide).expand(x.shape[2:])
    if reverse:
        xw, dt, B, C = (t.flip(1) for t in (xw, dt, B, C))
        if cu_seqlens is not None:  # the flip turns the order of a pack's sequences, too
            cu_seqlens = (cu_seqlens[-1] - cu_seqlens).flip(0)
            initial_states = None if initial_states is None else initial_states.flip(0)
    y, states = ssd_torch.scan(
        xw, dt, A, B, C, D, initial_states, cu_seqlens, exporting=is_exporting()
    )
    if reverse:
        y = y.flip(1)
        states = states if cu_seqlens is None else states.flip(0)
    y = (y if z is None else y * F.silu(z.to(wide))).to(x.dtype)
    return y, states if return_final_states else None


def _ssd_bidirectional_torch(
    x, dt, A, B, C, D, dt_bias, initial_states, cu_seqlens, dt_softplus, dt_limit,
    return_final_states,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    wide = accumulate_dtype(x)
    per_direction = x.dim() == 5
    xs, Bs, Cs = (t.unbind(0) if t.dim() == 5 else (t, t) for t in (x, B, C))
    (forward, forward_states), (backward, backward_states) = (
        _ssd_torch(
            xs[i].to(wide), dt[i].to(wide), A[i], Bs[i].to(wide), Cs[i].to(wide),
            D if per_direction or i == 0 else None, None,
            None if dt_bias is None else dt_bias[i],
            None if initial_states is None else initial_states[i],
            cu_seqlens, dt_softplus, dt_limit, i == 1, return_final_states,
        )
        for i in range(2)
    )  # fmt: skip
    y = (forward + backward).to(x.dtype)
    if forward_states is None or backward_states is None:
        return y, None
    return y, torch.stack([forward_states, backward_states])


def _discretise(
    dt: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    dtype: torch.dtype,
) -> Tensor:
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    return dt.clamp(*dt_limit)


def _check_scan(
    x, dt, A, B, C, D, z, dt_bias, dt_limit, initial_states, cu_seqlens, directions: int
) -> None:
    pair = (2,) if directions == 2 else ()
    check_same_dtype(x, dt=dt, B=B, C=C, z=z)
    if x.dim() != 4 and not (pair and x.dim() == 5 and x.shape[0] == 2):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected (b, l, h, p)"
            + (" or (2, b, l, h, p)" if pair else "")
        )
    b, l, h, p = x.shape[-4:]
    if b == 0 or l == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: the batch and the sequence must not be empty"
        )
    _check_groups(B, h, leading=(b, l), may_pair=bool(pair))
    g, n = B.shape[-2:]
    check_tensor("B", B, (*_pair_of(B, 4), b, l, g, n), x)
    check_tensor("C", C, (*(_pair_of(C, 4) if pair else ()), b, l, g, n), x)
    check_tensor("dt", dt, (*pair, b, l, h), x)
    _check_heads(x, A, D, dt_bias, pair)
    check_limits("dt_limit", dt_limit)
    if z is not None:
        check_tensor("z", z, (b, l, h, p), x)
    sequences = b
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, b, l, x)
        sequences = cu_seqlens.shape[0] - 1
    if initial_states is not None:
        check_tensor("initial_states", initial_states, (*pair, sequences, h, p, n), x)
        check_parameter_dtype(x, initial_states=initial_states)


def _check_step(state, x, dt, A, B, C, D, z, dt_bias, dt_limit) -> None:
    check_same_dtype(x, dt=dt, B=B, C=C, z=z)
    if x.dim() != 3 or x.shape[0] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (b, h, p) with b >= 1")
    b, h, p = x.shape
    _check_groups(B, h, leading=(b,), may_pair=False)
    check_tensor("B", B, (b, *B.shape[-2:]), x)
    check_tensor("C", C, tuple(B.shape), x)
    check_tensor("dt", dt, (b, h), x)
    check_tensor("state", state, (b, h, p, B.shape[-1]), x)
    if state.dtype != accumulate_dtype(x):
        raise ValueError(f"state has dtype {state.dtype}, expected {accumulate_dtype(x)}")
    _check_heads(x, A, D, dt_bias, ())
    check_limits("dt_limit", dt_limit)
    if z is not None:
        check_tensor("z", z, (b, h, p), x)


def _check_groups(B: Tensor, h: int, leading: tuple[int, ...], may_pair: bool) -> None:
    dims = len(leading) + 2
    if B.dim() != dims and not (may_pair and B.dim() == dims + 1):
        expected = ", ".join(map(str, leading))
        raise ValueError(f"B has shape {tuple(B.shape)}, expected ({expected}, ngroups, dstate)")
    g = B.shape[-2]
    if g == 0 or h % g:
        raise ValueError(f"B has {g} groups, expected a divisor of x's {h} heads")


def _check_heads(x: Tensor, A, D, dt_bias, pair: tuple[int, ...]) -> None:
    h, p = x.shape[-2:]
    check_tensor("A", A, (*pair, h), x)
    if dt_bias is not None:
        check_tensor("dt_bias", dt_bias, (*pair, h), x)
    if D is not None:
        check_tensor("D", D, (h, p) if D.dim() == 2 else (h,), x)
    check_parameter_dtype(x, A=A, D=D, dt_bias=dt_bias)


def _pair_of(t: Tensor, dims: int) -> tuple[int, ...]:
    return (2,) if t.dim() == dims + 1 else ()
