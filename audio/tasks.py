"""What audio asks besides the core's tasks: tags by their detectability, events in seconds, text by
a beam search.

Dimensions: batch b · steps l · frames t · labels k
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryEER
from torchmetrics.functional.classification import binary_auroc, binary_eer

from mamba2_apps.heads import CTCHead
from mamba2_apps.tasks import CTC, LabelMean, MultiLabel, OptimizerConfig, TokenMultiLabel
from mamba2_apps.tasks.tokens import OfBothValues, present_labels


def d_prime(scores: Tensor, targets: Tensor) -> Tensor:
    """d′ = √2 Φ⁻¹(AUC) of scores (n,) for targets (n,) of 0 and 1 (Hershey et al. 2017).

    An AUC of 1 counts as that of the largest float32 below.
    """
    tiny = torch.finfo(torch.float32).eps
    area = binary_auroc(scores, targets).clamp(tiny, 1 - tiny)
    return math.sqrt(2) * torch.special.ndtri(area)


class EqualErrorRate(OfBothValues, BinaryEER):
    """Where as many frames are falsely heard as are missed, in parts of those that could be."""


class SegmentF1(Metric):
    """F1 of which labels are heard in each segment of a second, summed over all (Mesaros 2016)."""

    full_state_update = False
    hits: Tensor
    given: Tensor
    true: Tensor

    def __init__(self, steps_per_segment: int) -> None:
        super().__init__()
        self.steps = steps_per_segment
        for name in ("hits", "given", "true"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, present: Tensor, targets: Tensor) -> None:
        """present (b, l, k) bool; targets (b, l, k) float, NaN where there is no label."""
        pad = (0, 0, 0, -present.shape[1] % self.steps)
        known = ~targets.isnan()
        true = F.pad(known & (targets >= 0.5), pad).unflatten(1, (-1, self.steps)).any(2)
        given = F.pad(known & present, pad).unflatten(1, (-1, self.steps)).any(2)
        self.hits += (true & given).sum()
        self.given += given.sum()
        self.true += true.sum()

    def compute(self) -> Tensor:
        return 2 * self.hits / (self.given + self.true).clamp(min=1)


class Tagging(MultiLabel):
    """Any number of tags per clip: mean average precision, AUC, d′ and equal error rate, each the
    mean over the tags that some clips have and others have not.
    """

    def build_metrics(self, part: str) -> dict[str, Metric]:
        metrics = super().build_metrics(part)
        if part == "test":
            metrics["d_prime"] = LabelMean(d_prime)
            metrics["eer"] = LabelMean(binary_eer)
        return metrics


class EventDetection(TokenMultiLabel):
    """Labels from a start to an end: sound events, or, with one label, voice activity.

    The model has a `FrameTokens` adapter and a `TokenHead`, or a `PatchTokens` adapter and a
    `TrackHead` whose bin_size is its tokens_per_step: outputs (b, l, k) are for steps of
    `step_seconds`. Targets (b, t, k) are for frames; a label is present in a step where it is in
    any of its frames.
    """

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
        if not hasattr(getattr(model, "adapter", None), "frames_per_step"):
            raise ValueError(f"{type(model).__name__} has no audio adapter, which events need")
        super().__init__(
            model,
            labels,
            optimizer,
            positive_weight=positive_weight,
            threshold=threshold,
            label_weights=label_weights,
        )

    @property
    def adapter(self) -> Any:
        """The model's audio adapter."""
        return self.model.adapter

    def build_metrics(self, part: str) -> dict[str, Metric]:
        metrics = super().build_metrics(part)
        if part != "train":
            metrics["segment_f1"] = SegmentF1(round(1 / self.adapter.step_seconds))
        if part == "test":
            metrics["eer"] = EqualErrorRate()
        return metrics

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        return super().loss(outputs, self._stepped(batch, outputs.shape[1]))

    def update_metrics(
        self, metrics: MetricCollection, outputs: Tensor, batch: dict[str, Any]
    ) -> None:
        targets = self._stepped(batch, outputs.shape[1])["targets"]
        scores, present = outputs.float().sigmoid(), present_labels(targets)
        for name, metric in metrics.items(keep_base=True):
            if name == "segment_f1":
                metric.update(scores >= self.threshold, targets)
            else:
                metric.update(scores.flatten(), present)

    def token_mask(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        if "mask" not in batch:
            return torch.ones(outputs.shape[:2], dtype=torch.bool, device=outputs.device)
        mask = self.adapter.token_mask(batch["inputs"], batch["mask"])
        return mask[:, :: self.adapter.tokens_per_step]

    def predictions(self, outputs: Tensor, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Events: "start" and "end" in seconds, "label", and its mean "probability"."""
        answers = super().predictions(outputs, batch)
        return [
            {"events": [self.in_seconds(segment) for segment in answer["segments"]]}
            for answer in answers
        ]

    def in_seconds(self, segment: dict[str, Any]) -> dict[str, Any]:
        """A segment whose bounds are steps as one whose bounds are seconds."""
        times = {name: self.seconds(segment[name]) for name in ("start", "end")}
        return {**segment, **times}

    def seconds(self, step: int) -> float:
        """When a step begins."""
        features = self.adapter.features
        frame = step * self.adapter.frames_per_step - self.adapter.frames_before
        return round(max(frame, 0) * features.hop / features.sample_rate, 4)

    def _stepped(self, batch: dict[str, Any], length: int) -> dict[str, Any]:
        """The batch with targets for steps, (b, l, k), in place of frames."""
        size, before = self.adapter.frames_per_step, self.adapter.frames_before
        targets = batch["targets"]
        after = length * size - before - targets.shape[1]
        frames = F.pad(targets, (0, 0, before, after), value=torch.nan).unflatten(1, (length, size))
        known = ~frames.isnan()
        most = frames.nan_to_num(-1.0).amax(2)
        return {**batch, "targets": torch.where(known.any(2), most, torch.nan)}


class Transcription(CTC):
    """Text, by a beam search over the letters' probabilities where asked for.

    Metrics are those of the greedy reading: they need no further library.

    Args:
        model: ends in a `CTCHead`.
        labels: the letters.
        optimizer: how weights are updated.
        beam_size: texts that the search keeps (`pip install 'mamba2-apps[speech]'`); 1: the
            greedy reading.
    """

    def __init__(
        self, model: nn.Module, labels: list[str], optimizer: OptimizerConfig, *, beam_size: int = 1
    ) -> None:
        if beam_size < 1:
            raise ValueError(f"task.beam_size is {beam_size}, expected at least 1")
        super().__init__(model, labels, optimizer)
        self.beam_size = beam_size

    def predictions(self, outputs: Tensor, batch: dict[str, Any]) -> list[dict[str, Any]]:
        texts = self.greedy(outputs) if self.beam_size == 1 else self.beam(outputs, self.beam_size)
        return [{"text": text} for text in texts]

    def beam(self, outputs: Tensor, size: int) -> list[str]:
        """The likeliest text of each row that a search over `size` of them finds."""
        try:
            from fast_ctc_decode import beam_search
        except ImportError as error:
            raise ValueError(
                f"task.beam_size is {size}; the search needs fast-ctc-decode: "
                "pip install 'mamba2-apps[speech]', or set it to 1"
            ) from error
        # Letters become characters of their own for the search, whatever the labels are.
        letters = [chr(0xE000 + index) for index in range(len(self.labels))]
        assert CTCHead.blank == 0
        texts = []
        for row in outputs.float().exp().cpu().numpy():
            found, _ = beam_search(row, ["_", *letters], beam_size=size, beam_cut_threshold=1e-4)
            texts.append(self.text([ord(letter) - 0xE000 for letter in found]))
        return texts
