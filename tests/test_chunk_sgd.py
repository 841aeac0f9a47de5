"""Chunk SGD: windows and chunks, the published trajectory, legality, any number of ranks."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import golden_rules as rules
import ngram_rules as ngram
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ttt_rules import per_target, random_stream, scores_of, small_config, strong_model

import train_gpt
from train_gpt import GPT, ByteMeter, ChunkSgd, Config, SpanSgd, Step, UserError, ValData

GOLDEN = json.loads((Path(__file__).resolve().parent / "golden" / "chunk_sgd.json").read_text(encoding="utf-8"))
PROPERTY = settings(max_examples=40)


def config(**knobs: object) -> Config:
    return small_config(**{"EVAL": "chunk_sgd", **knobs})


def stream(num_targets: int) -> ValData:
    return random_stream(num_targets, document=0.03)


def steps_of(cfg: Config, val: ValData, rank: int = 0, world: int = 1) -> list[Step]:
    """The steps of a rank."""
    runtime = dataclasses.replace(rules.runtime(), rank=rank, world=world)
    return list(train_gpt.EVALS[cfg.eval].steps(cfg, runtime, val))


def trained(cfg: Config, val: ValData) -> ChunkSgd:
    """A learner after a whole evaluation."""
    learner = ChunkSgd(cfg, rules.runtime(), strong_model(cfg), val)
    train_gpt.score_first(steps_of(cfg, val), learner, ByteMeter(val, rules.runtime()))
    return learner


# Windows and chunks


@pytest.mark.parametrize("case", GOLDEN["windows"], ids=lambda case: case["name"])
def test_windows_and_chunks_of_the_delta_hybrid(case: dict) -> None:
    """At full size too (633,345 windows, 619 chunks), lazily: arrays, not a loop over windows."""
    c, want = case["config"], case["expected"]
    sizes = {"eval_seq_len": c["seq_len"], "eval_stride": c["stride"], "ttt_chunk_tokens": c["chunk_tokens"]}
    cfg = Config(eval="chunk_sgd", **sizes)
    windows, edges = train_gpt.windows_by_chunk(cfg, c["targets"])
    absolute = windows + windows[:, :1] * [0, 0, 1, 1]
    assert (len(windows), len(edges) - 1) == (want["num_windows"], want["num_chunks"])
    first, last = want["first_windows"], want["last_windows"]
    assert absolute[: len(first)].tolist() == first and absolute[-len(last) :].tolist() == last
    counts = zip(*np.unique(np.diff(edges), return_counts=True), strict=True)
    assert {str(k): int(n) for k, n in counts} == want["distinct_window_counts"]
    for number, chunk in want["chunks"].items():
        rows = absolute[edges[int(number)] : edges[int(number) + 1]]
        assert (len(rows), int((rows[:, 3] - rows[:, 2]).sum())) == (chunk["windows"], chunk["scored_targets"])
        assert rows[0].tolist() == chunk["first"] and rows[-1].tolist() == chunk["last"]
    for number, sequences in want["sequences"].items():
        assert len(train_gpt.learn_span(cfg, int(number))) == sequences * c["seq_len"]


def test_windows_of_the_n_gram_stack_and_what_its_tail_counts_twice() -> None:
    """969,088 windows are published; the last 31 score 64 targets each a second time, and are not made here."""
    targets, stride, chunk = 62_021_632, 64, 32_768
    windows, edges = train_gpt.windows_by_chunk(Config(), targets)
    repeats = -(-targets // stride) - len(windows)
    assert (len(windows) + repeats, repeats, repeats * stride) == (969_088, 31, 1_984)
    assert (len(edges) - 1, edges[1]) == (-(-targets // chunk), 481) == (1893, 481)
    assert set(np.diff(edges)[1:-1].tolist()) == {512} and int((windows[:, 3] - windows[:, 2]).sum()) == targets
    for small in (100, 64, 48, 12):
        published = ngram.published_rows(small, 16, 4)
        ours = train_gpt.window_rows(small, 16, 4)
        assert published[: len(ours)].tolist() == ours.tolist()


@given(targets=st.integers(1, 260), length=st.integers(2, 40), world=st.sampled_from([1, 2, 4]), data=st.data())
@PROPERTY
def test_each_target_is_scored_once_and_each_chunk_learnt_by_all_ranks_after(
    targets: int, length: int, world: int, data: st.DataObject
) -> None:
    stride, chunk = data.draw(st.integers(1, length)), data.draw(st.integers(length, 3 * length))
    cfg = config(EVAL_SEQ_LEN=length, EVAL_STRIDE=stride, TTT_CHUNK_TOKENS=chunk, TRAIN_SEQ_LEN=64)
    val = stream(targets)
    ranks = [steps_of(cfg, val, rank, world) for rank in range(world)]
    scored = sorted(p for steps in ranks for cells, _ in steps if cells for p in cells.scored())
    assert scored == [*range(1, targets + 1)]
    spans = [[lesson.spans for _, lesson in steps if lesson] for steps in ranks]
    assert all(own == spans[0] for own in spans) and len(spans[0]) == -(-targets // chunk) - 1
    done, waiting = np.zeros(targets + 1, bool), [iter(steps) for steps in ranks]
    for (span,) in spans[0]:
        for steps in waiting:
            for cells, lesson in steps:
                if lesson:
                    break
                done[cells.scored()] = True
        assert done[span.start : span.stop].all() and span.stop - 1 <= targets


def test_what_a_chunk_learns_is_what_was_scored_since_the_chunk_before() -> None:
    """Where stride and window divide the chunk, as in the records."""
    scored: list[int] = []
    for cells, lesson in steps_of(config(), stream(150)):
        if lesson:
            assert sorted(scored) == lesson.targets().tolist()
            scored = []
        scored += cells.scored().tolist() if cells else []
    assert scored == list(range(129, 151)), "the last chunk is scored and not learnt"


# The published trajectory


def golden_config(c: dict) -> Config:
    same = ("ttt_lr", "ttt_epochs", "ttt_momentum", "ttt_grad_clip")
    sizes = {"eval_seq_len": c["train_seq_len"], "eval_stride": c["stride"], "ttt_chunk_tokens": c["chunk_tokens"]}
    sizes["val_batch_tokens"] = c.get("score_batch_windows", 32) * c["train_seq_len"]
    return Config(eval="chunk_sgd", loader="stream", batch_slices=1, **sizes, **{name: c[name] for name in same})


def record_steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What each step of SGD started from, and its momentum after it."""
    steps, gradient, step = [], SpanSgd.gradient, SpanSgd.step

    def note(sgd: SpanSgd, *args: object) -> torch.Tensor:
        norm = gradient(sgd, *args)
        steps.append({"grad_norm_before_clip": norm.item()})
        return norm

    def close(sgd: SpanSgd, rate: float, *args: object) -> None:
        step(sgd, rate, *args)
        buffers = [sgd.optimiser.state[p]["momentum_buffer"] for p in sgd.params]
        norm = math.sqrt(sum(b.square().sum().item() for b in buffers))
        steps[-1] |= {"lr": rate, "momentum_buffer_l2_after": norm}

    monkeypatch.setattr(SpanSgd, "gradient", note)
    monkeypatch.setattr(SpanSgd, "step", close)
    return steps


