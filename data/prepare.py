"""Documents -> tokenizer -> token shards, the way the contest publishes them.

    python data/prepare.py --docs FILE_OR_DIR... --out DIR (--tokenizer MODEL | --vocab-size N) [--val-docs N]
    python data/prepare.py sample --out DIR [--vocab-size N] [--val-docs N]
    python data/prepare.py audit DIR

The second form needs no download: it gathers the English prose that every Python installation carries. With --caseops
the tokenizer sees CaseOps text (see caseops.py) and validation gets a byte sidecar, which the third form checks.

What is written into DIR:
    fineweb_val_000000.bin ...    the first --val-docs documents of the input, in input order
    fineweb_train_000000.bin ...  all other documents, in input order
    fineweb_val_bytes_000000.bin  original bytes per validation token; only with a text transform (see Transform)
    *.model                       the tokenizer, given or trained (on training documents only)
    manifest.json                 sources, counts, SHA-256 of every file, document hashes, settings

A shard is 256 little-endian int32 ([0] = 20240520, [1] = 1, [2] = number of tokens, rest 0) and that many little-endian
uint16 tokens. A document is BOS and its ids, without EOS; it may run on from one shard into the next, because every
shard but the last of a split holds exactly --shard-tokens tokens.

The output depends on the arguments and the inputs alone: not on --jobs, not on where a run was interrupted.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import gzip
import hashlib
import heapq
import importlib
import inspect
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pydoc_data.topics import topics as PYDOC_TOPICS
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import sentencepiece as spm
from caseops import CaseOps, CaseOpsError, decode
from tqdm import tqdm
from word_bpe import word_bpe

try:
    import pyarrow
    import pyarrow.parquet as parquet
except ImportError:  # optional: only .parquet inputs need it
    pyarrow = parquet = None
try:
    import zstandard
except ImportError:  # optional: only .zst inputs need it
    zstandard = None

TOOL_VERSION = 1  # raise it when the same arguments would give other bytes
MAGIC, FORMAT_VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = HEADER_INTS * 4
BOS, FIRST_SYMBOL = 1, 4
MAX_VOCAB = 65536  # ids are stored as uint16
CHUNK_BYTES, CHUNK_DOCS = 1 << 18, 512  # one task of a worker: long enough that handing it over costs little
STATE_NAME, MANIFEST_NAME, SAMPLE_NAME = "prepare.state.json", "manifest.json", "sample.jsonl"
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
if zstandard is not None:
    DAMAGED = (*DAMAGED, zstandard.ZstdError)
BAD_PARQUET = (OSError,) if pyarrow is None else (OSError, pyarrow.ArrowException)


class PrepareError(ValueError):
    """A mistake in arguments or inputs; its text is the one line that the user sees."""


class Transform(Protocol):
    """A reversible rewriting of the text before the tokenizer, with the original bytes that every piece stands for.

    A transform is handed to `prepare`; the validation split then gets a byte sidecar, because bytes per piece can no
    longer be looked up by id. It must be picklable (a plain top-level class without state is).
    """

    name: str  # stands in the manifest
    symbols: tuple[str, ...]  # pieces that a tokenizer trained for it holds from id FIRST_SYMBOL on

    def encode(self, text: str) -> str:
        """The text as the tokenizer sees it."""
        ...

    def piece_bytes(self, text: str, processor: spm.SentencePieceProcessor) -> Iterable[int]:
        """Original UTF-8 bytes of each id of `processor.encode(self.encode(text))`."""
        ...


@dataclass(frozen=True)
class Options:
    """Arguments of one preparation; everything here but jobs and overwrite decides the bytes of the output."""

    docs: tuple[Path, ...]
    out: Path
    tokenizer: Path | None = None
    vocab_size: int = 0
    val_docs: int = 50_000
    shard_tokens: int = 100_000_000
    sample_mb: float = 64.0
    text_key: str = "text"
    drop_overlap: bool = False
    jobs: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        """PrepareError for values that make no sense."""
        checks = [
            (self.docs, "--docs names no file"),
            ((self.tokenizer is None) == (self.vocab_size > 0), "give either --tokenizer MODEL or --vocab-size N"),
            (self.vocab_size <= MAX_VOCAB, f"--vocab-size {self.vocab_size} does not fit uint16: at most {MAX_VOCAB}"),
            (self.val_docs >= 1, f"--val-docs {self.val_docs}: at least 1"),
            (self.shard_tokens >= 1, f"--shard-tokens {self.shard_tokens}: at least 1"),
            (self.sample_mb > 0, f"--tokenizer-sample-mb {self.sample_mb}: more than 0"),
            (self.jobs >= 1, f"--jobs {self.jobs}: at least 1"),
        ]
        for fine, message in checks:
            if not fine:
                raise PrepareError(message)


# +---------------------------------------------------------------------------+
# | SHARDS                                                                    |
# +---------------------------------------------------------------------------+


def shard_header(num_tokens: int) -> bytes:
    """The 1024 bytes in front of `num_tokens` tokens."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, FORMAT_VERSION, num_tokens
    return header.tobytes()


