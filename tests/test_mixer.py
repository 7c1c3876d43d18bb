"""The Mamba-2 mixer against a plain reading of its equations, and what it promises about lengths.

batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · d_model d
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from mamba2_apps.kernels.reference import ssd_recurrent
from mamba2_apps.mixer import Mamba2

D_MODEL = 12
SIZES = {"d_state": 5, "d_conv": 4, "expand": 2, "headdim": 4, "ngroups": 2}
OPTIONS = {
    "default": {},
    "one group": {"ngroups": 1},
    "no norm": {"rmsnorm": False},
    "norm before gate": {"norm_before_gate": True, "norm_eps": 1e-3},
    "D per channel": {"D_has_hdim": True},
    "narrow state space": {"d_ssm": 16},
    "biases": {"bias": True},
    "no convolution bias": {"conv_bias": False},
    "limited steps": {"dt_limit": (0.02, 0.05)},
    "no window": {"d_conv": 1},
    "bidirectional": {"bidirectional": True},
    "bidirectional with biases": {"bidirectional": True, "bias": True},
    "bidirectional, limited steps": {"bidirectional": True, "dt_limit": (0.02, 0.05)},
    "two convolutions": {"bidirectional": True, "conv_per_direction": True},
    "two convolutions, no bias": {
        "bidirectional": True,
        "conv_per_direction": True,
        "conv_bias": False,
        "D_has_hdim": True,
        "rmsnorm": False,
    },
}
CAUSAL = {name: o for name, o in OPTIONS.items() if not o.get("bidirectional")}


def make(options=None, dtype=torch.float64):
    torch.manual_seed(0)
    mixer = Mamba2(D_MODEL, **(SIZES | (options or {}))).to(dtype)
    with torch.no_grad():  # so that no test passes because a parameter is 0 or 1
        for name, parameter in mixer.named_parameters():
            if name.endswith(("bias", "norm.weight", "D")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return mixer


def reference(mixer, options, u):
    """The mixer's equations with nothing fused, direction by direction."""
    o = {"rmsnorm": True, "norm_before_gate": False, "norm_eps": 1e-5} | SIZES | options
    h, p, g, n = mixer.nheads, o["headdim"], o["ngroups"], o["d_state"]
    d_inner, d_ssm = o["expand"] * D_MODEL, o.get("d_ssm", o["expand"] * D_MODEL)
    directions = 2 if o.get("bidirectional") else 1
    widths = [d_inner - d_ssm] * 2 + [d_ssm, d_ssm, g * n, g * n] + [h] * directions
    z0, x0, z, x, B, C, *dts = mixer.in_proj(u).split(widths, dim=-1)
    xBC = torch.cat([x, B, C], dim=-1)
    D = mixer.D.view(h, p) if o.get("D_has_hdim") else mixer.D[:, None]

    y = 0
    for i, dt in enumerate(dts):
        own = i if o.get("conv_per_direction") else 0
        rows = slice(own * xBC.shape[2], (own + 1) * xBC.shape[2])
        bias = None if mixer.conv1d.bias is None else mixer.conv1d.bias[rows]
        reversed_conv = own == 1
        inputs = xBC.flip(1) if reversed_conv else xBC
        inputs = F.pad(inputs.mT, (o["d_conv"] - 1, 0))
        mixed = F.silu(F.conv1d(inputs, mixer.conv1d.weight[rows], bias, groups=inputs.shape[1])).mT
        mixed = mixed.flip(1) if reversed_conv else mixed
        x, B, C = mixed.split([d_ssm, g * n, g * n], dim=-1)
        x, B, C = x.unflatten(-1, (h, p)), B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n))
        dt_bias = mixer.dt_bias[i] if directions == 2 else mixer.dt_bias
        A = -torch.exp(mixer.A_log[i] if directions == 2 else mixer.A_log)
        dt = F.softplus(dt + dt_bias).clamp(*o.get("dt_limit", (0.0, float("inf"))))
        turn = (lambda t: t.flip(1)) if i == 1 else (lambda t: t)
        scanned, _ = ssd_recurrent(turn(x), turn(dt), A, turn(B), turn(C))
        y = y + turn(scanned)
        if i == 0 or o.get("conv_per_direction"):
            y = y + D * x

    y = y.flatten(2)
    if not o["norm_before_gate"] or not o["rmsnorm"]:
        y = y * F.silu(z)
    if o["rmsnorm"]:
        v = y.unflatten(-1, (g, -1))
        y = (v / (v.square().mean(-1, keepdim=True) + o["norm_eps"]).sqrt()).flatten(2)
        y = y * mixer.norm.weight
        if o["norm_before_gate"]:
            y = y * F.silu(z)
    return mixer.out_proj(torch.cat([F.silu(z0) * x0, y], dim=-1))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("seqlen", [1, 2, 37, 70])
