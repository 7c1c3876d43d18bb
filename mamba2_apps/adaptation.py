"""Which parameters train, and how."""

from typing import Any

from torch import nn


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters: those with weight decay, those without.

    Every task uses this one rule. Without decay are vectors and scalars (norms, biases) and what
    `exempt_from_weight_decay` names.
    """
    exempt = exempt_from_weight_decay(module)
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (kept if name in exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def exempt_from_weight_decay(module: nn.Module) -> set[str]:
    """Names of the parameters that weight decay would harm.

    These are the vectors and scalars (norms, biases, a causal mixer's A_log, dt_bias and D), the
    weights of embedding tables, and what any submodule declares in a `no_weight_decay()` method, as
    in timm: a set of names relative to that submodule, such as pos_embed.
    """
    exempt = {name for name, parameter in module.named_parameters() if parameter.ndim <= 1}
    for prefix, part in module.named_modules():
        declared = set(part.no_weight_decay()) if hasattr(part, "no_weight_decay") else set()
        if isinstance(part, nn.Embedding):
            declared.add("weight")
        exempt |= {f"{prefix}.{name}" if prefix else name for name in declared}
    return exempt
