"""A measured track along a genome, RNA-seq coverage say, as targets for regression.

Dimensions: seqlen l (bases) · tracks k
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from mamba2_apps.data import DataModule, Sample, check_unique
from mamba2_apps.files import write_json
from mamba2_apps.genomics.fasta import Genome
from mamba2_apps.genomics.intervals import Feature
from mamba2_apps.genomics.preprocessing import DNAPreprocessing, check_tokens, open_sequences
from mamba2_apps.genomics.regions import (
    RegionNames,
    Window,
    Windows,
    check_apart,
    check_chance,
    cut_share,
    parsed,
    whole,
    without,
)
from mamba2_apps.genomics.splits import PARTS, region_leakage
from mamba2_apps.genomics.tracks import read_track


class TrackWindows(Dataset[Sample]):
    """Windows of a genome with (l / bin_size, k) float32 means of tracks, NaN where not known."""

    def __init__(
        self,
        genome: Genome,
        windows: list[Window],
        values: dict[tuple[str, int], np.ndarray],
        bin_size: int,
        encode: Any,
    ) -> None:
        self.genome, self.windows, self.values = genome, windows, values
        self.bin_size, self.encode = bin_size, encode

    def __getitem__(self, index: int) -> Sample:
        w = self.windows[index]
        values = self.values[w.contig, w.known[0]][w.start - w.known[0] : w.end - w.known[0]]
        bins = values.reshape(-1, self.bin_size, values.shape[1]).mean(1)
        sequence = self.genome.fetch(w.contig, w.start, w.end)
        return {"inputs": self.encode(sequence), "targets": torch.from_numpy(bins)}

    def __len__(self) -> int:
        return len(self.windows)


class Coverage(DataModule):
    """Tracks along a genome, in bins, split by region.

    Args:
        batch_size: windows per step.
        num_workers: processes that read and augment; 0 does it in the training process.
        genome: FASTA or GenBank file.
        tracks: bigWig, wiggle or bedGraph files, one per output.
        names: their names; null: the files'.
        regions: where the tracks were measured, such as chr2R:7,000,001-8,000,000; null: all.
        test_regions: where to test; null: the last `held_share` of the bases.
        val_regions: where to choose the epoch; null: the last `held_share` of what is left.
        held_share: part of the bases for each of both.
        missing: value of bases that a file does not name, 0 for counts; null: not known.
        window: bases per sample, a multiple of bin_size.
        bin_size: bases per value, as the head's.
        reverse_complement: chance that a training window is given as its other strand, for tracks
            without a strand.
    """

    def __init__(
        self,
        *,
        batch_size: int = 8,
        num_workers: int = 0,
        genome: str,
        tracks: list[str],
        names: list[str] | None = None,
        regions: RegionNames | None = None,
        test_regions: RegionNames | None = None,
        val_regions: RegionNames | None = None,
        held_share: float = 0.1,
        missing: float | None = 0.0,
        window: int = 8192,
        bin_size: int = 1,
        reverse_complement: float = 0.0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        if not tracks or (names is not None and len(names) != len(tracks)):
            raise ValueError(
                f"data.tracks is {tracks} and data.names {names}, expected one name each"
            )
        if bin_size < 1 or window % bin_size:
            raise ValueError(
                f"data.window is {window}, expected a multiple of data.bin_size, {bin_size}"
            )
        if not 0 < held_share < 0.5:
            raise ValueError(f"data.held_share is {held_share}, expected between 0 and 0.5")
        check_chance("reverse_complement", reverse_complement)
        self.genome_path, self.tracks = genome, tracks
        self.labels = names or [Path(track).name.split(".")[0] for track in tracks]
        check_unique(self.labels, "data.names" if names else "data.names (null, from data.tracks)")
        self.measured = regions or []
        self.test_regions, self.val_regions = test_regions or [], val_regions or []
        self.held_share, self.missing = held_share, missing
        self.window, self.bin_size = window, bin_size
        self.reverse_complement = reverse_complement

    @property
    def preprocessing(self) -> DNAPreprocessing:
        return DNAPreprocessing(along=True, window=self.window)

    def prepare_model(self, model: nn.Module) -> None:
        check_tokens(self.preprocessing, model)

    def setup(self, stage: str) -> None:
        genome = open_sequences(self.genome_path)
        rest = whole(genome)
        if self.measured:  # as a difference, so that regions which overlap are taken once
            rest = without(rest, without(rest, parsed(self.measured, genome)))
        test, val = (parsed(texts, genome) for texts in (self.test_regions, self.val_regions))
        check_apart(test, val)
        rest = without(without(rest, test), val)
        if not test:
            rest, test = cut_share(rest, self.held_share)
        if not val:
            rest, val = cut_share(rest, self.held_share)
        self.regions = {"train": rest, "val": val, "test": test}
        for name, regions in self.regions.items():
            if not regions:
                raise ValueError(f"the regions leave no bases for {name}")
        self.train_set, self.val_set, self.test_set = (
            self._part(genome, [self._whole_bins(r) for r in self.regions[part]]) for part in PARTS
        )

    def augment(self, sample: Sample) -> Sample:
        if self.reverse_complement and torch.rand(()) < self.reverse_complement:
            ids = self.preprocessing.tokens.reverse_complement(sample["inputs"])
            sample = {"inputs": ids, "targets": sample["targets"].flip(0)}
        return sample

    def report(self, task: Any, folder: Path) -> None:
        write_json(folder / "leakage.json", region_leakage(self.regions, self.window))

    def baselines(self) -> dict[str, dict[str, float]]:
        """The mean of each training track everywhere."""
        train, test = (
            np.concatenate([sample["targets"].numpy() for sample in part])  # type: ignore[attr-defined]
            for part in (self.train_set, self.test_set)
        )
        error = test - np.nanmean(train, 0)
        mae, rmse = np.nanmean(np.abs(error)), np.sqrt(np.nanmean(error**2))
        return {"training mean": {"mae": float(mae), "rmse": float(rmse)}}

    def _whole_bins(self, region: Feature) -> Feature:
        size = len(region) - len(region) % self.bin_size
        if not size:
            raise ValueError(f"a region of {len(region)} bases holds no bin of {self.bin_size}")
        return Feature(contig=region.contig, start=region.start, end=region.start + size)

    def _part(self, genome: Genome, regions: list[Feature]) -> TrackWindows:
        values = {}
        for r in regions:
            columns = [read_track(t, genome, r.contig, r.start, r.end) for t in self.tracks]
            read = np.stack(columns, 1)
            values[r.contig, r.start] = (
                read if self.missing is None else np.nan_to_num(read, nan=self.missing)
            )
        windows = [
            Window(w.contig, start, start + size, w.known)
            for w in Windows(regions, self.window, genome)
            for start, size in [self._on_grid(w)]
        ]
        return TrackWindows(
            genome, windows, values, self.bin_size, self.preprocessing.tokens.encode
        )

    def _on_grid(self, window: Window) -> tuple[int, int]:
        """Start and size of a window on its region's grid of bins."""
        offset = window.start - window.known[0]
        start = window.known[0] + offset - offset % self.bin_size
        return start, (window.end - window.start) // self.bin_size * self.bin_size
