"""Pretraining without labels, the same in every domain: give back hidden tokens, or the next one.

The adapter says what each of its tokens should give back, `adapter.targets(inputs, mask)`: ids
(b, l) int64 below `adapter.target_size`, or values (b, l, target_size) float. The head answers for
each token. A batch may hold "weights" (b, l) float: how much each token counts, soft-masked DNA
less, say.

Dimensions: batch b · seqlen l (tokens) · target_size k
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection

from mamba2_apps.tasks.base import OptimizerConfig, Task


class Pretraining(Task):
    """What both objectives share: the weighted mean loss of the tokens to give back.

    `prepare` adds to a batch "targets" and "weights", whose tokens `aligned` pairs with outputs.
    """

    def build_metrics(self, part: str) -> dict[str, Metric]:
        discrete = getattr(self.model.adapter, "discrete_targets", False)
        return {"accuracy": MeanMetric()} if discrete else {}

    def prepare(self, batch: dict[str, Any], batch_idx: int, part: str) -> dict[str, Any]:
        batch = super().prepare(batch, batch_idx, part)
        inputs, mask = batch["inputs"], batch.get("mask")
        targets = self.part_of(batch).adapter.targets(inputs, mask)  # type: ignore[operator, union-attr]
        weights = self.token_mask(targets, batch).float() * batch.get("weights", 1.0)
        return {**batch, "targets": targets, "weights": weights}

    def aligned(self, outputs: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs (b, l', k), their targets (b, l', …) and weights (b, l')."""
        return outputs, batch["targets"], batch["weights"]

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        outputs, targets, weights = self.aligned(outputs, batch)
        return (token_losses(outputs, targets, weights)).sum() / weights.sum().clamp(min=1e-9)

    def loss_weight(self, batch: dict[str, Any]) -> Tensor:
        return self.aligned(batch["targets"], batch)[2].sum()

    def update_metrics(
        self, metrics: MetricCollection, outputs: Tensor, batch: dict[str, Any]
    ) -> None:
        if len(metrics):
            outputs, targets, weights = self.aligned(outputs, batch)
            metrics.update((outputs.argmax(-1) == targets).float(), weight=weights)


class MaskedReconstruction(Pretraining):
    """Give back hidden tokens from both sides: ids by cross-entropy (BERT), values by their square.

    Values are compared as they are: an adapter normalises them (He et al. 2022).

    Args:
        model: its adapter was built with `maskable`.
        labels: names of the ids, or none.
        optimizer: how weights are updated.
        mask_ratio: part of an input's tokens that is hidden.
        mask_span: tokens in a row that are hidden together.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: list[str],
        optimizer: OptimizerConfig,
        *,
        mask_ratio: float = 0.15,
        mask_span: int = 1,
    ) -> None:
        if not 0 < mask_ratio < 1:
            raise ValueError(f"task.mask_ratio is {mask_ratio}, expected between 0 and 1")
        if mask_span < 1:
            raise ValueError(f"task.mask_span is {mask_span}, expected at least 1")
        for part in getattr(model, "parts", {"": model}).values():
            if not hasattr(getattr(part, "adapter", None), "targets"):
                raise ValueError(
                    f"{type(part).__name__} has no adapter with targets to give back; use an "
                    "adapter that takes maskable=True"
                )
        super().__init__(model, labels, optimizer)
        self.mask_ratio, self.mask_span = mask_ratio, mask_span

    def prepare(self, batch: dict[str, Any], batch_idx: int, part: str) -> dict[str, Any]:
        batch = super().prepare(batch, batch_idx, part)
        data = batch["weights"] > 0
        # The tokens hidden in evaluation are the same at every epoch.
        fixed = torch.Generator().manual_seed(batch_idx) if part != "train" else None
        hide = hidden_tokens(data, self.mask_ratio, self.mask_span, fixed)
        return {**batch, "hide": hide, "weights": batch["weights"] * hide}

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.part_of(batch)(batch["inputs"], batch.get("mask"), batch.get("hide"))

    def predictions(self, outputs: Tensor, batch: dict[str, Any]) -> list[dict[str, Any]]:
        raise ValueError(
            "a RUN of masked pretraining answers no question; ask `embed`, or fine-tune it"
        )


class NextToken(Pretraining):
    """Give back the next token from those before it, by a causal model.

    Args:
        model: its backbone is causal.
        labels: names of the ids, or none.
        optimizer: how weights are updated.
    """

    def __init__(self, model: nn.Module, labels: list[str], optimizer: OptimizerConfig) -> None:
        backbone = getattr(model, "backbone", None)
        if backbone is None or backbone.config.bidirectional:
            raise ValueError(
                "the next token is already seen by a bidirectional backbone; set "
                "model.backbone.bidirectional false, or use MaskedReconstruction"
            )
        super().__init__(model, labels, optimizer)

    def aligned(self, outputs: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        weights = batch["weights"]
        known = torch.where(weights[:, :-1] > 0, weights[:, 1:], 0)
        return outputs[:, :-1], batch["targets"][:, 1:], known

    def predictions(self, outputs: Tensor, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The mean loss per token that has one before it; for ids minus the log-likelihood."""
        batch = Pretraining.prepare(self, batch, 0, "predict")
        outputs, targets, weights = self.aligned(outputs, batch)
        counts = weights.sum(1)
        means = token_losses(outputs, targets, weights).sum(1) / counts.clamp(min=1e-9)
        return [
            {"loss": mean, "tokens": count}
            for mean, count in zip(means.tolist(), counts.tolist(), strict=True)
        ]


def token_losses(outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted loss of each token, (b, l) float32, 0 where the weight is, whatever lies there."""
    if targets.is_floating_point():
        losses = F.mse_loss(outputs.float(), targets.float(), reduction="none").mean(-1)
    else:
        losses = F.cross_entropy(outputs.float().mT, targets, reduction="none")
    return torch.where(weights > 0, losses * weights, 0)


def hidden_tokens(
    data: Tensor, ratio: float, span: int, generator: torch.Generator | None = None
) -> Tensor:
    """Which tokens to hide, (b, l) bool: the same part of each row's data, one token at least.

    Args:
        data: (b, l) bool, True where there is data.
        ratio: part of the data to hide.
        span: tokens in a row that are hidden together, on a grid.
        generator: of the CPU; None draws from the global generator of data's device.
    """
    b, l = data.shape
    shape = b, -(-l // span)
    if generator is None:
        noise = torch.rand(shape, device=data.device)
    else:
        noise = torch.rand(shape, generator=generator).to(data.device)
    noise = noise.repeat_interleave(span, 1)[:, :l].masked_fill(~data, 2.0)
    count = (data.sum(1, keepdim=True) * ratio).round().clamp(min=1)
    rank = noise.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return (rank < count) & data
