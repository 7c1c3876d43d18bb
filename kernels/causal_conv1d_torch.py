"""The depthwise convolution on plain torch operations, with its own backward.

Depthwise convolution of a few taps is bound by memory. So a block of tokens passes through all
taps, as multiply-adds with the channels last, while it is in the cache; only a block at a
sequence's border is copied beside the window that came before it. Intermediate results go to
an arena that every block uses again.

Dimension legend: batch b · seqlen l · channels d
    window: the width − 1 inputs before a sequence in scan order
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arena import Arena

BLOCK_ELEMENTS = 2**20


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    exporting: bool,
) -> Tensor:
    """x (b, l, d), weight (d, width) → y (b, l, d), all tensors in one dtype."""
    if not exporting:
        return convolve_taps(x, weight, bias, initial_states, cu_seqlens, silu, reverse)
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens cannot be exported; export the model with a padding mask")
    window = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    window = window if initial_states is None else initial_states
    extended = torch.cat([x, window.flip(1)] if reverse else [window, x], dim=1)
    taps = (weight.flip(1) if reverse else weight)[:, None]
    y = F.conv1d(extended.mT, taps, bias, groups=x.shape[2]).mT
    return F.silu(y) if silu else y


def final_states(
    x: Tensor,
    window: int,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> Tensor:
    """The last `window` inputs of each sequence in scan order, (b or nseq, window, d)."""
    b, l, d = x.shape
    if initial_states is None:
        sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
        initial_states = x.new_zeros(sequences, window, d)
    back = torch.arange(window, 0, -1, device=x.device)  # steps back from the end of the scan
    if cu_seqlens is None:
        lengths = torch.full((1, 1), l, device=x.device)
        tokens = (back - 1 if reverse else l - back).clamp(0, l - 1)
        inside = x[:, tokens]
    else:
        bounds = cu_seqlens.long()
        start, end = bounds[:-1, None], bounds[1:, None]
        lengths = end - start
        tokens = start + back - 1 if reverse else end - back
        inside = x[0, torch.minimum(torch.maximum(tokens, start), end - 1)]
    before = initial_states.gather(
        1,
        (window + lengths - back)
        .clamp(0, max(window - 1, 0))[..., None]
        .expand(initial_states.shape),
    )
    return torch.where((back <= lengths)[..., None], inside, before.to(x.dtype))


@torch.library.custom_op("mamba2_apps::convolve_taps", mutates_args=())
def convolve_taps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> Tensor:
    """See `convolve`."""
    y, taps = x.new_empty(x.shape), _taps(weight, reverse)
    for block in _blocks(x, taps.shape[0] - 1, cu_seqlens, reverse):
        out = y[block.rows, block.tokens]
        _multiply_add(block.extend(x, initial_states), taps, bias, out)
        if silu:
            F.silu(out, inplace=True)
    return y


@convolve_taps.register_fake
def _(x, weight, bias, initial_states, cu_seqlens, silu, reverse):
    return x.new_empty(x.shape)


@torch.library.custom_op("mamba2_apps::convolve_taps_backward", mutates_args=())
def convolve_taps_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the initial states (empty where there are none)."""
    taps = _taps(weight, reverse)
    dx, dtaps, dbias = x.new_empty(x.shape), torch.zeros_like(taps), torch.zeros_like(taps[0])
    dinitial = x.new_zeros(0 if initial_states is None else initial_states.shape)
    with Arena(x) as arena:
        for block in _blocks(x, taps.shape[0] - 1, cu_seqlens, reverse):
            extended = block.extend(x, initial_states)
            dblock = dy[block.rows, block.tokens]
            if silu:
                before = _multiply_add(extended, taps, bias, arena(*dblock.shape))
                dblock = torch.ops.aten.silu_backward(
                    dblock, before, grad_input=arena(*dblock.shape)
                )
            product = arena(*dblock.shape)
            for i in range(taps.shape[0]):
                reached = extended[:, i : i + dblock.shape[1]]
                dtaps[i] += torch.mul(dblock, reached, out=product).sum((0, 1))
            dbias += dblock.sum((0, 1))
            block.add_gradient(dblock, taps, dx, None if initial_states is None else dinitial)
            arena.clear()
    dweight = dtaps.t().flip(1) if reverse else dtaps.t()
    return dx, dweight.contiguous(), dbias, dinitial


