"""The rules by which the files of golden/ were made: entries, fills, tokens, checks; and the CaseOps stack's models.

A number there comes from the published record scripts, run in float64 on weights and tokens that these formulas give.
ngram_rules and gdn_rules say the same of the models of the other two stacks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import train_gpt

CPU = torch.device("cpu")
REL = 1e-8  # of the float64 entries
FILES = {  # stack -> its files, each with the kinds whose settings only list what differs from the file's base
    "caseops": {"caseops_stack": ("forward", "lora_forward", "ttt", "hessians")},
    "ngram": {"ngram": ("forward",), "ngram_training": ()},
    "gdn": {"gdn_model": ("forward",), "gdn_training": ("ttt", "plain_eval")},
    "quant": {"quant": ()},
    "frontier": {"frontier": (), "frontier_training": ("ttt_sites", "loop_mix")},
}
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
Values = tuple[tuple[tuple[str, ...], str | float, str | float], ...]
VALUES: Values = (  # ends of published names -> amplitude (or its class), base (or its setting); the first that fits
    (("tok_emb.weight",), "tok_emb", 0.0),
    (("smear_gate.weight", "attn_gate_w", "skip_gates", "smear_lambda"), "gate", 0.0),
    (("weight",), "matrix", 0.0),
    (("resid_mix",), "scale", 0.0),
    (("q_gain",), "scale", "qk_gain_init"),
    (("attn_scale", "mlp_scale", "skip_weights"), "scale", 1.0),
    (("parallel_post_lambdas",), "gate", 1.0),
    (("parallel_resid_lambdas",), "gate", 1.1),
)


# Entries


class Entry(NamedTuple):
    """One golden entry: settings and the numbers they give."""

    name: str
    config: dict[str, Any]
    expected: Any
    stack: str = "caseops"


@functools.cache
def read_golden(name: str) -> dict[str, Any]:
    path = Path(__file__).resolve().parent / "golden" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def entries(kind: str, *stacks: str) -> list[Entry]:
    """Entries of a kind in some stacks, by default in CaseOps; their settings are complete."""
    found = []
    for stack in stacks or ("caseops",):
        for file, based in FILES[stack].items():
            golden = read_golden(file)
            all_kinds = golden.get("entries", [])
            listed = golden.get(kind, [e for e in all_kinds if kind == e.get("kind", e["name"].split("/")[0])])
            base = golden["base"] if kind in based else {}
            found += [Entry(e["name"], base | e["config"], e["expected"], stack) for e in listed]
    return found


def entry(name: str) -> Entry:
    """The CaseOps entry of a name."""
    return next(e for e in entries(name.split("/")[0]) if e.name == name)


def parametrize(kind: str, *stacks: str) -> pytest.MarkDecorator:
    """One test per entry of a kind, as the argument `golden`."""
    found = entries(kind, *stacks)
    ids = [e.name.removeprefix(f"{kind}/") for e in found]
    return pytest.mark.parametrize("golden", found, ids=[f"{e.stack}-{i}" for e, i in zip(found, ids, strict=True)])


@contextlib.contextmanager
def named(golden: Entry) -> Iterator[None]:
    """What fails within says which entry it was."""
    try:
        yield
    except Exception as error:
        error.add_note(f"golden entry: {golden.stack} {golden.name}")
        raise


def each(kind: str, *stacks: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of one entry, its argument `golden`, as one test of all entries of a kind."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(check)
        def test(**fixtures: Any) -> None:
            found = entries(kind, *stacks)
            assert {golden.stack for golden in found} == {*stacks}
            for golden in found:
                with named(golden):
                    check(golden, **fixtures)

        first, *others = inspect.signature(check).parameters.values()
        assert first.name == "golden"
        test.__signature__ = inspect.Signature(others)
        return test

    return decorate


# Fills and tokens


def name_number(name: str, modulus: int = 9973) -> int:
    return sum((k + 1) * ord(c) for k, c in enumerate(name)) % modulus


def fill(kind: str, name: str, shape: tuple[int, ...], amp: float, base: float = 0.0) -> Tensor:
    """The float64 tensor that a kind of fill gives a name."""
    n = np.arange(1, math.prod(shape) + 1, dtype=np.float64)
    match kind:
        case "hash":
            values = scramble(n.astype(np.uint64), name)
        case "sine":
            values = np.sin(0.7390851 * n + 0.0061803 * name_number(name))
        case "quadratic":  # of full rank
            values = np.sin(0.0137 * n * n + 0.0061803 * name_number(name))
        case "chirp":
            values = np.sin(0.7390851 * (n - 1) + 0.000061803 * (n - 1) ** 2 + name_number(name, 997))
    return torch.from_numpy(base + amp * values).reshape(shape)


def scramble(x: np.ndarray, name: str) -> np.ndarray:
    """Uniform in (-1, 1) by an integer hash of the elements' numbers x and a name."""
    x, low = x * np.uint64(2654435761) + np.uint64(name_number(name) * 2246822507), np.uint64(2**32 - 1)
    for shift, multiplier in ((16, 2146121005), (15, 2221713035), (16, 1)):
        x &= low
        x ^= x >> np.uint64(shift)
        x *= np.uint64(multiplier)
    return 2 * (x.astype(np.float64) + 0.5) / 2**32 - 1


