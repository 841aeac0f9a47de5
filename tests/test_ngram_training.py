"""The n-gram stack's training and quantisation: warmdown in iterations, averages, QAT, clip search, LZMA presets."""

from __future__ import annotations

import copy
import dataclasses
import json
import lzma
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_rules as rules
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ngram_rules import build, published_name
from torch import Tensor, nn

import train_gpt
from train_gpt import Config

GOLDEN = json.loads((Path(__file__).resolve().parent / "golden" / "ngram_training.json").read_text(encoding="utf-8"))
SMALL = {
    "vocab_size": 97,
    "num_layers": 2,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_mult": 2.0,
    "rope_dims": 4,
    "num_loops": 0,
    "parallel_start_layer": 0,
    "embed_extras": ("bigram",),
    "bigram_vocab_size": 61,
    "bigram_dim": 12,
    "train_batch_tokens": 64,
    "batch_slices": 2,
    "train_seq_len": 32,
}


def golden(kind: str) -> list[rules.Entry]:
    return [rules.Entry(e["name"], e["config"], e["expected"]) for e in GOLDEN["entries"] if e["kind"] == kind]


def each(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("entry", golden(kind), ids=lambda e: e.name.partition("/")[2])


def full_rank(name: str, shape: tuple[int, ...], amp: float) -> Tensor:
    """Fill B of the golden numbers."""
    n = np.arange(1, math.prod(shape) + 1, dtype=np.float64)
    return torch.from_numpy(amp * np.sin(0.0137 * n * n + 0.0061803 * rules.name_number(name))).reshape(shape)


def approx(value: Any, rel: float = 1e-8, abs_: float = 1e-9) -> Any:
    return pytest.approx(value, rel=rel, abs=abs_)


# Schedules


@each("schedule")
def test_warmdown_in_iterations(entry: rules.Entry) -> None:
    config, expected = entry.config, entry.expected
    cfg = Config(warmdown_iters=config["warmdown_iters"], min_lr=0.0, iterations=config["iterations"])

    def multiplier(step: int, fraction: float) -> float:
        return train_gpt.lr_multiplier(fraction, train_gpt.warmdown_share(cfg, fraction, step), cfg.min_lr)

    if "step_ms" in config:
        budget = 1e3 * config["max_wallclock_seconds"]
        found = [multiplier(s, s * config["step_ms"] / budget) for s in range(expected["total_steps"] + 1)]
        assert {s: found[int(s)] for s in expected["lr_multiplier"]} == approx(expected["lr_multiplier"], 1e-8, 1e-9)
        late, taken = (
            [s for s, m in enumerate(found[:-1]) if train_gpt.STAGES[name](cfg, train_gpt.Progress(s, 0.0, m))]
            for name in ("ste", "swa")
        )
        assert late[0] == expected["late_qat_step"]
        counted = [taken[0] + 1, taken[-1] + 1, len(taken)]  # published: steps from 1, after the update
        assert counted == [expected[f"swa_{k}"] for k in ("first", "last", "count")]
    else:
        for step, value in expected["step_based"].items():
            assert multiplier(int(step), int(step) / config["iterations"]) == approx(value)
        for step, elapsed, value in expected["irregular"]:
            assert multiplier(step, elapsed / 600_000) == approx(value)
        for step, value in expected["muon_momentum"].items():
            assert train_gpt.muon_momentum(int(step), *config["muon_momentum"]) == approx(value)


def test_warmdown_frac_counts_without_iterations() -> None:
    assert train_gpt.warmdown_share(Config(warmdown_frac=0.4), 0.7, 30) == 0.4
    assert train_gpt.warmdown_share(Config(warmdown_iters=5), 0.0, 0) == 0.0
    assert train_gpt.lr_multiplier(0.0, 0.0, 0.1) == 1.0


# Optimisers


def by_published_name(model: nn.Module) -> dict[str, Tensor]:
    return {published_name(name): p for name, p in model.named_parameters()}


@each("muon")
def test_quintic_muon_in_float64(entry: rules.Entry) -> None:
    config = entry.config
    cfg = Config(muon_wd=config["weight_decay"], muon_row_normalize=False, muon_coefficients="quintic")
    shapes = {"c_q": (16, 16), "proj": (16, 16), "c_k": (8, 16), "c_v": (8, 16)}
    names = {f"blocks.{i}.attn.{n}.weight": s for i in range(2) for n, s in shapes.items()}
    names |= {f"blocks.{i}.mlp.fc.weight": (48, 16) for i in range(2)}
    names |= {f"blocks.{i}.mlp.proj.weight": (16, 48) for i in range(2)}
    weights = {n: nn.Parameter(rules.fill("sine", n, s, 0.05)) for n, s in names.items()}
    muon = train_gpt.Muon(weights.values(), cfg, rules.runtime(torch.float64))
    for step in range(3):
        before = {n: w.detach().clone() for n, w in weights.items()}
        for name, weight in weights.items():
            weight.grad = full_rank(f"{name}.grad{step}", weight.shape, 0.05)
        with torch.no_grad():
            muon.step(muon.reduce(), config["lr"], config["momentum_per_step"][step])
        for name, want in entry.expected[f"after_step_{step + 1}"].items():
            weight = weights[name].detach()
            update = weight - before[name] * (1 - config["lr"] * config["weight_decay"])
            assert weight.norm().item() == approx(want["param_l2"], 1e-7)
            if step == 2:  # the row stored with every step is that of the last
                assert weight[0, :3].tolist() == approx(want["param_row0_first3"], 1e-7)
            assert update.norm().item() == approx(want["update_l2"], 1e-7)


@each("newton_schulz")
def test_quintic_orthogonalisation(entry: rules.Entry) -> None:
    x = full_rank("ns_test.weight", (6, 10), 1.0)[None]
    if entry.name.endswith("stack"):
        x = torch.cat([x, 2 * full_rank("ns_test2.weight", (6, 10), 1.0)[None]])
    found, expected = train_gpt.orthogonalize(x, "quintic", 5), entry.expected
    assert found.flatten()[:10].tolist() == approx(expected["flat_first10"])
    assert found.norm().item() == approx(expected["l2"])
    values = torch.linalg.svdvals(found).flatten().tolist()
    assert values == approx(np.ravel(expected["singular_values"]).tolist())


@each("train")
def test_three_whole_steps(entry: rules.Entry) -> None:
    """With the published bugs around the trigram, which here are the test's: it is in no optimiser, its gradients add
    up, and count in the clip norm."""
    config, expected = entry.config, entry.expected
    model = build(config | {"overrides": {}})
    cfg = dataclasses.replace(
        Config(),
        tied_embed_lr=config["lrs"]["tok"],
        matrix_lr=config["lrs"]["mat"],
        scalar_lr=config["lrs"]["sca"],
        muon_wd=0.04,
        embed_wd=0.04,
        adam_wd=0.04,
        muon_coefficients="quintic",
        muon_row_normalize=False,
        grad_clip_norm=0.0,
        muon_momentum=0.99,
        ema_decay=0.997,
    )
    trigram = [p for name, p in model.named_parameters() if "trigram" in name]
    for p in trigram:
        p.requires_grad_(False)
    optimisers = train_gpt.Optimisers(cfg, model, rules.runtime(torch.float64))
    ema = train_gpt.Ema(cfg, list(model.parameters()))
    for p in trigram:
        p.requires_grad_(True)
    rows, length = config["batch"], config["seq_len"]
    size = rows * length + 1
    stream = torch.from_numpy(rules.tokens(config["vocab_size"], 3 * size, []))
    for step, want in enumerate(expected["steps"]):
        part = stream[step * size : (step + 1) * size]
        loss = model(part[:-1].view(rows, length), part[1:].view(rows, length))
        loss.backward()
        assert loss.item() == approx(want["loss"], 1e-7)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"])
        assert norm.item() == approx(want["total_grad_norm_before_clip"], 1e-7)
        optimisers.step(1.0, step)
        ema.update()
    parameters = by_published_name(model)
    averaged = dict(zip(parameters, ema.shadow, strict=True))
    del parameters["blocks.0.attn.vr_lambda"]  # it mixes nothing and has no gradient; here it decays all the same
    scales = {f"ve_layer_scales.{i}": x for i, x in enumerate(parameters.pop("ve_layer_scales"))}
    for name, value in (parameters | scales).items():
        assert value.detach().norm().item() == approx(expected["param_l2"][name], 1e-7), name
    for name in parameters:
        assert averaged[name].norm().item() == approx(expected["ema_l2"][name], 1e-7), name


# Averages


def iterates() -> list[Tensor]:
    return [rules.fill("sine", f"ema_test.weight.step{k}", (4, 6), 0.05 * k) for k in range(1, 6)]


@each("ema")
def test_ema_is_the_published_one(entry: rules.Entry) -> None:
    weight = rules.fill("sine", "ema_test.weight", (4, 6), 0.05)
    ema = train_gpt.Ema(Config(ema_decay=entry.config["decay"]), [weight])
    norms = []
    for value in iterates():
        weight.copy_(value)
        ema.update()
        norms.append(ema.shadow[0].norm().item())
    expected = entry.expected["float64"]
    assert norms == approx(expected["l2_after_each_step"])
    assert ema.shadow[0][0].tolist() == approx(expected["row0"])


@each("swa")
def test_swa_is_the_mean_of_its_snapshots(entry: rules.Entry) -> None:
    weight = torch.zeros(4, 6, dtype=torch.float64)
    swa_cfg = Config(average=("swa",), swa_every=2)
    swa = train_gpt.Swa(swa_cfg, [weight])
    assert swa.shadow[0] is weight, "nothing collected: the weights themselves"
    for value in iterates():
        weight.copy_(value)
        swa.update()
        weight.fill_(1e6)  # between two snapshots
    due = [(2, 0.1), (1, 0.1), (3, 0.2)]  # every second step, and not before the LR has fallen
    found = [train_gpt.STAGES["swa"](swa_cfg, train_gpt.Progress(step - 1, 0.5, m)) for step, m in due]
    assert found == [True, False, False]
    expected = entry.expected
    assert swa.count == expected["swa_count"]
    assert swa.shadow[0][0].tolist() == approx(expected["swa_mean_if_it_were_applied_row0"])
    assert 5 * swa.shadow[0].norm().item() == approx(expected["swa_sum_l2"])


def test_swa_of_ema_averages_the_averages() -> None:
    cfg = Config(average=("swa", "ema"), ema_decay=0.5, swa_every=1)
    weight = torch.zeros(1)
    chain = train_gpt.averages_of(cfg, [weight])
    assert list(chain) == ["ema", "swa"]
    ema, swa = chain.values()
    seen = []
    for step in range(1, 4):
        weight.fill_(float(step))
        for average in (ema, swa):
            average.update()
        seen.append(ema.shadow[0].item())
    assert swa.shadow[0].item() == pytest.approx(sum(seen) / 3)
    assert train_gpt.averages_of(Config(average=()), [weight]) == {}


# Quantisation-aware training


@each("qat")
def test_fake_quantisation_is_the_published_one(entry: rules.Entry) -> None:
    weight = full_rank("qat.weight", (5, 12), {"late_qat/on_floor": 0.05, "late_qat/above_floor": 2.5}[entry.name])
    weight = weight.float()
    rule = train_gpt.QuantRule("gptq_lite", 6, 0.0)
    scale = train_gpt.SCHEMES["gptq_lite"].qat_scale(weight, rule, Config(clip_floor=1.0))
    fake, expected = train_gpt.fake_quantize(weight, scale, 6), entry.expected
    assert scale.tolist() == approx(expected["row_scales"], 1e-6)
    assert (fake / scale[:, None]).round().sum(dim=1).tolist() == expected["row_int_sums"]
    assert fake[0].tolist() == approx(expected["fake_row0"], 1e-6)
    assert (fake - weight).double().square().mean().item() == approx(expected["mse"], 1e-5)


def trainer(**knobs: Any) -> train_gpt.Trainer:
    cfg = Config(**SMALL | knobs)
    runtime = rules.runtime(torch.float32, compile=cfg.compile == "on")
    return train_gpt.Trainer(cfg, runtime, train_gpt.GPT(cfg).init_weights(3), None)


def one_batch() -> list[train_gpt.Batch]:
    ids = torch.from_numpy(rules.tokens(97, 65, []))
    return [train_gpt.Batch(ids[:-1].view(2, 32), ids[1:].view(2, 32), None)]


@pytest.mark.parametrize("compile_", ["off", "on"])
def test_ste_sees_the_grid_and_its_gradient_goes_straight_through(compile_: str) -> None:
    """Also after the graph was compiled without it: what the published program missed."""
    at = trainer(qat="ste", matrix_quant="gptq_lite", embed_bits=8, compile=compile_)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in at.model.parameters():  # zeros of the initial values have nothing to round
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    before = {name: p.clone() for name, p in at.model.state_dict().items()}
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
    batch = one_batch()[0]
    loss = rounded(batch.ids, batch.targets, rounded.plan(32, torch.device("cpu"), None, 32, rows=2))
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
    parts = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
    assert rounded_names(at) == {f"blocks.{i}.{part}.weight" for i in range(2) for part in parts}
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
    many = torch.stack([at.qat.values(step)[1] - at.qat.params[1].detach() for step in range(400)])
    wanted = 0.05 * 13.0 * at.qat.params[1].detach().std(dim=1) / 31 / math.sqrt(12)
    torch.testing.assert_close(many.std(dim=(0, 2)), wanted, rtol=0.05, atol=0.0)
    before = [p.detach().clone() for p in at.model.parameters()]
    at.optimisers.step = lambda multiplier, step: None
    rounded = []
    monkeypatch.setattr(at.qat, "values", lambda step: rounded.append(step) or values)
    at.advance(one_batch(), 0.96, 100)
    at.advance(one_batch(), 0.94, 101)
    assert rounded == [100] and all(map(torch.equal, before, at.model.parameters()))
    for every, wanted in ((1, [True] * 4), (3, [True, False, False, True])):
        cfg = Config(qat_noise_every=every)
        assert [train_gpt.STAGES["noise"](cfg, train_gpt.Progress(s, 0.96, 1.0)) for s in range(4)] == wanted
    with pytest.raises(train_gpt.UserError, match="QAT_NOISE_PATTERNS=nothing is in no name"):
        trainer(qat="noise", qat_noise_patterns=("nothing",))


def test_weights_come_back_when_a_step_fails() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(KeyboardInterrupt), train_gpt.temporarily_set([p], [torch.zeros(3)]):
        assert not p.any()
        raise KeyboardInterrupt
    assert p.all()


# Quantisation


def cubed(entry: rules.Entry) -> Tensor:
    """The float32 weights of an int6 or int8 entry."""
    config, case = entry.config, entry.name.partition("/")[2]
    shape = config["rows"], config["cols"]
    if "outlier" in case:
        weight = full_rank("quant.outlier2" if case == "two_outliers" else "quant.outlier", shape, 1.2)
        for i in range(shape[0]):
            if case == "two_outliers":
                weight[i, 7 * i + 3], weight[i, 11 * i + 5] = 2.2, -(1.8 + 0.01 * i)
            else:
                weight[i, 7 * i + 3] = 6.0 + i
        return weight.float()
    if case == "tie_first_wins":
        return rules.fill("sine", "blocks.0.attn.c_q.weight", shape, 0.05).float()
    kind = "quant8" if entry.name.startswith("int8") else "quant"
    amps = config["row_amps_cycled"]
    rows = torch.tensor([amps[i % len(amps)] for i in range(shape[0])], dtype=torch.float64)
    return (full_rank(f"{kind}.{case}", shape, 1.0) ** 3 * rows[:, None]).float()


@each("int6")
def test_clip_search_gives_the_published_integers(entry: rules.Entry) -> None:
    weight, expected = cubed(entry), entry.expected
    rule = train_gpt.QuantRule("gptq_lite", 6, 0.0)
    cfg = Config(clip_floor=1.0, clip_search_rows=False)
    parts = train_gpt.SCHEMES["gptq_lite"].encode(weight, None, rule, cfg)
    assert parts["s"].tolist() == approx(expected["scales_fp16"])
    assert parts["q"].int().sum(dim=1).tolist() == expected["row_int_sums"]
    assert parts["q"].int().abs().sum(dim=1).tolist() == expected["row_int_abs_sums"]
    assert parts["q"][0, :12].tolist() == expected["row0_ints_first12"]
    error = (weight.double() - train_gpt.decode_rows(parts).double()).square().mean().item()
    assert error == approx(expected["mse_fp64_chosen"], 1e-5)


@each("int8")
def test_row_quantile_gives_the_published_integers(entry: rules.Entry) -> None:
    weight, expected = cubed(entry), entry.expected
    steps = train_gpt.quantile_scale(weight, 8, entry.config["clip_quantile"], 1.0)
    assert steps.tolist() == approx(expected["scales_fp32"], 1e-6)
    assert train_gpt.storable(steps).tolist() == approx(expected["scales_fp16_stored"])
    q = train_gpt.round_to_grid(weight, steps[:, None], 8)  # published: rounded with a step that is not the stored one
    assert (
        q.sum(dim=1).tolist() == expected["row_int_sums"]
        and q.abs().sum(dim=1).tolist() == expected["row_int_abs_sums"]
    )
    rule = train_gpt.QuantRule("row_quantile", 8, 0.0)
    parts = train_gpt.SCHEMES["row_quantile"].encode(weight, None, rule, Config(clip_floor=1.0))
    assert (parts["q"].float() - q).abs().max() <= 1
    ours = (weight.double() - train_gpt.decode_rows(parts).double()).square().mean().item()
    assert ours <= expected["mse_fp64_with_stored_scale"] * (1 + 1e-9), "rounding with the stored step is no worse"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from((4, 6, 8)), st.sampled_from((0.0, 0.3)), st.sampled_from((0.01, 1.0, 40.0))
)
def test_clip_search_by_row_is_never_worse_than_one_for_all(seed: int, bits: int, floor: float, size: float) -> None:
    weight = size * torch.randn(6, 200, generator=torch.Generator().manual_seed(seed)) ** 3
    errors = []
    for by_row in (True, False):
        scale = train_gpt.searched_scales(weight, bits, floor, by_row)
        assert (scale.float() * (2 ** (bits - 1) - 1) >= floor * 0.999).all()
        errors.append((weight - train_gpt.fake_quantize(weight, scale.float(), bits)).square().sum(dim=1))
    assert (errors[0] <= errors[1]).all()
    loosest = train_gpt.storable(train_gpt.quantile_scale(weight, bits, 1.0, floor)).float()
    assert (errors[0] <= (weight - train_gpt.fake_quantize(weight, loosest, bits)).square().sum(dim=1)).all()


