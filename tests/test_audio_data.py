"""Lists of recordings: what is wrong is named; groups and equal sounds stay together."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mamba2_apps.audio import augment
from mamba2_apps.audio.augment import Augmentation
from mamba2_apps.audio.corpora import SOUNDS, esc50, speech_commands
from mamba2_apps.audio.data import AudioData
from mamba2_apps.audio.manifest import read_table, split_by_groups
from mamba2_apps.audio.preprocessing import AudioPreprocessing
from mamba2_apps.data import AugmentedDataset, UnreadableInput

RATE = 16000


def write(path, seconds=0.3, rate=RATE, channels=1, seed=None):
    generator = np.random.default_rng(abs(hash(str(path))) if seed is None else seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * generator.standard_normal((round(seconds * rate), channels)), rate)
    return path


def folder(root, per_class=10):
    for label in ("cat", "dog"):
        for number in range(per_class):
            write(root / label / f"{number}.wav")
    return root


def test_a_folder_is_split_stratified_and_always_the_same(tmp_path):
    data, again = (AudioData(source=str(folder(tmp_path))) for _ in range(2))
    data.setup("test")
    again.setup("test")
    assert data.labels == ["cat", "dog"]
    parts = [data.train_set, data.val_set, data.test_set]
    paths = [{clip.path for clip in part.clips} for part in parts]
    assert sum(map(len, paths)) == len(set.union(*paths)) == 20
    assert len(paths[2]) == 4
    assert {clip.labels[0] for clip in data.test_set.clips} == {"cat", "dog"}
    assert data.test_set.clips == again.test_set.clips
    batch = next(iter(data.test_dataloader()))
    assert batch["inputs"].shape == (4, 4800)
    assert "mask" not in batch


def test_every_bad_input_is_named_counted_and_left_out(tmp_path):
    root = folder(tmp_path / "clips")
    nan = np.full((400, 1), np.nan, dtype=np.float32)
    soundfile.write(root / "cat" / "nan.wav", nan, RATE, subtype="FLOAT")
    soundfile.write(root / "dog" / "none.wav", np.zeros((0, 1)), RATE)
    cut = write(root / "dog" / "cut.wav")
    cut.write_bytes(cut.read_bytes()[:3000])
    write(root / "cat" / "slow.wav", rate=8000)
    stereo = np.zeros((4000, 2))
    stereo[:, 0] = 0.1
    soundfile.write(root / "cat" / "stereo.wav", stereo, RATE)
    rows = [f"clips/{p.relative_to(root)},{p.parent.name}" for p in sorted(root.glob("*/*.wav"))]
    rows += ["clips/dog/absent.wav,dog", "clips/dog/1.wav,wolf"]
    table = tmp_path / "list.csv"
    table.write_text("path,label\n" + "\n".join(rows) + "\n")
    data = AudioData(source=str(table), labels=["cat", "dog"])
    data.setup("test")
    report = data.data_report
    found = {kind: len(messages) for kind, messages in report.problems.items()}
    assert found == {
        "samples that are not finite": 1,
        "files without samples": 1,
        "truncated files": 1,
        "missing files": 1,
        "labels outside the set": 1,
    }
    assert "absent.wav: does not exist" in report.problems["missing files"][0]
    assert "['wolf'], expected cat, dog" in report.problems["labels outside the set"][0]
    assert "8000 Hz among 16000 Hz" in report.notes["other sampling rates, resampled"][0]
    assert "1 of 2 channels" in report.notes["channels that are silent"][0]
    assert report.clips == 22
    assert len(json.dumps(report.to_dict())) > 0
    assert any("left out: truncated files: 1" in line for line in report.lines())
    slow = next(
        part.samples(i)
        for part in (data.train_set, data.val_set, data.test_set)
        for i, clip in enumerate(part.clips)
        if "slow" in clip.path
    )
    assert len(slow) == 4800  # at 16 kHz
    with pytest.raises(ValueError, match=r"nan\.wav.*data\.strict is set"):
        AudioData(source=str(table), labels=["cat", "dog"], strict=True).setup("test")


def test_equal_clips_are_counted_and_a_shortened_list_says_where_all_is(tmp_path):
    root = folder(tmp_path)
    for number in (11, 12, 13):
        (root / "cat" / f"{number}.wav").write_bytes((root / "cat" / "0.wav").read_bytes())
        (root / "dog" / f"{number}.wav").write_bytes(b"")
    data = AudioData(source=str(root))
    data.setup("test")
    lines = data.data_report.lines()
    assert data.data_report.duplicates == 3
    assert "duplicates: 3 clips have the samples of another" in lines
    assert not any("data.json" in line for line in lines)
    assert data.data_report.lines(examples=2)[-1] == "all names are in the RUN's data.json"


@pytest.mark.parametrize(
    ("samples", "rate", "words"),
    [
        (np.full((2400, 1), 0.1), 8000, "other sampling rates.*: .*odd.wav: 8000 Hz among"),
        (np.array([[0.1, 0]] * 4800), RATE, "channels that are silent: .*odd.wav: 1 of 2 channels"),
        (np.zeros((4800, 1)), RATE, "clips that are silent: .*odd.wav"),
        (np.zeros((4800, 2)), RATE, "clips that are silent: .*odd.wav"),
    ],
    ids=["rate", "one channel", "mono", "stereo"],
)
def test_what_is_noted_is_fatal_where_strict(tmp_path, samples, rate, words):
    soundfile.write(folder(tmp_path) / "cat" / "odd.wav", samples, rate)
    data = AudioData(source=str(tmp_path))
    data.setup("test")
    ((kind, messages),) = data.data_report.notes.items()
    assert re.fullmatch(words + ".*", f"{kind}: {messages[0]}")
    assert (len(messages), data.data_report.clips) == (1, 21)
    with pytest.raises(ValueError, match=rf"{words}.* \(data\.strict is set\)"):
        AudioData(source=str(tmp_path), strict=True).setup("test")


@pytest.mark.parametrize("decode_all", [True, False])
def test_parts_and_channels_that_are_not_there_are_left_out(tmp_path, decode_all):
    for number in range(12):
        write(tmp_path / f"{number}.wav", channels=1 + (number < 11))
    rows = [f"{number}.wav,{'ab'[number % 2]},{0.5 if number == 0 else ''}" for number in range(12)]
    (tmp_path / "t.csv").write_text("path,label,start\n" + "\n".join(rows) + "\n")
    data = AudioData(source=str(tmp_path / "t.csv"), channel=1, decode_all=decode_all)
    data.setup("test")
    problems = data.data_report.problems
    assert data.data_report.clips == 10
    assert "0.wav: the part from 0.5 to its end" in problems["parts outside their file"][0]
    assert "11.wav: channel 1 was asked for, it has 1" in problems["missing channels"][0]


def test_nothing_left_is_fatal(tmp_path):
    (tmp_path / "list.csv").write_text("path,label\na.wav,x\nb.wav,y\n")
    with pytest.raises(ValueError, match=r"no clip of .* can be used: 2 missing files; the first"):
        AudioData(source=str(tmp_path / "list.csv")).setup("fit")


def test_groups_and_equal_sounds_are_never_divided(tmp_path):
    rows = []
    for number in range(40):
        label, group = "ab"[number % 2], f"g{number // 4}"
        write(tmp_path / f"{number}.wav", seed=number)
        rows.append(f"{number}.wav,{label},{group}")
    # Equal sounds join the groups that they are in.
    for number, twin in ((0, 17), (4, 33)):
        (tmp_path / f"{number}.wav").write_bytes((tmp_path / f"{twin}.wav").read_bytes())
    (tmp_path / "t.csv").write_text("path,label,group\n" + "\n".join(rows) + "\n")
    data = AudioData(source=str(tmp_path / "t.csv"))
    data.setup("test")
    part_of = {}
    for name in ("train_set", "val_set", "test_set"):
        for clip in getattr(data, name).clips:
            assert part_of.setdefault(clip.group, name) == name
    assert part_of["g0"] == part_of["g4"]
    assert part_of["g1"] == part_of["g8"]
    assert len(set(part_of.values())) == 3
    assert len(data.data_report.notes["equal sounds with different labels"]) == 2
    held = AudioData(source=str(tmp_path / "t.csv"), test_groups=["g3", "g5"])
    held.setup("test")
    assert {clip.group for clip in held.test_set.clips} == {"g3", "g5"}
    with pytest.raises(ValueError, match=r"data\.test_groups has \['g99'\], expected among g0"):
        AudioData(source=str(tmp_path / "t.csv"), test_groups=["g99"]).setup("test")


def test_a_table_that_divides_equal_sounds_is_told(tmp_path):
    rows = []
    for number in range(6):
        write(tmp_path / f"{number}.wav", seed=number % 4)
        rows.append(f"{number}.wav,{'ab'[number % 2]},{['train', 'val', 'test'][number // 2]}")
    (tmp_path / "t.csv").write_text("path,label,split\n" + "\n".join(rows) + "\n")
    data = AudioData(source=str(tmp_path / "t.csv"))
    data.setup("test")
    assert [len(s) for s in (data.train_set, data.val_set, data.test_set)] == [2, 2, 2]
    assert len(data.data_report.notes["equal sounds in two parts"]) == 2
    with pytest.raises(ValueError, match="equal sounds in two parts"):
        AudioData(source=str(tmp_path / "t.csv"), strict=True).setup("test")


def test_few_groups_are_held_out_one_at_a_time_and_one_is_named():
    kept, held = split_by_groups(list("aabb"), list("xxyy"), 0.2)
    assert sorted([*kept, *held]) == [0, 1, 2, 3]
    assert len(held) == 2
    with pytest.raises(ValueError, match="4 clips of one group cannot be split"):
        split_by_groups(list("aabb"), list("xxxx"), 0.2)


def test_few_clips_of_each_class_are_held_out_one_of_each():
    _, held = split_by_groups(list("aaabbb"), range(6), 0.2)
    assert [list("aaabbb")[i] for i in held] == ["a", "b"]
    with pytest.raises(ValueError, match="4 clips of as many classes cannot be split"):
        split_by_groups(list("abcd"), range(4), 0.2)


def test_a_table_that_divides_groups_or_files_is_told(tmp_path):
    rows = []
    for number in range(6):
        write(tmp_path / f"{number}.wav", seconds=1.0)
        part = ["train", "val", "test"][number // 2]
        rows.append(f"{number}.wav,{'ab'[number % 2]},{part},speaker{number % 4},0,0.5")
    rows.append("5.wav,b,train,speaker1,0.5,1")
    (tmp_path / "t.csv").write_text("path,label,split,group,start,end\n" + "\n".join(rows) + "\n")
    data = AudioData(source=str(tmp_path / "t.csv"))
    data.setup("test")
    notes = data.data_report.notes
    assert notes["one group in two parts"] == [
        "speaker0: ['test', 'train']",
        "speaker1: ['test', 'train']",
    ]
    assert notes["one file in two parts"] == [f"{tmp_path / '5.wav'}: ['test', 'train']"]
    with pytest.raises(ValueError, match="one group in two parts: speaker0"):
        AudioData(source=str(tmp_path / "t.csv"), strict=True).setup("test")


def test_tags_events_and_texts_become_targets(tmp_path):
    for number in range(8):
        write(tmp_path / f"{number}.wav", seconds=1.0)
    tags = tmp_path / "tags.jsonl"
    tags.write_text(
        "\n".join(json.dumps({"path": f"{n}.wav", "labels": ["x", "yz"[n % 2]]}) for n in range(8))
    )
    data = AudioData(source=str(tags), targets="labels")
    data.setup("test")
    sample = data.test_set[0]
    assert data.labels == ["x", "y", "z"]
    assert sample["targets"].tolist() in ([1, 1, 0], [1, 0, 1])

    events = tmp_path / "events.csv"
    lines = [f"{n}.wav,knock,0.25,0.5\n{n}.wav,bell,0.9,1.0" for n in range(7)] + ["7.wav,,,"]
    events.write_text("path,label,start,end\n" + "\n".join(lines) + "\n")
    data = AudioData(source=str(events), targets="events", crop_seconds=0.4)
    data.setup("test")
    clips = [c for s in (data.train_set, data.val_set, data.test_set) for c in s.clips]
    assert len(clips) == 8
    assert sum(len(clip.events) for clip in clips) == 14
    index = next(i for i, clip in enumerate(data.test_set.clips) if clip.events)
    targets = data.test_set[index]["targets"]
    assert targets.shape == (100, 2)
    assert torch.nonzero(targets[:, 1]).flatten().tolist() == list(range(25, 50))
    assert torch.nonzero(targets[:, 0]).flatten().tolist() == list(range(90, 100))
    part = data.train_set[0]
    assert part["inputs"].shape == (6400,)
    assert part["targets"].shape == (40, 2)

    texts = tmp_path / "texts.csv"
    texts.write_text("file,said\n" + "".join(f"{n}.wav,ab {'c' * n}\n" for n in range(8)))
    data = AudioData(
        source=str(texts), targets="text", columns={"path": "file", "text": "said"},
        max_letters_per_second=10,
    )  # fmt: skip
    data.setup("test")
    assert data.labels == [" ", "a", "b", "c"]
    # "cc" needs a blank between: 3 + 4 letters and 3 blanks still fit in a second, more do not.
    assert len(data.data_report.problems["too much text"]) == 3
    batch = data.preprocessing.collate([data.train_set[i] for i in range(3)])
    assert (batch["targets"] == -100).any()


def test_a_clip_in_which_nothing_is_said_is_a_clip(tmp_path):
    for number in range(8):
        write(tmp_path / f"{number}.wav")
    rows = "".join(f"{number}.wav,{'ab' if number % 2 else ''}\n" for number in range(8))
    (tmp_path / "t.csv").write_text("path,text\n" + rows)
    data = AudioData(source=str(tmp_path / "t.csv"), targets="text")
    data.setup("test")
    samples = [s[i] for s in (data.train_set, data.val_set, data.test_set) for i in range(len(s))]
    for order in (samples, samples[::-1]):
        assert sorted(data.preprocessing.collate(order)["targets"].tolist()) == [
            *[[-100, -100]] * 4,
            *[[0, 1]] * 4,
        ]
    silent = [sample for sample in samples if not len(sample["targets"])]
    assert data.preprocessing.collate(silent)["targets"].dtype == torch.long


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_part_whose_texts_are_all_empty_is_named(tmp_path, part):
    """Its error rate would be a division by 0, called a divergence after the first epoch."""
    rows = []
    for number, split in enumerate(["train", "val", "test"] * 2):
        write(tmp_path / f"{number}.wav")
        rows.append(f"{number}.wav,{'' if split == part else 'ab'},{split}\n")
    (tmp_path / "t.csv").write_text("path,text,split\n" + "".join(rows))
    data = AudioData(source=str(tmp_path / "t.csv"), targets="text")
    with pytest.raises(ValueError, match=rf"t\.csv: the texts of all 2 clips to {part} with are"):
        data.setup("fit")
    (tmp_path / "t.csv").write_text("path,text,split\n" + "".join(rows).replace(",,", ",a,", 1))
    data.setup("fit")


def test_texts_that_a_ctc_has_no_room_for_are_named(tmp_path):
    from mamba2_apps.audio.models import audio_model

    for number in range(8):
        write(tmp_path / f"{number}.wav", seconds=1.0)
    rows = "".join(f"{number}.wav,{'ab' * 12}\n" for number in range(8))
    (tmp_path / "t.csv").write_text("path,text\n" + rows)
    model = audio_model(2, tokens="frame", head="ctc")  # 25 tokens for a clip
    source = str(tmp_path / "t.csv")
    data = AudioData(source=source, targets="text")
    data.setup("test")
    data.prepare_model(model)
    faster = Augmentation(speed=(0.9, 1.1))
    data = AudioData(source=source, targets="text", augmentation=faster)
    data.setup("test")
    with pytest.raises(ValueError, match=r"needs 24 tokens for its text, and has 23, .* to 23 or"):
        data.prepare_model(model)


def test_joined_clips_say_both_texts_with_a_pause_between(tmp_path):
    for number in range(12):
        write(tmp_path / f"{number}.wav", seconds=0.5 + number / 100)
    rows = [f"{number}.wav,{chr(97 + number)}{number % 3}" for number in range(12)]

    def data(rows):
        (tmp_path / "t.csv").write_text("path,text\n" + "\n".join(rows))
        joined = Augmentation(join_probability=1.0)
        data = AudioData(source=str(tmp_path / "t.csv"), targets="text", augmentation=joined)
        data.setup("fit")
        return data

    with pytest.raises(ValueError, match=r"no text has one: add ' ' to data\.labels"):
        data(rows)
    data = data([f"{row} z" for row in rows])
    texts = ["".join(data.labels[i] for i in sample["targets"]) for sample in data.train_set]
    for sample in data.train_set:
        joined = data.augment(sample)
        text = "".join(data.labels[i] for i in joined["targets"])
        first = "".join(data.labels[i] for i in sample["targets"])
        assert text.startswith(f"{first} ")
        other = data.train_set[texts.index(text[len(first) + 1 :])]["inputs"]
        pause = joined["inputs"][len(sample["inputs"]) : -len(other)]
        assert torch.equal(pause, torch.zeros(3200))
        assert torch.equal(joined["inputs"][-len(other) :], other)


def test_events_are_in_the_frames_of_the_features_at_any_rate(tmp_path):
    from mamba2_apps.audio.models import audio_model

    for number in range(6):
        write(tmp_path / f"{number}.wav", seconds=30.0, rate=22050)
    lines = [f"{number}.wav,knock,29.0,29.5" for number in range(6)] + ["0.wav,knock,300,400"]
    (tmp_path / "t.csv").write_text("path,label,start,end\n" + "\n".join(lines) + "\n")
    data = AudioData(
        source=str(tmp_path / "t.csv"), targets="events", sample_rate=22050, crop_seconds=1.0
    )
    data.setup("test")
    (left_out,) = data.data_report.problems["events after the end of their file"]
    assert "0.wav: knock starts at 300 s of 30.00 s" in left_out
    heard = torch.nonzero(data.test_set[0]["targets"][:, 0]).flatten() * 220 / 22050
    assert heard[[0, -1]].tolist() == pytest.approx([29.0, 29.5], abs=0.01)
    slow = audio_model(1, features={"sample_rate": 22050, "hop_seconds": 0.02})
    with pytest.raises(ValueError, match=r"hop_seconds is 0\.02; events have a target for each"):
        data.prepare_model(slow)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a.wav,x,nan,,", "line 2: start is 'nan', expected seconds"),
        ("a.wav,x,0,inf,", "line 2: end is 'inf', expected seconds"),
        ("a.wav,x,0,1,left", "line 2: channel is 'left', expected an index"),
    ],
)
def test_a_number_that_is_none_is_named(tmp_path, row, words):
    (tmp_path / "t.csv").write_text(f"path,label,start,end,channel\n{row}\n")
    with pytest.raises(ValueError, match=words):
        read_table(tmp_path / "t.csv", "label")


def test_parts_of_files_and_rows_of_a_table_are_chosen(tmp_path):
    write(tmp_path / "a.wav", seconds=2.0, channels=2)
    table = tmp_path / "t.csv"
    table.write_text(
        "path,label,start,end,channel,language\na.wav,x,0.5,1.25,1,es\na.wav,y,,,,ru\n"
    )
    (clip,) = read_table(table, "label", where={"language": "es"})
    samples, _ = soundfile.read(tmp_path / "a.wav")
    found = AudioPreprocessing(sample_rate=RATE)(clip)
    np.testing.assert_allclose(found, samples[8000:20000, 1], atol=1e-6)
    for words, columns, text in [
        (r"line 2: no path", {"path": "file"}, None),
        (r"line 2: start is 'x', expected seconds", {}, "path,label,start\na.wav,x,x\n"),
        (r"line 2: start is 2\.0 and end 1\.0", {}, "path,label,start,end\na.wav,x,2,1\n"),
        (r"line 2: no label", {}, "path\na.wav\n"),
        (r"data\.columns has \['file'\]", {"file": "path"}, None),
    ]:
        if text:
            table.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_table(table, "label", columns=columns)


@pytest.mark.parametrize(
    ("name", "text"),
    [("t.csv", "path,label\na.wav,x\n"), ("t.jsonl", '{"path": "a.wav", "label": "x"}\n')],
)
def test_a_byte_order_mark_is_no_part_of_a_table(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    (clip,) = read_table(tmp_path / name, "label")
    assert (clip.path, clip.labels) == (str(tmp_path / "a.wav"), ("x",))


def test_a_part_that_is_decoded_alone_is_that_of_the_whole(tmp_path):
    lines = ["path,label,start,end"]
    for number in range(8):
        write(tmp_path / f"{number}.wav", seconds=2.0)
        lines.append(f"{number}.wav,knock,0.5,0.75")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    kept, alone = (
        AudioData(
            source=str(tmp_path / "t.csv"), targets="events", crop_seconds=0.505, keep_minutes=keep
        )
        for keep in (60.0, 0.0)
    )
    kept.setup("test")
    alone.setup("test")
    starts = set()
    for seed in range(5):
        torch.manual_seed(seed)
        expected = kept.train_set[0]
        torch.manual_seed(seed)
        found = alone.train_set[0]
        assert torch.equal(found["inputs"], expected["inputs"])
        assert torch.equal(found["targets"], expected["targets"])
        assert found["inputs"].shape == (8080,)
        assert found["targets"].shape == (51, 1)
        starts.add(float(found["inputs"][0]))
    assert len(starts) > 1


def test_inputs_besides_files_are_taken_or_named(tmp_path):
    preprocessing = AudioPreprocessing(sample_rate=RATE, level="peak")
    found = preprocessing(np.full((2, 10), 0.25, dtype=np.float32))
    assert torch.equal(found, torch.ones(10))
    for item, words in [
        (np.zeros(10, dtype=np.int16), "int16"),
        (np.full(10, np.nan), "NaN or infinite"),
        (np.zeros((1, 2, 3)), "expected floats"),
    ]:
        with pytest.raises(UnreadableInput, match=words):
            preprocessing(item)
    with pytest.raises(ValueError, match="holds no sound files"):
        preprocessing.find(str(tmp_path))


def test_random_changes_are_a_function_of_seed_epoch_and_sample():
    data = AudioData(
        source="shipped:sounds",
        augmentation=Augmentation(
            speed=(0.9, 1.1), gain_db=6, shift_seconds=0.05, noise_probability=0.5, mixup_alpha=0.4
        ),
    )
    data.setup("test")
    dataset = AugmentedDataset(data.train_set, data.augment, 3)
    first = [dataset[(epoch, 5)]["inputs"] for epoch in range(3)]
    dataset[(7, 1)]
    assert all(torch.equal(dataset[(e, 5)]["inputs"], first[e]) for e in range(3))
    assert len({len(x) for x in first}) > 1
    batch = data.preprocessing.collate([dataset[(0, i)] for i in range(6)])
    mixed = data.mix(batch)
    assert mixed["targets"].shape == (6, 8)
    torch.testing.assert_close(mixed["targets"].sum(1), torch.ones(6))
    assert (mixed["targets"].max(1).values >= 0.5).all()
    assert (mixed["mask"] | ~batch["mask"]).all()


def test_noise_has_the_ratio_that_was_asked_for():
    signal = torch.sin(torch.arange(16000) / 7)
    noisy = augment.add_random_noise(signal, (10.0, 10.0), torch.randn(3000))
    ratio = 10 * torch.log10(signal.square().mean() / (noisy - signal).square().mean())
    assert ratio == pytest.approx(10.0, abs=0.1)
    silence = torch.zeros(100)
    assert torch.equal(augment.add_random_noise(silence, (10.0, 10.0), None), silence)
    faster = augment.change_speed(signal, (2.0, 2.0))
    assert len(faster) == 8000
    torch.manual_seed(1)
    moved = [augment.shift(signal, 500) for _ in range(20)]
    assert {len(x) > 16000 for x in moved} == {True, False}
    assert all(16000 - 1600 <= len(x) <= 16500 for x in moved)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": "text", "crop_seconds": 1.0}, "does not say all of its text"),
        ({"targets": "events", "augmentation": {"speed": (0.9, 1.1)}}, "no longer be where"),
        ({"targets": "events", "augmentation": {"mixup_alpha": 0.3}}, "only label and labels"),
        ({"augmentation": {"join_probability": 0.5}}, "only texts can be joined, not label"),
        ({"augmentation": {"join_probability": 2.0}}, "join_probability is 2.0, expected 0 to 1"),
        ({"test_fraction": 0.7}, r"data\.test_fraction is 0\.7"),
        ({"layout": "flat"}, r"data\.layout is 'flat'"),
        ({"labels": ["a", "b", "a"]}, r"data\.labels: 'a' comes more than once, expected each"),
    ],
)
def test_options_that_contradict_are_named(options, words):
    def build():
        changes = Augmentation(**options["augmentation"]) if "augmentation" in options else None
        return AudioData(source="x", **{**options, "augmentation": changes})

    with pytest.raises(ValueError, match=words):
        build()


def test_statistics_are_those_of_the_training_clips():
    from functools import partial

    from mamba2_apps.audio.adapter import PatchTokens
    from mamba2_apps.audio.features import Features
    from mamba2_apps.audio.models import audio_model

    data = AudioData(source="shipped:sounds")
    data.setup("test")
    model = torch.nn.Module()
    model.adapter = PatchTokens(8, features=partial(Features, RATE, per_bin=True))
    data.prepare_model(model)
    features = model.adapter.features
    frames = torch.cat(
        [
            features.extract(data.train_set.samples(i)[None])[0][0]
            for i in range(len(data.train_set))
        ]
    )
    torch.testing.assert_close(frames.mean(0), torch.zeros(128), atol=1e-3, rtol=0)
    constant = features.deviation <= 0.001  # the lowest triangles lie between the FFT's bins
    assert constant.sum() < 20
    torch.testing.assert_close(
        frames.std(0)[~constant], torch.ones(128)[~constant], atol=1e-2, rtol=0
    )
    with pytest.raises(ValueError, match=r"sample_rate is 8000 and data\.sample_rate 16000"):
        data.prepare_model(audio_model(8, features={"sample_rate": 8000}))


def test_public_collections_are_read_as_they_come(tmp_path):
    root = tmp_path / "sc"
    for word in ("yes", "no", "_background_noise_"):
        for speaker in ("a1", "b2", "c3"):
            write(root / word / f"{speaker}_nohash_0.wav")
    for name, speaker in (("testing", "a1"), ("validation", "b2")):
        lines = f"yes/{speaker}_nohash_0.wav\nno/{speaker}_nohash_0.wav\n"
        (root / f"{name}_list.txt").write_text(lines, encoding="utf-8-sig")
    clips = speech_commands(str(root))
    assert len(clips) == 6
    data = AudioData(source=str(root), layout="speechcommands")
    data.setup("test")
    assert {c.group for c in data.test_set.clips} == {"a1"}
    assert {c.group for c in data.val_set.clips} == {"b2"}
    assert data.labels == ["no", "yes"]

    root = tmp_path / "esc"
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for number in range(10):
        write(root / "audio" / f"{number}.wav")
        lines.append(f"{number}.wav,{number % 5 + 1},0,{'xy'[number // 5]},False,{number},A")
    (root / "meta").mkdir()
    (root / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    assert len(esc50(str(root))) == 10
    data = AudioData(source=str(root), layout="esc50", test_fold="2", val_fold="3")
    data.setup("test")
    assert {clip.fold for clip in data.test_set.clips} == {"2"}
    assert {clip.fold for clip in data.train_set.clips} == {"1", "4", "5"}
    for reader in (speech_commands, esc50):
        with pytest.raises(ValueError, match="does not exist; expected the unpacked"):
            reader(str(tmp_path))


def test_every_shipped_sound_has_its_source_and_author():
    clips = read_table(SOUNDS, "label")
    table = SOUNDS.read_text().splitlines()
    assert len(clips) == len(table) - 1 == 101
    assert all(row.endswith(",CC0-1.0") and "://" in row for row in table[1:])
    assert sorted(Path(clip.path) for clip in clips) == sorted(SOUNDS.parent.glob("*/*.flac"))