def tokens(vocab: int, count: int, bos: list[int]) -> np.ndarray:
    """The token rule, int64, with document starts (id 1) at the given positions."""
    t = np.arange(count)
    ids = 8 + (7 * t * t + 13 * t + 5) % (vocab - 8)
    ids[bos] = train_gpt.BOS_ID
    return ids


def hessian(key: str, samples: int, cols: int, rho: float, dead: tuple[int, ...] = ()) -> Tensor:
    """X^T X / samples, float64, of correlated columns."""
    X = fill("hash", f"gptq.X.{key}", (samples, cols), 1.0) * (1 + torch.arange(cols) / cols)
    X = X + rho * fill("hash", f"gptq.c.{key}", (samples, 1), 1.0)
    X[:, list(dead)] = 0
    return X.T @ X / samples


def row_scales(weight: Tensor, bits: int, clip: float) -> Tensor:
    """The float16 scales (rows, 1) of a grid that reaches `clip` standard deviations of each row."""
    return train_gpt.storable(train_gpt.sigma_clip_scale(weight, bits, clip)).float()[:, None]


def write_shards(folder: Path, *shards: np.ndarray) -> Path:
    """Training shards in a data directory."""
    folder.mkdir(exist_ok=True)
    for i, ids in enumerate(shards):
        head = np.zeros(train_gpt.SHARD_HEADER_INTS, "<i4")
        head[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(ids)
        (folder / f"fineweb_train_{i:06d}.bin").write_bytes(head.tobytes() + np.asarray(ids, "<u2").tobytes())
    return folder


def numbered_shards(lengths: list[int]) -> list[np.ndarray]:
    """Shards whose tokens tell where they stand: 1000 * shard + position."""
    return [1000 * i + np.arange(n) for i, n in enumerate(lengths)]


# Checks


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


def compare(
    found: Mapping[str, Any], expected: Mapping[str, Any], rel: float = REL, skip: tuple[str, ...] = ()
) -> None:
    """Each number of an entry, list of numbers or set of checks against what was measured under the same name.

    A list may be the beginning of what was measured. A name that was not measured is an error.
    """
    for key, want in expected.items():
        if key in skip:
            continue
        if isinstance(want, dict):
            assert_checks(found[key], want, rel)
            continue
        got, wanted = (np.ravel(np.asarray(x.detach() if isinstance(x, Tensor) else x)) for x in (found[key], want))
        got = got[: len(wanted)]
        assert got.tolist() == pytest.approx(wanted.tolist(), rel=rel, abs=rel * float(np.abs(got).max())), key


# Models


def canonical(name: str, patterns: tuple[tuple[str, str], ...] = CANONICAL) -> str:
    """The published name of one of our tensors."""
    for pattern, published in patterns:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, published, name)
    return name


