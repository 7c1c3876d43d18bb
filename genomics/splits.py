"""Splits that keep what is alike together, and a report of what leaks all the same.

Sequences that are identical, on either strand, or similar belong into one part of the data: a model
would otherwise be tested on what it has seen. Similarity is the share of k-mers in common
(Jaccard), estimated by MinHash (Broder 1997) with locality-sensitive hashing, or, for windows of
one length, the number of mismatches, counted exactly.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from mamba2_apps.genomics.fasta import Genome
from mamba2_apps.genomics.intervals import Feature
from mamba2_apps.genomics.regions import Windows
from mamba2_apps.genomics.sequences import reverse_complement

PERMUTATIONS, ROWS = 96, 3
"""Hashes of a sketch, and how many of them a pair must share in one band to be compared."""

PARTS = ("train", "val", "test")


def identical_groups(sequences: Sequence[str]) -> np.ndarray:
    """Group number (n,) of each sequence; equal ones, on either strand, share it."""
    upper = [sequence.upper() for sequence in sequences]
    canonical = [min(sequence, reverse_complement(sequence)) for sequence in upper]
    return np.unique(canonical, return_inverse=True)[1]


def mismatch_groups(sequences: Sequence[str], most: int) -> np.ndarray:
    """Group number (n,) where sequences of one length within `most` mismatches are linked.

    Groups are connected components: their ends may be further apart. Exact, in time n².
    """
    lengths = {len(sequence) for sequence in sequences}
    if len(lengths) != 1:
        raise ValueError(f"sequences of lengths {sorted(lengths)[:5]}, expected one length")
    letters = np.array([list(s.upper().encode()) for s in sequences], dtype=np.uint8)
    # Matches are products of one-hot rows, which is many times faster than comparing letters.
    one_hot = (letters[..., None] == np.unique(letters)).reshape(len(letters), -1)
    one_hot = one_hot.astype(np.float32)
    pairs = []
    for start in range(0, len(letters), 1024):
        matches = one_hot[start : start + 1024] @ one_hot.T
        found = np.argwhere(letters.shape[1] - matches <= most)
        pairs.append(found + np.array([start, 0]))
    return _components(np.concatenate(pairs), len(sequences))


def similar_groups(sequences: Sequence[str], *, k: int = 12, similarity: float = 0.5) -> np.ndarray:
    """Group number (n,) where sequences that share `similarity` of their k-mers are linked.

    k-mers are taken on both strands; sequences shorter than k are compared as a whole.
    """
    groups = identical_groups(sequences)
    _, first = np.unique(groups, return_index=True)
    pairs = similar_pairs([sequences[i] for i in first], k=k, similarity=similarity)
    return _components(pairs, len(first))[groups]


def similar_pairs(
    sequences: Sequence[str],
    others: Sequence[str] | None = None,
    *,
    k: int = 12,
    similarity: float = 0.5,
) -> np.ndarray:
    """Pairs (m, 2) of similar sequences: within one list, or of one and the other.

    Estimates: with 96 hashes a Jaccard index of 0.5 is known to about ± 0.05, and nearly every pair
    above it is found.
    """
    ours = sketches(sequences, k)
    theirs = ours if others is None else sketches(others, k)
    candidates = set()
    for start in range(0, PERMUTATIONS, ROWS):
        band = slice(start, start + ROWS)
        buckets: dict[bytes, list[int]] = {}
        for index, sketch in enumerate(theirs):
            buckets.setdefault(sketch[band].tobytes(), []).append(index)
        for index, sketch in enumerate(ours):
            for other in buckets.get(sketch[band].tobytes(), []):
                if others is not None or index < other:
                    candidates.add((index, other))
    pairs = np.array(sorted(candidates), dtype=np.int64).reshape(-1, 2)
    agreement = (ours[pairs[:, 0]] == theirs[pairs[:, 1]]).mean(1) if len(pairs) else np.empty(0)
    return pairs[agreement >= similarity]


def sketches(sequences: Sequence[str], k: int) -> np.ndarray:
    """MinHash sketches (n, PERMUTATIONS) uint64 of each sequence's k-mers on both strands."""
    if not 1 <= k <= 27:
        raise ValueError(f"k is {k}, expected 1 to 27")
    multipliers = np.random.default_rng(0).integers(1, 2**63, PERMUTATIONS, dtype=np.uint64) * 2 + 1
    rows = []
    for sequence in sequences:
        words = _canonical_words(sequence.upper(), k)
        rows.append((_mixed(words)[:, None] * multipliers).min(0))
    return np.array(rows, dtype=np.uint64).reshape(-1, PERMUTATIONS)


