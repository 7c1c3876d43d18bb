"""The Triton SSD against the float64 torch backend: outputs, states, every gradient.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n

On a CPU the kernels run under Triton's interpreter, at tiny sizes with chunks of 32 tokens; on a
GPU, compiled, at sizes that have several chunks of the real length.
"""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mamba2_apps.kernels import (
    launching,
    ssd,
    ssd_bidirectional,
    ssd_triton,
    ssd_triton_launch,
    ssd_triton_plan,
)

# (limit of ‖a - b‖ / ‖b‖, and the limit for the gradients of dt, A and dt_bias)
TOLERANCE = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 5e-3),
    torch.bfloat16: (6e-3, 1.5e-2),
}
STEPS = ("dt", "A", "dt_bias")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")
DIRECTIONS = [{}, {"reverse": True}, {"both": True}]
SMALL_CHUNKS = {"forward_chunk": 16, "chunk": 32, "tile": 16}


pytestmark = pytest.mark.usefixtures("nan_in_new_tensors")


def use_tiling(monkeypatch, **changes):
    """Cut all following calls as the rule says, but for `changes`."""
    rule = ssd_triton_plan.tiling
    monkeypatch.setattr(
        ssd_triton_plan, "tiling", lambda *sizes: dataclasses.replace(rule(*sizes), **changes)
    )
    monkeypatch.setattr(launching, "_prepared", {})


def draw(
    b=1,
    l=40,
    h=2,
    p=16,
    n=16,
    g=1,
    *,
    both=False,
    per_direction=(),
    bounds=None,
    z=False,
    d_matrix=False,
    states=True,
    bias=True,
    dtype=torch.float32,
    device="cpu",
):
    """Arguments of `ssd`, or of `ssd_bidirectional` where `both`, drawn from the global seed."""
    pair = (2,) if both else ()
    sequences = b if bounds is None else len(bounds) - 1

    def normal(name, *size):
        lead = (2,) if name in per_direction else ()
        return torch.randn(*lead, *size, device=device).to(dtype)

    arguments = {
        "x": normal("x", b, l, h, p),
        "dt": normal("dt", *pair, b, l, h),
        "A": -0.5 - 4 * torch.rand(*pair, h, device=device),
        "B": normal("B", b, l, g, n),
        "C": normal("C", b, l, g, n),
        "D": torch.randn(h, p, device=device) if d_matrix else torch.randn(h, device=device),
    }
    if bias:
        arguments["dt_bias"] = torch.randn(*pair, h, device=device) / 2 - 2
    if states:
        arguments["initial_states"] = torch.randn(*pair, sequences, h, p, n, device=device)
    if z:
        arguments["z"] = normal("z", b, l, h, p)
    return arguments


def run(arguments, bounds, backend, dtype=None, **options):
    """y, final states and the gradients of all arguments, the gradients given from a fixed seed."""
    leaves = {
        name: (tensor if dtype is None else tensor.to(dtype)).detach().requires_grad_()
        for name, tensor in arguments.items()
    }
    if bounds is not None:
        device = leaves["x"].device
        options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
    op = ssd_bidirectional if leaves["dt"].dim() == 4 else ssd
    options.setdefault("dt_softplus", True)
    y, states = op(**leaves, **options, return_final_states=True, backend=backend)
    seeded = torch.Generator().manual_seed(1)
    of_y, of_states = (torch.randn(t.shape, generator=seeded) for t in (y, states))
    # Both backends get the gradient that half precision can hold.
    of_y = of_y.to(arguments["x"].dtype).to(y)
    gradients = torch.autograd.grad((y, states), leaves.values(), (of_y, of_states.to(states)))
    return {"y": y, "states": states, **dict(zip(leaves, gradients, strict=True))}


