"""A really trained small model of real text, for the benchmarks that need one: data, preset and run in one folder.

    python tests/bench/small_model.py --out FOLDER [--steps 300] [data/prepare.py's arguments, its first form]

Without such arguments the text is the prose that Python carries, with 1,024 pieces and 16 documents of validation.
Leaves FOLDER/data (shards), FOLDER/record.env (the preset: `PRESET=FOLDER`) and FOLDER/run (model.pt, hessians.pt,
model.bin, result.json). Half an hour on two processors by default; what is already there is kept, so that several
benchmarks share one model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bench

SAMPLE = ["sample", "--vocab-size", "1024", "--val-docs", "16"]
# about 4 million weights with everything of the CaseOps stack that a CPU can train in minutes
KNOBS = """
NUM_LAYERS=6 MODEL_DIM=256 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=3.0 XSA_LAST_N=6 ATTN_GATE=sparse EMBED_EXTRAS=smear
NUM_LOOPS=1 LOOP_START=2 LOOP_END=3 ENABLE_LOOPING_AT=0.6 PARALLEL_START_LAYER=4
TRAIN_SEQ_LEN=1024 EVAL_SEQ_LEN=1024 TRAIN_BATCH_TOKENS=8192 BATCH_SLICES=2 VAL_BATCH_TOKENS=16384
MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=1 TRAIN_LOG_EVERY=10 MUON_MOMENTUM_WARMUP_STEPS=150 EMA_DECAY=0.95
GPTQ_CALIBRATION_BATCHES=16 EVAL=plain
TTT_LORA_RANK=32 TTT_LORA_ALPHA=48 TTT_LORA_LR=0.003 TTT_EVAL_SEQ_LEN=1024 TTT_BATCH_SIZE=16
"""


def main() -> None:
    """Prepare and train what is not there yet."""
    parser = bench.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of 8,192 tokens")
    parser.add_argument("--out", type=Path, required=True)
    args, preparation = parser.parse_known_args()
    data, manifest = args.out / "data", args.out / "data/manifest.json"
    if not manifest.is_file():
        command = [str(bench.ROOT / "data/prepare.py"), *(preparation or SAMPLE), "--out", str(data)]
        subprocess.run([sys.executable, *command], check=True)
    if not (args.out / "run/result.json").is_file():
        pieces = json.loads(manifest.read_text(encoding="utf-8"))["tokenizer"]["vocab_size"]
        preset = "\n".join([*KNOBS.split(), f"VOCAB_SIZE={pieces}", f"ITERATIONS={args.steps}", ""])
        (args.out / "record.env").write_text(preset, encoding="utf-8")
        env = os.environ | {"PRESET": str(args.out), "DATA_PATH": str(data), "ARTIFACT_DIR": str(args.out / "run")}
        subprocess.run([sys.executable, str(bench.ROOT / "train_gpt.py")], env=env, check=True)


if __name__ == "__main__":
    main()
