"""What lies between a block's projections as one operator: Triton against its definition."""

import pytest
import torch
from torch.nn.utils import parametrize

from mamba2_apps import kernels
from mamba2_apps.adaptation import LowRank
from mamba2_apps.kernels import conv_ssd_norm
from mamba2_apps.kernels.norm_linear_triton import norm_linear
from mamba2_apps.mixer import Mamba2

GPU = [pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


pytestmark = pytest.mark.usefixtures("nan_in_new_tensors")


def draw(b, l, h, p, g, n, directions, further, device="cpu", matrix=False, bias=True, outputs=0):
    torch.manual_seed(0)
    pair = (2,) if directions == 2 else ()
    channels = h * p + 2 * g * n
    tensors = {
        "zxBCdt": torch.randn(b, l, 2 * h * p + 2 * g * n + directions * h + further),
        "conv_weight": torch.randn(channels, 4) / 2,
        "conv_bias": torch.randn(channels) if bias else None,
        "dt_bias": torch.randn(*pair, h) - 2,
        "A": -1 - torch.rand(*pair, h),
        "D": torch.randn((h, p) if matrix else (h,)),
        "norm_weight": torch.rand(h * p) + 0.5,
        "projection": torch.randn(outputs, h * p) / (h * p) ** 0.5 if outputs else None,
    }
    tensors = {k: None if t is None else t.to(device) for k, t in tensors.items()}
    return tensors, {"headdim": p, "ngroups": g, "d_state": n}


def compare(tensors, options, dtype=torch.float32):
    """y and every gradient, against the torch backend in float64."""

    def run(backend, **tensors):
        given = {k: t if t is None else t.requires_grad_() for k, t in tensors.items()}
        y = conv_ssd_norm(**given, **options, backend=backend)
        wanted = [t for t in given.values() if t is not None]
        weights = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64)
        dy = weights.view(y.shape).cos().to(y.dtype)
        return [y, *torch.autograd.grad(y, wanted, dy)]

    low = {k: t if t is None else t.clone() for k, t in tensors.items()}
    low["zxBCdt"] = low["zxBCdt"].to(dtype)
    high = {k: t if t is None else t.double() for k, t in low.items()}
    got, want = run("triton", **low), run("torch", **high)
    names = ["y", *(k for k, t in tensors.items() if t is not None)]
    for name, a, e in zip(names, got, want, strict=True):
        assert a.shape == e.shape, name
        error = (a.double() - e).norm() / e.norm().clamp_min(1e-30)
        assert error < TOLERANCE[dtype], (name, error.item())
    return got


@pytest.mark.parametrize("directions", [1, 2])
def test_equals_its_definition(directions):
    sizes = {"b": 2, "l": 37, "h": 2, "p": 8, "g": 1, "n": 8}
    tensors, options = draw(**sizes, directions=directions, further=4 * (directions == 2))
    compare(tensors, {**options, "dt_limit": (0.0, 0.5)})


def test_packed_groups_and_options():
    tensors, options = draw(1, 21, 4, 4, 2, 4, 2, further=0, matrix=True, bias=False)
    bounds = torch.tensor([0, 1, 13, 21], dtype=torch.int32)
    compare(tensors, {**options, "cu_seqlens": bounds, "group_size": 8, "norm_before_gate": True})


@pytest.mark.parametrize("before_gate", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
def test_equals_its_definition_with_a_projection(directions, before_gate):
    sizes = {"b": 2, "l": 37, "h": 2, "p": 8, "g": 1, "n": 8, "further": 4}
    tensors, options = draw(**sizes, directions=directions, outputs=5)
    compare(tensors, {**options, "group_size": 8, "norm_before_gate": before_gate})


@pytest.mark.gpu
@pytest.mark.parametrize("half_weight", [False, True])
@pytest.mark.parametrize("outputs", [24, 192, 300])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("b", "l"), [(2, 37), (3, 1249)])
def test_with_a_projection_on_the_gpu_twice_the_same(b, l, dtype, outputs, half_weight):
    tensors, options = draw(b, l, 4, 32, 1, 16, 2, further=4, device="cuda", outputs=outputs)
    if half_weight:
        tensors["projection"] = tensors["projection"].to(dtype)
    first, second = (compare(tensors, options, dtype) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].dtype == dtype
    assert first[-1].dtype == tensors["projection"].dtype


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_a_projection_without_gradients(dtype):
    # Triton's interpreter multiplies no bfloat16.
    device = "cuda" if dtype == torch.bfloat16 else "cpu"
    tensors, options = draw(2, 37, 4, 32, 1, 8, 2, further=4, device=device, outputs=24)
    tensors["zxBCdt"] = tensors["zxBCdt"].to(dtype)
    with torch.no_grad():
        got = conv_ssd_norm(**tensors, **options, backend="triton")
        double = {k: t.double() for k, t in tensors.items()}
        want = conv_ssd_norm(**double, **options, backend="torch")
    assert got.dtype == dtype
    assert (got.double() - want).norm() < TOLERANCE[dtype] * want.norm()


