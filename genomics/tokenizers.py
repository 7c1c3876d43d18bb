"""From bases to token ids and back: single bases, k-mers, byte pairs.

A tokenizer is a dataclass of JSON values, so that a RUN keeps it. Ids are int64; lower case
(soft-masking) is not part of an id: `soft_mask` gives it beside them. N and the other IUPAC codes
are letters like A, and never padding.
"""

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tokenizers
import tokenizers.models
import tokenizers.trainers
import torch
from jsonargparse.typing import register_type
from torch import Tensor

from mamba2_apps.files import write_json
from mamba2_apps.genomics.sequences import (
    BASES,
    IUPAC,
    check_sequence,
    reverse_complement,
)


@dataclass(frozen=True, kw_only=True)
class Tokenizer(ABC):
    """What the three tokenizers share.

    The last id of the vocabulary, `mask_id`, stands for a hidden token in pretraining and is never
    the answer to one.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def vocabulary(self) -> list[str]:
        """Text of every id but the last, `mask_id`."""

    @property
    def size(self) -> int:
        """Ids, `mask_id` included."""
        return len(self.vocabulary) + 1

    @property
    def mask_id(self) -> int:
        return len(self.vocabulary)

    @property
    def least(self) -> int:
        """Bases that a sequence must have."""
        return 1

    @abstractmethod
    def encode(self, sequence: str) -> Tensor:
        """Ids (l,) int64 of a sequence. Raises ValueError for a letter that is no IUPAC code."""

    @abstractmethod
    def decode(self, ids: Tensor) -> str:
        """The sequence, in upper case, of ids (l,); a hidden token raises ValueError."""

    @abstractmethod
    def spans(self, sequence: str) -> Tensor:
        """Bases (l, 2) int64 that each token of a sequence covers, from and to before."""

    def soft_mask(self, sequence: str) -> Tensor:
        """(l,) bool, True for a token with a base in lower case."""
        lower = np.frombuffer(sequence.encode("ascii"), np.uint8) >= ord("a")
        total = torch.from_numpy(np.concatenate([[0], np.cumsum(lower)]))
        start, end = self.spans(sequence).unbind(1)
        return total[end] > total[start]

    @property
    def complement(self) -> Tensor:
        """(size,) int64: the id of each token's reverse complement.

        Raises ValueError where the reverse complement of a sequence has other tokens than the
        reversed complements of its tokens, as with byte pairs.
        """
        raise ValueError(
            f"{self.kind} tokens have no reverse complement: the other strand is cut into other "
            "tokens; reverse-complement the sequence before tokenising, or use base tokens or "
            "overlapping k-mers"
        )

    def reverse_complement(self, ids: Tensor) -> Tensor:
        """Ids (…, l) of the other strand."""
        return self.complement.to(ids.device)[ids].flip(-1)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}

    def save(self, path: str | PathLike[str]) -> None:
        """Write as JSON, whole or not at all."""
        write_json(Path(path), self.to_dict())


@dataclass(frozen=True, kw_only=True)
class BaseTokenizer(Tokenizer):
    """One token per base: A C G T, then N and the other IUPAC codes."""

    kind: ClassVar[str] = "base"

    @property
    def vocabulary(self) -> list[str]:
        return list(IUPAC)

    def encode(self, sequence: str) -> Tensor:
        return torch.from_numpy(_letter_codes(sequence).astype(np.int64))

    def decode(self, ids: Tensor) -> str:
        return "".join(_texts(self, ids))

    def spans(self, sequence: str) -> Tensor:
        start = torch.arange(len(sequence))
        return torch.stack([start, start + 1], 1)

    @property
    def complement(self) -> Tensor:
        return _complement_of(self)


@dataclass(frozen=True, kw_only=True)
class KmerTokenizer(Tokenizer):
    """k bases per token, a step of one base (overlapping) or of k.

    A word with a letter besides A, C, G and T is the one token "N"; such letters are lost. Where
    the length is no multiple of k, non-overlapping words leave single bases at the end, as in
    Nucleotide Transformer (Dalla-Torre et al. 2024).

    Args:
        k: bases per word, 1 to 8.
        overlapping: a word at every base; a sequence of l bases then has l - k + 1 tokens.
    """

    kind: ClassVar[str] = "kmer"
    k: int = 6
    overlapping: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.k <= 8:
            raise ValueError(f"k is {self.k}, expected 1 to 8 (the vocabulary has 4 ** k words)")

    @property
    def vocabulary(self) -> list[str]:
        words = ["".join(word) for word in itertools.product(BASES, repeat=self.k)]
        rest = [] if self.overlapping or self.k == 1 else list(BASES)
        return [*words, "N" * self.k, *rest, *(["N"] if rest else [])]

    @property
    def least(self) -> int:
        return self.k if self.overlapping else 1

    def encode(self, sequence: str) -> Tensor:
        letters = _letter_codes(sequence).astype(np.int64)
        if self.overlapping and len(letters) < self.k:
            raise ValueError(f"a sequence of {len(letters)} bases has no word of {self.k}")
        step = 1 if self.overlapping else self.k
        whole = len(letters) - len(letters) % step
        words = (
            np.lib.stride_tricks.sliding_window_view(letters[:whole], self.k)[::step]
            if (whole >= self.k)
            else np.empty((0, self.k), np.int64)
        )
        unknown = 4**self.k
        ids = words @ (4 ** np.arange(self.k - 1, -1, -1))
        ids = np.where((words >= 4).any(1), unknown, ids)
        rest = np.minimum(letters[whole:], 4) + unknown + 1
        return torch.from_numpy(np.concatenate([ids, rest]))

    def decode(self, ids: Tensor) -> str:
        words = _texts(self, ids)
        if not self.overlapping:
            return "".join(words)
        # A word of unknown letters tells only what its neighbours do not.
        letters = ["N"] * (len(words) + self.k - 1)
        for start, word in enumerate(words):
            if word[0] != "N":
                letters[start : start + self.k] = word
        return "".join(letters)

    def spans(self, sequence: str) -> Tensor:
        if self.overlapping:
            start = torch.arange(len(sequence) - self.k + 1)
            return torch.stack([start, start + self.k], 1)
        whole = len(sequence) - len(sequence) % self.k
        start = torch.cat([torch.arange(0, whole, self.k), torch.arange(whole, len(sequence))])
        return torch.stack([start, torch.cat([start[1:], torch.tensor([len(sequence)])])], 1)

    @property
    def complement(self) -> Tensor:
        if not self.overlapping:
            raise ValueError(
                "non-overlapping k-mers have no reverse complement: the other strand is cut at "
                "other places; set overlapping true, or reverse-complement the sequence first"
            )
        return _complement_of(self)


@dataclass(frozen=True, kw_only=True)
class BytePairTokenizer(Tokenizer):
    """Byte-pair encoding as in DNABERT-2 (Zhou et al. 2023), through the `tokenizers` library.

    A model from elsewhere may lack letters: each is its unknown token then, which decodes as N, and
    where it has none, encoding raises ValueError. No tokens are added around a sequence.

    Args:
        model: the library's own JSON, as `train` makes it, or what that JSON holds.
    """

    kind: ClassVar[str] = "bpe"
    model: str | dict[str, Any]

    @classmethod
    def train(cls, sequences: Iterable[str], size: int) -> "BytePairTokenizer":
        """Learn `size` ids, `mask_id` and the IUPAC letters included, from sequences."""
        if size <= len(IUPAC) + 1:
            raise ValueError(f"size is {size}, expected more than the {len(IUPAC) + 1} of one base")
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size - 1, initial_alphabet=list(IUPAC), show_progress=False
        )
        texts = (check_sequence(s, "training sequence").upper() for s in sequences)
        model.train_from_iterator(texts, trainer)
        return cls(model=model.to_str())

    def __post_init__(self) -> None:
        text = self.model if isinstance(self.model, str) else json.dumps(self.model)
        try:
            model = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"model is no JSON of the tokenizers library: {error}") from error
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "model", model.to_str())  # equal ones have equal text

    @property
    def vocabulary(self) -> list[str]:
        words = self._model.get_vocab()  # type: ignore[attr-defined]
        return sorted(words, key=words.__getitem__)

    def encode(self, sequence: str) -> Tensor:
        return torch.tensor(self._encoding(sequence).ids, dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        unknown = getattr(self._model.model, "unk_token", None)  # type: ignore[attr-defined]
        return "".join("N" if text == unknown else text for text in _texts(self, ids))

    def spans(self, sequence: str) -> Tensor:
        return torch.tensor(self._encoding(sequence).offsets, dtype=torch.int64).reshape(-1, 2)

    def _encoding(self, sequence: str) -> Any:
        text = check_sequence(sequence, "sequence").upper()
        encoding = self._model.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
        if sum(end - start for start, end in encoding.offsets) != len(text):
            lost = sorted(set(text) - set(self.vocabulary))  # which the library drops
            raise ValueError(
                f"the byte pairs' model has no token for {', '.join(lost)}, nor an unknown one; "
                "learn byte pairs with BytePairTokenizer.train, which knows every letter"
            )
        return encoding


TOKENIZERS: dict[str, type[Tokenizer]] = {
    cls.kind: cls for cls in (BaseTokenizer, KmerTokenizer, BytePairTokenizer)
}


class _ResolvedOptions(dict[str, Any]):
    """Names, to jsonargparse, options that `resolved_options` gave; at run time a plain dict."""


TokenizerOptions = _ResolvedOptions | dict[str, Any]
"""`kind` and options of a tokenizer in a recipe. The recipe that a RUN keeps has the tokenizer in
place of the path to its file, since a RUN predicts without other files."""


def resolved_options(values: dict[str, Any]) -> dict[str, Any]:
    """Options with the model of byte pairs itself where they name its file by `path`.

    The file is what `save` wrote, or the tokenizers library. Raises ValueError that names it where
    it is neither.
    """
    if not isinstance(values, dict):
        raise ValueError(f"tokenizer is {values!r}, expected such as {{kind: kmer, k: 6}}")
    if "path" not in values or values.get("kind") != "bpe":
        return values
    path, rest = values["path"], {key: values[key] for key in values if key != "path"}
    if "model" in rest:
        raise ValueError(f"tokenizer bpe: path is {path} and model is given, too; give one of them")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        saved = isinstance(content, dict) and content.get("kind") == "bpe"
        model = BytePairTokenizer(model=content["model"] if saved else content).model
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"tokenizer bpe: path is {path}: {error}; expected a file of BytePairTokenizer.save, "
            "or a tokenizer.json"
        ) from error
    return {**rest, "model": model}


register_type(
    _ResolvedOptions,
    dict,
    resolved_options,
    type_check=lambda value, _: isinstance(value, dict) and "path" not in value,
)


def build_tokenizer(values: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` described, or a recipe names by its kind.

    Raises ValueError for an unknown kind, an option that it does not have, or a file that is none.
    """
    options = dict(resolved_options(values))
    kind = options.pop("kind", None)
    if kind not in TOKENIZERS:
        raise ValueError(f"tokenizer kind is {kind!r}, expected one of {', '.join(TOKENIZERS)}")
    try:
        return TOKENIZERS[kind](**options)
    except TypeError as error:
        raise ValueError(f"tokenizer {kind}: {error}") from error


