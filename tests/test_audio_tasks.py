"""Metrics and answers: tags, events in seconds, text by a beam."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from mamba2_apps.audio.adapter import FrameTokens, PatchTokens
from mamba2_apps.audio.features import Features
from mamba2_apps.audio.tasks import (
    EventDetection,
    SegmentF1,
    Tagging,
    Transcription,
    d_prime,
)
from mamba2_apps.backbone import BackboneConfig
from mamba2_apps.heads import CTCHead, PooledHead, TokenHead, TrackHead
from mamba2_apps.tasks import LabelMean, OptimizerConfig, SequenceModel

FEATURES = partial(Features, 16000, num_mels=32)
ADAPTERS = {
    "frames": (partial(FrameTokens, features=FEATURES, channels=4), TokenHead),
    "patches": (partial(PatchTokens, features=FEATURES), partial(TrackHead, bin_size=2)),
}


def model(adapter, head, outputs=2):
    backbone = BackboneConfig(16, 1, d_state=8, headdim=16, bidirectional=True)
    return SequenceModel(outputs, adapter=adapter, backbone=backbone, head=head).eval()


def test_d_prime_is_that_of_the_area_under_the_curve():
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 2, (200, 3))
    scores = 1 / (1 + np.exp(-(targets + generator.standard_normal((200, 3)))))
    metric = LabelMean(d_prime)
    metric.update(torch.from_numpy(scores), torch.from_numpy(targets))
    areas = [roc_auc_score(targets[:, k], scores[:, k]) for k in range(3)]
    normal = torch.distributions.Normal(0, 1)
    expected = np.mean([math.sqrt(2) * normal.icdf(torch.tensor(a)).item() for a in areas])
    assert metric.compute().item() == pytest.approx(expected, rel=1e-4)
    perfect = LabelMean(d_prime)
    perfect.update(torch.from_numpy(targets).float(), torch.from_numpy(targets))
    assert torch.isfinite(perfect.compute())


def test_tagging_reports_mean_average_precision_and_equal_error_rate():
    task = Tagging(model(*ADAPTERS["frames"][:1], PooledHead, 3), list("abc"), OptimizerConfig())
    generator = np.random.default_rng(1)
    targets = generator.integers(0, 2, (100, 3))
    logits = torch.from_numpy(2.0 * targets + generator.standard_normal((100, 3)))
    metrics = task.test_scores.metrics
    task.update_metrics(metrics, logits, {"targets": torch.from_numpy(targets).float()})
    found = metrics.compute()
    expected = np.mean([average_precision_score(targets[:, k], logits[:, k]) for k in range(3)])
    assert found["average_precision"].item() == pytest.approx(expected, rel=1e-4)
    assert 0 < found["eer"] < 0.35
    assert found["d_prime"] > 1


def test_tags_that_no_clip_or_every_clip_has_change_no_mean():
    task = Tagging(model(*ADAPTERS["frames"][:1], PooledHead, 3), list("abc"), OptimizerConfig())
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(50, 3, generator=generator), torch.zeros(50, 3)
    targets[::2, 0] = 1
    targets[:, 2] = 1
    logits[::2, 0] += 1
    metrics = task.test_scores.metrics
    task.update_metrics(metrics, logits, {"targets": targets})
    found = metrics.compute()
    area = roc_auc_score(targets[:, 0], logits[:, 0])
    assert found["auroc"].item() == pytest.approx(area, rel=1e-5)
    assert found["d_prime"].item() == pytest.approx(
        math.sqrt(2) * torch.special.ndtri(torch.tensor(area)).item(), rel=1e-4
    )
    assert found["average_precision"].item() == pytest.approx(
        average_precision_score(targets[:, 0], logits[:, 0]), rel=1e-5
    )
    assert 0 < found["eer"] < 0.5
    metrics.reset()
    task.update_metrics(metrics, logits, {"targets": torch.zeros(50, 3)})
    assert metrics.compute()["auroc"].isnan()
    with pytest.raises(ValueError, match=r"has the labels \['a'\]; any number of labels"):
        Tagging(model(*ADAPTERS["frames"][:1], PooledHead, 1), ["a"], OptimizerConfig())


def test_segment_f1_counts_seconds():
    metric = SegmentF1(steps_per_segment=4)
    targets = torch.zeros(1, 10, 1)
    targets[0, 1] = 1  # the first second
    targets[0, 9] = 1  # the third, which is short
    present = torch.zeros(1, 10, 1, dtype=torch.bool)
    present[0, 3] = True  # in the first second, elsewhere in it
    present[0, 5] = True  # the second, wrong
    metric.update(present, targets)
    assert metric.compute().item() == pytest.approx(0.5)
    targets[0, 4:8] = torch.nan  # nobody knows the second one
    metric.reset()
    metric.update(present, targets)
    assert metric.compute().item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_events_are_trained_and_answered_where_they_are(kind):
    adapter, head = ADAPTERS[kind]
    task = EventDetection(model(adapter, head), ["knock", "bell"], OptimizerConfig())
    targets = torch.zeros(2, 100, 2)
    targets[0, 32:48, 0] = 1  # 0.32 to 0.48 s, whole patches
    targets[1, 60:] = torch.nan
    mask = torch.ones(2, 16000, dtype=torch.bool)
    mask[1, 9600:] = False
    batch = {"inputs": torch.randn(2, 16000), "mask": mask, "targets": targets}
    outputs = task(batch)
    stepped = task._stepped(batch, outputs.shape[1])["targets"]
    assert outputs.shape == stepped.shape
    assert stepped[1].isnan().any()
    # Outputs that are right give the loss 0, the events that were put in, and perfect scores.
    right = torch.where(stepped.nan_to_num() > 0.5, 20.0, -20.0)
    assert task.loss(right, batch).item() < 1e-6
    answers = task.predictions(right, batch)
    (event,) = answers[0]["events"]
    assert event["label"] == "knock"
    step = task.adapter.step_seconds
    assert abs(event["start"] - 0.32) < step
    assert abs(event["end"] - 0.48) < step
    assert event["probability"] > 0.99
    assert answers[1]["events"] == []
    metrics = task.test_scores.metrics
    task.update_metrics(metrics, right, batch)
    found = metrics.compute()
    assert found["segment_f1"] == found["f1"] == found["average_precision"] == 1
    task.loss(outputs, batch).backward()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_scores_of_frames_that_are_all_alike_are_undefined(value):
    """torchmetrics says 0 or 1 there, as if the model were very bad or very good."""
    task = EventDetection(model(*ADAPTERS["frames"]), ["a", "b"], OptimizerConfig())
    batch = {"inputs": torch.randn(2, 16000), "targets": torch.full((2, 100, 2), value)}
    with torch.inference_mode():
        outputs = task(batch)
        for scores in (task.val_scores, task.test_scores):
            task.score(scores, outputs, batch)
            found = scores.compute()
            undefined = {name.partition("/")[2] for name, score in found.items() if score.isnan()}
            eer = {"eer"} if scores.part == "test" else set()
            assert undefined == {"average_precision", "auroc"} | eer
            batch["targets"][0, :50] = 1 - value  # one of the two is enough
            task.score(scores, outputs, batch)
            assert all(score.isfinite() for score in scores.compute().values())
            batch["targets"][:] = value


def test_padding_of_a_batch_makes_no_events():
    task = EventDetection(model(*ADAPTERS["frames"]), ["a", "b"], OptimizerConfig(), threshold=0.1)
    short = torch.randn(5000)
    batch = {"inputs": torch.zeros(2, 16000), "mask": torch.zeros(2, 16000, dtype=torch.bool)}
    batch["inputs"][0, :5000], batch["mask"][0, :5000] = short, True
    batch["mask"][1] = True
    alone = {"inputs": short[None]}
    with torch.inference_mode():
        together = task.predictions(task(batch), batch)[0]
        assert len(together["events"]) > 0
        single = task.predictions(task(alone), alone)[0]
    assert together["events"] == [
        {**event, "probability": pytest.approx(event["probability"], rel=1e-4)}
        for event in single["events"]
    ]


def test_a_beam_joins_paths_that_the_greedy_reading_keeps_apart():
    pytest.importorskip("fast_ctc_decode")
    net = model(ADAPTERS["frames"][0], CTCHead)
    greedy = Transcription(net, ["é", "b"], OptimizerConfig())
    beam = Transcription(net, ["é", "b"], OptimizerConfig(), beam_size=8)
    # The blank is likeliest at each step, and yet "é" is likelier than no text: .64 against .36.
    outputs = torch.tensor([[[0.6, 0.4, 1e-9], [0.6, 0.4, 1e-9]]]).log()
    assert greedy.predictions(outputs, {}) == [{"text": ""}]
    assert beam.predictions(outputs, {}) == [{"text": "é"}]
    with pytest.raises(ValueError, match=r"task\.beam_size is 0"):
        Transcription(net, ["a"], OptimizerConfig(), beam_size=0)


def test_events_need_an_audio_model():
    with pytest.raises(ValueError, match="Linear has no audio adapter"):
        EventDetection(torch.nn.Linear(1, 1), ["a"], OptimizerConfig())
