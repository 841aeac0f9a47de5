"""Data: shards, segments, the training stream over ranks, prefetching, byte accounting, the validation stream."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch
from conftest import TINY
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prepare import write_shard

import train_gpt
from train_gpt import BOS_ID, Config, Log, Runtime, ShardWalker, UserError, load_config

GOLDEN = json.loads((Path(__file__).parent / "golden" / "data.json").read_text(encoding="utf-8"))
PROPERTY = settings(max_examples=60)


def write_shards(folder: Path, *shards: list[int], kind: str = "train") -> list[Path]:
    """Numbered shards of a kind in a fresh folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return [write_shard(folder / f"fineweb_{kind}_{i:06d}.bin", tokens) for i, tokens in enumerate(shards)]


def tiny(data: Path, **knobs: object) -> Config:
    """TINY over a data directory."""
    return load_config({**TINY, "DATA_PATH": str(data), **{k: str(v) for k, v in knobs.items()}})


def only_shard(data: Path, kind: str) -> np.ndarray:
    """The tokens of a kind in a directory with one shard of it."""
    (path,) = train_gpt.list_shards(str(data), kind)
    return np.array(train_gpt.read_shard(path))


@pytest.fixture
def data_copy(tiny_data: Path, tmp_path: Path) -> Path:
    """A data directory that a test may change."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def ranks(world: int) -> list[Runtime]:
    """Runtimes of a world that nobody launched."""
    return [Runtime(rank, world, torch.device("cpu"), Log(None, True)) for rank in range(world)]


# Shards


def test_shard_reads_back_and_damage_is_a_user_error_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "s.bin"
    with pytest.raises(UserError, match="no such shard"):
        train_gpt.read_shard(path)
    assert len(train_gpt.read_shard(write_shard(path, []))) == 0, "a header alone is an empty shard"
    tokens, raw = train_gpt.read_shard(write_shard(path, [1, 2, 65535])), path.read_bytes()
    assert tokens.dtype == np.uint16 and tokens.tolist() == [1, 2, 65535]
    for words, blobs in {
        "not a shard": [b"", raw[:7], b"\0" + raw[1:], raw[:4] + b"\2" + raw[5:]],
        "header promises 3 tokens": [raw[:500], raw[:-2], raw[:-1], raw + b"\0"],
        "header promises -1 tokens": [raw[:8] + b"\xff" * 4 + raw[12:]],
    }.items():
        for blob in blobs:
            path.write_bytes(blob)
            with pytest.raises(UserError, match=f"{path}.*{words}") as refused:
                train_gpt.read_shard(path)
            assert "\n" not in str(refused.value), words


def test_shards_are_listed_by_number_and_kind(tmp_path: Path) -> None:
    for kind in ("train", "val"):
        with pytest.raises(UserError, match=f"has no fineweb_{kind}.*data/prepare.py"):
            train_gpt.list_shards(str(tmp_path / "nowhere"), kind)
    assert train_gpt.list_shards(str(tmp_path), "val_bytes") == []
    counts = {"train": 11, "val": 1, "val_bytes": 1}
    listed = {kind: write_shards(tmp_path, *[[1]] * count, kind=kind) for kind, count in counts.items()}
    (tmp_path / "fineweb_train_000003.bin.tmp").write_bytes(b"")
    for kind, paths in listed.items():
        assert train_gpt.list_shards(str(tmp_path), kind) == paths
    listed["train"][1].unlink()
    with pytest.raises(UserError, match="fineweb_train_000001.bin is missing"):
        train_gpt.list_shards(str(tmp_path), "train")


# Segments


def test_segment_bounds_golden() -> None:
    for case in GOLDEN["cu_seqlens"]:
        total, cu = case["total"], case["cu"]
        bounds = train_gpt.segment_bounds(np.array(case["bos"], np.int64), total, case["cap"])
        padded = train_gpt.pad_bounds(bounds, GOLDEN["bucket"])
        assert bounds.tolist() == cu and bounds.dtype == padded.dtype == np.int32, total
        assert np.diff(bounds).max() == case["max_segment"] and len(padded) == case["padded_entries"], total
        assert padded[: len(cu)].tolist() == cu and set(padded[len(cu) :]) <= {total}, total


@given(data=st.data(), total=st.integers(1, 60), cap=st.integers(0, 20))
@PROPERTY
def test_segments_hold_no_document_start_inside(data: st.DataObject, total: int, cap: int) -> None:
    starts = sorted(data.draw(st.sets(st.integers(0, total - 1), max_size=8)))
    bounds = train_gpt.segment_bounds(np.array(starts, np.int64), total, cap).tolist()
    assert bounds[0] == 0 and bounds[-1] == total and set(starts) <= set(bounds)
    assert all(0 < b - a <= (cap or total) for a, b in itertools.pairwise(bounds))
    owner = [max([0, *(s for s in starts if s <= a)]) for a in bounds[:-1]]
    assert all(a in (s, 0) or (cap and (a - s) % cap == 0) for a, s in zip(bounds, owner, strict=False))


# The training stream


def reference_stream(shards: list[list[int]], count: int, whole_docs: bool) -> Iterator[list[int]]:
    """ShardWalker written the slow way: requests of `count` tokens, for ever."""
    rest: list[int] = []
    for shard in itertools.cycle(shards):
        first = shard.index(BOS_ID) if whole_docs and BOS_ID in shard else 0
        rest = shard[first:] if whole_docs else rest + shard
        while len(rest) >= count:
            yield rest[:count]
            rest = rest[count:]


class Impatient(ShardWalker):
    """Gives up where the walker would turn for ever."""

    opened = 0

    def open_next(self) -> None:
        self.opened += 1
        if self.opened > 20:
            raise TimeoutError("the walker turns for ever")
        super().open_next()


@given(
    shards=st.lists(st.lists(st.integers(0, 9), max_size=30), min_size=1, max_size=4),
    count=st.integers(1, 12),
    whole_docs=st.booleans(),
)
@example(shards=[[], []], count=1, whole_docs=False)
@example(shards=[[], []], count=1, whole_docs=True)
@PROPERTY
def test_walker_equals_the_slow_reference(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]], count: int, whole_docs: bool
) -> None:
    usable = [s[s.index(BOS_ID) if whole_docs and BOS_ID in s else 0 :] for s in shards]
    paths = write_shards(tmp_path_factory.mktemp("walk"), *shards)
    if not any(shards) or (whole_docs and max(map(len, usable)) < count):
        with pytest.raises(UserError, match="no training shard holds"):
            Impatient(paths, 10, whole_docs).next_tokens(count)
        return
    walker = ShardWalker(paths, 10, whole_docs)
    for wanted in itertools.islice(reference_stream(shards, count, whole_docs), 12):
        assert walker.next_tokens(count).tolist() == wanted


def test_walker_refuses_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    walker = ShardWalker(write_shards(tmp_path, [1, 2, 3], [1, 10, 3]), 10, True)
    assert walker.next_tokens(3).tolist() == [1, 2, 3]
    with pytest.raises(UserError, match=r"fineweb_train_000001.bin: token id 10 is outside VOCAB_SIZE=10"):
        walker.next_tokens(3)


def test_batches_shift_targets_and_never_share_a_span(tiny_data: Path) -> None:
    for loader in ("packed_docs", "stream"):
        cfg = tiny(tiny_data, LOADER=loader)
        stream, span = only_shard(tiny_data, "train"), cfg.train_batch_tokens // cfg.batch_slices + 1
        position = int(np.flatnonzero(stream == BOS_ID)[0]) if loader == "packed_docs" else 0
        with contextlib.closing(train_gpt.train_batches(cfg, ranks(1)[0])) as batches:
            steps = (step[cfg.train_seq_len] for step in itertools.islice(batches, 5))
            for batch in itertools.chain.from_iterable(steps):
                wanted = stream[position : position + span].tolist()
                assert batch.ids.flatten().tolist() == wanted[:-1], loader
                assert batch.targets.flatten().tolist() == wanted[1:], loader
                position += span
                assert batch.ids.dtype == batch.targets.dtype == torch.int64


def test_a_batch_is_documents_cut_at_the_span_or_rows_without_bounds() -> None:
    batch = train_gpt.packed_docs_batch(np.array([5, 6, 1, 7, 8, 9, 10, 11, 1, 12, 1], np.uint16), 4)
    assert batch.ids.shape == (1, 10) and batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [0, 2, 6, 8] + [10] * 60
    batch = train_gpt.stream_batch(np.arange(9, dtype=np.uint16), 4)
    assert batch.ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and batch.targets.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert batch.cu_seqlens is None


def test_every_world_sees_the_same_tokens_per_step(tiny_data: Path) -> None:
    for loader, world in itertools.product(("packed_docs", "stream", "shuffled"), (2, 4)):
        cfg = tiny(tiny_data, LOADER=loader)
        alone, *together = (train_gpt.train_batches(cfg, runtime) for runtime in ranks(1) + ranks(world))
        for _ in range(4):
            whole, *parts = (next(batches)[cfg.train_seq_len] for batches in (alone, *together))
            assert [len(part) for part in parts] == [cfg.batch_slices // world] * world, (loader, world)
            for j, a in enumerate(whole):
                b = parts[j % world][j // world]
                assert torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets), (loader, world, j)
                bounds = [None if x.cu_seqlens is None else x.cu_seqlens.tolist() for x in (a, b)]
                assert bounds[0] == bounds[1], (loader, world, j)
        for batches in (alone, *together):
            batches.close()


def test_bad_later_shard_is_found_before_the_first_step(data_copy: Path) -> None:
    raw = (data_copy / "fineweb_train_000000.bin").read_bytes()
    (data_copy / "fineweb_train_000001.bin").write_bytes(raw[:-2])
    with pytest.raises(UserError, match="fineweb_train_000001.bin"):
        next(train_gpt.train_batches(tiny(data_copy), ranks(1)[0]))


# Prefetching


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread is not threading.main_thread()}


def wait_until_gone(started: set[threading.Thread]) -> bool:
    """Whether the threads end at all: within a minute."""
    deadline = time.monotonic() + 60
    while any(t.is_alive() for t in started) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(t.is_alive() for t in started)


def test_prefetch_keeps_order_is_bounded_and_its_thread_ends_with_its_consumer() -> None:
    before, made = threads(), []
    items = train_gpt.prefetch((made.append(i) or i for i in itertools.count()), 2)
    assert made == [] and [next(items) for _ in range(5)] == list(range(5))
    started = threads() - before
    time.sleep(0.05)
    assert len(made) <= 5 + 2 + 1, "two waiting, one in hand"
    assert len(started) == 1
    items.close()
    assert wait_until_gone(started)


def test_prefetch_raises_the_producers_error_after_the_items_before_it() -> None:
    def consume(error: type[Exception], got: list[object]) -> None:
        def source() -> Iterator[int]:
            yield 1
            raise error("broken")

        try:
            got.extend(train_gpt.prefetch(source(), 2))
        except error as raised:
            got.append(str(raised))

    for error in (UserError, OSError, RuntimeError, IndexError):
        before, got = threads(), []
        consumer = threading.Thread(target=consume, args=(error, got), daemon=True)
        consumer.start()
        consumer.join(60)
        assert got == [1, "broken"], f"{error}: a consumer that waits for ever is worse than any error"
        assert wait_until_gone(threads() - before), error


# Calibration


def test_calibration_rows_are_windows_of_the_shards_and_depend_on_the_index_alone(tiny_data: Path) -> None:
    cfg = tiny(tiny_data)
    stream = only_shard(tiny_data, "train").tobytes()
    rows = [train_gpt.calibration_rows(cfg, index) for index in range(4)]
    assert all(r.shape == (2, 64) and r.dtype == np.int64 for r in rows)
    assert all(row.astype("<u2").tobytes() in stream for r in rows for row in r)
    assert len({r.tobytes() for r in rows}) == 4
    assert all(np.array_equal(rows[i], train_gpt.calibration_rows(cfg, i)) for i in (3, 1))


def test_calibration_refuses_ids_that_training_has_not_met(tmp_path: Path) -> None:
    write_shards(tmp_path, [1] * 64, [1, *[400] * 200])
    with pytest.raises(UserError, match="token id 400 is outside VOCAB_SIZE=320"):
        train_gpt.calibration_rows(tiny(tmp_path), 0)


def test_a_file_in_anothers_place_a_lost_one_and_an_odd_manifest_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_data, tmp_path / "shards"))
    shutil.copy(folder / "fineweb_train_000000.bin", folder / "fineweb_val_000000.bin")
    with pytest.raises(UserError, match=r"fineweb_val_000000\.bin: not the file that manifest\.json lists"):
        train_gpt.check_data(tiny(folder), Log(None, True))
    (folder / "manifest.json").write_text('{"shards": [], "tokenizer": "x.model"}')
    with pytest.raises(UserError, match="lists no files as"):
        train_gpt.check_data(tiny(folder), Log(None, True))
    (folder / "fineweb_val_000000.bin").rename(folder / "fineweb_val_000001.bin")
    with pytest.raises(UserError, match=r"fineweb_val_000000\.bin is missing, but"):
        train_gpt.load_val(tiny(folder))


def test_more_ranks_than_gpus_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="LOCAL_RANK=1, but torch sees 1 GPUs"):
        Runtime.start(Config(), {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})


def test_a_tokenizer_may_have_any_file_name(tiny_data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_data, tmp_path / "shards"))
    (model,) = folder.glob("*.model")
    model.rename(folder / os.fsdecode(b"caf\xe9.model"))
    assert np.array_equal(train_gpt.load_val(tiny(folder)).bytes, train_gpt.load_val(tiny(tiny_data)).bytes)


def test_calibration_needs_a_shard_that_is_long_enough(tmp_path: Path) -> None:
    write_shards(tmp_path, [1] * 64, [1] * 10)
    with pytest.raises(UserError, match="TRAIN_SEQ_LEN=64"):
        train_gpt.calibration_rows(tiny(tmp_path), 0)
    write_shards(tmp_path, [1] * 64, [1, *[2] * 64])
    assert (train_gpt.calibration_rows(tiny(tmp_path), 0)[:, 0] == 1).all()


# Bytes


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> Path:
    (path,) = tiny_data.glob("*.model")
    return path


@pytest.fixture(scope="module")
def processor(tokenizer: Path) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_file=str(tokenizer))


@pytest.fixture(scope="module")
def table(tokenizer: Path) -> train_gpt.ByteTable:
    return train_gpt.byte_table(tokenizer, 320)


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=4))
@PROPERTY
def test_bytes_of_documents_are_their_utf8_length(
    processor: spm.SentencePieceProcessor, table: train_gpt.ByteTable, texts: list[str]
) -> None:
    """Of the text as the tokenizer holds it: it folds compatibility characters (NFKC) and runs of white space first."""
    ids = [processor.encode(text) for text in texts]
    stream = np.array([token for document in ids for token in [BOS_ID, *document]], np.int64)
    counted = table.count(stream)
    assert counted.dtype == np.int32 and counted.min() >= 0
    assert counted.sum() == sum(len(processor.decode(document).encode("utf-8")) for document in ids)


@given(text=st.text(st.sampled_from("aeinrstLQ.,0123456789éß漢🙂 "), max_size=60))
@PROPERTY
def test_bytes_of_plain_text_are_the_true_utf8_length(
    processor: spm.SentencePieceProcessor, table: train_gpt.ByteTable, text: str
) -> None:
    """Characters that NFKC leaves alone, single spaces inside: nothing but the text itself to compare with."""
    text = " ".join(text.split())
    assert table.count(np.array([BOS_ID, *processor.encode(text)])).sum() == len(text.encode("utf-8"))


def test_leading_space_counts_unless_a_control_id_precedes(
    processor: spm.SentencePieceProcessor, table: train_gpt.ByteTable
) -> None:
    spaced = next(i for i in range(320) if processor.id_to_piece(i).startswith("\u2581") and table.bytes[i] >= 2)
    own, letter, byte = int(table.bytes[spaced]), processor.piece_to_id("e"), processor.piece_to_id("<0x41>")
    assert own == len(processor.id_to_piece(spaced)) - 1
    for before, credited in ((BOS_ID, own), (0, own), (2, own), (3, own), (letter, own + 1), (byte, own + 1)):
        assert table.count(np.array([before, spaced]))[1] == credited, processor.id_to_piece(before)
    assert table.count(np.array([spaced]))[0] == own, "nothing precedes the first token of a stream"


def test_byte_pieces_count_one_and_control_ids_nothing(
    processor: spm.SentencePieceProcessor, table: train_gpt.ByteTable
) -> None:
    pieces = [processor.piece_to_id(f"<0x{b:02X}>") for b in range(256)]
    assert len(set(pieces)) == 256 and (table.bytes[pieces] == 1).all() and not table.space[pieces].any()
    assert table.bytes[:4].tolist() == [0, 0, 0, 0] and table.boundary[:4].all() and not table.boundary[4:].any()
    ids = processor.encode("\U0001f642")
    assert len(ids) == 4 and table.count(np.array([BOS_ID, *ids])).tolist() == [0, 1, 1, 1, 1]


def test_tokenizers_that_do_not_fit_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    model, lines = io.BytesIO(), iter(["abab", "baba"] * 9)
    ids = {"bos_id": 1, "eos_id": 2, "pad_id": 0, "unk_id": 3, "vocab_size": 8, "hard_vocab_limit": False}
    plain = {"model_type": "bpe", "minloglevel": 2, "add_dummy_prefix": False}
    spm.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **plain, **ids)
    size = spm.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    for raw, vocab, words in (
        (tokenizer.read_bytes(), 512, "the tokenizer has 320 pieces, VOCAB_SIZE=512"),
        (b"not a model", 320, "x.model: not a SentencePiece model"),
        (model.getvalue(), size, r"no bare U\+2581 piece"),
    ):
        (tmp_path / "x.model").write_bytes(raw)
        with pytest.raises(UserError, match=words):
            train_gpt.byte_table(tmp_path / "x.model", vocab)


def test_which_tokenizer_a_run_uses(tiny_data: Path, tokenizer: Path, tmp_path: Path) -> None:
    assert train_gpt.find_tokenizer(tiny(tiny_data)) == tokenizer
    assert train_gpt.find_tokenizer(tiny(tmp_path)) is None
    assert train_gpt.find_tokenizer(tiny(tmp_path, TOKENIZER_PATH=tokenizer)) == tokenizer
    with pytest.raises(UserError, match="nope.model: no such file"):
        train_gpt.find_tokenizer(tiny(tiny_data, TOKENIZER_PATH=tmp_path / "nope.model"))
    for name in "ab":
        shutil.copy(tokenizer, tmp_path / f"{name}.model")
    with pytest.raises(UserError, match="holds 2 tokenizers; choose one with TOKENIZER_PATH"):
        train_gpt.find_tokenizer(tiny(tmp_path))


# The validation stream


def test_validation_is_cut_to_whole_windows_unless_the_tail_is_asked_for(tiny_data: Path) -> None:
    whole = only_shard(tiny_data, "val").astype(np.int64)
    cut, tail = (train_gpt.load_val(tiny(tiny_data, EVAL_INCLUDE_TAIL=flag)) for flag in (0, 1))
    assert (len(whole) - 1) % 64 != 0, "the fixture must have a tail, or this test says nothing"
    assert len(cut.tokens) == (len(whole) - 1) // 64 * 64 + 1 and np.array_equal(tail.tokens, whole)
    assert np.array_equal(cut.tokens, whole[: len(cut.tokens)]) and cut.tokens.dtype == np.int64
    assert len(cut.bytes) == len(cut.tokens) and np.array_equal(cut.bytes, tail.bytes[: len(cut.bytes)])


def test_whole_multiple_loses_nothing(data_copy: Path) -> None:
    for targets, kept in ((128, 129), (127, 65)):
        write_shards(data_copy, [1, *[5] * targets], kind="val")
        assert len(train_gpt.load_val(tiny(data_copy)).tokens) == kept


def test_validation_bytes_are_those_of_the_documents(tiny_data: Path, processor: spm.SentencePieceProcessor) -> None:
    val = train_gpt.load_val(tiny(tiny_data, EVAL_INCLUDE_TAIL=1))
    documents = np.split(val.tokens, np.flatnonzero(val.tokens == BOS_ID)[1:])
    texts = [processor.decode(document[1:].tolist()) for document in documents]
    known = json.loads((tiny_data / "manifest.json").read_text(encoding="utf-8"))["splits"]["val"]
    assert val.bytes[1:].sum() == sum(len(text.encode("utf-8")) for text in texts) == known["raw_bytes"]
    assert len(texts) == len(train_gpt.val_documents(val.tokens)) == known["docs"]


def test_shards_run_on_into_one_another(data_copy: Path) -> None:
    whole, one = only_shard(data_copy, "val"), train_gpt.load_val(tiny(data_copy))
    write_shards(data_copy, whole[:700], whole[700:], kind="val")
    two = train_gpt.load_val(tiny(data_copy))
    assert np.array_equal(one.tokens, two.tokens) and np.array_equal(one.bytes, two.bytes)


def test_sidecar_goes_before_the_tokenizer(data_copy: Path) -> None:
    counts = np.arange(len(only_shard(data_copy, "val"))) % 7
    write_shards(data_copy, counts, kind="val_bytes")
    val = train_gpt.load_val(tiny(data_copy))
    assert np.array_equal(val.bytes, counts[: len(val.tokens)]) and val.bytes.dtype == np.int32
    next(data_copy.glob("*.model")).unlink()
    assert np.array_equal(train_gpt.load_val(tiny(data_copy)).bytes, val.bytes)


def test_validation_that_does_not_fit_is_refused(data_copy: Path) -> None:
    size = len(only_shard(data_copy, "val"))

    def refused(message: str, **knobs: object) -> None:
        with pytest.raises(UserError, match=message):
            train_gpt.load_val(tiny(data_copy, **knobs))

    for sidecars in ([[1] * (size - 1)], [[1] * (size + 1)], [[1] * size, [1]]):
        written = write_shards(data_copy, *sidecars, kind="val_bytes")
        refused("sidecars do not match")
    written.pop().unlink()
    refused("the tokenizer has 320 pieces, VOCAB_SIZE=321", VOCAB_SIZE=321)  # it is checked even beside a sidecar
    written.pop().unlink()
    for tokens in ([], [1], [1] * 64):
        write_shards(data_copy, tokens, kind="val")
        refused(f"{len(tokens)} validation tokens are fewer")
    write_shards(data_copy, [1, *[5] * 99, 320], kind="val")
    refused("token id 320 is outside VOCAB_SIZE=320")
    write_shards(data_copy, [1, *[5] * 99], kind="val")
    next(data_copy.glob("*.model")).unlink()
    refused(r"neither a \*.model nor a byte sidecar")


@given(tokens=st.lists(st.integers(0, 3), min_size=2, max_size=40))
@PROPERTY
def test_documents_cover_every_target_once(tokens: list[int]) -> None:
    stream = np.array(tokens)
    if BOS_ID not in tokens:
        with pytest.raises(UserError, match="no document start"):
            train_gpt.val_documents(stream)
        return
    documents = train_gpt.val_documents(stream)
    targets = [start + i for start, length in documents for i in range(1, length)]
    assert targets == list(range(1, len(tokens)))
    assert [start for start, _ in documents[1:]] == np.flatnonzero(stream == BOS_ID)[1:].tolist()


def test_documents_end_with_the_next_bos_but_the_last() -> None:
    assert train_gpt.val_documents(np.array([1, 5, 6, 1, 7, 1, 8])) == [(0, 4), (3, 3), (5, 2)]
    assert train_gpt.val_documents(np.array([9, 9, 1, 7])) == [(0, 4)]
    assert train_gpt.val_documents(np.array([1, 7, 1])) == [(0, 3), (2, 1)]