def load_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """The tokenizer that `save` wrote."""
    return build_tokenizer(json.loads(Path(path).read_text(encoding="utf-8")))


_CODES = np.full(256, 255, np.uint8)
for _index, _letter in enumerate(IUPAC):
    _CODES[[ord(_letter), ord(_letter.lower())]] = _index


def _letter_codes(sequence: str) -> np.ndarray:
    """Index of each letter among IUPAC, (n,) uint8, without regard to case."""
    codes = _CODES[np.frombuffer(sequence.encode("utf-8", "replace"), np.uint8)]
    if codes.size and codes.max() == 255:
        check_sequence(sequence, "sequence")
    return codes


def _texts(tokenizer: Tokenizer, ids: Tensor) -> list[str]:
    words = tokenizer.vocabulary
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < len(words)):
        wrong = next(i for i in ids.tolist() if not 0 <= i < len(words))
        raise ValueError(
            f"id {wrong} stands for no bases (hidden tokens do not), so it has no text"
        )
    return [words[i] for i in ids.tolist()]


def _complement_of(tokenizer: Tokenizer) -> Tensor:
    words = tokenizer.vocabulary
    index = {word: i for i, word in enumerate(words)}
    other = [index[reverse_complement(word)] for word in words]
    return torch.tensor([*other, tokenizer.mask_id])
