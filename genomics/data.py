"""Data sets of labelled sequences: a table, Genomic Benchmarks' folders, and what they share.

Every split keeps identical and similar sequences in one part, and a report of what leaks all the
same lies in each RUN.

Dimensions: seqlen l (tokens) · labels k
"""

import csv
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler
from torch import nn
from torch.utils.data import Dataset

from mamba2_apps.data import DataModule, Sample, UnreadableInput, check_unique
from mamba2_apps.files import write_json
from mamba2_apps.genomics.preprocessing import DNAPreprocessing, check_tokens
from mamba2_apps.genomics.sequences import check_sequence, reverse_complement
from mamba2_apps.genomics.splits import (
    PARTS,
    assign_groups,
    identical_groups,
    sequence_leakage,
    similar_groups,
)
from mamba2_apps.genomics.text_files import read_lines
from mamba2_apps.genomics.tokenizers import (
    Tokenizer,
    TokenizerOptions,
    build_tokenizer,
    resolved_options,
)


class Labelled(NamedTuple):
    """Sequences with their targets, and the part of the data that each is of, where that is given.

    targets: (n,) int64 class indices, or (n, k) float32 labels or values.
    """

    sequences: list[str]
    targets: np.ndarray
    parts: list[str] | None = None


@dataclass(kw_only=True)
class SplitConfig:
    """How sequences are split where the data do not say.

    Args:
        keep_together: sequences that share words (similar), or are equal on either strand
            (identical).
        shares: of training, validation and test.
        kmer: length of the words that similarity counts.
        similarity: share of words in common (Jaccard) from which sequences count as similar.
    """

    keep_together: Literal["similar", "identical"] = "similar"
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    kmer: int = 12
    similarity: float = 0.5

    def groups(self, sequences: Sequence[str]) -> np.ndarray:
        """Group (n,) of each sequence; a group goes into one part."""
        if self.keep_together == "identical":
            return identical_groups(sequences)
        return similar_groups(sequences, k=self.kmer, similarity=self.similarity)


class EncodedSequences(Dataset[Sample]):
    """Labelled sequences with their token ids, in memory."""

    def __init__(self, sequences: Sequence[str], targets: np.ndarray, encode: Any) -> None:
        self.sequences = list(sequences)
        self.ids = [encode(sequence) for sequence in sequences]
        self.targets = torch.from_numpy(targets)

    def __getitem__(self, index: int) -> Sample:
        return {
            "sequence": self.sequences[index],  # of which the other strand is made
            "inputs": self.ids[index],
            "targets": self.targets[index],
        }

    def __len__(self) -> int:
        return len(self.ids)


class LabelledSequences(DataModule):
    """One target per sequence; a subclass reads the sequences.

    Args:
        batch_size: sequences per step.
        num_workers: processes that augment; 0 does it in the training process.
        balanced: draw every class equally often while training, with replacement.
        tokenizer: `kind` (base, kmer, bpe) and its options, of bpe the `path` of its file.
        reverse_complement: chance that a training sequence is given as its other strand, for labels
            that mean the same on both.
        mutation: share of a training sequence's bases that are drawn anew.
        split: how sequences are split where the data do not say.
    """

    length: int | None = None

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        balanced: bool = False,
        tokenizer: TokenizerOptions | None = None,
        reverse_complement: float = 0.0,
        mutation: float = 0.0,
        split: SplitConfig | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, balanced=balanced)
        for name, value in (("reverse_complement", reverse_complement), ("mutation", mutation)):
            if not 0 <= value <= 1:
                raise ValueError(f"data.{name} is {value}, expected 0 to 1")
        self.tokenizer = resolved_options(tokenizer or {"kind": "base"})
        if mutation and self.tokenizer.get("kind") != "base":
            raise ValueError(f"data.mutation is {mutation}, which needs base tokens")
        self.reverse_complement, self.mutation = reverse_complement, mutation
        self.split = split or SplitConfig()

    @abstractmethod
    def read(self) -> Labelled:
        """Read the sequences, and set `labels`."""

    @cached_property
    def tokens(self) -> Tokenizer:
        return build_tokenizer(self.tokenizer)

    @property
    def preprocessing(self) -> DNAPreprocessing:
        return DNAPreprocessing(tokenizer=self.tokenizer, length=self.length)

    def prepare_model(self, model: nn.Module) -> None:
        check_tokens(self.preprocessing, model)

    def setup(self, stage: str) -> None:
        data = self.read()
        indices = self.split_parts(data)
        encode = self.tokens.encode
        self.parts = {
            name: ([data.sequences[i] for i in part], data.targets[part])
            for name, part in zip(PARTS, indices, strict=True)
        }
        empty = [name for name, (sequences, _) in self.parts.items() if not sequences]
        if empty:
            raise ValueError(f"the data leave no sequences for {' and '.join(empty)}")
        self.train_set, self.val_set, self.test_set = (
            EncodedSequences(*self.parts[name], encode) for name in PARTS
        )

    def split_parts(self, data: Labelled) -> list[np.ndarray]:
        """Indices of training, validation and test sequences.

        Where the data name a test part but none for validation, that comes from the training part.
        """
        labels = data.targets if data.targets.ndim == 1 else None
        groups = self.split.groups(data.sequences)
        if data.parts is None:
            return assign_groups(groups, self.split.shares, labels)
        part = np.array(data.parts)
        train, val, test = (np.flatnonzero(part == name) for name in PARTS)
        if not len(val):
            train_share, val_share, _ = self.split.shares
            rest = train_share + val_share
            shares = (train_share / rest, val_share / rest, 0.0)
            kept, held, _ = assign_groups(
                groups[train], shares, None if labels is None else labels[train]
            )
            train, val = train[kept], train[held]
        return [train, val, test]

    def class_of_samples(self) -> np.ndarray:
        targets = self.parts["train"][1]
        return targets if targets.ndim == 1 else super().class_of_samples()

    def augment(self, sample: Sample) -> Sample:
        sample = dict(sample)
        ids, sequence = sample["inputs"], sample.pop("sequence")
        if self.reverse_complement and torch.rand(()) < self.reverse_complement:
            # The text is turned and not the tokens: byte pairs are others on the other strand.
            ids = self.tokens.encode(reverse_complement(sequence))
        if self.mutation:
            drawn = torch.randint(0, 4, ids.shape)
            ids = torch.where(torch.rand(ids.shape) < self.mutation, drawn, ids)
        return {**sample, "inputs": ids}

    def leakage(self) -> dict[str, Any]:
        """How many held-out sequences are like one of training."""
        sequences = {name: part[0] for name, part in self.parts.items()}
        return sequence_leakage(sequences, k=self.split.kmer, similarity=self.split.similarity)

    def report(self, task: Any, folder: Path) -> None:
        write_json(folder / "leakage.json", self.leakage())

    def baselines(self) -> dict[str, dict[str, float]]:
        """Logistic regression on counts of 5-mers, where there is one class per sequence."""
        if self.parts["train"][1].ndim > 1:
            return {}
        words = CountVectorizer(analyzer="char", ngram_range=(5, 5), lowercase=False)
        model = make_pipeline(words, MaxAbsScaler(), LogisticRegression(max_iter=1000))
        return {
            "5-mer logistic regression": scores_of(model, self.parts["train"], self.parts["test"])
        }


