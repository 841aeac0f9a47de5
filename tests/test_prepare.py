"""data/prepare.py: documents in, shards out; the split, the tokenizer, resuming, and what it refuses."""

from __future__ import annotations

import contextlib
import functools
import gzip
import itertools
import json
import lzma
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import documents
import download
import interrupts
import numpy as np
import overlap
import prepare
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece as spm
import stdlib_prose
import zstandard
from caseops import CaseOps
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pair_fusion import FusedCaseOps
from prepare import Options
from round_trip import lost_characters, most_bytes
from stdlib_prose import ProseFilter

from train_gpt import Config, UserError, byte_table, fingerprint, load_val, locked, read_shard

FAULTS = Path(__file__).parent / "faults"  # small inputs that an earlier version got wrong, with random words

WORDS = "the a model of tokens learns every text it reads and forgets what nobody wrote down in 1984 or 2024".split()


def make_texts(count: int, seed: int = 0, words: int = 60) -> list[str]:
    """Distinct documents of random words."""
    rng = np.random.default_rng(seed)
    return [f"Document {seed} {i}. " + " ".join(rng.choice(WORDS, words)) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def read_split(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([read_shard(path) for path in sorted(folder.glob(f"fineweb_{split}_0*.bin"))])


def refused(message: str, *arguments: object, **options: object) -> None:
    """`prepare` with these options stops with one line that matches the message."""
    with pytest.raises(UserError, match=message) as caught:
        prepare.prepare(Options(*arguments, **options))
    assert "\n" not in str(caught.value)


def expected_stream(model: Path, texts: list[str]) -> list[int]:
    """The published layout, written the slow way: BOS and ids, document after document."""
    processor = spm.SentencePieceProcessor(model_file=str(model))
    return [token for text in texts for token in [1, *processor.encode(text)]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.model"
    path.write_bytes(prepare.train_tokenizer(make_texts(40), 320))
    return path


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "docs.jsonl", make_texts(30))


# Shards


@settings(max_examples=30)
@given(values=st.lists(st.integers(0, 65535), min_size=1, max_size=300), cut=st.integers(0, 300))
def test_a_growing_shard_ends_as_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], cut: int
) -> None:
    path = tmp_path_factory.mktemp("shard") / "fineweb_val_000000.bin"
    file = prepare.ShardFile(path)
    for part in (values[:cut], values[cut:]):
        file.append(np.array(part, dtype=np.uint16))
    assert not path.exists()
    row, raw = file.finish(), path.read_bytes()
    known = {"name": path.name, "bytes": len(raw), "tokens": len(values), "sha256": sha256(raw).hexdigest()}
    assert row == known | {"fingerprint": fingerprint(path)}
    assert raw == prepare.write_shard(path.with_name("x"), values).read_bytes() and read_shard(path).tolist() == values
    header = np.frombuffer(raw[:1024], dtype="<i4")
    assert header[:3].tolist() == [20240520, 1, len(values)] and not header[3:].any()


def test_a_fingerprint_reads_size_head_and_tail(tmp_path: Path) -> None:
    path, mib = tmp_path / "x", 1 << 20
    for raw in (b"", b"short", bytes(range(256)) * 4096, os.urandom(3 * mib)):
        path.write_bytes(raw)
        known = sha256(len(raw).to_bytes(8, "little") + raw[:mib] + raw[-mib:]).hexdigest()
        assert fingerprint(path) == known == prepare.file_row(path)["fingerprint"]
    path.write_bytes(raw[:mib] + bytes([raw[mib] ^ 1]) + raw[mib + 1 :])
    assert fingerprint(path) == known and prepare.file_row(path)["sha256"] != sha256(raw).hexdigest()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    file, before = prepare.ShardFile(tmp_path / "fineweb_val_000000.bin"), resource.getrlimit(resource.RLIMIT_FSIZE)
    file.append(np.zeros(100, np.uint16))
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(UserError, match=r"fineweb_val_000000\.bin\.tmp: cannot be written .*make room"):
            file.append(np.zeros(50_000, np.uint16))
        file.abandon()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


# The split and the stream


