"""Chromosome prediction, variant effect, mutagenesis and reading frames."""

import json
import os
from functools import partial

import numpy as np
import pytest
import torch

from mamba2_apps.backbone import BackboneConfig
from mamba2_apps.genomics import scan as scanning
from mamba2_apps.genomics.adapter import TokenEmbedding
from mamba2_apps.genomics.annotated import paint
from mamba2_apps.genomics.annotations import joined, read_bed, read_features
from mamba2_apps.genomics.fasta import MemoryGenome
from mamba2_apps.genomics.gene_structure import GENE_LABELS, decode_genes
from mamba2_apps.genomics.intervals import Feature
from mamba2_apps.genomics.models import DNAModel
from mamba2_apps.genomics.mutagenesis import mutagenesis_map
from mamba2_apps.genomics.orfs import CODON_LABELS, decode_orfs, longest_orfs, open_frames
from mamba2_apps.genomics.preprocessing import DNAPreprocessing
from mamba2_apps.genomics.scan import predict_bases
from mamba2_apps.genomics.sequences import reverse_complement
from mamba2_apps.genomics.tokenizers import BaseTokenizer
from mamba2_apps.genomics.tracks import read_track
from mamba2_apps.genomics.variant_effect import VariantScorer, allele_windows
from mamba2_apps.genomics.variants import Variant, VariantFile
from mamba2_apps.heads import LanguageModelHead, PooledHead, TokenHead, TrackHead
from mamba2_apps.tasks import (
    Classification,
    MaskedReconstruction,
    NextToken,
    OptimizerConfig,
    Regression,
    TokenClassification,
    TokenMultiLabel,
    TrackRegression,
)

RNG = np.random.default_rng(0)
SEQUENCE = "".join(RNG.choice(list("ACGT"), 1000))
GENOME = {"one": SEQUENCE, "two": SEQUENCE[:333][::-1]}


def task_of(kind, head, labels, *, bidirectional=True, **options):
    torch.manual_seed(0)
    model = DNAModel(
        len(labels),
        adapter=partial(TokenEmbedding, maskable=True),
        backbone=BackboneConfig(16, 2, d_state=8, headdim=8, bidirectional=bidirectional),
        head=head,
        **options,
    )
    return kind(model.double(), labels, OptimizerConfig()).eval()


@pytest.fixture
def causal():
    return task_of(TokenMultiLabel, TokenHead, ["a", "b+"], bidirectional=False)


@pytest.fixture
def both():
    return task_of(TokenClassification, TokenHead, ["none", "x", "y"])


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "g.fa"
    path.write_text("".join(f">{name}\n{text}\n" for name, text in GENOME.items()))
    return path


def one_pass(task, text):
    outputs = task.model(BaseTokenizer().encode(text)[None])[0]
    multi = isinstance(task, TokenMultiLabel)
    return (outputs.sigmoid() if multi else outputs.softmax(-1)).detach().float().numpy()


@pytest.mark.parametrize("window", [1, 64, 333, 5000])
def test_a_stream_is_one_pass_whatever_the_window(causal, window):
    genome = GENOME if window > 1 else {"one": SEQUENCE[:40]}
    answers, stitch = predict_bases(causal, genome, window=window)
    assert stitch.bases == 0
    for (name, start, end), values in answers.items():
        assert (start, end) == (0, len(genome[name]))
        np.testing.assert_allclose(values, one_pass(causal, genome[name]), atol=1e-6)


def test_a_stream_of_a_language_model_gives_log_likelihoods():
    task = task_of(NextToken, LanguageModelHead, [], bidirectional=False)
    (values,) = predict_bases(task, {"one": SEQUENCE}, window=77)[0].values()
    ids = BaseTokenizer().encode(SEQUENCE)
    scores = task.model(ids[None])[0].log_softmax(-1)
    expected = scores[:-1].gather(1, ids[1:, None])[:, 0].detach().numpy()
    assert np.isnan(values[0])
    np.testing.assert_allclose(values[1:, 0], expected, atol=1e-5)


