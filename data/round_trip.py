"""What a document loses on its way through a tokenizer: encoded, then decoded.

A score per byte says something only if the tokens still hold the text. Two changes are known and allowed, because the
published tokenizers make them. White space may be folded: runs, line ends, the ends of a text, and U+2581, which is how
a tokenizer writes a space. And compatibility characters may be folded (NFKC): wide letters, ligatures, fractions.
Everything else is a loss, for example capitals (case folding), accents, or letters that were replaced by others.
"""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from typing import NamedTuple

import sentencepiece as spm

MAX_FOLDS = 4  # folding a folded text rarely changes it again


class RoundTrip(NamedTuple):
    """One document after encoding and decoding."""

    counted: int  # bytes that the score will divide by
    excess: int  # how many of them the text cannot have
    lost: int  # characters that do not come back, 0 if nothing but known folding happened
    example: str  # "'What' comes back as 'what'"


@functools.cache
def normalizer() -> spm.SentencePieceNormalizer:
    """Return the published tokenizers' normaliser: NFKC, control characters, white space."""
    return spm.SentencePieceNormalizer(
        rule_name="nmt_nfkc", add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=True
    )


def fold(text: str) -> str:
    """Return a text after all known folding, white space and NFKC."""
    for _ in range(MAX_FOLDS):
        # Both: SentencePiece's tables and Python's are of different editions of Unicode.
        folded = normalizer().normalize(unicodedata.normalize("NFKC", text))
        if folded == text:
            break
        text = folded
    return text


def lost_characters(text: str, decoded: str) -> tuple[int, str]:
    """Return how many characters of `text` are not in `decoded`, up to known folding, and where it begins."""
    if text == decoded or text.split() == decoded.split():
        return 0, ""
    before, after = fold(text), fold(decoded)
    if before == after:
        return 0, ""
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    start = max(0, at - 8)
    example = f"{before[start : at + 12]!r} comes back as {after[start : at + 12]!r}"
    # Characters that only change places are a loss too.
    return max(1, (Counter(before) - Counter(after)).total()), example


def most_bytes(text: str) -> int:
    """Return the most UTF-8 bytes that a text may count as: NFKC lengthens some characters, nothing else may."""
    if text.isascii():
        return len(text)
    forms = ((char, unicodedata.normalize("NFKC", char), count) for char, count in Counter(text).items())
    return sum(count * max(len(char.encode()), len(form.encode())) for char, form, count in forms)


def round_trip(text: str, seen: str, decoded: str, counted: int) -> RoundTrip:
    """Compare a document with what comes back.

    text: the original. seen: the text that was encoded (the transform's output, or the original). decoded: what its ids
    decode to. counted: the bytes credited to its ids.
    """
    lost, example = lost_characters(seen, decoded)
    return RoundTrip(counted, max(0, counted - most_bytes(text)), lost, example)