def assign_groups(
    groups: np.ndarray,
    shares: tuple[float, float, float],
    labels: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Indices of training, validation and test: whole groups, in about these shares.

    Args:
        groups: (n,) group of each sample.
        shares: of train, val and test; they sum to 1.
        labels: (n,) classes to spread evenly; None: none.

    The split is a function of its arguments. Raises ValueError where the groups are too few.
    """
    if abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
        raise ValueError(f"shares are {shares}, expected train, val and test to sum to 1")
    labels = np.zeros(len(groups), np.int64) if labels is None else labels
    rest = np.arange(len(groups))
    parts = []
    for share, of in ((shares[2], 1.0), (shares[1], shares[0] + shares[1])):
        folds = round(of / share) if share else 0
        if not folds:
            parts.append(rest[:0])
            continue
        if folds < 2 or len(np.unique(groups[rest])) < folds:
            raise ValueError(
                f"{len(np.unique(groups[rest]))} groups of similar sequences cannot be split into "
                f"shares of {shares}; give more data, or a higher similarity"
            )
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
        kept, held = next(splitter.split(rest, labels[rest], groups[rest]))
        parts.append(rest[held])
        rest = rest[kept]
    test, val = parts
    return [rest, val, test]


def sequence_leakage(
    parts: Mapping[str, Sequence[str]], *, k: int = 12, similarity: float = 0.5
) -> dict[str, Any]:
    """How many sequences of val and test are identical or similar to one of train.

    Args:
        parts: sequences of "train", "val" and "test".
        k: length of the words compared.
        similarity: Jaccard index from which sequences count as similar.
    """
    train = set(_canonical(parts["train"]))
    report: dict[str, Any] = {"kmer": k, "similarity": similarity}
    for name in PARTS[1:]:
        held = list(parts[name])
        pairs = similar_pairs(held, parts["train"], k=k, similarity=similarity)
        report[name] = {
            "sequences": len(held),
            "identical_to_train": sum(s in train for s in _canonical(held)),
            "similar_to_train": len(np.unique(pairs[:, 0])),
        }
    return report


def region_leakage(parts: Mapping[str, Sequence[Feature]], reach: int) -> dict[str, Any]:
    """How many labelled regions of val and test overlap one of train, or come within `reach`.

    Args:
        parts: labelled regions of "train", "val" and "test".
        reach: bases that a model sees beyond a region, such as its window.
    """
    train: dict[str, list[Feature]] = {}
    for feature in parts["train"]:
        train.setdefault(feature.contig, []).append(feature)
    report: dict[str, Any] = {"reach": reach}
    for name in PARTS[1:]:
        counts = {"regions": len(parts[name]), "overlapping_train": 0, "within_reach_of_train": 0}
        for region in parts[name]:
            gaps = [
                max(seen.start - region.end, region.start - seen.end)
                for seen in train.get(region.contig, ())
            ]
            nearest = min(gaps, default=reach + 1)
            counts["overlapping_train"] += nearest < 0
            counts["within_reach_of_train"] += nearest <= reach
        report[name] = counts
    return report


def region_copies(
    parts: Mapping[str, Sequence[Feature]],
    genome: Genome,
    size: int,
    *,
    k: int = 20,
    share: float = 0.5,
) -> dict[str, Any]:
    """How many windows of val and test are near copies of something in train, on either strand.

    Regions that lie apart may be alike: genes and contigs come twice. A copy has `share` of its
    words in regions of train, wherever those begin; of the words, one in 16 is compared, by its
    hash, and none with another letter than A, C, G and T.

    Args:
        parts: labelled regions of "train", "val" and "test".
        genome: their sequences.
        size: bases of a window.
        k: length of the words. Half of 20 letters' words stay where 1 letter of 30 differs.
        share: part of a window's words that makes it a copy.
    """

    def words_of(part: str) -> Iterator[np.ndarray]:
        for window in Windows(parts[part], size, genome):
            yield _sampled_words(genome.fetch(window.contig, window.start, window.end), k)

    seen = np.unique(np.concatenate([np.empty(0, np.uint64), *words_of("train")]))
    report: dict[str, Any] = {"copy": {"kmer": k, "share": share}}
    for name in PARTS[1:]:
        windows = [words for words in words_of(name) if len(words)]
        known = np.isin(np.concatenate([np.empty(0, np.uint64), *windows]), seen)
        ends = np.cumsum([len(words) for words in windows])
        copies = sum(found.mean() >= share for found in np.split(known, ends)[: len(windows)])
        report[name] = {"windows_compared": len(windows), "copies_of_train": int(copies)}
    return report


def _canonical(sequences: Sequence[str]) -> list[str]:
    upper = [sequence.upper() for sequence in sequences]
    return [min(sequence, reverse_complement(sequence)) for sequence in upper]


def _components(pairs: np.ndarray, n: int) -> np.ndarray:
    links = coo_matrix((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    return connected_components(links, directed=False)[1]


_CODES = np.full(256, 4, np.uint64)
_CODES[list(b"ACGT")] = range(4)


def _canonical_words(sequence: str, k: int) -> np.ndarray:
    """Numbers (m,) uint64 of the k-mers of a sequence, the lesser of both strands' each."""
    codes = _CODES[np.frombuffer(sequence.encode(), np.uint8)]
    k = min(k, len(codes))
    words = np.lib.stride_tricks.sliding_window_view(codes, k)
    powers = np.uint64(5) ** np.arange(k, dtype=np.uint64)
    other = np.where(words < 4, 3 - words, 4)
    return np.minimum(words @ powers[::-1], other @ powers)


def _sampled_words(sequence: str, k: int) -> np.ndarray:
    """One in 16 of the different words (m,) uint64, hashed, of a sequence on both strands."""
    runs = re.findall(f"[ACGT]{{{k},}}", sequence.upper())
    words = [_mixed(_canonical_words(run, k)) for run in runs]
    hashes = np.concatenate([np.empty(0, np.uint64), *words])
    return np.unique(hashes[hashes % np.uint64(16) == 0])


def _mixed(words: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele et al. 2014): neighbours become unrelated numbers."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
