"""Lists of recordings: a folder for each class, a CSV or JSONL table, or tar shards; what is wrong
with them; and splits that keep groups, and equal sounds, on one side.

Columns of a table, and keys of a shard's KEY.json (a recipe can give others their names):

    path    the file, relative to the table's folder
    label   one class; `labels` several tags, separated by ; (in JSONL a list)
    start, end   seconds of the part of the file that is the clip, or in which an event is heard
    text    what is said
    group   speaker, author, session: what must not be on both sides of a split
    split   train, val or test; `fold` the number of a fold
    channel index of the one channel to use
    events  in a shard: a list of {label, start, end}
"""

import csv
import json
import math
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha1
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from mamba2_apps.audio.decoding import AUDIO_SUFFIXES, part_of, read_audio, read_header
from mamba2_apps.data import UnreadableInput
from mamba2_apps.shards import CLASSES, Entry, class_names, find_files, read_index

PARTS = ("train", "val", "test")
COLUMNS = (
    "path", "label", "labels", "start", "end", "text", "group", "split", "fold", "channel",
)  # fmt: skip
Targets = Literal["label", "labels", "events", "text", "none"]


class Event(NamedTuple):
    """A label that is heard from `start` to `end`, in seconds of the clip."""

    label: str
    start: float
    end: float


@dataclass(frozen=True)
class Clip:
    """A file, or a part of one, and what is known of it."""

    path: str
    start: float = 0.0
    end: float | None = None
    labels: tuple[str, ...] = ()
    events: tuple[Event, ...] = ()
    text: str | None = None
    group: str | None = None
    split: str | None = None
    fold: str | None = None
    channel: int | None = None
    entry: Entry | None = None
    """Where it lies within a shard; `path` then only names it."""

    @property
    def file(self) -> str | Entry:
        """What is decoded."""
        return self.path if self.entry is None else self.entry

    @property
    def name(self) -> str:
        """The file, and the part of it in seconds."""
        if self.start == 0 and self.end is None:
            return self.path
        return f"{self.path} [{self.start:g}-{'' if self.end is None else f'{self.end:g}'} s]"


class Sound(NamedTuple):
    """What the samples of a clip say."""

    rate: int
    channels: int
    seconds: float
    digest: str | None
    silent_channels: int


@dataclass
class DataReport:
    """What was found in a list of recordings, before anything is trained on it."""

    clips: int = 0
    seconds: float = 0.0
    shortest: float = 0.0
    median: float = 0.0
    longest: float = 0.0
    rates: dict[str, int] = field(default_factory=dict)
    channels: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    groups: int = 0
    duplicates: int = 0
    """Clips with the samples of another one before them."""
    parts: dict[str, int] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    """By kind; what the messages name was left out."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """By kind; worth knowing, and kept."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self, examples: int = 3) -> list[str]:
        """The report for people."""
        rows = [
            f"{self.clips} clips, {self.seconds / 60:.1f} min; {self.shortest:.2f} to "
            f"{self.longest:.2f} s, median {self.median:.2f} s",
            f"rates: {_counted(self.rates, ' Hz')}; channels: {_counted(self.channels)}",
        ]
        if self.labels:
            rows.append(f"labels: {_counted(self.labels)}")
        if self.parts:
            parts = ", ".join(f"{part} {count}" for part, count in self.parts.items())
            rows.append(f"parts: {parts}" + (f"; {self.groups} groups" if self.groups else ""))
        if self.duplicates:
            rows.append(f"duplicates: {self.duplicates} clips have the samples of another")
        shortened = False
        for title, kinds in (("left out", self.problems), ("note", self.notes)):
            for kind, messages in kinds.items():
                rows.append(f"{title}: {kind}: {len(messages)}")
                rows += [f"    {message}" for message in messages[:examples]]
                shortened |= len(messages) > examples
        return [*rows, "all names are in the RUN's data.json"] if shortened else rows


