"""Test-time training and the evaluators: adapters, the ledger, causality, and that a model gives probabilities."""

from __future__ import annotations

import copy
import functools
import re

import golden_rules as rules
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train_gpt

SMALL = rules.entry("ttt/warm_a_0_batches").config
SLOTS = {"o": "attn", "lm_head": "head"}  # published adapter family -> our site; the others have the same name


def published_adapter(key: str) -> str:
    """q_3 -> lora.q.3, attn_3 -> lora.o.3, head_0 -> lora.lm_head."""
    site, _, slot = key.rpartition("_")
    families = {ours: published for published, ours in SLOTS.items()}
    return "lora.lm_head" if site == "head" else f"lora.{families.get(site, site)}.{slot}"


@torch.no_grad()
def fill_adapters(lora: train_gpt.BatchedLoRA, config: dict, halves: str) -> None:
    """Fill A, or A and B, by the rule; a B that is not named becomes zero."""
    for half in ("A", "B"):
        for key, parameter in getattr(lora, half).items():
            amp = config["lora_amp"][half] if half in halves else 0.0
            name = f"{published_adapter(key)}.{half}"
            parameter.copy_(rules.fill(config["fill"], name, tuple(parameter.shape), amp))


# Adapters


@rules.parametrize("lora_forward")
def test_forward_through_adapters(golden: rules.Entry) -> None:
    config, want = golden.config, golden.expected
    families = {f"ttt_{name}_lora": config[f"{name}_lora"] for name in ("k", "o", "mlp")}
    knobs = {"ttt_lora_rank": config["lora_rank"], "ttt_lora_alpha": config["lora_alpha"], **families}
    model = rules.build(config, **knobs).requires_grad_(False)
    lora = train_gpt.BatchedLoRA(rules.model_config(config, **knobs), model, config["rows"])
    fill_adapters(lora, config, "AB")
    ids, targets = rules.rows_of(config)
    beyond = torch.arange(config["T"]) >= torch.tensor(config["row_lens"])[:, None]
    ids, targets = ids.masked_fill(beyond, 0), targets.masked_fill(beyond, 0)
    with torch.set_grad_enabled("grad_l2" in want):
        nll = model(ids, targets, None, lora, "none")
    close = functools.partial(pytest.approx, rel=rules.REL)
    assert nll.masked_fill(beyond, 0).sum(1).tolist() == close(want["nll_sum_per_row"])
    assert nll[0, :8].tolist() == close(want["nll_first8_row0"])
    assert nll[-1, :4].tolist() == close(want["nll_first4_last_row"])
    last = [nll[row, length - 1].item() for row, length in enumerate(config["row_lens"])]
    assert last == close(want["nll_per_row_pos_last_valid"])
    assert sum(p.numel() for p in lora.parameters()) == want["lora_param_count"]
    assert len(model.route.layers) == want["num_slots"]
    if "grad_l2" in want:
        loss = nll[:, : min(config["row_lens"])].mean(1).sum()
        assert loss.item() == close(want["loss_sum_of_row_means_over_first_min_len"])
        loss.backward()
        compare_adapter_gradients(lora, want["grad_l2"])


def compare_adapter_gradients(lora: train_gpt.BatchedLoRA, expected: dict[str, float]) -> None:
    found = {
        f"{published_adapter(key)}.{half}": parameter.grad.norm().item()
        for half in ("A", "B")
        for key, parameter in getattr(lora, half).items()
    }
    assert expected.keys() <= found.keys()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=rules.REL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapters_change_no_bit(dtype: torch.dtype) -> None:
    cfg = rules.model_config(SMALL, ttt_lora_rank=3)
    model = train_gpt.GPT(cfg, dtype=dtype).init_weights(2)
    model.load_state_dict(rules.build(SMALL, torch.float32).state_dict())
    model.set_looping(True)
    lora = train_gpt.BatchedLoRA(cfg, model, 2)
    lora.reset(7, (4, 9))
    ids = torch.from_numpy(rules.tokens(97, 48, [0, 24])).view(2, 24)
    assert all(a.abs().max() > 0 for a in lora.A.values())
    assert torch.equal(model(ids, None, None, lora), model(ids))
    with torch.no_grad():
        lora.B["mlp_2"].fill_(0.1)
    assert not torch.equal(model(ids, None, None, lora), model(ids))


