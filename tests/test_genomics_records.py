"""Readers and writers of genomics: coordinates, strands, round trips, and what is refused."""

import codecs
import gzip
import pickle

import numpy as np
import pytest
from Bio import SeqIO, bgzf
from Bio.Seq import Seq
from Bio.SeqFeature import CompoundLocation, SeqFeature, SimpleLocation
from Bio.SeqRecord import SeqRecord
from hypothesis import given
from hypothesis import strategies as st

from mamba2_apps.data import UnreadableInput
from mamba2_apps.genomics.annotations import (
    coding_part,
    genbank_genome,
    joined,
    read_bed,
    read_features,
    read_genbank,
    write_bed,
)
from mamba2_apps.genomics.data import read_table
from mamba2_apps.genomics.fasta import Genome, is_bgzip, read_fasta, read_fastq
from mamba2_apps.genomics.intervals import Feature, parse_region, place
from mamba2_apps.genomics.sequences import IUPAC, reverse_complement
from mamba2_apps.genomics.tracks import TrackWriter, read_track
from mamba2_apps.genomics.variants import VariantFile, write_vcf_header, write_vcf_line

SEQUENCES = {
    "one": "ACGTNacgtnRYKM" * 9 + "AC",
    "two": "GGGCCCaaattt" * 5,
    "three": "T",
}


def fasta_text(end="\n", width=10):
    lines = []
    for name, sequence in SEQUENCES.items():
        lines.append(f">{name} a note")
        lines += [sequence[i : i + width] for i in range(0, len(sequence), width)]
    return end.join(lines) + end


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture
def genome(tmp_path):
    return Genome(write(tmp_path / "genome.fa", fasta_text()))


@pytest.mark.parametrize(
    "kind",
    ["plain", "windows", "gz", "bgz", "no last newline", "byte order mark", "gz, byte order mark"],
)
def test_a_genome_is_read_anywhere(tmp_path, kind):
    path = tmp_path / "g.fa"
    data = fasta_text("\r\n" if kind == "windows" else "\n").encode()
    if kind.endswith("byte order mark"):
        data = codecs.BOM_UTF8 + data
    if kind.startswith("gz"):
        write(path, gzip.compress(data))
    elif kind == "bgz":
        with bgzf.BgzfWriter(str(path)) as file:
            for start in range(0, len(data), 50):  # many blocks
                file.write(data[start : start + 50])
                file.flush()
        assert is_bgzip(path)
    else:
        write(path, data.rstrip() if kind == "no last newline" else data)
    genome = pickle.loads(pickle.dumps(Genome(path)))
    assert dict(genome) == {name: len(s) for name, s in SEQUENCES.items()}
    for name, sequence in SEQUENCES.items():
        assert genome.fetch(name) == sequence
        for start in range(len(sequence)):
            assert genome.fetch(name, start, start + 1) == sequence[start]
            end = min(start + 23, len(sequence))
            assert genome.fetch(name, start, end) == sequence[start:end]
    records = list(read_fasta(path))
    assert {r.name: r.sequence for r in records} == SEQUENCES
    assert records[0].description == "a note"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (">a\nACGT\nMKVLE\n", r"g.fa:3: a:.*'L' is no IUPAC code.*protein"),
        (">a\nACGU\n", "'U' is no IUPAC code.*RNA"),
        (">a\nAC\n>b\nAC\n>a\nGG\n", "g.fa:5: the name 'a' was already used at line 1"),
        (">a\nAC\n>b\n>c\nAC\n", "g.fa:3: the record 'b' is empty"),
        (">a\nAC\n>b\n", "g.fa:3: the record 'b' is empty"),
        ("ACGT\n", "g.fa:1: no FASTA"),
        ("", "holds no FASTA record"),
        (">\nAC\n", "g.fa:1: a record without a name"),
        (">a x\nAC\n>a\ty\nAC\n", "g.fa:3: the name 'a' was already used at line 1"),
    ],
)
def test_a_wrong_fasta_is_named_by_line(tmp_path, text, words):
    path = write(tmp_path / "g.fa", text)
    with pytest.raises(ValueError, match=words.replace("a:.*", ".*")):
        list(read_fasta(path))
    with pytest.raises(UnreadableInput, match=words):
        Genome(path)


