"""The Triton convolution against a float64 reference that loops over sequences.

Dimension legend: batch b · seqlen l · channels d · width w
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from mamba2_apps.kernels import causal_conv1d_triton as op
from mamba2_apps.kernels import launching

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}


pytestmark = pytest.mark.usefixtures("nan_in_new_tensors", "short_walks_in_the_interpreter")


@pytest.fixture
def short_walks_in_the_interpreter(monkeypatch):
    """Its time goes by the steps of the walks; the runs of a program take theirs together."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(launching, "_prepared", {})
        monkeypatch.setattr(op, "FORWARD", op.FORWARD._replace(runs=4, stretch=4, min_run=4))


def reference(x, weight, bias, activation, initial_states, bounds, reverse):
    """One sequence at a time: y (b, l, d), final states (b or nseq, w - 1, d)."""
    width = weight.shape[1]
    pieces = list(x) if bounds is None else [x[0, i:j] for i, j in pairwise(bounds)]
    ys, finals = [], []
    for i, piece in enumerate(pieces):
        before = x.new_zeros(width - 1, x.shape[2]) if initial_states is None else initial_states[i]
        inputs = torch.cat([before, piece.flip(0) if reverse else piece])
        y = F.conv1d(inputs.mT[None], weight[:, None], bias, groups=x.shape[2])[0].mT
        y = F.silu(y) if activation == "silu" else y
        ys.append(y.flip(0) if reverse else y)
        finals.append(inputs[len(inputs) - (width - 1) :])
    return torch.stack(ys) if bounds is None else torch.cat(ys)[None], torch.stack(finals)


def relative_error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


