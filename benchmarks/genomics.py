"""Long DNA on one GPU: training from 1k to 1M bases per sample, and streaming a chromosome.

    python benchmarks/genomics.py [--lengths 1024 ...] [--stream 1000000 ...] [--device cuda]

Training: a bidirectional model (d_model 256, 8 layers) learns masked bases, one sample a step,
bfloat16 autocast, each block computed again in the backward pass; bases/s over whole optimizer
steps, and the peak of allocated memory. Beside it the same model whose mixers are torch's SDPA
attention, to the length where that fits. Streaming: a causal model of the same size answers for
each base of a random chromosome, with carried state, as `predict` does.

Writes benchmarks/results/genomics.json, .md and .png. On a CPU, with small --lengths and --stream,
it is a trial, which writes nothing.
"""

import argparse
import resource
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import RESULTS, write_record
from matplotlib.figure import Figure

from mamba2_apps.backbone import BackboneConfig
from mamba2_apps.genomics.adapter import TokenEmbedding
from mamba2_apps.genomics.fasta import MemoryGenome
from mamba2_apps.genomics.models import DNAModel
from mamba2_apps.genomics.scan import Scan
from mamba2_apps.genomics.tokenizers import BaseTokenizer
from mamba2_apps.heads import LanguageModelHead, TokenHead
from mamba2_apps.tasks import OptimizerConfig, TokenMultiLabel

LENGTHS = [2**n for n in range(10, 21)]
STREAM = [1_000_000, 2_000_000, 5_000_000, 10_000_000, 20_000_000]
BAR = 1_000_000
SIZES = {"d_model": 256, "n_layer": 8, "d_state": 128, "headdim": 64}
WINDOW = 262_144
SLOW = 2.0  # seconds of a step that is timed once


def model_of(head: Any, outputs: int, **options: Any) -> DNAModel:
    torch.manual_seed(0)
    return DNAModel(
        outputs,
        adapter=partial(TokenEmbedding, maskable=True),
        backbone=BackboneConfig(**SIZES, **options),
        head=head,
    )


def training(length: int, attention: bool, device: str, steps: int) -> dict[str, Any] | None:
    """Bases/s and peak memory of one length; None where it does not fit."""
    options: dict[str, Any] = {"bidirectional": True, "gradient_checkpointing": True}
    if attention:
        options |= {"attn_layer_idx": tuple(range(SIZES["n_layer"])), "attn_cfg": None}
    model = model_of(LanguageModelHead, 0, **options).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 4, (1, length), device=device)
    hide = torch.rand(1, length, device=device) < 0.15
    hide[0, 0] = True

    try:
        for number in range(3):
            start = now(device)
            masked_step(model, optimizer, ids, hide)
            if number > 0 and now(device) - start > SLOW:
                steps = 1
                break
        reset_peak(device)
        start = now(device)
        for _ in range(steps):
            masked_step(model, optimizer, ids, hide)
        seconds = (now(device) - start) / steps
    except torch.OutOfMemoryError:
        return None
    return {"bases_per_second": length / seconds, "peak_bytes": peak(device)}


def masked_step(
    model: DNAModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor, hide: torch.Tensor
) -> None:
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits = model(ids, None, hide)
    loss = torch.nn.functional.cross_entropy(logits[hide].float(), ids[hide])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def streaming(length: int, device: str) -> dict[str, Any]:
    """Seconds and peak memory of one pass over a random chromosome."""
    task = TokenMultiLabel(model_of(TokenHead, 4), list("abcd"), OptimizerConfig())
    task = task.to(device).eval()
    letters = np.random.default_rng(0).choice(np.frombuffer(b"ACGT", np.uint8), length)
    genome = MemoryGenome({"c": letters.tobytes().decode()}, "random")
    encode = BaseTokenizer().encode
    # Compiles for a whole window and for the last one.
    list(Scan(task, genome, [("c", 0, WINDOW + length % WINDOW)], WINDOW, 0, encode).run())
    reset_peak(device)
    start = now(device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        for _ in Scan(task, genome, [("c", 0, length)], WINDOW, 0, encode).run():
            pass
    seconds = now(device) - start
    return {"seconds": seconds, "bases_per_second": length / seconds, "peak_bytes": peak(device)}


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> int:
    """Peak bytes: allocated on a GPU; on a CPU, of the process since its start."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(trained: dict[str, Any], streamed: dict[str, Any]) -> str:
    lines = [
        "| bases per sample | Mamba-2, bases/s | peak GiB | attention, bases/s | peak GiB |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for length, row in trained.items():
        cells = [f"{int(length):,}"]
        for name in ("mamba2", "attention"):
            found = row[name]
            cells += (
                ["-", "-"]
                if found is None
                else [f"{found['bases_per_second']:,.0f}", f"{found['peak_bytes'] / 2**30:.2f}"]
            )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| bases streamed | seconds | bases/s | peak GiB |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for length, row in streamed.items():
        lines.append(
            f"| {int(length):,} | {row['seconds']:.1f} | {row['bases_per_second']:,.0f} | "
            f"{row['peak_bytes'] / 2**30:.3f} |"
        )
    return "\n".join(lines) + "\n"


def draw(trained: dict[str, Any], streamed: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    speed, memory, stream = figure.subplots(1, 3)
    for name, color in (("mamba2", "#4878a8"), ("attention", "#c8553d")):
        rows = [(int(length), row[name]) for length, row in trained.items() if row[name]]
        x = [length for length, _ in rows]
        speed.loglog(x, [r["bases_per_second"] for _, r in rows], ".-", color=color, label=name)
        memory.loglog(x, [r["peak_bytes"] / 2**30 for _, r in rows], ".-", color=color)
    speed.set(title="training", xlabel="bases per sample", ylabel="bases/s")
    memory.set(title="training", xlabel="bases per sample", ylabel="peak GiB")
    speed.legend(frameon=False)
    x = [int(length) / 1e6 for length in streamed]
    y = [r["peak_bytes"] / 2**30 for r in streamed.values()]
    stream.plot(x, y, ".-", color="#4878a8")
    stream.set(title="streaming", xlabel="million bases", ylabel="peak GiB", ylim=(0, 1.3 * max(y)))
    for axis in (speed, memory, stream):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--stream", type=int, nargs="+", default=STREAM)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--attention-seconds", type=float, default=60, help="longest step allowed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(words)
    trained: dict[str, Any] = {}
    fits = True
    for length in options.lengths:
        row = {"mamba2": training(length, False, options.device, options.steps)}
        row["attention"] = training(length, True, options.device, options.steps) if fits else None
        found = row["attention"]
        # A step of twice the length takes about four times as long.
        fits = found is not None and (
            4 * length / found["bases_per_second"] < options.attention_seconds
        )
        trained[str(length)] = row
        print(length, row, flush=True)
    streamed = {str(length): streaming(length, options.device) for length in options.stream}
    text = table(trained, streamed)
    print(text)
    if options.device != "cuda":
        return
    (RESULTS / "genomics.md").write_text(text, encoding="utf-8")
    draw(trained, streamed, RESULTS / "genomics.png")
    write_record(
        "genomics",
        ("torch", "triton", "numpy"),
        {
            "bar_bases_per_second_at_1048576": BAR,
            "sizes": SIZES,
            "window": WINDOW,
            "training": trained,
            "streaming": streamed,
        },
    )


if __name__ == "__main__":
    main()
