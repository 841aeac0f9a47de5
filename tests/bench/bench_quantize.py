"""What quantisation costs: seconds and bytes at full size, and bytes against val_bpb of a trained model.

    OMP_NUM_THREADS=1 python tests/bench/bench_quantize.py size [--compressor brotli pergroup] [--set KNOB=VALUE ...]
                                                                [--clips 12,12,12 11.5,13,14] [--weights gauss student]
    OMP_NUM_THREADS=1 python tests/bench/bench_quantize.py trade RUN --data SHARDS [--clips 12 18 27 40]
                                                                [--curves NAME ...]

size: the CaseOps model (35.9 M weights), with clips of MLP, attention and embedding in row standard deviations. The
weights are random: Gaussian, the worst case for the coder at a given step, or Student's t with 5.4 degrees of freedom,
whose integers have about 1.5 % less entropy. The sizes of the published artifacts put trained weights 1 to 1.5 % under
Gaussian ones, so `student` is at the favourable end of that estimate; no trained weights were used. Hessians are
synthetic (correlated inputs of unequal loudness), one for each input width. Bytes are those of the model blob alone.

trade: RUN is the folder of a finished run (model.pt, hessians.pt, record.env), such as that of small_model.py. Its
model is quantised again and again; each artifact is written, read back and scored (EVAL=plain) on the first --tokens
tokens of the validation stream. Clips are row standard deviations of all matrices. The excess over the score of the
float32 weights falls by a power of two with the bytes, so curves are compared by linear interpolation of its logarithm:
bytes at equal val_bpb and val_bpb at equal bytes, at each clip of the first curve. Prints Markdown, then one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import bench
import numpy as np
import torch
from bench import RUNTIME, Weights, timed

import train_gpt

CAP = 16_000_000
KNOBS = {"ATTN_GATE": "sparse", "EMBED_EXTRAS": "smear", "REPAIR": "lqer"}
CLIPS = ("MLP_CLIP_SIGMAS", "ATTN_CLIP_SIGMAS", "EMBED_CLIP_SIGMAS")
GPTQ, TCQ = ({"matrix_quant": scheme, "embed_quant": scheme} for scheme in ("gptq", "gptq_tcq"))
OURS = TCQ | {"compressor": "rans", "scale_step": 0.02}
CURVES = {  # the first is what the others are compared with
    "GPTQ, lrzip": GPTQ | {"compressor": "pergroup"},
    "GPTQ, brotli": GPTQ | {"compressor": "brotli"},
    "GPTQ, rANS": GPTQ | {"compressor": "rans", "scale_step": 0.02},
    "TCQ 8, rANS": OURS,
    "TCQ 64, rANS": OURS | {"tcq_states": 64},
    "TCQ 8, embedding GPTQ, rANS": OURS | {"embed_quant": "gptq"},
}


class Packed(NamedTuple):
    """An artifact's size in bytes, the seconds of each stage, and the weights that it gives back."""

    bytes: int
    seconds: dict[str, float]
    weights: Weights


def pack(cfg: train_gpt.Config, state: Weights, hessians: Weights) -> Packed:
    """Quantise as the program does, write the artifact, read it back."""
    seconds = {}
    pair, seconds["rotate and sort"] = timed(train_gpt.reparametrize, cfg, RUNTIME, state, hessians)
    stored, seconds["quantise and repair"] = timed(train_gpt.quantize, cfg, RUNTIME, *pair)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.bin"
        blob, seconds["pack"] = timed(train_gpt.pack_stored, stored, cfg.compressor)
        train_gpt.atomic_write(path, blob)
        restored, seconds["unpack"] = timed(train_gpt.load_artifact, path)
    wanted = train_gpt.dequantize(stored)
    if restored.keys() != state.keys() or not all(torch.equal(restored[name], wanted[name]) for name in wanted):
        raise SystemExit("the artifact does not give back what was quantised")
    return Packed(len(blob), seconds, restored)


# Full size, random weights


def random_weights(cfg: train_gpt.Config, kind: str) -> Weights:
    """A state dict of the right shapes; matrices are random, gains and scales as at the start of training."""
    state = train_gpt.GPT(cfg).init_weights(0).state_dict()
    rng = np.random.default_rng(0)
    for w in state.values():
        if w.dim() == 2 and w.numel() > 2**16:
            drawn = {"gauss": rng.standard_normal, "student": lambda size: rng.standard_t(5.4, size)}[kind](w.shape)
            w.copy_(torch.from_numpy(0.05 * drawn))
    return state


def synthetic_hessians(state: Weights) -> Weights:
    """Weight name -> Hessian; layers share those of their input width. Low ids are frequent tokens."""
    generator, by_width = torch.Generator().manual_seed(1), {}
    found = {train_gpt.COUNTS: torch.arange(len(state["tok_emb.weight"]), 0, -1)}
    for name, w in state.items():
        if w.dim() != 2 or w.numel() <= 2**16:
            continue
        cols = w.size(1)
        if cols not in by_width:
            loud = torch.exp(0.5 * torch.randn(cols, generator=generator))
            common = torch.randn(cols, 64, generator=generator) * loud[:, None]
            by_width[cols] = torch.diag(loud.square()) + 0.02 * common @ common.T
        found[name] = by_width[cols]
    return found