class SequenceTable(LabelledSequences):
    """A CSV or TSV file with a column of sequences and columns of labels or values.

    Args:
        path: the file, plain or gzip.
        sequence: name of the column with sequences.
        targets: names of the columns with answers. One column of names is classes; several columns
            are labels of 0 and 1 (`multilabel`) or numbers (`values`).
        kind: classes, multilabel or values.
        part: name of a column that holds train, val or test; null: split by similarity.
        batch_size: sequences per step.
        num_workers: processes that augment; 0 does it in the training process.
        balanced: draw every class equally often while training, with replacement.
        tokenizer: `kind` (base, kmer, bpe) and its options, of bpe the `path` of its file.
        reverse_complement: chance that a training sequence is given as its other strand, for labels
            that mean the same on both.
        mutation: share of a training sequence's bases that are drawn anew.
        split: how sequences are split where the data do not say.
    """

    def __init__(
        self,
        path: str,
        *,
        sequence: str = "sequence",
        targets: list[str],
        kind: Literal["classes", "multilabel", "values"] = "classes",
        part: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        balanced: bool = False,
        tokenizer: TokenizerOptions | None = None,
        reverse_complement: float = 0.0,
        mutation: float = 0.0,
        split: SplitConfig | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            balanced=balanced,
            tokenizer=tokenizer,
            reverse_complement=reverse_complement,
            mutation=mutation,
            split=split,
        )
        if not targets or (kind == "classes" and len(targets) != 1):
            raise ValueError(f"data.targets is {targets}; classes are in one column, others in any")
        check_unique(targets, "data.targets")
        self.path, self.sequence, self.kind, self.part = path, sequence, kind, part
        self.target_columns = targets

    def read(self) -> Labelled:
        rows = read_table(
            self.path, [self.sequence, *self.target_columns, *filter(None, [self.part])]
        )
        sequences, answers, parts = [], [], []
        for where, row in rows:
            sequences.append(_letters(row[self.sequence], where))
            answers.append([row[name] for name in self.target_columns])
            if self.kind == "classes" and not answers[-1][0].strip():
                raise UnreadableInput(
                    f"{where}: {self.target_columns[0]} is empty, expected a class"
                )
            if self.part is not None:
                if row[self.part] not in PARTS:
                    raise UnreadableInput(
                        f"{where}: {self.part} is {row[self.part]!r}, expected train, val or test"
                    )
                parts.append(row[self.part])
        if self.kind == "classes":
            names = [answer[0] for answer in answers]
            self.labels = sorted(set(names))
            targets = np.array([self.labels.index(name) for name in names])
        else:
            self.labels = self.target_columns
            targets = _numbers(answers, rows, self.target_columns, self.kind == "multilabel")
        return Labelled(sequences, targets, parts or None)


