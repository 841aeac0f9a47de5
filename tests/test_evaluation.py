"""Evaluation: every target is scored once, in its right context, by the right bytes, on any number of ranks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import golden_rules as rules
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ttt_rules import evaluate, random_stream, scores_of, small_config, strong_model

import train_gpt
from train_gpt import BOS_ID, GPT, ByteMeter, Cells, Config, Lesson, NoAdaptation, Runtime, SharedLesson, Step, ValData

GOLDEN = json.loads((Path(__file__).parent / "golden" / "evaluation.json").read_text(encoding="utf-8"))
PROPERTY = settings(max_examples=40)
CUTS = ("plain", "sliding")
LOADERS = tuple(train_gpt.LOADERS)


def runtime(rank: int = 0, world: int = 1) -> Runtime:
    """A rank of a world that nobody launched; only world 1 may add up."""
    return dataclasses.replace(rules.runtime(), rank=rank, world=world)


@pytest.fixture(scope="module")
def model() -> GPT:
    return strong_model(small_config())


def all_steps(cut: str, cfg: Config, val: ValData, world: int = 1) -> list[Step]:
    """The steps of every rank."""
    return [step for rank in range(world) for step in train_gpt.EVALS[cut].steps(cfg, runtime(rank, world), val)]


def score(steps: list[Step], cfg: Config, model: GPT, val: ValData) -> train_gpt.Score:
    meter = ByteMeter(val, runtime())
    train_gpt.score_first(steps, NoAdaptation(cfg, runtime(), model, val), meter)
    return meter.close()


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


def test_windows_equal_the_published_ones_without_their_repeats() -> None:
    """The published scripts go on after the window that reaches the end and score the last tokens again, up to
    length / stride times. A target counts once here, so those rows are dropped; all others are equal."""
    for case in GOLDEN["windows"]:
        wanted = [row for i, row in enumerate(case["rows"]) if i == 0 or row[3] > case["rows"][i - 1][3]]
        rows = train_gpt.window_rows(case["targets"], case["length"], case["stride"])
        assert [[start, length, start + a, start + b] for start, length, a, b in rows] == wanted, case["name"]
        assert sum(b - a for _, _, a, b in rows) == case["unique_scored"] == case["targets"], case["name"]
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


# Steps


@given(
    cut=st.sampled_from(CUTS),
    loader=st.sampled_from(LOADERS),
    num_targets=st.integers(1, 260),
    world=st.sampled_from([1, 2, 4]),
    batch=st.integers(64, 400),
    seed=st.integers(0, 9),
)
@settings(PROPERTY, max_examples=120)
def test_steps_score_each_target_once_and_hold_its_tokens(
    cut: str, loader: str, num_targets: int, world: int, batch: int, seed: int
) -> None:
    cfg, val = small_config(LOADER=loader, VAL_BATCH_TOKENS=batch), random_stream(num_targets, seed)
    steps = all_steps(cut, cfg, val, world)
    assert sorted(p for cells, _ in steps for p in cells.scored()) == list(range(1, num_targets + 1))
    for cells, lesson in steps:
        positions = cells.scored()
        assert np.array_equal(cells.targets[cells.rows, cells.cols], val.tokens[positions])
        assert np.array_equal(cells.ids[cells.rows, cells.cols], val.tokens[positions - 1])
        assert cells.ids.shape == cells.targets.shape == steps[0].cells.ids.shape, "one shape: one compiled graph"
        assert cells.ids.size <= batch // cfg.batch_slices and lesson is None


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("loader", LOADERS)
def test_evaluators_equal_one_bare_forward_per_target(cut: str, loader: str) -> None:
    """Without smear: at the cut of a long document it takes from the token before the cut, as published."""
    cfg, val = small_config(EVAL=cut, LOADER=loader, EMBED_EXTRAS="none"), random_stream(115)
    model = strong_model(cfg)
    got = scores_of(cfg, model, val)
    if cut == "sliding":
        windows = train_gpt.window_rows(115, cfg.eval_seq_len, cfg.eval_stride)
        starts = {start + i + 1: start for start, _, a, b in windows for i in range(a, b)}
    else:  # packed documents share a span of 48 tokens, contiguous rows are 16 long
        row = 48 if loader == "packed_docs" else cfg.eval_seq_len
        starts = {position: (position - 1) // row * row for position in range(1, 116)}
    for position, start in starts.items():
        first = context_of(start, position, val, loader)
        first += (position - 1 - first) // cfg.eval_seq_len * cfg.eval_seq_len  # a long document is cut, too
        assert got[position] == pytest.approx(direct(model, val, first, position), rel=2e-5, abs=2e-5)


def test_only_scored_cells_get_a_score() -> None:
    cfg, val = small_config(), random_stream(150)
    model = strong_model(cfg)
    scorer = NoAdaptation(cfg, rules.runtime(), model, val)
    for cells, _ in train_gpt.sliding_steps(cfg, rules.runtime(), val):
        few = scorer.score(cells)
        with torch.no_grad():
            whole = model(*scorer.inputs(cells), None, "none")
        torch.testing.assert_close(few[cells.rows, cells.cols], whole[cells.rows, cells.cols], rtol=2e-5, atol=2e-6)
        hidden = torch.ones(cells.ids.shape, dtype=torch.bool)
        hidden[cells.rows, cells.cols] = False
        assert few[hidden].isnan().all(), "a cell that is not scored must not look like a score"


def test_score_does_not_depend_on_the_batch(model: GPT) -> None:
    """Plain over packed documents does: a span ends where the batch ends, and cuts a document, as published."""
    val = random_stream(150)
    for cut, loader in (("sliding", "packed_docs"), ("sliding", "stream"), ("plain", "stream")):
        cfgs = [small_config(LOADER=loader, VAL_BATCH_TOKENS=batch) for batch in (64, 192, 1000)]
        first, *others = (score(all_steps(cut, cfg, val), cfg, model, val) for cfg in cfgs)
        for other in others:
            assert other.val_loss == pytest.approx(first.val_loss, rel=1e-6), (cut, loader)
            assert (other.tokens, other.bytes) == (first.tokens, first.bytes), (cut, loader)


def test_score_does_not_depend_on_the_ranks(model: GPT) -> None:
    val = random_stream(333)
    for cut, loader in itertools.product(CUTS, LOADERS):
        cfg = small_config(LOADER=loader)
        alone, shared = (score(all_steps(cut, cfg, val, world), cfg, model, val) for world in (1, 4))
        assert shared.val_loss == pytest.approx(alone.val_loss, rel=1e-12), (cut, loader)
        assert shared[2:4] == alone[2:4] == (333, int(val.bytes[1:].sum())), (cut, loader)


# The meter and its ledger


def by_hand(positions: list[int], val: ValData, learn: tuple[int, int] | None = None) -> Step:
    """One row over the whole stream: these positions are scored, and a range of them learnt."""
    row, cols = np.zeros(len(positions), np.int64), np.array(positions, np.int64) - 1
    cells = Cells(val.tokens[None, :-1], val.tokens[None, 1:], np.array([1]), row, cols)
    return Step(cells, learn and Lesson(np.array([0]), slice(learn[0] - 1, learn[1] - 1)))


def test_meter_adds_loss_tokens_and_credited_bytes() -> None:
    val = random_stream(10)
    meter = ByteMeter(val, runtime())
    nll = torch.arange(10, dtype=torch.float32)[None]
    meter.add(by_hand([1, 3, 5, 7, 9], val).cells, nll)
    meter.add(by_hand([10, 8, 6, 4, 2], val).cells, nll)
    result, size = meter.close(), int(val.bytes[1:].sum())
    assert (result.tokens, result.bytes, result.legal) == (10, size, True)
    assert result.val_loss == 4.5 and result.val_bpb == pytest.approx(45 / math.log(2) / size, rel=1e-15)
    val = random_stream(1000)
    meter = ByteMeter(val, runtime())
    meter.add(by_hand(list(range(1, 1001)), val).cells, torch.full((1, 1000), 0.1))
    assert meter.close().val_loss == pytest.approx(float(np.float32(0.1)), rel=1e-15), "sums are float64"


def test_missing_second_and_infinite_scores_are_refused() -> None:
    val, every = random_stream(10), list(range(1, 11))
    for missing in (1, 5, 10):
        meter = ByteMeter(val, runtime())
        meter.add(by_hand([p for p in every if p != missing], val).cells, torch.ones(1, 10))
        with pytest.raises(AssertionError, match="1 targets are not scored exactly once"):
            meter.close()
    for second in ([2], [1, 2, 3], [4, 4], [0]):
        meter = ByteMeter(val, runtime())
        meter.add(by_hand([1, 2, 3], val).cells, torch.ones(1, 10))
        with pytest.raises(train_gpt.LegalityError, match="scored twice"):
            meter.add(by_hand(second, val).cells, torch.ones(1, 10))
    for loss in (math.nan, math.inf):
        meter = ByteMeter(val, runtime())
        meter.add(by_hand(every, val).cells, torch.full((1, 10), loss))
        with pytest.raises(FloatingPointError, match="validation loss is"):
            meter.close()


class Reader:
    """A learner that notes what it does."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def score(self, cells: Cells) -> torch.Tensor:
        self.done.append(f"score {cells.scored().tolist()}")
        return torch.ones(cells.ids.shape)

    def learn(self, lesson: Lesson | SharedLesson, cells: Cells | None, nll: torch.Tensor | None) -> None:
        self.done.append(f"learn {lesson.targets(cells).tolist()}")


