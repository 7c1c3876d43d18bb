"""Times the kernels beside the SSD against eager torch and against the bytes they must move.

Dimension legend: batch b · seqlen l · channels d · nheads h · headdim p · dstate n

    python benchmarks/kernels.py

bfloat16 on one GPU, medians with the L2 cache cleared between repetitions. The floor of a row is
each input read and each output written once, at the copy rate measured here. "apart" is the same
with the activation, or the gate, as an operation of its own: what fusing it gives. Splitting the
convolution's output into x, B and C is a view, which the SSD reads with its strides, so there is
nothing to fuse. Results go to results/kernels.json.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _record import write_record
from torch import Tensor
from triton.testing import do_bench

from mamba2_apps.kernels import causal_conv1d, gated_rms_norm, ssd_step

WIDTH = 4
# (b, l, d) of the convolution and, with d_inner channels, of the norm
BLOCKS = {"lm_4k": (8, 4096, 1792, 1536), "vision_197": (128, 197, 896, 768)}
STEPS = {"decode_64": (64, 24, 64, 128), "decode_1": (1, 24, 64, 128)}  # (b, h, p, n)


def copy_rate() -> float:
    """Bytes a millisecond, read plus written."""
    source = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    milliseconds = do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.numel() * source.element_size() / milliseconds


def time_both(function: Callable[..., Tensor], tensors: list[Tensor]) -> dict[str, float]:
    """Forward without gradients, and forward with backward to every input, in milliseconds."""

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*tensors)

    dout = torch.randn_like(forward())

    def backward() -> Any:
        return torch.autograd.grad(function(*tensors), tensors, dout)

    return {
        "forward_ms": do_bench(forward, return_mode="median"),
        "forward_backward_ms": do_bench(backward, return_mode="median"),
    }


def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*size, device="cuda").to(dtype).requires_grad_()


def convolution(b: int, l: int, d: int, rate: float) -> dict[str, Any]:
    tensors = [normal(b, l, d), normal(d, WIDTH, dtype=torch.float32)]
    tensors.append(normal(d, dtype=torch.float32))

    def fused(x, weight, bias):
        return causal_conv1d(x, weight, bias, activation="silu")

    def apart(x, weight, bias):
        return F.silu(causal_conv1d(x, weight, bias))

    def eager(x, weight, bias):
        kernel = weight.to(x.dtype)[:, None]
        y = F.conv1d(x.mT, kernel, bias.to(x.dtype), padding=WIDTH - 1, groups=x.shape[2])
        return F.silu(y[..., : x.shape[1]].mT)

    x = b * l * d * 2
    return _rows(tensors, (fused, apart, eager), (2 * x, 5 * x), rate)


def norm(b: int, l: int, d: int, rate: float) -> dict[str, Any]:
    tensors = [normal(b, l, d), normal(d, dtype=torch.float32), normal(b, l, d)]

    def fused(x, weight, z):
        return gated_rms_norm(x, weight, z)

    def apart(x, weight, z):
        return gated_rms_norm(x * F.silu(z), weight)

    def eager(x, weight, z):
        v = x.float() * F.silu(z.float())
        return (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-5) * weight).to(x.dtype)

    x = b * l * d * 2
    return _rows(tensors, (fused, apart, eager), (3 * x, 8 * x), rate)


def _rows(
    tensors: list[Tensor],
    functions: tuple[Callable[..., Tensor], ...],
    moved: tuple[int, int],
    rate: float,
) -> dict[str, Any]:
    names = [function.__name__ for function in functions]
    measured = {n: time_both(f, tensors) for n, f in zip(names, functions, strict=True)}
    floor = {"forward_ms": moved[0] / rate, "forward_backward_ms": moved[1] / rate}
    return {"floor": floor} | measured


def step(b: int, h: int, p: int, n: int, rate: float) -> dict[str, Any]:
    state = torch.randn(b, h, p, n, device="cuda")
    x, B, C = (torch.randn(b, *size, device="cuda").bfloat16() for size in ((h, p), (1, n), (1, n)))
    dt = torch.randn(b, h, device="cuda").bfloat16()
    A, D, bias = -torch.rand(h, device="cuda"), torch.rand(h, device="cuda"), None

    def run(backend: str) -> Callable[[], Any]:
        def once() -> Any:
            with torch.no_grad():
                return ssd_step(
                    state, x, dt, A, B, C, D=D, dt_bias=bias, dt_softplus=True, backend=backend
                )

        return once

    return {
        "floor": {"forward_ms": 2 * state.numel() * 4 / rate},
        "fused": {"forward_ms": do_bench(run("triton"), return_mode="median")},
        "eager": {"forward_ms": do_bench(run("torch"), return_mode="median")},
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    rate = copy_rate()
    rows: dict[str, Any] = {}
    for name, (b, l, channels, inner) in BLOCKS.items():
        rows[f"causal_conv1d {name}"] = convolution(b, l, channels, rate)
        rows[f"gated_rms_norm {name}"] = norm(b, l, inner, rate)
    for name, sizes in STEPS.items():
        rows[f"ssd_step {name}"] = step(*sizes, rate)
    for name, row in rows.items():
        for mode in row["floor"]:
            shown = "  ".join(f"{who} {times[mode]:.4f}" for who, times in row.items())
            print(f"{name:28s} {mode:20s} {shown}")
    sizes = {"blocks": BLOCKS, "steps": STEPS, "width": WIDTH}
    results = {"copy_tb_s": rate / 1e9, "sizes": sizes, "rows": rows}
    print(write_record("kernels", ["torch", "triton"], results))


if __name__ == "__main__":
    main()
