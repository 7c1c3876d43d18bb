"""Scratch memory for the torch backend, which works through its tensors block by block.

Memory fresh from the system is mapped page by page at first touch, which can cost more than the
arithmetic done in it. So the intermediate results of all blocks lie in one allocation, which each
thread keeps from call to call.
"""

import math
import threading
from types import TracebackType

import torch
from torch import Tensor

KEPT_BYTES = 2**26

_kept = threading.local()


class Arena:
    """Uninitialised tensors cut from one allocation, which `clear` makes free again.

    As a context manager it takes the thread's allocation, and on exit leaves it to the next call
    where it is of at most KEPT_BYTES.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat = like.new_empty(0)
        self._used = 0

    def __enter__(self) -> "Arena":
        kept = _kept.__dict__.pop("buffer", None)
        if kept is not None and (kept.dtype, kept.device) == (self._like.dtype, self._like.device):
            self._flat = kept
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        fit = self._flat.device.type == "cpu" and self._flat.nbytes <= KEPT_BYTES
        if fit and not self._flat.is_inference():
            _kept.buffer = self._flat

    def clear(self) -> None:
        """Forget what was cut. The allocation grows to what the last round needed."""
        if self._used > self._flat.numel():
            # A tensor made under inference mode could not be written to outside it.
            with torch.inference_mode(False):
                self._flat = torch.empty(
                    self._used, dtype=self._like.dtype, device=self._like.device
                )
        self._used = 0

    def __call__(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        start, self._used = self._used, self._used + size
        if self._used > self._flat.numel():
            return self._like.new_empty(shape)
        return self._flat[start : self._used].view(shape)
