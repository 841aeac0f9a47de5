"""Packing: the container, the self-extracting file, its counting, its failures, and `verify`.

Most tests pack a small stand-in program with the interface of train_gpt.py, which starts in a tenth of a second; the
last ones minify and pack the real one.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pack_artifact
from pack_artifact import ALL_CODECS, BROTLI_CODEC, LZMA_CODECS, MAGIC, Parts

ROOT = Path(__file__).resolve().parent.parent
REAL_SOURCE = ROOT / "train_gpt.py"

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
    facts = {k: os.environ.get(k) for k in ("RANK", "WORLD_SIZE", "PYTHONPATH", "LEAKED_KNOB", "TOKENIZER_PATH")}
    facts |= {"file": __file__, "argv": argv, "stages": cfg.stages, "model": cfg.model_path, "preset": cfg.preset}
    print("FACTS " + json.dumps(facts), flush=True)
    if os.environ.get("RANK", "0") == "0":
        Path(cfg.artifact_dir).mkdir(parents=True, exist_ok=True)
        result = {"val_loss": loss, "val_bpb": loss / 2, "tokens_scored": len(data), "bytes_scored": int(data.sum())}
        (Path(cfg.artifact_dir) / "result.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
'''


def make_run(root: Path) -> Path:
    """A run directory, its data, its tokenizer and its source under `root`."""
    run, data = root / "run", root / "data"
    run.mkdir(parents=True)
    data.mkdir()
    (root / "stand_in.py").write_text(STAND_IN)
    (data / "val.bin").write_bytes(bytes(range(1, 200)))
    (data / "tiny.model").write_bytes(b"pieces " * 300)
    (run / "model.bin").write_bytes(np.random.default_rng(7).integers(0, 256, 40_000, np.uint8).tobytes())
    (run / "record.env").write_text("SCALE=0.37  # a reason\n")
    env = {"PATH": os.environ["PATH"], "PRESET": str(run), "DATA_PATH": str(data), "ARTIFACT_DIR": str(run)}
    command = [sys.executable, str(root / "stand_in.py")]
    subprocess.run(command, env=env | {"MODEL_PATH": str(run / "model.bin")}, check=True, capture_output=True)
    result = json.loads((run / "result.json").read_text())
    result |= {"preset": "records/tiny", "bytes_code": 1, "bytes_total": 2, "stages": {"final": {"val_bpb": 1.0}}}
    (run / "result.json").write_text(json.dumps(result))
    return run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed run that tests only read; the artifact is RUN_DIR/artifact.pyz."""
    run = make_run(tmp_path_factory.mktemp("packed"))
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