def read_folder(root: str | Path) -> list[Clip]:
    """The sound files of a folder, each labelled by the folder below `root` that it lies in.

    Raises ValueError that names the folder where there is no such file.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; expected one with a folder for each class")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
    clips = []
    for file in files:
        above = file.relative_to(root).parts[:-1]
        clips.append(Clip(str(file), labels=above[:1]))
    if not clips:
        raise ValueError(f"{root} holds no sound files (expected {', '.join(AUDIO_SUFFIXES)})")
    return clips


def read_table(
    path: str | Path,
    targets: Targets,
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
) -> list[Clip]:
    """The clips of a CSV or JSONL table.

    Args:
        path: ends in .jsonl or .json for JSON lines; else it is CSV with a header.
        targets: "events" joins the rows of a file, each an event of it; otherwise a row is a clip.
        columns: the table's own name of a column, by the names of this module.
        where: keep only the rows that have these values in these of the table's own columns.

    Raises ValueError that names the table, and the line where one is wrong.
    """
    path = Path(path)
    names = _column_names(columns or {})
    clips = []
    rows = [
        row for row in _rows(path) if all(str(row[1].get(k)) == v for k, v in (where or {}).items())
    ]
    if not rows:
        raise ValueError(f"{path} has no rows{f' where {dict(where)}' if where else ''}")
    for number, row in rows:
        values = {name: row.get(column) for name, column in names.items()}
        try:
            if not values["path"]:
                raise ValueError("no path; name the column with data.columns.path")
            clips.append(_clip(str(path.parent / str(values["path"])), values, targets))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return _joined(clips) if targets == "events" else clips


def read_shards(
    pattern: str,
    targets: Targets,
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
) -> list[Clip]:
    """The clips of tar shards, by shard and key.

    Beside a sound, KEY.cls is its label, by its name or by its number in the classes.txt of the
    shard's folder; KEY.txt is what is said; KEY.json is an object of what a table has in columns. A
    key without a sound is a file that does not exist.

    Args:
        pattern: such as train-{000..127}.tar or train-*.tar.
        targets: what is wanted of each.
        columns: the shards' own name of a key in KEY.json, by the names of this module.
        where: keep only the samples whose KEY.json has these values.

    Raises ValueError that names a shard, and the key in it, where it is damaged or one is wrong.
    """
    names, clips = _column_names(columns or {}), []
    for shard in find_files(pattern):
        classes = class_names(Path(shard).parent)
        for sample in read_index(shard, AUDIO_SUFFIXES, (".cls", ".txt", ".json")):
            entry = sample.entry()
            name = sample.name if entry is None else str(entry)
            try:
                row = _object(sample.texts.get(".json", "{}"))
                if all(str(row.get(k)) == v for k, v in (where or {}).items()):
                    clip = _described(name, row, sample.texts, names, classes, targets)
                    clips.append(replace(clip, entry=entry))
            except ValueError as error:
                raise ValueError(f"{sample.name}: {error}") from error
    if not clips:
        raise ValueError(f"{pattern} holds no samples{f' where {dict(where)}' if where else ''}")
    return clips


def inspect(
    clips: Sequence[Clip], *, decode: bool, threads: int | None = None
) -> list[Sound | str]:
    """For each clip what its samples say, or one sentence on why it cannot be used.

    Args:
        clips: to look at.
        decode: decode every sample; else only headers are read, which finds missing, empty and
            most truncated files, but no bad samples and no equal ones.
        threads: how many files at once; None: one for each core.
    """
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        return list(pool.map(lambda clip: _look(clip, decode), clips))


def split_by_groups(
    classes: Sequence[Any], groups: Sequence[Any], held_out: float
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, held out): stratified by class, no group on both sides; always the same.

    Args:
        classes: of each clip.
        groups: of each clip.
        held_out: part to hold out, about; it is one of round(1 / held_out) folds, or of as many
            as there are groups, or clips of the most frequent class.

    Raises ValueError where all clips are of one group, or no class has two.
    """
    if len(set(groups)) < 2:
        raise ValueError(
            f"{len(groups)} clips of one group cannot be split so that no group is on both sides; "
            "give more groups, or the split in a column"
        )
    most = max(Counter(classes).values())
    if most < 2:
        raise ValueError(
            f"{len(classes)} clips of as many classes cannot be split; give more clips of a class, "
            "or the split in a column"
        )
    folds = min(round(1 / held_out), len(set(groups)), most)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    index = np.arange(len(classes))
    names = {value: number for number, value in enumerate(dict.fromkeys(classes))}
    numbers = np.array([names[value] for value in classes])
    with warnings.catch_warnings():
        # A class of fewer clips than folds cannot be in each of them; the report counts classes.
        warnings.filterwarnings("ignore", message="The least populated class")
        kept, held = next(splitter.split(index, numbers, np.array(_numbered(groups))))
    return kept, held


