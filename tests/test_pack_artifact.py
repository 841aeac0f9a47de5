"""Packing: the container, the self-extracting file, its counting, its failures, `verify`, and the real program.

Most tests pack a small stand-in program with the interface of train_gpt.py, which starts in a tenth of a second.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import python_minifier
import torch
from conftest import ROOT, call, environment
from hypothesis import given, settings
from hypothesis import strategies as st

import pack_artifact
import train_gpt
from pack_artifact import MAGIC, Payload

PROGRAM = ROOT / "train_gpt.py"
PRESETS = sorted(path.parent for path in (ROOT / "records").glob("**/record.env") if path.parent.name != "run")
SCORES = ("val_loss", "val_bpb", "tokens_scored", "bytes_scored", "bytes_model")

STAND_IN = '''"""A program with the interface of train_gpt.py and none of its substance."""
from __future__ import annotations
# +------------------+
# | 01 IMPORTS       |
# +------------------+
import json
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
import numpy as np
# +------------------+
# | 02 CONFIG        |
# +------------------+
@dataclass(frozen=True, slots=True)
class Config:
    """Knobs, typed by annotation."""
    stages: str = "train,quantize,eval"
    preset: str = ""
    data_path: str = ""
    tokenizer_path: str = ""
    model_path: str = ""
    artifact_dir: str = "logs/run"
    scale: float = 1.0
def load_config(environ: dict[str, str]) -> Config:
    """default < preset < environment"""
    preset = Path(environ.get("PRESET", "")) / "record.env"
    values: dict[str, str] = {}
    lines: list[str] = preset.read_text().splitlines() if environ.get("PRESET") else []
    for line in lines + [f"{k}={v}" for k, v in environ.items()]:
        key, _, value = line.partition("#")[0].strip().partition("=")
        values[key.lower()] = value
    types = {"str": str, "float": float}
    return Config(**{f.name: types[f.type](values[f.name]) for f in fields(Config) if f.name in values})
# +------------------+
# | 03 EVALUATION    |
# +------------------+
def load_artifact(path: str | Path) -> dict[str, np.ndarray]:
    """Weights by name."""
    codes = np.frombuffer(Path(path).read_bytes(), np.int8)
    return {"codes": codes.astype(np.float32) / 7, "first": np.float32(codes[0])}
def main(argv: list[str]) -> int:
    """Score the data with the weights."""
    cfg = load_config(os.environ)
    assert cfg.scale > 0, "scale must be positive"
    if "--explain" in argv:
        print("parameters", len(load_artifact(cfg.model_path)["codes"]))
        return 0
    data = np.frombuffer((Path(cfg.data_path) / "val.bin").read_bytes(), np.uint8)
    weights = load_artifact(cfg.model_path)["codes"]
    loss = float(np.float64(weights.sum()) * cfg.scale / data.sum())
    seen = {k: os.environ.get(k) for k in ("RANK", "WORLD_SIZE", "PYTHONPATH", "LEAKED_KNOB", "TOKENIZER_PATH")}
    seen |= {"file": __file__, "argv": argv, "stages": cfg.stages, "model": cfg.model_path, "preset": cfg.preset}
    print("SEEN " + json.dumps(seen), flush=True)
    if os.environ.get("RANK", "0") == "0":
        Path(cfg.artifact_dir).mkdir(parents=True, exist_ok=True)
        result = {"val_loss": loss, "val_bpb": loss / 2, "tokens_scored": len(data), "bytes_scored": int(data.sum())}
        (Path(cfg.artifact_dir) / "result.json").write_text(json.dumps(result))
    return 0
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
'''


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of the stand-in (run/), its data, its tokenizer and its source. Read only."""
    root = tmp_path_factory.mktemp("finished")
    run, data = root / "run", root / "data"
    run.mkdir()
    data.mkdir()
    (root / "stand_in.py").write_text(STAND_IN)
    (data / "val.bin").write_bytes(bytes(range(1, 200)))
    (data / "tiny.model").write_bytes(b"pieces " * 300)
    (run / "model.bin").write_bytes(np.random.default_rng(7).integers(0, 256, 40_000, np.uint8).tobytes())
    (run / "record.env").write_text("SCALE=0.37  # a reason\n")
    execute([str(root / "stand_in.py")], root, run, PRESET=str(run), ARTIFACT_DIR=str(run), MODEL_PATH="run/model.bin")
    result = json.loads((run / "result.json").read_text())
    result |= {"preset": "records/tiny", "bytes_code": 1, "bytes_total": 2, "stages": {"final": {"val_bpb": 1.0}}}
    (run / "result.json").write_text(json.dumps(result))
    return root


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "copy")) / "run"