@each("quant_assignment")
def test_every_tensor_is_stored_as_published(entry: rules.Entry) -> None:
    same = (
        "mlp_mult bigram_dim bigram_vocab_size trigram_vocab_size trigram_dim xsa_last_n vocab_size num_layers".split()
    )
    cfg = Config(
        **{k: entry.config[k] for k in same},
        embed_extras=("bigram", "trigram", "smear_channel"),
        num_loops=0,
        attn_extras=("xsa", "value_residual", "value_embed"),
        ve_layers=(5, 9, 10),
        parallel_start_layer=0,
        skip_gates_enabled=False,
        matrix_quant="gptq_lite",
        embed_quant="row_quantile",
        embed_bits=8,
    )
    plan = train_gpt.quant_plan(cfg)
    with torch.device("meta"):
        model = train_gpt.GPT(cfg)
    kinds = {"gptq_lite": "int6", "row_quantile": "int8", "fp16": "fp16"}
    lists: dict[str, list[str]] = {"int6": [], "int8": [], "fp16": []}
    weights = dict.fromkeys(lists, 0)
    for name, tensor in model.state_dict().items():
        kind = kinds[plan[name].scheme]
        published = published_name(name)
        weights[kind] += tensor.numel()
        split = [f"{published}.{i}" for i in range(3)] if published == "ve_layer_scales" else [published]
        lists[kind] += split
    assert {k: sorted(v) for k, v in lists.items()} == {k: sorted(v) for k, v in entry.expected["lists"].items()}
    assert weights == entry.expected["numel"]