class GenomicBenchmarks(LabelledSequences):
    """A data set of Genomic Benchmarks (Grešová et al. 2023): folders train/CLASS and test/CLASS.

    Each holds a text file per sequence; validation is taken from the training part.

    Args:
        path: the folder of one data set, such as human_nontata_promoters.
        batch_size: sequences per step.
        num_workers: processes that augment; 0 does it in the training process.
        balanced: draw every class equally often while training, with replacement.
        tokenizer: `kind` (base, kmer, bpe) and its options, of bpe the `path` of its file.
        reverse_complement: chance that a training sequence is given as its other strand, for labels
            that mean the same on both.
        mutation: share of a training sequence's bases that are drawn anew.
        split: how sequences are split where the data do not say.
    """

    def __init__(
        self,
        path: str,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        balanced: bool = False,
        tokenizer: TokenizerOptions | None = None,
        reverse_complement: float = 0.5,
        mutation: float = 0.0,
        split: SplitConfig | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            balanced=balanced,
            tokenizer=tokenizer,
            reverse_complement=reverse_complement,
            mutation=mutation,
            split=split,
        )
        self.path = path

    def read(self) -> Labelled:
        root = Path(self.path)
        for part in ("train", "test"):
            if not (root / part).is_dir():
                raise ValueError(
                    f"{root} has no folder {part}; expected train/CLASS/*.txt and "
                    "test/CLASS/*.txt, as the genomic-benchmarks package writes them"
                )
        self.labels = sorted(p.name for p in (root / "train").iterdir() if p.is_dir())
        sequences, targets, parts = [], [], []
        for part in ("train", "test"):
            for index, label in enumerate(self.labels):
                for path in sorted((root / part / label).glob("*.txt")):
                    text = path.read_text(encoding="utf-8-sig")
                    sequences.append(_letters(text, str(path)))
                    targets.append(index)
                    parts.append(part)
        if not sequences:
            raise ValueError(f"{root} holds no .txt files under train/CLASS and test/CLASS")
        return Labelled(sequences, np.array(targets), parts)


def read_table(path: str, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Place (`file:line`) and cells of each row of a CSV or TSV file, which has these columns.

    Raises UnreadableInput for a missing column, or a row with too few cells.
    """
    lines = list(read_lines(path))
    delimiter = "\t" if ".tsv" in Path(path).name.lower() else ","
    rows = list(csv.reader((line for _, line in lines), delimiter=delimiter))
    header = rows[0] if rows else []
    missing = [name for name in columns if name not in header]
    if missing:
        raise UnreadableInput(f"{path}:1: no column {missing[0]!r}; it has {', '.join(header)}")
    found = []
    for (number, _), row in zip(lines[1:], rows[1:], strict=False):
        if not row:
            continue
        if len(row) != len(header):
            raise UnreadableInput(f"{path}:{number}: {len(row)} cells, expected {len(header)}")
        found.append((f"{path}:{number}", dict(zip(header, row, strict=True))))
    if not found:
        raise UnreadableInput(f"{path} has no rows below its header")
    return found


def _letters(text: str, where: str) -> str:
    """The sequence of a cell or file. Raises UnreadableInput where it is none."""
    sequence = check_sequence(text.strip(), where)
    if not sequence:
        raise UnreadableInput(f"{where}: the sequence is empty")
    return sequence


def _numbers(
    answers: list[list[str]],
    rows: list[tuple[str, dict[str, str]]],
    columns: list[str],
    binary: bool,
) -> np.ndarray:
    """(n, k) float32; an empty value is NaN."""
    values = np.empty((len(answers), len(columns)), np.float32)
    for i, (answer, (where, _)) in enumerate(zip(answers, rows, strict=True)):
        for j, text in enumerate(answer):
            try:
                values[i, j] = float(text) if text or binary else np.nan
            except ValueError:
                raise UnreadableInput(
                    f"{where}: {columns[j]} is {text!r}, expected a number"
                ) from None
            if binary and values[i, j] not in (0, 1):
                raise UnreadableInput(f"{where}: {columns[j]} is {text!r}, expected 0 or 1")
    return values


def scores_of(
    model: Any, train: tuple[Sequence[str], np.ndarray], test: tuple[Sequence[str], np.ndarray]
) -> dict[str, float]:
    """Test accuracy and macro F1 of a scikit-learn model of sequences."""
    model.fit(train[0], train[1])
    guess = model.predict(test[0])
    return {
        "accuracy": float(accuracy_score(test[1], guess)),
        "macro_f1": float(f1_score(test[1], guess, average="macro")),
    }


def one_hot(sequences: Sequence[str]) -> np.ndarray:
    """(n, 4 l) float32 of sequences of one length; another letter than A, C, G, T is all 0."""
    letters = np.array([list(s.upper().encode()) for s in sequences], dtype=np.uint8)
    bases = np.frombuffer(b"ACGT", np.uint8)
    return (letters[..., None] == bases).reshape(len(letters), -1).astype(np.float32)
