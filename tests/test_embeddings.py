"""The parts of the n-gram stack: hash embeddings, channel smear, value embeddings and residual, biased head gates."""

from __future__ import annotations

import copy
import functools
from typing import Any

import golden_rules as rules
import torch
from conftest import listener
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import train_gpt

EVERYTHING = """
VOCAB_SIZE=97 NUM_LAYERS=5 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=2 ROPE_DIMS=4 ROPE_REFERENCE_LEN=16
NUM_LOOPS=1 LOOP_START=0 LOOP_END=1 PARALLEL_START_LAYER=3 ATTN_GATE=dense_bias GATE_WINDOW=8 XSA_LAST_N=3
ATTN_EXTRAS=xsa,value_residual,value_embed VE_LAYERS=0,1,4 VE_DIM=12 EMBED_EXTRAS=bigram,trigram,smear,smear_channel
BIGRAM_VOCAB_SIZE=61 BIGRAM_DIM=12 TRIGRAM_VOCAB_SIZE=47 TRIGRAM_DIM=20
"""  # every part of the stack beside loops and two lanes
TABLES = {"tok_emb", "embed_extras.bigram.table", "embed_extras.trigram.table", "value_embed.table"}


def everything(seed: int = 5, looping: bool = True, **changed: Any) -> train_gpt.GPT:
    """A float32 model with every part, none of its tensors zero."""
    model = train_gpt.GPT(rules.toy_config(EVERYTHING, **changed)).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.set_looping(looping)
    return model


def sample(rows: int, length: int, bos: list[int]) -> Tensor:
    return torch.from_numpy(rules.tokens(97, rows * length, bos)).view(rows, length)


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
    model, ids = everything(num_loops=0), sample(1, 40, [0, 11, 12, 29])
    together = model.embed(ids)
    for start, stop in ((0, 11), (11, 12), (12, 29), (29, 40)):
        assert ids[0, start] == train_gpt.BOS_ID, "or smear_channel would blend a row's first token with zeros"
        torch.testing.assert_close(together[:, start:stop], model.embed(ids[:, start:stop]))
    crossing = everything(num_loops=0, hash_bos_mask=False, smear_bos_mask=False)
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
        model, ids = everything(looping=looping, embed_extras=(), ve_layers=(0,)), sample(2, 12, [0])
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


def test_fresh_adapters_change_no_bit_and_reach_the_first_values() -> None:
    model, ids = everything(ttt_lora_rank=2), sample(2, 12, [0])
    lora = train_gpt.Adapters(model.cfg, rules.runtime(), model, 2)
    lora.renew(0, 0)
    lora.renew(1, 1)
    before = model(ids)
    assert torch.equal(model(ids, None, None, lora), before)
    with torch.no_grad():
        lora.B["v_0"].fill_(0.1)
    assert not torch.allclose(model(ids, None, None, lora), before)


def test_the_whole_model_compiles_into_one_graph() -> None:
    """Every part, in two layers, of which the first is looped and the second in two lanes; with gradients."""
    torch._dynamo.reset()
    knobs = {"num_layers": 2, "loop_end": 0, "parallel_start_layer": 1, "ve_layers": (0, 1), "xsa_last_n": 1}
    model, ids, gradients = everything(**knobs), sample(2, 25, [0, 31]), []
    for forward in (model, torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")):
        model.zero_grad()
        loss = forward(ids[:, :-1], ids[:, 1:])
        loss.backward()
        gradients.append([loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


# How they are trained and stored


def test_every_parameter_has_a_role_that_says_how_it_is_trained_and_stored() -> None:
    model = everything()
    roles = {name: train_gpt.ROLES[p.role] for name, p in model.named_parameters()}
    assert sorted(roles) == sorted(model.state_dict()) == sorted(train_gpt.quant_plan(model.cfg))
    assert {n.removesuffix(".weight") for n, role in roles.items() if role.lr == "tied_embed_lr"} == TABLES
    assert {role.optimiser for n, role in roles.items() if "attn.v.weight" in n} == {"muon"}
    names = """embed_extras.bigram.proj.weight value_embed.proj.weight value_embed.layer_scales
    embed_extras.smear_channel.gate blocks.1.attn.values.lambdas blocks.1.attn.gate.bias"""
    for name in names.split():
        assert (roles[name].optimiser, roles[name].lr, roles[name].wd) == ("adamw", "scalar_lr", "adam_wd"), name


def test_the_published_trigram_is_not_trained() -> None:
    for trained in (False, True):
        knobs = {"trigram_trained": trained, "scalar_lr": 0.1, "adam_wd": 0.1, "embed_wd": 0.1}
        model, ids = everything(**knobs), sample(2, 25, [0])
        before = copy.deepcopy(model.state_dict())
        optimisers = train_gpt.Optimisers(model.cfg, model, rules.runtime())
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimisers.step(1.0, 0)
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        trigram = {name for name in before if "trigram" in name}
        assert len(trigram) == 3 and moved == (set(before) if trained else set(before) - trigram)
        assert ("of them not trained: 3 tensors" in train_gpt.explain(model.cfg, {})) is not trained


def test_tables_are_stored_in_bf16_when_asked() -> None:
    model = train_gpt.GPT(rules.toy_config(EVERYTHING, embed_dtype="bf16")).init_weights(1)
    assert {name.removesuffix(".weight") for name, p in model.named_parameters() if p.dtype == torch.bfloat16} == TABLES
    assert torch.isfinite(model(sample(1, 9, [0]))).all()
    wide = train_gpt.GPT(rules.toy_config(EVERYTHING)).init_weights(1).state_dict()
    assert all(torch.equal(p, wide[name].to(p.dtype)) for name, p in model.named_parameters())
