#!/usr/bin/env python3
"""From the seeds' runs to a submission: submission.json, the README's table, statistics, a picture, the leaderboard.

    python records/submit.py records/track_10min_16mb/<record> --runs logs/a_seed42 logs/a_seed0 logs/a_seed1234
    python records/submit.py records/... --runs train_seed*.log --against records/track_10min_16mb/<other record>
    python records/submit.py --leaderboard [--check]

A run is given by its folder (result.json, record.env, log.txt) or by its log alone. The seeds must share one
configuration, one source and one kind of machine, and each its own training, or nothing is written. The record's
folder gets submission.json (handwritten entries such as the name stay), seeds.png, and a table between two markers in
README.md. Papers that are damaged or do not hold what they should are refused in a line.

Statistics: means and sample standard deviations (n - 1). Against another record, in bits per byte and nats per token:
Welch's test and, over common seeds, the paired test, both one-sided ("ours is lower"). Verdicts: `readme_rule` is the
contest's README (0.005 nats per token better, shown at p < 0.01: the test is of means that differ by that margin);
`progression` is how its maintainers judged (p < 0.25). A record known only by its mean counts as a constant. Tokens are
the other record's: losses for each of one's own, which another tokenizer or fused pairs make longer, do not compare.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from records import papers  # noqa: E402  (needs the line above)
from records.claims import FAIL, LIMITS, preset_sha256  # noqa: E402
from train_gpt import (  # noqa: E402
    LOCAL_KNOBS,
    UserError,
    atomic_write,
    differing,
    format_knob,
    load_config,
    preset_layers,
    read_preset,
)

BEGIN, END = "<!-- results: written by records/submit.py -->", "<!-- end of results -->"
HANDWRITTEN = ("author", "github_id", "name", "blurb", "date")
MARGIN_NATS, README_P, PROGRESSION_P = 0.005, 0.01, 0.25
INK, MUTED, OURS, THEIRS = "#1f2933", "#6b7785", "#243b53", "#d1495b"


# +---------------------------------------------------------------------------+
# | RUNS                                                                      |
# +---------------------------------------------------------------------------+


class SeedRun(NamedTuple):
    """One seed's run: the knobs that make it what it is without SEED, its machine (from the log), its result.

    weights: what is known of the weights, name -> value; runs that agree in one of them share a training.
    """

    name: str
    seed: int
    knobs: dict[str, str]
    machine: str
    result: dict[str, Any]
    weights: dict[str, Any]


def refuse(findings: papers.Findings) -> None:
    """UserError with the findings in one line, if there are any."""
    if findings:
        raise UserError("; ".join(findings))


def read_object(path: Path, *checks: Callable[[dict[str, Any], str], papers.Findings]) -> dict[str, Any]:
    """Return the JSON object in a file, {} without a file. UserError for anything else, or what a check finds."""
    value, findings = papers.read_object(path)
    refuse(findings or [found for check in checks if value for found in check(value, str(path))])
    return value


def weights_of(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Return what tells a run's weights apart: the hash of model.bin, and the training's numbers to the last digit."""
    found, model = {}, path / "model.bin"
    if model.is_file():
        found["model.bin has the same bytes"] = hashlib.sha256(model.read_bytes()).hexdigest()
    if result.get("model_sha256"):
        found["the final scores are of the same weights"] = result["model_sha256"]
    numbers = [result.get(key) for key in ("train_seconds", "train_loss")]
    if None not in numbers:
        found["train_seconds and train_loss are equal to the last digit"] = numbers
    return found


