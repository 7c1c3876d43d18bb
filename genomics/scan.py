"""Answers for each base of whole chromosomes: streamed, or in overlapping windows.

A causal model goes through a chromosome once, carrying its state, in constant memory; the answers
are those of one pass over all of it. A bidirectional model, whose reverse direction begins at the
end, takes overlapping windows and keeps the middle of each; where two windows meet, both have
answers for the same bases, and their difference is measured and reported: the stitch error.

A head may answer for bins of bases, counted from the start of a region: each base then has its
bin's answer, and bases behind the last whole bin have none (NaN).

Pieces are kept in a folder beside the output until all are there, so that an interrupted scan goes
on where it was. Then they become BED, bedGraph or bigWig, or genes as BED or GFF3.

Dimensions: seqlen l (bases) · labels k
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from mamba2_apps.data import UnreadableInput
from mamba2_apps.files import replacing, write_json
from mamba2_apps.genomics.annotations import write_bed, write_gff
from mamba2_apps.genomics.fasta import Genome, MemoryGenome
from mamba2_apps.genomics.gene_structure import check_gene_labels, decode_genes
from mamba2_apps.genomics.intervals import Feature, parse_region, place
from mamba2_apps.genomics.orfs import check_codon_labels, decode_orfs
from mamba2_apps.genomics.preprocessing import DNAPreprocessing, open_sequences
from mamba2_apps.genomics.regions import RegionNames, listed
from mamba2_apps.genomics.tracks import (
    BEDGRAPH_SUFFIXES,
    BIGWIG_SUFFIXES,
    TrackWriter,
    big_wig_library,
)
from mamba2_apps.tasks import (
    NextToken,
    Regression,
    Task,
    TokenClassification,
    TokenMultiLabel,
    TrackRegression,
)

PER_BASE = (TokenClassification, TokenMultiLabel, TrackRegression, NextToken)
NOTHING = "none"
"""The class that BED files leave out."""


class Piece(NamedTuple):
    """Answers (n, k) float32 for the bases of a contig from `start` on."""

    contig: str
    start: int
    values: np.ndarray


@dataclass
class StitchError:
    """How much two windows differ where they meet, over `bases` that both answered."""

    mean: float = 0.0
    largest: float = 0.0
    bases: int = 0

    def add(self, one: np.ndarray, other: np.ndarray) -> None:
        difference = np.abs(one - other)
        if not difference.size:
            return
        count = self.bases + len(difference)
        self.mean += (float(difference.mean()) - self.mean) * len(difference) / count
        self.largest = max(self.largest, float(difference.max()))
        self.bases = count


@dataclass
class Scan:
    """One pass over regions of a genome.

    Args:
        task: answers for each base; its model is causal or bidirectional.
        genome: the sequences.
        regions: (contig, start, end), 0-based half-open.
        window: bases computed at once, made up to whole bins.
        overlap: bases that a bidirectional model sees on either side of what is kept, likewise.
        encode: sequence to token ids (l,).

    Raises ValueError for a task that does not answer for each base.
    """

    task: Task
    genome: Genome
    regions: Sequence[tuple[str, int, int]]
    window: int
    overlap: int
    encode: Callable[[str], Tensor]
    stitch: StitchError = field(default_factory=StitchError)

    def __post_init__(self) -> None:
        if not isinstance(self.task, PER_BASE):
            raise ValueError(
                f"a RUN of {type(self.task).__name__} answers once for a sequence, not for each "
                "base; write .csv or .jsonl"
            )
        if self.window < 1 or self.overlap < 0:
            raise ValueError(
                f"window is {self.window} and overlap {self.overlap}, expected at least 1 and 0"
            )
        self.window += -self.window % self.bin_size
        self.overlap += -self.overlap % self.bin_size

    @property
    def model(self) -> Any:
        return self.task.model

    @property
    def bin_size(self) -> int:
        return getattr(self.model.head, "bin_size", 1)

    @property
    def causal(self) -> bool:
        return _is_causal(self.task)

    @property
    def labels(self) -> list[str]:
        return ["log_likelihood"] if isinstance(self.task, NextToken) else list(self.task.labels)

    def starts(self) -> Iterator[tuple[int, int]]:
        """(region number, first base) of every piece, in order."""
        for index, (_, start, end) in enumerate(self.regions):
            yield from ((index, at) for at in range(start, end, self.window))

    def run(self, first: int = 0, state: Any = None) -> Iterator[tuple[Piece, Any]]:
        """Pieces from number `first` on, each with the state after it (None where there is none).

        `state` is what came with piece number `first` - 1.
        """
        earlier: tuple[int, np.ndarray] | None = None
        for number, (index, at) in enumerate(self.starts()):
            if number < first:
                continue
            contig, start, end = self.regions[index]
            stop = min(at + self.window, end)
            if at == start:
                state, earlier = None, None
            if self.causal:
                values, state = self._next(contig, at, stop, state)
            else:
                left, answers = self._window(contig, at, stop)
                if earlier is not None:
                    self._compare(at, *earlier, left, answers)
                earlier = left, answers
                values = answers[at - left : stop - left]
            unanswered = ((0, stop - at - len(values)), (0, 0))
            values = np.pad(values, unanswered, constant_values=np.nan)
            yield Piece(contig, at, values), state

    def _compare(
        self, seam: int, left: int, one: np.ndarray, other_left: int, other: np.ndarray
    ) -> None:
        """Measure how two windows differ within half an overlap of where they meet."""
        reach = self.overlap // 2
        start = max(seam - reach, left, other_left)
        end = min(seam + reach, left + len(one), other_left + len(other))
        self.stitch.add(
            one[start - left : end - left], other[start - other_left : end - other_left]
        )

    def _ids(self, contig: str, start: int, end: int) -> Tensor:
        ids = self.encode(self.genome.fetch(contig, start, end))
        return ids[None].to(self.task.device)

    @torch.inference_mode()
    def _next(self, contig: str, start: int, end: int, state: Any) -> tuple[np.ndarray, Any]:
        """Answers (n, k) of a causal model for whole bins, and its state after all bases."""
        if self.model.strands != "single":
            raise ValueError(
                f"strands is {self.model.strands}; a stream knows nothing of the other strand, "
                "whose past is its future"
            )
        ids = self._ids(contig, start, end)
        last, before = (None, None) if state is None else state
        embeddings, _ = self.model.adapter(ids)
        hidden, after = self.model.backbone(embeddings, state=before, return_state=True)
        whole = hidden.shape[1] - hidden.shape[1] % self.bin_size
        outputs = self.model.head(hidden[:, :whole])
        if isinstance(self.task, NextToken):
            previous = outputs[:, :1] * float("nan") if last is None else last
            scores = torch.cat([previous, outputs[:, :-1]], 1).float().log_softmax(-1)
            values = scores.gather(2, ids[..., None])
        else:
            values = self._values(outputs)
        return self._of_bases(values), (outputs[:, -1:], after)

    @torch.inference_mode()
    def _window(self, contig: str, start: int, end: int) -> tuple[int, np.ndarray]:
        """First base, and answers (n, k) from there to `overlap` bases beyond `end`, whole bins."""
        left = max(start - self.overlap, start % self.bin_size)
        right = min(end + self.overlap, self.genome[contig])
        right -= (right - left) % self.bin_size
        if right == left:
            return left, np.empty((0, len(self.labels)), np.float32)
        return left, self._of_bases(self._values(self.model(self._ids(contig, left, right))))

    def _of_bases(self, values: Tensor) -> np.ndarray:
        """Answers (1, n / bin_size, k) as those (n, k) of their bases."""
        return values[0].float().cpu().numpy().repeat(self.bin_size, axis=0)

    def _values(self, outputs: Tensor) -> Tensor:
        """Outputs (b, l, k) as probabilities, or on the scale of the targets."""
        if isinstance(self.task, Regression):
            return self.task.values(outputs)
        if isinstance(self.task, TokenMultiLabel):
            return outputs.float().sigmoid()
        return outputs.float().softmax(-1)


def _is_causal(task: Any) -> bool:
    return not task.model.backbone.config.bidirectional


def spans_of(sample: int) -> dict[str, int]:
    """Window and overlap that give a bidirectional model a training sample's bases at once."""
    return {"window": sample // 2, "overlap": sample // 4}


def predict_bases(
    task: Task,
    genome: Genome | Mapping[str, str],
    *,
    regions: Sequence[tuple[str, int, int]] | None = None,
    window: int = 65536,
    overlap: int = 4096,
    encode: Callable[[str], Tensor] | None = None,
) -> tuple[dict[tuple[str, int, int], np.ndarray], StitchError]:
    """Answers (n, k) float32 of each region in memory, and the stitch error.

    Args:
        task: answers for each base.
        genome: a Genome, or sequences by name.
        regions: (contig, start, end), 0-based half-open; None: every contig.
        window: bases computed at once, made up to whole bins; where they and the overlaps are more
            than a training sample, a bidirectional model's answers can be worse.
        overlap: bases that a bidirectional model sees on either side of them, likewise.
        encode: sequence to token ids; None: base tokens.
    """
    store = genome if isinstance(genome, Genome) else MemoryGenome(genome, "memory")
    chosen = list(regions or ((name, 0, length) for name, length in store.items()))
    encode = encode or DNAPreprocessing().tokens.encode
    task.eval()
    scan = Scan(task, store, chosen, window, overlap, encode)
    answers: dict[int, list[np.ndarray]] = {index: [] for index in range(len(chosen))}
    for (index, _), (piece, _) in zip(scan.starts(), scan.run(), strict=True):
        answers[index].append(piece.values)
    joined = {chosen[index]: np.concatenate(pieces) for index, pieces in answers.items() if pieces}
    return joined, scan.stitch


def answerer(
    preprocessing: DNAPreprocessing, sources: Sequence[str], output: Path | None, *, stream: bool
) -> Callable[..., Iterator[dict[str, Any]]]:
    """What `mamba2-apps predict RUN GENOME --output TRACK` does."""

    def answer(
        task: Task,
        *,
        region: RegionNames | None = None,
        label: list[str] | None = None,
        window: int | None = None,
        overlap: int | None = None,
        threshold: float = 0.5,
        decode: str | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Scan genomes.

        Args:
            task: answers for each base.
            region: such as chr2R:1-1,000,000, or a list, in any order; all contigs where it is
                not given.
            label: of which labels to write; all where it is not given.
            window: bases that are computed at once and kept; half of a training sample for a
                bidirectional model whose RUN says how long that was, else 65,536.
            overlap: bases that a bidirectional model sees on either side of them; a quarter of a
                training sample, else 4,096.
            threshold: probability from which BED calls a base.
            decode: orfs writes open reading frames instead, for labels of codon places; genes
                writes genes with introns, for labels of splice sites, too.
        """
        if preprocessing.tokenizer.get("kind") != "base":
            raise ValueError("answers for each base need base tokens; this model reads other ones")
        if len(sources) != 1:
            raise ValueError(f"{len(sources)} files; a scan writes one genome, give one INPUT")
        if decode not in (None, "orfs", "genes"):
            raise ValueError(f"--decode is {decode!r}, expected orfs or genes")
        genome = open_sequences(sources[0])
        names = listed(region) if region else list(genome)
        regions = _in_order([parse_region(name, genome) for name in names], genome)
        spans = {"window": 65536, "overlap": 4096}
        if preprocessing.window is not None and not _is_causal(task):
            spans = spans_of(preprocessing.window)
        window = spans["window"] if window is None else window
        overlap = spans["overlap"] if overlap is None else overlap
        scan = Scan(task, genome, regions, window, overlap, preprocessing.tokens.encode)
        if stream and not scan.causal:
            raise ValueError(
                "--stream needs a causal model: this one is bidirectional, and its reverse "
                "direction begins at the end; leave out --stream to scan in overlapping windows"
            )
        columns = _columns(scan.labels, label)
        suffix = "" if output is None else output.suffix.lower()
        is_track = suffix in (*BEDGRAPH_SUFFIXES, *BIGWIG_SUFFIXES)
        if suffix in BIGWIG_SUFFIXES:
            big_wig_library()  # raises before anything is computed
        _check_answers(scan, decode, suffix, is_track)
        with _parts_folder(output) as folder:
            parts = Parts(folder, _fingerprint(scan, sources[0]), scan)
            parts.compute()
            _report(scan)
            rows = (
                _decoded(parts, genome, decode) if decode else _segments(parts, columns, threshold)
            )
            if output is not None and is_track:
                _write_tracks(parts, columns, output)
            elif output is not None and suffix in (".bed", ".gff3"):
                write = write_bed if suffix == ".bed" else write_gff
                with replacing(output) as partial, partial.open("w", encoding="utf-8") as file:
                    write(rows, file)
            else:
                yield from (_row(feature) for feature in rows)

    return answer


def _in_order(regions: list[tuple[str, int, int]], genome: Genome) -> list[tuple[str, int, int]]:
    """Regions in the order of the genome, as tracks need them. Raises ValueError for an overlap."""
    order = {contig: number for number, contig in enumerate(genome)}
    regions = sorted(regions, key=lambda r: (order[r[0]], *r[1:]))
    for one, other in pairwise(regions):
        if one[0] == other[0] and other[1] < one[2]:
            raise ValueError(
                f"--region has {place(*one)} and {place(*other)}, which overlap; a track has one "
                "value for a base"
            )
    return regions


class Parts:
    """Pieces of a scan in a folder, from which an interrupted one goes on.

    Raises ValueError where the folder holds another scan's.
    """

    def __init__(self, folder: Path, fingerprint: str, scan: Scan) -> None:
        self.folder, self.scan = folder, scan
        manifest = folder / "scan.json"
        if manifest.exists():
            found = json.loads(manifest.read_text(encoding="utf-8"))["fingerprint"]
            if found != fingerprint:
                raise ValueError(
                    f"{folder} holds an interrupted scan of other options, another model or "
                    "genome; repeat that to finish it, or remove the folder"
                )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(manifest, {"fingerprint": fingerprint})

    def compute(self) -> None:
        """Compute what is missing, with a progress bar."""
        scan = self.scan
        done, state = self._resume()
        total = sum(end - start for _, start, end in scan.regions)
        before = sum(len(np.load(self._path(i), mmap_mode="r")) for i in range(done))
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} bases"),
            TextColumn("{task.fields[rate]} bases/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("predicting", total=total, completed=before, rate="-")
            for number, (piece, after) in enumerate(scan.run(done, state), done):
                with replacing(self._path(number)) as partial, partial.open("wb") as file:
                    np.save(file, piece.values)
                self._keep(number + 1, after)
                progress.update(
                    bar,
                    advance=len(piece.values),
                    description=piece.contig,
                    rate=f"{progress.tasks[0].speed or 0:,.0f}",
                )

    def __iter__(self) -> Iterator[Piece]:
        """Pieces in order, one in memory at a time."""
        for number, (index, at) in enumerate(self.scan.starts()):
            yield Piece(self.scan.regions[index][0], at, np.load(self._path(number)))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.npy"

    def _keep(self, done: int, state: Any) -> None:
        with replacing(self.folder / "state.pt") as partial:
            torch.save({"done": done, "state": state, "stitch": asdict(self.scan.stitch)}, partial)

    def _resume(self) -> tuple[int, Any]:
        path = self.folder / "state.pt"
        if not path.exists():
            return 0, None
        kept = torch.load(path, map_location=self.scan.task.device, weights_only=False)
        self.scan.stitch = StitchError(**kept["stitch"])
        return kept["done"], kept["state"]


@contextmanager
def _parts_folder(output: Path | None) -> Iterator[Path]:
    """A folder beside the output, which goes once that is written and stays when interrupted.

    It goes, too, where the genome cannot be read: the mended one is another. Rows for standard
    output cannot go on where they were: their folder is a temporary one.
    """
    if output is None:
        with tempfile.TemporaryDirectory(prefix="mamba2-apps-") as name:
            yield Path(name)
        return
    folder = output.with_name(f".{output.name}.scan")
    try:
        yield folder
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {folder}", file=sys.stderr)
        raise
    except UnreadableInput:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def _fingerprint(scan: Scan, source: str) -> str:
    """What must be the same for a scan to go on."""
    digest = sha256()
    for name, tensor in sorted(scan.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    stat = Path(source).stat()
    options = list(scan.regions), scan.window, scan.overlap, stat.st_size, stat.st_mtime_ns
    digest.update(repr(options).encode())
    return digest.hexdigest()


def _report(scan: Scan) -> None:
    if scan.stitch.bases:
        print(
            f"stitch error of {scan.window:,}-base windows with {scan.overlap:,} bases of overlap: "
            f"mean {scan.stitch.mean:.2g}, largest {scan.stitch.largest:.2g}, over "
            f"{scan.stitch.bases:,} bases; a larger --overlap lowers it",
            file=sys.stderr,
        )


def _check_answers(scan: Scan, decode: str | None, suffix: str, is_track: bool) -> None:
    """Raises ValueError, before anything is computed, for what the output cannot hold."""
    if decode is not None:
        check = check_gene_labels if decode == "genes" else check_codon_labels
        check(scan.labels)
        if is_track:
            raise ValueError(
                f"--decode={decode} gives genes, which no track holds; write .bed or .gff3"
            )
    elif suffix == ".gff3":
        raise ValueError(
            ".gff3 holds genes; give --decode=genes or --decode=orfs, or write .bed for segments"
        )
    elif not is_track and not isinstance(scan.task, TokenClassification | TokenMultiLabel):
        raise ValueError("a track of values has no segments; write .bedgraph or .bw")


def _columns(labels: list[str], wanted: list[str] | None) -> dict[str, int]:
    unknown = [name for name in wanted or [] if name not in labels]
    if unknown:
        raise ValueError(f"--label is {unknown[0]!r}, expected one of {', '.join(labels)}")
    return {name: labels.index(name) for name in wanted or labels}


def _write_tracks(parts: Parts, columns: dict[str, int], output: Path) -> None:
    """One file, or one per label: NAME.LABEL.SUFFIX."""
    lengths = dict(parts.scan.genome.items())
    for label, column in columns.items():
        path = (
            output
            if len(columns) == 1
            else output.with_name(f"{output.stem}.{label}{output.suffix}")
        )
        with (
            replacing(path) as partial,
            TrackWriter(partial, lengths, output.suffix.lower()) as writer,
        ):
            for piece in parts:
                writer.add(piece.contig, piece.start, piece.values[:, column])


def _segments(parts: Parts, columns: dict[str, int], threshold: float) -> Iterator[Feature]:
    """Runs of bases with a label, across pieces, in the order of the genome.

    The score is the mean probability × 1000.
    """
    for _, pieces in groupby(parts, key=lambda piece: piece.contig):
        runs = _runs(pieces, columns, threshold, isinstance(parts.scan.task, TokenClassification))
        yield from sorted(runs, key=lambda f: (f.start, f.end))


def _runs(
    pieces: Iterator[Piece], columns: dict[str, int], threshold: float, one_class: bool
) -> Iterator[Feature]:
    """The runs of one contig, each label's in order."""
    runs: dict[str, tuple[str, int, int, float]] = {}
    for piece in pieces:
        chosen = piece.values.argmax(1) if one_class else None
        for label, column in columns.items():
            if one_class and label == NOTHING:
                continue
            scores = piece.values[:, column]
            called = chosen == column if chosen is not None else scores >= threshold
            edges = np.flatnonzero(np.diff(np.concatenate([[0], called.astype(np.int8), [0]])))
            for first, last in edges.reshape(-1, 2).tolist():
                total = float(scores[first:last].sum())
                run = (piece.contig, piece.start + first, piece.start + last, total)
                earlier = runs.get(label)
                if earlier is not None and earlier[2] == run[1]:
                    run = (run[0], earlier[1], run[2], earlier[3] + total)
                elif earlier is not None:
                    yield _feature(label, *earlier)
                runs[label] = run
    for label, run in runs.items():
        yield _feature(label, *run)


def _feature(label: str, contig: str, start: int, end: int, total: float) -> Feature:
    strand: Any = label[-1] if label[-1:] in ("+", "-") else "."
    name = label if strand == "." else label[:-1]
    score = round(1000 * total / (end - start))
    return Feature(contig=contig, start=start, end=end, strand=strand, name=name, score=score)


def _decoded(parts: Parts, genome: Genome, decode: str) -> Iterator[Feature]:
    """Open reading frames or genes that the labels speak for, region by region."""
    decoder = decode_genes if decode == "genes" else decode_orfs
    numbered = zip(parts.scan.starts(), parts, strict=True)
    for index, pieces in groupby(numbered, key=lambda pair: pair[0][0]):
        contig, start, end = parts.scan.regions[index]
        values = np.concatenate([piece.values for _, piece in pieces])
        sequence = genome.fetch(contig, start, end)
        yield from decoder(sequence, values, parts.scan.labels, contig, start)


def _row(feature: Feature) -> dict[str, Any]:
    return {
        "contig": feature.contig,
        "start": feature.start,
        "end": feature.end,
        "name": feature.name,
        "score": feature.score,
        "strand": feature.strand,
    }
