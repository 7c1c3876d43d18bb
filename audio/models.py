"""Audio models of the sizes that every domain shares, so that backbones move between them.

| size  | d_model | blocks | parameters of the bidirectional backbone |
|-------|---------|--------|------------------------------------------|
| tiny  | 192     | 24     | 6 million                                |
| small | 384     | 24     | 23 million                               |
| base  | 768     | 24     | 89 million                               |
"""

from functools import partial
from typing import Any, Literal

from torch import nn

from mamba2_apps.audio.adapter import FrameTokens, PatchTokens
from mamba2_apps.audio.features import Features
from mamba2_apps.backbone import BackboneConfig
from mamba2_apps.heads import CTCHead, EmbeddingHead, PooledHead, TokenHead, TrackHead
from mamba2_apps.tasks import SequenceModel

WIDTHS = {"tiny": 192, "small": 384, "base": 768}
HeadName = Literal["clip", "frame", "ctc", "embedding"]


def backbone_config(size: str, *, causal: bool = False, **options: Any) -> BackboneConfig:
    """The backbone of a size, as timm's `bimamba2_<size>_patch16_224` has it.

    Args:
        size: tiny, small or base.
        causal: scan forward only, for streams.
        options: further options of BackboneConfig.

    Raises ValueError for another size.
    """
    if size not in WIDTHS:
        raise ValueError(f"size is {size!r}, expected one of {', '.join(WIDTHS)}")
    options = {"d_state": 64, "headdim": 64, "bidirectional": not causal, **options}
    return BackboneConfig(WIDTHS[size], 24, **options)


def audio_model(
    num_outputs: int,
    size: str = "tiny",
    *,
    tokens: Literal["patch", "frame"] = "patch",
    head: HeadName = "clip",
    causal: bool = False,
    features: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
    backbone: dict[str, Any] | None = None,
) -> SequenceModel:
    """A model over waveforms of 16 kHz with a mask, (b, n) each.

    Args:
        num_outputs: classes, tags or letters; not used by an embedding.
        size: tiny, small or base.
        tokens: patches of 16 x 16 features, or frames subsampled by convolutions.
        head: an answer for a clip, for each frame (with patches, for each 16 frames), letters in
            order, or an embedding (b, d_model).
        causal: for streams.
        features: options of `Features`, such as sample_rate.
        adapter: further options of `PatchTokens` or `FrameTokens`.
        backbone: further options of BackboneConfig.
    """
    if tokens not in ("patch", "frame"):
        raise ValueError(f"tokens is {tokens!r}, expected patch or frame")
    features = {"sample_rate": 16000, **(features or {})}
    kind = PatchTokens if tokens == "patch" else FrameTokens
    return SequenceModel(
        num_outputs,
        adapter=partial(kind, features=partial(Features, **features), **(adapter or {})),
        backbone=backbone_config(size, causal=causal, **(backbone or {})),
        head=partial(_head, head, features.get("num_mels", 128) // 16 if tokens == "patch" else 1),
    )


def _head(name: HeadName, tokens_per_step: int, d_model: int, num_outputs: int) -> nn.Module:
    if name == "clip":
        return PooledHead(d_model, num_outputs)
    if name == "ctc":
        return CTCHead(d_model, num_outputs)
    if name == "embedding":
        return EmbeddingHead()
    if name != "frame":
        raise ValueError(f"head is {name!r}, expected clip, frame, ctc or embedding")
    if tokens_per_step == 1:
        return TokenHead(d_model, num_outputs)
    return TrackHead(d_model, num_outputs, bin_size=tokens_per_step)
