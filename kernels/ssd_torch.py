"""The SSD on plain torch operations: the chunked form as batched products, with its own backward.

This is what runs on a CPU and in float64. Forward and backward are registered operators
(torch.ops.mamba2_apps.ssd_scan and ssd_scan_backward), opaque to torch.compile; an exported model
takes `reference.ssd_chunked` instead, which decomposes to ATen.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · chunk q
    c chunks · k = (h / g) p, the channels of one group's heads side by side

Inside, states are laid out (b, c, g, n, k), so that every product with B or C is one matrix product
over all heads of a group with no copy of its operands.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import semiseparable_mask, ssd_chunked

CHUNK = 64


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
    if exporting and cu_seqlens is None:
        return ssd_chunked(x, dt, A, B, C, initial_states, CHUNK)
    if exporting:
        y, states, _ = _forward(x, dt, A, B, C, initial_states, cu_seqlens)
    else:
        y, states, _ = ssd_scan(x, dt, A, B, C, initial_states, cu_seqlens)
    return y, states


class _Chunks(NamedTuple):
    """How tokens are cut into chunks that never cross the border of a packed sequence.

    Chunks of one sequence follow each other; a sequence's last chunk is filled up with tokens of
    dt = 0, which leave the state alone. Without packing every row is one sequence.
    """

    size: int
    count: int
    source: Tensor | None = None  # (count · size,) token of each place, when packed
    real: Tensor | None = None  # (count · size,) whether that place holds a token
    place: Tensor | None = None  # (l,) place of each token
    first: Tensor | None = None  # (nseq,) first chunk of each sequence
    last: Tensor | None = None  # (nseq,) last chunk of each sequence

    @classmethod
    def of(cls, l: int, cu_seqlens: Tensor | None) -> "_Chunks":
        if cu_seqlens is None:
            count = -(-l // CHUNK)
            return cls(size=-(-l // count), count=count)
        # The count is a bound that needs no look at the values; chunks past the last are empty.
        q, bounds = min(CHUNK, l), cu_seqlens.long()
        count = l // q + bounds.shape[0] - 1
        chunk_bounds = F.pad(
            (bounds.diff() + q - 1).div(q, rounding_mode="floor").cumsum(0), (1, 0)
        )
        device = bounds.device
        chunk = torch.arange(count, device=device)
        sequence = torch.searchsorted(chunk_bounds[1:-1], chunk, right=True)
        start = bounds[sequence] + (chunk - chunk_bounds[sequence]) * q
        source = (start[:, None] + torch.arange(q, device=device)).flatten()
        end = bounds[sequence + 1].repeat_interleave(q)
        token = torch.arange(l, device=device)
        owner = torch.searchsorted(bounds[1:-1], token, right=True)
        return cls(
            size=q,
            count=count,
            source=torch.minimum(source, end - 1),
            real=source < end,
            place=chunk_bounds[owner] * q + token - bounds[owner],
            first=chunk_bounds[:-1],
            last=chunk_bounds[1:] - 1,
        )

    def split(self, t: Tensor, clear: bool = False) -> Tensor:
        """(b, l, …) → (b, c, q, …); `clear` zeroes the places without a token when packed."""
        if self.source is not None:
            t = t.index_select(1, self.source)
            if clear:
                t = t * self.real.view(1, -1, *[1] * (t.dim() - 2))
        elif padding := self.count * self.size - t.shape[1]:
            t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding))
        return t.unflatten(1, (self.count, self.size))

    def join(self, t: Tensor, l: int) -> Tensor:
        """(b, c, q, …) → (b, l, …)."""
        t = t.flatten(1, 2)
        return t[:, :l] if self.place is None else t.index_select(1, self.place)


class _Decays(NamedTuple):
    """Products of decays exp(dt A) within chunks, always as exp of a sum of negative numbers."""

    to_token: Tensor  # (b, c, q, h) from the chunk's entry through the token
    to_end: Tensor  # (b, c, q, h) from after the token to the chunk's end
    whole: Tensor  # (b, c, h) over the chunk
    between: Tensor  # (b, c, h, q, q) from after token j through token t, 0 where j > t

    @classmethod
    def of(cls, dt: Tensor, A: Tensor) -> "_Decays":
        log_decay = dt * A
        total = log_decay.cumsum(2)
        return cls(
            to_token=total.exp(),
            to_end=(total[:, :, -1:] - total).exp(),
            whole=total[:, :, -1].exp(),
            between=semiseparable_mask(log_decay.transpose(2, 3)),
        )


def _by_group(t: Tensor, g: int) -> Tensor:
    """(b, c, q, h, p) → (b, c, g, q, k) without a copy."""
    return t.unflatten(3, (g, -1)).flatten(4).transpose(2, 3)


def _by_head(t: Tensor, h: int) -> Tensor:
    """(b, c, g, q, k) → (b, c, q, h, p) without a copy."""
    return t.transpose(2, 3).unflatten(4, (h // t.shape[2], -1)).flatten(3, 4)


def _heads_apart(states: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Views of (b, c, g, n, k) and (b, c, h) that broadcast: (b, c, g, n, h/g, p)."""
    factor = whole.unflatten(2, (states.shape[2], 1, -1, 1))
    return states.unflatten(4, (factor.shape[4], -1)), factor


