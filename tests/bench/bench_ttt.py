"""Test-time training: predictions per second, tokens computed per token predicted, and what it does to the score.

    PRESET=records/<...> python tests/bench/bench_ttt.py [--docs 64] [--profile FOLDER]
    PRESET=FOLDER DATA_PATH=FOLDER/data python tests/bench/bench_ttt.py --model FOLDER/run/model.bin --out rows.jsonl \\
        --variants "TTT_LORA_LR=0" "TTT_CONTEXT=recompute" "TTT_CHUNK_SIZE=48" "TTT_CHUNK_SIZE=24 TTT_LORA_LR=2e-3"
    python tests/bench/bench_ttt.py --compare rows.jsonl

Without --model: random weights and random documents of log-normal length; knobs from the environment as for
train_gpt.py. The counts of tokens are exact for the given lengths; the seconds mean something on a GPU only, where
they are also projected to 50,000 documents on 8 of them, by the tokens that those cost. One JSON line for each variant;
with no --variants, one for TTT_CONTEXT=recompute and one for carry.

With --model: a really trained model (tests/bench/small_model.py makes FOLDER) on real documents, every k-th of the
validation stream, cut to --longest predictions. Each variant is a list of knobs over EVAL=doc_lora TTT_CONTEXT=carry;
its row goes to --out when it is done, so that several processes can fill one file. --compare makes the table: bits per
byte and the difference to the recomputing variant of the same learning rate (else to the best one; without any, to the
first row), with a 95 % interval by bootstrap over the documents, 4,000 draws. Other evaluations can be variants too:
"EVAL=sliding" "EVAL=chunk_sgd" "EVAL=slot TTT_EPOCHS=0" "EVAL=slot TTT_EPOCHS=0 SLOT_CAUSAL=0 ALLOW_NONCAUSAL=1". The
last one, published SLOT, fits on the targets that it scores: what it gains over the causal one is no gain.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import unittest.mock
from pathlib import Path

import bench
import numpy as np
import torch
import ttt_rules

import train_gpt

DOCUMENTS, GPUS = 50_000, 8  # of the contest's evaluation
SHORTEST = 192  # predictions of a real document


def random_lengths(count: int, mean: float = bench.MEAN_DOCUMENT) -> np.ndarray:
    """Log-normal lengths of documents (sigma 1, as of web text)."""
    return np.maximum(2, np.random.default_rng(0).lognormal(np.log(mean) - 0.5, 1.0, count).astype(int))


def random_documents(vocab: int, count: int) -> train_gpt.ValData:
    """Documents of random_lengths, each with its BOS."""
    lengths = random_lengths(count)
    tokens = np.random.default_rng(1).integers(4, vocab, int(lengths.sum()))
    tokens[np.concatenate(([0], np.cumsum(lengths)[:-1]))] = train_gpt.BOS_ID
    return train_gpt.ValData(tokens, np.full(len(tokens), 3, np.int32))


def real_documents(val: train_gpt.ValData, count: int, longest: int) -> train_gpt.ValData:
    """`count` documents spread over a stream, of at least SHORTEST predictions, cut to at most `longest`."""
    docs = [d for d in train_gpt.val_documents(val.tokens) if d[1] > SHORTEST]
    chosen = [docs[i] for i in np.linspace(0, len(docs) - 1, min(count, len(docs))).astype(int)]
    spans = [np.arange(start, start + min(length - 1, longest)) for start, length in chosen]
    where = np.concatenate(spans)
    return train_gpt.ValData(val.tokens[where], val.bytes[where])


def token_counts(cfg: train_gpt.Config, docs: list[tuple[int, int]]) -> dict[str, float]:
    """Tokens per prediction: forward and backward of rows that learn, without padding; all that is computed with
    gradient, padding included; and computed without gradient. Kept: as published, finished rows stay in their batch."""

    def shapes(
        val: None, documents: np.ndarray, *spans: object, lesson: train_gpt.Lesson | None = None, **more: object
    ) -> tuple[int, int, int]:
        lesson = lesson or spans[-1]
        return len(documents), lesson.cols.stop, len(lesson.rows)

    context, counts = train_gpt.TTT_CONTEXTS[cfg.ttt_context], np.zeros(4, int)
    # only the shapes of the steps matter: their tokens are not read
    with unittest.mock.patch.object(train_gpt, "document_step", shapes):
        for rows, width, learners in context.steps(cfg, None, docs, iter(context.batches(docs, cfg.ttt_batch_size))):
            learning = 0 if cfg.ttt_lora_lr == 0 else learners
            kept = min(cfg.ttt_batch_size, len(docs))
            counts += [width * n for n in (learning, rows * (learning > 0), rows * (learning == 0), kept)]
    rates = (counts / sum(length - 1 for _, length in docs)).round(3).tolist()
    names = "grad_tokens", "grad_tokens_padded", "other_tokens", "rows_kept"
    return {f"{name}_per_prediction": rate for name, rate in zip(names, rates, strict=True)}


def projection(cfg: train_gpt.Config, row: dict, mean: float) -> dict[str, float]:
    """Seconds for the contest's documents, by their padded tokens and the padded tokens per second of a row."""
    lengths = random_lengths(DOCUMENTS, mean)
    counts = token_counts(cfg, [(0, int(length)) for length in lengths])
    names = "grad_tokens_padded_per_prediction", "other_tokens_per_prediction"
    speed = sum(row[name] for name in names) * row["predictions_per_second"]
    tokens = sum(counts[name] for name in names)
    seconds = tokens * int((lengths - 1).sum()) / GPUS / speed
    return {"tokens_per_second": round(speed), f"tokens_per_prediction_{DOCUMENTS}_docs": round(tokens, 3)} | {
        f"seconds_{DOCUMENTS}_docs_{GPUS}_gpus": round(seconds, 1)
    }


