"""What states that enter a sequence add to its outputs, for sequences that are split over ranks.

Dimension legend: directions r · batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n
"""

import torch
from torch import Tensor

from .dispatch import resolve_backend


def add_state_outputs(
    y: Tensor, states: Tensor, C: Tensor, decays: Tensor, *, backend: str = "auto"
) -> Tensor:
    """y + Σ_r exp(decays_r) C_r · states_r: by linearity, what `ssd` gives after those states.

    Args:
        y: (b, l, h, p), of a scan from zero.
        states: (r, b, h, p, n), one that enters in each direction.
        C: (b, l, g, n) for all directions, or (r, b, l, g, n), y's dtype.
        decays: (r, b, l, h) float32 at least, the logarithm of the decay from where the state
            enters through each token, at most 0.
        backend: "auto", "triton" or "torch"; see `dispatch.resolve_backend`.

    Returns:
        (b, l, h, p) in y's dtype.
    """
    if resolve_backend(backend, y) == "triton":
        from . import state_outputs_triton

        each = C if C.dim() == 5 else C[None]
        return state_outputs_triton.add_state_outputs(y, states, each, decays)
    for direction, state in enumerate(states):
        of_direction = C[direction] if C.dim() == 5 else C
        y = y + _outputs_of(state, of_direction, decays[direction]).to(y.dtype)
    return y


def _outputs_of(state: Tensor, C: Tensor, decays: Tensor) -> Tensor:
    """(b, l, h, p) of a state (b, h, p, n), C (b, l, g, n) and decays (b, l, h)."""
    grouped = state.to(C.dtype).unflatten(1, (C.shape[2], -1)).flatten(2, 3)  # (b, g, h/g · p, n)
    given = torch.einsum("blgn,bgkn->blgk", C, grouped)
    by_head = given.unflatten(-1, (-1, state.shape[2])).flatten(2, 3)
    return decays.exp().to(C.dtype)[..., None] * by_head
