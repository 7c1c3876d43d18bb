"""The timm models: timm's own tests, sizes, resolutions, class token, checkpoints."""

import importlib.util
import json
import subprocess
import sys
import tarfile
import warnings
from functools import partial
from importlib.metadata import version

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from torch import nn

import mamba2_apps.vision  # noqa: F401  registers the models
from mamba2_apps import catalog, recipes
from mamba2_apps.adaptation import load_start, parameter_groups
from mamba2_apps.backbone import BackboneConfig
from mamba2_apps.checkpoint import save_weights
from mamba2_apps.heads import PooledHead
from mamba2_apps.tasks import SequenceModel
from mamba2_apps.vision.adapter import PatchEmbedding, PatchProjection
from mamba2_apps.vision.models import BiMamba2, ImageClassifier, TimmModel

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

TINY = "bimamba2_tiny_patch16_224"
SMALL_SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}
SMALL_SIZES |= {"d_state": 8, "headdim": 16, "num_classes": 5}


def small(**options):
    torch.manual_seed(0)
    return BiMamba2(**(SMALL_SIZES | options)).eval()


@pytest.fixture(scope="session")
def timm_tests(pytestconfig):
    """timm's tests/test_models.py of the installed version, out of its source distribution.

    It is fetched from the package index once, and kept in pytest's cache.
    """
    name = f"timm-{version('timm')}"
    folder = pytestconfig.cache.mkdir("timm-sdist")
    archive = folder / f"{name}.tar.gz"
    if not archive.exists():
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        fetch += ["--no-binary=timm", f"--dest={folder}", name.replace("-", "==")]
        done = subprocess.run(fetch, capture_output=True, text=True)
        if done.returncode:
            pytest.fail(f"timm's tests come from the package index, and pip says: {done.stderr}")
    with tarfile.open(archive) as file:
        source = file.extractfile(f"{name}/tests/test_models.py").read()
    path = folder / "timm_test_models.py"
    path.write_bytes(source)
    spec = importlib.util.spec_from_file_location("timm_test_models", path)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_model_forward", (1,)),
        ("test_model_backward", (2,)),
        ("test_model_default_cfgs_non_std", (1, "meta")),
        ("test_model_forward_torchscript", (1,)),
        ("test_model_forward_intermediates", (1,)),
        ("test_model_forward_intermediates_features", (1,)),
        ("test_model_forward_fx", (1,)),
        ("test_model_backward_fx", (2,)),
        ("test_model_forward_fx_torchscript", (1,)),
        ("test_prune_intermediate_layers_contract", ()),
    ],
)
def test_timm_tests_pass(timm_tests, name, arguments):
    getattr(timm_tests, name)(TINY, *arguments)


@pytest.mark.parametrize(("size", "millions"), [("tiny", 6.4), ("small", 23.5), ("base", 89.9)])
def test_sizes_are_as_documented(size, millions):
    model = timm.create_model(f"bimamba2_{size}_patch16_224", device="meta")
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == pytest.approx(millions * 1e6, abs=0.05e6)


@pytest.mark.parametrize(
    "options",
    [{}, {"class_token": True, "global_pool": "token"}, {"conv_per_direction": True}],
)
def test_a_batch_gives_what_its_images_give_alone(options):
    model = small(**options)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), alone, rtol=1e-4, atol=1e-5)


def test_both_ends_of_an_image_reach_every_token():
    model = small()
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    for token in (0, 7, 15):
        (gradient,) = torch.autograd.grad(model.forward_features(images)[0, token].sum(), images)
        assert gradient[0, :, :8, :8].abs().sum() > 0
        assert gradient[0, :, -8:, -8:].abs().sum() > 0


@pytest.mark.parametrize(("place", "at"), [("first", 0), ("middle", 8), ("last", 16)])
def test_the_class_token_stands_where_it_was_put_and_comes_out_first(place, at):
    model = small(class_token=True, class_token_at=place, global_pool="token")
    seen = []
    hook = model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.backbone.layers = nn.ModuleList()  # tokens come out as they went in, normalised
    features = model.forward_features(torch.randn(2, 3, 32, 32))
    hook.remove()
    torch.testing.assert_close(seen[0][:, at], model.cls_token[:, 0].expand(2, -1))
    torch.testing.assert_close(features[:, 0], model.backbone.norm_f(seen[0])[:, at])
    rest = torch.cat([seen[0][:, :at], seen[0][:, at + 1 :]], 1)
    torch.testing.assert_close(features[:, 1:], model.backbone.norm_f(rest))
    assert model.num_prefix_tokens == 1


def test_overlapping_patches_are_counted_and_row_major():
    model = small(stride=4, img_size=(32, 48))
    assert model.patch_embed.grid_size == (7, 11)
    images = torch.randn(1, 3, 32, 48)
    grid = model.patch_embed(images)
    expected = nn.functional.conv2d(
        images[:, :, 8:16, 20:28], model.patch_embed.proj.weight, model.patch_embed.proj.bias
    )
    torch.testing.assert_close(grid[:, 2, 5], expected[:, :, 0, 0])
    assert model.feature_info[0]["reduction"] == 4
    (taps,) = model.forward_intermediates(images, indices=[1], intermediates_only=True)
    assert taps.shape == (1, 32, 7, 11)


