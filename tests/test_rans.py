"""Row scales in log2 units, the entropy coder of COMPRESSOR=rans, and its container."""

from __future__ import annotations

import hashlib
import math
import struct
from pathlib import Path

import golden_rules as rules
import numpy as np
import pytest
import torch
from conftest import TINY, same_stored, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import pack_artifact
import train_gpt
from train_gpt import UserError, load_config, open_blob, pack_stored, rans_decode, rans_encode, rans_frame

# Row scales


def test_stored_scales_are_within_half_a_step_and_stay_where_they_are() -> None:
    scales = torch.cat([torch.zeros(1), torch.logspace(-7, 4, 999)])
    for step in (0.005, 0.02, 1.0):
        parts = train_gpt.stored_scales(scales, step)
        values = train_gpt.scale_values(parts)
        assert parts["s"].dtype == torch.int16 and values.dtype == torch.float32, step
        assert ((values / scales.clamp_min(2.0**-24)).log2().abs() <= step / 2 + 1e-5).all(), step
        assert torch.equal(train_gpt.stored_scales(values, step)["s"], parts["s"]), step
    published = train_gpt.stored_scales(scales[:500], 0.0)
    assert published.keys() == {"s"} and torch.equal(published["s"], train_gpt.storable(scales[:500]))
    assert torch.equal(train_gpt.scale_values(published), published["s"].float())
    with pytest.raises(UserError, match="SCALE_STEP=0.001 is too fine for 16 bits; say 0"):
        load_config({**TINY, "SCALE_STEP": "0.001"})


def test_quantisers_divide_by_the_scale_that_is_stored(tmp_path: Path) -> None:
    W = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 24)[:, None]
    for scheme in ("rowwise", "gptq", "gptq_lite", "row_quantile"):
        cfg = load_config({**TINY, "MATRIX_QUANT": scheme, "EMBED_QUANT": "rowwise", "SCALE_STEP": "0.25"})
        parts = train_gpt.SCHEMES[scheme].encode(W, torch.eye(32), train_gpt.QuantRule(scheme, 6, 4.0), cfg)
        scales = train_gpt.scale_values(parts)
        assert parts["s"].dtype == torch.int16 and torch.equal(scales, torch.exp2(0.25 * parts["s"])), scheme
        nearest = train_gpt.round_to_grid(W, scales[:, None], 6)  # with the identity as Hessian nothing is fed back
        assert torch.equal(parts["q"].float(), nearest), scheme
        (tmp_path / "m.bin").write_bytes(pack_stored(stored({f"x:up:{scheme}": parts}), "lzma"))
        assert torch.equal(train_gpt.load_artifact(tmp_path / "m.bin")["x"], parts["q"] * scales[:, None]), scheme


def test_awq_columns_and_qat_share_the_stored_scale() -> None:
    cfg = load_config({**TINY, "AWQ_LITE_ENABLED": "1", "AWQ_LITE_GROUP_SIZE": "8", "SCALE_STEP": "0.5"})
    W, rule = rules.fill("hash", "awq", (12, 16), 1.0), train_gpt.QuantRule("awq_lite", 6, 12.0, (8,))
    parts = train_gpt.SCHEMES["awq_lite"].encode(W, torch.eye(16), rule, cfg)
    coarse, fine = train_gpt.scale_values(parts), train_gpt.scale_values(parts, "hs")
    assert (fine < coarse).all() and parts["hs"].dtype == torch.int16
    error = (train_gpt.SCHEMES["awq_lite"].decode(parts) - W).abs()
    assert (error[:, :8] <= 0.51 * coarse[:, None]).all() and (error[:, 8:] <= 0.51 * fine[:, None]).all()
    assert torch.equal(train_gpt.SCHEMES["gptq"].scale(W, rule, cfg), coarse)


# The coder


def framed(*matrices: np.ndarray, trellis: tuple[int, int] | None = None) -> bytes:
    return b"".join(rans_frame(m, None if trellis is None else np.array(trellis, np.int32)) for m in matrices)


