#!/usr/bin/env python3
"""From the seeds' runs to a submission: submission.json, the README's table, statistics, a picture, the leaderboard.

    python records/submit.py records/track_10min_16mb/<record> --runs logs/a_seed42 logs/a_seed0 logs/a_seed1234
    python records/submit.py records/... --runs train_seed*.log --against records/track_10min_16mb/<other record>
    python records/submit.py --leaderboard [--check]

A run is given by its folder (result.json, record.env, log.txt) or by its log alone. The seeds must share one
configuration, one source and one kind of machine, or nothing is written. Into the record's folder go submission.json
(what it held by hand stays: name, blurb, author), seeds.png, and a table between two markers of README.md.

Statistics: means, sample standard deviations (n - 1); against another record, in bits per byte and in nats per token,
Welch's test and, over common seeds, the paired test, both one-sided ("ours is lower"). Verdicts: `readme_rule` is the
contest's README (0.005 nats per token better, shown at p < 0.01: the test is of means that differ by that margin), and
`progression` is how its maintainers judged (p < 0.25). A record known by its mean alone is taken as a constant.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pack_artifact import CAP_BYTES  # noqa: E402
from train_gpt import UserError, atomic_write  # noqa: E402

BEGIN, END = "<!-- results: written by records/submit.py -->", "<!-- end of results -->"
MARGIN_NATS, README_P, PROGRESSION_P, BUDGET_SECONDS = 0.005, 0.01, 0.25, 600.0
INK, MUTED, OURS, THEIRS = "#1f2933", "#6b7785", "#243b53", "#d1495b"


# +---------------------------------------------------------------------------+
# | RUNS                                                                      |
# +---------------------------------------------------------------------------+


@dataclasses.dataclass(frozen=True)
class SeedRun:
    """One seed: its knobs but the seed, hash of its source, its machine, its result."""

    name: str
    seed: int
    knobs: dict[str, str]
    machine: str
    result: dict[str, Any]


def knobs_of_log(text: str) -> dict[str, str]:
    """Non-default knobs that a log's head names, without those that say where it ran."""
    block = text.rpartition("knobs that are not default:")[2].split("\nparameters")[0]
    local = {
        "RUN_ID",
        "ARTIFACT_DIR",
        "STAGES",
        "MODEL_PATH",
        "DEVICE",
        "ATTENTION",
        "FUSED_CE_ENABLED",
        "FUSED_MLP_ENABLED",
        "COMPUTE_DTYPE",
        "COMPILE",
        "DATA_PATH",
        "TOKENIZER_PATH",
    }
    found = dict(re.findall(r"^  ([A-Z0-9_]+)=(.*?)  \(", block, re.MULTILINE))
    return {k: v for k, v in found.items() if k not in local}


def read_run(path: Path) -> SeedRun:
    """A run from its folder or its log; UserError when it is neither or has no final score."""
    log = path / "log.txt" if path.is_dir() else path
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    results = [line for line in text.splitlines() if line.startswith("RESULT ")]
    source = path / "result.json" if path.is_dir() else None
    try:
        if source is not None and source.is_file():
            result = json.loads(source.read_text(encoding="utf-8"))
        elif results:
            result = json.loads(results[-1].removeprefix("RESULT "))
        else:
            raise UserError(f"{path}: no result.json and no RESULT line of a log; give a run folder or its log")
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: the result is not JSON: {error}") from error
    if "final" not in result.get("stages", {}):
        raise UserError(f"{path}: the run has no final score; finish it with STAGES=eval")
    record = path / "record.env"
    if path.is_dir() and record.is_file():
        knobs = dict(line.split("=", 1) for line in record.read_text(encoding="utf-8").split("\n") if "=" in line)
    else:
        knobs = knobs_of_log(text)
    machine = re.findall(r"^python .*$", text, re.MULTILINE)
    seed = int(knobs.pop("SEED", result.get("seed", 1337)))
    return SeedRun(path.name, seed, knobs, machine[-1] if machine else "", result)


