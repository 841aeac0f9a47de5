"""Quantisation: Hessians, GPTQ, the plan and its schemes."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import golden_rules as rules
import numpy as np
import pytest
import torch
from conftest import TINY, Done, same_stored
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train_gpt

Tensors = dict[str, Tensor]  # by name
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


def is_matrix(name: str) -> bool:
    return name.endswith(tuple(f"{part}.weight" for part in "tok_emb .q .k .v .o .up .down".split()))


# The published numbers


def dictionary(config: dict[str, Any], names: Iterable[str]) -> tuple[Tensors, Tensors]:
    """Weights and Hessians of the published dictionary, under our names."""
    state, hessians = {}, {}
    for name in names:
        ours, shape, base = OURS[name], tuple(config["shapes"][name]), config.get("base", {}).get(name, 0.0)
        state[ours] = rules.fill("hash", name, shape, config["amps"][name], base).float()
        if is_matrix(ours):
            key = config["hessian_key_prefix"] + name
            hessians[ours] = rules.hessian(key, config["hessian_samples"], shape[1], config["rho"]).float()
    return state, hessians


def quantized(cfg: train_gpt.Config, state: Tensors, hessians: Tensors) -> dict[str, train_gpt.Stored]:
    return {tensor.name: tensor for tensor in train_gpt.quantize(cfg, rules.runtime(), state, hessians)}


@rules.each("mixed_quantize", "caseops")
def test_quantize_of_a_dictionary(golden: rules.Entry) -> None:
    state, hessians = dictionary(golden.config, OURS)
    knobs = "embed_clip_sigmas mlp_clip_sigmas attn_clip_sigmas embed_bits matrix_bits"
    cfg = train_gpt.Config(attn_gate="sparse", **rules.renamed(golden.config, knobs))
    stored = quantized(cfg, state, hessians)
    assert stored.keys() == set(OURS.values())
    for name, ours in OURS.items():
        want, tensor, restored = golden.expected[name], stored[ours], stored[ours].decode()
        error = state[ours] - restored
        lqer = "lqer" in want["meta"]  # the published low-rank repair comes after what is compared here
        before = want["error_frobenius_before_lqer" if lqer else "error_frobenius_after"]
        assert error.norm().item() == pytest.approx(before, rel=1e-3), name
        assert want["meta"].startswith({"gptq": "gptq (int", "fp16": "passthrough (float16)"}[tensor.scheme]), name
        if "q_sum" in want:
            q, scale = tensor.parts["q"], tensor.parts["s"]
            assert (q.dtype, scale.dtype) == (torch.int8, torch.float16)
            assert abs(int(q.sum()) - want["q_sum"]) <= 4 and abs(int(q.abs().sum()) - want["q_abs_sum"]) <= 4, name
            assert np.abs(np.subtract(q[:8].sum(1).tolist(), want["q_row_sums_first8"])).sum() <= 4, name
            assert scale[:4].double().tolist() == pytest.approx(want["scales_first4"], rel=1e-9), name
            if not lqer:
                weighted = weighted_error(error, hessians[ours])
                assert weighted == pytest.approx(want["hessian_weighted_error_after"], rel=1e-3), name
        if not lqer:
            rules.assert_checks(restored, want["dequant"], rel=1e-3 if "q_sum" in want else 1e-8)


# Properties of GPTQ


def layer(rows: int, cols: int, seed: int, factors: int = 1, loud: float = 0.0) -> tuple[Tensor, Tensor]:
    """Weights, and the Hessian of inputs that share some factors."""
    generator = torch.Generator().manual_seed(seed)
    W, X = torch.randn(rows, cols, generator=generator), torch.randn(4 * cols, cols, generator=generator)
    X += loud * torch.randn(4 * cols, factors, generator=generator) @ torch.randn(factors, cols, generator=generator)
    return W, X.T @ X


def gptq_and_nearest(W: Tensor, H: Tensor, bits: int, clip: float, blocksize: int = 128) -> list[Tensor]:
    """The integers of GPTQ, and those of rounding to nearest on the same grid; then the scales of its rows."""
    scale = rules.row_scales(W, bits, clip)
    nearest = train_gpt.round_to_grid(W, scale, bits)
    return [train_gpt.gptq(W, H, scale, bits, 0.01, blocksize), nearest.to(torch.int8), scale]


def test_gptq_against_float64_column_by_column() -> None:
    """Integers that differ follow, in their row, one that was half-way between two levels up to float32's precision.

    In float32, with other orders of the same sums, such a tie turned one row of the matrix D by eight integers.
    """
    for key in "ABCD":
        W, H = rules.fill("hash", f"mq.w.{key}.x256", (256, 264), 0.1), rules.hessian(f"mq.{key}.x256", 528, 264, 0.5)
        scale = train_gpt.storable(train_gpt.sigma_clip_scale(W.float(), 6, 13.0)).double()
        ours = train_gpt.gptq(W.float(), H.float(), scale[:, None].float(), 6, 0.01)
        order = H.float().diagonal().argsort(descending=True)
        damped = H.float().double() + 0.01 * H.diagonal().mean() * torch.eye(264)
        U = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
        tied = torch.zeros(256, dtype=torch.bool)
        W = W.float().double()[:, order]
        for j, column in enumerate(order):
            at = W[:, j] / scale
            tied |= ((at - at.floor() - 0.5).abs() < 1e-4) & (at.abs() < 31)
            level = at.round().clamp(-31, 31)
            assert (tied | (ours[:, column] == level)).all(), (key, j)
            W[:, j:] -= ((at - level) * scale / U[j, j])[:, None] * U[j, j:]
        assert tied.float().mean() < 0.1, key


SIZE = st.tuples(st.integers(2, 24), st.integers(8, 90), st.integers(0, 10_000))  # rows, columns, seed


@settings(max_examples=30)
@given(size=SIZE, bits=st.integers(3, 8), loud=st.floats(0.3, 3.0), blocksize=st.sampled_from([7, 32, 128]))
def test_gptq_is_no_worse_than_rounding_to_nearest(
    size: tuple[int, int, int], bits: int, loud: float, blocksize: int
) -> None:
    W, H = layer(*size, loud=loud)
    ours, nearest, scale = gptq_and_nearest(W, H, bits, 4.0, blocksize)
    assert weighted_error(W - ours * scale, H) <= 1.05 * weighted_error(W - nearest * scale, H)


def test_gptq_halves_the_error_on_correlated_inputs_whatever_the_block_size() -> None:
    W, H = layer(48, 96, 0, factors=4, loud=2.0)
    copies = W.clone(), H.clone()
    ours, nearest, scale = gptq_and_nearest(W, H, 4, 3.0)
    assert weighted_error(W - ours * scale, H) < 0.5 * weighted_error(W - nearest * scale, H)
    assert torch.equal(W, copies[0]) and torch.equal(H, copies[1]), "inputs are left alone"
    assert (gptq_and_nearest(W, H, 4, 3.0, 9)[0] != ours).sum() <= 2
    ours, nearest, _ = gptq_and_nearest(W, torch.diag(torch.linspace(1, 3, 96)), 6, 12.0, 16)
    assert torch.equal(ours, nearest), "without correlation there is nothing to feed back"


def test_scales_and_bits_may_differ_by_row_and_by_column() -> None:
    W, H = layer(12, 40, 7, loud=1.0)
    scale = rules.row_scales(W, 6, 12.0)
    uniform = train_gpt.gptq(W, H, scale, 6, 0.01, 16)
    for bits in (torch.full((12, 1), 6), torch.full((1, 40), 6), torch.full((12, 40), 6)):
        assert torch.equal(train_gpt.gptq(W, H, scale.repeat(1, 40), bits, 0.01, 16), uniform), bits.shape
    bits = torch.where(torch.arange(12) < 5, 2, 6)[:, None]
    coarse = train_gpt.gptq(W, H, rules.row_scales(W, bits, 1.0), bits, 0.01, 16)
    assert coarse[:5].abs().max() == 1 and coarse[5:].abs().max() == 31, "rows do not depend on one another"


def test_dead_columns_and_empty_rows_become_zero_and_nothing_breaks() -> None:
    for dead in [0], [3, 17, 39], list(range(40)):
        W, H = layer(8, 40, 3)
        H[dead], H[:, dead] = 0, 0
        q, _, scale = gptq_and_nearest(W, H, 6, 12.0, 16)
        alive = [c for c in range(40) if c not in dead]
        assert not q[:, dead].any() and (not alive or q[:, alive].any()), dead
        assert torch.isfinite(train_gpt.decode_rows({"q": q, "s": scale[:, 0]})).all()
    W, H = layer(5, 24, 4)
    W[1], W[3] = 0, 1e-9
    for name in "gptq rowwise gptq_lite row_quantile int8_row".split():
        scheme = train_gpt.SCHEMES[name]
        parts = scheme.encode(W, H, train_gpt.QuantRule(name, 6, 12.0), train_gpt.Config())
        restored = scheme.decode(parts)
        assert (parts["s"] > 0).all() and torch.isfinite(restored).all(), name
        assert not restored[1].any() and restored[3].abs().max() < 1e-6, name


def test_levels_are_symmetric_halves_go_to_even_and_errors_are_at_most_half_a_step() -> None:
    W = torch.randn(9, 31, generator=torch.Generator().manual_seed(6))
    for bits in (2, 5, 6, 8):
        top = 2 ** (bits - 1) - 1
        levels = train_gpt.round_to_grid(torch.tensor([-1e9, -0.5, 0.5, 1e9]), torch.tensor(1.0), bits)
        assert levels.tolist() == [-top, 0, 0, top]
        rule = train_gpt.QuantRule("rowwise", bits, 100.0)
        parts = train_gpt.SCHEMES["rowwise"].encode(W, None, rule, train_gpt.Config())
        step = parts["s"].float()[:, None]
        assert ((W - train_gpt.decode_rows(parts)).abs() <= step * 0.5001).all() and parts["q"].abs().max() <= top
    assert train_gpt.round_to_grid(torch.tensor([1.5]), torch.tensor(1.0), 8).item() == 2


# Plan and schemes


def small_state(**knobs: object) -> tuple[train_gpt.Config, Tensors, Tensors]:
    model, tap = rules.build(SMALL, torch.float32), train_gpt.HessianTap()
    model(rules.rows_of(SMALL)[0], None, None, tap)
    return rules.model_config(SMALL, **knobs), model.state_dict(), tap.hessians(model, 1, rules.runtime())


def test_decode_of_encode_keeps_name_role_shape_and_dtype_bit_for_bit_again() -> None:
    for matrix, embed in ("gptq", "rowwise"), ("rowwise", "gptq"), ("gptq_lite", "row_quantile"):
        cfg, state, hessians = small_state(matrix_quant=matrix, embed_quant=embed)
        stored = train_gpt.quantize(cfg, rules.runtime(), dict(reversed(state.items())), hessians)
        weights = train_gpt.weights_of(cfg)
        assert [tensor.name for tensor in stored] == list(weights) == list(state), "the order of the model"
        for tensor in stored:
            name, weight, restored = tensor.name, state[tensor.name], tensor.decode()
            assert (restored.shape, restored.dtype) == (weight.shape, torch.float32), name
            assert (restored - weight).norm() < (0.25 if is_matrix(name) else 1e-3) * weight.norm(), name
            expected = embed if name == "tok_emb.weight" else matrix if is_matrix(name) else "fp16"
            assert (tensor.scheme, tensor.repairs, tensor.role) == (expected, (), weights[name].role), name
        assert same_stored(train_gpt.quantize(cfg, rules.runtime(), state, hessians), stored)


def test_the_plan_gives_each_tensor_a_rule_with_its_bits_and_clip() -> None:
    cfg, state, _ = small_state()
    plan = train_gpt.quant_plan(cfg)
    assert plan.keys() == state.keys()
    assert {name for name, rule in plan.items() if rule.scheme != "fp16"} == set(filter(is_matrix, state))
    knobs = {"matrix_bits": 5, "embed_bits": 8, "attn_clip_sigmas": 9.0, "mlp_clip_sigmas": 8.0}
    plan = train_gpt.quant_plan(train_gpt.Config(embed_clip_sigmas=7.0, **knobs))
    found = [
        plan[n][:3] for n in "tok_emb.weight blocks.10.attn.o.weight blocks.3.mlp.down.weight skips.weights".split()
    ]
    assert found == [("gptq", 8, 7.0), ("gptq", 5, 9.0), ("gptq", 5, 8.0), ("fp16", 16, 0.0)]


def test_weights_that_are_not_finite_and_missing_hessians_are_refused() -> None:
    cfg, state, hessians = small_state()
    for name, value in ("blocks.2.mlp.up.weight", math.nan), ("skips.gates", math.inf):
        bad = state | {name: state[name].clone()}
        bad[name][0, 0] = value
        with pytest.raises(FloatingPointError, match=name):
            train_gpt.quantize(cfg, rules.runtime(), bad, hessians)
    hessians.pop("blocks.0.attn.q.weight")
    with pytest.raises(train_gpt.UserError, match="no Hessian"):
        train_gpt.quantize(cfg, rules.runtime(), state, hessians)


def test_damping_grows_until_there_is_a_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, 64, generator=generator)
    hessian = one.T @ one
    order, factor, _ = train_gpt.inverse_factor(hessian, 1e-9)
    assert torch.isfinite(factor).all() and (factor.diagonal() > 0).all() and len(order) == 64
    # where the first damping suffices it is the only one
    regular = hessian + torch.eye(64)
    first = train_gpt.inverse_factor(regular, 0.01)[1]
    damped = (regular + 0.01 * regular.diagonal().mean() * torch.eye(64)).double()
    order = regular.diagonal().argsort(descending=True)
    exact = torch.linalg.cholesky(damped[order][:, order].inverse(), upper=True)
    torch.testing.assert_close(first.double(), exact, rtol=1e-3, atol=1e-4)
    cfg, state, hessians = small_state(matrix_quant="gptq", embed_quant="rowwise", repair="none")
    name = next(name for name in hessians if name.endswith("down.weight"))
    hessians[name] = -1e9 * torch.ones_like(hessians[name])
    with pytest.raises(FloatingPointError, match=f"{name}: its Hessian has no Cholesky factor; raise GPTQ_DAMP"):
        train_gpt.quantize(cfg, rules.runtime(), state, hessians)


# Scales by sensitivity


def divergence(model: train_gpt.GPT, ids: Tensor, state: Tensors) -> float:
    """KL of the model with other weights from the model, nats per token."""
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    with torch.no_grad():
        p, q = (m(ids).log_softmax(dim=-1) for m in (model, other))
    return (p.exp() * (p - q)).sum(dim=-1).mean().item()


@functools.cache
def sensitive() -> tuple[train_gpt.GPT, Tensor, Tensors]:
    """A small looped model, its input, and what calibration finds with a dozen draws of the targets."""
    model, ids, tap = rules.build(SMALL, torch.float64), rules.rows_of(SMALL)[0], train_gpt.FisherTap()
    for seed in range(12):
        tap.listen(model, ids, model.plan(ids.size(1), ids.device), seed)
    return model, ids, tap.hessians(model, 12, rules.runtime())


def test_sensitivities_predict_the_divergence_that_noise_in_a_matrix_causes() -> None:
    model, ids, found = sensitive()
    names = [name for name in found if train_gpt.SENSITIVITY + name in found]
    assert names == list(filter(is_matrix, model.state_dict())), "every matrix, the tied embedding among them"
    for name in names:
        state, generator = model.state_dict(), torch.Generator().manual_seed(0)
        rows, W = found[train_gpt.SENSITIVITY + name].double(), state[name]
        # rows of their own: noise sits where it matters most, or least
        for stress in (-0.5, 0.5):
            size = 1e-3 * W.std() * (rows / rows.mean()).clamp_min(1e-3) ** stress
            predicted = 0.5 * (rows * size.square()).sum() * found[name].double().trace() / ids.numel() ** 2
            noises = (torch.randn(W.shape, generator=generator, dtype=W.dtype) * size[:, None] for _ in range(8))
            measured = np.mean([divergence(model, ids, state | {name: W + noise}) for noise in noises])
            assert 1 / 3 < measured / predicted < 3, (name, stress, measured, predicted)


def test_scales_by_sensitivity_lose_less_in_as_many_bytes() -> None:
    model, ids, found = sensitive()
    state = {name: w.float() for name, w in model.state_dict().items()}
    found = {name: value.float() for name, value in found.items()}
    knobs, lost = {"matrix_bits": 8, "embed_bits": 8, "gated_attn_quant_gate": True}, {}
    for share, clip in ((0.0, 50.0), (0.75, 70.0)):
        clips = dict.fromkeys(("attn_clip_sigmas", "mlp_clip_sigmas", "embed_clip_sigmas"), clip)
        cfg = rules.model_config(SMALL, fisher_scales=share, **knobs, **clips)
        stored = train_gpt.quantize(cfg, rules.runtime(), state, found)
        restored = {name: w.double() for name, w in train_gpt.dequantize(stored).items()}
        lost[share] = len(train_gpt.pack_stored(stored, "rans")), divergence(model, ids, restored)
    assert lost[0.75][0] <= lost[0][0] and lost[0.75][1] < 0.5 * lost[0][1], lost
    # AWQ-lite's columns are finer than the others of their row, by as much as their bits say
    cfg = rules.model_config(SMALL, fisher_scales=0.75, awq_lite_enabled=True, **(knobs | clips | {"matrix_bits": 6}))
    finest = [t.parts for t in train_gpt.quantize(cfg, rules.runtime(), state, found) if "hs" in t.parts]
    assert finest and all(((p["s"].float() / p["hs"].float()) > 1.5).all() for p in finest)
    cfg = rules.model_config(SMALL, **knobs, **clips)
    # as far as it goes, every row costs the same, up to the floor under sensitivities and the reach of a grid
    cfg = dataclasses.replace(
        cfg, fisher_scales=1.0, embed_clip_sigmas=200.0, attn_clip_sigmas=200.0, mlp_clip_sigmas=200.0
    )
    plan = train_gpt.fisher_gains(cfg, rules.runtime(), train_gpt.quant_plan(cfg), state, found)
    costs = []
    for name in filter(is_matrix, state):
        scale = train_gpt.sigma_clip(state[name], plan[name], cfg).double()
        rows = found[train_gpt.SENSITIVITY + name].double()
        pivots = train_gpt.pivots(found[name], cfg.gptq_damp).mean()
        costs += ((rows + 0.1 * rows.mean()) * pivots * scale.square()).tolist()
    assert np.std(np.log(costs)) < 0.01
    with pytest.raises(train_gpt.UserError, match=r"FISHER_SCALES=1 has no sensitivities; run STAGES=train"):
        train_gpt.quantize(cfg, rules.runtime(), state, small_state()[2])


def test_clips_are_searched_until_the_artifact_is_full(tmp_path: Path) -> None:
    model, ids, found = sensitive()
    state = {name: w.float() for name, w in model.state_dict().items()}
    found, path, sizes = {name: value.float() for name, value in found.items()}, tmp_path / "model.bin", []
    lost = []
    for target in 0, 26_000, 34_000, 300_000:
        knobs = {"artifact_bytes": target, "fisher_scales": 0.75, "matrix_bits": 8, "embed_bits": 8}
        cfg, runtime = rules.model_config(SMALL, compressor="rans", **knobs), rules.runtime()
        run = SimpleNamespace(cfg=cfg, runtime=runtime, log=runtime.log)
        blob = train_gpt.pack_stored(train_gpt.Run.filled(run, state, found), "rans", train_gpt.model_identity(cfg))
        path.write_bytes(blob)
        sizes.append(path.stat().st_size)
        restored = train_gpt.load_artifact(path, cfg)
        lost.append(divergence(model, ids, {name: w.double() for name, w in restored.items()}))
    # the last is more than 8 bits a weight: nothing is clipped for the sake of a size that cannot be
    assert 25_600 <= sizes[1] <= 26_000 and 33_600 <= sizes[2] <= 34_000 and sizes[0] < sizes[3] < 100_000
    assert lost[1] > lost[2] > lost[3]


def random_text(cfg: train_gpt.Config, index: int) -> np.ndarray:
    """A calibration batch of five short rows."""
    return np.random.default_rng(index).integers(0, cfg.vocab_size, (5, 24))


def test_a_full_artifact_by_asymmetric_calibration_fits_and_loses_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last round's integers are others; where they take too many bytes, clips are a little coarser once more."""

    class Larger(train_gpt.Gptaq):
        """Targets of the same variances that take more bytes: nothing has more entropy than a Gaussian."""

        def targets(self, site: str, stored: Iterable[train_gpt.Stored], state: Tensors) -> tuple[Tensors, Tensors]:
            generator = torch.Generator().manual_seed(0)
            return {name: torch.randn(w.shape, generator=generator) * w.std() for name, w in state.items()}, {}

    monkeypatch.setattr(train_gpt, "calibration_rows", random_text)
    model, runtime = rules.build(SMALL, torch.float32).eval(), rules.runtime()
    knobs = {"matrix_bits": 8, "embed_bits": 8, "artifact_bytes": 26_000, "gptq_calibration_batches": 4}
    cfg = rules.model_config(SMALL, compressor="rans", fisher_scales=0.75, gptaq_batches=4, **knobs)
    heldout, found = torch.from_numpy(random_text(cfg, 99)), train_gpt.collect_hessians(cfg, runtime, model)
    lost, rounds = [], []
    for gptaq in None, train_gpt.Gptaq(cfg, runtime, model), Larger(cfg, runtime, model):
        lines: list[str] = []
        run = SimpleNamespace(cfg=cfg, runtime=runtime, log=lines.append)
        stored = train_gpt.Run.filled(run, dict(model.state_dict()), found, (), gptaq)
        size = len(train_gpt.pack_stored(stored, "rans", train_gpt.model_identity(cfg)))
        assert 25_600 <= size <= 26_000 and f"{size:,} bytes" in " ".join(lines[-1:] if gptaq else lines), lines
        lost.append(divergence(model, heldout, train_gpt.dequantize(stored)))
        rounds.append(len(lines))
    assert lost[1] < 0.9 * lost[0], lost
    assert rounds[0] + 1 <= rounds[1] and rounds[0] + 2 <= rounds[2] <= rounds[0] + 3, rounds


