"""What runs and records claim, held against one another: words, knobs, numbers, clocks, and the bytes on disk."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pack_artifact import CAP_BYTES
from records import papers
from train_gpt import LOCAL_KNOBS, Config, load_config, read_preset

BUDGET_SECONDS = 600.0
CLOCK_SLACK = 0.5  # seconds between two clocks that were read one after the other
ROUNDED = 6e-9  # a log's line holds 8 decimals
INVALID_TOTAL = 164_594_398
CANONICAL = {  # (bytes, targets) -> what that denominator is; targets 0: any number
    (151_074_499, 47_851_520): "the canonical CaseOps denominator",
    (151_079_389, 43_767_808): "the canonical CaseOps denominator, pairs fused",
    (151_080_891, 0): "the canonical SP8192 denominator",
    (INVALID_TOTAL, 0): "CaseOps operators counted as bytes: an INVALID denominator",
}
# Published counts of validation targets, each with its bytes; two ways to end the stream differ by a share of NEAR.
TARGETS = {47_851_520: 151_074_499, 43_767_808: 151_079_389, 62_021_632: 151_080_891, 40_540_160: 151_080_891}
NEAR = 5e-4
PASS, FAIL, NOT_ASKED, UNKNOWN = "pass", "FAIL", "n/a", "unknown"


class Check(NamedTuple):
    """One question, its answer and the reason."""

    name: str
    status: str
    detail: str


def decide(name: str, good: bool, detail: str) -> Check:
    """Return a check that passed or failed."""
    return Check(name, PASS if good else FAIL, detail)


@dataclass
class Candidate:
    """What is judged: the program, the knobs and the weights that it scores with, and the papers around them.

    values: the knobs of its runs; claimed: those that its papers are about, the same but for a preset.
    """

    kind: str  # preset, run or artifact
    name: str
    source: bytes
    values: dict[str, str]
    claimed: dict[str, str]
    weights: bytes | None = None
    folder: Path | None = None  # record or run folder
    result: dict[str, Any] = field(default_factory=dict)  # result.json
    files: list[Path] = field(default_factory=list)  # what would be submitted
    data: Path | None = None
    tokenizer: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def cfg(self) -> Config:
        """The configuration of its runs."""
        return load_config(self.values)


def preset_sha256(folder: Path) -> str:
    """Hash the knobs in a preset, over those of its BASE; comments and the order of lines do not count."""
    return hashlib.sha256(json.dumps(read_preset(str(folder)), sort_keys=True).encode()).hexdigest()


def number(value: Any) -> float | None:
    """Return a finite number, None for anything else."""
    return float(value) if papers.is_number(value) else None


# Clocks and bytes


def budget_checks(candidate: Candidate) -> Iterator[Check]:
    """600 s each for training with its Hessians and for scoring: result.json, the log and metrics.jsonl."""
    if candidate.kind != "run":
        yield Check("budget", NOT_ASKED, f"{candidate.kind}: it has no clock; judge its run folder")
        return
    for name, key in (("budget training", "train_seconds"), ("budget evaluation", "eval_seconds")):
        seconds = number(candidate.result.get(key))
        if seconds is None:
            stage = key.split("_")[0]
            yield Check(name, UNKNOWN, f"result.json has no {key}; run the stage again (STAGES={stage},...)")
        else:
            # within what two clocks differ by, the question is open
            late = UNKNOWN if 0 <= seconds <= BUDGET_SECONDS + CLOCK_SLACK else FAIL
            state = PASS if 0 <= seconds <= BUDGET_SECONDS else late
            yield Check(name, state, f"{seconds:.1f} of {BUDGET_SECONDS:.0f} s")
    log = papers.read_log(candidate.folder / "log.txt").text
    stop = re.findall(r"training stopped at step \d+ after ([\d.]+) s", log)
    hessians = re.findall(r"calibration: ([\d.]+) s", log)
    rows, _ = papers.read_metrics(candidate.folder / "metrics.jsonl")
    ticks = [row["seconds"] for row in rows if number(row.get("seconds")) is not None]
    claimed = number(candidate.result.get("train_seconds"))
    seen = {"metrics.jsonl": max(ticks, default=0.0)}
    if stop:
        seen["log"] = float(stop[-1]) + (float(hessians[-1]) if hessians else 0.0)
    if claimed is not None:
        good = all(seconds <= claimed + CLOCK_SLACK for seconds in seen.values())
        detail = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in seen.items())
        yield decide("budget as logged", good, f"{detail}, result.json {claimed:.1f} s")


def disk_checks(candidate: Candidate) -> Iterator[Check]:
    """The real bytes of the submitted files against the cap, and against what papers count."""
    files, result = candidate.files, candidate.result
    if not files:
        missing = f"result.json counts {result['artifact']}, which is not there" if result.get("artifact") else ""
        yield Check("disk", FAIL if missing else NOT_ASKED, missing or "nothing is packed here")
        return
    total = sum(file.stat().st_size for file in files)
    names = " + ".join(file.name for file in files)
    yield decide("disk cap", total <= CAP_BYTES, f"{names}: {total:,} of {CAP_BYTES:,} bytes")
    claimed = number(result.get("bytes_total"))
    if claimed is not None:
        yield decide("disk as counted", claimed == total, f"{total:,} bytes on disk, result.json counts {claimed:,.0f}")
    paper = papers.read_object(candidate.folder / "submission.json")[0] if candidate.folder else {}
    claimed = number(paper.get("bytes_total"))
    if claimed is not None:
        good = claimed >= total
        yield decide("disk as claimed", good, f"{total:,} bytes on disk, submission.json claims {claimed:,.0f}")
    digest = result.get("artifact_sha256")
    if digest and len(files) == 1:
        found = hashlib.sha256(files[0].read_bytes()).hexdigest()
        yield decide("disk as packed", found == digest, f"sha256 {found[:16]}, result.json {str(digest)[:16]}")


# Sentences in papers: how to recognise one, whether the knobs (c) agree with the match (m), what they say otherwise.
CLAIMS: tuple[tuple[str, Callable[[Any, re.Match[str]], bool], str], ...] = (
    (
        r"BOS[- ](?:fix|mask)|mask\w* at document starts|with the document mask",
        lambda c, m: "smear" not in c.embed_extras or c.smear_bos_mask,
        "SMEAR_BOS_MASK=0",
    ),
    (
        r"nothing carried from one\s+document to another",
        lambda c, m: {"doc_lora": not c.ttt_warm_start_a}.get(c.eval, False),
        "EVAL={c.eval}, TTT_WARM_START_A={c.ttt_warm_start_a:d}",
    ),
    (r"A warm-started", lambda c, m: c.ttt_warm_start_a, "TTT_WARM_START_A=0"),
    (
        r"adapters? per document \(rank (\d+)",
        lambda c, m: c.ttt_lora_rank == int(m[1]),
        "TTT_LORA_RANK={c.ttt_lora_rank}",
    ),
    (r"int(\d) matrices", lambda c, m: c.matrix_bits == int(m[1]), "MATRIX_BITS={c.matrix_bits}"),
    (r"int(\d) embedding", lambda c, m: c.embed_bits == int(m[1]), "EMBED_BITS={c.embed_bits}"),
    (r"per-group lrzip", lambda c, m: c.compressor == "pergroup", "COMPRESSOR={c.compressor}"),
)
COMPLIANCE: dict[str, Callable[[Candidate, Config], bool]] = {
    "artifact_under_16mb": lambda c, _: sum(file.stat().st_size for file in c.files) <= CAP_BYTES,
    "train_under_600s_strict": lambda c, _: (number(c.result.get("train_seconds")) or 0) <= BUDGET_SECONDS,
    "eval_under_600s": lambda c, _: (number(c.result.get("eval_seconds")) or 0) <= BUDGET_SECONDS,
    "score_before_update": lambda c, _: c.result.get("legal", True) is True,
    "no_slot": lambda c, cfg: {"slot": False}.get(cfg.eval, True),
}


class Limit(NamedTuple):
    """What shows an item of compliance: a column of seed_results with the most that it allows, and a run's result."""

    column: str
    most: float
    entry: str  # of result.json


