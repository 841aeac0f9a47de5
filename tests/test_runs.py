"""Whole runs, as a user makes them: files, resuming, repeatability, ranks, the clock, bad inputs, packing.

Where the process itself matters (ranks, signals, the packed file) the program is launched; elsewhere main() is called.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TOY, Done, call, environment, free_port, launch, one_thread
from golden_rules import knobs

import train_gpt

FULL = {"SEED": 7, "VAL_LOSS_EVERY": 4}
QUICK = {"ITERATIONS": 6, "EVAL": "plain", "AVERAGE": "none"}
SHORTEST = {"ITERATIONS": 1, "WARMUP_STEPS": 0}
STAGES = ("pre_quant", "quantized", "final")
WRITTEN = {"log.txt", "metrics.jsonl", "model.pt", "hessians.pt", "model.bin", "record.env", "result.json"}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file but the log, which only grows."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "log.txt"}


@pytest.fixture(scope="module", autouse=True)
def sums_in_one_order() -> Iterator[None]:
    with one_thread():
        yield


def finished(data: Path, folder: Path, **knobs: object) -> Done:
    done = call(environment(data, folder, **knobs), folder)
    assert done.code == 0, done.err
    return done


def finished_once(once: Callable[..., Path], name: str, data: Path, **knobs: object) -> Done:
    """A finished run, for all workers."""

    def run(room: Path) -> None:
        done = finished(data, room / "run", **knobs)
        assert done.err == ""
        (room / "out").write_text(done.out, encoding="utf-8")

    room = once(name, run)
    return Done(room / "run", 0, (room / "out").read_text(encoding="utf-8"), "")


@pytest.fixture(scope="module")
def full(tiny_data: Path, once: Callable[..., Path]) -> Done:
    """A run of all stages, with adapters at the end."""
    return finished_once(once, "full", tiny_data, **FULL)


@pytest.fixture(scope="module")
def quick(tiny_data: Path, once: Callable[..., Path]) -> Done:
    """A short run without an average, so that the weights have moved."""
    return finished_once(once, "quick", tiny_data, **QUICK)


@pytest.fixture
def again(tiny_data: Path, tmp_path: Path) -> Callable[..., Done]:
    """QUICK once more with some knobs changed, into a fresh folder or over a copy of another run's."""

    def run(copy_of: Done | None = None, data: Path = tiny_data, **knobs: object) -> Done:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        if copy_of is not None:
            shutil.copytree(copy_of.folder, folder)
        return call(environment(data, folder, **{**QUICK, **knobs}), folder)

    return run


# A whole run and its files


def test_result_has_the_agreed_keys_and_adds_up(full: Done, tiny_data: Path) -> None:
    assert {p.name for p in full.folder.iterdir()} == WRITTEN, "every file and no half one"
    result, final = full.result, full.result["stages"]["final"]
    assert list(result["stages"]) == list(STAGES)
    assert all(set(stage) == {"val_loss", "val_bpb", "seconds"} for stage in result["stages"].values())
    assert (result["preset"], result["seed"], result["legal"]) == ("", 7, True)
    assert (result["val_loss"], result["val_bpb"]) == (final["val_loss"], final["val_bpb"])
    assert result["train_seconds"] > 0 and result["eval_seconds"] >= final["seconds"] > 0
    assert result["bytes_model"] == (full.folder / "model.bin").stat().st_size
    assert result["bytes_total"] == result["bytes_model"] + result["bytes_code"]
    source = (ROOT / "train_gpt.py").read_bytes()
    assert result["source_sha256"] == hashlib.sha256(source).hexdigest() and result["bytes_code"] == len(source)
    val = train_gpt.load_val(train_gpt.load_config({**TINY, "DATA_PATH": str(tiny_data)}))
    assert (result["tokens_scored"], result["bytes_scored"]) == (len(val.tokens) - 1, val.bytes[1:].sum())


def test_log_is_a_complete_record_and_ends_with_the_result(full: Done) -> None:
    log = (full.folder / "log.txt").read_text(encoding="utf-8")
    for part in ("SEED=7  (environment)", "parameters ", "optimisers:", "quantisation plan:", "torch ", "python "):
        assert part in log, part
    assert f"source sha256 {full.result['source_sha256']}" in log and "layers 0 1 2 | 1 2 3 4" in log
    last = log.splitlines()[-1]
    assert last == full.out.splitlines()[-1] and json.loads(last.removeprefix("RESULT ")) == full.result
    assert len(re.findall("^RESULT ", log, re.MULTILINE)) == 1


def test_record_env_of_a_run_is_its_config(full: Done) -> None:
    environ = train_gpt.read_preset(str(full.folder))
    assert train_gpt.load_config(environ) == train_gpt.load_config(TINY | {k: str(v) for k, v in FULL.items()})


