"""Use a trained RUN from Python; the command line uses the same."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mamba2_apps import runs
from mamba2_apps.data import Preprocessing, UnreadableInput
from mamba2_apps.tasks import Task


def load(run: str | PathLike[str], device: str | torch.device | None = None) -> "Predictor":
    """Load a RUN for prediction.

    Args:
        run: the directory that `mamba2-apps train` wrote.
        device: where to compute; None picks a GPU where there is one.

    Raises:
        ValueError: a file of the RUN is missing or damaged (the message names it and the way out),
            or the device is not there.
    """
    run = Path(run)
    preprocessing = runs.read_preprocessing(run)
    task = runs.read_task(run, runs.read_recipe(run))
    return Predictor(task, preprocessing, device_of(device))


class Predictor:
    """A trained model with its preprocessing.

    Inputs are paths (a folder stands for the files in it) or what the domain's preprocessing takes
    besides, such as arrays. One input that cannot be read raises `UnreadableInput`, a ValueError,
    unless `on_error` is given: it is then called with the error, and the input is left out.
    """

    def __init__(self, task: Task, preprocessing: Preprocessing, device: torch.device) -> None:
        self.task = task.to(device).eval()
        self.preprocessing = preprocessing
        self.labels = task.labels
        self.device = device

    def predict(
        self,
        inputs: Any,
        *,
        batch_size: int = 64,
        on_error: Callable[[UnreadableInput], None] | None = None,
    ) -> list[dict[str, Any]]:
        """One dict per input, in order: "input" (its path or position) and the task's answer."""
        return list(self.iterate(inputs, batch_size=batch_size, on_error=on_error))

    def iterate(
        self,
        inputs: Any,
        *,
        batch_size: int = 64,
        on_error: Callable[[UnreadableInput], None] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """As `predict`, a batch at a time."""
        for names, batch in self._batches(inputs, batch_size, on_error):
            with torch.inference_mode():
                answers = self.task.predictions(self.task(batch), batch)
            for name, answer in zip(names, answers, strict=True):
                yield {"input": name, **answer}

    def embed(
        self,
        inputs: Any,
        *,
        batch_size: int = 64,
        on_error: Callable[[UnreadableInput], None] | None = None,
    ) -> np.ndarray:
        """One vector per input, (inputs, d_model) float32."""
        return self.embed_named(inputs, batch_size=batch_size, on_error=on_error)[1]

    def embed_named(
        self,
        inputs: Any,
        *,
        batch_size: int = 64,
        on_error: Callable[[UnreadableInput], None] | None = None,
    ) -> tuple[list[Any], np.ndarray]:
        """The inputs that could be read (path or position), and their vectors as `embed` does."""
        names, rows = [], []
        for group, batch in self._batches(inputs, batch_size, on_error):
            with torch.inference_mode():
                rows.append(self.task.embed(batch).float().cpu())
            names += group
        if not rows:
            raise ValueError("none of the inputs could be read; nothing to embed")
        return names, torch.cat(rows).numpy()

    def find(
        self, sources: Any, on_error: Callable[[UnreadableInput], None] | None = None
    ) -> list[Any]:
        """Every input that `sources` stand for. Raises ValueError for a path that holds none."""
        if isinstance(sources, str | PathLike):
            sources = [sources]
        found: list[Any] = []
        for source in sources:
            if not isinstance(source, str | PathLike):
                found.append(source)
                continue
            try:
                found.extend(self.preprocessing.find(fspath(source)))
            except UnreadableInput as error:  # a file of many inputs is read to find them
                if on_error is None:
                    raise
                on_error(error)
        return found

    def _batches(
        self, sources: Any, batch_size: int, on_error: Callable[[UnreadableInput], None] | None
    ) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        readable = self._readable(self.find(sources, on_error), on_error)
        while group := list(islice(readable, batch_size)):
            batch = self.preprocessing.collate([{"inputs": tensor} for _, tensor in group])
            batch = {key: value.to(self.device) for key, value in batch.items()}
            yield [name for name, _ in group], batch

    def _readable(
        self, items: Iterable[Any], on_error: Callable[[UnreadableInput], None] | None
    ) -> Iterator[tuple[Any, Tensor]]:
        for position, item in enumerate(items):
            try:
                tensor = self.preprocessing(item)
            except UnreadableInput as error:
                if on_error is None:
                    raise
                on_error(error)
                continue
            yield (item if isinstance(item, str) else position), tensor


def device_of(device: str | torch.device | None) -> torch.device:
    """The device of that name; None picks a GPU where there is one.

    Raises ValueError for what is no device, or a GPU where there is none.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, expected such as cpu or cuda:0") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}; this machine has {torch.cuda.device_count()} GPUs")
    return found
