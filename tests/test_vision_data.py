"""Folders and archives of photos: parts, messages, corrupt files, mixing, the recipes for them."""

import json
import struct
import tarfile
import zlib
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch._utils import ExceptionWrapper

import mamba2_apps
from mamba2_apps import catalog, cli, recipes, runs
from mamba2_apps.data import UnreadableInput
from mamba2_apps.vision.augmentation import erase, shift_and_flip
from mamba2_apps.vision.data import (
    ImageFolder,
    PhotoAugmentation,
    TimmImages,
    held_out,
    open_image,
)
from mamba2_apps.vision.fashion_mnist import LABELS, FashionMNIST
from mamba2_apps.vision.shards import ShardedImages

CLASSES = ("dark", "grey", "light")
PLAIN = PhotoAugmentation(scale=(1.0, 1.0), hflip=0, color_jitter=0, auto_augment=None, erase=0)


def photos(folder, classes=CLASSES, count=10, side=24):
    draw = np.random.default_rng(0)
    for level, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = 40 + 80 * level + draw.integers(-20, 20, (side, side, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def small(folder, **options):
    data = ImageFolder(folder=str(folder), img_size=16, batch_size=6, **options)
    data.setup("fit")
    return data


def test_held_out_parts_are_fixed_disjoint_and_have_every_class(tmp_path):
    data, again = small(photos(tmp_path)), small(tmp_path)
    parts = [data.train_set, data.val_set, data.test_set]
    assert [len(part) for part in parts] == [21, 3, 6]
    sources = [path for part in parts for path in part.sources]
    assert len(set(sources)) == 30
    assert again.train_set.sources == data.train_set.sources
    for part in parts:
        assert set(part.targets) == {0, 1, 2}
    assert data.labels == list(CLASSES)
    assert data.val_set[0]["inputs"].shape == (3, 16, 16)


@pytest.mark.parametrize("rare", [3, 4])
def test_each_part_has_every_class_however_rare(rare):
    targets = [0] * 200 + [1] * rare
    parts = held_out(range(len(targets)), targets, 0.1, 0.2)
    assert sorted(source for sources, _ in parts for source in sources) == [*range(len(targets))]
    for sources, classes in parts:
        assert set(classes) == {0, 1}
        assert classes == [targets[source] for source in sources]
    with pytest.raises(ValueError, match="class number 1 has 1 images, expected at least 2"):
        held_out(range(21), [0] * 20 + [1], 0.1, 0.0)


def test_given_parts_are_taken_and_validation_is_the_test_without_one(tmp_path):
    for part, count in (("train", 5), ("val", 2)):
        photos(tmp_path / part, count=count)
    data = small(tmp_path)
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (15, 6, 6)
    photos(tmp_path / "test", count=3)
    assert len(small(tmp_path).test_set) == 9


def test_validation_is_held_out_of_train_without_a_folder_of_its_own(tmp_path):
    photos(tmp_path / "train", count=10)
    data = small(tmp_path, val_fraction=0.2)
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (24, 6, 6)
    photos(tmp_path / "test", count=3)
    data = small(tmp_path, val_fraction=0.2)
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (24, 6, 9)
    held = {*data.train_set.sources, *data.val_set.sources}
    assert len(held) == 30
    assert not any(str(tmp_path / "test") in path for path in held)
    assert set(data.val_set.targets) == {0, 1, 2}
    photos(tmp_path / "valid", count=2)
    with pytest.raises(
        ValueError, match=r"valid: beside .*train the folders val and test are read"
    ):
        small(tmp_path)


def test_what_a_folder_holds_beside_its_images_is_counted_or_hidden(tmp_path, capsys):
    photos(tmp_path)
    image = Image.open(tmp_path / "dark" / "0.png")
    image.save(tmp_path / "dark" / "10.jfif", "JPEG")
    image.save(tmp_path / "dark" / "11.avif", "AVIF")
    for hidden in (".ipynb_checkpoints", "dark/.thumbnails"):
        (tmp_path / hidden).mkdir()
        image.save(tmp_path / hidden / "0.png")
    image.save(tmp_path / "dark" / "._0.png")
    data = small(tmp_path)
    assert data.labels == list(CLASSES)
    assert sum(map(len, (data.train_set, data.val_set, data.test_set))) == 32
    assert capsys.readouterr().err == ""
    image.save(tmp_path / "loose.png")
    for name in ("dark/a.txt", "grey/1.heic", "grey/2.heic"):
        (tmp_path / name).touch()
    data = small(tmp_path)
    assert sum(map(len, (data.train_set, data.val_set, data.test_set))) == 32
    said = capsys.readouterr().err
    assert said.startswith(
        f"left out: 4 of the files in {tmp_path}, such as {tmp_path}/grey/1.heic; "
    )
    assert said.count("\n") == 1


def test_a_folder_beside_the_given_parts_is_counted_and_links_are_looked_into(tmp_path, capsys):
    photos(tmp_path / "elsewhere", count=3)
    (tmp_path / "elsewhere" / "dark" / "x.heic").touch()
    given = tmp_path / "given"
    photos(given / "val", count=2)
    photos(given / "extra", classes=["dark"], count=5)
    (given / "train").symlink_to(tmp_path / "elsewhere")
    assert len(small(given).train_set) == 9
    assert f"left out: 6 of the files in {given}, such as {given}/extra/" in capsys.readouterr().err


def test_mistakes_in_a_folder_are_named(tmp_path):
    with pytest.raises(ValueError, match="none does not exist; expected a folder with one folder"):
        small(tmp_path / "none")
    with pytest.raises(ValueError, match=r"the classes \['only'\]; expected two or more folders"):
        small(photos(tmp_path / "one", classes=["only"]))
    photos(tmp_path / "few", classes=CLASSES[:2])
    photos(tmp_path / "few", classes=["light"], count=2)
    with pytest.raises(ValueError, match="light holds 2 images; training, validation and test"):
        small(tmp_path / "few")
    photos(tmp_path / "given" / "train", count=2)
    photos(tmp_path / "given" / "val", classes=[*CLASSES, "neon"], count=2)
    with pytest.raises(ValueError, match=r"neon: a class that .*train does not have; .* never see"):
        small(tmp_path / "given")
    (tmp_path / "one" / "hollow").mkdir()
    with pytest.raises(ValueError, match="hollow holds no image files"):
        small(tmp_path / "one")
    with pytest.raises(ValueError, match="batch_size is 3, expected an even number with mixup"):
        ImageFolder(folder="x", batch_size=3, mixup=0.2)


def broken_photos(folder):
    photos(folder)
    whole = (folder / "dark" / "0.png").read_bytes()
    (folder / "dark" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "grey" / "2.png").write_bytes(b"")
    Image.new("RGB", (5, 3)).save(folder / "light" / "3.png")
    return folder


def test_a_corrupt_photo_ends_training_with_its_name(tmp_path):
    data = small(broken_photos(tmp_path))
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    with pytest.raises(UnreadableInput) as error:
        [list(loader) for loader in loaders]
    message = str(error.value)
    assert str(tmp_path) in message
    assert "\n" not in message
    assert message.endswith(("replace or remove it", "or lower data.min_side"))
    try:
        raise error.value
    except UnreadableInput:
        from_worker = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(UnreadableInput) as error:
        from_worker.reraise()
    assert str(error.value) == message


def test_corrupt_photos_are_left_out_where_asked_and_named(tmp_path, capsys):
    data = small(broken_photos(tmp_path), unreadable="skip")
    said = capsys.readouterr().err
    for name in ("dark/1.png", "grey/2.png", "light/3.png"):
        assert f"left out: {tmp_path / name}: " in said
    assert "5 x 3 pixels, expected sides of at least 16" in said
    assert sum(map(len, (data.train_set, data.val_set, data.test_set))) == 27
    assert sum(len(batch["targets"]) for batch in data.val_dataloader()) == len(data.val_set)


def test_files_are_read_once_and_a_class_that_vanishes_is_named(tmp_path, capsys):
    photos(tmp_path / "train", count=3)
    photos(tmp_path / "val", count=2)
    (tmp_path / "val" / "dark" / "0.png").write_bytes(b"")
    data = small(tmp_path, unreadable="skip")
    data.setup("test")
    assert data.test_set is data.val_set
    assert capsys.readouterr().err.count("left out") == 1
    for path in (tmp_path / "train" / "dark").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"1.png is of class dark, of which training has no image"):
        small(tmp_path, unreadable="skip")
    for path in tmp_path.glob("val/*/*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no image of a part could be read"):
        small(tmp_path, unreadable="skip")


def test_sixteen_bits_of_colour_are_named(tmp_path):
    def chunk(kind, data):
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0)  # RGB of 16 bits
    rows = zlib.compress((b"\0" + bytes(20 * 3 * 2)) * 20)
    path = tmp_path / "deep.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    with pytest.raises(UnreadableInput, match=r"deep.png: 16 bits per channel, expected .* 8 bits"):
        open_image(path)


