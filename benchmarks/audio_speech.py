"""The speech-ctc recipe on Russian, on Spanish and on both, beside a BiGRU with the same features.

    python benchmarks/audio_speech.py --data data/speech --jobs 2

Character error rates are of the greedy reading of the manifest's test part, no language model; a
tenth of the training texts chooses the epoch. "joint" is one model for both languages, scored on
each. Each fit is a line of results/audio_speech.jsonl when it ends, and is not run again; the
summary is results/audio_speech.json, of the fits that are done. Keys of the recipe come after --.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import yaml
from _fits import arguments_of_runs, do_fits, parse_of_runs, train_into
from _record import write_record
from torchmetrics.functional.text import char_error_rate

import mamba2_apps
from mamba2_apps import catalog
from mamba2_apps.audio.manifest import read_table

BAR = 0.22
COLUMNS = {"path": "file", "text": "transcript"}
MODELS = ("mamba2", "joint", "bigru")
GRU_RECIPE = "bigru.yaml"
JOINT_EPOCHS = 60  # as many steps as one language has in its 100, and some more


def fit(
    key: str, data: Path, folder: Path, languages: list[str], overrides: list[str]
) -> dict[str, Any]:
    """Train one model on one language or on both; its error rates on the test clips."""
    model, language, seed = key.split(" | ")
    if model == "joint":
        part = ["--data.where=null", f"--trainer.max_epochs={JOINT_EPOCHS}"]
    else:
        part = [f"--data.where={{language: {language}}}"]
    words = [f"--data.source={data / 'manifest.csv'}", *part, f"--seed={seed}", *overrides]
    recipe = str(folder / GRU_RECIPE) if model == "bigru" else "audio/speech-ctc"
    run, metrics = train_into(folder, key, recipe, words)
    cer = error_rates(run, data, languages if language == "both" else [language])
    rates = ", ".join(f"{name} {rate:.4f}" for name, rate in cer.items())
    return {
        "model": model,
        "language": language,
        "seed": int(seed),
        "cer": cer,
        "val_cer": metrics["best_epoch"]["val/cer"],
        "epoch": metrics["best_epoch"]["epoch"],
        "parameters": metrics["parameters"],
        "train_seconds": metrics["seconds"],
        "summary": f"CER {rates}, {metrics['seconds']:.0f} s",
    }


def write_gru_recipe(folder: Path) -> None:
    """The recipe with the BiGRU in the place of its model."""
    recipe = yaml.safe_load(catalog.find("audio/speech-ctc").read_text(encoding="utf-8"))
    adapter = recipe["model"]["init_args"]["adapter"]
    model = {"class_path": "_bigru.BiGRU", "init_args": {"adapter": adapter}}
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({**recipe, "model": model})
    (folder / GRU_RECIPE).write_text(text, encoding="utf-8")


def main() -> None:
    options = parse()
    write_gru_recipe(options.runs)
    keys = [
        f"{model} | {language} | {seed}"
        for model in options.models
        for seed in options.seeds
        for language in (options.languages if model != "joint" else ["both"])
    ]
    todo = (options.data, options.runs, options.languages, options.overrides)
    done = do_fits(options.fits, keys, fit, *todo, jobs=options.jobs, minutes=options.minutes)
    rows = [done[key] for key in keys if key in done]
    table: dict[str, Any] = {}
    for model in options.models:
        for language in options.languages:
            found = [row for row in rows if row["model"] == model and language in row["cer"]]
            if not found:
                continue
            table[f"{model} {language}"] = {
                "seeds": [row["seed"] for row in found],
                "mean_cer": statistics.mean(row["cer"][language] for row in found),
                "cer": [row["cer"][language] for row in found],
                "longest_seconds": max(row["train_seconds"] for row in found),
                "parameters": found[0]["parameters"],
            }
    results = {"bar": BAR, "table": table, "fits": rows}
    write_record(options.name, ("torch", "triton", "lightning"), results)
    for name, row in table.items():
        cer, seeds = f"{row['mean_cer']:.4f} (bar {BAR})", len(row["seeds"])
        print(f"{name}: CER {cer}, seeds: {seeds}, {row['longest_seconds']:.0f} s")


def error_rates(run: Path, data: Path, languages: list[str]) -> dict[str, float]:
    """Character error rate of a RUN on the test clips of each language."""
    predictor = mamba2_apps.load(run)
    rates = {}
    for language in languages:
        where = {"language": language, "split": "test"}
        clips = read_table(data / "manifest.csv", "text", columns=COLUMNS, where=where)
        answers = predictor.predict([clip.path for clip in clips])
        texts = [answer["text"] for answer in answers]
        rates[language] = char_error_rate(texts, [clip.text or "" for clip in clips]).item()
    return rates


def parse() -> argparse.Namespace:
    parser = arguments_of_runs("audio_speech", __doc__, "runs/audio-speech")
    parser.add_argument("--data", type=Path, default=Path("data/speech"))
    parser.add_argument("--languages", nargs="+", default=["ru", "es"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    return parse_of_runs(parser)


if __name__ == "__main__":
    main()
