"""What every domain promises, in one suite: padding, RUNs, resuming, bad input, moving a backbone.

A domain takes part with one shipped recipe made small, an input that it reads and one that it
cannot.
"""

import csv
import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

import mamba2_apps
from mamba2_apps import catalog, cli, recipes, runs
from mamba2_apps.data import UnreadableInput
from mamba2_apps.training import LAST, SyncedCheckpointIO

pytestmark = pytest.mark.usefixtures("one_thread")

# The same backbone everywhere, so that weights may move.
BACKBONE = [
    "--model.backbone.d_model=32", "--model.backbone.n_layer=2", "--model.backbone.d_state=8",
    "--model.backbone.headdim=16",
]  # fmt: skip
SMALL = [
    *BACKBONE, "--trainer.accelerator=cpu", "--trainer.max_epochs=2",
    "--optimizer.warmup_epochs=0.5", "--trainer.early_stop_patience=null",
]  # fmt: skip


@dataclasses.dataclass
class Case:
    """A domain: its recipe, and inputs written into a folder."""

    recipe: str
    good: Callable[[Path], str]
    bad: Callable[[Path], str]
    batch_size: int


def image(folder: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "digit.png")
    return str(folder / "digit.png")


def sequence(folder: Path) -> str:
    bases = np.random.default_rng(0).choice(list("ACGT"), 60)
    (folder / "site.fa").write_text(f">site\n{''.join(bases)}\n")
    return str(folder / "site.fa")


def sound(folder: Path) -> str:
    import soundfile

    wave = np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)
    soundfile.write(folder / "noise.wav", wave, 16000)
    return str(folder / "noise.wav")


def nothing(name: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(b"")
        return str(folder / name)

    return write


CASES = {
    "vision": Case("vision/digits", image, nothing("empty.png"), 256),
    "genomics": Case("genomics/splice", sequence, nothing("empty.fa"), 512),
    "audio": Case("audio/sounds", sound, nothing("empty.wav"), 32),
}


def train(case: Case, run: Path, *overrides: str) -> dict[str, Any]:
    words = [*SMALL, f"--data.batch_size={case.batch_size}", *overrides]
    return runs.train(catalog.find(case.recipe), run, words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished RUN of each domain, and a copy of it as it was in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("contract")
    save = SyncedCheckpointIO.save_checkpoint

    def save_and_keep(self, checkpoint, path, storage_options=None):
        save(self, checkpoint, path, storage_options)
        run = Path(path).parents[1]
        middle = run.with_name(f"{run.name}-killed")
        if Path(path).name == LAST.name and checkpoint["global_step"] == 2 and not middle.exists():
            shutil.copytree(run, middle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SyncedCheckpointIO, "save_checkpoint", save_and_keep)
        # One quick baseline, and no pictures of images: the domains' own tests have all of them.
        quick = {"logistic regression": LogisticRegression(max_iter=2000)}
        patch.setattr("mamba2_apps.genomics.splice.baseline_models", lambda: quick)
        patch.setattr("mamba2_apps.vision.data.ImageData.report", lambda self, task, folder: None)
        for domain, case in CASES.items():
            train(case, folder / domain, "--trainer.checkpoint_every_n_steps=1")
    return folder


@pytest.mark.parametrize("domain", CASES)
def test_workers_need_not_be_forked(domain):
    """Where they are not, each gets a copy of the data, which must not hold the trainer."""
    data = recipes.read(catalog.find(CASES[domain].recipe))[0].data
    data.setup("fit")
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, callbacks=[lambda: None])
    dataset = data.train_dataloader().dataset
    copied = pickle.loads(pickle.dumps(dataset))
    for name, value in dataset[0, 1].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(copied[0, 1][name])), name