def refuse_mixed(runs: list[SeedRun]) -> None:
    """UserError unless all runs are one configuration of one source on one kind of machine, each with its own seed."""
    first = runs[0]
    if len({run.seed for run in runs}) != len(runs):
        raise UserError(f"seeds {[run.seed for run in runs]}: each run needs a seed of its own")
    for run in runs[1:]:
        other = sorted(k for k in first.knobs.keys() | run.knobs.keys() if first.knobs.get(k) != run.knobs.get(k))
        if other:
            values = f"{first.knobs.get(other[0], 'default')} and {run.knobs.get(other[0], 'default')}"
            raise UserError(f"{first.name} and {run.name} are not one configuration: {', '.join(other)} ({values})")
        if first.result.get("source_sha256") != run.result.get("source_sha256"):
            raise UserError(f"{first.name} and {run.name} ran different sources (source_sha256)")
        if first.machine != run.machine:
            machines = f"{first.machine!r}, {run.machine!r}"
            raise UserError(f"{first.name} and {run.name} ran on different machines: {machines}")
        for key in ("tokens_scored", "bytes_scored"):
            if first.result.get(key) != run.result.get(key):
                raise UserError(f"{first.name} and {run.name} scored different data ({key})")


# +---------------------------------------------------------------------------+
# | STATISTICS                                                                |
# +---------------------------------------------------------------------------+


def spread(values: list[float]) -> float | None:
    """Sample standard deviation; None of fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def finite(p: float) -> float | None:
    """A p value, or None where there is none (one seed, no spread)."""
    return float(p) if math.isfinite(p) else None


def welch(ours: list[float], theirs: list[float], margin: float = 0.0) -> float | None:
    """One-sided p of 'the mean of ours is lower than that of theirs by more than the margin'."""
    if len(theirs) == 1 and len(ours) > 1:
        return finite(stats.ttest_1samp(ours, theirs[0] - margin, alternative="less").pvalue) if spread(ours) else None
    if min(len(ours), len(theirs)) < 2 or not (spread(ours) or spread(theirs)):
        return None
    test = stats.ttest_ind(ours, [x - margin for x in theirs], equal_var=False, alternative="less")
    return finite(test.pvalue)


def paired(ours: dict[str, float], theirs: dict[str, float]) -> float | None:
    """One-sided p of the paired test over common seeds; None of fewer than two."""
    common = sorted(ours.keys() & theirs.keys())
    differences = [ours[s] - theirs[s] for s in common]
    if len(common) < 2 or not spread(differences):
        return None
    return finite(stats.ttest_1samp(differences, 0.0, alternative="less").pvalue)


def scores_by_seed(submission: dict[str, Any], key: str) -> dict[str, float]:
    """Scores of a submission.json: by seed or, where only the mean is known, under the name 'mean'."""
    rows = {s: row[key] for s, row in (submission.get("seed_results") or {}).items() if row.get(key) is not None}
    mean = submission.get(key) or (submission.get("comparison_baseline_bpb") if key == "val_bpb" else None)
    return rows or ({"mean": mean} if mean is not None else {})


def compare(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> dict[str, Any]:
    """The comparison block of submission.json. UserError when the other record has no score at all."""
    found: dict[str, Any] = {"against": name}
    for key, unit in (("val_bpb", "bpb"), ("val_loss", "nats_per_token")):
        a, b = scores_by_seed(ours, key), scores_by_seed(theirs, key)
        if not b:
            found |= {f"delta_{unit}": None, f"welch_p_{unit}": None, f"paired_p_{unit}": None}
            continue
        x, y = list(a.values()), list(b.values())
        found |= {
            f"delta_{unit}": float(np.mean(x) - np.mean(y)),
            f"welch_p_{unit}": welch(x, y),
            f"paired_p_{unit}": paired(a, b),
            f"their_seeds_{unit}": len(y),
        }
        if unit == "nats_per_token":
            found["welch_p_margin"] = welch(x, y, MARGIN_NATS)
    if found["delta_bpb"] is None:
        raise UserError(f"{name} has no val_bpb to compare with")
    p = found.get("welch_p_margin")
    found["common_seeds"] = sorted(ours["seed_results"].keys() & (theirs.get("seed_results") or {}).keys())
    found["readme_rule"] = None if p is None else p < README_P
    p = found["welch_p_bpb"]
    found["progression"] = None if p is None else p < PROGRESSION_P
    return found


# +---------------------------------------------------------------------------+
# | SUBMISSION                                                                |
# +---------------------------------------------------------------------------+


def seed_row(result: dict[str, Any]) -> dict[str, Any]:
    """One seed's line of submission.json."""
    stages, seconds, steps = result["stages"], result.get("train_seconds"), result.get("train_steps")
    return {
        "val_loss": result["val_loss"],
        "val_bpb": result["val_bpb"],
        "artifact_bytes": result.get("bytes_total"),
        "steps": steps,
        "step_avg_ms": 1e3 * seconds / steps if seconds and steps else None,
        "train_wallclock_ms": 1e3 * seconds if seconds is not None else None,
        "eval_time_s": result.get("eval_seconds"),
        "val_tokens": result.get("tokens_scored"),
        "target_bytes": result.get("bytes_scored"),
        "pre_quant_val_bpb": stages.get("pre_quant", {}).get("val_bpb"),
        "quantized_val_bpb": stages.get("quantized", {}).get("val_bpb"),
    }


