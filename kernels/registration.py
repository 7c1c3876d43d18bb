"""Operators with a backward of their own, in torch.library and, for plain tensors, without it."""

from collections.abc import Callable
from typing import Any

import torch


def register(
    name: str,
    schema: str,
    forward: Callable[..., Any],
    forward_fake: Callable[..., Any],
    backward_schema: str,
    backward: Callable[..., Any],
    backward_fake: Callable[..., Any],
    differentiate: Callable[..., Any],
    setup_context: Callable[..., Any],
) -> type[torch.autograd.Function]:
    """Register torch.ops.mamba2_apps.NAME and NAME_backward.

    Args:
        name: of the operator; schemas are its arguments and results in torch.library's words.
        forward, backward: what runs on CPU and CUDA; the fakes give tensors of their shapes.
        differentiate, setup_context: as torch.library.register_autograd takes them; the first calls
            `backward`, or its operator.

    Returns:
        The operator as an autograd.Function, for tensors that need no dispatcher, which takes
        longer than a small call.
    """
    for op, signature, run, fake in (
        (f"mamba2_apps::{name}", schema, forward, forward_fake),
        (f"mamba2_apps::{name}_backward", backward_schema, backward, backward_fake),
    ):
        torch.library.define(op, signature)
        torch.library.impl(op, ("cpu", "cuda"))(run)
        torch.library.register_fake(op)(fake)
    torch.library.register_autograd(
        f"mamba2_apps::{name}", differentiate, setup_context=setup_context
    )
    torch.library.register_autograd(f"mamba2_apps::{name}_backward", _no_second_derivative)
    methods = {"forward": forward, "setup_context": setup_context, "backward": differentiate}
    return type(
        "_Direct", (torch.autograd.Function,), {k: staticmethod(f) for k, f in methods.items()}
    )


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError('the Triton backend has no second derivatives; use backend="torch"')
