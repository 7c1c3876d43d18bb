"""Fashion-MNIST: 70,000 grey photographs of clothes (Xiao et al. 2017, arXiv:1708.07747).

Dimensions: batch b · channels c · height H · width W
"""

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset, Sampler

from mamba2_apps.data import EpochSampler, Sample
from mamba2_apps.vision.augmentation import erase, shift_and_flip
from mamba2_apps.vision.data import ImageData, ImagePreprocessing, TensorImages

LABELS = [
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]


class FashionMNIST(ImageData):
    """60,000 images to learn from and 10,000 to test on, 28 x 28, in 10 classes.

    A fixed, stratified part of the training images chooses the epoch. All images are kept in
    memory, and training batches are changed on the device, so that an epoch takes seconds.

    Args:
        folder: where the four published files are, gzipped or not: train-images-idx3-ubyte.gz, …
        batch_size: images per step and device.
        balanced: draw every class equally often while training, with replacement.
        val_images: training images that choose the epoch.
        train_images: how many of the others to learn from, a fixed, stratified part; null: all.
        max_shift: largest random shift, in pixels either way.
        flip: mirror half of the images.
        erase: share of the images in which a rectangle becomes noise.
        mixup: alpha of the blending of two images (Zhang et al. 2018); 0: none.
        cutmix: alpha of pasting a piece of one image into another (Yun et al. 2019); 0: none.
        mix_probability: share of the batches that are mixed.
    """

    def __init__(
        self,
        *,
        folder: str,
        batch_size: int = 512,
        balanced: bool = False,
        val_images: int = 5000,
        train_images: int | None = None,
        max_shift: int = 2,
        flip: bool = True,
        erase: float = 0.5,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_probability: float = 1.0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            balanced=balanced,
            mixup=mixup,
            cutmix=cutmix,
            mix_probability=mix_probability,
        )
        if not 10 <= val_images <= 50000:
            raise ValueError(f"data.val_images is {val_images}, expected 10 to 50000")
        if train_images is not None and not 10 <= train_images < 60000 - val_images:
            raise ValueError(
                f"data.train_images is {train_images}, expected 10 to {59999 - val_images}, or null"
            )
        self.folder, self.val_images = Path(folder), val_images
        self.train_images = train_images
        self.max_shift, self.flip, self.erase = max_shift, flip, erase
        self.labels = LABELS

    @property
    def preprocessing(self) -> ImagePreprocessing:
        # Mean and deviation of the 60,000 training images, on the scale 0 to 1.
        return ImagePreprocessing(height=28, width=28, channels=1, mean=[0.2860], std=[0.3530])

    @property
    def evaluation_batch_size(self) -> int:
        # A small training batch must not make hundreds of small steps of the 15,000 others.
        return max(self.batch_size, 1000)

    def setup(self, stage: str) -> None:
        images, targets = self._read("train")
        train, val = train_test_split(
            np.arange(len(targets)), test_size=self.val_images, stratify=targets, random_state=0
        )
        if self.train_images is not None:
            train, _ = train_test_split(
                train, train_size=self.train_images, stratify=targets[train], random_state=0
            )
        test_images, test_targets = self._read("t10k")
        self.train_set = self._set(images[train], targets[train])
        self.val_set = self._set(images[val], targets[val])
        self.test_set = self._set(test_images, test_targets)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Whole batches, taken out of memory by one index: a loader of samples would take longer
        to stack them than a GPU to learn from them."""
        return DataLoader(
            _Batches(self.train_set),  # type: ignore[arg-type]
            sampler=_EpochBatches(self.epoch_sampler(), self.batch_size),
            batch_size=None,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def mix(self, batch: Sample) -> Sample:
        ground = (0 - self.preprocessing.mean[0]) / self.preprocessing.std[0]
        images = shift_and_flip(batch["inputs"], self.max_shift, self.flip, ground)
        return super().mix({**batch, "inputs": erase(images, self.erase)})

    def _set(self, pixels: np.ndarray, targets: np.ndarray) -> TensorImages:
        scaled = torch.from_numpy(pixels).float()[..., None] / 255
        images = self.preprocessing.normalize(scaled.flatten(0, 1)).unflatten(1, scaled.shape[:2])
        return TensorImages(images.transpose(0, 1).contiguous(), torch.from_numpy(targets).long())

    def _read(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (n, 28, 28) uint8 and classes (n,) of "train" or "t10k"."""
        pixels = self._bytes(f"{part}-images-idx3-ubyte", header=16)
        targets = self._bytes(f"{part}-labels-idx1-ubyte", header=8)
        if len(pixels) != 28 * 28 * len(targets) or targets.max(initial=0) > 9:
            raise ValueError(
                f"{self.folder}: the {part} files hold {len(pixels)} pixels and {len(targets)} "
                "labels, expected 784 pixels for each label from 0 to 9; fetch them again"
            )
        return pixels.reshape(-1, 28, 28), targets

    def _bytes(self, name: str, header: int) -> np.ndarray:
        for path, opener in ((self.folder / f"{name}.gz", gzip.open), (self.folder / name, open)):
            if path.is_file():
                try:
                    with opener(path, "rb") as file:  # type: ignore[operator]
                        return np.frombuffer(file.read(), np.uint8, offset=header).copy()
                except (OSError, EOFError, ValueError) as error:
                    raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
        raise ValueError(
            f"{self.folder} has no {name}.gz; give --data.folder the folder of the four files that "
            "Fashion-MNIST is published as"
        )


class _EpochBatches(Sampler[list[tuple[int, int]]]):
    """An epoch's (epoch, index) keys in batches; a last, smaller one is left out."""

    def __init__(self, order: EpochSampler, batch_size: int) -> None:
        self.order, self.batch_size = order, batch_size

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        keys = list(self.order)
        for start in range(0, len(keys) - self.batch_size + 1, self.batch_size):
            yield keys[start : start + self.batch_size]

    def __len__(self) -> int:
        return len(self.order) // self.batch_size


class _Batches(Dataset[Sample]):
    """A TensorImages that is asked for a batch of (epoch, index) keys at once."""

    def __init__(self, images: TensorImages) -> None:
        self.images = images

    def __getitem__(self, keys: list[tuple[int, int]]) -> Sample:
        rows = torch.tensor([index for _, index in keys])
        return {"inputs": self.images.images[rows], "targets": self.images.targets[rows]}

    def __len__(self) -> int:
        return len(self.images)
