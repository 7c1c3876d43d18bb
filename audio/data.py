"""Data sets of recordings: from a folder, a table or shards to the three parts of a training.

Dimensions: batch b · samples n · frames t · classes k
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mamba2_apps.audio import augment, baselines, corpora, manifest, reports
from mamba2_apps.audio.augment import Augmentation
from mamba2_apps.audio.decoding import AUDIO_SUFFIXES, mix_down, read_audio, resample
from mamba2_apps.audio.features import Features
from mamba2_apps.audio.manifest import PARTS, Clip, DataReport, Sound, Targets
from mamba2_apps.audio.preprocessing import (
    FRAME_SECONDS,
    AudioPreprocessing,
    ClipDataset,
    frame_samples,
)
from mamba2_apps.data import DataModule, Sample, check_unique, files_under
from mamba2_apps.shards import names_shards

STATISTICS_CLIPS = 2000
PAUSE_SECONDS = 0.2
SHIPPED = "shipped:sounds"
Layout = Literal["auto", "speechcommands", "esc50"]


class AudioData(DataModule):
    """Recordings from a folder with a folder for each class, a CSV or JSONL table, or tar shards.

    Before training a report says what there is: durations, rates, classes, and by name what cannot
    be used and is left out. Nothing is ever replaced by another file.

    The test part is: `test_source` and the clips whose `split` column says so; or those of
    `test_groups` or `test_fold`; or a fixed `test_fraction`. What chooses the epoch is, in the same
    order, `val_source` and `split`, `val_fold`, or a `val_fraction` of the rest. Fractions are
    stratified where a clip has one class, not by tags, events or texts. Clips of one group, of one
    file or with equal samples are never divided, and where the table itself divides them the report
    names them.

    Args:
        source: the folder; the table; shards, such as train-{000..127}.tar or train-*.tar; or
            shipped:sounds for the 101 sounds that come with the package.
        val_source: such a source of the clips that choose the epoch; null: they are of `source`.
        test_source: such a source of the clips to test on; null: they are of `source`.
        layout: speechcommands or esc50 for a folder as these come; auto: a folder or a table.
        targets: label, one class for a clip; labels, any number of tags; events, tags from a start
            to an end within a file; text, what is said; none, for pretraining.
        columns: the table's own names of columns, such as {path: file}, or of keys in a shard's
            KEY.json; see `mamba2_apps.audio.manifest`.
        where: keep only the rows of the table that have these values in its own columns.
        labels: the classes, tags or letters; null: all that occur. Clips with others are left out.
        sample_rate: of what the model takes.
        channel: index of the channel that is used; null: the mean of all.
        level: peak scales each clip to a largest sample of 1, none keeps levels.
        min_seconds: silence follows a shorter clip up to this length, so that where single hits
            were trimmed does not matter.
        crop_seconds: train on random parts of this length; null: on whole clips.
        augmentation: random changes of training clips.
        test_fraction: part to test on, where neither the table nor test_groups says it.
        val_fraction: part of the rest that chooses the epoch, where the table does not say it.
        test_groups: groups to test on; null: not chosen by group.
        test_fold: value of the fold column to test on; null: not chosen by fold.
        val_fold: value of the fold column that chooses the epoch; null: a val_fraction.
        max_letters_per_second: leave out clips with more text than a CTC can place; null: any.
        strict: stop at the first thing that the report would name, where otherwise clips are left
            out, or kept with a note. On the command line --strict is short for it.
        decode_all: decode every file before training, to find bad samples and equal clips; false
            reads headers only, and a bad file then stops training when it comes up.
        keep_minutes: keep decoded clips in memory where all of them are at most this long.
        compare: train logistic regression and an RBF-SVM on log-mel statistics beside the model.
        batch_size: clips per step and device.
        num_workers: processes that decode and augment; 0 does it in the training process.
        balanced: draw every class equally often while training, with replacement.
    """

    train_set: ClipDataset
    val_set: ClipDataset
    test_set: ClipDataset

    def __init__(
        self,
        *,
        source: str,
        val_source: str | None = None,
        test_source: str | None = None,
        layout: Layout = "auto",
        targets: Targets = "label",
        columns: dict[str, str] | None = None,
        where: dict[str, str] | None = None,
        labels: list[str] | None = None,
        sample_rate: int = 16000,
        channel: int | None = None,
        level: Literal["none", "peak"] = "none",
        min_seconds: float = 0.0,
        crop_seconds: float | None = None,
        augmentation: Augmentation | None = None,
        test_fraction: float = 0.2,
        val_fraction: float = 0.15,
        test_groups: list[str] | None = None,
        test_fold: str | None = None,
        val_fold: str | None = None,
        max_letters_per_second: float | None = None,
        strict: bool = False,
        decode_all: bool = True,
        keep_minutes: float = 60.0,
        compare: bool = False,
        batch_size: int = 32,
        num_workers: int = 0,
        balanced: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, balanced=balanced)
        for name, part in (("test_fraction", test_fraction), ("val_fraction", val_fraction)):
            if not 0 < part <= 0.5:
                raise ValueError(f"data.{name} is {part}, expected above 0 and up to 0.5")
        check_unique(labels or (), "data.labels")
        self.augmentation = augmentation or Augmentation()
        _check_changes(targets, crop_seconds, self.augmentation)
        if layout != "auto" and layout not in corpora.READERS:
            raise ValueError(
                f"data.layout is {layout!r}, expected auto, {_few(list(corpora.READERS))}"
            )
        for name, given, others in (
            ("val_source", val_source, {"val_fold": val_fold}),
            ("test_source", test_source, {"test_fold": test_fold, "test_groups": test_groups}),
        ):
            beside = [other for other, value in others.items() if value is not None]
            if given is not None and beside:
                raise ValueError(f"data.{name} is {given} beside data.{beside[0]}; give one")
        self.source, self.layout, self.targets = source, layout, targets
        self.part_sources = {"val": val_source, "test": test_source}
        self.columns, self.where, self.given_labels = columns, where, labels
        self.sample_rate, self.channel, self.level = sample_rate, channel, level
        self.min_seconds, self.crop_seconds = min_seconds, crop_seconds
        self.test_fraction, self.val_fraction = test_fraction, val_fraction
        self.test_groups, self.test_fold, self.val_fold = test_groups, test_fold, val_fold
        self.max_letters_per_second = max_letters_per_second
        self.strict, self.decode_all, self.keep_minutes = strict, decode_all, keep_minutes
        self.compare = compare
        self.data_report: DataReport | None = None

    @property
    def preprocessing(self) -> AudioPreprocessing:
        return AudioPreprocessing(
            sample_rate=self.sample_rate,
            channel=self.channel,
            level=self.level,
            min_seconds=self.min_seconds,
        )

    def read(self) -> list[Clip]:
        """Every clip of the sources, not looked at yet."""
        clips = self._read(self.source)
        for part, source in self.part_sources.items():
            if source is not None:
                clips += [replace(clip, split=part) for clip in self._read(source)]
        return clips

    def _read(self, source: str) -> list[Clip]:
        if source == SHIPPED:
            return manifest.read_table(corpora.SOUNDS, self.targets)
        if self.layout != "auto":
            return corpora.READERS[self.layout](source)
        if names_shards(source):
            return manifest.read_shards(
                source, self.targets, columns=self.columns, where=self.where
            )
        if Path(source).is_dir():
            if self.targets in ("events", "text"):
                raise ValueError(
                    f"data.source is the folder {source}; targets {self.targets} come from a "
                    "CSV or JSONL table or from shards"
                )
            return manifest.read_folder(source)
        return manifest.read_table(source, self.targets, columns=self.columns, where=self.where)

    def setup(self, stage: str) -> None:
        if self.data_report is not None:
            return
        report = DataReport()
        clips, sounds = self._usable(self.read(), report)
        self.labels = self._label_names(clips)
        clips, sounds = self._labelled(clips, sounds, report)
        parts = self._parts(clips, sounds, report)
        for kind, message in manifest.remarks(clips, sounds):
            self._note(report, kind, message)
        manifest.count_clips(report, clips, sounds)
        report.parts = {part: len(parts[part]) for part in PARTS}
        self.data_report = report
        if stage == "fit":
            print("\n".join(["data:", *(f"  {row}" for row in report.lines())]), file=sys.stderr)
        if self.augmentation.join_probability > 0 and " " not in self.labels:
            raise ValueError(
                "data.augmentation.join_probability is set; joined texts have a space between, and "
                "no text has one: add ' ' to data.labels"
            )
        self._seconds = {c: s.seconds for c, s in zip(clips, sounds, strict=True)}
        keep = report.seconds <= 60 * self.keep_minutes
        self.train_set, self.val_set, self.test_set = (
            self._dataset([clips[i] for i in parts[part]], part, keep) for part in PARTS
        )

    def augment(self, sample: Sample) -> Sample:
        config = self.augmentation
        if config.join_probability > 0 and torch.rand(()) < config.join_probability:
            sample = self._joined(sample)
        samples = sample["inputs"]
        if config.speed != (1.0, 1.0):
            samples = augment.change_speed(samples, config.speed)
        if config.shift_seconds > 0:
            samples = augment.shift(samples, round(config.shift_seconds * self.sample_rate))
        if config.noise_probability > 0 and torch.rand(()) < config.noise_probability:
            samples = augment.add_random_noise(samples, config.noise_snr_db, self._noise())
        if config.gain_db > 0:
            samples = augment.change_gain(samples, config.gain_db)
        return {**sample, "inputs": samples}

    def _joined(self, sample: Sample) -> Sample:
        """A clip and its text, a pause, which is a space, and another one."""
        other = self.train_set[int(torch.randint(len(self.train_set), ()))]
        pause = torch.zeros(round(PAUSE_SECONDS * self.sample_rate))
        space = torch.tensor([self.labels.index(" ")])
        return {
            "inputs": torch.cat([sample["inputs"], pause, other["inputs"]]),
            "targets": torch.cat([sample["targets"], space, other["targets"]]),
        }

    def mix(self, batch: Sample) -> Sample:
        if self.augmentation.mixup_alpha == 0:
            return batch
        return augment.mixup(batch, self.augmentation.mixup_alpha, len(self.labels))

    def class_of_samples(self) -> np.ndarray:
        if self.targets != "label":
            return super().class_of_samples()
        return np.array([self.labels.index(clip.labels[0]) for clip in self.train_set.clips])

    @torch.no_grad()
    def prepare_model(self, model: nn.Module) -> None:
        """Measure the mean and deviation of the training clips' features for the adapter."""
        features = getattr(getattr(model, "adapter", None), "features", None)
        if not isinstance(features, Features):
            return  # a model of other inputs
        if features.sample_rate != self.sample_rate:
            raise ValueError(
                f"model.adapter.features.sample_rate is {features.sample_rate} and "
                f"data.sample_rate {self.sample_rate}, expected the same"
            )
        if self.targets == "text":
            self._check_room_for_texts(model.adapter)
        if self.targets == "events" and features.hop != frame_samples(self.sample_rate):
            raise ValueError(
                f"model.adapter.features.hop_seconds is {features.hop_seconds}; events have a "
                f"target for each {FRAME_SECONDS} s, expected that"
            )
        count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros(())
        step = -(-len(self.train_set) // STATISTICS_CLIPS)
        for index in range(0, len(self.train_set), step):
            energies = features.log_energies(self.train_set.samples(index)[None])[0].double()
            count += len(energies)
            total, squares = total + energies.sum(0), squares + energies.square().sum(0)
        mean, square = total / count, squares / count
        if not features.per_bin:
            mean, square = mean.mean(), square.mean()
        features.set_statistics(mean, (square - mean.square()).clamp(min=0).sqrt())

    def baselines(self) -> dict[str, dict[str, float]]:
        if not self.compare:
            return {}
        sets = {"fit": (self.train_set, self.val_set), "test": (self.test_set,)}
        waves = {n: [s.samples(i) for s in part for i in range(len(s))] for n, part in sets.items()}
        classes = {n: [c.labels[0] for s in part for c in s.clips] for n, part in sets.items()}
        return baselines.scores(
            waves["fit"], classes["fit"], waves["test"], classes["test"], self.sample_rate
        )

    def findings(self) -> dict[str, Any] | None:
        return None if self.data_report is None else self.data_report.to_dict()

    def report(self, task: Any, folder: Path) -> None:
        reports.draw(task, self, folder)

    def _usable(self, clips: list[Clip], report: DataReport) -> tuple[list[Clip], list[Sound]]:
        """The clips that can be decoded; the others go into the report, by kind."""
        kept, sounds = [], []
        for clip, found in zip(clips, manifest.inspect(clips, decode=self.decode_all), strict=True):
            if isinstance(found, str):
                self._leave_out(report, manifest.kind_of(found), found)
                continue
            channel = self.channel if clip.channel is None else clip.channel
            if channel is not None and not 0 <= channel < found.channels:
                message = f"{clip.name}: channel {channel} was asked for, it has {found.channels}"
                self._leave_out(report, "missing channels", message)
            else:
                kept.append(clip)
                sounds.append(found)
        self._require_some(kept, report)
        return kept, sounds

    def _labelled(
        self, clips: list[Clip], sounds: list[Sound], report: DataReport
    ) -> tuple[list[Clip], list[Sound]]:
        """The clips whose labels, or text, the model can give."""
        names, kept, kept_sounds = set(self.labels), [], []
        for clip, sound in zip(clips, sounds, strict=True):
            used = {*clip.labels, *(event.label for event in clip.events), *(clip.text or "")}
            unknown = sorted(used - names) if self.targets != "none" else []
            if unknown:
                kind = "labels outside the set"
                self._leave_out(
                    report, kind, f"{clip.name}: {unknown}, expected {_few(self.labels)}"
                )
            elif self.targets == "label" and not clip.labels:
                kind = "files in no class's folder"
                self._leave_out(report, kind, f"{clip.name}: lies in no folder of a class")
            elif late := [event for event in clip.events if event.start >= sound.seconds]:
                self._leave_out(
                    report,
                    "events after the end of their file",
                    f"{clip.name}: {late[0].label} starts at {late[0].start:g} s of "
                    f"{sound.seconds:.2f} s; expected seconds within the file",
                )
            elif clip.text is not None and self._speaks_too_fast(clip.text, sound.seconds):
                self._leave_out(
                    report,
                    "too much text",
                    f"{clip.name}: {len(clip.text)} letters in {sound.seconds:.2f} s, expected at "
                    f"most {self.max_letters_per_second} a second",
                )
            else:
                kept.append(clip)
                kept_sounds.append(sound)
        self._require_some(kept, report)
        return kept, kept_sounds

    def _speaks_too_fast(self, text: str, seconds: float) -> bool:
        if self.max_letters_per_second is None:
            return False
        return _tokens_needed(text) > self.max_letters_per_second * seconds

    def _check_room_for_texts(self, adapter: Any) -> None:
        """Raise ValueError where a CTC would have fewer tokens than letters: its loss is infinite,
        and the weights are NaN from then on.
        """
        for dataset in (self.train_set, self.val_set, self.test_set):
            samples = torch.tensor([int(s * self.sample_rate) for s in dataset.seconds])
            if dataset is self.train_set:
                samples = self.augmentation.fewest(samples, self.sample_rate)
            tokens = adapter.token_counts(adapter.features.frame_counts(samples)).tolist()
            for clip, room, seconds in zip(dataset.clips, tokens, dataset.seconds, strict=True):
                if (needed := _tokens_needed(clip.text or "")) > room:
                    raise ValueError(
                        f"{clip.name}: a CTC needs {needed} tokens for its text, and has {room}, "
                        "after data.augmentation at least; set data.max_letters_per_second to "
                        f"{room / seconds:.0f} or less, or smaller model.adapter.strides"
                    )

    def _leave_out(self, report: DataReport, kind: str, message: str) -> None:
        if self.strict:
            raise ValueError(f"{message} (data.strict is set; without it the clip is left out)")
        report.problems.setdefault(kind, []).append(message)

    def _require_some(self, clips: list[Clip], report: DataReport) -> None:
        if not clips:
            kinds = ", ".join(f"{len(m)} {kind}" for kind, m in report.problems.items())
            first = next(iter(report.problems.values()))[0]
            raise ValueError(f"no clip of {self.source} can be used: {kinds}; the first: {first}")

    def _label_names(self, clips: list[Clip]) -> list[str]:
        if self.given_labels is not None:
            return list(self.given_labels)
        if self.targets == "none":
            return []
        names: set[str] = set()
        for clip in clips:
            names |= {*clip.labels, *(event.label for event in clip.events), *(clip.text or "")}
        return sorted(names)

    def _parts(
        self, clips: list[Clip], sounds: list[Sound], report: DataReport
    ) -> dict[str, list[int]]:
        """Indices of each part's clips."""
        groups = manifest.joined_groups(clips, sounds)
        classes = (
            [clip.labels[:1] for clip in clips] if self.targets == "label" else [0] * len(clips)
        )
        test = self._chosen(clips, "test", self.test_fold, self.test_groups)
        val = self._chosen(clips, "val", self.val_fold, None)
        rest = sorted(set(range(len(clips))) - set(test or ()) - set(val or ()))
        if test is None:
            rest, test = _split(rest, classes, groups, self.test_fraction)
        if val is None:
            rest, val = _split(rest, classes, groups, self.val_fraction)
        parts = {"train": rest, "val": sorted(set(val) - set(test)), "test": test}
        for part, indices in parts.items():
            if not indices:
                raise ValueError(f"{self.source} has no clips to {part} with; see data.{part}_*")
            if self.targets == "text" and not any(clips[i].text for i in indices):
                raise ValueError(
                    f"{self.source}: the texts of all {len(indices)} clips to {part} with are "
                    "empty, so that no error rate is defined; give texts (data.columns.text names "
                    "their column), or other clips by data.test_*, data.val_* or the split column"
                )
        self._note_divided(clips, sounds, parts, report)
        return parts

    def _chosen(
        self, clips: list[Clip], part: str, fold: str | None, groups: list[str] | None
    ) -> list[int] | None:
        """The clips that the table or the recipe puts into a part; None: it does not say."""
        if groups is not None:
            unknown = sorted(set(groups) - {str(clip.group) for clip in clips})
            if unknown:
                known = sorted({str(clip.group) for clip in clips})
                raise ValueError(f"data.{part}_groups has {unknown}, expected among {_few(known)}")
            return [i for i, clip in enumerate(clips) if clip.group in groups]
        if fold is not None:
            found = [i for i, clip in enumerate(clips) if clip.fold == str(fold)]
            if not found:
                known = sorted({str(clip.fold) for clip in clips})
                raise ValueError(f"data.{part}_fold is {fold}, expected one of {_few(known)}")
            return found
        wrong = sorted({clip.split for clip in clips if clip.split not in (*PARTS, None)})
        if wrong:
            raise ValueError(f"{self.source}: split is {_few(wrong)}, expected {_few(PARTS)}")
        if any(clip.split == part for clip in clips):
            return [i for i, clip in enumerate(clips) if clip.split == part]
        return None

    def _note_divided(
        self,
        clips: list[Clip],
        sounds: list[Sound],
        parts: dict[str, list[int]],
        report: DataReport,
    ) -> None:
        """Name groups, files and equal sounds that are in two parts, or sounds with two labels."""
        part_of = {i: part for part, indices in parts.items() for i in indices}
        for what in ("group", "file"):
            found: dict[Any, set[str]] = {}
            for i, clip in enumerate(clips):
                name = clip.group if what == "group" else clip.path
                if name is not None:
                    found.setdefault(name, set()).add(part_of[i])
            for name, several in found.items():
                if len(several) > 1:
                    self._note(report, f"one {what} in two parts", f"{name}: {sorted(several)}")
        for same in manifest.duplicates(clips, sounds):
            names = ", ".join(clips[i].name for i in same)
            several = {part_of[i] for i in same}
            if len(several) > 1:
                self._note(report, "equal sounds in two parts", f"{names}: {sorted(several)}")
            if len({(clips[i].labels, clips[i].text) for i in same}) > 1:
                self._note(report, "equal sounds with different labels", names)

    def _note(self, report: DataReport, kind: str, message: str) -> None:
        if self.strict:
            raise ValueError(f"{kind}: {message} (data.strict is set)")
        report.notes.setdefault(kind, []).append(message)

    def _dataset(self, clips: list[Clip], part: str, keep: bool) -> ClipDataset:
        crop = None if self.crop_seconds is None else round(self.crop_seconds * self.sample_rate)
        return ClipDataset(
            clips,
            [self._seconds[clip] for clip in clips],
            self.preprocessing,
            None if self.targets == "none" else self._encode,
            crop=crop if part == "train" else None,
            keep=keep,
        )

    def _encode(self, clip: Clip, samples: int) -> Tensor:
        """A clip's targets, as the tasks take them."""
        place = {label: index for index, label in enumerate(self.labels)}
        if self.targets == "label":
            return torch.tensor(place[clip.labels[0]])
        if self.targets == "text":
            return torch.tensor([place[letter] for letter in clip.text or ""], dtype=torch.long)
        if self.targets == "labels":
            targets = torch.zeros(len(place))
            targets[[place[label] for label in clip.labels]] = 1
            return targets
        hop = frame_samples(self.sample_rate)
        targets = torch.zeros(-(-samples // hop), len(place))
        for event in clip.events:
            # In whole samples, as the features step: of 22,050 a second no frame is 10 ms.
            first, last = (round(t * self.sample_rate / hop) for t in (event.start, event.end))
            targets[first : max(last, first + 1), place[event.label]] = 1
        return targets

    def _noise(self) -> Tensor | None:
        """A random recording of the noise folder; None: white noise."""
        if self.augmentation.noise is None:
            return None
        files = _noise_files(self.augmentation.noise)
        return _noise_samples(files[int(torch.randint(len(files), ()))], self.sample_rate)


def _check_changes(
    targets: Targets, crop_seconds: float | None, augmentation: Augmentation
) -> None:
    """Raise ValueError for random changes after which the targets would be wrong."""
    if targets == "text" and crop_seconds is not None:
        raise ValueError("data.crop_seconds is set; a part of a clip does not say all of its text")
    if targets == "events" and augmentation.moves:
        raise ValueError(
            "data.augmentation changes speed or shifts; events would no longer be where they are"
        )
    if targets != "text" and augmentation.join_probability > 0:
        raise ValueError(
            f"data.augmentation.join_probability is {augmentation.join_probability}, expected 0: "
            f"only texts can be joined, not {targets}"
        )
    if targets in ("events", "text", "none") and augmentation.mixup_alpha > 0:
        raise ValueError(
            f"data.augmentation.mixup_alpha is {augmentation.mixup_alpha}; only label and labels "
            f"can be mixed, not {targets}"
        )


def _tokens_needed(text: str) -> int:
    """By a CTC, which needs a blank between equal letters."""
    return len(text) + sum(a == b for a, b in pairwise(text))


def _split(
    indices: list[int], classes: Sequence[Any], groups: Sequence[Any], held_out: float
) -> tuple[list[int], list[int]]:
    kept, held = manifest.split_by_groups(
        [classes[i] for i in indices], [groups[i] for i in indices], held_out
    )
    return [indices[i] for i in kept], [indices[i] for i in held]


def _few(names: Sequence[Any]) -> str:
    shown = ", ".join(map(str, names[:12]))
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")


@lru_cache(maxsize=4)
def _noise_files(folder: str) -> list[str]:
    return files_under(folder, AUDIO_SUFFIXES, "sound files")


@lru_cache(maxsize=256)
def _noise_samples(path: str, rate: int) -> Tensor:
    recording = read_audio(path)
    return resample(mix_down(recording.samples, None), recording.rate, rate)
