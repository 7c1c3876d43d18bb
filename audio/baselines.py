"""Simple models on the mean and deviation of each clip's log-mel energies: what to beat.

A clip is scaled to a largest sample of 1, and what lies below FLOOR is silence: the recordings' own
noise tells who recorded, not what is heard. On drum hits of authors left out that takes the RBF-SVM
from .77 to .90 (four of the authors, `benchmarks/audio_drums.py`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor

from mamba2_apps.audio.features import Features
from mamba2_apps.audio.preprocessing import MIN_PEAK

FLOOR = -1.0
"""Log energy, in Features' "logmel", of what counts as silence in a clip whose peak is 1."""


@torch.no_grad()
def statistics(waves: Sequence[Tensor], sample_rate: int, num_mels: int = 64) -> np.ndarray:
    """Mean and deviation over time of each log-mel bin, (clips, 2 · num_mels)."""
    features = Features(sample_rate, kind="logmel", num_mels=num_mels, floor=FLOOR)
    rows = []
    for wave in waves:
        scaled = wave / wave.abs().max().clamp(min=MIN_PEAK)
        energies = features.log_energies(scaled[None])[0]
        rows.append(torch.cat([energies.mean(0), energies.std(0, correction=0)]))
    return torch.stack(rows).numpy()


def models() -> dict[str, ClassifierMixin]:
    """New models by name, with scikit-learn's own settings on standardised statistics."""
    return {
        "logistic regression on log-mel statistics": make_pipeline(
            StandardScaler(), LogisticRegression(max_iter=5000)
        ),
        "RBF-SVM on log-mel statistics": make_pipeline(StandardScaler(), SVC(C=10.0)),
    }


def scores(
    fit_waves: Sequence[Tensor],
    fit_classes: Sequence[str],
    test_waves: Sequence[Tensor],
    test_classes: Sequence[str],
    sample_rate: int,
) -> dict[str, dict[str, float]]:
    """Test metrics of each model."""
    fit, test = statistics(fit_waves, sample_rate), statistics(test_waves, sample_rate)
    found = {}
    for name, model in models().items():
        guess = model.fit(fit, fit_classes).predict(test)  # type: ignore[attr-defined]
        found[name] = {
            "accuracy": float(accuracy_score(test_classes, guess)),
            "balanced_accuracy": float(balanced_accuracy_score(test_classes, guess)),
            "macro_f1": float(f1_score(test_classes, guess, average="macro")),
        }
    return found
