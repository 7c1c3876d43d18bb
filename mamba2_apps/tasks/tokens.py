"""Answers for each token: bases of a gene, frames of a recording.

Dimensions: batch b · seqlen l (tokens) · classes k
"""

from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryF1Score,
    BinaryPrecisionRecallCurve,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.utilities import dim_zero_cat

from mamba2_apps import reports
from mamba2_apps.tasks.base import OptimizerConfig, Task
from mamba2_apps.tasks.classification import AnyLabels, class_weight_tensor

IGNORE = -100
"""Class index of a token that has no label, padding included."""


class TokenClassification(Task):
    """One of k classes for each token, by cross-entropy over the tokens that have a label.

    Args:
        model: (inputs, mask) -> logits (b, l, k).
        labels: the k class names.
        optimizer: how weights are updated.
        class_weights: weight of each class in the loss, in the order of the labels; null: none.

    Targets are (b, l) int64, -100 where there is no label.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        labels: list[str],
        optimizer: OptimizerConfig,
        *,
        class_weights: list[float] | None = None,
    ) -> None:
        if len(labels) < 2:
            raise ValueError(f"the data has the labels {labels}; classification needs two or more")
        super().__init__(model, labels, optimizer)
        weight = class_weight_tensor(class_weights, labels)
        self.register_buffer("class_weight", weight, persistent=False)

    def build_metrics(self, part: str) -> dict[str, Metric]:
        k = len(self.labels)
        options: dict[str, Any] = {"ignore_index": IGNORE, "validate_args": False}
        metrics: dict[str, Metric] = {"accuracy": MulticlassAccuracy(k, average="micro", **options)}
        if part != "train":
            metrics["macro_f1"] = MulticlassF1Score(k, average="macro", **options)
            metrics["mcc"] = MulticlassMatthewsCorrCoef(k, **options)
        if part == "test":
            metrics["confusion"] = MulticlassConfusionMatrix(k, **options)
        return metrics

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        weight = self.class_weight if self.training else None
        losses = F.cross_entropy(
            outputs.float().flatten(0, 1),
            batch["targets"].flatten(),
            weight=weight,
            ignore_index=IGNORE,
            reduction="sum",
        )
        return losses / self.loss_weight(batch).clamp(min=1)

    def loss_weight(self, batch: dict[str, Any]) -> Tensor:
        return (batch["targets"] != IGNORE).sum()

    def update_metrics(
        self, metrics: MetricCollection, outputs: Tensor, batch: dict[str, Any]
    ) -> None:
        metrics.update(outputs.argmax(-1).flatten(), batch["targets"].flatten())

    def predictions(self, outputs: Tensor, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Segments of equal class: "start" and "end" in tokens, half-open, "label", "probability".

        The probability is the mean over the segment.
        """
        mask = self.token_mask(outputs, batch)
        return [
            {"segments": segments_of(row[kept].float().softmax(-1), self.labels)}
            for row, kept in zip(outputs, mask, strict=True)
        ]

    def report(self, folder: Path) -> None:
        confusion = self.test_scores.metrics["confusion"].compute().cpu().numpy()
        reports.confusion_matrix(confusion, self.labels, folder / "confusion.png")
        reports.class_table(confusion, self.labels, folder / "classes.csv")


class OfBothValues(BinaryPrecisionRecallCurve):
    """Mixed into a score of a curve: NaN, as `LabelMean`'s, where all targets are 0 or all are 1.

    torchmetrics would give 0 or 1 there, which says nothing of the model. It also looks at all
    tokens once for each threshold; here they are sorted into bins, and the counts are the same.
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add probabilities (n,) float and whether the label is present, (n,) 0, 1 or IGNORE."""
        known = target != IGNORE
        preds, target = preds[known], target[known]
        if self.thresholds is None:
            super().update(preds, target)
            return
        bins = len(self.thresholds) + 1
        reached = torch.searchsorted(self.thresholds, preds.to(self.thresholds.dtype), right=True)
        counts = torch.bincount(reached + bins * target, minlength=2 * bins).view(2, bins)
        below = counts.cumsum(1)[:, :-1].T  # (thresholds, 2): targets 0 and 1
        self.confmat += torch.stack([below, counts.sum(1) - below], dim=-1)

    def compute(self) -> Any:
        if self.thresholds is None:
            present = dim_zero_cat(self.target) == 1
            counts = torch.stack([(~present).sum(), present.sum()])
        else:
            counts = self.confmat[0].sum(1)  # of targets 0 and 1, the same for every threshold
        return super().compute() if counts.all() else torch.full((), torch.nan, device=self.device)


class AveragePrecision(OfBothValues, BinaryAveragePrecision):
    """Average precision of tokens that have a label."""


