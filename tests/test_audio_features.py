"""Features: equal to torchaudio's of each clip, whatever the padding; random changes that stay
inside the clip.
"""

import math

import pytest
import soundfile
import torch
import torchaudio

from mamba2_apps.audio.corpora import SOUNDS
from mamba2_apps.audio.features import Features


def kaldi(wave, rate, num_mels=128):
    return torchaudio.compliance.kaldi.fbank(
        wave[None],
        htk_compat=True,
        sample_frequency=rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=num_mels,
        dither=0.0,
        frame_shift=10,
    )


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_fbank_is_kaldis_for_every_clip_of_a_batch(rate):
    waves = torch.randn(3, rate + 37) * torch.tensor([[0.5], [0.01], [1e-4]])
    waves[1, : rate // 2] = 0  # digital silence meets the floor
    features = Features(rate, num_mels=64)
    found = features.log_energies(waves)
    expected = torch.stack([kaldi(wave, rate, 64) for wave in waves])
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 2e-3
    assert (found - expected).abs().mean() < 1e-5


def test_fbank_of_real_sounds_is_kaldis():
    for path in sorted(SOUNDS.parent.glob("*/*.flac"))[::20]:
        wave = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        found = Features(16000).log_energies(wave[None])[0]
        assert (found - kaldi(wave, 16000)).abs().max() < 5e-3


def test_logmel_is_torchaudios():
    waves = torch.randn(2, 16123) * 0.1
    mel = torchaudio.transforms.MelSpectrogram(
        16000, n_fft=400, hop_length=160, n_mels=80, center=False
    )
    found = Features(16000, kind="logmel", num_mels=80).log_energies(waves)
    torch.testing.assert_close(found, mel(waves).clamp(min=1e-6).log().mT)


@pytest.mark.parametrize("kind", ["fbank", "logmel"])
def test_a_floor_hides_what_is_quieter(kind):
    waves = torch.randn(2, 8000) * torch.logspace(0, -3, 8000)
    clean = Features(16000, kind=kind, num_mels=32).log_energies(waves)
    features = Features(16000, kind=kind, num_mels=32, floor=-2.0)
    found = features.log_energies(waves)
    assert found.min() == features.floor == -2.0
    assert torch.equal(found, clean.clamp(min=-2.0))


def test_an_equalizer_leaves_silence_silent():
    features = Features(16000, kind="logmel", num_mels=32, floor=-2.0, equalizer=0.5)
    waves = torch.randn(4, 16000)
    waves[:, 8000:] = 0
    clean, silence = features.eval()(waves)[0], features.normalize(torch.full((32,), -2.0))
    changed = features.train()(waves)[0]
    assert torch.equal(changed[:, 50:], silence.expand_as(changed[:, 50:]))
    assert (changed >= silence).all()
    assert (changed[:, :48] - clean[:, :48]).std() > 0.1


@pytest.mark.parametrize("samples", [1, 399, 400, 559, 560, 4321])
def test_a_row_is_its_clip_whatever_the_padding_holds(samples):
    features = Features(16000, num_mels=32).eval()
    clip = torch.randn(1, samples)
    alone, counts = features(clip)
    assert counts is None
    batch = torch.full((2, samples + 3000), torch.nan)
    mask = torch.zeros(batch.shape, dtype=torch.bool)
    for row, start in ((0, 0), (1, 777)):
        batch[row, start : start + samples] = clip
        mask[row, start : start + samples] = True
    padded, counts = features(batch, mask)
    assert counts.tolist() == [alone.shape[1]] * 2
    for row in range(2):
        torch.testing.assert_close(padded[row, : alone.shape[1]], alone[0])
        silence = features.normalize(torch.full((32,), features.floor))
        assert torch.allclose(padded[row, alone.shape[1] :], silence)


def test_half_precision_around_changes_nothing():
    features, wave = Features(16000).eval(), torch.randn(1, 16000) * 1e-3
    expected = features(wave)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features(wave)[0], expected)


def test_statistics_normalise_and_are_saved():
    features = Features(16000, num_mels=4)
    features.set_statistics(torch.arange(4.0), torch.tensor([1.0, 2.0, 4.0, 0.0]))
    other = Features(16000, num_mels=4)
    other.load_state_dict(features.state_dict())
    assert set(features.state_dict()) == {"mean", "deviation"}
    energies = torch.full((1, 1, 4), 5.0)
    assert other.normalize(energies)[0, 0].tolist() == pytest.approx([5.0, 2.0, 0.75, 2000.0])


def test_masks_stay_inside_the_clip_and_only_in_training():
    features = Features(
        16000, num_mels=32, time_masks=2, time_mask_ratio=0.5, frequency_masks=1,
        frequency_mask_bins=8,
    )  # fmt: skip
    waves = torch.randn(8, 16000)
    mask = torch.ones(waves.shape, dtype=torch.bool)
    mask[:, 8000:] = False
    clean = features.eval()(waves, mask)[0]
    assert not (clean[:, :48] == 0).any()
    torch.manual_seed(0)
    changed = features.train()(waves, mask)[0]
    hidden = changed == 0
    assert hidden[:, :48].any()
    whole_frames = hidden.all(2)
    assert whole_frames.any()
    assert not whole_frames[:, 48:].any()
    assert hidden.all(1).sum(1).max() <= 8
    assert torch.equal(changed[~hidden], clean[~hidden])
    torch.manual_seed(0)
    assert torch.equal(features(waves, mask)[0], changed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "mfcc"}, "features.kind is 'mfcc'"),
        ({"hop_seconds": 0.05}, "window no shorter"),
        ({"floor": -20.0}, "features.floor is -20.0, expected a natural logarithm"),
        ({"floor": math.inf}, "features.floor is inf"),
        ({"frequency_masks": 1, "frequency_mask_bins": 400}, "frequency_mask_bins 400"),
    ],
)
def test_impossible_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        Features(16000, **options)
    with pytest.raises(ValueError, match="expected \\(clips, samples\\)"):
        Features(16000)(torch.zeros(3))


@pytest.mark.gpu
def test_features_on_a_gpu_are_those_of_the_cpu():
    features, waves = Features(16000).eval(), torch.randn(4, 16000) * 0.1
    expected = features(waves)[0]
    found = features.cuda()(waves.cuda())[0].cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
