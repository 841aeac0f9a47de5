"""records/sweep.py: the queue, the gate, kills, budgets and the table, mostly with a stand-in for the program; and
train_gpt.py itself, trained once and quantised again from its files.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import fcntl
import json
import math
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import optuna
import pytest
from conftest import KNOBS, LAUNCHER, ROOT, TINY
from optuna.trial import TrialState

from records import sweep
from train_gpt import load_config, record_env

# What the stand-in does is said by MATRIX_LR: its score is 2 + SEED / 10 + MATRIX_LR + (1 + SEED) / 1000 of it, and
# from 5 up it misbehaves.
STAND_IN = """
import json, os, pathlib, sys, time
env, folder = os.environ, pathlib.Path(os.environ["ARTIFACT_DIR"])
preset = (pathlib.Path(env["PRESET"]) / "record.env").read_text().split()[0].partition("=")[2]
rate, seed, room = float(env.get("MATRIX_LR", preset)), int(env["SEED"]), folder.parent
with open(room / "ran", "a") as handle:
    handle.write(f"{folder.name} {env['STAGES']}\\n")
(folder / "log.txt").write_text("python 3, one machine\\n")
def metrics(step, loss):
    with open(folder / "metrics.jsonl", "a") as handle:
        handle.write(json.dumps({"step": step, "train_loss": loss}) + "\\n")
def result(**scores):
    stages = {name: {"val_bpb": score} for name, score in scores.items()}
    text = json.dumps({"stages": stages, "bytes_total": 1000, "data": "d", "tokens_scored": 5, "bytes_scored": 9})
    (folder / "new").write_text(text)
    (folder / "new").rename(folder / "result.json")
def hang():
    try:
        (folder / "hangs").touch()
        time.sleep(600)
    except KeyboardInterrupt:
        (folder / "sigint").touch()
        sys.exit(130)
score = 2 + seed / 10 + rate * (1 + (1 + seed) / 1000)
metrics(2, 5 + rate)
if rate == 5:                                     # the gate sees the training loss
    hang()
if rate == 6:
    sys.exit("Traceback\\nnoise\\ntorch.OutOfMemoryError: CUDA out of memory\\n")
if rate == 7:
    print("error: MATRIX_LR=7 is too much")
    sys.exit(2)
if rate == 10:                                    # as under torchrun
    print("[rank0]: error: MATRIX_LR=10 is too much\\nRoot Cause (first observed failure):\\n exitcode  : 2 (pid: 7)")
    sys.exit(1)
if rate == 8 and not (folder / "hangs").exists():  # is killed once, after training
    result(pre_quant=score)
    hang()
if rate == 9:                                     # always
    hang()
if rate == 4:                                     # the gate sees the score before quantisation
    result(pre_quant=score)
    hang()
if rate == 3:                                     # ends when another run has begun
    while len((room / "ran").read_text().splitlines()) < 2:
        time.sleep(0.05)
