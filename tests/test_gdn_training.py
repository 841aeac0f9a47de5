"""The gated delta net hybrid beside its model: order of the data, Muon, schedules, bits, rotation, test-time training.

golden/gdn_training.json holds numbers of the published program (PR 1895), by the rules of golden_rules.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gdn_rules
import golden_rules as rules
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import train_gpt
from train_gpt import Config, UserError

GOLDEN = json.loads((Path(__file__).resolve().parent / "golden" / "gdn_training.json").read_text(encoding="utf-8"))
PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)
RECORD = {"muon_coefficients": "polar_express_safe", "warmdown_frac": 0.85, "min_lr": 0.1, "enable_looping_at": 0.4}


def entries(kind: str) -> list[rules.Entry]:
    """Entries of a kind; those about the small model lack what they share."""
    base = GOLDEN["base"] if kind in ("ttt", "plain_eval") else {}
    found = [e for e in GOLDEN["entries"] if e["name"].split("/")[0] == kind]
    return [rules.Entry(e["name"], base | e["config"], e["expected"]) for e in found]


def parametrize(kind: str) -> pytest.MarkDecorator:
    """One test per entry of a kind, as the argument `golden`."""
    return pytest.mark.parametrize("golden", entries(kind), ids=lambda e: e.name.rpartition("/")[2])


def write_shards(folder: Path, *shards: np.ndarray) -> Path:
    """Training shards of a data directory."""
    folder.mkdir(exist_ok=True)
    for i, tokens in enumerate(shards):
        head = np.zeros(train_gpt.SHARD_HEADER_INTS, "<i4")
        head[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(tokens)
        (folder / f"fineweb_train_{i:06d}.bin").write_bytes(head.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return folder


# The model of the golden numbers


def model_config(c: dict[str, Any], **knobs: Any) -> Config:
    """The Config of an entry's model, on rows of the text as they are."""
    return gdn_rules.model_config(c, **{"loader": "shuffled", "batch_slices": 1} | knobs)


def build(c: dict[str, Any]) -> train_gpt.GPT:
    """The filled float64 model of an entry, on its route."""
    model = gdn_rules.build(c)
    model.set_looping(c["loop_on"])
    return model


