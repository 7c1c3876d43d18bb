"""RMS normalisation with a gate, as between the SSD and the output projection of Mamba-2."""

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
    from . import gated_rms_norm_torch as torch_backend

    wide = accumulate_dtype(x)
    size = group_size or x.shape[-1]
    gate = None if z is None else z.to(wide)
    norm = torch_backend.define if is_exporting() else torch_backend.normalise_and_gate
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
