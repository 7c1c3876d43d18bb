"""Which backend runs an op, and the argument checks that all ops share."""

import itertools
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

BACKENDS = ("auto", "triton", "torch")
HALF = (torch.bfloat16, torch.float16)
TRITON_DTYPES = (torch.float32, *HALF)


def resolve_backend(backend: str, x: Tensor) -> str:
    """Return "triton" or "torch" for an op whose main input is `x`.

    "auto" picks Triton for CUDA tensors of float32, bfloat16 and float16, and torch for float64,
    CPU and meta tensors. Raises ValueError for an unknown name, RuntimeError where the backend
    asked for cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"backend is {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}"
        )
    if is_exporting():
        if backend == "triton":
            raise RuntimeError('backend="triton" cannot be exported; use backend="auto" or "torch"')
        return "torch"
    if backend != "auto":
        if backend == "triton" and (reason := why_not_triton(x)):
            raise RuntimeError(f'backend="triton" cannot run here: {reason}; use backend="torch"')
        return backend
    # On CUDA a missing Triton is an error, not a reason to run slower without a word.
    if x.is_cuda and x.dtype in TRITON_DTYPES:
        if reason := why_not_triton(x):
            raise RuntimeError(f'backend="auto" picks Triton on CUDA, but {reason}')
        return "triton"
    return "torch"


def why_not_triton(x: Tensor) -> str | None:
    """Why the Triton backend cannot take `x`, or None where it can."""
    if x.dtype not in TRITON_DTYPES:
        return f"it computes float32, bfloat16 and float16, and x is {x.dtype}"
    if not _has_triton():
        return "the triton package is not installed (it exists for Linux only)"
    if not x.is_cuda and not (x.device.type == "cpu" and interpreting()):
        return f"x is on {x.device} and Triton needs a CUDA device (or TRITON_INTERPRET=1 on a CPU)"
    return None


def describe_backend(device: str | torch.device) -> str:
    """One sentence on what "auto" picks on `device` and why, for people."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"torch: {device.type} tensors run on plain torch operations"
    if not _has_triton():
        return "none: CUDA tensors run on Triton, and the triton package is not installed"
    return "triton: CUDA tensors of float32, bfloat16 and float16; torch for float64"


def interpreting() -> bool:
    """Whether Triton's interpreter is on, which runs the kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors outside compilation, modes and transforms of torch.

    Then nobody would notice a call that passes by torch's dispatcher, which takes its time.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(t is None or type(t) is Tensor or type(t) is Parameter for t in tensors)
    )


def is_exporting() -> bool:
    """Whether ops must decompose to ATen so that the exported file loads without this package.

    torch.compiler.is_exporting() is True under torch.compile as well, where the registered ops
    must stay whole.
    """
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return exporting or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def autocast(*tensors: Tensor | None) -> Any:
    """Cast to the autocast dtype of the first one's device where autocast is on, but not float64.

    Returns them in order, None where None was given.
    """
    assert tensors[0] is not None
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that `autocast` gives x."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Turns autocast off for x's device, where inner products would be cast to half again."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and states: float64 for float64, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def debugging() -> bool:
    """MAMBA2_APPS_DEBUG=1: values on the GPU are checked too, at the price of waiting for it."""
    return os.environ.get("MAMBA2_APPS_DEBUG", "0") == "1"


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise ValueError unless `tensor` has this shape and the device of x (`like`)."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device} and x on {like.device}; move one of them")


def check_same_dtype(x: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless x is floating point and the others share its dtype."""
    if x.dtype not in (*TRITON_DTYPES, torch.float64):
        raise ValueError(f"x has dtype {x.dtype}, expected float32, bfloat16, float16 or float64")
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype} and x {x.dtype}; they must be equal")


def check_parameter_dtype(x: Tensor, **parameters: Tensor | None) -> None:
    """Raise ValueError unless each has x's dtype or the wider one in which sums are kept."""
    allowed = {x.dtype, accumulate_dtype(x), torch.float32}
    for name, tensor in parameters.items():
        if tensor is not None and tensor.dtype not in allowed:
            expected = " or ".join(sorted(str(dtype) for dtype in allowed))
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected {expected}")


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, seqlen: int, like: Tensor) -> None:
    """Raise ValueError unless cu_seqlens packs sequences along one row of `seqlen` tokens.

    Its values are read where that costs nothing: on the CPU, and elsewhere only when debugging.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (nseq + 1,)")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens has dtype {cu_seqlens.dtype}, expected torch.int32")
    if cu_seqlens.device != like.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and x on {like.device}")
    if batch != 1:
        raise ValueError(f"x has batch size {batch}, expected 1 when cu_seqlens packs sequences")
    if can_read(cu_seqlens):
        values = cu_seqlens.tolist()
        rises = all(a < b for a, b in itertools.pairwise(values))
        if values[0] != 0 or values[-1] != seqlen or not rises:
            raise ValueError(
                f"cu_seqlens is {_short(values)}, expected values that rise from 0 to {seqlen} "
                "with no empty sequence"
            )


def can_read(tensor: Tensor) -> bool:
    """Whether looking at this tensor's values is free (or asked for by MAMBA2_APPS_DEBUG=1)."""
    if torch.compiler.is_compiling() or is_exporting() or tensor.is_meta:
        return False
    return not isinstance(tensor, torch._subclasses.FakeTensor) and (
        tensor.device.type == "cpu" or debugging()
    )


def check_limits(name: str, limits: tuple[float, float]) -> None:
    """Raise ValueError unless limits are a pair 0 ≤ low ≤ high: a step back in time would grow."""
    if len(limits) != 2 or not 0 <= limits[0] <= limits[1]:
        raise ValueError(f"{name} is {limits}, expected (low, high) with 0 <= low <= high")


def _short(values: list[int], keep: int = 8) -> str:
    shown = ", ".join(map(str, values[:keep]))
    return f"[{shown}, … {values[-1]}]" if len(values) > keep else f"[{shown}]"


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
