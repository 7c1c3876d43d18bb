"""A RUN: the directory that one training job writes, and all that prediction needs.

config.yaml         the recipe with every value resolved
model.safetensors   weights of the best epoch (their moving average where the recipe keeps one)
labels.json         names of the outputs
preprocessing.json  what was done to the inputs
data.json           what was found in the data, where the domain looks
metrics.json        test and validation metrics, beside baselines; null: undefined on the data
metrics.csv         one row per epoch
README.md           a model card
curves.png, confusion.png, classes.csv, tensorboard/
checkpoints/        last.ckpt and best.ckpt, for `train --resume`
"""

import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import safetensors.torch
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_only

from mamba2_apps import hub, recipes, reports
from mamba2_apps.adaptation import adapt, merge_lora
from mamba2_apps.checkpoint import load_weights, read_json, read_weights
from mamba2_apps.data import DataModule, Preprocessing
from mamba2_apps.files import replacing, write_json, write_text
from mamba2_apps.parallel import shard_parameters
from mamba2_apps.recipes import Recipe
from mamba2_apps.tasks import Task
from mamba2_apps.training import (
    BEST,
    LAST,
    Recorder,
    build_trainer,
    ctrl_c_noted,
    quiet_lightning,
)

CONFIG, WEIGHTS, METRICS = "config.yaml", "model.safetensors", "metrics.json"
LABELS, PREPROCESSING, DATA = "labels.json", "preprocessing.json", "data.json"
RESUMABLE = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.parallel",
    "trainer.accelerator",
    "trainer.accumulate_batches",
    "data.batch_size",
    "data.num_workers",
)
"""Keys that say on what a run is trained: a resumed run may have others."""


