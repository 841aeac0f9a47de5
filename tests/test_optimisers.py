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


# The published numbers


def muon_of(golden: rules.Entry, weights: dict[str, list[nn.Parameter]], dtype: torch.dtype) -> train_gpt.Muon:
    config = golden.config
    cfg = train_gpt.Config(
        muon_wd=config["wd"], muon_backend_steps=config["ns_steps"], muon_row_normalize=config["row_normalize"]
    )
    return train_gpt.Muon([p for bank in weights.values() for p in bank], cfg, rules.runtime(dtype))


def muon_banks(golden: rules.Entry, dtype: torch.dtype) -> dict[str, list[nn.Parameter]]:
    banks = golden.config["banks"].items()
    return {
        name: [nn.Parameter(w) for w in rules.fill("hash", f"muon.w.{name}", tuple(shape), 0.05).to(dtype)]
        for name, shape in banks
    }


@torch.no_grad()
def muon_steps(golden: rules.Entry, weights: dict[str, list[nn.Parameter]], muon: train_gpt.Muon) -> list[dict]:
    """The stacked weights of each bank after each step."""
    config, history = golden.config, []
    for step in range(config["steps"]):
        for name, bank in weights.items():
            shape = tuple(config["banks"][name])
            grads = rules.fill("hash", f"muon.g.{name}.{step}", shape, config["grad_amp"][step])
            for parameter, grad in zip(bank, grads, strict=True):
                parameter.grad = grad.to(parameter.dtype)
        muon.step(muon.reduce(), config["lr"] * config["lr_mul"][step], config["momentum"][step])
        history.append({name: torch.stack(bank).detach().clone() for name, bank in weights.items()})
    return history


@rules.parametrize("muon")
def test_muon_in_float64(golden: rules.Entry) -> None:
    weights = muon_banks(golden, torch.float64)
    history = muon_steps(golden, weights, muon_of(golden, weights, torch.float64))
    for name, expected in golden.expected["float64_everywhere"].items():
        for after, want in zip(history, expected, strict=True):
            rules.assert_checks(after[name], want["weights"])
        assert history[-1][name].flatten()[:5].tolist() == pytest.approx(expected[-1]["first5"], rel=rules.REL)


@rules.parametrize("muon")
def test_muon_with_bf16_updates(golden: rules.Entry) -> None:
    weights = muon_banks(golden, torch.float32)
    history = muon_steps(golden, weights, muon_of(golden, weights, torch.bfloat16))
    for name, expected in golden.expected["reference_bf16_update_fp32_weights"].items():
        for after, want in zip(history, expected, strict=True):
            assert after[name].norm().item() == pytest.approx(want["weights"]["l2"], rel=2e-3)
        assert history[-1][name].flatten()[:5].tolist() == pytest.approx(expected[-1]["first5"], abs=1e-3)


@rules.parametrize("adamw")
def test_adamw(golden: rules.Entry) -> None:
    config, key = golden.config, golden.name.rpartition("/")[2]
    role, lr, wd = {"tok": ("embed", "tied_embed_lr", "embed_wd"), "scalar": ("scale", "scalar_lr", "adam_wd")}[
        key.partition("_")[0]
    ]
    holder = nn.Module()
    holder.weight = train_gpt.make_weight(role, *config["shape"], dtype=torch.float64)
    with torch.no_grad():
        holder.weight.copy_(rules.fill("hash", f"adamw.w.{key}", tuple(config["shape"]), 0.1))
    knobs = {"beta1": config["beta1"], "beta2": config["beta2"], "adam_eps": config["eps"], "grad_clip_norm": 0.0}
    cfg = train_gpt.Config(**knobs, **{lr: config["lr"], wd: config["weight_decay"]})
    optimisers = train_gpt.Optimisers(cfg, holder, rules.runtime())
    for step, want in enumerate(golden.expected["weights_after_step"]):
        grad = rules.fill("hash", f"adamw.g.{key}.{step}", tuple(config["shape"]), config["grad_amp"][step])
        holder.weight.grad = grad
        optimisers.step(config["lr_mul"][step], step)
        rules.assert_checks(holder.weight, want, rel=1e-9)
    assert holder.weight.flatten()[:5].tolist() == pytest.approx(golden.expected["first5"], rel=1e-9)


@pytest.mark.parametrize(
    "case",
    rules.entries("lr_multiplier")[0].expected,
    ids=lambda c: f"warmdown{c['warmdown_frac']}-floor{c['min_lr']}",
)
def test_lr_multiplier(case: dict) -> None:
    got = [train_gpt.lr_multiplier(f, case["warmdown_frac"], case["min_lr"]) for f in case["fractions"]]
    assert got == pytest.approx(case["mult"], rel=1e-9, abs=1e-15)


def test_muon_momentum() -> None:
    golden = rules.entries("muon_momentum")[0]
    ramp = (golden.config["start"], golden.config["end"], golden.config["ramp_steps"])
    got = [train_gpt.muon_momentum(step, *ramp) for step in golden.expected["steps"]]
    assert got == pytest.approx(golden.expected["momentum"], rel=1e-9)
    assert train_gpt.muon_momentum(0, 0.5, 0.9, 0) == 0.9


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


