"""Pictures and tables of a RUN, for people."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mamba2_apps.files import replacing, write_text

TRAIN_COLOR, VAL_COLOR, BEST_COLOR = "#4878a8", "#c8553d", "#666666"


def learning_curves(history: Sequence[dict[str, Any]], best_epoch: int | None, path: Path) -> None:
    """Draw every metric that training and validation share over the epochs, loss first."""
    names = [key.removeprefix("val/") for key in history[-1] if key.startswith("val/")]
    names.sort(key=lambda name: (name != "loss", name))
    figure = Figure(figsize=(4.6 * len(names), 3.6), layout="constrained")
    for axis, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        for part, color in (("train", TRAIN_COLOR), ("val", VAL_COLOR)):
            known = [row for row in history if f"{part}/{name}" in row]
            epochs = [row["epoch"] for row in known]
            values = [row[f"{part}/{name}"] for row in known]
            label = {"train": "training", "val": "validation"}[part]
            axis.plot(
                epochs, values, color=color, label=label, marker="." if len(epochs) < 3 else ""
            )
        if best_epoch is not None:
            axis.axvline(best_epoch, color=BEST_COLOR, ls=":", label=f"chosen epoch {best_epoch}")
        axis.set(title=name.replace("_", " ").replace("f1", "F1"), xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    _save(figure, path)


def confusion_matrix(counts: np.ndarray, labels: Sequence[str], path: Path) -> None:
    """Draw counts (k, k), rows the true and columns the predicted class.

    Shades are shares of each row; counts are written where they can be read (k up to 30).
    """
    classes = len(labels)
    size = min(max(3.6, 0.42 * classes + 1.8), 24)
    figure = Figure(figsize=(size, size), layout="constrained")
    axis = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if classes <= 30:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                axis.text(
                    column, row, str(count), ha="center", va="center", color=color, fontsize=8
                )
    long_names = max(map(len, labels)) > 3
    axis.set_xticks(range(classes), labels, rotation=90 if long_names else 0)
    axis.set_yticks(range(classes), labels)
    correct = np.trace(counts) / max(counts.sum(), 1)
    axis.set(
        xlabel="predicted",
        ylabel="true",
        title=f"{np.trace(counts)} of {counts.sum()} correct ({correct:.1%})",
    )
    _save(figure, path)


def class_table(counts: np.ndarray, labels: Sequence[str], path: Path) -> None:
    """Write a CSV of each class: how many there are, recall (its accuracy), precision and F1.

    Args:
        counts: (k, k), rows the true and columns the predicted class.
        labels: the k names.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", "count", "recall", "precision", "f1"])
    for index, label in enumerate(labels):
        right, true, given = counts[index, index], counts[index].sum(), counts[:, index].sum()
        scores = [right / max(true, 1), right / max(given, 1), 2 * right / max(true + given, 1)]
        writer.writerow([label, true, *(f"{score:.6g}" for score in scores)])
    write_text(path, text.getvalue())


def comparison_table(ours: dict[str, float], baselines: dict[str, dict[str, float]]) -> str:
    """Lines of a table: a row per model, a column per metric that all of them have."""
    rows = {"this model": ours, **baselines}
    metrics = [name for name in ours if all(name in row for row in rows.values())]
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"  {name:>10}" for name in metrics)]
    for model, row in rows.items():
        lines.append(f"{model:<{width}}" + "".join(f"  {row[name]:>10.4f}" for name in metrics))
    return "\n".join(lines)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
