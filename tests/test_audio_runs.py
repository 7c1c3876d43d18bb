"""Trainings from recipes, small: a RUN that predicts, streams, and shows its mistakes."""

import csv
import json
import re

import numpy as np
import pytest
import soundfile
import torch

import mamba2_apps
from mamba2_apps import catalog, runs
from mamba2_apps.audio.corpora import SOUNDS
from mamba2_apps.cli import main

SMALL = [
    "--model.backbone.d_model=16",
    "--model.backbone.n_layer=1",
    "--model.backbone.d_state=8",
    "--model.backbone.headdim=16",
    "--data.num_workers=0",
    "--trainer.precision=fp32",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=2",
    "--optimizer.warmup_epochs=0.5",
]
FRAMES = ["--model.adapter.channels=4"]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A causal RUN of the shipped sounds, and its metrics."""
    run = tmp_path_factory.mktemp("runs") / "sounds"
    words = ["--model.backbone.bidirectional=false", "--data.level=none"]
    metrics = runs.train(catalog.find("audio/sounds"), run, [*SMALL, *FRAMES, *words])
    return run, metrics


def test_the_sounds_recipe_trains_and_compares(sounds):
    run, metrics = sounds
    assert set(metrics["baselines"]) == {
        "logistic regression on log-mel statistics",
        "RBF-SVM on log-mel statistics",
    }
    assert 0 <= metrics["test"]["balanced_accuracy"] <= 1
    report = json.loads((run / "data.json").read_text())
    assert report["clips"] == 101
    assert sum(report["parts"].values()) == 101
    page = (run / "mistakes.html").read_text()
    wrong = round((1 - metrics["test"]["accuracy"]) * report["parts"]["test"])
    assert f"{wrong} of {report['parts']['test']} test clips" in page
    assert len(re.findall("<audio controls src='data:audio/flac;base64,", page)) == min(wrong, 50)
    tensors = mamba2_apps.load(run, "cpu").task.model.adapter.features
    assert tensors.mean[0] != -4.268  # measured, and kept


def test_strict_is_a_flag_of_recipes_that_have_it(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("path,label\nabsent.wav,a\n")
    words = ["--run", str(tmp_path / "run"), "--strict"]
    source = ["--data.source", str(tmp_path / "t.csv")]
    assert main(["train", "audio/folder", *source, *words]) == 2
    assert "absent.wav: does not exist (data.strict is set" in capsys.readouterr().err
    assert main(["train", "vision/digits", *words]) == 2
    assert "unknown key --data.strict; nearest: " in capsys.readouterr().err


def test_what_was_found_is_in_the_run_before_training(tmp_path, monkeypatch):
    def stop(recipe, task, run):
        assert json.loads((run / "data.json").read_text())["clips"] == 101
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "_fit", stop)
    with pytest.raises(KeyboardInterrupt):
        runs.train(catalog.find("audio/sounds"), tmp_path / "run", [*SMALL, *FRAMES])


def test_a_run_predicts_files_and_streams_them(sounds, tmp_path, capsys, monkeypatch):
    run, _ = sounds
    clip = sorted(SOUNDS.parent.glob("tabla/*.flac"))[0]
    predictor = mamba2_apps.load(run, "cpu")
    (answer,) = predictor.predict(str(clip))
    samples, rate = soundfile.read(clip, dtype="float32")
    (same,) = predictor.predict([samples])
    assert same["probabilities"] == answer["probabilities"]
    assert predictor.embed([str(clip)]).shape == (1, 16)

    (tmp_path / "a.raw").write_bytes(samples.astype("<f4").tobytes())
    words = ["--stream", "--rate", str(rate), "--format", "f32le", "--channels", "1"]
    assert main(["predict", str(run), str(tmp_path / "a.raw"), *words]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) > 2
    assert rows[-1]["final"]
    assert rows[-1]["label"] == answer["label"]
    for label, share in answer["probabilities"].items():
        assert rows[-1]["probabilities"][label] == pytest.approx(share, rel=1e-4)
    assert main(["predict", str(run), str(tmp_path / "a.raw"), "--stream", "--format", "u8"]) == 2
    assert "--format is u8" in capsys.readouterr().err


def test_an_unreadable_file_is_named_and_the_others_are_answered(sounds, tmp_path, capsys):
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    soundfile.write(
        tmp_path / "good.wav", 0.1 * np.random.default_rng(0).standard_normal(800), 8000
    )
    assert main(["predict", str(sounds[0]), str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "good.wav" in out
    assert "bad.wav: not a readable sound file" in err
    assert "1 of 2 inputs could not be read" in err
    for command in (["predict"], ["embed", "--output", str(tmp_path / "e.npz")]):
        files = [str(tmp_path / "absent.wav"), str(tmp_path / "good.wav")]
        assert main([command[0], str(sounds[0]), *files, *command[1:]]) == 0
        err = capsys.readouterr().err
        assert "absent.wav: does not exist" in err
        assert "1 of 2 inputs could not be read" in err
    assert np.load(tmp_path / "e.npz")["inputs"].tolist() == [str(tmp_path / "good.wav")]
    assert main(["predict", str(sounds[0]), str(tmp_path / "absent.wav")]) == 1


def test_events_are_drawn_under_a_spectrogram_and_written_as_a_table(tmp_path):
    generator = np.random.default_rng(0)
    lines = ["path,label,start,end"]
    for number in range(10):
        sound = 0.01 * generator.standard_normal(16000)
        sound[4000:8000] += np.sin(np.arange(4000))
        soundfile.write(tmp_path / f"{number}.wav", sound, 16000)
        lines.append(f"{number}.wav,beep,0.25,0.5")
    (tmp_path / "events.csv").write_text("\n".join(lines) + "\n")
    run = tmp_path / "run"
    words = [f"--data.source={tmp_path / 'events.csv'}", "--data.batch_size=4"]
    metrics = runs.train(catalog.find("audio/events"), run, [*SMALL, *FRAMES, *words])
    assert {"segment_f1", "eer", "average_precision"} <= set(metrics["test"])
    assert (run / "events.png").stat().st_size > 10000
    recipe = (run / "config.yaml").read_text()
    for threshold in ("0.999", "0.001"):  # no events, and some
        (run / "config.yaml").write_text(
            recipe.replace("threshold: 0.5", f"threshold: {threshold}")
        )
        files = [str(tmp_path / f"{number}.wav") for number in (0, 1)]
        assert main(["predict", str(run), *files, f"--output={tmp_path / 'found.csv'}"]) == 0
        with (tmp_path / "found.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [list(row) for row in rows] == [["input", "events"]] * 2
        found = [json.loads(row["events"]) for row in rows]
        assert all(event["label"] == "beep" for events in found for event in events)
    assert all(found)


def test_speech_is_pretrained_then_read_with_what_was_learnt(tmp_path):
    generator = np.random.default_rng(0)
    lines = ["path,text,group"]
    for number in range(12):
        sound = 0.1 * generator.standard_normal(12000)
        soundfile.write(tmp_path / f"{number}.wav", sound, 16000)
        lines.append(f"{number}.wav,{'ab'[number % 2]} {number % 5},{number}")
    table = tmp_path / "speech.csv"
    table.write_text("\n".join(lines) + "\n")
    source = [f"--data.source={table}", "--data.columns=null", "--data.batch_size=4"]
    first, second = tmp_path / "first", tmp_path / "second"
    common = [*SMALL, *FRAMES, *source]
    metrics = runs.train(catalog.find("audio/pretrain"), first, common)
    assert 0 < metrics["test"]["loss"] < 10

    words = ["--data.where=null", "--model.adapter.features.num_mels=64"]
    words += ["--model.adapter.features.per_bin=false", "--model.adapter.strides=[2,2]"]
    words += ["--model.adapter.maskable=true", f"--adaptation.start={first}"]
    words += ["--adaptation.freeze=all_but_head", "--data.max_letters_per_second=25"]
    metrics = runs.train(catalog.find("audio/speech-ctc"), second, [*common, *words])
    assert metrics["test"]["cer"] >= 0
    before, after = (mamba2_apps.load(run, "cpu").task.model for run in (first, second))
    for part in ("adapter", "backbone"):
        frozen = getattr(after, part).state_dict()
        for name, tensor in getattr(before, part).state_dict().items():
            assert torch.equal(frozen[name], tensor), name
    assert "test clips" in (second / "mistakes.html").read_text()
