"""Annotation files as features: BED, narrowPeak, GFF3, GTF, GenBank; and BED and GFF3 written.

BED and narrowPeak count from 0 and exclude the end; GFF3, GTF and GenBank count from 1 and include
it. All of them become `Feature`, 0-based half-open.
"""

import gzip
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from os import PathLike, fspath
from typing import IO, Any
from urllib.parse import quote, unquote

from Bio import BiopythonParserWarning, SeqIO
from Bio.SeqFeature import AfterPosition, BeforePosition

from mamba2_apps.data import UnreadableInput
from mamba2_apps.genomics.fasta import MemoryGenome, Record
from mamba2_apps.genomics.intervals import Feature, check_bounds, reconcile_contigs
from mamba2_apps.genomics.sequences import check_sequence
from mamba2_apps.genomics.text_files import number, open_text, read_fields, truncated

BED_SUFFIXES = (".bed", ".bed.gz", ".bed12", ".bed12.gz")
GFF_SUFFIXES = (".gff", ".gff3", ".gtf", ".gff.gz", ".gff3.gz", ".gtf.gz")
GENBANK_SUFFIXES = (".gb", ".gbk", ".gbff", ".genbank", ".gb.gz", ".gbk.gz", ".gbff.gz")


def read_features(
    path: str | PathLike[str], lengths: Mapping[str, int] | None = None
) -> list[Feature]:
    """Features of an annotation file, in file order; the format follows from its name.

    Args:
        path: BED, narrowPeak, GFF3, GTF or GenBank, plain or compressed.
        lengths: contig lengths of the genome (a `Genome` is such). Contigs are then reconciled with
            it, and a feature beyond a contig's end raises ValueError.

    Raises UnreadableInput for a file that is none of these, or a line of it that is wrong.
    """
    name = fspath(path).lower()
    if name.endswith(BED_SUFFIXES):
        features = list(read_bed(path))
    elif name.removesuffix(".gz").endswith(".narrowpeak"):
        features = list(read_narrow_peak(path))
    elif name.endswith(GFF_SUFFIXES):
        features = list(read_gff(path))
    elif name.endswith(GENBANK_SUFFIXES):
        features = [feature for _, found in read_genbank(path) for feature in found]
    else:
        raise UnreadableInput(
            f"{fspath(path)} is no annotation file; expected .bed, .narrowPeak, .gff3, .gtf or "
            ".gbk, which may end in .gz"
        )
    if not features:
        raise UnreadableInput(f"{fspath(path)} holds no feature")
    if lengths is not None:
        features = on_genome(features, lengths, fspath(path))
    return features


def on_genome(features: list[Feature], lengths: Mapping[str, int], what: str) -> list[Feature]:
    """Features with the genome's contig names, within its ends; ValueError where that fails."""
    first = {feature.contig: feature.where for feature in reversed(features)}
    names = reconcile_contigs(first, lengths, what, first)
    renamed = [
        f if names[f.contig] == f.contig else replace(f, contig=names[f.contig]) for f in features
    ]
    check_bounds(renamed, lengths)
    return renamed


def read_bed(path: str | PathLike[str]) -> Iterator[Feature]:
    """Features of a BED file of 3 to 12 columns; blocks where it has 12, thick part from 8 on."""
    for where, fields in read_fields(path, 3, "BED"):
        start, end = _span(fields[1], fields[2], where)
        yield _feature(
            contig=fields[0],
            start=start,
            end=end,
            name=_given(fields, 3),
            score=_score(fields, 4, where),
            strand=_given(fields, 5) or ".",
            blocks=_bed_blocks(fields, start, end, where),
            attributes=_thick(fields, start, end, where),
            where=where,
        )


def read_narrow_peak(path: str | PathLike[str]) -> Iterator[Feature]:
    """Peaks of ENCODE's narrowPeak; "summit" among the attributes counts from 0 on the contig."""
    for where, fields in read_fields(path, 10, "narrowPeak"):
        start, end = _span(fields[1], fields[2], where)
        names = ("signal", "p_value", "q_value")
        attributes = dict(zip(names, fields[6:9], strict=True))
        offset = number(fields[9], int, "peak", where)
        if offset >= 0:
            if start + offset >= end:
                raise UnreadableInput(f"{where}: peak {offset} is beyond the end of its region")
            attributes["summit"] = str(start + offset)
        yield _feature(
            contig=fields[0],
            start=start,
            end=end,
            name=_given(fields, 3),
            kind="peak",
            score=_score(fields, 4, where),
            strand=_given(fields, 5) or ".",
            attributes=attributes,
            where=where,
        )


