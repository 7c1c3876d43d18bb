"""Strand symmetry of DNA models, on every path, with padding; and what they refuse."""

import copy
from functools import partial

import pytest
import torch

from mamba2_apps import export
from mamba2_apps.backbone import BackboneConfig
from mamba2_apps.genomics.adapter import TokenEmbedding
from mamba2_apps.genomics.models import CenterHead, DNAModel, MLPHead
from mamba2_apps.genomics.tokenizers import BaseTokenizer
from mamba2_apps.heads import LanguageModelHead, PooledHead, TokenHead, TrackHead

TOKENS = BaseTokenizer()
HEADS = {
    "pooled": PooledHead,
    "last": partial(PooledHead, pool="last"),
    "token": TokenHead,
    "mlp": MLPHead,
    "track": partial(TrackHead, bin_size=2),
    "lm": LanguageModelHead,
}
PAIRS = [[1, 2]]


def model(head="token", *, bidirectional=True, n_layer=2, tokenizer=None, adapter=None, **options):
    torch.manual_seed(0)
    config = BackboneConfig(
        16,
        n_layer,
        d_state=8,
        headdim=8,
        bidirectional=bidirectional,
        **options.pop("backbone", {}),
    )
    adapter = {"maskable": True, "tokenizer": tokenizer} | (adapter or {})
    built = DNAModel(
        0 if head == "lm" else 4,
        adapter=partial(TokenEmbedding, **adapter),
        backbone=config,
        head=HEADS[head],
        **options,
    )
    return built.eval()


def rows(lengths, width, *, left=0):
    """Ids (b, width) of random sequences with padding, the mask, and both of the other strand."""
    generator = torch.Generator().manual_seed(1)
    ids, other = (torch.full((len(lengths), width), 3) for _ in range(2))
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        sequence = torch.randint(0, 15, (length,), generator=generator)
        ids[row, left : left + length] = sequence
        other[row, left : left + length] = TOKENS.reverse_complement(sequence)
        mask[row, left : left + length] = True
    return ids, other, mask


def reversed_data(outputs, mask):
    """Outputs (b, l, k) with the data of each row in reversed order."""
    turned = outputs.clone()
    for row, kept in enumerate(mask):
        turned[row, kept] = outputs[row, kept].flip(0)
    return turned


def swapped(outputs, head):
    order = TOKENS.complement if head == "lm" else torch.tensor([0, 2, 1, 3])
    return outputs[..., order]


@pytest.mark.parametrize("path", ["plain", "mixing", "packed", "checkpointed", "context"])
@pytest.mark.parametrize("head", list(HEADS))
def test_the_other_strand_gives_the_same_answer(head, path):
    options = {"strands": "equivariant", "strand_pairs": PAIRS, "strand_mixing": path != "plain"}
    if path == "packed":
        options["packed"] = True
    if path == "checkpointed":
        options["backbone"] = {"gradient_checkpointing": True}
    if path == "context":
        options["adapter"] = {"context": 5, "positions": 14, "period": 3}
    lengths = [12, 12, 12] if head == "track" else [12, 7, 9]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        net = model(head, **options).to(dtype)
        net.train(path == "checkpointed")
        for left in (0, 2):
            width = 12 if head == "track" else 14
            if head == "track" and left:
                continue
            ids, other, mask = rows(lengths, width, left=left)
            ours, theirs = net(ids, mask), net(other, mask)
            if head == "track":
                turned = theirs.flip(1)
            else:
                turned = theirs if theirs.dim() == 2 else reversed_data(theirs, mask)
            expected = swapped(turned, head)
            shown = mask if ours.dim() == 3 and head != "track" else ...
            assert (ours - expected)[shown].abs().max() < tolerance
            assert (ours - theirs)[shown].abs().max() > 100 * tolerance or head in ("pooled",)
            hidden = net.features(ids, mask)[0]
            mirrored = reversed_data(net.features(other, mask)[0], mask)
            assert (hidden - mirrored)[mask].abs().max() < tolerance
            assert (net.embed(ids, mask) - net.embed(other, mask)).abs().max() < tolerance


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_answers_as_its_rows_do_alone_and_so_do_gradients(packed):
    options = {"strands": "equivariant", "strand_mixing": True}
    net = model("lm", packed=packed, **options).double()
    ids, _, mask = rows([12, 1, 9, 0], 15, left=2)
    outputs = net(ids, mask)
    outputs[mask].square().sum().backward()
    whole = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    for row in range(3):
        alone = net(ids[row, mask[row]][None])
        torch.testing.assert_close(outputs[row, mask[row]], alone[0], rtol=0, atol=1e-10)
        alone.square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-9, atol=1e-9)


def test_strands_see_each_other_only_with_mixing():
    ids, other, _ = rows([12], 12)
    for mixing in (False, True):
        net = model("token", strands="equivariant", strand_mixing=mixing).double()
        alone = net.backbone(net.adapter(torch.cat([ids, other]))[0])  # hooks mix here, too
        net.strands = "single"
        one_strand = model("token").double()
        one_strand.load_state_dict(net.state_dict(), strict=False)
        same = torch.equal(one_strand.features(ids)[0][0], alone[0])
        assert same != mixing
    copied = copy.deepcopy(net)
    with torch.no_grad():
        net.mixing[0].proj.weight.zero_()
    pair = torch.cat([ids, other])
    assert not torch.equal(copied(pair), net(pair))  # a copy's hooks are its own


