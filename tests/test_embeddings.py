"""The parts of the n-gram stack: hash embeddings, channel smear, value embeddings and residual, biased head gates."""

from __future__ import annotations

import functools

import golden_rules as rules
import torch
from conftest import listener
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from ttt_rules import STACKS, sample, stack_model

import train_gpt

TABLES = {"tok_emb", "embed_extras.bigram.table", "embed_extras.trigram.table", "value_embed.table"}


# Rotary tables


def test_the_longest_segment_and_not_the_pack_stretches_the_rotary_base() -> None:
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.Config(rope_reference_len=1024, num_layers=1, num_loops=0))
    wanted = train_gpt.rotary_tables(4096, 16, 22_081.79027, rules.CPU)
    cu_seqlens = torch.from_numpy(train_gpt.pad_bounds(train_gpt.segment_bounds(torch.arange(0).numpy(), 4096, 2048)))
    packed = model.plan(4096, rules.CPU, cu_seqlens, 2048)
    torch.testing.assert_close((packed.cos, packed.sin), wanted, rtol=0, atol=2e-4)
    short = model.plan(100, rules.CPU, None, 2048)  # a short row of a model of long contexts
    torch.testing.assert_close(short.cos, wanted[0][:100], rtol=0, atol=2e-4)
    plain = model.plan(100, rules.CPU)
    assert torch.equal(plain.cos, train_gpt.rotary_tables(100, 16, 10_000.0, rules.CPU)[0])


# Hashes


def wrapped(x: int) -> int:
    """A signed 32-bit number, as a machine keeps it."""
    return (x + 2**31) % 2**32 - 2**31


def slow_bucket(ids: list[int], t: int, rows: int, order: int, masked: bool) -> int:
    """The row of token t, from the definition: int32 products, XOR, floor modulo."""
    first = max([i for i in range(t + 1) if masked and ids[i] == train_gpt.BOS_ID], default=0)
    if t == first:
        return rows - 1
    key = 0
    for back, multiplier in zip(range(order), (36313, 27191, 51497), strict=False):
        if t - back >= first:
            key ^= wrapped(multiplier * ids[t - back])
    return key % (rows - 1)


IDS = st.lists(st.one_of(st.integers(0, 65535), st.sampled_from([1, 1, 65535])), min_size=1, max_size=24)


@settings(max_examples=40)
@given(ids=IDS, rows=st.sampled_from([2, 3, 47, 1024, 65536]), masked=st.booleans())
@example(ids=[50000, 65535, 60000, 65535, 1, 42000, 41701, 41702, 0, 65000], rows=2048, masked=True)
def test_buckets_are_those_of_the_definition(ids: list[int], rows: int, masked: bool) -> None:
    for order in (2, 3):
        expected = [slow_bucket(ids, t, rows, order, masked) for t in range(len(ids))]
        table = train_gpt.HashEmbedding(train_gpt.Config(hash_bos_mask=masked), order, rows, 4)
        assert table.buckets(torch.tensor([ids])).tolist() == [expected]


def test_a_masked_document_hashes_and_smears_as_if_alone() -> None:
    model, ids = stack_model("n-gram", num_loops=0), sample(1, 40, [0, 11, 12, 29])
    together = model.embed(ids)
    for start, stop in ((0, 11), (11, 12), (12, 29), (29, 40)):
        assert ids[0, start] == train_gpt.BOS_ID, "or smear_channel would blend a row's first token with zeros"
        torch.testing.assert_close(together[:, start:stop], model.embed(ids[:, start:stop]))
    crossing = stack_model("n-gram", num_loops=0, hash_bos_mask=False, smear_bos_mask=False)
    assert not torch.allclose(crossing.embed(ids)[:, 11], crossing.embed(ids[:, 11:12])[:, 0])


# The parts


