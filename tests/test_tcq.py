"""Trellis-coded quantisation: codes, the search, GPTQ with it, and a whole model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import golden_rules as rules
import pytest
import torch
from conftest import same_stored
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pack_artifact
import train_gpt

STATES = tuple(train_gpt.TCQ_CODES)[1:]  # one state is no trellis
CFG = train_gpt.Config()
TCQ = train_gpt.SCHEMES["gptq_tcq"]
RULE = train_gpt.QuantRule("gptq_tcq", 6, 12.0)


def search(x: Tensor, states: int, top: float = 62.0) -> Tensor:
    """The best integers for x (rows, columns)."""
    return train_gpt.viterbi(states, torch.ones_like(x, dtype=torch.bool), torch.full((x.size(1),), top))(x)


def walk(points: list[int], states: int, chunk: int) -> bool:
    """Whether a path of the trellis gives these integers, by the definition alone."""
    subsets, state = train_gpt.trellis(states).tolist(), 0
    for row, point in enumerate(points):
        state = 0 if row % chunk == 0 else state
        if point % 4 not in subsets[state]:
            return False
        state = (2 * state + subsets[state].index(point % 4)) % states
    return True


def entropy(q: Tensor) -> float:
    """Bits of an integer."""
    return pack_artifact.entropy_bits(q.to(torch.int8).numpy()) / q.numel()


def conditional_entropy(q: Tensor) -> float:
    """Bits of an integer whose parity is known."""
    return entropy(q) - entropy(q % 2)


def draw(rows: int, cols: int, seed: int) -> tuple[Tensor, Tensor]:
    """A matrix of unequal rows, and the Hessian of correlated inputs of unequal loudness."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, cols, generator=generator) * torch.logspace(-1, 0, rows)[:, None]
    X = torch.randn(4 * cols, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    X = X * torch.logspace(-1, 0.5, cols)
    return W, X.T @ X / len(X)


def weighted(error: Tensor, H: Tensor) -> float:
    return (error.double() @ H.double() * error.double()).sum().item()


# The codes


def test_codes_use_the_subsets_evenly_and_let_zero_stay_zero() -> None:
    assert train_gpt.trellis(8).tolist() == [[0, 2], [1, 3], [2, 0], [3, 1], [2, 0], [3, 1], [0, 2], [1, 3]]
    for states in STATES:
        subsets = train_gpt.trellis(states)
        assert subsets.shape == (states, 2) and torch.bincount(subsets.flatten()).tolist() == [states // 2] * 4, states
        assert ((subsets[:, 0] - subsets[:, 1]).abs() == 2).all(), f"{states}: a state allows one parity"
        one, two = subsets.split(states // 2)  # the two ways into each state
        assert ((one - two).abs() == 2).all(), states
        assert walk([0] * 50, states, 50), states


def test_gain_over_a_scalar_quantiser_of_equal_rate() -> None:
    gains = {4: 0.99, 8: 1.09, 16: 1.16, 32: 1.22, 64: 1.27}  # dB (Marcellin and Fischer 1990)
    assert [*gains] == [*STATES]
    for states, wanted in gains.items():
        x = 20 * torch.rand(1024, 100, generator=torch.Generator().manual_seed(states)) - 10
        gain = 10 * math.log10((4 / 12) / (search(x, states) - x).square().mean())
        assert gain == pytest.approx(wanted, abs=0.03), states


# The search


@given(
    states=st.sampled_from(STATES),
    rows=st.integers(1, 40),
    top=st.sampled_from([2.0, 6.0, 62.0, 126.0]),
    scale=st.sampled_from([0.0, 0.3, 3.0, 60.0, 1e6]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=80)
def test_every_result_is_a_path_within_the_grid(states: int, rows: int, top: float, scale: float, seed: int) -> None:
    x = scale * torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
    found = search(x, states, top)
    assert found.abs().max() <= top and torch.equal(found, found.round())
    assert all(walk(column, states, rows) for column in found.int().T.tolist())


def test_the_search_is_the_best_of_all_paths() -> None:
    rows = 9
    x = 2 * torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))
    grid = [torch.tensor([j for j in range(-6, 7) if j % 4 == d]) for d in range(4)]
    errors = torch.stack([(x[:, :, None] - g).square().amin(dim=2) for g in grid])  # of a subset in a row
    branches = torch.tensor(list(itertools.product((0, 1), repeat=rows)))  # all paths
    for states in STATES:
        subsets, state, total = train_gpt.trellis(states), torch.zeros(len(branches), dtype=torch.long), 0
        for row, branch in enumerate(branches.T):
            total = total + errors[subsets[state, branch], row]
            state = (2 * state + branch) % states
        cost = (search(x, states, 6.0) - x).square().sum(dim=0)
        assert torch.allclose(cost, total.amin(dim=0), rtol=1e-5), states


def test_columns_do_not_see_their_padding_one_another_or_the_search_before() -> None:
    x, other = (5 * torch.randn(30, 4, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))
    real = torch.ones_like(x, dtype=torch.bool)
    real[20:, 1:] = False
    found = train_gpt.viterbi(8, real, torch.full((4,), 62.0))
    first, _, again = found(x), found(other), found(x)
    assert torch.equal(first, again)
    for i, rows in enumerate((30, 20, 20, 20)):
        assert torch.equal(first[:rows, i], search(x[:rows, i : i + 1].contiguous(), 8)[:, 0])


# GPTQ with it


@given(states=st.sampled_from(STATES), rows=st.integers(2, 70), chunk=st.integers(16, 40))
@settings(max_examples=12)
def test_columns_are_paths_that_start_again_every_chunk(states: int, rows: int, chunk: int) -> None:
    W, H = draw(rows, 6, rows)
    cfg = dataclasses.replace(CFG, tcq_states=states, tcq_chunk_rows=chunk, scale_step=0.02)
    parts = TCQ.encode(W, H, RULE, cfg)
    assert parts["q"].dtype == torch.int8 and parts["q"].shape == W.shape
    assert parts["t"].tolist() == [states, chunk] and parts["s"].dtype == torch.int16
    assert all(walk(column, states, chunk) for column in parts["q"].T.tolist())
    weight = TCQ.decode(parts)
    assert weight.shape == W.shape and weight.dtype == torch.float32
    assert weighted(weight - W, H) < 0.02 * weighted(W, H)  # feedback trades plain error for this one


def test_error_at_equal_entropy_is_below_a_scalar_quantiser_and_feedback_lowers_it() -> None:
    W, H = draw(256, 64, 5)
    scalar = train_gpt.SCHEMES["gptq"].encode(W, H, RULE._replace(scheme="gptq"), CFG)
    ours = TCQ.encode(W, H, RULE, CFG)
    assert conditional_entropy(ours["q"]) < entropy(scalar["q"]) + 0.01
    blind = TCQ.encode(W, torch.eye(64), RULE, CFG)
    scalar, ours, blind = (weighted(W - train_gpt.decode_rows(parts), H) for parts in (scalar, ours, blind))
    assert ours < 0.83 * scalar and ours < 0.6 * blind


def test_without_feedback_a_column_is_the_result_of_the_search() -> None:
    W, cfg = draw(50, 8, 7)[0], dataclasses.replace(CFG, tcq_states=16)
    parts = TCQ.encode(W, torch.eye(8), RULE, cfg)
    x = W / train_gpt.scale_values(parts)[:, None]
    power = x.square().mean(dim=0)
    assert torch.equal(parts["q"].float(), search(x * (power / (power + train_gpt.TCQ_ERROR)), 16))
    assert torch.equal(TCQ.scale(W, RULE, cfg), 2 * train_gpt.scale_values(parts)), "for QAT"


def test_matrices_together_are_as_alone() -> None:
    cfg = dataclasses.replace(CFG, tcq_chunk_rows=32)
    drawn = [draw(rows, 24, rows) for rows in (100, 8, 32, 65)]
    weights, hessians = ([pair[i] for pair in drawn] for i in (0, 1))
    plan = [RULE, RULE._replace(bits=7), RULE, RULE._replace(bits=3, clip=4.0)]
    together = train_gpt.encode_tcq(weights, hessians, plan, cfg)
    for parts, W, H, rule in zip(together, weights, hessians, plan, strict=True):
        alone = TCQ.encode(W, H, rule, cfg)
        assert parts.keys() == alone.keys() and all(torch.equal(parts[key], alone[key]) for key in parts)
        assert parts["q"].abs().max() <= 2**rule.bits - 2


def test_dead_columns_and_empty_rows_become_zero_and_inputs_stay() -> None:
    W, H = draw(20, 16, 9)
    W[3], H[:, 5], H[5] = 0, 0, 0
    copies = W.clone(), H.clone()
    parts = TCQ.encode(W, H, RULE, CFG)
    with pytest.raises(train_gpt.UserError, match="no Hessian"):
        TCQ.encode(W, None, RULE, CFG)
    restored = train_gpt.decode_rows(parts)
    assert torch.isfinite(restored).all() and not parts["q"][:, 5].any() and restored[3].abs().max() < 1e-4
    assert torch.equal(W, copies[0]) and torch.equal(H, copies[1])


# A model


def tcq_state(**knobs: object) -> tuple[train_gpt.Config, dict[str, Tensor], dict[str, Tensor]]:
    golden = rules.entry("forward/hash_bosmask").config
    ours = {"matrix_quant": "gptq_tcq", "embed_quant": "gptq_tcq", "compressor": "rans"}
    cfg = rules.model_config(golden, **ours | knobs)
    model, tap = rules.build(golden, torch.float32), train_gpt.HessianTap()
    model(rules.rows_of(golden)[0], None, None, tap)
    return cfg, {name: p.detach() for name, p in model.state_dict().items()}, tap.hessians(model, 1, rules.runtime())


def test_round_trip_of_a_repaired_artifact(tmp_path: Path) -> None:
    coarse = {"attn_clip_sigmas": 60.0, "mlp_clip_sigmas": 60.0}
    cfg, state, hessians = tcq_state(scale_step=0.02, repair="lqer", lqer_top_k=2, **coarse)
    stored = train_gpt.quantize(cfg, rules.runtime(), state, hessians)
    assert {tensor.encoding() for tensor in stored} == {"gptq_tcq", "gptq_tcq+lqer", "fp16"}
    want = train_gpt.dequantize(stored)
    repaired = [tensor for tensor in stored if tensor.repairs]
    assert len(repaired) == 2
    for tensor in repaired:
        weight, plain = state[tensor.name], train_gpt.decode_rows(tensor.parts)
        assert (want[tensor.name] - weight).norm() < (plain - weight).norm(), tensor.name
    for codec in ("rans", "lzma"):
        (tmp_path / "model.bin").write_bytes(train_gpt.pack_stored(stored, codec))
        restored = train_gpt.load_artifact(tmp_path / "model.bin")
        assert sorted(restored) == sorted(state), codec
        for name, weight in restored.items():
            assert torch.equal(weight, want[name]) and weight.shape == state[name].shape, (codec, name)


def test_two_ranks_share_the_matrices_and_agree_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, state, hessians = tcq_state()
    whole = train_gpt.quantize(cfg, rules.runtime(), state, hessians)
    monkeypatch.setattr(train_gpt.Runtime, "gather", lambda self, items: items)
    ranks = [dataclasses.replace(rules.runtime(), rank=rank, world=2) for rank in (0, 1)]
    halves = [train_gpt.quantize(cfg, rank, state, hessians) for rank in ranks]
    assert all(sum(tensor.scheme == "gptq_tcq" for tensor in half) > 5 for half in halves)
    names = [tensor.name for tensor in whole]
    assert same_stored(sorted(halves[0] + halves[1], key=lambda tensor: names.index(tensor.name)), whole)
