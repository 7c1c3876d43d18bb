"""VCF: reading small variants, checking them against the genome, writing their scores back.

VCF counts positions from 1; a `Variant` is 0-based half-open as everything else here.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import IO

from mamba2_apps.data import UnreadableInput
from mamba2_apps.genomics.fasta import Genome
from mamba2_apps.genomics.intervals import place, reconcile_contigs
from mamba2_apps.genomics.sequences import BASES, FIRST_BASE
from mamba2_apps.genomics.text_files import number, read_lines

VCF_SUFFIXES = (".vcf", ".vcf.gz", ".vcf.bgz")
_COLUMNS = ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO"]


@dataclass(frozen=True)
class Variant:
    """One alternative allele: the bases `ref` from `start` on are replaced by `alt`."""

    contig: str
    start: int
    ref: str
    alt: str
    where: str

    @property
    def end(self) -> int:
        return self.start + len(self.ref)


@dataclass(frozen=True)
class VcfLine:
    """A data line: its columns as they were, and a Variant for each allele that is bases.

    An allele such as <DEL>, * or a breakend is None.
    """

    fields: list[str]
    variants: list[Variant | None]


class VariantFile:
    """A VCF file, plain or compressed, checked against a genome as it is read.

    Args:
        path: the file.
        genome: reference that its positions count on.

    Iteration raises UnreadableInput, naming file, line and coordinate, for a line that is no VCF, a
    contig that the genome does not have, a position beyond its end, or a REF that disagrees. Where
    the genome has an ambiguity code, such as R for A or G, REF has its first base, as VCF 4.3 says.
    """

    def __init__(self, path: str | PathLike[str], genome: Genome) -> None:
        self.path, self.genome = fspath(path), genome
        self.header: list[str] = []
        self._names: dict[str, str] = {}
        line_number, line = 0, ""
        for line_number, line in read_lines(path):  # noqa: B007
            if not line.startswith("##"):
                break
            self.header.append(line)
        if line.split("\t")[:8] != _COLUMNS:
            raise UnreadableInput(
                f"{self.path}:{line_number}: expected the tab-separated header "
                f"{' '.join(_COLUMNS)} after the lines that begin with ##"
            )
        self.columns = line
        self.first_line = line_number + 1

    def __iter__(self) -> Iterator[VcfLine]:
        for line_number, line in read_lines(self.path):
            if line_number >= self.first_line and line.strip():
                yield self._read(line, f"{self.path}:{line_number}")

    def _read(self, line: str, where: str) -> VcfLine:
        fields = line.split("\t")
        if len(fields) < 8:
            raise UnreadableInput(
                f"{where}: {len(fields)} tab-separated columns, expected 8 or more"
            )
        name, ref = fields[0], fields[3].upper()
        if name not in self._names:
            try:
                self._names |= reconcile_contigs([name], self.genome, self.path, {name: where})
            except ValueError as error:
                raise UnreadableInput(str(error)) from error
        contig, position = self._names[name], number(fields[1], int, "POS", where)
        if not ref or set(ref) - set(BASES + "N"):
            raise UnreadableInput(f"{where}: REF is {fields[3]!r}, expected bases of {BASES} and N")
        start = position - 1
        if not 0 <= start <= self.genome[contig] - len(ref):
            raise UnreadableInput(
                f"{where}: {place(contig, start, start + len(ref))} is not within {contig}, which "
                f"has {self.genome[contig]:,} bases"
            )
        found = self.genome.fetch(contig, start, start + len(ref)).upper()
        # VCF allows no codes but N: writers reduce another one of the reference to its first base.
        if found.translate(FIRST_BASE) != ref:
            raise UnreadableInput(
                f"{where}: REF is {ref} but {self.genome.path} has {found} at "
                f"{place(contig, start, start + len(ref))}; is it of another assembly?"
            )
        alts = [alt.upper() for alt in fields[4].split(",")]
        return VcfLine(
            fields,
            [
                Variant(contig, start, ref, alt, where)
                if alt and not set(alt) - set(BASES)
                else None
                for alt in alts
            ],
        )


def write_vcf_header(source: VariantFile, scores: Mapping[str, str], file: IO[str]) -> None:
    """Write a VCF's header with an INFO line for each score, given its description.

    A line of an earlier score of that name goes, as the score does.
    """
    for line in source.header:
        if not line.startswith(tuple(f"##INFO=<ID={name}," for name in scores)):
            file.write(line + "\n")
    for name, description in scores.items():
        file.write(f'##INFO=<ID={name},Number=A,Type=Float,Description="{description}">\n')
    file.write(source.columns + "\n")


def write_vcf_line(
    line: VcfLine, scores: Mapping[str, Sequence[float | None]], file: IO[str]
) -> None:
    """Write a line with its scores, a value per allele, in INFO; None becomes a dot.

    They replace earlier scores of their names.
    """
    fields = list(line.fields)
    kept = [
        entry
        for entry in fields[7].split(";")
        if entry not in (".", "") and entry.partition("=")[0] not in scores
    ]
    added = [
        f"{name}={','.join('.' if v is None else f'{v:.6g}' for v in values)}"
        for name, values in scores.items()
    ]
    fields[7] = ";".join(kept + added)
    file.write("\t".join(fields) + "\n")


def write_tsv(rows: Iterable[Mapping[str, object]], file: IO[str]) -> None:
    """Write rows as tab-separated values; None is an empty cell."""
    writer = None
    for row in rows:
        cells = {key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()}
        if writer is None:
            writer = csv.DictWriter(file, list(cells), delimiter="\t", lineterminator="\n")
            writer.writeheader()
        writer.writerow(cells)
