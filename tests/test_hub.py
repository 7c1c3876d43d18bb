"""Model cards and uploads, without a network."""

import json
import math
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from mamba2_apps import catalog, hub, runs
from mamba2_apps.backbone import Backbone, BackboneConfig
from mamba2_apps.language import LanguageModel


@pytest.fixture
def uploads(monkeypatch):
    seen = []

    def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns):
        files = {path.name: path.read_bytes() for path in folder_path.iterdir() if path.is_file()}
        seen.append((repo_id, files, ignore_patterns))
        return "a-commit"

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo",
        lambda self, name, private, exist_ok: SimpleNamespace(repo_id=name),
    )
    return seen


def test_a_backbone_is_uploaded_whole_with_a_card(uploads, tmp_path):
    backbone = Backbone(BackboneConfig(32, 2, d_state=8, headdim=8))
    commit = backbone.push_to_hub("me/small", license="apache-2.0", datasets=["digits"])
    assert commit == "a-commit"
    ((repo_id, files, _),) = uploads
    assert repo_id == "me/small"
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["digits"]
    assert card.data.library_name == "mamba2_apps"
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(files[name])
    assert Backbone.from_pretrained(tmp_path).config == backbone.config


def test_a_language_model_is_uploaded_with_its_table(uploads, tmp_path):
    model = LanguageModel(BackboneConfig(32, 2, d_state=8, headdim=8), 40)
    model.push_to_hub("me/words")
    ((_, files, _),) = uploads
    card = files["README.md"].decode()
    assert "# A causal Mamba-2 language model" in card
    assert "from mamba2_apps.language import LanguageModel" in card
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(files[name])
    assert LanguageModel.from_pretrained(tmp_path).vocab_size == 40


def test_a_run_has_a_card_with_its_metrics(uploads, tmp_path):
    options = ["--trainer.max_epochs=1", "--optimizer.warmup_epochs=0", "--trainer.accelerator=cpu"]
    options += ["--model.backbone.n_layer=1", "--model.backbone.d_model=16"]
    options += ["--model.backbone.headdim=16"]
    metrics = runs.train(catalog.find("vision/digits"), tmp_path / "run", options)
    card = ModelCard((tmp_path / "run" / "README.md").read_text())
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == pytest.approx(metrics["test"])
    assert f"| accuracy | {metrics['test']['accuracy']:.4f} |" in card.text
    assert "accuracy of scikit-learn SVC" in card.text
    assert card.data.license is None
    assert hub._files_of({"folder": "a/b", "batch_size": 8, "source": None}) == ["folder `a/b`"]
    hub.push(tmp_path / "run", "me/run", card=hub.run_card(tmp_path / "run", license="mit"))
    ((_, files, ignored),) = uploads
    assert ModelCard(files["README.md"].decode()).data.license == "mit"
    assert "checkpoints/*" in ignored
    undefined = runs._without_nan({"test": {"loss": 0.5, "eer": math.nan}, "seed": 0})
    assert undefined == {"test": {"loss": 0.5, "eer": None}, "seed": 0}
    changed = json.loads((tmp_path / "run" / "metrics.json").read_text()) | undefined
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(changed))
    card = ModelCard(hub.run_card(tmp_path / "run"))
    assert [result.metric_type for result in card.data.eval_results] == ["loss"]
    with pytest.raises(ValueError, match="absent does not exist"):
        hub.push(tmp_path / "absent", "me/run")
