"""Quantisation: Hessians, GPTQ, the plan and its schemes."""

from __future__ import annotations

import math

import golden_rules as rules
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train_gpt

SMALL = rules.entry("forward/hash_bosmask").config
OURS = {  # published name -> ours, for the dictionary of the mixed_quantize entry
    "tok_emb.weight": "tok_emb.weight",
    "blocks.0.attn.c_q.weight": "blocks.0.attn.q.weight",
    "blocks.1.mlp.fc.weight": "blocks.1.mlp.up.weight",
    "blocks.1.mlp.proj.weight": "blocks.1.mlp.down.weight",
    "blocks.0.attn.attn_gate_w": "blocks.0.attn.gate.weight",
    "blocks.0.attn_scale": "blocks.0.attn_scale",
    "skip_gates": "skips.gates",
}  # the entry's small c_k is stored as fp16 there by its size; here every matrix follows the plan


def weighted_error(error: Tensor, H: Tensor) -> float:
    """trace(E H E^T): the squared error of the layer's outputs."""
    return (error.double() @ H.double() * error.double()).sum().item()


# The published numbers


def is_matrix(name: str) -> bool:
    parts = name.split(".")
    return name == "tok_emb.weight" or (parts[-1] == "weight" and parts[-2] in ("q", "k", "v", "o", "up", "down"))


@pytest.fixture(scope="module")
def mixed() -> tuple[rules.Entry, dict[str, Tensor], dict[str, Tensor], dict[str, train_gpt.Parts]]:
    """The published dictionary under our names: entry, weights, Hessians and what quantize makes of them."""
    golden = rules.entries("mixed_quantize")[0]
    config, state, hessians = golden.config, {}, {}
    for name, ours in OURS.items():
        shape, base = tuple(config["shapes"][name]), config["base"].get(name, 0.0)
        state[ours] = rules.fill("hash", name, shape, config["amps"][name], base).float()
        if is_matrix(ours):
            key = config["hessian_key_prefix"] + name
            hessians[ours] = rules.hessian(key, config["hessian_samples"], shape[1], config["rho"]).float()
    knobs = ("embed_clip_sigmas", "mlp_clip_sigmas", "attn_clip_sigmas", "embed_bits", "matrix_bits")
    cfg = train_gpt.Config(attn_gate="sparse", **{knob: config[knob] for knob in knobs})
    return golden, state, hessians, train_gpt.quantize(cfg, rules.runtime(), state, hessians)


@pytest.mark.parametrize("name", OURS)
def test_quantize_of_a_dictionary(name: str, mixed: tuple) -> None:
    golden, state, hessians, parts = mixed
    want, ours = golden.expected[name], OURS[name]
    scheme = next(key.split(":")[1] for key in parts if key.startswith(ours + ":"))
    restored = train_gpt.dequantize(parts)[ours]
    error = state[ours] - restored
    lqer = "lqer" in want["meta"]  # the published low-rank repair comes after what is compared here
    before = want["error_frobenius_before_lqer" if lqer else "error_frobenius_after"]
    assert error.norm().item() == pytest.approx(before, rel=1e-3)
    assert want["meta"].startswith({"gptq": "gptq (int", "fp16": "passthrough (float16)"}[scheme])
    if "q_sum" in want:
        q, scale = parts[f"{ours}:{scheme}"]["q"], parts[f"{ours}:{scheme}"]["s"]
        assert (q.dtype, scale.dtype) == (torch.int8, torch.float16)
        assert abs(int(q.sum()) - want["q_sum"]) <= 4 and abs(int(q.abs().sum()) - want["q_abs_sum"]) <= 4
        assert np.abs(np.subtract(q[:8].sum(1).tolist(), want["q_row_sums_first8"])).sum() <= 4
        assert scale[:4].double().tolist() == pytest.approx(want["scales_first4"], rel=1e-9)
    if "q_sum" in want and not lqer:
        assert weighted_error(error, hessians[ours]) == pytest.approx(want["hessian_weighted_error_after"], rel=1e-3)
    if not lqer:
        rules.assert_checks(restored, want["dequant"], rel=1e-3 if "q_sum" in want else 1e-8)


# Properties of GPTQ


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(2, 24),
    cols=st.integers(8, 90),
    bits=st.integers(3, 8),
    correlation=st.floats(0.3, 3.0),
    blocksize=st.sampled_from([7, 32, 128]),
)
def test_gptq_is_no_worse_than_rounding_to_nearest(
    seed: int, rows: int, cols: int, bits: int, correlation: float, blocksize: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, cols, generator=generator)
    X = torch.randn(4 * cols, cols, generator=generator) + correlation * torch.randn(4 * cols, 1, generator=generator)
    H, scale = X.T @ X, train_gpt.row_scales(W, bits, 4.0)
    step = scale.float()[:, None]
    spread = W - train_gpt.gptq(W, H, scale, bits, 0.01, blocksize) * step
    nearest = W - train_gpt.round_to_grid(W, step, bits) * step
    assert weighted_error(spread, H) <= 1.05 * weighted_error(nearest, H)


