"""Adapters and models: a batch gives what each clip gives alone; nothing looks ahead; masking."""

from functools import partial

import pytest
import torch

from mamba2_apps.audio.adapter import FrameTokens, PatchTokens
from mamba2_apps.audio.features import Features
from mamba2_apps.audio.models import WIDTHS, audio_model, backbone_config
from mamba2_apps.backbone import BackboneConfig
from mamba2_apps.heads import PooledHead, TokenHead
from mamba2_apps.tasks import MaskedReconstruction, OptimizerConfig, SequenceModel

FEATURES = partial(Features, 16000, num_mels=32)
ADAPTERS = {
    "frames of 40 ms": partial(FrameTokens, features=FEATURES, channels=8),
    "frames of 20 ms": partial(FrameTokens, features=FEATURES, strides=(2, 1), channels=8),
    "patches": partial(PatchTokens, features=FEATURES),
}


def model(adapter, *, bidirectional=True, **options):
    torch.manual_seed(0)
    return SequenceModel(
        3,
        adapter=partial(adapter, **options),
        backbone=BackboneConfig(32, 2, d_state=8, headdim=16, bidirectional=bidirectional),
        head=PooledHead,
    ).eval()


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_batch_gives_what_each_clip_gives_alone(adapter, bidirectional):
    net = model(adapter, bidirectional=bidirectional)
    clips = [torch.randn(n) * 0.1 for n in (1, 399, 401, 2801, 9000)]
    batch = torch.full((5, 9999), torch.nan)
    mask = torch.zeros(batch.shape, dtype=torch.bool)
    for row, clip in enumerate(clips):
        start = 0 if row % 2 else 500
        batch[row, start : start + len(clip)] = clip
        mask[row, start : start + len(clip)] = True
    together, tokens = net(batch, mask), net.token_mask(batch, mask)
    for row, clip in enumerate(clips):
        torch.testing.assert_close(together[row], net(clip[None])[0], rtol=1e-4, atol=1e-5)
        assert int(tokens[row].sum()) == net.adapter(clip[None])[0].shape[1]
    assert torch.equal(net.features(batch, mask)[1], tokens)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_no_token_sees_what_comes_after_it(adapter):
    net = adapter(16).eval()
    clip = torch.randn(1, 16000)
    changed = clip.clone()
    changed[:, 8000:] = torch.randn(1, 8000)
    before, after = net(clip)[0], net(changed)[0]
    step = net.frames_per_step * net.features.hop / net.tokens_per_step
    last = int((8000 - net.features.win) / step) - net.tokens_per_step
    assert torch.equal(before[:, :last], after[:, :last])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_hidden_tokens_leave_no_trace_and_are_the_targets(adapter):
    net = adapter(16, maskable=True).eval()
    clip = torch.randn(1, 16000)
    length = net(clip)[0].shape[1]
    targets = net.targets(clip)
    assert targets.shape == (1, length, net.target_size)
    hide = torch.zeros(1, length, dtype=torch.bool)
    hide[:, 5:9] = True
    # Samples that only the hidden tokens stand for: what they are must not matter.
    frames = [
        f for f in range(net.features(clip)[0].shape[1])
        if 5 * net.tokens_per_step <= 0 or 5 <= _token_of(net, f) < 9
    ]  # fmt: skip
    if net.tokens_per_step == 1:
        other = clip.clone()
        first = frames[0] * 160 + 240  # later than the window of the frame before
        last = frames[-1] * 160 + 160  # earlier than that of the frame after
        other[:, first:last] = torch.randn(1, last - first)
        assert not torch.allclose(net(clip)[0], net(other)[0], atol=1e-4)
        torch.testing.assert_close(net(clip, None, hide)[0], net(other, None, hide)[0])
    hidden = net(clip, None, hide)[0]
    shown = net(clip)[0]
    changed = (hidden - shown).abs().amax(-1)[0] > 1e-6
    assert changed[5:9].all()
    assert not changed[:5].any()
    with pytest.raises(ValueError, match="maskable=True"):
        adapter(16)(clip, None, hide)


def _token_of(net, frame):
    return -(-frame // net.frames_per_step)


def test_targets_are_the_features_of_their_own_frames():
    clip = torch.randn(1, 8000)
    frames = ADAPTERS["frames of 40 ms"](16, maskable=True).train()
    features = frames.features.eval()(clip)[0][0]
    targets = frames.train().targets(clip)[0].unflatten(1, (4, 32))
    assert torch.equal(targets[2], features[5:9])
    assert not targets[0, :3].any()
    patches = ADAPTERS["patches"](16, maskable=True)
    values = patches.targets(clip)[0].unflatten(1, (16, 16))
    assert torch.equal(values[3], features[16:32, 16:])


def test_masked_pretraining_learns_through_both_adapters():
    for adapter in ADAPTERS.values():
        net = SequenceModel(
            0,
            adapter=partial(adapter, maskable=True),
            backbone=BackboneConfig(32, 1, d_state=8, headdim=16, bidirectional=True),
            head=TokenHead,
        )
        task = MaskedReconstruction(net, [], OptimizerConfig(), mask_ratio=0.5)
        batch = {"inputs": torch.randn(2, 6000)}
        prepared = task.prepare(batch, 0, "val")
        loss = task.loss(task(prepared), prepared)
        loss.backward()
        assert net.adapter.mask_token.grad.abs().sum() > 0
        assert torch.isfinite(loss)


@pytest.mark.parametrize("size", WIDTHS)
def test_sizes_are_those_of_vision(size):
    import timm

    import mamba2_apps.vision  # noqa: F401

    with torch.device("meta"):
        vision = timm.create_model(f"bimamba2_{size}_patch16_224")
        audio = audio_model(5, size)
    ours = {name: p.shape for name, p in audio.backbone.named_parameters()}
    assert ours == {name: p.shape for name, p in vision.backbone.named_parameters()}


@pytest.mark.parametrize("tokens", ["patch", "frame"])
@pytest.mark.parametrize("head", ["clip", "frame", "ctc", "embedding"])
def test_every_head_answers(tokens, head):
    net = audio_model(
        4, tokens=tokens, head=head, causal=True,
        backbone={"d_state": 8}, features={"num_mels": 64},
    )  # fmt: skip
    out = net.eval()(torch.randn(2, 8000))
    steps = {"patch": 3, "frame": 12}[tokens]  # of 160 ms and of 40 ms
    expected = {
        "clip": (2, 4),
        "embedding": (2, 192),
        "frame": (2, steps, 4),
        "ctc": (2, 12, 5),
    }[head]
    assert tuple(out.shape) == expected


def test_impossible_models_are_named():
    with pytest.raises(ValueError, match="size is 'large', expected one of tiny, small, base"):
        backbone_config("large")
    with pytest.raises(ValueError, match="expected a divisor of the 40 mel bins"):
        PatchTokens(8, features=partial(Features, 16000, num_mels=40))
    with pytest.raises(ValueError, match=r"strides is \[\]"):
        FrameTokens(8, features=FEATURES, strides=())
