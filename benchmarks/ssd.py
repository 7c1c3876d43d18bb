"""Times the SSD beside its peers in one run: ours, mamba_ssm, fla, and softmax attention.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n

    python benchmarks/ssd.py --out benchmarks/results

bfloat16 on one GPU. Every figure is a median over repetitions with the L2 cache cleared between
them. "Bidirectional" is ssd_bidirectional for ours and two calls with flips for mamba_ssm, which
has no other way. The floor of a row is what any implementation needs: each input read and each
output written once at the copy rate measured here, or the products of the chunked algorithm at the
matrix product rate measured here, whichever is longer. Peak memory is of one call outside the
timer, less its inputs, outputs and returned gradients. Peers that are not installed, and a shape on
which a peer fails, are reported as not run.
"""

import argparse
import datetime
import importlib.util
import json
import platform
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from mamba2_apps.kernels import ssd, ssd_bidirectional

# (b, l, h, p, n, g)
SHAPES = {
    "lm_4k": (8, 4096, 24, 64, 128, 1),
    "vision_197": (128, 197, 12, 64, 64, 1),
    "vision_1248": (4, 6084, 12, 64, 64, 1),
    "audio_1k": (32, 1024, 24, 64, 64, 1),
    "dna_131k": (1, 131072, 8, 64, 64, 1),
    "dna_1m": (1, 1048576, 8, 64, 64, 1),
}
MODES = ("forward", "forward+backward", "bidirectional", "bidirectional+backward")
CHUNK = 64  # of the floor's count of products
MILLISECONDS = 100  # of repetitions for one median
LONGEST_ATTENTION = 16384
FIRST_CALLS = ("lm_4k", "vision_197", "dna_131k")

Functions = dict[str, Callable[[], Any]]


def inputs(shape: tuple[int, ...], directions: int) -> dict[str, Tensor]:
    """Tensors as a trained Mamba-2 block gives them: A in [-16, -1], softplus(dt) near 0.02."""
    b, l, h, p, n, g = shape
    pair = (2,) if directions == 2 else ()
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", generator=draw).bfloat16()

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, device="cuda", generator=draw)

    tensors = {
        "x": normal(b, l, h, p),
        "dt": normal(*pair, b, l, h),
        "A": -1 - 15 * uniform(*pair, h),
        "B": normal(b, l, g, n),
        "C": normal(b, l, g, n),
        "D": uniform(h),
        "dt_bias": -5 + 2 * uniform(*pair, h),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def ours(shape: tuple[int, ...]) -> Functions:
    return {
        **_pair(lambda t: ssd(**t, dt_softplus=True), shape, 1, MODES[:2]),
        **_pair(lambda t: ssd_bidirectional(**t, dt_softplus=True), shape, 2, MODES[2:]),
    }


def mamba_ssm(shape: tuple[int, ...]) -> Functions:
    """The package's Triton operators alone: its other modules need extensions to be built."""
    if "mamba_ssm" not in sys.modules:
        found = importlib.util.find_spec("mamba_ssm")
        if found is None:
            raise ImportError("mamba_ssm is not installed")
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(found.submodule_search_locations or [])
        sys.modules["mamba_ssm"] = package
    sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def scan(x, dt, A, B, C, D, dt_bias):
        return mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size=256, D=D, dt_bias=dt_bias, dt_softplus=True
        )

    def both(t):
        x, B, C, dt, A, bias = (t[name] for name in ("x", "B", "C", "dt", "A", "dt_bias"))
        flipped = scan(x.flip(1), dt[1].flip(1), A[1], B.flip(1), C.flip(1), None, bias[1])
        return scan(x, dt[0], A[0], B, C, t["D"], bias[0]) + flipped.flip(1)

    return {
        **_pair(lambda t: scan(**t), shape, 1, MODES[:2]),
        **_pair(both, shape, 2, MODES[2:]),
    }


def fla(shape: tuple[int, ...]) -> Functions:
    """flash-linear-attention's chunked scan with per-head q and k; decays given ready-made."""
    from fla.ops.simple_gla import chunk_simple_gla

    t = inputs(shape, 1)
    h = shape[2]
    with torch.no_grad():
        dt = F.softplus(t["dt"].float() + t["dt_bias"])
        q, k = (t[name].expand(-1, -1, h, -1).contiguous() for name in ("C", "B"))
        v, g = (t["x"] * dt[..., None]).bfloat16(), dt * t["A"]

    def forward():
        with torch.no_grad():
            return chunk_simple_gla(q, k, v, g=g, scale=1.0)[0]

    return {"forward": forward}


def flash_attention(shape: tuple[int, ...]) -> Functions:
    return _attention(shape, SDPBackend.FLASH_ATTENTION)


def cudnn_attention(shape: tuple[int, ...]) -> Functions:
    return _attention(shape, SDPBackend.CUDNN_ATTENTION)