def test_ema_is_the_weighted_sum_of_the_iterates() -> None:
    model = nn.Linear(3, 2, bias=False)
    ema = train_gpt.Ema(train_gpt.Config(ema_decay=0.75), [model.weight])
    iterates = [model.weight.detach().clone()]
    for step in range(4):
        with torch.no_grad():
            model.weight.add_(step + 1.0)
        ema.update()
        iterates.append(model.weight.detach().clone())
    shares = [0.75**4, *(0.25 * 0.75 ** (3 - step) for step in range(4))]
    assert sum(shares) == pytest.approx(1)
    assert torch.equal(model.weight, iterates[-1])  # the live weights are left alone
    expected = sum(share * w for share, w in zip(shares, iterates, strict=True))
    torch.testing.assert_close(ema.shadow[0], expected)


# The clock


@dataclasses.dataclass(frozen=True)
class FakeRank(train_gpt.Runtime):
    """A rank whose collective calls hand on what rank 0 said, through a shared list."""

    said: list = dataclasses.field(default_factory=list)
    heard: list = dataclasses.field(default_factory=list)

    def broadcast_from_rank0(self, value: float) -> float:
        if self.rank == 0:
            self.said.append(value)
            return value
        self.heard.append(value)
        return self.said[len(self.heard) - 1]


class FakeTime:
    """A perf_counter that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def run_clock(clock: train_gpt.Clock, time: FakeTime, step_seconds: list[float]) -> list[float]:
    """Fractions of each step until the clock says stop."""
    fractions, step = [], 0
    clock.start()
    while (fraction := clock.fraction(step)) < 1:
        fractions.append(fraction)
        time.now += step_seconds[min(step, len(step_seconds) - 1)]
        step += 1
    return [*fractions, fraction]


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    time = FakeTime()
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=time.perf_counter))
    return time


def fake_rank(rank: int, said: list) -> FakeRank:
    return FakeRank(rank, 2, rules.CPU, train_gpt.Log(None, True), said=said)


def test_clock_follows_time_and_stops_at_the_budget(fake_time: FakeTime) -> None:
    runtime = fake_rank(0, [])
    fractions = run_clock(train_gpt.Clock(runtime, 60.0, 10_000), fake_time, [0.5])
    assert fractions == pytest.approx([step * 0.5 / 60 for step in range(121)])
    assert len(runtime.said) < 40  # most steps are extrapolated, without waiting for the device


def test_clock_catches_a_slower_step_within_its_stride(fake_time: FakeTime) -> None:
    fractions = run_clock(train_gpt.Clock(fake_rank(0, []), 60.0, 10_000), fake_time, [0.5] * 50 + [2.0])
    spent = [min(step, 50) * 0.5 + max(step - 50, 0) * 2.0 for step in range(len(fractions))]
    worst = max(abs(f - s / 60) for f, s in zip(fractions, spent, strict=True))
    assert worst < 1.5 * train_gpt.Clock.EVERY / 60
    assert 60 <= spent[-1] < 60 + 2 * 2.0


def test_clock_measures_again_when_told_of_a_change(fake_time: FakeTime) -> None:
    runtime = fake_rank(0, [])
    clock = train_gpt.Clock(runtime, 600.0, 10_000)
    clock.start()
    for step in range(30):
        clock.fraction(step)
        fake_time.now += 1.0
    readings = len(runtime.said)
    fake_time.now += 7.0
    clock.expect_change()
    assert clock.fraction(30) == pytest.approx(37 / 600) and len(runtime.said) == readings + 1


def test_every_rank_reads_the_same_clock(fake_time: FakeTime) -> None:
    said: list[float] = []
    first, second = fake_rank(0, said), fake_rank(1, said)
    fractions = run_clock(train_gpt.Clock(first, 20.0, 10_000), fake_time, [0.3, 0.5, 0.4])
    drifted = run_clock(train_gpt.Clock(second, 20.0, 10_000), fake_time, [0.9, 0.1, 0.7])
    assert drifted == fractions
    assert second.heard != first.said[: len(second.heard)]  # its own clock did say otherwise


def test_clock_without_budget_counts_steps(fake_time: FakeTime) -> None:
    fractions = run_clock(train_gpt.Clock(fake_rank(0, []), 0.0, 8), fake_time, [50.0])
    assert fractions == [step / 8 for step in range(9)]


def test_clock_stops_at_the_step_limit(fake_time: FakeTime) -> None:
    fractions = run_clock(train_gpt.Clock(fake_rank(0, []), 1e6, 5), fake_time, [1.0])
    assert len(fractions) == 6 and fractions[-1] == 1


def test_clock_goes_on_after_a_pause(fake_time: FakeTime) -> None:
    clock = train_gpt.Clock(fake_rank(0, []), 100.0, 1000)
    clock.start()
    fake_time.now += 10
    elapsed = clock.read()
    fake_time.now += 1000  # a validation
    clock.start(elapsed)
    fake_time.now += 5
    assert math.isclose(clock.read(), 15)