def test_windows_meet_with_a_measured_error(both):
    whole = one_pass(both, SEQUENCE)
    errors = []
    for overlap in (0, 16, 128, 1000):
        answers, stitch = predict_bases(both, {"one": SEQUENCE}, window=100, overlap=overlap)
        (values,) = answers.values()
        errors.append((np.abs(values - whole).max(), stitch))
    assert errors[0][1].bases == 0
    assert errors[0][0] > errors[2][0]
    assert 0 < errors[2][1].largest < errors[1][1].largest
    assert errors[2][1].bases == 9 * 128
    assert errors[2][1].mean <= errors[2][1].largest
    np.testing.assert_allclose(errors[3][0], 0, atol=1e-6)


@pytest.mark.parametrize("kind", ["causal", "bidirectional", "equivariant"])
def test_bins_of_bases_are_scanned(kind):
    options = {"strands": kind} if kind == "equivariant" else {"bidirectional": kind != "causal"}
    task = task_of(TrackRegression, partial(TrackHead, bin_size=8), ["t"], **options)
    regions = [("one", 0, 1000), ("one", 5, 600), ("two", 330, 333)]
    genome = {"one": SEQUENCE, "two": GENOME["two"]}
    answers, stitch = predict_bases(task, genome, regions=regions, window=100, overlap=995)
    assert (stitch.bases > 0) == (kind != "causal")
    for (name, start, end), values in answers.items():
        assert values.shape == (end - start, 1)
        first = start if kind == "causal" else start % 8
        last = end if kind == "causal" else len(genome[name])
        text = genome[name][first : last - (last - first) % 8]
        if not text:
            assert np.isnan(values).all()
            continue
        bins = task.values(task.model(BaseTokenizer().encode(text)[None]))[0].detach().numpy()
        expected = bins.repeat(8, axis=0)[start - first : end - first]
        np.testing.assert_allclose(values[: len(expected)], expected, atol=1e-6)
        assert np.isnan(values[len(expected) :]).all()
        assert len(values) - len(expected) < 8


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_scan_gives_a_bidirectional_model_what_it_was_trained_on(
    bidirectional, fasta, tmp_path, monkeypatch
):
    task = task_of(TokenMultiLabel, TokenHead, ["a"], bidirectional=bidirectional)
    scans, made = [], scanning.Scan
    monkeypatch.setattr(scanning, "Scan", lambda *a: scans.append(made(*a)) or scans[-1])
    for window, options in ((None, {}), (200, {}), (200, {"window": 300, "overlap": 7})):
        answer = DNAPreprocessing(window=window).answerer(
            [str(fasta)], output=tmp_path / "o.bed", stream=False
        )
        list(answer(task, **options))
    ours = (100, 50) if bidirectional else (65536, 4096)
    assert [(s.window, s.overlap) for s in scans] == [(65536, 4096), ours, (300, 7)]


def run_answerer(task, sources, output, *, stream=False, **options):
    answer = DNAPreprocessing().answerer(sources, output=output, stream=stream)
    return list(answer(task, **options))


def test_tracks_are_written_and_an_interrupted_scan_goes_on(causal, fasta, tmp_path, monkeypatch):
    output, calls = tmp_path / "o.bedgraph", []
    step = scanning.Scan._next

    def breaking(self, *arguments):
        calls.append(arguments[1])
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(scanning.Scan, "_next", breaking)
    options = {"window": 100, "label": ["a"]}
    with pytest.raises(KeyboardInterrupt):
        run_answerer(causal, [str(fasta)], output, **options)
    folder = tmp_path / ".o.bedgraph.scan"
    assert not output.exists()
    assert len(list(folder.glob("*.npy"))) == 5
    with pytest.raises(ValueError, match="an interrupted scan of other options"):
        run_answerer(causal, [str(fasta)], output, window=101)
    run_answerer(causal, [str(fasta)], output, **options)
    assert len(calls) == 6 + 5 + 4  # the sixth piece again, the rest of one, and two
    assert not folder.exists()
    for name, text in GENOME.items():
        values = read_track(output, {n: len(t) for n, t in GENOME.items()}, name, 0, len(text))
        np.testing.assert_allclose(values, one_pass(causal, text)[:, 0], rtol=1e-3)