def test_other_files_that_are_no_genome(tmp_path):
    ragged = write(tmp_path / "r.fa", ">a\nACGT\nAC\nACGT\n")
    with pytest.raises(UnreadableInput, match=r"r\.fa:3: the lines of 'a' have different lengths"):
        Genome(ragged)
    assert next(read_fasta(ragged)).sequence == "ACGTACACGT"
    lines = np.random.default_rng(0).choice(list("ACGT"), (20000, 20))
    data = gzip.compress((">a\n" + "\n".join("".join(line) for line in lines)).encode())
    cut = write(tmp_path / "cut.fa.gz", data[: len(data) // 2])
    for read in (Genome, lambda path: list(read_fasta(path))):
        with pytest.raises(UnreadableInput, match=r"cut\.fa\.gz: .* truncated.* after line \d"):
            read(cut)
    with pytest.raises(UnreadableInput, match="does not exist"):
        Genome(tmp_path / "none.fa")


def test_a_small_file_that_was_cut_is_named_with_its_size(tmp_path):
    data = gzip.compress(b"one\t5\t9\n" * 30)[:12]
    with pytest.raises(UnreadableInput, match=rf"a\.bed\.gz: .* within its {len(data)} bytes"):
        read_features(write(tmp_path / "a.bed.gz", data))


def test_a_bgzip_file_that_was_cut_or_damaged_is_named(tmp_path):
    whole = tmp_path / "whole.fa.gz"
    with bgzf.BgzfWriter(str(whole)) as file:
        for piece in (">a\n", "ACGT\n" * 400, "GGTT\n" * 400):
            file.write(piece)
            file.flush()
    data = whole.read_bytes()
    with whole.open("rb") as file:
        starts = [start for start, *_ in bgzf.BgzfBlocks(file)]
    for size in {*starts[1:], *range(20, len(data), 7)}:
        cut = write(tmp_path / "cut.fa.gz", data[:size])
        for read in (Genome, lambda path: list(read_fasta(path))):
            with pytest.raises(
                UnreadableInput, match=rf"cut\.fa\.gz: truncated at byte {size:,}, "
            ):
                read(cut)
    first = starts[1]
    for wrong in (
        data[: first + 11] + data[first + 13 :],
        data[: starts[2] - 6] + data[starts[2] :],
    ):
        with pytest.raises(UnreadableInput, match=rf"bad\.fa\.gz: damaged .* after byte {first}"):
            Genome(write(tmp_path / "bad.fa.gz", wrong))
    assert Genome(whole)["a"] == 3200


def test_a_place_outside_is_named(genome):
    with pytest.raises(ValueError, match="no contig 'tow'; it has two"):
        genome.fetch("tow")
    with pytest.raises(ValueError, match="two:61-70 is not within two, which has 60 bases"):
        genome.fetch("two", 60, 70)


def test_reads_keep_their_quality(tmp_path):
    path = write(tmp_path / "r.fastq", "@a\tx\nACGT\n+\n!I5?\n@b\nGG\n+\nII\n")
    first, second = read_fastq(path)
    assert (first.name, first.sequence, first.description) == ("a", "ACGT", "x")
    assert first.quality.tolist() == [0, 40, 20, 30]
    assert second.name == "b"
    write(path, "@a\nACGT\n+\nIII\n")
    with pytest.raises(UnreadableInput, match=r"r\.fastq: after read 0"):
        list(read_fastq(path))
    write(path, "@a\nACGE\n+\nIIII\n")
    with pytest.raises(ValueError, match=r"read 1 \(a\): position 4: 'E'"):
        list(read_fastq(path))


def test_formats_agree_on_one_place(tmp_path, genome):
    """One minus-strand gene of two blocks, two:11-20 and two:31-50 counted from 1."""
    bed = write(
        tmp_path / "g.bed",
        "track name=x\ntwo\t10\t50\tg\t7\t-\t10\t50\t0\t2\t10,20,\t0,20,\n",
    )
    gff = write(
        tmp_path / "g.gff3",
        "##gff-version 3\n"
        "two\tx\tCDS\t31\t50\t7\t-\t0\tID=c;Parent=t%2C1;Name=g\n"
        "two\tx\tCDS\t11\t20\t7\t-\t0\tID=c;Parent=t%2C1;Name=g\n",
    )
    gtf = write(
        tmp_path / "g.gtf",
        'two\tx\tCDS\t31\t50\t7\t-\t0\tgene_id "g"; transcript_id "t";\n'
        'two\tx\tCDS\t11\t20\t7\t-\t0\tgene_id "g"; transcript_id "t";\n',
    )
    record = SeqRecord(Seq(SEQUENCES["two"].upper()), id="two", name="two")
    record.annotations["molecule_type"] = "DNA"
    parts = [SimpleLocation(30, 50, -1), SimpleLocation(10, 20, -1)]
    record.features = [SeqFeature(CompoundLocation(parts), "CDS", qualifiers={"gene": ["g"]})]
    SeqIO.write(record, tmp_path / "g.gbk", "genbank")
    found = [
        read_features(bed, genome),
        joined(read_features(gff, genome)),
        joined(read_features(gtf, genome)),
        joined(read_features(tmp_path / "g.gbk", genome)),
    ]
    for (feature,) in found:
        assert feature.contig == "two"
        assert (feature.start, feature.end, feature.strand) == (10, 50, "-")
        assert feature.blocks == ((10, 20), (30, 50))
        assert feature.gaps == ((20, 30),)
        assert feature.name == "g"
    ((first, _),) = read_genbank(tmp_path / "g.gbk")
    assert first.sequence == SEQUENCES["two"].upper()
    assert place("two", 10, 50) == "two:11-50"
    assert parse_region("two:11-50", genome) == ("two", 10, 50)
    assert parse_region("two", genome) == ("two", 0, 60)


def test_gff_as_tools_write_it(tmp_path):
    """Sequences below ##FASTA, quoted semicolons, several parents, and phases."""
    path = write(
        tmp_path / "a.gff3",
        "##gff-version 3\n"
        "one\tx\tCDS\t41\t50\t.\t-\t1\tID=c;Parent=t1,t%2C2\n"
        "one\tx\tCDS\t21\t30\t.\t-\t0\tID=b;Parent=t1\n"
        "one\tx\tCDS\t1\t9\t.\t-\t2\tID=a;Parent=t1,t%2C2\n"
        "##FASTA\n>one\nACGT\n",
    )
    both, other = joined(read_features(path))
    assert both.blocks == ((0, 9), (20, 30), (40, 50))
    assert other.blocks == ((0, 9), (40, 50))
    assert (both.phase, other.phase) == (1, 1)  # of what comes first on "-"
    gtf = 'one\tx\tCDS\t1\t9\t.\t+\t0\tgene_id "g"; note "x; y 5%20";transcript_id "t";\n'
    (feature,) = read_features(write(tmp_path / "a.gtf", gtf))
    assert feature.attributes["note"] == "x; y 5%20"
    assert feature.attributes["transcript_id"] == "t"
    with pytest.raises(UnreadableInput, match=r"a\.gtf:1: phase is '3'"):
        read_features(write(tmp_path / "a.gtf", gtf.replace("\t0\t", "\t3\t")))


CDS_LINE = "one\tx\tCDS\t{}\t{}\t.\t{}\t0\t{}\n"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # One ID is one feature, with or without a Parent.
        (
            [(1, 9, "+", "ID=a"), (21, 30, "+", "ID=a"), (41, 50, "+", "ID=b")],
            ["1-9 21-30", "41-50"],
        ),
        # Two products of one gene, as NCBI writes a programmed frameshift.
        (
            [
                (1, 60, "+", "ID=a;Parent=g"),
                (1, 30, "+", "ID=b;Parent=g"),
                (30, 35, "+", "ID=b;Parent=g"),
            ],
            ["1-60", "1-30 30-35"],
        ),
        # IDs of lines are no features; a frame that shifts back takes two bases twice.
        ([(1, 9, "+", "ID=a1;Parent=g"), (8, 30, "+", "ID=a2;Parent=g")], ["1-9 8-30"]),
    ],
)
def test_lines_of_gff_are_joined_into_coding_regions(tmp_path, lines, expected):
    text = "".join(CDS_LINE.format(*line) for line in lines)
    found = joined(read_features(write(tmp_path / "a.gff3", text)))
    assert [" ".join(f"{a + 1}-{b}" for a, b in f.blocks) for f in found] == expected