def read_gff(path: str | PathLike[str]) -> Iterator[Feature]:
    """Lines of a GFF3 or GTF file as features of one block each; ends at an embedded ##FASTA.

    Where a line before says that a contig is circular (Is_circular), one that runs over its origin,
    and so ends beyond its length, is two; "origin" among the attributes of what lies behind it.
    """
    circles: dict[str, int] = {}
    for where, fields in read_fields(path, 9, "GFF3 or GTF", until="##FASTA"):
        first = number(fields[3], int, "start", where)
        last = number(fields[4], int, "end", where)
        if first < 1:
            raise UnreadableInput(f"{where}: start is {first}; GFF and GTF count from 1")
        attributes = _gff_attributes(fields[8], where)
        if fields[7] not in (".", ""):
            if fields[7] not in ("0", "1", "2"):
                raise UnreadableInput(f"{where}: phase is {fields[7]!r}, expected 0, 1, 2 or a dot")
            attributes["phase"] = fields[7]
        names = ("Name", "ID", "gene", "gene_id")
        contig = unquote(fields[0])
        if attributes.get("Is_circular", "").lower() == "true":
            circles[contig] = max(last, circles.get(contig, 0))
        whole = _feature(
            contig=contig,
            start=first - 1,
            end=last,
            strand="." if fields[6] == "?" else fields[6],
            kind=fields[2],
            name=next((attributes[key] for key in names if key in attributes), ""),
            score=None if fields[5] == "." else number(fields[5], float, "score", where),
            attributes=attributes,
            where=where,
        )
        yield from _on_circle(whole, circles.get(contig, last))


def _on_circle(feature: Feature, length: int) -> list[Feature]:
    """A feature of a circle of that length, whose end may count on behind the origin: as two."""
    over = feature.end - length
    if not 0 < over <= length:
        return [feature]
    behind = replace(
        feature,
        start=max(feature.start - length, 0),
        end=over,
        blocks=(),
        attributes={**feature.attributes, "origin": "behind"},
    )
    if feature.start >= length:
        return [behind]
    before = replace(feature, end=length, blocks=())
    first, second = (behind, before) if feature.strand == "-" else (before, behind)
    phase = str((first.phase - len(first)) % 3)
    second = replace(second, attributes={**second.attributes, "phase": phase})
    return [second, first] if feature.strand == "-" else [first, second]


def read_genbank(path: str | PathLike[str]) -> Iterator[tuple[Record, list[Feature]]]:
    """Each record of a GenBank file with its features, through Biopython.

    A feature that runs over the origin of a circular genome is two, one on either side of it. What
    lies between two bases is left out, and, with a warning, what lies partly in another record or
    has no location that can be read. Raises UnreadableInput for a record without sequence or with
    another length than its LOCUS line says, a name that comes twice, or, in the end, where no
    record has features besides its source.
    """
    records, annotated = 0, False
    names: set[str] = set()
    try:
        with open_text(path) as text:
            for records, (entry, remarks) in enumerate(_genbank_entries(text), 1):  # noqa: B007
                where = f"{fspath(path)}: record {entry.id}"
                contig = entry.name
                if contig in names:
                    raise UnreadableInput(
                        f"{where}: an earlier record is named {contig!r} (LOCUS), too; names must "
                        "differ"
                    )
                names.add(contig)
                if entry.seq is None or not entry.seq.defined or not len(entry.seq):
                    raise UnreadableInput(
                        f"{where} has no sequence (ORIGIN); fetch the full record"
                    )
                sequence = check_sequence(str(entry.seq), where)
                _check_remarks(remarks, where)
                features = [
                    feature
                    for f in entry.features
                    if f.type != "source" and f.location is not None
                    for feature in _from_biopython(
                        f, contig, len(sequence), f"{where}, {f.type} at {f.location}"
                    )
                ]
                annotated = annotated or bool(features)
                yield Record(contig, sequence, entry.description), features
    except UnreadableInput:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise truncated(path, records, "record") from error
    except ValueError as error:
        reason = " ".join(str(error).split())  # Biopython's may be of several lines
        raise UnreadableInput(f"{fspath(path)}: after record {records}: {reason}") from error
    if not records:
        raise UnreadableInput(f"{fspath(path)} holds no GenBank record; expected a line LOCUS")
    if not annotated:
        raise UnreadableInput(
            f"{fspath(path)}: no record has features besides its source; expected CDS and the like"
        )