def open_shard(path: Path) -> np.ndarray:
    """Map a shard: (tokens,) uint16, read-only. ValueError says what is wrong with the file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such shard")
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise ValueError(f"{path}: {size} bytes, shorter than the header of {HEADER_BYTES}")
    header = np.fromfile(path, dtype="<i4", count=3)
    if header[0] != MAGIC or header[1] != FORMAT_VERSION:
        raise ValueError(f"{path}: magic {header[0]}, version {header[1]}; a shard has {MAGIC}, {FORMAT_VERSION}")
    tokens = int(header[2])
    if tokens < 1 or size != HEADER_BYTES + 2 * tokens:
        raise ValueError(f"{path}: {size} bytes, but its header promises {tokens} tokens; copy or download it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(tokens,))


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write JSON under a temporary name and rename it, so that the file is never half there."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(tmp, path)


class ShardFile:
    """One shard while it grows, under a temporary name until `finish`."""

    def __init__(self, path: Path) -> None:
        self.path, self.tokens = path, 0
        self.tmp = path.with_name(path.name + ".tmp")
        self.handle = self.tmp.open("wb")
        self.handle.write(shard_header(0))

    def append(self, values: np.ndarray) -> None:
        """Add (n,) uint16 values."""
        self.handle.write(values.astype("<u2", copy=False).tobytes())
        self.tokens += len(values)

    def finish(self) -> dict:
        """Complete the header, give the file its name, and return its line of the manifest."""
        self.handle.seek(0)
        self.handle.write(shard_header(self.tokens))
        self.handle.close()
        digest = sha256_file(self.tmp)
        os.replace(self.tmp, self.path)
        return {"name": self.path.name, "tokens": self.tokens, "sha256": digest}

    def abandon(self) -> None:
        """Close and remove the unfinished file."""
        self.handle.close()
        self.tmp.unlink(missing_ok=True)


# +---------------------------------------------------------------------------+
# | INPUTS                                                                    |
# +---------------------------------------------------------------------------+


class Item(NamedTuple):
    """One document as it lies in the input, not yet parsed: workers do that."""

    source: int  # index into the sources
    where: str  # file:line, for messages
    raw: bytes
    is_json: bool


class Source(NamedTuple):
    """One argument of --docs."""

    name: str  # its last path component: the manifest names no directory of this machine
    files: tuple[Path, ...]
    sha256: str  # of the file; of names and digests of all files for a directory
    bytes: int

    def record(self) -> dict:
        """Its line in journal and manifest."""
        return {"name": self.name, "sha256": self.sha256, "bytes": self.bytes}


class ZstReader(io.RawIOBase):
    """Decompressed bytes of a .zst file of one or more frames.

    The package's own reader ends silently where a file was cut off; this one raises EOFError.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")
        self.frame = zstandard.ZstdDecompressor().decompressobj()
        self.inside, self.rest, self.ready = False, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Fill (a part of) the buffer; 0 at the end of the last frame."""
        while not self.ready:
            packed = self.rest or self.file.read(1 << 17)
            if not packed:
                if self.inside:
                    raise EOFError("compressed file ended before its end-of-frame marker")
                return 0
            self.ready, self.rest, self.inside = self.frame.decompress(packed), b"", True
            if self.frame.eof:
                self.rest, self.inside = self.frame.unused_data, False
                self.frame = zstandard.ZstdDecompressor().decompressobj()
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def open_zst(path: Path) -> BinaryIO:
    """Open a .zst file for reading decompressed bytes."""
    if zstandard is None:
        raise PrepareError(f"{path}: reading .zst needs the package zstandard: pip install zstandard")
    return io.BufferedReader(ZstReader(path), 1 << 20)


OPENERS: dict[str, Callable[[Path], BinaryIO]] = {
    "jsonl": lambda path: path.open("rb"),
    "jsonl.gz": lambda path: gzip.open(path, "rb"),
    "jsonl.xz": lambda path: lzma.open(path, "rb"),
    "jsonl.zst": open_zst,
}
KINDS = (*OPENERS, "txt", "parquet")


def kind_of(path: Path) -> str | None:
    """Which of KINDS a file is, by its name; None for anything else."""
    name = path.name.lower()
    return next((kind for kind in sorted(KINDS, key=len, reverse=True) if name.endswith("." + kind)), None)


def read_jsonl(path: Path, source: int, kind: str) -> Iterator[Item]:
    """One document a line; blank lines are none."""
    number = 0
    try:
        with OPENERS[kind](path) as lines:
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    yield Item(source, f"{path}:{number}", line, True)
    except DAMAGED as error:
        raise PrepareError(f"{path}: damaged or cut off after line {number}: {error}") from error


def parquet_texts(path: Path, text_key: str) -> Iterator[object]:
    """The column `text_key`, row by row; row groups are read one after the other."""
    if parquet is None:
        raise PrepareError(f"{path}: reading .parquet needs the package pyarrow: pip install pyarrow")
    with parquet.ParquetFile(path) as table:
        if text_key not in table.schema_arrow.names:
            raise PrepareError(f"{path}: no column {text_key!r}; it has {', '.join(table.schema_arrow.names)}")
        for batch in table.iter_batches(batch_size=CHUNK_DOCS, columns=[text_key]):
            yield from batch.column(0).to_pylist()


def read_parquet(path: Path, source: int, text_key: str) -> Iterator[Item]:
    """One document a row."""
    number = 0
    try:
        for number, text in enumerate(parquet_texts(path, text_key), 1):
            if not isinstance(text, str):
                raise PrepareError(f"{path}:{number}: {text_key!r} is {type(text).__name__}, not text")
            yield Item(source, f"{path}:{number}", text.encode(), False)
    except BAD_PARQUET as error:
        raise PrepareError(f"{path}: cannot be read after row {number}: {error}") from error


def read_items(sources: list[Source], text_key: str) -> Iterator[Item]:
    """Every document of every source, in the order of the arguments (directories: sorted by relative path)."""
    for index, source in enumerate(sources):
        for path in source.files:
            kind = kind_of(path)
            if kind == "txt":
                yield Item(index, str(path), path.read_bytes(), False)
            elif kind == "parquet":
                yield from read_parquet(path, index, text_key)
            else:
                yield from read_jsonl(path, index, kind)


def parse_item(item: Item, text_key: str) -> tuple[str, bytes]:
    """The text of a document, and the same as UTF-8. PrepareError names file and line of what cannot be one."""
    try:
        text = item.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = "" if item.is_json else f":{item.raw.count(10, 0, error.start) + 1}"
        raise PrepareError(f"{item.where}{line}: not UTF-8: byte {item.raw[error.start]:#04x}") from error
    if not item.is_json:
        return text, item.raw
    try:
        row = json.loads(text)
    except ValueError as error:
        raise PrepareError(f"{item.where}: not a line of JSON: {error}") from error
    if not isinstance(row, dict) or text_key not in row:
        raise PrepareError(f"{item.where}: no key {text_key!r}; name the right one with --text-key")
    text = row[text_key]
    if not isinstance(text, str):
        raise PrepareError(f"{item.where}: {text_key!r} is {type(text).__name__}, not text")
    try:
        return text, text.encode()
    except UnicodeEncodeError as error:
        raise PrepareError(f"{item.where}: the text holds half a surrogate pair, which has no UTF-8 form") from error


def find_source(path: Path) -> Source:
    """Look at one argument of --docs and hash what it holds."""
    if path.is_file():
        if kind_of(path) is None:
            raise PrepareError(f"{path}: unknown suffix; known are " + ", ".join("." + kind for kind in KINDS))
        if path.stat().st_size == 0:
            raise PrepareError(f"{path}: the file is empty")
        return Source(path.name, (path,), sha256_file(path), path.stat().st_size)
    if not path.is_dir():
        raise PrepareError(f"{path}: no such file or directory")
    files = sorted(
        (found for found in path.rglob("*") if found.is_file() and kind_of(found)),
        key=lambda found: found.relative_to(path).as_posix(),
    )
    if not files:
        raise PrepareError(f"{path}: no file there ends in " + ", ".join("." + kind for kind in KINDS))
    tree = hashlib.sha256()
    for found in files:
        tree.update(f"{found.relative_to(path).as_posix()}\0{sha256_file(found)}\n".encode())
    return Source(path.resolve().name, tuple(files), tree.hexdigest(), sum(f.stat().st_size for f in files))


# +---------------------------------------------------------------------------+
# | TOKENIZER                                                                 |
# +---------------------------------------------------------------------------+


def check_tokenizer(processor: spm.SentencePieceProcessor, name: str) -> None:
    """PrepareError unless shards and byte accounting can rest on this tokenizer."""
    vocab = processor.get_piece_size()
    checks = [
        (vocab <= MAX_VOCAB, f"{vocab} pieces do not fit uint16"),
        (processor.bos_id() == BOS, f"BOS has id {processor.bos_id()}; the shard format wants {BOS}"),
        # Without byte pieces unknown characters become <unk> and their bytes are lost to the accounting.
        (any(processor.is_byte(index) for index in range(vocab)), "it has no byte pieces (byte_fallback)"),
        # The leading-space rule counts the bare space as 0 + 1 bytes, so that piece has to exist.
        (processor.piece_to_id("\u2581") != processor.unk_id(), "it lacks the bare piece U+2581 (a single space)"),
    ]
    for fine, message in checks:
        if not fine:
            raise PrepareError(f"tokenizer {name}: {message}")


def check_symbols(processor: spm.SentencePieceProcessor, name: str, transform: Transform | None) -> None:
    """PrepareError unless a tokenizer is made for this transform (None: for plain text)."""
    symbols = transform.symbols if transform else ()
    if [processor.piece_to_id(symbol) for symbol in symbols] != [FIRST_SYMBOL + i for i in range(len(symbols))]:
        raise PrepareError(
            f"tokenizer {name}: {transform.name} needs its {len(symbols)} symbols as pieces from id {FIRST_SYMBOL} on; "
            "train one with --vocab-size"
        )
    if transform is None and processor.piece_to_id(CaseOps.symbols[0]) == FIRST_SYMBOL:
        raise PrepareError(f"tokenizer {name}: trained on CaseOps text; add --caseops")


@functools.cache
def load_tokenizer(path: str) -> spm.SentencePieceProcessor:
    """Load and check a SentencePiece model, once per process."""
    try:
        processor = spm.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        raise PrepareError(f"{path}: not a SentencePiece model ({str(error).splitlines()[0][:80]})") from error
    check_tokenizer(processor, Path(path).name)
    return processor


def sentences(text: str, limit: int = 4000) -> Iterator[str]:
    """Cut a text at white space into pieces of at most `limit` bytes.

    SentencePiece drops longer training sentences silently. Its merges never cross white space, so cutting there
    loses nothing; only a single word of over `limit` bytes is cut inside.
    """
    for line in text.splitlines():
        piece: list[str] = []
        size = 0
        for word in line.split():
            for part in [word[i : i + limit // 4] for i in range(0, len(word), limit // 4)]:
                length = len(part.encode()) + 1
                if piece and size + length > limit:
                    yield " ".join(piece)
                    piece, size = [], 0
                piece.append(part)
                size += length
        if piece:
            yield " ".join(piece)


def train_tokenizer(texts: Iterable[str], vocab_size: int, symbols: tuple[str, ...] = ()) -> bytes:
    """Train a BPE model with the settings of the published tokenizers and return the file.

    Ids: 0 pad, 1 BOS, 2 EOS, 3 unknown, the transform's symbols, 256 byte pieces, then what was learnt.
    """
    lines = (line for text in texts for line in sentences(text))
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            split_digits=True,
            byte_fallback=True,
            pad_id=0,
            bos_id=BOS,
            eos_id=2,
            unk_id=3,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            hard_vocab_limit=False,
            user_defined_symbols=list(symbols),
            minloglevel=2,
        )
    except RuntimeError as error:
        needed = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        if needed:
            message = f"--vocab-size {vocab_size} is too small: control, byte and character pieces need {needed[1]}"
        else:
            message = f"SentencePiece could not train {vocab_size} pieces: {' '.join(str(error).split())[:200]}"
        raise PrepareError(message) from error
    processor = spm.SentencePieceProcessor(model_proto=model.getvalue())
    if processor.get_piece_size() != vocab_size:
        raise PrepareError(
            f"--vocab-size {vocab_size} is too large: the training text gives only {processor.get_piece_size()} pieces"
        )
    check_tokenizer(processor, "just trained")
    return model.getvalue()


class TextSample:
    """A bounded sample of a stream: as many documents with the smallest hashes as it takes to reach `max_bytes`.

    Which documents these are depends on the documents alone, so a corpus sorted by origin is sampled evenly.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.size = max_bytes, 0
        self.heap: list[tuple[int, bytes]] = []  # (minus hash, UTF-8 text)
        self.held: set[int] = set()

    def add(self, digest: bytes, raw: bytes) -> None:
        """Offer one document: its SHA-256 and its UTF-8 text."""
        key = -int.from_bytes(digest, "big")
        if key in self.held or (self.size >= self.max_bytes and key < self.heap[0][0]):
            return
        heapq.heappush(self.heap, (key, raw))
        self.held.add(key)
        self.size += len(raw)
        while self.size - len(self.heap[0][1]) >= self.max_bytes:
            dropped, lost = heapq.heappop(self.heap)
            self.held.remove(dropped)
            self.size -= len(lost)

    def texts(self) -> Iterator[str]:
        """What was kept, in the order of the hashes."""
        for _, raw in sorted(self.heap, reverse=True):
            yield raw.decode()