@pytest.mark.parametrize("knobs", [{}, {"scale_step": 0.005}, {"awq_lite_enabled": True}])
def test_tuning_comes_nearer_to_the_float_model_with_the_same_integers(
    knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def text(cfg: train_gpt.Config, index: int) -> np.ndarray:
        seen.append(index)
        return random_text(cfg, index)

    seen: list[int] = []
    monkeypatch.setattr(train_gpt, "calibration_rows", text)
    monkeypatch.setattr(train_gpt, "FISHER_TOKENS", 50)  # three passes a step
    model, ids, found = sensitive()
    state = {name: w.float() for name, w in model.state_dict().items()}
    cfg = rules.model_config(SMALL, **{"matrix_bits": 4, "embed_bits": 5, "tune_steps": 12, "tune_lr": 0.01} | knobs)
    stored = train_gpt.quantize(cfg, rules.runtime(), state, {name: value.float() for name, value in found.items()})
    rounded = copy.deepcopy(model)
    rounded.load_state_dict(train_gpt.dequantize(stored))
    after = train_gpt.tuned(cfg, rules.runtime(), model, rounded, stored)
    assert seen == list(range(16, 28)), "not the text of the calibration"
    for old, new in zip(stored, after, strict=True):
        assert old.key() == new.key() and old.parts.keys() == new.parts.keys()
        for key, part in old.parts.items():
            assert new.parts[key].dtype == part.dtype and new.parts[key].shape == part.shape
            assert torch.equal(new.parts[key], part) == (key not in ("s", "hs", "w")), (old.name, key)
        if "hs" in old.parts:
            ratios = [train_gpt.scale_values(new.parts, k) / train_gpt.scale_values(old.parts, k) for k in ("s", "hs")]
            torch.testing.assert_close(*ratios, rtol=2e-3, atol=0)
    lost = []
    for tensors in (stored, after):
        lost.append(divergence(model, ids, {name: w.double() for name, w in train_gpt.dequantize(tensors).items()}))
    assert lost[1] < 0.85 * lost[0], lost
    # what is returned is what was learnt, to the rounding of what stores it
    learnt = divergence(model, ids, rounded.state_dict())
    assert lost[1] == pytest.approx(learnt, rel=0.05)


def test_asymmetric_calibration_makes_up_for_what_was_rounded_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Inputs:
        """What the matrices at a site read, pass by pass."""

        def __init__(self, site: str) -> None:
            self.sites, self.found = frozenset({site}), collections.defaultdict(list)

        def __call__(self, site: train_gpt.Site, x: Tensor, y: Tensor) -> Tensor:
            self.found[site.layer].append(x.detach().flatten(0, -2))
            return y

    monkeypatch.setattr(train_gpt, "calibration_rows", random_text)
    monkeypatch.setattr(train_gpt, "FISHER_TOKENS", 50)  # three passes a batch
    model, runtime = rules.build(SMALL, torch.float32).eval(), rules.runtime()
    cfg = rules.model_config(SMALL, matrix_bits=4, embed_bits=5, gptaq_batches=3, gptq_calibration_batches=3)
    state, tap, own = dict(model.state_dict()), train_gpt.HessianTap(), {}
    # attention inside each row, as the program bounds them
    batches = []
    for rows in map(functools.partial(random_text, cfg), range(3)):
        batch = train_gpt.Batch(rows, rows, train_gpt.row_bounds(cfg, rows))
        ids, _, meta = train_gpt.on_device(model, batch, runtime, cfg.train_seq_len)
        batches.append((ids, meta))
        tap.listen(model, ids, meta, 0)
    found = tap.hessians(model, 3, runtime)
    plain = train_gpt.quantize(cfg, runtime, state, found)
    # the layers' inputs when q, k, v and the embedding are rounded, and the targets of o for them
    early = [t for t in plain if t.role in ("embed", "q", "k", "v")]
    rounded = copy.deepcopy(model)
    rounded.load_state_dict(state | train_gpt.dequantize(early))
    for m in (model, rounded):
        own[m] = Inputs("o")
        for ids, meta in batches:
            m.trunk(ids, meta, own[m])
    roles = train_gpt.weights_of(cfg)
    late = {name: w for name, w in state.items() if roles[name].role == "o"}
    gptaq = train_gpt.Gptaq(cfg, runtime, model)
    targets, hessians = gptaq.targets("o", early, late)
    assert targets.keys() == late.keys() and len(late) > 2 and gptaq.seconds > 0
    for name, W in late.items():
        X, Y = (torch.cat(own[m].found[roles[name].layer]).double() for m in (model, rounded))
        H = Y.T @ Y / 3
        torch.testing.assert_close(hessians[name].double(), H, rtol=1e-3, atol=1e-5 * H.abs().max().item())
        damped = H + cfg.gptq_damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
        wanted = W.double() + torch.linalg.solve(damped, (W.double() @ ((X - Y).T @ Y) / 3).T).T
        torch.testing.assert_close(targets[name].double(), wanted, rtol=1e-3, atol=1e-4 * W.abs().max().item())
        lost = [(X @ W.double().T - Y @ V.double().T).square().sum() for V in (W, targets[name])]
        assert lost[1] < 0.9 * lost[0], (name, lost)
    # the whole: nearer to the float model, with the embedding as before
    after = train_gpt.quantize(cfg, runtime, state, found, gptaq)
    assert [t.key() for t in after] == [t.key() for t in plain]
    same = {t.name for t, other in zip(after, plain, strict=True) if same_stored([t], [other])}
    assert {t.name for t in plain} - same == {t.name for t in plain if t.role in ("q", "k", "v", "o", "up", "down")}
    losses = [divergence(model, batches[0][0], train_gpt.dequantize(tensors)) for tensors in (plain, after)]
    assert losses[1] < 0.9 * losses[0], losses


def test_stages_of_rounding_follow_what_feeds_what() -> None:
    class Stages:
        """In Gptaq's place: notes what is asked, and changes nothing."""

        def targets(self, site: str, stored: Iterable[train_gpt.Stored], state: Tensors) -> tuple[Tensors, Tensors]:
            seen.append((site, {roles[name].role for name in state}, len(list(stored))))
            return {}, {}

    seen: list[tuple[str, set[str], int]] = []
    cfg = train_gpt.load_config({**TINY, "MIXERS": "G A*2 G", "NUM_LAYERS": "4", "GDN_HEAD_DIM": "16"})
    roles, generator = train_gpt.weights_of(cfg), torch.Generator().manual_seed(0)
    state = {name: torch.randn(p.shape, generator=generator) for name, p in roles.items()}
    hessians = {name: torch.eye(w.size(1)) for name, w in state.items() if train_gpt.ROLES[roles[name].role].hessian}
    plain, staged = (train_gpt.quantize(cfg, rules.runtime(), state, hessians, by) for by in (None, Stages()))
    assert same_stored(plain, staged)
    attention, deltas = {"q", "k", "v"}, {"qkv", "delta_z"}
    wanted = [("q", attention), ("qkv", deltas), ("o", {"o"}), ("up", {"up"}), ("down", {"down"})]
    assert [(site, kinds) for site, kinds, _ in seen] == wanted
    counts = [count for *_, count in seen]
    # each is asked with all that is rounded so far, at first the embedding and what is not rounded by GPTQ
    assert counts == sorted(set(counts)) and counts[0] == len(state) - len(hessians) + 1


def test_two_ranks_find_the_same_sensitivities_and_store_the_same(run_gpt: Callable[..., Done]) -> None:
    """Targets are drawn by the batch's number, so it does not matter which rank draws them."""
    knobs = {"FISHER_SCALES": 0.75, "GPTQ_CALIBRATION_BATCHES": 3, "EVAL": "plain", "OVERWRITE": 1}
    found, losses = [], []
    for ranks in (1, 2):
        done = run_gpt(ranks=ranks, **knobs)
        found.append(torch.load(done.folder / "hessians.pt", weights_only=True))
        losses.append(done.result["stages"]["quantized"]["val_loss"])
    one, two = found
    names = [name for name in one if name.startswith(train_gpt.SENSITIVITY)]
    assert one.keys() == two.keys() and len(names) > 10
    for name in names:
        # trained apart, the weights differ by rounding
        torch.testing.assert_close(two[name], one[name], rtol=0.02, atol=0.02 * one[name].mean().item())
    assert losses[1] == pytest.approx(losses[0], abs=0.01)
    done = run_gpt(ranks=2, **knobs | {"GPTQ_CALIBRATION_BATCHES": 1}, code=2)
    assert "GPTQ_CALIBRATION_BATCHES=1 gives some of 2 ranks none" in done.err