def check(arguments, bounds=None, **options):
    results = run(arguments, bounds, "triton", **options)
    again = run(arguments, bounds, "triton", **options) if torch.cuda.is_available() else results
    expected = run(arguments, bounds, "torch", dtype=torch.float64, **options)
    loose = TOLERANCE[arguments["x"].dtype]
    for name, result in results.items():
        assert torch.equal(result, again[name]), f"{name} differs from run to run"
        # A gradient may be zero: that of A is, where a sequence of one token starts from nothing.
        error = (result.double() - expected[name]).norm() / expected[name].norm().clamp_min(1e-3)
        assert error < loose[name in STEPS], f"{name}: relative error {error:.1e}"


def split_options(case):
    """A case of `draw`, and what goes to the operator."""
    case = dict(case)
    reverse = {"reverse": True} if case.pop("reverse", False) else {}
    return case, reverse


@interpreted
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients(monkeypatch, direction):
    use_tiling(monkeypatch, **SMALL_CHUNKS)
    torch.manual_seed(0)
    case, options = split_options(direction)
    check(draw(b=2, l=37, h=4, g=2, p=12, n=20, **case), **options)


@interpreted
def test_strides_too_long_for_32_bits(monkeypatch):
    use_tiling(monkeypatch, **SMALL_CHUNKS)
    monkeypatch.setattr(ssd_triton_launch, "FAR", 2000)
    torch.manual_seed(0)
    arguments = draw(l=21, p=4, n=4, z=True)
    assert not ssd_triton_launch._is_far(arguments["x"])
    arguments["x"] = torch.stack([arguments["x"]] * 9, -1)[..., 4]
    assert ssd_triton_launch._is_far(arguments["x"])
    check(arguments)


@interpreted
@pytest.mark.parametrize("direction", DIRECTIONS[1:])
def test_packed(monkeypatch, direction):
    use_tiling(monkeypatch, **SMALL_CHUNKS)
    torch.manual_seed(0)
    case, options = split_options(direction)
    bounds = [0, 1, 30, 70]
    check(draw(l=70, bounds=bounds, **case), bounds, **options)


@interpreted
@pytest.mark.parametrize(("chunk", "l", "chained"), [(16, 34, 8), (32, 83, 0)])
@pytest.mark.parametrize("direction", DIRECTIONS[1:])
def test_cut_into_segments_and_splits(monkeypatch, direction, chunk, l, chained):
    """Segments, heads split over programs, and tiles over headdim and dstate, all at once.

    With longer chunks the scan before the walks takes two of theirs together; the walks add up few
    segments' states themselves, and a launch between them those of many.
    """
    monkeypatch.setattr(ssd_triton_plan, "MOST_CHAINED", chained)
    use_tiling(
        monkeypatch, forward_chunk=16, chunk=chunk, tile=16, scan_programs=64, least_segment=1,
        backward_programs=64, shared_programs=64,
    )  # fmt: skip
    monkeypatch.setattr(ssd_triton_plan, "p_block", lambda p, dtype: 16)
    monkeypatch.setattr(ssd_triton_plan, "n_block", lambda n, dtype: 16)
    monkeypatch.setattr(ssd_triton_plan, "scan_n_block", lambda n: 16)
    monkeypatch.setattr(ssd_triton_launch, "STATE_BLOCK", 128)
    torch.manual_seed(0)
    case, options = split_options(direction)
    check(draw(l=l, p=20, n=20, d_matrix=True, **case), **options)


@interpreted
@pytest.mark.parametrize("chained", [0, 8])
def test_packed_sequences_cut_into_segments(monkeypatch, chained):
    use_tiling(monkeypatch, **SMALL_CHUNKS, scan_programs=8, least_segment=1)
    monkeypatch.setattr(ssd_triton_plan, "MOST_CHAINED", chained)
    torch.manual_seed(0)
    bounds = [0, 1, 20, 21, 45]
    check(draw(l=45, h=1, bounds=bounds, both=True), bounds)


@interpreted
@pytest.mark.parametrize("direction", DIRECTIONS[1:])
def test_in_parts_of_the_batch(monkeypatch, direction):
    use_tiling(monkeypatch, **SMALL_CHUNKS)
    monkeypatch.setattr(ssd_triton_plan, "MOST_WORKSPACE", 40_000)
    torch.manual_seed(0)
    case, options = split_options(direction)
    check(draw(b=3, l=33, h=2, p=16, n=16, d_matrix=True, **case), **options)


