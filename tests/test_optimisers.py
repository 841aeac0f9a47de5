"""Optimisers: orthogonalisation, who trains what, one step of all."""

from __future__ import annotations

import copy
import itertools
import math

import golden_rules as rules
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import train_gpt

SMALL = rules.entry("forward/hash_bosmask").config


# Orthogonalisation


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


@given(st.integers(1, 24), st.floats(1, 6), st.floats(0, 6), st.sampled_from(sorted(train_gpt.COEFFICIENTS)))
@settings(max_examples=30)
def test_gram_form_is_the_same_iteration(rows: int, ratio: float, decades: float, name: str) -> None:
    x = spectrum(rows, math.ceil(rows * ratio), decades, rows)
    for steps, turn in itertools.product((1, 2, 5, 10), (lambda t: t, lambda t: t.mT)):
        found = turn(train_gpt.orthogonalize(turn(x), name, steps))
        torch.testing.assert_close(found, plain_iterations(x, name, steps), rtol=1e-8, atol=1e-8)


def test_half_precision_never_overshoots_on_wide_spectra() -> None:
    """Where bf16 itself would go to 1.5 and over: see gram_iterations."""
    for name, decades in itertools.product(train_gpt.COEFFICIENTS, (1.0, 4.0)):
        x = spectrum(48, 160, decades, 1)
        want, found = (train_gpt.orthogonalize(t, name, 5).double() for t in (x, x.bfloat16()))
        plain = plain_iterations(x.bfloat16(), name, 5).double()
        limit = torch.linalg.svdvals(want).max()
        assert torch.linalg.svdvals(found).max() < 1.03 * limit, (name, decades)
        assert (found - want).norm() < 1.2 * (plain - want).norm(), "no worse than bf16 on the matrix itself"


def test_weights_without_gradient_only_decay() -> None:
    parameter = nn.Parameter(torch.ones(4, 8))
    muon = train_gpt.Muon([parameter], train_gpt.Config(muon_wd=0.5), rules.runtime())
    with torch.no_grad():
        muon.reduce()
        muon.step(0.1, 0.9)
    torch.testing.assert_close(parameter.detach(), torch.full((4, 8), 0.95))


# Routing


def test_every_parameter_has_one_optimiser() -> None:
    model = rules.build(SMALL)
    groups = train_gpt.optimiser_groups(model)
    assert sorted(itertools.chain(*groups.values())) == sorted(name for name, _ in model.named_parameters())
    parts = itertools.product(range(SMALL["L"]), "attn.q attn.k attn.v attn.o mlp.up mlp.down".split())
    matrices = {f"blocks.{layer}.{part}.weight" for layer, part in parts}
    assert groups["muon", "matrix_lr", "muon_wd"].keys() == matrices
    assert list(groups["adamw", "tied_embed_lr", "embed_wd"]) == ["tok_emb.weight"]


def test_a_parameter_without_a_role_is_refused() -> None:
    for owner in ("", "blocks.0.attn", "tok_emb"):
        model = rules.build(SMALL)
        model.get_submodule(owner).register_parameter("stray", nn.Parameter(torch.zeros(2)))
        with pytest.raises(AttributeError, match="role"):
            train_gpt.optimiser_groups(model)


# One step of all


def small_run(**knobs: object) -> tuple[train_gpt.GPT, train_gpt.Optimisers]:
    cfg = rules.model_config(SMALL, **knobs)
    model = train_gpt.GPT(cfg).init_weights(1)
    return model, train_gpt.Optimisers(cfg, model, rules.runtime())


def set_gradients(model: nn.Module, seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)


def test_clip_limits_the_global_norm_leaves_small_gradients_alone_and_reaches_the_update() -> None:
    model, optimisers = small_run(grad_clip_norm=0.3)
    for size in (1.0, 1e-5):
        set_gradients(model, 1, size)
        shares = optimisers.muon.reduce()
        before = torch.cat([t.flatten() for t in (*shares, *(p.grad for p in optimisers.small))])
        optimisers.clip(shares)
        after = torch.cat([t.flatten() for t in (*shares, *(p.grad for p in optimisers.small))])
        assert len(after) == sum(p.numel() for p in model.parameters())
        if size < 1:
            assert torch.equal(after, before)
        else:
            torch.testing.assert_close(after, before * (0.3 / before.norm()), rtol=1e-4, atol=1e-9)
            assert after.norm().item() == pytest.approx(0.3, rel=1e-4)
    steps = []
    for limit in (0.0, 0.3):
        model, optimisers = small_run(grad_clip_norm=limit, muon_row_normalize=False, adam_eps=1.0)
        before = model.skips.weights.detach().clone()
        set_gradients(model, 1)
        optimisers.step(1.0, 0)
        steps.append((model.skips.weights.detach() - before).norm())
    assert steps[1] < 0.2 * steps[0]


def test_a_step_moves_everything_or_with_a_zero_multiplier_nothing_and_clears_the_gradients() -> None:
    for multiplier in (1.0, 0.0):
        model, optimisers = small_run()
        before = copy.deepcopy(list(model.parameters()))
        set_gradients(model, 2)
        optimisers.step(multiplier, 0)
        moved = [not torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True)]
        assert moved == [multiplier > 0] * len(before)
        assert all(p.grad is None for p in model.parameters())


def test_clear_returns_to_the_first_step() -> None:
    model, optimisers = small_run()
    start = copy.deepcopy(list(model.parameters()))

    def first_step() -> list[Tensor]:
        set_gradients(model, 3)
        optimisers.step(1.0, 0)
        return copy.deepcopy(list(model.parameters()))

    first, second = first_step(), first_step()
    for clear in (True, False):
        if clear:
            optimisers.clear()
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), start)
        again = first_step()
        assert all(map(torch.equal, again, first)) == clear  # without it the moments of the steps before show
    assert not all(map(torch.equal, first, second))
