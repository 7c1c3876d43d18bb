"""Checks that the mixers and the backbone share.

batch b · seqlen l · d_model d
"""

from torch import Tensor, nn
from torch.nn.utils import parametrize


def is_count(value: object, least: int = 1) -> bool:
    """Whether value is an integer (no bool) of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raises ValueError that names an option, its value and what was expected."""
    if not condition:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def check_call(
    u: Tensor,
    d_model: int,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises ValueError unless u is (b, l, d_model) and at most one way to tell lengths is used."""
    if u.ndim != 3 or u.shape[-1] != d_model:
        raise ValueError(f"input: expected (batch, seqlen, {d_model}), got {tuple(u.shape)}")
    given = {"mask": mask, "lengths": lengths, "cu_seqlens": cu_seqlens}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(
            f"{' and '.join(names)} were given together; a batch is either padded (mask) or packed "
            "(cu_seqlens)"
        )
    if lengths is not None and tuple(lengths.shape) != (u.shape[0],):
        raise ValueError(f"lengths: expected shape ({u.shape[0]},), got {tuple(lengths.shape)}")


def is_linear(module: nn.Module) -> bool:
    """Whether its weight and bias say all that it does.

    What took the place of nn.Linear, a quantised one or an adapter around it, is to be called, and
    so is one with hooks.
    """
    plain = type(module) is nn.Linear or parametrize.is_parametrized(module)
    return plain and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its forward."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )
