"""What every domain's data shares: a contract between files and batches, and a reproducible order.

A domain subclasses `Preprocessing` (one file to one tensor, saved with the RUN) and `DataModule`
(labels and the three data sets). A sample is a dict with "inputs" (a tensor), "targets" where there
are labels, and "mask" where lengths differ; a batch is the same with a leading axis b.

Order and augmentation are functions of (seed, epoch, sample index) alone, so a run that was killed
continues as if it had not been, whatever the number of workers.
"""

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

Sample = dict[str, Any]


class UnreadableInput(ValueError):  # noqa: N818
    """One input cannot be read. The message names it and says what was expected."""

    def __init__(self, message: str) -> None:
        # A loader's worker hands its whole traceback on as the message, which ends with ours.
        super().__init__(message.rpartition("UnreadableInput: ")[2].strip())


@dataclass(kw_only=True)
class Preprocessing(ABC):
    """Turn one input into the tensor that the model was trained on; a dataclass of JSON values."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    """Endings of the output files that `answerer` writes itself."""

    @abstractmethod
    def find(self, source: str) -> list[str]:
        """Inputs under a path that a user gave: the file itself, or the files of a folder.

        Raises ValueError, naming the path, where there are none.
        """

    @abstractmethod
    def __call__(self, item: Any) -> Tensor:
        """Decode and normalise one input. Raises UnreadableInput."""

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """Stack samples into a batch."""
        return default_collate(list(samples))

    def units(self, batch: Sample) -> dict[str, int | float | Tensor]:
        """How much a batch holds beside samples, by what this domain counts; a name for each."""
        return {}

    def example(self) -> Sample:
        """An input of the usual shape, to trace a model with. Raises ValueError: there is none."""
        raise ValueError(
            f"{type(self).__name__} has no one shape of inputs to trace a graph with; "
            "--format safetensors exports the weights"
        )

    def answerer(
        self, sources: Sequence[str], *, output: Path | None, stream: bool
    ) -> Callable[..., Iterator[dict[str, Any]]] | None:
        """A domain's own way to answer these inputs; None: a batch at a time.

        It is a function of a task and of keyword options, which `predict` takes as `--key value`,
        typed by its signature. It yields rows, or writes `output` itself where that ends in one of
        `suffixes`.

        Args:
            sources: paths; "-" is standard input.
            output: the file to write; None: rows go to standard output.
            stream: answer while the input is being read.
        """
        if stream:
            raise ValueError(f"{type(self).__name__} reads no streams; leave out --stream")
        return None


def data_places(batch: Sample) -> int | Tensor:
    """Places of a batch's inputs (b, l) that are not padding."""
    return batch["mask"].sum() if "mask" in batch else batch["inputs"].numel()


class EpochSampler(Sampler[tuple[int, int]]):
    """Yield (epoch, index) keys in an order that only the seed and the epoch decide.

    Args:
        size: samples in the data set.
        seed: seed of the run.
        epoch: first epoch, and `skip` the samples of it that all ranks together have already seen.
        rank: which of `world_size` disjoint shares to yield.
        weights: (size,) how often each sample is drawn, with replacement; None: each one once.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        epoch: int = 0,
        skip: int = 0,
        rank: int = 0,
        world_size: int = 1,
        weights: np.ndarray | None = None,
    ) -> None:
        self.size, self.seed, self.epoch, self.skip = size, seed, epoch, skip
        self.shares = None if weights is None else weights / weights.sum()
        self.rank, self.world_size = rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch; a resumed epoch keeps its place."""
        if epoch != self.epoch:
            self.epoch, self.skip = epoch, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        if self.shares is None:
            order = generator.permutation(self.size)
        else:
            order = generator.choice(self.size, self.size, p=self.shares)
        # Strided, so that the ranks together go through the order from its beginning, whatever
        # their number: a run resumes at the exact sample with another number of them.
        rest = order[self.skip :]
        each = len(rest) // self.world_size
        for index in rest[self.rank :: self.world_size][:each]:
            yield self.epoch, int(index)

    def __len__(self) -> int:
        return self.size // self.world_size


