"""FASTA and FASTQ: records in order, and random access to genomes that stay on disk.

A file is scanned once when it is opened: names, letters and line ends are checked, and the place of
every line is known afterwards. Where samtools has written an index beside it, that is read instead
and letters are checked as they are fetched. What is held in memory is a row per record, not the
sequence.
"""

import codecs
import gzip
import mmap
import os
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from Bio import bgzf
from Bio.SeqIO.QualityIO import FastqGeneralIterator

from mamba2_apps.data import UnreadableInput
from mamba2_apps.genomics.intervals import place, unknown_contig
from mamba2_apps.genomics.sequences import check_sequence, first_invalid, invalid_letter
from mamba2_apps.genomics.text_files import (
    check_bgzip_end,
    is_bgzip,
    is_compressed,
    open_binary,
    open_text,
    read_lines,
    truncated,
)

FASTA_SUFFIXES = (".fa", ".fasta", ".fna", ".fa.gz", ".fasta.gz", ".fna.gz", ".fa.bgz", ".fna.bgz")
FASTQ_SUFFIXES = (".fastq", ".fq", ".fastq.gz", ".fq.gz")


class Record(NamedTuple):
    """One sequence of a file; `description` is what follows its name."""

    name: str
    sequence: str
    description: str = ""
    quality: np.ndarray | None = None
    """Phred scores (n,) uint8, of FASTQ."""


@dataclass(slots=True)
class _Entry:
    """Where a record's letters lie: `line_bases` letters in every `line_bytes` bytes."""

    offset: int
    length: int = 0
    line_bases: int = 0
    line_bytes: int = 0


