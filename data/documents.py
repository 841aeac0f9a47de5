"""Reading documents: JSON lines (also compressed), text files and parquet tables, one file or a directory of them."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet as parquet
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_gpt import UserError

BATCH_ROWS = 512  # of a parquet table, read at a time
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zstandard.ZstdError)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


class Item(NamedTuple):
    """One document as stored in the input; workers parse it."""

    source: int  # index into the sources
    where: str  # file:line, for messages
    raw: bytes
    is_json: bool


class Source(NamedTuple):
    """One argument of --docs."""

    name: str  # the last path component: the manifest names no directory of this machine
    files: tuple[Path, ...]
    sha256: str  # of the file; for a directory, of the names and hashes of its files
    bytes: int

    def row(self) -> dict:
        """Return its row for journal and manifest."""
        return {"name": self.name, "sha256": self.sha256, "bytes": self.bytes}


def zst_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a .zst file with one or more frames.

    The reader of the zstandard package stops silently where a file was cut off; this one raises EOFError. It takes the
    longest windows that the format's own tool can write (zstd --long=31), which need 2 GiB of address space.
    """
    frame, line = None, b""
    with path.open("rb") as file:
        while packed := (frame and frame.unused_data) or file.read(1 << 17):
            if frame is None or frame.eof:
                frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            *lines, line = (line + frame.decompress(packed)).split(b"\n")
            yield from lines
    if frame and not frame.eof:
        raise EOFError("compressed file ended before its end-of-frame marker")
    yield line


OPENERS: dict[str, Callable[[Path], AbstractContextManager[Iterable[bytes]]]] = {
    "jsonl": lambda path: path.open("rb"),
    "jsonl.gz": gzip.open,
    "jsonl.xz": lzma.open,
    "jsonl.zst": lambda path: closing(zst_lines(path)),
}
KINDS = (*OPENERS, "txt", "parquet")
SUFFIXES = ", ".join("." + kind for kind in KINDS)


def kind_of(path: Path) -> str | None:
    """Return which of KINDS a file is, judging by its name, or None."""
    name = path.name.lower()
    return next((kind for kind in KINDS if name.endswith("." + kind)), None)


def read_jsonl(path: Path, source: int, kind: str) -> Iterator[Item]:
    """Yield one document per line; blank lines are skipped."""
    number = 0
    try:
        with OPENERS[kind](path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Item(source, f"{path}:{number}", line, True)
    except DAMAGED as error:
        if "too much memory" in str(error):
            raise UserError(f"{path}: its window is over 2 GiB; compress it again with at most --long=31") from error
        raise UserError(f"{path}: damaged or cut off after line {number}: {error}") from error


def read_parquet(path: Path, source: int, text_key: str) -> Iterator[Item]:
    """Yield one document per row, reading one batch of rows at a time."""
    number = 0
    try:
        # The handle, not the path: pyarrow takes no file name that is not UTF-8.
        with path.open("rb") as handle, parquet.ParquetFile(handle) as table:
            names = table.schema_arrow.names
            if text_key not in names:
                raise UserError(f"{path}: no column {text_key!r}; it has {', '.join(names)}; choose with --text-key")
            batches = table.iter_batches(batch_size=BATCH_ROWS, columns=[text_key])
            for number, value in enumerate((value for batch in batches for value in batch.column(0)), 1):
                text = value.as_py()
                if not isinstance(text, str):
                    raise UserError(f"{path}:{number}: {text_key!r} is {type(text).__name__}, not text")
                yield Item(source, f"{path}:{number}", text.encode(), False)
    except UnicodeDecodeError as error:  # pyarrow does not check what a text column holds
        found = f"{path}:{number}: {text_key!r} is not UTF-8: byte {error.object[error.start]:#04x}"
        raise UserError(f"{found}; write the column again as UTF-8") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read after row {number}: {error}") from error


def read_items(sources: list[Source], text_key: str) -> Iterator[Item]:
    """Yield every document, in the order of the arguments; within a directory, sorted by relative path."""
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
    """Return the text of a document and its UTF-8 bytes. UserError with file and line if it has none."""
    try:
        text = item.raw.decode("utf-8-sig" if item.is_json else "utf-8")  # some tools begin a file with a mark
    except UnicodeDecodeError as error:
        line = "" if item.is_json else f":{item.raw.count(10, 0, error.start) + 1}"
        raise UserError(f"{item.where}{line}: not UTF-8: byte {item.raw[error.start]:#04x}") from error
    if not item.is_json:
        return text, item.raw
    try:
        row = json.loads(text)
    except ValueError as error:
        raise UserError(f"{item.where}: not a line of JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{item.where}: JSON nested too deep to read; remove the line or flatten it") from error
    if not isinstance(row, dict) or text_key not in row:
        raise UserError(f"{item.where}: no key {text_key!r}; name the right one with --text-key")
    text = row[text_key]
    if not isinstance(text, str):
        raise UserError(f"{item.where}: {text_key!r} is {type(text).__name__}, not text")
    try:
        return text, text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{item.where}: the text holds half a surrogate pair, which has no UTF-8 form") from error


def find_source(path: Path) -> Source:
    """Look up one argument of --docs and hash its contents."""
    if path.is_file():
        if kind_of(path) is None:
            raise UserError(f"{path}: unknown suffix; known are {SUFFIXES}")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
        return Source(path.name, (path,), sha256_file(path), path.stat().st_size)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory")
    names = {}
    for found in path.rglob("*"):
        if found.is_file():
            names[found.relative_to(path).as_posix()] = found
        elif found.is_symlink():
            # rglob does not follow it: its documents would be left out without a word
            raise UserError(f"{found}: a link to a directory or to nothing; give its target to --docs, or remove it")
    files = {name: names[name] for name in sorted(names) if kind_of(names[name])}
    if not files:
        raise UserError(f"{path}: no file there ends in {SUFFIXES}")
    tree = hashlib.sha256()
    for name, found in files.items():
        tree.update(f"{name}\0{sha256_file(found)}\n".encode("utf-8", "surrogateescape"))  # a name is any bytes
    size = sum(found.stat().st_size for found in files.values())
    return Source(path.resolve().name, tuple(files.values()), tree.hexdigest(), size)
