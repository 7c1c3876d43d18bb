"""Values along a genome: bedGraph, wiggle and bigWig, read and written.

A track is float32 per base, NaN where a file has no value. bigWig goes through pyBigWig (extra
`genomics`).
"""

import re
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np

from mamba2_apps.data import UnreadableInput
from mamba2_apps.genomics.intervals import place, reconcile_contigs
from mamba2_apps.genomics.text_files import number, read_lines

BIGWIG_SUFFIXES = (".bw", ".bigwig")
BEDGRAPH_SUFFIXES = (".bedgraph", ".bdg")


def read_track(
    path: str | PathLike[str], lengths: Mapping[str, int], contig: str, start: int, end: int
) -> np.ndarray:
    """Values (end - start,) float32 of a region; NaN where the file has none.

    Args:
        path: bigWig, wiggle or bedGraph, the last two plain or compressed.
        lengths: contig lengths of the genome.
        contig: the genome's name of it.
        start: first base, 0-based.
        end: the base after the last.

    Raises UnreadableInput, naming the line, for what is none of these, or runs beyond a contig.
    """
    values = np.full(end - start, np.nan, np.float32)
    if fspath(path).lower().endswith(BIGWIG_SUFFIXES):
        file = _big_wig(path, "r")
        try:
            names = reconcile_contigs(file.chroms(), lengths, fspath(path))
            own = next((name for name, known in names.items() if known == contig), None)
            if own is not None and file.chroms(own) != lengths[contig]:
                raise UnreadableInput(
                    f"{fspath(path)}: {own} has {file.chroms(own):,} bases, but {contig} of the "
                    f"genome {lengths[contig]:,}; is it of another assembly?"
                )
            if own is not None and file.header()["nBasesCovered"]:
                values[:] = file.values(own, start, end, numpy=True)
        finally:
            file.close()
        return values
    names = {}
    for where, name, first, last, value in _spans(path):
        if name not in names:
            names |= reconcile_contigs([name], lengths, fspath(path), {name: where})
        if last > lengths[names[name]]:
            raise UnreadableInput(
                f"{where}: {place(name, first, last)} runs beyond the end of {names[name]}, which "
                f"has {lengths[names[name]]:,} bases"
            )
        if names[name] == contig and first < end and last > start:
            values[max(first - start, 0) : last - start] = value
    return values


class TrackWriter:
    """Write a track piece by piece, in the order of the genome, as bedGraph or bigWig.

    Runs of equal values become one line; NaN is left out. Values are rounded to 4 significant
    digits, which merges neighbours that differ by noise.

    Args:
        path: where to write; its real name may be another (see `kind`).
        lengths: contig lengths, in order.
        kind: ".bedgraph" or ".bw".
    """

    def __init__(self, path: Path, lengths: Mapping[str, int], kind: str) -> None:
        self.big = kind in BIGWIG_SUFFIXES
        if self.big:
            self._file = _big_wig(path, "w")
            self._file.addHeader(list(lengths.items()))
        else:
            self._file = path.open("w", encoding="utf-8")
        self._open: tuple[str, int, int, float] | None = None

    def __enter__(self) -> "TrackWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None and self._open is not None:
            self._write_open()
        self._file.close()

    def add(self, contig: str, start: int, values: np.ndarray) -> None:
        """Append values (n,) of the bases from `start` on."""
        if not len(values):
            return
        values = _rounded(values)
        changes = np.flatnonzero(values[1:] != values[:-1]) + 1
        starts = np.concatenate([[0], changes]) + start
        ends = np.concatenate([changes, [len(values)]]) + start
        run_values = values[starts - start]
        kept = ~np.isnan(run_values)
        # NaN differs from itself, so a gap is many runs of one base; they are dropped here.
        starts, ends, run_values = starts[kept], ends[kept], run_values[kept]
        if self._open is not None:
            name, first, last, value = self._open
            if len(starts) and name == contig and last == starts[0] and value == run_values[0]:
                starts[0] = first
            else:
                self._write_open()
            self._open = None
        if len(starts):
            # The last run may go on in the next piece.
            self._write(contig, starts[:-1], ends[:-1], run_values[:-1])
            self._open = contig, int(starts[-1]), int(ends[-1]), float(run_values[-1])

    def _write_open(self) -> None:
        assert self._open is not None
        contig, *run = self._open
        self._write(contig, *(np.array([x]) for x in run))

    def _write(self, contig: str, starts: np.ndarray, ends: np.ndarray, values: np.ndarray) -> None:
        if not len(starts):
            return
        if self.big:
            self._file.addEntries(
                [contig] * len(starts),
                starts.astype(np.int64),
                ends=ends.astype(np.int64),
                values=values.astype(np.float64),
            )
            return
        rows = zip(starts.tolist(), ends.tolist(), values.tolist(), strict=True)
        self._file.writelines(f"{contig}\t{a}\t{b}\t{value:.4g}\n" for a, b, value in rows)


