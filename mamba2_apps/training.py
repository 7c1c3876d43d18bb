"""Assembly of Lightning's Trainer, and the callbacks that make a killed run continue exactly.

Lightning saves weights, optimizer, schedule and progress. What it leaves out is covered here:
random numbers are a function of (seed, epoch, batch), the place in the data is kept by
`DataModule`, metric states by `Task`, and the table of epochs by `Recorder`.
"""

import csv
import io
import itertools
import logging
import math
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    RichProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mamba2_apps.adaptation import AdaptationConfig, Unfreeze
from mamba2_apps.data import seed_generators
from mamba2_apps.files import replacing, write_text
from mamba2_apps.throughput import Throughput

LAST, BEST = Path("checkpoints/last.ckpt"), Path("checkpoints/best.ckpt")
METRICS_TABLE = "metrics.csv"
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}


@dataclass(kw_only=True)
class TrainerConfig:
    """How long, on what and how precisely to train.

    Args:
        max_epochs: passes over the training data.
        precision: fp32, or bf16 for bfloat16 autocast over float32 weights.
        accelerator: cpu, gpu, or auto for a GPU where there is one.
        devices: number of devices of this machine, or of each machine under torchrun.
        num_nodes: number of machines.
        parallel: how several devices share the work: ddp, each with the whole model; fsdp2, each
            with a part of every weight; null for one device.
        compile: compile the model by torch.compile.
        profile_steps: batches to profile, after ten that warm up: a trace for a trace viewer in the
            RUN's folder profile; null: none.
        gradient_clip: largest gradient norm; null does not clip.
        accumulate_batches: batches per optimizer step.
        ema_decay: decay of an exponential moving average of the weights, from the first step's on,
            which is then what is validated, saved and used; null uses the weights themselves.
        monitor: what chooses the best epoch, such as val/loss.
        mode: whether the smallest or the largest value is best.
        early_stop_patience: validations without improvement after which training ends; null: never.
        check_val_every_n_epoch: epochs from one validation to the next, a divisor of max_epochs;
            for epochs of few steps.
        checkpoint_every_n_steps: optimizer steps between checkpoints within an epoch; one is saved
            after every validation too.
        deterministic: only deterministic algorithms on the GPU; the CPU's are.
    """

    max_epochs: int = 10
    precision: Literal["fp32", "bf16"] = "fp32"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    parallel: Literal["ddp", "fsdp2"] | None = None
    compile: bool = False
    profile_steps: int | None = None
    gradient_clip: float | None = 1.0
    accumulate_batches: int = 1
    ema_decay: float | None = None
    monitor: str = "val/loss"
    mode: Literal["min", "max"] = "min"
    early_stop_patience: int | None = None
    check_val_every_n_epoch: int = 1
    checkpoint_every_n_steps: int = 500
    deterministic: bool = False

    def __post_init__(self) -> None:
        counts = ("max_epochs", "devices", "num_nodes", "accumulate_batches")
        for name in (*counts, "check_val_every_n_epoch", "checkpoint_every_n_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} is {getattr(self, name)}, expected at least 1")
        if self.max_epochs % self.check_val_every_n_epoch:
            raise ValueError(
                f"trainer.check_val_every_n_epoch is {self.check_val_every_n_epoch}, expected a "
                f"divisor of trainer.max_epochs, {self.max_epochs}: the last epoch is validated"
            )
        processes = self.devices * self.num_nodes
        if processes > 1 and self.parallel is None:
            raise ValueError(
                f"trainer.devices × trainer.num_nodes is {processes}; set trainer.parallel to ddp "
                "or fsdp2"
            )
        if self.parallel == "fsdp2" and self.ema_decay is not None:
            raise ValueError(
                f"trainer.ema_decay is {self.ema_decay}; a running average of sharded weights is "
                "not supported: set it to null, or trainer.parallel to ddp"
            )
        if self.profile_steps is not None and self.profile_steps < 1:
            raise ValueError(
                f"trainer.profile_steps is {self.profile_steps}, expected at least 1, or null"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"trainer.ema_decay is {self.ema_decay}, expected 0 to 1, or null")


