"""The model: one forward against the published numbers, attention over segments, routes, taps, compilation."""

from __future__ import annotations

import dataclasses
import functools
import math
from itertools import pairwise

import golden_rules as rules
import numpy as np
import pytest
import torch
import ttt_rules
from conftest import listener
from gdn_rules import gated_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train_gpt

SMALL = rules.entry("forward/hash_bosmask").config


def plan_of(model: train_gpt.GPT, bounds: np.ndarray | None, length: int, max_len: int = 0) -> train_gpt.AttnMeta:
    """The meta of one row."""
    cu_seqlens = None if bounds is None else torch.from_numpy(train_gpt.pad_bounds(bounds))
    return model.plan(length, rules.CPU, cu_seqlens, max_len)


# Routes


def test_layer_order() -> None:
    for case in rules.entries("layer_order")[0].expected:
        cfg = train_gpt.Config(**{key: case[key] for key in ("num_layers", "num_loops", "loop_start", "loop_end")})
        for looping, suffix in ((False, "plain"), (True, "looping")):
            route = train_gpt.plan_route(cfg, looping)
            assert list(route.layers[: route.num_encoder]) == case[f"encoder_{suffix}"], case
            assert list(route.layers[route.num_encoder :]) == case[f"decoder_{suffix}"], case
        assert train_gpt.plan_route(cfg, True).num_encoder == case["num_skip_rows"], case


def test_segment_bounds() -> None:
    for case in rules.entries("cu_seqlens")[0].expected:
        bounds = train_gpt.segment_bounds(np.array(case["bos"], np.int64), case["total"], case["cap"])
        padded = train_gpt.pad_bounds(bounds)
        assert bounds.tolist() == case["cu"], case
        assert len(padded) == case["padded_entries"] and (padded[len(bounds) :] == case["total"]).all(), case
        assert np.diff(bounds).max() == case["max_segment"], case


def test_skips_pair_last_encoder_output_first() -> None:
    route = train_gpt.plan_route(train_gpt.Config(), True)
    pairs = [(route.layers[i], route.layers[source]) for i, source in enumerate(route.skip_source) if source >= 0]
    assert pairs == [(5, 4), (3, 3), (4, 5), (5, 4), (6, 3), (7, 2), (8, 1), (9, 0)]
    assert route.skip_source == (-1,) * 8 + (*range(7, -1, -1), -1)
    assert route.parallel == (False,) * 14 + (True,) * 3
    assert "14<-1 15<-0" in str(route) and str(route).endswith("two lanes from execution 14")


# At initialisation


def test_blocks_begin_as_the_identity() -> None:
    model = train_gpt.GPT(rules.model_config(SMALL, vocab_size=512, tied_embed_init_std=0.005)).init_weights(3)
    ids = torch.from_numpy(rules.tokens(512, 2 * 257, [0])).view(2, -1)
    hidden = train_gpt.rms_norm(train_gpt.rms_norm(model.tok_emb.weight[ids[:, :-1]]))
    for looping in (False, True):
        model.set_looping(looping)
        torch.testing.assert_close(model.trunk(ids[:, :-1]), hidden, rtol=1e-5, atol=1e-5)
        assert abs(model(ids[:, :-1], ids[:, 1:]).item() - math.log(512)) < 0.02, looping


