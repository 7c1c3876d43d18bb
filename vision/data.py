"""Image files and sets of labelled images: folders, archives and whatever else timm reads.

Dimensions: batch b · channels c · height H · width W · classes k
"""

import glob
import re
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from numbers import Integral
from pathlib import Path
from statistics import mode
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from sklearn.model_selection import train_test_split
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform
from timm.data.readers import create_reader
from torch import Tensor, nn
from torch.utils.data import Dataset

from mamba2_apps.data import DataModule, Preprocessing, Sample, UnreadableInput, files_under
from mamba2_apps.tasks import Classification
from mamba2_apps.vision import reports

IMAGE_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".webp",
    ".avif",
)
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr"}
_WIDE = re.compile(r"\b(L|LA|RGB|RGBA|RGBX);16")


def open_image(item: Any, name: str | None = None) -> Image.Image:
    """A still image of 8 bits per channel from a path, an open file, an array or a PIL image.

    Args:
        item: what to read; an array is (H, W) or (H, W, 3), uint8.
        name: what messages call it; None: the path.

    Raises:
        UnreadableInput: empty, truncated, animated, CMYK, more than 8 bits, or no image at all.
    """
    name = name or _name_of(item)
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or not (item.ndim == 2 or item.shape[2:] == (3,)):
            raise UnreadableInput(
                f"an array of {item.dtype} and shape {item.shape}, expected (H, W) or (H, W, 3) of "
                "uint8 from 0 to 255"
            )
        return Image.fromarray(item)
    try:
        if isinstance(item, Image.Image):
            return _checked(item, name)
        with Image.open(item) as image:
            return _checked(image, name)
    except UnreadableInput:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableInput(f"{name}: {error}; make it smaller") from error
    except Exception as error:  # over damaged bytes Pillow's readers raise whatever they meet
        raise UnreadableInput(
            f"{name}: not a readable image ({_cause(item, error)}); replace or remove it"
        ) from error


def _checked(image: Image.Image, name: str) -> Image.Image:
    """The image itself, loaded. Raises UnreadableInput where it is no still one of 8 bits."""
    # Pillow reads 16 bits of colour as 8 without a word: only the tile's layout, such as RGB;16B,
    # tells them, until it is loaded. (BGR;16 is 16 bits for all three.)
    wide = [tile for tile in getattr(image, "tile", []) if _WIDE.search(str(tile[3]))]
    image.load()
    # A phone's MPO is a JPEG with further pictures behind it, a depth map say; the first is meant.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise UnreadableInput(f"{name}: {frames} frames, expected a still image; save one of them")
    if wide or image.mode not in MODES:
        pixels = "16 bits per channel" if wide else f"pixels of mode {image.mode}"
        raise UnreadableInput(f"{name}: {pixels}, expected grey or RGB of 8 bits; convert it")
    return image


def _name_of(item: Any) -> str:
    return str(item) if isinstance(item, str | Path) else "an image in memory"


def _cause(item: Any, error: Exception) -> str:
    size = None
    if isinstance(item, BytesIO):
        size = len(item.getvalue())
    elif isinstance(item, str | Path) and Path(item).is_file():
        size = Path(item).stat().st_size
    if size == 0:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "in no format that Pillow knows"
    return str(error)