def test_metrics_are_one_line_a_step_with_the_agreed_keys(full: Done) -> None:
    training, validation = full.metrics("train_loss"), full.metrics("val_loss")
    assert all(set(m) == {"step", "train_loss", "lr_mult", "seconds", "looping"} for m in training)
    steps = [m["step"] for m in training]
    assert steps == sorted(set(steps)) and steps[-1] == 8, "each step once, the last one always"
    assert [m["looping"] for m in training] == [step > 3 for step in steps]
    assert all(set(m) == {"step", "val_loss", "val_bpb"} for m in validation)
    assert [m["step"] for m in validation] == [0, 4]
    assert training[-1]["train_loss"] < training[0]["train_loss"] - 1


def test_curve_has_every_step_that_was_asked_for(again: Callable[..., Done]) -> None:
    lines = (again(ITERATIONS="14", TRAIN_LOG_EVERY="6").folder / "metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if "train_loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6, 12, 14]


def test_adapters_lower_the_score(full: Done) -> None:
    assert full.bpb("final") < full.bpb("quantized")
    assert full.bpb("quantized") == pytest.approx(full.bpb("pre_quant"), rel=0.02)


@pytest.mark.parametrize("name", train_gpt.EVALS)
def test_every_evaluation_scores_the_same_targets(
    name: str, quick: Done, again: Callable[..., Done], tmp_path: Path
) -> None:
    done = again(quick, STAGES="eval", EVAL=name, TTT_LORA_LR=0.0, SCORES=tmp_path / "scores")
    assert done.code == 0, done.err
    position, nats, step = np.load(tmp_path / "scores.0.npy").T
    assert sorted(position.astype(int)) == list(range(1, 1473)) and (np.diff(step) >= 0).all()
    assert nats.mean() == pytest.approx(done.result["val_loss"], rel=1e-12)
    assert (done.result["tokens_scored"], done.result["bytes_scored"]) == (1472, quick.result["bytes_scored"])
    assert done.bpb("quantized") == quick.bpb("quantized"), "scores of the stages before stay"
    assert done.bpb("final") == pytest.approx(quick.bpb("final"), rel=0.05)


@pytest.mark.parametrize(
    "text",
    [
        "MATRIX_QUANT=rowwise EMBED_QUANT=rowwise NUM_LOOPS=0 PARALLEL_START_LAYER=0 SKIP_GATES_ENABLED=0",
        "COMPRESSOR=lzma ATTN_EXTRAS=none ATTN_GATE=none EMBED_EXTRAS=none AVERAGE=ema GRAD_CLIP_NORM=0 "
        "EVAL_INCLUDE_TAIL=1",
    ],
)
def test_other_choices_run_from_end_to_end(text: str, again: Callable[..., Done]) -> None:
    done = again(**{"ITERATIONS": 3, **knobs(text)})
    assert done.code == 0, done.err
    assert list(done.result["stages"]) == list(STAGES) and done.bpb("final") == done.bpb("quantized")


# Resuming


