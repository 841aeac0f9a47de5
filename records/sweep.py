#!/usr/bin/env python3
"""Sweeps: variants of a preset against their base, on the same seeds, with Optuna's storage as the engine.

    python records/sweep.py STUDY.toml               run what is left of the study, then report
    python records/sweep.py STUDY.toml --dry-run     only show the trials and what they would cost
    python records/sweep.py STUDY.toml --report      only report what is done by now

Start the first command again after it was stopped, and as often at once as you have machines: each start is a worker,
and no two workers run the same trial. A study file (all but `base` may be missing; paths are as seen from where you
stand):

    base = "records/demo"           a preset; every trial is compared with it
    seeds = [1, 2, 3]               each variant runs with each of them
    launch = "python"               or "torchrun --standalone --nproc_per_node=8", or a template with {program}, such as
                                    "srun --gpus=8 torchrun --standalone --nproc_per_node=8 {program}"
    score = "final"                 what is compared: val_bpb of pre_quant, quantized or final
    from = "logs/RUN"               a finished run, or a list of runs with different seeds, instead of `seeds`: trials
    stages = "quantize,eval"        start from links to its files and do only these stages ("eval": from model.bin)
    storage = "trials.journal"      a file, or a database that machines share ("postgresql://..."); default: in `out`
    out = "logs/NAME"               run folders, report.png and trials.csv; default: logs/ and the study file's name
    [set]                           knobs of every trial
    ITERATIONS = 200
    [variants.fast]                 paired design: any number of named variants, each a table of knobs
    MATRIX_LR = 0.03
    [search]                        and, or instead: points that Optuna's TPE samples
    points = 20
    MATRIX_LR = { low = 0.01, high = 0.05, log = true }
    EMBED_BITS = [6, 7, 8]
    [gate]                          a trial is stopped when it is worse than the base by more than these margins:
    train_loss = { 50 = 0.1 }       nats per token, after so many steps
    pre_quant = 0.01                bits per byte, when training is done
    [budget]                        no trial is begun that would exceed it; machine hours, summed over workers
    hours = 2
    dollars = 40
    dollars_per_hour = 20           of one worker's machine
    hours_per_trial = 0.4           for the estimate, until a trial is finished

Knobs come from the study file and the preset alone, but where a run happens (DATA_PATH, DEVICE, ...) may come from the
environment. The queue runs the seeds in turn, the variants forwards and backwards (A B, B A, ...), so that a machine
that slowly changes favours nobody. The gate compares with the base's run of the same seed; where that has not come so
far, with the worst of the base's other runs. A point of a search that is not stopped on the first seed runs on the
others too. A trial whose worker was killed is put back once and goes on after its last finished stage; what it cost
still counts. A trial that fails is a row of the table; --retry puts failed trials back.

Statistics: differences of val_bpb over common seeds, with the 95 % interval of their mean and the one-sided p of the
paired test ("lower than the base"), as in records/submit.py, also corrected by Holm for the number of variants.
The last line of the output is `SWEEP {json}`. Exit status: 0, 1 if trials failed, 2 for a mistake in the study.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import difflib
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

INTERRUPTED = "error: interrupted; nothing is lost, start it again to go on"

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from interrupts import main_begins, quiet_until_main  # noqa: E402

if __name__ == "__main__":
    quiet_until_main(INTERRUPTED)

import numpy as np  # noqa: E402
import optuna  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from optuna.exceptions import UpdateFinishedTrialError  # noqa: E402
from optuna.storages.journal import JournalFileBackend  # noqa: E402
from optuna.trial import FrozenTrial, Trial, TrialState  # noqa: E402
from scipy import stats  # noqa: E402
from sqlalchemy.exc import DBAPIError, SQLAlchemyError  # noqa: E402  (Optuna's databases)

from records import papers  # noqa: E402  (needs the line above)
from records.submit import INK, MUTED, OURS, THEIRS, number, paired, sample_std  # noqa: E402
from train_gpt import (  # noqa: E402
    CHECKPOINT,
    LOCAL_KNOBS,
    Config,
    UserError,
    atomic_write,
    check_trained,
    format_knob,
    load_config,
    locked,
    name_problems,
    parse_preset,
    read_json,
    record_env,
    short_hash,
)

KNOBS = {f.name.upper(): f for f in fields(Config)}
OWN_KNOBS = ("SEED", "RUN_ID", "ARTIFACT_DIR", "STAGES", "MODEL_PATH", "SCORES", "OVERWRITE")  # the sweep sets these
BASE = "base"
STAGES = {"train": "pre_quant", "quantize": "quantized", "eval": "final"}  # a stage -> the score that it leaves
NEEDED = {"quantize": ("model.pt", "hessians.pt"), "eval": ("model.bin",)}  # first stage -> files that it starts from
WAITING, RUNNING, COMPLETE, PRUNED, FAIL = (
    TrialState.WAITING,
    TrialState.RUNNING,
    TrialState.COMPLETE,
    TrialState.PRUNED,
    TrialState.FAIL,
)
WORDS = {WAITING: "waiting", RUNNING: "running", COMPLETE: "done", PRUNED: "stopped", FAIL: "failed"}
AFTER_TRAINING = 10**9  # the "step" at which the score before quantisation is reported to Optuna
POLL, BEAT, STALE = 0.5, 10.0, 300.0  # seconds: between looks, between signs of life, until a silent worker is dead
GRACE = 45  # seconds from SIGINT to SIGKILL: torchrun needs 30 to end its ranks
MAX_DEATHS = 2  # a trial that two workers died of is not put back
ERROR_LINE = r"^(?:\[rank\d+\]: )?(error: .+|(?:\w+\.)*\w*(?:Error|Exception)\b.*)$"


# +---------------------------------------------------------------------------+
# | STUDY FILE                                                                |
# +---------------------------------------------------------------------------+


class Range(NamedTuple):
    """Where a knob of a search may lie."""

    low: float
    high: float
    log: bool = False


class Row(NamedTuple):
    """A run that is due: variant, seed, its own knobs as text, and the name of its place in the plan.

    params: of a search, the values that Optuna is to use; empty if it is to sample them.
    """

    name: str
    seed: int
    knobs: dict[str, str]
    slot: str
    params: dict[str, Any]


@dataclass(frozen=True)
class Spec:
    """A study file, checked."""

    path: Path
    base: str
    seeds: tuple[int, ...]
    sources: dict[int, Path]  # seed -> the finished run that its trials start from
    launch: str
    score: str
    stages: tuple[str, ...]
    storage: str
    out: Path
    common: dict[str, str] = field(default_factory=dict)
    variants: dict[str, dict[str, str]] = field(default_factory=dict)  # the base first
    search: dict[str, Range | list[str]] = field(default_factory=dict)
    points: int = 0
    gate: dict[int, float] = field(default_factory=dict)  # step -> margin
    budget: dict[str, float] = field(default_factory=dict)
    program: str = ""  # a hash of train_gpt.py

    def environment(self, seed: int, knobs: Mapping[str, str]) -> dict[str, str]:
        """The knobs of a run, without its folder."""
        own = {"PRESET": self.base, "SEED": str(seed), "STAGES": ",".join(self.stages)}
        return own | self.common | dict(knobs)

    def config(self, seed: int, knobs: Mapping[str, str]) -> Config:
        """The configuration of a run; UserError if it is none."""
        return load_config(self.environment(seed, knobs))

    def key(self, seed: int, knobs: Mapping[str, str]) -> str:
        """A hash of what makes a run what it is: knobs, stages, program, and the weights that it starts from."""
        local = {k: v for k, v in (self.common | dict(knobs)).items() if k.lower() in LOCAL_KNOBS}
        start = weights_hash(str(self.sources[seed]), NEEDED[self.stages[0]]) if self.sources else ""
        facts = [record_env(self.config(seed, knobs)), sorted(local.items()), self.stages, self.program, start]
        return short_hash(json.dumps(facts).encode())

    def rows(self) -> list[Row]:
        """The paired runs in the order A B C, C B A, A B C ..., a seed at a time."""
        found = []
        for index, seed in enumerate(self.seeds):
            names = list(self.variants)[:: -1 if index % 2 else 1]
            for name in names:
                knobs = self.variants[name]
                found.append(Row(name, seed, knobs, self.key(seed, knobs), {}))
        return found

    def point(self, index: int, seed: int, params: Mapping[str, Any]) -> Row:
        """A run of a search; which knobs it has is known when it is sampled."""
        return Row(f"point{index}", seed, {}, f"point{index} {self.key(seed, {})}", dict(params))


@functools.cache
def weights_hash(folder: str, names: tuple[str, ...]) -> str:
    """A hash of some files' bytes, computed once in a process."""
    total = hashlib.sha256()
    for name in names:
        with open(Path(folder) / name, "rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


def near(name: str, known: list[str]) -> str:
    """What to say instead of an unknown name."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def is_a(value: Any, kinds: tuple[type, ...]) -> bool:
    """isinstance, in which True is no number."""
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


TEXT, LIST, TABLE, REAL = (str,), (list,), (dict,), (int, float)
KEYS = {
    "base": TEXT,
    "seeds": LIST,
    "launch": TEXT,
    "score": TEXT,
    "from": (str, list),
    "stages": TEXT,
    "storage": TEXT,
    "out": TEXT,
    "set": TABLE,
    "variants": TABLE,
    "search": TABLE,
    "budget": TABLE,
    "gate": TABLE,
}
BUDGET_KEYS = {"hours": REAL, "dollars": REAL, "dollars_per_hour": REAL, "hours_per_trial": REAL}
GATE_KEYS = {"train_loss": TABLE, "pre_quant": REAL}
RANGE_KEYS = {"low": REAL, "high": REAL, "log": (bool,)}
KINDS = {TEXT: "a text", LIST: "a list", TABLE: "a table", REAL: "a number", (bool,): "true or false"}


def check_keys(table: Mapping[str, Any], keys: Mapping[str, tuple[type, ...]], where: str) -> None:
    """UserError for a key that a table cannot have, or a value of another kind."""
    for key, value in table.items():
        if key not in keys:
            raise UserError(f"{where}{key} is no key of a study; {near(key, list(keys))}")
        if not is_a(value, keys[key]):
            raise UserError(f"{where}{key} = {value!r} must be {KINDS.get(keys[key], 'a text or a list')}")


def check_positive(value: float, where: str) -> None:
    """UserError unless a number is above 0 and finite."""
    if not 0 < value < math.inf:
        raise UserError(f"{where} = {value!r} must be above 0")


def knob_text(value: Any, where: str) -> str:
    """A knob's value in TOML as the text that an environment would hold."""
    if isinstance(value, bool | int | float | str):
        return format_knob(value)
    if isinstance(value, list) and all(isinstance(item, int | float | str) for item in value):
        return format_knob(tuple(value))
    raise UserError(f"{where} = {value!r} must be a number, a text or a list of them")


def knob_names(names: list[str], where: str) -> None:
    """UserError for what is no knob, or one that the sweep itself sets."""
    problems = name_problems(names, KNOBS, strict=True)
    own = [f"{name} is set by the sweep itself" for name in names if name in OWN_KNOBS]
    if problems or own:
        raise UserError(f"{where} " + "; ".join(problems + own))


def read_knobs(table: Any, where: str) -> dict[str, str]:
    """KEY -> text of a table of knobs."""
    if not isinstance(table, dict):
        raise UserError(f"{where} must be a table of knobs")
    knob_names(list(table), where)
    return {name: knob_text(value, f"{where} {name}") for name, value in table.items()}


def read_search(table: dict[str, Any], where: str) -> tuple[dict[str, Range | list[str]], int]:
    """The knobs of a search and the number of points."""
    points = table.pop("points", None)
    if not is_a(points, (int,)) or points < 1 or not table:
        raise UserError(f"{where} needs points = N, the number of points to try, and at least one knob")
    knob_names(list(table), where)
    found: dict[str, Range | list[str]] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            check_keys(value, RANGE_KEYS, f"{where} {name}.")
            if KNOBS[name].type not in ("int", "float") or not {"low", "high"} <= value.keys():
                raise UserError(f"{where} {name}: a range is {{ low = .., high = .. }} of a knob that is a number")
            found[name] = Range(**value)
            if not -math.inf < value["low"] < value["high"] < math.inf or (found[name].log and value["low"] <= 0):
                raise UserError(f"{where} {name}: low must be less than high, both finite, and above 0 with log = true")
            if KNOBS[name].type == "int" and not all(float(end).is_integer() for end in found[name][:2]):
                raise UserError(f"{where} {name}: low and high must be whole numbers, as those of the knob are")
        elif isinstance(value, list) and value:
            found[name] = [knob_text(item, f"{where} {name}") for item in value]
        else:
            raise UserError(f"{where} {name} = {value!r} must be a list of values or {{ low = .., high = .. }}")
    return found, points


def read_gate(table: dict[str, Any], where: str) -> dict[int, float]:
    """Step -> margin; the score before quantisation has the step AFTER_TRAINING."""
    check_keys(table, GATE_KEYS, where)
    found = {}
    for step, margin in table.get("train_loss", {}).items():
        if not step.isdecimal() or not int(step) or not is_a(margin, REAL) or not 0 <= margin < math.inf:
            raise UserError(f"{where}train_loss: {step} = {margin!r} must be STEP = MARGIN, in nats per token")
        found[int(step)] = float(margin)
    if "pre_quant" in table:
        check_positive(table["pre_quant"], f"{where}pre_quant")
        found[AFTER_TRAINING] = float(table["pre_quant"])
    return found


def read_sources(given: str | list[str], stages: tuple[str, ...]) -> dict[int, Path]:
    """Seed -> finished run that trials start from. UserError for a run that lacks what the stages need."""
    found: dict[int, Path] = {}
    for word in [given] if isinstance(given, str) else given:
        folder = Path(str(word))
        for name in ("record.env", "result.json", *NEEDED[stages[0]]):
            if not (folder / name).is_file():
                raise UserError(f"from = {word!r}: {folder / name} is missing; name a finished run's folder")
        seed = load_config(parse_preset(folder / "record.env")).seed
        if seed in found:
            raise UserError(f"from: {found[seed]} and {folder} have one seed, {seed}; trials could not be told apart")
        found[seed] = folder
    if not found:
        raise UserError("from = [] names no run")
    return found


def read_spec(path: Path) -> Spec:
    """Read and check a study file; all that can be wrong with it is a UserError here, before anything runs."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such study file") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    try:
        spec = build_spec(path, table)
        check_runs(spec)
    except UserError as error:
        raise UserError(f"{path}: " + "; ".join(str(error).splitlines())) from None
    return spec


def build_spec(path: Path, table: dict[str, Any]) -> Spec:
    """Check the tables by themselves."""
    check_keys(table, KEYS, "")
    fixed = "from" in table
    stages = tuple(table.get("stages", "quantize,eval" if fixed else "train,quantize,eval").split(","))
    if stages not in [tuple(STAGES)[i:] for i in ((1, 2) if fixed else (0,))]:
        raise UserError(
            f"stages = {','.join(stages)!r}: with `from` it is 'quantize,eval' or 'eval', without it all three"
        )
    if fixed == ("seeds" in table):
        raise UserError("say either seeds = [..] or from = .. (whose runs have their seeds)")
    sources = read_sources(table["from"], stages) if fixed else {}
    seeds = tuple(sources or table["seeds"])
    if not seeds or not all(is_a(s, (int,)) and s >= 0 for s in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds = {list(seeds)} must be different whole numbers from 0 up")
    if not table.get("base") and not fixed:
        raise UserError("base is missing; name a preset, for example base = 'records/demo'")
    variants = {BASE: {}}
    for name, knobs in table.get("variants", {}).items():
        if not re.fullmatch(r"[\w.-]+", name) or re.fullmatch(rf"{BASE}|point\d+", name):
            raise UserError(f"[variants.{name}]: name it by letters, digits, _ . -, and not {BASE} or point1")
        variants[name] = read_knobs(knobs, f"[variants.{name}]")
    search, points = read_search(table["search"], "[search]") if "search" in table else ({}, 0)
    budget = table.get("budget", {})
    check_keys(budget, BUDGET_KEYS, "[budget] ")
    for name, value in budget.items():
        check_positive(value, f"[budget] {name}")
    if "dollars" in budget and "dollars_per_hour" not in budget:
        raise UserError("[budget] dollars needs dollars_per_hour, the price of one worker's machine")
    score = table.get("score", "final")
    if score not in (choices := [STAGES[stage] for stage in stages]):
        raise UserError(f"score = {score!r} is not measured by these stages; {near(score, choices)}")
    out = Path(table.get("out", Path("logs") / path.stem))
    return Spec(
        path=path,
        base=table.get("base") or str(next(iter(sources.values()))),
        seeds=seeds,
        sources=sources,
        launch=table.get("launch", "python"),
        score=score,
        stages=stages,
        storage=table.get("storage") or str(out / "trials.journal"),
        out=out,
        common=read_knobs(table.get("set", {}), "[set]"),
        variants=variants,
        search=search,
        points=points,
        gate=read_gate(table.get("gate", {}), "[gate] "),
        budget=budget,
        program=hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest(),
    )


def check_runs(spec: Spec) -> None:
    """Check every run of the study as train_gpt.py would, and that the gate looks where something is written."""
    foreign = [name for name in ("PRESET", *KNOBS) if name in os.environ]
    foreign = [n for n in foreign if n in (*OWN_KNOBS, "PRESET") or n.lower() not in LOCAL_KNOBS]
    if foreign:
        raise UserError(f"{foreign[0]} is set in the environment; a sweep takes it from the study file alone")
    if not launch_command(spec.launch):
        raise UserError("launch = '' names no command")
    tables = {"[set]" if name == BASE else f"[variants.{name}]": knobs for name, knobs in spec.variants.items()}
    for name, values in spec.search.items():
        ends = [format_knob(bound(name, end)) for end in values[:2]] if isinstance(values, Range) else values
        tables |= {f"[search] {name} = {text}": {name: text} for text in ends}
    known: dict[str, str] = {}
    for where, knobs in tables.items():
        for seed in spec.seeds:
            try:
                cfg = spec.config(seed, knobs)
                if spec.sources:
                    check_trained(cfg, spec.sources[seed])
                else:
                    check_gate(spec.gate, cfg)
            except UserError as error:
                raise UserError(f"{where} {error}") from None
        key = spec.key(spec.seeds[0], knobs)
        if key in known and not where.startswith("[search]"):
            raise UserError(f"{where} is the same run as {known[key]}")
        known.setdefault(key, "the base" if where == "[set]" else where)
    if spec.sources and spec.gate:
        raise UserError("[gate] has nothing to look at: with `from`, nothing is trained")


def check_launcher(spec: Spec) -> None:
    """UserError if the program that starts runs is not on this machine; a report needs none."""
    if not shutil.which(launch_command(spec.launch)[0]):
        raise UserError(
            f"{spec.path}: launch = {spec.launch!r}: no such program here; install it, or say launch = 'python'"
        )


def check_gate(gate: Mapping[int, float], cfg: Config) -> None:
    """UserError for a step whose training loss a run does not write."""
    for step in gate.keys() - {AFTER_TRAINING}:
        if step > cfg.iterations or (step > 5 and step % cfg.train_log_every):
            raise UserError(
                f"[gate] train_loss: step {step} is not logged; with ITERATIONS={cfg.iterations} and "
                f"TRAIN_LOG_EVERY={cfg.train_log_every} name a multiple of {cfg.train_log_every}, or one of 1 to 5"
            )


def bound(name: str, value: float) -> float | int:
    """An end of a range as a value of its knob."""
    return int(value) if KNOBS[name].type == "int" else float(value)


def launch_command(launch: str) -> list[str]:
    """The words that start a run: {program} is train_gpt.py; python and torchrun are those of this environment."""
    words: list[str] = []
    program = str(ROOT / "train_gpt.py")
    own = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    try:
        given = shlex.split(launch)
    except ValueError as error:
        raise UserError(f"launch = {launch!r}: {error}; mend its quotation marks") from None
    for word in given:
        words += own.get(word, [word.replace("{program}", program)])
    return words if not words or "{program}" in launch else [*words, program]


# +---------------------------------------------------------------------------+
# | ENGINE                                                                    |
# +---------------------------------------------------------------------------+


class Gate(optuna.pruners.BasePruner):
    """Stops a trial that is worse than the base by more than a margin. margins: step -> margin."""

    def __init__(self, margins: Mapping[int, float]) -> None:
        self.margins = dict(sorted(margins.items()))

    def verdict(self, study: optuna.Study, trial: FrozenTrial) -> str:
        """Why the trial is to be stopped, or ""."""
        facts = trial.user_attrs
        if facts.get("name") == BASE:
            return ""
        bases = [t for t in study.get_trials(deepcopy=False) if t.user_attrs.get("name") == BASE]
        for step, margin in self.margins.items():
            value = trial.intermediate_values.get(step)
            known = {t.user_attrs["seed"]: t.intermediate_values[step] for t in bases if step in t.intermediate_values}
            if value is None or not known:
                continue
            # the base of this seed may come later in the queue: then whatever the base reached anywhere is good enough
            reference = known.get(facts["seed"], max(known.values()))
            if not value <= reference + margin:
                what = f"train_loss at step {step}" if step < AFTER_TRAINING else "val_bpb before quantisation"
                which = "base" if facts["seed"] in known else "worst base so far"
                return f"{what} {value:.4f}, {which} {reference:.4f}, margin {margin:g}"
        return ""

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial is to be stopped, as Optuna asks it."""
        return bool(self.verdict(study, trial))


class Engine:
    """The study in Optuna's storage: what is due, what runs, what it cost. Several processes may share it."""

    def __init__(self, spec: Spec, create: bool) -> None:
        self.spec, self.gate, self.rows = spec, Gate(spec.gate), spec.rows()
        self.check: Callable[[], None] = lambda: None  # raises KeyboardInterrupt if that is asked for
        self.slots = {row.slot for row in self.rows}
        self.names = {row.slot: row.name for row in self.rows}
        file = storage_file(spec.storage) or spec.out / "trials"
        self.queue_lock = file.with_name(f"{file.name}.queue")  # Optuna has a .lock of its own there
        # another base, program, start or search: another study for Optuna, as its trials compare with nothing here
        plan = short_hash(json.dumps([spec.key(spec.seeds[0], {}), spec.search]).encode())
        name = f"{spec.path.stem} {plan}"
        self.storage = open_storage(spec.storage, create)
        known = {study.study_name for study in self.storage.get_all_studies()}
        # who only looks writes nothing
        storage = self.storage if create or name in known else optuna.storages.InMemoryStorage()
        self.study = optuna.create_study(study_name=name, storage=storage, pruner=self.gate, load_if_exists=True)

    def all_trials(self) -> list[FrozenTrial]:
        """Every run in the storage that this study file began, also with other knobs: all of them cost money."""
        mine = [s for s in self.storage.get_all_studies() if s.study_name.rpartition(" ")[0] == self.spec.path.stem]
        found = [trial for study in mine for trial in self.storage.get_all_trials(study._study_id)]
        return [t for t in found if is_run(t)]

    def trials(self) -> list[FrozenTrial]:
        """The trials of the study as the file is now, in the order of the queue."""
        found = [t for t in self.study.get_trials(deepcopy=False) if is_run(t)]
        return [self.renamed(t) for t in found if t.user_attrs["slot"] in self.slots or is_point(t)]

    def renamed(self, trial: FrozenTrial) -> FrozenTrial:
        """The trial under the name that its variant has in the study file now."""
        name = self.names.get(trial.user_attrs["slot"], trial.user_attrs["name"])
        if name == trial.user_attrs["name"]:
            return trial
        # the storage's own object stays as it is
        trial = copy.copy(trial)
        trial.user_attrs = trial.user_attrs | {"name": name}
        return trial

    def latest(self) -> dict[str, FrozenTrial]:
        """Slot -> its last attempt."""
        return {t.user_attrs["slot"]: t for t in self.trials()}

    def enqueue(self, retry: bool = False) -> None:
        """Put into the queue what is due and has no trial: new rows, and what comes back."""
        attempts: dict[str, list[FrozenTrial]] = {}
        for trial in self.trials():
            attempts.setdefault(trial.user_attrs["slot"], []).append(trial)
        rows = {row.slot: row for row in self.rows} | self.search_rows(attempts)
        due = [row for row in rows.values() if comes_back(attempts.get(row.slot, []), retry)]
        waiting = any(trials[-1].state == WAITING for trials in attempts.values())
        if not due and not waiting and self.spec.search:
            # the next point only now: it is sampled from all that is known
            started = {s.split()[0] for s in attempts if " " in s}
            if len(started) < self.spec.points:
                due = [self.spec.point(len(started) + 1, self.spec.seeds[0], {})]
        for row in due:
            facts = {"slot": row.slot, "name": row.name, "seed": row.seed, "knobs": row.knobs}
            self.study.enqueue_trial(row.params, facts | {"attempt": len(attempts.get(row.slot, [])) + 1})

    def search_rows(self, attempts: Mapping[str, list[FrozenTrial]]) -> dict[str, Row]:
        """Slot -> row of the points that are sampled; those that were not stopped on the first seed have all seeds."""
        rows = {}
        for trials in attempts.values():
            first = trials[-1]
            facts = first.user_attrs
            if not is_point(first) or facts["seed"] != self.spec.seeds[0]:
                continue
            for seed in self.spec.seeds if first.state == COMPLETE else self.spec.seeds[:1]:
                row = self.spec.point(int(facts["name"].removeprefix("point")), seed, first.params)
                rows[row.slot] = row
        return rows

    def claim(self, lock: Path) -> Trial | None:
        """Take the next trial of the queue; None if other workers were faster. Each goes to one process."""
        # Optuna locks the row of a trial that it hands out, which SQLite does not know: two workers could have it
        with self.queue_lock.open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            # asked again: another worker may have begun a trial since
            if self.exhausted():
                return None
            waiting = [t for t in self.trials() if t.state == WAITING]
            # what was put back keeps its turn; study.ask() does the same by number alone
            for frozen in sorted(waiting, key=lambda t: (t.user_attrs["attempt"] == 1, t.number)):
                with contextlib.suppress(UpdateFinishedTrialError):
                    if self.storage.set_trial_state_values(frozen._trial_id, RUNNING):
                        return self.take(frozen, lock)
        return None

    def take(self, frozen: FrozenTrial, lock: Path) -> Trial | None:
        """Sign a trial that is now this worker's; None for the second of two equal ones, which is void."""
        facts = {"worker": [platform.node(), str(lock)], "began": time.time(), "name": frozen.user_attrs["name"]}
        for key, fact in facts.items():
            self.storage.set_trial_user_attr(frozen._trial_id, key, fact)
        place = [frozen.user_attrs[key] for key in ("slot", "attempt")]
        twins = [t.number for t in self.trials() if [t.user_attrs[key] for key in ("slot", "attempt")] == place]
        # two workers that start together both fill the queue
        if min(twins) < frozen.number:
            self.finish(frozen, FAIL, void=True)
            return None
        # seeded by number: two workers, or a start after a kill, would draw the same points from one seed
        sampler = optuna.samplers.TPESampler(seed=frozen.number)
        name = self.study.study_name
        study = optuna.load_study(study_name=name, storage=self.storage, sampler=sampler, pruner=self.gate)
        return Trial(study, frozen._trial_id)

    def finish(self, trial: FrozenTrial | Trial, state: TrialState, value: float | None = None, **facts: Any) -> bool:
        """Write what became of a trial; False if another worker was faster."""
        try:
            for key, fact in facts.items():
                self.storage.set_trial_user_attr(trial._trial_id, key, fact)
            values = None if value is None else [value]
            return self.storage.set_trial_state_values(trial._trial_id, state, values)
        except UpdateFinishedTrialError:
            return False

    def recover(self) -> None:
        """Mark the trials of dead workers; enqueue() puts them back."""
        for trial in self.trials():
            facts = trial.user_attrs
            if trial.state != RUNNING or is_alive(trial):
                continue
            # files may have been written after the last sign of life
            last = last_write(Path(facts["folder"])) if "folder" in facts else 0.0
            seconds = max(facts.get("seconds", 0.0), last - facts.get("began", last))
            if self.finish(trial, FAIL, seconds=seconds, died=True, error="its worker was killed"):
                say(f"{label_of(trial)}: its worker was killed after {seconds:.0f} s")

    def spent(self) -> float:
        """Seconds that all trials of the storage took, also those of other plans, and those that died."""
        return sum(t.user_attrs.get("seconds", 0.0) for t in self.all_trials())

    def estimate(self) -> float:
        """Seconds of one trial: the mean of those that are done, else what the study or its clocks say."""
        slots = by_slot(self.trials()).values()
        done = [sum_seconds(ts) for ts in slots if ts[-1].state == COMPLETE and not ts[-1].user_attrs["reused"]]
        if done:
            return sum(done) / len(done)
        if "hours_per_trial" in self.spec.budget:
            return 3600 * self.spec.budget["hours_per_trial"]
        cfg = self.spec.config(self.spec.seeds[0], {})
        clocks = {"train": cfg.max_wallclock_seconds, "eval": cfg.eval_budget_seconds}
        return sum(clocks.get(stage, 0.0) for stage in self.spec.stages)

    def exhausted(self) -> str:
        """What to say if the budget has no room for one more trial beside those that run, else ""."""
        budget, one = self.spec.budget, self.estimate()
        limits = [3600 * budget["hours"]] if "hours" in budget else []
        if "dollars" in budget:
            limits.append(3600 * budget["dollars"] / budget["dollars_per_hour"])
        running = [one - t.user_attrs.get("seconds", 0.0) for t in self.all_trials() if t.state == RUNNING]
        spent = self.spent() + sum(max(0.0, seconds) for seconds in running)
        if not limits or spent + one <= min(limits):
            return ""
        total = cost(self.spec, min(limits))
        return f"{cost(self.spec, spent)} of {total} are spent or under way, and a trial takes about {one:,.0f} s"


def last_write(folder: Path) -> float:
    """When something was last written in a run's folder; 0 without one."""
    times = [0.0]
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)


