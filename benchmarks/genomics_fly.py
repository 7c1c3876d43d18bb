"""Donor sites in 100 held-out fly genes, among every GT inside them.

    python benchmarks/genomics_fly.py [--jobs 3] [--pretrained RUN] [-- --trainer.max_epochs=30]
    python benchmarks/genomics_fly.py --develop --name trial [-- --data.margin=500]
    python benchmarks/genomics_fly.py --score RUN --name scored

Each fit is `mamba2-apps train genomics/genes` on the 486 training genes; with --pretrained it
starts from a RUN of `genomics/pretrain`, which has not seen the held-out genes, and is reported
beside the others. Sites are read in the gene's direction; GC and AT donors are no GT and left out.
Scored are the model's probabilities, and as `decoded` those that `splice_posteriors` makes of them.
The 95% interval is a bootstrap over genes. Baselines, trained on the GT of the same training genes:
logistic regression on one-hot bases, 60 on each side, and gradient boosting on position weights and
hexamer counts. --develop trains without every fifth training gene and scores on these: what is
chosen is chosen there. --score trains nothing and scores a
RUN. Needs data/fly. Each fit is a line
of results/genomics_fly.jsonl when it ends, and is not run again; the summary is
results/genomics_fly.json.
"""

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _fits import arguments_of_runs, do_fits, parse_of_runs, train_into
from _record import write_record
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from mamba2_apps.genomics.annotations import read_features
from mamba2_apps.genomics.data import one_hot
from mamba2_apps.genomics.fasta import Genome
from mamba2_apps.genomics.intervals import Feature
from mamba2_apps.genomics.sequences import reverse_complement

GENOME = "data/fly/chr2R.fa.gz"
TRAIN, TEST = "data/fly/genes.train.bed12", "data/fly/genes.test.bed12"
BAR, AIM, AUROC_BAR = 0.88, 0.93, 0.995
FLANK, BOOTSTRAPS = 60, 1000
CONTEXT = 500
"""Bases on either side of a gene that the model is given."""
WINDOW = 8192
"""Bases that it is given at once, as in training."""
NEAR = slice(FLANK - 4, FLANK + 8)
"""Bases around a site that have weights."""


class Sites(NamedTuple):
    """Every GT inside some genes, in their direction."""

    gene: np.ndarray  # (n,) index of its gene
    place: np.ndarray  # (n,) forward-strand place of its G
    donor: np.ndarray  # (n,) bool
    windows: list[str]  # (n,) FLANK bases before the intron and FLANK of it


def sites_of(genes: list[Feature], genome: Genome) -> Sites:
    """Annotated donors that are GT, and all other GT from a gene's first to its last base."""
    rows = []
    for index, gene in enumerate(genes):
        forward = gene.strand == "+"
        low = max(gene.start - FLANK, 0)
        text = genome.fetch(gene.contig, low, min(gene.end + FLANK, genome[gene.contig])).upper()
        donors = {gap[0] if forward else gap[1] - 1 for gap in gene.gaps}
        strand = text if forward else reverse_complement(text)
        for at in range(FLANK, FLANK + len(gene) - 1):
            if strand[at : at + 2] == "GT":
                place = low + at if forward else low + len(text) - 1 - at
                rows.append((index, place, place in donors, strand[at - FLANK : at + FLANK]))
    columns = list(zip(*rows, strict=True))
    return Sites(*(np.array(column) for column in columns[:3]), list(columns[3]))


def scores_of(sites: Sites, values: np.ndarray) -> dict[str, Any]:
    """AUPRC and AUROC, with 95% intervals over genes."""
    rng = np.random.default_rng(0)
    by_gene = [np.flatnonzero(sites.gene == gene) for gene in np.unique(sites.gene)]
    draws = []
    for _ in range(BOOTSTRAPS):
        chosen = np.concatenate([by_gene[i] for i in rng.integers(0, len(by_gene), len(by_gene))])
        draws.append(average_precision_score(sites.donor[chosen], values[chosen]))
    low, high = np.percentile(draws, [2.5, 97.5])
    return {
        "auprc": float(average_precision_score(sites.donor, values)),
        "auprc_95": [float(low), float(high)],
        "auroc": float(roc_auc_score(sites.donor, values)),
    }


