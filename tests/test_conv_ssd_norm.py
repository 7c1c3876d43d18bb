"""What lies between a block's projections as one operator: Triton against its definition."""

import pytest
import torch

from mamba2_apps import kernels
from mamba2_apps.kernels import conv_ssd_norm
from mamba2_apps.kernels.norm_linear_triton import norm_linear
from mamba2_apps.mixer import Mamba2

GPU = [pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


pytestmark = pytest.mark.usefixtures("nan_in_new_tensors")


def draw(b, l, h, p, g, n, directions, further, device="cpu", matrix=False, bias=True):
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


@pytest.mark.parametrize(
    ("dtype", "outputs", "device"),
    [
        (torch.float32, 24, "cpu"),
        # Triton's interpreter multiplies no bfloat16.
        *[pytest.param(torch.bfloat16, n, "cuda", marks=pytest.mark.gpu) for n in (24, 192, 300)],
        pytest.param(torch.float32, 192, "cuda", marks=pytest.mark.gpu),
    ],
)
def test_with_the_projection_after_it(dtype, outputs, device):
    tensors, options = draw(2, 37, 4, 32, 1, 8, 2, further=4, device=device)
    tensors["zxBCdt"] = tensors["zxBCdt"].to(dtype)
    projection = torch.randn(outputs, 128, device=device) / 128**0.5
    with torch.no_grad():
        got = conv_ssd_norm(**tensors, **options, projection=projection, backend="triton")
        double = {k: t.double() for k, t in tensors.items()}
        want = conv_ssd_norm(**double, **options, backend="torch") @ projection.double().T
    assert got.dtype == dtype
    assert (got.double() - want).norm() < TOLERANCE[dtype] * want.norm()


@pytest.mark.parametrize("outputs", [5, 24])
def test_norm_and_product_in_one_pass(outputs):
    torch.manual_seed(0)
    rows = torch.randn(2, 70, 300)
    x, z = rows[..., 150:278], rows[..., 2:130]
    weight, projection = torch.rand(128) + 0.5, torch.randn(outputs, 128)
    got = norm_linear(x, z, weight, projection, 1e-5)
    want = kernels.gated_rms_norm(x.double(), weight.double(), z.double()) @ projection.double().T
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_a_projection_that_gradients_would_need_is_refused():
    tensors, options = draw(1, 5, 2, 4, 1, 4, 2, further=0)
    projection = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="while gradients are recorded"):
        conv_ssd_norm(**tensors, **options, projection=projection)
    with pytest.raises(ValueError, match=r"projection has shape \(8, 3\), expected \(d, 8\)"):
        conv_ssd_norm(**tensors, **options, projection=projection.detach().T)


def test_is_registered_as_torch_asks():
    tensors, options = draw(1, 5, 2, 4, 1, 4, 2, further=2)
    arguments = (
        *(t.requires_grad_() for t in tensors.values()), None, *options.values(), 0.0, 1e3, 1e-5,
        8, False,
    )  # fmt: skip
    import mamba2_apps.kernels.conv_ssd_norm_triton  # noqa: F401

    operator = torch.ops.mamba2_apps.conv_ssd_norm_triton.default
    torch.library.opcheck(
        operator,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    constants = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    with_projection = [*constants[:7], torch.randn(3, 8), *constants[7:]]
    torch.library.opcheck(
        torch.ops.mamba2_apps.conv_ssd_norm_linear_triton.default,
        tuple(with_projection),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"zxBCdt": torch.randn(1, 5, 20)}, r"expected \(b, l, at least 28\)"),
        ({"norm_weight": torch.randn(7)}, r"norm_weight has shape \(7,\), expected \(8,\)"),
        ({"A": -torch.rand(3, 2)}, r"A has shape \(3, 2\), expected \(h,\) or \(2, h\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, sentence):
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
    for a, e in zip(at_once, run(mixer), strict=True):
        assert (a - e).norm() < 2e-2 * e.norm()


def test_the_cpu_runs_three_operators(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("called")

    monkeypatch.setattr("mamba2_apps.mixer.conv_ssd_norm", fail)
    assert Mamba2(16, headdim=8, d_state=8)(torch.randn(1, 5, 16)).shape == (1, 5, 16)
    assert kernels.conv_ssd_norm is conv_ssd_norm
