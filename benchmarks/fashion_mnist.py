"""The Fashion-MNIST recipe: its accuracy over three seeds, and what each choice in it is worth.

    python benchmarks/fashion_mnist.py
    python benchmarks/fashion_mnist.py --design [--jobs 3] [-- --trainer.max_epochs=20]

Trains the recipe as it is with seeds 0, 1, 2 and reports the test accuracy of the epoch that the
validation images chose. --design trains it with one thing changed at a time and reports the
accuracy on the validation images alone: the test images choose nothing. Each fit is a line of
results/fashion_mnist.jsonl when it ends, and is not run again; the summary of both is
results/fashion_mnist.json. Keys of the recipe come after --. Needs data/fashion-mnist.
"""

import statistics
import time
from pathlib import Path
from typing import Any

from _fits import arguments_of_runs, do_fits, parse_of_runs, read_fits, train_into
from _record import write_record

BAR = 0.950
ADAPTER = "--model.adapter"
BACKBONE = "--model.backbone"
PATCHES = "mamba2_apps.vision.adapter.PatchEmbedding"
DESIGNS: dict[str, list[str]] = {
    "recipe": [],
    "a convolution per direction": [f"{BACKBONE}.conv_per_direction=true"],
    "class token in the middle": [f"{ADAPTER}.class_token=true", "--model.head.pool=24"],
    "causal, one scan": [f"{BACKBONE}.bidirectional=false"],
    "patches of 4, stride 2, no stem": [
        f'{ADAPTER}={{"class_path": "{PATCHES}", "init_args": {{"image_size": 28, "patch_size": 4, '
        '"stride": 2, "in_chans": 1}}',
    ],
    "two stages, 196 tokens": [f"{ADAPTER}.widths=[64,128]", f"{ADAPTER}.blocks=[2,2]"],
    "one block a stage": [f"{ADAPTER}.blocks=[1,1,1]"],
    "d_state 16": [f"{BACKBONE}.d_state=16"],
    "no random erasing": ["--data.erase=0"],
    "no mixup": ["--data.mixup=0"],
    "cutmix 0.5 beside mixup": ["--data.cutmix=0.5"],
    "drop path 0.2": [f"{BACKBONE}.drop_path=0.2"],
}


def fit(key: str, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train one fit; of a design nothing is kept that the test images say."""
    part, name = key.split(" | ")
    words = [*DESIGNS[name]] if part == "design" else [f"--seed={name.removeprefix('seed ')}"]
    start = time.perf_counter()
    _, metrics = train_into(folder, key, "vision/fashion-mnist", [*words, *overrides])
    seconds = time.perf_counter() - start
    best = metrics["best_epoch"]
    row = {
        "overrides": [*words, *overrides],
        "parameters": metrics["parameters"],
        "epochs": metrics["epochs"],
        "seconds": round(seconds, 1),
        "best_epoch": best["epoch"],
        "val_accuracy": best["val/accuracy"],
    }
    scores = f"validation {row['val_accuracy']:.4f}"
    if part == "final":
        row["test"] = metrics["test"]
        scores += f", test {metrics['test']['accuracy']:.4f}"
    return row | {"summary": f"{scores}, {metrics['parameters']:,} parameters, {seconds:.0f} s"}


def main() -> None:
    parser = arguments_of_runs("fashion_mnist", __doc__, "runs/fashion-mnist")
    parser.add_argument("--design", action="store_true", help="one thing changed at a time")
    parser.add_argument("--only", nargs="+", default=list(DESIGNS), help="of the designs")
    options = parse_of_runs(parser)
    keys = [f"final | seed {seed}" for seed in options.seeds]
    if options.design:
        keys = [f"design | {name}" for name in options.only]
    todo = (options.runs, options.overrides)
    do_fits(options.fits, keys, fit, *todo, jobs=options.jobs, minutes=options.minutes)
    done = read_fits(options.fits)
    tested = [row["test"]["accuracy"] for row in done.values() if "test" in row]
    mean = statistics.mean(tested) if tested else None
    for key, row in done.items():
        print(f"{key}: {row['summary']}")
    if mean is not None:
        print(f"test accuracy, mean of {len(tested)} seeds: {mean:.4f} (bar {BAR})")
    packages = ("torch", "triton", "lightning", "timm", "torchmetrics", "numpy")
    record = {"bar": BAR, "test_accuracy": mean, "fits": list(done.values())}
    write_record(options.name, packages, record)


if __name__ == "__main__":
    main()
