"""The doctor: a whole page on this machine, every judgement from fed measurements, projections against simulations."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import KNOBS, LAUNCHER, RECORDS, ROOT, TINY

import train_gpt
from records import doctor, rehearsal
from records.doctor import FAIL, NOT_HERE, OK, WARN, Finding, Page, Row
from records.rehearsal import Published, Rehearsal, Sample
from train_gpt import Config, UserError

GPU_ROWS = ("nccl", "attention", "kernels", "bandwidth", "matmul", "clocks", "memory")
FOUND = Rehearsal(100.0, 150.0, 30.0, 5.0, 40.0, 20.0, 10.0, Sample(64, 640, 1000, 9000), 41_000, 90.0)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER | KNOBS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def tiny_preset(tmp_path: Path) -> Path:
    """A record folder that trains in seconds on tiny_data."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    lines = "".join(f"{name}={value}\n" for name, value in TINY.items())
    (folder / "record.env").write_text(lines.replace("ITERATIONS=8", "ITERATIONS=500"))
    return folder


def page_of(room: Path, **knobs: Any) -> Page:
    return Page(Config(**knobs), room, disk_mib=1)


def found(check: Callable[[Page], Finding], page: Page) -> Finding:
    return doctor.examine(Row("x", "", check), page)


# The page


def test_a_whole_page_with_twenty_steps_on_two_ranks(
    tiny_preset: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    room, out = tmp_path / "room", tmp_path / "page.json"
    words = ["--data", tiny_data, "--preset", tiny_preset, "--price", 36, "--ranks", 2, "--room", room, "--out", out]
    assert doctor.main([*map(str, words), "--disk-mib", "1"]) == 0, capsys.readouterr().out
    lines, page = capsys.readouterr().out.splitlines(), json.loads(out.read_text())
    # one line a check and a summary; the folder of the steps is gone
    assert len(lines) == len(doctor.ROWS) + 1 and not list(room.iterdir())
    checks = {check["name"]: check for check in page["checks"]}
    for row, line in zip(doctor.ROWS, lines, strict=False):
        check = checks[row.name]
        assert line == doctor.line_of(row.name, Finding(check["status"], check["found"], check["fix"]))
        assert check["status"] == NOT_HERE if row.name in GPU_ROWS else check["status"] != FAIL, line
    for name in ("data", "ranks", "steps", "budget", "evaluation", "cost"):
        assert checks[name]["status"] == OK, checks[name]
    steps = page["steps"]
    assert steps["before_ms"] > 0 and steps["looped_ms"] > 0 and steps["scoring"] > 0 and steps["quantisation"] > 0
    assert 0 < steps["sample"]["documents"] < steps["sample"]["of"] == 7 and page["counts"][FAIL] == 0
    assert "ITERATIONS=500" in checks["budget"]["found"] and "EVAL=doc_lora" in checks["evaluation"]["found"]


def test_a_check_that_raises_is_a_line_and_what_is_missing_is_never_ok(tmp_path: Path) -> None:
    def broken(page: Page) -> Finding:
        raise ZeroDivisionError("by zero\nand more")

    lines: list[str] = []
    rows = [
        Row("bad", "", broken, "mend it"),
        Row("gone", "gpu data", broken),
        Row("good", "", lambda page: Finding(OK, "x")),
    ]
    page = doctor.print_page(page_of(tmp_path), rows, lines.append)
    assert lines[:3] == [
        "FAIL      bad          ZeroDivisionError: by zero  -> mend it",
        "not here  gone         no GPU",
        "OK        good         x",
    ]
    assert page["counts"] == {OK: 1, WARN: 0, FAIL: 1, NOT_HERE: 1}
    json.dumps(page, allow_nan=False)


def test_command_lines_that_cannot_be(
    refused: Callable[..., str], tiny_preset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "0 is not a whole number from 1 up": ("--ranks", 0),
        "-1 is no price": ("--price=-1",),
        "unrecognized arguments: --nonsense": ("--nonsense",),
        "no record.env there": ("--preset", "nowhere"),
        "--ranks 3 does not divide BATCH_SLICES=4": ("--preset", tiny_preset, "--ranks", 3),
    }
    cases["there is no folder"] = ("--out", tiny_preset / "none" / "page.json")
    for words, argv in cases.items():
        refused(words, doctor.main, *argv)
    monkeypatch.setenv("MATRIX_LR", "fast")
    refused("MATRIX_LR='fast'", doctor.main)
    monkeypatch.delenv("MATRIX_LR")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "print_page", interrupt)
    assert doctor.main([]) == 130 and capsys.readouterr().err == doctor.INTERRUPTED + "\n"