def measure(
    cfg: train_gpt.Config, val: train_gpt.ValData, state: bench.Weights | None, table: Path | None
) -> dict[str, object]:
    """One evaluation of a stream: the row that is printed, without its name. No state: random weights.

    As train_gpt.Evaluator, which compiles here while others have the device, and evaluates alone.
    """
    runtime, evaluator = train_gpt.Runtime.start(cfg, {}), train_gpt.EVALS[cfg.eval]
    model, docs = bench.model_of(cfg, runtime, state), train_gpt.val_documents(val.tokens)
    learner, seconds = bench.timed(evaluator.learner, cfg, runtime, model, val)
    meter = train_gpt.ByteMeter(val, runtime, cfg.allow_noncausal)
    with bench.alone(), ttt_rules.recorded() if state else contextlib.nullcontext({}) as scores:
        train_gpt.score_first(evaluator.steps(cfg, runtime, val), learner, meter)
        score = meter.close()
    row = {
        "eval": cfg.eval,
        "legal": score.legal,
        "context": cfg.ttt_context,
        "chunk": train_gpt.format_knob(cfg.ttt_chunk_size),
    }
    row |= {"lr": cfg.ttt_lora_lr, "docs": len(docs), "predictions": score.tokens, "seconds": round(score.seconds, 2)}
    row |= {"compile_seconds": round(seconds, 2), "graphs": bench.graphs()}
    row |= {"predictions_per_second": round(score.tokens / score.seconds, 1)} | bench.machine()
    row |= token_counts(cfg, docs) if "lora" in cfg.eval else {}
    if runtime.device.type == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 1)
        row |= projection(cfg, row, len(val.tokens) / len(docs)) if "lora" in cfg.eval else {}
    if table:  # of the 41st to 43rd step
        learner, steps = evaluator.learner(cfg, runtime, model, val), iter(evaluator.steps(cfg, runtime, val))
        meter = train_gpt.ByteMeter(val, runtime, cfg.allow_noncausal)
        with bench.alone():
            train_gpt.score_first(itertools.islice(steps, 40), learner, meter)
            few = itertools.islice(steps, 3)
            row["three_steps"] = bench.profiled(lambda: train_gpt.score_first(few, learner, meter), table)
    if state:
        own = [range(start + 1, start + length) for start, length in docs]
        nats = [round(sum(scores[position] for position in positions), 4) for positions in own]
        size = [int(val.bytes[positions.start : positions.stop].sum()) for positions in own]
        row |= {"bpb": score.val_bpb, "doc_nats": nats, "doc_bytes": size}
    return row