class Pictures(Preprocessing):
    """What both ways to fit an image into a tensor share. See the two subclasses."""

    suffixes: ClassVar[tuple[str, ...]] = (".png",)
    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    min_side: int
    if_too_small: ClassVar[str] = "remove it, or give a larger one"
    """What the message about an image under min_side advises."""

    def find(self, source: str) -> list[str]:
        return files_under(source, IMAGE_SUFFIXES, "image files")

    def example(self) -> Sample:
        return {"inputs": torch.zeros(self.channels, *self.size)}

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Height and width of the tensors."""

    def answerer(
        self, sources: Sequence[str], *, output: Path | None, stream: bool
    ) -> Callable[..., Iterator[dict[str, Any]]] | None:
        """A map of what answers hang on, where a picture is asked for."""
        if output is not None and output.suffix.lower() == ".png" and not stream:
            return reports.answerer(self, sources, output)
        return super().answerer(sources, output=output, stream=stream)

    def convert(self, item: Any, name: str | None = None) -> Image.Image:
        """An image of `channels` channels. Raises UnreadableInput, also for one too small."""
        image = open_image(item, name).convert({1: "L", 3: "RGB"}[self.channels])
        if min(image.size) < self.min_side:
            raise UnreadableInput(
                f"{name or _name_of(item)}: {image.width} x {image.height} pixels, expected sides "
                f"of at least {self.min_side}; {self.if_too_small}"
            )
        return image

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels (H, W, c) from 0 to 1 to the model's input (c, H, W)."""
        return ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).movedim(-1, 0)

    def pixels(self, inputs: Tensor) -> Tensor:
        """What `normalize` was given, from 0 to 1: (…, c, H, W) to (…, H, W, c)."""
        inputs = inputs.detach().float().cpu().movedim(-3, -1)
        return (inputs * torch.tensor(self.std) + torch.tensor(self.mean)).clamp(0, 1)


@dataclass(kw_only=True)
class ImagePreprocessing(Pictures):
    """The whole image, its sides changed to the model's: for scans and crops of one shape.

    Args:
        height: rows that the image is resized to, by averaging over area.
        width: columns.
        channels: 1 for grey levels, 3 for RGB.
        mean: value per channel, on the scale 0 to 1, that becomes 0.
        std: standard deviation per channel, which becomes 1.
        min_side: an image with a shorter side in pixels is refused: nothing can be seen in it.
            From there on smaller images than the model's are enlarged.
    """

    height: int
    width: int
    channels: int
    mean: list[float]
    std: list[float]
    min_side: int = 4

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def __call__(self, item: Any, name: str | None = None) -> Tensor:
        image = self.convert(item, name)
        if image.size != (self.width, self.height):
            image = image.resize((self.width, self.height), Image.Resampling.BOX)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
        return self.normalize(pixels.reshape(self.height, self.width, self.channels))


@dataclass(kw_only=True)
class PhotoPreprocessing(Pictures):
    """timm's way for photos: the shorter side resized, the centre cropped.

    Args:
        img_size: height and width of the crop.
        channels: 1 for grey levels, 3 for RGB.
        mean: value per channel, on the scale 0 to 1, that becomes 0.
        std: standard deviation per channel, which becomes 1.
        crop_pct: the crop's share of the resized image's shorter side.
        interpolation: bilinear or bicubic.
        min_side: an image with a shorter side in pixels is refused: nothing can be seen in it.
    """

    img_size: int
    channels: int
    mean: list[float]
    std: list[float]
    crop_pct: float
    interpolation: str
    min_side: int
    if_too_small: ClassVar[str] = "remove it, or lower data.min_side"

    @property
    def size(self) -> tuple[int, int]:
        return self.img_size, self.img_size

    def __call__(self, item: Any, name: str | None = None) -> Tensor:
        return self._transform(self.convert(item, name))

    @cached_property
    def _transform(self) -> Callable[[Image.Image], Tensor]:
        return create_transform(
            self.img_size,
            interpolation=self.interpolation,
            mean=tuple(self.mean),
            std=tuple(self.std),
            crop_pct=self.crop_pct,
        )


