"""inspect: every byte is accounted for, every codec is read by its own row, and no damaged byte passes."""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pack_artifact
import train_gpt

ROOT = Path(__file__).resolve().parent.parent
SOURCE = """from __future__ import annotations
# +---------+
# | 01 DATA |
# +---------+
import json
TABLE = {"a": 1}
def load(path: str) -> str:
    \"\"\"Gone.\"\"\"
    return json.dumps(TABLE) + path
# +---------+
# | 02 MAIN |
# +---------+
class Run:
    def go(self) -> str: return load("x")
def main(argv: list[str]) -> int:
    print(Run().go())
    return 0
if __name__ == "__main__":
    main([])
"""


def usable(codec: str) -> bool:
    try:
        train_gpt.CODECS[codec].need()
    except train_gpt.UserError:
        return False
    return True


CODECS = [codec for codec in train_gpt.CODECS if usable(codec)]


def parts_of(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Stored tensors of two layers, an embedding and a gate, as quantisation names them."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> dict[str, torch.Tensor]:
        q = (torch.randn(rows, columns, generator=generator) * 5).round().clamp(-31, 31).to(torch.int8)
        return {"q": q, "s": torch.rand(rows, generator=generator).half() + 0.1}

    shapes = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
    found = {f"blocks.{i}.attn.{n}.weight:gptq": matrix(*shape) for i in range(2) for n, shape in shapes.items()}
    hidden = {"up": (64, 32), "down": (32, 64)}
    found |= {f"blocks.{i}.mlp.{n}.weight:gptq": matrix(*s) for i in range(2) for n, s in hidden.items()}
    return found | {"tok_emb.weight:gptq": matrix(80, 32), "skips.gates:fp16": {"w": torch.rand(32).half()}}


def write_run(folder: Path, codec: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    train_gpt.save_artifact(folder / "model.bin", parts_of(), codec)
    (folder / "record.env").write_text("SEED=7\n")
    (folder / "result.json").write_text(json.dumps({"preset": "records/small"}))
    (folder / "program.py").write_text(SOURCE)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed run whose program is a few lines; `inspect` reads its weights by the real one."""
    folder = write_run(tmp_path_factory.mktemp("inspect") / "run", "brotli")
    for options in ((), ("--format", "split")):
        assert pack_artifact.main(["pack", str(folder), "--source", str(folder / "program.py"), *options]) == 0
    return folder


def inspect(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    capsys.readouterr()
    assert pack_artifact.main(["inspect", str(path), *options]) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1].removeprefix("INSPECT ")) | {"text": out}


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_is_accounted_for(codec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", codec)
    report, blob = inspect(folder / "model.bin", capsys), (folder / "model.bin").read_bytes()
    assert report["bytes_total"] == report["bytes_model"] == len(blob)
    streams = sum(row["bytes"] for row in report["streams"])
    assert 0 <= len(blob) - streams <= train_gpt.ARTIFACT_HEADER.size + 1 + 4 * len(report["streams"])
    assert abs(sum(row["bytes"] for row in report["classes"]) - streams) <= len(report["classes"])
    assert report["quantised_weights"] == sum(p["q"].numel() for p in parts_of().values() if "q" in p)
    assert report["bits_per_weight"] == pytest.approx(8 * len(blob) / report["quantised_weights"])
    classes = {(row["class"], row["part"]): row for row in report["classes"]}
    assert classes[("attn.q", "symbols")]["items"] == 2 * 32 * 32 and classes[("attn.q", "symbols")]["arrays"] == 2
    assert classes[("mlp.up", "scales")]["items"] == 128 and ("skips.gates", "other") in classes


def test_the_bound_is_the_order_0_entropy(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, wanted = inspect(run / "artifact.pyz", capsys), 0.0
    for name, parts in parts_of().items():
        if name.startswith("tok_emb"):
            values = np.unique(parts["q"].numpy(), return_counts=True)[1] / parts["q"].numel()
            wanted = -float((values * np.log2(values)).sum()) * parts["q"].numel() / 8
    row = next(row for row in report["streams"] if row["stream"] == "tok_emb")
    assert row["bound"] == round(wanted) and row["over_bound"] == pytest.approx(row["bytes"] / wanted - 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-128, 127), max_size=200), st.sampled_from([np.int8, np.int16, np.float16]))
def test_entropy_of_arrays(values: list[int], kind: type) -> None:
    array = np.array(values).astype(kind)
    bits = pack_artifact.entropy_bits(array)
    assert 0 <= bits <= 8 * array.nbytes + 1e-9 and (bits < 1e-9) == (
        len(np.unique(array.view(np.uint8).reshape(-1, array.itemsize), axis=0)) <= 1 if len(array) else True
    )
    pairs = [values.count(v) for v in set(values)]
    if kind is np.int8 and values:
        assert bits == pytest.approx(sum(-n * math.log2(n / len(values)) for n in pairs), abs=1e-6)


def test_parts_and_sections_add_up(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = ("--source", str(ROOT / "train_gpt.py"))
    report = inspect(run / "artifact.pyz", capsys, *source, "--png", str(tmp_path / "i.png"))
    assert sum(report["parts"].values()) == report["bytes_total"] == (run / "artifact.pyz").stat().st_size
    assert report["headroom"] == 16_000_000 - report["bytes_total"]
    source_bytes = len(pack_artifact.read_artifact(run / "artifact.pyz").source)
    assert sum(row["minified"] for row in report["sections"]) == source_bytes
    assert abs(sum(row["bytes"] for row in report["sections"]) - report["parts"]["code"]) <= len(report["sections"])
    assert "preset small; hashes match" in report["text"] and "order-0 entropy" in report["text"]
    assert matplotlib.image.imread(tmp_path / "i.png").shape[:2] == (660, 1650)
    split = inspect(run / "submission", capsys)
    assert split["bytes_total"] == sum(p.stat().st_size for p in (run / "submission").iterdir())
    assert split["streams"] == report["streams"] and inspect(run, capsys)["streams"] == report["streams"]


def test_sections_come_from_the_definitions(run: Path) -> None:
    parts = pack_artifact.read_artifact(run / "artifact.pyz")
    sections = {s.title: s.minified for s in pack_artifact.packed_sections(parts, run / "program.py")}
    assert "".join(sections.values()) == parts.source.decode()
    assert "TABLE" in sections["01 DATA"] and "class Run" in sections["02 MAIN"] and "def main" in sections["02 MAIN"]


# Damage


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """`inspect` says one line and exits with 2."""
    capsys.readouterr()
    assert pack_artifact.main(["inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1, error
    return error


@pytest.mark.parametrize("name", ["artifact.pyz", "submission/train_gpt.py", "submission/model.bin", "model.bin"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_no_changed_or_missing_byte_passes(
    run: Path, tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    whole = (run / name).read_bytes()
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    damaged = data.draw(
        st.sampled_from(
            [
                whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :],
                whole[:at],
                whole + b"\0",
                whole[:at] + whole[at + 1 :],
            ]
        )
    )
    folder = tmp_path_factory.mktemp("damaged")
    target = folder / Path(name).name
    for other in (run / name).parent.glob("*"):
        if name.startswith("submission"):
            (folder / other.name).write_bytes(other.read_bytes())
    target.write_bytes(damaged)
    subject = folder if name.startswith("submission") else target
    with pytest.raises(pack_artifact.UserError):
        parts, _, blob, _ = pack_artifact.read_any(subject)
        pack_artifact.read_streams(train_gpt, blob, "artifact")


def test_a_changed_byte_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (run / "artifact.pyz").read_bytes()
    for at in (3, 20, 40, 300, len(whole) - 400, len(whole) - 30, len(whole) - 1):
        (tmp_path / "bad.pyz").write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        refused(tmp_path / "bad.pyz", capsys)
    (tmp_path / "bad.pyz").write_bytes(whole.replace(b"-truncated\n", b"-shortened\n"))
    assert "another version of the packer" in refused(tmp_path / "bad.pyz", capsys)
    assert "no model blob" in refused(tmp_path, capsys)


def test_blobs_of_another_version_or_codec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blob = train_gpt.pack_arrays({"a:fp16:w": np.zeros(4, np.float16)}, "lzma")
    path = tmp_path / "model.bin"

    def sealed(version: int, number: int) -> bytes:
        payload = blob[train_gpt.ARTIFACT_HEADER.size :]
        head = train_gpt.ARTIFACT_HEADER.pack(train_gpt.MAGIC, version, number, len(payload), 0)[:-4]
        return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload

    path.write_bytes(sealed(train_gpt.ARTIFACT_VERSION + 1, 2))
    assert f"artifact version {train_gpt.ARTIFACT_VERSION + 1}" in refused(path, capsys)
    path.write_bytes(sealed(train_gpt.ARTIFACT_VERSION, 250))
    assert "unknown codec number 250" in refused(path, capsys)
    path.write_bytes(sealed(train_gpt.ARTIFACT_VERSION, 1))  # sealed as one codec, written by another
    refused(path, capsys)
    path.write_bytes(b"nothing of the kind")
    assert "not a model artifact" in refused(path, capsys)


def test_a_missing_compressor_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "pergroup" not in CODECS:
        pytest.skip("lrzip is not installed, so no such blob can be made here")
    folder = write_run(tmp_path / "run", "pergroup")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "lrzip" in refused(folder / "model.bin", capsys)


@pytest.mark.parametrize(
    ("tensor", "word"),
    [(torch.zeros(3, dtype=torch.bfloat16), "bfloat16"), (torch.zeros(3, requires_grad=True), "float32")],
)
def test_a_tensor_that_cannot_be_stored_is_named(tmp_path: Path, tensor: torch.Tensor, word: str) -> None:
    with pytest.raises(train_gpt.UserError, match=rf"x\.weight:fp16:w: a torch\.{word} tensor cannot be stored"):
        train_gpt.save_artifact(tmp_path / "model.bin", {"x.weight:fp16": {"w": tensor}}, "lzma")
    assert not list(tmp_path.iterdir())


def test_a_program_that_does_not_import_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    for name, message in (("broken.py", "cannot be imported"), ("nowhere.py", "no program")):
        assert pack_artifact.main(["inspect", str(run), "--source", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