def _genbank_entries(text: IO[str]) -> Iterator[tuple[Any, list[str]]]:
    """Biopython's record and what its parser remarked on, which it warns of and goes on."""
    entries = SeqIO.parse(text, "genbank")
    while True:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", BiopythonParserWarning)
            entry = next(entries, None)
        if entry is None:
            return
        yield entry, [str(warning.message) for warning in found]


def _check_remarks(remarks: Iterable[str], where: str) -> None:
    """Raise UnreadableInput for a part of a sequence, and warn of a feature without a place.

    Other remarks are on older dialects of the format.
    """
    for remark in remarks:
        if length := re.match(r"Expected sequence length (\d+), found (\d+)", remark):
            raise UnreadableInput(
                f"{where} has {int(length[2]):,} bases, but {int(length[1]):,} in its LOCUS line; "
                "is it truncated? Fetch it again, or correct that line"
            )
        reason, found, _ = remark.partition("; setting feature location to None")
        if found:
            warnings.warn(f"{where}: {reason}; the feature is left out", stacklevel=2)


def genbank_genome(path: str | PathLike[str]) -> MemoryGenome:
    """The sequences of a GenBank file, in memory."""
    return MemoryGenome({record.name: record.sequence for record, _ in read_genbank(path)}, path)


def joined(features: Iterable[Feature], kind: str = "CDS") -> list[Feature]:
    """Lines of GFF3 or GTF of one kind, joined by their Parent, transcript_id or ID into features.

    A line of several parents is part of each. What has no such attribute, or has blocks already,
    stays as it is. What lies behind the origin of a circle is a feature of its own. Lines on both
    strands (trans-splicing) become a feature without strand. The stop codon, which GTF keeps out of
    CDS and GFF3 does not, is part of it.
    """
    groups: dict[Any, list[Feature]] = {}
    stops: dict[Any, list[tuple[int, int]]] = {}
    for index, feature in enumerate(features):
        own = feature.attributes.get("ID")
        transcript = feature.attributes.get("transcript_id")
        parents = feature.attributes.get("Parent", transcript or "").split(",")
        alone = ("ID", feature.contig, own) if own else index
        keys = [(feature.contig, parent) if parent else alone for parent in parents]
        for key in keys:
            if feature.kind == kind:
                groups.setdefault(key, []).append(feature)
            elif (kind, feature.kind) == ("CDS", "stop_codon"):
                stops.setdefault(key, []).extend(feature.blocks)
    return [
        region
        for key, lines in groups.items()
        for parts in _regions_of(lines)
        for region in _sides(parts, stops.get(key, ()))
    ]


def _sides(parts: list[Feature], stops: Iterable[tuple[int, int]]) -> list[Feature]:
    """Lines of a region as one feature, or two where some of them lie behind a circle's origin."""
    sides = [[p for p in parts if ("origin" in p.attributes) == behind] for behind in (False, True)]
    if not all(sides):
        return [_one_region(parts, stops)]
    before, behind = (_one_region(side, stops) for side in sides)
    if before.strand == "-":
        return [replace(before, has_start=False), replace(behind, has_stop=False)]
    return [replace(before, has_stop=False), replace(behind, has_start=False)]


def _regions_of(lines: list[Feature]) -> list[list[Feature]]:
    """The lines of each region of one parent: all of them, or those of each ID where they overlap.

    A bacterial gene of two products has two such regions. An ID may as well be that of a line, and
    a frame that shifts back takes up to two bases twice.
    """
    ordered = sorted(lines, key=lambda line: line.start)
    if not any(
        a.end - b.start > 2 and a.attributes.get("ID") != b.attributes.get("ID")
        for a, b in pairwise(ordered)
    ):
        return [lines]
    regions: dict[str | None, list[Feature]] = {}
    for line in lines:
        regions.setdefault(line.attributes.get("ID"), []).append(line)
    return list(regions.values())


def _one_region(parts: list[Feature], stops: Iterable[tuple[int, int]]) -> Feature:
    """Lines of a region, and its stop codon where that is not among them, as one feature."""
    blocks = [block for part in parts for block in part.blocks]
    for stop in stops:
        blocks = _with_stop(blocks, stop)
    blocks.sort()
    start, end = blocks[0][0], max(block[1] for block in blocks)
    strands = {part.strand for part in parts}
    strand = parts[0].strand if len(strands) == 1 else "."
    # The one that comes first in its direction, since its phase is that of the whole.
    first = max(parts, key=lambda p: p.end) if strand == "-" else min(parts, key=lambda p: p.start)
    return replace(first, start=start, end=end, blocks=tuple(blocks), strand=strand)


