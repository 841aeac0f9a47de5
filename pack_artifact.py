"""Pack a finished run into the artifact that is submitted, and check that the artifact scores what the run scored.

    python pack_artifact.py pack logs/demo_seed1337                     one self-extracting file, RUN_DIR/artifact.pyz
    python pack_artifact.py pack logs/demo_seed1337 --format split      train_gpt.py (text, base85) + model.bin
    python pack_artifact.py verify logs/demo_seed1337/artifact.pyz --run logs/demo_seed1337 --data data/sample
    python pack_artifact.py inspect logs/demo_seed1337/artifact.pyz     where its bytes are, without running it
    python pack_artifact.py inspect --run logs/demo_seed1337 --probe    and what quantisation lost, tensor by tensor
    python pack_artifact.py sample logs/demo_seed1337 --prompt "The"    text from the packed weights

The one-file form runs by `python FILE` and by `torchrun FILE`. Its layout, from the first byte to the last:

    magic line    a source encoding that does not exist. Python runs a file that ends in a zip directory as a program;
                  a truncated file has lost the directory, is read as text, and stops at this line, which says why.
    container     sha256 of all that follows | sizes of code, tokenizer, weights (u32 LE)
                  | code = brotli (preset name, record.env, minified train_gpt.py, separated by NUL)
                  | tokenizer (brotli; empty when it does not travel) | weights, as they are in model.bin
    zip tail      one deflated member, __main__.py: the bootstrap below

The bootstrap checks the hash, writes the parts as real files (Triton refuses kernels whose source is not in a file) to
a folder of the user's cache that is named by the hash, each by rename so that eight ranks may do so at once, and
replaces its own process by `python train_gpt.py` with STAGES=eval unless the environment says otherwise.

The packed program trains, quantises and scores as the plain one does. It lacks only what talks to a reader: comments,
docstrings, annotations, the manual of the knobs (--help) and the table of names that other programs use.

Sections: 1 minify, 2 container, 3 bootstrap, 4 pack, 5 verify, 6 inspect, 7 sample, 8 command line.
"""

from __future__ import annotations

import argparse
import ast
import base64
import builtins
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import keyword
import math
import os
import re
import shutil
import string
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import brotli
import numpy as np
import python_minifier
import torch
from torch import Tensor

import train_gpt
from records import sampling, token_losses
from records.tensor_losses import entropy_bits, run_report
from train_gpt import Stream, UserError, atomic_write, read_json

CAP_BYTES = 16_000_000
MAGIC = b"#coding:error-artifact-truncated\n"
HEADER = struct.Struct("<32s3I")
SPLIT_SOURCE, SPLIT_MODEL = "train_gpt.py", "model.bin"


# +---------------------------------------------------------------------------------------------------------------+
# | 1 MINIFY AND CUT INTO SECTIONS                                                                                |
# +---------------------------------------------------------------------------------------------------------------+

# A decorator outside this list may read the annotations: triton.jit (tl.constexpr), torch.library.custom_op (schema),
# functools.singledispatch. Their functions keep them.
IGNORES_ANNOTATIONS = frozenset(
    "staticmethod classmethod property cached_property cache lru_cache contextmanager abstractmethod wraps "
    "no_grad inference_mode disable compile once_differentiable custom_fwd custom_bwd".split()
)
# A call of one of these reads the annotations of the functions that it is given, although it decorates none.
READS_ANNOTATIONS = ("jit", "custom_op", "triton_op", "get_type_hints", "signature", "singledispatch", "script")

NO_MANUAL = "this program was packed without the manual of its knobs: run the plain train_gpt.py --help"


def decorator_name(node: ast.expr) -> str:
    """Last name of a decorator or callee: `torch.no_grad()` -> `no_grad`."""
    while isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


class AnnotationStripper(ast.NodeTransformer):
    """Drops annotations that nobody reads at run time; fields of a class keep theirs, and so do functions in `keep`."""

    def __init__(self, keep: frozenset[str]) -> None:
        self.keep = keep

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Clear a signature and go on into the body; a function whose annotations are read is left whole."""
        if node.name in self.keep or any(decorator_name(d) not in IGNORES_ANNOTATIONS for d in node.decorator_list):
            return node
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        node.returns = None
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Go into the methods; dataclass and NamedTuple read the annotations of fields."""
        node.body = [line if isinstance(line, ast.AnnAssign) else self.visit(line) for line in node.body]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """`x: int = 1` becomes `x = 1`; a bare declaration stays, since it makes the name local."""
        return node if node.value is None else ast.Assign(targets=[node.target], value=node.value)


def parse_source(text: str, name: str) -> ast.Module:
    """Parse, or say in one line where the source is broken (UserError)."""
    try:
        return ast.parse(text, name)
    except (SyntaxError, ValueError) as error:
        where = f" line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UserError(f"{name}{where} does not parse: {getattr(error, 'msg', error)}") from error


def functions_with_readers(tree: ast.Module) -> frozenset[str]:
    """Names that are handed to a call which may read their annotations, such as `triton.jit(kernel)`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and any(word in decorator_name(node.func) for word in READS_ANNOTATIONS):
            names.update(a.id for a in ast.walk(node) if isinstance(a, ast.Name))
    return frozenset(names)


def constexpr_names(tree: ast.Module) -> list[str]:
    """Arguments of Triton kernels that are compile-time constants: the minifier's shorter alias would not be one."""
    arguments = (node for node in ast.walk(tree) if isinstance(node, ast.arg) and node.annotation is not None)
    return sorted({a.arg for a in arguments if ast.unparse(a.annotation).endswith("constexpr")})


