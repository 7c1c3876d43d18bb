"""From waveforms to token embeddings: frames, subsampled by convolutions, or patches of 16 x 16.

Nothing looks ahead of the token that it makes, so that a causal model can run on a stream; a token
depends on the clip alone, so that padding in a batch changes nothing. No position along time is
added: the backbone's scan knows the order, and clips may have any length.

Both adapters take waveforms (b, n) with a mask (b, n), and compute the features themselves, on the
device that they lie on. With `maskable` they can be pretrained: `hide` (b, l) bool replaces tokens
by a learned vector, and `targets` are the normalised features that each token stands for.

Dimensions: batch b · samples n · frames t · mel bins m · seqlen l (tokens) · d_model d
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from mamba2_apps.audio.features import Features
from mamba2_apps.padding import data_positions

KERNEL = 3


class AudioAdapter(nn.Module):
    """What both kinds of tokens share.

    `frames_per_step` frames become `tokens_per_step` tokens. Of the first step's frames,
    `frames_before` would lie before the clip.
    """

    frames_per_step: int
    tokens_per_step: int
    frames_before = 0
    target_size: int
    mask_token: Tensor

    def __init__(self, d_model: int, features: Features, dropout: float, maskable: bool) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"adapter.dropout is {dropout}, expected at least 0 and below 1")
        self.features, self.maskable = features, maskable
        self.dropout = nn.Dropout(dropout)
        if maskable:
            self.mask_token = nn.Parameter(torch.empty(d_model))
            trunc_normal_(self.mask_token, std=0.02)

    @property
    def step_seconds(self) -> float:
        """Time from one token, or one step of `tokens_per_step` tokens, to the next."""
        return self.frames_per_step * self.features.hop / self.features.sample_rate

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimizer must not decay."""
        return {name for name in ("frequency_embed",) if hasattr(self, name)}

    def token_counts(self, frames: Tensor) -> Tensor:
        """Tokens of clips of that many frames."""
        steps = (frames + self.frames_per_step - 1).div(self.frames_per_step, rounding_mode="floor")
        return steps * self.tokens_per_step

    def token_mask(self, inputs: Tensor, mask: Tensor | None) -> Tensor | None:
        """Which tokens (b, l) stand for data, as `forward` returns it."""
        if mask is None:
            return None
        frames = self.features.frame_counts(torch.tensor(inputs.shape[1]))
        length = int(self.token_counts(frames))
        return data_positions(self.token_counts(self.features.frame_counts(mask.sum(1))), length)

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, hide: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Waveforms (b, n) to embeddings (b, l, d) and, where a mask is given, that of the tokens.

        Args:
            inputs: (b, n) float, full scale from -1 to 1.
            mask: (b, n) bool, True where there is data, one run a row.
            hide: (b, l) bool, tokens to replace by the mask token.
        """
        if hide is not None and not self.maskable:
            raise ValueError("hide was given; build the adapter with maskable=True")
        features, counts = self.features(inputs, mask)
        tokens = self.dropout(self.embed(features, hide))
        if counts is None:
            return tokens, None
        return tokens, data_positions(self.token_counts(counts), tokens.shape[1])

    def embed(self, features: Tensor, hide: Tensor | None = None) -> Tensor:
        """Normalised features (b, t, m) to embeddings (b, l, d)."""
        raise NotImplementedError


class FrameTokens(AudioAdapter):
    """One token for every few frames, from convolutions over time and frequency.

    Each convolution looks at 3 x 3 features, in time at the present and the two before, and halves
    the mel bins; its stride in time is one of `strides`. As in most recognisers (Gulati et al.
    2020), but causal.

    Args:
        d_model: width of the embeddings.
        features: called with nothing, gives the `Features`.
        strides: stride in time of each convolution; their product is frames per token.
        channels: of the convolutions.
        dropout: part of the embeddings' values that training sets to 0.
        maskable: own a mask token.
    """

    tokens_per_step = 1

    def __init__(
        self,
        d_model: int,
        *,
        features: Callable[[], Features],
        strides: Sequence[int] = (2, 2),
        channels: int = 64,
        dropout: float = 0.0,
        maskable: bool = False,
    ) -> None:
        super().__init__(d_model, features(), dropout, maskable)
        if not strides or min(strides) < 1:
            raise ValueError(f"adapter.strides is {list(strides)}, expected steps of at least 1")
        self.strides = tuple(strides)
        self.frames_per_step = math.prod(self.strides)
        self.frames_before = self.frames_per_step - 1
        self.target_size = self.frames_per_step * self.features.num_mels
        bins = self.features.num_mels
        self.convs = nn.ModuleList()
        for index, stride in enumerate(self.strides):
            # Frequency is padded on both sides; time by the state of a stream, zeros at its start.
            self.convs.append(
                nn.Conv2d(
                    1 if index == 0 else channels,
                    channels,
                    KERNEL,
                    stride=(stride, 2),
                    padding=(0, 1),
                )
            )
            bins = (bins + 1) // 2
        self.proj = nn.Linear(channels * bins, d_model)
        self.norm = nn.LayerNorm(d_model)

    def embed(self, features: Tensor, hide: Tensor | None = None) -> Tensor:
        if hide is not None:
            # Neighbours' convolutions must not see what is to be guessed either.
            # Token i stands for frame i * frames_per_step, the last it sees, and those before it.
            frames = F.pad(
                hide.repeat_interleave(self.frames_per_step, 1), (0, self.frames_per_step)
            )
            frames = frames[:, self.frames_before :][:, : features.shape[1]]
            features = features.masked_fill(frames[..., None], 0.0)
        x = features[:, None]
        for index in range(len(self.convs)):
            x = self.convolve(index, F.pad(x, (0, 0, KERNEL - 1, 0)))
        tokens = self.project(x)
        return tokens if hide is None else torch.where(hide[..., None], self.mask_token, tokens)

    def convolve(self, index: int, x: Tensor) -> Tensor:
        """One convolution over (b, channels, t, m), whose first two frames are the ones before."""
        return F.gelu(self.convs[index](x))

    def project(self, x: Tensor) -> Tensor:
        """(b, channels, l, bins) to embeddings (b, l, d)."""
        return self.norm(self.proj(x.transpose(1, 2).flatten(2)))

    def targets(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of each token's own frames, (b, l, frames_per_step · m); 0 before the clip."""
        features, _ = self.features.extract(inputs, mask)
        length = int(self.token_counts(torch.tensor(features.shape[1])))
        after = length * self.frames_per_step - self.frames_before - features.shape[1]
        return (
            F.pad(features, (0, 0, self.frames_before, after)).unflatten(1, (length, -1)).flatten(2)
        )


