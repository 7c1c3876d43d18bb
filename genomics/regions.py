"""Regions of a genome as training data: what is left of them, and the windows that cover them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import torch

from mamba2_apps.genomics.intervals import Feature, parse_region, place


@dataclass(frozen=True)
class Window:
    """A stretch of a contig, and from where to where labels are known; that may reach beyond it."""

    contig: str
    start: int
    end: int
    known: tuple[int, int]


class Windows(Sequence[Window]):
    """As few windows of `size` bases as cover each region, evenly spread over it.

    A window is computed when it is asked for: what is held is a row per region.

    Args:
        regions: where labels are known.
        size: bases of a window; one that covers a shorter region is as short as that.
        lengths: contig lengths.
        margin: bases on either side of a region that windows cover, too.
    """

    def __init__(
        self, regions: Sequence[Feature], size: int, lengths: Mapping[str, int], margin: int = 0
    ) -> None:
        self.regions = sorted(regions, key=lambda r: (r.contig, r.start))
        self.size = size
        spans = [
            (max(r.start - margin, 0), min(r.end + margin, lengths[r.contig])) for r in self.regions
        ]
        self._spans = np.array(spans, np.int64).reshape(-1, 2)
        self._counts = -(-(self._spans[:, 1] - self._spans[:, 0]) // size)
        self._ends = self._counts.cumsum()

    def __len__(self) -> int:
        return int(self._counts.sum())

    @overload
    def __getitem__(self, index: int) -> Window: ...
    @overload
    def __getitem__(self, index: slice) -> list[Window]: ...
    def __getitem__(self, index: int | slice) -> Window | list[Window]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # raises IndexError
        at = int(np.searchsorted(self._ends, place, side="right"))
        region, count = self.regions[at], int(self._counts[at])
        start, end = self._spans[at].tolist()
        length = min(self.size, end - start)
        number = place - (int(self._ends[at]) - count)
        step = (end - length - start) / max(count - 1, 1)
        first = end - length if number == count - 1 else int(start + number * step)
        return Window(region.contig, first, first + length, (region.start, region.end))


def shifted(window: Window, most: int, low: int, high: int) -> Window:
    """A window moved by up to `most` bases either way, between the bases low and high.

    A window of a whole short gene moves too: else its gene would always begin at the same place.
    Drawn from torch's global generator.
    """
    least, largest = max(-most, low - window.start), min(most, high - window.end)
    if least >= largest:
        return window
    by = int(torch.randint(least, largest + 1, ()))
    return replace(window, start=window.start + by, end=window.end + by)


RegionNames = list[str] | str
"""Regions in a recipe or on the command line: chr2R:1-1,000 or chr2R; one of them, or a list."""


def parsed(texts: RegionNames, lengths: Mapping[str, int]) -> list[Feature]:
    """The regions of these names. Raises ValueError."""
    places = [parse_region(text, lengths) for text in listed(texts)]
    return [Feature(contig=contig, start=start, end=end) for contig, start, end in places]


def listed(texts: RegionNames) -> list[str]:
    """Names of regions as a list. Raises ValueError for a list that YAML cuts at a comma."""
    if not isinstance(texts, str):
        return texts
    if texts.startswith("["):
        raise ValueError(
            f"regions are {texts}, in which the commas of a number end a region; quote each: "
            '\'["chr2:1-1,000", "chr3"]\''
        )
    return [texts]


def check_apart(test: Sequence[Feature], val: Sequence[Feature]) -> None:
    """Raises ValueError where the epoch would be chosen on bases of the test."""
    for one in val:
        for other in test:
            start, end = max(one.start, other.start), min(one.end, other.end)
            if one.contig == other.contig and start < end:
                raise ValueError(
                    f"data.val_regions and data.test_regions overlap at "
                    f"{place(one.contig, start, end)}; a base is of one part"
                )


def check_chance(name: str, value: float) -> None:
    """Raises ValueError for a chance that is none."""
    if not 0 <= value <= 1:
        raise ValueError(f"data.{name} is {value}, expected 0 to 1")


def whole(lengths: Mapping[str, int]) -> list[Feature]:
    """Every contig as a region."""
    return [Feature(contig=contig, start=0, end=length) for contig, length in lengths.items()]


def without(regions: Sequence[Feature], holes: Sequence[Feature]) -> list[Feature]:
    """What is left of regions outside the blocks of others."""
    blocks: dict[str, list[tuple[int, int]]] = {}
    for hole in holes:
        blocks.setdefault(hole.contig, []).extend(hole.blocks)
    left = []
    for region in regions:
        pieces = [(region.start, region.end)]
        for start, end in blocks.get(region.contig, ()):
            beside = [p for a, b in pieces for p in ((a, min(b, start)), (max(a, end), b))]
            pieces = [(a, b) for a, b in beside if a < b]
        left += [Feature(contig=region.contig, start=a, end=b) for a, b in pieces]
    return left


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