def read_run(path: Path) -> SeedRun:
    """Read a run from its folder or its log. UserError if it is neither, is damaged, or has no final score."""
    is_folder = path.is_dir()
    log = papers.read_log(path / "log.txt" if is_folder else path)
    refuse(log.findings)
    result = (read_object(path / "result.json") if is_folder else {}) or log.result
    if not result:
        raise UserError(f"{path}: no result.json and no RESULT line of a log; give a run folder or its log")
    stages = result.get("stages", {})
    if isinstance(stages, dict) and "final" not in stages:
        raise UserError(f"{path}: the run has no final score; finish it with STAGES=eval")
    refuse(papers.result_findings(result, str(path)))
    knobs = {name: value for name, value in log.knobs.items() if name.lower() not in LOCAL_KNOBS}
    if is_folder and (path / "record.env").is_file():
        knobs = read_preset(str(path))
    machines = re.findall(r"^python .*$", log.text, re.MULTILINE)
    word = str(knobs.pop("SEED", result.get("seed", 1337)))
    if not word.isdecimal():
        raise UserError(f"{path}: SEED={word} is not a number from 0 up")
    machine = machines[-1] if machines else ""
    return SeedRun(path.name, int(word), knobs, machine, result, weights_of(path, result))


def refuse_mixed(runs: list[SeedRun]) -> None:
    """UserError unless all runs have one configuration, source and kind of machine, and each its own seed."""
    first = runs[0]
    if len({run.seed for run in runs}) != len(runs):
        raise UserError(f"seeds {[run.seed for run in runs]}: each run needs a seed of its own")
    for run in runs[1:]:
        pair = f"{first.name} and {run.name}"
        other = sorted(k for k in first.knobs.keys() | run.knobs.keys() if first.knobs.get(k) != run.knobs.get(k))
        if other:
            values = f"{first.knobs.get(other[0], 'default')} and {run.knobs.get(other[0], 'default')}"
            raise UserError(f"{pair} are not one configuration: {', '.join(other)} ({values})")
        if first.machine != run.machine:
            raise UserError(f"{pair} ran on different machines: {first.machine!r}, {run.machine!r}")
        for key in ("source_sha256", "tokens_scored", "bytes_scored"):
            if first.result.get(key) != run.result.get(key):
                what = "ran different sources" if key == "source_sha256" else "scored different data"
                raise UserError(f"{pair} {what} ({key})")
    refuse_shared_weights(runs)


def refuse_others(record: Path, run: SeedRun) -> None:
    """UserError unless a run has the knobs of the record that it is to be a score of."""
    ours, theirs = load_config({"PRESET": str(record)}), load_config(run.knobs)
    other = [name for name in differing(theirs, ours) if name != "seed"]
    if other:
        values = f"{format_knob(getattr(theirs, other[0]))}, in {record} {format_knob(getattr(ours, other[0]))}"
        names = ", ".join(name.upper() for name in other[:5])
        raise UserError(f"{run.name} is no run of {record}: {names} ({values}); name its record, or run that preset")


def refuse_shared_weights(runs: list[SeedRun]) -> None:
    """UserError if two runs are evaluations of one training, whatever their SEED says."""
    for one, other in itertools.combinations(runs, 2):
        for what in one.weights.keys() & other.weights.keys():
            if one.weights[what] == other.weights[what]:
                raise UserError(
                    f"{one.name} and {other.name} are one training, not two seeds ({what}); train each seed by itself"
                )


# +---------------------------------------------------------------------------+
# | STATISTICS                                                                |
# +---------------------------------------------------------------------------+


def sample_std(values: list[float]) -> float | None:
    """Return the sample standard deviation, None for fewer than two values."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1))


def welch(ours: list[float], theirs: list[float], margin: float = 0.0) -> float | None:
    """Return the one-sided p of "our mean is lower than theirs by more than the margin", None if it is undefined."""
    if len(ours) < 2 or not (sample_std(ours) or sample_std(theirs)):
        return None
    shifted = [x - margin for x in theirs]
    if len(theirs) == 1:
        test = stats.ttest_1samp(ours, shifted[0], alternative="less")
    else:
        test = stats.ttest_ind(ours, shifted, equal_var=False, alternative="less")
    return float(test.pvalue)


def paired(ours: dict[str, float], theirs: dict[str, float]) -> float | None:
    """Return the one-sided p of the paired test over common seeds, None if it is undefined."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not sample_std(differences):
        return None
    return float(stats.ttest_1samp(differences, 0.0, alternative="less").pvalue)


