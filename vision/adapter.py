"""From images to a sequence of tokens, one per cell of a grid, row by row.

Dimensions: batch b · channels c · height H · width W · seqlen l (rows × columns, and the class
token) · d_model d
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, to_2tuple, trunc_normal_
from torch import Tensor, nn


class ImageTokens(nn.Module, ABC):
    """A grid of features, flattened row by row, with a learned position for each cell.

    A subclass says what the grid is. Parameters are named as in timm's models (`pos_embed`,
    `cls_token`).

    Args:
        d_model: width of the embeddings.
        grid_size: rows and columns that the positions are made for; other grids get them resampled
            (bicubic).
        in_chans: channels of the image.
        class_token: a learned token in the middle of the sequence, at index (l - 1) // 2 of its l
            tokens, for a head that pools there.
    """

    def __init__(
        self, d_model: int, *, grid_size: tuple[int, int], in_chans: int, class_token: bool
    ) -> None:
        super().__init__()
        self.grid_size, self.in_chans = grid_size, in_chans
        self.pos_embed = nn.Parameter(torch.empty(1, grid_size[0] * grid_size[1], d_model))
        trunc_normal_(self.pos_embed, std=0.02)
        self.cls_token: nn.Parameter | None = None
        if class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, d_model))
            trunc_normal_(self.cls_token, std=0.02)
        self.mask_token: nn.Parameter | None = None

    @abstractmethod
    def grid(self, inputs: Tensor) -> Tensor:
        """Images (b, c, H, W) to features (b, d, rows, columns)."""

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimizer must not decay."""
        return {"pos_embed"} | (set() if self.cls_token is None else {"cls_token"})

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, hide: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Images (b, c, H, W) to embeddings (b, l, d); there is no padding, so no mask.

        hide (b, l) bool: cells that the mask token replaces, before positions are added; an adapter
        built with `maskable` has one. Raises ValueError for another number of channels, an image
        too small for one cell, or hide without a mask token.
        """
        if mask is not None:
            raise ValueError("mask was given; images of a batch have one size and need none")
        if inputs.dim() != 4 or inputs.shape[1] != self.in_chans:
            raise ValueError(
                f"inputs has shape {tuple(inputs.shape)}, expected (b, {self.in_chans}, H, W)"
            )
        features = self.grid(inputs)
        tokens = features.flatten(2).transpose(1, 2)
        if hide is not None:
            if self.mask_token is None:
                raise ValueError("hide was given; build the adapter with maskable=True")
            tokens = torch.where(hide[..., None], self.mask_token.to(tokens.dtype), tokens)
        tokens = tokens + self._positions(features.shape[2:])
        if self.cls_token is not None:
            middle = tokens.shape[1] // 2
            token = self.cls_token.to(tokens.dtype).expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens[:, :middle], token, tokens[:, middle:]], dim=1)
        return tokens, None

    def fit_tensors(
        self, tensors: dict[str, Tensor], settings: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Weights of another such adapter, its positions resampled to this one's grid.

        settings: its "class_path" and "init_args", which tell its grid. Without them, or of another
        class, the tensors are given back as they are.
        """
        if settings.get("class_path", "").rpartition(".")[2] != type(self).__name__:
            return tensors
        with torch.device("meta"):
            grid = type(self)(1, **settings.get("init_args", {})).grid_size
        if grid == self.grid_size:
            return tensors
        positions = resample_abs_pos_embed(
            tensors["pos_embed"], list(self.grid_size), list(grid), num_prefix_tokens=0
        )
        return {**tensors, "pos_embed": positions}

    def _positions(self, grid: torch.Size) -> Tensor:
        if tuple(grid) == self.grid_size:
            return self.pos_embed
        return resample_abs_pos_embed(
            self.pos_embed, list(grid), list(self.grid_size), num_prefix_tokens=0
        )


