"""Public collections as they come: which clip has which label, and which split is theirs."""

import csv
from pathlib import Path

from mamba2_apps.audio.manifest import Clip

SOUNDS = Path(__file__).parent / "sounds" / "sounds.csv"
"""The shipped sounds, CC0, each with its author and source."""


def speech_commands(folder: str) -> list[Clip]:
    """Speech Commands (Warden 2018): a folder for each word, and lists of the test and validation
    files; a speaker's clips are a group.

    Raises ValueError that names what is missing.
    """
    root = Path(folder)
    split: dict[str, str] = {}
    for part, name in (("test", "testing_list.txt"), ("val", "validation_list.txt")):
        path = root / name
        if not path.is_file():
            raise ValueError(f"{path} does not exist; expected the unpacked speech_commands_v0.02")
        split |= dict.fromkeys(path.read_text(encoding="utf-8-sig").split(), part)
    clips = []
    for file in sorted(root.glob("[!_]*/*.wav")):
        name = file.relative_to(root).as_posix()
        speaker = file.name.split("_nohash_")[0]
        part = split.get(name, "train")
        clips.append(Clip(str(file), labels=(file.parent.name,), group=speaker, split=part))
    if not clips:
        raise ValueError(f"{root} holds no WORD/*.wav; expected the unpacked speech_commands_v0.02")
    return clips


def esc50(folder: str) -> list[Clip]:
    """ESC-50 (Piczak 2015): 2,000 clips in five folds; clips of one recording are a group.

    Raises ValueError that names what is missing.
    """
    table = Path(folder) / "meta" / "esc50.csv"
    if not table.is_file():
        raise ValueError(f"{table} does not exist; expected the unpacked ESC-50-master")
    with table.open(encoding="utf-8-sig", newline="") as file:
        return [
            Clip(
                str(Path(folder) / "audio" / row["filename"]),
                labels=(row["category"],),
                group=row["src_file"],
                fold=row["fold"],
            )
            for row in csv.DictReader(file)
        ]


READERS = {"speechcommands": speech_commands, "esc50": esc50}