def published(c: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an entry's model by their published names."""
    letters = train_gpt.mixer_letters(model_config(c))
    return {gdn_rules.published_name(name, letters): tensor for name, tensor in tensors.items()}


@pytest.fixture
def exact_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary tables in float64, as the golden numbers were made."""
    monkeypatch.setattr(train_gpt, "rotary_tables", gdn_rules.exact_tables)


def golden_stream(c: dict[str, Any], targets: int) -> train_gpt.ValData:
    """The golden tokens with the golden byte table."""
    ids, tokens = np.arange(c["V"]), rules.tokens(c["V"], targets + 1, [])
    table = train_gpt.ByteTable((1 + ids % 5).astype(np.int32), ids % 3 == 0, ids < 4)
    return train_gpt.ValData(tokens, table.count(tokens))


# Muon


@torch.no_grad()
def muon_history(golden: rules.Entry, dtype: torch.dtype) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Weights and momentum of each matrix after each step, weights in at least float32, iterations in dtype."""
    c, wide, history = golden.config, max(dtype, torch.float32, key=lambda d: d.itemsize), {}
    cfg = Config(
        muon_wd=c["weight_decay"], muon_row_normalize=c["row_normalize"], muon_coefficients="polar_express_safe"
    )
    for name, shape in c["matrices"].items():
        weight = nn.Parameter(rules.fill("hash", f"muon.w.{c['key']}.{name}", tuple(shape), c["weight_amp"]).to(wide))
        muon, history[name] = train_gpt.Muon([weight], cfg, rules.runtime(dtype)), []
        for step in range(c["steps"]):
            key = f"muon.g.{c['key']}.{name}.{step}"
            weight.grad = rules.fill("hash", key, tuple(shape), c["grad_amp"][step]).to(wide)
            muon.step(muon.reduce(), c["lr"] * c["lr_mul"][step], c["momentum"][step])
            history[name].append((weight.detach().clone(), muon.buffers[0][0].clone()))
    return history


@parametrize("muon")
def test_muon_in_float64(golden: rules.Entry) -> None:
    history = muon_history(golden, torch.float64)
    for name, (*steps, first) in golden.expected["float64"].items():
        for (weights, momentum), want in zip(history[name][1:], steps, strict=True):
            rules.assert_checks(weights, want["weights"])
            rules.assert_checks(momentum, want["momentum"])
        assert weights.flatten()[:4].tolist() == pytest.approx(first, rel=rules.REL)


@parametrize("muon")
def test_muon_with_half_precision_iterations(golden: rules.Entry) -> None:
    """Both ends of what half precision does here: bf16 in, which iterates a long matrix in fp16."""
    history = muon_history(golden, torch.bfloat16)
    for name, want in golden.expected["published_precision"].items():
        found = history[name][-1][0].flatten()[:4].tolist()
        assert found == pytest.approx(want, abs=2e-3)


@parametrize("newton_schulz")
def test_orthogonalisation(golden: rules.Entry) -> None:
    c, want = golden.config, golden.expected
    (rows, cols), key = c["shape"], c["key"]
    x = rules.fill("hash", f"ns.x.{key}", (rows, cols), 1.0)
    if c["rank"]:
        u, v = (rules.fill("hash", f"ns.{n}.{key}", s, 1.0) for n, s in (("u", (rows, 3)), ("v", (3, cols))))
        x = u @ v + 0.001 * x
    out = train_gpt.orthogonalize(x[None], "polar_express_safe", 5)[0]
    rules.assert_checks(out, want["output"])
    assert out.flatten()[:4].tolist() == pytest.approx(want["output_first4"], rel=rules.REL)
    values = torch.linalg.svdvals(out)[: len(want["singular_values_out"])]
    assert values.tolist() == pytest.approx(want["singular_values_out"], rel=rules.REL)


def test_singular_values_go_where_the_polynomials_say() -> None:
    """Inputs of at least 1 % of the norm land in [0.846, 1.124]; smaller ones are lifted, not lost."""
    values = torch.logspace(-4, 0, 200, dtype=torch.float64)
    out = values.clone()
    for a, b, c in train_gpt.COEFFICIENTS["polar_express_safe"]:
        out = a * out + b * out**3 + c * out**5
    assert 0.846 < out[values >= 0.01].min() and out.max() < 1.1241
    assert out[0].item() == pytest.approx(0.08, abs=0.005)


def plain_iterations(x: Tensor, coefficients: str, steps: int) -> Tensor:
    """Newton-Schulz on the matrix itself, whatever its shape."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    triples = train_gpt.COEFFICIENTS[coefficients]
    for i in range(steps):
        a, b, c = triples[min(i, len(triples) - 1)]
        A = x @ x.mT
        x = a * x + (b * A + c * A @ A) @ x
    return x


def spectrum(rows: int, cols: int, decades: float, seed: int) -> Tensor:
    """A random (1, rows, cols) matrix whose singular values fall over some decades, float64."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, rows, generator=generator, dtype=torch.float64)).Q for n in (rows, cols))
    return (u * torch.logspace(0, -decades, rows, dtype=torch.float64) @ v.T)[None]


@given(
    rows=st.integers(1, 24),
    ratio=st.floats(1, 6),
    tall=st.booleans(),
    steps=st.integers(1, 10),
    name=st.sampled_from(sorted(train_gpt.COEFFICIENTS)),
    decades=st.floats(0, 6),
)
@PROPERTY
def test_gram_form_is_the_same_iteration(
    rows: int, ratio: float, tall: bool, steps: int, name: str, decades: float
) -> None:
    x = spectrum(rows, math.ceil(rows * ratio), decades, rows)
    want = plain_iterations(x, name, steps)
    found = train_gpt.orthogonalize(x.mT if tall else x, name, steps)
    torch.testing.assert_close(found.mT if tall else found, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("decades", [1.0, 4.0])
@pytest.mark.parametrize("name", sorted(train_gpt.COEFFICIENTS))
def test_half_precision_never_overshoots_on_wide_spectra(name: str, decades: float) -> None:
    """Where bf16 itself would go to 1.5 and over: see gram_iterations."""
    x = spectrum(48, 160, decades, 1)
    want, found = (train_gpt.orthogonalize(t, name, 5).double() for t in (x, x.bfloat16()))
    plain = plain_iterations(x.bfloat16(), name, 5).double()
    limit = torch.linalg.svdvals(want).max()
    assert torch.linalg.svdvals(found).max() < 1.03 * limit
    assert (found - want).norm() < 1.2 * (plain - want).norm(), "no worse than bf16 on the matrix itself"


# Schedules


@parametrize("lr_multiplier")
def test_lr_multiplier(golden: rules.Entry) -> None:
    c = golden.config
    found = [train_gpt.lr_multiplier(f, c["warmdown_frac"], c["min_lr"]) for f in c["fractions"]]
    assert found == pytest.approx(golden.expected["multiplier"], rel=1e-9, abs=1e-15)


def test_momentum_warm_up() -> None:
    (golden,) = entries("muon_momentum")
    ramp = golden.config["start"], golden.config["end"], golden.config["warmup_steps"]
    found = [train_gpt.muon_momentum(step, *ramp) for step in golden.config["steps"]]
    assert found == pytest.approx(golden.expected["momentum"], rel=1e-9)


def test_fraction_of_the_run_and_what_it_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    (golden,) = entries("training_fraction")
    c, want = golden.config, golden.expected
    cfg = Config(**RECORD, qat="noise", qat_noise_start_frac=c["noise_start_frac"])
    budget = c["max_wallclock_seconds"] - c["reserve_seconds"]
    for elapsed, fraction, mult, on, noisy in zip(
        c["elapsed_ms"], want["fraction"], want["multiplier"], want["loop_on"], want["noise_on"], strict=True
    ):
        clock = train_gpt.Clock(rules.runtime(), budget, c["iterations"])
        monkeypatch.setattr(clock, "read", lambda elapsed=elapsed: elapsed / 1e3)
        found = clock.fraction(0)
        assert found == pytest.approx(fraction, rel=1e-9)
        assert train_gpt.lr_multiplier(found, cfg.warmdown_frac, cfg.min_lr) == pytest.approx(mult, rel=1e-9)
        now = train_gpt.Progress.at(cfg, found, 1)
        assert [train_gpt.STAGES[name](cfg, now) for name in ("looping", "noise")] == [on, noisy]
    free = train_gpt.Clock(rules.runtime(), 0.0, c["iterations"])
    assert [free.fraction(step) for step in c["steps_without_cap"]] == pytest.approx(want["fraction_without_cap"])


def test_late_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A delta layer's output, which the published pattern does not name, is out of reach by a glob over layers."""
    (golden,) = entries("late_noise")
    c, want, model = golden.config, golden.expected, nn.Module()
    ours = {"c_k": "attn.k", "proj": "attn.o", "o_proj": "attn.o"}
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, (rows, cols) in c["shapes"].items():
        _, layer, part, leaf, _ = name.split(".")
        growth = 1 + 0.5 * torch.arange(rows, dtype=torch.float64) / rows
        weight = rules.fill("hash", f"noise.w.{c['key']}.{name}", (rows, cols), 0.1) * growth[:, None]
        renamed = f"{part}.{leaf}" if part == "mlp" else ours[leaf]
        blocks.setdefault(layer, {})[renamed] = weight
    state = {f"blocks.{layer}.{n}.weight": w for layer, ws in blocks.items() for n, w in ws.items()}
    state["blocks.2.attn.k.bias"] = torch.ones(3)
    monkeypatch.setattr(model, "named_parameters", lambda: state.items())
    cfg = Config(
        qat="noise",
        matrix_bits=c["matrix_bits"],
        attn_clip_sigmas=c["matrix_clip_sigmas"],
        qat_noise_mult=c["noise_mult"],
        qat_noise_patterns=("attn.k.", "blocks.[2-9].attn.o.weight"),
    )
    noise = train_gpt.QuantNoise(cfg, model)
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.ones(shape, dtype=torch.float64))
    names = [n for n, p in state.items() if any(p is q for q in noise.params)]
    assert len(names) == len(want["targets_in_order"]) == 3
    added = {name: new - state[name] for name, new in zip(names, noise.values(0), strict=True)}
    for name in want["targets_in_order"]:
        _, layer, _, leaf, _ = name.split(".")
        sigma = added[f"blocks.{layer}.{ours[leaf]}.weight"]
        assert sigma[:, 0].tolist() == pytest.approx(want[name]["sigma_per_row"], rel=1e-5)


# The order of the data


def deck_config(folder: Path, **knobs: Any) -> Config:
    return Config(**{"data_path": str(folder), "loader": "shuffled", "vocab_size": 10_000, "train_seq_len": 32} | knobs)


def numbered(lengths: list[int]) -> list[np.ndarray]:
    """Shards whose tokens tell where they stand: 1000 * shard + position."""
    return [1000 * i + np.arange(n) for i, n in enumerate(lengths)]


@parametrize("loader")
def test_shuffled_order_is_the_published_one(golden: rules.Entry, tmp_path: Path) -> None:
    c, want = golden.config, golden.expected
    folder = write_shards(tmp_path / "data", *numbered(c["shard_lengths"]))
    slices = c["world_size"] * c["grad_accum_steps"]
    cfg = deck_config(folder, batch_slices=slices, train_batch_tokens=c["batch_tokens_global"])
    pieces = [train_gpt.read_shard(path) for path in train_gpt.list_shards(str(folder), "train")]
    deck = train_gpt.ShuffledSequences(pieces[c["rank"] :: slices], c["seq_len"], c["rank"])
    deck.shuffle()
    assert [starts.tolist() for starts in deck.starts] == want["start_list_per_file"]
    batches = train_gpt.shuffled_rows(cfg, range(c["rank"], slices, c["world_size"]))
    for wanted in want["batches_as_file_and_start"]:
        rows = np.concatenate(next(batches))
        assert [[*divmod(int(first), 1000)] for first in rows[:, 0]] == wanted
        assert (np.diff(rows.astype(int)) == 1).all() and rows.shape[1] == c["seq_len"] + 1


@given(
    lengths=st.lists(st.integers(40, 400), min_size=1, max_size=5),
    slices=st.sampled_from([1, 2, 4]),
    length=st.integers(2, 9),
)
@PROPERTY
def test_each_sequence_is_dealt_once_and_no_two_slices_share_text(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], slices: int, length: int
) -> None:
    """Also with fewer shards than slices: those are cut into pieces."""
    folder = write_shards(tmp_path_factory.mktemp("shuffled"), *numbered(lengths))
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
    folder = write_shards(tmp_path / "data", *numbered([200, 20]))
    few = deck_config(folder, batch_slices=2, train_batch_tokens=64)
    with pytest.raises(UserError, match=r"do not give each of BATCH_SLICES=2 a sequence of TRAIN_SEQ_LEN=32"):
        next(train_gpt.shuffled_rows(few, range(1)))
    one = deck_config(folder, batch_slices=1, train_batch_tokens=64, vocab_size=100)
    with pytest.raises(UserError, match="is outside VOCAB_SIZE=100"):
        list(itertools.islice(train_gpt.shuffled_rows(one, range(1)), 3))
    assert next(train_gpt.shuffled_rows(deck_config(folder, batch_slices=1, train_batch_tokens=64), range(1)))