def drop_manual(tree: ast.Module) -> ast.Module:
    """Drop what only talks to a reader: doc and `when` of each knob, names of groups, old names, the help text."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            knobs = (n for n in ast.walk(node) if isinstance(n, ast.Call) and decorator_name(n) == "knob")
            for call in knobs:  # knob(default, doc, what is allowed, when)
                call.args[1:2] = [ast.Constant("")]
                call.args[3:] = []
                call.keywords = [keyword for keyword in call.keywords if keyword.arg != "when"]
        elif isinstance(node, ast.Assign) and defined_names(node) <= {"RENAMED", "GROUPS"}:
            node.value = ast.Dict([], [])
        elif isinstance(node, ast.FunctionDef) and node.name == "help_text":
            node.body = ast.parse(f"return {NO_MANUAL!r}").body
    return tree


def minify(text: str, name: str = "source") -> str:
    """Smaller source of the same behaviour, without its manual. UserError when `text` does not parse.

    Argument names, global names, class annotations and asserts stay.
    """
    tree = drop_manual(parse_source(text, name))
    tree = AnnotationStripper(functions_with_readers(tree)).visit(tree)
    tree = ast.fix_missing_locations(tree)
    small = minify_names(python_minifier.unparse(tree), tuple(constexpr_names(tree)))
    return python_minifier.unparse(OwnLoops().visit(parse_source(small, f"minified {name}")))


@functools.cache  # ten seconds for train_gpt.py, and tests pack it often
def minify_names(text: str, kept_locals: tuple[str, ...]) -> str:
    """Shorten local names and white space with python_minifier; names in `kept_locals` stay."""
    return python_minifier.minify(
        text,
        remove_annotations=False,
        remove_literal_statements=True,
        hoist_literals=False,  # a Triton kernel may not read a global that is not a constexpr
        rename_locals=True,
        preserve_locals=list(kept_locals),
        rename_globals=False,
        remove_asserts=False,
    )


COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp  # what CPython inlines since 3.12


class OwnLoops(ast.NodeTransformer):
    """Gives loop variables of comprehensions in nested functions names that their function has for nothing else.

    The minifier reuses names. Where a function reads A from a function around it and one of its comprehensions loops
    over an A of its own, CPython 3.12.1 and 3.13.0 take one for the other: UnboundLocalError.
    """

    depth = 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        """Rename in the functions inside this one, then, if there is one around it, here."""
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1
        if self.depth:
            self.rename(node)
        return node

    def rename(self, function: ast.FunctionDef) -> None:
        """Rename loop variables whose names also stand outside their comprehensions."""
        nodes = list(ast.walk(function))
        loops: dict[str, set[ast.AST]] = {}
        for comprehension in nodes:
            if isinstance(comprehension, COMPREHENSIONS):
                # what the first loop runs over still belongs to the function
                own = {*ast.walk(comprehension)} - {*ast.walk(comprehension.generators[0].iter)}
                targets = (n for g in comprehension.generators for n in ast.walk(g.target))
                for name in {n.id for n in targets if isinstance(n, ast.Name)}:
                    loops.setdefault(name, set()).update(own)
        names = {n: n.id if isinstance(n, ast.Name) else n.arg for n in nodes if isinstance(n, ast.Name | ast.arg)}
        used = {*names.values(), *dir(builtins), *keyword.kwlist}
        spare = (a + b for a in string.ascii_letters for b in string.ascii_letters if a + b not in used)
        for name, own in sorted(loops.items()):
            same = [n for n, its in names.items() if its == name]
            if not own.issuperset(same):
                new = next(spare)
                for node in own.intersection(same):
                    setattr(node, "id" if isinstance(node, ast.Name) else "arg", new)


BANNER = re.compile(r"^# \+-+\+\n# \| *(?P<title>[^\n]*?) *\|\n# \+-+\+$", re.MULTILINE)
BEFORE_BANNERS = "(before the first banner)"


class Section(NamedTuple):
    """One boxed section: its title, its text in the plain source, its text in the packed source."""

    title: str
    raw: str
    minified: str


def defined_names(node: ast.stmt) -> set[str]:
    """Names that a top-level statement binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    imports = (n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom))
    return stored | {a.asname or a.name.split(".")[0] for n in imports for a in n.names}


def statements(text: str, name: str) -> list[tuple[ast.stmt, int]]:
    """Top-level statements of a source with the character that each begins at (its decorators included)."""
    lines = text.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]
    found = []
    for node in parse_source(text, name).body:
        line = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        # ast counts columns in UTF-8 bytes; several statements may share a line of minified source
        column = len(lines[node.lineno - 1].encode()[: node.col_offset].decode()) if line == node.lineno else 0
        found.append((node, starts[line - 1] + column))
    return found


def cut_sections(packed: str, plain: str, name: str = "source") -> list[Section]:
    """Cut a packed source at the banners of the plain one; joined, the cuts are the packed source.

    A banner does not survive minification, but global names do: a statement belongs to the section that defines its
    name, and a statement without a name to the section of the statement before it.
    """
    nodes = statements(plain, name)
    inside = {line for node, _ in nodes for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    # a banner inside a string or a class is no section
    banners = [m for m in BANNER.finditer(plain) if plain.count("\n", 0, m.start()) + 1 not in inside]
    titles = [BEFORE_BANNERS, *(m["title"] for m in banners)]
    edges = [0, *(m.start() for m in banners), len(plain)]
    raws = {title: plain[a:b] for title, (a, b) in zip(titles, itertools.pairwise(edges), strict=True)}

    home: dict[str, str] = {}
    for node, start in nodes:
        title = titles[sum(edge <= start for edge in edges[1:-1])]
        home |= dict.fromkeys(defined_names(node) - home.keys(), title)
    pieces, here = dict.fromkeys(titles, ""), BEFORE_BANNERS
    nodes = statements(packed, f"packed {name}")
    ends = [start for _, start in nodes[1:]] + [len(packed)]
    for (node, start), end in zip(nodes, ends, strict=True):
        here = next((home[n] for n in sorted(defined_names(node)) if n in home), here)
        pieces[here] += packed[start:end]
    return [Section(title, raws[title], pieces[title]) for title in titles]


# +---------------------------------------------------------------------------------------------------------------+
# | 2 CONTAINER                                                                                                   |
# +---------------------------------------------------------------------------------------------------------------+


class Payload(NamedTuple):
    """What travels. `preset` names the folder that the parts are extracted to; `source` is minified."""

    preset: str
    config: bytes
    source: bytes
    tokenizer: bytes
    weights: bytes

    def text(self) -> bytes:
        """The part that is compressed as code. None of the three may hold a NUL."""
        return b"\0".join((self.preset.encode(), self.config, self.source))


@functools.lru_cache(maxsize=64)  # a report asks for what the container has already compressed
def compress(data: bytes) -> bytes:
    """Brotli, as hard as it can: 2 % smaller than the best LZMA on this source."""
    modes = (brotli.MODE_TEXT, brotli.MODE_GENERIC)
    return min((brotli.compress(data, mode=mode, quality=11, lgwin=24) for mode in modes), key=len)


def encode_container(payload: Payload) -> bytes:
    """Bytes of the container (layout in the module docstring)."""
    if b"\0" in payload.config + payload.source or "\0" in payload.preset:
        raise UserError("a NUL byte in the source, the configuration or the preset name: remove it")
    code = compress(payload.text())
    tokenizer = compress(payload.tokenizer) if payload.tokenizer else b""
    header = HEADER.pack(bytes(32), len(code), len(tokenizer), len(payload.weights))
    body = header[32:] + code + tokenizer + payload.weights
    return hashlib.sha256(body).digest() + body


def decode_container(blob: bytes, name: str = "artifact") -> tuple[Payload, int]:
    """Payload and length of the container that `blob` begins with. UserError when it is truncated or corrupted."""
    if len(blob) < HEADER.size:
        raise UserError(f"{name} is truncated: {len(blob)} of {HEADER.size} header bytes; copy it again")
    digest, n_code, n_tokenizer, n_weights = HEADER.unpack_from(blob)
    code_end = HEADER.size + n_code
    tokenizer_end = code_end + n_tokenizer
    end = tokenizer_end + n_weights
    if len(blob) < end:
        raise UserError(f"{name} is truncated: {len(blob)} of {end} container bytes; copy it again")
    if hashlib.sha256(blob[32:end]).digest() != digest:
        raise UserError(f"{name} is corrupted: its sha256 does not match; copy it again")
    preset, config, source = brotli.decompress(blob[HEADER.size : code_end]).split(b"\0", 2)
    tokenizer = brotli.decompress(blob[code_end:tokenizer_end]) if n_tokenizer else b""
    return Payload(preset.decode(), config, source, tokenizer, blob[tokenizer_end:end]), end


# +---------------------------------------------------------------------------------------------------------------+
# | 3 BOOTSTRAP                                                                                                   |
# +---------------------------------------------------------------------------------------------------------------+

# Runs inside the artifact. @NAMES@ are filled in below; it is minified before it is stored.
# An existing file of the cache is compared with the artifact's bytes and replaced when it differs, so neither an
# interrupted extraction nor an edited copy can ever be what is scored.
BOOTSTRAP = """
import hashlib, os, sys, tempfile
me = os.path.abspath(@SELF@)
env = os.environ

def put(name, data):
    path = os.path.join(folder, name)
    if not os.path.exists(path) or open(path, "rb").read() != data:
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    return path

try:
    from brotli import decompress
    @IMPORT@
    blob = @READ@
    code, tokenizer, weights = (int.from_bytes(blob[at:at + 4], "little") for at in (32, 36, 40))
    code += @HEADER@
    tokenizer += code
    weights += tokenizer
    if hashlib.sha256(blob[32:weights]).digest() != blob[:32]:
        raise ValueError("truncated or corrupted: sha256 mismatch, copy it again")
    preset, config, source = decompress(blob[@HEADER@:code]).split(b"\\0", 2)
    cache = env.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(cache, "train_gpt", blob[:8].hex(), preset.decode())
    os.makedirs(folder, exist_ok=True)
    script = put("train_gpt.py", source)
    put("record.env", config)
    model = put("model.bin", blob[tokenizer:weights])
    @TOKENIZER@
    env["PRESET"] = folder
    if "quantize" not in env.setdefault("STAGES", "eval"):
        env["MODEL_PATH"] = model
    if "RUN_ID" not in env:
        name = os.path.splitext(os.path.basename(me))[0] + "_" + blob[:4].hex()
        env.setdefault("ARTIFACT_DIR", "logs/" + name + "_eval")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:-len(sys.argv)], script, *sys.argv[1:]], env)
except (ImportError, OSError, ValueError) as error:
    print("error:", me, error, "(it extracts to XDG_CACHE_HOME)" if isinstance(error, OSError) else "", file=sys.stderr)
    sys.exit(2)
"""
READ_SINGLE = f'open(me, "rb").read()[{len(MAGIC)}:]'
READ_SPLIT = (
    'base64.b85decode(open(me, "rb").read().split(b"\\n#")[-1].strip())[4:]'
    f' + open(os.path.join(os.path.dirname(me), "{SPLIT_MODEL}"), "rb").read()'
)


def bootstrap_source(split: bool, tokenizer: bool) -> bytes:
    """The bootstrap for one form of artifact, minified."""
    extract = 'env["TOKENIZER_PATH"] = put("tokenizer.model", decompress(blob[code:tokenizer]))'
    values = {
        "SELF": "__file__" if split else "os.path.dirname(__file__)",
        "IMPORT": "import base64" if split else "",
        "READ": READ_SPLIT if split else READ_SINGLE,
        "HEADER": str(HEADER.size),
        "TOKENIZER": extract if tokenizer else "",
    }
    text = BOOTSTRAP
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return python_minifier.minify(text, rename_globals=True).encode()


def zip_tail(member: bytes, packed: bytes, offset: int) -> bytes:
    """A zip archive of one deflated member, __main__.py, that stands `offset` bytes into its file.

    Written field by field, with a fixed date and system: the bytes are a function of the input alone, and a reader can
    tell any other byte.
    """
    name, size = b"__main__.py", (zlib.crc32(member), len(packed), len(member))
    version, flags, deflated, midnight, new_year_1980, unix = 20, 0, 8, 0, 0x21, 3 << 8
    kind = (version, flags, deflated, midnight, new_year_1980)
    local = struct.pack("<4s5H3I2H", b"PK\3\4", *kind, *size, len(name), 0) + name + packed
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", version | unix, *kind, *size, len(name), 0, 0, 0, 0, 0, offset) + name
    return local + entry + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(entry), offset + len(local), 0)


