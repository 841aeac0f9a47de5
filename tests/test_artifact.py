"""The artifact: named arrays to bytes and back bit for bit, and every way in which a blob can be wrong."""

from __future__ import annotations

import functools
import itertools
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    ARTIFACT_HEADER,
    CODECS,
    CODERS,
    GPT,
    Log,
    Runtime,
    UserError,
    load_config,
    pack_arrays,
    unpack_arrays,
)

PROPERTY = settings(deadline=None, max_examples=80, derandomize=True)
SETTLED = Runtime(0, 1, torch.device("cpu"), Log(None, True))
NAMES = tuple(f"blocks.{i}.{part}:gptq:{kind}" for i in (0, 2, 10) for part in ("q", "up") for kind in "qs")


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Some named arrays of any bits: NaN, infinities and negative zero among the floats."""
    found = {}
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=4)):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        dtype = np.dtype(draw(st.sampled_from(["int8", "int16", "float16", "float32"])))
        size = int(np.prod(shape)) * dtype.itemsize
        found[name] = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype).reshape(shape)
    return found


def example() -> dict[str, np.ndarray]:
    """A blob's worth of small arrays."""
    grid = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    return {"a.weight:gptq:q": grid, "a.weight:gptq:s": np.linspace(0.1, 1, 3).astype(np.float16)}


@functools.cache
def example_blob(codec: str) -> bytes:
    return pack_arrays(example(), codec)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Equal names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        (a[n].dtype, a[n].shape, a[n].tobytes()) == (b[n].dtype, b[n].shape, b[n].tobytes()) for n in a
    )


# There and back


def check_round_trip(original: dict[str, np.ndarray], codec: str) -> None:
    blob = pack_arrays(original, codec)
    restored = unpack_arrays(blob)
    assert same(original, restored)
    assert pack_arrays(dict(reversed(original.items())), codec) == blob, "same input, same bytes"
    assert all(a.flags.writeable or a.size == 0 for a in restored.values()), "torch warns of read-only memory"


@given(original=arrays())
@PROPERTY
def test_round_trip_is_bitwise_brotli(original: dict[str, np.ndarray]) -> None:
    check_round_trip(original, "brotli")


@given(original=arrays())
@settings(PROPERTY, max_examples=15)
def test_round_trip_is_bitwise_lzma(original: dict[str, np.ndarray]) -> None:
    check_round_trip(original, "lzma")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (0, 3), (3, 0), (1, 5), (5, 1), (2, 3, 4), (2, 0, 4)])
@pytest.mark.parametrize("dtype", ["int8", "int16", "float16", "float32"])
def test_round_trip_of_every_shape_and_type(codec: str, shape: tuple[int, ...], dtype: str) -> None:
    original = {"x": np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)}
    assert same(original, unpack_arrays(pack_arrays(original, codec)))


def test_a_view_is_packed_like_its_copy() -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (base.T, base[::2, 1:4], base[:, 3]):
        assert pack_arrays({"x": view}, "lzma") == pack_arrays({"x": view.copy()}, "lzma")


def test_bytes_lie_by_column_and_by_significance() -> None:
    assert train_gpt.shuffle_bytes(np.array([[1, 2], [3, 4]], np.int8)) == bytes([1, 3, 2, 4])
    assert train_gpt.shuffle_bytes(np.array([0x0102, 0x0304], "<i2")) == bytes([2, 4, 1, 3])


def test_layers_of_one_role_lie_together_in_number_order() -> None:
    stored = list(unpack_arrays(pack_arrays({n: np.zeros(1, np.int8) for n in NAMES}, "lzma")))
    assert stored == sorted(stored, key=lambda n: (n.split(".")[2], int(n.split(".")[1])))


def test_blob_says_how_to_open_itself() -> None:
    for number, codec in ((1, "brotli"), (2, "lzma")):
        magic, version, stored, size, crc = ARTIFACT_HEADER.unpack_from(example_blob(codec))
        payload = example_blob(codec)[ARTIFACT_HEADER.size :]
        assert (magic, version, stored) == (b"PGLF", 2, number) and size == len(payload)
        assert crc == zlib.crc32(example_blob(codec)[: ARTIFACT_HEADER.size - 4] + payload)


# Wrong blobs


@pytest.mark.parametrize("codec", CODECS)
def test_every_truncation_is_a_user_error(codec: str) -> None:
    blob = example_blob(codec)
    for size in range(len(blob)):
        with pytest.raises(UserError, match="^place: "):
            unpack_arrays(blob[:size], "place")
    with pytest.raises(UserError, match="truncated or padded"):
        unpack_arrays(blob + b"\0", "place")


@pytest.mark.parametrize("codec", CODECS)
def test_every_change_of_a_head_byte_is_a_user_error(codec: str) -> None:
    blob = example_blob(codec)
    for position, mask in itertools.product(range(ARTIFACT_HEADER.size), range(1, 256)):
        damaged = bytearray(blob)
        damaged[position] ^= mask
        with pytest.raises(UserError):
            unpack_arrays(bytes(damaged))