class PatchProjection(nn.Conv2d):
    """A convolution without padding, as one product where its patches do not overlap.

    cuDNN takes far longer. What is left of the image at the right and at the bottom is dropped, as
    a convolution does.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.stride != self.kernel_size:
            return F.conv2d(input, self.weight, self.bias, self.stride)
        b, c, height, width = input.shape
        p, q = self.kernel_size
        rows, columns = height // p, width // q
        patches = input[:, :, : rows * p, : columns * q].reshape(b, c, rows, p, columns, q)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PatchEmbedding(ImageTokens):
    """Cut an image into patches and project each to d_model (`proj`, as in timm's models).

    Args:
        d_model: width of the embeddings.
        image_size: height and width that the position embedding is made for.
        patch_size: side of a patch in pixels.
        stride: distance between patches; None: patch_size, so that they do not overlap.
        in_chans: channels of the image.
        class_token: a learned token in the middle of the sequence.
        maskable: own a mask token, for pretraining: hidden patches are given back as pixels, each
            patch with mean 0 and variance 1 (He et al. 2022, arXiv:2111.06377).
    """

    def __init__(
        self,
        d_model: int,
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        stride: int | None = None,
        in_chans: int = 3,
        class_token: bool = False,
        maskable: bool = False,
    ) -> None:
        self_stride = stride or patch_size
        grid_size = _patches(to_2tuple(image_size), patch_size, self_stride)
        super().__init__(d_model, grid_size=grid_size, in_chans=in_chans, class_token=class_token)
        self.patch_size, self.stride = patch_size, self_stride
        self.proj = PatchProjection(in_chans, d_model, patch_size, stride=self.stride)
        if maskable:
            if class_token or self.stride < patch_size:
                raise ValueError(
                    f"maskable with class_token {class_token} and stride {self.stride}: hidden "
                    f"patches need stride {patch_size}, patch_size, and no class token"
                )
            self.mask_token = nn.Parameter(torch.zeros(d_model))
        self.target_size = in_chans * patch_size**2

    def targets(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """What each token gives back, (b, l, target_size): its patch's pixels, normalised."""
        patches = F.unfold(inputs, self.patch_size, stride=self.stride).mT
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()

    def grid(self, inputs: Tensor) -> Tensor:
        _patches(inputs.shape[2:], self.patch_size, self.stride)  # refuses smaller images
        return self.proj(inputs)


class ConvStem(ImageTokens):
    """Residual convolutions at full, half, quarter, … resolution; a token per pixel of the last.

    For small images, where patches would leave few tokens and no view of edges. Each stage after
    the first halves the resolution; a block is two 3 × 3 convolutions with batch norm around a
    residual (He et al. 2016, arXiv:1512.03385).

    Args:
        d_model: width of the embeddings.
        image_size: height and width that the position embedding is made for.
        in_chans: channels of the image.
        widths: channels of each stage.
        blocks: residual blocks of each stage.
        class_token: a learned token in the middle of the sequence.
    """

    def __init__(
        self,
        d_model: int,
        *,
        image_size: int | tuple[int, int],
        in_chans: int = 3,
        widths: tuple[int, ...] = (64, 128),
        blocks: tuple[int, ...] = (1, 1),
        class_token: bool = False,
    ) -> None:
        if len(widths) != len(blocks) or not widths:
            raise ValueError(
                f"widths {widths} and blocks {blocks}: expected one of each for every stage"
            )
        height, width = to_2tuple(image_size)
        for _ in widths[1:]:
            height, width = (height + 1) // 2, (width + 1) // 2
        super().__init__(
            d_model, grid_size=(height, width), in_chans=in_chans, class_token=class_token
        )
        stages: list[nn.Module] = []
        before = in_chans
        for i, (channels, depth) in enumerate(zip(widths, blocks, strict=True)):
            stages += [_conv(before, channels, stride=1 if i == 0 else 2), nn.GELU()]
            stages += [_Residual(channels) for _ in range(depth)]
            before = channels
        # Channels last, which tensor cores read as it is, and which leaves tokens in rows. It is
        # the weights that decide: an image of one channel has both layouts at once.
        self.stages, self.proj = nn.Sequential(*stages), nn.Conv2d(before, d_model, 1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def grid(self, inputs: Tensor) -> Tensor:
        return self.proj(self.stages(inputs))


class _Residual(nn.Module):
    """x + conv(gelu(conv(x))), each convolution with its batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = _conv(channels, channels), _conv(channels, channels)
        nn.init.zeros_(self.second[1].weight)  # type: ignore[arg-type]  # the block starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.second(F.gelu(self.first(x))))


def _conv(before: int, channels: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(before, channels, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def _patches(size: Sequence[int], patch_size: int, stride: int) -> tuple[int, int]:
    """Rows and columns of patches. Raises ValueError for an image smaller than a patch."""
    height, width = size
    if min(height, width) < patch_size:
        raise ValueError(
            f"an image of {height} x {width} pixels is smaller than a patch, {patch_size}; resize "
            "it, or choose a smaller patch_size"
        )
    return (height - patch_size) // stride + 1, (width - patch_size) // stride + 1