# +---------------------------------------------------------------------------+
# | WORKERS                                                                   |
# +---------------------------------------------------------------------------+


class Task(NamedTuple):
    """A few documents of one split."""

    items: list[Item]
    model: str
    text_key: str
    transform: Transform | None
    sidecar: bool


class Encoded(NamedTuple):
    """What a worker makes of a Task; D documents of T tokens together."""

    ids: np.ndarray  # (T,) uint16, every document led by BOS
    ends: list[int]  # (D,) end of each document in ids
    num_bytes: list[int]  # (D,) UTF-8 bytes of each text
    digests: list[bytes]  # (D,) SHA-256 of each text
    counts: np.ndarray | None  # (T,) uint16 original bytes per token
    edges: list[int]  # (D,) bytes at both ends of each text that the tokenizer drops; only with counts


def piece_counts(task: Task, texts: tuple[str, ...], lengths: list[int]) -> np.ndarray:
    """Original bytes of every token of the task, 0 for BOS: (T,) uint16."""
    processor = load_tokenizer(task.model)
    counts = np.zeros(sum(lengths), np.uint16)
    start = 0
    for item, text, length in zip(task.items, texts, lengths, strict=True):
        row = np.array(task.transform.piece_bytes(text, processor), np.int64)
        if len(row) != length - 1:
            raise PrepareError(f"{item.where}: {task.transform.name} counts {len(row)} pieces, not {length - 1}")
        if len(row) and not 0 <= row.min() <= row.max() < 65536:
            raise PrepareError(f"{item.where}: a piece stands for {row.max()} bytes, over the 65,535 of the sidecar")
        counts[start + 1 : start + length] = row
        start += length
    return counts


