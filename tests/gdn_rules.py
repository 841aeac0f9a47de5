"""The published hybrid of delta nets and attention (PR 1895) of the golden numbers, as this program builds it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import golden_rules as rules
import torch
from golden_rules import exact_tables as exact_tables
from torch import Tensor, nn

import train_gpt

GOLDEN = rules.read_golden("gdn_model")
DELTA = {"qkv.weight": "qkv_proj.weight", "ba.weight": "ba_proj.weight", "z.weight": "z_proj.weight"}
DELTA |= {"o.weight": "o_proj.weight", "taps": "conv1d.weight"}  # our name in a delta net -> the published one
VALUES: rules.Values = (
    (("k_sink",), "gate", 0.0),
    (("conv1d.weight",), "conv", 0.0),
    (("A_log",), "A_log", "A_log"),
    (("dt_bias",), "dt_bias", "dt_bias"),
    *rules.VALUES,
)


def published_name(name: str, letters: str) -> str:
    """The published name of one of our tensors; letters: the layers' mixers."""
    block = re.fullmatch(r"blocks\.(\d+)\.attn\.(.+)", name)
    if block and letters[int(block[1])] == "G":
        return f"blocks.{block[1]}.attn.{DELTA.get(block[2], block[2])}"
    return rules.canonical(name).replace("attn.sink", "attn.k_sink")


def by_published_name(cfg: train_gpt.Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model by their published names."""
    return {published_name(name, train_gpt.mixer_letters(cfg)): tensor for name, tensor in tensors.items()}


def fill_module(config: dict[str, Any], module: nn.Module, prefix: str, letters: str) -> nn.Module:
    """The module with the golden values, float64; prefix: what comes before its parameters' names in a model."""

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        return rules.published_value(config, published_name(prefix + name, letters), shape, VALUES)

    return rules.filled(module.double(), value)


def model_config(config: dict[str, Any], **knobs: Any) -> train_gpt.Config:
    """The Config of a golden entry's model."""
    first, last, layers = config["full_attention_start"], config["full_attention_end"], config["L"]
    names = "mlp_mult num_loops loop_start loop_end rope_dims rope_base xsa_last_n skip_gates_enabled logit_softcap"
    names += f" {rules.SIZES} rope_reference_len=train_seq_len ln_scale"
    delta = dict(zip(("gdn_head_dim", "gdn_qk_heads", "gdn_v_heads"), config["gdn"], strict=True))
    delta |= {"mixers": f"G*{first} A*{last - first + 1} G*{layers - 1 - last}", "gdn_bos_reset": False}
    lanes = {"parallel_start_layer": max(config["parallel_residual_start"], 0), "parallel_lanes": 1}
    return train_gpt.Config(**{"attn_extras": ("xsa", "sink")} | rules.renamed(config, names) | delta | lanes | knobs)


def build(config: dict[str, Any], **knobs: Any) -> train_gpt.GPT:
    """The filled float64 model of a golden entry, on its route."""
    cfg = model_config(config, **knobs)
    model = fill_module(config, train_gpt.GPT(cfg, dtype=torch.float64), "", train_gpt.mixer_letters(cfg))
    model.set_looping(config["loop_on"])
    return model


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, starts: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The gated delta rule from its definition, token by token: forget, predict, correct, read."""
    outputs = []
    for q_t, k_t, v_t, g_t, b_t, first in zip(*(x.unbind(1) for x in (q, k, v, g, beta, starts)), strict=True):
        state = torch.where(first[:, None, None, None], 0.0, state * g_t[..., None, None].exp())
        missed = v_t - torch.einsum("bhkv,bhk->bhv", state, k_t)
        state = state + k_t[..., None] * (b_t[..., None] * missed)[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q_t) * q.size(-1) ** -0.5)
    return torch.stack(outputs, dim=1), state


def gated_attention(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Share (B, T, H) of a query's weight that its keys get, sigmoid(logsumexp - sink logit), and causal attention
    without a sink times that share."""
    groups, scale = q.size(2) // k.size(2), q.size(-1) ** -0.5
    keys, values = (x.repeat_interleave(groups, dim=-2) for x in (k, v))
    logits = torch.einsum("bthd,bshd->btsh", q, keys) * scale
    later = torch.ones(q.size(1), q.size(1), dtype=torch.bool).triu(1)
    logits = logits.masked_fill(later[None, :, :, None], -math.inf)
    share = torch.ones_like(q[..., 0])
    if sink is not None:
        share = torch.sigmoid(logits.logsumexp(2) - (q * sink.repeat_interleave(groups, dim=-2)).sum(-1) * scale)
    return share, share[..., None] * torch.einsum("btsh,bshd->bthd", logits.softmax(2), values)