def test_rows_shift_targets_and_ignore_documents(tmp_path: Path) -> None:
    tokens = np.arange(200) % 7 + 1  # full of document starts
    cfg = deck_config(write_shards(tmp_path / "data", tokens), batch_slices=1, train_batch_tokens=64)
    batches = train_gpt.train_batches(cfg, rules.runtime())
    (batch,) = next(batches)
    batches.close()
    assert batch.cu_seqlens is None and batch.ids.shape == batch.targets.shape == (2, 32)
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1]) and batch.ids.dtype == torch.int64


# Quantisation


@parametrize("gptq")
def test_gptq(golden: rules.Entry) -> None:
    c, want = golden.config, golden.expected
    rows, cols, key = c["rows"], c["cols"], c["key"]
    W = rules.fill("hash", f"gptq.W.{key}", (rows, cols), 0.1) * (1 + 0.5 * torch.arange(rows) / rows)[:, None]
    W, H = W.float(), golden_hessian(key, c["samples"], cols, c["rho"], c["dead_columns"])
    rules.assert_checks(H, want["hessian"], rel=1e-6)
    bits = torch.tensor(c["row_bits"])[:, None] if "row_bits" in c else (c["clip_range"] + 1).bit_length()
    scale = train_gpt.row_scales(W, bits, c["clip_sigmas"])
    assert scale.double().tolist() == pytest.approx(want["scale_fp16"], rel=1e-9)
    q = train_gpt.gptq(W, H.float(), scale[:, None], bits, 0.01, c["block_size"]).int()
    limit = 2 ** (torch.as_tensor(bits) - 1) - 1
    weight = 1 + torch.arange(q.numel()).view_as(q) % 97
    assert q.sum(1).tolist() == want["q_row_sums"] and q.abs().sum(1).tolist() == want["q_row_abs_sums"]
    assert q[0, :16].tolist() == want["q_row0_first16"] and q[-1, -8:].tolist() == want["q_last_row_last8"]
    assert int((q * weight).sum()) == want["q_weighted"]
    assert int((q.abs() == limit.view(-1, 1)).sum()) == want["at_clip_limit"]
    error = W.double() - q * scale.double()[:, None]
    found = (error @ H * error).sum().item()
    assert found == pytest.approx(want["hessian_weighted_error"], rel=1e-4)