@each("quant_roundtrip")
def test_the_loss_after_quantisation_is_the_published_one(entry: rules.Entry) -> None:
    config, expected = entry.config | {"overrides": {}}, entry.expected
    model = build(config)
    plan = train_gpt.quant_plan(
        dataclasses.replace(model.cfg, matrix_quant="gptq_lite", embed_quant="row_quantile", embed_bits=8)
    )
    cfg = Config(clip_floor=1.0, clip_search_rows=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            matrix = name.startswith("blocks.") and name.endswith("weight")
            p.copy_(p.float().double() * (config["bank_multiplier"] if matrix else 1.0))
    stream = torch.from_numpy(rules.tokens(config["vocab_size"], 65, []))
    ids, targets = stream[:-1].view(2, 32), stream[1:].view(2, 32)
    assert model(ids, targets, reduction="none").sum().item() == approx(expected["nll_sum_before"], 1e-6)
    errors = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            rule, weight = plan[name], p.float()
            small = p.numel() <= 65_536  # at this size that cuts through the classes
            scheme = train_gpt.SCHEMES["fp16" if small else rule.scheme]
            p.copy_(scheme.decode(scheme.encode(weight, None, rule, cfg)))
            if rule.scheme == "row_quantile" and not small:  # published: rounded with a step that is not the stored one
                step = train_gpt.quantile_scale(weight, 8, cfg.clip_quantile, cfg.clip_floor)
                q = train_gpt.round_to_grid(weight, step[:, None], 8)
                assert (p - q * train_gpt.storable(step).float()[:, None]).abs().max() < 1.01 * step.max()
                p.copy_(q * train_gpt.storable(step).float()[:, None])
            if not small:
                errors[published_name(name)] = ((p.float() - weight).norm() / weight.norm()).item()
    assert errors == pytest.approx(expected["rel_err_l2"], rel=1e-5)
    assert model(ids, targets, reduction="none").sum().item() == approx(expected["nll_sum_after"], 1e-6)


def test_lzma_presets_differ() -> None:
    for name, options in {"lzma6": {"preset": 6}, "lzma": {"preset": 9 | lzma.PRESET_EXTREME}}.items():
        assert train_gpt.CODERS[name].encode(b"xy" * 100) == lzma.compress(b"xy" * 100, **options), name


# Whole runs


RUN = {
    "AVERAGE": "ema,swa",
    "SWA_EVERY": "2",
    "SWA_START_SCALE": "0.9",
    "QAT": "ste",
    "LATE_QAT_THRESHOLD": "0.6",
    "WARMDOWN_ITERS": "8",
    "MIN_LR": "0",
    "MATRIX_QUANT": "gptq_lite",
    "EMBED_QUANT": "row_quantile",
    "EMBED_BITS": "8",
    "COMPRESSOR": "lzma6",
    "CLIP_FLOOR": "1",
    "EMBED_EXTRAS": "bigram",
    "BIGRAM_VOCAB_SIZE": "64",
    "BIGRAM_DIM": "8",
    "ITERATIONS": "10",
    "EVAL": "plain",
}


def test_two_processes_round_and_average_as_one(
    run_gpt: Callable[..., subprocess.CompletedProcess], tmp_path: Path
) -> None:
    states = []
    for ranks in (1, 2):
        folder = tmp_path / f"ranks{ranks}"
        done = run_gpt(ranks=ranks, **RUN, ARTIFACT_DIR=folder)
        assert done.returncode == 0, done.stderr
        assert "ste on from step" in done.stdout and "weights: ema+swa" in done.stdout
        assert "SWA: 4 snapshots" in done.stdout
        plan = done.stdout.rpartition("quantisation plan:\n")[2]
        assert re.search(r"^  gptq_lite .*\bq\b", plan, re.MULTILINE), plan
        assert re.search(r"^  row_quantile .*\bhash_table\b", plan, re.MULTILINE), plan
        states.append(torch.load(folder / "model.pt", weights_only=True)["model"])
    for name, one in states[0].items():
        torch.testing.assert_close(states[1][name], one, rtol=1e-4, atol=1e-5)


def test_swa_that_collected_nothing_says_so(run_gpt: Callable[..., subprocess.CompletedProcess]) -> None:
    done = run_gpt(AVERAGE="swa", SWA_EVERY="10000", EVAL="plain", ITERATIONS="2")
    assert done.returncode == 0 and "WARNING: no step was a multiple of SWA_EVERY" in done.stdout