@pytest.mark.parametrize("codec", CODECS)
@given(data=st.data(), mask=st.integers(1, 255))
@PROPERTY
def test_changed_byte_anywhere_is_a_user_error(codec: str, data: st.DataObject, mask: int) -> None:
    blob = bytearray(example_blob(codec))
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= mask
    with pytest.raises(UserError):
        unpack_arrays(bytes(blob))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda blob: b"PK\x03\x04" + blob[4:], "not a model artifact of this program"),
        (lambda blob: b"", "not a model artifact of this program"),
        (lambda blob: blob[:4] + b"\x03" + blob[5:], "artifact version 3, this program reads 2"),
        (lambda blob: blob[:5] + b"\x09" + blob[6:], "unknown codec number 9"),
        (lambda blob: blob[:-1], "truncated or padded"),
        (lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]), "checksum"),
    ],
)
def test_each_fault_has_its_words(tmp_path: Path, change: object, words: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(change(example_blob("lzma")))
    with pytest.raises(UserError, match=words) as refused:
        train_gpt.load_artifact(path)
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)


def sealed(raw: bytes, codec: str = "lzma") -> bytes:
    """A blob whose head is right whatever its content is."""
    stream = CODERS[codec].encode(raw)
    payload = struct.pack("<BI", 1, len(stream)) + stream
    return train_gpt.seal(CODECS[codec].number, payload)


@pytest.mark.parametrize(
    "blob",
    [
        sealed(b""),
        sealed(struct.pack("<I", 2) + b"no"),
        pack_arrays({"no scheme": np.zeros(1, np.int8)}, "lzma"),
        pack_arrays({"w:unheard:q": np.zeros(1, np.int8)}, "lzma"),
        pack_arrays({"w:gptq:q": np.zeros((1, 1), np.int8)}, "lzma"),
    ],
    ids=["empty", "index is no JSON", "no scheme", "unknown scheme", "part missing"],
)
def test_blob_of_another_program_with_a_right_checksum_is_a_user_error(tmp_path: Path, blob: bytes) -> None:
    (tmp_path / "model.bin").write_bytes(blob)
    with pytest.raises(UserError):
        train_gpt.load_artifact(tmp_path / "model.bin")


def test_missing_artifact_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such artifact; run STAGES=train,quantize"):
        train_gpt.load_artifact(tmp_path / "model.bin")


def test_missing_brotli_names_the_package_and_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    blob = example_blob("brotli")
    monkeypatch.setattr(train_gpt, "brotli", None)
    for use in (lambda: pack_arrays(example(), "brotli"), lambda: unpack_arrays(blob)):
        with pytest.raises(UserError, match="pip install brotli"):
            use()
    assert same(example(), unpack_arrays(pack_arrays(example(), "lzma")))


# A model


@pytest.fixture(scope="module")
def model() -> GPT:
    """A tiny model with every tensor away from zero."""
    model = GPT(load_config(TINY)).init_weights(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("codec", ["brotli", "lzma"])  # pergroup: test_codecs.py
def test_saved_model_loads_bit_for_bit_as_what_was_quantised(tmp_path: Path, model: GPT, codec: str) -> None:
    cfg = load_config({**TINY, "MATRIX_QUANT": "rowwise", "EMBED_QUANT": "rowwise", "COMPRESSOR": codec})
    state = model.state_dict()
    parts = train_gpt.quantize(cfg, SETTLED, state, {})
    size = train_gpt.save_artifact(tmp_path / "model.bin", parts, cfg.compressor)
    assert size == (tmp_path / "model.bin").stat().st_size and [p.name for p in tmp_path.iterdir()] == ["model.bin"]
    loaded, wanted = train_gpt.load_artifact(tmp_path / "model.bin"), train_gpt.dequantize(parts)
    assert loaded.keys() == wanted.keys() == state.keys()
    for name, tensor in wanted.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == torch.float32, name
        assert tensor.shape == state[name].shape, name
    other = GPT(cfg).init_weights(9)
    train_gpt.fill_model(other, loaded, "model.bin")
    assert all(torch.equal(p, wanted[name]) for name, p in other.named_parameters())


def test_weights_of_another_model_are_refused_by_the_first_difference(model: GPT) -> None:
    state, before = dict(model.state_dict()), model.tok_emb.weight.clone()
    name = "blocks.1.attn.k.weight"
    for wrong, words in (
        ({**state, name: torch.zeros(3, 4)}, r"has shape \(3, 4\) there, \(16, 32\) in this configuration"),
        ({n: t for n, t in state.items() if n != name}, "has shape None there"),
        ({**state, "extra.weight": torch.zeros(2)}, r"extra.weight has shape \(2,\) there, None in this"),
    ):
        with pytest.raises(UserError, match=f"^place is of another model: .*{words}"):
            train_gpt.fill_model(model, wrong, "place")
    assert torch.equal(model.tok_emb.weight, before)
