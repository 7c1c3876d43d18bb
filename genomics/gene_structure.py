"""Genes with introns, decoded from a model's answers for each base.

A model scores every base by itself. Here a hidden Markov chain along each strand holds what genes
have in common: they begin with ATG and end with a stop codon, introns lie between GT (or GC) and AG
and leave the reading frame as it was, and no stop codon lies in frame, not even one that an intron
cuts in two. As in AUGUSTUS (Stanke & Waack 2003, doi:10.1093/bioinformatics/btg1080) a state is a
place in the structure of a gene; as in Helixer (Stiehler et al. 2020,
doi:10.1093/bioinformatics/btaa1044) what a base looks like comes from a network.

The score of a path is a sum of

    coding · log q   over its bases, where q is the probability, among the three codon places and
                     no coding at all, of what the path takes the base for
    log odds         of donor and acceptor at each intron's first and last base
    -ends            for each end of a gene, seen or beyond the end of the sequence

and its probability is exp(score) over the sum of all paths. Introns and what lies between genes are
told apart by their ends alone, since models trained on genes (`known: genes`) never saw the latter.
Each strand has a chain of its own: genes often lie in introns of genes on the other one.

Dimensions: seqlen l (bases) · labels k · two strands, each in its own direction · states s ·
predecessors or successors of a state p
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mamba2_apps.genomics.intervals import Feature
from mamba2_apps.genomics.orfs import CODON_LABELS
from mamba2_apps.genomics.sequences import reverse_complement

SPLICE_LABELS = ["donor+", "acceptor+", "donor-", "acceptor-"]
GENE_LABELS = [*SPLICE_LABELS, *CODON_LABELS]
DONORS, STARTS, STOPS = ("GT", "GC"), ("ATG",), ("TAA", "TAG", "TGA")
_NEVER = -1e30
"""Instead of -inf, of which differences are no numbers."""
_CERTAIN = 1e-4
"""Probabilities of sites are kept this far from 0 and 1, so that no single one decides."""
_BLOCK = 1024
"""Bases whose scores are computed at once."""

_EVENTS = ("open", "nothing", "donor", "acceptor", "start", "stop", "never")
_RULES = ("any", "T", "not T", "A", "G", "not A or G", "not A")
"""What letter a base must be."""
_KINDS = ("none", "codon1", "codon2", "codon3", "stop")
"""What a base may look like."""


class _Edge(NamedTuple):
    """A step from the state of one base to that of the next; `before` is "" at the first base."""

    before: str
    after: str
    event: str = "nothing"
    rule: str = "any"


def _edges() -> list[_Edge]:
    """All steps of a chain.

    Names of states end with what has been read of a codon where that may become a stop codon.
    """
    needs = {"codon1T": "T", "codon1": "not T", "codon2TA": "A", "codon2TG": "G"}
    after_codon = ("codon1T", "codon1")
    edges = [
        _Edge("none", "none"),
        _Edge("none", "start1", "start"),
        _Edge("start1", "start2"),
        _Edge("start2", "start3"),
        _Edge("stop1", "stop2"),
        _Edge("stop2", "stop3"),
        _Edge("stop3", "none"),
    ]
    for last in ("start3", "codon3"):
        edges += [_Edge(last, state, "nothing", needs[state]) for state in after_codon]
        edges += [_Edge(last, "intron0", "donor"), _Edge(last, "stop1", "stop")]
    edges += [_Edge("intron0", state, "acceptor", needs[state]) for state in after_codon]
    inside = [
        ("1T", "codon2TA", "A"),
        ("1T", "codon2TG", "G"),
        ("1T", "codon2", "not A or G"),
        ("1", "codon2", "any"),
        ("2TA", "codon3", "not A or G"),
        ("2TG", "codon3", "not A"),
        ("2", "codon3", "any"),
    ]
    for read, after, rule in inside:
        edges.append(_Edge(f"codon{read}", after, "nothing", rule))
        edges.append(_Edge(f"intron{read}", after, "acceptor", rule))
    for read in ("1T", "1", "2TA", "2TG", "2"):
        edges.append(_Edge(f"codon{read}", f"intron{read}", "donor"))
    for read in ("0", "1T", "1", "2TA", "2TG", "2"):
        edges.append(_Edge(f"intron{read}", f"intron{read}"))
    # Of a codon that begins before the sequence nothing is known: it is none that may stop.
    edges += [_Edge("", "none"), _Edge("", "start1", "start")]
    edges += [_Edge("", state, "open", needs[state]) for state in after_codon]
    edges += [
        _Edge("", state, "open") for state in ("codon2", "codon3", "intron0", "intron1", "intron2")
    ]
    return edges


_EDGES = _edges()
_STATES = list(dict.fromkeys(edge.after for edge in _EDGES))
_NONE, _START1, _STOP3 = (_STATES.index(name) for name in ("none", "start1", "stop3"))
_PLACES = np.array([int(s[5]) if s[:5] in ("codon", "start") else 0 for s in _STATES])
"""(s,) place in its codon, 0 for states that are no codon's, or a stop codon's."""
_IS_CODING = np.array([s[:5] in ("codon", "start") or s[:4] == "stop" for s in _STATES])
_KIND_OF = np.array([4 if s[:4] == "stop" else _PLACES[i] for i, s in enumerate(_STATES)])
_CLOSED = np.isin(np.arange(len(_STATES)), (_NONE, _STOP3))
"""(s,) states in which a sequence ends without cutting a gene."""


class _Table(NamedTuple):
    """Steps by the state that they lead to, or by that they come from; each (s, p).

    A state with fewer steps than p has some that never happen.
    """

    other: np.ndarray  # the state at the other end
    event: np.ndarray
    rule: np.ndarray
    kind: np.ndarray  # of the state after the step


def _table(*, by_after: bool) -> _Table:
    rows: list[list[tuple[int, int, int, int]]] = [[] for _ in _STATES]
    for edge in _EDGES:
        if edge.before:
            ends = _STATES.index(edge.before), _STATES.index(edge.after)
            event, rule = _EVENTS.index(edge.event), _RULES.index(edge.rule)
            rows[ends[by_after]].append((ends[not by_after], event, rule, int(_KIND_OF[ends[1]])))
    widest = max(map(len, rows))
    unused = (0, _EVENTS.index("never"), 0, 0)
    filled = np.array([row + [unused] * (widest - len(row)) for row in rows])
    return _Table(*np.moveaxis(filled, -1, 0))


_INTO, _FROM = _table(by_after=True), _table(by_after=False)


class _Scores:
    """Scores of the steps to each base, of both strands in their own direction.

    A strand's bases are counted from its own first one; see `splice_posteriors` for the arguments.
    """

    def __init__(
        self,
        sequence: str,
        probabilities: np.ndarray,
        labels: Sequence[str],
        coding: float,
        ends: float,
        floor: float,
    ) -> None:
        check_gene_labels(labels)
        if len(sequence) != len(probabilities):
            raise ValueError(
                f"{len(sequence)} bases and probabilities of {len(probabilities)}, expected as many"
            )
        self.coding, self.ends, self.floor = coding, ends, floor
        strands = []
        for strand, text in (("+", sequence.upper()), ("-", reverse_complement(sequence.upper()))):
            names = ("donor", "acceptor", "codon1", "codon2", "codon3")
            chances = probabilities[:, [labels.index(f"{name}{strand}") for name in names]]
            letters = np.frombuffer(text.encode("ascii"), np.uint8)
            strands.append((letters, chances if strand == "+" else chances[::-1]))
        self.letters = np.stack([letters for letters, _ in strands], 1)  # (l, 2)
        self.chances = np.stack([chances for _, chances in strands], 1)  # (l, 2, 5)
        self.at = {
            "donor": self._words(DONORS),
            "acceptor": np.roll(self._words(("AG",)), 2, 0),
            "start": self._words(STARTS),
            "stop": self._words(STOPS),
        }
        self.at["acceptor"][:2] = False

    def __len__(self) -> int:
        return len(self.letters)

    def _words(self, words: Sequence[str]) -> np.ndarray:
        """(l, 2) whether one of these words begins at a base."""
        found = np.zeros(self.letters.shape, bool)
        for word in words:
            places = max(len(self) - len(word) + 1, 0)
            same = [self.letters[i : i + places] == ord(letter) for i, letter in enumerate(word)]
            found[:places] |= np.all(same, 0)
        return found

    def first(self) -> np.ndarray:
        """(2, s) scores of each state at the first base."""
        events, rules, kinds = self._parts(0, 1)
        scores = np.full((2, len(_STATES)), _NEVER)
        for edge in _EDGES:
            if not edge.before:
                state = _STATES.index(edge.after)
                event, rule = _EVENTS.index(edge.event), _RULES.index(edge.rule)
                scores[:, state] = (
                    events[0, :, event] + rules[0, :, rule] + kinds[0, :, _KIND_OF[state]]
                )
        return scores

    def last(self) -> np.ndarray:
        """(s,) scores of the sequence's end behind each state."""
        return np.where(_CLOSED, 0.0, -self.ends)

    def steps(self, table: _Table, start: int, stop: int) -> np.ndarray:
        """(n, 2, s, p) scores of the steps to each base from `start` to `stop`."""
        events, rules, kinds = self._parts(start, stop)
        return events[..., table.event] + rules[..., table.rule] + kinds[..., table.kind]

    def _parts(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores (n, 2, ·) of events, letters' rules and kinds of the bases start to stop."""
        span = slice(start, stop)
        letters = self.letters[span]
        is_t, is_a, is_g = (letters == ord(letter) for letter in "TAG")
        allowed = (np.ones_like(is_t), is_t, ~is_t, is_a, is_g, ~(is_a | is_g), ~is_a)
        rules = np.where(np.stack(allowed, -1), 0.0, _NEVER)
        # The acceptor is labelled at the last base of the intron, the step is to the next one.
        before = np.arange(start, stop) - 1
        sites: dict[str, Any] = {
            "donor": _log_odds(self.chances[span, :, 0]),
            "acceptor": _log_odds(self.chances[before.clip(0), :, 1]),
            "start": -self.ends,
            "stop": -self.ends,
        }
        events = np.full((*letters.shape, len(_EVENTS)), _NEVER)
        events[..., _EVENTS.index("open")] = -self.ends
        events[..., _EVENTS.index("nothing")] = 0.0
        for name, score in sites.items():
            events[..., _EVENTS.index(name)] = np.where(self.at[name][span], score, _NEVER)
        return events, rules, self._kinds(span)

    def _kinds(self, span: slice) -> np.ndarray:
        """(n, 2, 5) scores of what each base looks like.

        A stop codon may look either way: some annotations count it as coding, others do not.
        """
        codon = self.chances[span, :, 2:].astype(np.float64)
        chances = np.concatenate([1 - codon.sum(-1, keepdims=True), codon], -1)
        chances = chances.clip(self.floor, 1)
        logs = self.coding * np.log(chances / chances.sum(-1, keepdims=True))
        return np.concatenate([logs, logs.max(-1, keepdims=True)], -1)


def splice_posteriors(
    sequence: str,
    probabilities: np.ndarray,
    labels: Sequence[str],
    *,
    coding: float = 0.01,
    ends: float = 3.0,
    floor: float = 0.1,
    doubt: float = 0.01,
) -> np.ndarray:
    """Probabilities (l, 4) of `SPLICE_LABELS`, given all that the model says and what a gene is.

    Forward and backward over every gene structure of the sequence, whose ends may lie within a
    gene, mixed with a little of what the model says of each base. Takes some 700 bytes for each
    base: for genes and their surroundings, not chromosomes.

    Args:
        sequence: l bases.
        probabilities: (l, k).
        labels: names of the k columns, among them `GENE_LABELS`.
        coding: weight of what each base looks like. Neighbouring bases make the same mistakes, so
            that theirs are far from as many witnesses.
        ends: what each end of a gene costs.
        floor: least probability of what a base looks like, before they are divided by their sum.
        doubt: probability that a gene, or its annotation, does not follow the rules; the model's
            own probability of a site stands then. All defaults were chosen on genes held out for
            this (docs/genomics.md).

    Raises ValueError where labels are missing.
    """
    scores = _Scores(sequence, probabilities, labels, coding, ends, floor)
    answers = np.zeros((len(sequence), 2, 2))  # donor and acceptor, of each strand in its direction
    if not sequence:
        return answers.reshape(0, len(SPLICE_LABELS))
    forward, backward = _forward(scores), _backward(scores)
    total = _log_sum(forward[-1] + scores.last())
    for start, stop in _blocks(len(scores)):
        before = forward[start - 1 : stop - 1][..., _INTO.other]
        through = before + scores.steps(_INTO, start, stop) + backward[start:stop, ..., None]
        for column, (event, shift) in enumerate((("donor", 0), ("acceptor", 1))):
            found = _log_sum(through[..., _INTO.event == _EVENTS.index(event)]) - total
            answers[start - shift : stop - shift, column] = np.exp(np.minimum(found, 0.0))
    answers = (1 - doubt) * answers + doubt * np.moveaxis(scores.chances[..., :2], 2, 1)
    return np.concatenate([answers[..., 0], answers[::-1, :, 1]], 1)


def decode_genes(
    sequence: str,
    probabilities: np.ndarray,
    labels: Sequence[str],
    contig: str = "",
    offset: int = 0,
    *,
    coding: float = 0.01,
    ends: float = 3.0,
    floor: float = 0.1,
) -> list[Feature]:
    """The coding regions of the most probable gene structure of each strand.

    Their blocks are the coding parts of exons, stop codon included. A gene that the sequence's ends
    cut has no start or no stop, and a phase. The score is the mean probability of the places that
    its bases have in their codons × 1000. Viterbi's algorithm; takes some 140 bytes for each base.

    Args:
        sequence: l bases.
        probabilities: (l, k).
        labels: names of the k columns, among them `GENE_LABELS`.
        contig: name for the features.
        offset: place of the first base on the contig.
        coding: as in `splice_posteriors`, and so on.
        ends: what each end of a gene costs.
        floor: least probability of what a base looks like.

    Raises ValueError where labels are missing.
    """
    scores = _Scores(sequence, probabilities, labels, coding, ends, floor)
    if not sequence:
        return []
    paths = _best_paths(scores)
    found = []
    for column in range(2):
        for start, stop in _runs(paths[:, column] != _NONE):
            path, chances = paths[start:stop, column], scores.chances[start:stop, column, 2:]
            if _IS_CODING[path].any():
                place = ("+-"[column], start, len(sequence), contig, offset)
                found.append(_gene(path, chances, *place))
    return sorted(found, key=lambda f: (f.start, f.end))


def check_gene_labels(labels: Sequence[str]) -> None:
    """Raises ValueError unless there are labels of splice sites and codon places."""
    if not set(GENE_LABELS) <= set(labels):
        raise ValueError(
            f"genes need the labels {', '.join(GENE_LABELS)} (targets: donor, acceptor, codon); "
            f"this model has {', '.join(labels)}"
        )


def _forward(scores: _Scores) -> np.ndarray:
    """(l, 2, s) log sums over all ways to be in a state, from the first base on."""
    totals = np.empty((len(scores), 2, len(_STATES)))
    totals[0] = scores.first()
    for start, stop in _blocks(len(scores)):
        for at, step in enumerate(scores.steps(_INTO, start, stop), start):
            totals[at] = _log_sum(totals[at - 1][:, _INTO.other] + step)
    return totals


def _backward(scores: _Scores) -> np.ndarray:
    """(l, 2, s) log sums over all that may follow a state, to the last base."""
    totals = np.empty((len(scores), 2, len(_STATES)))
    totals[-1] = scores.last()
    for start, stop in reversed(list(_blocks(len(scores)))):
        steps = scores.steps(_FROM, start, stop)
        for at in range(stop - 1, start - 1, -1):
            totals[at - 1] = _log_sum(totals[at][:, _FROM.other] + steps[at - start])
    return totals


def _best_paths(scores: _Scores) -> np.ndarray:
    """(l, 2) states of the path with the largest score."""
    best = scores.first()
    choices = np.zeros((len(scores), 2, len(_STATES)), np.int8)
    for start, stop in _blocks(len(scores)):
        for at, step in enumerate(scores.steps(_INTO, start, stop), start):
            sums = best[:, _INTO.other] + step
            choices[at] = sums.argmax(-1)
            best = sums.max(-1)
    paths = np.zeros((len(scores), 2), np.int8)
    for column, state in enumerate((best + scores.last()).argmax(-1).tolist()):
        for at in range(len(scores) - 1, -1, -1):
            paths[at, column] = state
            state = int(_INTO.other[state, choices[at, column, state]])
    return paths


def _gene(
    path: np.ndarray,
    chances: np.ndarray,
    strand: str,
    start: int,
    length: int,
    contig: str,
    offset: int,
) -> Feature:
    """The coding region of one gene.

    Args:
        path: (n,) its states.
        chances: (n, 3) probabilities of codon places.
        strand: on which it lies.
        start: place of its first base in the strand's own direction.
        length: of the sequence.
        contig: its name.
        offset: place of the sequence on it.
    """
    blocks = [(start + a, start + b) for a, b in _runs(_IS_CODING[path])]
    if strand == "-":
        blocks = [(length - b, length - a) for a, b in reversed(blocks)]
    places = _PLACES[path]
    inside = np.flatnonzero(places)
    phase = (1 - int(places[inside[0]])) % 3 if len(inside) else 0
    sure = float(chances[inside, places[inside] - 1].mean()) if len(inside) else 0.0
    return Feature(
        contig=contig,
        start=offset + blocks[0][0],
        end=offset + blocks[-1][1],
        strand="+" if strand == "+" else "-",
        name="gene",
        kind="CDS",
        score=round(1000 * sure),
        blocks=tuple((offset + a, offset + b) for a, b in blocks),
        attributes={"phase": str(phase)} if phase else {},
        has_start=bool(path[0] == _START1),
        has_stop=bool(path[-1] == _STOP3),
    )


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Stretches of the bases behind the first one."""
    return ((at, min(at + _BLOCK, length)) for at in range(1, length, _BLOCK))


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of the stretches of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _log_odds(chances: np.ndarray) -> np.ndarray:
    chances = chances.astype(np.float64).clip(_CERTAIN, 1 - _CERTAIN)
    odds: np.ndarray = np.log(chances) - np.log1p(-chances)
    return odds


def _log_sum(values: np.ndarray) -> Any:
    """log Σ exp over the last axis."""
    largest = values.max(-1)
    return largest + np.log(np.exp(values - largest[..., None]).sum(-1))
