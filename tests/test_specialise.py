"""Specialisation: what goes, what must stay, that the program proves itself, and that a wrong one is not written."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pack_artifact
import train_gpt
from pack_artifact import Dropped, Facts

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "train_gpt.py"
RECORDS = sorted(path.parent for path in (ROOT / "records").glob("**/record.env") if path.parent.name != "run")

SMALL = '''"""Manual."""
from __future__ import annotations
import dataclasses
import json
import math, re as regex

def knob(default, doc="", group="", ge=None, le=None, choices=(), when=""):
    return default

@dataclasses.dataclass(frozen=True)
class Config:
    mode: str = knob("a", "which", "g", choices=("a", "b"))
    flag: bool = knob(False, "whether", "g")
    loud: bool = knob(False, "whether it is replaced", "g")
    extras: tuple = knob((), "some", "g", choices=("x", "y"))
    size: int = knob(3, "how many", "g", ge=1)
    where: str = knob("here", "free", "g", choices=("here", "there"))

def of_a(cfg: Config): return "A" + pick("first")(cfg)
def of_b(cfg: Config): return regex.sub("a", "b", "only b")
def first(cfg): return "1"
def second(cfg): return "2" + json.dumps(1)
def extra_x(): return "x"
def extra_y(): return "y"
MODES = {"a": of_a, "b": of_b}
STEPS = {"first": first, "second": second}
ITERATED = {"p": 1, "q": 2}
EXTRAS = {"x": extra_x, "y": extra_y}

def pick(name): return STEPS[name]

class Helper:
    def used(self): return 1
    def unused(self): return math.pi

def main(argv):
    cfg = Config()
    out = MODES[cfg.mode](cfg) + str(sum(ITERATED.values())) + "".join(EXTRAS[name]() for name in cfg.extras)
    if cfg.flag and argv:
        out += second(cfg)
    else:
        out += "off"
    for _ in range(1):
        if cfg.flag:
            out += "never"
    if cfg.loud:
        out += "loud"
    dataclasses.replace(cfg, loud=True)
    return out + (of_b(cfg) if cfg.mode == "b" else "") + str(Helper().used()) + ("big" if cfg.size > 2 else "small")
'''


def small_facts(**values: object) -> Facts:
    knobs: dict[str, object] = {"mode": "a", "flag": False, "loud": False, "extras": (), "size": 3, "where": "here"}
    choices = {"mode": ("a", "b"), "extras": ("x", "y"), "where": ("here", "there")}
    empty: dict[str, tuple[str, ...]] = dict.fromkeys(knobs, ())
    return Facts(knobs | values, frozenset({"where"}), empty | choices, frozenset())


def run_main(source: str) -> str:
    space: dict[str, object] = {"__name__": "small"}
    module = type(sys)("small")
    sys.modules["small"] = module
    exec(compile(source, "small", "exec"), space)
    return space["main"]([1])


def specialised(facts: Facts, source: str = SMALL) -> tuple[str, Dropped]:
    dropped = Dropped()
    return pack_artifact.minify(source, "small", facts, dropped), dropped


def test_what_nothing_selects_goes_and_the_rest_stays() -> None:
    small, dropped = specialised(small_facts())
    assert run_main(small) == run_main(pack_artifact.minify(SMALL)) == "A13off1big"
    assert set(dropped.entries) == {("MODES", "b"), ("EXTRAS", "x"), ("EXTRAS", "y"), ("STEPS", "second")}
    for gone in ("of_b", "second", "json", "re as regex", "extra_x", "unused", "math", "Manual", "whether", "never"):
        assert gone not in small, gone
    for kept in ("'p':1,'q':2", "loud", "def used"):
        assert kept in small, kept
    assert ".size>2" in small, "numbers stay knobs"


def test_knobs_that_a_decision_rests_on_accept_their_value_only() -> None:
    small, dropped = specialised(small_facts(extras=("x",)))
    assert dropped.frozen == {"mode", "flag"}
    knobs = {n.target.id: ast.unparse(n.value) for n in ast.walk(ast.parse(small)) if isinstance(n, ast.AnnAssign)}
    assert knobs["mode"] == "knob('a', '', '', choices=('a',))"
    assert knobs["flag"] == "knob(False, '', '', ge=0, le=0)"
    assert knobs["extras"] == "knob((), '', '', choices=('x',))"
    assert knobs["size"] == "knob(3, '', '', ge=1)" and knobs["where"].endswith("choices=('here', 'there'))")


def test_a_word_of_the_artifact_or_of_the_program_keeps_its_entry() -> None:
    facts = dataclasses.replace(small_facts(), words=frozenset({"second", "b"}))
    small, dropped = specialised(facts)
    assert not {("STEPS", "second"), ("MODES", "b")} & set(dropped.entries) and "of_b" in small
    _, dropped = specialised(small_facts(), SMALL.replace('"off"', '"the second"'))
    assert ("STEPS", "second") not in dropped.entries


def test_a_key_that_goes_from_one_table_stays_a_value_of_other_knobs() -> None:
    source = SMALL.replace("STEPS = {", 'OTHER = {"b": first, "c": second}\nSTEPS = {').replace(
        "    cfg = Config()", "    cfg = Config()\n    OTHER[cfg.third]"
    )
    source = source.replace("    size: int", '    third: str = knob("b", "", "", choices=("b", "c"))\n    size: int')
    facts = small_facts(third="b")
    small, dropped = specialised(dataclasses.replace(facts, choices=facts.choices | {"third": ("b", "c")}), source)
    assert ("MODES", "b") in dropped.entries and "third:str=knob('b','','',choices=('b',))" in small


def test_another_config_beside_the_first_keeps_its_branches() -> None:
    assert "'loud'" in specialised(small_facts())[0]
    source = SMALL.replace("def main(argv):", "def other(cfg: str): return cfg.flag\n\ndef main(argv):")
    with pytest.raises(pack_artifact.UserError, match="a parameter called cfg that is no Config"):
        specialised(small_facts(), source)


def test_a_program_without_knobs_is_refused() -> None:
    with pytest.raises(pack_artifact.UserError, match="class Config of knob"):
        specialised(small_facts(), "def main(): pass\n")


# The real program


def facts_of(record: Path, eval_only: bool = False) -> Facts:
    cfg = train_gpt.load_config({"PRESET": str(record)})
    fields = dataclasses.fields(cfg)
    values, choices = {f.name: getattr(cfg, f.name) for f in fields}, {f.name: f.metadata["choices"] for f in fields}
    words = frozenset(("gptq", "lqer", "fp16", "int8_row"))
    return Facts(values, frozenset(train_gpt.LOCAL_KNOBS), choices, words, eval_only)


def child(source: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    knobs = {f.upper() for f in train_gpt.Config.__dataclass_fields__} | {"PRESET"}
    env = {k: v for k, v in os.environ.items() if k not in knobs} | environ
    command = [sys.executable, str(source), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.name)
def test_every_record_specialises_explains_itself_and_refuses_what_it_dropped(record: Path, tmp_path: Path) -> None:
    dropped = Dropped()
    facts = facts_of(record)
    (tmp_path / "train_gpt.py").write_text(pack_artifact.minify(SOURCE.read_text(), "x", facts, dropped))
    small = pack_artifact.load_program(tmp_path / "train_gpt.py", "special")
    environ = {"PRESET": str(record)}
    assert small.explain(*small.resolve(environ)) == train_gpt.explain(*train_gpt.resolve(environ))
    assert len(dropped.entries) > 5 and {table for table, _ in dropped.entries} >= {"EVALS", "GATES", "CODECS"}
    other = next(c for c in facts.choices["eval"] if c != facts.values["eval"])
    changed = {"EVAL": other} | {
        k.upper(): str(int(not facts.values[k])) for k in dropped.frozen if isinstance(facts.values[k], bool)
    }
    assert len(changed) > 3
    for name, value in changed.items():
        with pytest.raises(small.UserError, match=f"{name}=") as caught:
            small.resolve(environ | {name: value})
        assert "\n" not in str(caught.value) or name in str(caught.value).splitlines()[0]
    assert small.resolve(environ | {"TTT_LORA_RANK": "3"})[0].ttt_lora_rank == 3
    assert small.help_text() == pack_artifact.HELP


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, trained and scored."""
    run = tmp_path_factory.mktemp("special") / "run"
    env = TINY_RUN | {"DATA_PATH": str(tiny_data), "ARTIFACT_DIR": str(run)}
    done = child(SOURCE, **env)
    assert done.returncode == 0, done.stderr
    return run