class Genome(Mapping[str, int]):
    """A FASTA file with random access; a mapping of contig names to lengths, in file order.

    Of plain and bgzip files, the bytes or blocks that are asked for are read, and none stays open,
    so that a data set may have any number of them; an ordinary gzip file, which has no random
    access, is unpacked once into an unnamed temporary file. It may be used by worker processes.

    Args:
        path: plain, gzip or bgzip. `samtools faidx` writes PATH.fai, and PATH.gzi for bgzip; where
            these are not older than the file, opening it does not read it.

    Raises:
        UnreadableInput: no such file, no FASTA, a letter that is no IUPAC code (a protein, say), a
            name that comes twice, an empty record, lines of different lengths within one, a
            truncated file, an index of another file. The message has file and line, or file and
            place where it is met when letters are fetched.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UnreadableInput(f"{fspath(path)} does not exist or is no file")
        self._bytes: _Plain | _Blocked | _Unpacked
        if not is_compressed(path):
            self._bytes = _Plain(self.path)
        elif is_bgzip(path):
            self._bytes = _Blocked(self.path)
        else:
            self._bytes = _Unpacked(self.path)
        self._index = _index_beside(self.path, ".fai")
        self._entries = _scan(self.path) if self._index is None else _read_fai(self._index)

    def __getitem__(self, contig: str) -> int:
        """Length of a contig. Raises KeyError."""
        return self._entries[contig].length

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def fetch(self, contig: str, start: int = 0, end: int | None = None) -> str:
        """Letters from `start` to before `end`, 0-based, as the file has them, case included.

        Raises ValueError for an unknown contig or a place beyond its ends.
        """
        if contig not in self._entries:
            raise ValueError(f"{self.path}: {unknown_contig(contig, self)}")
        entry = self._entries[contig]
        end = entry.length if end is None else end
        if not 0 <= start <= end <= entry.length:
            raise ValueError(
                f"{self.path}: {place(contig, start, end)} is not within {contig}, which has "
                f"{entry.length:,} bases"
            )
        return self._letters(contig, start, end) if start < end else ""

    def _letters(self, contig: str, start: int, end: int) -> str:
        entry = self._entries[contig]
        first, last = (
            entry.offset + p // entry.line_bases * entry.line_bytes + p % entry.line_bases
            for p in (start, end - 1)
        )
        letters = self._bytes.read(first, last + 1).replace(b"\n", b"").replace(b"\r", b"")
        if self._index is not None:
            self._check(letters, contig, start, end)
        return letters.decode("ascii")

    def _check(self, letters: bytes, contig: str, start: int, end: int) -> None:
        """Raise UnreadableInput for letters that no scan has checked."""
        if len(letters) != end - start or b">" in letters:
            raise UnreadableInput(
                f"{self.path}: {place(contig, start, end)} is not where {self._index} says; is "
                "either of them truncated? Write the index again with samtools faidx"
            )
        _check_letters(letters, str(self.path), contig, start)


class MemoryGenome(Genome):
    """Sequences in memory, with the interface of a `Genome`.

    Args:
        sequences: by name.
        path: where they are from, for messages.
    """

    def __init__(self, sequences: Mapping[str, str], path: str | PathLike[str]) -> None:
        self.path, self._sequences = Path(path), dict(sequences)
        self._entries = {name: _Entry(0, len(text)) for name, text in self._sequences.items()}

    def _letters(self, contig: str, start: int, end: int) -> str:
        return self._sequences[contig][start:end]


class GenomeSet(Genome):
    """Several genomes as one. A contig of which two of them have the name is called PATH#NAME.

    Args:
        genomes: in their order.
    """

    def __init__(self, genomes: Sequence[Genome]) -> None:
        self.path = Path(os.path.commonpath([genome.path.absolute() for genome in genomes]))
        times = Counter(name for genome in genomes for name in genome)
        self._owners = {
            name if times[name] == 1 else f"{genome.path}#{name}": (genome, name)
            for genome in genomes
            for name in genome
        }
        self._entries = {key: genome._entries[name] for key, (genome, name) in self._owners.items()}

    def _letters(self, contig: str, start: int, end: int) -> str:
        genome, name = self._owners[contig]
        return genome._letters(name, start, end)


def read_fasta(path: str | PathLike[str]) -> Iterator[Record]:
    """Records of a FASTA file, plain or compressed, one at a time; checked as `Genome` does."""
    name = description = ""
    names: dict[str, int] = {}
    lines: list[str] = []
    start = 0
    for line_number, line in read_lines(path):
        where = f"{fspath(path)}:{line_number}"
        if line.startswith(">"):
            if names:
                yield Record(name, _whole(lines, path, start, name), description)
            name, description = _name(line[1:], names, line_number, where)
            lines, start = [], line_number
        elif not line.strip():
            continue
        elif not names:
            raise _no_fasta(where)
        else:
            lines.append(check_sequence(line.strip(), where))
    if not names:
        raise UnreadableInput(
            f"{fspath(path)} holds no FASTA record; expected a line such as >chr1"
        )
    yield Record(name, _whole(lines, path, start, name), description)


def read_fastq(path: str | PathLike[str]) -> Iterator[Record]:
    """Reads of a FASTQ file (Phred+33), plain or compressed, one at a time.

    Raises UnreadableInput that names the file and the read.
    """
    count = 0
    try:
        with open_text(path) as text:
            for count, (title, sequence, scores) in enumerate(FastqGeneralIterator(text), 1):
                where = f"{fspath(path)}: read {count} ({title})"
                name, description = _name_of(title)
                if not sequence:
                    raise UnreadableInput(f"{where} is empty")
                quality = np.frombuffer(scores.encode("ascii"), np.uint8) - 33
                yield Record(name, check_sequence(sequence, where), description, quality)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise truncated(path, count, "read") from error
    except UnreadableInput:
        raise
    except ValueError as error:
        raise UnreadableInput(f"{fspath(path)}: after read {count}: {error}") from error
    if not count:
        raise UnreadableInput(f"{fspath(path)} holds no FASTQ read")


def _name(title: str, names: dict[str, int], line: int, where: str) -> tuple[str, str]:
    """Name and description of a header; a name is noted in `names` and may come once."""
    name, description = _name_of(title)
    if not name:
        raise UnreadableInput(f"{where}: a record without a name, expected such as >chr1")
    if name in names:
        raise UnreadableInput(
            f"{where}: the name {name!r} was already used at line {names[name]}; names must differ"
        )
    names[name] = line
    return name, description


def _name_of(title: str) -> tuple[str, str]:
    """The first word of a header, whatever white space ends it, and the rest."""
    name, description = [*title.split(maxsplit=1), "", ""][:2]
    return name, description.strip()


def _whole(lines: list[str], path: str | PathLike[str], start: int, name: str) -> str:
    if not lines:
        raise _empty(path, start, name)
    return "".join(lines)


def _empty(path: str | PathLike[str], line: int, name: str) -> UnreadableInput:
    return UnreadableInput(f"{fspath(path)}:{line}: the record {name!r} is empty")


def _no_fasta(where: str) -> UnreadableInput:
    return UnreadableInput(f"{where}: no FASTA: expected a line such as >chr1 before any sequence")


def _scan(path: Path) -> dict[str, _Entry]:
    """Check a FASTA file line by line and note where its sequences lie."""
    index, number = _Index(path), 0
    try:
        with open_binary(path) as file:
            for number, line in enumerate(file, 1):
                index.add(line, number)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise truncated(path, number) from error
    if not index.entries:
        raise UnreadableInput(f"{path} holds no FASTA record; expected a line such as >chr1")
    index.close_record()
    return index.entries


class _Index:
    """The entries of a FASTA file, from its lines."""

    def __init__(self, path: Path) -> None:
        self.path, self.entries, self.name = path, dict[str, _Entry](), ""
        self._offset, self._lines = 0, dict[str, int]()
        self._short = 0  # the line of the open record after which none may follow

    def add(self, line: bytes, number: int) -> None:
        """Take the next line, its end included."""
        letters = line.rstrip(b"\r\n")
        if not self._offset:
            letters = letters.removeprefix(codecs.BOM_UTF8)  # its bytes count all the same
        self._offset += len(line)
        where = f"{self.path}:{number}"
        if letters.startswith(b">"):
            self.close_record()
            title = letters[1:].decode("utf-8", "replace")
            self.name, _ = _name(title, self._lines, number, where)
            self.entries[self.name] = _Entry(self._offset)
            self._short = 0
        elif not letters.strip():
            self._short = self._short or number
        elif not self.entries:
            raise _no_fasta(where)
        else:
            self._add_letters(letters, len(line), number, where)

    def _add_letters(self, letters: bytes, line_bytes: int, number: int, where: str) -> None:
        entry = self.entries[self.name]
        if self._short:
            raise self._ragged(self._short)
        _check_letters(letters, where, self.name, entry.length)
        if not entry.length:
            entry.line_bases, entry.line_bytes = len(letters), line_bytes
        elif len(letters) > entry.line_bases:
            raise self._ragged(number)
        if (len(letters), line_bytes) != (entry.line_bases, entry.line_bytes):
            self._short = number
        entry.length += len(letters)

    def close_record(self) -> None:
        """Raise UnreadableInput where the open record is empty."""
        if self.entries and not self.entries[self.name].length:
            raise _empty(self.path, self._lines[self.name], self.name)

    def _ragged(self, line: int) -> UnreadableInput:
        return UnreadableInput(
            f"{self.path}:{line}: the lines of {self.name!r} have different lengths, so that no "
            "index can find a base; rewrite the file with lines of one length"
        )


def _check_letters(letters: bytes, where: str, name: str, before: int) -> None:
    wrong = first_invalid(letters)
    if wrong is not None:
        letter = letters[wrong : wrong + 1].decode("utf-8", "replace")
        raise UnreadableInput(f"{where}: {place(name, before + wrong)}: {invalid_letter(letter)}")


def _index_beside(path: Path, suffix: str) -> Path | None:
    """The index of a file, where there is one that is not older; None: there is none."""
    index = path.with_name(path.name + suffix)
    if index.is_file() and index.stat().st_mtime >= path.stat().st_mtime:
        return index
    return None


def _read_fai(path: Path) -> dict[str, _Entry]:
    """The entries of samtools' index. Raises UnreadableInput that names the line."""
    entries: dict[str, _Entry] = {}
    for number, line in read_lines(path):
        where, (name, *values) = f"{path}:{number}", line.split("\t")
        if len(values) < 4 or not all(value.isdecimal() for value in values[:4]):
            raise UnreadableInput(f"{where}: expected NAME and four numbers, as of samtools faidx")
        length, offset, line_bases, line_bytes = map(int, values[:4])
        if name in entries or not length or not 0 < line_bases <= line_bytes:
            raise UnreadableInput(
                f"{where}: {name!r} comes twice, is empty or has lines of no letters; correct the "
                "FASTA file and write the index again with samtools faidx"
            )
        entries[name] = _Entry(offset, length, line_bases, line_bytes)
    if not entries:
        raise UnreadableInput(f"{path} names no record; write it again with samtools faidx")
    return entries


