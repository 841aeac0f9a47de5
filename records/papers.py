"""One tolerant reader of what runs and records say about themselves: JSON, logs, metrics.

Whatever a file holds, reading it ends in a value and a list of findings, one line each. The judge makes checks of the
findings, records/submit.py refuses what has any.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

Findings = list[str]
MAX_DEPTH = 50  # levels of JSON; ours has five
NUMBERS = ("val_loss", "val_bpb")  # what a scored run must say
# What it may say, as numbers that are not negative.
OPTIONAL = (
    "seed train_seconds train_steps eval_seconds tokens_scored bytes_scored bytes_code bytes_model bytes_total"
).split()


class Log(NamedTuple):
    """A log's text, its non-default knobs, its last RESULT, the scores of its last `final:` line, and findings."""

    text: str
    knobs: dict[str, str]
    result: dict[str, Any]
    final: dict[str, float]
    findings: Findings


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number (True and False are none)."""
    whole = isinstance(value, int | float) and not isinstance(value, bool)
    # math.isfinite fails on whole numbers of 400 digits
    return whole and abs(value) <= sys.float_info.max


def read_text(path: Path) -> tuple[str, Findings]:
    """Return a file's text, "" without a file. Bytes that are not UTF-8 are replaced and found."""
    if not path.exists():
        return "", []
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig"), []
    except UnicodeDecodeError as error:
        return data.decode("utf-8", "replace"), [f"{path}: not UTF-8 text ({error.reason} at byte {error.start})"]
    except OSError as error:
        return "", [f"{path} cannot be read ({error.strerror})"]


def nested_deeper(value: Any, limit: int) -> bool:
    """Return whether parsed JSON has more levels: near Python's own limit it can be read, but not printed."""
    nodes = [value]
    for _ in range(limit):
        inner = [node.values() if isinstance(node, dict) else node for node in nodes if isinstance(node, dict | list)]
        nodes = [child for children in inner for child in children]
    return bool(nodes)


def parse_object(text: str, where: str) -> tuple[dict[str, Any], Findings]:
    """Return the JSON object in a text, {} and a finding if it is anything else."""
    try:
        value = json.loads(text)
        too_deep = nested_deeper(value, MAX_DEPTH)
    except RecursionError:
        too_deep = True
    except ValueError as error:
        return {}, [f"{where} is not valid JSON ({error}); copy or write it again"]
    if too_deep:
        return {}, [f"{where} is nested more than {MAX_DEPTH} levels deep; it was not written by this project"]
    if not isinstance(value, dict):
        return {}, [f"{where} holds a {type(value).__name__}, not an object; it was not written by this project"]
    return value, []


def read_object(path: Path) -> tuple[dict[str, Any], Findings]:
    """Return the JSON object in a file, {} without a file."""
    text, findings = read_text(path)
    if findings or not path.exists():
        return {}, findings
    return parse_object(text, str(path))


def read_log(path: Path) -> Log:
    """Read a log; all parts are empty without a file."""
    text, findings = read_text(path)
    block = text.rpartition("knobs that are not default:")[2].split("\nparameters")[0]
    knobs = dict(re.findall(r"^  ([A-Z0-9_]+)=(.*?)  \(", block, re.MULTILINE))
    results = re.findall(r"^RESULT (.*)$", text, re.MULTILINE)
    result, wrong = parse_object(results[-1], f"{path}: its RESULT line") if results else ({}, [])
    number = r"([-+.\deE]+|nan|inf)"
    lines = re.findall(
        rf"^final: val_loss {number} val_bpb {number} \(([\d,]+) tokens, ([\d,]+) bytes", text, re.MULTILINE
    )
    names, final = ("val_loss", "val_bpb", "tokens_scored", "bytes_scored"), {}
    if lines:
        try:
            final = {name: float(word.replace(",", "")) for name, word in zip(names, lines[-1], strict=True)}
        except ValueError:
            findings = [*findings, f"{path}: its line 'final:' holds no numbers"]
    return Log(text, knobs, result, final, [*findings, *wrong])


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], Findings]:
    """Return the objects of a file of JSON lines; lines that are none are counted in one finding."""
    text, findings = read_text(path)
    rows = [parse_object(line, str(path)) for line in text.splitlines() if line.strip()]
    wrong = sum(bool(problems) for _, problems in rows)
    return [row for row, _ in rows if row], [*findings, *[f"{path}: {wrong} lines are not JSON objects"] * bool(wrong)]


def result_findings(result: dict[str, Any], where: str) -> Findings:
    """Find entries of a finished run's result that are not what they are called."""
    found = [
        f"{where}: {key} is {result.get(key)!r}, not a number" for key in NUMBERS if not is_number(result.get(key))
    ]
    for key in OPTIONAL:
        value = result.get(key)
        if value is not None and not (is_number(value) and value >= 0):
            found.append(f"{where}: {key} is {value!r}, not a number from 0 up")
    stages = result.get("stages", {})
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        return [*found, f"{where}: stages is no object of objects"]
    for name, stage in stages.items():
        found += [
            f"{where}: {key} of stage {name} is {stage[key]!r}, not a number"
            for key in NUMBERS
            if stage.get(key) is not None and not is_number(stage[key])
        ]
    return found


def submission_findings(submission: dict[str, Any], where: str) -> Findings:
    """Find entries of a submission.json that no table can be made of."""
    found, seeds = [], submission.get("seed_results") or {}
    if not isinstance(seeds, dict) or not all(isinstance(row, dict) for row in seeds.values()):
        return [f"{where}: seed_results is no object of objects, one for each seed"]
    for seed, row in seeds.items():
        if not is_number(row.get("val_bpb")):
            found.append(f"{where}: seed {seed} has no val_bpb that is a number")
        wrong = [key for key, value in row.items() if value is not None and not is_number(value)]
        found += [f"{where}: {key} of seed {seed} is {row[key]!r}, not a number" for key in wrong if key != "val_bpb"]
    numbers = "val_loss val_bpb val_loss_std val_bpb_std bytes_total comparison_baseline_bpb".split()
    numbers += ["train_wallclock_ms_mean", "eval_time_s_mean"]
    for key in numbers:
        if submission.get(key) is not None and not is_number(submission[key]):
            found.append(f"{where}: {key} is {submission[key]!r}, not a number")
    if not isinstance(submission.get("seeds") or [], list):
        found.append(f"{where}: seeds is no list")
    if not isinstance(submission.get("compliance") or {}, dict):
        found.append(f"{where}: compliance is no object")
    return found
