"""What refines quantisation: LQER factors, AWQ-lite columns, int8 gates, sorted hidden units, the reports on it all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import golden_rules as rules
import numpy as np
import pytest
import torch
from conftest import listener
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantisation import OURS, is_matrix, small_state, weighted_error
from torch import Tensor

import train_gpt
from train_gpt import Config, Grid, Parts

GOLDEN = json.loads((Path(__file__).parent / "golden" / "quant.json").read_text(encoding="utf-8"))["entries"]
KNOBS = {field.name for field in train_gpt.dataclasses.fields(Config)}
SYMMETRIC = {"lqer_asym_enabled": False}
FP16_ULP = 2.0**-10


def golden_of(kind: str) -> list[Any]:
    return [pytest.param(e["config"], e["expected"], id=e["name"]) for e in GOLDEN if e["kind"] == kind]


def integers(parts: Parts, factor: str) -> Tensor:
    """The signed integers of one LQER factor, flat."""
    rank, *head = parts["lqm"].tolist()
    count, bits = {"a": (parts["q"].size(0), head[0]), "b": (parts["q"].size(1), head[2])}[factor]
    return train_gpt.unpack_bits(parts[f"lq{factor}"], bits, rank * count).int() - 2 ** (bits - 1)


def blank(rows: int, cols: int) -> Parts:
    """Parts of a weight of zeros, for a correction to be added to."""
    return {"q": torch.zeros(rows, cols, dtype=torch.int8), "s": torch.ones(rows).half()}


# The published numbers


@pytest.mark.parametrize(("config", "want"), golden_of("lqer"))
def test_lqer_factors(config: dict[str, Any], want: dict[str, Any]) -> None:
    rows, cols, key = config["rows"], config["cols"], config["key"]
    noise = rules.fill("hash", f"lqer.E.{key}", (rows, cols), 0.01)
    u, v = rules.fill("hash", f"lqer.u.{key}", (rows, 3), 0.05), rules.fill("hash", f"lqer.v.{key}", (3, cols), 0.2)
    E = (noise + u @ v).float()
    assert E.norm().item() == pytest.approx(want["E_frobenius"], rel=1e-6)
    assert torch.linalg.svdvals(E)[:6].tolist() == pytest.approx(want["singular_values_first6"], rel=1e-4)
    cfg = Config(lqer_rank=config["rank"], lqer_asym_group=config["group"])
    parts = blank(rows, cols) | train_gpt.encode_lqer(E, cfg)
    canonical = want["canonical_largest_abs_of_each_Vh_row_positive"]
    q = {factor: integers(parts, factor) for factor in "ab"}
    assert parts["lqas"].item() == pytest.approx(canonical["sA_fp16"], rel=FP16_ULP)
    assert parts["lqbs"].tolist() == pytest.approx(canonical["sB_fp16"], rel=FP16_ULP)
    for factor in "ab":
        assert abs(int(q[factor].sum()) - canonical[f"q{factor.upper()}_sum"]) <= 2
        assert abs(int(q[factor].abs().sum()) - canonical[f"q{factor.upper()}_abs_sum"]) <= 2
    counts = [int((q["a"] == level).sum()) for level in (-2, -1, 0, 1)]
    assert np.abs(np.subtract(counts, canonical["qA_counts_m2_m1_0_1"])).max() <= 2
    correction = train_gpt.decode_lqer(parts)
    rules.assert_checks(correction, canonical["correction"], rel=1e-3)
    left = (E - correction).norm().item()
    assert left == pytest.approx(canonical["E_minus_correction_frobenius"], rel=1e-3)


@pytest.mark.parametrize(("config", "want"), golden_of("gate_int8"))
def test_int8_gate(config: dict[str, Any], want: dict[str, Any]) -> None:
    gate = rules.fill(config["fill"], config["tensor_name"], tuple(config["shape"]), 0.3).float()
    cfg = Config(gated_attn_quant_gate=True, attn_gate="dense")
    parts = train_gpt.quantize(cfg, rules.runtime(), {"blocks.3.attn.gate.weight": gate}, {})
    (stored,) = parts.values()
    assert list(parts) == ["blocks.3.attn.gate.weight:int8_row"]
    assert stored["q"].tolist() == want["q"] and stored["q"].dtype == torch.int8
    assert stored["s"].double().tolist() == pytest.approx(want["scales_fp16"], rel=1e-9)
    (decoded,) = train_gpt.dequantize(parts).values()
    rules.assert_checks(decoded, want["dequant"], rel=1e-6)


@pytest.mark.parametrize(("config", "want"), golden_of("mixed_quantize"))
def test_quantise_and_repair_of_a_dictionary(config: dict[str, Any], want: dict[str, Any]) -> None:
    state, hessians = {}, {}
    for name in (n for n, published in want.items() if published["meta"].startswith("gptq")):
        shape, ours = tuple(config["shapes"][name]), OURS[name]
        state[ours] = rules.fill("hash", name, shape, config["amps"][name]).float()
        key = config["hessian_key_prefix"] + name
        hessians[ours] = rules.hessian(key, config["hessian_samples"], shape[1], config["rho"]).float()
    cfg = Config(repair="lqer", **{knob: value for knob, value in config.items() if knob in KNOBS})
    parts = train_gpt.quantize(cfg, rules.runtime(), state, hessians)
    restored = train_gpt.dequantize(parts)
    for name, published in want.items():
        if OURS.get(name) not in state:
            continue
        ours, corrected = OURS[name], "lqer" in published["meta"]
        assert f"{ours}:gptq{'+lqer' * corrected}" in parts
        error = state[ours] - restored[ours]
        # the published signs are the library's; the canonical ones round the factors otherwise
        near = 5e-3 if corrected else 1e-3
        assert error.norm().item() == pytest.approx(published["error_frobenius_after"], rel=near)
        weighted = weighted_error(error, hessians[ours])
        assert weighted == pytest.approx(published["hessian_weighted_error_after"], rel=5 * near)
        if corrected:
            stored = parts[f"{ours}:gptq+lqer"]
            before = (state[ours] - train_gpt.decode_rows(stored)).norm().item()
            assert before == pytest.approx(published["error_frobenius_before_lqer"], rel=1e-3)
            assert stored["lqas"].item() == pytest.approx(published["lqer"]["sA_fp16"], rel=2 * FP16_ULP)
            assert stored["lqbs"].tolist() == pytest.approx(published["lqer"]["sB_fp16"], rel=4 * FP16_ULP)
            levels = [int(integers(stored, factor).abs().sum()) for factor in "ab"]
            assert levels == pytest.approx([published["lqer"][f"q{factor}_abs_sum"] for factor in "AB"], abs=8)


# Packing


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), bits=st.integers(1, 8), count=st.integers(0, 70))
def test_bits_pack_and_unpack(data: st.DataObject, bits: int, count: int) -> None:
    values = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)))
    packed = train_gpt.pack_bits(values, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == math.ceil(bits * count / 8)
    assert train_gpt.unpack_bits(packed, bits, count).tolist() == values.tolist()


def test_two_bits_go_four_and_four_bits_go_two_to_a_byte() -> None:
    assert train_gpt.pack_bits(torch.tensor([1, 2, 3, 0, 2]), 2).tolist() == [0b00111001, 2]
    assert train_gpt.pack_bits(torch.tensor([5, 10, 15]), 4).tolist() == [0xA5, 0x0F]


@pytest.mark.parametrize(
    ("bits", "asymmetric", "levels"), [(2, True, (-2, 1)), (4, True, (-8, 7)), (4, False, (-7, 7)), (2, False, (-1, 1))]
)
@pytest.mark.parametrize("group", [5, 16, 1000])
def test_a_grid_reaches_its_levels_and_stays_within_a_step(
    bits: int, asymmetric: bool, levels: tuple[int, int], group: int
) -> None:
    x = torch.randn(9, 13, generator=torch.Generator().manual_seed(bits))
    packed, scale = Grid(bits, group).encode(x, asymmetric)
    assert scale.numel() == math.ceil(x.numel() / group)
    q = train_gpt.unpack_bits(packed, bits, x.numel()).int() - 2 ** (bits - 1)
    assert levels[0] <= q.min() and q.max() <= levels[1]
    step = scale.float().repeat_interleave(group)[: x.numel()].view_as(x)
    decoded = Grid(bits, group).decode(packed, scale, (9, 13))
    assert ((decoded - x).abs() <= 0.502 * step).all(), "every grid reaches half a level over its top"


# LQER


@pytest.mark.parametrize("knobs", [{}, SYMMETRIC, SYMMETRIC | {"lqer_factor_bits": 8}, {"lqer_asym_group": 50}])
def test_a_low_rank_error_is_found_again(knobs: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    E = torch.randn(60, 4, generator=generator) @ torch.randn(4, 72, generator=generator)
    parts = blank(60, 72) | train_gpt.encode_lqer(E, Config(**knobs))
    left = ((E - train_gpt.decode("w:rowwise+lqer", parts)).norm() / E.norm()).item()
    assert left < (0.02 if knobs.get("lqer_factor_bits") == 8 else 0.2 if "lqer_asym_enabled" in knobs else 0.7)


def test_symmetric_factors_have_a_scale_per_row() -> None:
    E = torch.randn(40, 72, generator=torch.Generator().manual_seed(1))
    parts = train_gpt.encode_lqer(E, Config(lqer_rank=3, lqer_factor_bits=5, lqer_asym_enabled=False))
    assert (parts["lqas"].numel(), parts["lqbs"].numel()) == (40, 3)
    assert parts["lqa"].numel() == math.ceil(40 * 3 * 5 / 8) and parts["lqb"].numel() == math.ceil(72 * 3 * 5 / 8)


@pytest.mark.parametrize("E", [torch.zeros(8, 12), torch.eye(3, 12), torch.full((8, 1), 1e-12)])
def test_degenerate_errors_stay_finite(E: Tensor) -> None:
    for knobs in ({}, SYMMETRIC):
        parts = blank(*E.shape) | train_gpt.encode_lqer(E, Config(**knobs))
        assert torch.isfinite(train_gpt.decode_lqer(parts)).all() and parts["lqm"][0] == min(4, *E.shape)


def test_signs_do_not_come_from_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    E = torch.randn(20, 24, generator=torch.Generator().manual_seed(2))
    first, svd = train_gpt.encode_lqer(E, Config()), torch.linalg.svd

    def flipped(x: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = svd(x, full_matrices=full_matrices)
        sign = torch.tensor([-1.0, 1.0] * 10)
        return U * sign, S, Vh * sign[:, None]

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    again = train_gpt.encode_lqer(E, Config())
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("knobs", [{}, SYMMETRIC, {"matrix_quant": "rowwise"}, {"awq_lite_enabled": True}])
def test_the_worst_tensors_are_repaired_and_the_others_kept(knobs: dict[str, Any]) -> None:
    cfg, state, hessians = small_state(repair="none", **knobs)
    before = train_gpt.quantize(cfg, rules.runtime(), state, hessians)
    parts = train_gpt.quantize(small_state(repair="lqer", **knobs)[0], rules.runtime(), state, hessians)
    plain = train_gpt.dequantize(before)
    norms = {n: (state[n] - plain[n]).double().norm().item() for n in state if is_matrix(n)}
    worst = sorted(norms, key=lambda n: -norms[n])[:3]
    assert sorted(key.split(":")[0] for key in parts if key.endswith("+lqer")) == sorted(worst)
    assert list(parts) == sorted(parts)
    restored = train_gpt.dequantize(parts)
    for name in state:
        if name in worst:
            assert (state[name] - restored[name]).norm() < (state[name] - plain[name]).norm()
        else:
            assert torch.equal(restored[name], plain[name])


# AWQ-lite


def spiky(seed: int, columns: slice, factor: float = 6.0) -> tuple[Tensor, Tensor]:
    """Weight and Hessian of a layer some of whose inputs are loud."""
    generator = torch.Generator().manual_seed(seed)
    W, X = torch.randn(24, 64, generator=generator), torch.randn(300, 64, generator=generator)
    X[:, columns] *= factor
    return W, X.T @ X


def awq_case(**knobs: Any) -> tuple[Config, dict[str, Tensor], dict[str, Tensor]]:
    """Two layers; the loudest group of 16 columns is 16..31 of the first."""
    cfg = Config(awq_lite_enabled=True, awq_lite_group_size=16, num_layers=6, loop_start=2, loop_end=3, **knobs)
    names = "blocks.0.mlp.up.weight", "blocks.1.attn.q.weight"
    pairs = spiky(0, slice(16, 32), 9.0), spiky(1, slice(48, 64))
    return cfg, *({name: pair[i] for name, pair in zip(names, pairs, strict=True)} for i in (0, 1))


@pytest.mark.parametrize(("top_k", "fine"), [(1, [(16,)]), (2, [(16,), (48,)])])
def test_the_loudest_groups_are_chosen(top_k: int, fine: list[tuple[int, ...]]) -> None:
    cfg, state, hessians = awq_case(awq_lite_group_top_k=top_k)
    plan = train_gpt.refined_plan(cfg, state, hessians)
    own = {name: rule for name, rule in plan.items() if rule.fine}
    assert [rule.fine for rule in own.values()] == fine and {rule.scheme for rule in own.values()} == {"awq_lite"}
    assert [rule.clip for rule in own.values()] == [cfg.mlp_clip_sigmas, cfg.attn_clip_sigmas][:top_k]
    assert {n: r for n, r in plan.items() if n not in own}.items() <= train_gpt.quant_plan(cfg).items()


def test_chosen_columns_get_their_bits_and_the_error_falls() -> None:
    cfg, state, hessians = awq_case()
    parts = train_gpt.quantize(cfg, rules.runtime(), state, hessians)
    name = "blocks.0.mlp.up.weight"
    stored = parts[f"{name}:awq_lite"]
    plain = train_gpt.quantize(Config(), rules.runtime(), state, hessians)[f"{name}:gptq"]
    fine = stored["hs"].float() * 127 / (stored["s"].float() * 31)
    assert fine.numpy() == pytest.approx(np.ones(24), rel=2e-3), "the clip is the same, in more levels"
    W, H = state[name], hessians[name]
    weights = [train_gpt.decode_awq(stored), train_gpt.decode_rows(plain)]
    errors = [weighted_error(W - w, H) for w in weights]
    assert errors[0] < 0.5 * errors[1]
    assert ((W - weights[0])[:, 16:32].abs() <= 0.6 * stored["hs"].float()[:, None]).float().mean() > 0.9
    assert torch.equal(train_gpt.dequantize(parts)[name], weights[0])


def test_fine_columns_with_the_coarse_grid_change_nothing() -> None:
    W, H = spiky(3, slice(0, 8))
    scale = train_gpt.row_scales(W, 6, 12.0)
    same = train_gpt.HighBitColumns(torch.arange(5, 30), 6, scale)
    coarse, fine = (train_gpt.gptq(W, H, scale, 6, 0.01, 16, f) for f in (None, same))
    assert torch.equal(coarse, fine)


def test_looped_layers_count_their_passes_once() -> None:
    model, tap = rules.build(rules.entry("forward/hash_bosmask").config, torch.float32), train_gpt.HessianTap()
    cfg, state, _ = small_state()
    seen: dict[int, int] = {}

    def count(site: train_gpt.Site, x: Tensor, y: Tensor) -> Tensor:
        if site.name == "up":
            seen[site.layer] = seen.get(site.layer, 0) + 1
        return tap(site, x, y)

    model(torch.arange(12)[None] + 8, None, None, listener(count, " ".join(tap.sites)))
    assert {layer: train_gpt.passes(cfg, layer) for layer in seen} == seen
    assert max(seen.values()) == 3 and train_gpt.passes(cfg, -1) == 1
    W, H = spiky(4, slice(0, 8))
    assert train_gpt.column_salience(W, 3 * H, 3).numpy() == pytest.approx(train_gpt.column_salience(W, H, 1).numpy())


def test_groups_at_the_edge_are_cut_off() -> None:
    assert train_gpt.fine_columns(torch.tensor([8, 16, 0]), 20).tolist() == [*range(16, 20), *range(8)]


# Sorted hidden units


def settled_mlp(matrix: str = "gptq") -> tuple[Config, dict[str, Tensor], dict[str, Tensor]]:
    return small_state(matrix_quant=matrix, matrix_bits=4, mlp_clip_sigmas=4.0, compressor="pergroup")


def permutations(state: dict[str, Tensor], arranged: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer's up name -> the order that takes its rows to where they are now."""
    found = {}
    for name in (n for n in state if n.endswith("mlp.up.weight")):
        found[name] = torch.cdist(arranged[name], state[name]).argmin(dim=1)
    return found