@pytest.mark.parametrize("size", [(32, 32), (48, 80), (40, 33), (8, 8)])
def test_any_size_is_read_with_dynamic_img_pad(size):
    model = small(dynamic_img_pad=True)
    rows, columns = (-(-side // 8) for side in size)
    features = model.forward_features(torch.randn(1, 3, *size))
    assert features.shape == (1, rows * columns, 32)
    # Positions follow the image: what lies in a corner keeps the corner's position.
    with torch.no_grad():
        model.pos_embed.copy_(torch.linspace(0, 1, 16)[None, :, None].expand(1, 16, 32))
        tokens = model._tokens(torch.zeros(1, rows, columns, 32))[0, :, 0]
    assert tokens[0] == tokens.min()
    assert tokens[-1] == tokens.max()


def test_sizes_that_do_not_fit_say_what_to_do():
    with pytest.raises(AssertionError, match=r"40 pixels high, expected.*dynamic_img_size=True"):
        small()(torch.zeros(1, 3, 40, 32))
    with pytest.raises(AssertionError, match=r"33 pixels wide.*dynamic_img_pad=True"):
        small(dynamic_img_size=True)(torch.zeros(1, 3, 32, 33))
    with pytest.raises(ValueError, match="smaller than a patch"):
        small(img_size=4)
    with pytest.raises(ValueError, match=r"global_pool='token'.*class_token=True"):
        small(global_pool="token")
    with pytest.raises(ValueError, match="global_pool='mean': expected one of 'avg'"):
        small(global_pool="mean")
    with pytest.raises(ValueError, match="class_token_at='end'"):
        small(class_token=True, class_token_at="end")
    with pytest.raises(TypeError, match="d_stat"):
        timm.create_model(TINY, d_stat=3)


def test_set_input_size_resamples_positions_from_any_grid_and_back():
    model = small(class_token=True, global_pool="token", img_size=(32, 64))
    with torch.no_grad():  # positions that a bicubic resampling keeps: linear in the column
        columns = torch.linspace(0, 1, 8).repeat(4)
        model.pos_embed.copy_(columns[None, :, None].expand(1, 32, 32))
    token = model.cls_token.clone()
    model.set_input_size((64, 128))
    rows = model.pos_embed.unflatten(1, (8, 16))
    torch.testing.assert_close(rows[:, 0], rows[:, 7])
    assert (rows[0, 0, 1:, 0] > rows[0, 0, :-1, 0]).all()
    assert torch.equal(model.cls_token, token)
    assert model(torch.randn(1, 3, 64, 128)).shape == (1, 5)
    model.set_input_size(patch_size=16)
    assert model.patch_embed.grid_size == (4, 8)
    assert model(torch.randn(1, 3, 64, 128)).shape == (1, 5)


def test_a_checkpoint_of_another_size_loads(tmp_path):
    trained = timm.create_model(TINY, depth=1, img_size=64, num_classes=7)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    options = {"depth": 1, "img_size": 128}
    model = TimmModel(3, name=TINY, checkpoint=str(tmp_path / "weights.pt"), options=options)
    trained.set_input_size(128)
    torch.testing.assert_close(model.model.pos_embed, trained.pos_embed)
    assert model.model.head.out_features == 3
    images = torch.randn(1, 3, 128, 128)
    torch.testing.assert_close(model.features(images)[0], trained.forward_features(images))


def a_run(folder, model, class_path, **init_args):
    """As much of a RUN as a model starts from."""
    section = {"class_path": class_path, "init_args": init_args}
    (folder / "config.yaml").write_text(json.dumps({"model": section}))
    save_weights(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("size", "stride"), [((16, 64), None), ((12, 36), 4)])
def test_a_run_tells_the_grid_of_its_positions(size, stride, tmp_path):
    options = {"depth": 1, "patch_size": 8, "img_size": size, "stride": stride}
    trained = ImageClassifier(5, **options)
    assert trained.patch_embed.grid_size == (2, 8)
    run = a_run(tmp_path, trained, "mamba2_apps.vision.models.ImageClassifier", **options)
    model = ImageClassifier(3, depth=1, patch_size=8, img_size=32)  # 4 x 4, as many
    assert load_start(model, run) == (["backbone", "adapter"], "")
    expected = resample_abs_pos_embed(trained.pos_embed, [4, 4], [2, 8], num_prefix_tokens=0)
    torch.testing.assert_close(model.pos_embed, expected)


def test_what_timm_knows_of_a_checkpoint_tells_the_grid_of_its_positions(tmp_path):
    options = {"depth": 1, "patch_size": 8, "num_classes": 5}
    trained = timm.create_model(TINY, **options, img_size=(16, 64))
    save_for_hf(trained, tmp_path, model_args={**options, "img_size": (16, 64)})
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=32)
    trained.set_input_size(32)
    torch.testing.assert_close(model.pos_embed, trained.pos_embed)


def test_a_run_tells_the_grid_of_its_adapters_positions(tmp_path):
    def build(size):
        adapter = partial(PatchEmbedding, image_size=size, patch_size=2)
        sizes = BackboneConfig(16, 1, d_state=8, headdim=16)
        return SequenceModel(3, adapter=adapter, backbone=sizes, head=PooledHead)

    wide, square = build((4, 16)), build(8)
    name = "mamba2_apps.vision.adapter.PatchEmbedding"
    settings = {"image_size": [4, 16], "patch_size": 2}
    adapter = {"class_path": name, "init_args": settings}
    run = a_run(tmp_path, wide, "mamba2_apps.tasks.SequenceModel", adapter=adapter)
    assert load_start(square, run) == (["backbone", "adapter"], "")
    expected = wide.adapter._positions(torch.Size([4, 4]))
    torch.testing.assert_close(square.adapter.pos_embed, expected)
    assert torch.equal(square.adapter.proj.weight, wide.adapter.proj.weight)


def test_weights_move_between_a_timm_model_and_a_backbone(tmp_path):
    from mamba2_apps import Backbone

    model = small()
    model.backbone.save_pretrained(tmp_path)
    backbone = Backbone.from_pretrained(tmp_path)
    tokens = torch.randn(1, 9, 32)
    torch.testing.assert_close(backbone(tokens), model.backbone(tokens))


def test_layer_decay_and_weight_decay_know_every_parameter():
    model = timm.create_model(TINY, depth=3)
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, layer_decay=0.5).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert scale["head.weight"] == 1
    blocks = [scale[f"backbone.layers.{i}.mixer.in_proj.weight"] for i in range(3)]
    assert blocks[0] < blocks[1] < blocks[2] <= 1
    assert scale["pos_embed"] == scale["patch_embed.proj.weight"] < blocks[0]
    assert decay["backbone.layers.1.mixer.A_log"] == decay["pos_embed"] == 0
    for one in (model, timm.create_model(TINY, depth=1, class_token=True)):
        assert one.no_weight_decay() <= set(dict(one.named_parameters()))


