"""What benchmarks of many fits share: fits in a file, to go on where one stopped.

Each fit is a line of JSON, with the hardware that it ran on, that is appended when it is done; a
script that was stopped does the rest when it is called again. `--minutes` starts no further fit
after that time, `--jobs` runs several at once, which share a GPU.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from _record import RESULTS, hardware


def arguments(name: str, text: str | None) -> argparse.ArgumentParser:
    """Options that every one of these scripts has; --seeds is how many."""
    parser = _arguments_but_seeds(name, text)
    parser.add_argument("--seeds", type=int, default=3)
    return parser


def arguments_of_runs(name: str, text: str | None, folder: str) -> argparse.ArgumentParser:
    """Options of the scripts that keep the RUN of each fit; --seeds are the seeds themselves."""
    parser = _arguments_but_seeds(name, text)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path(folder), help="folder of the RUNs")
    parser.add_argument("--name", default=name, help="of the result files")
    parser.set_defaults(fits=None)
    return parser


def _arguments_but_seeds(name: str, text: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fits", type=Path, default=RESULTS / f"{name}.jsonl")
    parser.add_argument("--jobs", type=int, default=1, help="fits at once")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no fit after these")
    parser.add_argument("overrides", nargs="*", help="keys of the recipe, after --")
    return parser


def parse_of_runs(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; the fits are in results/NAME.jsonl where no other file is given."""
    options = parser.parse_args()
    options.fits = options.fits or RESULTS / f"{options.name}.jsonl"
    return options


def train_into(
    folder: Path, key: str, recipe: str, words: Sequence[str]
) -> tuple[Path, dict[str, Any]]:
    """Train into a new folder inside `folder`; return that RUN and its metrics.

    A fit that was stopped leaves its folder, and is trained again into another.
    """
    from mamba2_apps import catalog, runs

    folder.mkdir(parents=True, exist_ok=True)
    run = Path(tempfile.mkdtemp(prefix=key.replace(" | ", "-") + "-", dir=folder))
    return run, runs.train(catalog.find(recipe), run, words)


def read_fits(path: Path) -> dict[str, dict[str, Any]]:
    """Fits that are done, by key."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["key"]: row for row in rows}


def do_fits(
    path: Path,
    keys: Iterable[str],
    fit: Callable[..., dict[str, Any]],
    *options: Any,
    jobs: int,
    minutes: float,
) -> dict[str, dict[str, Any]]:
    """Call fit(key, *options) for every key that is not done; return all that are done then."""
    done = read_fits(path)
    waiting = [key for key in keys if key not in done]
    start = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool, path.open("a") as file:
        running: dict[Future[dict[str, Any]], str] = {}
        while waiting or running:
            in_time = time.monotonic() - start < 60 * minutes
            while waiting and len(running) < jobs and in_time:
                key = waiting.pop(0)
                running[pool.submit(_recorded, fit, key, *options)] = key
            if not running:
                print(f"{len(waiting)} fits are left; call again to go on")
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                done[key] = future.result()
                file.write(json.dumps(done[key]) + "\n")
                file.flush()
                print(f"{key}: {done[key].get('summary', 'done')}", flush=True)
    return done


def _recorded(fit: Callable[..., dict[str, Any]], key: str, *options: Any) -> dict[str, Any]:
    return {"key": key, **fit(key, *options), "hardware": hardware()}
