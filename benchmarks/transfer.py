"""Where a backbone's weights come from, and what that is worth, across the three domains.

    python benchmarks/transfer.py [--jobs 6] [--minutes 8]

Start points: random; pretrained on the target's own domain; on another domain (images start from
audio, DNA from images, audio from DNA); on all three together. Pretraining is masked reconstruction
with the recipe mixed/pretrain, of all its parts or of one, the same number of batches for each.
Targets: Fashion-MNIST with 100, 1,000 and all labels; splice (one fold, similar sequences
together); drums (one author left out). Each start trains each target fully and with everything but
the head frozen, with three seeds and the same epochs; nothing is chosen by test data. Every fit is
a line of results/transfer.jsonl when it ends, and is not run again; at the end it writes
results/transfer.json and transfer.md, where a cell that was not run says so.
"""

import argparse
import math
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from _fits import arguments, do_fits, read_fits
from _record import RESULTS, write_record

DOMAINS = {"images": "audio", "dna": "images", "audio": "dna"}
"""Each domain, and the other one that it starts from."""

TARGETS: dict[str, tuple[str, str, list[str]]] = {
    f"Fashion-MNIST, {labels} labels": (
        "images",
        "vision/fashion-mnist",
        [*([] if images is None else [f"--data.train_images={images}"]), f"--data.batch_size={b}",
         f"--trainer.max_epochs={epochs}", f"--optimizer.warmup_epochs={epochs / 10}",
         f"--trainer.check_val_every_n_epoch={every}"],
    )
    for labels, images, b, epochs, every in (
        ("100", 100, 50, 200, 20), ("1,000", 1000, 100, 60, 6), ("55,000", None, 512, 8, 1),
    )
} | {
    "splice": ("dna", "genomics/splice", ["--trainer.max_epochs=20", "--data.fold=0"]),
    "drums": ("audio", "audio/drums", ["--trainer.max_epochs=40", "--data.compare=false",
                                      "--data.num_workers=1"]),
}  # fmt: skip
STARTS = ("random", "own domain", "other domain", "all three")
WAYS = ("full", "frozen")
PRETRAIN_BATCHES, PRETRAIN_EPOCHS = 300, 4


def model_words(domain: str) -> list[str]:
    """The model of mixed/pretrain for one domain, as overrides of a target's recipe."""
    import json

    from mamba2_apps import catalog

    mixed = yaml.safe_load(catalog.find("mixed/pretrain").read_text())["model"]["init_args"]
    adapter = mixed["adapters"][domain]
    adapter = {**adapter, "init_args": {**adapter["init_args"], "maskable": False}}
    backbone = [f"--model.backbone.{key}={value}" for key, value in mixed["backbone"].items()]
    return [f"--model.adapter={json.dumps(adapter)}", *backbone]


def pretrain(key: str, runs_folder: Path, extra: list[str]) -> dict[str, Any]:
    """Pretrain on the parts that the key names; the RUN stays."""
    from mamba2_apps import catalog, runs

    parts = list(DOMAINS) if key == "all three" else [key]
    recipe = yaml.safe_load(catalog.find("mixed/pretrain").read_text())
    for section in (recipe["data"]["init_args"]["parts"], recipe["model"]["init_args"]["adapters"]):
        for name in set(section) - set(parts):
            del section[name]
    recipe["data"]["init_args"]["batches_per_epoch"] = PRETRAIN_BATCHES
    recipe["trainer"]["max_epochs"] = PRETRAIN_EPOCHS
    path = runs_folder / f"{key}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    metrics = runs.train(path, runs_folder / key, extra)
    return {
        "test": metrics["test"],
        "seconds": metrics["seconds"],
        "summary": f"loss {metrics['test']['loss']:.4f}, {metrics['seconds']:.0f} s",
    }


def fit(key: str, runs_folder: Path, extra: list[str]) -> dict[str, Any]:
    """Train one target from one start."""
    import tempfile

    from mamba2_apps import catalog, runs

    target, start, way, seed = key.split(" | ")
    domain, recipe, words = TARGETS[target]
    words = [*model_words(domain), *words, "--optimizer.lr=1e-3", f"--seed={seed}"]
    sources = {"own domain": domain, "other domain": DOMAINS[domain], "all three": "all three"}
    if start != "random":
        words.append(f"--adaptation.start={runs_folder / sources[start]}")
    if way == "frozen":
        words.append("--adaptation.freeze=all_but_head")
    with tempfile.TemporaryDirectory() as folder:
        metrics = runs.train(catalog.find(recipe), Path(folder) / "run", [*words, *extra])
    return {
        "target": target,
        "start": start,
        "way": way,
        "seed": int(seed),
        "accuracy": metrics["test"]["accuracy"],
        "seconds": metrics["seconds"],
        "summary": f"{metrics['test']['accuracy']:.4f}, {metrics['seconds']:.0f} s",
    }


def cell(rows: list[dict[str, Any]]) -> str:
    """Mean and 95% interval (Student's t) of the test accuracies of the seeds."""
    values = [row["accuracy"] for row in rows]
    if not values:
        return "not run"
    if len(values) < 3:
        return f"{statistics.mean(values):.3f} ({len(values)} of 3 seeds)"
    half = 4.303 * statistics.stdev(values) / math.sqrt(3)
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def table(done: list[dict[str, Any]]) -> str:
    lines = ["| target | trained | " + " | ".join(STARTS) + " |"]
    lines.append("|---" * (len(STARTS) + 2) + "|")
    for target, way in product(TARGETS, WAYS):
        cells = [
            cell([r for r in done if (r["target"], r["start"], r["way"]) == (target, start, way)])
            for start in STARTS
        ]
        lines.append(f"| {target} | {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = arguments("transfer", __doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/transfer"), help="pretrained RUNs")
    options: argparse.Namespace = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    pretrained = options.fits.with_name(f"{options.fits.stem}_pretraining.jsonl")
    starts = [*DOMAINS, "all three"]
    shared = {"jobs": options.jobs, "minutes": options.minutes}
    done = do_fits(pretrained, starts, pretrain, options.runs, options.overrides, **shared)
    if set(starts) - set(done):
        return
    keys = [
        f"{target} | {start} | {way} | {seed}"
        for seed, target, start, way in product(range(options.seeds), TARGETS, STARTS, WAYS)
    ]
    do_fits(options.fits, keys, fit, options.runs, options.overrides, **shared)
    rows = list(read_fits(options.fits).values())
    text = table(rows)
    print(text)
    (RESULTS / "transfer.md").write_text(text)
    write_record(
        "transfer",
        ("torch", "triton", "lightning", "timm"),
        {"pretraining": read_fits(pretrained), "fits": rows},
    )


if __name__ == "__main__":
    main()
