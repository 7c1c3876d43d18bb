"""Mamba-2 checkpoints of every layout: our own, Hugging Face's and state-spaces'.

A checkpoint is a folder with `config.json` and weights, or the name of one on the Hugging Face Hub.
Whatever its layout, it is read into a `Checkpoint`: the backbone under our names, which are
mamba_ssm's, and beside it the embedding table and the output head of a language model. Weights are
taken as they are stored: none is drawn anew and none changes its type.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mamba2_apps.checkpoint import (
    BACKBONE_FORMAT,
    CONFIG_NAME,
    FORMAT_VERSION,
    LANGUAGE_MODEL_FORMAT,
    WEIGHTS_NAME,
    read_json,
    read_weights,
)
from mamba2_apps.files import replacing, write_json

_PICKLED_NAME = "pytorch_model.bin"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Arguments of mamba_ssm's Mamba2 that say how it computes, not what.
_HOW = ("layer", "chunk_size", "use_mem_eff_path")
_STATE_SPACES_KEYS = {
    "d_model", "n_layer", "d_intermediate", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg",
    "rms_norm", "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings",
}  # fmt: skip


@dataclass
class Checkpoint:
    """A backbone, and what a language model has besides.

    Args:
        folder: where it was read.
        config: keyword arguments of BackboneConfig.
        backbone: its weights by our names.
        embedding: table (vocabulary, d_model); None: there is none.
        head: output weights (vocabulary, d_model); None: none, or those of the embedding.
        vocab_size: tokens that exist; the table may be padded beyond them.
        tied: where there is no head, a language model's is the embedding.
    """

    folder: Path
    config: dict[str, Any]
    backbone: dict[str, Tensor]
    embedding: Tensor | None = None
    head: Tensor | None = None
    vocab_size: int | None = None
    tied: bool = True


def read(path_or_repo: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint of any of the three layouts, from a folder or the Hub.

    Raises:
        FileNotFoundError: no such folder or repository, or a file missing in it.
        ValueError: a damaged file, a layout or a setting that is not known.
    """
    folder = local_folder(path_or_repo)
    path = folder / CONFIG_NAME
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
        raise FileNotFoundError(f"{folder}: no {CONFIG_NAME} in it, found {found}")
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    tied = True
    if content.get("format") in (BACKBONE_FORMAT, LANGUAGE_MODEL_FORMAT):
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format_version {version!r}, this version of mamba2_apps reads "
                f"{FORMAT_VERSION}"
            )
        config = _setting(content, "config", path)
    elif content.get("model_type") == "mamba2":
        config = from_hugging_face(content, path)
        tied = content.get("tie_word_embeddings", False)
    elif "ssm_cfg" in content:
        config = from_state_spaces(content, path)
        tied = content.get("tie_embeddings", True)
    else:
        raise ValueError(
            f"{path}: expected format {BACKBONE_FORMAT!r}, model_type 'mamba2' (Hugging Face) or "
            f"ssm_cfg (state-spaces), found {_describe(content)}"
        )
    return _sorted_weights(folder, config, content.get("vocab_size"), tied)


