#!/usr/bin/env python3
"""The judge: is a score legal, and do its size, its byte count and its claims hold?

    python records/verify.py records/track_10min_16mb/<record>              a preset, trained at toy size first
    python records/verify.py logs/<RUN_ID> [--data DATA_PATH]               a finished run
    python records/verify.py logs/<RUN_ID>/artifact.pyz --data DATA_PATH    a packed file, judged by its own program
    python records/verify.py --all                                          every record; writes each verdict.json

The questions (C1 to C4 are the contest's conditions, issue 1017):
  C1  Does a score depend only on the artifact and on what was scored before? The real evaluator runs again on changed
      tokens: one token, a permuted future, another document. Scores before the change must be equal to the last bit,
      through adaptation, phases, smear and packing. "Before" follows the order of scoring, which the judge records
      itself: an earlier unit, or a position further left in the same unit and document.
  C2  Is every target scored by a distribution? With state and context held, each id of the vocabulary is scored as the
      target; the probabilities must sum to 1, and a changed token must get the score predicted for it.
  C3  Is every target scored before anything learns from it, and C4, is each scored exactly once? The judge counts.
  bytes: the denominator again from the ids, through tokenizer and CaseOps decoder. split: documents that training and
  validation share. budget: 600 s to train with Hessians, 600 s to score. disk: the files' real size against the cap and
  the claimed size. claims: README and submission.json against knobs, log and result.

Verdict per check: pass, FAIL, n/a (nothing to ask), unknown (asked, not answered). The last line of the output is
`VERDICT {json}`. Exit status: 0 if nothing failed or stayed unknown, 1 otherwise, 2 for a wrong input. One process
judges, on a GPU if there is one; --documents limits how much of the validation stream it uses.
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

import prepare  # noqa: E402  (data/ is not a package)
from caseops import ESC, OPERATORS  # noqa: E402

import pack_artifact  # noqa: E402
from pack_artifact import CAP_BYTES  # noqa: E402
from records.papers import read_log  # noqa: E402
from train_gpt import UserError, read_json, read_preset  # noqa: E402

BUDGET_SECONDS = 600.0
SUM_TOLERANCE = 1e-4  # of float32 losses over a whole vocabulary
OVERLAP_ALLOWED = 0.01  # of validation documents: web text repeats some by itself, a leak repeats most
FOLDED_ALLOWED = 0.01  # of words whose text the tokenizer's normalisation may have shortened
SIDECAR_SLACK = 0.08  # what a sidecar knows about folded white space; case operators would add 9 %, double spaces 17 %
PASS, FAIL, NOT_ASKED, UNKNOWN = "pass", "FAIL", "n/a", "unknown"
INVALID_TOTAL = 164_594_398
CANONICAL = {  # (bytes, targets) -> what that denominator is; targets 0: any number
    (151_074_499, 47_851_520): "the canonical CaseOps denominator",
    (151_080_891, 0): "the canonical SP8192 denominator",
    (INVALID_TOTAL, 0): "CaseOps operators counted as bytes: an INVALID denominator",
}
# Depth of the toy preset; a record that lists its layers one by one keeps its own.
DEPTH = ("NUM_LAYERS", "XSA_LAST_N", "NUM_LOOPS", "LOOP_START", "LOOP_END", "PARALLEL_START_LAYER")


class Check(NamedTuple):
    """One question, its answer and the reason."""

    name: str
    status: str
    detail: str


def decide(name: str, good: bool, detail: str) -> Check:
    """Return a check that passed or failed."""
    return Check(name, PASS if good else FAIL, detail)


@dataclasses.dataclass
class Candidate:
    """What is judged: the program that scores, its configuration, the weights, and the papers around them."""

    kind: str  # preset, run or artifact
    name: str
    program: Any
    cfg: Any = None
    blob: Path | None = None
    folder: Path | None = None  # record or run folder
    result: dict[str, Any] = dataclasses.field(default_factory=dict)  # result.json
    files: list[Path] = dataclasses.field(default_factory=list)  # what would be submitted
    data: Path | None = None
    claimed: Any = None  # for a preset, the full-size configuration that its papers describe
    notes: list[str] = dataclasses.field(default_factory=list)


# +---------------------------------------------------------------------------+
# | TRACE: what the real evaluator does, recorded                             |
# +---------------------------------------------------------------------------+


class Trace:
    """Every score of one evaluation in the order of scoring, and the answers to the probes put in between.

    nll, unit, group: per stream position, its loss (float64 holds a float32 exactly), the number of the unit that
    scored it, and the document that the unit's row held (-1 if rows are windows of one stream). alternatives: position
    -> token that is scored there instead, once, from the same state. probed: units whose distributions are summed.
    """

    def __init__(self, length: int, alternatives: dict[int, int] | None = None, probed: tuple[int, ...] = ()) -> None:
        self.nll = np.full(length, math.nan)
        self.count = np.zeros(length, np.int64)
        self.unit = np.full(length, -1)
        self.group = np.full(length, -1)
        self.alternatives, self.probed = alternatives or {}, probed
        self.predicted: dict[int, float] = {}
        self.sums: list[np.ndarray] = []
        self.units, self.learnt_too_early, self.learnt = 0, 0, 0

    @property
    def scored(self) -> np.ndarray:
        """Mask of the positions with a score."""
        return self.count > 0

    def note(self, unit: Any, nll: torch.Tensor) -> None:
        """Record a unit that has been scored."""
        positions = unit.scored()
        np.add.at(self.count, positions, 1)
        self.nll[positions] = nll.detach()[unit.rows, unit.cols].double().cpu().numpy()
        self.unit[positions] = self.units
        if unit.documents is not None:
            self.group[positions] = unit.documents[unit.rows]
        self.units += 1

    def note_learning(self, lesson: Any, unit: Any) -> None:
        """Record a lesson that is about to be learnt."""
        positions = lesson.targets(unit)
        self.learnt += len(positions)
        self.learnt_too_early += int((self.count[positions] == 0).sum())

    def probe(self, learner: Any, unit: Any, vocab: int) -> None:
        """Score the unit with other targets, from the state in which it is about to be scored."""
        cells = {int(p): (r, c) for p, r, c in zip(unit.scored(), unit.rows, unit.cols, strict=True)}
        for position in cells.keys() & self.alternatives.keys():
            targets = unit.targets.copy()
            targets[cells[position]] = self.alternatives[position]
            nll = learner.score(unit._replace(targets=targets)).detach()
            self.predicted[position] = nll[cells[position]].item()
        if self.units not in self.probed:
            return
        total = np.zeros(len(unit.rows))
        for token in range(vocab):
            targets = unit.targets.copy()
            targets[unit.rows, unit.cols] = token
            nll = learner.score(unit._replace(targets=targets)).detach()[unit.rows, unit.cols]
            total += np.exp(-nll.double().cpu().numpy())
        self.sums.append(total)


class TracedLearner:
    """A learner whose every step is recorded in a trace."""

    def __init__(self, learner: Any, trace: Trace, vocab: int) -> None:
        self.learner = learner
        self.trace, self.vocab = trace, vocab

    def __getattr__(self, name: str) -> Any:
        return getattr(self.learner, name)

    def score(self, unit: Any) -> torch.Tensor:
        """Probe, then score."""
        self.trace.probe(self.learner, unit, self.vocab)
        return self.learner.score(unit)

    def learn(self, lesson: Any, unit: Any, nll: torch.Tensor | None) -> None:
        """Record, then learn."""
        self.trace.note_learning(lesson, unit)
        self.learner.learn(lesson, unit, nll)


@contextlib.contextmanager
def traced(program: Any, trace: Trace, vocab: int) -> Iterator[None]:
    """Within this context the program's only scoring loop and its meter write to the trace; nothing else changes."""
    meter, loop = program.ByteMeter, program.score_first

    class TracedMeter(meter):
        def add(self, unit: Any, nll: torch.Tensor) -> None:
            # Record first: the program's own ledger may refuse.
            trace.note(unit, nll)
            super().add(unit, nll)

    program.ByteMeter = TracedMeter
    program.score_first = lambda units, learner, meter: loop(units, TracedLearner(learner, trace, vocab), meter)
    try:
        yield
    finally:
        program.ByteMeter, program.score_first = meter, loop


