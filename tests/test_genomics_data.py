"""Data sets of genomics: labels at the right base and strand, splits, leakage, augmentation."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from Bio.Seq import Seq

from mamba2_apps import load, recipes, runs
from mamba2_apps.catalog import shipped
from mamba2_apps.cli import main
from mamba2_apps.data import AugmentedDataset, UnreadableInput
from mamba2_apps.genomics.adapter import TokenEmbedding
from mamba2_apps.genomics.annotated import AnnotatedGenome, label_names, paint
from mamba2_apps.genomics.annotations import read_bed
from mamba2_apps.genomics.coverage import Coverage
from mamba2_apps.genomics.data import GenomicBenchmarks, SequenceTable, SplitConfig
from mamba2_apps.genomics.intervals import Feature
from mamba2_apps.genomics.preprocessing import DNAPreprocessing
from mamba2_apps.genomics.pretraining import GenomeText
from mamba2_apps.genomics.sequences import reverse_complement
from mamba2_apps.genomics.splice import Splice
from mamba2_apps.genomics.splits import (
    PARTS,
    assign_groups,
    identical_groups,
    mismatch_groups,
    region_leakage,
    sequence_leakage,
    similar_groups,
)
from mamba2_apps.genomics.tokenizers import BaseTokenizer, BytePairTokenizer, build_tokenizer

RNG = np.random.default_rng(0)
TARGETS = ["donor", "acceptor", "codon", "intron", "start", "stop"]


def dna(length):
    return "".join(RNG.choice(list("ACGT"), length))


def mutated(sequence, places):
    letters = list(sequence)
    for place in places:
        letters[place] = {"A": "C", "C": "G", "G": "T", "T": "A"}[letters[place]]
    return "".join(letters)


# Splits


def test_alike_sequences_are_grouped():
    one, other = dna(300), dna(300)
    near = mutated(one, [50, 200])
    sequences = [one, other, one.lower(), reverse_complement(one), near, reverse_complement(near)]
    assert identical_groups(sequences).tolist()[2:4] == [identical_groups(sequences)[0]] * 2
    assert len(set(identical_groups(sequences))) == 3
    groups = similar_groups(sequences, k=10)
    assert len({groups[i] for i in (0, 2, 3, 4, 5)}) == 1
    assert groups[1] != groups[0]


def test_mismatches_are_counted_exactly():
    base = dna(60)
    chain = [base, mutated(base, range(6)), mutated(base, range(12)), dna(60)]
    groups = mismatch_groups(chain, 6)
    assert groups[0] == groups[1] == groups[2] != groups[3]
    assert len(set(mismatch_groups(chain, 5))) == 4
    with pytest.raises(ValueError, match="expected one length"):
        mismatch_groups(["A", "AC"], 1)


def test_parts_are_whole_groups_in_about_the_shares_asked_for():
    groups = RNG.integers(0, 300, 1000)
    labels = RNG.integers(0, 2, 1000)
    parts = assign_groups(groups, (0.8, 0.1, 0.1), labels)
    assert sorted(np.concatenate(parts)) == list(range(1000))
    assert [round(len(p) / 1000, 1) for p in parts] == [0.8, 0.1, 0.1]
    assert not set(groups[parts[0]]) & set(groups[parts[1]])
    assert not set(groups[parts[0]]) & set(groups[parts[2]])
    again = assign_groups(groups, (0.8, 0.1, 0.1), labels)
    assert all(map(np.array_equal, parts, again))
    with pytest.raises(ValueError, match="1 groups of similar sequences cannot be split"):
        assign_groups(np.zeros(10, int), (0.8, 0.1, 0.1))


def test_leakage_is_counted():
    train = [dna(200) for _ in range(5)]
    held = [reverse_complement(train[0]), mutated(train[1], [100]), dna(200)]
    report = sequence_leakage({"train": train, "val": held, "test": held[2:]})
    assert report["val"] == {"sequences": 3, "identical_to_train": 1, "similar_to_train": 2}
    assert report["test"] == {"sequences": 1, "identical_to_train": 0, "similar_to_train": 0}

    def regions(*spans):
        return [Feature(contig="c", start=a, end=b) for a, b in spans]

    report = region_leakage(
        {"train": regions((100, 200)), "val": regions((150, 160)), "test": regions((250, 300))}, 50
    )
    assert report["val"]["overlapping_train"] == 1
    assert report["test"] == {"regions": 1, "overlapping_train": 0, "within_reach_of_train": 1}


# Splice


@pytest.fixture(scope="module")
def splice():
    data = Splice(fold=3)
    data.setup("fit")
    return data


def test_the_shipped_sample_is_whole_and_its_folds_keep_likes_together(splice):
    sequences = [s for part in PARTS for s in splice.parts[part][0]]
    targets = np.concatenate([splice.parts[part][1] for part in PARTS])
    assert np.bincount(targets).tolist() == [1654, 767, 765]
    assert {len(s) for s in sequences} == {60}
    middle = [s[30:32] for s, t in zip(sequences, targets, strict=True) if t == 1]
    assert middle.count("GT") == 759
    groups = mismatch_groups(sequences, 6)
    ends = np.cumsum([len(splice.parts[part][0]) for part in PARTS])
    train, val, test = np.split(groups, ends[:2])
    assert not set(test) & (set(train) | set(val))
    assert not set(val) & set(train)
    other = Splice(fold=4)
    other.seed = 9
    held = [data.split_parts(data.read())[2] for data in (splice, other, Splice(fold=4))]
    assert not set(held[0]) & set(held[1])
    np.testing.assert_array_equal(held[1], held[2])


def test_splice_sequences_of_another_length_are_refused(splice):
    with pytest.raises(UnreadableInput, match="has 4 bases; this model was trained on 60"):
        splice.preprocessing(Seq("ACGT"))
    with pytest.raises(ValueError, match="fold is 10"):
        Splice(fold=10)
    with pytest.raises(ValueError, match="recombination is 2, expected 0 to 1"):
        Splice(recombination=2)


def test_splice_augmentation_keeps_the_class_and_the_middle_and_repeats():
    data = Splice(recombination=1.0, flank_mutation=0.5)
    data.setup("fit")
    augmented = AugmentedDataset(data.train_set, data.augment, seed=3)
    rows = torch.stack([augmented[0, i]["inputs"] for i in range(300)])
    again = torch.stack([augmented[0, i]["inputs"] for i in range(300)])
    assert torch.equal(rows, again)
    assert not torch.equal(rows[0], augmented[1, 0]["inputs"])
    donors = data.train_set.targets[:300] == 1
    middle = [BaseTokenizer().decode(row[30:32]) for row in rows[donors]]
    assert middle.count("GT") >= 0.9 * len(middle)

    data.flank_mutation = 0.0
    originals, targets = torch.stack(data.train_set.ids), data.train_set.targets
    for i in range(20):
        new = augmented[0, i]["inputs"]
        alike = originals[targets == targets[i]]
        kept = new == originals[i]
        # One end is its own up to the cut, the rest is another's of its class.
        cut = range(1, 60)
        own_left = [bool(kept[:c].all() and (new[c:] == alike[:, c:]).all(1).any()) for c in cut]
        own_right = [bool(kept[c:].all() and (new[:c] == alike[:, :c]).all(1).any()) for c in cut]
        assert any(own_left) or any(own_right)


def test_splice_numbers_in_the_guide_are_the_recorded_ones():
    root = Path(__file__).parent.parent
    guide = (root / "docs/genomics.md").read_text(encoding="utf-8")
    recorded = json.loads((root / "benchmarks/results/genomics_splice.json").read_text())
    seeds = [f"{recorded['accuracy_by_seed'][seed]:.4f}" for seed in "012"]
    assert f"{', '.join(seeds)} (mean {recorded['mean_accuracy']:.4f})" in guide
    for name, accuracy in recorded["baselines"].items():
        assert f"| {name} | {accuracy:.4f} |" in guide


# Tables and folders


def test_a_table_of_classes_labels_and_values(tmp_path):
    path = tmp_path / "t.tsv"
    rows = [f"{dna(50)}\t{i % 2}\t{i / 8}\t{'ab'[i % 2]}" for i in range(60)]
    path.write_text("sequence\tx\ty\tclass\n" + "\n".join(rows) + "\n")
    data = SequenceTable(str(path), targets=["class"], reverse_complement=1.0)
    data.setup("fit")
    assert data.labels == ["a", "b"]
    assert sum(map(len, (data.train_set, data.val_set, data.test_set))) == 60
    sample = data.train_set[0]
    turned = data.augment(sample)["inputs"]
    assert torch.equal(BaseTokenizer().reverse_complement(turned), sample["inputs"])
    assert set(data.baselines()["5-mer logistic regression"]) == {"accuracy", "macro_f1"}
    assert data.leakage()["test"]["identical_to_train"] == 0
    multi = SequenceTable(str(path), targets=["x"], kind="multilabel")
    multi.setup("fit")
    assert multi.train_set[0]["targets"].dtype == torch.float32
    values = SequenceTable(str(path), targets=["x", "y"], kind="values")
    values.setup("fit")
    assert values.train_set[0]["targets"].shape == (2,)
    for options, words in (
        ({"targets": ["x", "x"], "kind": "values"}, r"data\.targets: 'x' comes more than once"),
        ({"targets": ["z"]}, "no column 'z'; it has sequence, x, y, class"),
        ({"targets": ["class"], "kind": "values"}, "t.tsv:2: class is 'a', expected a number"),
        ({"targets": ["y"], "kind": "multilabel"}, "y is '0.125', expected 0 or 1"),
        ({"targets": ["class"], "part": "class"}, "class is 'a', expected train, val or test"),
        (
            {"targets": ["class"], "mutation": 0.1, "tokenizer": {"kind": "kmer"}},
            "needs base tokens",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            SequenceTable(str(path), **options).setup("fit")
    for row, words in (("\t1\t1\ta", "the sequence is empty"), ("ACGT\t1\t1\t", "class is empty")):
        path.write_text("sequence\tx\ty\tclass\n" + "\n".join(rows) + f"\n{row}\n")
        with pytest.raises(UnreadableInput, match=rf"t\.tsv:62: {words}"):
            SequenceTable(str(path), targets=["class"]).setup("fit")


@pytest.mark.parametrize("kind", ["bpe", "kmer", "base"])
def test_the_other_strand_is_made_before_tokens_are_cut(annotated, kind):
    tokenizer = {
        "bpe": BytePairTokenizer.train([dna(500) for _ in range(4)], 40).to_dict(),
        "kmer": {"kind": "kmer", "k": 3, "overlapping": False},
        "base": {"kind": "base"},
    }[kind]
    tokens = build_tokenizer(tokenizer)
    table = annotated / "t.csv"
    rows = [f"{dna(31)}NAc,{'ab'[i % 2]},{PARTS[i % 3]}" for i in range(12)]
    table.write_text("\n".join(["sequence,class,part", *rows]))
    path = annotated / "soft.fa"
    path.write_text(f">c\n{dna(999)}{dna(1000).lower()}NN{dna(1999)}\n")
    options = {"tokenizer": tokenizer, "reverse_complement": 1.0}
    text = GenomeText(paths=[str(path)], window=500, soft_mask_weight=0.1, **options)
    for data in (SequenceTable(str(table), targets=["class"], part="part", **options), text):
        data.setup("fit")
        samples = list(data.train_set)
        for sample in samples:
            turned = data.augment(sample)
            other = reverse_complement(sample["sequence"])
            assert torch.equal(turned["inputs"], tokens.encode(other))
            if "weights" in sample:
                expected = torch.where(tokens.soft_mask(other), 0.1, 1.0)
                known = turned["weights"] > 0
                assert torch.equal(turned["weights"][known], expected[known])
                assert not known.all() or "N" not in other
        data.preprocessing.collate(samples)


def test_data_and_adapter_read_the_same_tokens(tmp_path):
    data = SequenceTable(str(tmp_path / "t.csv"), targets=["y"])
    model = torch.nn.Module()
    model.adapter = TokenEmbedding(8)
    data.prepare_model(model)
    model.adapter = TokenEmbedding(8, tokenizer={"kind": "kmer", "k": 3})
    for other in (data, GenomeText(paths=["g.fa"])):
        with pytest.raises(ValueError, match=r"kmer of 66 ids, and data\.tokenizer base of 16"):
            other.prepare_model(model)


def test_genomic_benchmarks_folders(tmp_path):
    for part, count in (("train", 20), ("test", 5)):
        for label in ("negative", "positive"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.txt").write_text(dna(80), encoding="utf-8-sig")
    data = GenomicBenchmarks(str(tmp_path), split=SplitConfig(shares=(0.8, 0.2, 0.0)))
    data.setup("fit")
    assert data.labels == ["negative", "positive"]
    assert [len(s) for s in (data.train_set, data.val_set, data.test_set)] == [32, 8, 10]
    with pytest.raises(ValueError, match="has no folder train"):
        GenomicBenchmarks(str(tmp_path / "train")).setup("fit")


# Annotated genomes


def gene(strand="+"):
    return Feature(
        contig="c", start=10, end=40, strand=strand, blocks=((10, 17), (25, 40)), name="g"
    )


def test_labels_lie_at_their_bases():
    columns = label_names(TARGETS)
    plus = paint([gene()], 0, 50, TARGETS)
    where = {name: np.flatnonzero(plus[:, i]).tolist() for i, name in enumerate(columns)}
    assert where["donor+"] == [17]
    assert where["acceptor+"] == [24]
    assert where["intron+"] == list(range(17, 25))
    assert where["start+"] == [10]
    assert where["stop+"] == [39]
    assert where["codon1+"] == [10, 13, 16, 27, 30, 33, 36, 39]
    assert where["codon2+"] == [11, 14, 25, 28, 31, 34, 37]
    assert not plus[:, len(columns) // 2 :].any()
    # A gene on the other strand of the reversed genome has the reversed labels, halves swapped.
    mirrored = Feature(
        contig="c", start=10, end=40, strand="-", blocks=((10, 25), (33, 40)), name="g"
    )
    minus = paint([mirrored], 0, 50, TARGETS)
    np.testing.assert_array_equal(np.roll(minus[::-1], len(columns) // 2, 1), plus)
    np.testing.assert_array_equal(paint([gene()], 15, 30, TARGETS), plus[15:30])


def test_codons_begin_at_the_phase_and_incomplete_genes_have_no_start():
    columns = label_names(TARGETS)
    part = replace(gene(), attributes={"phase": "2"}, has_stop=False)
    labels = paint([part], 0, 50, TARGETS)
    where = {name: np.flatnonzero(labels[:, i]).tolist() for i, name in enumerate(columns)}
    assert where["codon2+"][0] == 10
    assert where["codon1+"] == [12, 15, 26, 29, 32, 35, 38]
    assert where["start+"] == where["stop+"] == []


@pytest.fixture
def annotated(tmp_path):
    sequence = dna(5000)
    (tmp_path / "g.fa").write_text(f">c\n{sequence}\n")
    lines = [
        f"c\t{at}\t{at + 90}\tg{i}\t0\t{'+-'[i % 2]}\t{at}\t{at + 90}\t0\t2\t30,40\t0,50"
        for i, at in enumerate(range(200, 4800, 200))
    ]
    (tmp_path / "train.bed").write_text("\n".join(lines[:18]) + "\n")
    (tmp_path / "test.bed").write_text("\n".join(lines[18:]) + "\n")
    return tmp_path


def test_labels_are_known_within_genes_only(annotated):
    data = AnnotatedGenome(
        genome=str(annotated / "g.fa"),
        annotation=str(annotated / "train.bed"),
        test_annotation=str(annotated / "test.bed"),
        targets=["donor", "intron"],
        known="genes",
        window=64,
        margin=20,
        shift=10,
        val_share=0.4,
        reverse_complement=1.0,
        exclude=["g2"],
    )
    data.setup("fit")
    assert {name: len(regions) for name, regions in data.regions.items()} == {
        "train": 9, "val": 8, "test": 5,
    }  # fmt: skip
    assert "g2" not in {r.name for regions in data.regions.values() for r in regions}
    for part in (data.val_set, data.test_set):
        for sample, window in zip(part, part.windows, strict=True):
            known = ~sample["targets"].isnan().any(1).numpy()
            place = np.arange(window.start, window.end)
            first, last = window.known
            np.testing.assert_array_equal(known, (place >= first) & (place < last))
            assert len(sample["inputs"]) == 64
    sample = data.train_set[0]
    turned = data.augment(sample)
    back, labels = data._turned(turned["inputs"], turned["targets"])
    assert torch.equal(back, sample["inputs"])
    torch.testing.assert_close(labels, sample["targets"], equal_nan=True)
    short = {key: value[:40] for key, value in turned.items()}
    batch = data.preprocessing.collate([sample, short])
    assert batch["targets"].shape == (2, 64, 4)
    assert batch["targets"][1, 40:].isnan().all()
    assert batch["mask"].sum(1).tolist() == [64, 40]


def test_training_windows_of_short_genes_begin_anywhere_too(annotated):
    data = AnnotatedGenome(
        genome=str(annotated / "g.fa"),
        annotation=str(annotated / "train.bed"),
        test_annotation=str(annotated / "test.bed"),
        targets=["donor"],
        known="genes",
        window=512,  # a gene of 90 bases with its margins is one window
        margin=20,
        shift=10,
    )
    data.setup("fit")
    torch.manual_seed(0)
    samples = [data.train_set[1] for _ in range(200)]
    assert {len(sample["inputs"]) for sample in samples} == {130}
    starts = [int((~sample["targets"].isnan()).any(1).nonzero()[0]) for sample in samples]
    assert set(starts) == set(range(10, 31))
    texts = [BaseTokenizer().decode(s["inputs"]) for s in samples]
    assert len({text[at : at + 90] for text, at in zip(texts, starts, strict=True)}) == 1
    whole = data.val_set[0]
    assert torch.equal(whole["inputs"], data.val_set[0]["inputs"])


def test_decoys_are_shuffled_stretches_without_labels(annotated):
    data = AnnotatedGenome(
        genome=str(annotated / "g.fa"),
        annotation=str(annotated / "train.bed"),
        targets=["cds"],
        test_regions=["c:4,001-5,000"],
        window=2000,
        decoys=1.0,
    )
    data.setup("fit")
    torch.manual_seed(0)
    lengths, plain = [], data.train_set[0]
    for _ in range(10):
        decoy = data.augment(plain)
        changed = np.flatnonzero((decoy["inputs"] != plain["inputs"]).numpy())
        first, last = changed[0], changed[-1] + 1
        lengths.append(last - first)
        assert changed.size > 0.6 * (last - first)  # of the bases, a quarter stays by chance
        for at in range(first, last - 100, 50):
            counts = [s["inputs"][at : at + 50].bincount(minlength=8) for s in (plain, decoy)]
            assert (counts[0] - counts[1]).abs().max() < 20  # blocks may begin elsewhere
        assert torch.equal(plain["targets"].isnan(), decoy["targets"].isnan())
        assert decoy["targets"][first:last].nansum() == 0
        outside = torch.ones(2000, dtype=torch.bool)
        outside[max(first - 3, 0) : last + 3] = False  # whose ends may be as they were
        torch.testing.assert_close(
            decoy["targets"][outside], plain["targets"][outside], equal_nan=True
        )
    assert 200 < min(lengths) < max(lengths) <= 1000
    assert torch.equal(data.train_set[0]["inputs"], plain["inputs"])
    with pytest.raises(ValueError, match=r"data\.decoys is 2"):
        AnnotatedGenome(annotation="x", targets=["cds"], test_regions=["c:1-9"], decoys=2)


def test_a_whole_genome_is_split_by_region(annotated):
    data = AnnotatedGenome(
        genome=str(annotated / "g.fa"),
        annotation=str(annotated / "train.bed"),
        targets=["cds"],
        test_regions=["c:4,001-5,000"],
        exclude=["g0"],
        window=500,
    )
    data.setup("fit")
    seen = np.zeros((3, 5000), int)
    for row, part in enumerate((data.train_set, data.val_set, data.test_set)):
        for window in part.windows:
            seen[row, max(window.start, window.known[0]) : min(window.end, window.known[1])] = 1
    assert seen.sum(0).max() == 1
    assert seen[2, 4000:].all()
    assert seen[1].sum() == pytest.approx(400, abs=10)
    assert not seen[:, 200:230].any()  # the first block of g0
    for options, words in (
        ({"test_regions": ["d"]}, "no contig 'd'"),
        ({"exclude": ["nope"]}, "has \\['nope'\\]"),
        ({"test_regions": ["c:1-9,000"]}, "c has the bases 1-5,000"),
    ):
        with pytest.raises(ValueError, match=words):
            AnnotatedGenome(
                **{
                    "genome": str(annotated / "g.fa"),
                    "annotation": str(annotated / "train.bed"),
                    "targets": ["cds"],
                    "test_regions": ["c:4,001-5,000"],
                    **options,
                }
            ).setup("fit")
    with pytest.raises(ValueError, match=r"either data\.test_annotation or"):
        AnnotatedGenome(annotation="x", targets=["cds"])


@pytest.mark.parametrize(
    ("text", "regions"),
    [
        ("c:4,001-4,500", [("c", 4000, 4500)]),
        ('["c:4,001-4,500", "c:4,601-4,700"]', [("c", 4000, 4500), ("c", 4600, 4700)]),
        ("[c:4001-4500]", [("c", 4000, 4500)]),
    ],
)
def test_regions_on_the_command_line(annotated, text, regions):
    words = [f"--data.paths=[{annotated / 'g.fa'}]", "--data.exclude=null", "--data.window=100"]
    recipe, _ = recipes.read(shipped()["genomics/pretrain"], [*words, "--data.test_regions", text])
    recipe.data.setup("fit")
    assert [(r.contig, r.start, r.end) for r in recipe.data.regions["test"]] == regions


def test_genes_of_no_strand_are_refused(annotated):
    (annotated / "bare.bed").write_text("c\t10\t40\tg\nc\t50\t80\th\n")
    data = AnnotatedGenome(
        genome=str(annotated / "g.fa"),
        annotation=str(annotated / "bare.bed"),
        targets=["cds"],
        test_regions=["c:4,001-5,000"],
    )
    with pytest.raises(ValueError, match=r"bare\.bed:1: 2 coding regions, g say, are on no strand"):
        data.setup("fit")


def test_text_of_genomes_keeps_held_out_bases_unseen(annotated):
    lower = annotated / "soft.fa"
    lower.write_text(">c\n" + dna(1000) + dna(1000).lower() + "N" * 100 + dna(2900) + "\n")
    data = GenomeText(
        paths=[str(lower)],
        window=300,
        shift=100,
        soft_mask_weight=0.1,
        exclude=str(annotated / "test.bed"),
        exclude_margin=10,
        held_share=0.1,
        reverse_complement=1.0,
    )
    data.setup("fit")
    assert data.labels == []
    weights = torch.cat([s["weights"] for s in data.train_set])
    assert sorted(set(weights.tolist())) == pytest.approx([0, 0.1, 1])
    for part in PARTS:
        for region in data.regions[part]:
            for line in (annotated / "test.bed").read_text().splitlines():
                start, end = map(int, line.split("\t")[1:3])
                assert region.end <= start - 10 or region.start >= end + 10
    for sample, window in zip(data.train_set, data.train_set.windows, strict=True):
        assert len(sample["inputs"]) <= window.known[1] - window.known[0]
    sample = data.train_set[2]
    turned = data.augment(sample)
    assert turned["inputs"].shape == turned["weights"].shape == (300,)


def test_leftovers_shorter_than_a_word_are_no_samples(tmp_path):
    genome, holes = tmp_path / "g.fa", tmp_path / "holes.bed"
    genome.write_text(f">a\n{dna(500)}\n>b\nACG\n")
    holes.write_text("a\t100\t200\na\t204\t300\n")
    options = {"paths": [str(genome)], "exclude": str(holes), "held_share": 0.2}
    data = GenomeText(tokenizer={"kind": "kmer", "k": 6}, window=50, **options)
    data.setup("fit")
    samples = [s for part in (data.train_set, data.val_set, data.test_set) for s in part]
    assert min(len(sample["inputs"]) for sample in samples) >= 1
    assert sum(len(region) for part in PARTS for region in data.regions[part]) == 300
    with pytest.raises(ValueError, match=r"data\.window is 5, expected at least the 6"):
        GenomeText(tokenizer={"kind": "kmer", "k": 6}, window=5, **options)


def test_records_that_cannot_be_read_leave_no_answers_behind(annotated, monkeypatch, capsys):
    monkeypatch.chdir(annotated)
    Path("bad.fa").write_text(">a\nMKLV\n")
    Path("kept.csv").write_text("of an earlier run\n")
    data = ["--data.paths=[g.fa]", "--data.exclude=null", "--data.window=500", "--data.shift=0"]
    assert main(["train", "genomics/pretrain", "--run", "base", *SMALL, *data]) == 0
    for output in ("new.csv", "kept.csv"):
        assert main(["predict", "base", "bad.fa", "--output", output]) == 1
    assert "bad.fa:2: a:3: 'L' is no IUPAC code" in capsys.readouterr().err
    assert not Path("new.csv").exists()
    assert Path("kept.csv").read_text() == "of an earlier run\n"


def test_coverage_is_binned_where_it_was_measured(tmp_path):
    (tmp_path / "g.fa").write_text(f">c\n{dna(1000)}\n")
    (tmp_path / "t.wig.gz").write_bytes(
        gzip.compress(b"fixedStep chrom=c start=101\n" + b"\n".join(b"%d" % i for i in range(600)))
    )
    data = Coverage(
        genome=str(tmp_path / "g.fa"),
        tracks=[str(tmp_path / "t.wig.gz")],
        regions=["c:101-900"],
        test_regions=["c:701-900"],
        held_share=0.25,
        window=64,
        bin_size=8,
    )
    data.setup("fit")
    assert data.labels == ["t"]
    for part in (data.train_set, data.val_set, data.test_set):
        for sample, window in zip(part, part.windows, strict=True):
            start = window.start - 100
            expected = np.arange(start, start + len(sample["inputs"]), dtype=np.float32)
            expected[expected >= 600] = 0
            means = expected.reshape(-1, 8).mean(1)
            np.testing.assert_allclose(sample["targets"][:, 0], means)
    with pytest.raises(ValueError, match=r"held_share is 0, expected between"):
        Coverage(genome="g.fa", tracks=["t.wig"], held_share=0)
    for options, words in (
        ({"tracks": ["a/t.wig", "b/t.wig"]}, r"data\.names \(null, from data\.tracks\): 't' comes"),
        ({"tracks": ["a.wig", "b.wig"], "names": ["t", "t"]}, r"data\.names: 't' comes more than"),
    ):
        with pytest.raises(ValueError, match=words):
            Coverage(genome="g.fa", **options)
    assert data.baselines()["training mean"]["mae"] > 0
    assert [r.end - r.start for r in data.regions["test"]] == [200]


@pytest.mark.parametrize("known", ["all", "genes"])
def test_copies_of_training_regions_are_counted(tmp_path, known):
    once, twice = dna(3000), dna(4000)
    near = reverse_complement("AC" + mutated(twice, range(50, 4000, 100)))  # cut elsewhere
    contigs = {"a": once, "b": twice + "N" * 2000, "c": near, "d": dna(3000) + "N" * 2000}
    fasta = "".join(f">{name}\n{text}\n" for name, text in contigs.items())
    (tmp_path / "g.fa").write_text(fasta)
    genes = "".join(f"{name}\t0\t{len(t)}\t{name}\t0\t+\n" for name, t in contigs.items())
    (tmp_path / "g.bed").write_text(genes)
    data = AnnotatedGenome(
        genome=str(tmp_path / "g.fa"),
        annotation=str(tmp_path / "g.bed"),
        targets=["cds"],
        known=known,
        test_regions=["c"],
        val_regions=["d"],
        window=1000,
    )
    data.setup("fit")
    report = data.leakage()
    assert report["test"]["overlapping_train"] == 0
    assert report["test"]["copies_of_train"] == report["test"]["windows_compared"] == 5
    assert report["val"]["copies_of_train"] == 0  # N is no copy of N
    assert report["val"]["windows_compared"] >= 3
    assert json.dumps(report)


def test_regions_that_overlap_are_of_one_part(annotated):
    (annotated / "t.bedgraph").write_text("c\t0\t5000\t1\n")
    genome = str(annotated / "g.fa")
    tracks = {"genome": genome, "tracks": [str(annotated / "t.bedgraph")], "window": 64}
    data = Coverage(**tracks, regions=["c:1-3,000", "c:2,001-3,000"])
    data.setup("fit")
    assert sum(len(r) for regions in data.regions.values() for r in regions) == 3000
    both = {"test_regions": ["c:1-1,000"], "val_regions": ["c:901-2,000"]}
    annotation = {"annotation": str(annotated / "train.bed"), "targets": ["cds"]}
    for data in (
        Coverage(**tracks, **both),
        GenomeText(paths=[genome], **both),
        AnnotatedGenome(genome=genome, **annotation, **both),
    ):
        with pytest.raises(ValueError, match=r"overlap at c:901-1,000; a base is of one part"):
            data.setup("fit")
    with pytest.raises(ValueError, match=r"data\.reverse_complement is 3"):
        AnnotatedGenome(genome=genome, **annotation, **both, reverse_complement=3)


# Preprocessing and a RUN


def test_records_of_files_are_inputs(tmp_path):
    fasta, fastq = tmp_path / "a.fa", tmp_path / "b.fastq"
    fasta.write_text(">x y\nACGT\n>z\nGGNCC\n")
    fastq.write_text("@r\nACG\n+\nIII\n")
    prepare = DNAPreprocessing()
    items = prepare.find(str(tmp_path))
    assert items == [f"{fasta}#x", f"{fasta}#z", f"{fastq}#1:r"]
    rows = [prepare(item) for item in items]
    assert [BaseTokenizer().decode(row) for row in rows] == ["ACGT", "GGNCC", "ACG"]
    batch = prepare.collate([{"inputs": row} for row in rows])
    assert batch["mask"].sum(1).tolist() == [4, 5, 3]
    assert "mask" not in prepare.collate([{"inputs": rows[0]}] * 2)
    with pytest.raises(UnreadableInput, match="has no record 'q'"):
        prepare(f"{fasta}#q")
    with pytest.raises(ValueError, match=r"none\.fa does not exist"):
        prepare.find(str(tmp_path / "none.fa"))


def test_a_run_of_splice_predicts_as_it_was_trained(tmp_path):
    overrides = ["--trainer.max_epochs=2", "--optimizer.warmup_epochs=0.5", "--data.batch_size=512",
                 "--model.backbone.n_layer=1", "--model.backbone.d_model=16",
                 "--model.backbone.headdim=16", "--model.backbone.d_state=4",
                 "--trainer.accelerator=cpu"]  # fmt: skip
    metrics = runs.train(shipped()["genomics/splice"], tmp_path / "run", overrides)
    assert set(metrics["baselines"]) == {"RBF-SVM", "500-tree forest", "logistic regression"}
    leakage = json.loads((tmp_path / "run" / "leakage.json").read_text())
    assert leakage["test"]["identical_to_train"] == 0
    predictor = load(tmp_path / "run", device="cpu")
    recipe, _ = recipes.read(tmp_path / "run" / "config.yaml")
    recipe.data.setup("test")
    sequences = recipe.data.parts["test"][0]
    answers = predictor.predict([Seq(s) for s in sequences])
    labels = [predictor.labels[t] for t in recipe.data.parts["test"][1]]
    accuracy = np.mean([a["label"] == b for a, b in zip(answers, labels, strict=True)])
    assert accuracy == pytest.approx(metrics["test"]["accuracy"], abs=1e-6)
    assert predictor.embed([Seq(sequences[0])]).shape == (1, 16)


SMALL = ["--model.backbone.n_layer=1", "--model.backbone.d_model=16", "--model.backbone.headdim=8",
         "--model.backbone.d_state=4", "--trainer.accelerator=cpu", "--trainer.precision=fp32",
         "--trainer.max_epochs=1", "--optimizer.warmup_epochs=0"]  # fmt: skip


BYTE_PAIRS = """
description: a table in byte pairs
data:
  class_path: mamba2_apps.genomics.data.SequenceTable
  init_args:
    path: t.csv
    targets: [class]
    part: part
    tokenizer: {kind: bpe, path: bpe.json}
