"""Images: a picture becomes a row-major sequence of patches.

Importing this registers the models with timm: timm.create_model("bimamba2_tiny_patch16_224").
"""

from mamba2_apps.vision import models

__all__ = ["models"]
