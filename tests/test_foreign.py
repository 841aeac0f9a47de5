"""The judge on strangers' folders: each rule finds its fault and lets its innocent twin pass, logs are added up again,
and nothing of a folder is ever run. All folders are synthetic, made here."""

from __future__ import annotations

import ast
import base64
import bz2
import json
import lzma
import math
import os
import re
import zlib
from pathlib import Path

import brotli
import pytest
from conftest import ROOT

import train_gpt
from pack_artifact import CAP_BYTES
from records import foreign, foreign_rules, foreign_source, judge, verify
from records.claims import FAIL, PASS, UNKNOWN, Check

MODEL = """import os
import torch
import torch.nn.functional as F
class args:
    slot_on = int(os.environ.get("SLOT_ON", "0"))
    slot_steps = int(os.environ.get("SLOT_STEPS", "5"))
"""


def folder(path: Path, program: str | bytes, **files: str) -> Path:
    """Write somebody's folder; names of files are given with _ for the point before their suffix."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "train_gpt.py").write_bytes(program.encode() if isinstance(program, str) else program)
    for name, text in files.items():
        (path / ".".join(name.rsplit("_", 1))).write_text(text, encoding="utf-8")
    return path


def judged(path: Path) -> list[Check]:
    return foreign.open_foreign(path)[1]


def named(checks: list[Check], name: str) -> list[Check]:
    return [check for check in checks if check.name.partition(" (")[0] == name]


def status(checks: list[Check], name: str) -> str:
    """The one status that all checks of a name have."""
    found = {check.status for check in named(checks, name)}
    assert len(found) == 1, (name, found)
    return found.pop()


# Rules


def marked(text: str) -> int:
    """The line that ends in # HERE."""
    return next(number for number, line in enumerate(text.splitlines(), 1) if line.endswith("# HERE"))


def cases() -> list[tuple[str, str, str, str]]:
    """Check, status, faulty program and innocent twin of each fault in the file."""
    text = (ROOT / "tests" / "faults" / "foreign.txt").read_text(encoding="utf-8")
    parts = re.findall(
        r"^=== (\w+ [\w-]+) (proven|suspect)\n(.*?)^--- twin\n(.*?)(?=^===|\Z)", text, re.MULTILINE | re.DOTALL
    )
    return [(check, {"proven": FAIL, "suspect": UNKNOWN}[word], bad, good) for check, word, bad, good in parts]


def test_every_rule_finds_its_fault_by_line_and_lets_its_twin_pass(tmp_path: Path) -> None:
    found_rules = set()
    for number, (check, wanted, bad, good) in enumerate(cases()):
        found_rules.add(check)
        bad, good, where = MODEL + bad, MODEL + good, tmp_path / str(number)
        found = named(judged(folder(where / "bad", bad)), check)
        assert [one.status for one in found] == [wanted], (number, check, found)
        assert found[0].detail.startswith(f"train_gpt.py:{marked(bad)}: `"), (number, check, found)
        assert ("settled by" in found[0].detail) == (wanted == UNKNOWN), (number, check, found)
        twin = judged(folder(where / "good", good))
        assert not named(twin, check), (number, check, named(twin, check))
        assert status(twin, "source parses") == PASS, (number, check)
    rules = {f"{rule.topic} {rule.name}" for rule in (*foreign_rules.RULES, *foreign_rules.DATA_RULES)}
    assert rules == found_rules, "every rule has a fault and a twin"


