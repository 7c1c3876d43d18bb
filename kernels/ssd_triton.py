"""The SSD on Triton: outputs and gradients of a call, and registration with torch.library.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n

A forward is one launch, or more where batch × heads is too small to fill the GPU: then the
sequence is cut into segments, whose states come first, and where these are many another launch adds
them up; few are added up by each walk. Both directions at a large dstate are two launches:
states, then y. A backward is five (S and R, then dx, then dB and dC, then ddt, then the ordered
sums), six in segments, one more with z. A batch whose chunk states would take much memory is taken
in parts, which repeat these launches. Both directions share all of them. Nothing but the inputs is
kept from forward to backward: states are computed again, which costs less than their memory.

How a shape is cut is in `ssd_triton_plan`, how it is launched in `ssd_triton_launch`. Tensors
without a subclass, or a mode of torch to hear of them, pass by torch's dispatcher, which takes
longer than a small forward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import is_plain
from .launching import on, prepare
from .ssd_triton_backward import gate_backward_kernel
from .ssd_triton_launch import Backward, ChunkedForward, Forward
from .ssd_triton_plan import stores_states

GATE_BLOCK = 1024


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
    y, states, _ = _call(
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
    y, states, _ = _call(
        x, dt, A, B, C, D, None, dt_bias, initial_states, cu_seqlens, dt_softplus,
        float(dt_limit[0]), float(dt_limit[1]), False, return_final_states, False,
    )  # fmt: skip
    return y, states if return_final_states else None


def _call(*inputs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not is_plain(*inputs[:10]):
        return _forward_op(*inputs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:10]):
        return _SSD.apply(None, *inputs)
    return _forward(*inputs)


def _dense(tensors):
    """x, dt, B, C and z as they are, the small tensors (A, D, …) without gaps."""
    x, dt, A, B, C, D, z, *rest = tensors
    A, D, *rest = (t if t is None or t.is_contiguous() else t.contiguous() for t in (A, D, *rest))
    return (x, dt, A, B, C, D, z, *rest)


def _forward(
    x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, dt_softplus, low, high, reverse,
    return_final_states, save_ungated,
):  # fmt: skip
    """y, the final states and y before the gate; None for what was not asked for."""
    with on(x.device):
        tensors = _dense((x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens))
        settings = dt_softplus, low, high, reverse
        stored = stores_states(2 if dt.dim() == 4 else 1, B.shape[-1])
        design = ChunkedForward if stored else Forward
        call = prepare(design, tensors, settings, return_final_states, save_ungated)
        if call.far:
            near = (*_near(tensors), *settings, return_final_states, save_ungated)
            return _forward(*near)
        y = torch.empty(call.shape, dtype=x.dtype, device=x.device)
        final = ungated = workspace = states = None
        if return_final_states:
            final = torch.empty(call.state_shape, dtype=torch.float32, device=x.device)
        if save_ungated:
            ungated = torch.empty_like(y)
        if call.floats:
            workspace = torch.empty(call.floats, dtype=torch.float32, device=x.device)
            states = call.states_in(workspace)
        call.run([y if t is None else t for t in (*tensors, y, ungated, final, workspace, states)])
    return y, final, ungated


def _backward(
    dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, ungated, dt_softplus,
    low, high, reverse, into=None,
):  # fmt: skip
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_states, None for what is not there.

    into: where the gradients of x, dt, B and C go, all shared by the directions: parts of the last
    dimension of tensors (b, l, …), dt's (2, b, l, h) for both directions side by side there.
    """
    with on(x.device):
        tensors = _dense((x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens))
        settings = dt_softplus, low, high, reverse
        dz = dinit = None
        if z is not None:
            dy, dz = _gate_backward(dy, z, ungated)
        dfinal = None if dfinal is None else dfinal.contiguous()
        of_dfinal = dfinal is not None
        call = prepare(Backward, (*tensors, dy), settings, of_dfinal, _layout(into, dt))
        if call.far:
            dy, *near = _near((dy, *tensors[:6], None, *tensors[7:]))  # z's gradient is there
            again = (dy, dfinal, *near, ungated, *settings, into)
            found = _backward(*again)
            return (*found[:6], dz, *found[7:])
        workspace = torch.empty(call.floats, dtype=torch.float32, device=x.device)
        states = call.states_in(workspace)
        if into is None:
            dx, dB, dC = (_gradient(t, not call.merged) for t in (x, B, C))
            ddt = _gradient(dt)
        else:
            dx, ddt, dB, dC = into
        dA = _gradient(A)
        dbias = None if dt_bias is None else _gradient(dt_bias)
        dD = None if D is None else _gradient(D)
        if initial_states is not None:
            dinit = torch.empty(call.state_shape, dtype=torch.float32, device=x.device)
        x_, dt_, A_, B_, C_, D_, _, *small = tensors
        call.run([
            workspace if t is None else t
            for t in (x_, dt_, A_, B_, C_, D_, *small, dy, dfinal, workspace, states,
                      dx, ddt, dA, dB, dC, dD, dbias, dinit)
        ])  # fmt: skip
        if not call.merged:
            dx, dB, dC = (
                grad.sum(0) if like.dim() == 4 else grad
                for grad, like in ((dx, x), (dB, B), (dC, C))
            )
        if dinit is not None:
            dinit = dinit.to(initial_states.dtype)
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dinit