def facts(done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    return [json.loads(line.split("FACTS ", 1)[1]) for line in done.stdout.splitlines() if "FACTS " in line]


# ---------------------------------------------------------------------------------------------- container and codecs

parts_strategy = st.builds(
    Parts,
    preset=st.from_regex(r"[a-z0-9_.-]{1,20}", fullmatch=True),
    config=st.binary(max_size=200).map(lambda b: b.replace(b"\0", b"")),
    source=st.binary(max_size=2000).map(lambda b: b.replace(b"\0", b"")),
    tokenizer=st.binary(max_size=300),
    weights=st.binary(max_size=500),
)


@settings(max_examples=60, deadline=None)
@given(parts=parts_strategy, codec=st.sampled_from(ALL_CODECS), tail=st.binary(max_size=40))
def test_container_round_trip_ignores_what_follows(parts: Parts, codec: int, tail: bytes) -> None:
    blob = pack_artifact.encode_container(parts, codec)
    assert pack_artifact.decode_container(blob + tail) == parts


@settings(max_examples=60, deadline=None)
@given(parts=parts_strategy, codec=st.sampled_from((BROTLI_CODEC, LZMA_CODECS[3])), data=st.data())
def test_container_refuses_every_flip_and_cut(parts: Parts, codec: int, data: st.DataObject) -> None:
    blob = pack_artifact.encode_container(parts, codec)
    at = data.draw(st.integers(0, len(blob) - 1))
    flipped = blob[:at] + bytes([blob[at] ^ 1 << data.draw(st.integers(0, 7))]) + blob[at + 1 :]
    for damaged in (flipped, blob[:at]):
        with pytest.raises(pack_artifact.UserError, match=r"truncated|corrupted"):
            pack_artifact.decode_container(damaged)


@pytest.mark.parametrize("codec", ALL_CODECS)
def test_every_codec_round_trips_text(codec: int) -> None:
    data = STAND_IN.encode() * 3
    assert pack_artifact.decompress(pack_artifact.compress(data, codec), codec) == data


def test_container_refuses_nul() -> None:
    with pytest.raises(pack_artifact.UserError, match="NUL"):
        pack_artifact.encode_container(Parts("p", b"", b"a\0b", b"", b""), BROTLI_CODEC)


# --------------------------------------------------------------------------------------------------- minifier, sections


def test_annotations_go_where_nobody_reads_them_and_stay_where_somebody_does() -> None:
    source = (
        "from dataclasses import dataclass\nimport torch\nimport triton\nimport triton.language as tl\n"
        "@dataclass\nclass C:\n    'doc'\n    x: int = 1\n"
        "    def m(self, a: int) -> int:\n        b: int = a\n        return b\n"
        "@triton.jit\ndef kernel(p, BLOCK: tl.constexpr):\n    k: tl.constexpr = 2\n    return k\n"
        "@torch.library.custom_op('n::op', mutates_args=())\ndef op(v: torch.Tensor) -> torch.Tensor:\n    return v\n"
        "def late(v: torch.Tensor) -> torch.Tensor:\n    return v\nlate_op = torch.library.custom_op('n::l', late)\n"
        "@torch.no_grad()\ndef plain(v: torch.Tensor, *r: int, key: str = '') -> int:\n    count: int\n    return v\n"
    )
    small = pack_artifact.minify(source)
    for kept in (
        "x:int=1",
        "BLOCK:tl.constexpr",
        ":tl.constexpr=2",
        "op(v:torch.Tensor)->torch.Tensor",
        "late(v:torch.Tensor)->torch.Tensor",
    ):
        assert kept in small, kept
    for dropped in ("a:int", "r:int", "key:str", "doc"):
        assert dropped not in small, dropped
    assert "plain(v" in small


def test_strings_that_repeat_are_not_hoisted_to_globals() -> None:
    small = pack_artifact.minify("def f(d):\n    return d['a long repeated key'], d['a long repeated key'], None\n")
    names = [node for node in ast.parse(small).body if not isinstance(node, ast.FunctionDef)]
    assert small.count("a long repeated key") == 2 and not names


def test_sections_join_to_the_minified_source_and_keep_their_order() -> None:
    sections = pack_artifact.minify_sections(STAND_IN)
    assert [s.title for s in sections] == ["(before the first banner)", "01 IMPORTS", "02 CONFIG", "03 EVALUATION"]
    assert "".join(s.raw for s in sections) == STAND_IN
    joined = "".join(s.minified for s in sections)
    assert "__section__" not in joined
    assert ast.dump(ast.parse(joined)) == ast.dump(ast.parse(pack_artifact.minify(STAND_IN)))
    assert "class Config" in sections[2].minified and "load_artifact" in sections[3].minified


def test_a_docstring_that_the_program_prints_survives() -> None:
    for head in ("", "from __future__ import annotations\n"):
        small = pack_artifact.minify(f'"""Manual."""\n{head}def f():\n    """Gone."""\n    return __doc__\n')
        space: dict[str, object] = {}
        exec(compile(small, "small", "exec"), space)
        assert space["f"]() == "Manual." and "Gone" not in small


def test_a_banner_inside_a_string_is_no_section() -> None:
    text = 'x = """\n# +---+\n# | no |\n# +---+\n"""\n# +---+\n# | yes |\n# +---+\ny = x\n'
    assert [s.title for s in pack_artifact.minify_sections(text)] == ["(before the first banner)", "yes"]


# ----------------------------------------------------------------------------------------------------- pack and count


def test_same_input_gives_the_same_bytes(run_dir: Path) -> None:
    command = ["pack", str(run_dir), "--source", str(run_dir.parent / "stand_in.py"), "--out"]
    for name, seed in (("a.pyz", "1"), ("b.pyz", "77")):
        environ = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        execute(["-m", "pack_artifact", *command, str(run_dir / name)], run_dir, run_dir, **environ)
    assert (run_dir / "a.pyz").read_bytes() == (run_dir / "b.pyz").read_bytes()


def test_counts_are_those_of_the_disk(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(run_dir) == 0
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1].removeprefix("PACK "))
    size, weights = (run_dir / "artifact.pyz").stat().st_size, (run_dir / "model.bin").stat().st_size
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
    assert result["artifact_sha256"] == hashlib.sha256((run_dir / "artifact.pyz").read_bytes()).hexdigest()


