"""Photos in webdataset's shards: .tar files in which KEY.jpg stands beside KEY.cls, its class.

The shards are indexed once and read in any order, so that training draws images as from a folder
and a resumed run repeats them; nothing is unpacked.
"""

from io import BytesIO
from pathlib import Path
from typing import Any

from mamba2_apps.shards import CLASSES, Entry, class_names, find_files, read_index
from mamba2_apps.vision.data import IMAGE_SUFFIXES, PhotoData, held_out


class ShardedImages(PhotoData):
    """Photos in shards, such as train-000.tar, train-001.tar, val-000.tar.

    Args:
        folder: where the shards are. A file classes.txt there names the classes, one a line; else
            they are named by their numbers.
        train_shards: pattern of the shards to train on, such as train-*.tar or
            train-{000..127}.tar.
        val_shards: what chooses the epoch; null: a fixed, stratified tenth of the training images.
        test_shards: what is tested on; null: the validation images.
        options: those of PhotoData.
    """

    def __init__(
        self,
        *,
        folder: str,
        train_shards: str = "train-*.tar",
        val_shards: str | None = None,
        test_shards: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.folder = Path(folder)
        self.patterns = (train_shards, val_shards, test_shards)

    def find_images(self) -> None:
        train_shards, val_shards, test_shards = self.patterns
        train = self._indexed(train_shards)
        self.labels = self._names(max(train[1]) + 1)
        if val_shards is None:
            train, val, _ = held_out(*train, 0.1, 0.0)
        else:
            val = self._indexed(val_shards)
        test = val if test_shards is None else self._indexed(test_shards)
        for pattern, (entries, targets) in ((val_shards, val), (test_shards, test)):
            for target in set(targets) - set(train[1]):
                raise ValueError(
                    f"{entries[targets.index(target)]} is of class {target}, which no shard of "
                    f"{train_shards} has; correct the class or {pattern}"
                )
        self.train_set = self.files(train[0], train[1], read, "train")
        self.val_set = self.files(val[0], val[1], read, "val")
        self.test_set = self.val_set if test is val else self.files(test[0], test[1], read, "test")

    def _indexed(self, pattern: str) -> tuple[list[Entry], list[int]]:
        """Images of the shards of a pattern, and their classes."""
        pairs = [pair for shard in find_files(pattern, self.folder) for pair in index(shard)]
        if not pairs:
            raise ValueError(f"{self.folder}: the shards of {pattern} hold no images")
        return [entry for entry, _ in pairs], [target for _, target in pairs]

    def _names(self, classes: int) -> list[str]:
        names = class_names(self.folder)
        if names is None:
            return [str(number) for number in range(classes)]
        if len(names) < classes:
            raise ValueError(
                f"{self.folder / CLASSES} names {len(names)} classes, the shards have {classes}"
            )
        return names


def index(shard: str) -> list[tuple[Entry, int]]:
    """Images of a shard and their classes, by key.

    Raises ValueError that names a damaged shard, or a key whose image or class is missing or wrong.
    """
    pairs = []
    for sample in read_index(shard, IMAGE_SUFFIXES, (".cls",)):
        entry, text = sample.entry(), sample.texts.get(".cls")
        if entry is None or text is None:
            missing = "image" if entry is None else ".cls"
            raise ValueError(f"{sample.name} has no {missing}; write the shard again")
        if not text.isdecimal():
            raise ValueError(f"{sample.name}.cls is {text!r}, expected the number of a class")
        pairs.append((entry, int(text)))
    return pairs


def read(entry: Entry) -> tuple[BytesIO, str]:
    """The bytes of an image, and its name in messages."""
    return BytesIO(entry.read()), str(entry)
