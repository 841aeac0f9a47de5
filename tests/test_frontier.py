"""The frontier stack: chunks by document length, the evaluation's budget, the length schedule, the recurrence mix.

Published numbers are those of golden/frontier_training.json; adapters by site are compared in test_ttt.py.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
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


@pytest.mark.parametrize("length", [40, 48])
def test_contexts_that_divide_neither_a_batch_nor_a_global_step(length: int) -> None:
    """As 2,560 and 3,072 do at full size."""
    cfg = Config(eval_seq_len=64 * length, ttt_eval_seq_len=64 * length, train_seq_len=2048)
    assert cfg.problems() == []
    val = ttt_rules.random_stream(12 * length, seed=1, document=0.02)
    knobs = {"EVAL_SEQ_LEN": length, "TTT_EVAL_SEQ_LEN": length, "VAL_BATCH_TOKENS": 1024, "PHASED_TTT_PREFIX_DOCS": 4}
    for name in ("plain", "phased_lora"):
        cfg = ttt_rules.small_config(EVAL=name, GLOBAL_TTT_CHUNK_TOKENS=64, PHASED_TTT_NUM_PHASES=1, **knobs)
        score = ttt_rules.evaluate(cfg, ttt_rules.strong_model(cfg), val)
        assert (score.tokens, score.legal) == (12 * length, True) and math.isfinite(score.val_loss), name


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


ADAPTING = ["sliding", "doc_lora", "phased_lora", "doc_lora TTT_CONTEXT=carry TTT_CHUNK_SIZE=8", "chunk_sgd", "slot"]


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

    def is_late(self, says: bool) -> bool:
        with self.changed:
            self.messages.update({"late"} if says and not self.rank else ())
            return bool(self.messages)


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


def test_waiting_for_other_ranks_says_nothing_of_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking()
    monkeypatch.setattr(train_gpt, "time", clock)
    lesson, scored = train_gpt.Step(None), train_gpt.Step(SimpleNamespace())
    meter = train_gpt.ByteMeter(STREAM, rules.runtime())
    clock.now, meter.cells, meter.started = 0.0, 0, 0.0
    # a lesson first: this rank had nothing to score before it, and then waited for those that had
    for step in train_gpt.until_late([lesson, *[scored] * 20], meter, 100.0):
        clock.now += 50.0 if step is lesson else 1.0
        meter.cells += (step is scored) * len(STREAM.tokens) // 20
    assert not meter.late and clock.now == 71.0


def test_two_processes_run_out_of_time_as_one(run_gpt: Callable, tmp_path: Path) -> None:
    folder, found = tmp_path / "run", []
    knobs = rules.knobs("EVAL=phased_lora EVAL_BUDGET_SECONDS=1e-9 PHASED_TTT_PREFIX_DOCS=4")
    for ranks, more in ((1, {}), (2, {"STAGES": "eval"}), (2, {"STAGES": "eval", "EVAL_BUDGET_SECONDS": "0"})):
        run_gpt(ranks=ranks, **knobs | more)
        found.append(json.loads((folder / "result.json").read_text(encoding="utf-8")))
        assert found[-1]["legal"] and found[-1]["tokens_scored"] == found[0]["tokens_scored"]
    one, two, unlimited = found
    for result in (one, two):
        # a busy machine may let the other rank score a chunk before it hears of the time, with fresh adapters
        assert result["tokens_scored"] - 64 <= result["tokens_unadapted"] <= result["tokens_scored"]
        assert result["val_bpb"] == pytest.approx(result["stages"]["quantized"]["val_bpb"], rel=1e-6)
        assert any(line.startswith("WARNING: EVAL_BUDGET_SECONDS=1e-09 did not suffice") for line in result["warnings"])
    assert unlimited["tokens_unadapted"] == 0 and unlimited["val_bpb"] != one["val_bpb"]


# The schedule of spans


def schedule_config(c: dict, **knobs: object) -> Config:
    table = train_gpt.load_config({"TRAIN_SEQ_SCHEDULE": c["schedule"], "TRAIN_BATCH_TOKENS": "786432"})
    knobs |= {"warmdown_frac": c["warmdown_frac"], "min_lr": c["min_lr"]}
    # a ramp of no steps is one of a single step
    knobs["seq_change_warmup_steps"] = max(1, c["rewarm_steps"])
    return dataclasses.replace(table, train_seq_len=c["default"], iterations=c["iterations"], **knobs)


def test_spans_and_learning_rates_of_a_schedule() -> None:
    """Where an entry's default is not its longest span, as nowhere, it would be the span after the last limit."""
    for golden in rules.entries("seq_schedule", "frontier")[:-1]:
        c, want = golden.config, golden.expected
        cfg = schedule_config(c, max_wallclock_seconds=0.0 if c["mode"] == "step" else c["max_wallclock_ms"] / 1e3)
        plan = [[limit, span] for limit, span in sorted(cfg.train_seq_schedule)]
        plan += [[1.0, cfg.train_seq_len]] * (not plan or plan[-1][0] < 1)
        assert plan == want["plan_fraction_length"], golden.name
        due = train_gpt.STAGES["span"]
        for fraction, step, span, progress in want["fraction_step_length_progress"]:
            assert due(cfg, train_gpt.Progress(step, progress, 1.0)) == span, (golden.name, fraction)
            if c["mode"] == "step":
                clock = train_gpt.Clock(rules.runtime(), 0.0, cfg.iterations)
                assert min(clock.fraction(step), 1.0) == pytest.approx(progress), golden.name
        for fraction, multiplier in want["lr_multiplier_before_ramp"]:
            found = train_gpt.Progress.at(cfg, fraction, 0).multiplier
            assert found == pytest.approx(multiplier, rel=1e-9), (golden.name, fraction)


