"""Time of the gated delta rule, forward with backward: token by token, in chunks, and by flash-linear-attention.

    python tests/bench/bench_gdn.py [--rows 1] [--tokens 1024] [--chunks 16,32,64,128] [--repeats 5]

The contest's heads (4 of 64), float32 on a CPU, bf16 on a GPU, where the library is timed if it is installed. One JSON
line: milliseconds (the fastest of the repeats, taken in turn), and how often faster than token by token.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]
import gdn_rules  # noqa: E402

import train_gpt  # noqa: E402

HEADS, WIDTH = 4, 64


def draw(rows: int, tokens: int, device: str) -> tuple[torch.Tensor, ...]:
    """Inputs of the rule as a fresh model gives them, leaves where they are differentiated."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(rows, tokens, HEADS, WIDTH, device=device, dtype=dtype) for _ in range(3))
    g, beta = (torch.rand(rows, tokens, HEADS, device=device) for _ in range(2))
    starts = torch.zeros(rows, tokens, dtype=torch.bool, device=device)
    state = torch.zeros(rows, HEADS, WIDTH, WIDTH, device=device)
    leaves = [x.requires_grad_() for x in (F.elu(q) + 1, F.elu(k) + 1, v, -0.1 * g, beta)]
    return *leaves, starts, state


def of_units(rule: Callable, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A rule of the plain twins, after the norm of queries and keys."""
    q, k, v, *others = inputs
    return rule(train_gpt.l2_normalize(q), train_gpt.l2_normalize(k), train_gpt.at_least_fp32(v), *others)


def milliseconds(rule: Callable, inputs: tuple[torch.Tensor, ...]) -> float:
    """One forward and backward."""
    wait = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None
    wait()
    started = time.perf_counter()
    o, _ = rule(*inputs)
    torch.autograd.grad(o.float().square().sum(), inputs[:5])
    wait()
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    """All rules in turn, so that a busy machine is busy for each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chunks", default="16,32,64,128")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rules = {"token by token": functools.partial(of_units, gdn_rules.recurrence)}
    for chunk in map(int, args.chunks.split(",")):
        rules[f"chunks of {chunk}"] = functools.partial(
            of_units, functools.partial(train_gpt.chunked_delta_rule, chunk=chunk)
        )
    if device == "cuda" and train_gpt.chunk_gated_delta_rule is not None:
        rules["flash-linear-attention"] = train_gpt.fused_delta_rule
    inputs, best = draw(args.rows, args.tokens, device), dict.fromkeys(rules, float("inf"))
    for turn in range(args.repeats + 1):
        for name, rule in rules.items():
            taken = milliseconds(rule, inputs)
            best[name] = min(best[name], taken) if turn else float("inf")  # the first turn warms up
    slow = best["token by token"]
    table = {name: {"ms": round(ms, 2), "times faster": round(slow / ms, 2)} for name, ms in best.items()}
    shape = {"rows": args.rows, "tokens": args.tokens, "heads": HEADS, "width": WIDTH}
    print(json.dumps({"device": device, "threads": torch.get_num_threads(), **shape, "rules": table}))


if __name__ == "__main__":
    main()