@pytest.mark.parametrize(
    ("stages", "needed"),
    [("quantize,eval", "model.pt hessians.pt result.json"), ("eval", "model.bin result.json")],
)
def test_resumed_run_gives_the_same_score_exactly(
    stages: str, needed: str, full: Done, tiny_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in needed.split():
        shutil.copy(full.folder / name, folder)
    done = finished(tiny_data, folder, **FULL, STAGES=stages)
    assert (folder / "model.bin").read_bytes() == (full.folder / "model.bin").read_bytes()
    untimed = full.result.keys() - {"eval_seconds", "stages"}
    assert done.result.keys() == full.result.keys() and all(done.result[k] == full.result[k] for k in untimed)
    assert [done.bpb(stage) for stage in STAGES] == [full.bpb(stage) for stage in STAGES]


def test_evaluation_needs_the_artifact_alone(full: Done, tiny_data: Path, tmp_path: Path) -> None:
    model, folder = tmp_path / "elsewhere.bin", tmp_path / "run"
    shutil.copy(full.folder / "model.bin", model)
    done = finished(tiny_data, folder, SEED=7, STAGES="eval", MODEL_PATH=model)
    assert done.bpb("final") == full.bpb("final")
    assert {p.name for p in folder.iterdir()} == {"log.txt", "record.env", "result.json"}


# Repeatability


@pytest.mark.parametrize("changed", [{"WARMUP_STEPS": 0}, {"WARMUP_STEPS": 2, "VAL_LOSS_EVERY": 2}])
def test_same_seed_is_bit_equal_whatever_the_warm_up_and_validation(
    changed: dict[str, object], quick: Done, again: Callable[..., Done]
) -> None:
    other = again(**changed)
    losses, wanted = ([m["train_loss"] for m in run.metrics("train_loss")] for run in (other, quick))
    assert losses == wanted
    weights = quick.weights()
    assert all(torch.equal(weights[name], tensor) for name, tensor in other.weights().items())
    assert (other.folder / "model.bin").read_bytes() == (quick.folder / "model.bin").read_bytes()
    assert other.bpb("final") == quick.bpb("final")


def test_another_seed_is_another_model(quick: Done, again: Callable[..., Done]) -> None:
    other = again(SEED=1338)
    assert (other.folder / "model.bin").read_bytes() != (quick.folder / "model.bin").read_bytes()
    assert other.bpb("final") != quick.bpb("final")


def test_training_moves_every_tensor(quick: Done, tiny_data: Path) -> None:
    """All but the lane weights of layers outside the lanes, which no route uses."""
    cfg = train_gpt.load_config({**TINY, "DATA_PATH": str(tiny_data)})
    initial = train_gpt.GPT(cfg).init_weights(1337).state_dict()
    still = [name for name, tensor in quick.weights().items() if torch.equal(tensor, initial[name])]
    assert still == []


# Ranks


@pytest.mark.parametrize("text", ["LOADER=packed_docs", "LOADER=stream EVAL=sliding"])
def test_two_processes_are_one(
    text: str, tiny_data: Path, call_ranks: Callable[..., Done], again: Callable[..., Done], tmp_path: Path
) -> None:
    changed = {**QUICK, "ITERATIONS": 4, **knobs(text)}
    one = again(**changed)
    two = call_ranks(environment(tiny_data, tmp_path / "two", **changed), tmp_path / "two")
    assert (one.code, two.code) == (0, 0), one.err + two.err
    for key, tensor in one.weights().items():
        torch.testing.assert_close(two.weights()[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    assert two.bpb("pre_quant") == pytest.approx(one.bpb("pre_quant"), rel=1e-6)
    assert two.bpb("final") == pytest.approx(one.bpb("final"), rel=1e-4), "a weight may round to the next level"
    assert (two.result["tokens_scored"], two.result["bytes_scored"]) == (1472, one.result["bytes_scored"])
    assert two.out.count("RESULT ") == 1


def test_two_processes_quantise_and_adapt_as_one(full: Done, tiny_data: Path, tmp_path: Path) -> None:
    """By torchrun itself, as on a machine with GPUs."""
    folder = Path(shutil.copytree(full.folder, tmp_path / "run"))
    phased = "EVAL=phased_lora PHASED_TTT_PREFIX_DOCS=5 PHASED_TTT_NUM_PHASES=2 GLOBAL_TTT_LR=0.05"
    phased = FULL | knobs(f"{phased} GLOBAL_TTT_CHUNK_TOKENS=128")
    one = finished(tiny_data, folder, STAGES="eval", **phased)
    assert one.out.count("global steps") == 2
    assert abs(one.bpb("final") - full.bpb("final")) > 1e-5, "the global updates change nothing"
    (folder / "model.bin").unlink()
    two = launch(environment(tiny_data, folder, STAGES="quantize,eval", **phased), folder, ranks=2)
    assert two.code == 0 and two.out.count("RESULT ") == 1, two.err
    assert (folder / "model.bin").read_bytes() == (full.folder / "model.bin").read_bytes()
    assert two.bpb("quantized") == pytest.approx(full.bpb("quantized"), rel=1e-6)
    assert two.bpb("final") == pytest.approx(one.bpb("final"), rel=1e-5)


LEAVING = """
import os, sys
import train_gpt
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
train_gpt.dist.init_process_group("gloo")
train_gpt.dist.all_reduce(train_gpt.torch.zeros(1))
assert threads() > before
import torch._dynamo  # as torch.optim does
train_gpt.Runtime.close(None)
sys.exit(threads() != before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_no_thread_of_the_ranks_outlives_the_run() -> None:
    """One that does ends the process by SIGABRT now and then, and torchrun then kills all ranks."""
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "1"}
    env = os.environ | place | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LEAVING], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_no_rank_leaves_before_rank_0_has_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    events = []
    runtime = types.SimpleNamespace(
        rank=0,
        world=2,
        log=lambda line: events.append(line.split()[0]),
        barrier=lambda: events.append("barrier"),
        close=lambda: events.append("close"),
    )
    run = types.SimpleNamespace(result={"source_sha256": ""}, eval=lambda: events.append("eval"))
    monkeypatch.setattr(train_gpt.Runtime, "start", lambda *_: runtime)
    for name, value in (("Run", lambda *_: run), ("versions", str), ("explain", lambda *_: "knobs")):
        monkeypatch.setattr(train_gpt, name, value)
    train_gpt.execute(train_gpt.Config(stages=("eval",), artifact_dir=str(tmp_path)), {}, {})
    assert events[-4:] == ["eval", "RESULT", "barrier", "close"]


PHASES = "PHASED_TTT_PREFIX_DOCS=4 PHASED_TTT_NUM_PHASES=2 GLOBAL_TTT_LR=0.05 GLOBAL_TTT_CHUNK_TOKENS=128"
WINDOWS = "EVAL_STRIDE=16 TTT_CHUNK_TOKENS=192"
CAUSAL = f"EVAL=slot {WINDOWS} TTT_EPOCHS=1 SLOT_LR=0.1"
PUBLISHED = f"{CAUSAL} SLOT_CAUSAL=0 ALLOW_NONCAUSAL=1"  # SLOT that fits on the targets that it scores


@pytest.mark.parametrize(
    "text",
    [
        f"EVAL=phased_lora TTT_CONTEXT=carry TTT_BATCH_SIZE=2 {PHASES}",  # both ranks take documents
        f"EVAL=chunk_sgd {WINDOWS} TTT_LR=0.3 TTT_EPOCHS=2",
        PUBLISHED,
    ],
)
def test_two_processes_adapt_as_one(
    text: str, quick: Done, again: Callable[..., Done], call_ranks: Callable[..., Done], tiny_data: Path, tmp_path: Path
) -> None:
    changed = QUICK | knobs(text) | {"STAGES": "eval"}
    one, folder = again(quick, **changed), Path(shutil.copytree(quick.folder, tmp_path / "two"))
    two = call_ranks(environment(tiny_data, folder, **changed), folder)
    assert (one.code, two.code) == (0, 0), one.err + two.err
    assert two.result["val_loss"] == pytest.approx(one.result["val_loss"], rel=1e-5)
    for key in ("legal", "tokens_scored", "bytes_scored"):
        assert two.result[key] == one.result[key], key
    assert abs(one.bpb("final") - one.bpb("quantized")) > 1e-3, "adapting changes nothing"
    for done in (one, two):
        assert done.out.count("global steps") == (2 if PHASES in text else 0)
        assert done.result["legal"] is not (text == PUBLISHED)


def test_reading_the_answers_pays_and_is_called_not_legal(quick: Done, again: Callable[..., Done]) -> None:
    causal, published = (again(quick, STAGES="eval", **knobs(text)) for text in (CAUSAL, PUBLISHED))
    for done, legal in ((causal, True), (published, False)):
        warned = "WARNING: the final score is not legal" in done.out
        assert done.result["legal"] is legal is not warned and ("not legal" in done.out) is warned
    assert published.result["val_loss"] < causal.result["val_loss"] - 0.01
    replaced = again(published, STAGES="eval").result
    assert replaced["legal"] and not any("not legal" in warning for warning in replaced["warnings"])


# The clock

CLOCK = {**QUICK, "MAX_WALLCLOCK_SECONDS": 3, "GPTQ_RESERVE_SECONDS": 1, "ITERATIONS": 100_000}


class Ticking:
    """The time module, but for a clock that goes on by a tenth of a second whenever it is read."""

    seconds = 0.0

    def perf_counter(self) -> float:
        self.seconds += 0.1
        return self.seconds

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


def test_wall_clock_stops_training_and_moves_the_schedules(
    again: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_gpt, "time", Ticking())
    done = again(**CLOCK)
    assert done.code == 0, done.err
    training = done.metrics("train_loss")
    (line,) = re.findall(r"training stopped at step (\d+) after ([\d.]+) s", done.out)
    assert done.result["train_steps"] == int(line[0]) == training[-1]["step"] > 4
    assert 2 <= float(line[1]) < 2.5 and 2 <= done.result["train_seconds"] <= 3
    assert training[0]["lr_mult"] == 1 and training[-1]["lr_mult"] == 0.1, "schedules follow the clock"
    assert not training[0]["looping"] and training[-1]["looping"]


def test_two_processes_stop_at_the_same_step(tiny_data: Path, call_ranks: Callable[..., Done], tmp_path: Path) -> None:
    """A rank that went on alone would wait for ever in its next reduction, and the run would not end."""
    folder = tmp_path / "run"
    done = call_ranks(environment(tiny_data, folder, **{**CLOCK, "MAX_WALLCLOCK_SECONDS": 2}), folder)
    assert done.code == 0, done.err
    (steps,) = re.findall(r"training stopped at step (\d+)", done.out)
    assert int(steps) == done.result["train_steps"] == done.metrics("train_loss")[-1]["step"]
    assert done.result["train_seconds"] >= 1


# Bad inputs


def refused(done: Done, code: int, words: str) -> None:
    """One clear line, nothing else on standard error, and the exit status."""
    assert done.code == code
    assert re.fullmatch(r"error: [^\n]+\n", done.err), done.err
    assert words in done.err


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def other_weights(run: Path) -> None:
    """As after a run that was killed between its two files."""
    saved = torch.load(run / "model.pt", weights_only=True)
    saved["model"]["blocks.0.attn.q.weight"][0, 0] += 1
    torch.save(saved, run / "model.pt")


def edit_tokens(change: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    """A change of the validation tokens."""

    def damage(data: Path) -> None:
        raw, head = (data / VAL).read_bytes(), 4 * train_gpt.SHARD_HEADER_INTS
        tokens = np.frombuffer(raw[head:], "<u2").copy()
        tokens[:] = change(tokens)
        (data / VAL).write_bytes(raw[:head] + tokens.tobytes())

    return damage


def no_documents(tokens: np.ndarray) -> np.ndarray:
    return np.where(tokens == train_gpt.BOS_ID, 300, tokens)


TRAIN, SECOND, THIRD = (f"fineweb_train_00000{i}.bin" for i in range(3))
VAL = "fineweb_val_000000.bin"
PROMISES = "its header promises"
QUANTIZE, EVAL, ADAPT = "STAGES=quantize,eval", "STAGES=eval", "EVAL=doc_lora OVERWRITE=1"
Damage = Callable[[Path], object]
BAD_DATA: dict[str, tuple[Damage, str] | tuple[Damage, str, str]] = {  # and the run's knobs, by default a new training
    "missing train shard": (lambda d: (d / TRAIN).unlink(), "has no fineweb_train_*.bin"),
    "missing val shard": (lambda d: (d / VAL).unlink(), "has no fineweb_val_*.bin"),
    "gap": (lambda d: shutil.copy(d / TRAIN, d / THIRD), "fineweb_train_000001.bin is missing"),
    "train magic": (lambda d: edit(d / TRAIN, lambda raw: b"GGUF" + raw[4:]), "not a shard"),
    "val magic": (lambda d: edit(d / VAL, lambda raw: b"GGUF" + raw[4:]), "not a shard"),
    "short train shard": (lambda d: edit(d / TRAIN, lambda raw: raw[:-100]), PROMISES),
    "short val shard": (lambda d: edit(d / VAL, lambda raw: raw[:-1]), PROMISES),
    "short later shard": (lambda d: (d / SECOND).write_bytes((d / TRAIN).read_bytes()[:-2]), PROMISES),
    "no text in training": (lambda d: edit(d / TRAIN, lambda raw: raw[:8] + bytes(1016)), "no training shard holds"),
    "damaged tokenizer": (lambda d: next(d.glob("*.model")).write_bytes(b"junk"), "not a SentencePiece model"),
    "two tokenizers": (lambda d: (d / "b.model").write_bytes(b""), "choose one with TOKENIZER_PATH"),
    "no tokenizer": (lambda d: next(d.glob("*.model")).unlink(), "neither a *.model nor a byte sidecar"),
    "nothing there": (lambda d: shutil.rmtree(d), "has no fineweb_val_*.bin"),
    "no documents": (edit_tokens(no_documents), "no document start (BOS)", ADAPT),
    "no bytes": (edit_tokens(lambda tokens: train_gpt.BOS_ID), "count no byte", ADAPT),
    "another preparation": (edit_tokens(np.sort), "holds other validation data than", EVAL),
}
BAD_FILES: dict[str, tuple[Damage, str, str]] = {
    "truncated artifact": (lambda f: edit(f / "model.bin", lambda raw: raw[:-9]), "truncated", EVAL),
    "damaged artifact": (lambda f: edit(f / "model.bin", lambda raw: raw[:-9] + bytes(9)), "damaged", EVAL),
    "foreign artifact": (lambda f: (f / "model.bin").write_bytes(b"GGUF" * 9), "not a model artifact", EVAL),
    "missing artifact": (lambda f: (f / "model.bin").unlink(), "no such artifact", EVAL),
    "missing checkpoint": (lambda f: (f / "model.pt").unlink(), "model.pt is missing", QUANTIZE),
    "missing Hessians": (lambda f: (f / "hessians.pt").unlink(), "hessians.pt is missing", QUANTIZE),
    "truncated checkpoint": (lambda f: edit(f / "model.pt", lambda raw: raw[:-999]), "model.pt", QUANTIZE),
    "empty checkpoint": (lambda f: (f / "model.pt").write_bytes(b""), "model.pt is damaged", QUANTIZE),
    "list for a checkpoint": (lambda f: torch.save([1], f / "model.pt"), "lacks a dictionary", QUANTIZE),
    "checkpoint without weights": (lambda f: torch.save({}, f / "model.pt"), "lacks model", QUANTIZE),
    "empty Hessians": (lambda f: (f / "hessians.pt").write_bytes(b""), "hessians.pt is damaged", QUANTIZE),
    "Hessians of other weights": (other_weights, "of other weights than model.pt", QUANTIZE),
    "list for a result": (lambda f: (f / "result.json").write_text("[1]"), "holds a list", EVAL),
    "damaged result": (lambda f: (f / "result.json").write_text("{"), "result.json", EVAL),
}


@pytest.mark.parametrize("name", [*BAD_DATA, *BAD_FILES])
def test_bad_file_is_one_line_and_loses_nothing(name: str, quick: Done, tiny_data: Path, tmp_path: Path) -> None:
    damage, words, *more = (BAD_DATA | BAD_FILES)[name]
    data, folder = Path(shutil.copytree(tiny_data, tmp_path / "data")), tmp_path / "run"
    shutil.copytree(quick.folder, folder)
    damage(data if name in BAD_DATA else folder)
    if name in BAD_DATA:  # else every damage would be "not the file that manifest.json lists"
        (data / "manifest.json").unlink(missing_ok=True)
    before = snapshot(folder)
    done = call(environment(data, folder, **QUICK | knobs((*more, "SEED=5 OVERWRITE=1")[0])), folder)
    refused(done, 2, words)
    assert snapshot(folder) == before
    assert "step 1 " not in done.out, "found before any training"


BAD_KNOBS = """
    VOCAB_SIZE=512 -> the tokenizer has 320 pieces, VOCAB_SIZE=512
    VOCAB_SIZE=300 -> is outside VOCAB_SIZE=300
    TTT_LORA_RNK=4 -> did you mean TTT_LORA_RANK?
    NUM_HEADS=four -> NUM_HEADS='four'
    PRESET=records/none -> no record.env there
    TOKENIZER_PATH=none.model -> none.model: no such file
    STAGES=eval MODEL_DIM=64 -> holds a run with other knobs: MODEL_DIM=64 (there 32)
    STAGES=quantize,eval LOGIT_SOFTCAP=20 -> LOGIT_SOFTCAP=20.0 (there 30.0); leave that as it was
    STAGES=quantize,eval GPTQ_CALIBRATION_BATCHES=3 -> GPTQ_CALIBRATION_BATCHES=3 (there
    STAGES=quantize,eval CANONICAL_MASK=always CANONICAL_CHECK=0 -> CANONICAL_MASK=always (there none); leave
    STAGES=eval ROPE_BASE=100 SEED=2 -> SEED=2 (there 1337), ROPE_BASE=100.0 (there 10000.0); leave
    MLP_SLOPE=0.1 OVERWRITE=0 -> MLP_SLOPE=0.1 (there 0.5); choose another RUN_ID or ARTIFACT_DIR, or say OVERWRITE=1
    SEED=18446744073709551616 -> SEED=18446744073709551616 must be >= 0, <= 4294967295
    WORLD_SIZE=2 -> WORLD_SIZE=2: not what a launcher sets
    RANK=3 -> RANK=3: not what a launcher sets
    RANK=0 WORLD_SIZE=0 -> RANK=0 WORLD_SIZE=0: not what a launcher sets
    RANK=x WORLD_SIZE=2 -> RANK=x WORLD_SIZE=2: not what a launcher sets
    STAGES=eval MODEL_PATH=none.bin -> no such artifact
    DEVICE=cuda -> torch sees no GPU
    WORLD_SIZE=3 RANK=0 -> error: BATCH_SLICES=4 is not a multiple of the 3 ranks
"""


@pytest.mark.parametrize("row", BAD_KNOBS.strip().splitlines())
def test_bad_knob_is_one_line_and_loses_nothing(row: str, quick: Done, again: Callable[..., Done]) -> None:
    text, words = row.split(" -> ")
    if "DEVICE=cuda" in text and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = again(quick, **{"OVERWRITE": 1} | knobs(text))
    refused(done, 2, words)
    assert snapshot(done.folder) == snapshot(quick.folder)


@pytest.mark.parametrize("knob", ["MATRIX_LR", "TIED_EMBED_LR", "SCALAR_LR"])
def test_loss_that_is_not_finite_stops_the_run_and_leaves_earlier_files(
    knob: str, quick: Done, again: Callable[..., Done]
) -> None:
    done = again(quick, **{knob: 1e30, "OVERWRITE": 1})
    refused(done, 1, "training loss is")
    kept = {name: raw for name, raw in snapshot(quick.folder).items() if name != "metrics.jsonl"}
    assert {name: raw for name, raw in snapshot(done.folder).items() if name != "metrics.jsonl"} == kept


def test_interrupt_is_one_line_and_leaves_no_half_file(tiny_data: Path, tmp_path: Path) -> None:
    env = environment(tiny_data, tmp_path / "run", ITERATIONS=100_000, PYTHONUNBUFFERED="1")
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def heed() -> None:  # a shell starts background jobs with SIGINT ignored, and children inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, env=env, cwd=tmp_path, preexec_fn=heed, **pipes) as process:
        for line in process.stdout:
            if line.startswith("step 3 "):
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    refused(Done(tmp_path / "run", process.returncode, "", err), 130, "interrupted")
    assert {p.name for p in (tmp_path / "run").iterdir()} <= {"log.txt", "metrics.jsonl", "record.env"}


def test_an_artifact_of_another_model_is_refused(quick: Done, again: Callable[..., Done]) -> None:
    done = again(STAGES="eval", MODEL_PATH=quick.folder / "model.bin", LOGIT_SOFTCAP=20)
    refused(done, 2, "is of a model with other knobs")


def test_files_that_are_not_of_the_manifest_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    """Each fits by its size and its header."""
    data, said = Path(shutil.copytree(tiny_data, tmp_path / "data")), []
    cfg, log = train_gpt.load_config({**TINY, "DATA_PATH": str(data)}), train_gpt.Log(None, True)
    assert train_gpt.check_data(cfg, log) == train_gpt.check_data(cfg, log) and not log.warnings
    for path in sorted(data.glob("fineweb_*.bin")) + sorted(data.glob("*.model")):
        kept = path.read_bytes()
        path.write_bytes(kept[:-2] + bytes((kept[-2] ^ 1, kept[-1])))
        with pytest.raises(train_gpt.UserError, match=f"{path.name}: not the file that manifest.json lists"):
            train_gpt.check_data(cfg, log)
        path.write_bytes(kept)
        said.append(path.name)
    assert len(said) >= 3
    (data / "manifest.json").unlink()
    train_gpt.check_data(cfg, log)
    assert "no manifest.json" in log.warnings[0]


def test_case_operators_need_their_sidecar(caseops_sample: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(caseops_sample, tmp_path / "data"))
    for path in data.glob("fineweb_val_bytes_*.bin"):
        path.unlink()
    pieces = json.loads((data / "manifest.json").read_text(encoding="utf-8"))["tokenizer"]["vocab_size"]
    cfg = train_gpt.load_config({**TOY, "DATA_PATH": str(data), "VOCAB_SIZE": str(pieces)})
    with pytest.raises(train_gpt.UserError, match="case operators"):
        train_gpt.load_val(cfg)
    shutil.copytree(caseops_sample, tmp_path / "whole")
    (tmp_path / "whole" / "fineweb_val_bytes_000000.bin").unlink()
    cfg = train_gpt.dataclasses.replace(cfg, data_path=str(tmp_path / "whole"))
    with pytest.raises(train_gpt.UserError, match="fineweb_val_bytes_000000.bin: missing, though"):
        train_gpt.check_data(cfg, train_gpt.Log(None, True))


def test_a_folder_in_use_names_its_owner(quick: Done, again: Callable[..., Done], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quick.folder, tmp_path / "held"))
    with train_gpt.locked(folder):
        assert f"process {os.getpid()} on " in (folder / "lock").read_text()
        refused(again(ARTIFACT_DIR=folder), 2, f"is in use by process {os.getpid()} on ")
    assert snapshot(folder) == snapshot(quick.folder), "the lock goes with its owner"


def test_a_folder_that_takes_no_files_or_a_full_disk_is_found_before_training(
    again: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    refused(again(ARTIFACT_DIR=tmp_path / "file"), 1, "File exists")
    refused(again(ARTIFACT_DIR=tmp_path / "file" / "run"), 1, "Not a directory")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    refused(again(), 2, "1 MiB of disk are free")
    needs = [train_gpt.bytes_on_disk(train_gpt.load_config({"MILESTONES": steps})) for steps in ("none", "5,9")]
    assert needs[1] == 3 * needs[0], "each milestone leaves files of its own"


def test_what_a_folder_does_not_take_is_saved_elsewhere_and_can_go_on(
    again: Callable[..., Done], tiny_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save, spare = train_gpt.atomic_save, tmp_path / "spare"
    spare.mkdir()

    def full(path: Path, value: object) -> None:
        if path.parent != spare:
            raise OSError(28, "No space left on device", str(path))
        save(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "atomic_save", full)
        patch.setattr(tempfile, "tempdir", str(spare))
        done = again()
    for name in ("model.pt", "hessians.pt"):
        (saved,) = spare.glob(f"*_{name}")  # named after the run, as others may lose their folders too
        refused(done, 2, f"{name} is saved as {saved}")
        saved.rename(done.folder / name)
    assert torch.load(done.folder / "model.pt", weights_only=True)["steps"] == QUICK["ITERATIONS"]
    assert "No space left on device" in done.out
    assert call(environment(tiny_data, done.folder, **QUICK, STAGES="quantize,eval"), done.folder).code == 0


def test_no_place_for_temporary_files_is_no_matter_for_a_healthy_folder(
    again: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    assert again(STAGES="train,quantize,eval").code == 0


def test_a_folder_that_takes_nothing_more_costs_no_training(
    again: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A log, a curve and a lock that cannot be written or removed are no reason to lose the weights."""
    spare, ended = tmp_path / "spare", []
    spare.mkdir()
    opened, advance, unlink = Path.open, train_gpt.Trainer.advance, Path.unlink

    def is_lost(path: Path) -> bool:
        return bool(ended) and spare not in path.parents and path.is_relative_to(tmp_path)

    def open_or_fail(path: Path, mode: str = "r", *rest: object, **more: object) -> object:
        if is_lost(path) and set(mode) & set("wa+"):
            raise OSError(30, "Read-only file system", str(path))
        return opened(path, mode, *rest, **more)

    def unlink_or_fail(path: Path, **more: object) -> None:
        if is_lost(path) and path.name == "lock":
            raise OSError(30, "Read-only file system", str(path))
        unlink(path, **more)

    def last(self: train_gpt.Trainer, batches: dict, fraction: float, step: int) -> None:
        advance(self, batches, fraction, step)
        ended.extend([step] if step == QUICK["ITERATIONS"] - 1 else [])

    monkeypatch.setattr(Path, "open", open_or_fail)
    monkeypatch.setattr(Path, "unlink", unlink_or_fail)
    monkeypatch.setattr(train_gpt.Trainer, "advance", last)
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    done = again()
    assert done.code == 2 and "model.pt is saved as" in done.err and "the log goes on without its file" in done.out
    assert len(list(spare.glob("*_model.pt"))) == 1


def test_a_full_disk_keeps_no_half_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "name").write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        train_gpt.atomic_write(tmp_path / "name", b"after")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("name", b"before")]


def test_a_new_artifact_has_no_final_score_of_the_one_before(
    quick: Done, again: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_gpt.Run, "eval", interrupted)
    done = again(quick, STAGES="quantize,eval", MATRIX_BITS="4")
    assert done.code == 130 and list(done.result["stages"]) == ["pre_quant", "quantized"]
    assert list(quick.result["stages"]) == ["pre_quant", "quantized", "final"]


def test_default_folders_tell_configurations_apart(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for more in ({}, {"MATRIX_LR": "0.02"}, {"MATRIX_LR": "0.02", "SEED": "5"}):
        env = environment(tiny_data, tmp_path, **QUICK | SHORTEST | more)
        del env["ARTIFACT_DIR"]
        assert call(env, tmp_path).code == 0
    names = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert len(names) == 3 and all(re.fullmatch(r"default_seed\d+_[0-9a-f]{12}", name) for name in names)


def test_a_dead_rank_ends_the_other_with_one_line(tiny_data: Path, tmp_path: Path) -> None:
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    env = environment(tiny_data, tmp_path / "run", ITERATIONS=100_000, TRAIN_LOG_EVERY=1) | place
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train_gpt.py")],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    # until it trains, so that both have met
    assert any(line.startswith("step 2 ") for line in ranks[0].stdout)
    ranks[1].kill()
    out, err = ranks[0].communicate(timeout=300)
    assert ranks[0].returncode == 1, out
    assert re.fullmatch(r"error: another rank has ended, and says why [^\n]+\n", err), err
    ranks[1].communicate()


def test_ctrl_c_while_modules_load_is_no_traceback(tmp_path: Path) -> None:
    """A module that the program imports stops the import until the signal is there."""
    (tmp_path / "sentencepiece.py").write_text("import time, sys; print('here', flush=True); time.sleep(300)")
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    loading = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert loading.stdout.readline() == "here\n"
    loading.send_signal(signal.SIGINT)
    out, err = loading.communicate(timeout=300)
    assert (loading.returncode, out, err) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(
    "locale", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_that_lacks_letters_of_a_path_is_no_traceback(locale: dict[str, str], tmp_path: Path) -> None:
    env = environment(tmp_path / "d\u00e4ten", tmp_path / "r\u00fcn") | locale
    done = launch(env, tmp_path / "r\u00fcn")
    refused(done, 2, "has no fineweb_val_*.bin")
    assert (tmp_path / "r\u00fcn" / "log.txt").read_text(encoding="utf-8")