def _scale_state(state: Tensor, factor: Tensor) -> Tensor:
    """(…, g, n, k) times (…, h)."""
    g = state.shape[-3]
    factor = factor.unflatten(-1, (g, 1, -1, 1))
    return (state.unflatten(-1, (factor.shape[-2], -1)) * factor).flatten(-2)


def _to_inner(states: Tensor, g: int) -> Tensor:
    """(b, h, p, n) → (b, g, n, k)."""
    return states.flatten(1, 2).unflatten(1, (g, -1)).mT


def _to_outer(states: Tensor, h: int) -> Tensor:
    """(b, g, n, k) → (b, h, p, n)."""
    return states.mT.flatten(1, 2).unflatten(1, (h, -1)).contiguous()


def _initial(initial_states: Tensor | None, added: Tensor, chunks: _Chunks) -> Tensor:
    if initial_states is not None:
        return _to_inner(initial_states, added.shape[2])
    sequences = added.shape[0] if chunks.first is None else chunks.first.shape[0]
    return added.new_zeros(sequences, *added.shape[2:])


def _pass_states(added: Tensor, whole: Tensor, initial: Tensor, first: Tensor | None) -> Tensor:
    """The state that leaves each chunk: (b, c, g, n, k), in the place of `added`.

    added (b, c, g, n, k): what a chunk adds to the state by its end; whole (b, c, h): its decay;
    initial (b or nseq, g, n, k), entering at chunk 0 or, when packed, at the chunks `first`. One
    fused multiply-add a chunk touches each state once; a product with the (c, c) matrix of decays
    would touch them c times.
    """
    if first is None:
        added[:, 0] += _scale_state(initial, whole[:, 0])
    else:
        added[:, first] += _scale_state(initial, whole[0, first])
        whole = whole.index_fill(1, first, 0.0)
    states, factor = _heads_apart(added, whole)
    for i in range(1, added.shape[1]):
        states[:, i].addcmul_(factor[:, i], states[:, i - 1])
    return added


def _pass_gradients(
    read: Tensor, dlast: Tensor | None, whole: Tensor, chunks: _Chunks
) -> tuple[Tensor, Tensor]:
    """Gradients of the state that leaves each chunk (b, c, g, n, k), and of the initial states.

    read (b, c, g, n, k): the gradient that a chunk's tokens send to the state entering it; dlast
    (b or nseq, g, n, k): the gradient of the last states.
    """
    last = chunks.last
    if last is not None:
        if dlast is not None:
            read[:, last] += _scale_state(dlast, whole[0, last])
        whole = whole.index_fill(1, last, 0.0)
    elif dlast is not None:
        read[:, -1] += _scale_state(dlast, whole[:, -1])
    states, factor = _heads_apart(read, whole)
    for i in range(read.shape[1] - 2, -1, -1):
        states[:, i].addcmul_(factor[:, i], states[:, i + 1])
    if last is None:
        end = torch.zeros_like(read[:, :1]) if dlast is None else dlast[:, None]
        return torch.cat([read[:, 1:], end], dim=1), read[:, 0]
    end = torch.zeros_like(read[:, last]) if dlast is None else dlast[None]
    return read.roll(-1, dims=1).index_copy(1, last, end), read[0, chunks.first]