def normal(rows: int, cols: int, sigma: float | np.ndarray = 2.6, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((rows, cols))
    return np.clip(np.rint(noise * sigma), -127, 127).astype(np.int8)


def entropy(matrix: np.ndarray) -> float:
    """Order-0 entropy in bytes."""
    return pack_artifact.entropy_bits(matrix) / 8


def on_trellis(rows: int, cols: int, states: int, chunk: int, seed: int = 0, sigma: float = 1.3) -> np.ndarray:
    """Integers of a random walk on the trellis, a walk for each column that starts again every `chunk` rows."""
    subsets, rng = train_gpt.trellis(states).numpy(), np.random.default_rng(seed)
    Q, state = np.empty((rows, cols), np.int8), np.zeros(cols, int)
    for r in range(rows):
        state = state * (r % chunk > 0)
        branch = rng.integers(0, 2, cols)
        Q[r] = 4 * np.rint(rng.standard_normal(cols) * sigma).clip(-30, 30) + subsets[state, branch]
        state = (2 * state + branch) % states
    return Q


ANY = arrays.arrays(np.int8, st.tuples(st.integers(0, 9), st.integers(0, 9)))
SEED, ROWS, CHUNK = st.integers(0, 999), st.integers(1, 70), st.integers(1, 90)
STATES, WIDTHS = st.sampled_from([4, 8, 16, 32, 64]), st.sampled_from([1, 5, 511, 512, 513, 1100])
MATRIX = st.one_of(
    ANY.map(framed),  # any integers, also off a trellis that they claim to be on
    ANY.map(lambda q: framed(q, trellis=(8, 4))),
    st.builds(lambda *args: framed(normal(*args)), ROWS, WIDTHS, st.floats(0, 90), SEED),
    st.builds(lambda s, c, seed: framed(on_trellis(80, 20, s, c, seed), trellis=(s, c)), STATES, CHUNK, SEED),
)


@settings(max_examples=60)
@given(st.lists(MATRIX, min_size=1, max_size=3))
def test_any_matrices_come_back(matrices: list[bytes]) -> None:
    raw = b"".join(matrices)
    packed = rans_encode(raw)
    assert rans_decode(packed) == raw and rans_encode(raw) == packed


def test_constant_and_extreme_matrices_come_back() -> None:
    for shape in (0, 0), (0, 4), (4, 0), (1, 1), (1, 3000), (900, 1), (120, 700):
        for value in (-128, -127, 0, 1, 127):
            raw = framed(np.full(shape, value, np.int8))
            packed = rans_encode(raw)
            assert rans_decode(packed) == raw, (shape, value)
            escapes = 2.1 * math.prod(shape) * (value == -128)  # that level is the mark of an escape
            most = 100 + 4 * min(512, shape[1]) + 16 * shape[1] + math.prod(shape) * 0.6 + escapes
            assert len(packed) < most, (shape, value)


def test_rate_is_near_the_entropy_of_each_column() -> None:
    sigmas = 2.6 * np.exp(np.random.default_rng(1).normal(0, 0.5, 600))
    Q = normal(1200, 600, sigmas)
    packed, columns = len(rans_encode(framed(Q))), sum(entropy(Q[:, [c]]) for c in range(600))
    assert packed < 1.008 * columns + 512 * 4 < 0.99 * entropy(Q)
    walk = on_trellis(1200, 256, 8, 500)
    packed = len(rans_encode(framed(walk, trellis=(8, 500))))
    assert packed < 1.004 * (entropy(walk) - walk.size / 8) + 1024 + 1500, "the trellis saves a bit of every symbol"


def test_outliers_cost_their_own_bits_only() -> None:
    plain, wild = normal(400, 300), normal(400, 300)
    wild[np.arange(0, 400, 8), np.arange(0, 300, 6)] = 120
    packed = rans_encode(framed(wild))
    assert rans_decode(packed) == framed(wild)
    assert len(packed) - len(rans_encode(framed(plain))) < 50 * 9


def test_rows_of_other_scales_and_rows_much_alike_cost_less() -> None:
    """By bits a symbol, against the entropy of all integers together."""
    rng = np.random.default_rng(2)
    unequal, common = normal(900, 256, 4 * np.exp(rng.normal(0, 0.6, (900, 1)))), 6 * rng.standard_normal(256)
    alike = np.rint(common * (np.arange(900) % 3 > 0)[:, None] + normal(900, 256, 3)).astype(np.int8)
    for matrix, least in (unequal, 0.2), (alike, 0.4):
        saved = (entropy(matrix) - len(rans_encode(framed(matrix)))) * 8 / matrix.size
        assert saved > least, saved


def test_the_bytes_are_as_they_were_when_this_test_was_written() -> None:
    q = (np.arange(90000, dtype=np.uint32) * 2654435761 >> 28).astype(np.int8).reshape(-1, 300) - 8
    raw = framed(q) + framed(q[:50, :40], trellis=(8, 16))
    digest = "cb3baad2f793f9215be8257429107e1a9e80c96a27854c8ebda3bb1fb92193b3"
    assert hashlib.sha256(rans_encode(raw)).hexdigest() == digest


# In the container


def test_matrices_lie_layer_by_layer_and_know_their_trellis(tmp_path: Path) -> None:
    plain = {"q": torch.from_numpy(normal(30, 24)), "s": torch.rand(30).half() + 0.1}
    walk = {"q": torch.from_numpy(on_trellis(60, 24, 8, 32)), "t": torch.tensor([8, 32], dtype=torch.int32)}
    parts = {
        "tok_emb.weight:embed:rowwise": plain,
        "blocks.0.mlp.up.weight:up:gptq_tcq": walk | train_gpt.stored_scales(torch.rand(60) + 0.1, 0.02),
        "blocks.1.attn.q.weight:q:gptq": plain,
        "skips.gates:shut:fp16": {"w": torch.rand(7).half()},
    }
    tensors, path = stored(parts), tmp_path / "model.bin"
    blob, wanted = pack_stored(tensors, "rans"), train_gpt.dequantize(tensors)
    path.write_bytes(blob)
    loaded = train_gpt.load_artifact(path)
    assert same_stored(open_blob(blob).tensors, tensors)
    assert loaded.keys() == wanted.keys() and all(torch.equal(loaded[n], wanted[n]) for n in wanted)
    head = train_gpt.ARTIFACT_HEADER.size
    sizes = np.frombuffer(blob[head + 1 : head + 9], "<u4")
    raw = rans_decode(blob[head + 9 + sizes[0] :])
    heads = [train_gpt.RANS_HEAD.unpack_from(raw, at) for at in (0, 16 + 720, 2 * 16 + 720 + 1440)]
    assert heads == [(30, 24, 1, 1), (60, 24, 8, 32), (30, 24, 1, 1)]


def resealed(stream: bytes) -> bytes:
    """A blob of right checksum whose symbols are `stream`."""
    blob = pack_stored(stored({"x:up:gptq": {"q": torch.from_numpy(normal(20, 30))}}), "rans")
    head = train_gpt.ARTIFACT_HEADER.size
    (first,) = struct.unpack_from("<I", blob, head + 1)
    payload = struct.pack("<BII", 2, first, len(stream)) + blob[head + 9 : head + 9 + first] + stream
    return train_gpt.seal(train_gpt.CODECS["rans"].number, payload)


@settings(max_examples=20)
@given(data=st.data())
def test_a_damaged_stream_of_right_checksum_is_one_line(data: st.DataObject) -> None:
    stream = rans_encode(framed(normal(20, 30)))
    (tensor,) = open_blob(resealed(stream)).tensors
    assert np.array_equal(tensor.parts["q"], normal(20, 30))
    at, mask = data.draw(st.integers(0, len(stream) - 1)), data.draw(st.integers(1, 255))
    flipped = stream[:at] + bytes([stream[at] ^ mask]) + stream[at + 1 :]
    damaged = data.draw(st.sampled_from([stream[:at], flipped, stream + b"\0\0"]))
    with pytest.raises(UserError, match="^here: damaged: the payload does not decode") as caught:
        open_blob(resealed(damaged), "here")
    assert "\n" not in str(caught.value)