def compliance(runs: list[SeedRun], rows: dict[str, dict[str, Any]]) -> dict[str, bool | None]:
    """What the results themselves bear out; None where they do not say."""

    def every(key: str, limit: float) -> bool | None:
        values = [row[key] for row in rows.values()]
        return None if any(v is None for v in values) else all(v <= limit for v in values)

    return {
        "artifact_under_16mb": every("artifact_bytes", CAP_BYTES),
        "train_under_600s_strict": every("train_wallclock_ms", 1e3 * BUDGET_SECONDS),
        "eval_under_600s": every("eval_time_s", BUDGET_SECONDS),
        "three_seeds": len(runs) >= 3,
        "score_before_update": all(run.result.get("legal") is True for run in runs),
        "no_slot": all(run.knobs.get("EVAL") != "slot" for run in runs),
    }


def versions_of(machine: str) -> dict[str, str | None]:
    """Hardware and versions out of a log's line."""
    torch = re.search(r"torch ([\w.+]+)", machine)
    hardware = re.search(r"; (\d+ x \w+(?:, [^,]+)?), activations", machine)
    return {"hardware": hardware[1] if hardware else None, "pytorch_version": torch[1] if torch else None}


def build_submission(old: dict[str, Any], runs: list[SeedRun], given: dict[str, str]) -> dict[str, Any]:
    """submission.json of these runs. What was written by hand stays, unless the command line says otherwise."""
    rows = {str(run.seed): seed_row(run.result) for run in sorted(runs, key=lambda r: r.seed)}

    def column(key: str) -> list[float]:
        return [row[key] for row in rows.values() if row[key] is not None]

    def mean(key: str) -> float | None:
        return float(np.mean(column(key))) if column(key) else None

    sizes = column("artifact_bytes")
    code = [run.result["bytes_code"] for run in runs if run.result.get("bytes_code") is not None]
    new = {
        **given,
        "val_loss": mean("val_loss"),
        "val_bpb": mean("val_bpb"),
        "val_loss_std": spread(column("val_loss")),
        "val_bpb_std": spread(column("val_bpb")),
        "std_type": "sample",
        "seeds": [int(s) for s in rows],
        "seed_results": rows,
        "artifact_bytes_mean": mean("artifact_bytes"),
        "artifact_bytes_max": max(sizes) if sizes else None,
        "bytes_total": max(sizes) if sizes else None,
        "bytes_code": max(code) if code else None,
        "train_steps_mean": mean("steps"),
        "train_wallclock_ms_mean": mean("train_wallclock_ms"),
        "train_wallclock_ms_max": max(column("train_wallclock_ms"), default=None),
        "eval_time_s_mean": mean("eval_time_s"),
        "eval_time_s_max": max(column("eval_time_s"), default=None),
        **versions_of(runs[0].machine),
        "source_sha256": runs[0].result.get("source_sha256"),
        "compliance": compliance(runs, rows),
        "logs": {str(run.seed): run.name for run in runs},
    }
    return {k: v for k, v in old.items() if k != "comparison"} | new


def number(value: float | None, digits: int = 5) -> str:
    """A cell: a rounded number, or a dash."""
    return "-" if value is None else f"{value:,.{digits}f}"


