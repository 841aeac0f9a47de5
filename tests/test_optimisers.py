"""Optimisers, schedules, the weight average and the clock."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import golden_rules as rules
import pytest
import torch
from torch import Tensor, nn

import train_gpt

SMALL = rules.entry("forward/hash_bosmask").config


# Orthogonalisation


@pytest.mark.parametrize("shape", [(2, 24, 60), (2, 60, 24), (1, 32, 32)])
@pytest.mark.parametrize("coefficients", ["polar_express", "quintic"])
def test_orthogonalize_lifts_singular_values_and_keeps_vectors(shape: tuple[int, ...], coefficients: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(x, full_matrices=False)
    core = U.mT @ train_gpt.orthogonalize(x, coefficients, 5) @ Vh.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(core, torch.diag_embed(values), rtol=0, atol=1e-9)
    lifted = values[S > 0.05 * S.amax(-1, keepdim=True)]
    assert lifted.min() > 0.5 and lifted.max() < 1.25


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
@settings(deadline=None, max_examples=40, derandomize=True)
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


def test_muon_does_not_depend_on_how_weights_are_stacked() -> None:
    generator = torch.Generator().manual_seed(4)
    grads = [torch.randn(6, 10, generator=generator) for _ in range(3)]
    together = [nn.Parameter(torch.zeros(6, 10)) for _ in grads]
    alone = [nn.Parameter(torch.zeros(6, 10)) for _ in grads]
    cfg = train_gpt.Config()
    for group in (together, *([p] for p in alone)):
        muon = train_gpt.Muon(group, cfg, rules.runtime())
        for parameter in group:
            at = next(i for i in range(3) if parameter is together[i] or parameter is alone[i])
            parameter.grad = grads[at].clone()
        with torch.no_grad():
            muon.step(muon.reduce(), 0.1, 0.9)
    torch.testing.assert_close(torch.stack(together), torch.stack(alone), rtol=0, atol=1e-6)


def test_weights_without_gradient_only_decay() -> None:
    parameter = nn.Parameter(torch.ones(4, 8))
    muon = train_gpt.Muon([parameter], train_gpt.Config(muon_wd=0.5), rules.runtime())
    with torch.no_grad():
        muon.step(muon.reduce(), 0.1, 0.9)
    torch.testing.assert_close(parameter.detach(), torch.full((4, 8), 0.95))


# Routing


def test_every_parameter_has_one_optimiser() -> None:
    model = rules.build(SMALL)
    groups = train_gpt.optimiser_groups(model)
    names = [name for params in groups.values() for name in params]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    layers = range(SMALL["L"])
    parts = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
    muon = groups["muon", "matrix_lr", "muon_wd"]
    assert muon.keys() == {f"blocks.{layer}.{part}.weight" for layer in layers for part in parts}
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


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_clip_limits_the_global_norm_and_keeps_the_direction() -> None:
    model, optimisers = small_run(grad_clip_norm=0.3)
    set_gradients(model, 1)
    shares = optimisers.muon.reduce()
    before = torch.cat([t.flatten() for t in (*shares, *(p.grad for p in optimisers.small))]).clone()
    optimisers.clip(shares)
    after = torch.cat([t.flatten() for t in (*shares, *(p.grad for p in optimisers.small))])
    assert len(after) == sum(p.numel() for p in model.parameters())
    assert after.norm().item() == pytest.approx(0.3, rel=1e-4)
    torch.testing.assert_close(after, before * (0.3 / before.norm()), rtol=1e-4, atol=1e-9)


def test_clip_leaves_small_gradients_alone() -> None:
    model, optimisers = small_run(grad_clip_norm=0.3)
    set_gradients(model, 1, size=1e-5)
    shares, before = optimisers.muon.reduce(), [p.grad.clone() for p in optimisers.small]
    copies = [share.clone() for share in shares]
    optimisers.clip(shares)
    assert all(map(torch.equal, shares, copies))
    assert all(torch.equal(p.grad, b) for p, b in zip(optimisers.small, before, strict=True))


def test_clip_reaches_the_update() -> None:
    steps = []
    for limit in (0.0, 0.3):
        model, optimisers = small_run(grad_clip_norm=limit, muon_row_normalize=False, adam_eps=1.0)
        before = model.skips.weights.detach().clone()
        set_gradients(model, 1)
        optimisers.step(1.0, 0)
        steps.append((model.skips.weights.detach() - before).norm())
    assert steps[1] < 0.2 * steps[0]


def test_a_step_moves_everything_and_clears_the_gradients() -> None:
    model, optimisers = small_run()
    before = weights_of(model)
    set_gradients(model, 2)
    optimisers.step(1.0, 0)
    assert all(not torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_a_zero_multiplier_moves_nothing() -> None:
    model, optimisers = small_run()
    before = weights_of(model)
    set_gradients(model, 2)
    optimisers.step(0.0, 0)
    assert all(torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True))


def test_clear_returns_to_the_first_step() -> None:
    model, optimisers = small_run()
    start = weights_of(model)

    def first_step() -> list[Tensor]:
        set_gradients(model, 3)
        optimisers.step(1.0, 0)
        return weights_of(model)

    first, second = first_step(), first_step()
    for clear in (True, False):
        if clear:
            optimisers.clear()
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), start)
        again = first_step()
        assert all(map(torch.equal, again, first)) == clear  # without it the moments of the steps before show
    assert not all(map(torch.equal, first, second))
