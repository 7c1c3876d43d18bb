"""One backbone over several domains: turns, resuming, objectives, and where the weights go."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import mamba2_apps
from mamba2_apps import runs
from mamba2_apps.adaptation import AdaptationConfig, adapt
from mamba2_apps.backbone import BackboneConfig
from mamba2_apps.heads import PooledHead
from mamba2_apps.mixed.data import TurnSampler
from mamba2_apps.mixed.pretraining import MixedModel, MixedReconstruction
from mamba2_apps.tasks import OptimizerConfig, SequenceModel
from mamba2_apps.vision.adapter import PatchEmbedding

PART = """
      {name}:
        class_path: mamba2_apps.vision.digits.Digits
        init_args: {{batch_size: {batch_size}}}"""
ADAPTER = """
      {name}:
        class_path: mamba2_apps.vision.adapter.PatchEmbedding
        init_args: {{image_size: 8, patch_size: {patch_size}, in_chans: 1, maskable: true}}"""
RECIPE = f"""
description: the same scans twice, in small and in large patches
data:
  class_path: mamba2_apps.mixed.data.Mixed
  init_args:
    batches_per_epoch: 6
    parts:{PART.format(name="small", batch_size=64)}{PART.format(name="large", batch_size=96)}
model:
  class_path: mamba2_apps.mixed.pretraining.MixedModel
  init_args:
    adapters:{ADAPTER.format(name="small", patch_size=2)}
{ADAPTER.format(name="large", patch_size=4)}
    backbone: {{d_model: 32, n_layer: 2, d_state: 8, headdim: 16, bidirectional: true}}
task:
  class_path: mamba2_apps.mixed.pretraining.MixedReconstruction
