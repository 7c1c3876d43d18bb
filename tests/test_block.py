"""A whole block as one operator: Triton against its definition, and when a Block takes it."""

import pytest
import torch

import mamba2_apps.kernels.block_triton  # noqa: F401
from mamba2_apps import kernels
from mamba2_apps.backbone import Backbone, BackboneConfig
from mamba2_apps.kernels import block_products_triton, block_triton, mamba2_block
from mamba2_apps.kernels.block import why_not_served
from mamba2_apps.kernels.block_products_triton import Tiles
from mamba2_apps.mixer import Mamba2

pytestmark = pytest.mark.usefixtures("nan_in_new_tensors")

INFINITY = float("inf")


def draw(b, l, d, h, p, g, n, directions, device="cpu", matrix=False, bias=True, residual=None):
    """Tensors in the operator's order, and its sizes."""
    torch.manual_seed(0)
    pair = (2,) if directions == 2 else ()
    inner, channels = h * p, h * p + 2 * g * n
    tensors = {
        "residual": 3 * torch.randn(b, l, d),
        "norm_weight": torch.rand(d) + 0.5,
        "in_proj": torch.randn(2 * inner + 2 * g * n + directions * h, d) / d**0.5,
        "conv_weight": torch.randn(channels, 4) / 2,
        "conv_bias": torch.randn(channels) if bias else None,
        "dt_bias": torch.randn(*pair, h) - 2,
        "A": -1 - torch.rand(*pair, h),
        "D": torch.randn((h, p) if matrix else (h,)),
        "gate_norm_weight": torch.rand(inner) + 0.5,
        "out_proj": torch.randn(d, inner) / inner**0.5,
    }
    tensors = {k: None if t is None else t.to(device) for k, t in tensors.items()}
    return tensors, {"headdim": p, "ngroups": g, "d_state": n}


def defined(tensors, sizes, **options):
    double = {k: t if t is None else t.double() for k, t in tensors.items()}
    want = mamba2_block(**double, **sizes, **options, backend="torch")
    assert want.dtype == torch.float64
    return want


def launched(tensors, sizes, lengths=None, cu_seqlens=None, dt_limit=(0.0, INFINITY), dtype=None):
    """The Triton kernels, whose products may be of any dtype."""
    dtype = dtype or tensors["in_proj"].dtype
    return block_triton.mamba2_block(
        *tensors.values(), lengths, cu_seqlens, *sizes.values(), *dt_limit, 1e-5, 1e-5, dtype
    )


def branch_error(got, want, residual):
    """Relative, of what the block adds: the residual stream would hide it."""
    branch = want - residual.double()
    return ((got.double() - want).norm() / branch.norm()).item()


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(block_products_triton, "NORM_LINEAR", Tiles(16, 64, 4, 2))
    monkeypatch.setattr(block_products_triton, "GATED_LINEAR", Tiles(16, 32, 4, 2))


@pytest.mark.parametrize(("d", "h", "p"), [(64, 2, 32), (128, 3, 64)])
@pytest.mark.parametrize("directions", [1, 2])
def test_equals_its_definition(d, h, p, directions, small_tiles):
    tensors, sizes = draw(2, 37, d, h, p, 1, 8, directions)
    assert tensors["in_proj"].shape[0] % 8
    inputs = [t.clone() for t in tensors.values()]
    got = launched(tensors, sizes, dt_limit=(0.0, 0.5))
    want = defined(tensors, sizes, dt_limit=(0.0, 0.5))
    assert branch_error(got, want, tensors["residual"]) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(tensors.values(), inputs, strict=True))


