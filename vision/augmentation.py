"""Random changes of a batch of images where it lies, a GPU for one: no work for the loader.

Every draw comes from the global generators, which training seeds by (seed, epoch, batch).

Dimensions: batch b · channels c · height H · width W · classes k
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def shift_and_flip(images: Tensor, max_shift: int, flip: bool, ground: float) -> Tensor:
    """Each image (b, c, H, W) moved by up to max_shift pixels either way, and mirrored or not.

    ground is the value of what comes in from outside.
    """
    b, _, height, width = images.shape
    device = images.device
    padded = F.pad(images, (max_shift,) * 4, value=ground)
    down, right = torch.randint(0, 2 * max_shift + 1, (2, b, 1), device=device)
    rows = torch.arange(height, device=device) + down
    columns = torch.arange(width, device=device) + right
    if flip:
        mirrored = torch.rand(b, 1, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    sample = torch.arange(b, device=device)[:, None, None]
    moved = padded.movedim(1, -1)[sample, rows[:, :, None], columns[:, None, :]]
    return moved.movedim(-1, 1)


def erase(
    images: Tensor,
    probability: float,
    area: tuple[float, float] = (0.02, 0.33),
    aspect: float = 3.0,
) -> Tensor:
    """Random erasing (Zhong et al. 2020, arXiv:1708.04896): a rectangle of noise in an image.

    Args:
        images: (b, c, H, W), normalised; the noise is normal with mean 0 and deviation 1.
        probability: share of the images that get a rectangle.
        area: least and largest share of the image that it covers.
        aspect: largest ratio of its sides, either way.
    """
    b, _, height, width = images.shape
    chance, size, shape, y, x = torch.rand(5, b, 1, 1, device=images.device)
    size = (area[0] + size * (area[1] - area[0])) * height * width
    ratio = torch.exp((2 * shape - 1) * math.log(aspect))
    tall = (size * ratio).sqrt().round().clamp(max=height)
    wide = (size / ratio).sqrt().round().clamp(max=width)
    top, left = ((height - tall + 1) * y).floor(), ((width - wide + 1) * x).floor()
    rows = torch.arange(height, device=images.device)[:, None]
    columns = torch.arange(width, device=images.device)
    inside = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
    inside = inside & (chance < probability)
    return torch.where(inside[:, None], torch.randn_like(images), images)