class Scorer:
    """A candidate's evaluators, ready to run on any stream of tokens."""

    def __init__(self, candidate: Candidate, val: Any) -> None:
        program, cfg = candidate.program, candidate.cfg
        self.program, self.cfg, self.val = program, cfg, val
        runtime = program.Runtime.start(cfg, {})
        self.runtime = dataclasses.replace(runtime, log=program.Log(None, True))
        self.state = program.load_artifact(candidate.blob)
        self.attend = program.choose_attention(cfg, self.runtime)
        self.kernels = program.choose_kernels(cfg, self.runtime)
        self.final = program.EVALS[cfg.eval]
        self.packed = program.EVALS.get("plain") or getattr(program, "evaluate_plain", None)

    def model(self) -> Any:
        """Return a new model with the artifact's weights."""
        model = self.program.GPT(self.cfg, self.attend, self.runtime.dtype, self.kernels).to(self.runtime.device)
        model.set_looping(self.program.loops(self.cfg))
        self.program.fill_model(model, self.state, "the artifact")
        return model

    def run(self, evaluate: Callable[..., Any], tokens: np.ndarray, trace: Trace) -> Any:
        """Return the score of a stream and record the evaluation in the trace."""
        program, cfg = self.program, self.cfg
        val = program.ValData(tokens, self.val.bytes)
        with traced(program, trace, cfg.vocab_size):
            return evaluate(cfg, self.runtime, self.model(), val)

    def trace(self, evaluate: Callable[..., Any], tokens: np.ndarray) -> Trace:
        """Return the trace of an evaluation without probes."""
        trace = Trace(len(tokens))
        self.run(evaluate, tokens, trace)
        return trace


# +---------------------------------------------------------------------------+
# | C1 TO C4                                                                  |
# +---------------------------------------------------------------------------+


def differing(a: Trace, b: Trace, where: np.ndarray) -> np.ndarray:
    """Return the positions in the mask `where` whose scores are not the same bits."""
    ours = a.nll.view(np.int64)
    theirs = b.nll.view(np.int64)
    return np.flatnonzero(where & (ours != theirs))


def may_depend(trace: Trace, t: int) -> np.ndarray:
    """Mask of the positions that may depend on token t: later units, and positions further right beside it."""
    later = trace.unit > trace.unit[t]
    beside = (trace.unit == trace.unit[t]) & (trace.group == trace.group[t])
    right = np.arange(len(trace.nll)) > t
    return later | (beside & right)


