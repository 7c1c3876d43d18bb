"""Training on several GPUs: the same work for each of them, and one long sequence for all of them.

    python benchmarks/scale.py --devices 1 2

For every number of devices a torchrun of this file measures, in bfloat16, medians of whole training
steps (forward, backward, AdamW):

- data parallel: bimamba2_small_patch16_224 at 224², and a DNA model at 131,072 bases, with the same
  batch on every device under DistributedDataParallel, inputs already there. Efficiency is the rate
  per device over that of one device.
- context parallel: the DNA model on one sequence that the devices share, 1M and 4M bases for each,
  with gradient checkpointing: seconds, peak memory of a device, and bytes that it sends. The ratio
  is the time over that of one device on its part of the length.
- a run that loses a process to kill -9 in the middle, resumed on half as many devices.

From the two smallest numbers of devices it extends both curves on paper to 64, see `on_paper`.

Writes results/scale.json, scale.md and scale.png. --cpu runs the same with gloo at small sizes, to
try the script. Dimensions: batch b · seqlen l
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from _record import RESULTS, write_record
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mamba2_apps.vision  # noqa: F401  registers the timm models
from mamba2_apps.backbone import Backbone, BackboneConfig
from mamba2_apps.parallel import split_sequence

DNA = {"d_model": 256, "n_layer": 8, "d_state": 64, "headdim": 64, "bidirectional": True}
FULL = {"image_batch": 128, "image_size": 224, "bases": 131_072, "part": 1_048_576, "steps": 10}
# On paper: hosts of eight GPUs; bytes a second that a GPU sends, at 80% of what NVLink and one
# 400 Gb/s adapter for each GPU carry, and how long a collective takes beside its bytes.
HOST, PAPER = 8, (8, 16, 32, 64)
BANDWIDTH = {"within": 0.8 * 450e9, "across": 0.8 * 50e9}
LATENCY = {"within": 30e-6, "across": 60e-6}
COLLECTIVES = 5 * DNA["n_layer"]  # states and halo, forward and again in the backward, gradients
LAST_BUCKET = 25 * 2**20  # bytes that DistributedDataParallel can send only after the backward
SMALL = {"image_batch": 1, "image_size": 32, "bases": 256, "part": 256, "steps": 2}


class DNAModel(nn.Module):
    """Bases (b, l) to logits of each base (b, l, 4), the shape of a language model of DNA."""

    def __init__(self, *, checkpointing: bool, small: bool) -> None:
        super().__init__()
        sizes = DNA | ({"d_model": 64, "n_layer": 2} if small else {})
        self.embedding = nn.Embedding(4, sizes["d_model"])
        self.backbone = Backbone(BackboneConfig(**sizes, gradient_checkpointing=checkpointing))
        self.head = nn.Linear(sizes["d_model"], 4)

    def forward(self, bases: Tensor) -> Tensor:
        return self.head(self.backbone(self.embedding(bases)))


def median_seconds(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Median of `count` steps, the slowest rank's, after three that warm up."""
    times = []
    for index in range(3 + count):
        dist.barrier()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        slowest = torch.tensor(time.perf_counter() - start, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if index >= 3:
            times.append(slowest.item())
    return statistics.median(times)


def training_step(
    model: nn.Module, loss: Callable[[], Tensor], device: torch.device
) -> Callable[[], None]:
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def data_parallel(sizes: dict[str, int], small: bool, device: torch.device) -> dict[str, Any]:
    """Samples per second of all devices, for both models."""
    torch.manual_seed(0)
    side, b = sizes["image_size"], sizes["image_batch"]
    vision = timm.create_model(
        "bimamba2_tiny_patch16_224" if small else "bimamba2_small_patch16_224", img_size=side
    )
    images = torch.randn(b, 3, side, side, device=device)
    classes = torch.randint(1000, (b,), device=device)
    bases = torch.randint(4, (1, sizes["bases"]), device=device)
    found = {}
    for name, model, inputs, targets in (
        ("vision small, 224²", vision, images, classes),
        (
            f"DNA, {sizes['bases']:,} bases",
            DNAModel(checkpointing=False, small=small),
            bases,
            bases,
        ),
    ):
        whole = DistributedDataParallel(
            model.to(device),
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )

        def loss(
            whole: nn.Module = whole, inputs: Tensor = inputs, targets: Tensor = targets
        ) -> Tensor:
            return F.cross_entropy(whole(inputs).flatten(0, -2).float(), targets.flatten())

        seconds = median_seconds(training_step(whole, loss, device), sizes["steps"], device)
        found[name] = {
            "seconds": seconds,
            "per_second": len(inputs) * dist.get_world_size() / seconds,
            "batch_per_device": len(inputs),
            "gradient_bytes": sum(4 * p.numel() for p in model.parameters()),
        }
        del whole, model
    return found


def context_parallel(sizes: dict[str, int], small: bool, device: torch.device) -> dict[str, Any]:
    """Seconds, memory and bytes sent of one sequence that all devices share, by bases of a part."""
    found = {}
    for factor in (1, 4):
        length = sizes["part"] * factor
        torch.manual_seed(0)
        model = DNAModel(checkpointing=True, small=small).to(device)
        # One device alone is the plain model: what splitting costs is part of the ratio.
        context = split_sequence(model) if dist.get_world_size() > 1 else None
        generator = torch.Generator(device).manual_seed(1 + dist.get_rank())
        bases = torch.randint(4, (1, length), device=device, generator=generator)

        def loss(model: nn.Module = model, bases: Tensor = bases) -> Tensor:
            return F.cross_entropy(model(bases).flatten(0, 1).float(), bases.flatten())

        step = training_step(model, loss, device)
        hook_gradients(model)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = median_seconds(step, max(sizes["steps"] // 2, 1), device)
        before = context.bytes_sent if context else 0
        step()
        found[f"{length}"] = {
            "seconds": seconds,
            "bases": length * dist.get_world_size(),
            "bases_per_second": length * dist.get_world_size() / seconds,
            "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30
            if device.type == "cuda"
            else None,
            "bytes_sent": context.bytes_sent - before if context else 0,
        }
        del model, bases, step, loss
    return found


def hook_gradients(model: nn.Module) -> None:
    """Average each gradient over the ranks as soon as it is there, as data parallelism does."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p: dist.all_reduce(p.grad.div_(dist.get_world_size()))
        )


def worker(options: argparse.Namespace) -> None:
    """What every process of a torchrun does; rank 0 prints the figures."""
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu" if options.cpu else f"cuda:{rank}")
    if not options.cpu:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if options.cpu else "nccl")
    sizes = SMALL if options.cpu else FULL
    found = {
        "data": data_parallel(sizes, options.cpu, device),
        "context": context_parallel(sizes, options.cpu, device),
    }
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(found), flush=True)
    dist.destroy_process_group()


def measure(devices: int, cpu: bool) -> dict[str, Any]:
    """The figures of one torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={devices}", __file__, "--worker", *(["--cpu"] if cpu else [])]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def killed_and_resumed(devices: int, cpu: bool) -> dict[str, Any]:
    """Train on all devices, kill one process in the second epoch, resume on half as many."""
    command = [sys.executable, "-P", "-m", "mamba2_apps.cli", "train"]
    accelerator = "cpu" if cpu else "gpu"
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [f"--run={run}", "--parallel=fsdp2", f"--trainer.devices={devices}"]
        words += [f"--trainer.accelerator={accelerator}", "--trainer.ema_decay=null"]
        words += ["--trainer.max_epochs=6", "--trainer.checkpoint_every_n_steps=2"]
        process = subprocess.Popen(
            [*command, "vision/digits", *words], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        if not any(line.startswith("epoch 2/") for line in process.stderr):
            raise RuntimeError("the run ended before its second epoch")
        tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        victim = int(tasks.read_text().split()[0])
        os.kill(victim, signal.SIGKILL)
        code = process.wait(timeout=300)
        step = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
        half = max(devices // 2, 1)
        words = [f"--trainer.devices={half}"]
        if half == 1:
            words.append("--trainer.parallel=null")
        subprocess.run([*command, f"--resume={run}", *words], check=True)
        metrics = json.loads((run / "metrics.json").read_text())
    return {
        "devices": devices,
        "exit_code_after_kill": code,
        "checkpoint_step": step,
        "resumed_on": half,
        "epochs": metrics["epochs"],
        "test_accuracy": metrics["test"]["accuracy"],
    }


def table(found: dict[str, Any]) -> str:
    one = found[min(found, key=int)]
    lines = ["| data parallel | devices | per second | efficiency |", "|---|---|---|---|"]
    for name in one["data"]:
        for devices, result in found.items():
            rate, first = result["data"][name]["per_second"], one["data"][name]["per_second"]
            share = rate / first / (int(devices) / int(min(found, key=int)))
            lines.append(f"| {name} | {devices} | {rate:.3g} | {share:.1%} |")
    lines += [
        "",
        "| context parallel, bases | devices | seconds | × one device on its part | peak GiB",
    ]
    lines[-1] += " | MB sent by a device |"
    lines.append("|---|---|---|---|---|---|")
    for length in one["context"]:
        for devices, result in found.items():
            row, first = result["context"][length], one["context"][length]
            peak = "–" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
            lines.append(
                f"| {row['bases']:,} | {devices} | {row['seconds']:.3f} "
                f"| {row['seconds'] / first['seconds']:.2f} | {peak} "
                f"| {row['bytes_sent'] / 1e6:.1f} |"
            )
    return "\n".join(lines) + "\n"


def on_paper(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Both curves beyond what was measured, for each number of GPUs of `PAPER`.

    Data parallel: a ring sends 2 (n - 1) / n of the gradients' bytes. All but the last bucket
    travels during the backward, two thirds of a step; what does not fit there comes on top.
    Context parallel: bytes to each other rank as measured with two, and `COLLECTIVES`; nothing
    overlaps. What two devices lost beyond that, they lose at any number. Inputs cost nothing.
    """
    one, two = (found[n] for n in sorted(found, key=int)[:2])
    given: dict[str, dict[str, Any]] = {}
    for n in PAPER:
        data = {}
        for name, row in one["data"].items():
            alone, bytes_ = row["seconds"], row["gradient_bytes"]
            beyond = max(0.0, two["data"][name]["seconds"] - alone - _ring(2, bytes_, alone))
            data[name] = alone / (alone + _ring(n, bytes_, alone) + beyond)
        context = {}
        for length, row in one["context"].items():
            alone, measured = row["seconds"], two["context"][length]
            beyond = max(0.0, measured["seconds"] - alone - _exchange(2, measured["bytes_sent"]))
            after = alone + beyond + _exchange(n, measured["bytes_sent"])
            context[length] = after / alone
        given[str(n)] = {"efficiency": data, "times_one_device": context}
    return given


def _ring(n: int, gradient_bytes: float, step: float) -> float:
    """Seconds of an all-reduce over n GPUs that a step does not hide."""
    link = "within" if n <= HOST else "across"
    seconds = 2 * (n - 1) / n * gradient_bytes / BANDWIDTH[link]
    last = seconds * min(1.0, LAST_BUCKET / gradient_bytes)
    return last + max(0.0, seconds - last - 2 / 3 * step) + LATENCY[link]


def _exchange(n: int, bytes_of_two: float) -> float:
    """Seconds that n GPUs exchange states, of which two send `bytes_of_two`."""
    link = "within" if n <= HOST else "across"
    return (n - 1) * bytes_of_two / BANDWIDTH[link] + COLLECTIVES * LATENCY[link]


def paper_table(paper: dict[str, dict[str, Any]]) -> str:
    names = [*next(iter(paper.values()))["efficiency"]]
    lengths = [*next(iter(paper.values()))["times_one_device"]]
    heads = [f"{name}: efficiency" for name in names]
    heads += [f"{int(length):,} bases a GPU: × one device" for length in lengths]
    lines = ["| on paper, GPUs | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for n, row in paper.items():
        cells = [f"{row['efficiency'][name]:.1%}" for name in names]
        cells += [f"{row['times_one_device'][length]:.2f}" for length in lengths]
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    devices = sorted(map(int, found))
    first = found[str(devices[0])]
    for name in first["data"]:
        rates = [found[str(n)]["data"][name]["per_second"] for n in devices]
        left.plot(devices, [r / rates[0] for r in rates], marker="o", label=name)
    left.plot(devices, [n / devices[0] for n in devices], color="#999999", ls=":", label="ideal")
    left.set(xlabel="GPUs", ylabel="× one GPU's rate", title="data parallel", xticks=devices)
    for length in first["context"]:
        rows = [found[str(n)]["context"][length] for n in devices]
        label = f"{int(length) / 2**20:g}M bases a GPU"
        right.plot(devices, [r["seconds"] for r in rows], marker="o", label=label)
    right.set(xlabel="GPUs", ylabel="seconds a step", title="context parallel", xticks=devices)
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(RESULTS / "scale.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cpu", action="store_true", help="try the script with gloo")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    found = {str(n): measure(n, options.cpu) for n in sorted(options.devices)}
    killed = killed_and_resumed(max(options.devices), options.cpu)
    text, paper = table(found), {}
    if len(found) > 1:
        paper = on_paper(found)
        text += "\n" + paper_table(paper)
    print(text)
    print(killed)
    if options.cpu:
        return  # figures of a trial are no results
    (RESULTS / "scale.md").write_text(text)
    draw(found)
    results = {"devices": found, "on_paper": paper, "killed": killed}
    write_record("scale", ("torch", "triton", "timm"), results)


if __name__ == "__main__":
    main()
