"""Simple models: what they hear does not hang on a clip's level or on its quiet noise."""

import numpy as np
import torch

from mamba2_apps.audio import baselines


def test_level_and_quiet_noise_change_no_statistics():
    hit = torch.sin(torch.arange(8000) * 0.2) * torch.logspace(0, -5, 8000)
    noisy = hit + 1e-4 * torch.randn(8000)
    found = baselines.statistics([hit, 0.01 * hit, noisy, torch.zeros(8000)], 16000, num_mels=32)
    assert found.shape == (4, 64)
    np.testing.assert_allclose(found[1], found[0], atol=1e-3)
    np.testing.assert_allclose(found[2], found[0], atol=0.02)
    assert (found[3, :32] == baselines.FLOOR).all()
    assert (found[3, 32:] == 0).all()


def test_scores_of_sounds_that_differ_are_perfect():
    def tone(pitch: float) -> torch.Tensor:
        return torch.sin(torch.arange(4000) * pitch) + 0.01 * torch.randn(4000)

    waves = [tone(pitch) for pitch in (0.1, 1.0) for _ in range(8)]
    classes = ["low"] * 8 + ["high"] * 8
    scores = baselines.scores(waves, classes, waves, classes, 16000)
    assert {name: values["accuracy"] for name, values in scores.items()} == dict.fromkeys(
        baselines.models(), 1.0
    )