result(pre_quant=score, quantized=score, final=score)
"""


class Bench(NamedTuple):
    """A folder with a preset and the stand-in, where studies are written and run."""

    room: Path

    def write(self, text: str, head: str = "", seeds: str = "[1, 2]") -> Path:
        """A study with the stand-in as its program."""
        study = self.room / "study.toml"
        launch = f'launch = "python {self.room / "stand_in.py"} {{program}}"\n' if "launch" not in head else ""
        start = "" if "from =" in head else f"seeds = {seeds}\n"
        study.write_text(f'base = "{self.room}"\nout = "{self.room / "out"}"\n{start}{launch}{head}\n{text}')
        if "from =" in head:
            study.write_text(study.read_text().replace("base = ", "# "))
        return study

    @property
    def ran(self) -> list[tuple[str, str]]:
        """(variant and seed, stages) of every start of the program, in order."""
        path = self.room / "out" / "ran"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(line.split()[0].rpartition("_")[0], *line.split()[1:]) for line in lines]

    @property
    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader((self.room / "out" / "trials.csv").open()))

    def folder(self, name: str) -> Path:
        return next((self.room / "out").glob(f"{name}_*"))

    def engine(self, study: Path) -> sweep.Engine:
        return sweep.Engine(sweep.read_spec(study), create=True)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    for name in (*KNOBS, *LAUNCHER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sweep, "POLL", 0.02)
    (tmp_path / "record.env").write_text("MATRIX_LR=0\nTRAIN_LOG_EVERY=2\nITERATIONS=8\n")
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return Bench(tmp_path)


@pytest.fixture
def summary(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict]:
    """summary(study, *options, code=0): run a sweep here; its last line as an object, and all its text as "text"."""

    def run(study: Path, *options: str, code: int = 0) -> dict:
        capsys.readouterr()
        assert sweep.main([str(study), *options]) == code, capsys.readouterr()
        text = capsys.readouterr().out
        last = text.splitlines()[-1]
        return json.loads(last.removeprefix("SWEEP ")) | {"text": text} if last.startswith("SWEEP") else {"text": text}

    return run


@pytest.fixture
def workers() -> Iterator[Callable[[Path], multiprocessing.Process]]:
    """workers(study): a worker in a process of its own."""
    started = []

    def start(study: Path) -> multiprocessing.Process:
        process = multiprocessing.get_context("fork").Process(target=worker_main, args=(study,))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def worker_main(study: Path) -> None:
    with (study.parent / "stderr").open("a") as errors, contextlib.redirect_stderr(errors):
        raise SystemExit(sweep.main([str(study)]))


def wait_for(what: Callable[[], bool], words: str) -> None:
    until = time.monotonic() + 120
    while not what():
        assert time.monotonic() < until, words
        time.sleep(0.02)


# The queue and the numbers


def test_dry_run_shows_the_order_and_cost_and_writes_nothing(bench: Bench, summary: Callable[..., dict]) -> None:
    study = bench.write(
        "[variants.a]\nMATRIX_LR=0.25\n[search]\npoints=4\nMATRIX_LR={low=0.1,high=0.5,log=true}\nMATRIX_BITS=[5,6]\n"
        "[budget]\nhours=2\nhours_per_trial=0.5\ndollars_per_hour=20",
        seeds="[1, 2, 3]",
    )
    text = summary(study, "--dry-run")["text"]
    order = re.findall(r"^ +\d+  (\w+ seed \d)", text, re.MULTILINE)
    assert order == ["base seed 1", "a seed 1", "a seed 2", "base seed 2", "base seed 3", "a seed 3"]
    assert "18 trials, 0 done; about 1,800 s ($10.00) each, 32,400 s ($180.00) to come" in text
    assert "MATRIX_LR: 0.1 to 0.5, log" in text and "MATRIX_BITS: 5, 6" in text and "stand_in.py" in text
    assert not (bench.room / "out").exists()


def test_the_table_holds_what_is_computed_by_hand(bench: Bench, summary: Callable[..., dict]) -> None:
    study = bench.write(
        "[variants.up]\nMATRIX_LR=1\n[variants.down]\nMATRIX_LR=0.5\n", seeds="[1, 2, 3]", head='score = "quantized"'
    )
    found = summary(study)
    assert [name for name, *_ in bench.ran] == [
        f"{name}_seed{seed}"
        for seed, names in ((1, "base up down"), (2, "down up base"), (3, "base up down"))
        for name in names.split()
    ], "A B C, C B A, A B C"
    up = found["variants"]["up"]
    # differences 1.002, 1.003, 1.004: mean 1.003, deviation 0.001, t of 95 % and two degrees of freedom 4.302653
    half = 4.302653 * 0.001 / math.sqrt(3)
    assert up["difference"] == pytest.approx(1.003) and up["seeds"] == [1, 2, 3]
    assert up["interval"] == pytest.approx([1.003 - half, 1.003 + half], abs=1e-8)
    t = 1.003 / (0.001 / math.sqrt(3))
    # the distribution of t with two degrees of freedom in closed form
    assert up["p"] == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-12)
    assert found["variants"]["base"]["val_bpb"] == pytest.approx(2.2) and list(found["variants"])[1] == "down"
    assert found["variants"]["base"]["std"] == pytest.approx(0.1) and "sample std 0.10000" in found["text"]
    assert sweep.holm({"a": 0.04, "b": 0.01, "c": None, "d": 0.03}) == pytest.approx({"b": 0.03, "d": 0.06, "a": 0.06})
    assert [(row["variant"], row["seed"], row["state"]) for row in bench.rows][3] == ("down", "2", "done")
    assert all(float(row["seconds"]) > 0 and float(row["final"]) > 2 for row in bench.rows)
    assert (bench.room / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    # a study that has grown runs only what is new; nothing is run twice
    study.write_text(study.read_text().replace("seeds = [1, 2, 3]", "seeds = [1, 2, 3, 4]"))
    assert summary(study)["variants"]["up"]["seeds"] == [1, 2, 3, 4] and len(bench.ran) == 12
    # other data cannot be paired
    path = bench.folder("up_seed2") / "result.json"
    engine = bench.engine(study)
    trial = next(t for t in engine.trials() if t.user_attrs["name"] == "up" and t.user_attrs["seed"] == 2)
    trial.user_attrs["scored"][2] = "other"
    lines, notes = sweep.build_lines(engine)
    assert path.exists() and notes == ["up seed 2 scored other data than its base: left out"]
    assert sorted(next(line for line in lines if line.name == "up").differences) == [1, 3, 4]


def test_a_search_runs_its_points_on_all_seeds(bench: Bench, summary: Callable[..., dict]) -> None:
    study = bench.write(
        "[search]\npoints=3\nMATRIX_LR={low=0.25,high=0.5}\nMATRIX_BITS=[5, 6]\nNUM_LAYERS={low=9,high=11}"
    )
    found = summary(study)
    names = [name for name, *_ in bench.ran]
    assert names == ["base_seed1", "base_seed2", *(f"point{i}_seed{s}" for i in (1, 2, 3) for s in (1, 2))]
    points = [found["variants"][f"point{i}"] for i in (1, 2, 3)]
    assert len({point["knobs"]["MATRIX_LR"] for point in points}) == 3, "no point is drawn twice"
    engine = bench.engine(study)
    for point in points:
        knobs = point["knobs"]
        assert 0.25 <= float(knobs["MATRIX_LR"]) <= 0.5 and knobs["MATRIX_BITS"] in "56", knobs
        assert int(knobs["NUM_LAYERS"]) in (9, 10, 11) and point["seeds"] == [1, 2], knobs
    for trial in engine.trials():
        rate, seed = float(trial.user_attrs["knobs"].get("MATRIX_LR", 0)), trial.user_attrs["seed"]
        expected = 2 + seed / 10 + rate * (1 + (1 + seed) / 1000)
        # Optuna sees a point's score as if it had the first seed
        assert trial.value == pytest.approx(expected - (0.1 * (seed - 1) if sweep.is_point(trial) else 0)), trial


def test_equal_points_run_once(bench: Bench, summary: Callable[..., dict]) -> None:
    found = summary(bench.write("[search]\npoints=3\nMATRIX_LR=[0.5]"))["variants"]
    assert [name for name, *_ in bench.ran] == [f"{name}_seed{seed}" for name in ("base", "point1") for seed in (1, 2)]
    assert found["point3"]["seeds"] == [1, 2] and found["point3"]["val_bpb"] == found["point1"]["val_bpb"]
    assert len({row["folder"] for row in bench.rows if row["variant"] != "base"}) == 2


def test_a_variant_has_the_name_of_the_study_file(bench: Bench, summary: Callable[..., dict]) -> None:
    """Also one that begins like a point of a search."""
    study = bench.write("[variants.pointwise]\nMATRIX_LR=0.5", seeds="[1]")
    found = summary(study)["variants"]["pointwise"]
    assert found["difference"] > 0.5 and found["knobs"] == {"MATRIX_LR": "0.5"}
    study.write_text(study.read_text().replace("pointwise", "new").replace("[1]", "[1, 2]"))
    engine = bench.engine(study)
    engine.enqueue()
    study.write_text(study.read_text().replace("new", "newer"))
    found = summary(study)["variants"]
    assert list(found) == ["base", "newer"] and found["newer"]["seeds"] == [1, 2]
    # what ran stays where it is, and what waited runs under its new name
    assert [name for name, *_ in bench.ran] == ["base_seed1", "pointwise_seed1", "newer_seed2", "base_seed2"]
    assert [row["variant"] for row in bench.rows] == ["base", "newer", "newer", "base"]


# The gate


def test_the_gate_stops_a_trial_and_counts_its_cost(bench: Bench, summary: Callable[..., dict]) -> None:
    study = bench.write(
        "[variants.loss]\nMATRIX_LR=5\n[variants.score]\nMATRIX_LR=4\n[variants.good]\nMATRIX_LR=0.25\n"
        "[gate]\ntrain_loss={2=4.5}\npre_quant=0.5\n"
    )
    found = summary(study)
    states = {(row["variant"], row["seed"]): row for row in bench.rows}
    for name, words in (("loss", "train_loss at step 2 10.0000, base 5.0000, margin 4.5"), ("score", "val_bpb before")):
        row = states[name, "1"]
        assert row["state"] == "stopped" and words in row["error"] and float(row["seconds"]) > 0, row
        assert (bench.folder(f"{name}_seed1") / "sigint").exists(), "the run was asked to end"
    # its own base comes later in the queue
    assert "worst base so far 5.0000" in states["loss", "2"]["error"]
    assert states["good", "1"]["state"] == states["base", "2"]["state"] == "done"
    assert found["variants"]["loss"]["trials"] == "2 stopped" and found["variants"]["loss"]["difference"] is None
    assert found["spent_seconds"] == pytest.approx(sum(float(row["seconds"]) for row in bench.rows), abs=0.06)


def test_the_verdict_of_the_gate() -> None:
    gate = sweep.Gate({10: 0.1, 20: 0.05})
    study = optuna.create_study()

    def trial(name: str, seed: int, **values: float) -> optuna.trial.FrozenTrial:
        found = study.ask()
        for key, value in {"name": name, "seed": seed, "slot": name}.items():
            found.set_user_attr(key, value)
        for step, value in values.items():
            found.report(value, int(step.removeprefix("at")))
        return study.trials[found.number]

    alone = trial("a", 1, at10=9.0)
    assert not gate.prune(study, alone), "nothing to compare with"
    trial("base", 1, at10=5.0, at20=4.0)
    trial("base", 2, at10=6.0)
    assert gate.prune(study, alone), "the base came later"
    for case, stopped in (
        (trial("a", 1, at10=5.1, at20=4.05), False),
        (trial("a", 1, at10=5.11), True),
        (trial("a", 1, at10=5.0, at20=4.06), True),
        (trial("a", 2, at10=6.05, at20=4.05), False),
        (trial("a", 2, at10=6.0, at20=4.06), True),
        (trial("a", 3, at10=6.1), False),
        (trial("a", 3, at10=6.11), True),
        (trial("a", 1, at10=math.nan), True),
    ):
        assert gate.prune(study, case) == stopped, (case.user_attrs, case.intermediate_values)
    assert not gate.prune(study, trial("base", 3, at10=99.0)), "the base itself is never stopped"


# Kills, workers, failures


def test_a_killed_worker_loses_nothing(
    bench: Bench, summary: Callable[..., dict], workers: Callable[[Path], multiprocessing.Process]
) -> None:
    study = bench.write("[variants.a]\nMATRIX_LR=8\n[variants.never]\nMATRIX_LR=9", seeds="[1]")
    hanging = bench.room / "out"
    for name, number in (("a", signal.SIGKILL), ("never", signal.SIGTERM), ("never", signal.SIGKILL)):
        before = len(bench.ran)
        worker = workers(study)
        wait_for(lambda: any(n == f"{name}_seed1" for n, *_ in bench.ran[before:]), name)  # noqa: B023
        wait_for(lambda: list(hanging.glob(f"{name}_*/hangs")), name)  # noqa: B023
        os.kill(worker.pid, number)
        worker.join()
        error = (bench.room / "stderr").read_text()
        assert worker.exitcode == (130 if number == signal.SIGTERM else -signal.SIGKILL), error
        # the run ends with its worker, by SIGINT
        wait_for(lambda: list(hanging.glob(f"{name}_*/sigint")), name)  # noqa: B023
        (bench.folder(f"{name}_seed1") / "sigint").unlink()
    before = len(bench.ran)
    worker = workers(study)
    wait_for(lambda: len(bench.ran) > before, "never, a third time")
    worker.kill()
    worker.join()
    # killed twice, and interrupted once, which does not count: it is not put back again
    found = summary(study, code=1)
    assert [name for name, *_ in bench.ran] == ["base_seed1", "a_seed1", "a_seed1", *["never_seed1"] * 3]
    assert [stages for name, stages in bench.ran if name == "a_seed1"] == ["train,quantize,eval", "quantize,eval"]
    states = [(row["variant"], row["attempt"], row["state"]) for row in bench.rows]
    assert states == [
        ("base", "1", "done"),
        ("a", "1", "killed"),
        ("never", "1", "put back"),
        ("a", "2", "done"),
        ("never", "2", "killed"),
        ("never", "3", "killed"),
    ]
    assert all(float(row["seconds"]) > 0 for row in bench.rows), "all of them cost"
    assert found["variants"]["a"]["trials"] == "1 done" and found["variants"]["never"]["trials"] == "1 killed"
    assert len({row["folder"] for row in bench.rows if row["variant"] == "a"}) == 1
    assert not list(hanging.glob("worker_*")), "no lock is left"


def test_two_workers_never_run_one_trial(bench: Bench, workers: Callable[[Path], multiprocessing.Process]) -> None:
    for storage in ("trials.journal", "sqlite:///{}/trials.db"):
        name = storage.format(bench.room) if ":" in storage else str(bench.room / storage)
        (bench.room / "record.env").write_text("MATRIX_LR=3\nTRAIN_LOG_EVERY=2\n")
        text = "".join(f"[variants.v{i}]\nMATRIX_LR=0.{i}\n" for i in range(1, 5))
        study = bench.write(text, head=f'storage = "{name}"', seeds="[1, 2, 3]")
        study.write_text(study.read_text().replace('/out"', f'/out{":" in storage:d}"'))
        both = [workers(study), workers(study)]
        for worker in both:
            worker.join()
            assert worker.exitcode == 0, storage
        lines = (bench.room / f"out{':' in storage:d}" / "ran").read_text().splitlines()
        runs = [line.split()[0] for line in lines]
        assert len(runs) == len(set(runs)) == 15, (storage, runs)
        # the first run of all waits until another has begun, which only another worker could do
        assert len({trial.user_attrs["worker"][1] for trial in bench.engine(study).trials()}) == 2, storage


@pytest.mark.parametrize("storage", ["", "sqlite"])
def test_a_trial_is_handed_out_under_a_lock(storage: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite has no locks of rows: two workers that look at the same time would both see that a trial waits."""
    head = storage and f'storage = "sqlite:///{bench.room}/trials.db"'
    engine = bench.engine(bench.write("", head=head, seeds="[1]"))
    engine.enqueue()
    hand_out, tried = engine.storage.set_trial_state_values, []

    def looked_at(*args: object) -> bool:
        with engine.queue_lock.open("a") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        tried.append(args)
        return hand_out(*args)

    monkeypatch.setattr(engine.storage, "set_trial_state_values", looked_at)
    assert engine.claim(bench.room / "lock") and len(tried) == 1
    with engine.queue_lock.open("a") as other:  # free again
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_equal_trials_in_the_queue_run_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    study = bench.write("[variants.a]\nMATRIX_LR=0.5", seeds="[1]")
    one, two = bench.engine(study), bench.engine(study)
    with monkeypatch.context() as patch:
        # both look before either writes
        patch.setattr(two, "trials", list)
        two.enqueue()
    one.enqueue()
    with monkeypatch.context() as patch:
        patch.setattr(one, "trials", list)
        one.enqueue()
    assert len(one.study.trials) == 4
    lock = bench.room / "lock"
    claimed = [trial for _ in range(4) for engine in (one, two) if (trial := engine.claim(lock))]
    assert [sweep.label_of(trial) for trial in claimed] == ["base seed 1", "a seed 1"]
    assert [trial.number for trial in claimed] == [0, 1] and len(two.trials()) == 2
    assert [trial.state for trial in one.study.trials[2:]] == [TrialState.FAIL] * 2, "the second ones are void"
    # a list that is out of date gives nothing twice
    assert not any(two.storage.set_trial_state_values(t._trial_id, TrialState.RUNNING) for t in claimed)


