"""The Triton step against plain torch in float64.

Dimension legend: batch b · nheads h · headdim p · ngroups g · dstate n
"""

import pytest
import torch
import torch.nn.functional as F

from mamba2_apps.kernels import ssd_step_triton as op

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}
TOLERANCE_OF_SUMS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1.5e-2}
INFINITY = float("inf")


pytestmark = pytest.mark.usefixtures("nan_in_new_tensors")


def reference(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit):
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt, threshold=1000) if dt_softplus else dt).clamp(*dt_limit)
    B, C = (t.repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (B, C))
    state = torch.exp(dt * A)[..., None, None] * state
    state = state + torch.einsum("bh,bhp,bhn->bhpn", dt, x, B)
    y = torch.einsum("bhpn,bhn->bhp", state, C)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]) * x
    return y if z is None else y * F.silu(z), state


def relative_error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


def check(
    device="cpu",
    dtype=torch.float32,
    b=2,
    h=4,
    p=3,
    g=2,
    n=5,
    D=None,
    gate=False,
    dt_bias=False,
    dt_softplus=False,
    dt_limit=(0.0, INFINITY),
    wrap=lambda t: t,
):
    """Compare y, the next state and all gradients; `wrap` gives x, dt, B, C and z their strides."""
    torch.manual_seed(0)
    shapes = {"x": (b, h, p), "dt": (b, h), "B": (b, g, n), "C": (b, g, n)}
    if gate:
        shapes["z"] = (b, h, p)
    low = {name: wrap(torch.randn(s).to(device, dtype)) for name, s in shapes.items()}
    if not dt_softplus:
        low["dt"] = wrap(torch.rand(b, h).to(device, dtype))
    low["state"] = torch.randn(b, h, p, n).to(device)
    low["A"] = -torch.rand(h).to(device) - 0.1
    if D is not None:
        low["D"] = torch.randn(D).to(device)
    if dt_bias:
        low["dt_bias"] = torch.randn(h).to(device) - 4.0 * dt_softplus
    high = {name: t.double() for name, t in low.items()}
    for t in (*low.values(), *high.values()):
        t.requires_grad_()
    before = low["state"].detach().clone()

    def arguments(t):
        order = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
        return [t.get(name) for name in order] + [dt_softplus, dt_limit]

    outputs = op.ssd_step(*arguments(low))
    references = reference(*arguments(high))
    cotangents = [torch.randn_like(t) for t in outputs]
    got = torch.autograd.grad(outputs, list(low.values()), cotangents)
    want = torch.autograd.grad(references, list(high.values()), [t.double() for t in cotangents])
    assert outputs[0].dtype == dtype
    assert outputs[1].dtype == torch.float32
    assert torch.equal(low["state"], before)
    for a, e in zip(outputs, references, strict=True):
        assert a.shape == e.shape
        assert relative_error(a, e) < TOLERANCE[dtype]
    for name, a, e in zip(low, got, want, strict=True):
        assert a.dtype == low[name].dtype, name
        sums = name in ("dt", "A", "dt_bias")
        assert relative_error(a, e) < (TOLERANCE_OF_SUMS if sums else TOLERANCE)[dtype], name
    return [*outputs, *got]


@pytest.mark.parametrize(
    ("b", "h", "p", "g", "n"),
    [(1, 1, 1, 1, 1), (2, 4, 3, 2, 5), (3, 6, 33, 1, 130), (2, 3, 4, 3, 2)],
)
def test_matches_the_reference(b, h, p, g, n):
    check(b=b, h=h, p=p, g=g, n=n)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("D", [None, (4,), (4, 3)])
def test_skip_and_gate(D, gate):
    check(D=D, gate=gate)


@pytest.mark.parametrize("dt_softplus", [False, True])
@pytest.mark.parametrize("dt_limit", [(0.0, INFINITY), (0.3, 0.6)])
def test_discretisation(dt_limit, dt_softplus):
    check(b=5, dt_bias=True, dt_softplus=dt_softplus, dt_limit=dt_limit)


def test_softplus_keeps_small_and_large_steps():
    dt = torch.tensor([[-30.0, -12.0, -5.0, 0.0, 5.0, 19.9, 20.1, 120.0]])
    x, B = torch.ones(1, 8, 1), torch.ones(1, 1, 1)
    state, A = torch.zeros(1, 8, 1, 1), -torch.ones(8)
    _, state = op.ssd_step(state, x, dt, A, B, B, None, None, None, True, (0.0, INFINITY))
    expected = torch.log1p(torch.exp(dt.double()))
    assert ((state.flatten() - expected).abs() / expected).max() < 1e-6


def test_a_nan_in_dt_is_not_hidden():
    arguments = [torch.ones(s) for s in ((1, 1, 1, 1), (1, 1, 1))]
    B = torch.ones(1, 1, 1)
    dt = torch.full((1, 1), torch.nan)
    y, state = op.ssd_step(*arguments, dt, -torch.ones(1), B, B, None, None, None, True, (0.0, 1.0))
    assert y.isnan().all()
    assert state.isnan().all()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: torch.cat([t, t], dim=0)[::2],
        lambda t: t.mT.contiguous().mT,
        lambda t: F.pad(t, (2, 1))[..., 2:-1],
    ],
    ids=["every other batch", "last dimensions swapped", "slice of a wider tensor"],
)
def test_any_strides(wrap):
    check(D=(4, 3), gate=True, wrap=wrap)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_beside_float32_states(dtype):
    check(dtype=dtype, b=3, p=16, n=16, D=(4,), gate=True, dt_bias=True, dt_softplus=True)


def test_opcheck():
    b, h, p, g, n = 2, 4, 3, 2, 5
    shapes = [(b, h, p, n), (b, h, p), (b, h), (h,), (b, g, n), (b, g, n)]
    tensors = [torch.randn(s).requires_grad_() for s in shapes]
    optional = [torch.randn(s).requires_grad_() for s in ((h,), (b, h, p), (h,))]
    step = torch.ops.mamba2_apps.ssd_step_triton
    torch.library.opcheck(step, (*tensors, *optional, True, 0.0, 1.0))
    torch.library.opcheck(step, (*tensors, None, None, None, False, 0.0, INFINITY))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("b", "h", "p", "g", "n"), [(8, 24, 64, 1, 128), (1, 80, 64, 8, 256), (257, 5, 50, 1, 17)]
)
def test_on_the_gpu_twice_the_same(b, h, p, g, n, dtype):
    for options in ({}, {"D": (h, p), "gate": True, "dt_bias": True, "dt_softplus": True}):
        first, second = (check("cuda", dtype, b=b, h=h, p=p, g=g, n=n, **options) for _ in range(2))
        assert all(torch.equal(s, t) for s, t in zip(first, second, strict=True))
