"""Turn documents into a tokenizer and token shards, in the contest's published layout.

    python data/prepare.py --docs FILE_OR_DIR... --out DIR (--tokenizer MODEL | --vocab-size N) [--val-docs N]
    python data/prepare.py sample --out DIR [--vocab-size N] [--val-docs N]
    python data/prepare.py audit DIR

The second form needs no download: it collects the English prose that every Python installation carries. With --caseops
the tokenizer sees CaseOps text (see caseops.py), and validation gets a byte sidecar; with --fuse-pairs too, two tokens
that stand before most capitalised words become one (see pair_fusion.py). The third form checks a finished
directory, prepared or downloaded: hashes, bytes of validation, overlap of the two splits.

Files written into DIR:
    fineweb_val_000000.bin ...    the first --val-docs documents of the input, in input order
    fineweb_train_000000.bin ...  all other documents, in input order
    fineweb_val_bytes_000000.bin  original bytes per validation token; only with --caseops
    *.model                       the tokenizer, given or trained (on training documents only)
    manifest.json                 sources, counts, SHA-256 and fingerprint of every file, document hashes, settings

train_gpt.read_shard defines the shard format. A document is BOS and its ids, without EOS. It may continue in the next
shard, because every shard of a split except the last holds exactly --shard-tokens tokens.

Validation documents are decoded again. A tokenizer that counts other bytes than the text has is refused, and so is one
that loses more than white space and compatibility forms (round_trip.py); --allow-lossy accepts such a loss, and the
manifest then says "lossy": true. At the end the two splits are compared (overlap.py): if more than --max-overlap of the
validation tokens lie in runs of 64 tokens that training has too, the preparation fails.

The output depends only on the arguments and the inputs: not on --jobs, and not on where a run was interrupted.
"""

from __future__ import annotations

from interrupts import main_begins, quiet_until_main

if __name__ == "__main__":
    quiet_until_main()

import argparse
import contextlib
import functools
import hashlib
import heapq
import io
import itertools
import json
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece as spm
from caseops import CaseOps, CaseOpsError, decode
from documents import SUFFIXES, Item, find_source, parse_item, read_items, sha256_file
from overlap import MAX_SHARE, WINDOW, allowed_overlap, measure_overlap, overlap_line, refuse_overlap
from pair_fusion import FUSED_PAIRS, FusedCaseOps, plain_stream
from round_trip import RoundTrip, round_trip
from stdlib_prose import sample_documents
from tqdm import tqdm
from word_bpe import MAX_VOCAB, word_bpe
from workers import interrupt_held, started_workers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_gpt  # the line above finds it when this file runs as a script
from train_gpt import BOS_ID, UserError, atomic_write, list_shards, read_json, read_shard

TOOL_VERSION = 1  # raise it when the same arguments would give other bytes
FIRST_SYMBOL = 4  # id of the first transform symbol, after pad, BOS, EOS and unknown
CHUNK_BYTES, CHUNK_DOCS = 1 << 18, 512  # one task for a worker: large enough that handing it over costs little
STATE_NAME, MANIFEST_NAME, SAMPLE_NAME = "prepare.state.json", "manifest.json", "sample.jsonl"
START_OVER = "use --overwrite or another --out"
NO_TEXT = "the training documents hold no text; look at --docs and --text-key"
SAMPLE_MAX_SHARE = 0.05  # the sample's prose repeats itself: one method is described in many classes


@dataclass(frozen=True)
class Options:
    """Arguments of one preparation. All but the last four decide the bytes of the output."""

    docs: tuple[Path, ...]
    out: Path
    tokenizer: Path | None = None
    vocab_size: int = 0
    val_docs: int = 50_000  # as published
    shard_tokens: int = 100_000_000
    sample_mb: float = 64.0
    text_key: str = "text"
    drop_overlap: bool = False
    allow_lossy: bool = False
    max_overlap: float = 1.0  # toy data of few documents may overlap; the command line says MAX_SHARE
    jobs: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        """UserError for the first value that makes no sense."""
        checks = [
            (self.docs, "--docs names no file"),
            ((self.tokenizer is None) == (self.vocab_size > 0), "give either --tokenizer MODEL or --vocab-size N"),
            (self.vocab_size <= MAX_VOCAB, f"--vocab-size {self.vocab_size} does not fit uint16: at most {MAX_VOCAB}"),
            (self.val_docs >= 1, f"--val-docs {self.val_docs}: at least 1"),
            # a header holds the number in 32 bits
            (1 <= self.shard_tokens < 2**31, f"--shard-tokens {self.shard_tokens}: from 1 to {2**31 - 1}"),
            (1e-6 <= self.sample_mb <= 1e9, f"--tokenizer-sample-mb {self.sample_mb}: from 1e-6 to 1e9"),
            (0 <= self.max_overlap <= 1, f"--max-overlap {self.max_overlap}: a share from 0 to 1, such as {MAX_SHARE}"),
            (self.jobs >= 1, f"--jobs {self.jobs}: at least 1"),
        ]
        for valid, message in checks:
            if not valid:
                raise UserError(message)


# +---------------------------------------------------------------------------+
# | SHARDS                                                                    |
# +---------------------------------------------------------------------------+