def test_a_worker_is_dead_when_its_lock_is_free_or_it_was_long_silent(bench: Bench) -> None:
    engine = bench.engine(bench.write("", seeds="[1]"))
    engine.enqueue()
    with sweep.living(bench.room) as lock:
        trial = engine.claim(lock)
        engine.recover()
        assert engine.trials()[0].state == TrialState.RUNNING, "alive"
        trial.set_user_attr("worker", ["elsewhere", str(lock)])
        engine.recover()
        assert engine.trials()[0].state == TrialState.RUNNING, "just begun"
        trial.set_user_attr("beat", time.time())
        frozen = engine.trials()[0]
        frozen.datetime_start -= datetime.timedelta(seconds=2 * sweep.STALE)
        assert sweep.is_alive(frozen), "gave a sign"
        frozen.user_attrs["beat"] -= 2 * sweep.STALE
        assert not sweep.is_alive(frozen), "long silent"
        trial.set_user_attr("worker", [sweep.platform.node(), str(lock)])
    engine.recover()
    assert engine.trials()[0].user_attrs["died"] and not engine.finish(trial, TrialState.COMPLETE, 1.0)
    with pytest.raises(sweep.UpdateFinishedTrialError):
        sweep.Watch(engine, trial, bench.room).look()


def test_failures_are_rows(bench: Bench, summary: Callable[..., dict], refused: Callable[..., str]) -> None:
    study = bench.write("[variants.bad]\nMATRIX_LR=6\n[variants.wrong]\nMATRIX_LR=7\n", seeds="[1]")
    found = summary(study, code=1)
    errors = {row["variant"]: (row["state"], row["error"], row["exit"]) for row in bench.rows}
    assert errors["bad"] == ("failed", "torch.OutOfMemoryError: CUDA out of memory", "1")
    assert errors["wrong"] == ("failed", "MATRIX_LR=7 is too much", "2")
    assert found["variants"]["bad"]["trials"] == "1 failed" and "failed: bad seed 1: torch.Out" in found["text"]
    assert len(bench.ran) == 3 and summary(study, code=1) and len(bench.ran) == 3, "they are not tried again"
    text = summary(study, "--dry-run")["text"]
    assert "3 trials, 1 done, 2 failed; about" in text and "each, 0 s to come" in text
    assert summary(study, "--retry", code=1) and [name for name, *_ in bench.ran[3:]] == ["bad_seed1", "wrong_seed1"]
    # what the user can mend and what hits the base stops everything, and comes back
    (bench.room / "record.env").write_text("MATRIX_LR=7\nTRAIN_LOG_EVERY=2\n")
    study = bench.write("[variants.good]\nMATRIX_LR=1", seeds="[1]")
    refused("the base cannot run, so nothing can be compared: MATRIX_LR=7 is too much", sweep.main, study)
    refused("the base cannot run", sweep.main, study)
    assert [name for name, *_ in bench.ran[5:]] == ["base_seed1", "base_seed1"]
    (bench.room / "record.env").write_text("MATRIX_LR=10\nTRAIN_LOG_EVERY=2\n")
    refused("the base cannot run, so nothing can be compared: MATRIX_LR=10 is too much", sweep.main, study)


