"""Fixtures that the test files share: tiny data of seeded words, and runs of the program as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import prepare
import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = {  # a preset-sized model that trains in seconds on one core
    "VOCAB_SIZE": "320",
    "NUM_LAYERS": "5",
    "MODEL_DIM": "32",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "MLP_MULT": "2.0",
    "ROPE_DIMS": "4",
    "ATTN_GATE": "sparse",
    "EMBED_EXTRAS": "smear",
    "LOOP_START": "1",
    "LOOP_END": "2",
    "NUM_LOOPS": "1",
    "PARALLEL_START_LAYER": "3",
    "XSA_LAST_N": "5",
    "TRAIN_SEQ_LEN": "64",
    "EVAL_SEQ_LEN": "64",
    "TTT_EVAL_SEQ_LEN": "64",
    "TRAIN_BATCH_TOKENS": "512",
    "VAL_BATCH_TOKENS": "512",
    "BATCH_SLICES": "4",
    "ITERATIONS": "8",
    "MAX_WALLCLOCK_SECONDS": "0",
    "WARMUP_STEPS": "1",
    "TRAIN_LOG_EVERY": "2",
    "GPTQ_CALIBRATION_BATCHES": "4",
    "TTT_LORA_RANK": "4",
    "TTT_LORA_ALPHA": "6",
    "TTT_LORA_LR": "0.003",
    "TTT_CHUNK_SIZE": "16",
    "TTT_BATCH_SIZE": "3",
}


def listener(function: Callable, sites: str = "q k v qkv o up down head attn mlp") -> Callable:
    """A function (or partial) as a listener at some sites of the model, by default at all of them."""
    function.sites = frozenset(sites.split())
    return function


def words(seed: int, count: int) -> str:
    """`count` words of a small vocabulary with seeded repetition, so that a model has something to learn."""
    stems = "river stone Light under carry window morning paper Quiet seven garden letter".split()
    state, out = seed * 2654435761 % 2**32 + 1, []
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        out.append(stems[(state >> 16) % len(stems)] + ("." if state % 11 == 0 else ""))
    return " ".join(out)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data directory: 320 pieces, 7 validation documents of unequal length, 90 for training."""
    folder = tmp_path_factory.mktemp("data")
    docs = folder / "docs"
    docs.mkdir()
    for i in range(97):
        (docs / f"{i:03d}.txt").write_text(words(i + 1, 12 + 37 * i % 160), encoding="utf-8")
    out = folder / "shards"
    argv = ["--docs", str(docs), "--out", str(out), "--vocab-size", "320", "--val-docs", "7", "--jobs", "1"]
    assert prepare.main(argv) == 0
    return out


@pytest.fixture
def run_gpt(tiny_data: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run train_gpt.py as a user would: knobs as keyword arguments over TINY; ranks > 1 goes through torchrun."""

    def run(*args: str, ranks: int = 1, **knobs: object) -> subprocess.CompletedProcess:
        env = {k: v for k, v in os.environ.items() if k not in ("PRESET", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
        env |= TINY | {"DATA_PATH": str(tiny_data), "ARTIFACT_DIR": str(tmp_path / "run"), "OMP_NUM_THREADS": "1"}
        env |= {key: str(value) for key, value in knobs.items()}
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launcher, str(ROOT / "train_gpt.py"), *args]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run