def _entering(leaving: Tensor, initial: Tensor, first: Tensor | None) -> Tensor:
    """The state that enters each chunk, from the states that leave them."""
    if first is None:
        return torch.cat([initial[:, None], leaving[:, :-1]], dim=1)
    return leaving.roll(1, dims=1).index_copy(1, first, initial[None])


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, h, p), last states (b or nseq, h, p, n) and entering states (b, c, g, n, k)."""
    l, h, g = x.shape[1], x.shape[2], B.shape[2]
    chunks = _Chunks.of(l, cu_seqlens)
    dt = chunks.split(dt, clear=True)
    xdt = chunks.split(x) * dt[..., None]
    B, C = (chunks.split(t).transpose(2, 3) for t in (B, C))
    decays = _Decays.of(dt, A)

    added = B.mT @ _by_group(xdt * decays.to_end[..., None], g)
    initial = _initial(initial_states, added, chunks)
    leaving = _pass_states(added, decays.whole, initial, chunks.first)
    entering = _entering(leaving, initial, chunks.first)

    scores = (C @ B.mT).unsqueeze(3)
    weights = decays.between.unflatten(2, (g, -1)) * scores
    y = _by_head(C @ entering, h) * decays.to_token[..., None]
    y += (weights.flatten(2, 3) @ xdt.transpose(2, 3)).transpose(2, 3)
    last = leaving[:, -1] if chunks.last is None else leaving[0, chunks.last]
    return chunks.join(y, l).contiguous(), _to_outer(last, h), entering


def _backward(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor | None,
    y: Tensor,
    entering: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and of the initial states.

    With S the state that leaves a chunk and R its gradient, the gradient of a log decay's running
    sum is ⟨dy_t, y_t⟩ − ⟨xdt_t, dxdt_t⟩ at each token, plus ⟨S, R⟩ at the chunk's end: what token t
    reads through its decays less what is read of it.
    """
    l, h, g = x.shape[1], x.shape[2], B.shape[2]
    chunks = _Chunks.of(l, cu_seqlens)
    dt = chunks.split(dt, clear=True)
    x, dy, y = chunks.split(x), chunks.split(dy, clear=True), chunks.split(y)
    B, C = (chunks.split(t).transpose(2, 3) for t in (B, C))
    xdt = x * dt[..., None]
    decays = _Decays.of(dt, A)

    # The gradient of the states, passed from the last chunk to the first.
    read = _by_group(dy * decays.to_token[..., None], g)
    dlast = None if dlast is None else _to_inner(dlast, g)
    dleaving, dinitial = _pass_gradients(C.mT @ read, dlast, decays.whole, chunks)
    kept = _by_group(xdt * decays.to_end[..., None], g)

    L = decays.between.unflatten(2, (g, -1))
    scores = (C @ B.mT).unsqueeze(3)
    dyh, xdth = dy.transpose(2, 3), xdt.transpose(2, 3)
    dscores = ((dyh @ xdth.mT).unflatten(2, (g, -1)) * L).sum(3)
    dC = dscores @ B + read @ entering.mT
    dB = dscores.mT @ C + kept @ dleaving.mT
    dxdt = _by_head(B @ dleaving, h) * decays.to_end[..., None]
    dxdt += ((L * scores).flatten(2, 3).mT @ dyh).transpose(2, 3)

    dx_dot_x = (dxdt * x).sum(-1)
    dtotal = (dy * y).sum(-1) - dx_dot_x * dt
    leaving = _scale_state(entering, decays.whole) + B.mT @ kept
    ends = (leaving * dleaving).unflatten(4, (h // g, -1)).sum((3, 5)).flatten(2)
    dtotal[:, :, -1] += ends
    dlog_decay = dtotal.flip(2).cumsum(2).flip(2)
    return (
        chunks.join(dxdt * dt[..., None], l).contiguous(),
        chunks.join(dlog_decay * A + dx_dot_x, l).contiguous(),
        (dlog_decay * dt).sum((0, 1, 2)),
        chunks.join(dB.transpose(2, 3), l).contiguous(),
        chunks.join(dC.transpose(2, 3), l).contiguous(),
        _to_outer(dinitial, h),
    )


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
    """See `scan`; returns y, the last states, and the entering states that backward needs."""
    return _forward(x, dt, A, B, C, initial_states, cu_seqlens)


@ssd_scan.register_fake
def _(x, dt, A, B, C, initial_states, cu_seqlens):
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    count, sequences = -(-l // CHUNK), b
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
        count = l // min(CHUNK, l) + sequences
    entering = x.new_empty(b, count, g, n, h // g * p)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(sequences, h, p, n),
        entering,
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
    cu_seqlens: Tensor | None,
    y: Tensor,
    entering: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and the initial states."""
    return _backward(dy, dlast, x, dt, A, B, C, cu_seqlens, y, entering)


@ssd_scan_backward.register_fake
def _(dy, dlast, x, dt, A, B, C, cu_seqlens, y, entering):
    b, _, h, p = x.shape
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    contiguous = [
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, A, B, C)
    ]
    return *contiguous, x.new_empty(sequences, h, p, B.shape[3])


def _save(ctx, inputs, output):
    y, _, entering = output
    ctx.save_for_backward(*inputs, y, entering)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dlast, dentering):
    x, dt, A, B, C, _, cu_seqlens, y, entering = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(y)
    grads = torch.ops.mamba2_apps.ssd_scan_backward(
        dy, dlast, x, dt, A, B, C, cu_seqlens, y, entering
    )
    has_initial = ctx.needs_input_grad[5]
    return *grads[:5], grads[5] if has_initial else None, None


ssd_scan.register_autograd(_differentiate, setup_context=_save)