def results_table(submission: dict[str, Any]) -> str:
    """The README's block: a line per seed, mean and standard deviation, the comparison in words."""
    lines = ["| seed | val_bpb | val_loss | before quantisation | steps | train s | eval s | bytes |", "|---" * 8 + "|"]
    for seed, row in submission["seed_results"].items():
        seconds = None if row["train_wallclock_ms"] is None else row["train_wallclock_ms"] / 1e3
        scores = [number(row[key]) for key in ("val_bpb", "val_loss", "pre_quant_val_bpb")]
        cells = (
            *scores,
            number(row["steps"], 0),
            number(seconds, 1),
            number(row["eval_time_s"], 1),
            number(row["artifact_bytes"], 0),
        )
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    lines.append(
        f"| **mean** | **{number(submission['val_bpb'])}** | **{number(submission['val_loss'])}** | | "
        f"{number(submission['train_steps_mean'], 0)} | | {number(submission['eval_time_s_mean'], 1)} | "
        f"{number(submission['bytes_total'], 0)} max |"
    )
    deviations = f"{number(submission['val_bpb_std'])} | {number(submission['val_loss_std'])}"
    lines.append(f"| sample std | {deviations} | | | | | |")
    found = submission.get("comparison")
    if found:
        word = {True: "yes", False: "no", None: "cannot be said"}
        lines += [
            "",
            f"Against {found['against']}: {number(found['delta_bpb'])} bits per byte, "
            f"{number(found['delta_nats_per_token'])} nats per token; Welch p = {number(found['welch_p_bpb'], 4)} and "
            f"{number(found['welch_p_nats_per_token'], 4)}, paired p = {number(found['paired_p_bpb'], 4)} over "
            f"{len(found['common_seeds'])} common seeds. 0.005 nats better at p < 0.01: {word[found['readme_rule']]}. "
            f"Progression at p < 0.25: {word[found['progression']]}.",
        ]
    return "\n".join(lines)


def with_block(readme: str, block: str) -> str:
    """The README with the block between its markers, or at its end when it has none."""
    if (BEGIN in readme) != (END in readme):
        raise UserError(f"README.md has one of the markers {BEGIN} and {END}; it needs both or none")
    text = f"{BEGIN}\n{block}\n{END}"
    if BEGIN not in readme:
        return f"{readme.rstrip()}\n\n## Results\n\n{text}\n".lstrip()
    head, _, rest = readme.partition(BEGIN)
    return head + text + rest.partition(END)[2]