PEERS = {
    "ours": ours,
    "mamba_ssm": mamba_ssm,
    "fla": fla,
    "flash_attention": flash_attention,
    "cudnn_attention": cudnn_attention,
}


def _attention(shape: tuple[int, ...], backend: SDPBackend) -> Functions:
    """Causal softmax attention with as many heads of the same width."""
    b, l, h, p, _, _ = shape
    if l > LONGEST_ATTENTION:
        raise ValueError(f"not run beyond {LONGEST_ATTENTION} tokens")
    q, k, v = (
        torch.randn(b, h, l, p, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )

    def attend(t):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], is_causal=True)

    return _of(attend, {"q": q, "k": k, "v": v}, MODES[:2])


def _pair(call, shape: tuple[int, ...], directions: int, names: tuple[str, ...]) -> Functions:
    return _of(call, inputs(shape, directions), names)


def _of(call, tensors: dict[str, Tensor], names: tuple[str, ...]) -> Functions:
    """Forward without gradients, and forward with backward to every input."""
    forward_name, backward_name = names

    def forward():
        with torch.no_grad():
            return call(tensors)

    dout = torch.randn_like(forward())

    def backward():
        return torch.autograd.grad(call(tensors), list(tensors.values()), dout)

    return {forward_name: forward, backward_name: backward}


def measure(function: Callable[[], Any], with_launches: bool) -> dict[str, float]:
    began = time.perf_counter()
    function()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    milliseconds = do_bench(function, warmup=25, rep=MILLISECONDS, return_mode="median")
    result = {"ms": milliseconds, "first_call_s": first, "peak_mb": peak_megabytes(function)}
    if with_launches:
        result["launches"] = launches(function)
    return result


