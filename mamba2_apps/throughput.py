"""How fast a training is: samples and the domain's units per second, and the share of the GPU used.

Model FLOPs utilisation (MFU, Chowdhery et al. 2022) is the arithmetic that the model needs, over
the arithmetic that the devices could do in the same time: projections and convolutions as written,
the state space duality as its recurrence, attention as its two products; a backward pass counts
twice the forward pass, recomputation not at all.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from mamba2_apps.attention import Attention
from mamba2_apps.mixer import Mamba2

# Dense bfloat16 FLOPs per second, from the makers' data sheets.
PEAK_BF16 = {"H100 80GB HBM3": 989.4e12, "H200": 989.4e12, "A100": 312e12}


@contextmanager
def counted_flops(model: nn.Module) -> Iterator[list[float]]:
    """Collect the floating-point operations of each part that runs in a forward pass of `model`."""
    counts: list[float] = []

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        counts.append(_flops(module, inputs, output))

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, Mamba2, Attention)
    # A mixer does not always call its projections: some of its operators take their weights.
    inside = {m for mixer in model.modules() if isinstance(mixer, Mamba2) for m in mixer.children()}
    parts = (m for m in model.modules() if isinstance(m, kinds) and m not in inside)
    hooks = [m.register_forward_hook(count) for m in parts]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _flops(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> float:
    """What the parts of a module that are counted by themselves do not do."""
    if isinstance(module, nn.Linear):
        return 2.0 * inputs[0].numel() * module.out_features
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return 2.0 * output.numel() * module.weight[0].numel()
    tokens = inputs[0].shape[:-1].numel()
    if isinstance(module, Attention):
        length = inputs[0].shape[-2]
        seen = length / 2 if module.causal else length
        return 4.0 * tokens * seen * module.num_heads * module.head_dim
    assert isinstance(module, Mamba2)
    directions = 2 if module.bidirectional else 1
    convolution = 2 * module.conv_dim * module.d_conv
    # A state of p × n per head is decayed, added to and read.
    recurrence = 5 * module.nheads * module.headdim * module.d_state
    projections = 2 * (module.in_proj.weight.numel() + module.out_proj.weight.numel())
    return float(tokens * (projections + directions * (convolution + recurrence)))


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOPs per second of a device; None where they are not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


class Throughput(Callback):
    """Measure each epoch's training, without validation: the progress bar and `rates` have it.

    `rates` holds, after an epoch, units per second of all devices together, "samples" and what the
    data module's `units` names; and "mfu" for bfloat16 on a GPU that is known.
    """

    def __init__(self, *, bf16: bool) -> None:
        self.bf16 = bf16
        self._counting: AbstractContextManager[list[float]] | None = None
        self.rates: dict[str, float] = {}
        # As the first batch has it; of several domains in turns, the first of each.
        self.flops_per_sample: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.on_train_epoch_start(trainer, module)  # a resumed epoch does not start

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._units: dict[str, Any] = {}
        self._flops = 0.0
        self._started = time.monotonic()

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if _part(batch) not in self.flops_per_sample:
            self._counting = counted_flops(module.model)  # type: ignore[arg-type]
            self._counts = self._counting.__enter__()

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        if self._counting is not None:  # before recomputation runs the hooks again
            self._counting.__exit__(None, None, None)
            self._counting = None

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        part, samples = _part(batch), len(batch["inputs"])
        if part not in self.flops_per_sample:
            self.flops_per_sample[part] = 3 * sum(self._counts) / samples
        self._flops += samples * self.flops_per_sample[part]
        for name, count in trainer.datamodule.units(batch).items():  # type: ignore[attr-defined]
            self._units[name] = self._units.get(name, 0) + count
        last = batch_idx + 1 == trainer.num_training_batches
        if last or trainer.global_step % 50 == 0:
            self._report(trainer, module)

    def _report(self, trainer: Trainer, module: LightningModule) -> None:
        # Reading a count that lies on the device waits for its work.
        units = {name: float(count) for name, count in self._units.items()}
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        seconds = time.monotonic() - self._started
        self.rates = {name: count * trainer.world_size / seconds for name, count in units.items()}
        peak = peak_flops(module.device) if self.bf16 else None
        if trainer.progress_bar_callback is not None:
            for name, rate in self.rates.items():
                module.log(f"{name}_per_second", rate, prog_bar=True, logger=False)
        if peak is not None:
            self.rates["mfu"] = self._flops / seconds / peak


def _part(batch: Any) -> str:
    """Which of several domains a batch is of."""
    return str(batch.get("part", ""))
