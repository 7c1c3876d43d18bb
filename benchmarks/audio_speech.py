"""The speech-ctc recipe on Russian, on Spanish and on both, beside a BiGRU with the same features.

    python benchmarks/audio_speech.py --data data/speech --at-once 2

Character error rates are of the greedy reading of the manifest's test part, no language model; a
tenth of the training texts chooses the epoch. "joint" is one model for both languages, scored on
each. Rows go to results/audio_speech.jsonl as they come,
so that a stopped benchmark goes on; the summary is results/audio_speech.json.
"""

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from _audio_fits import metrics_of, train_all
from _record import write_record
from torchmetrics.functional.text import char_error_rate

import mamba2_apps
from mamba2_apps import catalog
from mamba2_apps.audio.manifest import read_table

BAR = 0.22
COLUMNS = {"path": "file", "text": "transcript"}
MODELS = ("mamba2", "joint", "bigru")
JOINT_EPOCHS = 90  # as many steps as one language has in its 150, and some more


def main() -> None:
    options = parse()
    recipe = yaml.safe_load(catalog.find("audio/speech-ctc").read_text(encoding="utf-8"))
    bigru = {
        "class_path": "_bigru.BiGRU",
        "init_args": {"adapter": recipe["model"]["init_args"]["adapter"]},
    }
    options.runs.mkdir(parents=True, exist_ok=True)
    gru_recipe = options.runs / "bigru.yaml"
    gru_recipe.write_text(yaml.safe_dump({**recipe, "model": bigru}), encoding="utf-8")

    def words(job: Mapping[str, Any]) -> list[str]:
        name = str(gru_recipe) if job["model"] == "bigru" else "audio/speech-ctc"
        source = [f"--data.source={options.data / 'manifest.csv'}"]
        if job["model"] == "joint":
            language = ["--data.where=null", f"--trainer.max_epochs={JOINT_EPOCHS}"]
        else:
            language = [f"--data.where={{language: {job['language']}}}"]
        return [name, *source, *language, f"--seed={job['seed']}", *options.words]

    def finish(job: Mapping[str, Any], run: Path) -> dict[str, Any]:
        metrics = metrics_of(run)
        return {
            "cer": error_rates(run, options.data, options.languages, job["language"]),
            "val_cer": metrics["best_epoch"]["val/cer"],
            "epoch": metrics["best_epoch"]["epoch"],
            "parameters": metrics["parameters"],
            "train_seconds": metrics["seconds"],
        }

    jobs = [
        {"model": model, "language": language, "seed": seed}
        for model in options.models
        for seed in options.seeds
        for language in (options.languages if model != "joint" else ["both"])
    ]
    rows = train_all(options.name, jobs, words, finish, runs=options.runs, at_once=options.at_once)
    table: dict[str, Any] = {}
    for model in options.models:
        for language in options.languages:
            found = [row for row in rows if row["model"] == model and language in row["cer"]]
            table[f"{model} {language}"] = {
                "mean_cer": statistics.mean(row["cer"][language] for row in found),
                "cer": [row["cer"][language] for row in found],
                "longest_seconds": max(row["train_seconds"] for row in found),
                "parameters": found[0]["parameters"],
            }
    write_record(options.name, ("torch", "triton", "lightning"), {"bar": BAR, "table": table})
    for name, row in table.items():
        print(f"{name}: CER {row['mean_cer']:.4f} (bar {BAR}), {row['longest_seconds']:.0f} s")


def error_rates(run: Path, data: Path, languages: list[str], trained_on: str) -> dict[str, float]:
    """Character error rate of a RUN on the test clips of each language that it was trained on."""
    predictor = mamba2_apps.load(run)
    rates = {}
    for language in languages if trained_on == "both" else [trained_on]:
        where = {"language": language, "split": "test"}
        clips = read_table(data / "manifest.csv", "text", columns=COLUMNS, where=where)
        answers = predictor.predict([clip.path for clip in clips])
        texts = [answer["text"] for answer in answers]
        rates[language] = char_error_rate(texts, [clip.text or "" for clip in clips]).item()
    return rates


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/speech"))
    parser.add_argument("--runs", type=Path, default=Path("runs/audio-speech"))
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--languages", nargs="+", default=["ru", "es"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--name", default="audio_speech", help="of the result files")
    options, options.words = parser.parse_known_args()
    return options


if __name__ == "__main__":
    main()
