"""From sequences in files to batches of token ids; what a RUN keeps of it.

Dimensions: batch b · seqlen l (tokens) · labels k
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from Bio.Seq import Seq
from Bio.SeqRecord import SeqRecord
from torch import Tensor, nn

from mamba2_apps.data import Preprocessing, Sample, UnreadableInput, data_places
from mamba2_apps.genomics.annotations import GENBANK_SUFFIXES, genbank_genome
from mamba2_apps.genomics.fasta import (
    FASTA_SUFFIXES,
    FASTQ_SUFFIXES,
    Genome,
    MemoryGenome,
    read_fastq,
)
from mamba2_apps.genomics.tokenizers import Tokenizer, build_tokenizer
from mamba2_apps.genomics.variants import VCF_SUFFIXES

SUFFIXES = (*FASTA_SUFFIXES, *FASTQ_SUFFIXES, *GENBANK_SUFFIXES)
IGNORED_CLASS = -100


@dataclass(kw_only=True)
class DNAPreprocessing(Preprocessing):
    """A sequence, or a record `FILE#NAME` of FASTA, FASTQ or GenBank, to token ids (l,) int64.

    Args:
        tokenizer: `kind` (base, kmer, bpe) and its options.
        length: bases that every input must have; None: any number.
        along: targets are one for each token or bin, (l,) or (l, k), and are padded as inputs are.
        window: bases of a training sample that was cut from a genome; a scan gives a bidirectional
            model as many at once, since more can make its answers worse.
    """

    tokenizer: dict[str, Any] = field(default_factory=lambda: {"kind": "base"})
    length: int | None = None
    along: bool = False
    window: int | None = None

    suffixes: ClassVar[tuple[str, ...]] = (
        ".bed",
        ".gff3",
        ".bedgraph",
        ".bdg",
        ".bw",
        ".bigwig",
        ".vcf",
        ".tsv",
        ".png",
    )

    @cached_property
    def tokens(self) -> Tokenizer:
        return build_tokenizer(self.tokenizer)

    def find(self, source: str) -> list[str]:
        if "#" in source and not Path(source).exists():
            return [source]
        return [
            f"{path}#{name}" for path in sequence_files(source) for name in open_sequences(path)
        ]

    def units(self, batch: Sample) -> dict[str, int | float | Tensor]:
        name = "bases" if self.tokens.kind == "base" else "tokens"
        return {name: data_places(batch)}

    def example(self) -> Sample:
        """An input such as the model was trained on, for export."""
        bases = self.length or 128
        return {"inputs": self.tokens.encode(("ACGT" * (bases // 4 + 1))[:bases])}

    def __call__(self, item: Any) -> Tensor:
        sequence, where = self._sequence(item)
        if self.length is not None and len(sequence) != self.length:
            raise UnreadableInput(
                f"{where} has {len(sequence)} bases; this model was trained on {self.length} "
                "around a site, cut it so"
            )
        try:
            return self.tokens.encode(sequence)
        except ValueError as error:
            raise UnreadableInput(f"{where}: {error}") from error

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """Pad to the longest; "mask" (b, l) is True at tokens, and absent where none is padded."""
        lengths = torch.tensor([len(sample["inputs"]) for sample in samples])
        longest = int(lengths.max())
        batch: Sample = {"inputs": _padded([s["inputs"] for s in samples], longest, 0)}
        if bool((lengths < longest).any()):
            batch["mask"] = torch.arange(longest) < lengths[:, None]
        if "targets" in samples[0]:
            targets = [torch.as_tensor(sample["targets"]) for sample in samples]
            nothing = float("nan") if targets[0].is_floating_point() else IGNORED_CLASS
            widest = max(map(len, targets)) if self.along else 0
            batch["targets"] = (
                _padded(targets, widest, nothing) if self.along else torch.stack(targets)
            )
        if "weights" in samples[0]:
            batch["weights"] = _padded([s["weights"] for s in samples], longest, 0.0)
        return batch

    def answerer(
        self, sources: Sequence[str], *, output: Path | None, stream: bool
    ) -> Callable[..., Iterator[dict[str, Any]]] | None:
        """Variants of a VCF, tracks along a genome, or a mutagenesis map, by what is asked for."""
        # Imported where they are needed: they import this module.
        from mamba2_apps.genomics.mutagenesis import answerer as map_mutations
        from mamba2_apps.genomics.scan import answerer as scan
        from mamba2_apps.genomics.variant_effect import answerer as score_variants

        kind = output.suffix.lower() if output is not None else ""
        if output is not None and kind == ".gz" and output.stem.lower().endswith(self.suffixes):
            raise ValueError(
                f"{output}: nothing is written compressed; give {output.stem}, and compress that "
                "with bgzip"
            )
        if any(source.lower().endswith(VCF_SUFFIXES) for source in sources):
            return score_variants(self, sources, output)
        if kind == ".png":
            return map_mutations(self, sources, output)
        if stream or kind in (".bed", ".gff3", ".bedgraph", ".bdg", ".bw", ".bigwig"):
            return scan(self, sources, output, stream=stream)
        if kind in (".vcf", ".tsv"):
            raise ValueError(
                f"{output}: variants are written for a VCF; give one as INPUT, or another --output"
            )
        return None

    def _sequence(self, item: Any) -> tuple[str, str]:
        """Letters and name of what `find` gives, or of a Biopython object."""
        if isinstance(item, Seq):
            return str(item), "sequence"
        if isinstance(item, SeqRecord):
            return str(item.seq), f"record {item.id}"
        if not isinstance(item, str) or "#" not in item:
            raise UnreadableInput(
                f"{item!r} is no sequence; expected FILE#NAME, Bio.Seq.Seq or SeqRecord"
            )
        path, _, name = item.rpartition("#")
        records = open_sequences(path)
        if name not in records:
            raise UnreadableInput(f"{path} has no record {name!r}")
        return records.fetch(name), item


def check_tokens(preprocessing: DNAPreprocessing, model: nn.Module) -> None:
    """Raises ValueError where a model's adapter reads other tokens than the data give."""
    read: Tokenizer | None = getattr(getattr(model, "adapter", None), "tokenizer", None)
    given = preprocessing.tokens
    if read is not None and read != given:
        raise ValueError(
            f"model.adapter.tokenizer is {read.kind} of {read.size} ids, and data.tokenizer "
            f"{given.kind} of {given.size}; give both the same"
        )