@pytest.mark.parametrize("directions", [1, 2])
def test_packed_groups_and_options(directions, small_tiles):
    tensors, sizes = draw(1, 21, 64, 4, 16, 2, 4, directions, matrix=True, bias=False)
    bounds = torch.tensor([0, 1, 13, 21], dtype=torch.int32)
    tensors["residual"] = tensors["residual"].expand(2, 21, 64)[1:].mT.contiguous().mT
    got = launched(tensors, sizes, cu_seqlens=bounds)
    want = defined(tensors, sizes, cu_seqlens=bounds)
    assert branch_error(got, want, tensors["residual"]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_of_different_lengths_are_as_if_alone(dtype, small_tiles):
    tensors, sizes = draw(3, 19, 64, 2, 32, 1, 8, 2)
    lengths = torch.tensor([19, 1, 10], dtype=dtype)
    got = launched(tensors, sizes, lengths=lengths)
    want = defined(tensors, sizes, lengths=lengths)
    assert branch_error(got, want, tensors["residual"]) < 1e-5
    for row, length in enumerate(lengths.tolist()):
        alone = tensors | {"residual": tensors["residual"][row : row + 1, :length]}
        want = defined(alone, sizes)
        assert branch_error(got[row : row + 1, :length], want, alone["residual"]) < 1e-5


def test_weights_are_cast_as_torch_casts_them(small_tiles):
    tensors, sizes = draw(2, 19, 64, 2, 32, 1, 8, 2)
    weights = {name: tensors[name].to(torch.bfloat16) for name in ("in_proj", "out_proj")}
    got = launched(tensors, sizes, dtype=torch.bfloat16)
    assert torch.equal(got, launched(tensors | weights, sizes))
    assert torch.equal(got, launched(tensors | weights | {"out_proj": tensors["out_proj"]}, sizes))


def test_alike_tensors_may_lie_anywhere(small_tiles):
    """Launches are prepared once for all blocks of the same sizes."""
    tensors, sizes = draw(1, 9, 64, 2, 32, 1, 8, 2)
    want = launched(tensors, sizes)
    for names in (("in_proj", "out_proj"), ("out_proj", "in_proj")):
        flat = torch.cat([tensors[name].flatten() for name in names]).split(
            [tensors[name].numel() for name in names]
        )
        moved = {k: part.view(tensors[k].shape) for k, part in zip(names, flat, strict=True)}
        assert torch.equal(launched(tensors | moved, sizes), want)
    with pytest.raises(ValueError, match=r"out_proj has shape \(64, 32\)"):
        launched(tensors | {"out_proj": tensors["out_proj"][:, :32]}, sizes)


@pytest.mark.parametrize("tokens", [3, 100])
def test_divided_outputs_are_the_same(tokens, monkeypatch, small_tiles):
    tensors, sizes = draw(1, tokens, 64, 2, 32, 1, 8, 2)
    monkeypatch.setattr(block_products_triton, "MANY_PROGRAMS", 1)
    undivided = launched(tensors, sizes)
    monkeypatch.setattr(block_products_triton, "MANY_PROGRAMS", 9)
    torch.testing.assert_close(launched(tensors, sizes), undivided, rtol=0, atol=0)


def test_the_definition_is_a_block_of_a_backbone():
    backbone = Backbone(BackboneConfig(64, 1, d_state=8, headdim=16, bidirectional=True)).double()
    block, mixer = backbone.layers[0], backbone.layers[0].mixer
    torch.nn.init.uniform_(block.norm.weight)
    torch.nn.init.uniform_(mixer.norm.weight)
    residual, lengths = torch.randn(2, 11, 64).double(), torch.tensor([11, 4])
    with torch.no_grad():
        want, _ = block(residual, lengths)
        got = mixer.add_to(residual, block.norm, lengths, None)
    data = torch.arange(11) < lengths[:, None]
    torch.testing.assert_close(got[data], want[data])


def test_the_dtype_is_the_residual_streams():
    tensors, sizes = draw(1, 5, 64, 2, 32, 1, 8, 1)
    want = defined(tensors, sizes)
    with torch.autocast("cpu", torch.bfloat16):
        got = mamba2_block(**tensors, **sizes)
    assert got.dtype == torch.float32
    assert 1e-5 < branch_error(got, want, tensors["residual"]) < 3e-2
    half = {k: t.bfloat16() for k, t in tensors.items()}
    assert mamba2_block(**half, **sizes).dtype == torch.bfloat16


def test_gradients_are_refused():
    tensors, sizes = draw(1, 5, 64, 2, 32, 1, 8, 2)
    tensors["out_proj"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"under torch\.no_grad\(\)"):
        mamba2_block(**tensors, **sizes)
    with torch.no_grad():
        assert mamba2_block(**tensors, **sizes).shape == (1, 5, 64)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"in_proj": torch.randn(160, 64)}, r"in_proj has shape \(160, 64\), expected \(148, 64\)"),
        ({"out_proj": torch.randn(64, 32)}, r"out_proj has shape \(64, 32\), expected \(64, 64\)"),
        ({"gate_norm_weight": torch.randn(7)}, r"gate_norm_weight has shape \(7,\)"),
        ({"norm_weight": torch.randn(7)}, r"norm_weight has shape \(7,\), expected \(64,\)"),
        ({"residual": torch.randn(5, 64)}, r"residual has shape \(5, 64\), expected \(b, l, d\)"),
        ({"residual": torch.randn(1, 5, 64).half()}, "residual has dtype torch.float16"),
        ({"A": torch.tensor(-1.0)}, r"A has shape \(\), expected \(h,\) or \(2, h\)"),
        ({"lengths": torch.tensor([5, 5])}, r"lengths has shape \(2,\), expected \(1,\)"),
        ({"lengths": torch.tensor([5.0])}, "lengths has dtype torch.float32, expected integers"),
        ({"lengths": torch.tensor([5]), "dt_limit": (0.1, 1.0)}, r"dt_limit is \(0\.1, 1\.0\)"),
        (
            {
                "lengths": torch.tensor([5]),
                "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32),
            },
            "lengths and cu_seqlens were given together",
        ),
        ({"backend": "triton"}, "multiplies bfloat16 in a block, and the products are .*float32"),
    ],
)
def test_what_does_not_fit_is_named(change, sentence):
    tensors, sizes = draw(1, 5, 64, 2, 32, 1, 8, 2)
    with pytest.raises(ValueError, match=sentence):
        mamba2_block(**{**tensors, **sizes, **change})