@pytest.fixture(scope="module")
def packed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed copy of the run that tests only read; the artifact is RUN_DIR/artifact.pyz."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("packed") / "copy")) / "run"
    assert pack(run) == 0
    return run


def pack(run: Path, *options: str) -> int:
    return pack_artifact.main(["pack", str(run), "--source", str(run.parent / "stand_in.py"), *options])


def execute(
    command: list[str], cwd: Path, run: Path, check: int | None = 0, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run `command` with Python in `cwd`, with the data of `run`, a cache of its own and nothing of the repository."""
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV")}
    env |= {"XDG_CACHE_HOME": str(cwd / "cache"), "DATA_PATH": str(run.parent / "data")} | environ
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert check is None or done.returncode == check, done.stdout + done.stderr
    return done


def seen(out: str) -> list[dict[str, object]]:
    """What each process of the stand-in said; two of them may write into one line."""
    return [json.JSONDecoder().raw_decode(text)[0] for text in out.split("SEEN ")[1:]]


def last_line(out: str) -> dict:
    """The report in JSON that ends the output, behind a word of its own."""
    return json.loads(out.splitlines()[-1].partition(" ")[2])


def one_line(error: str) -> str:
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1, error
    return error


# Container

payloads = st.builds(
    Payload,
    preset=st.from_regex(r"[a-z0-9_.-]{1,20}", fullmatch=True),
    config=st.binary(max_size=200).map(lambda b: b.replace(b"\0", b"")),
    source=st.binary(max_size=2000).map(lambda b: b.replace(b"\0", b"")),
    tokenizer=st.binary(max_size=300),
    weights=st.binary(max_size=500),
)


@settings(max_examples=60)
@given(payload=payloads, data=st.data())
def test_container_round_trips_and_refuses_every_flip_and_cut(payload: Payload, data: st.DataObject) -> None:
    blob = pack_artifact.encode_container(payload)
    assert pack_artifact.decode_container(blob + data.draw(st.binary(max_size=40))) == (payload, len(blob))
    at = data.draw(st.integers(0, len(blob) - 1))
    flipped = blob[:at] + bytes([blob[at] ^ 1 << data.draw(st.integers(0, 7))]) + blob[at + 1 :]
    for damaged in (flipped, blob[:at]):
        with pytest.raises(train_gpt.UserError, match=r"truncated|corrupted"):
            pack_artifact.decode_container(damaged)


def test_container_has_the_documented_layout_and_no_nul() -> None:
    blob = pack_artifact.encode_container(Payload("p", b"c", b"s", b"t", b"weights"))
    n_code, n_tokenizer, n_weights = struct.unpack_from("<3I", blob, 32)
    assert n_weights == 7 and len(blob) == 44 + n_code + n_tokenizer + 7
    assert hashlib.sha256(blob[32:]).digest() == blob[:32] and blob.endswith(b"weights")
    with pytest.raises(train_gpt.UserError, match="NUL"):
        pack_artifact.encode_container(Payload("p", b"", b"a\0b", b"", b""))


# Minifier and sections


def test_annotations_go_where_nobody_reads_them_and_stay_where_somebody_does() -> None:
    source = (
        "from dataclasses import dataclass\nimport torch\nimport triton\nimport triton.language as tl\n"
        "@dataclass\nclass C:\n    'doc'\n    x: int = 1\n"
        "    def m(self, a: int) -> int:\n        b: int = a\n        return b\n"
        "@triton.jit\ndef kernel(p, BLOCK: tl.constexpr):\n    k: tl.constexpr = 2\n    return k\n"
        "@torch.library.custom_op('n::op', mutates_args=())\ndef op(v: torch.Tensor) -> torch.Tensor:\n    return v\n"
        "def late(v: torch.Tensor) -> torch.Tensor:\n    return v\nlate_op = torch.library.custom_op('n::l', late)\n"
        "@torch.no_grad()\ndef plain(v: torch.Tensor, *r: int, key: str = '') -> int:\n    count: int\n    return v\n"
        "table: dict = {'a': 1}\n"
    )
    small = pack_artifact.minify(source)
    tensors = "(v:torch.Tensor)->torch.Tensor"
    for kept in f"x:int=1 BLOCK:tl.constexpr :tl.constexpr=2 op{tensors} late{tensors} plain(v".split():
        assert kept in small, kept
    for dropped in "a:int r:int key:str doc table:".split():
        assert dropped not in small, dropped
    repeated = "def f(d):\n    return d['a long repeated key'], d['a long repeated key'], None\n"
    assert pack_artifact.minify(repeated).count("a long repeated key") == 2, "a kernel may not read a hoisted literal"


def test_what_only_talks_goes() -> None:
    source = (
        '"""Manual."""\nfrom __future__ import annotations\n'
        "def knob(default, doc, allowed='', when=''): return default, allowed\n"
        "class Config:\n    'Knobs.'\n    a: int = knob(3, 'steps', '>= 1', when='B=1')\n"
        "    b: int = knob(0, 'other', '0|1', 'A=1')\n"
        "RENAMED = {'OLD': 'A=1'}  # said by other programs\n"
        "def help_text():\n    'The manual.'\n    return __doc__ + 'all knobs'\n"
        "def problems(): return [f'{n} is no knob; say {RENAMED[n]}' for n in RENAMED]\n"
    )
    small = pack_artifact.minify(source)
    for gone in ("Manual", "Knobs", "steps", "other", "B=1", "A=1", "OLD", "all knobs"):
        assert gone not in small, gone
    space: dict[str, object] = {}
    exec(compile(small, "small", "exec"), space)
    assert (space["Config"].a, space["Config"].b) == ((3, ">= 1"), (0, "0|1"))
    assert space["help_text"]() == pack_artifact.NO_MANUAL and space["problems"]() == []


def test_loops_share_no_name_with_what_their_function_reads_from_around() -> None:
    """CPython 3.12.1 raises UnboundLocalError for this text as it is."""
    text = (
        "def outer(B,C,D):\n A=B|{}\n def inner(B,C):\n  E=[D[A]for A in B];F=[A[B]for B in B]\n"
        "  return E,F,[D[A]if A in D else 0 for A in B],{A:(lambda A:A)(D[A])for A in B},[[C for C in A]for A in C]\n"
        " return inner(['a'],['bc'])\n"
    )
    small = python_minifier.unparse(pack_artifact.OwnLoops().visit(ast.parse(text)))
    assert small.count("for A in") == 0 and "for C in" not in small and "[A[" in small, small
    space: dict[str, Any] = {}
    exec(small, space)
    assert space["outer"]({"a": 1}, {}, {"a": 3}) == ([3], [1], [3], {"a": 3}, [["b", "c"]])


def test_sections_join_to_the_minified_source_and_keep_their_order() -> None:
    small = pack_artifact.minify(STAND_IN)
    sections = pack_artifact.cut_sections(small, STAND_IN)
    assert [s.title for s in sections] == ["(before the first banner)", "01 IMPORTS", "02 CONFIG", "03 EVALUATION"]
    assert "".join(s.raw for s in sections) == STAND_IN and "".join(s.minified for s in sections) == small
    assert "class Config" in sections[2].minified and "load_artifact" in sections[3].minified
    quoted = 'x = """\n# +---+\n# | no |\n# +---+\n"""\n# +---+\n# | yes |\n# +---+\ny = x\n'
    sections = pack_artifact.cut_sections(pack_artifact.minify(quoted), quoted)
    assert [s.title for s in sections] == ["(before the first banner)", "yes"], "a banner inside a string"


# Pack and count


def test_bytes_depend_on_the_input_alone(packed: Path) -> None:
    command = ["pack", str(packed), "--source", str(packed.parent / "stand_in.py"), "--out", str(packed / "other.pyz")]
    execute(["-m", "pack_artifact", *command], packed, packed, PYTHONHASHSEED="77", PYTHONPATH=str(ROOT))
    assert (packed / "other.pyz").read_bytes() == (packed / "artifact.pyz").read_bytes()


def test_counts_are_those_of_the_disk(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(run_dir) == 0
    out, data = capsys.readouterr().out, (run_dir / "artifact.pyz").read_bytes()
    report = last_line(out)
    size, weights = len(data), (run_dir / "model.bin").stat().st_size
    assert report["bytes_total"] == size == sum(report["parts"].values())
    assert report["bytes_model"] == weights and report["bytes_code"] == size - weights
    assert report["headroom"] == 16_000_000 - size
    assert report["parts"]["bootstrap"] < 1200
    raw = [row["raw"] for row in report["sections"]]
    assert sum(raw) == len(STAND_IN.encode()) and "02 CONFIG" in out and "not counted, as in the contest" in out
    compressed = sum(row["compressed"] for row in report["sections"])
    assert abs(compressed - report["parts"]["code"]) <= len(raw)
    result = json.loads((run_dir / "result.json").read_text())
    assert result["bytes_total"] == size and result["bytes_code"] == size - weights
    assert result["stages"] == {"final": {"val_bpb": 1.0}} and result["artifact"] == "artifact.pyz"
    assert result["artifact_sha256"] == hashlib.sha256(data).hexdigest()
    assert data.startswith(MAGIC) and (run_dir / "model.bin").read_bytes() in data, "the weights lie there as they are"
    with zipfile.ZipFile(run_dir / "artifact.pyz") as archive:
        assert archive.namelist() == ["__main__.py"] and archive.testzip() is None
    model = str(run_dir.parent / "data" / "tiny.model")
    assert pack(run_dir, "--tokenizer", "embed", "--tokenizer-path", model) == 0
    report = last_line(capsys.readouterr().out)
    assert 0 < report["parts"]["tokenizer"] <= report["bytes_total"] - size


def test_cap_is_exact_and_over_it_nothing_is_written(run_dir: Path, refused: Callable[..., str]) -> None:
    command = ("pack", run_dir, "--source", run_dir.parent / "stand_in.py", "--cap")
    assert pack(run_dir) == 0
    artifact = run_dir / "artifact.pyz"
    older, size = artifact.read_bytes(), artifact.stat().st_size
    refused("over the cap of 1,000", pack_artifact.main, *command, 1000, code=1)
    assert artifact.read_bytes() == older, "an older artifact survives"
    artifact.unlink()
    before = (run_dir / "result.json").read_bytes()
    error = refused("are 1 over the cap", pack_artifact.main, *command, size - 1, code=1)
    assert not artifact.exists() and (run_dir / "result.json").read_bytes() == before and "weights 40,000" in error
    assert pack(run_dir, "--cap", str(size)) == 0 and artifact.stat().st_size == size
    assert sorted(p.name for p in run_dir.iterdir()) == ["artifact.pyz", "model.bin", "record.env", "result.json"]


def test_what_a_run_writes_meanwhile_is_not_lost(run_dir: Path, refused: Callable[..., str]) -> None:
    source = run_dir.parent / "stand_in.py"
    with train_gpt.locked(run_dir):
        refused("is in use by process", pack_artifact.main, "pack", run_dir, "--source", source)
    result = json.loads((run_dir / "result.json").read_text())
    (run_dir / "result.json").write_text(json.dumps(result | {"model_sha256": "of another file"}))
    refused("is not what the final score is of", pack_artifact.main, "pack", run_dir, "--source", source)


def test_an_artifact_may_lie_anywhere_and_have_any_name(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.model", "b.model"):
        (two / name).write_bytes(b"")
    monkeypatch.setenv("DATA_PATH", str(two))  # a tokenizer that is only counted is no matter
    out = tmp_path / "submission.bin"
    assert pack(run_dir, "--out", str(out)) == 0
    named = json.loads((run_dir / "result.json").read_text())["artifact"]
    assert (run_dir / named).resolve() == out.resolve()
    assert pack_artifact.read_any(out)[1:] == ((run_dir / "model.bin").read_bytes(), [out])
    assert pack(run_dir, "--format", "split") == 0
    assert set(pack_artifact.read_any(run_dir)[2]) == set((run_dir / "submission").iterdir())
    monkeypatch.chdir(run_dir)
    (run_dir / "result.json").write_text(json.dumps({"preset": "..", "stages": {"final": {"val_bpb": 1.0}}}))
    assert pack_artifact.main(["pack", ".", "--source", str(run_dir.parent / "stand_in.py")]) == 0
    assert pack_artifact.read_packed(run_dir / "artifact.pyz").preset == run_dir.name


def test_an_interrupt_is_one_line(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pack_artifact, "build", interrupted)
    assert pack(run_dir) == 130 and capsys.readouterr().err.startswith("error: interrupted")


def test_wrong_inputs_give_one_line_and_exit_code_2(
    run_dir: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main, broken, source = pack_artifact.main, run_dir.parent / "broken.py", run_dir.parent / "stand_in.py"
    for name, text, message in (
        *((name, None, name) for name in ("model.bin", "record.env", "result.json")),
        ("result.json", "{", "is not valid JSON"),
        ("result.json", "[1]", "holds a list, not an object"),
    ):
        (run_dir / name).rename(run_dir / "away")
        if text is not None:
            (run_dir / name).write_text(text)
        refused(message, main, "pack", run_dir, "--source", source)
        (run_dir / "away").rename(run_dir / name)
    broken.write_text("x = 1\ndef f(:\n")
    monkeypatch.delenv("DATA_PATH", raising=False)
    assert pack(run_dir) == 0
    whole, cut, corrupt = (run_dir / "artifact.pyz").read_bytes(), run_dir / "cut.pyz", run_dir / "corrupt.pyz"
    cut.write_bytes(whole[:-500])
    corrupt.write_bytes(whole[:9000] + bytes([whole[9000] ^ 4]) + whole[9001:])
    for message, *argv in (
        ("no run directory", "pack", run_dir / "nowhere", "--source", source),
        ("no source", "pack", run_dir, "--source", run_dir / "nowhere.py"),
        ("line 2 does not parse", "pack", run_dir, "--source", broken),
        ("--tokenizer-path", "pack", run_dir, "--source", source, "--tokenizer", "embed"),
        ("no file", "verify", run_dir / "nowhere.pyz"),
        ("not a one-file artifact", "verify", source),
        ("is what the artifact is made from", "pack", run_dir, "--source", source, "--out", run_dir / "model.bin"),
        ("is what the artifact is made from", "pack", run_dir, "--source", source, "--out", source),
        ("--prompt is not UTF-8", "sample", run_dir, "--prompt", "caf\udce9"),
        ("FILE and --run", "inspect"),
        ("--run", "inspect", source, "--probe"),
        ("truncated", "verify", cut),
        ("corrupted", "inspect", corrupt),
    ):
        refused(message, main, *argv)


# Run the artifact


def test_runs_alone_in_an_empty_directory_as_a_real_file(packed: Path, tmp_path: Path) -> None:
    shutil.copy(packed / "artifact.pyz", tmp_path / "entry.pyz")
    done = execute(["-u", "-X", "importtime", "entry.pyz", "--flag", "value"], tmp_path, packed)
    assert done.stderr.count("import time: self [us]") == 2, "the program runs with the interpreter's flags too"
    (found,) = seen(done.stdout)
    folder = Path(str(found["file"])).parent
    assert folder.name == "tiny" and folder.is_relative_to(tmp_path / "cache" / "train_gpt")
    assert found["argv"] == ["--flag", "value"] and found["stages"] == "eval" and found["preset"] == str(folder)
    assert found["model"] == str(folder / "model.bin") and found["TOKENIZER_PATH"] is None
    assert (folder / "model.bin").read_bytes() == (packed / "model.bin").read_bytes()
    assert (folder / "record.env").read_bytes() == (packed / "record.env").read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["model.bin", "record.env", "train_gpt.py"]
    # named after the artifact's content too: the next seed's has another folder
    (logs,) = (tmp_path / "logs").iterdir()
    assert re.fullmatch("entry_[0-9a-f]{8}_eval", logs.name)
    score = json.loads((logs / "result.json").read_text())
    assert score["val_bpb"] == json.loads((packed / "result.json").read_text())["val_bpb"]
    (folder / "train_gpt.py").write_text("print('edited')\n")
    assert seen(execute(["entry.pyz"], tmp_path, packed).stdout), "an edited copy in the cache is not what runs"


def test_environment_wins_where_it_may(packed: Path, tmp_path: Path) -> None:
    artifact = str(packed / "artifact.pyz")
    environ = {"STAGES": "quantize,eval", "ARTIFACT_DIR": "here", "PRESET": "elsewhere", "MODEL_PATH": "given"}
    shutil.copy(packed / "model.bin", tmp_path / "given")
    (found,) = seen(execute([artifact], tmp_path, packed, **environ).stdout)
    assert (tmp_path / "here" / "result.json").is_file()
    assert found["stages"] == "quantize,eval" and found["model"] == "given" and found["preset"] != "elsewhere"


def test_several_processes_extract_at_once(packed: Path, tmp_path: Path) -> None:
    shutil.copy(packed / "artifact.pyz", tmp_path)
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    found = seen(execute([*torchrun, "artifact.pyz"], tmp_path, packed).stdout)
    assert sorted(str(s["RANK"]) for s in found) == ["0", "1"] and {s["WORLD_SIZE"] for s in found} == {"2"}
    explain = functools.partial(execute, XDG_CACHE_HOME=str(tmp_path / "empty"))
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(explain, ["artifact.pyz", "--explain"], tmp_path, packed) for _ in range(8)]
        assert [each.result().stdout for each in waiting] == ["parameters 40000\n"] * 8
    assert len(list(tmp_path.glob("empty/train_gpt/*/tiny/*"))) == 3


def test_a_damaged_file_or_cache_is_one_line(packed: Path, tmp_path: Path) -> None:
    whole, bad = (packed / "artifact.pyz").read_bytes(), tmp_path / "bad.pyz"
    for keep in (0.9, 0.5, 0.01):
        bad.write_bytes(whole[: int(len(whole) * keep)])
        done = execute(["bad.pyz"], tmp_path, packed, check=None)
        assert done.returncode != 0 and "error-artifact-truncated" in done.stderr, keep
        assert "Traceback" not in done.stderr
    for at in (40, 70, 75, 200, 20_000):
        bad.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        assert "corrupted" in one_line(execute(["bad.pyz"], tmp_path, packed, check=2).stderr), at
    bad.write_bytes(whole[:9000] + whole[9100:])
    assert "truncated" in execute(["bad.pyz"], tmp_path, packed, check=None).stderr
    assert not (tmp_path / "cache").exists()
    (tmp_path / "file").write_text("")
    environ = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    one_line(execute([str(packed / "artifact.pyz")], tmp_path, packed, check=2, **environ).stderr)


def test_every_bootstrap_runs(run_dir: Path, tmp_path: Path) -> None:
    weights, config = (run_dir / "model.bin").read_bytes(), (run_dir / "record.env").read_bytes()
    source = pack_artifact.minify(STAND_IN).encode()
    for split, tokenizer in ((False, b""), (False, b"pieces " * 50), (True, b""), (True, b"pieces " * 50)):
        payload = Payload("tiny", config, source, tokenizer, weights)
        room = tmp_path / f"room {split} {bool(tokenizer)}"
        room.mkdir()
        for name, data in pack_artifact.build(payload, split).items():
            (room / (name or "one.pyz")).write_bytes(data)
        script = "train_gpt.py" if split else "one.pyz"
        assert pack_artifact.read_packed(room / script) == payload
        where = seen(execute([script], room, run_dir).stdout)[0]["TOKENIZER_PATH"]
        assert (where is None) if not tokenizer else Path(str(where)).read_bytes() == tokenizer, (split, tokenizer)


def test_split_form_counts_both_files_and_checks_the_model(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "submission"
    assert pack(run_dir, "--format", "split", "--out", str(out)) == 0
    assert sorted(p.name for p in out.iterdir()) == ["model.bin", "train_gpt.py"]
    assert (out / "model.bin").read_bytes() == (run_dir / "model.bin").read_bytes()
    text = (out / "train_gpt.py").read_text()
    assert text.isascii()
    result = json.loads((run_dir / "result.json").read_text())
    assert result["bytes_total"] == sum(p.stat().st_size for p in out.iterdir())
    (out / "train_gpt.py").write_text(text[:-40])
    assert "corrupted" in execute([str(out / "train_gpt.py")], tmp_path, run_dir, check=2).stderr
    (out / "train_gpt.py").write_text(text)
    (out / "model.bin").write_bytes((run_dir / "model.bin").read_bytes()[:-1])
    assert "truncated" in execute([str(out / "train_gpt.py")], tmp_path, run_dir, check=2).stderr
    assert pack_artifact.main(["inspect", str(out)]) == 2


# Verify


def verify(run: Path, *options: str) -> int:
    where = ["--data", str(run.parent / "data"), "--source", str(run.parent / "stand_in.py")]
    return pack_artifact.main(["verify", str(run / "artifact.pyz"), *where, *options])


def test_verify_equals_the_run_in_isolation(
    packed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("PYTHONPATH", str(ROOT)), ("LEAKED_KNOB", "1"), ("SCALE", "5.0")):
        monkeypatch.setenv(name, value)
    assert verify(packed, "--run", str(packed)) == 0
    out = capfd.readouterr().out
    (found,) = seen(out)
    assert found["PYTHONPATH"] is None and found["LEAKED_KNOB"] is None
    checks = "model.bin,decoded weights,val_bpb,val_loss".split(",")
    assert last_line(out)["equal"] is True and set(last_line(out)["checks"]) >= {*checks}
    assert not Path(str(found["file"])).exists()
    assert verify(packed) == 0, "without a run it only prints the score"
    report = last_line(capfd.readouterr().out)
    assert report["equal"] is None and report["val_bpb"] == json.loads((packed / "result.json").read_text())["val_bpb"]


def test_verify_reports_another_score_other_weights_and_a_failure(
    run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pack(run_dir) == 0
    result = json.loads((run_dir / "result.json").read_text())
    (run_dir / "result.json").write_text(json.dumps(result | {"val_bpb": result["val_bpb"] + 1e-12}))
    weights = bytearray((run_dir / "model.bin").read_bytes())
    weights[100] ^= 1
    (run_dir / "model.bin").write_bytes(weights)
    assert verify(run_dir, "--run", str(run_dir)) == 1
    out, err = capfd.readouterr()
    wrong = {k for k, ok in last_line(out)["checks"].items() if not ok}
    assert wrong == {"decoded weights", "model.bin", "val_bpb"}
    assert "difference -1.0" in out and "error: the artifact is not the run" in err
    (tmp_path / "empty").mkdir()
    assert pack_artifact.main(["verify", str(run_dir / "artifact.pyz"), "--data", str(tmp_path / "empty")]) == 1
    assert "does not run from an empty directory" in capfd.readouterr().err


# The real program


@pytest.fixture(scope="module")
def small_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train_gpt.py as it is packed."""
    path = tmp_path_factory.mktemp("small") / "train_gpt.py"
    path.write_text(pack_artifact.minify(PROGRAM.read_text()))
    return path


def test_the_program_shrinks_and_explains_every_record_as_before(small_program: Path) -> None:
    small, plain = small_program.read_text(), PROGRAM.read_text()
    sections = pack_artifact.cut_sections(small, plain)
    assert len(sections) == 16 and all(s.minified for s in sections), [s.title for s in sections if not s.minified]
    assert "".join(s.minified for s in sections) == small and len(small) < 0.56 * len(plain)
    program = pack_artifact.load_program(small_program)
    assert program.help_text() == pack_artifact.NO_MANUAL and program.RENAMED == {} != train_gpt.RENAMED
    for record in PRESETS:
        environ = {"PRESET": str(record)}
        assert program.explain(*program.resolve(environ)) == train_gpt.explain(*train_gpt.resolve(environ)), record.name
    wrong, said = {"EVAL": "none_such", "NUM_LAYERS": "-1", "MATRIX_LRR": "1", "TTT_LORA_RANK": "x"}, []
    for each in (program, train_gpt):
        with pytest.raises(each.UserError) as refused:
            each.resolve(wrong)
        said.append(str(refused.value))
    assert said[0] == said[1] and all(name in said[0] for name in wrong)


def test_the_packed_program_trains_quantises_and_scores_as_the_plain_one(
    small_program: Path, tiny_data: Path, tmp_path: Path
) -> None:
    programs, runs = {"plain": train_gpt, "small": pack_artifact.load_program(small_program)}, []
    for name, program in programs.items():
        knobs = {"ITERATIONS": 3, "WARMUP_STEPS": 0, "REPAIR": "lqer"}
        runs.append(call(environment(tiny_data, tmp_path / name, **knobs), tmp_path / name, main=program.main))
        assert runs[-1].code == 0, runs[-1].err
    plain, small = runs
    assert (small.folder / "model.bin").read_bytes() == (plain.folder / "model.bin").read_bytes()
    assert all(small.result[key] == plain.result[key] for key in SCORES)


def test_copies_of_the_program_have_operators_of_their_own(small_program: Path) -> None:
    """Under one name torch frees the older operator, whose handle then points nowhere: wrong results, or a crash."""
    z, targets = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 0, 7])
    copies = [pack_artifact.load_program(path) for path in (PROGRAM, small_program)]
    assert len({str(copy.softcap_ce._opoverload) for copy in copies}) == 2
    first, second = (copy.fused_cross_entropy(z, targets, 30.0) for copy in copies)
    assert torch.equal(first, second)
    (small_program.parent / "broken.py").write_text("import no_such_module\n")
    for name, message in (("nowhere.py", "no program"), ("broken.py", "cannot be imported")):
        with pytest.raises(train_gpt.UserError, match=message):
            pack_artifact.load_program(small_program.parent / name)