def sequence_files(source: str) -> list[str]:
    """`source` itself when it is a file, or the sequence files below a folder, sorted.

    Raises ValueError that names the path when it does not exist or holds none.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(str(p) for p in path.rglob("*") if p.name.lower().endswith(SUFFIXES))
        if not found:
            raise ValueError(f"{source} holds no sequence files (expected {', '.join(SUFFIXES)})")
        return found
    if not path.exists():
        raise ValueError(
            f"{source} does not exist; expected FASTA, FASTQ, GenBank, VCF or a folder"
        )
    return [source]


def open_sequences(path: str) -> Genome:
    """The records of a FASTA, FASTQ or GenBank file; FASTA stays on disk.

    Reads of FASTQ, whose names need not differ, are numbered.
    """
    if not Path(path).is_file():
        raise UnreadableInput(f"{path} does not exist or is no file")
    return _opened(path, Path(path).stat().st_mtime)


@lru_cache(maxsize=8)
def _opened(path: str, changed: float) -> Genome:
    if path.lower().endswith(FASTQ_SUFFIXES):
        reads = {f"{i}:{r.name}": r.sequence for i, r in enumerate(read_fastq(path), 1)}
        return MemoryGenome(reads, path)
    return genbank_genome(path) if path.lower().endswith(GENBANK_SUFFIXES) else Genome(path)


def _padded(rows: Sequence[Tensor], length: int, value: float) -> Tensor:
    batch = rows[0].new_empty((len(rows), length, *rows[0].shape[1:]))
    for padded, row in zip(batch, rows, strict=True):
        padded[: len(row)] = row
        padded[len(row) :] = value
    return batch
