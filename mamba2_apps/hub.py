"""Sharing on the Hugging Face Hub: model cards, and uploads of a folder."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from mamba2_apps.files import write_text

CARD_NAME = "README.md"
_TAGS = ["mamba2", "state-space-model"]


def model_card(model: Any, *, license: str | None = None, datasets: Sequence[str] = ()) -> str:
    """The model card of a Backbone or a LanguageModel: its sizes, and how to load it.

    Args:
        model: what the card is of.
        license: identifier of the weights' licence, such as apache-2.0; None: not stated.
        datasets: names of what it was trained on.
    """
    data = ModelCardData(
        library_name="mamba2_apps", tags=_TAGS, license=license, datasets=list(datasets) or None
    )
    kind, config = type(model).__name__, getattr(model, "backbone", model).config
    parameters = sum(p.numel() for p in model.parameters())
    direction = "bidirectional" if config.bidirectional else "causal"
    noun, call = (
        ("language model", "logits = model(ids)  # (batch, seqlen, vocabulary)")
        if hasattr(model, "backbone")
        else ("backbone", "hidden = model(embeddings)  # (batch, seqlen, d_model)")
    )
    text = (
        f"# A {direction} Mamba-2 {noun}\n\n"
        f"{config.n_layer} layers of width {config.d_model}, state size {config.d_state}; "
        f"{parameters:,} parameters. Trained on: {', '.join(datasets) or 'not stated'}. Licence: "
        f"{license or 'not stated'}.\n\n"
        f"```python\nfrom {type(model).__module__} import {kind}\n\n"
        f'model = {kind}.from_pretrained("this folder or repository")\n{call}\n```\n'
    )
    return str(ModelCard(f"---\n{data}\n---\n\n{text}"))


def run_card(run: Path, *, license: str | None = None) -> str:
    """The model card of a finished RUN: its data, its test metrics beside baselines, its use.

    Args:
        run: the RUN.
        license: identifier of the weights' licence; None: not stated.
    """
    recipe = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    test = {name: value for name, value in metrics["test"].items() if value is not None}
    source = recipe["data"]["class_path"].rpartition(".")[2]
    data_text = ", ".join([recipe["data"]["class_path"], *_files_of(recipe["data"]["init_args"])])
    results = [
        EvalResult(
            task_type=recipe["task"]["class_path"].rpartition(".")[2].lower(),
            dataset_type=source.lower(),
            dataset_name=source,
            metric_type=name,
            metric_value=value,
        )
        for name, value in test.items()
    ]
    data = ModelCardData(
        library_name="mamba2_apps",
        tags=_TAGS,
        license=license,
        model_name=run.name,
        eval_results=results or None,
    )
    rows = [f"| {name} | {value:.4f} |" for name, value in test.items()]
    for model, scores in metrics["baselines"].items():
        rows += [f"| {k} of {model} | {v:.4f} |" for k, v in scores.items() if v is not None]
    text = (
        f"# {run.name}\n\n{recipe['description']}.\n\n"
        f"{metrics['parameters']:,} parameters, the weights of epoch "
        f"{metrics['best_epoch']['epoch']} of {metrics['epochs']}, seed {metrics['seed']}. Data: "
        f"{data_text}. Licence: {license or 'not stated'}.\n\n"
        "| on the test data | |\n|---|---|\n" + "\n".join(rows) + "\n\n"
        "```python\nimport mamba2_apps\n\n"
        'answers = mamba2_apps.load("this folder").predict(["an input"])\n```\n'
    )
    return str(ModelCard(f"---\n{data}\n---\n\n{text}"))


def _files_of(options: dict[str, Any]) -> list[str]:
    """What a recipe's data are read from, by their options' names."""
    names = ("source", "folder", "root", "genome", "annotation", "paths", "vcf")
    given = [(name, options[name]) for name in names if options.get(name)]
    return [f"{name} `{value}`" for name, value in given]


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    card: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload with mamba2_apps",
) -> str:
    """Upload a folder, a RUN or a saved backbone, to the Hub; return the address of the commit.

    Args:
        folder: what to upload; checkpoints for resuming and logs stay behind.
        repo_id: owner/name; the repository is made where there is none.
        card: text of README.md; None keeps what the folder has.
        private: of a new repository; None: the owner's default.
        token: None: the one that `hf auth login` stored.
        commit_message: of the upload.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; expected a RUN or a saved backbone")
    if card is not None:
        write_text(folder / CARD_NAME, card)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        ignore_patterns=["checkpoints/*", "tensorboard/*", ".*"],
    )
    return str(commit)
