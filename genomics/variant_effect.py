"""What a variant changes: the answer for the alternative allele less that for the reference.

Both alleles are read in windows of one length around the same place, so that an insertion or
deletion is not scored for its length: bases are added or dropped at the far end.

- A causal language model gives the log-likelihood ratio of the two windows.
- A masked one gives log p(alt) - log p(ref) at the hidden base for substitutions (GPN, Benegas et
  al. 2023), and for other alleles a ratio of pseudo-likelihoods (Brandes et al. 2023): each base
  around the variant is hidden in turn, as many in both windows, and the log-probabilities of what
  stands there are summed.
- A classifier or regressor gives the difference of each output: logits, or values.
- A model that answers for each base gives each label's largest gain and largest loss around the
  variant, as SpliceAI does (Jaganathan et al. 2019), at bases that both alleles have.

Dimensions: batch b · seqlen l · outputs k
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba2_apps.files import replacing
from mamba2_apps.genomics.fasta import Genome
from mamba2_apps.genomics.preprocessing import DNAPreprocessing, open_sequences
from mamba2_apps.genomics.sequences import reverse_complement
from mamba2_apps.genomics.tokenizers import Tokenizer
from mamba2_apps.genomics.variants import (
    Variant,
    VariantFile,
    VcfLine,
    write_tsv,
    write_vcf_header,
    write_vcf_line,
)
from mamba2_apps.tasks import (
    Classification,
    MaskedReconstruction,
    MultiLabel,
    NextToken,
    Regression,
    Task,
    TokenClassification,
    TokenMultiLabel,
    TrackRegression,
)


def allele_windows(genome: Genome, variant: Variant, size: int) -> tuple[str, str, int]:
    """The reference and the alternative window, of one length, and the variant's place in them.

    The length is `size`, or less on a contig that is shorter. An allele may reach beyond it: a long
    one, or an insertion at the end of a contig. Where the genome has a code for several bases, the
    reference window has the base of REF.
    """
    length = genome[variant.contig]
    change = len(variant.alt) - len(variant.ref)
    size = min(size, length, length + change)
    start = variant.start - size // 2
    # Both windows stay within the contig; the alternative one reaches `change` bases less far.
    start = max(0, min(start, length - size, length + change - size))
    offset = variant.start - start
    before = genome.fetch(variant.contig, start, variant.start)
    end = max(min(start + size + max(-change, 0), length), variant.end)
    after = genome.fetch(variant.contig, variant.end, end)
    reference, alternative = (before + allele + after for allele in (variant.ref, variant.alt))
    return reference[:size], alternative[:size], offset


REACH = 16
"""Bases on either side of an allele that a pseudo-likelihood counts."""
_HIDDEN_AT_ONCE = 16


class VariantScorer:
    """Scores of variants by one model.

    Args:
        task: a RUN's task.
        preprocessing: with which it was trained.
        genome: the reference.
        window: bases around a variant; None: those of the preprocessing, or 4,096.
        both_strands: average the scores of both strands, for answers that mean the same on both; a
            model that reads both strands does so by itself.

    Raises ValueError for a task whose answers have no difference.
    """

    def __init__(
        self,
        task: Task,
        preprocessing: DNAPreprocessing,
        genome: Genome,
        *,
        window: int | None = None,
        both_strands: bool = False,
    ) -> None:
        self.task, self.genome = task.eval(), genome
        self.tokens: Tokenizer = preprocessing.tokens
        self.window = window or preprocessing.length or 4096
        if self.window < 2:
            raise ValueError(f"window is {self.window}, expected at least 2 bases")
        self.along = isinstance(task, TokenClassification | TokenMultiLabel | TrackRegression)
        self.both_strands = both_strands
        if both_strands and self.along:
            raise ValueError(
                "both_strands averages answers that mean the same on both strands; answers for "
                "each base are those of one: train with model.strands equivariant"
            )
        if (self.along or isinstance(task, MaskedReconstruction)) and self.tokens.kind != "base":
            raise ValueError(f"a score for each base needs base tokens, not {self.tokens.kind}")
        bin_size = getattr(task.model.head, "bin_size", 1)  # type: ignore[union-attr]
        if bin_size > 1:
            raise ValueError(
                f"the head answers for bins of {bin_size} bases, which an insertion or deletion "
                "shifts; a score needs an answer for each base"
            )
        self.descriptions = self._describe()

    def _describe(self) -> dict[str, str]:
        """Names of the scores and what they are, for a VCF's header."""
        task = self.task
        if isinstance(task, NextToken):
            return {"LLR": "log-likelihood ratio of alternative and reference window"}
        if isinstance(task, MaskedReconstruction):
            return {
                "LLR": "log-likelihood ratio of alternative and reference hidden base",
                "PLLR": "pseudo-log-likelihood ratio of alternative and reference, for alleles "
                f"that are no substitution, over {REACH} bases on either side",
            }
        if self.along:
            return {
                f"{_id(label)}_{change}": f"largest {change} of {label} within the window"
                for label in task.labels
                for change in ("gain", "loss")
            }
        if isinstance(task, Classification | MultiLabel | Regression):
            what = "value" if isinstance(task, Regression) else "logit"
            return {_id(x): f"{what} of {x}, alternative less reference" for x in task.labels}
        raise ValueError(f"a RUN of {type(task).__name__} gives no score for a variant")

    @torch.inference_mode()
    def scores(self, variants: Sequence[Variant]) -> list[dict[str, float | None]]:
        """Scores of each variant by name.

        None where the model has none for such an allele, or the window does not hold all of it.
        """
        nothing: dict[str, float | None] = dict.fromkeys(self.descriptions)
        found = [dict(nothing) for _ in variants]
        windows = [allele_windows(self.genome, variant, self.window) for variant in variants]
        if isinstance(self.task, MaskedReconstruction):
            return [self._by_hiding(v, *w) for v, w in zip(variants, windows, strict=True)]
        by_length: dict[int, list[int]] = {}
        for index, (variant, (reference, _, offset)) in enumerate(
            zip(variants, windows, strict=True)
        ):
            if offset + max(len(variant.ref), len(variant.alt)) <= len(reference):
                by_length.setdefault(len(reference), []).append(index)
        for indices in by_length.values():
            pairs = [windows[i] for i in indices]
            ours = self._outputs([reference for reference, _, _ in pairs])
            theirs = self._outputs([alternative for _, alternative, _ in pairs])
            for row, index in enumerate(indices):
                if self.along:
                    change = _aligned_change(
                        ours[row], theirs[row], windows[index][2], variants[index]
                    )
                    values = torch.stack([change.amax(0), change.amin(0)], 1).flatten()
                else:
                    values = theirs[row] - ours[row]
                found[index] = dict(zip(self.descriptions, values.tolist(), strict=True))
        return found

    def _outputs(self, sequences: list[str]) -> Tensor:
        """(b, k) to compare, or (b, l, k), averaged over both strands where that is asked for."""
        outputs = self._one_strand(sequences)
        if self.both_strands:
            outputs = (outputs + self._one_strand([reverse_complement(s) for s in sequences])) / 2
        return outputs

    def _one_strand(self, sequences: list[str]) -> Tensor:
        ids = [self.tokens.encode(sequence) for sequence in sequences]
        longest = max(map(len, ids))
        mask = torch.zeros(len(ids), longest, dtype=torch.bool)
        inputs = torch.zeros(len(ids), longest, dtype=torch.int64)
        for row, found in enumerate(ids):
            inputs[row, : len(found)], mask[row, : len(found)] = found, True
        inputs, mask = inputs.to(self.task.device), mask.to(self.task.device)
        outputs = self.task.model(inputs, None if bool(mask.all()) else mask).float()
        if isinstance(self.task, NextToken):
            scores = outputs[:, :-1].log_softmax(-1).gather(2, inputs[:, 1:, None])[..., 0]
            return torch.where(mask[:, 1:], scores, 0).double().sum(1, keepdim=True)
        if isinstance(self.task, TokenClassification):
            return outputs.softmax(-1)
        if isinstance(self.task, TokenMultiLabel):
            return outputs.sigmoid()
        if isinstance(self.task, Regression):
            return self.task.values(outputs)
        return outputs

    def _by_hiding(
        self, variant: Variant, reference: str, alternative: str, offset: int
    ) -> dict[str, float | None]:
        """Scores of a masked language model."""
        longest = max(len(variant.ref), len(variant.alt))
        if offset + longest > len(reference):
            return {"LLR": None, "PLLR": None}
        one_base = len(variant.ref) == len(variant.alt) == 1
        reach = 0 if one_base else REACH
        first, last = max(offset - reach, 0), min(offset + longest + reach, len(reference))
        ratio = self._ratio_of_hidden if one_base else self._ratio_of_pseudo
        score = ratio(reference, alternative, first, last)
        if self.both_strands:
            turned = reverse_complement(reference), reverse_complement(alternative)
            other = ratio(*turned, len(reference) - last, len(reference) - first)
            score = (score + other) / 2
        return {"LLR": score, "PLLR": None} if one_base else {"LLR": None, "PLLR": score}

    def _ratio_of_hidden(self, reference: str, alternative: str, first: int, last: int) -> float:
        """log p(alt) - log p(ref) where the windows' base `first` is hidden."""
        row = self._hidden(reference, [first])[0]
        alt, ref = (self.tokens.encode(text[first:last]) for text in (alternative, reference))
        return float(row[alt[0]] - row[ref[0]])

    def _ratio_of_pseudo(self, reference: str, alternative: str, first: int, last: int) -> float:
        """Of the places first to last, those that are bases in both windows."""
        pairs = list(zip(reference.upper(), alternative.upper(), strict=True))
        places = [i for i in range(first, last) if set(pairs[i]) <= set("ACGT")]
        return self._pseudo(alternative, places) - self._pseudo(reference, places)

    def _pseudo(self, sequence: str, places: list[int]) -> float:
        """Sum of the log-probabilities of the bases at these places, each hidden in its turn."""
        ids = self.tokens.encode(sequence)[places].to(self.task.device)
        return float(self._hidden(sequence, places).gather(1, ids[:, None]).double().sum())

    def _hidden(self, sequence: str, places: list[int]) -> Tensor:
        """(m, k) log-probabilities of what stands at each place, while it alone is hidden."""
        ids = self.tokens.encode(sequence)[None].to(self.task.device)
        rows = []
        for first in range(0, len(places), _HIDDEN_AT_ONCE):
            group = places[first : first + _HIDDEN_AT_ONCE]
            inputs, row = ids.expand(len(group), -1), torch.arange(len(group))
            hide = torch.zeros_like(inputs, dtype=torch.bool)
            hide[row, group] = True
            outputs = self.task({"inputs": inputs, "hide": hide})
            rows.append(outputs[row, group].float().log_softmax(-1))
        return torch.cat(rows)


