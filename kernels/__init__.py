"""The operators that the backbone is made of, each on plain torch and on Triton."""

from .block import mamba2_block
from .causal_conv1d import causal_conv1d
from .conv_ssd_norm import conv_ssd_norm
from .gated_rms_norm import gated_rms_norm
from .ssd import ssd, ssd_bidirectional, ssd_step

__all__ = [
    "causal_conv1d",
    "conv_ssd_norm",
    "gated_rms_norm",
    "mamba2_block",
    "ssd",
    "ssd_bidirectional",
    "ssd_step",
]