def test_the_weights_lie_in_the_file_as_they_are_and_the_tail_is_a_plain_zip(packed: Path) -> None:
    data = (packed / "artifact.pyz").read_bytes()
    assert data.startswith(MAGIC) and (packed / "model.bin").read_bytes() in data
    with zipfile.ZipFile(packed / "artifact.pyz") as archive:
        assert archive.namelist() == ["__main__.py"] and archive.testzip() is None


def test_cap_is_exact_and_over_it_nothing_is_written(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(run_dir) == 0
    artifact = run_dir / "artifact.pyz"
    size = artifact.stat().st_size
    artifact.unlink()
    before = (run_dir / "result.json").read_bytes()
    capsys.readouterr()
    assert pack(run_dir, "--cap", str(size - 1)) == 1
    captured = capsys.readouterr()
    assert not artifact.exists() and (run_dir / "result.json").read_bytes() == before
    assert "are 1 over the cap" in captured.err and "weights 40,000" in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert pack(run_dir, "--cap", str(size)) == 0 and artifact.stat().st_size == size
    assert sorted(p.name for p in run_dir.iterdir()) == ["artifact.pyz", "model.bin", "record.env", "result.json"]


def test_over_the_cap_an_older_artifact_survives(run_dir: Path) -> None:
    assert pack(run_dir) == 0
    older = (run_dir / "artifact.pyz").read_bytes()
    assert pack(run_dir, "--cap", "1000") == 1
    assert (run_dir / "artifact.pyz").read_bytes() == older


def test_wrong_inputs_give_one_line_and_exit_code_2(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = run_dir.parent / "stand_in.py"

    def refused(*argv: str) -> str:
        assert pack_artifact.main(list(argv)) == 2
        err = capsys.readouterr().err.strip()
        assert err.startswith("error: ") and "\n" not in err
        return err

    assert "no run directory" in refused("pack", str(run_dir / "nowhere"), "--source", str(source))
    assert "no source" in refused("pack", str(run_dir), "--source", str(run_dir / "nowhere.py"))
    for name in ("model.bin", "record.env", "result.json"):
        (run_dir / name).rename(run_dir / "away")
        assert name in refused("pack", str(run_dir), "--source", str(source))
        (run_dir / "away").rename(run_dir / name)
    broken = run_dir.parent / "broken.py"
    broken.write_text("x = 1\ndef f(:\n")
    assert "line 2 does not parse" in refused("pack", str(run_dir), "--source", str(broken))
    assert "--tokenizer-path" in refused("pack", str(run_dir), "--source", str(source), "--tokenizer", "embed")
    assert "no file" in refused("verify", str(run_dir / "nowhere.pyz"))
    assert "not a one-file artifact" in refused("verify", str(source))
    assert pack(run_dir) == 0
    whole = (run_dir / "artifact.pyz").read_bytes()
    cut = run_dir / "cut.pyz"
    cut.write_bytes(whole[:-500])
    capsys.readouterr()
    assert "truncated" in refused("verify", str(cut))
    cut.write_bytes(whole[:9000] + bytes([whole[9000] ^ 4]) + whole[9001:])
    assert "corrupted" in refused("inspect", str(cut))


# --------------------------------------------------------------------------------------------------- run the artifact


def test_runs_alone_in_an_empty_directory_as_a_real_file(packed: Path, tmp_path: Path) -> None:
    shutil.copy(packed / "artifact.pyz", tmp_path / "entry.pyz")
    done = execute(["entry.pyz", "--flag", "value"], tmp_path, packed)
    seen = facts(done)[0]
    folder = Path(str(seen["file"])).parent
    assert folder.name == "tiny" and folder.is_relative_to(tmp_path / "cache" / "train_gpt")
    assert seen["argv"] == ["--flag", "value"] and seen["stages"] == "eval" and seen["preset"] == str(folder)
    assert seen["model"] == str(folder / "model.bin") and seen["TOKENIZER_PATH"] is None
    assert (folder / "model.bin").read_bytes() == (packed / "model.bin").read_bytes()
    assert (folder / "record.env").read_bytes() == (packed / "record.env").read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["model.bin", "record.env", "train_gpt.py"]
    score = json.loads((tmp_path / "logs" / "entry_eval" / "result.json").read_text())
    assert score["val_bpb"] == json.loads((packed / "result.json").read_text())["val_bpb"]


def test_environment_wins_where_it_may(packed: Path, tmp_path: Path) -> None:
    artifact = str(packed / "artifact.pyz")
    environ = {"STAGES": "quantize,eval", "ARTIFACT_DIR": "here", "PRESET": "elsewhere", "MODEL_PATH": "given"}
    shutil.copy(packed / "model.bin", tmp_path / "given")
    seen = facts(execute([artifact], tmp_path, packed, **environ))[0]
    assert (tmp_path / "here" / "result.json").is_file()
    assert seen["stages"] == "quantize,eval" and seen["model"] == "given" and seen["preset"] != "elsewhere"


def test_an_edited_copy_in_the_cache_is_not_what_runs(packed: Path, tmp_path: Path) -> None:
    artifact = str(packed / "artifact.pyz")
    script = Path(str(facts(execute([artifact], tmp_path, packed))[0]["file"]))
    script.write_text("print('edited')\n")
    assert facts(execute([artifact], tmp_path, packed))


def test_interpreter_flags_are_kept(packed: Path, tmp_path: Path) -> None:
    done = execute(["-u", "-X", "importtime", str(packed / "artifact.pyz")], tmp_path, packed)
    assert done.stderr.count("import time: self [us]") == 2


def test_runs_under_torchrun(packed: Path, tmp_path: Path) -> None:
    shutil.copy(packed / "artifact.pyz", tmp_path)
    done = execute(["-m", "torch.distributed.run", "--nproc_per_node=2", "artifact.pyz"], tmp_path, packed)
    seen = facts(done)
    assert sorted(str(s["RANK"]) for s in seen) == ["0", "1"] and {s["WORLD_SIZE"] for s in seen} == {"2"}


def test_eight_processes_extract_at_once(packed: Path, tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(tmp_path), "DATA_PATH": str(packed.parent / "data")}
    command = [sys.executable, str(packed / "artifact.pyz"), "--explain"]
    children = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    outputs = [child.communicate()[0] for child in children]
    assert outputs == ["parameters 40000\n"] * 8 and not any(child.returncode for child in children)
    assert len(list(tmp_path.glob("train_gpt/*/tiny/*"))) == 3


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.01])
def test_truncated_file_says_so(packed: Path, tmp_path: Path, keep: float) -> None:
    whole = (packed / "artifact.pyz").read_bytes()
    (tmp_path / "cut.pyz").write_bytes(whole[: int(len(whole) * keep)])
    done = execute(["cut.pyz"], tmp_path, packed, check=None)
    assert done.returncode != 0 and "error-artifact-truncated" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("at", [40, 70, 76, 200, 20_000])
