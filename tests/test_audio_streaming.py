"""A stream gives what the whole recording gives offline, from PCM to answers."""

import io
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mamba2_apps.audio.adapter import FrameTokens, PatchTokens
from mamba2_apps.audio.decoding import Recording, resample
from mamba2_apps.audio.features import Features
from mamba2_apps.audio.preprocessing import AudioPreprocessing
from mamba2_apps.audio.streaming import (
    AudioStream,
    StreamResampler,
    answer_streams,
    pcm_chunks,
    stream,
)
from mamba2_apps.audio.tasks import EventDetection, Tagging, Transcription
from mamba2_apps.backbone import BackboneConfig
from mamba2_apps.data import UnreadableInput
from mamba2_apps.heads import CTCHead, PooledHead, TokenHead, TrackHead
from mamba2_apps.tasks import Classification, OptimizerConfig, SequenceModel

FEATURES = partial(Features, 16000, num_mels=32)
FRAMES = partial(FrameTokens, features=FEATURES, channels=8)
PATCHES = partial(PatchTokens, features=FEATURES)
LABELS = ["dog", "car", "rain"]
CASES = {
    "clip, frames": (Classification, FRAMES, PooledHead),
    "clip, patches": (Classification, PATCHES, PooledHead),
    "clip, last": (Classification, FRAMES, partial(PooledHead, pool="last")),
    "tags": (Tagging, FRAMES, PooledHead),
    "events, frames": (partial(EventDetection, threshold=0.4), FRAMES, TokenHead),
    "events, patches": (
        partial(EventDetection, threshold=0.4), PATCHES, partial(TrackHead, bin_size=2)
    ),
    "text": (Transcription, partial(FRAMES, strides=(2, 1)), CTCHead),
}  # fmt: skip


def make_task(kind, adapter, head, *, bidirectional=False):
    torch.manual_seed(0)
    model = SequenceModel(
        3,
        adapter=adapter,
        backbone=BackboneConfig(32, 2, d_state=8, headdim=16, bidirectional=bidirectional),
        head=head,
    )
    with torch.no_grad():
        model.adapter.features.set_statistics(torch.tensor(-6.0), torch.tensor(4.0))
        model.head.proj.weight.mul_(4)  # answers that change along the clip
    return kind(model, LABELS, OptimizerConfig()).eval()


def wave(samples, channels=1):
    t = torch.arange(samples) / 44100
    tones = torch.sin(2 * torch.pi * 300 * t * (1 + 3 * torch.sin(3 * t)))
    loud = (torch.sin(7 * t) > 0).float() + 0.01
    return torch.stack([0.3 * tones * loud + 0.02 * torch.randn(samples) for _ in range(channels)])


def pieces(samples, sizes):
    start = 0
    for size in sizes:
        yield samples[..., start : start + size]
        start += size
    yield samples[..., start:]


def offline(task, preprocessing, samples, rate):
    batch = preprocessing.collate([{"inputs": preprocessing(Recording(samples, rate))}])
    with torch.inference_mode():
        return task.predictions(task(batch), batch)[0]


