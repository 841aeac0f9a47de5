"""The frontier stack: chunks by document length, the evaluation's budget, the length schedule, the recurrence mix.

Published numbers are those of golden/frontier.json; adapters by site are compared in test_ttt.py.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import golden_rules as rules
import numpy as np
import pytest
import torch
import ttt_rules

import train_gpt
from train_gpt import Config, UpTo

# Chunks by document length


def chunk_table(config: dict) -> tuple[UpTo, ...]:
    """TTT_CHUNK_SIZE of an entry: its table, or else one limit, or else one chunk for all."""
    short = config["steps"] or f"{config['short_doc_len']}:{config['short_chunk']}"
    text = f"{short},{config['chunk']}" if config["enabled"] else str(config["chunk"])
    return tuple(map(UpTo.parse, text.split(",")))


def stream_of(lengths: list[int]) -> train_gpt.ValData:
    """Documents of these lengths, each with the next one's BOS."""
    raw = [length - 1 for length in lengths]
    raw[-1] += 1
    return ttt_rules.golden_stream(raw, ttt_rules.VOCAB)


@rules.parametrize("short_doc_chunks", "frontier")
def test_chunks_by_document_length(golden: rules.Entry) -> None:
    c, want = golden.config, golden.expected
    table = chunk_table(c)
    found = [[length, train_gpt.up_to(table, length)] for length, _ in want["chunk_by_longest_document"]]
    assert found == want["chunk_by_longest_document"]
    lengths = [3 + (37 * i * i + 11 * i) % 2600 for i in range(60)]
    val, knobs = stream_of(lengths), {"ttt_eval_seq_len": c["window"], "ttt_batch_size": c["batch_docs"]}
    cfg, docs = Config(ttt_chunk_size=table, **knobs), train_gpt.val_documents(val.tokens)
    assert [length for _, length in docs] == lengths
    batches = train_gpt.document_batches(docs, c["batch_docs"])
    assert batches == [batch["docs"] for batch in want["batches_in_processing_order"]]
    for batch, expected in zip(batches, want["batches_in_processing_order"], strict=True):
        steps = list(train_gpt.batch_steps(cfg, val, docs, [batch]))
        assert (len(steps), {step.cells.chunk for step in steps}) == (expected["steps"], {expected["chunk"]})
        learnt = [step.cells.documents[step.lesson.rows] for step in steps if step.lesson is not None]
        updates = np.bincount(np.concatenate(learnt), minlength=len(docs))
        assert updates[batch].tolist() == expected["updates_per_doc"]
    windows = want["windows_predictions_chunk_[win_start,win_len,offset,len]"]
    for predictions, chunk, expected in windows:
        last = -(-predictions // chunk) - 1
        some = sorted({0, min(1, last), last})
        assert [list(train_gpt.chunk_window(i, predictions, chunk, c["window"])) for i in some] == expected


def test_a_table_of_chunks_changes_only_documents_that_have_another_chunk() -> None:
    """With a batch per document, as the published rule is by the longest of a batch."""
    cfg, val = ttt_rules.small_config(TTT_BATCH_SIZE=1, TTT_CHUNK_SIZE="8:2,4"), stream_of([5, 30, 8, 9, 3, 17])
    model = ttt_rules.strong_model(cfg)
    found = ttt_rules.scores_of(cfg, model, val)
    for size in (2, 4):
        one = dataclasses.replace(cfg, ttt_chunk_size=rules.always(size))
        alone = ttt_rules.scores_of(one, model, val)
        for start, length in train_gpt.val_documents(val.tokens):
            same = np.array_equal(alone[start + 1 : start + length], found[start + 1 : start + length])
            assert same == (size == (2 if length <= 8 else 4)) or length - 1 <= 2


# The budget of the evaluation


STREAM = ttt_rules.random_stream(400, seed=3)


class Ticking:
    """The program's time module: each scored batch of cells takes a second for every hundred of them."""

    def __init__(self, pace: float = 0.01) -> None:
        self.now, self.pace = 50.0, pace

    def perf_counter(self) -> float:
        return self.now

    time = perf_counter

    def spend(self, cells: train_gpt.Cells) -> None:
        self.now += self.pace * cells.ids.size


def timed(cfg: Config, monkeypatch: pytest.MonkeyPatch, seconds: float) -> tuple[train_gpt.Score, np.ndarray]:
    """The score of an evaluation that should end within so many fake seconds, and the nats of its targets."""
    clock, add = Ticking(), train_gpt.ByteMeter.add

    def adding(meter: train_gpt.ByteMeter, cells: train_gpt.Cells, nll: torch.Tensor) -> None:
        clock.spend(cells)
        add(meter, cells, nll)

    found: list[train_gpt.Score] = []
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "time", clock)
        patch.setattr(train_gpt.ByteMeter, "add", adding)
        row, model = train_gpt.EVALS[cfg.eval], ttt_rules.strong_model(cfg)

        def run() -> None:
            found.append(row(cfg, rules.runtime(), model, STREAM, clock.now + seconds))

        nats = ttt_rules.per_target(run, len(STREAM.tokens))
    return found[0], nats


ADAPTING = ["doc_lora", "phased_lora", "doc_lora TTT_CONTEXT=carry TTT_CHUNK_SIZE=8", "chunk_sgd", "slot"]


