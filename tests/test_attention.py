"""Attention layers against a plain softmax with complex rotations.

batch b · seqlen l · heads h · key-value heads k · head_dim p · d_model d
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from mamba2_apps.attention import Attention

D_MODEL = 12
OPTIONS = {
    "plain": {"num_heads": 3},
    "rotary": {"num_heads": 3, "rotary_emb_dim": 4},
    "part rotary, interleaved": {
        "num_heads": 2,
        "rotary_emb_dim": 4,
        "rotary_emb_interleaved": True,
        "rotary_emb_base": 100.0,
    },
    "grouped, own head_dim": {"num_heads": 4, "num_heads_kv": 2, "head_dim": 6, "d_conv": 3},
    "as in mamba2attn": {
        "num_heads": 2,
        "head_dim": 8,
        "d_conv": 4,
        "rotary_emb_dim": 4,
        "qkv_proj_bias": False,
        "out_proj_bias": False,
    },
    "with an mlp": {"num_heads": 2, "mlp_dim": 10, "softmax_scale": 0.7},
}


def make(options, causal):
    torch.manual_seed(0)
    return Attention(D_MODEL, causal=causal, **options).double()


def rotate(x, options):
    """Rotary embedding as complex multiplication; x (b, l, heads, p)."""
    width = options.get("rotary_emb_dim", 0)
    if width == 0:
        return x
    turned, rest = x[..., :width], x[..., width:]
    interleaved = options.get("rotary_emb_interleaved", False)
    pairs = turned.unflatten(-1, (-1, 2)) if interleaved else turned.unflatten(-1, (2, -1)).mT
    frequency = options.get("rotary_emb_base", 1e4) ** (-torch.arange(0, width, 2) / width).double()
    angle = torch.arange(x.shape[1])[:, None] * frequency
    phase = torch.polar(torch.ones_like(angle), angle)[None, :, None]
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * phase)
    turned = pairs.flatten(-2) if interleaved else pairs.mT.flatten(-2)
    return torch.cat([turned, rest], dim=-1)


def reference(attention, options, causal, u):
    h, p = attention.num_heads, attention.head_dim
    k = options.get("num_heads_kv", h)
    mlp_dim = options.get("mlp_dim", 0)
    qkv, mlp = attention.in_proj(u).split([(h + 2 * k) * p, mlp_dim], dim=-1)
    if options.get("d_conv"):
        conv = attention.conv1d
        padded = F.pad(qkv.mT, (options["d_conv"] - 1, 0))
        qkv = F.conv1d(padded, conv.weight, conv.bias, groups=qkv.shape[2]).mT
    q, key, value = (t.unflatten(-1, (-1, p)) for t in qkv.split([h * p, k * p, k * p], dim=-1))
    q, key = rotate(q, options), rotate(key, options)
    key, value = (t.repeat_interleave(h // k, dim=2) for t in (key, value))
    scores = torch.einsum("bihp,bjhp->bhij", q, key) * options.get("softmax_scale", p**-0.5)
    if causal:
        future = torch.ones(u.shape[1], u.shape[1], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    y = torch.einsum("bhij,bjhp->bihp", scores.softmax(-1), value).flatten(2)
    if mlp_dim:
        up, gate = mlp.chunk(2, dim=-1)
        y = torch.cat([y, up * F.silu(gate)], dim=-1)
    return attention.out_proj(y)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_equals_plain_attention(options, causal):
    attention = make(options, causal)
    u = torch.randn(2, 9, D_MODEL, dtype=torch.float64, requires_grad=True)
    ours, theirs = attention(u), reference(attention, options, causal, u)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    inputs = [u, *attention.parameters()]
    grads = torch.autograd.grad(ours.sin().sum(), inputs)
    expected = torch.autograd.grad(theirs.sin().sum(), inputs)
    torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_padding_and_packing_are_as_if_each_row_stood_alone(options, causal):
    attention = make(options, causal)
    spans = [(0, 8), (3, 8), (0, 2), (1, 5), (4, 4)]
    u = torch.randn(len(spans), 8, D_MODEL, dtype=torch.float64)
    mask = torch.zeros(u.shape[:2], dtype=torch.bool)
    for row, (first, end) in enumerate(spans):
        mask[row, first:end] = True
    padded = u.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    out = attention(padded, mask=mask)
    alone = [attention(u[i : i + 1, first:end])[0] for i, (first, end) in enumerate(spans[:4])]
    torch.testing.assert_close(out[mask], torch.cat(alone))
    assert (out[~mask] == 0).all()
    (grad,) = torch.autograd.grad(out.square().sum(), padded)
    assert grad.isfinite().all()

    bounds = torch.tensor([0, 8, 13, 15, 19], dtype=torch.int32)
    packed = attention(u[mask][None], cu_seqlens=bounds)
    torch.testing.assert_close(packed[0], torch.cat(alone))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_cache_continues_rows_of_different_lengths(options):
    attention = make(options, causal=True)
    u = torch.randn(3, 14, D_MODEL, dtype=torch.float64)
    # Three pieces of each row; padding at either side, a row without data in the second.
    spans = [[(0, 5), (0, 4), (0, 5)], [(2, 5), (1, 3), (0, 5)], [(0, 2), (3, 3), (1, 4)]]
    state = attention.init_state(3)
    outputs = [[], [], []]
    for piece, (begin, end) in enumerate([(0, 5), (5, 9), (9, 14)]):
        mask = torch.zeros(3, end - begin, dtype=torch.bool)
        for row in range(3):
            mask[row, slice(*spans[row][piece])] = True
        kept = tree_map(torch.clone, state)
        out, following = attention(u[:, begin:end], mask=mask, state=state, return_state=True)
        torch.testing.assert_close(state, kept, rtol=0, atol=0)
        for row in range(3):
            outputs[row].append((u[row, begin:end][mask[row]], out[row][mask[row]]))
        state = following
    token = torch.randn(3, D_MODEL, dtype=torch.float64)
    last, state = attention.step(token, state)
    for row in range(3):
        inputs = torch.cat([piece for piece, _ in outputs[row]] + [token[row : row + 1]])
        whole = attention(inputs[None])[0]
        ours = torch.cat([piece for _, piece in outputs[row]] + [last[row : row + 1]])
        torch.testing.assert_close(ours, whole)
    assert state.lengths.tolist() == [15, 11, 6]


def test_parameters_are_those_of_mamba_ssm():
    attention = Attention(64, 4, num_heads_kv=2, d_conv=4, mlp_dim=32, rotary_emb_dim=8)
    assert {name: tuple(p.shape) for name, p in attention.state_dict().items()} == {
        "in_proj.weight": (128 + 32, 64),
        "in_proj.bias": (128 + 32,),
        "conv1d.weight": (128, 1, 4),
        "conv1d.bias": (128,),
        "out_proj.weight": (64, 64 + 16),
        "out_proj.bias": (64,),
    }


def test_what_makes_no_sense_is_refused():
    for options, message in [
        ({"num_heads": 5}, "num_heads=5"),
        ({"num_heads": 4, "num_heads_kv": 3}, "num_heads_kv=3"),
        ({"num_heads": 4, "rotary_emb_dim": 4}, "rotary_emb_dim=4"),
        ({"num_heads": 4, "mlp_dim": 3}, "mlp_dim=3"),
        ({"num_heads": 4, "d_conv": -1}, "d_conv=-1"),
        ({"num_heads": 4, "head_dim": 0}, "head_dim=0"),
        ({"num_heads": 4, "rotary_emb_base": 0}, "rotary_emb_base=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Attention(D_MODEL, **options)
    u = torch.randn(1, 4, D_MODEL)
    with pytest.raises(ValueError, match="return_state: attention that is not causal"):
        Attention(D_MODEL, 2)(u, return_state=True)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens: attention layers carry no state"):
        Attention(D_MODEL, 2, causal=True)(u, cu_seqlens=bounds, return_state=True)
