"""Training: checkpoints that are always whole, and a killed run that ends as if it had not been."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from mamba2_apps import catalog, files, reports, runs
from mamba2_apps.tasks import Classification
from mamba2_apps.training import (
    BEST,
    LAST,
    AverageWeights,
    MovingAverage,
    Recorder,
    SeedEveryBatch,
    SyncedCheckpointIO,
    TrainerConfig,
)
from mamba2_apps.vision.digits import Digits

pytestmark = pytest.mark.usefixtures("one_thread")

# Dropped paths, augmentation, EMA, early stopping, clipping and accumulation: all that has a state.
SMALL = [
    "--model.backbone.d_model=16",
    "--model.backbone.n_layer=2",
    "--model.backbone.headdim=16",
    "--model.backbone.drop_path=0.3",
    "--data.batch_size=128",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=3",
    "--trainer.ema_decay=0.9",
    "--trainer.early_stop_patience=2",
    "--optimizer.warmup_epochs=0.5",
]


@pytest.fixture(autouse=True)
def _weights_and_metrics_only(monkeypatch):
    """Other tests look at baselines and pictures, which take longer than training here."""
    monkeypatch.setattr(Digits, "baselines", lambda self: {})
    monkeypatch.setattr(Digits, "report", lambda self, task, folder: None)
    monkeypatch.setattr(Classification, "report", lambda self, folder: None)
    monkeypatch.setattr(reports, "learning_curves", lambda *arguments: None)


def train(run: Path, *overrides: str) -> dict:
    return runs.train(catalog.find("vision/digits"), run, [*SMALL, *overrides])


def result(run: Path) -> tuple[dict, dict, list]:
    """Final weights, metrics and the table of epochs."""
    metrics = json.loads((run / runs.METRICS).read_text())
    del metrics["seconds"], metrics["rates_per_second"]
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    return load_file(run / runs.WEIGHTS), metrics, rows


def assert_same_result(run: Path, expected: Path) -> None:
    (weights, metrics, rows), (weights0, metrics0, rows0) = result(run), result(expected)
    assert metrics == metrics0
    assert rows == rows0
    assert weights.keys() == weights0.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, weights0[name]), name


@pytest.mark.parametrize(
    ("options", "expected_epochs"),
    [
        (["--trainer.accumulate_batches=2"], 3),
        (["--data.num_workers=1", "--trainer.ema_decay=null"], 3),
        (["--trainer.mode=max", "--trainer.early_stop_patience=1"], 2),
        (["--trainer.max_epochs=4", "--trainer.check_val_every_n_epoch=2"], 4),
    ],
    ids=["accumulation", "workers", "early-stop", "every-second-validation"],
)
def test_resumes_bitwise_from_checkpoints(tmp_path, monkeypatch, options, expected_epochs):
    kept: list[Path] = []
    save = SyncedCheckpointIO.save_checkpoint

    def save_and_keep(self, checkpoint, path, storage_options=None):
        save(self, checkpoint, path, storage_options)
        if Path(path).name == LAST.name:
            kept.append(tmp_path / f"killed{len(kept)}")
            shutil.copytree(tmp_path / "whole", kept[-1])

    with monkeypatch.context() as patch:
        patch.setattr(SyncedCheckpointIO, "save_checkpoint", save_and_keep)
        train(tmp_path / "whole", "--trainer.checkpoint_every_n_steps=3", *options)
    places = [torch.load(run / LAST)["Digits"] for run in kept]
    assert {place["epoch"] for place in places} == set(range(expected_epochs + 1))
    within = [run for run, place in zip(kept, places, strict=True) if place["samples_done"]]
    assert len(within) >= expected_epochs, "no checkpoint within an epoch"
    for run in [*within[1 :: len(within) // 3], *kept[-1:]]:
        runs.resume(run)
        assert_same_result(run, tmp_path / "whole")


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    options = [*SMALL, "--data.batch_size=64", "--trainer.checkpoint_every_n_steps=1"]
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "mamba2_apps.cli", "train", "vision/digits", "--run", run]
    process = subprocess.Popen(
        [*command, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    # Within the second of three epochs, after its first checkpoints.
    assert any("epoch 1/3" in line for line in iter(process.stderr.readline, ""))
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert torch.load(run / LAST)["global_step"] < 3 * 17
    assert not (run / runs.WEIGHTS).exists()
    runs.resume(run)
    runs.train(catalog.find("vision/digits"), tmp_path / "whole", options)
    assert_same_result(run, tmp_path / "whole")


def test_ctrl_c_saves_between_batches_and_the_resumed_run_is_the_same(tmp_path, monkeypatch):
    train(tmp_path / "whole")
    start = SeedEveryBatch.on_train_batch_start

    def press_ctrl_c(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 12:
            os.kill(os.getpid(), signal.SIGINT)
        start(self, trainer, module, batch, batch_idx)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(SeedEveryBatch, "on_train_batch_start", press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    assert torch.load(tmp_path / "run" / LAST)["global_step"] == 13
    runs.resume(tmp_path / "run")
    assert_same_result(tmp_path / "run", tmp_path / "whole")


def test_killed_before_the_first_checkpoint_starts_again(tmp_path):
    train(tmp_path / "whole", "--trainer.max_epochs=2")
    (tmp_path / "killed").mkdir()
    shutil.copy(tmp_path / "whole" / runs.CONFIG, tmp_path / "killed")
    runs.resume(tmp_path / "killed")
    assert_same_result(tmp_path / "killed", tmp_path / "whole")


def test_a_file_is_whole_or_what_it_was(tmp_path):
    path = tmp_path / "weights"
    files.write_text(path, "old")

    def fail_half_way():
        with files.replacing(path) as partial:
            partial.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_a_checkpoint_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    SyncedCheckpointIO().save_checkpoint({"a": torch.ones(2)}, tmp_path / "new" / "last.ckpt")
    assert events == ["sync", "rename", "sync"]
    assert torch.load(tmp_path / "new" / "last.ckpt")["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_epochs", 0), ("devices", 0), ("ema_decay", 1.0), ("checkpoint_every_n_steps", 0)],
)
def test_impossible_trainer_values_are_named(key, value):
    with pytest.raises(ValueError, match=rf"trainer\.{key} is {value}"):
        TrainerConfig(**{key: value})


def test_divergence_and_a_wrong_monitor_are_named(tmp_path, monkeypatch):
    known = r"trainer\.monitor is 'val/acuracy', expected one of train/loss, .*, val/accuracy, "
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_fit", None)  # found before anything is trained
        with pytest.raises(ValueError, match=known):
            train(tmp_path / "monitor", "--trainer.monitor=val/acuracy")
    assert not (tmp_path / "monitor").exists()
    with pytest.raises(ValueError, match=r"training diverged; lower --optimizer\.lr"):
        train(tmp_path / "lr", "--optimizer.lr=1e30", "--trainer.early_stop_patience=null")


def test_a_monitor_that_is_not_defined_is_no_divergence(tmp_path):
    recorder = Recorder(tmp_path, TrainerConfig(monitor="val/auroc"), threading.Event(), lines=True)
    with pytest.raises(ValueError, match=r"val/auroc is not defined .*trainer\.monitor val/loss"):
        recorder._score({"val/loss": 0.3, "val/auroc": float("nan")})
    with pytest.raises(ValueError, match=r"val/auroc is nan after epoch 1: training diverged"):
        recorder._score({"val/loss": float("nan"), "val/auroc": float("nan")})


def test_the_moving_average_weighs_the_steps_there_were():
    steps = torch.randn(30, 3, dtype=torch.float64)
    module = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    average = MovingAverage(module, 0.9)
    for count, weight in enumerate(steps, 1):
        module.weight.data[0] = weight
        average.update_parameters(module)
        shares = 0.9 ** torch.arange(count - 1, -1, -1, dtype=torch.float64)
        expected = (shares[:, None] * steps[:count]).sum(0) / shares.sum()
        torch.testing.assert_close(average.module.weight[0], expected)


def test_the_moving_average_lies_where_the_model_is_going():
    callback = AverageWeights(0.9)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    callback.setup(trainer, torch.nn.Linear(3, 1), "fit")
    average = callback._average_model
    assert average.module.weight.is_meta
    assert not average.n_averaged.is_meta


def test_an_epoch_without_validation_has_no_values_of_one(tmp_path):
    every = "--trainer.check_val_every_n_epoch"
    metrics = train(tmp_path / "run", "--trainer.max_epochs=4", f"{every}=2")
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [row["val/loss"] != "" for row in rows] == [False, True, False, True]
    assert all(row["train/loss"] for row in rows)
    assert metrics["best_epoch"]["epoch"] in (2, 4)
    with pytest.raises(ValueError, match=r"check_val_every_n_epoch is 2, expected a divisor"):
        train(tmp_path / "odd", f"{every}=2")


def test_the_best_epoch_is_what_is_saved(tmp_path):
    metrics = train(tmp_path / "run", "--trainer.ema_decay=null")
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    best = min(rows, key=lambda row: float(row["val/loss"]))
    assert metrics["best_epoch"]["epoch"] == int(best["epoch"])
    state = torch.load(tmp_path / "run" / BEST)["state_dict"]
    for name, weight in load_file(tmp_path / "run" / runs.WEIGHTS).items():
        assert torch.equal(weight, state[f"model.{name}"])
