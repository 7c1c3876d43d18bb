"""The state space duality, executable: one sequence map written in its three dual forms.

Mamba-2 (Dao and Gu, 2024, "Transformers are SSMs", arXiv:2405.21060) defines

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_tᵀ          y_t = state_t C_t

and shows that the same map is a recurrent network (section 3), attention under a 1-semiseparable
mask (section 5) and a block decomposition of that masked matrix (section 6). The functions below
follow those three sections, in plain torch and any floating dtype; the faster backends are tested
against them. They take dt as it enters the recurrence (after bias, softplus and clamp) and leave
D, the gate z and packing to their callers.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · chunk q

    x (b, l, h, p) · dt (b, l, h) · A (h,) · B, C (b, l, g, n) · states (b, h, p, n)
    returns y (b, l, h, p) and the state after the last token
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_recurrent(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrent form: one step a token, O(l) time and a constant state."""
    B, C = _expand_groups(x, B, C)
    state = _initial(x, B, initial_states)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)
        update = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = decay[..., None, None] * state + update
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    return torch.stack(outputs, dim=1), state


def ssd_quadratic(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The attention form: y = (L ∘ C Bᵀ) (dt x), L the 1-semiseparable mask of decays."""
    B, C = _expand_groups(x, B, C)
    log_decay = (dt * A).transpose(1, 2)
    L = semiseparable_mask(log_decay)
    xdt = x * dt[..., None]
    y = torch.einsum("bthn,bjhn,bhtj,bjhp->bthp", C, B, L, xdt)
    state = torch.einsum("bhj,bjhp,bjhn->bhpn", L[:, :, -1], xdt, B)
    if initial_states is not None:
        carried = torch.exp(log_decay.cumsum(-1))
        y = y + torch.einsum("bht,bthn,bhpn->bthp", carried, C, initial_states)
        state = state + carried[:, :, -1, None, None] * initial_states
    return y, state


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The block decomposition: attention inside chunks of q tokens, a recurrence between them."""
    l = x.shape[1]
    B, C = _expand_groups(x, B, C)
    # Tokens with dt = 0 neither decay the state nor enter it, so they can fill the last chunk.
    padding = -l % chunk_size
    x, dt, B, C = (
        F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding)).unflatten(1, (-1, chunk_size))
        for t in (x, dt, B, C)
    )
    xdt = x * dt[..., None]
    log_decay = torch.einsum("bcqh,h->bhcq", dt, A)
    to_token = log_decay.cumsum(-1)
    chunk_decay = to_token[..., -1]

    # Diagonal blocks: the attention form within each chunk.
    L = semiseparable_mask(log_decay)
    y_within = torch.einsum("bcthn,bcjhn,bhctj,bcjhp->bcthp", C, B, L, xdt)

    # What each chunk adds to the state by its end, then the states that enter each chunk.
    to_end = torch.exp(chunk_decay[..., None] - to_token)
    added = torch.einsum("bhcj,bcjhp,bcjhn->bchpn", to_end, xdt, B)
    initial = _initial(x, B, initial_states)
    between = semiseparable_mask(F.pad(chunk_decay, (1, 0)))
    states = torch.einsum("bhzc,bchpn->bzhpn", between, torch.cat([initial[:, None], added], 1))

    # Off-diagonal blocks: what the entering state gives to each token.
    y_across = torch.einsum("bhct,bcthn,bchpn->bcthp", torch.exp(to_token), C, states[:, :-1])
    return (y_within + y_across).flatten(1, 2)[:, :l], states[:, -1]


def semiseparable_mask(log_decay: Tensor) -> Tensor:
    """(..., l) log decays → (..., l, l): exp(Σ log_decay over (j, t]) where j ≤ t, 0 elsewhere.

    The sums are differences of one running sum, masked to -inf before exp: no positive number is
    ever exponentiated, and the gradient of the masked half is 0 rather than 0 · inf.
    """
    total = log_decay.cumsum(-1)
    difference = total[..., :, None] - total[..., None, :]
    future = torch.ones_like(difference, dtype=torch.bool).triu(1)
    return difference.masked_fill(future, -torch.inf).exp()


def _expand_groups(x: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    heads_per_group = x.shape[2] // B.shape[2]
    return B.repeat_interleave(heads_per_group, 2), C.repeat_interleave(heads_per_group, 2)


def _initial(x: Tensor, B: Tensor, initial_states: Tensor | None) -> Tensor:
    if initial_states is not None:
        return initial_states
    return x.new_zeros(x.shape[0], x.shape[-2], x.shape[-1], B.shape[-1])
