"""Our timm models beside timm's DeiT over resolution: images a second and peak memory.

    python benchmarks/vision.py

Inference and training steps (forward, cross-entropy, backward, AdamW), bfloat16 autocast, eager and
compiled with CUDA graphs, DeiT with torch's scaled_dot_product_attention. "without SSD" is our tiny
model with a product of its inputs in place of the SSD: what the rest of a block costs. A row is a
median over repetitions after a warm-up, of which short steps run some at a time, so that the host
prepares one while the device does another, as in any loop; a row that results/vision.json has is
not measured again, so a run that was cut off goes on. --workers compiles as many rows side by side
and measures them one after the other, in several turns; what finds no room beside the others is
built again alone. Writes vision.json, vision.md and vision.png into benchmarks/results.
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import queue
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from _record import RESULTS, write_record
from matplotlib.figure import Figure
from torch import Tensor, nn

import mamba2_apps.vision  # noqa: F401  registers our models

BATCH = {224: 256, 512: 64, 1248: 8, 2048: 4}
MODELS = {
    "bimamba2_tiny": "bimamba2_tiny_patch16_224",
    "bimamba2_tiny without SSD": "bimamba2_tiny_patch16_224",
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "bimamba2_small": "bimamba2_small_patch16_224",
}
MODES = ("inference", "training")
# CUDA graphs: small launches from the host would be most of the time of our 24 layers.
COMPILE_MODE = "reduce-overhead"
# (size, mode): at least so many times deit_tiny's images a second, both compiled.
BARS = {
    (224, "training"): 0.45,
    (1248, "inference"): 1.4,
    (1248, "training"): 1.0,
    (2048, "inference"): 2.5,
    (2048, "training"): 1.8,
}
TURNS = 3  # of a row at the clock, between those of others: the device's own clock drifts
RUN_SECONDS = 0.05  # of steps that nobody waits for one by one
MEMORY_BAR = (1248, 1.3)  # size, times deit_tiny's peak in training


def pointwise(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **_: Any) -> Tensor:
    """A product of what the SSD reads (x, dt, B, C), with its shapes and none of its work."""
    return x * dt.sum(0)[..., None] * (B * C).sum(-1, keepdim=True)


def in_three_operators(*_: Any) -> bool:
    """In place of a mixer's choice, so that the SSD is a call of its own. A Mock would keep every
    tensor that it was given."""
    return False


@contextlib.contextmanager
def chosen_ssd(label: str) -> Iterator[None]:
    if "without SSD" not in label:
        yield
        return
    with (
        mock.patch("mamba2_apps.kernels.ssd_bidirectional", pointwise),
        mock.patch("mamba2_apps.mixer.Mamba2._is_one_operator", in_three_operators),
    ):
        yield


def step_of(model: nn.Module, images: Tensor, mode: str) -> Callable[[], object]:
    """One step of inference or training, under bfloat16 autocast."""
    device = images.device.type
    if mode == "inference":

        def infer() -> Tensor:
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
                return model(images)

        model.eval()
        return infer
    targets = torch.randint(1000, (len(images),), device=images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")

    def train() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.train()
    return train


def seconds_of(step: Callable[[], object], device: str, budget: float) -> list[float]:
    """Seconds of a step in each of several runs of steps, at least two, for `budget` seconds."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def run_of(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        return time.perf_counter() - start

    steps = max(1, round(RUN_SECONDS / run_of(1)))
    runs: list[float] = []
    while sum(runs) < budget or len(runs) < 2:
        runs.append(run_of(steps))
    return [seconds / steps for seconds in runs]


def build(row: dict[str, Any], device: str) -> Callable[[], object]:
    """A step of a row, compiled and warm."""
    torch.compiler.reset()
    torch.manual_seed(0)
    size, batch = row["size"], row["batch"]
    model: Any = timm.create_model(MODELS[row["model"]], img_size=size).to(device)
    if row["compiled"]:
        model.compile(dynamic=False, mode=COMPILE_MODE)
    step = step_of(model, torch.randn(batch, 3, size, size, device=device), row["mode"])
    for _ in range(3):
        step()
    return step


def build_if_room(row: dict[str, Any], device: str) -> Callable[[], object] | None:
    """`build`, or None where memory is full; the compiler and CUDA have errors of their own."""
    try:
        return build(row, device)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        return None


def peak_gib(step: Callable[[], object]) -> float:
    """Of the memory that is reserved: what is allocated does not count what CUDA graphs keep."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_reserved() / 2**30, 3)


class Clock:
    """Seconds of a row's steps, and the memory of one."""

    def __init__(self, device: str) -> None:
        self.device, self.peak = device, 0.0
        self.times: list[float] = []

    def run(self, step: Callable[[], object] | None, seconds: float) -> None:
        try:
            if step is not None:
                step()
                self.times += seconds_of(step, self.device, seconds)
                self.peak = self.peak or peak_gib(step)
        except torch.OutOfMemoryError:
            self.times.clear()

    def result(self, batch: int) -> dict[str, Any]:
        if not self.times:
            return {"failed": "out of memory"}
        rate = batch / statistics.median(self.times)
        return {"images_per_s": round(rate, 1), "peak_gib": self.peak, "runs": len(self.times)}


