"""A causal model on a live stream: from PCM bytes to answers, with a state of constant size.

Every stage keeps what it still needs of the past: the resampling filter its last samples, framing
the rest of a window, the convolutions their last frames, the backbone its states, the head its sum
or its open events. Pieces of any size give what the whole recording gives offline.

Dimensions: channels c · samples n · frames t · mel bins m · seqlen l (tokens) · d_model d
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2_apps.audio.adapter import KERNEL, FrameTokens, PatchTokens
from mamba2_apps.audio.decoding import (
    PYAV_SUFFIXES,
    SOUNDFILE_SUFFIXES,
    blocks,
    mix_down,
    open_sound,
    resampler,
)
from mamba2_apps.audio.features import Features
from mamba2_apps.audio.preprocessing import given_samples
from mamba2_apps.audio.tasks import EventDetection
from mamba2_apps.data import UnreadableInput
from mamba2_apps.few_tokens import FewTokensBackbone
from mamba2_apps.heads import CTCHead, PooledHead
from mamba2_apps.tasks import CTC

PCM_FORMATS = {"s16le": ("<i2", 2**15), "f32le": ("<f4", 1)}
CHUNK_SECONDS = 0.1


class AudioStream:
    """One stream of sound through a trained task.

    Args:
        task: of a RUN; its model has an audio adapter and a causal backbone, whose weights must
            stay as they are while the stream runs.
        preprocessing: of the same RUN.
        rate: samples per second of what will be pushed.

    Raises ValueError where the model cannot stream, and says why.
    """

    def __init__(self, task: Any, preprocessing: Any, rate: int) -> None:
        model = task.model
        _check_can_stream(model, preprocessing)
        self.task, self.model, self.preprocessing = task.eval(), model, preprocessing
        self.rate, self.device = rate, next(model.parameters()).device
        self.received = self._heard = 0  # samples at the stream's rate, and at the model's
        self._resample = StreamResampler(rate, preprocessing.sample_rate)
        self._frames = StreamFrames(model.adapter.features)
        self._tokens = _token_stream(model.adapter)
        self._backbone = FewTokensBackbone(model.backbone)
        self._state = model.backbone.init_state(1)
        self._reader = _reader(task)

    @torch.inference_mode()
    def push(self, samples: Any) -> dict[str, Any] | None:
        """Hear (n,) or (c, n) float samples from -1 to 1; the answer so far, if there is news.

        Raises UnreadableInput for samples that are not finite, for integers and for (n, c).
        """
        samples = given_samples(samples)
        if not samples.isfinite().all():
            raise UnreadableInput(
                f"the stream has NaN or infinite samples after {self.seconds:.3f} s"
            )
        mono = mix_down(samples, self.preprocessing.channel, "the stream").to(self.device)
        self.received += samples.shape[1]
        ready = self._resample.push(mono)
        self._heard += len(ready)
        news = self._read(self._tokens.push(self._frames.push(ready)))
        return {"seconds": self.seconds, **self._reader.running()} if news else None

    @torch.inference_mode()
    def finish(self) -> dict[str, Any]:
        """The last answer; for a clip's label that of the whole recording.

        Raises UnreadableInput where nothing was pushed.
        """
        if self.received == 0:
            raise UnreadableInput("the stream: 0 samples")
        rest = self._resample.finish().to(self.device)
        silence = self.preprocessing.missing(self._heard + len(rest))
        frames = self._frames.push(F.pad(rest, (0, silence)))
        last = torch.cat([frames, self._frames.finish()], 1)
        self._read(torch.cat([self._tokens.push(last), self._tokens.finish()], 1))
        return {"seconds": self.seconds, **self._reader.final(), "final": True}

    @property
    def seconds(self) -> float:
        """How much was heard."""
        return round(self.received / self.rate, 4)

    def _read(self, tokens: Tensor) -> bool:
        if tokens.shape[1] == 0:
            return False
        hidden, self._state = self._backbone(tokens, self._state)
        self._reader.read(hidden)
        return True


def stream(predictor: Any, chunks: Iterable[Any], *, rate: int) -> Iterator[dict[str, Any]]:
    """Answers while samples arrive; the last one is marked "final".

    Args:
        predictor: of `mamba2_apps.load(run)`.
        chunks: pieces of any size, (n,) or (channels, n) float samples from -1 to 1.
        rate: their samples per second.
    """
    heard = AudioStream(predictor.task, predictor.preprocessing, rate)
    for chunk in chunks:
        answer = heard.push(chunk)
        if answer is not None:
            yield answer
    yield heard.finish()


def answer_streams(
    task: Any,
    preprocessing: Any,
    sources: Sequence[str],
    *,
    rate: int | None,
    sample_format: str,
    channels: int,
) -> Iterator[dict[str, Any]]:
    """Answers for each source in turn: "-" is standard input.

    Sound files tell their rate and channels; anything else is raw PCM, interleaved. What is found
    to be cut or broken is answered up to there; instead of a "final" answer UnreadableInput is
    raised.

    Args:
        task: of a RUN.
        preprocessing: of the same RUN.
        sources: paths, or "-".
        rate: samples per second of raw PCM; None: the model's own.
        sample_format: s16le or f32le.
        channels: of raw PCM.
    """
    if sample_format not in PCM_FORMATS:
        raise ValueError(f"--format is {sample_format}, expected {' or '.join(PCM_FORMATS)}")
    if channels < 1 or (rate is not None and rate < 1):
        raise ValueError(f"--rate is {rate} and --channels {channels}, expected at least 1")
    for source in sources:
        suffix = Path(source).suffix.lower()
        if suffix in PYAV_SUFFIXES:
            raise ValueError(
                f"{source}: a stream is raw PCM or one of {', '.join(SOUNDFILE_SUFFIXES)}; leave "
                "out --stream, or convert the file"
            )
        if suffix in SOUNDFILE_SUFFIXES:
            with open_sound(source) as file:
                heard = AudioStream(task, preprocessing, file.samplerate)
                size = max(1, round(CHUNK_SECONDS * file.samplerate))
                yield from _answers(heard, blocks(source, file, size), source)
            continue
        pcm_rate = rate or preprocessing.sample_rate
        with ExitStack() as stack:
            raw: Any = sys.stdin.buffer
            if source != "-":
                raw = stack.enter_context(Path(source).open("rb", buffering=0))
            size = max(1, round(CHUNK_SECONDS * pcm_rate)) * channels
            pieces = pcm_chunks(raw, sample_format, channels, size, source)
            yield from _answers(AudioStream(task, preprocessing, pcm_rate), pieces, source)


def pcm_chunks(
    file: BinaryIO, sample_format: str, channels: int, values: int, name: str = "the stream"
) -> Iterator[np.ndarray]:
    """Raw interleaved PCM as (channels, n) float32, of up to `values` values, as it arrives.

    Raises UnreadableInput at the end where it stops in the middle of a sample.
    """
    kind, scale = PCM_FORMATS[sample_format]
    whole = np.dtype(kind).itemsize * channels
    rest = b""
    read: Any = getattr(file, "read1", file.read)
    while data := read(max(whole, values * np.dtype(kind).itemsize)):
        data = rest + data
        used = len(data) - len(data) % whole
        rest = data[used:]
        if used:
            samples = np.frombuffer(data[:used], kind).astype(np.float32) / scale
            yield samples.reshape(-1, channels).T
    if rest:
        raise UnreadableInput(
            f"{name}: ends in the middle of a sample, {len(rest)} of {whole} bytes; check --format "
            "and --channels"
        )


class StreamResampler:
    """Resampling that continues, equal to `mamba2_apps.audio.decoding.resample` of the whole."""

    def __init__(self, rate: int, new_rate: int) -> None:
        self.same = rate == new_rate
        if self.same:
            return
        transform = resampler(rate, new_rate)
        self.kernel = transform.kernel
        self.old, self.new = rate // transform.gcd, new_rate // transform.gcd
        self.width = transform.width
        self.buffer = torch.zeros(self.width)
        self.received = self.given = 0

    def push(self, samples: Tensor) -> Tensor:
        """(n,) at the old rate to what is ready at the new one."""
        if self.same:
            return samples
        self.received += len(samples)
        self.buffer = torch.cat([self.buffer.to(samples), samples])
        return self._filter()

    def finish(self) -> Tensor:
        """What is left, as if silence followed."""
        if self.same:
            return torch.zeros(0)
        total = -(-self.new * self.received // self.old)
        missing = total - self.given
        self.buffer = F.pad(self.buffer, (0, self.width + self.old))
        return self._filter()[:missing]

    def _filter(self) -> Tensor:
        kernel = self.kernel.to(self.buffer)
        blocks = (len(self.buffer) - kernel.shape[-1]) // self.old + 1
        if blocks < 1:
            return self.buffer.new_zeros(0)
        ready = F.conv1d(self.buffer[None, None], kernel, stride=self.old)[0].T.flatten()
        self.buffer = self.buffer[blocks * self.old :].clone()
        self.given += len(ready)
        return ready


class StreamFrames:
    """Samples to normalised features, equal to `Features` of the whole."""

    def __init__(self, features: Features) -> None:
        self.features = features
        self.buffer = features.mean.new_zeros(0)
        self.given = 0

    def push(self, samples: Tensor) -> Tensor:
        """(n,) samples to (1, t, m), the frames that are full."""
        features = self.features
        self.buffer = torch.cat([self.buffer, samples.to(self.buffer)])
        count = max(0, (len(self.buffer) - features.win) // features.hop + 1)
        if count == 0:
            return self.buffer.new_zeros(1, 0, features.num_mels)
        used = (count - 1) * features.hop + features.win
        energies = features.log_energies(self.buffer[None, :used])
        self.buffer = self.buffer[count * features.hop :].clone()
        self.given += count
        return features.normalize(energies)

    def finish(self) -> Tensor:
        """The one frame of a stream that was shorter than a window."""
        if self.given or len(self.buffer) == 0:
            return self.buffer.new_zeros(1, 0, self.features.num_mels)
        return self.features.normalize(self.features.log_energies(self.buffer[None]))


class StreamConvolutions:
    """Features to frame tokens, equal to `FrameTokens` of the whole."""

    def __init__(self, adapter: FrameTokens) -> None:
        self.adapter = adapter
        self.buffers: list[Tensor | None] = [None] * len(adapter.convs)

    def push(self, features: Tensor) -> Tensor:
        """(1, t, m) to the tokens (1, l, d) that are ready."""
        x = features[:, None]
        for index, stride in enumerate(self.adapter.strides):
            before = self.buffers[index]
            if before is None:
                before = x.new_zeros(1, x.shape[1], KERNEL - 1, x.shape[3])
            x = torch.cat([before, x], 2)
            count = max(0, (x.shape[2] - KERNEL) // stride + 1)
            self.buffers[index] = x[:, :, count * stride :].clone()
            if count == 0:
                return x.new_zeros(1, 0, self.adapter.proj.out_features)
            x = self.adapter.convolve(index, x[:, :, : (count - 1) * stride + KERNEL])
        return self.adapter.project(x)

    def finish(self) -> Tensor:
        proj = self.adapter.proj
        return proj.weight.new_zeros(1, 0, proj.out_features)


class StreamPatches:
    """Features to patch tokens, equal to `PatchTokens` of the whole."""

    def __init__(self, adapter: PatchTokens) -> None:
        self.adapter = adapter
        self.buffer = adapter.features.mean.new_zeros(1, 0, adapter.features.num_mels)

    def push(self, features: Tensor) -> Tensor:
        """(1, t, m) to the tokens (1, l, d) of the stretches that are full."""
        self.buffer = torch.cat([self.buffer, features], 1)
        size = self.adapter.frames_per_step
        used = self.buffer.shape[1] - self.buffer.shape[1] % size
        ready, self.buffer = self.buffer[:, :used], self.buffer[:, used:].clone()
        return self._embed(ready)

    def finish(self) -> Tensor:
        """The last stretch, filled up with silence as offline."""
        return self._embed(self.buffer)

    def _embed(self, features: Tensor) -> Tensor:
        if features.shape[1] == 0:
            return features.new_zeros(1, 0, self.adapter.proj.out_features)
        return self.adapter.embed(features)


class Reader(Protocol):
    """Hidden states (1, l, d), as they come, to answers."""

    def read(self, hidden: Tensor) -> None: ...

    def running(self) -> dict[str, Any]: ...

    def final(self) -> dict[str, Any]: ...


class ClipReader:
    """The answer to all that was heard so far, pooled as the head pools."""

    def __init__(self, task: Any) -> None:
        self.task, self.head = task, task.model.head
        if self.head.pool not in ("mean", "last"):
            raise ValueError(f"the head pools token {self.head.pool}; a stream needs mean or last")
        self.count = 0
        self.pooled: Any = 0.0

    def read(self, hidden: Tensor) -> None:
        if self.head.pool == "last":
            self.pooled = hidden[:, -1].double()
            return
        total = self.pooled * self.count + hidden.double().sum(1)
        self.count += hidden.shape[1]
        self.pooled = total / self.count

    def running(self) -> dict[str, Any]:
        hidden = self.pooled.to(self.head.proj.weight.dtype)[:, None]
        return self.task.predictions(self.head(hidden), {"inputs": hidden})[0]

    final = running


class EventReader:
    """Events as they end; what is open goes on."""

    def __init__(self, task: Any) -> None:
        self.task, self.head, self.steps = task, task.model.head, 0
        self.open: dict[str, tuple[int, float]] = {}  # first step, sum of probabilities
        self.closed: list[dict[str, Any]] = []
        self.now: list[float] = []

    def read(self, hidden: Tensor) -> None:
        for scores in self.head(hidden)[0].float().sigmoid().tolist():
            self.now = scores
            for label, score in zip(self.task.labels, scores, strict=True):
                if score >= self.task.threshold:
                    first, total = self.open.get(label, (self.steps, 0.0))
                    self.open[label] = first, total + score
                elif label in self.open:
                    self._close(label)
            self.steps += 1

    def running(self) -> dict[str, Any]:
        answer = {
            "probabilities": dict(zip(self.task.labels, self.now, strict=True)),
            "events": self.closed,
        }
        self.closed = []
        return answer

    def final(self) -> dict[str, Any]:
        for label in list(self.open):
            self._close(label)
        return self.running()

    def _close(self, label: str) -> None:
        first, total = self.open.pop(label)
        probability = total / (self.steps - first)
        segment = {"start": first, "end": self.steps, "label": label, "probability": probability}
        self.closed.append(self.task.in_seconds(segment))


class LetterReader:
    """New letters of the greedy reading of a CTC."""

    def __init__(self, task: Any) -> None:
        self.task, self.head, self.last, self.new = task, task.model.head, CTCHead.blank, ""

    def read(self, hidden: Tensor) -> None:
        for index in self.head(hidden)[0].argmax(-1).tolist():
            if index not in (self.last, CTCHead.blank):
                self.new += self.task.text([index - 1])
            self.last = index

    def running(self) -> dict[str, Any]:
        new, self.new = self.new, ""
        return {"text": new}

    final = running


def _reader(task: Any) -> Reader:
    head = task.model.head
    if isinstance(task, CTC):
        return LetterReader(task)
    if isinstance(task, EventDetection):
        return EventReader(task)
    if isinstance(head, PooledHead):
        return ClipReader(task)
    raise ValueError(
        f"{type(task).__name__} with a {type(head).__name__} gives no answers on a stream; "
        "expected classes or tags of a clip, events, or text"
    )


def _token_stream(adapter: Any) -> StreamConvolutions | StreamPatches:
    if isinstance(adapter, FrameTokens):
        return StreamConvolutions(adapter)
    return StreamPatches(adapter)


def _check_can_stream(model: Any, preprocessing: Any) -> None:
    adapter, backbone = getattr(model, "adapter", None), getattr(model, "backbone", None)
    if backbone is None or not isinstance(adapter, FrameTokens | PatchTokens):
        raise ValueError(f"{type(model).__name__} has no audio adapter and backbone to stream with")
    if backbone.config.bidirectional:
        raise ValueError(
            "the RUN's backbone is bidirectional, it needs the end of the recording to begin; "
            "train with --model.backbone.bidirectional false to stream"
        )
    if preprocessing.level != "none":
        raise ValueError(
            f"the RUN scales each clip by its {preprocessing.level}, which a stream does not know "
            "yet; train with --data.level none to stream"
        )


def _answers(
    heard: AudioStream, chunks: Iterable[np.ndarray], source: str
) -> Iterator[dict[str, Any]]:
    name = "standard input" if source == "-" else source
    for chunk in chunks:
        answer = heard.push(chunk)
        if answer is not None:
            yield {"input": name, **answer}
    if not heard.received:
        raise UnreadableInput(f"{name}: 0 samples")
    yield {"input": name, **heard.finish()}