def train(recipe_path: Path, run: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train a recipe into a new directory `run`; return what its metrics.json holds.

    Raises ValueError for what is wrong in the recipe or where `run` is not empty, KeyboardInterrupt
    when interrupted.
    """
    recipe, config = recipes.read(recipe_path, overrides)
    if _rank():
        return _train(recipe, run)
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ValueError(f"{run} exists; give another --run, or continue it with --resume {run}")
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / CONFIG, config)
    try:
        return _train(recipe, run)
    except Exception as error:
        # A mistake that is named must not keep the corrected command from this folder.
        untouched = [path.name for path in run.iterdir()] == [CONFIG]
        if untouched or (isinstance(error, ValueError) and not (run / LAST).exists()):
            shutil.rmtree(run)
        raise


def resume(run: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Continue a killed or interrupted run from its last checkpoint, to the same result.

    overrides may say on what it continues, such as "--trainer.devices=2"; the RUN's config.yaml is
    changed accordingly. Raises ValueError for any other key.
    """
    for word in overrides:
        if word.removeprefix("--").partition("=")[0] not in RESUMABLE or "=" not in word:
            raise ValueError(
                f"{word} cannot be changed in a run that is resumed; what can is "
                f"{', '.join(f'--{key}=' for key in RESUMABLE)}"
            )
    recipe, config = recipes.read(_existing(run, CONFIG), overrides)
    if overrides and not _rank():
        write_text(run / CONFIG, config)
    return _train(recipe, run)


def evaluate(run: Path) -> dict[str, float]:
    """Test the weights of a RUN on its recipe's test data; return the metrics."""
    quiet_lightning()
    recipe = read_recipe(run)
    task = read_task(run, recipe)
    recipe.data.prepare_data()
    recipe.data.setup("test")
    if recipe.data.labels != task.labels:
        raise ValueError(
            f"the data has the labels {recipe.data.labels} and {run / LABELS} {task.labels}; "
            "evaluate needs the data that the run was trained on"
        )
    return _test(recipe, task)


def read_recipe(run: Path) -> Recipe:
    """The recipe that a RUN was trained by, as it was resolved."""
    return recipes.read(_existing(run, CONFIG))[0]


def read_task(run: Path, recipe: Recipe) -> Task:
    """The model of a finished RUN with its weights, in evaluation mode on the CPU."""
    path = _existing(run, WEIGHTS)
    labels = _read_json(run, LABELS)
    task = recipe.task(recipe.model(len(labels)), labels, recipe.optimizer)
    try:
        load_weights(task.model, read_weights(path), path)
    except ValueError as error:
        raise ValueError(
            f"{error}; expected the weights of the model in {run / CONFIG}, which "
            f"`mamba2-apps train --resume {run}` writes again from {BEST}"
        ) from error
    return task.eval()


def read_preprocessing(run: Path) -> Preprocessing:
    """The preprocessing that a RUN was trained with."""
    saved = _read_json(run, PREPROCESSING)
    try:
        return resolve_name(saved["class_path"])(**saved["init_args"])
    except (KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"{run / PREPROCESSING} is damaged: {_first_line(error)}") from error


def _train(recipe: Recipe, run: Path) -> dict[str, Any]:
    quiet_lightning()
    started = time.monotonic()
    data = recipe.data
    data.prepare_data()
    data.setup("fit")
    seed_everything(recipe.seed, verbose=False)
    model = recipe.model(len(data.labels))
    data.prepare_model(model)
    adapt(model, recipe.adaptation, start=not (run / LAST).exists())
    task = recipe.task(model, data.labels, recipe.optimizer)
    _check_monitor(recipe.trainer.monitor, task)
    if not _rank():
        _write_what_prediction_needs(data, run)
        if (found := data.findings()) is not None:
            write_json(run / DATA, found)
        print(_plan(recipe), file=sys.stderr)
    recorder = _fit(recipe, task, run)
    if torch.distributed.is_initialized():
        # What follows is one process's work; metrics would wait for the others.
        torch.distributed.destroy_process_group()
    if _rank():
        return {}
    return _finish(recipe, run, recorder, time.monotonic() - started)


def _check_monitor(monitor: str, task: Task) -> None:
    """Raise ValueError where no epoch will have the value, before the first one is trained."""
    parts = (task.train_scores, task.val_scores)
    known = [f"{scores.part}/{name}" for scores in parts for name in ("loss", *scores.metrics)]
    if monitor not in known:
        raise ValueError(f"trainer.monitor is {monitor!r}, expected one of {', '.join(known)}")


def _write_what_prediction_needs(data: DataModule, run: Path) -> None:
    write_json(run / LABELS, data.labels)
    preprocessing = data.preprocessing
    class_path = f"{type(preprocessing).__module__}.{type(preprocessing).__qualname__}"
    write_json(run / PREPROCESSING, {"class_path": class_path, "init_args": asdict(preprocessing)})


def _plan(recipe: Recipe) -> str:
    """One line: the samples of an optimizer step, and the rate."""
    config, batch, counted = recipe.trainer, recipe.data.batch_size, recipe.data.batch_counts
    processes = config.devices * config.num_nodes
    samples = batch * processes * config.accumulate_batches
    factors = ""
    if samples != batch:
        factors = f" ({batch} × {processes} devices × {config.accumulate_batches} accumulated)"
    return f"{samples} {counted} a step{factors}, learning rate {recipe.optimizer.lr:g}"


def _fit(recipe: Recipe, task: Task, run: Path) -> Recorder:
    last = run / LAST
    step = _read_checkpoint(last)["global_step"] if last.exists() else 0
    if recipe.trainer.parallel == "fsdp2" and not task.uses_all_weights:
        raise ValueError(
            "trainer.parallel is fsdp2; this task trains a part of the model at a time, which its "
            "sharded weights would not allow: set it to ddp"
        )
    if recipe.trainer.parallel == "fsdp2":
        task.configure_model = partial(shard_parameters, task)  # type: ignore[method-assign]
    if recipe.trainer.compile:
        task.model.compile()
    with ctrl_c_noted(alone=recipe.trainer.parallel is None) as interrupt:
        trainer = build_trainer(
            recipe.trainer,
            run=run,
            seed=recipe.seed,
            interrupt=interrupt,
            adaptation=recipe.adaptation,
            first_step=step,
            find_unused=not task.uses_all_weights,
        )
        try:
            trainer.fit(task, datamodule=recipe.data, ckpt_path=last if last.exists() else None)
        except SystemExit:
            # Lightning turns KeyboardInterrupt into an exit.
            if trainer.state.status == TrainerStatus.INTERRUPTED:
                raise KeyboardInterrupt from None
            raise
    return next(c for c in trainer.callbacks if isinstance(c, Recorder))  # type: ignore[attr-defined]


def _finish(recipe: Recipe, run: Path, recorder: Recorder, seconds: float) -> dict[str, Any]:
    """Write the weights of the best epoch, test them, and report."""
    model = recipe.model(len(recipe.data.labels))
    adapt(model, recipe.adaptation, start=False)
    task = recipe.task(model, recipe.data.labels, recipe.optimizer)
    task.load_state_dict(_read_checkpoint(run / BEST)["state_dict"])
    merge_lora(task.model)
    with replacing(run / WEIGHTS) as partial:
        safetensors.torch.save_model(task.model, str(partial))
    recorder.write_table()  # the run may have been killed between its last checkpoint and its table
    reports.learning_curves(recorder.history, recorder.best_epoch, run / "curves.png")
    best = next(row for row in recorder.history if row["epoch"] == recorder.best_epoch)
    metrics = {
        "test": _test(recipe, task),
        "baselines": recipe.data.baselines(),
        "best_epoch": best,
        "epochs": len(recorder.history),
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "seed": recipe.seed,
        "seconds": round(seconds, 1),
        "rates_per_second": {name: round(rate, 4) for name, rate in recorder.rates.items()},
    }
    task.report(run)
    recipe.data.report(task, run)
    write_json(run / METRICS, _without_nan(metrics))
    write_text(run / hub.CARD_NAME, hub.run_card(run))
    return metrics


def _without_nan(value: Any) -> Any:
    """Metrics with None for those that the data leave undefined: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _test(recipe: Recipe, task: Task) -> dict[str, float]:
    trainer = Trainer(
        accelerator=recipe.trainer.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (metrics,) = trainer.test(task, datamodule=recipe.data, verbose=False)
    return {name.removeprefix("test/"): value for name, value in metrics.items()}


def _rank() -> int:
    """Of this process, before a process group exists too."""
    return getattr(rank_zero_only, "rank", None) or 0


def _existing(run: Path, name: str) -> Path:
    """The path of a RUN's file. Raises ValueError that says what is missing and what to do."""
    if not run.is_dir():
        raise ValueError(f"{run} is not a RUN directory (it does not exist or is a file)")
    path = run / name
    if not path.is_file():
        if not (run / CONFIG).is_file():
            fix = "it is not a RUN of mamba2-apps, or restore the file from a copy"
        else:
            fix = (
                "training has not finished, or the file was removed: "
                f"run `mamba2-apps train --resume {run}`"
            )
        raise ValueError(f"{run} has no {name}; {fix}")
    return path


def _read_json(run: Path, name: str) -> Any:
    path = _existing(run, name)
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; `mamba2-apps train --resume {run}` writes it again") from error


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is missing or damaged ({_first_line(error)}); restore it from a copy, "
            "or remove the RUN and train again"
        ) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