def test_initial_values() -> None:
    knobs = "VOCAB_SIZE=1024 MODEL_DIM=128 EMBED_EXTRAS=bigram,trigram,smear_channel BIGRAM_DIM=96 TRIGRAM_DIM=96"
    knobs += " VE_DIM=48 ATTN_EXTRAS=value_residual,value_embed ATTN_GATE=dense_bias"
    model = train_gpt.GPT(rules.toy_config(knobs)).init_weights(3)
    state = model.state_dict()
    for gram in ("bigram", "trigram"):
        proj = state[f"embed_extras.{gram}.proj.weight"]
        torch.testing.assert_close(proj.T @ proj, torch.eye(proj.size(1)), rtol=0, atol=1e-5)
        assert not state[f"embed_extras.{gram}.table.weight"].any() and state[f"embed_extras.{gram}.scale"] == 0.05
    proj = state["value_embed.proj.weight"]
    torch.testing.assert_close(proj.T @ proj, torch.eye(48), rtol=0, atol=1e-5)
    assert abs(state["value_embed.table.weight"].std() - 0.01) < 1e-4 and state["value_embed.scale"] == 0.1
    assert torch.equal(state["value_embed.layer_scales"], torch.ones(2))
    assert torch.equal(state["blocks.7.attn.values.lambdas"], torch.full((2,), 0.5))
    n = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.blocks[0].attn.gate(n), torch.full((2, 3, 8, 1), 4.0).sigmoid())
    x = torch.randn(1, 4, 128, generator=torch.Generator().manual_seed(2))
    blended = model.embed_extras["smear_channel"](torch.tensor([[5, 6, 1, 7]]), x)
    expected = 0.5 * x + 0.5 * torch.cat([torch.zeros(1, 1, 128), x[:, :-1]], dim=1)
    expected[:, 2] = x[:, 2]
    torch.testing.assert_close(blended, expected)


def test_value_residual_takes_the_first_values_and_the_first_execution_mixes_nothing() -> None:
    """With factors 1 and 0 only the first execution's values count: not those of a looped layer 0, nor of two lanes."""
    for looping in (False, True):
        model, ids = stack_model("n-gram", looping=looping, embed_extras=(), ve_layers=(0,)), sample(2, 12, [0])
        model.eval()
        with torch.no_grad():
            for block in model.blocks:
                block.attn.values.lambdas.copy_(torch.tensor([1.0, 0.0]))
        before = model(ids)

        def replace(site: train_gpt.Site, x: Tensor, y: Tensor, executions: range) -> Tensor:
            return y.flip(-1) + 1 if site.execution in executions else y

        later = range(1, len(model.route.layers))
        assert (model.route.layers.count(0) == 2) == looping
        first, rest = (listener(functools.partial(replace, executions=e), "v") for e in (range(1), later))
        assert torch.equal(model(ids, taps=rest), before)
        assert not torch.allclose(model(ids, taps=first), before)
        with torch.no_grad():
            model.value_embed.scale.zero_()  # it was added to the first execution's values before they were kept
        assert not torch.allclose(model(ids), before)


# How they are trained and stored


def test_every_parameter_has_a_role_that_says_how_it_is_trained_and_stored() -> None:
    model = stack_model("n-gram")
    roles = {name: train_gpt.ROLES[p.role] for name, p in model.named_parameters()}
    assert sorted(roles) == sorted(model.state_dict()) == sorted(train_gpt.quant_plan(model.cfg))
    assert {n.removesuffix(".weight") for n, role in roles.items() if role.lr == "tied_embed_lr"} == TABLES
    assert {role.optimiser for n, role in roles.items() if "attn.v.weight" in n} == {"muon"}
    names = """embed_extras.bigram.proj.weight value_embed.proj.weight value_embed.layer_scales
    embed_extras.smear_channel.gate blocks.1.attn.values.lambdas blocks.1.attn.gate.bias"""
    for name in names.split():
        assert (roles[name].optimiser, roles[name].lr, roles[name].wd) == ("adamw", "scalar_lr", "adam_wd"), name


def test_tables_are_stored_in_bf16_when_asked() -> None:
    model = train_gpt.GPT(rules.toy_config(STACKS["n-gram"], embed_dtype="bf16")).init_weights(1)
    assert {name.removesuffix(".weight") for name, p in model.named_parameters() if p.dtype == torch.bfloat16} == TABLES
    assert torch.isfinite(model(sample(1, 9, [0]))).all()
    wide = train_gpt.GPT(rules.toy_config(STACKS["n-gram"])).init_weights(1).state_dict()
    assert all(torch.equal(p, wide[name].to(p.dtype)) for name, p in model.named_parameters())
