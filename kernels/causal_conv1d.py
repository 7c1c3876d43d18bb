"""The short depthwise convolution in front of the SSD.

Dimension legend: batch b · seqlen l · channels d
"""

import torch
import torch.nn.functional as F
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
            y, states = _torch(x, weight, bias, activation, initial_states, cu_seqlens, reverse)
    return (y, states) if return_final_states else y


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


def _torch(x, weight, bias, activation, initial_states, cu_seqlens, reverse):
    """y and the final states, through one tensor that holds each sequence beside its window.

    The window, the width − 1 inputs before a sequence in scan order, stands before it in that
    tensor, after it when the scan is reversed. The convolution is then a plain sum of taps, and
    the final states are slices.
    """
    window = weight.shape[1] - 1
    wide = accumulate_dtype(x)
    if reverse:
        weight = weight.flip(1)
    extended, place = _extend(x, initial_states, cu_seqlens, window, reverse)
    bias = None if bias is None else bias.to(wide)
    conv = _conv1d if is_exporting() else convolve_taps
    y = conv(extended.to(wide), weight.to(wide), bias, activation == "silu")
    if place is not None:
        y = y.index_select(1, place if reverse else place - window)
    states = _final_states(extended, cu_seqlens, window, reverse)
    return y.to(x.dtype), states


def _extend(x, initial_states, cu_seqlens, window, reverse):
    """The input with each sequence's window, and the place of each token in it when packed."""
    b, l, d = x.shape
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_states is None:
        initial_states = x.new_zeros(sequences, window, d)
    initial_states = initial_states.to(x.dtype)
    if reverse:
        initial_states = initial_states.flip(1)
    if cu_seqlens is None:
        pieces = (x, initial_states) if reverse else (initial_states, x)
        return torch.cat(pieces, dim=1), None
    bounds = cu_seqlens.long()
    token = torch.arange(l, device=x.device)
    owner = torch.searchsorted(bounds[1:-1], token, right=True)
    place = token + (owner if reverse else owner + 1) * window
    windows = _window_places(bounds, window, at_end=reverse)
    extended = x.new_empty(1, l + sequences * window, d)
    extended = extended.index_copy(1, place, x)
    return extended.index_copy(1, windows.flatten(), initial_states.reshape(1, -1, d)), place


def _window_places(bounds: Tensor, window: int, at_end: bool) -> Tensor:
    """(nseq, window): the first or last places of each sequence with its window, when packed."""
    sequence = torch.arange(bounds.shape[0] - 1, device=bounds.device)
    first = (bounds[1:] if at_end else bounds[:-1]) + sequence * window
    return first[:, None] + torch.arange(window, device=bounds.device)


def _final_states(extended, cu_seqlens, window, reverse):
    if cu_seqlens is None:
        states = extended[:, :window] if reverse else extended[:, extended.shape[1] - window :]
    else:
        places = _window_places(cu_seqlens.long(), window, at_end=not reverse)
        states = extended[0, places]
    return states.flip(1) if reverse else states.clone()


def _conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """`convolve_taps` as one ATen convolution, for export."""
    y = F.conv1d(x.mT, weight[:, None], bias, groups=x.shape[2]).mT
    return F.silu(y) if silu else y


@torch.library.custom_op("mamba2_apps::convolve_taps", mutates_args=())
def convolve_taps(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """x (b, l + width − 1, d), weight (d, width) → y (b, l, d), each tap a multiply-add.

    Depthwise convolution of a few taps is bound by memory, so blocks of tokens pass through all
    taps while they are in the cache; channels stay last, as the projections around it have them.
    """
    b, extended, d = x.shape
    y = x.new_empty(b, extended - weight.shape[1] + 1, d)
    taps = weight.t().contiguous()
    for rows, tokens in _blocks(y):
        _convolve_block(x[rows], taps, bias, tokens, out=y[rows, tokens])
        if silu:
            F.silu(y[rows, tokens], inplace=True)
    return y


@convolve_taps.register_fake
def _(x, weight, bias, silu):
    return x.new_empty(x.shape[0], x.shape[1] - weight.shape[1] + 1, x.shape[2])


@torch.library.custom_op("mamba2_apps::convolve_taps_backward", mutates_args=())
def convolve_taps_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (of a zero bias where there is none)."""
    taps = weight.t().contiguous()
    dx, dtaps = torch.zeros_like(x), torch.zeros_like(taps)
    dbias = taps.new_zeros(taps.shape[1])
    for rows, tokens in _blocks(dy):
        dblock = dy[rows, tokens]
        if silu:
            before = torch.empty_like(dblock)
            _convolve_block(x[rows], taps, bias, tokens, out=before)
            dblock = torch.ops.aten.silu_backward(dblock, before)
        for i, tap in enumerate(taps):
            shifted = slice(tokens.start + i, tokens.stop + i)
            dx[rows, shifted].addcmul_(dblock, tap)
            dtaps[i] += (dblock * x[rows, shifted]).sum((0, 1))
        dbias += dblock.sum((0, 1))
    return dx, dtaps.t().contiguous(), dbias


@convolve_taps_backward.register_fake
def _(dy, x, weight, bias, silu):
    return torch.empty_like(x), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _save(ctx, inputs, output):
    x, weight, bias, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias)


def _differentiate(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    grads = torch.ops.mamba2_apps.convolve_taps_backward(dy, x, weight, bias, ctx.silu)
    return *grads[:2], grads[2] if bias is not None else None, None


convolve_taps.register_autograd(_differentiate, setup_context=_save)


def _convolve_block(x: Tensor, taps: Tensor, bias: Tensor | None, tokens: slice, out: Tensor):
    first = x[:, tokens]
    if bias is None:
        torch.mul(first, taps[0], out=out)
    else:
        torch.addcmul(bias, first, taps[0], out=out)
    for i in range(1, taps.shape[0]):
        out.addcmul_(x[:, tokens.start + i : tokens.stop + i], taps[i])


def _blocks(y: Tensor, elements: int = 2**17):
    """Slices (rows, tokens) that cut y (b, l, d) into blocks of about `elements` values."""
    b, l, d = y.shape
    step = max(1, elements // d)
    rows = max(1, step // l)
    for row in range(0, b, rows):
        for token in range(0, l, step):
            yield slice(row, min(row + rows, b)), slice(token, min(token + step, l))