optimizer: {{lr: 1.0e-3, warmup_epochs: 0.5}}
trainer: {{accelerator: cpu, max_epochs: 2, checkpoint_every_n_steps: 2}}
"""


def test_parts_take_turns_and_go_through_all_their_samples():
    parts = {"a": (10, 3), "b": (40, 4)}
    batches = list(TurnSampler(parts, 20, seed=1))
    names = [batch[0][0] for batch in batches]
    assert len(batches) == 20
    for turn in range(10):
        assert sorted(names[2 * turn : 2 * turn + 2]) == ["a", "b"]
    assert names != names[:2] * 10, "the order within a turn never changes"
    first_of_b = [key for batch in batches if batch[0][0] == "b" for _, key in batch]
    assert sorted(first_of_b) == [(0, index) for index in range(40)]
    cycles = [key[0] for batch in batches if batch[0][0] == "a" for _, key in batch]
    assert cycles == sorted(cycles)
    assert max(cycles) == 3


def test_the_place_decides_the_batch_whatever_was_skipped():
    parts = {"a": (10, 3), "b": (40, 4)}
    whole = [*TurnSampler(parts, 7, seed=1), *TurnSampler(parts, 7, seed=1, epoch=1)]
    assert list(TurnSampler(parts, 7, seed=1, epoch=1, skip=3)) == whole[10:]
    assert list(TurnSampler(parts, 14, seed=1)) == whole
    ranks = [list(TurnSampler(parts, 7, seed=1, rank=r, world_size=2)) for r in (0, 1)]
    for one, two in zip(*ranks, strict=True):
        assert one[0][0] == two[0][0]
        assert not {key for _, key in one} & {key for _, key in two}
    with pytest.raises(ValueError, match=r"data\.parts\.a has 10 training samples"):
        TurnSampler({"a": (10, 6)}, 7, seed=1, world_size=2)


def mixed_model(n_layer: int = 2) -> MixedModel:
    torch.manual_seed(0)
    config = BackboneConfig(32, n_layer, d_state=8, headdim=16, bidirectional=True)

    def adapter(size, patch):
        return lambda d: PatchEmbedding(
            d, image_size=size, patch_size=patch, in_chans=1, maskable=True
        )

    return MixedModel(adapters={"small": adapter(8, 2), "large": adapter(16, 4)}, backbone=config)


def test_one_backbone_serves_every_part():
    model = mixed_model()
    assert model.parts["small"].backbone is model.parts["large"].backbone is model.backbone
    names = [name for name, _ in model.named_parameters() if "backbone" in name]
    assert all(name.startswith("backbone.") for name in names)
    task = MixedReconstruction(model, [], OptimizerConfig())
    batch = task.prepare({"inputs": torch.randn(2, 1, 16, 16), "part": "large"}, 0, "val")
    assert batch["hide"].shape == (2, 16)
    assert batch["targets"].shape == (2, 16, 16)
    loss = task.score(task.val_scores, task(batch), batch)
    scores = task.val_scores.compute()
    assert scores["val/loss_large"] == pytest.approx(loss.item(), rel=1e-5)


def test_hidden_patches_are_not_seen():
    adapter = PatchEmbedding(16, image_size=8, patch_size=4, in_chans=1, maskable=True)
    images, hide = torch.randn(1, 1, 8, 8), torch.tensor([[True, False, False, False]])
    changed = images.clone()
    changed[:, :, :4, :4] = 7
    assert torch.equal(adapter(images, hide=hide)[0], adapter(changed, hide=hide)[0])
    targets = adapter.targets(images)
    torch.testing.assert_close(targets.mean(-1), torch.zeros(1, 4), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="maskable=True"):
        PatchEmbedding(16, image_size=8, patch_size=4, in_chans=1)(images, hide=hide)
    with pytest.raises(ValueError, match="need stride 4"):
        PatchEmbedding(16, image_size=8, patch_size=4, stride=2, maskable=True)


def test_a_mixed_training_resumes_bitwise_and_starts_another(tmp_path):
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(RECIPE)
    metrics = runs.train(recipe, tmp_path / "whole")
    assert {"loss_small", "loss_large"} < metrics["test"].keys()
    killed = tmp_path / "killed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixedReconstruction, "training_step", interrupted_at(9))
        with pytest.raises(RuntimeError, match="killed"):
            runs.train(recipe, killed)
    runs.resume(killed)
    one, two = (load_file(run / runs.WEIGHTS) for run in (killed, tmp_path / "whole"))
    assert all(torch.equal(one[name], two[name]) for name in two)

    model = SequenceModel(
        3,
        adapter=lambda d: PatchEmbedding(d, image_size=8, patch_size=4, in_chans=1),
        backbone=BackboneConfig(32, 2, d_state=8, headdim=16, bidirectional=True),
        head=PooledHead,
    )
    adapt(model, AdaptationConfig(start=str(killed)))
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, one[f"backbone.{name}"])
    for name, tensor in model.adapter.state_dict().items():  # the part with patches of this size
        assert torch.equal(tensor, one[f"parts.large.adapter.{name}"])
    with pytest.raises(ValueError, match="answers no questions"):
        mamba2_apps.load(killed).predict(["x.png"])


def test_two_processes_train_the_parts_in_turns(tmp_path):
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(RECIPE.replace("max_epochs: 2", "max_epochs: 1, devices: 2, parallel: ddp"))
    command = [sys.executable, "-P", "-m", "mamba2_apps.cli", "train", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--run", str(tmp_path / "run")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 batches of one part a step (1 × 2 devices" in done.stderr
    assert (tmp_path / "run" / runs.WEIGHTS).is_file()


def test_shards_of_weights_that_a_step_may_not_use_are_refused(tmp_path):
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(RECIPE)
    with pytest.raises(ValueError, match=r"parallel is fsdp2; .* set it to ddp"):
        runs.train(recipe, tmp_path / "run", ["--trainer.parallel=fsdp2"])
    assert not (tmp_path / "run").exists()


def interrupted_at(step: int):
    """A training step that fails when the trainer has done so many."""
    original = MixedReconstruction.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step:
            raise RuntimeError("killed")
        return original(self, batch, batch_idx)

    return training_step
