"""Test-time training per document: adapters, the published runs, schedules, and what a score depends on."""

from __future__ import annotations

import re

import golden_rules as rules
import numpy as np
import pytest
import torch
import ttt_rules
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train_gpt
from train_gpt import Adapters, Cells, DocLora

SMALL = rules.entry("ttt/warm_a_0_batches").config
PUBLISHED = {"attn": "o", "head": "lm_head"}  # our site -> published adapter family; the others have the same name


def published_adapter(key: str) -> str:
    """q_3 -> lora.q.3, attn_3 -> lora.o.3, head_0 -> lora.lm_head."""
    site, _, execution = key.rpartition("_")
    family = PUBLISHED.get(site, site)
    return f"lora.{family}" if site == "head" else f"lora.{family}.{execution}"


def rule(config: dict, key: str, half: str, like: Tensor) -> Tensor:
    """The values that the golden runs give an adapter, transposed, as it is kept here."""
    name = f"{published_adapter(key)}.{half}"
    return rules.fill(config["fill"], name, tuple(like.mT.shape), config["lora_amp"][half]).mT


@torch.no_grad()
def fill_adapters(adapters: Adapters, config: dict) -> None:
    """A and B by the rule."""
    for half in ("A", "B"):
        for key, value in getattr(adapters, half).items():
            value.copy_(rule(config, key, half, value))


def make_adapters(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Adapters, train_gpt.GPT]:
    """Adapters of the small golden model, and the model."""
    cfg = rules.model_config(SMALL, ttt_lora_rank=3)
    model = train_gpt.GPT(cfg, dtype=dtype)
    model.load_state_dict(rules.build(SMALL, torch.float32).state_dict())
    model.set_looping(True)
    model = model.double() if dtype == torch.float64 else model
    return Adapters(cfg, rules.runtime(dtype), model, rows), model


# Adapters


@rules.parametrize("lora_forward")
def test_forward_through_adapters(golden: rules.Entry) -> None:
    config, want = golden.config, golden.expected
    without = {site for site, name in (("k", "k"), ("attn", "o"), ("mlp", "mlp")) if not config[f"{name}_lora"]}
    sites = tuple(site for site in train_gpt.Config().ttt_lora_sites if site not in without)
    knobs = {"ttt_lora_rank": config["lora_rank"], "ttt_lora_alpha": config["lora_alpha"], "ttt_lora_sites": sites}
    model = rules.build(config, **knobs).requires_grad_(False)
    adapters = Adapters(rules.model_config(config, **knobs), rules.runtime(), model, config["rows"])
    fill_adapters(adapters, config)
    ids, targets = rules.rows_of(config)
    beyond = torch.arange(config["T"]) >= torch.tensor(config["row_lens"])[:, None]
    ids, targets = ids.masked_fill(beyond, 0), targets.masked_fill(beyond, 0)
    with torch.set_grad_enabled("grad_l2" in want):
        nll = model(ids, targets, None, adapters, "none")
    found = {"nll_sum_per_row": nll.masked_fill(beyond, 0).sum(1), "nll_first8_row0": nll[0]}
    found |= {"nll_first4_last_row": nll[-1], "num_slots": len(model.route.layers)}
    found["nll_per_row_pos_last_valid"] = nll[range(config["rows"]), [length - 1 for length in config["row_lens"]]]
    found["lora_param_count"] = adapters.state.weights.numel()
    loss = nll[:, : min(config["row_lens"])].mean(1).sum()
    found["loss_sum_of_row_means_over_first_min_len"] = loss
    rules.compare(found, want, skip=("grad_l2",))
    if "grad_l2" in want:
        loss.backward()
        halves = {"A": adapters.A, "B": adapters.B}
        for name, norm in want["grad_l2"].items():
            adapter, half = name.rsplit(".", 1)
            key = next(key for key in adapters.A if published_adapter(key) == adapter)
            assert halves[half][key].grad.norm().item() == pytest.approx(norm, rel=rules.REL), name