def check(
    device="cpu",
    dtype=torch.float32,
    b=1,
    l=5,
    d=3,
    width=4,
    bias=True,
    activation="silu",
    states=False,
    final=False,
    bounds=None,
    reverse=False,
    wrap=lambda x: x,
):
    """Compare y, final states and all gradients; `wrap` gives x its strides. Returns them all."""
    torch.manual_seed(0)
    n_seq = b if bounds is None else len(bounds) - 1
    tensors = {"x": torch.randn(b, l, d), "weight": torch.randn(d, width)}
    if bias:
        tensors["bias"] = torch.randn(d)
    if states:
        tensors["initial_states"] = torch.randn(n_seq, width - 1, d)
    low = {k: t.to(device, dtype if k == "x" else torch.float32) for k, t in tensors.items()}
    low["x"] = wrap(low["x"])
    high = {k: t.double() for k, t in low.items()}
    for t in (*low.values(), *high.values()):
        t.requires_grad_()
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)

    def optional(tensors):
        names = ("x", "weight", "bias", "initial_states")
        x, weight, bias, initial_states = (tensors.get(name) for name in names)
        return x, weight, bias, activation, initial_states

    y, last = op.causal_conv1d(*optional(low), cu_seqlens, reverse, final)
    expected, expected_last = reference(*optional(high), bounds, reverse)
    outputs, references = {"y": y}, {"y": expected}
    if final:
        outputs["final_states"], references["final_states"] = last, expected_last
    else:
        assert last is None
    cotangents = [torch.randn(b, d, l).mT.to(device, dtype)]  # strided on purpose
    if final:
        cotangents.append(torch.randn(expected_last.shape).to(device, dtype))
    got = torch.autograd.grad(list(outputs.values()), list(low.values()), cotangents)
    want = torch.autograd.grad(
        list(references.values()), list(high.values()), [t.double() for t in cotangents]
    )
    for name, a, e in zip(low, got, want, strict=True):
        assert a.dtype == low[name].dtype, name
        outputs[f"gradient of {name}"], references[f"gradient of {name}"] = a, e
    assert y.dtype == dtype
    for name, a in outputs.items():
        assert a.shape == references[name].shape, name
        assert relative_error(a, references[name]) < TOLERANCE[dtype], name
    return list(outputs.values())


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("b", "l", "d", "width"), [(1, 1, 1, 1), (2, 3, 5, 4), (1, 70, 3, 2), (1, 9, 2, 7)]
)
def test_matches_the_reference(b, l, d, width, reverse):
    check(b=b, l=l, d=d, width=width, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("l", [1, 2, 35])
def test_carries_states_in_and_out(l, reverse):
    check(b=2, l=l, states=True, final=True, reverse=reverse)


def test_states_of_a_filter_of_one_tap_are_empty():
    check(l=3, width=1, states=True, final=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_packed_sequences_do_not_touch(states, reverse):
    bounds = [0, 1, 3, 8, 9, 33, 34]  # most of them shorter than the filter
    check(l=34, bounds=bounds, states=states, final=True, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {"b": 2, "states": True, "bias": False},
        {"bounds": [0, 1, 3, 11, 12, 17, 24, 25, 29], "states": True},
        {"bounds": [0, 2, 15, 16, 29], "states": True, "width": 7},
        {"bounds": [0, 2, 15, 16, 29], "width": 1},
    ],
    ids=["rows", "pack", "wide filter", "one tap"],
)
def test_runs_of_several_stretches(shape, reverse, monkeypatch):
    cut = op.FORWARD._replace(runs=1, stretch=4, min_run=8, max_run=8)
    monkeypatch.setattr(op, "FORWARD", cut)
    monkeypatch.setattr(launching, "_prepared", {})
    check(l=29, reverse=reverse, final=True, **shape)


def test_a_pack_of_one_sequence():
    check(l=5, bounds=[0, 5], states=True, final=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_bias_and_activation_are_optional(bias, activation):
    check(l=6, bias=bias, activation=activation, states=True)


def test_more_channels_than_a_block():
    check(l=4, d=131, states=True, final=True)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: torch.cat([x, x, x], dim=2)[:, :, x.shape[2] : 2 * x.shape[2]],
        lambda x: x.mT.contiguous().mT,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
    ],
    ids=["slice of a wider tensor", "channels first", "sequence first", "every other token"],
)
def test_any_strides(wrap):
    check(b=2, l=7, d=5, states=True, final=True, wrap=lambda x: wrap(x).detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_beside_float32_weights(dtype):
    check(dtype=dtype, b=2, l=19, d=5, states=True, final=True)


def test_gradient_through_the_final_states_alone():
    x = torch.randn(1, 5, 2, requires_grad=True)
    weight = torch.randn(2, 4, requires_grad=True)
    _, final = op.causal_conv1d(x, weight, None, None, None, None, False, True)
    final.sum().backward()
    assert x.grad[0].sum(1).tolist() == [0, 0, 2, 2, 2]
    assert not weight.grad.any()


def test_wrong_bounds_stay_inside_the_tensors():
    x, weight = torch.randn(1, 6, 2, requires_grad=True), torch.randn(2, 4)
    states = torch.randn(3, 3, 2)
    for bounds in ([0, 900, -70, 6], [-(2**31), 2**31 - 1, 0, 2**31 - 1]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        for reverse in (False, True):
            y, final = op.causal_conv1d(x, weight, None, "silu", states, cu_seqlens, reverse, True)
            (y.sum() + final.sum()).backward()


def test_a_second_derivative_is_refused():
    x, weight = torch.randn(1, 5, 2, requires_grad=True), torch.randn(2, 4)
    y, _ = op.causal_conv1d(x, weight, None, None, None, None, False, False)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()


def test_opcheck():
    x, weight, bias = torch.randn(1, 6, 3), torch.randn(3, 4), torch.randn(3)
    states, cu_seqlens = torch.randn(2, 3, 3), torch.tensor([0, 2, 6], dtype=torch.int32)
    for t in (x, weight, bias, states):
        t.requires_grad_()
    torch.library.opcheck(
        torch.ops.mamba2_apps.causal_conv1d_triton,
        (x, weight, bias, True, states, cu_seqlens, True, True),
    )
    torch.library.opcheck(
        torch.ops.mamba2_apps.causal_conv1d_triton,
        (x, weight, None, False, None, None, False, False),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {"b": 3, "l": 1000, "d": 1792},
        {"b": 64, "l": 197, "d": 900, "activation": None},
        {"b": 2, "l": 50_001, "d": 130, "bias": False},
        {"b": 2, "l": 333, "d": 100, "width": 9},
        {"l": 3001, "d": 260, "bounds": [0, 1, 3, 4, 500, 501, 3000, 3001]},
        {"l": 2000, "d": 64, "bounds": list(range(0, 2001, 2))},
    ],
    ids=["lm", "vision", "long", "wide filter", "packed", "packed pairs"],
)
def test_on_the_gpu_twice_the_same(shape, reverse, dtype):
    for states in (False, True):
        arguments = {**shape, "dtype": dtype, "reverse": reverse, "states": states, "final": states}
        first = check("cuda", **arguments)
        second = check("cuda", **arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    shape = (1, 2**20 + 7, 2080)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(2080, 4, device="cuda")
    tail = x.detach()[:, -40:].requires_grad_()
    results = []
    for v in (x, tail):
        y, _ = op.causal_conv1d(v, weight, None, "silu", None, None, False, False)
        (dx,) = torch.autograd.grad(y, v, v.detach())
        results.append((y[:, -37:], dx[:, -37:]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