class TensorImages(Dataset[Sample]):
    """Images (n, c, H, W) with labels (n,), in memory."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = images, targets

    def __getitem__(self, index: int) -> Sample:
        return {"inputs": self.images[index], "targets": self.targets[index]}

    def __len__(self) -> int:
        return len(self.targets)


class ImageFiles(Dataset[Sample]):
    """Images that are read when they are asked for, with their classes.

    Args:
        sources: what stands for each image, such as its path.
        targets: class of each image.
        decode: what `fetch` gives to a sample's inputs.
        fetch: a source to what `open_image` reads, and its name in messages.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        targets: np.ndarray,
        decode: Callable[..., Any],
        fetch: Callable[[Any], tuple[Any, str]],
    ) -> None:
        self.sources, self.targets, self.decode, self.fetch = sources, targets, decode, fetch

    def __getitem__(self, index: int) -> Sample:
        item, name = self.fetch(self.sources[index])
        return {"inputs": self.decode(item, name), "targets": int(self.targets[index])}

    def __len__(self) -> int:
        return len(self.sources)


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
        if not self.mixing or len(batch["inputs"]) % 2:
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

    def report(self, task: Any, folder: Path) -> None:
        if isinstance(task, Classification):
            reports.pictures_of_a_test(task, self.test_set, self.preprocessing, folder)


@dataclass(kw_only=True)
class PhotoAugmentation:
    """timm's random changes of a training photo.

    Args:
        scale: least and largest share of the photo's area that a random crop covers.
        ratio: least and largest width over height of a crop.
        hflip: share of the photos that are mirrored.
        vflip: share of the photos that are turned upside down.
        color_jitter: strength of changes in brightness, contrast and saturation, where there is no
            auto_augment.
        auto_augment: a policy in timm's words, such as rand-m9-mstd0.5-inc1; null: none.
        erase: share of the photos in which a rectangle becomes noise.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    erase: float = 0.25

    def __post_init__(self) -> None:
        if self.auto_augment == "None":  # what jsonargparse makes of null over a text, this deep
            self.auto_augment = None


class PhotoData(ImageData):
    """Photos that are decoded and augmented as they are read. A subclass finds them.

    Args:
        img_size: height and width of what the model sees.
        channels: 1 for grey levels, 3 for RGB.
        mean: value per channel, on the scale 0 to 1, that becomes 0; null: ImageNet's for RGB, 0.5
            for grey.
        std: standard deviation per channel, which becomes 1; null: as mean.
        crop_pct: for validation and prediction, the crop's share of the resized shorter side.
        interpolation: of resizing, bilinear or bicubic.
        min_side: an image with a shorter side in pixels is refused.
        augmentation: random changes of the training photos.
        unreadable: error: a file that cannot be read ends training with a sentence; skip: all files
            are read once before training, and those that cannot be read are left out, and named on
            standard error and in the RUN's data.json.
        batch_size: images per step and device.
        num_workers: processes that decode and augment; 0 does it in the training process.
        balanced: draw every class equally often while training, with replacement.
        mixup: alpha of the blending of two images; 0: none.
        cutmix: alpha of pasting a piece of one image into another; 0: none.
        mix_probability: share of the batches that are mixed.
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        channels: Literal[1, 3] = 3,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        crop_pct: float = 0.9,
        interpolation: str = "bicubic",
        min_side: int = 16,
        augmentation: PhotoAugmentation = PhotoAugmentation(),  # noqa: B008  frozen by use
        unreadable: Literal["error", "skip"] = "error",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.img_size, self.channels, self.crop_pct = img_size, channels, crop_pct
        self.mean = list(mean or (IMAGENET_DEFAULT_MEAN if channels == 3 else [0.5]))
        self.std = list(std or (IMAGENET_DEFAULT_STD if channels == 3 else [0.5]))
        if not len(self.mean) == len(self.std) == channels:
            raise ValueError(
                f"data.mean is {self.mean} and data.std {self.std}, expected one value for each of "
                f"the {channels} channels"
            )
        self.interpolation, self.min_side = interpolation, min_side
        self.augmentation, self.unreadable = augmentation, unreadable
        self.left_out: dict[str, list[str]] = {}
        """What was left out of each part, as messages."""

    @property
    def preprocessing(self) -> PhotoPreprocessing:
        return PhotoPreprocessing(
            img_size=self.img_size,
            channels=self.channels,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
            min_side=self.min_side,
        )

    def setup(self, stage: str) -> None:
        if hasattr(self, "test_set"):
            return  # Lightning asks again before each stage of a run
        self.find_images()
        self._check_seen(self.val_set)  # type: ignore[arg-type]
        self._check_seen(self.test_set)  # type: ignore[arg-type]

    def findings(self) -> dict[str, Any]:
        sets = {"train": self.train_set, "val": self.val_set, "test": self.test_set}
        images = {part: len(found) for part, found in sets.items()}  # type: ignore[arg-type]
        return {"images": images, "left_out": self.left_out}

    @abstractmethod
    def find_images(self) -> None:
        """Fill `labels`, `train_set`, `val_set` and `test_set`."""

    def prepare_model(self, model: nn.Module) -> None:
        embedding: Any = getattr(getattr(model, "portable", model), "patch_embed", None)
        size = getattr(embedding, "img_size", None)
        if size and embedding.strict_img_size and tuple(size) != self.preprocessing.size:
            raise ValueError(
                f"data.img_size is {self.img_size}, the model's {tuple(size)}; give both the same, "
                f"as in --model.img_size {self.img_size}"
            )

    def _check_seen(self, part: ImageFiles) -> None:
        unseen = set(part.targets.tolist()) - set(self.class_of_samples().tolist())
        for target in unseen:
            _, name = part.fetch(part.sources[part.targets.tolist().index(target)])
            raise ValueError(
                f"{name} is of class {self.labels[target]}, of which training has no image; add "
                "some, or remove the class"
            )

    def augment(self, sample: Sample) -> Sample:
        return {**sample, "inputs": self._random_transform(sample["inputs"])}

    @cached_property
    def _random_transform(self) -> Callable[[Image.Image], Tensor]:
        options = self.augmentation
        return create_transform(
            self.img_size,
            is_training=True,
            scale=options.scale,
            ratio=options.ratio,
            hflip=options.hflip,
            vflip=options.vflip,
            color_jitter=options.color_jitter,
            auto_augment=options.auto_augment,
            re_prob=options.erase,
            re_mode="pixel",
            interpolation=self.interpolation,
            mean=tuple(self.mean),
            std=tuple(self.std),
        )

    def files(
        self,
        sources: Sequence[Any],
        targets: Sequence[int],
        fetch: Callable[[Any], tuple[Any, str]],
        part: Literal["train", "val", "test"],
    ) -> ImageFiles:
        """The data set of a part: pictures to be augmented for training, else tensors."""
        preprocessing = self.preprocessing
        decode = preprocessing.convert if part == "train" else preprocessing
        classes = np.asarray(targets)
        if self.unreadable == "skip":
            keep, self.left_out[part] = _readable(sources, fetch, preprocessing)
            sources, classes = [sources[i] for i in keep], classes[keep]
            if not keep:
                raise ValueError("no image of a part could be read; the lines above name them")
        return ImageFiles(sources, classes, decode, fetch)


