"""scikit-learn's scanned digits: real images that need no download.

Dimensions: channels c · height H · width W
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from mamba2_apps.data import Sample
from mamba2_apps.vision.data import ImageData, ImagePreprocessing, TensorImages


class Digits(ImageData):
    """1,797 scans of handwritten digits, 8 x 8 pixels of 0 to 16.

    A fixed, stratified quarter is the test set. A fixed, stratified part of the rest chooses the
    epoch. Ink is bright on dark ground, in files to predict too.

    Args:
        batch_size: images per step.
        num_workers: processes that augment; 0 does it in the training process.
        val_fraction: part of the training three quarters that chooses the epoch.
        max_rotation: largest random rotation, in degrees either way.
        max_shift: largest random shift, in pixels either way.
        max_scale: largest random change of size, as a fraction either way.
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        val_fraction: float = 0.2,
        max_rotation: float = 15.0,
        max_shift: float = 1.0,
        max_scale: float = 0.15,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction is {val_fraction}, expected between 0 and 1")
        self.val_fraction = val_fraction
        self.max_rotation, self.max_shift, self.max_scale = max_rotation, max_shift, max_scale
        self.labels = [str(digit) for digit in range(10)]

    @property
    def preprocessing(self) -> ImagePreprocessing:
        # Mean and deviation of the training scans, on the scale 0 to 1.
        return ImagePreprocessing(height=8, width=8, channels=1, mean=[0.305], std=[0.376])

    def setup(self, stage: str) -> None:
        pixels, targets = load_digits(return_X_y=True)
        fit, test = self._split(np.arange(len(targets)), targets, 0.25)
        train, val = self._split(fit, targets[fit], self.val_fraction)
        scaled = torch.from_numpy(pixels.astype(np.float32) / 16).reshape(-1, 8, 8, 1)
        images = torch.stack([self.preprocessing.normalize(image) for image in scaled])
        self._pixels, self._targets, self._fit, self._test = pixels, targets, fit, test
        self._ground = self.preprocessing.normalize(torch.zeros(1, 1, 1)).item()
        self.train_set, self.val_set, self.test_set = (
            TensorImages(images[part], torch.from_numpy(targets[part]))
            for part in (train, val, test)
        )

    def augment(self, sample: Sample) -> Sample:
        angle, zoom, x, y = (2 * torch.rand(4) - 1).tolist()
        angle, zoom = math.radians(angle * self.max_rotation), 1 + zoom * self.max_scale
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        # grid_sample counts from -1 to 1 across 8 pixels.
        shift_x, shift_y = x * self.max_shift / 4, y * self.max_shift / 4
        theta = torch.tensor([[[cos, -sin, shift_x], [sin, cos, shift_y]]])
        image = sample["inputs"][None] - self._ground
        grid = F.affine_grid(theta, list(image.shape), align_corners=False)
        moved = F.grid_sample(image, grid, align_corners=False)
        return {**sample, "inputs": moved[0] + self._ground}

    def baselines(self) -> dict[str, dict[str, float]]:
        # gamma is the best of cross-validation within the training three quarters.
        models = {
            "scikit-learn SVC": SVC(gamma=0.001),
            "scikit-learn logistic regression": make_pipeline(
                StandardScaler(), LogisticRegression(max_iter=1000)
            ),
        }
        scores = {}
        for name, model in models.items():
            model.fit(self._pixels[self._fit], self._targets[self._fit])
            truth, guess = self._targets[self._test], model.predict(self._pixels[self._test])
            scores[name] = {
                "accuracy": float(accuracy_score(truth, guess)),
                "macro_f1": float(f1_score(truth, guess, average="macro")),
            }
        return scores

    @staticmethod
    def _split(indices: np.ndarray, targets: np.ndarray, held_out: float) -> list[np.ndarray]:
        return train_test_split(indices, test_size=held_out, stratify=targets, random_state=0)
