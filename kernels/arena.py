"""Scratch memory for the torch backend, which works through its tensors block by block.

Memory fresh from the system is mapped page by page at first touch, which can cost more than the
arithmetic done in it. So the intermediate results of every block lie in one allocation.
"""

import math

from torch import Tensor


class Arena:
    """Uninitialised tensors cut from one allocation, which `clear` makes free again."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat = like.new_empty(0)
        self._used = 0

    def clear(self) -> None:
        """Forget what was cut. The allocation grows to what the last round needed."""
        if self._used > self._flat.numel():
            self._flat = self._like.new_empty(self._used)
        self._used = 0

    def __call__(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        start, self._used = self._used, self._used + size
        if self._used > self._flat.numel():
            return self._like.new_empty(shape)
        return self._flat[start : self._used].view(shape)
