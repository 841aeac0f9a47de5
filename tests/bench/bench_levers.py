"""What each lever is worth that needs no new training: paired differences on one model, over documents.

    OMP_NUM_THREADS=1 python tests/bench/bench_levers.py RUN [--data SHARDS] [--docs 64] [--kl-docs 96] [--longest 512]
                                                         [--only WORD ...] [--set KNOB=VALUE ...]

RUN is the folder of a finished run (model.pt and record.env). A folder without model.pt becomes that of a new small
model first: tests/bench/small_model.py with no options, in RUN and RUN/run. Knobs: RUN's, then BASE, then --set.

Levers of the evaluation: the artifact of the first quantisation is scored on documents of the validation stream, cut to
--longest predictions, and each target's nats are compared with those of the other side of the lever: val_bpb. Levers of
the quantisation: KL(float model || quantised model), nats per token, at the bytes of the first quantisation (the real
coder's; ARTIFACT_BYTES finds the clips). Intervals: 95 %, paired bootstrap over documents, 10,000 draws. Documents are
held out; their number limits what can be seen, and a small model's levers need not be those of a full-size one.

Prints Markdown, row by row, then one JSON line. A lever is one line of EVALUATION or QUANTISATION.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import NamedTuple

import bench
import bench_ttt
import numpy as np
import torch
from bench import Weights

import train_gpt
from train_gpt import Config

DRAWS = 10_000
BASE = (
    "EVAL=doc_lora TTT_CONTEXT=recompute TTT_WARM_START_A=0 TTT_GRAD_STEPS=1 HINTS= CANONICAL_MASK=none "
    "SCORE_DTYPE=fp32 MATRIX_QUANT=gptq EMBED_QUANT=gptq REPAIR=none AWQ_LITE_ENABLED=0 FISHER_SCALES=0 "
    "ARTIFACT_BYTES=0 ROTATE=none COMPRESSOR=rans"
)
PHASED = "EVAL=phased_lora PHASED_TTT_NUM_PHASES="
TCQ = "MATRIX_QUANT=gptq_tcq EMBED_QUANT=gptq_tcq"
LQER = "REPAIR=lqer LQER_RANK=4 LQER_ASYM_GROUP=64 LQER_TOP_K=3"


class Lever(NamedTuple):
    """Knobs over BASE, as NAME=VALUE or NAME*FACTOR, and those of the side that they are compared with."""

    name: str
    knobs: str
    against: str = ""
    calibration: str = ""  # knobs of the calibration alone


EVALUATION = (
    Lever("test-time training at all", "", "TTT_LORA_LR=0"),
    Lever("canonical mask", "CANONICAL_MASK=eval"),
    Lever("fp32 logits", "", "SCORE_DTYPE=bf16"),
    Lever("weight decay .5", "TTT_WEIGHT_DECAY=.5", "TTT_WEIGHT_DECAY=1"),
    Lever("weight decay 2", "TTT_WEIGHT_DECAY=2", "TTT_WEIGHT_DECAY=1"),
    Lever("learning rate x .5", "TTT_LORA_LR*.5"),
    Lever("learning rate x .75", "TTT_LORA_LR*.75"),
    Lever("learning rate x 2", "TTT_LORA_LR*2"),
    Lever("sites no_qv", "TTT_LORA_SITES=k,attn,mlp,head"),
    Lever("sites no_k", "TTT_LORA_SITES=q,v,attn,mlp,head"),
    Lever("sites no_q", "TTT_LORA_SITES=k,v,attn,mlp,head"),
    Lever("sites no_v", "TTT_LORA_SITES=q,k,attn,mlp,head"),
    Lever("rank 96 -> 80, same alpha", "TTT_LORA_RANK*.8333"),
    Lever("rank x .5, same scale", "TTT_LORA_RANK*.5 TTT_LORA_ALPHA*.5"),
    Lever("rank x 2, same scale", "TTT_LORA_RANK*2 TTT_LORA_ALPHA*2"),
    Lever("chunks by length", "TTT_CHUNK_SIZE=256:8,2000:24,48", "TTT_CHUNK_SIZE=48"),
    Lever("copy", "HINTS=copy"),
    Lever("copy, without adaptation", "TTT_LORA_LR=0 HINTS=copy", "TTT_LORA_LR=0"),
    Lever("tilt", "HINTS=tilt"),
    Lever("tilt over copy", "HINTS=copy,tilt", "HINTS=copy"),
    Lever("context x 1.25", "TTT_EVAL_SEQ_LEN*1.25"),
    Lever("context x 1.5", "TTT_EVAL_SEQ_LEN*1.5"),
    Lever("context x 1.5, without adaptation", "TTT_LORA_LR=0 TTT_EVAL_SEQ_LEN*1.5", "TTT_LORA_LR=0"),
    Lever("one global phase", f"{PHASED}1"),
    Lever("one global phase for three", f"{PHASED}1", f"{PHASED}3"),
    Lever("carried keys and values", "TTT_CONTEXT=carry TTT_CHUNK_SIZE=48", "TTT_CHUNK_SIZE=48"),
    Lever("carried, chunk 24, rate x .7", "TTT_CONTEXT=carry TTT_CHUNK_SIZE=24 TTT_LORA_LR*.7", "TTT_CHUNK_SIZE=48"),
)
QUANTISATION = (
    Lever("embedding's Hessian of both uses", "", calibration="FISHER_SCALES=.75"),
    # how much of Fisher's gain a finer embedding has alone
    Lever("embedding finer: clip x .5", "EMBED_CLIP_SIGMAS*.5"),
    Lever("embedding finer: 8 bits, clip x .5", "EMBED_BITS=8 EMBED_CLIP_SIGMAS*.5"),
    Lever("the same, Hessian of both uses", "EMBED_BITS=8 EMBED_CLIP_SIGMAS*.5", "", "FISHER_SCALES=.75"),
    Lever("Fisher .75 over that", "FISHER_SCALES=.75", "EMBED_BITS=8 EMBED_CLIP_SIGMAS*.5"),
    Lever("row scales by Fisher, .5", "FISHER_SCALES=.5"),
    Lever("row scales by Fisher, .75", "FISHER_SCALES=.75"),
    Lever("row scales by Fisher, 1", "FISHER_SCALES=1"),
    Lever("trellis", TCQ),
    Lever("trellis and Fisher .75", f"{TCQ} FISHER_SCALES=.75"),
    Lever("trellis over Fisher .75", f"{TCQ} FISHER_SCALES=.75", "FISHER_SCALES=.75"),
    Lever("AWQ-lite", "AWQ_LITE_ENABLED=1"),
    Lever("AWQ-lite over Fisher .75", "FISHER_SCALES=.75 AWQ_LITE_ENABLED=1", "FISHER_SCALES=.75"),
    Lever("LQER rank 4, groups of 64, top 3", LQER),
    Lever("LQER rank 2, groups of 32, top 4", "REPAIR=lqer LQER_RANK=2 LQER_ASYM_GROUP=32 LQER_TOP_K=4"),
    Lever("LQER over Fisher .75", f"{LQER} FISHER_SCALES=.75", "FISHER_SCALES=.75"),
    Lever("damping 1e-4", "GPTQ_DAMP=1e-4"),
    Lever("damping 1e-4 over Fisher .75", "FISHER_SCALES=.75 GPTQ_DAMP=1e-4", "FISHER_SCALES=.75"),
    Lever("twice the calibration batches", "GPTQ_CALIBRATION_BATCHES*2"),
    Lever("the same over Fisher .75", "FISHER_SCALES=.75 GPTQ_CALIBRATION_BATCHES*2", "FISHER_SCALES=.75"),
)


class Side(NamedTuple):
    """What one side of a lever gave: a number (documents,), bytes of its artifact, seconds."""

    sums: np.ndarray
    bytes: int
    seconds: float


def by_document(val: train_gpt.ValData, position: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums (documents,) of what belongs to targets."""
    starts = [start for start, _ in train_gpt.val_documents(val.tokens)]
    # the first token of a document is the last target of the one before
    return np.bincount(np.searchsorted(starts, position) - 1, values, len(starts))