class _Plain:
    """Bytes of an uncompressed file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, start: int, end: int) -> bytes:
        with self._path.open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(end - start)


class _Unpacked:
    """Bytes of an ordinary gzip file, unpacked; processes that are forked share them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _unpacked(path) as file:
            empty = os.fstat(file.fileno()).st_size == 0
            self._map: Any = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Unpacked, (self._path,)

    def read(self, start: int, end: int) -> bytes:
        return self._map[start:end]


class _Blocked:
    """Bytes of a bgzip file by their place in the uncompressed text."""

    def __init__(self, path: Path) -> None:
        self._path = path
        check_bgzip_end(path)  # an index leaves the file unread
        index = _index_beside(path, ".gzi")
        data_starts, block_starts = _blocks(path) if index is None else _read_gzi(index)
        self._data_starts = np.array(data_starts)
        self._block_ends = [*block_starts, path.stat().st_size][1:]
        self._block_starts = block_starts

    def read(self, start: int, end: int) -> bytes:
        first, last = (
            int(np.searchsorted(self._data_starts, place, side="right")) - 1
            for place in (start, end - 1)
        )
        low = self._block_starts[first]
        with self._path.open("rb", buffering=0) as file:
            file.seek(low)
            packed = file.read(self._block_ends[last] - low)
        try:
            text = gzip.decompress(packed)  # a block is a gzip file of its own
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _damaged(self._path, low) from error
        skipped = int(self._data_starts[first])
        return text[start - skipped : end - skipped]


