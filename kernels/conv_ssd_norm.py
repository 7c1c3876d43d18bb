"""What a Mamba-2 block does after its first projection, as one operator.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · d_model d
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .causal_conv1d import causal_conv1d
from .dispatch import (
    autocast,
    check_cu_seqlens,
    check_limits,
    check_parameter_dtype,
    check_same_dtype,
    check_tensor,
    resolve_backend,
)
from .gated_rms_norm import gated_rms_norm
from .ssd import INFINITY, ssd, ssd_bidirectional


def conv_ssd_norm(
    zxBCdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    norm_weight: Tensor,
    *,
    headdim: int,
    ngroups: int,
    d_state: int,
    dt_limit: tuple[float, float] = (0.0, INFINITY),
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    cu_seqlens: Tensor | None = None,
    projection: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolution with SiLU over (x, B, C), scan, norm beside the gate z, and a projection, if any.

    It equals these operators called one after the other, with dt through softplus. One after the
    other, each would give its inputs' gradients a tensor of their own, to be copied together into
    zxBCdt's; here they are written where they belong.

    Args:
        zxBCdt: (b, l, e), the outputs of a block's first projection side by side: z and x (h p
            each), B and C (g n each), dt (h; both directions' one after the other), and any number
            of further columns, which are not looked at and whose gradient is 0.
        conv_weight: (h p + 2 g n, width).
        conv_bias: (h p + 2 g n,).
        dt_bias, A: (h,) for a causal scan, (2, h) for a scan in both directions; A is negative.
        D: (h,) or (h, p).
        norm_weight: (h p,).
        headdim, ngroups, d_state: p, g and n.
        group_size: channels that share an RMS. None: h p.
        projection: (d, h p), the weight of the block's second projection; its products are then
            the answer. What it multiplies is not kept for the backward.
        Others as in `ssd` and `gated_rms_norm`.

    Returns:
        (b, l, h p), or (b, l, d) with a projection, in zxBCdt's dtype.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as above.
        RuntimeError: the backend asked for cannot run here.
    """
    (zxBCdt,) = autocast(zxBCdt)
    tensors = zxBCdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, projection, cu_seqlens
    _check(*tensors, headdim, ngroups, d_state, dt_limit)
    group_size = group_size or norm_weight.shape[0]
    options = eps, group_size, norm_before_gate
    if resolve_backend(backend, zxBCdt) == "triton":
        from . import conv_ssd_norm_triton

        limits = float(dt_limit[0]), float(dt_limit[1])
        settings = headdim, ngroups, d_state, *limits, *options
        return conv_ssd_norm_triton.conv_ssd_norm(*tensors, *settings)
    return _torch(*tensors, headdim, ngroups, d_state, dt_limit, *options)


def _check(
    zxBCdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, projection, cu_seqlens, p, g, n,
    dt_limit,
) -> None:  # fmt: skip
    check_same_dtype(zxBCdt)
    if A.dim() not in (1, 2) or (A.dim() == 2 and A.shape[0] != 2):
        raise ValueError(f"A has shape {tuple(A.shape)}, expected (h,) or (2, h)")
    h = A.shape[-1]
    if h % g:
        raise ValueError(f"ngroups is {g}, expected a divisor of the {h} heads")
    least = 2 * h * p + 2 * g * n + A.numel()
    if zxBCdt.dim() != 3 or 0 in zxBCdt.shape or zxBCdt.shape[2] < least:
        raise ValueError(
            f"zxBCdt has shape {tuple(zxBCdt.shape)}, expected (b, l, at least {least}), none of "
            "them 0"
        )
    channels = h * p + 2 * g * n
    if conv_weight.dim() != 2 or conv_weight.shape[1] == 0:
        raise ValueError(
            f"conv_weight has shape {tuple(conv_weight.shape)}, expected ({channels}, width)"
        )
    check_tensor("conv_weight", conv_weight, (channels, conv_weight.shape[1]), zxBCdt)
    if conv_bias is not None:
        check_tensor("conv_bias", conv_bias, (channels,), zxBCdt)
    check_tensor("dt_bias", dt_bias, tuple(A.shape), zxBCdt)
    if D is not None:
        check_tensor("D", D, (h, p) if D.dim() == 2 else (h,), zxBCdt)
    check_tensor("norm_weight", norm_weight, (h * p,), zxBCdt)
    if projection is not None:
        if projection.dim() != 2 or projection.shape[1] != h * p:
            raise ValueError(
                f"projection has shape {tuple(projection.shape)}, expected (d, {h * p})"
            )
        check_tensor("projection", projection, (projection.shape[0], h * p), zxBCdt)
    check_parameter_dtype(
        zxBCdt, conv_weight=conv_weight, conv_bias=conv_bias, dt_bias=dt_bias, A=A, D=D,
        norm_weight=norm_weight, projection=projection,
    )  # fmt: skip
    check_limits("dt_limit", dt_limit)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, zxBCdt.shape[0], zxBCdt.shape[1], zxBCdt)


def _torch(
    zxBCdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, projection, cu_seqlens, p, g, n,
    dt_limit, eps, group_size, norm_before_gate,
) -> Tensor:  # fmt: skip
    """The definition."""
    h = A.shape[-1]
    sizes = [h * p, h * p + 2 * g * n, A.numel()]
    z, xBC, dt, _ = zxBCdt.split([*sizes, zxBCdt.shape[2] - sum(sizes)], dim=-1)
    mixed = causal_conv1d(
        xBC, conv_weight, conv_bias, activation="silu", cu_seqlens=cu_seqlens, backend="torch"
    )
    assert isinstance(mixed, Tensor)
    x, B, C = mixed.split([h * p, g * n, g * n], dim=-1)
    if A.dim() == 2:
        dt = dt.unflatten(-1, (2, h)).permute(2, 0, 1, 3)
    scan: Any = ssd if A.dim() == 1 else ssd_bidirectional
    y = scan(
        x.unflatten(-1, (h, p)), dt, A, B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n)), D=D,
        dt_bias=dt_bias, dt_softplus=True, dt_limit=dt_limit, cu_seqlens=cu_seqlens,
        backend="torch",
    )  # fmt: skip
    y = gated_rms_norm(
        y.flatten(-2), norm_weight, z, eps=eps, group_size=group_size,
        norm_before_gate=norm_before_gate, backend="torch",
    )  # fmt: skip
    return y if projection is None else F.linear(y, projection.to(y.dtype))
