"""Nothing lost: checkpoints of a training, going on after an interruption, milestones."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import golden_rules as rules
import pytest
import torch
from conftest import ROOT, Done, environment
from test_training import HYBRID, NGRAM

import train_gpt

ALWAYS = {"CHECKPOINT_SECONDS": "1e-9", "EVAL": "plain"}  # after every step
# a run of each loader and each kind of state: averages, looping, spans, moments of several dtypes, noise
KINDS = {
    "packed": "ITERATIONS=8 VAL_LOSS_EVERY=3 TRAIN_SEQ_SCHEDULE=32@0.4 SEQ_CHANGE_WARMUP_STEPS=3 EMBED_DTYPE=bf16",
    "snapshots alone": "ITERATIONS=8 AVERAGE=swa SWA_EVERY=2 SWA_START_SCALE=2 EMBED_DTYPE=bf16",
    "n-gram": NGRAM,
    "shuffled": HYBRID.replace("ITERATIONS=4", "ITERATIONS=8").replace("EVAL=chunk_sgd", "EVAL=plain"),
}
# a training that the operating system kills at the step or in the write that its arguments name
DYING = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import train_gpt
step, in_write = int(sys.argv[2]), sys.argv[3] == "write"
def die(): os.kill(os.getpid(), signal.SIGKILL)
class Trainer(train_gpt.Trainer):
    def advance(self, batches, fraction, now):
        if now == step and not in_write and self.runtime.rank == 0:
            die()
        super().advance(batches, fraction, now)
    def checkpoint(self, now, *rest):
        if now == step and in_write:
            train_gpt.os.replace = lambda *paths: die()
        super().checkpoint(now, *rest)
train_gpt.Trainer = Trainer
sys.exit(train_gpt.main([]))
"""