def answerer(
    preprocessing: DNAPreprocessing, sources: Sequence[str], output: Path | None
) -> Callable[..., Iterator[dict[str, Any]]]:
    """What `mamba2-apps predict RUN VARIANTS.vcf --genome GENOME --output OUT.vcf` does."""

    def answer(
        task: Task,
        *,
        genome: str,
        window: int | None = None,
        both_strands: bool = False,
        at_once: int = 16,
    ) -> Iterator[dict[str, Any]]:
        """Score the variants of a VCF.

        Args:
            task: a RUN's task.
            genome: FASTA or GenBank file of the reference.
            window: bases around a variant.
            both_strands: average the scores of both strands.
            at_once: lines of the VCF per batch.
        """
        if len(sources) != 1:
            raise ValueError(f"{len(sources)} files; scores go back into one VCF, give one INPUT")
        if at_once < 1:
            raise ValueError(f"--at-once is {at_once}, expected at least 1")
        reference = open_sequences(genome)
        scorer = VariantScorer(
            task, preprocessing, reference, window=window, both_strands=both_strands
        )
        file = VariantFile(sources[0], reference)
        scored = _scored_lines(scorer, file, at_once)
        if output is None or output.suffix.lower() not in (".vcf", ".tsv"):
            yield from (row for line, scores in scored for row in _rows(scorer, line, scores))
            return
        with replacing(output) as partial, partial.open("w", encoding="utf-8") as target:
            if output.suffix.lower() == ".tsv":
                write_tsv((row for line, s in scored for row in _rows(scorer, line, s)), target)
                return
            write_vcf_header(file, scorer.descriptions, target)
            for line, scores in scored:
                columns = {
                    n: [None if s is None else s[n] for s in scores] for n in scorer.descriptions
                }
                write_vcf_line(line, columns, target)

    return answer


