"""CaseOps: capitals become operators before lower-case letters, and every string can be restored exactly.

    encode("The NASA iPhone")  ->  "<TITLE>the <ALLCAPS>nasa i<CAPNEXT>phone"

The tokenizer then knows one form of each word instead of three. The operators are private-use characters: TITLE U+E001
(the word starts with a capital), ALLCAPS U+E002 (the word is all capitals), CAPNEXT U+E003 (the next letter is a
capital) and ESC U+E004 (the next character is literal, not an operator). A word is a longest run of ASCII letters. Only
ASCII letters are changed, and encoded text holds no ASCII capital. The transform matches the contest's CaseOps records
(lossless_caps_caseops_v1), code point for code point.

A piece of encoded text says little about the length of the original, so validation shards get a byte sidecar:
`CaseOps.piece_bytes`.
"""

from __future__ import annotations

import re

import numpy as np
import sentencepiece as spm
from word_bpe import word_bpe

TITLE, ALLCAPS, CAPNEXT, ESC = "\ue001", "\ue002", "\ue003", "\ue004"
OPERATORS = (TITLE, ALLCAPS, CAPNEXT, ESC)
FIRST_OPERATOR = ord(TITLE)
UTF8_OF = np.frombuffer("".join(OPERATORS).encode(), np.uint8).reshape(-1, 3)  # (4, 3), rows in the order of OPERATORS
IS_TITLE, IS_ALLCAPS, IS_CAPNEXT = 0, 1, 2

NO_LETTER, LOWER, CAPITAL = 0, 1, 2
KIND = np.zeros(256, np.uint8)  # by UTF-8 byte
KIND[97:123], KIND[65:91] = LOWER, CAPITAL
OPERATOR_AFTER = np.array([IS_TITLE, IS_CAPNEXT, IS_CAPNEXT])  # the operator for a capital, by the kind before it

OPERATOR = re.compile(f"([{TITLE}-{ESC}])")
ESCAPED = re.compile(f"{ESC}(.)", re.DOTALL)
LETTERS = re.compile("[A-Za-z]*")
LETTER = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")


class CaseOpsError(ValueError):
    """The string is not the encoding of any text; `position` is the index of the first character that shows it."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(f"malformed CaseOps string at character {position}: {message}")
        self.position = position


# +---------------------------------------------------------------------------+
# | ENCODER                                                                   |
# +---------------------------------------------------------------------------+


def encode(text: str) -> str:
    """Rewrite capitals as operators, in linear time. Takes any string, lone surrogates included.

    A word of two or more capitals gets ALLCAPS in front. Otherwise every capital gets its own operator: TITLE at the
    start of the word, CAPNEXT inside it. So it is enough to look at the capitals and their neighbours.
    """
    if any(operator in text for operator in OPERATORS):
        text = OPERATOR.sub(ESC + r"\1", text)
    utf8 = f" {text} ".encode("utf-8", "surrogatepass")  # with the spaces every letter has neighbours
    chars = np.frombuffer(utf8, np.uint8)
    (capitals,) = (chars - 65 < 26).nonzero()
    if not len(capitals):
        return text
    lower = np.frombuffer(utf8.lower(), np.uint8)  # bytes.lower changes ASCII letters only
    return splice(lower, *capital_operators(chars, capitals))[1:-1].decode("utf-8", "surrogatepass")


def capital_operators(chars: np.ndarray, capitals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions in `chars` before which an operator goes, (M,), and its index in OPERATORS, (M,).

    chars: (N,) uint8, UTF-8 text that neither begins nor ends with a letter. capitals: (C,) positions of its capitals.
    """
    left, right = KIND.take(chars.take(capitals - 1)), KIND.take(chars.take(capitals + 1))
    operators = OPERATOR_AFTER[left]
    (first,), (last,) = (left != CAPITAL).nonzero(), (right != CAPITAL).nonzero()  # of every run of capitals
    all_caps = (left[first] == NO_LETTER) & (right[last] == NO_LETTER) & (last > first)
    if not all_caps.any():
        return capitals, operators
    operators[first[all_caps]] = IS_ALLCAPS
    kept = ~np.repeat(all_caps, last - first + 1)
    kept[first] = True
    return capitals[kept], operators[kept]


def splice(chars: np.ndarray, positions: np.ndarray, operators: np.ndarray) -> bytes:
    """Insert a three-byte operator before each of the (M,) positions; return N + 3 M bytes."""
    inserted = (positions + np.arange(0, 3 * len(positions), 3))[:, None] + np.arange(
        3
    )  # (M, 3) positions in the result
    out = np.empty(len(chars) + inserted.size, np.uint8)
    is_text = np.ones(len(out), bool)
    out[inserted] = UTF8_OF[operators]
    is_text[inserted] = False
    out[is_text] = chars
    return out.tobytes()


