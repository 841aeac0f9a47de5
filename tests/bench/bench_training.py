"""What each lever of the training is worth: paired differences of pre-quantisation bits per byte over seeds.

    OMP_NUM_THREADS=1 python tests/bench/bench_training.py SHARDS --out FOLDER [--seeds 1 2 3] [--only WORD ...]
                                                           [--set KNOB=VALUE ...]

SHARDS: a folder with shards of 1,024 pieces. Trains a very small model with the base knobs and with each lever, once
with each seed, in FOLDER/<lever>-<seed>; a run that is there is not trained again. Such models, and 0.7 million tokens
of training, show signs only. Intervals: 95 %, Student's t over the seeds. Prints Markdown, then one JSON line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bench
import numpy as np
from scipy import stats

BASE = """
VOCAB_SIZE=1024 NUM_LAYERS=6 MODEL_DIM=96 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=3.0 XSA_LAST_N=6 ATTN_GATE=sparse
EMBED_EXTRAS=smear NUM_LOOPS=1 LOOP_START=2 LOOP_END=4 ENABLE_LOOPING_AT=0.5 PARALLEL_START_LAYER=5
TRAIN_SEQ_LEN=256 EVAL_SEQ_LEN=256 TRAIN_BATCH_TOKENS=4096 BATCH_SLICES=1 VAL_BATCH_TOKENS=16384 ITERATIONS=180
MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=1 TRAIN_LOG_EVERY=60 MUON_MOMENTUM_WARMUP_STEPS=60 EMA_DECAY=0.95
SEQ_CHANGE_WARMUP_STEPS=4 GPTQ_CALIBRATION_BATCHES=1 EVAL=plain TTT_EVAL_SEQ_LEN=256 OVERWRITE=1
MATRIX_LR=0.026 WARMDOWN_FRAC=0.75 MLP_SLOPE=0.5
"""
PUBLISHED_MIX = (  # PR 1779: of each looped layer its beta, then its alphas
    "1.59375,.251953125,-.02099609375,-.01239013671875,1.8828125,.06689453125,-.34765625,.0031280517578125,"
    "1.9921875,.138671875,.2412109375,.0272216796875"
)
LEVERS = {
    "spans by schedule": "TRAIN_SEQ_SCHEDULE=64@0.1,128@0.7",
    "mix of the looped layers": f"LOOP_MIX={PUBLISHED_MIX}",
    "learning rate .028, against .026": "MATRIX_LR=.028",
    "decay over .85, against .75": "WARMDOWN_FRAC=.85",
    "negative slope .3, against .5": "MLP_SLOPE=.3",
}


def trained(folder: Path, knobs: list[str]) -> float:
    """Bits per byte of a run before quantisation; it is trained if it is not there."""
    if not (folder / "result.json").is_file():
        environ = os.environ | dict(knob.split("=", 1) for knob in knobs) | {"ARTIFACT_DIR": str(folder)}
        command = [sys.executable, str(bench.ROOT / "train_gpt.py")]
        subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))["stages"]["pre_quant"]["val_bpb"]


def main() -> None:
    """All seeds of the base, then lever by lever."""
    parser = bench.arguments(__doc__)
    parser.add_argument("shards")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="*", default=[""], metavar="WORD", help="levers with a word in name or knobs")
    parser.add_argument("--set", nargs="*", default=[], metavar="KNOB=VALUE")
    args = parser.parse_args()
    common, rows = [*BASE.split(), f"DATA_PATH={args.shards}", *args.set], []
    chosen = {name: knobs for name, knobs in LEVERS.items() if any(word in f"{name} {knobs}" for word in args.only)}
    bench.table(f"pre-quantisation val_bpb, seeds {args.seeds}", ("lever", "knobs", "base", "with it", "difference"))
    for number, (name, lever) in enumerate({"base": "", **chosen}.items()):
        stem = lever.partition(",")[0] or "base"
        runs = ((args.out / f"{stem}-{seed}", [*common, *lever.split(), f"SEED={seed}"]) for seed in args.seeds)
        scores = np.array([trained(*run) for run in runs])
        if number == 0:
            base = scores
            continue
        gaps = scores - base
        low, high = stats.t.interval(0.95, len(gaps) - 1, gaps.mean(), stats.sem(gaps)) if len(gaps) > 1 else (0, 0)
        rows.append({"name": name, "knobs": lever, "base": base.tolist(), "scores": scores.tolist()})
        cells = f"{base.mean():.4f}", f"{scores.mean():.4f}", f"{gaps.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
        bench.row(name, lever, *cells)
    bench.say(levers=rows, seeds=args.seeds)


if __name__ == "__main__":
    main()