def joined_groups(clips: Sequence[Clip], sounds: Sequence[Sound]) -> list[int]:
    """A group number for each clip: those of one group, one file or one content share it."""
    parent = list(range(len(clips)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[Any, int] = {}
    for i, (clip, sound) in enumerate(zip(clips, sounds, strict=True)):
        keys = [("file", clip.path)]
        keys += [("group", clip.group)] if clip.group is not None else []
        keys += [("sound", sound.digest)] if sound.digest is not None else []
        for key in keys:
            parent[root(i)] = root(first.setdefault(key, i))
    return _numbered([root(i) for i in range(len(clips))])


def duplicates(clips: Sequence[Clip], sounds: Sequence[Sound]) -> list[list[int]]:
    """Indices of clips with equal samples, two or more each."""
    same = defaultdict(list)
    for i, sound in enumerate(sounds):
        if sound.digest is not None:
            same[sound.digest].append(i)
    return [indices for indices in same.values() if len(indices) > 1]


def count_clips(report: DataReport, clips: Sequence[Clip], sounds: Sequence[Sound]) -> None:
    """Fill in the counts of the clips that are used."""
    seconds = [sound.seconds for sound in sounds]
    report.clips, report.seconds = len(clips), float(np.sum(seconds))
    report.shortest, report.longest = float(np.min(seconds)), float(np.max(seconds))
    report.median = float(np.median(seconds))
    report.rates = _frequencies(str(sound.rate) for sound in sounds)
    report.channels = _frequencies(str(sound.channels) for sound in sounds)
    report.labels = _frequencies(
        label for clip in clips for label in (*clip.labels, *(e.label for e in clip.events))
    )
    report.duplicates = sum(len(same) - 1 for same in duplicates(clips, sounds))
    report.groups = len({clip.group for clip in clips if clip.group is not None})


def remarks(clips: Sequence[Clip], sounds: Sequence[Sound]) -> Iterator[tuple[str, str]]:
    """What is odd about a clip that can be used: (kind, message)."""
    common = Counter(sound.rate for sound in sounds).most_common(1)[0][0]
    for clip, sound in zip(clips, sounds, strict=True):
        if sound.rate != common:
            kind = "other sampling rates, resampled"
            yield kind, f"{clip.name}: {sound.rate} Hz among {common} Hz"
        if sound.silent_channels == sound.channels:
            yield "clips that are silent", clip.name
        elif sound.silent_channels:
            count = f"{sound.silent_channels} of {sound.channels} channels"
            yield "channels that are silent", f"{clip.name}: {count}"


def kind_of(problem: str) -> str:
    """What a sentence of `inspect` is about, to count it."""
    for words, kind in (
        ("does not exist", "missing files"),
        ("truncated", "truncated files"),
        (": 0 samples", "files without samples"),
        ("file is empty", "files without samples"),
        ("NaN or infinite", "samples that are not finite"),
        ("does not lie within", "parts outside their file"),
    ):
        if words in problem:
            return kind
    return "unreadable files"


def _look(clip: Clip, decode: bool) -> Sound | str:
    try:
        if not decode:
            header = read_header(clip.file)
            frames = round(header.seconds * header.rate)
            part = part_of(clip.file, clip.start, clip.end, header.rate, frames)
            seconds = (part.stop - part.start) / header.rate
            return Sound(header.rate, header.channels, seconds, None, 0)
        recording = read_audio(clip.file, start=clip.start, end=clip.end)
    except UnreadableInput as error:
        return str(error)
    samples = recording.samples.numpy()
    silent = int((np.abs(samples).max(1) == 0).sum())
    digest = sha1(samples.tobytes()).hexdigest()
    return Sound(recording.rate, len(samples), recording.seconds, digest, silent)


def _column_names(columns: Mapping[str, str]) -> dict[str, str]:
    unknown = sorted(set(columns) - set(COLUMNS))
    if unknown:
        raise ValueError(f"data.columns has {unknown}, expected among {', '.join(COLUMNS)}")
    return {name: columns.get(name, name) for name in COLUMNS}


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a CSV or JSONL table of recordings")
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() not in (".jsonl", ".json"):
            return list(enumerate(csv.DictReader(file), start=2))
        rows = []
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                rows.append((number, _object(line)))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
        return rows


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {text.strip()}")
    return value


def _described(
    name: str,
    row: Mapping[str, Any],
    texts: Mapping[str, str],
    names: Mapping[str, str],
    classes: Sequence[str] | None,
    targets: Targets,
) -> Clip:
    """The clip of one key of a shard, from its KEY.json, `row`, and the texts beside it."""
    values = {name: row.get(column) for name, column in names.items()}
    if ".cls" in texts:
        values["label"] = _class_name(texts[".cls"], classes)
    if ".txt" in texts:
        values["text"] = texts[".txt"]
    if targets != "events":
        return _clip(name, values, targets)
    events = row.get("events") or [{}]
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise ValueError(f"events is {events!r}, expected a list of {{label, start, end}}")
    timed = [{k: event.get(k) for k in ("label", "start", "end")} for event in events]
    (clip,) = _joined([_clip(name, {**values, **event}, targets) for event in timed])
    return clip


def _class_name(text: str, classes: Sequence[str] | None) -> str:
    if classes is None:
        return text
    if not text.isdecimal() or int(text) >= len(classes):
        raise ValueError(
            f".cls is {text!r}, expected a number below {len(classes)}, the lines of {CLASSES}"
        )
    return classes[int(text)]


def _clip(path: str, values: Mapping[str, Any], targets: Targets) -> Clip:
    start = _number(values["start"], "start", 0.0)
    end = _number(values["end"], "end", None)
    if end is not None and not 0 <= start < end:
        raise ValueError(f"start is {start} and end {end}, expected 0 <= start < end")
    label, several, text = values["label"], values["labels"], values["text"]
    clip = Clip(
        path,
        group=_text(values["group"]),
        split=_text(values["split"]),
        fold=_text(values["fold"]),
        channel=_channel(values["channel"]),
    )
    if targets == "events":
        if label in (None, ""):
            return clip  # a file in which nothing is heard
        if end is None:
            raise ValueError("an event needs start and end, in seconds")
        return replace(clip, events=(Event(str(label), start, end),))
    clip = replace(clip, start=start, end=end)
    if targets == "label":
        if label in (None, ""):
            raise ValueError(f"no label; {_whereabouts('label', '.cls')}")
        return replace(clip, labels=(str(label),))
    if targets == "labels":
        parts = several if isinstance(several, list) else str(several or "").split(";")
        return replace(clip, labels=tuple(str(p).strip() for p in parts if str(p).strip()))
    if targets == "text":
        if text is None:
            raise ValueError(f"no text; {_whereabouts('text', '.txt')}")
        return replace(clip, text=" ".join(str(text).split()))
    return clip


def _whereabouts(name: str, suffix: str) -> str:
    return (
        f"data.columns.{name} names its column (in a shard: write KEY{suffix}, or name its key in "
        "KEY.json)"
    )


def _joined(clips: Sequence[Clip]) -> list[Clip]:
    """One clip for each file, with all of its events."""
    files: dict[tuple[str, int | None], Clip] = {}
    for clip in clips:
        key = clip.path, clip.channel
        before = files.get(key)
        files[key] = replace(before, events=before.events + clip.events) if before else clip
    return list(files.values())


def _number(value: Any, name: str, default: Any) -> Any:
    if value in (None, ""):
        return default
    try:
        seconds = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {value!r}, expected seconds") from error
    if not math.isfinite(seconds):
        raise ValueError(f"{name} is {value!r}, expected seconds; leave it empty for the file's")
    return seconds


def _channel(value: Any) -> int | None:
    if value in (None, ""):
        return None
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"channel is {value!r}, expected an index such as 0") from error


def _text(value: Any) -> str | None:
    return None if value in (None, "") else str(value)


def _numbered(values: Sequence[Any]) -> list[int]:
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return [numbers[value] for value in values]


def _frequencies(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _counted(counts: Mapping[str, int], unit: str = "") -> str:
    shown = [f"{value}{unit} {count}" for value, count in list(counts.items())[:12]]
    return ", ".join(shown) + (f" and {len(counts) - 12} more" if len(counts) > 12 else "")