def work(
    rows: list[dict[str, Any] | None], budget: float, barrier: Any, turn: Any, out: Any
) -> None:
    """Measure rows: all workers build theirs side by side, then take turns at the clock.

    A row that finds no room beside the others is built and measured when they have ended theirs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for row in rows:
        clock = Clock(device)
        with chosen_ssd(row["model"] if row else ""):
            step = build_if_room(row, device) if row else None
            _free(device)
            for _ in range(TURNS):
                barrier.wait()
                with turn:
                    clock.run(step, budget / TURNS)
            step = None
            _free(device)
            barrier.wait()
            with turn:
                if row is not None:
                    if not clock.times:
                        clock.run(build_if_room(row, device), budget)
                        _free(device)
                    out.put(row | clock.result(row["batch"]))
        barrier.wait()


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def measured(rows: list[dict[str, Any]], workers: int, budget: float) -> Iterator[dict[str, Any]]:
    """The rows as they are measured, by `workers` processes that share the device."""
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(rows))
    barrier, turn, out = context.Barrier(workers), context.Lock(), context.Queue()
    rounds = -(-len(rows) // workers)
    padded = [*rows, *[None] * (rounds * workers - len(rows))]
    processes = [
        context.Process(target=work, args=(padded[i::workers], budget, barrier, turn, out))
        for i in range(workers)
    ]
    for process in processes:
        process.start()
    for _ in rows:
        while True:
            try:
                yield out.get(timeout=5)
                break
            except queue.Empty:
                if any(process.exitcode for process in processes):
                    for process in processes:
                        process.terminate()
                    raise SystemExit("a worker failed: see above") from None
    for process in processes:
        process.join()


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "size", "batch", "mode", "compiled"))


def found(rows: list[dict[str, Any]], *key: Any) -> dict[str, Any]:
    return next((row for row in rows if key_of(row) == key), {})


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each model, size and mode; eager and compiled beside deit_tiny's."""
    lines = [
        "| size | batch | mode | model | eager images/s | compiled images/s | × deit_tiny | GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, batch in sorted({(row["size"], row["batch"]) for row in rows}):
        for mode, model in product(MODES, MODELS):
            eager, compiled = (found(rows, model, size, batch, mode, c) for c in (False, True))
            if not eager and not compiled:
                continue
            base = found(rows, "deit_tiny", size, batch, mode, True).get("images_per_s")
            rate = compiled.get("images_per_s")
            ratio = f"{rate / base:.2f}×" if rate and base else "–"
            cells = [
                f"{row['images_per_s']:,.0f}" if "images_per_s" in row else row.get("failed", "–")
                for row in (eager, compiled)
            ]
            peak = (compiled or eager).get("peak_gib", "–")
            values = (f"{size}²", batch, mode, model, *cells, ratio, peak)
            lines.append(f"| {' | '.join(map(str, values))} |")
    return "\n".join(lines) + "\n"


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """The project's goals, met or missed, of what was measured."""
    lines = []
    for (size, mode), bar in BARS.items():
        ours, theirs = (
            found(rows, name, size, BATCH[size], mode, True).get("images_per_s")
            for name in ("bimamba2_tiny", "deit_tiny")
        )
        if ours and theirs:
            word = "met" if ours / theirs >= bar else "missed"
            lines.append(f"{size}² {mode}: {ours / theirs:.2f}× deit_tiny, goal {bar}×: {word}")
    size, bar = MEMORY_BAR
    ours, theirs = (
        found(rows, name, size, BATCH[size], "training", True).get("peak_gib")
        for name in ("bimamba2_tiny", "deit_tiny")
    )
    if ours and theirs:
        word = "met" if ours / theirs <= bar else "missed"
        lines.append(f"{size}² memory: {ours / theirs:.2f}× deit_tiny's, goal {bar}×: {word}")
    return lines


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Images a second over resolution, compiled, one panel for each mode."""
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    for axis, mode in zip(figure.subplots(1, 2), MODES, strict=True):
        for model in MODELS:
            points = sorted(
                (row["size"], row["images_per_s"])
                for row in rows
                if (row["model"], row["mode"], row["compiled"]) == (model, mode, True)
                and "images_per_s" in row
            )
            if points:
                style = ":" if "without" in model else "-" if "bimamba2" in model else "--"
                axis.plot(*zip(*points, strict=True), style, marker=".", label=model)
        axis.set(xscale="log", yscale="log", xlabel="side in pixels", ylabel="images/s", title=mode)
        ticks = sorted({row["size"] for row in rows})
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if figure.axes[0].lines:
        figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=list(BATCH), help="of images")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--batch", type=int, help="in place of each size's own")
    parser.add_argument("--seconds", type=float, default=1.0, help="of repetitions for a row")
    parser.add_argument("--compiled-only", action="store_true", help="leave out the eager rows")
    parser.add_argument("--workers", type=int, default=1, help="rows to compile side by side")
    parser.add_argument("--name", default="vision", help="of the files in results/")
    arguments = parser.parse_args()
    path = RESULTS / f"{arguments.name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    packages = ("mamba2-apps", "torch", "triton", "timm")
    compiled = (True,) if arguments.compiled_only else (True, False)
    todo = [
        {
            "model": model,
            "size": size,
            "batch": arguments.batch or BATCH[size],
            "mode": mode,
            "compiled": way,
        }
        for way, mode, size, model in product(compiled, MODES, arguments.sizes, arguments.models)
    ]
    todo = [row for row in todo if not found(rows, *key_of(row))]
    for row in measured(todo, arguments.workers, arguments.seconds) if todo else ():
        rows.append(row)
        print(row, flush=True)
        write_record(
            arguments.name,
            packages,
            {"dtype": "bfloat16 autocast", "compile": COMPILE_MODE, "rows": rows},
        )
    (RESULTS / f"{arguments.name}.md").write_text(table(rows), encoding="utf-8")
    draw(rows, RESULTS / f"{arguments.name}.png")
    print(table(rows))
    print("\n".join(verdicts(rows)))


if __name__ == "__main__":
    main()
