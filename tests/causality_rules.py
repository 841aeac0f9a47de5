"""Questions to an evaluator from inside the program, with every score in the order of scoring: C1 to C4 in one process.

The judge (records/judge.py) asks the same of whole programs from outside; here models need no training and no run, so
a matrix of evaluators and structures can be asked, and learning is seen as well as scoring.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from records.claims import FAIL, NOT_ASKED, PASS, UNKNOWN, Check, decide

SUM_TOLERANCE = 1e-4  # of float32 losses over a whole vocabulary


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
    """What is examined: a program, a configuration, a validation stream, and a new model for each run."""

    program: Any
    cfg: Any
    runtime: Any
    val: Any

    def model(self) -> Any:
        raise NotImplementedError

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
