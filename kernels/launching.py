"""Launches prepared once for the shapes, strides and flags of a call.

A small shape takes less time on the GPU than Triton's launcher takes to look at some dozen
arguments, so the kernels compiled for a call are kept and called directly, with bare addresses.
"""

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .dispatch import interpreting


class Launch(NamedTuple):
    kernel: Any
    programs: int
    warps: int
    tensors: itemgetter  # which of the call's tensors come first
    rest: tuple  # the arguments after them


class Prepared:
    """Launches that calls of equal shapes, strides and flags have in common."""

    launches: list[Launch]

    def __init__(self, device: torch.device) -> None:
        self.device_index = device.index
        self.compiled: dict[Any, list[Any]] = {}

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        """kernel[grid](*args) for each, but Triton looks at the arguments the first time only."""
        self.run_at([None if t is None else t.data_ptr() for t in tensors], lambda: tensors)

    def run_at(
        self, pointers: list[int | None], tensors: Callable[[], Sequence[Tensor | None]]
    ) -> None:
        """`run` of what lies at these addresses; as tensors only where Triton wants to see them."""
        union = 0
        for pointer in pointers:
            union |= pointer or 0
        # Triton compiles for pointers that are multiples of 16, and again for each set that is not.
        aligned = None if union % 16 == 0 else tuple((p or 0) % 16 == 0 for p in pointers)
        compiled = self.compiled.get(aligned)
        if compiled is None:
            self.compiled[aligned] = self._first_run(tensors())
        elif compiled and not _is_watched():
            stream = driver.active.get_current_stream(self.device_index)
            for run, function, metadata, programs, pick, rest in compiled:
                run(
                    programs, 1, 1, stream, function, metadata, None, None, None,
                    *pick(pointers), *rest,
                )  # fmt: skip
        else:  # the interpreter, or a profiler that wants to know more
            seen = tensors()
            for kernel, programs, warps, pick, rest in self.launches:
                kernel[(programs,)](*pick(seen), *rest, num_warps=warps)

    def _first_run(self, tensors: Sequence[Tensor | None]) -> list[Any]:
        if interpreting():
            for kernel, programs, _, pick, rest in self.launches:
                kernel[(programs,)](*pick(tensors), *rest)
            return []
        # The compilers leave Python's lock: what is not in Triton's cache is built side by side.
        device = torch.cuda.current_device()

        def build(launch: Launch) -> None:
            kernel, programs, warps, pick, rest = launch
            torch.cuda.set_device(device)
            kernel.warmup(*pick(tensors), *rest, grid=(programs,), num_warps=warps)._init_handles()

        distinct = {launch.kernel: launch for launch in self.launches}
        with ThreadPoolExecutor(len(distinct)) as pool:
            list(pool.map(build, distinct.values()))
        compiled = []
        for kernel, programs, warps, pick, rest in self.launches:
            built = kernel[(programs,)](*pick(tensors), *rest, num_warps=warps)
            compiled.append(
                (built.run, built.function, built.packed_metadata, programs, pick, rest)
            )
        return compiled


def dot_precision(dtype: torch.dtype) -> str:
    """tf32 where torch's own products may use it, else three tf32 products for float32 accuracy."""
    if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "tf32x3"


def on(device: torch.device) -> Any:
    """Makes it the current device, where it is not."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def _is_watched() -> bool:
    """Whether a profiler asked Triton to be told of launches."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


_prepared: dict[Any, Any] = {}
_MOST_PREPARED = 4096


def prepare(make: type, tensors: tuple[Any, ...], *settings: Any) -> Any:
    """make(tensors, *settings) on the first call for such tensors and settings, kept for others."""
    key = (
        make, settings, torch.backends.cuda.matmul.allow_tf32,
        *[None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors],
    )  # fmt: skip
    prepared = _prepared.get(key)
    if prepared is None:
        if len(_prepared) >= _MOST_PREPARED:
            _prepared.clear()
        prepared = _prepared[key] = make(tensors, *settings)
    return prepared
