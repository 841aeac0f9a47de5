"""What refines quantisation: LQER factors, AWQ-lite columns, int8 gates, sorted hidden units."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterator
from typing import Any

import golden_rules as rules
import numpy as np
import pytest
import torch
from conftest import listener
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantisation import OURS, SMALL, Tensors, dictionary, is_matrix, quantized, small_state, weighted_error
from torch import Tensor

import train_gpt
from train_gpt import Config, Grid, Parts, Stored

KNOBS = {field.name for field in train_gpt.dataclasses.fields(Config)}
FP16_ULP = 2.0**-10
Case = tuple[Config, Tensors, Tensors]  # configuration, weights, Hessians


def integers(parts: Parts, factor: str) -> Tensor:
    """The signed integers of one LQER factor, flat."""
    rank, *head = parts["lqm"].tolist()
    count, bits = {"a": (parts["q"].size(0), head[0]), "b": (parts["q"].size(1), head[2])}[factor]
    return train_gpt.unpack_bits(parts[f"lq{factor}"], bits, rank * count).int() - 2 ** (bits - 1)


def blank(rows: int, cols: int) -> Parts:
    """Parts of a weight of zeros, for a correction to be added to."""
    return {"q": torch.zeros(rows, cols, dtype=torch.int8), "s": torch.ones(rows).half()}


# The published numbers


@rules.each("lqer", "quant", "frontier")
def test_lqer_factors(golden: rules.Entry) -> None:
    c, want = golden.config, golden.expected["canonical_largest_abs_of_each_Vh_row_positive"]
    rows, cols, key = c["rows"], c["cols"], c["key"]
    u, v = rules.fill("hash", f"lqer.u.{key}", (rows, 3), 0.05), rules.fill("hash", f"lqer.v.{key}", (3, cols), 0.2)
    E = (rules.fill("hash", f"lqer.E.{key}", (rows, cols), 0.01) + u @ v).float()
    assert E.norm().item() == pytest.approx(golden.expected["E_frobenius"], rel=1e-6)
    assert torch.linalg.svdvals(E)[:6].tolist() == pytest.approx(golden.expected["singular_values_first6"], rel=1e-4)
    parts = blank(rows, cols) | train_gpt.encode_lqer(E, Config(lqer_rank=c["rank"], lqer_asym_group=c["group"]))
    q = {factor: integers(parts, factor) for factor in "ab"}
    assert parts["lqas"].item() == pytest.approx(want["sA_fp16"], rel=FP16_ULP)
    assert parts["lqbs"].tolist() == pytest.approx(want["sB_fp16"], rel=FP16_ULP)
    for factor in "ab":
        assert abs(int(q[factor].sum()) - want[f"q{factor.upper()}_sum"]) <= 2, factor
        assert abs(int(q[factor].abs().sum()) - want[f"q{factor.upper()}_abs_sum"]) <= 2, factor
    counts = [int((q["a"] == level).sum()) for level in (-2, -1, 0, 1)]
    assert np.abs(np.subtract(counts, want["qA_counts_m2_m1_0_1"])).max() <= 2
    correction = train_gpt.decode_lqer(parts)
    rules.assert_checks(correction, want["correction"], rel=1e-3)
    assert (E - correction).norm().item() == pytest.approx(want["E_minus_correction_frobenius"], rel=1e-3)


@rules.each("gate_int8", "quant")
def test_int8_gate(golden: rules.Entry) -> None:
    c, want = golden.config, golden.expected
    gate = rules.fill(c["fill"], c["tensor_name"], tuple(c["shape"]), 0.3).float()
    cfg = Config(gated_attn_quant_gate=True, attn_gate="dense_bias")
    (stored,) = train_gpt.quantize(cfg, rules.runtime(), {"blocks.3.attn.gate.weight": gate}, {})
    assert stored.key() == "blocks.3.attn.gate.weight:half_open_gate:int8_row"
    assert stored.parts["q"].tolist() == want["q"] and stored.parts["q"].dtype == torch.int8
    assert stored.parts["s"].double().tolist() == pytest.approx(want["scales_fp16"], rel=1e-9)
    rules.assert_checks(stored.decode(), want["dequant"], rel=1e-6)


@rules.each("mixed_quantize", "quant")
def test_quantise_and_repair_of_a_dictionary(golden: rules.Entry) -> None:
    published = {OURS[n]: want for n, want in golden.expected.items() if want["meta"].startswith("gptq")}
    state, hessians = dictionary(golden.config, [name for name in golden.expected if OURS.get(name) in published])
    cfg = Config(repair="lqer", **{knob: value for knob, value in golden.config.items() if knob in KNOBS})
    for name, tensor in quantized(cfg, state, hessians).items():
        want, corrected = published[name], "lqer" in published[name]["meta"]
        assert (tensor.scheme, tensor.repairs) == ("gptq", ("lqer",) * corrected), name
        error = state[name] - tensor.decode()
        # the published signs are the library's; the canonical ones round the factors otherwise
        near = 5e-3 if corrected else 1e-3
        assert error.norm().item() == pytest.approx(want["error_frobenius_after"], rel=near), name
        weighted = weighted_error(error, hessians[name])
        assert weighted == pytest.approx(want["hessian_weighted_error_after"], rel=5 * near), name
        if corrected:
            parts, lqer = tensor.parts, want["lqer"]
            before = (state[name] - train_gpt.decode_rows(parts)).norm().item()
            assert before == pytest.approx(want["error_frobenius_before_lqer"], rel=1e-3), name
            assert parts["lqas"].item() == pytest.approx(lqer["sA_fp16"], rel=2 * FP16_ULP), name
            assert parts["lqbs"].tolist() == pytest.approx(lqer["sB_fp16"], rel=4 * FP16_ULP), name
            levels = [int(integers(parts, factor).abs().sum()) for factor in "ab"]
            assert levels == pytest.approx([lqer[f"q{factor}_abs_sum"] for factor in "AB"], abs=8), name


# Packing


@settings(max_examples=60)
@given(data=st.data(), bits=st.integers(1, 8), count=st.integers(0, 70))
def test_bits_pack_and_unpack(data: st.DataObject, bits: int, count: int) -> None:
    values = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)))
    packed = train_gpt.pack_bits(values, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == math.ceil(bits * count / 8)
    assert train_gpt.unpack_bits(packed, bits, count).tolist() == values.tolist()


def test_bits_share_bytes_and_a_grid_reaches_its_levels_and_stays_within_a_step() -> None:
    assert train_gpt.pack_bits(torch.tensor([1, 2, 3, 0, 2]), 2).tolist() == [0b00111001, 2]
    assert train_gpt.pack_bits(torch.tensor([5, 10, 15]), 4).tolist() == [0xA5, 0x0F]
    for bits, group in itertools.product((2, 4), (5, 16, 1000)):
        x = torch.randn(9, 13, generator=torch.Generator().manual_seed(bits))
        packed, scale = Grid(bits, group).encode(x)
        assert scale.numel() == math.ceil(x.numel() / group)
        q = train_gpt.unpack_bits(packed, bits, x.numel()).int() - 2 ** (bits - 1)
        assert q.abs().max() >= 2 ** (bits - 1) - 1, (bits, group)
        step = scale.float().repeat_interleave(group)[: x.numel()].view_as(x)
        decoded = Grid(bits, group).decode(packed, scale, (9, 13))
        assert ((decoded - x).abs() <= 0.502 * step).all(), "every grid reaches half a level over its top"


# LQER


def test_a_low_rank_error_is_found_again_and_degenerate_errors_stay_finite() -> None:
    generator = torch.Generator().manual_seed(0)
    E = torch.randn(60, 4, generator=generator) @ torch.randn(4, 72, generator=generator)
    for group in (64, 50):
        parts = blank(60, 72) | train_gpt.encode_lqer(E, Config(lqer_asym_group=group))
        assert (E - Stored.parse("w:up:rowwise+lqer", parts).decode()).norm() < 0.7 * E.norm(), group
    for E in torch.zeros(8, 12), torch.eye(3, 12), torch.full((8, 1), 1e-12):
        parts = blank(*E.shape) | train_gpt.encode_lqer(E, Config())
        assert torch.isfinite(train_gpt.decode_lqer(parts)).all() and parts["lqm"][0] == min(4, *E.shape)


def test_signs_do_not_come_from_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    E = torch.randn(20, 24, generator=torch.Generator().manual_seed(2))
    first, (U, S, Vh) = train_gpt.encode_lqer(E, Config()), torch.linalg.svd(E, full_matrices=False)
    sign = torch.tensor([-1.0, 1.0] * 10)
    monkeypatch.setattr(torch.linalg, "svd", lambda x, full_matrices: (U * sign, S, Vh * sign[:, None]))
    again = train_gpt.encode_lqer(E, Config())
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_the_worst_tensors_are_repaired_and_the_others_kept() -> None:
    for knobs in {}, {"matrix_quant": "rowwise"}, {"awq_lite_enabled": True}:
        cfg, state, hessians = small_state(repair="none", **knobs)
        before = quantized(cfg, state, hessians)
        after = quantized(train_gpt.dataclasses.replace(cfg, repair="lqer"), state, hessians)
        norms = {n: (state[n] - before[n].decode()).double().norm().item() for n in state if is_matrix(n)}
        worst = sorted(norms, key=lambda n: -norms[n])[:3]
        assert sorted(n for n, tensor in after.items() if tensor.repairs == ("lqer",)) == sorted(worst), knobs
        assert list(after) == list(before) == list(state)
        for name, weight in state.items():
            plain, restored = before[name].decode(), after[name].decode()
            closer = (weight - restored).norm() < (weight - plain).norm()
            assert closer if name in worst else torch.equal(restored, plain), name


# AWQ-lite


def spiky(seed: int, columns: slice, factor: float = 6.0) -> tuple[Tensor, Tensor]:
    """Weight and Hessian of a layer some of whose inputs are loud."""
    generator = torch.Generator().manual_seed(seed)
    W, X = torch.randn(24, 64, generator=generator), torch.randn(300, 64, generator=generator)
    X[:, columns] *= factor
    return W, X.T @ X


def awq_case(**knobs: Any) -> Case:
    """Two layers; the loudest group of 16 columns is 16..31 of the first."""
    cfg = Config(awq_lite_enabled=True, awq_lite_group_size=16, num_layers=6, loop_start=2, loop_end=3, **knobs)
    names = "blocks.0.mlp.up.weight", "blocks.1.attn.q.weight"
    pairs = spiky(0, slice(16, 32), 9.0), spiky(1, slice(48, 64))
    return cfg, *({name: pair[i] for name, pair in zip(names, pairs, strict=True)} for i in (0, 1))


def test_the_loudest_groups_are_chosen() -> None:
    for top_k, groups in (1, [(16,)]), (2, [(16,), (48,)]):
        cfg, state, hessians = awq_case(awq_lite_group_top_k=top_k)
        plan = train_gpt.refined_plan(cfg, state, hessians)
        own = {name: rule for name, rule in plan.items() if rule.awq_groups}
        assert [rule.awq_groups for rule in own.values()] == groups
        assert {rule.scheme for rule in own.values()} == {"awq_lite"}
        assert [rule.clip for rule in own.values()] == [cfg.mlp_clip_sigmas, cfg.attn_clip_sigmas][:top_k]
        assert {n: r for n, r in plan.items() if n not in own}.items() <= train_gpt.quant_plan(cfg).items()


def test_chosen_columns_get_their_bits_and_the_error_falls() -> None:
    cfg, state, hessians = awq_case()
    name = "blocks.0.mlp.up.weight"
    finer, plain = (quantized(c, state, hessians)[name] for c in (cfg, Config()))
    assert (finer.scheme, plain.scheme) == ("awq_lite", "gptq")
    high, low = (finer.parts[key].float() for key in ("hs", "s"))
    assert (high * 127).tolist() == pytest.approx((low * 31).tolist(), rel=2e-3), "the same clip in more levels"
    W, H = state[name], hessians[name]
    errors = [weighted_error(W - tensor.decode(), H) for tensor in (finer, plain)]
    assert errors[0] < 0.5 * errors[1]
    assert ((W - finer.decode())[:, 16:32].abs() <= 0.6 * high[:, None]).float().mean() > 0.9
    assert train_gpt.awq_columns(torch.tensor([8, 16, 0]), 20).tolist() == [*range(16, 20), *range(8)], (
        "cut at the edge"
    )


def test_looped_layers_count_their_passes_once() -> None:
    model = rules.build(SMALL, torch.float32)
    seen: collections.Counter[int] = collections.Counter()

    def count(site: train_gpt.Site, x: Tensor, y: Tensor) -> Tensor:
        seen[site.layer] += 1
        return y

    model(torch.arange(12)[None] + 8, None, None, listener(count, "up"))
    cfg = model.cfg
    assert {layer: train_gpt.passes(cfg, layer) for layer in seen} == seen
    assert max(seen.values()) == 3 and train_gpt.passes(cfg, -1) == 1
    W, H = spiky(4, slice(0, 8))
    assert train_gpt.column_salience(W, 3 * H, 3).numpy() == pytest.approx(train_gpt.column_salience(W, H, 1).numpy())


# Sorted hidden units


def settled_mlp(matrix: str = "gptq", **knobs: Any) -> Case:
    return small_state(matrix_quant=matrix, matrix_bits=4, mlp_clip_sigmas=4.0, compressor="pergroup", **knobs)


def sorted_orders(cfg: Config, state: Tensors, arranged: Tensors) -> Iterator[tuple]:
    """Names of `up` and `down` of each layer, and the order that takes their hidden units to where they are now."""
    downs = train_gpt.weights_by_role(cfg, "down")
    for layer, up in train_gpt.weights_by_role(cfg, "up").items():
        yield up, downs[layer], torch.cdist(arranged[up], state[up]).argmin(dim=1)


def test_sorting_permutes_up_with_down_and_its_hessian() -> None:
    cfg, state, hessians = settled_mlp()
    copies = {n: w.clone() for n, w in state.items()}
    sorted_state, sorted_hessians = train_gpt.reparametrize(cfg, rules.runtime(), state, hessians)
    assert all(torch.equal(state[n], copies[n]) for n in state), "the inputs are left alone"
    moved = set()
    for up, down, order in sorted_orders(cfg, state, sorted_state):
        assert sorted(order.tolist()) == list(range(len(order))) != order.tolist(), up
        assert torch.equal(sorted_state[up], state[up][order]), up
        assert torch.equal(sorted_state[down], state[down][:, order]), down
        assert torch.equal(sorted_hessians[down], hessians[down][order][:, order]), down
        assert torch.equal(sorted_hessians[up], hessians[up]), up
        moved |= {up, down}
    assert {n for n in state if not torch.equal(sorted_state[n], state[n])} == moved
    for codec in ("brotli", "lzma", "rans"):  # whose coders gain nothing by it
        cfg = train_gpt.dataclasses.replace(cfg, compressor=codec)
        same, _ = train_gpt.reparametrize(cfg, rules.runtime(), state, hessians)
        assert all(torch.equal(same[n], state[n]) for n in state), codec


def logits(cfg: Config, state: Tensors) -> Tensor:
    model = train_gpt.GPT(cfg, dtype=torch.float64).double()
    model.load_state_dict(state)
    model.set_looping(True)
    with torch.no_grad():
        return model(torch.arange(40)[None] % 80 + 8)


def test_the_decoded_model_computes_the_same_function_sorted_or_not() -> None:
    """Quantising the sorted model is sorting the quantised model, and the order of hidden units is no function's."""
    for matrix in ("gptq", "rowwise"):
        cfg, state, hessians = settled_mlp(matrix)
        arranged = train_gpt.reparametrize(cfg, rules.runtime(), state, hessians)
        as_float = logits(cfg, state)
        assert torch.allclose(logits(cfg, arranged[0]), as_float, rtol=0, atol=1e-9)
        plain, after = (
            train_gpt.dequantize(train_gpt.quantize(cfg, rules.runtime(), *pair))
            for pair in ((state, hessians), arranged)
        )
        for up, down, order in sorted_orders(cfg, state, arranged[0]):
            assert torch.equal(after[up], plain[up][order]), up
            assert (after[down] != plain[down][:, order]).float().mean() < 0.01, "but for halves that rounding decides"
            after[down], after[up] = after[down][:, order.argsort()], after[up][order.argsort()]
        shift, lost = ((logits(cfg, w) - logits(cfg, plain)).abs().max() for w in (after, state))
        assert shift <= (1e-9 if matrix == "rowwise" else 0.05 * lost)


def test_sorting_is_composed_with_repair_and_awq() -> None:
    cfg, state, hessians = settled_mlp(repair="lqer", awq_lite_enabled=True, lqer_top_k=30, awq_lite_group_size=8)
    pairs = (state, hessians), train_gpt.reparametrize(cfg, rules.runtime(), state, hessians)
    plain, after = (train_gpt.quantize(cfg, rules.runtime(), *pair) for pair in pairs)
    assert sum(tensor.repairs == ("lqer",) for tensor in after) == 30
    assert any(tensor.scheme == "awq_lite" for tensor in after)
    reference = logits(cfg, state)
    errors = [(logits(cfg, train_gpt.dequantize(stored)) - reference).norm() for stored in (after, plain)]
    assert errors[0] == pytest.approx(errors[1].item(), rel=0.25)