def test_initial_weights_follow_the_seed() -> None:
    cfg = rules.model_config(SMALL)
    first, again, other = (train_gpt.GPT(cfg).init_weights(seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["tok_emb.weight"], other["tok_emb.weight"])
    q = first["blocks.0.attn.q.weight"]
    torch.testing.assert_close(q @ q.T, torch.eye(len(q)), rtol=0, atol=1e-5)
    assert not first["blocks.0.attn.o.weight"].any() and not first["blocks.0.mlp.down.weight"].any()


# Attention


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=6),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 1)]),
    band=st.sampled_from([None, 0, 4, 8]),
    rows=st.sampled_from([1, 2]),
    sunk=st.booleans(),
)
def test_masked_attention_is_attention_of_each_segment_alone(
    lengths: list[int], heads: tuple[int, int], band: int | None, rows: int, sunk: bool
) -> None:
    """Without a band: rows without segments."""
    total = -(-sum(lengths) // 16) * 16
    starts = [*(np.cumsum([0, *lengths]) if band is not None else []), *range(0, total, total // rows)]
    bounds = train_gpt.segment_bounds(np.array(starts), total, band or 0)
    generator = torch.Generator().manual_seed(total + sum(lengths) * heads[0])
    q, k, v = (torch.randn(1, total, n, 8, generator=generator).double() for n in (heads[0], *heads[1:] * 2))
    sink = torch.randn(heads[1], 8, generator=generator).double() if sunk else None
    cu_seqlens = None if band is None else torch.from_numpy(train_gpt.pad_bounds(bounds))
    mask = None if band is None else train_gpt.segment_mask(cu_seqlens, total, band or total)
    meta = train_gpt.AttnMeta(cu_seqlens, band or 0, torch.empty(0), torch.empty(0), mask)
    got = train_gpt.masked_attention(*(t.view(rows, total // rows, *t.shape[2:]) for t in (q, k, v)), meta, sink)
    spans = [slice(*span) for span in pairwise(bounds.tolist())]
    expected = [gated_attention(*(t[:, span] for t in (q, k, v)), sink)[1] for span in spans]
    torch.testing.assert_close(got.reshape(q.shape), torch.cat(expected, dim=1), rtol=1e-12, atol=1e-12)


# Parts


def test_rotation_pairs_the_halves_and_depends_on_distance_alone() -> None:
    halves = train_gpt.rotate(torch.tensor([[[[1.0, 2.0, 7.0]]]]), torch.tensor([[0.6]]), torch.tensor([[0.8]]))
    torch.testing.assert_close(halves, torch.tensor([[[[0.6 + 1.6, 1.2 - 0.8, 7.0]]]]))
    cos, sin = (t.double() for t in train_gpt.rotary_tables(40, 6, 10_000.0, rules.CPU))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, generator=generator, dtype=torch.float64).expand(1, 40, 1, 8) for _ in range(2))
    turned_q, turned_k = (train_gpt.rotate(t, cos, sin)[0, :, 0] for t in (q, k))
    scores = turned_q @ turned_k.T
    for distance in (0, 3, 20):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(scores[3, 0], scores[20, 0], atol=1e-3)
    torch.testing.assert_close(turned_q.norm(dim=1), q[0, :, 0].norm(dim=1), rtol=1e-6, atol=0)
    assert torch.equal(turned_q[:, 6:], q[0, :, 0, 6:]) and torch.equal(turned_q[0], q[0, 0, 0])


def test_xsa_leaves_nothing_along_the_own_value() -> None:
    generator = torch.Generator().manual_seed(1)
    y, v = (torch.randn(2, 5, heads, 8, generator=generator, dtype=torch.float64) for heads in (6, 2))
    remove = functools.partial(train_gpt.remove_self_value, gate=torch.ones(2, 5, 6, 1, dtype=torch.float64))
    out = remove(y, v)
    assert (out.unflatten(2, (2, 3)) * v.unsqueeze(3)).sum(-1).abs().max() < 1e-13
    torch.testing.assert_close(remove(out, v), out)
    assert torch.equal(remove(y, torch.zeros_like(v)), y)
    removed = (y - out).unflatten(2, (2, 3))
    along = torch.nn.functional.cosine_similarity(removed, v.unsqueeze(3).expand_as(removed), dim=-1)
    torch.testing.assert_close(along.abs(), torch.ones_like(along))


def test_sparse_gate_reads_its_window_and_begins_half_open() -> None:
    cfg = rules.model_config(SMALL, sparse_attn_gate_scale=0.5)
    gate = train_gpt.GATES["sparse"](cfg)
    train_gpt.init_weights(gate, cfg, torch.Generator().manual_seed(0))
    n = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(gate(n), torch.full((1, 3, 4, 1), 0.5))
    with torch.no_grad():
        gate.weight.fill_(1.0)
    beyond = n.clone()
    beyond[..., SMALL["gate_window"] :] += 1
    assert torch.equal(gate(n), gate(beyond))
    expected = torch.sigmoid(0.5 * n[..., : SMALL["gate_window"]].sum(-1))
    torch.testing.assert_close(gate(n)[..., 0], expected[..., None].expand(1, 3, 4))


def test_dense_gate_reads_the_whole_input() -> None:
    generator, cfg = torch.Generator().manual_seed(0), rules.model_config(SMALL, attn_gate="dense_bias")
    n, dense = torch.randn(2, 3, 32, generator=generator), train_gpt.GATES["dense_bias"](cfg)
    train_gpt.init_weights(dense, cfg, generator)
    torch.nn.init.normal_(dense.weight, generator=generator)
    torch.testing.assert_close(dense(n)[..., 0], torch.sigmoid(n @ dense.weight.T + 4))
    model = train_gpt.GPT(cfg).init_weights(0)
    assert {p.numel() for k, p in model.named_parameters() if k.endswith("gate.weight")} == {4 * 32}
    assert torch.isfinite(model(torch.arange(9)[None]).sum())


def test_smear_stops_at_a_document_when_masked() -> None:
    for masked in (False, True):
        cfg = rules.model_config(SMALL, smear_bos_mask=masked)
        smear = train_gpt.Smear(cfg)
        train_gpt.init_weights(smear, cfg, torch.Generator())
        ids, e = torch.tensor([[5, 6, 1, 7]]), torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))
        assert torch.equal(smear(ids, e), e)
        with torch.no_grad():
            smear.scale.fill_(2.0)  # with a zero weight the gate is 2 * sigmoid(0) = 1
        expected = e + torch.cat([torch.zeros(1, 1, 32), e[:, :-1]], dim=1)
        expected[:, 2] = e[:, 2] if masked else expected[:, 2]
        torch.testing.assert_close(smear(ids, e), expected)


def test_norms_are_computed_wide() -> None:
    x = torch.full((1, 512), 300.0, dtype=torch.float16)  # the squares overflow half precision
    assert torch.equal(train_gpt.rms_norm(x), torch.ones(1, 512, dtype=torch.float16))
    assert train_gpt.rms_norm(x.double()).dtype == torch.float64


# Taps


def test_a_listener_that_passes_changes_no_bit() -> None:
    model, (ids, targets) = rules.build(SMALL, torch.float32).eval(), rules.rows_of(SMALL)
    heard: list[train_gpt.Site] = []

    def listen(site: train_gpt.Site, x: Tensor, y: Tensor) -> Tensor:
        heard.append(site)
        return y

    names = ("q", "k", "v", "o", "attn", "up", "down", "mlp", "head")
    expected = [train_gpt.Site(name, *where) for where in enumerate(model.route.layers) for name in names[:-1]]
    expected.append(train_gpt.Site("head", -1, -1))
    plain = model(ids)
    for sites in ("q", "o mlp", "up", "down attn head", " ".join(names)):
        heard.clear()
        assert torch.equal(model(ids, taps=listener(listen, sites)), plain), sites
        assert heard == [site for site in expected if site.name in sites.split()], sites
    for taps in (listener(listen), train_gpt.HessianTap()):
        assert torch.equal(model(ids, targets, None, taps, "none"), model(ids, targets, None, None, "none"))


def test_every_site_counts() -> None:
    model, (ids, _) = rules.build(SMALL), rules.rows_of(SMALL)
    plain = model(ids)
    for name in ("q", "k", "v", "o", "attn", "up", "down", "mlp", "head"):
        # a random direction: q and k are normalised, and XSA removes what lies along v
        def nudge(site: train_gpt.Site, x: Tensor, y: Tensor) -> Tensor:
            noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(site.execution + 2), dtype=y.dtype)
            return y + 0.1 * noise

        assert (model(ids, None, None, listener(nudge, name)) - plain).abs().max() > 1e-4, name


def test_training_scales_the_last_matrix_in_place_of_its_output() -> None:
    """The same product, in another order, with the same gradients; scores keep the published order."""
    model, (ids, targets) = rules.build(SMALL, torch.float64), rules.rows_of(SMALL)
    for name, p in model.named_parameters():
        if name.endswith(("attn_scale", "mlp_scale")):
            p.data.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
    seen, linear, results = [], train_gpt.Linear.scaled, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Linear, "scaled", lambda self, *a: seen.append(a[0] is not None) or linear(self, *a))
        for training, folded in ((True, 2 * len(model.route.layers)), (False, 0)):
            seen.clear()
            loss = model.train(training)(ids, targets)
            assert sum(seen) == folded, training
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-13)
    names = ["loss", *(name for name, _ in model.named_parameters())]
    assert all(g.abs().min() > 0 for name, g in zip(names, results[0], strict=True) if "_scale" in name)