def is_run(trial: FrozenTrial) -> bool:
    """Whether a trial of the storage counts: not the second of two equal ones."""
    return "slot" in trial.user_attrs and "void" not in trial.user_attrs


def is_point(trial: FrozenTrial | Trial) -> bool:
    """Whether a trial belongs to the search."""
    return re.fullmatch(r"point\d+", trial.user_attrs["name"]) is not None


def by_slot(trials: list[FrozenTrial]) -> dict[str, list[FrozenTrial]]:
    """Slot -> its attempts."""
    found: dict[str, list[FrozenTrial]] = {}
    for trial in trials:
        found.setdefault(trial.user_attrs["slot"], []).append(trial)
    return found


def sum_seconds(trials: list[FrozenTrial]) -> float:
    """Seconds that some trials took."""
    return sum(t.user_attrs.get("seconds", 0.0) for t in trials)


def cost(spec: Spec, seconds: float) -> str:
    """Seconds as text, with the dollars if their price is known."""
    price = spec.budget.get("dollars_per_hour")
    return f"{seconds:,.0f} s" + (f" (${seconds / 3600 * price:,.2f})" if price else "")


def comes_back(attempts: list[FrozenTrial], retry: bool) -> bool:
    """Whether a row is due: never tried, interrupted, killed once, or failed and wanted again."""
    if not attempts or attempts[-1].state != FAIL:
        return not attempts
    last, deaths = attempts[-1].user_attrs, sum("died" in t.user_attrs for t in attempts)
    return retry or "back" in last or ("died" in last and deaths < MAX_DEATHS)


