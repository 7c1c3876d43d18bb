"""The SSD on plain torch operations: the chunked form as batched products, with its own backward.

This is what runs on a CPU and in float64. Forward and backward are registered operators
(torch.ops.mamba2_apps.ssd_scan and ssd_scan_backward), opaque to torch.compile; an exported model
takes `reference.ssd_chunked` instead, which decomposes to ATen.

On a CPU the chunked form is bound by memory, not by its products. So a few chunks at a time, one
block, go through the whole computation while they are in the cache, the state passes from block to
block, and all intermediate results live in one arena that every block uses again: memory fresh
from the system costs more than most of the arithmetic.

Within a chunk both sources of y are one product: with W = [L ∘ (C Bᵀ) | a C] and V = [dt x; S],
where a is the decay since the chunk's entry and S (n, p) the state that enters it, y = W V.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · chunk q
    r rows and c chunks of a block
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .arena import Arena
from .dispatch import no_autocast
from .reference import ssd_chunked

CHUNK = 64
BLOCK_ELEMENTS = 2**18


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    exporting: bool,
) -> tuple[Tensor, Tensor]:
    """The forward scan y_t = state_t C_t + D x_t and its last states, all tensors in one dtype.

    x (b, l, h, p), dt (b, l, h) as it enters the recurrence, A (h,), B and C (b, l, g, n),
    D (h, p), initial_states (b or nseq, h, p, n), cu_seqlens (nseq + 1,) int32.
    """
    if not exporting:
        differentiable = any(
            t is not None and t.requires_grad for t in (x, dt, A, B, C, D, initial_states)
        )
        keep = differentiable and torch.is_grad_enabled()
        y, states, _ = ssd_scan(x, dt, A, B, C, D, initial_states, cu_seqlens, keep)
        return y, states
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens cannot be exported; export the model with a padding mask")
    y, states = ssd_chunked(x, dt, A, B, C, initial_states, CHUNK)
    return (y if D is None else y + D * x), states


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


class _Chunks(NamedTuple):
    """What forward and backward both need of a block, heads before tokens.

    Decays are exp of sums of negative numbers.
    """

    to_token: Tensor  # (r, c, h, q, 1) decay from the chunk's entry through the token
    to_end: Tensor  # (r, c, h, q, 1) decay from after the token to the chunk's end
    whole: Tensor  # (r, c, h, 1, 1) decay over the chunk
    L: Tensor  # (r, c, h, q, q) decay from after token j through token t, 1 where j > t
    scores: Tensor  # (r, c, g, 1, q, q) C Bᵀ, 0 where j > t
    W: Tensor  # (r, c, h, q, q + n); its left part is filled by the caller
    V: Tensor  # (r, c, h, q + n, p); its lower part, the states, is filled by the caller
    kept: Tensor  # (r, c, h, q, n) to_end B

    @classmethod
    def of(cls, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, arena: Arena) -> "_Chunks":
        """x (r, c, q, h, p), dt (r, c, q, h), B and C (r, c, q, g, n)."""
        r, c, q, h, p = x.shape
        g, n = B.shape[3:]
        total = (dt * A).cumsum(2).transpose(2, 3).contiguous()
        to_token = total.exp().unsqueeze(4)
        to_end = (total[..., -1:] - total).exp().unsqueeze(4)
        # The future is masked in the scores, which all heads share; here it must only be finite.
        L = torch.sub(total[..., :, None], total[..., None, :], out=arena(r, c, h, q, q))
        L.clamp_(max=0).exp_()

        heads = (g, h // g)
        B, C = (t.transpose(2, 3).unsqueeze(3) for t in (B, C))
        W, V, kept = arena(r, c, h, q, q + n), arena(r, c, h, q + n, p), arena(r, c, h, q, n)
        torch.mul(C, to_token.unflatten(2, heads), out=W[..., q:].unflatten(2, heads))
        torch.mul(B, to_end.unflatten(2, heads), out=kept.unflatten(2, heads))
        torch.mul(x.transpose(2, 3), dt.transpose(2, 3).unsqueeze(4), out=V[..., :q, :])
        return cls(to_token, to_end, to_token[..., -1:, :], L, (C @ B.mT).tril_(), W, V, kept)

    def weigh(self) -> None:
        """Fill the left part of W with L ∘ (C Bᵀ)."""
        q, heads = self.L.shape[4], (self.scores.shape[2], -1)
        out = self.W[..., :q].unflatten(2, heads)
        torch.mul(self.L.unflatten(2, heads), self.scores, out=out)


def _pass(carried: Tensor, whole: Tensor, added: Tensor, met: Tensor, order: range) -> Tensor:
    """Pass a state (r, h, n, p) along the chunks in `order`; return it after the last of them.

    Each chunk multiplies it by `whole` (r, c, h, 1, 1) and adds its part of `added`
    (r, c, h, n, p); `met` receives the state as each chunk meets it.
    """
    for i in order:
        met[:, i] = carried
        carried = torch.addcmul(added[:, i], carried, whole[:, i])
    return carried


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b over all leading dimensions, into the contiguous `out`."""
    torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=out.flatten(0, -3))
    return out