def test_scores_come_from_wide_logits_unless_asked_otherwise() -> None:
    """Activations in bf16: logits with an adapter's part, and losses, have no rounding to bf16 but in training."""
    HALF, WIDE = torch.bfloat16, torch.float32
    cfg, ids = ttt_rules.structure_config("one lane, no loops, no extras"), torch.arange(60).view(2, 30) % 97
    whole: list[Tensor] = []
    for word, dtype in (("fp32", WIDE), ("bf16", HALF)):
        own = dataclasses.replace(cfg, score_dtype=word, ttt_lora_sites=("head",))
        model = ttt_rules.strong_model(own)
        model.dtype = HALF
        lora = train_gpt.Adapters(own, rules.runtime(HALF), model, 2)
        torch.nn.init.normal_(lora.B["head_0"].data, std=0.01)
        h = model.trunk(ids)
        assert h.dtype == HALF and model.logits(h, lora).dtype == HALF
        z = model.eval().logits(h, lora)
        low = lora.scale * (h @ lora.A["head_0"])
        exact = h.double() @ model.tok_emb.weight.double().T + low.double() @ lora.B["head_0"].double()
        assert z.dtype == dtype
        error = ((z - exact).abs().max() / exact.abs().max()).item()
        assert error < 1e-6 if dtype == WIDE else 1e-3 < error < 0.05, (word, error)
        # where nothing is narrower, the knob changes no bit
        whole.append(ttt_rules.strong_model(own).eval()(ids, ids, reduction="none"))
    assert torch.equal(*whole)
