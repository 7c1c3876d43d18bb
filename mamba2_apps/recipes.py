"""Recipes: one YAML file per training job, typed and validated.

A recipe names its parts by class path, so that this module knows no domain. What a part needs from
another (the width of the backbone, the number of labels) it is given when it is built: that is why
`model` and `task` are callables.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from textwrap import wrap
from typing import Any, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import nn

from mamba2_apps.adaptation import AdaptationConfig
from mamba2_apps.backbone import BackboneConfig
from mamba2_apps.data import DataModule
from mamba2_apps.tasks import OptimizerConfig, Task
from mamba2_apps.training import TrainerConfig


@dataclass(kw_only=True)
class Recipe:
    """One training job.

    Args:
        description: one line for `mamba2-apps recipes`.
        data: files, split, augmentation and batches.
        model: called with the number of labels.
        task: called with the model, the labels and the optimizer's configuration.
        optimizer: how weights are updated.
        trainer: how long, on what and how precisely to train.
        adaptation: which weights to start from, and which of them train.
        seed: of initial weights, order, augmentation and dropout; splits do not use it.
    """

    description: str
    data: DataModule
    model: Callable[[int], nn.Module]
    task: Callable[[nn.Module, list[str], OptimizerConfig], Task]
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        self.data.seed = self.seed
        if self.trainer.parallel is not None and self.adaptation.unfreeze_epoch is not None:
            # DistributedDataParallel decides at its start which gradients it waits for.
            raise ValueError(
                f"adaptation.unfreeze_epoch is {self.adaptation.unfreeze_epoch} beside "
                f"trainer.parallel {self.trainer.parallel}; thaw on one device, or start a second "
                "run from the first with --backbone"
            )


def read(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, str]:
    """The recipe in a YAML file, its parts built, and its full resolved YAML text.

    Args:
        path: the YAML file.
        overrides: command-line words such as "--optimizer.lr", "1e-3".

    Raises ValueError of one sentence for what does not parse, with the nearest names for an unknown
    key.
    """
    parser = _parser(path)
    try:
        base = parser.parse_args([f"--config={path}"])
    except (ArgumentError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {_explain(error, _names_in(path))}") from error
    _check_keys(overrides, base)
    try:
        config = parser.parse_args([f"--config={path}", *overrides])
    except ArgumentError as error:
        raise ValueError(_explain(error, _names_in(path))) from error
    config.pop("config")
    parts = parser.instantiate(config)
    return Recipe(**dict(parts)), parser.dump(config)


def help_text(path: Path) -> str:
    """Every key of a recipe with its value there and its documentation."""
    config = _parser(path).parse_args([f"--config={path}"])
    config.pop("config")
    lines = [f"keys of {path.name}, as in --data.batch_size 32:", ""]
    for key, value, text in _documented(Recipe, config.as_dict(), ""):
        text_of_value = yaml.safe_dump(value, default_flow_style=True, width=1e6)
        lines.append(f"--{key} {text_of_value.splitlines()[0]}")
        lines += wrap(text, 92, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _documented(owner: type, values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Key, value and documentation of all that a class and the parts in it are built from."""
    texts: dict[str, str] = {}
    hints: dict[str, Any] = {}
    for part in reversed(owner.__mro__):  # options may be handed on to a base, which documents them
        if part.__module__.startswith("mamba2_apps"):
            params = docstring_parser.parse_from_object(part).params
            texts |= {param.arg_name: param.description or "" for param in params}
            hints |= get_type_hints(part if is_dataclass(part) else part.__init__)  # type: ignore[misc]
    for name, value in values.items():
        if isinstance(value, dict) and "class_path" in value:
            yield f"{prefix}{name}", value["class_path"], texts.get(name, "")
            part = resolve_name(value["class_path"])
            yield from _documented(part, value.get("init_args", {}), f"{prefix}{name}.")
        elif is_dataclass(hints.get(name)):
            yield from _documented(hints[name], value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, " ".join(texts.get(name, "").split())


def _parser(path: Path) -> ArgumentParser:
    parser = ArgumentParser(prog=f"mamba2-apps train {path.name}", exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Recipe)
    return parser


def _check_keys(overrides: Sequence[str], base: Namespace) -> None:
    """Raise ValueError with the nearest names for a --key that the recipe does not have."""
    known = {key.replace(".init_args", "") for key, _ in base.items()}
    known |= {".".join(key.split(".")[:i]) for key in known for i in range(1, key.count(".") + 1)}
    for word in overrides:
        key = word.removeprefix("--").split("=")[0].replace(".init_args", "")
        if not word.startswith("--") or key in known or _is_below_a_class_path(key, overrides):
            continue
        raise ValueError(f"unknown key --{key}; {_nearest(key, known)}")


def _is_below_a_class_path(key: str, overrides: Sequence[str]) -> bool:
    """Whether another class is chosen above this key, so that its own keys apply."""
    chosen = [word.removeprefix("--").split("=")[0] for word in overrides]
    parents = [".".join(key.split(".")[:i]) for i in range(1, key.count(".") + 1)]
    return any(parent in chosen or f"{parent}.class_path" in chosen for parent in parents)


def _explain(error: Exception, names: set[str]) -> str:
    """The innermost cause that jsonargparse reports, in one line."""
    text = " ".join(str(error).split()).split(" Got value: Namespace(")[0]
    unknown = re.search(
        r"does not accept option '([\w.]+)'|(?:Key|Option) '([\w.]+)' is not (?:accepted|expected)",
        text,
    )
    if unknown:
        key = unknown[1] or unknown[2]
        return f"unknown key {key!r}; {_nearest(key, names)}"
    where = re.findall(r'Parser key "([\w.]+)":', text)
    cause = re.split(r'Parser key "[\w.]+":', text)[-1].strip()
    return f"{'.'.join(where)}: {cause}" if where else cause


def _nearest(key: str, names: Sequence[str] | set[str]) -> str:
    close = difflib.get_close_matches(key, sorted(names), n=3, cutoff=0.5)
    if not close:
        last = {name.split(".")[-1]: name for name in sorted(names)}
        close = [
            last[n] for n in difflib.get_close_matches(key.split(".")[-1], last, n=3, cutoff=0)
        ]
    return f"nearest: {', '.join(close)}"


def _names_in(path: Path) -> set[str]:
    """Names of every parameter that a recipe's classes take."""
    names: set[str] = set()
    for part in (Recipe, OptimizerConfig, TrainerConfig, AdaptationConfig, BackboneConfig):
        assert is_dataclass(part)
        names |= {field.name for field in fields(part)}
    try:
        paths = list(_class_paths(yaml.safe_load(path.read_text(encoding="utf-8"))))
    except yaml.YAMLError:
        return names
    for class_path in paths:
        try:
            names |= set(signature(resolve_name(class_path)).parameters)
        except (ImportError, AttributeError, ValueError):
            continue
    return names


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        for item in value.values():
            yield from _class_paths(item)
