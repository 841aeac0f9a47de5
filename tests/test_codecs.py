"""The per-group codec: row order, streams, and the program lrzip, installed or missing."""

from __future__ import annotations

import dataclasses
import json
import lzma
import shutil
from pathlib import Path

import golden_rules as rules
import numpy as np
import pytest
import torch
from conftest import TINY, same_stored, stored
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import CODECS, UserError, open_blob, pack_stored

GOLDEN = json.loads((Path(__file__).parent / "golden" / "quant.json").read_text(encoding="utf-8"))["entries"]
needs_lrzip = pytest.mark.skipif(shutil.which("lrzip") is None, reason="the program lrzip is not installed")


def model_tensors(encoding: str = "gptq", layers: int = 3) -> list[train_gpt.Stored]:
    """The tensors of a small quantised model."""
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.from_numpy(np.round(3 * rng.standard_normal(shape)).astype(np.int8))

    shapes = {"q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16), "up": (48, 16), "down": (16, 48)}
    found = {f"tok_emb.weight:embed:{encoding}": {"q": matrix(40, 16)}}
    found["skips.weights:scale:fp16"] = {"w": torch.rand(4, 16).half()}
    for layer in range(layers):
        for role, shape in shapes.items():
            found[f"{layer}.{role}:{role}:{encoding}"] = {"q": matrix(*shape), "s": torch.rand(shape[0]).half()}
        found[f"{layer}.gate:half_open_gate:int8_row"] = {"q": matrix(8, 12)}
    return stored(found)


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


@settings(max_examples=60)
@given(seed=st.integers(0, 9999), rows=st.integers(1, 90), cols=st.integers(1, 20), top=st.sampled_from([1, 3, 127]))
@example(seed=1, rows=600, cols=3, top=2)  # more rows than a block
def test_row_order_is_the_greedy_walk_with_ties_to_the_first(seed: int, rows: int, cols: int, top: int) -> None:
    M = np.random.default_rng(seed).integers(-top, top + 1, (rows, cols)).astype(np.int8)
    assert train_gpt.similarity_order(torch.from_numpy(M)).tolist() == plain_order(M)


def test_rows_are_sorted_and_sorted_back() -> None:
    for tensor in model_tensors():
        if "q" in tensor.parts:
            found = train_gpt.sort_rows(tensor.parts)
            order = found["order"].long()
            assert found["order"].dtype == torch.uint16 and order[0] == 0 and not torch.equal(order, order.sort()[0])
            assert torch.equal(found["q"], tensor.parts["q"][order]), tensor.name
            restored = dataclasses.replace(tensor, parts=train_gpt.unsort_rows(found))
            assert same_stored([restored], [tensor]), tensor.name


# Streams


def test_integers_have_the_stream_of_their_role_and_all_else_is_in_the_first() -> None:
    tensors, roles = model_tensors("awq_lite+lqer"), "embed q k v o up down".split()
    for codec, names in {"brotli": roles, "pergroup": roles, "rans": ["integers"], "lzma": [], "lzma6": []}.items():
        if codec == "pergroup" and shutil.which("lrzip") is None:
            continue
        first, *others = open_blob(pack_stored(tensors, codec)).streams
        assert [stream.name for stream in others] == names and first.name == "", codec
        assert {stream.coder for stream in others} <= {CODECS[codec].integer_coder}, codec
        for name, _, _, arrays in others:
            owners = [train_gpt.Stored.parse(key, {}) for key, _ in arrays]
            assert {part for _, part in arrays} == {"q"} and (name == "integers" or {t.role for t in owners} == {name})
            order = [t.name for t in tensors if t.name in {owner.name for owner in owners}]
            assert [owner.name for owner in owners] == order, "layer after layer"
        ordered = {key.split(":")[1] for key, part in first.arrays if part == "order"}
        assert ordered == ({"embed", "q"} if codec == "pergroup" else set()), codec
    assert len({codec.number for codec in CODECS.values()}) == len(CODECS)


def test_lzma_presets_differ() -> None:
    for name, options in {"lzma6": {"preset": 6}, "lzma": {"preset": 9 | lzma.PRESET_EXTREME}}.items():
        assert train_gpt.CODERS[name].encode(b"xy" * 100) == lzma.compress(b"xy" * 100, **options), name


@needs_lrzip
def test_lrzip_is_called_as_published_and_its_errors_reach_the_user() -> None:
    data = bytes(range(256)) * 40
    packed = train_gpt.CODERS["lrzip"].encode(data)
    assert packed[:4] == b"LRZI" and len(packed) < 700 and train_gpt.CODERS["lrzip"].decode(packed) == data
    with pytest.raises(UserError, match="lrzip -d failed"):
        train_gpt.CODERS["lrzip"].decode(b"no such format" * 9)


# Missing, foreign


def test_missing_lrzip_names_the_package_and_stops_a_run_before_it_trains(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    knobs = TINY | {"COMPRESSOR": "pergroup", "DATA_PATH": str(tiny_data), "ARTIFACT_DIR": str(folder), "DEVICE": "cpu"}
    for name, value in (knobs | {"PATH": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    for use in (CODECS["pergroup"].require, lambda: pack_stored(model_tensors(), "pergroup")):
        with pytest.raises(UserError, match="needs the program lrzip.*apt install lrzip"):
            use()
    assert pack_stored(model_tensors(), "lzma")
    assert train_gpt.main([]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: COMPRESSOR=pergroup needs the program lrzip")
    assert "step 1 " not in said.out and not (folder / "model.pt").exists()


def test_payload_of_another_codec_is_a_user_error() -> None:
    for codec, other in ("brotli", 2), ("pergroup", 2), ("lzma", 3), ("lzma", 1):
        blob = bytearray(pack_stored(stored({"skips.weights:scale:fp16": {"w": torch.ones(3).half()}}), codec))
        blob[5] = other
        with pytest.raises(UserError, match="^here: damaged: the checksum"):
            open_blob(bytes(blob), "here")
        with pytest.raises(UserError, match="^here: damaged: the payload does not decode"):
            open_blob(train_gpt.seal(other, bytes(blob[train_gpt.ARTIFACT_HEADER.size :])), "here")
