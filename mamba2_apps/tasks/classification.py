"""Answers for a whole input: one label, or any number of them.

Dimensions: batch b · classes k
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MultilabelF1Score,
)
from torchmetrics.functional.classification import binary_auroc, binary_average_precision
from torchmetrics.utilities import dim_zero_cat

from mamba2_apps import reports
from mamba2_apps.tasks.base import OptimizerConfig, Task


class Answers(Task):
    """A task that keeps the outputs of its last test, for the pictures of a domain."""

    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self._tested: list[Tensor] = []

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        batch = self.prepare(batch, batch_idx, "test")
        outputs = self(batch)
        self.score(self.test_scores, outputs, batch)
        self._tested.append(outputs.detach().float().cpu())

    def test_outputs(self) -> Tensor:
        """Outputs (n, k) float32 of the last test, in the order of the test set."""
        return torch.cat(self._tested)


class Classification(Answers):
    """One label per input, by cross-entropy.

    Args:
        model: (inputs, mask) -> logits (b, k).
        labels: the k class names.
        optimizer: how weights are updated.
        label_smoothing: probability shared by the other classes while training, 0 to 1.
        class_weights: weight of each class in the loss, in the order of the labels; "balanced":
            inversely to its share of the training data; null: none.

    Targets are class indices (b,) int64, or, from mixed samples, probabilities (b, k).
    """

    class_weight: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        labels: list[str],
        optimizer: OptimizerConfig,
        *,
        label_smoothing: float = 0.0,
        class_weights: list[float] | Literal["balanced"] | None = None,
    ) -> None:
        if len(labels) < 2:
            raise ValueError(f"the data has the labels {labels}; classification needs two or more")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"task.label_smoothing is {label_smoothing}, expected 0 to 1")
        super().__init__(model, labels, optimizer)
        self.label_smoothing = label_smoothing
        self.balanced = class_weights == "balanced"
        weight = class_weight_tensor(class_weights, labels)
        if self.balanced:
            # Filled by setup, but there from the start: a moving average of the weights copies the
            # task before that, and pairs its buffers with ours by their place.
            weight = torch.ones(len(labels))
        self.register_buffer("class_weight", weight, persistent=False)

    def setup(self, stage: str) -> None:
        if self.balanced and stage == "fit":
            classes = torch.as_tensor(self.trainer.datamodule.class_of_samples())  # type: ignore[attr-defined]
            self.class_weight = balanced_weights(classes, len(self.labels)).to(self.device)

    def build_metrics(self, part: str) -> dict[str, Metric]:
        classes = len(self.labels)
        # The loss has checked the targets; a second look would wait for the device in every step.
        unchecked: Any = {"validate_args": False}
        metrics: dict[str, Metric] = {
            "accuracy": MulticlassAccuracy(classes, average="micro", **unchecked),
            "macro_f1": MulticlassF1Score(classes, average="macro", **unchecked),
        }
        if part != "train":
            metrics["balanced_accuracy"] = MulticlassAccuracy(classes, average="macro", **unchecked)
            metrics["mcc"] = MulticlassMatthewsCorrCoef(classes, **unchecked)
        if part == "test":
            metrics["auroc"] = ClassMean(binary_auroc, classes)
            metrics["average_precision"] = ClassMean(binary_average_precision, classes)
            metrics["calibration_error"] = MulticlassCalibrationError(classes)
            metrics["confusion"] = MulticlassConfusionMatrix(classes)
        return metrics

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        smoothing, weight = (
            (self.label_smoothing, self.class_weight) if self.training else (0, None)
        )
        logits, targets = outputs.float(), batch["targets"]
        if weight is None or targets.is_floating_point():
            return F.cross_entropy(logits, targets, weight=weight, label_smoothing=smoothing)
        total = F.cross_entropy(
            logits, targets, weight=weight, label_smoothing=smoothing, reduction="sum"
        )
        return total / weight[targets].sum().clamp(min=1e-12)  # all may have weight 0

    def update_metrics(
        self, metrics: MetricCollection, outputs: Tensor, batch: dict[str, Any]
    ) -> None:
        targets = batch["targets"]
        # Calibration would take logits that happen to lie between 0 and 1 for probabilities.
        classes = targets.argmax(-1) if targets.is_floating_point() else targets
        metrics.update(outputs.float().softmax(-1), classes)

    def predictions(self, outputs: Tensor, batch: dict[str, Any]) -> list[dict[str, Any]]:
        rows = outputs.float().softmax(-1).tolist()
        return [self._prediction(dict(zip(self.labels, row, strict=True))) for row in rows]

    def report(self, folder: Path) -> None:
        confusion = self.test_scores.metrics["confusion"].compute().cpu().numpy()
        reports.confusion_matrix(confusion, self.labels, folder / "confusion.png")
        reports.class_table(confusion, self.labels, folder / "classes.csv")

    @staticmethod
    def _prediction(probabilities: dict[str, float]) -> dict[str, Any]:
        label = max(probabilities, key=probabilities.__getitem__)
        return {
            "label": label,
            "probability": probabilities[label],
            "probabilities": probabilities,
        }


class AnyLabels(Task):
    """A task whose labels are present or absent each for itself.

    Args:
        model: (inputs, mask) -> logits (…, k).
        labels: the k names.
        optimizer: how weights are updated.
        positive_weight: weight of a present label in the loss against an absent one.
        threshold: probability from which a label counts as present.
    """

    positive_weight: Tensor

    def __init__(
        self,
        model: nn.Module,
        labels: list[str],
        optimizer: OptimizerConfig,
        *,
        positive_weight: float = 1.0,
        threshold: float = 0.5,
    ) -> None:
        if not labels:
            raise ValueError("the data has no labels; expected one that is present somewhere")
        if not 0 < threshold < 1:
            raise ValueError(f"task.threshold is {threshold}, expected between 0 and 1")
        self.threshold = threshold
        super().__init__(model, labels, optimizer)
        self.register_buffer("positive_weight", torch.tensor(positive_weight), persistent=False)


class LabelMean(Metric):
    """The mean of a score over the labels that some inputs have and others have not.

    No such score is defined for the other labels. NaN where all are of these.

    Args:
        score: (scores (n,), targets (n,) of 0 and 1) -> a scalar.
    """

    full_state_update = False
    preds: list[Tensor]
    target: list[Tensor]

    def __init__(self, score: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.score = score
        for name in ("preds", "target"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """preds (b, k) from 0 to 1; target (b, k) of 0 and 1."""
        self.preds.append(preds)
        self.target.append(target)

    def compute(self) -> Tensor:
        preds, target = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        found = [
            self.score(scores, truth)
            for scores, truth in zip(preds.unbind(1), self.columns(target), strict=True)
            if 0 < truth.sum() < len(truth)
        ]
        return torch.stack(found).mean() if found else preds.new_tensor(torch.nan)

    def columns(self, target: Tensor) -> Iterable[Tensor]:
        """Targets (n,) of 0 and 1 of each label."""
        return target.unbind(1)


class ClassMean(LabelMean):
    """The same over classes, each against all others; target (b,) holds their indices."""

    def __init__(self, score: Callable[[Tensor, Tensor], Tensor], classes: int) -> None:
        super().__init__(score)
        self.classes = classes

    def columns(self, target: Tensor) -> Iterable[Tensor]:
        return ((target == index).long() for index in range(self.classes))


class MultiLabel(AnyLabels, Answers):
    """Any number of labels per input, each by a binary cross-entropy.

    The model gives logits (b, k). Targets are (b, k) float, 1 where the label is present; values
    between are mixed samples.
    """

    def build_metrics(self, part: str) -> dict[str, Metric]:
        k = len(self.labels)
        if k < 2:
            raise ValueError(
                f"the data has the labels {self.labels}; any number of labels are of two or more, "
                "present or absent is a classification of two"
            )
        # Targets are 0 and 1 as `update_metrics` makes them; a look would wait for the device.
        f1 = MultilabelF1Score(k, threshold=self.threshold, validate_args=False)
        if part == "train":
            return {"f1": f1}
        return {
            "average_precision": LabelMean(binary_average_precision),
            "auroc": LabelMean(binary_auroc),
            "f1": f1,
        }

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        weight = self.positive_weight if self.training else None
        return F.binary_cross_entropy_with_logits(
            outputs.float(), batch["targets"], pos_weight=weight
        )

    def update_metrics(
        self, metrics: MetricCollection, outputs: Tensor, batch: dict[str, Any]
    ) -> None:
        metrics.update(outputs.sigmoid(), (batch["targets"] >= 0.5).long())

    def predictions(self, outputs: Tensor, batch: dict[str, Any]) -> list[dict[str, Any]]:
        answers = []
        for row in outputs.float().sigmoid().tolist():
            probabilities = dict(zip(self.labels, row, strict=True))
            present = [name for name, value in probabilities.items() if value >= self.threshold]
            answers.append({"labels": present, "probabilities": probabilities})
        return answers


def balanced_weights(classes: Tensor, k: int) -> Tensor:
    """Weights (k,) inverse to how often each class occurs, 1 on average over the samples.

    A class that does not occur has weight 0.
    """
    counts = torch.bincount(classes, minlength=k).double()
    present = counts > 0
    weights = torch.where(present, counts.sum() / (present.sum() * counts.clamp(min=1)), 0.0)
    return weights.float()


def class_weight_tensor(given: list[float] | str | None, labels: list[str]) -> Tensor | None:
    """The weights of a recipe as (k,) float32; None where it has none, or they follow the data.

    Raises ValueError unless there is a weight of at least 0 for each label.
    """
    if given is None or given == "balanced":
        return None
    if isinstance(given, str) or len(given) != len(labels) or min(given) < 0:
        raise ValueError(
            f"task.class_weights is {given!r}, expected 'balanced', null, or a weight of at "
            f"least 0 for each of {labels}"
        )
    return torch.tensor(given, dtype=torch.float32)
