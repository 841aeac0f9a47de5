"""Bytes against val_bpb of a trained model, for quantisers and coders, over a range of clips.

    OMP_NUM_THREADS=1 python tests/bench/bench_trade.py RUN --data SHARDS [--clips 12 18 27 40] [--picture trade.png]

RUN is the folder of a finished run (model.pt, hessians.pt, record.env), such as the one of small_model.py. Its model is
quantised again and again; each artifact is written, read back and scored (EVAL=plain) on the first --tokens tokens of
the validation stream. Clips are row standard deviations of all matrices. What quantisation costs, the excess over the
score of the weights in float32, falls by a power of two with the bytes, so curves are compared by linear interpolation
of its logarithm: bytes at equal val_bpb and val_bpb at equal bytes, at each clip of the first curve. Prints tables in
Markdown, then one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt  # noqa: E402

GPTQ, TCQ = ({"matrix_quant": scheme, "embed_quant": scheme} for scheme in ("gptq", "gptq_tcq"))
OURS = TCQ | {"compressor": "rans", "scale_step": 0.02}
CURVES = {  # the first is what the others are compared with
    "GPTQ, lrzip": GPTQ | {"compressor": "pergroup"},
    "GPTQ, brotli": GPTQ | {"compressor": "brotli"},
    "GPTQ, rANS": GPTQ | {"compressor": "rans", "scale_step": 0.02},
    "TCQ 8, rANS": OURS,
    "TCQ 8, rANS, column steps": OURS | {"tcq_column_beta": 1.0},
    "TCQ 64, rANS": OURS | {"tcq_states": 64},
    "TCQ 8, embedding GPTQ, rANS": OURS | {"embed_quant": "gptq"},
}
Weights = dict[str, Tensor]


class Point(NamedTuple):
    """One artifact: bytes of the model blob, val_bpb of what it holds, seconds to make it."""

    curve: str
    clip: float
    bytes: int
    val_bpb: float
    excess: float
    seconds: float


class Bench:
    """A trained model and the part of the validation stream that it is scored on."""

    def __init__(self, run: Path, data: str, tokens: int) -> None:
        environ = {"PRESET": str(run), "DATA_PATH": data, "EVAL": "plain", "COMPILE": "off", "DEVICE": "cpu"}
        self.cfg = train_gpt.load_config(environ)
        self.runtime = train_gpt.Runtime(0, 1, torch.device("cpu"), train_gpt.Log(None, True))
        val = train_gpt.load_val(self.cfg)
        self.val = train_gpt.ValData(val.tokens[: tokens + 1], val.bytes[: tokens + 1])
        self.state = torch.load(run / "model.pt", weights_only=True)["model"]
        self.hessians = torch.load(run / "hessians.pt", weights_only=True)
        self.scores: dict[tuple, float] = {}  # by clip and quantiser: the coder changes nothing
        self.float_bpb = self.score(self.state).val_bpb

    def score(self, state: Weights) -> train_gpt.Score:
        attend = train_gpt.choose_attention(self.cfg, self.runtime)
        model = train_gpt.GPT(self.cfg, attend, torch.float32, train_gpt.choose_kernels(self.cfg, self.runtime))
        model.set_looping(train_gpt.loops(self.cfg))
        train_gpt.fill_model(model, state, "the artifact")
        return train_gpt.evaluate_plain(self.cfg, self.runtime, model, self.val)

    def point(self, curve: str, clip: float) -> Point:
        """Quantise, write, read and score."""
        clips = dict.fromkeys(("attn_clip_sigmas", "mlp_clip_sigmas", "embed_clip_sigmas"), clip)
        cfg = dataclasses.replace(self.cfg, **CURVES[curve], **clips)
        start = time.perf_counter()
        pair = train_gpt.reparametrize(cfg, self.runtime, self.state, self.hessians)
        stored = train_gpt.quantize(cfg, self.runtime, *pair)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.bin"
            size = train_gpt.save_artifact(path, stored, cfg.compressor)
            seconds, restored = time.perf_counter() - start, train_gpt.load_artifact(path)
        key = clip, *(v for name, v in CURVES[curve].items() if name != "compressor")
        bpb = self.scores[key] = self.scores.get(key) or self.score(restored).val_bpb
        return Point(curve, clip, size, bpb, bpb - self.float_bpb, seconds)


def compare(points: list[Point], curve: str) -> list[dict[str, float]]:
    """At each point of the first curve that another one reaches: what that saves in bytes at the same val_bpb, and in
    val_bpb at the same bytes."""
    base, other = ([p for p in points if p.curve == name and p.excess > 0] for name in (points[0].curve, curve))
    other.sort(key=lambda p: p.bytes)
    sizes, logs = [float(p.bytes) for p in other], [math.log2(p.excess) for p in other]
    found = []
    for p in base:
        want = math.log2(p.excess)
        if other and logs[-1] <= want <= logs[0] and sizes[0] <= p.bytes <= sizes[-1]:
            saved = p.bytes - float(np.interp(-want, [-x for x in logs], sizes))
            found.append({"clip": p.clip, "bytes": saved, "share": saved / p.bytes})
            found[-1]["val_bpb"] = p.excess - 2 ** float(np.interp(p.bytes, sizes, logs))
    return found


def draw(points: list[Point], path: Path) -> None:
    """The curves as a picture."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for curve in dict.fromkeys(p.curve for p in points):
        mine = [p for p in points if p.curve == curve]
        axes.plot([p.bytes / 1e6 for p in mine], [p.excess for p in mine], "o-", label=curve)
    axes.set(xlabel="model.bin, MB", ylabel="val_bpb over float32", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """All curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True, help="directory with the shards")
    parser.add_argument("--clips", nargs="+", type=float, default=[12.0, 18.0, 27.0, 40.0])
    parser.add_argument("--curves", nargs="+", default=list(CURVES), choices=tuple(CURVES))
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    bench, points = Bench(args.run, args.data, args.tokens), []
    print(f"float32: val_bpb {bench.float_bpb:.5f} on {args.tokens:,} tokens\n", flush=True)
    print("| quantiser, coder | clip | bytes | val_bpb | over float32 | seconds |\n|---|---|---|---|---|---|")
    for curve in args.curves:
        coarser = [] if curve == args.curves[0] else [1.25 * args.clips[-1]]  # so that it reaches the first one's last
        for clip in args.clips + coarser:
            p = bench.point(curve, clip)
            points.append(p)
            cells = curve, f"{clip:g}", f"{p.bytes:,}", f"{p.val_bpb:.5f}", f"{p.excess:+.5f}", f"{p.seconds:.0f}"
            print(f"| {' | '.join(cells)} |", flush=True)
    print("\n| against the first | at the bytes and val_bpb of clip | bytes saved | of its bytes | val_bpb saved |")
    print("|---|---|---|---|---|")
    saved = {curve: compare(points, curve) for curve in args.curves[1:]}
    for curve, rows in saved.items():
        for r in rows:
            print(f"| {curve} | {r['clip']:g} | {r['bytes']:,.0f} | {r['share']:.2%} | {r['val_bpb']:.5f} |")
    if args.picture:
        draw(points, args.picture)
    result = {"float": bench.float_bpb, "points": [p._asdict() for p in points], "saved": saved}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
