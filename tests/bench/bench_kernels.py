"""Milliseconds of each fused kernel, forward with backward, beside its plain twin under torch.compile, on one GPU.

    python tests/bench/bench_kernels.py [--tokens 98304] [--steps 20]

The contest's shapes by default: a rank's 98,304 tokens, width 512, hidden 2048, vocabulary 8192, bf16. One JSON line
per kernel: milliseconds (median of the steps) and peak memory above the inputs, fused and plain, measured in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt

Step = Callable[[], None]


def plain_mlp(m: torch.Tensor, up: torch.Tensor, down: torch.Tensor, slope: float) -> torch.Tensor:
    """The twin of train_gpt.fused_mlp."""
    return F.linear(F.leaky_relu(F.linear(m, up), slope).square(), down)


def gaussian(*shape: int, size: float = 1.0) -> torch.Tensor:
    """A bf16 leaf on the GPU."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(size).requires_grad_()


def step_of(function: Callable, leaves: tuple[torch.Tensor, ...], others: tuple, g: torch.Tensor) -> Step:
    """Compiled forward and backward of a function of leaves and others, as a call without arguments."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    return lambda: torch.autograd.grad(compiled(*leaves, *others), leaves, g) and None


def measure(step: Step, repeats: int) -> tuple[float, int]:
    """Median milliseconds of a call, and the memory in MiB that it takes at its peak."""
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) // 2**20


def main() -> None:
    """Both kernels, fused and plain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=98_304)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    if train_gpt.triton is None or not torch.cuda.is_available():
        raise SystemExit("error: needs a GPU and triton")
    torch.manual_seed(0)
    N, D, H, V = args.tokens, 512, 2048, 8192
    logits, targets = gaussian(N, V, size=5), torch.randint(V, (N,), device="cuda")
    mlp = gaussian(N, D), gaussian(H, D, size=D**-0.5), gaussian(D, H, size=H**-0.5)
    rows, hidden = torch.full((N,), 1 / N, device="cuda"), torch.randn(N, D, device="cuda", dtype=torch.bfloat16)
    pairs = {
        "softcapped cross-entropy": [
            step_of(f, (logits,), (targets, 30.0), rows)
            for f in (train_gpt.fused_cross_entropy, train_gpt.softcapped_cross_entropy)
        ],
        "mlp": [step_of(f, mlp, (0.5,), hidden) for f in (train_gpt.fused_mlp, plain_mlp)],
    }
    for name, steps in pairs.items():
        (fused, fused_mib), (plain, plain_mib) = (measure(step, args.steps) for step in steps)
        result = {
            "kernel": name,
            "tokens": N,
            "fused_ms": round(fused, 3),
            "plain_ms": round(plain, 3),
            "fused_mib": fused_mib,
            "plain_mib": plain_mib,
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": train_gpt.triton.__version__,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