def by_published_name(cfg: train_gpt.Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model by their published names."""
    return {canonical(name): tensor for name, tensor in tensors.items()}


def published_value(config: dict[str, Any], name: str, shape: tuple[int, ...], values: Values = VALUES) -> Tensor:
    """What a canonical tensor is filled with."""
    amp, base = next((a, b) for endings, a, b in values if name.endswith(endings))
    amp = config["amps"][amp] if isinstance(amp, str) else amp
    amp = (2 / shape[1]) ** 0.5 if amp == "sqrt(2/in)" else amp
    if isinstance(base, str):
        base = config.get("bases", {}).get(base, config.get(base))
    value = fill(config.get("fill", "sine"), name, shape, amp, base)
    return value + torch.tensor([[1.0], [0.0]]) if name.endswith("resid_mix") else value


SIZES = "vocab_size=V model_dim=D num_heads=H num_kv_heads=K num_layers=L"


def renamed(config: dict[str, Any], names: str) -> dict[str, Any]:
    """Our name -> the entry's setting, by pairs ours=published, or names that are the same."""
    pairs = (name.partition("=") for name in names.split())
    return {ours: config[published or ours] for ours, _, published in pairs}


def model_config(config: dict[str, Any], **knobs: Any) -> train_gpt.Config:
    """The Config of an entry's model settings."""
    names = """mlp_mult rope_dims rope_base num_loops loop_start loop_end parallel_start_layer gate_window xsa_last_n
    qk_gain_init ln_scale parallel_final_lane=final_lane skip_gates_enabled=skip_gates smear_bos_mask=bos_mask
    sparse_attn_gate_scale=sparse_gate_scale logit_softcap=softcap"""
    knobs = {"attn_gate": "sparse" if config["sparse_gate"] else "none"} | knobs
    knobs = {"embed_extras": ("smear",) if config["smear"] else ()} | knobs
    return train_gpt.Config(**renamed(config, f"{SIZES} {names}") | knobs)


@torch.no_grad()
def filled(module: nn.Module, value: Any) -> nn.Module:
    """The module with value(name, shape) in each parameter."""
    for name, parameter in module.named_parameters():
        parameter.copy_(value(name, tuple(parameter.shape)))
    return module


def build(config: dict[str, Any], dtype: torch.dtype = torch.float64, **knobs: Any) -> train_gpt.GPT:
    """The filled model of an entry, parameters and activations in dtype, on its route."""
    model = train_gpt.GPT(model_config(config, **knobs), dtype=dtype).to(dtype)
    filled(model, lambda name, shape: published_value(config, canonical(name), shape))
    model.set_looping(config["loop_on"])
    return model


def rows_of(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """ids and targets (rows, T) of an entry."""
    width = config["T"] + 1
    stream = torch.from_numpy(tokens(config["V"], config["rows"] * width, config["bos"])).view(-1, width)
    return stream[:, :-1].contiguous(), stream[:, 1:].contiguous()


def exact_tables(length: int, dims: int, base: float, *_: Any) -> tuple[Tensor, Tensor]:
    """rotary_tables in float64, as the golden numbers of the n-gram and delta stacks were made."""
    frequency = base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos(), angle.sin()


def always(value: int) -> tuple[train_gpt.UpTo, ...]:
    """A knob's table with one value for everything."""
    return (train_gpt.UpTo(math.inf, value),)


def knobs(text: str) -> dict[str, str]:
    """NAME=value pairs, separated by blanks, as the environment of a run."""
    return dict(pair.split("=", 1) for pair in text.split())


def toy_config(text: str, **changed: Any) -> train_gpt.Config:
    """The Config of such pairs, with other values for some fields."""
    return dataclasses.replace(train_gpt.load_config(knobs(text)), **changed)


@contextlib.contextmanager
def tilts(config: dict[str, Any]) -> Iterator[None]:
    """Within, tilts have an entry's numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "TILT_LENGTH", config.get("order", 16) - 1)
        patch.setattr(train_gpt, "TILT_SHARE", config.get("threshold", 0.8))
        patch.setattr(train_gpt, "TILT_NATS", config["boost"])
        yield


def published_tilts(ids: np.ndarray) -> Tensor:
    """The token that each of a stream's is tilted to, -1 for none, as published: one document of targets alone, of
    which the first is there twice."""
    first = [1] * (train_gpt.TILT_LENGTH > 0)  # the first token of a document, which no context has
    tokens = torch.tensor([*first, ids[1], *ids[1:]])
    bits = train_gpt.find_tilts(train_gpt.Config(), tokens, torch.arange(len(tokens)) == 0)
    return (bits[len(first) :] >> train_gpt.TILT_AT) - 1


class Toyenizer:
    """A SentencePiece processor of given pieces; each has a type, 1 if it was learnt."""

    def __init__(self, pieces: list[str], types: list[int] | None = None) -> None:
        self.pieces, self.types = pieces, types or [1] * len(pieces)

    def vocab_size(self) -> int:
        return len(self.pieces)

    def id_to_piece(self, i: int) -> str:
        return self.pieces[i]

    def get_score(self, i: int) -> float:
        return -float(sum(kind == 1 for kind in self.types[:i])) if self.types[i] == 1 else 0.0


def runtime(dtype: torch.dtype = torch.float32, compile: bool = False) -> train_gpt.Runtime:
    """One silent process on the CPU."""
    return train_gpt.Runtime(0, 1, CPU, train_gpt.Log(None, True), dtype, compile)
