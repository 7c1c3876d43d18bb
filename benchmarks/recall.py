"""Multi-query associative recall: how many pairs a model remembers, against its width.

    python benchmarks/recall.py --jobs 4

The task of Arora et al. (2023) as the Mamba-2 paper uses it (Dao and Gu 2024, section 9.1 and
Figure 8): a sequence begins with pairs of a key and a value; later each key comes once more, at a
random place among noise, and the model must give its value. Two layers of Mamba-2 with d_state 16,
64 and 256, or of softmax attention (rotary positions, the same short convolution), at widths 32 to
256. While training the number of pairs rises in four stages to a quarter of the length. Every model
trains with each of the learning rates; the one with the best accuracy on validation sequences is
tested on others. Writes results/recall.json, a line per fit into results/recall.jsonl as it ends (a
fit that is there is not run again), recall.md and recall.png.

Dimensions: batch b · seqlen l · pairs k · vocabulary v
"""

import argparse
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from _record import RESULTS, write_record
from torch import Tensor

from mamba2_apps.backbone import BackboneConfig
from mamba2_apps.language import LanguageModel

WIDTHS = (32, 64, 128, 256)
MIXERS = ("attention", "d_state 16", "d_state 64", "d_state 256")
RATES = (1e-3, 3e-3, 1e-2)
STAGES = (8, 4, 2, 1)  # the pairs of a stage are the most of all, divided by this
LINES = RESULTS / "recall.jsonl"


def sequences(
    b: int, l: int, k: int, v: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences (b, l) of ids, the places (b, k) of the k queries, and their answers (b, k).

    Keys are the lower half of the vocabulary, values the upper; noise is any of it but the keys of
    the sequence's pairs: a key in the noise would be a query of no known answer.
    """
    device = generator.device
    half = v // 2

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    keys = random(b, half).argsort(1)
    keys, others = keys[:, :k], keys[:, k:]
    values = half + (random(b, k) * half).long()
    noise = others.gather(1, (random(b, l) * others.shape[1]).long())
    ids = torch.where(random(b, l) < 0.5, noise, half + (random(b, l) * half).long())
    ids[:, : 2 * k] = torch.stack([keys, values], -1).flatten(1)
    # A query takes two places: its key, and its value as an answer that later tokens may see.
    slots = (l - 2 * k) // 2
    places = 2 * k + 2 * random(b, slots).argsort(1)[:, :k]
    ids.scatter_(1, places, keys).scatter_(1, places + 1, values)
    return ids, places, values


def build(mixer: str, width: int, v: int) -> LanguageModel:
    if mixer == "attention":
        cfg = {"num_heads": max(1, width // 64), "rotary_emb_dim": min(width, 64), "d_conv": 4}
        config = BackboneConfig(width, 2, headdim=32, attn_layer_idx=(0, 1), attn_cfg=cfg)
    else:
        config = BackboneConfig(width, 2, d_state=int(mixer.split()[1]), headdim=32)
    return LanguageModel(config, v)


def scores(model: LanguageModel, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and accuracy over the queries."""
    ids, places, values = batch
    hidden = model.backbone(model.embedding(ids))
    asked = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2]))
    logits = model.head(asked).float()
    loss = F.cross_entropy(logits.flatten(0, 1), values.flatten())
    return loss, (logits.argmax(-1) == values).float().mean()


def fit(mixer: str, width: int, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model; its accuracy on validation and on test sequences."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    l, v, most = options.length, options.vocabulary, options.length // 4
    model = build(mixer, width, v).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * i / options.steps)),
    )
    generator = torch.Generator(device).manual_seed(1)
    start = time.perf_counter()
    for step in range(options.steps):
        pairs = most // STAGES[step * len(STAGES) // options.steps]
        batch = sequences(options.batch_size, l, pairs, v, generator)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, _ = scores(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    accuracy = {}
    for part, seed in (("validation", 2), ("test", 3)):
        held_out = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            batches = [sequences(options.batch_size, l, most, v, held_out) for _ in range(8)]
            accuracy[part] = torch.stack([scores(model, one)[1] for one in batches]).mean().item()
    return {
        "mixer": mixer,
        "width": width,
        "rate": rate,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": loss.item(),
        **accuracy,
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(rows: list[dict[str, Any]]) -> tuple[str, dict[tuple[str, int], dict[str, Any]]]:
    """Test accuracy of the rate that validation chose, as Markdown, and the chosen fits."""
    chosen: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["mixer"], row["width"])
        if key not in chosen or row["validation"] > chosen[key]["validation"]:
            chosen[key] = row
    widths = sorted({width for _, width in chosen})
    lines = ["| mixer | " + " | ".join(f"width {w}" for w in widths) + " |"]
    lines.append("|---" * (len(widths) + 1) + "|")
    for mixer in MIXERS:
        cells = [
            f"{chosen[mixer, w]['test']:.3f}" if (mixer, w) in chosen else "not run" for w in widths
        ]
        lines.append(f"| {mixer} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n", chosen


def draw(chosen: dict[tuple[str, int], dict[str, Any]], pairs: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.8), layout="constrained")
    axis = figure.subplots()
    colors = dict(zip(MIXERS, ("#666666", "#9ecae1", "#4292c6", "#08306b"), strict=True))
    for mixer in MIXERS:
        points = sorted((w, row["test"]) for (name, w), row in chosen.items() if name == mixer)
        label = mixer if mixer == "attention" else f"Mamba-2, {mixer}"
        axis.plot(*zip(*points, strict=True), marker="o", color=colors[mixer], label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(WIDTHS, [str(w) for w in WIDTHS])
    axis.set(xlabel="width", ylabel=f"accuracy over {pairs} queries", ylim=(-0.03, 1.03))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(RESULTS / "recall.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="fits side by side")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    options = parser.parse_args()
    settings = {k: v for k, v in vars(options).items() if k not in ("jobs", "widths")}
    done = [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []
    done = [row for row in done if row["settings"] == settings]
    have = {(row["mixer"], row["width"], row["rate"]) for row in done}
    wanted = [key for key in product(MIXERS, options.widths, RATES) if key not in have]
    wanted.sort(key=lambda key: -key[1])  # the longest first
    start = time.perf_counter()
    # Every process its own context: forks cannot share a GPU's.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for future in as_completed([pool.submit(fit, *key, options) for key in wanted]):
            row = future.result() | {"settings": settings}
            done.append(row)
            with LINES.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row["mixer"], row["width"], row["rate"], f"{row['test']:.3f}", flush=True)
    text, chosen = table(done)
    print(text)
    (RESULTS / "recall.md").write_text(text)
    draw(chosen, options.length // 4)
    write_record(
        "recall",
        ("torch", "triton"),
        {"settings": settings, "wall_seconds": round(time.perf_counter() - start, 1), "rows": done},
    )


if __name__ == "__main__":
    main()
