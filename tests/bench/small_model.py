"""A really trained small model of real text, for the benchmarks that need one: data, preset and run in one folder.

    python tests/bench/small_model.py --docs VAL.jsonl.xz TRAIN.jsonl.xz --val-docs 284 --tokenizer MODEL --out FOLDER
    python tests/bench/small_model.py --out FOLDER          the prose that Python carries, with a tokenizer of its own

Leaves FOLDER/data (shards), FOLDER/record.env (the preset: `PRESET=FOLDER`) and FOLDER/run (model.pt, hessians.pt,
model.bin, result.json). The first --val-docs documents are for validation. Half an hour on two processors by default
(--steps); what is already there is kept, so that several benchmarks share one model.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import bench

# about 4 million weights with everything of the CaseOps stack that a CPU can train in minutes
KNOBS = """
NUM_LAYERS=6 MODEL_DIM=256 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=3.0 XSA_LAST_N=6 ATTN_GATE=sparse EMBED_EXTRAS=smear
NUM_LOOPS=1 LOOP_START=2 LOOP_END=3 ENABLE_LOOPING_AT=0.6 PARALLEL_START_LAYER=4
TRAIN_SEQ_LEN=1024 EVAL_SEQ_LEN=1024 TRAIN_BATCH_TOKENS=8192 BATCH_SLICES=2 VAL_BATCH_TOKENS=16384
MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=1 TRAIN_LOG_EVERY=10 MUON_MOMENTUM_WARMUP_STEPS=150 EMA_DECAY=0.95
GPTQ_CALIBRATION_BATCHES=16 EVAL=plain
TTT_LORA_RANK=32 TTT_LORA_ALPHA=48 TTT_LORA_LR=0.003 TTT_EVAL_SEQ_LEN=1024 TTT_BATCH_SIZE=16
"""


def prepare(args: argparse.Namespace, data: Path) -> None:
    """Shards and tokenizer in `data`."""
    if (data / "manifest.json").is_file():
        return
    source = ["--docs", *args.docs, "--val-docs", str(args.val_docs)] if args.docs else ["sample"]
    pieces = ["--tokenizer", args.tokenizer] if args.tokenizer else ["--vocab-size", str(args.vocab_size)]
    command = [sys.executable, str(bench.ROOT / "data/prepare.py"), *source, "--out", str(data), *pieces]
    subprocess.run(command, check=True)


def train(args: argparse.Namespace) -> None:
    """Preset and run folder."""
    knobs = [*KNOBS.split(), f"VOCAB_SIZE={args.vocab_size}", f"ITERATIONS={args.steps}"]
    preset = "".join(f"{knob}\n" for knob in knobs)
    (args.out / "record.env").write_text(preset, encoding="utf-8")
    places = {"PRESET": args.out, "DATA_PATH": args.out / "data", "ARTIFACT_DIR": args.out / "run"}
    env = os.environ | {name: str(path) for name, path in places.items()}
    subprocess.run([sys.executable, str(bench.ROOT / "train_gpt.py")], env=env, check=True)


def main() -> None:
    """Prepare and train what is not there yet."""
    parser = bench.arguments(__doc__)
    parser.add_argument("--docs", nargs="*", default=[], help="documents, those of validation first")
    parser.add_argument("--val-docs", type=int, default=16, help="documents of validation")
    parser.add_argument("--tokenizer", default="", help="SentencePiece model; default: one is trained")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of 8,192 tokens")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prepare(args, args.out / "data")
    if not (args.out / "run/result.json").is_file():
        train(args)


if __name__ == "__main__":
    main()
