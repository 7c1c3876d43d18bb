"""The digits recipe over three seeds, as a user runs it, beside scikit-learn on the same split.

    python benchmarks/digits.py

Every seed is one `mamba2-apps train vision/digits --seed N` in a process of its own; its wall time
includes start, training, the baselines and the report. Writes benchmarks/results/digits.json.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _record import write_record

SEEDS = (0, 1, 2)
BAR = 0.980


def train(seed: int, run: Path) -> dict[str, Any]:
    """The metrics.json of one training, with its wall time."""
    command = [sys.executable, "-m", "mamba2_apps.cli", "train", "vision/digits"]
    start = time.perf_counter()
    subprocess.run([*command, f"--seed={seed}", "--run", str(run)], check=True)
    wall = time.perf_counter() - start
    metrics = json.loads((run / "metrics.json").read_text())
    return {"wall_seconds": round(wall, 1), **metrics}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = [train(seed, Path(folder) / f"seed{seed}") for seed in SEEDS]
    accuracies = [result["test"]["accuracy"] for result in results]
    mean = statistics.mean(accuracies)
    baselines = results[0]["baselines"]
    print()
    for seed, result in zip(SEEDS, results, strict=True):
        print(
            f"seed {seed}: test accuracy {result['test']['accuracy']:.4f}, "
            f"{result['wall_seconds']:.0f} s"
        )
    print(f"mean {mean:.4f} (bar {BAR})")
    for name, scores in baselines.items():
        print(f"{name}: {scores['accuracy']:.4f}")
    write_record(
        "digits",
        ("torch", "lightning", "timm", "scikit-learn", "numpy"),
        {
            "bar": BAR,
            "mean_accuracy": mean,
            "baselines": baselines,
            "seeds": dict(zip(map(str, SEEDS), results, strict=True)),
        },
    )


if __name__ == "__main__":
    main()