@pytest.mark.parametrize(
    ("strand", "lines", "expected"),
    [
        ("+", ["50\t70"], [(49, 60, 0, True, False), (0, 10, 1, False, True)]),
        ("-", ["50\t70"], [(49, 60, 2, False, True), (0, 10, 0, True, False)]),
        ("+", ["30\t38", "58\t63", "70\t75"], [(29, 60, 0, True, False), (0, 15, 0, False, True)]),
        ("+", ["62\t70"], [(1, 10, 0, True, True)]),
    ],
)
def test_a_gene_of_gff_goes_over_the_origin_of_a_circle(tmp_path, genome, strand, lines, expected):
    """As a GenBank feature does: see test_locations_of_genbank."""
    text = "two\tx\tregion\t1\t60\t.\t+\t.\tID=two;Is_circular={}\n"
    for span in lines:
        text += f"two\tx\tCDS\t{span}\t.\t{strand}\t0\tID=c;Parent=g\n"
    found = joined(read_features(write(tmp_path / "a.gff3", text.format("true")), genome))
    assert [(f.start, f.end, f.phase, f.has_start, f.has_stop) for f in found] == expected
    with pytest.raises(ValueError, match="runs beyond the end of two"):
        read_features(write(tmp_path / "a.gff3", text.format("false")), genome)