@pytest.mark.parametrize("case", GOLDEN["ttt"], ids=lambda case: case["name"])
def test_sgd_follows_the_published_trajectory(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk's published sum has the tail again; scored on the final weights, that gives the difference."""
    cfg, want, runtime = golden_config(case["config"]), case["expected"], rules.runtime(torch.float64)
    targets = case["config"]["predicted_positions"]
    val, model = ngram.stream(targets), ngram.adapted_model(case["config"])
    monkeypatch.setattr(train_gpt, "rotary_tables", ngram.exact_tables)
    steps = record_steps(monkeypatch)
    learner, meter = ChunkSgd(cfg, runtime, model, val), ByteMeter(val, runtime)
    nll = per_target(lambda: train_gpt.score_first(steps_of(cfg, val), learner, meter), targets + 1)
    tail = ngram.published_rows(targets, cfg.eval_seq_len, cfg.eval_stride)
    tail = tail[len(train_gpt.window_rows(targets, cfg.eval_seq_len, cfg.eval_stride)) :]
    again = train_gpt.window_cells(cfg, val, tail)
    twice = learner.score(again)[again.rows, again.cols].sum().item()
    sums = [nll[1 + 32 * i : 33 + 32 * i].sum() for i in range(3)]
    sums[-1] += twice
    assert sums == pytest.approx([c["scored_nll_sum_before_training"] for c in want["chunks"]], rel=1e-7)
    count = targets + tail[:, 3].sum() - tail[:, 2].sum()
    assert (meter.close().val_loss * targets + twice) / count == pytest.approx(want["val_loss"], rel=1e-7)
    assert len(steps) == len(want["steps"])
    after = "momentum_buffer_l2_after"  # published for the last step of a chunk
    for found, expected in zip(steps, want["steps"], strict=True):
        found = {key: value for key, value in found.items() if key != after or key in expected}
        assert found == pytest.approx({key: expected[key] for key in found}, rel=1e-7)
    assert any(after in expected for expected in want["steps"])
    found = {ngram.published_name(name): p for name, p in learner.model.named_parameters()}
    norms = {name: found[name].norm().item() for name in want["final_param_l2"]}
    assert norms == pytest.approx(want["final_param_l2"], rel=1e-9)


# What is trained


def test_trainable_words(run_gpt: Callable) -> None:
    """One that matches nothing is found before the training."""
    deep = config(TTT_TRAINABLE="mlp", NUM_LAYERS=11, LOOP_START=3, LOOP_END=5)
    chosen = train_gpt.trainable(deep, GPT(deep))
    assert len(chosen) == 33 and sum(p.ndim == 2 for p in chosen.values()) == 22
    assert all(".mlp." in name or name.endswith("mlp_scale") for name in chosen)
    for words, wanted in (
        ("blocks.0.*,skips", lambda name: name.startswith(("blocks.0.", "skips"))),
        ("all", lambda name: True),
        ("scalar", lambda name: "tok_emb" not in name and not re.search(r"attn\.[qkvo]\.|mlp\.(up|down)\.", name)),
    ):
        model = GPT(config(TTT_TRAINABLE=words))
        expected = {name for name, _ in model.named_parameters() if wanted(name)}
        assert set(train_gpt.trainable(model.cfg, model)) == expected, words
    model = GPT(config(TTT_TRAINABLE="mlp,moe"))
    with pytest.raises(UserError, match=r"TTT_TRAINABLE=moe matches no weight; say all.*blocks\.\*\.mlp\.up"):
        train_gpt.trainable(model.cfg, model)
    done = run_gpt("--explain", code=2, EVAL="chunk_sgd", TTT_TRAINABLE="moe")
    assert "TTT_TRAINABLE=moe matches no weight" in done.err


def test_only_the_selected_weights_of_a_copy_change() -> None:
    cfg, val = config(TTT_TRAINABLE="mlp"), stream(100)
    model = strong_model(cfg)
    before = copy.deepcopy(model.state_dict())
    learner = trained(cfg, val)
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())
    changed = {name for name, w in learner.model.state_dict().items() if not torch.equal(before[name], w)}
    assert changed == set(train_gpt.trainable(cfg, model))


