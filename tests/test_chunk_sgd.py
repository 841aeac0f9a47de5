"""Chunk SGD: windows and chunks, the published trajectory, legality, any number of ranks."""

from __future__ import annotations

import copy
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
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import BOS_ID, GPT, ByteMeter, ChunkSgd, Config, NoAdaptation, UserError, ValData, load_config

GOLDEN = json.loads((Path(__file__).resolve().parent / "golden" / "chunk_sgd.json").read_text(encoding="utf-8"))
PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)
VOCAB = 64


def config(**knobs: object) -> Config:
    """A small looped model with short windows, and steps large enough to be seen."""
    base = {**TINY, "VOCAB_SIZE": VOCAB, "MODEL_DIM": 16, "EVAL": "chunk_sgd", "EVAL_SEQ_LEN": 16, "EVAL_STRIDE": 4}
    base |= {"VAL_BATCH_TOKENS": 192, "TTT_CHUNK_TOKENS": 32, "TTT_LR": 0.05, "TTT_EPOCHS": 2}
    return load_config({key: str(value) for key, value in {**base, **knobs}.items()})


def stream(num_targets: int, seed: int = 0) -> ValData:
    """Random tokens with document starts, and random bytes per token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, VOCAB, num_targets + 1)
    tokens[rng.random(num_targets + 1) < 0.03] = BOS_ID
    return ValData(tokens, rng.integers(0, 9, num_targets + 1).astype(np.int32))


def strong(cfg: Config) -> GPT:
    """Random weights large enough that context matters, looping."""
    model, generator = GPT(cfg).init_weights(1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.set_looping(True)
    return model


def per_target(monkeypatch: pytest.MonkeyPatch, evaluate: Callable[[], object], length: int) -> torch.Tensor:
    """Nats of each target of a real evaluator, by position; NaN where none was scored."""
    found, add = torch.full((length,), math.nan, dtype=torch.float64), ByteMeter.add

    def listen(meter: ByteMeter, unit: train_gpt.Unit, nll: torch.Tensor) -> None:
        add(meter, unit, nll)
        found[unit.scored()] = nll.detach()[unit.rows, unit.cols].double()

    with monkeypatch.context() as patch:
        patch.setattr(ByteMeter, "add", listen)
        evaluate()
    return found


# Windows and chunks


@pytest.mark.parametrize("case", GOLDEN["windows"], ids=lambda case: case["name"])
def test_windows_and_chunks_of_the_delta_hybrid(case: dict) -> None:
    """At full size too (633,345 windows, 619 chunks), lazily: arrays, not a loop over windows."""
    c, want = case["config"], case["expected"]
    cfg = Config(
        eval="chunk_sgd", eval_seq_len=c["seq_len"], eval_stride=c["stride"], ttt_chunk_tokens=c["chunk_tokens"]
    )
    windows, edges = train_gpt.windows_by_chunk(cfg, c["targets"])
    absolute = windows + windows[:, :1] * [0, 0, 1, 1]
    assert (len(windows), len(edges) - 1) == (want["num_windows"], want["num_chunks"])
    first, last = want["first_windows"], want["last_windows"]
    assert absolute[: len(first)].tolist() == first and absolute[-len(last) :].tolist() == last
    counts = np.diff(edges)
    assert {str(k): int(n) for k, n in zip(*np.unique(counts, return_counts=True), strict=True)} == want[
        "distinct_window_counts"
    ]
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
    ranks = [
        [
            make()
            for make in train_gpt.chunk_sgd_units(
                cfg, train_gpt.dataclasses.replace(rules.runtime(), rank=r, world=world), val
            )
        ]
        for r in range(world)
    ]
    scored = [p for units in ranks for unit in units for p in unit.scored()]
    assert sorted(scored) == list(range(1, targets + 1))
    spans = [[unit.span for unit in units if unit.span] for units in ranks]
    assert all(own == spans[0] for own in spans) and len(spans[0]) == -(-targets // chunk) - 1
    done, waiting = np.zeros(targets + 1, bool), [iter(units) for units in ranks]
    for span in spans[0]:
        for units in waiting:
            for unit in iter(lambda units=units: next(units), None):
                if unit.span:
                    break
                done[unit.scored()] = True
        assert done[span.start : span.stop].all() and span.stop - 1 <= targets


def test_what_a_chunk_learns_is_what_was_scored_since_the_chunk_before() -> None:
    """Where stride and window divide the chunk, as in the records."""
    scored: list[int] = []
    for make in train_gpt.chunk_sgd_units(config(), rules.runtime(), stream(150)):
        unit = make()
        if unit.span:
            assert sorted(scored) == list(unit.span)
            scored = []
        scored += unit.scored().tolist()
    assert scored == list(range(129, 151)), "the last chunk is scored and not learnt"


# The head on scored cells only


def test_head_on_scored_cells_alone_gives_the_same_scores() -> None:
    cfg, val = config(), stream(150)
    model = strong(cfg)
    scorer = NoAdaptation(cfg, rules.runtime(), model)
    for make in train_gpt.sliding_units(cfg, rules.runtime(), val):
        unit = make()
        whole, few = scorer.score(unit._replace(cells=None)), scorer.score(unit)
        torch.testing.assert_close(few[unit.rows, unit.cols], whole[unit.rows, unit.cols], rtol=2e-5, atol=2e-6)
        hidden = torch.ones(unit.ids.shape, dtype=torch.bool)
        hidden[unit.rows, unit.cols] = False
        assert few[hidden].isnan().all(), "a cell that is not scored must not look like a score"


def test_batches_have_two_sizes_of_head_at_most() -> None:
    cfg = config()
    units = [make() for make in train_gpt.chunk_sgd_units(cfg, rules.runtime(), stream(333))]
    sizes = [len(unit.cells) for unit in units if len(unit.rows)]
    assert len(set(sizes[1:])) == 1 and sizes[0] > sizes[1] == train_gpt.windows_per_batch(cfg) * cfg.eval_stride


# The published trajectory


def golden_config(c: dict) -> Config:
    return Config(
        eval="chunk_sgd",
        loader="stream",
        batch_slices=1,
        eval_seq_len=c["train_seq_len"],
        eval_stride=c["stride"],
        ttt_lr=c["ttt_lr"],
        ttt_epochs=c["ttt_epochs"],
        ttt_momentum=c["ttt_momentum"],
        ttt_grad_clip=c["ttt_grad_clip"],
        ttt_chunk_tokens=c["chunk_tokens"],
        val_batch_tokens=c.get("score_batch_windows", 32) * c["train_seq_len"],
    )


def record_steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What each step of SGD started from."""
    steps, gradient, learn = [], ChunkSgd.gradient, ChunkSgd.learn

    def note(learner: ChunkSgd, span: range) -> None:
        gradient(learner, span)
        rate = learner.optimiser.param_groups[0]["lr"]
        steps.append({"lr": rate, "grad_norm_before_clip": learner.grads.norm().item()})

    def close(learner: ChunkSgd, unit: train_gpt.Unit, nll: torch.Tensor) -> None:
        learn(learner, unit, nll)
        if unit.span:
            buffers = [learner.optimiser.state[p]["momentum_buffer"] for p in learner.params]
            steps[-1]["momentum_buffer_l2_after"] = math.sqrt(sum(b.square().sum().item() for b in buffers))

    monkeypatch.setattr(ChunkSgd, "gradient", note)
    monkeypatch.setattr(ChunkSgd, "learn", close)
    return steps


