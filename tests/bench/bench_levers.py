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
import re
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bench
import bench_ttt
import numpy as np
import torch
from bench import Weights

import train_gpt
from train_gpt import Config

DRAWS = 10_000
BASE = (
    "EVAL=doc_lora TTT_CONTEXT=recompute TTT_WARM_START_A=0 HINTS= CANONICAL_MASK=none SCORE_DTYPE=fp32 "
    "MATRIX_QUANT=gptq EMBED_QUANT=gptq REPAIR=none AWQ_LITE_ENABLED=0 FISHER_SCALES=0 ARTIFACT_BYTES=0 ROTATE=none "
    "COMPRESSOR=rans EVAL_INCLUDE_TAIL=1"
)
PHASED = "EVAL=phased_lora PHASED_TTT_NUM_PHASES="
CARRY = "TTT_CONTEXT=carry TTT_CHUNK_SIZE="
TCQ = "MATRIX_QUANT=gptq_tcq EMBED_QUANT=gptq_tcq"
GPTAQ = "FISHER_SCALES=.75 GPTAQ_BATCHES=8"
LQER = "REPAIR=lqer LQER_RANK=4 LQER_ASYM_GROUP=64 LQER_TOP_K=3"


class Lever(NamedTuple):
    """Knobs over BASE, as NAME=VALUE or NAME*FACTOR, and those of the side that they are compared with."""

    name: str
    knobs: str
    against: str = ""
    fisher_hessians: bool = False  # from a calibration for FISHER_SCALES, whatever that is


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
    Lever("carried keys and values", f"{CARRY}48", "TTT_CHUNK_SIZE=48"),
    Lever("carried, chunk 24, rate x .7", f"{CARRY}24 TTT_LORA_LR*.7", "TTT_CHUNK_SIZE=48"),
    Lever("carried, 16 for 24", f"{CARRY}16 TTT_LORA_LR*.55", f"{CARRY}24 TTT_LORA_LR*.7"),
)
QUANTISATION = (
    Lever("embedding's Hessian of both uses", "", fisher_hessians=True),
    # how much of Fisher's gain a finer embedding has alone
    Lever("embedding finer: clip x .5", "EMBED_CLIP_SIGMAS*.5"),
    Lever("embedding finer: 8 bits, clip x .5", "EMBED_BITS=8 EMBED_CLIP_SIGMAS*.5"),
    Lever("the same, Hessian of both uses", "EMBED_BITS=8 EMBED_CLIP_SIGMAS*.5", "", True),
    Lever("Fisher .75 over that", "FISHER_SCALES=.75", "EMBED_BITS=8 EMBED_CLIP_SIGMAS*.5"),
    Lever("row scales by Fisher, .5", "FISHER_SCALES=.5"),
    Lever("row scales by Fisher, .75", "FISHER_SCALES=.75"),
    Lever("row scales by Fisher, 1", "FISHER_SCALES=1"),
    Lever("trellis", TCQ),
    Lever("trellis and Fisher .75", f"{TCQ} FISHER_SCALES=.75"),
    Lever("trellis over Fisher .75", f"{TCQ} FISHER_SCALES=.75", "FISHER_SCALES=.75"),
    Lever("asymmetric calibration over both", f"{TCQ} {GPTAQ}", f"{TCQ} FISHER_SCALES=.75"),
    Lever("tuned over both", f"{TCQ} FISHER_SCALES=.75 TUNE_STEPS=48", f"{TCQ} FISHER_SCALES=.75"),
    Lever("tuned over all", f"{TCQ} {GPTAQ} TUNE_STEPS=48", f"{TCQ} {GPTAQ}"),
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


def by_document(val: train_gpt.ValData, values: np.ndarray) -> np.ndarray:
    """Sums (documents,) of what belongs to the tokens of a stream as targets."""
    starts = [start for start, _ in train_gpt.val_documents(val.tokens)]
    # the first token of a document is the last target of the one before
    return np.bincount(np.searchsorted(starts, np.arange(1, len(values))) - 1, values[1:], len(starts))


class Levers:
    """A model and its documents. What was measured of a configuration is kept: many levers share a side."""

    def __init__(self, environ: dict[str, str], state: Weights, args: argparse.Namespace) -> None:
        self.environ, self.state, self.base = environ, state, train_gpt.load_config(environ)
        self.runtime = dataclasses.replace(train_gpt.Runtime.start(self.base, {}), log=bench.RUNTIME.log)
        whole, counts = train_gpt.load_val(self.base), (args.docs, args.kl_docs)
        self.val, self.kl_val = (bench_ttt.real_documents(whole, count, args.longest) for count in counts)
        self.model = bench.model_of(self.base, self.runtime, state).eval()
        for method in ("hessians", "first", "copies", "nats", "divergence"):
            setattr(self, method, functools.cache(getattr(self, method)))

    def configured(self, knobs: str) -> Config:
        """The base with a lever's knobs; UserError if they do not fit it."""
        changes = {}
        for name, sign, value in re.findall(r"(\w+)([=*])(\S*)", knobs):
            changes[name] = value
            if sign == "*":
                before = getattr(self.base, name.lower())
                changes[name] = f"{type(before)(round(before * float(value), 9 * isinstance(before, float)))}"
        return train_gpt.load_config(self.environ | changes)

    def hessians(self, batches: int, fisher: bool) -> Weights:
        """Those of the float model; fisher: with sensitivities, and of both uses of the embedding."""
        cfg = dataclasses.replace(self.base, gptq_calibration_batches=batches, fisher_scales=float(fisher))
        return train_gpt.collect_hessians(cfg, self.runtime, self.model)

    def artifact(self, cfg: Config, fisher: bool, size: int) -> tuple[int, Weights]:
        """Bytes of an artifact that fills `size` (0: of any size), and the weights in it."""
        hessians = self.hessians(cfg.gptq_calibration_batches, fisher)
        pair = train_gpt.reparametrize(cfg, self.runtime, self.state, hessians)
        # not by load_config, which wants FISHER_SCALES with ARTIFACT_BYTES
        cfg = dataclasses.replace(cfg, artifact_bytes=size)
        run = types.SimpleNamespace(cfg=cfg, runtime=self.runtime, log=self.runtime.log)
        gptaq = (
            train_gpt.Gptaq(cfg, self.runtime, bench.model_of(cfg, self.runtime, pair[0]).eval())
            if cfg.gptaq_batches
            else None
        )
        stored = train_gpt.Run.filled(run, *pair, gptaq=gptaq)
        if cfg.tune_steps:
            rounded = bench.model_of(cfg, self.runtime, train_gpt.dequantize(stored))
            stored = train_gpt.tuned(cfg, self.runtime, self.model, rounded, stored)
        blob = train_gpt.pack_stored(stored, cfg.compressor, train_gpt.model_identity(cfg))
        return len(blob), train_gpt.dequantize(stored)

    def first(self) -> tuple[int, Weights]:
        """The artifact of the base: what evaluations score, and the size of the others."""
        return self.artifact(self.base, fisher=False, size=0)

    def divergence(self, cfg: Config, fisher: bool) -> tuple[np.ndarray, int]:
        """KL summed over documents, of the model quantised to the bytes of the first artifact, and its bytes."""
        is_first = cfg == self.base and not fisher
        size, weights = self.first() if is_first else self.artifact(cfg, fisher, self.first()[0])
        model, found = bench.model_of(cfg, self.runtime, weights).eval(), np.zeros(len(self.kl_val.tokens))
        learner = train_gpt.NoAdaptation(self.base, self.runtime, model, self.kl_val)
        for cells, _ in train_gpt.plain_steps(self.base, self.runtime, self.kl_val):
            ids, _, meta = learner.inputs(cells)
            with torch.no_grad():
                p, q = (m(ids, None, meta).log_softmax(-1) for m in (self.model, model))
                kl = (p.exp() * (p - q)).sum(-1).cpu().numpy()
            found[cells.scored()] = kl[cells.rows, cells.cols]
        return by_document(self.kl_val, found), size

    def copies(self) -> Weights:
        """The weights of copies, fitted on training tokens with the first artifact."""
        cfg = dataclasses.replace(self.base, hints=("copy",))
        model = bench.model_of(cfg, self.runtime, self.first()[1])
        return {"copy_weights": train_gpt.fit_copies(cfg, self.runtime, model) / 256}

    def nats(self, cfg: Config, fisher: bool) -> tuple[np.ndarray, int]:
        """Nats of the documents by the program's evaluation of the first artifact, and its bytes."""
        size, state = self.first()
        model = bench.model_of(cfg, self.runtime, state | self.copies() if "copy" in cfg.hints else state)
        if train_gpt.MASKED_WHEN[cfg.canonical_mask]:
            model.canonical = train_gpt.checked_mask(cfg, self.val).to(self.runtime.device)
        found = np.zeros(len(self.val.tokens))
        with tempfile.TemporaryDirectory() as folder:
            cfg = dataclasses.replace(cfg, scores=f"{folder}/scores")
            train_gpt.EVALS[cfg.eval](cfg, self.runtime, model, self.val)
            position, nats, _ = np.load(f"{folder}/scores.0.npy").T
        found[position.astype(int)] = nats
        return by_document(self.val, found), size

    def compared(self, lever: Lever, measure: Callable, units: np.ndarray) -> dict[str, Any]:
        """A lever's row: both sides by `measure`, per unit of the documents; or why there is none."""
        row = lever._asdict()
        try:
            cfg, other = self.configured(lever.knobs), self.configured(lever.against)
        except train_gpt.UserError as error:
            return row | {"none": str(error).splitlines()[0]}
        # no logits are narrower than fp32 activations
        wide = {"score_dtype": other.score_dtype} if self.runtime.dtype == torch.float32 else {}
        if dataclasses.replace(cfg, **wide) == other and not lever.fisher_hessians:
            return row | {"none": "both sides are the same here"}
        old, old_bytes = measure(other, other.fisher_scales > 0)
        new, new_bytes = measure(cfg, cfg.fisher_scales > 0 or lever.fisher_hessians)
        picks = np.random.default_rng(0).integers(0, len(units), (DRAWS, len(units)))
        some_old, some_new, some = (sums[picks].sum(1) for sums in (old, new, units))
        low, high = np.quantile((some_new - some_old) / some, (0.025, 0.975))
        least, most = np.quantile(some_new / some_old, (0.025, 0.975))
        before, after = old.sum() / units.sum(), new.sum() / units.sum()
        row |= {"before": before, "after": after, "difference": after - before, "interval": [low, high]}
        return row | {"ratio": after / before, "ratios": [least, most], "bytes": [old_bytes, new_bytes]}

    def table(self, title: str, levers: list[Lever], measure: Callable, units: np.ndarray, digits: int) -> list[dict]:
        """Print the rows of some levers; return them."""
        rows, names = [], ("before", "after", "difference [95 %]", "ratio [95 %]", "bytes")
        if levers:
            bench.table(f"{title}; {len(units)} documents", ("lever", "knobs", "against", *names))
        for lever in levers:
            started = time.perf_counter()
            rows.append(row := self.compared(lever, measure, units))
            row["seconds"] = round(time.perf_counter() - started, 1)
            cells = "-", "-", f"n/a: {row.get('none')}", "-", "-"
            if "none" not in row:
                before, after = (f"{row[key]:.{digits}f}" for key in ("before", "after"))
                gap = "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(row["difference"], *row["interval"], d=digits)
                ratio = "{:.4f} [{:.4f}, {:.4f}]".format(row["ratio"], *row["ratios"])
                cells = before, after, gap, ratio, "{:,} -> {:,}".format(*row["bytes"])
            bench.row(lever.name, lever.knobs, lever.against or "base", *cells)
        return rows


def prepared(run: Path) -> tuple[Path, dict[str, str]]:
    """The folder of a run, and where its data are if it was trained here."""
    if (run / "model.pt").is_file():
        return run, {}
    command = [sys.executable, str(Path(__file__).with_name("small_model.py")), "--out", str(run)]
    subprocess.run(command, check=True)
    return run / "run", {"DATA_PATH": str(run / "data")}


def main() -> None:
    """Both tables."""
    parser = bench.arguments(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", help="folder with the shards; default: DATA_PATH")
    parser.add_argument("--docs", type=int, default=64, help="documents for the evaluation")
    parser.add_argument("--kl-docs", type=int, default=96, help="documents for the quantisation")
    parser.add_argument("--longest", type=int, default=512, help="predictions at which documents are cut")
    parser.add_argument("--only", nargs="*", default=[""], metavar="WORD", help="levers with a word in name or knobs")
    parser.add_argument("--set", nargs="*", default=[], metavar="KNOB=VALUE")
    args = parser.parse_args()
    run, data = prepared(args.run)
    environ = {**os.environ, **data, "PRESET": str(run)} | ({"DATA_PATH": args.data} if args.data else {})
    environ |= dict(word.split("=", 1) for word in [*BASE.split(), *args.set])
    levers = Levers(environ, bench.read_weights(run / "model.pt"), args)
    evaluation, quantisation = (
        [lever for lever in rows if any(word in f"{lever.name} {lever.knobs}" for word in args.only)]
        for rows in (EVALUATION, QUANTISATION)
    )
    units = by_document(levers.val, levers.val.bytes * np.log(2))
    found = levers.table("val_bpb", evaluation, levers.nats, units, 5)
    tokens, title = np.ones(len(levers.kl_val.tokens)), "KL(float || quantised), nats per token, at equal bytes"
    found += levers.table(title, quantisation, levers.divergence, by_document(levers.kl_val, tokens), 6)
    bench.say(levers=found, targets=len(levers.val.tokens) - 1, kl_targets=len(tokens) - 1)


if __name__ == "__main__":
    main()
