"""Tasks: losses, metrics, optimizer groups, schedule and embeddings."""

import numpy as np
import pytest
import torch
from lightning import Trainer
from sklearn.metrics import average_precision_score, matthews_corrcoef, roc_auc_score
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

from mamba2_apps import reports
from mamba2_apps.backbone import BackboneConfig
from mamba2_apps.heads import CTCHead, PooledHead, TokenHead, TrackHead
from mamba2_apps.tasks import (
    CTC,
    Classification,
    MaskedReconstruction,
    MultiLabel,
    NextToken,
    OptimizerConfig,
    Regression,
    SequenceModel,
    TokenClassification,
    TokenMultiLabel,
    TrackRegression,
)
from mamba2_apps.tasks.classification import balanced_weights
from mamba2_apps.tasks.pretraining import hidden_tokens
from mamba2_apps.tasks.tokens import AUROC, AveragePrecision

SCORES = {"auroc": roc_auc_score, "average_precision": average_precision_score}
LABELS = ["a", "b", "c"]


class Tokens(nn.Module):
    """The least an adapter can be: a projection of (b, l, 5), the mask passed on."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.proj = nn.Linear(5, d_model)

    def forward(self, inputs, mask=None):
        return self.proj(inputs), mask


def model(head=PooledHead) -> SequenceModel:
    torch.manual_seed(0)
    config = BackboneConfig(16, 2, d_state=8, headdim=8, bidirectional=True)
    return SequenceModel(3, adapter=Tokens, backbone=config, head=head)


def task(**options) -> Classification:
    return Classification(model(), LABELS, OptimizerConfig(**options))


def batch(size: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "inputs": torch.randn(size, 7, 5, generator=generator),
        "targets": torch.arange(size) % 3,
    }


def fit(task: Classification, batches: list[dict], **options) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    loader = DataLoader(batches, batch_size=None)
    trainer.fit(task, loader, loader)
    return trainer


def test_padding_changes_neither_answers_nor_embeddings():
    network = model().eval()
    inputs = batch(2)["inputs"]
    padded = torch.cat([inputs, torch.full((2, 3, 5), torch.nan)], 1)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[:, 7:] = False
    for call in (network, network.embed):
        torch.testing.assert_close(call(padded, mask), call(inputs), atol=1e-5, rtol=1e-5)
    assert network.embed(inputs).shape == (2, 16)


def test_embeddings_pool_as_the_head_does_else_by_the_mean():
    inputs = batch(2)["inputs"]
    for head, expected in (
        (lambda d, k: PooledHead(d, k, pool="last"), lambda h: h[:, -1]),
        (TokenHead, lambda h: h.mean(1)),
    ):
        network = model(head).eval()
        torch.testing.assert_close(network.embed(inputs), expected(network.features(inputs)[0]))


def test_a_model_without_embed_is_named():
    bare = Classification(nn.Flatten(), LABELS, OptimizerConfig())
    with pytest.raises(ValueError, match="Flatten has no embed"):
        bare.embed(batch())


def test_smoothing_is_for_training_only():
    smooth = Classification(model(), LABELS, OptimizerConfig(), label_smoothing=0.3)
    logits, data = torch.randn(6, 3), batch()
    plain = nn.functional.cross_entropy(logits, data["targets"])
    assert smooth.train().loss(logits, data) != plain
    assert smooth.eval().loss(logits, data) == plain


def test_predictions_are_probabilities_by_label():
    (answer,) = task().predictions(torch.tensor([[0.0, 2.0, 1.0]]), {})
    assert answer["label"] == "b"
    assert list(answer["probabilities"]) == LABELS
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert answer["probability"] == answer["probabilities"]["b"]


def test_epoch_metrics_are_those_of_all_samples_whatever_the_batches():
    whole, parts = batch(7), []
    for start, end in ((0, 4), (4, 7)):
        parts.append({name: value[start:end] for name, value in whole.items()})
    one = task().eval()
    values = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    ).test(one, DataLoader(parts, batch_size=None), verbose=False)[0]
    with torch.no_grad():
        logits = one(whole)
    right = (logits.argmax(-1) == whole["targets"]).float().mean()
    assert values["test/accuracy"] == pytest.approx(right.item())
    assert values["test/loss"] == pytest.approx(one.loss(logits, whole).item(), rel=1e-5)
    assert {"test/macro_f1", "test/calibration_error"} < values.keys()
    assert one.test_scores.metrics["confusion"].compute().sum() == 7


def test_classes_against_all_others_are_scored_as_scikit_learn_does():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 3, generator=generator)
    targets = torch.randint(2, (60,), generator=generator)  # the third class is never there
    one = task()
    for rows in torch.arange(60).split(25):
        one.score(one.test_scores, logits[rows], {"inputs": logits[rows], "targets": targets[rows]})
    chances = logits.softmax(-1).numpy()
    found = {name: one.test_scores.metrics[name].compute().item() for name in SCORES}
    for name, score in SCORES.items():
        expected = np.mean([score(targets == index, chances[:, index]) for index in (0, 1)])
        assert found[name] == pytest.approx(expected, abs=1e-6), name
    mcc = one.test_scores.metrics["mcc"].compute().item()
    assert mcc == pytest.approx(matthews_corrcoef(targets, chances.argmax(1)), abs=1e-6)


def test_calibration_takes_no_logits_for_probabilities():
    one, data = task(), batch()
    one.score(one.test_scores, torch.full((6, 3), 0.9), data)
    error = one.test_scores.metrics["calibration_error"].compute()
    assert error.item() == pytest.approx(0, abs=1e-6)  # a third is sure, a third is right


def test_the_model_learns():
    one = task(lr=1e-2, warmup_epochs=2)
    start = one.loss(one(batch()), batch()).item()
    trainer = fit(one, [batch()], max_epochs=30)
    assert one.loss(one(batch()), batch()).item() < 0.5 * start
    assert trainer.callback_metrics["train/accuracy"] == 1


def test_rates_rise_linearly_then_follow_a_cosine():
    rates = []

    class Watched(Classification):
        def training_step(self, batch, batch_idx):
            rates.append(self.optimizers().param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

    config = OptimizerConfig(lr=1.0, warmup_epochs=1, min_lr_ratio=0.1)
    fit(Watched(model(), LABELS, config), [batch()] * 4, max_epochs=4)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[10] == pytest.approx(0.55)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0.1 <= rates[-1] < 0.13


def test_every_parameter_is_in_one_group_and_the_exempt_have_no_decay():
    one = task(weight_decay=0.3, warmup_epochs=0)
    trainer = fit(one, [batch()], max_epochs=1)
    decayed = {}
    for group in trainer.optimizers[0].param_groups:
        decayed |= {id(parameter): group["weight_decay"] for parameter in group["params"]}
    named = dict(one.model.named_parameters())
    assert decayed.keys() == {id(parameter) for parameter in named.values()}
    for name, parameter in named.items():
        exempt = name.endswith(("A_log", "dt_bias", ".D", "bias")) or "norm" in name
        assert decayed[id(parameter)] == (0 if exempt else 0.3), name


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lr": 0}, "optimizer.lr"),
        ({"warmup_epochs": -1}, "warmup"),
        ({"min_lr_ratio": 2}, "min_lr"),
    ],
)
def test_impossible_optimizer_values_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        OptimizerConfig(**options)


def test_a_warm_up_as_long_as_training_is_named():
    with pytest.raises(ValueError, match=r"warmup_epochs is 3.*less than trainer\.max_epochs, 2"):
        fit(task(warmup_epochs=3), [batch()], max_epochs=2)


def test_one_class_is_not_classification():
    with pytest.raises(ValueError, match=r"labels \['a'\].*two or more"):
        Classification(model(), ["a"], OptimizerConfig())


def test_the_comparison_shows_metrics_that_all_models_have():
    table = reports.comparison_table(
        {"loss": 0.1, "accuracy": 0.99}, {"baseline": {"accuracy": 0.5}}
    ).splitlines()
    assert table[0].split() == ["accuracy"]
    assert [line.split()[-1] for line in table[1:]] == ["0.9900", "0.5000"]


NAN, OPTIMIZER = float("nan"), OptimizerConfig(lr=1e-2, warmup_epochs=0)


def padded_batch(**extra) -> dict[str, torch.Tensor]:
    """Two rows of 7 tokens, of which the second has 4."""
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    return {"inputs": batch(2)["inputs"], "mask": mask, **extra}


def test_class_weights_follow_the_data_or_the_recipe():
    weights = balanced_weights(torch.tensor([0, 0, 0, 2]), 3)
    torch.testing.assert_close(weights, torch.tensor([4 / 6, 0, 2.0]))
    one = Classification(model(), LABELS, OPTIMIZER, class_weights=[1, 2, 3])
    logits, data = torch.randn(6, 3), batch()
    weighted = nn.functional.cross_entropy(logits, data["targets"], torch.tensor([1.0, 2, 3]))
    torch.testing.assert_close(one.train().loss(logits, data), weighted)
    one = Classification(model(), LABELS, OPTIMIZER, class_weights=[0, 1, 1]).train()
    assert one.loss(logits, data | {"targets": torch.zeros(6, dtype=torch.int64)}) == 0
    with pytest.raises(ValueError, match=r"class_weights is \[1\].*for each of \['a', 'b', 'c'\]"):
        Classification(model(), LABELS, OPTIMIZER, class_weights=[1])


def test_mixed_samples_have_probabilities_as_targets():
    one, data = task(), batch(2)
    data["targets"] = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.1, 0.9]])
    logits = torch.randn(2, 3)
    expected = -(data["targets"] * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(one.score(one.train_scores, logits, data), expected)
    assert one.train_scores.metrics["accuracy"].compute() == (
        (logits.argmax(-1) == torch.tensor([0, 2])).float().mean()
    )


def test_several_labels_are_present_from_the_threshold_on():
    one = MultiLabel(model(), LABELS, OPTIMIZER, threshold=0.6)
    logits = torch.tensor([[2.0, 0.3, -1.0]])
    (answer,) = one.predictions(logits, {})
    assert answer["labels"] == ["a"]
    assert answer["probabilities"]["b"] == pytest.approx(0.574443, abs=1e-5)
    fit(one, [{**batch(), "targets": torch.eye(3).repeat(2, 1)}], max_epochs=1)


def test_tokens_without_a_label_count_nowhere():
    one = TokenClassification(model(TokenHead), LABELS, OPTIMIZER)
    targets = torch.tensor([[0, 1, 2, -100, 0, 1, 2], [2, 1, 0, 0, -100, -100, -100]])
    data = padded_batch(targets=targets)
    logits = one(data)
    known = targets != -100
    expected = nn.functional.cross_entropy(logits[known], targets[known])
    torch.testing.assert_close(one.score(one.val_scores, logits, data), expected)
    right = (logits.argmax(-1) == targets)[known].float().mean()
    values = one.val_scores.compute()
    assert values["val/accuracy"] == pytest.approx(right.item())
    assert values["val/loss"] == pytest.approx(expected.item())
    changed = {**data, "inputs": data["inputs"].clone()}
    changed["inputs"][1, 4:] = NAN
    torch.testing.assert_close(one.loss(one(changed), changed), expected)


def test_segments_are_runs_of_one_class_within_the_data():
    one = TokenClassification(model(TokenHead), LABELS, OPTIMIZER)
    classes = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [2, 2, 2, 1, 0, 0, 0]])
    logits = 20.0 * nn.functional.one_hot(classes, 3)
    first, second = (a["segments"] for a in one.predictions(logits, padded_batch()))
    assert [(s["start"], s["end"], s["label"]) for s in first] == [
        (0, 2, "a"), (2, 5, "b"), (5, 7, "a"),
    ]  # fmt: skip
    assert [(s["start"], s["end"], s["label"]) for s in second] == [(0, 3, "c"), (3, 4, "b")]
    assert first[0]["probability"] == pytest.approx(1)


def test_labels_of_tokens_overlap_and_may_be_unknown():
    one = TokenMultiLabel(model(TokenHead), LABELS, OPTIMIZER)
    targets = torch.randint(2, (2, 7, 3)).float()
    targets[1, 4:], targets[0, 2, 1] = NAN, NAN
    data = padded_batch(targets=targets)
    logits = torch.randn(2, 7, 3)
    known = ~targets.isnan()
    expected = nn.functional.binary_cross_entropy_with_logits(logits[known], targets[known])
    torch.testing.assert_close(one.score(one.test_scores, logits, data), expected)
    assert {"test/f1", "test/average_precision"} < one.test_scores.compute().keys()
    answer = one.predictions(torch.full((2, 7, 3), 3.0), padded_batch())[1]
    assert [(s["start"], s["end"], s["label"]) for s in answer["segments"]] == [
        (0, 4, "a"), (0, 4, "b"), (0, 4, "c"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs"), [(AUROC, BinaryAUROC), (AveragePrecision, BinaryAveragePrecision)]
)
def test_scores_at_thresholds_count_as_torchmetrics_does(ours, theirs):
    chances = torch.rand(300)
    chances[::7] = torch.linspace(0, 1, 21)[torch.randint(21, (43,))]  # thresholds themselves
    present = (torch.rand(300) < chances).long()
    scores = ours(thresholds=21), theirs(thresholds=21)
    for score in scores:
        for part in (slice(100), slice(100, None)):
            score.update(chances[part], present[part])
    assert torch.equal(scores[0].confmat, scores[1].confmat)
    assert torch.equal(scores[0].compute(), scores[1].compute())


def test_labels_of_tokens_count_as_their_weights_say():
    targets, logits = torch.randint(2, (2, 7, 3)).float(), torch.randn(2, 7, 3)
    one = TokenMultiLabel(model(TokenHead), LABELS, OPTIMIZER, label_weights={"b": 4.0})
    losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    expected = (losses * torch.tensor([0.5, 2.0, 0.5])).mean()
    torch.testing.assert_close(one.loss(logits, {"targets": targets}), expected)
    for weights in ({"x": 2.0}, {"a": 0.0}):
        with pytest.raises(ValueError, match=r"task\.label_weights"):
            TokenMultiLabel(model(TokenHead), LABELS, OPTIMIZER, label_weights=weights)


@pytest.mark.parametrize("name", ["mse", "huber", "poisson"])
def test_unknown_values_count_nowhere(name):
    one = Regression(model(), LABELS, OPTIMIZER, loss_name=name)
    targets = torch.tensor([[1.0, NAN, 2.0], [NAN, 0.0, 4.0]])
    outputs = torch.randn(2, 3, requires_grad=True)
    loss = one.score(one.val_scores, outputs, {**batch(2), "targets": targets})
    loss.backward()
    assert loss.isfinite()
    assert outputs.grad[targets.isnan()].tolist() == [0, 0]
    assert outputs.grad[~targets.isnan()].abs().min() > 0
    values = one.values(outputs)[~targets.isnan()]
    error = (values - targets[~targets.isnan()]).abs().mean()
    assert one.val_scores.compute()["val/mae"] == pytest.approx(error.item(), rel=1e-5)


def test_a_track_has_a_value_for_each_bin_with_data():
    head = lambda d, k: TrackHead(d, k, bin_size=3)  # noqa: E731
    one = TrackRegression(model(head), LABELS, OPTIMIZER)
    data = padded_batch()
    first, second = (a["values"] for a in one.predictions(one(data), data))
    assert [len(first[name]) for name in LABELS] == [3, 3, 3]
    assert [len(second[name]) for name in LABELS] == [2, 2, 2]


def test_text_needs_no_lengths():
    one = CTC(model(CTCHead), LABELS, OPTIMIZER)
    targets = torch.tensor([[0, 1, 2], [2, -100, -100]])
    data = padded_batch(targets=targets)
    scores = one(data)
    expected = nn.functional.ctc_loss(
        scores.transpose(0, 1), torch.tensor([1, 2, 3, 3]), (7, 4), (3, 1)
    )
    torch.testing.assert_close(one.loss(scores, data), expected)
    path = torch.tensor([[1, 1, 0, 1, 2, 2, 0], [0, 3, 3, 3, 0, 0, 0]])
    sure = nn.functional.one_hot(path, 4).float().log()
    assert one.predictions(sure, data) == [{"text": "aab"}, {"text": "c"}]
    one.update_metrics(one.val_scores.metrics, sure, data)
    assert one.val_scores.metrics.compute()["cer"] == pytest.approx(2 / 4)


class Ids(nn.Module):
    """An adapter over ids 0 to 4 that hides tokens, and gives ids or values back."""

    target_size, discrete_targets = 5, True

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.table = nn.Embedding(6, d_model)

    def forward(self, inputs, mask=None, hide=None):
        return self.table(inputs if hide is None else inputs.masked_fill(hide, 5)), mask

    def targets(self, inputs, mask):
        return inputs


def id_model(bidirectional: bool) -> SequenceModel:
    torch.manual_seed(0)
    config = BackboneConfig(16, 2, d_state=8, headdim=8, bidirectional=bidirectional)
    return SequenceModel(0, adapter=Ids, backbone=config, head=TokenHead)


def ids() -> dict[str, torch.Tensor]:
    inputs = torch.arange(40).reshape(2, 20) % 5
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :6] = False
    return {"inputs": inputs, "mask": mask}


def test_hidden_tokens_are_a_part_of_the_data_in_spans():
    data = torch.ones(3, 100, dtype=torch.bool)
    data[1, 40:], data[2, 1:] = False, False
    hide = hidden_tokens(data, 0.3, 1)
    assert hide.sum(1).tolist() == [30, 12, 1]
    assert not (hide & ~data).any()
    spans = hidden_tokens(data[:1], 0.3, 10)[0].reshape(10, 10)
    assert spans.sum(1).sort().values.tolist() == [0] * 7 + [10] * 3
    one, two = (hidden_tokens(data, 0.3, 1, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one, two)


def test_masked_reconstruction_scores_the_hidden_tokens_only():
    one = MaskedReconstruction(id_model(True), [], OPTIMIZER, mask_ratio=0.3)
    data = one.prepare(ids(), 0, "val")
    hide = data["hide"]
    assert hide.sum(1).tolist() == [6, 4]
    outputs = one(data)
    expected = nn.functional.cross_entropy(outputs[hide], data["targets"][hide])
    torch.testing.assert_close(one.score(one.val_scores, outputs, data), expected)
    assert one.val_scores.compute()["val/accuracy"] == (
        (outputs.argmax(-1) == data["targets"])[hide].float().mean()
    )
    secret = {**data, "inputs": data["inputs"].masked_fill(hide, 0)}
    torch.testing.assert_close(one(secret), outputs)
    trainer = fit(one, [ids()], max_epochs=60)
    assert trainer.callback_metrics["train/accuracy"] > 0.6  # chance is 0.2


def test_the_next_token_weighs_tokens_and_pairs_within_the_data():
    one = NextToken(id_model(False), [], OPTIMIZER)
    weights = torch.ones(2, 20)
    weights[0, 10:] = 0.1
    data = one.prepare({**ids(), "weights": weights}, 0, "val")
    outputs = one(data)
    losses = nn.functional.cross_entropy(
        outputs[:, :-1].mT, data["targets"][:, 1:], reduction="none"
    )
    w = (weights * data["mask"])[:, 1:].clone()
    w[1, 5] = 0  # the first base after the padding has none before it
    torch.testing.assert_close(one.loss(outputs, data), (losses * w).sum() / w.sum())
    answers = one.predictions(one(ids()), ids())
    assert [answer["tokens"] for answer in answers] == [19, 13]


def test_an_objective_that_sees_the_answer_is_refused():
    with pytest.raises(ValueError, match="already seen by a bidirectional"):
        NextToken(id_model(True), [], OPTIMIZER)
    with pytest.raises(ValueError, match="no adapter with targets"):
        MaskedReconstruction(model(), LABELS, OPTIMIZER)
