"""Checkpoints: bitwise round trips, whole files only, and errors that name what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mamba2_apps.backbone import Backbone, BackboneConfig
from mamba2_apps.checkpoint import load_weights, read_weights, save_weights
from mamba2_apps.heads import LanguageModelHead


@pytest.fixture
def backbone():
    options = {"attn_layer_idx": (1,), "attn_cfg": {"num_heads": 4, "rotary_emb_dim": 4}}
    config = BackboneConfig(32, 2, d_state=8, headdim=8, d_intermediate=16, **options)
    return Backbone(config, dtype=torch.bfloat16)


def test_a_backbone_comes_back_bit_by_bit(backbone, tmp_path):
    backbone.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(f.name for f in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    again = Backbone.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == backbone.config
    assert not again.training
    state, expected = again.state_dict(), backbone.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value)
    assert state["layers.0.mixer.A_log"].dtype == torch.float32
    assert all(p.requires_grad for p in again.parameters())
    wide = Backbone.from_pretrained(tmp_path / "new" / "folder", dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


def test_saving_again_replaces_and_touches_nothing_else(backbone, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    backbone.save_pretrained(tmp_path)
    with torch.no_grad():
        backbone.norm_f.weight.fill_(2)
    backbone.save_pretrained(tmp_path)
    assert (Backbone.from_pretrained(tmp_path).norm_f.weight == 2).all()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_save_that_is_killed_leaves_the_old_checkpoint(backbone, tmp_path, monkeypatch):
    backbone.save_pretrained(tmp_path)
    kept = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def half(tensors, path, **_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("mamba2_apps.checkpoint.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        backbone.bfloat16().save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == kept


def test_tied_parameters_are_stored_once(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 6)
            self.head = LanguageModelHead(6, 10, tied_to=self.embedding)

    model, other = Model(), Model()
    save_weights(model.state_dict(), tmp_path / "w.safetensors")
    assert set(load_file(tmp_path / "w.safetensors")) == {"embedding.weight"}
    load_weights(other, read_weights(tmp_path / "w.safetensors"), "w.safetensors")
    assert other.head.proj.weight is other.embedding.weight
    assert torch.equal(other.head.proj.weight, model.embedding.weight)


def test_views_are_stored_as_what_they_show(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"base": base, "row": base[1], "turned": base.T, "empty": base[:0]}
    save_weights(tensors, tmp_path / "w.safetensors")
    for name, value in read_weights(tmp_path / "w.safetensors").items():
        assert torch.equal(value, tensors[name])


def test_weights_that_do_not_fit_are_listed(backbone, tmp_path):
    backbone.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["norm_f.weight"]
    weights["extra"] = torch.zeros(1)
    weights["layers.0.mixer.D"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit Backbone") as error:
        Backbone.from_pretrained(tmp_path)
    for part in (
        str(tmp_path),
        "missing: norm_f.weight",
        "unexpected: extra",
        "layers.0.mixer.D: shape (3,), expected (8,)",
    ):
        assert part in str(error.value)


def test_folders_that_are_no_checkpoint_are_named(backbone, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        Backbone.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json in it, found nothing"):
        Backbone.from_pretrained(tmp_path)
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"found photo\.jpg"):
        Backbone.from_pretrained(tmp_path)

    config = tmp_path / "config.json"
    for content, found in [
        ({"model_type": "bert"}, "found model_type='bert'"),
        ({"a": 1, "b": 2}, "found the keys a, b"),
        ([1], "found a list"),
        ({"format": "mamba2_apps.Backbone", "format_version": 9}, "format_version 9"),
    ]:
        config.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"config\.json") as error:
            Backbone.from_pretrained(tmp_path)
        assert found in str(error.value)
    config.write_text('{"format":')
    with pytest.raises(ValueError, match=r"config\.json: damaged or not JSON"):
        Backbone.from_pretrained(tmp_path)


def test_damaged_checkpoints_are_named(backbone, tmp_path):
    backbone.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"config": content["config"] | {"n_layers": 4}}))
    with pytest.raises(ValueError, match="n_layers"):
        Backbone.from_pretrained(tmp_path)
    config.write_text(json.dumps(content))
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        Backbone.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        Backbone.from_pretrained(tmp_path)
