"""Training: the order of the data, schedules, the clock, averages, quantisation-aware training, runs on two ranks."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import golden_rules as rules
import pytest
import torch
import ttt_rules
from conftest import Done
from golden_rules import numbered_shards, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import train_gpt
from train_gpt import Config, UserError

SMALL = """
VOCAB_SIZE=97 NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=2 ROPE_DIMS=4 NUM_LOOPS=0
PARALLEL_START_LAYER=0 EMBED_EXTRAS=bigram BIGRAM_VOCAB_SIZE=61 BIGRAM_DIM=12 TRAIN_BATCH_TOKENS=64 BATCH_SLICES=2
TRAIN_SEQ_LEN=32
"""


def trainer(**changed: Any) -> train_gpt.Trainer:
    cfg = rules.toy_config(SMALL, **changed)
    runtime = dataclasses.replace(rules.runtime(compile=cfg.compile == "on"), log=train_gpt.Log(None, False))
    return train_gpt.Trainer(cfg, runtime, train_gpt.GPT(cfg).init_weights(3), None)


# The order of the data


def deck_config(folder: Path, **knobs: Any) -> Config:
    knobs = {"vocab_size": 10_000, "train_seq_len": 32, "train_batch_tokens": 64} | knobs
    return Config(data_path=str(folder), loader="shuffled", **knobs)


@given(st.lists(st.integers(40, 400), min_size=1, max_size=5), st.sampled_from([1, 2, 4]), st.integers(2, 9))
@settings(max_examples=30)
def test_each_sequence_is_dealt_once_and_no_two_slices_share_text(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], slices: int, length: int
) -> None:
    """Also with fewer shards than slices: those are cut into pieces."""
    folder = write_shards(tmp_path_factory.mktemp("shuffled"), *numbered_shards(lengths))
    cfg = deck_config(folder, batch_slices=slices, train_seq_len=length, train_batch_tokens=slices * length)
    dealt: list[set[int]] = [set() for _ in range(slices)]
    usable = min(lengths) // max(1, -(-slices // len(lengths))) // length - 2
    for step in itertools.islice(train_gpt.shuffled_rows(cfg, range(slices)), max(1, usable)):
        for own, rows in zip(dealt, step, strict=True):
            inputs = set(rows[:, :-1].flatten().tolist())
            assert not inputs & own
            own |= inputs
    assert sum(map(len, dealt)) == len(set().union(*dealt))


def test_too_little_text_or_a_foreign_id_is_a_user_error(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", *numbered_shards([200, 20]))
    for slices, vocab, message in (
        (2, 10_000, r"do not give each of BATCH_SLICES=2 a sequence of TRAIN_SEQ_LEN=32"),
        (1, 100, "is outside VOCAB_SIZE=100"),
    ):
        cfg = deck_config(folder, batch_slices=slices, vocab_size=vocab)
        with pytest.raises(UserError, match=message):
            list(itertools.islice(train_gpt.shuffled_rows(cfg, range(1)), 3))
    assert next(train_gpt.shuffled_rows(deck_config(folder, batch_slices=1), range(1)))


def test_rows_shift_targets_and_ignore_documents(tmp_path: Path) -> None:
    tokens = torch.arange(200).numpy() % 7 + 1  # full of document starts
    cfg = deck_config(write_shards(tmp_path / "data", tokens), batch_slices=1)
    with contextlib.closing(train_gpt.train_batches(cfg, rules.runtime())) as batches:
        (batch,) = next(batches)[32]
    assert batch.cu_seqlens is None and batch.ids.shape == batch.targets.shape == (2, 32)
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1]) and batch.ids.dtype == torch.int64


# Schedules and averages


def test_warmdown_is_a_share_or_steps_which_may_be_more_than_the_run_has() -> None:
    assert train_gpt.warmdown_share(Config(warmdown_frac=0.4), 0.7, 30) == 0.4
    assert train_gpt.warmdown_share(Config(warmdown_iters=5), 0.0, 0) == 0.0
    assert train_gpt.lr_multiplier(0.0, 0.0, 0.1) == 1.0
    # as published: (ITERATIONS - step) / WARMDOWN_ITERS from the first step on
    cfg = train_gpt.Config(warmdown_iters=40, iterations=10, max_wallclock_seconds=0.0, min_lr=0.0)
    found = [train_gpt.Progress.at(cfg, step / 10, step).multiplier for step in range(10)]
    assert found == pytest.approx([(10 - step) / 40 for step in range(10)], rel=1e-12)


def test_swa_of_ema_averages_the_averages() -> None:
    cfg = Config(average=("swa", "ema"), ema_decay=0.5, swa_every=1)
    weight = torch.zeros(1)
    chain, seen = train_gpt.averages_of(cfg, [weight]), []
    assert list(chain) == ["ema", "swa"]
    for step in range(1, 4):
        weight.fill_(float(step))
        for average in chain.values():
            average.update()
        seen.append(chain["ema"].shadow[0].item())
    assert chain["swa"].shadow[0].item() == pytest.approx(sum(seen) / 3)
    assert train_gpt.averages_of(Config(average=()), [weight]) == {}


def test_swa_that_collected_nothing_says_so_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    at = trainer(average=("swa",))
    before = copy.deepcopy(at.model.state_dict())
    at.store_average()
    assert "WARNING: no step was a multiple of SWA_EVERY" in capsys.readouterr().out
    assert all(torch.equal(p, before[name]) for name, p in at.model.state_dict().items())


# The clock


@dataclasses.dataclass(frozen=True)
class FakeRank(train_gpt.Runtime):
    """A rank whose collective calls hand on what rank 0 said, through a shared list."""

    said: list = dataclasses.field(default_factory=list)
    heard: list = dataclasses.field(default_factory=list)

    def broadcast_from_rank0(self, value: float) -> float:
        (self.heard if self.rank else self.said).append(value)
        return self.said[len(self.heard) - 1]

    def barrier(self) -> None:
        """The other rank is there."""


def fake_rank(rank: int = 0, said: list | None = None) -> FakeRank:
    return FakeRank(rank, 2, rules.CPU, train_gpt.Log(None, True), said=[] if said is None else said)


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The program's time module; its perf_counter moves when `now` is set."""
    time = SimpleNamespace(now=100.0, perf_counter=lambda: time.now)
    monkeypatch.setattr(train_gpt, "time", time)
    return time