def test_sorting_permutes_up_with_down_and_its_hessian() -> None:
    cfg, state, hessians = settled_mlp()
    copies = {n: w.clone() for n, w in state.items()}
    sorted_state, sorted_hessians = train_gpt.sort_hidden(cfg, rules.runtime(), state, hessians)
    assert all(torch.equal(state[n], copies[n]) for n in state), "the inputs are left alone"
    for up, order in permutations(state, sorted_state).items():
        down = up.replace(".up.", ".down.")
        assert sorted(order.tolist()) == list(range(len(order))) != order.tolist()
        assert torch.equal(sorted_state[up], state[up][order])
        assert torch.equal(sorted_state[down], state[down][:, order])
        assert torch.equal(sorted_hessians[down], hessians[down][order][:, order])
        assert torch.equal(sorted_hessians[up], hessians[up])
    moved = {n for n in state if not torch.equal(sorted_state[n], state[n])}
    assert moved == {n for n in state if ".mlp." in n and n.endswith("weight")}


def logits(cfg: Config, state: dict[str, Tensor]) -> Tensor:
    model = train_gpt.GPT(cfg, dtype=torch.float64).double()
    model.load_state_dict(state)
    model.set_looping(True)
    with torch.no_grad():
        return model(torch.arange(40)[None] % 80 + 8)


