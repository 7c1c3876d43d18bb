"""Real-valued answers: for a whole input, or along it.

Dimensions: batch b · seqlen l (tokens or bins) · values k
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection
from torchmetrics.regression import PearsonCorrCoef, R2Score

from mamba2_apps.tasks.base import OptimizerConfig, Task

RegressionLoss = Literal["mse", "huber", "poisson"]


class Regression(Task):
    """k values for each input, over those that are known.

    Args:
        model: (inputs, mask) -> values (b, k).
        labels: the k names.
        optimizer: how weights are updated.
        loss_name: mse, huber (of width 1), or poisson: outputs are then logarithms of expected
            counts, as targets are counts; metrics and predictions are counts.

    Targets are (b, k) float, NaN where the value is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: list[str],
        optimizer: OptimizerConfig,
        *,
        loss_name: RegressionLoss = "mse",
    ) -> None:
        if loss_name not in ("mse", "huber", "poisson"):
            raise ValueError(f"task.loss_name is {loss_name!r}, expected mse, huber or poisson")
        super().__init__(model, labels, optimizer)
        self.loss_name = loss_name

    def build_metrics(self, part: str) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {"mae": MeanAbsoluteError(), "rmse": MeanSquaredError(False)}
        if part != "train":
            metrics["pearson"], metrics["r2"] = PearsonCorrCoef(), R2Score()
        return metrics

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        targets = batch["targets"].float()
        known = ~targets.isnan()
        values, truth = outputs.float(), targets.nan_to_num()
        if self.loss_name == "poisson":
            losses = F.poisson_nll_loss(values, truth, log_input=True, reduction="none")
        elif self.loss_name == "huber":
            losses = F.huber_loss(values, truth, reduction="none")
        else:
            losses = F.mse_loss(values, truth, reduction="none")
        return torch.where(known, losses, 0).sum() / known.sum().clamp(min=1)

    def loss_weight(self, batch: dict[str, Any]) -> Tensor:
        return (~batch["targets"].isnan()).sum()

    def values(self, outputs: Tensor) -> Tensor:
        """Outputs on the scale of the targets."""
        return outputs.float().exp() if self.loss_name == "poisson" else outputs.float()

    def update_metrics(
        self, metrics: MetricCollection, outputs: Tensor, batch: dict[str, Any]
    ) -> None:
        known = ~batch["targets"].isnan()
        metrics.update(self.values(outputs)[known], batch["targets"][known].float())

    def predictions(self, outputs: Tensor, batch: dict[str, Any]) -> list[dict[str, Any]]:
        rows = self.values(outputs).tolist()
        return [{"values": dict(zip(self.labels, row, strict=True))} for row in rows]


class TrackRegression(Regression):
    """k values for each bin of a sequence; outputs and targets are (b, l, k).

    The bins are those of the head: see `mamba2_apps.heads.TrackHead`.
    """

    def predictions(self, outputs: Tensor, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Values by label, a list each with a value per bin that holds data."""
        bin_size = getattr(getattr(self.model, "head", None), "bin_size", 1)
        tokens = self.token_mask(outputs, batch)
        mask = F.pad(tokens, (0, -tokens.shape[1] % bin_size)).unflatten(1, (-1, bin_size)).any(-1)
        answers = []
        for row, kept in zip(self.values(outputs), mask, strict=True):
            columns = row[kept].T.tolist()
            answers.append({"values": dict(zip(self.labels, columns, strict=True))})
        return answers