def test_a_gene_of_both_strands_has_none(tmp_path):
    lines = [(1, 9, "+", "ID=a;Parent=g"), (21, 30, "-", "ID=a;Parent=g")]
    text = "".join(CDS_LINE.format(*line) for line in lines)
    (feature,) = joined(read_features(write(tmp_path / "a.gff3", text)))
    assert feature.strand == "."


@pytest.mark.parametrize(
    ("stops", "blocks"),
    [
        (["28\t30"], ((0, 9), (20, 30))),
        (["26\t28"], ((0, 9), (20, 28))),  # in CDS already
        (["28\t28", "31\t32"], ((0, 9), (20, 28), (30, 32))),
    ],
)
def test_the_stop_codon_of_gtf_is_coding(tmp_path, stops, blocks):
    lines = [("CDS", "1\t9"), ("CDS", "21\t27" if "28" in stops[0][:2] else "21\t28")]
    lines += [("stop_codon", place) for place in stops]
    rest = '\t.\t+\t0\tgene_id "g"; transcript_id "t";\n'
    text = "".join(f"one\tx\t{kind}\t{place}{rest}" for kind, place in lines)
    (whole,) = joined(read_features(write(tmp_path / "a.gtf", text)))
    assert whole.blocks == blocks


def test_the_thick_part_of_bed_is_coding(tmp_path):
    line = "one\t0\t90\tg\t0\t+\t{}\t{}\t0\t3\t10,20,10\t0,30,80\n"
    path = write(tmp_path / "a.bed", line.format(35, 85) + line.format(0, 0))
    first, second = map(coding_part, read_bed(path))
    assert (first.start, first.end, first.blocks) == (35, 85, ((35, 50), (80, 85)))
    assert second is None
    with pytest.raises(UnreadableInput, match=r"a\.bed:1: thickStart is 35 and thickEnd 95"):
        list(read_bed(write(path, line.format(35, 95))))