@pytest.mark.parametrize(
    ("shape", "residual", "dtype", "inner", "sentence"),
    [
        ((1, 5, 192), torch.float32, torch.bfloat16, 384, None),
        ((1, 5, 256), torch.bfloat16, torch.bfloat16, 64, None),
        ((1, 5, 192), torch.float16, torch.bfloat16, 384, "residual is torch.float16"),
        ((1, 5, 192), torch.float32, torch.float16, 384, "the products are torch.float16"),
        ((1, 5, 96), torch.float32, torch.bfloat16, 384, "d is 96"),
        ((1, 5, 320), torch.float32, torch.bfloat16, 384, "d is 320"),
        ((1, 5, 192), torch.float32, torch.bfloat16, 96, "there are 96"),
    ],
)
def test_what_the_kernels_serve(shape, residual, dtype, inner, sentence):
    reason = why_not_served(torch.empty(shape, dtype=residual), dtype, inner)
    assert reason is None if sentence is None else sentence in reason


def test_is_registered_as_torch_asks(small_tiles):
    tensors, sizes = draw(1, 5, 64, 2, 32, 1, 8, 2)
    limits = 0.0, 1e3, 1e-5, 1e-5
    torch.library.opcheck(
        torch.ops.mamba2_apps.mamba2_block_triton.default,
        (*tensors.values(), torch.tensor([3]), None, *sizes.values(), *limits, torch.float32),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert kernels.mamba2_block is mamba2_block


@pytest.fixture
def calls(monkeypatch):
    """Blocks on the CPU decide as on a GPU, for float32, too; the residuals of the operator."""
    residuals = []

    def counted(residual, *tensors, **options):
        residuals.append(residual)
        return mamba2_block(residual, *tensors, **options)

    monkeypatch.setattr("mamba2_apps.mixer.mamba2_block", counted)
    monkeypatch.setattr("mamba2_apps.mixer.resolve_backend", lambda *_: "triton")
    monkeypatch.setattr("mamba2_apps.mixer.why_not_served", lambda *_: None)
    return residuals


def small(**options):
    torch.manual_seed(0)
    sizes = {"d_state": 8, "headdim": 16, "bidirectional": True}
    return Backbone(BackboneConfig(64, 2, **(sizes | options)))


@pytest.mark.parametrize("options", [{}, {"bidirectional": False}, {"d_intermediate": 32}])
@pytest.mark.parametrize("padded", [False, True])
def test_a_block_without_gradients_is_one_operator(options, padded, calls):
    backbone, x = small(**options), torch.randn(2, 9, 64)
    mask = torch.arange(9) < torch.tensor([[9], [4]]) if padded else None
    want = backbone(x, mask=mask)
    assert calls == []
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            torch.testing.assert_close(backbone(x, mask=mask), want)
    assert len(calls) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"ngroups": 2},
        {"norm_before_gate": True},
        {"rmsnorm": False},
        {"d_ssm": 64},
        {"conv_per_direction": True},
        {"attn_layer_idx": (0, 1)},
    ],
)
def test_other_blocks_call_their_parts(options, calls):
    with torch.no_grad():
        small(**options)(torch.randn(1, 9, 64))
    assert calls == []


