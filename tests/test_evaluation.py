"""Evaluation: every target is scored once, in its right context, by the right bytes, on any number of ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import BOS_ID, GPT, ByteMeter, Config, Log, NoAdaptation, Runtime, Unit, ValData, load_config

GOLDEN = json.loads((Path(__file__).parent / "golden" / "evaluation.json").read_text(encoding="utf-8"))
PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)
CUTS = {"plain": train_gpt.plain_units, "sliding": train_gpt.sliding_units}
LOADERS = tuple(train_gpt.LOADERS)
VOCAB = 64


def runtime(rank: int = 0, world: int = 1) -> Runtime:
    """A rank of a world that nobody launched; only world 1 may add up."""
    return Runtime(rank, world, torch.device("cpu"), Log(None, True))


def config(**knobs: object) -> Config:
    """A small model with every document-aware part on, and short windows."""
    base = {**TINY, "VOCAB_SIZE": VOCAB, "EVAL_SEQ_LEN": 16, "EVAL_STRIDE": 4, "VAL_BATCH_TOKENS": 192, "MODEL_DIM": 16}
    base |= {"TTT_EVAL_SEQ_LEN": 16, "TTT_CHUNK_SIZE": 4, "TTT_LORA_LR": 0.05}
    return load_config({key: str(value) for key, value in {**base, **knobs}.items()})


def stream(num_targets: int, seed: int = 0, document: float = 0.08) -> ValData:
    """Random tokens with document starts at this rate, the first at 0, and random bytes per token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, VOCAB, num_targets + 1)
    tokens[rng.random(num_targets + 1) < document] = BOS_ID
    tokens[0] = BOS_ID
    return ValData(tokens, rng.integers(0, 9, num_targets + 1).astype(np.int32))


def strong(cfg: Config) -> GPT:
    """Random weights large enough that context matters; looping on, as at the end of training."""
    model = GPT(cfg).init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.set_looping(True)
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return strong(config())


def all_units(cut: str, cfg: Config, val: ValData, world: int = 1) -> list[Unit]:
    """The units of every rank."""
    return [make() for rank in range(world) for make in CUTS[cut](cfg, runtime(rank, world), val)]


def score(units: list[Unit], cfg: Config, model: GPT, val: ValData) -> train_gpt.Score:
    meter = ByteMeter(val, runtime())
    train_gpt.score_first(units, NoAdaptation(cfg, runtime(), model), meter)
    return meter.close()


def per_target(monkeypatch: pytest.MonkeyPatch, evaluate: Callable[[], train_gpt.Score], length: int) -> torch.Tensor:
    """Nats of each target of a real evaluator, by position in the stream; NaN where none was scored."""
    found, add = torch.full((length,), math.nan), ByteMeter.add

    def record(meter: ByteMeter, unit: Unit, nll: torch.Tensor) -> None:
        add(meter, unit, nll)
        found[unit.scored()] = nll.detach()[unit.rows, unit.cols]

    with monkeypatch.context() as patch:
        patch.setattr(ByteMeter, "add", record)
        evaluate()
    return found


def context_of(start: int, position: int, val: ValData, loader: str) -> int:
    """First token that the target at `position` may see in a row from `start`: the row's, or its document's."""
    if not train_gpt.LOADERS[loader].documents:
        return start
    begins = np.flatnonzero(val.tokens[start:position] == BOS_ID)
    return start + (int(begins[-1]) if len(begins) else 0)


def direct(model: GPT, val: ValData, first: int, position: int) -> float:
    """Nats of one target from the bare tokens of its context: no packing, no padding, no masks."""
    ids = torch.from_numpy(val.tokens[first:position])[None]
    with torch.no_grad():
        logits = model(ids)[0, -1].double()
    return -torch.log_softmax(logits, -1)[val.tokens[position]].item()


# Windows


@pytest.mark.parametrize("case", GOLDEN["windows"], ids=lambda case: case["name"])
def test_windows_equal_the_published_ones_without_their_repeats(case: dict) -> None:
    """The published scripts go on after the window that reaches the end and score the last tokens again, up to
    length / stride times. A target counts once here, so those rows are dropped; all others are equal."""
    wanted = [row for i, row in enumerate(case["rows"]) if i == 0 or row[3] > case["rows"][i - 1][3]]
    rows = train_gpt.window_rows(case["targets"], case["length"], case["stride"])
    assert [[start, length, start + a, start + b] for start, length, a, b in rows] == wanted
    assert sum(b - a for _, _, a, b in rows) == case["unique_scored"] == case["targets"]


def test_windows_of_the_real_validation_set() -> None:
    record = GOLDEN["record"]
    rows = train_gpt.window_rows(record["targets"], record["length"], record["stride"])
    assert len(rows) == record["windows"] - record["shorter"] and rows[-1][0] + rows[-1][1] == record["targets"]