def test_average_is_both_strands_in_use_and_one_in_training():
    ids, other, mask = rows([12, 7], 14)
    net = model("pooled", bidirectional=False, strands="average").double()
    single = model("pooled", bidirectional=False).double()
    mean = (single(ids, mask) + single(other, mask)) / 2
    torch.testing.assert_close(net(ids, mask), mean, rtol=0, atol=1e-10)
    net.train()
    torch.testing.assert_close(net(ids, mask), single(ids, mask), rtol=0, atol=0)


@pytest.mark.parametrize(("head", "layout"), [("pooled", "torch"), ("token", "onnx")])
def test_both_strands_are_exported_with_a_free_batch_size(tmp_path, head, layout):
    if layout == "onnx":
        pytest.importorskip("onnxruntime")
    one = model(head, strands="equivariant", strand_pairs=PAIRS, strand_mixing=True, n_layer=1)
    program = export.trace(one, (rows([24, 24], 24)[0],))
    write = export._write_onnx if layout == "onnx" else export._write_program
    call = write(program, tmp_path / "model")
    for size in (1, 3):
        ids, _, _ = rows([24] * size, 24)
        torch.testing.assert_close(call((ids,)), one(ids))


def test_hiding_a_base_hides_it_on_both_strands():
    ids, _, _ = rows([12], 12)
    hide = torch.zeros_like(ids, dtype=torch.bool)
    hide[0, 3] = True
    net = model("lm", strands="equivariant").double()
    outputs = net(ids, None, hide)
    changed = ids.clone()
    changed[0, 3] = (ids[0, 3] + 1) % 15
    torch.testing.assert_close(net(changed, None, hide), outputs, rtol=0, atol=0)
    assert not torch.equal(net(changed), net(ids))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strands": "equivariant", "bidirectional": False}, "causal.*future"),
        ({"strands": "average", "bidirectional": False}, "causal.*future"),
        ({"strands": "both"}, "strands is 'both'"),
        ({"strand_mixing": True}, "needs strands equivariant"),
        ({"strands": "equivariant", "strand_pairs": [[1, 9]]}, r"\[1, 9\]"),
        ({"strands": "equivariant", "strand_pairs": [[1, 2], [2, 3]]}, r"\[2, 3\]"),
        (
            {"strands": "equivariant", "tokenizer": {"kind": "kmer", "overlapping": False}},
            "non-overlapping k-mers",
        ),
        (
            {"packed": True, "backbone": {"attn_layer_idx": (0,), "attn_cfg": {"num_heads": 2}}},
            "packed",
        ),
    ],
)
def test_impossible_models_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        model(**options)


def test_bins_of_two_strands_must_meet():
    net = model("track", strands="equivariant")
    with pytest.raises(ValueError, match="no multiple of"):
        net(rows([13], 13)[0])


def test_the_center_head_reads_the_middle():
    head = CenterHead(3, 2, width=2)
    hidden = torch.randn(4, 10, 3)
    expected = torch.cat([hidden[:, 4], hidden[:, 5], hidden.mean(1)], 1)
    torch.testing.assert_close(head(hidden), head.proj(expected))
    deeper = CenterHead(3, 2, width=2, hidden=5)
    between = torch.nn.functional.gelu(deeper.hidden[0](expected))
    torch.testing.assert_close(deeper(hidden), deeper.proj(between))
    with pytest.raises(ValueError, match=r"head\.hidden is -1"):
        CenterHead(3, 2, hidden=-1)
    mask = torch.ones(4, 10, dtype=torch.bool)
    mask[0, 9] = False
    with pytest.raises(ValueError, match="no common middle"):
        head(hidden, mask)


def test_places_count_from_the_first_data():
    embed = TokenEmbedding(4, positions=8)
    ids, _, mask = rows([5], 8, left=3)
    padded = embed(ids, mask)[0][0, 3:]
    torch.testing.assert_close(padded, embed(ids[:, 3:])[0][0])
    with pytest.raises(ValueError, match="knows 8 places"):
        embed(torch.zeros(1, 9, dtype=torch.int64))


def test_phases_count_from_the_first_data():
    embed = TokenEmbedding(4, period=3)
    ids, _, mask = rows([5], 8, left=3)
    padded = embed(ids, mask)[0][0, 3:]
    alone = embed(ids[:, 3:])[0][0]
    torch.testing.assert_close(padded, alone)
    same = embed(torch.zeros(1, 9, dtype=torch.int64))[0][0]
    torch.testing.assert_close(same[:3], same[3:6])
    assert (same[0] - same[1]).abs().max() > 0.1
    with pytest.raises(ValueError, match=r"adapter\.period"):
        model("token", bidirectional=False, adapter={"period": 3})


def test_token_dropout_hides_tokens_in_training_only():
    torch.manual_seed(0)
    embed = TokenEmbedding(4, token_dropout=0.25, maskable=True)
    ids = torch.full((8, 500), 3)
    masked = embed.embedding.weight[embed.tokenizer.mask_id]
    share = (embed(ids)[0] == masked).all(-1).float().mean()
    assert 0.2 < share < 0.3
    torch.testing.assert_close(embed.eval()(ids)[0], embed.embedding(ids))
    with pytest.raises(ValueError, match=r"token_dropout is 0\.1 and adapter\.maskable False"):
        TokenEmbedding(4, token_dropout=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_the_other_strand_gives_the_same_answer_on_a_gpu(packed):
    net = model("token", strands="equivariant", strand_pairs=PAIRS, strand_mixing=True,
                packed=packed).cuda()  # fmt: skip
    ids, other, mask = rows([400, 129, 1], 402, left=2)
    ours, theirs = (net(x.cuda(), mask.cuda()).cpu() for x in (ids, other))
    expected = swapped(reversed_data(theirs, mask), "token")
    assert (ours - expected)[mask].abs().max() < 1e-5