def _with_stop(blocks: list[tuple[int, int]], stop: tuple[int, int]) -> list[tuple[int, int]]:
    """Blocks of a coding region with (a part of) its stop codon, where they lack it."""
    if any(start <= stop[0] and stop[1] <= end for start, end in blocks):
        return blocks
    beside = [block for block in blocks if stop[0] == block[1] or stop[1] == block[0]]
    rest = [block for block in blocks if block not in beside]
    edges = [edge for block in (*beside, stop) for edge in block]
    return [*rest, (min(edges), max(edges))]


def coding_part(feature: Feature) -> Feature | None:
    """What lies between thickStart and thickEnd of BED, the coding part of a transcript.

    None where that is empty; the feature itself where its file does not tell.
    """
    if "thickStart" not in feature.attributes:
        return feature
    first, last = (int(feature.attributes[key]) for key in ("thickStart", "thickEnd"))
    clipped = [(max(start, first), min(end, last)) for start, end in feature.blocks]
    blocks = tuple((start, end) for start, end in clipped if start < end)
    if not blocks:
        return None
    return replace(feature, start=blocks[0][0], end=max(b for _, b in blocks), blocks=blocks)


def write_bed(features: Iterable[Feature], file: IO[str]) -> None:
    """Write features as BED: 6 columns, or 12 where a feature has several blocks."""
    for f in features:
        score = "0" if f.score is None else f"{f.score:g}"
        fields = [f.contig, f.start, f.end, f.name or ".", score, f.strand]
        if len(f.blocks) > 1:
            sizes = ",".join(str(b - a) for a, b in f.blocks)
            starts = ",".join(str(a - f.start) for a, _ in f.blocks)
            fields += [f.start, f.end, 0, len(f.blocks), sizes, starts]
        file.write("\t".join(map(str, fields)) + "\n")


def write_gff(genes: Iterable[Feature], file: IO[str]) -> None:
    """Write coding regions as GFF3: a gene, its mRNA, and a CDS with its phase for each block."""
    file.write("##gff-version 3\n")
    for count, gene in enumerate(genes, 1):
        name = f"{gene.name or 'gene'}{count}"
        contig = quote(gene.contig, safe=".:^*$@!+?|")
        score = "." if gene.score is None else f"{gene.score:g}"
        rows: list[tuple[str, int, int, str, str]] = [
            ("gene", gene.start, gene.end, ".", f"ID={name}"),
            ("mRNA", gene.start, gene.end, ".", f"ID={name}.mrna;Parent={name}"),
        ]
        phases = _phases(gene)
        for (start, end), phase in zip(gene.blocks, phases, strict=True):
            rows.append(("CDS", start, end, phase, f"ID={name}.cds;Parent={name}.mrna"))
        for kind, start, end, phase, attributes in rows:
            fields = (contig, "mamba2-apps", kind, start + 1, end, score, gene.strand, phase)
            file.write("\t".join(map(str, (*fields, attributes))) + "\n")


def _phases(gene: Feature) -> list[str]:
    """Bases of each block, from left to right, before its first whole codon."""
    backward = gene.strand == "-"
    phase, phases = gene.phase, []
    for start, end in reversed(gene.blocks) if backward else gene.blocks:
        phases.append(str(phase))
        phase = (phase - (end - start)) % 3
    return phases[::-1] if backward else phases


def _feature(**values: Any) -> Feature:
    try:
        return Feature(**values)
    except ValueError as error:
        raise UnreadableInput(str(error)) from error


def _span(start: str, end: str, where: str) -> tuple[int, int]:
    return number(start, int, "start", where), number(end, int, "end", where)


def _given(fields: list[str], index: int) -> str:
    """A column, or nothing where it is missing or a lone dot."""
    value = fields[index] if index < len(fields) else ""
    return "" if value == "." else value


def _score(fields: list[str], index: int, where: str) -> float | None:
    text = _given(fields, index)
    return number(text, float, "score", where) if text else None


