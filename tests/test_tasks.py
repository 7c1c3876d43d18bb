"""Tasks: losses, metrics, optimizer groups, schedule and embeddings."""

import pytest
import torch
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from mamba2_apps import reports
from mamba2_apps.backbone import BackboneConfig
from mamba2_apps.heads import PooledHead, TokenHead
from mamba2_apps.tasks import Classification, OptimizerConfig, SequenceModel

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
    (answer,) = task().predictions(torch.tensor([[0.0, 2.0, 1.0]]))
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
