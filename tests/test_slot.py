"""SLOT: both forms against their numbers, what each may read, and that the published one is not causal."""

from __future__ import annotations

import golden_rules as rules
import ngram_rules as ngram
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_chunk_sgd import GOLDEN, config, golden_config, steps_of, stream
from ttt_rules import evaluate, scores_of, strong_model

import train_gpt
from train_gpt import ByteMeter, Cells, ChunkSgd, Config, LegalityError, SharedLesson, Slot, UserError, ValData

PUBLISHED = {"EVAL": "slot", "SLOT_CAUSAL": 0, "ALLOW_NONCAUSAL": 1}


def slot_config(**knobs: object) -> Config:
    """Strong fits, so that a wrong cell among those fitted would show."""
    return config(**{"EVAL": "slot", "SLOT_LR": 0.1, "SLOT_STEPS": 3, **knobs})


def cells_of(cfg: Config, val: ValData) -> list[Cells]:
    return [cells for cells, _ in steps_of(cfg, val) if cells]


# The published numbers


def golden_slot(c: dict) -> Config:
    knobs = {"eval": "slot", "slot_lr": c["slot_lr"], "slot_steps": c["slot_steps"], "slot_causal": False}
    return train_gpt.dataclasses.replace(golden_config(c), **knobs, allow_noncausal=True)