def draw(submission: dict[str, Any], theirs: dict[str, Any], path: Path) -> None:
    """val_bpb by seed with mean and standard deviation, and the other record's mean."""
    figure = Figure(figsize=(7, 4), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    seeds, scores = list(submission["seed_results"]), [r["val_bpb"] for r in submission["seed_results"].values()]
    ax.scatter(range(len(seeds)), scores, color=OURS, zorder=3)
    mean, deviation = submission["val_bpb"], submission["val_bpb_std"] or 0.0
    ax.axhline(mean, color=OURS, lw=1.2, label=f"mean {mean:.5f}, sample std {deviation:.5f}")
    ax.axhspan(mean - deviation, mean + deviation, color=OURS, alpha=0.12)
    other = scores_by_seed(theirs, "val_bpb") if theirs else {}
    if other:
        value = float(np.mean(list(other.values())))
        name = theirs.get("name") or "the other record"
        ax.axhline(value, color=THEIRS, lw=1.2, ls="--", label=f"{name}: {value:.5f}")
    ax.set_xticks(range(len(seeds)), seeds, color=INK)
    ax.set_xlabel("seed", color=MUTED)
    ax.set_ylabel("bits per byte (the axis does not start at 0)", color=MUTED)
    ax.set_title(str(submission.get("name") or "seeds"), loc="left", color=INK, fontsize=11)
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    atomic_write(path, buffer.getvalue())


def read_json(path: Path) -> dict[str, Any]:
    """An object of a file, {} when it is not there; UserError when it is broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no object")
    return found


def submit(args: argparse.Namespace) -> None:
    """Write submission.json, README.md and seeds.png of a record."""
    record = args.record
    if not (record / "record.env").is_file():
        raise UserError(f"{record}: no record.env there; name a record folder")
    runs = [read_run(path) for path in args.runs]
    refuse_mixed(runs)
    given = {k: getattr(args, k) for k in ("author", "github_id", "name", "blurb", "date") if getattr(args, k)}
    submission = build_submission(read_json(record / "submission.json"), runs, given)
    theirs: dict[str, Any] = {}
    if args.against:
        path = args.against / "submission.json" if args.against.is_dir() else args.against
        theirs = read_json(path)
        if not theirs:
            raise UserError(f"--against {args.against}: no submission.json there")
        submission["comparison"] = compare(submission, theirs, str(theirs.get("name") or path.parent.name))
    block = results_table(submission)
    readme = record / "README.md"
    text = with_block(readme.read_text(encoding="utf-8") if readme.is_file() else f"# {record.name}\n", block)
    atomic_write(record / "submission.json", json.dumps(submission, indent=1).encode() + b"\n")
    atomic_write(readme, text.encode())
    draw(submission, theirs, record / "seeds.png")
    print(block)
    print(
        "SUBMIT "
        + json.dumps(
            {k: submission[k] for k in ("val_bpb", "val_bpb_std", "val_loss", "bytes_total")}
            | {"comparison": submission.get("comparison")}
        )
    )


# +---------------------------------------------------------------------------+
# | LEADERBOARD                                                               |
# +---------------------------------------------------------------------------+


def legality_of(record: Path) -> str:
    """The judge's word on a record, by the verdict.json in its folder."""
    verdict = read_json(record / "verdict.json")
    if not verdict:
        return "not judged"
    if verdict.get("record_sha256") != hashlib.sha256((record / "record.env").read_bytes()).hexdigest():
        return "judged before record.env changed"
    word = {True: "legal", False: "NOT legal", None: "undecided"}[verdict.get("legal")]
    failed = [c["name"] for c in verdict.get("checks", []) if c["status"] == "FAIL"]
    return f"{word} ({verdict.get('scale')} size{'; ' + ', '.join(failed) if failed else ''})"


def leaderboard_row(record: Path, records: Path) -> tuple[float, str]:
    """(sorting key, line of the table) of a record."""
    found = read_json(record / "submission.json")
    published, ours = found.get("comparison_baseline_bpb"), found.get("val_bpb")
    here = "not run at full size" if ours is None else f"{ours:.5f}"
    if ours is not None and found.get("val_bpb_std") is not None:
        here += f" ± {found['val_bpb_std']:.5f} ({len(found.get('seeds', []))} seeds)"
    train = found.get("train_wallclock_ms_mean")
    cells = (
        f"[{found.get('name') or record.name}]({record.relative_to(records).as_posix()})",
        number(published),
        here,
        number(found.get("bytes_total"), 0),
        number(None if train is None else train / 1e3, 1),
        number(found.get("eval_time_s_mean"), 1),
        legality_of(record),
    )
    best = min((x for x in (published, ours) if x is not None), default=math.inf)
    return best, "| " + " | ".join(cells) + " |"


def leaderboard(records: Path) -> str:
    """records/README.md: every record of every track, the best score first."""
    lines = [
        "# Records",
        "",
        'Written by `python records/submit.py --leaderboard`; do not edit. "Published" is the score',
        'of the system that a record follows, "here" is what was run with this code, "legality" is the word of',
        "`python records/verify.py` (verdict.json in the record's folder; toy size: the record's own knobs and program",
        "on a small model).",
        "",
    ]
    for track in sorted(p for p in records.glob("track_*") if p.is_dir()):
        rows = sorted(leaderboard_row(path.parent, records) for path in track.glob("*/record.env"))
        head = "| record | published val_bpb | here | bytes | train s | eval s | legality |"
        head = "| record | published val_bpb | here | bytes | train s | eval s | legality |"
        lines += [f"## {track.name}", "", head, "|---" * 7 + "|", *(line for _, line in rows), ""]
    return "\n".join(lines)


def write_leaderboard(records: Path, check: bool) -> int:
    """Write records/README.md or, with --check, say whether it is up to date: 0, or 1 when it is not."""
    text, path = leaderboard(records), records / "README.md"
    if not check:
        atomic_write(path, text.encode())
        print(text)
        return 0
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return 0
    print(f"error: {path} is out of date; run `python records/submit.py --leaderboard`", file=sys.stderr)
    return 1


# +---------------------------------------------------------------------------+
# | COMMAND LINE                                                              |
# +---------------------------------------------------------------------------+


def command_line() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, nargs="?", metavar="RECORD", help="record folder to write into")
    parser.add_argument("--runs", type=Path, nargs="+", metavar="RUN", help="run folders or logs, one per seed")
    parser.add_argument("--against", type=Path, metavar="RECORD", help="record or submission.json to compare with")
    for name in ("author", "github_id", "name", "blurb", "date"):
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{name} of submission.json (default: what it holds)")
    parser.add_argument("--leaderboard", action="store_true", help="write records/README.md")
    parser.add_argument("--check", action="store_true", help="with --leaderboard: only say whether it is up to date")
    parser.add_argument("--records", type=Path, default=ROOT / "records", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    parser = command_line()
    args = parser.parse_args(argv)
    wanted: Callable[[], Any] | None = None
    if args.leaderboard:
        wanted = lambda: write_leaderboard(args.records, args.check)  # noqa: E731
    elif args.record and args.runs:
        wanted = lambda: submit(args)  # noqa: E731
    else:
        parser.error("give a record folder with --runs, or --leaderboard")
    try:
        return wanted() or 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
