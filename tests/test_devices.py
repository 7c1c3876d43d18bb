"""Training on several devices: the same weights as on one, whole checkpoints, other world sizes."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mamba2_apps import catalog, runs
from mamba2_apps.data import EpochSampler, ShardedBatches
from mamba2_apps.training import LAST, TrainerConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = [
    "--model.backbone.d_model=16", "--model.backbone.n_layer=2", "--model.backbone.headdim=16",
    "--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--optimizer.warmup_epochs=0.5",
    "--trainer.ema_decay=null",
]  # fmt: skip
TWO = ["--data.batch_size=64", "--trainer.devices=2"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "mamba2_apps.cli", "train", *words]


def train(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*words),
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    run = tmp_path_factory.mktemp("single") / "run"
    runs.train(catalog.find("vision/digits"), run, [*SMALL, "--data.batch_size=128"])
    return run


def assert_alike(run: Path, expected: Path) -> None:
    one, two = load_file(run / runs.WEIGHTS), load_file(expected / runs.WEIGHTS)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-4)
    rows, rows0 = (list(csv.DictReader((r / "metrics.csv").open())) for r in (run, expected))
    for row, row0 in zip(rows, rows0, strict=True):
        assert row["step"] == row0["step"]
        assert {k: float(v) for k, v in row.items()} == pytest.approx(
            {k: float(v) for k, v in row0.items()}, rel=1e-3
        )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_trains(tmp_path, single, parallel):
    run = tmp_path / "run"
    ended = train("vision/digits", f"--run={run}", *SMALL, *TWO, f"--parallel={parallel}")
    assert ended.returncode == 0, ended.stderr
    assert "128 samples a step (64 × 2 devices × 1 accumulated)" in ended.stderr
    assert ended.stdout.count("predict with:") == 1
    assert_alike(run, single)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test"] == pytest.approx(
        json.loads((single / "metrics.json").read_text())["test"], rel=1e-3
    )


def test_a_killed_process_leaves_a_checkpoint_that_any_number_resumes(tmp_path, single):
    run = tmp_path / "run"
    words = ["vision/digits", f"--run={run}", *SMALL, *TWO, "--parallel=ddp"]
    process = subprocess.Popen(
        command(*words, "--trainer.checkpoint_every_n_steps=1"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    lines = iter(process.stderr.readline, "")
    assert any(line.startswith("epoch 1/2") for line in lines), "the first epoch never ended"
    (child,) = children(process.pid)
    os.kill(child, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    checkpoint = torch.load(run / LAST, weights_only=True)
    assert checkpoint["global_step"] >= 8
    assert not (run / runs.WEIGHTS).exists()
    alone = ["--trainer.devices=1", "--trainer.parallel=null", "--data.batch_size=128"]
    runs.resume(run, alone)
    assert_alike(run, single)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def test_under_torchrun_one_directory_is_asked_for(tmp_path):
    ended = train("vision/digits", TORCHELASTIC_RUN_ID="x")
    assert ended.returncode == 2
    assert "give --run DIR" in ended.stderr


def test_ranks_together_go_through_the_order_from_any_place():
    whole = [index for _, index in EpochSampler(1000, seed=3)]
    for world_size in (1, 2, 3, 4):
        shares = [
            [index for _, index in EpochSampler(
                1000, seed=3, skip=400, rank=rank, world_size=world_size
            )]
            for rank in range(world_size)
        ]  # fmt: skip
        steps = zip(*shares, strict=True)
        seen = [index for step in steps for index in step]
        assert seen == whole[400 : 400 + len(seen)]
        assert len(seen) > 600 - world_size


@pytest.mark.parametrize(
    ("size", "batch", "world"), [(100, 8, 3), (7, 1, 4), (5, 64, 2), (9, 3, 3)]
)
def test_every_sample_is_evaluated_once_in_as_many_batches_on_every_rank(size, batch, world):
    ranks = [list(ShardedBatches(size, batch, rank=r, world_size=world)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(i for batches in ranks for b in batches for i in b) == list(range(size))
    assert max(len(b) for batches in ranks for b in batches) <= batch + 1


def test_impossible_combinations_are_named():
    with pytest.raises(ValueError, match=r"is 2; set trainer\.parallel to ddp"):
        TrainerConfig(devices=2)
    with pytest.raises(ValueError, match="running average of sharded weights"):
        TrainerConfig(devices=2, parallel="fsdp2", ema_decay=0.9)
    with pytest.raises(ValueError, match="3 samples for 4 processes"):
        ShardedBatches(3, 1, rank=0, world_size=4)