@convolve_taps_backward.register_fake
def _(dy, x, weight, bias, initial_states, cu_seqlens, silu, reverse):
    initial_shape = (0,) if initial_states is None else initial_states.shape
    channels = weight.shape[0]
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(channels),
        x.new_empty(initial_shape),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dy):
    x, weight, bias, initial_states, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias, dinitial = torch.ops.mamba2_apps.convolve_taps_backward(
        dy, x, weight, bias, initial_states, cu_seqlens, ctx.silu, ctx.reverse
    )
    dbias = None if bias is None else dbias
    return dx, dweight, dbias, None if initial_states is None else dinitial, None, None, None


convolve_taps.register_autograd(_differentiate, setup_context=_save)


class _Block(NamedTuple):
    """Tokens of one sequence that are convolved together, and how much of their window it holds."""

    rows: slice
    states: slice  # the rows of the initial states
    tokens: slice
    window: int
    inside: int  # tokens of the window that belong to the sequence; the others are initial states
    reverse: bool

    def extend(self, x: Tensor, initial_states: Tensor | None) -> Tensor:
        """The block's inputs with their window, in time order: (r, tokens + window, d)."""
        start, stop = self.tokens.start, self.tokens.stop
        reached = (
            slice(start, stop + self.inside) if self.reverse else slice(start - self.inside, stop)
        )
        own = x[self.rows, reached]
        if self.inside == self.window:
            return own
        if initial_states is None:
            missing = own.new_zeros(own.shape[0], self.window - self.inside, own.shape[2])
        else:
            missing = initial_states[self.states, self.inside :]
        return torch.cat([own, missing.flip(1)] if self.reverse else [missing, own], dim=1)

    def add_gradient(
        self, dblock: Tensor, taps: Tensor, dx: Tensor, dinitial: Tensor | None
    ) -> None:
        """Write the inputs' gradient at the block's tokens and add it where the window lies.

        The tap of the current token goes first: it writes each of the block's tokens once. The
        window's tokens were written by the block before this one in the scan.
        """
        dx, count = dx[self.rows], dblock.shape[1]
        current = 0 if self.reverse else self.window
        torch.mul(dblock, taps[current], out=dx[:, self.tokens])
        for i, tap in enumerate(taps):
            steps = abs(i - current)  # back along the scan, to the input that this tap reads
            if steps == 0:
                continue
            # As many tokens at the block's border read the initial states instead.
            lost = min(count, max(0, steps - self.inside))
            if self.reverse:
                own, border = dblock[:, : count - lost], dblock[:, count - lost :].flip(1)
                start = self.tokens.start + steps
            else:
                own, border = dblock[:, lost:], dblock[:, :lost]
                start = self.tokens.start + lost - steps
            dx[:, start : start + count - lost].addcmul_(own, tap)
            if dinitial is not None and lost:
                first = self.window - steps + self.inside
                dinitial[self.states, first : first + lost].addcmul_(border, tap)


def _blocks(x: Tensor, window: int, cu_seqlens: Tensor | None, reverse: bool) -> Iterator[_Block]:
    """Blocks of about BLOCK_ELEMENTS values, those of one sequence in the order of the scan."""
    b, l, d = x.shape
    step = max(1, BLOCK_ELEMENTS // d)
    if cu_seqlens is None:
        height = max(1, step // l)
        groups = [slice(row, min(row + height, b)) for row in range(0, b, height)]
        sequences = [(group, group, 0, l) for group in groups]
    else:
        bounds = pairwise(cu_seqlens.tolist())
        sequences = [(slice(0, 1), slice(i, i + 1), *ends) for i, ends in enumerate(bounds)]
    for rows, states, first, end in sequences:
        starts = range(first, end, step)
        for start in reversed(starts) if reverse else starts:
            stop = min(start + step, end)
            inside = min(window, end - stop if reverse else start - first)
            yield _Block(rows, states, slice(start, stop), window, inside, reverse)


def _taps(weight: Tensor, reverse: bool) -> Tensor:
    """(d, width) → (width, d), in the order of time."""
    return (weight.flip(1) if reverse else weight).t().contiguous()


def _multiply_add(extended: Tensor, taps: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    count = out.shape[1]
    if bias is None:
        torch.mul(extended[:, :count], taps[0], out=out)
    else:
        torch.addcmul(bias, extended[:, :count], taps[0], out=out)
    for i in range(1, taps.shape[0]):
        out.addcmul_(extended[:, i : i + count], taps[i])
    return out