def pick_tokens(scorer: Scorer, trace: Trace, count: int) -> dict[int, int]:
    """Pick positions spread over the order of scoring, no document starts; return {position: another token}."""
    tokens, rng = scorer.val.tokens, np.random.Generator(np.random.PCG64(17))
    plain = np.flatnonzero((tokens != scorer.program.BOS_ID) & (trace.count == 1))
    order = plain[np.argsort(trace.unit[plain], kind="stable")]
    chosen = [int(rng.choice(part)) for part in np.array_split(order, count) if len(part)]
    known = np.unique(tokens[plain])
    picked = {}
    for t in chosen:
        others = known[known != tokens[t]]
        picked[t] = int(rng.choice(others))
    return picked


def compare(name: str, base: Trace, other: Trace, fixed: np.ndarray, change: str) -> Check:
    """Pass if the scores in the mask `fixed` are the same bits; unknown if the change had no effect anywhere."""
    if not (np.array_equal(base.unit, other.unit) and np.array_equal(base.group, other.group)):
        return Check(name, FAIL, f"{change}: the order of scoring depends on the tokens themselves")
    wrong, compared = differing(base, other, fixed), int(fixed.sum())
    if len(wrong):
        gap = float(np.abs(base.nll[wrong] - other.nll[wrong]).max())
        where = f"first at position {wrong[0]}, by up to {gap:.2e} nats"
        return Check(name, FAIL, f"{change}: {len(wrong):,} of {compared:,} scores before it changed, {where}")
    if not (reacts := len(differing(base, other, ~fixed & base.scored))):
        return Check(name, UNKNOWN, f"{change}: no score reacts to the change, so nothing was tested")
    return Check(name, PASS, f"{change}: {compared:,} scores before it are bit-equal, {reacts:,} after it react")


def changed_tokens(scorer: Scorer, evaluate: Callable, base: Trace, probed: Trace, label: str) -> Iterator[Check]:
    """C1 with changed tokens; each changed token must also get the score that was predicted for it."""
    for t, token in probed.alternatives.items():
        tokens = scorer.val.tokens.copy()
        tokens[t] = token
        other = scorer.trace(evaluate, tokens)
        fixed = base.scored & ~may_depend(base, t)
        fixed[t] = False
        yield compare(f"C1 token ({label})", base, other, fixed, f"token {t} changed")
        predicted, found = probed.predicted.get(t, math.nan), float(other.nll[t])
        detail = f"position {t}: predicted {predicted:.6f}, scored {found:.6f} nats"
        yield decide(f"C2 own target ({label})", predicted == found, detail)


