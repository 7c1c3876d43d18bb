"""What the compiler makes of the kernels, on a machine without a GPU.

    python benchmarks/compiled.py [--arch 90] [--shapes vision_1248 lm_4k]

Each launch of the SSD's forward and backward, and of `mamba2_block`, in bfloat16, is compiled for
that architecture as it would be launched: registers a thread, bytes of stack that registers spill
to, KB of shared memory, instructions of the longest loop, and for how many of its matrix products
the kernel waits. ptxas serializes all of them where one loop is not to its taste, says so (C7515)
and compiles on: this script then ends with an error. Writes results/compiled.json and compiled.md.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from _record import RESULTS, write_record
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mamba2_apps.kernels import block_products_triton as products
from mamba2_apps.kernels import block_triton, ssd_triton_launch
from mamba2_apps.kernels.launching import Launch
from mamba2_apps.kernels.ssd_triton_plan import stores_states

# b, l, h, p, n, directions
SHAPES = {
    "vision_224": (256, 196, 6, 64, 64, 2),
    "vision_1248": (8, 6084, 6, 64, 64, 2),
    "lm_4k": (8, 4096, 24, 64, 128, 1),
    "lm_4k both": (8, 4096, 24, 64, 128, 2),
    "dna_131k": (1, 131072, 8, 64, 64, 2),
}
WIDTHS = {"vision_224": 192, "vision_1248": 192}  # where a block's launches are compiled, too
PROCESSORS = 132
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


def source_of(launch: Launch, tensors: Sequence[Tensor | None]) -> ASTSource:
    """A launch's kernel with the types, constants and alignments that Triton would see."""
    signature, constants, attributes = {}, {}, {}
    values = *launch.tensors(tensors), *launch.rest
    for index, (parameter, value) in enumerate(zip(launch.kernel.params, values, strict=True)):
        name, aligned = parameter.name, False
        if isinstance(value, Tensor):
            signature[name], aligned = f"*{TYPES[value.dtype]}", True
        elif parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def report(launch: Launch, tensors: Sequence[Tensor | None], arch: int) -> dict[str, Any]:
    target = GPUTarget("cuda", arch, 32)
    built = triton.compile(
        source_of(launch, tensors), target=target, options={"num_warps": launch.warps}
    )
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(built.asm["ptx"], encoding="utf-8")
        version = f"-arch=sm_{arch}{'a' * (arch >= 90)}"
        said = _run("ptxas", version, "-v", str(ptx), "-o", str(cubin))
        code = _run("nvdisasm", "-c", str(cubin))
    (registers,) = re.findall(r"Used (\d+) registers", said)
    (stack,) = re.findall(r"(\d+) bytes stack frame", said)
    return {
        "kernel": launch.kernel.fn.__name__,
        "programs": launch.programs,
        "warps": launch.warps,
        "registers": int(registers),
        "stack": int(stack),
        "shared_kb": round(built.metadata.shared / 1000, 1),
        "longest_loop": longest_loop(code),
        "products": code.count("HGMMA"),
        "waits": code.count("WARPGROUP.DEPBAR"),
        "serialized": "are serialized" in said,
    }


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def longest_loop(code: str) -> int:
    """Instructions between a label and the last jump back to it."""
    labels: dict[str, int] = {}
    count = longest = 0
    for line in code.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            count += 1
            jump = re.search(r"BRA.*`\(\.(L_x_\d+)\)", line)
            if jump and jump[1] in labels:
                longest = max(longest, count - labels[jump[1]])
    return longest


def ssd_calls(shape: tuple[int, ...]) -> Iterator[tuple[Sequence[Launch], list[Any]]]:
    """Launches of a forward and of a backward, and the tensors that they choose from."""
    b, l, h, p, n, directions = shape
    pair = (2,) * (directions == 2)
    x = torch.empty(b, l, h, p, dtype=torch.bfloat16)
    B, C = torch.empty(2, b, l, 1, n, dtype=torch.bfloat16)
    dt, A, D = (
        torch.empty(*pair, b, l, h, dtype=torch.bfloat16),
        torch.ones(*pair, h),
        torch.ones(h),
    )
    settings = True, 0.0, float("inf"), False
    design: Any = ssd_triton_launch.Forward
    if stores_states(directions, n):
        design = ssd_triton_launch.ChunkedForward
    floats, halves = torch.empty(1), torch.empty(1, dtype=x.dtype)
    call = design((x, dt, A, B, C, D, None, A, None, None), settings, False, False)
    yield call.launches, [x, dt, A, B, C, D, x, A, x, x, x, x, x, floats, halves]
    back = ssd_triton_launch.Backward(
        (x, dt, A, B, C, D, None, A, None, None, x), settings, False, None
    )
    gradients = [x, dt, A, B, C, D, A, floats]
    yield back.launches, [x, dt, A, B, C, D, A, x, x, x, x, floats, halves, *gradients]


def block_call(shape: tuple[int, ...], d: int) -> tuple[Sequence[Launch], list[Any]]:
    """Launches of a block without gradients, its weights in float32."""
    b, l, h, p, n, directions = shape
    pair, inner = (2,) * (directions == 2), h * p
    channels = inner + 2 * n
    residual, heads = torch.empty(b, l, d), torch.empty(*pair, h)
    inputs = (
        residual, torch.empty(d), torch.empty(inner + channels + directions * h, d),
        torch.empty(channels, 4), torch.empty(channels), heads, heads, torch.empty(h),
        torch.empty(inner), torch.empty(d, inner), None, None,
    )  # fmt: skip
    tiles = products.NORM_LINEAR, products.GATED_LINEAR, products.MANY_PROGRAMS
    settings: Any = p, 1, n, 0.0, float("inf"), 1e-5, 1e-5, torch.bfloat16, tiles
    call = block_triton._Block(inputs, *settings)
    return call.launches, call.tensors(inputs, call.workspace(residual), residual)


def table(rows: list[dict[str, Any]]) -> str:
    names = [name for name in rows[0] if name != "serialized"]
    lines = [f"| {' | '.join(names)} |", "|---|---|" + "---:|" * (len(names) - 2)]
    lines += [f"| {' | '.join(str(row[name]) for name in names)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability, times ten")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    options = parser.parse_args()
    ssd_triton_launch._processors = lambda device: PROCESSORS  # type: ignore[assignment]
    todo = []
    for name in options.shapes:
        calls = list(ssd_calls(SHAPES[name]))
        if name in WIDTHS:
            calls[0] = block_call(SHAPES[name], WIDTHS[name])
        # A batch in parts launches the same kernels again.
        todo += [
            (name, launch, tensors)
            for launches, tensors in calls
            for launch in {launch.kernel: launch for launch in launches}.values()
        ]

    def row_of(item: tuple[str, Launch, list[Any]]) -> dict[str, Any]:
        row = {"shape": item[0]} | report(*item[1:], options.arch)
        print(row, flush=True)
        return row

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(row_of, todo))
    write_record("compiled", ("torch", "triton"), {"arch": options.arch, "rows": rows})
    (RESULTS / "compiled.md").write_text(table(rows), encoding="utf-8")
    if slow := [f"{row['kernel']} of {row['shape']}" for row in rows if row["serialized"]]:
        raise SystemExit(f"ptxas serialized the products of {', '.join(slow)}")


if __name__ == "__main__":
    main()
