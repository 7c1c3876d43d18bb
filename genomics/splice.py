"""Primate splice junctions (UCI): real DNA that comes with the package."""

from importlib.resources import as_file, files
from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import SVC

from mamba2_apps.genomics.data import (
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
    is the test set; a part of the other nine, split in the same way, chooses the epoch. The other
    strand of a site is no site, so sequences are never turned.

    Args:
        batch_size: sequences per step.
        num_workers: processes that augment; 0 does it in the training process.
        balanced: draw every class equally often while training, with replacement.
        mutation: share of a training sequence's bases that are drawn anew.
        fold: which of the ten folds is the test set, 0 to 9.
        val_folds: into how many parts the other nine folds are split, one of which chooses the
            epoch.
    """

    length = 60

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        balanced: bool = False,
        mutation: float = 0.0,
        fold: int = 0,
        val_folds: int = 10,
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
        if val_folds < 2:
            raise ValueError(f"data.val_folds is {val_folds}, expected at least 2")
        self.fold, self.val_folds = fold, val_folds
        self.labels = list(LABELS.values())

    def read(self) -> Labelled:
        with as_file(files("mamba2_apps.genomics") / "samples/splice.csv.gz") as path:
            rows = [row for _, row in read_table(str(path), ["label", "sequence"])]
        targets = np.array([list(LABELS).index(row["label"]) for row in rows])
        return Labelled([row["sequence"] for row in rows], targets)

    def split_parts(self, data: Labelled) -> list[np.ndarray]:
        groups = mismatch_groups(data.sequences, MISMATCHES)
        fit, test = _fold(np.arange(len(groups)), data.targets, groups, 10, self.fold)
        train, val = _fold(fit, data.targets, groups, self.val_folds, 0)
        return [train, val, test]

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


def _fold(
    indices: np.ndarray, targets: np.ndarray, groups: np.ndarray, folds: int, fold: int
) -> tuple[np.ndarray, np.ndarray]:
    """`indices` without and with fold number `fold` of so many."""
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    splits = list(splitter.split(indices, targets[indices], groups[indices]))
    kept, held = splits[fold]
    return indices[kept], indices[held]
