"""From our own masked-frame pretraining to drums: scratch, full fine-tuning, LoRA, linear probe.

    python benchmarks/audio_finetune.py --speech data/speech --drums data/drums --at-once 4

One `mamba2-apps train audio/pretrain` on the speech recordings gives the RUN that every way but
scratch starts from. The test authors are held out together; another author chooses the epoch. Rows
go to results/audio_finetune.jsonl as they come, so that a stopped benchmark goes on; the summary is
results/audio_finetune.json. Also checked: what is frozen is bitwise the pretrained weights, and
merged low-rank changes give what unmerged ones give.
"""

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from _audio_fits import metrics_of, train_all
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


def main() -> None:
    options = parse()
    options.runs.mkdir(parents=True, exist_ok=True)
    (pretrained,) = train_all(
        f"{options.name}_pretraining",
        [{"recipe": "pretrain", "seed": 0}],
        lambda job: [
            "audio/pretrain",
            f"--data.source={options.speech / 'manifest.csv'}",
            *options.words,
            *options.pretraining_words,
        ],
        lambda job, run: {"val_loss": metrics_of(run)["best_epoch"]["val/loss"], "run": str(run)},
        runs=options.runs,
        at_once=1,
    )
    start = Path(pretrained["run"])

    def words(job: Mapping[str, Any]) -> list[str]:
        backbone = [] if job["way"] == "scratch" else ["--backbone", str(start)]
        data = [
            f"--data.source={options.drums / 'manifest.csv'}",
            f"--data.test_groups=[{','.join(options.authors)}]",
        ]
        way = [*WAYS[str(job["way"])], f"--seed={job['seed']}"]
        return ["audio/finetune", *backbone, *data, *way, *options.words]

    def finish(job: Mapping[str, Any], run: Path) -> dict[str, Any]:
        metrics = metrics_of(run)
        row = {name: metrics["test"][name] for name in ("accuracy", "balanced_accuracy")}
        row["epoch"] = metrics["best_epoch"]["epoch"]
        if job["way"] == "frozen":
            row["frozen_bitwise_unchanged"] = frozen_unchanged(start, run)
        return row

    jobs = [{"way": way, "seed": seed} for way in options.ways for seed in options.seeds]
    rows = train_all(options.name, jobs, words, finish, runs=options.runs, at_once=options.at_once)
    table = {}
    for way in options.ways:
        found = [row for row in rows if row["way"] == way]
        table[way] = {
            "mean_accuracy": statistics.mean(row["accuracy"] for row in found),
            "accuracy": [row["accuracy"] for row in found],
            "balanced_accuracy": [row["balanced_accuracy"] for row in found],
            "seconds": [row["wall_seconds"] for row in found],
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speech", type=Path, default=Path("data/speech"))
    parser.add_argument("--drums", type=Path, default=Path("data/drums"))
    parser.add_argument("--runs", type=Path, default=Path("runs/audio-finetune"))
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--authors", nargs="+", default=["bja", "grilli"], help="to test on")
    parser.add_argument("--pretraining-words", nargs="*", default=[], help="for pretraining alone")
    parser.add_argument("--name", default="audio_finetune", help="of the result files")
    options, options.words = parser.parse_known_args()
    return options


if __name__ == "__main__":
    main()
