"""inspect: every byte is accounted for, no damaged byte passes, and a run's errors are those of its weights."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import Done, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pack_artifact import STAND_IN

import pack_artifact
import train_gpt
from records import tensor_losses

# pergroup needs lrzip, which not every machine has
CODECS = [codec for codec in train_gpt.CODECS if codec != "pergroup" or shutil.which("lrzip")]


def parts_of(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Stored tensors of two layers, an embedding and a gate, as quantisation names them."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> dict[str, torch.Tensor]:
        q = (torch.randn(rows, columns, generator=generator) * 5).round().clamp(-31, 31).to(torch.int8)
        return {"q": q, "s": torch.rand(rows, generator=generator).half() + 0.1}

    shapes = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
    shapes |= {"up": (64, 32), "down": (32, 64)}
    found = {f"blocks.{i}.{role}:{role}:gptq": matrix(*shape) for i in range(2) for role, shape in shapes.items()}
    return found | {"tok_emb.weight:embed:gptq": matrix(80, 32), "skips.gates:shut:fp16": {"w": torch.rand(32).half()}}


def write_run(folder: Path, codec: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_bytes(train_gpt.pack_stored(stored(parts_of()), codec))
    (folder / "record.env").write_text("SEED=7\n")
    (folder / "result.json").write_text(json.dumps({"preset": "records/small"}))
    (folder / "program.py").write_text(STAND_IN)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed run whose program is a few lines; `inspect` reads its weights by the real one."""
    folder = write_run(tmp_path_factory.mktemp("inspect") / "run", "brotli")
    for options in ((), ("--format", "split")):
        assert pack_artifact.main(["pack", str(folder), "--source", str(folder / "program.py"), *options]) == 0
    return folder


def inspect(capsys: pytest.CaptureFixture[str], *argv: object) -> dict:
    capsys.readouterr()
    code, (out, err) = pack_artifact.main(["inspect", *map(str, argv)]), capsys.readouterr()
    assert code == 0, err
    return json.loads(out.splitlines()[-1].removeprefix("INSPECT ")) | {"text": out}


# Bytes


def test_every_codec_is_accounted_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for codec in CODECS:
        path = write_run(tmp_path / codec, codec) / "model.bin"
        report, blob = inspect(capsys, path), path.read_bytes()
        assert report["bytes_total"] == report["bytes_model"] == len(blob), codec
        streams = sum(row["bytes"] for row in report["streams"])
        assert 0 <= len(blob) - streams <= train_gpt.ARTIFACT_HEADER.size + 1 + 4 * len(report["streams"]), codec
        assert abs(sum(row["bytes"] for row in report["arrays"]) - streams) <= len(report["arrays"]), codec
        assert report["quantised_weights"] == sum(p["q"].numel() for p in parts_of().values() if "q" in p), codec
        assert report["bits_per_weight"] == pytest.approx(8 * len(blob) / report["quantised_weights"]), codec
        arrays = {(row["role"], row["part"]): row for row in report["arrays"]}
        assert arrays[("q", "symbols")]["items"] == 2 * 32 * 32 and arrays[("q", "symbols")]["arrays"] == 2, codec
        assert arrays[("up", "scales")]["items"] == 128 and ("shut", "other") in arrays, codec


@settings(max_examples=50)
@given(st.lists(st.integers(-128, 127), max_size=200), st.sampled_from([np.int8, np.int16, np.float16]))
def test_entropy_of_arrays(values: list[int], kind: type) -> None:
    array = np.array(values).astype(kind)
    bits = pack_artifact.entropy_bits(array)
    raw = array.tobytes()
    items = {raw[i : i + array.itemsize] for i in range(0, len(raw), array.itemsize)}
    assert 0 <= bits <= 8 * array.nbytes + 1e-9 and (bits < 1e-9) == (len(items) <= 1)
    if kind is np.int8 and values:
        counts = [values.count(value) for value in set(values)]
        assert bits == pytest.approx(sum(-n * math.log2(n / len(values)) for n in counts), abs=1e-6)


