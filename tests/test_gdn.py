"""The hybrid of gated delta nets and attention (PR 1895): the delta rule, the mixers, the sink, the whole model."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gdn_rules
import golden_rules as rules
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gdn_rules import GOLDEN, exact_tables, gated_attention, recurrence
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from ttt_rules import STACKS, sample, stack_model

import train_gpt

PUBLISHED = {"mixers": "G*2 A*8 G", "mlp_mult": 4.125, "logit_softcap": 20.0, "qk_gain_init": 5.25}
PUBLISHED |= {"parallel_lanes": 1, "attn_extras": ("xsa", "sink"), "rope_dtype": "bf16"}
PUBLISHED |= {"gdn_conv_trained": False, "gdn_bos_reset": False}
DELTA = rules.toy_config(STACKS["delta"])
Rule = Callable[..., tuple[Tensor, Tensor]]


# The rule


def draw(T: int, decay: float, seed: int = 0, sizes: tuple[int, ...] = (2, 3, 8, 6)) -> tuple[Tensor, ...]:
    """Float64 inputs of the rule: unit keys as ELU + 1 gives them, log decays from -decay to 0, and a state."""
    generator = torch.Generator().manual_seed(seed)
    B, H, K, V = sizes
    q, k = (train_gpt.l2_normalize(F.elu(torch.randn(B, T, H, K, generator=generator).double()) + 1) for _ in range(2))
    v, state = (torch.randn(*shape, generator=generator).double() for shape in ((B, T, H, V), (B, H, K, V)))
    g, beta = (torch.rand(B, T, H, generator=generator).double() for _ in range(2))
    return q, k, v, -decay * g, beta, torch.zeros(B, T, dtype=torch.bool), state


def differentiated(rule: Rule, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs of a rule and the gradients of all inputs but the starts, of a weighted sum of the outputs."""
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    o, state = rule(*leaves)
    loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).cos()).sum() for y in (o, state))
    return [o.detach(), state.detach(), *torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])]


def assert_same_rule(rule: Rule, inputs: tuple[Tensor, ...], wanted: list[Tensor]) -> None:
    """A rule's values to 1e-11 and its gradients to 1e-9 of the largest, which is no less than 1e-6."""
    for i, (x, y) in enumerate(zip(differentiated(rule, inputs), wanted, strict=True)):
        largest = max(y.abs().max().item(), 1e-6)
        torch.testing.assert_close(x, y, rtol=0, atol=(1e-11 if i < 2 else 1e-9) * largest)


def test_chunked_rule_is_the_recurrence_for_every_chunk_length() -> None:
    for inputs in (draw(133, decay) for decay in (0.1, 20.0)):
        wanted = differentiated(recurrence, inputs)
        for chunk in (16, 32, 64, 128):
            assert_same_rule(functools.partial(train_gpt.chunked_delta_rule, chunk=chunk), inputs, wanted)


@settings(max_examples=30)
@given(T=st.integers(1, 40), chunk=st.integers(1, 24), decay=st.sampled_from([0.0, 0.5, 300.0]), data=st.data())
def test_chunked_rule_is_the_recurrence_with_any_starts(T: int, chunk: int, decay: float, data: st.DataObject) -> None:
    inputs = list(draw(T, decay, sizes=(2, 1, 3, 2)))
    for row in inputs[5]:
        row[data.draw(st.lists(st.integers(0, T - 1), max_size=8))] = True
    rule = functools.partial(train_gpt.chunked_delta_rule, chunk=chunk)
    assert_same_rule(rule, tuple(inputs), differentiated(recurrence, tuple(inputs)))


def test_nothing_crosses_a_start_not_even_a_tiny_gradient() -> None:
    q, k, v, g, beta, starts, state = (x.requires_grad_(x.is_floating_point()) for x in draw(90, 0.01))
    starts[:, 70] = True
    o, _ = train_gpt.chunked_delta_rule(q, k, v, g, beta, starts, state)
    *exact, decays, states = torch.autograd.grad(o[:, 70:].sum(), (q, k, v, beta, g, state))
    assert not states.any() and not any(x[:, :70].any() or not x[:, 70:].any() for x in exact)
    assert decays[:, :71].abs().max() < 1e-13 < decays[:, 71:].abs().max()  # sums of what cancels


