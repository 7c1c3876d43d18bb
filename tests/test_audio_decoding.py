"""Sound files: every format back, what is missing noticed, resampling equal to torchaudio's."""

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from mamba2_apps.audio.decoding import (
    blocks,
    mix_down,
    open_sound,
    read_audio,
    read_header,
    resample,
    resampler,
)
from mamba2_apps.data import UnreadableInput

RATE = 16000
FORMATS = {
    "wav": {"subtype": "PCM_16"},
    "flac": {"subtype": "PCM_16"},
    "aiff": {"subtype": "PCM_24"},
    "mp3": {"subtype": "MPEG_LAYER_III"},
    "ogg": {"subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "au": {"subtype": "PCM_16"},
}


def tone(seconds=1.0, rate=RATE, channels=1):
    t = np.arange(round(seconds * rate)) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * 440 * (c + 1) * t) for c in range(channels)], 1)


@pytest.mark.parametrize("suffix", FORMATS)
def test_each_format_gives_its_samples_back(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(channels=2), RATE, **FORMATS[suffix])
    samples, rate = read_audio(path)
    assert (samples.shape[0], rate, samples.dtype) == (2, RATE, torch.float32)
    header = read_header(path)
    assert (header.rate, header.channels) == (RATE, 2)
    lossless = suffix in ("wav", "flac", "aiff", "au")
    assert samples.shape[1] == RATE if lossless else abs(samples.shape[1] - RATE) < 3000
    if lossless:
        assert np.abs(samples.numpy().T - tone(channels=2)).max() < 1e-4
    part = read_audio(path, start=0.25, end=0.5).samples
    assert part.shape[1] == RATE // 4
    if lossless:
        assert torch.equal(part, samples[:, RATE // 4 : RATE // 2])


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kept", [0.6, 0.97])
def test_a_truncated_file_is_named(tmp_path, suffix, kept):
    path = tmp_path / f"cut.{suffix}"
    soundfile.write(path, tone(3.0), RATE, **FORMATS[suffix])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UnreadableInput, match=rf"cut\.{suffix}: (truncated|cannot be decoded)"):
        read_audio(path)


def headerless(path, samples, mode):
    """Write an MP3 without its first frame, which counts the others; return their samples."""
    options = {"bitrate_mode": mode, "compression_level": 0.5}
    soundfile.write(path, samples, 44100, subtype="MPEG_LAYER_III", **options)
    raw, starts, place = path.read_bytes(), [], 0
    kbits = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320]
    while place < len(raw):
        starts.append(place)
        place += 144000 * kbits[raw[place + 2] >> 4] // 44100 + (raw[place + 2] >> 1 & 1)
    path.write_bytes(raw[starts[1] :])
    return 1152 * (len(starts) - 1)


@pytest.mark.parametrize("order", ["loud first", "quiet first"])
@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
@pytest.mark.parametrize("tag", [b"", b"ID3\x04\0\0\0\0\x01\x02" + bytes(130)])
def test_an_mp3_that_does_not_count_its_frames_is_read_to_its_end(tmp_path, order, mode, tag):
    loud = 0.5 * np.random.default_rng(0).standard_normal(3 * 44100).clip(-1, 1)
    parts = [loud, 1e-4 * np.sin(np.arange(3 * 44100) / 50)]
    path = tmp_path / "a.mp3"
    expected = headerless(path, np.concatenate(parts[:: 1 if order == "loud first" else -1]), mode)
    path.write_bytes(tag + path.read_bytes())
    samples, rate = read_audio(path)
    assert (samples.shape, rate) == ((1, expected), 44100)
    loudness = [float(half.std()) for half in (samples[0, :99225], samples[0, -99225:])]
    assert (loudness[0] > 0.3) == (order == "loud first") != (loudness[1] > 0.3)
    assert read_header(path).seconds == expected / 44100
    assert torch.equal(read_audio(path, start=4, end=5).samples, samples[:, 4 * 44100 : 5 * 44100])
    with open_sound(path) as file:
        streamed = np.concatenate(list(blocks(path, file, 4410)), axis=1)
    assert np.array_equal(streamed, samples.numpy())