# The judge's own runs tell the rest: whether a score comes first.
LIMITS = {
    "artifact_under_16mb": Limit("artifact_bytes", CAP_BYTES, "bytes_total"),
    "train_under_600s_strict": Limit("train_wallclock_ms", 1e3 * BUDGET_SECONDS, "train_seconds"),
    "eval_under_600s": Limit("eval_time_s", BUDGET_SECONDS, "eval_seconds"),
}


def claim_checks(candidate: Candidate) -> list[Check]:
    """README and submission.json against the knobs; submission.json, log, result.json and record.env against one
    another. A paper that is damaged is a failed check."""
    if candidate.folder is None:
        return [Check("claims", NOT_ASKED, "an artifact alone claims nothing")]
    readme, found = papers.read_text(candidate.folder / "README.md")
    submission, wrong = papers.read_object(candidate.folder / "submission.json")
    wrong = [*found, *wrong, *papers.submission_findings(submission, "submission.json")]
    _, damaged = papers.read_object(candidate.folder / "result.json")
    wrong += damaged
    if candidate.kind == "run" and not damaged:
        wrong += papers.result_findings(candidate.result, "result.json")
    wrong += papers.read_metrics(candidate.folder / "metrics.jsonl")[1]
    logs = {path.name: papers.read_log(path) for path in log_paths(candidate.folder)}
    wrong += [finding for log in logs.values() for finding in log.findings]
    checks = [decide("papers readable", not wrong, "; ".join(wrong) or "nothing is damaged")]
    # what is not as it should be has been said; the other checks read what is left
    submission = {} if papers.submission_findings(submission, "") else submission
    checks += word_checks(candidate, readme, submission)
    checks += seed_checks(submission)
    checks += score_claims(candidate, submission, logs)
    for name, log in logs.items():
        checks += log_checks(candidate, name, log)
    return checks


