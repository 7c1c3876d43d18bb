"""DNA as text: the IUPAC alphabet, its complement, and a check that says where a letter is wrong.

Case carries soft-masking (repeats in lower case) and is kept by everything here.
"""

from mamba2_apps.data import UnreadableInput

BASES = "ACGT"
AMBIGUOUS = "NRYSWKMBDHV"
IUPAC = BASES + AMBIGUOUS
"""The four bases, N, and the ten codes that stand for two or three of them."""

FIRST_BASE = str.maketrans("MRWSYKVHDB", "AAACCGAAAC")
"""The alphabetically first base that each code of several stands for; N stays."""
_COMPLEMENT = str.maketrans("ACGTNRYSWKMBDHVacgtnryswkmbdhv", "TGCANYRSWMKVHDBtgcanyrswmkvhdb")
_VALID = (IUPAC + IUPAC.lower()).encode()


def reverse_complement(sequence: str) -> str:
    """The other strand, read in its own direction; case moves with its base."""
    return sequence.translate(_COMPLEMENT)[::-1]


def first_invalid(letters: bytes) -> int | None:
    """Position of the first byte that is no IUPAC code in either case; None: all are."""
    wrong = letters.translate(None, _VALID)
    return letters.index(wrong[:1]) if wrong else None


def invalid_letter(letter: str) -> str:
    """The part of a sentence that names a letter which is no base, and what it may come from."""
    hint = "RNA? replace U by T" if letter in "Uu" else "a protein, or an alignment with gaps?"
    return f"{letter!r} is no IUPAC code of DNA ({IUPAC}; {hint})"


def check_sequence(sequence: str, where: str) -> str:
    """The sequence itself. Raises UnreadableInput for a letter that is no IUPAC code.

    The message starts with `where` and names the position, counted from 1.
    """
    encoded = sequence.encode("utf-8", "replace")
    position = first_invalid(encoded)
    if position is not None:
        letter = encoded[position : position + 1].decode("utf-8", "replace")
        raise UnreadableInput(f"{where}: position {position + 1}: {invalid_letter(letter)}")
    return sequence