@pytest.mark.parametrize("name", ADAPTING)
def test_when_time_runs_out_the_rest_is_scored_unadapted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete and legal at every budget; what was scored in time is what it would have been anyway."""
    knobs = f"EVAL={name} TTT_BATCH_SIZE=2 PHASED_TTT_PREFIX_DOCS=6 PHASED_TTT_NUM_PHASES=2 LOADER=packed_docs"
    cfg = ttt_rules.small_config(**rules.knobs(knobs), GLOBAL_TTT_CHUNK_TOKENS=64)
    whole, nats = timed(cfg, monkeypatch, math.inf)
    plain = ttt_rules.scores_of(dataclasses.replace(cfg, eval="plain"), ttt_rules.strong_model(cfg), STREAM)
    assert whole.unadapted == 0 and whole.seconds > 4, "the seconds of a plain pass"
    before = -1
    for seconds in (-1.0, 0.3 * whole.seconds, 0.6 * whole.seconds, 3.0 * whole.seconds):
        score, cut = timed(cfg, monkeypatch, seconds)
        assert (score.tokens, score.bytes, score.legal) == (whole.tokens, whole.bytes, True)
        assert score.seconds < max(seconds, 0) + 6, "a plain pass, and a step that had begun"
        same = cut[1:] == nats[1:]
        adapted = score.tokens - score.unadapted
        assert same.sum() >= adapted >= before and bool(adapted) == (seconds > 0)
        if name.startswith("doc_lora"):
            np.testing.assert_allclose(cut[1:][~same], plain[1:][~same], rtol=0, atol=1e-5)
        before = adapted
    assert score.unadapted == 0 and same.all()


@dataclasses.dataclass(frozen=True)
class Rank(train_gpt.Runtime):
    """A rank in a thread: what rank 0 says reaches the others in its own time, and only lessons are barriers."""

    said: list = dataclasses.field(default_factory=list)
    heard: list = dataclasses.field(default_factory=list)
    messages: set = dataclasses.field(default_factory=set)
    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)

    def broadcast_from_rank0(self, value: float) -> float:
        with self.changed:
            (self.heard if self.rank else self.said).append(value)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: len(self.said) >= len(self.heard), 60), "nobody says anything"
            return self.said[len(self.heard if self.rank else self.said) - 1]

    def heard_from_rank0(self, message: str, said: bool) -> bool:
        with self.changed:
            self.messages.update({message} if said and not self.rank else ())
            return message in self.messages


def test_all_ranks_stop_by_the_clock_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it says so: within a segment, at a lesson, at the end. Nobody is left waiting, lessons are learnt by
    all or by none."""
    clock = Ticking()
    monkeypatch.setattr(train_gpt, "time", clock)
    lesson, scored = train_gpt.Step(None), train_gpt.Step(SimpleNamespace())
    plans = ([scored, scored, lesson, scored, lesson, scored], [scored, lesson, *[scored] * 4, lesson])
    for stop in range(8):
        first = Rank(0, 2, rules.CPU, train_gpt.Log(None, True))
        ranks, barrier = (first, dataclasses.replace(first, rank=1)), threading.Barrier(2, timeout=60)

        def run(rank: Rank, stop: int = stop, barrier: threading.Barrier = barrier) -> tuple[int, int, bool]:
            meter, done = train_gpt.ByteMeter(STREAM, rank), []
            # so many that a plain pass takes no time
            meter.cells = 10**9
            meter.started = 0.0
            for step in train_gpt.until_late(plans[rank.rank], meter, stop + 0.5 if rank.rank == 0 else -1.0):
                done.append(step.cells)
                if step is lesson:
                    barrier.wait()
                clock.now += rank.rank == 0
            return len(done), done.count(None), meter.late

        clock.now = 0.0
        with concurrent.futures.ThreadPoolExecutor() as pool:
            (steps, *zero), (_, *one) = pool.map(run, ranks)
        assert zero == one and zero[1] == (stop < 6) and steps == min(stop + 1, 7), (stop, steps, zero, one)


def test_two_processes_run_out_of_time_as_one(run_gpt: Callable, tmp_path: Path) -> None:
    folder, found = tmp_path / "run", []
    knobs = rules.knobs("EVAL=phased_lora EVAL_BUDGET_SECONDS=1e-9 PHASED_TTT_PREFIX_DOCS=4")
    for ranks, more in ((1, {}), (2, {"STAGES": "eval"}), (2, {"STAGES": "eval", "EVAL_BUDGET_SECONDS": "0"})):
        done = run_gpt(ranks=ranks, **knobs | more)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((folder / "result.json").read_text(encoding="utf-8")))
        assert found[-1]["legal"] and found[-1]["tokens_scored"] == found[0]["tokens_scored"]
    one, two, unlimited = found
    for result in (one, two):
        assert result["tokens_unadapted"] == result["tokens_scored"]
        assert result["val_bpb"] == pytest.approx(result["stages"]["quantized"]["val_bpb"], rel=1e-6)
        assert any(line.startswith("WARNING: EVAL_BUDGET_SECONDS=1e-09 did not suffice") for line in result["warnings"])
    assert unlimited["tokens_unadapted"] == 0 and unlimited["val_bpb"] != one["val_bpb"]