def check_tail(data: bytes, end: int, name: str) -> None:
    """UserError unless what follows the container at `end` is exactly the zip tail that a packer wrote."""
    tail, start = data[end:], 30 + len("__main__.py")
    packed = tail[start : start + int.from_bytes(tail[18:22], "little")]
    inflate = zlib.decompressobj(-15)
    try:
        member = inflate.decompress(packed)
    except zlib.error:
        member = b""
    if not member or not inflate.eof or zip_tail(member, packed, end) != tail:
        raise UserError(f"{name} is damaged behind its container (truncated, or a byte changed); copy it again")


def split_files(container: bytes, bootstrap: bytes, n_weights: int) -> dict[str, bytes]:
    """The contest's two files: the text holds all of the container but the weights, as a comment in base85.

    The comment begins with a checksum of the code in front of it, which the container's hash does not cover.
    """
    head, code = container[: len(container) - n_weights], bootstrap.rstrip()
    text = code + b"\n#" + base64.b85encode(struct.pack("<I", zlib.crc32(code)) + head) + b"\n"
    return {SPLIT_SOURCE: text, SPLIT_MODEL: container[len(head) :]}


def build(payload: Payload, split: bool) -> dict[str, bytes]:
    """All files of an artifact by name; the one-file form has the empty name."""
    bootstrap, container = bootstrap_source(split, bool(payload.tokenizer)), encode_container(payload)
    if split:
        return split_files(container, bootstrap, len(payload.weights))
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = deflate.compress(bootstrap) + deflate.flush()
    return {"": MAGIC + container + zip_tail(bootstrap, packed, len(MAGIC) + len(container))}


def read_packed(path: Path) -> Payload:
    """Read a packed file of either form without running it, and check every byte of it.

    UserError when it is foreign, truncated or corrupted.
    """
    text, *models = artifact_files(path)
    data = text.read_bytes()
    if not models:
        payload, size = decode_container(data[len(MAGIC) :], str(text))
        check_tail(data, len(MAGIC) + size, str(text))
        return payload
    code, _, tail = data.rpartition(b"\n#")
    try:
        head = base64.b85decode(tail.strip())
    except ValueError as error:
        raise UserError(f"{text} is not a packed artifact (or its payload is damaged): pack one first") from error
    if len(head) < 4 + HEADER.size or b"b85decode" not in code:
        raise UserError(f"{text} is not a packed artifact: make one with `pack_artifact.py pack RUN_DIR`")
    if head[:4] != struct.pack("<I", zlib.crc32(code)) or base64.b85encode(head) + b"\n" != tail:
        raise UserError(f"{text} is corrupted: its code does not match its checksum; copy it again")
    blob = head[4:] + models[0].read_bytes()
    payload, size = decode_container(blob, str(text))
    if size != len(blob):
        raise UserError(f"{text} is corrupted: {models[0].name} is longer than it was; copy it again")
    return payload


def artifact_files(path: Path) -> list[Path]:
    """Files that make up an artifact: itself, or the two of the split form (named by folder or by train_gpt.py)."""
    if path.is_dir():
        path = path / SPLIT_SOURCE
    if not path.is_file():
        raise UserError(f"no file {path}: give the packed file, or the folder of the split form")
    with path.open("rb") as file:
        head = file.read(len(MAGIC))
    single = head == MAGIC
    if not single and head.startswith(MAGIC[:16]):
        raise UserError(f"{path} was made by another version of the packer (or its first line is damaged): pack again")
    files = [path] if single else [path, path.with_name(SPLIT_MODEL)]
    if not files[-1].is_file():
        raise UserError(f"{path} is not a one-file artifact, and there is no {files[-1]} beside it")
    return files


