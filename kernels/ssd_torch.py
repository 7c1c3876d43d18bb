"""The SSD on plain torch operations: the chunked form as batched products, with its own backward.

This is what runs on a CPU and in float64. Forward and backward are registered operators
(torch.ops.mamba2_apps.ssd_scan and ssd_scan_backward), opaque to torch.compile; an exported model
takes `reference.ssd_chunked` instead, which decomposes to ATen.

On a CPU the chunked form is bound by memory, not by its products. So a few chunks at a time, one
block, go through the whole computation while they are in the cache, and the state passes from
block to block. Inside a block the heads of a group stand side by side in the states, (g, n, k), so
that a product with B or C is one matrix product over all of them without a copy.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · chunk q
    c chunks of a block · k = (h / g) p, the channels of one group's heads
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import no_autocast
from .reference import semiseparable_mask, ssd_chunked

CHUNK = 64
BLOCK_ELEMENTS = 2**18


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    exporting: bool,
) -> tuple[Tensor, Tensor]:
    """The forward scan y_t = state_t C_t and its last states, all tensors in one dtype.

    x (b, l, h, p), dt (b, l, h) as it enters the recurrence, A (h,), B and C (b, l, g, n),
    initial_states (b or nseq, h, p, n), cu_seqlens (nseq + 1,) int32.
    """
    if not exporting:
        y, states, _ = ssd_scan(x, dt, A, B, C, initial_states, cu_seqlens)
        return y, states
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens cannot be exported; export the model with a padding mask")
    return ssd_chunked(x, dt, A, B, C, initial_states, CHUNK)


class _Block(NamedTuple):
    """Chunks that are computed together: those of some rows over one range of tokens."""

    rows: slice
    tokens: slice
    chunks: slice  # among all chunks of a row

    def cut(self, t: Tensor) -> Tensor:
        """(b, l, …) → the block's (r, c, q, …), a view."""
        count = self.chunks.stop - self.chunks.start
        return t[self.rows, self.tokens].unflatten(1, (count, -1))


