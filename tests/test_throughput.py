"""Counted arithmetic against numbers worked out by hand, and rates that training reports."""

import json

import pytest
import torch
from torch import nn

from mamba2_apps import catalog, runs
from mamba2_apps.backbone import Backbone, BackboneConfig
from mamba2_apps.throughput import counted_flops, peak_flops
from mamba2_apps.vision.digits import Digits


def test_the_arithmetic_of_a_backbone_is_counted_as_written():
    b, l, d, n, layers = 2, 10, 32, 8, 3
    inner, heads, p = 64, 4, 16
    config = BackboneConfig(d, layers, d_state=n, headdim=p, bidirectional=True)
    with counted_flops(backbone := Backbone(config)) as counts:
        backbone(torch.randn(b, l, d))
    projections = d * (2 * inner + 2 * n + 2 * heads) + inner * d
    convolution, recurrence = 2 * (inner + 2 * n) * 4, 5 * inner * n
    per_token = 2 * projections + 2 * (convolution + recurrence)
    assert sum(counts) == b * l * layers * per_token
    counted = len(counts)
    backbone(torch.randn(b, l, d))
    assert len(counts) == counted, "the hooks stayed"


def test_convolutions_and_attention_are_counted():
    stem = nn.Conv2d(3, 8, 4, stride=4)
    with counted_flops(stem) as counts:
        stem(torch.randn(1, 3, 16, 16))
    assert sum(counts) == 2 * 16 * 8 * 3 * 16
    causal = Backbone(BackboneConfig(64, 1, d_state=8, headdim=16, attn_layer_idx=(0,)))
    with counted_flops(causal) as counts:
        causal(torch.randn(1, 20, 64))
    assert sum(counts) == 20 * 2 * 4 * 64 * 64 + 4 * 20 * 10 * 64


def test_training_reports_its_rates(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Digits, "baselines", lambda self: {})
    options = ["--trainer.max_epochs=1", "--optimizer.warmup_epochs=0", "--trainer.accelerator=cpu"]
    options += ["--model.backbone.n_layer=1", "--model.backbone.d_model=16"]
    options += ["--model.backbone.headdim=16"]
    runs.train(catalog.find("vision/digits"), tmp_path / "run", options)
    rates = json.loads((tmp_path / "run" / "metrics.json").read_text())["rates_per_second"]
    assert set(rates) == {"samples"}
    assert rates["samples"] > 0
    assert "samples/s" in capsys.readouterr().err
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.gpu
def test_the_gpu_is_known():
    assert peak_flops(torch.device("cuda:0"))


def test_a_profile_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Digits, "baselines", lambda self: {})
    options = ["--trainer.max_epochs=1", "--optimizer.warmup_epochs=0", "--trainer.accelerator=cpu"]
    options += ["--model.backbone.n_layer=1", "--model.backbone.d_model=16"]
    options += [
        "--model.backbone.headdim=16",
        "--trainer.profile_steps=2",
        "--optimizer.fused=true",
    ]
    runs.train(catalog.find("vision/digits"), tmp_path / "run", options)
    traces = list((tmp_path / "run" / "profile").glob("*.json"))
    assert len(traces) == 1
    events = json.loads(traces[0].read_text())["traceEvents"]
    assert any("run_training_batch" in str(event.get("name")) for event in events)