def test_an_adapter_depends_on_seed_and_document_alone() -> None:
    cfg = rules.model_config(SMALL, ttt_lora_rank=3)
    model = train_gpt.GPT(cfg)
    pair, single = train_gpt.BatchedLoRA(cfg, model, 2), train_gpt.BatchedLoRA(cfg, model, 1)
    pair.reset(1, (5, 8))
    single.reset(1, (8,))
    for key, a in pair.A.items():
        assert torch.equal(a[1], single.A[key][0]) and not torch.equal(a[0], a[1])
        assert a.abs().max() <= a.size(-1) ** -0.5 and a.abs().max() > 0.5 * a.size(-1) ** -0.5
    single.reset(2, (8,))
    assert not torch.equal(pair.A["q_0"][1], single.A["q_0"][0])


def test_rows_do_not_see_each_others_adapters() -> None:
    cfg = rules.model_config(SMALL, ttt_lora_rank=3)
    model = rules.build(SMALL)
    lora = train_gpt.BatchedLoRA(cfg, model, 2)
    fill_adapters(lora, SMALL, "AB")
    ids = torch.from_numpy(rules.tokens(97, 48, [0, 24])).view(2, 24)
    before = model(ids, None, None, lora)
    with torch.no_grad():
        for b in lora.B.values():
            b[0] += 0.1
    after = model(ids, None, None, lora)
    assert torch.equal(before[1], after[1]) and not torch.equal(before[0], after[0])


