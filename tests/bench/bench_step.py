"""Milliseconds, tokens per second, MFU and peak memory of a full-size training step, looping off and on.

    PRESET=records/<...> python tests/bench/bench_step.py [--steps 20] [--attention fa2,fa3] [--peak-tflops 989]

Random tokens, documents of the published mean length; knobs from the environment as for train_gpt.py. The absolute
numbers mean something on a GPU only; on a CPU only their ratios do. One JSON line per measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt  # noqa: E402

MEAN_DOCUMENT = 957  # tokens, of the published CaseOps training documents


def random_batch(cfg: train_gpt.Config, rng: np.random.Generator) -> train_gpt.Batch:
    """One micro-batch of random tokens with document starts at the published density."""
    span = rng.integers(4, cfg.vocab_size, cfg.train_batch_tokens // cfg.batch_slices + 1).astype(np.uint16)
    span[rng.random(len(span)) < 1 / MEAN_DOCUMENT] = train_gpt.BOS_ID
    return train_gpt.LOADERS[cfg.loader].batch(span, cfg.train_seq_len)


def flops_per_token(cfg: train_gpt.Config, route: train_gpt.Route) -> float:
    """6 per weight that a token meets (matrices of every execution and the head), attention left out."""
    with torch.device("meta"):
        model = train_gpt.GPT(cfg)
    per_layer = [sum(p.numel() for n, p in b.named_parameters() if n.endswith("weight")) for b in model.blocks]
    return 6 * (sum(per_layer[layer] for layer in route.layers) + cfg.vocab_size * cfg.model_dim)


def measure(cfg: train_gpt.Config, looping: bool, steps: int, peak_tflops: float) -> dict[str, object]:
    """Timing of `steps` optimiser steps of one micro-batch after as many untimed ones (at most 5)."""
    runtime = train_gpt.Runtime.start(cfg, {})
    parts = train_gpt.choose_attention(cfg, runtime), runtime.dtype, train_gpt.choose_kernels(cfg, runtime)
    model = train_gpt.GPT(cfg, *parts).to(runtime.device)
    model.load_state_dict(train_gpt.GPT(cfg).init_weights(cfg.seed).state_dict())
    model.set_looping(looping)
    trainer = train_gpt.Trainer(cfg, runtime, model, None)
    rng = np.random.default_rng(0)
    batches = [random_batch(cfg, rng) for _ in range(4)]
    for step in range(min(steps, 5)):
        trainer.step([batches[step % 4]], 1.0, step)
    runtime.synchronize()
    started = time.perf_counter()
    for step in range(steps):
        trainer.step([batches[step % 4]], 1.0, step)
    runtime.synchronize()
    seconds = (time.perf_counter() - started) / steps
    tokens = cfg.train_batch_tokens // cfg.batch_slices
    cuda = runtime.device.type == "cuda"
    return {
        "attention": cfg.attention,
        "looping": looping,
        "tokens": tokens,
        "ms_per_step": round(1e3 * seconds, 2),
        "tokens_per_second": round(tokens / seconds),
        "mfu": round(flops_per_token(cfg, model.route) * tokens / seconds / peak_tflops / 1e12, 4),
        "peak_memory_mib": torch.cuda.max_memory_allocated() // 2**20 if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
    }


def main() -> None:
    """Every attention backend asked for, looping off and on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--attention", default="auto", help="comma-separated values of ATTENTION")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak of the GPU (H100, H200: 989)")
    args = parser.parse_args()
    cfg = train_gpt.load_config(os.environ)
    for attention in args.attention.split(","):
        for looping in (False, True):
            print(
                json.dumps(
                    measure(dataclasses.replace(cfg, attention=attention), looping, args.steps, args.peak_tflops)
                )
            )


if __name__ == "__main__":
    main()
