"""A whole block on Triton in four launches or two more: product, convolution, scan, product.

Registered as torch.ops.mamba2_apps.mamba2_block_triton, without gradients. Arguments are taken as
checked: `block.py` does that and says what the op computes.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · d_model d
"""

from typing import Any

import torch
from torch import Tensor

from . import block_products_triton as products
from . import ssd_triton
from .conv_ssd_norm_triton import _convolved, _Sizes
from .dispatch import is_plain
from .weights_triton import cast_both


def _forward(
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
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    headdim: int,
    ngroups: int,
    d_state: int,
    low: float,
    high: float,
    eps: float,
    gate_eps: float,
    dtype: torch.dtype,
) -> Tensor:
    sizes = _Sizes(A.shape[-1], headdim, ngroups, d_state, A.dim())
    residual = residual.contiguous()
    in_proj, out_proj = cast_both(in_proj, out_proj, dtype)
    inner, channels = out_proj.shape[1], conv_weight.shape[0]
    rows = products.norm_linear(
        residual, norm_weight, in_proj[inner:], None if lengths is None else lengths.contiguous(),
        channels, eps,
    )  # fmt: skip
    xBC = rows.narrow(2, 0, channels)
    x, B, C = sizes.split(_convolved(xBC, conv_weight, conv_bias, cu_seqlens))
    y, _, _ = ssd_triton._forward(
        x, _step_sizes(rows, channels, sizes), A, B, C, D, None, dt_bias, None, cu_seqlens, True,
        low, high, False, False, False,
    )  # fmt: skip
    return products.gated_linear(
        y.flatten(2), residual, norm_weight, in_proj, gate_norm_weight, out_proj, eps, gate_eps
    )


def _step_sizes(rows: Tensor, first: int, sizes: _Sizes) -> Tensor:
    """dt (b, l, h), or (2, b, l, h), in the columns of `rows` from `first`: a view."""
    b, l, e = rows.shape
    if sizes.directions == 1:
        return rows.narrow(2, first, sizes.h)
    return rows.as_strided((2, b, l, sizes.h), (sizes.h, l * e, e, 1), first)


torch.library.define(
    "mamba2_apps::mamba2_block_triton",
    "(Tensor residual, Tensor norm_weight, Tensor in_proj, Tensor conv_weight, Tensor? conv_bias, "
    "Tensor dt_bias, Tensor A, Tensor? D, Tensor gate_norm_weight, Tensor out_proj, "
    "Tensor? lengths, Tensor? cu_seqlens, SymInt headdim, SymInt ngroups, SymInt d_state, "
    "float low, float high, float eps, float gate_eps, ScalarType dtype) -> Tensor",
)
torch.library.impl("mamba2_apps::mamba2_block_triton", ("cpu", "cuda"))(_forward)


@torch.library.register_fake("mamba2_apps::mamba2_block_triton")
def _(residual, *rest) -> Tensor:
    return residual.new_empty(residual.shape)


def mamba2_block(*inputs: Any) -> Tensor:
    """`kernels.mamba2_block` on checked arguments, in the order of `_forward`."""
    run = _forward if is_plain(*inputs[:12]) else torch.ops.mamba2_apps.mamba2_block_triton
    return run(*inputs)
