"""Pair fusion: the space before a capitalised word and the word's case operator become one token, without loss.

    <U+2581> <TITLE> the   ->  <alias of TITLE> the          8 to 9 % of all CaseOps tokens go this way

The alias is an id that the tokenizer has and no text can use: a byte piece whose byte is in no valid UTF-8. So nothing
needs an escape, `unfuse(fuse(ids))` is `ids` for every text, and vocabulary and tokenizer stay as they are. An alias
stands for the bytes of both its tokens, so a byte sidecar has the same sum as before. BOS stands between two documents,
so no pair crosses them; prepare.py fuses before it cuts a split into shards, so none is missed at a shard's end.

The idea is PR 2109's, which took byte pieces of valid text as aliases, fused every shard by itself, let an alias row
begin as a mixture of its two tokens' rows, and switched the smear gate off behind an alias. Here the model knows
nothing of it: it is trained on fused shards from its first step, and learns an alias like any other id.

The manifest's "fused_pairs" says what was done. Whatever decodes ids, or counts them by their pieces, calls
`plain_stream` first.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import sentencepiece as spm
from caseops import ALLCAPS, TITLE, CaseOps
from word_bpe import MAX_VOCAB, SPACE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_gpt import UserError

# UTF-8 needs no C0 and C1 (they would begin a second form of ASCII), and F5 to FF lie beyond the last code point.
IMPOSSIBLE_BYTES = (0xC0, 0xC1, *range(0xF5, 0x100))
# Two pairs only. The third, U+2581 and CAPNEXT, cannot occur: the encoder writes CAPNEXT only after a letter, and puts
# ESC before one that the text itself holds.
MARKERS = (TITLE, ALLCAPS)
FUSED_PAIRS = "fused_pairs"  # in manifest.json
AGAIN = "prepare the data again, or copy all of it"
MAX_COUNT = 65_535  # bytes of one token in a sidecar


def byte_ids(processor: spm.SentencePieceProcessor) -> list[int]:
    """Return the ids of the byte pieces that no text can use; none if the tokenizer has no byte pieces."""
    return [i for byte in IMPOSSIBLE_BYTES if processor.is_byte(i := processor.piece_to_id(f"<0x{byte:02X}>"))]


class PairFusion:
    """Rewrites every pair of a first id and a marker as the marker's alias, and back."""

    def __init__(self, first: int, aliases: Mapping[int, int]) -> None:
        """aliases: marker -> alias. UserError unless all ids are different numbers that a shard can hold."""
        self.first, self.aliases = first, dict(aliases)
        used = [first, *self.aliases, *self.aliases.values()]
        if len(set(used)) < len(used) or not all(isinstance(i, int) and 0 <= i < MAX_VOCAB for i in used):
            raise UserError(f"fused pairs of the ids {used}: give different ids from 0 to {MAX_VOCAB - 1}")
        self.alias_of, self.marker_of = np.full((2, MAX_VOCAB), -1, np.int32)  # by id; -1: no marker, no alias
        for marker, alias in self.aliases.items():
            self.alias_of[marker], self.marker_of[alias] = alias, marker

    @classmethod
    def of(cls, processor: spm.SentencePieceProcessor) -> PairFusion:
        """Return the fusion for a CaseOps tokenizer. UserError if it lacks a piece that this needs."""
        first, *markers = (processor.piece_to_id(piece) for piece in (SPACE, *MARKERS))
        aliases = byte_ids(processor)[: len(markers)]
        if processor.unk_id() in (first, *markers) or len(aliases) < len(markers):
            lacks = "the tokenizer lacks a bare U+2581, case operators or byte pieces"
            raise UserError(f"{lacks}, which fused pairs need; train one with --caseops --vocab-size")
        return cls(first, dict(zip(markers, aliases, strict=True)))

    def rows(self, processor: spm.SentencePieceProcessor) -> list[dict]:
        """Return what the manifest says: alias and pair, as ids and as pieces."""
        piece, pairs = processor.id_to_piece, {alias: (self.first, marker) for marker, alias in self.aliases.items()}
        return [
            {"alias": alias, "alias_piece": piece(alias), "pair": list(pair), "pair_pieces": list(map(piece, pair))}
            for alias, pair in pairs.items()
        ]

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Return where in (N,) ids a pair begins: (M,). Pairs never overlap, because no marker is a first id."""
        (at,) = (ids[:-1] == self.first).nonzero()
        return at[self.alias_of[ids[at + 1]] >= 0]

    def fuse(self, ids: np.ndarray, counts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Return (N - M,) ids with M aliases, and their bytes if the (N,) bytes of the given ids are given.

        UserError if an alias is among the given ids already: then `unfuse` could not tell the two apart.
        """
        if (self.marker_of[ids] >= 0).any():
            raise UserError("the ids hold the alias of a pair, so they are fused already; give those from before that")
        at, kept = self.places(ids), np.ones(len(ids), bool)
        kept[at] = False
        ids = ids.copy()
        ids[at + 1] = self.alias_of[ids[at + 1]]
        if counts is None:
            return ids[kept], None
        sums = counts[at].astype(np.int64) + counts[at + 1]
        if len(sums) and sums.max() > MAX_COUNT:
            raise UserError(
                f"a fused pair has {sums.max()} bytes, over the {MAX_COUNT} of a sidecar; shorten its spaces"
            )
        counts = counts.copy()
        counts[at + 1] = sums
        return ids[kept], counts[kept]

    def unfuse(self, ids: np.ndarray, counts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Return (N + M,) ids without the M aliases, and their bytes if the (N,) bytes of the given ids are given.

        All bytes of a pair lie on its first id, where CaseOps has them too: an operator stands for no byte.
        """
        (at,) = (self.marker_of[ids] >= 0).nonzero()
        times = np.ones(len(ids), np.int64)
        times[at] = 2
        begins = at + np.arange(len(at))  # of each pair, in the result
        out = np.repeat(ids, times)
        out[begins], out[begins + 1] = self.first, self.marker_of[ids[at]]
        if counts is not None:
            counts = np.repeat(counts, times)
            counts[begins + 1] = 0
        return out, counts


@functools.lru_cache(maxsize=4)
def fusion_of(processor: spm.SentencePieceProcessor) -> PairFusion:
    """Return `PairFusion.of` a tokenizer, made once."""
    return PairFusion.of(processor)


class FusedCaseOps(CaseOps):
    """CaseOps with fused pairs, as data/prepare.py uses it."""

    name = f"{CaseOps.name}+{FUSED_PAIRS}"

    def fusion(self, processor: spm.SentencePieceProcessor) -> PairFusion:
        """Return what a tokenizer's ids go through before they are written."""
        return fusion_of(processor)


def plain_stream(
    manifest: Mapping, processor: spm.SentencePieceProcessor, ids: np.ndarray, counts: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return a stream of shards as the tokenizer made it: ids, and their bytes if they are given, without aliases.

    UserError for ids that no text gives although the manifest says nothing of fused pairs, for a manifest that fuses
    others than `PairFusion.of`, for a pair that is not fused, and for an alias without the byte of its space.
    """
    if FUSED_PAIRS not in manifest:
        wrong = np.isin(ids, byte_ids(processor))
        if wrong.any():
            piece = processor.id_to_piece(int(ids[wrong.argmax()]))
            problem = f"the shards hold {piece}, a byte of no text: pairs are fused, and no manifest.json says so"
            raise UserError(f"{problem}; {AGAIN}")
        return ids, counts
    fusion = PairFusion.of(processor)
    if manifest[FUSED_PAIRS] != fusion.rows(processor):
        raise UserError(f'"{FUSED_PAIRS}" in manifest.json are not the pairs of this tokenizer; {AGAIN}')
    if len(fusion.places(ids)):
        raise UserError(f"manifest.json says that pairs are fused, and the shards hold some that are not; {AGAIN}")
    if counts is not None and not counts[fusion.marker_of[ids] >= 0].all():
        raise UserError(f"the byte sidecar gives no byte to a fused pair, whose space has one; {AGAIN}")
    return fusion.unfuse(ids, counts)