def test_entropy_of_stored_parts() -> None:
    q = torch.tensor([[-3, -3, 5, 5], [0, 0, 7, 7]], dtype=torch.int8).repeat(8, 1)
    assert tensor_losses.entropy_bytes({"q": q, "s": torch.ones(16).half()}) == 64 * 2 // 8 + 32
    assert tensor_losses.entropy_bytes({"q": torch.zeros(4, 4, dtype=torch.int8)}) == 0
    assert tensor_losses.entropy_bytes({"w": torch.zeros(4).half()}) == 8
    counts = {2: 8, -2: 8, 1: 16, 3: 8, 5: 8}  # in a trellis the even ones cost a bit, the odd ones 1.5
    q = torch.tensor([value for value, count in counts.items() for _ in range(count)], dtype=torch.int8)
    assert tensor_losses.entropy_bytes({"q": q, "t": torch.zeros(2, dtype=torch.int16)}) == 4 + (16 + 48) // 8


def test_bytes_of_the_lqer_correction_at_full_size_and_as_published() -> None:
    for rows, cols, published in ((8192, 512, 34_882), (2048, 512, 10_306)):
        parts = {"q": torch.zeros(rows, cols, dtype=torch.int8)}
        parts |= train_gpt.encode_lqer(torch.randn(rows, cols), train_gpt.Config())
        packed = 4 * rows // 4 + 4 * cols // 2 + 2 + 2 * 32
        (row,) = tensor_losses.lqer_rows(stored({"x:up:gptq+lqer": parts, "y:shut:fp16": {"w": torch.zeros(2)}}))
        assert list(row.values()) == [1, packed + parts["lqm"].nbytes, published]
    assert tensor_losses.lqer_rows(stored({"y:shut:fp16": {"w": torch.zeros(2)}})) == []


