#!/usr/bin/env python3
"""The judge: is a score legal, and are its size, its bytes and its claims what they are said to be?

    python records/verify.py records/track_10min_16mb/<record>              a preset, shrunk to a toy and trained first
    python records/verify.py logs/<RUN_ID> [--data DATA_PATH]               a finished run
    python records/verify.py logs/<RUN_ID>/artifact.pyz --data DATA_PATH    a packed file, judged by its own program
    python records/verify.py --all                                          every record, each with its verdict.json

What it asks (numbers of the contest's conditions, issue 1017):
  C1  does a score depend on anything but the artifact and what was scored before? The real evaluator runs again and
      again on changed tokens: one token, a permuted future, another document. Scores before the change must be equal to
      the last bit, through adaptation, phases, smear and packing. "Before" means before in the order of scoring, which
      the judge writes down itself: an earlier unit, or the same unit and the same document further left.
  C2  is what scores a target a distribution? With the state and the context held, each id of the alphabet is scored as
      the target; the probabilities must sum to 1, and the score of a changed token must be the one foretold.
  C3  is every target scored before anything learns from it, C4 is each scored exactly once: by the judge's own ledger.
  bytes   the denominator again from the ids, through the tokenizer and the CaseOps decoder; canonical totals.
  split   documents that training and validation share, by hash.
  budget  600 s to train with Hessians, 600 s to score.
  disk    the files' real size against the cap and against what is said.
  claims  README and submission.json against knobs, log and result.

Verdict per check: pass, FAIL, n/a (nothing to ask), unknown (asked, and not answered). The last line of the output is
`VERDICT {json}`; exit status 0 when nothing failed or stayed unknown, 1 otherwise, 2 for a wrong input.
One process judges, on a GPU where there is one; --documents bounds how much of the validation stream it uses.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics as TOPICS
from typing import Any, NamedTuple

import numpy as np
import sentencepiece as spm
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import prepare  # noqa: E402  (data/ is no package)
from caseops import ESC, OPERATORS, CaseOpsError, decode  # noqa: E402

import pack_artifact  # noqa: E402
from pack_artifact import CAP_BYTES  # noqa: E402
from train_gpt import UserError, atomic_write  # noqa: E402

# Numbers that make any record small enough for seconds on one core. Depth is apart: a record may list its layers.
TOY_DEPTH = {
    "NUM_LAYERS": "4",
    "XSA_LAST_N": "4",
    "NUM_LOOPS": "1",
    "LOOP_START": "1",
    "LOOP_END": "2",
    "PARALLEL_START_LAYER": "3",
}
TOY = {
    "VOCAB_SIZE": "512",
    "MODEL_DIM": "64",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "MLP_MULT": "2.0",
    "ROPE_DIMS": "8",
    "TRAIN_SEQ_LEN": "128",
    "EVAL_SEQ_LEN": "128",
    "EVAL_STRIDE": "32",
    "TRAIN_BATCH_TOKENS": "1024",
    "VAL_BATCH_TOKENS": "1024",
    "BATCH_SLICES": "4",
    "ITERATIONS": "12",
    "MAX_WALLCLOCK_SECONDS": "0",
    "WARMUP_STEPS": "1",
    "TRAIN_LOG_EVERY": "4",
    "EMA_DECAY": "0.5",
    "GPTQ_CALIBRATION_BATCHES": "4",
    "TTT_LORA_RANK": "4",
    "TTT_LORA_ALPHA": "6",
    "TTT_LORA_LR": "0.003",
    "TTT_EVAL_SEQ_LEN": "96",
    "TTT_BATCH_SIZE": "2",
    "PHASED_TTT_PREFIX_DOCS": "2",
    "PHASED_TTT_NUM_PHASES": "2",
    "GLOBAL_TTT_CHUNK_TOKENS": "256",
    "TTT_CHUNK_TOKENS": "512",
}
BUDGET_SECONDS = 600.0
TOY_VOCAB = 400  # control ids, operators, bytes and the characters of the text leave a few for words
SUM_TOLERANCE = 1e-4  # of float32 losses of a whole alphabet
OVERLAP_ALLOWED = 0.01  # of validation documents: web text repeats some by itself, a leak repeats most
FOLDED_ALLOWED = 0.01  # of words whose text the tokenizer's normalisation may have shortened
SIDECAR_SLACK = 0.08  # what a sidecar knows of folded white space; case operators would add 9 %, double spaces 17 %
PASS, FAIL, NOT_ASKED, UNKNOWN = "pass", "FAIL", "n/a", "unknown"
CANONICAL = {  # (bytes, targets) -> what that denominator is; targets 0: any number
    (151_074_499, 47_851_520): "the canonical CaseOps denominator",
    (151_080_891, 0): "the canonical SP8192 denominator",
    (164_594_398, 0): "CaseOps operators counted as bytes: an INVALID denominator",
}
INVALID_TOTALS = frozenset((164_594_398,))


class Check(NamedTuple):
    """One question, its answer and why."""

    name: str
    status: str
    detail: str


def verdict_of(name: str, good: bool, detail: str) -> Check:
    """pass or FAIL."""
    return Check(name, PASS if good else FAIL, detail)


@dataclasses.dataclass
class Subject:
    """What is judged: the program that scores, its configuration, the weights, and the papers around them.

    folder: record or run folder, or None; result: result.json or {}; files: what would be submitted; scale: toy, full.
    """

    kind: str
    name: str
    program: Any
    source: Path
    cfg: Any
    blob: Path | None
    folder: Path | None
    result: dict[str, Any]
    files: list[Path]
    data: Path | None
    scale: str = "full"
    notes: list[str] = dataclasses.field(default_factory=list)


# +---------------------------------------------------------------------------+
# | TAPE: what the real evaluator does, written down                          |
# +---------------------------------------------------------------------------+


class Tape:
    """Every score of one evaluation in the order of scoring, and the answers to the questions put on the way.

    nll, unit, group: per stream position, its loss (float64 holds a float32 exactly), the number of the unit that
    scored it and the document whose row it stood in (-1 where rows are windows of one stream). alternatives: position
    -> token that is scored there instead, once, from the same state. probed: units whose distributions are summed.
    """

    def __init__(self, length: int, alternatives: dict[int, int] | None = None, probed: tuple[int, ...] = ()) -> None:
        self.nll, self.count = np.full(length, math.nan), np.zeros(length, np.int64)
        self.unit, self.group = np.full(length, -1), np.full(length, -1)
        self.alternatives, self.probed = alternatives or {}, probed
        self.foretold: dict[int, float] = {}
        self.sums: list[np.ndarray] = []
        self.units, self.learnt_too_early, self.learnt = 0, 0, 0

    def note(self, unit: Any, nll: torch.Tensor) -> None:
        """A unit has been scored."""
        positions = unit.scored()
        np.add.at(self.count, positions, 1)
        self.nll[positions] = nll.detach()[unit.rows, unit.cols].double().cpu().numpy()
        self.unit[positions] = self.units
        if unit.docs:
            self.group[positions] = np.asarray(unit.docs)[unit.rows]
        self.units += 1

    def note_learning(self, unit: Any) -> None:
        """A unit is about to be learnt from."""
        span = getattr(unit, "span", range(0))
        positions = np.concatenate([unit.learnt(), np.arange(span.start, span.stop)])
        self.learnt += len(positions)
        self.learnt_too_early += int((self.count[positions] == 0).sum())

    def ask(self, learner: Any, unit: Any, alphabet: int) -> None:
        """Score the unit with other targets, from the state that it is about to be scored from."""
        where = {int(p): (r, c) for p, r, c in zip(unit.scored(), unit.rows, unit.cols, strict=True)}
        for position in where.keys() & self.alternatives.keys():
            targets = unit.targets.copy()
            targets[where[position]] = self.alternatives[position]
            self.foretold[position] = learner.score(unit._replace(targets=targets)).detach()[where[position]].item()
        if self.units not in self.probed:
            return
        total = np.zeros(len(unit.rows))
        for token in range(alphabet):
            targets = unit.targets.copy()
            targets[unit.rows, unit.cols] = token
            nll = learner.score(unit._replace(targets=targets)).detach()[unit.rows, unit.cols]
            total += np.exp(-nll.double().cpu().numpy())
        self.sums.append(total)


class Watched:
    """A learner whose every step is written to a tape."""

    def __init__(self, learner: Any, tape: Tape, alphabet: int) -> None:
        self.learner, self.tape, self.alphabet = learner, tape, alphabet

    def __getattr__(self, name: str) -> Any:
        return getattr(self.learner, name)

    def score(self, unit: Any) -> torch.Tensor:
        """The learner's score, after the tape's questions."""
        if len(unit.rows):
            self.tape.ask(self.learner, unit, self.alphabet)
        return self.learner.score(unit)

    def learn(self, unit: Any, nll: torch.Tensor) -> None:
        """The learner's learning."""
        self.tape.note_learning(unit)
        self.learner.learn(unit, nll)


