"""The backbone against transformers' Mamba-2, and its promises on lengths, states and precision.

batch b · seqlen l · d_model d
"""

import copy
import inspect
import io
import json
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_map

from mamba2_apps.adaptation import exempt_from_weight_decay, parameter_groups
from mamba2_apps.backbone import Backbone, BackboneConfig
from mamba2_apps.mixer import Mamba2

SIZES = {"d_state": 8, "headdim": 8, "ngroups": 2}
HYBRID = {
    "attn_layer_idx": (1,),
    "attn_cfg": {"num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 4, "d_conv": 3},
    "d_intermediate": 48,
}
KINDS = {
    "causal": {},
    "bidirectional": {"bidirectional": True},
    "causal hybrid": HYBRID,
    "bidirectional hybrid": HYBRID | {"bidirectional": True},
}
CAUSAL = {name: options for name, options in KINDS.items() if "bidirectional" not in name}


def make(options=None, **more):
    torch.manual_seed(0)
    return Backbone(BackboneConfig(32, 3, **(SIZES | (options or {}) | more)))


def test_equals_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        hidden_size=32,
        num_hidden_layers=3,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=2,
        chunk_size=16,
        vocab_size=8,
        use_cache=False,
    )
    theirs = transformers.Mamba2Model(config)
    ours = make()
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith("embeddings")}
    ours.load_state_dict(weights)

    x = torch.randn(2, 45, 32, requires_grad=True)
    target = torch.randn(2, 45, 32)
    hidden = ours(x)
    expected = theirs(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    parameters = dict(theirs.named_parameters())
    grads = torch.autograd.grad((hidden * target).sum(), [x, *ours.parameters()])
    expected_grads = torch.autograd.grad(
        (expected * target).sum(), [x, *(parameters[name] for name, _ in ours.named_parameters())]
    )
    for grad, other in zip(grads, expected_grads, strict=True):
        assert (grad - other).norm() <= 1e-4 * other.norm()


def test_parameters_are_named_as_in_mamba_ssm():
    names = set(make(HYBRID).state_dict())
    mamba = ["A_log", "D", "conv1d.bias", "conv1d.weight", "dt_bias", "in_proj.weight"]
    mamba += ["norm.weight", "out_proj.weight"]
    attention = [f"{m}.{p}" for m in ("in_proj", "conv1d", "out_proj") for p in ("weight", "bias")]
    rest = ["norm.weight", "norm2.weight", "mlp.fc1.weight", "mlp.fc2.weight"]
    expected = {"norm_f.weight"}
    for i in range(3):
        mixer = attention if i == 1 else mamba
        expected |= {f"layers.{i}.{name}" for name in rest}
        expected |= {f"layers.{i}.mixer.{name}" for name in mixer}
    assert names == expected


def test_initialisation_shrinks_with_depth():
    options = HYBRID | {"attn_cfg": {"num_heads": 4}, "bias": True}
    shallow, deep = (
        Backbone(BackboneConfig(32, n, **(SIZES | options))).state_dict() for n in (2, 8)
    )
    for i, name in [(0, "mixer.out_proj"), (1, "mixer.out_proj"), (0, "mlp.fc2")]:
        ratio = shallow[f"layers.{i}.{name}.weight"].std() / deep[f"layers.{i}.{name}.weight"].std()
        assert ratio.item() == pytest.approx(2, rel=0.15)
        bias = deep.get(f"layers.{i}.{name}.bias")
        assert bias is None or not bias.any()
    assert not deep["layers.1.mixer.in_proj.bias"].any()


def test_a_backbone_from_the_meta_device_can_be_initialised():
    torch.manual_seed(0)
    config = BackboneConfig(32, 3, **(SIZES | HYBRID), conv_init=0.1)
    backbone = Backbone(config, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.fill_(torch.nan)
    backbone.reset_parameters()
    plain = Backbone(config).state_dict()
    for name, value in backbone.state_dict().items():
        assert value.isfinite().all(), name
        if value.ndim > 1:
            assert value.std().item() == pytest.approx(plain[name].std().item(), rel=0.3), name
    assert (backbone.layers[0].mixer.D == 1).all()
    assert backbone.layers[0].mixer.conv1d.weight.abs().max() <= 0.1


PADDED = [(0, 9), (3, 9), (0, 4), (2, 7), (5, 5), (8, 9)]  # first and end of each row's data


def padded_batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(PADDED), 9, 32, generator=generator)
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    for row, (first, end) in enumerate(PADDED):
        mask[row, first:end] = True
    return x.masked_fill(~mask[..., None], torch.nan), mask


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_padding_is_as_if_it_were_not_there(options):
    backbone = make(options)
    x, mask = padded_batch()
    x.requires_grad_()
    hidden = backbone(x, mask=mask)
    assert (hidden[~mask] == 0).all()
    for row, (first, end) in enumerate(PADDED):
        if first < end:
            alone = backbone(x[row : row + 1, first:end])[0]
            torch.testing.assert_close(hidden[row, first:end], alone, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(hidden.square().sum(), [x, *backbone.parameters()])
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][~mask] == 0).all()