def test_exit_status_and_json_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for status, code in ((OK, 0), (WARN, 0), (FAIL, 1)):
        monkeypatch.setattr(doctor, "ROWS", (Row("x", "", lambda page, status=status: Finding(status, "y", "z")),))
        assert doctor.main(["--json"]) == code
        assert json.loads(capsys.readouterr().out)["checks"] == [
            {"name": "x", "status": status, "found": "y", "fix": "z"}
        ]
    doctor.main([])
    assert json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("DOCTOR "))["counts"][FAIL] == 1


# Judgements


def card(changes: dict[str, str] | None = None) -> dict[str, str]:
    row = {"name": "NVIDIA H100", "memory.total": "81559", "memory.used": "4", "power.limit": "700.00"}
    row |= {"power.default_limit": "700.00", doctor.ECC: "0", "mig.mode.current": "Disabled"}
    return row | (changes or {})


def clock(mask: str, mhz: str = "1700") -> dict[str, str]:
    row = {"clocks.sm": mhz, "clocks.max.sm": "1980", "power.draw": "690.1", "temperature.gpu": "61"}
    return row | {"clocks_event_reasons.active": mask}


GOOD = {"fa2": 0.004, "fa3": "no module", "fa4": 0.004, "sdpa flash": 0.003}
PINS = {"torch": "2.13.0", "numpy": "2.4.6"}
REDUCED = {"good": True, "ranks": 8, "gb_a_second": 400.0}
CASES: tuple[tuple[Finding, str, str], ...] = (
    (doctor.judge_packages("3.12.1", PINS, {"torch": "2.13.0+cu130", "numpy": "2.4.6"}), OK, "2 packages"),
    (doctor.judge_packages("3.12.1", PINS, {"torch": "2.13.0", "numpy": "2.4.5"}), WARN, "numpy 2.4.5 (2.4.6)"),
    (doctor.judge_packages("3.12.1", PINS, {"torch": "2.13.0"}), WARN, "numpy missing (2.4.6)"),
    (doctor.judge_packages("3.10.9", PINS, PINS), FAIL, "3.11 or newer"),
    (doctor.judge_torch("2.13.0+cpu", None, 0, 0), OK, "without CUDA"),
    (doctor.judge_torch("2.13.0+cu130", "13.0", 8, 8), OK, "8 GPUs"),
    (doctor.judge_torch("2.13.0+cpu", None, 8, 0), FAIL, "nvidia-smi lists 8"),
    (doctor.judge_torch("2.13.0+cu130", "13.0", 8, 0), FAIL, "driver 580"),
    (doctor.judge_torch("2.10.1", "13.0", 0, 0), FAIL, "2.11"),
    (doctor.judge_driver("580.65.06"), OK, "580"),
    (doctor.judge_driver("570.1"), WARN, "580 or newer"),
    (doctor.judge_driver("[N/A]"), WARN, "no version"),
    (doctor.judge_card(card(), []), OK, "81,559 MiB"),
    (doctor.judge_card(card({"memory.used": "30000"}), ["7, python, 29000"]), WARN, "7, python, 29000"),
    (doctor.judge_card(card({"power.limit": "500.00"}), []), WARN, "-pl 700"),
    (doctor.judge_card(card({"power.limit": "[N/A]", "power.default_limit": "[N/A]"}), []), OK, "H100"),
    (doctor.judge_card(card({"mig.mode.current": "Enabled"}), []), WARN, "MIG"),
    (doctor.judge_card(card({doctor.ECC: "3"}), []), FAIL, "3 uncorrected"),
    (doctor.judge_clocks(clock("0x0000000000000004")), OK, "1,700 of 1,980 MHz, 690 W, 61 C"),
    (doctor.judge_clocks(clock("0x0000000000000024")), WARN, "throttled: too hot"),
    (doctor.judge_clocks(clock("0x88")), WARN, "hardware slowdown, power brake"),
    (doctor.judge_clocks(clock("0x2", "900")), WARN, "-rac"),
    (doctor.judge_speed("copies", "TB/s", 2.9, 3.35, 0.85), OK, "87 %"),
    (doctor.judge_speed("copies", "TB/s", 2.8, 3.35, 0.85), WARN, "84 %"),
    (doctor.judge_speed("copies", "TB/s", 40.0, 3.35, 0.85), WARN, "no card is that fast"),
    (doctor.judge_speed("matmuls", "TFLOP/s", 100.0, None, 0.65), OK, "no known figure"),
    (doctor.judge_host(16, 99 * doctor.GIB, 8 * doctor.GIB, 8, 1.0), OK, "16 cores"),
    (doctor.judge_host(16, 20 * doctor.GIB, 8 * doctor.GIB, 8, 1.0), WARN, "want 32 GiB"),
    (doctor.judge_host(4, 99 * doctor.GIB, 8 * doctor.GIB, 8, 1.0), WARN, "start fewer"),
    (doctor.judge_host(16, 99 * doctor.GIB, 2**26, 8, 1.0), WARN, "--shm-size"),
    (doctor.judge_host(16, 99 * doctor.GIB, 8 * doctor.GIB, 8, 17.5), WARN, "load 17.5"),
    (doctor.judge_disk(800.0, 10 * doctor.GIB, doctor.GIB), OK, "800 MiB/s"),
    (doctor.judge_disk(800.0, 2 * doctor.GIB, doctor.GIB), WARN, "3 seeds need 3.0 GiB"),
    (doctor.judge_disk(20.0, 10 * doctor.GIB, doctor.GIB), WARN, "local disk"),
    (doctor.judge_disk(800.0, doctor.GIB // 2, doctor.GIB), FAIL, "make room"),
    (doctor.judge_data("t", 47_851_520, 151_074_499, []), OK, "canonical CaseOps denominator"),
    (doctor.judge_data("t", 1, doctor.INVALID_TOTAL, []), FAIL, "INVALID"),
    (doctor.judge_data("t", 1, 2, ["WARNING: no manifest"]), WARN, "no manifest"),
    (doctor.judge_reduce("NCCL", REDUCED), OK, "8 ranks, 400.0 GB/s"),
    (doctor.judge_reduce("NCCL", REDUCED | {"gb_a_second": 20.0}), WARN, "NVLink"),
    (doctor.judge_reduce("gloo", REDUCED | {"gb_a_second": 0.5}), OK, "0.5 GB/s"),
    (doctor.judge_reduce("NCCL", REDUCED | {"good": False}), FAIL, "wrong sum"),
    (doctor.judge_attention(GOOD, 9), OK, "right: fa2, fa4, sdpa flash; not here: fa3 (no module)"),
    (doctor.judge_attention(GOOD | {"fa4": "no module"}, 9), WARN, "flash-attn-4"),
    (doctor.judge_attention(GOOD | {"fa4": "no module"}, 8), OK, "fa2"),
    (doctor.judge_attention(GOOD | {"fa4": 0.5}, 9), FAIL, "WRONG: fa4 off by 0.500"),
    (doctor.judge_attention(GOOD | {"fa4": float("nan")}, 9), FAIL, "WRONG: fa4"),
    (doctor.judge_attention(GOOD | {"fa2": "no kernel image"}, 9), FAIL, "CUDA build"),
    (doctor.judge_kernels({"MLP": 0.003}), OK, "MLP off by 0.0030"),
    (doctor.judge_kernels({"MLP": 0.3}), FAIL, "FUSED_MLP_ENABLED=0"),
    (doctor.judge_kernels({"MLP": "out of shared memory"}), FAIL, "out of shared memory"),
    (doctor.judge_peak(41_000, 81_559), OK, "41,000 of 81,559"),
    (doctor.judge_peak(41_000, 45_000), WARN, "BATCH_SLICES"),
    (doctor.judge_peak(None, 45_000), WARN, "DEVICE=cuda"),
    (doctor.judge_calibration(Config(gptq_reserve_seconds=8.0), FOUND), OK, "8 s reserved"),
    (doctor.judge_calibration(Config(gptq_reserve_seconds=4.0), FOUND), WARN, "GPTQ_RESERVE_SECONDS=6"),
)


def check_cases(cases: Iterable[tuple[Finding, str, str]]) -> None:
    for number, (finding, status, words) in enumerate(cases):
        assert finding.status == status and words in f"{finding.found} -> {finding.fix}", (number, finding)
        assert bool(finding.fix) == (status != OK), finding


def test_judgements() -> None:
    check_cases(CASES)
    known, room, cases = Published(4980, 519.5, 95.0, 139.8), page_of(Path()), []
    for ranks, name, pace, status, words in (
        (8, "NVIDIA H100 80GB HBM3", 95.0, OK, "published 4,980"),
        (8, "NVIDIA H100 80GB HBM3", 120.0, WARN, "look at attention"),
        (8, "NVIDIA H100 PCIe", 120.0, OK, "this is 8 x NVIDIA H100 PCIe"),
        (1, "NVIDIA H100 80GB HBM3", 700.0, OK, "this is 1 x"),
    ):
        room.ranks, room.card, room.rehearsal = ranks, name, FOUND._replace(before_ms=pace, looped_ms=1.47 * pace)
        cases.append((doctor.judge_budget(room, known), status, words))
    room.rehearsal = FOUND
    cases.append((doctor.judge_evaluation(room, known), OK, "about 110 s: 20.0 s to start, and 10.0 s for 64 of 640"))
    room.rehearsal = FOUND._replace(scoring=70.0)
    cases.append((doctor.judge_evaluation(room, None), WARN, "the budget is 600 s"))
    check_cases(cases)


def test_figures_of_cards_and_several_of_them() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H100 NVL": 835,
        "NVIDIA H200": 989,
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA GeForce RTX 4090": 165,
        "NVIDIA L40S": 362,
        "NVIDIA B200": 2250,
    }
    assert {name: doctor.figures_of(name)[1] for name in names} == names
    assert doctor.figures_of("NVIDIA GeForce GTX 1080") is None
    cards = [Finding(OK, "a"), Finding(WARN, "b", "mend b"), Finding(OK, "c"), Finding(WARN, "d", "mend d")]
    assert doctor.worst(cards) == Finding(WARN, "card 1: b (2 of 4 cards)", "mend b")
    assert doctor.worst(cards[:1]) == cards[0]


SMI = r"""#!/bin/sh
case "$*" in
*compute-apps*) echo "4242, /usr/bin/python3, 30000" ;;
*driver_version*) echo "570.124.06" ;;
*clocks_event*) echo 'Field "clocks_event_reasons.active" is not a valid field to query.'; exit 2 ;;
*clocks_throttle*) echo "1155, 1980, 512.40, 88, 0x0000000000000060" ;;
*memory.used*"-i 1") echo "NVIDIA H100 80GB HBM3, 81559, 30100, 700.00, 700.00, 0, Disabled" ;;
*memory.used*) printf 'NVIDIA H100 80GB HBM3, 81559, 3, 700.00, 700.00, [N/A], Disabled\n%.0s' 1 2 ;;
esac
"""


def test_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the program, of an old driver that lacks the newer name of a field."""
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    rows, page = {row.name: row for row in doctor.ROWS}, page_of(tmp_path)
    page.have.add("smi")
    assert doctor.examine(rows["driver"], page)[:2] == (WARN, "driver 570.124.06")
    cards = doctor.examine(rows["cards"], page)
    assert cards == (OK, "card 0: NVIDIA H100 80GB HBM3, 3 of 81,559 MiB used, 700 W (2 of 2 cards)", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    cards = doctor.examine(rows["cards"], page)
    assert cards.status == WARN and "4242, /usr/bin/python3, 30000" in cards.fix
    # the load itself needs a GPU; here there is no card to load
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    clocks = doctor.check_clocks(page)
    assert clocks.status == WARN and "1,155 of 1,980 MHz, 512 W, 88 C; throttled: too hot" in clocks.found
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not talk to the driver'\nexit 9\n")
    failed = doctor.examine(rows["driver"], page)
    assert failed.status == FAIL and "NVIDIA-SMI has failed" in failed.found
    program.write_text("#!/bin/sh\n")
    assert "lists no card" in doctor.examine(rows["driver"], page).found


def test_a_missing_compressor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    record = next(path for path in RECORDS if path.name.endswith("PR1915"))
    page = Page(train_gpt.load_config({"PRESET": str(record)}), tmp_path, str(record))
    finding = found(doctor.check_compressor, page)
    assert finding.status == FAIL and "pergroup" in finding.found and finding.fix == "apt install lrzip"
    # without a preset that wants it, it may never be needed
    page.preset = ""
    assert found(doctor.check_compressor, page).status == WARN
    page.preset, page.cfg = "x", Config(compressor="rans")
    assert found(doctor.check_compressor, page).status == OK


def test_data_that_is_damaged_foreign_or_missing(tmp_path: Path, tiny_data: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(tiny_data, folder)
    shard, train = folder / "fineweb_val_000000.bin", folder / "fineweb_train_000000.bin"

    def look(preset: str = "", **knobs: Any) -> Finding:
        page = page_of(tmp_path, data_path=str(folder), eval_seq_len=64, **knobs)
        page.preset = preset
        finding = found(doctor.check_data, page)
        assert ("data" in page.have) == (finding.status != FAIL and folder.is_dir())
        return finding

    whole = look()
    assert whole.status == OK and "320 pieces; training" in whole.found and "(shards: 1)" in whole.found
    assert "320 pieces, VOCAB_SIZE=8192" in look("x").found and look("x", vocab_size=320).status == OK
    data = shard.read_bytes()
    shard.write_bytes(data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])
    flipped = look()
    assert flipped.status == FAIL and shard.name in flipped.found and "the data again" in flipped.fix
    shard.write_bytes(data)
    train.write_bytes(train.read_bytes()[:-2])
    assert look().status == FAIL and train.name in look().found
    (folder / "manifest.json").unlink()
    assert train.name in look().found
    shutil.copy(tiny_data / train.name, train)
    unlisted = look()
    assert unlisted.status == WARN and "no manifest.json" in unlisted.found and "audit" in unlisted.fix
    next(folder.glob("*.model")).write_bytes(b"none")
    assert look().status == FAIL and "not a SentencePiece model" in look().found
    shutil.rmtree(folder)
    assert look().status == WARN and "download.py" in look().fix and look("x").status == FAIL


def test_attention_and_kernels_are_compared_with_exact_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU fused kernels are their twins and flash attention is refused; a wrong one has to be seen."""
    device = torch.device("cpu")
    errors = doctor.attention_errors(device)
    assert {*errors} == {"fa2", "fa3", "fa4", "sdpa flash", "sdpa efficient", "sdpa cudnn"}
    assert all("needs a GPU" in errors[name] for name in ("fa2", "fa3", "fa4"))
    assert all(isinstance(error, str) or error <= doctor.TOLERANCE for error in errors.values()), errors
    kernels = doctor.kernel_errors(device)
    assert max(kernels.values()) <= doctor.TOLERANCE
    # one that mixes nothing
    monkeypatch.setattr(train_gpt, "choose_attention", lambda cfg, runtime: lambda q, k, v, meta: q)
    assert doctor.judge_attention(doctor.attention_errors(device), 9).status == FAIL
    # one whose gradients alone are not numbers
    inputs = [doctor.noise((8, 8), 0)]
    exact = doctor.exact_values(lambda q: q, inputs)
    assert np.isnan(doctor.error_of(lambda q: q + (0 * q).sqrt(), exact, inputs, device))
    exact = train_gpt.fused_cross_entropy
    monkeypatch.setattr(train_gpt, "fused_cross_entropy", lambda *args: 1.1 * exact(*args))
    assert doctor.judge_kernels(doctor.kernel_errors(device)).status == FAIL


@pytest.mark.gpu
def test_checks_of_a_gpu_run_and_find_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WARN is for slow or shared machines; what only WARNs elsewhere is no fault of the check."""
    page = page_of(tmp_path)
    page.have |= {"gpu"} | ({"smi"} if shutil.which("nvidia-smi") else set())
    page.have |= {"gpus"} if torch.cuda.device_count() > 1 else set()
    for row in doctor.ROWS:
        if row.needs.startswith(("gpu", "smi")) and "preset" not in row.needs:
            finding = doctor.examine(row, page)
            assert finding.status != FAIL, (row.name, finding)


# Twenty steps


def test_pace_and_projections() -> None:
    rows = [{"step": 0, "val_loss": 1.0}]
    for step in range(1, 21):
        # the first steps are slow, and the clock of a row is read before the device has done its step
        seconds = 5.0 + 0.1 * min(step - 1, 10) + 0.15 * max(0, step - 11)
        rows.append({"step": step, "train_loss": 1.0, "seconds": seconds * (step > 1), "looping": step > 10})
    assert rehearsal.pace(rows) == pytest.approx((100.0, 150.0))
    before, looped = rehearsal.pace([row | {"looping": True} for row in rows[:9]])
    assert np.isnan(before) and looped == pytest.approx(100.0)
    # a run by the clock, step after step
    cfg = Config(max_wallclock_seconds=600.0, gptq_reserve_seconds=8.0, enable_looping_at=0.35)
    clock, steps = 0.0, 0
    while clock < 592:
        clock, steps = clock + (0.1 if clock < 0.35 * 592 else 0.15), steps + 1
    assert rehearsal.steps_in(cfg, FOUND) == pytest.approx(steps, abs=2)
    assert rehearsal.training_seconds(cfg, FOUND) == 600
    # by steps: 35 of 100 before looping
    few = Config(max_wallclock_seconds=0.0, iterations=100)
    assert rehearsal.training_seconds(few, FOUND) == pytest.approx(35 * 0.1 + 65 * 0.15 + 5)
    flat = Config(num_loops=0)
    assert rehearsal.steps_in(flat, FOUND._replace(looped_ms=float("nan"))) == pytest.approx(5920)
    # two graphs with 18 more steps of each
    assert rehearsal.warm_up_seconds(cfg, FOUND) == pytest.approx(30 + 18 * 0.25)
    assert rehearsal.evaluation_seconds(FOUND) == pytest.approx(20 + 10 * 9)
    page = Page(cfg, Path(), price=24.0, rehearsal=FOUND)
    assert doctor.check_cost(page).found.startswith(f"${24 * (34.5 + 600 + 40 + 110) / 3600:.2f} a run")


def test_what_is_known_of_records() -> None:
    for record in RECORDS:
        known = rehearsal.published(str(record))
        assert known is not None and 4000 < known.steps < 8000, record
    tilt, carry = (next(str(r) for r in RECORDS if r.name.endswith(end)) for end in ("PR2135", "CarryTTT"))
    assert rehearsal.published(tilt).steps == 4994 and rehearsal.published(carry).steps == 4980


def test_every_record_can_be_rehearsed(tmp_path: Path) -> None:
    """Both routes are stepped, and nothing that is only on late in a run in the steps that count."""
    for record in RECORDS:
        cfg = train_gpt.load_config({"PRESET": str(record)})
        knobs = rehearsal.knobs_of(cfg, FOUND.sample, tmp_path, tmp_path)
        short = train_gpt.load_config({"PRESET": str(record)} | knobs)
        places = [train_gpt.Progress.at(short, step / short.iterations, step) for step in range(short.iterations)]
        looping = [train_gpt.loops(short) and train_gpt.STAGES["looping"](short, now) for now in places]
        assert len(places) == 20 and sum(looping) == (10 if train_gpt.loops(cfg) else 0), record
        late = [
            now.step
            for now in places
            for name in ("ste", "noise")
            if name == cfg.qat and train_gpt.STAGES[name](short, now)
        ]
        assert not [step for step in late if step < 18], (record, late)
        assert short.max_wallclock_seconds == short.eval_budget_seconds == 0 and short.data_path == str(tmp_path)


def test_a_python_without_the_packages_gets_one_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-S", doctor.__file__], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("FAIL      python") and done.stderr.endswith("-> pip install -r requirements.txt\n")


def test_work_is_what_the_program_computes() -> None:
    """Widths of the program's own steps, one document at a time."""
    lengths = [2, 9, 16, 17, 18, 40, 65, 66, 200]
    tokens = np.full(sum(lengths), 5)
    tokens[np.cumsum([0, *lengths[:-1]])] = train_gpt.BOS_ID
    val = train_gpt.ValData(tokens, np.ones(len(tokens), np.int32))
    docs = train_gpt.val_documents(tokens)
    table = (train_gpt.UpTo(20.0, 8), train_gpt.UpTo(float("inf"), 16))
    for sizes in (table, table[1:]):
        cfg = Config(ttt_chunk_size=sizes, ttt_eval_seq_len=64, ttt_batch_size=1)
        counted = [
            sum(step.cells.ids.size for step in train_gpt.batch_steps(cfg, val, docs, [[i]])) for i in range(len(docs))
        ]
        assert rehearsal.work(cfg, np.array([length for _, length in docs]) - 1).tolist() == counted
    predictions = np.array([1, 50])
    for knobs in ({"ttt_context": "carry"}, {"eval": "sliding"}):
        assert rehearsal.work(Config(**knobs), predictions).tolist() == [1, 50]


def test_a_sample_holds_whole_documents_with_their_bytes(caseops_sample: Path, tmp_path: Path) -> None:
    whole = {"data_path": str(caseops_sample), "vocab_size": 400, "eval_seq_len": 64, "eval_include_tail": True}
    cfg = Config(ttt_batch_size=2, ttt_eval_seq_len=64, val_batch_tokens=64, batch_slices=1, **whole)
    everything = train_gpt.load_val(cfg)

    def documents(val: train_gpt.ValData) -> list[tuple]:
        edges = [*np.flatnonzero(val.tokens == train_gpt.BOS_ID), len(val.tokens)]
        pairs = zip(edges, edges[1:], strict=False)
        return [(*val.tokens[a:b], *val.bytes[a + 1 : b]) for a, b in pairs]

    for changes, least in (({}, 2), ({"eval": "chunk_sgd", "ttt_chunk_tokens": 32}, 1)):
        folder = tmp_path / str(least)
        folder.mkdir()
        sampled_cfg = train_gpt.dataclasses.replace(cfg, **changes)
        sample = rehearsal.write_sample(folder, sampled_cfg, 1)
        sampled = train_gpt.load_val(train_gpt.dataclasses.replace(cfg, data_path=str(folder)))
        assert least <= sample.documents == len(documents(sampled)) < sample.of == len(documents(everything))
        assert {*documents(sampled)} < {*documents(everything)} and 0 < sample.work < sample.of_work
        # training text and tokenizer are those of the user
        assert (folder / "fineweb_train_000000.bin").samefile(caseops_sample / "fineweb_train_000000.bin")
        assert train_gpt.find_tokenizer(cfg).name == next(folder.glob("*.model")).name
    # the program finds a tokenizer of any name there
    named = shutil.copy(train_gpt.find_tokenizer(cfg), tmp_path / "words.spm")
    (folder := tmp_path / "named").mkdir()
    rehearsal.write_sample(folder, train_gpt.dataclasses.replace(cfg, tokenizer_path=str(named)), 1)
    assert [path.resolve() for path in folder.glob("*.model")] == [named]


def test_a_run_that_fails_says_why(
    tiny_preset: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = page_of(tmp_path / "room")
    page.preset = str(tiny_preset)
    for words, fix in (("torch.OutOfMemoryError: CUDA out of memory. Tried", "BATCH_SLICES"), ("error: no", "by hand")):

        def fail(*args: object, words: str = words) -> None:
            raise UserError(words)

        monkeypatch.setattr(rehearsal, "rehearse", fail)
        finding = doctor.check_steps(page)
        assert finding.status == FAIL and fix in finding.fix and "steps" not in page.have
    torchrun = (
        "W1126 launcher\n[rank1]:   File x\n[rank1]: torch.OutOfMemoryError: CUDA out of memory\nChildFailedError\n"
    )
    assert rehearsal.last_line(torchrun) == "torch.OutOfMemoryError: CUDA out of memory"
    assert rehearsal.last_line("one\n\ntwo\n") == "two" and rehearsal.last_line("\n") == "no output"
    python = [sys.executable, "-c"]
    with pytest.raises(UserError, match="exit status 3: error: so it is"):
        rehearsal.run_group([*python, "print('error: so it is\\nbye'); raise SystemExit(3)"], {}, 60)
    mark = tmp_path / "alive"
    sleeps = f"import time, pathlib; time.sleep(60); pathlib.Path({str(mark)!r}).touch()"
    with pytest.raises(UserError, match="no end after 0 s"):
        rehearsal.run_group([*python, sleeps], {}, 0.2)
    assert not mark.exists()


def test_ranks_that_share_a_gpu_machine_meet_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    class Met(Exception):
        pass

    def meet(backend: str, **_: object) -> None:
        raise Met(backend)

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(doctor.dist, "init_process_group", meet)
    for asked, backend in (("gloo", "gloo"), ("nccl", "cpu:gloo,cuda:nccl")):
        with pytest.raises(Met, match=f"^{backend}$"):
            doctor.reduce_as_rank(asked)


def test_torchrun_has_time_to_end_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []

    class Process:
        pid = 0

        def wait(self, seconds: float | None) -> None:
            waits.append(seconds)
            if seconds is not None:
                raise subprocess.TimeoutExpired("x", seconds)

    monkeypatch.setattr(rehearsal.os, "killpg", lambda *args: None)
    rehearsal.stop_group(Process())
    # torchrun itself waits 30 seconds for them
    assert waits[0] > 30 and waits[1:] == [None]


# The twenty steps are a sleep here, and the all-reduce is left out.
STOPPED = """
import runpy, sys
from records import rehearsal
run_group = rehearsal.run_group
def stand_in(command, env, seconds):
    if "--as-rank" in command:
        raise rehearsal.UserError("left out")
    return run_group(["sh", "-c", "echo $$ >begun; exec sleep 600"], env, seconds)
rehearsal.run_group = stand_in
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_a_scheduler_that_ends_the_doctor_leaves_nothing(tiny_preset: Path, tiny_data: Path, tmp_path: Path) -> None:
    words = ["--data", tiny_data, "--preset", tiny_preset, "--room", tmp_path / "room", "--disk-mib", "1"]
    command = [sys.executable, "-c", STOPPED, doctor.__file__, *map(str, words)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=env, **streams) as process:
        begun = tmp_path / "begun"
        wait_for(lambda: process.poll() is not None or (begun.exists() and begun.read_text().endswith("\n")))
        assert process.poll() is None and list((tmp_path / "room").iterdir())
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and error.endswith(doctor.INTERRUPTED + "\n"), error
    assert not list((tmp_path / "room").iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not what():
        assert time.monotonic() < until, "too late"
        time.sleep(0.05)


# Scripts of the shell, with a stand-in for Python

INTERPRETER = """#!/bin/bash
echo "$*" >>"$MARKS"
case "$*" in
*hashlib*) echo stamp ;;
"-m venv "*) sleep 1; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
"-m pytest "*) echo $$ >"$MARKS.pid"; exec sleep 600 ;;
train_gpt.py) echo "here: $DATA_PATH $ARTIFACT_DIR ${SCORES:-}" >>"$MARKS" ;;
esac
"""


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    """A program that stands in for Python: it notes its arguments in MARKS."""
    path = tmp_path / "python"
    path.write_text(INTERPRETER)
    path.chmod(0o755)
    # a folder with the names of the repository, where `cd` must not go
    for name in ("tests", "records/demo"):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
    return path


def shell(tmp_path: Path, **knobs: object) -> dict[str, str]:
    """The environment of a script."""
    given = {"MARKS": tmp_path / "marks", "CDPATH": tmp_path / "elsewhere"} | knobs
    return os.environ | {key: str(value) for key, value in given.items()}


def test_two_first_starts_make_one_environment(interpreter: Path, tmp_path: Path) -> None:
    script = "set -euo pipefail; source records/setup_env.sh; echo $ROOT"
    env = shell(tmp_path, PYTHON=interpreter, VENV=tmp_path / "venv")
    command = ["bash", "-c", script]
    both = [subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and out.splitlines()[-1] == str(ROOT), out
    marks = (tmp_path / "marks").read_text()
    assert marks.count("-m venv ") == marks.count(" install ") == 1, marks


def test_paths_of_the_demo_are_seen_from_where_the_user_stands(interpreter: Path, tmp_path: Path) -> None:
    env = shell(tmp_path, PYTHON=interpreter, VENV=tmp_path / "venv", DATA_PATH=".", ARTIFACT_DIR="a", SCORES="s")
    script = ["bash", str(ROOT / "records/demo/run.sh")]
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"here: {tmp_path}/. {tmp_path}/a {tmp_path}/s\n" in (tmp_path / "marks").read_text()


def test_the_gpu_script_starts_anew_and_leaves_nothing_running(interpreter: Path, tmp_path: Path) -> None:
    logs = tmp_path / "out" / "logs"
    logs.mkdir(parents=True)
    for name in ("tests.done", "eager.done"):
        (logs / name).touch()
    (logs / "step.log").write_text("attention: of an earlier run\n")
    (tmp_path / "my data").mkdir()
    env = shell(tmp_path, PY=interpreter, OUT="out", DATA_PATH="my data", PARTS="tests eager", BUDGET=14)
    script = ["bash", os.path.relpath(ROOT / "tests/gpu.sh", tmp_path)]
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert "eager: exit 0 after" in done.stdout and "tests: exit 143 after" in done.stdout, done.stdout + done.stderr
    assert "earlier run" not in done.stdout and (tmp_path / "out" / "logs.tgz").exists()
    assert f"here: {tmp_path}/my data {logs}/eager" in (tmp_path / "marks").read_text()
    pid = int((tmp_path / "marks.pid").read_text())
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
