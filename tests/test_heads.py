"""Heads: shapes, masks, and that padding never reaches an answer. batch b · seqlen l · d_model d"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mamba2_apps.heads import (
    CTCHead,
    EmbeddingHead,
    LanguageModelHead,
    PooledHead,
    TokenHead,
    TrackHead,
    pool_tokens,
)

SPANS = [(0, 7), (2, 5), (6, 7), (3, 3)]


def batch():
    torch.manual_seed(0)
    hidden = torch.randn(len(SPANS), 7, 6)
    mask = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    for row, (first, end) in enumerate(SPANS):
        mask[row, first:end] = True
    return hidden, mask


def test_pooling_reads_data_only():
    hidden, mask = batch()
    garbage = hidden.masked_fill(~mask[..., None], torch.nan)
    for row, (first, end) in enumerate(SPANS[:3]):
        mean = pool_tokens(garbage, mask, "mean")[row]
        torch.testing.assert_close(mean, hidden[row, first:end].mean(0))
        assert torch.equal(pool_tokens(garbage, mask, "last")[row], hidden[row, end - 1])
    assert (pool_tokens(garbage, mask, "mean")[3] == 0).all()
    assert (pool_tokens(garbage, mask, "last")[3] == 0).all()
    assert torch.equal(pool_tokens(hidden, None, "mean"), hidden.mean(1))
    assert torch.equal(pool_tokens(hidden, None, "last"), hidden[:, -1])
    assert torch.equal(pool_tokens(hidden, mask, 3), hidden[:, 3])


@pytest.mark.parametrize("pool", ["max", True, None, 1.5])
def test_unknown_pools_are_named(pool):
    with pytest.raises(ValueError, match=f"pool={pool!r}"):
        PooledHead(6, 2, pool=pool)


def test_pooled_head():
    hidden, mask = batch()
    head = PooledHead(6, 3, pool="last")
    torch.testing.assert_close(head(hidden, mask)[1], head.proj(hidden[1, 4]))
    assert head(hidden).shape == (4, 3)


def test_token_head_is_zero_at_padding():
    hidden, mask = batch()
    head = TokenHead(6, 3)
    out = head(hidden, mask)
    assert (out[~mask] == 0).all()
    torch.testing.assert_close(out[mask], head(hidden)[mask])


def test_ctc_head_fits_torch_and_is_silent_at_padding():
    hidden, mask = batch()
    head = CTCHead(6, 4)
    scores = head(hidden.bfloat16().float(), mask)
    assert scores.shape == (4, 7, 5)
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(4, 7))
    assert (scores[~mask].argmax(-1) == head.blank).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(hidden).dtype == torch.float32
    loss = F.ctc_loss(
        scores[:1].transpose(0, 1), torch.tensor([[1, 4]]), torch.tensor([7]), torch.tensor([2])
    )
    loss.backward()
    assert loss.isfinite()
    assert head.proj.weight.grad.isfinite().all()


def test_track_head_bins_data_only():
    hidden, mask = batch()
    head = TrackHead(6, 2, bin_size=3)
    out = head(hidden.masked_fill(~mask[..., None], torch.nan), mask)
    assert out.shape == (4, 3, 2)
    torch.testing.assert_close(out[1, 0], head.proj(hidden[1, 2]))
    torch.testing.assert_close(out[1, 1], head.proj(hidden[1, 3:5].mean(0)))
    torch.testing.assert_close(out[0, 2], head.proj(hidden[0, 6]))
    assert (out[1, 2] == 0).all()
    assert (out[3] == 0).all()
    torch.testing.assert_close(TrackHead(6, 2)(hidden).shape, torch.Size((4, 7, 2)))
    with pytest.raises(ValueError, match="bin_size=0"):
        TrackHead(6, 2, bin_size=0)


def test_language_model_head_can_share_the_embedding():
    embedding = nn.Embedding(10, 6)
    head = LanguageModelHead(6, 10, tied_to=embedding)
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    assert sum(p.numel() for p in model.parameters()) == 60
    hidden, _ = batch()
    torch.testing.assert_close(head(hidden), hidden @ embedding.weight.T)
    assert LanguageModelHead(6, 10)(hidden).shape == (4, 7, 10)
    with pytest.raises(ValueError, match=r"tied_to: its weight is \(10, 6\)"):
        LanguageModelHead(6, 11, tied_to=embedding)


def test_embedding_head():
    hidden, mask = batch()
    torch.testing.assert_close(
        EmbeddingHead(normalize=True)(hidden, mask)[:3].norm(dim=1), torch.ones(3)
    )
    assert EmbeddingHead(pool=0)(hidden).equal(hidden[:, 0])