def hexamer_odds(genes: list[Feature], genome: Genome) -> tuple[dict[str, int], np.ndarray]:
    """Number of each hexamer, and log odds (3, n + 1) of coding, by codon place, against introns.

    The last column, 0, is for hexamers that these genes do not have.
    """
    coding, introns = [Counter[str]() for _ in range(3)], Counter[str]()
    for gene in genes:
        exons = [genome.fetch(gene.contig, *block).upper() for block in gene.blocks]
        text = "".join(exons)
        text = text if gene.strand == "+" else reverse_complement(text)
        for place in range(3):
            coding[place].update(text[i : i + 6] for i in range(place, len(text) - 5, 3))
        for gap in gene.gaps:
            text = genome.fetch(gene.contig, *gap).upper()
            text = text if gene.strand == "+" else reverse_complement(text)
            introns.update(text[i : i + 6] for i in range(len(text) - 5))
    number = {word: i for i, word in enumerate(sorted(set(introns).union(*coding)))}

    def shares(counts: Counter[str]) -> np.ndarray:
        found = np.array([counts[word] + 1.0 for word in number])
        return np.append(np.log(found / (sum(counts.values()) + 4096)), 0.0)

    return number, np.stack([shares(counts) - shares(introns) for counts in coding])


def features_of(
    sites: Sites, weights: np.ndarray, number: dict[str, int], odds: np.ndarray
) -> np.ndarray:
    """Position weights near the site and their sum, the bases there, hexamers of both flanks.

    Hexamers give the log odds of coding in each of three frames, the best of them and their mean,
    and by how much the best is better before the site than after it.
    """
    bases = one_hot(sites.windows).reshape(len(sites.windows), 2 * FLANK, 4)[:, NEAR]
    by_place = (bases * weights).sum(-1)
    rows = []
    for window in sites.windows:
        row: list[float] = []
        for side in (window[:FLANK], window[FLANK:]):
            at = np.arange(len(side) - 5)
            values = odds[:, [number.get(side[i : i + 6], -1) for i in at]]
            frames = [values[(at + frame) % 3, at].sum() for frame in range(3)]
            row += [max(frames), values.mean(0).sum(), *frames]
        rows.append([*row, row[0] - row[5]])
    return np.column_stack([by_place, by_place.sum(1), bases.argmax(-1), np.array(rows)])


def baselines(
    train_genes: list[Feature], train: Sites, test: Sites, genome: Genome
) -> dict[str, dict[str, Any]]:
    """The boosting's reach and options were the best of a few by cross-validation over genes."""
    linear = LogisticRegression(C=0.1, max_iter=2000)
    linear.fit(one_hot(train.windows), train.donor)
    bases = one_hot(train.windows).reshape(len(train.windows), 2 * FLANK, 4)[:, NEAR]
    counts = [bases[train.donor == kind].sum(0) + 1 for kind in (True, False)]
    donor, decoy = (c / c.sum(1, keepdims=True) for c in counts)
    weights = np.log(donor) - np.log(decoy)
    number, odds = hexamer_odds(train_genes, genome)
    boosted = HistGradientBoostingClassifier(
        max_iter=200, learning_rate=0.05, l2_regularization=1.0, random_state=0
    )
    boosted.fit(features_of(train, weights, number, odds), train.donor)
    guesses = boosted.predict_proba(features_of(test, weights, number, odds))[:, 1]
    return {
        "one-hot logistic regression": scores_of(
            test, linear.predict_proba(one_hot(test.windows))[:, 1]
        ),
        "gradient boosting, position weights and hexamers": scores_of(test, guesses),
    }


def genes_and_sites(path: str, genome: Genome) -> tuple[list[Feature], Sites]:
    genes = read_features(path, genome)
    return genes, sites_of(genes, genome)


def annotations(folder: Path, develop: bool) -> tuple[str, str]:
    """Files of the genes to train on and of those to score, as the recipe takes them."""
    if not develop:
        return TRAIN, TEST
    folder.mkdir(parents=True, exist_ok=True)
    rows = Path(TRAIN).read_text(encoding="utf-8").splitlines(keepends=True)
    paths = folder / "train.bed12", folder / "held.bed12"
    paths[0].write_text("".join(row for i, row in enumerate(rows) if i % 5), encoding="utf-8")
    paths[1].write_text("".join(rows[::5]), encoding="utf-8")
    return str(paths[0]), str(paths[1])