def test_what_a_run_under_torchrun_died_of(tmp_path: Path) -> None:
    console = tmp_path / "console.txt"
    old = "$ torchrun x\n[rank0]: ValueError: old\nRoot Cause (first observed failure):\n  exitcode  : 9 (pid: 1)\n"
    for text, code, words in (
        ("$ torchrun x\nW1126 noise\n[rank1]: torch.OutOfMemoryError: CUDA\n", 1, "torch.OutOfMemoryError: CUDA"),
        (
            "$ torchrun x\nerror: no data\nFailures:\n  exitcode  : 1 (pid: 5)\n"
            "Root Cause (first observed failure):\n  exitcode  : 2 (pid: 4)\n",
            2,
            "no data",
        ),
    ):
        console.write_text(old + text)
        assert (sweep.own_status(console, 1), sweep.first_error(console, 1)) == (code, words), text
        assert sweep.own_status(console, 0) == 0, text


def test_a_full_disk_is_no_fault_of_the_trial(
    bench: Bench, summary: Callable[..., dict], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    study = bench.write("", seeds="[1]")
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "prepare", full)
        refused("No space left on device", sweep.main, study)
    summary(study)
    assert [(row["state"], row["error"]) for row in bench.rows] == [
        ("put back", "No space left on device"),
        ("done", ""),
    ]


