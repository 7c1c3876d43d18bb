"""Which weights a model starts from, and which of them train, how fast.

`AdaptationConfig` is the `adaptation` section of a recipe; `mamba2-apps train RECIPE --backbone X`
is short for `--adaptation.start X`.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mamba2_apps import layouts
from mamba2_apps.checkpoint import WEIGHTS_NAME, read_weights

LORA_TARGETS = ("in_proj", "out_proj")


@dataclass(kw_only=True)
class AdaptationConfig:
    """Where the weights start, and which of them train.

    Args:
        start: a RUN, a checkpoint's folder (ours, Hugging Face's or state-spaces'), or its name on
            the Hub: its backbone is taken, and of a RUN the adapter too where its weights have the
            same shapes; null: random weights.
        freeze: parts that do not train: none; backbone; or all_but_head, which leaves a linear
            probe.
        unfreeze_epoch: epoch, counted from 1, from which on the frozen parts train; null: never.
        unfreeze_blocks: blocks of the backbone that begin to train with each epoch from
            unfreeze_epoch on, the last ones first, the adapter at the end; null: all at once.
        lora_rank: train a low-rank change of the mixers' projections in place of the backbone
            (Hu et al. 2022); the RUN holds the merged weights; null: no change of that kind.
        lora_alpha: the change is scaled by lora_alpha / lora_rank.
    """

    start: str | None = None
    freeze: Literal["none", "backbone", "all_but_head"] = "none"
    unfreeze_epoch: int | None = None
    unfreeze_blocks: int | None = None
    lora_rank: int | None = None
    lora_alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.freeze not in ("none", "backbone", "all_but_head"):
            raise ValueError(
                f"adaptation.freeze is {self.freeze!r}, expected none, backbone or all_but_head"
            )
        for name in ("unfreeze_epoch", "unfreeze_blocks", "lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"adaptation.{name} is {value}, expected at least 1, or null")
        if self.unfreeze_epoch is not None and self.freeze == "none":
            raise ValueError("adaptation.unfreeze_epoch is set but nothing is frozen; set freeze")
        if self.unfreeze_blocks is not None and self.unfreeze_epoch is None:
            raise ValueError("adaptation.unfreeze_blocks is set; set unfreeze_epoch too")
        if self.unfreeze_epoch == 1:
            raise ValueError(
                "adaptation.unfreeze_epoch is 1: nothing would be frozen; set freeze none"
            )
        if self.lora_rank is not None and self.freeze != "none":
            raise ValueError(
                f"adaptation.freeze is {self.freeze} beside lora_rank, which already keeps the "
                "backbone's own weights; set freeze none"
            )


def adapt(model: nn.Module, config: AdaptationConfig, *, start: bool = True) -> None:
    """Prepare a new model for training, in place.

    Args:
        model: with a `backbone`, and where it has one an `adapter`.
        config: what to do.
        start: load the weights of `config.start`; not needed where a checkpoint is resumed.

    Raises ValueError where the model has no backbone, or the weights do not fit it.
    """
    if config == AdaptationConfig():
        return
    if not hasattr(model, "backbone"):
        raise ValueError(f"{type(model).__name__} has no backbone to adapt; leave out adaptation")
    if config.start is not None and start:
        parts, misfit = load_start(model, Path(config.start))
        told = f"{' and '.join(parts)} of {config.start} loaded"
        if misfit:
            told += f"; the adapter starts at random, for that one's does not fit ({misfit})"
        if misfit and config.freeze == "all_but_head":
            told += ": it is frozen with random weights; --adaptation.freeze backbone trains it"
        print(told, file=sys.stderr)
    elif start and (config.freeze != "none" or config.lora_rank is not None):
        print("nothing was loaded: what is frozen stays random; give --backbone", file=sys.stderr)
    if config.lora_rank is not None:
        add_lora(model.backbone, config.lora_rank, config.lora_alpha)  # type: ignore[arg-type]
    if config.unfreeze_epoch is None:  # else `Unfreeze` does it, and the optimizer has all of them
        for parameter in frozen_parameters(model, config, epoch=1):
            parameter.requires_grad_(False)
        rest_frozen_norms(model)


def rest_frozen_norms(model: nn.Module) -> None:
    """Put batch norms into evaluation mode where they are frozen, and only there.

    In training mode they would take each batch's statistics, and go on averaging them.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(any(parameter.requires_grad for parameter in module.parameters()))