def _rounded(values: np.ndarray) -> np.ndarray:
    """float64 values with 4 significant digits."""
    values = values.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 10.0 ** (3 - np.floor(np.log10(np.abs(values))))
        rounded = np.round(values * scale) / scale
    return np.where(values == 0, 0.0, rounded)


def _spans(path: str | PathLike[str]) -> Iterator[tuple[str, str, int, int, float]]:
    """(file:line, contig, start, end, value), 0-based half-open, of bedGraph or wiggle lines."""
    step: dict[str, Any] | None = None
    for line_number, line in read_lines(path):
        where, words = f"{fspath(path)}:{line_number}", line.split()
        if not words or words[0] in ("track", "browser") or words[0].startswith("#"):
            continue
        if words[0] in ("fixedStep", "variableStep"):
            step = _declaration(words, where)
        elif step is None:
            if len(words) != 4:
                raise UnreadableInput(f"{where}: {len(words)} columns, expected bedGraph's 4")
            start, end = (number(word, int, "position", where) for word in words[1:3])
            if not 0 <= start < end:
                raise UnreadableInput(f"{where}: {start} to {end} holds no base")
            yield where, words[0], start, end, number(words[3], float, "value", where)
        else:
            fixed = step["kind"] == "fixedStep"
            if len(words) != (1 if fixed else 2):
                raise UnreadableInput(f"{where}: {len(words)} columns in a {step['kind']} section")
            start = step["next"] if fixed else number(words[0], int, "position", where) - 1
            if start < 0:
                raise UnreadableInput(f"{where}: position {start + 1}; wiggle counts from 1")
            step["next"] = start + step["step"]
            value = number(words[-1], float, "value", where)
            yield where, step["chrom"], start, start + step["span"], value


def _declaration(words: list[str], where: str) -> dict[str, Any]:
    given = dict(re.findall(r"(\w+)=(\S+)", " ".join(words[1:])))
    needed = {"chrom", "start"} if words[0] == "fixedStep" else {"chrom"}
    if needed - given.keys():
        raise UnreadableInput(f"{where}: {words[0]} needs {' and '.join(sorted(needed))}")
    numbers = {
        key: number(given.get(key, "1"), int, key, where) for key in ("start", "step", "span")
    }
    if min(numbers.values()) < 1:
        raise UnreadableInput(f"{where}: start, step and span count from 1, got {numbers}")
    return {"kind": words[0], "chrom": given["chrom"], "next": numbers["start"] - 1, **numbers}


def big_wig_library() -> Any:
    """pyBigWig. Raises ValueError that says how to install it."""
    try:
        import pyBigWig
    except ImportError as error:
        raise ValueError(
            "bigWig needs pyBigWig: pip install 'mamba2-apps[genomics]', or write .bedgraph"
        ) from error
    return pyBigWig


def _big_wig(path: str | PathLike[str], mode: str) -> Any:
    try:
        return big_wig_library().open(fspath(path), mode)
    except RuntimeError as error:
        raise UnreadableInput(f"{fspath(path)} cannot be opened as bigWig ({error})") from error
