"""Row steps in log2 units, the entropy coder of its own, and its container."""

from __future__ import annotations

from pathlib import Path

import golden_rules as rules
import pytest
import torch
from conftest import TINY

import train_gpt
from train_gpt import UserError, load_config

# Row steps in log2 units


@pytest.mark.parametrize("step", [0.005, 0.02, 1.0])
def test_log_scales_are_within_half_a_step_and_stay_where_they_are(step: float) -> None:
    steps = torch.cat([torch.zeros(1), torch.logspace(-7, 4, 999)])
    parts = train_gpt.stored_scales(steps, step)
    values = train_gpt.scale_values(parts)
    assert parts["s"].dtype == torch.int16 and values.dtype == torch.float32
    assert ((values / steps.clamp_min(2.0**-24)).log2().abs() <= step / 2 + 1e-5).all()
    assert torch.equal(train_gpt.log_scales(values, step), parts["s"])


def test_scale_step_0_stores_float16_as_published() -> None:
    steps = torch.rand(50) * 1e-6
    parts = train_gpt.stored_scales(steps, 0.0)
    assert parts.keys() == {"s"} and torch.equal(parts["s"], train_gpt.storable(steps))
    assert torch.equal(train_gpt.scale_values(parts), train_gpt.storable(steps).float())


@pytest.mark.parametrize("scheme", ["rowwise", "gptq", "gptq_lite", "row_quantile"])
def test_quantisers_divide_by_the_step_that_is_stored(scheme: str, tmp_path: Path) -> None:
    cfg = load_config({**TINY, "MATRIX_QUANT": scheme, "EMBED_QUANT": "rowwise", "SCALE_STEP": "0.25"})
    rule = train_gpt.QuantRule("*", scheme, 6, 4.0)
    W = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 24)[:, None]
    parts = train_gpt.SCHEMES[scheme].encode(W, torch.eye(32), rule, cfg)
    steps = train_gpt.scale_values(parts)
    assert parts["s"].dtype == torch.int16 and torch.equal(steps, torch.exp2(0.25 * parts["s"]))
    assert torch.equal(parts["q"].float(), train_gpt.round_to_grid(W, steps[:, None], 6))  # identity H: no feedback
    train_gpt.save_artifact(tmp_path / "m.bin", {f"x:{scheme}": parts}, "lzma")
    assert torch.equal(train_gpt.load_artifact(tmp_path / "m.bin")["x"], parts["q"] * steps[:, None])


def test_awq_columns_and_qat_share_the_stored_step() -> None:
    cfg = load_config({**TINY, "AWQ_LITE_ENABLED": "1", "AWQ_LITE_GROUP_SIZE": "8", "SCALE_STEP": "0.5"})
    W, rule = rules.fill("hash", "awq", (12, 16), 1.0), train_gpt.QuantRule("*", "awq_lite", 6, 12.0, (8,))
    parts = train_gpt.SCHEMES["awq_lite"].encode(W, torch.eye(16), rule, cfg)
    coarse, fine = train_gpt.scale_values(parts), train_gpt.scale_values(parts, "hs")
    assert (fine < coarse).all() and parts["hs"].dtype == torch.int16
    error = (train_gpt.SCHEMES["awq_lite"].decode(parts) - W).abs()
    assert (error[:, :8] <= 0.51 * coarse[:, None]).all() and (error[:, 8:] <= 0.51 * fine[:, None]).all()
    assert torch.equal(train_gpt.SCHEMES["gptq"].steps(W, rule, cfg), coarse)


def test_too_fine_a_scale_step_is_refused() -> None:
    with pytest.raises(UserError, match="SCALE_STEP=0.001 is too fine for 16 bits; say 0"):
        load_config({**TINY, "SCALE_STEP": "0.001"})