def test_regions_are_written_in_the_order_of_the_genome(causal, both, fasta, tmp_path):
    pytest.importorskip("pyBigWig")
    lengths = {n: len(t) for n, t in GENOME.items()}
    regions = ["two:1-50", "one:601-700", "one:101-200"]
    run_answerer(causal, [str(fasta)], tmp_path / "o.bw", region=regions, label=["a"])
    values = read_track(tmp_path / "o.bw", lengths, "one", 0, 1000)
    assert np.flatnonzero(~np.isnan(values)).tolist() == [*range(100, 200), *range(600, 700)]
    run_answerer(both, [str(fasta)], tmp_path / "o.bed", region=regions)
    places = [(f.contig, f.start) for f in read_bed(tmp_path / "o.bed")]
    assert len({f.name for f in read_bed(tmp_path / "o.bed")}) == 2
    assert places == sorted(places)
    with pytest.raises(ValueError, match="one:1-9 and one:9-20, which overlap"):
        run_answerer(both, [str(fasta)], tmp_path / "p.bw", region=["one:9-20", "one:1-9"])
    assert {p.name for p in tmp_path.iterdir()} == {"g.fa", "o.bw", "o.bed"}


def test_a_scan_of_a_changed_or_damaged_genome_does_not_go_on(causal, fasta, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    output = tmp_path / "o.bedgraph"
    monkeypatch.setattr(scanning, "_report", stop)
    with pytest.raises(KeyboardInterrupt):
        run_answerer(causal, [str(fasta)], output, label=["a"])
    text, stat = fasta.read_text(), fasta.stat()
    fasta.write_text(text.replace("ACG", "ACC", 1))  # of the same size
    os.utime(fasta, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    with pytest.raises(ValueError, match="an interrupted scan of other options, another model or"):
        run_answerer(causal, [str(fasta)], output, label=["a"])
    (tmp_path / "i.fa").write_text(">one\nACGTACGE\n")
    (tmp_path / "i.fa.fai").write_text("one\t8\t5\t8\t9\n")
    with pytest.raises(ValueError, match="'E' is no IUPAC code"):
        run_answerer(causal, [str(tmp_path / "i.fa")], tmp_path / "i.bedgraph", label=["a"])
    assert not list(tmp_path.glob("*i.bedgraph*"))


def test_a_region_and_several_labels_in_big_wig(causal, fasta, tmp_path):
    pytest.importorskip("pyBigWig")
    output = tmp_path / "o.bw"
    run_answerer(causal, [str(fasta)], output, region=["one:101-300"], stream=True)
    assert sorted(p.name for p in tmp_path.glob("*.bw")) == ["o.a.bw", "o.b+.bw"]
    values = read_track(tmp_path / "o.b+.bw", {"one": 1000, "two": 333}, "one", 0, 1000)
    assert np.isnan(values[:100]).all()
    np.testing.assert_allclose(
        values[100:300], one_pass(causal, SEQUENCE[100:300])[:, 1], rtol=1e-3
    )


def test_one_region_needs_no_list(causal, fasta, tmp_path):
    output = tmp_path / "o.bedgraph"
    run_answerer(causal, [str(fasta)], output, region="one:1-1,000", label=["a"], stream=True)
    assert {line.split("\t")[0] for line in output.read_text().splitlines()} == {"one"}


def test_bed_holds_the_called_segments(both, causal, fasta, tmp_path, capsys):
    output = tmp_path / "o.bed"
    run_answerer(both, [str(fasta)], output, window=150, overlap=1000)
    assert "stitch error" in capsys.readouterr().err
    called = np.zeros((1000, 3), bool)
    for feature in read_bed(output):
        if feature.contig == "one":
            called[feature.start : feature.end, {"x": 1, "y": 2}[feature.name]] = True
    chosen = one_pass(both, SEQUENCE).argmax(1)
    for column in (1, 2):
        np.testing.assert_array_equal(called[:, column], chosen == column)
    rows = run_answerer(causal, [str(fasta)], None, stream=True, threshold=0.4, label=["b+"])
    assert {row["strand"] for row in rows} == {"+"}
    spans = sum(row["end"] - row["start"] for row in rows)
    assert spans == sum((one_pass(causal, t)[:, 1] >= 0.4).sum() for t in GENOME.values())
    assert json.dumps(rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stream": True}, "--stream needs a causal model"),
        ({"region": ["one:1-2000"]}, "one has the bases 1-1,000"),
        ({"region": "[one:1-1,000]"}, "commas of a number end a region; quote each"),
        ({"label": ["z"]}, "--label is 'z', expected one of none, x, y"),
        ({"decode": "orfs"}, "open reading frames need the labels codon1"),
        ({"decode": "genes"}, "genes need the labels donor"),
        ({"decode": "exons"}, "--decode is 'exons', expected orfs or genes"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_impossible_scans_are_refused(both, fasta, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        run_answerer(both, [str(fasta)], tmp_path / "o.bed", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["g.fa"]


def test_decoded_genes_are_written_as_gff(fasta, tmp_path):
    task = task_of(TokenMultiLabel, TokenHead, GENE_LABELS)
    output, free = tmp_path / "o.gff3", {"window": 400, "overlap": 1000}
    run_answerer(task, [str(fasta)], output, decode="genes", region="one", **free)
    values = next(iter(predict_bases(task, {"one": SEQUENCE}, **free)[0].values()))
    genes = decode_genes(SEQUENCE, values, GENE_LABELS, "one")
    assert sum(len(gene.blocks) for gene in genes) > 5
    found = joined(read_features(output))
    assert [(f.strand, f.blocks) for f in found] == [(g.strand, g.blocks) for g in genes]
    with pytest.raises(ValueError, match=r"\.gff3 holds genes; give --decode=genes"):
        run_answerer(task, [str(fasta)], output)
    with pytest.raises(ValueError, match=r"which no track holds; write \.bed or \.gff3"):
        run_answerer(task, [str(fasta)], tmp_path / "o.bedgraph", decode="genes")


def test_a_stream_of_both_strands_is_refused(fasta, tmp_path):
    task = task_of(Classification, PooledHead, ["a", "b"], bidirectional=False, strands="average")
    with pytest.raises(ValueError, match="answers once for a sequence"):
        run_answerer(task, [str(fasta)], tmp_path / "o.bed")


# Variants


def windows_of(variant, size=40):
    return allele_windows(MemoryGenome(GENOME, "g"), variant, size)


@pytest.mark.parametrize(
    ("start", "ref", "alt"),
    [
        (500, 1, "T"),
        (500, 1, "TTTTT"),
        (500, 9, "A"),
        (3, 2, "G"),
        (995, 5, "C"),
        (0, 1, "GA"),
        (999, 1, "AC"),
    ],
)
def test_both_alleles_are_read_in_one_length(start, ref, alt):
    variant = Variant("one", start, SEQUENCE[start : start + ref], alt, "v:1")
    reference, alternative, offset = windows_of(variant)
    assert len(reference) == len(alternative) == 40
    assert reference in SEQUENCE
    assert reference[offset : offset + min(ref, 40 - offset)] == variant.ref[: 40 - offset]
    changed = SEQUENCE[:start] + alt + SEQUENCE[start + ref :]
    assert alternative in changed
    assert alternative[offset : offset + len(alt)] == alt[: 40 - offset]


def test_a_code_of_the_genome_is_read_as_the_base_of_ref():
    genome = MemoryGenome({"one": SEQUENCE[:400] + "R" + SEQUENCE[401:]}, "g")
    for alt in ("T", "TTT", "G"):
        reference, alternative, offset = allele_windows(
            genome, Variant("one", 400, "A", alt, ""), 40
        )
        assert reference == SEQUENCE[400 - offset : 400] + "A" + SEQUENCE[401 : 440 - offset]
        assert alternative[offset : offset + len(alt)] == alt


def test_a_variant_scores_the_difference_of_its_alleles():
    task = task_of(Classification, PooledHead, ["n", "p"], strands="equivariant")
    scorer = VariantScorer(task, DNAPreprocessing(), MemoryGenome(GENOME, "g"), window=60)
    variant = Variant("one", 400, SEQUENCE[400], "ACGTT", "v:1")
    reference, alternative, _ = windows_of(variant, 60)
    encode = BaseTokenizer().encode
    expected = (task.model(encode(alternative)[None]) - task.model(encode(reference)[None]))[0]
    (found,) = scorer.scores([variant])
    assert list(found) == ["n", "p"]
    np.testing.assert_allclose(list(found.values()), expected.detach(), rtol=1e-5)


@pytest.mark.parametrize(
    ("start", "ref", "alt"),
    [(999, 1, "AC"), (400, 1, "A" * 70), (400, 35, "A"), (400, 35, "C" * 35)],
)
def test_an_allele_beyond_its_window_has_no_score(both, start, ref, alt):
    variant = Variant("one", start, SEQUENCE[start : start + ref], alt, "v:1")
    fits = Variant("one", 400, SEQUENCE[400:403], "A", "v:2")
    for task in (both, task_of(Classification, PooledHead, ["n", "p"])):
        scorer = VariantScorer(task, DNAPreprocessing(), MemoryGenome(GENOME, "g"), window=60)
        lost, scored = scorer.scores([variant, fits])
        assert set(lost.values()) == {None}
        assert None not in scored.values()
        assert lost.keys() == scored.keys()


def test_log_likelihood_ratios_of_language_models():
    genome = MemoryGenome(GENOME, "g")
    variant = Variant("one", 400, SEQUENCE[400], "A" if SEQUENCE[400] != "A" else "C", "v:1")
    encode = BaseTokenizer().encode
    causal = task_of(NextToken, LanguageModelHead, [], bidirectional=False)

    def likelihood(text):
        ids = encode(text)
        scores = causal.model(ids[None])[0].float().log_softmax(-1)
        return scores[:-1].gather(1, ids[1:, None]).sum().item()

    reference, alternative, _ = windows_of(variant, 60)
    one = likelihood(alternative) - likelihood(reference)
    pair = (reverse_complement(s) for s in (alternative, reference))
    other = likelihood(next(pair)) - likelihood(next(pair))
    for both_strands, expected in ((False, one), (True, (one + other) / 2)):
        scorer = VariantScorer(
            causal, DNAPreprocessing(), genome, window=60, both_strands=both_strands
        )
        assert scorer.scores([variant])[0]["LLR"] == pytest.approx(expected, abs=1e-4)


def test_ratios_of_masked_language_models():
    masked = task_of(MaskedReconstruction, LanguageModelHead, [])
    base = SEQUENCE[400]
    alleles = [(base, "A" if base != "A" else "C"), (base, f"{base}GG"), (SEQUENCE[400:404], base)]
    encode = BaseTokenizer().encode

    def hidden(text, at):
        ids = encode(text)[None]
        hide = torch.arange(ids.shape[1])[None] == at
        return masked.model(ids, hide=hide)[0, at].float().log_softmax(-1)

    def expected(variant, strand):
        reference, alternative, offset = windows_of(variant, 60)
        start, end = offset - 16, offset + max(len(variant.ref), len(variant.alt)) + 16
        if strand == "-":
            start, end, offset = 60 - end, 60 - start, 59 - offset
            reference, alternative = map(reverse_complement, (reference, alternative))
        if len(variant.ref) == len(variant.alt):
            row = hidden(reference, offset)
            return (row[encode(alternative)[offset]] - row[encode(reference)[offset]]).item()
        sums = [
            sum(hidden(text, at)[encode(text)[at]].item() for at in range(start, end))
            for text in (alternative, reference)
        ]
        return sums[0] - sums[1]

    for both_strands in (False, True):
        scorer = VariantScorer(
            masked, DNAPreprocessing(), MemoryGenome(GENOME, "g"), window=60,
            both_strands=both_strands,
        )  # fmt: skip
        for ref, alt in alleles:
            variant = Variant("one", 400, ref, alt, "v:1")
            strands = "+-" if both_strands else "+"
            score = np.mean([expected(variant, strand) for strand in strands])
            named = ("LLR", "PLLR") if len(ref) == len(alt) else ("PLLR", "LLR")
            (found,) = scorer.scores([variant])
            assert found[named[0]] == pytest.approx(score, abs=1e-4)
            assert found[named[1]] is None
    lost = Variant("one", 400, base, "A" * 70, "v:2")
    assert scorer.scores([lost]) == [{"LLR": None, "PLLR": None}]


def test_a_pseudo_likelihood_leaves_out_what_is_no_base():
    masked = task_of(MaskedReconstruction, LanguageModelHead, [])
    scores = []
    for letter in "NR":
        text = SEQUENCE[:395] + letter + SEQUENCE[396:]
        scorer = VariantScorer(
            masked, DNAPreprocessing(), MemoryGenome({"one": text}, "g"), window=60
        )
        scores.append(scorer.scores([Variant("one", 400, text[400], text[400] + "G", "v")])[0])
    assert all(np.isfinite(found["PLLR"]) for found in scores)


def test_answers_per_base_give_gain_and_loss(both):
    scorer = VariantScorer(both, DNAPreprocessing(), MemoryGenome(GENOME, "g"), window=60)
    deleted = Variant("one", 400, SEQUENCE[400:404], SEQUENCE[400], "v:1")
    reference, alternative, offset = windows_of(deleted, 60)
    ours, theirs = one_pass(both, reference), one_pass(both, alternative)
    before = theirs[: offset + 1] - ours[: offset + 1]
    after = theirs[offset + 1 : -3] - ours[offset + 4 :]
    change = np.concatenate([before, after])
    (found,) = scorer.scores([deleted])
    assert found["x_gain"] == pytest.approx(change[:, 1].max(), abs=1e-5)
    assert found["x_loss"] == pytest.approx(change[:, 1].min(), abs=1e-5)
    with pytest.raises(ValueError, match="answers for each base"):
        VariantScorer(both, DNAPreprocessing(), scorer.genome, both_strands=True)


@pytest.mark.parametrize("suffix", [".vcf", ".tsv", ".csv"])
def test_a_vcf_comes_back_annotated(fasta, tmp_path, suffix):
    task = task_of(Classification, PooledHead, ["n-", "p+"])
    vcf = tmp_path / "v.vcf"
    ref = SEQUENCE[9]
    vcf.write_text(
        "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
        f"one\t9\t.\t{SEQUENCE[8]}\t<DEL>\t.\t.\tEND=12\n"
        f"one\t10\trs\t{ref}\tA{ref},<INS>\t.\t.\tDP=1;n_minus=7\n"
    )
    output = tmp_path / f"o{suffix}"
    rows = run_answerer(task, [str(vcf)], output, genome=str(fasta), window=50)
    if suffix == ".csv":
        assert rows[0].keys() == rows[1].keys()
        assert rows[1]["position"] == 10
        assert isinstance(rows[1]["p_plus"], float)
    elif suffix == ".vcf":
        deleted, line = VariantFile(output, MemoryGenome(GENOME, "g"))
        assert deleted.fields[7] == "END=12;n_minus=.;p_plus=."
        assert line.fields[7].startswith("DP=1;n_minus=")
        assert line.fields[7].count("n_minus") == 1
        assert line.fields[7].endswith(",.")
        assert "ID=p_plus,Number=A" in output.read_text()
    else:
        header, _, first, _ = output.read_text().splitlines()
        assert header.split("\t")[5:] == ["n_minus", "p_plus"]
        assert first.split("\t")[:5] == ["one", "10", "rs", ref, f"A{ref}"]
    vcf.write_text(vcf.read_text().replace(f"\t{ref}\t", "\tN\t"))
    output.unlink(missing_ok=True)
    with pytest.raises(ValueError, match="REF is N but"):
        run_answerer(task, [str(vcf)], output, genome=str(fasta), window=50)
    assert not list(tmp_path.glob(f"*o{suffix}*"))
    with pytest.raises(ValueError, match=r"nothing is written compressed; give o\.vcf"):
        run_answerer(task, [str(vcf)], tmp_path / "o.vcf.gz", genome=str(fasta))


# Mutagenesis


def test_a_mutagenesis_map_is_each_substitution_alone(both, tmp_path, fasta):
    pooled = task_of(Classification, PooledHead, ["n", "p"])
    ids = BaseTokenizer().encode(SEQUENCE[:12])
    changes = mutagenesis_map(pooled, ids, output=1, start=2, end=9, at_once=5)
    assert changes.shape == (7, 4)
    reference = pooled.model(ids[None])[0, 1]
    for at in range(2, 9):
        for base in range(4):
            mutant = ids.clone()
            mutant[at] = base
            expected = pooled.model(mutant[None])[0, 1] - reference
            assert changes[at - 2, base] == pytest.approx(expected.item(), abs=1e-6)
    along = mutagenesis_map(both, ids, output=1, position=4)
    assert along.shape == (12, 4)
    with pytest.raises(ValueError, match="say which one's answer"):
        mutagenesis_map(both, ids, output=1)
    output = tmp_path / "map.png"
    run_answerer(pooled, [f"{fasta}#two"], output, first=10, last=60)
    assert output.stat().st_size > 5000
    language = task_of(NextToken, LanguageModelHead, [], bidirectional=False)
    with pytest.raises(ValueError, match="a RUN of NextToken has no labels"):
        run_answerer(language, [f"{fasta}#two"], output)
    fasta.write_text(">n\nNNNN\n")
    run_answerer(pooled, [f"{fasta}#n"], output)
    fasta.write_text(">n\nNNNN\n>m\nNN\n")
    with pytest.raises(ValueError, match="2 sequences; a picture shows one"):
        run_answerer(pooled, [str(fasta)], output)


def test_maps_and_variants_of_tracks_in_bins():
    ids = BaseTokenizer().encode(SEQUENCE[:12])
    tracks = task_of(TrackRegression, partial(TrackHead, bin_size=4), ["t"])
    changes = mutagenesis_map(tracks, ids, output=0, position=9, start=3, end=4)
    mutant = ids.clone()
    mutant[3] = 0 if ids[3] else 1
    expected = (tracks.model(mutant[None]) - tracks.model(ids[None]))[0, 2, 0]
    assert changes[0, mutant[3]] == pytest.approx(expected.item(), abs=1e-6)
    with pytest.raises(ValueError, match="answers for bins of 4 bases"):
        VariantScorer(tracks, DNAPreprocessing(), MemoryGenome(GENOME, "g"))
    counts = task_of(partial(Regression, loss_name="poisson"), PooledHead, ["c"])
    changes = mutagenesis_map(counts, ids, output=0, start=3, end=4)
    expected = (counts.model(mutant[None]).exp() - counts.model(ids[None]).exp())[0, 0]
    assert changes[0, mutant[3]] == pytest.approx(expected.item(), abs=1e-6)


# Reading frames

GENE = "ATGAAACCCGTGTGA"


def test_open_frames_end_at_the_first_stop():
    text = "CC" + GENE + "CATGTAACC"
    frames = open_frames(text)
    assert ([2, 11], 17) in frames
    assert ([18], 24) in frames
    assert open_frames("ATGAAAAAA") == []


@pytest.mark.parametrize("strand", ["+", "-"])
def test_frames_that_a_model_speaks_for_are_found(strand):
    text = "CCTAACC" + GENE + "TTACC"
    gene = Feature(contig="c", start=7, end=7 + len(GENE), strand="+")
    if strand == "-":
        text = reverse_complement(text)
        gene = Feature(
            contig="c", start=len(text) - gene.end, end=len(text) - gene.start, strand="-"
        )
    labels = paint([gene], 0, len(text), ["codon"])
    alone = {"bias": 0.0, "threshold": 0.0}
    (found,) = decode_orfs(text, labels * 0.8 + 0.1, CODON_LABELS, "c", 100, **alone)
    assert (found.contig, found.strand) == ("c", strand)
    assert (found.start, found.end) == (100 + gene.start, 100 + gene.end)
    later = labels.copy()
    inside = slice(gene.start, gene.start + 9) if strand == "+" else slice(gene.end - 9, gene.end)
    later[inside] = 0  # the model says that the gene begins at its second start codon
    (found,) = decode_orfs(text, later * 0.8 + 0.1, CODON_LABELS, **alone)
    assert len(found) == len(GENE) - 9
    nothing = np.full((len(text), 6), 0.1)
    assert not decode_orfs(text, nothing, CODON_LABELS, **alone)
    (longer,) = decode_orfs(text, nothing, CODON_LABELS, bias=3.0, threshold=0.0)
    assert longer == Feature(**{**vars(longer), "start": gene.start, "end": gene.end})
    (longest,) = longest_orfs(text, 15, 0)
    assert (longest.start, longest.end, longest.strand) == (gene.start, gene.end, strand)
    assert not longest_orfs(text, 16, 0)


def test_frames_of_many_regions_read_each_piece_once(fasta, tmp_path, monkeypatch):
    task = task_of(TokenMultiLabel, TokenHead, CODON_LABELS, bidirectional=False)
    regions, window = ["one:1-400", "one:501-1,000", "two"], 150
    read, load, decoded = [], np.load, []
    monkeypatch.setattr(np, "load", lambda *a, **k: read.append(a[0]) or load(*a, **k))
    monkeypatch.setattr(scanning, "decode_orfs", lambda *a: decoded.append(a) or [])
    output = tmp_path / "o.bed"
    run_answerer(task, [str(fasta)], output, decode="orfs", region=regions, window=window)
    assert len(read) == len(set(read)) == 3 + 4 + 3
    wanted = [("one", 0, 400), ("one", 500, 1000), ("two", 0, 333)]
    for (text, values, _, contig, offset), (name, start, end) in zip(decoded, wanted, strict=True):
        assert (text, contig, offset) == (GENOME[name][start:end], name, start)
        np.testing.assert_allclose(values, one_pass(task, text), rtol=1e-4)


def test_genes_overlap_where_the_model_says_so():
    letters = np.random.default_rng(3).choice(list("ACGT"), 600)
    text = "".join(letters)
    genes = [
        Feature(contig="c", start=starts[0], end=end, strand="+")
        for starts, end in open_frames(text)
        if end - starts[0] > 60
    ]
    first, second = next(
        (a, b) for a in genes for b in genes if a.start < b.start < a.end - 20 and a.end < b.end
    )
    for spoken_for in ([first, second], [first], [second]):
        chances = paint(spoken_for, 0, len(text), ["codon"]) * 0.98 + 0.01
        found = decode_orfs(text, chances, CODON_LABELS, bias=3.0, threshold=30.0)
        assert [(f.start, f.end) for f in found] == [(f.start, f.end) for f in spoken_for]