def local_folder(path_or_repo: str | os.PathLike[str]) -> Path:
    """The folder itself, or where a repository of the Hub was downloaded to.

    Of a repository the configuration, the tokenizer and the weights are fetched: safetensors, or
    pickled ones where there are no others. Raises FileNotFoundError where there is neither.
    """
    path = Path(path_or_repo)
    if path.is_dir():
        return path
    name = os.fspath(path_or_repo)
    if not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(
            f"{name}: no such directory; expected one with {CONFIG_NAME}, or owner/name on the Hub"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    texts = [CONFIG_NAME, "generation_config.json", "tokenizer*.json"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*texts, "model*.safetensors*"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*texts, "pytorch_model*.bin*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{name}: no such directory, and not to be had from the Hub ({reason})"
        ) from error
    return folder


def from_hugging_face(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of BackboneConfig from the config.json of transformers' Mamba2 (`path`).

    Raises ValueError for a setting that this backbone does not have.
    """
    defaults = {
        "num_heads": 128, "head_dim": 64, "hidden_size": 4096, "state_size": 128,
        "num_hidden_layers": 64, "layer_norm_epsilon": 1e-5, "expand": 2, "conv_kernel": 4,
        "n_groups": 8, "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
        "residual_in_fp32": True, "time_step_limit": (0.0, math.inf),
    }  # fmt: skip
    value = {**defaults, **{k: v for k, v in content.items() if k in defaults}}
    if value["hidden_act"] not in ("silu", "swish"):
        raise ValueError(f"{path}: hidden_act is {value['hidden_act']!r}, expected 'silu'")
    if value["expand"] * value["hidden_size"] != value["num_heads"] * value["head_dim"]:
        raise ValueError(
            f"{path}: num_heads × head_dim is {value['num_heads'] * value['head_dim']}, expected "
            f"expand × hidden_size = {value['expand'] * value['hidden_size']}"
        )
    return {
        "d_model": value["hidden_size"],
        "n_layer": value["num_hidden_layers"],
        "d_state": value["state_size"],
        "d_conv": value["conv_kernel"],
        "expand": value["expand"],
        "headdim": value["head_dim"],
        "ngroups": value["n_groups"],
        "norm_eps": value["layer_norm_epsilon"],
        "residual_in_fp32": value["residual_in_fp32"],
        "dt_limit": tuple(_number(limit) for limit in value["time_step_limit"]),
        "bias": value["use_bias"],
        "conv_bias": value["use_conv_bias"],
    }


def from_state_spaces(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of BackboneConfig from the config.json of mamba_ssm's models (`path`).

    Raises ValueError for a setting that this backbone does not have, Mamba-1 among them.
    """
    if unknown := sorted(content.keys() - _STATE_SPACES_KEYS):
        raise ValueError(f"{path}: unknown settings {', '.join(unknown)}")
    mixer = dict(content["ssm_cfg"] or {})
    if mixer.get("layer", "Mamba1") != "Mamba2":
        raise ValueError(f"{path}: its layers are {mixer.get('layer', 'Mamba1')}, expected Mamba2")
    if not content.get("rms_norm", True):
        raise ValueError(f"{path}: rms_norm is false (LayerNorm), expected true")
    config = {
        "d_model": _setting(content, "d_model", path),
        "n_layer": _setting(content, "n_layer", path),
        # mamba_ssm's GatedMLP widens to a multiple of 128, its MHA's MLP to one of 256.
        "d_intermediate": _round_up(content.get("d_intermediate", 0), 128),
        "residual_in_fp32": content.get("residual_in_fp32", True),
        "attn_layer_idx": tuple(content.get("attn_layer_idx") or ()),
        **{name: setting for name, setting in mixer.items() if name not in _HOW},
    }
    if config["attn_layer_idx"]:
        attention = dict(content.get("attn_cfg") or {})
        if attention.get("mlp_dim"):
            attention["mlp_dim"] = _round_up(attention["mlp_dim"], 256)
        config["attn_cfg"] = {"causal": False, **attention}
    return config


def to_hugging_face(config: Any, vocab_size: int, tied: bool) -> dict[str, Any]:
    """The config.json of transformers' Mamba2 for a BackboneConfig.

    Raises ValueError that names what transformers' Mamba2 does not have.
    """
    expected = {
        "bidirectional": False, "attn_layer_idx": (), "d_intermediate": 0, "d_ssm": None,
        "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False,
    }  # fmt: skip
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}; the Hugging Face layout has {value!r} only"
            )
    low, high = config.dt_limit
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "expand": config.expand,
        "num_heads": config.expand * config.d_model // config.headdim,
        "head_dim": config.headdim,
        "n_groups": config.ngroups,
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_in_fp32,
        "time_step_limit": [low, high],
        "use_bias": config.bias,
        "use_conv_bias": config.conv_bias,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        # transformers would take 0, 1 and 2, which mean something else in most vocabularies.
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }


def write_hugging_face(
    path: str | os.PathLike[str],
    config: Any,
    backbone: Mapping[str, Tensor],
    embedding: Tensor,
    head: Tensor | None,
) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` reads.

    Args:
        path: the folder.
        config: the BackboneConfig.
        backbone: its weights.
        embedding: table (vocabulary, d_model).
        head: output weights (vocabulary, d_model); None: those of the embedding.
    """
    settings = to_hugging_face(config, len(embedding), head is None)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
    tensors["backbone.embeddings.weight"] = embedding
    if head is not None:
        tensors["lm_head.weight"] = head
    kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with replacing(path / WEIGHTS_NAME) as partial:
        save_file(kept, partial, metadata={"format": "pt"})
    write_json(path / CONFIG_NAME, settings)


def match_direction(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights of a causal backbone for a bidirectional one, or the reverse.

    Both directions start from the causal weights: A_log and dt_bias twice, in_proj's rows of dt
    twice, and the convolution's weights twice where each direction has its own. The other way a
    causal backbone takes the forward direction. Weights that need no change are passed on.

    Args:
        tensors: what was read, by name.
        expected: what is to be filled, by the same names.
    """
    matched = dict(tensors)
    for name, target in expected.items():
        part, _, leaf = name.rpartition(".")
        if leaf != "A_log" or name not in tensors:
            continue
        source = tensors[name]
        if source.ndim == target.ndim or source.shape[-1] != target.shape[-1]:
            continue
        to_both = target.ndim == 2
        for vector in (f"{part}.A_log", f"{part}.dt_bias"):
            if vector not in tensors:
                continue
            given = tensors[vector]
            matched[vector] = torch.stack([given, given]) if to_both else given[0]
        heads = target.shape[-1]
        for rows in (f"{part}.in_proj.weight", f"{part}.in_proj.bias"):
            if rows in tensors:
                given = tensors[rows]
                matched[rows] = torch.cat([given, given[-heads:]]) if to_both else given[:-heads]
    for name, target in expected.items():
        if name.rpartition(".")[0].endswith("conv1d") and name in tensors:
            given = tensors[name]
            if len(target) == 2 * len(given):
                matched[name] = torch.cat([given, given])
            elif len(given) == 2 * len(target):
                matched[name] = given[: len(target)]
    return matched


def _sorted_weights(
    folder: Path, config: dict[str, Any], vocab_size: int | None, tied: bool
) -> Checkpoint:
    """Sort the tensors of a folder into backbone, embedding and head."""
    checkpoint = Checkpoint(folder, config, {}, vocab_size=vocab_size, tied=tied)
    for name, tensor in _all_weights(folder).items():
        inner = name.removeprefix("backbone.")
        if inner in ("embeddings.weight", "embedding.weight"):
            checkpoint.embedding = tensor
        elif inner in ("lm_head.weight", "head.weight"):
            checkpoint.head = tensor
        else:
            checkpoint.backbone[inner] = tensor
    return checkpoint


def _all_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder: safetensors or pickled, in one file or in shards."""
    for name, read_file in ((WEIGHTS_NAME, read_weights), (_PICKLED_NAME, _read_pickled)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read_file(folder / name)
        if index.is_file():
            shards = sorted(set(_setting(read_json(index), "weight_map", index).values()))
            return {k: v for shard in shards for k, v in read_file(folder / shard).items()}
    raise FileNotFoundError(
        f"{folder}: neither {WEIGHTS_NAME} nor {_PICKLED_NAME} in it, whole or in shards"
    )


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """Tensors of a file by torch.save, read without running code of its own."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected weights written by torch.save")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path}: damaged, or more than weights ({reason})") from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{path}: expected tensors by name, found a {type(found).__name__}")
    return found


def _setting(content: Mapping[str, Any], name: str, path: Path) -> Any:
    if name not in content:
        raise ValueError(f"{path}: no {name} in it, found {', '.join(sorted(content)[:10])}")
    return content[name]


def _describe(content: Mapping[str, Any]) -> str:
    for key in ("format", "model_type"):
        if key in content:
            return f"{key}={content[key]!r}"
    return f"the keys {', '.join(sorted(content)[:10]) or '(none)'}"


def _number(value: Any) -> float:
    """A number of transformers' JSON, which writes infinity as {"__float__": "Infinity"}."""
    return float(value["__float__"]) if isinstance(value, dict) else value


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
