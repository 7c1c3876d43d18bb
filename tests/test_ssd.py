"""The public SSD operators on the torch backend, against the recurrent form in float64."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from mamba2_apps.kernels import ssd, ssd_bidirectional, ssd_step, ssd_torch
from mamba2_apps.kernels.reference import ssd_recurrent

INFINITY = float("inf")


def random_inputs(b, l, h, p, g, n, dtype=torch.float64, **extra):
    """Named float64 leaves; `extra` adds D, z, dt_bias, initial_states by their shapes."""
    generator = torch.Generator().manual_seed(l + 100 * h + n)
    shapes = {
        "x": (b, l, h, p),
        "dt": (b, l, h),
        "A": (h,),
        "B": (b, l, g, n),
        "C": (b, l, g, n),
        **extra,
    }
    tensors = {k: torch.randn(s, dtype=dtype, generator=generator) for k, s in shapes.items()}
    tensors["A"] = -tensors["A"].exp()
    return {k: t.requires_grad_() for k, t in tensors.items()}


def expected_ssd(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None,
    dt_softplus=False, dt_limit=(0.0, INFINITY), reverse=False,
):  # fmt: skip
    """api: discretise, scan by the recurrent form, skip, gate; by hand, one row of text each."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    flip = (lambda t: t.flip(1)) if reverse else (lambda t: t)
    y, states = ssd_recurrent(flip(x), flip(dt), A, flip(B), flip(C), initial_states)
    y = flip(y)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]) * x
    return (y if z is None else y * F.silu(z)), states


def gradients(outputs, inputs):
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (o * torch.randn(o.shape, dtype=o.dtype, generator=generator)).sum() for o in outputs
    )
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def relative_error(actual, expected):
    """‖actual − expected‖ / ‖expected‖, but sums that cancel to nothing are held to 1e-3."""
    error, norm = (actual.double() - expected.double()).norm(), expected.double().norm()
    return (error / norm.clamp(min=1e-3)).item()


def assert_equal_with_gradients(actual, expected, inputs, tolerance=1e-10):
    pairs = [*zip(actual, expected, strict=True)]
    pairs += zip(gradients(actual, inputs), gradients(expected, inputs), strict=True)
    for a, e in pairs:
        assert a.shape == e.shape
        assert relative_error(a, e) < tolerance


VARIANTS = {
    "plain": ({}, {}),
    "initial_states": ({"initial_states": "states"}, {}),
    "reverse": ({"initial_states": "states"}, {"reverse": True}),
    "skip": ({"D": "heads"}, {}),
    "skip_per_channel_and_gate": ({"D": "channels", "z": "x"}, {}),
    "softplus": ({"dt_bias": "heads"}, {"dt_softplus": True}),
    "limits": ({"dt_bias": "heads"}, {"dt_softplus": True, "dt_limit": (0.3, 1.2)}),
    "all": (
        {"D": "heads", "z": "x", "dt_bias": "heads", "initial_states": "states"},
        {"dt_softplus": True, "dt_limit": (0.1, 2.0), "reverse": True},
    ),
}
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 67, 4, 3, 2, 5), (3, 64, 2, 2, 1, 3), (1, 200, 3, 4, 3, 2)]


def variant_inputs(variant, b, l, h, p, g, n):
    shapes = {"heads": (h,), "channels": (h, p), "x": (b, l, h, p), "states": (b, h, p, n)}
    extra, options = VARIANTS[variant]
    return random_inputs(b, l, h, p, g, n, **{k: shapes[v] for k, v in extra.items()}), options


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ssd_is_the_recurrence(variant, shape):
    inputs, options = variant_inputs(variant, *shape)
    actual = ssd(**inputs, **options, return_final_states=True)
    assert_equal_with_gradients(actual, expected_ssd(**inputs, **options), [*inputs.values()])