def test_gradient_checkpointing_changes_no_gradient():
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for again in (False, True):
        model = small().train()
        model.set_grad_checkpointing(again)
        assert model.grad_checkpointing == again  # timm's name
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(second, first)


def test_init_weights_fills_a_model_that_had_no_memory():
    model = BiMamba2(**SMALL_SIZES, class_token=True, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(model(torch.randn(1, 3, 32, 32))).all()


def test_scripting_leaves_the_model_as_it_was():
    model = small()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(images), expected)
    names = sum(p.numel() for p in scripted.parameters())
    assert names == sum(p.numel() for p in model.parameters())
    assert len(model.forward_intermediates(images, intermediates_only=True)) == 2


@pytest.mark.parametrize("options", [{"drop_path_rate": 0.2}, {"dynamic_img_pad": True}])
def test_a_training_step_compiles_into_one_graph(options):
    torch._dynamo.reset()
    model = small(class_token=True, global_pool="token", **options).train()
    model.set_grad_checkpointing()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_model_in_bfloat16_answers_in_bfloat16_near_float32():
    model = small()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    found = model.bfloat16()(images.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.gpu
def test_cpu_and_gpu_agree():
    torch.manual_seed(0)
    model = timm.create_model(TINY, num_classes=10).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(images)
        found = model.cuda()(images.cuda()).cpu()
    assert (found - expected).norm() / expected.norm() < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["imagenet", "fashion-mnist"])
def test_500_steps_in_bfloat16_at_five_times_the_recipes_rate_stay_finite(name):
    recipe, _ = recipes.read(catalog.find(f"vision/{name}"))
    train_at_five_times_the_rate(recipe, "cuda", steps=500, batch_size=32)


def train_at_five_times_the_rate(recipe, device, steps, batch_size):
    """Without warm-up, on noise; the loss every 50 steps and the last weights must be finite."""
    torch.manual_seed(0)
    model = recipe.model(10).to(device).train()
    optimizer = create_optimizer_v2(
        parameter_groups(model, recipe.optimizer.weight_decay),
        opt=recipe.optimizer.name,
        lr=5 * recipe.optimizer.lr,
        betas=recipe.optimizer.betas,
    )
    size = (recipe.data.preprocessing.channels, *recipe.data.preprocessing.size)
    images, targets = torch.randn(256, *size).to(device), torch.randint(10, (256,)).to(device)
    for step in range(1, steps + 1):
        rows = torch.randint(256, (batch_size,)).to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(images[rows]).float(), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.trainer.gradient_clip)
        optimizer.step()
        if step % 50 == 0:
            assert torch.isfinite(loss), f"step {step}"
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("stride", [4, 3])
def test_patches_as_a_product(stride):
    proj = PatchProjection(3, 8, 4, stride=stride).double()
    images = torch.rand(2, 3, 18, 13, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(images, proj.weight, proj.bias, stride)
    torch.testing.assert_close(proj(images), expected)
    wanted = torch.autograd.grad(expected.square().sum(), [images, *proj.parameters()])
    found = torch.autograd.grad(proj(images).square().sum(), [images, *proj.parameters()])
    torch.testing.assert_close(found, wanted)