@given(targets=st.integers(1, 200), length=st.integers(1, 40), data=st.data())
@PROPERTY
def test_windows_score_each_target_once_with_all_the_context_there_is(
    targets: int, length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length))
    rows = train_gpt.window_rows(targets, length, stride)
    assert [start + i for start, _, a, b in rows for i in range(a, b)] == list(range(targets))
    for start, size, a, b in rows:
        assert 0 <= a < b == size <= length and start + size <= targets
        assert start == 0 or a >= length - stride, "a later window scores with at least length - stride tokens before"


# Units


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("loader", LOADERS)
@given(
    num_targets=st.integers(1, 260),
    world=st.sampled_from([1, 2, 4]),
    batch=st.integers(64, 400),
    seed=st.integers(0, 9),
)
@PROPERTY
def test_units_score_each_target_once_and_hold_its_tokens(
    cut: str, loader: str, num_targets: int, world: int, batch: int, seed: int
) -> None:
    cfg, val = config(LOADER=loader, VAL_BATCH_TOKENS=batch), stream(num_targets, seed)
    units = all_units(cut, cfg, val, world)
    assert sorted(p for unit in units for p in unit.scored()) == list(range(1, num_targets + 1))
    for unit in units:
        positions = unit.scored()
        assert np.array_equal(unit.targets[unit.rows, unit.cols], val.tokens[positions])
        assert np.array_equal(unit.ids[unit.rows, unit.cols], val.tokens[positions - 1])
        assert unit.ids.shape == unit.targets.shape == units[0].ids.shape, "one shape: one compiled graph"
        assert unit.ids.size <= batch // cfg.batch_slices and not len(unit.learnt())


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("loader", LOADERS)
def test_evaluators_equal_one_bare_forward_per_target(cut: str, loader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without smear: at the cut of a long document it takes from the token before the cut, as published."""
    cfg, val = config(LOADER=loader, EMBED_EXTRAS="none"), stream(115)
    model = strong(cfg)
    got = per_target(monkeypatch, lambda: train_gpt.EVALS[cut](cfg, runtime(), model, val), len(val.tokens))
    if cut == "sliding":
        windows = train_gpt.window_rows(115, cfg.eval_seq_len, cfg.eval_stride)
        starts = {start + i + 1: start for start, _, a, b in windows for i in range(a, b)}
    else:  # packed documents share a span of 48 tokens, contiguous rows are 16 long
        row = 48 if loader == "packed_docs" else cfg.eval_seq_len
        starts = {position: (position - 1) // row * row for position in range(1, 116)}
    for position, start in starts.items():
        first = context_of(start, position, val, loader)
        first += (position - 1 - first) // cfg.eval_seq_len * cfg.eval_seq_len  # a long document is cut, too
        assert got[position].item() == pytest.approx(direct(model, val, first, position), rel=2e-5, abs=2e-5)


@pytest.mark.parametrize(("cut", "loader"), [("sliding", "packed_docs"), ("sliding", "stream"), ("plain", "stream")])
def test_score_does_not_depend_on_the_batch(cut: str, loader: str, model: GPT) -> None:
    """Plain over packed documents does: a span ends where the batch ends, and cuts a document, as published."""
    val, scores = stream(150), []
    for batch in (64, 192, 1000):
        cfg = config(LOADER=loader, VAL_BATCH_TOKENS=batch)
        scores.append(score(all_units(cut, cfg, val), cfg, model, val))
    for other in scores[1:]:
        assert other.val_loss == pytest.approx(scores[0].val_loss, rel=1e-6)
        assert (other.tokens, other.bytes) == (scores[0].tokens, scores[0].bytes)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("loader", LOADERS)
def test_score_does_not_depend_on_the_ranks(cut: str, loader: str, model: GPT) -> None:
    cfg, val = config(LOADER=loader), stream(333)
    alone, shared = (score(all_units(cut, cfg, val, world), cfg, model, val) for world in (1, 4))
    assert shared.val_loss == pytest.approx(alone.val_loss, rel=1e-12)
    assert shared[2:4] == alone[2:4] == (333, int(val.bytes[1:].sum()))


# Causality, of the evaluators as they are


def evaluate(name: str, model: GPT, val: ValData, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    cfg = config()
    return per_target(monkeypatch, lambda: train_gpt.EVALS[name](cfg, runtime(), model, val), len(val.tokens))


@pytest.mark.parametrize("name", train_gpt.EVALS)
def test_later_token_never_changes_an_earlier_score(name: str, model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    val = stream(90, document=0.03)
    before = evaluate(name, model, val, monkeypatch)
    moved = 0
    for position in (11, 40, 77, 90):
        assert val.tokens[position] != BOS_ID
        tokens = val.tokens.copy()
        tokens[position] = 4 + (tokens[position] - 3) % (VOCAB - 4)
        after = evaluate(name, model, ValData(tokens, val.bytes), monkeypatch)
        assert torch.equal(before[1:position], after[1:position])
        assert before[position] != after[position]
        moved += int((before[position + 1 :] != after[position + 1 :]).sum())
    assert moved > 0, "later scores must see the change, or nothing has been shown"


@pytest.mark.parametrize("name", sorted(train_gpt.EVALS.keys() - {"chunk_sgd", "slot"}))  # which learn from all before
def test_another_document_never_changes_this_documents_score(
    name: str, model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    val = stream(120, seed=3)
    documents = train_gpt.val_documents(val.tokens)
    assert len(documents) > 3
    before = evaluate(name, model, val, monkeypatch)
    for start, length in documents[:: 3 if name == "doc_lora" else 1]:
        inside = np.arange(start + 1, start + length - 1)
        tokens = val.tokens.copy()
        tokens[inside] = 4 + (tokens[inside] - 3) % (VOCAB - 4)
        after = evaluate(name, model, ValData(tokens, val.bytes), monkeypatch)
        own = np.arange(start + 1, start + length)
        others = np.setdiff1d(np.arange(1, len(tokens)), own)
        assert torch.equal(before[others], after[others])
        assert not len(inside) or not torch.equal(before[own], after[own])


# The meter and its ledger


def by_hand(positions: list[int], val: ValData, learn: tuple[int, int] | None = None) -> Unit:
    """A unit of one row over the whole stream that scores these positions, and learns from a range of them."""
    row, cols = np.zeros(len(positions), np.int64), np.array(positions, np.int64) - 1
    unit = Unit(val.tokens[None, :-1], val.tokens[None, 1:], np.array([1]), row, cols)
    if learn is None:
        return unit
    return unit._replace(learn_rows=np.array([0]), learn_cols=slice(learn[0] - 1, learn[1] - 1))


def test_meter_adds_loss_tokens_and_credited_bytes() -> None:
    val = stream(10)
    meter = ByteMeter(val, runtime())
    nll = torch.arange(10, dtype=torch.float32)[None]
    meter.add(by_hand([1, 3, 5, 7, 9], val), nll)
    meter.add(by_hand([10, 8, 6, 4, 2], val), nll)
    result, size = meter.close(), int(val.bytes[1:].sum())
    assert (result.tokens, result.bytes, result.legal) == (10, size, True)
    assert result.val_loss == 4.5 and result.val_bpb == pytest.approx(45 / math.log(2) / size, rel=1e-15)


def test_meter_sums_in_float64() -> None:
    val = stream(1000)
    meter = ByteMeter(val, runtime())
    meter.add(by_hand(list(range(1, 1001)), val), torch.full((1, 1000), 0.1))
    assert meter.close().val_loss == pytest.approx(float(np.float32(0.1)), rel=1e-15)


def test_missing_target_is_found_at_the_end() -> None:
    val = stream(10)
    for missing in (1, 5, 10):
        meter = ByteMeter(val, runtime())
        meter.add(by_hand([p for p in range(1, 11) if p != missing], val), torch.ones(1, 10))
        with pytest.raises(AssertionError, match="1 targets are not scored exactly once"):
            meter.close()


@pytest.mark.parametrize("second", [[2], [1, 2, 3], [4, 4], [0]])
def test_second_score_of_a_target_is_refused(second: list[int]) -> None:
    val = stream(10)
    meter = ByteMeter(val, runtime())
    meter.add(by_hand([1, 2, 3], val), torch.ones(1, 10))
    with pytest.raises(AssertionError, match="scored twice"):
        meter.add(by_hand(second, val), torch.ones(1, 10))


class Reader:
    """A learner that notes what it does."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def score(self, unit: Unit) -> torch.Tensor:
        self.done.append(f"score {unit.scored().tolist()}")
        return torch.ones(unit.ids.shape)

    def learn(self, unit: Unit, nll: torch.Tensor) -> None:
        self.done.append(f"learn {unit.learnt().tolist()}")

    def after(self) -> None:
        self.done.append("after")


def test_each_unit_is_scored_before_it_is_learnt() -> None:
    val, reader = stream(4), Reader()
    meter = ByteMeter(val, runtime())
    train_gpt.score_first([by_hand([1, 2], val, (1, 3)), by_hand([3, 4], val, (2, 4))], reader, meter)
    assert reader.done == ["score [1, 2]", "learn [1, 2]", "score [3, 4]", "learn [2, 3]", "after"]
    assert meter.close().tokens == 4


def test_learning_from_an_unscored_target_is_refused_before_it_happens() -> None:
    val, reader = stream(4), Reader()
    with pytest.raises(AssertionError, match="not scored yet"):
        train_gpt.score_first([by_hand([1, 2], val, (2, 4))], reader, ByteMeter(val, runtime()))
    assert reader.done == ["score [1, 2]"]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_loss_that_is_not_finite_is_no_score(loss: float) -> None:
    val = stream(4)
    meter = ByteMeter(val, runtime())
    meter.add(by_hand([1, 2, 3, 4], val), torch.full((1, 4), loss))
    with pytest.raises(FloatingPointError, match="validation loss is"):
        meter.close()


def test_evaluation_leaves_the_weights_alone(model: GPT) -> None:
    val, cfg = stream(60), config()
    before = [p.clone() for p in model.parameters()]
    for name in train_gpt.EVALS.keys() - {"phased_lora"}:  # whose global updates are there to change them
        function = train_gpt.EVALS[name]
        result = function(cfg, runtime(), model, val)
        assert result.legal and result.tokens == 60, name
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), name
