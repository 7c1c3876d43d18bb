"""Random changes of a training clip's samples, and mixup of a batch.

Everything is drawn from torch's global generator, which the core seeds for each sample.

Dimensions: batch b · samples n · classes k
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.functional import add_noise

from mamba2_apps.audio.decoding import resample


@dataclass(kw_only=True)
class Augmentation:
    """How training clips are changed; the defaults change nothing.

    Args:
        speed: slowest and fastest playing speed, pitch and all, in steps of a hundredth.
        gain_db: largest change of level either way, in dB.
        shift_seconds: largest shift; earlier cuts the clip's beginning, of which at most a tenth,
            later puts silence before it.
        noise_probability: how often noise is added.
        noise_snr_db: least and largest ratio of signal to noise, in dB.
        noise: a folder of recordings to add; null: white noise.
        join_probability: how often another clip with its text comes after the clip, so that what a
            text begins with tells less of how it ends.
        mixup_alpha: two clips are added, in shares drawn from Beta(alpha, alpha), and so are their
            labels (Zhang et al. 2018); 0: never.
    """

    speed: tuple[float, float] = (1.0, 1.0)
    gain_db: float = 0.0
    shift_seconds: float = 0.0
    noise_probability: float = 0.0
    noise_snr_db: tuple[float, float] = (10.0, 30.0)
    noise: str | None = None
    join_probability: float = 0.0
    mixup_alpha: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.speed
        if not 0.5 <= low <= high <= 2:
            raise ValueError(f"data.augmentation.speed is {self.speed}, expected within 0.5 to 2")
        for name in ("noise_probability", "join_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"data.augmentation.{name} is {getattr(self, name)}, expected 0 to 1"
                )
        for name in ("gain_db", "shift_seconds", "mixup_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"data.augmentation.{name} is {getattr(self, name)}, expected at least 0"
                )

    @property
    def moves(self) -> bool:
        """Whether it changes when things are heard."""
        return self.shift_seconds > 0 or self.speed != (1.0, 1.0)

    def fewest(self, samples: Tensor, sample_rate: int) -> Tensor:
        """How many of a clip's samples, (…) int64, are left at least."""
        left = (samples / self.speed[1]).long()
        return left - (left // 10).clamp(max=round(self.shift_seconds * sample_rate))


def change_speed(samples: Tensor, speed: tuple[float, float]) -> Tensor:
    """Play (n,) faster or slower by a random factor, to (about n / factor,) samples."""
    low, high = round(100 * speed[0]), round(100 * speed[1])
    percent = int(torch.randint(low, high + 1, ()))
    return resample(samples, percent, 100)


def change_gain(samples: Tensor, gain_db: float) -> Tensor:
    """Scale by a random gain of up to gain_db either way."""
    return samples * 10 ** (float(2 * torch.rand(()) - 1) * gain_db / 20)


def shift(samples: Tensor, most: int) -> Tensor:
    """Move (n,) by up to `most` samples: cut its beginning, or put silence before it."""
    by = int(torch.randint(-min(most, len(samples) // 10), most + 1, ()))
    return samples[-by:] if by < 0 else F.pad(samples, (by, 0))


def add_random_noise(samples: Tensor, snr_db: tuple[float, float], noise: Tensor | None) -> Tensor:
    """Add noise (n',) from a random place of it, repeated where it is short; None: white noise."""
    low, high = snr_db
    snr = low + (high - low) * torch.rand(())
    if noise is None:
        other = torch.randn_like(samples)
    else:
        start = int(torch.randint(0, len(noise), ()))
        other = noise.roll(-start).repeat(-(-len(samples) // len(noise)))[: len(samples)]
    if not samples.any() or not other.any():
        return samples  # the ratio to silence is not defined
    return add_noise(samples, other, snr)


def mixup(batch: dict[str, Any], alpha: float, classes: int) -> dict[str, Any]:
    """Add to each clip of a batch another one; targets become shares of the classes, (b, k).

    Args:
        batch: "inputs" (b, n), maybe "mask" (b, n), "targets" (b,) int64 or (b, k) float.
        alpha: of the Beta distribution that a clip's share is drawn from; it is at least a half.
        classes: k.
    """
    inputs, mask, targets = batch["inputs"], batch.get("mask"), batch["targets"]
    b, device = len(inputs), inputs.device
    concentration = torch.full((b,), alpha)
    share = torch.distributions.Beta(concentration, concentration).sample()
    share = torch.maximum(share, 1 - share).to(device)[:, None]
    other = torch.randperm(b).to(device)
    if not targets.is_floating_point():
        targets = F.one_hot(targets, classes).to(inputs.dtype)
    mixed = {
        **batch,
        "inputs": share * inputs + (1 - share) * inputs[other],
        "targets": share * targets + (1 - share) * targets[other],
    }
    return mixed if mask is None else {**mixed, "mask": mask | mask[other]}
