"""FASTA and FASTQ: records in order, and random access to a genome that stays on disk.

A file is scanned once when it is opened: names, letters and line ends are checked, and the place of
every line is known afterwards. What is held in memory is a row per record, not the sequence.
"""

import gzip
import mmap
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
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
    GZIP_MAGIC,
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


@dataclass
class _Entry:
    """Where a record's letters lie: `line_bases` letters in every `line_bytes` bytes."""

    offset: int
    length: int = 0
    line_bases: int = 0
    line_bytes: int = 0


class Genome(Mapping[str, int]):
    """A FASTA file with random access; a mapping of contig names to lengths, in file order.

    Plain files are mapped into memory, bgzip files are read a block at a time; an ordinary gzip
    file, which has no random access, is unpacked once into an unnamed temporary file. It may be
    used by worker processes, which open the file themselves.

    Args:
        path: plain, gzip or bgzip.

    Raises:
        UnreadableInput: no such file, no FASTA, a letter that is no IUPAC code (a protein, say), a
            name that comes twice, an empty record, lines of different lengths within one, a
            truncated file. The message has file and line.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UnreadableInput(f"{fspath(path)} does not exist or is no file")
        self._bytes: _Plain | _Blocked
        if not is_compressed(path):
            self._bytes = _Plain(self.path)
        elif is_bgzip(path):
            self._bytes = _Blocked(self.path)
        else:
            self._bytes = _Plain(_unpacked(self.path))
        self._entries = _scan(self.path)

    def __getitem__(self, contig: str) -> int:
        """Length of a contig. Raises KeyError."""
        return self._entries[contig].length

    def __reduce__(self) -> tuple[Any, ...]:
        return Genome, (self.path,)

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
        letters = self._bytes.read(first, last + 1)
        return letters.replace(b"\n", b"").replace(b"\r", b"").decode("ascii")


class MemoryGenome(Genome):
    """Sequences in memory, with the interface of a `Genome`.

    Args:
        sequences: by name.
        path: where they are from, for messages.
    """

    def __init__(self, sequences: Mapping[str, str], path: str | PathLike[str]) -> None:
        self.path, self._sequences = Path(path), dict(sequences)
        self._entries = {name: _Entry(0, len(text)) for name, text in self._sequences.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return MemoryGenome, (self._sequences, self.path)

    def _letters(self, contig: str, start: int, end: int) -> str:
        return self._sequences[contig][start:end]


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
                name, _, description = title.partition(" ")
                if not sequence:
                    raise UnreadableInput(f"{where} is empty")
                quality = np.frombuffer(scores.encode("ascii"), np.uint8) - 33
                yield Record(name, check_sequence(sequence, where), description, quality)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise truncated(path, 0) from error
    except UnreadableInput:
        raise
    except ValueError as error:
        raise UnreadableInput(f"{fspath(path)}: after read {count}: {error}") from error
    if not count:
        raise UnreadableInput(f"{fspath(path)} holds no FASTQ read")


def is_bgzip(path: str | PathLike[str]) -> bool:
    """Whether a gzip file is made of bgzip's blocks, which can be read one by one."""
    with open(path, "rb") as file:
        head = file.read(16)
    return head[:2] == GZIP_MAGIC and head[3:4] == b"\x04" and head[12:14] == b"BC"


def _name(title: str, names: dict[str, int], line: int, where: str) -> tuple[str, str]:
    """Name and description of a header; a name is noted in `names` and may come once."""
    name, _, description = title.strip().partition(" ")
    if not name:
        raise UnreadableInput(f"{where}: a record without a name, expected such as >chr1")
    if name in names:
        raise UnreadableInput(
            f"{where}: the name {name!r} was already used at line {names[name]}; names must differ"
        )
    names[name] = line
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


class _Plain:
    """Bytes of an uncompressed file, mapped into memory; processes share the mapping."""

    def __init__(self, source: Path | IO[bytes]) -> None:
        file = source.open("rb") if isinstance(source, Path) else source
        with file:
            empty = os.fstat(file.fileno()).st_size == 0
            self._map: Any = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, start: int, end: int) -> bytes:
        return self._map[start:end]


class _Blocked:
    """Bytes of a bgzip file by their place in the uncompressed text."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                blocks = [(data, start) for start, _, data, _ in bgzf.BgzfBlocks(file)]
        except (ValueError, EOFError, zlib.error, OSError) as error:
            raise truncated(path, 0) from error
        self._data_starts = np.array([data for data, _ in blocks])
        self._block_starts = [start for _, start in blocks]
        self._readers: dict[int, bgzf.BgzfReader] = {}

    def read(self, start: int, end: int) -> bytes:
        # A forked worker shares its parent's file position, so it opens the file itself.
        reader = self._readers.get(os.getpid())
        if reader is None:
            reader = self._readers[os.getpid()] = bgzf.BgzfReader(fspath(self._path), "rb")
        block = int(np.searchsorted(self._data_starts, start, side="right")) - 1
        within = start - int(self._data_starts[block])
        reader.seek(bgzf.make_virtual_offset(self._block_starts[block], within))
        return reader.read(end - start)


def _unpacked(path: Path) -> IO[bytes]:
    """An unnamed temporary file with a gzip file's bytes; it vanishes with its last user."""
    file = tempfile.TemporaryFile(prefix="mamba2-apps-")  # noqa: SIM115
    try:
        with open_binary(path) as source:
            while piece := source.read(1 << 22):
                file.write(piece)
    except (EOFError, zlib.error, OSError) as error:
        file.close()
        raise truncated(path, 0) from error
    file.flush()
    return file
