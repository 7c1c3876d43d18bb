"""Times a block without gradients, launch by launch, as it is cut and as it might be.

    python benchmarks/block.py --workers 8

`mamba2_block` in the sizes of bimamba2_tiny, bfloat16 products, at the token counts of images of
224, 1248 and 2048 pixels. A row is one way to cut the kernels into programs: the median time of the
operator with the L2 cache cleared, the mean GPU time of each kernel in a row of calls, and the
relative error of what the block adds, against float64 on fewer tokens. --workers compiles the ways
side by side beforehand. Results go to results/block.json and block.md.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from _record import RESULTS, write_record
from torch import Tensor
from triton.testing import do_bench

from mamba2_apps.kernels import block_products_triton as products
from mamba2_apps.kernels import causal_conv1d_triton as convolution
from mamba2_apps.kernels import launching, mamba2_block
from mamba2_apps.kernels import ssd_triton_plan as plan
from mamba2_apps.kernels.block_products_triton import Tiles

SHAPES = {224: (256, 196), 1248: (8, 6084), 2048: (4, 16384)}  # (b, l) by side in pixels
CHECKED = (2, 2500)
WIDTH, HEADS, HEADDIM, DSTATE = 192, 6, 64, 64
FIRST = [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2)]
SECOND = [(128, 64, 8, 2), (64, 32, 4, 3)]
CUTS = [{"max_run": 64, "programs": 4096}, {"channels": 256, "warps": 2}]
TILINGS = [
    {"chunk": 64},
    {"scan_stages": 3},
    {"scan_warps": 8},
    {"forward_stages": 2},
    {"scan_programs": 3},
    {"scan_programs": 4},
    {"scan_programs": 6},
]
CHAINED = [0, 8]


def ways() -> dict[str, list[tuple[Any, str, Any]]]:
    """What to set where, by name; the first is the way it is."""
    found: dict[str, list[tuple[Any, str, Any]]] = {"as it is": []}
    for tiles in FIRST:
        found[f"first product {tiles}"] = [(products, "NORM_LINEAR", Tiles(*tiles))]
    for tiles in SECOND:
        found[f"second product {tiles}"] = [(products, "GATED_LINEAR", Tiles(*tiles))]
    for cut in CUTS:
        changed = convolution.FORWARD._replace(**cut)
        found[f"convolution {cut}"] = [(convolution, "FORWARD", changed)]
    for tiling in TILINGS:
        found[f"SSD {tiling}"] = [(plan, "tiling", _replaced(tiling))]
    for most in CHAINED:
        found[f"walks that add up {most} segments"] = [(plan, "MOST_CHAINED", most)]
    return found


def _replaced(changes: dict[str, int]) -> Callable[..., plan.Tiling]:
    rule = plan.tiling
    return lambda *sizes: dataclasses.replace(rule(*sizes), **changes)


@contextlib.contextmanager
def way(name: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module, attribute, value in ways()[name]:
            stack.enter_context(mock.patch.object(module, attribute, value))
        stack.enter_context(mock.patch.object(launching, "_prepared", {}))
        yield


def inputs(b: int, l: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors of a block after its initialisation, and its sizes."""
    draw = torch.Generator("cuda").manual_seed(0)
    inner, channels = HEADS * HEADDIM, HEADS * HEADDIM + 2 * DSTATE

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", generator=draw)

    tensors = {
        "residual": normal(b, l, WIDTH),
        "norm_weight": torch.ones(WIDTH, device="cuda"),
        "in_proj": normal(inner + channels + 2 * HEADS, WIDTH) / WIDTH**0.5,
        "conv_weight": normal(channels, 4) / 4,
        "conv_bias": normal(channels) / 4,
        "dt_bias": normal(2, HEADS) - 4,
        "A": -1 - 15 * torch.rand(2, HEADS, device="cuda", generator=draw),
        "D": torch.ones(HEADS, device="cuda"),
        "gate_norm_weight": torch.ones(inner, device="cuda"),
        "out_proj": normal(WIDTH, inner) / inner**0.5,
    }
    for name in ("in_proj", "out_proj"):
        tensors[name] = tensors[name].bfloat16()
    return tensors, {"headdim": HEADDIM, "ngroups": 1, "d_state": DSTATE}


def call(b: int, l: int) -> Callable[[], Tensor]:
    tensors, sizes = inputs(b, l)
    return lambda: mamba2_block(**tensors, **sizes)


def error() -> float:
    """Of what the block adds; the residual stream would hide it."""
    tensors, sizes = inputs(*CHECKED)
    double = {name: tensor.double() for name, tensor in tensors.items()}
    want = mamba2_block(**double, **sizes) - double["residual"]
    got = mamba2_block(**tensors, **sizes).double() - double["residual"]
    return ((got - want).norm() / want.norm()).item()


def by_kernel(run: Callable[[], Tensor], calls: int = 20) -> dict[str, float]:
    """Mean GPU microseconds a call of each kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    rows = [row for row in profile.key_averages() if row.device_time_total > 0]
    return {row.key: round(row.device_time_total / calls, 1) for row in rows}


def measured(name: str) -> Iterator[dict[str, Any]]:
    with way(name):
        wrong = error()
        for side, (b, l) in SHAPES.items():
            run = call(b, l)
            median = do_bench(run, return_mode="median")
            yield {
                "way": name,
                "side": side,
                "tokens": b * l,
                "us": round(1000 * median, 1),
                "error": wrong,
                "kernels": by_kernel(run),
            }


def build(name: str) -> str | None:
    """Compile a way's kernels into Triton's cache; why that failed, if it did."""
    try:
        with torch.no_grad(), way(name):
            for shape in (CHECKED, *SHAPES.values()):
                call(*shape)()
        torch.cuda.synchronize()
    except Exception as failure:
        return f"{type(failure).__name__}: {str(failure)[:200]}"
    return None


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each way, microseconds at each size, and the error."""
    names = list(dict.fromkeys(row["way"] for row in rows))
    lines = [
        f"| way | {' | '.join(f'{side}², us' for side in SHAPES)} | error |",
        "|---|" + "---:|" * (len(SHAPES) + 1),
    ]
    for name in names:
        mine = {row["side"]: row for row in rows if row["way"] == name}
        cells = [f"{mine[side]['us']:.0f}" if side in mine else "–" for side in SHAPES]
        lines.append(f"| {name} | {' | '.join(cells)} | {next(iter(mine.values()))['error']:.1e} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="ways to compile side by side")
    parser.add_argument("--ways", nargs="+", default=list(ways()), choices=list(ways()))
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers, maxtasksperchild=1) as pool:
        failures = dict(zip(options.ways, pool.map(build, options.ways, 1), strict=True))
    rows = []
    for name in options.ways:
        if failures[name] is not None:
            print(f"{name}: {failures[name]}")
            continue
        with torch.no_grad():
            for row in measured(name):
                rows.append(row)
                print(row, flush=True)
    failed = {name: why for name, why in failures.items() if why is not None}
    write_record("block", ("torch", "triton"), {"rows": rows, "failed": failed})
    (RESULTS / "block.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