def test_a_phone_photo_with_a_second_picture_behind_it_is_its_first(tmp_path):
    first, second = (Image.new("RGB", (20, 20), color) for color in ("red", "blue"))
    path = tmp_path / "phone.jpg"
    first.save(path, "MPO", save_all=True, append_images=[second])
    red, _, blue = open_image(path).getpixel((10, 10))
    assert red > 200 > 50 > blue


def test_images_in_memory_are_checked_as_files_are(tmp_path):
    deep = Image.fromarray(np.full((20, 20), 40000, np.uint16))
    for image in (deep, Image.new("CMYK", (20, 20))):
        with pytest.raises(UnreadableInput, match="in memory: pixels of mode"):
            open_image(image)
    photos(tmp_path, CLASSES[:1], count=1)
    whole = (tmp_path / "dark" / "0.png").read_bytes()
    with pytest.raises(UnreadableInput, match="in memory: not a readable image"):
        open_image(Image.open(BytesIO(whole[: len(whole) // 2])))
    with pytest.raises(UnreadableInput, match=r"shape \(3, 20, 20\), expected \(H, W\)"):
        open_image(np.zeros((3, 20, 20), np.uint8))


def test_whatever_pillow_raises_over_damaged_bytes_names_the_file(tmp_path, monkeypatch):
    def broken(self):
        raise TypeError("Missing dimensions")  # as of a TIFF whose tags are damaged

    path = photos(tmp_path, CLASSES[:1], count=1) / "dark" / "0.png"
    monkeypatch.setattr(ImageFile.ImageFile, "load", broken)
    with pytest.raises(UnreadableInput, match=r"0.png: not a readable image \(Missing dimensions"):
        open_image(path)


def test_a_photo_reads_as_timm_reads_it(tmp_path):
    data = small(photos(tmp_path, side=40), augmentation=PLAIN)
    path = data.val_set.sources[0]
    from timm.data import create_transform

    expected = create_transform(16, interpolation="bicubic", crop_pct=0.9)(Image.open(path))
    torch.testing.assert_close(data.preprocessing(path), expected)
    torch.testing.assert_close(data.val_set[0]["inputs"], expected)
    pixels = data.preprocessing.pixels(expected)
    assert pixels.shape == (16, 16, 3)
    assert 0 < pixels.min() < pixels.max() < 1


def test_archives_are_read_by_timm(tmp_path):
    photos(tmp_path / "train")
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(tmp_path / "train", arcname=".")
    from_tar = TimmImages(reader="", root=str(tmp_path), train_split="train.tar", img_size=16)
    from_tar.setup("fit")
    assert from_tar.labels == list(CLASSES)
    assert (len(from_tar.train_set), len(from_tar.val_set)) == (27, 3)
    folder = TimmImages(reader="", root=str(tmp_path), img_size=16)
    folder.setup("fit")
    assert list(folder.class_of_samples()) == list(from_tar.class_of_samples())
    for one, other in zip(from_tar.val_set, folder.val_set, strict=True):
        assert torch.equal(one["inputs"], other["inputs"])
    photos(tmp_path / "other", classes=["dark", "neon", "light"])
    with pytest.raises(ValueError, match="part other has other classes than the training part"):
        TimmImages(reader="", root=str(tmp_path), val_split="other", img_size=16).setup("fit")
    with pytest.raises(ValueError, match=r"absent.train does not exist"):
        TimmImages(reader="", root=str(tmp_path / "absent")).setup("fit")


class Table:
    """What timm's reader of a data set of Hugging Face has; that package is none of ours."""

    def __init__(self, split, input_key="image", target_key="label", class_map=None):
        self.rows = {"img": range(20 if split == "train" else 6), "kind": ["b", "a"] * 10}
        self.dataset = SimpleNamespace(column_names=list(self.rows))
        self.image_key, self.label_key = input_key, target_key
        self.class_to_idx = class_map or {}

    def __getitem__(self, index):
        image = BytesIO()
        Image.new("RGB", (24, 24), (10 * self.rows["img"][index],) * 3).save(image, "PNG")
        return image, None

    def iter_targets(self):
        of_name = self.class_to_idx
        labels = self.rows["kind"][: len(self.rows["img"])]
        return (of_name[label] if of_name else label for label in labels)

    def filename(self, index, absolute):
        return None


def table(**options):
    data = TimmImages(reader="hfds/some", root="", img_size=16, reader_options=options)
    data.setup("fit")
    return data


def test_options_reach_timms_reader(monkeypatch, tmp_path):
    def create(name, root, split, **options):
        return Table(split, **options)

    monkeypatch.setattr("mamba2_apps.vision.data.create_reader", create)
    columns = {"input_key": "img", "target_key": "kind"}
    data = table(**columns, class_map={"a": 0, "b": 1})
    assert data.labels == ["a", "b"]
    assert (len(data.train_set), len(data.val_set)) == (18, 2)
    index = data.val_set.sources[0]
    assert data.val_set[0]["targets"] == (index + 1) % 2
    with pytest.raises(ValueError, match=r"no column 'image' among img, kind; .* \{\"input_key\":"):
        table(target_key="kind")
    with pytest.raises(ValueError, match=r"'b' is the label of an image, .* \{\"class_map\":"):
        table(**columns)
    with pytest.raises(ValueError, match=r"some cannot .*_options \{.*\} \(KeyError: 'b'\); exp"):
        table(**columns, class_map={"a": 0})
    with pytest.raises(ValueError, match=r"unexpected keyword argument 'colour'\); expected what"):
        table(colour=3)


def test_a_class_map_joins_and_leaves_out_classes_of_a_folder(tmp_path):
    photos(tmp_path / "train", classes=[*CLASSES, "neon"])
    classes = {"class_map": {"light": 0, "dark": 1, "grey": 1}}
    data = TimmImages(reader="", root=str(tmp_path), img_size=16, reader_options=classes)
    data.setup("fit")
    assert data.labels == ["light", "dark or grey"]
    assert np.bincount(data.train_set.targets).tolist() == [9, 18]


def shard(path, samples):
    """A webdataset shard of (key, class) pairs, their images grey levels."""
    with tarfile.open(path, "w") as archive:
        for key, target in samples:
            image = BytesIO()
            Image.new("RGB", (24, 24), (60 * target,) * 3).save(image, "PNG")
            for suffix, content in (("png", image.getvalue()), ("cls", str(target).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, BytesIO(content))


def test_shards_are_read_in_any_order(tmp_path):
    for number in range(3):
        shard(tmp_path / f"train-{number}.tar", [(f"{number}{i}", i % 3) for i in range(10)])
    (tmp_path / "classes.txt").write_text("dark\ngrey\nlight\n")
    data = ShardedImages(folder=str(tmp_path), img_size=16, mean=[0.0] * 3, std=[1.0] * 3)
    data.setup("fit")
    assert data.labels == list(CLASSES)
    assert (len(data.train_set), len(data.val_set)) == (27, 3)
    assert data.test_set.sources == data.val_set.sources
    for sample in data.val_set:
        level = torch.full((3, 16, 16), 60 * sample["targets"] / 255)
        torch.testing.assert_close(sample["inputs"], level, atol=1e-4, rtol=0)
    shard(tmp_path / "val-0.tar", [("x", 3)])
    with pytest.raises(ValueError, match=r"val-0.tar: x.png is of class 3, which no shard"):
        ShardedImages(folder=str(tmp_path), val_shards="val-*.tar").setup("fit")
    with pytest.raises(ValueError, match=r"holds no test-\*\.tar"):
        ShardedImages(folder=str(tmp_path), test_shards="test-*.tar").setup("fit")
    (tmp_path / "classes.txt").write_text("dark\nlight\nlight\n")
    with pytest.raises(ValueError, match=r"classes\.txt: 'light' comes more than once"):
        ShardedImages(folder=str(tmp_path)).setup("fit")


def test_broken_shards_are_named(tmp_path):
    path = tmp_path / "train-0.tar"
    shard(path, [(str(i), i % 2) for i in range(40)])
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    with pytest.raises(ValueError, match=r"train-0.tar is damaged|train-0.tar: .* has no"):
        ShardedImages(folder=str(tmp_path)).setup("fit")
    path.write_bytes(whole.replace(b"IHDR", b"XXXX", 1))
    data = ShardedImages(folder=str(tmp_path))
    data.setup("fit")
    loaders = (data.train_dataloader(), data.val_dataloader())
    with pytest.raises(UnreadableInput, match=r"train-0.tar: 0.png: not a readable image"):
        [list(loader) for loader in loaders]


def test_a_class_that_only_validation_shards_have_is_named(tmp_path):
    shard(tmp_path / "train-0.tar", [(str(i), 2 * (i % 2)) for i in range(8)])
    shard(tmp_path / "val-0.tar", [(str(i), i % 3) for i in range(6)])
    with pytest.raises(ValueError, match=r"val-0.tar: 1.png is of class 1, which no shard of"):
        ShardedImages(folder=str(tmp_path), val_shards="val-*.tar").setup("fit")


def test_balanced_sampling_draws_rare_classes_as_often(tmp_path):
    photos(tmp_path, classes=["dark"], count=40)
    data = small(photos(tmp_path, classes=["light"], count=10), balanced=True)
    drawn = [data.train_set.targets[i] for e in range(5) for _, i in _epoch(data, e)]
    assert 0.35 < np.mean(drawn) < 0.65


def _epoch(data, epoch):
    sampler = data.epoch_sampler()
    sampler.set_epoch(epoch)
    return list(sampler)


def test_mixed_targets_are_probabilities_of_what_was_mixed(tmp_path):
    data = small(photos(tmp_path), mixup=0.4, cutmix=1.0)
    images, targets = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    mixed = data.mix({"inputs": images, "targets": targets})
    torch.testing.assert_close(mixed["targets"].sum(1), torch.ones(6))
    for row, (first, last) in zip(
        mixed["targets"], zip(targets, targets.flip(0), strict=True), strict=True
    ):
        assert row[first] + row[last] >= 1 - 1e-6
    plain = small(tmp_path).mix({"inputs": images, "targets": targets})
    assert torch.equal(plain["inputs"], images)


def test_shifts_move_whole_images_and_keep_their_ground():
    torch.manual_seed(0)
    images = torch.zeros(64, 2, 8, 9)
    images[:, :, 3, 4] = torch.tensor([1.0, 2.0])
    moved = shift_and_flip(images, 2, flip=True, ground=0.0)
    assert torch.equal(moved.sum((2, 3)), images.sum((2, 3)))
    rows, columns = moved[:, 0].flatten(1).argmax(1) // 9, moved[:, 0].flatten(1).argmax(1) % 9
    assert set(rows.tolist()) == {1, 2, 3, 4, 5}
    assert set(columns.tolist()) == {2, 3, 4, 5, 6}
    assert torch.equal(shift_and_flip(images, 0, flip=False, ground=0.0), images)
    assert (shift_and_flip(images, 2, flip=False, ground=-1.0) == -1).any()


def test_erasing_covers_the_share_that_it_says():
    torch.manual_seed(0)
    images = torch.full((400, 1, 28, 28), 9.0)
    erased = erase(images, 0.5) != images
    shares = erased.float().mean((1, 2, 3))
    assert 0.4 < (shares > 0).float().mean() < 0.6
    assert shares.max() < 0.36
    assert 0.12 < shares[shares > 0].mean() < 0.23
    one = erased[int(shares.argmax()), 0]  # a rectangle: every row that has any has the same
    touched = one[one.any(1)]
    assert torch.equal(touched, touched[:1].expand_as(touched))
    assert torch.equal(erase(images, 0.0), images)


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """Fashion-MNIST's four files with a few made images."""
    folder = tmp_path_factory.mktemp("clothes")
    draw = np.random.default_rng(0)
    for part, count in (("train", 200), ("t10k", 40)):
        targets = (np.arange(count) % 10).astype(np.uint8)
        pixels = (targets[:, None, None] * 20 + draw.integers(0, 20, (count, 28, 28))).astype("u1")
        (folder / f"{part}-images-idx3-ubyte").write_bytes(bytes(16) + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(bytes(8) + targets.tobytes())
    return folder


def test_fashion_mnist_reads_its_files_and_batches_repeat(clothes, tmp_path):
    data = FashionMNIST(folder=str(clothes), batch_size=32, val_images=50)
    data.setup("fit")
    assert data.labels == LABELS
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (150, 50, 40)
    raw = (clothes / "t10k-images-idx3-ubyte").read_bytes()[16 : 16 + 784]
    expected = data.preprocessing(np.frombuffer(raw, np.uint8).reshape(28, 28))
    torch.testing.assert_close(data.test_set[0]["inputs"], expected)
    first, again = (list(data.train_dataloader()) for _ in range(2))
    assert len(first) == 4
    assert first[0]["inputs"].shape == (32, 1, 28, 28)
    assert all(torch.equal(a["inputs"], b["inputs"]) for a, b in zip(first, again, strict=True))
    resumed = FashionMNIST(folder=str(clothes), batch_size=32, val_images=50)
    resumed.setup("fit")
    resumed.load_state_dict({"epoch": 0, "samples_done": 64})
    rest = list(resumed.train_dataloader())
    assert all(torch.equal(a["inputs"], b["inputs"]) for a, b in zip(first[2:], rest, strict=True))
    with pytest.raises(ValueError, match=r"has no train-images-idx3-ubyte.gz; give --data.folder"):
        FashionMNIST(folder=str(tmp_path)).setup("fit")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = photos(tmp_path_factory.mktemp("photos"))
    run = tmp_path_factory.mktemp("runs") / "first"
    return folder, run, train("imagefolder", folder, run, 16)


def train(recipe, folder, run, size, *words):
    options = {"img_size": size, "patch_size": 4, "depth": 2, "d_state": 8, "headdim": 16}
    words = [*words, f"--data.folder={folder}", f"--data.img_size={size}", "--data.batch_size=6"]
    words += [f"--model.{name}={value}" for name, value in options.items()]
    words += ["--data.num_workers=0", "--trainer.precision=fp32", "--trainer.max_epochs=2"]
    words += ["--optimizer.warmup_epochs=0.5", "--trainer.ema_decay=null"]
    return runs.train(catalog.find(f"vision/{recipe}"), run, words)


def test_a_folder_of_photos_becomes_a_run_that_answers(trained):
    folder, run, metrics = trained
    for name in ("confusion.png", "curves.png", "mistakes.png", "saliency.png", "classes.csv"):
        if name != "mistakes.png" or metrics["test"]["accuracy"] < 1:
            assert (run / name).stat().st_size > 0
    assert {"accuracy", "macro_f1", "calibration_error"} <= metrics["test"].keys()
    answers = mamba2_apps.load(run, "cpu").predict([str(folder / "dark")])
    assert len(answers) == 10
    assert set(answers[0]["probabilities"]) == set(CLASSES)


def test_a_run_keeps_what_was_left_out_of_each_part(trained, tmp_path):
    _, run, _ = trained
    images = {"train": 21, "val": 3, "test": 6}
    assert json.loads((run / "data.json").read_text()) == {"images": images, "left_out": {}}
    for part, count in (("train", 4), ("test", 3)):
        photos(tmp_path / part, count=count)
    (tmp_path / "test" / "dark" / "1.png").write_bytes(b"")
    train("imagefolder", tmp_path, tmp_path / "run", 16, "--data.unreadable=skip")
    told = json.loads((tmp_path / "run" / "data.json").read_text())
    assert told["images"] == {"train": 9, "val": 3, "test": 8}
    (message,) = told["left_out"].pop("test")
    assert message.startswith(
        f"{tmp_path}/test/dark/1.png: not a readable image (the file is empty"
    )
    assert told["left_out"] == {"train": [], "val": []}


def test_a_mistake_found_before_training_leaves_no_run_behind(tmp_path):
    folder = photos(tmp_path / "photos")
    with pytest.raises(ValueError, match="photo does not exist"):
        train("imagefolder", tmp_path / "photo", tmp_path / "run", 16)
    words = [f"--data.folder={folder}", "--data.img_size=32"]
    with pytest.raises(ValueError, match=r"data.img_size is 32, the model's \(224, 224\)"):
        runs.train(catalog.find("vision/imagefolder"), tmp_path / "run", words)
    assert not (tmp_path / "run").exists()


def test_null_on_the_command_line_is_no_policy():
    path = catalog.find("vision/imagefolder")
    for words in (["--data.augmentation.auto_augment=null"], []):
        recipe, text = recipes.read(path, words)
        assert (recipe.data.augmentation.auto_augment is None) == bool(words)
    assert "auto_augment: rand" in text


def test_predict_draws_what_an_answer_hangs_on(trained, tmp_path, capsys):
    folder, run, _ = trained
    photo, output = str(folder / "dark" / "0.png"), tmp_path / "map.png"
    words = ["predict", str(run), "--device=cpu", f"--output={output}"]
    pictures = []
    for chosen in ([], *([f"--label={name}"] for name in CLASSES)):
        assert cli.main([*words, photo, *chosen]) == 0
        pictures.append(np.asarray(Image.open(output)))
    answer = mamba2_apps.load(run, "cpu").predict([photo])[0]["label"]
    same = [np.array_equal(pictures[0], other) for other in pictures[1:]]
    assert same == [name == answer for name in CLASSES]
    capsys.readouterr()
    assert cli.main([*words, photo, "--label=green"]) == 2
    assert "--label is 'green', expected one of dark, grey, light" in capsys.readouterr().err
    assert cli.main([*words, str(folder)]) == 2
    assert "a picture shows 12 at most" in capsys.readouterr().err


def test_predict_keeps_the_likeliest_labels(trained, capsys):
    folder, run, _ = trained
    words = ["predict", str(run), str(folder / "dark" / "0.png"), "--device=cpu", "--top-k=2"]
    assert cli.main([*words, "--format=jsonl"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["top"][0]["label"] == answer["label"]
    assert len(answer["top"]) == 2
    assert "probabilities" not in answer
    assert cli.main(words) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.endswith("top.1.label,top.1.probability,top.2.label,top.2.probability")
    assert row.split(",")[3] == answer["label"]
    assert cli.main([*words, "--top-k=0"]) == 2
    assert "--top-k is 0, expected at least 1" in capsys.readouterr().err


def test_a_fashion_mnist_run_trains_and_shows_its_mistakes(clothes, tmp_path):
    words = [f"--data.folder={clothes}", "--data.batch_size=32", "--data.val_images=50"]
    words += ["--model.adapter.widths=[8,16]", "--model.adapter.blocks=[1,1]"]
    words += ["--model.backbone.n_layer=1", "--model.backbone.d_model=32"]
    words += ["--model.backbone.headdim=16", "--trainer.max_epochs=1"]
    words += ["--optimizer.warmup_epochs=0.5", "--trainer.precision=fp32"]
    words += ["--task.class_weights=balanced"]  # beside buffers of the model's in the average
    metrics = runs.train(catalog.find("vision/fashion-mnist"), tmp_path / "run", words)
    assert metrics["parameters"] < 7_000_000
    for name in ("mistakes.png", "saliency.png"):
        width, height = Image.open(tmp_path / "run" / name).size
        assert min(width, height) > 100


def test_a_linear_probe_keeps_the_features_and_another_size_resamples_positions(trained, tmp_path):
    folder, run, _ = trained
    probe = tmp_path / "probe"
    train("linear-probe", folder, probe, 16, f"--adaptation.start={run}")
    before, after = (mamba2_apps.load(path, "cpu").task.model for path in (run, probe))
    for name, tensor in before.state_dict().items():
        same = torch.equal(tensor, after.state_dict()[name])
        assert same != name.startswith("head.")
    larger = tmp_path / "larger"
    words = [f"--adaptation.start={run}", "--optimizer.lr=1e-9"]
    train("finetune-resolution", folder, larger, 32, *words)
    model = mamba2_apps.load(larger, "cpu").task.model
    before.set_input_size(32)
    torch.testing.assert_close(model.pos_embed, before.pos_embed, atol=1e-5, rtol=0)
    metrics = json.loads((larger / "metrics.json").read_text())
    assert metrics["epochs"] == 2