def test_probabilities_sum_to_one_through_adapters() -> None:
    cfg = rules.model_config(SMALL, ttt_lora_rank=3)
    model = rules.build(SMALL)
    lora = train_gpt.BatchedLoRA(cfg, model, 2)
    fill_adapters(lora, SMALL, "AB")
    ids = torch.randint(8, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        every = torch.stack([model(ids, torch.full_like(ids, v), None, lora, "none") for v in range(97)], dim=-1)
        logits = model(ids, None, None, lora)
    torch.testing.assert_close(every.neg().exp().sum(-1), torch.ones(2, 12, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(every, -logits.log_softmax(-1))
    assert logits.abs().max() < SMALL["softcap"]


# The published runs


def stream_of(raw_lengths: list[int], vocab: int = 97) -> train_gpt.ValData:
    """The golden stream: documents of these lengths, and its rule of bytes."""
    starts = np.cumsum([0, *raw_lengths[:-1]])
    ids, position = rules.tokens(vocab, sum(raw_lengths), starts.tolist()), np.arange(sum(raw_lengths))
    return train_gpt.ValData(ids, np.where(ids == train_gpt.BOS_ID, 0, 1 + position % 5).astype(np.int32))


def ttt_config(config: dict, **knobs: object) -> train_gpt.Config:
    settings = {
        "ttt_lora_rank": config["lora_rank"],
        "ttt_lora_alpha": config["lora_alpha"],
        "ttt_lora_lr": config["lr"],
        "ttt_weight_decay": config["weight_decay"],
        "ttt_beta1": config["beta1"],
        "ttt_beta2": config["beta2"],
        "ttt_chunk_size": config["chunk"],
        "ttt_eval_seq_len": config["window"],
        "ttt_batch_size": config["batch_docs"],
        "ttt_grad_steps": config["grad_steps"],
        "ttt_warm_start_a": bool(config["warm_start_a"]),
        "phased_ttt_prefix_docs": config["prefix_docs"],
        "phased_ttt_num_phases": config["num_phases"],
        "global_ttt_lr": config.get("global_lr", 0.0),
        "global_ttt_chunk_tokens": config.get("global_chunk_tokens", 32),
        "batch_slices": 1,
        "eval_seq_len": config.get("global_seq_len", 16),
    }
    return rules.model_config(config | {"bos_mask": config.get("code") == "1915"}, **settings | knobs)


Nll = dict[int, float]  # stream position of a target -> nats


def record_nll(monkeypatch: pytest.MonkeyPatch) -> Nll:
    """Every score that a meter counts from now on, by position."""
    scores, add = {}, train_gpt.ByteMeter.add

    def listen(meter: train_gpt.ByteMeter, unit: train_gpt.Unit, nll: Tensor) -> None:
        add(meter, unit, nll)
        scores.update(zip(unit.scored().tolist(), nll.detach()[unit.rows, unit.cols].tolist(), strict=True))

    monkeypatch.setattr(train_gpt.ByteMeter, "add", listen)
    return scores


def record_steps(monkeypatch: pytest.MonkeyPatch, slots: int) -> list[tuple[train_gpt.Unit, dict[str, float]]]:
    """Each unit that DocLora scores, with checks of the adapters that score it."""
    steps, losses = [], train_gpt.DocLora.losses

    def listen(learner: train_gpt.DocLora, unit: train_gpt.Unit) -> Tensor:
        A, B = learner.lora.A, learner.lora.B
        norms = {
            "lm_head.A_l2": A["head_0"].norm().item(),
            "lm_head.B_l2": B["head_0"].norm().item(),
            "q.0.A_l2": A["q_0"].norm().item(),
            "q.0.B_l2": B["q_0"].norm().item(),
            "mlp.last.B_wsum": rules.checks(B[f"mlp_{slots - 1}"])["wsum"],
        }
        steps.append((unit, norms))
        return losses(learner, unit)

    monkeypatch.setattr(train_gpt.DocLora, "losses", listen)
    return steps


@rules.parametrize("ttt")
def test_adaptation_gives_the_published_numbers(golden: rules.Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    config, want = golden.config, golden.expected
    cfg = ttt_config(config)
    model = rules.build(config | {"bos_mask": config["code"] == "1915"})
    val = stream_of(config["doc_raw_lens"])
    docs = train_gpt.val_documents(val.tokens)
    assert [list(doc) for doc in docs] == want["docs_start_len"]
    batches = train_gpt.document_batches(docs, cfg.ttt_batch_size)
    assert batches == want["batches_doc_indices_in_processing_order"]

    monkeypatch.setattr(train_gpt.BatchedLoRA, "reset", lambda lora, seed, docs: fill_adapters(lora, config, "A"))
    scores, steps = record_nll(monkeypatch), record_steps(monkeypatch, len(model.route.layers))
    phases = record_phases(monkeypatch)
    score = train_gpt.evaluate_phased_lora(cfg, rules.runtime(), model, val)
    assert score.val_loss == pytest.approx(want["val_loss"], abs=1e-7)
    assert score.val_bpb == pytest.approx(want["val_bpb"], abs=1e-7)
    assert (score.tokens, score.legal) == (len(val.tokens) - 1, True)
    for doc, (start, length) in enumerate(docs):
        found = [scores[position] for position in range(start + 1, start + length)]
        assert found == pytest.approx(want["nll_per_doc"][str(doc)], abs=1e-7)
    compare_steps(batches, steps, want["steps"])
    assert len(phases) == len(want.get("global_sgd", []))
    for (tokens, weights), expected in zip(phases, want.get("global_sgd", []), strict=True):
        assert (len(tokens), tokens[:4].tolist()) == (expected["tokens"], expected["first_tokens"])
        for name, numbers in weights.items():
            assert numbers == pytest.approx(expected[name], rel=1e-7, abs=1e-7), name


def record_phases(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, dict[str, dict[str, float]]]]:
    """The tokens of each global update, with checks of some weights after it."""
    phases, learn = [], train_gpt.GlobalSgd.learn

    def listen(trainer: train_gpt.GlobalSgd, tokens: np.ndarray) -> int:
        steps, model = learn(trainer, tokens), trainer.model
        watched = {
            "tok_emb": model.tok_emb.weight,
            "blocks.0.attn.c_q.weight": model.blocks[0].attn.q.weight,
            "skip_gates": model.skips.gates,
        }
        phases.append((tokens, {name: rules.checks(weight) for name, weight in watched.items()}))
        return steps

    monkeypatch.setattr(train_gpt.GlobalSgd, "learn", listen)
    return phases


def compare_steps(batches: list[list[int]], steps: list[tuple[train_gpt.Unit, dict]], expected: list[dict]) -> None:
    assert len(steps) == len(expected)
    for (unit, norms), want in zip(steps, expected, strict=True):
        assert unit.ids.shape[1] == want["width"]
        cells = [
            [doc, int(unit.cols[unit.rows == row].min()), int((unit.rows == row).sum())]
            for row, doc in enumerate(unit.docs)
            if (unit.rows == row).any()
        ]
        assert cells == want["rows_doc_offset_len"]
        if list(unit.docs) == batches[want["batch"]]:  # the published norms count finished rows too
            assert norms == pytest.approx(want["state_before"], rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("name", sorted(rules.entries("schedule")[0].expected["phase_boundaries"]))
def test_phase_boundaries(name: str) -> None:
    prefix, phases, documents = (int(n) for n in re.findall(r"\d+", name))
    wanted = rules.entries("schedule")[0].expected["phase_boundaries"][name]
    assert (train_gpt.phase_boundaries(prefix, phases, documents) or [0]) == wanted


def test_segments_end_at_the_batch_that_reaches_a_boundary() -> None:
    batches = [[3, 4], [1, 2], [0]]
    assert train_gpt.phase_segments(batches, []) == [(batches, [])]
    assert train_gpt.phase_segments(batches, [2, 3]) == [([[3, 4]], [3, 4]), ([[1, 2]], [1, 2, 3]), ([[0]], [])]
    assert train_gpt.phase_segments(batches, [5]) == [(batches, [0, 1, 2, 3, 4]), ([], [])]


def test_a_global_update_on_an_unscored_document_is_refused() -> None:
    ledger = train_gpt.Ledger(6)
    ledger.claim(np.array([1, 2, 3]))
    ledger.require_anywhere(np.array([1, 3]), rules.runtime())
    with pytest.raises(train_gpt.LegalityError, match="no rank has scored"):
        ledger.require_anywhere(np.array([3, 4]), rules.runtime())


def test_schedule_of_documents_and_chunks() -> None:
    golden = rules.entries("schedule")[0]
    config, want = golden.config, golden.expected
    docs = train_gpt.val_documents(stream_of(config["raw_doc_lengths"], 8192).tokens)
    assert [list(doc) for doc in docs] == want["docs_start_len"]
    batches = train_gpt.document_batches(docs, config["batch_docs"])
    assert batches == [batch["docs"] for batch in want["batches_1934_processing_order"]]
    assert batches == want["batches_1915_warm0_global_length"]
    windows = want["chunk_windows_per_doc_[win_start,win_len,chunk_offset,chunk_len]"]
    for doc, (_, length) in enumerate(docs):
        chunks = range(-(-(length - 1) // config["chunk"]))
        found = [list(train_gpt.chunk_window(c, length - 1, config["chunk"], config["window"])) for c in chunks]
        assert found == windows[str(doc)]


def test_units_have_the_published_widths() -> None:
    golden = rules.entries("schedule")[0]
    config, want = golden.config, golden.expected["shared_width_and_train_offset_per_chunk_index"]
    val = stream_of(config["raw_doc_lengths"], 8192)
    docs = train_gpt.val_documents(val.tokens)
    cfg = train_gpt.Config(ttt_chunk_size=config["chunk"], ttt_eval_seq_len=config["window"])
    units = list(train_gpt.chunk_units(cfg, val, docs, [10]))
    assert [[u.ids.shape[1], u.learn_cols.start] for u in units] == want
    assert [len(u.learn_rows) for u in units] == [1] * (len(want) - 1) + [0]  # the last chunk is never learnt
    assert [u.fresh for u in units] == [True] + [False] * (len(want) - 1)


@pytest.mark.parametrize("case", rules.entries("chunk_window")[0].expected, ids=lambda c: "-".join(map(str, c["args"])))
def test_chunk_window(case: dict) -> None:
    chunk, predictions, _, size, window = case["args"]
    found = train_gpt.chunk_window(chunk, predictions, size, window)
    assert list(found) == case["result_[win_start,win_len,chunk_offset,chunk_len]"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=9),
    size=st.integers(1, 4),
    chunk=st.sampled_from([1, 5, 16]),
    window=st.sampled_from([16, 33]),
)
def test_units_score_every_target_once_from_its_own_document(
    lengths: list[int], size: int, chunk: int, window: int
) -> None:
    lengths[-1] += 1  # the last document has no next one whose start it predicts
    val = stream_of(lengths)
    docs, ledger = train_gpt.val_documents(val.tokens), train_gpt.Ledger(len(val.tokens))
    cfg = train_gpt.Config(ttt_chunk_size=chunk, ttt_eval_seq_len=window)
    for batch in train_gpt.document_batches(docs, size):
        for unit in train_gpt.chunk_units(cfg, val, docs, batch):
            ledger.claim(unit.scored())
            ledger.require(unit.learnt())
            assert np.array_equal(unit.targets[unit.rows, unit.cols], val.tokens[unit.scored()])
            assert np.array_equal(unit.ids[unit.rows, unit.cols], val.tokens[unit.scored() - 1])
            for row, doc in enumerate(unit.docs):
                start, length = docs[doc]
                positions = unit.scored()[unit.rows == row]
                assert ((positions > start) & (positions < start + length)).all()
    ledger.close(rules.runtime())


# The ledger


def ledger_unit(scored: list[int], learnt: slice = slice(0)) -> train_gpt.Unit:
    """One row that begins at the stream's second token."""
    width = 8
    zeros, cols = np.zeros((1, width), np.int64), np.array(scored, np.int64)
    rows = np.zeros(1 if learnt.stop else 0, np.int64)
    return train_gpt.Unit(
        zeros, zeros, np.array([1]), np.zeros_like(cols), cols, learn_rows=rows, learn_cols=learnt, docs=(0,)
    )


class Silent:
    """Scores zeros, learns nothing."""

    def score(self, unit: train_gpt.Unit) -> Tensor:
        return torch.zeros(unit.ids.shape)

    def learn(self, unit: train_gpt.Unit, nll: Tensor) -> None:
        pass

    def after(self) -> None:
        pass


def score_units(*units: train_gpt.Unit) -> train_gpt.ByteMeter:
    val = train_gpt.ValData(np.ones(9, np.int64), np.ones(9, np.int32))
    meter = train_gpt.ByteMeter(val, rules.runtime())
    train_gpt.score_first(units, Silent(), meter)
    return meter


def test_the_ledger_lets_honest_units_pass() -> None:
    meter = score_units(ledger_unit([0, 1, 2, 3], slice(0, 4)), ledger_unit([4, 5, 6, 7], slice(2, 8)))
    score = meter.close()
    assert (score.tokens, score.bytes, score.legal) == (8, 8, True)


def test_a_second_score_is_refused() -> None:
    with pytest.raises(AssertionError, match="scored twice"):
        score_units(ledger_unit([0, 1, 2]), ledger_unit([2, 3]))
    with pytest.raises(AssertionError, match="scored twice"):
        score_units(ledger_unit([0, 1, 1]))


def test_learning_from_an_unscored_target_is_refused() -> None:
    with pytest.raises(AssertionError, match="not scored yet"):
        score_units(ledger_unit([0, 1, 2], slice(0, 4)))


def test_the_learner_is_not_called_before_the_ledger_agrees() -> None:
    called = []
    learner = Silent()
    learner.learn = lambda unit, nll: called.append(unit)
    val = train_gpt.ValData(np.ones(9, np.int64), np.ones(9, np.int32))
    with pytest.raises(AssertionError):
        train_gpt.score_first(
            [ledger_unit([0], slice(0, 1)), ledger_unit([1], slice(0, 3))],
            learner,
            train_gpt.ByteMeter(val, rules.runtime()),
        )
    assert len(called) == 1


def test_a_target_left_out_is_noticed_at_the_end() -> None:
    with pytest.raises(AssertionError, match="1 targets are not scored exactly once"):
        score_units(ledger_unit([0, 1, 2, 3, 5, 6, 7])).close()


def test_a_score_that_is_not_finite_is_refused() -> None:
    meter = score_units(ledger_unit(list(range(8))))
    meter.loss += float("nan")
    with pytest.raises(FloatingPointError, match="nan"):
        meter.close()


# Causality of the real evaluators

LENGTHS = [30, 61, 45, 13, 52]  # documents; batches of them, in order: [1], [2, 4], [3, 0]
CHUNK = 16
EVALUATORS = {
    "plain": (train_gpt.evaluate_plain, {}),
    "plain_stream": (train_gpt.evaluate_plain, {"loader": "stream"}),
    "sliding": (train_gpt.evaluate_sliding, {}),
    "sliding_stream": (train_gpt.evaluate_sliding, {"loader": "stream"}),
    "doc_lora": (train_gpt.evaluate_doc_lora, {}),
    "doc_lora_twice": (train_gpt.evaluate_doc_lora, {"ttt_grad_steps": 2}),
}
OF_DOCUMENTS = [name for name in EVALUATORS if not name.endswith("stream")]
PHASED_KNOBS = {"eval_seq_len": 24, "global_ttt_chunk_tokens": 16, "batch_slices": 1}
CHANGED = (40, 90, 130)  # positions of tokens that are changed one at a time: in documents 1 (its last too) and 2


@functools.cache
def small_model() -> train_gpt.GPT:
    return rules.build(SMALL | {"bos_mask": True}, torch.float32)


def nll_of(name: str, ids: np.ndarray, **knobs: object) -> np.ndarray:
    """What an evaluator counts for each position of a stream (0 at the first token)."""
    evaluate, extra = EVALUATORS[name]
    small = {"eval_seq_len": 24, "eval_stride": 7, "val_batch_tokens": 96, "batch_slices": 2, "ttt_lora_lr": 0.01}
    cfg = ttt_config(SMALL | {"code": "1915", "chunk": CHUNK}, **small | extra | knobs)
    with pytest.MonkeyPatch.context() as monkeypatch:
        scores = record_nll(monkeypatch)
        evaluate(cfg, rules.runtime(), small_model(), train_gpt.ValData(ids, np.ones(len(ids), np.int32)))
    return np.array([0.0] + [scores[position] for position in range(1, len(ids))])


def replaced(position: int | None) -> np.ndarray:
    """The stream, with another ordinary token at a position."""
    ids = stream_of(LENGTHS).tokens
    if position is not None:
        ids[position] = 8 + (ids[position] + 5) % 80
    return ids


@functools.cache
def scored(name: str, position: int | None = None) -> np.ndarray:
    """nll_of the stream, as it is or changed at a position."""
    return nll_of(name, replaced(position))


def same_before(position: int, before: np.ndarray, after: np.ndarray) -> bool:
    """Whether the scores before a changed token are bit-equal."""
    assert before[position] != after[position], "the change did not arrive"
    return bool(np.array_equal(before[:position], after[:position]))


def same_elsewhere(position: int, before: np.ndarray, after: np.ndarray) -> bool:
    """Whether the scores of the documents that do not hold a position are bit-equal."""
    assert before[position] != after[position], "the change did not arrive"
    # a document's predictions end with the start of the next document
    predicts = np.searchsorted(np.cumsum(LENGTHS), np.arange(len(before)) - 1, side="right")
    others = predicts != predicts[position]
    return bool(np.array_equal(before[others], after[others]))


@pytest.mark.parametrize("position", CHANGED)
@pytest.mark.parametrize("name", EVALUATORS)
def test_a_later_token_leaves_earlier_scores_bit_equal(name: str, position: int) -> None:
    assert same_before(position, scored(name), scored(name, position))


@pytest.mark.parametrize("position", CHANGED)
@pytest.mark.parametrize("name", OF_DOCUMENTS)
def test_another_document_leaves_a_documents_scores_bit_equal(name: str, position: int) -> None:
    assert same_elsewhere(position, scored(name), scored(name, position))


@pytest.mark.parametrize("batch", [1, 5])
def test_adaptation_does_not_depend_on_the_batch(batch: int) -> None:
    found = nll_of("doc_lora", replaced(None), ttt_batch_size=batch)
    np.testing.assert_allclose(found, scored("doc_lora"), rtol=0, atol=2e-3)


def test_a_document_is_scored_as_if_it_were_alone() -> None:
    ids, one_span = replaced(None), {"val_batch_tokens": 480}
    whole = nll_of("plain", ids, **one_span)
    for start, length in train_gpt.val_documents(ids):
        alone = nll_of("plain", ids[start : start + length], **one_span)
        np.testing.assert_allclose(alone[1:], whole[start + 1 : start + length], rtol=0, atol=1e-3)


@pytest.mark.parametrize("position", CHANGED)
def test_phased_scores_made_before_a_token_is_read_are_bit_equal(position: int) -> None:
    """The queue's order is the order that counts: documents scored later may learn from those before them."""
    phased = {"phased_ttt_prefix_docs": 3, "phased_ttt_num_phases": 2, "global_ttt_lr": 0.05, "ttt_batch_size": 1}
    runs = []
    for where in (None, position):
        cfg = ttt_config(SMALL | {"code": "1915", "chunk": CHUNK}, ttt_lora_lr=0.01, **PHASED_KNOBS | phased)
        model, ids = copy.deepcopy(small_model()), replaced(where)
        with pytest.MonkeyPatch.context() as monkeypatch:
            scores, updates = record_nll(monkeypatch), record_phases(monkeypatch)
            val = train_gpt.ValData(ids, np.ones(len(ids), np.int32))
            train_gpt.evaluate_phased_lora(cfg, rules.runtime(), model, val)
        assert len(updates) == 2
        runs.append(list(scores.items()))  # in the order of scoring
    first = next(i for i, (where, _) in enumerate(runs[0]) if where == position)
    assert runs[0][:first] == runs[1][:first] and runs[0][first] != runs[1][first]


def test_sliding_gives_more_context_than_plain() -> None:
    plain, sliding = scored("plain_stream"), scored("sliding_stream")
    np.testing.assert_allclose(plain[1:25], sliding[1:25], rtol=0, atol=1e-4)  # the first window is whole
    assert len(plain) == len(sliding) and not np.allclose(plain[25:], sliding[25:], atol=1e-3)


@pytest.mark.parametrize("stride", [1, 7, 24])
def test_a_sliding_score_is_that_of_its_window(stride: int) -> None:
    ids = stream_of(LENGTHS).tokens
    found = nll_of("sliding_stream", ids, eval_stride=stride)
    with torch.no_grad():
        for position in (5, 24, 25, 60, 200):
            start = max(0, -(-(position - 24) // stride) * stride)
            row = torch.from_numpy(ids[start : position + 1])[None]
            expected = small_model()(row[:, :-1], row[:, 1:], reduction="none")[0, -1].item()
            assert found[position] == pytest.approx(expected, abs=1e-4)


def test_adaptation_moves_the_scores_but_not_the_first_chunk() -> None:
    ids, adapted = replaced(None), scored("doc_lora")
    frozen = nll_of("doc_lora", ids, ttt_lora_lr=0.0)
    for start, length in train_gpt.val_documents(ids):
        first = slice(start + 1, start + 1 + min(CHUNK, length - 1))
        assert np.array_equal(adapted[first], frozen[first])
        rest = slice(first.stop, start + length)
        assert length - 1 <= CHUNK or not np.allclose(adapted[rest], frozen[rest], atol=1e-4)


def test_adaptation_leaves_the_model_alone() -> None:
    before = {name: w.clone() for name, w in small_model().state_dict().items()}
    nll_of("doc_lora", stream_of(LENGTHS).tokens)
    assert all(torch.equal(before[name], w) for name, w in small_model().state_dict().items())


# Planted faults: the checks above must be able to fail


honest_score, honest_begin = train_gpt.DocLora.score, train_gpt.DocLora.begin


def learn_first(learner: train_gpt.DocLora, unit: train_gpt.Unit) -> Tensor:
    """A learner that trains on a unit's targets before it scores them."""
    honest_score(learner, unit)
    learner.losses(unit).mean(dim=1).sum().backward()
    learner.optimiser.step()
    learner.optimiser.zero_grad(set_to_none=True)
    return learner.losses(unit)


def carry_over(learner: train_gpt.DocLora, docs: tuple[int, ...]) -> None:
    """A learner whose documents begin with what the documents before have taught."""
    taught = {key: b.detach().mean(0) for key, b in learner.lora.B.items()} if learner.lora is not None else {}
    honest_begin(learner, docs)
    with torch.no_grad():
        for key, b in taught.items():
            learner.lora.B[key] += b


def test_a_learner_that_peeks_fails_the_causality_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt.DocLora, "score", learn_first)
    assert not same_before(40, *(nll_of("doc_lora", replaced(position)) for position in (None, 40)))


def test_a_learner_that_keeps_its_adapters_fails_the_document_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt.DocLora, "begin", carry_over)
    assert not same_elsewhere(40, *(nll_of("doc_lora", replaced(position)) for position in (None, 40)))


def test_units_that_offer_the_next_chunk_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = train_gpt.chunk_units

    def greedy(*args: object) -> list[train_gpt.Unit]:
        units = honest(*args)
        return [u._replace(learn_cols=slice(u.learn_cols.start, u.learn_cols.stop + 1)) for u in units]

    monkeypatch.setattr(train_gpt, "chunk_units", greedy)
    with pytest.raises(AssertionError, match="not scored yet"):
        nll_of("doc_lora", stream_of(LENGTHS).tokens)


def test_attention_across_documents_fails_the_document_check(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = train_gpt.GPT(rules.model_config(SMALL, smear_bos_mask=True), train_gpt.causal_attention)
    blind.load_state_dict(small_model().state_dict())
    monkeypatch.setitem(globals(), "small_model", lambda: blind)  # a backend that ignores the boundaries
    assert not same_elsewhere(130, *(nll_of("plain", replaced(position)) for position in (None, 130)))
