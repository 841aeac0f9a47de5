"""What the benchmarks share: where the program is, arguments, clocks, tables in Markdown, models and data of a run."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "data")]

import train_gpt  # noqa: E402  (the line above finds it)

Weights = dict[str, Tensor]
RUNTIME = train_gpt.Runtime(0, 1, torch.device("cpu"), train_gpt.Log(None, True))


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


def head(*names: str, title: str = "") -> None:
    """The head of a table."""
    print(f"\n{title}\n" if title else "")
    row(*names)
    print("|" + "---|" * len(names))


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


def validation(cfg: train_gpt.Config, targets: int) -> train_gpt.ValData:
    """The first targets of the validation stream."""
    val = train_gpt.load_val(cfg)
    return train_gpt.ValData(val.tokens[: targets + 1], val.bytes[: targets + 1])
