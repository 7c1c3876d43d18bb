"""Sound files to samples: decoding that notices what is missing, and resampling.

Dimensions: channels c · samples n
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile
import torch
from torch import Tensor
from torchaudio.transforms import Resample

from mamba2_apps.data import UnreadableInput
from mamba2_apps.shards import Entry

SOUNDFILE_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".au")
PYAV_SUFFIXES = (".m4a", ".aac", ".mp4", ".mkv", ".mka", ".webm", ".wma", ".mov", ".amr")
AUDIO_SUFFIXES = SOUNDFILE_SUFFIXES + PYAV_SUFFIXES
BLOCK = 2**18
"""Samples that are read at once where nobody knows how many there are."""
Source = str | Path | Entry
"""A sound file, or one within a shard."""


class Recording(NamedTuple):
    """Decoded sound: samples (c, n) float32, full scale from -1 to 1, and samples per second."""

    samples: Tensor
    rate: int

    @property
    def seconds(self) -> float:
        return self.samples.shape[1] / self.rate


class Header(NamedTuple):
    """What a file says of itself, without its samples being decoded."""

    rate: int
    channels: int
    seconds: float


def read_header(path: Source) -> Header:
    """Rate, channels and length of a file; where it does not tell its length, it is decoded.

    Raises UnreadableInput as `read_audio` does.
    """
    if not _by_pyav(path):
        with open_sound(path) as file:
            promised = _promised(file)
            if promised == 0:
                raise UnreadableInput(f"{path}: 0 samples")
            if promised is not None:
                return Header(file.samplerate, file.channels, promised / file.samplerate)
    samples, rate = read_audio(path)
    return Header(rate, len(samples), samples.shape[1] / rate)


def read_audio(
    path: Source, *, start: float = 0.0, end: float | None = None, whole: bool = True
) -> Recording:
    """Decode a file, or a part of it.

    wav, flac, mp3, ogg, opus, aiff and au are read by soundfile, containers such as m4a, mp4 and
    webm by PyAV (`pip install 'mamba2-apps[media]'`); the file's suffix decides.

    Args:
        path: the file, or the place of one within a shard.
        start: first second of the part.
        end: the second at which the part ends; None: the end of the file.
        whole: refuse a file that holds less than it promises.

    Raises UnreadableInput, which names the file, for what cannot be decoded or is cut short, for no
    samples, for samples that are not finite, and for a part that lies outside.
    """
    if _by_pyav(path):
        samples, rate = _read_pyav(path)
        samples = samples[:, part_of(path, start, end, rate, samples.shape[1])]
    else:
        samples, rate = _read_soundfile(path, start, end, whole)
    if samples.shape[1] == 0:
        raise UnreadableInput(f"{path}: 0 samples")
    finite = np.isfinite(samples)
    if not finite.all():
        raise UnreadableInput(
            f"{path}: {samples.size - int(finite.sum())} of {samples.size} samples are NaN or "
            "infinite; export the file again"
        )
    return Recording(torch.from_numpy(samples), rate)


@contextmanager
def open_sound(path: Source, *, whole: bool = True) -> Iterator[soundfile.SoundFile]:
    """A file that soundfile reads, open.

    Raises UnreadableInput for what is none, and, for `whole`, for one that says that it is cut.
    """
    with ExitStack() as stack:
        content = stack.enter_context(_bytes_of(path))
        try:
            file = stack.enter_context(soundfile.SoundFile(_given(path, content)))
            if file.format == "MP3" and not _counts_its_frames(content):
                file = stack.enter_context(_UncountedMP3(content))
        except (soundfile.LibsndfileError, TypeError) as error:
            cause = "the file is empty" if content.seek(0, 2) == 0 else _cause(error)
            raise UnreadableInput(f"{path}: not a readable sound file ({cause})") from error
        if whole:
            _check_promise(path, file)
        yield file


def blocks(path: Source, file: soundfile.SoundFile, size: int) -> Iterator[np.ndarray]:
    """A file's samples as (c, up to `size`) float32, in turn.

    Raises UnreadableInput after the last one where the file holds less than it promises.
    """
    count = 0
    try:
        while len(block := file.read(size, dtype="float32", always_2d=True)):
            count += len(block)
            yield block.T
    except soundfile.LibsndfileError as error:
        raise _undecodable(path, error) from error
    _check_length(path, count, _promised(file))


def resample(samples: Tensor, rate: int, new_rate: int) -> Tensor:
    """Samples (..., n) at `rate` to (..., ceil(n · new_rate / rate)) at `new_rate`.

    torchaudio's windowed sinc, whose kernel is computed once for each pair of rates.
    """
    return samples if rate == new_rate else resampler(rate, new_rate)(samples)


@lru_cache(maxsize=32)
def resampler(rate: int, new_rate: int) -> Resample:
    """The filter from one rate to another, kept."""
    for value in (rate, new_rate):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"sampling rate {value!r}, expected a positive whole number of Hz")
    return Resample(rate, new_rate)


def mix_down(samples: Tensor, channel: int | None, name: Any = "input") -> Tensor:
    """Samples (c, n) to one channel (n,): their mean, or the channel of that index.

    Raises UnreadableInput where there is no such channel.
    """
    if channel is None:
        return samples.mean(0)
    if not 0 <= channel < len(samples):
        raise UnreadableInput(f"{name}: channel {channel} was asked for, it has {len(samples)}")
    return samples[channel]


def _read_soundfile(
    path: Source, start: float, end: float | None, whole: bool
) -> tuple[np.ndarray, int]:
    with open_sound(path, whole=whole) as file:
        if _promised(file) is None:
            found = [np.zeros((file.channels, 0), np.float32), *blocks(path, file, BLOCK)]
            samples = np.concatenate(found, axis=1)
            part = part_of(path, start, end, file.samplerate, samples.shape[1])
            return samples[:, part], file.samplerate
        part = part_of(path, start, end, file.samplerate, file.frames)
        promised = part.stop - part.start
        try:
            file.seek(part.start)
            samples = file.read(promised, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise _undecodable(path, error) from error
        if whole:
            _check_length(path, len(samples), promised)
        return np.ascontiguousarray(samples.T), file.samplerate


def _by_pyav(path: Source) -> bool:
    return Path(path.name if isinstance(path, Entry) else path).suffix.lower() in PYAV_SUFFIXES


def _bytes_of(path: Source) -> BinaryIO:
    if isinstance(path, Entry):
        return path.open()
    if not Path(path).is_file():
        raise UnreadableInput(f"{path}: does not exist")
    return Path(path).open("rb")


def _given(path: Source, content: BinaryIO) -> Any:
    """What a decoder opens: a file of its own by its name, which it then reads without Python."""
    return content if isinstance(path, Entry) else str(path)


class _UncountedMP3(soundfile.SoundFile):
    """An MP3 without a header that has the number of frames, to be read on until there is no more.

    libsndfile reads no further than its idea of the length, here the file's size over the bit rate
    of the first frame: too little where that frame is loud. So the file is said to be longer.
    """

    def __init__(self, content: BinaryIO) -> None:
        super().__init__(_EndsLater(content))

    def seekable(self) -> bool:
        """Not: soundfile seeks after each read, where the decoder loses what one frame of a
        variable bit rate holds for the next.
        """
        return False


class _EndsLater:
    """A file that is said to end a thousand times later than it does."""

    def __init__(self, content: BinaryIO) -> None:
        self.content, self.end, self.at_end = content, 1000 * content.seek(0, 2), False
        self.read = content.read
        content.seek(0)

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at_end = whence == 2
        return self.end if self.at_end else self.content.seek(offset, whence)

    def tell(self) -> int:
        return self.end if self.at_end else self.content.tell()


def _counts_its_frames(content: BinaryIO) -> bool:
    """Whether an MP3 begins with a header, Xing's or Info's, that has the number of frames.

    Of Fraunhofer's VBRI libsndfile makes no use.
    """
    place = content.tell()
    content.seek(0)
    while (start := content.read(10))[:3] == b"ID3":  # its size has seven bits in a byte
        content.seek(sum(byte << 7 * place for place, byte in enumerate(start[:5:-1])), 1)
    start += content.read(2**10)
    content.seek(place)
    return bool(re.search(rb"\0(?:Xing|Info)\0\0\0[\x01\x03\x05\x07\x09\x0b\x0d\x0f]", start))


def _promised(file: soundfile.SoundFile) -> int | None:
    """Samples that a file says it holds; None: it does not say."""
    return None if isinstance(file, _UncountedMP3) else file.frames


def _check_length(path: Source, found: int, promised: int | None) -> None:
    if promised is not None and found < promised:
        raise UnreadableInput(
            f"{path}: truncated: {found} of {promised} samples; fetch the file again"
        )


def _check_promise(path: Source, file: soundfile.SoundFile) -> None:
    """Raise UnreadableInput where a file ends before its own header or its stream says.

    libsndfile takes the length of a cut wav, aiff or ogg file from what is left, without an error.
    """
    match = re.search(r"(?:data|SSND|Data Size) *: *(\d+) \(should be (\d+)\)", file.extra_info)
    # A header written before the end was known, as into a pipe, holds 0 or the largest number.
    if match and 0 < int(match[1]) < 2**31 - 2 and int(match[2]) < int(match[1]):
        raise UnreadableInput(
            f"{path}: truncated: {match[2]} of {match[1]} bytes of sound; fetch the file again"
        )
    if file.format == "OGG" and not _ogg_has_ended(path):
        raise UnreadableInput(
            f"{path}: truncated: its last page does not end the stream; fetch the file again"
        )


def _ogg_has_ended(path: Source) -> bool:
    """Whether the last page is marked as the end of its stream (RFC 3533) and is whole."""
    with _bytes_of(path) as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 2**17))  # a page has less than 2^16 bytes
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return False
    length = 27 + page[26] + sum(page[27 : 27 + page[26]])
    return bool(page[5] & 4) and len(page) >= length


def _read_pyav(path: Source) -> tuple[np.ndarray, int]:
    try:
        import av
    except ImportError as error:
        raise UnreadableInput(
            f"{path}: files of this kind are read by PyAV; pip install 'mamba2-apps[media]'"
        ) from error
    try:
        with _bytes_of(path) as file, av.open(_given(path, file), "r") as container:
            if not container.streams.audio:
                raise UnreadableInput(f"{path}: has no sound in it")
            stream = container.streams.audio[0]
            rate = stream.rate
            # Only the type changes: samples as planes of float.
            convert = av.AudioResampler(format="fltp", layout=stream.layout, rate=rate)
            frames = [
                part for frame in container.decode(stream) for part in convert.resample(frame)
            ]
            frames += convert.resample(None)
            promised = _promised_seconds(container, stream)
            frame_seconds = stream.codec_context.frame_size / rate
    except av.FFmpegError as error:
        raise UnreadableInput(f"{path}: not a readable sound file ({error.strerror})") from error
    if not frames:
        raise UnreadableInput(f"{path}: 0 samples")
    samples = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)
    # Codecs cut or pad by up to three frames of theirs, which a container's length may count.
    if promised is not None and samples.shape[1] / rate < promised - max(0.1, 3 * frame_seconds):
        raise UnreadableInput(
            f"{path}: truncated: {samples.shape[1] / rate:.2f} of {promised:.2f} seconds; "
            "fetch the file again"
        )
    return samples.astype(np.float32, copy=False), rate


def _promised_seconds(container: Any, stream: Any) -> float | None:
    """How long the sound is, as its stream says, or else, where it is alone, its container."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if container.duration and len(container.streams) == 1:
        return container.duration / 1e6  # microseconds; Matroska tells it nowhere else
    return None


def part_of(path: Source, start: float, end: float | None, rate: int, frames: int) -> slice:
    """The samples of a file of `frames` from one second to another.

    Raises UnreadableInput where they do not lie within it.
    """
    first = round(start * rate)
    last = frames if end is None else round(end * rate)
    # Tables are rounded to milliseconds: a part may end a few samples after the file.
    if not 0 <= first < max(last, 1) or last > frames + 0.002 * rate:
        raise UnreadableInput(
            f"{path}: the part from {start} to {'its end' if end is None else end} s does not lie "
            f"within its {frames / rate:.3f} s"
        )
    return slice(first, min(last, frames))


def _undecodable(path: Source, error: Exception) -> UnreadableInput:
    return UnreadableInput(f"{path}: cannot be decoded ({_cause(error)})")


def _cause(error: Exception) -> str:
    return str(error).split(": ", 1)[-1].strip().rstrip(".")