@pytest.mark.parametrize("options", CAUSAL.values(), ids=CAUSAL)
def test_a_state_passes_through_padding(options):
    backbone = make(options).double()
    first, mask = padded_batch(1)
    second, _ = padded_batch(2)
    mask_of_second = mask.roll(1, 0)
    second = torch.where(mask_of_second[..., None], second.nan_to_num(0.5), torch.nan).double()
    first = first.double()
    _, state = backbone(first, mask=mask, return_state=True)
    kept = tree_map(torch.clone, state)
    hidden, state_after = backbone(second, mask=mask_of_second, state=state, return_state=True)
    torch.testing.assert_close(state, kept, rtol=0, atol=0)
    token = torch.randn(len(PADDED), 32, dtype=torch.float64)
    last, _ = backbone.step(token, state_after)
    for row in range(len(PADDED)):
        before, after = first[row][mask[row]], second[row][mask_of_second[row]]
        whole = backbone(torch.cat([before, after, token[row : row + 1]])[None])[0]
        ours = torch.cat([hidden[row][mask_of_second[row]], last[row : row + 1]])
        torch.testing.assert_close(ours, whole[len(before) :], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", CAUSAL.values(), ids=CAUSAL)
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_pieces_of_any_length_give_what_one_pass_gives(options, lengths):
    backbone = make(options).double()
    x = torch.randn(2, sum(lengths), 32, dtype=torch.float64)
    with torch.no_grad():
        whole, final = backbone(x, return_state=True)
        state, pieces = backbone.init_state(2), []
        for piece in x.split(lengths, dim=1):
            hidden, state = backbone(piece, state=state, return_state=True)
            pieces.append(hidden)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, final, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", CAUSAL.values(), ids=CAUSAL)
def test_steps_give_what_one_pass_gives(options):
    backbone = make(options)
    x = torch.randn(2, 12, 32)
    with torch.no_grad():
        whole = backbone(x)
        state, steps = backbone.init_state(2), []
        for token in x.unbind(1):
            kept = tree_map(torch.clone, state)
            hidden, following = backbone.step(token, state)
            torch.testing.assert_close(state, kept, rtol=0, atol=0)
            steps.append(hidden)
            state = following
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_packed_sequences_do_not_see_each_other(options):
    backbone = make(options)
    lengths = [1, 66, 2, 13]
    x = torch.randn(1, sum(lengths), 32)
    bounds = torch.tensor([0, 1, 67, 69, 82], dtype=torch.int32)
    separate = torch.cat([backbone(part) for part in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(backbone(x, cu_seqlens=bounds), separate, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_double_precision_is_kept_throughout(options):
    single, double = make(options), make(options).double()
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    hidden = double(x)
    assert hidden.dtype == torch.float64
    difference = (single(x.float()) - hidden).norm() / hidden.norm()
    assert 1e-9 < difference < 1e-5
    again = double(torch.cat([x, x], dim=0))[2:]
    torch.testing.assert_close(again, hidden, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_half_precision_keeps_the_residual_in_float32(options):
    backbone = make(options)
    x, mask = padded_batch()
    residuals = []
    for layer in backbone.layers:
        layer.register_forward_pre_hook(lambda _, args: residuals.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = backbone(x, mask=mask)
    assert set(residuals) == {torch.float32}
    assert hidden.dtype == torch.float32
    assert (hidden - backbone(x, mask=mask)).norm() < 0.03 * hidden.norm()
    grads = torch.autograd.grad(hidden.square().sum(), list(backbone.parameters()))
    assert all(grad.isfinite().all() for grad in grads)

    residuals.clear()
    half = copy.deepcopy(backbone).bfloat16()
    assert half(x.bfloat16(), mask=mask).dtype == torch.bfloat16
    assert set(residuals) == {torch.float32}

    residuals.clear()
    half = make(options, residual_in_fp32=False).bfloat16()
    half.layers[1].register_forward_pre_hook(lambda _, args: residuals.append(args[0].dtype))
    assert half(x.bfloat16(), mask=mask).dtype == torch.bfloat16
    assert set(residuals) == {torch.bfloat16}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_gradient_checkpointing_changes_nothing(options):
    plain, checkpointed = make(options), make(options, gradient_checkpointing=True)
    x, mask = padded_batch()
    x.requires_grad_()
    results = []
    for backbone in (plain, checkpointed):
        hidden = backbone.train()(x, mask=mask)
        grads = torch.autograd.grad(hidden.square().sum(), [x, *backbone.parameters()])
        results.append([hidden, *grads])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bidirectional", "causal hybrid"])
def test_compiles_without_graph_breaks(kind):
    backbone = make(KINDS[kind])
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    x, mask = padded_batch()
    x.requires_grad_()
    results = []
    for model in (backbone, compiled):
        hidden = model(x, mask=mask)
        results.append([hidden, *torch.autograd.grad(hidden.square().sum(), [x])])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    bounds = torch.tensor([0, 3, 9], dtype=torch.int32)
    row = x[:1].detach()
    torch.testing.assert_close(compiled(row, cu_seqlens=bounds), backbone(row, cu_seqlens=bounds))
    torch._dynamo.reset()


def test_carried_states_compile_without_graph_breaks():
    backbone = make(HYBRID)
    step = torch.compile(backbone.step, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        _, state = backbone(x, return_state=True)
        torch.testing.assert_close(step(x[:, 0], state), backbone.step(x[:, 0], state))
    torch._dynamo.reset()


def test_exports_to_plain_torch_operations():
    backbone = make(HYBRID | {"bidirectional": True}).eval()
    x, mask = padded_batch()
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        backbone,
        (x,),
        {"mask": mask},
        dynamic_shapes={"embeddings": {0: batch}, "mask": {0: batch}},
    )
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {target.namespace for target in calls if hasattr(target, "namespace")} == {"aten"}
    exported = program.module()(x[:4], mask=mask[:4])
    torch.testing.assert_close(exported, backbone(x[:4], mask=mask[:4]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_copies_and_pickles(options):
    backbone = make(options)
    x = torch.randn(1, 5, 32)
    stored = io.BytesIO()
    torch.save(backbone, stored)
    stored.seek(0)
    for other in (
        copy.deepcopy(backbone),
        pickle.loads(pickle.dumps(backbone)),
        torch.load(stored, weights_only=False),
    ):
        assert torch.equal(other(x), backbone(x))
        assert other.config == backbone.config


def test_drop_path_skips_rows_in_training_only():
    backbone = make(drop_path=0.9)
    x = torch.randn(200, 3, 32)
    assert torch.equal(backbone.eval()(x), make().eval()(x))
    first, last = backbone.train().layers[0], backbone.layers[2]
    assert not (first(x)[0] == x).all((1, 2)).any()
    out, _ = last(x)
    skipped = (out == x).all((1, 2))
    assert 0.8 < skipped.float().mean() < 0.97
    branch = last.eval()(x)[0] - x
    torch.testing.assert_close((out - x)[~skipped], branch[~skipped] * 10, rtol=1e-3, atol=1e-4)


def test_weight_decay_spares_what_it_would_harm():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 32)
            self.adapter = Adapter()
            self.backbone = make(HYBRID | {"bidirectional": True, "D_has_hdim": True})
            self.head = nn.Linear(32, 2)
            self.frozen = nn.Linear(32, 2).requires_grad_(False)

    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, 9, 32))
            self.proj = nn.Linear(32, 32)

        def no_weight_decay(self):
            return {"pos_embed"}

    model = Model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    mixers = [f"backbone.layers.{i}.mixer" for i in range(3)]
    expected = {"adapter.proj.weight", "head.weight"}
    expected |= {f"{m}.{p}.weight" for m in mixers for p in ("in_proj", "conv1d", "out_proj")}
    expected |= {f"backbone.layers.{i}.mlp.fc{j}.weight" for i in range(3) for j in (1, 2)}
    assert decayed_names == expected
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {names[id(parameter)] for parameter in spared["params"]} == trainable - expected
    assert {"embedding.weight", "adapter.pos_embed"} <= exempt_from_weight_decay(model)


def test_every_mixer_option_is_a_config_field_with_the_same_default():
    config = inspect.signature(BackboneConfig).parameters
    for name, parameter in inspect.signature(Mamba2).parameters.items():
        if name not in ("device", "dtype"):
            assert config[name].default == parameter.default, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layer": 0}, "n_layer=0"),
        ({"d_model": 32.0}, "d_model=32.0"),
        ({"headdim": 7}, "headdim=7"),
        ({"d_intermediate": -1}, "d_intermediate=-1"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"bidirectional": "yes"}, "bidirectional='yes'"),
        ({"attn_layer_idx": [2]}, r"attn_layer_idx=\(2,\)"),
        ({"attn_layer_idx": [0, 0]}, r"attn_layer_idx=\(0, 0\)"),
        ({"attn_layer_idx": [0]}, "d_model=32: expected a multiple of 64"),
        ({"attn_cfg": {"num_head": 4}}, r"attn_cfg=\['num_head'\]"),
        ({"attn_cfg": {"head_dim": 4}}, "num_heads in it"),
        ({"attn_cfg": {"num_heads": 4, "causal": False}}, "expected causal=True"),
        ({"attn_cfg": {"num_heads": 5}}, "attn_cfg: num_heads=5"),
    ],
)
def test_impossible_configs_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BackboneConfig(**({"d_model": 32, "n_layer": 2, "headdim": 8} | options))


def test_unknown_config_names_are_named():
    with pytest.raises(TypeError, match="n_layers"):
        BackboneConfig(32, n_layers=2)
    with pytest.raises(TypeError, match="dropout"):
        BackboneConfig.from_dict({"d_model": 64, "n_layer": 2, "dropout": 0.1})


def test_configs_survive_strict_json():
    config = BackboneConfig(32, 3, **(SIZES | HYBRID), A_init_range=(1, 2))
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert BackboneConfig.from_dict(json.loads(text)) == config
    assert config.dt_limit == (0.0, math.inf)


def test_attention_layers_default_to_rotary_heads_of_64():
    config = BackboneConfig(128, 2, attn_layer_idx=[1])
    attention = Backbone(config).layers[1].mixer
    assert (attention.num_heads, attention.head_dim, attention.rotary_emb_dim) == (2, 64, 64)
    assert attention.causal


def test_calls_that_make_no_sense_are_refused():
    causal, both_ways, hybrid = make(), make({"bidirectional": True}), make(HYBRID)
    x, mask = padded_batch()
    bounds = torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="mask and cu_seqlens"):
        causal(x[:1], mask=mask[:1], cu_seqlens=bounds)
    with pytest.raises(ValueError, match=r"expected \(batch, seqlen, 32\), got \(6, 9\)"):
        causal(x[..., 0])
    with pytest.raises(ValueError, match=r"cu_seqlens .*\[0, 8\]"):
        causal(x[:1], cu_seqlens=torch.tensor([0, 8], dtype=torch.int32))
    with pytest.raises(ValueError, match="x has shape"):
        causal(x[:, :0])
    with pytest.raises(ValueError, match="row 0 has 2 runs of True"):
        causal(x[:1], mask=mask[:1] & (torch.arange(9) != 4))
    with pytest.raises(ValueError, match="state: expected 3 entries"):
        causal(x, state=causal.init_state(6)[:2])
    with pytest.raises(ValueError, match="initial_states"):
        causal(x, state=causal.init_state(5))
    with pytest.raises(ValueError, match="return_state: a bidirectional backbone"):
        both_ways(x, return_state=True)
    with pytest.raises(ValueError, match=r"^state: a bidirectional backbone"):
        both_ways(x, state=causal.init_state(6))
    with pytest.raises(ValueError, match="init_state: a bidirectional backbone"):
        both_ways.init_state(1)
    with pytest.raises(ValueError, match="step: a bidirectional backbone"):
        both_ways.step(x[:, 0], causal.init_state(6))
    with pytest.raises(ValueError, match=r"embedding: expected \(batch, 32\)"):
        causal.step(x, causal.init_state(6))
    with pytest.raises(ValueError, match="cu_seqlens: attention layers carry no state"):
        hybrid(x[:1], cu_seqlens=bounds, return_state=True)
