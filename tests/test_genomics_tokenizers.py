"""Tokenizers: round trips, soft-masking, and the reverse complement at token level."""

import json

import pytest
import tokenizers
import tokenizers.models
import tokenizers.processors
import tokenizers.trainers
import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba2_apps.genomics.sequences import IUPAC, reverse_complement
from mamba2_apps.genomics.tokenizers import (
    BaseTokenizer,
    BytePairTokenizer,
    KmerTokenizer,
    build_tokenizer,
    load_tokenizer,
    resolved_options,
)

any_dna = st.text(alphabet=IUPAC + IUPAC.lower(), min_size=1, max_size=50)
plain_dna = st.text(alphabet="ACGTacgt", min_size=1, max_size=50)
BPE = BytePairTokenizer.train(["ACGTACGTTTGACA" * 5, "GGGACGTNNACGT" * 4], 40)
TOKENIZERS = [
    BaseTokenizer(),
    KmerTokenizer(k=1),
    KmerTokenizer(k=3),
    KmerTokenizer(k=4, overlapping=False),
    BPE,
]


@given(any_dna)
def test_bases_and_byte_pairs_come_back_with_every_letter(sequence):
    for tokenizer in (BaseTokenizer(), BPE):
        assert tokenizer.decode(tokenizer.encode(sequence)) == sequence.upper()
    mask = BaseTokenizer().soft_mask(sequence)
    again = BaseTokenizer().decode(BaseTokenizer().encode(sequence))
    pairs = zip(again, mask, strict=True)
    assert "".join(c.lower() if soft else c for c, soft in pairs) == sequence


@given(plain_dna)
def test_words_come_back(sequence):
    for k in (1, 2, 5):
        separate = KmerTokenizer(k=k, overlapping=False)
        assert separate.decode(separate.encode(sequence)) == sequence.upper()
        overlapping = KmerTokenizer(k=k)
        if len(sequence) >= k:
            ids = overlapping.encode(sequence)
            assert len(ids) == len(sequence) - k + 1
            assert overlapping.decode(ids) == sequence.upper()


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: f"{t.kind}")
@given(any_dna)
def test_ids_spans_and_soft_mask_fit_each_other(tokenizer, sequence):
    if len(sequence) < 4:
        sequence = (sequence * 4)[:4]
    ids, spans = tokenizer.encode(sequence), tokenizer.spans(sequence)
    assert ids.dtype == torch.int64
    assert len(ids) == len(spans) == len(tokenizer.soft_mask(sequence))
    assert (ids >= 0).all()
    assert (ids < tokenizer.mask_id).all()
    assert spans[0, 0] == 0
    assert spans[-1, 1] == len(sequence)
    for (start, end), soft in zip(spans.tolist(), tokenizer.soft_mask(sequence), strict=True):
        assert bool(soft) == any(c.islower() for c in sequence[start:end])
    assert len(tokenizer.vocabulary) == len(set(tokenizer.vocabulary)) == tokenizer.size - 1


@given(any_dna)
def test_the_other_strand_of_the_tokens_is_that_of_the_sequence(sequence):
    for tokenizer in (BaseTokenizer(), KmerTokenizer(k=1), KmerTokenizer(k=4)):
        text = (sequence * 4)[: max(len(sequence), 4)]
        ids = tokenizer.encode(text)
        other = tokenizer.reverse_complement(ids)
        assert torch.equal(other, tokenizer.encode(reverse_complement(text)))
        assert torch.equal(tokenizer.reverse_complement(other), ids)
    complement = BaseTokenizer().complement
    assert complement[BaseTokenizer().mask_id] == BaseTokenizer().mask_id


def test_n_is_a_letter_and_words_with_it_are_unknown():
    base, word = BaseTokenizer(), KmerTokenizer(k=3)
    assert base.encode("ACGTN").tolist() == [0, 1, 2, 3, 4]
    assert word.encode("ACGNT").tolist() == [0b000110, 64, 64]
    assert word.decode(torch.tensor([6, 64, 64])) == "ACGNN"


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: f"{t.kind}")
def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    again = load_tokenizer(tmp_path / "t.json")
    assert again == tokenizer
    assert torch.equal(again.encode("ACGTTGACAGT"), tokenizer.encode("ACGTTGACAGT"))


@pytest.mark.parametrize("made_by", ["save", "the tokenizers library"])
def test_byte_pairs_are_named_by_their_file(tmp_path, made_by):
    path = tmp_path / "t.json"
    if made_by == "save":
        BPE.save(path)
    else:
        path.write_text(BPE.model)
    options = resolved_options({"kind": "bpe", "path": str(path)})
    assert options == BPE.to_dict()
    assert build_tokenizer({"kind": "bpe", "model": json.loads(BPE.model)}) == BPE
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"t\.json: model is no JSON of the tokenizers library"):
        resolved_options({"kind": "bpe", "path": str(path)})


def test_byte_pairs_are_learned():
    assert 16 < BPE.size <= 40
    assert len(BPE.encode("ACGTACGT")) < 8


@pytest.mark.parametrize("unknown", [None, "[UNK]"])
def test_byte_pairs_from_elsewhere_lose_no_letter_in_silence(unknown):
    """A model of four letters that adds tokens around a text, as those of language models do."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=unknown))
    specials = [token for token in ("[CLS]", unknown) if token]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=20, special_tokens=specials, show_progress=False
    )
    library.train_from_iterator(["ACGTTGACCAGT" * 9], trainer)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 0)]
    )
    model = BytePairTokenizer(model=library.to_str())
    assert model.decode(model.encode("ACGTTGACGT")) == "ACGTTGACGT"
    if unknown is None:
        with pytest.raises(ValueError, match="no token for N, R, nor an unknown one"):
            model.encode("ACNNGTRA")
        return
    assert model.decode(model.encode("ACNNGTRA")) == "ACNNGTNA"
    assert model.soft_mask("TTnN").tolist()[-2:] == [True, False]


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (lambda: BPE.complement, "bpe tokens have no reverse complement"),
        (lambda: KmerTokenizer(overlapping=False).complement, "non-overlapping k-mers"),
        (lambda: KmerTokenizer(k=9), "k is 9"),
        (lambda: KmerTokenizer(k=4).encode("ACG"), "3 bases has no word of 4"),
        (lambda: BaseTokenizer().encode("ACE"), "position 3: 'E'"),
        (lambda: BPE.encode("ACE"), "position 3: 'E'"),
        (lambda: BaseTokenizer().decode(torch.tensor([0, 15])), "id 15 stands for no bases"),
        (lambda: BytePairTokenizer.train(["ACGT"], 10), "size is 10"),
        (lambda: BytePairTokenizer(model="{}"), "no JSON of the tokenizers library"),
        (lambda: build_tokenizer({"kind": "bases"}), "kind is 'bases', expected one of base"),
        (
            lambda: build_tokenizer({"kind": "bpe", "path": "no.json"}),
            r"path is no\.json: .*such file",
        ),
        (lambda: build_tokenizer({"kind": "bpe", "path": "a", "model": "b"}), "and model is given"),
        (lambda: build_tokenizer({"kind": "base", "k": 3}), "tokenizer base: .*'k'"),
    ],
)
def test_mistakes_are_named(job, words):
    with pytest.raises(ValueError, match=words):
        job()