@pytest.mark.parametrize("case", GOLDEN["ttt"], ids=lambda case: case["name"])
def test_sgd_follows_the_published_trajectory(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk's published sum has the tail again; scored on the final weights, that gives the difference."""
    cfg, want, runtime = golden_config(case["config"]), case["expected"], rules.runtime(torch.float64)
    targets = case["config"]["predicted_positions"]
    val, model = ngram.stream(targets), ngram.adapted_model(case["config"])
    monkeypatch.setattr(train_gpt, "rotary_tables", ngram.exact_tables)
    steps = record_steps(monkeypatch)
    learner, meter = ChunkSgd(cfg, runtime, model, val, NoAdaptation), ByteMeter(val, runtime)
    units = [make() for make in train_gpt.chunk_sgd_units(cfg, runtime, val)]
    nll = per_target(monkeypatch, lambda: train_gpt.score_first(units, learner, meter), targets + 1)
    tail = ngram.published_rows(targets, cfg.eval_seq_len, cfg.eval_stride)
    tail = tail[len(train_gpt.window_rows(targets, cfg.eval_seq_len, cfg.eval_stride)) :]
    again = train_gpt.window_unit(cfg, val, tail)
    twice = learner.score(again)[again.rows, again.cols].sum().item()
    sums = [nll[1 + 32 * i : 33 + 32 * i].sum().item() for i in range(3)]
    sums[-1] += twice
    assert sums == pytest.approx([c["scored_nll_sum_before_training"] for c in want["chunks"]], rel=1e-7)
    assert (meter.close().val_loss * targets + twice) / (
        targets + tail[:, 3].sum() - tail[:, 2].sum()
    ) == pytest.approx(want["val_loss"], rel=1e-7)
    assert len(steps) == len(want["steps"])
    for found, expected in zip(steps, want["steps"], strict=True):
        assert found == pytest.approx({key: expected[key] for key in found}, rel=1e-7)
    found = {ngram.published_name(name): p for name, p in learner.model.named_parameters()}
    norms = {name: found[name].norm().item() for name in want["final_param_l2"]}
    assert norms == pytest.approx(want["final_param_l2"], rel=1e-9)


# What is trained


def test_mlp_is_the_matrices_and_scales_of_every_mlp() -> None:
    cfg = config(TTT_TRAINABLE="mlp", NUM_LAYERS=11, LOOP_START=3, LOOP_END=5)
    chosen = train_gpt.trainable(cfg, GPT(cfg))
    assert len(chosen) == 33 and sum(p.ndim == 2 for p in chosen.values()) == 22
    assert all(".mlp." in name or name.endswith("mlp_scale") for name in chosen)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("blocks.0.*,skips", lambda name: name.startswith(("blocks.0.", "skips"))),
        ("all", lambda name: True),
        ("scalar", lambda name: "tok_emb" not in name and not re.search(r"attn\.[qkvo]\.|mlp\.(up|down)\.", name)),
    ],
)
def test_trainable_words(words: str, wanted: Callable[[str], bool]) -> None:
    cfg = config(TTT_TRAINABLE=words)
    model = GPT(cfg)
    assert set(train_gpt.trainable(cfg, model)) == {name for name, _ in model.named_parameters() if wanted(name)}


