"""From images to a sequence of patch embeddings.

Dimensions: batch b · channels c · height H · width W · seqlen l (rows × columns of patches) ·
d_model d
"""

import torch
from timm.layers import resample_abs_pos_embed, to_2tuple, trunc_normal_
from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """Cut an image into patches, project each to d_model and add a learned position, row by row.

    Parameters are named as in timm's models (`proj`, `pos_embed`).

    Args:
        d_model: width of the embeddings.
        image_size: height and width that the position embedding is made for; other sizes get it
            resampled (bicubic).
        patch_size: side of a patch in pixels.
        stride: distance between patches; None: patch_size, so that they do not overlap.
        in_chans: channels of the image.
    """

    def __init__(
        self,
        d_model: int,
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        stride: int | None = None,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.patch_size, self.stride, self.in_chans = patch_size, stride or patch_size, in_chans
        self.grid_size = self._grid(*to_2tuple(image_size))
        self.proj = nn.Conv2d(in_chans, d_model, patch_size, stride=self.stride)
        rows, columns = self.grid_size
        self.pos_embed = nn.Parameter(torch.empty(1, rows * columns, d_model))
        trunc_normal_(self.pos_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimizer must not decay."""
        return {"pos_embed"}

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        """Images (b, c, H, W) to embeddings (b, l, d); there is no padding, so no mask.

        Raises ValueError for another number of channels, or an image smaller than a patch.
        """
        if mask is not None:
            raise ValueError("mask was given; images of a batch have one size and need none")
        if inputs.dim() != 4 or inputs.shape[1] != self.in_chans:
            raise ValueError(
                f"inputs has shape {tuple(inputs.shape)}, expected (b, {self.in_chans}, H, W)"
            )
        grid = self._grid(*inputs.shape[2:])
        embeddings = self.proj(inputs).flatten(2).transpose(1, 2)
        return embeddings + self._positions(grid), None

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid_size:
            return self.pos_embed
        return resample_abs_pos_embed(
            self.pos_embed, list(grid), list(self.grid_size), num_prefix_tokens=0
        )

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        if min(height, width) < self.patch_size:
            raise ValueError(
                f"an image of {height} x {width} pixels is smaller than a patch, {self.patch_size}"
            )
        rows, columns = ((side - self.patch_size) // self.stride + 1 for side in (height, width))
        return rows, columns
