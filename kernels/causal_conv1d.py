"""The short depthwise convolution in front of the SSD.

Dimension legend: batch b · seqlen l · channels d
"""

from torch import Tensor

from .dispatch import (
    accumulate_dtype,
    autocast,
    check_cu_seqlens,
    check_parameter_dtype,
    check_same_dtype,
    check_tensor,
    is_exporting,
    no_autocast,
    resolve_backend,
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_final_states: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution along l; the last tap of `weight` is the current token.

    Args:
        x: (b, l, d), float32, bfloat16, float16, or float64 (torch backend), any strides.
        weight: (d, width).
        bias: (d,).
        activation: None or "silu", applied to the result.
        initial_states: (b or nseq, width − 1, d), the inputs before the sequence in scan order;
            zeros where None.
        cu_seqlens: (nseq + 1,) int32, rising from 0 to l: packs nseq sequences along l, b = 1.
        reverse: scan from the end; equal to flip, convolve, flip.
        return_final_states: return the last width − 1 inputs in scan order as well.
        backend: "auto", "triton" or "torch"; see `dispatch.resolve_backend`.
            weight, bias and initial_states may be float32 beside half-precision x.

    Returns:
        y (b, l, d) in x's dtype; with return_final_states also the states, shaped as
        initial_states, in x's dtype.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as above.
        RuntimeError: the backend asked for cannot run here.
    """
    (x,) = autocast(x)
    _check(x, weight, bias, activation, initial_states, cu_seqlens)
    if resolve_backend(backend, x) == "triton":
        from . import causal_conv1d_triton

        y, states = causal_conv1d_triton.causal_conv1d(
            x, weight, bias, activation, initial_states, cu_seqlens, reverse, return_final_states
        )
    else:
        with no_autocast(x):
            y, states = _torch(
                x, weight, bias, activation, initial_states, cu_seqlens, reverse,
                return_final_states,
            )  # fmt: skip
    return y if states is None else (y, states)


def _check(x, weight, bias, activation, initial_states, cu_seqlens) -> None:
    check_same_dtype(x)
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (b, l, d), none of them 0")
    b, l, d = x.shape
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected ({d}, width)")
    check_tensor("weight", weight, (d, weight.shape[1]), x)
    if bias is not None:
        check_tensor("bias", bias, (d,), x)
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r}, expected None or 'silu'")
    sequences = b
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, b, l, x)
        sequences = cu_seqlens.shape[0] - 1
    if initial_states is not None:
        check_tensor("initial_states", initial_states, (sequences, weight.shape[1] - 1, d), x)
    check_parameter_dtype(x, weight=weight, bias=bias, initial_states=initial_states)


def _torch(x, weight, bias, activation, initial_states, cu_seqlens, reverse, return_final_states):
    from . import causal_conv1d_torch

    wide = accumulate_dtype(x)
    silu, window = activation == "silu", weight.shape[1] - 1
    states = None
    if return_final_states:
        states = causal_conv1d_torch.final_states(x, window, initial_states, cu_seqlens, reverse)
    bias, initial_states = (None if t is None else t.to(wide) for t in (bias, initial_states))
    y = causal_conv1d_torch.convolve(
        x.to(wide), weight.to(wide), bias, silu, initial_states, cu_seqlens, reverse, is_exporting()
    )
    return y.to(x.dtype), states