def compare(rows: list[dict[str, object]], draws: int = 4000) -> None:
    """The table of some rows."""
    bases = [row for row in rows if row["context"] == "recompute" and "lora" in row["eval"]] or rows[:1]
    picks = np.random.default_rng(0).integers(0, rows[0]["docs"], (draws, rows[0]["docs"]))
    size = np.array(rows[0]["doc_bytes"])[picks].sum(1) * np.log(2)
    columns = "legal", "bpb", "difference [95 %]", "to", "grad-tokens / prediction (padded)", "seconds"
    bench.table("", ("variant", *columns))
    for row in rows:
        assert row["doc_bytes"] == rows[0]["doc_bytes"], "rows of different documents"
        base = next((b for b in bases if b["lr"] == row["lr"]), min(bases, key=lambda b: b["bpb"]))
        gaps = (np.array(row["doc_nats"]) - np.array(base["doc_nats"]))[picks].sum(1) / size
        low, high = np.quantile(gaps, [0.025, 0.975])
        legal, work = "yes" if row["legal"] else "NO", "-"
        if "lora" in row["eval"]:
            work = f"{row['grad_tokens_per_prediction']:.2f} ({row['grad_tokens_padded_per_prediction']:.2f})"
        gap = f"{row['bpb'] - base['bpb']:+.5f} [{low:+.5f}, {high:+.5f}]"
        bench.row(row["variant"], legal, f"{row['bpb']:.5f}", gap, base["variant"], work, f"{row['seconds']:.0f}")


def main() -> None:
    """Measure the variants, or compare what was measured."""
    parser = bench.arguments(__doc__)
    parser.add_argument("--docs", type=int, default=64, help="documents")
    parser.add_argument("--model", type=Path, help="trained weights: model.bin, or model.pt")
    parser.add_argument("--longest", type=int, default=1200, help="predictions at which real documents are cut")
    parser.add_argument("--variants", nargs="*", default=["TTT_CONTEXT=recompute", "TTT_CONTEXT=carry"])
    parser.add_argument("--out", type=Path, help="file that rows are added to")
    parser.add_argument("--profile", type=Path, help="folder for a table of the kernels of three steps")
    parser.add_argument("--compare", type=Path, help="print the table of such a file, and no more")
    args = parser.parse_args()
    if args.compare:
        compare([json.loads(line) for line in args.compare.read_text(encoding="utf-8").splitlines()])
        return
    knobs = {name: value for name, value in os.environ.items() if not args.model or name not in ("EVAL", "TTT_CONTEXT")}
    state = bench.read_weights(args.model) if args.model else None
    for variant in args.variants:
        changes = dict(change.split("=", 1) for change in variant.split())
        usual = {"EVAL": "doc_lora"} if args.model else {}
        if args.model and "lora" in changes.get("EVAL", "doc_lora"):
            usual["TTT_CONTEXT"] = "carry"
        cfg = train_gpt.load_config(knobs | usual | changes)
        if args.model:
            val = real_documents(train_gpt.load_val(cfg), args.docs, args.longest)
        else:
            val = random_documents(cfg.vocab_size, args.docs)
        table = args.profile / f"ttt_{cfg.ttt_context}.txt" if args.profile else None
        row = {"variant": variant} | measure(cfg, val, state, table)
        if args.out:
            with args.out.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
        print(json.dumps({k: v for k, v in row.items() if not k.startswith("doc_")}), flush=True)


if __name__ == "__main__":
    main()