def _near(tensors):
    """Copies without gaps, of tensors whose strides are too long for the kernels."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


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


def _layout(into: tuple[Tensor, ...] | None, dt: Tensor) -> tuple[int, ...] | None:
    """How far apart tokens are in dx, in dB and dC, directions and tokens in ddt."""
    if into is None:
        return None
    dx, ddt, dB, _ = into
    return dx.stride(1), dB.stride(1), ddt.stride(0) if dt.dim() == 4 else 0, ddt.stride(-2)


def _present(t: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors only: an empty one stands for none."""
    return torch.empty(0, dtype=like.dtype, device=like.device) if t is None else t


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
    which takes longer than a small forward. Without dispatch keys it calls the kernels itself.
    """

    @staticmethod
    def forward(ctx, keys, *inputs):
        if keys is None:
            output = _forward(*inputs)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                output = _forward_op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)
        *tensors, dt_softplus, low, high, reverse, _, _ = inputs
        ctx.set_materialize_grads(False)
        if output[2] is not None:
            ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors, output[2])
        ctx.settings = dt_softplus, low, high, reverse
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal, _):
        *tensors, ungated = ctx.saved_tensors
        if dy is None:
            x = tensors[0]
            dy = x.new_zeros(()).expand(x.shape[-4:])
        if is_plain(dy, dfinal, *tensors):
            arguments = dy, dfinal, *tensors, ungated, *ctx.settings
            return None, *_backward(*arguments), *(None,) * 7
        given = iter(_backward_op(dy, dfinal, *tensors, _present(ungated, dy), *ctx.settings))
        *differentiable, _ = tensors  # cu_seqlens has none
        return None, *(None if t is None else next(given) for t in differentiable), *(None,) * 7


def _forward_as_op(*inputs):
    y, final, ungated = _forward(*inputs)
    return y, _present(final, y), _present(ungated, y)


def _backward_as_op(*inputs):
    return [t for t in _backward(*inputs) if t is not None]


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
    _library.impl("ssd_triton_forward", _forward_as_op, _key)
    _library.impl("ssd_triton_backward", _backward_as_op, _key)
torch.library.register_fake("mamba2_apps::ssd_triton_forward", _fake_forward, lib=_library)
torch.library.register_fake("mamba2_apps::ssd_triton_backward", _fake_backward, lib=_library)
_library.impl("ssd_triton_forward", _autograd, "Autograd", with_keyset=True)
_forward_op = torch.ops.mamba2_apps.ssd_triton_forward.default
_backward_op = torch.ops.mamba2_apps.ssd_triton_backward.default