def test_fresh_adapters_change_no_bit_and_each_counts_for_its_own_row() -> None:
    """On all three stacks."""
    made, ids = [make_adapters(2, dtype) for dtype in (torch.float32, torch.bfloat16)], ttt_rules.sample(2, 24, [0, 24])
    for stack in ttt_rules.STACKS:
        model = ttt_rules.stack_model(stack, ttt_lora_rank=2)
        made.append((Adapters(model.cfg, rules.runtime(), model, 2), model))
    sites = {"A": "q k v attn mlp".split(), "G": "qkv attn mlp".split()}
    for adapters, model in made:
        mixers = (train_gpt.mixer_letters(model.cfg)[layer] for layer in model.route.layers)
        names = {f"{site}_{execution}" for execution, mixer in enumerate(mixers) for site in sites[mixer]}
        assert adapters.B.keys() == names | {"head_0"}, model.cfg
        for row, document in enumerate((4, 9)):
            adapters.renew(row, document)
        assert all(a.abs().max() > 0 and a.dtype == model.dtype for a in adapters.A.values()), model.cfg
        plain = model.eval()(ids)
        assert torch.equal(model(ids, None, None, adapters), plain) and not adapters.low, model.cfg
        model(ids, ids, None, adapters).backward()
        for name, b in adapters.B.items():
            assert b.grad is not None and all(row.any() for row in b.grad), (name, model.cfg)
            b.data[1].normal_(generator=torch.Generator().manual_seed(1))
        adapted = model(ids, None, None, adapters)
        assert torch.equal(adapted[0], plain[0]) and not torch.allclose(adapted[1], plain[1]), model.cfg


def test_sites_that_read_one_input_share_a_product() -> None:
    """The first site multiplies for all of them, in the mixer and not in the MLP; each takes its own part away."""
    adapters, model = make_adapters(2)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, model.cfg.model_dim, generator=generator).to(model.dtype)
    y = torch.zeros_like(x)
    for a in (*adapters.A.values(), *adapters.B.values()):
        a.data.normal_(generator=generator)
    for first, waiting in (("q", ["k_1", "v_1", "attn_1"]), ("mlp", [])):
        adapters(train_gpt.Site(first, 1, 1), x, y)
        assert list(adapters.low) == waiting, first
        for key in waiting:
            part, name = adapters.low[key], key.partition("_")[0]
            torch.testing.assert_close(part, adapters.scale * x @ adapters.A[key])
            out = adapters(train_gpt.Site(name, 1, 1), x, y[..., : adapters.B[key].size(2)])
            torch.testing.assert_close(out, part @ adapters.B[key])
        assert not adapters.low


def test_an_adapter_depends_on_seed_and_document_alone() -> None:
    (pair, _), (single, _) = make_adapters(2), make_adapters(1)
    pair.renew(0, 5)
    pair.renew(1, 8)
    single.renew(0, 8)
    for key, a in pair.A.items():
        assert torch.equal(a[1], single.A[key][0]) and not torch.equal(a[0], a[1])
        assert 0.5 * a.size(1) ** -0.5 < a.abs().max() <= a.size(1) ** -0.5
    single.cfg = train_gpt.dataclasses.replace(single.cfg, seed=2)
    single.renew(0, 8)
    assert not torch.equal(pair.A["q_0"][1], single.A["q_0"][0])


def test_rows_are_independent_and_move_with_their_state() -> None:
    adapters, model = make_adapters(4)
    ids = torch.from_numpy(rules.tokens(97, 96, [0, 24, 48, 72])).view(4, 24)
    fill_adapters(adapters, SMALL)
    before = model(ids, None, None, adapters)
    with torch.no_grad():
        for b in adapters.B.values():
            b[0] += 0.1
    after = model(ids, None, None, adapters)
    assert torch.equal(before[1:], after[1:]) and not torch.equal(before[0], after[0])
    adapters.all.steps[:, 0] = torch.arange(4)
    adapters.keep_rows(torch.tensor([1, 3]))
    torch.testing.assert_close(model(ids[[1, 3]], None, None, adapters), after[[1, 3]])
    assert adapters.state.steps[:, 0].tolist() == [1, 3] and len(adapters.A["q_0"]) == 2
    adapters.use_rows(4)
    storages = {t.untyped_storage().data_ptr() for t in adapters.leaves()}
    assert storages == {adapters.all.weights.data_ptr()}, "adapters are views of one buffer"


