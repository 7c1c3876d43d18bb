"""Recordings to samples and batches.

Dimensions: batch b · channels c · samples n · frames t · classes k
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from mamba2_apps.audio.decoding import AUDIO_SUFFIXES, Recording, mix_down, read_audio, resample
from mamba2_apps.audio.manifest import Clip
from mamba2_apps.data import Preprocessing, Sample, UnreadableInput, data_places, files_under
from mamba2_apps.tasks.tokens import IGNORE

FRAME_SECONDS = 0.010
"""Resolution of event targets."""
MIN_PEAK = 1e-4


@dataclass(kw_only=True)
class AudioPreprocessing(Preprocessing):
    """A sound file, a `Recording`, or samples (n,) or (c, n) at `sample_rate`, to samples (n,).

    Args:
        sample_rate: samples per second that the model takes; others are resampled.
        channel: index of the channel that is used; null: the mean of all.
        level: "peak" scales each clip to a largest sample of 1, which a stream cannot; "none".
        min_seconds: silence follows a shorter clip up to this length, so that where single hits
            were trimmed does not matter.
    """

    sample_rate: int
    channel: int | None = None
    level: Literal["none", "peak"] = "none"
    min_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.min_seconds < 0:
            raise ValueError(f"data.min_seconds is {self.min_seconds}, expected at least 0")
        if self.level not in ("none", "peak"):
            raise ValueError(f"data.level is {self.level!r}, expected none or peak")

    def find(self, source: str) -> list[str]:
        if not Path(source).exists():
            return [source]  # one input that cannot be read, beside others that can
        return files_under(source, AUDIO_SUFFIXES, "sound files")

    def __call__(self, item: Any) -> Tensor:
        name, channel = "the samples", self.channel
        if isinstance(item, Clip):
            name, channel = item.name, self.channel if item.channel is None else item.channel
            recording = read_audio(item.file, start=item.start, end=item.end)
        elif isinstance(item, str | Path):
            name, recording = str(item), read_audio(item)
        else:
            recording = self._given(item)
        samples = mix_down(recording.samples, channel, name)
        samples = resample(samples, recording.rate, self.sample_rate)
        if self.level == "peak":
            samples = samples / samples.abs().max().clamp(min=MIN_PEAK)
        return F.pad(samples, (0, self.missing(len(samples))))

    def missing(self, samples: int) -> int:
        """Samples of silence that a clip of that many is followed by."""
        return max(0, round(self.min_seconds * self.sample_rate) - samples)

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """Pad inputs with zeros, and say by "mask" (b, n) where they are longer than the clip.

        Targets that are sequences are padded too: text (s,) int64 with -100, frames (t, k) with
        NaN.
        """
        inputs = [sample["inputs"] for sample in samples]
        lengths = torch.tensor([len(x) for x in inputs])
        batch = {"inputs": nn.utils.rnn.pad_sequence(inputs, batch_first=True)}
        if (lengths != lengths[0]).any():
            batch["mask"] = torch.arange(batch["inputs"].shape[1]) < lengths[:, None]
        if "targets" in samples[0]:
            batch["targets"] = _padded([sample["targets"] for sample in samples])
        return batch

    def units(self, batch: Sample) -> dict[str, int | float | Tensor]:
        return {"audio_seconds": data_places(batch) / self.sample_rate}

    def example(self) -> Sample:
        """An input to trace a model with: a second of quiet noise."""
        noise = torch.randn(self.sample_rate, generator=torch.Generator().manual_seed(0))
        return {"inputs": 0.01 * noise}

    def answerer(
        self, sources: Sequence[str], *, output: Path | None, stream: bool
    ) -> Callable[..., Iterator[dict[str, Any]]] | None:
        if not stream:
            return None
        from mamba2_apps.audio.streaming import answer_streams

        def answer(
            task: Any, *, rate: int | None = None, format: str = "s16le", channels: int = 1
        ) -> Iterator[dict[str, Any]]:
            return answer_streams(
                task, self, sources, rate=rate, sample_format=format, channels=channels
            )

        return answer

    def _given(self, item: Any) -> Recording:
        if isinstance(item, Recording):
            return item
        samples = given_samples(item)
        if not samples.numel():
            raise UnreadableInput(f"samples of shape {tuple(samples.shape)}, expected at least one")
        if not samples.isfinite().all():
            raise UnreadableInput("some samples are NaN or infinite, expected -1 to 1")
        return Recording(samples, self.sample_rate)


class ClipDataset(Dataset[Sample]):
    """Clips decoded on demand; a small set is kept in memory once it was.

    Args:
        clips: to decode.
        seconds: how long each is.
        preprocessing: what is done to them.
        encode: gives the targets of a clip of that many samples; None: there are none.
        crop: training on random parts of this many samples; None: on whole clips. Where clips are
            not kept, only the part is decoded, and `level` is that of the part.
        keep: keep decoded clips in memory.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        seconds: Sequence[float],
        preprocessing: AudioPreprocessing,
        encode: Callable[[Clip, int], Tensor] | None,
        *,
        crop: int | None = None,
        keep: bool = False,
    ) -> None:
        self.clips, self.seconds = list(clips), list(seconds)
        self.preprocessing, self.encode, self.crop = preprocessing, encode, crop
        self.kept: dict[int, Tensor] | None = {} if keep else None

    def samples(self, index: int) -> Tensor:
        """The whole clip (n,)."""
        if self.kept is None:
            return self.preprocessing(self.clips[index])
        if index not in self.kept:
            self.kept[index] = self.preprocessing(self.clips[index])
        return self.kept[index]

    def __getitem__(self, index: int) -> Sample:
        total = round(self.seconds[index] * self.preprocessing.sample_rate)
        if self.crop is not None and total > self.crop:
            return self._part(index, total, self.crop)
        sample: Sample = {"inputs": self.samples(index)}
        if self.encode is not None:
            sample["targets"] = self.encode(self.clips[index], len(sample["inputs"]))
        return sample

    def _part(self, index: int, total: int, length: int) -> Sample:
        """A random part of a clip of `total` samples, which begins with a frame of the targets."""
        hop = frame_samples(self.preprocessing.sample_rate)
        first = int(torch.randint((total - length) // hop + 1, ()))
        clip = self.clips[index]
        if self.kept is None:
            start = clip.start + first * hop / self.preprocessing.sample_rate
            end = start + length / self.preprocessing.sample_rate
            samples = self.preprocessing(replace(clip, start=start, end=end))
        else:
            samples = self.samples(index)[first * hop :]
        sample: Sample = {"inputs": samples[:length]}
        if self.encode is not None:
            targets = self.encode(clip, total)
            frames = slice(first, first - (-length // hop))
            sample["targets"] = targets[frames] if targets.ndim == 2 else targets
        return sample

    def __len__(self) -> int:
        return len(self.clips)


def given_samples(item: Any) -> Tensor:
    """An array of floats, (n,) or (c, n), as (c, n) float32.

    Raises UnreadableInput for integers, whose full scale is not 1, and for channels that come last.
    """
    samples = torch.as_tensor(item)
    shape = tuple(samples.shape)
    if not samples.is_floating_point() or samples.ndim not in (1, 2):
        raise UnreadableInput(
            f"samples of {samples.dtype} and shape {shape}, expected floats of -1 to 1, "
            "(samples,) or (channels, samples); divide integers by their full scale, int16 by 32768"
        )
    # A piece of a stream may be one sample of two channels.
    if samples.ndim == 2 and samples.numel() and shape[0] > max(2, shape[1]):
        raise UnreadableInput(
            f"samples of shape {shape}, expected (channels, samples) with no more channels than "
            "samples; transpose what has its channels last"
        )
    return torch.atleast_2d(samples.float())


def frame_samples(sample_rate: int) -> int:
    """Samples from one frame of event targets to the next, as `Features` counts its own."""
    return int(sample_rate * FRAME_SECONDS)


def _padded(targets: Sequence[Tensor]) -> Tensor:
    first = targets[0]
    if first.ndim == 2:
        return nn.utils.rnn.pad_sequence(list(targets), batch_first=True, padding_value=torch.nan)
    if first.ndim == 1 and not first.is_floating_point():
        return nn.utils.rnn.pad_sequence(list(targets), batch_first=True, padding_value=IGNORE)
    return torch.stack(list(targets))
