"""The Triton gated norm against plain torch in float64."""

import pytest
import torch
import torch.nn.functional as F

from mamba2_apps.kernels import gated_rms_norm_triton as op

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}


pytestmark = pytest.mark.usefixtures("nan_in_new_tensors")


def reference(x, weight, z, eps, group_size, norm_before_gate):
    v = x if z is None or norm_before_gate else x * F.silu(z)
    groups = v.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = (groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight
    return y if z is None or not norm_before_gate else y * F.silu(z)


def relative_error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


def check(
    shape,
    device="cpu",
    dtype=torch.float32,
    gate=True,
    group_size=None,
    norm_before_gate=False,
    wrap=lambda x: x,
    eps=1e-5,
):
    """Compare y and all gradients; `wrap` gives x and z their strides. Returns them all."""
    torch.manual_seed(0)
    low = {
        "x": wrap(torch.randn(shape).to(device, dtype)),
        "weight": torch.randn(shape[-1]).to(device),
    }
    if gate:
        low["z"] = wrap(torch.randn(shape).to(device, dtype))
    high = {name: t.double() for name, t in low.items()}
    for t in (*low.values(), *high.values()):
        t.requires_grad_()
    dy = wrap(torch.randn(shape).to(device, dtype))

    options = (eps, group_size, norm_before_gate)
    y = op.gated_rms_norm(low["x"], low["weight"], low.get("z"), *options)
    expected = reference(high["x"], high["weight"], high.get("z"), *options)
    got = torch.autograd.grad(y, list(low.values()), dy)
    want = torch.autograd.grad(expected, list(high.values()), dy.double())
    assert y.dtype == dtype
    assert y.shape == tuple(shape)
    assert relative_error(y, expected) < TOLERANCE[dtype]
    for name, a, e in zip(low, got, want, strict=True):
        assert a.dtype == low[name].dtype, name
        assert a.shape == e.shape, name
        assert relative_error(a, e) < TOLERANCE[dtype], name
    return [y, *got]


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize(
    ("shape", "group_size"), [((2, 3, 12), 4), ((7,), None), ((5, 2), None), ((37, 2, 6), 3)]
)
def test_matches_the_reference(shape, group_size, norm_before_gate, gate):
    check(shape, gate=gate, group_size=group_size, norm_before_gate=norm_before_gate)


def test_groups_of_one_channel():
    check((5, 3), group_size=1, eps=1.0)
    check((5, 1), eps=1.0)


def test_a_group_larger_than_a_tile():
    check((3, 2, op.FORWARD_TILE + 1))


def test_a_program_of_the_backward_walks_over_several_tiles(monkeypatch):
    monkeypatch.setattr(op, "BACKWARD_PROGRAMS", 2)
    check((3 * 2 * op.MOST_ROWS + 5, 6), group_size=3)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: torch.cat([x, x, x], dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]],
        lambda x: x.mT.contiguous().mT,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x[..., :1].expand_as(x),
    ],
    ids=["slice of a wider tensor", "channels first", "sequence first", "every other", "expanded"],
)
def test_any_strides(wrap):
    check((2, 3, 10), group_size=5, wrap=wrap)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_half_precision_beside_float32_weights(norm_before_gate, dtype):
    check((5, 40), dtype=dtype, norm_before_gate=norm_before_gate)


def test_half_precision_sums_in_float32():
    x = torch.full((1, 64), 6e4, dtype=torch.float16)
    y = op.gated_rms_norm(x, torch.ones(64), None, 1e-5, None, False)
    assert torch.equal(y, torch.ones_like(x))


def test_rows_of_zeros_have_finite_gradients():
    x, z = torch.zeros(2, 6, requires_grad=True), torch.zeros(2, 6, requires_grad=True)
    op.gated_rms_norm(x, torch.ones(6), z, 1e-5, None, False).sum().backward()
    assert x.grad.isfinite().all()
    assert z.grad.isfinite().all()


def test_a_second_derivative_is_refused():
    x = torch.randn(2, 6, requires_grad=True)
    y = op.gated_rms_norm(x, torch.ones(6), None, 1e-5, None, False)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()


def test_opcheck():
    x, weight, z = torch.randn(2, 3, 12), torch.randn(12), torch.randn(2, 3, 12)
    for t in (x, weight, z):
        t.requires_grad_()
    op_ = torch.ops.mamba2_apps.gated_rms_norm_triton
    torch.library.opcheck(op_, (x, weight, z, 1e-5, 4, False))
    torch.library.opcheck(op_, (x, weight, None, 1e-5, 12, True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [
        ((3, 1000, 1536), None),
        ((64, 197, 768), None),
        ((2, 333, 8192), None),
        ((50, 16384), None),
        ((2, 5000, 1024), 128),
        ((100_001, 24), 3),
    ],
)
def test_on_the_gpu_twice_the_same(shape, group_size, norm_before_gate, dtype):
    for gate in (False, True):
        options = {
            "dtype": dtype,
            "gate": gate,
            "group_size": group_size,
            "norm_before_gate": norm_before_gate,
        }
        first, second = (check(shape, "cuda", **options) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    x = torch.randn(2**20 + 7, 2080, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(2080, device="cuda")
    tail = x.detach()[-40:].requires_grad_()
    results = []
    for v in (x, tail):
        y = op.gated_rms_norm(v, weight, None, 1e-5, None, False)
        (dx,) = torch.autograd.grad(y, v, v.detach())
        results.append((y[-40:], dx[-40:]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
