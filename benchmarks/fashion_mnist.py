"""The Fashion-MNIST recipe: its accuracy over three seeds, and what each choice in it is worth.

    python benchmarks/fashion_mnist.py final
    python benchmarks/fashion_mnist.py design

`final` trains the recipe as it is with seeds 0, 1, 2 and reports the test accuracy of the epoch
that the validation images chose. `design` trains it with one thing changed at a time and reports
the accuracy on the validation images alone: the test images choose nothing. Every fit is one
`mamba2-apps train vision/fashion-mnist` in a process of its own, timed from start to report; --jobs
trains several side by side. A fit that results/fashion_mnist.json has is not trained again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _record import RESULTS, write_record

SEEDS = (0, 1, 2)
BAR = 0.950
ADAPTER = "--model.adapter"
BACKBONE = "--model.backbone"
PATCHES = "mamba2_apps.vision.adapter.PatchEmbedding"
DESIGNS: dict[str, list[str]] = {
    "recipe": [],
    "a convolution per direction": [f"{BACKBONE}.conv_per_direction=true"],
    "class token in the middle": [f"{ADAPTER}.class_token=true", "--model.head.pool=98"],
    "causal, one scan": [f"{BACKBONE}.bidirectional=false"],
    "patches of 4, stride 2, no stem": [
        f'{ADAPTER}={{"class_path": "{PATCHES}", "init_args": {{"image_size": 28, "patch_size": 4, '
        '"stride": 2, "in_chans": 1}}',
    ],
    "d_state 32": [f"{BACKBONE}.d_state=32"],
    "no random erasing": ["--data.erase=0"],
    "mixup 0.2": ["--data.mixup=0.2"],
}


def fits(part: str) -> dict[str, list[str]]:
    """Overrides of the recipe for each fit of a part, by name."""
    if part == "final":
        return {f"seed {seed}": [f"--seed={seed}"] for seed in SEEDS}
    return DESIGNS


def train(overrides: list[str], run: Path) -> dict[str, Any]:
    """metrics.json of one training into the directory `run`, with its wall time."""
    # -P: the repository's folders must not pass for packages of the same names.
    command = [sys.executable, "-P", "-m", "mamba2_apps.cli", "train", "vision/fashion-mnist"]
    start = time.perf_counter()
    subprocess.run([*command, "--run", str(run), *overrides], check=True)
    wall = time.perf_counter() - start
    return {"wall_seconds": round(wall, 1), **json.loads((run / "metrics.json").read_text())}


def summary(part: str, name: str, overrides: list[str], result: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of a fit; of a design nothing that the test images say."""
    best = result["best_epoch"]
    row = {
        "part": part,
        "name": name,
        "overrides": overrides,
        "parameters": result["parameters"],
        "epochs": result["epochs"],
        "wall_seconds": result["wall_seconds"],
        "best_epoch": best["epoch"],
        "val_accuracy": best["val/accuracy"],
    }
    return row | ({"test": result["test"]} if part == "final" else {})


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["fits"] if path.exists() else []


def report(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        scores = f"validation {row['val_accuracy']:.4f}"
        if "test" in row:
            scores += f", test {row['test']['accuracy']:.4f}"
        print(
            f"{row['part']:<7} {row['name']:<32} {scores}, {row['parameters']:,} parameters, "
            f"{row['wall_seconds']:.0f} s"
        )
    tested = [row["test"]["accuracy"] for row in rows if row["part"] == "final"]
    if tested:
        print(f"test accuracy, mean of {len(tested)}: {statistics.mean(tested):.4f} (bar {BAR})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("final", "design"))
    parser.add_argument("--jobs", type=int, default=1, help="fits to train side by side")
    parser.add_argument("--only", nargs="*", help="names of fits, in place of all of the part")
    parser.add_argument("--runs", type=Path, help="keep the RUN directories in this folder")
    parser.add_argument("--name", default="fashion_mnist", help="of the file in results/")
    arguments, further = parser.parse_known_args()  # keys of the recipe, for every fit
    path = RESULTS / f"{arguments.name}.json"
    done = {(row["part"], row["name"]) for row in read(path)}
    todo = {
        name: [*overrides, *further]
        for name, overrides in fits(arguments.part).items()
        if (arguments.part, name) not in done and (not arguments.only or name in arguments.only)
    }
    with TemporaryDirectory() as scratch, ThreadPoolExecutor(arguments.jobs) as pool:
        folder = arguments.runs or Path(scratch)
        futures = {
            pool.submit(train, overrides, folder / f"{arguments.part} {name}"): name
            for name, overrides in todo.items()
        }
        for future in as_completed(futures):
            name = futures[future]
            row = summary(arguments.part, name, todo[name], future.result())
            row["side_by_side"] = min(arguments.jobs, len(todo))
            packages = ("torch", "triton", "lightning", "timm", "torchmetrics", "numpy")
            write_record(arguments.name, packages, {"bar": BAR, "fits": [*read(path), row]})
    report(read(path))


if __name__ == "__main__":
    main()