@pytest.mark.parametrize("name", ["published", "by_step", "unsorted_short"])
def test_learning_rates_rise_after_a_change_of_the_span_alone(name: str) -> None:
    golden = next(e for e in rules.entries("seq_schedule", "frontier") if e.name.endswith(name))
    small = {"num_layers": 1, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 64, "rope_dims": 4}
    small |= {"num_loops": 0, "parallel_start_layer": 0, "average": (), "warmdown_frac": 0.0}
    cfg = dataclasses.replace(schedule_config(golden.config), **small)
    trainer, rates = train_gpt.Trainer(cfg, rules.runtime(), train_gpt.GPT(cfg).init_weights(0), None), []
    trainer.step = lambda batches, multiplier, step, rounded: rates.append(multiplier)
    ramp = golden.expected["ramp_by_steps_since_switch"]
    (limit, _), *_ = golden.expected["plan_fraction_length"]
    for step in range(3):
        trainer.advance({}, 0.0, step)
    for step in range(len(ramp)):
        trainer.advance({}, limit + 0.01, 3 + step)
    assert rates == [1.0] * 3 + ramp


def test_every_span_divides_the_tokens_of_a_slice() -> None:
    (golden,) = (e for e in rules.entries("seq_schedule", "frontier") if e.name.endswith("divisibility"))
    for lengths, tokens, ranks, accumulation, found in golden.expected["rows"]:
        knobs = {"train_seq_schedule": tuple(UpTo((i + 1) / 9, span) for i, span in enumerate(lengths))}
        knobs |= {"train_batch_tokens": tokens, "batch_slices": ranks * accumulation, "train_seq_len": max(lengths)}
        problems = Config(**knobs, eval_seq_len=64).problems()
        assert [("every span of" in line) for line in problems] == [True] * (found == "error"), lengths