TINY_RUN = {
    "VOCAB_SIZE": "320",
    "NUM_LAYERS": "4",
    "MODEL_DIM": "32",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "MLP_MULT": "2.0",
    "ROPE_DIMS": "4",
    "LOOP_START": "1",
    "LOOP_END": "2",
    "NUM_LOOPS": "1",
    "PARALLEL_START_LAYER": "3",
    "XSA_LAST_N": "4",
    "TRAIN_SEQ_LEN": "64",
    "EVAL_SEQ_LEN": "64",
    "TTT_EVAL_SEQ_LEN": "64",
    "TRAIN_BATCH_TOKENS": "512",
    "VAL_BATCH_TOKENS": "512",
    "BATCH_SLICES": "4",
    "ITERATIONS": "4",
    "MAX_WALLCLOCK_SECONDS": "0",
    "WARMUP_STEPS": "1",
    "GPTQ_CALIBRATION_BATCHES": "4",
    "TTT_LORA_RANK": "4",
    "TTT_CHUNK_SIZE": "16",
    "TTT_BATCH_SIZE": "3",
    "EMBED_EXTRAS": "smear",
    "REPAIR": "lqer",
    "DEVICE": "cpu",
    "OMP_NUM_THREADS": "1",
}


def pack(run: Path, *options: str) -> int:
    return pack_artifact.main(["pack", str(run), *options])