def scores_by_seed(submission: dict[str, Any], key: str) -> dict[str, float]:
    """Return the scores in a submission.json by seed or, if only their mean is known, under the name "mean"."""
    seeds = submission.get("seed_results") or {}
    rows = {seed: row[key] for seed, row in seeds.items() if row.get(key) is not None}
    published = {"val_bpb": submission.get("comparison_baseline_bpb")}
    mean = submission.get(key) or published.get(key)
    return rows if rows or mean is None else {"mean": mean}


def compare(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the comparison block of submission.json. UserError if the other record has no score at all."""
    found: dict[str, Any] = {"against": name}
    bits, their_bits = scores_by_seed(ours, "val_bpb"), scores_by_seed(theirs, "val_bpb")
    for key, unit in (("val_bpb", "bpb"), ("val_loss", "nats_per_token")):
        b = scores_by_seed(theirs, key)
        if not (b and their_bits):
            found |= {f"delta_{unit}": None, f"welch_p_{unit}": None, f"paired_p_{unit}": None}
            continue
        # our data may have longer tokens, so nats are counted for each of theirs
        per_bit = np.mean([*b.values()]) / np.mean([*their_bits.values()])
        a = {seed: per_bit * score for seed, score in bits.items()}
        x, y = list(a.values()), list(b.values())
        found[f"delta_{unit}"] = float(np.mean(x) - np.mean(y))
        found[f"welch_p_{unit}"] = welch(x, y)
        found[f"paired_p_{unit}"] = paired(a, b)
        found[f"their_seeds_{unit}"] = len(y)
        if unit == "nats_per_token":
            found["welch_p_margin"] = welch(x, y, MARGIN_NATS)
    if found["delta_bpb"] is None:
        raise UserError(f"{name} has no val_bpb to compare with")
    found["common_seeds"] = sorted(ours["seed_results"].keys() & (theirs.get("seed_results") or {}).keys())
    for rule, key, limit in (
        ("readme_rule", "welch_p_margin", README_P),
        ("progression", "welch_p_bpb", PROGRESSION_P),
    ):
        p = found.get(key)
        found[rule] = None if p is None else p < limit
    return found


# +---------------------------------------------------------------------------+
# | SUBMISSION                                                                |
# +---------------------------------------------------------------------------+


def seed_row(result: dict[str, Any]) -> dict[str, Any]:
    """Return one seed's row of submission.json."""
    stages, seconds, steps = result["stages"], result.get("train_seconds"), result.get("train_steps")
    return {
        "val_loss": result["val_loss"],
        "val_bpb": result["val_bpb"],
        # until a run is packed, its result counts the plain source
        "artifact_bytes": result.get("bytes_total") if result.get("artifact") else None,
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
    """Return what the results themselves show; None where they do not say."""
    found: dict[str, bool | None] = {}
    for name, limit in LIMITS.items():
        values = [row[limit.column] for row in rows.values()]
        found[name] = None if None in values else max(values) <= limit.most
    found["three_seeds"] = len(runs) >= 3
    found["score_before_update"] = all(run.result.get("legal") is True for run in runs)
    found["no_slot"] = all(run.knobs.get("EVAL") != "slot" for run in runs)
    return found


def build_submission(old: dict[str, Any], runs: list[SeedRun], given: dict[str, str]) -> dict[str, Any]:
    """Return these runs' submission.json. Handwritten entries in `old` stay unless the command line replaces them."""
    rows = {str(run.seed): seed_row(run.result) for run in sorted(runs, key=lambda run: run.seed)}
    columns = {key: [row[key] for row in rows.values() if row[key] is not None] for key in next(iter(rows.values()))}
    mean = {key: float(np.mean(values)) if values else None for key, values in columns.items()}
    largest = {key: max(values, default=None) for key, values in columns.items()}
    torch = re.search(r"torch ([\w.+]+)", runs[0].machine)
    hardware = re.search(r"; (\d+ x \w+(?:, [^,]+)?), activations", runs[0].machine)
    new = {
        **given,
        "val_loss": mean["val_loss"],
        "val_bpb": mean["val_bpb"],
        "val_loss_std": sample_std(columns["val_loss"]),
        "val_bpb_std": sample_std(columns["val_bpb"]),
        "std_type": "sample",
        "seeds": [int(seed) for seed in rows],
        "seed_results": rows,
        "artifact_bytes_mean": mean["artifact_bytes"],
        "artifact_bytes_max": largest["artifact_bytes"],
        "bytes_total": largest["artifact_bytes"],
        "bytes_code": max((run.result.get("bytes_code") or 0) * bool(run.result.get("artifact")) for run in runs)
        or None,
        "train_steps_mean": mean["steps"],
        "train_wallclock_ms_mean": mean["train_wallclock_ms"],
        "train_wallclock_ms_max": largest["train_wallclock_ms"],
        "eval_time_s_mean": mean["eval_time_s"],
        "eval_time_s_max": largest["eval_time_s"],
        "hardware": hardware[1] if hardware else None,
        "pytorch_version": torch[1] if torch else None,
        "source_sha256": runs[0].result.get("source_sha256"),
        "compliance": compliance(runs, rows),
        "logs": {str(run.seed): run.name for run in runs},
    }
    return {key: value for key, value in old.items() if key != "comparison"} | new


def number(value: float | None, digits: int = 5, unit: float = 1.0) -> str:
    """Return a table cell: the value in some unit, rounded, or a dash."""
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def results_table(found: dict[str, Any]) -> str:
    """Return the README's block: a row per seed, mean and standard deviation, the comparison in words."""
    lines = ["| seed | val_bpb | val_loss | before quantisation | steps | train s | eval s | bytes |", "|---" * 8 + "|"]
    for seed, row in found["seed_results"].items():
        cells = [number(row[key]) for key in ("val_bpb", "val_loss", "pre_quant_val_bpb")]
        cells += [number(row["steps"], 0), number(row["train_wallclock_ms"], 1, 1e3), number(row["eval_time_s"], 1)]
        lines.append(f"| {seed} | " + " | ".join([*cells, number(row["artifact_bytes"], 0)]) + " |")
    lines.append(
        f"| **mean** | **{number(found['val_bpb'])}** | **{number(found['val_loss'])}** | | "
        f"{number(found['train_steps_mean'], 0)} | | {number(found['eval_time_s_mean'], 1)} | "
        f"{number(found['bytes_total'], 0)} max |"
    )
    lines.append(f"| sample std | {number(found['val_bpb_std'])} | {number(found['val_loss_std'])} | | | | | |")
    if found.get("comparison"):
        c = found["comparison"]
        word = {True: "yes", False: "no", None: "unknown"}
        lines += [
            "",
            f"Against {c['against']}: {number(c['delta_bpb'])} bits per byte, "
            f"{number(c['delta_nats_per_token'])} nats per token; Welch p = {number(c['welch_p_bpb'], 4)} and "
            f"{number(c['welch_p_nats_per_token'], 4)}, paired p = {number(c['paired_p_bpb'], 4)} over "
            f"{len(c['common_seeds'])} common seeds. 0.005 nats better at p < 0.01: {word[c['readme_rule']]}. "
            f"Progression at p < 0.25: {word[c['progression']]}.",
        ]
    return "\n".join(lines)


def with_block(readme: str, block: str) -> str:
    """Return the README with the block between its markers, or at its end if it has none."""
    if (BEGIN in readme) != (END in readme):
        raise UserError(f"README.md has one of the markers {BEGIN} and {END}; it needs both or none")
    text = f"{BEGIN}\n{block}\n{END}"
    if BEGIN not in readme:
        return f"{readme.rstrip()}\n\n## Results\n\n{text}\n".lstrip()
    head, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise UserError(f"README.md has {END} in front of {BEGIN}; put them in order, or delete both")
    return head + text + after


def draw(submission: dict[str, Any], theirs: dict[str, Any], path: Path) -> None:
    """Draw val_bpb by seed with mean and standard deviation, and the other record's mean."""
    figure = Figure(figsize=(7, 4), dpi=120, facecolor="white", layout="constrained")
    ax = figure.subplots()
    scores = scores_by_seed(submission, "val_bpb")
    ax.scatter(range(len(scores)), list(scores.values()), color=OURS, zorder=3)
    mean, deviation = submission["val_bpb"], submission["val_bpb_std"] or 0.0
    ax.axhline(mean, color=OURS, lw=1.2, label=f"mean {mean:.5f}, sample std {deviation:.5f}")
    ax.axhspan(mean - deviation, mean + deviation, color=OURS, alpha=0.12)
    other = list(scores_by_seed(theirs, "val_bpb").values())
    if other:
        # a dollar would begin a formula
        name = str(theirs.get("name") or "the other record").replace("$", r"\$")
        label = f"{name}: {np.mean(other):.5f}"
        ax.axhline(np.mean(other), color=THEIRS, lw=1.2, ls="--", label=label)
    ax.set_xticks(range(len(scores)), list(scores), color=INK)
    ax.set_xlabel("seed", color=MUTED)
    ax.set_ylabel("bits per byte (the axis does not start at 0)", color=MUTED)
    title = str(submission.get("name") or "seeds")
    ax.set_title(title, loc="left", color=INK, fontsize=11, parse_math=False)
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    atomic_write(path, buffer.getvalue())


def submit(args: argparse.Namespace) -> None:
    """Write a record's submission.json, README.md and seeds.png."""
    record, readme = args.record, args.record / "README.md"
    if not (record / "record.env").is_file():
        raise UserError(f"{record}: no record.env there; name a record folder")
    runs = [read_run(path) for path in args.runs]
    refuse_others(record, runs[0])
    refuse_mixed(runs)
    given = {name: getattr(args, name) for name in HANDWRITTEN if getattr(args, name)}
    submission = build_submission(read_object(record / "submission.json"), runs, given)
    theirs: dict[str, Any] = {}
    if args.against:
        path = args.against / "submission.json" if args.against.is_dir() else args.against
        theirs = read_object(path, papers.submission_findings)
        if not theirs:
            raise UserError(f"--against {args.against}: no submission.json there")
        submission["comparison"] = compare(submission, theirs, str(theirs.get("name") or path.resolve().parent.name))
    block = results_table(submission)
    old, findings = papers.read_text(readme)
    refuse(findings)
    text = with_block(old or f"# {record.resolve().name}\n", block)
    atomic_write(record / "submission.json", json.dumps(submission, indent=1).encode() + b"\n")
    atomic_write(readme, text.encode())
    draw(submission, theirs, record / "seeds.png")
    print(block)
    keys = ("val_bpb", "val_bpb_std", "val_loss", "bytes_total", "comparison")
    print("SUBMIT " + json.dumps({key: submission.get(key) for key in keys}))


# +---------------------------------------------------------------------------+
# | LEADERBOARD                                                               |
# +---------------------------------------------------------------------------+

LEADERBOARD_HEAD = """# Records

Written by `python records/submit.py --leaderboard`; do not edit. "Published" is the score
of the system that a record reproduces or is based on, "here" is what was run with this code, "legality" is the
verdict of `python records/verify.py` (toy size: the record's knobs and program on a small model).
"""


def legality_of(record: Path) -> str:
    """Return the judge's verdict on a record, from the verdict.json in its folder."""
    verdict = read_object(record / "verdict.json")
    if not verdict:
        return "not judged"
    if verdict.get("record_sha256") != preset_sha256(record):
        return "judged before its knobs changed"
    checks = verdict.get("checks") or []
    checks = checks if isinstance(checks, list) else [checks]
    if verdict.get("legal") not in (True, False, None) or not all(isinstance(check, dict) for check in checks):
        raise UserError(f"{record / 'verdict.json'} is no verdict; write it with `python records/verify.py --all`")
    word = {True: "legal", False: "NOT legal", None: "undecided"}[verdict.get("legal")]
    failed = [str(check.get("name")) for check in checks if check.get("status") == FAIL]
    return f"{word} ({'; '.join([str(verdict.get('scale')) + ' size', *failed])})"


def leaderboard_row(record: Path, records: Path) -> tuple[float, str]:
    """Return a record's (best score, table row)."""
    found = read_object(record / "submission.json", papers.submission_findings)
    published, ours = found.get("comparison_baseline_bpb"), found.get("val_bpb")
    here = "not run at full size" if ours is None else number(ours)
    if ours is not None and found.get("val_bpb_std") is not None:
        here += f" ± {found['val_bpb_std']:.5f} ({len(found.get('seeds') or [])} seeds)"
    # what has a BASE is no reproduction, unless it is named after what it reproduces
    own = len(preset_layers(str(record))) > 1 and not re.search(r"_PR\d+$", record.name)
    cells = (
        f"[{str(found.get('name') or record.name).replace('|', '/')}]({record.relative_to(records).as_posix()})",
        f"none; based on {found.get('comparison_baseline')}: {number(published)}" if own else number(published),
        here,
        number(found.get("bytes_total"), 0),
        number(found.get("train_wallclock_ms_mean"), 1, 1e3),
        number(found.get("eval_time_s_mean"), 1),
        legality_of(record),
    )
    return min((x for x in (published, ours) if x is not None), default=math.inf), "| " + " | ".join(cells) + " |"


def leaderboard(records: Path) -> str:
    """Return records/README.md: every record of every track, the best score first."""
    head = "| record | published val_bpb | here | bytes | train s | eval s | legality |"
    lines = [LEADERBOARD_HEAD]
    for track in sorted(path for path in records.glob("track_*") if path.is_dir()):
        rows = sorted(leaderboard_row(path.parent, records) for path in track.glob("*/record.env"))
        lines += [f"## {track.name}", "", head, "|---" * 7 + "|", *(row for _, row in rows), ""]
    return "\n".join(lines)


def write_leaderboard(records: Path, check: bool) -> int:
    """Write records/README.md. With --check only return 0 if it is up to date, else 1."""
    text, path = leaderboard(records), records / "README.md"
    if not check:
        atomic_write(path, text.encode())
        print(text)
    elif not path.is_file() or path.read_text(encoding="utf-8") != text:
        print(f"error: {path} is out of date; run `python records/submit.py --leaderboard`", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("record", type=Path, nargs="?", metavar="RECORD", help="record folder to write into")
    add("--runs", type=Path, nargs="+", metavar="RUN", help="run folders or logs, one per seed")
    add("--against", type=Path, metavar="RECORD", help="record or submission.json to compare with")
    for name in HANDWRITTEN:
        add(f"--{name.replace('_', '-')}", help=f"{name} in submission.json (default: as it is)")
    add("--leaderboard", action="store_true", help="write records/README.md")
    add("--check", action="store_true", help="with --leaderboard: only say whether it is up to date")
    add("--records", type=Path, default=ROOT / "records", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.leaderboard == bool(args.record and args.runs) or (args.check and not args.leaderboard):
        parser.error("give a record folder with --runs, or --leaderboard, which --check belongs to")
    try:
        if args.leaderboard:
            return write_leaderboard(args.records, args.check)
        submit(args)
    except (UserError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}".replace("\n", "; "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; every file is either as it was or written whole", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