def _thick(fields: list[str], start: int, end: int, where: str) -> dict[str, str]:
    """thickStart and thickEnd, from 0, where the line has them."""
    if len(fields) < 8:
        return {}
    first, last = (
        number(fields[i], int, n, where) for i, n in ((6, "thickStart"), (7, "thickEnd"))
    )
    if first < last and not start <= first < last <= end:
        raise UnreadableInput(
            f"{where}: thickStart is {first} and thickEnd {last}, which is not within {start} to "
            f"{end}"
        )
    return {"thickStart": str(first), "thickEnd": str(last)}


def _bed_blocks(fields: list[str], start: int, end: int, where: str) -> tuple[tuple[int, int], ...]:
    if len(fields) < 12:
        return ()
    count = number(fields[9], int, "blockCount", where)
    sizes, offsets = (
        [number(text, int, name, where) for text in fields[index].rstrip(",").split(",")]
        for index, name in ((10, "blockSizes"), (11, "blockStarts"))
    )
    if not len(sizes) == len(offsets) == count:
        raise UnreadableInput(
            f"{where}: blockCount is {count}, but there are {len(sizes)} sizes and {len(offsets)} "
            "starts"
        )
    pairs = zip(offsets, sizes, strict=True)
    return tuple((start + offset, start + offset + size) for offset, size in pairs)


def _gff_attributes(text: str, where: str) -> dict[str, str]:
    """`key=value;…` of GFF3, or `key "value"; …` of GTF, whose quoted values may hold a semicolon.

    Values of GFF3 are decoded, but Parent's, in which a plain comma separates and %2C does not.
    """
    attributes = {}
    is_gtf = "=" not in text.strip().partition(" ")[0]
    for part in re.findall(r'(?:[^;"]|"[^"]*"|")+', text) if is_gtf else text.split(";"):
        part = part.strip()
        if part in ("", "."):
            continue
        key, found, value = part.partition(" " if is_gtf else "=")
        if not found:
            raise UnreadableInput(f"{where}: the attribute {part!r} has no value")
        value = value.strip().strip('"')
        attributes[key.strip()] = value if is_gtf or key == "Parent" else unquote(value)
    return attributes


def _from_biopython(feature: Any, contig: str, length: int, where: str) -> list[Feature]:
    """A feature, two where it runs over the origin, or none where it holds no base of the record.

    `length` is that of the record.
    """
    location = feature.location
    if any(part.ref is not None for part in location.parts):
        warnings.warn(f"{where} lies partly in another record; left out", stacklevel=2)
        return []
    parts = [part for part in location.parts if int(part.start) < int(part.end)]
    if not parts:
        return []
    strand: Any = {1: "+", -1: "-"}.get(location.strand, ".")
    qualifiers = {key: values[0] for key, values in feature.qualifiers.items() if values}
    if qualifiers.get("codon_start") in ("2", "3"):
        qualifiers["phase"] = str(int(qualifiers["codon_start"]) - 1)
    names = ("gene", "locus_tag", "label", "product")
    # Biopython gives the parts in the feature's own direction.
    upward = parts[::-1] if strand == "-" else parts
    open_ends = (BeforePosition, AfterPosition)
    fuzzy = [isinstance(end, open_ends) for end in (upward[0].start, upward[-1].end)]
    has_start, has_stop = (not end for end in (fuzzy[::-1] if strand == "-" else fuzzy))
    blocks = [(int(part.start), int(part.end)) for part in upward]
    whole: dict[str, Any] = {
        "contig": contig,
        "strand": strand,
        "name": next((qualifiers[key] for key in names if key in qualifiers), ""),
        "kind": feature.type,
        "where": where,
    }
    origin = _origin(blocks, length)
    sides = [blocks[:origin], blocks[origin:]] if origin else [blocks]
    if strand == "-":
        sides.reverse()
    found, phase = [], int(qualifiers.get("phase", "0"))
    for index, side in enumerate(sides):
        found.append(
            _feature(
                **whole,
                start=min(start for start, _ in side),
                end=max(end for _, end in side),
                blocks=tuple(sorted(side)),
                attributes={**qualifiers, "phase": str(phase)} if phase else qualifiers,
                has_start=has_start and index == 0,
                has_stop=has_stop and index == len(sides) - 1,
            )
        )
        phase = (phase - sum(end - start for start, end in side)) % 3
    return found


def _origin(blocks: list[tuple[int, int]], length: int) -> int:
    """Number of the first block behind the origin of a circle; 0: they do not run over it."""
    return next(
        (i for i, (a, b) in enumerate(pairwise(blocks), 1) if a[1] == length and b[0] == 0), 0
    )
