"""The gated norm on the torch backend, against its definition in float64."""

import pytest
import torch
import torch.nn.functional as F

from mamba2_apps.kernels import gated_rms_norm


def random_inputs(shape, gate=True):
    generator = torch.Generator().manual_seed(len(shape))
    shapes = {"x": shape, "weight": shape[-1:]} | ({"z": shape} if gate else {})
    return {
        k: torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_()
        for k, s in shapes.items()
    }


def expected_norm(x, weight, z=None, eps=1e-5, group_size=None, norm_before_gate=False):
    v = x if z is None or norm_before_gate else x * F.silu(z)
    groups = v.unflatten(-1, (-1, group_size or x.shape[-1]))
    normed = groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()
    y = normed.flatten(-2) * weight
    return y * F.silu(z) if z is not None and norm_before_gate else y


OPTIONS = [
    {},
    {"norm_before_gate": True},
    {"group_size": 4},
    {"group_size": 2, "norm_before_gate": True, "eps": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 12)], ids=str)
def test_is_the_definition(shape, gate, options):
    inputs = random_inputs(shape, gate)
    actual, expected = gated_rms_norm(**inputs, **options), expected_norm(**inputs, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(expected)
    for a, e in zip(
        torch.autograd.grad(actual, [*inputs.values()], dy),
        torch.autograd.grad(expected, [*inputs.values()], dy),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def test_rows_beyond_one_block():
    inputs = random_inputs((300, 512))
    torch.testing.assert_close(gated_rms_norm(**inputs), expected_norm(**inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_are_wide(dtype):
    inputs = {k: t.detach() for k, t in random_inputs((4, 64)).items()}
    inputs["x"] = (inputs["x"] * 300).to(dtype)  # whose squares overflow float16
    inputs["z"] = inputs["z"].to(dtype)
    inputs["weight"] = inputs["weight"].float()
    y = gated_rms_norm(**inputs)
    exact = expected_norm(**{k: t.double() for k, t in inputs.items()})
    assert y.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}[dtype]
    assert (y.double() - exact).norm() / exact.norm() < tolerance


def test_registered_operator_compiles_and_exports():
    inputs = random_inputs((2, 3, 8))
    compiled = torch.compile(gated_rms_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), gated_rms_norm(**inputs))
    x, weight, z = inputs.values()
    operator = torch.ops.mamba2_apps.normalise_and_gate.default
    torch.library.opcheck(operator, (x, weight, z, 1e-5, 4, True))
    torch.library.opcheck(operator, (x, weight, None, 1e-5, 8, False))

    class Model(torch.nn.Module):
        def forward(self, x, weight, z):
            return gated_rms_norm(x, weight, z, group_size=4)

    tensors = tuple(t.detach() for t in inputs.values())
    program = torch.export.export(Model(), tensors)
    assert "mamba2_apps" not in str(program.graph)
    torch.testing.assert_close(program.module()(*tensors), Model()(*tensors))


def test_mistakes_name_the_argument():
    x, weight, z = random_inputs((5, 8)).values()
    with pytest.raises(ValueError, match=r"weight has shape \(7,\), expected \(8,\)"):
        gated_rms_norm(x, weight[:7])
    with pytest.raises(ValueError, match=r"z has shape \(4, 8\), expected \(5, 8\)"):
        gated_rms_norm(x, weight, z[:4])
    with pytest.raises(ValueError, match="group_size is 3, expected a divisor of x's 8 channels"):
        gated_rms_norm(x, weight, group_size=3)
    with pytest.raises(ValueError, match="eps is -1"):
        gated_rms_norm(x, weight, eps=-1)
    with pytest.raises(ValueError, match=r"z has dtype torch.float32 and x torch.float64"):
        gated_rms_norm(x, weight, z.float())