def golden_hessian(key: str, samples: int, cols: int, rho: float, dead: list[int]) -> Tensor:
    """X^T X / samples, float64, of correlated columns."""
    X = rules.fill("hash", f"gptq.X.{key}", (samples, cols), 1.0) * (1 + torch.arange(cols) / cols)
    X = X + rho * rules.fill("hash", f"gptq.c.{key}", (samples, 1), 1.0)
    X[:, dead] = 0
    return X.T @ X / samples


def frequency_shards(c: dict[str, Any], vocab: int) -> list[np.ndarray]:
    """Token files in which low ids are frequent, by the golden rule."""
    names = [f"freq.{c['key']}.{i}" for i in range(len(c["shard_lengths"]))]
    draws = (rules.fill("hash", name, (n,), 1.0) for name, n in zip(names, c["shard_lengths"], strict=True))
    return [(vocab * ((u.numpy() + 1) / 2) ** 3).astype(np.int64) for u in draws]


@parametrize("embedding_split")
def test_frequent_rows(golden: rules.Entry, tmp_path: Path) -> None:
    c, want, V = golden.config, golden.expected, golden.config["V"]
    folder = write_shards(tmp_path / "data", *frequency_shards(c, V))
    cfg = Config(
        data_path=str(folder),
        vocab_size=V,
        embed_quant="gptq_freqsplit",
        embed_topk=c["topk"],
        embed_freq_tokens=c["freq_tokens"],
        embed_top_bits=c["top_bits"],
        embed_tail_bits=c["tail_bits"],
    )
    counts = train_gpt.token_counts(cfg, rules.runtime())
    assert int(counts.sum()) == want["scanned_tokens"] and counts[:16].tolist() == want["counts_first16"]
    assert int(counts.square().sum()) == want["counts_sum_squares"]
    rule = train_gpt.refined_plan(cfg, {}, {train_gpt.COUNTS: counts})["tok_emb.weight"]
    assert (rule.scheme, rule.bits, len(rule.frequent_rows)) == ("gptq_freqsplit", c["tail_bits"], c["topk"])
    if "top_ids_sorted_by_id" in want:
        assert sorted(rule.frequent_rows) == want["top_ids_sorted_by_id"]
    else:  # of tied ids the published choice depends on the machine; here the lowest are taken
        tied = want["tied_ids_if_lowest_id_first"]
        assert sorted(rule.frequent_rows) == sorted(want["ids_strictly_above_sorted"] + tied)
        assert len(tied) == want["tied_ids_to_pick"] and counts[tied].unique().tolist() == [want["count_at_cut"]]


