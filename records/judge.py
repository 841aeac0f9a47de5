"""The judge's questions: asked of a program by running it, and of its papers by reading them.

What they are, and what a black box cannot see, is in records/verify.py, the command.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics as TOPICS
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import numpy as np  # noqa: E402
import overlap  # noqa: E402  (data/ is not a package)
import prepare  # noqa: E402
import sentencepiece as spm  # noqa: E402
import torch  # noqa: E402
from caseops import ESC, OPERATORS  # noqa: E402
from pair_fusion import plain_stream  # noqa: E402

import pack_artifact  # noqa: E402
from records import papers  # noqa: E402
from records.black_box import PROCESSORS, BlackBox, Outcome, Server  # noqa: E402
from records.claims import (  # noqa: E402
    CANONICAL,
    FAIL,
    INVALID_TOTAL,
    NEAR,
    NOT_ASKED,
    PASS,
    TARGETS,
    UNKNOWN,
    Candidate,
    Check,
    budget_checks,
    claim_checks,
    decide,
    disk_checks,
    number,
    preset_sha256,
)
from records.foreign import is_foreign, open_foreign  # noqa: E402
from train_gpt import (  # noqa: E402
    CODECS,
    LOADERS,
    UserError,
    load_config,
    mixer_letters,
    model_identity,
    pack_stored,
    read_artifact,
    read_preset,
    record_env,
)

BOS_ID = 1
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
SUM_TOLERANCE = 5e-5  # of float32 losses over a whole vocabulary
ADAPTED_TOLERANCE = 1e-3  # the same over documents whose adapters began from random numbers of their own
EXACT = 1e-12  # relative: float64 sums of the same terms in another order
ROUNDING = 1e-4  # nats between scores whose sums run in another order
OVERLAP_ALLOWED = 0.01  # of validation documents: web text repeats some by itself, a leak repeats most
FEW_TOKENS, SHARE_OF_FEW = 100_000, 0.5  # in so short a validation stream one repeated paragraph is a large share
FOLDED_ALLOWED = 0.01  # of words whose text the tokenizer's normalisation may have shortened
SIDECAR_SLACK = 0.08  # what a sidecar knows about folded white space; case operators would add 9 %, double spaces 17 %
SINGLE_SPACES = 0.25  # of spaces before capitals, where texts that double them between sentences have 0.6
RESCORED = 50_000  # targets of a run that the judge scores again itself
FASTER = {"rans": "brotli", "pergroup": "brotli"}  # coders that read the same weights faster


class RunFailed(Exception):
    """A run of the judged program that ended badly; the message is its last line."""


# +---------------------------------------------------------------------------+
# | STREAMS AND SCORES                                                        |
# +---------------------------------------------------------------------------+


class Stream(NamedTuple):
    """A validation stream: tokens (N,), and the bytes of each (N,), None if the tokenizer has to say them."""

    tokens: np.ndarray
    sizes: np.ndarray | None


def made_up(tokens: np.ndarray) -> Stream:
    """Return the stream of tokens with byte counts that only tell tokens apart."""
    return Stream(tokens, np.where(tokens == BOS_ID, 0, 1 + tokens % 7))


def read_shard(path: Path) -> np.ndarray:
    """Return the numbers in a shard, (N,) int64. UserError if it is damaged."""
    data = path.read_bytes()
    header = np.frombuffer(data[:12], "<i4") if len(data) >= SHARD_HEADER_BYTES else np.zeros(3)
    if (*header[:2],) != (SHARD_MAGIC, SHARD_VERSION) or len(data) != SHARD_HEADER_BYTES + 2 * header[2]:
        raise UserError(f"{path} is not a shard, or not whole; prepare the data again")
    return np.frombuffer(data, "<u2", offset=SHARD_HEADER_BYTES).astype(np.int64)


def read_shards(folder: Path, kind: str) -> np.ndarray | None:
    """Return the numbers in all shards of a kind, in order; None if there are none. UserError if one is damaged."""
    prefix = f"fineweb_{kind}_"
    paths = [path for path in sorted(folder.glob(f"{prefix}*.bin")) if path.stem.removeprefix(prefix).isdigit()]
    return np.concatenate([read_shard(path) for path in paths]) if paths else None


def read_stream(folder: Path) -> Stream:
    """Read the validation stream of a data folder."""
    tokens, sizes = read_shards(folder, "val"), read_shards(folder, "val_bytes")
    if tokens is None or not len(tokens):
        raise UserError(f"{folder} has no fineweb_val_*.bin; give the folder with the shards as --data")
    if sizes is not None and len(sizes) != len(tokens):
        raise UserError(f"{folder}: the byte sidecars do not match the validation shards")
    return Stream(tokens, sizes)


def write_data(folder: Path, stream: Stream, tokenizer: Path | None, train: np.ndarray | None, shards: int) -> Path:
    """Write into a data folder: a validation stream in some shards, the tokenizer, and training tokens if there are."""
    for kind, values in (("val", stream.tokens), ("val_bytes", stream.sizes), ("train", train)):
        parts = [] if values is None else np.array_split(values, 1 if kind == "train" else shards)
        for count, part in enumerate(parts):
            prepare.write_shard(folder / f"fineweb_{kind}_{count:06}.bin", part)
    if tokenizer:
        shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder


class Scored(NamedTuple):
    """One run's scores by position of the target, (N,): nats (NaN without a score), step, how often it was scored."""

    outcome: Outcome
    nats: np.ndarray
    step: np.ndarray
    count: np.ndarray
    stray: int  # rows about positions that the stream does not have, or without a finite score

    @property
    def scored(self) -> np.ndarray:
        """Mask of the positions with a score."""
        return self.count > 0


def scored(outcome: Outcome, length: int, prefix: str = "") -> Scored:
    """Sort a run's rows by position. RunFailed if the run failed or left none. prefix: as in Outcome.rows."""
    rows = outcome.rows(prefix)
    if outcome.code != 0:
        raise RunFailed(f"exit status {outcome.code}: {outcome.last_line()}")
    if not len(rows):
        raise RunFailed("the run ends well and leaves no scores (SCORES)")
    found = Scored(outcome, np.full(length, math.nan), np.full(length, -1), np.zeros(length, np.int64), 0)
    good = (rows[:, 0] >= 0) & (rows[:, 0] < length) & (rows[:, 0] % 1 == 0) & np.isfinite(rows[:, 1])
    positions = rows[good, 0].astype(np.int64)
    np.add.at(found.count, positions, 1)
    found.nats[positions] = rows[good, 1]
    found.step[positions] = rows[good, 2]
    return found._replace(stray=int((~good).sum()))


def joined(parts: list[Scored]) -> Scored:
    """The scores of streams that follow one another: what ends each begins the next."""
    whole = parts[0]
    for part in parts[1:]:
        values = {name: np.append(getattr(whole, name), getattr(part, name)[1:]) for name in ("nats", "step", "count")}
        whole = whole._replace(stray=whole.stray + part.stray, **values)
    return whole


class Bench:
    """A candidate that can score any stream: its black box, and the folders of data that the judge writes for it."""

    def __init__(self, candidate: Candidate, server: Server, room: Path) -> None:
        self.candidate, self.cfg, self.server, self.room = candidate, candidate.cfg, server, room
        seed = hashlib.sha256(candidate.source + record_env(self.cfg).encode()).digest()
        # the program cannot know which places are tried, and a second verdict tries the same
        self.rng = np.random.Generator(np.random.PCG64(int.from_bytes(seed[:8], "little")))
        files = {"train_gpt.py": candidate.source, "record.env": record_env(self.cfg).encode()}
        # streams of the judge's own hold pairs of tokens that no tokenizer writes; here no clock runs
        own = {"DEVICE": "cpu", "CANONICAL_CHECK": "0", "EVAL_BUDGET_SECONDS": "0"}
        self.trains = BlackBox(server, room / "trains", "train_gpt.py", files, own)
        files |= {"model.bin": candidate.weights} if candidate.weights is not None else {}
        own |= {"STAGES": "eval", "MODEL_PATH": "model.bin"}
        self.box = BlackBox(server, room / "scores", "train_gpt.py", files, own)

    def data(self, stream: Stream, train: np.ndarray | None = None) -> Path:
        """Write a data folder whose name says nothing, and whose shards end anywhere."""
        folder = Path(tempfile.mkdtemp(prefix="data_", dir=self.room))
        return write_data(folder, stream, self.candidate.tokenizer, train, int(self.rng.integers(2, 4)))

    def score(self, stream: Stream, ranks: int = 1, train: np.ndarray | None = None, **knobs: str) -> Scored:
        """Score a stream. RunFailed if the program does not."""
        folder = self.data(stream, train)
        return scored(self.box.fork(ranks, DATA_PATH=str(folder), **knobs), len(stream.tokens))

    def score_each(self, streams: list[Stream], **knobs: str) -> Iterator[Scored]:
        """Score streams side by side; yield the results in their order."""
        folders = [self.data(stream) for stream in streams]
        with hurried(ThreadPoolExecutor(PROCESSORS)) as pool:
            runs = [pool.submit(self.box.fork, DATA_PATH=str(folder), **knobs) for folder in folders]
            for run, stream, folder in zip(runs, streams, folders, strict=True):
                outcome = run.result()
                yield scored(outcome, len(stream.tokens))
                # hundreds of them would fill a small /tmp
                for place in (folder, outcome.room):
                    shutil.rmtree(place, ignore_errors=True)

    def part(self) -> Bench:
        """The same bench with random numbers of its own, for checks that run beside others."""
        own = copy.copy(self)
        (own.rng,) = self.rng.spawn(1)
        return own