def size(args: argparse.Namespace) -> None:
    """Each combination that was asked for."""
    changes = dict(text.split("=", 1) for text in args.set)
    for compressor, clips, kind in ((c, k, w) for c in args.compressor for k in args.clips for w in args.weights):
        environ = KNOBS | dict(zip(CLIPS, clips.split(","), strict=True)) | {"COMPRESSOR": compressor} | changes
        cfg = train_gpt.load_config(environ)
        state = random_weights(cfg, kind)
        hessians, begun = synthetic_hessians(state), bench.processor_seconds()
        found = pack(cfg, state, hessians)
        spent = bench.processor_seconds() - begun
        stages = ", ".join(f"{stage} {value:.1f}" for stage, value in found.seconds.items())
        total = sum(value for stage, value in found.seconds.items() if stage != "unpack")
        print(f"{compressor}, clips {clips}, {kind} weights: {found.bytes:,} bytes", end=" ")
        print(f"({CAP - found.bytes:+,} to the cap); {total:.1f} s: {stages}; processors {spent:.1f}", flush=True)


# A trained model


class Point(NamedTuple):
    """One artifact: bytes of the model blob, val_bpb of what it holds, seconds to make it."""

    curve: str
    clip: float
    bytes: int
    val_bpb: float
    excess: float
    seconds: float


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
            better = p.excess - 2 ** float(np.interp(p.bytes, sizes, logs))
            found.append({"clip": p.clip, "bytes": saved, "share": saved / p.bytes, "val_bpb": better})
    return found


def trade(args: argparse.Namespace) -> None:
    """All curves."""
    environ = {"PRESET": str(args.run), "DATA_PATH": args.data, "EVAL": "plain", "COMPILE": "off", "DEVICE": "cpu"}
    cfg = train_gpt.load_config(environ)
    whole, state = train_gpt.load_val(cfg), bench.read_weights(args.run / "model.pt")
    val = train_gpt.ValData(whole.tokens[: args.tokens + 1], whole.bytes[: args.tokens + 1])
    hessians = torch.load(args.run / "hessians.pt", weights_only=True)

    def score(weights: Weights) -> float:
        return train_gpt.EVALS["plain"](cfg, RUNTIME, bench.model_of(cfg, RUNTIME, weights), val).val_bpb

    scores, points = {"float": score(state)}, []
    title = f"float32: val_bpb {scores['float']:.5f} on {args.tokens:,} tokens"
    bench.table(title, ("quantiser, coder", "clip", "bytes", "val_bpb", "over float32", "seconds"))
    for curve in args.curves:
        coarser = [] if curve == args.curves[0] else [1.25 * args.clips[-1]]  # so that it reaches the first one's last
        for clip in args.clips + coarser:
            clips = {name.lower(): clip for name in CLIPS}
            found = pack(dataclasses.replace(cfg, **CURVES[curve], **clips), state, hessians)
            # by clip and quantiser: the coder changes nothing
            key = clip, *(v for name, v in CURVES[curve].items() if name != "compressor")
            bpb = scores[key] = scores.get(key) or score(found.weights)
            seconds, excess = sum(found.seconds.values()), bpb - scores["float"]
            points.append(Point(curve, clip, found.bytes, bpb, excess, seconds))
            bench.row(curve, f"{clip:g}", f"{found.bytes:,}", f"{bpb:.5f}", f"{excess:+.5f}", f"{seconds:.0f}")
    columns = "curve", "at the bytes and val_bpb of clip", "bytes saved", "of its bytes", "val_bpb saved"
    saved = {curve: compare(points, curve) for curve in args.curves[1:]}
    forms = {"clip": "g", "bytes": ",.0f", "share": ".2%", "val_bpb": ".5f"}
    rows = ([curve, *(format(r[k], form) for k, form in forms.items())] for curve, rs in saved.items() for r in rs)
    bench.table("against the first curve", columns, rows)
    print(json.dumps({"float": scores["float"], "points": [p._asdict() for p in points], "saved": saved}))


def main() -> None:
    """The benchmark that was asked for."""
    parser = bench.arguments(__doc__)
    benches = parser.add_subparsers(required=True)
    full = benches.add_parser("size")
    full.set_defaults(bench=size)
    full.add_argument("--compressor", nargs="+", default=["brotli"], choices=tuple(train_gpt.CODECS))
    full.add_argument("--clips", nargs="+", default=["12,12,12", "11.5,13,14"])
    full.add_argument("--weights", nargs="+", default=["gauss"], choices=("gauss", "student"))
    full.add_argument("--set", nargs="*", default=[], metavar="KNOB=VALUE")
    curves = benches.add_parser("trade")
    curves.set_defaults(bench=trade)
    curves.add_argument("run", type=Path)
    curves.add_argument("--data", required=True, help="directory with the shards")
    curves.add_argument("--clips", nargs="+", type=float, default=[12.0, 18.0, 27.0, 40.0])
    curves.add_argument("--curves", nargs="+", default=list(CURVES), choices=tuple(CURVES))
    curves.add_argument("--tokens", type=int, default=65_536)
    args = parser.parse_args()
    args.bench(args)


if __name__ == "__main__":
    main()
