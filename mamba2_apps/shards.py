"""Data in many files: webdataset's tar shards, and patterns that name the parts of a data set.

In a shard the files of one sample stand under one key: KEY.flac beside KEY.json. A shard is indexed
once by its headers; its files are then read in place, in any order, so that training draws samples
as from a folder and a resumed run repeats them. Nothing is unpacked, and no sample is kept.
"""

import glob
import re
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from io import SEEK_CUR, SEEK_END, SEEK_SET, BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

from mamba2_apps.data import UnreadableInput, check_unique

CLASSES = "classes.txt"
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""First bytes of gzip, bzip2, xz and zstd."""


class Entry(NamedTuple):
    """Where a file lies within a shard; as text, what messages call it."""

    shard: str
    name: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}: {self.name}"

    def open(self) -> BufferedReader:
        """The file alone, opened for reading. Raises UnreadableInput where its shard is gone."""
        return BufferedReader(_Part(self))

    def read(self) -> bytes:
        """All of the file. Raises UnreadableInput where its shard is gone."""
        with self.open() as file:
            return file.read()


@dataclass
class ShardSample:
    """The files of one key, by what follows the key's dot, in lower case: ".jpg"."""

    shard: str
    key: str
    entries: dict[str, Entry] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.shard}: {self.key}"

    def entry(self) -> Entry | None:
        """The one file that was indexed; None: there is none. Raises ValueError for several."""
        if len(self.entries) > 1:
            raise ValueError(f"{self.name} has {' and '.join(self.entries)}, expected one of them")
        return next(iter(self.entries.values()), None)


def find_files(pattern: str, folder: str | Path = "") -> list[str]:
    """The files that a pattern names: {000..127} counts up, and *, ? and [...] are as in a shell.

    Args:
        pattern: such as train-{000..127}.tar or genomes/*.fa.gz.
        folder: what it is relative to, taken as it is.

    Raises ValueError that names the pattern without a file, or the number that is missing.
    """
    found: list[str] = []
    for name in _counted(pattern):
        path = Path(folder) / name
        names = [name] if path.exists() else sorted(glob.glob(name, root_dir=folder or None))
        if not names:
            of = f", of {pattern}" if name != pattern else ""
            raise ValueError(f"{path.parent} holds no {path.name}; expected files of that name{of}")
        found += [str(Path(folder) / name) for name in names]
    return list(dict.fromkeys(found))


def names_shards(source: str) -> bool:
    """Whether a source is a shard or a pattern of them; compressed ones are, and are refused."""
    return re.search(r"\.(tar(\.(gz|bz2|xz|zst))?|tgz)$", source.lower()) is not None


def read_index(
    shard: str, files: Collection[str], texts: Collection[str] = ()
) -> list[ShardSample]:
    """The samples of a shard, by key; what has another suffix is passed over.

    Args:
        shard: a plain .tar.
        files: suffixes of the files to find, such as ".jpg".
        texts: suffixes of the small files to read at once, such as ".cls".

    Raises ValueError that names a shard which is compressed, damaged or cut off, or a file in it
    that comes twice or is no text.
    """
    samples: dict[str, ShardSample] = {}
    for member, archive in _members(shard):
        folder, slash, base = member.name.rpartition("/")
        key, dot, suffix = base.partition(".")  # webdataset's rule: the first dot
        suffix = f".{suffix.lower()}"
        if not key or not dot or not (suffix in files or suffix in texts):
            continue
        key = f"{folder}{slash}{key}".removeprefix("./")
        sample = samples.setdefault(key, ShardSample(shard, key))
        if suffix in sample.entries or suffix in sample.texts:
            raise ValueError(f"{sample.name}{suffix} comes twice; write the shard again")
        if suffix in files:
            sample.entries[suffix] = Entry(shard, member.name, member.offset_data, member.size)
        else:
            sample.texts[suffix] = _text(archive, member, sample.name + suffix)
    return [samples[key] for key in sorted(samples)]


def class_names(folder: str | Path) -> list[str] | None:
    """Names of the classes that shards number, a line each of classes.txt; None: no such file.

    Raises ValueError for a name that comes twice.
    """
    path = Path(folder) / CLASSES
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    names = [line.strip() for line in lines if line.strip()]
    check_unique(names, str(path))
    return names


def _counted(pattern: str) -> list[str]:
    """A pattern with each {first..last} in it replaced by every number; zeros in front stay."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    if last < first:
        raise ValueError(f"{pattern}: {match[0]} counts down, expected the smaller number first")
    before, rests = pattern[: match.start()], _counted(pattern[match.end() :])
    numbers = (str(number).zfill(len(match[1])) for number in range(first, last + 1))
    return [f"{before}{number}{rest}" for number in numbers for rest in rests]


def _members(shard: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Files of a shard in their order, each with the open archive."""
    try:
        with open(shard, "rb") as file:
            if file.read(6).startswith(COMPRESSED):
                raise ValueError(
                    f"{shard} is compressed, so that no file in it can be read alone; unpack it to "
                    "a plain .tar"
                )
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.isreg():
                        yield member, archive
                # tarfile takes a cut between two files, or a damaged header, for the end.
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("it has no end")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{shard} is damaged ({error}); fetch it again") from error


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> str:
    file = archive.extractfile(member)
    assert file is not None  # of a regular file there is one
    try:
        return file.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: bytes that are no UTF-8 text") from error


class _Part(RawIOBase):
    """The bytes of an entry as a file of their own."""

    def __init__(self, entry: Entry) -> None:
        self._start, self._size, self._place = entry.start, entry.size, 0
        try:
            self._file = open(entry.shard, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UnreadableInput(f"{entry}: {entry.shard} does not exist any more") from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        base = {SEEK_SET: 0, SEEK_CUR: self._place, SEEK_END: self._size}[whence]
        self._place = max(base + offset, 0)
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self._file.seek(self._start + self._place)
        count = self._file.readinto(view[: max(0, self._size - self._place)])
        self._place += count
        return count

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
        super().close()
