"""Any genome as data without labels, for masked or causal language models of DNA.

Dimensions: seqlen l (bases)
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from mamba2_apps.data import DataModule, Sample
from mamba2_apps.files import write_json
from mamba2_apps.genomics.annotations import read_features
from mamba2_apps.genomics.fasta import Genome, GenomeSet
from mamba2_apps.genomics.intervals import Feature
from mamba2_apps.genomics.preprocessing import (
    DNAPreprocessing,
    check_tokens,
    open_sequences,
    sequence_files,
)
from mamba2_apps.genomics.regions import (
    RegionNames,
    Windows,
    check_apart,
    check_chance,
    cut_share,
    parsed,
    shifted,
    whole,
    without,
)
from mamba2_apps.genomics.sequences import reverse_complement
from mamba2_apps.genomics.splits import PARTS, region_leakage
from mamba2_apps.genomics.tokenizers import (
    Tokenizer,
    TokenizerOptions,
    build_tokenizer,
    resolved_options,
)
from mamba2_apps.shards import find_files


class GenomeWindows(Dataset[Sample]):
    """Windows of genomes as token ids, with a weight for each: less where it is soft-masked.

    A base of N has no weight, since there is nothing to give back. A window is read from its file
    when it is asked for.
    """

    def __init__(
        self,
        genome: Genome,
        windows: Windows,
        tokenizer: Tokenizer,
        soft_mask_weight: float,
        shift: int,
    ) -> None:
        self.genome, self.windows, self.tokenizer = genome, windows, tokenizer
        self.soft_mask_weight, self.shift = soft_mask_weight, shift

    def __getitem__(self, index: int) -> Sample:
        window = self.windows[index]
        window = shifted(window, self.shift, *window.known)
        sequence = self.genome.fetch(window.contig, window.start, window.end)
        return weighted_tokens(sequence, self.tokenizer, self.soft_mask_weight)

    def __len__(self) -> int:
        return len(self.windows)


def weighted_tokens(sequence: str, tokenizer: Tokenizer, soft_mask_weight: float) -> Sample:
    """A sequence with its token ids (l,) and their weights (l,): less in lower case, 0 for N."""
    ids = tokenizer.encode(sequence)
    weights = torch.where(tokenizer.soft_mask(sequence), soft_mask_weight, 1.0)
    unknown = torch.tensor(["N" in word for word in [*tokenizer.vocabulary, ""]])
    return {
        "sequence": sequence,  # of which the other strand is made
        "inputs": ids,
        "weights": weights.masked_fill(unknown[ids], 0.0),
    }


class GenomeText(DataModule):
    """Windows of FASTA or GenBank files, split by contig or region.

    FASTA stays on disk, whatever its number of files and bases. Regions, and the annotation of
    `exclude`, name contigs as the files do; where two files have a contig of one name, it is
    FILE#CONTIG.

    Args:
        batch_size: windows per step.
        num_workers: processes that read and augment; 0 does it in the training process.
        paths: FASTA or GenBank files, folders of them, or patterns such as genomes/*.fa.gz and
            part-{000..127}.fa.
        regions: contigs or regions to take, such as chr2L or chr2R:1-1,000,000; null: everything.
        tokenizer: `kind` (base, kmer, bpe) and its options, of bpe the `path` of its file.
        window: bases per sample; a shorter contig is a sample of its own.
        shift: random shift of training windows, in bases either way.
        reverse_complement: chance that a training window is given as its other strand.
        soft_mask_weight: how much a base in lower case counts in the loss, as in GPN (Benegas et
            al. 2023); 1: as any other.
        test_regions: contigs or regions to test on, such as chr2L or chr2R:1-1,000,000; null: the
            last `held_share` of the bases.
        val_regions: such for choosing the epoch; null: the last `held_share` of what is left.
        held_share: part of the bases for each of both.
        exclude: annotation file whose features' bases are never seen, held-out genes say.
        exclude_margin: bases around those features that are not seen either.
    """

    def __init__(
        self,
        *,
        batch_size: int = 8,
        num_workers: int = 0,
        paths: list[str],
        regions: RegionNames | None = None,
        tokenizer: TokenizerOptions | None = None,
        window: int = 8192,
        shift: int = 0,
        reverse_complement: float = 0.0,
        soft_mask_weight: float = 1.0,
        test_regions: RegionNames | None = None,
        val_regions: RegionNames | None = None,
        held_share: float = 0.05,
        exclude: str | None = None,
        exclude_margin: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        if not paths:
            raise ValueError("data.paths is empty, expected FASTA or GenBank files")
        if not 0 < held_share < 0.5:
            raise ValueError(f"data.held_share is {held_share}, expected between 0 and 0.5")
        if soft_mask_weight < 0:
            raise ValueError(f"data.soft_mask_weight is {soft_mask_weight}, expected at least 0")
        check_chance("reverse_complement", reverse_complement)
        if window < 1:
            raise ValueError(f"data.window is {window}, expected at least 1")
        self.paths, self.tokenizer = paths, resolved_options(tokenizer or {"kind": "base"})
        if window < self.tokens.least:
            raise ValueError(
                f"data.window is {window}, expected at least the {self.tokens.least} bases of a "
                "word of data.tokenizer"
            )
        if shift and self.tokenizer["kind"] != "base":
            raise ValueError(f"data.shift is {shift}, which needs base tokens")
        self.window, self.shift, self.reverse_complement = window, shift, reverse_complement
        self.soft_mask_weight, self.held_share = soft_mask_weight, held_share
        self.taken = regions or []
        self.test_regions, self.val_regions = test_regions or [], val_regions or []
        self.exclude, self.exclude_margin = exclude, exclude_margin
        self.labels = []

    @cached_property
    def tokens(self) -> Tokenizer:
        return build_tokenizer(self.tokenizer)

    @property
    def preprocessing(self) -> DNAPreprocessing:
        return DNAPreprocessing(tokenizer=self.tokenizer)

    def prepare_model(self, model: nn.Module) -> None:
        check_tokens(self.preprocessing, model)

    def setup(self, stage: str) -> None:
        genome = GenomeSet([open_sequences(file) for file in self._files()])
        self.regions = self._regions_of_parts(dict(genome))
        sets = []
        for part in PARTS:
            windows = Windows(self.regions[part], self.window, genome)
            if not windows:
                raise ValueError(f"the genomes leave no bases for {part}")
            shift = self.shift if part == "train" else 0
            sets.append(GenomeWindows(genome, windows, self.tokens, self.soft_mask_weight, shift))
        self.train_set, self.val_set, self.test_set = sets

    def augment(self, sample: Sample) -> Sample:
        if self.reverse_complement and torch.rand(()) < self.reverse_complement:
            # The text is turned and not the tokens: byte pairs are others on the other strand.
            other = reverse_complement(sample["sequence"])
            sample = weighted_tokens(other, self.tokens, self.soft_mask_weight)
        return {name: value for name, value in sample.items() if name != "sequence"}

    def report(self, task: Any, folder: Path) -> None:
        write_json(folder / "leakage.json", region_leakage(self.regions, 0))

    def _files(self) -> list[str]:
        """The files of all paths, each once; an index that a pattern matches is none of them."""
        found = [path for pattern in self.paths for path in find_files(pattern)]
        found = [path for path in found if not path.endswith((".fai", ".gzi"))]
        if not found:
            raise ValueError(f"data.paths {self.paths} names indexes alone, expected FASTA files")
        return list(dict.fromkeys(file for path in found for file in sequence_files(path)))

    def _regions_of_parts(self, lengths: dict[str, int]) -> dict[str, list[Feature]]:
        test, val = (parsed(texts, lengths) for texts in (self.test_regions, self.val_regions))
        check_apart(test, val)
        rest = whole(lengths)
        if self.taken:  # as a difference, so that regions which overlap are taken once
            rest = without(rest, without(rest, parsed(self.taken, lengths)))
        rest = without(without(rest, test), val)
        if self.exclude is not None:
            holes = [self._wider(f, lengths) for f in read_features(self.exclude, lengths)]
            rest, test, val = (without(regions, holes) for regions in (rest, test, val))
        if not test:
            rest, test = cut_share(rest, self.held_share)
        if not val:
            rest, val = cut_share(rest, self.held_share)
        parts = {"train": rest, "val": val, "test": test}
        # A few bases between two features, or a contig of them, hold no overlapping word.
        least = self.tokens.least
        return {name: [r for r in part if len(r) >= least] for name, part in parts.items()}

    def _wider(self, feature: Feature, lengths: dict[str, int]) -> Feature:
        start = max(feature.start - self.exclude_margin, 0)
        end = min(feature.end + self.exclude_margin, lengths[feature.contig])
        return Feature(contig=feature.contig, start=start, end=end)
