"""One Mamba-2 (SSD) backbone for images, DNA and audio.

Names are imported on first use, so that `import mamba2_apps` costs nothing.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mamba2_apps.backbone import Backbone, BackboneConfig
    from mamba2_apps.mixer import Mamba2
    from mamba2_apps.predictor import load

__version__ = version("mamba2-apps")
__all__ = ["Backbone", "BackboneConfig", "Mamba2", "__version__", "load"]

_HOME = {
    "Backbone": "backbone",
    "BackboneConfig": "backbone",
    "Mamba2": "mixer",
    "load": "predictor",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