def _forward_block(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    carried: Tensor,
    y: Tensor,
    entering: Tensor | None,
    arena: Arena,
) -> Tensor:
    """Fill y (r, c, q, h, p) and the states that enter each chunk (r, c, h, n, p).

    carried (r, h, n, p) enters the block; returns the state that leaves it.
    """
    r, c, q, h, p = x.shape
    n = B.shape[4]
    chunks = _Chunks.of(x, dt, A, B, C, arena)
    added = _product(chunks.kept.mT, chunks.V[..., :q, :], out=arena(r, c, h, n, p))
    met = chunks.V[..., q:, :]
    carried = _pass(carried, chunks.whole, added, met, range(c))
    if entering is not None:
        entering.copy_(met)
    chunks.weigh()
    scanned = _product(chunks.W, chunks.V, out=arena(r, c, h, q, p)).transpose(2, 3)
    if D is None:
        y.copy_(scanned)
    else:
        torch.addcmul(scanned, x, D, out=y)
    return carried


def _backward_block(
    dy: Tensor,
    y: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    entering: Tensor,
    carried: Tensor,
    dcarried: Tensor,
    grads: tuple[Tensor, ...],
    sums: tuple[Tensor, Tensor],
    arena: Arena,
) -> Tensor:
    """Fill the gradients of x, dt, B and C and add to those of A and D.

    Returns the gradient of the state entering the block.

    entering (r, c, h, n, p): the state that enters each chunk; carried (r, h, n, p): the state that
    leaves the block, and dcarried its gradient.

    The gradient of the running sum of log decays is ⟨dy_t, y_t − D x_t⟩ − ⟨xdt_t, dxdt_t⟩ at each
    token: what t reads through its decays less what is read of it. The state that leaves the
    chunk adds ⟨state, its gradient⟩ at the last token.
    """
    r, c, q, h, p = x.shape
    g, n = B.shape[3:]
    (dx, ddt, dB, dC), (dA, dD) = grads, sums
    chunks = _Chunks.of(x, dt, A, B, C, arena)
    chunks.V[..., q:, :] = entering
    chunks.weigh()
    dyh = arena(r, c, h, q, p).copy_(dy.transpose(2, 3))
    dV = _product(chunks.W.mT, dyh, out=arena(r, c, h, q + n, p))
    dW = _product(dyh, chunks.V.mT, out=arena(r, c, h, q, q + n))

    dleaving = arena(r, c, h, n, p)
    backwards = range(c - 1, -1, -1)
    leaves = torch.cat([entering[:, 1:], carried[:, None]], dim=1)
    dcarried = _pass(dcarried, chunks.whole, dV[..., q:, :], dleaving, backwards)
    dkept = _product(chunks.V[..., :q, :], dleaving.mT, out=arena(r, c, h, q, n))
    from_later = _product(chunks.kept, dleaving, out=arena(r, c, h, q, p))
    dxdt = from_later.add_(dV[..., :q, :]).transpose(2, 3)

    by_group = (g, h // g)
    dscores = dW[..., :q].mul_(chunks.L).unflatten(2, by_group).sum(3).tril_()
    dread = dW[..., q:].mul_(chunks.to_token).unflatten(2, by_group).sum(3)
    dkept = dkept.mul_(chunks.to_end).unflatten(2, by_group).sum(3)
    B, C = B.transpose(2, 3), C.transpose(2, 3)
    torch.add(dread, dscores @ B, out=dC.transpose(2, 3))
    torch.add(dkept, dscores.mT @ C, out=dB.transpose(2, 3))
    torch.mul(dxdt, dt[..., None], out=dx)

    x_dxdt = dxdt.mul_(x).sum(-1)
    dyh = dyh.transpose(2, 3)
    if D is not None:
        dx.addcmul_(dyh, D)
        skipped = torch.mul(dyh, x, out=arena(r, c, h, q, p).transpose(2, 3))
        dD += skipped.sum((0, 1, 2))
        y = torch.addcmul(y, x, D, value=-1, out=skipped)
    dtotal = dyh.mul_(y).sum(-1) - x_dxdt * dt
    dtotal[:, :, -1] += leaves.mul_(dleaving).sum((3, 4))
    dlog_decay = dtotal.flip(2).cumsum(2).flip(2)
    torch.addcmul(x_dxdt, dlog_decay, A, out=ddt)
    dA += (dlog_decay * dt).sum((0, 1, 2))
    return dcarried


def _forward(x, dt, A, B, C, D, initial_states, y, states, arena) -> Tensor:
    """Fill y (b, l, h, p) and the entering states (b, chunks, h, n, p); return the last states."""
    b, l, h, p = x.shape
    last = x.new_empty(b, h, p, B.shape[3])
    for blocks in _blocks(b, l, h * p):
        rows = blocks[0].rows
        if initial_states is None:
            carried = torch.zeros_like(last[rows]).mT
        else:
            carried = initial_states[rows].mT
        for block in blocks:
            cut = block.cut
            carried = _forward_block(
                cut(x), cut(dt), A, cut(B), cut(C), D, carried, cut(y),
                None if states is None else states[rows, block.chunks], arena,
            )  # fmt: skip
            arena.clear()
        last[rows] = carried.mT
    return last


def _backward(dy, dlast, x, dt, A, B, C, D, y, states, last, grads, sums, arena) -> Tensor:
    """Fill `grads` of x, dt, B, C, add to `sums` of A and D; return that of the initial states."""
    b, l, h, p = x.shape
    dinitial = torch.empty_like(last)
    for blocks in _blocks(b, l, h * p):
        rows = blocks[0].rows
        carried = last[rows].mT
        dcarried = torch.zeros_like(carried) if dlast is None else dlast[rows].mT
        for block in reversed(blocks):
            cut, entering = block.cut, states[rows, block.chunks]
            dcarried = _backward_block(
                cut(dy), cut(y), cut(x), cut(dt), A, cut(B), cut(C), D, entering, carried, dcarried,
                tuple(map(cut, grads)), sums, arena,
            )  # fmt: skip
            arena.clear()
            carried = entering[:, 0]
        dinitial[rows] = dcarried.mT
    return dinitial


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
    n = B.shape[3]
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = _chunk_count(l) if cu_seqlens is None else l // CHUNK + sequences
    return (sequences, h, p, n), (b, chunks, h, n, p)


@torch.library.custom_op("mamba2_apps::ssd_scan", mutates_args=())
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `scan`; returns y, the last states and, to `keep` for backward, those between chunks."""
    last_shape, states_shape = _state_shapes(x, B, cu_seqlens)
    y, last = x.new_empty(x.shape), x.new_empty(last_shape)
    states = x.new_empty(states_shape if keep else 0)
    with Arena(x) as arena:
        for rows, tokens, chunks in _sequences(x, cu_seqlens):
            last[rows] = _forward(
                x[:, tokens], dt[:, tokens], A, B[:, tokens], C[:, tokens], D,
                None if initial_states is None else initial_states[rows],
                y[:, tokens], states[:, chunks] if keep else None, arena,
            )  # fmt: skip
    return y, last, states


@ssd_scan.register_fake
def _(x, dt, A, B, C, D, initial_states, cu_seqlens, keep):
    last_shape, states_shape = _state_shapes(x, B, cu_seqlens)
    return (
        x.new_empty(x.shape),
        x.new_empty(last_shape),
        x.new_empty(states_shape if keep else 0),
    )


@torch.library.custom_op("mamba2_apps::ssd_scan_backward", mutates_args=())
def ssd_scan_backward(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor,
    last: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D (zero where there is none) and of the initial states."""
    grads = tuple(t.new_empty(t.shape) for t in (x, dt, B, C))
    sums = torch.zeros_like(A), x.new_zeros(x.shape[2:])
    dinitial = torch.empty_like(last)
    # The caller's backward() may stand inside an autocast block.
    with no_autocast(x), Arena(x) as arena:
        for rows, tokens, chunks in _sequences(x, cu_seqlens):
            dinitial[rows] = _backward(
                dy[:, tokens], None if dlast is None else dlast[rows],
                x[:, tokens], dt[:, tokens], A, B[:, tokens], C[:, tokens], D,
                y[:, tokens], states[:, chunks], last[rows], tuple(t[:, tokens] for t in grads),
                sums, arena,
            )  # fmt: skip
    (dx, ddt, dB, dC), (dA, dD) = grads, sums
    return dx, ddt, dA, dB, dC, dD, dinitial


@ssd_scan_backward.register_fake
def _(dy, dlast, x, dt, A, B, C, D, cu_seqlens, y, last, states):
    return (
        *(t.new_empty(t.shape) for t in (x, dt, A, B, C)),
        x.new_empty(x.shape[2:]),
        last.new_empty(last.shape),
    )


def _save(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dlast, dstates):
    x, dt, A, B, C, D, initial_states, cu_seqlens, y, last, states = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    *grads, dD, dinitial = torch.ops.mamba2_apps.ssd_scan_backward(
        dy, dlast, x, dt, A, B, C, D, cu_seqlens, y, last, states
    )
    optional = None if D is None else dD, None if initial_states is None else dinitial
    return *grads, *optional, None, None


ssd_scan.register_autograd(_differentiate, setup_context=_save)