@contextlib.contextmanager
def hurried(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """A pool that drops what has not begun, and waits for nothing, when it is left by an error or early."""
    done = False
    try:
        yield pool
        done = True
    finally:
        pool.shutdown(wait=done, cancel_futures=True)


# Numbers of an evaluation on the judge's own streams: many steps, short rows, updates that are large enough to be seen.
STREAMS = {
    "EVAL_SEQ_LEN": "64",
    "EVAL_STRIDE": "32",
    "TTT_EVAL_SEQ_LEN": "96",
    "TTT_BATCH_SIZE": "8",
    "TTT_CHUNK_SIZE": "48",
    "TTT_LORA_LR": "0.003",
    "TTT_CHUNK_TOKENS": "192",
    "PHASED_TTT_PREFIX_DOCS": "8",
    "PHASED_TTT_NUM_PHASES": "2",
    "GLOBAL_TTT_CHUNK_TOKENS": "192",
}
# The same for a stream so short that a run for each of its places is cheap.
EVERY_PLACE = {
    "EVAL_SEQ_LEN": "16",
    "EVAL_STRIDE": "8",
    "TTT_EVAL_SEQ_LEN": "16",
    "TTT_BATCH_SIZE": "2",
    "TTT_CHUNK_SIZE": "8",
    "TTT_CHUNK_TOKENS": "16",
    "PHASED_TTT_PREFIX_DOCS": "4",
    "PHASED_TTT_NUM_PHASES": "1",
    "GLOBAL_TTT_CHUNK_TOKENS": "12",
}
# Its documents with their starts. Five have one or three chunks, in few steps; eight are one for each of eight ranks.
LENGTHS = (17, 4, 4, 4, 3, 16, 9, 7, 2, 18, 22, 23, 14, 25)
FIVE, EIGHT = sum(LENGTHS[:5]), sum(LENGTHS[:8])
SHORT = 64  # targets of it where documents follow each other in one row
LONG = 3  # places tried in long streams
BEGINNING = 128  # tokens of a document at full size
LARGE, PARTS = 2048, 4  # ids above which C2 is asked at two places at most, in so many runs
# The same, with nothing carried from document to document, or from row to row.
ALONE = {
    "TTT_WARM_START_A": "0",
    "PHASED_TTT_PREFIX_DOCS": "0",
    "GLOBAL_TTT_LR": "0",
    "TTT_EPOCHS": "0",
    "SLOT_LR": "0",
}


def knobs_for(cfg: Any, numbers: dict[str, str], tokens_per_step: int, rank: int = 4) -> dict[str, str]:
    """Return numbers for an evaluation, with about so many tokens in a step of packed text, and adapters of a rank."""
    most = int(numbers.get("TTT_CHUNK_SIZE", 48))
    chunks = ",".join(str(part._replace(value=min(part.value, most))) for part in cfg.ttt_chunk_size)
    epochs = str(min(cfg.ttt_epochs, 1))  # passes over the same tokens take the same path
    # adapters of full rank, one set a row, cost more than the model; the scale stays
    rank = min(cfg.ttt_lora_rank, rank)
    own = {"TTT_LORA_RANK": str(rank), "TTT_LORA_ALPHA": str(cfg.ttt_lora_alpha * rank / cfg.ttt_lora_rank)}
    # a gradient of one part: each part is a pass through the model
    size = {"BATCH_SLICES": "1", "VAL_BATCH_TOKENS": str(tokens_per_step), "TTT_CHUNK_SIZE": chunks}
    return {"TTT_EPOCHS": epochs} | own | numbers | size


def documents_apart(cfg: Any) -> str:
    """Return why documents depend on one another in the final evaluation, "" if they may not."""
    across = "" if LOADERS[cfg.loader].documents else f"LOADER={cfg.loader} reads across documents"
    why = {
        "chunk_sgd": "weights adapt over the stream",
        "slot": "weights adapt over the stream",
        "phased_lora": "weights adapt on documents already scored",
        "doc_lora": "adapters continue from the document before" if cfg.ttt_warm_start_a else "",
    }
    return why.get(cfg.eval, across)


def rows_apart(cfg: Any) -> bool:
    """Return whether tokens of one document may not reach another within a step."""
    return LOADERS[cfg.loader].documents or {"doc_lora": True, "phased_lora": True}.get(cfg.eval, False)


# +---------------------------------------------------------------------------+
# | SUMS                                                                      |
# +---------------------------------------------------------------------------+


def own_sizes(stream: Stream, tokenizer: Path | None) -> np.ndarray:
    """Return the bytes of each token of a stream: the sidecar's, else the judge's own count from the tokenizer."""
    if stream.sizes is not None:
        return stream.sizes
    if tokenizer is None:
        raise UserError("the data has neither a sidecar nor a tokenizer; bytes cannot be counted")
    return piece_sizes(read_pieces(prepare.load_tokenizer(str(tokenizer))), stream.tokens)


def coverage_check(found: Scored, cfg: Any, label: str) -> Check:
    """C4: every target of the stream once, up to a last part that is shorter than EVAL_SEQ_LEN."""
    targets = len(found.count) - 1
    wanted = targets if cfg.eval_include_tail else targets - targets % cfg.eval_seq_len
    inside, outside = found.count[1 : wanted + 1], int(found.count[wanted + 1 :].sum() + found.count[0])
    never, twice = int((inside == 0).sum()), int((inside > 1).sum())
    detail = f"{wanted:,} targets: {never:,} never scored, {twice:,} more than once"
    if outside or found.stray:
        detail += f"; {outside + found.stray:,} scores of what is no target, or not finite"
    return decide(f"C4 each target once ({label})", not (never or twice or outside or found.stray), detail)


def sum_checks(found: Scored, sizes: np.ndarray, label: str) -> Iterator[Check]:
    """The claimed score, tokens and bytes against the judge's sums over SCORES and shards."""
    result, wrong = papers.read_object(found.outcome.folder / "result.json")
    log = papers.read_log(found.outcome.folder / "log.txt")
    own = own_sums(found.nats, found.count, sizes)
    yield compare_sums(f"sums ({label})", own, result, wrong)
    told = [f"{key}: {log.final.get(key)}" for key in own if abs(log.final.get(key, math.inf) - own[key]) > 6e-9]
    agree = log.result == result and not told
    detail = ", ".join(told) or ("the log says the same" if agree else "the log's RESULT is not result.json")
    yield decide(f"sums in the log ({label})", agree, detail)
    legal = result.get("legal") is True
    yield decide(f"C3 the program's word ({label})", legal, f"legal: {json.dumps(result.get('legal'))}")


def own_sums(nats: np.ndarray, count: np.ndarray, sizes: np.ndarray) -> dict[str, float]:
    """Return val_loss, val_bpb, tokens and bytes of the scored targets, as result.json calls them."""
    where = count > 0
    total, size = math.fsum(nats[where]), int(sizes[where].sum())
    bpb = total / (math.log(2) * size) if size else math.inf
    tokens = int(where.sum())
    return {
        "val_loss": total / tokens if tokens else math.inf,
        "val_bpb": bpb,
        "tokens_scored": tokens,
        "bytes_scored": size,
    }


def compare_sums(name: str, own: dict[str, float], claimed: dict[str, Any], wrong: list[str]) -> Check:
    """The judge's sums against a result's."""
    bad = []
    for key, value in own.items():
        said = claimed.get(key)
        if not papers.is_number(said) or not math.isclose(said, value, rel_tol=EXACT):
            bad.append(f"{key} {said}, added again {value}")
    fine = f"val_loss {own['val_loss']:.8f}, {own['bytes_scored']:,.0f} bytes: as added again"
    return decide(name, not bad and not wrong, "; ".join([*wrong, *bad]) or fine)


# +---------------------------------------------------------------------------+
# | C1 TO C4                                                                  |
# +---------------------------------------------------------------------------+


def differing(a: Scored, b: Scored, where: np.ndarray) -> np.ndarray:
    """Return the positions in the mask `where` whose scores are not the same bits."""
    return np.flatnonzero(where & (a.nats.view(np.int64) != b.nats.view(np.int64)))


def compare(name: str, base: Scored, other: Scored, stream: Stream, fixed: np.ndarray) -> Check:
    """Pass if the scores in the mask `fixed` are the same bits; unknown if the change had no effect anywhere."""
    change, fixed = f"{int((~fixed).sum()):,} tokens changed", fixed & base.scored
    if not np.array_equal(base.step, other.step):
        return Check(name, FAIL, f"{change}: the order of scoring depends on the tokens themselves")
    wrong = differing(base, other, fixed)
    if len(wrong):
        gap = float(np.nanmax(np.abs(base.nats[wrong] - other.nats[wrong])))
        first = wrong[np.argmin(base.step[wrong])]
        place = f"first at position {first}, document {documents_of(stream)[first]}, step {base.step[first]}"
        detail = f"{len(wrong):,} of {int(fixed.sum()):,} scores before it changed, {place}, by up to {gap:.2e} nats"
        return Check(name, FAIL, f"{change}: {detail}")
    if not (reacts := len(differing(base, other, ~fixed & base.scored))):
        return Check(name, UNKNOWN, f"{change}: no score reacts to the change, so nothing was tested")
    detail = f"{change}: {int(fixed.sum()):,} scores before it are bit-equal, {reacts:,} after it react"
    return Check(name, PASS, detail)


def replaced(stream: Stream, where: np.ndarray, rng: np.random.Generator) -> Stream:
    """Return the stream with another token at every position in the mask, document starts apart."""
    tokens = stream.tokens.copy()
    known = np.unique(tokens[tokens != BOS_ID])
    changed = np.flatnonzero(where & (tokens != BOS_ID))
    # a shift by 1 .. len - 1 in the list of known ids: never the same id
    shift = rng.integers(1, len(known), size=len(changed))
    tokens[changed] = known[(np.searchsorted(known, tokens[changed]) + shift) % len(known)]
    return stream._replace(tokens=tokens)


def rows_of(base: Scored, stream: Stream, apart: bool) -> list[np.ndarray]:
    """Return the positions scored side by side in one row of a step, row by row. apart: a row has one document."""
    positions = np.flatnonzero(base.scored)
    new = (np.diff(positions, prepend=-2) > 1) | (np.diff(base.step[positions], prepend=-2) != 0)
    if apart:  # a document's first target follows its start
        new |= stream.tokens[positions - 1] == BOS_ID
    return np.split(positions, np.flatnonzero(new)[1:])


def documents_of(stream: Stream) -> np.ndarray:
    """Return the number of the document of every target; a document's last target is the start of the next."""
    return np.concatenate([[0], np.cumsum(stream.tokens == BOS_ID)[:-1]])


def cuts(cfg: Any, base: Scored, stream: Stream, rng: np.random.Generator | None) -> Iterator[np.ndarray]:
    """Yield masks of what may change, in the order of scoring: everything after a place.

    A place is one in each row of a step, and all later steps change; where documents stand alone it is one in the n-th
    row of each document, whose end changes. Without rng all places of a row are tried, one after the other.
    """
    document, alone, groups, seen = documents_of(stream), not documents_apart(cfg), {}, Counter()
    for row in sorted(rows_of(base, stream, rows_apart(cfg)), key=lambda row: base.step[row[0]]):
        own = document[row[0]]
        groups.setdefault(seen[own] if alone else int(base.step[row[0]]), []).append(row)
        seen[own] += 1
    for rows in groups.values():
        for place in range(1 if rng else max(map(len, rows))):
            later = np.zeros(len(base.nats), bool) if alone else base.step > base.step[rows[0][0]]
            for row in rows:
                last = row[rng.integers(len(row)) if rng else min(place, len(row) - 1)]
                end = np.flatnonzero(document == document[last]) if alone else row
                later[end[end > last]] = True
            # a document's start stays one: documents keep their lengths
            if (stream.tokens[later] != BOS_ID).any():
                yield later


def order_check(cfg: Any, base: Scored, stream: Stream, label: str) -> Check:
    """C1: nothing is scored before what is left of it in its document, or in the stream if that is read as one."""
    positions = np.flatnonzero(base.scored)
    whole = {"doc_lora": False, "phased_lora": False}.get(cfg.eval, bool(documents_apart(cfg)))
    beside = whole | (np.diff(documents_of(stream)[positions]) == 0)
    wrong = positions[1:][(np.diff(base.step[positions]) < 0) & beside]
    detail = f"{len(wrong):,} of {len(positions):,} targets are scored before the one left of them {wrong[:1]}"
    return decide(f"C1 order ({label})", not len(wrong), detail)


Asks = Callable[[Bench], Iterator[Check]]


def side_by_side(bench: Bench, checks: list[tuple[str, Asks]]) -> Iterator[Check]:
    """Ask named checks at the same time; yield theirs in the given order."""
    with hurried(ThreadPoolExecutor(len(checks))) as pool:
        found = [pool.submit(lambda n, c, b: list(asked(n, c(b))), name, check, bench.part()) for name, check in checks]
        for checks_of_one in found:
            yield from checks_of_one.result()


def causality(
    bench: Bench, stream: Stream, knobs: dict[str, str], label: str, probes: int, every: bool = False
) -> Iterator[Check]:
    """C1 and C3: everything after a place differs, place after place; scores before it are the same bits.

    A cut that passes says nothing of the places beside it, so halving finds no first leak; going through the places
    in their order does, and stops there.
    """
    base, rng = bench.score(stream, **knobs), bench.rng
    cfg = load_config(bench.candidate.values | knobs)
    yield coverage_check(base, cfg, label)
    yield order_check(cfg, base, stream, label)
    name = f"C1 {'future' if documents_apart(cfg) else 'documents'} ({label})"
    masks = list(cuts(cfg, base, stream, rng if not every else None))
    total = len(masks)
    if probes and probes < total:
        masks = [masks[i] for i in np.sort(rng.choice(total, size=probes, replace=False))]
    found = Check(name, UNKNOWN, "nothing is scored after another token, so nothing was tested")
    others = bench.score_each([replaced(stream, mask, rng) for mask in masks], **knobs)
    for mask, other in zip(masks, others, strict=True):
        check = compare(name, base, other, stream, ~mask)
        if check.status == FAIL:
            yield check
            return
        # a change behind the last scores has nothing left to move; at least one must
        found = check if found.status == UNKNOWN else found
    detail = f"{len(masks)} of {total} places in their order ({'all there are' if every else 'one a step'})"
    yield found._replace(detail=f"{detail}; {found.detail}")


def sidecar_checks(bench: Bench, stream: Stream, knobs: dict[str, str], label: str) -> Iterator[Check]:
    """C1: scores in nats do not depend on byte counts, nor on whether a sidecar lies there."""
    base, sizes = bench.score(stream, **knobs), stream.sizes
    other = bench.score(
        stream._replace(sizes=np.where(sizes > 0, 1 + (sizes + bench.rng.integers(1, 9)) % 11, 0)), **knobs
    )
    wrong = differing(base, other, base.scored)
    detail = f"{len(wrong):,} of {int(base.scored.sum()):,} scores change with the byte counts of the targets"
    yield decide(f"C1 byte counts ({label})", not len(wrong), detail)
    if bench.candidate.tokenizer is None:
        return
    name = f"C1 no sidecar ({label})"
    try:
        other = bench.score(stream._replace(sizes=None), **knobs)
    except RunFailed as error:  # without the folder's random name: verdicts are compared
        reason = re.sub(r"DATA_PATH=\S*", "DATA_PATH", str(error))
        yield Check(name, NOT_ASKED, f"the program refuses the data without a sidecar ({reason})")
        return
    wrong = differing(base, other, base.scored)
    yield decide(name, not len(wrong), f"{len(wrong):,} scores change when the sidecar is absent")


def every_id(stream: Stream, vocab: int, length: int, place: int, rng: np.random.Generator) -> np.ndarray:
    """Return (vocab, length) documents with one text, but each id once at `place`, in random order."""
    text = stream.tokens[stream.tokens != BOS_ID]
    rows = np.tile(np.resize(text, length), (vocab, 1))
    rows[:, 0], rows[:, place] = BOS_ID, rng.permutation(vocab)
    return rows


def distribution_checks(bench: Bench, stream: Stream, label: str) -> Iterator[Check]:
    """C2: over each id of the vocabulary as a target the probabilities sum to 1; what is before is scored alike.

    At every place of short documents (of a long chunk: its ends and its middle); a large vocabulary after
    the first update, and at the first place where documents have rows of their own.
    """
    cfg = bench.cfg
    vocab, large = cfg.vocab_size, cfg.vocab_size > LARGE
    # carried keys and values have chunks of 8 and more
    chunk = {"carry": 8}.get(cfg.ttt_context, 2 if large else 3)
    # a large vocabulary: two chunks, and one update between them
    length = 2 * chunk if large else max(6, chunk + 2)
    # the first place is exact, and cheap where a document may end behind it
    few = [1, chunk + 1] if rows_apart(cfg) else [chunk + 1]
    places = few if large else sorted({1, -(-chunk // 2), chunk, *range(chunk + 1, length)})
    ends = [place + 1 if large and place == 1 else length for place in places]
    blocks = [every_id(stream, vocab, end, place, bench.rng) for end, place in zip(ends, places, strict=True)]
    rows = [row for block in blocks for row in block]
    edges = np.linspace(0, len(rows), PARTS + 1 if large else 2).astype(int)
    parts = [made_up(np.append(np.concatenate(rows[a:b]), BOS_ID)) for a, b in itertools.pairwise(edges)]
    size = {"EVAL_SEQ_LEN": length, "EVAL_STRIDE": length, "TTT_CHUNK_SIZE": chunk, "EVAL_INCLUDE_TAIL": 1}
    # many steps: some faults show in one of forty
    size |= {
        "TTT_BATCH_SIZE": 50,
        "TTT_CHUNK_TOKENS": 64 * length,
        "TTT_EVAL_SEQ_LEN": {"carry": length}.get(cfg.ttt_context, chunk) if large else 2 * length,
    }
    # what adapters drew at random moves the sum by their rate
    size |= {"TTT_LORA_LR": 0.0002}
    numbers = STREAMS | ALONE | {key: str(value) for key, value in size.items()}
    knobs = knobs_for(cfg, numbers, 64 * length, rank=1 if large else 4)
    found = joined(list(bench.score_each(parts, **knobs)))
    yield coverage_check(found, dataclasses.replace(cfg, eval_include_tail=True), f"{label}, every id")
    adapts = {"doc_lora": True, "phased_lora": True}.get(cfg.eval, False)
    off, spread = [], 0.0
    scores = np.split(found.nats[:-1], np.cumsum([block.size for block in blocks])[:-1])
    for own, block, place in zip(scores, blocks, places, strict=True):
        part = own.reshape(block.shape)
        # past its first chunk each document adapts from random numbers of its own
        tolerance = ADAPTED_TOLERANCE if adapts and place > chunk else SUM_TOLERANCE
        off.append(abs(float(np.exp(-part[:, place]).sum()) - 1) / tolerance)
        alike = part[:, 1 : min(place, chunk + 1)]
        spread = max(spread, float(np.max(np.abs(alike - np.median(alike, axis=0)), initial=0)))
    worst = float(np.max(off))  # NaN if a score is missing
    detail = f"{vocab:,} ids at each of {len(places)} places; they miss 1 by at most {worst:.2g} of what is allowed"
    yield decide(f"C2 sums to 1 ({label})", worst <= 1, detail)
    detail = f"{len(rows):,} documents that begin alike: scores before the place differ by at most {spread:.1e} nats"
    yield decide(f"C3 score before update ({label})", spread <= SUM_TOLERANCE, detail)


def rank_checks(bench: Bench, stream: Stream, label: str) -> Iterator[Check]:
    """The same scores from two ranks and from eight, whose sums are held against SCORES too, from other batch sizes,
    and from a run that is not asked for SCORES."""
    cfg = bench.cfg
    numbers = {"TTT_WARM_START_A": "0", "TTT_CHUNK_TOKENS": "64"}
    slices = {"BATCH_SLICES": "8", "TRAIN_BATCH_TOKENS": str(8 * cfg.train_seq_len)}
    knobs = knobs_for(cfg, STREAMS | EVERY_PLACE | numbers, 8 * 16) | slices
    # published: a fit per batch of windows, and phases that begin where a batch ends
    fixed = {"slot": {"VAL_BATCH_TOKENS", "TTT_BATCH_SIZE"}, "phased_lora": {"TTT_BATCH_SIZE"}}.get(cfg.eval, set())
    sizes = {"VAL_BATCH_TOKENS": str(2 * int(knobs["VAL_BATCH_TOKENS"])), "TTT_BATCH_SIZE": "3"}
    free = {key: value for key, value in sizes.items() if key not in fixed}
    with hurried(ThreadPoolExecutor(PROCESSORS)) as pool:
        one, *several = (pool.submit(bench.part().score, stream, ranks=count, **knobs) for count in (1, 2, 8))
        unwatched = pool.submit(bench.box.fork, DATA_PATH=str(bench.data(stream)), **knobs | {"SCORES": ""})
        otherwise = pool.submit(bench.part().score, stream, **knobs | free) if free else None
        base = one.result()
        for run, words in zip(several, ("two ranks", "eight ranks"), strict=True):
            other = run.result()
            yield compare_near(f"{words} ({label})", base, other)
            yield from sum_checks(other, stream.sizes, f"{label}, {words}")
        done = unwatched.result()
        if done.code:
            raise RunFailed(f"without SCORES: {done.last_line()}")
        claimed, wrong = papers.read_object(done.folder / "result.json")
        own = own_sums(base.nats, base.count, stream.sizes)
        yield compare_sums(f"sums without SCORES ({label})", own, claimed, wrong)
        if otherwise:
            yield compare_near(f"batch sizes ({label})", base, otherwise.result())


def compare_near(name: str, base: Scored, other: Scored) -> Check:
    """Pass if scores differ by no more than sums in another order do."""
    gap = np.abs(base.nats - other.nats)[base.scored & other.scored]
    same = np.array_equal(base.count, other.count)
    detail = f"{len(gap):,} scores differ by at most {float(gap.max(initial=0)):.1e} nats"
    return decide(name, same and float(gap.max(initial=0)) <= ROUNDING, detail if same else "other targets are scored")


def asked(name: str, checks: Iterable[Check]) -> Iterator[Check]:
    """Yield the checks; a run that fails in between is a failed check of this name."""
    try:
        yield from checks
    except RunFailed as error:
        yield Check(name, FAIL, f"the program fails: {error}")


def legality(bench: Bench, stream: Stream, probes: tuple[int, int]) -> list[tuple[str, Asks]]:
    """Return C1 to C4 for the final evaluator, and documents apart in the packed forward that training uses.

    probes: places for C1 in the short stream and in a long one, 0 for all.
    """
    cfg, label, apart = bench.cfg, f"EVAL={bench.cfg.eval}", documents_apart(bench.cfg)
    # many steps where one change tries a place in every document, few where it tries one step
    knobs = knobs_for(cfg, STREAMS if apart else STREAMS | {"TTT_BATCH_SIZE": "4"}, 1024)
    narrow, whole = knobs_for(cfg, STREAMS | EVERY_PLACE, 16), short_documents(stream)
    tiny, own = tiny_stream(cfg, stream), first_documents(stream, 400)
    # rows without a document would be computed too
    rows = min(cfg.ttt_batch_size, int((own.tokens == BOS_ID).sum()))
    # eight programs of full size take their time
    few = cut_to(whole, EIGHT if bench.candidate.kind == "preset" else FIVE)
    checks: list[tuple[str, Asks]] = []
    for words, part, numbers, places in (
        (f"{label}, every place", tiny, narrow, probes[0]),
        (label, stream, knobs, probes[1]),
        (f"{label}, the record's own numbers", own, {"EVAL_INCLUDE_TAIL": "1", "TTT_BATCH_SIZE": str(rows)}, 1),
    ):
        question = functools.partial(causality, stream=part, knobs=numbers, label=words, probes=places)
        checks.append((f"C1 ({words})", functools.partial(question, every=part is tiny)))
    checks += [
        (f"C1 byte counts ({label})", lambda at: sidecar_checks(at, first_documents(stream, 400), knobs, label)),
        (f"C2 ({label})", lambda at: distribution_checks(at, stream, label)),
        (f"two ranks ({label})", lambda at: rank_checks(at, few, label)),
    ]
    name = "documents apart (packed forward)"
    if not LOADERS[cfg.loader].documents:
        checks.append((name, lambda _: iter([Check(name, NOT_ASKED, f"LOADER={cfg.loader} reads across documents")])))
    elif not {"plain": True}.get(cfg.eval, False):
        plain = narrow | {"EVAL": "plain"}
        checks.append((name, lambda at: causality(at, whole, plain, "packed forward", 4, every=True)))
    return checks


def tiny_stream(cfg: Any, stream: Stream) -> Stream:
    """Return the part of short_documents in which every place is tried: all, unless each place takes a run."""
    whole = short_documents(stream)
    if not documents_apart(cfg):
        return whole
    return cut_to(whole, FIVE if rows_apart(cfg) else SHORT)


def short_documents(stream: Stream) -> Stream:
    """Return the beginnings of documents, LENGTHS long."""
    text, ends = stream.tokens[stream.tokens != BOS_ID], np.cumsum(LENGTHS)
    tokens = np.append(np.resize(text, ends[-1]), BOS_ID)
    tokens[ends - LENGTHS] = BOS_ID
    return made_up(tokens)


def cut_to(stream: Stream, targets: int) -> Stream:
    """Return the beginning of a stream."""
    return Stream(stream.tokens[: targets + 1], None if stream.sizes is None else stream.sizes[: targets + 1])


def first_documents(stream: Stream, targets: int) -> Stream:
    """Return the stream up to the end of the document that holds this target, with the start of the next as its end."""
    ends = np.flatnonzero(stream.tokens == BOS_ID)
    return cut_to(stream, next((int(end) for end in ends if end >= targets), len(stream.tokens) - 1))


# +---------------------------------------------------------------------------+
# | BYTES AND SPLIT                                                           |
# +---------------------------------------------------------------------------+


class Pieces(NamedTuple):
    """What each id of a tokenizer stands for, counted without the program's code."""

    bytes: np.ndarray  # UTF-8 bytes without a leading space and without case operators; 1 for a byte piece
    space: np.ndarray  # whether the piece begins with a space
    control: np.ndarray  # whether it is a control id
    operator: np.ndarray  # whether it consists of case operators alone
    escape: np.ndarray  # whether it ends with the escape
    caseops: bool  # whether the tokenizer was made for CaseOps text


def read_pieces(processor: spm.SentencePieceProcessor) -> Pieces:
    """Look up every id of a tokenizer."""
    ids = range(processor.vocab_size())
    control = [processor.is_control(i) or processor.is_unknown(i) for i in ids]
    texts = ["" if control[i] else processor.id_to_piece(i) for i in ids]
    caseops = processor.piece_to_id(OPERATORS[0]) != processor.unk_id()
    plain = str.maketrans(dict.fromkeys(OPERATORS)) if caseops else {}
    bare = [text.replace("\u2581", " ").translate(plain) for text in texts]
    sizes = [len(text.removeprefix(" ").encode("utf-8", "surrogatepass")) for text in bare]
    return Pieces(
        np.array([1 if processor.is_byte(i) else sizes[i] for i in ids]),
        np.array([text.startswith(" ") for text in bare]),
        np.array([not text for text in texts]),
        np.array([bool(texts[i]) and caseops and not bare[i] for i in ids]),
        np.array([caseops and text.endswith(ESC) for text in texts]),
        caseops,
    )


def piece_sizes(pieces: Pieces, ids: np.ndarray) -> np.ndarray:
    """Return the bytes of each token of a stream, counted from its piece."""
    # A space after a control id is not text: the decoder drops it.
    after_control = np.concatenate(([True], pieces.control[ids[:-1]]))
    return pieces.bytes[ids] + (pieces.space[ids] & ~after_control)


def byte_checks(candidate: Candidate, stream: Stream | None) -> Iterator[Check]:
    """The evaluator's denominator against a count from the ids alone."""
    if stream is None:
        yield Check("bytes", UNKNOWN, "needs the run's data: give --data DATA_PATH")
        return
    ids, tokenizer = stream.tokens, candidate.tokenizer
    if tokenizer is None:
        yield Check("bytes per word", UNKNOWN, "no tokenizer: put its *.model beside the shards, or set TOKENIZER_PATH")
        return
    processor = prepare.load_tokenizer(str(tokenizer))
    pieces = read_pieces(processor)
    if ids.max() >= len(pieces.bytes):
        yield Check("bytes per word", FAIL, f"token id {ids.max()} is outside {tokenizer.name}: shards of another one")
        return
    if pieces.caseops and stream.sizes is None:
        yield Check("bytes per word", FAIL, "a vocabulary with case operators, and no sidecar says what they stand for")
        return
    counted = own_sizes(stream, tokenizer)
    last = len(ids) - (0 if candidate.cfg.eval_include_tail else (len(ids) - 1) % candidate.cfg.eval_seq_len)
    total, targets = int(counted[1:last].sum()), last - 1
    known = CANONICAL.get((total, targets)) or CANONICAL.get((total, 0)) or "no canonical total"
    wanted, detail = TARGETS.get(targets), f"{total:,} bytes for {targets:,} targets: {known}"
    fits = wanted is None or abs(total / wanted - 1) <= NEAR
    detail += "" if fits else f"; the canonical total is {wanted:,}"
    yield decide("bytes total", total != INVALID_TOTAL and fits, detail)
    manifest, _ = papers.read_object(candidate.data / "manifest.json") if candidate.data else ({}, [])
    try:
        # a fused pair counts as its two tokens: the alias is the piece of another byte
        ids, counted = plain_stream(manifest, processor, ids, counted)
    except UserError as error:
        yield Check("bytes of fused pairs", FAIL, str(error))
        return
    stream = Stream(ids, counted if stream.sizes is not None else None)
    spaces = counted[:-1][(pieces.space & (pieces.bytes == 0))[ids[:-1]] & pieces.operator[ids[1:]]]
    single = float((spaces == 1).mean()) if len(spaces) else 1.0
    detail = f"{single:.1%} of {len(spaces):,} have one byte (at least {SINGLE_SPACES:.0%})"
    yield decide("bytes of spaces before operators", single >= SINGLE_SPACES, detail)
    for name, mask in (("control ids", pieces.control[ids]), ("case operators", pieces.operator[ids])):
        size = int(counted[mask].sum())
        yield decide(f"bytes of {name}", size == 0, f"{size:,} bytes on {int(mask.sum()):,} tokens")
    yield from text_checks(stream, processor, pieces, counted)
    yield from folding_check(candidate, processor)


def text_checks(stream: Stream, processor: Any, pieces: Pieces, counted: np.ndarray) -> Iterator[Check]:
    """Byte counts word by word, and in all against the decoded text."""
    ids, sidecar = stream.tokens, stream.sizes is not None
    # By word, because a character of several pieces may be counted on any of them.
    word = np.cumsum(pieces.space[ids] | pieces.control[ids])
    difference = np.bincount(word, counted - piece_sizes(pieces, ids)).astype(np.int64)
    # An escape means that the text itself holds an operator, which then has bytes.
    plain = np.bincount(word, pieces.escape[ids]) == 0
    fewer, more, words = int(((difference < 0) & plain).sum()), int(((difference > 0) & plain).sum()), int(word[-1]) + 1
    good = fewer <= FOLDED_ALLOWED * words and more <= 0.5 * words if sidecar else fewer + more == 0
    source = "sidecar" if sidecar else "tokenizer table"
    detail = f"{source}: of {words:,} words {fewer:,} have fewer bytes than their text, {more:,} more"
    yield decide("bytes per word", good, f"{detail} (folded white space)")
    total, (text, broken) = int(counted.sum()), prepare.decode_documents(processor, ids, pieces.caseops)
    detail = f"counted {total:,}, decoded {text:,}" + (f", {broken} documents do not decode" if broken else "")
    yield decide("bytes of the decoded text", abs(total - text) <= (SIDECAR_SLACK * text if sidecar else 0), detail)


def folding_check(candidate: Candidate, processor: Any) -> Iterator[Check]:
    """Unknown if the text behind the tokens may not be the text: a tokenizer that folds case, a lossy preparation."""
    probe = "Case FOLDING Probe"
    folds = processor.decode(processor.encode(probe)).strip() == probe.lower()
    manifest, wrong = papers.read_object(candidate.data / "manifest.json") if candidate.data else ({}, [])
    why = ["the tokenizer folds case"] * folds + ["manifest.json says lossy"] * (manifest.get("lossy") is True) + wrong
    if why:
        detail = "so bytes of the text before cannot be counted here; prepare the data without loss"
        yield Check("bytes lost", UNKNOWN, f"{', '.join(why)}: {detail}")


def document_hashes(tokens: np.ndarray) -> list[bytes]:
    """Return a hash of each document of a stream, in order."""
    documents = np.split(tokens.astype("<u2"), np.flatnonzero(tokens == BOS_ID))
    return [hashlib.blake2b(part.tobytes(), digest_size=12).digest() for part in documents if len(part)]


def split_check(candidate: Candidate, stream: Stream | None) -> Check:
    """Count the validation documents that training holds too."""
    if stream is None:
        return Check("split", UNKNOWN, "needs the run's data: give --data DATA_PATH")
    paths = sorted(candidate.data.glob("fineweb_train_*.bin"))
    if not paths:
        return Check("split", UNKNOWN, f"{candidate.data} has no training shards: give --data with them")
    val, shared, rest = document_hashes(stream.tokens), set(), np.empty(0, np.int64)
    known = set(val)
    for path in paths:  # one at a time; a document may go on in the next
        rest = np.concatenate([rest, read_shard(path)])
        starts = np.flatnonzero(rest == BOS_ID)
        last = int(starts[-1]) if len(starts) and path != paths[-1] else len(rest)
        shared |= known.intersection(document_hashes(rest[:last]))
        rest = rest[last:]
    both = sum(digest in shared for digest in val)
    # documents that were cut, joined or given an EOS are equal to none, but their windows are
    found = overlap.shingle_overlap(stream.tokens, map(read_shard, paths))
    limit = overlap.MAX_SHARE if len(stream.tokens) >= FEW_TOKENS else SHARE_OF_FEW
    detail = f"{both:,} of {len(val):,} validation documents are in training, {100 * found.share:.2f} % of the tokens "
    detail += f"in runs of {overlap.WINDOW} and more (at most {100 * limit:g} %)"
    return decide("split", both <= OVERLAP_ALLOWED * len(val) and found.share <= limit, detail)


# +---------------------------------------------------------------------------+
# | CANDIDATES                                                                |
# +---------------------------------------------------------------------------+


def toy_documents(folder: Path, vocab_size: int) -> Path:
    """Make CaseOps shards, sidecar and tokenizer from short texts that Python itself carries."""
    parts = [part.strip() for topic in TOPICS.values() for part in topic.split("\n\n\n")]
    short = {part for part in parts if 250 < len(part) < 700}
    texts = sorted(short, key=lambda text: hashlib.md5(text.encode()).digest())
    docs, out = folder / "docs.jsonl", folder / "shards"
    docs.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    options = prepare.Options(docs=(docs,), out=out, vocab_size=vocab_size, val_docs=7)
    with contextlib.redirect_stderr(io.StringIO()):
        prepare.prepare(options, prepare.CaseOps())
    return out


def seeded_stream(vocab_size: int, targets: int) -> Stream:
    """Return random documents with byte counts, which need no tokenizer."""
    rng = np.random.Generator(np.random.PCG64(vocab_size))
    ids = rng.integers(4, vocab_size, size=targets + 1)
    starts = np.cumsum(rng.integers(60, 330, size=targets))
    ids[[0, *starts[starts < targets], targets]] = BOS_ID
    return Stream(ids, np.where(ids == BOS_ID, 0, 1 + ids % 7))


def toy_values(values: dict[str, str], **others: str) -> dict[str, str]:
    """Return a record's knobs with the numbers of records/toy: four layers of the kinds that the record lists."""
    toy, full = read_preset(str(ROOT / "records" / "toy")), load_config(values)
    layers, top, letters = int(toy["NUM_LAYERS"]) - 1, full.num_layers - 1, mixer_letters(full)
    toy["MIXERS"] = " ".join(letters[round(i * top / layers)] for i in range(layers + 1))
    toy["VE_LAYERS"] = ",".join(str(i) for i in sorted({round(i * layers / top) for i in full.ve_layers}))
    try:
        load_config(values | toy | others)
    except UserError as error:
        raise UserError(f"the preset has no toy size: {error}".replace("\n", "; ")) from None
    return values | toy | others


def open_preset(record: Path, source: Path, room: Path, given: Path | None) -> Candidate:
    """Open a record at toy size, with all its own knobs except the numbers; its weights are trained later."""
    claimed = read_preset(str(record))
    load_config({"PRESET": str(record)})  # a wrong record is refused before any work
    data = given or toy_documents(room, load_config(toy_values(claimed)).vocab_size)
    # TOKENIZER_PATH is about the user's data, not about the judge's own
    tokenizer = tokenizer_in(data) if given else min(data.glob("*.model"))
    if tokenizer is None:
        raise UserError(f"{data} has no tokenizer; a record is judged on shards with their *.model")
    vocab_size = prepare.load_tokenizer(str(tokenizer)).vocab_size()
    values, notes = toy_values(claimed, VOCAB_SIZE=str(vocab_size)), []
    compressor = load_config(values).compressor
    try:
        CODECS[compressor].require()
    except UserError as error:
        notes = [f"COMPRESSOR=brotli in place of {compressor}: {error}"]
        values |= {"COMPRESSOR": "brotli"}
    found = Candidate("preset", record.name, source.read_bytes(), values, claimed, folder=record, notes=notes)
    found.data, found.tokenizer = data, tokenizer
    return found


def tokenizer_in(folder: Path | None) -> Path | None:
    """Return TOKENIZER_PATH, else the only *.model in a data folder, else None. UserError if it is not clear which."""
    named = os.environ.get("TOKENIZER_PATH")
    if named:
        if not Path(named).is_file():
            raise UserError(f"TOKENIZER_PATH={named}: no such file")
        return Path(named)
    models = sorted(folder.glob("*.model")) if folder else []
    if len(models) > 1:
        raise UserError(f"{folder} holds {len(models)} tokenizers; choose one with TOKENIZER_PATH")
    return models[0] if models else None


def data_of(given: Path | None, logged: str = "") -> Path | None:
    """Return --data, else DATA_PATH, else the directory that the run's log names, if it is there."""
    for name, value in (("--data", given), ("DATA_PATH", os.environ.get("DATA_PATH"))):
        if value:
            if not Path(value).is_dir():
                raise UserError(f"{name} {value}: no such directory; give the folder with the shards")
            return Path(value)
    return Path(logged) if logged and Path(logged).is_dir() else None


def open_run(folder: Path, source: Path, given: Path | None) -> Candidate:
    """Open a run folder: its weights, with the program beside this tool."""
    values, (result, _) = read_preset(str(folder)), papers.read_object(folder / "result.json")
    load_config({"PRESET": str(folder)})
    data = source.read_bytes()
    found = Candidate("run", folder.name, data, values, values, (folder / "model.bin").read_bytes(), folder, result)
    artifact = folder / str(result.get("artifact") or "artifact.pyz")
    if artifact.exists():
        found.files = pack_artifact.artifact_files(artifact)
    found.data = data_of(given, papers.read_log(folder / "log.txt").knobs.get("DATA_PATH", ""))
    found.tokenizer = tokenizer_in(found.data)
    return found


def open_artifact(path: Path, room: Path, given: Path | None) -> Candidate:
    """Open a packed file, to be judged by the program inside it."""
    parts = pack_artifact.read_packed(path)
    (room / "packed").mkdir()
    (room / "packed" / "record.env").write_bytes(parts.config)
    values = read_preset(str(room / "packed"))
    source = parts.source if isinstance(parts.source, bytes) else parts.source.encode()
    found = Candidate("artifact", path.name, source, values, values, parts.weights, data=data_of(given))
    found.files, found.tokenizer = pack_artifact.artifact_files(path), tokenizer_in(found.data)
    if parts.tokenizer:
        found.tokenizer = room / "packed" / "tokenizer.model"
        found.tokenizer.write_bytes(parts.tokenizer)
    return found


def refuse_others(target: Path, source: Path) -> None:
    """UserError if a folder with a record.env holds a program of its own, or what an unfinished run leaves."""
    beside = target / "train_gpt.py"
    if beside.is_file() and not (source.is_file() and beside.samefile(source)):
        why = f"judge that with --source {beside}, or take record.env away to have the folder read as another team's"
        raise UserError(f"{target} holds record.env and a program of its own; {why}")
    left = [
        name for name in ("log.txt", "model.pt", "hessians.pt", "model.bin", "result.json") if (target / name).exists()
    ]
    if left:
        raise UserError(
            f"{target} is a run that is not finished ({', '.join(left)}); finish it with STAGES=quantize,eval"
        )


def refuse_unread(args: argparse.Namespace, why: str, *names: str) -> None:
    """UserError if the command line gives an option that has no effect on what it names."""
    given = [f"--{name}" for name in names if getattr(args, name) is not None]
    if given:
        raise UserError(f"{args.target} {why}; leave out {', '.join(given)}")


def open_candidate(args: argparse.Namespace, room: Path) -> Candidate:
    """Open what the command line names. UserError if it is nothing that can be judged."""
    target, source = args.target, args.source or ROOT / "train_gpt.py"
    given = data_of(args.data) if args.data else None
    if target.is_dir() and (target / "model.bin").is_file() and (target / "result.json").is_file():
        return open_run(target, source, given)
    if target.is_dir() and (target / "record.env").is_file():
        refuse_others(target, source)
        return open_preset(target, source, room, given)
    if target.is_file() or (target / "train_gpt.py").is_file():
        refuse_unread(args, "is judged by the program inside it", "source")
        return open_artifact(target, room, given)
    known = "a record folder, a run folder (with result.json and model.bin), an artifact"
    raise UserError(f"{target}: give {known}, or another team's folder (with train_gpt.py)")


# +---------------------------------------------------------------------------+
# | VERDICT                                                                   |
# +---------------------------------------------------------------------------+


def train(bench: Bench, stream: Stream) -> Outcome:
    """Train a preset beside validation shards of its own, and set the bench's weights, as many runs will read them."""
    other = replaced(stream, np.ones(len(stream.tokens), bool), bench.rng)
    few = Stream(other.tokens[: bench.cfg.eval_seq_len + 1], other.sizes[: bench.cfg.eval_seq_len + 1])
    faster = FASTER.get(bench.cfg.compressor)
    done = bench.trains.fork(DATA_PATH=str(bench.data(few, read_shards(bench.candidate.data, "train"))))
    if done.code != 0:
        raise RunFailed(done.last_line())
    bench.candidate.weights = (done.folder / "model.bin").read_bytes()
    if faster:
        with contextlib.suppress(UserError):  # a format of the program's own stays
            stored = read_artifact(done.folder / "model.bin")
            bench.candidate.weights = pack_stored(stored, faster, model_identity(bench.cfg))
    bench.box.files["model.bin"] = bench.candidate.weights
    return done


def training_checks(bench: Bench, stream: Stream, started: Future[Outcome], again: Outcome) -> Iterator[Check]:
    """A preset as a user trains and scores it: its files against the judge's sums, and against the other training."""
    first, label = scored(started.result(), len(stream.tokens)), f"EVAL={bench.cfg.eval}"
    yield coverage_check(first, bench.cfg, label)
    yield from sum_checks(first, stream.sizes, label)
    packed, also = ((outcome.folder / "model.bin").read_bytes() for outcome in (first.outcome, again))
    same = same_weights(first.outcome, again) and packed == also
    detail = "the same weights, bit for bit" if same else "other weights"
    yield decide("training ignores validation", same, f"trained again beside other validation shards: {detail}")
    # these weights as they were packed: hidden units may lie in another order, whose sums round otherwise
    bench.box = copy.copy(bench.box)
    bench.box.files = bench.box.files | {"model.bin": packed}
    yield compare_starts(bench, first, stream, {}, "with the training shards, and from a fork without them")


def same_weights(a: Outcome, b: Outcome) -> bool:
    """Return whether two runs trained the same tensors, bit for bit. RunFailed if a run left none."""
    try:
        found = [torch.load(run.folder / "model.pt", map_location="cpu", weights_only=True)["model"] for run in (a, b)]
    except (OSError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RunFailed(f"no trained weights in model.pt ({type(error).__name__})") from None
    ours, theirs = found
    return ours.keys() == theirs.keys() and all(pack_artifact.same_bits(ours[name], theirs[name]) for name in ours)


def compare_starts(bench: Bench, first: Scored, stream: Stream, knobs: dict[str, str], what: str) -> Check:
    """A run by a Python of its own against forked ones: equal bits, or scores that do not repeat at all."""
    other = bench.score(stream, **knobs)
    wrong = differing(first, other, first.scored | other.scored)
    if len(wrong) and len(differing(other, bench.score(stream, **knobs), other.scored)):
        detail = f"{len(wrong):,} scores differ from run to run: bit equality says nothing"
        return Check("runs alone", UNKNOWN, detail)
    same = not len(wrong) and np.array_equal(first.count, other.count)
    detail = f"scored by a Python of its own, {what}: {len(wrong):,} of {int(first.scored.sum()):,} scores differ"
    return decide("runs alone", same, detail)


def start_checks(bench: Bench, stream: Stream) -> Iterator[Check]:
    """A run or an artifact by a Python of its own, from an empty directory, against the forked program."""
    candidate, script = bench.candidate, "train_gpt.py"
    files, knobs = bench.box.files, knobs_for(bench.cfg, STREAMS, 1024)
    if candidate.kind == "artifact":
        files, script = {file.name: file.read_bytes() for file in candidate.files}, candidate.files[0].name
    own = {"DEVICE": "cpu", "STAGES": "eval", "EVAL_BUDGET_SECONDS": "0"}
    own |= {} if candidate.kind == "artifact" else {"MODEL_PATH": "model.bin"}
    box = BlackBox(bench.server, bench.room / "starts", script, files, own)
    first = scored(box.launch(DATA_PATH=str(bench.data(stream)), **knobs), len(stream.tokens))
    yield compare_starts(bench, first, stream, knobs, "and from a fork")


def packed_checks(candidate: Candidate) -> Iterator[Check]:
    """The packed file beside a run: the weights, knobs and program in it are those that are judged here."""
    if candidate.kind != "run" or not candidate.files:
        return
    try:
        parts = pack_artifact.read_packed(candidate.files[0])
        # in a process of its own: CPython 3.11 has one depth of recursion for the parsers of all threads
        quiet = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), **quiet) as alone:
            program = alone.submit(pack_artifact.minify, candidate.source.decode()).result().encode()
    except (UserError, UnicodeDecodeError) as error:
        yield Check("disk weights", UNKNOWN, str(error))
        return
    same = parts.weights == candidate.weights
    yield decide("disk weights", same, "the packed weights are the run's" if same else "other weights are packed")
    knobs = (candidate.folder / "record.env").read_bytes()
    other = [
        name for name, good in (("knobs", parts.config == knobs), ("program", parts.source == program)) if not good
    ]
    path, word = candidate.files[0], " and ".join(other)
    detail = f"other {word} than judged here: judge the file itself, verify.py {path}" if other else "as judged here"
    yield Check("disk program", UNKNOWN if other else PASS, detail)


def claimed_sums(bench: Bench, stream: Stream | None) -> Iterator[Check]:
    """A run's claimed score, tokens and bytes: added again from its own SCORES, or scored again if it is small."""
    candidate, name = bench.candidate, "sums as claimed"
    if candidate.kind != "run":
        return
    if stream is None:
        yield Check(name, UNKNOWN, "needs the run's data: give --data DATA_PATH")
        return
    length, sizes = len(stream.tokens), own_sizes(stream, candidate.tokenizer)
    again = f"make them: SCORES={candidate.folder}/scores STAGES=eval ARTIFACT_DIR={candidate.folder} with its launch"
    if prefixes := sorted({path.name.rsplit(".", 2)[0] for path in candidate.folder.glob("*.0.npy")}):
        left, said = Outcome(0, "", candidate.folder, candidate.folder), number(candidate.result.get("val_loss")) or 0.0
        # other tools leave scores of other weights beside them
        prefixes = [prefix for prefix in prefixes if len(left.rows(prefix))] or prefixes
        found = min(
            (scored(left, length, prefix) for prefix in prefixes),
            key=lambda each: abs(own_sums(each.nats, each.count, sizes)["val_loss"] - said),
        )
        yield coverage_check(found, bench.cfg, "the run's SCORES")
        yield compare_sums(name, own_sums(found.nats, found.count, sizes), candidate.result, [])
    elif unadapted := candidate.result.get("tokens_unadapted"):
        detail = f"{unadapted} targets were scored without adapting, by a clock: no second run does the same; {again}"
        yield Check(name, UNKNOWN, detail)
    elif length <= RESCORED:
        found = bench.score(stream)
        yield coverage_check(found, bench.cfg, "scored again")
        own, said = own_sums(found.nats, found.count, sizes), candidate.result
        # another machine rounds elsewhere: the counts to the last digit, the score to what a paper shows
        good = all(said.get(key) == own[key] for key in ("tokens_scored", "bytes_scored"))
        keys = ("val_loss", "val_bpb")
        good &= all(papers.is_number(said.get(key)) and math.isclose(said[key], own[key], rel_tol=1e-5) for key in keys)
        pairs = (f"{key} {said.get(key)}, scored again {value}" for key, value in own.items())
        yield decide(name, good, "; ".join(pairs))
    else:
        yield Check(name, UNKNOWN, f"the run left no SCORES to add again; {again}")


def causal_stream(candidate: Candidate, stream: Stream | None, documents: int) -> Stream:
    """Return the stream of C1 to C3: so many documents of the given data, else seeded ones. Byte counts are made up.

    UserError for data without documents.
    """
    tokens, least = (stream or seeded_stream(candidate.cfg.vocab_size, 300 * documents)).tokens, STREAMS["EVAL_SEQ_LEN"]
    if candidate.kind == "preset":  # validation alone is short
        train = read_shards(candidate.data, "train")
        if train is None:
            raise UserError(f"{candidate.data} has no fineweb_train_*.bin; a record is trained before it is judged")
        tokens = np.concatenate([tokens, train])
    if not (tokens[:-1] == BOS_ID).any():
        raise UserError(f"{candidate.data}: no token is a document's start (BOS, {BOS_ID}); prepare the data again")
    ends = np.append(np.flatnonzero(tokens == BOS_ID), len(tokens) - 1)[: documents + 1]
    if candidate.kind == "preset":
        tokens = tokens[: ends[-1] + 1]
    else:  # a program of full size takes its time
        parts = (tokens[start : min(end, start + BEGINNING)] for start, end in itertools.pairwise(ends))
        tokens = np.append(np.concatenate([*parts]), BOS_ID)
    if len(tokens) <= int(least):
        raise UserError(
            f"{candidate.data}: {len(tokens):,} tokens in {documents} documents, at least {least} are wanted"
        )
    return cut_to(made_up(tokens), len(tokens) - 1 - (len(tokens) - 1) % int(least))


def runs(bench: Bench, stream: Stream | None, causal: Stream, probes: tuple[int, int]) -> Iterator[Check]:
    """All that running the program answers; a preset is trained twice first, side by side."""
    candidate, alone = bench.candidate, lambda at: start_checks(at, causal)
    with hurried(ThreadPoolExecutor(1)) as pool:
        if candidate.kind == "preset":
            stream = stream._replace(sizes=own_sizes(stream, candidate.tokenizer))
            data = bench.data(stream, read_shards(candidate.data, "train"))
            # the one that runs as users run it takes longer; most questions do not wait for it
            started = pool.submit(bench.trains.launch, DATA_PATH=str(data))
            again = train(bench, stream)
            alone = functools.partial(training_checks, stream=stream, started=started, again=again)
        checks = [("runs alone", alone), *legality(bench, causal, probes)]
        checks.append(("sums as claimed", lambda at: claimed_sums(at, stream)))
        yield from side_by_side(bench, checks)


def judge(bench: Bench, documents: int, probes: tuple[int, int]) -> Iterator[Check]:
    """Run all checks on a candidate."""
    candidate = bench.candidate
    stream = read_stream(candidate.data) if candidate.data else None
    if stream is None:
        candidate.notes.append("no data was given: C1 to C4 are asked of seeded tokens")
    causal = causal_stream(candidate, stream, documents)
    with hurried(ThreadPoolExecutor(1)) as pool:
        reading = pool.submit(lambda: [*byte_checks(candidate, stream), split_check(candidate, stream)])
        # minifying takes ten seconds
        packed = pool.submit(lambda: list(packed_checks(candidate)))
        yield from asked("runs alone", runs(bench, stream, causal, probes))
        yield from reading.result()
        yield from budget_checks(candidate)
        yield from disk_checks(candidate)
        # inside: leaving takes back what has not begun
        yield from packed.result()
    yield from claim_checks(candidate)
    made_by, own = candidate.result.get("source_sha256"), hashlib.sha256(candidate.source).hexdigest()
    if candidate.kind == "run" and made_by != own:
        detail = "another train_gpt.py made this run: give that with --source, or judge its packed file"
        yield Check("program", UNKNOWN, detail)


def summary(candidate: Candidate, checks: list[Check]) -> dict[str, Any]:
    """Return the verdict as JSON; legal is true, false, or null if a question stayed open."""
    states = [check.status for check in checks]
    legal = False if FAIL in states else (None if UNKNOWN in states else True)
    return {
        "target": candidate.name,
        "kind": candidate.kind,
        "scale": "toy" if candidate.kind == "preset" else "full",
        "legal": legal,
        "counts": {state: states.count(state) for state in (PASS, FAIL, UNKNOWN, NOT_ASKED)},
        "record_sha256": preset_sha256(candidate.folder) if candidate.folder else None,
        "notes": candidate.notes,
        "checks": [check._asdict() for check in checks],
    }


def printable(text: str) -> str:
    """Return a text that cannot steer a terminal, in letters that standard output has."""
    coding = sys.stdout.encoding or "utf-8"
    return "".join(c if c.isprintable() else "\ufffd" for c in text).encode(coding, "replace").decode(coding)


def print_verdict(verdict: dict[str, Any]) -> None:
    """Print the verdict as a table."""
    for note in verdict["notes"]:
        print(printable(f"note: {note}"))
    rows = [[printable(check[key]) for key in ("name", "status", "detail")] for check in verdict["checks"]]
    names, states, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    for name, state, detail in rows:
        print(f"  {name:{names}}  {state:{states}}  {detail}")
    word = {True: "legal, as far as it was asked", False: "NOT legal", None: "undecided"}[verdict["legal"]]
    counts = ", ".join(f"{n} {state}" for state, n in verdict["counts"].items() if n)
    print(f"{printable(verdict['target'])} ({verdict['kind']}, {verdict['scale']} size): {word} ({counts})")


def run_target(args: argparse.Namespace, server: Server) -> tuple[Candidate, list[Check]]:
    """Open what the command line names, run all checks on it, and return both."""
    # after an error runs may write there until the server ends
    room = Path(tempfile.mkdtemp(dir=server.room))
    candidate = open_candidate(args, room)
    bench = Bench(candidate, server, room)
    # a run of a full-size program takes minutes
    probes = (0 if candidate.kind == "preset" else LONG, LONG) if args.probes is None else (args.probes,) * 2
    documents = args.documents or (5 if candidate.kind == "preset" else 3)
    checks = list(judge(bench, documents, probes))
    shutil.rmtree(room, ignore_errors=True)
    return candidate, checks


def judge_target(args: argparse.Namespace, server: Server) -> int:
    """Judge what the command line names and print the verdict. Return 0 if legal, 1 if not, 2 for a wrong input."""
    started = time.perf_counter()
    try:
        foreign = is_foreign(args.target)
        if foreign:
            why = "is another team's folder, which is read and not run"
            refuse_unread(args, why, "data", "source", "documents", "probes")
        verdict = summary(*(open_foreign(args.target) if foreign else run_target(args, server)))
    except (UserError, OSError, UnicodeDecodeError) as error:
        print(printable(f"error: {error}".replace("\n", "; ")), file=sys.stderr)
        return 2
    print_verdict(verdict)
    print("VERDICT " + json.dumps(verdict | {"seconds": round(time.perf_counter() - started, 1)}), flush=True)
    if args.out:
        prepare.write_json(args.out, verdict)
    return 0 if verdict["legal"] else 1
