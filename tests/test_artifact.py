"""The artifact: stored tensors to bytes and back bit for bit, and every way in which a blob can be wrong."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import shutil
import struct
import zlib
from pathlib import Path

import golden_rules as rules
import numpy as np
import pytest
import torch
from conftest import TINY, same_stored, stored
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import ARTIFACT_HEADER, CODECS, CODERS, GPT, Stored, UserError, load_config, open_blob, pack_stored

KEYS = tuple(f"blocks.{i}.{role}:{role}:{how}" for i in (0, 2, 10) for role in ("k", "up") for how in ("gptq", "a+b"))


@functools.cache
def usable() -> tuple[str, ...]:
    """The codecs whose coders are installed."""
    return tuple(codec for codec in CODECS if codec != "pergroup" or shutil.which("lrzip"))


@st.composite
def tensors(draw: st.DrawFn) -> list[Stored]:
    """Some stored tensors of any bits: NaN, infinities and negative zero among the floats."""
    found = []
    for key in draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=4)):
        parts = {}
        for part in draw(st.lists(st.sampled_from("qsw"), unique=True, min_size=1)):
            shape = draw(st.lists(st.integers(0, 5), max_size=3))
            dtype = np.dtype(draw(st.sampled_from(["int8", "int16", "float16", "float32"])))
            size = int(np.prod(shape)) * dtype.itemsize
            data = bytearray(draw(st.binary(min_size=size, max_size=size)))
            parts[part] = torch.from_numpy(np.frombuffer(data, dtype).reshape(shape))
        found.append(Stored.parse(key, parts))
    return found


def example() -> list[Stored]:
    grid = torch.arange(-6, 6, dtype=torch.int8).view(3, 4)
    return stored({"a.weight:k:gptq": {"q": grid, "s": torch.linspace(0.1, 1, 3).half()}})


@functools.cache
def example_blob(codec: str) -> bytes:
    return pack_stored(example(), codec)


# There and back


@given(original=tensors(), codec=st.sampled_from(("brotli", "lzma6", "rans")))
@settings(deadline=None, max_examples=80, derandomize=True)
def test_round_trip_is_bitwise(original: list[Stored], codec: str) -> None:
    blob = pack_stored(original, codec)
    restored = open_blob(blob).tensors
    assert same_stored(restored, original) and pack_stored(restored, codec) == blob


def test_round_trip_of_every_shape_and_type() -> None:
    shapes = (), (0,), (7,), (0, 3), (3, 0), (1, 5), (5, 1), (2, 3, 4), (2, 0, 4)
    kinds = list(itertools.product(shapes, (torch.int8, torch.int16, torch.float16, torch.float32)))
    arrays = [torch.arange(math.prod(shape)).view(shape).to(dtype) for shape, dtype in kinds]
    for part, codec in itertools.product("wq", usable()):  # a part of the first stream, and of another one
        sortable = [part == "q" and array.dim() == 2 and array.dtype == torch.int8 for array in arrays]
        keys = [f"{i}:{'embed' if rows else 'k'}:gptq" for i, rows in enumerate(sortable)]
        every = stored({key: {part: array} for key, array in zip(keys, arrays, strict=True)})
        blob = pack_stored(every, codec)
        restored = open_blob(blob).tensors
        assert same_stored(restored, every) and pack_stored(restored, codec) == blob, (codec, part)


def test_views_are_packed_like_copies_and_bytes_lie_by_column_and_significance() -> None:
    base = torch.arange(24.0).view(4, 6)
    for view in (base.T, base[::2, 1:4], base[:, 3]):
        blobs = [pack_stored(stored({"x:k:fp16": {"w": values}}), "lzma6") for values in (view, view.clone())]
        assert blobs[0] == blobs[1]
    assert train_gpt.shuffle_bytes(np.array([[1, 2], [3, 4]], np.int8)) == bytes([1, 3, 2, 4])
    assert train_gpt.shuffle_bytes(np.array([0x0102, 0x0304], "<i2")) == bytes([2, 4, 1, 3])


def test_like_parts_of_like_weights_lie_together_layer_after_layer() -> None:
    parts = {"q": torch.zeros(2, 2, dtype=torch.int8), "s": torch.ones(2).half()}
    given_ = stored({f"{layer}.{role}:{role}:gptq": parts for layer in (0, 2, 10) for role in ("k", "up")})
    (stream,) = open_blob(pack_stored(given_, "lzma6")).streams
    found = [(part, key.split(":")[0]) for key, part in stream.arrays]
    assert found == [(part, f"{layer}.{role}") for part in "qs" for role in ("k", "up") for layer in (0, 2, 10)]


def test_blob_says_how_to_open_itself() -> None:
    for codec in usable():
        blob = example_blob(codec)
        magic, version, number, size, crc = ARTIFACT_HEADER.unpack_from(blob)
        payload = blob[ARTIFACT_HEADER.size :]
        assert (magic, version, number, size) == (b"PGLF", 4, CODECS[codec].number, len(payload)), codec
        assert crc == zlib.crc32(blob[: ARTIFACT_HEADER.size - 4] + payload), codec


def test_keys_name_role_scheme_and_repairs() -> None:
    for key in ("blocks.3.attn.q.weight:q:gptq", "a:embed:awq_lite+lqer", "a:up:gptq+lqer+lqer"):
        tensor = Stored.parse(key, {})
        assert tensor.key() == key and tensor.encoding() == key.split(":")[2]
    assert (tensor.name, tensor.role, tensor.scheme, tensor.repairs) == ("a", "up", "gptq", ("lqer", "lqer"))
    for key in ("", "a", "a:gptq", "a:b:c:d"):
        with pytest.raises(ValueError, match="unpack"):
            Stored.parse(key, {})


# Wrong blobs


def test_every_truncation_and_every_changed_bit_is_a_user_error() -> None:
    for codec in usable():
        blob = example_blob(codec)
        flips = itertools.product(range(len(blob)), (1, 2, 4, 8, 16, 32, 64, 128, 255))
        changed = (blob[:at] + bytes([blob[at] ^ mask]) + blob[at + 1 :] for at, mask in flips)
        for damaged in itertools.chain((blob[:size] for size in range(len(blob))), changed):
            with pytest.raises(UserError, match="^place: "):
                open_blob(damaged, "place")
        with pytest.raises(UserError, match="truncated or padded"):
            open_blob(blob + b"\0", "place")


def test_each_fault_has_its_words(tmp_path: Path) -> None:
    path, blob = tmp_path / "model.bin", example_blob("lzma")
    for damaged, words in (
        (b"PK\x03\x04" + blob[4:], "not a model artifact of this program"),
        (b"", "not a model artifact of this program"),
        (blob[:4] + b"\x02" + blob[5:], "artifact version 2, this program reads 4"),
        (blob[:5] + b"\x09" + blob[6:], "unknown codec number 9"),
        (blob[:-1], "truncated or padded"),
        (blob[:-1] + bytes([blob[-1] ^ 1]), "checksum"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=words) as refused:
            train_gpt.load_artifact(path)
        assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)
    with pytest.raises(UserError, match="no such artifact; run STAGES=train,quantize"):
        train_gpt.load_artifact(tmp_path / "none.bin")


def test_a_small_blob_may_not_decode_to_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for codec in ("brotli", "lzma6", "rans"):
        for limit, number in ((2**20, 2**16), (2**16, 2**20)):
            monkeypatch.setattr(train_gpt, "MAX_RAW", limit)
            parts = {"q": torch.zeros(64, number // 64, dtype=torch.int8), "s": torch.ones(64).half()}
            blob = pack_stored(stored({"x:up:gptq": parts}), codec)
            assert len(blob) < 3000, codec
            if number < limit:
                assert open_blob(blob).tensors[0].parts["q"].shape == parts["q"].shape
            else:
                with pytest.raises(UserError, match="more than 65,536 bytes"):
                    open_blob(blob)


def test_an_artifact_knows_what_its_model_computes(tmp_path: Path) -> None:
    path, cfg = tmp_path / "model.bin", load_config({})
    path.write_bytes(pack_stored(example(), "lzma6", train_gpt.model_identity(cfg)))
    assert same_stored(train_gpt.read_artifact(path, cfg), example())
    for knob in ("LOGIT_SOFTCAP=20", "ROPE_BASE=5000", "MLP_SLOPE=0.1", "VOCAB_SIZE=1024"):
        other = load_config(dict([knob.split("=")]))
        with pytest.raises(UserError, match="is of a model with other knobs"):
            train_gpt.read_artifact(path, other)
    same = load_config({"MATRIX_LR": "0.5", "EVAL": "plain", "MATRIX_BITS": "5"})
    assert train_gpt.model_identity(same) == train_gpt.model_identity(cfg)


def sealed(index: object, data: bytes = b"", length: int | None = None, sizes: tuple[int, ...] | None = None) -> bytes:
    """A blob with a right checksum whatever it holds; `length` of its index and `sizes` of its streams may be wrong."""
    text = index if isinstance(index, bytes) else json.dumps(["", index]).encode()
    stream = CODERS["lzma6"].encode(struct.pack("<I", len(text) if length is None else length) + text + data)
    sizes = (len(stream),) if sizes is None else sizes
    payload = struct.pack(f"<B{len(sizes)}I", len(sizes), *sizes) + stream
    return train_gpt.seal(CODECS["lzma6"].number, payload)


def test_blobs_of_another_program_with_a_right_checksum_are_user_errors(tmp_path: Path) -> None:
    def one(dtype: str = "|i1", shape: object = (1, 1), key: str = "w:k:gptq", stream: str = "") -> list:
        return [[key, {"q": [stream, dtype, shape]}]]

    path = tmp_path / "model.bin"
    for name, blob in {
        "no payload": train_gpt.seal(2, b""),
        "no stream": sealed([], sizes=()),
        "sizes past the end": sealed([], sizes=(4, 2**32 - 1)),
        "a size too small": sealed([], sizes=(4,)),
        "no index": train_gpt.seal(4, struct.pack("<BI", 1, 0)),
        "index past the end": sealed([], length=2**31),
        "index is no JSON": sealed(b"no"),
        "index of another kind": sealed({"a": 1}),
        "too few bytes": sealed(one(), b""),
        "too many bytes": sealed(one(), b"ab"),
        "huge shape": sealed(one(shape=(2**40, 2**40)), b"a"),
        "negative shape": sealed([*one(shape=(-1,)), *one(shape=(2,), key="v:k:gptq")], b"a"),
        "shape of text": sealed(one(shape="ab"), b"a"),
        "unknown dtype": sealed(one(dtype="|x9"), b"a"),
        "objects": sealed(one(dtype="|O"), b"12345678"),
        "one stream more": sealed(one(stream="k"), b"a"),
        "no role": sealed(one(key="w:gptq"), b"a"),
        "unknown scheme": sealed(one(key="w:k:unheard"), b"a"),
        "unknown repair": sealed(one(key="w:k:gptq+unheard"), b"a"),
        "a part is missing": sealed(one(), b"a"),
    }.items():
        path.write_bytes(blob)
        try:
            pytest.fail(f"{name}: {train_gpt.load_artifact(path)}")
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error), name


def test_missing_brotli_names_the_package_and_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    blob = example_blob("brotli")
    monkeypatch.setattr(train_gpt, "brotli", None)
    for use in (lambda: pack_stored(example(), "brotli"), lambda: open_blob(blob)):
        with pytest.raises(UserError, match="pip install brotli"):
            use()
    assert same_stored(open_blob(pack_stored(example(), "lzma")).tensors, example())


# A model


def test_a_saved_model_loads_bit_for_bit_as_what_was_quantised(tmp_path: Path) -> None:
    knobs = {"MATRIX_QUANT": "rowwise", "EMBED_QUANT": "rowwise", "REPAIR": "lqer", "GATED_ATTN_QUANT_GATE": "1"}
    cfg, path = load_config(TINY | knobs), tmp_path / "model.bin"
    generator, state = torch.Generator().manual_seed(4), GPT(cfg).init_weights(3).state_dict()
    state = {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in state.items()}
    for codec, scale_step in itertools.product(usable(), (0.0, 0.02)):
        own = dataclasses.replace(cfg, scale_step=scale_step)
        kept = train_gpt.quantize(own, rules.runtime(), state, {})
        wanted = train_gpt.dequantize(kept)
        train_gpt.atomic_write(path, pack_stored(kept, codec))
        assert list(tmp_path.iterdir()) == [path], codec
        loaded = train_gpt.load_artifact(path)
        assert same_stored(train_gpt.read_artifact(path), kept) and [*loaded] == [*wanted] == [*state], codec
        for name, weight in wanted.items():
            assert torch.equal(loaded[name], weight) and loaded[name].dtype == torch.float32, (codec, name)
            assert weight.shape == state[name].shape, name
    other = GPT(cfg).init_weights(9)
    train_gpt.fill_model(other, loaded, "model.bin")
    assert all(torch.equal(p, wanted[name]) for name, p in other.named_parameters())


def test_weights_of_another_model_are_refused_by_the_first_difference() -> None:
    model, name = GPT(load_config(TINY)).init_weights(3), "blocks.1.attn.k.weight"
    state, before = dict(model.state_dict()), model.tok_emb.weight.clone()
    for wrong, words in (
        ({**state, name: torch.zeros(3, 4)}, r"has shape \(3, 4\) there, \(16, 32\) in this configuration"),
        ({n: t for n, t in state.items() if n != name}, "has shape None there"),
        ({**state, "extra.weight": torch.zeros(2)}, r"extra.weight has shape \(2,\) there, None in this"),
    ):
        with pytest.raises(UserError, match=f"^place is of another model: .*{words}"):
            train_gpt.fill_model(model, wrong, "place")
    assert torch.equal(model.tok_emb.weight, before)