def test_a_word_that_matches_nothing_is_found_before_the_training(run_gpt: Callable) -> None:
    cfg = config(TTT_TRAINABLE="mlp,moe")
    with pytest.raises(UserError, match=r"TTT_TRAINABLE=moe matches no weight; say all.*blocks\.\*\.mlp\.up"):
        train_gpt.trainable(cfg, GPT(cfg))
    done = run_gpt("--explain", EVAL="chunk_sgd", TTT_TRAINABLE="moe")
    assert done.returncode == 2 and "TTT_TRAINABLE=moe matches no weight" in done.stderr


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"TTT_CHUNK_TOKENS": 15}, "TTT_CHUNK_TOKENS=15 is under EVAL_SEQ_LEN=16"),
        ({"TTT_TRAINABLE": ""}, "TTT_TRAINABLE is empty"),
        ({"EVAL_STRIDE": 17}, "EVAL_STRIDE=17 is over EVAL_SEQ_LEN=16"),
        ({"PRESET": "", "TTT_LR": -1}, "TTT_LR=-1.0 must be at least 0"),
    ],
)
def test_wrong_knobs_are_sentences(knobs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**knobs)


@pytest.mark.parametrize("name", ["SLOT_ENABLED", "TTT_FREEZE_BLOCKS", "TTT_GDN_INCLUDE"])
def test_published_names_say_what_they_became(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is not a knob here; say"):
        load_config({name: "1"})


def test_only_the_selected_weights_of_a_copy_change() -> None:
    cfg, val = config(TTT_TRAINABLE="mlp"), stream(100)
    model = strong(cfg)
    before = copy.deepcopy(model.state_dict())
    learner = ChunkSgd(cfg, rules.runtime(), model, val, NoAdaptation)
    train_gpt.score_first(
        [make() for make in train_gpt.chunk_sgd_units(cfg, rules.runtime(), val)],
        learner,
        ByteMeter(val, rules.runtime()),
    )
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())
    changed = {name for name, w in learner.model.state_dict().items() if not torch.equal(before[name], w)}
    assert changed == set(train_gpt.trainable(cfg, model))


def test_half_precision_weights_are_trained_in_float32_and_score_alike() -> None:
    """As published, steps far below the last bit of a bf16 table were lost."""
    cfg = config(EMBED_DTYPE="bf16")
    model = strong(cfg)
    copied = train_gpt.fp32_copy(model)
    assert model.tok_emb.weight.dtype == torch.bfloat16 and copied.tok_emb.weight.dtype == torch.float32
    ids = torch.arange(16)[None] + 4
    assert torch.equal(model(ids), copied(ids)) and copied.route is not model.routes[False]