# +---------------------------------------------------------------------------+
# | DECODER                                                                   |
# +---------------------------------------------------------------------------+


class Decoder:
    """State machine that reads encoded text: one operator, or one run of other characters, at a time."""

    def __init__(self) -> None:
        self.out: list[str] = []
        self.escape = False  # the next character is literal
        self.mode = ""  # TITLE or ALLCAPS, waiting for its word
        self.capital = False  # the next letter is a capital
        self.in_word = False
        self.in_caps = False  # inside a word of capitals

    def read_operator(self, char: str, position: int) -> None:
        """Read an operator that is not escaped. CaseOpsError if it is not allowed here."""
        if char == ESC and self.mode:  # an escaped character starts no word
            raise CaseOpsError("escaped character where a word must begin", position)
        if char == ESC:
            self.escape = True
        elif char == CAPNEXT:
            if self.capital:
                raise CaseOpsError("CAPNEXT twice", position)
            self.capital = True
        elif self.mode or self.capital or self.in_word:
            reason = "inside a word" if self.in_word else "after another operator"
            raise CaseOpsError(f"{'TITLE' if char == TITLE else 'ALLCAPS'} {reason}", position)
        else:
            self.mode = char

    def read_literal(self, char: str) -> None:
        """Read the character after ESC. A waiting CAPNEXT keeps waiting."""
        self.out.append(char)
        self.escape = False
        self.in_word = char in LETTER
        self.in_caps &= self.in_word

    def read_text(self, text: str, position: int) -> None:
        """Read a non-empty run without operators. CaseOpsError if an operator waits and no letter comes first."""
        letters = LETTERS.match(text).end()
        if not letters and (self.mode or self.capital):
            raise CaseOpsError("an operator is not followed by a letter", position)
        if not self.in_word:
            self.in_caps = self.mode == ALLCAPS
            self.capital |= self.mode == TITLE
        capitals = letters if self.in_caps else int(self.capital)
        self.out += (text[:capitals].upper(), text[capitals:])
        self.mode, self.capital = "", False
        self.in_word = text[-1] in LETTER
        self.in_caps &= letters == len(text)

    def finish(self, position: int) -> str:
        """Return the decoded text. CaseOpsError if an operator still waits for its letter."""
        if self.escape or self.mode or self.capital:
            raise CaseOpsError("the string ends after an operator", position)
        return "".join(self.out)


def decode(text: str) -> str:
    """Return the text that `encode` turned into this string.

    A string that `encode` never makes is decoded too if it has a meaning (CAPNEXT at the start of a word, an escaped
    letter, capitals). If it has none, CaseOpsError (a ValueError) names the position.
    """
    decoder, position = Decoder(), 0
    for index, part in enumerate(OPERATOR.split(text)):
        if decoder.escape and part:
            decoder.read_literal(part[0])
            part, position = part[1:], position + 1
        if part and index % 2:
            decoder.read_operator(part, position)
        elif part:
            decoder.read_text(part, position)
        position += len(part)
    return decoder.finish(position)


# +---------------------------------------------------------------------------+
# | BYTE SIDECAR                                                              |
# +---------------------------------------------------------------------------+


def original_bytes(encoded: str) -> np.ndarray:
    """Return the original UTF-8 bytes behind each character of encoded text: (C,) int64, 0 for operators."""
    points = np.frombuffer(encoded.encode("utf-32-le", "surrogatepass"), "<u4")
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    widths[points - FIRST_OPERATOR < len(OPERATORS)] = 0  # unsigned: smaller code points wrap around
    widths[[match.start(1) for match in ESCAPED.finditer(encoded)]] = len(ESC.encode())
    return widths


class CaseOps:
    """The transform as data/prepare.py uses it."""

    name = "lossless_caps_caseops_v1"  # recorded in the manifest
    symbols = OPERATORS  # pieces that a tokenizer trained for it has from id 4 on

    def encode(self, text: str) -> str:
        """Return the text as the tokenizer sees it."""
        return encode(text)

    def fusion(self, processor: spm.SentencePieceProcessor) -> None:
        """Return what ids go through before they are written: nothing (see pair_fusion.py)."""

    def piece_bytes(self, text: str, processor: spm.SentencePieceProcessor) -> np.ndarray:
        """Return the original UTF-8 bytes of each id of `processor.encode(encode(text))`: (N,) int64.

        A piece has the bytes of the characters that it consumed (its surface). Collapsed white space belongs to the
        piece after it; a character that became several pieces belongs to the last one. Only white space at the ends of
        the text has no piece, so only that is missing from the sum.
        """
        encoded = encode(text)
        pieces = word_bpe(processor).pieces(encoded)
        total = np.concatenate(([0], np.cumsum(original_bytes(encoded))))
        return np.diff(total[pieces.ends], prepend=total[pieces.start])
