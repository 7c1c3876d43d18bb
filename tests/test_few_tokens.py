"""The plain path for a few tokens on a CPU gives what the operators give."""

import pytest
import torch
from torch import nn

from mamba2_apps import few_tokens
from mamba2_apps.backbone import Backbone, BackboneConfig
from mamba2_apps.few_tokens import FewTokensBackbone
from mamba2_apps.mixer import Mamba2

OPTIONS = {
    "plain": {},
    "groups": {"ngroups": 2},
    "D per channel": {"D_has_hdim": True},
    "part of the channels": {"d_ssm": 64},
    "no norm": {"rmsnorm": False},
    "norm before gate": {"norm_before_gate": True, "ngroups": 2},
    "limits": {"dt_limit": (0.01, 0.05)},
    "no convolution bias": {"conv_bias": False, "bias": True},
    "one tap": {"d_conv": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_few_tokens_are_mixed_as_by_the_operators(options, length, monkeypatch):
    torch.manual_seed(0)
    mixer = Mamba2(48, d_state=8, headdim=16, **options).eval()
    with torch.inference_mode():
        _, state = mixer(torch.randn(2, 30, 48), return_state=True)
        kept = [t.clone() for t in state]
        u = torch.randn(2, length, 48)
        assert few_tokens.serves(mixer, u)
        found, after = mixer(u, state=state, return_state=True)
        stepped = [mixer.step(u[:, 0], state)]
        monkeypatch.setattr(few_tokens, "FEW", 0)
        expected, expected_after = mixer(u, state=state, return_state=True)
        stepped.append(mixer.step(u[:, 0], state))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(after, expected_after, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stepped[0][0], stepped[1][0], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))


def test_steep_decays_stay_finite():
    mixer = Mamba2(32, d_state=8, headdim=16).eval()
    with torch.inference_mode():
        mixer.dt_bias.fill_(50.0)
        state = mixer.init_state(1)
        out, after = mixer(torch.randn(1, 16, 32), state=state, return_state=True)
    assert torch.isfinite(out).all()
    assert torch.isfinite(after.ssm).all()


class Adapter(nn.Module):
    """What libraries of adapters put in the place of a linear layer, with its weight in sight."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, linear.bias

    def forward(self, x):
        return 2 * self.linear(x)


@pytest.mark.parametrize("name", ["in_proj", "out_proj"])
def test_what_took_a_projections_place_is_called(name):
    mixer = Mamba2(32, d_state=8, headdim=16).eval()
    u = torch.randn(1, 3, 32)
    with torch.no_grad():
        before, _ = mixer(u, state=mixer.init_state(1), return_state=True)
        setattr(mixer, name, Adapter(getattr(mixer, name)))
        assert not few_tokens.serves(mixer, u)
        after, _ = mixer(u, state=mixer.init_state(1), return_state=True)
        stepped, _ = mixer.step(u[:, 0], mixer.init_state(1))
    assert not torch.allclose(before, after)
    torch.testing.assert_close(stepped, after[:, 0])


@pytest.mark.parametrize("name", ["in_proj", "out_proj"])
def test_hooks_of_a_projection_are_called(name):
    mixer = Mamba2(48, d_state=8, headdim=16).eval()
    seen = []
    mixer.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
    with torch.inference_mode():
        mixer.step(torch.randn(2, 48), mixer.init_state(2))
        mixer(torch.randn(2, 3, 48))
    assert len(seen) == 2


def test_gradients_longer_pieces_and_other_types_go_to_the_operators():
    mixer = Mamba2(32, d_state=8, headdim=16)
    assert not few_tokens.serves(mixer, torch.randn(1, 2, 32))
    with torch.no_grad():
        assert few_tokens.serves(mixer, torch.randn(1, 2, 32))
        assert not few_tokens.serves(mixer, torch.randn(1, 17, 32))
        assert not few_tokens.serves(mixer.double(), torch.randn(1, 2, 32).double())


BACKBONES = {
    "plain": ({"norm_eps": 0.1}, True),
    "attention": ({"attn_layer_idx": (1,), "attn_cfg": {"num_heads": 2}}, False),
    "MLPs": ({"d_intermediate": 24}, False),
}


@pytest.mark.parametrize(("options", "plain"), BACKBONES.values(), ids=BACKBONES)
def test_a_stream_through_a_backbone_is_one_pass(options, plain, monkeypatch):
    torch.manual_seed(0)
    config = BackboneConfig(48, 3, d_state=8, headdim=16, bidirectional=False, **options)
    backbone = Backbone(config).eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    u = torch.randn(2, 60, 48)
    calls = []
    forward = backbone.forward
    stream = FewTokensBackbone(backbone)
    with torch.inference_mode():
        expected, expected_state = backbone(u, return_state=True)
        monkeypatch.setattr(
            backbone, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k)
        )
        state, parts = backbone.init_state(2), []
        for piece in u.split([1, 3, 16, 17, 2, 21], 1):
            part, after = stream(piece, state)
            again, _ = stream(piece, state)
            assert torch.equal(part, again)  # the state is not modified
            state = after
            parts.append(part)
    assert len(calls) == (4 if plain else 12)  # twice each; plain: those longer than FEW alone
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(state, expected_state, strict=True):
        assert type(ours) is type(theirs)
        if plain:
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_backbone_in_training_or_with_gradients_is_called_as_it_is():
    config = BackboneConfig(32, 2, d_state=8, headdim=16, bidirectional=False, drop_path=0.5)
    backbone = Backbone(config)
    stream, u, state = FewTokensBackbone(backbone), torch.randn(1, 2, 32), backbone.init_state(1)
    assert stream(u, state)[0].requires_grad
    with torch.no_grad():
        torch.manual_seed(1)
        found, _ = stream(u, state)
        torch.manual_seed(1)
        expected, _ = backbone(u, state=state, return_state=True)
    assert torch.equal(found, expected)
