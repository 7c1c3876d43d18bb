"""Text for a sequence, by connectionist temporal classification (Graves et al. 2006).

Dimensions: batch b · seqlen l (tokens) · letters s · classes k (blank and letters)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.text import CharErrorRate, WordErrorRate

from mamba2_apps.heads import CTCHead
from mamba2_apps.tasks.base import Task
from mamba2_apps.tasks.tokens import IGNORE


class CTC(Task):
    """Letters in order, without their places.

    The model ends in a `CTCHead`: log-probabilities (b, l, 1 + letters), all mass on the blank at
    padding, so that neither loss nor reading needs lengths. `labels` are the letters; targets are
    (b, s) int64 indices into them, -100 after the end.

    The loss of a batch is the mean over its inputs of the loss per letter. Where an input has fewer
    tokens than its text needs, the loss is infinite: a data module names such inputs before.
    """

    def build_metrics(self, part: str) -> dict[str, Metric]:
        if part == "train":
            return {}
        return {"cer": CharErrorRate(), "wer": WordErrorRate()}

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        targets = batch["targets"]
        lengths = (targets != IGNORE).sum(1)
        return F.ctc_loss(
            outputs.transpose(0, 1),
            torch.where(targets == IGNORE, 0, targets + 1),
            torch.full_like(lengths, outputs.shape[1]),
            lengths,
            blank=CTCHead.blank,
        )

    def update_metrics(
        self, metrics: MetricCollection, outputs: Tensor, batch: dict[str, Any]
    ) -> None:
        if len(metrics):
            truth = [self.text(row[row != IGNORE].tolist()) for row in batch["targets"].cpu()]
            metrics.update(self.greedy(outputs), truth)

    def predictions(self, outputs: Tensor, batch: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"text": text} for text in self.greedy(outputs)]

    def greedy(self, outputs: Tensor) -> list[str]:
        """The text of each row's likeliest path: repeats joined, blanks dropped."""
        texts = []
        for row in outputs.argmax(-1).cpu():
            joined = torch.unique_consecutive(row)
            texts.append(self.text((joined[joined != CTCHead.blank] - 1).tolist()))
        return texts

    def text(self, letters: list[int]) -> str:
        """Indices into the labels as text."""
        return "".join(self.labels[index] for index in letters)