def test_a_header_written_into_a_pipe_is_no_truncation(tmp_path):
    path = tmp_path / "piped.wav"
    soundfile.write(path, tone(), RATE, subtype="PCM_16")
    raw = bytearray(path.read_bytes())
    place = raw.index(b"data")
    raw[4:8] = raw[place + 4 : place + 8] = b"\xff" * 4
    path.write_bytes(raw)
    assert read_audio(path).samples.shape[1] == RATE


def test_bad_files_are_named_with_their_cause(tmp_path):
    def write(name, samples, **options):
        soundfile.write(tmp_path / name, samples, RATE, **options)

    write("none.wav", np.zeros((0, 1)))
    nan = tone()
    nan[5:8] = np.nan
    write("nan.wav", nan, subtype="FLOAT")
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.flac").write_text("not a sound")
    write("short.wav", tone(0.1))
    for name, words in [
        ("none.wav", "0 samples"),
        ("nan.wav", "3 of 16000 samples are NaN"),
        ("empty.wav", "the file is empty"),
        ("text.flac", "not a readable sound file"),
        ("absent.wav", "does not exist"),
    ]:
        with pytest.raises(UnreadableInput, match=words) as error:
            read_audio(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UnreadableInput, match=r"the part from 0.05 to 3.0 s does not lie within"):
        read_audio(tmp_path / "short.wav", start=0.05, end=3.0)


def write_by_pyav(path, codec, seconds):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            tone(seconds).T.astype(np.float32), format="fltp", layout="mono"
        )
        frame.rate = RATE
        convert = av.AudioResampler(format=stream.format, layout="mono", rate=RATE)
        frames = [*convert.resample(frame), *convert.resample(None)]
        for packet in [p for f in [*frames, None] for p in stream.encode(f)]:
            container.mux(packet)


@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "aac"), ("webm", "libopus")])
@pytest.mark.parametrize("kept", [0.6, 0.9])
def test_a_truncated_container_is_named(tmp_path, suffix, codec, kept):
    path = tmp_path / f"cut.{suffix}"
    write_by_pyav(path, codec, 3.0)
    assert abs(read_audio(path).seconds - 3) < 0.1
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UnreadableInput, match=rf"cut\.{suffix}: truncated: .* seconds"):
        read_audio(path)


def test_pyav_reads_what_soundfile_does_not(tmp_path):
    path = tmp_path / "a.m4a"
    write_by_pyav(path, "aac", 1.0)
    samples, rate = read_audio(path)
    assert rate == RATE
    assert abs(samples.shape[1] - RATE) < 3000
    assert 0.3 < float(samples.std()) < 0.4  # a sine of amplitude 0.5
    (tmp_path / "bad.m4a").write_bytes(path.read_bytes()[:200])
    with pytest.raises(UnreadableInput, match=r"bad\.m4a"):
        read_audio(tmp_path / "bad.m4a")


@pytest.mark.parametrize(("old", "new"), [(44100, 16000), (8000, 16000), (22050, 16000)])
def test_resampling_is_torchaudios_and_its_kernel_is_kept(old, new):
    samples = torch.randn(2, 5001)
    expected = torchaudio.functional.resample(samples, old, new)
    torch.testing.assert_close(resample(samples, old, new), expected, rtol=1e-3, atol=1e-4)
    assert resampler(old, new) is resampler(old, new)
    assert resample(samples, new, new) is samples


def test_channels_are_mixed_or_chosen():
    samples = torch.randn(2, 7)
    assert torch.equal(mix_down(samples, None), samples.mean(0))
    assert torch.equal(mix_down(samples, 1), samples[1])
    with pytest.raises(UnreadableInput, match=r"a\.wav: channel 2 was asked for, it has 2"):
        mix_down(samples, 2, "a.wav")