@parametrize("bits")
def test_bits_by_pattern(golden: rules.Entry) -> None:
    """ba is kept in fp16 here, as by its size in the published file; there its name alone would have said 6."""
    c = golden.config
    cfg = train_gpt.load_config(
        {
            "MATRIX_BITS_OVERRIDES": c["overrides"].replace("attn.proj.weight:", " , blocks.[2-9].attn.o.weight: "),
            "MATRIX_BITS": str(c["matrix_bits"]),
            "EMBED_BITS": str(c["embed_bits"]),
            "MIXERS": "G*2 A*8 G",
            "ATTN_EXTRAS": "xsa,sink",
        }
    )
    plan = train_gpt.quant_plan(cfg)
    for name, bits in zip(c["names"], golden.expected["bits"], strict=True):
        ours = name.replace("o_proj", "o").replace("ba_proj", "ba")
        ours = ours.replace("attn.proj", "attn.o").replace("mlp.proj", "mlp.down")
        assert plan[ours].bits == (16 if ".ba." in ours else bits), ours


def test_the_first_override_that_fits_counts_and_keeps_scheme_and_clip() -> None:
    cfg = Config(
        mixers="G*2 A*9",
        attn_extras=("sink",),
        matrix_bits_overrides=("attn.o:7", "blocks.1.*: 5", "mlp.down:8"),
    )
    found = {
        n: train_gpt.quant_plan(cfg)[n]
        for n in (
            "blocks.1.attn.o.weight",
            "blocks.1.attn.z.weight",
            "blocks.1.attn.qkv.weight",
            "blocks.1.mlp.down.weight",
            "blocks.2.mlp.down.weight",
            "blocks.2.attn.q.weight",
            "blocks.1.attn.ba.weight",
            "blocks.1.attn.taps",
            "blocks.2.attn.sink",
            "blocks.1.attn.A_log",
            "blocks.1.attn.dt_bias",
        )
    }
    assert [rule.bits for rule in found.values()] == [7, 5, 5, 5, 8, 6, 16, 16, 16, 16, 16]
    assert found["blocks.2.mlp.down.weight"].clip == cfg.mlp_clip_sigmas
    assert found["blocks.1.attn.qkv.weight"].clip == cfg.attn_clip_sigmas


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"MATRIX_BITS_OVERRIDES": "attn.o:9"}, "must be name:bits with 2 to 8 bits"),
        ({"HADAMARD_VO_ROTATE": "1"}, "say ROTATE=hadamard_vo"),
        ({"EMBED_TOPK": "0"}, "EMBED_TOPK=0 must be >= 1"),
    ],
)
def test_wrong_knobs_are_sentences(knobs: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_gpt.load_config(knobs)


def test_an_override_that_names_nothing_is_found_before_the_training() -> None:
    with pytest.raises(UserError, match="MATRIX_BITS_OVERRIDES=attn.out is in no name of a matrix"):
        train_gpt.explain(Config(matrix_bits_overrides=("attn.out:7",)), {})


# Rotation


@parametrize("hadamard_matrix")
def test_hadamard_matrix(golden: rules.Entry) -> None:
    R, want = train_gpt.hadamard(golden.config["n"]), golden.expected
    signs = ["".join("+" if x > 0 else "-" for x in row) for row in R[:8]]
    assert signs == want["rows_as_sign_strings"]
    assert R.abs().unique().tolist() == pytest.approx([want["scale"]], rel=1e-9)
    torch.testing.assert_close(R @ R.T, torch.eye(len(R), dtype=torch.float64))


# Bytes


@parametrize("byte_shuffle")
def test_bytes_are_sorted_by_significance_as_published(golden: rules.Entry) -> None:
    """Here by array, with its own item size and no header; the published shuffle took the whole file in pairs."""
    c, want = golden.config, golden.expected
    data = bytes((37 * i * i + 11 * i + c["offset"]) % 256 for i in range(c["n"]))
    assert data.hex() == want["input_hex"]
    if c["n"] % c["stride"]:
        return  # no array has part of an item
    kind = {1: "|u1", 2: "<u2", 4: "<u4"}[c["stride"]]
    array = np.frombuffer(data, kind)
    found = train_gpt.shuffle_bytes(array)
    assert found.hex() == want["output_hex"].removeprefix(b"BSHF".hex() + f"{c['stride']:02x}")
    assert np.array_equal(train_gpt.unshuffle_bytes(found, kind, array.shape), array)


# Rotation, Hessians and stored bits of the model


@parametrize("hadamard_rotation")
def test_rotation_of_the_golden_model(golden: rules.Entry) -> None:
    c = golden.config
    model, cfg = build(c), model_config(c, rotate="hadamard_vo")
    turned, _ = train_gpt.reparametrize(cfg, rules.runtime(), model.state_dict(), {})
    state, before = published(c, turned), published(c, model.state_dict())
    changed = {name for name in before if not torch.equal(state[name], before[name])}
    assert changed == set(golden.expected["changed_tensors"])
    for name, want in golden.expected.items():
        if name != "changed_tensors":
            rules.assert_checks(state[name], {key: want[key] for key in ("sum", "l2", "wsum")})
            assert state[name].flatten()[:4].tolist() == pytest.approx(want["first4"], rel=1e-7)


@pytest.mark.parametrize("loop_on", [False, True])
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"attn_extras": ("xsa", "sink", "value_residual"), "attn_gate": "out"},
        {"attn_extras": ("sink",), "attn_gate": "dense_bias"},
        {"attn_extras": ("xsa",), "mixers": "", "num_kv_heads": 4, "attn_gate": "sparse"},
        {"num_kv_heads": 1, "xsa_last_n": 2, "num_heads": 2},
    ],
    ids=["record", "value_residual", "no_xsa", "attention_alone", "one_kv_head"],
)
def test_rotation_changes_no_output(knobs: dict[str, Any], loop_on: bool) -> None:
    c = entries("hadamard_rotation")[0].config
    cfg = model_config(c, rotate="hadamard_vo", **knobs)
    assert not cfg.problems()
    model, generator = train_gpt.GPT(cfg, dtype=torch.float64).double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.init_weights(1).parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    model.set_looping(loop_on)
    ids = torch.randint(0, c["V"], (2, 30), generator=generator)
    tap = train_gpt.HessianTap()
    logits = model(ids, taps=tap)
    hessians = tap.hessians(model, 1, rules.runtime())
    state, turned = train_gpt.reparametrize(cfg, rules.runtime(), model.state_dict(), hessians)
    model.load_state_dict(state)
    again = train_gpt.HessianTap()
    torch.testing.assert_close(model(ids, taps=again), logits, rtol=0, atol=1e-11)
    collected = again.hessians(model, 1, rules.runtime())
    assert collected.keys() == turned.keys()
    for name, H in collected.items():
        torch.testing.assert_close(turned[name], H, rtol=1e-4, atol=1e-4 * float(H.abs().max()), msg=name)


