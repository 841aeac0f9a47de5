"""What the test files share: tiny data, runs of the program, and one toy run of each record.

Folders that `once`, `tiny_data`, `caseops_sample`, `toy_run` and `packed_toy` return are shared by all tests: read
them, and copy them before you change anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import fuse_shards
import prepare
import pytest
import torch
from golden_rules import knobs
from hypothesis import HealthCheck, settings

import pack_artifact
import train_gpt
from records import judge
from records.black_box import free_port

ROOT = Path(__file__).resolve().parent.parent
RECORDS = sorted(path.parent for path in (ROOT / "records" / "track_10min_16mb").glob("*/record.env"))
LAUNCHER = frozenset(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PRESET"))
KNOBS = frozenset(name.upper() for name in train_gpt.Config.__dataclass_fields__)
TINY = knobs(  # a model of the CaseOps kind that trains in a second on one core
    "VOCAB_SIZE=320 NUM_LAYERS=5 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=2.0 ROPE_DIMS=4 ATTN_GATE=sparse "
    "EMBED_EXTRAS=smear LOOP_START=1 LOOP_END=2 NUM_LOOPS=1 PARALLEL_START_LAYER=3 XSA_LAST_N=5 TRAIN_SEQ_LEN=64 "
    "EVAL_SEQ_LEN=64 TTT_EVAL_SEQ_LEN=64 TRAIN_BATCH_TOKENS=512 VAL_BATCH_TOKENS=512 BATCH_SLICES=4 ITERATIONS=8 "
    "MAX_WALLCLOCK_SECONDS=0 EVAL_BUDGET_SECONDS=0 WARMUP_STEPS=1 TRAIN_LOG_EVERY=2 GPTQ_CALIBRATION_BATCHES=4 "
    "TTT_LORA_RANK=4 TTT_LORA_ALPHA=6 TTT_LORA_LR=0.003 TTT_CHUNK_SIZE=16 TTT_BATCH_SIZE=3"
)
TOY = train_gpt.read_preset(str(ROOT / "records" / "toy")) | knobs(  # any record at toy size, on caseops_sample
    "NUM_LAYERS=3 XSA_LAST_N=3 LOOP_END=1 PARALLEL_START_LAYER=2 EVAL_STRIDE=64 VAL_BATCH_TOKENS=512 SWA_EVERY=2 "
    "WARMDOWN_ITERS=8 TTT_BATCH_SIZE=1 TTT_EPOCHS=2 VE_LAYERS=0,2 VE_DIM=16 BIGRAM_VOCAB_SIZE=128 "
    "TRIGRAM_VOCAB_SIZE=96 OMP_NUM_THREADS=1 DEVICE=cpu"
)
OWN_TOY = {"PR1895": {"MIXERS": "G A G", "GDN_HEAD_DIM": "16", "EMBED_TOPK": "200"}}  # mixers are listed by layer

# the same examples every time, however slow the machine is
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("suite")


# Runs of the program


class Done(NamedTuple):
    """What a run left: its folder, exit status, standard output and standard error."""

    folder: Path
    code: int
    out: str
    err: str

    @property
    def result(self) -> dict:
        return json.loads((self.folder / "result.json").read_text(encoding="utf-8"))

    def bpb(self, stage: str) -> float:
        return self.result["stages"][stage]["val_bpb"]

    def weights(self) -> dict[str, torch.Tensor]:
        return torch.load(self.folder / "model.pt", weights_only=True)["model"]

    def metrics(self, key: str) -> list[dict]:
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if key in record]


def environment(data: Path, folder: Path, **knobs: object) -> dict[str, str]:
    """This process's environment without knobs and a launcher's variables, TINY, and the run's own knobs."""
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER | KNOBS}
    env |= TINY | {"DATA_PATH": str(data), "ARTIFACT_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    return env | {key: str(value) for key, value in knobs.items()}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums in the order of the launched runs, so that equal means equal; and no threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def call(env: Mapping[str, str], folder: Path, *args: str, main: Callable = train_gpt.main) -> Done:
    """main() in this process: the same as a launched run without three seconds of imports."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        one_thread(),
    ):
        for name in LAUNCHER | KNOBS:
            patch.delenv(name, raising=False)
        for name, value in env.items():
            patch.setenv(name, value)
        code = main(list(args))
    return Done(folder, code, out.getvalue(), err.getvalue())


def launch(env: Mapping[str, str], folder: Path, *args: str, ranks: int = 1) -> Done:
    """train_gpt.py in its own process, or by torchrun in several, as a user starts it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(ROOT / "train_gpt.py"), *args]
    done = subprocess.run(command, env=env, cwd=folder.parent, capture_output=True, text=True, timeout=600)
    return Done(folder, done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def call_ranks() -> Iterator[Callable[..., Done]]:
    """call_ranks(env, folder, *args, ranks=2): main() on several ranks, each forked from a process that has torch."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "rank_server.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:

        @functools.cache
        def server() -> subprocess.Popen:
            return stack.enter_context(subprocess.Popen(command, env=environ, **pipes))

        def run(env: Mapping[str, str], folder: Path, *args: str, ranks: int = 2) -> Done:
            place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
            environments = [{**env, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
            output = folder.parent / f"{folder.name}.out"
            output.unlink(missing_ok=True)
            print(json.dumps([args, environments, str(output)]), file=server().stdin, flush=True)
            codes = json.loads(server().stdout.readline())
            out = output.read_text(encoding="utf-8")
            return Done(folder, next((code for code in codes if code), 0), out, out if any(codes) else "")

        yield run


@pytest.fixture
def run_gpt(
    tiny_data: Path, tmp_path: Path, call_ranks: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Done]:
    """run_gpt(*args, ranks=1, code=0, **knobs): a run with knobs over TINY, by default into tmp_path/run."""

    def run(*args: str, ranks: int = 1, code: int = 0, **knobs: object) -> Done:
        env = environment(tiny_data, tmp_path / "run", **knobs)
        monkeypatch.chdir(tmp_path)
        folder = Path(env["ARTIFACT_DIR"])
        done = call(env, folder, *args) if ranks == 1 else call_ranks(env, folder, *args, ranks=ranks)
        assert done.code == code, done.err
        return done

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused(words, main, *argv, code=2): a program says one line with these words, and ends with the exit code."""

    def run(words: str, main: Callable[[list[str]], int], *argv: object, code: int = 2) -> str:
        capsys.readouterr()
        assert main([*map(str, argv)]) == code, words
        error = capsys.readouterr().err
        assert re.fullmatch(r"error: [^\n]+\n", error) and words in error, f"{words!r} is not in {error!r}"
        return error

    return run


# Folders that are made once, whatever the number of xdist's workers


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """once(name, make): the folder that make(folder) filled, for whichever process asked first; the others wait."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "once"
    root.mkdir(exist_ok=True)

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


def listener(function: Callable, sites: str = "q k v qkv o up down head attn mlp") -> Callable:
    """A function (or partial) as a listener at some sites of the model, by default at all of them."""
    function.sites = frozenset(sites.split())
    return function


def stored(parts: dict[str, train_gpt.Parts]) -> list[train_gpt.Stored]:
    """Stored tensors from Stored.key -> parts."""
    return [train_gpt.Stored.parse(key, tensors) for key, tensors in parts.items()]


def same_stored(a: list[train_gpt.Stored], b: list[train_gpt.Stored]) -> bool:
    """Equal keys in one order, and parts of equal names, dtypes, shapes and bits."""

    def facts(tensors: list[train_gpt.Stored]) -> list[tuple]:
        arrays = [(t.key(), part, values.numpy()) for t in tensors for part, values in sorted(t.parts.items())]
        return [(key, part, array.dtype, array.shape, array.tobytes()) for key, part, array in arrays]

    return [t.key() for t in a] == [t.key() for t in b] and facts(a) == facts(b)


def words(seed: int, count: int) -> str:
    """`count` words of a small vocabulary with seeded repetition, so that a model has something to learn."""
    stems = "river stone Light under carry window morning paper Quiet seven garden letter".split()
    state, out = seed * 2654435761 % 2**32 + 1, []
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        out.append(stems[(state >> 16) % len(stems)] + ("." if state % 11 == 0 else ""))
    return " ".join(out)


def prepare_docs(folder: Path, texts: list[str], *options: str) -> None:
    """Shards of some documents, with a tokenizer of their own, in folder/shards."""
    docs = folder / "docs.jsonl"
    docs.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    assert prepare.main(["--docs", str(docs), "--out", str(folder / "shards"), "--jobs", "1", *options]) == 0


@pytest.fixture(scope="session")
def tiny_data(once: Callable[..., Path]) -> Path:
    """A prepared data directory: 320 pieces, 7 validation documents of unequal length, 90 for training."""
    texts = [words(i + 1, 12 + 37 * i % 160) for i in range(97)]
    return once("tiny", lambda room: prepare_docs(room, texts, "--vocab-size", "320", "--val-docs", "7")) / "shards"


@pytest.fixture(scope="session")
def caseops_sample(once: Callable[..., Path]) -> Path:
    """Short texts of Python's own documentation as shards, through CaseOps, with the byte sidecar."""
    return once("caseops", lambda room: judge.toy_documents(room, int(TOY["VOCAB_SIZE"]))) / "shards"


@pytest.fixture(scope="session")
def fused_sample(once: Callable[..., Path], caseops_sample: Path) -> Path:
    """caseops_sample with fused pairs."""
    return once("fused", lambda room: fuse_shards.fuse_folder(caseops_sample, room / "shards")) / "shards"


class ToyRun(NamedTuple):
    """A record at toy size: its folder in the repository, the folder of its run, and the environment of that run."""

    record: Path
    folder: Path
    env: dict[str, str]

    @property
    def result(self) -> dict:
        return json.loads((self.folder / "result.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def toy_run(once: Callable[..., Path], caseops_sample: Path, fused_sample: Path) -> Callable[[Path], ToyRun]:
    """toy_run(record): the finished run of a record of RECORDS at toy size, trained once in a session."""

    def finished(record: Path) -> ToyRun:
        env = {k: v for k, v in os.environ.items() if k not in LAUNCHER | KNOBS}
        env |= TOY | OWN_TOY.get(record.name.rpartition("_")[2], {})
        data = fused_sample if record.name.endswith("Frontier") else caseops_sample
        env |= {"PRESET": str(record), "DATA_PATH": str(data)}
        # lrzip takes seconds for the smallest stream, so one record is enough; where it is not installed, none
        keeps_lrzip = record.name.endswith("PR1934") and shutil.which("lrzip") is not None
        if train_gpt.load_config({"PRESET": str(record)}).compressor == "pergroup" and not keeps_lrzip:
            env["COMPRESSOR"] = "brotli"

        def train(folder: Path) -> None:
            done = call(env | {"ARTIFACT_DIR": str(folder)}, folder)
            assert done.code == 0, done.err

        folder = once(f"toy {record.name}", train)
        return ToyRun(record, folder, env | {"ARTIFACT_DIR": str(folder)})

    return finished


@pytest.fixture(scope="session")
def packed_toy(once: Callable[..., Path], toy_run: Callable[[Path], ToyRun]) -> Callable[[Path], ToyRun]:
    """packed_toy(record): a copy of the record's toy run with artifact.pyz, packed once in a session."""

    def packed(record: Path) -> ToyRun:
        run = toy_run(record)

        def pack(folder: Path) -> None:
            shutil.copytree(run.folder, folder, dirs_exist_ok=True)
            assert pack_artifact.main(["pack", str(folder)]) == 0

        folder = once(f"packed {record.name}", pack)
        return run._replace(folder=folder, env=run.env | {"ARTIFACT_DIR": str(folder)})

    return packed