class ImageFolder(PhotoData):
    """Photos in a folder for each class, such as flowers/rose/1.jpg.

    Where `folder` holds the folders train, val and test, these are the parts; without val a fixed,
    stratified part of train chooses the epoch, without test the validation photos are tested on.
    Where it holds no train, every folder in it is a class, and such parts are held out.

    Names that start with a dot are passed over. What else is no image in a folder of a class, by
    IMAGE_SUFFIXES, is counted in one line on standard error.

    Args:
        folder: the folder.
        val_fraction: part of the photos that chooses the epoch, where there is no folder val.
        test_fraction: part of the photos to test on, where there is no folder train.
        options: those of PhotoData.
    """

    def __init__(
        self,
        *,
        folder: str,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if min(val_fraction, test_fraction) <= 0 or val_fraction + test_fraction >= 1:
            raise ValueError(
                f"data.val_fraction is {val_fraction} and data.test_fraction {test_fraction}, "
                "expected above 0 and together below 1"
            )
        self.folder = Path(folder)
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    def find_images(self) -> None:
        given = (self.folder / "train").is_dir()
        parts = self._given_parts() if given else self._held_out_parts()
        train, val, *test = parts
        self.train_set = self.files(*train, _path_itself, "train")
        self.val_set = self.files(*val, _path_itself, "val")
        self.test_set = self.files(*test[0], _path_itself, "test") if test else self.val_set

    def _given_parts(self) -> list[tuple[list[str], list[int]]]:
        parts = ["train", *(part for part in ("val", "test") if (self.folder / part).is_dir())]
        if "val" not in parts:
            self._refuse_other_parts()
        found = {part: _classes_in(self.folder / part) for part in parts}
        self._say_what_is_not_read(found.values())
        self.labels = _checked_labels(found["train"], self.folder / "train")
        for part in parts:
            for name in found[part].keys() - set(self.labels):
                raise ValueError(
                    f"{self.folder / part / name}: a class that {self.folder / 'train'} does not "
                    "have; training would never see it: move it, remove it or correct its name"
                )
        train, *others = [_listed(found[part], self.labels) for part in parts]
        if "val" in parts:
            return [train, *others]
        fit, val, _ = held_out(*train, self.val_fraction, 0.0)
        return [fit, val, *others]

    def _refuse_other_parts(self) -> None:
        """Raise ValueError for a folder beside train that may be meant as val, such as valid."""
        for path in sorted(self.folder.iterdir()):
            if path.is_dir() and path.name.lower().startswith(("val", "dev")):
                raise ValueError(
                    f"{path}: beside {self.folder / 'train'} the folders val and test are read; "
                    "call it val, or move it elsewhere for a val to be held out of train"
                )

    def _held_out_parts(self) -> list[tuple[list[str], list[int]]]:
        found = _classes_in(self.folder)
        self._say_what_is_not_read([found])
        self.labels = _checked_labels(found, self.folder)
        few = min(found, key=lambda name: len(found[name]))
        if len(found[few]) < 3:
            raise ValueError(
                f"{self.folder / few} holds {len(found[few])} images; training, validation and "
                "test need one each, or give them in folders train, val and test"
            )
        paths, targets = _listed(found, self.labels)
        return held_out(paths, targets, self.val_fraction, self.test_fraction)

    def _say_what_is_not_read(self, found: Iterable[dict[str, list[str]]]) -> None:
        read = {path for classes in found for paths in classes.values() for path in paths}
        # glob passes over names with a dot, and follows links to folders.
        names = glob.iglob("**/*", root_dir=self.folder, recursive=True)
        paths = {str(self.folder / name) for name in names} - read
        others = sorted(path for path in paths if Path(path).is_file())
        if others:
            commonest = mode(Path(path).suffix for path in others)
            example = next(path for path in others if Path(path).suffix == commonest)
            print(
                f"left out: {len(others)} of the files in {self.folder}, such as {example}; "
                f"expected images ({', '.join(IMAGE_SUFFIXES)}) in a folder for each class",
                file=sys.stderr,
            )


class TimmImages(PhotoData):
    """Images by any reader of timm that can be asked for its n-th image.

    Args:
        reader: timm's name: "" for a folder of classes or a .tar of one, hfds/NAME for a data set
            of Hugging Face (which needs `pip install datasets`), NAME also the path of a local one.
        root: the folder, the archive, or where a downloaded data set is kept.
        train_split: the reader's name of the part to train on; a folder or an archive in `root`
            with the reader "".
        val_split: what chooses the epoch; null: a fixed, stratified tenth of the training images.
        test_split: what is tested on; null: the validation images.
        reader_options: what timm's create_reader takes for this reader, such as input_key and
            target_key, the columns of a data set of Hugging Face where they are not image and
            label, or class_map, a number for each name of a class; null: none.
        options: those of PhotoData.
    """

    def __init__(
        self,
        *,
        reader: str,
        root: str,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        reader_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.reader, self.root = reader, root
        self.reader_options = reader_options or {}
        self.splits = (train_split, val_split, test_split)

    def find_images(self) -> None:
        train_split, val_split, test_split = self.splits
        train, targets = self._read(train_split)
        self.labels = _labels_of(train, targets)
        everything: list[int] = list(range(len(targets)))
        if val_split is None:
            (fit, fit_targets), (held, held_targets), _ = held_out(everything, targets, 0.1, 0.0)
            val, fetch_val = (held, held_targets), _Fetch(train)
        else:
            fit, fit_targets = everything, targets
            val, fetch_val = self._part(val_split)
        self.train_set = self.files(fit, fit_targets, _Fetch(train), "train")
        self.val_set = self.files(*val, fetch_val, "val")
        if test_split is None:
            self.test_set = self.val_set
        else:
            test, fetch_test = self._part(test_split)
            self.test_set = self.files(*test, fetch_test, "test")

    def _part(self, split: str) -> tuple[tuple[Any, Any], "_Fetch"]:
        reader, targets = self._read(split)
        if max(targets) >= len(self.labels) or _labels_of(reader, targets, self.labels) != (
            self.labels
        ):
            raise ValueError(
                f"{self.reader or self.root}: the part {split} has other classes than the training "
                f"part, {', '.join(self.labels[:10])}; give parts of one data set"
            )
        return (np.arange(len(targets)), targets), _Fetch(reader)

    def _read(self, split: str) -> tuple[Any, list[int]]:
        """timm's reader of a part, and the class of each of its images."""
        root = str(Path(self.root) / split) if self.reader == "" else self.root
        if self.reader == "" and not Path(root).exists():
            raise ValueError(f"{root} does not exist; expected a folder or a .tar")
        try:
            reader = create_reader(self.reader, root, split, **self.reader_options)
            if not hasattr(reader, "__getitem__"):
                raise ValueError(
                    f"data.reader is {self.reader!r}, which streams; training here draws images by "
                    "number: use a reader such as hfds/ or a folder"
                )
            _check_columns(reader)
            return reader, _targets_of(reader)
        except (AssertionError, LookupError, TypeError) as error:
            raise ValueError(
                f"{self.reader or root} cannot be read with data.reader_options "
                f"{self.reader_options} ({type(error).__name__}: {error}); expected what timm's "
                "reader of that name takes"
            ) from error


class _Fetch:
    """The n-th image of a timm reader, and its name; a class so that workers can be sent it."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __call__(self, index: int) -> tuple[Any, str]:
        item, _ = self.reader[int(index)]
        name = self.reader.filename(int(index), absolute=True)
        return item, str(name or f"image number {index}")  # one within a table has no name


def held_out(
    sources: Sequence[Any], targets: Sequence[int], val_fraction: float, test_fraction: float
) -> list[tuple[list[Any], list[int]]]:
    """Training, validation and test parts of images: fixed, disjoint, stratified by class.

    Each part has every class. Raises ValueError for a class with too few images for that.
    """
    fit, classes = np.arange(len(targets)), np.asarray(targets)
    fractions = (test_fraction, val_fraction / (1 - test_fraction))
    counts, needed = np.bincount(classes), 1 + sum(fraction > 0 for fraction in fractions)
    for number in np.flatnonzero((counts > 0) & (counts < needed)):
        raise ValueError(
            f"class number {number} has {counts[number]} images, expected at least {needed}, one "
            "for each part; add some, remove the class or give the parts apart"
        )
    parts: list[np.ndarray] = []
    for fraction in fractions:
        held: np.ndarray = fit[:0]
        if fraction:
            count = max(round(fraction * len(fit)), len(np.unique(classes)))
            fit, held = train_test_split(
                fit, test_size=count, stratify=classes[fit], random_state=0
            )
            for number in np.setdiff1d(classes, classes[held]):  # rare: its share rounds to none
                first = np.flatnonzero(classes[fit] == number)[0]
                fit, held = np.delete(fit, first), np.append(held, fit[first])
        parts.append(held)
    test, val = parts
    return [
        ([sources[i] for i in part.tolist()], [int(targets[i]) for i in part.tolist()])
        for part in (fit, val, test)
    ]


def _path_itself(path: str) -> tuple[str, str]:
    return path, path


def _classes_in(folder: Path) -> dict[str, list[str]]:
    """Image files by the name of the folder that they are in."""
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; expected a folder with one folder per class")
    paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    names = sorted(path.name for path in paths if path.is_dir())
    return {name: files_under(str(folder / name), IMAGE_SUFFIXES, "image files") for name in names}


def _checked_labels(found: dict[str, list[str]], folder: Path) -> list[str]:
    if len(found) < 2:
        raise ValueError(
            f"{folder} holds the classes {list(found)}; expected two or more folders, one for each "
            "class of images"
        )
    return list(found)


def _listed(found: dict[str, list[str]], labels: list[str]) -> tuple[list[str], list[int]]:
    pairs = [(path, labels.index(name)) for name, paths in found.items() for path in paths]
    return [path for path, _ in pairs], [target for _, target in pairs]


def _check_columns(reader: Any) -> None:
    """Raise ValueError where a table of Hugging Face has no such columns: timm does not."""
    columns = getattr(getattr(reader, "dataset", None), "column_names", None)
    if columns is None:
        return
    keys = {"input_key": reader.image_key, "target_key": reader.label_key}
    for option, key in keys.items():
        # timm takes a/b for b within the column a, too, and a,b for two columns.
        if not {key, *re.split("[/,]", key)} & {*columns}:
            raise ValueError(
                f"no column {key!r} among {', '.join(columns)}; name the right one in "
                f'data.reader_options, as in {{"{option}": "NAME"}}'
            )


def _targets_of(reader: Any) -> list[int]:
    """The class of each image of a timm reader, without decoding any."""
    if hasattr(reader, "targets"):
        targets = list(reader.targets)
    elif hasattr(reader, "samples"):
        targets = [target for _, target in reader.samples]
    elif hasattr(reader, "iter_targets"):
        targets = list(reader.iter_targets())
    else:  # timm before 1.0.31
        labels, of_name = reader.dataset[reader.label_key], reader.class_to_idx
        targets = [of_name[label] for label in labels] if reader.remap_class else list(labels)
    for target in targets:
        if not isinstance(target, Integral):
            raise ValueError(
                f"{target!r} is the label of an image, expected the number of one class; give "
                'names numbers in data.reader_options, as in {"class_map": {"cat": 0, "dog": 1}}'
            )
    return [int(target) for target in targets]


def _labels_of(reader: Any, targets: list[int], given: list[str] | None = None) -> list[str]:
    """Class names of a timm reader; `given` where it has none of its own, or else its numbers."""
    names = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    if names:  # of which a class map may give several the same number
        of_number = [
            [str(name) for name, its in names.items() if its == number]
            for number in range(max(names.values()) + 1)
        ]
        return [" or ".join(group) or str(i) for i, group in enumerate(of_number)]
    return list(given or map(str, range(max(targets) + 1)))


def _readable(
    sources: Sequence[Any], fetch: Callable[[Any], tuple[Any, str]], preprocessing: Pictures
) -> tuple[list[int], list[str]]:
    """Which sources can be read, and messages about the others, which standard error has too."""

    def problem(source: Any) -> str | None:
        try:
            preprocessing.convert(*fetch(source))
        except UnreadableInput as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(problem, sources))
    bad = [text for text in problems if text]
    for text in bad:
        print(f"left out: {text}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} of {len(sources)} images could not be read", file=sys.stderr)
    return [i for i, text in enumerate(problems) if text is None], bad
