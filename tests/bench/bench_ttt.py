"""Test-time training: predictions per second, and tokens computed per token predicted.

    PRESET=records/<...> python tests/bench/bench_ttt.py [--docs 64] [--mean 957]

Random weights and random documents of log-normal length; knobs from the environment as for train_gpt.py. The counts of
window tokens are exact for the given lengths; the seconds mean something on a GPU only. One JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt  # noqa: E402


def random_documents(vocab: int, count: int, mean: float) -> train_gpt.ValData:
    """Documents of log-normal length (sigma 1, as of web text) with the given mean, each with its BOS."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(2, rng.lognormal(np.log(mean) - 0.5, 1.0, count).astype(int))
    tokens = rng.integers(4, vocab, int(lengths.sum()))
    tokens[np.concatenate(([0], np.cumsum(lengths)[:-1]))] = train_gpt.BOS_ID
    return train_gpt.ValData(tokens, np.full(len(tokens), 3, np.int32))


def window_tokens(cfg: train_gpt.Config, val: train_gpt.ValData) -> tuple[int, int]:
    """Tokens of all forward passes: as published (finished rows kept to the end of their batch), and as run here."""
    docs, kept, run = train_gpt.val_documents(val.tokens), 0, 0
    for batch in train_gpt.document_batches(docs, cfg.ttt_batch_size):
        for unit in train_gpt.chunk_units(cfg, val, docs, batch):
            kept += len(batch) * unit.ids.shape[1]
            run += unit.ids.size
    return kept, run


def main() -> None:
    """Measure one evaluation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=int, default=64)
    parser.add_argument("--mean", type=float, default=957.0, help="mean document length, tokens")
    args = parser.parse_args()
    cfg = train_gpt.load_config(os.environ)
    runtime = train_gpt.Runtime.start(cfg, {})
    val = random_documents(cfg.vocab_size, args.docs, args.mean)
    model = train_gpt.GPT(cfg, train_gpt.choose_attention(cfg, runtime), runtime.dtype).to(runtime.device)
    model.load_state_dict(train_gpt.GPT(cfg).reset(cfg.seed).state_dict())
    model.set_looping(train_gpt.loops(cfg))
    kept, run = window_tokens(cfg, val)
    started = time.perf_counter()
    score = train_gpt.EVALS[cfg.eval](cfg, runtime, model, val)
    row = {
        "eval": cfg.eval, "docs": args.docs, "predictions": score.tokens, "seconds": round(score.seconds, 2),
        "seconds_with_compilation": round(time.perf_counter() - started, 2),
        "predictions_per_second": round(score.tokens / score.seconds, 1),
        "window_tokens_per_prediction": round(run / score.tokens, 2),
        "window_tokens_per_prediction_rows_kept": round(kept / score.tokens, 2),
        "device": torch.cuda.get_device_name() if runtime.device.type == "cuda" else "cpu", "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(row))


if __name__ == "__main__":
    main()