# +---------------------------------------------------------------------------------------------------------------+
# | 4 PACK                                                                                                        |
# +---------------------------------------------------------------------------------------------------------------+


def read_input(path: Path, what: str) -> bytes:
    """Bytes of a file that must exist (UserError naming what it is)."""
    if not path.is_file():
        raise UserError(f"no {what}: {path} does not exist (has the run finished all stages?)")
    return path.read_bytes()


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file that must exist. UserError when it is missing, broken or not an object."""
    read_input(path, what)
    return read_json(path)


def read_result(run_dir: Path) -> dict[str, Any]:
    """result.json of a run, as `read_object`."""
    return read_object(run_dir / "result.json", "result")


def find_tokenizer(given: Path | None) -> Path | None:
    """--tokenizer-path, else TOKENIZER_PATH, else the *.model in DATA_PATH, else None. UserError when ambiguous."""
    chosen, folder = str(given or os.environ.get("TOKENIZER_PATH", "")), os.environ.get("DATA_PATH", "")
    if not chosen and not folder:
        return None
    return train_gpt.find_tokenizer(train_gpt.Config(tokenizer_path=chosen, data_path=folder))


def write_files(out: Path, files: dict[str, bytes], cap: int) -> tuple[bool, int, list[Path]]:
    """Write all files under temporary names, count them there by stat, and rename only when they fit under `cap`.

    Returns (written, bytes on disk, final paths). Over the cap nothing of the final names is touched.
    """
    finals = [out / name if name else out for name in files]
    staging = Path(tempfile.mkdtemp(prefix=".pack.", dir=out.parent))
    try:
        staged = [staging / str(i) for i in range(len(finals))]
        for path, data in zip(staged, files.values(), strict=True):
            path.write_bytes(data)
        total = sum(os.stat(path).st_size for path in staged)
        if total > cap:
            return False, total, finals
        for path, final in zip(staged, finals, strict=True):
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, final)
        return True, sum(os.stat(path).st_size for path in finals), finals
    finally:
        shutil.rmtree(staging)


def size_by_part(payload: Payload, split: bool, total: int) -> dict[str, int]:
    """Bytes on disk by part; they add up to `total`. Base85 (split form) weighs on code, config and tokenizer."""
    growth = 1.25 if split else 1.0
    text = len(compress(payload.text()))
    bare = len(compress(Payload("", b"", payload.source, b"", b"").text()))
    sizes = {"code": round(bare * growth), "config": round((text - bare) * growth), "weights": len(payload.weights)}
    if payload.tokenizer:
        sizes["tokenizer"] = round(len(compress(payload.tokenizer)) * growth)
    return {"bootstrap": total - sum(sizes.values())} | sizes


def section_rows(sections: list[Section], code_bytes: int) -> list[dict[str, Any]]:
    """Raw, minified and compressed bytes of each section.

    The compressed bytes of a section are what its removal saves, scaled so that the column adds up to `code_bytes`.
    """
    texts = [s.minified.encode() for s in sections]

    def size(parts: list[bytes]) -> int:
        """Compressed bytes, by a quality that takes a tenth of the time: shares are what matters here."""
        return len(brotli.compress(b"".join(parts), quality=9, lgwin=24))

    saved = [size(texts) - size(texts[:i] + texts[i + 1 :]) for i in range(len(texts))]
    scale = code_bytes / max(1, sum(saved))
    return [
        {"section": s.title, "raw": len(s.raw.encode()), "minified": len(t), "compressed": round(n * scale)}
        for s, t, n in zip(sections, texts, saved, strict=True)
    ]


def print_rows(rows: list[dict[str, Any]], formats: dict[str, str]) -> None:
    """A table of dicts with these columns, in these formats; None is a dash. All but the first column to the right."""
    cells = [["-" if row[k] is None else format(row[k], f) for k, f in formats.items()] for row in rows]
    lines = [list(formats), *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        numbers = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  " + "  ".join([first.ljust(widths[0]), *numbers]).rstrip())


def print_sizes(report: dict[str, Any]) -> None:
    """The table of bytes by part."""
    sizes = report["parts"] | {"total": report["bytes_total"]}
    print_rows([{"part": k, "bytes": v} for k, v in sizes.items()], {"part": "", "bytes": ","})


def read_inputs(run_dir: Path, source: Path, tokenizer: bytes) -> tuple[Payload, list[Section], dict[str, Any]]:
    """Payload, source by section and result.json of a run. UserError names what is missing or broken."""
    if not run_dir.is_dir():
        raise UserError(f"no run directory {run_dir}")
    weights = read_input(run_dir / "model.bin", "model blob")
    config = read_input(run_dir / "record.env", "configuration")
    result = read_result(run_dir)
    # a run that was quantised again has no final score yet
    is_scored = "final" in (result.get("stages") or {})
    if is_scored and result.get("model_sha256") not in (None, hashlib.sha256(weights).hexdigest()):
        raise UserError(f"{run_dir / 'model.bin'} is not what the final score is of; run STAGES=eval again")
    raw = read_input(source, "source")
    if result.get("source_sha256") not in (None, hashlib.sha256(raw).hexdigest()):
        print(f"warning: {source} is not the source that made this run (source_sha256 differs)", file=sys.stderr)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text: {error}") from error
    small = minify(text, str(source))
    # a folder of the cache: PRESET=. and PRESET=.. have no name of their own
    preset = Path(str(result.get("preset") or "")).name
    preset = run_dir.resolve().name if preset in ("", "..") else preset
    payload = Payload(preset, config, small.encode(), tokenizer, weights)
    return payload, cut_sections(small, text, str(source)), result


def pack_report(args: argparse.Namespace, payload: Payload, files: dict[str, bytes]) -> dict[str, Any]:
    """What `pack` says about an artifact's bytes, before anything is written."""
    total = sum(map(len, files.values()))
    return {
        "artifact": str(args.out),
        "format": args.format,
        "fits": total <= args.cap,
        "cap": args.cap,
        "headroom": args.cap - total,
        "parts": size_by_part(payload, args.format == "split", total),
        "bytes_code": total - len(payload.weights),
        "bytes_model": len(payload.weights),
        "bytes_total": total,
        "sha256": hashlib.sha256(b"".join(files.values())).hexdigest(),
        "tokenizer": args.tokenizer,
    }


def refuse_inputs(args: argparse.Namespace) -> None:
    """UserError if the artifact would be written over the program or a file of the run."""
    out, names = args.out, (SPLIT_SOURCE, SPLIT_MODEL) if args.format == "split" else ("",)
    kept = [args.source, Path(train_gpt.__file__)]
    kept += [args.run_dir / name for name in ("model.bin", "model.pt", "hessians.pt", "record.env", "result.json")]
    for path in (out / name for name in names):
        if path.resolve() in {file.resolve() for file in kept}:
            raise UserError(f"--out {out}: {path} is what the artifact is made from; name another place")


def pack(args: argparse.Namespace) -> int:
    """Subcommand `pack`: 0 written, 1 over the cap (nothing written), 2 by UserError."""
    if not args.run_dir.is_dir():
        raise UserError(f"no run directory {args.run_dir}")
    # a run that goes on in the folder writes result.json too
    with train_gpt.locked(args.run_dir):
        return pack_run(args)