def _scored_lines(
    scorer: VariantScorer, file: VariantFile, at_once: int
) -> Iterator[tuple[VcfLine, list[dict[str, float | None] | None]]]:
    """Lines with the scores of their alleles; what cannot be scored is None and counted."""
    lines, unscored = iter(file), 0
    while group := list(islice(lines, at_once)):
        variants = [v for line in group for v in line.variants if v is not None]
        scores = iter(scorer.scores(variants) if variants else [])
        for line in group:
            found = [None if v is None else next(scores) for v in line.variants]
            unscored += sum(s is None or set(s.values()) == {None} for s in found)
            yield line, found
    if unscored:
        print(
            f"{file.path}: {unscored} alleles have no score (a dot): they are no bases or reach "
            "beyond the window",
            file=sys.stderr,
        )


def _rows(
    scorer: VariantScorer, line: VcfLine, scores: list[dict[str, float | None] | None]
) -> Iterator[dict[str, Any]]:
    contig, position, name, ref, alts = line.fields[:5]
    for alt, found in zip(alts.split(","), scores, strict=True):
        place = {"contig": contig, "position": int(position), "id": name, "ref": ref, "alt": alt}
        yield {**place, **(found or dict.fromkeys(scorer.descriptions))}


def _aligned_change(ours: Tensor, theirs: Tensor, offset: int, variant: Variant) -> Tensor:
    """(m, k): change of each output at the bases that both alleles have."""
    ref_end, alt_end = offset + len(variant.ref), offset + len(variant.alt)
    shared = min(len(ours) - ref_end, len(theirs) - alt_end)
    same = min(len(variant.ref), len(variant.alt))
    before = theirs[: offset + same] - ours[: offset + same]
    after = theirs[alt_end : alt_end + shared] - ours[ref_end : ref_end + shared]
    return torch.cat([before, after])


def _id(label: str) -> str:
    """A label as a VCF's INFO key."""
    spelled = label.replace("+", "_plus").replace("-", "_minus")
    text = "".join(c if c.isalnum() or c == "_" else "_" for c in spelled)
    return text if not text[:1].isdigit() else f"L{text}"