class ShardedBatches(Sampler[list[int]]):
    """Batches of indices in order, each sample on one rank, as many batches on every rank.

    The number must be equal: a rank without a batch would leave the others waiting where a sharded
    model gathers its weights. A batch may hold one sample more than batch_size.
    """

    def __init__(self, size: int, batch_size: int, *, rank: int, world_size: int) -> None:
        if size < world_size:
            raise ValueError(f"{size} samples for {world_size} processes; use fewer processes")
        self.share = range(rank, size, world_size)
        most = -(-size // world_size)
        self.count = min(-(-most // batch_size), size // world_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in np.array_split(np.array(self.share), self.count):
            yield batch.tolist()

    def __len__(self) -> int:
        return self.count


class AugmentedDataset(Dataset[Sample]):
    """Apply `augment` with every random generator seeded by (seed, epoch, index).

    Transforms of torchvision, timm and others draw from the global generators of torch, numpy and
    Python: seeding these per sample makes any of them reproducible.
    """

    def __init__(
        self, dataset: Dataset[Sample], augment: Callable[[Sample], Sample], seed: int
    ) -> None:
        self.dataset, self.augment, self.seed = dataset, augment, seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        seed_generators(self.seed, epoch, index)
        return self.augment(self.dataset[index])

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


class DataModule(LightningDataModule, ABC):
    """Data of one recipe. A subclass fills `labels`, `train_set`, `val_set`, `test_set` in `setup`.

    Nothing is read before `setup`, so that a RUN predicts without its training data.

    Args:
        batch_size: samples per step and device.
        num_workers: processes that read and augment; 0 does it in the training process.
        balanced: draw every class equally often while training, with replacement.
    """

    seed: int = 0
    """Decides order and augmentation; it is the recipe's `seed`. Splits do not use it."""

    batch_counts = "samples"
    """What `batch_size` counts."""

    labels: list[str]
    train_set: Dataset[Sample]
    val_set: Dataset[Sample]
    test_set: Dataset[Sample]

    def __init__(
        self, *, batch_size: int = 64, num_workers: int = 0, balanced: bool = False
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size is {batch_size}, expected at least 1")
        self.batch_size, self.num_workers, self.balanced = batch_size, num_workers, balanced
        self._epoch, self._samples_done = 0, 0

    @property
    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """What prediction must do to its inputs."""

    def augment(self, sample: Sample) -> Sample:
        """Random changes of one training sample, drawn from the global generators."""
        return sample

    def mix(self, batch: Sample) -> Sample:
        """Random changes of a training batch on its device, such as mixup.

        Drawn from the global generators. Targets may become probabilities (b, k).
        """
        return batch

    @property
    def evaluation_batch_size(self) -> int:
        """Samples per step and device of validation and test."""
        return self.batch_size

    def units(self, batch: Sample) -> dict[str, int | float | Tensor]:
        """How much a batch holds, by what is counted: "samples", and a domain's own units."""
        return {"samples": len(batch["inputs"]), **self.preprocessing.units(batch)}

    def class_of_samples(self) -> np.ndarray:
        """Class index (n,) of each training sample, for what balances classes."""
        raise ValueError(
            f"{type(self).__name__} has no one class per sample to balance; leave data.balanced "
            "and task.class_weights out"
        )

    def prepare_model(self, model: nn.Module) -> None:
        """Give a new model what it takes from the training data, such as feature statistics.

        Weights that training starts from, and those of a checkpoint, are loaded afterwards.
        """

    def findings(self) -> dict[str, Any] | None:
        """What `setup` found in the data, as JSON values for a RUN's data.json; None: no file."""
        return None

    def report(self, task: Any, folder: Path) -> None:
        """Draw what people of this domain look at after the last test into a RUN."""

    def baselines(self) -> dict[str, dict[str, float]]:
        """Test metrics of simple models on the same split, by name: what to beat."""
        return {}

    def epoch_sampler(self) -> EpochSampler:
        """This rank's order of the training samples, from the place where a resumed run is."""
        rank, world_size = self._place_among_ranks()
        return EpochSampler(
            len(self.train_set),  # type: ignore[arg-type]
            seed=self.seed,
            epoch=self._epoch,
            skip=self._samples_done,
            rank=rank,
            world_size=world_size,
            weights=self._balancing_weights() if self.balanced else None,
        )

    def train_dataloader(self) -> DataLoader[Sample]:
        sampler = self.epoch_sampler()
        dataset = AugmentedDataset(self.train_set, self.augment, self.seed)
        # A last, smaller batch would weigh its samples more; it is kept only where it is the first.
        return self._loader(
            dataset,
            sampler=sampler,
            batch_size=self.batch_size,
            drop_last=len(sampler) >= self.batch_size,
        )

    def _balancing_weights(self) -> np.ndarray:
        classes = self.class_of_samples()
        return 1 / np.bincount(classes)[classes]

    def val_dataloader(self) -> DataLoader[Sample]:
        return self._evaluation_loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Sample]:
        return self._evaluation_loader(self.test_set)

    def evaluation_batches(self, size: int, rank: int, world_size: int) -> Iterable[list[int]]:
        """Indices of this rank's batches of a data set that is gone through in order."""
        return ShardedBatches(size, self.evaluation_batch_size, rank=rank, world_size=world_size)

    def batches_done(self) -> int:
        """Batches of the epoch to resume that this rank need not see again."""
        return self._samples_done // (self.batch_size * self._place_among_ranks()[1])

    def _place_among_ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _evaluation_loader(self, dataset: Dataset[Sample]) -> DataLoader[Sample]:
        rank, world_size = self._place_among_ranks()
        if world_size == 1:
            return self._loader(dataset, batch_size=self.evaluation_batch_size)
        size: int = len(dataset)  # type: ignore[arg-type]
        batches = list(self.evaluation_batches(size, rank, world_size))
        return self._loader(dataset, batch_sampler=batches)

    def _loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Sample]:
        options.setdefault("collate_fn", self.preprocessing.collate)
        return DataLoader(
            dataset,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: an iterator draws one number, which must not move the global one.
            generator=torch.Generator().manual_seed(self.seed),
            **options,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the trainer, some of whose callbacks cannot be pickled: where workers are not
        forked (macOS, Windows, Python 3.14) each gets a copy of what augments its samples."""
        return self.__dict__ | {"trainer": None}

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, saved with every checkpoint."""
        loop = self.trainer.fit_loop  # type: ignore[union-attr]
        done = loop.epoch_loop.batch_progress.current.ready % self.trainer.num_training_batches  # type: ignore[union-attr]
        epoch = loop.epoch_progress.current.processed  # type: ignore[union-attr]
        samples = int(done) * self.batch_size * self._place_among_ranks()[1]
        return {"epoch": epoch, "samples_done": samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._epoch, self._samples_done = state_dict["epoch"], state_dict["samples_done"]


def seed_generators(*key: int) -> int:
    """Seed the CPU generators of torch, numpy and Python from non-negative integers.

    Returns the one seed made of them.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


def check_unique(names: Sequence[str], what: str) -> None:
    """Raises ValueError where a name comes twice: an answer, a dict, would keep one of the two."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            f"{what}: {', '.join(map(repr, twice))} comes more than once, expected each name once"
        )


def files_under(source: str, suffixes: Sequence[str], what: str) -> list[str]:
    """`source` itself when it is a file, or every file below it with one of `suffixes`, sorted.

    Names that start with a dot, of folders too, are what other programs keep for themselves, such
    as .ipynb_checkpoints, and are passed over.

    Raises ValueError that names the path when it does not exist or holds none.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(
            str(p)
            for p in path.rglob("*")
            if p.suffix.lower() in suffixes
            and not any(part.startswith(".") for part in p.relative_to(path).parts)
        )
        if not found:
            raise ValueError(f"{source} holds no {what} (expected {', '.join(suffixes)})")
        return found
    if not path.exists():
        raise ValueError(f"{source} does not exist; expected {what} or a folder of them")
    return [source]
