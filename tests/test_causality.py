"""One causality matrix: every evaluator, TTT context and structure answers the questions of legality.

Later tokens, permuted futures and other documents leave scores bit-equal, probabilities sum to one, nothing is learnt
before its score (see examine in causality_rules.py). Planted faults show that the questions can be failed.
"""

from __future__ import annotations

from typing import Any

import causality_rules
import golden_rules as rules
import numpy as np
import pytest
import torch
import ttt_rules

import train_gpt
from records.claims import NOT_ASKED, PASS
from train_gpt import Adapters, CarryLora, Cells, Evaluator, Lesson, NoAdaptation, Step

LENGTHS = [30, 61, 22, 13, 9, 2, 17]  # documents
PLAIN = next(iter(ttt_rules.STRUCTURES))
LEAKY = {"smear over document starts", "the same over document starts"}  # on purpose, as published


class Toy(causality_rules.Scorer):
    """What is examined: the model of a structure, with strong weights."""

    def __init__(self, cfg: train_gpt.Config) -> None:
        stream = ttt_rules.golden_stream(LENGTHS)
        self.program, self.cfg, self.runtime = train_gpt, cfg, rules.runtime()
        self.val = stream._replace(bytes=np.ones_like(stream.bytes))

    def model(self) -> train_gpt.GPT:
        model, vocab = ttt_rules.strong_model(self.cfg, scale=0.3), self.cfg.vocab_size
        # what counts only with CANONICAL_MASK and HINTS
        model.copy_weights[1:] = torch.linspace(0.2, 0.9, len(model.copy_weights) - 1)
        model.canonical = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (vocab, -(-vocab // 8)), np.uint8))
        return model


def examine(cfg: train_gpt.Config, evaluator: Evaluator | None = None, apart: str = "", sums: bool = True) -> set[str]:
    """The questions that an evaluator does not pass."""
    evaluator = evaluator or train_gpt.EVALS[cfg.eval]
    checks = causality_rules.examine(Toy(cfg), evaluator, "matrix", 2, apart, sums)
    assert len(checks) > 1
    return {check.name.split(" (")[0] for check in checks if check.status not in (PASS, NOT_ASKED)}


MATRIX: list[tuple[str, dict[str, Any]]] = [
    *((structure, {"eval": "plain"}) for structure in ttt_rules.STRUCTURES),
    *((structure, {"ttt_context": "recompute"}) for structure in ttt_rules.STRUCTURES),
    *((structure, {"ttt_context": "carry", "ttt_eval_seq_len": 32}) for structure in ttt_rules.STRUCTURES),
    (PLAIN, {"eval": "plain", "loader": "stream"}),
    (PLAIN, {"eval": "sliding"}),
    (PLAIN, {"eval": "sliding", "loader": "stream"}),
    (PLAIN, {"eval": "chunk_sgd"}),
    (PLAIN, {"eval": "chunk_sgd", "loader": "stream"}),
    (PLAIN, {"eval": "slot", "slot_lr": 0.1}),
    (PLAIN, {"eval": "slot", "slot_lr": 0.1, "loader": "stream", "ttt_epochs": 0}),
    (PLAIN, {"eval": "phased_lora", "ttt_batch_size": 1}),
    (PLAIN, {"eval": "phased_lora", "ttt_batch_size": 1, "ttt_context": "carry"}),
    (PLAIN, {"ttt_context": "recompute", "ttt_grad_steps": 2, "ttt_warm_start_a": True}),
    (PLAIN, {"ttt_context": "recompute", "ttt_chunk_size": (train_gpt.UpTo(20, 3), *rules.always(8))}),
    (PLAIN, {"ttt_context": "carry", "ttt_grad_steps": 2}),
    (PLAIN, {"ttt_context": "carry", "ttt_lora_lr": 0.0}),
    (PLAIN, {"canonical_mask": "eval", "eval": "sliding"}),
    (PLAIN, {"hints": ("copy", "tilt"), "eval": "sliding"}),
    (PLAIN, {"hints": ("copy", "tilt"), "eval": "slot", "slot_lr": 0.1}),
    (PLAIN, {"hints": ("copy",), "canonical_mask": "eval", "ttt_context": "recompute", "ttt_grad_steps": 2}),
    (PLAIN, {"hints": ("tilt",), "ttt_context": "carry"}),
    (PLAIN, {"canonical_mask": "eval", "eval": "slot", "slot_lr": 0.1}),
    (PLAIN, {"canonical_mask": "eval", "ttt_context": "recompute"}),
    (PLAIN, {"canonical_mask": "eval", "ttt_context": "carry"}),
    ("one lane, no loops, no extras", {"mixers": "G A G", "gdn_head_dim": 8, "ttt_context": "recompute"}),
    ("one lane, no loops, no extras", {"mixers": "G A G", "gdn_head_dim": 8, "eval": "chunk_sgd"}),
]


@pytest.mark.parametrize(
    ("structure", "knobs"), MATRIX, ids=[f"{s}: {' '.join(map(str, k.values()))}" for s, k in MATRIX]
)
def test_the_matrix(structure: str, knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # documents are short here
    monkeypatch.setattr(train_gpt, "COPY_LENGTHS", (1, 2))
    monkeypatch.setattr(train_gpt, "TILT_LENGTH", 1)
    cfg = ttt_rules.structure_config(structure, **{"phased_ttt_prefix_docs": 4, "phased_ttt_num_phases": 2, **knobs})
    packed = cfg.eval in ("plain", "sliding") and cfg.loader == "packed_docs" and structure not in LEAKY
    alone = packed or (cfg.eval == "doc_lora" and not cfg.ttt_warm_start_a)
    assert examine(cfg, apart="" if alone else "it reads other documents", sums=structure == PLAIN) == set()


# Planted faults


def config(**knobs: Any) -> train_gpt.Config:
    return ttt_rules.structure_config(PLAIN, **knobs)


def test_published_slot_is_caught() -> None:
    cfg = config(eval="slot", slot_causal=False, allow_noncausal=True, slot_lr=0.1, ttt_epochs=0)
    assert examine(cfg, apart="slot") >= {"C1 token", "C1 future", "C3 the program's word"}


@pytest.mark.parametrize("context", train_gpt.TTT_CONTEXTS)
def test_learning_before_scoring_is_caught(context: str) -> None:
    kind = train_gpt.TTT_CONTEXTS[context].learner

    class Hasty(kind):
        def score(self, cells: Cells) -> torch.Tensor:
            nll = super().score(cells)
            width = cells.ids.shape[1]
            rows = np.flatnonzero(cells.documents >= 0)
            self.learn(Lesson(rows, slice(width - cells.chunk, width)), cells, nll)
            return self.losses(cells)

    evaluator = train_gpt.EVALS["doc_lora"]._replace(learner=Hasty)
    assert examine(config(ttt_context=context), evaluator, sums=False) >= {"C1 token", "C1 future", "C2 own target"}


@pytest.mark.parametrize("context", train_gpt.TTT_CONTEXTS)
def test_adapters_that_outlive_their_document_are_caught(context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    renew = Adapters.renew

    def keep(adapters: Adapters, row: int, document: int, keep_A: bool = False) -> None:
        if adapters.state.steps[row] == 0:
            renew(adapters, row, document, keep_A)

    monkeypatch.setattr(Adapters, "renew", keep)
    assert examine(config(ttt_context=context, ttt_batch_size=1), sums=False) == {"documents apart"}


@pytest.mark.parametrize("context", train_gpt.TTT_CONTEXTS)
def test_lessons_that_offer_the_next_chunk_are_caught(context: str) -> None:
    honest = train_gpt.EVALS["doc_lora"].steps

    def greedy(*args: Any) -> list[Step]:
        steps = list(honest(*args))
        wide = [lesson and lesson._replace(cols=slice(0, lesson.cols.stop + 1)) for _, lesson in steps]
        return [Step(cells, lesson) for (cells, _), lesson in zip(steps, wide, strict=True)]

    evaluator = train_gpt.EVALS["doc_lora"]._replace(steps=greedy)
    assert "C4 each target once" in examine(config(ttt_context=context), evaluator)  # the program's ledger stops it
    with pytest.raises(train_gpt.LegalityError, match="not scored yet"):
        bench = Toy(config(ttt_context=context))
        evaluator(bench.cfg, bench.runtime, bench.model(), bench.val)


def test_attention_across_documents_is_caught() -> None:
    def borderless(*args: Any) -> list[Step]:
        return [Step(cells._replace(cu_seqlens=None)) for cells, _ in train_gpt.plain_steps(*args)]

    assert examine(config(eval="plain"), Evaluator(borderless, NoAdaptation)) == {"documents apart"}


def test_a_cache_that_holds_another_document_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row goes on where the document before it ended."""
    honest = CarryLora.score

    def stale(learner: CarryLora, cells: Cells) -> torch.Tensor:
        return honest(learner, cells._replace(begin=cells.begin + learner.columns * (cells.begin == 0)))

    monkeypatch.setattr(CarryLora, "score", stale)
    found = examine(config(ttt_context="carry", ttt_batch_size=1, ttt_lora_lr=0.0), sums=False)
    assert found == {"documents apart"}
