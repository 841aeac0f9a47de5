"""TTT_CONTEXT=carry: kept keys and values, against one forward pass and a loop that is written out."""

from __future__ import annotations

import dataclasses
import functools

import golden_rules as rules
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import ttt_rules
from torch import Tensor
from ttt_rules import CHUNK, LENGTHS, STRUCTURES

import train_gpt
from train_gpt import CarryLora, Cells

EXACT = 1e-11  # of float64 losses of some nats
PLAIN = next(iter(STRUCTURES))
IDS = ttt_rules.golden_stream(list(LENGTHS)).tokens


def config(structure: str = PLAIN, **knobs: object) -> train_gpt.Config:
    return ttt_rules.structure_config(structure, **{"ttt_context": "carry", **knobs})


@functools.cache
def model_of(structure: str, dtype: torch.dtype = torch.float64) -> train_gpt.GPT:
    return ttt_rules.strong_model(config(structure), dtype, scale=0.3).requires_grad_(False)


def stream(ids: np.ndarray = IDS) -> train_gpt.ValData:
    return train_gpt.ValData(ids, np.ones(len(ids), np.int32))


def score(structure: str = PLAIN, dtype: torch.dtype = torch.float64, **knobs: object) -> np.ndarray:
    """What EVAL=doc_lora counts for each position of the stream."""
    return ttt_rules.scores_of(config(structure, **knobs), model_of(structure, dtype), stream(), dtype)


@functools.cache
def usual(**knobs: object) -> np.ndarray:
    return score(**knobs)


def documents() -> list[tuple[int, int]]:
    return train_gpt.val_documents(IDS)


# Without learning