def edge_bytes(text: str, processor: spm.SentencePieceProcessor) -> int:
    """UTF-8 bytes at both ends of a text that no piece stands for: what the normaliser strips there, white space."""
    normal, origin = processor.normalize(text, with_offsets=True)
    first, last = (origin[0], origin[-1]) if normal else (len(text), len(text))
    edges = text[:first] + text[last:]
    return 0 if processor.normalize(edges) else len(edges.encode())


def encode_task(task: Task) -> Encoded:
    """Parse, hash and tokenise. Runs in a worker; depends on nothing but its argument."""
    processor = load_tokenizer(task.model)
    texts, raw = zip(*(parse_item(item, task.text_key) for item in task.items), strict=True)
    seen = texts if task.transform is None else [task.transform.encode(text) for text in texts]
    tokenizer, bos = word_bpe(processor), np.array([BOS], np.uint16)
    rows = [tokenizer.ids(text) for text in seen]
    lengths = [len(row) + 1 for row in rows]
    return Encoded(
        ids=np.concatenate([part for row in rows for part in (bos, row)]),
        ends=list(itertools.accumulate(lengths)),
        num_bytes=[len(text) for text in raw],
        digests=[hashlib.sha256(text).digest() for text in raw],
        counts=piece_counts(task, texts, lengths) if task.sidecar else None,
        edges=[edge_bytes(text, processor) for text in seen] if task.sidecar else [],
    )


def ignore_interrupt() -> None:
    """Workers leave Ctrl-C to the parent, which ends them in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def ordered_map(tasks: Iterable[Task], jobs: int) -> Iterator[tuple[Task, Encoded]]:
    """`encode_task` over the tasks, results in order, with at most a few tasks per worker in memory.

    Executor.map and Pool.imap would draw the whole input into memory, hence the window here.
    """
    if jobs == 1:
        yield from ((task, encode_task(task)) for task in tasks)
        return
    waiting: deque[tuple[Task, Future[Encoded]]] = deque()
    # spawn: the same on every platform, and safe in a process that already runs threads
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=ignore_interrupt) as pool:
        try:
            for task in tasks:
                waiting.append((task, pool.submit(encode_task, task)))
                if len(waiting) >= 4 * jobs:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool as error:
            message = "a worker was killed (out of memory?); run again with fewer --jobs, it resumes"
            raise PrepareError(message) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# +---------------------------------------------------------------------------+
# | PREPARATION                                                               |
# +---------------------------------------------------------------------------+


@dataclass
class Counts:
    """Totals of one split."""

    docs: int = 0
    tokens: int = 0
    raw_bytes: int = 0


@dataclass
class ByteAudit:
    """Where the bytes of the validation documents are: on a token, or (white space at the ends of a text) on none."""

    docs: int = 0
    utf8_bytes: int = 0
    sidecar_bytes: int = 0
    edge_bytes: int = 0
    docs_with_edges: int = 0

    def add(self, num_bytes: int, counts: np.ndarray, edge: int) -> None:
        """One document: its UTF-8 bytes, the bytes of its tokens, the bytes without one."""
        self.docs += 1
        self.utf8_bytes += num_bytes
        self.sidecar_bytes += int(counts.sum(dtype=np.int64))
        self.edge_bytes += edge
        self.docs_with_edges += edge > 0

    def record(self) -> dict:
        """Its part of the manifest."""
        return {**asdict(self), "unexplained_bytes": self.utf8_bytes - self.sidecar_bytes - self.edge_bytes}


@dataclass
class State:
    """The journal: all that a resumed run has to know about the work in finished shards."""

    settings: dict
    sources: list[dict]
    tokenizer_sha256: str = ""
    docs_total: int | None = None  # known once the documents were sampled for the tokenizer
    docs_done: int = 0  # documents of the input that lie wholly in finished shards
    carry: int = 0  # tokens of the next document that lie there too
    source_docs: list[int] = field(default_factory=list)
    splits: dict[str, Counts] = field(default_factory=lambda: {"val": Counts(), "train": Counts()})
    overlap_dropped: int = 0
    val_hashes: list[str] = field(default_factory=list)
    train_digest: str = hashlib.sha256().hexdigest()
    shards: list[dict] = field(default_factory=list)
    sidecars: list[dict] = field(default_factory=list)
    audit: ByteAudit = field(default_factory=ByteAudit)  # stays empty without a sidecar

    @classmethod
    def load(cls, path: Path) -> State:
        """Read a journal back. PrepareError if it is none."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["splits"] = {name: Counts(**counts) for name, counts in values["splits"].items()}
            values["audit"] = ByteAudit(**values["audit"])
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PrepareError(f"{path}: not a journal of this version; use --overwrite or another --out") from error


class SplitWriter:
    """Cuts the token stream of one split into shards and journals every finished one."""

    def __init__(self, preparation: Preparation, split: str, sidecar: bool) -> None:
        self.preparation, self.split, self.sidecar = preparation, split, sidecar
        self.limit = preparation.options.shard_tokens
        self.files: list[ShardFile] = []

    def put(self, rows: list[np.ndarray], start: int) -> None:
        """Write (n,) ids and, with a sidecar, their (n,) bytes from `start` on.

        A full shard is finished only when a next token needs room. Then the journal always points at that token:
        `docs_done` documents are complete and `start` tokens of the next one are on disk.
        """
        while start < len(rows[0]):
            if self.files and self.files[0].tokens == self.limit:
                self.finish(carry=start)
            if not self.files:
                self.files = [ShardFile(self.preparation.options.out / name) for name in self.next_names()]
            stop = start + self.limit - self.files[0].tokens
            for file, row in zip(self.files, rows, strict=True):
                file.append(row[start:stop])
            start = min(stop, len(rows[0]))

    def next_names(self) -> list[str]:
        """Names of the next shard and its sidecar."""
        index = sum(shard["name"].startswith(f"fineweb_{self.split}_") for shard in self.preparation.state.shards)
        kinds = [self.split, f"{self.split}_bytes"] if self.sidecar else [self.split]
        return [f"fineweb_{kind}_{index:06d}.bin" for kind in kinds]

    def finish(self, carry: int = 0) -> None:
        """Complete the open shard, if there is one, and journal it."""
        state = self.preparation.state
        for file, records in zip(self.files, (state.shards, state.sidecars), strict=False):
            records.append(file.finish())
            tqdm.write(f"wrote {file.path.name}: {file.tokens:,} tokens", file=sys.stderr)
        self.files = []
        state.carry = carry
        self.preparation.save()

    def abandon(self) -> None:
        """Remove unfinished files."""
        for file in self.files:
            file.abandon()