def test_parts_sections_bound_and_picture(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = inspect(capsys, run / "artifact.pyz", "--source", run / "program.py", "--png", tmp_path / "i.png")
    assert sum(report["parts"].values()) == report["bytes_total"] == (run / "artifact.pyz").stat().st_size
    assert report["headroom"] == 16_000_000 - report["bytes_total"]
    source = pack_artifact.read_packed(run / "artifact.pyz").source.decode()
    assert sum(row["minified"] for row in report["sections"]) == len(source)
    assert abs(sum(row["bytes"] for row in report["sections"]) - report["parts"]["code"]) <= len(report["sections"])
    assert "preset small; hashes match" in report["text"] and "order-0 entropy" in report["text"]
    assert matplotlib.image.imread(tmp_path / "i.png").shape[:2] == (660, 1650)
    bound = pack_artifact.entropy_bits(parts_of()["tok_emb.weight:embed:gptq"]["q"].numpy()) / 8
    row = next(row for row in report["streams"] if row["stream"] == "embed")
    assert row["bound"] == round(bound) and row["over_bound"] == pytest.approx(row["bytes"] / bound - 1)
    split = inspect(capsys, run / "submission")
    assert split["bytes_total"] == sum(p.stat().st_size for p in (run / "submission").iterdir())
    assert split["streams"] == report["streams"] == inspect(capsys, run)["streams"]


# Damage


# a bare model.bin: tests/test_artifact.py
@pytest.mark.parametrize("name", ["artifact.pyz", "submission/train_gpt.py", "submission/model.bin"])
@settings(max_examples=60)
@given(data=st.data())
def test_no_changed_or_missing_byte_passes(
    run: Path, tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    whole = (run / name).read_bytes()
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    flipped = whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
    damaged = data.draw(st.sampled_from([flipped, whole[:at], whole + b"\0", whole[:at] + whole[at + 1 :]]))
    folder = tmp_path_factory.mktemp("damaged")
    target = folder / Path(name).name
    if name.startswith("submission"):
        for other in (run / name).parent.glob("*"):
            (folder / other.name).write_bytes(other.read_bytes())
    target.write_bytes(damaged)
    with pytest.raises(train_gpt.UserError):
        _, blob, _ = pack_artifact.read_any(folder if name.startswith("submission") else target)
        pack_artifact.read_streams(blob, "artifact")


def test_what_cannot_be_read_is_one_line(
    run: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, bad = (run / "artifact.pyz").read_bytes(), tmp_path / "bad.pyz"
    for at in (3, 20, 40, 300, len(whole) - 400, len(whole) - 30, len(whole) - 1):
        bad.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        refused("", pack_artifact.main, "inspect", bad)
    bad.write_bytes(whole.replace(b"-truncated\n", b"-shortened\n"))
    refused("another version of the packer", pack_artifact.main, "inspect", bad)
    refused("no model blob", pack_artifact.main, "inspect", tmp_path)
    if "pergroup" in CODECS:  # else no such blob can be made here
        blob = write_run(tmp_path / "run", "pergroup") / "model.bin"
        monkeypatch.setenv("PATH", str(tmp_path))
        refused("lrzip", pack_artifact.main, "inspect", blob)


# A run


def test_a_run_is_inspected_against_its_own_weights(
    run_gpt: Callable[..., Done], refused: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    knobs = {"REPAIR": "lqer", "AWQ_LITE_ENABLED": 1, "AWQ_LITE_GROUP_SIZE": 8, "GATED_ATTN_QUANT_GATE": 1}
    done = run_gpt(**knobs, ITERATIONS=3, WARMUP_STEPS=0, EVAL="plain")
    counts = done.out.rpartition("stored tensors: ")[2].splitlines()[0].split(", ")
    assert {"1 awq_lite", "3 gptq+lqer", "5 int8_row"} <= set(counts), counts

    folder = done.folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    tsv, png = tmp_path / "t.tsv", tmp_path / "i.png"
    report = inspect(capsys, "--run", folder, "--probe", "--tsv", tsv, "--png", png)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "a run is only read"
    state = torch.load(folder / "model.pt", weights_only=True)["model"]
    hessians = torch.load(folder / "hessians.pt", weights_only=True)
    decoded = train_gpt.load_artifact(folder / "model.bin")
    rows = {row["tensor"]: row for row in report["tensors"]}
    assert rows.keys() == state.keys()
    for name, row in rows.items():
        weight, error = state[name].double(), state[name].double() - decoded[name].double()
        power = weight.square().sum().item()
        assert row["weights"] == weight.numel()
        lost = error.square().sum().item() / (power or 1)
        assert (row["relative_error"] or 0) == pytest.approx(lost, rel=1e-4, abs=1e-12), name
        if name in hessians:
            H = hessians[name].double()
            seen, whole = (torch.trace(x @ H @ x.T).item() for x in (error, weight))
            assert row["hessian_weighted_error"] == pytest.approx(seen / whole, rel=1e-3) and 0 < seen < 0.2 * whole
            assert row["entropy_bytes"] < row["raw_bytes"], name
        else:
            assert row["hessian_weighted_error"] is None
    streams = sum(row["bytes"] for row in report["streams"])
    assert 0 < streams - sum(row["bytes"] for row in report["tensors"]) < 0.2 * streams, "all but the index"
    for key in ("weights", "raw_bytes", "entropy_bytes"):
        assert sum(row[key] for row in report["roles"]) == sum(row[key] for row in report["tensors"]), key

    assert report["lqer"][0]["lqer_tensors"] == sum(row["stored"].endswith("+lqer") for row in report["tensors"]) == 3
    header, *lines = tsv.read_text().splitlines()
    assert len(lines) == len(rows) and {line.count("\t") for line in [header, *lines]} == {8}
    assert "\tint8_row\t" in tsv.read_text() and "+lqer\t" in tsv.read_text()
    assert matplotlib.image.imread(png).shape[:2] == (660, 1650), "streams, arrays and roles; no packed code"
    kinds = [row["probe"].split(" ")[0] for row in report["probe"]]
    assert kinds.count("AWQ-lite") == 1 and kinds.count("clip") >= 2 and "AWQ-lite from columns" in report["text"]
    assert all(row["error_ratio"] < 1 for row in report["probe"] if row["probe"].startswith("AWQ"))

    other = {name: weight.flip(0) for name, weight in state.items()}
    torch.save({"model": other}, folder / "model.pt")
    refused("other weights than model.pt has", pack_artifact.main, "inspect", "--run", folder)
    torch.save(other, folder / "model.pt")
    refused("model.pt lacks model", pack_artifact.main, "inspect", "--run", folder)
    torch.save({"model": other}, folder / "model.pt")
    (folder / "hessians.pt").unlink()
    refused("hessians.pt is missing", pack_artifact.main, "inspect", "--run", folder)