@interpreted
@pytest.mark.parametrize(
    "case", [{"b": 3}, {"per_direction": ("x", "B", "C")}, {"bounds": [0, 1, 20, 45]}]
)
def test_both_directions_through_stored_states(monkeypatch, case):
    use_tiling(monkeypatch, **SMALL_CHUNKS, scan_programs=8, least_segment=1)
    monkeypatch.setattr(ssd_triton_plan, "CHUNKED_DSTATE", 0)
    monkeypatch.setattr(ssd_triton_plan, "MOST_STATES", 20_000)
    torch.manual_seed(0)
    check(draw(l=45, both=True, **case), case.get("bounds"))


@interpreted
@pytest.mark.parametrize("per_direction", [("x", "B", "C"), ("B",)])
def test_per_direction(monkeypatch, per_direction):
    use_tiling(monkeypatch, **SMALL_CHUNKS)
    torch.manual_seed(0)
    check(draw(l=35, both=True, per_direction=per_direction))


@interpreted
def test_gate_and_limits(monkeypatch):
    use_tiling(monkeypatch, **SMALL_CHUNKS)
    torch.manual_seed(0)
    check(draw(l=33, z=True, states=False), dt_limit=(0.1, 0.6))
    check(draw(l=5, bias=False), dt_softplus=False)


@interpreted
def test_any_strides(monkeypatch):
    use_tiling(monkeypatch, **SMALL_CHUNKS)
    torch.manual_seed(0)
    arguments = draw(l=20)
    contiguous = run(arguments, None, "triton")
    strided = {
        name: torch.stack([tensor, tensor], -1)[..., 0] if tensor.dim() > 2 else tensor
        for name, tensor in arguments.items()
    }
    for name, result in run(strided, None, "triton").items():
        assert torch.equal(result, contiguous[name]), name


@interpreted
def test_a_second_derivative_is_refused(monkeypatch):
    use_tiling(monkeypatch, **SMALL_CHUNKS)
    torch.manual_seed(0)
    t = {name: tensor.requires_grad_() for name, tensor in draw(l=9, states=False).items()}
    y = ssd(**t, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@interpreted
def test_wrong_cu_seqlens_writes_inside(monkeypatch):
    """Values are not checked under torch.compile: they must not reach memory outside."""
    use_tiling(monkeypatch, **SMALL_CHUNKS)
    torch.manual_seed(0)
    t = draw(l=20, states=False)
    wrong = torch.tensor([-7, 90, 3, 10**9], dtype=torch.int32)
    guarded = torch.full((3, 20, 2, 16), 5.0)
    arguments = (t["x"], t["dt"], t["A"], t["B"], t["C"], None, None, None, None, wrong)
    y, _ = ssd_triton.ssd(*arguments, False, (0.0, float("inf")), False, False)
    guarded[1] = y[0]
    assert y.shape == t["x"].shape
    assert (guarded[[0, 2]] == 5).all()


@interpreted
def test_registration(monkeypatch):
    use_tiling(monkeypatch, **SMALL_CHUNKS)
    torch.manual_seed(0)
    t = {name: tensor.requires_grad_() for name, tensor in draw(l=9, both=True).items()}
    tensors = [t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], None, t["dt_bias"]]
    torch.use_deterministic_algorithms(False)  # opcheck compares what backends leave as it is
    torch.library.opcheck(
        torch.ops.mamba2_apps.ssd_triton_forward.default,
        (*tensors, t["initial_states"], None, True, 0.0, float("inf"), False, True, False),
    )


@interpreted
def test_compiles_whole(monkeypatch):
    use_tiling(monkeypatch, **SMALL_CHUNKS)
    torch.manual_seed(0)
    leaves = [draw(l=9)[name].requires_grad_() for name in ("x", "dt", "A", "B", "C")]

    def loss(*tensors):
        return ssd(*tensors, dt_softplus=True, backend="triton").square().sum()

    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), eager, strict=True):
        torch.testing.assert_close(a, b)


