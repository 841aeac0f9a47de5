"""How much of a validation split also stands in training shards, whatever was done to the documents.

Whole documents that are equal are easy to find. A document that was cut by a token, got an EOS, or was joined to
another one is equal to nothing. So this module compares windows of 64 tokens. Every window of the validation split
and every window of every training shard is hashed, none is left out: a run of 64 or more equal tokens is always found,
wherever it begins. Runs across the border of two shards are found too, because shards are one stream.

What is found is not always a leak. Boilerplate (licences, cookie notices, tables of contents, rows of dashes) repeats
in honest data. So callers allow a share of the tokens, MAX_SHARE. Documents under 64 tokens are too short for a window
of their own; comparing whole documents finds those.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_gpt import BOS_ID, UserError, list_shards, read_shard

WINDOW = 64  # tokens that must be equal in a row
MAX_SHARE = 0.01  # of the validation tokens may lie in such runs: room for boilerplate, not for documents
BLOCK = 1 << 16  # windows hashed at a time: the intermediate values stay in the processor's cache
BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64


class Overlap(NamedTuple):
    """What `shingle_overlap` found."""

    covered: np.ndarray  # (N,) bool: the validation token lies in a run of WINDOW tokens that training has too
    windows: list[int]  # for every training shard, how many of its windows the validation split has

    @property
    def matched(self) -> int:
        """Validation tokens in long matches."""
        return int(self.covered.sum())

    @property
    def share(self) -> float:
        """Their share of all validation tokens."""
        return self.matched / max(1, len(self.covered))


def powers(base: int, count: int) -> np.ndarray:
    """Return base**0 ... base**(count - 1) modulo 2**64: (count,) uint64."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


def token_values() -> np.ndarray:
    """Return a random-looking 64-bit value for every token id: (65536,) uint64, by splitmix64."""
    value = np.arange(1, 65537, dtype=np.uint64) * np.uint64(BASE)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class WindowHasher:
    """Hashes every window of `window` tokens: the sum of value(token j) * BASE**j, modulo 2**64."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.values = token_values()
        self.up = powers(BASE, BLOCK + window)
        self.down = powers(pow(BASE, -1, 1 << 64), BLOCK)

    def hashes(self, tokens: np.ndarray) -> np.ndarray:
        """Return the hash of every window in (n,) uint16 tokens, n < BLOCK + window: (n - window + 1,) uint64."""
        sums = np.zeros(len(tokens) + 1, np.uint64)
        np.cumsum(self.values[tokens] * self.up[: len(tokens)], out=sums[1:])
        # A difference of two sums is the window's hash times BASE**start.
        found = sums[self.window :] - sums[: -self.window]
        return found * self.down[: len(found)]

    def blocks(self, tokens: np.ndarray, tail: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the hashes of all windows of a shard, in order, and of those that begin in `tail`, the tokens before
        it: fewer than `window` of them."""
        for start in range(0, len(tokens), BLOCK):
            block = np.concatenate((tail, tokens[start : start + BLOCK]))
            yield self.hashes(block) if len(block) >= self.window else np.zeros(0, np.uint64)
            tail = self.tail(block)

    def tail(self, tokens: np.ndarray) -> np.ndarray:
        """Return the last window - 1 tokens: the windows that begin there need what follows."""
        return tokens[max(0, len(tokens) - self.window + 1) :]