@settings(max_examples=12)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), min_size=2, unique=True, max_size=9),
    data=st.data(),
)
def test_stream_equals_the_published_layout(
    tmp_path_factory: pytest.TempPathFactory, model: Path, texts: list[str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    val_docs, shard_tokens = data.draw(st.integers(1, len(texts) - 1)), data.draw(st.integers(5, 200))
    docs = write_jsonl(folder / "docs.jsonl", texts)
    assume(len(expected_stream(model, texts[val_docs:])) > len(texts) - val_docs)  # else: no text to train on
    options = Options((docs,), folder / "out", model, val_docs=val_docs, shard_tokens=shard_tokens)
    manifest = prepare.prepare(options)
    names = [shard["name"] for shard in manifest["shards"]]
    assert names == sorted(names, key=lambda name: ("train" in name, name))
    for split, part in (("val", texts[:val_docs]), ("train", texts[val_docs:])):
        assert read_split(options.out, split).tolist() == expected_stream(model, part)
        counts = manifest["splits"][split]
        assert counts["docs"] == len(part) and counts["raw_bytes"] == sum(len(text.encode()) for text in part)
        sizes = [shard["tokens"] for shard in manifest["shards"] if split in shard["name"]]
        assert sizes[:-1] == [shard_tokens] * (len(sizes) - 1) and sum(sizes) == counts["tokens"]


def test_jobs_and_chunks_do_not_change_a_byte(tmp_path: Path, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"docs": (docs,), "vocab_size": 340, "val_docs": 7, "shard_tokens": 500}
    for out, jobs, chunk in (("one", 1, prepare.CHUNK_BYTES), ("two", 2, 900), ("small", 1, 900)):
        monkeypatch.setattr(prepare, "CHUNK_BYTES", chunk)
        prepare.prepare(Options(out=tmp_path / out, jobs=jobs, **common), prepare.CaseOps())
        assert contents(tmp_path / out) == contents(tmp_path / "one"), out


def test_manifest_tells_the_whole_story(tmp_path: Path, docs: Path) -> None:
    out, raw = tmp_path / "out", docs.read_bytes()
    manifest = prepare.prepare(Options((docs,), out, vocab_size=320, val_docs=10))
    assert json.loads((out / "manifest.json").read_text()) == manifest
    hashes = [sha256(text.encode()).digest() for text in make_texts(30)]
    assert manifest["val_document_sha256"] == [digest.hex() for digest in hashes[:10]]
    chained = functools.reduce(lambda chain, digest: sha256(chain + digest).digest(), hashes[10:], sha256().digest())
    assert manifest["train_documents_digest"] == chained.hex() and manifest["tokenizer"]["vocab_size"] == 320
    source = {"name": "docs.jsonl", "sha256": sha256(raw).hexdigest(), "bytes": len(raw), "docs": 30}
    assert manifest["sources"] == [source] and str(tmp_path) not in (out / "manifest.json").read_text()
    files = contents(out)
    assert [*files] == "bpe_320.model fineweb_train_000000.bin fineweb_val_000000.bin manifest.json".split()
    assert all(sha256(files[shard["name"]]).hexdigest() == shard["sha256"] for shard in manifest["shards"])


# Inputs


def test_zst_with_long_windows_is_read(tmp_path: Path) -> None:
    for window in (28, 31):
        path = FAULTS / f"window{window}.jsonl.zst"
        lines = list(documents.read_jsonl(path, 0, "jsonl.zst"))
        assert b"\n".join(item.raw for item in lines).strip() == (FAULTS / "good.jsonl").read_bytes().strip()


def test_what_cannot_be_read_is_named(tmp_path: Path, model: Path) -> None:
    for name, message in {
        "latin1.parquet": r"latin1\.parquet:46: 'text' is not UTF-8: byte 0xe9",
        "deep.jsonl": r"deep\.jsonl:21: JSON nested too deep",
    }.items():
        refused(message, (FAULTS / name,), tmp_path / name, model, val_docs=3)


def test_names_that_are_not_utf8_on_a_terminal_of_ascii(tmp_path: Path, model: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(odd)
    folder = Path(os.fsdecode(odd))
    write_jsonl(folder / os.fsdecode(b"d\xe9.jsonl"), make_texts(9))
    pyarrow.parquet.write_table(pyarrow.table({"text": make_texts(9, seed=1)}), tmp_path / "x.parquet")
    (tmp_path / "x.parquet").rename(folder / os.fsdecode(b"p\xe9.parquet"))
    tokenizer = folder / os.fsdecode(b"m\xe9.model")
    shutil.copy(model, tokenizer)
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, prepare.__file__, "--docs", odd, "--tokenizer", os.fsencode(tokenizer)]
    command += ["--val-docs", "3", "--jobs", "1", "--out", odd + b"/out"]
    done = subprocess.run(command, env=os.environ | plain, capture_output=True)
    assert done.returncode == 0 and rb"tokenizer m\udce9.model, 320 pieces" in done.stdout, done.stderr
    assert read_split(folder / "out", "val").tolist() == expected_stream(model, make_texts(9)[:3])
    assert prepare.audit(folder / "out").docs == 3


FORMATS = "jsonl jsonl.gz jsonl.xz jsonl.zst parquet tree".split()


def test_all_formats_give_the_same_stream(tmp_path: Path, model: Path) -> None:
    texts, inputs = make_texts(12), {suffix: tmp_path / f"a.{suffix}" for suffix in FORMATS}
    raw = write_jsonl(inputs["jsonl"], texts).read_bytes()
    inputs["jsonl"].write_bytes(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n"))  # as written on Windows
    half = raw.index(b"\n", len(raw) // 2) + 1
    inputs["jsonl.gz"].write_bytes(gzip.compress(raw))
    inputs["jsonl.xz"].write_bytes(lzma.compress(raw))
    inputs["jsonl.zst"].write_bytes(zstandard.compress(raw[:half]) + zstandard.compress(raw[half:]))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), inputs["parquet"], row_group_size=5)
    for index, text in enumerate(texts):
        path = inputs["tree"] / f"{index // 5}" / f"{index:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (inputs["tree"] / "notes.md").write_text("not a document")
    streams = {}
    for name, path in inputs.items():
        prepare.prepare(Options((path,), tmp_path / f"out_{name}", model, val_docs=4))
        streams[name] = contents(tmp_path / f"out_{name}")
        del streams[name]["manifest.json"]
        assert streams[name] == streams["jsonl"], name


def test_sources_follow_the_order_of_the_arguments(tmp_path: Path, model: Path) -> None:
    first, second = make_texts(3, seed=1), make_texts(3, seed=2)
    paths = (write_jsonl(tmp_path / "z.jsonl", first), write_jsonl(tmp_path / "a.jsonl", second))
    manifest = prepare.prepare(Options(paths, tmp_path / "out", model, val_docs=1))
    assert read_split(tmp_path / "out", "train").tolist() == expected_stream(model, first[1:] + second)
    assert [source["docs"] for source in manifest["sources"]] == [3, 3]


def test_links_that_would_leave_documents_out_are_refused(tmp_path: Path, model: Path) -> None:
    tree, away = tmp_path / "tree", tmp_path / "away"
    for seed, folder in enumerate((tree, away)):
        folder.mkdir()
        write_jsonl(folder / "a.jsonl", make_texts(9, seed=seed))
    for name, target in (("b", away), ("b", tmp_path / "gone"), ("b.jsonl", tmp_path / "gone.jsonl")):
        link = tree / name
        link.symlink_to(target)
        refused(f"{link}: a link to a directory or to nothing", (tree,), tmp_path / "out", model, val_docs=3)
        link.unlink()
    link.symlink_to(away / "a.jsonl")
    manifest = prepare.prepare(Options((tree,), tmp_path / "out", model, val_docs=3))
    assert manifest["sources"][0]["docs"] == 18, "a link to a file is followed"


GOOD = b'{"text": "fine"}\n'
MANY = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(2000, words=20)).encode()
BAD_INPUTS = [
    ("x.jsonl", GOOD + b"\n{nonsense\n", r"x\.jsonl:3: not a line of JSON"),
    ("x.jsonl", GOOD + b'{"body": "a"}\n', r"x\.jsonl:2: no key 'text'"),
    ("x.jsonl", GOOD + b'{"text": 5}\n', r"x\.jsonl:2: 'text' is int"),
    ("x.jsonl", GOOD + b"[1]\n", r"x\.jsonl:2: no key"),
    ("x.jsonl", GOOD + b'{"text": "caf\xe9"}\n', r"x\.jsonl:2: not UTF-8: byte 0xe9"),
    ("x.jsonl", GOOD + b'{"text": "\\ud800"}\n', r"x\.jsonl:2: .*surrogate"),
    ("x.jsonl", b"", "is empty"),
    ("x.jsonl", b"\n\n", "has 0 documents"),
    ("x.txt", b"a\nb\xff", r"x\.txt:2: not UTF-8"),
    ("x.csv", b"a,b\n", "unknown suffix"),
    ("x.jsonl.gz", gzip.compress(MANY)[:-9], r"x\.jsonl\.gz: damaged"),
    ("x.jsonl.xz", lzma.compress(MANY)[:-9], r"x\.jsonl\.xz: damaged"),
    ("x.jsonl.zst", zstandard.compress(MANY)[:-9], r"x\.jsonl\.zst: damaged"),
    ("x.jsonl.zst", b"not zstandard at all", r"x\.jsonl\.zst: damaged"),
    # a frame of 7 bytes with a window of 4 GiB
    ("x.jsonl.zst", b"\x28\xb5\x2f\xfd\x00\xb0\x39\x00\x00" + b"nothing", r"x\.jsonl\.zst: its window is over 2 GiB"),
    ("x.parquet", b"PAR1 not really", r"x\.parquet: cannot be read"),
    ("x.jsonl", GOOD, "nothing is left to train on"),
    ("x.jsonl", GOOD + 3 * b'{"text": " "}\n', "the training documents hold no text; look at --docs and --text-key"),
]


@pytest.mark.parametrize("train", [True, False], ids=["train_tokenizer", "given_tokenizer"])
def test_bad_input_is_one_line(tmp_path: Path, model: Path, train: bool) -> None:
    tokenizer = {"vocab_size": 320} if train else {"tokenizer": model}
    for index, (name, raw, message) in enumerate(BAD_INPUTS):
        out = tmp_path / str(index)
        (tmp_path / name).write_bytes(raw)
        refused(message, (tmp_path / name,), out, val_docs=1, **tokenizer)
        assert not (out / "manifest.json").exists(), message


def test_the_column_of_a_parquet_file_is_chosen(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", "b"], "id": [1, 2]}), path)
    for key, message in (("text", "no column 'text'; it has body, id"), ("id", r"x\.parquet:1: 'id' is int, not text")):
        refused(message, (path,), tmp_path / key, model, val_docs=1, text_key=key)
    manifest = prepare.prepare(Options((path,), tmp_path / "out2", model, val_docs=1, text_key="body"))
    assert manifest["splits"]["train"]["docs"] == 1


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    wrong_numbers = {"val_docs": [0], "vocab_size": [65537], "jobs": [0], "shard_tokens": [0, 2**31]}
    for name, values in (wrong_numbers | {"sample_mb": [0, 1e-7, 1e10, float("inf"), float("nan")]}).items():
        for value in values:
            with pytest.raises(UserError, match=re.escape(f"{name.replace('_', '-')} {value}")):
                Options(**{"docs": (tmp_path,), "out": tmp_path, "vocab_size": 400, name: value})
    for wrong, message in (({"vocab_size": 0}, "either --tokenizer"), ({"docs": ()}, "names no file")):
        with pytest.raises(UserError, match=message):
            Options(**{"docs": (tmp_path,), "out": tmp_path, "vocab_size": 400, **wrong})


# Overlap


@pytest.mark.parametrize("train", [True, False], ids=["train_tokenizer", "given_tokenizer"])
def test_overlap_is_refused_or_dropped(tmp_path: Path, model: Path, train: bool) -> None:
    texts = make_texts(12)
    path = write_jsonl(tmp_path / "x.jsonl", [*texts, texts[1], texts[9], "", ""])
    kind = {"vocab_size": 320} if train else {"tokenizer": model}
    message = r"x\.jsonl:13: this training document is also validation document 2"
    refused(message, (path,), tmp_path / "out", val_docs=4, **kind)
    manifest = prepare.prepare(Options((path,), tmp_path / "out2", val_docs=4, drop_overlap=True, **kind))
    assert manifest["overlap_dropped"] == 1
    assert manifest["splits"]["train"]["docs"] == 11 and manifest["sources"][0]["docs"] == 16
    stream = expected_stream(tmp_path / "out2" / manifest["tokenizer"]["name"], [*texts[4:], texts[9], "", ""])
    assert read_split(tmp_path / "out2", "train").tolist() == stream


@settings(max_examples=60)
@given(data=st.data(), window=st.integers(1, 8), block=st.integers(1, 30))
def test_every_long_match_is_found(data: st.DataObject, window: int, block: int) -> None:
    """Against the definition, written the slow way: few different tokens, so that much matches."""
    tokens = st.lists(st.integers(0, 2), max_size=60)
    val, shards = data.draw(tokens), data.draw(st.lists(tokens, max_size=4))
    stream, expected = [token for shard in shards for token in shard], np.zeros(len(val), bool)
    known = {tuple(stream[i : i + window]) for i in range(len(stream) - window + 1)}
    for i in range(len(val) - window + 1):
        expected[i : i + window] |= tuple(val[i : i + window]) in known
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "BLOCK", block)
        found = overlap.shingle_overlap(np.array(val), [np.array(shard, np.uint16) for shard in shards], window)
    assert found.covered.tolist() == expected.tolist() and found.matched == expected.sum()
    assert len(found.windows) == len(shards) and bool(sum(found.windows)) == expected.any()


def leaks(texts: list[str], model: Path) -> dict[str, list[int]]:
    """Streams of training tokens in which validation documents hide from a comparison of whole documents."""
    processor = spm.SentencePieceProcessor(model_file=str(model))
    ids = [processor.encode(text) for text in texts]
    return {
        "cut by a token": [token for row in ids for token in [1, *row[:-1]]],
        "with EOS": [token for row in ids for token in [1, *row, 2]],
        "joined": [token for a, b in itertools.pairwise(ids) for token in [1, *a, *b]],
        "from the middle": [token for row in ids for token in [1, 9, 9, *row[20:]]],
    }


def test_overlap_is_found_whatever_was_done_to_the_documents(tmp_path: Path, model: Path) -> None:
    texts = make_texts(12)
    prepare.prepare(Options((write_jsonl(tmp_path / "x.jsonl", texts),), tmp_path / "clean", model, val_docs=8))
    val, clean = read_split(tmp_path / "clean", "val"), read_split(tmp_path / "clean", "train")
    assert overlap.shingle_overlap(val, [clean]).share == 0
    for name, stream in leaks(texts[:8], model).items():
        planted = np.array(stream, np.uint16)
        # in three shards, so that documents lie across borders
        found = overlap.shingle_overlap(val, [clean, planted[:301], planted[301:]])
        assert found.share > 0.8 and found.windows[0] == 0 < min(found.windows[1:]), name
    # one run of 64 is found wherever it stands, one of 63 is none
    for length, share in ((64, 64 / len(val)), (63, 0)):
        run = np.concatenate((clean[:70], val[100 : 100 + length], clean[70:]))
        assert overlap.shingle_overlap(val, [run]).share == share


def test_preparation_and_audit_fail_above_the_stated_share(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = make_texts(20)
    docs = write_jsonl(tmp_path / "x.jsonl", [*texts, texts[3][:-1]])
    common = {"docs": (docs,), "out": tmp_path / "out", "tokenizer": model, "val_docs": 10}
    message = r"^\d+\.\d\d% of the validation tokens .* fineweb_train_000000\.bin; at most 1\.00% .*documents: 4\)"
    refused(message, max_overlap=overlap.MAX_SHARE, **common)
    monkeypatch.setattr(prepare, "encode_task", None)  # the shards are complete, so no document is encoded again
    manifest = prepare.prepare(Options(max_overlap=0.2, **common))
    found = manifest["overlap"]
    assert 0.05 < found["share"] < 0.2 == found["limit"] and found["documents"] == [4]
    refused(message, max_overlap=overlap.MAX_SHARE, **common)
    assert prepare.main(["audit", str(common["out"])]) == 0, "the manifest allows it"
    assert f"({found['share']:.2%}) lie in runs of 64" in capsys.readouterr().out
    for share in ("nan", "1.5", "-0.1"):
        assert prepare.main(["audit", str(common["out"]), f"--max-overlap={share}"]) == 2
        assert f"--max-overlap {share}: a share from 0 to 1" in capsys.readouterr().err
    assert prepare.main(["audit", str(common["out"]), "--max-overlap", "0.01"]) == 2
    assert re.search(message, capsys.readouterr().err.removeprefix("error: "))


# Tokenizer


SPACES = "the cat  sat on the mat ", " of the most", "the   end", "at the end of the day  ", "", " ", "a"


def spm_model(folder: Path, name: str, **arguments: object) -> Path:
    """A BPE tokenizer with byte pieces and these arguments."""
    common = {"model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2}
    common |= {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "vocab_size": 400, "add_dummy_prefix": False}
    lines = iter([*SPACES[:4], "caf\u00e9 au lait"] * 30)
    spm.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=str(folder / name), **common | arguments)
    return folder / f"{name}.model"


def test_counted_bytes_are_the_texts_wherever_markers_stand(tmp_path: Path) -> None:
    """Suffix white space, pieces of several spaces, and a plain control; the old table counted up to 49 % more."""
    for name in ("plain", "suffix", "spaces"):
        for docs in ("good.jsonl", "spaces.jsonl"):
            out, texts = tmp_path / name / docs, [json.loads(line)["text"] for line in (FAULTS / docs).open()]
            options = Options((FAULTS / docs,), out, FAULTS / f"{name}.model", val_docs=20)
            manifest = prepare.prepare(options)
            val = load_val(Config(data_path=str(out), vocab_size=400, eval_seq_len=64, eval_include_tail=True))
            # only spaces.model keeps runs of spaces
            kept = texts[:20] if name == "spaces" else [re.sub(" +", " ", text).strip(" ") for text in texts[:20]]
            assert val.bytes.sum() == len("".join(kept)) == manifest["round_trip"]["counted_bytes"], (name, docs)
            assert manifest["lossy"] is False and manifest["round_trip"]["lossy_docs"] == 0
            assert prepare.audit(out).counted_bytes == prepare.audit(out).decoded_bytes == len("".join(kept))


def test_counted_bytes_are_decoded_bytes_for_every_kind_of_white_space(tmp_path: Path) -> None:
    inside = False
    for superwords, suffix, dummy, keep in itertools.product((False, True), repeat=4):
        name = f"{superwords}{suffix}{dummy}{keep}"
        arguments = {"split_by_whitespace": not superwords, "treat_whitespace_as_suffix": suffix}
        arguments |= {"add_dummy_prefix": dummy, "remove_extra_whitespaces": not keep}
        path = spm_model(tmp_path, name, **arguments, allow_whitespace_only_pieces=keep)
        if suffix and dummy:
            with pytest.raises(UserError, match=f"{name}.model: the tokenizer adds a space to the end"):
                byte_table(path, spm.SentencePieceProcessor(model_file=str(path)).get_piece_size())
            continue
        processor = spm.SentencePieceProcessor(model_file=str(path))
        inside |= any("\u2581" in processor.id_to_piece(i)[1:-1] for i in range(processor.get_piece_size()))
        table = byte_table(path, processor.get_piece_size())
        for text in SPACES:
            ids = processor.encode(text)
            decoded = processor.decode(ids)
            assert table.count(np.array([1, *ids], np.int64)).sum() == len(decoded), (name, text)
            assert decoded == text if keep else decoded.split() == text.split(), (name, text)
    assert inside, "no tokenizer has a piece with a space inside, so nothing was tested"


def test_a_tokenizer_that_loses_text_is_refused_or_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--docs", str(FAULTS / "good.jsonl"), "--tokenizer", str(FAULTS / "casefold.model"), "--val-docs", "20"]
    command += ["--jobs", "1", "--out", str(tmp_path / "out")]
    assert prepare.main(command) == 2
    error = capsys.readouterr().err
    assert re.search(r"good\.jsonl:1: .*casefold\.model .*'an from Have was a i' comes back as 'an from have", error)
    assert error.count("\n") == 1 and "--allow-lossy" in error and not (tmp_path / "out" / "manifest.json").exists()
    assert prepare.main([*command, "--allow-lossy"]) == 0
    assert "LOSSY 20 of 20 validation documents" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    texts = [json.loads(line)["text"] for line in (FAULTS / "good.jsonl").open()][:20]
    capitals, size = sum(char.isupper() for text in texts for char in text), len("".join(texts))
    loss = {"docs": 20, "raw_bytes": size, "counted_bytes": size, "lossy_docs": 20, "lost_chars": capitals}
    assert manifest["lossy"] is True and manifest["round_trip"] == loss | {"excess_bytes": 0}
    assert prepare.main(command) == 2
    assert "20 validation documents; use --allow-lossy" in capsys.readouterr().err
    assert prepare.main(["audit", str(tmp_path / "out")]) == 0
    assert "lossy True" in capsys.readouterr().out


def test_what_a_normaliser_may_and_may_not_do(tmp_path: Path) -> None:
    """Rules are lines of code points: from, tab, to."""
    docs = write_jsonl(tmp_path / "x.jsonl", [f"caf\u00e9 au\tlait \ufb01n {i}" for i in range(9)])
    for name, rule, message in (
        ("accent", "E9\t65\n", r"'caf\u00e9 au la.*' comes back as 'cafe au la"),
        ("apart", "E9\t65 301\n", "counts as 21 bytes, 1 more than it has"),
        ("removed", "74\t\n", "comes back as"),
        ("glued", "9\t\n", "comes back as .*aulait"),
        ("tab", "9\t20\n", None),
        ("ligature", "FB01\t66 69\n", None),
    ):
        (tmp_path / "rule.tsv").write_text(rule)
        model = spm_model(tmp_path, name, normalization_rule_tsv=str(tmp_path / "rule.tsv"))
        options = {"docs": (docs,), "out": tmp_path / f"out_{name}", "tokenizer": model, "val_docs": 4}
        if message:
            refused(message, **options)
        marked = prepare.prepare(Options(allow_lossy=message is not None, **options))
        assert marked["lossy"] is (message is not None), name
    builtin = spm_model(tmp_path, "cf", normalization_rule_name="nmt_nfkc_cf")
    capitals = write_jsonl(tmp_path / "capitals.jsonl", [f"The cat {i}" for i in range(9)])
    refused("'The cat 0' comes back as 'the cat 0'", (capitals,), tmp_path / "out", builtin, val_docs=2)


@settings(max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_published_folding_is_no_loss(model: Path, text: str) -> None:
    processor = prepare.load_tokenizer(str(model))
    ids = processor.encode(text)
    assert lost_characters(text, processor.decode(ids)) == (0, "")
    assert prepare.load_table(str(model)).count(np.array([1, *ids])).sum() <= most_bytes(text)


def test_tokenizer_has_the_contest_layout(model: Path) -> None:
    processor = spm.SentencePieceProcessor(model_file=str(model))
    assert [processor.id_to_piece(i) for i in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert [processor.id_to_piece(4 + i) for i in range(256)] == [f"<0x{i:02X}>" for i in range(256)]
    assert processor.piece_to_id("\u2581") > 259
    assert processor.encode("two", out_type=str)[0] != "\u2581two"  # no dummy prefix
    assert processor.encode("1984", out_type=str) == ["1", "9", "8", "4"]
    assert processor.decode(processor.encode("snow \u2603 \U0001f600")) == "snow \u2603 \U0001f600"
    assert processor.encode("\ufb01x") == processor.encode("fix")  # NFKC


def test_tokenizer_learns_from_training_documents_only(tmp_path: Path) -> None:
    texts = ["quixotic " * 400] + [f"{'zebra ' * 400}{text}" for text in make_texts(20)]
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    prepare.prepare(Options((path,), tmp_path / "out", vocab_size=320, val_docs=1))
    processor = spm.SentencePieceProcessor(model_file=str(tmp_path / "out" / "bpe_320.model"))
    assert len(processor.encode(" zebra")) == 1 and len(processor.encode(" quixotic")) > 4


def test_unfit_vocabularies_and_tokenizers_are_refused(tmp_path: Path, docs: Path) -> None:
    for size, message in ((5000, "too large: the training text gives only"), (261, "too small")):
        refused(message, (docs,), tmp_path / message[:9], vocab_size=size, val_docs=1)
    path = tmp_path / "unfit.model"
    refused("no such tokenizer", (docs,), tmp_path / "out", path, val_docs=1)
    path.write_bytes(b"nonsense")
    refused("not a SentencePiece model", (docs,), tmp_path / "out", path, val_docs=1)
    common = {"model_type": "bpe", "vocab_size": 60, "minloglevel": 2, "hard_vocab_limit": False}
    common["model_prefix"] = str(path.with_suffix(""))
    for extra, message in (({}, "no byte pieces"), ({"bos_id": 0, "unk_id": 1}, "BOS has id 0")):
        spm.SentencePieceTrainer.train(sentence_iterator=iter(make_texts(9)), **common, **extra)
        refused(message, (docs,), tmp_path / "out", path, val_docs=1)


@settings(max_examples=40)
@given(st.text(max_size=300), st.integers(8, 60))
def test_sentences_lose_nothing_and_stay_short(text: str, limit: int) -> None:
    text = text.encode("utf-8", "ignore").decode()
    pieces = list(prepare.sentences(text, limit))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(len(piece.encode()) <= limit for piece in pieces)


@settings(max_examples=30)
@given(st.lists(st.binary(min_size=1, max_size=20).map(bytes.hex), min_size=1, max_size=40), st.integers(1, 300))
def test_sample_is_the_shortest_prefix_by_hash(texts: list[str], budget: int) -> None:
    by_hash = sorted(set(texts), key=lambda text: sha256(text.encode()).digest())
    wanted: list[str] = []
    while by_hash and sum(map(len, wanted)) < budget:
        wanted.append(by_hash.pop(0))
    sample = prepare.TextSample(budget)
    for text in texts:
        sample.add(sha256(text.encode()).digest(), text.encode())
    assert list(sample.texts()) == wanted


# Transform


class Shout(CaseOps):
    """A toy transform: lower-cases ASCII and marks every capital with one symbol; a symbol stands for no byte."""

    name = "shout"
    symbols = ("\ue001",)

    def encode(self, text: str) -> str:
        return "".join("\ue001" + char.lower() if "A" <= char <= "Z" else char for char in text)

    def piece_bytes(self, text: str, processor: spm.SentencePieceProcessor) -> list[int]:
        mark = processor.piece_to_id(self.symbols[0])
        ids = processor.encode(self.encode(text))
        return [0 if i == mark else 1 if processor.is_byte(i) else len(processor.id_to_piece(i)) for i in ids]


def test_transform_gives_a_byte_sidecar(tmp_path: Path, docs: Path) -> None:
    options = Options((docs,), tmp_path / "out", vocab_size=320, val_docs=5, shard_tokens=150)
    manifest = prepare.prepare(options, Shout())
    processor = spm.SentencePieceProcessor(model_file=str(options.out / "bpe_320.model"))
    assert processor.id_to_piece(4) == "\ue001" and processor.id_to_piece(5) == "<0x00>"
    tokens, counts = read_split(options.out, "val"), read_split(options.out, "val_bytes")
    assert len(tokens) == len(counts) == manifest["splits"]["val"]["tokens"]
    assert counts.sum() == manifest["splits"]["val"]["raw_bytes"]
    assert not counts[tokens == 1].any() and not counts[tokens == 4].any()
    sizes = [row["tokens"] for row in manifest["shards"] if "val" in row["name"]]
    assert [row["tokens"] for row in manifest["sidecars"]] == sizes
    assert not list(options.out.glob("fineweb_train_bytes*"))


def test_a_sidecar_with_more_bytes_than_the_text_is_refused(tmp_path: Path, docs: Path) -> None:
    class Inflated(Shout):
        def piece_bytes(self, text: str, processor: spm.SentencePieceProcessor) -> list[int]:
            return [count + 1 for count in super().piece_bytes(text, processor)]

    with pytest.raises(UserError, match=r"docs\.jsonl:1: .* it counts as [\d,]+ bytes, [\d,]+ more than it has"):
        prepare.prepare(Options((docs,), tmp_path / "out", vocab_size=320, val_docs=5), Inflated())


# Interruption


@contextlib.contextmanager
def broken_after(method: str, calls: int) -> Iterator[None]:
    """A method of ShardFile works `calls` times and raises KeyboardInterrupt from then on."""
    original, left = getattr(prepare.ShardFile, method), [calls]

    def broken(self: prepare.ShardFile, *arguments: object) -> object:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare.ShardFile, method, broken)
        yield


@settings(max_examples=12)
@given(data=st.data())
def test_resume_after_any_interruption(
    tmp_path_factory: pytest.TempPathFactory, model: Path, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("resume")
    docs = write_jsonl(folder / "docs.jsonl", [*make_texts(14, words=25), make_texts(14, words=25)[2]])
    transform = data.draw(st.sampled_from([None, Shout(), FusedCaseOps()]))
    kind: dict = {"vocab_size": 300} if transform else {"tokenizer": model}
    kind |= {"val_docs": 4, "drop_overlap": True, "shard_tokens": data.draw(st.integers(30, 400))}
    prepare.prepare(Options((docs,), folder / "whole", **kind), transform)
    options = Options((docs,), folder / "broken", **kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "CHUNK_DOCS", data.draw(st.integers(1, 6)))
        for stop in data.draw(st.lists(st.integers(0, 25), min_size=1, max_size=3)):
            with broken_after(data.draw(st.sampled_from(["append", "finish"])), stop):
                try:
                    prepare.prepare(options, transform)
                except KeyboardInterrupt:
                    assert not list(options.out.glob("*.tmp"))
        prepare.prepare(options, transform)
    assert contents(folder / "whole") == contents(folder / "broken")


def test_resume_does_not_repeat_finished_shards(
    tmp_path: Path, model: Path, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options((docs,), tmp_path / "out", model, val_docs=5, shard_tokens=300)
    monkeypatch.setattr(prepare, "CHUNK_DOCS", 1)
    with broken_after("finish", 4), pytest.raises(KeyboardInterrupt):
        prepare.prepare(options)
    state = json.loads((options.out / prepare.STATE_NAME).read_text())
    assert len(list(options.out.glob("fineweb_*.bin"))) == 4 == len(state["shards"])
    encoded, original = [], prepare.encode_task
    monkeypatch.setattr(prepare, "encode_task", lambda task: encoded.append(task) or original(task))
    for left in (30 - state["docs_done"], 0):
        prepare.prepare(options)
        assert len(encoded) == left < 30
        encoded.clear()


def test_resume_looks_at_finished_shards(tmp_path: Path, docs: Path) -> None:
    options = {"docs": (docs,), "out": tmp_path / "out", "vocab_size": 320, "val_docs": 5, "shard_tokens": 300}
    with broken_after("finish", 3), pytest.raises(KeyboardInterrupt):
        prepare.prepare(Options(**options), Shout())
    journal = options["out"] / prepare.STATE_NAME
    state = json.loads(journal.read_text())
    for row in (state["shards"][0], state["sidecars"][0]):
        shard = options["out"] / row["name"]
        raw = shard.read_bytes()
        for change in (raw[:-1] + bytes([raw[-1] ^ 1]), None):
            shard.unlink() if change is None else shard.write_bytes(change)
            with pytest.raises(UserError, match=f"{row['name']}: gone, or not the file that was written; put it back"):
                prepare.prepare(Options(**options), Shout())
        shard.write_bytes(raw)
    journal.write_text(json.dumps(state | {"shards": [{"name": "x"}]}))
    with pytest.raises(UserError, match="not a journal of this version"):
        prepare.prepare(Options(**options), Shout())
    journal.write_text(json.dumps(state))
    prepare.prepare(Options(**options), Shout())


def test_two_preparations_do_not_share_a_directory(tmp_path: Path, model: Path, docs: Path) -> None:
    options = {"docs": (docs,), "out": tmp_path / "out", "tokenizer": model, "val_docs": 5}
    options["out"].mkdir()
    with locked(options["out"]):
        refused(rf"is in use by process {os.getpid()} .*; wait, or choose another --out", **options)
    (options["out"] / "lock").write_text("left by a process that was killed")
    prepare.prepare(Options(**options))
    assert not (options["out"] / "lock").exists()
    (options["out"] / "lock").touch()
    assert prepare.audit(options["out"]).files == 3


def test_a_second_tokenizer_of_the_same_name_is_read_again(tmp_path: Path, docs: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [text.upper() for text in make_texts(30)])
    options = {"out": tmp_path / "out", "vocab_size": 320, "val_docs": 5, "overwrite": True}
    for source in (docs, other):
        prepare.prepare(Options((source,), **options))
    texts = [json.loads(line)["text"] for line in other.open()]
    assert read_split(tmp_path / "out", "val").tolist() == expected_stream(tmp_path / "out/bpe_320.model", texts[:5])


def test_changed_arguments_or_inputs_are_refused(tmp_path: Path, model: Path, docs: Path) -> None:
    out, kept = tmp_path / "out", docs.read_bytes()
    common = {"docs": (docs,), "out": out, "tokenizer": model, "shard_tokens": 300}
    with broken_after("finish", 2), pytest.raises(KeyboardInterrupt):
        prepare.prepare(Options(val_docs=5, **common))
    for finished in (False, True):
        if finished:
            prepare.prepare(Options(val_docs=5, **common))
        refused("val_docs was 5, is 6; use --overwrite or another --out", val_docs=6, **common)
        docs.write_bytes(kept + GOOD)
        refused("the documents are not the same", val_docs=5, **common)
        docs.write_bytes(kept)
    for name in ("mine.tmp", "fineweb_train_000009.bin.tmp", "x.model.tmp", f"{prepare.STATE_NAME}.tmp"):
        (out / name).touch()
    manifest = prepare.prepare(Options(val_docs=6, overwrite=True, **common | {"shard_tokens": 10**6}))
    assert [path.name for path in out.glob("*.tmp")] == ["mine.tmp"]
    assert len(list(out.glob("*.bin"))) == len(manifest["shards"]) == 2


def test_finished_directory_is_checked(tmp_path: Path, model: Path, docs: Path) -> None:
    options = {"docs": (docs,), "out": tmp_path / "out", "tokenizer": model, "val_docs": 5}
    prepare.prepare(Options(**options))
    shard, manifest = options["out"] / "fineweb_val_000000.bin", options["out"] / "manifest.json"
    shard.write_bytes(shard.read_bytes()[:-2])
    refused("fineweb_val_000000.bin: gone, or not the file .*--overwrite", **options)
    shard.unlink()
    refused("fineweb_val_000000.bin: gone, or not the file .*--overwrite", **options)
    cut = (FAULTS / "manifest_cut.json").read_text()
    for text, message in (
        ("{}", "not written by this version of the tool"),
        ('{"sources": [], "settings": []}', "not written by this version of the tool"),
        ("[]", "not an object"),
        (cut, "is not valid JSON"),
        ("[" * 5000, "nested too deep"),
    ):
        manifest.write_text(text)
        refused(message, **options)
    manifest.unlink()
    refused("from elsewhere", **options)
    whole = {"settings": {}, "sources": [], "splits": {}, "audit": {}, "round_trip": {}}
    for journal in ('{"splits": 5}', "[]", cut, json.dumps(whole | {"docs_done": "5"}), json.dumps(whole | {"x": 1})):
        (options["out"] / prepare.STATE_NAME).write_text(journal)
        refused("not a journal of this version", **options)


def test_audit_names_what_differs_from_the_manifest(
    tmp_path: Path, model: Path, docs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A split without a sidecar; and every file of it, changed in one byte that changes no count."""
    out = tmp_path / "out"
    manifest = prepare.prepare(Options((docs,), out, model, val_docs=5))
    assert prepare.main(["audit", str(out)]) == 0
    lines = capsys.readouterr().out
    assert "files 3 have the SHA-256" in lines and f"bytes {manifest['round_trip']['counted_bytes']:,};" in lines
    cut, full = (FAULTS / "manifest_cut.json").read_bytes(), json.dumps(manifest).encode()
    bad_row = full.replace(b'"shards": [{"name"', b'"shards": [5, {"name"')
    assert bad_row != full
    changes = [
        *(("manifest.json", raw, "lists no files") for raw in (b"{}", b'{"shards": 5}', b'{"sha256": []}', bad_row)),
        ("manifest.json", cut, "is not valid JSON"),
        ("manifest.json", b"[1]", "holds a list"),
        ("manifest.json", b"[" * 5000, "is nested too deep"),
        ("fineweb_train_000001.bin", b"", "is not in manifest.json"),
    ]
    assert len(prepare.listed_files(out)) == 3
    for name in prepare.listed_files(out):
        raw = (out / name).read_bytes()
        changes += [(name, raw[:-1] + bytes([raw[-1] ^ 1]), f"{name}: SHA-256 is"), (name, None, f"{name} is missing")]
    for name, raw, message in changes:
        folder = Path(shutil.copytree(out, tmp_path / "changed"))
        (folder / name).unlink(missing_ok=True)
        if raw is not None:
            (folder / name).write_bytes(raw)
        assert prepare.main(["audit", str(folder)]) == 2, message
        error = capsys.readouterr().err
        assert message in error and name in error and error.count("\n") == 1, error
        shutil.rmtree(folder)
    (out / "manifest.json").unlink()
    assert prepare.main(["audit", str(out)]) == 0
    assert "not checked: there is no manifest.json" in capsys.readouterr().out
    assert prepare.main(["audit", str(tmp_path / "none")]) == 2
    assert "no such directory" in capsys.readouterr().err


# Command line and sample


def test_command_line_survives_a_kill(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs = tmp_path / "docs.jsonl"
    docs.write_bytes(MANY)
    command = ["--docs", str(docs), "--tokenizer", str(model), "--val-docs", "5", "--shard-tokens", "3000", "--out"]
    assert prepare.main([*command, str(tmp_path / "a"), "--jobs", "1"]) == 0
    assert "train 1,995 documents" in capsys.readouterr().out
    assert prepare.main([*command, str(tmp_path / "a"), "--jobs", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    script = [sys.executable, prepare.__file__, *command, str(tmp_path / "b"), "--jobs", "1"]
    with subprocess.Popen(script, stderr=subprocess.PIPE) as process:
        process.stderr.readline()  # the first shard has its name
        process.kill()
    assert prepare.main([*command, str(tmp_path / "b"), "--jobs", "1"]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def group(pid: int) -> list[int]:
    """The processes of a session that are not yet dead."""
    rows = [(path.name, path.joinpath("stat")) for path in Path("/proc").iterdir() if path.name.isdigit()]
    found = []
    for name, stat in rows:
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            found += [int(name)] if session == str(pid) and state not in "ZX" else []
    return found


def test_a_killed_preparation_leaves_no_workers(tmp_path: Path, model: Path) -> None:
    docs = tmp_path / "docs.jsonl"
    docs.write_bytes(20 * MANY)
    command = [sys.executable, prepare.__file__, "--docs", str(docs), "--tokenizer", str(model), "--val-docs", "5"]
    command += ["--jobs", "2", "--drop-overlap", "--shard-tokens", "3000", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
        process.stderr.readline()  # the first shard has its name, so the workers work
        started = group(process.pid)
        process.kill()
    for _ in range(1200):
        if not group(process.pid):
            break
        time.sleep(0.1)
    left = group(process.pid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(started) > 3 and not left


def test_an_interrupt_waits_for_a_worker_and_is_ignored_where_it_was() -> None:
    done, before = [], signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt), prepare.interrupt_held():
            signal.raise_signal(signal.SIGINT)
            done.append("the block goes on")
        assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        # as a shell starts the background jobs of a script
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        interrupts.quiet_until_main()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        interrupts.main_begins()
        with prepare.interrupt_held():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupt_while_workers_start_is_one_line(tmp_path: Path, model: Path, docs: Path) -> None:
    command = [sys.executable, prepare.__file__, "--docs", str(docs), "--tokenizer", str(model), "--val-docs", "5"]
    command += ["--jobs", "2", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        # a terminal sends Ctrl-C to the whole group; the server of the workers is then importing torch
        while process.poll() is None:
            started = [
                pid for pid in children(process.pid) if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ]
            if started:
                break
            time.sleep(0.01)
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate(timeout=120)[1]
    assert (process.returncode, error.splitlines()) == (130, [error.strip()]), error
    assert error.startswith("interrupted; the same command resumes")


def test_interrupt_while_modules_load_is_one_line() -> None:
    for script in (prepare.__file__, download.__file__):
        with subprocess.Popen([sys.executable, script, "--help"], stderr=subprocess.PIPE, text=True) as process:
            # the first of the large modules is being loaded
            while process.poll() is None and "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            error = process.communicate(timeout=120)[1]
        assert (process.returncode, error) == (130, "interrupted before it began\n"), error


def test_validation_default_is_the_published_split_and_both_forms_take_caseops() -> None:
    assert Options((Path("x"),), Path("y"), vocab_size=300).val_docs == 50_000
    for form, val_docs in (("--docs x --vocab-size 300", 50_000), ("sample", 16)):
        for more in ([], ["--caseops"], ["--caseops", "--fuse-pairs"]):
            args = prepare.parse_arguments([*form.split(), "--out", "y", *more])
            assert args.val_docs == val_docs and args.caseops + args.fuse_pairs == len(more), form
            assert args.max_overlap == (0.05 if form.startswith("sample") else 0.01), form


def test_a_file_named_like_the_sample_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "sample_documents", functools.partial(make_texts, 30))
    path, command = tmp_path / prepare.SAMPLE_NAME, ["sample", "--vocab-size", "320", "--jobs", "1"]
    command += ["--max-overlap", "1", "--out", str(tmp_path)]
    path.write_text("mine")
    assert prepare.main(command) == 2 and path.read_text() == "mine"
    assert "sample.jsonl is not the sample of this Python; use --overwrite" in capsys.readouterr().err
    assert prepare.main([*command, "--overwrite"]) == prepare.main(command) == 0


def test_sample_is_prose_of_useful_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the modules at the top of the library, with one of each other kind of file."""
    library, out, names = tmp_path / "library", tmp_path / "out", "note.txt pack.whl!m.py sub/m.py test/m.py".split()
    planted = {name: (12 * f"The file {name} holds this planted prose. ").strip() for name in names}
    for folder in (library / "sub", library / "test"):
        folder.mkdir(parents=True)
        (folder / "m.py").write_text(f'"""{planted[f"{folder.name}/m.py"]}"""')
    (library / "note.txt").write_text(planted["note.txt"])
    with zipfile.ZipFile(library / "pack.whl", "w") as wheel:
        wheel.writestr("m.py", f'"""{planted["pack.whl!m.py"]}"""')
    for path in Path(sysconfig.get_path("stdlib")).glob("*.py"):
        (library / path.name).symlink_to(path)
    (library / "gone.py").symlink_to(library / "nothing")
    monkeypatch.setattr(stdlib_prose, "sysconfig", SimpleNamespace(get_path=lambda name: str(library)))
    assert prepare.main(["sample", "--out", str(out), "--vocab-size", "512", "--val-docs", "20", "--jobs", "1"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    texts = [json.loads(line)["text"] for line in (out / "sample.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(texts) == len(set(texts)) > 300
    assert sum(map(len, texts)) > 1_500_000
    assert [name for name in names if any(planted[name] in text for text in texts)] == names[:3], "tests are left out"
    lengths = sorted(map(len, texts))
    assert lengths[0] >= 400 and 1_000 < lengths[len(texts) // 2] < 10_000
    assert sum(char.isalpha() or char == " " for text in texts for char in text) > 0.85 * sum(lengths)
    hashes = {sha256(text.encode()).hexdigest() for text in texts[20:]}
    assert manifest["splits"]["val"]["docs"] == 20 and not hashes & set(manifest["val_document_sha256"])
    # a long paragraph is in one document only, so validation repeats none of the training text
    val = {part for text in texts[:20] for part in text.split("\n\n") if len(part) > 200}
    train = {part for text in texts[20:] for part in text.split("\n\n")}
    assert val and not val & train


def test_prose_filter_cleans() -> None:
    prose = ProseFilter()
    text = """Heading of it
    *************

    A paragraph that is
       indented and broken.

    >>> print(1 + 1, [2], {3: 4})
    2

    x = {1: 2, 3: (4, 5)}; y[7:9] += 11

    A paragraph that is indented and broken."""
    assert prose.paragraphs(text) == ["Heading of it", "A paragraph that is indented and broken."]
