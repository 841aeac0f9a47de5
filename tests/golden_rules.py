"""The rules by which golden/caseops_stack.json was made: fills, tokens, tensor checks, and the canonical tensor names.

A number there comes from the published record scripts, run in float64 on weights and tokens that these formulas give.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import train_gpt

CPU = torch.device("cpu")
REL = 1e-8  # of the float64 entries
CANONICAL = (  # our name (regular expression) -> the published one
    (r"blocks\.(\d+)\.attn\.([qkv])\.weight", r"blocks.\1.attn.c_\2.weight"),
    (r"blocks\.(\d+)\.attn\.o\.weight", r"blocks.\1.attn.proj.weight"),
    (r"blocks\.(\d+)\.mlp\.up\.weight", r"blocks.\1.mlp.fc.weight"),
    (r"blocks\.(\d+)\.mlp\.down\.weight", r"blocks.\1.mlp.proj.weight"),
    (r"blocks\.(\d+)\.attn\.gate\.weight", r"blocks.\1.attn.attn_gate_w"),
    (r"skips\.weights", "skip_weights"),
    (r"skips\.gates", "skip_gates"),
    (r"lanes\.post", "parallel_post_lambdas"),
    (r"lanes\.resid", "parallel_resid_lambdas"),
    (r"embed_extras\.smear\.weight", "smear_gate.weight"),
    (r"embed_extras\.smear\.scale", "smear_lambda"),
)
CLASSES = (  # last parts of canonical names -> class of amplitude, base
    (("c_q.weight", "c_k.weight", "c_v.weight", "proj.weight", "fc.weight"), "matrix", 0.0),
    (("tok_emb.weight",), "tok_emb", 0.0),
    (("attn_scale", "mlp_scale", "skip_weights"), "scale", 1.0),
    (("attn_gate_w", "skip_gates", "smear_gate.weight", "smear_lambda"), "gate", 0.0),
    (("parallel_post_lambdas",), "gate", 1.0),
    (("parallel_resid_lambdas",), "gate", 1.1),
)


class Entry(NamedTuple):
    """One golden entry: settings and the numbers they give."""

    name: str
    config: dict[str, Any]
    expected: Any


@functools.cache
def read_golden() -> dict[str, Any]:
    path = Path(__file__).resolve().parent / "golden" / "caseops_stack.json"
    return json.loads(path.read_text(encoding="utf-8"))


def entries(kind: str) -> list[Entry]:
    """Entries of a kind; those about a model list only what differs from the common base."""
    golden = read_golden()
    base = golden["base"] if kind in ("forward", "lora_forward", "ttt", "hessians") else {}
    return [Entry(e["name"], base | e["config"], e["expected"]) for e in golden["entries"] if e["kind"] == kind]


def entry(name: str) -> Entry:
    """The entry of a name."""
    return next(e for e in entries(name.split("/")[0]) if e.name == name)


def parametrize(kind: str) -> pytest.MarkDecorator:
    """One test per entry of a kind, as the argument `golden`."""
    found = entries(kind)
    return pytest.mark.parametrize("golden", found, ids=[e.name.partition("/")[2] for e in found])


def name_number(name: str) -> int:
    return sum((k + 1) * ord(c) for k, c in enumerate(name)) % 9973


def fill(kind: str, name: str, shape: tuple[int, ...], amp: float, base: float = 0.0) -> Tensor:
    """The float64 tensor that a fill kind (sine, hash) gives a name."""
    count = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
    return torch.from_numpy(base + amp * FILLS[kind](count, name_number(name))).reshape(shape)


def sine(count: np.ndarray, number: int) -> np.ndarray:
    return np.sin(0.7390851 * count.astype(np.float64) + 0.0061803 * number)


def scramble(count: np.ndarray, number: int) -> np.ndarray:
    """Uniform in (-1, 1) by an integer hash of element and name."""
    low = np.uint64(2**32 - 1)
    x = (count * np.uint64(2654435761) + np.uint64(number * 2246822507)) & low
    x ^= x >> np.uint64(16)
    x = (x * np.uint64(2146121005)) & low
    x ^= x >> np.uint64(15)
    x = (x * np.uint64(2221713035)) & low
    x ^= x >> np.uint64(16)
    return 2 * (x.astype(np.float64) + 0.5) / 2**32 - 1


FILLS = {"sine": sine, "hash": scramble}


def tokens(vocab: int, count: int, bos: list[int]) -> np.ndarray:
    """The token rule, int64, with document starts (id 1) at the given positions."""
    t = np.arange(count)
    ids = 8 + (7 * t * t + 13 * t + 5) % (vocab - 8)
    ids[bos] = train_gpt.BOS_ID
    return ids


def checks(tensor: Tensor) -> dict[str, float]:
    """sum, l2 and wsum (weighted by position) of a tensor, in float64."""
    v = tensor.detach().double().flatten()
    weight = torch.sin(0.6180339887 * torch.arange(1, v.numel() + 1, dtype=torch.float64))
    return {"sum": v.sum().item(), "l2": v.norm().item(), "wsum": (v * weight).sum().item()}


def assert_checks(tensor: Tensor, expected: dict[str, float], rel: float = REL) -> None:
    """Compare the checks that are given; sums, whose terms cancel, relative to the norm."""
    found = checks(tensor)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=rel, abs=rel * found["l2"]), key


def canonical(name: str) -> str:
    """The published name of one of our tensors."""
    for pattern, published in CANONICAL:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, published, name)
    return name


def published_value(config: dict[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    """What a canonical tensor is filled with."""
    amps, kind = config["amps"], config["fill"]
    if name.endswith("resid_mix"):
        return fill(kind, name, shape, amps["scale"]) + torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    if name.endswith("q_gain"):
        return fill(kind, name, shape, amps["scale"], config["qk_gain_init"])
    amplitude, base = next((a, b) for endings, a, b in CLASSES if name.endswith(endings))
    return fill(kind, name, shape, amps[amplitude], base)


def model_config(config: dict[str, Any], **knobs: Any) -> train_gpt.Config:
    """The Config of an entry's model settings."""
    return train_gpt.Config(
        **{
            "vocab_size": config["V"],
            "model_dim": config["D"],
            "num_heads": config["H"],
            "num_kv_heads": config["K"],
            "num_layers": config["L"],
            "mlp_mult": config["mlp_mult"],
            "rope_dims": config["rope_dims"],
            "rope_base": config["rope_base"],
            "num_loops": config["num_loops"],
            "loop_start": config["loop_start"],
            "loop_end": config["loop_end"],
            "parallel_start_layer": config["parallel_start_layer"],
            "parallel_final_lane": config["final_lane"],
            "gate_window": config["gate_window"],
            "xsa_last_n": config["xsa_last_n"],
            "skip_gates_enabled": config["skip_gates"],
            "embed_extras": ("smear",) if config["smear"] else (),
            "smear_bos_mask": config["bos_mask"],
            "attn_gate": "sparse" if config["sparse_gate"] else "none",
            "sparse_attn_gate_scale": config["sparse_gate_scale"],
            "logit_softcap": config["softcap"],
            "qk_gain_init": config["qk_gain_init"],
            "ln_scale": config["ln_scale"],
        }
        | knobs
    )


def build(config: dict[str, Any], dtype: torch.dtype = torch.float64, **knobs: Any) -> train_gpt.GPT:
    """The filled model of an entry, parameters and activations in dtype, on its route."""
    model = train_gpt.GPT(model_config(config, **knobs), dtype=dtype).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(published_value(config, canonical(name), tuple(parameter.shape)))
    model.set_looping(config["loop_on"])
    return model


def rows_of(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """ids and targets (rows, T) of an entry."""
    width = config["T"] + 1
    stream = torch.from_numpy(tokens(config["V"], config["rows"] * width, config["bos"])).view(-1, width)
    return stream[:, :-1].contiguous(), stream[:, 1:].contiguous()


def runtime(dtype: torch.dtype = torch.float32, compile: bool = False) -> train_gpt.Runtime:
    """One silent process on the CPU."""
    return train_gpt.Runtime(0, 1, CPU, train_gpt.Log(None, True), dtype, compile)