def test_innocent_programs_are_at_most_suspect(tmp_path: Path) -> None:
    """Siblings of the proven faults that another reading explains."""
    files = {
        'train_files = [f for f in glob("data/*") if "fineweb_val_" != f[:12]]\n': {UNKNOWN},
        'train_files = "data/fineweb_val_*.bin".replace("val", "train")\n': {UNKNOWN},
        'train_path = both("data/fineweb_train_*.bin", "data/fineweb_val_*.bin")[0]\n': {UNKNOWN},
        'train_files = sorted(glob("data/fineweb_val_*.bin"))\n': {FAIL},
    }
    for number, (line, wanted) in enumerate(files.items()):
        found = named(judged(folder(tmp_path / str(number), "from glob import glob\n" + line)), "split val-in-training")
        assert {check.status for check in found} == wanted, (line, found)
    ttt = """
def eval_ttt(model, opt, x, y, scores):
    for a in range(9):
{first}        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
            opt.step()
        total.append(F.cross_entropy(model(x), y))
eval_ttt(1, 2, 3, 4, [])
"""
    for first, wanted in (("", FAIL), ("        scores.append(F.cross_entropy(model(x), y))\n", UNKNOWN)):
        found = named(
            judged(folder(tmp_path / f"ttt_{wanted}", MODEL + ttt.format(first=first))), "C3 score-after-update"
        )
        assert {check.status for check in found} == {wanted}, (first, found)


# Wrappers


def test_wrappers_are_opened_by_layer_and_findings_name_the_inner_line(tmp_path: Path) -> None:
    check, _, bad, _ = next(case for case in cases() if case[0] == "C1 slot-fit")
    inner = MODEL + bad
    data = inner.encode()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    raw = base64.b85encode(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters)).decode()
    b64 = base64.b64encode
    two = f"import zlib,base64\nexec(zlib.decompress(base64.b64decode({b64(zlib.compress(data))!r})))\n".encode()
    coded, aliased = b64(lzma.compress(data)).decode(), base64.a85encode(zlib.compress(data))
    halves = brotli.compress(data)[:40], brotli.compress(data)[40:]
    forms = {  # as published programs do it, and by other names
        "import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("
        f'"{raw}"),format=L.FORMAT_RAW,filters=[{{"id":L.FILTER_LZMA2}}]))\n': ">1",
        f"import lzma, base64\nx = {coded!r}\n"
        "exec(compile(lzma.decompress(base64.b64decode(x)).decode('utf-8'), 'train_gpt.py', 'exec'))\n": ">1",
        f"from zlib import decompress as d\nfrom base64 import a85decode as a\nexec(d(a({aliased!r})))\n": ">1",
        f"import brotli\nA = {halves[0]!r}\nexec(brotli.decompress(A + {halves[1]!r}))\n": ">1",
        f"exec(__import__('bz2').decompress({bz2.compress(data)!r}))\n": ">1",
        f"import bz2\nexec(bz2.decompress({bz2.compress(two)!r}))\n": ">1>1",
    }
    for number, (outer, where) in enumerate(forms.items()):
        checks = judged(folder(tmp_path / str(number), outer))
        found = named(checks, check)
        assert [one.status for one in found] == [FAIL], (outer[:80], [c for c in checks if "source" in c.name])
        assert found[0].detail.startswith(f"train_gpt.py{where}:{marked(inner)}: `"), found


def test_bombs_and_closed_wrappers_end_in_a_finding(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(9_000_000), 9)
    three = b"x = 1\n"
    for _ in range(4):
        three = f"import zlib\nexec(zlib.decompress({zlib.compress(three)!r}))\n".encode()
    doubling = (
        "a = 'x' * 1\na0 = 'xxxxxxxx'\n" + "".join(f"a{i + 1} = a{i} + a{i}\n" for i in range(60)) + "exec(a60)\n"
    )
    faults = {
        f"import zlib\nexec(zlib.decompress({bomb!r}))\n": (2, "gives over 8,000,000 bytes"),
        f"import lzma\nexec(lzma.decompress({lzma.compress(bytes(9_000_000))!r}))\n": (2, "gives over"),
        f"import brotli\nexec(brotli.decompress({brotli.compress(bytes(9_000_000))!r}))\n": (2, "gives over"),
        doubling: (63, "literals have over"),
        "import zlib\nexec(zlib.decompress(b'damaged'))\n": (2, "header"),
        "exec(open('model.bin', 'rb').read()[9:])\n": (1, "not a literal"),
        "x = y\ny = x\nexec(x)\n": (3, "not a literal"),
        three.decode(): (2, "more than 2 wrappers"),
    }
    for number, (program, (line, words)) in enumerate(faults.items()):
        checks = judged(folder(tmp_path / str(number), program))
        found = named(checks, "source wrapper")
        assert [one.status for one in found] == [UNKNOWN], (program[:60], found)
        assert status(checks, "C1 source") == UNKNOWN, "what was not read has not been seen"
        assert re.match(rf"train_gpt\.py[>1]*:{line}: ", found[0].detail) and words in found[0].detail, found