def genbank(tmp_path, *locations, name="one", rest=""):
    features = "".join(f"     CDS             {x}\n{rest}" for x in locations)
    text = (
        f"LOCUS       {name}                 60 bp    DNA     circular BCT 01-JAN-2020\n"
        f"VERSION     {name}.1\nFEATURES             Location/Qualifiers\n{features}ORIGIN\n"
        f"        1 {' '.join(['acgtacgtac'] * 6)}\n//\n"
    )
    return write(tmp_path / "g.gbk", text)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("join(50..60,1..10)", [(49, 60, "+", 0, True, False), (0, 10, "+", 1, False, True)]),
        (
            "complement(join(50..60,1..10))",
            [(0, 10, "-", 0, True, False), (49, 60, "-", 2, False, True)],
        ),
        ("<1..9", [(0, 9, "+", 0, False, True)]),
        ("complement(<1..9)", [(0, 9, "-", 0, True, False)]),
        ("complement(5..>9)", [(4, 9, "-", 0, False, True)]),
        ("10^11", []),
    ],
)
def test_locations_of_genbank(tmp_path, location, expected):
    ((_, found),) = read_genbank(genbank(tmp_path, location, "1..60"))
    assert [
        (f.start, f.end, f.strand, f.phase, f.has_start, f.has_stop) for f in found[:-1]
    ] == expected


def test_other_things_of_genbank(tmp_path):
    start = " " * 21 + "/codon_start=3\n"
    ((_, (feature,)),) = read_genbank(genbank(tmp_path, "2..60", rest=start))
    assert feature.phase == 2
    with pytest.warns(UserWarning, match=r"partly in another record; left out"):
        ((_, found),) = read_genbank(genbank(tmp_path, "join(AB1.1:1..10,5..9)", "1..9"))
    assert len(found) == 1
    path = genbank(tmp_path, "1..9")
    write(path, path.read_text() * 2)
    with pytest.raises(UnreadableInput, match=r"an earlier record is named 'one' \(LOCUS\)"):
        genbank_genome(path)
    data = bytearray(gzip.compress(genbank(tmp_path, "1..9").read_bytes()))
    data[-6] ^= 1
    with pytest.raises(UnreadableInput, match="truncated or damaged"):
        list(read_genbank(write(tmp_path / "g.gbk.gz", bytes(data))))


def test_a_genbank_that_was_cut_or_lacks_a_place_is_named(tmp_path):
    path = genbank(tmp_path, "1..9")
    write(path, path.read_text()[:-20])
    with pytest.raises(
        UnreadableInput, match=r"g\.gbk: record one\.1 has 4\d bases, but 60 in its"
    ):
        list(read_genbank(path))
    for kept in (1, 2):  # records before the one that is cut
        data = "".join(genbank(tmp_path, "1..9", name=f"r{i}").read_text() for i in range(kept))
        data = gzip.compress((data + genbank(tmp_path, "1..9").read_text()).encode(), 0)
        with pytest.raises(UnreadableInput, match=f"truncated or damaged after record {kept}"):
            list(read_genbank(write(tmp_path / "g.gbk.gz", data[:-150])))
    path = genbank(tmp_path, "51..9", "1..9")
    write(path, path.read_text().replace("circular", "linear  "))
    with pytest.warns(UserWarning, match=r"record one\.1: .*'51\.\.9'.*the feature is left out$"):
        ((_, found),) = read_genbank(path)
    assert len(found) == 1
    with pytest.raises(UnreadableInput, match=r"after record 0: Problem .*join\(1\.\.5") as error:
        list(read_genbank(genbank(tmp_path, "join(1..5")))
    assert "\n" not in str(error.value)