def test_packing_proves_reports_and_saves(
    trained: Path, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.pyz"
    assert pack(trained, "--specialise", "--data", str(tiny_data), "--out", str(out)) == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1].removeprefix("PACK "))
    found = report["specialised"]
    assert found["bytes_saved"] > 2500 and found["plain_bytes"] - found["bytes_saved"] == out.stat().st_size
    assert {"decoded weights", "val_bpb", "val_loss", "toy run: model.bin", "toy run: val_bpb"} <= found["proof"].keys()
    final = json.loads((trained / "result.json").read_text())["stages"]["final"]
    assert found["proof"]["val_bpb"] == str(final["val_bpb"])
    verify = ["verify", str(out), "--run", str(trained), "--data", str(tiny_data)]
    assert pack_artifact.main(verify) == 0 and '"equal": true' in capfd.readouterr().out


@pytest.fixture(scope="module")
def plainly(trained: Path) -> pack_artifact.Gathered:
    """What the plain pack of that run holds."""
    return pack_artifact.gather(trained, SOURCE, b"")


def arguments(run: Path, data: Path, **others: object) -> argparse.Namespace:
    return argparse.Namespace(run_dir=run, source=SOURCE, data=data, tokenizer_path=None, **others)


def test_an_artifact_that_only_evaluates_says_so(
    trained: Path, tiny_data: Path, tmp_path: Path, plainly: pack_artifact.Gathered, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(trained, tiny_data, eval_only=True)
    facts = pack_artifact.known_facts(args)
    found = pack_artifact.gather(trained, SOURCE, b"", facts)
    source = found.parts.source.decode()
    assert not re.search(r"class (Trainer|Muon|Ema|HessianTap)\b|def (plain_units|collect_hessians)\b", source)
    monkeypatch.setattr(pack_artifact, "gather", lambda *_: plainly)
    proof = pack_artifact.prove(args, facts, found)["proof"]
    assert {"decoded weights", "val_bpb"} <= proof.keys() and not any("toy" in name for name in proof)
    (tmp_path / "train_gpt.py").write_text(source)
    where = {"DATA_PATH": str(tiny_data), "ARTIFACT_DIR": str(tmp_path / "r")}
    done = child(tmp_path / "train_gpt.py", PRESET=str(trained), **where)
    assert done.returncode == 2 and pack_artifact.EVAL_ONLY in done.stderr and "Traceback" not in done.stderr
    assert pack(trained, "--eval-only") == 2


def test_a_specialisation_that_changes_anything_is_not_proven(
    trained: Path, tiny_data: Path, plainly: pack_artifact.Gathered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain program with one number changed stands for a specialiser that has made a mistake."""
    monkeypatch.setattr(pack_artifact, "gather", lambda *_: plainly)
    args, text = arguments(trained, tiny_data), plainly.parts.source.decode()

    def refusal(eval_only: bool, old: str, new: str) -> str:
        assert text.count(old) == 1
        parts = dataclasses.replace(plainly.parts, source=text.replace(old, new).encode())
        with pytest.raises(pack_artifact.UserError, match="nothing is written") as caught:
            pack_artifact.prove(args, facts_of(trained, eval_only), plainly._replace(parts=parts))
        return str(caught.value)

    assert "val_bpb (artifact" in refusal(True, "eps=1e-10", "eps=1e-3")  # AdamW of the adapters
    muon = str(train_gpt.COEFFICIENTS["polar_express"][0][0])
    message = refusal(False, muon, "7.")  # the artifact itself scores the same, and only a training tells
    assert "toy run: model.bin" in message and not re.search(r"(written:|;) val_bpb", message)
    assert "cannot be proven" in refusal(True, "def load_artifact(", "def unload_artifact(")


def test_an_unproven_artifact_is_not_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise pack_artifact.UserError("not proven")

    monkeypatch.setattr(pack_artifact, "prove", refuse)
    assert pack(trained, "--specialise", "--out", str(tmp_path / "x.pyz")) == 2
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == "error: not proven\n"


def test_specialised_source_is_deterministic(trained: Path, tmp_path: Path) -> None:
    """The hash seed has no say, and neither have clocks and dates: nothing reads them (see test_pack_artifact)."""
    program = (
        "import sys, pathlib; sys.path[:0] = [sys.argv[1]]\n"
        "import pack_artifact as p\n"
        "dropped = p.Dropped()\n"
        "small = p.minify(pathlib.Path(sys.argv[2]).read_text(), 'x', eval(sys.argv[3], vars(p)), dropped)\n"
        "print(small, dropped.entries, dropped.branches, dropped.definitions, sorted(dropped.frozen))\n"
    )
    command = [sys.executable, "-c", program, str(ROOT), str(SOURCE), repr(facts_of(trained))]
    texts = []
    for seed in ("1", "99"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        texts.append(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    assert texts[0] == texts[1] and len(texts[0]) > 50_000


def test_facts_that_cannot_be_read_are_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("result.json", "record.env", "model.bin"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    (tmp_path / "model.bin").write_bytes((trained / "model.bin").read_bytes()[:-9])
    assert pack(tmp_path, "--specialise") == 2
    error = capsys.readouterr().err
    assert "truncated" in error and len(error.strip().splitlines()) == 1
    (tmp_path / "record.env").write_text("NO_SUCH_KNOB=1\n")
    assert pack(tmp_path, "--specialise") == 2 and "NO_SUCH_KNOB" in capsys.readouterr().err