def test_a_frozen_projection_has_no_gradient():
    tensors, options = draw(2, 21, 2, 8, 1, 8, 2, further=0, outputs=5)
    projection = tensors.pop("projection")
    compare(tensors, {**options, "projection": projection})
    given = {k: t.requires_grad_() for k, t in tensors.items()}
    conv_ssd_norm(**given, **options, projection=projection, backend="triton").sum().backward()
    assert projection.grad is None
    assert all(t.grad is not None for t in given.values())


def test_what_a_projection_multiplies_is_not_kept():
    tensors, options = draw(2, 21, 2, 8, 1, 8, 2, further=0, outputs=5)
    given = {k: t.requires_grad_() for k, t in tensors.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = conv_ssd_norm(**given, **options, backend="triton")
    (scanned,) = [t for t in kept if not any(t is one for one in given.values())]
    assert len(kept) == len(given) + 1
    del given["projection"]
    y = conv_ssd_norm(**given, **options, backend="triton")
    assert scanned.shape == y.shape
    assert not torch.allclose(scanned, y, rtol=0.1)
    torch.testing.assert_close(out, y @ tensors["projection"].T)


def test_a_projection_has_no_second_derivative():
    tensors, options = draw(1, 5, 2, 4, 1, 4, 2, further=0, outputs=3)
    given = {k: t.requires_grad_() for k, t in tensors.items()}
    out = conv_ssd_norm(**given, **options, backend="triton")
    (gradient,) = torch.autograd.grad(out.sum(), given["projection"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("outputs", [5, 24])
def test_norm_and_product_in_one_pass(outputs):
    torch.manual_seed(0)
    rows = torch.randn(2, 70, 300)
    x, z = rows[..., 150:278], rows[..., 2:130]
    weight, projection = torch.rand(128) + 0.5, torch.randn(outputs, 128)
    got = norm_linear(x, z, weight, projection, 1e-5)
    want = kernels.gated_rms_norm(x.double(), weight.double(), z.double()) @ projection.double().T
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outputs", [0, 3])
def test_is_registered_as_torch_asks(outputs):
    tensors, options = draw(1, 5, 2, 4, 1, 4, 2, further=2, outputs=outputs)
    given = [t if t is None else t.requires_grad_() for t in tensors.values()]
    settings = (*options.values(), 0.0, 1e3, 1e-5, 8, False)
    import mamba2_apps.kernels.conv_ssd_norm_triton  # noqa: F401

    torch.library.opcheck(
        torch.ops.mamba2_apps.conv_ssd_norm_triton.default,
        (*given, None, *settings),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    constants = [t if t is None else t.detach() for t in given]
    scanned, dout = torch.randn(1, 5, 8), torch.randn(1, 5, outputs or 8)
    for trains in {False, outputs > 0}:
        torch.library.opcheck(
            torch.ops.mamba2_apps.conv_ssd_norm_triton_backward.default,
            (dout, *constants, None, scanned, *settings, trains),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"zxBCdt": torch.randn(1, 5, 20)}, r"expected \(b, l, at least 28\)"),
        ({"norm_weight": torch.randn(7)}, r"norm_weight has shape \(7,\), expected \(8,\)"),
        ({"A": -torch.rand(3, 2)}, r"A has shape \(3, 2\), expected \(h,\) or \(2, h\)"),
        ({"projection": torch.randn(8, 3)}, r"projection has shape \(8, 3\), expected \(d, 8\)"),
        ({"projection": torch.randn(3, 8).double()}, r"projection has dtype torch.float64"),
    ],
)
def test_what_does_not_fit_is_named(change, sentence):
    tensors, options = draw(1, 5, 2, 4, 1, 4, 2, further=0)
    with pytest.raises(ValueError, match=sentence):
        conv_ssd_norm(**{**tensors, **change}, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(
    ("b", "l", "h", "p", "g", "n"),
    [(4, 197, 6, 64, 1, 64), (2, 1000, 3, 32, 1, 16), (1, 5000, 4, 64, 2, 128)],
)
def test_on_the_gpu_twice_the_same(b, l, h, p, g, n, directions, dtype):
    further = -(2 * h * p + 2 * g * n + directions * h) % 8
    tensors, options = draw(b, l, h, p, g, n, directions, further, "cuda")
    first, second = (compare(tensors, options, dtype) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_mixer_is_the_same_in_one_operator_or_three(bidirectional, compiled, monkeypatch):
    torch.manual_seed(0)
    mixer = Mamba2(96, d_state=32, headdim=32, bidirectional=bidirectional).cuda()
    assert mixer.in_proj.out_features % 8 != 0 or not bidirectional
    u = torch.randn(3, 70, 96, device="cuda")
    lengths = torch.tensor([70, 3, 41], device="cuda")
    data = torch.arange(70, device="cuda") < lengths[:, None]

    def run(module):
        mixer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            y = module(u, lengths=lengths)
        (y.float()[data] ** 2).sum().backward()
        return [y[data].float(), *(p.grad.clone() for p in mixer.parameters())]

    at_once = run(torch.compile(mixer, fullgraph=True) if compiled else mixer)
    monkeypatch.setattr(Mamba2, "_is_one_operator", lambda *_: False)
    names = ["y", *(name for name, _ in mixer.named_parameters())]
    for name, a, e in zip(names, at_once, run(mixer), strict=True):
        # Sums over all tokens that nearly cancel: plain torch alone errs by up to 4e-2 in them.
        limit = 8e-2 if name in ("dt_bias", "A_log", "D") else 2e-2
        assert (a - e).norm() < limit * e.norm(), name


@pytest.mark.parametrize("change", ["none", "low rank", "frozen", "bias", "hook"])
def test_a_mixers_second_projection_is_inside_where_its_weight_says_all(change, monkeypatch):
    torch.manual_seed(0)
    mixer = Mamba2(16, headdim=8, d_state=8, bias=change == "bias", bidirectional=True).double()
    calls = []
    if change == "low rank":
        low_rank = LowRank(mixer.out_proj.weight, 2, 4.0).double()
        torch.nn.init.normal_(low_rank.up)
        parametrize.register_parametrization(mixer.out_proj, "weight", low_rank)
    elif change == "frozen":
        mixer.out_proj.weight.requires_grad_(False)
    elif change == "hook":
        mixer.out_proj.register_forward_hook(lambda *_: calls.append("hook"))
    u = torch.randn(2, 5, 16, dtype=torch.float64)
    trained = [p for p in mixer.parameters() if p.requires_grad]

    def run():
        y = mixer(u)
        return [y, *torch.autograd.grad(y.sin().sum(), trained)]

    def at_once(*tensors, projection, **options):
        calls.append("outside" if projection is None else "inside")
        return conv_ssd_norm(*tensors, projection=projection, **options)

    want = run()
    calls.clear()
    monkeypatch.setattr("mamba2_apps.mixer.conv_ssd_norm", at_once)
    monkeypatch.setattr(Mamba2, "_is_one_operator", lambda *_: True)
    torch.testing.assert_close(run(), want)
    assert calls == {"bias": ["outside"], "hook": ["outside", "hook"]}.get(change, ["inside"])


def test_the_cpu_runs_three_operators(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("called")

    monkeypatch.setattr("mamba2_apps.mixer.conv_ssd_norm", fail)
    assert Mamba2(16, headdim=8, d_state=8)(torch.randn(1, 5, 16)).shape == (1, 5, 16)
    assert kernels.conv_ssd_norm is conv_ssd_norm