class HashSet:
    """Sorted hashes behind a table of one byte per value of their top bits, which turns most others away at once."""

    def __init__(self, hashes: np.ndarray) -> None:
        ordered = np.sort(hashes)  # np.unique puts them into a hash table first, which takes five times as long
        self.sorted = ordered[np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)]]  # the last of its kind
        bits = max(8, (4 * len(self.sorted)).bit_length())
        self.shift = np.uint64(64 - bits)
        self.table = np.zeros(1 << bits, bool)
        self.table[self.slots(self.sorted)] = True

    def slots(self, hashes: np.ndarray) -> np.ndarray:
        """Return each hash's place in the table: (n,) int64."""
        return (hashes >> self.shift).view(np.int64)

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of the hashes are in the set, (m,) in no order, and where in `sorted` they are, (m,)."""
        at = np.flatnonzero(self.table.take(self.slots(hashes)))
        at = at[np.argsort(hashes[at])]  # neighbours are then looked up together, which is several times faster
        keys = hashes[at]
        index = np.searchsorted(self.sorted, keys)
        index[index == len(self.sorted)] = 0
        same = self.sorted[index] == keys if len(self.sorted) else np.zeros(0, bool)
        return at[same], index[same]


def shingle_overlap(val_tokens: np.ndarray, train_shards: Iterable[np.ndarray], window: int = WINDOW) -> Overlap:
    """Find the validation tokens that lie in runs of `window` or more tokens that training shards have too.

    val_tokens: (N,) ids below 65536. train_shards: (n,) uint16 each, in order; memory maps are read block by block.
    Memory: about 40 bytes per validation token, and a few MB for training, however long it is.
    """
    val, hasher = np.asarray(val_tokens).astype(np.uint16), WindowHasher(window)
    nothing = np.zeros(0, np.uint16)
    own = np.concatenate([np.zeros(0, np.uint64), *hasher.blocks(val, nothing)])
    known = HashSet(own)
    found, windows, tail = np.zeros(len(known.sorted), bool), [], nothing
    for shard in train_shards:
        count = 0
        for hashes in hasher.blocks(shard, tail):
            at, index = known.find(hashes)
            found[index] = True
            count += len(at)
        windows.append(count)
        tail = hasher.tail(np.concatenate((tail, shard[max(0, len(shard) - window) :])))
    starts, _ = HashSet(known.sorted[found]).find(own)
    # A window covers the tokens from its start to its end: count the windows that are open at each token.
    opened = np.zeros(len(val) + 1, np.int8)
    opened[starts] += 1
    opened[starts + window] -= 1
    return Overlap(np.cumsum(opened, dtype=np.int32)[:-1] > 0, windows)


def measure_overlap(folder: Path) -> dict:
    """Return which share of a directory's validation tokens lies in long runs that training has too.

    documents: validation documents with more than half of their tokens in such runs, numbered from 1, at most ten.
    shard: the training shard with most of the runs.
    """
    tokens = np.concatenate([read_shard(path) for path in list_shards(str(folder), "val")])
    paths = list_shards(str(folder), "train")
    found = shingle_overlap(tokens, map(read_shard, paths))
    starts = np.union1d([0], np.flatnonzero(tokens == BOS_ID))[: len(tokens)]
    covered = np.add.reduceat(found.covered.astype(np.int64), starts) if len(tokens) else np.zeros(0, np.int64)
    leaked = np.flatnonzero(2 * covered > np.diff(np.append(starts, len(tokens)))) + 1
    return {
        "window": WINDOW,
        "tokens": len(tokens),
        "matched_tokens": found.matched,
        "share": found.share,
        "documents": leaked[:10].tolist(),
        "shard": paths[int(np.argmax(found.windows))].name if found.matched else None,
    }


def refuse_overlap(found: dict, limit: float) -> None:
    """UserError if more of the validation split than `limit` lies in runs that training has too."""
    if not found["share"] <= limit:  # also where the limit is no number
        documents = ", ".join(map(str, found["documents"])) or "none by more than half"
        raise UserError(
            f"{found['share']:.2%} of the validation tokens lie in runs of {found['window']} or more that training has "
            f"too, most in {found['shard']}; at most {limit:.2%} may (validation documents: {documents}); take them "
            "out of one split, or raise --max-overlap"
        )


def allowed_overlap(manifest: dict) -> float:
    """Return the share that a preparation allowed, or MAX_SHARE if its manifest does not say."""
    overlap = manifest.get("overlap")
    limit = overlap.get("limit") if isinstance(overlap, dict) else None
    return limit if isinstance(limit, int | float) else MAX_SHARE


def overlap_line(found: dict) -> str:
    """Return the line that a report has for what `measure_overlap` found."""
    where = f", most in {found['shard']}" if found["shard"] else ""
    return (
        f"overlap {found['matched_tokens']:,} of {found['tokens']:,} validation tokens ({found['share']:.2%}) lie in "
        f"runs of {found['window']} or more that training has too{where}"
    )