@pytest.mark.parametrize("matrix", ["gptq", "rowwise"])
def test_decoded_model_computes_the_same_function_sorted_or_not(matrix: str) -> None:
    """Quantising the sorted model is sorting the quantised model, and the order of hidden units is no function's."""
    cfg, state, hessians = settled_mlp(matrix)
    arranged = train_gpt.sort_hidden(cfg, rules.runtime(), state, hessians)
    as_float = logits(cfg, state)
    assert torch.allclose(logits(cfg, arranged[0]), as_float, rtol=0, atol=1e-9)
    plain, after = (
        train_gpt.dequantize(train_gpt.quantize(cfg, rules.runtime(), *pair)) for pair in ((state, hessians), arranged)
    )
    for up, order in permutations(state, arranged[0]).items():
        down = up.replace(".up.", ".down.")
        assert torch.equal(after[up], plain[up][order])
        assert (after[down] != plain[down][:, order]).float().mean() < 0.01, "but for halves that rounding decides"
        after[down], after[up] = after[down][:, order.argsort()], after[up][order.argsort()]
    shift = (logits(cfg, after) - logits(cfg, plain)).abs().max()
    assert shift <= (1e-9 if matrix == "rowwise" else 0.05 * (logits(cfg, plain) - as_float).abs().max())