@pytest.mark.parametrize(
    "part", ["norm", "mixer", "mixer.norm", "mixer.in_proj", "mixer.out_proj", "mixer.conv1d"]
)
def test_parts_with_hooks_are_called(part, calls):
    backbone, seen = small(), []
    hook = (
        backbone.layers[0].get_submodule(part).register_forward_hook(lambda *_: seen.append(part))
    )
    with torch.no_grad():
        backbone(torch.randn(1, 9, 64))
        assert len(calls) == 1
        # These two give their weights to the mixer's operators, which never call them.
        assert seen == ([] if part in ("mixer.norm", "mixer.conv1d") else [part])
        hook.remove()
        backbone(torch.randn(1, 9, 64))
    assert len(calls) == 3


def test_states_steps_and_what_the_mixer_refuses_call_the_parts(calls, monkeypatch):
    with torch.no_grad():
        causal = small(bidirectional=False)
        _, state = causal(torch.randn(1, 9, 64), return_state=True)
        causal(torch.randn(1, 9, 64), state=state)
        limited, mask = small(dt_limit=(0.01, 0.1)), torch.ones(1, 9, dtype=torch.bool)
        limited(torch.randn(1, 9, 64), mask=mask)
        dropping = small(drop_path=0.5).train()
        dropping.layers[1](torch.randn(1, 9, 64))
        assert calls == []
        dropping.layers[0](torch.randn(1, 9, 64))  # whose own chance is 0
        dropping.eval()(torch.randn(1, 9, 64))
        assert len(calls) == 3
        monkeypatch.setattr(Mamba2, "_is_one_operator", lambda *_: False)
        dropping(torch.randn(1, 9, 64))
    assert len(calls) == 3