def build_trainer(
    config: TrainerConfig,
    *,
    run: Path,
    seed: int,
    interrupt: threading.Event,
    adaptation: AdaptationConfig,
    first_step: int = 0,
    find_unused: bool = False,
) -> Trainer:
    """A Trainer that writes checkpoints, curves and logs into the folder `run`.

    Args:
        interrupt: when it is set, training saves a checkpoint and raises KeyboardInterrupt.
        first_step: optimizer step of the checkpoint to resume from; later events are dropped from
            the TensorBoard log.
        find_unused: some steps do not use all weights, which several devices must look for.
    """
    bar = sys.stderr.isatty()
    callbacks: list[Callback] = [
        SeedEveryBatch(seed),
        Throughput(bf16=config.precision == "bf16"),
        Recorder(run, config, interrupt, lines=not bar),
    ]
    if bar:
        callbacks.append(RichProgressBar(console_kwargs={"stderr": True}))
    if config.ema_decay is not None:
        callbacks.append(AverageWeights(config.ema_decay))
    if adaptation.unfreeze_epoch is not None:
        callbacks.append(Unfreeze(adaptation))
    if config.early_stop_patience is not None:
        callbacks.append(
            EarlyStopping(config.monitor, mode=config.mode, patience=config.early_stop_patience)
        )
    logger = TensorBoardLogger(run, name="tensorboard", version="", purge_step=first_step)
    return Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=_strategy(config, find_unused),
        precision=PRECISIONS[config.precision],  # type: ignore[arg-type]
        max_epochs=config.max_epochs,
        gradient_clip_val=config.gradient_clip,
        accumulate_grad_batches=config.accumulate_batches,
        check_val_every_n_epoch=config.check_val_every_n_epoch,
        deterministic=config.deterministic,
        callbacks=callbacks,
        logger=logger,
        profiler=_profiler(config, run),
        plugins=[SyncedCheckpointIO()],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_progress_bar=bar,
        enable_model_summary=False,
        default_root_dir=run,
    )


class MovingAverage(AveragedModel):
    """An exponential moving average that holds no weights from before the first step.

    Shares are those of the steps there were, as Adam corrects its moments (Kingma and Ba 2015):
    early on it is the plain mean, and a short training is not kept near its start.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device | None = None) -> None:
        super().__init__(model, device)
        self.decay = decay
        self.n_averaged = torch.tensor(0)  # on the CPU: a look must not wait for the device

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        share = (1 - self.decay) / (1 - self.decay ** (int(self.n_averaged) + 1))
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        averaged, current = map(list, zip(*floating, strict=True))
        # A lerp leaves a frozen weight bit for bit what it is.
        torch._foreach_lerp_(averaged, current, share)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)
        self.n_averaged += 1


class AverageWeights(WeightAveraging):
    """Keeps a moving average where the model is trained, which then is validated and saved.

    Lightning's own is made before the model is on its device and stays behind: every step would
    copy every weight to the CPU, and wait for each.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            device = trainer.strategy.root_device
            self._average_model = MovingAverage(pl_module, self.decay, device)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _profiler(config: TrainerConfig, run: Path) -> PyTorchProfiler | None:
    if config.profile_steps is None:
        return None
    schedule = torch.profiler.schedule(wait=5, warmup=5, active=config.profile_steps, repeat=1)
    return PyTorchProfiler(dirpath=run / "profile", filename="summary", schedule=schedule)


def _strategy(config: TrainerConfig, find_unused: bool) -> Strategy | str:
    if config.parallel == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True, find_unused_parameters=find_unused)
    if config.parallel == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=config.devices * config.num_nodes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,  # one file, which any number of devices resumes
        )
    return "auto"


@contextmanager
def ctrl_c_noted(*, alone: bool) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event that training looks at between batches.

    An exception raised anywhere may be swallowed where Python ignores exceptions, in a destructor
    say, and would lose the steps since the last checkpoint. A second Ctrl-C ends at once. Several
    processes (not `alone`) would not look at the same batch, and wait for one another: there Ctrl-C
    ends at once, and the last checkpoint counts.
    """
    noted = threading.Event()
    if not alone:
        yield noted
        return

    def note(number: int, frame: object) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    if threading.current_thread() is not threading.main_thread():
        yield noted  # signals go to the main thread only
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, previous)


def quiet_lightning() -> None:
    """Drop Lightning's notices and the advice that does not apply here; its warnings stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*your dataloader is not resumable.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*The ``compute`` method of metric .* was called before the ``update``.*",
        ".*It is recommended to use .*sync_dist=True.* when logging on epoch level.*",
    ):
        warnings.filterwarnings("ignore", message)


class SyncedCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its final name, sync and rename it, so that one is always whole."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            torch.save(checkpoint, partial)


