"""Genes decoded from answers for each base, against all structures of short sequences; files."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mamba2_apps.genomics.annotated import label_names, paint
from mamba2_apps.genomics.annotations import joined, read_features, write_bed, write_gff
from mamba2_apps.genomics.gene_structure import (
    GENE_LABELS,
    SPLICE_LABELS,
    decode_genes,
    splice_posteriors,
)
from mamba2_apps.genomics.intervals import Feature
from mamba2_apps.genomics.sequences import reverse_complement

TARGETS = ["donor", "acceptor", "codon", "intron"]
LABELS = label_names(TARGETS)
STOPS = ("TAA", "TAG", "TGA")
OPTIONS = {"coding": 0.7, "ends": 1.5, "floor": 0.05}
# A structure in letters: . none, 123 place in a codon, s stop codon, xyz intron after 0, 1, 2 bases
# of a codon.
AFTER = {
    ".": ".1",
    "1": "2y",
    "2": "3z",
    "3": "1xs",
    "s": "s.",
    "x": "x1",
    "y": "y2",
    "z": "z3",
}


def structures(text: str, labels: str = "") -> Iterator[str]:
    """All structures of a sequence, from rules written out anew."""
    if len(labels) == len(text):
        yield from [labels] if is_gene_structure(text, labels) else []
        return
    at = len(labels)
    for letter in AFTER[labels[-1]] if labels else ".123xyz":
        step = labels[-1:] + letter
        starts = step != ".1" or text[at : at + 3] == "ATG"
        splices = step not in ("1y", "2z", "3x") or text[at : at + 2] in ("GT", "GC")
        joins = step not in ("x1", "y2", "z3") or text[:at].endswith("AG")
        if starts and splices and joins:
            yield from structures(text, labels + letter)


def is_gene_structure(text: str, labels: str) -> bool:
    """Whether start and stop codons are whole and no codon inside stops.

    A sequence that begins with 1 may begin a gene or cut one: see `ways`.
    """
    coding = [i for i, letter in enumerate(labels) if letter in "123"]
    for a, b, c in zip(coding, coding[1:], coding[2:], strict=False):
        is_codon = labels[a] == "1" and "." not in labels[a:c]
        if is_codon and text[a] + text[b] + text[c] in STOPS:
            return False
    for at, (one, other) in enumerate(pairwise(labels), 1):
        if one + other == ".1" and labels[at : at + 3] != "123":
            return False
        if one + other == "3s":
            whole = labels[at : at + 3] == "sss" and text[at : at + 3] in STOPS
            if not whole or labels[at + 3 : at + 4] == "s":
                return False
    return True


def ways(text: str, labels: str, ends: float) -> float:
    """Log number of readings of the first base, each of which costs an end: a start, or a cut."""
    if labels[0] == ".":
        return 0.0
    starts = labels[:3] == "123" and text[:3] == "ATG"
    return np.log(1 + starts) - ends


def score(text: str, labels: str, chances: np.ndarray, coding: float, ends: float, floor: float):
    """Score of a structure; chances (l, 5): donor, acceptor, three places."""
    total = ways(text, labels, ends)
    for at, letter in enumerate(labels):
        looks = np.array([1 - chances[at, 2:].sum(), *chances[at, 2:]]).clip(floor, 1)
        looks = np.log(looks / looks.sum())
        seen = looks[int(letter) if letter in "123" else 0]
        total += coding * (looks.max() if letter == "s" else seen)
    for at, (one, other) in enumerate(pairwise(labels), 1):
        if one + other in (".1", "3s"):
            total -= ends
        if one in "123" and other in "xyz":
            total += np.log(chances[at, 0] / (1 - chances[at, 0]))
        if one in "xyz" and other in "123":
            total += np.log(chances[at - 1, 1] / (1 - chances[at - 1, 1]))
    return total - (0.0 if labels[-1] in ".s" else ends)


def columns_of(strand: str) -> list[int]:
    names = ("donor", "acceptor", "codon1", "codon2", "codon3")
    return [LABELS.index(name + strand) for name in names]


def words(seed: int, length: int) -> str:
    rng, text = np.random.default_rng(seed), ""
    while len(text) < length:
        text += rng.choice(["ATG", "GT", "AG", "TAA", "TGA", "T", "A", "C", "G"])
    return text[:length]


def chances_of(seed: int, length: int) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(0.02, 0.98, (length, len(LABELS)))
    places = [i for i, label in enumerate(LABELS) if label.startswith("codon")]
    values[:, places] *= 0.5
    return values


@pytest.mark.parametrize(
    "text",
    [
        *(words(seed, 14) for seed in range(12)),
        "ATGTGTAAGAACTAA",  # T|AA over an intron is no codon of a gene
        "CATGGTAGGTAGTGA",
        "CCATGTAAC",
        "TG",
        "A",
    ],
)
def test_decoding_is_the_sum_and_the_best_of_all_structures(text):
    chances = chances_of(len(text), len(text))
    posteriors = splice_posteriors(text, chances, LABELS, **OPTIONS, doubt=0.2)
    genes = decode_genes(text, chances, LABELS, **OPTIONS)
    for strand in "+-":
        own = text if strand == "+" else reverse_complement(text)
        mine = chances[:: 1 if strand == "+" else -1, columns_of(strand)]
        found = list(structures(own))
        scores = np.array([score(own, labels, mine, **OPTIONS) for labels in found])
        weights = np.exp(scores - scores.max())
        expected = np.zeros((len(text), 2))
        for labels, weight in zip(found, weights / weights.sum(), strict=True):
            for at, (one, other) in enumerate(pairwise(labels), 1):
                expected[at, 0] += weight * (one in "123" and other in "xyz")
                expected[at - 1, 1] += weight * (one in "xyz" and other in "123")
        columns = [SPLICE_LABELS.index(f"{name}{strand}") for name in ("donor", "acceptor")]
        ours = posteriors[:: 1 if strand == "+" else -1, columns]
        expected = 0.8 * expected + 0.2 * mine[:, :2]
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-9)
        # Where two readings share a structure, the best path is one of them.
        single = scores - [np.log(2) * (ways(own, f, 0.0) > 0) for f in found]
        best = found[int(single.argmax())]
        coding = np.array([letter in "123s" for letter in best])
        called = np.zeros(len(text), bool)
        for gene in genes:
            for block in gene.blocks if gene.strand == strand else ():
                called[slice(*block)] = True
        np.testing.assert_array_equal(called if strand == "+" else called[::-1], coding)


def gene_text(rng: np.random.Generator, exons: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """A gene with exons of these lengths, and their places in it."""
    codons = [a + b + c for a in "ACGT" for b in "ACGT" for c in "ACGT" if a + b + c not in STOPS]
    count = sum(exons) // 3
    text = "ATG" + "".join(rng.choice(codons, count - 2)) + "TGA"
    gene, blocks, done = "", [], 0
    for exon in exons:
        if done:
            gene += "GTAAGT" + "".join(rng.choice(list("ACT"), 40)) + "TTTCAG"
        blocks.append((len(gene), len(gene) + exon))
        gene += text[done : done + exon]
        done += exon
    return gene, blocks


@pytest.fixture
def annotated() -> tuple[str, list[Feature]]:
    """A sequence with a gene on each strand, whose introns lie at each place of a codon."""
    rng = np.random.default_rng(5)
    first, blocks = gene_text(rng, [30, 31, 40, 49, 33])
    second, others = gene_text(rng, [40, 51, 53])
    gaps = ["".join(rng.choice(list("ACGT"), 70)) for _ in range(3)]
    text = gaps[0] + first + gaps[1] + reverse_complement(second) + gaps[2]
    at = len(gaps[0])
    forward = tuple((at + a, at + b) for a, b in blocks)
    end = len(text) - len(gaps[2])
    backward = tuple((end - b, end - a) for a, b in reversed(others))
    return text, [
        Feature(contig="c", start=b[0][0], end=b[-1][1], strand=s, blocks=b)
        for s, b in (("+", forward), ("-", backward))
    ]


def without_stop(gene: Feature) -> Feature:
    """The same as annotations have it that do not count the stop codon as coding."""
    blocks = list(gene.blocks)
    if gene.strand == "+":
        blocks[-1] = (blocks[-1][0], blocks[-1][1] - 3)
    else:
        blocks[0] = (blocks[0][0] + 3, blocks[0][1])
    return replace(gene, start=blocks[0][0], end=blocks[-1][1], blocks=tuple(blocks))


@pytest.mark.parametrize("with_stop", [True, False])
def test_what_a_model_is_sure_of_is_the_annotation(annotated, with_stop):
    text, genes = annotated
    told = genes if with_stop else [without_stop(gene) for gene in genes]
    chances = paint(told, 0, len(text), TARGETS) * 0.98 + 0.01
    found = decode_genes(text, chances, LABELS, "c", 1000)
    assert [(f.strand, f.blocks) for f in found] == [
        (g.strand, tuple((1000 + a, 1000 + b) for a, b in g.blocks)) for g in genes
    ]
    assert all(f.has_start and f.has_stop and f.phase == 0 and f.score > 950 for f in found)
    sites = paint(genes, 0, len(text), ["donor", "acceptor"]) > 0
    posteriors = splice_posteriors(text, chances, LABELS)
    assert label_names(["donor", "acceptor"]) == SPLICE_LABELS
    assert posteriors[sites].min() > 0.9
    assert posteriors[~sites].max() < 0.1


def test_a_site_between_sure_ones_is_found_by_its_reading_frame(annotated):
    text, genes = annotated
    chances = paint(genes, 0, len(text), TARGETS) * 0.98 + 0.01
    donor, column = genes[0].gaps[1][0], LABELS.index("donor+")
    chances[donor, column] = 0.05  # the model misses it, and believes in another GT
    decoy = text.index("GT", donor + 2)
    chances[decoy, column] = 0.5
    posteriors = splice_posteriors(text, chances, LABELS)[:, SPLICE_LABELS.index("donor+")]
    assert posteriors[donor] > 0.5 > posteriors[decoy]


def test_the_other_strand_decodes_as_its_mirror_image(annotated):
    text, genes = annotated
    rng = np.random.default_rng(0)
    chances = paint(genes, 0, len(text), TARGETS) * 0.6 + rng.uniform(0.05, 0.3, (len(text), 12))
    turned = np.roll(chances[::-1], len(LABELS) // 2, 1)
    other = reverse_complement(text)
    np.testing.assert_allclose(
        splice_posteriors(other, turned, LABELS),
        np.roll(splice_posteriors(text, chances, LABELS)[::-1], 2, 1),
        atol=1e-12,
    )
    ours, mirrored = (decode_genes(*given, LABELS) for given in ((text, chances), (other, turned)))
    assert {g.strand for g in ours} == {"+", "-"}
    l = len(text)
    assert [(g.strand, g.blocks, g.score) for g in reversed(mirrored)] == [
        ("-" if g.strand == "+" else "+", tuple((l - b, l - a) for a, b in g.blocks[::-1]), g.score)
        for g in ours
    ]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("into", [4, 5, 6])
def test_a_gene_that_the_sequence_cuts_has_a_phase(annotated, number, into):
    text, genes = annotated
    whole = genes[number]
    chances = paint(genes, 0, len(text), TARGETS) * 0.98 + 0.01
    if whole.strand == "+":
        low, high = whole.start + into, len(text)
    else:
        low, high = 0, whole.end - into
    found = decode_genes(text[low:high], chances[low:high], LABELS, offset=low)
    (gene,) = (g for g in found if g.strand == whole.strand)
    assert (gene.has_start, gene.has_stop) == (False, True)
    assert gene.phase == -into % 3
    assert gene.blocks[1:-1] == whole.blocks[1:-1]
    # and the other end
    low, high = (0, whole.end - into) if whole.strand == "+" else (whole.start + into, len(text))
    found = decode_genes(text[low:high], chances[low:high], LABELS, offset=low)
    (gene,) = (g for g in found if g.strand == whole.strand)
    assert (gene.has_start, gene.has_stop) == (True, False)


def test_gff_and_bed_hold_the_genes_that_were_decoded(annotated, tmp_path):
    text, genes = annotated
    chances = paint(genes, 0, len(text), TARGETS) * 0.98 + 0.01
    low = genes[0].start + 4
    found = decode_genes(text[low:], chances[low:], LABELS, "c 1", low)
    with (tmp_path / "g.gff3").open("w") as file:
        write_gff(found, file)
    with (tmp_path / "g.bed").open("w") as file:
        write_bed(found, file)
    rows = read_features(tmp_path / "g.gff3")
    assert [row.kind for row in rows if row.kind != "CDS"] == ["gene", "mRNA"] * 2
    again = joined(rows)
    for one in (again, read_features(tmp_path / "g.bed")):
        assert [(f.contig, f.strand, f.blocks, f.score) for f in one] == [
            (f.contig, f.strand, f.blocks, f.score) for f in found
        ]
    assert [f.phase for f in again] == [f.phase for f in found] == [2, 0]
    places = paint(genes, 0, len(text), ["codon"])
    for row in rows:
        if row.kind == "CDS":
            first = row.start + row.phase if row.strand == "+" else row.end - 1 - row.phase
            assert places[first, label_names(["codon"]).index(f"codon1{row.strand}")] == 1


def test_models_without_the_labels_of_genes_are_refused():
    labels = [label for label in LABELS if not label.startswith("acceptor")]
    for decode in (decode_genes, splice_posteriors):
        with pytest.raises(ValueError, match=r"need the labels donor\+.*this model has donor\+"):
            decode("ACGT", np.zeros((4, len(labels))), labels)
        with pytest.raises(ValueError, match="3 bases and probabilities of 4"):
            decode("ACG", np.zeros((4, len(LABELS))), LABELS)
    assert set(GENE_LABELS) < set(LABELS)
    assert decode_genes("", np.zeros((0, len(LABELS))), LABELS) == []