@parametrize("hessians")
def test_hessians_of_the_golden_model(golden: rules.Entry, exact_rope: None) -> None:
    """Ours has one for every matrix, the published list those of over 65,536 weights; ba is fp16 in both."""
    c, tap = golden.config, train_gpt.HessianTap()
    model = build(c)
    stream = torch.from_numpy(rules.tokens(c["V"], c["batches"] * c["rows"] * c["T"], []))
    with torch.no_grad():
        for ids in stream.view(c["batches"], c["rows"], c["T"]):
            model(ids, None, None, tap)
    found = published(c, tap.hessians(model, c["batches"], rules.runtime()))
    assert set(golden.expected["names"]) <= set(found) and not any("ba_proj" in name for name in found)
    assert all(f"blocks.0.attn.{n}_proj.weight" in found for n in ("qkv", "z", "o"))
    for name, want in golden.expected["hessians"].items():
        assert found[name].trace().item() == pytest.approx(want["trace"], rel=1e-5)
        rules.assert_checks(found[name], {key: want[key] for key in ("sum", "l2", "wsum")}, rel=1e-5)


def test_stored_dictionary(tmp_path: Path) -> None:
    """A matrix without a Hessian, or of few weights, is fp16 there; here the first is an error, the second like all."""
    (golden,) = entries("mixed_quantize")
    c, want = golden.config, golden.expected
    ours = {
        "tok_emb.weight": "tok_emb.weight",
        "blocks.0.attn.conv1d.weight": "blocks.0.attn.taps",
        "blocks.0.attn.z_proj.weight": "blocks.0.attn.z.weight",
        "blocks.0.attn.o_proj.weight": "blocks.0.attn.o.weight",
        "blocks.2.attn.proj.weight": "blocks.2.attn.o.weight",
        "blocks.2.mlp.fc.weight": "blocks.2.mlp.up.weight",
        "blocks.2.attn.k_sink": "blocks.2.attn.sink",
        "skip_weights": "skips.weights",
    }
    folder, V = write_shards(tmp_path / "data", *frequency_shards(c, c["shapes"]["tok_emb.weight"][0])), 1100
    cfg = Config(
        data_path=str(folder),
        vocab_size=V,
        mixers="G*2 A*9",
        attn_extras=("sink",),
        matrix_bits_overrides=("blocks.[2-9].attn.o.weight:7",),
        attn_clip_sigmas=c["matrix_clip_sigmas"],
        mlp_clip_sigmas=c["matrix_clip_sigmas"],
        embed_clip_sigmas=c["embed_clip_sigmas"],
        embed_quant="gptq_freqsplit",
        embed_topk=c["embed_topk"],
        embed_top_bits=c["embed_top_bits"],
        embed_tail_bits=c["embed_tail_bits"],
        embed_freq_tokens=c["freq_tokens"],
    )
    state, hessians = {}, {train_gpt.COUNTS: train_gpt.token_counts(cfg, rules.runtime())}
    for name, mine in ours.items():
        shape = tuple(c["shapes"][name])
        weight = rules.fill("hash", f"mq.w.{c['key']}.{name}", shape, 0.1)
        state[mine] = weight.bfloat16().float() if mine == "tok_emb.weight" else weight.float()
        if "q_sum" in want[name]:
            key = f"mq.{c['key']}.{name}"
            hessians[mine] = golden_hessian(key, 2 * shape[1], shape[1], c["rho"], []).float()
    stored = {tensor.name: tensor for tensor in train_gpt.quantize(cfg, rules.runtime(), state, hessians)}
    top = list(train_gpt.refined_plan(cfg, state, hessians)["tok_emb.weight"].frequent_rows)
    tail = torch.ones(V, dtype=torch.bool).index_fill_(0, torch.tensor(top), False)
    for name, mine in ours.items():
        value, parts = stored[mine].decode(), stored[mine].parts
        value = value.bfloat16() if mine == "tok_emb.weight" else value
        rules.assert_checks(value, want[name]["dequantised"], rel=1e-4)
        assert ("q" in parts) == ("q_sum" in want[name])
        if "q" in parts:
            q = parts["q"].int()
            assert q.flatten()[:16].tolist() == want[name]["q_first16"]
            assert (int(q.sum()), int(q.abs().sum())) == (want[name]["q_sum"], want[name]["q_abs_sum"])
            rules.assert_checks(parts["s"], want[name]["scale"], rel=1e-6)
    q = stored["tok_emb.weight"].parts["q"].int()
    split = [int(q[rows].abs().sum()) for rows in (top, tail)]
    assert split == [want["tok_emb.weight"][f"q_abs_sum_{part}_rows"] for part in ("top", "tail")]