@contextlib.contextmanager
def taped(program: Any, tape: Tape, alphabet: int) -> Iterator[None]:
    """Within, the program's one scoring loop and its meter write to the tape; nothing else of it is changed."""
    meter, loop = program.ByteMeter, program.score_first

    class TapedMeter(meter):
        """The program's meter."""

        def add(self, unit: Any, nll: torch.Tensor) -> None:
            """Write down first: the program's own ledger may refuse."""
            if len(unit.rows):
                tape.note(unit, nll)
            super().add(unit, nll)

    program.ByteMeter = TapedMeter
    program.score_first = lambda units, learner, meter: loop(units, Watched(learner, tape, alphabet), meter)
    try:
        yield
    finally:
        program.ByteMeter, program.score_first = meter, loop


class Bench:
    """The evaluators of a subject, ready to run on any stream of tokens."""

    def __init__(self, subject: Subject, val: Any) -> None:
        program, cfg = subject.program, subject.cfg
        self.program, self.cfg, self.val = program, cfg, val
        runtime = program.Runtime.start(cfg, {})
        self.runtime = dataclasses.replace(runtime, log=program.Log(None, True))
        self.state = program.load_artifact(subject.blob)
        self.attend = program.choose_attention(cfg, self.runtime)
        self.kernels = program.choose_kernels(cfg, self.runtime)
        self.final = program.EVALS[cfg.eval]
        self.packed = program.EVALS.get("plain") or getattr(program, "evaluate_plain", None)

    def model(self) -> Any:
        """The artifact's model, fresh."""
        model = self.program.GPT(self.cfg, self.attend, self.runtime.dtype, self.kernels).to(self.runtime.device)
        model.set_looping(self.program.loops(self.cfg))
        self.program.fill_model(model, self.state, "the artifact")
        return model

    def run(self, evaluate: Callable[..., Any], tokens: np.ndarray, tape: Tape) -> Any:
        """Score of a stream; the tape holds the details."""
        with taped(self.program, tape, self.cfg.vocab_size):
            return evaluate(self.cfg, self.runtime, self.model(), self.program.ValData(tokens, self.val.bytes))


# +---------------------------------------------------------------------------+
# | C1 TO C4                                                                  |
# +---------------------------------------------------------------------------+


def differing(a: Tape, b: Tape, where: np.ndarray) -> np.ndarray:
    """Positions among `where` (a mask) whose scores are not the same bits."""
    return np.flatnonzero(where & (a.nll.view(np.int64) != b.nll.view(np.int64)))


def after_in_order(tape: Tape, t: int) -> np.ndarray:
    """Mask of the positions that may depend on token t: later units, and its own unit and document further right."""
    positions = np.arange(len(tape.nll))
    own = (tape.unit == tape.unit[t]) & (tape.group == tape.group[t])
    return (tape.unit > tape.unit[t]) | (own & (positions > t))


def pick_tokens(bench: Bench, tape: Tape, count: int) -> dict[int, int]:
    """`count` positions spread over the order of scoring, none a document start, each with another token for it."""
    tokens, rng = bench.val.tokens, np.random.Generator(np.random.PCG64(17))
    plain = np.flatnonzero((tokens != bench.program.BOS_ID) & (tape.count == 1))
    order = plain[np.argsort(tape.unit[plain], kind="stable")]
    chosen = [int(rng.choice(part)) for part in np.array_split(order, count) if len(part)]
    others = np.unique(tokens[plain])
    return {t: int(rng.choice(others[others != tokens[t]])) for t in chosen}


def compare(name: str, base: Tape, other: Tape, must: np.ndarray, what: str) -> Check:
    """Whether the scores under the mask are the same bits; unknown when the change had no effect anywhere."""
    if not (np.array_equal(base.unit, other.unit) and np.array_equal(base.group, other.group)):
        return Check(name, FAIL, f"{what}: what is scored when depends on the tokens themselves")
    wrong, compared = differing(base, other, must), int(must.sum())
    if len(wrong):
        gap = float(np.abs(base.nll[wrong] - other.nll[wrong]).max())
        where = f"first at position {wrong[0]}, by up to {gap:.2e} nats"
        return Check(name, FAIL, f"{what}: {len(wrong):,} of {compared:,} scores before it changed, {where}")
    reacts = len(differing(base, other, ~must & (base.count > 0)))
    if not reacts:
        return Check(name, UNKNOWN, f"{what}: no score reacts to the change at all, so nothing was tested")
    return Check(name, PASS, f"{what}: {compared:,} scores before it bit-equal, {reacts:,} after it react")


