"""Places on a genome, in one convention: 0-based, half-open, on the forward strand's coordinates.

Every reader converts its format to this and every writer back. A message to people gives places as
genome browsers do, counted from 1 with both ends included: `chr2R:2,024,932-2,025,830`.
"""

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Strand = Literal["+", "-", "."]


@dataclass(frozen=True, kw_only=True)
class Feature:
    """Something on a genome: a gene, a peak, a coding region of several blocks.

    Args:
        contig: name of the sequence it lies on.
        start: first base, counted from 0.
        end: the base after its last one.
        strand: "+", "-", or "." where it has none.
        name: what the file calls it; empty where it does not.
        kind: such as CDS or gene; empty where the format has none.
        score: as in the file; None where there is none.
        blocks: its parts (start, end) from left to right, such as exons; one where it has no parts.
            They overlap where a frame shifts.
        attributes: what else the file says, by name.
        where: file and line, for messages.
        has_start: whether it begins at its first base, in its own direction; an incomplete gene
            (GenBank's < and >) does not.
        has_stop: whether it ends at its last base.
    """

    contig: str
    start: int
    end: int
    strand: Strand = "."
    name: str = ""
    kind: str = ""
    score: float | None = None
    blocks: tuple[tuple[int, int], ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    where: str = ""
    has_start: bool = True
    has_stop: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(
                f"{self.where}: {self.contig} from {self.start} to {self.end} (0-based, half-open) "
                "holds no base; expected 0 <= start < end"
            )
        if self.strand not in ("+", "-", "."):
            raise ValueError(f"{self.where}: strand is {self.strand!r}, expected +, - or .")
        blocks = tuple(self.blocks) or ((self.start, self.end),)
        spans = blocks[0][0] == self.start and max(end for _, end in blocks) == self.end
        if not spans or list(blocks) != sorted(blocks) or any(a >= b for a, b in blocks):
            raise ValueError(
                f"{self.where}: blocks {blocks} do not go from start {self.start} to end "
                f"{self.end}, from left to right"
            )
        object.__setattr__(self, "blocks", blocks)

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def phase(self) -> int:
        """Bases before its first whole codon, which GFF and GenBank's codon_start give."""
        return int(self.attributes.get("phase", "0"))

    @property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """What lies between its blocks, such as introns, (start, end) from left to right."""
        pairs = zip(self.blocks, self.blocks[1:], strict=False)
        return tuple((a[1], b[0]) for a, b in pairs if a[1] < b[0])


def place(contig: str, start: int, end: int | None = None) -> str:
    """A 0-based half-open place as browsers write it; without `end`, one base."""
    last = start + 1 if end is None else end
    return f"{contig}:{start + 1:,}" + ("" if last == start + 1 else f"-{last:,}")


def parse_region(text: str, lengths: Mapping[str, int]) -> tuple[str, int, int]:
    """(contig, start, end), 0-based half-open, of `chr2R` or `chr2R:1,001-2,000`.

    Raises ValueError where the contig is not among `lengths`, or the region runs beyond it.
    """
    match = re.fullmatch(r"(.+?)(?::([\d,]+)-([\d,]+))?", text)
    assert match is not None or not text
    contig = match[1] if match else ""
    if text in lengths:  # a name may hold a colon
        contig, match = text, None
    if contig not in lengths:
        raise ValueError(f"region {text!r}: {unknown_contig(contig, lengths)}")
    if match is None or match[2] is None:
        return contig, 0, lengths[contig]
    start, end = (int(number.replace(",", "")) for number in (match[2], match[3]))
    if not 1 <= start <= end <= lengths[contig]:
        raise ValueError(
            f"region {text!r}: {contig} has the bases 1-{lengths[contig]:,}; expected "
            "CONTIG:FIRST-LAST, counted from 1"
        )
    return contig, start - 1, end


def unknown_contig(name: str, known: Iterable[str]) -> str:
    """The part of a sentence that says that the genome has no such contig, and which are near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
    return f"the genome has no contig {name!r}; it has {', '.join(near)}" + (
        f" and {len(known) - len(near)} more" if len(known) > len(near) else ""
    )


def reconcile_contigs(
    names: Iterable[str],
    known: Iterable[str],
    what: str,
    where: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """What the genome calls each of the contigs that a file names.

    `chr1` and `1`, `chrM` and `MT`, and `NC_1` and `NC_1.1` (GenBank's LOCUS has no version) are
    taken for the same, with a warning that names them.

    Args:
        names: contigs of the file.
        known: contigs of the genome.
        what: the file, for messages.
        where: file and line of a name, where a message can be more precise than `what`.

    Raises ValueError for a contig that the genome does not have.
    """
    names, known, found, renamed = dict.fromkeys(names), set(known), {}, {}
    by_accession: dict[str, list[str]] = {}
    for name in () if known.issuperset(names) else known:
        by_accession.setdefault(_accession(name), []).append(name)
    for name in names:
        match = _match(name, known, by_accession)
        if match is None:
            raise ValueError(f"{(where or {}).get(name, what)}: {unknown_contig(name, known)}")
        found[name] = match
        if match != name:
            renamed[name] = match
    if renamed:
        pairs = ", ".join(f"{name} for {match}" for name, match in list(renamed.items())[:3])
        pairs += f" and {len(renamed) - 3} more" if len(renamed) > 3 else ""
        warnings.warn(f"{what} names contigs otherwise than the genome: took {pairs}", stacklevel=2)
    return found


def _match(name: str, known: set[str], by_accession: Mapping[str, list[str]]) -> str | None:
    """The genome's name of a contig; None: it has none, or an accession in several versions."""
    if name in known:
        return name
    bare = name.removeprefix("chr")
    others = [bare, f"chr{bare}"] + (["MT", "chrM"] if bare in ("M", "MT") else [])
    accession = _accession(name)
    versions = [accession] if accession != name else by_accession.get(name, [])
    if len(versions) == 1:  # of two versions, one is another sequence
        others += versions
    return next((other for other in others if other in known), None)


def _accession(name: str) -> str:
    """A name without the version that follows an accession, such as the .1 of NC_000117.1."""
    match = re.fullmatch(r"([A-Z]+_?[A-Z]*\d+)\.\d+", name)
    return match[1] if match else name


def check_bounds(features: Iterable[Feature], lengths: Mapping[str, int]) -> None:
    """Raises ValueError that names the first feature beyond the end of its contig."""
    for feature in features:
        if feature.end > lengths[feature.contig]:
            raise ValueError(
                f"{feature.where}: {place(feature.contig, feature.start, feature.end)} runs beyond "
                f"the end of {feature.contig}, which has {lengths[feature.contig]:,} bases; is it "
                "of another assembly?"
            )