def permuted_future(scorer: Scorer, evaluate: Callable, base: Trace, label: str) -> Check:
    """C1 with every token permuted that is scored in the second half; document starts keep their places."""
    tokens, rng = scorer.val.tokens.copy(), np.random.Generator(np.random.PCG64(23))
    inside = np.flatnonzero((tokens != scorer.program.BOS_ID) & base.scored)
    order = inside[np.argsort(base.unit[inside], kind="stable")]
    t = int(order[len(order) // 2])
    later = may_depend(base, t)
    later[t] = True
    moved = inside[later[inside]]
    tokens[moved] = rng.permutation(tokens[moved])
    other = scorer.trace(evaluate, tokens)
    return compare(f"C1 future ({label})", base, other, base.scored & ~later, f"{len(moved):,} later tokens permuted")


def swapped_document(scorer: Scorer, evaluate: Callable, base: Trace, label: str) -> Check:
    """C1 with the text of the document scored in the middle replaced by another document's, cut to its length."""
    tokens = scorer.val.tokens.copy()
    docs = [d for d in scorer.program.val_documents(tokens) if d[1] > 2]
    if len(docs) < 2:
        return Check(f"C1 document ({label})", NOT_ASKED, "fewer than two documents")
    first = [int(base.unit[start + 1 : start + length].min()) for start, length in docs]
    order = sorted(range(len(docs)), key=lambda i: (first[i], i))
    victim = order[len(order) // 2]
    donor = order[-1] if order[-1] != victim else order[0]
    (start, length), (donor_start, donor_length) = docs[victim], docs[donor]
    text = tokens[donor_start + 1 : donor_start + donor_length - 1]
    text = text[text != scorer.program.BOS_ID]
    inner = np.arange(start + 1, min(start + length, len(tokens)) - 1)
    tokens[inner] = np.resize(text, len(inner))
    other = scorer.trace(evaluate, tokens)
    free = may_depend(base, int(inner[0]))
    free[inner] = True
    change = f"document {victim} replaced by document {donor}"
    return compare(f"C1 document ({label})", base, other, base.scored & ~free, change)


def isolated_documents(scorer: Scorer, evaluate: Callable, base: Trace, label: str, why_not: str) -> Check:
    """Change the last token of every other document; catches smear gates and attention that read across a start."""
    name = f"documents apart ({label})"
    docs = scorer.program.val_documents(scorer.val.tokens)
    if why_not or len(docs) < 2:
        return Check(name, NOT_ASKED, why_not or "fewer than two documents")
    tokens, fixed = scorer.val.tokens.copy(), np.zeros(len(scorer.val.tokens), bool)
    for i, (start, length) in enumerate(docs):
        last = min(start + length, len(tokens)) - 1
        last -= int(tokens[last] == scorer.program.BOS_ID)
        if i % 2:
            fixed[start + 1 : start + length] = True
        elif last > start:
            tokens[last] = 4 + (tokens[last] - 3) % (scorer.cfg.vocab_size - 4)
    other = scorer.trace(evaluate, tokens)
    return compare(name, base, other, fixed & base.scored, "last tokens of every other document changed")


def ledger_checks(scorer: Scorer, trace: Trace, score: Any, label: str) -> Iterator[Check]:
    """C3 and C4 by the judge's own counts, and the program's sums again."""
    targets, counts = len(scorer.val.tokens) - 1, trace.count[1:]
    twice, never = int((counts > 1).sum()), int((counts == 0).sum())
    early = f"{trace.learnt:,} targets learnt from, {trace.learnt_too_early:,} of them before their score"
    yield decide(f"C3 score before update ({label})", trace.learnt_too_early == 0, early)
    detail = f"{targets:,} targets: {never:,} never scored, {twice:,} more than once; {trace.units:,} units"
    yield decide(f"C4 each target once ({label})", not twice and not never and trace.count[0] == 0, detail)
    loss = float(np.nansum(trace.nll[1:]) / max(1, (counts > 0).sum()))
    size = int(scorer.val.bytes[1:].sum())
    equal = score.tokens == targets and score.bytes == size and math.isclose(loss, score.val_loss, rel_tol=1e-6)
    sums = f"val_loss {score.val_loss:.8f} and {loss:.8f}; {score.tokens:,} tokens, {score.bytes:,} of {size:,} bytes"
    yield decide(f"sums ({label})", equal, sums)
    yield decide(f"C3 the program's word ({label})", bool(score.legal), f"legal: {str(bool(score.legal)).lower()}")


def sum_check(trace: Trace, vocab: int, label: str) -> Check:
    """C2: at each cell of the probed units the probabilities of all ids sum to 1."""
    name = f"C2 sums to 1 ({label})"
    if not trace.sums:
        return Check(name, UNKNOWN, "the evaluator does not score through the program's only loop")
    sums = np.concatenate(trace.sums)
    worst = float(np.abs(sums - 1).max())
    return decide(
        name, worst <= SUM_TOLERANCE, f"{len(sums)} positions, {vocab:,} ids each: off by at most {worst:.1e}"
    )


def examine(
    scorer: Scorer, evaluate: Callable, label: str, probes: int, why_not_apart: str, sums: bool = True
) -> list[Check]:
    """Run C1 to C4 on one evaluator. sums: also sum a unit's distributions, one forward pass for each id."""
    tokens, base = scorer.val.tokens, Trace(len(scorer.val.tokens))
    once = f"C4 each target once ({label})"
    try:
        score = scorer.run(evaluate, tokens, base)
    except scorer.program.LegalityError as error:
        early = f"{base.learnt_too_early:,} targets learnt from before their score, until the program stopped"
        stopped = decide(f"C3 score before update ({label})", base.learnt_too_early == 0, early)
        return [stopped, Check(once, FAIL, f"the program stops: {error}")]
    if not base.units:
        return [Check(once, UNKNOWN, "the evaluator scores without the program's meter")]
    checks = list(ledger_checks(scorer, base, score, label))
    chosen = pick_tokens(scorer, base, probes)
    units = (max(int(base.unit[t]) for t in chosen),) if sums else ()
    probed = Trace(len(tokens), chosen, units)
    scorer.run(evaluate, tokens, probed)
    if len(differing(base, probed, base.scored)):
        # Either asking for a score changed the state, or the scores are not repeatable at all.
        if len(repeated := differing(base, scorer.trace(evaluate, tokens), base.scored)):
            detail = f"{len(repeated):,} scores differ in a second run: bit equality says nothing; judge on a CPU"
            return [*checks, Check(f"C1 repeat ({label})", UNKNOWN, detail)]
        checks.append(Check(f"C3 scoring learns ({label})", FAIL, "asking for a score changes the scores after it"))
    if units:
        checks.append(sum_check(probed, scorer.cfg.vocab_size, label))
    checks += changed_tokens(scorer, evaluate, base, probed, label)
    checks.append(permuted_future(scorer, evaluate, base, label))
    checks.append(swapped_document(scorer, evaluate, base, label))
    checks.append(isolated_documents(scorer, evaluate, base, label, why_not_apart))
    return checks


def across_documents(candidate: Candidate) -> str:
    """Return why documents depend on one another in the packed forward, or '' if attention stays inside them."""
    apart = candidate.program.LOADERS[candidate.cfg.loader].documents
    return "" if apart else f"LOADER={candidate.cfg.loader} reads across documents"


# Why documents may depend on one another in the final evaluation, '' if they may not; others: as in the packed forward.
NOT_APART: dict[str, Callable[[Candidate], str]] = {
    "chunk_sgd": lambda c: "weights adapt over the stream",
    "slot": lambda c: "weights adapt over the stream",
    "phased_lora": lambda c: "weights adapt on documents already scored",
    "doc_lora": lambda c: "adapters continue from the document before" if c.cfg.ttt_warm_start_a else "",
}


def legality(candidate: Candidate, val: Any, probes: int) -> list[Check]:
    """C1 to C4 for the final evaluator, and for the packed forward that training and the earlier stages use."""
    scorer, cfg = Scorer(candidate, val), candidate.cfg
    apart = NOT_APART.get(cfg.eval, across_documents)(candidate)
    checks = examine(scorer, scorer.final, f"EVAL={cfg.eval}", probes, apart)
    if scorer.packed not in (None, scorer.final):
        checks += examine(scorer, scorer.packed, "packed forward", 1, across_documents(candidate), sums=False)
    return checks


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


def byte_checks(candidate: Candidate, val: Any) -> Iterator[Check]:
    """The evaluator's denominator against a count from the ids alone."""
    if candidate.data is None:
        yield Check("bytes", NOT_ASKED, "no data (give --data): scored on seeded tokens")
        return
    total, targets = int(val.bytes[1:].sum()), len(val.tokens) - 1
    known = CANONICAL.get((total, targets)) or CANONICAL.get((total, 0)) or "no canonical total"
    yield decide("bytes total", total != INVALID_TOTAL, f"{total:,} bytes for {targets:,} targets: {known}")
    tokenizer = candidate.program.find_tokenizer(candidate.cfg)
    if tokenizer is None:
        yield Check("bytes per word", UNKNOWN, "no tokenizer: the sidecar cannot be checked")
        return
    processor = spm.SentencePieceProcessor(model_file=str(tokenizer))
    pieces, ids, counted = read_pieces(processor), val.tokens, val.bytes.astype(np.int64)
    for name, mask in (("control ids", pieces.control[ids]), ("case operators", pieces.operator[ids])):
        size = int(counted[mask].sum())
        yield decide(f"bytes of {name}", size == 0, f"{size:,} bytes on {int(mask.sum()):,} tokens")
    # By word, because a character of several pieces may be counted on any of them.
    word = np.cumsum(pieces.space[ids] | pieces.control[ids])
    # A space after a control id is not text: the decoder drops it.
    after_control = np.concatenate(([True], pieces.control[ids[:-1]]))
    own = pieces.bytes[ids] + (pieces.space[ids] & ~after_control)
    difference = np.bincount(word, counted - own).astype(np.int64)
    # An escape means that the text itself holds an operator, which then has bytes.
    plain = np.bincount(word, pieces.escape[ids]) == 0
    fewer, more, words = int(((difference < 0) & plain).sum()), int(((difference > 0) & plain).sum()), int(word[-1]) + 1
    sidecar = bool(candidate.program.list_shards(str(candidate.data), "val_bytes"))
    good = fewer <= FOLDED_ALLOWED * words and more <= 0.5 * words if sidecar else fewer + more == 0
    source = "sidecar" if sidecar else "tokenizer table"
    detail = (
        f"{source}: of {words:,} words {fewer:,} have fewer bytes than their text, {more:,} more (folded white space)"
    )
    yield decide("bytes per word", good, detail)
    total, (text, broken) = int(counted.sum()), prepare.decode_documents(processor, ids, pieces.caseops)
    detail = f"counted {total:,}, decoded {text:,}" + (f", {broken} documents do not decode" if broken else "")
    yield decide("bytes of the decoded text", abs(total - text) <= (SIDECAR_SLACK * text if sidecar else 0), detail)


def document_hashes(paths: list[Path], program: Any) -> Iterator[bytes]:
    """Yield a hash of each document in some shards, in order; a document may continue in the next shard."""
    rest = np.empty(0, np.uint16)
    for path in paths:
        ids = np.concatenate([rest, program.read_shard(path)])
        *documents, rest = np.split(ids, np.flatnonzero(ids == program.BOS_ID))
        yield from (hashlib.blake2b(part.tobytes(), digest_size=12).digest() for part in documents if len(part))
    if len(rest):
        yield hashlib.blake2b(rest.tobytes(), digest_size=12).digest()


def split_check(candidate: Candidate) -> Check:
    """Count the validation documents that training holds too."""
    if candidate.data is None:
        return Check("split", NOT_ASKED, "no data")
    if not list(candidate.data.glob("fineweb_train_*.bin")):
        return Check("split", UNKNOWN, f"{candidate.data.name} has no training shards")
    program, folder = candidate.program, str(candidate.data)
    val = list(document_hashes(program.list_shards(folder, "val"), program))
    shared = set(val).intersection(document_hashes(program.list_shards(folder, "train"), program))
    both = sum(digest in shared for digest in val)
    detail = f"{both:,} of {len(val):,} validation documents are in training"
    return decide("split", both <= OVERLAP_ALLOWED * len(val), detail)


# +---------------------------------------------------------------------------+
# | BUDGET, DISK, CLAIMS                                                      |
# +---------------------------------------------------------------------------+


def budget_checks(candidate: Candidate) -> Iterator[Check]:
    """600 s each for training with its Hessians and for scoring: result.json, and the log on training."""
    if candidate.kind != "run":
        yield Check("budget", NOT_ASKED, f"{candidate.kind}: it has no clock; judge its run folder")
        return
    trained = candidate.result.get("train_seconds")
    for name, key in (("budget training", "train_seconds"), ("budget evaluation", "eval_seconds")):
        seconds = candidate.result.get(key)
        if not isinstance(seconds, int | float):
            yield Check(name, UNKNOWN, f"result.json has no {key}")
        elif name == "budget training" and candidate.cfg.max_wallclock_seconds == 0:
            yield Check(name, NOT_ASKED, f"{seconds:.1f} s, by steps (MAX_WALLCLOCK_SECONDS=0)")
        else:
            yield decide(name, seconds <= BUDGET_SECONDS, f"{seconds:.1f} of {BUDGET_SECONDS:.0f} s")
    log = read_log(candidate.folder / "log.txt").text
    stop = re.search(r"training stopped at step \d+ after ([\d.]+) s", log)
    hessians = re.search(r"calibration: ([\d.]+) s", log)
    if stop and hessians and isinstance(trained, int | float):
        detail = f"log {stop[1]} + {hessians[1]} s, result.json {trained:.1f} s"
        yield decide("budget as logged", float(stop[1]) + float(hessians[1]) <= float(trained) + 0.5, detail)


def disk_checks(candidate: Candidate) -> Iterator[Check]:
    """The real bytes of the submitted files against the cap, and against what result.json counts."""
    files, result = candidate.files, candidate.result
    if not files:
        missing = f"result.json counts {result['artifact']}, which is not there" if result.get("artifact") else ""
        yield Check("disk", FAIL if missing else NOT_ASKED, missing or "nothing is packed here")
        return
    total, claimed = sum(file.stat().st_size for file in files), result.get("bytes_total")
    names = " + ".join(file.name for file in files)
    yield decide("disk cap", total <= CAP_BYTES, f"{names}: {total:,} of {CAP_BYTES:,} bytes")
    if isinstance(claimed, int):
        yield decide("disk as counted", claimed == total, f"{total:,} bytes on disk, result.json counts {claimed:,}")
    digest = result.get("artifact_sha256")
    if digest and len(files) == 1:
        found = hashlib.sha256(files[0].read_bytes()).hexdigest()
        yield decide("disk as packed", found == digest, f"sha256 {found[:16]}, result.json {str(digest)[:16]}")


# Sentences in papers: how to recognise one, whether the knobs (c) agree with the match (m), what they say otherwise.
CLAIMS: tuple[tuple[str, Callable[[Any, re.Match[str]], bool], str], ...] = (
    (
        r"BOS[- ](?:fix|mask)|mask\w* at document starts|with the document mask",
        lambda c, m: "smear" not in c.embed_extras or c.smear_bos_mask,
        "SMEAR_BOS_MASK=0",
    ),
    (
        r"nothing carried from one\s+document to another",
        lambda c, m: {"doc_lora": not c.ttt_warm_start_a}.get(c.eval, False),
        "EVAL={c.eval}, TTT_WARM_START_A={c.ttt_warm_start_a:d}",
    ),
    (r"A warm-started", lambda c, m: c.ttt_warm_start_a, "TTT_WARM_START_A=0"),
    (
        r"adapters? per document \(rank (\d+)",
        lambda c, m: c.ttt_lora_rank == int(m[1]),
        "TTT_LORA_RANK={c.ttt_lora_rank}",
    ),
    (r"int(\d) matrices", lambda c, m: c.matrix_bits == int(m[1]), "MATRIX_BITS={c.matrix_bits}"),
    (r"int(\d) embedding", lambda c, m: c.embed_bits == int(m[1]), "EMBED_BITS={c.embed_bits}"),
    (r"per-group lrzip", lambda c, m: c.compressor == "pergroup", "COMPRESSOR={c.compressor}"),
)
COMPLIANCE: dict[str, Callable[[Candidate], bool]] = {
    "artifact_under_16mb": lambda c: sum(file.stat().st_size for file in c.files) <= CAP_BYTES,
    "train_under_600s_strict": lambda c: c.result.get("train_seconds", 0) <= BUDGET_SECONDS,
    "eval_under_600s": lambda c: c.result.get("eval_seconds", 0) <= BUDGET_SECONDS,
    "score_before_update": lambda c: c.result.get("legal", True) is True,
    "no_slot": lambda c: {"slot": False}.get(c.cfg.eval, True),
}


def claim_checks(candidate: Candidate) -> list[Check]:
    """README and submission.json against the knobs, and the log against result.json and record.env."""
    if candidate.folder is None:
        return [Check("claims", NOT_ASKED, "an artifact alone claims nothing")]
    readme, submission = candidate.folder / "README.md", read_json(candidate.folder / "submission.json")
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    # Departures from the published system describe what does not hold here.
    parts = [
        text.split("## Departures")[0],
        *(str(submission.get(k, "")) for k in ("name", "blurb", "technique_summary")),
    ]
    text, cfg = " ".join(parts), candidate.cfg
    found = [(m, holds(cfg, m), said) for words, holds, said in CLAIMS for m in re.finditer(words, text, re.IGNORECASE)]
    wrong = [f"says '{m[0]}', but {said.format(c=cfg)}" for m, holds, said in found if not holds]
    detail = "; ".join(wrong) or f"{len(found)} sentences agree with the knobs"
    checks = [decide("claims in words", not wrong, detail)]
    compliance = submission.get("compliance") or {}
    said = [name for name in COMPLIANCE if compliance.get(name) is True]
    if said:
        false = [name for name in said if not COMPLIANCE[name](candidate)]
        checks.append(decide("claims of compliance", not false, ", ".join(false) or f"{len(said)} hold"))
    return [*checks, *seed_checks(submission), *log_checks(candidate)]


def seed_checks(submission: dict[str, Any]) -> Iterator[Check]:
    """submission.json against itself: its mean is that of its seeds, and it lists the seeds that it has."""
    seeds = submission.get("seed_results") or {}
    if not seeds:
        return
    claimed, size = submission.get("val_bpb"), submission.get("bytes_total")
    mean = sum(row["val_bpb"] for row in seeds.values()) / len(seeds)
    listed = sorted(map(str, submission.get("seeds", []))) == sorted(seeds)
    good = listed and math.isclose(mean, claimed or 0, abs_tol=5e-6)
    yield decide("claims of the score", good, f"val_bpb {claimed}, mean of {len(seeds)} seeds {mean:.8f}")
    largest = max(row.get("artifact_bytes") or 0 for row in seeds.values())
    if largest:
        good = largest == size and largest <= CAP_BYTES
        yield decide("claims of the size", good, f"bytes_total {size}, largest seed {largest}")


def log_checks(candidate: Candidate) -> Iterator[Check]:
    """The log belongs to this configuration and this result."""
    text, knobs, result, *_ = read_log(candidate.folder / "log.txt")
    if not text:
        return
    keys = [key for key in ("val_loss", "val_bpb", "seed", "tokens_scored", "bytes_scored") if key in result]
    wrong = [key for key in keys if result[key] != candidate.result.get(key)]
    detail = ", ".join(wrong) or f"{len(keys)} values agree"
    yield decide("log and result", not wrong and bool(keys), detail)
    stored = dict(line.split("=", 1) for line in candidate.program.record_env(candidate.cfg).splitlines())
    names = (knobs.keys() | stored.keys()) - {name.upper() for name in candidate.program.LOCAL_KNOBS}
    wrong = sorted(name for name in names if knobs.get(name) != stored.get(name))
    yield decide("log and record.env", not wrong, ", ".join(wrong) or f"{len(stored)} knobs agree")


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


def seeded_data(folder: Path, vocab_size: int, count: int) -> Path:
    """Write shards of random documents with a byte sidecar, which need no tokenizer."""
    rng = np.random.Generator(np.random.PCG64(vocab_size))
    starts = np.cumsum(rng.integers(20, 110, size=count // 20))
    ids = rng.integers(4, vocab_size, size=count)
    ids[[0, *starts[starts < count - 1]]] = 1
    folder.mkdir()
    for kind, values in (("train", ids), ("val", ids), ("val_bytes", np.where(ids == 1, 0, 3))):
        prepare.write_shard(folder / f"fineweb_{kind}_000000.bin", values)
    return folder


def toy_config(program: Any, values: dict[str, str], **others: str) -> Any:
    """Return a record's configuration with the numbers of records/toy, keeping its own depth if it must."""
    knobs = {field.name.upper() for field in dataclasses.fields(program.Config)}
    toy = {name: value for name, value in read_preset(str(ROOT / "records" / "toy")).items() if name in knobs}
    for kept in ((), DEPTH):
        small = {name: value for name, value in toy.items() if name not in kept}
        try:
            return program.load_config(values | small | {"DEVICE": "cpu"} | others)
        except program.UserError as error:
            problems = str(error)
    raise UserError(f"the preset has no toy size: {problems}".replace("\n", "; "))


def shrink(record: Path, source: Path, room: Path, given: Path | None) -> Candidate:
    """Train and quantise a record at toy size, with all its own knobs except the numbers."""
    program = pack_artifact.load_program(source, "judged")
    found = Candidate("preset", record.name, program, folder=record)
    found.claimed = program.load_config({"PRESET": str(record)})  # a wrong record is refused before any work
    values = program.read_preset(str(record))
    found.data = given or toy_documents(room, toy_config(program, values).vocab_size)
    tokenizer = program.find_tokenizer(program.Config(data_path=str(found.data)))
    if tokenizer is None:
        raise UserError(f"{found.data} has no tokenizer; a record is judged on shards with their *.model")
    vocab_size = prepare.load_tokenizer(str(tokenizer)).vocab_size()
    own = {"DATA_PATH": str(found.data), "VOCAB_SIZE": str(vocab_size)}
    found.cfg = toy_config(program, values, **own)
    try:
        program.CODECS[found.cfg.compressor].require()
    except program.UserError as error:
        found.notes.append(f"COMPRESSOR=brotli in place of {found.cfg.compressor}: {error}")
        found.cfg = toy_config(program, values, **own, COMPRESSOR="brotli")
    folder = room / "run"
    folder.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        runtime = program.Runtime.start(found.cfg, {}, folder / "log.txt")
        run = program.Run(found.cfg, runtime, str(record), folder)
        run.train()
        run.quantize()
    found.blob = folder / "model.bin"
    return found


def data_of(given: Path | None, logged: str = "") -> Path | None:
    """Return --data, else DATA_PATH, else the directory that the run's log names, if it is there."""
    for name in (str(given or ""), os.environ.get("DATA_PATH"), logged):
        if name and Path(name).is_dir():
            return Path(name)
    return None


def configure(found: Candidate, values: dict[str, str], room: Path) -> Candidate:
    """Set a candidate's configuration from its preset and this machine; seeded tokens replace missing data."""
    data = found.data
    if data is None:
        cfg = found.program.load_config(values)
        data = seeded_data(room / "seeded", cfg.vocab_size, cfg.eval_seq_len + 600)
        found.notes.append("no data was given: judged on seeded tokens")
    here = {name: os.environ[name] for name in ("TOKENIZER_PATH", "DEVICE") if os.environ.get(name)}
    found.cfg = found.program.load_config(values | here | {"DATA_PATH": str(data)})
    return found


def open_run(folder: Path, source: Path, room: Path, given: Path | None) -> Candidate:
    """Open a run folder: its weights, with the program beside this tool."""
    program = pack_artifact.load_program(source, "judged")
    found = Candidate("run", folder.name, program, folder=folder, blob=folder / "model.bin")
    found.result = read_json(folder / "result.json")
    artifact = folder / str(found.result.get("artifact") or "artifact.pyz")
    if artifact.exists():
        found.files = pack_artifact.artifact_files(artifact)
    if found.result.get("source_sha256") != hashlib.sha256(source.read_bytes()).hexdigest():
        found.notes.append(f"{source.name} has changed since this run")
    logged = read_log(folder / "log.txt").knobs
    found.data = data_of(given, logged.get("DATA_PATH", ""))
    return configure(found, program.read_preset(str(folder)), room)


def open_artifact(path: Path, room: Path, given: Path | None) -> Candidate:
    """Open a packed file, to be judged by the program inside it."""
    parts = pack_artifact.read_packed(path)
    for name, data in (("train_gpt.py", parts.source), ("record.env", parts.config), ("model.bin", parts.weights)):
        (room / name).write_bytes(data)
    program = pack_artifact.load_program(room / "train_gpt.py", "judged")
    values = program.read_preset(str(room))
    if parts.tokenizer:
        (room / "tokenizer.model").write_bytes(parts.tokenizer)
        values["TOKENIZER_PATH"] = str(room / "tokenizer.model")
    found = Candidate("artifact", path.name, program, blob=room / "model.bin", data=data_of(given))
    found.files = pack_artifact.artifact_files(path)
    return configure(found, values, room)


def open_candidate(args: argparse.Namespace, room: Path) -> Candidate:
    """Open what the command line names. UserError if it is nothing that can be judged."""
    target = args.target
    if target.is_dir() and (target / "model.bin").is_file() and (target / "result.json").is_file():
        return open_run(target, args.source, room, args.data)
    if target.is_dir() and (target / "record.env").is_file():
        return shrink(target, args.source, room, args.data)
    if target.is_file() or (target / "train_gpt.py").is_file():
        return open_artifact(target, room, args.data)
    raise UserError(f"{target}: give a record folder, a run folder (with result.json and model.bin) or an artifact")


# +---------------------------------------------------------------------------+
# | VERDICT                                                                   |
# +---------------------------------------------------------------------------+


def shortened(candidate: Candidate, val: Any, documents: int) -> Any:
    """Return the first documents of the stream (0: all), at least as many as two steps of adaptation need."""
    cfg = candidate.cfg
    chunks = {"chunk_sgd": 2, "slot": 2}.get(cfg.eval, 0)  # until it has adapted once more
    least = chunks * cfg.ttt_chunk_tokens + 1
    ends = [start + length for start, length in candidate.program.val_documents(val.tokens)]
    stop = next((end for end in ends[documents - 1 :] if end > least), ends[-1])
    return candidate.program.ValData(val.tokens[:stop], val.bytes[:stop])


def judge(candidate: Candidate, documents: int, probes: int) -> list[Check]:
    """Run all checks on a candidate."""
    val = candidate.program.load_val(candidate.cfg)
    checks = legality(candidate, shortened(candidate, val, documents), probes)
    checks += [*byte_checks(candidate, val), split_check(candidate)]
    if candidate.claimed:  # papers describe the full size
        candidate = dataclasses.replace(candidate, cfg=candidate.claimed)
    return [*checks, *budget_checks(candidate), *disk_checks(candidate), *claim_checks(candidate)]


def preset_sha256(folder: Path) -> str:
    """Hash the knobs in a preset, over those of its BASE; comments and the order of lines do not count."""
    return hashlib.sha256(json.dumps(read_preset(str(folder)), sort_keys=True).encode()).hexdigest()


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


def print_verdict(verdict: dict[str, Any]) -> None:
    """Print the verdict as a table."""
    for note in verdict["notes"]:
        print(f"note: {note}")
    names, states = ([check[key] for check in verdict["checks"]] for key in ("name", "status"))
    for check in verdict["checks"]:
        print(f"  {check['name']:{max(map(len, names))}}  {check['status']:{max(map(len, states))}}  {check['detail']}")
    word = {True: "legal, as far as it was asked", False: "NOT legal", None: "undecided"}[verdict["legal"]]
    counts = ", ".join(f"{n} {state}" for state, n in verdict["counts"].items() if n)
    print(f"{verdict['target']} ({verdict['kind']}, {verdict['scale']} size): {word} ({counts})")


def judge_target(args: argparse.Namespace) -> int:
    """Judge what the command line names and print the verdict. Return 0 if legal, 1 if not, 2 for a wrong input."""
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="verify_") as name:
            candidate = open_candidate(args, Path(name))
            verdict = summary(candidate, judge(candidate, args.documents, args.probes))
    except (ValueError, OSError) as error:
        # The judged program has a UserError class of its own; any other ValueError is a bug.
        if not isinstance(error, OSError) and type(error).__name__ != "UserError":
            raise
        print(f"error: {error}".replace("\n", "; "), file=sys.stderr)
        return 2
    print_verdict(verdict)
    if args.out:
        prepare.write_json(args.out, verdict)
    print("VERDICT " + json.dumps(verdict | {"seconds": round(time.perf_counter() - started, 1)}), flush=True)
    return 0 if verdict["legal"] else 1


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status, with --all the worst one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "(default %(default)s)"
    add("target", type=Path, nargs="?", metavar="TARGET", help="record folder, run folder or packed file")
    add("--all", action="store_true", help="judge every record of every track, and write verdict.json")
    add("--data", type=Path, metavar="DATA_PATH", help="shards (default: DATA_PATH, else the log's)")
    add("--source", type=Path, default=ROOT / "train_gpt.py", help="program (default: the one here)")
    add("--documents", type=int, default=12, metavar="N", help=f"documents for C1 to C4; 0: all {default}")
    add("--probes", type=int, default=3, metavar="N", help=f"changed tokens {default}")
    add("--out", type=Path, metavar="FILE", help="also write the verdict there (records: verdict.json)")
    args = parser.parse_args(argv)
    if args.all == (args.target is not None):
        parser.error("give one record folder, run folder or packed file, or --all")
    if not args.all:
        return judge_target(args)
    states = []
    for path in sorted((ROOT / "records").glob("track_*/*/record.env")):
        args.target, args.out = path.parent, path.with_name("verdict.json")
        states.append(judge_target(args))
    return max(states)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
