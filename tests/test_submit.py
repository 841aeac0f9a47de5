"""From logs to a submission: one configuration or none, the statistics against scipy's own numbers, the leaderboard."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from conftest import RECORDS
from scipy import stats

import train_gpt
from records import submit

PUBLISHED = {42: 1.05989, 0: 1.06124, 1234: 1.06210}  # per-seed scores of a published record
NATS = 2.1883 / 1.06108  # nats per token of one bit per byte, on that data

LOG = """run x, preset records/x, stages train,quantize,eval, files in logs/x
knobs that are not default:
  DATA_PATH=data/caseops  (environment)
  EVAL=phased_lora  (records/x)
  SEED={seed}  (environment)
parameters 35945671
source sha256 abc
python 3.12.1, torch 2.13.0+cu130, numpy 2.4.6; 8 x cuda, NVIDIA H100 80GB HBM3, activations torch.bfloat16, threads 8
RESULT {result}
"""


def result_of(seed: int, bpb: float) -> dict[str, Any]:
    result = {"preset": "records/x", "seed": seed, "legal": True, "source_sha256": "abc"}
    result |= {"val_loss": bpb * NATS, "val_bpb": bpb, "tokens_scored": 47_851_520, "bytes_scored": 151_074_499}
    result |= {"train_seconds": 596.0 + seed % 3, "train_steps": 4900 + seed % 7, "eval_seconds": 455.5}
    result |= {"bytes_code": 33_000, "bytes_total": 15_950_000 + seed, "artifact": "artifact.pyz"}
    scores = {"pre_quant": bpb + 0.004, "quantized": bpb + 0.0125}
    return result | {"stages": {name: {"val_bpb": score} for name, score in scores.items()} | {"final": {}}}


def write_run(folder: Path, seed: int, bpb: float, knobs: str = "EVAL=phased_lora\n", **changes: Any) -> Path:
    run = folder / f"x_seed{seed}"
    run.mkdir()
    result = result_of(seed, bpb) | changes
    (run / "result.json").write_text(json.dumps(result))
    (run / "record.env").write_text(knobs + f"SEED={seed}\n")
    (run / "log.txt").write_text(LOG.format(seed=seed, result=json.dumps(result)))
    return run


@pytest.fixture
def record(tmp_path: Path) -> Path:
    folder = tmp_path / "records" / "track_10min_16mb" / "2026-05-01_Ours"
    folder.mkdir(parents=True)
    (folder / "record.env").write_text("EVAL=phased_lora\n")
    (folder / "README.md").write_text(f"# Ours\n\nWhy.\n\n{submit.BEGIN}\nold\n{submit.END}\n\n## After\n")
    (folder / "submission.json").write_text(json.dumps({"name": "Ours", "author": "A", "val_bpb": None, "seeds": []}))
    return folder


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    rows = {str(s): {"val_bpb": b, "val_loss": b * NATS} for s, b in PUBLISHED.items()}
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps({"name": "PR 1855", "val_bpb": 1.06108, "seed_results": rows}))
    return path


def submitted(record: Path, *runs: object, options: tuple[str, ...] = ()) -> dict[str, Any]:
    """submission.json after these runs."""
    assert submit.main([str(record), "--runs", *map(str, runs), *options]) == 0
    return json.loads((record / "submission.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def runs_of(tmp_path: Path, shift: float) -> list[str]:
    return [str(write_run(tmp_path, seed, bpb + shift)) for seed, bpb in PUBLISHED.items()]


def test_a_submission_from_three_seeds(record: Path, theirs: Path, tmp_path: Path) -> None:
    options = ("--against", str(theirs), "--blurb", "Said now.")
    found = submitted(record, *runs_of(tmp_path, -0.004), options=options)
    ours, other = np.array(list(PUBLISHED.values())) - 0.004, np.array(list(PUBLISHED.values()))
    assert found["name"] == "Ours" and found["author"] == "A" and found["blurb"] == "Said now."
    assert found["val_bpb"] == pytest.approx(ours.mean()) and found["val_bpb_std"] == pytest.approx(ours.std(ddof=1))
    assert found["seeds"] == [0, 42, 1234] and set(found["seed_results"]) == {"0", "42", "1234"}
    assert found["bytes_total"] == 15_951_234 and found["hardware"] == "8 x cuda, NVIDIA H100 80GB HBM3"
    assert found["pytorch_version"] == "2.13.0+cu130" and all(found["compliance"].values())
    row = found["seed_results"]["42"]
    assert row["train_wallclock_ms"] == 596_000 and row["step_avg_ms"] == pytest.approx(596_000 / row["steps"])
    c = found["comparison"]
    assert c["welch_p_bpb"] == pytest.approx(stats.ttest_ind(ours, other, equal_var=False, alternative="less").pvalue)
    assert c["delta_nats_per_token"] == pytest.approx(-0.004 * NATS) and c["common_seeds"] == ["0", "1234", "42"]
    margin = stats.ttest_ind(ours * NATS, other * NATS - 0.005, equal_var=False, alternative="less").pvalue
    assert c["welch_p_margin"] == pytest.approx(margin)
    assert c["progression"] is True and c["readme_rule"] is bool(margin < 0.01) is False
    readme = (record / "README.md").read_text()
    assert "old" not in readme and readme.startswith("# Ours\n\nWhy.") and readme.endswith("## After\n")
    assert f"**{ours.mean():.5f}**" in readme and "Progression at p < 0.25: yes" in readme
    assert matplotlib.image.imread(record / "seeds.png").shape[:2] == (480, 840)


def test_writing_again_changes_nothing(record: Path, tmp_path: Path) -> None:
    runs = runs_of(tmp_path, 0.0)
    first, before = submitted(record, *runs), contents(record)
    second, after = submitted(record, *reversed(runs)), contents(record)
    assert before.keys() == after.keys() and before["README.md"] == after["README.md"]
    assert first["seed_results"] == second["seed_results"]


def test_logs_alone_are_enough(record: Path, tmp_path: Path) -> None:
    runs, logs = runs_of(tmp_path, 0.0), []
    for number, run in enumerate(runs):
        # Knobs that say where a run happens may differ from seed to seed.
        local = "".join(f"  {name.upper()}={number}  (environment)\n" for name in train_gpt.LOCAL_KNOBS)
        text = (Path(run) / "log.txt").read_text()
        logs.append(tmp_path / f"{Path(run).name}.log")
        logs[-1].write_text(text.replace("  EVAL=", local + "  EVAL="))
        assert submit.read_run(logs[-1]).knobs == {"EVAL": "phased_lora"}
    assert submitted(record, *runs)["seed_results"] == submitted(record, *logs)["seed_results"]


def test_seeds_of_different_things_and_broken_files_are_refused(
    record: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    def refuse(message: str, *runs: Path) -> None:
        refused(message, submit.main, record, "--runs", *runs)

    before = contents(record)
    one, two = write_run(tmp_path, 1, 1.06), write_run(tmp_path, 2, 1.06)
    for change, message in (
        ({"knobs": "EVAL=phased_lora\nTTT_LORA_RANK=80\n"}, "not one configuration: TTT_LORA_RANK (default and 80)"),
        ({"source_sha256": "other"}, "ran different sources"),
        ({"tokens_scored": 1}, "scored different data (tokens_scored)"),
        ({"stages": {}}, "no final score"),
    ):
        shutil.rmtree(two)
        refuse(message, one, write_run(tmp_path, 2, 1.06, **change))
    refuse("a seed of its own", one, one)
    shutil.rmtree(two)
    log = (write_run(tmp_path, 2, 1.06) / "log.txt").read_text()
    (two / "log.txt").write_text(log.replace("8 x cuda", "1 x cuda"))
    refuse("different machines", one, two)
    refuse("give a run folder or its log", tmp_path / "nowhere")
    (tmp_path / "cut.log").write_text(log[: log.rindex("}")])
    refuse("its RESULT line is not valid JSON", tmp_path / "cut.log")
    assert contents(record) == before
    (record / "README.md").write_text(f"# x\n{submit.BEGIN}\n")
    refuse("both or none", one)
    (record / "README.md").write_bytes(b"# caf\xe9\n")
    refuse("not UTF-8 text", one)


BAD_RESULTS: list[tuple[dict[str, Any] | bytes, str]] = [  # what changes, or the whole file
    ({"val_bpb": None}, "val_bpb is None"),
    ({"val_bpb": "1.06"}, "val_bpb is '1.06'"),
    ({"val_loss": math.nan}, "val_loss is nan"),
    ({"train_seconds": "long"}, "train_seconds is 'long'"),
    ({"bytes_total": -1}, "bytes_total is -1"),
    ({"stages": [1]}, "stages is no object"),
    ({"stages": {"final": 3}}, "stages is no object"),
    (b"{", "not valid JSON"),
    (b"[1]", "not an object"),
    (b'"x"', "a str"),
    (b"[" * 100_000, "nested more than 50 levels deep"),
    (b'{"a": "\xff"}', "not UTF-8"),
]


def test_damaged_papers_are_one_line_each(
    record: Path, tmp_path: Path, theirs: Path, refused: Callable[..., str]
) -> None:
    run, before = write_run(tmp_path, 1, 1.06), contents(record)
    whole = (run / "result.json").read_bytes()
    for change, message in BAD_RESULTS:
        data = change if isinstance(change, bytes) else json.dumps(json.loads(whole) | change).encode()
        (run / "result.json").write_bytes(data)
        refused(message, submit.main, record, "--runs", run)
    (run / "result.json").write_bytes(whole)
    (run / "record.env").write_text("EVAL=phased_lora\nSEED=one\n")
    refused("SEED=one", submit.main, record, "--runs", run)
    (run / "record.env").write_text("EVAL=phased_lora\nSEED=1\n")
    for paper, message in (
        ({"seed_results": {"1": {"val_loss": 3.0}}, "seeds": [1]}, "seed 1 has no val_bpb"),
        ({"seed_results": [1]}, "seed_results is no object"),
        ({"val_bpb": "low"}, "val_bpb is 'low'"),
    ):
        theirs.write_text(json.dumps(paper))
        refused(message, submit.main, record, "--runs", run, "--against", theirs)
    assert contents(record) == before
    for name, text in (
        ("verdict.json", "[1]"),
        ("verdict.json", json.dumps({"record_sha256": submit.preset_sha256(record), "legal": True, "checks": 5})),
        ("submission.json", '{"val_bpb": "low"}'),
    ):
        (record / name).write_text(text)
        refused(name, submit.main, "--leaderboard", "--records", tmp_path / "records")
        (record / name).unlink()


def test_evaluations_of_one_training_are_no_seeds(record: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    words = "are one training, not two seeds"
    before = contents(record)
    one, two = write_run(tmp_path, 1, 1.06, train_loss=2.5), write_run(tmp_path, 2, 1.061, train_loss=2.6)
    for run in (one, two):
        (run / "model.bin").write_bytes(b"the same weights")
    refused(words, submit.main, record, "--runs", one, two)
    assert contents(record) == before
    (two / "model.bin").write_bytes(b"other weights")
    submitted(record, one, two)
    logs = [  # logs alone: one training's numbers under two seeds
        (write_run(tmp_path, seed, 1.06, train_seconds=596.25, train_loss=2.5) / "log.txt").rename(tmp_path / f"{seed}")
        for seed in (4, 7)
    ]
    refused(words, submit.main, record, "--runs", *logs)


def test_statistics_where_little_is_known() -> None:
    one = {"seed_results": {"1": {"val_bpb": 1.05, "val_loss": 2.1}}, "val_bpb": 1.05}
    mean_only = {"comparison_baseline_bpb": 1.06}
    found = submit.compare(one, mean_only, "x")
    assert found["delta_bpb"] == pytest.approx(-0.01) and found["welch_p_bpb"] is None
    assert found["progression"] is None and found["readme_rule"] is None and found["delta_nats_per_token"] is None
    two = {"seed_results": {"1": {"val_bpb": 1.05}, "2": {"val_bpb": 1.052}}}
    p = stats.ttest_1samp([1.05, 1.052], 1.06, alternative="less").pvalue
    assert submit.compare(two, mean_only, "x")["welch_p_bpb"] == pytest.approx(p)
    with pytest.raises(submit.UserError, match="no val_bpb"):
        submit.compare(one, {"name": "empty"}, "empty")
    assert submit.welch([1.0, 1.0], [2.0, 2.0]) is None and submit.sample_std([1.0]) is None


def test_paired_needs_common_seeds_and_sees_what_welch_does_not() -> None:
    rng = np.random.default_rng(3)
    theirs = {str(s): float(x) for s, x in enumerate(rng.normal(1.06, 0.002, 6))}
    ours = {s: x - 0.0005 + float(rng.normal(0, 1e-4)) for s, x in theirs.items()}
    assert submit.paired(ours, theirs) < 0.01 < submit.welch(list(ours.values()), list(theirs.values()))
    expected = stats.ttest_rel(list(ours.values()), list(theirs.values()), alternative="less").pvalue
    assert submit.paired(ours, theirs) == pytest.approx(expected)
    assert submit.paired(ours, {"other": 1.0}) is None


def test_readme_rule_is_the_margin_and_not_the_difference() -> None:
    losses = {str(s): 2.19 + 0.001 * s for s in range(3)}
    theirs = {s: {"val_loss": loss, "val_bpb": loss / NATS} for s, loss in losses.items()}
    # ours has longer tokens, as fused pairs are: its own losses per token cannot be compared
    for shift, verdict in ((-0.0049, False), (-0.006, False), (-0.015, True)):
        ours = {s: loss + shift for s, loss in losses.items()}
        rows = {s: {"val_loss": loss * 1.09, "val_bpb": loss / NATS} for s, loss in ours.items()}
        found = submit.compare({"seed_results": rows}, {"seed_results": theirs}, "x")
        assert found["readme_rule"] is verdict and math.isclose(found["delta_nats_per_token"], shift, rel_tol=1e-9)


def test_numbers_over_the_limits_are_not_called_compliant(record: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, 1, 1.0, bytes_total=16_000_001, train_seconds=601.2, eval_seconds=617.0, legal=False)
    assert [name for name, kept in submitted(record, run)["compliance"].items() if kept] == ["no_slot"]


def test_a_run_of_another_record_an_unpacked_one_and_odd_names(
    record: Path, theirs: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    for folder in "abcd":
        (tmp_path / folder).mkdir()
    foreign = write_run(tmp_path / "a", 1, 1.0, "EVAL=plain\nMATRIX_LR=0.02\n")
    refused("no run of", submit.main, record, "--runs", foreign)
    same = [write_run(tmp_path / "b", seed, 1.0 + seed, model_sha256="f" * 64) for seed in (1, 2)]
    refused("final scores are of the same weights", submit.main, record, "--runs", *same)
    found = submitted(record, write_run(tmp_path / "c", 1, 1.0, artifact=None))
    assert found["bytes_total"] is None and found["compliance"]["artifact_under_16mb"] is None
    theirs.write_text(theirs.read_text().replace("PR 1855", "$a_{$"))
    run = write_run(tmp_path / "d", 1, 1.0)
    submitted(record, run, options=("--name", "A | $b_{$", "--against", str(theirs)))
    assert all(row.count("|") == 8 for row in submit.leaderboard(record.parents[1]).splitlines() if "b_{" in row)
    before = (record / "README.md").read_text()
    (record / "README.md").write_text(f"{submit.END}\n{submit.BEGIN}\nimportant\n")
    refused("in front of", submit.main, record, "--runs", run)
    (record / "README.md").write_text(before)
    for wrong in (("--check",), ("--leaderboard",)):
        with pytest.raises(SystemExit):
            submit.main([str(record), "--runs", str(run), *wrong])


def test_leaderboard_of_records(record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = tmp_path / "records"
    board = ["--leaderboard", "--records", str(records)]
    assert submit.main([*board, "--check"]) == 1 and "out of date" in capsys.readouterr().err
    assert submit.main(board) == 0 and submit.main([*board, "--check"]) == 0
    text = (records / "README.md").read_text()
    assert "[Ours](track_10min_16mb/2026-05-01_Ours) | - | not run at full size | - | - | - | not judged |" in text
    submitted(record, *runs_of(tmp_path, 0.0))
    verdict = {"legal": False, "scale": "toy", "checks": [{"name": "C1 token", "status": "FAIL"}]}
    (record / "verdict.json").write_text(json.dumps(verdict))
    assert "judged before its knobs changed" in submit.leaderboard(records)
    digest = submit.preset_sha256(record)
    (record / "verdict.json").write_text(json.dumps(verdict | {"record_sha256": digest}))
    text = submit.leaderboard(records)
    assert "1.06108 ± 0.00111 (3 seeds) | 15,951,234 | 596.3 | 455.5 | NOT legal (toy size; C1 token) |" in text
    assert submit.main([*board, "--check"]) == 1


def test_the_committed_leaderboard_is_up_to_date() -> None:
    assert submit.main(["--leaderboard", "--check"]) == 0


def test_every_records_template_can_be_filled_in(tmp_path: Path) -> None:
    for source in RECORDS:
        folder = Path(shutil.copytree(source, tmp_path / source.name))
        (folder / "runs").mkdir()
        knobs = train_gpt.record_env(train_gpt.load_config({"PRESET": str(source)}))
        filled = submitted(folder, write_run(folder / "runs", 7, 1.2, knobs))
        template = json.loads((source / "submission.json").read_text())
        assert template.keys() <= filled.keys() and filled["val_bpb"] == 1.2 and filled["name"] == template["name"]