def test_a_schedule_changes_segments_and_no_token(run_gpt: Callable, tmp_path: Path) -> None:
    """Also on two processes, whose ranks change the span at the same step."""
    losses = []
    for ranks in (1, 2):
        knobs = {"TRAIN_SEQ_SCHEDULE": "16@0.3,32@0.6", "SEQ_CHANGE_WARMUP_STEPS": 2, "OVERWRITE": 1, "EVAL": "plain"}
        done = run_gpt(ranks=ranks, **knobs)
        said = [line for line in done.out.splitlines() if line.startswith("span ")]
        assert [line.split(", ")[0] for line in said] == [
            "span 16 from step 0",
            "span 32 from step 3",
            "span 64 from step 5",
        ]
        losses.append(json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    text = (tmp_path / "run" / "record.env").read_text(encoding="utf-8")
    assert "TRAIN_SEQ_SCHEDULE=0.3:16,0.6:32\n" in text


def test_batches_of_a_step_are_the_same_text_in_other_segments(tiny_data: Path) -> None:
    sizes = "TRAIN_SEQ_LEN=64 TRAIN_SEQ_SCHEDULE=16@0.25,32@0.7 TRAIN_BATCH_TOKENS=256 BATCH_SLICES=2 VOCAB_SIZE=320"
    cfg = rules.toy_config(f"{sizes} DATA_PATH={tiny_data}")
    with contextlib.closing(train_gpt.train_batches(cfg, rules.runtime())) as batches:
        for step in itertools.islice(batches, 3):
            assert step.keys() == {16, 32, 64}
            for span, cut in step.items():
                for batch, whole in zip(cut, step[64], strict=True):
                    assert torch.equal(batch.ids, whole.ids) and torch.equal(batch.targets, whole.targets)
                    assert set(whole.cu_seqlens.tolist()) <= set(batch.cu_seqlens.tolist())
                    assert batch.cu_seqlens.diff().max() <= span


# The recurrence mix


def mixed(c: dict) -> tuple[float, ...]:
    """LOOP_MIX of an entry: beta and alpha of each layer."""
    rows = [[beta, *alpha] for beta, alpha in zip(c["beta"], c["alpha"], strict=True)]
    return tuple(itertools.chain.from_iterable(rows))


@rules.parametrize("loop_mix", "frontier")
def test_recurrence_mix(golden: rules.Entry) -> None:
    """Losses, gradients, and the same through fresh adapters."""
    c, want = golden.config, golden.expected
    model, (ids, targets) = rules.build(c, loop_mix=mixed(c)), rules.rows_of(c)
    assert model.cfg.problems() == []
    bounds = train_gpt.segment_bounds(np.array([b for b in c["bos"] if b < c["T"]]), c["T"], c["max_doc_len"])
    cu_seqlens = torch.from_numpy(train_gpt.pad_bounds(bounds))
    meta = model.plan(c["T"], rules.CPU, cu_seqlens, 0, c["rows"]) if c["varlen"] else None
    hidden = model.trunk(ids, meta)
    nll = model(ids, targets, meta, reduction="none")
    flat, (layers, n) = nll.flatten(), (model.route.layers, model.route.num_encoder)
    if c["loop_on"]:
        assert [list(layers[:n]), list(layers[n:])] == [want["encoder"], want["decoder"]]
    found = {"nll_sum": flat.sum(), "nll_mean": flat.mean(), "nll_first8": flat[:8], "nll_last4": flat[-4:]}
    found |= {"hidden": hidden.detach(), "plain_causal_nll_sum": model(ids, targets, reduction="none").sum()}
    adapters = train_gpt.Adapters(model.cfg, rules.runtime(torch.float64), model, c["rows"])
    for row in range(c["rows"]):
        adapters.renew(row, row)
    through = model(ids, targets, None, adapters, "none").sum()
    found["plain_causal_nll_sum_by_adapter_forward_B0"] = through
    apart = ("encoder", "decoder", "grad_l2", "grad_wsum", "grad_l2_total")
    rules.compare(found, want, skip=apart)
    nll.mean().backward()
    grads = rules.by_published_name(model.cfg, {name: p.grad for name, p in model.named_parameters()})
    for name, norm in want["grad_l2"].items():
        rules.assert_checks(grads[name], {"l2": norm, "wsum": want["grad_wsum"][name]})
    total = torch.stack([grad.norm() for grad in grads.values() if grad is not None]).norm()
    assert total.item() == pytest.approx(want["grad_l2_total"], rel=rules.REL)


def test_a_model_with_another_mix_is_another_model() -> None:
    """Its artifact is refused: the numbers are knobs, which travel with it."""
    cfg = dataclasses.replace(Config(), loop_mix=(1.5, 0.25, 0.0, 0.0) * 3)
    assert cfg.problems() == [] and "LOOP_MIX=1.5,0.25,0.0,0.0,1.5," in train_gpt.record_env(cfg)
    assert train_gpt.load_config(dict([train_gpt.record_env(cfg).strip().split("=", 1)])) == cfg
    assert train_gpt.model_identity(cfg) != train_gpt.model_identity(Config())
    for knobs in ({"loop_mix": (1.0,)}, {"loop_mix": (1.0,) * 12, "parallel_start_layer": 5}):
        (problem,) = dataclasses.replace(cfg, **knobs).problems()
        assert "LOOP_MIX must list n + 1 numbers" in problem
