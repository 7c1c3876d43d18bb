"""Lines of a text file, plain or compressed, with their numbers, and errors that name the file."""

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from os import PathLike, fspath
from pathlib import Path
from typing import IO, Any, TextIO, TypeVar

from mamba2_apps.data import UnreadableInput

GZIP_MAGIC = b"\x1f\x8b"
BGZIP_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
"""The empty block that ends every bgzip file (SAM specification, 4.1.2)."""
Number = TypeVar("Number", int, float)


def open_binary(path: str | PathLike[str]) -> IO[bytes]:
    """A file's bytes, decompressed where it is gzip or bgzip, whatever it is called.

    Raises UnreadableInput where there is no such file, or a bgzip file lacks its end.
    """
    if not Path(path).is_file():
        raise UnreadableInput(f"{fspath(path)} does not exist or is no file")
    if is_bgzip(path):
        check_bgzip_end(path)
    opened: Any = gzip.open(path) if is_compressed(path) else open(path, "rb")  # noqa: SIM115
    return opened


def open_text(path: str | PathLike[str]) -> TextIO:
    """A file's text, decompressed, for Biopython's parsers; any line end is a line end."""
    return io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", errors="replace")  # type: ignore[arg-type]


def is_compressed(path: str | PathLike[str]) -> bool:
    """Whether a file begins as gzip does."""
    with open(path, "rb") as file:
        return file.read(2) == GZIP_MAGIC


def is_bgzip(path: str | PathLike[str]) -> bool:
    """Whether a gzip file is made of bgzip's blocks, which can be read one by one."""
    with open(path, "rb") as file:
        head = file.read(16)
    return head[:2] == GZIP_MAGIC and head[3:4] == b"\x04" and head[12:14] == b"BC"


def check_bgzip_end(path: str | PathLike[str]) -> None:
    """Raises UnreadableInput for a bgzip file without its last block: one that was cut between two
    blocks is whole to gzip."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - len(BGZIP_END), 0))
        if file.read() != BGZIP_END:
            raise UnreadableInput(
                f"{fspath(path)}: truncated at byte {size:,}, without the empty block that ends a "
                "bgzip file; fetch it again, or compress it with bgzip"
            )


def read_lines(path: str | PathLike[str]) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line, without its end; Windows line ends are line ends, and
    the byte order mark that its tools put in front is no text.

    Raises UnreadableInput for a missing or truncated file, or bytes that are no text.
    """
    number = 0
    try:
        with open_binary(path) as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield number, line.rstrip(b"\r\n").decode("utf-8")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise truncated(path, number) from error
    except UnicodeDecodeError as error:
        raise UnreadableInput(f"{fspath(path)}:{number}: bytes that are no UTF-8 text") from error


def truncated(path: str | PathLike[str], number: int, of: str = "line") -> UnreadableInput:
    """The error for a compressed file that is truncated or damaged.

    Number 0: before the first was read, as in a small file, which is unpacked at once.
    """
    size = Path(path).stat().st_size
    place = f" after {of} {number:,}" if number else f" within its {size:,} bytes"
    return UnreadableInput(
        f"{fspath(path)}: the compressed file is truncated or damaged{place}; fetch it again"
    )


def read_fields(
    path: str | PathLike[str], least: int, what: str, until: str | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Place (`file:line`) and tab-separated fields of each line that is no comment or empty.

    Lines from one on that is `until` are not read. Raises UnreadableInput, naming the line, where
    it has fewer than `least` fields.
    """
    for number, line in read_lines(path):
        if line.rstrip() == until:
            return
        words = line.split(maxsplit=1)
        if not words or line.startswith("#") or words[0] in ("track", "browser"):
            continue
        where, fields = f"{fspath(path)}:{number}", line.split("\t")
        if len(fields) < least:
            raise UnreadableInput(
                f"{where}: {len(fields)} tab-separated fields, expected at least {least} as {what} "
                "has"
            )
        yield where, fields


def number(text: str, convert: Callable[[str], Number], name: str, where: str) -> Number:
    """A field as a number. Raises UnreadableInput that names the field."""
    try:
        return convert(text)
    except ValueError:
        kind = "an integer" if convert is int else "a number"
        raise UnreadableInput(f"{where}: {name} is {text!r}, expected {kind}") from None
