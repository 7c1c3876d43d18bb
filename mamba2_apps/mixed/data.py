"""Data of several domains, a batch from one of them at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mamba2_apps.data import AugmentedDataset, DataModule, EpochSampler, Preprocessing, Sample

Key = tuple[str, Any]
"""A part's name, and the key of one of its samples."""


@dataclass(kw_only=True)
class MixedPreprocessing(Preprocessing):
    """A RUN of several domains gives a backbone, and answers no files.

    Args:
        parts: names of the domains' data.
    """

    parts: list[str] = field(default_factory=list)

    def find(self, source: str) -> list[str]:
        raise ValueError(
            f"a RUN that mixes {', '.join(self.parts)} answers no questions; start another from "
            "it: mamba2-apps train RECIPE --backbone RUN"
        )

    def __call__(self, item: Any) -> Tensor:
        raise AssertionError("find refuses every input")


class Mixed(DataModule):
    """Batches of several data modules in turn, each as often as the others.

    An epoch is a number of batches. Each part goes through its own data again and again, as often
    as that takes; its batch size and its augmentation are its own. A batch has "part", the name.

    Args:
        parts: data modules by name.
        batches_per_epoch: of all parts together, on each device.
        num_workers: processes that read and augment; 0 does it in the training process.
    """

    batch_counts = "batches of one part"

    def __init__(
        self, *, parts: dict[str, DataModule], batches_per_epoch: int, num_workers: int = 0
    ) -> None:
        super().__init__(batch_size=1, num_workers=num_workers)  # a batch of a part counts as one
        if batches_per_epoch < len(parts):
            raise ValueError(
                f"data.batches_per_epoch is {batches_per_epoch}, expected at least one for each of "
                f"{', '.join(parts)}"
            )
        self.parts, self.batches_per_epoch = parts, batches_per_epoch
        self.labels = []

    @property
    def preprocessing(self) -> MixedPreprocessing:
        return MixedPreprocessing(parts=list(self.parts))

    def prepare_data(self) -> None:
        for part in self.parts.values():
            part.prepare_data()

    def setup(self, stage: str) -> None:
        for part in self.parts.values():
            part.seed = self.seed
            part.setup(stage)

    def findings(self) -> dict[str, Any] | None:
        found = {name: part.findings() for name, part in self.parts.items()}
        return {name: told for name, told in found.items() if told is not None} or None

    def prepare_model(self, model: Any) -> None:
        for name, part in self.parts.items():
            part.prepare_model(model.parts[name])

    def mix(self, batch: Sample) -> Sample:
        return self.parts[batch["part"]].mix(batch)

    def units(self, batch: Sample) -> dict[str, int | float | Tensor]:
        return self.parts[batch["part"]].units(batch)

    def train_dataloader(self) -> DataLoader[Sample]:
        rank, world_size = self._place_among_ranks()
        batches = TurnSampler(
            {name: (len(part.train_set), part.batch_size) for name, part in self.parts.items()},  # type: ignore[arg-type]
            self.batches_per_epoch,
            seed=self.seed,
            epoch=self._epoch,
            skip=self.batches_done(),
            rank=rank,
            world_size=world_size,
        )
        sets: dict[str, Dataset[Sample]] = {
            name: AugmentedDataset(part.train_set, part.augment, self.seed)
            for name, part in self.parts.items()
        }
        return self._loader(PartsDataset(sets), batch_sampler=batches, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader[Sample]:
        return self._in_order({name: part.val_set for name, part in self.parts.items()})

    def test_dataloader(self) -> DataLoader[Sample]:
        return self._in_order({name: part.test_set for name, part in self.parts.items()})

    def collate(self, samples: Sequence[tuple[str, Sample]]) -> Sample:
        """A batch of one part, with its name."""
        name = samples[0][0]
        batch = self.parts[name].preprocessing.collate([sample for _, sample in samples])
        return {**batch, "part": name}

    def _in_order(self, sets: dict[str, Dataset[Sample]]) -> DataLoader[Sample]:
        rank, world_size = self._place_among_ranks()
        batches: list[list[Key]] = []
        for name, dataset in sets.items():
            part = self.parts[name]
            size: int = len(dataset)  # type: ignore[arg-type]
            for indices in part.evaluation_batches(size, rank, world_size):
                batches.append([(name, index) for index in indices])
        return self._loader(PartsDataset(sets), batch_sampler=batches, collate_fn=self.collate)


class PartsDataset(Dataset[tuple[str, Sample]]):
    """Samples of several data sets by (name, key), each with the name."""

    def __init__(self, sets: dict[str, Dataset[Sample]]) -> None:
        self.sets = sets

    def __getitem__(self, key: Key) -> tuple[str, Sample]:
        name, inner = key
        return name, self.sets[name][inner]

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.sets.values())  # type: ignore[arg-type, misc]


class TurnSampler(Sampler[list[Key]]):
    """Batches of keys, from each part once in every turn, the turn's order drawn anew.

    Which batch stands where is a function of the seed and the number of batches since the first
    epoch began: a part's n-th batch is the same whatever the epochs' length.

    Args:
        parts: number of samples and batch size of each, by name.
        batches_per_epoch: of all parts together, on each rank.
        seed: seed of the run.
        epoch: first epoch, and `skip` the batches of it that were already seen.
        rank: which of `world_size` disjoint shares of each part to yield.
    """

    def __init__(
        self,
        parts: dict[str, tuple[int, int]],
        batches_per_epoch: int,
        *,
        seed: int,
        epoch: int = 0,
        skip: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, (size, batch_size) in parts.items():
            if size < batch_size * world_size:
                raise ValueError(
                    f"data.parts.{name} has {size} training samples, expected at least a batch of "
                    f"{batch_size} for each of {world_size} processes"
                )
        self.parts, self.batches_per_epoch, self.seed = parts, batches_per_epoch, seed
        self.epoch, self.skip, self.rank, self.world_size = epoch, skip, rank, world_size

    @property
    def sampler(self) -> "TurnSampler":
        return self  # Lightning sets the epoch of a batch sampler's sampler only

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch; a resumed epoch keeps its place."""
        if epoch != self.epoch:
            self.epoch, self.skip = epoch, 0

    def __iter__(self) -> Iterator[list[Key]]:
        names, first = list(self.parts), self.epoch * self.batches_per_epoch
        cache: dict[str, tuple[int, list[tuple[int, int]]]] = {}
        for place in range(first + self.skip, first + self.batches_per_epoch):
            turn, which = divmod(place, len(names))
            order = np.random.default_rng([self.seed, turn]).permutation(len(names))
            name = names[order[which]]
            yield [(name, key) for key in self._batch(name, turn, cache)]

    def __len__(self) -> int:
        return self.batches_per_epoch

    def _batch(
        self, name: str, number: int, cache: dict[str, tuple[int, list[tuple[int, int]]]]
    ) -> list[tuple[int, int]]:
        """The keys of a part's batch of that number, counted over all its cycles."""
        size, batch_size = self.parts[name]
        cycle, place = divmod(number, size // (batch_size * self.world_size))
        if name not in cache or cache[name][0] != cycle:
            sampler = EpochSampler(
                size, seed=self.seed, epoch=cycle, rank=self.rank, world_size=self.world_size
            )
            cache[name] = cycle, list(sampler)
        return cache[name][1][place * batch_size : (place + 1) * batch_size]