def peak_megabytes(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    returned = result if isinstance(result, tuple | list) else (result,)
    # With a backward pass the output lived too: it has the size of the gradient of x, the first.
    kept = sum(t.numel() * t.element_size() for t in returned)
    if len(returned) > 1:
        kept += returned[0].numel() * returned[0].element_size()
    return (torch.cuda.max_memory_allocated() - before - kept) / 1e6


def launches(function: Callable[[], Any]) -> int:
    """Kernels, copies and fills that one call puts on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if event.self_device_time_total)


def rates() -> dict[str, float]:
    """The two ceilings of this GPU: bytes read plus written by a copy, and bfloat16 products."""
    source = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = do_bench(lambda: target.copy_(source), return_mode="median")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = do_bench(lambda: a @ b, return_mode="median")
    return {
        "copy_tb_s": 2 * source.numel() * source.element_size() / copy / 1e9,
        "matmul_tflop_s": 2 * 8192**3 / product / 1e9,
    }


def floor_ms(shape: tuple[int, ...], mode: str, ceilings: dict[str, float]) -> float:
    b, l, h, p, n, g = shape
    directions = 2 if mode.startswith("bidirectional") else 1
    x, shared, dt = b * l * h * p * 2, b * l * g * n * 2, b * l * h * 2 * directions
    moved = 2 * x + 2 * shared + dt
    # Per token and head: one row of a chunk's scores applied to x, the state read and written.
    flops = b * l * (h * (CHUNK * p + directions * 4 * p * n) + g * CHUNK * n)
    if mode.endswith("backward"):
        moved += 3 * x + 4 * shared + 2 * dt
        flops *= 3
    return max(moved / ceilings["copy_tb_s"] / 1e9, flops / ceilings["matmul_tflop_s"] / 1e9)


def compare(shapes: list[str], peers: list[str], ceilings: dict[str, float]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name in shapes:
        shape = SHAPES[name]
        rows[name] = {"shape": shape, "floor_ms": {m: floor_ms(shape, m, ceilings) for m in MODES}}
        for peer in peers:
            began = time.perf_counter()
            try:
                functions = PEERS[peer](shape)
                rows[name][peer] = {
                    mode: measure(function, with_launches=peer in ("ours", "mamba_ssm"))
                    for mode, function in functions.items()
                }
            except (ImportError, AttributeError, ValueError, RuntimeError) as error:
                rows[name][peer] = {"not_run": f"{type(error).__name__}: {str(error)[:200]}"}
            torch.cuda.empty_cache()
            seconds = time.perf_counter() - began
            print(f"{name:12s} {peer:16s} {seconds:6.1f} s  {_line(rows[name][peer])}", flush=True)
    return rows


def sweep(peers: list[str]) -> dict[str, Any]:
    """Forward over lengths at 1M tokens (b · l), and over dstate at lm_4k's sizes."""
    tokens = 1 << 20
    lengths: dict[str, Any] = {}
    for l in [1 << power for power in range(9, 21)]:
        shape = (tokens // l, l, 12, 64, 64, 1)
        lengths[str(l)] = _forward_ms(shape, peers)
        print("length", l, lengths[str(l)], flush=True)
    states: dict[str, Any] = {}
    for n in (64, 128, 256):
        recurrent = [peer for peer in peers if peer in ("ours", "mamba_ssm")]
        states[str(n)] = _forward_ms((8, 4096, 24, 64, n, 1), recurrent)
        print("dstate", n, states[str(n)], flush=True)
    return {"tokens": tokens, "lengths": lengths, "dstate": states}


def _forward_ms(shape: tuple[int, ...], peers: list[str]) -> dict[str, float]:
    result = {}
    for peer in peers:
        try:
            function = PEERS[peer](shape)["forward"]
            result[peer] = do_bench(function, warmup=10, rep=40, return_mode="median")
        except (ImportError, AttributeError, ValueError, RuntimeError):
            continue
        torch.cuda.empty_cache()
    return result


def first_calls(shapes: tuple[str, ...]) -> dict[str, Any]:
    """Seconds of a first forward and a first backward, each shape in a process without caches."""
    script = (
        "import os, sys, tempfile, time\n"
        "os.environ['TRITON_CACHE_DIR'] = tempfile.mkdtemp()\n"
        "import torch\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "import ssd as benchmark\n"
        "t = benchmark.inputs(benchmark.SHAPES[sys.argv[1]], 1)\n"
        "torch.cuda.synchronize(); a = time.perf_counter()\n"
        "y = benchmark.ssd(**t, dt_softplus=True); torch.cuda.synchronize()\n"
        "b = time.perf_counter()\n"
        "y.sum().backward(); torch.cuda.synchronize()\n"
        "print(b - a, time.perf_counter() - b)\n"
    )
    result = {}
    for name in shapes:
        command = [sys.executable, "-c", script, name, str(Path(__file__).parent)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        forward, backward = map(float, run.stdout.split()[-2:])
        result[name] = {"forward_s": forward, "backward_s": backward}
    return result


def _line(result: dict[str, Any]) -> str:
    if "not_run" in result:
        return f"not run ({result['not_run'][:60]})"
    return "  ".join(f"{row['ms']:.3f} ms {row['peak_mb']:.0f} MB" for row in result.values())


def table(rows: dict[str, Any]) -> str:
    """Markdown: ours, the ratio to mamba_ssm, the ratio to the floor, and the memory ratio."""
    lines = [
        "| shape | mode | ours ms | mamba_ssm ms | speed-up | × floor | peak MB | ÷ mamba_ssm's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        for mode in MODES:
            mine, peer = row["ours"].get(mode), row.get("mamba_ssm", {}).get(mode)
            if mine is None:
                continue
            versus = ("not run", "", "")
            if peer is not None:
                versus = (
                    f"{peer['ms']:.3f}",
                    f"{peer['ms'] / mine['ms']:.2f}×",
                    f"{mine['peak_mb'] / peer['peak_mb']:.2f}",
                )
            lines.append(
                f"| {name} | {mode} | {mine['ms']:.3f} | {versus[0]} | {versus[1]} "
                f"| {mine['ms'] / row['floor_ms'][mode]:.1f} | {mine['peak_mb']:.0f} "
                f"| {versus[2]} |"
            )
    return "\n".join(lines)


def plot(measured: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    peers = dict.fromkeys(peer for row in measured["lengths"].values() for peer in row)
    for peer in peers:
        points = [(int(l), row[peer]) for l, row in measured["lengths"].items() if peer in row]
        axes.plot(*zip(*points, strict=True), marker="o", label=peer)
    axes.set(xscale="log", yscale="log", xlabel="tokens per sequence", ylabel="forward, ms")
    axes.set_title(f"{measured['tokens']} tokens a call, 12 heads of 64, bfloat16")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--sweep", action="store_true", help="also sweep lengths and dstate")
    parser.add_argument("--first-calls", action="store_true", help="also time compilation")
    parser.add_argument("--out", type=Path, help="folder for ssd.json, ssd.md and ssd_lengths.png")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/ssd.py needs a CUDA device, and torch sees none")
    ceilings = rates()
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "dtype": "bfloat16",
        "ceilings": ceilings,
    }
    print(json.dumps(report), flush=True)

    def save() -> None:
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(report, indent=1)
            (options.out / "ssd.json").write_text(text + "\n", encoding="utf-8")

    report["rows"] = compare(options.shapes, options.peers, ceilings)
    save()
    print(table(report["rows"]), flush=True)
    if options.out:
        (options.out / "ssd.md").write_text(table(report["rows"]) + "\n", encoding="utf-8")
    if options.first_calls:
        report["first_calls"] = first_calls(FIRST_CALLS)
        save()
        print(report["first_calls"], flush=True)
    if options.sweep:
        report["sweep"] = sweep([peer for peer in options.peers if peer != "fla"])
        save()
        if options.out:
            plot(report["sweep"], options.out / "ssd_lengths.png")


if __name__ == "__main__":
    main()