def test_single_precision_stays_close() -> None:
    for decay in (0.1, 20.0):
        exact = draw(150, decay, sizes=(1, 1, 64, 64))
        single = tuple(x.float() if x.is_floating_point() else x for x in exact)
        results = differentiated(train_gpt.chunked_delta_rule, single), differentiated(recurrence, exact)
        for i, (x, y) in enumerate(zip(*results, strict=True)):
            bound = 2e-5 if i < 2 else 2e-4
            assert torch.isfinite(x).all() and (x - y).norm() <= bound * y.norm(), (decay, i)


@rules.each("gated_delta_rule", "gdn")
def test_rule_gives_the_published_numbers(golden: rules.Entry) -> None:
    c, expected = golden.config, golden.expected
    (B, T), repeat, shape = (c["B"], c["T"]), c["v_heads"] // c["q_heads"], {}
    shape |= dict.fromkeys(("q", "k"), (B, T, c["q_heads"], c["key_dim"]))
    shape |= {"v": (B, T, c["v_heads"], c["value_dim"])} | dict.fromkeys(("g", "beta"), (B, T, c["v_heads"]))
    low, (base, amp) = -c["g_max_decay"] / 2, c["beta_fill"]
    amps = dict.fromkeys(("q", "k"), (c["qk_fill_amp"], 0.0)) | {"v": (c["v_fill_amp"], 0.0)}
    amps |= {"g": (-low, low), "beta": (amp, base)}
    raw = {n: rules.fill("hash", f"gdr.{n}.{c['key']}", shape[n], *amps[n]).requires_grad_() for n in shape}
    feature = {"elu1": (lambda x: F.elu(x) + 1, F.silu), "raw": (lambda x: x, lambda x: x)}[c["feature"]]
    q, k = (feature[0](raw[n]).repeat_interleave(repeat, dim=2) * c["qk_post_factor"] for n in ("q", "k"))
    sizes = (B, c["v_heads"], c["key_dim"], c["value_dim"])
    state = rules.fill("hash", f"gdr.s0.{c['key']}", sizes, c["initial_state_amp"]).requires_grad_()
    rule = train_gpt.delta_rule if c["l2norm_in_op"] else train_gpt.chunked_delta_rule
    starts = torch.zeros(B, T, dtype=torch.bool)
    o, last = rule(q, k, feature[1](raw["v"]), raw["g"], raw["beta"], starts, state)
    weights = (rules.fill("hash", f"gdr.{n}.{c['key']}", x.shape, 1.0) for n, x in (("wo", o), ("ws", last)))
    loss = sum((w * x).sum() for w, x in zip(weights, (o, last), strict=True))
    found = {"scale": q.size(-1) ** -0.5, "output": o, "final_state": last, "loss": loss}
    found["output_first_token_head0_first4"], found["output_last_token_last_head_first4"] = o[0, 0, 0], o[-1, -1, -1]
    found["final_state_last_head_row0_first4"] = last[-1, -1, 0]
    rules.compare(found, expected | {"scale": c["scale"]}, skip=("grad",))
    raw["initial_state"] = state
    gradients = dict(zip(raw, torch.autograd.grad(loss, list(raw.values())), strict=True))
    rules.compare(gradients, expected["grad"], 1e-7)


# Flash-linear-attention, imitated: a function with gradients of its own, which the operators call inside


