"""The Mamba-2 paper's claim, executed: three forms of one map, equal with their gradients."""

import pytest
import torch

from mamba2_apps.kernels.reference import (
    semiseparable_mask,
    ssd_chunked,
    ssd_quadratic,
    ssd_recurrent,
)

SHAPES = [  # b, l, h, p, g, n; lengths that no chunk size divides among them
    (2, 1, 2, 3, 1, 4),
    (1, 13, 4, 2, 2, 3),
    (2, 16, 3, 4, 3, 2),
    (1, 61, 2, 5, 1, 7),
]


def random_inputs(b, l, h, p, g, n):
    generator = torch.Generator().manual_seed(b + 10 * l + h)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    tensors = (
        normal(b, l, h, p),
        normal(b, l, h).exp(),
        -normal(h).exp(),
        normal(b, l, g, n),
        normal(b, l, g, n),
        normal(b, h, p, n),
    )
    return [t.requires_grad_() for t in tensors], normal(b, l, h, p), normal(b, h, p, n)


def outputs_and_gradients(form, inputs, dy, dstates):
    y, states = form(*inputs)
    loss = (y * dy).sum() + (states * dstates).sum()
    return y, states, *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "form",
    [ssd_quadratic, ssd_chunked, lambda *inputs: ssd_chunked(*inputs, chunk_size=5)],
    ids=["quadratic", "chunked", "chunked_by_5"],
)
def test_forms_are_one_map(shape, form):
    inputs, dy, dstates = random_inputs(*shape)
    expected = outputs_and_gradients(ssd_recurrent, inputs, dy, dstates)
    actual = outputs_and_gradients(form, inputs, dy, dstates)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", [ssd_quadratic, ssd_chunked])
def test_no_initial_state_is_a_zero_state(form):
    inputs, *_ = random_inputs(2, 9, 2, 3, 1, 4)
    *inputs, states = inputs
    for a, b in zip(form(*inputs), form(*inputs, torch.zeros_like(states)), strict=True):
        torch.testing.assert_close(a, b)


def test_mask_is_one_semiseparable():
    mask = semiseparable_mask(-torch.rand(6, dtype=torch.float64))
    assert torch.equal(mask, mask.tril())
    assert torch.equal(mask.diagonal(), torch.ones(6, dtype=torch.float64))
    for t in range(1, 6):  # every block on and below the diagonal has rank 1
        assert torch.linalg.matrix_rank(mask[t:, : t + 1]) == 1


def test_strong_decay_leaves_gradients_finite():
    inputs, dy, dstates = random_inputs(1, 70, 2, 3, 1, 4)
    inputs[2] = torch.full_like(inputs[2], -1e4).requires_grad_()
    for t in outputs_and_gradients(ssd_chunked, inputs, dy, dstates):
        assert t.isfinite().all()