def test_blocks_of_any_size_agree(monkeypatch):
    inputs, options = variant_inputs("all", 3, 150, 2, 4, 1, 3)
    expected = expected_ssd(**inputs, **options)
    for chunk, elements in ((7, 1), (16, 300), (200, 2**20)):
        monkeypatch.setattr(ssd_torch, "CHUNK", chunk)
        monkeypatch.setattr(ssd_torch, "BLOCK_ELEMENTS", elements)
        actual = ssd(**inputs, **options, return_final_states=True)
        assert_equal_with_gradients(actual, expected, [*inputs.values()])


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_are_separate(reverse):
    lengths = [1, 64, 3, 70]
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    inputs = random_inputs(
        1, sum(lengths), 4, 3, 2, 5, D=(4,), z=(1, sum(lengths), 4, 3), initial_states=(4, 4, 3, 5)
    )
    options = {"reverse": reverse, "dt_softplus": True}
    actual = ssd(**inputs, **options, cu_seqlens=cu_seqlens, return_final_states=True)
    pieces = []
    for i, (start, end) in enumerate(pairwise(cu_seqlens)):
        piece = {k: t[:, start:end] if t.dim() > 2 else t for k, t in inputs.items()}
        piece["initial_states"] = inputs["initial_states"][i : i + 1]
        pieces.append(expected_ssd(**piece, **options))
    y, states = zip(*pieces, strict=True)
    expected = torch.cat(y, 1), torch.cat(states)
    assert_equal_with_gradients(actual, expected, [*inputs.values()])


@pytest.mark.parametrize("per_direction", ["", "x", "BC", "xBC"])
@pytest.mark.parametrize("packed", [False, True])
def test_bidirectional_is_the_sum_of_two_scans(per_direction, packed):
    b, l, h, p, g, n = 1 if packed else 2, 70, 2, 3, 1, 4
    cu_seqlens = torch.tensor([0, 5, 70], dtype=torch.int32) if packed else None
    inputs = random_inputs(b, l, h, p, g, n, D=(h,))
    sequences = 2
    for name, shape in {
        "dt": (2, b, l, h),
        "A": (2, h),
        "dt_bias": (2, h),
        "initial_states": (2, sequences, h, p, n),
        **{k: (2, *inputs[k].shape) for k in per_direction},
    }.items():
        inputs[name] = torch.randn(shape, dtype=torch.float64)
    inputs["A"] = -inputs["A"].exp()
    inputs = {k: t.detach().requires_grad_() for k, t in inputs.items()}
    options = {"dt_softplus": True, "cu_seqlens": cu_seqlens, "return_final_states": True}
    actual = ssd_bidirectional(**inputs, **options)

    def one(i):
        mine = {k: t[i] for k, t in inputs.items() if k != "D" and (k not in "xBC" or t.dim() == 5)}
        shared = {k: t for k, t in inputs.items() if k in "xBC" and t.dim() == 4}
        return ssd(**mine, **shared, **options, reverse=i == 1)

    (y0, s0), (y1, s1) = one(0), one(1)
    x = inputs["x"].sum(0) if "x" in per_direction else inputs["x"]
    expected = y0 + y1 + inputs["D"][:, None] * x, torch.stack([s0, s1])
    assert_equal_with_gradients(actual, expected, [*inputs.values()])


@pytest.mark.parametrize("variant", ["plain", "all", "skip_per_channel_and_gate", "limits"])
def test_steps_are_the_scan(variant):
    inputs, options = variant_inputs(variant, 2, 6, 4, 3, 2, 5)
    options.pop("reverse", None)
    expected, expected_state = ssd(**inputs, **options, return_final_states=True)
    state = inputs.pop("initial_states", torch.zeros(2, 4, 3, 5, dtype=torch.float64))
    given = state.detach().clone()
    for t in range(6):
        token = {k: v[:, t] if v.dim() > 2 else v for k, v in inputs.items()}
        y, state = ssd_step(state, **token, **options)
        torch.testing.assert_close(y, expected[:, t], rtol=1e-10, atol=1e-12)
        if t == 0:
            first_state = state
    torch.testing.assert_close(state, expected_state, rtol=1e-10, atol=1e-12)
    assert first_state is not state
    if "initial_states" in VARIANTS[variant][0]:
        assert given.isfinite().all()


TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}
DT_TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1.5e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_accuracy_in_lower_precision(dtype):
    inputs, options = variant_inputs("all", 2, 130, 4, 8, 2, 16)
    half = ("x", "dt", "B", "C", "z")
    low = {
        k: t.detach().to(dtype if k in half else torch.float32).requires_grad_()
        for k, t in inputs.items()
    }
    exact = {k: t.detach().double().requires_grad_() for k, t in low.items()}
    actual = ssd(**low, **options, return_final_states=True)
    expected = ssd(**exact, **options, return_final_states=True)
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.float32
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < TOLERANCES[dtype]
    for name, a, e in zip(
        low,
        gradients(actual, [*low.values()]),
        gradients([e.to(a.dtype) for a, e in zip(actual, expected, strict=True)], exact.values()),
        strict=True,
    ):
        assert a.dtype == low[name].dtype
        tolerances = DT_TOLERANCES if name in ("dt", "A", "dt_bias") else TOLERANCES
        assert relative_error(a, e) < tolerances[dtype], name


def test_any_strides():
    inputs, options = variant_inputs("all", 2, 20, 4, 3, 2, 5)
    expected = ssd(**inputs, **options)
    strided = {k: t.detach().movedim(0, -1).contiguous().movedim(-1, 0) for k, t in inputs.items()}
    torch.testing.assert_close(ssd(**strided, **options), expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_trains_after_inference(mode):
    inputs, options = variant_inputs("all", 2, 150, 4, 3, 2, 5)
    with mode():
        expected = ssd(**{k: t.detach() for k, t in inputs.items()}, **options)
    actual = ssd(**inputs, **options)
    assert torch.equal(actual, expected)
    assert all(g.isfinite().all() for g in gradients([actual], [*inputs.values()]))


def test_inputs_are_not_modified():
    inputs, options = variant_inputs("all", 2, 70, 4, 3, 2, 5)
    before = {k: t.detach().clone() for k, t in inputs.items()}
    y = ssd(**inputs, **options)
    y.sum().backward()
    assert all(torch.equal(before[k], t) for k, t in inputs.items())


def test_autocast_casts_the_inputs_and_nothing_else():
    inputs, options = variant_inputs("all", 1, 70, 2, 3, 1, 4)
    inputs = {k: t.detach().float().requires_grad_() for k, t in inputs.items()}
    leaves = [*inputs.values()]
    half = {k: t.bfloat16() if k in ("x", "dt", "B", "C", "z") else t for k, t in inputs.items()}
    expected = ssd(**half, **options, return_final_states=True)
    expected_gradients = gradients(expected, leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = ssd(**inputs, **options, return_final_states=True)
        actual_gradients = gradients(actual, leaves)
    assert [t.dtype for t in actual] == [torch.bfloat16, torch.float32]
    for a, e in zip((*actual, *actual_gradients), (*expected, *expected_gradients), strict=True):
        assert torch.equal(a, e)


def test_registered_operators():
    x, dt, A, B, C, D, states = (
        t.detach().requires_grad_()
        for t in random_inputs(1, 70, 2, 3, 1, 4, D=(2, 3), initial_states=(2, 2, 3, 4)).values()
    )
    cu_seqlens = torch.tensor([0, 3, 70], dtype=torch.int32)
    dt = dt.detach().exp().requires_grad_()
    torch.library.opcheck(ssd_torch.ssd_scan, (x, dt, A, B, C, D, states, cu_seqlens, True))
    torch.library.opcheck(ssd_torch.ssd_scan, (x, dt, A, B, C, None, None, None, True))
    detached = [t.detach() for t in (x, dt, A, B, C)]
    torch.library.opcheck(ssd_torch.ssd_scan, (*detached, None, None, None, False))


def test_compiles_without_a_graph_break():
    inputs, options = variant_inputs("all", 1, 20, 2, 3, 1, 4)
    compiled = torch.compile(ssd, fullgraph=True, backend="aot_eager")
    expected = ssd(**inputs, **options)
    actual = compiled(**inputs, **options)
    assert_equal_with_gradients([actual], [expected], [*inputs.values()])


class Scan(torch.nn.Module):
    def forward(self, x, dt, A, B, C):
        forward = ssd(x, dt, A, B, C, dt_softplus=True)
        pair = torch.stack([dt, dt])
        return forward + ssd_bidirectional(x, pair, torch.stack([A, A]), B, C, dt_softplus=True)


def test_exports_to_aten_alone():
    inputs = tuple(t.detach() for t in random_inputs(2, 70, 2, 3, 1, 4).values())
    program = torch.export.export(Scan(), inputs)
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert called
    assert not [name for name in called if "mamba2_apps" in name]
    torch.testing.assert_close(program.module()(*inputs), Scan()(*inputs))


def test_meta_tensors_have_shapes():
    inputs, options = variant_inputs("all", 2, 70, 4, 3, 2, 5)
    meta = {k: t.detach().to("meta") for k, t in inputs.items()}
    y, states = ssd(**meta, **options, return_final_states=True)
    assert y.is_meta
    assert y.shape == (2, 70, 4, 3)
    assert states.shape == (2, 4, 3, 5)


MISTAKES = {
    "x_dims": ({"x": (2, 7, 12)}, r"x has shape \(2, 7, 12\), expected \(b, l, h, p\)"),
    "empty_batch": ({"x": (0, 7, 4, 3)}, "must not be empty"),
    "empty_sequence": ({"x": (2, 0, 4, 3)}, "must not be empty"),
    "dt": ({"dt": (2, 6, 4)}, r"dt has shape \(2, 6, 4\), expected \(2, 7, 4\)"),
    "A": ({"A": (3,)}, r"A has shape \(3,\), expected \(4,\)"),
    "groups": ({"B": (2, 7, 3, 5), "C": (2, 7, 3, 5)}, "B has 3 groups, expected a divisor of .*4"),
    "C": ({"C": (2, 7, 2, 6)}, r"C has shape \(2, 7, 2, 6\), expected \(2, 7, 2, 5\)"),
    "D": ({"D": (4, 2)}, r"D has shape \(4, 2\), expected \(4, 3\)"),
    "z": ({"z": (2, 7, 4, 2)}, "z has shape"),
    "dt_bias": ({"dt_bias": (2,)}, "dt_bias has shape"),
    "initial_states": ({"initial_states": (2, 4, 5, 3)}, "initial_states has shape"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_shape_mistakes_name_the_argument(mistake):
    shapes, message = MISTAKES[mistake]
    inputs = random_inputs(2, 7, 4, 3, 2, 5)
    inputs |= {k: torch.zeros(s, dtype=torch.float64) for k, s in shapes.items()}
    with pytest.raises(ValueError, match=message):
        ssd(**inputs)


def test_other_mistakes_name_the_argument():
    inputs = random_inputs(1, 7, 4, 3, 2, 5)
    with pytest.raises(ValueError, match=r"B has dtype torch.float32 and x torch.float64"):
        ssd(**inputs | {"B": inputs["B"].float()})
    with pytest.raises(ValueError, match=r"x has dtype torch.int64"):
        ssd(**inputs | {"x": inputs["x"].long()})
    with pytest.raises(ValueError, match="C is on meta and x on cpu"):
        ssd(**inputs | {"C": inputs["C"].to("meta")})
    with pytest.raises(ValueError, match=r"dt_limit is \(1.0, 0.5\)"):
        ssd(**inputs, dt_limit=(1.0, 0.5))
    with pytest.raises(ValueError, match=r"dt_limit is \(-1.0, 1.0\), expected .* with 0 <= low"):
        ssd(**inputs, dt_limit=(-1.0, 1.0))
    with pytest.raises(ValueError, match="backend is 'cuda', expected one of 'auto'"):
        ssd(**inputs, backend="cuda")
    with pytest.raises(RuntimeError, match="cannot run here"):
        ssd(**inputs, backend="triton")


@pytest.mark.parametrize(
    "values", [[0, 3], [1, 7], [0, 5, 5, 7], [0, 5, 3, 7]], ids=["short", "late", "empty", "falls"]
)
def test_bad_packs_are_named(values):
    inputs = random_inputs(1, 7, 4, 3, 2, 5)
    with pytest.raises(ValueError, match=r"cu_seqlens is .*rise from 0 to 7"):
        ssd(**inputs, cu_seqlens=torch.tensor(values, dtype=torch.int32))


def test_pack_needs_one_row_and_int32():
    inputs = random_inputs(2, 7, 4, 3, 2, 5)
    with pytest.raises(ValueError, match="batch size 2, expected 1"):
        ssd(**inputs, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"cu_seqlens has dtype torch.int64, expected torch.int32"):
        ssd(**random_inputs(1, 7, 4, 3, 2, 5), cu_seqlens=torch.tensor([0, 7]))