def log_paths(folder: Path) -> list[Path]:
    """Return the logs in a record or run folder."""
    return sorted(path for path in folder.iterdir() if path.name == "log.txt" or path.suffix == ".log")


def word_checks(candidate: Candidate, readme: str, submission: Mapping[str, Any]) -> Iterator[Check]:
    """Sentences against the knobs, and the compliance that submission.json claims."""
    # Departures from the published system describe what does not hold here.
    said = (str(submission.get(key, "")) for key in ("name", "blurb", "technique_summary"))
    text, cfg = " ".join([readme.split("## Departures")[0], *said]), load_config(candidate.claimed)
    found = [(m, holds(cfg, m), said) for words, holds, said in CLAIMS for m in re.finditer(words, text, re.IGNORECASE)]
    wrong = [f"says '{m[0]}', but {said.format(c=cfg)}" for m, holds, said in found if not holds]
    yield decide("claims in words", not wrong, "; ".join(wrong) or f"{len(found)} sentences agree with the knobs")
    compliance = submission.get("compliance") or {}
    said = [name for name in COMPLIANCE if compliance.get(name) is True]
    if said:
        rows = list((submission.get("seed_results") or {}).values())
        over = [
            name for name, limit in LIMITS.items() if any((number(r.get(limit.column)) or 0) > limit.most for r in rows)
        ]
        false = [name for name in said if name in over or not COMPLIANCE[name](candidate, cfg)]
        unshown = [] if false else [name for name in said if name in LIMITS and not is_shown(candidate, name, rows)]
        if unshown:
            yield Check("claims of compliance", UNKNOWN, f"nothing here shows {', '.join(unshown)}")
        else:
            yield decide("claims of compliance", not false, ", ".join(false) or f"{len(said)} hold")


def is_shown(candidate: Candidate, name: str, rows: list[Mapping[str, Any]]) -> bool:
    """Return whether files, the result or each row of seed_results says something about an item of compliance."""
    column, _, entry = LIMITS[name]
    counted = name == "artifact_under_16mb" and bool(candidate.files)
    in_rows = bool(rows) and all(number(row.get(column)) is not None for row in rows)
    return counted or in_rows or candidate.result.get(entry) is not None


