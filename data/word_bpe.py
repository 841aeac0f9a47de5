"""BPE tokenisation by remembered words: the ids of SentencePiece, several times faster.

SentencePiece finds the merges of a whole document with one priority queue, about 2 MB/s per core. But no piece of a
tokenizer trained with its defaults holds U+2581 (the space) anywhere but in front, so no merge joins two words, and the
order of merges within a word does not depend on the others: the ids of a text are those of its words, one after the
other. Words repeat. So the text is normalised by SentencePiece, cut in front of every U+2581, and only words that were
not met before are tokenised. `WordBPE` checks that the tokenizer is of this kind; for any other it calls SentencePiece.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import sentencepiece as spm

SPACE, ANCHOR = "\u2581", "a"
MAX_WORDS = 1 << 19  # at most about so many are remembered, in about 120 MB per process; then all are forgotten
MAX_VOCAB = 65536  # ids are kept as uint16
BATCH = 512  # new words that are tokenised together


class Pieces(NamedTuple):
    """A text as pieces, and where each of them ends; N pieces."""

    ids: np.ndarray  # (N,) uint16
    ends: np.ndarray  # (N,) int64: the characters of the text up to and with this piece's surface
    start: int  # where the first surface begins: what is before it, SentencePiece dropped


class WordBPE:
    """The tokenizer `processor`, with a memory for words.

    `exact` says whether words can be tokenised one by one. It needs a BPE model (its scores are minus the rank of the
    merge, whole numbers, unlike the log probabilities of a unigram model), no space inside a piece, and a normaliser
    that puts nothing in front. Where it is False, or a text has a word that the normaliser would change once more,
    SentencePiece does the work.
    """

    def __init__(self, processor: spm.SentencePieceProcessor) -> None:
        """ValueError for a vocabulary that does not fit uint16."""
        self.processor = processor
        vocab = range(processor.get_piece_size())
        if len(vocab) > MAX_VOCAB:
            raise ValueError(f"{len(vocab)} pieces do not fit uint16: at most {MAX_VOCAB}")
        pieces = [processor.id_to_piece(index) for index in vocab]
        is_byte = np.array([processor.is_byte(index) for index in vocab])
        self.exact = (
            bool(is_byte.any())
            and processor.normalize(ANCHOR) == ANCHOR
            and len(processor.encode(ANCHOR)) == 1
            and not any(SPACE in piece[1:] for piece in pieces)
            and all(processor.get_score(index).is_integer() for index in vocab)
        )
        self.opens_word = np.array([piece.startswith(SPACE) for piece in pieces])  # (V,)
        self.num_chars = np.where(is_byte, 1, [len(piece) for piece in pieces])  # (V,), of normalised text
        value = [int(piece[3:5], 16) if byte else 0 for piece, byte in zip(pieces, is_byte, strict=True)]
        self.continues = (np.array(value) & 0xC0) == 0x80  # (V,) second and later bytes of a UTF-8 character
        self.known: dict[str, bytes] = {}  # word without its leading space -> its ids as raw uint16

    def ids(self, text: str) -> np.ndarray:
        """The ids of `processor.encode(text)`: (N,) uint16."""
        ids = self.ids_by_word(self.processor.normalize(text)) if self.exact else None
        return np.array(self.processor.encode(text), np.uint16) if ids is None else ids

    def pieces(self, text: str) -> Pieces:
        """The ids, and the extent of each piece's surface (the characters of `text` that the piece consumed).

        Surfaces follow one another without gaps. All but the last of a character's byte pieces have an empty one.
        """
        normal, origin = self.processor.normalize(text, with_offsets=True)
        ids = self.ids_by_word(normal) if self.exact else None
        if ids is not None:
            ends = np.cumsum(self.lengths(ids))
            if ends.size == 0 or ends[-1] == len(normal):
                # origin: where in the text each normalised character came from, and where the last one ended
                return Pieces(ids, np.array(origin, np.int64)[ends], origin[0] if normal else len(text))
        found = self.processor.encode(text, out_type="offset_mapping")
        spans = np.array(found["offsets"], np.int64).reshape(-1, 2)
        return Pieces(np.array(found["ids"], np.uint16), spans[:, 1], int(spans[0, 0]) if len(spans) else len(text))

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """Characters of normalised text in each piece (N,); the last byte of a character stands for it."""
        unfinished = np.zeros(len(ids), bool)
        unfinished[:-1] = self.continues[ids[1:]]
        return np.where(unfinished, 0, self.num_chars[ids])

    def ids_by_word(self, normal: str) -> np.ndarray | None:
        """The ids of normalised text (N,) uint16; None if a word of it is not stable."""
        first, *words = normal.split(SPACE)
        if len(self.known) > MAX_WORDS:
            self.known.clear()
        new = sorted(set(words).difference(self.known))
        head = self.stable_ids(first)
        if head is None or not all(self.learn(new[i : i + BATCH]) for i in range(0, len(new), BATCH)):
            return None
        return np.frombuffer(b"".join([head.tobytes(), *map(self.known.__getitem__, words)]), np.uint16)

    def learn(self, words: list[str]) -> bool:
        """Tokenise words together and remember what each of them gave. False if one of them is not stable.

        A letter stands in front and behind because there the normaliser would strip spaces.
        """
        ids = self.stable_ids(SPACE.join([ANCHOR, *words, ANCHOR]))
        if ids is None:
            return False
        cuts = np.flatnonzero(self.opens_word[ids]).tolist()
        assert len(cuts) == len(words) + 1, "a word has one piece that begins with a space, its first"
        for word, start, stop in zip(words, cuts, cuts[1:], strict=False):
            self.known[word] = ids[start:stop].tobytes()
        return True

    def stable_ids(self, normal: str) -> np.ndarray | None:
        """The ids of normalised text, (N,) uint16; None if it would be normalised further."""
        if self.processor.normalize(normal) != normal:
            return None
        return self.processor.encode(normal, out_type="numpy").astype(np.uint16)


@functools.lru_cache(maxsize=4)
def word_bpe(processor: spm.SentencePieceProcessor) -> WordBPE:
    """The WordBPE of a processor, made once."""
    return WordBPE(processor)
