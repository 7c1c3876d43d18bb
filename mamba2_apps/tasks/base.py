"""What every task shares: the model, its optimizer, its scores.

`SequenceModel` is adapter ∘ backbone ∘ head. A `Task` trains any module that maps (inputs, mask) to
outputs; each kind of answer (classes, tags, tracks, text) is a subclass with its loss and metrics.

Dimensions: batch b · seqlen l (tokens) · d_model d · classes k
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection, SumMetric

from mamba2_apps.adaptation import parameter_groups
from mamba2_apps.backbone import Backbone, BackboneConfig
from mamba2_apps.data import DataModule
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
        fused: update all weights in one kernel, for torch's own optimizers on a GPU.
        layer_decay: each block learns at this times the rate of the block above it, the head at
            `lr`, the adapter slowest (Clark et al. 2020); null: all at `lr`.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_epochs: float = 1.0
    min_lr_ratio: float = 0.01
    fused: bool = False
    layer_decay: float | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr is {self.lr}, expected a positive number")
        if self.warmup_epochs < 0:
            raise ValueError(f"optimizer.warmup_epochs is {self.warmup_epochs}, expected >= 0")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optimizer.min_lr_ratio is {self.min_lr_ratio}, expected 0 to 1")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"optimizer.layer_decay is {self.layer_decay}, expected above 0 and up to 1, or "
                "null"
            )


class Schedule(CosineLRScheduler):
    """timm's schedule as a function of the step alone: what a checkpoint says of it is not used.

    A run that is resumed with another number of devices has another number of steps.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class SequenceModel(nn.Module):
    """adapter ∘ backbone ∘ head.

    Args:
        num_outputs: outputs of the head, such as classes; 0, for data without labels: as many as
            the adapter's tokens give back, its `target_size`.
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
        self.head = head(backbone.d_model, num_outputs or self.adapter.target_size)  # type: ignore[arg-type]

    def features(
        self, inputs: Tensor, mask: Tensor | None = None, hide: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states (b, l, d) after the final norm, and the mask (b, l) of their tokens.

        hide (b, l) bool: tokens whose content an adapter built with `maskable` replaces by its mask
        token.
        """
        options = {} if hide is None else {"hide": hide}
        embeddings, mask = self.adapter(inputs, mask, **options)
        return self.backbone(embeddings, mask=mask), mask

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, hide: Tensor | None = None
    ) -> Tensor:
        hidden, mask = self.features(inputs, mask, hide)
        return self.head(hidden, mask)

    def embed(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """One vector (b, d) per input, pooled as the head pools, or the mean over its tokens."""
        hidden, mask = self.features(inputs, mask)
        return pool_tokens(hidden, mask, getattr(self.head, "pool", "mean"))

    def token_mask(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Which tokens (b, l) hold data: `mask` itself unless the adapter joins several inputs."""
        if hasattr(self.adapter, "token_mask"):
            return self.adapter.token_mask(inputs, mask)  # type: ignore[operator]
        return mask


class Scores(nn.Module):
    """The mean loss and the metrics of one part of the data, "train", "val" or "test".

    Their states are part of the checkpoint: Lightning's own epoch averages are not, and would be
    wrong in an epoch that was interrupted.
    """

    def __init__(self, part: str, metrics: dict[str, Metric]) -> None:
        super().__init__()
        self.part = part
        # Any other strategy looks at each value, and a look waits for the device.
        self.loss = SumMetric(nan_strategy="disable")
        self.weight = SumMetric(nan_strategy="disable")
        self.metrics = MetricCollection(dict(metrics))
        for part_of_it in (self.loss, self.weight, self.metrics):
            part_of_it.persistent(True)

    def reset(self) -> None:
        self.loss.reset()
        self.weight.reset()
        self.metrics.reset()

    def add_loss(self, loss: Tensor, weight: int | Tensor) -> None:
        """Count a batch's mean loss, a scalar, with its weight."""
        self.loss.update(loss * weight)
        self.weight.update(weight)

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name, such as "val/accuracy"."""
        loss = self.loss.compute() / self.weight.compute()
        values = {"loss": loss, **self.metrics.compute()}
        # Some of torchmetrics' are integers where nothing is defined, which no log takes.
        values = {name: v if v.is_floating_point() else v.float() for name, v in values.items()}
        return {f"{self.part}/{name}": v for name, v in values.items() if v.dim() == 0}


class Task(LightningModule, ABC):
    """A model with its loss, metrics and optimizer.

    Args:
        model: (inputs, mask) -> outputs.
        labels: names of the outputs.
        optimizer: how weights are updated.
    """

    uses_all_weights = True
    """Whether every training step uses every weight."""

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
    def predictions(self, outputs: Tensor, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Answers for people and tables, one dict of JSON values per input."""

    def prepare(self, batch: dict[str, Any], batch_idx: int, part: str) -> dict[str, Any]:
        """What is done to a batch of "train", "val" or "test" on the device, before the model.

        Samples are mixed here, and not in a hook of Lightning's, because here the random generators
        have been seeded for the batch.
        """
        if part == "train" and isinstance(getattr(self.trainer, "datamodule", None), DataModule):
            return self.trainer.datamodule.mix(batch)  # type: ignore[attr-defined]
        return batch

    def update_metrics(
        self, metrics: MetricCollection, outputs: Tensor, batch: dict[str, Any]
    ) -> None:
        """Add a batch to the metrics."""
        metrics.update(outputs, batch["targets"])

    def loss_weight(self, batch: dict[str, Any]) -> int | Tensor:
        """How much a batch's mean loss counts in an epoch's: the number of its answers."""
        return len(batch["inputs"])

    def report(self, folder: Path) -> None:
        """Draw what the last test measured into a RUN."""

    def token_mask(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        """Which of the outputs (b, l, …) stand for data, (b, l) bool."""
        mask = batch.get("mask")
        model = self.part_of(batch)
        if hasattr(model, "token_mask"):
            mask = model.token_mask(batch["inputs"], mask)  # type: ignore[operator]
        if mask is None:
            return torch.ones(outputs.shape[:2], dtype=torch.bool, device=outputs.device)
        return mask

    def score(self, scores: Scores, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        """Mean loss of a batch, a scalar, counted in `scores` with the metrics."""
        loss = self.loss(outputs, batch)
        scores.add_loss(loss.detach(), self.loss_weight(batch))
        self.update_metrics(scores.metrics, outputs.detach(), batch)
        return loss

    def part_of(self, batch: dict[str, Any]) -> nn.Module:
        """The model that answers a batch: a task over several has several."""
        return self.model

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.part_of(batch)(batch["inputs"], batch.get("mask"))

    def embed(self, batch: dict[str, Any]) -> Tensor:
        """One vector (b, d) per input. Raises ValueError where the model has none."""
        if not hasattr(self.model, "embed"):
            raise ValueError(f"{type(self.model).__name__} has no embed(inputs, mask) to ask")
        return self.model.embed(batch["inputs"], batch.get("mask"))  # type: ignore[operator]

    def on_train_epoch_start(self) -> None:
        self.train_scores.reset()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        batch = self.prepare(batch, batch_idx, "train")
        loss = self.score(self.train_scores, self(batch), batch)
        # What the bar shows is read in every step, also where there is no bar.
        bar = self.trainer.progress_bar_callback is not None
        self.log("loss", loss.detach(), prog_bar=bar)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.train_scores.compute())

    def on_validation_epoch_start(self) -> None:
        self.val_scores.reset()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        batch = self.prepare(batch, batch_idx, "val")
        self.score(self.val_scores, self(batch), batch)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_scores.compute(), prog_bar=True)

    def on_test_epoch_start(self) -> None:
        self.test_scores.reset()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        batch = self.prepare(batch, batch_idx, "test")
        self.score(self.test_scores, self(batch), batch)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.test_scores.compute())

    def configure_optimizers(self) -> Any:
        config = self.optimizer_config
        # Only where it is asked for: not every optimizer knows the word.
        fused: dict[str, Any] = {"fused": True} if config.fused else {}
        optimizer = create_optimizer_v2(
            parameter_groups(self.model, config.weight_decay, config.layer_decay),
            opt=config.name,
            lr=config.lr,
            betas=config.betas,
            **fused,
        )
        epochs = self.trainer.max_epochs or 1
        if config.warmup_epochs >= epochs:
            raise ValueError(
                f"optimizer.warmup_epochs is {config.warmup_epochs}, expected less than "
                f"trainer.max_epochs, {epochs}"
            )
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(total * config.warmup_epochs / epochs)
        scheduler = Schedule(
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
        # Counted from the place in the data: a run may have been resumed with other batches.
        every = self.trainer.accumulate_grad_batches
        batches, done = self.trainer.num_training_batches, self.trainer.fit_loop.batch_idx + 1
        steps_per_epoch = -(-int(batches) // every)
        scheduler.step_update(self.trainer.current_epoch * steps_per_epoch + -(-done // every))