def donors_of(
    task: Any, genes: list[Feature], sites: Sites, genome: Genome
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of a donor at each site: the model's, and decoded ones, of the same answers."""
    from mamba2_apps.genomics.gene_structure import SPLICE_LABELS, splice_posteriors
    from mamba2_apps.genomics.scan import predict_bases, spans_of

    values, decoded = np.empty(len(sites.gene)), np.empty(len(sites.gene))
    for index, gene in enumerate(genes):
        start, end = max(gene.start - CONTEXT, 0), min(gene.end + CONTEXT, genome[gene.contig])
        text = genome.fetch(gene.contig, start, end)
        (answers,) = predict_bases(task, {"gene": text}, **spans_of(WINDOW))[0].values()
        mine = sites.gene == index
        at, label = sites.place[mine] - start, f"donor{gene.strand}"
        values[mine] = answers[at, task.labels.index(label)]
        posteriors = splice_posteriors(text, answers, task.labels)
        decoded[mine] = posteriors[at, SPLICE_LABELS.index(label)]
    return values, decoded


def scores_of_task(task: Any, genes: list[Feature], sites: Sites, genome: Genome) -> dict[str, Any]:
    """Scores of the model's probabilities, and under `decoded` of decoded ones."""
    values, decoded = donors_of(task, genes, sites, genome)
    return {**scores_of(sites, values), "decoded": scores_of(sites, decoded)}


def fit(
    key: str,
    folder: Path,
    overrides: list[str],
    pretrained: str | None,
    train: str,
    test: str,
) -> dict[str, Any]:
    """Train on the genes of one file with one seed and score the sites of another's."""
    from mamba2_apps import load

    seed = int(key.split("seed=")[1])
    words = [f"--data.annotation={train}", f"--data.test_annotation={test}", *overrides]
    words.append(f"--seed={seed}")
    if pretrained is not None:
        words.append(f"--adaptation.start={pretrained}")
    run, metrics = train_into(folder, key, "genomics/genes", words)
    task, genome = load(run).task, Genome(GENOME)
    genes, sites = genes_and_sites(test, genome)
    scores = scores_of_task(task, genes, sites, genome)
    return {
        "seed": seed,
        "pretrained": pretrained is not None,
        **scores,
        "test": metrics["test"],
        "best_epoch": metrics["best_epoch"]["epoch"],
        "parameters": metrics["parameters"],
        "seconds": metrics["seconds"],
        "overrides": overrides,
        "summary": f"AUPRC {scores['auprc']:.4f}, AUROC {scores['auroc']:.4f}, decoded "
        f"{scores['decoded']['auprc']:.4f} and {scores['decoded']['auroc']:.4f}, "
        f"{metrics['seconds']:.0f} s",
    }


def score_run(run: Path, name: str) -> None:
    """Score the sites of the held-out genes by a RUN that is there."""
    from mamba2_apps import load

    genome = Genome(GENOME)
    scores = scores_of_task(load(run).task, *genes_and_sites(TEST, genome), genome)
    print(scores)
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    write_record(name, ("torch", "scikit-learn"), {**scores, "training": metrics})


def means_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.mean(row[name] for row in rows) for name in ("auprc", "auroc")}


def main() -> None:
    parser = arguments_of_runs("genomics_fly", __doc__, "runs/genomics-fly")
    parser.add_argument("--pretrained", help="RUN of genomics/pretrain to start from")
    parser.add_argument("--develop", action="store_true", help="score on training genes held out")
    parser.add_argument(
        "--score", type=Path, metavar="RUN", help="train nothing and score this RUN"
    )
    options = parse_of_runs(parser)
    if (options.develop or options.score) and options.name == "genomics_fly":
        parser.error("--develop and --score need a --name of their own")
    if options.score:
        score_run(options.score, options.name)
        return
    kind = "scratch" if options.pretrained is None else "pretrained"
    keys = [f"{kind} seed={seed}" for seed in options.seeds]
    train_path, test_path = annotations(options.runs, options.develop)
    todo = (options.runs, options.overrides, options.pretrained, train_path, test_path)
    done = do_fits(options.fits, keys, fit, *todo, jobs=options.jobs, minutes=options.minutes)
    if not all(key in done for key in keys):
        return
    genome = Genome(GENOME)
    train_genes, train = genes_and_sites(train_path, genome)
    _, test = genes_and_sites(test_path, genome)
    print(f"test: {test.donor.sum()} donors among {len(test.donor)} GT")
    scores = baselines(train_genes, train, test, genome)
    means: dict[str, dict[str, Any]] = {}
    for kind in ("scratch", "pretrained"):
        rows = [row for key, row in done.items() if key.startswith(kind)]
        if rows:
            means[kind] = {
                **means_of(rows),
                "decoded": means_of([row["decoded"] for row in rows]),
            }
    print(f"{means} (bar {BAR}, AUROC {AUROC_BAR}; aim {AIM})")
    for name, found in scores.items():
        print(f"{name}: {found}")
    write_record(
        options.name,
        ("torch", "lightning", "scikit-learn", "numpy"),
        {
            "bar": BAR,
            "auroc_bar": AUROC_BAR,
            "aim": AIM,
            "donors": int(test.donor.sum()),
            "decoys": int((~test.donor).sum()),
            "means": means,
            "baselines": scores,
            "fits": list(done.values()),
        },
    )


if __name__ == "__main__":
    main()
