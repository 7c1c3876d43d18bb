"""Counted arithmetic against numbers worked out by hand, and rates that training reports."""

import json
from unittest import mock

import pytest
import torch
from torch import nn

from mamba2_apps import catalog, runs
from mamba2_apps.audio.preprocessing import AudioPreprocessing
from mamba2_apps.backbone import Backbone, BackboneConfig
from mamba2_apps.genomics.preprocessing import DNAPreprocessing
from mamba2_apps.mixer import Mamba2
from mamba2_apps.throughput import Throughput, counted_flops, peak_flops
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


def test_a_mixers_projections_count_though_an_operator_may_take_their_weights(monkeypatch):
    mixer, x = Mamba2(32, d_state=8, headdim=16), torch.randn(1, 10, 32)
    with counted_flops(mixer) as called:
        mixer(x)
    monkeypatch.setattr(Mamba2, "_mix", lambda self, u, *_: (u, None))
    with counted_flops(mixer) as taken:
        mixer(x)
    assert sum(taken) == sum(called) > 2 * 10 * mixer.in_proj.weight.numel()


def test_counted_blocks_call_their_mixers(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("called")

    backbone, x = Backbone(BackboneConfig(64, 2, d_state=8, headdim=16)), torch.randn(1, 10, 64)
    with counted_flops(backbone) as recorded:
        backbone(x)
    monkeypatch.setattr("mamba2_apps.mixer.resolve_backend", lambda *_: "triton")
    monkeypatch.setattr("mamba2_apps.mixer.why_not_served", lambda *_: None)
    monkeypatch.setattr("mamba2_apps.mixer.mamba2_block", fail)
    with torch.no_grad():
        with counted_flops(backbone) as counts:
            backbone(x)
        assert counts == recorded
        with pytest.raises(AssertionError, match="called"):
            backbone(x)


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


def test_padding_is_no_base_and_no_second():
    dna, audio = DNAPreprocessing(), AudioPreprocessing(sample_rate=16000)
    bases = dna.collate([{"inputs": dna.tokens.encode(s)} for s in ("ACGT", "ACGTACG")])
    assert dna.units(bases) == {"bases": 11}
    clips = audio.collate([{"inputs": torch.ones(16000)}, {"inputs": torch.ones(8000)}])
    assert audio.units(clips) == {"audio_seconds": 1.5}
    kmers = DNAPreprocessing(tokenizer={"kind": "kmer", "k": 3})
    assert kmers.units(kmers.collate([{"inputs": kmers.tokens.encode("ACGTAC")}])).keys() == {
        "tokens"
    }


def test_domains_in_turns_have_an_arithmetic_each():
    speed, trainer = Throughput(bf16=False), mock.Mock(num_training_batches=9, global_step=1)
    module = mock.Mock(model=nn.Linear(4, 4))
    trainer.datamodule.units = lambda batch: {"samples": len(batch["inputs"])}
    speed.on_train_start(trainer, module)
    for part, length in (("a", 10), ("b", 3), ("a", 5)):
        batch = {"inputs": torch.randn(2, length, 4), "part": part}
        speed.on_train_batch_start(trainer, module, batch, 0)
        module.model(batch["inputs"])
        speed.on_before_backward(trainer, module, torch.zeros(()))
        speed.on_train_batch_end(trainer, module, None, batch, 0)
    assert speed.flops_per_sample == {"a": 3 * 2 * 10 * 16, "b": 3 * 2 * 3 * 16}


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
