"""Many trainings, several at a time, each recorded as it ends: a stopped benchmark goes on."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _record import RESULTS, hardware

HERE = Path(__file__).parent
_lock = threading.Lock()


def train_all(
    name: str,
    jobs: Sequence[Mapping[str, Any]],
    words: Callable[[Mapping[str, Any]], list[str]],
    finish: Callable[[Mapping[str, Any], Path], dict[str, Any]],
    *,
    runs: Path,
    at_once: int,
) -> list[dict[str, Any]]:
    """Run `mamba2-apps train` for every job that results/NAME.jsonl does not hold yet.

    Args:
        name: of the file of rows.
        jobs: the keys that tell one training from another, such as author and seed.
        words: the command line of a job after `mamba2-apps train`, without --run.
        finish: what to record of a job's finished RUN.
        runs: where the RUNs go.
        at_once: trainings side by side.

    Returns every row: the job's keys, wall seconds, and what `finish` gave.
    """
    path = RESULTS / f"{name}.jsonl"
    RESULTS.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def done(job: Mapping[str, Any]) -> bool:
        return any(all(row[key] == value for key, value in job.items()) for row in rows)

    def run(job: Mapping[str, Any]) -> None:
        folder = runs / "-".join(str(value) for value in job.values())
        command = [sys.executable, "-m", "mamba2_apps.cli", "train", *words(job)]
        start = time.perf_counter()
        with folder.with_suffix(".log").open("w") as log:
            subprocess.run(
                [*command, "--run", str(folder)],
                check=True,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(HERE)},
            )
        wall = time.perf_counter() - start
        row = {**job, "wall_seconds": round(wall, 1), **finish(job, folder), **hardware()}
        with _lock:
            rows.append(row)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            shown = {k: v for k, v in row.items() if isinstance(v, int | float | str)}
            print(shown, flush=True)

    runs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, [job for job in jobs if not done(job)]))
    return [row for row in rows if any(all(row[k] == v for k, v in job.items()) for job in jobs)]


def metrics_of(run: Path) -> dict[str, Any]:
    """The metrics.json of a finished RUN."""
    return json.loads((run / "metrics.json").read_text())