def test_gradients_of_two_dtypes_are_clipped_together() -> None:
    """As global SGD meets them with EMBED_DTYPE=bf16; against torch's own clipping and SGD."""
    cfg = config(EMBED_DTYPE="bf16")
    model, other = strong_model(cfg), strong_model(cfg)
    model.tok_emb.to(torch.bfloat16), other.tok_emb.to(torch.bfloat16)
    tokens = stream(64).tokens
    batches = [(0.5, train_gpt.packed_docs_batch(tokens[i : i + 33], 16)) for i in (0, 32)]
    sgd = SpanSgd(rules.runtime(), model, model, [([*model.parameters()], 1.0)], 0.9, 0.5)
    optimiser = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    assert len(sgd.grads) == 2
    for _ in range(2):
        sgd.step(0.1, batches, 16)
        optimiser.zero_grad()
        for share, batch in batches:
            (other(*train_gpt.on_device(other, batch, rules.runtime(), 16)) * share).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimiser.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision_weights_are_trained_in_float32_and_score_alike() -> None:
    """As published, steps far below the last bit of a bf16 table were lost."""
    cfg = config(EMBED_DTYPE="bf16")
    model = strong_model(cfg)
    model.tok_emb.to(torch.bfloat16)
    copied = train_gpt.fp32_copy(model)
    assert model.tok_emb.weight.dtype == torch.bfloat16 and copied.tok_emb.weight.dtype == torch.float32
    ids = torch.arange(16)[None] + 4
    assert torch.equal(model(ids), copied(ids)) and copied.route is not model.routes[False]


# Legality (causality: tests/test_causality.py)


def test_adaptation_begins_with_the_second_chunk() -> None:
    val = stream(150)
    adapted, frozen, sliding = (
        scores_of(cfg, strong_model(cfg), val) for cfg in (config(), config(TTT_EPOCHS=0), config(EVAL="sliding"))
    )
    np.testing.assert_allclose(frozen[1:], sliding[1:], rtol=1e-5, atol=1e-6)
    assert np.array_equal(adapted[1:33], frozen[1:33]) and not (adapted[33:] == frozen[33:]).any()