model:
  class_path: mamba2_apps.genomics.models.DNAModel
  init_args:
    adapter:
      class_path: mamba2_apps.genomics.adapter.TokenEmbedding
      init_args:
        tokenizer: {kind: bpe, path: bpe.json}
    backbone: {d_model: 16, n_layer: 1, d_state: 4, headdim: 8, bidirectional: true}
    head: mamba2_apps.heads.PooledHead
task: mamba2_apps.tasks.Classification
optimizer: {warmup_epochs: 0}
trainer: {max_epochs: 1}
"""


def test_a_run_of_byte_pairs_needs_their_file_no_more(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokens = BytePairTokenizer.train([dna(500) for _ in range(4)], 40)
    tokens.save("bpe.json")
    rows = [f"{dna(40)},{'ab'[i % 2]},{PARTS[i % 3]}" for i in range(12)]
    Path("t.csv").write_text("\n".join(["sequence,class,part", *rows]))
    Path("pairs.yaml").write_text(BYTE_PAIRS)
    assert main(["train", "pairs.yaml", "--run", "run", "--trainer.accelerator=cpu"]) == 0
    Path("bpe.json").unlink()
    predictor = load("run", device="cpu")
    assert predictor.preprocessing.tokens == predictor.task.model.adapter.tokenizer == tokens
    assert predictor.predict([Seq("ACGTTGCA")])[0]["label"] in ("a", "b")
    with pytest.raises(ValueError, match=r"tokenizer bpe: path is bpe\.json: .*No such file"):
        recipes.read(Path("pairs.yaml"))


def test_genes_are_trained_and_a_genome_is_predicted_on_the_command_line(
    annotated, monkeypatch, capsys
):
    monkeypatch.chdir(annotated)
    pretrained = ["--data.paths=[g.fa]", "--data.exclude=test.bed", "--data.window=500",
                  "--data.shift=50", "--data.held_share=0.2"]  # fmt: skip
    assert main(["train", "genomics/pretrain", "--run", "base", *SMALL, *pretrained]) == 0
    data = ["--data.genome=g.fa", "--data.annotation=train.bed", "--data.test_annotation=test.bed",
            "--data.window=128", "--data.margin=10", "--data.shift=5",
            "--data.val_share=0.4"]  # fmt: skip
    words = ["train", "genomics/genes", "--run", "genes", "--backbone", "base", *SMALL, *data]
    assert main(words) == 0
    leakage = json.loads(Path("genes/leakage.json").read_text())
    assert leakage["test"]["overlapping_train"] == 0
    options = ["--window=1000", "--overlap", "100", "--threshold", "0.0001", "--label=[intron+]"]
    assert main(["predict", "genes", "g.fa", "--output", "o.BED", *options]) == 0
    (feature,) = read_bed("o.BED")  # nothing is below such a threshold
    assert (feature.start, feature.end, feature.strand, feature.name) == (0, 5000, "+", "intron")
    assert main(["predict", "genes", "g.fa", "--output", "o.bedgraph", "--labels=x"]) == 2
    assert "--label" in capsys.readouterr().err
    assert not list(Path().glob(".o*"))


@pytest.mark.parametrize("name", ["genes", "bacterial-cds", "pretrain", "genomic-benchmarks"])
def test_missing_data_are_named(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", f"genomics/{name}", "--run", "r"]) == 2
    error = capsys.readouterr().err
    assert "data/" in error or "genomic_benchmarks/" in error
    assert error.count("\n") == 1