def load_start(model: nn.Module, path: Path) -> tuple[list[str], str]:
    """Load a backbone, and of a RUN the adapter where it fits.

    Returns the names of what was loaded, and what of the adapter does not fit, or "".

    The adapter is all that lies outside backbone and head. A model, or an adapter, that can fit
    tensors of other sizes to its own, a position embedding to another resolution, say, has a method
    `fit_tensors(tensors, settings) -> tensors`, where settings are class_path and init_args of what
    the tensors are of, or {} where nothing tells them.

    Raises ValueError that names what of the backbone does not fit.
    """
    tensors = _fitted(read_start(path), model, read_settings(path))
    load_part(model.backbone, tensors, "backbone", path)  # type: ignore[arg-type]
    adapter = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not _is_in(name, "backbone") and not _is_head(name)
    }
    if not adapter:
        return ["backbone"], ""
    misfits = []
    for given in _models_in(tensors):
        problems = _problems({name: given[name] for name in adapter if name in given}, adapter)
        if not problems:
            model.load_state_dict({name: given[name] for name in adapter}, strict=False)
            return ["backbone", "adapter"], ""
        misfits.append("; ".join(problems))
    return ["backbone"], misfits[-1]  # of a RUN that mixes several models, its last part's


def _fitted(tensors: dict[str, Tensor], model: Any, settings: dict[str, Any]) -> dict[str, Tensor]:
    if hasattr(model, "fit_tensors"):
        return model.fit_tensors(tensors, settings)
    if not hasattr(getattr(model, "adapter", None), "fit_tensors"):
        return tensors
    given = {k.removeprefix("adapter."): t for k, t in tensors.items() if _is_in(k, "adapter")}
    fitted = model.adapter.fit_tensors(given, settings.get("init_args", {}).get("adapter", {}))
    return tensors | {f"adapter.{name}": tensor for name, tensor in fitted.items()}


def _models_in(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors of a RUN, and of each part of one that mixes several (`mamba2_apps.mixed`)."""
    yield tensors
    parts = sorted({name.split(".")[1] for name in tensors if _is_in(name, "parts")})
    for part in parts:
        prefix = f"parts.{part}."
        yield {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def read_start(path: Path) -> dict[str, Tensor]:
    """Tensors of a RUN by name, or those of a checkpoint's backbone under "backbone."."""
    if (path / "config.yaml").is_file():
        return read_weights(path / WEIGHTS_NAME)
    try:
        checkpoint = layouts.read(path)
    except FileNotFoundError as error:
        raise ValueError(
            f"adaptation.start is {path}, expected a finished RUN or a checkpoint ({error})"
        ) from error
    return {f"backbone.{name}": tensor for name, tensor in checkpoint.backbone.items()}


def read_settings(path: Path) -> dict[str, Any]:
    """Class and arguments of a RUN's model, as its configuration has them; {} of a checkpoint."""
    config = path / "config.yaml"
    if not config.is_file():
        return {}
    return yaml.safe_load(config.read_text(encoding="utf-8")).get("model", {})


def load_part(part: nn.Module, tensors: dict[str, Tensor], name: str, source: Path) -> None:
    """Load the tensors under "<name>." into a part of a model; all of them must fit.

    Between a causal and a bidirectional backbone the rule is `layouts.match_direction`'s.
    """
    given = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if _is_in(key, name)}
    expected = part.state_dict()
    given = layouts.match_direction(given, expected)
    problems = _problems(given, expected)
    if problems:
        raise ValueError(
            f"the {name} of {source} does not fit this recipe's: {'; '.join(problems)}; give the "
            f"recipe the sizes that it was trained with (model.{name})"
        )
    part.load_state_dict(given)