def test_peaks_have_a_summit(tmp_path):
    path = write(tmp_path / "p.narrowPeak", "one\t4\t9\tp\t1\t.\t2.5\t-1\t-1\t3\n")
    (peak,) = read_features(path)
    assert peak.attributes["summit"] == "7"
    write(path, "one\t4\t9\tp\t1\t.\t2.5\t-1\t-1\t5\n")
    with pytest.raises(UnreadableInput, match="peak 5 is beyond"):
        read_features(path)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["one", "two"]),
            st.integers(0, 1000),
            st.lists(st.integers(1, 50), min_size=1, max_size=7),
            st.sampled_from("+-."),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_bed_comes_back_as_it_was(tmp_path_factory, rows):
    features = []
    for contig, start, widths, strand in rows:
        edges = (start + np.concatenate([[0], np.cumsum(widths)])).tolist()
        if len(edges) % 2:
            edges.pop()
        blocks = tuple(zip(edges[::2], edges[1::2], strict=True))
        features.append(
            Feature(
                contig=contig,
                start=blocks[0][0],
                end=blocks[-1][1],
                strand=strand,
                name="x",
                blocks=blocks,
                score=1.5,
            )
        )
    path = tmp_path_factory.mktemp("bed") / "x.bed"
    with path.open("w") as file:
        write_bed(features, file)
    for ours, again in zip(features, read_bed(path), strict=True):
        assert (again.contig, again.strand, again.blocks) == (ours.contig, ours.strand, ours.blocks)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.bed", "two\t50\t61\n", r"a\.bed:1: two:51-61 runs beyond the end of two.*60 bases"),
        ("a.bed", "two\t5\t5\n", "a.bed:1.*holds no base"),
        ("a.bed", "two\t5\tx\n", "a.bed:1: end is 'x', expected an integer"),
        ("a.bed", "two 5 6\n", "a.bed:1: 1 tab-separated fields, expected at least 3"),
        ("a.bed", "two\t5\t6\tn\t0\t*\n", r"a\.bed:1: strand is '\*'"),
        ("a.bed", "tree\t5\t6\n", "a.bed:1: the genome has no contig 'tree'; it has three"),
        ("a.bed", "", "holds no feature"),
        ("a.gff3", "two\tx\tCDS\t0\t5\t.\t+\t0\tID=a\n", "start is 0; GFF and GTF count from 1"),
        ("a.gff3", "two\tx\tCDS\t3\t5\t.\t+\t0\tID\n", "attribute 'ID' has no value"),
        ("a.txt", "x\n", "is no annotation file"),
        ("a.gbk", "hello\n", "holds no GenBank record"),
    ],
)
def test_a_wrong_annotation_is_named_by_line(tmp_path, genome, name, text, words):
    with pytest.raises(ValueError, match=words):
        read_features(write(tmp_path / name, text), genome)


def test_a_genbank_without_features_is_refused(tmp_path):
    records = [
        SeqRecord(Seq("ACGT"), id=name, name=name, annotations={"molecule_type": "DNA"})
        for name in "abc"
    ]
    SeqIO.write(records, tmp_path / "a.gbk", "genbank")
    with pytest.raises(UnreadableInput, match=r"a\.gbk: no record has features besides"):
        list(read_genbank(tmp_path / "a.gbk"))
    records[1].features = [SeqFeature(SimpleLocation(0, 3), type="CDS")]
    SeqIO.write(records, tmp_path / "a.gbk", "genbank")  # a draft, with contigs of no gene
    assert [len(found) for _, found in read_genbank(tmp_path / "a.gbk")] == [0, 1, 0]
    assert dict(genbank_genome(tmp_path / "a.gbk")) == {"a": 4, "b": 4, "c": 4}


def test_contigs_are_reconciled_only_with_a_warning(tmp_path, genome):
    path = write(tmp_path / "a.bed", "chrtwo\t5\t6\n")
    with pytest.warns(UserWarning, match="took chrtwo for two"):
        (feature,) = read_features(path, genome)
    assert feature.contig == "two"


def test_accessions_are_reconciled_whatever_their_version(tmp_path):
    with pytest.warns(UserWarning, match=r"took NC_1 for NC_1\.1$"):
        (feature,) = read_features(genbank(tmp_path, "1..9", name="NC_1"), {"NC_1.1": 60})
    assert feature.contig == "NC_1.1"
    bed = write(tmp_path / "a.bed", "".join(f"NC_{i}.1\t0\t5\n" for i in range(5)))
    with pytest.warns(UserWarning, match="NC_2 and 2 more$") as warned:
        read_features(bed, {f"NC_{i}": 60 for i in range(5)})
    assert len(warned) == 1
    for name, genome in (("NC_1", ["NC_1.1", "NC_1.2"]), ("NC_1.1", ["NC_1.2"]), ("s1.1", ["s1"])):
        with pytest.raises(ValueError, match=rf"a\.bed:1: the genome has no contig '{name}'"):
            read_features(write(bed, f"{name}\t0\t5\n"), dict.fromkeys(genome, 60))


