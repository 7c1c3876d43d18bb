"""Recipes: every shipped one parses, and a mistake in one gets one helpful sentence."""

import pytest
import torch
import yaml

from mamba2_apps import catalog, recipes

SHIPPED = catalog.shipped()


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_shipped_recipe_parses_and_its_model_can_be_built(name):
    recipe, resolved = recipes.read(SHIPPED[name])
    assert "\n" not in recipe.description.strip()
    outputs = len(getattr(recipe.data, "labels", ["a", "b", "c"]))
    with torch.device("meta"):
        model = recipe.model(outputs)
    assert sum(p.numel() for p in model.parameters()) > 0
    # The resolved text is what a RUN keeps: it must read back as the same recipe.
    assert yaml.safe_load(resolved)["description"] == recipe.description


def test_resolved_text_reads_back_to_the_same(tmp_path):
    _, resolved = recipes.read(SHIPPED["vision/digits"], ["--seed=7", "--optimizer.lr=0.5"])
    (tmp_path / "config.yaml").write_text(resolved)
    recipe, again = recipes.read(tmp_path / "config.yaml")
    assert again == resolved
    assert (recipe.seed, recipe.data.seed, recipe.optimizer.lr) == (7, 7, 0.5)


def test_overrides_reach_every_part():
    recipe, _ = recipes.read(
        SHIPPED["vision/digits"],
        ["--data.batch_size", "7", "--model.backbone.n_layer=1", "--model.adapter.patch_size=4",
         "--task.label_smoothing=0.3", "--trainer.precision=bf16"],
    )  # fmt: skip
    model = recipe.model(10)
    assert recipe.data.batch_size == 7
    assert len(model.backbone.layers) == 1
    assert model.adapter.patch_size == 4
    assert recipe.trainer.precision == "bf16"
    assert recipe.task(model, list("ab"), recipe.optimizer).label_smoothing == 0.3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--optimizer.lrr=1"], r"unknown key --optimizer\.lrr; nearest: optimizer\.lr"),
        (["--data.batchsize", "3"], r"unknown key --data\.batchsize; nearest: data\.batch_size"),
        (["--model.backbone.nlayer=1"], r"nearest: model\.backbone\.n_layer"),
        (["--lr=1"], r"unknown key --lr; nearest: optimizer\.lr"),
        (["--optimizer.lr=fast"], r"optimizer\.lr: .*fast"),
        (["--optimizer.lr=-1"], r"optimizer\.lr is -1"),
        (["--trainer.precision=fp8"], r"trainer\.precision: .*fp8"),
        (["--model.backbone.headdim=7"], r"headdim=7"),
        (["--task.label_smoothing=2"], r"label_smoothing is 2"),
        (["--data.batch_size=0"], r"data\.batch_size is 0"),
        (
            [
                "--trainer.parallel=ddp",
                "--adaptation.freeze=backbone",
                "--adaptation.unfreeze_epoch=2",
            ],
            r"unfreeze_epoch is 2 beside trainer\.parallel ddp",
        ),
    ],
)
def test_a_wrong_override_is_named_in_one_sentence(words, sentence):

    def build():
        recipe, _ = recipes.read(SHIPPED["vision/digits"], words)
        recipe.task(recipe.model(10), list("0123456789"), recipe.optimizer)

    with pytest.raises((ValueError, TypeError), match=sentence) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("max_epochs", "max_epoch", r"unknown key .*max_epoch.*; nearest: .*max_epochs"),
        (
            "  weight_decay",
            "  weightdecay",
            r"unknown key .*weightdecay.*; nearest: .*weight_decay",
        ),
        ("d_model", "dmodel", r"unknown key .*dmodel.*; nearest: .*d_model"),
        ("batch_size", "batchsize", r"unknown key .*batchsize.*; nearest: .*batch_size"),
        ("optimizer:", "optimiser:", r"unknown key .*optimiser.*; nearest: .*optimizer"),
        ("digits.Digits", "digits.Digit", r"no attribute 'Digit'"),
        ("trainer:", "trainer: [", r"line \d+"),
    ],
)
def test_a_wrong_yaml_file_is_named_with_the_nearest_key(tmp_path, old, new, sentence):
    path = tmp_path / "mine.yaml"
    text = SHIPPED["vision/digits"].read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=sentence) as error:
        recipes.read(path)
    assert "mine.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_recipes_get_the_nearest_names(tmp_path):
    with pytest.raises(ValueError, match=r"unknown recipe 'vision/digts'; nearest: vision/digits"):
        catalog.find("vision/digts")
    with pytest.raises(ValueError, match=r"absent\.yaml does not exist"):
        catalog.find(str(tmp_path / "absent.yaml"))
    assert catalog.find("vision/digits") == SHIPPED["vision/digits"]
