"""The plain path for a few tokens on a CPU gives what the operators give."""

import pytest
import torch

from mamba2_apps import few_tokens
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


def test_gradients_longer_pieces_and_other_types_go_to_the_operators():
    mixer = Mamba2(32, d_state=8, headdim=16)
    assert not few_tokens.serves(mixer, torch.randn(1, 2, 32))
    with torch.no_grad():
        assert few_tokens.serves(mixer, torch.randn(1, 2, 32))
        assert not few_tokens.serves(mixer, torch.randn(1, 17, 32))
        assert not few_tokens.serves(mixer.double(), torch.randn(1, 2, 32).double())
