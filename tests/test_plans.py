"""Which bits a tensor gets, the search for a clip, value rotation, and what the delta hybrid's record stores."""

from __future__ import annotations

from typing import Any

import gdn_rules
import golden_rules as rules
import pytest
import torch
from conftest import RECORDS
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import Config, UserError


def test_the_first_override_that_fits_counts_and_keeps_scheme_and_clip() -> None:
    overrides = ("attn.o:7", "blocks.1.*: 5", "mlp.down:8")
    cfg = Config(mixers="G*2 A*9", attn_extras=("sink",), matrix_bits_overrides=overrides)
    plan = train_gpt.quant_plan(cfg)
    for case in """1.attn.o.weight=7 1.attn.z.weight=5 1.attn.qkv.weight=5 1.mlp.down.weight=5 2.mlp.down.weight=8
    2.attn.q.weight=6 1.attn.ba.weight=16 1.attn.taps=16 2.attn.sink=16 1.attn.A_log=16 1.attn.dt_bias=16""".split():
        name, _, bits = case.partition("=")
        assert plan[f"blocks.{name}"].bits == int(bits), case
    assert plan["blocks.2.mlp.down.weight"].clip == cfg.mlp_clip_sigmas
    assert plan["blocks.1.attn.qkv.weight"].clip == cfg.attn_clip_sigmas


def test_wrong_knobs_are_sentences_before_the_training_and_missing_counts_after() -> None:
    cases = """MATRIX_BITS_OVERRIDES=attn.o:9 -> must be name:bits with 2 to 8 bits
    MATRIX_BITS_OVERRIDES=attn.out:7 -> MATRIX_BITS_OVERRIDES=attn.out is in no name of a matrix
    EMBED_TOPK=0 -> EMBED_TOPK=0 must be >= 1"""
    for text, message in (case.split(" -> ") for case in cases.splitlines()):
        with pytest.raises(UserError, match=message):
            train_gpt.explain(train_gpt.load_config(rules.knobs(text)), {})
    cfg, table = Config(embed_quant="gptq_freqsplit"), {"tok_emb.weight": torch.eye(4)}
    with pytest.raises(UserError, match=r"gptq_freqsplit has no token counts; run STAGES=train"):
        train_gpt.quantize(cfg, rules.runtime(), table, table)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from((4, 6, 8)), st.sampled_from((0.0, 0.3)), st.floats(0.01, 40.0))
def test_clip_search_by_row_is_never_worse_than_one_for_all(seed: int, bits: int, floor: float, size: float) -> None:
    weight = size * torch.randn(6, 200, generator=torch.Generator().manual_seed(seed)) ** 3
    errors = []
    for by_row in (True, False):
        scale = train_gpt.searched_scales(weight, bits, floor, by_row)
        assert (scale.float() * (2 ** (bits - 1) - 1) >= floor * 0.999).all()
        errors.append((weight - train_gpt.fake_quantize(weight, scale.float(), bits)).square().sum(dim=1))
    assert (errors[0] <= errors[1]).all()
    loosest = train_gpt.storable(train_gpt.quantile_scale(weight, bits, 1.0, floor)).float()
    assert (errors[0] <= (weight - train_gpt.fake_quantize(weight, loosest, bits)).square().sum(dim=1)).all()


STRUCTURES: dict[str, dict[str, Any]] = {
    "record": {},
    "value_residual": {"attn_extras": ("xsa", "sink", "value_residual"), "attn_gate": "sparse"},
    "no_xsa": {"attn_extras": ("sink",), "attn_gate": "dense_bias"},
    "attention_alone": {"attn_extras": ("xsa",), "mixers": "", "num_kv_heads": 4, "attn_gate": "sparse"},
    "one_kv_head": {"num_kv_heads": 1, "xsa_last_n": 2, "num_heads": 2},
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_rotation_changes_no_output(structure: str) -> None:
    """And it turns the Hessians of what reads the rotated values."""
    c = rules.entries("hadamard_rotation", "gdn")[0].config
    cfg = gdn_rules.model_config(c, rotate="hadamard_vo", **STRUCTURES[structure])
    assert not cfg.problems()
    for loop_on in (False, True):
        model, generator = train_gpt.GPT(cfg, dtype=torch.float64).double(), torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in model.init_weights(1).parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        model.set_looping(loop_on)
        ids = torch.randint(0, c["V"], (2, 30), generator=generator)
        tap, again = train_gpt.HessianTap(), train_gpt.HessianTap()
        logits = model(ids, taps=tap)
        hessians = tap.hessians(model, 1, rules.runtime())
        state, turned = train_gpt.reparametrize(cfg, rules.runtime(), model.state_dict(), hessians)
        model.load_state_dict(state)
        torch.testing.assert_close(model(ids, taps=again), logits, rtol=0, atol=1e-11)
        collected = again.hessians(model, 1, rules.runtime())
        assert collected.keys() == turned.keys()
        for name, H in collected.items():
            torch.testing.assert_close(turned[name], H, rtol=1e-4, atol=1e-4 * float(H.abs().max()), msg=name)


def test_the_record_has_the_published_parts() -> None:
    """35,896,408 parameters in groups of 1, 66 and 57 tensors, the taps in none; stored as there."""
    cfg = train_gpt.load_config({"PRESET": str(next(record for record in RECORDS if record.name.endswith("PR1895")))})
    with torch.device("meta"):
        model = train_gpt.GPT(cfg)
    sizes: dict[str, list[int]] = {}
    for (optimiser, lr, _), params in train_gpt.optimiser_groups(model).items():
        sizes.setdefault(f"{optimiser} {lr}", []).extend(p.numel() for p in params.values() if p.requires_grad)
    wanted = {"adamw tied_embed_lr": (1, 4_194_304), "muon matrix_lr": (66, 31_666_176)}
    wanted["adamw scalar_lr"] = (57, 32_856) if not cfg.gdn_conv_trained else (60, 35_928)
    assert {lr: (len(n), sum(n)) for lr, n in sizes.items()} == wanted
    assert ("of them not trained: 3 tensors, 3,072 weights" in train_gpt.explain(cfg, {})) is not cfg.gdn_conv_trained
    chosen = train_gpt.trainable(cfg, model)
    assert (len(chosen), sum(p.numel() for p in chosen.values())) == (33, 23_795_200)
    with torch.device("meta"):
        noisy = train_gpt.QuantNoise(cfg, model).params
    assert sorted(tuple(p.shape) for p in noisy) == [(256, 512)] * 8 + [(512, 512)] * 8
    stored = train_gpt.quant_plan(cfg)
    whole = [p for name, p in model.named_parameters() if stored[name].scheme == "fp16"]
    levels = [p for name, p in model.named_parameters() if stored[name].scheme != "fp16"]
    assert sum(p.numel() for p in levels) == 35_848_192 and sum(len(p) for p in levels) == 53_184
    assert sum(p.numel() for p in whole) == 48_216
    assert [stored[f"blocks.{i}.attn.o.weight"].bits for i in range(11)] == [6, 6, *[7] * 8, 6]
