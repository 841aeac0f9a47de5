"""How many graphs torch.compile makes: few, and as many for ten documents as for fifty thousand."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import golden_rules as rules
import numpy as np
import pytest
import torch
import ttt_rules
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import train_gpt

LENGTHS = [3, 9, 70, 26, 41, 12, 2]  # documents


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """What the program compiles goes through a backend that counts, with forward and backward traced in full."""
    torch._dynamo.reset()
    found = CompileCounterWithBackend("aot_eager")

    def compiled(runtime: train_gpt.Runtime, function: Callable) -> Callable:
        return torch.compile(function, fullgraph=True, dynamic=False, backend=found) if runtime.compile else function

    monkeypatch.setattr(train_gpt, "compiled", compiled)
    yield found
    torch._dynamo.reset()


SMALL = """
NUM_LAYERS=1 NUM_LOOPS=0 PARALLEL_START_LAYER=0 XSA_LAST_N=1 LOOP_START=0 LOOP_END=0
TTT_BATCH_SIZE=5 TTT_CHUNK_SIZE=8 TTT_EVAL_SEQ_LEN=48 TTT_LORA_LR=0.003
PHASED_TTT_PREFIX_DOCS=3 PHASED_TTT_NUM_PHASES=2 GLOBAL_TTT_CHUNK_TOKENS=64
"""
CASES = """
aot_eager 1 EVAL=plain
aot_eager 1 EVAL=sliding LOADER=stream
eager 2 EVAL=chunk_sgd
aot_eager 2 EVAL=slot
eager 2 EVAL=phased_lora
eager 2 EVAL=phased_lora TTT_CHUNK_SIZE=10:2,30:4,8
aot_eager 2 EVAL=phased_lora TTT_CONTEXT=carry
aot_eager 1 EVAL=plain HINTS=copy,tilt CANONICAL_MASK=eval
eager 2 EVAL=chunk_sgd HINTS=copy,tilt CANONICAL_MASK=eval
eager 2 EVAL=phased_lora TTT_CHUNK_SIZE=10:2,30:4,8 HINTS=copy,tilt CANONICAL_MASK=eval
aot_eager 2 EVAL=phased_lora TTT_CONTEXT=carry HINTS=copy,tilt CANONICAL_MASK=eval
"""  # graphs: scoring and gradient; trunk and gradient; scoring with gradient and AdamW (global updates run uncompiled)


def small(knobs: str) -> train_gpt.Config:
    """One layer."""
    return ttt_rules.small_config(**rules.knobs(SMALL) | rules.knobs(knobs))


def strong_model(cfg: train_gpt.Config) -> train_gpt.GPT:
    """A strong model with random pairs banned, if any may be, and copies that weigh something."""
    model, rng = ttt_rules.strong_model(cfg), np.random.default_rng(0)
    if train_gpt.MASKED_WHEN[cfg.canonical_mask]:
        model.canonical = torch.from_numpy(rng.integers(0, 256, (cfg.vocab_size, cfg.vocab_size // 8), np.uint8))
    model.copy_weights[1:] = 0.5
    return model


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_graphs_of_an_evaluator(case: str, counter: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scores as uncompiled, all graphs made before the clock runs where rows adapt, and none by the data.

    What only eager traces forward has its backward traced elsewhere: SpanSgd's in slot, the adapters' in carry.
    """
    counter.backend, graphs, knobs = case.split(" ", 2)
    monkeypatch.setattr(train_gpt, "TILT_LENGTH", 1)
    cfg, val = small(knobs), ttt_rules.golden_stream(LENGTHS, ttt_rules.VOCAB)
    expected = ttt_rules.scores_of(cfg, strong_model(cfg), val)
    model, before, first = strong_model(cfg), [], train_gpt.score_first
    monkeypatch.setattr(train_gpt, "score_first", lambda *args: before.append(counter.frame_count) or first(*args))
    runtime = rules.runtime(compile=True)
    found = ttt_rules.per_target(lambda: train_gpt.EVALS[cfg.eval](cfg, runtime, model, val), len(val.tokens))
    np.testing.assert_allclose(found[1:], expected[1:], rtol=0, atol=1e-3)
    assert counter.frame_count == int(graphs)
    if cfg.ttt_context != "carry":  # which compiles there while it captures, on a GPU alone
        assert before == [int(graphs)], "compiled inside the clock"


def test_what_is_scored_unadapted_and_what_copies_are_fitted_on_runs_uncompiled(
    counter: CompileCounterWithBackend, tiny_data: Path
) -> None:
    """A late evaluation has no time to compile; and the fit counts as training."""
    cfg, runtime = small("EVAL=phased_lora HINTS=copy"), rules.runtime(compile=True)
    val, counter.backend = ttt_rules.golden_stream(LENGTHS, ttt_rules.VOCAB), "eager"
    score = train_gpt.EVALS[cfg.eval](cfg, runtime, strong_model(cfg), val, deadline=time.perf_counter())
    assert score.unadapted == score.tokens == len(val.tokens) - 1
    assert counter.frame_count == 2
    cfg = small(f"VOCAB_SIZE=320 HINTS=copy COPY_FIT_TOKENS=500 DATA_PATH={tiny_data}")
    assert train_gpt.fit_copies(cfg, runtime, ttt_rules.strong_model(cfg)).dtype == torch.uint8
    assert counter.frame_count == 2