def test_sorting_is_composed_with_repair_and_awq() -> None:
    cfg, state, hessians = settled_mlp()
    cfg = small_state(repair="lqer", awq_lite_enabled=True, lqer_top_k=30, awq_lite_group_size=8)[0]
    arranged, rearranged = train_gpt.sort_hidden(cfg, rules.runtime(), state, hessians)
    parts = train_gpt.quantize(cfg, rules.runtime(), arranged, rearranged)
    assert sum(key.endswith("+lqer") for key in parts) == 30 and any(":awq_lite" in key for key in parts)
    restored = train_gpt.dequantize(parts)
    reference = logits(cfg, state)
    plain = train_gpt.dequantize(train_gpt.quantize(cfg, rules.runtime(), state, hessians))
    errors = [(logits(cfg, weights) - reference).norm() for weights in (restored, plain)]
    assert errors[0] == pytest.approx(errors[1].item(), rel=0.25)


def test_clip_search_takes_the_least_squared_error() -> None:
    W = torch.randn(8, 4000, generator=torch.Generator().manual_seed(8))
    found = train_gpt.searched_scales(W, 3, by_row=False)
    errors = {}
    for q in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
        scale = (W.abs().quantile(q, dim=1) / 3).half()
        restored = train_gpt.decode_rows(train_gpt.rounded_rows(W, scale, 3))
        errors[q] = (W - restored).norm().item()
        assert torch.equal(scale, found) == (q == 0.999), "three levels a side want the tightest clip"
    assert min(errors, key=errors.__getitem__) == 0.999