def test_the_budget_ends_it_before_it_is_exceeded(bench: Bench, summary: Callable[..., dict]) -> None:
    study = bench.write("[budget]\nhours=1\nhours_per_trial=0.6", seeds="[1, 2, 3]")
    engine = bench.engine(study)
    engine.enqueue()
    assert engine.exhausted() == "" and engine.estimate() == 2160
    # two workers that both saw room for a trial: the second one looks again
    other = bench.engine(study)
    first = engine.claim(bench.room / "lock")
    assert other.claim(bench.room / "lock") is None
    assert "2,160 s of 3,600 s are spent or under way" in engine.exhausted(), "one runs, so no other may begin"
    engine.finish(first, TrialState.FAIL, seconds=1800.0)
    assert "1,800 s of 3,600 s" in engine.exhausted()
    assert "2 waiting trials are not begun" in summary(study, code=1)["end"] and not bench.ran
    # a trial that is done is a better estimate
    second = engine.study.ask()
    engine.finish(second, TrialState.COMPLETE, 1.0, seconds=900.0, reused=False)
    assert engine.estimate() == 900 and engine.exhausted() == ""
    # other knobs for all trials begin another study, but the money is gone
    other = bench.write("[set]\nMATRIX_LR=1\n[budget]\nhours=1\nhours_per_trial=0.6", seeds="[1, 2, 3]")
    assert "2,700 s of 3,600 s" in bench.engine(other).exhausted() and not bench.engine(other).trials()
    dollars = bench.write("[budget]\ndollars=1\ndollars_per_hour=2", seeds="[1, 2, 3]")
    assert "2,700 s ($1.50) of 1,800 s ($1.00)" in bench.engine(dollars).exhausted()