class Levers:
    """A model, its documents, and what was found of each configuration."""

    def __init__(self, environ: dict[str, str], state: Weights, args: argparse.Namespace) -> None:
        self.environ, self.state = environ, state
        self.base = train_gpt.load_config(environ)
        runtime = train_gpt.Runtime.start(self.base, {})
        self.runtime = dataclasses.replace(runtime, log=bench.RUNTIME.log)
        whole = train_gpt.load_val(dataclasses.replace(self.base, eval_include_tail=True))
        self.val, self.kl_val = (
            bench_ttt.real_documents(whole, count, args.shortest, args.longest) for count in (args.docs, args.kl_docs)
        )
        self.model = bench.model_of(self.base, self.runtime, state).eval()
        for method in ("hessians", "artifact", "copies", "nats", "divergence"):
            setattr(self, method, functools.cache(getattr(self, method)))

    def configured(self, knobs: str) -> Config:
        """The base with a lever's knobs; UserError if they do not fit it."""
        changes = {}
        for word in knobs.split():
            name, given, value = word.partition("=")
            if not given:
                name, _, factor = word.partition("*")
                before = getattr(self.base, name.lower())
                value = str(type(before)(round(before * float(factor), 0 if isinstance(before, int) else 9)))
            changes[name] = value
        return train_gpt.load_config(self.environ | changes)

    # Quantisation

    def hessians(self, cfg: Config) -> Weights:
        """Of the float model."""
        return train_gpt.collect_hessians(cfg, self.runtime, self.model)

    def artifact(self, cfg: Config, calibration: Config, size: int) -> tuple[int, Weights]:
        """Bytes of an artifact that fills `size` (0: of any size), and the weights in it."""
        # what the calibration depends on, so that others share it
        same = {name: getattr(calibration, name) for name in ("gptq_calibration_batches",)}
        seen = dataclasses.replace(self.base, fisher_scales=float(calibration.fisher_scales > 0), **same)
        pair = train_gpt.reparametrize(cfg, self.runtime, self.state, self.hessians(seen))
        run = types.SimpleNamespace(
            cfg=dataclasses.replace(cfg, artifact_bytes=size), runtime=self.runtime, log=self.runtime.log
        )
        stored = train_gpt.Run.filled(run, *pair)
        blob = train_gpt.pack_stored(stored, cfg.compressor, train_gpt.model_identity(cfg))
        return len(blob), train_gpt.dequantize(stored)

    def first(self) -> tuple[int, Weights]:
        """The artifact that the levers start from."""
        return self.artifact(self.base, self.base, 0)

    def divergence(self, cfg: Config, calibration: Config) -> Side:
        """KL sums of the model quantised to the bytes of the first artifact."""
        started, size = time.perf_counter(), self.first()[0]
        is_first = cfg == calibration == self.base
        size, weights = self.artifact(cfg, calibration, 0 if is_first else size)
        model = bench.model_of(cfg, self.runtime, weights).eval()
        learner = train_gpt.NoAdaptation(self.base, self.runtime, model, self.kl_val)
        found = np.zeros(len(self.kl_val.tokens))
        for cells, _ in train_gpt.plain_steps(self.base, self.runtime, self.kl_val):
            ids, _, meta = learner.inputs(cells)
            with torch.no_grad():
                p, q = (m(ids, None, meta).log_softmax(-1) for m in (self.model, model))
            kl = (p.exp() * (p - q)).sum(-1).cpu().numpy()
            found[cells.scored()] = kl[cells.rows, cells.cols]
        sums = by_document(self.kl_val, np.arange(1, len(found)), found[1:])
        return Side(sums, size, time.perf_counter() - started)

    # Evaluation

    def copies(self, cfg: Config) -> Weights:
        """The weights of copies, fitted on training tokens with the first artifact."""
        model = bench.model_of(cfg, self.runtime, self.first()[1])
        return {"copy_weights": train_gpt.fit_copies(cfg, self.runtime, model) / 256}

    def nats(self, cfg: Config) -> Side:
        """Nats of the documents, scored by the program."""
        size, state = self.first()
        if "copy" in cfg.hints:
            state = state | self.copies(dataclasses.replace(self.base, hints=("copy",)))
        model, started = bench.model_of(cfg, self.runtime, state), time.perf_counter()
        if train_gpt.MASKED_WHEN[cfg.canonical_mask]:
            model.canonical = train_gpt.checked_mask(cfg, self.val).to(self.runtime.device)
        with tempfile.TemporaryDirectory() as folder:
            cfg = dataclasses.replace(cfg, scores=f"{folder}/scores")
            train_gpt.EVALS[cfg.eval](cfg, self.runtime, model, self.val)
            position, nats, _ = np.load(f"{folder}/scores.0.npy").T
        return Side(by_document(self.val, position.astype(int), nats), size, time.perf_counter() - started)

    # Comparison

    def same(self, cfg: Config, other: Config) -> bool:
        """Whether both compute the same; no logits are narrower than fp32 activations."""
        wide = {"score_dtype": other.score_dtype} if self.runtime.dtype == torch.float32 else {}
        return dataclasses.replace(cfg, **wide) == other

    def compared(self, lever: Lever, side: str) -> dict[str, object]:
        """A lever's row: side "nats" or "divergence" of both its sides."""
        row = lever._asdict()
        try:
            cfg, other = self.configured(lever.knobs), self.configured(lever.against)
        except train_gpt.UserError as error:
            return row | {"not": str(error).splitlines()[0]}
        if side == "nats":
            if self.same(cfg, other):
                return row | {"not": "the same here"}
            before, after = self.nats(other), self.nats(cfg)
            units = by_document(self.val, np.arange(1, len(self.val.tokens)), self.val.bytes[1:] * np.log(2))
        else:
            calibration = self.configured(lever.calibration) if lever.calibration else cfg
            before, after = self.divergence(other, other), self.divergence(cfg, calibration)
            units = by_document(
                self.kl_val, np.arange(1, len(self.kl_val.tokens)), np.ones(len(self.kl_val.tokens) - 1)
            )
        picks = np.random.default_rng(0).integers(0, len(units), (DRAWS, len(units)))
        old, new, size = (sums[picks].sum(1) for sums in (before.sums, after.sums, units))
        row |= {"before": before.sums.sum() / units.sum(), "after": after.sums.sum() / units.sum()}
        row |= {
            "difference": row["after"] - row["before"],
            "interval": [*np.quantile((new - old) / size, (0.025, 0.975))],
        }
        row |= {"ratio": row["after"] / row["before"], "ratio_interval": [*np.quantile(new / old, (0.025, 0.975))]}
        return row | {"bytes": [before.bytes, after.bytes], "seconds": round(after.seconds, 1)}


