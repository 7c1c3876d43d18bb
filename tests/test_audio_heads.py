"""The head over statistics: padding counts for nothing, and what does not change has a gradient."""

import pytest
import torch

from mamba2_apps.audio.heads import StatisticsHead


@pytest.mark.parametrize("length", [1, 2, 7])
def test_statistics_are_of_the_data_whatever_the_padding_holds(length):
    head = StatisticsHead(4, 3)
    clip = torch.randn(1, length, 4)
    alone = head(clip)
    spread = clip[0].std(0, correction=0).square().add(head.least).sqrt()
    expected = head.proj(torch.cat([clip[0].mean(0), spread]))
    torch.testing.assert_close(alone[0], expected)
    padded = torch.full((1, length + 5, 4), torch.nan)
    mask = torch.zeros(1, length + 5, dtype=torch.bool)
    padded[:, 2 : 2 + length], mask[:, 2 : 2 + length] = clip, True
    torch.testing.assert_close(head(padded, mask), alone)


def test_equal_tokens_have_a_finite_gradient():
    hidden = torch.ones(2, 5, 4, requires_grad=True)
    StatisticsHead(4, 3)(hidden).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_dropout_is_for_training_and_within_bounds():
    hidden = torch.randn(2, 5, 64)
    head = StatisticsHead(64, 3, dropout=0.5)
    assert not torch.equal(head(hidden), head(hidden))
    head.eval()
    assert torch.equal(head(hidden), head(hidden))
    with pytest.raises(ValueError, match=r"head\.dropout is 1\.0"):
        StatisticsHead(64, 3, dropout=1.0)
