"""One backbone pretrained in several domains at once, by masked reconstruction.

Dimensions: batch b · seqlen l (tokens) · d_model d
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection

from mamba2_apps.backbone import Backbone, BackboneConfig
from mamba2_apps.heads import TokenHead
from mamba2_apps.tasks.base import OptimizerConfig, SequenceModel
from mamba2_apps.tasks.pretraining import MaskedReconstruction


class Part(SequenceModel):
    """adapter ∘ a backbone that others share ∘ a head for what the adapter's tokens give back."""

    def __init__(self, adapter: Any, backbone: Backbone) -> None:
        nn.Module.__init__(self)
        self.adapter, self.backbone = adapter, backbone
        self.head = TokenHead(backbone.config.d_model, adapter.target_size)


class MixedModel(nn.Module):
    """A model for each part, with a backbone that all of them share.

    Args:
        num_outputs: not used: the heads give what the adapters' tokens give back.
        adapters: by the part's name: called with d_model, built with `maskable`.
        backbone: sizes of the shared backbone, bidirectional.
    """

    def __init__(
        self,
        num_outputs: int = 0,
        *,
        adapters: dict[str, Callable[[int], nn.Module]],
        backbone: BackboneConfig,
    ) -> None:
        super().__init__()
        self.backbone = Backbone(backbone)
        self.parts = nn.ModuleDict(
            {
                name: Part(adapter(backbone.d_model), self.backbone)
                for name, adapter in adapters.items()
            }
        )


class MixedReconstruction(MaskedReconstruction):
    """Masked reconstruction, a batch of one part at a time.

    Args:
        model: a MixedModel.
        labels: none.
        optimizer: how weights are updated.
        mask_ratio: part of an input's tokens that is hidden.
        mask_span: tokens in a row that are hidden together.
    """

    uses_all_weights = False

    def __init__(
        self,
        model: MixedModel,
        labels: list[str],
        optimizer: OptimizerConfig,
        *,
        mask_ratio: float = 0.3,
        mask_span: int = 1,
    ) -> None:
        super().__init__(model, labels, optimizer, mask_ratio=mask_ratio, mask_span=mask_span)

    def part_of(self, batch: dict[str, Any]) -> nn.Module:
        return self.model.parts[batch["part"]]  # type: ignore[index, return-value]

    def build_metrics(self, part: str) -> dict[str, Metric]:
        return {f"loss_{name}": MeanMetric() for name in self.model.parts}  # type: ignore[union-attr]

    def update_metrics(
        self, metrics: MetricCollection, outputs: Tensor, batch: dict[str, Any]
    ) -> None:
        metrics[f"loss_{batch['part']}"].update(
            self.loss(outputs, batch), weight=self.loss_weight(batch)
        )