def pack_run(args: argparse.Namespace) -> int:
    """Pack a run whose folder is locked."""
    try:
        model = find_tokenizer(args.tokenizer_path)
    except UserError:
        if args.tokenizer == "embed" or args.tokenizer_path:
            raise
        model = None  # only its size would be told
    if args.tokenizer == "embed" and model is None:
        raise UserError("--tokenizer embed: no tokenizer known; give --tokenizer-path FILE or set DATA_PATH")
    embedded = read_input(model, "tokenizer") if args.tokenizer == "embed" else b""
    payload, sections, result = read_inputs(args.run_dir, args.source, embedded)
    split, files = args.format == "split", build(payload, args.format == "split")
    args.out = out = args.out or args.run_dir / ("submission" if split else "artifact.pyz")
    if out.is_dir() != split and out.exists():
        raise UserError(f"--out {out}: {'a folder' if split else 'a file'} is needed, and this exists as the other")
    refuse_inputs(args)
    out.parent.mkdir(parents=True, exist_ok=True)
    written, total, finals = write_files(out, files, args.cap)
    report = pack_report(args, payload, files)
    assert total == report["bytes_total"] and written == report["fits"], "the disk holds other bytes than were built"
    if written:  # before anything is printed: whoever reads it may stop reading
        counted = {k: report[k] for k in ("bytes_code", "bytes_model", "bytes_total")}
        place = os.path.relpath(out.resolve(), args.run_dir.resolve())
        result |= counted | {"artifact": place, "artifact_sha256": report["sha256"]}
        atomic_write(args.run_dir / "result.json", json.dumps(result, indent=2).encode() + b"\n")

    rows = section_rows(sections, report["parts"]["code"])
    size = f"{model.stat().st_size:,} bytes" if model else "(size unknown, no DATA_PATH)"
    print_sizes(report)
    print("  tokenizer counted\n" if embedded else f"  tokenizer {size}: not counted, as in the contest\n")
    sums = {"section": "sum"} | {k: sum(row[k] for row in rows) for k in ("raw", "minified", "compressed")}
    print_rows([*rows, sums], {"section": "", "raw": ",", "minified": ",", "compressed": ","})
    if written:
        print(f"wrote {', '.join(map(str, finals))}: {total:,} of {args.cap:,} bytes, {args.cap - total:,} to spare")
    print("PACK " + json.dumps(report | {"sections": rows}))
    if not written:
        by_part = ", ".join(f"{k} {v:,}" for k, v in report["parts"].items())
        excess = f"{total:,} bytes are {total - args.cap:,} over the cap of {args.cap:,} ({by_part})"
        print(f"error: {excess}; nothing written to {out}", file=sys.stderr)
    return 0 if written else 1


# +---------------------------------------------------------------------------------------------------------------+
# | 5 VERIFY                                                                                                      |
# +---------------------------------------------------------------------------------------------------------------+

Check = tuple[str, bool, str]  # what is compared, is it equal, detail
# What a child may inherit: the machine, never a knob of the run (those must come out of the artifact).
INHERITED = re.compile(
    r"(PATH|HOME|USER|LOGNAME|SHELL|TERM|LANG|LC_\w+|TZ|TMPDIR|VIRTUAL_ENV|LD_\w+|DYLD_\w+|CUDA_\w+|NVIDIA_\w+|NCCL_\w+"
    r"|GLOO_\w+|OMP_\w+|MKL_\w+|TORCH_\w+|TORCHINDUCTOR_\w+|PYTORCH_\w+|TRITON_\w+|CC|CXX"
    r"|DEVICE|ATTENTION|COMPUTE_DTYPE|COMPILE|FUSED_\w+_ENABLED|CANONICAL_CHECK)"
)


def load_program(path: Path, name: str = "train_gpt") -> Any:
    """Import a train_gpt.py, plain or packed. UserError when it does not import.

    The module gets a name that no other has: torch registers a program's operators under it, and frees the operators
    that had the name before.
    """
    name = next(free for i in itertools.count(1) if (free := f"{name}_{i}") not in sys.modules)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or not path.is_file():
        raise UserError(f"no program {path}: give --source")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError, AttributeError) as error:
        raise UserError(f"{path} cannot be imported: {error}") from error
    return module


def clean_environment(workdir: Path, data: Path | None, tokenizer: Path | None) -> dict[str, str]:
    """Environment of a child: the machine's variables, the data, and a cache inside the empty directory."""
    env = {k: v for k, v in os.environ.items() if INHERITED.fullmatch(k)}
    env |= {"XDG_CACHE_HOME": str(workdir / "cache"), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if data is not None:
        env["DATA_PATH"] = str(data.resolve())
    if tokenizer is not None:
        env["TOKENIZER_PATH"] = str(tokenizer.resolve())
    return env


def run_child(command: list[str], folder: Path, env: dict[str, str], quiet: bool = False) -> None:
    """Run Python in the empty directory; output streams through unless `quiet`. RuntimeError when the child fails."""
    sink = subprocess.DEVNULL if quiet else None
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, stdout=sink, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode} of: {' '.join(command)}")


