"""The console script and the Python predictor, on one small run that the whole file shares."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import mamba2_apps
from mamba2_apps import catalog, cli, runs
from mamba2_apps.data import UnreadableInput
from mamba2_apps.training import BEST, LAST
from mamba2_apps.vision.data import ImagePreprocessing

SMALL = [
    "--model.backbone.d_model=32",
    "--model.backbone.n_layer=1",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=4",
    "--optimizer.warmup_epochs=1",
    "--optimizer.lr=0.01",
]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("runs") / "digits"
    runs.train(catalog.find("vision/digits"), run, SMALL)
    return run


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    pixels, labels = load_digits(return_X_y=True)
    for i in range(12):
        grey = (pixels[i].reshape(8, 8) * 255 / 16).round().astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{i:02d}_{labels[i]}.png")
    return folder


def call(capsys, *words):
    """Exit code, standard output and standard error of one command."""
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_run_holds_what_the_readme_says(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "config.yaml", "model.safetensors", "labels.json", "preprocessing.json", "metrics.json",
        "metrics.csv", "curves.png", "confusion.png", "classes.csv", "tensorboard", "checkpoints",
        "README.md", "mistakes.png", "saliency.png",
    }  # fmt: skip
    metrics = json.loads((trained / "metrics.json").read_text())
    assert {"scikit-learn SVC", "scikit-learn logistic regression"} == set(metrics["baselines"])
    assert 0.5 < metrics["test"]["accuracy"] <= 1
    assert metrics["parameters"] > 0
    for picture in ("curves.png", "confusion.png"):
        with Image.open(trained / picture) as image:
            assert min(image.size) > 200
    assert any((trained / "tensorboard").iterdir())


def test_recipes_are_listed(capsys):
    code, out, _ = call(capsys, "recipes")
    assert code == 0
    assert re.search(r"^vision/digits +\S.*8 x 8", out, re.MULTILINE)


def test_evaluate_gives_the_metrics_of_the_run(capsys, trained):
    code, out, _ = call(capsys, "evaluate", trained)
    expected = json.loads((trained / "metrics.json").read_text())["test"]
    assert code == 0
    assert {line.split()[0]: line.split()[1] for line in out.splitlines()} == {
        name: f"{value:.4f}" for name, value in expected.items()
    }


def test_prediction_needs_nothing_but_the_run(tmp_path, trained, images):
    """From another folder, in another process, without the training data or its checkpoints."""
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in (runs.CONFIG, runs.WEIGHTS, runs.LABELS, runs.PREPROCESSING):
        shutil.copy(trained / name, alone)
    words = [sys.executable, "-m", "mamba2_apps.cli", "predict", "alone", "images"]
    done = subprocess.run(
        words, cwd=tmp_path, check=True, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    answers = mamba2_apps.load(trained, "cpu").predict(images)
    assert [row["input"] for row in rows] == [f"images/{p.name}" for p in sorted(images.iterdir())]
    for row, answer in zip(rows, answers, strict=True):
        assert row["label"] == answer["label"]
        assert float(row["probability"]) == pytest.approx(answer["probability"], rel=1e-4)
        assert float(row["probabilities.3"]) == pytest.approx(
            answer["probabilities"]["3"], rel=1e-4
        )


def test_predictions_are_those_of_the_model_that_was_tested(trained):
    model = mamba2_apps.load(trained)
    recipe = runs.read_recipe(trained)
    recipe.data.setup("test")
    test = recipe.data.test_set
    scans = (test.images[:, 0] * 0.376 + 0.305).mul(255).round().to(torch.uint8).numpy()
    answers = model.predict(list(scans), batch_size=100)
    right = sum(a["label"] == str(int(t)) for a, t in zip(answers, test.targets, strict=True))
    expected = json.loads((trained / "metrics.json").read_text())["test"]["accuracy"]
    assert abs(right / len(test) - expected) < 0.01  # 8-bit files round the 0 to 16 scale
    assert [a["input"] for a in answers] == list(range(450))


def test_json_lines_and_batches_give_the_same_answers(capsys, tmp_path, trained, images):
    output = tmp_path / "answers.jsonl"
    assert call(capsys, "predict", trained, images, "--output", output)[0] == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    _, out, _ = call(
        capsys, "predict", trained, *sorted(images.iterdir()), "--format=jsonl", "--batch-size=5"
    )
    for row, other in zip(rows, map(json.loads, out.splitlines()), strict=True):
        assert row["input"] == other["input"]
        assert row["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_embeddings_are_what_the_head_sees(trained, images):
    model = mamba2_apps.load(trained, "cpu")
    vectors = model.embed(images)
    assert vectors.shape == (12, 32)
    assert vectors.dtype == np.float32
    logits = model.task.model.head.proj(torch.from_numpy(vectors))
    labels = [model.labels[i] for i in logits.argmax(1)]
    assert labels == [answer["label"] for answer in model.predict(images)]


def test_a_corrupt_image_among_good_ones_is_named_and_counted(capsys, trained, images):
    (images / "05_bad.png").write_bytes(PNG + b"broken")
    (images / "06_empty.png").touch()
    code, out, err = call(capsys, "predict", trained, images)
    assert code == 0
    assert len(out.splitlines()) == 1 + 12
    assert "bad" not in out
    assert "05_bad.png" in err
    assert "06_empty.png: not a readable image (the file is empty)" in err
    assert "2 of 14 inputs could not be read" in err
    with pytest.raises(UnreadableInput, match=r"05_bad\.png"):
        mamba2_apps.load(trained).predict(images)


def test_nothing_readable_is_a_failure(capsys, tmp_path, trained):
    (tmp_path / "bad.png").write_bytes(PNG)
    code, out, err = call(capsys, "predict", trained, tmp_path / "bad.png")
    assert (code, out) == (1, "")
    assert "1 of 1 inputs could not be read" in err


def test_a_failed_prediction_leaves_no_output_file(capsys, tmp_path, trained, images, monkeypatch):
    def fail(self, outputs, batch):
        raise OSError("disk full")

    monkeypatch.setattr("mamba2_apps.tasks.Classification.predictions", fail)
    output = tmp_path / "out.csv"
    code, _, err = call(capsys, "predict", trained, images, "--output", output)
    assert (code, err) == (2, "mamba2-apps: disk full\n")
    assert list(tmp_path.glob("*out.csv*")) == []


@pytest.mark.parametrize("name", [runs.CONFIG, runs.WEIGHTS, runs.LABELS, runs.PREPROCESSING])
def test_a_missing_file_of_a_run_is_named(capsys, run, images, name):
    (run / name).unlink()
    code, _, err = call(capsys, "predict", run, images)
    assert code == 2
    assert f"{run} has no {name}" in err
    assert len(err.splitlines()) == 1
    assert name == runs.CONFIG or f"train --resume {run}" in err


@pytest.mark.parametrize("name", [runs.CONFIG, runs.WEIGHTS, runs.LABELS, runs.PREPROCESSING])
def test_a_damaged_file_of_a_run_is_named_and_resume_repairs_it(capsys, run, images, name):
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[: len(whole) // 2] if name != runs.CONFIG else b"model: [")
    code, _, err = call(capsys, "predict", run, images)
    assert code == 2
    assert name in err
    assert len(err.splitlines()) == 1
    if name != runs.CONFIG:
        assert "damaged" in err
        assert call(capsys, "train", "--resume", run)[0] == 0
        assert (run / name).read_bytes() == whole
        assert call(capsys, "predict", run, images)[0] == 0


@pytest.mark.parametrize("name", [LAST, BEST])
def test_a_damaged_checkpoint_is_named(capsys, run, name):
    (run / name).write_bytes((run / name).read_bytes()[:1000])
    code, _, err = call(capsys, "train", "--resume", run)
    assert code == 2
    assert str(run / name) in err.splitlines()[-1]
    assert "damaged" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train"], "train takes a RECIPE or --resume RUN"),
        (["train", "vision/digts"], "nearest: vision/digits"),
        (["train", "vision/digits", "--optimizer.rl=1"], "nearest: optimizer.lr"),
        (["train", "--resume", "absent"], "absent is not a RUN directory"),
        (["train", "--resume", "absent", "--seed=1"], "--seed=1 cannot be changed"),
        (["evaluate", "absent"], "absent is not a RUN directory"),
        (["predict", "absent", "x.png"], "absent is not a RUN directory"),
        (["evaluate", "absent", "--topk"], "unknown argument '--topk'"),
    ],
)
def test_mistakes_get_one_sentence_and_exit_code_2(capsys, words, sentence):
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert sentence in err
    assert "Traceback" not in err


def test_wrong_inputs_and_devices_are_named(capsys, tmp_path, trained, images):
    code, _, err = call(capsys, "predict", trained, tmp_path / "absent.png")
    assert code == 2
    assert "absent.png does not exist" in err
    assert call(capsys, "predict", trained, images, "--batch-size=0")[0] == 2
    code, _, err = call(capsys, "predict", trained, images, "--device=gpu7")
    assert code == 2
    assert "gpu7" in err


def test_a_run_is_never_overwritten(capsys, run):
    before = (run / runs.METRICS).read_bytes()
    code, _, err = call(capsys, "train", "vision/digits", "--run", run)
    assert code == 2
    assert f"{run} exists" in err
    assert (run / runs.METRICS).read_bytes() == before


def test_help_lists_commands_and_a_recipes_keys(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert all(word in out for word in ("recipes", "train", "evaluate", "predict", "info"))
    code, out, _ = call(capsys, "train", "vision/digits", "--help")
    assert code == 0
    assert "peak learning rate" in out
    assert "--data.max_rotation 15" in out
    assert "--model.backbone.n_layer 3\n      number of blocks." in out


def test_info_tells_versions_and_backends(capsys):
    code, out, _ = call(capsys, "info")
    assert code == 0
    assert f"torch          {torch.__version__.split('+')[0]}" in out
    assert re.search(r"^cpu .*backend torch", out, re.MULTILINE)


def test_light_commands_import_nothing_heavy():
    code = (
        "import sys; from mamba2_apps import cli; cli.main(['recipes'])\n"
        "heavy = {'torch', 'lightning', 'jsonargparse', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_ctrl_c_tells_how_to_resume(tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "mamba2_apps.cli", "train", "vision/digits", "--run", run, *SMALL,
         "--trainer.max_epochs=1000"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert any("epoch 1/1000" in line for line in iter(process.stderr.readline, ""))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"interrupted; continue with `mamba2-apps train --resume {run}`" in err
    assert "Traceback" not in err
    # Saved between batches, not only at the epoch's end or every 100 steps.
    assert torch.load(run / LAST)["global_step"] > 0


def test_unexpected_errors_say_how_to_see_more(capsys, trained, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(runs, "evaluate", fail)
    code, _, err = call(capsys, "evaluate", trained)
    assert code == 1
    assert err == "mamba2-apps: RuntimeError: out of luck (MAMBA2_APPS_DEBUG=1 shows where)\n"
    monkeypatch.setenv("MAMBA2_APPS_DEBUG", "1")
    with pytest.raises(RuntimeError, match="out of luck"):
        cli.main(["evaluate", str(trained)])


def test_new_runs_get_new_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli._new_run("vision/digits") == Path("runs/vision-digits-1")
    Path("runs/vision-digits-1").mkdir(parents=True)
    assert cli._new_run("vision/digits") == Path("runs/vision-digits-2")
    assert cli._new_run("../mine/small.yaml") == Path("runs/small-1")


def answer_in_its_own_way(
    task, *, rate: int, scale: float = 1.0, format: str = "s16le", long_name: str | None = None
):
    yield {"label": task.labels[0], "rate": rate, "scale": scale, "format": format}
    yield {"label": long_name, "rate": rate, "scale": scale, "format": format}


@pytest.fixture
def own_way(monkeypatch):
    monkeypatch.setattr(
        ImagePreprocessing,
        "answerer",
        lambda self, sources, *, output, stream: answer_in_its_own_way,
    )


def test_a_domain_answers_in_its_own_way_with_its_own_options(capsys, trained, own_way):
    code, out, _ = call(
        capsys, "predict", trained, "--rate", "8000", "-", "--stream", "--format=f32le",
        "--long-name", "x",
    )  # fmt: skip
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        {"label": "0", "rate": 8000, "scale": 1.0, "format": "f32le"},
        {"label": "x", "rate": 8000, "scale": 1.0, "format": "f32le"},
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rat=8000"], r"'--rat=8000'; this prediction takes the options --rate, --scale"),
        (["--rate=fast"], r"rate.*fast"),
        ([], r"rate"),
    ],
)
def test_a_wrong_option_of_a_domain_is_named(capsys, trained, own_way, words, sentence):
    code, _, err = call(capsys, "predict", trained, "-", *words)
    assert code == 2
    assert re.search(sentence, err)
    assert len(err.splitlines()) == 1


def test_what_a_domain_does_not_do_is_named(capsys, trained, images):
    code, _, err = call(capsys, "predict", trained, images, "--stream")
    assert (code, err) == (
        2,
        "mamba2-apps: ImagePreprocessing reads no streams; leave out --stream\n",
    )
    code, _, err = call(capsys, "predict", trained, images, "--genome", "hg38.fa")
    assert code == 2
    assert "unknown argument '--genome=hg38.fa'" in err
    code, _, err = call(capsys, "predict", trained, images, "--format=xml")
    assert code == 2
    assert "expected csv or jsonl" in err
