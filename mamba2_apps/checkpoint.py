"""Checkpoints: one directory with `model.safetensors` and `config.json`, each whole at any moment.

A file is written beside its final name, synced to the disk and renamed, so a crash leaves the old
file or the new one, never a part.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mamba2_apps.files import replacing, write_json

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
BACKBONE_FORMAT, LANGUAGE_MODEL_FORMAT = "mamba2_apps.Backbone", "mamba2_apps.LanguageModel"
FORMAT_VERSION = 1


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads JSON; a file that is none raises ValueError that names it."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged or not JSON: {error}") from error


def save_weights(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes safetensors, atomically. Of names that share one tensor the first is kept."""
    kept: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in tensors.items():
        key = _identity(tensor)
        if key not in seen:
            seen.add(key)
            kept[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    with replacing(Path(path)) as partial:
        save_file(kept, partial, metadata={"format": "pt"})


def read_weights(
    path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """All tensors of a safetensors file; a damaged one raises ValueError that names it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected weights in safetensors format")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a safetensors file: {error}") from error


def load_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], source: object, *, assign: bool = False
) -> None:
    """Loads tensors into a module that has exactly these, bit by bit.

    A tied parameter needs one of its names only. assign puts the tensors themselves in place, with
    their type and device, so that a module on the meta device can be loaded; ties come apart then.
    Missing and unexpected names and other shapes raise ValueError that lists them; `source` is what
    it names as their origin.
    """
    expected = module.state_dict(keep_vars=True)
    tensors = dict(tensors)
    ties = {id(expected[name]): name for name in tensors if name in expected}
    for name, parameter in expected.items():
        if name not in tensors and id(parameter) in ties:
            tensors[name] = tensors[ties[id(parameter)]]

    problems = []
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"missing: {', '.join(missing)}")
    if unexpected := sorted(tensors.keys() - expected.keys()):
        problems.append(f"unexpected: {', '.join(unexpected)}")
    problems += [
        f"{name}: shape {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]
    if problems:
        raise ValueError(
            f"{source}: weights do not fit {type(module).__name__}: {'; '.join(problems)}"
        )
    module.load_state_dict(tensors, assign=assign)


class HubUpload:
    """A model with `save_pretrained` that can be uploaded."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        datasets: Sequence[str] = (),
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload with mamba2_apps",
    ) -> str:
        """Save into a repository of the Hub with a model card; return the commit's address.

        license and datasets are what the card states; the rest is `mamba2_apps.hub.push`'s.
        """
        from mamba2_apps import hub

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)  # type: ignore[attr-defined]
            return hub.push(
                folder,
                repo_id,
                card=hub.model_card(self, license=license, datasets=datasets),
                private=private,
                token=token,
                commit_message=commit_message,
            )


def cast_weights(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Give weights another dtype; None: none. A_log, D and dt_bias are only ever widened: a decay
    over thousands of tokens is no longer the trained one when its rate has lost its digits."""
    if dtype is None:
        return
    for name, parameter in module.named_parameters():
        exact = name.rpartition(".")[2] in ("A_log", "D", "dt_bias")
        to = torch.promote_types(parameter.dtype, dtype) if exact else dtype
        parameter.data = parameter.data.to(to)


def write_folder(
    path: str | os.PathLike[str],
    form: str,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Writes a model's directory, weights first, so that a config never stands without them."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_weights(tensors, path / WEIGHTS_NAME)
    header = {"format": form, "format_version": FORMAT_VERSION}
    write_json(path / CONFIG_NAME, header | dict(settings))


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
