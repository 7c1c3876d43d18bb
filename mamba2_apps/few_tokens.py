"""The causal mixer on a few tokens of a stream, in plain operations.

On a CPU the operators' checks, blocks and dispatch cost several times what the arithmetic of a few
tokens does. Here is the same arithmetic in some thirty operations: one chunk of the quadratic form
of the state space duality, and what the state gives to it.

batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2_apps.kernels.dispatch import is_exporting

FEW = 16


def serves(mixer: Any, u: Tensor) -> bool:
    """Whether `mix` may take the place of the operators: a few float32 tokens, on a CPU, no
    gradients.
    """
    return (
        u.shape[1] <= FEW
        and u.device.type == "cpu"
        and u.dtype == mixer.in_proj.weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and mixer.context_parallel is None
        and not is_exporting()
        and not torch.compiler.is_compiling()
    )


def mix(mixer: Any, u: Tensor, window: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (b, l, d_model), and the convolution's window and the state after them.

    Args:
        mixer: a causal Mamba2.
        u: (b, l, d_model).
        window: (b, d_conv - 1, conv_dim), the inputs before.
        state: (b, h, p, n) float32. Neither is modified.
    """
    *mlp, z, xBC, dt = _project(u, mixer.in_proj).split(mixer._split_sizes, dim=-1)
    inputs = torch.cat([window, xBC], 1)
    taps = inputs.unfold(1, mixer.d_conv, 1) * mixer.conv1d.weight.squeeze(1)
    mixed = taps.sum(-1) if mixer.conv1d.bias is None else taps.sum(-1) + mixer.conv1d.bias
    x, B, C = mixer._split_conv(F.silu(mixed))
    dt = F.softplus(dt + mixer.dt_bias)
    if mixer.dt_limit != (0.0, torch.inf):
        dt = dt.clamp(*mixer.dt_limit)
    y, state = _scan(x, dt, mixer._decay_rates(), B, C, state)
    skip = mixer._skip()
    y = y + (skip if skip.ndim == 2 else skip[:, None]) * x
    out = _project(_gate(mixer, y.flatten(-2), z, mlp), mixer.out_proj)
    return out, inputs[:, u.shape[1] :].clone(), state


def _project(u: Tensor, linear: Any) -> Tensor:
    """linear(u) with the weights on the left, where few columns take less than half the time."""
    rows = (linear.weight @ u.flatten(0, -2).t()).t()
    rows = rows if linear.bias is None else rows + linear.bias
    return rows.unflatten(0, u.shape[:-1])


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """y (b, l, h, p) of state_t C_t, and the last state, from x (b, l, h, p), dt (b, l, h).

    The heads of a group share B and C, so that one product with them serves all of these.
    """
    p, g = x.shape[3], B.shape[2]
    dt, x, B, C = (t.transpose(1, 2) for t in (dt, x, B, C))
    total = (dt * A[:, None]).cumsum(-1)  # (b, h, l), falling
    # Above the diagonal exp may overflow; tril drops what it holds there.
    weight = (total[..., :, None] - total[..., None, :]).exp().tril() * dt[..., None, :]
    scores = (C @ B.mT)[:, :, None] * weight.unflatten(1, (g, -1))  # (b, g, h / g, l, l)
    grouped = state.reshape(len(x), g, -1, state.shape[-1])  # (b, g, h p / g, n)
    carried = (C @ grouped.mT).unflatten(-1, (-1, p)).transpose(2, 3).flatten(1, 2)
    decay = total.exp()[..., None]
    y = scores.flatten(1, 2) @ x + decay * carried
    left = (x * weight[:, :, -1, :, None]).mT.reshape(len(x), g, -1, x.shape[2])
    return y.transpose(1, 2), decay[:, :, -1:] * state + (left @ B).view_as(state)


def _gate(mixer: Any, y: Tensor, z: Tensor, mlp: list[Tensor]) -> Tensor:
    norm = mixer.norm
    if norm is None:
        y = y * F.silu(z)
    else:
        if not norm.norm_before_gate:
            y = y * F.silu(z)
        size = norm.group_size
        y = F.rms_norm(y.unflatten(-1, (-1, size)), (size,), None, norm.eps).flatten(-2)
        y = y * norm.weight
        if norm.norm_before_gate:
            y = y * F.silu(z)
    if mlp:
        gate, value = mlp
        y = torch.cat([F.silu(gate) * value, y], dim=-1)
    return y