def test_gptq_halves_the_error_on_correlated_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(48, 96, generator=generator), torch.randn(400, 96, generator=generator)
    X = X + 2 * torch.randn(400, 4, generator=generator) @ torch.randn(4, 96, generator=generator)
    H, scale = X.T @ X, train_gpt.row_scales(W, 4, 3.0)
    step = scale.float()[:, None]
    spread = W - train_gpt.gptq(W, H, scale, 4, 0.01, 128) * step
    nearest = W - train_gpt.round_to_grid(W, step, 4) * step
    assert weighted_error(spread, H) < 0.5 * weighted_error(nearest, H)


def test_gptq_with_a_diagonal_hessian_is_rounding() -> None:
    W = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    scale = train_gpt.row_scales(W, 6, 12.0)
    H = torch.diag(torch.linspace(1, 3, 40))
    nearest = train_gpt.round_to_grid(W, scale.float()[:, None], 6).to(torch.int8)
    assert torch.equal(train_gpt.gptq(W, H, scale, 6, 0.01, 16), nearest)


def test_gptq_does_not_depend_on_the_block_size() -> None:
    generator = torch.Generator().manual_seed(2)
    W, X = torch.randn(8, 70, generator=generator), torch.randn(200, 70, generator=generator)
    scale = train_gpt.row_scales(W, 6, 12.0)
    whole, blocks = (train_gpt.gptq(W, X.T @ X, scale, 6, 0.01, size) for size in (128, 9))
    assert (whole != blocks).sum() <= 2


