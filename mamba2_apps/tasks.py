"""LightningModules: a model, a loss, metrics and an optimizer.

`SequenceModel` is adapter ∘ backbone ∘ head. A `Task` trains any module that maps (inputs, mask) to
outputs; a new kind of answer (tracks, tags, text) is a new subclass with its loss and metrics.

Dimensions: batch b · seqlen l · d_model d · classes k
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from lightning import LightningModule
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from mamba2_apps import reports
from mamba2_apps.adaptation import parameter_groups
from mamba2_apps.backbone import Backbone, BackboneConfig
from mamba2_apps.heads import pool_tokens


@dataclass(kw_only=True)
class OptimizerConfig:
    """How weights are updated: linear warm-up, then a cosine down to `min_lr_ratio` × `lr`.

    Args:
        name: any optimizer that timm knows.
        lr: peak learning rate.
        weight_decay: decay of matrices; A_log, dt_bias, D, norms, biases and embeddings have none.
        betas: decay rates of the running mean and of the running square of the gradient.
        warmup_epochs: epochs, fractions too, over which the rate rises from 0.
        min_lr_ratio: last rate as a fraction of `lr`.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_epochs: float = 1.0
    min_lr_ratio: float = 0.01

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr is {self.lr}, expected a positive number")
        if self.warmup_epochs < 0:
            raise ValueError(f"optimizer.warmup_epochs is {self.warmup_epochs}, expected >= 0")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optimizer.min_lr_ratio is {self.min_lr_ratio}, expected 0 to 1")


class SequenceModel(nn.Module):
    """adapter ∘ backbone ∘ head.

    Args:
        num_outputs: outputs of the head, such as classes.
        adapter: called with d_model, gives a module (inputs, mask) -> (embeddings (b, l, d), mask).
        backbone: sizes of the Mamba-2 backbone.
        head: called with d_model and num_outputs, gives a module (hidden (b, l, d), mask) ->
            outputs.
    """

    def __init__(
        self,
        num_outputs: int,
        *,
        adapter: Callable[[int], nn.Module],
        backbone: BackboneConfig,
        head: Callable[[int, int], nn.Module],
    ) -> None:
        super().__init__()
        self.adapter = adapter(backbone.d_model)
        self.backbone = Backbone(backbone)
        self.head = head(backbone.d_model, num_outputs)

    def features(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Hidden states (b, l, d) after the final norm, and their mask (b, l)."""
        embeddings, mask = self.adapter(inputs, mask)
        return self.backbone(embeddings, mask=mask), mask

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden, mask = self.features(inputs, mask)
        return self.head(hidden, mask)

    def embed(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """One vector (b, d) per input, pooled as the head pools, or the mean over its tokens."""
        hidden, mask = self.features(inputs, mask)
        return pool_tokens(hidden, mask, getattr(self.head, "pool", "mean"))


class Scores(nn.Module):
    """The mean loss and the metrics of one part of the data, "train", "val" or "test".

    Their states are part of the checkpoint: Lightning's own epoch averages are not, and would be
    wrong in an epoch that was interrupted.
    """

    def __init__(self, part: str, metrics: dict[str, Metric]) -> None:
        super().__init__()
        self.part = part
        self.loss = MeanMetric()
        self.metrics = MetricCollection(dict(metrics))
        self.loss.persistent(True)
        self.metrics.persistent(True)

    def reset(self) -> None:
        self.loss.reset()
        self.metrics.reset()

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name, such as "val/accuracy"."""
        values = {"loss": self.loss.compute(), **self.metrics.compute()}
        return {f"{self.part}/{name}": v for name, v in values.items() if v.dim() == 0}


class Task(LightningModule, ABC):
    """A model with its loss, metrics and optimizer.

    Args:
        model: (inputs, mask) -> outputs.
        labels: names of the outputs.
        optimizer: how weights are updated.
    """

    def __init__(self, model: nn.Module, labels: list[str], optimizer: OptimizerConfig) -> None:
        super().__init__()
        self.model = model
        self.labels = labels
        self.optimizer_config = optimizer
        self.train_scores = Scores("train", self.build_metrics("train"))
        self.val_scores = Scores("val", self.build_metrics("val"))
        self.test_scores = Scores("test", self.build_metrics("test"))

    @abstractmethod
    def build_metrics(self, part: str) -> dict[str, Metric]:
        """Metrics of (outputs, targets) for "train", "val" or "test"; scalars are logged."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        """Mean loss of a batch, a scalar."""

    @abstractmethod
    def predictions(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Answers for people and tables, one dict of JSON values per input."""

    def report(self, folder: Path) -> None:
        """Draw what the last test measured into a RUN."""

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.model(batch["inputs"], batch.get("mask"))

    def embed(self, batch: dict[str, Any]) -> Tensor:
        """One vector (b, d) per input. Raises ValueError where the model has none."""
        if not hasattr(self.model, "embed"):
            raise ValueError(f"{type(self.model).__name__} has no embed(inputs, mask) to ask")
        return self.model.embed(batch["inputs"], batch.get("mask"))  # type: ignore[operator]

    def on_train_epoch_start(self) -> None:
        self.train_scores.reset()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self._step(batch, self.train_scores)
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.train_scores.compute())

    def on_validation_epoch_start(self) -> None:
        self.val_scores.reset()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._step(batch, self.val_scores)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_scores.compute(), prog_bar=True)

    def on_test_epoch_start(self) -> None:
        self.test_scores.reset()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._step(batch, self.test_scores)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.test_scores.compute())

    def configure_optimizers(self) -> Any:
        config = self.optimizer_config
        optimizer = create_optimizer_v2(
            parameter_groups(self.model, config.weight_decay),
            opt=config.name,
            lr=config.lr,
            betas=config.betas,
        )
        epochs = self.trainer.max_epochs or 1
        if config.warmup_epochs >= epochs:
            raise ValueError(
                f"optimizer.warmup_epochs is {config.warmup_epochs}, expected less than "
                f"trainer.max_epochs, {epochs}"
            )
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(total * config.warmup_epochs / epochs)
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=total - warmup,
            lr_min=config.lr * config.min_lr_ratio,
            warmup_t=warmup,
            warmup_lr_init=config.lr / (warmup + 1),
            warmup_prefix=True,
            t_in_epochs=False,
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.trainer.global_step)

    def _step(self, batch: dict[str, Any], scores: Scores) -> Tensor:
        outputs = self(batch)
        loss = self.loss(outputs, batch)
        scores.loss.update(loss.detach(), weight=len(batch["inputs"]))
        scores.metrics.update(outputs.detach(), batch["targets"])
        return loss


