"""Open reading frames of prokaryotes: those that a model speaks for, and the longest ones."""

from collections.abc import Sequence

import numpy as np

from mamba2_apps.genomics.intervals import Feature
from mamba2_apps.genomics.sequences import reverse_complement

STARTS, STOPS = ("ATG", "GTG", "TTG"), ("TAA", "TAG", "TGA")
CODON_LABELS = [f"codon{place}{strand}" for strand in "+-" for place in (1, 2, 3)]
_CERTAIN = 1e-4
"""Probabilities are kept this far from 0 and 1, so that no single base decides over a frame."""


def open_frames(sequence: str) -> list[tuple[list[int], int]]:
    """(places of start codons, end) of every open reading frame of one strand, end behind the stop.

    A frame runs from one stop codon of its phase to the next; the ends of the sequence close
    nothing, since what lies beyond is not known.
    """
    text = sequence.upper()
    frames = []
    for phase in range(3):
        starts: list[int] = []
        for at in range(phase, len(text) - 2, 3):
            codon = text[at : at + 3]
            if codon in STOPS:
                if starts:
                    frames.append((starts, at + 3))
                starts = []
            elif codon in STARTS:
                starts.append(at)
    return frames


def longest_orfs(
    sequence: str, least: int, overlap: int, contig: str = "", offset: int = 0
) -> list[Feature]:
    """The longest reading frames of both strands, the longer ones first.

    Args:
        sequence: of the forward strand.
        least: bases from which a frame counts, its stop codon included.
        overlap: bases that a frame may share with longer ones that were taken.
        contig: name for the features.
        offset: place of the first base on the contig.
    """
    found = []
    for strand, text in (("+", sequence), ("-", reverse_complement(sequence))):
        for starts, end in open_frames(text):
            if end - starts[0] >= least:
                found.append(_feature(contig, offset, len(sequence), strand, starts[0], end))
    taken, kept = np.zeros(len(sequence), bool), []
    for frame in sorted(found, key=len, reverse=True):
        place = slice(frame.start - offset, frame.end - offset)
        if np.count_nonzero(taken[place]) <= overlap:
            taken[place] = True
            kept.append(frame)
    return sorted(kept, key=lambda f: f.start)


def decode_orfs(
    sequence: str,
    probabilities: np.ndarray,
    labels: Sequence[str],
    contig: str = "",
    offset: int = 0,
    *,
    bias: float = 2.5,
    threshold: float = 500.0,
) -> list[Feature]:
    """Reading frames whose bases a model calls coding in that very frame.

    For every stop codon the start is chosen that gains most: the sum, over the bases of the frame,
    of the log odds of being at that place of a codon, plus `bias`, since a long open frame is
    itself evidence of a gene. Frames are taken from the best down. A base of a better frame gives
    no `bias` to another one: genes overlap where the model says that they do, and only there.

    Args:
        sequence: l bases.
        probabilities: (l, k).
        labels: names of the k columns, among them codon1+ to codon3-.
        contig: name for the features.
        offset: place of the first base on the contig.
        bias: added to the log odds of every base; 0: the model alone decides.
        threshold: least sum that makes a gene. Both defaults were chosen on a part of a bacterial
            genome that was held out for this (docs/genomics.md).

    Raises ValueError where labels of codon places are missing.
    """
    check_codon_labels(labels)
    found = []
    for strand, text in (("+", sequence), ("-", reverse_complement(sequence))):
        columns = [labels.index(f"codon{place}{strand}") for place in (1, 2, 3)]
        chances = probabilities[:, columns].astype(np.float64).clip(_CERTAIN, 1 - _CERTAIN)
        odds = np.log(chances) - np.log1p(-chances)
        odds = odds if strand == "+" else odds[::-1]
        at, frames = np.arange(len(text)), open_frames(text)
        for phase in range(3):
            # Gain of each base as part of a frame whose codons begin at this phase.
            gain = odds[at, (at - phase) % 3] + bias
            total = np.concatenate([[0.0], np.cumsum(gain)])
            for starts, end in (f for f in frames if f[1] % 3 == phase):
                gains = total[end] - total[starts]
                best = int(np.argmax(gains))
                if gains[best] > threshold:
                    frame = _feature(contig, offset, len(text), strand, starts[best], end)
                    found.append((float(gains[best]), frame))
    taken, kept = np.zeros(len(sequence), bool), []
    for gain, frame in sorted(found, key=lambda pair: -pair[0]):
        place = slice(frame.start - offset, frame.end - offset)
        if gain - bias * np.count_nonzero(taken[place]) > threshold:
            taken[place] = True
            kept.append(frame)
    return sorted(kept, key=lambda f: f.start)


def check_codon_labels(labels: Sequence[str]) -> None:
    """Raises ValueError unless there is a label for each codon place of both strands."""
    if not set(CODON_LABELS) <= set(labels):
        raise ValueError(
            f"open reading frames need the labels {', '.join(CODON_LABELS)} (targets: codon); "
            f"this model has {', '.join(labels)}"
        )


def _feature(contig: str, offset: int, length: int, strand: str, start: int, end: int) -> Feature:
    if strand == "-":
        start, end = length - end, length - start
    return Feature(
        contig=contig,
        start=offset + start,
        end=offset + end,
        strand="+" if strand == "+" else "-",
        name="orf",
        kind="CDS",
    )