def run_clock(clock: train_gpt.Clock, time: SimpleNamespace, step_seconds: list[float]) -> list[float]:
    """Fractions of each step until the clock says stop; the last of step_seconds goes on."""
    fractions, seconds = [], itertools.chain(step_seconds, itertools.repeat(step_seconds[-1]))
    clock.start()
    while not fractions or fractions[-1] < 1:
        fractions.append(clock.fraction(len(fractions)))
        time.now += next(seconds)
    return fractions


def test_clock_follows_time_and_stops_at_the_budget_or_the_step_limit(fake_time: SimpleNamespace) -> None:
    runtime = fake_rank()
    fractions = run_clock(train_gpt.Clock(runtime, 60.0, 10_000), fake_time, [0.5])
    assert fractions == pytest.approx([step * 0.5 / 60 for step in range(121)])
    assert len(runtime.said) < 40  # most steps are extrapolated, without waiting for the device
    fractions = run_clock(train_gpt.Clock(runtime, 0.0, 8), fake_time, [50.0])
    assert fractions == [step / 8 for step in range(9)], "without a budget"
    fractions = run_clock(train_gpt.Clock(fake_rank(), 1e6, 5), fake_time, [1.0])
    assert len(fractions) == 6 and fractions[-1] == 1, "the limit comes before the budget"
    # and a slower step is caught within the stride
    fractions = run_clock(train_gpt.Clock(fake_rank(), 60.0, 10_000), fake_time, [0.5] * 50 + [2.0])
    spent = [min(step, 50) * 0.5 + max(step - 50, 0) * 2.0 for step in range(len(fractions))]
    worst = max(abs(f - s / 60) for f, s in zip(fractions, spent, strict=True))
    assert worst < 1.5 * train_gpt.Clock.EVERY / 60
    assert 60 <= spent[-1] < 60 + 2 * 2.0


