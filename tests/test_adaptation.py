"""Where weights start, what is frozen when, low-rank changes, rates by depth."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mamba2_apps import catalog, load, runs
from mamba2_apps.adaptation import (
    AdaptationConfig,
    Unfreeze,
    adapt,
    add_lora,
    depth_of_parameters,
    frozen_parameters,
    merge_lora,
    parameter_groups,
)
from mamba2_apps.backbone import Backbone, BackboneConfig
from mamba2_apps.heads import PooledHead
from mamba2_apps.tasks import SequenceModel
from mamba2_apps.training import Recorder
from mamba2_apps.vision.adapter import ConvStem, PatchEmbedding
from mamba2_apps.vision.digits import Digits

SMALL = [
    "--model.backbone.d_model=16",
    "--model.backbone.n_layer=2",
    "--model.backbone.headdim=16",
    "--data.batch_size=256",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=2",
    "--optimizer.warmup_epochs=0",
]


def model(n_layer: int = 2, patch_size: int = 2, seed: int = 0) -> SequenceModel:
    torch.manual_seed(seed)
    return SequenceModel(
        10,
        adapter=lambda d: PatchEmbedding(d, image_size=8, patch_size=patch_size, in_chans=1),
        backbone=BackboneConfig(16, n_layer, d_state=16, headdim=16, bidirectional=True),
        head=PooledHead,
    )


def train(run, *overrides):
    return runs.train(catalog.find("vision/digits"), run, [*SMALL, *overrides])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Digits, "baselines", lambda self: {})
        train(run)
    return run


@pytest.fixture(autouse=True)
def _no_baselines(monkeypatch):
    monkeypatch.setattr(Digits, "baselines", lambda self: {})


def test_a_backbone_starts_from_a_run_or_a_saved_backbone(pretrained, tmp_path):
    trained = load_file(pretrained / runs.WEIGHTS)
    one = model()
    adapt(one, AdaptationConfig(start=str(pretrained)))
    for name, tensor in one.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(tensor, trained[name]), name
    backbone = Backbone(one.backbone.config)
    backbone.save_pretrained(tmp_path / "saved")
    other = model()
    adapt(other, AdaptationConfig(start=str(tmp_path / "saved")))
    assert torch.equal(other.backbone.norm_f.weight, backbone.norm_f.weight)
    for ours, theirs in zip(other.backbone.parameters(), backbone.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_adapter_of_other_shapes_keeps_its_own_weights(pretrained, capsys):
    one = model(patch_size=4)
    before = {name: tensor.clone() for name, tensor in one.adapter.state_dict().items()}
    adapt(one, AdaptationConfig(start=str(pretrained)))
    for name, tensor in one.adapter.state_dict().items():
        assert torch.equal(tensor, before[name])
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"backbone of {pretrained} loaded; the adapter starts at random, for ")
    assert said.endswith("(shapes: adapter.proj.weight (16, 1, 2, 2) for (16, 1, 4, 4))")
    assert "frozen" not in said
    adapt(one, AdaptationConfig(start=str(pretrained), freeze="all_but_head"))
    assert "it is frozen with random weights" in capsys.readouterr().err


def test_what_the_starts_adapter_lacks_is_named(pretrained, tmp_path, capsys):
    one = model()
    one.adapter = PatchEmbedding(16, image_size=8, patch_size=2, in_chans=1, class_token=True)
    adapt(one, AdaptationConfig(start=str(pretrained)))
    said = capsys.readouterr().err
    assert said.endswith("does not fit (missing: adapter.cls_token)\n")
    one.backbone.save_pretrained(tmp_path)
    adapt(model(), AdaptationConfig(start=str(tmp_path)))
    assert "(missing: adapter.pos_embed, adapter.proj.bias, adapter" in capsys.readouterr().err
    adapt(model(), AdaptationConfig(start=str(pretrained)))
    assert capsys.readouterr().err == f"backbone and adapter of {pretrained} loaded\n"


def test_a_backbone_that_does_not_fit_is_refused_by_name(pretrained, tmp_path):
    with pytest.raises(ValueError, match=r"missing: layers\.2\.mixer.*model\.backbone"):
        adapt(model(n_layer=3), AdaptationConfig(start=str(pretrained)))
    with pytest.raises(ValueError, match=r"expected a finished RUN or a checkpoint"):
        adapt(model(), AdaptationConfig(start=str(tmp_path)))
    with pytest.raises(ValueError, match="Linear has no backbone to adapt"):
        adapt(nn.Linear(2, 2), AdaptationConfig(freeze="backbone"))


@pytest.mark.parametrize("freeze", ["backbone", "all_but_head"])
def test_frozen_weights_stay_bitwise_and_the_rest_trains(pretrained, tmp_path, freeze):
    start = load_file(pretrained / runs.WEIGHTS)
    train(tmp_path / "run", f"--adaptation.start={pretrained}", f"--adaptation.freeze={freeze}")
    end = load_file(tmp_path / "run" / runs.WEIGHTS)
    for name, tensor in end.items():
        frozen = name.startswith("backbone." if freeze == "backbone" else ("backbone.", "adapter."))
        if not name.startswith("head."):
            assert torch.equal(tensor, start[name]) == frozen, name


def test_frozen_batch_norms_rest_until_they_thaw(capsys):
    def stem(config):
        one = model()
        one.adapter = ConvStem(16, image_size=8, in_chans=1, widths=(4, 8))
        adapt(one, config)
        return one, [m for m in one.modules() if isinstance(m, nn.BatchNorm2d)]

    for freeze, rest in (("none", False), ("backbone", False), ("all_but_head", True)):
        one, norms = stem(AdaptationConfig(freeze=freeze))
        before = [norm.running_mean.clone() for norm in norms]
        one(torch.randn(2, 1, 8, 8))
        kept = [torch.equal(n.running_mean, mean) for n, mean in zip(norms, before, strict=True)]
        assert set(kept) == {rest}
    assert "what is frozen stays random; give --backbone" in capsys.readouterr().err

    config = AdaptationConfig(freeze="all_but_head", unfreeze_epoch=2)
    one, norms = stem(config)
    for epoch, training in ((0, False), (1, True)):
        place = SimpleNamespace(current_epoch=epoch)
        Unfreeze(config).on_train_epoch_start(place, SimpleNamespace(model=one))
        assert {norm.training for norm in norms} == {training}


def test_blocks_thaw_from_the_last_one_by_the_epoch_alone():
    one = model(n_layer=3)
    config = AdaptationConfig(freeze="all_but_head", unfreeze_epoch=2, unfreeze_blocks=2)
    names = {id(p): name for name, p in one.named_parameters()}

    def frozen_at(epoch):
        frozen = [names[id(p)] for p in frozen_parameters(one, config, epoch=epoch)]
        return {".".join(name.split(".")[:3]).partition(".mixer")[0] for name in frozen}

    assert {"backbone.layers.2", "backbone.norm_f.weight"} < frozen_at(1)
    assert {name for name in frozen_at(2) if "backbone" in name} == {"backbone.layers.0"}
    assert "adapter.pos_embed" in frozen_at(2)
    assert frozen_at(3) == set()
    everything = AdaptationConfig(freeze="backbone", unfreeze_epoch=3)
    assert len(frozen_parameters(one, everything, epoch=2)) == len(list(one.backbone.parameters()))
    assert frozen_parameters(one, everything, epoch=3) == []


def test_thawed_weights_train_from_their_epoch_on(tmp_path):
    norms = []
    on_epoch_end = Recorder.on_train_epoch_end

    def watch(self, trainer, module):
        norms.append(module.model.backbone.layers[0].mixer.in_proj.weight.clone())
        on_epoch_end(self, trainer, module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "on_train_epoch_end", watch)
        train(
            tmp_path / "run",
            "--adaptation.freeze=all_but_head",
            "--adaptation.unfreeze_epoch=3",
            "--trainer.max_epochs=3",
        )
    assert torch.equal(norms[0], norms[1])
    assert not torch.equal(norms[1], norms[2])


def test_a_low_rank_change_starts_at_nothing_and_merges(pretrained):
    one = model().eval()
    x = torch.randn(2, 1, 8, 8)
    before = one(x)
    names = set(one.state_dict())
    add_lora(one.backbone, 4, 16.0)
    torch.testing.assert_close(one(x), before)
    trainable = {name for name, p in one.backbone.named_parameters() if p.requires_grad}
    assert trainable
    assert all(name.rpartition(".")[2] in ("up", "down") for name in trainable)
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if name.endswith(".up"):
                parameter.normal_(std=0.1)
    changed = one(x)
    assert (changed - before).abs().max() > 1e-3
    merge_lora(one)
    torch.testing.assert_close(one(x), changed, rtol=1e-5, atol=1e-5)
    assert set(one.state_dict()) == names


def test_a_run_with_low_rank_changes_predicts_with_plain_weights(pretrained, tmp_path):
    run = tmp_path / "lora"
    train(run, f"--adaptation.start={pretrained}", "--adaptation.lora_rank=2")
    start, end = load_file(pretrained / runs.WEIGHTS), load_file(run / runs.WEIGHTS)
    assert start.keys() == end.keys()
    moved = {name for name in end if not torch.equal(start[name], end[name])}
    inside = {name for name in moved if name.startswith("backbone.")}
    assert inside
    assert all(name.endswith(("in_proj.weight", "out_proj.weight")) for name in inside)
    assert load(run).predict([a_scan()])[0]["label"]


def a_scan():
    return (torch.rand(8, 8) * 255).byte().numpy()


def test_rates_fall_with_depth_from_the_head_down():
    one = model(n_layer=3)
    depths = depth_of_parameters(one)
    assert depths["adapter.pos_embed"] == 0
    assert depths["backbone.layers.2.norm.weight"] == 3
    assert depths["backbone.norm_f.weight"] == depths["head.proj.weight"] == 4
    groups = parameter_groups(one, 0.05, 0.5)
    rate = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    for name, parameter in one.named_parameters():
        assert rate[id(parameter)] == 0.5 ** (4 - depths[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": "head"}, "expected none, backbone or all_but_head"),
        ({"unfreeze_epoch": 3}, "nothing is frozen"),
        ({"unfreeze_blocks": 1, "freeze": "backbone"}, "set unfreeze_epoch too"),
        ({"lora_rank": 4, "freeze": "backbone"}, "already keeps"),
        ({"lora_rank": 0}, "expected at least 1"),
    ],
)
def test_impossible_adaptations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptationConfig(**options)
