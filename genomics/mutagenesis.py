"""In-silico mutagenesis: what every single substitution would change, and a picture of it.

Dimensions: batch b · seqlen l
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mamba2_apps.files import replacing
from mamba2_apps.genomics.preprocessing import DNAPreprocessing
from mamba2_apps.genomics.sequences import BASES
from mamba2_apps.tasks import (
    Classification,
    MultiLabel,
    Regression,
    Task,
    TokenClassification,
    TokenMultiLabel,
    TrackRegression,
)

MOST_BASES = 5000
"""A picture of more would show nothing."""


@torch.inference_mode()
def mutagenesis_map(
    task: Task,
    ids: Tensor,
    *,
    output: int,
    position: int | None = None,
    start: int = 0,
    end: int | None = None,
    at_once: int = 64,
) -> np.ndarray:
    """Change of one output by each substitution, (end - start, 4) float32, 0 for the base itself.

    Args:
        task: a RUN's task, over base tokens.
        ids: (l,) base ids.
        output: index of the label; logits of classes, values of regression.
        position: token whose answer is meant, for models that answer for each base or bin.
        start: first base to change.
        end: the base after the last; None: all.
        at_once: sequences per batch.

    Raises ValueError where a position is missing, or not needed, or the task has no such outputs.
    """
    _check_position(task, position)
    end = len(ids) if end is None else end
    task.eval()

    def answers(batch: Tensor) -> Tensor:
        return _outputs(task, batch, position)[:, output].cpu()

    reference = answers(ids[None])
    places = [(at, base) for at in range(start, end) for base in range(4) if ids[at] != base]
    changes = np.zeros((end - start, 4), np.float32)
    for first in range(0, len(places), at_once):
        group = places[first : first + at_once]
        batch = ids.repeat(len(group), 1)
        for row, (at, base) in enumerate(group):
            batch[row, at] = base
        for (at, base), value in zip(group, (answers(batch) - reference).tolist(), strict=True):
            changes[at - start, base] = value
    return changes


def draw_map(
    changes: np.ndarray, sequence: str, title: str, path: str | Path, first: int = 1
) -> None:
    """Draw a map (l, 4): a column per base, a row per substitution, and the mean effect below.

    Args:
        changes: as `mutagenesis_map` gives them.
        sequence: the l bases; where there is room they are written, and their own cell is dotted.
        title: above the picture.
        path: PNG to write.
        first: number of the first base.
    """
    length = len(sequence)
    figure = Figure(figsize=(min(max(6, 0.16 * length), 30), 3.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    largest = float(np.abs(changes).max()) or 1.0
    image = top.imshow(
        changes.T, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="none"
    )
    figure.colorbar(image, ax=[top, bottom], label="change of the output", pad=0.01)
    own = [(i, BASES.index(c)) for i, c in enumerate(sequence.upper()) if c in BASES]
    if own:
        top.scatter(*zip(*own, strict=True), s=4, color="black", linewidths=0)
    top.set_yticks(range(4), list(BASES))
    top.set_title(title)
    # A base has three substitutions; what is none of the four has one more.
    mean = changes.sum(1) / np.array([3 if c in BASES else 4 for c in sequence.upper()])
    bottom.bar(range(length), mean, width=1.0, color="#4878a8")
    bottom.axhline(0, color="black", lw=0.5)
    bottom.set(ylabel="mean", xlabel="base")
    if length <= 200:
        labels = [
            f"{c}\n{first + i}" if (first + i) % 10 == 0 else c for i, c in enumerate(sequence)
        ]
        bottom.set_xticks(range(length), labels, fontsize=6)
    else:
        ticks = np.linspace(0, length - 1, 11).astype(int)
        bottom.set_xticks(ticks, [f"{first + i:,}" for i in ticks])
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def answerer(
    preprocessing: DNAPreprocessing, sources: Sequence[str], output: Path | None
) -> Callable[..., Iterator[dict[str, Any]]]:
    """What `mamba2-apps predict RUN SEQUENCE.fa --output MAP.png` does."""

    def answer(
        task: Task,
        *,
        label: str | None = None,
        position: int | None = None,
        first: int = 1,
        last: int | None = None,
        at_once: int = 64,
    ) -> Iterator[dict[str, Any]]:
        """Draw an in-silico mutagenesis map of one sequence.

        Args:
            task: a RUN's task.
            label: which output; the likeliest where it is not given.
            position: the base whose answer is meant, from 1, for models that answer for each base.
            first: first base to change, from 1.
            last: last base to change.
            at_once: sequences per batch.
        """
        assert output is not None
        items = [item for source in sources for item in preprocessing.find(source)]
        if len(items) != 1:
            raise ValueError(
                f"{len(items)} sequences; a picture shows one, give FILE#NAME, such as {items[0]}"
            )
        if preprocessing.tokenizer.get("kind") != "base":
            raise ValueError("substitutions of single bases need base tokens")
        ids = preprocessing(items[0])
        start, end = first - 1, len(ids) if last is None else last
        if not 0 <= start < end <= len(ids):
            raise ValueError(f"bases {first} to {end} are not within {items[0]}, of {len(ids)}")
        if end - start > MOST_BASES:
            raise ValueError(
                f"{end - start:,} bases; a picture shows {MOST_BASES:,} at most, give --first and "
                "--last"
            )
        if position is not None and not 1 <= position <= len(ids):
            raise ValueError(f"--position is {position}, expected 1 to {len(ids)}")
        if label is not None and label not in task.labels:
            raise ValueError(f"--label is {label!r}, expected one of {', '.join(task.labels)}")
        at = None if position is None else position - 1
        _check_position(task, at)
        index = _likeliest(task, ids, at) if label is None else task.labels.index(label)
        changes = mutagenesis_map(
            task, ids, output=index, position=at, start=start, end=end, at_once=at_once
        )
        letters = preprocessing.tokens.decode(ids[start:end])
        name = Path(items[0]).name
        draw_map(changes, letters, f"{name}: {task.labels[index]}", output, first)
        yield from ()

    return answer


def _check_position(task: Task, position: int | None) -> None:
    """Raises ValueError where a position is missing, or not needed, or the task has no labels."""
    along = isinstance(task, TokenClassification | TokenMultiLabel | TrackRegression)
    if not along and not isinstance(task, Classification | MultiLabel | Regression):
        raise ValueError(f"a RUN of {type(task).__name__} has no labels, whose change a map shows")
    if along != (position is not None):
        raise ValueError(
            "this model answers for each base: say which one's answer is meant (position)"
            if along
            else "this model answers once for a sequence: leave out position"
        )


def _outputs(task: Task, ids: Tensor, position: int | None) -> Tensor:
    """Logits, or values of regression, (b, k): of inputs, or of the base or bin at a position."""
    outputs = task.model(ids.to(task.device)).float()
    if isinstance(task, Regression):
        outputs = task.values(outputs)
    bin_size = getattr(task.model.head, "bin_size", 1)  # type: ignore[union-attr]
    return outputs if position is None else outputs[:, position // bin_size]


@torch.inference_mode()
def _likeliest(task: Task, ids: Tensor, position: int | None) -> int:
    return int(_outputs(task, ids[None], position)[0].argmax())