def decoded_weights(source: Path, model: Path) -> dict[str, Tensor]:
    """The weights in `model` as the program in `source` decodes them. RuntimeError when it refuses them."""
    program = load_program(source)
    try:
        return {name: torch.as_tensor(value) for name, value in program.load_artifact(model).items()}
    except ValueError as error:  # the UserError of that program among them
        raise RuntimeError(f"{source} does not decode {model}: {error}") from error


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal dtype, shape and bytes: 0.0 and -0.0 differ, a NaN equals itself."""
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def compare_weights(script: Path, args: argparse.Namespace, workdir: Path, env: dict[str, str]) -> list[Check]:
    """Extract by the artifact's own code, then compare blob, configuration and decoded tensors with the run's."""
    run_child([str(script), "--explain"], workdir, env, quiet=True)
    folders = [path.parent for path in (workdir / "cache" / "train_gpt").glob("*/*/train_gpt.py")]
    if len(folders) != 1:
        raise RuntimeError(f"the artifact extracted {len(folders)} folders, expected one")
    folder = folders[0]
    same_blob = (folder / "model.bin").read_bytes() == read_input(args.run / "model.bin", "model blob")
    same_config = (folder / "record.env").read_bytes() == read_input(args.run / "record.env", "configuration")
    ours = decoded_weights(folder / "train_gpt.py", folder / "model.bin")
    theirs = decoded_weights(args.source, args.run / "model.bin")
    wrong = sorted(k for k in ours.keys() | theirs.keys() if not same_bits(ours.get(k), theirs.get(k)))
    note = f"{len(ours)} tensors, bit for bit" if not wrong else f"{len(wrong)} differ: {', '.join(wrong[:3])}"
    return [
        ("model.bin", same_blob, "byte for byte"),
        ("record.env", same_config, "byte for byte"),
        ("decoded weights", not wrong and bool(ours), note),
    ]


RANKS_DIFFER = 1e-3  # share by which the scores of two runs with TTT_WARM_START_A=1 may differ


def compare_scores(ours: dict[str, Any], theirs: dict[str, Any], near: float = 0.0) -> list[Check]:
    """What the artifact scored against the run, and by how much not: equal exactly, or val_loss and val_bpb nearly."""
    rows = []
    for key in ("val_loss", "val_bpb", "tokens_scored", "bytes_scored", "tokens_unadapted"):
        # a score that ran out of EVAL_BUDGET_SECONDS is another score
        default = 0 if key == "tokens_unadapted" else None
        a, b = ours.get(key, default), theirs.get(key, default)
        known = isinstance(a, (int, float)) and isinstance(b, (int, float))
        note = f"artifact {a}, run {b}" + (f", difference {a - b:+.3e}" if known else "")
        share = near if key.startswith("val_") else 0.0
        rows.append((key, known and math.isclose(a, b, rel_tol=share), f"{a}" if a == b else note))
    return rows


def run_alone(args: argparse.Namespace, embedded: bool) -> tuple[list[Check], dict[str, Any]]:
    """Run the artifact from an empty directory: comparisons of its weights (with --run), and its result.json.

    RuntimeError when the artifact does not run.
    """
    named = {name: Path(os.environ[name]) for name in ("DATA_PATH", "TOKENIZER_PATH") if os.environ.get(name)}
    data, tokenizer = args.data or named.get("DATA_PATH"), args.tokenizer or named.get("TOKENIZER_PATH")
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={args.nproc}"] if args.nproc > 1 else []
    with tempfile.TemporaryDirectory(prefix="verify_") as name:
        workdir = Path(name)
        env = clean_environment(workdir, data, None if embedded else tokenizer)
        for file in artifact_files(args.file):
            shutil.copyfile(file, workdir / file.name)
        script = workdir / artifact_files(args.file)[0].name
        rows = compare_weights(script, args, workdir, env) if args.run else []
        run_child([*launcher, str(script)], workdir, env)
        return rows, read_result(next((workdir / "logs").glob("*_eval"), workdir / "logs"))


def verify(args: argparse.Namespace) -> int:
    """Subcommand `verify`: 0 when everything equals the run, 1 when something differs or the artifact fails to run."""
    embedded = bool(read_packed(args.file).tokenizer)
    expected = read_result(args.run) if args.run else {}
    if args.run and not args.source.is_file():
        raise UserError(f"no {args.source} to decode the run's weights with: give --source")
    started = time.perf_counter()
    try:
        rows, score = run_alone(args, embedded)
    except RuntimeError as error:
        print(f"error: the artifact does not run from an empty directory: {error}", file=sys.stderr)
        return 1
    if args.run:
        cfg = train_gpt.load_config(train_gpt.parse_preset(args.run / "record.env"))
        # as published, that score depends on which rank takes which batch
        rows += compare_scores(score, expected, RANKS_DIFFER if cfg.ttt_warm_start_a else 0.0)
    equal = all(ok for _, ok, _ in rows)
    print()
    if args.run:
        checks = [{"check": k, "equal": "yes" if ok else "NO", "detail": note} for k, ok, note in rows]
        print_rows(checks, {"check": "", "equal": "", "detail": ""})
    else:
        print(f"val_loss {score.get('val_loss')}  val_bpb {score.get('val_bpb')}")
    report = {
        "artifact": args.file.name,
        "equal": equal if args.run else None,
        "checks": {k: ok for k, ok, _ in rows},
        "val_loss": score.get("val_loss"),
        "val_bpb": score.get("val_bpb"),
        "run_val_bpb": expected.get("val_bpb"),
        "seconds": round(time.perf_counter() - started, 1),
    }
    print("VERIFY " + json.dumps(report))
    if not equal:
        print("error: the artifact is not the run: " + ", ".join(k for k, ok, _ in rows if not ok), file=sys.stderr)
    return 0 if equal else 1


# +---------------------------------------------------------------------------------------------------------------+
# | 6 INSPECT                                                                                                     |
# +---------------------------------------------------------------------------------------------------------------+

PART_KINDS = {"q": "symbols", "s": "scales", "hs": "scales", "ss": "scales", "order": "row order"}
PART_KINDS |= dict.fromkeys(("lqa", "lqas", "lqb", "lqbs", "lqm"), "correction")
INK, MUTED, BAR, MARK = "#1f2933", "#6b7785", "#627d98", "#d1495b"


def read_streams(blob: bytes, name: str) -> list[Stream]:
    """Streams of a model blob with their arrays. UserError when it is foreign, damaged or of another version."""
    found = train_gpt.open_blob(blob, name)
    # the first stream begins with the index, whose text costs bytes too
    index = {("index:index:text", "index"): np.frombuffer(found.index, np.uint8)}
    return [found.streams[0]._replace(name="rest", arrays=index | found.streams[0].arrays), *found.streams[1:]]


def role_of(key: str) -> str:
    """Role of a stored tensor."""
    return train_gpt.Stored.parse(key, {}).role


def cost(size: float, items: float, bound: float) -> dict[str, Any]:
    """Columns about `items` symbols that take `size` bytes and would take `bound` at their order-0 entropy."""
    bits = 8 * size / max(1, items)
    return {"items": int(items), "bytes": round(size), "bits_per_item": bits, "bound": round(bound)}


def stream_rows(streams: list[Stream]) -> list[dict[str, Any]]:
    """Bytes, order-0 bound and symbols of each stream."""
    rows = []
    for name, coder, size, arrays in streams:
        bound, items = sum(map(entropy_bits, arrays.values())) / 8, sum(a.size for a in arrays.values())
        rows.append({"stream": name, "coder": coder} | cost(size, items, bound))
        rows[-1]["over_bound"] = size / bound - 1 if bound else 0.0
    return rows


def byte_shares(streams: list[Stream]) -> dict[tuple[str, str], float]:
    """Bytes of each stored array: a stream's bytes, shared out by the entropy of the arrays in it."""
    shares = {}
    for s in streams:
        bits = {key: entropy_bits(array) for key, array in s.arrays.items()}
        scale = s.size / max(1e-9, sum(bits.values()))
        shares |= {key: scale * value for key, value in bits.items()}
    return shares


def array_rows(streams: list[Stream]) -> list[dict[str, Any]]:
    """Bytes by role and kind of part, the largest first."""
    shares, sums = byte_shares(streams), {}
    for (key, part), array in ((key, array) for s in streams for key, array in s.arrays.items()):
        row = sums.setdefault((role_of(key), PART_KINDS.get(part, "other")), np.zeros(4))
        row += 1, shares[key, part], array.size, entropy_bits(array) / 8
    ranked = sorted(sums.items(), key=lambda item: -item[1][1])
    return [{"role": role, "part": kind, "arrays": int(n)} | cost(*row) for (role, kind), (n, *row) in ranked]


KB, RELATIVE = "kB (1 kB = 1,000 bytes)", "squared error over squared weights (outputs)"
NATS = "nats per token"
PANELS = (  # key of the rows, their label, title, what the bars show, what red marks show, unit
    ("streams", "stream", "Streams, red: order-0 entropy", "bytes", "bound", KB),
    ("arrays", "role", "Stored arrays by role", "bytes", "", KB),
    ("sections", "section", "Sections of the code", "bytes", "", KB),
    ("roles", "role", "Error by role, red: through the Hessians", "relative_error", "hessian_weighted_error", RELATIVE),
    ("positions", "position", "Loss by position, red: before adaptation", "after", "before", NATS),
    ("lengths", "length", "Loss by length of the document", "after", "before", NATS),
    ("classes", "class", "Loss by class of token", "after", "before", NATS),
)