def test_flipped_byte_is_refused(packed: Path, tmp_path: Path, at: int) -> None:
    data = bytearray((packed / "artifact.pyz").read_bytes())
    data[at] ^= 16
    (tmp_path / "bad.pyz").write_bytes(data)
    done = execute(["bad.pyz"], tmp_path, packed, check=2)
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1
    assert "corrupted" in done.stderr and not (tmp_path / "cache").exists()


def test_bytes_lost_from_the_middle_are_noticed(packed: Path, tmp_path: Path) -> None:
    data = (packed / "artifact.pyz").read_bytes()
    (tmp_path / "bad.pyz").write_bytes(data[:9000] + data[9100:])
    assert "truncated" in execute(["bad.pyz"], tmp_path, packed, check=None).stderr


def test_unwritable_cache_is_one_line(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environ = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    done = execute([str(packed / "artifact.pyz")], tmp_path, packed, check=2, **environ)
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("codec", [BROTLI_CODEC, LZMA_CODECS[8]])
@pytest.mark.parametrize("tokenizer", [b"", b"pieces " * 50])
@pytest.mark.parametrize("split", [False, True])
def test_every_bootstrap_runs(run_dir: Path, tmp_path: Path, codec: int, tokenizer: bytes, split: bool) -> None:
    weights = (run_dir / "model.bin").read_bytes()
    source = pack_artifact.minify(STAND_IN).encode()
    parts = Parts("tiny", (run_dir / "record.env").read_bytes(), source, tokenizer, weights)
    room = tmp_path / "room"
    room.mkdir()
    for name, data in pack_artifact.build(parts, codec, split).items():
        (room / (name or "one.pyz")).write_bytes(data)
    script = "train_gpt.py" if split else "one.pyz"
    assert pack_artifact.read_artifact(room / script) == parts
    seen = facts(execute([script], room, run_dir))[0]
    where = seen["TOKENIZER_PATH"]
    assert (where is None) if not tokenizer else Path(str(where)).read_bytes() == tokenizer


def test_split_form_counts_both_files_and_checks_the_model(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "submission"
    assert pack(run_dir, "--format", "split", "--out", str(out)) == 0
    assert sorted(p.name for p in out.iterdir()) == ["model.bin", "train_gpt.py"]
    assert (out / "model.bin").read_bytes() == (run_dir / "model.bin").read_bytes()
    assert (out / "train_gpt.py").read_text().isascii()
    result = json.loads((run_dir / "result.json").read_text())
    assert result["bytes_total"] == sum(p.stat().st_size for p in out.iterdir())
    execute([str(out / "train_gpt.py")], tmp_path, run_dir)
    text = (out / "train_gpt.py").read_text()
    (out / "train_gpt.py").write_text(text[:-40])
    assert "corrupted" in execute([str(out / "train_gpt.py")], tmp_path, run_dir, check=2).stderr
    (out / "train_gpt.py").write_text(text)
    (out / "model.bin").write_bytes((run_dir / "model.bin").read_bytes()[:-1])
    assert "truncated" in execute([str(out / "train_gpt.py")], tmp_path, run_dir, check=2).stderr
    assert pack_artifact.main(["inspect", str(out)]) == 2


def test_embedded_tokenizer_is_counted(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(run_dir) == 0
    without = (run_dir / "artifact.pyz").stat().st_size
    model = str(run_dir.parent / "data" / "tiny.model")
    assert pack(run_dir, "--tokenizer", "embed", "--tokenizer-path", model) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("PACK "))
    assert report["parts"]["tokenizer"] > 0
    assert report["bytes_total"] >= without + report["parts"]["tokenizer"]


# -------------------------------------------------------------------------------------------------------------- verify


def verify(run: Path, *options: str) -> int:
    return pack_artifact.main(
        [
            "verify",
            str(run / "artifact.pyz"),
            "--data",
            str(run.parent / "data"),
            "--source",
            str(run.parent / "stand_in.py"),
            *options,
        ]
    )


def test_verify_equals_the_run_in_isolation(
    packed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("LEAKED_KNOB", "1")
    monkeypatch.setenv("SCALE", "5.0")
    assert verify(packed, "--run", str(packed)) == 0
    out = capfd.readouterr().out
    seen = json.loads(next(line for line in out.splitlines() if line.startswith("FACTS ")).removeprefix("FACTS "))
    assert seen["PYTHONPATH"] is None and seen["LEAKED_KNOB"] is None
    report = json.loads(out.splitlines()[-1].removeprefix("VERIFY "))
    assert report["equal"] is True and set(report["checks"]) >= {"model.bin", "decoded weights", "val_bpb", "val_loss"}
    assert not Path(str(seen["file"])).exists()


def test_verify_reports_another_score_and_other_weights(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pack(run_dir) == 0
    result = json.loads((run_dir / "result.json").read_text())
    (run_dir / "result.json").write_text(json.dumps(result | {"val_bpb": result["val_bpb"] + 1e-12}))
    weights = bytearray((run_dir / "model.bin").read_bytes())
    weights[100] ^= 1
    (run_dir / "model.bin").write_bytes(weights)
    assert verify(run_dir, "--run", str(run_dir)) == 1
    captured = capfd.readouterr()
    checks = json.loads(captured.out.splitlines()[-1].removeprefix("VERIFY "))["checks"]
    wrong = sorted(k for k, ok in checks.items() if not ok)
    assert wrong == ["decoded weights", "model.bin", "val_bpb"]
    assert "difference -1.0" in captured.out and "error: the artifact is not the run" in captured.err


def test_verify_without_a_run_prints_the_score(packed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert verify(packed) == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1].removeprefix("VERIFY "))
    assert report["equal"] is None and report["val_bpb"] == json.loads((packed / "result.json").read_text())["val_bpb"]


def test_verify_of_an_artifact_that_fails_exits_1(
    packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pack_artifact.main(["verify", str(packed / "artifact.pyz"), "--data", str(tmp_path)]) == 1
    assert "does not run from an empty directory" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------------ the real source


@pytest.fixture(scope="module")
def real_sections() -> list[pack_artifact.Section]:
    return pack_artifact.minify_sections(REAL_SOURCE.read_text(), "train_gpt.py")


def test_real_source_has_sections_and_shrinks(real_sections: list[pack_artifact.Section]) -> None:
    assert len(real_sections) > 8
    assert sum(len(s.minified) for s in real_sections) < 0.75 * sum(len(s.raw) for s in real_sections)


def test_real_source_explains_and_helps_as_before(real_sections: list[pack_artifact.Section], tmp_path: Path) -> None:
    small = tmp_path / "train_gpt.py"
    small.write_text("".join(s.minified for s in real_sections))
    (tmp_path / "record.env").write_text("SEED=7\nITERATIONS=10\n")
    for option in ("--explain", "--help"):
        command = [str(REAL_SOURCE), option], [str(small), option]
        plain, packed_ = (execute(c, tmp_path, tmp_path, PRESET=str(tmp_path)).stdout for c in command)
        same = [line for line in plain.splitlines() if "sha256" not in line.lower()]
        assert same == [line for line in packed_.splitlines() if "sha256" not in line.lower()] and len(same) > 5


def test_header_layout_is_the_documented_one() -> None:
    blob = pack_artifact.encode_container(Parts("p", b"c", b"s", b"t", b"weights"), BROTLI_CODEC)
    codec, n_code, n_tokenizer, n_weights = struct.unpack_from("<B3I", blob, 32)
    assert (codec, n_weights) == (255, 7) and len(blob) == 45 + n_code + n_tokenizer + 7
    assert hashlib.sha256(blob[32:]).digest() == blob[:32] and blob.endswith(b"weights")


def test_copies_of_the_program_have_operators_of_their_own() -> None:
    """Under one name torch frees the older operator, whose handle then points nowhere: wrong results, or a crash."""
    z, targets = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 0, 7])
    copies = [pack_artifact.load_program(ROOT / "train_gpt.py") for _ in range(2)]
    assert len({str(copy.softcap_ce._opoverload) for copy in copies}) == 2
    first, second = (copy.fused_cross_entropy(z, targets, 30.0) for copy in copies)
    assert torch.equal(first, second)
