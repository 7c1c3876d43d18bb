"""Exported files give what the model gives, without this package and at any batch size."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import mamba2_apps
from mamba2_apps import catalog, cli, runs
from mamba2_apps.export import export

SIZES = {"img_size": 16, "patch_size": 8, "depth": 1, "d_state": 8, "headdim": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of small photos, black and white ones."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (folder / name).mkdir()
        for i in range(6):
            pixels = (level + draw.integers(-30, 30, (24, 24, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "photos"
    words = [f"--data.folder={folder}", "--data.img_size=16", "--data.num_workers=0"]
    words += ["--data.batch_size=4", *(f"--model.{k}={v}" for k, v in SIZES.items())]
    words += ["--trainer.max_epochs=1", "--optimizer.warmup_epochs=0.1", "--trainer.precision=fp32"]
    runs.train(catalog.find("vision/imagefolder"), run, words)
    return run


@pytest.fixture(scope="module")
def predictor(run):
    return mamba2_apps.load(run, "cpu")


def logits(predictor, images):
    with torch.no_grad():
        return predictor.task.model(images)


def test_a_program_runs_at_any_batch_size(run, predictor, tmp_path):
    said = export(run, tmp_path / "model.pt2", "torch")
    assert "inputs (batch, 3, 16, 16) to outputs (batch, 2)" in said
    program = torch.export.load(tmp_path / "model.pt2")
    assert not any("mamba2_apps" in str(node.target) for node in program.graph.nodes)
    for size in (1, 5):
        images = torch.randn(size, 3, 16, 16)
        torch.testing.assert_close(program.module()(images), logits(predictor, images))


def test_an_onnx_graph_runs_at_any_batch_size(run, predictor, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    export(run, tmp_path / "model.onnx", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for size in (1, 5):
        images = torch.randn(size, 3, 16, 16)
        (found,) = session.run(["outputs"], {"inputs": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), logits(predictor, images))


def test_exported_weights_are_those_of_the_timm_model(run, predictor, tmp_path):
    path = tmp_path / "model.safetensors"
    export(run, path, "safetensors")
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, predictor.task.model.state_dict()[name])
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["labels"]) == ["dark", "light"]
        assert json.loads(file.metadata()["preprocessing"])["img_size"] == 16
    name = "bimamba2_tiny_patch16_224"
    again = timm.create_model(name, checkpoint_path=str(path), num_classes=2, **SIZES).eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(images), logits(predictor, images))


def test_a_wrong_graph_is_not_written(run, tmp_path, monkeypatch):
    def write(program, path):
        path.write_text("a graph")
        return lambda inputs: inputs[0].sum()

    monkeypatch.setattr("mamba2_apps.export.trace", lambda *_: None)
    monkeypatch.setattr("mamba2_apps.export._write_program", write)
    with pytest.raises(RuntimeError, match="differ from the model's"):
        export(run, tmp_path / "model.pt2", "torch")
    assert not list(tmp_path.iterdir())


def test_export_says_what_it_cannot_do(run, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'tensorrt', expected one of safetensors, torch, onnx"):
        export(run, tmp_path / "x", "tensorrt")
    monkeypatch.setattr("mamba2_apps.export.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs onnx, onnxscript, onnxruntime: pip install"):
        export(run, tmp_path / "x", "onnx")


def test_the_command_writes_into_the_run_and_embed_names_its_inputs(
    run, folder, predictor, tmp_path, capsys
):
    assert cli.main(["export", str(run), "--format", "safetensors"]) == 0
    assert (run / "export" / "model.safetensors").is_file()
    (folder / "dark" / "broken.png").touch()
    try:
        output = tmp_path / "vectors.npz"
        words = ["embed", str(run), str(folder / "dark"), "--output", str(output), "--device=cpu"]
        assert cli.main(words) == 0
    finally:
        (folder / "dark" / "broken.png").unlink()
    assert "broken.png: not a readable image (the file is empty)" in capsys.readouterr().err
    file = np.load(output)
    assert list(file["inputs"]) == [str(folder / "dark" / f"{i}.png") for i in range(6)]
    assert file["embeddings"].shape == (6, 192)
    expected = predictor.embed([str(folder / "dark")])
    np.testing.assert_allclose(file["embeddings"], expected, rtol=1e-5)
