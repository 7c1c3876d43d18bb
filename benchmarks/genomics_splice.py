"""Splice junctions: ten fixed folds with similar sequences together, three seeds, and baselines.

    python benchmarks/genomics_splice.py [--jobs 4] [--minutes 8] [-- --optimizer.lr=1e-3 ...]

Each fit is `mamba2-apps train genomics/splice` on nine folds; its RUN also trains the baselines on
the same nine folds. Accuracies are of all 3,186 sequences, each predicted by the fit that has not
seen its fold. When all fits are there, writes benchmarks/results/genomics_splice.json.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _fits import arguments, do_fits
from _record import write_record

FOLDS = 10
BAR, AIM = 0.963, 0.970


def fit(key: str, overrides: list[str]) -> dict[str, Any]:
    """Train one fold with one seed."""
    from mamba2_apps import catalog, runs

    fold, seed = (int(part.split("=")[1]) for part in key.split())
    with tempfile.TemporaryDirectory() as folder:
        words = [*overrides, f"--data.fold={fold}", f"--seed={seed}"]
        metrics = runs.train(catalog.find("genomics/splice"), Path(folder) / "run", words)
        confusion = np.genfromtxt(
            Path(folder) / "run" / "classes.csv", delimiter=",", names=True, dtype=None,
            encoding="utf-8",
        )  # fmt: skip
    count = int(confusion["count"].sum())
    accuracy = metrics["test"]["accuracy"]
    return {
        "fold": fold,
        "seed": seed,
        "count": count,
        "test": metrics["test"],
        "baselines": metrics["baselines"],
        "best_epoch": metrics["best_epoch"]["epoch"],
        "parameters": metrics["parameters"],
        "seconds": metrics["seconds"],
        "overrides": overrides,
        "summary": f"accuracy {accuracy:.4f}, {metrics['seconds']:.0f} s",
    }


def pooled(rows: list[dict[str, Any]], value: Any) -> float:
    """Mean over sequences of what `value` gives for a fold."""
    return sum(row["count"] * value(row) for row in rows) / sum(row["count"] for row in rows)


def main() -> None:
    parser = arguments("genomics_splice", __doc__)
    parser.add_argument("--folds", type=int, default=FOLDS, help="fewer, for a trial")
    options = parser.parse_args()
    keys = [f"fold={f} seed={s}" for s in range(options.seeds) for f in range(options.folds)]
    done = do_fits(
        options.fits, keys, fit, options.overrides, jobs=options.jobs, minutes=options.minutes
    )
    if not all(key in done for key in keys):
        return
    rows = [done[key] for key in keys]
    seeds = {
        seed: pooled([r for r in rows if r["seed"] == seed], lambda r: r["test"]["accuracy"])
        for seed in range(options.seeds)
    }
    first = [row for row in rows if row["seed"] == 0]
    baselines = {
        name: pooled(first, lambda r, name=name: r["baselines"][name]["accuracy"])
        for name in first[0]["baselines"]
    }
    mean = statistics.mean(seeds.values())
    for seed, accuracy in seeds.items():
        print(f"seed {seed}: accuracy {accuracy:.4f}")
    print(f"mean {mean:.4f} (bar {BAR}, aim {AIM})")
    for name, accuracy in baselines.items():
        print(f"{name}: {accuracy:.4f}")
    if options.folds == FOLDS and options.seeds >= 3:  # a smaller trial writes nothing
        write_record(
            "genomics_splice",
            ("torch", "lightning", "scikit-learn", "numpy"),
            {
                "bar": BAR,
                "aim": AIM,
                "mean_accuracy": mean,
                "accuracy_by_seed": seeds,
                "baselines": baselines,
                "fits": rows,
            },
        )


if __name__ == "__main__":
    main()
