"""Photos in webdataset's shards: .tar files in which KEY.jpg stands beside KEY.cls, its class.

The shards are indexed once and read in any order, so that training draws images as from a folder
and a resumed run repeats them; nothing is unpacked.
"""

import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from mamba2_apps.vision.data import IMAGE_SUFFIXES, PhotoData, held_out


class Entry(NamedTuple):
    """Where an image lies within a shard."""

    shard: str
    name: str
    start: int
    size: int


class ShardedImages(PhotoData):
    """Photos in shards, such as train-000.tar, train-001.tar, val-000.tar.

    Args:
        folder: where the shards are. A file classes.txt there names the classes, one a line; else
            they are named by their numbers.
        train_shards: pattern of the shards to train on.
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

    def setup(self, stage: str) -> None:
        train_shards, val_shards, test_shards = self.patterns
        train = self._indexed(train_shards)
        self.labels = self._names(max(train[1]) + 1)
        if val_shards is None:
            train, val, _ = held_out(*train, 0.1, 0.0)
        else:
            val = self._indexed(val_shards)
        test = val if test_shards is None else self._indexed(test_shards)
        for pattern, (entries, targets) in ((val_shards, val), (test_shards, test)):
            if max(targets) >= len(self.labels):
                unseen = entries[targets.index(max(targets))]
                raise ValueError(
                    f"{unseen.shard}: {unseen.name} is of class {max(targets)}, which no shard of "
                    f"{train_shards} has; correct the class or {pattern}"
                )
        self.train_set, self.val_set, self.test_set = (
            self.files(entries, targets, read, training=i == 0)
            for i, (entries, targets) in enumerate((train, val, test))
        )

    def _indexed(self, pattern: str) -> tuple[list[Entry], list[int]]:
        """Images of the shards of a pattern, and their classes."""
        shards = sorted(self.folder.glob(pattern))
        if not shards:
            raise ValueError(f"{self.folder} holds no {pattern}; expected shards of that name")
        pairs = [pair for shard in shards for pair in index(shard)]
        return [entry for entry, _ in pairs], [target for _, target in pairs]

    def _names(self, classes: int) -> list[str]:
        path = self.folder / "classes.txt"
        if not path.is_file():
            return [str(number) for number in range(classes)]
        names = path.read_text(encoding="utf-8").split("\n")
        names = [name.strip() for name in names if name.strip()]
        if len(names) < classes:
            raise ValueError(f"{path} names {len(names)} classes, the shards have {classes}")
        return names


def index(shard: Path) -> list[tuple[Entry, int]]:
    """Images of a shard and their classes, by key.

    Raises ValueError that names a damaged shard, or a key whose image or class is missing.
    """
    images: dict[str, Entry] = {}
    classes: dict[str, int] = {}
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                key, _, suffix = base.partition(".")  # webdataset's rule: the first dot
                key = f"{folder}/{key}"
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    entry = Entry(str(shard), member.name, member.offset_data, member.size)
                    images[key] = entry
                elif suffix == "cls":
                    file = archive.extractfile(member)
                    classes[key] = int(file.read()) if file else -1
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ValueError(f"{shard} is damaged ({error}); fetch it again") from error
    for key in images.keys() ^ classes.keys():
        missing = "image" if key in classes else ".cls"
        raise ValueError(f"{shard}: {key.strip('/')} has no {missing}; write the shard again")
    return [(images[key], classes[key]) for key in sorted(images)]


def read(entry: Entry) -> tuple[BytesIO, str]:
    """The bytes of an image, and its name in messages."""
    with open(entry.shard, "rb") as file:
        file.seek(entry.start)
        return BytesIO(file.read(entry.size)), f"{entry.shard}: {entry.name}"