def test_a_rank_without_a_step_compiles_nothing(
    counter: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, scored = small("EVAL=plain BATCH_SLICES=4"), []
    val = train_gpt.ValData(rules.tokens(60, 30, []), np.ones(30, np.int32))
    monkeypatch.setattr(train_gpt, "score_first", lambda *_: scored.append(counter.frame_count))
    monkeypatch.setattr(train_gpt.ByteMeter, "close", lambda meter: None)
    monkeypatch.setattr(train_gpt.Runtime, "barrier", lambda runtime: scored.append("all are there"))
    for rank in (3, 0):
        runtime = dataclasses.replace(rules.runtime(compile=True), rank=rank, world=4)
        train_gpt.EVALS["plain"](cfg, runtime, ttt_rules.strong_model(cfg), val)
    assert scored == ["all are there", 0, "all are there", 1]


def test_warm_up_makes_every_graph_of_a_run_with_other_spans(
    counter: CompileCounterWithBackend, tiny_data: Path
) -> None:
    """Four of them here, as spans and looping change at different times, and one of the optimiser."""
    sizes = "TRAIN_SEQ_LEN=64 TRAIN_SEQ_SCHEDULE=16@0.25,32@0.7 TRAIN_BATCH_TOKENS=256 BATCH_SLICES=1 ITERATIONS=12"
    cfg = small(f"NUM_LOOPS=1 ENABLE_LOOPING_AT=0.4 VOCAB_SIZE=320 WARMUP_STEPS=2 DATA_PATH={tiny_data} {sizes}")
    assert train_gpt.graphs_of(cfg) == [(16, False), (32, False), (32, True), (64, True)]
    brief = small("TRAIN_SEQ_LEN=64 TRAIN_SEQ_SCHEDULE=16@0.0101,32@0.0109 NUM_LOOPS=1 ENABLE_LOOPING_AT=0.99999")
    assert train_gpt.graphs_of(brief) == [(16, False), (32, False), (64, False), (64, True)], "however short a stage"
    trainer = train_gpt.Trainer(cfg, rules.runtime(compile=True), train_gpt.GPT(cfg).init_weights(0), None)
    warm_up, made, seen = trainer.warm_up, [], []
    trainer.warm_up = lambda: warm_up() or made.append(counter.frame_count)
    step = trainer.step
    trainer.step = lambda *args, **kwargs: step(*args, **kwargs) or seen.append(trainer.span)
    trainer.run(train_gpt.Hooks(*[lambda *_: None] * 3), {})
    assert made == [5] and counter.frame_count == 5
    assert seen == [16] * 2 + [32] * 4 + [64] * 2 + [16] * 4 + [32] * 5 + [64] * 3


def attend_by_bounds(q: Tensor, k: Tensor, v: Tensor, meta: train_gpt.AttnMeta, sink: Tensor | None = None) -> Tensor:
    """A backend that reads the boundaries inside the graph, as flash attention does."""
    total = q.size(0) * q.size(1)
    mask = train_gpt.segment_mask(meta.cu_seqlens, total, total)
    return train_gpt.masked_attention(q, k, v, meta._replace(mask=mask), sink)


@pytest.mark.parametrize("attend", [train_gpt.masked_attention, attend_by_bounds])
def test_graphs_of_training(attend: train_gpt.Attend, counter: CompileCounterWithBackend) -> None:
    """One for each route, whatever the number of documents in a batch."""
    cfg, runtime, frames = small("NUM_LOOPS=1"), rules.runtime(compile=True), []
    model = train_gpt.GPT(cfg, attend)
    model.load_state_dict(ttt_rules.strong_model(cfg).state_dict())
    forward = train_gpt.compiled(runtime, model)
    for looping, documents in itertools.product((False, True, False), (3, 200)):
        model.set_looping(looping)
        starts = np.linspace(0, 255, documents, dtype=np.int64)
        batch = train_gpt.packed_docs_batch(rules.tokens(ttt_rules.VOCAB, 257, starts.tolist()), 128)
        inputs = train_gpt.on_device(model, batch, runtime, 128)
        loss = forward(*inputs)
        torch.testing.assert_close(loss, model(*inputs))
        loss.backward()
        frames.append(counter.frame_count)
    assert len({len(train_gpt.pad_bounds(np.arange(n))) for n in (3, 200)}) > 1, "the shapes did change"
    assert frames == [1] * 2 + [2] * 4


SHALLOW = {  # two layers with every part of a stack, and how near the gradients come
    "n-gram": ("NUM_LAYERS=2 LOOP_END=0 PARALLEL_START_LAYER=1 VE_LAYERS=0,1 XSA_LAST_N=1", 1e-5, 1.3e-6),
    "delta": ("NUM_LAYERS=2 MIXERS=GA NUM_LOOPS=0 PARALLEL_START_LAYER=1", 2e-4, 2e-6),
}


@pytest.mark.parametrize("stack", SHALLOW)
def test_graph_of_a_stack(stack: str, counter: CompileCounterWithBackend) -> None:
    """One for all of its parts, with gradients."""
    knobs, rtol, atol = SHALLOW[stack]
    model = ttt_rules.strong_model(rules.toy_config(f"{ttt_rules.STACKS[stack]} {knobs}"))
    ids, results = ttt_rules.sample(2, 71, [0, 20]), []
    for forward in (model, train_gpt.compiled(rules.runtime(compile=True), model)):
        model.zero_grad()
        loss = forward(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)
    assert counter.frame_count == 1