# Legality


def scores(cfg: Config, val: ValData, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    model = strong(cfg)
    return per_target(monkeypatch, lambda: train_gpt.EVALS[cfg.eval](cfg, rules.runtime(), model, val), len(val.tokens))


def future_leaks(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions, some in every chunk, from which on a changed future moves an earlier score by as much as a bit."""
    val, leaks = stream(150), []
    before = scores(cfg, val, monkeypatch)
    assert not before[1:].isnan().any()
    for position in (5, 31, 32, 33, 70, 97, 128, 150):
        tokens = val.tokens.copy()
        tokens[position:] = 4 + (tokens[position:] + 7) % (VOCAB - 4)
        after = scores(cfg, ValData(tokens, val.bytes), monkeypatch)
        assert before[position] != after[position], "the changed target itself must show, or nothing has been tested"
        leaks += [] if torch.equal(before[1:position], after[1:position]) else [position]
    return leaks


@pytest.mark.parametrize("name", ["sliding", "chunk_sgd"])
@pytest.mark.parametrize("loader", ["packed_docs", "stream"])
def test_scores_never_see_what_comes_after(name: str, loader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert future_leaks(config(EVAL=name, LOADER=loader), monkeypatch) == []


def test_adaptation_begins_with_the_second_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    val = stream(150)
    adapted, frozen = (scores(config(TTT_EPOCHS=n), val, monkeypatch) for n in (2, 0))
    sliding = scores(config(EVAL="sliding"), val, monkeypatch)
    torch.testing.assert_close(frozen[1:], sliding[1:], rtol=1e-5, atol=1e-6)
    assert torch.equal(adapted[1:33], frozen[1:33]) and not (adapted[33:] == frozen[33:]).any()


def test_an_unscored_span_is_refused() -> None:
    cfg, val = config(), stream(100)
    learner = ChunkSgd(cfg, rules.runtime(), strong(cfg), val, NoAdaptation)
    before = copy.deepcopy(learner.model.state_dict())
    units = [make() for make in train_gpt.chunk_sgd_units(cfg, rules.runtime(), val)]
    pause = next(i for i, unit in enumerate(units) if unit.span)
    early = [*units[: pause - 1], units[pause]]
    late = [*units[:pause], units[pause]._replace(span=range(2, 34))]
    for wrong in (early, late):
        with pytest.raises(train_gpt.LegalityError, match="no rank has scored"):
            train_gpt.score_first(wrong, learner, ByteMeter(val, rules.runtime()))
    assert all(torch.equal(before[name], w) for name, w in learner.model.state_dict().items())


def test_probabilities_sum_to_one_on_adapted_weights() -> None:
    cfg, val = config(), stream(100)
    learner = ChunkSgd(cfg, rules.runtime(), strong(cfg), val, NoAdaptation)
    units = [make() for make in train_gpt.chunk_sgd_units(cfg, rules.runtime(), val)]
    train_gpt.score_first(units, learner, ByteMeter(val, rules.runtime()))
    unit = units[-1]
    every = [learner.score(unit._replace(targets=np.full_like(unit.targets, v))) for v in range(VOCAB)]
    total = torch.stack([nll[unit.rows, unit.cols] for nll in every]).double().neg().exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


# Runs


def test_two_processes_learn_and_score_what_one_does(run_gpt: Callable, tmp_path: object) -> None:
    knobs = {"EVAL": "chunk_sgd", "EVAL_STRIDE": 16, "TTT_CHUNK_TOKENS": 192, "TTT_LR": 0.3, "TTT_EPOCHS": 2}
    results = []
    for stages, ranks, epochs in (("train,quantize,eval", 1, 0), ("eval", 1, 2), ("eval", 2, 2)):
        done = run_gpt(STAGES=stages, ranks=ranks, **knobs | {"TTT_EPOCHS": epochs})
        assert done.returncode == 0, done.stderr
        results.append(json.loads((tmp_path / "run" / "result.json").read_text()))
    frozen, one, two = results
    assert one["legal"] is True and one["tokens_scored"] == two["tokens_scored"] > 600
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-6)
    assert abs(frozen["val_loss"] - one["val_loss"]) > 1e-3