@interpreted
@settings(
    max_examples=5, derandomize=True, deadline=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    l=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    p=st.integers(1, 20),
    n=st.integers(1, 20),
    both=st.booleans(),
    states=st.booleans(),
)
def test_any_shape(monkeypatch, l, heads, p, n, both, states):
    with monkeypatch.context() as patch:
        use_tiling(patch, **SMALL_CHUNKS)
        torch.manual_seed(0)
        h, g = heads
        check(draw(l=l, h=h, g=g, p=p, n=n, both=both, states=states))


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_on_gpu(dtype, direction):
    torch.manual_seed(0)
    case, options = split_options(direction)
    check(draw(b=2, l=300, h=4, g=2, p=64, n=64, dtype=dtype, device="cuda", **case), **options)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        {"l": 517, "n": 128, "h": 6, "b": 2},
        {"l": 150, "n": 256, "g": 2},
        {"l": 150, "n": 256, "both": True},
        {"l": 150, "n": 256, "p": 64, "both": True},
        {"l": 197, "p": 40, "n": 20, "h": 3},
        {"l": 129, "p": 128},
        {"l": 1},
        {"l": 50, "z": True, "d_matrix": True},
        {"l": 3001, "p": 64, "n": 64},
        {"l": 3001, "p": 64, "n": 64, "both": True},
        {"l": 3001, "p": 64, "n": 128, "both": True},
        {"l": 300, "both": True, "per_direction": ("x", "B", "C")},
        {"l": 300, "both": True, "per_direction": ("B",)},
        {"l": 9000, "bounds": [0, 1, 130, 5000, 9000]},
        {"l": 9000, "bounds": [0, 1, 130, 5000, 9000], "both": True},
        {"l": 9000, "bounds": [0, 1, 130, 5000, 9000], "reverse": True},
    ],
    ids=lambda case: "-".join(f"{name}{value}" for name, value in case.items() if name != "bounds"),
)
def test_shapes_on_gpu(case):
    torch.manual_seed(0)
    case, options = split_options(case)
    check(draw(dtype=torch.bfloat16, device="cuda", **case), case.get("bounds"), **options)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dstate_from", [0, 10_000])
@pytest.mark.parametrize("n", [64, 128])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_designs_and_parts_on_gpu(monkeypatch, dstate_from, n, direction):
    monkeypatch.setattr(ssd_triton_plan, "CHUNKED_DSTATE", dstate_from)
    monkeypatch.setattr(ssd_triton_plan, "MOST_WORKSPACE", 1_000_000)
    monkeypatch.setattr(ssd_triton_plan, "MOST_STATES", 1_000_000)
    monkeypatch.setattr(launching, "_prepared", {})
    torch.manual_seed(0)
    case, options = split_options(direction)
    shape = {"b": 5, "l": 1100, "h": 3, "p": 72, "n": n, "dtype": torch.bfloat16}
    check(draw(**shape, device="cuda", **case), **options)


@gpu
@pytest.mark.gpu
def test_cuda_graph():
    torch.manual_seed(0)
    arguments = draw(b=2, l=200, p=64, n=64, dtype=torch.bfloat16, device="cuda", states=False)
    torch.use_deterministic_algorithms(False)
    with torch.no_grad():
        expected = ssd(**arguments, dt_softplus=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ssd(**arguments, dt_softplus=True)
        y.fill_(float("nan"))
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@gpu
@pytest.mark.gpu
def test_compiles_whole_on_gpu():
    torch.manual_seed(0)
    arguments = draw(b=2, l=200, p=64, n=64, dtype=torch.bfloat16, device="cuda")
    names = ("x", "dt", "A", "B", "C")
    leaves = [arguments[name].requires_grad_() for name in names]

    def loss(*tensors):
        return ssd(*tensors, dt_softplus=True).float().square().sum()

    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