def draw_inspection(report: dict[str, Any], path: Path) -> None:
    """A PNG with one panel of bars for each table that the report has."""
    # half a second, which only a picture is worth
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    panels = [panel for panel in PANELS if report.get(panel[0])]
    figure = Figure(figsize=(5 * len(panels), 6), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (key, label, title, value, mark, unit) in zip(axes, panels, strict=True):
        rows, scale = report[key][:16], 1e3 if unit == KB else 1.0
        ax.barh(range(len(rows)), [(row[value] or 0.0) / scale for row in rows], color=BAR, log=unit == RELATIVE)
        for place, row in enumerate(rows):
            if row.get(mark) is not None:
                ax.plot([row[mark] / scale] * 2, [place - 0.4, place + 0.4], color=MARK)
        names = [f"{row[label]} {row.get('part') or row.get('stored') or ''}" for row in rows]
        ax.set_yticks(range(len(rows)), names, fontsize=8, color=INK)
        ax.invert_yaxis()
        ax.set_title(title, loc="left", color=INK)
        ax.set_xlabel(unit, color=MUTED)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['file']}: {report['bytes_total']:,} of {CAP_BYTES:,} bytes", color=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    atomic_write(path, buffer.getvalue())


def read_any(path: Path) -> tuple[Payload | None, bytes, list[Path]]:
    """Payload (None for a bare blob), model blob and files of an artifact, a run folder or a model.bin."""
    if path.is_dir() and not (path / SPLIT_SOURCE).is_file():
        names = ("artifact.pyz", f"submission/{SPLIT_SOURCE}", SPLIT_MODEL)
        path = next((path / name for name in names if (path / name).is_file()), path / SPLIT_MODEL)
    # an artifact may have any name
    if path.suffix == ".bin" and not read_input(path, "model blob").startswith(MAGIC):
        return None, read_input(path, "model blob"), [path]
    payload = read_packed(path)
    return payload, payload.weights, artifact_files(path)


def bytes_report(name: str, streams: list[Stream], blob: bytes, files: list[Path]) -> dict[str, Any]:
    """Where the bytes of a model blob are, by stream and by role; `files` are those that count against the cap."""
    total, by_stream, by_role = sum(f.stat().st_size for f in files), stream_rows(streams), array_rows(streams)
    weights = sum(row["items"] for row in by_role if row["part"] == "symbols")
    stored, bound = (sum(row[key] for row in by_stream) for key in ("bytes", "bound"))
    return {
        "file": name,
        "bytes_total": total,
        "cap": CAP_BYTES,
        "headroom": CAP_BYTES - total,
        "bytes_model": len(blob),
        "bytes_code": total - len(blob),
        "streams": by_stream,
        "arrays": by_role,
        "quantised_weights": weights,
        "bits_per_weight": 8 * len(blob) / (weights or 1),
        "over_bound": stored / max(1, bound) - 1,
    }


def print_inspection(report: dict[str, Any]) -> None:
    """The tables of `inspect` and their summary."""
    numbers = {"items": ",", "bytes": ",", "bits_per_item": ".3f", "bound": ","}
    losses = {"stored": "", "weights": ",", "relative_error": ".3e", "hessian_weighted_error": ".3e"}
    losses |= {"raw_bytes": ",", "entropy_bytes": ",", "bytes": ","}
    tables = {
        "streams": {"stream": "", "coder": ""} | numbers | {"over_bound": "+.2%"},
        "arrays": {"role": "", "part": "", "arrays": ","} | numbers,
        "sections": {"section": "", "minified": ",", "bytes": ","},
        "roles": {"role": ""} | losses,
        "tensors": {"tensor": ""} | losses,
        "lqer": {"lqer_tensors": ",", "bytes_bit_packed": ",", "bytes_with_int8_factors": ","},
        "probe": {"probe": "", "tensor": "", "bytes_at_entropy": "+,", "error_ratio": ".3f"},
        "positions": {"position": ""} | token_losses.FORMATS,
        "lengths": {"length": ""} | token_losses.FORMATS,
        "classes": {"class": ""} | token_losses.FORMATS,
    }
    for key, formats in tables.items():
        if report.get(key):
            print_rows(report[key], formats)
            print()
    print(
        f"{report['quantised_weights']:,} quantised weights, {report['bits_per_weight']:.3f} bits per weight with "
        f"all that the model needs; the streams are {report['over_bound']:+.2%} off their order-0 entropy"
    )


def inspect(args: argparse.Namespace) -> int:
    """Subcommand `inspect`: where the bytes of an artifact are, after its hashes have been checked; what a run lost."""
    if (args.file is None) == (args.run is None):
        raise UserError("inspect needs one of FILE and --run RUN_DIR")
    if args.run is None and (args.tsv or args.probe):
        raise UserError("--tsv and --probe compare with the weights of a run: give --run RUN_DIR instead of FILE")
    if args.run is None and args.data:
        raise UserError("--data is for the losses of a run: give --run RUN_DIR instead of FILE")
    payload, blob, files = read_any(args.file or args.run)
    streams = read_streams(blob, str(files[-1]))
    report = bytes_report((args.file or args.run).name, streams, blob, files)
    if payload is not None:
        report["parts"] = size_by_part(payload, len(files) > 1, report["bytes_total"])
        print(f"preset {payload.preset}; hashes match")
        print_sizes(report)
        plain = read_input(args.source, "source").decode()
        cuts = [s for s in cut_sections(payload.source.decode(), plain, str(args.source)) if s.minified]
        rows = section_rows(cuts, report["parts"]["code"])
        report["sections"] = [{k: r[k] for k in ("section", "minified")} | {"bytes": r["compressed"]} for r in rows]
    if args.run is not None:
        if blob != read_input(args.run / "model.bin", "model blob"):
            raise UserError(f"{files[-1]} does not hold {args.run / 'model.bin'}: pack the run again")
        report |= run_report(args.run, byte_shares(streams), args.probe)
        report |= token_losses.measure(args.run, args.data) if args.data else {}
    print_inspection(report)
    if args.tsv:
        lines = [list(report["tensors"][0]), *(row.values() for row in report["tensors"])]
        text = "".join("\t".join("" if cell is None else str(cell) for cell in line) + "\n" for line in lines)
        atomic_write(args.tsv, text.encode())
        print(f"table: {args.tsv}")
    if args.png:
        draw_inspection(report, args.png)
        print(f"picture: {args.png}")
    print("INSPECT " + json.dumps(report))
    return 0


# +---------------------------------------------------------------------------------------------------------------+
# | 7 SAMPLE                                                                                                      |
# +---------------------------------------------------------------------------------------------------------------+