def unnormed(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence of q and k that it normalises, without starts."""
    q, k, v, g, beta, state = inputs
    starts = torch.zeros(g.shape[:2], dtype=torch.bool)
    return recurrence(train_gpt.l2_normalize(q), train_gpt.l2_normalize(k), v, g, beta, starts, state)


class Imitation(torch.autograd.Function):
    """`unnormed`, which inside an operator, where autograd is off, still has gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        return unnormed(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        def gradients() -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return torch.autograd.grad(unnormed(*leaves), leaves, grads)

        with ThreadPoolExecutor(1) as pool:  # where autograd is on is a property of the thread
            return pool.submit(gradients).result()


def imitation(*inputs: Tensor, initial_state: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
    """Called like the library's function."""
    assert options == {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    return Imitation.apply(*inputs, initial_state)


def test_fused_rule_is_the_twin_with_gradients_that_the_library_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt, "chunk_gated_delta_rule", imitation)
    q, k, v, g, beta, starts, state = draw(30, 0.3, sizes=(2, 2, 4, 3))
    starts[0, 11] = starts[1, 20] = starts[1, 21] = True
    inputs = (3 * q, k + 1, v, g, beta, starts, state)
    wanted = differentiated(train_gpt.delta_rule, inputs)
    compiled = torch.compile(train_gpt.fused_delta_rule, fullgraph=True, backend="aot_eager")
    for fused in (train_gpt.fused_delta_rule, compiled):
        for x, y in zip(differentiated(fused, inputs), wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * y.abs().max().item())


def test_which_rule_runs_is_chosen_once_and_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    log = type("Lines", (), {"__call__": lambda self, text: lines.append(text)})()
    runtime = train_gpt.Runtime(0, 1, torch.device("cuda"), log, torch.bfloat16)
    auto, on, off = (train_gpt.Config(**PUBLISHED, fused_gdn_enabled=value) for value in ("auto", "1", "0"))
    monkeypatch.setattr(train_gpt, "triton", object())
    monkeypatch.setattr(train_gpt, "chunk_gated_delta_rule", None)
    with pytest.raises(train_gpt.UserError, match="FUSED_GDN_ENABLED=1 needs a GPU, triton, .*flash-linear-attention"):
        train_gpt.choose_kernels(on, runtime)
    for library, cfg, word in ((None, auto, "plain"), (imitation, auto, "fused"), (imitation, off, "plain")):
        monkeypatch.setattr(train_gpt, "chunk_gated_delta_rule", library)
        wanted = train_gpt.fused_delta_rule if word == "fused" else train_gpt.delta_rule
        assert train_gpt.choose_kernels(cfg, runtime).delta_rule is wanted
        assert lines[-1] == f"fused_gdn_enabled: {word}"


# Delta nets


class Spy:
    """A rule or a backend of attention that keeps what it was called with and what it gave."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        self.args, self.result = args, self.function(*args)
        return self.result


def mixer(config: dict[str, Any], layer: int, letters: str, knobs: dict[str, Any]) -> torch.nn.Module:
    cfg = train_gpt.Config(model_dim=config["dim"], mixers=letters, num_layers=len(letters), **knobs)
    made = train_gpt.MIXERS[letters[layer]](cfg, layer, train_gpt.masked_attention, train_gpt.PLAIN)
    return gdn_rules.fill_module(config, made, config["weight_name_prefix"], letters)


def delta_net(config: dict[str, Any]) -> train_gpt.DeltaNet:
    heads = {"gdn_head_dim": config["head_dim"], "gdn_qk_heads": config["q_heads"], "gdn_v_heads": config["v_heads"]}
    net = mixer(config, 0, "G", heads)
    net.rule = Spy(net.rule)
    return net


def run_mixer(
    net: torch.nn.Module, config: dict[str, Any], meta: train_gpt.AttnMeta
) -> tuple[Tensor, float, dict[str, Tensor], dict[str, Tensor]]:
    """Output, loss, gradients and the inputs of tapped matrices of a mixer on the golden input."""
    shape, sites = (config["B"], config["T"], config["dim"]), {}
    x = rules.fill("hash", f"x.{config['key']}", shape, 1.0).requires_grad_()

    def tap(name: str, inside: Tensor, y: Tensor) -> Tensor:
        sites[name] = inside
        return y

    tap.sites = frozenset(train_gpt.ROLES)  # it hears every matrix
    y = net(x, meta, tap, train_gpt.ValueContext(None, None))
    loss = (y * rules.fill("hash", f"w.{config['key']}", shape, 1.0)).sum()
    loss.backward()
    prefix, letters = config["weight_name_prefix"], "G" if isinstance(net, train_gpt.DeltaNet) else "AAAA"
    names = {gdn_rules.published_name(prefix + n, letters)[len(prefix) :]: p for n, p in net.named_parameters()}
    return y, loss.item(), {"x": x.grad} | {n: p.grad for n, p in names.items()}, sites


MIXER_ENTRIES = rules.entries("gdn_mixer", "gdn") + rules.entries("gdn_mixer_reset", "gdn")


@pytest.mark.parametrize("golden", MIXER_ENTRIES, ids=lambda e: e.name)
def test_delta_net_gives_the_published_numbers(golden: rules.Entry) -> None:
    c, expected = golden.config, golden.expected
    net, firsts = delta_net(c), c.get("reset_starts", [0])
    starts = torch.zeros(c["B"], c["T"], dtype=torch.bool)
    starts[:, [t for t in firsts if t]] = True
    meta = train_gpt.AttnMeta(None, 0, torch.empty(0), torch.empty(0), None, starts)
    y, loss, gradients, sites = run_mixer(net, c, meta)
    assert set(sites) == {"qkv", "delta_z", "o", "attn"} and sites["qkv"].shape == sites["attn"].shape
    q, k, v, g, beta, _, state = net.rule.args
    for first, stop, checks in zip(firsts, [*firsts[1:], c["T"]], expected["final_states"], strict=True):
        cut = (x[:, first:stop] for x in (q, k, v, g, beta, starts))
        rules.assert_checks(train_gpt.delta_rule(*cut, state)[1], checks)
    found = {"q_after_conv_elu_repeat": q, "k_after_conv_elu_repeat": k, "v_after_conv_silu": v, "log_decay_g": g}
    found |= {"beta": beta, "delta_rule_output": net.rule.result[0], "final_state": net.rule.result[1], "output": y}
    found |= {"output_first4_pos0": y[0, 0], "output_first4_last": y[-1, -1], "loss": loss}
    found["mean_decay_factor"] = g.exp().mean()
    wanted = expected | {"final_state": expected["final_states"][-1]}
    rules.compare(found, wanted, skip=("final_states", "grad", "output_l2_difference_to_no_reset"))
    rules.compare(gradients, expected["grad"], 1e-7)
    if len(firsts) > 1:
        joined = run_mixer(net, c, meta._replace(starts=torch.zeros_like(starts)))[0]
        wanted = {"l2": expected["output_l2_difference_to_no_reset"]}
        rules.assert_checks(y - joined, wanted, 1e-7)


def test_column_1_of_the_taps_is_the_token_itself() -> None:
    net = delta_net(MIXER_ENTRIES[0].config)
    starts = torch.zeros(1, 6, dtype=torch.bool)
    starts[0, 4] = True
    meta = train_gpt.AttnMeta(None, 0, torch.empty(0), torch.empty(0), None, starts)
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        net(x, meta, train_gpt.LayerTap(None), train_gpt.ValueContext(None, None))
        kernel = net.taps.unsqueeze(1)  # (channels, 1, 2), as torch's convolution has it, the last column the newest
        parts = (F.pad(net.qkv(x[:, s]).mT, (1, 0)) for s in (slice(0, 4), slice(4, 6)))
        wanted = torch.cat([F.conv1d(part, kernel, groups=len(kernel)) for part in parts], dim=2).mT
    torch.testing.assert_close(net.rule.args[2], F.silu(wanted[..., 32:]).unflatten(-1, (4, 8)), rtol=0, atol=1e-12)


def test_initial_values() -> None:
    cfg = train_gpt.Config(**PUBLISHED)
    narrow = dataclasses.replace(cfg, model_dim=64, gdn_head_dim=8)  # the same heads
    nets = [train_gpt.DeltaNet(c, 0, train_gpt.masked_attention, train_gpt.PLAIN) for c in (narrow, cfg)]
    seen = []
    for seed in range(40):
        net = nets[seed == 39]
        train_gpt.init_weights(net, cfg, torch.Generator().manual_seed(seed))
        seen.append(torch.stack([net.A_log.exp(), F.softplus(net.dt_bias)]).detach())
    A, dt = torch.stack(seen).unbind(1)
    assert 1 <= A.min() < 1.2 and 6.5 < A.max() <= 8.001 and A.log().mean().item() == pytest.approx(1.04, abs=0.15)
    assert 9.9e-4 <= dt.min() < 1.3e-3 and 0.07 < dt.max() <= 0.1001
    assert dt.log().mean().item() == pytest.approx(math.log(0.01), abs=0.4)
    for weight, bound in ((net.taps, 0.5**0.5), (net.ba.weight, 512**-0.5)):
        assert 0.98 * bound < weight.abs().max() <= bound and abs(weight.mean()) < 0.1 * bound
    assert not net.o.weight.any() and net.taps.shape == (512, 2) and net.ba.weight.shape == (8, 512)
    torch.testing.assert_close(net.qkv.weight @ net.qkv.weight.T, torch.eye(512), rtol=0, atol=1e-4)
    torch.testing.assert_close(net.z.weight @ net.z.weight.T, torch.eye(256), rtol=0, atol=1e-4)


# The sink


@rules.parametrize("sink_attention", "gdn")
def test_sink_attention_gives_the_published_numbers(golden: rules.Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    c, expected = golden.config, golden.expected
    heads = {"num_heads": c["query_heads"], "num_kv_heads": c["kv_heads"], "vocab_size": 8, "num_loops": 0}
    heads |= {"rope_base": c["rope_base"], "rope_dims": c["rope_dims"] or c["dim"] // c["query_heads"]}
    heads |= {"rope_reference_len": c["rope_reference_length"], "attn_extras": ("xsa", "sink")[not c["xsa"] :]}
    for dtype in ("float32", "bf16_as_published"):
        made = {"rope_dtype": dtype[:4] if dtype != "float32" else "fp32"} | heads
        model = train_gpt.GPT(train_gpt.Config(model_dim=c["dim"], num_layers=4, **made))
        y, *_ = run_mixer(mixer(c, 3, "AAAA", heads), c, model.plan(c["T"], rules.CPU))
        rules.assert_checks(y, {"l2": expected[f"output_l2_with_rope_{dtype}"]}, 1e-7)
    monkeypatch.setattr(train_gpt, "rotary_tables", exact_tables)
    net = mixer(c, 3, "AAAA", heads)
    net.attend = Spy(net.attend)
    model = train_gpt.GPT(train_gpt.Config(model_dim=c["dim"], num_layers=4, **heads))
    y, loss, gradients, sites = run_mixer(net, c, model.plan(c["T"], rules.CPU))
    found = {"attention_before_xsa": net.attend.result, "attention_before_projection": sites["o"], "output": y}
    found |= {"output_first4_pos1": y[0, 1], "output_first4_last": y[-1, -1], "loss": loss}
    found |= {"grad_k_sink_first8": gradients["k_sink"], "grad_q_gain": gradients["q_gain"]}
    ropes = ("output_l2_with_rope_float32", "output_l2_with_rope_bf16_as_published")
    rules.compare(found, expected, skip=("grad", "sink_probability", *ropes))
    rules.compare(gradients, expected["grad"], 1e-7)
    sunk = 1 - gated_attention(*net.attend.args[:3], net.sink)[0]
    shares = {"mean": sunk.mean(), "per_head_mean_batch0": sunk[0].mean(0), "pos0_batch0": sunk[0, 0]}
    shares["last_pos_batch0"] = sunk[0, -1]
    rules.compare(shares, expected["sink_probability"])


def heads(length: int, rows: int = 1, seed: int = 3) -> list[Tensor]:
    """Float64 q (4 heads), k, v (2 heads) and a sink."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, length, n, 8) for n in (4, 2, 2)] + [(2, 8)]
    return [torch.randn(*shape, generator=generator).double().requires_grad_() for shape in shapes]


def assert_sunk(attend: train_gpt.Attend, meta: train_gpt.AttnMeta, bounds: list[int], rows: int) -> None:
    """A backend's values and gradients are those of each segment's gated attention."""
    leaves = heads(bounds[-1] // rows, rows)
    q, k, v, sink = leaves
    got = attend(q, k, v, meta, sink).flatten(0, 1)
    spans = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
    flat = [x.flatten(0, 1)[None] for x in (q, k, v)]
    wanted = torch.cat([gated_attention(*(x[:, span] for x in flat), sink)[1][0] for span in spans])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    weight = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got).sin()
    pairs = (torch.autograd.grad((y * weight).sum(), leaves, retain_graph=True) for y in (got, wanted))
    for x, y in zip(*pairs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11)


def imitated_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
) -> Tensor:
    """Flash attention over segments as documented: query i of m sees the keys up to i + n - m of its segment's n."""
    assert options["window_size"] == (-1, 0)
    out, groups = [], q.size(1) // k.size(1)
    for a, b, c, d in zip(*(x.tolist() for x in (cu_q, cu_q[1:], cu_k, cu_k[1:])), strict=False):
        assert b - a <= max_q and d - c <= max_k
        queries, keys, values = q[a:b], *(x[c:d].repeat_interleave(groups, dim=1) for x in (k, v))
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - b + a)
        logits = torch.einsum("thd,shd->hts", queries, keys) * q.size(-1) ** -0.5
        weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
        out.append(torch.einsum("hts,shd->thd", weights, values))
    return torch.cat(out)


def test_a_sink_is_a_key_before_each_segment_of_flash_attention() -> None:
    """Also in rows without segments. (The masked twin: tests/test_model.py)"""
    for gqa, bounds in itertools.product((False, True), (None, [0, 3, 4, 9, 16, 24, 24, 24])):
        grouped = {"enable_gqa": True} if gqa else {}
        attend = functools.partial(train_gpt.flash_attention, varlen_attn=imitated_varlen, grouped=grouped)
        cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
        meta = train_gpt.AttnMeta(cu_seqlens, 8, torch.empty(0), torch.empty(0), None)
        assert_sunk(attend, meta, bounds or [0, 12, 24], 2 if bounds is None else 1)


# The model


def test_bf16_rotary_tables_of_the_published_program() -> None:
    golden = GOLDEN["rope_table"]
    published = functools.partial(train_gpt.rotary_tables, dtype=torch.bfloat16)
    c, tables = golden["config"], {"published_bf16": published, "exact_float64": exact_tables}
    for name, make in tables.items():
        expected = golden["expected"][name]
        for part, table in zip(("cos", "sin"), make(c["T"], c["rope_dims"], c["rope_base"], rules.CPU), strict=True):
            assert table[c["positions"]].tolist() == [pytest.approx(row, rel=1e-9, abs=1e-9) for row in expected[part]]
            rules.assert_checks(table, expected[f"{part}_checks"])
    assert published(8, 4, 1e4, rules.CPU)[0].dtype == torch.float32


def test_documents_are_scored_as_if_alone() -> None:
    """Plain rows of delta nets alone, since attention runs through; packed, all mixers, and positions restart."""
    bounds, ids = [0, 31, 32, 77, 140], sample(1, 140, [0, 31, 32, 77])
    cu_seqlens = torch.tensor([*bounds, 140, 140], dtype=torch.int32)
    for packed, knobs in ((False, {"mixers": "G*5"}), (True, {})):
        model, through = (stack_model("delta", **knobs, gdn_bos_reset=reset) for reset in (True, False))
        together, crossing = (
            net(ids, meta=net.plan(140, rules.CPU, cu_seqlens, 140) if packed else None) for net in (model, through)
        )
        for first, stop in itertools.pairwise(bounds):
            torch.testing.assert_close(together[:, first:stop], model(ids[:, first:stop]), rtol=0, atol=2e-5)
        # segments always bound the state, BOS when asked
        assert torch.allclose(crossing, together, atol=2e-5) is packed
    # and so does the cut of a long document
    model, ids = stack_model("delta", mixers="G*5"), sample(1, 96, [0])
    cuts = torch.from_numpy(train_gpt.pad_bounds(train_gpt.segment_bounds(np.zeros(1, int), 96, 32)))
    got = model(ids, meta=model.plan(96, rules.CPU, cuts, 32))
    torch.testing.assert_close(got, model(ids.view(3, 32)).view(1, 96, 97), rtol=0, atol=2e-5)


def test_parallel_layers_on_one_stream_are_those_from_the_first_on() -> None:
    for looping in (False, True):
        route = train_gpt.plan_route(DELTA, looping)
        assert route.parallel_block == tuple(layer >= 3 for layer in route.layers) and not any(route.parallel)
        assert "beside" in str(route)
    lanes = train_gpt.plan_route(dataclasses.replace(DELTA, parallel_lanes=2), False)
    assert any(lanes.parallel) and not any(lanes.parallel_block)
    none = dataclasses.replace(DELTA, parallel_start_layer=0)
    assert not any(train_gpt.plan_route(none, True).parallel_block)
    published = train_gpt.plan_route(train_gpt.Config(**PUBLISHED), True)
    assert published.parallel_block == (False,) * 14 + (True,) * 3 and published.num_encoder == 8
    assert [stack_model("delta", parallel_lanes=n).lanes is None for n in (1, 2)] == [True, False]


# Knobs


def test_mixers_are_written_out_and_fit_the_layers() -> None:
    spelt = {"": "A" * 5, "G A*3 G": "GAAAG", "A*5": "A" * 5, " GGAAA": "GGAAA", "G*2A*3": "GGAAA", "G*5": "G" * 5}
    for text, letters in spelt.items():
        cfg = dataclasses.replace(DELTA, mixers=text)
        assert train_gpt.mixer_letters(cfg) == letters and not cfg.problems(), text
        kinds = [type(block.attn) for block in train_gpt.GPT(cfg).blocks]
        assert kinds == [train_gpt.MIXERS[letter] for letter in letters], text
    for text in ("G*2 A*2", "G*2 A*4", "G,A*4", "GAAA?", "G*-1 A*6", "attention", "G*0", "g a*4"):
        (line,) = dataclasses.replace(DELTA, mixers=text).problems()
        assert line.startswith(f"MIXERS={text!r} ") and "NUM_LAYERS=5" in line, text
    for layers in ((1, 3), (0, 1), (-1,), (5,)):  # value embeddings need attention
        problems = dataclasses.replace(DELTA, attn_extras=("value_embed",), ve_layers=layers).problems()
        assert not problems if layers == (1, 3) else "VE_LAYERS" in problems[0], layers