@contextlib.contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Inside the block, a training is interrupted when this step would begin."""
    advance = train_gpt.Trainer.advance

    def stop(self: train_gpt.Trainer, batches: dict, fraction: float, now: int) -> None:
        if now == step:
            raise KeyboardInterrupt
        advance(self, batches, fraction, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Trainer, "advance", stop)
        yield


def curve(done: Done) -> list[dict]:
    """metrics.jsonl without times."""
    lines = (done.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def assert_same_run(a: Done, b: Done) -> None:
    """Equal weights and Hessians to the bit, equal curves and scores."""
    for name in ("model.pt", "hessians.pt"):
        first, second = (torch.load(done.folder / name, weights_only=True) for done in (a, b))
        first, second = first.get("model", first), second.get("model", second)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert (a.folder / "model.bin").read_bytes() == (b.folder / "model.bin").read_bytes()
    assert curve(a) == curve(b)
    keys = ("train_steps", "train_loss", "val_loss", "val_bpb", "tokens_scored")
    assert [a.result[key] for key in keys] == [b.result[key] for key in keys]


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_training_goes_on_and_ends_bit_equal(
    kind: str, run_gpt: Callable[..., Done], tmp_path: Path
) -> None:
    knobs = rules.knobs(KINDS[kind]) | {"TRAIN_LOG_EVERY": "1", "EVAL": "plain"}
    whole = run_gpt(**knobs, ARTIFACT_DIR=tmp_path / "whole")
    steps = whole.result["train_steps"]
    folder = tmp_path / "parts"
    for step in (1, steps // 2, steps - 1):
        with interrupted_at(step):
            stopped = run_gpt(**knobs | ALWAYS, ARTIFACT_DIR=folder, code=130)
        assert "interrupted" in stopped.err and (folder / "checkpoint.pt").is_file()
    # and once more after the training, in the calibration
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Run, "calibrate", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        run_gpt(**knobs | ALWAYS, ARTIFACT_DIR=folder, code=130)
    with interrupted_at(steps - 1):  # no step is left to interrupt
        parts = run_gpt(**knobs | ALWAYS, ARTIFACT_DIR=folder)
    assert_same_run(whole, parts)
    assert any(f"goes on from step {steps}," in warning for warning in parts.result["warnings"])
    assert not (folder / "checkpoint.pt").exists() and not list(folder.glob("*.tmp"))


def test_killed_ranks_go_on_and_end_bit_equal(run_gpt: Callable[..., Done], tiny_data: Path, tmp_path: Path) -> None:
    """SIGKILL at random steps and in the middle of a write; then on another number of ranks."""
    knobs = {"ITERATIONS": "12", "AVERAGE": "ema,swa", "SWA_EVERY": "2", "SWA_START_SCALE": "2"}
    whole = run_gpt(ranks=2, **knobs, ARTIFACT_DIR=tmp_path / "whole", EVAL="plain")
    folder = tmp_path / "parts"
    script = tmp_path / "dying.py"
    script.write_text(DYING, encoding="utf-8")
    env = environment(tiny_data, folder, **knobs, **ALWAYS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    steps = sorted(random.Random(5).sample(range(2, 12), 2))
    for step, where in zip(steps, ("step", "write"), strict=True):
        command = [*torchrun, str(ROOT), str(step), where]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode != 0 and "Signal 9" in done.stderr, done.stderr
        saved = train_gpt.load_saved(folder / "checkpoint.pt", "step")
        assert saved["step"] == (step if where == "step" else step - 1), "the write that was cut left the one before"
    parts = run_gpt(ranks=2, **knobs | ALWAYS, ARTIFACT_DIR=folder)
    assert_same_run(whole, parts)
    # one rank takes over what two have left
    with interrupted_at(9):
        run_gpt(**knobs | ALWAYS, ARTIFACT_DIR=tmp_path / "fewer", code=130)
    fewer = run_gpt(ranks=2, **knobs | ALWAYS, ARTIFACT_DIR=tmp_path / "fewer")
    assert fewer.result["val_loss"] == pytest.approx(whole.result["val_loss"], rel=1e-4)


def test_a_checkpoint_of_another_run_is_refused_and_time_before_it_counts(
    run_gpt: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interrupted_at(4):
        run_gpt(**ALWAYS, code=130)
    path = tmp_path / "run" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    other = saved | {"data": {}}, saved | {"config": saved["config"].replace("ITERATIONS=8", "ITERATIONS=9")}
    for change, knobs, words in (
        (None, {"MATRIX_LR": "0.5"}, "MATRIX_LR=0.5 (there 0.026)"),
        (other[0], {}, "other validation data"),
        (other[1], {}, "ITERATIONS=8 (there 9)"),
        ([1], {}, "lacks a dictionary"),
    ):
        if change:
            train_gpt.atomic_save(path, change)
        refused = run_gpt(**ALWAYS | knobs, code=2).err
        assert words in refused and "checkpoint.pt" in refused and refused.count("\n") == 1, words
    path.write_bytes(b"half of it")
    assert "is damaged" in run_gpt(**ALWAYS, code=2).err
    train_gpt.atomic_save(path, saved | {"seconds": 1000.0, "source": "of another version"})
    done = run_gpt(**ALWAYS)
    assert done.result["train_seconds"] > 1000 and "begun by another version" in done.out
    # with OVERWRITE=1 a checkpoint of another run counts for nothing
    train_gpt.atomic_save(path, saved)
    assert "interrupted" not in run_gpt(**ALWAYS, MATRIX_LR="0.5", OVERWRITE="1").out


def test_a_deleted_curve_does_not_stop_a_run_that_goes_on(run_gpt: Callable[..., Done], tmp_path: Path) -> None:
    with interrupted_at(4):
        run_gpt(**ALWAYS, TRAIN_LOG_EVERY="1", code=130)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    steps = [row["step"] for row in curve(run_gpt(**ALWAYS, TRAIN_LOG_EVERY="1")) if "train_loss" in row]
    assert steps and min(steps) > 4 - 1, steps


def test_a_checkpoint_that_cannot_be_written_is_a_warning(
    run_gpt: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = train_gpt.atomic_save

    def full(path: Path, value: object) -> None:
        if path.name == "checkpoint.pt":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, value)

    monkeypatch.setattr(train_gpt, "atomic_save", full)
    warnings = run_gpt(**ALWAYS).result["warnings"]
    assert len(warnings) == 1 and "checkpoint.pt cannot be written: No space left" in warnings[0]


def test_a_milestone_that_cannot_be_written_is_a_warning(
    run_gpt: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save, spare = train_gpt.atomic_save, tmp_path / "spare"
    spare.mkdir()

    def full(path: Path, value: object) -> None:
        if path.parent.name == "step3":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, value)

    monkeypatch.setattr(train_gpt, "atomic_save", full)
    monkeypatch.setattr(train_gpt.tempfile, "tempdir", str(spare))
    done = run_gpt(MILESTONES="3", EVAL="plain")
    assert any("step3 takes no files; model.pt is saved as" in warning for warning in done.result["warnings"])
    assert len(list(spare.glob("*_model.pt"))) == 1 and list(done.result["stages"])[-1] == "final"


def test_milestones_are_runs_of_their_own_and_change_nothing(run_gpt: Callable[..., Done], tmp_path: Path) -> None:
    plain = run_gpt(ARTIFACT_DIR=tmp_path / "plain", EVAL="plain")
    done = run_gpt(MILESTONES="3,8", EVAL="plain")
    assert all(torch.equal(weight, done.weights()[name]) for name, weight in plain.weights().items())
    last = torch.load(done.folder / "step8" / "model.pt", weights_only=True)
    assert last["steps"] == 8 and all(torch.equal(last["model"][name], w) for name, w in plain.weights().items())
    early = run_gpt(ARTIFACT_DIR=done.folder / "step3", STAGES="quantize,eval", EVAL="plain").result
    assert list(early["stages"]) == ["pre_quant_step3", "quantized", "final"] and early["train_steps"] == 3
    assert early["val_loss"] > done.result["val_loss"] and list(done.result["stages"])[0] == "pre_quant"
