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

from pack_artifact import CAP_BYTES
from records import foreign, foreign_rules, verify
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