class PatchTokens(AudioAdapter):
    """A token for each patch of 16 frames by 16 mel bins (Gong et al. 2021), low bins first.

    The patches of one stretch of time follow each other, so that a scan meets them as they come. A
    learned vector tells them apart. The last patch of a clip is filled up with silence.

    Args:
        d_model: width of the embeddings.
        features: called with nothing, gives the `Features`.
        patch_size: frames and mel bins of a patch.
        dropout: part of the embeddings' values that training sets to 0.
        maskable: own a mask token.
    """

    def __init__(
        self,
        d_model: int,
        *,
        features: Callable[[], Features],
        patch_size: int = 16,
        dropout: float = 0.0,
        maskable: bool = False,
    ) -> None:
        super().__init__(d_model, features(), dropout, maskable)
        if patch_size < 1 or self.features.num_mels % patch_size:
            raise ValueError(
                f"adapter.patch_size is {patch_size}, expected a divisor of the "
                f"{self.features.num_mels} mel bins"
            )
        self.frames_per_step = patch_size
        self.tokens_per_step = self.features.num_mels // patch_size
        self.target_size = patch_size * patch_size
        self.proj = nn.Linear(self.target_size, d_model)
        self.frequency_embed = nn.Parameter(torch.empty(self.tokens_per_step, d_model))
        trunc_normal_(self.frequency_embed, std=0.02)

    def embed(self, features: Tensor, hide: Tensor | None = None) -> Tensor:
        tokens = self.proj(self.patches(features))
        if hide is not None:
            tokens = torch.where(hide[..., None], self.mask_token, tokens)
        steps = tokens.shape[1] // self.tokens_per_step
        return tokens + self.frequency_embed.repeat(steps, 1)

    def patches(self, features: Tensor) -> Tensor:
        """Normalised features (b, t, m) to patches (b, l, patch_size²), the end filled up."""
        size = self.frames_per_step
        missing = -features.shape[1] % size
        if missing:
            silence = self.features.normalize(
                torch.full_like(self.features.mean, self.features.floor)
            )
            rows = silence.expand(features.shape[0], missing, -1)
            features = torch.cat([features, rows.to(features.dtype)], 1)
        blocks = features.unflatten(1, (-1, size)).unflatten(3, (-1, size))  # (b, steps, size, …)
        return blocks.transpose(2, 3).flatten(1, 2).flatten(2)

    def targets(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of each patch, (b, l, patch_size²)."""
        return self.patches(self.features.extract(inputs, mask)[0])
