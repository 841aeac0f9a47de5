"""What the benchmarks share: where the program is, arguments, clocks, tables in Markdown, models and data of a run.

BENCH_PROGRAM names another checkout, whose train_gpt.py is measured in place of this one's.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [os.environ.get("BENCH_PROGRAM", str(ROOT)), str(ROOT), str(ROOT / "tests"), str(ROOT / "data")]

import train_gpt  # noqa: E402  (the line above finds it)

Weights = dict[str, Tensor]
RUNTIME = train_gpt.Runtime(0, 1, torch.device("cpu"), train_gpt.Log(None, True))
CUDA = torch.cuda.is_available()
MEAN_DOCUMENT = 957  # tokens, of the published CaseOps training documents


def arguments(text: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a benchmark's documentation."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def timed(function: Callable, *args: object) -> tuple[Any, float]:
    """What the function returns, and the seconds that it took."""
    started = time.perf_counter()
    return function(*args), time.perf_counter() - started


def processor_seconds() -> float:
    """Of this process and of the programs that it ran."""
    return sum(os.times()[:4])


def row(*cells: object) -> None:
    """One row of a table."""
    print(f"| {' | '.join(f'{cell:.4f}' if isinstance(cell, float) else str(cell) for cell in cells)} |", flush=True)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]] = ()) -> None:
    """A table, or the head of one whose rows come as they are measured."""
    names = list(columns)
    print(f"\n{title}\n" if title else "")
    row(*names)
    print("|" + "---|" * len(names))
    for cells in rows:
        row(*cells)


def model_of(cfg: train_gpt.Config, runtime: train_gpt.Runtime, state: Weights | None = None) -> train_gpt.GPT:
    """The model on its final route, with some weights, by default those at the start of training."""
    parts = train_gpt.choose_attention(cfg, runtime), runtime.dtype, train_gpt.choose_kernels(cfg, runtime)
    model = train_gpt.GPT(cfg, *parts).to(runtime.device)
    train_gpt.fill_model(model, state or train_gpt.GPT(cfg).init_weights(cfg.seed).state_dict(), "the run")
    model.set_looping(train_gpt.loops(cfg))
    return model


def read_weights(path: Path) -> Weights:
    """The weights of an artifact, or of a run before quantisation."""
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)["model"]
    return train_gpt.load_artifact(path)


def machine() -> dict[str, str]:
    """What the times of a row depend on."""
    device = torch.cuda.get_device_name() if CUDA else f"cpu, {torch.get_num_threads()} threads"
    return {"device": device, "torch": torch.__version__}


def say(**found: object) -> None:
    """One JSON line with the machine."""
    print(json.dumps(found | machine()), flush=True)


def graphs() -> int:
    """Graphs that this process has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """The device to ourselves: other benchmarks on this machine that ask for it wait. They may compile meanwhile."""
    with (Path(tempfile.gettempdir()) / "bench_gpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def profiled(call: Callable[[], object], path: Path, rows: int = 50) -> dict[str, float]:
    """Write a table of what a call runs on the GPU; how many kernels and copies, their ms, and the ms of the call."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    kernels = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names: dict[str, list[float]] = {}
    for event in kernels:
        names.setdefault(event.name, []).append(event.device_time_total)
    busiest = sorted(names.items(), key=lambda item: -sum(item[1]))[:rows]
    lines = [
        f"{sum(us) / 1e3:10.3f} ms {len(us):6} x {sum(us) / len(us):10.1f} us  {name[:150]}" for name, us in busiest
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    busy = sum(event.device_time_total for event in kernels) / 1e3
    return {"launches": len(kernels), "device_ms": round(busy, 2), "wall_ms": round(1e3 * seconds, 2)}