def one_token(bench: Bench, evaluate: Callable, base: Tape, probed: Tape, label: str) -> Iterator[Check]:
    """C1 by changed tokens; and the changed token's own score must be what was foretold from the state before it."""
    for t, token in probed.alternatives.items():
        tokens = bench.val.tokens.copy()
        tokens[t] = token
        other = Tape(len(tokens))
        bench.run(evaluate, tokens, other)
        must = (base.count > 0) & ~after_in_order(base, t)
        must[t] = False
        yield compare(f"C1 token ({label})", base, other, must, f"token {t} changed")
        told, found = probed.foretold.get(t, math.nan), float(other.nll[t])
        yield verdict_of(
            f"C2 own target ({label})", told == found, f"position {t}: foretold {told:.6f}, scored {found:.6f} nats"
        )


def permuted_future(bench: Bench, evaluate: Callable, base: Tape, label: str) -> Check:
    """C1 by permuting all that is scored from the middle of the evaluation on; documents keep their places."""
    tokens, rng = bench.val.tokens.copy(), np.random.Generator(np.random.PCG64(23))
    inside = np.flatnonzero((tokens != bench.program.BOS_ID) & (base.count > 0))
    order = inside[np.argsort(base.unit[inside], kind="stable")]
    t = int(order[len(order) // 2])
    later = after_in_order(base, t)
    later[t] = True
    moved = inside[later[inside]]
    tokens[moved] = rng.permutation(tokens[moved])
    other = Tape(len(tokens))
    bench.run(evaluate, tokens, other)
    must = (base.count > 0) & ~later
    return compare(f"C1 future ({label})", base, other, must, f"{len(moved):,} later tokens permuted")


def swapped_document(bench: Bench, evaluate: Callable, base: Tape, label: str) -> Check:
    """C1 by putting another document's text in the place of the one scored in the middle, cut to its length."""
    tokens = bench.val.tokens.copy()
    docs = [d for d in bench.program.val_documents(tokens) if d[1] > 2]
    if len(docs) < 2:
        return Check(f"C1 document ({label})", NOT_ASKED, "fewer than two documents")
    first = [int(base.unit[start + 1 : start + length].min()) for start, length in docs]
    order = sorted(range(len(docs)), key=lambda i: (first[i], i))
    victim, donor = order[len(order) // 2], order[-1] if order[-1] != order[len(order) // 2] else order[0]
    start, length = docs[victim]
    source = tokens[docs[donor][0] + 1 : docs[donor][0] + docs[donor][1] - 1]
    source = source[source != bench.program.BOS_ID]
    inner = np.arange(start + 1, min(start + length, len(tokens)) - 1)
    tokens[inner] = np.resize(source, len(inner))
    other = Tape(len(tokens))
    bench.run(evaluate, tokens, other)
    may = after_in_order(base, int(inner[0]))
    may[inner] = True
    what = f"document {victim} replaced by document {donor}"
    return compare(f"C1 document ({label})", base, other, (base.count > 0) & ~may, what)


def isolated(bench: Bench, evaluate: Callable, base: Tape, label: str, why_not: str) -> Check:
    """Documents do not read one another: with the last token of every other one changed, the rest score the same.

    What catches a smear gate that reads over a document's start, and attention that does.
    """
    name = f"documents apart ({label})"
    docs = bench.program.val_documents(bench.val.tokens)
    if why_not or len(docs) < 2:
        return Check(name, NOT_ASKED, why_not or "fewer than two documents")
    tokens, must = bench.val.tokens.copy(), np.zeros(len(bench.val.tokens), bool)
    for i, (start, length) in enumerate(docs):
        last = min(start + length, len(tokens)) - 1
        last -= int(tokens[last] == bench.program.BOS_ID)
        if i % 2:
            must[start + 1 : start + length] = True
        elif last > start:
            tokens[last] = 4 + (tokens[last] - 3) % (bench.cfg.vocab_size - 4)
    other = Tape(len(tokens))
    bench.run(evaluate, tokens, other)
    return compare(name, base, other, must & (base.count > 0), "last tokens of every other document changed")


def ledger_checks(bench: Bench, tape: Tape, score: Any, label: str) -> list[Check]:
    """C3 and C4 by the judge's own counts, and the sums again."""
    targets, counts = len(bench.val.tokens) - 1, tape.count[1:]
    twice, never = int((counts > 1).sum()), int((counts == 0).sum())
    detail = f"{targets:,} targets: {never:,} never scored, {twice:,} more than once; {tape.units:,} units"
    early = f"{tape.learnt:,} targets learnt from, {tape.learnt_too_early:,} of them before their score"
    loss = float(np.nansum(tape.nll[1:]) / max(1, (counts > 0).sum()))
    size = int(bench.val.bytes[1:].sum())
    equal = score.tokens == targets and score.bytes == size and math.isclose(loss, score.val_loss, rel_tol=1e-6)
    sums = (
        f"val_loss {score.val_loss:.8f}, from the single scores {loss:.8f}; {score.tokens:,} tokens, "
        f"{score.bytes:,} of {size:,} bytes"
    )
    return [
        verdict_of(f"C3 score before update ({label})", tape.learnt_too_early == 0, early),
        verdict_of(f"C4 each target once ({label})", not twice and not never and tape.count[0] == 0, detail),
        verdict_of(f"sums ({label})", equal, sums),
        verdict_of(f"C3 the program's word ({label})", bool(score.legal), f"legal: {str(bool(score.legal)).lower()}"),
    ]


def sum_check(tape: Tape, alphabet: int, label: str) -> Check:
    """C2: the probabilities of all ids at each cell of the probed units sum to 1."""
    name = f"C2 sums to 1 ({label})"
    if not tape.sums:
        return Check(name, UNKNOWN, "the evaluator does not score through the program's one loop")
    sums = np.concatenate(tape.sums)
    worst = float(np.abs(sums - 1).max())
    return verdict_of(
        name, worst <= SUM_TOLERANCE, f"{len(sums)} positions, {alphabet:,} ids each: off by at most {worst:.1e}"
    )


def examine(
    bench: Bench, evaluate: Callable, label: str, probes: int, why_not_apart: str, sums: bool = True
) -> list[Check]:
    """All of C1 to C4 for one evaluator. An evaluator that the program itself stops, fails C4 with its words.

    sums: ask one unit for its whole distributions, which costs as many forward passes as there are ids.
    """
    base = Tape(len(bench.val.tokens))
    try:
        score = bench.run(evaluate, bench.val.tokens, base)
    except bench.program.LegalityError as error:
        return [
            *ledger_refusal(base, label),
            Check(f"C4 each target once ({label})", FAIL, f"the program stops: {error}"),
        ]
    if not base.units:
        return [Check(f"C4 each target once ({label})", UNKNOWN, "the evaluator scores past the program's meter")]
    checks = ledger_checks(bench, base, score, label)
    chosen = pick_tokens(bench, base, probes)
    units = (max(int(base.unit[t]) for t in chosen),) if sums else ()
    probed = Tape(len(bench.val.tokens), chosen, units)
    bench.run(evaluate, bench.val.tokens, probed)
    if len(differing(base, probed, base.count > 0)):
        again = Tape(len(bench.val.tokens))
        bench.run(evaluate, bench.val.tokens, again)
        if len(repeated := differing(base, again, base.count > 0)):
            detail = f"{len(repeated):,} scores differ when it runs again: bit equality says nothing; judge on a CPU"
            return [*checks, Check(f"C1 repeat ({label})", UNKNOWN, detail)]
        checks.append(Check(f"C3 scoring learns ({label})", FAIL, "asking for a score changes the scores after it"))
    if units:
        checks.append(sum_check(probed, bench.cfg.vocab_size, label))
    checks += one_token(bench, evaluate, base, probed, label)
    checks.append(permuted_future(bench, evaluate, base, label))
    checks.append(swapped_document(bench, evaluate, base, label))
    checks.append(isolated(bench, evaluate, base, label, why_not_apart))
    return checks


def ledger_refusal(tape: Tape, label: str) -> list[Check]:
    """C3 of an evaluation that was stopped, as far as it went."""
    early = f"{tape.learnt_too_early:,} targets learnt from before their score, up to where the program stopped"
    return [verdict_of(f"C3 score before update ({label})", tape.learnt_too_early == 0, early)]


def across_documents(subject: Subject) -> str:
    """Why documents depend on one another in the packed forward; '' when attention stays inside them."""
    apart = subject.program.LOADERS[subject.cfg.loader].documents
    return "" if apart else f"LOADER={subject.cfg.loader} reads across documents"


# Why documents may depend on one another in the final evaluation, '' when they may not; not listed: as packed.
NOT_APART: dict[str, Callable[[Subject], str]] = {
    "chunk_sgd": lambda s: "weights adapt over the stream",
    "slot": lambda s: "weights adapt over the stream",
    "phased_lora": lambda s: "weights adapt on documents already scored",
    "doc_lora": lambda s: "adapters go on from the document before" if s.cfg.ttt_warm_start_a else "",
}
CHUNKS_NEEDED = {"chunk_sgd": 2, "slot": 2}


def legality(subject: Subject, val: Any, probes: int) -> list[Check]:
    """C1 to C4 of the final evaluator and of the packed forward that training and the earlier stages use."""
    bench = Bench(subject, val)
    checks = examine(
        bench,
        bench.final,
        f"EVAL={subject.cfg.eval}",
        probes,
        NOT_APART.get(subject.cfg.eval, across_documents)(subject),
    )
    if bench.packed not in (None, bench.final):
        checks += examine(bench, bench.packed, "packed forward", 1, across_documents(subject), sums=False)
    return checks


# +---------------------------------------------------------------------------+
# | BYTES AND SPLIT                                                           |
# +---------------------------------------------------------------------------+


class Pieces(NamedTuple):
    """What each id of a tokenizer stands for, by a count that shares nothing with the program's: see own_bytes."""

    bytes: np.ndarray
    space: np.ndarray
    control: np.ndarray
    operator: np.ndarray
    escape: np.ndarray


def read_pieces(processor: spm.SentencePieceProcessor) -> Pieces:
    """Per id: UTF-8 bytes without a leading space and without case operators; whether it begins with a space, is a
    control id, consists of operators alone, ends in the escape."""
    size = processor.vocab_size()
    texts = [
        "" if processor.is_control(i) or processor.is_unknown(i) else processor.id_to_piece(i) for i in range(size)
    ]
    caseops = processor.piece_to_id(OPERATORS[0]) != processor.unk_id()
    strip = str.maketrans(dict.fromkeys(OPERATORS)) if caseops else {}
    bare = [t.replace("\u2581", " ").translate(strip) for t in texts]
    is_byte = [processor.is_byte(i) for i in range(size)]
    own = [
        1 if b else len(t.removeprefix(" ").encode("utf-8", "surrogatepass"))
        for t, b in zip(bare, is_byte, strict=True)
    ]
    return Pieces(
        np.array(own),
        np.array([t.startswith(" ") for t in bare]),
        np.array([not t for t in texts]),
        np.array([bool(t) and caseops and not b for t, b in zip(texts, bare, strict=True)]),
        np.array([caseops and t.endswith(ESC) for t in texts]),
    )


def own_bytes(pieces: Pieces, ids: np.ndarray) -> np.ndarray:
    """Bytes that each id of a stream adds to the text, (N,) int64; a space after a control id is no text."""
    after_control = np.concatenate(([True], pieces.control[ids[:-1]]))
    return pieces.bytes[ids] + (pieces.space[ids] & ~after_control)


def decoded_bytes(processor: spm.SentencePieceProcessor, ids: np.ndarray, bos: int) -> tuple[int, int]:
    """UTF-8 bytes of all documents, decoded; and how many have case operators that do not decode."""
    total = broken = 0
    strip = str.maketrans(dict.fromkeys(OPERATORS))
    caseops = processor.piece_to_id(OPERATORS[0]) != processor.unk_id()
    starts = np.flatnonzero(ids == bos)
    for row in np.split(ids, starts):
        text = processor.decode(row[row != bos].tolist())
        try:
            text = decode(text) if caseops else text
        except CaseOpsError:
            broken, text = broken + 1, text.translate(strip)
        total += len(text.encode("utf-8", "surrogatepass"))
    return total, broken


def byte_checks(subject: Subject, val: Any) -> list[Check]:
    """The denominator that the evaluator uses, against a count from the ids alone."""
    if subject.data is None:
        return [Check("bytes", NOT_ASKED, "no data (give --data): scored on seeded tokens")]
    tokenizer = subject.program.find_tokenizer(subject.cfg)
    total, targets = int(val.bytes[1:].sum()), len(val.tokens) - 1
    known = CANONICAL.get((total, targets)) or CANONICAL.get((total, 0))
    checks = [
        verdict_of(
            "bytes total",
            total not in INVALID_TOTALS,
            f"{total:,} bytes for {targets:,} targets: {known or 'no canonical total'}",
        )
    ]
    if tokenizer is None:
        return [*checks, Check("bytes per word", UNKNOWN, "no tokenizer: the sidecar cannot be checked")]
    processor = spm.SentencePieceProcessor(model_file=str(tokenizer))
    pieces, ids, counted = read_pieces(processor), val.tokens, val.bytes.astype(np.int64)
    word = np.cumsum(pieces.space[ids] | pieces.control[ids])  # a character of several pieces may be counted on any
    difference = np.bincount(word, counted - own_bytes(pieces, ids)).astype(np.int64)
    escaped = np.bincount(word, pieces.escape[ids]) > 0  # an operator that was in the text itself
    control, operator = int(counted[pieces.control[ids]].sum()), int(counted[pieces.operator[ids]].sum())
    checks.append(
        verdict_of(
            "bytes of control ids", control == 0, f"{control:,} bytes on {int(pieces.control[ids].sum()):,} tokens"
        )
    )
    seen = int(pieces.operator[ids].sum())
    checks.append(verdict_of("bytes of case operators", operator == 0, f"{operator:,} bytes on {seen:,} tokens"))
    sidecar = bool(subject.program.list_shards(str(subject.data), "val_bytes"))
    wrong, wider = int(((difference < 0) & ~escaped).sum()), int(((difference > 0) & ~escaped).sum())
    words = int(word[-1]) + 1
    good = wrong <= FOLDED_ALLOWED * words and wider <= 0.5 * words if sidecar else wrong + wider == 0
    detail = f"{'sidecar' if sidecar else 'tokenizer table'}: of {words:,} words {wrong:,} have fewer bytes than their "
    detail += f"text, {wider:,} more (white space that was folded)"
    checks.append(verdict_of("bytes per word", good, detail))
    text, broken = decoded_bytes(processor, ids, subject.program.BOS_ID)
    good = abs(int(counted.sum()) - text) <= (SIDECAR_SLACK * text if sidecar else 0)
    checks.append(
        verdict_of(
            "bytes of the decoded text",
            good,
            f"counted {int(counted.sum()):,}, decoded {text:,}"
            + (f", {broken} documents do not decode" if broken else ""),
        )
    )
    return checks


def document_hashes(paths: list[Path], program: Any) -> Iterator[bytes]:
    """A hash of each document of some shards, in order; a document may run on into the next shard."""
    tail = np.empty(0, np.uint16)
    for path in paths:
        ids = np.concatenate([tail, program.read_shard(path)])
        starts = np.flatnonzero(ids == program.BOS_ID)
        for a, b in zip(starts, starts[1:], strict=False):
            yield hashlib.blake2b(ids[a:b].tobytes(), digest_size=12).digest()
        tail = ids[starts[-1] :] if len(starts) else ids
    if len(tail):
        yield hashlib.blake2b(tail.tobytes(), digest_size=12).digest()


def split_check(subject: Subject) -> Check:
    """Documents of validation that training holds too."""
    if subject.data is None:
        return Check("split", NOT_ASKED, "no data")
    if not list(subject.data.glob("fineweb_train_*.bin")):
        return Check("split", UNKNOWN, f"{subject.data.name} has no training shards")
    shards = [subject.program.list_shards(str(subject.data), kind) for kind in ("val", "train")]
    val = list(document_hashes(shards[0], subject.program))
    wanted, shared, count = set(val), set(), 0
    for digest in document_hashes(shards[1], subject.program):
        count += 1
        if digest in wanted:
            shared.add(digest)
    both = sum(digest in shared for digest in val)
    detail = f"{both:,} of {len(val):,} validation documents are in training ({count:,} documents)"
    return verdict_of("split", both <= OVERLAP_ALLOWED * len(val), detail)


# +---------------------------------------------------------------------------+
# | BUDGET, DISK, CLAIMS                                                      |
# +---------------------------------------------------------------------------+


def log_of(subject: Subject) -> str:
    """Text of the run's log, or ''."""
    path = subject.folder / "log.txt" if subject.folder else None
    return path.read_text(encoding="utf-8", errors="replace") if path and path.is_file() else ""


def logged_result(log: str) -> dict[str, Any]:
    """The last `RESULT {json}` of a log, or {}."""
    lines = [line for line in log.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1].removeprefix("RESULT ")) if lines else {}


def budget_checks(subject: Subject) -> list[Check]:
    """600 s each for training with its Hessians and for scoring, from result.json, and the log's word on the first."""
    result, checks = subject.result, []
    if subject.kind != "run":
        return [Check("budget", NOT_ASKED, f"{subject.kind}: no clock in it; judge its run folder")]
    for name, key in (("budget training", "train_seconds"), ("budget evaluation", "eval_seconds")):
        seconds = result.get(key)
        if not isinstance(seconds, int | float):
            checks.append(Check(name, UNKNOWN, f"result.json has no {key}"))
        elif name == "budget training" and subject.cfg.max_wallclock_seconds == 0:
            checks.append(Check(name, NOT_ASKED, f"{seconds:.1f} s, by steps (MAX_WALLCLOCK_SECONDS=0)"))
        else:
            checks.append(verdict_of(name, seconds <= BUDGET_SECONDS, f"{seconds:.1f} of {BUDGET_SECONDS:.0f} s"))
    log = log_of(subject)
    stop = re.search(r"training stopped at step \d+ after ([\d.]+) s", log)
    hessians = re.search(r"calibration: \d+ Hessians, ([\d.]+) s", log)
    if stop and hessians and isinstance(result.get("train_seconds"), int | float):
        told = float(stop[1]) + float(hessians[1])
        detail = f"log {stop[1]} + {hessians[1]} s, result.json {result['train_seconds']:.1f} s"
        checks.append(verdict_of("budget as logged", told <= float(result["train_seconds"]) + 0.5, detail))
    return checks


def disk_checks(subject: Subject) -> list[Check]:
    """Real bytes of the submitted files against the cap, and against what result.json and submission.json count."""
    if not subject.files:
        if subject.result.get("artifact"):
            return [Check("disk", FAIL, f"result.json counts {subject.result['artifact']}, which is not shipped")]
        return [Check("disk", NOT_ASKED, "nothing packed here")]
    total = sum(f.stat().st_size for f in subject.files)
    names = " + ".join(f.name for f in subject.files)
    checks = [verdict_of("disk cap", total <= CAP_BYTES, f"{names}: {total:,} of {CAP_BYTES:,} bytes")]
    claimed = subject.result.get("bytes_total")
    if isinstance(claimed, int):
        checks.append(
            verdict_of("disk as counted", claimed == total, f"{total:,} bytes on disk, result.json counts {claimed:,}")
        )
    digest = subject.result.get("artifact_sha256")
    if digest and len(subject.files) == 1:
        found = hashlib.sha256(subject.files[0].read_bytes()).hexdigest()
        checks.append(
            verdict_of("disk as packed", found == digest, f"sha256 {found[:16]}, result.json {str(digest)[:16]}")
        )
    return checks


class Claim(NamedTuple):
    """A sentence that papers make: how to recognise it, and whether the knobs bear it out."""

    words: str
    holds: Callable[[Any, re.Match[str]], bool]
    otherwise: str


CLAIMS = (
    Claim(
        r"BOS[- ](?:fix|mask)|mask\w* at document starts|with the document mask",
        lambda c, m: "smear" not in c.embed_extras or c.smear_bos_mask,
        "SMEAR_BOS_MASK=0",
    ),
    Claim(
        r"adapters? per document \(rank (\d+)",
        lambda c, m: c.ttt_lora_rank == int(m[1]),
        "TTT_LORA_RANK={c.ttt_lora_rank}",
    ),
    Claim(r"int(\d) matrices", lambda c, m: c.matrix_bits == int(m[1]), "MATRIX_BITS={c.matrix_bits}"),
    Claim(r"int(\d) embedding", lambda c, m: c.embed_bits == int(m[1]), "EMBED_BITS={c.embed_bits}"),
    Claim(r"per-group lrzip", lambda c, m: c.compressor == "pergroup", "COMPRESSOR={c.compressor}"),
    Claim(
        r"nothing carried from one\s+document to another",
        lambda c, m: {"doc_lora": not c.ttt_warm_start_a}.get(c.eval, False),
        "EVAL={c.eval}, TTT_WARM_START_A={c.ttt_warm_start_a:d}",
    ),
    Claim(r"A warm-started", lambda c, m: c.ttt_warm_start_a, "TTT_WARM_START_A=0"),
)
COMPLIANCE: dict[str, Callable[[Subject, Any], bool]] = {
    "artifact_under_16mb": lambda s, c: sum(f.stat().st_size for f in s.files) <= CAP_BYTES,
    "train_under_600s_strict": lambda s, c: s.result.get("train_seconds", 0) <= BUDGET_SECONDS,
    "eval_under_600s": lambda s, c: s.result.get("eval_seconds", 0) <= BUDGET_SECONDS,
    "score_before_update": lambda s, c: s.result.get("legal", True) is True,
    "no_slot": lambda s, c: {"slot": False}.get(c.eval, True),
}


def read_submission(folder: Path) -> dict[str, Any]:
    """submission.json of a folder, or {}; UserError when it is broken."""
    path = folder / "submission.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no object")
    return found


def claim_checks(subject: Subject) -> list[Check]:
    """README and submission.json against the knobs, the log against result.json and record.env."""
    if subject.folder is None:
        return [Check("claims", NOT_ASKED, "an artifact alone claims nothing")]
    readme, cfg = subject.folder / "README.md", subject.cfg
    submission = read_submission(subject.folder)
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    text = (
        text.split("## Departures")[0]
        + " "
        + " ".join(str(submission.get(k, "")) for k in ("name", "blurb", "technique_summary"))
    )
    found = [(claim, m) for claim in CLAIMS for m in re.finditer(claim.words, text, re.IGNORECASE)]
    wrong = [f"says '{m[0]}', but {claim.otherwise.format(c=cfg)}" for claim, m in found if not claim.holds(cfg, m)]
    checks = [
        verdict_of("claims in words", not wrong, "; ".join(wrong) or f"{len(found)} sentences agree with the knobs")
    ]
    said = {k: v for k, v in (submission.get("compliance") or {}).items() if k in COMPLIANCE and v is True}
    false = [k for k in said if not COMPLIANCE[k](subject, cfg)]
    if said:
        checks.append(verdict_of("claims of compliance", not false, ", ".join(false) or f"{len(said)} hold"))
    checks += seed_checks(submission) + log_checks(subject)
    return checks


def seed_checks(submission: dict[str, Any]) -> list[Check]:
    """submission.json against itself: the mean is that of its seeds, the seeds are those that it lists."""
    seeds = submission.get("seed_results") or {}
    if not seeds:
        return []
    scores = [row["val_bpb"] for row in seeds.values()]
    mean = sum(scores) / len(scores)
    good = math.isclose(mean, submission.get("val_bpb") or 0, abs_tol=5e-6)
    listed = sorted(map(str, submission.get("seeds", []))) == sorted(seeds)
    largest = max(row.get("artifact_bytes") or 0 for row in seeds.values())
    checks = [
        verdict_of(
            "claims of the score",
            good and listed,
            f"val_bpb {submission.get('val_bpb')}, mean of {len(scores)} seeds {mean:.8f}",
        )
    ]
    if largest:
        good = largest == submission.get("bytes_total") and largest <= CAP_BYTES
        detail = f"bytes_total {submission.get('bytes_total')}, largest seed {largest}"
        checks.append(verdict_of("claims of the size", good, detail))
    return checks


def log_checks(subject: Subject) -> list[Check]:
    """The log is of this configuration and of this result."""
    log = log_of(subject)
    if not log:
        return []
    result, checks = logged_result(log), []
    keys = [k for k in ("val_loss", "val_bpb", "seed", "tokens_scored", "bytes_scored") if k in result]
    wrong = [k for k in keys if result[k] != subject.result.get(k)]
    checks.append(
        verdict_of("log and result", not wrong and bool(keys), ", ".join(wrong) or f"{len(keys)} values agree")
    )
    block = log.rpartition("knobs that are not default:")[2].split("\nparameters")[0]
    logged = dict(re.findall(r"^  ([A-Z0-9_]+)=(.*?)  \(", block, re.MULTILINE))
    local = {name.upper() for name in subject.program.LOCAL_KNOBS}
    stored = dict(line.split("=", 1) for line in subject.program.record_env(subject.cfg).splitlines())
    wrong = sorted(k for k in (logged.keys() | stored.keys()) - local if logged.get(k) != stored.get(k))
    checks.append(verdict_of("log and record.env", not wrong, ", ".join(wrong) or f"{len(stored)} knobs agree"))
    return checks


# +---------------------------------------------------------------------------+
# | SUBJECTS                                                                  |
# +---------------------------------------------------------------------------+


def toy_documents(folder: Path, vocab: int) -> Path:
    """CaseOps shards, sidecar and tokenizer of short documents that Python itself carries."""
    pieces = {
        p.strip() for _, topic in sorted(TOPICS.items()) for p in topic.split("\n\n\n") if 250 < len(p.strip()) < 700
    }
    lines = [json.dumps({"text": text}) for text in sorted(pieces, key=lambda t: hashlib.md5(t.encode()).digest())]
    (folder / "docs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    argv = [
        "--docs",
        str(folder / "docs.jsonl"),
        "--caseops",
        "--out",
        str(folder / "shards"),
        "--vocab-size",
        str(vocab),
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as complaint:
        if prepare.main([*argv, "--val-docs", "7", "--jobs", "1"]) != 0:
            raise UserError(f"no toy data: {complaint.getvalue().strip()}")
    return folder / "shards"


def write_toy_data(folder: Path, vocab: int, tokens: int) -> Path:
    """Shards of seeded documents for training and validation, with a byte sidecar, so that no tokenizer is needed."""
    rng = np.random.Generator(np.random.PCG64(vocab))
    lengths = rng.integers(20, 110, size=tokens // 20)
    lengths = lengths[: 1 + int(np.searchsorted(np.cumsum(lengths), tokens))]
    ids = rng.integers(4, vocab, size=int(lengths.sum()))
    repeated = rng.random(len(ids)) < 0.5  # something to learn
    ids[1:][repeated[1:]] = ids[:-1][repeated[1:]]
    ids[np.concatenate(([0], np.cumsum(lengths)[:-1]))] = 1
    folder.mkdir()
    for kind, values in (("train", ids), ("val", ids), ("val_bytes", np.where(ids == 1, 0, 3))):
        data = prepare.shard_header(len(values)) + values.astype("<u2").tobytes()
        (folder / f"fineweb_{kind}_000000.bin").write_bytes(data)
    return folder


def vocabulary(program: Any, data: Path) -> int:
    """Pieces of the tokenizer of some shards."""
    tokenizer = program.find_tokenizer(program.Config(data_path=str(data)))
    if tokenizer is None:
        raise UserError(f"{data} has no tokenizer; a record is judged on shards with their *.model")
    return spm.SentencePieceProcessor(model_file=str(tokenizer)).vocab_size()


def toy_config(program: Any, values: dict[str, str], data: Path, **others: str) -> Any:
    """The record's configuration with the numbers of a toy; its own depth where its lists of layers need it."""
    knobs = {f.name.upper() for f in dataclasses.fields(program.Config)}
    problems = ""
    for numbers in (TOY | TOY_DEPTH, TOY):
        small = (
            values
            | {k: v for k, v in (numbers | others).items() if k in knobs}
            | {"DEVICE": "cpu", "DATA_PATH": str(data)}
        )
        try:
            return program.load_config(small)
        except program.UserError as error:
            problems = str(error)
    raise UserError(f"the preset has no toy size: {problems}".replace("\n", "; "))


def shrink(record: Path, source: Path, room: Path, given: Path | None) -> Subject:
    """A record, as a toy: its own knobs but for the numbers, a few steps of training, its own quantiser and coder."""
    program = pack_artifact.load_program(source, "judged")
    values = program.read_preset(str(record))
    notes = []
    full = program.load_config({"PRESET": str(record)})  # a wrong record is refused before any work
    data = given or toy_documents(room, TOY_VOCAB)
    numbers = {"VOCAB_SIZE": str(vocabulary(program, data))}
    cfg = toy_config(program, values, data, **numbers)
    try:
        program.CODECS[cfg.compressor].need()
    except program.UserError as error:
        notes.append(f"COMPRESSOR=brotli in place of {cfg.compressor}: {error}")
        cfg = toy_config(program, values, data, **numbers, COMPRESSOR="brotli")
    folder = room / "run"
    folder.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        run = program.Run(cfg, program.Runtime.start(cfg, {}, folder / "log.txt"), str(record), folder)
        run.train()
        run.quantize()
    subject = Subject(
        "preset", record.name, program, source, cfg, folder / "model.bin", record, {}, [], data, "toy", notes
    )
    subject.result = {"claimed": full}
    return subject


def data_of(given: Path | None, log: str) -> Path | None:
    """--data, else DATA_PATH, else the directory that the run's log names, when it is there."""
    named = re.findall(r"^  DATA_PATH=(.*?)  \(", log, re.MULTILINE)
    options = [given, *(Path(p) for p in (os.environ.get("DATA_PATH"), *named[-1:]) if p)]
    return next((p for p in options if p is not None and p.is_dir()), None)


def with_data(subject: Subject, values: dict[str, str], room: Path) -> Subject:
    """The subject with its configuration for its data; seeded tokens where it has none."""
    where = subject.data
    if where is None:
        cfg = subject.program.load_config(values)
        where = write_toy_data(room / "seeded", cfg.vocab_size, cfg.eval_seq_len + 600)
        subject.notes.append("no data was given: judged on seeded tokens")
    tokenizer = {"TOKENIZER_PATH": os.environ["TOKENIZER_PATH"]} if os.environ.get("TOKENIZER_PATH") else {}
    device = {"DEVICE": os.environ["DEVICE"]} if os.environ.get("DEVICE") else {}
    subject.cfg = subject.program.load_config(values | tokenizer | device | {"DATA_PATH": str(where)})
    return subject


def open_run(folder: Path, source: Path, room: Path, given: Path | None) -> Subject:
    """A run folder: its weights with the program beside this tool (a note says when that has changed since)."""
    program, result = pack_artifact.load_program(source, "judged"), pack_artifact.read_result(folder)
    values = program.read_preset(str(folder))
    artifact = folder / str(result.get("artifact") or "artifact.pyz")
    files = pack_artifact.artifact_files(artifact) if artifact.exists() else []
    notes = []
    if result.get("source_sha256") != hashlib.sha256(source.read_bytes()).hexdigest():
        notes.append(f"{source.name} has changed since this run")
    log = (folder / "log.txt").read_text(encoding="utf-8") if (folder / "log.txt").is_file() else ""
    subject = Subject(
        "run",
        folder.name,
        program,
        source,
        None,
        folder / "model.bin",
        folder,
        result,
        files,
        data_of(given, log),
        "full",
        notes,
    )
    return with_data(subject, values, room)


def open_artifact(path: Path, room: Path, given: Path | None) -> Subject:
    """A packed file: judged by the program inside it, which is imported from a temporary folder."""
    parts = pack_artifact.read_packed(path)
    for name, data in (("train_gpt.py", parts.source), ("record.env", parts.config), ("model.bin", parts.weights)):
        (room / name).write_bytes(data)
    program = pack_artifact.load_program(room / "train_gpt.py", "judged")
    if parts.tokenizer:
        (room / "tokenizer.model").write_bytes(parts.tokenizer)
    values = program.read_preset(str(room))
    if parts.tokenizer:
        values["TOKENIZER_PATH"] = str(room / "tokenizer.model")
    files = pack_artifact.artifact_files(path)
    subject = Subject(
        "artifact",
        path.name,
        program,
        room / "train_gpt.py",
        None,
        room / "model.bin",
        None,
        {},
        files,
        data_of(given, ""),
    )
    return with_data(subject, values, room)


def open_subject(args: argparse.Namespace, room: Path) -> Subject:
    """What the command line names. UserError when it is none of the three."""
    target = args.target
    if target.is_dir() and (target / "model.bin").is_file() and (target / "result.json").is_file():
        return open_run(target, args.source, room, args.data)
    if target.is_dir() and (target / "record.env").is_file():
        return shrink(target, args.source, room, args.data)
    if target.is_file() or (target / "train_gpt.py").is_file():
        return open_artifact(target, room, args.data)
    raise UserError(
        f"{target} is no record folder (record.env), no run folder (result.json, model.bin) and no artifact"
    )


# +---------------------------------------------------------------------------+
# | VERDICT                                                                   |
# +---------------------------------------------------------------------------+


def shortened(subject: Subject, val: Any, documents: int) -> Any:
    """The first documents of the stream: as many as asked for, but at least what two steps of adaptation need."""
    program, cfg = subject.program, subject.cfg
    least = CHUNKS_NEEDED.get(cfg.eval, 0) * getattr(cfg, "ttt_chunk_tokens", 0) + 1
    docs = program.val_documents(val.tokens)
    ends = [start + length for start, length in docs]
    enough = next((e for e in ends[documents - 1 :] if e > least), len(val.tokens)) if documents else len(val.tokens)
    return program.ValData(val.tokens[:enough], val.bytes[:enough])


def judge(subject: Subject, documents: int, probes: int) -> list[Check]:
    """All checks of a subject."""
    val = subject.program.load_val(subject.cfg)
    checks = legality(subject, shortened(subject, val, documents), probes)
    checks += byte_checks(subject, val)
    checks.append(split_check(subject))
    if subject.kind == "preset":  # papers speak of the full size
        subject = dataclasses.replace(subject, cfg=subject.result["claimed"], result={})
    return [*checks, *budget_checks(subject), *disk_checks(subject), *claim_checks(subject)]


def summary(subject: Subject, checks: list[Check]) -> dict[str, Any]:
    """The verdict as JSON: legal is true, false, or null when a question stayed open."""
    states = [c.status for c in checks]
    legal = False if FAIL in states else (None if UNKNOWN in states else True)
    record = subject.folder / "record.env" if subject.folder else None
    return {
        "target": subject.name,
        "kind": subject.kind,
        "scale": subject.scale,
        "legal": legal,
        "counts": {s: states.count(s) for s in (PASS, FAIL, UNKNOWN, NOT_ASKED)},
        "record_sha256": hashlib.sha256(record.read_bytes()).hexdigest() if record and record.is_file() else None,
        "notes": subject.notes,
        "checks": [c._asdict() for c in checks],
    }


def print_verdict(verdict: dict[str, Any]) -> None:
    """The readable table."""
    for note in verdict["notes"]:
        print(f"note: {note}")
    rows = [(c["name"], c["status"], c["detail"]) for c in verdict["checks"]]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    for name, status, detail in rows:
        print(f"  {name.ljust(widths[0])}  {status.ljust(widths[1])}  {detail}")
    word = {True: "legal, as far as it was asked", False: "NOT legal", None: "undecided"}[verdict["legal"]]
    counts = ", ".join(f"{n} {s}" for s, n in verdict["counts"].items() if n)
    print(f"{verdict['target']} ({verdict['kind']}, {verdict['scale']} size): {word} ({counts})")


def command_line() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, nargs="?", metavar="TARGET", help="record folder, run folder, packed file")
    parser.add_argument("--all", action="store_true", help="judge every record of every track, writing verdict.json")
    parser.add_argument("--data", type=Path, metavar="DATA_PATH", help="shards (default: DATA_PATH, or the log's)")
    parser.add_argument("--source", type=Path, default=ROOT / "train_gpt.py", help="program (default: the one here)")
    parser.add_argument(
        "--documents",
        type=int,
        default=12,
        metavar="N",
        help="documents of the stream for C1 to C4; 0: all (default %(default)s)",
    )
    parser.add_argument("--probes", type=int, default=3, metavar="N", help="changed tokens (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the verdict there too (records: verdict.json)")
    return parser


def judge_target(args: argparse.Namespace) -> int:
    """Judge what the command line names and print the verdict: 0 legal, 1 not, 2 a wrong input."""
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="verify_") as name:
            subject = open_subject(args, Path(name))
            verdict = summary(subject, judge(subject, args.documents, args.probes))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ValueError as error:  # the judged program has a UserError of its own
        if type(error).__name__ != UserError.__name__:
            raise
        print(f"error: {error}".replace("\n", "; "), file=sys.stderr)
        return 2
    print_verdict(verdict)
    if args.out:
        atomic_write(args.out, json.dumps(verdict, indent=1).encode() + b"\n")
    print("VERDICT " + json.dumps(verdict | {"seconds": round(time.perf_counter() - started, 1)}), flush=True)
    return 0 if verdict["legal"] else 1


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status, with --all the worst."""
    parser = command_line()
    args = parser.parse_args(argv)
    if args.all == (args.target is not None):
        parser.error("give one record folder, run folder or packed file, or --all")
    if not args.all:
        return judge_target(args)
    worst = 0
    for path in sorted((ROOT / "records").glob("track_*/*/record.env")):
        args.target, args.out = path.parent, path.with_name("verdict.json")
        worst = max(worst, judge_target(args))
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
