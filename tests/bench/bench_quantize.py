"""Seconds and bytes of quantising and packing the full-size CaseOps model (35.9 M weights), by stage and compressor.

    OMP_NUM_THREADS=1 python tests/bench/bench_quantize.py [--compressor brotli pergroup] [--clips 12,12,12 11.5,13,14]
                                                           [--weights gauss student] [--set KNOB=VALUE ...]

Clips are those of MLP, attention and embedding, in row standard deviations. The weights are random: Gaussian, the worst
case for the coder at a given step, or Student's t with 5.4 degrees of freedom, whose integers have about 1.5 % less
entropy. The sizes of the published artifacts put trained weights 1 to 1.5 % under Gaussian ones, so `student` is at the
favourable end of that estimate; no trained weights were used. Hessians are synthetic (correlated inputs of unequal
loudness), one for each input width. Bytes are those of the model blob alone, without code.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pack_artifact  # noqa: E402
import train_gpt  # noqa: E402

CAP = 16_000_000
KNOBS = {"ATTN_GATE": "sparse", "EMBED_EXTRAS": "smear", "REPAIR": "lqer"}
Weights = dict[str, Tensor]


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


def timed(function: object, *args: object) -> tuple[object, float]:
    start = time.perf_counter()
    return function(*args), time.perf_counter() - start


def check_equal(stored: list[train_gpt.Stored], restored: list[train_gpt.Stored]) -> None:
    """Stop unless unpacking gave back what was packed, bit for bit."""
    for a, b in zip(stored, restored, strict=True):
        if a.key() != b.key() or not all(torch.equal(a.parts[part], b.parts[part]) for part in a.parts):
            raise SystemExit(f"unpacking does not give back {a.key()}")


def measure(cfg: train_gpt.Config, runtime: train_gpt.Runtime, kind: str) -> str:
    """Quantise, report, pack and unpack once; the numbers. Stops when unpacking does not give back the bits."""
    state = random_weights(cfg, kind)
    seconds = {}
    pair, seconds["prepare"] = timed(train_gpt.reparametrize, cfg, runtime, state, synthetic_hessians(state))
    stored, seconds["quantise and repair"] = timed(train_gpt.quantize, cfg, runtime, *pair)
    blob, seconds["pack"] = timed(train_gpt.pack_stored, stored, cfg.compressor)
    blob_again, seconds["unpack"] = timed(train_gpt.open_blob, blob)
    check_equal(stored, blob_again.tensors)
    total = sum(seconds[stage] for stage in seconds if stage != "unpack")
    entropy = sum(pack_artifact.entropy_bytes(tensor.parts) for tensor in stored)
    stages = ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
    return (
        f"{len(blob):,} bytes ({CAP - len(blob):+,} to the cap), order-0 entropy {entropy:,}; {total:.1f} s: {stages}\n"
        + "\n".join(train_gpt.explain_stored(cfg, stored))
    )


def main() -> None:
    """Measure each combination that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compressor", nargs="+", default=["brotli"], choices=tuple(train_gpt.CODECS))
    parser.add_argument("--clips", nargs="+", default=["12,12,12", "11.5,13,14"])
    parser.add_argument("--weights", nargs="+", default=["gauss"], choices=("gauss", "student"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KNOB=VALUE")
    args = parser.parse_args()
    runtime = train_gpt.Runtime(0, 1, torch.device("cpu"), train_gpt.Log(None, True))
    for compressor, clips, kind in ((c, k, w) for c in args.compressor for k in args.clips for w in args.weights):
        names = ("MLP_CLIP_SIGMAS", "ATTN_CLIP_SIGMAS", "EMBED_CLIP_SIGMAS")
        environ = KNOBS | dict(zip(names, clips.split(","), strict=True)) | {"COMPRESSOR": compressor}
        cfg = train_gpt.load_config(environ | dict(text.split("=", 1) for text in args.set))
        print(f"{compressor}, clips {clips}, {kind} weights: {measure(cfg, runtime, kind)}", flush=True)


if __name__ == "__main__":
    main()
