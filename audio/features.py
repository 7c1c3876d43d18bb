"""Spectral features of a batch of clips, on any device, in float32 whatever surrounds them.

A frame is a window of samples, none of it before the clip or after it: the last samples that fill
no window are left out. A clip shorter than one window gives one frame, with silence after the clip.

Dimensions: batch b · samples n · frames t · mel bins m
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from mamba2_apps.padding import LeftAligned, data_positions

FeatureKind = Literal["fbank", "logmel"]
KALDI_PREEMPHASIS = 0.97
KALDI_LOW_FREQUENCY = 20.0
FLOORS = {"fbank": torch.finfo(torch.float32).eps, "logmel": 1e-6}
AUDIOSET_MEAN, AUDIOSET_DEVIATION = -4.268, 4.569


class Features(nn.Module):
    """Waveforms (b, n) to normalised log mel energies (b, t, m).

    "fbank" is Kaldi's filter bank as AST (Gong et al. 2021) and its successors use it, equal to
    torchaudio.compliance.kaldi.fbank of each clip with dither 0, window_type hanning and
    htk_compat; "logmel" is the logarithm of torchaudio's MelSpectrogram with center=False.

    Energies are normalised by `mean` and `deviation`, one number each, or one per mel bin. They are
    buffers, kept with the weights; before `set_statistics` they are AudioSet's.

    Args:
        sample_rate: samples per second of the waveforms.
        kind: fbank or logmel.
        num_mels: mel bins.
        window_seconds: length of a frame.
        hop_seconds: from one frame to the next.
        per_bin: normalise each mel bin by itself.
        floor: log energy of silence, which lower ones are raised to, so that the recordings' own
            noise is not heard; null: that of 1.2e-7 in fbank, of 1e-6 in logmel.
        time_masks: stretches of frames that training hides (SpecAugment, Park et al. 2019).
        time_mask_ratio: longest stretch as a part of the clip's frames.
        frequency_masks: stretches of mel bins that training hides.
        frequency_mask_bins: longest stretch of mel bins.
        equalizer: standard deviation, in normalised units, of a smooth random curve over the mel
            bins that training adds to a clip, as other microphones and rooms do; silence stays
            silence; 0: none.

    Raises ValueError for impossible sizes.
    """

    mean: Tensor
    deviation: Tensor
    window: Tensor
    bank: Tensor

    def __init__(
        self,
        sample_rate: int,
        *,
        kind: FeatureKind = "fbank",
        num_mels: int = 128,
        window_seconds: float = 0.025,
        hop_seconds: float = 0.010,
        per_bin: bool = False,
        floor: float | None = None,
        time_masks: int = 0,
        time_mask_ratio: float = 0.1,
        frequency_masks: int = 0,
        frequency_mask_bins: int = 24,
        equalizer: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in FLOORS:
            raise ValueError(f"features.kind is {kind!r}, expected fbank or logmel")
        self.sample_rate, self.kind, self.num_mels = sample_rate, kind, num_mels
        self.win = int(sample_rate * window_seconds)
        self.hop = int(sample_rate * hop_seconds)
        if self.hop < 1 or self.win < self.hop:
            raise ValueError(
                f"features.window_seconds is {window_seconds} and hop_seconds {hop_seconds}; at "
                f"{sample_rate} Hz expected a hop of at least one sample and a window no shorter"
            )
        bins = frequency_mask_bins if frequency_masks else 0
        if not 0 <= time_mask_ratio <= 1 or not 0 <= bins <= num_mels:
            raise ValueError(
                f"features.time_mask_ratio is {time_mask_ratio} and frequency_mask_bins "
                f"{frequency_mask_bins}, expected 0 to 1 and 0 to {num_mels}"
            )
        least = math.log(FLOORS[kind])
        if floor is not None and not least <= floor < math.inf:
            raise ValueError(
                f"features.floor is {floor}, expected a natural logarithm of at least {least:.1f}"
            )
        self.floor = least if floor is None else floor
        self.hop_seconds, self.per_bin = hop_seconds, per_bin
        self.time_masks, self.time_mask_ratio = time_masks, time_mask_ratio
        self.frequency_masks, self.frequency_mask_bins = frequency_masks, frequency_mask_bins
        self.equalizer = equalizer
        self.register_buffer("mean", torch.full((num_mels,), AUDIOSET_MEAN))
        self.register_buffer("deviation", torch.full((num_mels,), AUDIOSET_DEVIATION))
        with torch.device("cpu"):  # values are looked at, which a meta tensor has none of
            window, bank = _kaldi_filters(self) if kind == "fbank" else _mel_filters(self)
        self.register_buffer("window", window.to(self.mean.device), persistent=False)
        self.register_buffer("bank", bank.to(self.mean.device), persistent=False)

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, deviation: Tensor) -> None:
        """Normalise by these from now on: numbers, or one value per mel bin."""
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp(min=1e-3))

    def frame_counts(self, samples: Tensor) -> Tensor:
        """Frames of clips of that many samples; at least one where there is any sample."""
        frames = (samples - self.win).div(self.hop, rounding_mode="floor") + 1
        return torch.where(samples > 0, frames.clamp(min=1), 0)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As `extract`; in training with the random changes."""
        features, counts = self.extract(inputs, mask)
        return (self._augment(features, counts) if self.training else features), counts

    def extract(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Normalised features (b, t, m), and how many of them stand for data, (b,) int64.

        Args:
            inputs: (b, n) float.
            mask: (b, n) bool, True where there is data, one run a row; None: everywhere, the
                counts are then None too. Frames after a row's count are silence.
        """
        if inputs.ndim != 2 or inputs.shape[1] == 0:
            raise ValueError(
                f"inputs has shape {tuple(inputs.shape)}, expected (clips, samples) of sound"
            )
        counts = None
        if mask is not None:
            rows = LeftAligned(mask, *inputs.shape)
            inputs = rows.align(inputs[..., None])[..., 0]
            counts = self.frame_counts(rows.lengths)
        energies = self.log_energies(inputs)
        if counts is not None:
            data = data_positions(counts, energies.shape[1])
            energies = torch.where(data[..., None], energies, self.floor)
        return self.normalize(energies), counts

    def normalize(self, energies: Tensor) -> Tensor:
        return (energies - self.mean) / self.deviation

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def log_energies(self, waves: Tensor) -> Tensor:
        """Log mel energies (b, t, m) float32 of waveforms (b, n), before normalisation."""
        waves = waves.float()
        if waves.shape[1] < self.win:
            waves = F.pad(waves, (0, self.win - waves.shape[1]))
        frames = waves.unfold(1, self.win, self.hop)
        if self.kind == "fbank":
            frames = frames - frames.mean(-1, keepdim=True)
            previous = torch.cat([frames[..., :1], frames[..., :-1]], -1)
            frames = frames - KALDI_PREEMPHASIS * previous
        size = 2 * (self.bank.shape[0] - 1)
        spectrum = torch.fft.rfft(frames * self.window, n=size)
        power = spectrum.real.square() + spectrum.imag.square()
        return (power @ self.bank).clamp(min=FLOORS[self.kind]).log().clamp(min=self.floor)

    def _augment(self, features: Tensor, counts: Tensor | None) -> Tensor:
        """SpecAugment and the equalizer, each row by itself; what is hidden becomes 0, the mean."""
        b, t, m = features.shape
        device = features.device
        if self.equalizer > 0:
            knots = torch.randn(b, 1, 6, device=device) * self.equalizer
            curve = F.interpolate(knots, m, mode="linear", align_corners=True)
            silence = self.normalize(torch.full_like(self.mean, self.floor))
            heard = features > silence
            features = torch.where(heard, torch.maximum(features + curve, silence), silence)
        hidden = torch.zeros(b, t, m, dtype=torch.bool, device=device)
        frames = torch.full((b,), t, device=device) if counts is None else counts
        for _ in range(self.time_masks):
            width = torch.rand(b, device=device) * self.time_mask_ratio * frames
            hidden |= _stretch(width, frames, t)[:, :, None]
        bins = torch.full((b,), m, device=device)
        for _ in range(self.frequency_masks):
            width = torch.rand(b, device=device) * self.frequency_mask_bins
            hidden |= _stretch(width, bins, m)[:, None]
        return features.masked_fill(hidden, 0.0)


def _stretch(width: Tensor, total: Tensor, size: int) -> Tensor:
    """A random run of round(width) places among the first `total` of each row, (b, size) bool."""
    width = width.round()
    start = (torch.rand_like(width) * (total - width + 1).clamp(min=0)).floor()
    place = torch.arange(size, device=width.device)
    return (place >= start[:, None]) & (place < (start + width)[:, None])


def _kaldi_filters(features: Features) -> tuple[Tensor, Tensor]:
    """Kaldi's window (win,) and triangles (bins, m) over mel frequency, which leave out Nyquist."""
    size = 2 ** math.ceil(math.log2(features.win))
    window = torch.hann_window(features.win, periodic=False, dtype=torch.float64)
    rate = features.sample_rate
    low, high = _kaldi_mel(torch.tensor([KALDI_LOW_FREQUENCY, rate / 2], dtype=torch.float64))
    edges = torch.linspace(low.item(), high.item(), features.num_mels + 2, dtype=torch.float64)
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    mel = _kaldi_mel(torch.arange(size // 2, dtype=torch.float64) * rate / size)[:, None]
    slopes = torch.minimum((mel - left) / (center - left), (right - mel) / (right - center))
    bank = F.pad(slopes.clamp(min=0), (0, 0, 0, 1))
    return window.float(), bank.float()


def _kaldi_mel(frequency: Tensor) -> Tensor:
    return 1127.0 * torch.log1p(frequency / 700.0)


def _mel_filters(features: Features) -> tuple[Tensor, Tensor]:
    """torchaudio's defaults for MelSpectrogram(n_fft=win): a periodic Hann window, HTK mel."""
    size = features.win
    if size % 2:
        raise ValueError(
            f"features.window_seconds gives {size} samples at {features.sample_rate} Hz; logmel "
            "needs an even number"
        )
    rate = features.sample_rate
    bank = melscale_fbanks(size // 2 + 1, 0.0, rate / 2, features.num_mels, rate)
    return torch.hann_window(size), bank
