"""Primate splice junctions (UCI): real DNA that comes with the package."""

from functools import cache
from importlib.resources import as_file, files
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import SVC

from mamba2_apps.data import Sample
from mamba2_apps.genomics.data import (
    EncodedSequences,
    Labelled,
    LabelledSequences,
    SplitConfig,
    one_hot,
    read_table,
    scores_of,
)
from mamba2_apps.genomics.splits import mismatch_groups

LABELS = {"n": "neither", "ei": "donor", "ie": "acceptor"}
MISMATCHES = 6
"""Sequences that differ at so many of their 60 bases, or fewer, are in one fold."""


class Splice(LabelledSequences):
    """3,186 windows of 60 bases: is their middle a donor site, an acceptor site, or neither?

    Ten folds, stratified, with similar sequences together; they do not depend on the seed. One fold
    is the test set, half of the next one is for validation. The other strand of a site is no site,
    so sequences are never turned.

    The windows are aligned, and what tells a site lies mostly at its middle: that is what the two
    augmentations keep. They draw from the training part alone.

    Args:
        batch_size: sequences per step.
        num_workers: processes that augment; 0 does it in the training process.
        balanced: draw every class equally often while training, with replacement.
        mutation: share of a training sequence's bases that are drawn anew.
        flank_mutation: the same share at both ends; it falls linearly to 0 in the middle.
        recombination: chance that a training sequence takes what is left or right of a random place
            from another one of its class.
        fold: which of the ten folds is the test set, 0 to 9.
    """

    length = 60

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        balanced: bool = False,
        mutation: float = 0.0,
        flank_mutation: float = 0.0,
        recombination: float = 0.0,
        fold: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            balanced=balanced,
            mutation=mutation,
            split=SplitConfig(kmer=8, similarity=0.5),
        )
        if not 0 <= fold < 10:
            raise ValueError(f"data.fold is {fold}, expected 0 to 9")
        for name, value in (("flank_mutation", flank_mutation), ("recombination", recombination)):
            if not 0 <= value <= 1:
                raise ValueError(f"data.{name} is {value}, expected 0 to 1")
        self.flank_mutation, self.recombination = flank_mutation, recombination
        self.fold = fold
        self.labels = list(LABELS.values())

    def read(self) -> Labelled:
        return _shipped()[0]

    def split_parts(self, data: Labelled) -> list[np.ndarray]:
        halves = _shipped()[1]
        test, val = halves // 2 == self.fold, halves == (2 * self.fold + 2) % 20
        return [np.flatnonzero(part) for part in (~test & ~val, val, test)]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        classes = self.class_of_samples()
        self._of_class = [np.flatnonzero(classes == k) for k in range(len(self.labels))]

    def augment(self, sample: Sample) -> Sample:
        sample = super().augment(sample)
        ids = sample["inputs"]
        place = torch.arange(len(ids))
        if self.recombination and torch.rand(()) < self.recombination:
            cut, on_the_left = torch.randint(1, len(ids), ()), torch.rand(()) < 0.5
            other = self._another_of_class(int(sample["targets"]))
            ids = torch.where((place < cut) == on_the_left, other, ids)
        if self.flank_mutation:
            from_middle = (2 * place / (len(ids) - 1) - 1).abs()
            drawn = torch.randint(0, 4, ids.shape)
            ids = torch.where(torch.rand(ids.shape) < self.flank_mutation * from_middle, drawn, ids)
        return {**sample, "inputs": ids}

    def _another_of_class(self, label: int) -> torch.Tensor:
        """Ids (l,) of a random training sequence."""
        assert isinstance(self.train_set, EncodedSequences)
        alike = self._of_class[label]
        return self.train_set.ids[alike[int(torch.randint(len(alike), ()))]]

    def baselines(self) -> dict[str, dict[str, float]]:
        """On one-hot bases, trained on all nine folds."""
        fit = [self.parts[name] for name in ("train", "val")]
        sequences = [s for part, _ in fit for s in part]
        targets = np.concatenate([targets for _, targets in fit])
        return {
            name: scores_of(_on_one_hot(model), (sequences, targets), self.parts["test"])
            for name, model in baseline_models().items()
        }


def baseline_models() -> dict[str, Any]:
    """The models to beat, by name; their options are those that the field's facts name."""
    return {
        "RBF-SVM": SVC(C=3),
        "500-tree forest": RandomForestClassifier(500, random_state=0),
        "logistic regression": LogisticRegression(C=0.1, max_iter=2000),
    }


def _on_one_hot(model: Any) -> Any:
    return make_pipeline(FunctionTransformer(one_hot), model)


@cache
def _shipped() -> tuple[Labelled, np.ndarray]:
    """The sequences, and which half of a fold, 0 to 19, each is in."""
    with as_file(files("mamba2_apps.genomics") / "samples/splice.csv.gz") as path:
        rows = [row for _, row in read_table(str(path), ["label", "sequence"])]
    sequences = [row["sequence"] for row in rows]
    targets = np.array([list(LABELS).index(row["label"]) for row in rows])
    groups = mismatch_groups(sequences, MISMATCHES)
    halves = np.empty(len(rows), np.int64)
    splitter = StratifiedGroupKFold(20, shuffle=True, random_state=0)
    for half, (_, held) in enumerate(splitter.split(sequences, targets, groups)):
        halves[held] = half
    return Labelled(sequences, targets), halves