class AUROC(OfBothValues, BinaryAUROC):
    """Area under the receiver operating characteristic of tokens that have a label."""


class TokenMultiLabel(AnyLabels):
    """Any number of k labels for each token, each by a binary cross-entropy.

    The model gives logits (b, l, k). Targets are (b, l, k) float, 1 present, 0 absent, NaN where
    there is no label.

    Args:
        model, labels, optimizer, positive_weight, threshold: as in `AnyLabels`.
        label_weights: how much labels count in the loss, by name, 1 where they have none; of
            validation and test too. A label of few tokens costs little otherwise, and is learned
            last.
    """

    label_weight: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        labels: list[str],
        optimizer: OptimizerConfig,
        *,
        positive_weight: float = 1.0,
        threshold: float = 0.5,
        label_weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__(
            model, labels, optimizer, positive_weight=positive_weight, threshold=threshold
        )
        weight = label_weight_tensor(label_weights, labels)
        self.register_buffer("label_weight", weight, persistent=False)

    def build_metrics(self, part: str) -> dict[str, Metric]:
        options: dict[str, Any] = {"ignore_index": IGNORE, "validate_args": False}
        metrics: dict[str, Metric] = {"f1": BinaryF1Score(threshold=self.threshold, **options)}
        if part == "test":  # exact: every score is kept
            metrics["average_precision"] = AveragePrecision()
            metrics["auroc"] = AUROC()
        elif part == "val":
            metrics["average_precision"] = AveragePrecision(thresholds=1000)
            metrics["auroc"] = AUROC(thresholds=1000)
        return metrics

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        known = ~batch["targets"].isnan()
        losses = F.binary_cross_entropy_with_logits(
            outputs.float(),
            batch["targets"].nan_to_num(),
            weight=known.float() if self.label_weight is None else known * self.label_weight,
            pos_weight=self.positive_weight if self.training else None,
            reduction="sum",
        )
        return losses / known.sum().clamp(min=1)

    def loss_weight(self, batch: dict[str, Any]) -> Tensor:
        return (~batch["targets"].isnan()).sum()

    def update_metrics(
        self, metrics: MetricCollection, outputs: Tensor, batch: dict[str, Any]
    ) -> None:
        metrics.update(outputs.float().sigmoid().flatten(), present_labels(batch["targets"]))

    def predictions(self, outputs: Tensor, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Segments where a label is present: "start" and "end" in tokens, half-open, "label"."""
        mask, answers = self.token_mask(outputs, batch), []
        for row, kept in zip(outputs, mask, strict=True):
            scores, segments = row[kept].float().sigmoid(), []
            for column, label in enumerate(self.labels):
                present = torch.stack([1 - scores[:, column], scores[:, column]], -1)
                names: list[Any] = [None, label]
                found = segments_of(present, names, threshold=self.threshold)
                segments += [segment for segment in found if segment["label"] is not None]
            answers.append({"segments": sorted(segments, key=lambda s: (s["start"], s["label"]))})
        return answers


def present_labels(targets: Tensor) -> Tensor:
    """Whether each label is present, (b l k,) int64: 0, 1, or IGNORE where that is not known.

    The unknown ones are not taken out here: how many are left, only the device knows.
    """
    return (targets >= 0.5).long().masked_fill(targets.isnan(), IGNORE).flatten()


def label_weight_tensor(weights: dict[str, float] | None, labels: list[str]) -> Tensor | None:
    """Weights in the order of the labels, with mean 1; raises ValueError for other names."""
    if weights is None:
        return None
    if unknown := sorted(set(weights) - set(labels)):
        raise ValueError(
            f"task.label_weights names {', '.join(unknown)}, expected some of {', '.join(labels)}"
        )
    weight = torch.tensor([weights.get(label, 1.0) for label in labels])
    if not (weight > 0).all():
        raise ValueError(f"task.label_weights are {weights}, expected to be above 0")
    return weight / weight.mean()


def segments_of(
    probabilities: Tensor, labels: list[Any], *, threshold: float | None = None
) -> list[dict[str, Any]]:
    """Runs of tokens of one class.

    Args:
        probabilities: (l, k).
        labels: the k names.
        threshold: of two classes, the probability from which the second is taken; None: the
            likeliest class.

    Returns:
        Dicts of "start", "end" (tokens, half-open), "label" and its mean "probability".
    """
    if threshold is None:
        classes = probabilities.argmax(-1)
    else:
        classes = (probabilities[:, 1] >= threshold).long()
    chosen = probabilities.gather(1, classes[:, None])[:, 0].tolist()
    segments, start = [], 0
    for index, run in groupby(classes.tolist()):
        end = start + len(list(run))
        mean = sum(chosen[start:end]) / (end - start)
        segments.append({"start": start, "end": end, "label": labels[index], "probability": mean})
        start = end
    return segments