@pytest.mark.parametrize("case", GOLDEN["slot"], ids=lambda case: case["name"])
def test_published_form_gives_the_published_numbers(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of published windows, their repeated tail included, in and out of chunk SGD; no ledger would let them."""
    c, want = case["config"], case["expected"]
    monkeypatch.setattr(train_gpt, "rotary_tables", ngram.exact_tables)
    cfg, val = golden_slot(c), ngram.stream(c["predicted_positions"])
    learner = ChunkSgd(cfg, rules.runtime(torch.float64), ngram.adapted_model(c), val, Slot)
    rows = ngram.published_rows(c["predicted_positions"], c["train_seq_len"], c["stride"])
    by_start, total, count = {int(row[0]): row for row in rows}, 0.0, 0
    scored = "scored_nll_per_window [start,len,scored_from,sum]"
    for batch in want["batches"]:
        windows = np.array([by_start[start] for start in batch["windows"]])
        chunk = int(windows[0, 0] + windows[0, 2]) // c["chunk_tokens"]
        if chunk > 0:
            learner.learn(SharedLesson((train_gpt.learn_span(cfg, chunk - 1),)), None, None)
        cells = train_gpt.window_cells(cfg, val, windows)
        cells = cells._replace(fit=train_gpt.fit_cells(cells, causal=False))
        compare_steps(cfg, learner, cells, batch["steps"])
        nll = learner.score(cells)
        found = [[*row, nll[i, row[2] : row[3]].sum().item()] for i, row in enumerate(windows.tolist())]
        assert [row[:3] for row in found] == [w[:3] for w in batch[scored]]
        assert [row[4] for row in found] == pytest.approx([w[3] for w in batch[scored]], rel=1e-7)
        total, count = total + sum(row[4] for row in found), count + len(cells.rows)
    assert total / count == pytest.approx(want["val_loss"], rel=1e-8)
    assert abs(total / count - want["val_loss_without_slot"]) > 1e-3


def compare_steps(cfg: Config, learner: ChunkSgd, cells: Cells, expected: list[dict]) -> None:
    """The shift after each number of steps, and the loss that it started from."""
    ids, targets = torch.from_numpy(cells.ids), torch.from_numpy(cells.targets).flatten()[cells.fit]
    with torch.no_grad():
        z = learner.model.tok_emb(learner.model.trunk(ids).flatten(0, 1)[cells.fit])
    shift = torch.zeros(learner.model.tok_emb.weight.size(1), dtype=torch.float64)
    for steps, want in enumerate(expected, 1):
        logits = train_gpt.softcapped(z + learner.model.tok_emb.weight.detach() @ shift, learner.model.softcap)
        assert F.cross_entropy(logits, targets).item() == pytest.approx(want["loss_before_step"], rel=1e-8)
        learner.scorer.steps = steps
        shift = learner.scorer.fitted_shift(z, targets, targets)
        assert shift.norm().item() == pytest.approx(want["delta_l2"], rel=1e-7)
        assert shift[:6].tolist() == pytest.approx(want["delta_first6"], rel=1e-6)
        assert shift.sum().item() == pytest.approx(want["delta_sum"], rel=1e-6)
    learner.scorer.steps = cfg.slot_steps


# What is fitted


def test_causal_form_reads_what_stands_before_the_batch() -> None:
    """For window j of a batch of full windows, its first length - stride * (j + 1) targets."""
    cfg, val = slot_config(TTT_CHUNK_TOKENS=160, VAL_BATCH_TOKENS=256), stream(300)
    scoring = cells_of(cfg, val)
    assert not len(scoring[0].fit), "nothing stands before the stream's first window"
    for cells in scoring[1:]:
        counts = np.bincount(cells.fit // 16, minlength=len(cells.origin))
        assert counts.tolist() == [max(0, 16 - 4 * (j + 1)) for j in range(len(cells.origin))]
        assert cells.fitted().max() == cells.scored().min() - 1


def test_published_form_reads_nearly_all_that_it_scores() -> None:
    """Of 32 windows' 2,048 scored targets 2,047, which make 51.5 % of the terms of its loss."""
    cfg = Config(eval="slot", loader="stream", slot_causal=False, allow_noncausal=True)
    val = ValData(np.full(6145, 7), np.ones(6145, np.int32))
    cells = train_gpt.window_cells(cfg, val, train_gpt.window_rows(6144, 2048, 64)[1:33])
    read, scored = cells._replace(fit=train_gpt.fit_cells(cells, causal=False)).fitted(), cells.scored()
    assert (len(scored), len(np.intersect1d(read, scored)), len(read)) == (2048, 2047, 65_504)
    assert int((read >= scored.min()).sum()) == 33_760
    causal = cells._replace(fit=train_gpt.fit_cells(cells, causal=True)).fitted()
    assert causal.max() < scored.min() and len(causal) == sum(1984 - 64 * j for j in range(32))


# Legality (causality: tests/test_causality.py)


def test_causal_form_changes_scores_but_not_the_first_batch() -> None:
    val, cfg = stream(150), slot_config(TTT_EPOCHS=0)
    fitted, frozen = (scores_of(c, strong_model(c), val) for c in (cfg, config(TTT_EPOCHS=0)))
    first = 1 + len(cells_of(cfg, val)[0].rows)
    np.testing.assert_allclose(fitted[1:first], frozen[1:first], rtol=1e-5)
    assert not np.isclose(fitted[first:], frozen[first:]).any()


def test_the_driver_refuses_a_fit_on_scored_targets_unless_allowed() -> None:
    """Whatever the knobs say: the ledger reads the positions that a score is fitted on."""
    cfg, val = slot_config(**PUBLISHED), stream(100)
    model = strong_model(cfg)
    with pytest.raises(LegalityError, match="fitted on a target that it scores"):
        learner = ChunkSgd(cfg, rules.runtime(), model, val, Slot)
        train_gpt.score_first(steps_of(cfg, val), learner, ByteMeter(val, rules.runtime()))
    assert evaluate(cfg, model, val).legal is False
    for legal in (slot_config(), slot_config(ALLOW_NONCAUSAL=1), config(ALLOW_NONCAUSAL=1)):
        assert evaluate(legal, model, val).legal is True
    cells = cells_of(slot_config(), val)[1]
    ledger = train_gpt.Ledger(101)
    ledger.admit(cells)
    with pytest.raises(LegalityError):  # one target too many
        ledger.admit(cells._replace(fit=np.append(cells.fit, cells.rows[0] * 16 + cells.cols[0])))
    with pytest.raises(UserError, match="SLOT_CAUSAL=0 fits on the targets it scores.*ALLOW_NONCAUSAL=1"):
        config(EVAL="slot", SLOT_CAUSAL=0)
