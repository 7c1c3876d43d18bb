"""Regions of a genome as training data: what is left of them, and the windows that cover them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mamba2_apps.data import Sample
from mamba2_apps.genomics.intervals import Feature, parse_region


@dataclass(frozen=True)
class Window:
    """A stretch of a contig, and from where to where labels are known; that may reach beyond it."""

    contig: str
    start: int
    end: int
    known: tuple[int, int]


def windows_over(
    regions: Sequence[Feature], size: int, lengths: Mapping[str, int], margin: int = 0
) -> Iterator[Window]:
    """As few windows of `size` bases as cover each region, evenly spread over it.

    Args:
        regions: where labels are known.
        size: bases of a window; one that covers a shorter region is as short as that.
        lengths: contig lengths.
        margin: bases on either side of a region that windows cover, too.
    """
    for region in sorted(regions, key=lambda r: (r.contig, r.start)):
        start = max(region.start - margin, 0)
        end = min(region.end + margin, lengths[region.contig])
        pieces, length = -(-(end - start) // size), min(size, end - start)
        for offset in np.linspace(start, end - length, pieces).astype(int).tolist():
            yield Window(region.contig, offset, offset + length, (region.start, region.end))


def cropped(sample: Sample, length: int) -> Sample:
    """A random stretch of `length` tokens of "inputs", "targets" and "weights", which go along.

    Drawn from torch's global generator; a shorter sample stays as it is.
    """
    spare = len(sample["inputs"]) - length
    start = int(torch.randint(0, spare + 1, ())) if spare > 0 else 0
    return {key: value[start : start + length] for key, value in sample.items()}


def parsed(texts: Sequence[str], lengths: Mapping[str, int]) -> list[Feature]:
    """Regions that a recipe names, such as chr2R:1-1,000 or chr2R. Raises ValueError."""
    places = [parse_region(text, lengths) for text in texts]
    return [Feature(contig=contig, start=start, end=end) for contig, start, end in places]


def whole(lengths: Mapping[str, int]) -> list[Feature]:
    """Every contig as a region."""
    return [Feature(contig=contig, start=0, end=length) for contig, length in lengths.items()]


def without(regions: Sequence[Feature], holes: Sequence[Feature]) -> list[Feature]:
    """What is left of regions outside the blocks of others."""
    left = [(r.contig, r.start, r.end) for r in regions]
    for hole in holes:
        for start, end in hole.blocks:
            pieces = []
            for contig, a, b in left:
                if contig != hole.contig or end <= a or start >= b:
                    pieces.append((contig, a, b))
                    continue
                pieces += [(contig, a, start)] if a < start else []
                pieces += [(contig, end, b)] if end < b else []
            left = pieces
    return [Feature(contig=contig, start=a, end=b) for contig, a, b in left]


def cut_share(regions: list[Feature], share: float) -> tuple[list[Feature], list[Feature]]:
    """Regions without their last `share` of bases, and that."""
    wanted = round(sum(len(region) for region in regions) * share)
    held: list[Feature] = []
    kept = list(regions)
    while wanted > 0 and kept:
        last = kept.pop()
        take = min(wanted, len(last))
        held.insert(0, Feature(contig=last.contig, start=last.end - take, end=last.end))
        if take < len(last):
            kept.append(Feature(contig=last.contig, start=last.start, end=last.end - take))
        wanted -= take
    return kept, held