def test_equals_its_equations(options, seqlen):
    mixer = make(options)
    u = torch.randn(2, seqlen, D_MODEL, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, seqlen, D_MODEL, dtype=torch.float64)
    inputs = [u, *mixer.parameters()]
    ours, theirs = mixer(u), reference(mixer, options, u)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad((ours * weights).sum(), inputs)
    expected = torch.autograd.grad((theirs * weights).sum(), inputs)
    for name, grad, target in zip(
        ["u", *dict(mixer.named_parameters())], grads, expected, strict=True
    ):
        torch.testing.assert_close(grad, target, rtol=1e-9, atol=1e-10, msg=name)


def test_parameters_are_those_of_mamba_ssm():
    mixer = Mamba2(64, d_state=16, headdim=32, ngroups=2, d_conv=3, expand=2)
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "in_proj.weight": (2 * 128 + 2 * 2 * 16 + 4, 64),
        "conv1d.weight": (128 + 2 * 2 * 16, 1, 3),
        "conv1d.bias": (128 + 2 * 2 * 16,),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
    }


def test_initialisation():
    torch.manual_seed(0)
    mixer = Mamba2(256, headdim=1, dt_min=0.01, dt_max=0.2, dt_init_floor=0.02, conv_init=0.01)
    dt, A = F.softplus(mixer.dt_bias).detach(), mixer.A_log.exp().detach()
    assert dt.min().item() == pytest.approx(0.02, rel=1e-4)
    assert 0.19 < dt.max() <= 0.2001
    assert 1 <= A.min() < 1.3
    assert 15.7 < A.max() <= 16.0001
    assert (mixer.D == 1).all()
    assert (mixer.norm.weight == 1).all()
    assert 0.0099 < mixer.conv1d.weight.abs().max() <= 0.01


def test_state_space_parameters_start_in_float32_whatever_the_dtype():
    mixer = Mamba2(64, dtype=torch.bfloat16, device="meta")
    assert all(p.is_meta for p in mixer.parameters())
    kept = {name for name, p in mixer.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "dt_bias", "D"}
    assert mixer(torch.empty(2, 9, 64, device="meta", dtype=torch.bfloat16)).shape == (2, 9, 64)


PADDED = [(0, 11), (4, 11), (0, 6), (2, 9), (10, 11), (5, 5)]  # first and end of each row's data


def padded_batch(dtype=torch.float64):
    torch.manual_seed(1)
    u = torch.randn(len(PADDED), 11, D_MODEL, dtype=dtype)
    mask = torch.zeros(u.shape[:2], dtype=torch.bool)
    for row, (first, end) in enumerate(PADDED):
        mask[row, first:end] = True
    return u.masked_fill(~mask[..., None], torch.nan), mask


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_padding_is_as_if_it_were_not_there(options):
    mixer = make(options)
    u, mask = padded_batch()
    u.requires_grad_()
    out = mixer(u, mask=mask)
    assert (out[~mask] == 0).all()
    for row, (first, end) in enumerate(PADDED):
        if first < end:
            alone = mixer(u[row : row + 1, first:end])
            torch.testing.assert_close(out[row : row + 1, first:end], alone, rtol=1e-9, atol=1e-9)
    grads = torch.autograd.grad(out.square().sum(), [u, *mixer.parameters()])
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][~mask] == 0).all()