class Preparation:
    """One run of the tool over one output directory."""

    def __init__(self, options: Options, transform: Transform | None) -> None:
        """Look at the inputs; nothing is written yet."""
        self.options, self.transform = options, transform
        self.sources = [find_source(path) for path in options.docs]
        name = options.tokenizer.name if options.tokenizer else f"bpe_{options.vocab_size}.model"
        self.model = options.out / name
        self.state = State(self.settings(), [source.record() for source in self.sources])
        self.state.source_docs = [0] * len(self.sources)
        self.val_index: dict[str, int] = {}

    def settings(self) -> dict:
        """What decides the bytes of the output, beside the sources."""
        options = self.options
        tokenizer: dict = {"vocab_size": options.vocab_size, "sample_mb": options.sample_mb}
        if options.tokenizer is not None:
            if not options.tokenizer.is_file():
                raise PrepareError(f"{options.tokenizer}: no such tokenizer")
            check_symbols(load_tokenizer(str(options.tokenizer)), options.tokenizer.name, self.transform)
            tokenizer = {"name": options.tokenizer.name, "sha256": sha256_file(options.tokenizer)}
        return {
            "tool_version": TOOL_VERSION,
            "sentencepiece": spm.__version__,
            "tokenizer": tokenizer,
            "transform": self.transform.name if self.transform else None,
            "val_docs": options.val_docs,
            "shard_tokens": options.shard_tokens,
            "text_key": options.text_key,
            "drop_overlap": options.drop_overlap,
        }

    def save(self) -> None:
        """Write the journal."""
        write_json(self.options.out / STATE_NAME, asdict(self.state))

    def run(self) -> dict:
        """Do what is not done yet and return the manifest."""
        manifest = self.open_out()
        if manifest is not None:
            return manifest
        self.make_tokenizer()
        self.write_shards()
        if not self.state.splits["train"].docs:
            raise PrepareError(
                f"the input has {self.state.docs_done} documents and --val-docs is {self.options.val_docs}: "
                "nothing is left to train on; lower --val-docs and add --overwrite"
            )
        manifest = self.manifest()
        write_json(self.options.out / MANIFEST_NAME, manifest)
        (self.options.out / STATE_NAME).unlink()
        return manifest

    def open_out(self) -> dict | None:
        """Find out what the output directory holds: the manifest if all is done; else load or start the journal."""
        out = self.options.out
        out.mkdir(parents=True, exist_ok=True)
        ours = [*out.glob("fineweb_*.bin"), *out.glob("*.tmp"), *out.glob("*.model")]
        ours += [path for path in (out / STATE_NAME, out / MANIFEST_NAME) if path.exists()]
        given = self.options.tokenizer.resolve() if self.options.tokenizer else None
        ours = [path for path in ours if path.resolve() != given]
        if self.options.overwrite:
            for path in ours:
                path.unlink()
        elif (out / MANIFEST_NAME).exists():
            return self.check_finished()
        elif (out / STATE_NAME).exists():
            state = State.load(out / STATE_NAME)
            self.refuse_change(state.settings, state.sources)
            self.state = state
            self.val_index = {digest: index for index, digest in enumerate(state.val_hashes)}
        elif foreign := [path.name for path in ours if path.suffix != ".tmp"]:
            raise PrepareError(f"{out} holds {foreign[0]} from elsewhere; use --overwrite or another --out")
        return None

    def refuse_change(self, settings: dict, sources: list[dict]) -> None:
        """PrepareError if the work in the output directory was begun with other arguments or inputs."""
        changed = [
            f"{key} was {settings.get(key)}, is {value}"
            for key, value in self.state.settings.items()
            if settings.get(key) != value
        ]
        if not changed and sources != self.state.sources:
            changed = ["the documents are not the same"]
        if changed:
            message = f"{self.options.out} was begun otherwise: {changed[0]}"
            raise PrepareError(f"{message}; use --overwrite or another --out")

    def check_finished(self) -> dict:
        """The manifest of a finished directory, after a look at its files."""
        path = self.options.out / MANIFEST_NAME
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            sources = [{key: row[key] for key in ("name", "sha256", "bytes")} for row in manifest["sources"]]
            self.refuse_change(manifest["settings"], sources)
            files = [(row["name"], row["tokens"]) for row in manifest["shards"] + manifest["sidecars"]]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise PrepareError(f"{path}: not written by this tool; use --overwrite or another --out") from error
        for name, tokens in files:
            try:
                found = len(open_shard(self.options.out / name))
            except ValueError as error:
                raise PrepareError(f"{error}, or use --overwrite") from error
            if found != tokens:
                raise PrepareError(f"{self.options.out / name}: not the shard of the manifest; use --overwrite")
        if not self.model.is_file():
            raise PrepareError(f"{self.model}: the tokenizer is gone; use --overwrite")
        return manifest

    def make_tokenizer(self) -> None:
        """Copy or train the tokenizer, unless an earlier run did."""
        state, given = self.state, self.options.tokenizer
        if state.tokenizer_sha256:
            if not self.model.is_file() or sha256_file(self.model) != state.tokenizer_sha256:
                raise PrepareError(f"{self.model}: changed since the interrupted run; use --overwrite")
            return
        tmp = self.model.with_name(self.model.name + ".tmp")
        if given is None:
            sample = self.sample_text()
            print(f"training a tokenizer of {self.options.vocab_size} pieces on {sample.size:,} bytes", file=sys.stderr)
            symbols = self.transform.symbols if self.transform else ()
            rewrite = self.transform.encode if self.transform else str
            tmp.write_bytes(train_tokenizer(map(rewrite, sample.texts()), self.options.vocab_size, symbols))
            os.replace(tmp, self.model)
        elif given.resolve() != self.model.resolve():
            shutil.copyfile(given, tmp)
            os.replace(tmp, self.model)
        state.tokenizer_sha256 = sha256_file(self.model)
        self.save()

    def sample_text(self) -> TextSample:
        """Read all documents once: sample the training split for the tokenizer and find mistakes early."""
        sample = TextSample(int(self.options.sample_mb * 1e6))
        val: dict[bytes, int] = {}
        count = 0
        items = read_items(self.sources, self.options.text_key)
        for count, item in enumerate(tqdm(items, "reading", unit=" docs", disable=None), 1):
            text, raw = parse_item(item, self.options.text_key)
            digest = hashlib.sha256(raw).digest()
            if count <= self.options.val_docs:
                val.setdefault(digest, count - 1)
            elif text and digest in val:
                self.refuse_overlap(item, val[digest])
            else:
                sample.add(digest, raw)
        if count <= self.options.val_docs:
            raise PrepareError(
                f"the input has {count} documents and --val-docs is {self.options.val_docs}: "
                "nothing is left to train on; lower --val-docs"
            )
        self.state.docs_total = count
        return sample

    def refuse_overlap(self, item: Item, twin: int) -> None:
        """PrepareError for a training document that validation holds too, unless such are to be dropped."""
        if not self.options.drop_overlap:
            raise PrepareError(
                f"{item.where}: this training document is also validation document {twin + 1}; "
                "remove it or use --drop-overlap"
            )

    def tasks(self) -> Iterator[Task]:
        """The documents that are not in finished shards, grouped; no group crosses the split."""
        options, done = self.options, self.state.docs_done
        items = itertools.islice(read_items(self.sources, options.text_key), done, None)
        group: list[Item] = []
        size = 0
        index = done
        for index, item in enumerate(items, done):
            if group and (size + len(item.raw) > CHUNK_BYTES or len(group) >= CHUNK_DOCS or index == options.val_docs):
                yield self.task(group, index <= options.val_docs)
                group, size = [], 0
            group.append(item)
            size += len(item.raw)
        if group:
            yield self.task(group, index < options.val_docs)

    def task(self, group: list[Item], is_val: bool) -> Task:
        """Wrap documents of one split for a worker."""
        sidecar = self.transform is not None and is_val
        return Task(group, str(self.model), self.options.text_key, self.transform, sidecar)

    def write_shards(self) -> None:
        """Tokenise and write everything that is not in finished shards."""
        state = self.state
        writers = {
            "val": SplitWriter(self, "val", sidecar=self.transform is not None),
            "train": SplitWriter(self, "train", sidecar=False),
        }
        bar = tqdm(total=state.docs_total, initial=state.docs_done, desc="tokenising", unit=" docs", disable=None)
        try:
            with contextlib.closing(ordered_map(self.tasks(), self.options.jobs)) as results:
                for task, encoded in results:
                    split = "val" if state.docs_done < self.options.val_docs else "train"
                    if split == "train" and writers["val"].files:
                        writers["val"].finish()
                    self.write_task(task, encoded, writers[split])
                    bar.update(len(task.items))
            for writer in writers.values():
                if writer.files:
                    writer.finish()
        finally:
            bar.close()
            for writer in writers.values():
                writer.abandon()

    def write_task(self, task: Task, encoded: Encoded, writer: SplitWriter) -> None:
        """Write the documents of one task and account for them."""
        state = self.state
        counts = state.splits[writer.split]
        start = 0
        for index, (item, stop) in enumerate(zip(task.items, encoded.ends, strict=True)):
            digest, num_bytes = encoded.digests[index], encoded.num_bytes[index]
            if writer.split == "train" and num_bytes and digest.hex() in self.val_index:
                self.refuse_overlap(item, self.val_index[digest.hex()])
                state.overlap_dropped += 1
            else:
                rows = [ids[start:stop] for ids in (encoded.ids, encoded.counts) if ids is not None]
                writer.put(rows, state.carry)
                self.account(digest, writer.split)
                counts.docs += 1
                counts.tokens += stop - start
                counts.raw_bytes += num_bytes
                if encoded.counts is not None:
                    state.audit.add(num_bytes, rows[1], encoded.edges[index])
            state.carry = 0
            state.docs_done += 1
            state.source_docs[item.source] += 1
            start = stop

    def account(self, digest: bytes, split: str) -> None:
        """Remember a document: validation in a list, training in one running digest."""
        state = self.state
        if split == "val":
            self.val_index.setdefault(digest.hex(), len(state.val_hashes))
            state.val_hashes.append(digest.hex())
        else:
            state.train_digest = hashlib.sha256(bytes.fromhex(state.train_digest) + digest).hexdigest()

    def manifest(self) -> dict:
        """The record of what was made from what."""
        state = self.state
        audit = {"byte_audit": state.audit.record()} if self.transform else {}
        return {
            "tool": f"data/prepare.py {TOOL_VERSION}",
            "settings": state.settings,
            "sources": [
                {**source, "docs": docs} for source, docs in zip(state.sources, state.source_docs, strict=True)
            ],
            "tokenizer": {
                "name": self.model.name,
                "sha256": state.tokenizer_sha256,
                "vocab_size": load_tokenizer(str(self.model)).get_piece_size(),
            },
            "splits": {name: asdict(counts) for name, counts in state.splits.items()},
            "overlap_dropped": state.overlap_dropped,
            "shards": state.shards,
            "sidecars": state.sidecars,
            **audit,
            # d = sha256() at first; then for every training document in order d = sha256(d + sha256(text))
            "train_documents_digest": state.train_digest,
            "val_document_sha256": state.val_hashes,
        }


