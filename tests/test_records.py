"""Every record of the track at toy size on real text: trained once, then packed, run as packed, and verified."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from conftest import RECORDS, ROOT, ToyRun, call

import pack_artifact
import train_gpt

PARAMETERS = dict.fromkeys(("Frontier", "PR2135", "PR1934", "PR1915", "CarryTTT", "rANS"), 35_945_671)
PARAMETERS |= {"PR1182": 27_108_468, "PR1150": 25_768_028, "PR1895": 35_896_408}
VERIFIED = next(record for record in RECORDS if record.name.endswith("rANS"))
every_record = pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.name)


@functools.cache
def packed_program(path: Path) -> ModuleType:
    """The minified program as a module: one file for all records, whose packed programs are the same bytes."""
    return pack_artifact.load_program(path, "packed")


@every_record
def test_record_trains_quantises_and_gains_by_adapting(record: Path, toy_run: Callable[[Path], ToyRun]) -> None:
    result = toy_run(record).result
    assert result["legal"] and list(result["stages"]) == ["pre_quant", "quantized", "final"]
    assert result["stages"]["final"]["val_bpb"] < result["stages"]["quantized"]["val_bpb"]


@pytest.mark.parametrize("record", [r for r in RECORDS if r != VERIFIED], ids=lambda path: path.name)
def test_packed_record_gives_the_score_of_its_run(
    record: Path, packed_toy: Callable[[Path], ToyRun], once: Callable[..., Path], tmp_path: Path
) -> None:
    run = packed_toy(record)
    parts = pack_artifact.read_packed(run.folder / "artifact.pyz")
    for name, data in (("record.env", parts.config), ("model.bin", parts.weights)):
        (tmp_path / name).write_bytes(data)
    assert parts.weights == (run.folder / "model.bin").read_bytes()
    source = once("packed program", lambda folder: (folder / "train_gpt.py").write_bytes(parts.source))
    assert parts.source == (source / "train_gpt.py").read_bytes(), "the record changes the program"
    kept = {name: run.env[name] for name in ("DATA_PATH", "DEVICE", "OMP_NUM_THREADS")}
    kept |= {"PRESET": str(tmp_path), "STAGES": "eval", "MODEL_PATH": str(tmp_path / "model.bin")}
    folder = tmp_path / "run"
    done = call(kept | {"ARTIFACT_DIR": str(folder)}, folder, main=packed_program(source / "train_gpt.py").main)
    assert done.code == 0, done.err
    for key in ("val_loss", "val_bpb", "tokens_scored", "bytes_scored"):
        assert done.result[key] == run.result[key], key


def test_packed_record_verifies_from_an_empty_directory(
    toy_run: Callable[[Path], ToyRun],
    packed_toy: Callable[[Path], ToyRun],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, run = toy_run(VERIFIED).result, packed_toy(VERIFIED)
    assert run.result["bytes_total"] == (run.folder / "artifact.pyz").stat().st_size < before["bytes_total"]
    assert all(run.result[key] == before[key] for key in ("bytes_model", "val_bpb"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DEVICE", "cpu")
    where = ["--run", str(run.folder), "--data", run.env["DATA_PATH"]]
    code = pack_artifact.main(["verify", str(run.folder / "artifact.pyz"), *where])
    out = capfd.readouterr().out
    said = json.loads(next(line for line in out.splitlines() if line.startswith("VERIFY ")).removeprefix("VERIFY "))
    assert code == 0 and said["equal"] and all(said["checks"].values())
    assert said["val_bpb"] == run.result["val_bpb"]


@every_record
def test_record_is_explained_and_says_what_was_run(record: Path, tmp_path: Path) -> None:
    done = call({"PRESET": str(record)}, tmp_path, "--explain")
    count = PARAMETERS[record.name.rpartition("_")[2]]
    for line in (f"parameters {count}", "optimisers:", "quantisation plan:"):
        assert line in done.out
    assert ("route, looping on from 0.35" in done.out) == (count == PARAMETERS["PR1934"])
    layers = train_gpt.preset_layers(str(record))
    assert all(f"({layer})" in done.out for layer in layers), "the provenance of a knob names the folder it came from"
    template = json.loads((record / "submission.json").read_text(encoding="utf-8"))
    assert template["val_bpb"] is None and template["seed_results"] == {}, "filled in only with what was really run"
    assert "not run here" in (record / "README.md").read_text(encoding="utf-8")


def test_our_own_records_are_based_on_a_published_one() -> None:
    ours = [record for record in RECORDS if "PR" not in record.name]
    assert [record.name[11:] for record in ours] == ["CarryTTT", "TCQ_rANS", "Frontier"]
    for record in ours:
        base, own = train_gpt.preset_layers(str(record)).items()
        assert (ROOT / base[0]).resolve() in RECORDS and "PR" in base[0]
        assert not [key for key, value in own[1].items() if base[1].get(key) == value], "repeats its base"