# Logs

TOKENS, BYTES = 47_851_520, 151_074_499
LOG = """Hyperparameters:
  matrix_lr: {lr}
  seed: {seed}
  run_id: run_{seed}
  train_files: ./data/fineweb_train_*.bin
==================================================
val_tokens: {tokens}
compile took: 8{seed}.5s
step:1/20000 train_loss:9.0100 train_time:120ms step_avg:120.00ms
step:{step}/20000 train_loss:3.1000 train_time:240000ms step_avg:120.00ms
step:4900/20000 val_loss:2.3300 val_bpb:1.0650 train_time:{train}ms step_avg:120.00ms
stopping_early: wallclock_cap train_time:{train}ms step:4900/20000
gptq: collected 67 hessians in {hessians}s
diagnostic quantized val_loss:2.35000000 val_bpb:1.07200000 eval_time:11000ms
Code size (compressed): {code} bytes
Serialized model quantized+pergroup: {model} bytes
Total submission size quantized+pergroup: {total} bytes
ngram_tilt:hints gated=628130 within_gate={gates} word_gate=0
quantized_ttt_phased val_loss:{loss} val_bpb:{bpb} eval_time:{score}ms
total_eval_time:{whole}s
"""
PROGRAM = 'import torch\nprint("quantized_ttt_phased")\n'


def log(seed: int, bpb: float = 1.06, total_bytes: float = BYTES, **changes: object) -> str:
    """A log as published programs write it; its numbers agree with one another unless changed."""
    tokens = int(str(changes.get("tokens", TOKENS)))
    loss = bpb * math.log(2) * total_bytes / tokens
    code, model = len(PROGRAM), 15_900_000
    whole = {"lr": 0.026, "seed": seed, "tokens": tokens, "step": 2000, "train": 588_000, "hessians": 4.1, "gates": 0}
    whole |= {"code": code, "model": model, "total": code + model, "score": 500_000, "whole": 500.0}
    return LOG.format(**whole | {"loss": f"{loss:.8f}", "bpb": f"{bpb:.8f}"} | changes)


def record(path: Path, *logs: str, program: str = PROGRAM, paper: dict | None = None, readme: str = "") -> Path:
    """A folder with logs of seeds, and papers that agree with them unless given."""
    texts = logs or (log(42, 1.06), log(0, 1.061), log(1234, 1.0605))
    files = {f"train_seed{i}_log": text for i, text in enumerate(texts)}
    own = {"val_bpb": 1.0605, "bytes_total": 15_900_000 + len(PROGRAM), "seeds": [42, 0, 1234], "val_bpb_std": 0.0005}
    own["seed_results"] = {"42": {"val_bpb": 1.06, "steps": 4900}, "0": {"val_bpb": 1.061}, "1234": {"val_bpb": 1.0605}}
    files["submission_json"] = json.dumps(own | (paper or {}))
    return folder(path, program, **files, README_md=readme or "# A record: 1.0605\n\nval_bpb **1.06050**\n")