def shard_header(num_tokens: int) -> bytes:
    """Return the header in front of `num_tokens` tokens."""
    header = np.zeros(train_gpt.SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, num_tokens
    return header.tobytes()


def write_shard(path: Path, tokens: Iterable[int]) -> Path:
    """Write a whole shard of (n,) tokens at once and return its path."""
    values = np.asarray(tokens, dtype="<u2")
    atomic_write(path, shard_header(len(values)) + values.tobytes())
    return path


def file_row(path: Path, sha256: str | None = None) -> dict:
    """Return what a manifest says about a file, so that others can know it again; with its SHA-256 if known already."""
    digest, size = sha256 or sha256_file(path), path.stat().st_size
    return {"name": path.name, "bytes": size, "sha256": digest, "fingerprint": train_gpt.fingerprint(path)}


def write_json(path: Path, value: object) -> None:
    """Write indented JSON through atomic_write."""
    atomic_write(path, json.dumps(value, indent=1).encode() + b"\n")


def read_object(path: Path) -> dict:
    """Return the JSON object in a file, or {} if there is no file. UserError for anything else."""
    try:
        return read_json(path)
    except RecursionError as error:
        raise UserError(f"{path} is nested too deep to read; it was not written by this project") from error


def listed_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file that a directory's manifest lists, by name; {} without a manifest."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return {}
    manifest = read_object(path)
    try:
        tokenizer = manifest.get("tokenizer", {})
        rows = [*manifest.get("shards", []), *manifest.get("sidecars", [])]
        rows += [tokenizer] if isinstance(tokenizer, dict) and tokenizer else []
        # download.py keeps the hashes in a table of their own, also of sets without rows.
        hashes = {**manifest.get("sha256", {}), **{row["name"]: row["sha256"] for row in rows}}
        valid = all(isinstance(value, str) and Path(name).name == name for name, value in hashes.items())
    except (KeyError, TypeError, AttributeError):
        hashes, valid = {}, False
    if not hashes or not valid:
        raise UserError(f"{path} lists no files as prepare.py or download.py do; prepare or download the data again")
    return hashes


def check_hashes(folder: Path) -> int:
    """Compare a directory's files with the SHA-256 in its manifest; return how many there are, 0 without a manifest.

    UserError that names the first file that is missing, differs, or is not listed.
    """
    listed, again = listed_files(folder), "copy it again, or prepare or download the data again"
    for name, wanted in tqdm(listed.items(), f"checking {folder.name}", unit=" files", disable=None, leave=False):
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing, {MANIFEST_NAME} lists it; {again}")
        if (found := sha256_file(path)) != wanted:
            raise UserError(f"{path}: SHA-256 is {found[:12]}..., {MANIFEST_NAME} says {wanted[:12]}...; {again}")
    here = sorted(path.name for pattern in ("fineweb_*.bin", "*.model") for path in folder.glob(pattern))
    foreign = [name for name in here if listed and name not in listed]
    if foreign:
        raise UserError(
            f"{folder / foreign[0]} is not in {MANIFEST_NAME}; remove it, or prepare or download the data again"
        )
    return len(listed)


class ShardFile:
    """A shard that grows under a temporary name until `finish`."""

    def __init__(self, path: Path) -> None:
        self.path, self.tokens = path, 0
        self.tmp = path.with_name(path.name + ".tmp")
        self.handle = self.tmp.open("wb")
        self.handle.write(shard_header(0))

    def append(self, values: np.ndarray) -> None:
        """Add (n,) uint16 values."""
        with self.naming_the_file():
            self.handle.write(values.astype("<u2", copy=False).tobytes())
        self.tokens += len(values)

    @contextlib.contextmanager
    def naming_the_file(self) -> Iterator[None]:
        """Turn a full disk into an error that says where; the system's own does not."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"{self.tmp}: cannot be written ({reason}); make room and run again") from error

    def finish(self) -> dict:
        """Complete the header, give the file its name, say so, and return its row for the manifest."""
        with self.naming_the_file():
            self.handle.seek(0)
            self.handle.write(shard_header(self.tokens))
            self.handle.close()
        row = file_row(self.tmp) | {"name": self.path.name, "tokens": self.tokens}
        os.replace(self.tmp, self.path)
        tqdm.write(f"wrote {self.path.name}: {self.tokens:,} tokens", file=sys.stderr)
        return row

    def abandon(self) -> None:
        """Close and remove the unfinished file."""
        with contextlib.suppress(OSError):  # on a full disk what is buffered cannot be written either
            self.handle.close()
        self.tmp.unlink(missing_ok=True)


# +---------------------------------------------------------------------------+
# | TOKENIZER                                                                 |
# +---------------------------------------------------------------------------+


def check_tokenizer(processor: spm.SentencePieceProcessor, name: str) -> None:
    """UserError unless shards and byte counts can rest on this tokenizer."""
    vocab = processor.get_piece_size()
    checks = [
        (vocab <= MAX_VOCAB, f"{vocab} pieces do not fit uint16"),
        (processor.bos_id() == BOS_ID, f"BOS has id {processor.bos_id()}; the shard format wants {BOS_ID}"),
        # Without byte pieces unknown characters become <unk>, and their bytes are lost.
        (any(processor.is_byte(index) for index in range(vocab)), "it has no byte pieces (byte_fallback)"),
        # A bare space counts as 0 + 1 bytes, so that piece has to exist.
        (processor.piece_to_id("\u2581") != processor.unk_id(), "it lacks the bare piece U+2581 (a single space)"),
    ]
    for valid, message in checks:
        if not valid:
            raise UserError(f"tokenizer {name}: {message}")


def check_symbols(processor: spm.SentencePieceProcessor, name: str, transform: CaseOps | None) -> None:
    """UserError unless a tokenizer was made for this transform (None: for plain text)."""
    symbols = transform.symbols if transform else ()
    if [processor.piece_to_id(symbol) for symbol in symbols] != [FIRST_SYMBOL + i for i in range(len(symbols))]:
        raise UserError(
            f"tokenizer {name}: {transform.name} needs its {len(symbols)} symbols as pieces from id {FIRST_SYMBOL} on; "
            "train one with --vocab-size"
        )
    if transform is None and processor.piece_to_id(CaseOps.symbols[0]) == FIRST_SYMBOL:
        raise UserError(f"tokenizer {name}: trained on CaseOps text; add --caseops")


@functools.cache
def load_tokenizer(path: str) -> spm.SentencePieceProcessor:
    """Load and check a SentencePiece model, once per process."""
    try:
        processor = spm.SentencePieceProcessor()
        processor.LoadFromSerializedProto(Path(path).read_bytes())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: not a SentencePiece model ({str(error).splitlines()[0][:80]})") from error
    check_tokenizer(processor, Path(path).name)
    return processor


@functools.cache
def load_table(path: str) -> train_gpt.ByteTable:
    """Return the bytes of every id as the trainer counts them, made once per process."""
    return train_gpt.byte_table(Path(path), load_tokenizer(path).get_piece_size())


def sentences(text: str, limit: int = 4000) -> Iterator[str]:
    """Cut a text at white space into pieces of at most `limit` bytes.

    SentencePiece silently drops longer training sentences. Its merges never cross white space, so cutting there loses
    nothing; only a single word longer than `limit` bytes is cut inside.
    """
    for line in text.splitlines():
        piece: list[str] = []
        size = 0
        for word in line.split():
            # A character has at most 4 bytes.
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

    Ids: 0 pad, 1 BOS, 2 EOS, 3 unknown, then the transform's symbols, 256 byte pieces, and the learnt pieces.
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
            bos_id=BOS_ID,
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
        message = f"SentencePiece could not train {vocab_size} pieces: {' '.join(str(error).split())[:200]}"
        if needed:
            message = f"--vocab-size {vocab_size} is too small: control, byte and character pieces need {needed[1]}"
        raise UserError(message) from error
    processor = spm.SentencePieceProcessor(model_proto=model.getvalue())
    found = processor.get_piece_size()
    if found != vocab_size:
        raise UserError(f"--vocab-size {vocab_size} is too large: the training text gives only {found} pieces")
    check_tokenizer(processor, "just trained")
    return model.getvalue()


class TextSample:
    """A sample of a stream: the documents with the smallest hashes that together reach `max_bytes`.

    The sample depends only on the set of documents, so a corpus sorted by origin is sampled evenly.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.size = max_bytes, 0
        self.heap: list[tuple[int, bytes]] = []  # (minus hash, UTF-8 text): the largest hash is on top
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
        """Yield the sampled texts in the order of their hashes."""
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
    transform: CaseOps | None
    is_val: bool


class Document(NamedTuple):
    """A worker's result for one document of T tokens, BOS first."""

    ids: np.ndarray  # (T,) uint16
    counts: np.ndarray | None  # (T,) uint16 original bytes per token; only of validation with a transform
    num_bytes: int  # UTF-8 bytes of the text
    digest: bytes  # SHA-256 of the text
    edge: int  # bytes at the ends of the text that the tokenizer drops; only with counts
    trip: RoundTrip | None  # what comes back of the text; only of validation


def piece_counts(item: Item, text: str, length: int, task: Task) -> np.ndarray:
    """Return the original bytes of each of a document's `length` tokens, 0 for BOS: (T,) uint16."""
    row = np.array(task.transform.piece_bytes(text, load_tokenizer(task.model)), np.int64)
    if len(row) != length - 1:
        raise UserError(f"{item.where}: {task.transform.name} counts {len(row)} pieces, not {length - 1}")
    if len(row) and not 0 <= row.min() <= row.max() < 65536:
        raise UserError(f"{item.where}: a piece stands for {row.max()} bytes, over the 65,535 of the sidecar")
    return np.concatenate(([0], row)).astype(np.uint16)


def edge_bytes(text: str, processor: spm.SentencePieceProcessor) -> int:
    """Count the UTF-8 bytes at both ends of a text that belong to no piece: white space that the normaliser strips."""
    normal, origin = processor.normalize(text, with_offsets=True)
    first = origin[0] if normal else len(text)
    last = origin[-1] if normal else len(text)
    edges = text[:first] + text[last:]
    # If the normaliser keeps something of the edges, they are not white space: leave their bytes unexplained.
    return 0 if processor.normalize(edges) else len(edges.encode())


def encode_document(item: Item, task: Task) -> Document:
    """Parse, hash and tokenise. Depends only on its arguments. UserError if validation bytes are counted wrongly."""
    processor, transform = load_tokenizer(task.model), task.transform
    text, raw = parse_item(item, task.text_key)
    seen = transform.encode(text) if transform else text
    ids = np.concatenate((np.array([BOS_ID], np.uint16), word_bpe(processor).ids(seen)))
    counts, edge, trip = None, 0, None
    if task.is_val:
        decoded = processor.decode(ids[1:].tolist())
        credited = piece_counts(item, text, len(ids), task) if transform else load_table(task.model).count(ids)
        counted = int(credited.sum(dtype=np.int64))
        # A sidecar counts the original text, a table the decoded one.
        if transform:
            counts, edge = credited, edge_bytes(seen, processor)
        elif counted != (size := len(decoded.encode())):
            raise UserError(
                f"{item.where}: tokenizer {Path(task.model).name} cannot be used: its ids count as {counted:,} bytes "
                f"and decode to {size:,}; train one with --vocab-size"
            )
        trip = round_trip(text, seen, decoded, counted)
    if transform and (fusion := transform.fusion(processor)):
        ids, counts = fusion.fuse(ids, counts)
    return Document(ids, counts, len(raw), hashlib.sha256(raw).digest(), edge, trip)


def encode_task(task: Task) -> list[Document]:
    """Encode a task's documents. Runs in a worker."""
    return [encode_document(item, task) for item in task.items]


def ordered_map(tasks: Iterable[Task], jobs: int) -> Iterator[tuple[Task, list[Document]]]:
    """Run `encode_task` over the tasks; yield results in order, with at most four tasks per worker in memory.

    Executor.map would read the whole input into memory.
    """
    if jobs == 1:
        yield from ((task, encode_task(task)) for task in tasks)
        return
    waiting: deque[tuple[Task, Future[list[Document]]]] = deque()
    with started_workers(jobs) as pool:
        try:
            for task in tasks:
                with interrupt_held():  # the task may start a worker
                    waiting.append((task, pool.submit(encode_task, task)))
                if len(waiting) >= 4 * jobs:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        except BrokenProcessPool as error:
            message = "a worker was killed (out of memory?); run again with fewer --jobs, it resumes"
            raise UserError(message) from error


# +---------------------------------------------------------------------------+
# | PREPARATION                                                               |
# +---------------------------------------------------------------------------+


@dataclass
class State:
    """The journal: what a resumed run has to know about the finished shards."""

    settings: dict
    sources: list[dict]
    tokenizer_sha256: str = ""
    docs_total: int | None = None  # known once the documents were sampled for the tokenizer
    docs_done: int = 0  # documents of the input that lie completely in finished shards
    carry: int = 0  # tokens of the next document that lie there too
    source_docs: list[int] = field(default_factory=list)
    splits: dict[str, Counter] = field(  # docs, tokens and raw_bytes of each split
        default_factory=lambda: {split: Counter(docs=0, tokens=0, raw_bytes=0) for split in ("val", "train")}
    )
    overlap_dropped: int = 0
    val_hashes: list[str] = field(default_factory=list)
    train_digest: str = hashlib.sha256().hexdigest()
    shards: list[dict] = field(default_factory=list)
    sidecars: list[dict] = field(default_factory=list)
    audit: Counter = field(default_factory=lambda: Counter(sidecar_bytes=0, edge_bytes=0, docs_with_edges=0))
    round_trip: Counter = field(
        default_factory=lambda: Counter(counted_bytes=0, lossy_docs=0, lost_chars=0, excess_bytes=0)
    )

    @classmethod
    def load(cls, path: Path) -> State:
        """Read a journal back. UserError if the file is something else."""
        try:
            values, kinds = read_object(path), vars(cls({}, [], docs_total=0))
            values["splits"] = {name: Counter(counts) for name, counts in values["splits"].items()}
            values |= {name: Counter(values[name]) for name in ("audit", "round_trip")}
            if any(type(value) is not type(kinds[name]) for name, value in values.items() if value is not None):
                raise TypeError("a value is of another type")
            if not all({"name", "fingerprint"} <= row.keys() for row in [*values["shards"], *values["sidecars"]]):
                raise KeyError("a row of a shard lacks something")
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: not a journal of this version; {START_OVER}") from error


class SplitWriter:
    """Cuts the token stream of one split into shards and journals every finished one."""

    def __init__(self, preparation: Preparation, split: str, sidecar: bool) -> None:
        self.preparation, self.split, self.sidecar = preparation, split, sidecar
        self.limit = preparation.options.shard_tokens
        self.files: list[ShardFile] = []  # the open shard and, with a sidecar, the open sidecar

    def put(self, rows: list[np.ndarray], start: int) -> None:
        """Write (n,) ids and, with a sidecar, their (n,) bytes from `start` on."""
        while start < len(rows[0]):
            # A full shard is finished only when another token needs room. So the journal always points at that token:
            # `docs_done` documents are complete, and `start` tokens of the next one are on disk.
            if self.files and self.files[0].tokens == self.limit:
                self.finish(carry=start)
            if not self.files:
                self.files = [ShardFile(self.preparation.options.out / name) for name in self.next_names()]
            stop = start + self.limit - self.files[0].tokens
            for file, row in zip(self.files, rows, strict=True):
                file.append(row[start:stop])
            start = min(stop, len(rows[0]))

    def next_names(self) -> list[str]:
        """Return the names of the next shard and its sidecar."""
        index = sum(shard["name"].startswith(f"fineweb_{self.split}_") for shard in self.preparation.state.shards)
        kinds = [self.split, f"{self.split}_bytes"] if self.sidecar else [self.split]
        return [f"fineweb_{kind}_{index:06d}.bin" for kind in kinds]

    def finish(self, carry: int = 0) -> None:
        """Complete the open shard, if there is one, and journal it."""
        if not self.files:
            return
        state = self.preparation.state
        for file, rows in zip(self.files, (state.shards, state.sidecars), strict=False):
            rows.append(file.finish())
        self.files = []
        state.carry = carry
        self.preparation.save()

    def abandon(self) -> None:
        """Remove unfinished files."""
        for file in self.files:
            file.abandon()


class Preparation:
    """One run of the tool over one output directory."""

    def __init__(self, options: Options, transform: CaseOps | None) -> None:
        """Look at the inputs; nothing is written yet."""
        self.options, self.transform = options, transform
        self.sources = [find_source(path) for path in options.docs]
        name = options.tokenizer.name if options.tokenizer else f"bpe_{options.vocab_size}.model"
        self.model = options.out / name
        self.state = State(self.settings(), [source.row() for source in self.sources])
        self.state.source_docs = [0] * len(self.sources)
        self.val_index: dict[str, int] = {}  # hash of a validation document -> its number

    def settings(self) -> dict:
        """Return what decides the bytes of the output, apart from the sources."""
        options = self.options
        tokenizer: dict = {"vocab_size": options.vocab_size, "sample_mb": options.sample_mb}
        if options.tokenizer is not None:
            if not options.tokenizer.is_file():
                raise UserError(f"{options.tokenizer}: no such tokenizer")
            check_symbols(load_tokenizer(str(options.tokenizer)), options.tokenizer.name, self.transform)
            load_table(str(options.tokenizer))
            tokenizer = {"name": options.tokenizer.name, "sha256": sha256_file(options.tokenizer)}
        return {
            "tool_version": TOOL_VERSION,
            "sentencepiece": spm.__version__,
            "tokenizer": tokenizer,
            "transform": self.transform.name if self.transform else None,
            **{name: getattr(options, name) for name in ("val_docs", "shard_tokens", "text_key", "drop_overlap")},
        }

    def save(self) -> None:
        """Write the journal."""
        write_json(self.options.out / STATE_NAME, vars(self.state))

    def run(self) -> dict:
        """Do what is still to be done, alone in the output directory, and return the manifest."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        # two would write into the same temporary files
        with train_gpt.locked(self.options.out, "another --out"):
            return self.run_alone()

    def run_alone(self) -> dict:
        """Do what is still to be done and return the manifest."""
        manifest = self.open_out()
        if manifest is not None:
            return manifest
        self.make_tokenizer()
        self.write_shards()
        if not self.state.splits["train"]["docs"]:
            raise self.nothing_to_train_on(self.state.docs_done)
        if self.state.splits["train"]["tokens"] == self.state.splits["train"]["docs"]:
            raise UserError(NO_TEXT)  # each document is BOS alone
        self.refuse_loss(self.state.round_trip)
        overlap = measure_overlap(self.options.out) | {"limit": self.options.max_overlap}
        refuse_overlap(overlap, self.options.max_overlap)
        manifest = self.manifest(overlap)
        write_json(self.options.out / MANIFEST_NAME, manifest)
        (self.options.out / STATE_NAME).unlink()
        return manifest

    def nothing_to_train_on(self, count: int) -> UserError:
        """Return the error for an input of `count` documents that all belong to validation."""
        return UserError(
            f"the input has {count} documents and --val-docs is {self.options.val_docs}: "
            "nothing is left to train on; lower --val-docs and add --overwrite"
        )

    def open_out(self) -> dict | None:
        """Return the manifest if the output directory is complete; else load or start the journal."""
        out = self.options.out
        patterns = ("fineweb_*.bin", "fineweb_*.tmp", "*.model", "*.model.tmp", "*.json.tmp")
        ours = [path for pattern in patterns for path in out.glob(pattern)]
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
            self.check_files([*state.shards, *state.sidecars])
            self.state = state
            self.val_index = {digest: index for index, digest in enumerate(state.val_hashes)}
        elif foreign := [path.name for path in ours if path.suffix != ".tmp"]:
            raise UserError(f"{out} holds {foreign[0]} from elsewhere; {START_OVER}")
        return None

    def refuse_change(self, settings: dict, sources: list[dict]) -> None:
        """UserError if the output directory was started with other arguments or inputs."""
        changed = [
            f"{key} was {settings.get(key)}, is {value}"
            for key, value in self.state.settings.items()
            if settings.get(key) != value
        ]
        if not changed and sources != self.state.sources:
            changed = ["the documents are not the same"]
        if changed:
            raise UserError(f"{self.options.out} was started with other arguments: {changed[0]}; {START_OVER}")

    def check_finished(self) -> dict:
        """Return the manifest of a complete directory after a look at its files."""
        path = self.options.out / MANIFEST_NAME
        manifest = read_object(path)
        try:
            sources = [{key: row[key] for key in ("name", "sha256", "bytes")} for row in manifest["sources"]]
            self.refuse_change(manifest["settings"], sources)
            rows = [*manifest["shards"], *manifest["sidecars"], manifest["tokenizer"]]
            self.refuse_loss(manifest["round_trip"])
            refuse_overlap(manifest["overlap"], self.options.max_overlap)
            self.check_files(rows)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not written by this version of the tool; {START_OVER}") from error
        return manifest

    def check_files(self, rows: list[dict]) -> None:
        """UserError for a file that is gone or is not what its row in journal or manifest says."""
        for row in rows:
            file = self.options.out / row["name"]
            if not file.is_file() or train_gpt.fingerprint(file) != row["fingerprint"]:
                raise UserError(f"{file}: gone, or not the file that was written; put it back, or use --overwrite")

    def make_tokenizer(self) -> None:
        """Copy or train the tokenizer, unless an earlier run did."""
        state, given = self.state, self.options.tokenizer
        if state.tokenizer_sha256:
            if not self.model.is_file() or sha256_file(self.model) != state.tokenizer_sha256:
                raise UserError(f"{self.model}: changed since the interrupted run; use --overwrite")
            return
        if given is None:
            sample = self.sample_text()
            if not any(map(str.strip, sample.texts())):
                raise UserError(NO_TEXT)
            print(f"training a tokenizer of {self.options.vocab_size} pieces on {sample.size:,} bytes", file=sys.stderr)
            symbols = self.transform.symbols if self.transform else ()
            rewrite = self.transform.encode if self.transform else str
            atomic_write(self.model, train_tokenizer(map(rewrite, sample.texts()), self.options.vocab_size, symbols))
        elif given.resolve() != self.model.resolve():
            atomic_write(self.model, given.read_bytes())
        # this process may have read another tokenizer of that name
        load_tokenizer.cache_clear()
        load_table.cache_clear()
        state.tokenizer_sha256 = sha256_file(self.model)
        self.save()

    def sample_text(self) -> TextSample:
        """Read all documents once: sample the training split for the tokenizer, and find mistakes early."""
        options, sample = self.options, TextSample(int(self.options.sample_mb * 1e6))
        val: dict[bytes, int] = {}
        count = 0
        items = read_items(self.sources, options.text_key)
        for count, item in enumerate(tqdm(items, "reading", unit=" docs", disable=None), 1):
            text, raw = parse_item(item, options.text_key)
            digest = hashlib.sha256(raw).digest()
            if count <= options.val_docs:
                val.setdefault(digest, count - 1)
            elif text and digest in val:
                self.refuse_twin(item, val[digest])
            else:
                sample.add(digest, raw)
        if count <= options.val_docs:
            raise self.nothing_to_train_on(count)
        self.state.docs_total = count
        return sample

    def refuse_twin(self, item: Item, twin: int) -> None:
        """UserError for a training document that is in validation too, unless --drop-overlap drops such documents."""
        if not self.options.drop_overlap:
            raise UserError(
                f"{item.where}: this training document is also validation document {twin + 1}; "
                "remove it or use --drop-overlap"
            )

    def tasks(self) -> Iterator[Task]:
        """Yield the documents that are not in finished shards, in groups; no group crosses the split."""
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
        return Task(group, str(self.model), self.options.text_key, self.transform, is_val)

    def write_shards(self) -> None:
        """Tokenise and write everything that is not in finished shards."""
        state = self.state
        val = SplitWriter(self, "val", sidecar=self.transform is not None)
        train = SplitWriter(self, "train", sidecar=False)
        bar = tqdm(total=state.docs_total, initial=state.docs_done, desc="tokenising", unit=" docs", disable=None)
        try:
            with closing(ordered_map(self.tasks(), self.options.jobs)) as results:
                for task, documents in results:
                    is_val = state.docs_done < self.options.val_docs
                    if not is_val:
                        val.finish()
                    self.write_task(task, documents, val if is_val else train)
                    bar.update(len(task.items))
            val.finish()
            train.finish()
        finally:
            bar.close()
            val.abandon()
            train.abandon()

    def write_task(self, task: Task, documents: list[Document], writer: SplitWriter) -> None:
        """Write the documents of one task and count them."""
        state = self.state
        for item, document in zip(task.items, documents, strict=True):
            twin = self.val_index.get(document.digest.hex()) if writer.split == "train" else None
            if twin is not None and document.num_bytes:
                self.refuse_twin(item, twin)
                state.overlap_dropped += 1
            else:
                writer.put([row for row in document[:2] if row is not None], state.carry)
                self.remember(document.digest, writer.split)
                counts = {"docs": 1, "tokens": len(document.ids), "raw_bytes": document.num_bytes}
                state.splits[writer.split].update(counts)
                if document.trip:
                    self.count_trip(item, document.trip)
                if document.counts is not None:
                    edge, counted = document.edge, int(document.counts.sum(dtype=np.int64))
                    state.audit.update(sidecar_bytes=counted, edge_bytes=edge, docs_with_edges=edge > 0)
            state.carry = 0
            state.docs_done += 1
            state.source_docs[item.source] += 1

    def count_trip(self, item: Item, trip: RoundTrip) -> None:
        """Count a validation document's round trip. UserError if it loses something, unless --allow-lossy."""
        lossy = trip.lost > 0 or trip.excess > 0
        loss = {"lossy_docs": lossy, "lost_chars": trip.lost, "excess_bytes": trip.excess}
        if lossy and not self.options.allow_lossy:
            what = trip.example or f"it counts as {trip.counted:,} bytes, {trip.excess:,} more than it has"
            raise UserError(
                f"{item.where}: tokenizer {self.model.name} does not keep this text: {what}; use another tokenizer, or "
                '--allow-lossy, which marks the data as "lossy"'
            )
        self.state.round_trip.update(counted_bytes=trip.counted, **loss)

    def refuse_loss(self, loss: Mapping[str, int]) -> None:
        """UserError for a loss that an earlier run allowed and this one does not."""
        if loss.get("lossy_docs", 0) and not self.options.allow_lossy:
            raise UserError(
                f"{self.options.out}: tokenizer {self.model.name} does not keep the text of {loss['lossy_docs']} "
                "validation documents; use --allow-lossy, or another tokenizer and --overwrite"
            )

    def remember(self, digest: bytes, split: str) -> None:
        """Remember a document's hash: validation in a list, training in one running digest."""
        state = self.state
        if split == "val":
            self.val_index.setdefault(digest.hex(), len(state.val_hashes))
            state.val_hashes.append(digest.hex())
        else:
            state.train_digest = hashlib.sha256(bytes.fromhex(state.train_digest) + digest).hexdigest()

    def byte_audit(self) -> dict:
        """Return where the bytes of validation are: on a token or, as white space at the ends of a text, on none."""
        val, audit = self.state.splits["val"], self.state.audit
        unexplained = val["raw_bytes"] - audit["sidecar_bytes"] - audit["edge_bytes"]
        return {"docs": val["docs"], "utf8_bytes": val["raw_bytes"], **audit, "unexplained_bytes": unexplained}

    def manifest(self, overlap: dict) -> dict:
        """Return the record of what was made from what."""
        state = self.state
        trip = {"docs": state.splits["val"]["docs"], "raw_bytes": state.splits["val"]["raw_bytes"], **state.round_trip}
        processor = load_tokenizer(str(self.model))
        fusion = self.transform.fusion(processor) if self.transform else None
        return {
            "tool": f"data/prepare.py {TOOL_VERSION}",
            "settings": state.settings,
            "sources": [row | {"docs": docs} for row, docs in zip(state.sources, state.source_docs, strict=True)],
            "tokenizer": file_row(self.model) | {"vocab_size": processor.get_piece_size()},
            **({FUSED_PAIRS: fusion.rows(processor)} if fusion else {}),
            "splits": state.splits,
            "overlap_dropped": state.overlap_dropped,
            "shards": state.shards,
            "sidecars": state.sidecars,
            **({"byte_audit": self.byte_audit()} if self.transform else {}),
            "lossy": state.round_trip["lossy_docs"] > 0,
            "round_trip": trip,
            "overlap": overlap,
            # d = sha256() at first; then for every training document in order d = sha256(d + sha256(text))
            "train_documents_digest": state.train_digest,
            "val_document_sha256": state.val_hashes,
        }


def prepare(options: Options, transform: CaseOps | None = None) -> dict:
    """Turn documents into a data directory and return its manifest. UserError for anything the user can mend."""
    return Preparation(options, transform).run()


# +---------------------------------------------------------------------------+
# | AUDIT of a finished directory                                             |
# +---------------------------------------------------------------------------+


class Audit(NamedTuple):
    """What `audit` found."""

    files: int  # files that have the manifest's SHA-256; 0: there is no manifest
    docs: int
    undecodable: int  # documents whose ids are no longer CaseOps text: the normaliser made or removed a letter
    equal: int | None  # documents that decode to the very text that was prepared; None: the manifest has no hashes
    tokens: int
    fused: int  # tokens that stand for two
    counted_bytes: int  # that a score divides by: from the sidecar, or from the tokenizer
    decoded_bytes: int  # UTF-8 of the decoded ids: without what the normaliser folds (white space, wide characters)
    targets: int  # scored tokens: the published evaluation drops an incomplete last sequence
    target_bytes: int
    lossy: bool | None  # whether the manifest says that the tokenizer loses text; None: it says nothing
    overlap: dict | None  # what `measure_overlap` found; None: there are no training shards


def decoded_documents(
    processor: spm.SentencePieceProcessor, ids: np.ndarray, caseops: bool
) -> Iterator[tuple[bytes, bool]]:
    """Yield the UTF-8 of each document of a stream without fused pairs, and whether its ids are valid CaseOps text."""
    plain = str.maketrans(dict.fromkeys(CaseOps.symbols))
    for row in filter(len, np.split(ids, np.flatnonzero(ids == BOS_ID))):
        text, valid = processor.decode(row[row != BOS_ID].tolist()), True
        try:
            text = decode(text) if caseops else text
        except CaseOpsError:
            text, valid = text.translate(plain), False
        yield text.encode("utf-8", "surrogatepass"), valid


def decode_documents(processor: spm.SentencePieceProcessor, ids: np.ndarray, caseops: bool) -> tuple[int, int]:
    """Return the UTF-8 bytes of a stream's documents, and how many of them are not valid CaseOps text."""
    found = [(len(raw), not valid) for raw, valid in decoded_documents(processor, ids, caseops)]
    return sum(size for size, _ in found), sum(broken for _, broken in found)


def read_validation(folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the tokens (T,) of a directory's validation split and, if it has a sidecar, their original bytes (T,)."""
    shards = [read_shard(path) for path in list_shards(str(folder), "val")]
    sidecars = [read_shard(path) for path in list_shards(str(folder), "val_bytes")]
    if sidecars and list(map(len, shards)) != list(map(len, sidecars)):
        raise UserError(f"{folder}: byte sidecars and validation shards differ in number or length; prepare them again")
    return np.concatenate(shards), np.concatenate(sidecars) if sidecars else None


def audit_bytes(folder: Path, model: Path, manifest: dict) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return the validation tokens, the bytes that each counts, and whether the tokenizer has case operators.

    UserError if tokenizer, sidecar and shards do not belong together.
    """
    processor, settings = load_tokenizer(str(model)), manifest.get("settings")
    transformed = isinstance(settings, dict) and settings.get("transform") is not None
    caseops = transformed or processor.piece_to_id(CaseOps.symbols[0]) == FIRST_SYMBOL
    check_symbols(processor, model.name, CaseOps() if caseops else None)
    ids, sidecar = read_validation(folder)
    starts = np.flatnonzero(ids == BOS_ID)
    if not len(starts) or starts[0] != 0:
        raise UserError(f"{folder}: the validation split does not begin with BOS ({BOS_ID})")
    train_gpt.check_ids(ids, processor.get_piece_size(), folder)
    if caseops and sidecar is None:
        raise UserError(
            f"{folder} has no fineweb_val_bytes_*.bin, which tokenizer {model.name} needs: its pieces do not show the "
            "original bytes; prepare again with --caseops, or copy the sidecar"
        )
    if caseops and sidecar[starts].any():
        raise UserError(f"{folder}: the sidecar gives bytes to BOS; it belongs to other shards")
    counts = sidecar if caseops else load_table(str(model)).count(ids)
    if sidecar is not None and not np.array_equal(sidecar, counts):
        raise UserError(f"{folder}: the byte sidecar is not that of tokenizer {model.name}; remove the wrong one")
    return ids, counts, caseops


def audit(folder: Path, seq_len: int = 2048, max_overlap: float | None = None) -> Audit:
    """Compare the files of a directory with its manifest, validation bytes with decoded text, and the two splits.

    UserError for files that do not belong together, wrong bytes, and splits that overlap by more than `max_overlap`
    (None: what the manifest allows, or MAX_SHARE).

    CaseOps documents that do not decode are only counted: NFKC can turn the character beside an operator into an ASCII
    letter, or merge its letter with an accent.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory")
    if max_overlap is not None and not 0 <= max_overlap <= 1:
        raise UserError(f"--max-overlap {max_overlap}: a share from 0 to 1, such as {MAX_SHARE}")
    files, manifest = check_hashes(folder), read_object(folder / MANIFEST_NAME)
    model = train_gpt.find_tokenizer(train_gpt.Config(data_path=str(folder)))
    if model is None:
        raise UserError(f"{folder} has no *.model; an audit needs the tokenizer that made the shards")
    ids, counts, caseops = audit_bytes(folder, model, manifest)
    total, said = int(counts.sum(dtype=np.int64)), manifest.get("byte_audit")
    said = said.get("sidecar_bytes", total) if isinstance(said, dict) else total
    if said != total:
        raise UserError(f"{folder}: the sidecar sums to {total} bytes, its manifest says {said}; prepare it again")
    processor = load_tokenizer(str(model))
    plain, _ = plain_stream(manifest, processor, ids, counts)
    texts = list(decoded_documents(processor, plain, caseops))
    decoded, undecodable = sum(len(raw) for raw, _ in texts), sum(not valid for _, valid in texts)
    hashes = manifest.get("val_document_sha256")
    pairs = zip(texts, hashes, strict=False) if isinstance(hashes, list) else None
    equal = pairs and sum(hashlib.sha256(raw).hexdigest() == said for (raw, _), said in pairs)
    if not caseops and decoded != total:
        raise UserError(f"{folder}: the ids count as {total:,} bytes and decode to {decoded:,}; use another tokenizer")
    overlap = measure_overlap(folder) if any(folder.glob("fineweb_train_*.bin")) else None
    if overlap is not None:
        refuse_overlap(overlap, allowed_overlap(manifest) if max_overlap is None else max_overlap)
    targets = (len(ids) - 1) // seq_len * seq_len
    scored = int(counts[1 : targets + 1].sum(dtype=np.int64))
    lossy, docs = manifest.get("lossy"), int((ids == BOS_ID).sum())
    fused = len(plain) - len(ids)
    return Audit(files, docs, undecodable, equal, len(ids), fused, total, decoded, targets, scored, lossy, overlap)


def audit_main(argv: list[str]) -> None:
    """Run the form `prepare.py audit DIR`."""
    parser = argparse.ArgumentParser("prepare.py audit", description=audit.__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    add_max_overlap(parser, None)
    arguments = parser.parse_args(argv)
    found = audit(arguments.folder, max_overlap=arguments.max_overlap)
    listed = f"{found.files:,} have the SHA-256 of {MANIFEST_NAME}"
    print(f"files {listed if found.files else f'not checked: there is no {MANIFEST_NAME}'}")
    print(f"val   {found.docs:,} documents, {found.tokens:,} tokens; {found.undecodable:,} documents do not decode")
    if found.equal is not None:
        print(f"text  {found.equal:,} documents decode to the very bytes that were prepared")
    if found.fused:
        print(f"pairs {found.fused:,} fused; without that {found.tokens + found.fused:,} tokens")
    print(f"bytes {found.counted_bytes:,}; the decoded text has {found.decoded_bytes:,} (white space is folded)")
    print(f"scored in sequences of 2048: {found.targets:,} tokens, {found.target_bytes:,} bytes")
    print(f"lossy {'unknown' if found.lossy is None else found.lossy}")
    print(overlap_line(found.overlap) if found.overlap else "overlap not measured: there are no training shards")


# +---------------------------------------------------------------------------+
# | COMMAND LINE                                                              |
# +---------------------------------------------------------------------------+


def write_sample(path: Path, overwrite: bool) -> None:
    """Write the sample as .jsonl. UserError for another file of that name, unless `overwrite`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in sample_documents())
    if path.exists() and not overwrite and path.read_bytes() != lines.encode():
        raise UserError(f"{path} is not the sample of this Python; {START_OVER}")
    atomic_write(path, lines.encode())


def add_max_overlap(parser: argparse.ArgumentParser, default: float | None) -> None:
    """Add the option that all three forms share."""
    text = f"fail if more of the validation tokens lie in runs of {WINDOW} that training has too (default "
    text += "what the manifest allowed)" if default is None else "%(default)s)"
    parser.add_argument("--max-overlap", type=float, default=default, metavar="SHARE", help=text)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line of either form into the fields of Options, and `caseops`."""
    is_sample = argv[:1] == ["sample"]
    name, text = ("prepare.py sample", sample_documents.__doc__) if is_sample else ("prepare.py", __doc__)
    parser = argparse.ArgumentParser(name, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "(default %(default)s)"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--out", type=Path, required=True, metavar="DIR", help="output directory")
    add("--jobs", type=int, default=cores, help="worker processes (default: all cores)")
    add("--shard-tokens", type=int, default=Options.shard_tokens, help=f"tokens per shard {default}")
    add("--overwrite", action="store_true", help="first remove shards, manifest and every *.model in DIR")
    add("--caseops", action="store_true", help="turn capitals into operators; validation gets a byte sidecar")
    add("--fuse-pairs", action="store_true", help="with --caseops: a space and the operator after it become one token")
    if is_sample:
        add("--vocab-size", type=int, default=1024, help=f"pieces to train {default}")
        add("--val-docs", type=int, default=16, help=f"validation documents {default}")
        add_max_overlap(parser, SAMPLE_MAX_SHARE)
        return parser.parse_args(argv[1:])
    add("--docs", type=Path, nargs="+", required=True, metavar="FILE_OR_DIR", help=f"directories, or {SUFFIXES}")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model to use")
    which.add_argument("--vocab-size", type=int, default=0, metavar="N", help="train a BPE tokenizer of N pieces")
    add("--val-docs", type=int, default=Options.val_docs, help=f"the first N documents are the validation {default}")
    add(
        "--tokenizer-sample-mb",
        type=float,
        default=Options.sample_mb,
        metavar="MB",
        dest="sample_mb",
        help=f"training text for the tokenizer, at most {default}",
    )
    add("--text-key", default=Options.text_key, help=f"key or column of the text {default}")
    add("--drop-overlap", action="store_true", help="drop training documents that are in validation (else: an error)")
    add("--allow-lossy", action="store_true", help="accept a tokenizer that loses text, and mark the manifest")
    add_max_overlap(parser, MAX_SHARE)
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
    if manifest.get("lossy"):
        loss = manifest["round_trip"]
        lossy_docs = f"{loss['lossy_docs']:,} of {loss['docs']:,} validation documents"
        print(f"LOSSY {lossy_docs} lose {loss['lost_chars']:,} characters, {loss['excess_bytes']:,} bytes in excess")
    if "overlap" in manifest:
        print(overlap_line(manifest["overlap"]))


def print_anywhere() -> None:
    """Let a terminal that knows only ASCII show other characters as escapes, instead of an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status: 0, 2 for a mistake by the user, 130 after Ctrl-C."""
    print_anywhere()
    try:
        if argv[:1] == ["audit"]:
            audit_main(argv[1:])
            return 0
        values = vars(parse_arguments(argv))
        caseops, fuse = values.pop("caseops"), values.pop("fuse_pairs")
        if fuse and not caseops:
            raise UserError("--fuse-pairs fuses case operators, which plain text has not; add --caseops")
        transform = (FusedCaseOps() if fuse else CaseOps()) if caseops else None
        if "docs" not in values:
            values["docs"] = [values["out"] / SAMPLE_NAME]
            write_sample(values["docs"][0], values["overwrite"])
        values["docs"] = tuple(values["docs"])
        report(prepare(Options(**values), transform))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print("error: out of memory; use fewer --jobs", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes after the last finished shard", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    main_begins()
    sys.exit(main(sys.argv[1:]))