def test_clock_measures_again_after_a_change_and_goes_on_after_a_pause(fake_time: SimpleNamespace) -> None:
    runtime = fake_rank()
    clock = train_gpt.Clock(runtime, 600.0, 10_000)
    clock.start()
    for step in range(30):
        clock.fraction(step)
        fake_time.now += 1.0
    readings = len(runtime.said)
    fake_time.now += 7.0
    clock.expect_change()
    assert clock.fraction(30) == pytest.approx(37 / 600) and len(runtime.said) == readings + 1
    elapsed = clock.read()
    fake_time.now += 1000  # a validation
    clock.start(elapsed)
    fake_time.now += 5
    assert math.isclose(clock.read(), 42)


def test_the_clock_starts_when_all_ranks_are_there(fake_time: SimpleNamespace) -> None:
    class Waiting(FakeRank):
        def barrier(self) -> None:
            fake_time.now += 5.0

    clock = train_gpt.Clock(Waiting(0, 2, rules.CPU, train_gpt.Log(None, True)), 60.0, 100)
    clock.start()
    assert clock.read() == 0.0


def test_the_fraction_never_falls(fake_time: SimpleNamespace) -> None:
    """A slow step, such as one with a checkpoint, makes the clock guess too much, which the next reading corrects."""
    clock = train_gpt.Clock(fake_rank(), 600.0, 10_000)
    clock.start()
    fractions = []
    for step in range(60):
        if step == 25:
            clock.expect_change()
        fractions.append(clock.fraction(step))
        fake_time.now += 30.0 if step == 19 else 0.5
    assert fractions == sorted(fractions) and fractions[-1] == pytest.approx((59 * 0.5 + 29.5) / 600)


def test_every_rank_reads_the_same_clock(fake_time: SimpleNamespace) -> None:
    first = fake_rank()
    second = fake_rank(1, first.said)
    fractions = run_clock(train_gpt.Clock(first, 20.0, 10_000), fake_time, [0.3, 0.5, 0.4])
    drifted = run_clock(train_gpt.Clock(second, 20.0, 10_000), fake_time, [0.9, 0.1, 0.7])
    assert drifted == fractions
    assert second.heard != first.said[: len(second.heard)]  # its own clock did say otherwise


# Quantisation-aware training


def one_batch() -> dict[int, list[train_gpt.Batch]]:
    ids = torch.from_numpy(rules.tokens(97, 65, []))
    return {32: [train_gpt.Batch(ids[:-1].view(2, 32), ids[1:].view(2, 32), None)]}


