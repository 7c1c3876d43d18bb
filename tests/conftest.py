"""Without a GPU, Triton kernels run under Triton's interpreter; it asks when Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
