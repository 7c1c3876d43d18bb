"""Coding regions of Chlamydia trachomatis: the last 20% of the genome, by base and strand.

    python benchmarks/genomics_chlamydia.py [--jobs 3] [--develop] [-- --trainer.max_epochs=30]

Each fit is `mamba2-apps train genomics/bacterial-cds`, which sees the first 80%. R_K, the
multi-class MCC over {none, +, -, both} per base, is given for the model's probabilities alone (a
base is coding where one of its three codon places has probability 0.5) and for the open reading
frames decoded from them with the defaults of `decode_orfs`. These come from --develop, which trains
on the first 60% and scores the options on the next 20%; what comes after chooses nothing. The
baseline is a scan for the longest open reading frames, whose least length and overlap are tuned on
the first 80%. Wrong bases of frames are counted by what they are. The genes pgm, across the split,
and CT875, across the origin, are left out. Needs data/chlamydia. Each fit is a line of
results/genomics_chlamydia.jsonl when it ends, and is not run again; the summary is
results/genomics_chlamydia.json.
"""

import itertools
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from _fits import arguments_of_runs, do_fits, parse_of_runs, train_into
from _record import write_record
from sklearn.metrics import matthews_corrcoef

from mamba2_apps.genomics.annotated import paint
from mamba2_apps.genomics.annotations import genbank_genome, joined, read_features
from mamba2_apps.genomics.intervals import Feature
from mamba2_apps.genomics.orfs import CODON_LABELS, decode_orfs, longest_orfs

GENBANK = "data/chlamydia/ct.gbk.gz"
SPLIT, DEVELOP = 834_015, 625_511
LEFT_OUT = {"pgm", "CT875"}
BAR, AIM = 0.960, 0.975
BIASES = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
THRESHOLDS = (50.0, 100.0, 200.0, 300.0, 400.0, 500.0)
LENGTHS, OVERLAPS = range(150, 420, 30), (60, 90, 120, 150, 180)


def strands(genes: list[Feature], start: int, end: int) -> np.ndarray:
    """(end - start,) 0 none, 1 +, 2 -, 3 both."""
    labels = paint(genes, start, end, ["cds"])
    return labels[:, 0] + 2 * labels[:, 1]


def truth() -> tuple[str, str, np.ndarray, np.ndarray]:
    """Contig, sequence, class of each base, and which bases count."""
    genome = genbank_genome(GENBANK)
    ((contig, length),) = genome.items()
    genes = joined(read_features(GENBANK, genome))
    counted = np.ones(length, bool)
    for gene in genes:
        if gene.name in LEFT_OUT:
            counted[gene.start : gene.end] = False
    return contig, genome.fetch(contig), strands(genes, 0, length), counted


def annotated(start: int, end: int, kind: str = "CDS") -> list[Feature]:
    """Features of one kind that lie between these places and count."""
    found = joined(read_features(GENBANK, genbank_genome(GENBANK)), kind)
    return [f for f in found if start <= f.start and f.end <= end and f.name not in LEFT_OUT]


def errors(found: list[Feature], start: int, end: int) -> dict[str, int]:
    """Bases of frames that are no gene, of genes that were not found, and between two starts.

    A frame and a gene are the same where they end at the same stop codon.
    """
    *_, counted = truth()
    rna = np.zeros(len(counted), bool)
    for feature in annotated(start, end, "rRNA"):
        rna[feature.start : feature.end] = True

    def by_stop(features: list[Feature]) -> dict[tuple[str, int], Feature]:
        return {(f.strand, f.end if f.strand == "+" else f.start): f for f in features}

    ours = by_stop([f for f in found if counted[f.start : f.end].all()])
    theirs = by_stop(annotated(start, end))
    wrong = [f for stop, f in ours.items() if stop not in theirs]
    inside = [f for f in wrong if rna[f.start : f.end].mean() > 0.5]
    return {
        "frames within ribosomal RNA": sum(map(len, inside)),
        "other frames that are no gene": sum(map(len, wrong)) - sum(map(len, inside)),
        "genes not found": sum(len(g) for stop, g in theirs.items() if stop not in ours),
        "other starts": sum(
            abs(len(f) - len(theirs[stop])) for stop, f in ours.items() if stop in theirs
        ),
    }


