"""The per-group codec: row order, streams, and the program lrzip, installed or missing."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

import golden_rules as rules
import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import CODECS, UserError, load_config, pack_arrays, unpack_arrays

GOLDEN = json.loads((Path(__file__).parent / "golden" / "quant.json").read_text(encoding="utf-8"))["entries"]
PERGROUP = CODECS["pergroup"]
needs_lrzip = pytest.mark.skipif(shutil.which("lrzip") is None, reason="the program lrzip is not installed")


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Equal names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        (a[n].dtype, a[n].shape, a[n].tobytes()) == (b[n].dtype, b[n].shape, b[n].tobytes()) for n in a
    )


def model_arrays(scheme: str = "gptq", layers: int = 3) -> dict[str, np.ndarray]:
    """Arrays as a small quantised model has them."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, cols: int) -> np.ndarray:
        return np.round(3 * rng.standard_normal((rows, cols))).astype(np.int8)

    shapes = {"attn.q": (16, 16), "attn.k": (8, 16), "attn.v": (8, 16), "attn.o": (16, 16), "mlp.up": (48, 16)}
    found = {
        f"tok_emb.weight:{scheme}:q": matrix(40, 16),
        "skips.weights:fp16:w": rng.random((4, 16)).astype(np.float16),
    }
    for layer in range(layers):
        for part, shape in (shapes | {"mlp.down": (16, 48)}).items():
            found[f"blocks.{layer}.{part}.weight:{scheme}:q"] = matrix(*shape)
            found[f"blocks.{layer}.{part}.weight:{scheme}:s"] = rng.random(shape[0]).astype(np.float16)
        found[f"blocks.{layer}.attn.gate.weight:int8_row:q"] = matrix(8, 12)
    return found


# Row order


def test_published_row_order() -> None:
    entries = [entry for entry in GOLDEN if entry["kind"] == "row_similarity"]
    assert entries
    for entry in entries:
        config, want = entry["config"], entry["expected"]
        shape, top = (config["rows"], config["cols"]), config["range"]
        M = torch.floor((rules.fill("hash", config["key"], shape, 1.0) + 1) / 2 * (2 * top + 1)) - top
        assert M[0].tolist() == want["matrix_row0"] and M.sum() == want["matrix_sum"], entry["name"]
        assert train_gpt.similarity_order(M.to(torch.int8)).tolist() == want["order"], entry["name"]


def plain_order(M: np.ndarray) -> list[int]:
    """The rule, word for word."""
    order, left = [0], list(range(1, len(M)))
    while left:
        here = M[order[-1]].astype(int)
        order.append(min(left, key=lambda i: (int(np.abs(M[i] - here).sum()), i)))
        left.remove(order[-1])
    return order


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 9999), rows=st.integers(1, 90), cols=st.integers(1, 20), top=st.sampled_from([1, 3, 127]))
@example(seed=1, rows=600, cols=3, top=2)  # more rows than a block
def test_row_order_is_the_greedy_walk_with_ties_to_the_first(seed: int, rows: int, cols: int, top: int) -> None:
    M = np.random.default_rng(seed).integers(-top, top + 1, (rows, cols)).astype(np.int8)
    assert train_gpt.similarity_order(torch.from_numpy(M)).tolist() == plain_order(M)


def test_rows_are_sorted_and_sorted_back() -> None:
    arrays = model_arrays()
    found = train_gpt.sort_rows(arrays, PERGROUP.sorted_rows)
    orders = {n.removesuffix(":order"): a for n, a in found.items() if n.endswith(":order")}
    assert sorted(orders) == sorted(n for n in arrays if n.endswith(":q") and ("tok_emb" in n or ".q.weight" in n))
    for name, order in orders.items():
        assert order.dtype == np.uint16 and order[0] == 0 and order.tolist() != sorted(order)
        assert np.array_equal(found[name], arrays[name][order])
    assert same(train_gpt.unsort_rows(found), arrays)


# Streams


def test_each_role_has_a_stream_and_the_rest_is_the_first() -> None:
    names = list(train_gpt.sort_rows(model_arrays("awq_lite+lqer"), PERGROUP.sorted_rows))
    streams = {name: PERGROUP.stream_of(name) for name in names}
    roles = ["tok_emb", *(f"blocks.1.{part}" for part in "attn.q attn.k attn.v attn.o mlp.up mlp.down".split())]
    assert [streams[f"{role}.weight:awq_lite+lqer:q"] for role in roles] == list(range(1, 8))
    rest = {name for name, stream in streams.items() if stream == 0}
    assert rest == {n for n in names if n.endswith((":s", ":w", ":order")) or "gate" in n}


