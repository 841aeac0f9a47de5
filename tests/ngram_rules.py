"""The published n-gram models of the golden numbers, as this program builds them, filled by the golden rule.

Names and values follow the published parameters, whose list golden/ngram.json's parameter counts and gradients check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import golden_rules as rules
import numpy as np
import torch
from golden_rules import exact_tables as exact_tables
from torch import Tensor

import train_gpt

GOLDEN = rules.read_golden("ngram")
PUBLISHED = (  # our name (regular expression) -> the published one, before those of golden_rules.CANONICAL
    (r"embed_extras\.(bigram|trigram)\.table\.weight", r"\1.embed.weight"),
    (r"embed_extras\.(bigram|trigram)\.(proj\.weight|scale)", r"\1.\2"),
    (r"embed_extras\.smear_channel\.gate", "smear.gate"),
    (r"value_embed\.table\.weight", "ve_shared.embed.weight"),
    (r"value_embed\.(proj\.weight|scale)", r"ve_shared.\1"),
    (r"value_embed\.layer_scales", "ve_layer_scales"),
    (r"blocks\.(\d+)\.attn\.gate\.(weight|bias)", r"blocks.\1.attn.attn_gate.\2"),
    (r"blocks\.(\d+)\.attn\.values\.lambdas", r"blocks.\1.attn.vr_lambda"),
    *rules.CANONICAL,
)
VALUES: rules.Values = (  # ends of published names -> amplitude, base; the first that fits counts
    (("gram.scale",), 0.1, 0.05),
    (("ve_shared.scale",), 0.1, 0.1),
    (("q_gain",), 0.1, 1.5),
    (("skip_weights", "attn_scale", "mlp_scale"), 0.1, 1.0),
    (("vr_lambda",), 0.3, 0.5),
    (("attn_gate.bias",), 0.3, 4.0),
    (("attn_gate.weight", "smear.gate", "resid_mix"), 0.3, 0.0),
    (("tok_emb.weight", "embed.weight"), 0.1, 0.0),
    (("weight",), 0.05, 0.0),
)


def published_name(name: str) -> str:
    return rules.canonical(name, PUBLISHED)


def by_published_name(cfg: train_gpt.Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model by their published names; there the layers' scales are a tensor each."""
    found = {published_name(name): tensor for name, tensor in tensors.items()}
    scales = found.pop("ve_layer_scales", None)
    return found | {f"ve_layer_scales.{i}": scale for i, scale in enumerate([] if scales is None else scales)}


def published_value(config: dict[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    for ending, value in config.get("overrides", {}).items():
        if name.endswith(ending):
            return torch.tensor(value, dtype=torch.float64).view(-1, *(1,) * (len(shape) - 1)).expand(shape)
    if name == "ve_layer_scales":
        return torch.cat([rules.fill("sine", f"{name}.{i}", (1,), 0.1, 1.0) for i in range(shape[0])])
    return rules.published_value(config, name, shape, VALUES)


def model_config(config: dict[str, Any], **knobs: Any) -> train_gpt.Config:
    """The Config of a golden entry's model."""
    c, fixed = config, dict.fromkeys(("skip_gates_enabled", "smear_bos_mask", "hash_bos_mask"), False)
    fixed |= {"num_loops": 0, "parallel_start_layer": 0, "rope_reference_len": 1024}
    fixed |= {name: c[name] or 2 for name in ("bigram_vocab_size", "trigram_vocab_size")}
    same = "vocab_size num_layers model_dim num_heads num_kv_heads mlp_mult logit_softcap rope_base qk_gain_init"
    same += " bigram_dim trigram_dim ve_dim xsa_last_n ln_scale"
    extras = {"bigram": c["bigram_vocab_size"], "trigram": c["trigram_vocab_size"], "smear_channel": True}
    values = {"xsa": True, "value_residual": c["value_residual"], "value_embed": c["ve_enabled"]}
    return train_gpt.Config(
        embed_extras=tuple(name for name, on in extras.items() if on),
        attn_extras=tuple(name for name, on in values.items() if on),
        attn_gate="dense_bias" if c["gated_attention"] else "none",
        ve_layers=tuple(int(layer) for layer in c["ve_layers"].split(",") if layer),
        rope_dims=c["rope_dims"] or c["model_dim"] // c["num_heads"],
        **fixed | rules.renamed(c, same) | knobs,
    )


def build(config: dict[str, Any], **knobs: Any) -> train_gpt.GPT:
    """The filled float64 model of a golden entry."""
    model = train_gpt.GPT(model_config(config, **knobs), dtype=torch.float64).double()
    return rules.filled(model, lambda name, shape: published_value(config, published_name(name), shape))


def adapted_model(config: dict[str, Any]) -> train_gpt.GPT:
    """The model of a chunk SGD or SLOT entry."""
    small = {"num_layers": 3, "bigram_vocab_size": 61, "bigram_dim": 16, "trigram_dim": 24, "xsa_last_n": 2}
    small |= {"rope_dims": 8, "ln_scale": True, "ve_enabled": True, "ve_dim": 16, "ve_layers": "1,2", "overrides": {}}
    return build(GOLDEN["base"] | small | rules.renamed(config, "trigram_vocab_size value_residual"))


def stream(num_targets: int) -> train_gpt.ValData:
    """The golden stream, and its rule of bytes."""
    ids = rules.tokens(GOLDEN["base"]["vocab_size"], num_targets + 1, [])
    counted = 1 + ids % 5 + ((ids % 3 == 0) & np.append(False, ids[:-1] % 7 != 0))
    return train_gpt.ValData(ids, counted.astype(np.int32))


def published_rows(num_targets: int, length: int, stride: int) -> np.ndarray:
    """Windows as published: at every start that leaves `stride` targets, each but the first scores its last `stride`,
    though the window before may have reached the end already."""
    sizes = ((start, min(length, num_targets - start)) for start in range(0, num_targets, stride))
    return np.array([(s, n, n - stride if s else 0, n) for s, n in sizes if s == 0 or n >= stride])
