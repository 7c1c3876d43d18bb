"""README and docs say what is true: examples run, links lead somewhere, numbers are measured."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "my-backbone" / "model.safetensors").is_file()


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