# Study files


def test_a_study_that_cannot_run_is_refused_in_a_line(bench: Bench, refused: Callable[..., str]) -> None:
    point = "[search]\npoints=1\n"
    for text, words in {
        "x = ": "study.toml: Invalid value (at line",
        "sets = 1": "sets is no key of a study; did you mean set?",
        "launch = 3": "launch = 3 must be a text",
        "launch = ''": "launch = '' names no command",
        "launch = 'python \"x'": "No closing quotation; mend its quotation marks",
        "launch = 'no_such_launcher -n 8'": "launch = 'no_such_launcher -n 8': no such program here",
        "score = 'finale'": "score = 'finale' is not measured by these stages; did you mean final?",
        "stages = 'eval'": "stages = 'eval': with `from` it is",
        "from='x'": "say either seeds = [..] or from = ..",
        "[variants.a]\nMATRX_LR = 1": "[variants.a] MATRX_LR is not a knob; did you mean MATRIX_LR?",
        "[variants.a]\nMATRIX_LR = 'x'": "[variants.a] MATRIX_LR='x' (environment): could not",
        "[variants.a]\nMATRIX_LR = -1": "[variants.a] MATRIX_LR=-1.0 must be >= 0",
        "[variants.a]\nNUM_HEADS = 7": "[variants.a] MODEL_DIM=512 is not a multiple of NUM_HEADS=7",
        "[variants.a]\nMATRIX_LR = {a = 1}": "[variants.a] MATRIX_LR = {'a': 1} must be a number, a text or a list",
        "[variants.a]\nMATRIX_LR = 0": "[variants.a] is the same run as the base",
        "[variants.a]": "[variants.a] is the same run as the base",
        "[variants.a]\nMATRIX_LR = 1\n[variants.b]\nMATRIX_LR = 1.0": "[variants.b] is the same run as [variants.a]",
        "[variants.base]\nMATRIX_LR = 1": "[variants.base]: name it",
        "[variants]\na = 1": "[variants.a] must be a table of knobs",
        "[set]\nSEED = 1": "[set] SEED is set by the sweep itself",
        "[set]\nNUM_LAYERS = 0": "[set] NUM_LAYERS=0 must be",
        "[search]\nMATRIX_LR = [1]": "[search] needs points = N",
        f"{point}MATRIX_LR = 1": "[search] MATRIX_LR = 1 must be a list of values or",
        f"{point}MATRIX_LR = {{low = 1, hi = 2}}": "[search] MATRIX_LR.hi is no key of a study; did you mean high?",
        f"{point}MATRIX_LR = {{low = 2, high = 1}}": "[search] MATRIX_LR: low must be less than high",
        f"{point}MATRIX_LR = {{low = 1, high = inf}}": "[search] MATRIX_LR: low must be less than high, both finite",
        f"{point}MATRIX_LR = {{low = nan, high = 2}}": "[search] MATRIX_LR: low must be less than high, both finite",
        f"{point}NUM_LAYERS = {{low = 9, high = 10.5}}": "[search] NUM_LAYERS: low and high must be whole numbers",
        f"{point}EVAL = {{low = 1, high = 2}}": "[search] EVAL: a range is",
        f"{point}EVAL = ['plain', 'plane']": "[search] EVAL = plane EVAL=plane must be",
        "[gate]\nloss = 1": "[gate] loss is no key of a study; did you mean train_loss?",
        "[gate]\ntrain_loss = {7 = 0.1}": "step 7 is not logged; with ITERATIONS=8 and TRAIN_LOG_EVERY=2",
        "[gate]\ntrain_loss = {10 = 0.1}": "[gate] train_loss: step 10 is not logged",
        "[gate]\ntrain_loss = {2 = nan}": "[gate] train_loss: 2 = nan must be STEP = MARGIN",
        "[gate]\ntrain_loss = {2 = inf}": "[gate] train_loss: 2 = inf must be STEP = MARGIN",
        "[gate]\ntrain_loss = {x = 0.1}": "[gate] train_loss: x = 0.1 must be STEP = MARGIN",
        "[budget]\nhours = 0": "[budget] hours = 0 must be above 0",
        "[budget]\ndollars = 1": "[budget] dollars needs dollars_per_hour",
        "storage = 'nodb://x'": "storage = 'nodb://x' cannot be opened",
    }.items():
        head, _, rest = text.partition("[")
        error = refused(words, sweep.main, bench.write(f"[{rest}" if rest else "", head=head))
        assert str(bench.room / "study.toml") in error or "storage" in words, error


