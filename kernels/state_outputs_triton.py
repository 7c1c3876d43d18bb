"""What states that enter a sequence add to its outputs in Triton, forward and backward.

Registered as torch.ops.mamba2_apps.add_state_outputs_triton and ..._backward. Arguments are taken
as checked: `state_outputs.py` says what the op computes.

Forward: a program for a tile of tokens of one head; y is read and written once for all directions.
Backward: one kernel gives C's and the decays' gradients, a program for a tile of tokens of a group,
which walks over its heads; another the states', a program for a run of tokens of one head, whose
partial sums are added in a fixed order.

Dimension legend: directions r · batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n
"""

from operator import itemgetter

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import is_plain
from .launching import Launch, Prepared, dot_precision, on, prepare
from .registration import register

TOKENS = 64
RUN = 2048  # tokens whose share of a state's gradient is one partial sum, at least
MOST_RUNS = 256


@triton.jit
def _load_tile(ptr, row, column, n_rows, n_columns, stride):
    """(rows, columns) of a matrix whose rows lie `stride` apart, 0 outside."""
    mask = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["l"])
def _forward_kernel(
    y_ptr, states_ptr, c_ptr, decays_ptr, out_ptr, l, n_batch,
    R: tl.constexpr, RC: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, DOT: tl.constexpr,
    PP: tl.constexpr, NN: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0) % H, tl.program_id(0) // H
    n_tiles = tl.cdiv(l, TOKENS)
    batch = (tile // n_tiles).to(tl.int64)
    t = (tile % n_tiles) * TOKENS + tl.arange(0, TOKENS)
    p, n = tl.arange(0, PP), tl.arange(0, NN)
    at = (batch * l * H + head) * P
    acc = _load_tile(y_ptr + at, t, p, l, P, H * P).to(tl.float32)
    for r in tl.static_range(R):
        c_at = c_ptr + (((r % RC) * n_batch + batch) * l * G + head // (H // G)) * N
        c = _load_tile(c_at, t, n, l, N, G * N)
        s = _load_tile(states_ptr + ((r * n_batch + batch) * H + head) * P * N, p, n, P, N, N)
        decay = tl.load(
            decays_ptr + (r * n_batch + batch) * l * H + t * H + head, mask=t < l, other=0.0
        )
        given = tl.dot(c, tl.trans(s.to(c.dtype)), input_precision=DOT)
        acc += tl.exp(decay.to(tl.float32))[:, None] * given
    out_at = out_ptr + at + t.to(tl.int64)[:, None] * (H * P) + p[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(t < l)[:, None] & (p < P)[None, :])


@triton.jit(do_not_specialize=["l"])
def _backward_tokens_kernel(
    dy_ptr, states_ptr, c_ptr, decays_ptr, dc_ptr, ddecays_ptr, l, n_batch,
    R: tl.constexpr, RC: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, DOT: tl.constexpr,
    PP: tl.constexpr, NN: tl.constexpr,
):  # fmt: skip
    """dC of a tile of tokens and a group, and the decays' gradients of its heads."""
    group, tile = tl.program_id(0) % G, tl.program_id(0) // G
    n_tiles = tl.cdiv(l, TOKENS)
    batch = (tile // n_tiles).to(tl.int64)
    t = (tile % n_tiles) * TOKENS + tl.arange(0, TOKENS)
    p, n = tl.arange(0, PP), tl.arange(0, NN)
    dc = tl.zeros([TOKENS, NN], tl.float32)
    for r in tl.static_range(R):
        c_at = (((r % RC) * n_batch + batch) * l * G + group) * N
        c = _load_tile(c_ptr + c_at, t, n, l, N, G * N).to(tl.float32)
        for k in range(H // G):
            head = group * (H // G) + k
            dy = _load_tile(dy_ptr + (batch * l * H + head) * P, t, p, l, P, H * P)
            s = _load_tile(states_ptr + ((r * n_batch + batch) * H + head) * P * N, p, n, P, N, N)
            decay_at = (r * n_batch + batch) * l * H + t * H + head
            decay = tl.load(decays_ptr + decay_at, mask=t < l, other=0.0).to(tl.float32)
            given = tl.dot(dy, s.to(dy.dtype), input_precision=DOT) * tl.exp(decay)[:, None]
            tl.store(ddecays_ptr + decay_at, tl.sum(given * c, axis=1), mask=t < l)
            dc += given
        if RC > 1 or r == R - 1:
            to = dc_ptr + c_at + t.to(tl.int64)[:, None] * (G * N) + n[None, :]
            tl.store(to, dc.to(dc_ptr.dtype.element_ty), mask=(t < l)[:, None] & (n < N)[None, :])
            dc = tl.zeros([TOKENS, NN], tl.float32)


@triton.jit(do_not_specialize=["l", "run"])
def _backward_states_kernel(
    dy_ptr, c_ptr, decays_ptr, partial_ptr, l, n_batch, run, n_runs,
    R: tl.constexpr, RC: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, DOT: tl.constexpr,
    PP: tl.constexpr, NN: tl.constexpr,
):  # fmt: skip
    """A run's share of one state's gradient; the directions of a run read the same dy."""
    r, rest = tl.program_id(0) % R, tl.program_id(0) // R
    head, rest = rest % H, rest // H
    share, batch = rest % n_runs, (rest // n_runs).to(tl.int64)
    p, n = tl.arange(0, PP), tl.arange(0, NN)
    c_ptr += (((r % RC) * n_batch + batch) * l * G + head // (H // G)) * N
    decays_ptr += (r * n_batch + batch) * l * H + head
    acc = tl.zeros([PP, NN], tl.float32)
    start, end = share * run, tl.minimum(share * run + run, l)
    while start < end:
        t = start + tl.arange(0, TOKENS)
        dy = _load_tile(dy_ptr + (batch * l * H + head) * P, t, p, end, P, H * P)
        c = _load_tile(c_ptr, t, n, end, N, G * N)
        decay = tl.load(decays_ptr + t * H, mask=t < end, other=0.0).to(tl.float32)
        weighted = (dy.to(tl.float32) * tl.exp(decay)[:, None]).to(c.dtype)
        acc = tl.dot(tl.trans(weighted), c, acc, input_precision=DOT)
        start += TOKENS
    to = partial_ptr + (((share * R + r) * n_batch + batch) * H + head) * P * N
    tl.store(to + p[:, None] * N + n[None, :], acc, mask=(p < P)[:, None] & (n < N)[None, :])


def _sizes(states: Tensor, C: Tensor) -> tuple[int, ...]:
    r, _, h, p, n = states.shape
    padded = [max(16, triton.next_power_of_2(size)) for size in (p, n)]
    return r, C.shape[0], h, C.shape[3], p, n, TOKENS, dot_precision(C.dtype), *padded  # type: ignore[return-value]


class _Forward(Prepared):
    # y, states, C, decays, out
    ALL = itemgetter(0, 1, 2, 3, 4)

    def __init__(self, tensors) -> None:
        y, states, C, _, _ = tensors
        super().__init__(y.device)
        b, l, h, _ = y.shape
        rest = (l, b, *_sizes(states, C))
        self.launches = [Launch(_forward_kernel, b * triton.cdiv(l, TOKENS) * h, 4, self.ALL, rest)]


class _Backward(Prepared):
    # dy, states, C, decays, dC, ddecays, partials
    TOKENS_OF = itemgetter(0, 1, 2, 3, 4, 5)
    STATES_OF = itemgetter(0, 2, 3, 6)

    def __init__(self, tensors) -> None:
        dy, states, C, *_ = tensors
        super().__init__(dy.device)
        b, l, h, _ = dy.shape
        sizes = _sizes(states, C)
        run = TOKENS * triton.cdiv(max(RUN, triton.cdiv(l, MOST_RUNS)), TOKENS)
        self.n_runs = triton.cdiv(l, run)
        tiles = b * triton.cdiv(l, TOKENS) * C.shape[3]
        programs = states.shape[0] * h * self.n_runs * b
        self.launches = [
            Launch(_backward_tokens_kernel, tiles, 4, self.TOKENS_OF, (l, b, *sizes)),
            Launch(
                _backward_states_kernel, programs, 4, self.STATES_OF,
                (l, b, run, self.n_runs, *sizes),
            ),
        ]  # fmt: skip


def _forward(y: Tensor, states: Tensor, C: Tensor, decays: Tensor) -> Tensor:
    with on(y.device):
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        tensors = *(t.contiguous() for t in (y, states, C, decays)), out
        prepare(_Forward, tensors).run(tensors)
    return out


def _forward_fake(y, states, C, decays) -> Tensor:
    return y.new_empty(y.shape)


def _backward(
    dy: Tensor, states: Tensor, C: Tensor, decays: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of states, C and decays."""
    with on(dy.device):
        dy, states, C, decays = (t.contiguous() for t in (dy, states, C, decays))
        dC, ddecays = torch.empty_like(C), torch.empty_like(decays)
        call = prepare(_Backward, (dy, states, C, decays))
        partials = torch.empty(
            (call.n_runs, *states.shape), dtype=torch.float32, device=states.device
        )
        call.run((dy, states, C, decays, dC, ddecays, partials))
    return partials.sum(0).to(states.dtype), dC, ddecays


def _backward_fake(dy, states, C, decays) -> tuple[Tensor, Tensor, Tensor]:
    return states.new_empty(states.shape), C.new_empty(C.shape), decays.new_empty(decays.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx, dy):
    tensors = ctx.saved_tensors
    direct = not torch.is_grad_enabled() and is_plain(dy, *tensors)
    run = _backward if direct else torch.ops.mamba2_apps.add_state_outputs_triton_backward
    return dy, *run(dy, *tensors)


_Direct = register(
    "add_state_outputs_triton",
    "(Tensor y, Tensor states, Tensor C, Tensor decays) -> Tensor",
    _forward,
    _forward_fake,
    "(Tensor dy, Tensor states, Tensor C, Tensor decays) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _differentiate,
    _setup_context,
)


def add_state_outputs(y: Tensor, states: Tensor, C: Tensor, decays: Tensor) -> Tensor:
    """`state_outputs.add_state_outputs` with C (1 or r, b, l, g, n)."""
    plain = is_plain(y, states, C, decays)
    run = _Direct.apply if plain else torch.ops.mamba2_apps.add_state_outputs_triton
    return run(y, states, C, decays)