@pytest.mark.parametrize("options", CAUSAL.values(), ids=CAUSAL)
def test_a_state_passes_through_padding(options):
    mixer = make(options)
    u, mask = padded_batch()
    before = torch.randn(len(PADDED), 5, D_MODEL, dtype=torch.float64)
    _, start = mixer(before, return_state=True)
    kept = tree_map(torch.clone, start)
    out, state = mixer(u, mask=mask, state=start, return_state=True)
    for row, (first, end) in enumerate(PADDED):
        whole = torch.cat([before[row : row + 1], u[row : row + 1, first:end]], dim=1)
        expected, final = mixer(whole, return_state=True)
        torch.testing.assert_close(out[row, first:end], expected[0, 5:], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state.conv[row], final.conv[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state.ssm[row], final.ssm[0], rtol=1e-9, atol=1e-9)
    assert torch.equal(start.conv, kept.conv)
    assert torch.equal(start.ssm, kept.ssm)
    empty = PADDED.index((5, 5))
    assert torch.equal(state.conv[empty], start.conv[empty])
    assert torch.equal(state.ssm[empty], start.ssm[empty])


@pytest.mark.parametrize("options", CAUSAL.values(), ids=CAUSAL)
def test_pieces_and_steps_give_what_one_pass_gives(options):
    mixer = make(options)
    u = torch.randn(3, 75, D_MODEL, dtype=torch.float64)
    whole, final = mixer(u, return_state=True)
    state, pieces = mixer.init_state(3), []
    for piece in u.split([1, 2, 5, 64, 3], dim=1):
        out, state = mixer(piece, state=state, return_state=True)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tuple(state), tuple(final), rtol=1e-9, atol=1e-9)

    state, steps = mixer.init_state(3), []
    for token in u[:, :9].unbind(1):
        kept = tree_map(torch.clone, state)
        out, following = mixer.step(token, state)
        assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
        steps.append(out)
        state = following
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, :9], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_packed_sequences_do_not_see_each_other(options):
    mixer = make(options)
    lengths = [1, 70, 2, 30]
    u = torch.randn(1, sum(lengths), D_MODEL, dtype=torch.float64)
    bounds = torch.tensor([0, 1, 71, 73, 103], dtype=torch.int32)
    separate = torch.cat([mixer(part) for part in u.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(mixer(u, cu_seqlens=bounds), separate, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", CAUSAL.values(), ids=CAUSAL)
def test_gradients_flow_through_carried_states(options):
    mixer = make(options)
    u = torch.randn(2, 12, D_MODEL, dtype=torch.float64, requires_grad=True)
    parameters = [u, *mixer.parameters()]
    expected = torch.autograd.grad(mixer(u)[:, 2:].sin().sum(), parameters)
    _, state = mixer(u[:, :2], return_state=True)
    second, state = mixer(u[:, 2:11], state=state, return_state=True)
    last, _ = mixer.step(u[:, 11], state)
    grads = torch.autograd.grad(second.sin().sum() + last.sin().sum(), parameters)
    torch.testing.assert_close(grads, expected, rtol=1e-8, atol=1e-10)


def test_packed_sequences_carry_their_states():
    mixer = make()
    first, second = torch.randn(2, 1, 9, D_MODEL, dtype=torch.float64)
    whole = torch.cat([mixer(torch.cat([first[:, :4], second[:, :6]], 1))[:, 4:],
                       mixer(torch.cat([first[:, 4:], second[:, 6:]], 1))[:, 5:]], 1)  # fmt: skip
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    _, state = mixer(first, cu_seqlens=bounds, return_state=True)
    bounds = torch.tensor([0, 6, 9], dtype=torch.int32)
    out = mixer(second, cu_seqlens=bounds, state=state)
    torch.testing.assert_close(out, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_autocast_runs_in_bfloat16(bidirectional):
    mixer = make({"bidirectional": bidirectional}, torch.float32)
    u = torch.randn(2, 40, D_MODEL, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixer(u)
    assert out.dtype == torch.bfloat16
    assert (out.float() - mixer(u)).norm() < 0.02 * out.norm()
    grads = torch.autograd.grad(out.float().square().sum(), [u, *mixer.parameters()])
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, "d_state=0"),
        ({"d_conv": 2.5}, "d_conv=2.5"),
        ({"expand": True}, "expand=True"),
        ({"headdim": 5}, "headdim=5"),
        ({"ngroups": 4}, "ngroups=4"),
        ({"d_ssm": 25}, "d_ssm=25"),
        ({"dt_min": 0.2}, "dt_min=0.2"),
        ({"dt_init_floor": 0}, "dt_init_floor=0"),
        ({"dt_limit": (1.0, 0.5)}, r"dt_limit=\(1.0, 0.5\)"),
        ({"A_init_range": (0, 1)}, r"A_init_range=\(0, 1\)"),
        ({"conv_init": -1}, "conv_init=-1"),
        ({"norm_eps": 0}, "norm_eps=0"),
        ({"conv_per_direction": True}, "conv_per_direction=True"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba2(D_MODEL, **(SIZES | options))


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match="d_stat"):
        Mamba2(D_MODEL, d_stat=16)


def test_calls_that_make_no_sense_are_refused():
    mixer, both_ways = make(), make({"bidirectional": True})
    u, mask = padded_batch()
    bounds = torch.tensor([0, 11], dtype=torch.int32)
    with pytest.raises(ValueError, match="mask and cu_seqlens"):
        mixer(u[:1], mask=mask[:1], cu_seqlens=bounds)
    with pytest.raises(
        ValueError, match=r"input: expected \(batch, seqlen, 12\), got \(6, 11, 5\)"
    ):
        mixer(u[..., :5])
    with pytest.raises(ValueError, match="lengths: expected shape"):
        mixer(u, lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match=r"mask: .*torch.int64"):
        mixer(u, mask=mask.long())
    with pytest.raises(ValueError, match=r"mask: .*\(6, 10\)"):
        mixer(u, mask=mask[:, 1:])
    gap = mask.clone()
    gap[3, 5] = False
    with pytest.raises(ValueError, match="row 3 has 2 runs"):
        mixer(u, mask=gap)
    with pytest.raises(ValueError, match="return_state: a bidirectional"):
        both_ways(u, return_state=True)
    with pytest.raises(ValueError, match=r"^state: a bidirectional"):
        both_ways(u, state=mixer.init_state(6))
    with pytest.raises(ValueError, match="init_state: a bidirectional"):
        both_ways.init_state(1)
    with pytest.raises(ValueError, match="step: a bidirectional"):
        both_ways.step(u[:, 0], mixer.init_state(6))
    with pytest.raises(ValueError, match="initial_states"):
        mixer(u, state=mixer.init_state(2))