def test_files_seeds_and_environments_that_cannot_be(
    bench: Bench, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = bench.write("")
    for old, new, words in (
        ("seeds = [1, 2]", "seeds = [1, 1]", "seeds = [1, 1] must be different whole numbers"),
        ("seeds = [1, 2]", "seeds = [[1], [1]]", "seeds = [[1], [1]] must be different whole numbers"),
        ("seeds = [1, 2]", "", "say either seeds = [..] or from"),
        ("base = ", "# ", "base is missing"),
        ("base = ", "base = '' # ", "base is missing"),
        (str(bench.room), str(bench.room / "none"), "no record.env there"),
    ):
        study.write_text(bench.write("").read_text().replace(old, new, 1))
        refused(words, sweep.main, study)
    refused("no such study file", sweep.main, bench.room / "none.toml")
    refused("nothing of", sweep.main, bench.write(""), "--report")
    refused("nothing of", sweep.main, bench.write("", head="launch = 'no_such_launcher'"), "--report")
    study = bench.write("", head="storage = ''")
    assert sweep.read_spec(study).storage == str(bench.room / "out" / "trials.journal")
    (bench.room / "out").mkdir()
    (bench.room / "out" / "trials.journal").write_text("no journal\n")
    refused("trials.journal is damaged or no journal", sweep.main, study)
    refused("/none/record.env is missing", sweep.main, bench.write("", head=f'from = "{bench.room}/none"'))
    monkeypatch.setenv("MATRIX_LR", "1")
    refused("MATRIX_LR is set in the environment; a sweep takes it from", sweep.main, bench.write(""))


def test_the_launch_command(bench: Bench) -> None:
    program, python = str(ROOT / "train_gpt.py"), sweep.sys.executable
    torchrun = [python, "-m", "torch.distributed.run"]
    for text, words in {
        "python": [python, program],
        "torchrun --nproc_per_node=8": [*torchrun, "--nproc_per_node=8", program],
        "srun -G8 torchrun --standalone {program}": ["srun", "-G8", *torchrun, "--standalone", program],
        'sbatch --wait "--wrap=python {program}"': ["sbatch", "--wait", f"--wrap=python {program}"],
    }.items():
        assert sweep.launch_command(text) == words, text


def test_the_shipped_studies_are_sound(bench: Bench) -> None:
    frontier = "records/track_10min_16mb/2026-11-26_Frontier"
    trials = {
        "records/demo/study.toml": 6,
        f"{frontier}/study.toml": 9,
        f"{frontier}/study_eval.toml": 18,
        "tests/bench/training_levers.toml": 18,
        "tests/bench/layers_for_loops.toml": 12,
        "tests/bench/long_training.toml": 14,
    }
    # what the record's README trains first, as seen from where the studies are started
    (bench.room / "records").symlink_to(ROOT / "records")
    for seed in (314, 42, 999):
        run = bench.room / f"logs/2026-11-26_Frontier_seed{seed}"
        run.mkdir(parents=True)
        cfg = load_config({"PRESET": str(ROOT / frontier), "SEED": str(seed)})
        (run / "record.env").write_text(record_env(cfg))
        for name in ("result.json", "model.bin"):
            (run / name).write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(bench.room)
        shipped = {
            str(path.relative_to(ROOT)) for top in ("records", "tests") for path in (ROOT / top).glob("**/*.toml")
        }
        assert {*trials} == shipped
        for path, count in trials.items():
            assert len(sweep.read_spec(ROOT / path).rows()) == count, path


# The program itself


@pytest.fixture(scope="session")
def swept(once: Callable[..., Path], tiny_data: Path) -> Path:
    """A finished study of train_gpt.py: base and one variant, one seed."""

    def run(room: Path) -> None:
        knobs = {**TINY, "DATA_PATH": str(tiny_data), "EVAL": "plain", "ITERATIONS": "4", "NUM_LAYERS": "5"}
        lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in knobs.items())
        (room / "record.env").write_text("NUM_LAYERS=5\n")
        study = room / "study.toml"
        study.write_text(
            f'base = "{room}"\nseeds = [7]\nout = "{room / "out"}"\n[set]\n{lines}'
            "[variants.fast]\nMATRIX_LR = 0.05\n[gate]\ntrain_loss = { 2 = 9 }\npre_quant = 9\n"
        )
        with pytest.MonkeyPatch.context() as patch:
            for name in (*KNOBS, *LAUNCHER):
                patch.delenv(name, raising=False)
            patch.setenv("OMP_NUM_THREADS", "1")
            assert sweep.main([str(study)]) == 0

    return once("swept", run)