def prepared(run: Path) -> tuple[Path, dict[str, str]]:
    """The folder of a run, and where its data are if it was trained here."""
    if (run / "model.pt").is_file():
        return run, {}
    command = [sys.executable, str(Path(__file__).with_name("small_model.py")), "--out", str(run)]
    subprocess.run(command, check=True)
    return run / "run", {"DATA_PATH": str(run / "data")}


def chosen(levers: tuple[Lever, ...], words: list[str]) -> list[Lever]:
    """Those whose name or knobs hold one of the words; all, if there are no words."""
    return [lever for lever in levers if not words or any(word in f"{lever.name} {lever.knobs}" for word in words)]


def main() -> None:
    """Both tables."""
    parser = bench.arguments(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", help="folder with the shards; default: DATA_PATH")
    parser.add_argument("--docs", type=int, default=64, help="documents for the evaluation")
    parser.add_argument("--kl-docs", type=int, default=96, help="documents for the quantisation")
    parser.add_argument("--shortest", type=int, default=64, help="predictions of the shortest document")
    parser.add_argument("--longest", type=int, default=512, help="predictions at which documents are cut")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="levers with a word in name or knobs")
    parser.add_argument("--set", nargs="*", default=[], metavar="KNOB=VALUE")
    args = parser.parse_args()
    run, data = prepared(args.run)
    environ = {**os.environ, **data, "PRESET": str(run)} | ({"DATA_PATH": args.data} if args.data else {})
    environ |= dict(word.split("=", 1) for word in [*BASE.split(), *args.set])
    levers = Levers(environ, bench.read_weights(run / "model.pt"), args)
    rows = []
    for title, table, side, scale in (
        (
            f"KL(float || quantised) in 1e-3 nats per token, at equal bytes; {args.kl_docs} documents",
            QUANTISATION,
            "divergence",
            1e3,
        ),
        (f"val_bpb; {args.docs} documents", EVALUATION, "nats", 1.0),
    ):
        wanted = chosen(table, args.only)
        if wanted:
            bench.head(
                "lever", "against", "before", "after", "difference [95 %]", "ratio [95 %]", "bytes", "s", title=title
            )
        for lever in wanted:
            row = levers.compared(lever, side)
            rows.append(row)
            if "not" in row:
                bench.row(lever.name, lever.against or "base", "-", "-", f"n/a: {row['not']}", "-", "-", "-")
                continue
            digits = 3 if side == "divergence" else 5
            low, high = (scale * x for x in row["interval"])
            gap = f"{scale * row['difference']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            ratio = "{:.3f} [{:.3f}, {:.3f}]".format(row["ratio"], *row["ratio_interval"])
            ends = (f"{scale * row[key]:.{digits}f}" for key in ("before", "after"))
            sizes = "{:,} -> {:,}".format(*row["bytes"])
            bench.row(lever.name, lever.against or "base", *ends, gap, ratio, sizes, f"{row['seconds']:.0f}")
    bench.say(run=levers.base.seed, docs=args.docs, kl_docs=args.kl_docs, tokens=len(levers.val.tokens), levers=rows)


if __name__ == "__main__":
    main()