def baseline() -> dict[str, Any]:
    """The longest-ORF scan with the options that are best on the first 80%."""
    _, sequence, classes, counted = truth()
    train, test = counted[:SPLIT], counted[SPLIT:]
    scores = {}
    for least, overlap in itertools.product(LENGTHS, OVERLAPS):
        found = strands(longest_orfs(sequence[:SPLIT], least, overlap), 0, SPLIT)
        scores[least, overlap] = matthews_corrcoef(classes[:SPLIT][train], found[train])
    least, overlap = max(scores, key=scores.__getitem__)
    frames = longest_orfs(sequence[SPLIT:], least, overlap, offset=SPLIT)
    found = strands(frames, SPLIT, len(sequence))
    return {
        "least": least,
        "overlap": overlap,
        "train_mcc": scores[least, overlap],
        "test_mcc": matthews_corrcoef(classes[SPLIT:][test], found[test]),
        "wrong_bases": errors(frames, SPLIT, len(sequence)),
    }


def fit(key: str, folder: Path, develop: bool, overrides: list[str]) -> dict[str, Any]:
    """Train with one seed and test."""
    from mamba2_apps import load
    from mamba2_apps.genomics.scan import predict_bases, spans_of

    seed = int(key.split("=")[1])
    contig, sequence, classes, counted = truth()
    start, end = (DEVELOP, SPLIT) if develop else (SPLIT, len(sequence))
    held = [f"{contig}:{start + 1:,}-{len(sequence):,}"]
    words = [f"--data.test_regions={held}", *overrides, f"--seed={seed}"]
    run, metrics = train_into(folder, key, "genomics/bacterial-cds", words)
    model = load(run)
    task, spans = model.task, spans_of(model.preprocessing.window)
    region = (contig, start, end)
    answers, stitch = predict_bases(task, {contig: sequence}, regions=[region], **spans)
    chances, text = answers[region], sequence[start:end]
    columns = [task.labels.index(name) for name in CODON_LABELS]
    forward, reverse = chances[:, columns[:3]].max(1), chances[:, columns[3:]].max(1)
    test, right = counted[start:end], classes[start:end]

    def score(found: np.ndarray) -> float:
        return float(matthews_corrcoef(right[test], found[test]))

    def frames(**options: float) -> list[Feature]:
        return decode_orfs(text, chances, task.labels, offset=start, **options)

    scores = {
        "mcc_of_bases": score((forward >= 0.5) + 2 * (reverse >= 0.5)),
        "mcc_of_frames": score(strands(frames(), start, end)),
    }
    row: dict[str, Any] = {
        "seed": seed,
        **scores,
        "wrong_bases": errors(frames(), start, end),
        "stitch_error": {"mean": stitch.mean, "largest": stitch.largest},
        "best_epoch": metrics["best_epoch"]["epoch"],
        "parameters": metrics["parameters"],
        "seconds": metrics["seconds"],
        "overrides": overrides,
        "summary": f"{scores}, {metrics['seconds']:.0f} s",
    }
    if develop:
        row["options"] = [
            {
                "bias": b,
                "threshold": t,
                "mcc": score(strands(frames(bias=b, threshold=t), start, end)),
            }
            for b, t in itertools.product(BIASES, THRESHOLDS)
        ]
    return row


def best_options(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The options of decoding by their mean over the fits, best first."""
    means = [
        {**same[0], "mcc": statistics.mean(one["mcc"] for one in same)}
        for same in zip(*(row["options"] for row in rows), strict=True)
    ]
    return sorted(means, key=lambda one: -one["mcc"])


def main() -> None:
    parser = arguments_of_runs("genomics_chlamydia", __doc__, "runs/genomics-chlamydia")
    parser.add_argument("--develop", action="store_true", help="choose options of decoding")
    options = parse_of_runs(parser)
    if options.develop and options.name == "genomics_chlamydia":
        parser.error("--develop needs a --name of its own")
    keys = [f"seed={seed}" for seed in options.seeds]
    todo = (options.runs, options.develop, options.overrides)
    done = do_fits(options.fits, keys, fit, *todo, jobs=options.jobs, minutes=options.minutes)
    if not all(key in done for key in keys):
        return
    rows = [done[key] for key in keys]
    means = {
        name: statistics.mean(row[name] for row in rows)
        for name in ("mcc_of_bases", "mcc_of_frames")
    }
    if options.develop:
        chosen = best_options(rows)
        print(f"{means}; options of decoding, best first: {chosen[:5]}")
        write_record(
            options.name,
            ("torch", "lightning", "scikit-learn", "numpy", "biopython"),
            {**means, "options": chosen, "fits": rows},
        )
        return
    scan = baseline()
    print(f"{means} (bar {BAR}, aim {AIM}); longest-ORF scan {scan}")
    write_record(
        options.name,
        ("torch", "lightning", "scikit-learn", "numpy", "biopython"),
        {"bar": BAR, "aim": AIM, **means, "longest_orf_scan": scan, "fits": rows},
    )


if __name__ == "__main__":
    main()