def test_cells_are_scored_before_they_are_learnt() -> None:
    val, reader = random_stream(4), Reader()
    meter = ByteMeter(val, runtime())
    shared = Step(None, SharedLesson((range(3, 5), range(1, 2))))
    train_gpt.score_first([by_hand([1, 2], val, (1, 3)), by_hand([3, 4], val, (2, 4)), shared], reader, meter)
    assert reader.done == ["score [1, 2]", "learn [1, 2]", "score [3, 4]", "learn [2, 3]", "learn [3, 4, 1]"]
    assert meter.close().tokens == 4
    assert shared.lesson.tokens().tolist() == [2, 3, 4, 0, 1]


def test_learning_from_an_unscored_target_is_refused_before_it_happens() -> None:
    val = random_stream(4)
    for wrong, message in (
        (by_hand([1, 2], val, (2, 4)), "not scored yet"),
        (Step(by_hand([1, 2], val).cells, SharedLesson((range(1, 4),))), "no rank has scored"),
    ):
        reader = Reader()
        with pytest.raises(train_gpt.LegalityError, match=message):
            train_gpt.score_first([wrong], reader, ByteMeter(val, runtime()))
        assert reader.done == ["score [1, 2]"]


def test_evaluation_leaves_the_weights_alone(model: GPT) -> None:
    val, before = random_stream(60), [p.clone() for p in model.parameters()]
    for name in train_gpt.EVALS.keys() - {"phased_lora"}:  # whose global updates are there to change them
        result = evaluate(small_config(EVAL=name), model, val)
        assert result.legal and result.tokens == 60, name
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), name


def test_sliding_gives_more_context_than_plain(model: GPT) -> None:
    plain, sliding = (scores_of(small_config(EVAL=cut, LOADER="stream"), model, random_stream(150)) for cut in CUTS)
    np.testing.assert_allclose(plain[1:17], sliding[1:17], rtol=0, atol=1e-4)  # the first window is whole
    assert not np.isnan(plain[1:]).any() and not np.allclose(plain[17:], sliding[17:], atol=1e-3)