def _problems(given: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """What keeps tensors from being loaded as the expected ones, by kind, four names of each."""
    wrong = [
        f"{key} {tuple(given[key].shape)} for {tuple(expected[key].shape)}"
        for key in expected.keys() & given.keys()
        if given[key].shape != expected[key].shape
    ]
    missing, unknown = (
        sorted(expected.keys() - given.keys()),
        sorted(given.keys() - expected.keys()),
    )
    return [
        f"{what}: {', '.join(keys[:4])}{' …' if len(keys) > 4 else ''}"
        for what, keys in (("missing", missing), ("not known", unknown), ("shapes", sorted(wrong)))
        if keys
    ]


class LowRank(nn.Module):
    """weight + (alpha / rank) up · down, a trainable change of a frozen weight (out, in)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        out, into = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, into))
        self.up = nn.Parameter(weight.new_zeros(out, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight, self.up, self.down, alpha=self.scale)


def add_lora(backbone: nn.Module, rank: int, alpha: float) -> None:
    """Freeze a backbone and give its mixers' projections a trainable low-rank change."""
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    for name, module in list(backbone.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LORA_TARGETS:
            parametrize.register_parametrization(
                module, "weight", LowRank(module.weight, rank, alpha)
            )


def merge_lora(model: nn.Module) -> None:
    """Put every low-rank change into the weight that it changes; names are as before `add_lora`."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")


def frozen_parameters(
    model: nn.Module, config: AdaptationConfig, *, epoch: int
) -> list[nn.Parameter]:
    """Parameters that do not train in an epoch, counted from 1, because of `config.freeze`."""
    if config.freeze == "none":
        return []
    depths = depth_of_parameters(model)
    deepest_frozen = max(depths.values())
    if config.unfreeze_epoch is not None and epoch >= config.unfreeze_epoch:
        if config.unfreeze_blocks is None:
            return []
        thawed = config.unfreeze_blocks * (epoch - config.unfreeze_epoch + 1)
        deepest_frozen -= 1 + thawed  # the backbone's norm thaws with its last block
    return [
        parameter
        for name, parameter in model.named_parameters()
        if depths[name] <= deepest_frozen
        and (_is_in(name, "backbone") if config.freeze == "backbone" else not _is_head(name))
    ]


class Unfreeze(Callback):
    """Let frozen parameters train from the epochs on that the recipe names.

    What trains is a function of the epoch alone, so that a resumed run needs no state.
    """

    def __init__(self, config: AdaptationConfig) -> None:
        self.config = config

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.on_train_epoch_start(trainer, module)  # an epoch that is resumed does not start

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        model, epoch = module.model, trainer.current_epoch + 1
        still = {id(p) for p in frozen_parameters(model, self.config, epoch=epoch)}  # type: ignore[arg-type]
        for parameter in frozen_parameters(model, self.config, epoch=1):  # type: ignore[arg-type]
            parameter.requires_grad_(id(parameter) not in still)
        rest_frozen_norms(model)  # type: ignore[arg-type]


def parameter_groups(
    module: nn.Module, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters: with weight decay and without, by depth.

    Every task uses this one rule. Without decay are vectors and scalars (norms, biases) and what
    `exempt_from_weight_decay` names. With layer_decay a group has "lr_scale", which timm's
    schedulers multiply its rate by: 1 for the head, layer_decay for the last block, and so on down
    to the adapter.
    """
    exempt = exempt_from_weight_decay(module)
    depths = depth_of_parameters(module) if layer_decay is not None else {}
    deepest = max(depths.values(), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        key = (depths.get(name, 0), name in exempt)
        group = groups.setdefault(
            key, {"params": [], "weight_decay": 0.0 if key[1] else weight_decay}
        )
        if layer_decay is not None:
            group["lr_scale"] = layer_decay ** (deepest - key[0])
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def depth_of_parameters(model: nn.Module) -> dict[str, int]:
    """How deep each parameter lies: 0 before the backbone, i + 1 in its block i, then the rest.

    Raises ValueError for a model without a `backbone`.
    """
    if not hasattr(model, "backbone"):
        raise ValueError(
            f"{type(model).__name__} has no backbone; leave out optimizer.layer_decay and the "
            "section adaptation"
        )
    last = len(model.backbone.layers) + 1  # type: ignore[arg-type, union-attr]
    depths = {}
    for name, _ in model.named_parameters():
        if name.startswith("backbone.layers."):
            depths[name] = int(name.split(".")[2]) + 1
        else:
            depths[name] = last if _is_in(name, "backbone") or _is_head(name) else 0
    return depths


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


def _is_head(name: str) -> bool:
    return _is_in(name, "head") or _is_in(name, "fc_norm")  # timm's names


def _is_in(name: str, part: str) -> bool:
    return name.startswith(f"{part}.")