class SeedEveryBatch(Callback):
    """Make dropout and the like a function of (seed, epoch, batch, rank): no state to keep."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        key = (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        torch.manual_seed(seed_generators(*key))  # on every device


class Recorder(Checkpoint):
    """Keep the table of epochs, choose the best epoch, and save the checkpoints last and best.

    Lightning's ModelCheckpoint ties its state to an absolute path, and may save after an epoch's
    last batch, from where a resumed run skips the validation; its CSVLogger starts its file afresh.
    Here `last` is saved every few steps before an epoch's end and when an epoch, with its
    validation and its row in the table, is complete. Lightning runs Checkpoint callbacks last.
    """

    def __init__(
        self, run: Path, config: TrainerConfig, interrupt: threading.Event, *, lines: bool
    ) -> None:
        self.run, self.config, self.interrupt, self.lines = run, config, interrupt, lines
        self.history: list[dict[str, Any]] = []
        self.best_epoch: int | None = None
        self.best_score = math.inf if config.mode == "min" else -math.inf
        self.stopped = False
        self.rates: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.should_stop = self.stopped
        data = trainer.datamodule  # type: ignore[attr-defined]
        if done := data.batches_done():
            # Lightning restored the count of batches, which other devices count differently.
            place: Any = trainer.fit_loop.epoch_loop.batch_progress.current
            place.ready = place.started = place.processed = done
            place.completed = done - 1  # as at the end of a batch, where checkpoints are saved

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        if done == trainer.num_training_batches:
            return  # on_train_epoch_end saves
        steps, between_steps = divmod(done, self.config.accumulate_batches)
        if between_steps:
            return
        if steps % self.config.checkpoint_every_n_steps == 0 or self.interrupt.is_set():
            trainer.save_checkpoint(self.run / LAST)
        self._stop_if_interrupted()

    def on_validation_batch_end(self, *arguments: Any, **names: Any) -> None:
        self._stop_if_interrupted()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        validated = (trainer.current_epoch + 1) % self.config.check_val_every_n_epoch == 0
        # Lightning keeps the values of an earlier validation.
        parts = ("train/", "val/") if validated else ("train/",)
        values = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith(parts)}
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            **values,
        }
        self.rates = next(c.rates for c in trainer.callbacks if isinstance(c, Throughput))  # type: ignore[attr-defined]
        better = validated and self._better(self._score(values))
        self.history.append(row)
        self.stopped = trainer.should_stop
        if better:
            self.best_score, self.best_epoch = values[self.config.monitor], row["epoch"]
            trainer.save_checkpoint(self.run / BEST)
        if validated or self.interrupt.is_set():
            trainer.save_checkpoint(self.run / LAST)
        if trainer.is_global_zero:
            self.write_table()
            if self.lines:
                print(self._line(row, better), file=sys.stderr, flush=True)
        self._stop_if_interrupted()

    def write_table(self) -> None:
        """Write one row per epoch into the RUN."""
        text = io.StringIO()
        # Every epoch has the longest row's columns, but those of validation.
        columns = max((list(row) for row in self.history), key=len)
        writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        write_text(self.run / METRICS_TABLE, text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best_score": self.best_score,
            "stopped": self.stopped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]
        self.best_epoch, self.best_score = state_dict["best_epoch"], state_dict["best_score"]
        self.stopped = state_dict["stopped"]

    def _stop_if_interrupted(self) -> None:
        if self.interrupt.is_set():
            raise KeyboardInterrupt

    def _score(self, values: dict[str, float]) -> float:
        """The monitored value. Raises ValueError where it is unknown or not finite."""
        monitor = self.config.monitor
        if monitor not in values:
            raise ValueError(f"trainer.monitor is {monitor!r}, expected one of {sorted(values)}")
        if math.isnan(values[monitor]) and math.isfinite(values.get("val/loss", math.nan)):
            raise ValueError(
                f"{monitor} is not defined on these data, where all targets are alike, say; set "
                "--trainer.monitor val/loss, or validate on other data"
            )
        if not math.isfinite(values[monitor]):
            raise ValueError(
                f"{monitor} is {values[monitor]} after epoch {len(self.history) + 1}: training "
                "diverged; lower --optimizer.lr, lengthen --optimizer.warmup_epochs or set "
                "--trainer.precision fp32"
            )
        return values[monitor]

    def _better(self, score: float) -> bool:
        return score < self.best_score if self.config.mode == "min" else score > self.best_score

    def _line(self, row: dict[str, Any], better: bool) -> str:
        values = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if "/" in k)
        values += "".join(f"  {v:.3g} {k}/s" for k, v in self.rates.items() if k != "mfu")
        return f"epoch {row['epoch']}/{self.config.max_epochs}  {values}{'  *' if better else ''}"