def test_lzma_presets_round_trip_and_differ() -> None:
    rows = np.random.default_rng(1).integers(-8, 8, (300, 64)).astype(np.int8)
    arrays = {"blocks.0.attn.q.weight:gptq_lite:q": rows, "skips.weights:fp16:w": np.ones(5, np.float16)}
    blobs = {codec: pack_arrays(arrays, codec) for codec in ("lzma", "lzma6")}
    for blob in blobs.values():
        assert all(np.array_equal(a, arrays[n]) for n, a in unpack_arrays(blob).items())
    assert train_gpt.CODERS["lzma6"].encode(b"xy" * 100) == lzma.compress(b"xy" * 100, preset=6)
    assert blobs["lzma6"] != blobs["lzma"]


def test_other_codecs_sort_nothing() -> None:
    for codec in (CODECS["brotli"], CODECS["lzma"]):
        assert not codec.sort_hidden and not codec.sorted_rows
    assert {CODECS["lzma"].stream_of(name) for name in model_arrays()} == {0}
    assert [len(CODECS[name].coders()) for name in ("brotli", "lzma", "pergroup")] == [8, 1, 8]
    assert len({codec.number for codec in CODECS.values()}) == len(CODECS)


@needs_lrzip
def test_round_trip_is_bitwise_and_the_same_bytes_again() -> None:
    arrays = model_arrays()
    blob = pack_arrays(arrays, "pergroup")
    assert same(unpack_arrays(blob), arrays)
    assert pack_arrays(dict(reversed(arrays.items())), "pergroup") == blob
    for shape in (1, 1), (3, 0), (0, 3), (5,), (2, 2, 2):
        names = "tok_emb.weight:gptq:q", "blocks.0.attn.k.weight:gptq:q"
        arrays = {name: np.ones(shape, np.int8) for name in names}
        assert same(unpack_arrays(pack_arrays(arrays, "pergroup")), arrays), shape


@needs_lrzip
def test_lrzip_is_called_as_published_and_its_errors_reach_the_user() -> None:
    data = bytes(range(256)) * 40
    packed = train_gpt.CODERS["lrzip"].encode(data)
    assert packed[:4] == b"LRZI" and len(packed) < 700 and train_gpt.CODERS["lrzip"].decode(packed) == data
    with pytest.raises(UserError, match="lrzip -d failed"):
        train_gpt.CODERS["lrzip"].decode(b"no such format" * 9)


@pytest.mark.parametrize("codec", [pytest.param("pergroup", marks=needs_lrzip), "rans"])
def test_quantised_model_survives(codec: str, tmp_path: Path) -> None:
    knobs = {"MATRIX_QUANT": "rowwise", "EMBED_QUANT": "rowwise", "REPAIR": "lqer", "GATED_ATTN_QUANT_GATE": "1"}
    cfg = load_config({**TINY, **knobs, "COMPRESSOR": codec, "SCALE_STEP": "0.02" if codec == "rans" else "0"})
    model = train_gpt.GPT(cfg).init_weights(3)
    state = {name: w + 0.05 * torch.randn(w.shape) for name, w in model.state_dict().items()}
    parts = train_gpt.quantize(cfg, rules.runtime(), state, {})
    size = train_gpt.save_artifact(tmp_path / "model.bin", parts, codec)
    loaded, wanted = train_gpt.load_artifact(tmp_path / "model.bin"), train_gpt.dequantize(parts)
    assert size == (tmp_path / "model.bin").stat().st_size and loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


# Missing, foreign


def test_missing_lrzip_names_the_package_and_stops_a_run_before_it_trains(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    knobs = TINY | {"COMPRESSOR": "pergroup", "DATA_PATH": str(tiny_data), "ARTIFACT_DIR": str(folder), "DEVICE": "cpu"}
    for name, value in (knobs | {"PATH": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    for use in (PERGROUP.need, lambda: pack_arrays(model_arrays(), "pergroup")):
        with pytest.raises(UserError, match="needs the program lrzip.*apt install lrzip"):
            use()
    assert same(unpack_arrays(pack_arrays(model_arrays(), "lzma")), model_arrays())
    assert train_gpt.main([]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: COMPRESSOR=pergroup needs the program lrzip")
    assert "step 1 " not in said.out and not (folder / "model.pt").exists()


def test_payload_of_another_codec_is_a_user_error() -> None:
    for codec, other in ("brotli", 2), ("pergroup", 2), ("lzma", 3), ("lzma", 1):
        blob = bytearray(pack_arrays({"skips.weights:fp16:w": np.ones(3, np.float16)}, codec))
        blob[5] = other
        with pytest.raises(UserError, match="^here: damaged: the checksum"):
            unpack_arrays(bytes(blob), "here")
        with pytest.raises(UserError, match="^here: damaged: the payload does not decode"):
            unpack_arrays(train_gpt.seal(other, bytes(blob[train_gpt.ARTIFACT_HEADER.size :])), "here")