def prepare(options: Options, transform: Transform | None = None) -> dict:
    """Turn documents into a data directory and return its manifest. PrepareError for anything the user can mend."""
    return Preparation(options, transform).run()


# +---------------------------------------------------------------------------+
# | SAMPLE: the prose that Python carries                                     |
# +---------------------------------------------------------------------------+

SKIPPED_DIRS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}
DOC_CHARS = 8000  # a document is closed at the first paragraph beyond
MIN_DOC_CHARS = 400
RULE = re.compile(r"[*=~^#\-_+|\s]{3,}")  # underlines of headings, borders of tables


class ProseFilter:
    """Cleans text into paragraphs, and lets every longer paragraph pass once only.

    Many classes repeat the words of their parents, and the help topics include one another: without this, validation
    would hold sentences of the training text.
    """

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def paragraphs(self, text: str) -> list[str]:
        """Paragraphs of prose in `text`, each on one line with single spaces."""
        kept = []
        for block in re.split(r"\n\s*\n", text.expandtabs()):
            lines = [line.strip() for line in block.splitlines()]
            paragraph = " ".join(" ".join(line for line in lines if line and not RULE.fullmatch(line)).split())
            if self.is_new_prose(paragraph):
                kept.append(paragraph)
        return kept

    def is_new_prose(self, paragraph: str) -> bool:
        """Mostly letters and spaces, not a prompt, and not met before."""
        plain = sum(map(str.isalpha, paragraph)) + paragraph.count(" ")
        if len(paragraph) < 12 or plain < 0.78 * len(paragraph) or paragraph.startswith(">>>"):
            return False
        key = paragraph.casefold()
        if len(paragraph) >= 40 and key in self.seen:
            return False
        self.seen.add(key)
        return True


