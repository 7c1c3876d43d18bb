"""What people look at, and listen to, after a test: mistakes with players, events under a
spectrogram.
"""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mamba2_apps.audio.features import Features
from mamba2_apps.audio.tasks import EventDetection
from mamba2_apps.files import replacing, write_text
from mamba2_apps.tasks import CTC, Classification

MISTAKES, EVENTS = "mistakes.html", "events.png"
MOST_MISTAKES, MOST_PICTURES, MOST_SECONDS = 50, 4, 20.0
TRUE_COLOR, GIVEN_COLOR = "#4878a8", "#c8553d"
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% }
td, th { padding: .4rem .6rem; text-align: left; border-bottom: 1px solid #ddd }
audio { height: 2rem } .path { color: #666; font-size: 12px; word-break: break-all }
"""


def draw(task: Any, data: Any, folder: Path) -> None:
    """Write the page and the picture that a task has into a RUN.

    Args:
        task: just tested.
        data: its AudioData.
        folder: of the RUN.
    """
    if isinstance(task, Classification):
        rows = wrong_classes(task, data)
        write_text(folder / MISTAKES, mistakes_page(rows, data, len(data.test_set)))
    elif isinstance(task, CTC):
        rows = wrong_texts(task, data)
        write_text(folder / MISTAKES, mistakes_page(rows, data, len(data.test_set)))
    elif isinstance(task, EventDetection):
        draw_events(task, data, folder / EVENTS)


def wrong_classes(task: Classification, data: Any) -> list[dict[str, Any]]:
    """Test clips of which the class was not found, the surest mistakes first."""
    shares = task.test_outputs().softmax(-1)
    rows = []
    for index, share in enumerate(shares):
        truth = int(data.test_set[index]["targets"])
        given = int(share.argmax())
        if given != truth:
            rows.append(
                {
                    "index": index,
                    "true": data.labels[truth],
                    "given": data.labels[given],
                    "score": float(share[given]),
                }
            )
    return sorted(rows, key=lambda row: -row["score"])


def wrong_texts(task: CTC, data: Any) -> list[dict[str, Any]]:
    """Test clips of which the text was not found, by their error rate."""
    from torchaudio.functional import edit_distance

    rows = []
    for index, clip in enumerate(data.test_set.clips):
        given = answer_of(task, data, index)["text"]
        errors = edit_distance(list(given), list(clip.text))
        if errors:
            score = errors / max(1, len(clip.text))
            rows.append({"index": index, "true": clip.text, "given": given, "score": score})
    return sorted(rows, key=lambda row: -row["score"])


@torch.inference_mode()
def answer_of(task: Any, data: Any, index: int) -> dict[str, Any]:
    """The task's answer to one test clip."""
    batch = data.preprocessing.collate([data.test_set[index]])
    batch = {key: value.to(task.device) for key, value in batch.items()}
    return task.eval().predictions(task(batch), batch)[0]


def mistakes_page(rows: Sequence[dict[str, Any]], data: Any, total: int) -> str:
    """HTML in one file: the mistakes, each with a player of what the model heard."""
    lines = []
    for row in rows[:MOST_MISTAKES]:
        clip = data.test_set.clips[row["index"]]
        sound = player(data.test_set.samples(row["index"]), data.sample_rate)
        cells = [
            f"<audio controls src='{sound}'></audio><div class=path>{html.escape(clip.name)}</div>",
            html.escape(row["true"]),
            html.escape(row["given"]),
            f"{row['score']:.2f}",
        ]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    shown = f", the first {MOST_MISTAKES} of them here" if len(rows) > MOST_MISTAKES else ""
    score = "error rate" if data.targets == "text" else "probability"
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Mistakes</title>"
        f"<style>{STYLE}</style><h1>Mistakes</h1>"
        f"<p>{len(rows)} of {total} test clips{shown}.</p>"
        f"<table><tr><th>clip</th><th>true</th><th>given</th><th>{score}</th></tr>"
        + "\n".join(lines)
        + "</table></html>\n"
    )


def player(samples: Tensor, rate: int) -> str:
    """A data URL of the first seconds of a clip, 16-bit FLAC."""
    samples = samples[: round(MOST_SECONDS * rate)]
    peak = max(1.0, float(samples.abs().max()))
    file = io.BytesIO()
    soundfile.write(file, (samples / peak).numpy(), rate, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(file.getvalue()).decode()


def draw_events(task: EventDetection, data: Any, path: Path) -> None:
    """Spectrograms of the first test clips, with their true and their found events under them."""
    count = min(MOST_PICTURES, len(data.test_set))
    figure = Figure(figsize=(9, 3.2 * count), layout="constrained")
    for index, part in enumerate(figure.subfigures(count, 1, squeeze=False)[:, 0]):
        clip = data.test_set.clips[index]
        found = answer_of(task, data, index)["events"]
        true = [event._asdict() for event in clip.events]
        events_figure(
            part, data.test_set.samples(index), data.sample_rate, data.labels, true, found
        )
        part.suptitle(Path(clip.path).name, fontsize=9)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


@torch.no_grad()
def events_figure(
    figure: Any,
    samples: Tensor,
    rate: int,
    labels: Sequence[str],
    true: Sequence[dict[str, Any]],
    found: Sequence[dict[str, Any]],
) -> None:
    """Draw a spectrogram of (n,) samples and, under it, a row for each label.

    Args:
        figure: of matplotlib.
        samples: the sound.
        rate: its samples per second.
        labels: names of the rows.
        true: events with "start", "end" in seconds and "label".
        found: the same, of the model.
    """
    features = Features(rate, kind="logmel", num_mels=64)
    energies = features.log_energies(samples[None])[0].T.numpy()
    seconds = len(samples) / rate
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 0.6 + 0.4 * len(labels)])
    above.imshow(
        energies, origin="lower", aspect="auto", extent=(0, seconds, 0, 64), cmap="magma",
        vmin=np.quantile(energies, 0.05),
    )  # fmt: skip
    above.set(ylabel="mel bin")
    for events, color, place in ((true, TRUE_COLOR, 0.22), (found, GIVEN_COLOR, -0.22)):
        for event in events:
            row = labels.index(event["label"])
            below.barh(
                row + place, event["end"] - event["start"], left=event["start"], height=0.36,
                color=color,
            )  # fmt: skip
    below.set_yticks(range(len(labels)), labels)
    below.set(xlabel="seconds: above what is true, below what was found", xlim=(0, seconds))
    below.set_ylim(-0.6, len(labels) - 0.4)
