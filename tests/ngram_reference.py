"""The n-gram model as published, by its description, in float64: what golden/chunk_sgd.json was made with.

It has nothing in common with the program's model but the head, which it inherits: a golden number that comes out
here is one of the evaluator, whatever the program's own model computes.
"""

from __future__ import annotations

import json
from pathlib import Path

import golden_rules as rules
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt

GOLDEN = json.loads((Path(__file__).parent / "golden" / "chunk_sgd.json").read_text(encoding="utf-8"))
LAYERS, HEADS, KV, VOCAB = 3, 4, 2, 96
ROPE_DIMS, ROPE_BASE, SOFTCAP, VE_LAYERS, XSA_LAYERS = 8, 10_000.0, 30.0, (1, 2), (1, 2)


def name_number(name: str) -> int:
    return sum((k + 1) * ord(c) for k, c in enumerate(name)) % 9973


def filled(name: str, shape: list[int], base: float | list[float], amp: float) -> Tensor:
    """base + amp * sin(...), one base for all or one per row."""
    n = np.arange(int(np.prod(shape)))
    wave = torch.from_numpy(amp * np.sin(0.7390851 * (n + 1) + 0.0061803 * name_number(name))).reshape(shape)
    return wave + torch.tensor(base, dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1) if shape else [])


def hashed(ids: Tensor, size: int, order: int) -> Tensor:
    """Buckets of bigrams (order 2) or trigrams (3) of rows of ids."""
    mixed = (36313 * ids[:, 1:]) ^ (27191 * ids[:, :-1])
    if order == 3:
        mixed[:, 1:] ^= 51497 * ids[:, :-2]
    return F.pad(mixed % (size - 1), (1, 0), value=size - 1)


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding of the first ROPE_DIMS dims of (B, T, heads, d), in float64."""
    half = ROPE_DIMS // 2
    angle = torch.arange(x.size(1)).double()[:, None] / ROPE_BASE ** (torch.arange(half).double() / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b, rest = x[..., :half], x[..., half:ROPE_DIMS], x[..., ROPE_DIMS:]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], -1)


class Published(train_gpt.GPT):
    """ids -> hidden states, as described; parameters by their published names."""

    def __init__(self, kind: str) -> None:
        nn.Module.__init__(self)
        self.softcap, self.cross_entropy = SOFTCAP, train_gpt.softcapped_cross_entropy
        self.rope, self.masked = (ROPE_DIMS, ROPE_BASE, 0), True
        self.tok_emb = train_gpt.Linear(48, VOCAB, "zero", torch.float64)
        for name, shape, base, amp in GOLDEN["tensors"][kind]:
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            setattr(module, leaf, nn.Parameter(filled(name, shape, base, amp)))

    def gram(self, name: str, ids: Tensor, order: int) -> Tensor:
        table = getattr(self, name)
        rows = F.embedding(hashed(ids, len(table.embed.weight), order), table.embed.weight)
        return table.scale * rows @ table.proj.weight.T

    def attention(self, layer: int, u: Tensor, ids: Tensor, first: list[Tensor]) -> Tensor:
        a, (B, T, D) = self.blocks.get_submodule(f"{layer}.attn"), u.shape
        v = u @ a.c_v.weight.T
        if layer in VE_LAYERS:
            shared, scale = self.ve_shared, getattr(self.ve_layer_scales, str(VE_LAYERS.index(layer)))
            v = v + scale * shared.scale * (F.embedding(ids, shared.embed.weight) @ shared.proj.weight.T)
        q, k, v = (t.view(B, T, -1, D // HEADS) for t in (u @ a.c_q.weight.T, u @ a.c_k.weight.T, v))
        if hasattr(a, "vr_lambda") and first:
            v = a.vr_lambda[0] * first[0] + a.vr_lambda[1] * v
        first.append(v)
        q = rotated(train_gpt.rms_norm(q)) * a.q_gain[:, None]
        k, wide_v = (t.repeat_interleave(HEADS // KV, 2) for t in (rotated(train_gpt.rms_norm(k)), v))
        heads = (t.transpose(1, 2) for t in (q, k, wide_v))
        y = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
        if layer in XSA_LAYERS:
            unit = F.normalize(wide_v, dim=-1)
            y = y - (y * unit).sum(-1, keepdim=True) * unit
        return y.reshape(B, T, D) @ a.proj.weight.T

    def trunk(self, ids: Tensor, seq: train_gpt.Seq | None = None, taps: train_gpt.Taps | None = None) -> Tensor:
        e = F.embedding(ids, self.tok_emb.weight) + self.gram("bigram", ids, 2)
        if hasattr(self, "trigram"):
            e = e + self.gram("trigram", ids, 3)
        e, gate = train_gpt.rms_norm(e), torch.sigmoid(self.smear.gate)
        x = x0 = (1 - gate) * e + gate * F.pad(e[:, :-1], (0, 0, 1, 0))
        values: list[Tensor] = []
        for layer in range(LAYERS):
            block, scale = self.blocks.get_submodule(str(layer)), (layer + 1) ** -0.5
            if layer == LAYERS // 2:
                x = x + self.skip_weights[0] * x
            x = block.resid_mix[0] * x + block.resid_mix[1] * x0
            x = x + block.attn_scale * self.attention(layer, scale * train_gpt.rms_norm(x), ids, values)
            h = F.leaky_relu(scale * train_gpt.rms_norm(x) @ block.mlp.fc.weight.T, 0.5).square()
            x = x + block.mlp_scale * (h @ block.mlp.proj.weight.T)
        return train_gpt.rms_norm(x)


def stream(num_targets: int) -> train_gpt.ValData:
    """The golden stream, and its rule of bytes."""
    ids = rules.tokens(VOCAB, num_targets + 1, [])
    counted = 1 + ids % 5 + ((ids % 3 == 0) & np.append(False, ids[:-1] % 7 != 0))
    return train_gpt.ValData(ids, counted.astype(np.int32))


def published_rows(num_targets: int, length: int, stride: int) -> np.ndarray:
    """Windows as published: at every start that leaves `stride` targets, each but the first scores its last `stride`,
    though the window before may have reached the end already."""
    rows = []
    for start in range(0, num_targets, stride):
        size = min(length, num_targets - start)
        if start == 0 or size >= stride:
            rows.append((start, size, 0 if start == 0 else max(size - stride, 0), size))
    return np.array(rows)