def docstrings(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a syntax tree's definitions, in source order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{prefix}{child.name}"
            text = ast.get_docstring(child)
            if text:
                yield name, text
            yield from docstrings(child, name + ".")
        elif isinstance(child, (ast.If, ast.Try)):
            yield from docstrings(child, prefix)


def comment_blocks(source: str) -> Iterator[str]:
    """Comments of three and more lines: those that explain, not those that label."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        text = line.strip()
        if text.startswith("#"):
            block.append(text.lstrip("#!").strip())
            continue
        if len(block) >= 3:
            yield "\n".join(block)
        block = []


def module_paragraphs(source: bytes, prose: ProseFilter) -> list[str]:
    """Docstrings, then longer comments, of one module's source; none if it is not valid source."""
    if b'"""' not in source and b"'''" not in source:
        return []  # tables of encodings and the like: slow to parse, and no docstring in them
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in old modules are not our concern
            tree = ast.parse(source)
        text = source.decode("utf-8")
    except (SyntaxError, ValueError):  # templates and files in other encodings
        return []
    found = prose.paragraphs(ast.get_docstring(tree) or "")
    for name, doc in docstrings(tree):
        own = prose.paragraphs(doc)
        found += [f"{name}: {own[0]}", *own[1:]] if own else []
    for block in comment_blocks(text):
        found += prose.paragraphs(block)
    return found


def builtin_paragraphs(name: str, prose: ProseFilter) -> list[str]:
    """Docstrings of a module that is compiled into the interpreter."""
    module = importlib.import_module(name)
    found = prose.paragraphs(module.__doc__ or "")
    members = [("", module)]
    # Only what C defines: a hook that something replaced in this process must not change the sample.
    members += [(f"{key}.", value) for key, value in sorted(vars(module).items()) if inspect.isclass(value)]
    for prefix, owner in members:
        for key, value in sorted(vars(owner).items(), key=lambda pair: pair[0]):
            fixed = inspect.isbuiltin(value) or inspect.ismethoddescriptor(value) or inspect.isgetsetdescriptor(value)
            if fixed and isinstance(value.__doc__, str):
                own = prose.paragraphs(value.__doc__)
                found += [f"{prefix}{key}: {own[0]}", *own[1:]] if own else []
    return found


def stdlib_paragraphs(prose: ProseFilter) -> Iterator[list[str]]:
    """The paragraphs of every file of the standard library, file by file, and of the wheels that ensurepip bundles."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_DIRS)
        files += [Path(folder, name) for name in sorted(names)]
    for path in files:
        if path.suffix == ".py" and path.parent.name != "pydoc_data":
            yield module_paragraphs(path.read_bytes(), prose)
        elif path.suffix in (".txt", ".rst"):
            yield prose.paragraphs(path.read_text(encoding="utf-8", errors="replace"))
        elif path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                names = sorted(name for name in wheel.namelist() if name.endswith(".py"))
                yield from (module_paragraphs(wheel.read(name), prose) for name in names)


def sample_documents() -> list[str]:
    """The embedded corpus: help topics, docstrings, comments and notes of this Python, as documents of prose.

    A long text is cut into documents of about DOC_CHARS characters at paragraphs; the order is that of the documents'
    hashes, so that any split of it is alike. Nothing but the Python installation decides the result.
    """
    prose = ProseFilter()
    texts: list[list[str]] = [prose.paragraphs(PYDOC_TOPICS[name]) for name in sorted(PYDOC_TOPICS)]
    texts += [builtin_paragraphs(name, prose) for name in sorted(sys.builtin_module_names)]
    texts += stdlib_paragraphs(prose)
    documents: set[str] = set()
    for paragraphs in texts:
        while paragraphs:
            sizes = itertools.accumulate(len(paragraph) for paragraph in paragraphs)
            stop = 1 + sum(size < DOC_CHARS for size in sizes)
            document = "\n\n".join(paragraphs[:stop])
            if len(document) >= MIN_DOC_CHARS:
                documents.add(document)
            paragraphs = paragraphs[stop:]
    return sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())


def write_sample(path: Path) -> None:
    """Write the sample as .jsonl, unless the very same is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in sample_documents())
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(lines, encoding="utf-8", newline="\n")
    os.replace(tmp, path)


# +---------------------------------------------------------------------------+
# | AUDIT of a finished CaseOps directory                                     |
# +---------------------------------------------------------------------------+


class Audit(NamedTuple):
    """What `audit` found in a validation split with a sidecar."""

    docs: int
    undecodable: int  # documents whose ids are no CaseOps text any more: the normaliser made or ate a letter
    tokens: int
    sidecar_bytes: int
    decoded_bytes: int  # UTF-8 of the ids, decoded: less what the normaliser folds (white space, wide characters)
    targets: int  # scored tokens: the published evaluation drops an incomplete last sequence
    target_bytes: int


def find_tokenizer(folder: Path) -> spm.SentencePieceProcessor:
    """The one model of a data directory."""
    models = sorted(folder.glob("*.model"))
    if len(models) != 1:
        raise PrepareError(f"{folder}: {len(models)} files *.model; an audit needs the one that made the shards")
    return load_tokenizer(str(models[0]))


