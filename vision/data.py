"""Image files and image data sets.

Dimensions: batch b · channels c · height H · width W
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import Dataset

from mamba2_apps.data import DataModule, Preprocessing, Sample, UnreadableInput, files_under

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


@dataclass(kw_only=True)
class ImagePreprocessing(Preprocessing):
    """An image file, a PIL image or an array (H, W) or (H, W, 3) of 0 to 255 to a float32 tensor.

    Args:
        height: rows that the image is resized to, by averaging over area.
        width: columns.
        channels: 1 for grey levels, 3 for RGB.
        mean: value per channel, on the scale 0 to 1, that becomes 0.
        std: standard deviation per channel, which becomes 1.
    """

    height: int
    width: int
    channels: int
    mean: list[float]
    std: list[float]

    def find(self, source: str) -> list[str]:
        return files_under(source, IMAGE_SUFFIXES, "image files")

    def __call__(self, item: Any) -> Tensor:
        image = item if isinstance(item, Image.Image) else self._open(item)
        image = image.convert({1: "L", 3: "RGB"}[self.channels])
        if image.size != (self.width, self.height):
            image = image.resize((self.width, self.height), Image.Resampling.BOX)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
        return self.normalize(pixels.reshape(self.height, self.width, self.channels))

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels (H, W, c) from 0 to 1 to the model's input (c, H, W)."""
        return ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).movedim(-1, 0)

    def _open(self, item: Any) -> Image.Image:
        if isinstance(item, np.ndarray):
            if item.dtype != np.uint8:
                raise UnreadableInput(f"an array of {item.dtype}, expected uint8 from 0 to 255")
            return Image.fromarray(item)
        try:
            with Image.open(item) as image:
                image.load()
                frames = getattr(image, "n_frames", 1)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            size = Path(item).stat().st_size if Path(item).is_file() else 0
            cause = "the file is empty" if size == 0 else f"{error}"
            raise UnreadableInput(f"{item}: not a readable image ({cause})") from error
        except Image.DecompressionBombError as error:
            raise UnreadableInput(f"{item}: {error}") from error
        if frames > 1:
            raise UnreadableInput(f"{item}: {frames} frames, expected a still image")
        if image.mode not in EIGHT_BIT_MODES:
            raise UnreadableInput(
                f"{item}: pixels of mode {image.mode}, expected 8 bits per channel; convert it"
            )
        return image


class TensorImages(Dataset[Sample]):
    """Images (n, c, H, W) with labels (n,), in memory."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = images, targets

    def __getitem__(self, index: int) -> Sample:
        return {"inputs": self.images[index], "targets": self.targets[index]}

    def __len__(self) -> int:
        return len(self.targets)


class ImageData(DataModule):
    """What every set of labelled images shares: mixing of batches, balance, pictures of a test.

    Args:
        batch_size: images per step and device.
        num_workers: processes that decode and augment; 0 does it in the training process.
        balanced: draw every class equally often while training, with replacement.
        mixup: alpha of the blending of two images (Zhang et al. 2018); 0: none.
        cutmix: alpha of pasting a piece of one image into another (Yun et al. 2019); 0: none.
        mix_probability: share of the batches that are mixed.
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        balanced: bool = False,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_probability: float = 1.0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, balanced=balanced)
        self.mixing = max(mixup, cutmix) > 0
        if self.mixing and batch_size % 2:
            raise ValueError(
                f"data.batch_size is {batch_size}, expected an even number with mixup or cutmix"
            )
        self.mixup, self.cutmix, self.mix_probability = mixup, cutmix, mix_probability

    def mix(self, batch: Sample) -> Sample:
        if not self.mixing:
            return batch
        blend = Mixup(
            self.mixup,
            self.cutmix,
            prob=self.mix_probability,
            label_smoothing=0.0,
            num_classes=len(self.labels),
        )
        images, targets = blend(batch["inputs"].clone(), batch["targets"])
        return {**batch, "inputs": images, "targets": targets}

    def class_of_samples(self) -> np.ndarray:
        return np.asarray(self.train_set.targets)  # type: ignore[attr-defined]
