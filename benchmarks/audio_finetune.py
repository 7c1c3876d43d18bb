"""From our own masked-frame pretraining to drums: scratch, full fine-tuning, LoRA, linear probe.

    python benchmarks/audio_finetune.py --speech data/speech --drums data/drums --jobs 4

One `mamba2-apps train audio/pretrain` on the speech recordings gives the RUN that every way but
scratch starts from. The test authors are held out together; another author chooses the epoch. Each
fit is a line of results/audio_finetune.jsonl when it ends, and is not run again; the summary is
results/audio_finetune.json. Keys of the recipes come after --. Also checked: what is frozen is
bitwise the pretrained weights, and merged low-rank changes give what unmerged ones give.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from _fits import arguments_of_runs, do_fits, parse_of_runs, train_into
from _record import write_record
from safetensors.torch import load_file

from mamba2_apps import recipes
from mamba2_apps.adaptation import AdaptationConfig, adapt, merge_lora

WAYS: dict[str, list[str]] = {
    "scratch": ["--optimizer.layer_decay=null"],
    "full": [],
    "lora": ["--adaptation.lora_rank=8", "--optimizer.layer_decay=null", "--optimizer.lr=2e-3"],
    "frozen": [
        "--adaptation.freeze=all_but_head",
        "--optimizer.layer_decay=null",
        "--optimizer.lr=1e-2",
    ],
}


def pretrain(key: str, speech: Path, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Pretrain on the speech recordings; the RUN stays."""
    words = [f"--data.source={speech / 'manifest.csv'}", *overrides]
    run, metrics = train_into(folder, key, "audio/pretrain", words)
    loss = metrics["best_epoch"]["val/loss"]
    return {
        "val_loss": loss,
        "run": str(run),
        "seconds": metrics["seconds"],
        "summary": f"loss {loss:.4f}, {metrics['seconds']:.0f} s",
    }


def fit(
    key: str, start: Path, drums: Path, authors: list[str], folder: Path, overrides: list[str]
) -> dict[str, Any]:
    """Train the drums in one way, and test on the held-out authors."""
    way, seed = key.split(" | ")
    words = [
        *([] if way == "scratch" else [f"--adaptation.start={start}"]),
        f"--data.source={drums / 'manifest.csv'}",
        f"--data.test_groups=[{','.join(authors)}]",
        *WAYS[way],
        f"--seed={seed}",
        *overrides,
    ]
    run, metrics = train_into(folder, key, "audio/finetune", words)
    accuracy = metrics["test"]["accuracy"]
    row = {
        "way": way,
        "seed": int(seed),
        "accuracy": accuracy,
        "balanced_accuracy": metrics["test"]["balanced_accuracy"],
        "epoch": metrics["best_epoch"]["epoch"],
        "seconds": metrics["seconds"],
        "summary": f"accuracy {accuracy:.4f}, {metrics['seconds']:.0f} s",
    }
    if way == "frozen":
        row["frozen_bitwise_unchanged"] = frozen_unchanged(start, run)
    return row


def main() -> None:
    options = parse()
    first = options.fits.with_name(f"{options.fits.stem}_pretraining.jsonl")
    words = [*options.overrides, *options.pretraining_words]
    todo: tuple[Any, ...] = (options.speech, options.runs, words)
    done = do_fits(first, ["pretrain"], pretrain, *todo, jobs=1, minutes=options.minutes)
    if "pretrain" not in done:
        return
    pretrained = done["pretrain"]
    start = Path(pretrained["run"])

    keys = [f"{way} | {seed}" for way in options.ways for seed in options.seeds]
    todo = (start, options.drums, options.authors, options.runs, options.overrides)
    done = do_fits(options.fits, keys, fit, *todo, jobs=options.jobs, minutes=options.minutes)
    if not all(key in done for key in keys):
        return
    rows = [done[key] for key in keys]
    table = {}
    for way in options.ways:
        found = [row for row in rows if row["way"] == way]
        table[way] = {
            "mean_accuracy": statistics.mean(row["accuracy"] for row in found),
            "accuracy": [row["accuracy"] for row in found],
            "balanced_accuracy": [row["balanced_accuracy"] for row in found],
            "seconds": [row["seconds"] for row in found],
        }
    results = {
        "test_authors": options.authors,
        "pretraining": pretrained,
        "table": table,
        "frozen_bitwise_unchanged": all(
            row["frozen_bitwise_unchanged"] for row in rows if row["way"] == "frozen"
        ),
        "merged_lora_difference": merged_lora_difference(start),
    }
    write_record(options.name, ("torch", "triton", "lightning"), results)
    for way, row in table.items():
        print(f"{way}: accuracy {row['mean_accuracy']:.4f}")
    print(f"merged LoRA differs by {results['merged_lora_difference']:.1e}")


def frozen_unchanged(start: Path, run: Path) -> bool:
    """Whether backbone and adapter of a RUN are bitwise those that it started from."""
    before, after = (load_file(folder / "model.safetensors") for folder in (start, run))
    names = [name for name in after if not name.startswith("head.")]
    return all(torch.equal(before[name], after[name]) for name in names)


@torch.no_grad()
def merged_lora_difference(start: Path) -> float:
    """Largest relative difference of outputs before and after merging random low-rank changes."""
    # The pretrained RUN's own sizes, with a head of five classes.
    recipe, _ = recipes.read(start / "config.yaml")
    torch.manual_seed(0)
    model = recipe.model(5).eval()
    adapt(model, AdaptationConfig(start=str(start), lora_rank=8))
    for name, parameter in model.named_parameters():
        if name.endswith(".up"):
            parameter.normal_(std=0.02)
    clip = 0.1 * torch.randn(2, 16000)
    unmerged = model(clip)
    merge_lora(model)
    return float((model(clip) - unmerged).norm() / unmerged.norm())


def parse() -> argparse.Namespace:
    parser = arguments_of_runs("audio_finetune", __doc__, "runs/audio-finetune")
    parser.add_argument("--speech", type=Path, default=Path("data/speech"))
    parser.add_argument("--drums", type=Path, default=Path("data/drums"))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--authors", nargs="+", default=["bja", "grilli"], help="to test on")
    parser.add_argument("--pretraining-words", nargs="*", default=[], help="for pretraining alone")
    return parse_of_runs(parser)


if __name__ == "__main__":
    main()