def _blocks(path: Path) -> tuple[list[int], list[int]]:
    """Where bgzip's blocks begin in the text, and in the file, by reading it once."""
    data_starts, block_starts, end = [], [], 0
    try:
        with path.open("rb") as file:
            for start, length, data, _ in bgzf.BgzfBlocks(file):
                data_starts.append(data)
                block_starts.append(start)
                end = start + length
    except (ValueError, RuntimeError, struct.error, zlib.error) as error:
        raise _damaged(path, end) from error
    return data_starts, block_starts


def _damaged(path: Path, after: int) -> UnreadableInput:
    return UnreadableInput(f"{path}: damaged or truncated after byte {after:,}; fetch it again")


def _read_gzi(path: Path) -> tuple[list[int], list[int]]:
    """The same from bgzip's index: a count, then pairs (in the file, in the text) but the first."""
    content = path.read_bytes()
    if len(content) % 16 != 8 or len(content) != 8 + 16 * int.from_bytes(content[:8], "little"):
        raise UnreadableInput(f"{path} is damaged; write it again with bgzip --reindex")
    pairs = np.frombuffer(content, "<u8", offset=8).reshape(-1, 2).tolist()
    return [0, *(data for _, data in pairs)], [0, *(start for start, _ in pairs)]


def _unpacked(path: Path) -> IO[bytes]:
    """An unnamed temporary file with a gzip file's bytes; it vanishes with its last user."""
    file = tempfile.TemporaryFile(prefix="mamba2-apps-")  # noqa: SIM115
    lines = 0
    try:
        with open_binary(path) as source:
            while piece := source.read(1 << 16):
                file.write(piece)
                lines += piece.count(b"\n")
    except (EOFError, zlib.error, OSError) as error:
        file.close()
        raise truncated(path, lines) from error
    file.flush()
    return file
