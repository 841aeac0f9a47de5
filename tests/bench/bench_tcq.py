"""Trellis-coded quantisation against its bars: gap to the rate-distortion bound, bytes saved at equal error.

    OMP_NUM_THREADS=1 python tests/bench/bench_tcq.py [--bars Q R] [--inputs weights_hessians.npz]

Q: standard normal weights at 3.4 bits: bits above the rate-distortion bound by the bytes of the coder, for each number
of states, and for a scalar quantiser. R: weights and input Hessians of a small trained transformer (--inputs: an
archive with L.role.W, .H): bytes of the whole file at equal Hessian-weighted error of each tensor, over GPTQ with a
clip of 12 row standard deviations and lrzip. Prints tables in Markdown, then one line of JSON. The seconds for the
contest model: bench_quantize.py size --set MATRIX_QUANT=gptq_tcq ...
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import bench
import numpy as np
import torch
from torch import Tensor

import pack_artifact
import train_gpt

Row = dict[str, object]


class Layer(NamedTuple):
    """A matrix and the Hessian of its inputs, which weights its error."""

    W: Tensor
    H: Tensor

    def error(self, decoded: Tensor) -> float:
        error = (self.W - decoded).double()
        return (error @ self.H.double() * error).sum().item()


class Setup(NamedTuple):
    """A quantiser and a coder."""

    scheme: str
    codec: str
    cfg: train_gpt.Config


def table(title: str, rows: list[Row]) -> None:
    bench.head(*rows[0], title=title)
    for row in rows:
        bench.row(*row.values())


def packed(parts: dict[str, train_gpt.Parts], codec: str) -> int:
    """Bytes of an artifact, from Stored.key -> parts."""
    return len(train_gpt.pack_stored([train_gpt.Stored.parse(key, value) for key, value in parts.items()], codec))


def encode(setup: Setup, layers: list[Layer], clips: list[float]) -> list[train_gpt.Parts]:
    """The parts of matrices of any widths, each with a clip of its own."""
    rules = [train_gpt.QuantRule(setup.scheme, 6, clip) for clip in clips]
    together, found = train_gpt.SCHEMES[setup.scheme].batch_encoder, [{}] * len(layers)
    if together is None:
        scheme = train_gpt.SCHEMES[setup.scheme]
        return [scheme.encode(x.W, x.H, rule, setup.cfg) for x, rule in zip(layers, rules, strict=True)]
    for width in {x.W.size(1) for x in layers}:
        mine = [i for i, x in enumerate(layers) if x.W.size(1) == width]
        lists = [layers[i].W for i in mine], [layers[i].H for i in mine], [rules[i] for i in mine]
        for i, parts in zip(mine, together(*lists, setup.cfg), strict=True):
            found[i] = parts
    return found


def at_equal_error(setup: Setup, layers: dict[str, Layer], want: dict[str, float]) -> Row:
    """Bits per weight of the whole file when each tensor has the error that is wanted (within a percent, and the rest
    by the slope of 6.02 dB a bit)."""
    clips, weights = dict.fromkeys(layers, 12.0), sum(x.W.numel() for x in layers.values())
    decode = train_gpt.SCHEMES[setup.scheme].decode
    for _ in range(4):
        found = encode(setup, list(layers.values()), list(clips.values()))
        pairs = zip(layers, found, strict=True)
        over = {n: layers[n].error(decode(parts)) / want[n] for n, parts in pairs}
        if max(abs(math.log(x)) for x in over.values()) < 0.01:
            break
        clips = {n: clips[n] / math.sqrt(over[n]) for n in layers}
    keys = (f"{n}:{n.split('.')[1]}:{setup.scheme}" for n in layers)  # layer.role
    bits = 8 * packed(dict(zip(keys, found, strict=True)), setup.codec) / weights
    bits += sum(x.W.numel() * math.log2(over[n]) / 2 for n, x in layers.items()) / weights
    return {"bits": bits, "clip": math.exp(sum(map(math.log, clips.values())) / len(clips))}


def read_layers(path: Path) -> dict[str, Layer]:
    archive = np.load(path)
    names = [name[:-2] for name in sorted(archive.files) if name.endswith(".W")]
    return {n: Layer(*(torch.from_numpy(archive[f"{n}.{kind}"]) for kind in "WH")) for n in names}


def bar_r(args: argparse.Namespace) -> list[Row]:
    """Bits saved at equal error."""
    layers, base = read_layers(args.inputs), train_gpt.Config(scale_step=0.02)
    reference = Setup("gptq", "pergroup", train_gpt.Config())
    decoded = [train_gpt.decode_rows(p) for p in encode(reference, list(layers.values()), [12.0] * len(layers))]
    setups = {"GPTQ, 12 deviations, lrzip": reference, "GPTQ, rANS": Setup("gptq", "rans", base)}
    for states in (8, 64):
        cfg = train_gpt.Config(scale_step=0.02, tcq_states=states)
        setups[f"TCQ {states}, rANS"] = Setup("gptq_tcq", "rans", cfg)
    want = {n: layers[n].error(d) for n, d in zip(layers, decoded, strict=True)}
    rows: list[Row] = []
    for name, setup in setups.items():
        found = at_equal_error(setup, layers, want)
        saved = (rows[0] if rows else found)["bits"] - found["bits"]
        rows.append({"what": name} | found | {"saved": saved})
    table("R: bits per weight of the whole file at equal error of every tensor", rows)
    return rows


def bar_q(args: argparse.Namespace) -> list[Row]:
    """Bits above the rate-distortion bound."""
    W, rows = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0)), []
    for states in train_gpt.TCQ_CODES:
        scheme = "gptq_tcq" if states > 1 else "rowwise"
        rule = train_gpt.QuantRule(scheme, 6, 12.2)
        cfg = train_gpt.Config(tcq_states=states, tcq_chunk_rows=args.chunk_rows)
        parts, seconds = bench.timed(train_gpt.SCHEMES[scheme].encode, W, torch.eye(W.size(1)), rule, cfg)
        error = (train_gpt.SCHEMES[scheme].decode(parts) - W).square().mean() / W.square().mean()
        coded = {key: part for key, part in parts.items() if key in "qt"}
        bits = 8 * packed({f"0.up:up:{scheme}": coded}, "rans") / W.numel()
        rows.append({"states": states if states > 1 else "scalar", "bits": bits})
        rows[-1] |= {"at entropy": 8 * pack_artifact.entropy_bytes(coded) / W.numel()}
        rows[-1] |= {"gap": bits + error.log2().item() / 2, "seconds": seconds}
    table(f"Q: standard normal weights, chunks of {args.chunk_rows} rows; gap to the bound in bits", rows)
    return rows


def main() -> None:
    """The bars that were asked for."""
    parser = bench.arguments(__doc__)
    parser.add_argument("--bars", nargs="+", default=["Q"], choices=("Q", "R"))
    parser.add_argument("--inputs", type=Path, help="archive of weights and Hessians, for R")
    parser.add_argument("--chunk-rows", type=int, default=1024)
    args = parser.parse_args()
    if "R" in args.bars and args.inputs is None:
        parser.error("bar R needs --inputs")
    print(json.dumps({bar: {"Q": bar_q, "R": bar_r}[bar](args) for bar in args.bars}))


if __name__ == "__main__":
    main()