def banded(ring: int) -> train_gpt.Attend:
    """Attention in one pass over a whole document, each token reaching back to `ring` whole chunks before its own."""

    def attend(q: Tensor, k: Tensor, v: Tensor, meta: train_gpt.AttnMeta, sink: Tensor | None = None) -> Tensor:
        at = torch.arange(q.size(1))
        mask = (at <= at[:, None]) & (at // CHUNK >= at[:, None] // CHUNK - ring)
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    return attend


def with_attention(structure: str, attend: train_gpt.Attend) -> train_gpt.GPT:
    """The model of a structure with another attention."""
    other = train_gpt.GPT(config(structure), attend, torch.float64).double()
    other.load_state_dict(model_of(structure).state_dict())
    other.set_looping(True)
    return other.requires_grad_(False)


def causal_rows(q: Tensor, k: Tensor, v: Tensor, meta: train_gpt.AttnMeta, sink: Tensor | None = None) -> Tensor:
    """Attention that no mask bounds."""
    return train_gpt.exact_attention(q, k, v, None, sink)


def in_one_pass(structure: str, attend: train_gpt.Attend, window: int) -> np.ndarray:
    """Each document alone, in one forward pass."""
    model, found = with_attention(structure, attend), np.full(len(IDS), np.nan)
    for start, length in documents():
        row = torch.from_numpy(IDS[start : start + length])[None]
        meta = model.plan(length - 1, row.device, None, window)
        with torch.no_grad():
            found[start + 1 : start + length] = model(row[:, :-1], row[:, 1:], meta, None, "none")[0]
    return found


@pytest.mark.parametrize("structure", STRUCTURES)
def test_without_learning_it_is_one_forward_pass(structure: str) -> None:
    found = score(structure, ttt_lora_lr=0.0)
    np.testing.assert_allclose(found, in_one_pass(structure, causal_rows, 96), rtol=0, atol=EXACT)
    for window in (16, 47, 48) if structure in list(STRUCTURES)[:4] else ():
        found = score(structure, ttt_lora_lr=0.0, ttt_eval_seq_len=window)
        expected = in_one_pass(structure, banded(window // CHUNK - 1), window)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # the one pass has float32 angles


def test_no_adapters_are_made_when_nothing_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(train_gpt, "Adapters")
    for context in train_gpt.TTT_CONTEXTS:
        assert score(ttt_lora_lr=0.0, ttt_context=context).shape == (sum(LENGTHS),)


def test_rotary_tables_at_positions() -> None:
    at = torch.tensor([[0, 5, 63], [64, 1000, 97_000]])
    cos, sin = train_gpt.rotary_at(at, 16, 1e4, 64)
    near = train_gpt.rotary_tables(64, 16, 1e4, at.device)
    assert torch.equal(cos[0], near[0][at[0]]) and torch.equal(sin[0], near[1][at[0]])
    frequency = (1.0 / 1e4 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)).double()
    torch.testing.assert_close(sin[1].double(), (at[1, :, None] * frequency).sin(), rtol=0, atol=1e-7)
    assert (train_gpt.rotary_tables(97_001, 16, 1e4, at.device)[1][-1] - sin[1, 2]).abs().max() > 1e-4


# With learning


class Kept:
    """Attention over a whole document so far, in which earlier chunks have the keys and values of their own time."""

    def __init__(self, ring: int) -> None:
        self.ring, self.kept, self.new, self.size = ring, [], [], 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, meta: train_gpt.AttnMeta, sink: Tensor | None = None) -> Tensor:
        if self.kept:
            old = self.kept[len(self.new)]
            k, v = (torch.cat([was, now[:, was.size(1) :]], dim=1) for was, now in zip(old, (k, v), strict=True))
        self.new.append((k.detach(), v.detach()))
        return banded(self.ring)(q, k, v, meta)

    def next_chunk(self) -> None:
        self.kept, self.new = self.new, []


def written_out(structure: str, start: int, length: int, doc: int, window: int, **knobs: object) -> np.ndarray:
    """Scores of one document: whole prefixes, one optimiser of torch, no ring and no buffer."""
    cfg, memory = config(structure, **knobs), Kept(window // CHUNK - 1)
    model = with_attention(structure, memory.attend)
    adapters = train_gpt.Adapters(cfg, rules.runtime(torch.float64), model, 1)
    adapters.renew(0, doc)
    betas = (cfg.ttt_beta1, cfg.ttt_beta2)
    options = {"lr": cfg.ttt_lora_lr, "betas": betas, "eps": 1e-10, "weight_decay": cfg.ttt_weight_decay}
    optimiser = torch.optim.AdamW(adapters.leaves(), **options)
    row, found = torch.from_numpy(IDS[start : start + length])[None], []
    for begin in range(0, length - 1, CHUNK):
        stop = min(begin + CHUNK, length - 1)
        meta = model.plan(stop, row.device, None, window)
        for step in range(cfg.ttt_grad_steps):
            nll = model(row[:, :stop], row[:, 1 : stop + 1], meta, adapters, "none")[0, begin:]
            if step == 0:
                found += nll.tolist()
                left = memory.new
            memory.new = []
            optimiser.zero_grad()
            nll.mean().backward()
            optimiser.step()
        memory.new = left
        memory.next_chunk()
    return np.array(found)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_adaptation_is_the_loop_written_out(structure: str) -> None:
    knobs: dict = {"ttt_grad_steps": 2, "ttt_beta1": 0.3, "ttt_lora_sites": ("q", "attn", "head")}
    for window, extra, tolerance in ((96, {}, EXACT), (32, {}, 1e-4), (96, knobs, EXACT)):
        found = score(structure, ttt_eval_seq_len=window, **extra)
        for doc in (1, 2) if extra else (1, 7):
            start, length = documents()[doc]
            expected = written_out(structure, start, length, doc, window, **extra)
            np.testing.assert_allclose(found[start + 1 : start + length], expected, rtol=0, atol=tolerance)


def chunks(which: int) -> np.ndarray:
    """Stream positions of chunk number `which` of every document."""
    spans = (np.arange(s + 1 + which * CHUNK, s + min(length, 1 + (which + 1) * CHUNK)) for s, length in documents())
    return np.concatenate(list(spans))


def test_first_chunks_are_the_models_and_the_first_step_the_published_one() -> None:
    """The second chunk differs, by what it attends to: keys and values of the first one, from before the step."""
    carried, published, base = usual(), usual(ttt_context="recompute"), usual(ttt_lora_lr=0.0)
    np.testing.assert_allclose(carried[chunks(0)], base[chunks(0)], rtol=0, atol=EXACT)
    assert np.abs(carried - published)[chunks(1)].max() > 1e-4
    np.testing.assert_allclose(first_steps("carry"), first_steps("recompute"), rtol=0, atol=1e-15)


def first_steps(context: str) -> np.ndarray:
    """A checksum of every adapter of one document after its first step."""
    val = ttt_rules.golden_stream([3 * CHUNK])
    cfg, kind = config(ttt_context=context), train_gpt.TTT_CONTEXTS[context]
    learner = kind.learner(cfg, rules.runtime(torch.float64), model_of(PLAIN), val)
    step = next(iter(kind.steps(cfg, val, train_gpt.val_documents(val.tokens), iter([[0]]))))
    learner.learn(step.lesson, step.cells, learner.score(step.cells))
    return np.array([rules.checks(p)["wsum"] for p in learner.adapters.leaves()])


def test_a_row_is_scored_as_if_it_were_alone() -> None:
    for batch in (1, 2, 10):
        found = score(ttt_batch_size=batch, ttt_eval_seq_len=48)
        np.testing.assert_allclose(found, usual(ttt_eval_seq_len=48), rtol=0, atol=EXACT)


def test_scoring_again_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = CarryLora.score

    def twice(learner: CarryLora, cells: Cells) -> Tensor:
        other = cells._replace(targets=np.full_like(cells.targets, 5))
        assert not torch.equal(honest(learner, other), honest(learner, cells))
        return honest(learner, cells)

    expected = usual(ttt_eval_seq_len=32)
    monkeypatch.setattr(CarryLora, "score", twice)
    assert np.array_equal(score(ttt_eval_seq_len=32), expected, equal_nan=True)


# Phases


def test_phases_change_the_base_between_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, update = [], train_gpt.global_update

    def listen(cfg: train_gpt.Config, runtime: train_gpt.Runtime, model: train_gpt.GPT, tokens: np.ndarray) -> int:
        lengths.append(len(tokens))
        return update(cfg, runtime, model, tokens)

    monkeypatch.setattr(train_gpt, "global_update", listen)
    knobs, found = {"phased_ttt_prefix_docs": 6, "phased_ttt_num_phases": 2, "ttt_batch_size": 1}, {}
    for context in train_gpt.TTT_CONTEXTS:
        cfg = config(eval="phased_lora", ttt_context=context, **knobs)
        model = ttt_rules.strong_model(cfg, torch.float64, scale=0.3)
        found[context] = ttt_rules.scores_of(cfg, model, stream(), torch.float64)
    assert len(lengths) == 4 and lengths[:2] == lengths[2:]
    order = sorted(documents(), key=lambda doc: -doc[1])
    for number, (start, length) in enumerate(order):
        gap = np.abs(found["carry"] - usual())[start + 1 : start + length].max()
        assert (gap > 1e-3) == (number >= 3) or length < 3, "the first update comes after three documents"


# Parts


@pytest.mark.skipif(torch.cuda.is_available(), reason="here a capture succeeds")
def test_where_nothing_can_be_captured_the_log_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    runtime = dataclasses.replace(rules.runtime(torch.float64), log=train_gpt.Log(None, False))
    learner = CarryLora(config(), runtime, model_of(PLAIN), stream())
    assert train_gpt.captured(runtime, "carry", learner.graphs, {}) == {}
    assert any("carry: no CUDA graphs (" in line for line in runtime.log.warnings)
    with pytest.raises(RuntimeError):
        train_gpt.captured(dataclasses.replace(runtime, world=2), "carry", learner.graphs, {})
    said = capsys.readouterr().out
    assert "carry: no CUDA graphs (" in said and "11 chunks of 8 kept, eager" in said


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_captured_graphs_are_the_eager_loop(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = compile and train_gpt.triton is not None
    runtime = train_gpt.Runtime(0, 1, torch.device("cuda"), train_gpt.Log(None, True), torch.float32, fast)
    cfg, found = config(ttt_eval_seq_len=48), {}
    model = ttt_rules.strong_model(cfg, scale=0.3).cuda()
    for name, graphs in (("graphs", CarryLora.graphs), ("eager", lambda learner: {})):
        monkeypatch.setattr(CarryLora, "graphs", graphs)
        found[name] = ttt_rules.per_target(lambda: train_gpt.EVALS["doc_lora"](cfg, runtime, model, stream()), len(IDS))
    np.testing.assert_allclose(found["graphs"], found["eager"], rtol=0, atol=1e-3)
