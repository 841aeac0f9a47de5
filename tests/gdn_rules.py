"""The published hybrid of delta nets and attention (PR 1895) of the golden numbers, as this program builds it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import golden_rules as rules
import numpy as np
import torch
from ngram_rules import exact_tables as exact_tables
from torch import Tensor, nn

import train_gpt

GOLDEN = json.loads((Path(__file__).resolve().parent / "golden" / "gdn_model.json").read_text(encoding="utf-8"))
DELTA = {"qkv.weight": "qkv_proj.weight", "ba.weight": "ba_proj.weight", "z.weight": "z_proj.weight"}
DELTA |= {"o.weight": "o_proj.weight", "taps": "conv1d.weight"}  # our name in a delta net -> the published one
FILLS = (  # ends of published names -> class of amplitude, base (or what names it); the first that fits counts
    ("tok_emb.weight", "tok_emb", 0.0),
    ("attn_scale", "scale", 1.0),
    ("mlp_scale", "scale", 1.0),
    ("skip_weights", "scale", 1.0),
    ("q_gain", "scale", "qk_gain_init"),
    ("resid_mix", "scale", 0.0),
    ("skip_gates", "gate", 0.0),
    ("k_sink", "gate", 0.0),
    ("conv1d.weight", "conv", 0.0),
    ("A_log", "A_log", "A_log"),
    ("dt_bias", "dt_bias", "dt_bias"),
    ("weight", "matrix", 0.0),
)


def published_name(name: str, letters: str) -> str:
    """The published name of one of our tensors; letters: the layers' mixers."""
    block = re.fullmatch(r"blocks\.(\d+)\.attn\.(.+)", name)
    if block and letters[int(block[1])] == "G":
        return f"blocks.{block[1]}.attn.{DELTA.get(block[2], block[2])}"
    return rules.canonical(name).replace("attn.sink", "attn.k_sink")


def chirp(name: str, shape: tuple[int, ...], amp: float, base: float) -> Tensor:
    count = np.arange(math.prod(shape), dtype=np.float64)
    shift = sum((k + 1) * ord(c) for k, c in enumerate(name)) % 997
    return torch.from_numpy(base + amp * np.sin(0.7390851 * count + 0.000061803 * count**2 + shift)).reshape(shape)


def published_value(config: dict[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    kind, base = next((kind, base) for ending, kind, base in FILLS if name.endswith(ending))
    base = base if isinstance(base, float) else (config["bases"] if base in config.get("bases", {}) else config)[base]
    amp = config["amps"][kind]
    amp = (2 / shape[1]) ** 0.5 if amp == "sqrt(2/in)" else amp
    if config["fill"] == "chirp":
        value = chirp(name, shape, amp, base)
    else:
        value = rules.fill(config["fill"], name, shape, amp, base)
    return value + torch.tensor([[1.0], [0.0]]) if name.endswith("resid_mix") else value


def fill_module(config: dict[str, Any], module: nn.Module, prefix: str, letters: str) -> nn.Module:
    """The module with the golden values, float64; prefix: what comes before its parameters' names in a model."""
    module = module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            published = published_name(prefix + name, letters)
            parameter.copy_(published_value(config, published, tuple(parameter.shape)))
    return module


def model_config(config: dict[str, Any], **knobs: Any) -> train_gpt.Config:
    """The Config of a golden entry's model."""
    first, last, layers = config["full_attention_start"], config["full_attention_end"], config["L"]
    head, qk, v = config["gdn"]
    same = "mlp_mult num_loops loop_start loop_end rope_dims rope_base xsa_last_n skip_gates_enabled logit_softcap"
    return train_gpt.Config(
        **{
            "vocab_size": config["V"],
            "model_dim": config["D"],
            "num_heads": config["H"],
            "num_kv_heads": config["K"],
            "num_layers": layers,
            "mixers": f"G*{first} A*{last - first + 1} G*{layers - 1 - last}",
            "parallel_start_layer": max(config["parallel_residual_start"], 0),
            "parallel_lanes": 1,
            "rope_reference_len": config["train_seq_len"],
            "attn_extras": ("xsa", "sink"),
            "gdn_head_dim": head,
            "gdn_qk_heads": qk,
            "gdn_v_heads": v,
            "gdn_bos_reset": False,
            "ln_scale": config["ln_scale"],
        }
        | {name: config[name] for name in same.split()}
        | knobs
    )


def build(config: dict[str, Any], **knobs: Any) -> train_gpt.GPT:
    """The filled float64 model of a golden entry."""
    cfg = model_config(config, **knobs)
    return fill_module(config, train_gpt.GPT(cfg, dtype=torch.float64), "", train_gpt.mixer_letters(cfg))


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
