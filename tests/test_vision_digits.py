"""Images: decoding, patches, the digits' split and augmentation."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from mamba2_apps.data import EpochSampler, UnreadableInput, seed_generators
from mamba2_apps.vision.adapter import ConvStem, PatchEmbedding
from mamba2_apps.vision.data import ImagePreprocessing
from mamba2_apps.vision.digits import Digits
from mamba2_apps.vision.fashion_mnist import FashionMNIST

GREY8 = ImagePreprocessing(height=8, width=8, channels=1, mean=[0.5], std=[0.25])


@pytest.fixture(scope="module")
def digits():
    data = Digits(batch_size=100)
    data.setup("fit")
    return data


def test_the_split_is_fixed_stratified_and_disjoint(digits):
    again = Digits()
    again.seed = 5
    again.setup("fit")
    parts = [digits.train_set, digits.val_set, digits.test_set]
    for part, other in zip(parts, [again.train_set, again.val_set, again.test_set], strict=True):
        assert torch.equal(part.images, other.images)
    assert len(digits.test_set) == 450
    assert sum(map(len, parts)) == 1797
    for part in parts:
        counts = torch.bincount(part.targets)
        assert counts.min() >= 0.9 * len(part) / 10
        assert counts.max() <= 1.1 * len(part) / 10 + 1
    rows = sorted(np.concatenate([p.images.flatten(1).numpy() for p in parts]).round(4).tolist())
    pixels = (load_digits().data.astype(np.float32) / 16 - 0.305) / 0.376
    assert rows == sorted(pixels.round(4).tolist())


def test_order_and_augmentation_depend_on_seed_epoch_and_index_alone(digits):
    sampler = EpochSampler(1000, seed=1)
    order = list(sampler)
    assert sorted(index for _, index in order) == list(range(1000))
    assert list(sampler) == order
    sampler.set_epoch(1)
    assert [index for _, index in sampler] != [index for _, index in order]
    assert list(EpochSampler(1000, seed=1, epoch=0, skip=300)) == order[300:]
    shares = [list(EpochSampler(1000, seed=1, rank=r, world_size=3)) for r in range(3)]
    assert [len(share) for share in shares] == [333] * 3
    assert len({index for share in shares for _, index in share}) == 999

    dataset = digits.train_dataloader().dataset
    first = dataset[3, 17]["inputs"]
    torch.rand(5)
    assert torch.equal(dataset[3, 17]["inputs"], first)
    assert not torch.equal(dataset[4, 17]["inputs"], first)
    assert not torch.equal(dataset[3, 17]["inputs"], digits.train_set[17]["inputs"])


def test_a_resumed_loader_goes_on_where_it_was(digits):
    def batches(loader):
        return [batch["inputs"] for batch in loader]

    whole = batches(digits.train_dataloader())
    resumed = Digits(batch_size=100)
    resumed.setup("fit")
    resumed.load_state_dict({"epoch": 0, "samples_done": 400})
    rest = batches(resumed.train_dataloader())
    assert len(rest) == len(whole) - 4
    assert all(map(torch.equal, rest, whole[4:]))


def test_augmentation_of_nothing_changes_nothing():
    data = Digits(max_rotation=0, max_shift=0, max_scale=0)
    data.setup("fit")
    sample = data.train_set[0]
    torch.testing.assert_close(data.augment(sample)["inputs"], sample["inputs"])


def test_augmentation_keeps_ink_within_bounds(digits):
    seed_generators(0)
    ground = digits.preprocessing.normalize(torch.zeros(1, 1, 1)).item()
    ink = [(digits.augment(digits.train_set[i])["inputs"] - ground).sum() for i in range(50)]
    before = [(digits.train_set[i]["inputs"] - ground).sum() for i in range(50)]
    assert min(ink) > 0
    assert 0.8 < torch.stack(ink).mean() / torch.stack(before).mean() < 1.1


def test_a_saved_digit_reads_back_as_in_the_data_set(tmp_path, digits):
    pixels, _ = load_digits(return_X_y=True)
    image = (pixels[3].reshape(8, 8) * 255 / 16).round().astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "3.png")
    expected = digits.preprocessing.normalize(
        torch.tensor(pixels[3] / 16, dtype=torch.float32).reshape(8, 8, 1)
    )
    for item in (str(tmp_path / "3.png"), image, Image.fromarray(image)):
        torch.testing.assert_close(digits.preprocessing(item), expected, atol=0.01, rtol=0)
    large = Image.fromarray(image).resize((80, 80), Image.Resampling.NEAREST)
    torch.testing.assert_close(digits.preprocessing(large), expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_modes_of_eight_bits_are_read(tmp_path, mode):
    Image.new("L", (9, 9), 255).convert(mode).save(tmp_path / "white.png")
    tensor = GREY8(str(tmp_path / "white.png"))
    assert tensor.shape == (1, 8, 8)
    torch.testing.assert_close(tensor, torch.full((1, 8, 8), 2.0), atol=0.02, rtol=0)


def test_unreadable_images_are_named_with_the_cause(tmp_path):
    def error_for(name):
        with pytest.raises(UnreadableInput) as error:
            GREY8(str(tmp_path / name))
        assert name in str(error.value)
        return str(error.value)

    (tmp_path / "empty.png").touch()
    assert "empty" in error_for("empty.png")
    (tmp_path / "text.png").write_text("no image")
    assert "not a readable image" in error_for("text.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        tmp_path / "whole.jpg"
    )
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    assert "truncated" in error_for("cut.jpg")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    assert "8 bits" in error_for("deep.png")
    Image.new("CMYK", (8, 8)).save(tmp_path / "print.jpg")
    assert "CMYK, expected grey or RGB of 8 bits; convert it" in error_for("print.jpg")
    frames = [Image.new("L", (8, 8), value) for value in (0, 99)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert "2 frames" in error_for("moving.gif")
    with pytest.raises(UnreadableInput, match="float64"):
        GREY8(np.zeros((8, 8)))


def test_an_image_too_small_to_show_anything_is_refused_and_a_small_one_enlarged(tmp_path):
    clothes = FashionMNIST(folder="").preprocessing
    for preprocessing in (Digits().preprocessing, clothes):
        for size in ((1, 1), (30, 3)):
            Image.new("L", size).save(tmp_path / "dot.png")
            message = (
                rf"dot.png: {size[0]} x {size[1]} pixels, expected sides of at least 4; .* lar"
            )
            with pytest.raises(UnreadableInput, match=message):
                preprocessing(str(tmp_path / "dot.png"))
        with pytest.raises(UnreadableInput, match=r"^an image in memory: 1 x 1 pixels"):
            preprocessing(np.zeros((1, 1), np.uint8))
        assert preprocessing(np.zeros((4, 5), np.uint8)).shape == (1, *preprocessing.size)


def test_folders_stand_for_their_images(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "a.JPG", "deep/c.png", "notes.txt"):
        (tmp_path / name).touch()
    found = GREY8.find(str(tmp_path))
    assert found == [str(tmp_path / name) for name in ("a.JPG", "b.png", "deep/c.png")]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none holds no image files"):
        GREY8.find(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="absent does not exist"):
        GREY8.find(str(tmp_path / "absent"))


def test_patches_are_row_major_and_positions_are_added():
    adapter = PatchEmbedding(5, image_size=(4, 6), patch_size=2, in_chans=1)
    images = torch.randn(3, 1, 4, 6)
    embeddings, mask = adapter(images)
    assert embeddings.shape == (3, 6, 5)
    assert mask is None
    patch = images[:, :, 2:4, 4:6].flatten(1)  # second row, third column
    expected = patch @ adapter.proj.weight.flatten(1).T + adapter.proj.bias
    torch.testing.assert_close(embeddings[:, 5], expected + adapter.pos_embed[:, 5])


def test_patches_overlap_with_a_stride_and_other_sizes_resample_positions():
    adapter = PatchEmbedding(4, image_size=8, patch_size=2, stride=1, in_chans=3)
    assert adapter(torch.zeros(1, 3, 8, 8))[0].shape == (1, 49, 4)
    assert adapter(torch.zeros(1, 3, 5, 9))[0].shape == (1, 4 * 8, 4)
    with torch.no_grad():
        adapter.pos_embed.fill_(0.25)
    other = adapter(torch.zeros(1, 3, 12, 7))[0] - adapter.proj.bias
    torch.testing.assert_close(other, torch.full_like(other, 0.25))
    with pytest.raises(ValueError, match=r"1 x 8 pixels is smaller than a patch, 2"):
        adapter(torch.zeros(1, 3, 1, 8))
    with pytest.raises(
        ValueError, match=r"inputs has shape \(1, 1, 8, 8\), expected \(b, 3, H, W\)"
    ):
        adapter(torch.zeros(1, 1, 8, 8))


def test_the_baselines_are_honest_numbers_on_the_same_split(digits):
    scores = digits.baselines()
    assert scores["scikit-learn SVC"]["accuracy"] > 0.98
    assert 0.9 < scores["scikit-learn logistic regression"]["accuracy"] < 0.98


def test_a_stem_halves_the_image_per_stage_and_lays_tokens_in_rows():
    stem = ConvStem(6, image_size=(9, 12), in_chans=1, widths=(4, 8), blocks=(1, 0)).eval()
    assert stem.grid_size == (5, 6)
    images = torch.randn(2, 1, 9, 12)
    tokens, mask = stem(images)
    assert mask is None
    assert tokens.shape == (2, 30, 6)
    assert tokens.is_contiguous()
    torch.testing.assert_close(tokens[:, 8] - stem.pos_embed[:, 8], stem.grid(images)[:, :, 1, 2])
    assert stem(torch.randn(1, 1, 16, 16))[0].shape == (1, 64, 6)
    # The last block, of the first stage, starts as the identity.
    torch.testing.assert_close(
        stem.stages[2](images[:, :1].expand(-1, 4, -1, -1).abs()),
        torch.nn.functional.gelu(images[:, :1].expand(-1, 4, -1, -1).abs()),
    )
    with pytest.raises(ValueError, match="expected one of each for every stage"):
        ConvStem(6, image_size=9, widths=(4, 8), blocks=(1,))


def test_a_class_token_stands_in_the_middle():
    adapter = PatchEmbedding(5, image_size=4, patch_size=2, in_chans=1, class_token=True)
    tokens, _ = adapter(torch.randn(2, 1, 4, 4))
    assert tokens.shape == (2, 5, 5)
    torch.testing.assert_close(tokens[:, 2], adapter.cls_token[:, 0].expand(2, -1))
    assert adapter.no_weight_decay() == {"pos_embed", "cls_token"}
