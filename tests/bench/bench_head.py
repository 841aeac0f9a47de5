"""Sliding windows with the head on every cell, and on the scored cells alone: seconds of a batch, in one process.

    PRESET=records/<...> python tests/bench/bench_head.py [--repeats 5]

Random weights and tokens; knobs from the environment as for train_gpt.py. Medians, their ratio, and the spread of the
pairs' ratios, as one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt


def seconds(scorer: train_gpt.NoAdaptation, unit: train_gpt.Unit) -> float:
    """Time of one scored batch."""
    scorer.runtime.synchronize()
    started = time.perf_counter()
    scorer.score(unit)
    scorer.runtime.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Measure pairs, each form in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    cfg = train_gpt.load_config(os.environ)
    runtime = train_gpt.Runtime.start(cfg, {})
    kernels = train_gpt.choose_kernels(cfg, runtime)
    model = train_gpt.GPT(cfg, train_gpt.choose_attention(cfg, runtime), runtime.dtype, kernels).to(runtime.device)
    model.load_state_dict(train_gpt.GPT(cfg).init_weights(cfg.seed).state_dict())
    model.set_looping(train_gpt.loops(cfg))
    count = cfg.eval_seq_len + 2 * train_gpt.windows_per_batch(cfg) * cfg.eval_stride
    tokens = np.random.default_rng(0).integers(4, cfg.vocab_size, count + 1)
    val = train_gpt.ValData(tokens, np.full(len(tokens), 3, np.int32))
    unit, scorer = train_gpt.sliding_units(cfg, runtime, val)[1](), train_gpt.NoAdaptation(cfg, runtime, model)
    forms = (unit._replace(cells=None), unit)
    pairs = [[seconds(scorer, form) for form in forms] for _ in range(args.repeats + 1)][1:]  # the first one warms up
    whole, few = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = sorted(a / b for a, b in pairs)
    row = {
        "cells": unit.ids.size,
        "scored": len(unit.cells),
        "seconds_head_everywhere": round(whole, 4),
        "seconds_head_on_scored": round(few, 4),
        "ratio": round(whole / few, 3),
        "ratio_of_pairs": [round(ratios[0], 3), round(ratios[-1], 3)],
        "vocab": cfg.vocab_size,
        "dim": cfg.model_dim,
        "layer_runs": len(model.route.layers),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if runtime.device.type == "cuda" else "cpu",
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
