"""Test-time training by chunks on real text: none, causal SLOT and published SLOT, each without and with chunk SGD.

    python tests/bench/bench_slot.py RUN --data SHARDS [--tokens 32768]

RUN is the folder of any finished run (record.env, model.bin); SHARDS its data. Knobs from the environment go before
those of the run: EVAL_STRIDE, VAL_BATCH_TOKENS, TTT_CHUNK_TOKENS, TTT_LR, SLOT_LR ... Only the first --tokens targets
of the validation stream are scored, the same in every row. The published SLOT fits on the targets that it scores: what
it gains over the causal one is no gain.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt

ROWS = {  # what is compared: knobs over those of the run
    "sliding windows": {"EVAL": "sliding"},
    "causal SLOT": {"EVAL": "slot", "TTT_EPOCHS": "0"},
    "published SLOT": {"EVAL": "slot", "TTT_EPOCHS": "0", "SLOT_CAUSAL": "0", "ALLOW_NONCAUSAL": "1"},
    "chunk SGD": {"EVAL": "chunk_sgd"},
    "chunk SGD + causal SLOT": {"EVAL": "slot"},
    "chunk SGD + published SLOT": {"EVAL": "slot", "SLOT_CAUSAL": "0", "ALLOW_NONCAUSAL": "1"},
}


def per_target(meter_add: object) -> dict[int, float]:
    """Nats by position of every score that a meter counts from now on."""
    scores: dict[int, float] = {}

    def listen(meter: train_gpt.ByteMeter, cells: train_gpt.Cells, nll: torch.Tensor) -> None:
        meter_add(meter, cells, nll)
        scores.update(zip(cells.scored().tolist(), nll[cells.rows, cells.cols].tolist(), strict=True))

    train_gpt.ByteMeter.add = listen
    return scores


def main() -> None:
    """Score every row and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder with record.env and model.bin")
    parser.add_argument("--data", type=Path, required=True, help="its shards")
    parser.add_argument("--tokens", type=int, default=32_768, help="targets that are scored")
    args = parser.parse_args()
    base = os.environ | {"PRESET": str(args.run), "DATA_PATH": str(args.data)}
    cfg = train_gpt.load_config(base | ROWS["sliding windows"])
    runtime = train_gpt.Runtime.start(cfg, {})
    val = train_gpt.load_val(cfg)
    val = train_gpt.ValData(val.tokens[: args.tokens + 1], val.bytes[: args.tokens + 1])
    model = train_gpt.GPT(cfg, train_gpt.choose_attention(cfg, runtime), runtime.dtype).to(runtime.device)
    train_gpt.fill_model(model, train_gpt.load_artifact(args.run / "model.bin"), str(args.run))
    model.set_looping(train_gpt.loops(cfg))
    runtime.log(f"{len(val.tokens) - 1:,} targets, {train_gpt.versions(runtime)}")
    add, table, first = train_gpt.ByteMeter.add, [], None
    for name, knobs in ROWS.items():
        scores = per_target(add)
        row = train_gpt.load_config(base | knobs)
        score = train_gpt.EVALS[row.eval](row, runtime, model, val)
        values = torch.tensor([scores[p] for p in sorted(scores)], dtype=torch.float64)
        first = values if first is None else first
        bits = 1 / math.log(2) / score.bytes  # a nat of one target in bits per byte
        gain, error = (values - first).sum() * bits, (values - first).std() * len(values) ** 0.5 * bits
        table.append(
            f"| {name} | {'yes' if score.legal else 'NO'} | {score.val_bpb:.5f} | {gain:+.5f} | {error:.5f} "
            f"| {score.seconds:.0f} |"
        )
        runtime.log(table[-1])
    runtime.log(
        "\n| evaluation | legal | val_bpb | against sliding | its standard error | seconds |\n|---|---|---|---|---|---|"
    )
    runtime.log("\n".join(table))


if __name__ == "__main__":
    main()