def test_the_program_itself_is_swept(swept: Path) -> None:
    rows = list(csv.DictReader((swept / "out" / "trials.csv").open()))
    assert [(row["variant"], row["state"], row["exit"]) for row in rows] == [
        ("base", "done", "0"),
        ("fast", "done", "0"),
    ]
    for row in rows:
        folder = Path(row["folder"])
        result = json.loads((folder / "result.json").read_text())
        assert float(row["final"]) == result["stages"]["final"]["val_bpb"] and result["seed"] == 7
        knobs = sweep.parse_preset(folder / "record.env")
        assert knobs.get("MATRIX_LR", "0.026") == ("0.05" if row["variant"] == "fast" else "0.026"), row
    assert float(rows[0]["final"]) != float(rows[1]["final"])
    engine = sweep.Engine(sweep.read_spec(swept / "study.toml"), create=False)
    for trial in engine.trials():
        assert sorted(trial.intermediate_values) == [2, sweep.AFTER_TRAINING], "the gate saw what the program wrote"


def test_a_sweep_from_a_finished_run_never_trains(
    swept: Path, bench: Bench, tiny_data: Path, summary: Callable[..., dict], refused: Callable[..., str]
) -> None:
    source = next((swept / "out").glob("base_*"))
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    settings = f'[set]\nDATA_PATH = "{tiny_data}"\n'
    study = bench.write(f"{settings}[variants.coarse]\nMATRIX_BITS = 4", head=f'from = "{source}"\nlaunch = "python"')
    found = summary(study)["variants"]
    assert found["coarse"]["difference"] > 0 and found["coarse"]["bytes"] < found["base"]["bytes"]
    assert found["base"]["seeds"] == [7], "the seed is the run's"
    for row in bench.rows:
        folder = Path(row["folder"])
        log = (folder / "log.txt").read_text()
        assert "stages quantize,eval" in log and "training stopped" not in log, row
        assert not (folder / "metrics.jsonl").exists() and (folder / "model.pt").samefile(source / "model.pt"), row
    assert bench.rows[0]["final"] == next(csv.DictReader((swept / "out" / "trials.csv").open()))["final"]
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before, "the run is as it was"
    # what would need a training is refused before anything runs
    for text, words in (
        ("[variants.x]\nMATRIX_LR = 0.5", "holds a run with other knobs: MATRIX_LR=0.5 (there 0.026)"),
        ("[gate]\npre_quant = 1", "[gate] has nothing to look at"),
    ):
        refused(words, sweep.main, bench.write(settings + text, head=f'from = "{source}"'))
    twice = bench.write(settings, head=f'from = ["{source}", "{source}"]')
    refused("have one seed, 7", sweep.main, twice)
    # sweeps of the evaluation start from model.bin alone
    spec = sweep.read_spec(bench.write(settings, head=f'from = "{source}"\nstages = "eval"'))
    assert sweep.prepare(spec, bench.room / "e", 7) == ("eval",)
    assert sorted(path.name for path in (bench.room / "e").iterdir()) == ["model.bin", "record.env", "result.json"]
    assert list(json.loads((bench.room / "e" / "result.json").read_text())["stages"]) == ["pre_quant", "quantized"]


def test_links_become_copies_where_there_can_be_none(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = bench.room / "source", bench.room / "target"
    source.write_text("weights")

    def no_links(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(sweep.os, "link", no_links)
    sweep.link(source, target)
    assert target.read_text() == "weights" and not target.samefile(source)


def test_workers_that_report_at_once_do_not_take_each_others_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, path = sweep.atomic_write, tmp_path / "trials.csv"

    def between(own: Path, data: bytes) -> None:
        """Before this worker's file is there, another one writes, to the end."""
        monkeypatch.setattr(sweep, "atomic_write", write)
        monkeypatch.setattr(sweep.os, "getpid", lambda: 1)
        sweep.publish(path, b"theirs")
        write(own, data)

    monkeypatch.setattr(sweep, "atomic_write", between)
    sweep.publish(path, b"ours")
    assert path.read_bytes() == b"ours" and [*tmp_path.iterdir()] == [path]
