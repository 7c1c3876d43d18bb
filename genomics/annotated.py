"""A genome with annotated genes as training data: labels for each base, on both strands.

Labels of a strand, each a column of its own, since they overlap:

    cds             in a coding region
    codon1..codon3  the same by the base's place in its codon, which tells a model of reading frames
    intron          between the blocks of a gene
    donor           the first base of an intron, in the gene's direction
    acceptor        the last base of an intron
    start, stop     the first base of a coding region, and its last, where it is complete

Columns go by strand: all of "+", then all of "-" ("donor+", …, "donor-"), so that a model of both
strands takes strand_pairs: halves.

Dimensions: seqlen l (bases) · labels k
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mamba2_apps.data import DataModule, Sample
from mamba2_apps.files import write_json
from mamba2_apps.genomics.annotations import (
    coding_part,
    genbank_genome,
    joined,
    read_features,
)
from mamba2_apps.genomics.fasta import Genome
from mamba2_apps.genomics.intervals import Feature
from mamba2_apps.genomics.preprocessing import DNAPreprocessing, check_tokens
from mamba2_apps.genomics.regions import (
    RegionNames,
    Window,
    Windows,
    check_apart,
    check_chance,
    cut_share,
    parsed,
    shifted,
    whole,
    without,
)
from mamba2_apps.genomics.splits import PARTS, region_copies, region_leakage

Target = Literal["cds", "codon", "intron", "donor", "acceptor", "start", "stop"]
CODON = ("codon1", "codon2", "codon3")
DECOY_BLOCK = 50
"""Bases that a decoy shuffles among themselves."""


def label_names(targets: Sequence[Target]) -> list[str]:
    """Names of the columns: those of "+", then those of "-"."""
    columns = [name for target in targets for name in (CODON if target == "codon" else [target])]
    return [f"{name}{strand}" for strand in "+-" for name in columns]


def paint(genes: Sequence[Feature], start: int, end: int, targets: Sequence[Target]) -> np.ndarray:
    """Labels (end - start, k) uint8 of a region, 1 where a gene has them.

    Args:
        genes: coding regions on its contig, with a strand each; their blocks are the exons.
        start: first base of the region, 0-based.
        end: the base after its last.
        targets: what to label.
    """
    names = label_names(targets)
    labels = np.zeros((end - start, len(names)), np.uint8)
    column = {name: index for index, name in enumerate(names)}

    def mark(first: int, last: int, name: str) -> None:
        labels[max(first - start, 0) : max(last - start, 0), column[name]] = 1

    for gene in genes:
        if gene.strand == "." or gene.start >= end or gene.end <= start:
            continue
        s, forward = gene.strand, gene.strand == "+"
        ends = (gene.start, gene.end - 1) if forward else (gene.end - 1, gene.start)
        gaps = [(first, last) for first, last in gene.gaps if first < end and last > start]
        complete = {"start": gene.has_start and not gene.phase, "stop": gene.has_stop}
        for target in targets:
            if target == "cds":
                for block in gene.blocks:
                    mark(*block, f"cds{s}")
            elif target == "codon":
                for position, places in _codon_places(gene, start, end):
                    labels[places, column[f"{CODON[position]}{s}"]] = 1
            elif target == "intron":
                for gap in gaps:
                    mark(*gap, f"intron{s}")
            elif target in ("donor", "acceptor"):
                for first, last in gaps:
                    at = first if (target == "donor") == forward else last - 1
                    mark(at, at + 1, f"{target}{s}")
            elif complete[target]:
                at = ends[0 if target == "start" else 1]
                mark(at, at + 1, f"{target}{s}")
    return labels


def _codon_places(gene: Feature, start: int, end: int) -> Iterator[tuple[int, slice]]:
    """(0 to 2, bases): those of a region, counted from its start, at the first, second and third
    place of their codons."""
    forward, before = gene.strand == "+", -gene.phase  # bases of the codons that came before
    for first, last in gene.blocks if forward else reversed(gene.blocks):
        low, high = max(first, start), min(last, end)
        if low < high:
            for base in range(low, min(low + 3, high)):
                place = before + (base - first if forward else last - 1 - base)
                yield place % 3, slice(base - start, high - start, 3)
        before += last - first


class AnnotatedWindows(Dataset[Sample]):
    """Windows of a genome with the labels of their bases.

    Targets are (l, k) float32, NaN outside what is known. A window moves by up to `shift` bases
    whenever it is read.
    """

    def __init__(
        self,
        genome: Genome,
        genes: Sequence[Feature],
        windows: Sequence[Window],
        targets: Sequence[Target],
        encode: Any,
        shift: int = 0,
    ) -> None:
        self.genome, self.windows, self.targets = genome, list(windows), targets
        self.encode, self.shift = encode, shift
        self.genes: dict[str, list[Feature]] = {}
        for gene in sorted(genes, key=lambda gene: gene.start):
            self.genes.setdefault(gene.contig, []).append(gene)
        self._spans = {
            contig: np.array([(gene.start, gene.end) for gene in genes])
            for contig, genes in self.genes.items()
        }

    def __getitem__(self, index: int) -> Sample:
        length = self.genome[self.windows[index].contig]
        window = shifted(self.windows[index], self.shift, 0, length)
        start, end = window.start, window.end
        genes = self._overlapping(window.contig, start, end)
        labels = paint(genes, start, end, self.targets).astype(np.float32)
        first, last = window.known
        labels[: max(first - start, 0)] = np.nan
        labels[max(last - start, 0) :] = np.nan
        sequence = self.genome.fetch(window.contig, start, end)
        return {"inputs": self.encode(sequence), "targets": torch.from_numpy(labels)}

    def __len__(self) -> int:
        return len(self.windows)

    def _overlapping(self, contig: str, start: int, end: int) -> list[Feature]:
        if contig not in self.genes:
            return []
        starts, ends = self._spans[contig].T
        genes = self.genes[contig]
        return [genes[i] for i in np.flatnonzero((starts < end) & (ends > start)).tolist()]


def shuffled_stretch(sample: Sample) -> Sample:
    """A window (l,) of which a random stretch has its bases shuffled, and labels (l, k) of 0 there.

    They are shuffled within blocks, so that a stretch keeps its composition from place to place.
    What is not known stays NaN.
    """
    ids, targets = sample["inputs"].clone(), sample["targets"].clone()
    length = int(torch.randint(len(ids) // 8, len(ids) // 2 + 1, ()))
    first = int(torch.randint(len(ids) - length + 1, ()))
    stretch = slice(first, first + length)
    order = (torch.arange(length) // DECOY_BLOCK + torch.rand(length)).argsort()
    ids[stretch] = ids[stretch][order]
    targets[stretch] = torch.where(targets[stretch].isnan(), torch.nan, 0.0)
    return {**sample, "inputs": ids, "targets": targets}


class AnnotatedGenome(DataModule):
    """Genes of a genome, as labels for each base of both strands.

    Args:
        batch_size: windows per step.
        num_workers: processes that read and augment; 0 does it in the training process.
        genome: FASTA file; null where `annotation` is GenBank with its sequence.
        annotation: GenBank, GFF3, GTF or BED file of coding regions; of BED's transcripts the
            coding part, from thickStart to thickEnd.
        test_annotation: such a file of genes for testing, where the split is by gene; null: by
            region.
        kind: features of GenBank, GFF3 or GTF that are coding regions.
        targets: what to label, see `mamba2_apps.genomics.annotated`.
        known: genes: labels are known from a gene's first to its last base only, since other genes
            may not be annotated; all: everywhere.
        test_regions: where to test, such as chr2R:1-100,000; with `known: all`, or to hold out
            genes that lie in them.
        val_regions: where to choose the epoch; null: the last `val_share` of what is left, or every
            so many-th stretch of genes.
        val_share: part of the training genes or bases that chooses the epoch.
        exclude: names of genes whose bases have no label, doubtful ones say.
        window: bases per sample.
        margin: bases around a gene that are given without labels.
        shift: random shift of training windows, in bases either way; beyond `margin` it may cut a
            gene's ends off.
        reverse_complement: chance that a training window is given as its other strand.
        decoys: chance that a stretch of a training window, an eighth to a half of it, has its bases
            shuffled within some 50 of them and no labels: composition alone makes no gene.
    """

    def __init__(
        self,
        *,
        batch_size: int = 8,
        num_workers: int = 0,
        genome: str | None = None,
        annotation: str,
        test_annotation: str | None = None,
        kind: str = "CDS",
        targets: list[Target],
        known: Literal["genes", "all"] = "all",
        test_regions: RegionNames | None = None,
        val_regions: RegionNames | None = None,
        val_share: float = 0.1,
        exclude: list[str] | None = None,
        window: int = 8192,
        margin: int = 500,
        shift: int = 0,
        reverse_complement: float = 0.0,
        decoys: float = 0.0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        if not 0 < val_share < 1:
            raise ValueError(f"data.val_share is {val_share}, expected between 0 and 1")
        if (test_annotation is None) == (not test_regions):
            raise ValueError("give either data.test_annotation or data.test_regions")
        if known == "all" and test_annotation is not None:
            raise ValueError("data.test_annotation splits by gene; that needs data.known genes")
        if window < 2 or shift < 0 or margin < 0:
            raise ValueError(
                f"data.window is {window}, data.shift {shift} and data.margin {margin}, expected "
                "at least 2, 0 and 0"
            )
        check_chance("reverse_complement", reverse_complement)
        check_chance("decoys", decoys)
        self.genome_path, self.annotation, self.test_annotation = (
            genome,
            annotation,
            test_annotation,
        )
        self.kind, self.targets, self.known = kind, targets, known
        self.test_regions, self.val_regions = test_regions or [], val_regions or []
        self.val_share, self.exclude = val_share, set(exclude or [])
        self.window, self.margin, self.shift = window, margin, shift
        self.reverse_complement, self.decoys = reverse_complement, decoys
        self.labels = label_names(targets)

    @property
    def preprocessing(self) -> DNAPreprocessing:
        return DNAPreprocessing(along=True, window=self.window)

    def prepare_model(self, model: nn.Module) -> None:
        check_tokens(self.preprocessing, model)

    def setup(self, stage: str) -> None:
        self.genome: Genome = (
            Genome(self.genome_path)
            if self.genome_path is not None
            else genbank_genome(self.annotation)
        )
        genes = self._read(self.annotation)
        unknown = self.exclude - {gene.name for gene in genes}
        if unknown:
            raise ValueError(f"data.exclude has {sorted(unknown)}, which {self.annotation} has not")
        self.regions = self._regions_of_parts(genes)
        if self.test_annotation is not None:
            genes = genes + self._read(self.test_annotation)
        encode = self.preprocessing.tokens.encode
        sets = []
        for part in PARTS:
            margin = self.margin if self.known == "genes" else 0
            windows = Windows(self.regions[part], self.window, self.genome, margin)
            if not windows:
                raise ValueError(
                    f"the data leave no {'gene' if self.known == 'genes' else 'region'} for {part}"
                )
            shift = self.shift if part == "train" else 0
            sets.append(AnnotatedWindows(self.genome, genes, windows, self.targets, encode, shift))
        self.train_set, self.val_set, self.test_set = sets

    def augment(self, sample: Sample) -> Sample:
        if self.reverse_complement and torch.rand(()) < self.reverse_complement:
            ids, targets = self._turned(sample["inputs"], sample["targets"])
            sample = {**sample, "inputs": ids, "targets": targets}
        if self.decoys and torch.rand(()) < self.decoys:
            sample = shuffled_stretch(sample)
        return sample

    def report(self, task: Any, folder: Path) -> None:
        write_json(folder / "leakage.json", self.leakage())

    def leakage(self) -> dict[str, Any]:
        """How many held-out regions lie beside one of training, or are copies of one."""
        report = region_leakage(self.regions, self.window)
        for key, found in region_copies(self.regions, self.genome, self.window).items():
            report[key] = report.get(key, {}) | found
        return report

    def _turned(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The other strand of a window, whose labels trade places by halves."""
        other = self.preprocessing.tokens.reverse_complement(ids)
        return other, targets.flip(0).roll(targets.shape[1] // 2, 1)

    def _read(self, path: str) -> list[Feature]:
        features = read_features(path, self.genome)
        kinds = {feature.kind for feature in features}
        if kinds == {""}:
            genes = [part for f in features if (part := coding_part(f)) is not None]
            if not genes:
                raise ValueError(f"{path} has no coding part: thickStart is thickEnd in every line")
        else:
            genes = joined(features, self.kind)
        if not genes:
            raise ValueError(f"{path} has no feature of kind {self.kind}; it has {sorted(kinds)}")
        self._check_strands(genes)
        return genes

    def _check_strands(self, genes: list[Feature]) -> None:
        """Raise ValueError for a gene that labels of a strand would leave out."""
        lost = [g for g in genes if g.strand == "." and g.name not in self.exclude]
        if lost:
            raise ValueError(
                f"{lost[0].where}: {len(lost)} coding regions, {lost[0].name or 'one'} say, are on "
                "no strand or on both, so that labels of a strand would leave them out; give their "
                "strand, or name them in data.exclude"
            )

    def _regions_of_parts(self, genes: list[Feature]) -> dict[str, list[Feature]]:
        """Stretches whose labels are known, by part of the data."""
        test, val = (parsed(texts, self.genome) for texts in (self.test_regions, self.val_regions))
        check_apart(test, val)
        if self.known == "all":
            rest = without(without(whole(self.genome), test), val)
            if not val:
                rest, val = cut_share(rest, self.val_share)
            holes = [gene for gene in genes if gene.name in self.exclude]
            parts = {"train": rest, "val": val, "test": test}
            return {name: without(regions, holes) for name, regions in parts.items()}
        genes = [gene for gene in genes if gene.name not in self.exclude]
        if self.test_annotation is not None:
            held = self._read(self.test_annotation)
        else:
            held = [gene for gene in genes if _overlaps(gene, test)]
            genes = [gene for gene in genes if not _overlaps(gene, test)]
        chosen = [gene for gene in genes if _overlaps(gene, val)] or _stretches(
            genes, self.val_share
        )
        names = {id(gene) for gene in chosen}
        return {"train": [g for g in genes if id(g) not in names], "val": chosen, "test": held}


def _overlaps(feature: Feature, regions: Sequence[Feature]) -> bool:
    return any(
        r.contig == feature.contig and r.start < feature.end and r.end > feature.start
        for r in regions
    )


def _stretches(genes: Sequence[Feature], share: float, together: int = 8) -> list[Feature]:
    """About `share` of the genes, in stretches of neighbours spread over the genome."""
    ordered = sorted(genes, key=lambda gene: (gene.contig, gene.start))
    every = max(2, round(1 / share))
    stretches = [ordered[i : i + together] for i in range(0, len(ordered), together)]
    return [gene for stretch in stretches[every // 2 :: every] for gene in stretch] or ordered[-1:]