def read_validation(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (T,) and their original bytes (T,) of a directory's validation split; PrepareError if they do not fit."""
    streams = []
    shards = sorted(folder.glob("fineweb_val_[0-9]*.bin"))
    if not shards:
        raise PrepareError(f"{folder}: no fineweb_val_*.bin there")
    try:
        for path in shards:
            streams.append((open_shard(path), open_shard(path.with_name(path.name.replace("_val_", "_val_bytes_")))))
    except ValueError as error:
        raise PrepareError(str(error)) from error
    for path, (ids, counts) in zip(shards, streams, strict=True):
        if len(ids) != len(counts):
            raise PrepareError(f"{path}: {len(ids)} tokens, but its sidecar has {len(counts)}")
    ids, counts = (np.concatenate(rows) for rows in zip(*streams, strict=True))
    return ids, counts


def audit(folder: Path, seq_len: int = 2048) -> Audit:
    """Take a CaseOps validation split apart again, and compare tokens, sidecar and manifest.

    PrepareError for files that do not belong together. Documents that do not decode are only counted: NFKC can turn the
    character beside an operator into an ASCII letter, or merge its letter with an accent.
    """
    processor = find_tokenizer(folder)
    check_symbols(processor, folder.name, CaseOps())
    ids, counts = read_validation(folder)
    starts = np.flatnonzero(ids == BOS)
    if not len(starts) or starts[0] != 0:
        raise PrepareError(f"{folder}: the validation split does not begin with BOS ({BOS})")
    if counts[starts].any():
        raise PrepareError(f"{folder}: the sidecar gives bytes to BOS; it belongs to other shards")
    decoded_bytes = undecodable = 0
    plain = str.maketrans(dict.fromkeys(CaseOps.symbols))
    for row in np.split(ids, starts[1:]):
        text = processor.decode(row[1:].tolist())
        try:
            text = decode(text)
        except CaseOpsError:
            undecodable += 1
            text = text.translate(plain)
        decoded_bytes += len(text.encode())
    total = int(counts.sum(dtype=np.int64))
    check_manifest_sum(folder, total)
    targets = (len(ids) - 1) // seq_len * seq_len
    scored = int(counts[1 : targets + 1].sum(dtype=np.int64))
    return Audit(len(starts), undecodable, len(ids), total, decoded_bytes, targets, scored)


def check_manifest_sum(folder: Path, total: int) -> None:
    """PrepareError if the directory has a manifest with a byte audit, and that has another sum. Other ones pass."""
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    expected = manifest.get("byte_audit", {}).get("sidecar_bytes", total)
    if expected != total:
        raise PrepareError(f"{folder}: the sidecar sums to {total} bytes, its manifest says {expected}")


def audit_main(argv: list[str]) -> None:
    """The form `prepare.py audit DIR`."""
    parser = argparse.ArgumentParser("prepare.py audit", description=audit.__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    found = audit(parser.parse_args(argv).folder)
    print(f"val   {found.docs:,} documents, {found.tokens:,} tokens; {found.undecodable:,} documents do not decode")
    print(f"sidecar {found.sidecar_bytes:,} bytes; the decoded text has {found.decoded_bytes:,} (spaces are folded)")
    print(f"scored in sequences of 2048: {found.targets:,} tokens, {found.target_bytes:,} bytes")


# +---------------------------------------------------------------------------+
# | COMMAND LINE                                                              |
# +---------------------------------------------------------------------------+


def add_common(parser: argparse.ArgumentParser) -> None:
    """Arguments of both forms."""
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output directory")
    parser.add_argument("--jobs", type=int, default=jobs, help="worker processes (default: all cores)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens per shard (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="remove an earlier preparation in DIR first")
    parser.add_argument(
        "--caseops",
        action="store_true",
        help="rewrite capitals as operators before tokenising, and write a byte sidecar for validation",
    )


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line of either form."""
    formatter = argparse.RawDescriptionHelpFormatter
    if argv[:1] == ["sample"]:
        parser = argparse.ArgumentParser("prepare.py sample", description=sample_documents.__doc__)
        add_common(parser)
        parser.add_argument("--vocab-size", type=int, default=1024, help="pieces to train (default %(default)s)")
        parser.add_argument("--val-docs", type=int, default=16, help="validation documents (default %(default)s)")
        parser.set_defaults(docs=None, tokenizer=None, tokenizer_sample_mb=64.0, text_key="text", drop_overlap=False)
        return parser.parse_args(argv[1:])
    parser = argparse.ArgumentParser("prepare.py", description=__doc__, formatter_class=formatter)
    add_common(parser)
    parser.add_argument(
        "--docs",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE_OR_DIR",
        help=f"documents: {', '.join('.' + kind for kind in KINDS)} (.txt: a file is a document), or directories",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model to use")
    which.add_argument("--vocab-size", type=int, default=0, metavar="N", help="train a BPE tokenizer of N pieces")
    parser.add_argument(
        "--val-docs",
        type=int,
        default=50_000,
        help="the first N documents are the validation split (default %(default)s, as published)",
    )
    parser.add_argument(
        "--tokenizer-sample-mb",
        type=float,
        default=64.0,
        metavar="MB",
        help="at most so much training text for the tokenizer (default %(default)s)",
    )
    parser.add_argument("--text-key", default="text", help="key or column of the text (default %(default)s)")
    parser.add_argument(
        "--drop-overlap",
        action="store_true",
        help="drop training documents that validation holds too, instead of refusing them",
    )
    return parser.parse_args(argv)


def report(manifest: dict) -> None:
    """Print what the directory holds."""
    for split, counts in manifest["splits"].items():
        rate = counts["raw_bytes"] / counts["tokens"]
        print(
            f"{split:5s} {counts['docs']:,} documents, {counts['raw_bytes']:,} bytes, {counts['tokens']:,} tokens "
            f"({rate:.3f} bytes per token)"
        )
    print(f"tokenizer {manifest['tokenizer']['name']}, {manifest['tokenizer']['vocab_size']} pieces")
    if "byte_audit" in manifest:
        found = manifest["byte_audit"]
        print(
            f"sidecar {found['sidecar_bytes']:,} of {found['utf8_bytes']:,} bytes; {found['edge_bytes']:,} are white "
            f"space at the ends of {found['docs_with_edges']:,} documents, which has no token; "
            f"{found['unexplained_bytes']:,} unexplained"
        )


def main(argv: list[str]) -> int:
    """The command line; returns the exit code: 0, 2 for a mistake of the user, 130 after Ctrl-C."""
    try:
        if argv[:1] == ["audit"]:
            audit_main(argv[1:])
            return 0
        args = parse_arguments(argv)
        if args.docs is None:
            write_sample(args.out / SAMPLE_NAME)
            args.docs = [args.out / SAMPLE_NAME]
        options = Options(
            docs=tuple(args.docs),
            out=args.out,
            tokenizer=args.tokenizer,
            vocab_size=args.vocab_size,
            val_docs=args.val_docs,
            shard_tokens=args.shard_tokens,
            sample_mb=args.tokenizer_sample_mb,
            text_key=args.text_key,
            drop_overlap=args.drop_overlap,
            jobs=args.jobs,
            overwrite=args.overwrite,
        )
        report(prepare(options, CaseOps() if args.caseops else None))
    except (PrepareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes after the last finished shard", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