class Classification(Task):
    """One label per input, by cross-entropy.

    Args:
        model: (inputs, mask) -> logits (b, k).
        labels: the k class names.
        optimizer: how weights are updated.
        label_smoothing: probability shared by the other classes while training, 0 to 1.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: list[str],
        optimizer: OptimizerConfig,
        *,
        label_smoothing: float = 0.0,
    ) -> None:
        if len(labels) < 2:
            raise ValueError(f"the data has the labels {labels}; classification needs two or more")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"task.label_smoothing is {label_smoothing}, expected 0 to 1")
        super().__init__(model, labels, optimizer)
        self.label_smoothing = label_smoothing

    def build_metrics(self, part: str) -> dict[str, Metric]:
        classes = len(self.labels)
        metrics: dict[str, Metric] = {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "macro_f1": MulticlassF1Score(classes, average="macro"),
        }
        if part == "test":
            metrics["calibration_error"] = MulticlassCalibrationError(classes)
            metrics["confusion"] = MulticlassConfusionMatrix(classes)
        return metrics

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(outputs.float(), batch["targets"], label_smoothing=smoothing)

    def predictions(self, outputs: Tensor) -> list[dict[str, Any]]:
        rows = outputs.float().softmax(-1).tolist()
        return [self._prediction(dict(zip(self.labels, row, strict=True))) for row in rows]

    def report(self, folder: Path) -> None:
        confusion = self.test_scores.metrics["confusion"].compute()
        reports.confusion_matrix(confusion.cpu().numpy(), self.labels, folder / "confusion.png")

    @staticmethod
    def _prediction(probabilities: dict[str, float]) -> dict[str, Any]:
        label = max(probabilities, key=probabilities.__getitem__)
        return {
            "label": label,
            "probability": probabilities[label],
            "probabilities": probabilities,
        }