VCF = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


def test_variants_are_checked_and_written_back(tmp_path, genome):
    # two is GGGCCCaaattt…: position 4 counted from 1 is the first C.
    lines = "two\t4\trs1\tC\tT,GA\t.\t.\t.\ntwo\t3\t.\tGC\tG,<DEL>\t5\tPASS\tDP=3\n"
    path = write(tmp_path / "v.vcf", VCF + lines)
    file = VariantFile(path, genome)
    first, second = file
    assert [(v.start, v.end, v.ref, v.alt) for v in first.variants] == [
        (3, 4, "C", "T"),
        (3, 4, "C", "GA"),
    ]
    assert second.variants[1] is None
    out = tmp_path / "o.vcf"
    with out.open("w") as target:
        write_vcf_header(file, {"S": "a score"}, target)
        write_vcf_line(first, {"S": [0.5, -1.25]}, target)
        write_vcf_line(second, {"S": [2.0, None]}, target)
    assert "##INFO=<ID=S,Number=A,Type=Float" in out.read_text()
    again = list(VariantFile(out, genome))
    assert again[0].fields[7] == "S=0.5,-1.25"
    assert again[1].fields[7] == "DP=3;S=2,."
    third = tmp_path / "again.vcf"
    with third.open("w") as target:
        write_vcf_header(VariantFile(out, genome), {"S": "another"}, target)
    assert third.read_text().count("ID=S,") == 1
    assert again[1].variants == [type(second.variants[0])("two", 2, "GC", "G", f"{out}:5"), None]


@pytest.mark.parametrize(
    ("code", "base"),
    [*zip("RYSWKMBDHVN", "ACCAGACAAAN", strict=True), *zip("AC", "AC", strict=True)],
)
def test_a_code_of_the_genome_is_its_first_base_in_a_vcf(tmp_path, code, base):
    genome = Genome(write(tmp_path / "g.fa", f">c\nTT{code.lower()}{code}G\n"))
    for ref in "ACGTN":
        path = write(tmp_path / "v.vcf", VCF + f"c\t3\t.\t{ref}{base}G\t{ref}\t.\t.\t.\n")
        if ref == base:
            assert len(list(VariantFile(path, genome))) == 1
        else:
            with pytest.raises(
                UnreadableInput, match=rf"REF is {ref}{base}G but .* has {code}{code}G"
            ):
                list(VariantFile(path, genome))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("two\t4\t.\tG\tT\t.\t.\t.", r"v\.vcf:3: REF is G but .*genome\.fa has C at two:4"),
        ("two\t60\t.\tTT\tT\t.\t.\t.", "v.vcf:3: two:60-61 is not within two"),
        ("two\t0\t.\tG\tT\t.\t.\t.", "v.vcf:3: .*is not within two"),
        ("two\tx\t.\tG\tT\t.\t.\t.", "v.vcf:3: POS is 'x'"),
        ("two\t1\t.\tE\tT\t.\t.\t.", "v.vcf:3: REF is 'E'"),
        ("six\t1\t.\tG\tT\t.\t.\t.", "v.vcf:3: the genome has no contig 'six'"),
        ("two\t1\t.\tG", "v.vcf:3: 4 tab-separated columns"),
    ],
)
def test_a_wrong_variant_is_named_by_line(tmp_path, genome, line, words):
    path = write(tmp_path / "v.vcf", VCF + line + "\n")
    with pytest.raises(UnreadableInput, match=words):
        list(VariantFile(path, genome))
    with pytest.raises(UnreadableInput, match="expected the tab-separated header"):
        VariantFile(write(path, line + "\n"), genome)


TEXTS = {
    "t.csv": ("sequence,y\nACGT,1\n", lambda path: read_table(str(path), ["sequence"])),
    "r.fastq": ("@a\nACGT\n+\n!I5?\n", read_fastq),
    "f.bed": ("one\t4\t9\n", read_features),
    "p.narrowPeak": ("one\t4\t9\tp\t1\t.\t2.5\t-1\t-1\t3\n", read_features),
    "f.gff3": ("one\tx\tCDS\t5\t9\t.\t+\t0\tID=a\n", read_features),
    "s.wig": (
        "fixedStep chrom=one start=1\n1\n2\n",
        lambda p: read_track(p, {"one": 2}, "one", 0, 2),
    ),
    "s.bedgraph": ("one\t0\t2\t5\n", lambda p: read_track(p, {"one": 2}, "one", 0, 2)),
}


