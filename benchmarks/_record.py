"""What every benchmark's result file says of the machine and the run."""

import datetime
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def write_record(name: str, packages: Sequence[str], results: Mapping[str, Any]) -> Path:
    """Writes results/NAME.json: date, hardware, versions, command, then the results."""
    record = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record | dict(results), indent=2) + "\n", encoding="utf-8")
    return path


def hardware() -> dict[str, Any]:
    """Processor, threads that torch uses, GPU where there is one."""
    found: dict[str, Any] = {"cpu": _cpu(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