def sample(args: argparse.Namespace) -> int:
    """Subcommand `sample`: print a prompt and what the packed weights make of it, as it is drawn."""
    payload, blob, files = read_any(args.file)
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt is not UTF-8; type it in a terminal that is set to UTF-8") from None
    with tempfile.TemporaryDirectory() as room:
        record, weights = Path(room, "record.env"), Path(room, "model.bin")
        weights.write_bytes(blob)
        # a bare model.bin has its record.env beside it
        record.write_bytes(payload.config if payload else read_input(files[0].with_name("record.env"), "configuration"))
        own = {name: os.environ[name] for name in ("DEVICE", "DATA_PATH") if os.environ.get(name)}
        given = {"DATA_PATH": args.data, "TOKENIZER_PATH": args.tokenizer or os.environ.get("TOKENIZER_PATH")}
        own |= {name: str(path) for name, path in given.items() if path}
        cfg = train_gpt.load_config({"PRESET": room} | own)
        tokenizer = payload.tokenizer if payload and payload.tokenizer else None
        if tokenizer is None:
            path = train_gpt.find_tokenizer(cfg)
            if path is None:
                raise UserError("the tokenizer does not travel in this artifact; give --tokenizer or --data")
            train_gpt.byte_table(path, cfg.vocab_size)  # refuses one of another vocabulary
            tokenizer = path.read_bytes()
        script = sampling.Script(tokenizer, sampling.is_fused(Path(cfg.data_path)))
        choice = sampling.Choice(args.temperature, args.top_p, args.seed)
        for text in sampling.stream(sampling.load_model(weights, cfg), cfg, script, args.prompt, args.tokens, choice):
            print(text, end="", flush=True)
        print()
    return 0


# +---------------------------------------------------------------------------------------------------------------+
# | 8 COMMAND LINE                                                                                                |
# +---------------------------------------------------------------------------------------------------------------+

EPILOG = """An artifact extracts to ${XDG_CACHE_HOME:-~/.cache}/train_gpt/<hash>/<preset>, which may be deleted.
STAGES (default eval) and ARTIFACT_DIR (default logs/<file>_<hash>_eval) may be set; PRESET is the packed one.
Minified source needs the Python version that packed it, or a later one: pack with the oldest that will run it.
exit codes: 0 done, 1 over the cap or not equal to the run, 2 wrong input"""


def add_pack_options(sub: argparse.ArgumentParser, source: Path) -> None:
    """Options of `pack`."""
    sub.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder with model.bin, record.env, result.json")
    sub.add_argument("--source", type=Path, default=source, help="program to pack (default: train_gpt.py beside this)")
    sub.add_argument("--out", type=Path, help="file, or folder when split (RUN_DIR/artifact.pyz, RUN_DIR/submission)")
    text = "one self-extracting file, or the contest's two files (default single)"
    sub.add_argument("--format", choices=("single", "split"), default="single", help=text)
    text = "leave it with the data, as the contest does, or let it travel (default uncounted)"
    sub.add_argument("--tokenizer", choices=("uncounted", "embed"), default="uncounted", help=text)
    sub.add_argument("--tokenizer-path", type=Path, help="default: TOKENIZER_PATH, else the one *.model in DATA_PATH")
    sub.add_argument("--cap", type=int, default=CAP_BYTES, help="decimal bytes allowed (default 16000000)")


def add_verify_options(sub: argparse.ArgumentParser, source: Path) -> None:
    """Options of `verify`."""
    sub.add_argument("file", type=Path, metavar="FILE", help="packed file, or the folder of the split form")
    sub.add_argument("--run", type=Path, metavar="RUN_DIR", help="run to compare with (without: only print the score)")
    sub.add_argument("--data", type=Path, metavar="DATA_PATH", help="validation shards (default: DATA_PATH)")
    sub.add_argument("--tokenizer", type=Path, metavar="PATH", help="default: TOKENIZER_PATH, else the one in the data")
    sub.add_argument("--source", type=Path, default=source, help="plain program of the run (default: beside this file)")
    text = "processes, as many as the run's evaluation had (1 to 8, default 1)"
    sub.add_argument("--nproc", type=int, choices=range(1, 9), default=1, metavar="N", help=text)


def add_inspect_options(sub: argparse.ArgumentParser, source: Path) -> None:
    """Options of `inspect`."""
    text = "the packed file, the folder of the split form, a run folder, or a bare model.bin"
    sub.add_argument("file", type=Path, nargs="?", metavar="FILE", help=text)
    text = "instead of FILE: a run, whose stored weights are compared with its model.pt and hessians.pt"
    sub.add_argument("--run", type=Path, metavar="RUN_DIR", help=text)
    sub.add_argument("--probe", action="store_true", help="what AWQ-lite and a clip search would cost and gain")
    text = (
        "of the run: loss by position, document length and class of token; scores the artifact where that is not done"
    )
    sub.add_argument("--data", type=Path, metavar="DATA_PATH", help=text)
    sub.add_argument("--source", type=Path, default=source, help="program whose banners name the sections of the code")
    sub.add_argument("--tsv", type=Path, metavar="TABLE", help="write the table of tensors too")
    sub.add_argument("--png", type=Path, metavar="PICTURE", help="draw the tables too")


def add_sample_options(sub: argparse.ArgumentParser, source: Path) -> None:
    """Options of `sample`."""
    text = "the packed file, the folder of the split form, a run folder, or a model.bin beside its record.env"
    sub.add_argument("file", type=Path, metavar="FILE", help=text)
    sub.add_argument("--prompt", default="", help="how the document begins (default: nothing)")
    sub.add_argument("--tokens", type=number(int, 1, 1e6), default=200, help="at most so many (default 200)")
    text = "0: always the likeliest token (default 0.8)"
    sub.add_argument("--temperature", type=number(float, 0, 100), default=0.8, help=text)
    text = "draw from the likeliest tokens that together have this probability (default 0.95)"
    sub.add_argument("--top-p", type=number(float, 0, 1), default=0.95, help=text)
    sub.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=1, help="of the draws (default 1)")
    sub.add_argument("--tokenizer", type=Path, metavar="PATH", help="default: TOKENIZER_PATH, else the one in the data")
    sub.add_argument("--data", type=Path, metavar="DATA_PATH", help="shards of the run (default: DATA_PATH)")


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """A reader of an option's number within bounds."""

    def read(text: str) -> float:
        """The number, or an error that argparse prints."""
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} must be a number from {low:g} to {high:g}")
        return value

    return read


def command_line() -> argparse.ArgumentParser:
    """All subcommands and options."""
    look = {"epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__.partition("\nThe one-file form")[0], **look)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{pack,verify,inspect,sample}")
    source = Path(__file__).resolve().with_name("train_gpt.py")
    rows = (
        (pack, add_pack_options, "write the artifact of a run, and its true size into the run's result.json"),
        (verify, add_verify_options, "run the artifact alone in an empty directory; compare with the run"),
        (inspect, add_inspect_options, "check every byte of an artifact and print where its bytes are"),
        (sample, add_sample_options, "write text with an artifact's weights"),
    )
    for call, add_options, text in rows:
        sub = commands.add_parser(call.__name__, help=text, description=text, **look)
        sub.set_defaults(call=call)
        add_options(sub, source)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = command_line().parse_args(argv)
    try:
        return args.call(args)
    except KeyboardInterrupt:
        print("error: interrupted; every file is either as it was or written whole", file=sys.stderr)
        return 130
    except (UserError, OSError, UnicodeError) as error:
        text = str(error).replace("\n", "; ")
        print(f"error: {text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # a terminal that lacks a letter gets an escape in its place
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
