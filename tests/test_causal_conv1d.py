"""The convolution on the torch backend, against PyTorch's own convolution in float64."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from mamba2_apps.kernels import causal_conv1d, causal_conv1d_torch


def random_inputs(b, l, d, width, sequences=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (b, l, d),
        "weight": (d, width),
        "bias": (d,),
        "initial_states": (sequences or b, width - 1, d),
    }
    return {
        k: torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_()
        for k, s in shapes.items()
    }


def expected_conv(x, weight, bias=None, initial_states=None, activation=None, reverse=False):
    window = weight.shape[1] - 1
    x = x.flip(1) if reverse else x
    before = x.new_zeros(x.shape[0], window, x.shape[2])
    extended = torch.cat([before if initial_states is None else initial_states, x], dim=1)
    y = F.conv1d(extended.mT, weight[:, None], bias, groups=x.shape[2]).mT
    y = F.silu(y) if activation == "silu" else y
    return y.flip(1) if reverse else y, extended[:, x.shape[1] :]


def assert_equal_with_gradients(actual, expected, inputs):
    def gradients(outputs):
        generator = torch.Generator().manual_seed(1)
        loss = sum(
            (o * torch.randn(o.shape, dtype=o.dtype, generator=generator)).sum() for o in outputs
        )
        return torch.autograd.grad(loss, inputs, retain_graph=True)

    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
    for a, e in zip(gradients(actual), gradients(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("shape", [(2, 9, 3, 4), (1, 1, 2, 4), (3, 2, 5, 4), (2, 7, 4, 2)], ids=str)
def test_is_the_convolution(shape, activation, reverse):
    inputs = random_inputs(*shape)
    options = {"activation": activation, "reverse": reverse}
    actual = causal_conv1d(**inputs, **options, return_final_states=True)
    assert_equal_with_gradients(actual, expected_conv(**inputs, **options), [*inputs.values()])


def test_width_one_and_no_bias():
    inputs = random_inputs(2, 5, 3, 1)
    x, weight = inputs["x"], inputs["weight"]
    y, states = causal_conv1d(x, weight, return_final_states=True)
    torch.testing.assert_close(y, x * weight[:, 0])
    assert states.shape == (2, 0, 3)


@pytest.mark.parametrize("reverse", [False, True])
def test_blocks_of_any_size_agree(monkeypatch, reverse):
    inputs = random_inputs(3, 50, 4, 4)
    options = {"activation": "silu", "reverse": reverse}
    expected = expected_conv(**inputs, **options)
    for elements in (4, 36, 420):
        monkeypatch.setattr(causal_conv1d_torch, "BLOCK_ELEMENTS", elements)
        actual = causal_conv1d(**inputs, **options, return_final_states=True)
        assert_equal_with_gradients(actual, expected, [*inputs.values()])


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_are_separate(reverse):
    cu_seqlens = torch.tensor([0, 1, 3, 9, 14], dtype=torch.int32)
    inputs = random_inputs(1, 14, 3, 4, sequences=4)
    options = {"activation": "silu", "reverse": reverse}
    actual = causal_conv1d(**inputs, **options, cu_seqlens=cu_seqlens, return_final_states=True)
    x, states = inputs["x"], inputs["initial_states"]
    pieces = [
        expected_conv(x[:, i:j], inputs["weight"], inputs["bias"], states[k : k + 1], **options)
        for k, (i, j) in enumerate(pairwise(cu_seqlens))
    ]
    y, final = zip(*pieces, strict=True)
    assert_equal_with_gradients(actual, (torch.cat(y, 1), torch.cat(final)), [*inputs.values()])


@pytest.mark.parametrize("reverse", [False, True])
def test_pieces_are_the_whole(reverse):
    inputs = random_inputs(2, 11, 3, 4)
    weight, bias, states = inputs["weight"], inputs["bias"], inputs["initial_states"]
    whole = causal_conv1d(inputs["x"], weight, bias, initial_states=states, reverse=reverse)
    pieces = list(inputs["x"].split([1, 2, 5, 3], dim=1))
    results = []
    for piece in reversed(pieces) if reverse else pieces:
        y, states = causal_conv1d(
            piece, weight, bias, initial_states=states, reverse=reverse, return_final_states=True
        )
        results.append(y)
    torch.testing.assert_close(torch.cat(results[::-1] if reverse else results, 1), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_sums_in_float32(dtype):
    inputs = {k: t.detach().float() for k, t in random_inputs(2, 50, 8, 4).items()}
    inputs["x"] = inputs["x"].to(dtype)
    y = causal_conv1d(**inputs, activation="silu")
    exact, _ = expected_conv(**{k: t.double() for k, t in inputs.items()}, activation="silu")
    assert y.dtype == dtype
    assert (y.double() - exact).norm() / exact.norm() < (6e-3 if dtype == torch.bfloat16 else 2e-3)


def test_registered_operator_compiles_and_exports():
    inputs = random_inputs(2, 9, 3, 4)
    expected = causal_conv1d(**inputs, activation="silu")
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, activation="silu"), expected)
    x, weight, bias = (inputs[k] for k in ("x", "weight", "bias"))
    operator, states = causal_conv1d_torch.convolve_taps, inputs["initial_states"]
    torch.library.opcheck(operator, (x, weight, bias, states, None, True, False))
    torch.library.opcheck(operator, (x, weight, None, None, None, False, True))

    class Model(torch.nn.Module):
        def forward(self, x, weight, bias):
            return causal_conv1d(x, weight, bias, activation="silu", reverse=True)

    tensors = (x.detach(), weight.detach(), bias.detach())
    program = torch.export.export(Model(), tensors)
    assert "mamba2_apps" not in str(program.graph)
    torch.testing.assert_close(program.module()(*tensors), Model()(*tensors))


def test_mistakes_name_the_argument():
    x, weight, bias, _ = random_inputs(2, 9, 3, 4).values()
    with pytest.raises(ValueError, match=r"x has shape \(9, 3\), expected \(b, l, d\)"):
        causal_conv1d(x[0], weight)
    with pytest.raises(ValueError, match=r"weight has shape \(3, 1, 4\), expected \(3, width\)"):
        causal_conv1d(x, weight[:, None])
    with pytest.raises(ValueError, match=r"bias has shape \(2,\), expected \(3,\)"):
        causal_conv1d(x, weight, bias[:2])
    with pytest.raises(ValueError, match="activation is 'relu', expected None or 'silu'"):
        causal_conv1d(x, weight, activation="relu")
    with pytest.raises(ValueError, match=r"initial_states has shape \(2, 4, 3\)"):
        causal_conv1d(x, weight, initial_states=torch.zeros(2, 4, 3, dtype=torch.float64))