@pytest.mark.parametrize("padded", [False, True])
def test_torch_compile_keeps_it_whole(padded, monkeypatch, small_tiles):
    for module in ("mixer", "kernels.block"):
        monkeypatch.setattr(f"mamba2_apps.{module}.resolve_backend", lambda *_: "triton")
        monkeypatch.setattr(f"mamba2_apps.{module}.why_not_served", lambda *_: None)
    backbone, x = small(), torch.randn(2, 9, 64)
    mask = torch.arange(9) < torch.tensor([[9], [4]]) if padded else None
    operators = []

    def spy(graph, inputs):
        operators.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    with torch.no_grad():
        got = torch.compile(backbone, fullgraph=True, backend=spy)(x, mask=mask)
        assert sum("mamba2_block" in name for name in operators) == 2
        monkeypatch.setattr(Mamba2, "_is_one_operator", lambda *_: False)
        torch.testing.assert_close(got, backbone(x, mask=mask), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tiles",
    [None, (Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 3))],
    ids=["as they are", "of 64 tokens"],
)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "l", "d", "h", "p", "g", "n"),
    [(4, 197, 192, 6, 64, 1, 64), (3, 1000, 64, 2, 32, 1, 16), (1, 9001, 256, 8, 64, 2, 128)],
)
def test_on_the_gpu_twice_the_same(b, l, d, h, p, g, n, residual, directions, tiles, monkeypatch):
    if tiles is not None:
        monkeypatch.setattr(block_products_triton, "NORM_LINEAR", tiles[0])
        monkeypatch.setattr(block_products_triton, "GATED_LINEAR", tiles[1])
    tensors, sizes = draw(b, l, d, h, p, g, n, directions, "cuda")
    for name in ("in_proj", "out_proj"):
        tensors[name] = tensors[name].bfloat16()
    tensors["residual"] = tensors["residual"].to(residual)
    lengths = torch.randint(1, l + 1, (b,), device="cuda") if directions == 2 else None
    with torch.no_grad():
        first, second = (mamba2_block(**tensors, **sizes, lengths=lengths) for _ in range(2))
    assert first.dtype == residual
    assert torch.equal(first, second)
    want = defined(tensors, sizes, lengths=lengths)
    data = slice(None)
    if lengths is not None:
        data = torch.arange(l, device="cuda") < lengths[:, None]
    wide, got = want[data], first[data].double()
    assert (got - wide).norm() < 1.5e-2 * wide.norm()
    assert branch_error(got, wide, tensors["residual"][data]) < 3e-2


@pytest.mark.gpu
def test_packed_on_the_gpu():
    tensors, sizes = draw(1, 1021, 192, 6, 64, 1, 64, 2, "cuda")
    bounds = torch.tensor([0, 1, 130, 1021], dtype=torch.int32, device="cuda")
    want = defined(tensors, sizes, cu_seqlens=bounds)
    with torch.autocast("cuda", torch.bfloat16):
        got = mamba2_block(**tensors, **sizes, cu_seqlens=bounds)
    assert branch_error(got, want, tensors["residual"]) < 3e-2


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_backbone_is_the_same_in_one_operator_a_block_or_many(padded, compiled, monkeypatch):
    torch.manual_seed(0)
    config = BackboneConfig(192, 3, d_state=64, bidirectional=True)
    backbone = Backbone(config).cuda().eval()
    x = torch.randn(3, 210, 192, device="cuda")
    lengths = torch.tensor([[210], [3], [141]], device="cuda")
    mask = torch.arange(210, device="cuda") < lengths if padded else None
    taken = []

    def spy(graph, inputs):
        taken.extend(node for node in graph.graph.nodes if "mamba2_block" in str(node.target))
        return torch._inductor.compile(graph, inputs)

    def run(module):
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            return module(x, mask=mask).float()

    with monkeypatch.context() as patch:
        if not compiled:
            add_to = Mamba2.add_to
            patch.setattr(Mamba2, "add_to", lambda *a: (taken.append(a), add_to(*a))[1])
        got = run(torch.compile(backbone, fullgraph=True, backend=spy) if compiled else backbone)
    assert len(taken) == 3
    monkeypatch.setattr(Mamba2, "_is_one_operator", lambda *_: False)
    want = run(backbone)
    assert len(taken) == 3
    assert (got - want).norm() < 2e-2 * want.norm()
    assert mask is None or not got[~mask].any()
