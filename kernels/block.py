"""A whole pre-norm Mamba-2 block as one operator, without gradients.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · d_model d
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv_ssd_norm import _check as check_inside
from .conv_ssd_norm import conv_ssd_norm
from .dispatch import (
    accumulate_dtype,
    autocast_dtype,
    check_parameter_dtype,
    check_tensor,
    debugging,
    is_plain,
    no_autocast,
    resolve_backend,
)
from .ssd import INFINITY

# softplus of this plus any sane dt_bias is exactly 0 in every float type, and float16 can hold it.
DT_OF_PADDING = -1e4
# What the Triton kernels cut the residual stream's width and the inner channels into; a program
# holds all of the width, so that each token is read once.
PIECE, MOST_WIDTH = 64, 256


def mamba2_block(
    residual: Tensor,
    norm_weight: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    gate_norm_weight: Tensor,
    out_proj: Tensor,
    *,
    headdim: int,
    ngroups: int,
    d_state: int,
    dt_limit: tuple[float, float] = (0.0, INFINITY),
    eps: float = 1e-5,
    gate_eps: float = 1e-5,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """residual + out_proj conv_ssd_norm(in_proj norm(residual)), with RMSNorms of whole rows.

    Products are of the autocast dtype where autocast is on, else of in_proj's; norms, the scan's
    state and the addition are of float32 (float64 for float64). On Triton products are of bfloat16
    only: rows meet in_proj before they are normalised and may leave float16's range, and float32 is
    for those who want its digits.

    Args:
        residual: (b, l, d), of the products' dtype or float32. On Triton d is a multiple of 64 up
            to 256.
        norm_weight: (d,).
        in_proj: (2 h p + 2 g n + A.numel(), d); its outputs are z, x, B, C and dt.
        gate_norm_weight: (h p,), of the norm of all channels after the gate z.
        out_proj: (d, h p). On Triton h p is a multiple of 64.
        eps, gate_eps: of the first norm and of the one after the gate.
        lengths: (b,) integers: only the first lengths[i] tokens of row i are data, and the reverse
            scan starts at their end. Outputs after them are arbitrary, and finite where the input
            is. For a causal A it is not looked at.
        Others as in `conv_ssd_norm`.

    Returns:
        (b, l, d) in residual's dtype.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as above; lengths beside
            cu_seqlens, or beside a lower limit of dt, which a step of 0 at padding would pass.
        RuntimeError: the backend asked for cannot run here; gradients are recorded.
    """
    given = norm_weight, in_proj, conv_weight, conv_bias, dt_bias, A, D, gate_norm_weight, out_proj
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (residual, *given)
    ):
        raise RuntimeError(
            "mamba2_block has no gradients, and they are recorded; call it under torch.no_grad(), "
            "or its parts one after the other"
        )
    dtype = autocast_dtype(in_proj)
    tensors = (
        residual, norm_weight, in_proj, conv_weight, conv_bias, dt_bias, A, D, gate_norm_weight,
        out_proj, lengths if A.dim() == 2 else None, cu_seqlens,
    )  # fmt: skip
    limits = float(dt_limit[0]), float(dt_limit[1])
    settings = headdim, ngroups, d_state, *limits, eps, gate_eps, dtype
    if resolve_backend(backend, residual) == "triton":
        if reason := why_not_served(residual, dtype, out_proj.shape[-1]):
            raise ValueError(f"the Triton backend {reason}")
        from . import block_triton

        if debugging() or not is_plain(*tensors):
            check(tensors, headdim, ngroups, d_state, dt_limit, dtype)
        # It checks other tensors itself, once for all that are alike.
        return block_triton.mamba2_block(*tensors, *settings)
    check(tensors, headdim, ngroups, d_state, dt_limit, dtype)
    with no_autocast(residual):
        return _torch(*tensors, *settings)


def why_not_served(residual: Tensor, dtype: torch.dtype, inner: int) -> str | None:
    """Why the Triton backend does not take these, or None where it does.

    dtype is the products', inner is h p.
    """
    d = residual.shape[-1]
    if dtype != torch.bfloat16:
        return f"multiplies bfloat16 in a block, and the products are {dtype}"
    if residual.dtype not in (dtype, torch.float32):
        return f"adds to float32 or bfloat16, and residual is {residual.dtype}"
    if d % PIECE or d > MOST_WIDTH:
        return f"takes a width that is a multiple of {PIECE} up to {MOST_WIDTH}, and d is {d}"
    if inner % PIECE:
        return f"takes a multiple of {PIECE} inner channels, and there are {inner}"
    return None


def check(
    tensors: tuple[Any, ...],
    p: int,
    g: int,
    n: int,
    dt_limit: tuple[float, float],
    dtype: torch.dtype,
) -> None:
    """Raises ValueError where shapes, dtypes and devices are not as `mamba2_block` says."""
    (
        residual, norm_weight, in_proj, conv_weight, conv_bias, dt_bias, A, D, gate_norm_weight,
        out_proj, lengths, cu_seqlens,
    ) = tensors  # fmt: skip
    wide = torch.promote_types(dtype, torch.float32)
    if residual.dtype not in (dtype, wide):
        raise ValueError(f"residual has dtype {residual.dtype}, expected {dtype} or {wide}")
    if residual.dim() != 3 or 0 in residual.shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, expected (b, l, d), none of them 0"
        )
    b, l, d = residual.shape
    if A.dim() not in (1, 2):
        raise ValueError(f"A has shape {tuple(A.shape)}, expected (h,) or (2, h)")
    inner = A.shape[-1] * p
    outputs = 2 * inner + 2 * g * n + A.numel()
    check_tensor("norm_weight", norm_weight, (d,), residual)
    check_tensor("in_proj", in_proj, (outputs, d), residual)
    check_tensor("gate_norm_weight", gate_norm_weight, (inner,), residual)
    check_tensor("out_proj", out_proj, (d, inner), residual)
    check_parameter_dtype(residual, norm_weight=norm_weight)
    # What in_proj will give, without the memory for it.
    rows = in_proj[0, 0].to(dtype).expand(b, l, outputs)
    check_inside(
        rows, conv_weight, conv_bias, dt_bias, A, D, gate_norm_weight, None, cu_seqlens, p, g, n,
        dt_limit,
    )  # fmt: skip
    if lengths is None:
        return
    if cu_seqlens is not None:
        raise ValueError("lengths and cu_seqlens were given together; a batch is padded or packed")
    check_tensor("lengths", lengths, (b,), residual)
    if lengths.is_floating_point():
        raise ValueError(f"lengths has dtype {lengths.dtype}, expected integers")
    if A.dim() == 2 and dt_limit[0] > 0:
        raise ValueError(f"dt_limit is {dt_limit}, expected a lower limit of 0 beside lengths")


def _torch(
    residual, norm_weight, in_proj, conv_weight, conv_bias, dt_bias, A, D, gate_norm_weight,
    out_proj, lengths, cu_seqlens, p, g, n, low, high, eps, gate_eps, dtype,
) -> Tensor:  # fmt: skip
    """The definition."""
    in_proj, out_proj = in_proj.to(dtype), out_proj.to(dtype)
    wide = residual.to(accumulate_dtype(residual))
    u = F.rms_norm(wide, wide.shape[2:], norm_weight.to(wide.dtype), eps)
    zxBCdt = F.linear(u.to(in_proj.dtype), in_proj)
    if lengths is not None:
        padding = torch.arange(wide.shape[1], device=lengths.device) >= lengths[:, None]
        first_x = out_proj.shape[1]
        first_dt = first_x + conv_weight.shape[0]
        zxBCdt[..., first_x:first_dt].masked_fill_(padding[..., None], 0)
        zxBCdt[..., first_dt:].masked_fill_(padding[..., None], DT_OF_PADDING)
    mixed = conv_ssd_norm(
        zxBCdt, conv_weight, conv_bias, dt_bias, A, D, gate_norm_weight, headdim=p, ngroups=g,
        d_state=n, dt_limit=(low, high), eps=gate_eps, cu_seqlens=cu_seqlens, projection=out_proj,
        backend="torch",
    )  # fmt: skip
    return (wide + mixed).to(residual.dtype)