def storage_file(where: str) -> Path | None:
    """The file of a storage, None for a database that a server keeps."""
    return Path(where.removeprefix("sqlite:///")) if "://" not in where or where.startswith("sqlite:///") else None


def open_storage(where: str, create: bool) -> optuna.storages.BaseStorage:
    """Optuna's storage: a journal file, or the database of a URL. Without `create`, a missing file stays missing."""
    path = storage_file(where)
    if path and not create and not path.exists():
        return optuna.storages.InMemoryStorage()
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if "://" not in where:
            return optuna.storages.JournalStorage(JournalFileBackend(where))
        return open_database(where, tries=5)
    except Exception as error:  # a driver raises whatever it likes
        raise UserError(f"storage = {where!r} cannot be opened: {str(error).splitlines()[0]}") from None


def open_database(url: str, tries: int) -> optuna.storages.BaseStorage:
    """Optuna's storage in a database. Workers that start together may all make its tables: the losers try again."""
    # SQLite lets one process write at a time; the others wait
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    try:
        return optuna.storages.get_storage(optuna.storages.RDBStorage(url, engine_kwargs=options))
    except DBAPIError:
        if tries == 1:
            raise
    time.sleep(random.random())
    return open_database(url, tries - 1)


@contextlib.contextmanager
def living(out: Path) -> Iterator[Path]:
    """A file that this worker holds locked while it lives: a sudden end needs no last word."""
    out.mkdir(parents=True, exist_ok=True)
    path = out.resolve() / f"worker_{uuid.uuid4().hex[:12]}.lock"
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def is_alive(trial: FrozenTrial) -> bool:
    """Whether the worker of a running trial lives: it holds its file or, on another host, gave a sign not long ago."""
    facts = trial.user_attrs
    host, lock = facts.get("worker", ("", ""))
    if host != platform.node():
        began = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        return time.time() - max(began, facts.get("beat", 0.0)) < STALE
    if not Path(lock).exists():
        return False
    with open(lock, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        Path(lock).unlink(missing_ok=True)
    return False


# +---------------------------------------------------------------------------+
# | ONE TRIAL                                                                 |
# +---------------------------------------------------------------------------+

# Runs a command, and ends it when the worker is gone: standard input closes then, however that happened.
GUARD = f"""
import os, signal, subprocess, sys, threading, time
signal.signal(signal.SIGINT, lambda *_: None)
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
def watch():
    sys.stdin.read()
    os.killpg(0, signal.SIGINT)
    time.sleep({GRACE})
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
code = child.wait()
os._exit(code if code >= 0 else 128 - code)
"""


class Child:
    """A run in a process group of its own, which ends with this worker."""

    def __init__(self, command: list[str], env: dict[str, str], console: Path) -> None:
        with console.open("ab") as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": output, "stderr": subprocess.STDOUT}
            guard = [sys.executable, "-S", "-c", GUARD, *command]
            self.process = subprocess.Popen(guard, env=env, start_new_session=True, **streams)

    def signal(self, number: int) -> None:
        """Send a signal to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        """End the run: SIGINT, which loses nothing, then SIGKILL."""
        if self.process.poll() is None:
            self.signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
        self.signal(signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.process.stdin.close()


def say(text: str) -> None:
    """A line of progress."""
    print(text, flush=True)


def suggest(trial: Trial, search: Mapping[str, Range | list[str]]) -> dict[str, str]:
    """The knobs of a point, as text: sampled, or those that it was put into the queue with."""
    found = {}
    for name, values in search.items():
        if not isinstance(values, Range):
            found[name] = trial.suggest_categorical(name, values)
            continue
        low, high = bound(name, values.low), bound(name, values.high)
        draw = trial.suggest_int if isinstance(low, int) else trial.suggest_float
        found[name] = format_knob(draw(name, low, high, log=values.log))
    return found


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where there can be none. The program replaces these files and never writes into them."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def prepare(spec: Spec, folder: Path, seed: int) -> tuple[str, ...]:
    """Make a run's folder ready; return the stages that are left to do in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if spec.sources and not (folder / "result.json").exists():
        source = spec.sources[seed]
        for name in NEEDED[spec.stages[0]]:
            link(source / name, folder / name)
        shutil.copyfile(source / "record.env", folder / "record.env")
        # without the scores that this trial is about; written last, so the rest is there
        result, ours = read_json(source / "result.json"), [STAGES[stage] for stage in spec.stages]
        kept = {stage: score for stage, score in result.get("stages", {}).items() if stage not in ours}
        atomic_write(folder / "result.json", json.dumps(result | {"stages": kept}, indent=1).encode() + b"\n")
    done = read_json(folder / "result.json").get("stages", {})
    left = spec.stages
    while left and STAGES[left[0]] in done:
        left = left[1:]
    if "train" in left and not (folder / CHECKPOINT).exists():
        # a curve of an attempt that was killed is not this one's, unless the training goes on
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    return left


def wait_until_free(folder: Path, check: Callable[[], None]) -> None:
    """Wait for the end of a run whose worker was killed. UserError if it does not end."""
    if not folder.is_dir():
        return
    until = time.monotonic() + 2 * GRACE + 10
    while True:
        try:
            with locked(folder):
                return
        except UserError:
            if time.monotonic() > until:
                raise
            check()
            time.sleep(POLL)


def run_environment(env: Mapping[str, str], folder: Path) -> dict[str, str]:
    """This process's environment with a run's knobs."""
    return os.environ | {**env, "ARTIFACT_DIR": str(folder.resolve())}


class Watch:
    """Reads what a run writes, and reports to Optuna what the gate asks for."""

    def __init__(self, engine: Engine, trial: Trial, folder: Path) -> None:
        self.engine, self.trial, self.folder = engine, trial, folder
        self.started, self.beaten, self.reported = time.monotonic(), -math.inf, set()

    def seconds(self) -> float:
        """How long the run has taken."""
        return time.monotonic() - self.started

    def look(self) -> None:
        """Give a sign of life and report new values."""
        if self.seconds() - self.beaten >= BEAT:
            self.beaten = self.seconds()
            self.trial.set_user_attr("beat", time.time())
            self.trial.set_user_attr("seconds", self.seconds())
        steps = self.engine.gate.margins.keys() - self.reported
        if not steps:
            return
        rows, _ = papers.read_metrics(self.folder / "metrics.jsonl")
        found = {row.get("step"): row["train_loss"] for row in rows if papers.is_number(row.get("train_loss"))}
        result, _ = papers.read_object(self.folder / "result.json")
        found[AFTER_TRAINING] = result.get("stages", {}).get("pre_quant", {}).get("val_bpb")
        for step in sorted(steps):
            if found.get(step) is not None:
                self.reported.add(step)
                self.trial.report(found[step], step)

    def until_end(self, child: Child) -> str:
        """Wait for the run's end; return why it was stopped, "" if it ended by itself."""
        while child.process.poll() is None:
            self.engine.check()
            self.look()
            if self.reported and self.trial.should_prune():
                frozen = self.engine.storage.get_trial(self.trial._trial_id)
                why = self.engine.gate.verdict(self.engine.study, frozen)
                child.stop()
                return why or "worse than the base"
            time.sleep(POLL)
        # what it wrote after the last look; the gate of others may need it
        self.look()
        return ""


def first_error(console: Path, code: int) -> str:
    """The line in which a failed run says why."""
    text, _ = papers.read_text(console)
    # of this attempt
    text = text.rpartition("\n$ ")[2]
    found = re.search(ERROR_LINE, text, re.MULTILINE)
    lines = [line for line in text.splitlines()[1:] if line.strip()]
    return (found[1].removeprefix("error: ") if found else lines[-1] if lines else f"exit status {code}")[:300]


def own_status(console: Path, code: int) -> int:
    """The program's exit status: torchrun itself ends with 1, and prints that of the rank which failed first."""
    text, _ = papers.read_text(console)
    # of this attempt; torchrun lists the ranks that it ended itself before the root cause
    text = text.rpartition("\n$ ")[2].rpartition("Root Cause")[2]
    found = re.search(r"^\s*exitcode\s*: (\d+) \(pid", text, re.MULTILINE)
    return int(found[1]) if code and found else code


def facts_of(folder: Path) -> dict[str, Any]:
    """What the table needs of a run: its scores, bytes, and what it was scored on."""
    result, _ = papers.read_object(folder / "result.json")
    scores = {name: score.get("val_bpb") for name, score in result.get("stages", {}).items()}
    machines = re.findall(r"^python .*$", papers.read_text(folder / "log.txt")[0], re.MULTILINE)
    return {
        "scores": scores,
        "bytes": result.get("bytes_total"),
        "scored": [result.get(key) for key in ("tokens_scored", "bytes_scored", "data")],
        "machine": machines[-1] if machines else "",
    }


def run_trial(engine: Engine, trial: Trial) -> TrialState:
    """Run a trial to its end and write what became of it."""
    spec, facts = engine.spec, trial.user_attrs
    name, seed, knobs = facts["name"], facts["seed"], facts["knobs"]
    if is_point(trial):
        knobs = suggest(trial, spec.search)
        trial.set_user_attr("knobs", knobs)
    label = label_of(trial)
    try:
        folder = spec.out / f"{name}_seed{seed}_{spec.key(seed, knobs)}"
        if is_point(trial):
            # a search draws equal values again: what has been run with them is not paid for twice
            done = [t.user_attrs["folder"] for t in engine.trials() if t.state == COMPLETE]
            same = f"_seed{seed}_{spec.key(seed, knobs)}"
            folder = next((Path(place) for place in done if place.endswith(same)), folder)
        trial.set_user_attr("folder", str(folder))
        wait_until_free(folder, engine.check)
        left = prepare(spec, folder, seed)
    except UserError as error:
        # a sampled pair of values that does not go together, or a folder that stays in use
        line = "; ".join(str(error).splitlines())
        say(f"{label}: failed: {line}")
        engine.finish(trial, FAIL, error=line, exit=2)
        return FAIL
    values = " ".join(f"{key}={value}" for key, value in knobs.items())
    say(f"{label}: {values or 'as the base'}; {','.join(left) or 'already finished'} in {folder}")
    return conclude(engine, trial, folder, left, knobs)


def conclude(engine: Engine, trial: Trial, folder: Path, left: tuple[str, ...], knobs: Mapping[str, str]) -> TrialState:
    """Run the stages that are left; tell Optuna how it ended and what it cost."""
    spec, console, seed = engine.spec, folder / "console.txt", trial.user_attrs["seed"]
    label = label_of(trial)
    watch, why, code = Watch(engine, trial, folder), "", 0
    try:
        if left:
            env = run_environment(spec.environment(seed, knobs) | {"STAGES": ",".join(left)}, folder)
            with Child(launch_command(spec.launch), env, console) as child:
                why = watch.until_end(child)
                code = own_status(console, child.process.returncode)
        else:
            watch.look()
    finally:
        # however it ends, by Ctrl-C too
        with contextlib.suppress(UpdateFinishedTrialError):
            trial.set_user_attr("seconds", watch.seconds())
    found = {"seconds": watch.seconds(), "exit": code, "reused": not left, **facts_of(folder)}
    price = cost(spec, watch.seconds())
    if why:
        say(f"{label}: stopped: {why}; {price}")
        engine.finish(trial, PRUNED, error=why, **found)
        return PRUNED
    value = found["scores"].get(spec.score)
    if code or value is None:
        line = first_error(console, code)
        # a mistake that hits the base hits everything: it is mended, and then this trial runs
        back = {"back": True} if code == 2 and trial.user_attrs["name"] == BASE else {}
        say(f"{label}: failed: {line}; {price}")
        engine.finish(trial, FAIL, error=line, **found, **back)
        if back:
            raise UserError(f"the base cannot run, so nothing can be compared: {line}")
        return FAIL
    say(f"{label}: val_bpb {value:.5f}; {price}")
    engine.finish(trial, COMPLETE, adjusted(engine, trial, value), **found)
    return COMPLETE


def adjusted(engine: Engine, trial: Trial, value: float) -> float:
    """What Optuna minimises: a point's score without what its seed did to the base, against the first seed."""
    if not is_point(trial):
        return value
    done = [t for t in engine.latest().values() if t.user_attrs["name"] == BASE and t.state == COMPLETE]
    bases = scores_of(done, engine.spec.score)
    first, seed = engine.spec.seeds[0], trial.user_attrs["seed"]
    return value - bases[seed] + bases[first] if {first, seed} <= bases.keys() else value


def attempt(engine: Engine, trial: Trial) -> None:
    """Run a trial; what an interruption leaves undone is put back."""
    try:
        run_trial(engine, trial)
    except KeyboardInterrupt:
        engine.finish(trial, FAIL, back=True, error="interrupted")
        raise
    except OSError as error:
        # a full disk: the trial is not at fault
        engine.finish(trial, FAIL, back=True, error=str(error))
        raise
    except UpdateFinishedTrialError:
        # this machine slept so long that others gave it up
        say(f"{label_of(trial)}: another worker has taken it over")


def work(engine: Engine, lock: Path, retry: bool) -> str:
    """Run trials until nothing is due; return why it ended."""
    while True:
        engine.check()
        engine.recover()
        engine.enqueue(retry)
        retry = False
        states = [t.state for t in engine.latest().values()]
        if WAITING not in states:
            busy = states.count(RUNNING)
            return f"nothing is left to begin, other workers run {busy}" if busy else "every trial is finished"
        why = engine.exhausted()
        if why:
            return f"budget: {why}; {states.count(WAITING)} waiting trials are not begun"
        trial = engine.claim(lock)
        if trial is not None:
            attempt(engine, trial)


# +---------------------------------------------------------------------------+
# | REPORT                                                                    |
# +---------------------------------------------------------------------------+


class Line(NamedTuple):
    """A variant in the table. Differences to the base are by seed; the cost is that of all its attempts."""

    name: str
    knobs: dict[str, str]
    scores: dict[int, float]
    differences: dict[int, float]
    interval: tuple[float, float] | None
    p: float | None
    bytes: float | None
    seconds: float
    runs: int
    states: str


def word_of(trial: FrozenTrial) -> str:
    """A trial's state in a word."""
    if trial.state == FAIL and "back" in trial.user_attrs:
        return "put back"
    return "killed" if trial.state == FAIL and "died" in trial.user_attrs else WORDS[trial.state]


def label_of(trial: FrozenTrial | Trial) -> str:
    """A trial's variant and seed."""
    return f"{trial.user_attrs['name']} seed {trial.user_attrs['seed']}"


def scores_of(trials: Iterable[FrozenTrial], score: str) -> dict[int, float]:
    """Seed -> score of finished trials."""
    return {t.user_attrs["seed"]: t.user_attrs["scores"][score] for t in trials}


def interval_of(values: list[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean by Student's t; None for fewer than two values or equal ones."""
    if not sample_std(values):
        return None
    found = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return float(found.low), float(found.high)


def holm(ps: Mapping[str, float | None]) -> dict[str, float]:
    """p corrected for their number: the smallest times n, the next times n - 1, ..., never falling."""
    known = sorted((p, name) for name, p in ps.items() if p is not None)
    found, worst = {}, 0.0
    for rank, (p, name) in enumerate(known):
        worst = max(worst, min(1.0, p * (len(known) - rank)))
        found[name] = worst
    return found


def pair_problem(trial: FrozenTrial, bases: Mapping[int, FrozenTrial], key: str) -> bool:
    """Whether a trial and its base differ in something that a fair pair shares."""
    base = bases.get(trial.user_attrs["seed"])
    return base is not None and base.user_attrs[key] != trial.user_attrs[key]


def build_line(name: str, attempts: list[list[FrozenTrial]], bases: Mapping[int, FrozenTrial], score: str) -> Line:
    """A variant's line, from the attempts at each of its trials."""
    last = [trials[-1] for trials in attempts]
    good = [t for t in last if t.state == COMPLETE and not pair_problem(t, bases, "scored")]
    ours, theirs = scores_of(good, score), scores_of(bases.values(), score)
    common = sorted(ours.keys() & theirs.keys()) if name != BASE else []
    differences = {seed: ours[seed] - theirs[seed] for seed in common}
    words = [word_of(t) for t in last]
    sizes = [t.user_attrs["bytes"] for t in good if t.user_attrs["bytes"]]
    return Line(
        name=name,
        knobs=last[0].user_attrs["knobs"] if last else {},
        scores=ours,
        differences=differences,
        interval=interval_of(list(differences.values())),
        p=paired(ours, theirs) if differences else None,
        bytes=float(np.mean(sizes)) if sizes else None,
        seconds=sum(map(sum_seconds, attempts)),
        runs=len(last),
        states=", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words)),
    )


def build_lines(engine: Engine) -> tuple[list[Line], list[str]]:
    """The table's lines, the base first, then by difference; and notes about pairs that are not fair."""
    attempts = list(by_slot(engine.trials()).values())
    done = [trials[-1] for trials in attempts if trials[-1].state == COMPLETE]
    bases = {t.user_attrs["seed"]: t for t in done if t.user_attrs["name"] == BASE}
    names = dict.fromkeys([BASE, *(trials[-1].user_attrs["name"] for trials in attempts)])
    lines = []
    for name in names:
        mine = [trials for trials in attempts if trials[-1].user_attrs["name"] == name]
        lines.append(build_line(name, mine, bases, engine.spec.score))
    mean = {line.name: mean_of(line.differences) for line in lines}
    lines.sort(key=lambda line: (line.name != BASE, mean[line.name] is None, mean[line.name] or 0.0))
    notes = [
        f"{label_of(t)} scored other data than its base: left out" for t in done if pair_problem(t, bases, "scored")
    ]
    notes += [f"{label_of(t)} ran on another machine than its base" for t in done if pair_problem(t, bases, "machine")]
    return lines, notes


def mean_of(values: Mapping[int, float]) -> float | None:
    """The mean over seeds, None without any."""
    return float(np.mean(list(values.values()))) if values else None


def signed(value: float | None) -> str:
    """A difference with its sign, or a dash."""
    return "-" if value is None else f"{value:+.5f}"


def table(spec: Spec, lines: list[Line]) -> str:
    """The table for the terminal."""
    corrected = holm({line.name: line.p for line in lines})
    width = max(len(line.name) for line in lines)
    head = f"{'':{width}}   n  {'val_bpb':>8}  {'difference':>10}  {'95 % interval':^20}  {'p':>6}  {'p Holm':>6}"
    found = [head + f"  {'bytes':>11}  {'s/trial':>9}  trials"]
    for line in lines:
        span = " to ".join(map(signed, line.interval)) if line.interval else "-"
        deviation = sample_std(list(line.scores.values()))
        if line.name == BASE and deviation is not None:
            span = f"sample std {deviation:.5f}"
        cells = [
            f"{line.name:{width}}  {len(line.scores):2d}",
            f"{number(mean_of(line.scores)):>8}",
            f"{signed(mean_of(line.differences)):>10}",
            f"{span:^20}",
            f"{number(line.p, 4):>6}",
            f"{number(corrected.get(line.name), 4):>6}",
            f"{number(line.bytes, 0):>11}",
            f"{number(line.seconds / line.runs if line.runs else None, 1):>9}",
            line.states,
        ]
        found.append("  ".join(cells))
    total = sum(line.seconds for line in lines)
    found.append(f"cost of these {sum(line.runs for line in lines)} trials: {cost(spec, total)}")
    return "\n".join(found)


CSV_HEAD = (
    "number variant seed attempt state pre_quant quantized final bytes seconds dollars exit folder knobs error".split()
)


def csv_text(engine: Engine) -> str:
    """trials.csv: a row for each attempt at a trial, in the order of the queue."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_HEAD, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    price = engine.spec.budget.get("dollars_per_hour")
    for trial in engine.trials():
        facts = trial.user_attrs
        row = {**facts, **facts.get("scores", {}), "number": trial.number, "variant": facts["name"]}
        row["state"] = word_of(trial)
        row["knobs"] = " ".join(f"{key}={value}" for key, value in facts["knobs"].items())
        if price and "seconds" in facts:
            row["dollars"] = round(facts["seconds"] / 3600 * price, 4)
        writer.writerow(row)
    return buffer.getvalue()


def publish(path: Path, data: bytes) -> None:
    """atomic_write for a file that several workers may write at the same time."""
    own = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}")
    atomic_write(own, data)
    os.replace(own, path)


def draw(spec: Spec, lines: list[Line], path: Path) -> None:
    """Draw the paired differences: a row for each variant, seeds as dots, the mean with its interval."""
    rows = [line for line in lines if line.differences][::-1]
    figure = Figure(figsize=(8, 1.6 + 0.4 * max(1, len(rows))), dpi=120, facecolor="white", layout="constrained")
    ax = figure.subplots()
    for place, line in enumerate(rows):
        mean = mean_of(line.differences)
        ax.scatter(list(line.differences.values()), [place] * len(line.differences), color=MUTED, s=14, zorder=2)
        ax.plot(mean, place, "D", color=OURS, ms=6, zorder=4)
        if line.interval:
            ax.hlines(place, *line.interval, color=OURS, lw=2.5, zorder=3)
    if not rows:
        ax.text(0.5, 0.5, "no variant can be compared yet", ha="center", transform=ax.transAxes, color=MUTED)
    ax.axvline(0, color=THEIRS, lw=1.2, ls="--")
    ax.set_yticks(range(len(rows)), [line.name for line in rows], color=INK)
    ax.set_ylim(-0.6, max(1, len(rows)) - 0.4)
    ax.set_xlabel("bits per byte, difference to the base of the same seed (left: better)", color=MUTED)
    ax.set_title(f"{spec.path.stem}: mean, 95 % interval, seeds as dots", loc="left", color=INK, fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    publish(path, buffer.getvalue())


def as_json(lines: list[Line]) -> dict[str, Any]:
    """The table as an object, variant -> numbers."""
    corrected, found = holm({line.name: line.p for line in lines}), {}
    for line in lines:
        found[line.name] = {
            "knobs": line.knobs,
            "seeds": sorted(line.scores),
            "val_bpb": mean_of(line.scores),
            "std": sample_std(list(line.scores.values())),
            "difference": mean_of(line.differences),
            "interval": line.interval,
            "p": line.p,
            "p_holm": corrected.get(line.name),
            "bytes": line.bytes,
            "seconds": round(line.seconds, 1),
            "trials": line.states,
        }
    return found


def report(engine: Engine, why: str) -> int:
    """Print the table, write report.png and trials.csv; return the exit status."""
    spec, latest = engine.spec, engine.latest().values()
    lines, notes = build_lines(engine)
    say("\n" + table(spec, lines))
    for trial in latest:
        if trial.state in (FAIL, PRUNED):
            say(f"{word_of(trial)}: {label_of(trial)}: {trial.user_attrs.get('error')}")
    foreign = len(engine.all_trials()) - len(engine.trials())
    notes += [f"{foreign} trials are not of the study as it is now: left out, but they count as spent"] * bool(foreign)
    for note in notes:
        say(f"note: {note}")
    spec.out.mkdir(parents=True, exist_ok=True)
    draw(spec, lines, spec.out / "report.png")
    publish(spec.out / "trials.csv", csv_text(engine).encode())
    say(f"written: {spec.out / 'report.png'}, {spec.out / 'trials.csv'}")
    say(f"end: {why}")
    found = {"study": str(spec.path), "end": why, "spent_seconds": round(engine.spent(), 1), "variants": as_json(lines)}
    say("SWEEP " + json.dumps(found))
    return int(any(t.state == FAIL and "back" not in t.user_attrs for t in latest))


def dry_run(engine: Engine) -> None:
    """Print the trials in their order, what is done of them, and what the rest would cost."""
    spec, attempts = engine.spec, by_slot(engine.trials())
    latest = {slot: trials[-1] for slot, trials in attempts.items()}
    for index, row in enumerate(engine.rows, 1):
        values = " ".join(f"{key}={value}" for key, value in row.knobs.items()) or "as the base"
        state = f" ({word_of(latest[row.slot])})" if row.slot in latest else ""
        say(f"{index:3d}  {row.name} seed {row.seed}: {values}{state}")
    total = len(engine.rows) + spec.points * len(spec.seeds)
    if spec.search:
        say(f"then {spec.points} points of the search, each on {len(spec.seeds)} seeds unless the first is stopped:")
        for name, values in spec.search.items():
            where = f"{values.low:g} to {values.high:g}" if isinstance(values, Range) else ", ".join(values)
            say(f"     {name}: {where}{', log' * (isinstance(values, Range) and values.log)}")
    done = sum(t.state in (COMPLETE, PRUNED) for t in latest.values())
    failed = sum(trials[-1].state == FAIL and not comes_back(trials, retry=False) for trials in attempts.values())
    counts = f"{total} trials, {done} done" + f", {failed} failed" * bool(failed)
    say(f"command of each: {shlex.join(launch_command(spec.launch))}")
    one = engine.estimate()
    if one:
        left = total - done - failed
        say(f"{counts}; about {cost(spec, one)} each, {cost(spec, one * left)} to come")
    else:
        say(f"{counts}; what one costs is not known: say hours_per_trial under [budget]")
    why = engine.exhausted()
    say(f"budget: no trial would begin: {why}" if why else f"spent so far: {cost(spec, engine.spent())}")


@contextlib.contextmanager
def interrupts_noted() -> Iterator[Callable[[], None]]:
    """Ctrl-C, and SIGTERM, which schedulers send, wait for the next call of what this yields; a second one does not.

    KeyboardInterrupt inside Optuna's storage would leave its lock behind.
    """
    noted: list[int] = []

    def note(number: int, _: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    def check() -> None:
        if noted:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY.toml", help="study file")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="show the trials and their cost; run nothing")
    only.add_argument("--report", action="store_true", help="report what is done; run nothing")
    only.add_argument("--retry", action="store_true", help="run failed trials again too")
    args = parser.parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        spec = read_spec(args.study)
        if not args.report:
            check_launcher(spec)
        if args.dry_run:
            dry_run(Engine(spec, create=False))
            return 0
        engine, why = Engine(spec, create=not args.report), "nothing was run"
        if not args.report:
            with living(spec.out) as lock, interrupts_noted() as engine.check:
                why = work(engine, lock, args.retry)
        if not engine.trials():
            raise UserError(f"nothing of {args.study} was run yet: {spec.storage} holds no trial of it")
        return report(engine, why)
    except json.JSONDecodeError as error:
        where = spec.storage
        print(f"error: storage {where} is damaged or no journal ({error}); mend it, or name another", file=sys.stderr)
        return 2
    except (UserError, OSError, SQLAlchemyError) as error:
        print(f"error: {error}".replace("\n", "; "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130


if __name__ == "__main__":
    main_begins()
    sys.exit(main(sys.argv[1:]))