def close(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-4, abs=1e-7) if isinstance(a, float) else a == b


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2), (8000, 1)])
def test_a_stream_ends_with_the_offline_answer(case, rate, channels):
    task, preprocessing = make_task(*case), AudioPreprocessing(sample_rate=16000)
    samples = wave(round(1.73 * rate), channels)
    expected = offline(task, preprocessing, samples, rate)
    predictor = SimpleNamespace(task=task, preprocessing=preprocessing)
    for sizes in ([1, 2, 399, 7, 5000], [], [rate // 10] * 17, [160] * 40):
        answers = list(stream(predictor, pieces(samples, sizes), rate=rate))
        found = dict(answers[-1])
        assert found.pop("final") is True
        assert found.pop("seconds") == pytest.approx(1.73, abs=1e-3)
        if isinstance(task, EventDetection):
            found = {"events": [event for answer in answers for event in answer["events"]]}
            found["events"].sort(key=lambda e: (e["start"], e["label"]))
            assert len(found["events"]) > 1
        elif isinstance(task, Transcription):
            found = {"text": "".join(a["text"] for a in answers)}
        assert close(found, expected), (found, expected)


@pytest.mark.parametrize("samples", [1, 100, 399, 400, 401, 2000])
def test_short_streams_too(samples):
    for case, least in (("clip, frames", 0.0), ("clip, patches", 0.0), ("tags", 0.1)):
        preprocessing = AudioPreprocessing(sample_rate=16000, min_seconds=least)
        task = make_task(*CASES[case])
        heard = wave(samples)
        predictor = SimpleNamespace(task=task, preprocessing=preprocessing)
        *_, last = stream(predictor, [heard[:, :3], heard[:, 3:]], rate=16000)
        expected = offline(task, preprocessing, heard, 16000)
        assert close({k: last[k] for k in expected}, expected)


@pytest.mark.parametrize(("old", "new"), [(44100, 16000), (8000, 16000), (16000, 16000)])
def test_the_resampler_continues(old, new):
    samples = torch.randn(12345)
    whole = resample(samples, old, new)
    resampler = StreamResampler(old, new)
    parts = [resampler.push(p) for p in pieces(samples, [1, 5, 1000, 3, 444, 2])]
    found = torch.cat([*parts, resampler.finish()])
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)


def sizes_of_state(value):
    """Bytes of every tensor and length of every text below an object."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, str | list):
        return len(value)
    if isinstance(value, dict):
        return sum(map(sizes_of_state, value.values()))
    if isinstance(value, tuple):
        return sum(map(sizes_of_state, value))
    if hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module):
        return sum(map(sizes_of_state, vars(value).values()))
    return 0


@pytest.mark.parametrize("case", ["clip, frames", "events, patches", "text"])
def test_what_is_kept_does_not_grow(case):
    heard = AudioStream(make_task(*CASES[case]), AudioPreprocessing(sample_rate=16000), 44100)
    most = []
    for _ in range(6):
        sizes = []
        for _ in range(20):
            heard.push(0.1 * torch.randn(1, 4410))
            sizes.append(sizes_of_state(vars(heard)))
        most.append(max(sizes))
    # The rest of a window and of a stride come and go; nothing else may.
    assert max(most[1:]) <= most[1] * 1.02


@pytest.mark.parametrize(("name", "kind"), [("s16le", "<i2"), ("f32le", "<f4")])
def test_pcm_bytes_become_samples_wherever_reads_end(name, kind):
    samples = (np.random.default_rng(0).uniform(-1, 1, (2, 501)) * 3e4).astype("<i2")
    raw = samples.T.astype(kind).tobytes() if name == "s16le" else None
    raw = raw or (samples.T / 2**15).astype("<f4").tobytes()

    class Dribble(io.BytesIO):
        def read1(self, size):
            return self.read(min(size, 7))

    for file in (io.BytesIO(raw), Dribble(raw)):
        found = np.concatenate(list(pcm_chunks(file, name, 2, 100)), 1)
        np.testing.assert_allclose(found, samples / 2**15, atol=1e-7)
    with pytest.raises(UnreadableInput, match="ends in the middle of a sample, 1 of"):
        list(pcm_chunks(io.BytesIO(raw + b"x"), name, 2, 100))


def test_files_and_standard_input_are_answered(tmp_path, monkeypatch):
    import soundfile

    task, preprocessing = make_task(*CASES["tags"]), AudioPreprocessing(sample_rate=16000)
    samples = wave(22050)
    soundfile.write(tmp_path / "a.wav", samples.T.numpy(), 44100, subtype="FLOAT")
    raw = samples.T.numpy().astype("<f4").tobytes()
    (tmp_path / "a.raw").write_bytes(raw)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(raw)))
    options = {"rate": 44100, "sample_format": "f32le", "channels": 1}
    sources = [str(tmp_path / "a.wav"), str(tmp_path / "a.raw"), "-"]
    answers = list(answer_streams(task, preprocessing, sources, **options))
    last = [answer for answer in answers if "final" in answer]
    assert [answer["input"] for answer in last] == [*sources[:2], "standard input"]
    expected = offline(task, preprocessing, samples, 44100)
    for answer in last:
        assert close({k: answer[k] for k in expected}, expected)
    with pytest.raises(ValueError, match="--format is u8, expected s16le or f32le"):
        list(answer_streams(task, preprocessing, ["-"], rate=1, sample_format="u8", channels=1))


def test_what_cannot_stream_says_why():
    preprocessing = AudioPreprocessing(sample_rate=16000)
    both = make_task(*CASES["tags"], bidirectional=True)
    with pytest.raises(ValueError, match=r"bidirectional.*--model\.backbone\.bidirectional false"):
        AudioStream(both, preprocessing, 16000)
    task = make_task(*CASES["tags"])
    with pytest.raises(ValueError, match=r"scales each clip by its peak.*--data\.level none"):
        AudioStream(task, AudioPreprocessing(sample_rate=16000, level="peak"), 16000)
    heard = AudioStream(task, preprocessing, 16000)
    with pytest.raises(UnreadableInput, match="0 samples"):
        heard.finish()
    with pytest.raises(UnreadableInput, match=r"NaN or infinite samples after 0\.000 s"):
        heard.push([float("nan")])


@pytest.mark.parametrize("end", [np.full(1600, np.nan, "<f4").tobytes(), b"x"])
def test_a_stream_that_breaks_has_no_final_answer(tmp_path, end):
    task, preprocessing = make_task(*CASES["tags"]), AudioPreprocessing(sample_rate=16000)
    (tmp_path / "a.raw").write_bytes(wave(16000)[0].numpy().astype("<f4").tobytes() + end)
    options = {"rate": 16000, "sample_format": "f32le", "channels": 1}
    answers = []
    with pytest.raises(UnreadableInput, match=r"NaN or infinite|middle of a sample"):
        answers.extend(answer_streams(task, preprocessing, [str(tmp_path / "a.raw")], **options))
    assert len(answers) > 5
    assert not any("final" in answer for answer in answers)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (np.ones((1, 4410), np.int16), r"torch.int16 and shape \(1, 4410\).*int16 by 32768"),
        (np.ones((4410, 2), np.float32), r"shape \(4410, 2\), expected \(channels, samples\)"),
        (np.ones((16, 1)), r"shape \(16, 1\), expected .* transpose"),
        (np.ones((1, 2, 3)), r"shape \(1, 2, 3\), expected floats"),
    ],
)
def test_samples_of_another_kind_or_order_are_refused(samples, words):
    preprocessing = AudioPreprocessing(sample_rate=16000)
    heard = AudioStream(make_task(*CASES["tags"]), preprocessing, 16000)
    for hear in (heard.push, preprocessing):
        with pytest.raises(UnreadableInput, match=words):
            hear(samples)
    heard.push(np.ones((2, 0)))
    heard.push(np.ones((2, 1)))
    assert heard.received == 1


def test_a_source_that_is_no_stream_is_named(tmp_path):
    import soundfile

    task, preprocessing = make_task(*CASES["tags"]), AudioPreprocessing(sample_rate=16000)
    options = {"rate": None, "sample_format": "s16le", "channels": 1}
    whole = tmp_path / "whole.flac"
    soundfile.write(whole, wave(48000)[0].numpy(), 16000)
    for name, content, words in (
        ("absent.wav", None, r"absent\.wav: does not exist"),
        ("text.wav", b"no sound", r"text\.wav: not a readable sound file"),
        ("film.m4a", b"0" * 4000, r"film\.m4a: a stream is raw PCM or one of \.wav"),
        ("none.raw", b"", r"none\.raw: 0 samples"),
        ("cut.flac", whole.read_bytes()[:20000], r"cut\.flac: (truncated|cannot be decoded)"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            list(answer_streams(task, preprocessing, [str(path)], **options))
    (tmp_path / "mono.raw").write_bytes(b"0" * 4000)
    right = AudioPreprocessing(sample_rate=16000, channel=1)
    with pytest.raises(UnreadableInput, match="channel 1 was asked for, it has 1"):
        list(answer_streams(task, right, [str(tmp_path / "mono.raw")], **options))
