"""Test-time training: predictions per second, tokens computed per token predicted, and what it does to the score.

    PRESET=records/<...> python tests/bench/bench_ttt.py [--docs 64] [--mean 957]
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

import itertools
import json
import os
import unittest.mock
from pathlib import Path

import bench
import numpy as np
import torch

import train_gpt

DOCUMENTS, GPUS = 50_000, 8  # of the contest's evaluation


def random_lengths(count: int, mean: float) -> np.ndarray:
    """Log-normal lengths of documents (sigma 1, as of web text) with the given mean."""
    return np.maximum(2, np.random.default_rng(0).lognormal(np.log(mean) - 0.5, 1.0, count).astype(int))


def random_documents(vocab: int, count: int, mean: float) -> train_gpt.ValData:
    """Documents of random_lengths, each with its BOS."""
    lengths = random_lengths(count, mean)
    tokens = np.random.default_rng(1).integers(4, vocab, int(lengths.sum()))
    tokens[np.concatenate(([0], np.cumsum(lengths)[:-1]))] = train_gpt.BOS_ID
    return train_gpt.ValData(tokens, np.full(len(tokens), 3, np.int32))


def real_documents(val: train_gpt.ValData, count: int, shortest: int, longest: int) -> train_gpt.ValData:
    """`count` documents spread over a stream, of at least `shortest` predictions, cut to at most `longest`."""
    docs = [d for d in train_gpt.val_documents(val.tokens) if d[1] > shortest]
    chosen = [docs[i] for i in np.linspace(0, len(docs) - 1, min(count, len(docs))).astype(int)]
    spans = [np.arange(start, start + min(length - 1, longest)) for start, length in chosen]
    where = np.concatenate(spans)
    return train_gpt.ValData(val.tokens[where], val.bytes[where])


def token_counts(cfg: train_gpt.Config, docs: list[tuple[int, int]]) -> dict[str, float]:
    """Tokens per prediction: forward and backward of rows that learn, without padding; all that is computed with
    gradient, padding included; and computed without gradient. Kept: as published, finished rows stay in their batch."""

    def shapes(
        val: None,
        documents: np.ndarray,
        begin: object,
        first: object,
        length: object,
        offset: object,
        lesson: train_gpt.Lesson,
    ) -> tuple[int, int, int]:
        return len(documents), lesson.cols.stop, len(lesson.rows)

    context = train_gpt.TTT_CONTEXTS[cfg.ttt_context]
    batches, real, padded, without, kept = context.batches(docs, cfg.ttt_batch_size), 0, 0, 0, 0
    # only the shapes of the steps matter: their tokens are not read
    with unittest.mock.patch.object(train_gpt, "document_step", shapes):
        for rows, width, learners in context.steps(cfg, None, docs, iter(batches)):
            learning = 0 if cfg.ttt_lora_lr == 0 else learners
            real += width * learning
            padded += width * rows if learning else 0
            without += 0 if learning else width * rows
            kept += width * min(cfg.ttt_batch_size, len(docs))
    total = sum(length - 1 for _, length in docs)
    counts = {"grad_tokens": real, "grad_tokens_padded": padded, "other_tokens": without, "rows_kept": kept}
    return {f"{name}_per_prediction": round(count / total, 3) for name, count in counts.items()}


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


class Recorder(train_gpt.ByteMeter):
    """A meter that also adds the nats of each document, whose first tokens are at `starts`."""

    starts: np.ndarray
    nats: np.ndarray

    def add(self, cells: train_gpt.Cells, nll: torch.Tensor) -> None:
        """Count the scored cells."""
        super().add(cells, nll)
        found = nll.detach()[cells.rows, cells.cols].double().cpu().numpy()
        # the first token of a document is the last target of the one before
        np.add.at(Recorder.nats, np.searchsorted(Recorder.starts, cells.scored()) - 1, found)


def evaluate(cfg: train_gpt.Config, runtime: train_gpt.Runtime, model: train_gpt.GPT, val: train_gpt.ValData) -> tuple:
    """As train_gpt.Evaluator: the score, and the seconds until the learner was made. It compiles while others have the
    device, and evaluates alone."""
    evaluator = train_gpt.EVALS[cfg.eval]
    learner, seconds = bench.timed(evaluator.learner, cfg, runtime, model, val)
    with bench.alone():
        meter = train_gpt.ByteMeter(val, runtime, cfg.allow_noncausal)
        train_gpt.score_first(evaluator.steps(cfg, runtime, val), learner, meter)
        return meter.close(), seconds


def profile_steps(
    cfg: train_gpt.Config, runtime: train_gpt.Runtime, model: train_gpt.GPT, val: train_gpt.ValData, path: Path
) -> dict[str, float]:
    """Kernels of the 41st to 43rd step of a stream, by bench.profiled."""
    evaluator, meter = train_gpt.EVALS[cfg.eval], train_gpt.ByteMeter(val, runtime, cfg.allow_noncausal)
    learner, steps = evaluator.learner(cfg, runtime, model, val), iter(evaluator.steps(cfg, runtime, val))
    with bench.alone():
        train_gpt.score_first(itertools.islice(steps, 40), learner, meter)
        few = itertools.islice(steps, 3)
        return bench.profiled(lambda: train_gpt.score_first(few, learner, meter), path)


def measure(
    cfg: train_gpt.Config, val: train_gpt.ValData, state: dict[str, torch.Tensor] | None, table: Path | None
) -> dict[str, object]:
    """One evaluation of a stream: the row that is printed, without its name. No state: random weights."""
    runtime = train_gpt.Runtime.start(cfg, {})
    model, docs = bench.model_of(cfg, runtime, state), train_gpt.val_documents(val.tokens)
    if state is not None:
        train_gpt.ByteMeter, Recorder.nats = Recorder, np.zeros(len(docs))
        Recorder.starts = np.array([start for start, _ in docs])
    score, seconds = evaluate(cfg, runtime, model, val)
    row = {
        "eval": cfg.eval,
        "legal": score.legal,
        "context": cfg.ttt_context,
        "chunk": train_gpt.format_knob(cfg.ttt_chunk_size),
        "lr": cfg.ttt_lora_lr,
        "docs": len(docs),
        "predictions": score.tokens,
        "seconds": round(score.seconds, 2),
        "compile_seconds": round(seconds, 2),
        "graphs": bench.graphs(),
        "predictions_per_second": round(score.tokens / score.seconds, 1),
        **(token_counts(cfg, docs) if "lora" in cfg.eval else {}),
        "device": torch.cuda.get_device_name() if runtime.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    if runtime.device.type == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 1)
        row |= projection(cfg, row, len(val.tokens) / len(docs)) if "lora" in cfg.eval else {}
    if table:
        row["three_steps"] = profile_steps(cfg, runtime, model, val, table)
    if state is not None:
        size = [int(val.bytes[start + 1 : start + length].sum()) for start, length in docs]
        row |= {"bpb": score.val_bpb, "doc_nats": Recorder.nats.round(4).tolist(), "doc_bytes": size}
    return row


def compare(rows: list[dict[str, object]], draws: int = 4000) -> None:
    """The table of some rows."""
    bases = [row for row in rows if row["context"] == "recompute" and "lora" in row["eval"]] or rows[:1]
    picks = np.random.default_rng(0).integers(0, rows[0]["docs"], (draws, rows[0]["docs"]))
    size = np.array(rows[0]["doc_bytes"])[picks].sum(1) * np.log(2)
    columns = "legal", "bpb", "difference [95 %]", "to", "grad-tokens / prediction (padded)", "seconds"
    bench.head("variant", *columns)
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
    parser.add_argument("--mean", type=float, default=957.0, help="mean length of random documents, tokens")
    parser.add_argument("--model", default="", help="trained weights: model.bin, or model.pt")
    parser.add_argument("--shortest", type=int, default=192, help="predictions of the shortest real document")
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
    for variant in args.variants:
        changes = dict(change.split("=", 1) for change in variant.split())
        usual = {"EVAL": "doc_lora"} if args.model else {}
        if args.model and "lora" in changes.get("EVAL", "doc_lora"):
            usual["TTT_CONTEXT"] = "carry"
        cfg = train_gpt.load_config(knobs | usual | changes)
        if args.model:
            state, val = bench.read_weights(Path(args.model)), train_gpt.load_val(cfg)
            val = real_documents(val, args.docs, args.shortest, args.longest)
        else:
            state, val = None, random_documents(cfg.vocab_size, args.docs, args.mean)
        table = args.profile / f"ttt_{cfg.ttt_context}.txt" if args.profile else None
        row = {"variant": variant} | measure(cfg, val, state, table)
        if args.out:
            with args.out.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
        print(json.dumps({k: v for k, v in row.items() if not k.startswith("doc_")}), flush=True)


if __name__ == "__main__":
    main()