@pytest.mark.parametrize("beta1", [0.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_is_adamw_of_each_row_by_its_own_count(beta1: float, dtype: torch.dtype) -> None:
    """Rows renewed at different times, each against an optimiser of its own; half precision keeps float32 weights."""
    cfg = rules.model_config(SMALL, ttt_lora_rank=3, ttt_beta1=beta1, ttt_lora_lr=1e-3, ttt_weight_decay=0.7)
    adapters = Adapters(cfg, rules.runtime(dtype), train_gpt.GPT(cfg, dtype=dtype), 3)
    assert (adapters.all.first is None) == (beta1 == 0)
    generator, expected = torch.Generator().manual_seed(0), {}
    for step in range(6):
        for row in {0: (0, 1, 2), 2: (1,), 3: (0,)}.get(step, ()):
            adapters.renew(row, 10 * step + row)
            weight = torch.nn.Parameter(adapters.all.weights[row].clone())
            options = {"lr": 1e-3, "betas": (beta1, cfg.ttt_beta2), "eps": 1e-10, "weight_decay": 0.7}
            expected[row] = weight, torch.optim.AdamW([weight], **options)
        gradient = torch.randn(adapters.all.weights.shape, generator=generator, dtype=torch.float64)
        gradient = gradient.to(adapters.all.weights.dtype)
        adapters.state.steps.add_(1)
        correction = train_gpt.bias_correction(cfg, adapters.state.steps)
        train_gpt.adapter_adamw_(cfg, adapters.state, gradient, correction)
        for row, (weight, optimiser) in expected.items():
            weight.grad = gradient[row]
            optimiser.step()
            tolerance = 1e-13 if dtype == torch.float64 else 1e-6
            torch.testing.assert_close(adapters.all.weights[row], weight.detach(), rtol=0, atol=tolerance)
    if dtype == torch.bfloat16:
        assert adapters.all.weights.dtype == torch.float32 and adapters.A["q_0"].dtype == dtype
        assert torch.equal(adapters.all.live, adapters.all.weights.to(dtype))


# The published runs


SETTINGS = """
ttt_lora_rank=lora_rank ttt_lora_alpha=lora_alpha ttt_lora_lr=lr ttt_weight_decay=weight_decay ttt_beta1=beta1
ttt_beta2=beta2 ttt_eval_seq_len=window ttt_batch_size=batch_docs ttt_grad_steps=grad_steps
phased_ttt_prefix_docs=prefix_docs phased_ttt_num_phases=num_phases
"""  # our field=the golden entries' name


MASKED = ("1915", "2014")  # published code in which no smear crosses a document's start


def ttt_config(config: dict, **knobs: object) -> train_gpt.Config:
    settings = {field: config[name] for field, name in rules.knobs(SETTINGS).items()}
    settings["ttt_lora_lr"] *= config.get("local_lr_mult", 1.0)
    settings |= {"ttt_warm_start_a": bool(config["warm_start_a"]), "global_ttt_lr": config.get("global_lr", 0.0)}
    settings |= {"global_ttt_chunk_tokens": config.get("global_chunk_tokens", 32), "batch_slices": 1}
    table = (*config.get("short_steps", "").split(","), str(config["chunk"]))
    settings["ttt_chunk_size"] = tuple(train_gpt.UpTo.parse(text) for text in table if text)
    sites = dict.fromkeys(("q", "k", "v", "o", "mlp"), 1) | config.get("sites", {})
    settings["ttt_lora_sites"] = (*({"o": "attn"}.get(site, site) for site, on in sites.items() if on), "head")
    settings["eval_seq_len"] = config.get("global_seq_len", 16)
    return rules.model_config(config | {"bos_mask": config.get("code") in MASKED}, **settings | knobs)


def fill_new_rows(monkeypatch: pytest.MonkeyPatch, config: dict) -> None:
    """Adapters of documents that begin have the golden A of their row, unless they keep the one that is there."""
    renew = Adapters.renew

    def by_rule(adapters: Adapters, row: int, document: int, keep_A: bool = False) -> None:
        renew(adapters, row, document, keep_A)
        for key, a in adapters.A.items():
            if not keep_A:
                a.data[row] = rule(config, key, "A", a)[row]

    monkeypatch.setattr(Adapters, "renew", by_rule)


def record_steps(monkeypatch: pytest.MonkeyPatch, executions: int) -> list[tuple[Cells, dict[str, float] | None]]:
    """Cells that DocLora scores, with checks of the adapters that score them (None: it has none), idle rows aside."""
    steps, losses = [], DocLora.losses

    def listen(learner: DocLora, cells: Cells) -> Tensor:
        if learner.adapters is None:
            steps.append((cells, None))
            return losses(learner, cells)
        busy = torch.from_numpy(cells.documents >= 0)
        A, B = ({key: t[busy] for key, t in half.items()} for half in (learner.adapters.A, learner.adapters.B))
        norms = {
            f"{published_adapter(key).removeprefix('lora.')}.{half}_l2": adapters[key].norm().item()
            for half, adapters in (("A", A), ("B", B))
            for key in adapters
            if key.endswith("_0")
        }
        if f"mlp_{executions - 1}" in B:
            norms["mlp.last.B_wsum"] = rules.checks(B[f"mlp_{executions - 1}"].mT)["wsum"]
        steps.append((cells, norms))
        return losses(learner, cells)

    monkeypatch.setattr(DocLora, "losses", listen)
    return steps


def record_phases(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, dict[str, dict[str, float]]]]:
    """The tokens of each global update, with checks of some weights after it."""
    phases, update = [], train_gpt.global_update

    def listen(cfg: train_gpt.Config, runtime: train_gpt.Runtime, model: train_gpt.GPT, tokens: np.ndarray) -> int:
        steps = update(cfg, runtime, model, tokens)
        watched = {"tok_emb": model.tok_emb, "blocks.0.attn.c_q.weight": model.blocks[0].attn.q}
        watched = {name: matrix.weight for name, matrix in watched.items()} | {"skip_gates": model.skips.gates}
        phases.append((tokens, {name: rules.checks(weight) for name, weight in watched.items()}))
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        return steps

    monkeypatch.setattr(train_gpt, "global_update", listen)
    return phases


RUNS = [*rules.entries("ttt"), *rules.entries("ttt_sites", "frontier")]


@pytest.mark.parametrize("golden", RUNS, ids=lambda e: e.name.replace("/public/", "_"))
def test_adaptation_gives_the_published_numbers(golden: rules.Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    config, want = golden.config, golden.expected
    cfg = ttt_config(config)
    model = rules.build(config | {"bos_mask": config["code"] in MASKED})
    val = ttt_rules.golden_stream(config["doc_raw_lens"])
    docs = train_gpt.val_documents(val.tokens)
    assert [list(doc) for doc in docs] == want["docs_start_len"]
    batches = train_gpt.document_batches(docs, cfg.ttt_batch_size)
    assert batches == want["batches_doc_indices_in_processing_order"]

    fill_new_rows(monkeypatch, config)
    if "sites" in config:
        adapters = Adapters(cfg, rules.runtime(torch.float64), model, 1)
        assert adapters.state.weights.size(1) == want["adapter_parameters_per_row"], "a site that is off has none"
    steps, phases = record_steps(monkeypatch, len(model.route.layers)), record_phases(monkeypatch)
    with ttt_rules.recorded() as scores:
        score = train_gpt.EVALS["phased_lora"](cfg, rules.runtime(), model, val)
    assert score.val_loss == pytest.approx(want["val_loss"], abs=1e-7)
    assert score.val_bpb == pytest.approx(want["val_bpb"], abs=1e-7)
    assert (score.tokens, score.legal) == (len(val.tokens) - 1, True)
    for doc, (start, length) in enumerate(docs):
        found = [scores[position] for position in range(start + 1, start + length)]
        assert found == pytest.approx(want["nll_per_doc"][str(doc)], abs=1e-7)
    compare_steps(batches, steps, want["steps"], in_document="sites" in config)
    assert len(phases) == len(want.get("global_sgd", []))
    for (tokens, weights), expected in zip(phases, want.get("global_sgd", []), strict=True):
        assert (len(tokens), tokens[:4].tolist()) == (expected["tokens"], expected["first_tokens"])
        for name, numbers in weights.items():
            assert numbers == pytest.approx(expected[name], rel=1e-7, abs=1e-7), name


def test_a_tilt_changes_scores_and_no_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the published hints, which know the whole stream."""
    (golden,) = (e for e in rules.entries("tilt", "frontier") if "nll_per_doc" in e.expected)
    config, want, states = golden.config, golden.expected, []
    step = Adapters.step

    def listen(adapters: Adapters, *args: Tensor) -> None:
        step(adapters, *args)
        states[-1].append(adapters.state.weights.clone())

    monkeypatch.setattr(Adapters, "step", listen)
    fill_new_rows(monkeypatch, config)
    val = ttt_rules.golden_stream(config["doc_raw_lens"], config["V"])
    with rules.tilts(config):
        tilts = rules.published_tilts(val.tokens)
    assert int((tilts >= 0).sum()) == want["gates"]
    published = (lambda *_: tilts + 1 << train_gpt.TILT_AT), train_gpt.tilted
    monkeypatch.setitem(train_gpt.HINTS, "tilt", published)
    for hints, loss in ((), want["val_loss_without_tilt"]), (("tilt",), want["val_loss"]):
        states.append([])
        cfg = ttt_config(config, hints=hints)
        model = rules.build(config | {"bos_mask": False}, hints=hints)
        with ttt_rules.recorded() as scores:
            score = train_gpt.EVALS["phased_lora"](cfg, rules.runtime(), model, val)
        assert score.val_loss == pytest.approx(loss, abs=1e-7) and score.tokens == want["targets"]
    assert score.val_bpb == pytest.approx(want["val_bpb"], abs=1e-7)
    for doc, (start, length) in enumerate(train_gpt.val_documents(val.tokens)):
        found = [scores[position] for position in range(start + 1, start + length)]
        assert found == pytest.approx(want["nll_per_doc"][str(doc)], abs=1e-7)
    assert len(states[0]) > 5
    for plain, tilted in zip(*states, strict=True):
        assert torch.equal(plain, tilted)


def compare_steps(
    batches: list[list[int]], steps: list[tuple[Cells, dict]], expected: list[dict], in_document: bool
) -> None:
    """Offsets of chunks count from the window, or in the document."""
    assert len(steps) == len(expected)
    compared = 0
    for (cells, norms), want in zip(steps, expected, strict=True):
        assert cells.ids.shape[1] == want["width"]
        at = cells.begin[cells.rows] if in_document else cells.cols
        found = [
            [doc, int(at[cells.rows == row].min()), int((cells.rows == row).sum())]
            for row, doc in enumerate(cells.documents.tolist())
            if (cells.rows == row).any()
        ]
        assert found == want["rows_doc_offset_len"]
        if (
            norms and [doc for doc in cells.documents if doc >= 0] == batches[want["batch"]]
        ):  # published: finished rows count
            for name, number in want["state_before"].items():
                assert norms[name] == pytest.approx(number, rel=1e-7, abs=1e-7), name
            compared += 1
    assert compared > len(steps) / 3 or steps[0][1] is None


# Schedules


def test_phase_boundaries_and_segments() -> None:
    golden = rules.entries("schedule")[0].expected["phase_boundaries"]
    for name, wanted in golden.items():
        prefix, phases, documents = (int(n) for n in re.findall(r"\d+", name))
        assert (train_gpt.phase_boundaries(prefix, phases, documents) or [0]) == wanted, name
    batches, segments = [[3, 4], [1, 2], [0]], train_gpt.phase_segments
    assert segments(batches, []) == [(batches, [])]
    assert segments(batches, [2, 3]) == [([[3, 4]], [3, 4]), ([[1, 2]], [1, 2, 3]), ([[0]], [])]
    assert segments(batches, [5]) == [(batches, [0, 1, 2, 3, 4]), ([], [])]


def test_schedule_of_documents_and_chunks() -> None:
    golden = rules.entries("schedule")[0]
    config, want = golden.config, golden.expected
    val = ttt_rules.golden_stream(config["raw_doc_lengths"], 8192)
    docs = train_gpt.val_documents(val.tokens)
    assert [list(doc) for doc in docs] == want["docs_start_len"]
    batches = train_gpt.document_batches(docs, config["batch_docs"])
    assert batches == [batch["docs"] for batch in want["batches_1934_processing_order"]]
    assert batches == want["batches_1915_warm0_global_length"]
    windows = want["chunk_windows_per_doc_[win_start,win_len,chunk_offset,chunk_len]"]
    for doc, (_, length) in enumerate(docs):
        chunks = range(-(-(length - 1) // config["chunk"]))
        found = [list(train_gpt.chunk_window(c, length - 1, config["chunk"], config["window"])) for c in chunks]
        assert found == windows[str(doc)]
    for case in rules.entries("chunk_window")[0].expected:
        chunk, predictions, _, size, window = case["args"]
        found = train_gpt.chunk_window(chunk, predictions, size, window)
        assert list(found) == case["result_[win_start,win_len,chunk_offset,chunk_len]"], case
    knobs = {"ttt_chunk_size": rules.always(config["chunk"]), "ttt_eval_seq_len": config["window"]}
    cfg = train_gpt.Config(ttt_batch_size=1, **knobs)
    steps = list(train_gpt.batch_steps(cfg, val, docs, [[10]]))
    widths = [[s.cells.ids.shape[1], s.cells.ids.shape[1] - config["chunk"]] for s in steps]
    assert widths == want["shared_width_and_train_offset_per_chunk_index"]
    assert all(s.lesson.cols == slice(*reversed(w)) for s, w in zip(steps[:-1], widths, strict=False))
    assert [s.lesson is None for s in steps] == [False] * (len(steps) - 1) + [True], "the last chunk is never learnt"


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=9),
    size=st.integers(1, 6),
    sizes=st.sampled_from([(8, 16), (8, 33), (16, 33), (16, 96)]),
    context=st.sampled_from(sorted(train_gpt.TTT_CONTEXTS)),
)
def test_steps_score_every_target_once_from_its_own_document(
    lengths: list[int], size: int, sizes: tuple[int, int], context: str
) -> None:
    lengths[-1] += 1  # the last document has no next one whose start it predicts
    val, (chunk, window) = ttt_rules.golden_stream(lengths), sizes
    docs, ledger = train_gpt.val_documents(val.tokens), train_gpt.Ledger(len(val.tokens))
    cfg = train_gpt.Config(ttt_chunk_size=rules.always(chunk), ttt_eval_seq_len=window, ttt_batch_size=size)
    kind = train_gpt.TTT_CONTEXTS[context]
    asked = iter(kind.batches(docs, size))
    for cells, lesson in kind.steps(cfg, val, docs, asked):
        positions = cells.scored()
        ledger.claim(positions)
        assert np.array_equal(cells.targets[cells.rows, cells.cols], val.tokens[positions])
        assert np.array_equal(cells.ids[cells.rows, cells.cols], val.tokens[positions - 1])
        learning = [] if lesson is None else lesson.rows
        if lesson is not None:
            ledger.require(lesson.targets(cells))
        for row, doc in enumerate(cells.documents):
            if doc < 0:
                assert row not in cells.rows
                assert context == "recompute" or next(asked, None) is None, "idle before the queue is empty"
                continue
            start, length = docs[doc]
            own = positions[cells.rows == row]
            assert ((own > start) & (own < start + length)).all()
            assert not len(own) or own.min() == start + 1 + cells.begin[row]
            assert (row in learning) == (cells.begin[row] + chunk < length - 1)
    ledger.close(rules.runtime())


def test_rows_shrink_by_halves() -> None:
    for rows, unfinished, kept in ((64, 33, 64), (64, 32, 32), (64, 3, 4), (64, 1, 2), (3, 1, 3), (1, 1, 1), (5, 2, 2)):
        busy = np.zeros(rows, bool)
        busy[rows - unfinished :] = True
        index = train_gpt.rows_to_keep(busy)
        assert len(index) == kept and busy[index].sum() == unfinished and (np.diff(index) > 0).all()


# What a score depends on (causality: tests/test_causality.py)

LENGTHS = [30, 61, 45, 13, 52]  # documents; batches of them, in order: [1], [2, 4], [3, 0]
CHUNK = 16


def nll_of(name: str, ids: np.ndarray, **knobs: object) -> np.ndarray:
    """What an evaluator counts for each position of a stream."""
    small = {"eval_seq_len": 24, "eval_stride": 7, "val_batch_tokens": 96, "batch_slices": 2, "ttt_lora_lr": 0.01}
    cfg = ttt_config(SMALL | {"code": "1915", "chunk": CHUNK}, eval=name, **small | knobs)
    model = rules.build(SMALL | {"bos_mask": True}, torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = ttt_rules.scores_of(cfg, model, train_gpt.ValData(ids, np.ones(len(ids), np.int32)))
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    return found


def test_adaptation_moves_the_scores_but_not_the_first_chunk_and_not_by_the_batch() -> None:
    ids = ttt_rules.golden_stream(LENGTHS).tokens
    adapted, frozen = nll_of("doc_lora", ids), nll_of("doc_lora", ids, ttt_lora_lr=0.0)
    for start, length in train_gpt.val_documents(ids):
        first = slice(start + 1, start + 1 + min(CHUNK, length - 1))
        assert np.array_equal(adapted[first], frozen[first])
        rest = slice(first.stop, start + length)
        assert length - 1 <= CHUNK or not np.allclose(adapted[rest], frozen[rest], atol=1e-4)
    for batch in (1, 5):
        np.testing.assert_allclose(nll_of("doc_lora", ids, ttt_batch_size=batch)[1:], adapted[1:], rtol=0, atol=2e-3)
