"""Trellis-coded quantisation against its bars: gap to the rate-distortion bound, bytes saved at equal error.

    OMP_NUM_THREADS=1 python tests/bench/bench_tcq.py [--bars Q R] [--inputs weights_hessians.npz]

Q: standard normal weights at 3.4 bits: bits above the rate-distortion bound by the bytes of the coder, for each number
of states, and for a scalar quantiser. R: weights and input Hessians of a small trained transformer (--inputs: an
archive with L.role.W, .H): bytes of the whole file at equal Hessian-weighted error of each tensor, over GPTQ with a
clip of 12 row standard deviations and lrzip. Prints tables in Markdown, then one line of JSON. The seconds for the
contest model: bench_quantize.py size --set MATRIX_QUANT=gptq_tcq ...
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import bench
import numpy as np
import torch
from torch import Tensor

import train_gpt
from records import tensor_losses

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

    def encode(self, layers: dict[str, Layer], clips: dict[str, float]) -> dict[str, train_gpt.Parts]:
        """Stored.key, from the layer and its role -> the parts of a matrix, each with a clip of its own."""
        scheme = train_gpt.SCHEMES[self.scheme]
        rules = {n: train_gpt.QuantRule(self.scheme, 6, clip) for n, clip in clips.items()}
        if scheme.batch_encoder is None:
            found = {n: scheme.encode(x.W, x.H, rules[n], self.cfg) for n, x in layers.items()}
        else:  # matrices of one width together
            found = {}
            for width in {x.W.size(1) for x in layers.values()}:
                mine = [n for n, x in layers.items() if x.W.size(1) == width]
                lists = [layers[n].W for n in mine], [layers[n].H for n in mine], [rules[n] for n in mine]
                found |= zip(mine, scheme.batch_encoder(*lists, self.cfg), strict=True)
        return {f"{n}:{n.split('.')[1]}:{self.scheme}": found[n] for n in layers}

    def errors(self, layers: dict[str, Layer], parts: dict[str, train_gpt.Parts]) -> dict[str, float]:
        """Of each layer, by what `encode` gave."""
        decode = train_gpt.SCHEMES[self.scheme].decode
        return {n: x.error(decode(own)) for (n, x), own in zip(layers.items(), parts.values(), strict=True)}


def packed(parts: dict[str, train_gpt.Parts], codec: str) -> int:
    """Bytes of an artifact, from Stored.key -> parts."""
    return len(train_gpt.pack_stored([train_gpt.Stored.parse(key, value) for key, value in parts.items()], codec))


def at_equal_error(setup: Setup, layers: dict[str, Layer], want: dict[str, float]) -> Row:
    """Bits per weight of the whole file when each tensor has the error that is wanted (within a percent, and the rest
    by the slope of 6.02 dB a bit)."""
    clips, weights = dict.fromkeys(layers, 12.0), sum(x.W.numel() for x in layers.values())
    for _ in range(4):
        found = setup.encode(layers, clips)
        over = {n: error / want[n] for n, error in setup.errors(layers, found).items()}
        if max(abs(math.log(x)) for x in over.values()) < 0.01:
            break
        clips = {n: clips[n] / math.sqrt(over[n]) for n in layers}
    bits = 8 * packed(found, setup.codec) / weights
    bits += sum(x.W.numel() * math.log2(over[n]) / 2 for n, x in layers.items()) / weights
    return {"bits": bits, "clip": math.exp(sum(map(math.log, clips.values())) / len(clips))}


def read_layers(path: Path) -> dict[str, Layer]:
    archive = np.load(path)
    names = [name[:-2] for name in sorted(archive.files) if name.endswith(".W")]
    return {n: Layer(*(torch.from_numpy(archive[f"{n}.{kind}"]) for kind in "WH")) for n in names}


def bar_r(inputs: Path) -> list[Row]:
    """Bits per weight of the whole file at equal error of every tensor."""
    layers, base = read_layers(inputs), train_gpt.Config(scale_step=0.02)
    reference = Setup("gptq", "pergroup", train_gpt.Config())
    setups = {"GPTQ, 12 deviations, lrzip": reference, "GPTQ, rANS": Setup("gptq", "rans", base)}
    for states in (8, 64):
        cfg = train_gpt.Config(scale_step=0.02, tcq_states=states)
        setups[f"TCQ {states}, rANS"] = Setup("gptq_tcq", "rans", cfg)
    want = reference.errors(layers, reference.encode(layers, dict.fromkeys(layers, 12.0)))
    rows: list[Row] = []
    for name, setup in setups.items():
        found = at_equal_error(setup, layers, want)
        saved = (rows[0] if rows else found)["bits"] - found["bits"]
        rows.append({"what": name} | found | {"saved": saved})
    return rows


def bar_q(_: Path) -> list[Row]:
    """Bits of standard normal weights above the rate-distortion bound."""
    W, rows = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0)), []
    for states in train_gpt.TCQ_CODES:
        scheme = "gptq_tcq" if states > 1 else "rowwise"
        rule = train_gpt.QuantRule(scheme, 6, 12.2)
        cfg = train_gpt.Config(tcq_states=states, tcq_chunk_rows=1024)
        parts, seconds = bench.timed(train_gpt.SCHEMES[scheme].encode, W, torch.eye(W.size(1)), rule, cfg)
        error = (train_gpt.SCHEMES[scheme].decode(parts) - W).square().mean() / W.square().mean()
        coded = {key: part for key, part in parts.items() if key in "qt"}
        bits = 8 * packed({f"0.up:up:{scheme}": coded}, "rans") / W.numel()
        rows.append({"states": states if states > 1 else "scalar", "bits": bits})
        rows[-1] |= {"at entropy": 8 * tensor_losses.entropy_bytes(coded) / W.numel()}
        rows[-1] |= {"gap": bits + error.log2().item() / 2, "seconds": seconds}
    return rows


def main() -> None:
    """The bars that were asked for."""
    parser, bars, found = bench.arguments(__doc__), {"Q": bar_q, "R": bar_r}, {}
    parser.add_argument("--bars", nargs="+", default=["Q"], choices=tuple(bars))
    parser.add_argument("--inputs", type=Path, help="archive of weights and Hessians, for R")
    args = parser.parse_args()
    if "R" in args.bars and args.inputs is None:
        parser.error("bar R needs --inputs")
    for bar in args.bars:
        found[bar] = rows = bars[bar](args.inputs)
        bench.table(f"{bar}: {bars[bar].__doc__}", rows[0], (row.values() for row in rows))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
