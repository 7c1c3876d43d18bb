"""README and docs say what is true: examples run, links lead somewhere, numbers are measured."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from mamba2_apps.cli import main
from mamba2_apps.vision.digits import Digits

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "my-backbone" / "model.safetensors").is_file()


def test_the_six_commands_of_the_guide_to_reuse_run(tmp_path, monkeypatch):
    guide = (ROOT / "docs" / "reuse.md").read_text(encoding="utf-8")
    block = re.search(r"six commands.*?```sh\n(.*?)```", guide, flags=re.DOTALL)
    commands = [line.removeprefix("mamba2-apps ") for line in block[1].splitlines()]
    assert len(commands) == 6
    (tmp_path / "audio").symlink_to(ROOT / "audio")  # the guide stands in a clone
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Digits, "baselines", lambda self: {})
    short = ["--trainer.max_epochs=1", "--optimizer.warmup_epochs=0"]
    for command in commands:
        words = shlex.split(command, comments=True)
        assert main([*words, *(short if words[0] == "train" else [])]) == 0, command
    assert len(np.load(tmp_path / "vectors.npz")["embeddings"]) == 101


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").iterdir())]
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_cpu_numbers_are_the_recorded_ones():
    rows = json.loads((RESULTS / "cpu_backbone.json").read_text())["rows"]
    for r in rows:
        assert (
            f"| {r['batch']} × {r['seqlen']} {r['mode']} | {r['ours_ms']:.0f} ms "
            f"| {r['transformers_ms']:.0f} ms | {r['times_faster']:.2f}× | {r['wall_ms']:.0f} ms |"
        ) in README


def test_digits_numbers_are_the_recorded_ones():
    recorded = json.loads((RESULTS / "digits.json").read_text())
    seeds = [recorded["seeds"][seed]["test"]["accuracy"] for seed in "012"]
    shown = ", ".join(f"{accuracy:.3f}" for accuracy in seeds)
    assert f"{shown} (mean {recorded['mean_accuracy']:.3f})" in README
    for name, scores in recorded["baselines"].items():
        assert f"| {name} | {scores['accuracy']:.3f} |" in README