# Evaluation and test-time training


@parametrize("plain_eval")
def test_plain_evaluation(golden: rules.Entry, exact_rope: None) -> None:
    c, want = golden.config, golden.expected
    count = c["targets_before_trim"] // c["seq_len"] * c["seq_len"]
    val, cfg = golden_stream(c, count), model_config(c, eval_seq_len=c["seq_len"], val_batch_tokens=3 * c["seq_len"])
    score = train_gpt.EVALS["plain"](cfg, rules.runtime(torch.float64), build(c), val)
    assert (score.tokens, score.bytes) == (want["targets"], want["bytes"])
    assert (score.val_loss, score.val_bpb) == pytest.approx((want["val_loss"], want["val_bpb"]), rel=1e-8)


WORDS = {  # TTT_TRAINABLE of the published selections
    "mlp": ("mlp",),
    "all": ("all",),
    "control": ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skips", "attn.sink"),
    "attn,skip": ("attn_scale", "attn.q", "attn.k.", "attn.v.", "attn.o", "attn.z", "attn.sink", "skips"),
}


@parametrize("ttt")
def test_chunk_sgd_follows_the_published_trajectory(
    golden: rules.Entry, exact_rope: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, want = golden.config, golden.expected
    val, size = golden_stream(c, c["targets"]), c["chunk_tokens"]
    cfg = model_config(
        c,
        eval="chunk_sgd",
        eval_seq_len=c["seq_len"],
        eval_stride=c["stride"],
        ttt_chunk_tokens=size,
        ttt_lr=c["lr"],
        ttt_momentum=c["momentum"],
        ttt_grad_clip=c["grad_clip"],
        ttt_epochs=c["epochs"],
        ttt_trainable=WORDS[c["trainable"]],
        gdn_ttt_lr_mult=c["gdn_lr_mult"],
        val_batch_tokens=5 * c["seq_len"],
        ttt_batch_seqs=c["batch_seqs"] if c["batch_seqs"] * c["seq_len"] < size else 0,
    )
    model, runtime, norms = build(c), rules.runtime(torch.float64), []
    learner, meter = (
        train_gpt.ChunkSgd(cfg, runtime, model, val),
        train_gpt.ByteMeter(val, runtime),
    )
    gradient = learner.sgd.gradient

    def note(*args: Any) -> torch.Tensor:
        norm = gradient(*args)
        norms.append(norm.item())
        return norm

    monkeypatch.setattr(learner.sgd, "gradient", note)
    sums, windows = [0.0], [0]
    for step in train_gpt.chunk_sgd_steps(cfg, runtime, val):
        before = meter.loss.item()
        train_gpt.score_first([step], learner, meter)
        sums[-1] += meter.loss.item() - before
        windows[-1] += len(np.unique(step.cells.rows)) if step.cells else 0
        if step.lesson:
            sums.append(0.0)
            windows.append(0)
    score = meter.close()
    assert windows == want["windows_per_chunk"] and score.bytes == want["scored_bytes"]
    assert sums == pytest.approx(want["scored_nll_sum_per_chunk"], rel=1e-7)
    assert (score.val_loss, score.val_bpb) == pytest.approx((want["val_loss"], want["val_bpb"]), rel=1e-7)
    assert norms == pytest.approx(want["steps"], rel=1e-7)
    rates = [group["lr"] for group in learner.sgd.optimiser.param_groups]
    assert rates == pytest.approx(want["learning_rate_per_trained_chunk"][-1], rel=1e-7, abs=1e-15)
    after, own = (published(c, m.state_dict()) for m in (learner.model, model))
    assert sum(not torch.equal(after[name], own[name]) for name in own) == want["changed"]
    for name, checks in want.get("after", {}).items():
        rules.assert_checks(after[name], checks, rel=1e-7)


# The record, and whole runs


RECORD_FOLDER = Path(__file__).resolve().parents[1] / "records" / "track_10min_16mb" / "2026-04-28_GDN_Hybrid_PR1895"


def test_the_record_has_the_published_parts() -> None:
    """35,896,408 parameters in groups of 1, 66 and 57 tensors, with the taps (in none there) 60; stored as there."""
    cfg = train_gpt.load_config({"PRESET": str(RECORD_FOLDER)})
    with torch.device("meta"):
        model = train_gpt.GPT(cfg)
    sizes: dict[str, list[int]] = {}
    for (_, lr, _), params in train_gpt.optimiser_groups(model).items():
        sizes.setdefault(lr, []).extend(p.numel() for p in params.values())
    assert sum(map(sum, sizes.values())) == 35_896_408
    assert {lr: len(n) for lr, n in sizes.items()} == {"tied_embed_lr": 1, "matrix_lr": 66, "scalar_lr": 57 + 3}
    assert sum(sizes["matrix_lr"]) == 31_666_176 and sum(sizes["scalar_lr"]) == 32_856 + 3 * 1024
    chosen = train_gpt.trainable(cfg, model)
    assert (len(chosen), sum(p.numel() for p in chosen.values())) == (33, 23_795_200)
    with torch.device("meta"):
        noisy = train_gpt.QuantNoise(cfg, model).params
    assert sorted(tuple(p.shape) for p in noisy) == [(256, 512)] * 8 + [(512, 512)] * 8
    stored = {name: train_gpt.quant_plan(cfg)[name] for name in model.state_dict()}
    whole = [p for name, p in model.named_parameters() if stored[name].scheme == "fp16"]
    levels = [p for name, p in model.named_parameters() if stored[name].scheme != "fp16"]
    assert sum(p.numel() for p in levels) == 35_848_192 and sum(len(p) for p in levels) == 53_184
    assert sum(p.numel() for p in whole) == 48_216
    assert [stored[f"blocks.{i}.attn.o.weight"].bits for i in range(11)] == [6, 6, *[7] * 8, 6]


HYBRID = {
    "MIXERS": "G A*3 G",
    "GDN_HEAD_DIM": 8,
    "ATTN_EXTRAS": "xsa,sink",
    "PARALLEL_LANES": 1,
    "LOADER": "shuffled",
    "MUON_COEFFICIENTS": "polar_express_safe",
    "QAT": "noise",
    "QAT_NOISE_START_FRAC": 0.5,
    "ROTATE": "hadamard_vo",
    "MATRIX_BITS_OVERRIDES": "blocks.[1-3].attn.o.weight:7",
    "EMBED_QUANT": "gptq_freqsplit",
    "EMBED_TOPK": 100,
    "EMBED_FREQ_TOKENS": 4000,
    "EVAL": "chunk_sgd",
    "EVAL_STRIDE": 16,
    "TTT_CHUNK_TOKENS": 192,
    "TTT_LR": 0.1,
    "TTT_EPOCHS": 1,
    "TTT_TRAINABLE": "mlp",
    "ITERATIONS": 4,
}


def test_two_processes_are_one_and_quantising_can_be_resumed(run_gpt: Callable, tmp_path: Path) -> None:
    results, counts = [], []
    for ranks, stages, more in (
        (1, "train,quantize,eval", {}),
        (1, "quantize,eval", {"EMBED_TOPK": 20}),
        (2, "train,quantize,eval", {}),
    ):
        done = run_gpt(ranks=ranks, STAGES=stages, **HYBRID | more)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((tmp_path / "run" / "result.json").read_text()))
        counts.append(torch.load(tmp_path / "run" / "hessians.pt", weights_only=True)[train_gpt.COUNTS])
    one, coarser, two = results
    assert all(torch.equal(c, counts[0]) for c in counts) and int(counts[0].sum()) == 4000
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-3) and one["legal"] and two["legal"]
    assert coarser["stages"]["quantized"] != one["stages"]["quantized"], "EMBED_TOPK may change after the training"
    blob = train_gpt.load_artifact(tmp_path / "run" / "model.bin")
    trained = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["model"]
    assert blob.keys() == trained.keys() and blob["blocks.0.attn.taps"].shape == trained["blocks.0.attn.taps"].shape
    v = "blocks.2.attn.v.weight"
    cfg = train_gpt.load_config({"PRESET": str(tmp_path / "run")})
    turned = train_gpt.rotate_values(cfg, rules.runtime(), trained, {})[0]
    assert (blob[v] - turned[v]).norm() < 0.2 * (blob[v] - trained[v]).norm(), "the artifact holds rotated values"


def test_without_counts_the_split_is_a_user_error() -> None:
    cfg = Config(embed_quant="gptq_freqsplit")
    with pytest.raises(UserError, match=r"gptq_freqsplit has no token counts; run STAGES=train"):
        train_gpt.quantize(cfg, rules.runtime(), {"tok_emb.weight": torch.ones(4, 4)}, {"tok_emb.weight": torch.eye(4)})