def test_a_clean_folder_has_no_failure_and_stays_undecided(tmp_path: Path) -> None:
    checks = judged(record(tmp_path))
    assert not [check for check in checks if check.status == FAIL]
    wanted = "bytes denominator,size cap,size parts,size shipped,time training,time hessians,time evaluation,log steps"
    wanted += (
        ",C1 log-gates,seeds,seeds configuration,claims score,claims spread,claims seeds,claims size,claims README"
    )
    for name in f"{wanted},papers readable,alone modules,source parses".split(","):
        assert status(checks, name) == PASS, (name, named(checks, name))
    # nothing in these logs says which program wrote them, and no question of a run is answered
    for name in ("log origin", *(question for question, _ in foreign.RUN_QUESTIONS)):
        assert status(checks, name) == UNKNOWN, name
    assert judge.summary(*foreign.open_foreign(tmp_path))["legal"] is None


def test_our_own_program_has_no_finding_that_fails(tmp_path: Path) -> None:
    checks = judged(folder(tmp_path, (ROOT / "train_gpt.py").read_bytes()))
    assert not [check for check in checks if check.status == FAIL]
    rules = {f"{rule.topic} {rule.name}" for rule in foreign_rules.RULES}
    assert not [check for check in checks if check.name in rules]


def test_numbers_of_logs_are_added_up_again(tmp_path: Path) -> None:
    size = 15_900_000 + len(PROGRAM)
    twice = 1.167 * BYTES
    faults: tuple[tuple[str, str, str, str], ...] = (  # a log, the check, its status, words of the detail
        (log(1, total_bytes=164_594_398), "bytes denominator", FAIL, "INVALID"),
        (log(1, total_bytes=twice), "bytes denominator", FAIL, "+16.70%"),
        (log(1, total_bytes=0.2 * BYTES, tokens=TOKENS // 5), "bytes denominator", FAIL, "a part of validation"),
        (log(1, total_bytes=1.004 * BYTES), "bytes denominator", UNKNOWN, "+0.40%"),
        (log(1, tokens=62_021_632, total_bytes=151_080_891), "bytes denominator", PASS, "SP8192"),
        (log(1, tokens=47_853_343, total_bytes=151_080_600), "bytes denominator", PASS, "within"),
        (log(1).replace("bpb:1.06000000", "bpb:1.0600"), "bytes denominator", PASS, "canonical"),
        (log(1).replace("val_tokens", "n"), "bytes denominator", PASS, "does not say how many"),
        (log(1, total_bytes=twice).replace("val_tokens", "n"), "bytes denominator", UNKNOWN, "SCORES"),
        # what was scored counts, not what there is to score; words in names of settings are no clocks
        (log(1) + "target_tokens:9,662,464\n", "bytes denominator", FAIL, "-79.81%"),
        (log(1).replace("bpb:1.06000000", "bpb:1.1"), "bytes denominator", UNKNOWN, "too few digits"),
        (log(1, loss="nan"), "bytes denominator", FAIL, "no score"),
        (log(1) + "scored_bytes:140000000\n", "bytes stated", FAIL, "states 140,000,000"),
        (log(1) + "scored_bytes:151,074,499\n", "bytes stated", PASS, "151,074,499"),
        (log(1, gates="9,866,847"), "C1 log-gates", FAIL, "9,866,847 hints"),
        (log(1, total=CAP_BYTES + 1), "size cap", FAIL, "`: 16,000,001 of"),
        (log(1, total=size - 1), "size parts", FAIL, f"total {size - 1:,}"),
        (log(1, total=size + 9), "size parts", UNKNOWN, f"total {size + 9:,}"),
        (log(1, model=CAP_BYTES - 9, total=CAP_BYTES, code=9), "size shipped", FAIL, "ship the wrapper"),
        (log(1, train=600_031), "time training", UNKNOWN, "600.031"),
        (log(1, train=601_153), "time training", FAIL, "`: 601.153 of 600 s"),
        (log(1, train=599_500), "time hessians", UNKNOWN, "4.1 s after 599.5 s"),
        (log(1, score=617_000, whole=617.0), "time evaluation", FAIL, "617.0"),
        (log(1, whole=688.0), "time evaluation", FAIL, ":20: `total_eval_time:688.0s`"),
        (log(1, step=6000), "log steps", UNKNOWN, "`: step 4900 after a later one"),
        ("step:1/2 train_loss:3.0 train_time:5ms\n", "log score", UNKNOWN, "no final"),
        ("step:1/2 train_loss:3.0\n", "time training", UNKNOWN, "no train_time"),
        ("step:1/2 train_loss:3.0\n", "size cap", UNKNOWN, "no `Total"),
    )
    for number, (text, name, wanted, words) in enumerate(faults):
        found = named(judged(record(tmp_path / str(number), text)), name)
        assert [check.status for check in found] == [wanted] and words in found[0].detail, (number, name, found)


def test_settings_that_logs_print_replace_defaults(tmp_path: Path) -> None:
    bad = next(bad for check, wanted, bad, _ in cases() if (check, wanted) == ("C1 slot-fit", UNKNOWN))
    mask = 'fix = int(os.environ.get("SMEAR_BOS_FIX", "0"))\nif fix:\n    pass\n'
    for number, (line, slot, switch) in enumerate(
        (("", UNKNOWN, UNKNOWN), ("  slot_on: 1\n  fix: True\n", FAIL, None), ("  slot_on: False\n", UNKNOWN, UNKNOWN))
    ):
        text = log(1).replace("  matrix_lr", f"{line}  matrix_lr")
        checks = judged(record(tmp_path / str(number), text, program=MODEL + bad + mask))
        found = named(checks, "C1 slot-fit")
        assert [check.status for check in found] == [slot], (line, found)
        assert slot == FAIL or f"SLOT_ON={'False in the logs' if line else '0 by default'}" in found[0].detail, found
        assert [check.status for check in named(checks, "C1 smear-switch")] == ([switch] if switch else []), line


def test_seeds_and_papers_are_held_against_logs(tmp_path: Path) -> None:
    three = (log(42, 1.06), log(0, 1.061), log(1234, 1.0605))
    faults: tuple[tuple[dict, tuple[str, ...], str, str, str], ...] = (  # papers, logs, check, status, words
        ({"val_bpb": 1.06}, three, "claims score", FAIL, "it is one seed's"),
        ({"val_bpb": 1.05}, three, "claims score", FAIL, "mean of 3 logs 1.06050000"),
        ({"val_bpb": 1.06}, three[:1], "claims score", UNKNOWN, "3 seeds are listed"),
        ({"val_bpb": 1.072}, three, "claims score", UNKNOWN, "that of `diagnostic quantized`"),
        (
            {"seed_results": {"42": {"val_bpb": 1.06, "artifact_bytes": 15_900_000}}},
            three,
            "claims seeds",
            PASS,
            "2 numbers",
        ),
        ({"seed_results": {"42": {"val_bpb": 1.06, "steps": 4899}}}, three, "claims seeds", FAIL, "its log 4900"),
        ({"val_bpb_std": 0.0001}, three, "claims spread", FAIL, "of the sample 0.000500"),
        ({"seed_results": {"42": {"val_bpb": 1.059}}}, three, "claims seeds", FAIL, "seed 42: val_bpb 1.059"),
        ({"seed_results": {"7": {"val_bpb": 1.059}}}, three, "claims seeds", UNKNOWN, "no log of seed 7"),
        ({"bytes_total": 15_000_000}, three, "claims size", FAIL, "15,000,000"),
        ({"p_value": 1e-9, "comparison_baseline_bpb": 1.061}, three, "claims p", UNKNOWN, "p_value 1e-09"),
        ({"p_value": 0.2, "comparison_baseline_bpb": 1.061}, three, "claims p", PASS, "constant 0.11"),
        ({"p_value": 0.2}, three, "claims p", UNKNOWN, "seeds on both sides"),
        ({"val_bpb": 1.04}, three, "claims README", FAIL, "title says 1.0605"),
        ({}, (log(42, 1.06), log(42, 1.061), log(0)), "seeds", UNKNOWN, "three different seeds"),
        ({}, three[:2], "seeds", UNKNOWN, "seed 0"),
        ({"seeds": [42, 0, 7]}, (*three[:2], log(7, lr=0.028)), "seeds configuration", FAIL, "matrix_lr 0.028"),
        ({"seeds": [42, 0]}, (*three[:2], log(7, lr=0.028)), "seeds configuration", UNKNOWN, "matrix_lr 0.028"),
        ({}, (*three[:2], log(7, lr=0.028).replace("Hyper", "Some ")), "seeds configuration", UNKNOWN, "matrix_lr"),
        ({}, (*three[:2], log(7, code=9)), "seeds configuration", UNKNOWN, "counts other code"),
        (
            {"seed_results": {"42": {"val_bpb": "low"}}},
            three,
            "papers readable",
            UNKNOWN,
            "no val_bpb that is a number",
        ),
    )
    for number, (paper, logs, name, wanted, words) in enumerate(faults):
        found = named(judged(record(tmp_path / str(number), *logs, paper=paper)), name)
        assert [check.status for check in found] == [wanted] and words in found[0].detail, (number, name, found)


def test_a_log_is_traced_to_its_program(tmp_path: Path) -> None:
    bar = "=" * 100
    digest = foreign.hashlib.sha256(PROGRAM.encode()).hexdigest()
    wrapped = f"import zlib\nexec(zlib.decompress({zlib.compress(PROGRAM.encode())!r}))\n"
    for number, (program, text, wanted, words) in enumerate(
        (
            (PROGRAM, f"{PROGRAM}{bar}\n{log(1)}", PASS, "text of train_gpt.py"),
            (PROGRAM, f"source {digest}\n{log(1)}", PASS, "hash of train_gpt.py"),
            (wrapped, f"{PROGRAM}{bar}\n{log(1)}", PASS, "text of train_gpt.py>1"),
            (PROGRAM + "x = 1\n", f"{PROGRAM}y = 2\n{bar}\n{log(1)}", FAIL, "line 3: `y = 2`"),
            ("import torch\n", log(1), UNKNOWN, "no source here holds the words `quantized_ttt_phased`"),
            (PROGRAM, log(1), UNKNOWN, "neither"),
            # an editor took white space at the ends of lines; a sentence of a log is no program
            (PROGRAM.replace("\n", "  \n"), f"{PROGRAM}{bar}\n{log(1)}", PASS, "text of train_gpt.py"),
            (PROGRAM, f"from here on it trains\n{bar}\n{log(1)}", UNKNOWN, "neither"),
        )
    ):
        found = named(judged(record(tmp_path / str(number), text, program=program)), "log origin")
        assert [check.status for check in found] == [wanted] and words in found[0].detail, (number, found)


def test_code_that_is_not_counted_is_added(tmp_path: Path) -> None:
    """Helpers that are imported or read by name are code; files that prepare data are not."""
    program = PROGRAM + 'import helper\nimport nowhere\nfrom . import gone\nload("state.c")\n'
    files = {"helper_py": "import torch\n" * 50, "state_c": "int x;\n" * 50, "prepare_py": "x = 1\n" * 50}
    path = record(tmp_path, program=program)
    folder(path, program, **files)
    checks = judged(path)
    found = named(checks, "size shipped")[0]
    assert found.status == UNKNOWN and "helper.py 650 + state.c 350" in found.detail and "prepare" not in found.detail
    modules = named(checks, "alone modules")[0]
    assert modules.status == UNKNOWN and re.findall(r"train_gpt\.py:(\d+)", modules.detail) == ["4", "5"]
    (path / "requirements.txt").write_text("Nowhere>=1\n", encoding="utf-8")
    assert "nowhere`" not in named(judged(path), "alone modules")[0].detail


# Hostile folders


def test_nothing_of_a_folder_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    trap = "open('ran', 'w').close()\n"
    packed = f"{trap}import zlib\nexec(zlib.decompress({zlib.compress(trap.encode())!r}))\nimport helper\n"
    names = ("helper", "sitecustomize", "conftest", "torch", "scipy", "setup")
    path = record(tmp_path / "theirs", program=packed)
    folder(path, packed, **{f"{name}_py": trap for name in names})
    monkeypatch.chdir(path)
    before = sorted(path.iterdir())
    assert verify.main([str(path)]) == 1
    assert sorted(path.iterdir()) == before
    out = capsys.readouterr().out
    verdict = json.loads(out.splitlines()[-1].removeprefix("VERDICT "))
    assert verdict["kind"] == "foreign" and verdict["legal"] is None and "undecided" in out


def test_damaged_files_give_findings_and_no_traceback(tmp_path: Path) -> None:
    deep = "[" * 100_000
    faults: dict[str, tuple[str, bytes, str]] = {
        "no python": ("train_gpt.py", b"def f(:\n", "source parses"),
        "nul": ("train_gpt.py", b"x = 1\0\n", "source parses"),
        "deep": ("train_gpt.py", b"x = " + b"(" * 5000 + b")" * 5000, "source parses"),
        "long sum": ("train_gpt.py", b"x = " + b"1+" * 20_000 + b"1\n", "source parses"),
        "large": ("train_gpt.py", b"#" * 4_000_001, "source parses"),
        "latin": ("train_seed0.log", log(1).encode() + b"\xff\xfe\n", "papers readable"),
        "json": ("submission.json", b'{"val_bpb": NaN', "papers readable"),
        "deep json": ("submission.json", deep.encode(), "papers readable"),
        "list": ("submission.json", b"[1]", "papers readable"),
        "readme": ("README.md", b"\xff# 1.0605", "papers readable"),
    }
    for name, (file, data, check) in faults.items():
        path = record(tmp_path / name)
        (path / file).write_bytes(data)
        found = named(judged(path), check)
        assert [one.status for one in found] == [UNKNOWN] and file in found[0].detail, (name, found)
    long = f"def f(probs, ids):\n    return probs[ids[{'1+' * 2000}1]]\n"
    found = named(judged(folder(tmp_path / "expression", long)), "C1 ngram-target-key")
    assert [one.status for one in found] == [UNKNOWN] and "too long to be read" in found[0].detail
    wild = (
        "val_loss:" * 5000
        + "\nstep:1/0 train_loss:x train_time:ms\nval_loss:1e999 val_bpb:-1\nval_loss:1,,2 val_bpb:_\n"
    )
    wild += f"seed: {'9' * 5000}\nstep:{'9' * 400}/1 val_loss:1 val_bpb:1\nTotal submission size: {'9' * 400} bytes\n"
    wild += (
        f"val_tokens: {'9' * 400}\ntarget_tokens:inf\ntotal_eval_time:nans\ntrain_time:{'9' * 400}ms\nval_bytes:nan\n"
    )
    checks = judged(record(tmp_path / "wild", wild * 3, paper={"val_bpb": 1e308, "val_bpb_std": float("inf")}))
    assert {check.status for check in checks} >= {FAIL, UNKNOWN}
    linked = record(tmp_path / "linked")
    (linked / "self").symlink_to(linked)
    os.mkfifo(linked / "pipe.log")
    (linked / "README.md").unlink()
    (linked / "README.md").symlink_to("/etc/hostname")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "train_gpt.py").symlink_to(linked / "train_gpt.py")
    with pytest.raises(train_gpt.UserError, match=r"train_gpt\.py is a link"):
        judged(alone)
    found = named(judged(linked), "papers readable")[0]
    assert found.status == UNKNOWN and "README.md is a link" in found.detail and "self is a link" in found.detail


def test_only_folders_of_others_are_read_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    theirs = folder(tmp_path / "theirs", PROGRAM)
    assert foreign.is_foreign(theirs)
    preset = folder(tmp_path / "preset", PROGRAM, record_env="")
    run = folder(tmp_path / "run", PROGRAM, result_json="{}", model_bin="")
    packed = folder(tmp_path / "packed", "b85decode\n#abc\n", model_bin="")
    for path in (preset, run, packed, tmp_path, theirs / "train_gpt.py"):
        assert not foreign.is_foreign(path), path
    # another name for the program: said, and read in its place
    (theirs / "train_gpt.py").rename(theirs / "train_mine.py")
    found = named(judged(theirs), "size form")
    assert [check.status for check in found] == [UNKNOWN] and "train_mine.py is read" in found[0].detail
    assert verify.main([str(tmp_path)]) == 2 and "another team's folder" in capsys.readouterr().err
    assert verify.main([str(theirs), "--data", str(tmp_path), "--probes", "0"]) == 2
    assert "read and not run; leave out --data, --probes" in capsys.readouterr().err


# The page of rules


def pattern_of(part: ast.AST) -> str:
    """The pattern of a part of a name: its words, its two choices, or anything."""
    if isinstance(part, ast.Constant):
        return re.escape(str(part.value))
    choice = part.value if isinstance(part, ast.FormattedValue) else None
    return f"({choice.body.value}|{choice.orelse.value})" if isinstance(choice, ast.IfExp) else ".+"


def check_patterns() -> set[str]:
    """Patterns of the names that the judge gives to checks, without what is in brackets; from its source."""
    found = set()
    for name in ("judge", "claims", "foreign"):
        tree = ast.parse((ROOT / "records" / f"{name}.py").read_text(encoding="utf-8"))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            local = {ast.unparse(t): v for node in ast.walk(function) for t, v in foreign_source.assigned(node)}
            for call in foreign_source.calls(function):
                if (
                    foreign_source.called(call) in ("Check", "decide", "compare_sums", "compare_near", "compare")
                    and call.args
                ):
                    first = local.get(ast.unparse(call.args[0]), call.args[0])
                    parts = first.values if isinstance(first, ast.JoinedStr) else [first]
                    words = (
                        re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in parts if p is not None
                    )
                    found.add("".join(words).partition(r"\ \(")[0].removeprefix(r".+:\ "))
    rules = (*foreign_rules.RULES, *foreign_rules.DATA_RULES)
    found |= {re.escape(f"{rule.topic} {rule.name}") for rule in rules}
    found |= {re.escape(f"{rule.topic} source") for rule in rules}
    found |= {re.escape(question) for question, _ in foreign.RUN_QUESTIONS}
    found |= {"two ranks", "eight ranks", "budget training", "budget evaluation"}
    return {pattern for pattern in found if pattern.replace(".+", "").replace("source", "").strip("\\ ")}


def test_the_page_names_every_check_and_no_other() -> None:
    text = (ROOT / "records" / "RULES.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    named = {
        name for row in rows for cell in row[-2:] for name in re.findall(r"`([^`]+)`", cell) if "." not in name[:-4]
    }
    named = {name for name in named if not name.endswith(".py")}
    patterns = check_patterns()
    assert not [name for name in sorted(named) if not any(re.fullmatch(pattern, name) for pattern in patterns)]
    assert not [pattern for pattern in sorted(patterns) if not any(re.fullmatch(pattern, name) for name in named)]
    assert text.count("\n") <= 150
    for row in rows:
        assert all("`" in cell or "ot checked" in cell for cell in row[-2:]) or row[-1] in ("read", "---"), row
