"""The demo's report: what it prints, what it draws, and how it treats incomplete and broken runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from conftest import RECORDS, ToyRun

from records.demo import report

STAGE_SCORES = {
    "pre_quant": {"val_loss": 3.31, "val_bpb": 1.9712, "seconds": 6.2},
    "quantized": {"val_loss": 3.33, "val_bpb": 1.9834, "seconds": 6.4},
    "final": {"val_loss": 3.20, "val_bpb": 1.9053, "seconds": 41.8},
}
RESULT: dict[str, Any] = {"preset": "demo", "seed": 1337, "stages": STAGE_SCORES, "val_bpb": 1.9053, "val_loss": 3.20}
RESULT |= {"tokens_scored": 123_456, "bytes_scored": 301_234, "train_seconds": 140.2, "eval_seconds": 41.8}
RESULT |= {"bytes_code": 38_556, "bytes_model": 612_345, "bytes_total": 650_901, "legal": True}
RESULT |= {"artifact": "artifact.pyz"}


def metrics_lines() -> list[str]:
    """A short run whose recurrence switches on at step 20, validated twice."""
    rows: list[dict[str, Any]] = [
        {"step": step, "train_loss": 7.0 - step / 10, "lr_mult": 1.0, "seconds": 0.4 * step, "looping": step >= 20}
        for step in range(0, 41, 2)
    ]
    rows += [{"step": step, "val_loss": 7.1 - step / 10, "val_bpb": 2.5} for step in (20, 40)]
    return [json.dumps(row) for row in rows]


def write_run(directory: Path, metrics: list[str] | None = None, **changes: Any) -> Path:
    """A run directory as training and packing leave it; a change to None removes that key of the result."""
    result = {key: value for key, value in (RESULT | changes).items() if value is not None}
    (directory / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (directory / "model.pt").write_bytes(bytes(3_400))
    lines = metrics_lines() if metrics is None else metrics
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def test_report_prints_every_stage_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(write_run(tmp_path))]) == 0
    printed = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in printed.splitlines()}
    assert rows["float model"][2:] == ["3.3100", "1.9712", "6.2", "3,400"]
    assert rows["quantised"][1:] == ["3.3300", "1.9834", "+0.0122", "6.4", "612,345"]
    assert rows["final"][1:] == ["3.2000", "1.9053", "-0.0781", "41.8", "650,901"]
    assert "code 38,556 + model 612,345 = 650,901 of 16,000,000 (within the cap)" in printed
    assert "missing" not in printed
    picture = matplotlib.image.imread(tmp_path / "report.png")
    height, width = picture.shape[:2]
    thirds = [picture[:, part * width // 3 : (part + 1) * width // 3, :3] for part in range(3)]
    assert height >= 500
    assert all(np.ptp(third) > 0.5 for third in thirds), "a panel is blank"
    assert not list(tmp_path.glob("*.tmp"))


def test_panels_carry_units_switch_and_an_axis_from_zero(tmp_path: Path) -> None:
    run = report.read_run(write_run(tmp_path))
    figure = report.Figure()
    loss, stages, parts, cap = figure.subplots(1, 4)
    report.draw_loss(loss, run)
    report.draw_stages(stages, run)
    report.draw_bytes(parts, cap, run)
    legend = [text.get_text() for text in loss.get_legend().get_texts()]
    assert legend == ["training", "validation", "looping on by step 20"]
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("step", "loss (nats per token)")
    assert stages.get_ylim()[0] == 0 and "starts at 0" in stages.get_ylabel()
    assert "1.9053\n(-0.0781)" in [text.get_text() for text in stages.texts]
    assert [text.get_text() for text in parts.texts] == ["38,556 B", "612,345 B"]
    assert "4.1 % of the cap" in cap.get_title(loc="left")


def test_what_a_run_did_not_reach_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for absent in (["final"], ["quantized"], ["pre_quant", "quantized"], list(STAGE_SCORES)):
        stages = {name: scores for name, scores in STAGE_SCORES.items() if name not in absent}
        run = report.read_run(write_run(tmp_path, stages=stages, val_bpb=None))
        assert f"missing stages: {', '.join(absent)}" in report.format_table(run)
    report.draw(run, tmp_path / "report.png")
    assert (tmp_path / "report.png").is_file(), "drawn although no stage was scored"
    run = report.read_run(write_run(tmp_path, artifact=None))
    assert "code (not packed) 38,556" in report.format_table(run)
    nothing = dict.fromkeys(("bytes_code", "bytes_model", "bytes_total", "artifact", "train_seconds"))
    write_run(tmp_path, **nothing)
    (tmp_path / "metrics.jsonl").unlink()
    assert report.main([str(tmp_path), "--out", str(tmp_path / "other.png")]) == 0
    printed = capsys.readouterr().out
    assert "note: metrics.jsonl is missing: no loss curve" in printed and "bytes:" not in printed
    assert (tmp_path / "other.png").is_file()


def test_marks_and_notes(tmp_path: Path) -> None:
    lines = [*metrics_lines(), '{"step": 42, "train_']
    write_run(tmp_path, lines, bytes_model=16_000_000, bytes_total=16_038_556, legal=False)
    table = report.format_table(report.read_run(tmp_path))
    for words in ("OVER THE CAP", "final (not legal)", "the last line is incomplete"):
        assert words in table, words


def test_broken_run_gives_one_clear_line(tmp_path: Path, refused: Callable[..., str]) -> None:
    for name, content, message in (
        ("result.json", None, "does not exist"),
        ("result.json", "{", "is not valid JSON"),
        ("result.json", "[1]", "holds a list, not an object"),
        ("result.json", '{"stages": {"final": {"val_bpb": "x"}}}', "val_bpb"),
        ("metrics.jsonl", '{"step": 1}\nnonsense\n{"step": 2}\n', "metrics.jsonl:2"),
        ("metrics.jsonl", '{"loss": 1}\n{"step": 2}\n', "metrics.jsonl:1: no object with a step"),
    ):
        write_run(tmp_path)
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_text(content, encoding="utf-8")
        refused(message, report.main, tmp_path)
    assert not (tmp_path / "report.png").exists()


def test_report_with_the_data_shows_where_the_bits_are_and_a_text(
    toy_run: Callable[[Path], ToyRun], caseops_sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(toy_run(RECORDS[0]).folder, folder)
    assert report.main([str(folder)]) == 0
    plain = matplotlib.image.imread(folder / "report.png").shape
    capsys.readouterr()
    assert report.main([str(folder), "--data", str(caseops_sample)]) == 0
    printed = capsys.readouterr().out
    for words in ("\npositions:\n", "\nlengths:\n", "\nclasses:\n", "case operator", "wrote:\n  The function"):
        assert words in printed, words
    assert matplotlib.image.imread(folder / "report.png").shape[0] == 2 * plain[0]