@pytest.mark.parametrize("domain", CASES)
def test_a_run_predicts_what_was_trained(trained, tmp_path, domain):
    case, run = CASES[domain], trained / domain
    metrics = json.loads((run / runs.METRICS).read_text())
    assert 0 <= metrics["test"]["accuracy"] <= 1
    assert metrics["baselines"]
    predictor = mamba2_apps.load(run, device="cpu")
    path = case.good(tmp_path)
    (answer,) = predictor.predict(path)
    assert answer["label"] in predictor.labels
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    (vector,) = predictor.embed(path)
    assert vector.shape == (32,)
    assert np.isfinite(vector).all()
    for name in (runs.CONFIG, runs.LABELS, runs.PREPROCESSING, "README.md", "curves.png"):
        assert (run / name).stat().st_size > 0
    assert {row["label"] for row in csv.DictReader((run / "classes.csv").open())} == set(
        predictor.labels
    )


@pytest.mark.parametrize("domain", CASES)
def test_evaluation_again_gives_the_same(trained, domain):
    metrics = json.loads((trained / domain / runs.METRICS).read_text())["test"]
    assert runs.evaluate(trained / domain) == pytest.approx(metrics)


@pytest.mark.parametrize("domain", CASES)
def test_a_killed_run_ends_as_if_it_had_not_been(trained, domain, monkeypatch):
    killed = trained / f"{domain}-killed"
    # Beside weights these take most of the time, and `trained` has them.
    data = type(runs.read_recipe(killed).data)
    monkeypatch.setattr(data, "baselines", lambda self: {})
    monkeypatch.setattr(data, "report", lambda self, task, folder: None)
    runs.resume(killed)
    one, two = load_file(killed / runs.WEIGHTS), load_file(trained / domain / runs.WEIGHTS)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


@pytest.mark.parametrize("domain", CASES)
def test_what_cannot_be_read_is_named_and_left_out(trained, tmp_path, domain):
    case = CASES[domain]
    predictor = mamba2_apps.load(trained / domain, device="cpu")
    good, bad = case.good(tmp_path), case.bad(tmp_path)
    with pytest.raises(UnreadableInput, match=Path(bad).name):
        predictor.predict(bad)
    errors: list[Exception] = []
    (answer,) = predictor.predict([bad, good], on_error=errors.append)
    (alone,) = predictor.predict(good)
    assert answer["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-5)
    assert len(errors) == 1
    with pytest.raises(ValueError, match="does not exist"):
        predictor.predict(str(tmp_path / "absent.xyz"))


@pytest.mark.parametrize("domain", CASES)
def test_batched_equals_single_whatever_the_padding(trained, domain):
    run = trained / domain
    predictor = mamba2_apps.load(run, device="cpu")
    recipe = runs.read_recipe(run)
    recipe.data.prepare_data()
    recipe.data.setup("test")
    samples = [recipe.data.test_set[i] for i in range(5)]
    collate = recipe.data.preprocessing.collate
    with torch.inference_mode():
        together = collate(samples)
        if "mask" in together and not together["mask"].all():
            poison = torch.where(together["mask"], 0, torch.nan)
            inputs = together["inputs"]
            if inputs.is_floating_point():
                together["inputs"] = inputs + poison.reshape(
                    *poison.shape, *[1] * (inputs.ndim - poison.ndim)
                )
        batched = predictor.task(together)
        single = torch.cat([predictor.task(collate([sample])) for sample in samples])
    torch.testing.assert_close(batched, single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", CASES)
@pytest.mark.parametrize("domain", CASES)
def test_a_backbone_moves_between_domains(trained, tmp_path, domain, source):
    words = [*SMALL, f"--adaptation.start={trained / source}"]
    recipe, _ = recipes.read(catalog.find(CASES[domain].recipe), words)
    from mamba2_apps.adaptation import adapt

    torch.manual_seed(1)
    model = recipe.model(3)
    adapt(model, recipe.adaptation)
    weights = load_file(trained / source / runs.WEIGHTS)
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, weights[f"backbone.{name}"]), name


@pytest.mark.parametrize("domain", CASES)
def test_the_recipe_describes_itself(capsys, domain):
    assert cli.main(["train", CASES[domain].recipe, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    keys = [line for line in lines if line.startswith("--")]
    texts = [line for line in lines if line.startswith("      ")]
    assert len(keys) > 30
    assert len(texts) >= 0.9 * len(keys), "keys without documentation"
