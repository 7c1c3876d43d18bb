"""What entering states add to a scan: as `ssd` with those states gives; Triton against float64."""

import pytest
import torch

from mamba2_apps.kernels import ssd, state_outputs_triton
from mamba2_apps.kernels.state_outputs import add_state_outputs

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


pytestmark = pytest.mark.usefixtures("nan_in_new_tensors")


def relative_error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


def inputs(r, b, l, h, p, g, n, shared, device="cpu", dtype=torch.float64):
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    steps = torch.rand(r, b, l, h) * 0.1
    made = {
        "y": torch.randn(b, l, h, p).to(dtype),
        "states": torch.randn(r, b, h, p, n).to(wide),
        "C": torch.randn(*(() if shared else (r,)), b, l, g, n).to(dtype),
        "decays": -steps.cumsum(2).to(wide),
    }
    return {name: t.to(device).requires_grad_() for name, t in made.items()}


def check(*sizes, shared, device="cpu", dtype=torch.float32):
    low = inputs(*sizes, shared, device, dtype)
    high = {name: t.detach().double().requires_grad_() for name, t in low.items()}
    dy = torch.randn_like(low["y"])
    y = add_state_outputs(**low, backend="triton")
    expected = add_state_outputs(**high, backend="torch")
    got = torch.autograd.grad(y, list(low.values()), dy)
    want = torch.autograd.grad(expected, list(high.values()), dy.double())
    assert y.dtype == dtype
    assert relative_error(y, expected) < TOLERANCE[dtype]
    for name, a, e in zip(low, got, want, strict=True):
        assert a.dtype == low[name].dtype, name
        assert relative_error(a, e) < TOLERANCE[dtype], name
    return [y, *got]


def test_is_what_a_scan_gives_with_the_state_before_it():
    torch.manual_seed(0)
    b, l, h, p, g, n = 2, 9, 4, 3, 2, 5
    x, dt = torch.randn(b, l, h, p).double(), torch.rand(b, l, h).double()
    A, B, C = -torch.rand(h).double(), *torch.randn(2, b, l, g, n).double()
    state = torch.randn(b, h, p, n).double()
    decays = (dt * A).cumsum(1)
    got = add_state_outputs(ssd(x, dt, A, B, C), state[None], C, decays[None])
    torch.testing.assert_close(got, ssd(x, dt, A, B, C, initial_states=state))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "sizes", [(2, 2, 70, 4, 5, 2, 3), (1, 1, 64, 2, 16, 1, 16), (2, 1, 130, 3, 4, 3, 20)]
)
def test_triton_matches_float64(monkeypatch, sizes, shared):
    monkeypatch.setattr(state_outputs_triton, "RUN", 64)  # several partial sums
    check(*sizes, shared=shared)


def test_is_registered_as_torch_asks():
    tensors = inputs(2, 1, 9, 2, 3, 1, 4, shared=False, dtype=torch.float32)
    operator = torch.ops.mamba2_apps.add_state_outputs_triton.default
    torch.library.opcheck(operator, tuple(tensors.values()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sizes", [(2, 2, 700, 8, 64, 1, 64), (1, 2, 5000, 4, 32, 2, 128)])
def test_triton_on_the_gpu(sizes, shared, dtype):
    first, again = (check(*sizes, shared=shared, device="cuda", dtype=dtype) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
