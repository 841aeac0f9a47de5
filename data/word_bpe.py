"""BPE tokenisation word by word with a memory: SentencePiece's ids, several times faster.

SentencePiece finds a document's merges with one priority queue, at about 2 MB/s per core. But a tokenizer trained with
its defaults has U+2581 (the space) only at the start of a piece. So no merge joins two words, the merges inside a word
do not depend on other words, and a text's ids are its words' ids in a row. Words repeat. `WordBPE` therefore normalises
a text with SentencePiece, cuts it before every U+2581, and tokenises only words that it has not seen before. It checks
that the tokenizer is of this kind; for any other it calls SentencePiece.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import sentencepiece as spm

SPACE, ANCHOR = "\u2581", "a"
MAX_WORDS = 1 << 19  # about 120 MB per process; when the memory is full, all words are forgotten
MAX_VOCAB = 65536  # ids are kept as uint16
BATCH = 512  # new words tokenised in one call


class Pieces(NamedTuple):
    """A text as N pieces."""

    ids: np.ndarray  # (N,) uint16
    ends: np.ndarray  # (N,) int64: where this piece's surface ends in the text
    start: int  # where the first surface begins; SentencePiece dropped what comes before


class WordBPE:
    """A SentencePiece tokenizer with a memory for words.

    `exact` says whether words can be tokenised one by one. If not, or if the normaliser would change a normalised word
    again, SentencePiece tokenises the whole text.
    """

    def __init__(self, processor: spm.SentencePieceProcessor) -> None:
        """ValueError for a vocabulary that does not fit uint16."""
        self.processor = processor
        vocab = range(processor.get_piece_size())
        if len(vocab) > MAX_VOCAB:
            raise ValueError(f"{len(vocab)} pieces do not fit uint16: at most {MAX_VOCAB}")
        pieces = [processor.id_to_piece(index) for index in vocab]
        is_byte = np.array([processor.is_byte(index) for index in vocab])
        # Word by word needs byte pieces, a normaliser that adds nothing in front, no space inside a piece, and BPE: its
        # scores are minus the rank of the merge, whole numbers, unlike a unigram model's log probabilities.
        self.exact = (
            bool(is_byte.any())
            and processor.normalize(ANCHOR) == ANCHOR
            and len(processor.encode(ANCHOR)) == 1
            and not any(SPACE in piece[1:] for piece in pieces)
            and all(processor.get_score(index).is_integer() for index in vocab)
        )
        self.opens_word = np.array([piece.startswith(SPACE) for piece in pieces])  # (V,)
        self.num_chars = np.where(is_byte, 1, [len(piece) for piece in pieces])  # (V,) in normalised text
        value = [int(piece[3:5], 16) if byte else 0 for piece, byte in zip(pieces, is_byte, strict=True)]
        self.continues = (np.array(value) & 0xC0) == 0x80  # (V,) second and later bytes of a UTF-8 character
        self.known: dict[str, bytes] = {}  # word without its leading space -> its ids as raw uint16

    def ids(self, text: str) -> np.ndarray:
        """Return the ids of `processor.encode(text)`: (N,) uint16."""
        ids = self.ids_by_word(self.processor.normalize(text)) if self.exact else None
        if ids is not None:
            return ids
        return np.array(self.processor.encode(text), np.uint16)

    def pieces(self, text: str) -> Pieces:
        """Return the ids and where each piece's surface (the characters of `text` that it consumed) ends.

        Surfaces follow one another without gaps. If a character became several byte pieces, the last one has it all.
        """
        normal, origin = self.processor.normalize(text, with_offsets=True)
        ids = self.ids_by_word(normal) if self.exact else None
        if ids is not None:
            ends = np.cumsum(self.lengths(ids))
            if ends.size == 0 or ends[-1] == len(normal):
                # origin: the text position of each normalised character, and where the last one ends
                start = origin[0] if normal else len(text)
                return Pieces(ids, np.array(origin, np.int64)[ends], start)
        found = self.processor.encode(text, out_type="offset_mapping")
        spans = np.array(found["offsets"], np.int64).reshape(-1, 2)
        start = int(spans[0, 0]) if len(spans) else len(text)
        return Pieces(np.array(found["ids"], np.uint16), spans[:, 1], start)

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """Return the normalised characters in each piece (N,); a character's last byte piece counts for it."""
        unfinished = np.zeros(len(ids), bool)
        unfinished[:-1] = self.continues[ids[1:]]
        return np.where(unfinished, 0, self.num_chars[ids])

    def ids_by_word(self, normal: str) -> np.ndarray | None:
        """Return the ids of normalised text, (N,) uint16, or None if one of its words is not stable."""
        first, *words = normal.split(SPACE)
        if len(self.known) > MAX_WORDS:
            self.known.clear()
        new = sorted(set(words).difference(self.known))
        head = self.stable_ids(first)
        if head is None or not all(self.learn(new[i : i + BATCH]) for i in range(0, len(new), BATCH)):
            return None
        return np.frombuffer(b"".join([head.tobytes(), *map(self.known.__getitem__, words)]), np.uint16)

    def learn(self, words: list[str]) -> bool:
        """Tokenise words together and remember the ids of each. Return False if one of them is not stable."""
        # An anchor letter at both ends, because the normaliser would strip spaces there.
        ids = self.stable_ids(SPACE.join([ANCHOR, *words, ANCHOR]))
        if ids is None:
            return False
        cuts = np.flatnonzero(self.opens_word[ids]).tolist()
        assert len(cuts) == len(words) + 1, "a word has one piece that begins with a space, its first"
        for word, start, stop in zip(words, cuts, cuts[1:], strict=False):
            self.known[word] = ids[start:stop].tobytes()
        return True

    def stable_ids(self, normal: str) -> np.ndarray | None:
        """Return the ids of normalised text, (N,) uint16, or None if normalising again would change it."""
        if self.processor.normalize(normal) != normal:
            return None
        return self.processor.encode(normal, out_type="numpy").astype(np.uint16)


@functools.lru_cache(maxsize=4)
def word_bpe(processor: spm.SentencePieceProcessor) -> WordBPE:
    """Return the processor's WordBPE, made once."""
    return WordBPE(processor)