@pytest.mark.parametrize("name", [*TEXTS, "v.vcf", "g.gbk"])
def test_a_byte_order_mark_is_no_text(tmp_path, genome, name):
    """Windows tools put one in front."""
    if name == "v.vcf":
        text, reader = VCF + "two\t4\t.\tC\tT\t.\t.\t.\n", lambda path: VariantFile(path, genome)
    elif name == "g.gbk":
        text, reader = genbank(tmp_path, "1..9").read_text(), read_genbank
    else:
        text, reader = TEXTS[name]
    path = write(tmp_path / name, text)
    plain = repr(list(reader(path)))
    path.write_text(text, encoding="utf-8-sig")
    assert repr(list(reader(path))) == plain


@pytest.mark.parametrize("kind", [".bedgraph", ".bw"])
def test_tracks_come_back_whatever_the_pieces(tmp_path, kind):
    if kind == ".bw":
        pytest.importorskip("pyBigWig")
    lengths = {"one": 300, "two": 100}
    rng = np.random.default_rng(0)
    values = {
        name: rng.integers(0, 3, n).repeat(1).astype(np.float32) for name, n in lengths.items()
    }
    values["one"][40:90] = 0.123456
    values["one"][100:110] = np.nan
    files = []
    for step in (7, 300):
        path = tmp_path / f"{step}{kind}"
        with TrackWriter(path, lengths, kind) as writer:
            for name, n in lengths.items():
                for start in range(0, n, step):
                    writer.add(name, start, values[name][start : start + step])
        files.append(path.read_bytes())
        for name, n in lengths.items():
            back = read_track(path, lengths, name, 0, n)
            np.testing.assert_allclose(back, values[name], rtol=1e-3)
            np.testing.assert_array_equal(read_track(path, lengths, name, 50, 80), back[50:80])
    if kind == ".bedgraph":
        assert files[0] == files[1]
        assert b"one\t40\t90\t0.1235\n" in files[0]


def test_a_big_wig_of_another_assembly_is_refused(tmp_path):
    pytest.importorskip("pyBigWig")
    path = tmp_path / "x.bw"
    with TrackWriter(path, {"one": 50}, ".bw") as writer:
        writer.add("one", 0, np.ones(5))
    for length in (40, 60):
        with pytest.raises(UnreadableInput, match=rf"x\.bw: one has 50 bases, but .* {length}; is"):
            read_track(path, {"one": length}, "one", 0, 30)
    with TrackWriter(path, {"one": 50}, ".bw") as writer:
        writer.add("one", 0, np.full(5, np.nan))
    assert np.isnan(read_track(path, {"one": 50}, "one", 0, 30)).all()


def test_wiggle_counts_from_1(tmp_path):
    path = write(
        tmp_path / "x.wig",
        "browser position x\ntrack type=wiggle_0\nvariableStep chrom=two span=2\n11 5\n20 6\n"
        "fixedStep chrom=two start=31 step=5\n1\n2\n",
    )
    values = read_track(path, {"two": 60}, "two", 0, 60)
    expected = np.full(60, np.nan)
    expected[[10, 11]], expected[[19, 20]], expected[30], expected[35] = 5, 6, 1, 2
    np.testing.assert_array_equal(values, expected)
    with pytest.raises(UnreadableInput, match=r"x\.wig:5: two:20-21 runs beyond"):
        read_track(path, {"two": 20}, "two", 0, 20)


@given(st.text(alphabet=IUPAC + IUPAC.lower(), max_size=60))
def test_the_reverse_complement_undoes_itself(sequence):
    other = reverse_complement(sequence)
    assert reverse_complement(other) == sequence
    assert other == str(Seq(sequence).reverse_complement())