@pytest.mark.parametrize("compiled", [False, True])
def test_ste_sees_the_grid_and_its_gradient_goes_straight_through(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the graph was compiled without it: what the published program missed."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    at = trainer(qat="ste", matrix_quant="gptq_lite", embed_bits=8, compile="on" if compiled else "off")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in at.model.parameters():  # zeros of the initial values have nothing to round
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    before = copy.deepcopy(at.model.state_dict())
    gradients = []
    at.optimisers.step = lambda multiplier, step: gradients.append(  # the gradient as the optimiser would have it
        {n: p.grad.clone() for n, p in at.model.named_parameters()} | {"loss": at.loss.clone()}
    )
    for fraction in (0.0, 0.99):
        at.model.zero_grad()
        at.advance(one_batch(), fraction, 0 if fraction == 0 else 5)
    rounded = copy.deepcopy(at.model)
    with torch.no_grad():
        for name, p in rounded.named_parameters():
            if name.startswith("blocks.") and p.ndim == 2 and p.size(0) > 2:
                p.copy_(train_gpt.fake_quantize(p, (p.abs().amax(dim=1) / 31).clamp_min(2.0**-24), 6))
    rounded.zero_grad()
    (batch,) = one_batch()[32]
    loss = rounded(batch.ids, batch.targets, rounded.plan(32, rules.CPU, None, 32, rows=2))
    loss.backward()
    assert gradients[0]["loss"] != gradients[1]["loss"]
    torch.testing.assert_close(gradients[1]["loss"], loss.detach())
    for name, p in rounded.named_parameters():
        torch.testing.assert_close(gradients[1][name], p.grad, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in at.model.state_dict().items()), "the weights come back"


def rounded_names(at: train_gpt.Trainer) -> set[str]:
    return {name for name, p in at.model.named_parameters() if any(p is q for q in at.qat.params)}


def test_ste_is_for_what_is_stored_in_under_eight_bits() -> None:
    at = trainer(qat="ste", embed_quant="row_quantile", embed_bits=8)
    parts = itertools.product(range(2), "attn.q attn.k attn.v attn.o mlp.up mlp.down".split())
    assert rounded_names(at) == {f"blocks.{layer}.{part}.weight" for layer, part in parts}
    tables = {"tok_emb.weight", "embed_extras.bigram.table.weight"}
    assert rounded_names(trainer(qat="ste")) - rounded_names(at) == tables, "seven bits by default"
    due = train_gpt.STAGES["ste"]
    assert [due(Config(), train_gpt.Progress(9, 0.5, m)) for m in (0.149, 0.15)] == [True, False]
    assert due(Config(late_qat_threshold=2.0), train_gpt.Progress(0, 0.0, 1.0)), "from the start"


def test_noise_is_of_the_stated_size_seeded_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    at, again = (trainer(qat="noise", qat_noise_mult=0.05, seed=7) for _ in range(2))
    assert len(at.qat.params) == 4, "two matrices in each of two layers"
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p, q in zip(at.qat.params, again.qat.params, strict=True):
            p.copy_(torch.randn(p.shape, generator=generator))
            q.copy_(p)
    values = at.qat.values(3)
    assert all(map(torch.equal, values, again.qat.values(3))), "the same on every rank"
    assert not torch.equal(values[0], at.qat.values(4)[0])
    many = torch.stack([at.qat.values(step)[1] - at.qat.params[1].detach() for step in range(300)])
    wanted = 0.05 * 13.0 * at.qat.params[1].detach().std(dim=1) / 31 / math.sqrt(12)
    torch.testing.assert_close(many.std(dim=(0, 2)), wanted, rtol=0.05, atol=0.0)
    before, rounded = [p.detach().clone() for p in at.model.parameters()], []
    at.optimisers.step = lambda multiplier, step: None
    monkeypatch.setattr(at.qat, "values", lambda step: rounded.append(step) or values)
    at.advance(one_batch(), 0.96, 100)
    at.advance(one_batch(), 0.94, 101)
    assert rounded == [100] and all(map(torch.equal, before, at.model.parameters()))
    for every, wanted in ((1, [True] * 4), (3, [True, False, False, True])):
        cfg = Config(qat_noise_every=every)
        assert [train_gpt.STAGES["noise"](cfg, train_gpt.Progress(s, 0.96, 1.0)) for s in range(4)] == wanted
    with pytest.raises(UserError, match="QAT_NOISE_PATTERNS=nothing is in no name"):
        trainer(qat="noise", qat_noise_patterns=("nothing",))


def test_weights_come_back_when_a_step_fails() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(KeyboardInterrupt), train_gpt.temporarily_set([p], [torch.zeros(3)]):
        assert not p.any()
        raise KeyboardInterrupt
    assert p.all()


def test_what_is_published_untrained_stays_as_it_is() -> None:
    trigram = {f"embed_extras.trigram.{name}" for name in ("table.weight", "proj.weight", "scale")}
    taps = {"blocks.0.attn.taps", "blocks.4.attn.taps"}
    for stack, knob, names in (("n-gram", "trigram_trained", trigram), ("delta", "gdn_conv_trained", taps)):
        for trained in (False, True):
            knobs = {knob: trained, "scalar_lr": 0.1, "adam_wd": 0.1, "embed_wd": 0.1}
            model, ids = ttt_rules.stack_model(stack, **knobs), ttt_rules.sample(2, 25, [0])
            before = copy.deepcopy(model.state_dict())
            optimisers = train_gpt.Optimisers(model.cfg, model, rules.runtime())
            model(ids[:, :-1], ids[:, 1:]).backward()
            optimisers.step(1.0, 0)
            still = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
            assert still == (set() if trained else names), stack
            said = f"of them not trained: {len(names)} tensors" in train_gpt.explain(model.cfg, {})
            assert said is not trained, stack


# Runs of one and of two processes


NGRAM = """
AVERAGE=ema,swa SWA_EVERY=2 SWA_START_SCALE=0.9 QAT=ste LATE_QAT_THRESHOLD=0.6 WARMDOWN_ITERS=8 MIN_LR=0 CLIP_FLOOR=1
MATRIX_QUANT=gptq_lite EMBED_QUANT=row_quantile EMBED_BITS=8 COMPRESSOR=lzma6 ATTN_GATE=dense_bias ROPE_REFERENCE_LEN=32
EMBED_EXTRAS=smear,smear_channel,trigram,bigram ATTN_EXTRAS=xsa,value_residual,value_embed VE_LAYERS=1,4 VE_DIM=12
BIGRAM_VOCAB_SIZE=64 BIGRAM_DIM=8 TRIGRAM_VOCAB_SIZE=64 TRIGRAM_DIM=32 TRIGRAM_TRAINED=0 ITERATIONS=10 EVAL=plain
"""
HYBRID = """
MIXERS=GAAAG GDN_HEAD_DIM=8 ATTN_EXTRAS=xsa,sink PARALLEL_LANES=1 LOADER=shuffled QAT=noise QAT_NOISE_START_FRAC=0.5
MUON_COEFFICIENTS=polar_express_safe ROTATE=hadamard_vo MATRIX_BITS_OVERRIDES=blocks.[1-3].attn.o.weight:7
EMBED_QUANT=gptq_freqsplit EMBED_TOPK=100 EMBED_FREQ_TOKENS=4000 EVAL=chunk_sgd EVAL_STRIDE=16 TTT_CHUNK_TOKENS=192
TTT_LR=0.1 TTT_EPOCHS=1 TTT_TRAINABLE=mlp ITERATIONS=4
"""


def test_two_processes_round_and_average_as_one(run_gpt: Callable, tmp_path: Path) -> None:
    """Every part of the n-gram stack."""
    states = []
    for ranks in (1, 2):
        folder = tmp_path / f"ranks{ranks}"
        done = run_gpt(ranks=ranks, **rules.knobs(NGRAM), ARTIFACT_DIR=folder)
        assert "ste on from step" in done.out and "weights: ema+swa" in done.out and "SWA: 4 snapshots" in done.out
        plan = done.out.rpartition("quantisation plan:\n")[2]
        assert re.search(r"^  gptq_lite .*\bq\b", plan, re.MULTILINE), plan
        assert re.search(r"^  row_quantile .*\bhash_table\b", plan, re.MULTILINE), plan
        states.append(done.weights())
    for name, one in states[0].items():
        torch.testing.assert_close(states[1][name], one, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert done.result["legal"] and list(done.result["stages"]) == ["pre_quant", "quantized", "final"]
    assert "VE_LAYERS=1,4" in (folder / "record.env").read_text(encoding="utf-8")
    assert not train_gpt.load_artifact(folder / "model.bin")["embed_extras.trigram.table.weight"].any()


def test_two_processes_are_one_and_quantising_can_be_resumed(run_gpt: Callable[..., Done]) -> None:
    results, counts = [], []
    for ranks, more in (
        (1, {}),
        (1, {"STAGES": "quantize,eval", "EMBED_TOPK": "20", "EVAL": "plain"}),
        (2, {"OVERWRITE": "1"}),
    ):
        done = run_gpt(ranks=ranks, **rules.knobs(HYBRID) | more)
        results.append(done.result)
        counts.append(train_gpt.load_saved(done.folder / "hessians.pt")[train_gpt.COUNTS])
    one, coarser, two = results
    assert all(torch.equal(c, counts[0]) for c in counts) and int(counts[0].sum()) == 4000
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-3) and one["legal"] and two["legal"]
    assert coarser["stages"]["quantized"] != one["stages"]["quantized"], "EMBED_TOPK may change after the training"
    blob, trained = train_gpt.load_artifact(done.folder / "model.bin"), done.weights()
    assert blob.keys() == trained.keys() and blob["blocks.0.attn.taps"].shape == trained["blocks.0.attn.taps"].shape
    v = "blocks.2.attn.v.weight"
    cfg = train_gpt.load_config({"PRESET": str(done.folder)})
    turned, _ = train_gpt.reparametrize(cfg, rules.runtime(), trained, {})
    assert (blob[v] - turned[v]).norm() < 0.2 * (blob[v] - trained[v]).norm(), "the artifact holds rotated values"