def seed_checks(submission: Mapping[str, Any]) -> Iterator[Check]:
    """submission.json against itself: its mean is that of its seeds, and it lists the seeds that it has."""
    seeds = submission.get("seed_results") or {}
    if not seeds:
        return
    claimed, size = submission.get("val_bpb"), submission.get("bytes_total")
    mean = sum(row["val_bpb"] for row in seeds.values()) / len(seeds)
    listed = sorted(map(str, submission.get("seeds") or [])) == sorted(seeds)
    good = listed and math.isclose(mean, claimed or 0, abs_tol=5e-6)
    yield decide("claims of the score", good, f"val_bpb {claimed}, mean of {len(seeds)} seeds {mean:.8f}")
    largest = max(row.get("artifact_bytes") or 0 for row in seeds.values())
    if largest:
        good = largest == size and largest <= CAP_BYTES
        yield decide("claims of the size", good, f"bytes_total {size}, largest seed {largest}")


def score_claims(
    candidate: Candidate, submission: Mapping[str, Any], logs: Mapping[str, papers.Log]
) -> Iterator[Check]:
    """What submission.json claims against the results and logs that lie beside it, seed by seed."""
    claimed = number(submission.get("val_bpb"))
    if claimed is None:
        return
    found: dict[str, float] = {}
    for name, result in {"result.json": candidate.result, **{name: log.result for name, log in logs.items()}}.items():
        score = number(result.get("val_bpb"))
        if score is not None:
            found[str(result.get("seed", name))] = score
    name, seeds = "claims against results", submission.get("seed_results") or {}
    if not found:
        yield Check(name, UNKNOWN, "submission.json claims a score, and no result.json or log beside it shows one")
        return
    # one run of several seeds is held against its own row, else the mean against the mean
    pairs = {seed: (row["val_bpb"], found[seed]) for seed, row in seeds.items() if seed in found}
    if not pairs:
        pairs = {"mean": (claimed, sum(found.values()) / len(found))}
    wrong = [
        f"{seed}: claimed {a}, found {b}" for seed, (a, b) in pairs.items() if not math.isclose(a, b, abs_tol=5e-6)
    ]
    missing = sorted(seeds.keys() - found.keys())
    # one run claims what a row of several seeds does, and shows its own
    if missing and not wrong and candidate.kind != "run" and "mean" not in pairs:
        yield Check(name, UNKNOWN, f"no log of seed {', '.join(missing)}")
        return
    yield decide(name, not wrong, "; ".join(wrong) or f"{len(pairs)} agree")


def log_checks(candidate: Candidate, name: str, log: papers.Log) -> Iterator[Check]:
    """A log against itself; the run's own log against result.json and record.env too."""
    pairs = [(key, log.result.get(key), value) for key, value in log.final.items()]
    if log.result and log.final:
        wrong = [key for key, a, b in pairs if number(a) is None or abs(number(a) - b) > ROUNDED]
        detail = ", ".join(f"{key}: RESULT {log.result.get(key)}, final: {log.final[key]}" for key in wrong)
        yield decide(f"{name}: final and RESULT", not wrong, detail or f"{len(pairs)} values agree")
    if name != "log.txt" or candidate.kind != "run" or not log.text:
        return
    keys = "val_loss val_bpb seed tokens_scored bytes_scored train_seconds eval_seconds".split()
    keys = [key for key in keys if key in log.result]
    wrong = [key for key in keys if log.result[key] != candidate.result.get(key)]
    yield decide("log and result", not wrong and bool(keys), ", ".join(wrong) or f"{len(keys)} values agree")
    lines = candidate.claimed
    names = (log.knobs.keys() | lines.keys()) - {name.upper() for name in LOCAL_KNOBS}
    wrong = sorted(key for key in names if log.knobs.get(key) != lines.get(key))
    yield decide("log and record.env", not wrong, ", ".join(wrong) or f"{len(lines)} knobs agree")