@pytest.mark.parametrize("dead", [(0,), (3, 17, 39), tuple(range(40))])
def test_dead_columns_become_zero_and_nothing_breaks(dead: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    W, X = torch.randn(8, 40, generator=generator), torch.randn(120, 40, generator=generator)
    X[:, list(dead)] = 0
    scale = train_gpt.row_scales(W, 6, 12.0)
    q = train_gpt.gptq(W, X.T @ X, scale, 6, 0.01, 16)
    assert not q[:, list(dead)].any()
    alive = [c for c in range(40) if c not in dead]
    assert not alive or q[:, alive].any()
    assert torch.isfinite(train_gpt.decode_rows({"q": q, "s": scale})).all()


@pytest.mark.parametrize("scheme", ["gptq", "rowwise"])
def test_a_zero_or_tiny_row_stays_finite(scheme: str) -> None:
    generator = torch.Generator().manual_seed(4)
    W, X = torch.randn(5, 24, generator=generator), torch.randn(99, 24, generator=generator)
    W[1], W[3] = 0, 1e-9
    rule = train_gpt.QuantRule(scheme, 6, 12.0)
    parts = train_gpt.SCHEMES[scheme].encode(W, X.T @ X, rule, train_gpt.Config())
    restored = train_gpt.SCHEMES[scheme].decode(parts)
    assert (parts["s"] > 0).all() and torch.isfinite(restored).all()
    assert not restored[1].any() and restored[3].abs().max() < 1e-6


def test_inputs_are_left_alone() -> None:
    generator = torch.Generator().manual_seed(5)
    W, X = torch.randn(5, 24, generator=generator), torch.randn(99, 24, generator=generator)
    H = X.T @ X
    copies = W.clone(), H.clone()
    train_gpt.gptq(W, H, train_gpt.row_scales(W, 6, 12.0), 6, 0.01, 8)
    assert torch.equal(W, copies[0]) and torch.equal(H, copies[1])


@pytest.mark.parametrize("bits", [2, 6, 8])
def test_levels_are_symmetric_and_halves_go_to_even(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    levels = train_gpt.round_to_grid(torch.tensor([-1e9, -0.5, 0.5, 1e9]), torch.tensor(1.0), bits)
    assert levels.tolist() == [-top, 0, 0, top]
    assert train_gpt.round_to_grid(torch.tensor([1.5]), torch.tensor(1.0), 8).item() == 2


# Plan and schemes


def small_state(**knobs: object) -> tuple[train_gpt.Config, dict[str, Tensor], dict[str, Tensor]]:
    cfg = rules.model_config(SMALL, **knobs)
    model, tap = rules.build(SMALL, torch.float32), train_gpt.HessianTap()
    model(rules.rows_of(SMALL)[0], None, None, tap)
    return cfg, {name: p.detach() for name, p in model.state_dict().items()}, tap.hessians(model, 1, rules.runtime())


@pytest.mark.parametrize("matrix", ["gptq", "rowwise"])
@pytest.mark.parametrize("embed", ["gptq", "rowwise"])
def test_decode_of_encode_keeps_name_shape_and_dtype(matrix: str, embed: str) -> None:
    cfg, state, hessians = small_state(matrix_quant=matrix, embed_quant=embed)
    parts = train_gpt.quantize(cfg, rules.runtime(), state, hessians)
    restored = train_gpt.dequantize(parts)
    assert list(parts) == sorted(parts) and sorted(restored) == sorted(state)
    for name, weight in state.items():
        assert (restored[name].shape, restored[name].dtype) == (weight.shape, torch.float32), name
        assert (restored[name] - weight).norm() < (0.25 if is_matrix(name) else 1e-3) * weight.norm(), name
    schemes = {key.split(":")[0]: key.split(":")[1] for key in parts}
    for name in state:
        expected = embed if name == "tok_emb.weight" else matrix if is_matrix(name) else "fp16"
        assert schemes[name] == expected, name


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_rowwise_error_is_at_most_half_a_step(bits: int) -> None:
    W = torch.randn(9, 31, generator=torch.Generator().manual_seed(6))
    parts = train_gpt.encode_rowwise(W, None, train_gpt.QuantRule("rowwise", bits, 100.0), train_gpt.Config())
    step = parts["s"].float()[:, None]
    assert ((W - train_gpt.decode_rows(parts)).abs() <= step * 0.5001).all()
    assert parts["q"].abs().max() <= 2 ** (bits - 1) - 1


def test_each_tensor_has_a_rule_by_its_kind() -> None:
    cfg, state, _ = small_state()
    plan = train_gpt.quant_plan(cfg)
    assert plan.keys() == state.keys()
    for name, rule in plan.items():
        assert (rule.scheme == "fp16") == (not is_matrix(name)), name


def test_bits_and_clips_reach_their_tensors() -> None:
    knobs = {"matrix_bits": 5, "embed_bits": 8, "attn_clip_sigmas": 9.0, "mlp_clip_sigmas": 8.0}
    plan = train_gpt.quant_plan(train_gpt.Config(embed_clip_sigmas=7.0, **knobs))
    found = {
        name: plan[name][:3]
        for name in ("tok_emb.weight", "blocks.10.attn.o.weight", "blocks.3.mlp.down.weight", "skips.weights")
    }
    assert list(found.values()) == [("gptq", 8, 7.0), ("gptq", 5, 9.0), ("gptq", 5, 8.0), ("fp16", 16, 0.0)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["blocks.2.mlp.up.weight", "skips.gates"])
def test_weights_that_are_not_finite_are_refused(name: str, value: float) -> None:
    cfg, state, hessians = small_state()
    state = state | {name: state[name].clone()}
    state[name][0, 0] = value
    with pytest.raises(FloatingPointError, match=name):
        train_gpt.quantize(cfg, rules.runtime(), state, hessians)


def test_a_missing_hessian_is_a_clear_error() -> None:
    cfg, state, hessians = small_state()
    hessians.pop("blocks.0.attn.q.weight")
    with pytest.raises(train_gpt.UserError, match="no Hessian"):
        train_gpt.quantize(cfg, rules.runtime(), state, hessians)


def test_quantize_is_repeatable_bit_for_bit() -> None:
    cfg, state, hessians = small_state()
    first, again = (train_gpt.quantize(cfg, rules.runtime(), state, hessians) for _ in range(2))
    assert all(torch.equal(first[key][part], again[key][part]) for key in first for part in first[key])


def test_hessians_of_shared_inputs_are_shared_and_passes_add_up() -> None:
    model, tap = rules.build(SMALL, torch.float32), train_gpt.HessianTap()
    model(rules.rows_of(SMALL)[0], None, None, tap)
    hessians = tap.hessians(model, 1, rules.runtime())
    assert torch.equal(hessians["blocks.1.attn.q.weight"], hessians["blocks.1.attn.v.weight"])
    per_pass = SMALL["T"] * SMALL["D"]  # the trace of unit-rms inputs, times 1/(layer + 1)
    traces = [hessians[f"blocks.{layer}.mlp.up.weight"].trace().item() * (layer + 1) for layer in range(6)]
    assert [round(trace / per_pass) for trace in traces] == [1, 1, 3, 3, 1, 1]
