"""Where the bits are: a run's loss by position in the document, by document length and by class of token, before and
after test-time training. `pack_artifact.py inspect --run RUN_DIR --data DATA_PATH` and the report of the demo show it.

Losses of single targets come from the files that SCORES writes. RUN_DIR/scores.before.*.npy and scores.after.*.npy are
used if their mean is that of the run's result; if not, the artifact is evaluated again, and they are written.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import caseops  # noqa: E402
import pair_fusion  # noqa: E402

import train_gpt  # noqa: E402
from train_gpt import BOS_ID, UserError, read_json  # noqa: E402

STAGE_OF = {"before": "quantized", "after": "final"}  # of result.json
EDGES = [1, 4, 16, 64, 256, 1024, 4096, 2**62]  # of the bins of positions and lengths, in tokens
CLASSES = ("word start", "word part", "digits", "space", "other signs", "case operator", "single byte", "control")
Rows = list[dict[str, Any]]
FORMATS = {"targets": ",", "share": ".1%", "before": ".4f", "after": ".4f", "change": "+.4f", "bits_per_byte": ".4f"}


def token_classes(tokenizer: Path) -> np.ndarray:
    """The class of each id, an index into CLASSES: (V,) int64."""
    processor = spm.SentencePieceProcessor(model_proto=tokenizer.read_bytes())
    # such bytes are in no text: where pairs are fused, they stand for a space and a case operator
    aliases = {*pair_fusion.byte_ids(processor)}

    def name(i: int) -> str:
        """The class of one id."""
        piece = processor.id_to_piece(i)
        text = piece.replace("\u2581", " ")
        if piece in caseops.OPERATORS or i in aliases:
            return "case operator"
        if processor.is_control(i) or processor.is_unknown(i):
            return "control"
        if processor.is_byte(i):
            return "single byte"
        if text.isspace():
            return "space"
        if any(c.isdigit() for c in text):
            return "digits"
        if any(c.isalpha() for c in text):
            return "word start" if text[0].isspace() else "word part"
        return "other signs"

    return np.array([CLASSES.index(name(i)) for i in range(processor.vocab_size())])


def read_scores(run: Path, which: str, loss: float | None) -> np.ndarray | None:
    """(N, 2) positions and nats of the files of `before` or `after`, by position; None unless their mean is `loss`."""
    files = sorted(run.glob(f"scores.{which}.*.npy"))
    if not files or loss is None:
        return None
    try:
        rows = np.concatenate([np.load(file) for file in files])[:, :2]
    except (ValueError, EOFError, IndexError):
        # half a file, of an evaluation that was killed
        return None
    if not math.isclose(rows[:, 1].mean(), loss, rel_tol=1e-6):
        return None
    return rows[rows[:, 0].argsort()]


def scores_of(run: Path, data: Path) -> dict[str, np.ndarray]:
    """The losses of single targets before and after test-time training: (N, 2) positions and nats each.

    UserError if the data is not that of the run.
    """
    result, found = read_json(run / "result.json"), {}
    cfg = train_gpt.load_config({"PRESET": str(run), "DATA_PATH": str(data)})
    mark = train_gpt.check_data(cfg, train_gpt.Log(None, quiet=True))
    if result.get("data", mark) != mark:
        raise UserError(f"DATA_PATH={data} holds other validation data than {run} was scored on; name the run's own")
    for which, stage in STAGE_OF.items():
        loss = (result.get("stages") or {}).get(stage, {}).get("val_loss")
        rows = read_scores(run, which, loss)
        if rows is None:
            for file in run.glob(f"scores.{which}.*.npy"):
                file.unlink()
            environ = {"PRESET": str(run), "DATA_PATH": str(data), "STAGES": "eval", "EVAL_BUDGET_SECONDS": "0"}
            cfg = train_gpt.load_config(environ | {"SCORES": str(run / f"scores.{which}")})
            runtime = dataclasses.replace(train_gpt.Runtime.start(cfg, {}), log=train_gpt.Log(None, quiet=True))
            again = train_gpt.Run(cfg, runtime, "", run)
            name, hints = ("plain", ()) if which == "before" else (cfg.eval, cfg.hints)
            score = again.evaluate(name, again.from_artifact(run / "model.bin"), hints)
            rows = read_scores(run, which, score.val_loss)
        found[which] = rows
    return found


def groups_of(names: Iterable[str], key: str, member: np.ndarray, facts: dict[str, np.ndarray]) -> Rows:
    """A row for each group that has targets: (N,) member says to which of the names each target belongs."""
    rows, total = [], facts["after"].sum()
    for index, name in enumerate(names):
        here = member == index
        if not here.any():
            continue
        before, after, size = (facts[fact][here].sum() for fact in ("before", "after", "bytes"))
        count = int(here.sum())
        rows.append(
            {
                key: name,
                "targets": count,
                "share": float(after / total),
                "before": float(before / count),
                "after": float(after / count),
                "change": float((after - before) / count),
                "bits_per_byte": float(after / math.log(2) / size) if size else None,
            }
        )
    return rows


def measure(run: Path, data: Path) -> dict[str, Rows]:
    """Tables `positions`, `lengths` and `classes` of a run: targets, share of all bits, nats per token before and after
    test-time training, bits per byte after it."""
    cfg = train_gpt.load_config({"PRESET": str(run), "DATA_PATH": str(data)})
    tokenizer = train_gpt.find_tokenizer(cfg)
    if tokenizer is None:
        raise UserError(f"{data} has no tokenizer, by which tokens are told apart; put its *.model there")
    val, scores = train_gpt.load_val(dataclasses.replace(cfg, eval_include_tail=True)), scores_of(run, data)
    # what both evaluations scored
    both, *places = np.intersect1d(*(rows[:, 0] for rows in scores.values()), return_indices=True)
    targets = both.astype(np.int64)
    facts = {which: scores[which][place, 1] for which, place in zip(scores, places, strict=True)}
    facts["bytes"] = val.bytes[targets]
    starts = np.flatnonzero(val.tokens == BOS_ID)
    # a stream may begin inside a document
    starts = starts if len(starts) and starts[0] == 0 else np.concatenate(([0], starts))
    # a BOS that is a target ends the document before it
    document = np.searchsorted(starts, targets - 1, side="right") - 1
    lengths = np.diff(np.append(starts, len(val.tokens)))
    bins = [f"{a}-{b - 1}" if b < EDGES[-1] else f"{a} and more" for a, b in itertools.pairwise(EDGES)]

    def binned(numbers: np.ndarray) -> np.ndarray:
        """The bin of each number; that of the first for 0."""
        return np.searchsorted(EDGES, np.maximum(numbers, 1), side="right") - 1

    return {
        "positions": groups_of(bins, "position", binned(targets - starts[document]), facts),
        "lengths": groups_of(bins, "length", binned(lengths[document]), facts),
        "classes": groups_of(CLASSES, "class", token_classes(tokenizer)[val.tokens[targets]], facts),
    }