def _blocks(b: int, l: int, width: int) -> Iterator[list[_Block]]:
    """For each group of rows its blocks in the order of time; width = h p.

    Chunks have equal lengths but the last, which is a block of its own where it is shorter.
    """
    count = _chunk_count(l)
    q = -(-l // count)
    whole = l // q
    rows = max(1, min(b, BLOCK_ELEMENTS // (q * width)))
    step = max(1, BLOCK_ELEMENTS // (q * width * rows))
    spans = [(i, min(i + step, whole)) for i in range(0, whole, step)]
    if whole < count:
        spans.append((whole, count))
    for row in range(0, b, rows):
        group = slice(row, min(row + rows, b))
        yield [_Block(group, slice(i * q, min(j * q, l)), slice(i, j)) for i, j in spans]


def _chunk_count(l: int) -> int:
    return -(-l // CHUNK)


class _Decays(NamedTuple):
    """Products of decays exp(dt A) within chunks, always as exp of a sum of negative numbers."""

    to_token: Tensor  # (r, c, q, h, 1) from the chunk's entry through the token
    to_end: Tensor  # (r, c, q, h, 1) from after the token to the chunk's end
    whole: Tensor  # (r, c, g, 1, h/g, 1) over the chunk
    between: Tensor  # (r, c, g, h/g, q, q) from after token j through token t, 0 where j > t

    @classmethod
    def of(cls, dt: Tensor, A: Tensor, g: int) -> "_Decays":
        log_decay = dt * A
        total = log_decay.cumsum(2)
        return cls(
            to_token=total.exp()[..., None],
            to_end=(total[:, :, -1:] - total).exp()[..., None],
            whole=total[:, :, -1].exp().unflatten(2, (g, 1, -1, 1)),
            between=semiseparable_mask(log_decay.transpose(2, 3)).unflatten(2, (g, -1)),
        )


def _by_group(t: Tensor, g: int) -> Tensor:
    """(r, c, q, h, p) → (r, c, g, q, k), a view of contiguous t."""
    return t.unflatten(3, (g, -1)).flatten(4).transpose(2, 3)


def _by_head(t: Tensor, h: int) -> Tensor:
    """(r, c, g, q, k) → (r, c, q, h, p)."""
    return t.transpose(2, 3).unflatten(4, (h // t.shape[2], -1)).flatten(3, 4)


def _pass(carried: Tensor, whole: Tensor, added: Tensor, met: Tensor, order: range) -> Tensor:
    """Pass a state (r, g, n, k) along the chunks in `order`; return it after the last of them.

    Each chunk multiplies it by `whole` (r, c, g, 1, h/g, 1) and adds its part of `added`
    (r, c, g, n, k); `met` receives the state as each chunk meets it.
    """
    apart = (whole.shape[4], -1)
    added, met = added.unflatten(4, apart), met.unflatten(4, apart)
    carried = carried.unflatten(3, apart)
    for i in order:
        met[:, i] = carried
        carried = torch.addcmul(added[:, i], carried, whole[:, i])
    return carried.flatten(3)


def _to_inner(states: Tensor, g: int) -> Tensor:
    """(b, h, p, n) → (b, g, n, k)."""
    return states.flatten(1, 2).unflatten(1, (g, -1)).mT.contiguous()


def _to_outer(states: Tensor, h: int) -> Tensor:
    """(b, g, n, k) → (b, h, p, n)."""
    return states.mT.flatten(1, 2).unflatten(1, (h, -1)).contiguous()


def _forward_block(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, carried: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill y (r, c, q, h, p) from the state (r, g, n, k) that enters the block.

    Returns the state that enters each chunk (r, c, g, n, k) and the one that leaves the last.
    """
    h, g = x.shape[3], B.shape[3]
    B, C = B.transpose(2, 3), C.transpose(2, 3)
    decays = _Decays.of(dt, A, g)
    xdt = x * dt[..., None]

    added = B.mT @ _by_group(xdt * decays.to_end, g)
    entering = torch.empty_like(added)
    carried = _pass(carried, decays.whole, added, entering, range(x.shape[1]))

    torch.mul(_by_head(C @ entering, h), decays.to_token, out=y)
    weights = decays.between.mul_((C @ B.mT).unsqueeze(3)).flatten(2, 3)
    y += (weights @ xdt.transpose(2, 3)).transpose(2, 3)
    return entering, carried


def _backward_block(
    dy: Tensor,
    y: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    entering: Tensor,
    carried: Tensor,
    dcarried: Tensor,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Fill the gradients of x, dt, B and C; return those of A and of the state entering the block.

    entering (r, c, g, n, k): the state that enters each chunk; carried (r, g, n, k): the state that
    leaves the block, and dcarried its gradient.

    The gradient of the running sum of log decays is ⟨dy_t, y_t⟩ − ⟨xdt_t, dxdt_t⟩ at each token:
    what t reads through its decays less what is read of it. The state that leaves the chunk adds
    ⟨state, its gradient⟩ at the last token.
    """
    h, g = x.shape[3], B.shape[3]
    dx, ddt, dB, dC = grads
    B, C = B.transpose(2, 3), C.transpose(2, 3)
    decays = _Decays.of(dt, A, g)
    xdt = x * dt[..., None]
    kept = _by_group(xdt * decays.to_end, g)
    read = _by_group(dy * decays.to_token, g)

    added = C.mT @ read
    dleaving = torch.empty_like(added)
    backwards = range(x.shape[1] - 1, -1, -1)
    dcarried = _pass(dcarried, decays.whole, added, dleaving, backwards)

    scores = (C @ B.mT).unsqueeze(3)
    dy_heads = dy.transpose(2, 3).contiguous()
    dweights = (dy_heads @ xdt.transpose(2, 3).mT).unflatten(2, (g, -1))
    dscores = dweights.mul_(decays.between).sum(3)
    torch.add(dscores @ B, read @ entering.mT, out=dC.transpose(2, 3))
    torch.add(dscores.mT @ C, kept @ dleaving.mT, out=dB.transpose(2, 3))

    dxdt = _by_head(B @ dleaving, h) * decays.to_end
    weights = decays.between.mul_(scores).flatten(2, 3)
    dxdt += (weights.mT @ dy_heads).transpose(2, 3)
    torch.mul(dxdt, dt[..., None], out=dx)

    x_dxdt = dxdt.mul_(x).sum(-1)
    dtotal = (dy * y).sum(-1) - x_dxdt * dt
    at_end = torch.cat([entering[:, 1:], carried[:, None]], dim=1).mul_(dleaving)
    dtotal[:, :, -1] += at_end.unflatten(4, (h // g, -1)).sum((3, 5)).flatten(2)
    dlog_decay = dtotal.flip(2).cumsum(2).flip(2)
    torch.addcmul(x_dxdt, dlog_decay, A, out=ddt)
    return (dlog_decay * dt).sum((0, 1, 2)), dcarried


def _forward(x, dt, A, B, C, initial_states, y, states) -> Tensor:
    """Fill y (b, l, h, p) and the entering states (b, chunks, g, n, k); return the last states."""
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    last = x.new_empty(b, h, p, n)
    for blocks in _blocks(b, l, h * p):
        rows = blocks[0].rows
        if initial_states is None:
            carried = x.new_zeros(rows.stop - rows.start, g, n, h // g * p)
        else:
            carried = _to_inner(initial_states[rows], g)
        for block in blocks:
            cut = block.cut
            entering, carried = _forward_block(
                cut(x), cut(dt), A, cut(B), cut(C), carried, y=cut(y)
            )
            states[rows, block.chunks] = entering
        last[rows] = _to_outer(carried, h)
    return last


def _backward(dy, dlast, x, dt, A, B, C, y, states, last, grads) -> tuple[Tensor, Tensor]:
    """Fill `grads` of x, dt, B, C; return the gradients of A and of the initial states."""
    b, l, h, p = x.shape
    g = B.shape[2]
    dA, dinitial = torch.zeros_like(A), torch.empty_like(last)
    for blocks in _blocks(b, l, h * p):
        rows = blocks[0].rows
        carried = _to_inner(last[rows], g)
        dcarried = torch.zeros_like(carried) if dlast is None else _to_inner(dlast[rows], g)
        for block in reversed(blocks):
            cut, entering = block.cut, states[rows, block.chunks]
            dA_block, dcarried = _backward_block(
                cut(dy), cut(y), cut(x), cut(dt), A, cut(B), cut(C), entering, carried, dcarried,
                grads=tuple(map(cut, grads)),
            )  # fmt: skip
            dA += dA_block
            carried = entering[:, 0]
        dinitial[rows] = _to_outer(dcarried, h)
    return dA, dinitial


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of states, tokens and chunks of what is scanned on its own: the batch, or each pack."""
    if cu_seqlens is None:
        yield slice(0, x.shape[0]), slice(0, x.shape[1]), slice(0, _chunk_count(x.shape[1]))
        return
    chunk, bounds = 0, cu_seqlens.tolist()
    for i in range(len(bounds) - 1):
        count = _chunk_count(bounds[i + 1] - bounds[i])
        yield slice(i, i + 1), slice(bounds[i], bounds[i + 1]), slice(chunk, chunk + count)
        chunk += count


def _state_shapes(x, B, cu_seqlens) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the last states, and of the entering ones, whose chunks are bounded unread."""
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = _chunk_count(l) if cu_seqlens is None else l // CHUNK + sequences
    return (sequences, h, p, n), (b, chunks, g, n, h // g * p)


@torch.library.custom_op("mamba2_apps::ssd_scan", mutates_args=())
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `scan`; returns y, the last states, and each chunk's entering state for the backward."""
    last_shape, states_shape = _state_shapes(x, B, cu_seqlens)
    y, last, states = x.new_empty(x.shape), x.new_empty(last_shape), x.new_empty(states_shape)
    for rows, tokens, chunks in _sequences(x, cu_seqlens):
        last[rows] = _forward(
            *(t[:, tokens] for t in (x, dt)), A, *(t[:, tokens] for t in (B, C)),
            None if initial_states is None else initial_states[rows],
            y[:, tokens], states[:, chunks],
        )  # fmt: skip
    return y, last, states


@ssd_scan.register_fake
def _(x, dt, A, B, C, initial_states, cu_seqlens):
    last_shape, states_shape = _state_shapes(x, B, cu_seqlens)
    return x.new_empty(x.shape), x.new_empty(last_shape), x.new_empty(states_shape)


@torch.library.custom_op("mamba2_apps::ssd_scan_backward", mutates_args=())
def ssd_scan_backward(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor | None,
    y: Tensor,
    last: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and of the initial states."""
    grads = tuple(t.new_empty(t.shape) for t in (x, dt, B, C))
    dA, dinitial = torch.zeros_like(A), torch.empty_like(last)
    for rows, tokens, chunks in _sequences(x, cu_seqlens):
        with no_autocast(x):  # the caller's backward() may stand inside an autocast block
            dA_rows, dinitial[rows] = _backward(
                dy[:, tokens], None if dlast is None else dlast[rows],
                *(t[:, tokens] for t in (x, dt)), A, *(t[:, tokens] for t in (B, C, y)),
                states[:, chunks], last[rows], tuple(t[:, tokens] for t in grads),
            )  # fmt: skip
        dA += dA_rows
    dx, ddt, dB, dC = grads
    return dx, ddt, dA, dB, dC, dinitial


@ssd_scan_backward.register_fake
def _(dy, dlast, x, dt, A, B, C, cu_seqlens, y, last, states):
    return *(t.new_empty(t.shape) for t in (x, dt, A, B, C)), last.new_empty(last.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dlast, dstates):
    x, dt, A, B, C, initial_states, cu_seqlens, y, last, states = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    *grads, dinitial = torch.ops.mamba2_apps.ssd_scan_backward(
        dy, dlast, x, dt, A, B, C, cu_seqlens, y, last, states
    )
    return *grads, None if initial_states is None else dinitial, None


ssd_scan.register_autograd(_differentiate, setup_context=_save)
