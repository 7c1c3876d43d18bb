"""Data in many files: tar shards, patterns of files, and genomes that stay on disk."""

import csv
import gzip
import io
import json
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from Bio import bgzf
from safetensors.torch import load_file

from mamba2_apps import runs
from mamba2_apps.audio.data import AudioData
from mamba2_apps.audio.decoding import read_audio, read_header
from mamba2_apps.audio.manifest import read_shards
from mamba2_apps.catalog import shipped
from mamba2_apps.data import DataModule, UnreadableInput
from mamba2_apps.genomics.fasta import Genome
from mamba2_apps.genomics.intervals import Feature
from mamba2_apps.genomics.pretraining import GenomeText
from mamba2_apps.genomics.regions import Windows, without
from mamba2_apps.shards import find_files, names_shards, read_index

RATE = 16000
FORMATS = {
    "wav": {"subtype": "PCM_16"},
    "flac": {"subtype": "PCM_16"},
    "mp3": {"subtype": "MPEG_LAYER_III"},
    "ogg": {"subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
}


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def noise(seed: int, seconds: float = 0.3, suffix: str = "wav", rate: int = RATE) -> bytes:
    samples = 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": suffix.upper(), **FORMATS[suffix]})
    return file.getvalue()


# Shards and patterns


def test_patterns_name_files_in_order(tmp_path):
    for name in ("a-8.tar", "a-9.tar", "a-10.tar", "b-08.tar", "b-09.tar", "[x].tar"):
        (tmp_path / name).touch()

    def found(pattern: str) -> list[str]:
        return [Path(path).name for path in find_files(pattern, tmp_path)]

    assert found("a-{8..10}.tar") == ["a-8.tar", "a-9.tar", "a-10.tar"]
    assert found("b-{08..09}.tar") == found("b-*.tar") == ["b-08.tar", "b-09.tar"]
    assert found("[x].tar") == ["[x].tar"]
    assert find_files(f"{tmp_path}/b-0[9].tar") == [str(tmp_path / "b-09.tar")]
    with pytest.raises(ValueError, match=r"holds no a-11\.tar; .* of a-\{8\.\.11\}\.tar"):
        found("a-{8..11}.tar")
    with pytest.raises(ValueError, match=r"\{9\.\.8\} counts down"):
        found("a-{9..8}.tar")
    assert names_shards("x/train-{000..127}.tar")
    assert not names_shards("x/tar.csv")


def test_a_shard_gives_each_key_its_files(tmp_path):
    path = write_shard(
        tmp_path / "s.tar",
        {
            "./b/1.seg.wav": b"by the first dot: another suffix",
            "./b/1.WAV": b"one",
            "./b/1.cls": b"4\n",
            "a/1.wav": b"other",
            "a/._1.wav": b"left by macOS",
            "a/notes": b"no suffix",
            "a/big.wav": bytes(range(256)) * 500,
        },
    )
    samples = read_index(str(path), (".wav",), (".cls",))
    assert [sample.key for sample in samples] == ["a/1", "a/big", "b/1"]
    assert samples[2].texts == {".cls": "4"}
    assert [sample.entry().read() for sample in samples] == [
        b"other", bytes(range(256)) * 500, b"one",
    ]  # fmt: skip
    with pickle.loads(pickle.dumps(samples[1].entry())).open() as file:
        assert file.seek(-3, os.SEEK_END) == 127_997
        assert file.read(10) == b"\xfd\xfe\xff"
        file.seek(255)
        assert file.read(2) == b"\xff\x00"
    path.unlink()
    with pytest.raises(UnreadableInput, match=r"s\.tar: a/1\.wav: .* does not exist any more"):
        samples[0].entry().open()


def test_a_wrong_shard_is_named(tmp_path):
    path = write_shard(tmp_path / "s.tar", {f"{i}.wav": bytes(700) for i in range(9)})
    whole = path.read_bytes()
    for content in (
        whole[:5000],  # within a file
        whole[: 3 * 1536],  # between two files
        whole[:1536] + b"\1" * 512 + whole[2048:],  # a header
        b"",
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"s\.tar is damaged .* fetch it again") as error:
            read_index(str(path), (".wav",))
        assert "\n" not in str(error.value)
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match=r"s\.tar is compressed, .* unpack it to a plain \.tar"):
        read_index(str(path), (".wav",))
    with tarfile.open(path, "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("1.wav"), io.BytesIO())
    with pytest.raises(ValueError, match=r"s\.tar: 1\.wav comes twice"):
        read_index(str(path), (".wav",))
    write_shard(path, {"1.wav": b"", "1.flac": b""})
    (sample,) = read_index(str(path), (".wav", ".flac"))
    with pytest.raises(ValueError, match=r"s\.tar: 1 has \.wav and \.flac, expected one"):
        sample.entry()
    write_shard(path, {"1.cls": b"\xff\xfe"})
    with pytest.raises(ValueError, match=r"s\.tar: 1\.cls: bytes that are no UTF-8 text"):
        read_index(str(path), (), (".cls",))


# Audio


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_sound_in_a_shard_is_that_of_its_file(tmp_path, suffix):
    content, file = noise(1, 1.0, suffix), tmp_path / f"a.{suffix}"
    file.write_bytes(content)
    members = {"x.txt": b"before it", f"a.{suffix}": content}
    cuts = {f"cut{n}.{suffix}": content[:n] for n in (0, 50, len(content) // 2, len(content) - 99)}
    shard = write_shard(tmp_path / "s.tar", members | cuts)
    whole, *cut = (s.entry() for s in read_index(str(shard), (f".{suffix}",)))
    assert torch.equal(read_audio(whole).samples, read_audio(file).samples)
    part, expected = (read_audio(f, start=0.2, end=0.5).samples for f in (whole, file))
    assert torch.equal(part, expected)
    assert read_header(whole) == read_header(file)
    for entry in cut:
        (tmp_path / entry.name).write_bytes(cuts[entry.name])
        with pytest.raises(UnreadableInput) as of_file:
            read_audio(tmp_path / entry.name)
        with pytest.raises(UnreadableInput) as of_entry:
            read_audio(entry)
        path = str(tmp_path / entry.name)
        assert str(of_entry.value) == str(of_file.value).replace(path, f"{shard}: {entry.name}")


def table_and_shards(folder: Path, contents: list[bytes], labels: list[str]) -> tuple[str, str]:
    """The same clips as files in a table, and in two shards of which the first has more."""
    rows, shards = [], ({}, {})
    for number, (content, label) in enumerate(zip(contents, labels, strict=True)):
        name, split = f"{number:03}", "test" if number % 5 == 0 else ""
        (folder / f"{name}.wav").write_bytes(content)
        rows.append({"path": f"{name}.wav", "label": label, "group": number // 2, "split": split})
        meta = json.dumps({"group": number // 2, "split": split}).encode()
        shard = shards[number > len(contents) // 2]
        shard |= {f"{name}.json": meta, f"{name}.wav": content, f"{name}.cls": label.encode()}
    with (folder / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for number, members in enumerate(shards):
        write_shard(folder / f"s-{number}.tar", members)
    return str(folder / "t.csv"), str(folder / "s-{0..1}.tar")


@pytest.fixture
def alike(tmp_path):
    contents = [noise(i) for i in range(30)]
    return table_and_shards(tmp_path, contents, ["cat", "dog"] * 15)


def test_shards_are_the_same_data_as_a_table(alike):
    one, two = (AudioData(source=source) for source in alike)
    for data in (one, two):
        data.setup("test")
    assert one.labels == two.labels == ["cat", "dog"]
    assert one.data_report.to_dict() == two.data_report.to_dict()
    for part in ("train_set", "val_set", "test_set"):
        first, second = getattr(one, part), getattr(two, part)
        assert len(first) == len(second) > 0
        for sample, other in zip(first, second, strict=True):
            assert torch.equal(sample["inputs"], other["inputs"])
            assert torch.equal(sample["targets"], other["targets"])


def test_what_is_bad_is_reported_as_in_a_table(tmp_path):
    nan = io.BytesIO()
    soundfile.write(nan, np.full(400, np.nan), RATE, format="WAV", subtype="FLOAT")
    none = io.BytesIO()
    soundfile.write(none, np.zeros((0, 1)), RATE, format="WAV")
    bad = [nan.getvalue(), none.getvalue(), noise(98)[:3000], b"", b"no sound", noise(3)]
    contents = [*(noise(i) for i in range(30)), *bad]
    sources = table_and_shards(tmp_path, contents, ["cat", "dog"] * 18)
    (tmp_path / "030.wav").unlink()  # a table's missing file is a shard's key without a sound
    shard = tmp_path / "s-1.tar"
    with tarfile.open(shard) as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive}
    del members["030.wav"]
    write_shard(shard, members)
    reports = []
    for source in sources:
        data = AudioData(source=source)
        data.setup("test")
        reports.append(data.data_report)
        with pytest.raises(ValueError, match=r"030.*: does not exist \(data\.strict is set"):
            AudioData(source=source, strict=True).setup("test")
    kinds = [{kind: len(m) for kind, m in report.problems.items()} for report in reports]
    assert kinds[0] == kinds[1]
    assert sum(kinds[0].values()) == 5
    divided = {"equal sounds in two parts", "one group in two parts"}
    assert set(reports[0].notes) == set(reports[1].notes) == divided
    assert [m.rpartition("/")[2] for m in reports[1].problems["truncated files"]] == [
        "s-1.tar: 032.wav: truncated: 2956 of 9600 bytes of sound; fetch the file again"
    ]


def test_keys_say_what_a_table_says_in_columns(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog\n", encoding="utf-8-sig")
    path = str(tmp_path / "s.tar")

    def clips(targets: str, **members: str):
        files = {name.replace("_", "."): text.encode() for name, text in members.items()}
        write_shard(tmp_path / "s.tar", {"k.wav": noise(1, 1.0), **files})
        return read_shards(path, targets, columns={"group": "speaker"})

    (clip,) = clips("label", k_cls="1", k_json='{"speaker": "s1", "fold": 3, "start": 0.5}')
    assert (clip.labels, clip.group, clip.fold, clip.start) == (("dog",), "s1", "3", 0.5)
    assert clip.name == f"{path}: k.wav [0.5- s]"
    assert clips("text", k_txt=" two  words\n")[0].text == "two words"
    assert clips("text", k_json='{"text": "one"}')[0].text == "one"
    assert clips("labels", k_json='{"labels": ["x", "y"]}')[0].labels == ("x", "y")
    (clip,) = clips("events", k_json='{"events": [{"label": "x", "start": 0, "end": 0.2}]}')
    assert clip.events == (("x", 0.0, 0.2),)
    assert clips("events")[0].events == ()
    assert clips("none")[0].entry.name == "k.wav"
    marked = clips("label", k_cls="\ufeff0", k_json='\ufeff{"speaker": "s2"}')[0]
    assert (marked.labels, marked.group) == (("cat",), "s2")  # as Windows tools write them
    for targets, members, words in [
        ("label", {"k_cls": "2"}, r"s\.tar: k: \.cls is '2', expected a number below 2"),
        ("label", {}, r"s\.tar: k: no label; .* write KEY\.cls"),
        ("text", {"k_json": "{"}, r"s\.tar: k: not JSON"),
        ("text", {"k_json": "[]"}, r"s\.tar: k: expected an object, got \[\]"),
        ("events", {"k_json": '{"events": [1]}'}, r"s\.tar: k: events is \[1\], expected a list"),
        ("events", {"k_json": '{"events": [{"label": "x"}]}'}, "s.tar: k: an event needs start"),
    ]:
        with pytest.raises(ValueError, match=words):
            clips(targets, **members)
    with pytest.raises(ValueError, match=r"s\.tar holds no samples where \{'speaker': 's2'\}"):
        read_shards(path, "events", where={"speaker": "s2"})


def test_parts_come_from_sources_of_their_own(tmp_path):
    for part, count in (("train", 20), ("val", 4), ("test", 6)):
        members = {}
        for i in range(count):
            members |= {f"{i}.wav": noise(100 * count + i), f"{i}.cls": str(i % 2).encode()}
        write_shard(tmp_path / f"{part}-0.tar", members)
    train, val, test = (str(tmp_path / f"{part}-*.tar") for part in ("train", "val", "test"))

    def sizes(**options: str) -> list[int]:
        data = AudioData(source=train, decode_all=False, **options)
        data.setup("test")
        sets = [data.train_set, data.val_set, data.test_set]
        assert len({clip.path for s in sets for clip in s.clips}) == sum(map(len, sets))
        return [len(s) for s in sets]

    assert sizes(val_source=val, test_source=test) == [20, 4, 6]
    assert sizes(test_source=test) == [17, 3, 6]
    assert sizes(val_source=val) == [16, 4, 4]
    with pytest.raises(ValueError, match=r"data\.test_source is .* beside data\.test_fold"):
        AudioData(source=train, test_source=test, test_fold="1")


def test_training_on_shards_is_training_on_a_table(alike, tmp_path):
    words = [
        "--model.backbone.d_model=16", "--model.backbone.n_layer=1", "--model.backbone.d_state=4",
        "--model.backbone.headdim=16", "--trainer.accelerator=cpu", "--trainer.max_epochs=1",
        "--trainer.precision=fp32", "--data.num_workers=1", "--data.batch_size=6",
        "--optimizer.warmup_epochs=0.5",
    ]  # fmt: skip
    weights = []
    for number, source in enumerate(alike):
        run = tmp_path / f"run-{number}"
        runs.train(shipped()["audio/shards"], run, [*words, f"--data.source={source}"])
        weights.append(load_file(run / runs.WEIGHTS))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# Genomes


def letters(seed: int, length: int) -> str:
    return "".join(np.random.default_rng(seed).choice(list("ACGTacgtN"), length))


def write_genome(path: Path, contigs: dict[str, str], width: int = 70, index: bool = False) -> Path:
    """A FASTA file, bgzip where its name ends in bgz, gzip in gz; with an index as of samtools."""
    data, fai = bytearray(), []
    for name, sequence in contigs.items():
        data += f">{name}\n".encode()
        fai.append(f"{name}\t{len(sequence)}\t{len(data)}\t{width}\t{width + 1}\n")
        for start in range(0, len(sequence), width):
            data += f"{sequence[start : start + width]}\n".encode()
    if path.suffix == ".bgz":
        with bgzf.BgzfWriter(str(path)) as file:
            file.write(bytes(data))
        with path.open("rb") as file:
            pairs = [(start, text) for start, _, text, n in bgzf.BgzfBlocks(file) if n][1:]
        if index:
            gzi = np.array([len(pairs), *np.ravel(pairs)], "<u8")
            path.with_name(path.name + ".gzi").write_bytes(gzi.tobytes())
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    if index:
        path.with_name(path.name + ".fai").write_text("".join(fai))
    return path


def test_windows_are_those_of_an_even_spread():
    draw = np.random.default_rng(0)
    for _ in range(200):
        start, length, size = draw.integers(0, 999), draw.integers(1, 5000), draw.integers(1, 900)
        region = Feature(contig="c", start=int(start), end=int(start + length))
        windows = Windows([region], int(size), {"c": 10_000}, margin=10)
        low, high = max(region.start - 10, 0), region.end + 10
        count, width = -(-(high - low) // size), min(size, high - low)
        places = np.linspace(low, high - width, count).astype(int).tolist()
        assert [w.start for w in windows] == places
        assert {w.end - w.start for w in windows} == {width}
    many = Windows([Feature(contig=c, start=0, end=95) for c in "ba"], 30, {"a": 95, "b": 95})
    assert [(w.contig, w.start) for w in many] == [(c, s) for c in "ab" for s in (0, 21, 43, 65)]
    assert (len(many), many[-1], many[2:4]) == (8, list(many)[7], list(many)[2:4])
    with pytest.raises(IndexError):
        many[8]
    left = without([Feature(contig="a", start=0, end=95)], [many.regions[0]])
    assert not left
    assert not Windows([], 30, {})


@pytest.mark.parametrize("kind", ["fa", "fa.gz", "fa.bgz"])
def test_an_index_saves_the_scan_and_checks_letters_when_they_are_read(tmp_path, kind):
    contigs = {"one": letters(1, 200_000), "two": letters(2, 99)}
    path = write_genome(tmp_path / f"g.{kind}", contigs, index=True)
    genome = pickle.loads(pickle.dumps(Genome(path)))
    for start, end in ((0, 1), (65_000, 140_003), (199_999, 200_000), (69, 71)):
        assert genome.fetch("one", start, end) == contigs["one"][start:end]
    assert genome.fetch("two") == contigs["two"]
    index = tmp_path / f"g.{kind}.fai"
    text = index.read_text()
    index.write_text(text.replace("two\t99", "two\t150"))
    with pytest.raises(UnreadableInput, match=r"two:1-150 is not where .*\.fai says"):
        Genome(path).fetch("two")
    os.utime(index, (1, 1))  # older than the file: it is scanned
    assert Genome(path)["two"] == 99
    for wrong, words in (
        ("one\t1\t2\n", r"\.fai:1: expected NAME and four numbers"),
        (text + text, r"\.fai:3: 'one' comes twice"),
        ("", r"\.fai names no record"),
    ):
        index.write_text(wrong)
        with pytest.raises(UnreadableInput, match=words):
            Genome(path)
    write_genome(path, {"one": "ACGT" * 50 + "E" + "ACGT" * 50}, index=True)
    genome = Genome(path)
    assert genome.fetch("one", 0, 200) == "ACGT" * 50
    with pytest.raises(UnreadableInput, match=r"g\.fa.*: one:201: 'E' is no IUPAC code"):
        genome.fetch("one", 190, 210)


def test_a_damaged_block_or_block_index_is_named(tmp_path):
    path = write_genome(tmp_path / "g.fa.bgz", {"one": letters(1, 200_000)}, index=True)
    genome = Genome(path)
    content = bytearray(path.read_bytes())
    content[-2000:-1900] = bytes(100)
    path.write_bytes(content)
    genome.fetch("one", 0, 1000)
    with pytest.raises(UnreadableInput, match=r"g\.fa\.bgz: damaged or truncated after byte"):
        genome.fetch("one", 199_000)
    (tmp_path / "g.fa.bgz.gzi").write_bytes(bytes(9))
    os.utime(path, (1, 1))
    with pytest.raises(UnreadableInput, match=r"\.gzi is damaged; .* bgzip --reindex"):
        Genome(path)


def test_files_of_one_set_may_share_names_of_contigs(tmp_path):
    for number in range(3):
        contigs = {"chr1": letters(number, 3000), f"only{number}": letters(9 + number, 500)}
        write_genome(tmp_path / f"g{number}.fa{('', '.gz', '.bgz')[number]}", contigs)
    pattern = str(tmp_path / "g{0..2}.fa*")
    data = GenomeText(paths=[pattern, str(tmp_path / "g0.fa")], window=400)
    data.setup("fit")
    genome = data.train_set.genome
    first = f"{tmp_path}/g0.fa#chr1"
    assert sorted(genome) == sorted(
        [
            *(first, f"{tmp_path}/g1.fa.gz#chr1", f"{tmp_path}/g2.fa.bgz#chr1"),
            *("only0", "only1", "only2"),
        ]
    )
    assert genome.fetch(first, 100, 200) == letters(0, 3000)[100:200]
    assert sum(len(r) for part in data.regions.values() for r in part) == 3 * 3500
    chosen = GenomeText(
        paths=[pattern],
        regions=["only1", f"{first}:1,001-2,000", f"{first}:1,501-2,500"],
        test_regions=["only2:1-100"],
        val_regions=[f"{first}:1,001-1,100"],
    )
    chosen.setup("fit")
    assert [(r.contig, r.start, r.end) for r in chosen.regions["train"]] == [
        (first, 1100, 2500), ("only1", 0, 500),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"no contig 'chr1'; it has .*g\d\.fa"):
        GenomeText(paths=[pattern], regions=["chr1"]).setup("fit")
    with pytest.raises(ValueError, match=r"holds no h\*\.fa; expected files"):
        GenomeText(paths=[str(tmp_path / "h*.fa")]).setup("fit")
    (tmp_path / "g0.fa.fai").touch()
    with pytest.raises(ValueError, match=r"\*\.fai'\] names indexes alone, expected FASTA"):
        GenomeText(paths=[str(tmp_path / "*.fai")]).setup("fit")


@pytest.mark.parametrize("kind", ["fa", "fa.gz", "fa.bgz"])
def test_memory_does_not_hold_the_genome(tmp_path, kind):
    size = 8_000_000
    line = letters(0, 10_000)
    for index in (False, True):
        path = write_genome(tmp_path / f"g.{kind}", {"c": line * 800}, width=10_000, index=index)
        tracemalloc.start()
        data = GenomeText(paths=[str(path)], window=1000)
        data.setup("fit")
        sampler = iter(data.epoch_sampler())
        rows = [data.train_set[next(sampler)[1]] for _ in range(20)]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(rows) == 20
        assert peak < 2**21, peak
        assert len(data.train_set) > 0.85 * size / 1000


def test_no_file_of_a_set_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for number in range(40):
        suffix = ("", ".bgz")[number % 2]
        write_genome(tmp_path / f"{number}.fa{suffix}", {f"c{number}": letters(number, 300)})
    data = GenomeText(paths=[str(tmp_path)], window=100, batch_size=4)
    data.setup("fit")
    assert sum(len(batch["inputs"]) for batch in data.train_dataloader()) > 100
    assert len(os.listdir("/proc/self/fd")) <= before


def as_rank(data: DataModule, rank: int, world_size: int, state: dict | None = None) -> DataModule:
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    data.load_state_dict(state or {"epoch": 2, "samples_done": 0})
    return data


def genome_text(folder: Path, **options) -> GenomeText:
    data = GenomeText(
        paths=[f"{folder}/*.fa*"],
        window=500,
        shift=100,
        reverse_complement=0.5,
        held_share=0.2,
        **options,
    )
    data.seed = 5
    data.setup("fit")
    return data


@pytest.fixture
def genomes(tmp_path):
    for number in range(4):
        path = tmp_path / f"g{number}.fa{('', '.gz', '.bgz', '')[number]}"
        write_genome(path, {"c": letters(number, 9000 + number)}, index=number == 3)
    return tmp_path


def test_ranks_share_the_windows_of_every_file(genomes):
    data = genome_text(genomes)
    size = len(data.train_set)
    for world_size in (1, 2, 3):
        shares = [list(as_rank(data, r, world_size).epoch_sampler()) for r in range(world_size)]
        seen = [index for share in shares for _, index in share]
        assert len(seen) == len(set(seen))
        assert size - len(seen) < world_size  # what is left over is of the next epochs
        assert {len(share) for share in shares} == {size // world_size}
    files = {data.train_set.windows[i].contig for i in seen}
    assert len(files) == 3  # the last of the four is held out
    covered: dict[str, np.ndarray] = {c: np.zeros(n, int) for c, n in data.train_set.genome.items()}
    for part in (data.train_set, data.val_set, data.test_set):
        mine = {c: np.zeros(n, bool) for c, n in data.train_set.genome.items()}
        for window in part.windows:
            mine[window.contig][window.start : window.end] = True
        for contig, bases in mine.items():
            covered[contig] += bases
    assert all((bases == 1).all() for bases in covered.values())  # each base in one part
    orders = [[i for _, i in as_rank(data, 0, 1, state).epoch_sampler()]
              for state in ({"epoch": e, "samples_done": 0} for e in (0, 1, 0))]  # fmt: skip
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != sorted(orders[0])
    data.seed = 6
    assert [i for _, i in as_rank(data, 0, 1, None).epoch_sampler()] != seen


def steps(data: DataModule, world_size: int, state: dict | None = None) -> list[torch.Tensor]:
    """Every step's samples, in the order of the epoch: ranks take turns."""
    loaders = [list(as_rank(data, r, world_size, state).train_dataloader())
               for r in range(world_size)]  # fmt: skip
    return [row for step in zip(*(  # a step's samples are dealt out one to each rank in turn
        [row for batch in loader for row in batch["inputs"]] for loader in loaders
    ), strict=True) for row in step]  # fmt: skip


@pytest.mark.parametrize("domain", ["genomes", "sounds"])
def test_a_resumed_epoch_goes_on_at_the_exact_sample_with_other_ranks(domain, genomes, tmp_path):
    if domain == "genomes":
        data = genome_text(genomes, batch_size=2)
    else:
        for number in range(4):
            members = {f"{i}.wav": noise(10 * number + i) for i in range(10)}
            write_shard(tmp_path / f"s-{number}.tar", members)
        data = AudioData(
            source=str(tmp_path / "s-*.tar"), targets="none", crop_seconds=0.1, batch_size=2
        )
        data.seed = 5
        data.setup("fit")
    whole = steps(data, 1)
    assert len(whole) > 24
    for world_size, done in ((1, 6), (2, 8), (3, 8), (2, 0)):
        rest = steps(data, world_size, {"epoch": 2, "samples_done": done})
        assert len(rest) > len(whole) - done - 2 * world_size
        for row, expected in zip(rest, whole[done:], strict=False):
            assert torch.equal(row, expected)
