"""Pack a finished run into the artifact that is submitted, and prove that the artifact scores what the run scored.

    python pack_artifact.py pack logs/demo_seed1337                     one self-extracting file, RUN_DIR/artifact.pyz
    python pack_artifact.py pack logs/demo_seed1337 --format split      train_gpt.py (text, base85) + model.bin
    python pack_artifact.py verify logs/demo_seed1337/artifact.pyz --run logs/demo_seed1337 --data data/sample
    python pack_artifact.py pack logs/demo_seed1337 --specialise        the same without what this run cannot reach
    python pack_artifact.py inspect logs/demo_seed1337/artifact.pyz     where its bytes are, without running it

The one-file form runs by `python FILE` and by `torchrun FILE`. Its layout, from the first byte to the last:

    magic line    a source encoding that does not exist. Python runs a file that ends in a zip directory as a program;
                  a truncated file has lost the directory, is read as text, and stops at this line, which says why.
    container     sha256 of all that follows | codec (1 byte) | sizes of code, tokenizer, weights (u32 LE)
                  | code = compressed (preset name, record.env, minified train_gpt.py, parted by NUL)
                  | tokenizer (compressed; empty when it does not travel) | weights, as they are in model.bin
    zip tail      one deflated member, __main__.py: the bootstrap below

The bootstrap checks the hash, writes the parts as real files (Triton refuses kernels whose source is not in a file) to
a folder of the user's cache that is named by the hash, each by rename so that eight ranks may do so at once, and
replaces its own process by `python train_gpt.py` with STAGES=eval unless the environment says otherwise.

pack --specialise also drops what the run's configuration cannot reach: entries of registries that nothing selects,
branches that its knobs decide, definitions that nothing then uses, and the manual of the knobs. Numbers stay knobs; a
knob that a decision rests on accepts its one value only. Nothing is written unless the specialised program has been
run beside the plain one with equal weights, equal scores and (without --eval-only) an equal whole toy training.

Sections: 1 minify, 2 specialise, 3 sections of the source, 4 codecs, 5 container, 6 bootstrap, 7 pack, 8 verify,
9 inspect, 10 proof of a specialised program, 11 command line.
"""

from __future__ import annotations

import argparse
import ast
import base64
import fnmatch
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import brotli
import numpy as np
import python_minifier
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

CAP_BYTES = 16_000_000
MAGIC = b"#coding:error-artifact-truncated\n"
HEADER = struct.Struct("<32sB3I")
BROTLI_CODEC = 255
SPLIT_SOURCE, SPLIT_MODEL = "train_gpt.py", "model.bin"


class UserError(ValueError):
    """A wrong input: printed as one line `error: ...`, exit code 2."""


# +---------------------------------------------------------------------------------------------------------------+
# | 1 MINIFY                                                                                                      |
# +---------------------------------------------------------------------------------------------------------------+

# A decorator outside this list may read the annotations: triton.jit (tl.constexpr), torch.library.custom_op (schema),
# functools.singledispatch. Their functions keep them.
BLIND_DECORATORS = frozenset(
    "staticmethod classmethod property cached_property cache lru_cache contextmanager abstractmethod wraps "
    "no_grad inference_mode disable compile once_differentiable custom_fwd custom_bwd".split()
)
# Calls of these names take functions whose annotations matter, without decorating them.
READING_CALLS = ("jit", "custom_op", "triton_op", "get_type_hints", "signature", "singledispatch", "script")


def decorator_name(node: ast.expr) -> str:
    """Last name of a decorator or callee: `torch.no_grad()` -> `no_grad`."""
    while isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


class AnnotationStripper(ast.NodeTransformer):
    """Drops annotations of functions that nobody reads at run time; class bodies (dataclass fields) keep theirs."""

    def __init__(self, keep: frozenset[str]) -> None:
        self.keep = keep
        self.in_function = False

    def strip(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        """Clear one signature and go on into the body; a function that is read is left whole."""
        if node.name in self.keep or any(decorator_name(d) not in BLIND_DECORATORS for d in node.decorator_list):
            return node
        arguments = node.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            argument.annotation = None
        for argument in (arguments.vararg, arguments.kwarg):
            if argument is not None:
                argument.annotation = None
        node.returns = None
        outer, self.in_function = self.in_function, True
        self.generic_visit(node)
        self.in_function = outer
        return node

    visit_FunctionDef = strip
    visit_AsyncFunctionDef = strip

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Methods are stripped, fields are not."""
        outer, self.in_function = self.in_function, False
        self.generic_visit(node)
        self.in_function = outer
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """`x: int = 1` inside a function becomes `x = 1`; a bare declaration (it makes the name local) stays."""
        self.generic_visit(node)
        if not self.in_function or node.value is None:
            return node
        return ast.copy_location(ast.Assign(targets=[node.target], value=node.value), node)


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
        if isinstance(node, ast.Call) and any(word in decorator_name(node.func) for word in READING_CALLS):
            names.update(a.id for a in ast.walk(node) if isinstance(a, ast.Name))
    return frozenset(names)


def constexpr_names(tree: ast.Module) -> list[str]:
    """Arguments of Triton kernels that are compile-time constants: the minifier's shorter alias would not be one."""
    arguments = (node for node in ast.walk(tree) if isinstance(node, ast.arg) and node.annotation is not None)
    return sorted({a.arg for a in arguments if ast.unparse(a.annotation).endswith("constexpr")})


def pin_docstring(tree: ast.Module) -> ast.Module:
    """Turn a module docstring that the program itself reads (`__doc__`, for --help) into an assignment, which stays."""
    read = any(isinstance(node, ast.Name) and node.id == "__doc__" for node in ast.walk(tree))
    if read and ast.get_docstring(tree, clean=False) is not None:
        future = [i for i, n in enumerate(tree.body) if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
        docstring = tree.body[0].value
        after = max(future, default=0) + 1
        tree.body.insert(after, ast.Assign(targets=[ast.Name("__doc__", ast.Store())], value=docstring))
    return tree


def minify(text: str, name: str = "source", facts: Facts | None = None, dropped: Dropped | None = None) -> str:
    """Smaller source of the same behaviour; with facts, of the same behaviour where they hold (see specialise).

    Argument names, global names, class annotations and asserts stay. Literals are not hoisted to globals, because a
    Triton kernel may not read a global that is not a constexpr. Raises UserError when `text` does not parse.
    """
    tree = pin_docstring(parse_source(text, name))
    folder = Folder(tree, facts, dropped) if facts and dropped else None  # looks at annotations
    tree = ast.fix_missing_locations(AnnotationStripper(functions_with_readers(tree)).visit(tree))
    tree = specialise(tree, facts, dropped, folder) if folder else tree
    small = shrunk(python_minifier.unparse(tree), tuple(constexpr_names(tree)))
    parse_source(small, f"minified {name}")
    return small


@functools.cache
def shrunk(text: str, kept_locals: tuple[str, ...]) -> str:
    """What python_minifier makes of a source. Ten seconds for this program, hence remembered."""
    return python_minifier.minify(
        text,
        remove_annotations=False,
        remove_literal_statements=True,
        hoist_literals=False,
        rename_locals=True,
        preserve_locals=list(kept_locals),
        rename_globals=False,
        remove_asserts=False,
    )


# +---------------------------------------------------------------------------------------------------------------+
# | 2 SPECIALISE                                                                                                  |
# +---------------------------------------------------------------------------------------------------------------+

# What a packed program is called by from outside: its start, and what `verify` and the judge ask it for.
ROOTS = ("main", "load_artifact", "load_config")
SIMPLE_BASES = frozenset(("NamedTuple", "Protocol", "object"))  # they call no method of their subclasses by name
UNKNOWN = object()
WORD = re.compile(r"\w+")
HELP = "This program was specialised when it was packed; the plain train_gpt.py has the manual of its knobs."
EVAL_ONLY = "this artifact evaluates only; train with the plain train_gpt.py"


@dataclass(frozen=True)
class Facts:
    """What is known of a packed run: the value of every knob, the knobs that stay free because they say where a run
    happens, the allowed values of each, the words in the names of the stored arrays, and whether training goes too."""

    values: dict[str, object]
    free: frozenset[str]
    choices: dict[str, tuple[str, ...]]
    words: frozenset[str]
    eval_only: bool = False


@dataclass
class Dropped:
    """What specialisation took out, by kind; entries as (registry, key), and all keys that a registry had."""

    entries: list[tuple[str, str]] = field(default_factory=list)
    keys: dict[str, set[str]] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)
    definitions: list[str] = field(default_factory=list)
    frozen: set[str] = field(default_factory=set)

    def counts(self) -> dict[str, int]:
        """How much of each."""
        return {
            "registry entries": len(self.entries),
            "dead branches": len(self.branches),
            "definitions": len(self.definitions),
        }


def knob_of(node: ast.expr) -> str:
    """`cfg.name` or `self.cfg.name` -> name, else ''. In this program only a Config is ever called cfg."""
    if not isinstance(node, ast.Attribute):
        return ""
    owner = node.value
    is_cfg = isinstance(owner, ast.Name) and owner.id == "cfg"
    return node.attr if is_cfg or (isinstance(owner, ast.Attribute) and owner.attr == "cfg") else ""


class Folder(ast.NodeTransformer):
    """Decides tests whose outcome the knobs fix. Numbers stay open (a toy run may still be smaller), and so does every
    knob that the program itself replaces, because there are then two Configs."""

    OPERATORS: dict[type, Callable[[object, object], bool]] = {
        ast.Eq: lambda a, b: a == b,
        ast.NotEq: lambda a, b: a != b,
        ast.In: lambda a, b: a in b,
        ast.NotIn: lambda a, b: a not in b,
    }

    def __init__(self, tree: ast.Module, facts: Facts, dropped: Dropped) -> None:
        for arg in (n for n in ast.walk(tree) if isinstance(n, ast.arg) and n.arg == "cfg"):
            if arg.annotation is not None and ast.unparse(arg.annotation) != "Config":
                raise UserError(f"line {arg.lineno}: a parameter called cfg that is no Config; cannot specialise this")
        calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and decorator_name(n.func) == "replace")
        open_knobs = facts.free | {keyword.arg for call in calls for keyword in call.keywords}
        kinds = (bool, str, tuple)
        self.values = {k: v for k, v in facts.values.items() if isinstance(v, kinds) and k not in open_knobs}
        self.dropped, self.used = dropped, set()

    def known(self, node: ast.expr) -> object:
        """The value of an expression, or UNKNOWN."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Tuple):
            parts = tuple(self.known(e) for e in node.elts)
            return UNKNOWN if UNKNOWN in parts else parts
        if name := knob_of(node):
            self.used |= {name} & self.values.keys()
            return self.values.get(name, UNKNOWN)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            value = self.known(node.operand)
            return value if value is UNKNOWN else not value
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in self.OPERATORS:
            sides = self.known(node.left), self.known(node.comparators[0])
            return UNKNOWN if UNKNOWN in sides else self.OPERATORS[type(node.ops[0])](*sides)
        return self.any_or_all(node) if isinstance(node, ast.BoolOp) else UNKNOWN

    def any_or_all(self, node: ast.BoolOp) -> object:
        """Truth of `and` and `or`: one operand may decide, whatever the others are."""
        decides, values = isinstance(node.op, ast.Or), [self.known(v) for v in node.values]
        if any(v is not UNKNOWN and bool(v) == decides for v in values):
            return decides
        return UNKNOWN if UNKNOWN in values else not decides

    def decide(self, test: ast.expr) -> object:
        """`known`, noting which knobs a decision rests on: their values are frozen."""
        self.used = set()
        value = self.known(test)
        if value is not UNKNOWN and self.used:
            self.dropped.frozen |= self.used
            self.dropped.branches.append(f"line {test.lineno}: {ast.unparse(test)[:80]}")
            return bool(value)
        return UNKNOWN

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        """The branch that is taken, in place of both."""
        self.generic_visit(node)
        value = self.decide(node.test)
        return node if value is UNKNOWN else (node.body if value else node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        """The value that is chosen."""
        self.generic_visit(node)
        value = self.decide(node.test)
        return node if value is UNKNOWN else (node.body if value else node.orelse)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """A function needs a statement, and nothing follows a return."""
        self.generic_visit(node)
        ends = [i for i, line in enumerate(node.body) if isinstance(line, ast.Return | ast.Raise)]
        node.body = node.body[: ends[0] + 1] if ends else node.body or [ast.Pass()]
        return node


def registries(tree: ast.Module) -> dict[str, ast.Dict]:
    """Top-level literal dicts whose keys are strings, by name."""
    found = {}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Dict) and value.keys:
            if all(isinstance(k, ast.Constant) and isinstance(k.value, str) for k in value.keys):
                found[target.id] = value
    return found


def axis_of(uses: list[ast.expr], table: ast.Dict, facts: Facts) -> str:
    """The knob that chooses from a registry: it is among what indexes it, and its values cover the keys; else ''."""
    keys = {k.value for k in table.keys}
    fits = [f for f, c in facts.choices.items() if f not in facts.free and keys & {*c} and keys <= {"none", *c}]
    named = {n.attr for n in uses if isinstance(n, ast.Attribute)}
    return next((f for f in sorted(fits) if f in named), "")


def literal_words(nodes: Iterable[ast.AST]) -> Counter[str]:
    """How often each string constant occurs below `nodes`, whole and word by word."""
    constants = (n.value for node in nodes for n in ast.walk(node) if isinstance(n, ast.Constant))
    return Counter(w for text in constants if isinstance(text, str) for w in {text, *WORD.findall(text)})


def config_class(tree: ast.Module) -> ast.ClassDef:
    """The class of the knobs; UserError when the program has none."""
    found = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"]
    calls = [n for n in ast.walk(found[0]) if isinstance(n, ast.Call) and decorator_name(n) == "knob"] if found else []
    if not calls:
        raise UserError("--specialise needs a program with a class Config of knob(...) fields")
    return found[0]


def prune_registries(tree: ast.Module, facts: Facts, dropped: Dropped) -> bool:
    """Drop entries that nothing can name: of an axis, all but the chosen; of a table that is only indexed, those whose
    key is no word of the configuration, of the artifact or of the rest of the program. True when one went."""
    tables = registries(tree)
    chosen = {w for v in facts.values.values() for w in (v if isinstance(v, tuple) else (v,)) if isinstance(w, str)}
    chosen |= {w for name in facts.free for w in facts.choices.get(name, ())} | facts.words
    config = config_class(tree)
    body, before = [n for n in tree.body if n is not config], len(dropped.entries)
    nodes, words = list(ast.walk(tree)), literal_words(body)
    subscripts = [n for n in nodes if isinstance(n, ast.Subscript) and isinstance(n.value, ast.Name)]
    iterated = [n.iter for n in nodes if isinstance(n, ast.comprehension)]
    for name, table in tables.items():
        dropped.keys.setdefault(name, {k.value for k in table.keys})
        indices = [n.slice for n in subscripts if n.value.id == name]
        literal = {n.value for n in indices if isinstance(n, ast.Constant)}
        axis = axis_of([*indices, *iterated], table, facts)
        live = None
        if axis:
            value = facts.values[axis]
            live = {*(value if isinstance(value, tuple) else (value,))} | literal | facts.words
            live |= set() if value else {"none"}
        elif sum(isinstance(n, ast.Name) and n.id == name for n in nodes) == 1 + len(indices):  # used by index alone
            live = chosen | literal | (words - literal_words(table.keys)).keys()
        if live is not None:
            kept = [(k, v) for k, v in zip(table.keys, table.values, strict=True) if k.value in live]
            dropped.entries += [(name, k.value) for k in table.keys if k.value not in live]
            table.keys, table.values = [k for k, _ in kept], [v for _, v in kept]
    return len(dropped.entries) > before


def defined_names(node: ast.stmt) -> set[str]:
    """Names that a top-level statement binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    imports = (n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom))
    return stored | {a.asname or a.name.split(".")[0] for n in imports for a in n.names}


def used_names(node: ast.AST) -> set[str]:
    """Names that a piece of code reads, and attributes (as `.name`) and strings that could be a method's name."""
    found = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Name):
            found.add(n.id)
        elif isinstance(n, ast.Attribute):
            found.add(f".{n.attr}")
        elif isinstance(n, ast.Constant) and isinstance(n.value, str):
            found |= {f".{w}" for w in WORD.findall(n.value)}
    return found


def method_may_go(owner: ast.ClassDef, node: ast.stmt) -> bool:
    """Whether a statement of a class is a method that only a call by name could reach."""
    simple = all(decorator_name(base) in SIMPLE_BASES for base in owner.bases)
    return simple and isinstance(node, ast.FunctionDef) and not node.name.startswith("__")


def sweep(tree: ast.Module, dropped: Dropped) -> bool:
    """Drop what no root reaches: definitions, constants, imports, methods. True when something went.

    By name alone, so it errs on the side of keeping: a local variable keeps a function of its name, an attribute of any
    object keeps every method of that name.
    """
    pieces = [
        (set(), d, used_names(n)) for n in tree.body if not isinstance(n, ast.ClassDef) and (d := defined_names(n))
    ]  # (what is needed, one of these, uses)
    for owner in (n for n in tree.body if isinstance(n, ast.ClassDef)):
        own = [n for n in owner.body if not method_may_go(owner, n)]
        head = [*owner.bases, *owner.decorator_list, *(k.value for k in owner.keywords), *own]
        pieces.append((set(), {owner.name}, set().union(*map(used_names, head))))
        pieces += [({owner.name}, {f".{n.name}"}, used_names(n)) for n in owner.body if method_may_go(owner, n)]
    live = set(ROOTS).union(*(used_names(n) for n in tree.body if not defined_names(n)))
    grew = True
    while grew:
        reached = [uses for needed, names, uses in pieces if names & live and needed <= live]
        grew = not set().union(*reached) <= live
        live = live.union(*reached)
    count = len(dropped.definitions)
    tree.body = [n for n in tree.body if keep(n, live, dropped)]
    return len(dropped.definitions) > count


def keep(node: ast.stmt, live: set[str], dropped: Dropped) -> bool:
    """Whether a top-level statement stays; unreached aliases of imports and methods are taken out of it."""
    if isinstance(node, ast.ClassDef):
        dead = [n for n in node.body if method_may_go(node, n) and f".{n.name}" not in live]
        node.body = [n for n in node.body if n not in dead] or [ast.Pass()]
        dropped.definitions += [f"{node.name}.{n.name}" for n in dead] if node.name in live else []
    if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module != "__future__"):
        gone = [a for a in node.names if (a.asname or a.name.split(".")[0]) not in live]
        node.names = [a for a in node.names if a not in gone]
        dropped.definitions += [f"import {a.name}" for a in gone]
        return bool(node.names)
    names = defined_names(node)
    if not names or names & live or isinstance(node, ast.ImportFrom):
        return True
    dropped.definitions.append(", ".join(sorted(names)))
    return False


def bare_knobs(tree: ast.Module, facts: Facts, dropped: Dropped) -> None:
    """Take the manual out of the knobs, and let each accept only values that the program still knows how to serve."""
    for node in config_class(tree).body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)):
            continue
        call, name = node.value, node.target.id
        call.args = [*call.args[:1], *(ast.Constant("") for _ in call.args[1:])]
        options = {k.arg: k.value for k in call.keywords if k.arg != "when"}
        value, allowed = facts.values[name], facts.choices.get(name, ())
        if name in dropped.frozen and isinstance(value, bool):
            options |= {"ge": ast.Constant(int(value)), "le": ast.Constant(int(value))}
        elif name in dropped.frozen:
            allowed = (value or ("none",)) if isinstance(value, tuple) else (value,)
        elif name not in facts.free:
            known = {"none", *allowed}
            tables = {t for t, keys in dropped.keys.items() if keys <= known or known - {"none"} <= keys}
            gone = {key for table, key in dropped.entries if table in tables}
            allowed = tuple(c for c in allowed if c not in gone)
        if allowed:
            options["choices"] = ast.Tuple([ast.Constant(c) for c in allowed], ast.Load())
        call.keywords = [ast.keyword(k, v) for k, v in options.items()]


def stub(tree: ast.Module, name: str, statement: str, owner: str = "") -> None:
    """Replace the body of a function (or method) by one statement; a program without it stays as it is."""
    places = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner] if owner else [tree]
    for node in (n for place in places for n in place.body if isinstance(n, ast.FunctionDef) and n.name == name):
        node.body = ast.parse(statement).body


def specialise(tree: ast.Module, facts: Facts, dropped: Dropped, folder: Folder) -> ast.Module:
    """The program that does for these knobs what the whole one does: see the module docstring."""
    config_class(tree)
    stub(tree, "help_text", f"return {HELP!r}")
    for node in tree.body:  # names of other programs, each with what to say here: a help to those who type knobs
        if isinstance(node, ast.Assign) and defined_names(node) == {"RENAMED"}:
            node.value = ast.Dict([], [])
    if facts.eval_only:
        for stage in ("train", "quantize"):
            stub(tree, stage, f"raise UserError({EVAL_ONLY!r})", owner="Run")
    tree = folder.visit(tree)
    for node in ast.walk(tree):
        if getattr(node, "body", None) == []:  # a block whose only statement was a branch that is not taken
            node.body = [ast.Pass()]
    changed = True
    while changed:
        changed = sweep(tree, dropped)
        changed |= prune_registries(tree, facts, dropped)
    bare_knobs(tree, facts, dropped)
    sweep(tree, dropped)
    return ast.fix_missing_locations(tree)


# +---------------------------------------------------------------------------------------------------------------+
# | 3 SECTIONS OF THE SOURCE                                                                                      |
# +---------------------------------------------------------------------------------------------------------------+

BANNER = re.compile(r"^# \+-+\+\n# \| *(?P<title>[^\n]*?) *\|\n# \+-+\+$", re.MULTILINE)
MARKER = re.compile(r"^__section__\((\d+)\);?\n?", re.MULTILINE)


@dataclass(frozen=True)
class Section:
    """One boxed section: its title, its text in the source, its text after minification."""

    title: str
    raw: str
    minified: str


def banner_starts(text: str, tree: ast.Module) -> list[re.Match[str]]:
    """Banners that stand between top-level statements (one inside a string or a class is not a section)."""
    inside = {line for node in tree.body for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return [m for m in BANNER.finditer(text) if text.count("\n", 0, m.start()) + 1 not in inside]


def minify_sections(
    text: str, name: str = "source", facts: Facts | None = None, dropped: Dropped | None = None
) -> list[Section]:
    """Minify the whole source once and cut the result at its banners; joined, the parts are the minified source.

    A marker statement at each banner survives minification and is cut out afterwards, so the bytes of a section are
    what the section really costs and not an estimate.
    """
    banners = banner_starts(text, parse_source(text, name))
    titles = ["(before the first banner)", *(m["title"] for m in banners)]
    edges = [0, *(m.start() for m in banners), len(text)]
    raws = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    marked = raws[0] + "".join(f"__section__({i})\n{raw}" for i, raw in enumerate(raws[1:], 1))
    pieces = MARKER.split(minify(marked, name, facts, dropped))
    found = dict(zip(map(int, pieces[1::2]), pieces[2::2], strict=True)) | {0: pieces[0]}
    assert sorted(found) == list(range(len(raws))), "a section marker was lost in minification"
    return [Section(t, raw, found[i]) for i, (t, raw) in enumerate(zip(titles, raws, strict=True))]


# +---------------------------------------------------------------------------------------------------------------+
# | 4 CODECS                                                                                                      |
# +---------------------------------------------------------------------------------------------------------------+

# A codec is one byte: 255 is brotli, anything below is the property byte of a raw LZMA1 stream, (pb*5 + lp)*9 + lc.
LZMA_CODECS = tuple((pb * 5 + lp) * 9 + lc for pb in (0, 1, 2) for lp in (0, 1) for lc in range(5 - lp))
ALL_CODECS = (BROTLI_CODEC, *LZMA_CODECS)


def lzma_filters(codec: int) -> list[dict[str, int]]:
    """Filter chain of a raw LZMA1 stream from its property byte."""
    return [{"id": lzma.FILTER_LZMA1, "lc": codec % 9, "lp": codec // 9 % 5, "pb": codec // 45, "dict_size": 1 << 20}]


def compress(data: bytes, codec: int) -> bytes:
    """Compress with one codec, as hard as it can."""
    if codec == BROTLI_CODEC:
        modes = (brotli.MODE_TEXT, brotli.MODE_GENERIC)
        return min((brotli.compress(data, mode=mode, quality=11, lgwin=24) for mode in modes), key=len)
    search = {"mode": lzma.MODE_NORMAL, "mf": lzma.MF_BT4, "nice_len": 273, "depth": 1000}
    return lzma.compress(data, lzma.FORMAT_RAW, filters=[lzma_filters(codec)[0] | search])


def decompress(data: bytes, codec: int) -> bytes:
    """Inverse of `compress`."""
    if codec == BROTLI_CODEC:
        return brotli.decompress(data)
    return lzma.decompress(data, lzma.FORMAT_RAW, filters=lzma_filters(codec))


# +---------------------------------------------------------------------------------------------------------------+
# | 5 CONTAINER                                                                                                   |
# +---------------------------------------------------------------------------------------------------------------+


@dataclass(frozen=True)
class Parts:
    """What travels. `preset` names the folder the parts are extracted to; the source is the minified one."""

    preset: str
    config: bytes
    source: bytes
    tokenizer: bytes
    weights: bytes

    def text(self) -> bytes:
        """The part that is compressed as code. None of the three may hold a NUL."""
        return b"\0".join((self.preset.encode(), self.config, self.source))


def encode_container(parts: Parts, codec: int) -> bytes:
    """Parts -> bytes of the container (layout in the module docstring)."""
    if b"\0" in parts.config + parts.source or "\0" in parts.preset:
        raise UserError("a NUL byte in the source, the configuration or the preset name: remove it")
    code = compress(parts.text(), codec)
    tokenizer = compress(parts.tokenizer, codec) if parts.tokenizer else b""
    header = HEADER.pack(bytes(32), codec, len(code), len(tokenizer), len(parts.weights))
    body = header[32:] + code + tokenizer + parts.weights
    return hashlib.sha256(body).digest() + body


def container_size(blob: bytes, name: str) -> int:
    """Length that the header announces; UserError when `blob` is shorter."""
    announced = HEADER.size + sum(HEADER.unpack_from(blob)[2:]) if len(blob) >= HEADER.size else HEADER.size
    if len(blob) < announced:
        raise UserError(f"{name} is truncated: {len(blob)} of {announced} container bytes; copy it again")
    return announced


def decode_container(blob: bytes, name: str = "artifact") -> Parts:
    """Bytes (trailing ones are ignored) -> parts. UserError when truncated or corrupted."""
    digest, codec, n_code, n_tokenizer, n_weights = HEADER.unpack_from(blob[: container_size(blob, name)])
    edges = [HEADER.size, HEADER.size + n_code, HEADER.size + n_code + n_tokenizer]
    end = edges[2] + n_weights
    if hashlib.sha256(blob[32:end]).digest() != digest:
        raise UserError(f"{name} is corrupted: its sha256 does not match; copy it again")
    preset, config, source = decompress(blob[edges[0] : edges[1]], codec).split(b"\0", 2)
    tokenizer = decompress(blob[edges[1] : edges[2]], codec) if n_tokenizer else b""
    return Parts(preset.decode(), config, source, tokenizer, blob[edges[2] : end])


# +---------------------------------------------------------------------------------------------------------------+
# | 6 BOOTSTRAP                                                                                                   |
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
    @IMPORT@
    blob = @READ@
    code, tokenizer, weights = (int.from_bytes(blob[at:at + 4], "little") for at in (33, 37, 41))
    code += @HEADER@
    tokenizer += code
    weights += tokenizer
    if hashlib.sha256(blob[32:weights]).digest() != blob[:32]:
        raise ValueError("truncated or corrupted: sha256 mismatch, copy it again")
    preset, config, source = decompress(blob[@HEADER@:code]@FILTERS@).split(b"\\0", 2)
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
        env.setdefault("ARTIFACT_DIR", "logs/" + os.path.splitext(os.path.basename(me))[0] + "_eval")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:-len(sys.argv)], script, *sys.argv[1:]], env)
except (ImportError, OSError, ValueError) as error:
    print("error:", me, error, file=sys.stderr)
    sys.exit(2)
"""
READ_SINGLE = f'open(me, "rb").read()[{len(MAGIC)}:]'
READ_SPLIT = (
    'base64.b85decode(open(me, "rb").read().split(b"\\n#")[-1].strip())[4:]'
    f' + open(os.path.join(os.path.dirname(me), "{SPLIT_MODEL}"), "rb").read()'
)


def bootstrap_source(codec: int, split: bool, tokenizer: bool) -> bytes:
    """The bootstrap for one form of artifact, minified."""
    filters = repr(lzma_filters(codec)).replace(" ", "") if codec != BROTLI_CODEC else ""
    values = {
        "SELF": "__file__" if split else "os.path.dirname(__file__)",
        "IMPORT": ("from lzma import FORMAT_RAW, decompress" if filters else "from brotli import decompress")
        + ("; import base64" if split else ""),
        "READ": READ_SPLIT if split else READ_SINGLE,
        "HEADER": str(HEADER.size),
        "FILTERS": f", FORMAT_RAW, None, {filters}" if filters else "",
        "TOKENIZER": 'env["TOKENIZER_PATH"] = put("tokenizer.model", decompress(blob[code:tokenizer]@FILTERS@))'
        if tokenizer
        else "",
    }
    values["TOKENIZER"] = values["TOKENIZER"].replace("@FILTERS@", values["FILTERS"])
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


def single_file(container: bytes, bootstrap: bytes) -> bytes:
    """Magic line + container + zip tail."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = deflate.compress(bootstrap) + deflate.flush()
    return MAGIC + container + zip_tail(bootstrap, packed, len(MAGIC) + len(container))


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


def build(parts: Parts, codec: int, split: bool) -> dict[str, bytes]:
    """All files of an artifact with one codec, by name; the one-file form has the empty name."""
    bootstrap = bootstrap_source(codec, split, bool(parts.tokenizer))
    container = encode_container(parts, codec)
    return split_files(container, bootstrap, len(parts.weights)) if split else {"": single_file(container, bootstrap)}


def smallest(parts: Parts, split: bool) -> tuple[int, dict[str, bytes]]:
    """Try all codecs and keep the smallest whole result, bootstrap counted; ties go to the first codec."""
    light = Parts(parts.preset, parts.config, parts.source, parts.tokenizer, b"")
    codec = min(ALL_CODECS, key=lambda c: sum(map(len, build(light, c, split).values())))
    return codec, build(parts, codec, split)


def read_container(path: Path) -> bytes:
    """The container of a packed file of either form, after every byte around it has been checked."""
    text = artifact_files(path)[0]
    data = text.read_bytes()
    if data.startswith(MAGIC):
        blob = data[len(MAGIC) :]
        end = len(MAGIC) + container_size(blob, str(text))
        decode_container(blob, str(text))
        check_tail(data, end, str(text))
        return blob[: end - len(MAGIC)]
    code, _, tail = data.rpartition(b"\n#")
    try:
        head = base64.b85decode(tail.strip())
    except ValueError as error:
        raise UserError(f"{text} is not a packed artifact (or its payload is damaged): pack one first") from error
    if len(head) < 4 + HEADER.size or b"b85decode" not in code:
        raise UserError(f"{text} is not a packed artifact: make one with `pack_artifact.py pack RUN_DIR`")
    if head[:4] != struct.pack("<I", zlib.crc32(code)) or base64.b85encode(head) + b"\n" != tail:
        raise UserError(f"{text} is corrupted: its code does not match its checksum; copy it again")
    blob = head[4:] + artifact_files(path)[1].read_bytes()
    if len(blob) != container_size(blob, str(text)):
        raise UserError(f"{text} is corrupted: {artifact_files(path)[1].name} is longer than it was; copy it again")
    return blob


def read_artifact(path: Path) -> Parts:
    """Read a packed file of either form without running it. UserError when it is foreign, truncated or corrupted."""
    return decode_container(read_container(path), str(artifact_files(path)[0]))


def artifact_files(path: Path) -> list[Path]:
    """Files that make up an artifact: itself, or the two of the split form (named by folder or by train_gpt.py)."""
    if path.is_dir():
        path = path / SPLIT_SOURCE
    if not path.is_file():
        raise UserError(f"no file {path}")
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
# | 7 PACK                                                                                                        |
# +---------------------------------------------------------------------------------------------------------------+


def read_input(path: Path, what: str) -> bytes:
    """Bytes of a file that must exist (UserError naming what it is)."""
    if not path.is_file():
        raise UserError(f"no {what}: {path} does not exist (has the run finished all stages?)")
    return path.read_bytes()


def read_result(run_dir: Path) -> dict[str, object]:
    """result.json of a run; UserError when it is missing or broken."""
    text = read_input(run_dir / "result.json", "result")
    try:
        result = json.loads(text)
    except ValueError as error:
        raise UserError(f"{run_dir / 'result.json'} is not JSON: {error}") from error
    if not isinstance(result, dict):
        raise UserError(f"{run_dir / 'result.json'} holds {type(result).__name__}, not an object")
    return result


def find_tokenizer(given: Path | None) -> Path | None:
    """--tokenizer-path, else TOKENIZER_PATH, else the single *.model of DATA_PATH, else None."""
    if given is not None or os.environ.get("TOKENIZER_PATH"):
        path = given or Path(os.environ["TOKENIZER_PATH"])
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}")
        return path
    models = sorted(Path(os.environ["DATA_PATH"]).glob("*.model")) if os.environ.get("DATA_PATH") else []
    return models[0] if len(models) == 1 else None


def replace_file(path: Path, data: bytes) -> None:
    """Write beside the final name, then rename: the final name is never half a file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(data)
        os.fchmod(file.fileno(), 0o644)
    os.replace(file.name, path)


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


def size_by_part(parts: Parts, codec: int, files: dict[str, bytes], total: int) -> dict[str, int]:
    """Bytes on disk by part; they add up to `total`. Base85 (split form) weighs on code, config and tokenizer."""
    unit = 1.25 if len(files) > 1 else 1.0
    text = len(compress(parts.text(), codec))
    bare = len(compress(Parts("", b"", parts.source, b"", b"").text(), codec))
    sizes = {"code": round(bare * unit), "config": round((text - bare) * unit), "weights": len(parts.weights)}
    if parts.tokenizer:
        sizes["tokenizer"] = round(len(compress(parts.tokenizer, codec)) * unit)
    return {"bootstrap": total - sum(sizes.values())} | sizes


def section_rows(sections: list[Section], codec: int, code_bytes: int) -> list[dict[str, object]]:
    """Raw, minified and compressed bytes of each section.

    The compressed bytes of a section are what its removal saves, scaled so that the column adds up to `code_bytes`.
    """
    texts = [s.minified.encode() for s in sections]
    whole = len(compress(b"".join(texts), codec))
    saved = [whole - len(compress(b"".join(texts[:i] + texts[i + 1 :]), codec)) for i in range(len(texts))]
    scale = code_bytes / max(1, sum(saved))
    return [
        {"section": s.title, "raw": len(s.raw.encode()), "minified": len(t), "compressed": round(n * scale)}
        for s, t, n in zip(sections, texts, saved, strict=True)
    ]


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        print("  " + "  ".join(cells).rstrip())


def print_report(report: dict[str, object], rows: list[dict[str, object]], tokenizer_line: str) -> None:
    """The two tables of `pack`: bytes by part and bytes by section."""
    sizes = report["parts"] | {"total": report["bytes_total"]}
    print_table([("part", "bytes"), *((k, f"{v:,}") for k, v in sizes.items())])
    print(f"  {tokenizer_line}")
    sums = {k: sum(row[k] for row in rows) for k in ("raw", "minified", "compressed")}
    columns = ("section", "raw", "minified", "compressed")
    print()
    print_table(
        [columns, *((str(r["section"]), *(f"{r[c]:,}" for c in columns[1:])) for r in rows)]
        + [("sum", *(f"{sums[c]:,}" for c in columns[1:]))]
    )


class Gathered(NamedTuple):
    """What goes in: the parts, the source by section, result.json, and what specialisation dropped (or None)."""

    parts: Parts
    sections: list[Section]
    result: dict[str, object]
    dropped: Dropped | None


def gather(run_dir: Path, source: Path, tokenizer: bytes, facts: Facts | None = None) -> Gathered:
    """Read and check everything that goes in. UserError names the first thing that is missing or broken."""
    if not run_dir.is_dir():
        raise UserError(f"no run directory {run_dir}")
    weights = read_input(run_dir / "model.bin", "model blob")
    config = read_input(run_dir / "record.env", "configuration")
    result = read_result(run_dir)
    raw = read_input(source, "source")
    if result.get("source_sha256") not in (None, hashlib.sha256(raw).hexdigest()):
        print(f"warning: {source} is not the source that made this run (source_sha256 differs)", file=sys.stderr)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text: {error}") from error
    dropped = Dropped() if facts else None
    sections = minify_sections(text, str(source), facts, dropped)
    preset = Path(str(result.get("preset") or run_dir.name)).name
    minified = "".join(s.minified for s in sections).encode()
    return Gathered(Parts(preset, config, minified, tokenizer, weights), sections, result, dropped)


def pack(args: argparse.Namespace) -> int:
    """Subcommand `pack`: 0 written, 1 over the cap (nothing written), 2 by UserError."""
    model = find_tokenizer(args.tokenizer_path)
    if args.tokenizer == "embed" and model is None:
        raise UserError("--tokenizer embed: no tokenizer known; give --tokenizer-path FILE or set DATA_PATH")
    embedded = read_input(model, "tokenizer") if args.tokenizer == "embed" else b""
    if args.eval_only and not args.specialise:
        raise UserError("--eval-only needs --specialise")
    facts = known_facts(args) if args.specialise else None
    parts, sections, result, dropped = found = gather(args.run_dir, args.source, embedded, facts)
    split = args.format == "split"
    codec, files = smallest(parts, split)
    out = args.out or args.run_dir / ("submission" if split else "artifact.pyz")
    if out.is_dir() != split and out.exists():
        raise UserError(f"--out {out}: {'a folder' if split else 'a file'} is needed, and this exists as the other")
    out.parent.mkdir(parents=True, exist_ok=True)
    proof = prove(args, facts, found) if facts else {}
    written, total, finals = write_files(out, files, args.cap)
    sizes = size_by_part(parts, codec, files, total)
    report = {
        "artifact": str(out),
        "format": args.format,
        "codec": "brotli" if codec == BROTLI_CODEC else f"lzma {codec}",
        "fits": written,
        "cap": args.cap,
        "headroom": args.cap - total,
        "parts": sizes,
        "bytes_code": total - len(parts.weights),
        "bytes_model": len(parts.weights),
        "bytes_total": total,
        "sha256": hashlib.sha256(b"".join(files.values())).hexdigest(),
        "tokenizer": args.tokenizer,
    }
    if facts:
        plain = sum(map(len, smallest(proof.pop("plain"), split)[1].values()))
        report["specialised"] = {"bytes_saved": plain - total, "plain_bytes": plain, **dropped.counts(), **proof}
        print_specialised(report["specialised"])
    rows = section_rows(sections, codec, sizes["code"])
    size = f"{model.stat().st_size:,} bytes" if model else "(size unknown, no DATA_PATH)"
    print_report(report, rows, "tokenizer counted" if embedded else f"tokenizer {size}: not counted, as in the contest")
    if written:
        keys = ("artifact", "bytes_code", "bytes_model", "bytes_total")
        result |= {k: report[k] for k in keys} | {"artifact": out.name, "artifact_sha256": report["sha256"]}
        replace_file(args.run_dir / "result.json", json.dumps(result, indent=2).encode() + b"\n")
        print(f"wrote {', '.join(map(str, finals))}: {total:,} of {args.cap:,} bytes, {args.cap - total:,} to spare")
    print("PACK " + json.dumps(report | {"sections": rows}))
    if not written:
        by_part = ", ".join(f"{k} {v:,}" for k, v in sizes.items())
        print(
            f"error: {total:,} bytes are {total - args.cap:,} over the cap of {args.cap:,} ({by_part}); "
            f"nothing written to {out}",
            file=sys.stderr,
        )
    return 0 if written else 1


# +---------------------------------------------------------------------------------------------------------------+
# | 8 VERIFY                                                                                                      |
# +---------------------------------------------------------------------------------------------------------------+

Check = tuple[str, bool, str]  # what is compared, is it equal, detail

# What a child may inherit: the machine, never a knob of the run (those must come out of the artifact).
INHERITED = re.compile(
    r"(PATH|HOME|USER|LOGNAME|SHELL|TERM|LANG|LC_\w+|TZ|TMPDIR|VIRTUAL_ENV|LD_\w+|DYLD_\w+|CUDA_\w+|NVIDIA_\w+|NCCL_\w+"
    r"|GLOO_\w+|OMP_\w+|MKL_\w+|TORCH_\w+|TORCHINDUCTOR_\w+|PYTORCH_\w+|TRITON_\w+|CC|CXX"
    r"|DEVICE|ATTENTION|COMPUTE_DTYPE|COMPILE)"
)

# Loads the weights by the code in argv[1] and prints name -> [dtype, shape, sha256]: bit for bit, without a copy.
PROBE = """
import hashlib, importlib.util, json, sys
import torch
spec = importlib.util.spec_from_file_location("train_gpt", sys.argv[1])
module = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
tensors = {k: torch.as_tensor(v).detach().cpu().contiguous() for k, v in module.load_artifact(sys.argv[2]).items()}
digest = lambda t: hashlib.sha256(t.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
print("TENSORS " + json.dumps({k: [str(t.dtype), list(t.shape), digest(t)] for k, t in sorted(tensors.items())}))
"""


def clean_environment(room: Path, data: Path | None, tokenizer: Path | None) -> dict[str, str]:
    """Environment of a child: the machine's variables, the data, and a cache inside the empty directory."""
    env = {k: v for k, v in os.environ.items() if INHERITED.fullmatch(k)}
    env |= {"XDG_CACHE_HOME": str(room / "cache"), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if data is not None:
        env["DATA_PATH"] = str(data.resolve())
    if tokenizer is not None:
        env["TOKENIZER_PATH"] = str(tokenizer.resolve())
    return env


def run_child(command: list[str], room: Path, env: dict[str, str], quiet: bool = False) -> str:
    """Run in the empty directory; output streams through unless `quiet`. RuntimeError when the child fails."""
    done = subprocess.run(command, cwd=room, env=env, stdout=subprocess.PIPE if quiet else None, text=True, check=False)
    if done.returncode != 0:
        shown = " ".join("..." if "\n" in word else word for word in command[1:])
        raise RuntimeError(f"exit code {done.returncode} of: {shown}")
    return done.stdout or ""


def probe_weights(source: Path, model: Path, room: Path, env: dict[str, str]) -> dict[str, list[object]]:
    """name -> [dtype, shape, sha256] of the weights in `model` as the code in `source` decodes them."""
    out = run_child([sys.executable, "-c", PROBE, str(source.resolve()), str(model.resolve())], room, env, quiet=True)
    return json.loads(next(line for line in out.splitlines() if line.startswith("TENSORS "))[len("TENSORS ") :])


def extracted_folder(room: Path) -> Path:
    """The one folder that the artifact wrote into the cache of the empty directory."""
    folders = [path.parent for path in (room / "cache" / "train_gpt").glob("*/*/train_gpt.py")]
    if len(folders) != 1:
        raise RuntimeError(f"the artifact extracted {len(folders)} folders, expected one")
    return folders[0]


def compare_weights(script: Path, args: argparse.Namespace, room: Path, env: dict[str, str]) -> list[Check]:
    """Extract by the artifact's own code, then compare blob and decoded tensors with those of the run."""
    run_child([sys.executable, str(script), "--explain"], room, env, quiet=True)
    folder = extracted_folder(room)
    same_blob = (folder / "model.bin").read_bytes() == read_input(args.run / "model.bin", "model blob")
    same_config = (folder / "record.env").read_bytes() == read_input(args.run / "record.env", "configuration")
    ours = probe_weights(folder / "train_gpt.py", folder / "model.bin", room, env)
    theirs = probe_weights(args.source, args.run / "model.bin", room, env)
    wrong = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    note = f"{len(ours)} tensors, bit for bit" if not wrong else f"{len(wrong)} differ: {', '.join(wrong[:3])}"
    return [
        ("model.bin", same_blob, "byte for byte"),
        ("record.env", same_config, "byte for byte"),
        ("decoded weights", not wrong and bool(ours), note),
    ]


def compare_scores(ours: dict[str, object], theirs: dict[str, object]) -> list[Check]:
    """val_loss and val_bpb of the artifact against those of the run: equal exactly, or by how much not."""
    rows = []
    for key in ("val_loss", "val_bpb", "tokens_scored", "bytes_scored"):
        a, b = ours.get(key), theirs.get(key)
        known = isinstance(a, (int, float)) and isinstance(b, (int, float))
        note = f"artifact {a}, run {b}" + (f", difference {a - b:+.3e}" if known else "")
        rows.append((key, known and a == b, f"{a}" if a == b else note))
    return rows


def copy_alone(path: Path, room: Path) -> Path:
    """Copy the artifact, and nothing else, into the empty directory; return the file to run."""
    files = artifact_files(path)
    for file in files:
        shutil.copyfile(file, room / file.name)
    return room / files[0].name


def verify(args: argparse.Namespace) -> int:
    """Subcommand `verify`: 0 when everything equals the run, 1 when something differs or the artifact fails to run."""
    parts = read_artifact(args.file)
    expected = read_result(args.run) if args.run else {}
    if args.run and not args.source.is_file():
        raise UserError(f"no {args.source} to decode the run's weights with: give --source")
    data = args.data or (Path(os.environ["DATA_PATH"]) if os.environ.get("DATA_PATH") else None)
    tokenizer = args.tokenizer or (Path(os.environ["TOKENIZER_PATH"]) if os.environ.get("TOKENIZER_PATH") else None)
    rows: list[Check] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="verify_") as name:
        room = Path(name)
        env = clean_environment(room, data, None if parts.tokenizer else tokenizer)
        script = copy_alone(args.file, room)
        try:
            if args.run:
                rows += compare_weights(script, args, room, env)
            launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={args.nproc}"] if args.nproc > 1 else []
            run_child([sys.executable, *launcher, str(script)], room, env)
            score = read_result(room / "logs" / f"{script.stem}_eval")
        except RuntimeError as error:
            print(f"error: the artifact does not run from an empty directory: {error}", file=sys.stderr)
            return 1
    if args.run:
        rows += compare_scores(score, expected)
    equal = all(ok for _, ok, _ in rows)
    print()
    print_table(
        [("check", "equal", "detail"), *((k, "yes" if ok else "NO", note) for k, ok, note in rows)]
        if rows
        else [("score", "value"), *((k, f"{score.get(k)}") for k in ("val_loss", "val_bpb"))]
    )
    print(
        "VERIFY "
        + json.dumps(
            {
                "artifact": args.file.name,
                "equal": equal if args.run else None,
                "checks": {k: ok for k, ok, _ in rows},
                "val_loss": score.get("val_loss"),
                "val_bpb": score.get("val_bpb"),
                "run_val_bpb": expected.get("val_bpb"),
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
    )
    if not equal:
        print("error: the artifact is not the run: " + ", ".join(k for k, ok, _ in rows if not ok), file=sys.stderr)
    return 0 if equal else 1


# +---------------------------------------------------------------------------------------------------------------+
# | 9 INSPECT                                                                                                     |
# +---------------------------------------------------------------------------------------------------------------+

PART_KINDS = (("q", "symbols"), ("s", "scales"), ("[hs]s", "scales"), ("order", "row order"), ("lq*", "correction"))
INK, MUTED, BAR, BOUND = "#1f2933", "#6b7785", "#627d98", "#d1495b"


class Stream(NamedTuple):
    """One compressed stream of a model blob: its coder, its bytes on disk, and the arrays in it by name."""

    name: str
    coder: str
    size: int
    arrays: dict[str, np.ndarray]


def load_program(path: Path, name: str = "train_gpt") -> Any:
    """The module of a train_gpt.py, plain or packed, under a name that no other module has: its operators are
    registered with torch under it. Importing has no effect. UserError when it does not import."""
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


def read_streams(program: Any, blob: bytes, name: str) -> list[Stream]:
    """Streams of a model blob with their decoded arrays. UserError when it is foreign, damaged or of another version.

    Which array lies in which stream, and the coder of each, the codec's own row of the program's CODECS says. A codec
    that keeps its payload another way is shown as one stream.
    """
    try:
        arrays = program.unpack_arrays(blob, name)
    except program.UserError as error:
        raise UserError(str(error).replace("\n", "; ")) from error
    number, payload = program.ARTIFACT_HEADER.unpack_from(blob)[2], blob[program.ARTIFACT_HEADER.size :]
    codec, layout = next((k, c) for k, c in program.CODECS.items() if c.number == number)
    groups = getattr(layout, "groups", ())
    head = struct.Struct(f"<B{1 + len(groups)}I")
    count, *sizes = head.unpack_from(payload) if len(payload) >= head.size else (0,)
    if count != 1 + len(groups) or head.size + sum(sizes) != len(payload):
        return [Stream(codec, codec, len(payload), arrays)]
    stored = program.unpack_payload(payload, layout)
    split: list[dict[str, np.ndarray]] = [{} for _ in sizes]
    for key, array in stored.items():
        split[layout.stream_of(key)][key] = array
    index = [[key, array.dtype.str, array.shape] for key, array in stored.items()]
    text = json.dumps(index, separators=(",", ":")).encode()
    split[0]["index"] = np.frombuffer(text, np.uint8)
    names = ["rest", *(re.sub(r"^blocks\.\*\.|\.weight.*$", "", g) for g in groups)]
    coders = [layout.coder, *[layout.group_coder] * len(groups)]
    return [Stream(*row) for row in zip(names, coders, sizes, split, strict=True) if row[2]]


def entropy_bits(array: np.ndarray) -> float:
    """Bits of an array at the order-0 entropy of its bytes, each significance of a wider item on its own."""
    planes = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T
    total = 0.0
    for plane in planes:
        counts = np.bincount(plane, minlength=1)
        counts = counts[counts > 0]
        total -= float((counts * np.log2(counts / len(plane))).sum()) if len(plane) else 0.0
    return total


def tensor_class(key: str) -> tuple[str, str]:
    """Class of a stored array and the kind of part that it is: 'blocks.3.attn.q.weight:gptq:s' -> attn.q, scales."""
    tensor, _, rest = key.partition(":")
    part = rest.rpartition(":")[2]
    kind = next((kind for pattern, kind in PART_KINDS if fnmatch.fnmatchcase(part, pattern)), "other")
    name = re.sub(r"\d+", "*", tensor).removeprefix("blocks.*.").removesuffix(".weight")
    return name, kind


def stream_rows(streams: list[Stream]) -> list[dict[str, object]]:
    """Bytes, order-0 bound and symbols of each stream."""
    rows = []
    for s in streams:
        bound, items = sum(map(entropy_bits, s.arrays.values())) / 8, sum(a.size for a in s.arrays.values())
        rows.append(
            {
                "stream": s.name,
                "coder": s.coder,
                "bytes": s.size,
                "items": items,
                "bits_per_item": 8 * s.size / max(1, items),
                "bound": round(bound),
                "over_bound": s.size / bound - 1 if bound else 0.0,
            }
        )
    return rows


def class_rows(streams: list[Stream]) -> list[dict[str, object]]:
    """Bytes by tensor class and kind of part. A stream's bytes are shared out by the entropy of the arrays in it."""
    shares: dict[tuple[str, str], list[float]] = {}
    for s in streams:
        bits = {key: entropy_bits(array) for key, array in s.arrays.items()}
        scale = s.size / max(1e-9, sum(bits.values()))
        for key, array in s.arrays.items():
            row = shares.setdefault(tensor_class(key), [0.0, 0.0, 0.0, 0.0])
            for i, value in enumerate((1, array.size, bits[key] * scale, bits[key] / 8)):
                row[i] += value
    return [
        {
            "class": name,
            "part": kind,
            "arrays": int(count),
            "items": int(items),
            "bytes": round(size),
            "bits_per_item": 8 * size / max(1, items),
            "bound": round(bound),
        }
        for (name, kind), (count, items, size, bound) in sorted(shares.items(), key=lambda row: -row[1][2])
    ]


def packed_sections(parts: Parts, source: Path) -> list[Section]:
    """The packed source cut by the sections that its definitions have in the plain program; what neither names goes to
    the section before it."""
    text, plain = parts.source.decode(), source.read_text(encoding="utf-8")
    home = {}
    titles = ["(before the first banner)"]
    for section in minify_sections(plain, str(source)):
        titles += [section.title] * (section.title not in titles)
        for node in parse_source(section.minified, section.title).body:
            home |= dict.fromkeys(defined_names(node) - home.keys(), section.title)
    lines = text.splitlines(keepends=True)
    starts = np.concatenate(([0], np.cumsum([len(line) for line in lines]))).tolist()
    found, here, edges = dict.fromkeys(titles, ""), titles[0], []
    for node in parse_source(text, "packed source").body:
        line = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        prefix = len(lines[node.lineno - 1].encode()[: node.col_offset].decode())
        edges.append((starts[line - 1] + (prefix if line == node.lineno else 0), node))
    for (begin, node), (end, _) in zip(edges, [*edges[1:], (len(text), None)], strict=True):
        here = next((home[n] for n in sorted(defined_names(node)) if n in home), here)
        found[here] += text[begin:end]
    return [Section(title, "", piece) for title, piece in found.items() if piece]


def print_rows(rows: list[dict[str, object]], formats: dict[str, str]) -> None:
    """A table of dicts: the columns and their formats."""
    print_table([tuple(formats), *(tuple(format(r[k], f) for k, f in formats.items()) for r in rows)])
    print()


def draw_inspection(report: dict[str, Any], path: Path) -> None:
    """Three panels of bars: streams with their entropy bound, tensor classes, sections of the code."""
    figure = Figure(figsize=(15, 6), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("streams", "stream", "Streams, red: order-0 entropy"),
        ("classes", "class", "Tensor classes"),
        ("sections", "section", "Sections of the code"),
    )
    for ax, (key, label, title) in zip(figure.subplots(1, 3), panels, strict=True):
        rows = report[key][:16]
        ax.set_title(title, loc="left", color=INK)
        names = [f"{row[label]} {row.get('part', '')}".strip() for row in rows]
        ax.barh(range(len(rows)), [row["bytes"] / 1e3 for row in rows], color=BAR)
        if key == "streams":
            for place, row in enumerate(rows):
                ax.plot([row["bound"] / 1e3] * 2, [place - 0.4, place + 0.4], color=BOUND)
        ax.set_yticks(range(len(rows)), names, fontsize=8, color=INK)
        ax.invert_yaxis()
        ax.set_xlabel("kB (1 kB = 1,000 bytes)", color=MUTED)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['file']}: {report['bytes_total']:,} of {CAP_BYTES:,} bytes", color=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    replace_file(path, buffer.getvalue())


def read_any(path: Path) -> tuple[Parts | None, int, bytes, list[Path]]:
    """Parts (None for a bare blob), codec of the code, model blob and files of an artifact, a run folder or a blob."""
    if path.is_dir() and not (path / SPLIT_SOURCE).is_file():
        path = next((path / n for n in ("artifact.pyz", SPLIT_MODEL) if (path / n).is_file()), path / SPLIT_MODEL)
    if path.suffix == ".bin":
        return None, BROTLI_CODEC, read_input(path, "model blob"), [path]
    container = read_container(path)
    parts = decode_container(container, str(path))
    return parts, container[32], parts.weights, artifact_files(path)


def inspect(args: argparse.Namespace) -> int:
    """Subcommand `inspect`: where the bytes of an artifact are, after its hashes have been checked."""
    parts, codec, blob, files = read_any(args.file)
    streams = read_streams(load_program(args.source), blob, str(files[-1]))
    total = sum(f.stat().st_size for f in files)
    report: dict[str, Any] = {
        "file": args.file.name,
        "bytes_total": total,
        "cap": CAP_BYTES,
        "headroom": CAP_BYTES - total,
        "bytes_model": len(blob),
        "bytes_code": total - len(blob),
        "streams": stream_rows(streams),
        "classes": class_rows(streams),
        "sections": [],
    }
    symbols = [row for row in report["classes"] if row["part"] == "symbols"]
    weights = sum(row["items"] for row in symbols) or 1
    report["bits_per_weight"] = 8 * len(blob) / weights
    report["quantised_weights"] = sum(row["items"] for row in symbols)
    stored, bound = (sum(row[key] for row in report["streams"]) for key in ("bytes", "bound"))
    report["over_bound"] = stored / max(1, bound) - 1
    if parts is not None:
        sizes = size_by_part(parts, codec, dict.fromkeys(map(str, files), b""), total)
        print(f"preset {parts.preset}; hashes match")
        print_rows([{"part": k, "bytes": v} for k, v in (sizes | {"total": total}).items()], {"part": "", "bytes": ","})
        rows = section_rows(packed_sections(parts, args.source), codec, sizes["code"])
        report["sections"] = [
            {k: r[n] for k, n in (("section", "section"), ("minified", "minified"), ("bytes", "compressed"))}
            for r in rows
        ]
        report["parts"] = sizes
    print_rows(
        report["streams"],
        {
            "stream": "",
            "coder": "",
            "bytes": ",",
            "items": ",",
            "bits_per_item": ".3f",
            "bound": ",",
            "over_bound": "+.2%",
        },
    )
    print_rows(
        report["classes"],
        {"class": "", "part": "", "arrays": ",", "items": ",", "bytes": ",", "bits_per_item": ".3f", "bound": ","},
    )
    if report["sections"]:
        print_rows(report["sections"], {"section": "", "minified": ",", "bytes": ","})
    print(
        f"{report['quantised_weights']:,} quantised weights, {report['bits_per_weight']:.3f} bits per weight with "
        f"all that the model needs; the streams are {report['over_bound']:+.2%} off their order-0 entropy"
    )
    if args.png:
        draw_inspection(report, args.png)
        print(f"picture: {args.png}")
    print("INSPECT " + json.dumps(report))
    return 0


# +---------------------------------------------------------------------------------------------------------------+
# | 10 PROOF OF A SPECIALISED PROGRAM                                                                             |
# +---------------------------------------------------------------------------------------------------------------+

# Numbers that make any record small enough for seconds on one core. Depth is apart: a record may list its layers.
TOY_DEPTH = {
    "NUM_LAYERS": "4",
    "XSA_LAST_N": "4",
    "NUM_LOOPS": "1",
    "LOOP_START": "1",
    "LOOP_END": "2",
    "PARALLEL_START_LAYER": "3",
}
TOY = {
    "VOCAB_SIZE": "512",
    "MODEL_DIM": "64",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "MLP_MULT": "2.0",
    "ROPE_DIMS": "8",
    "TRAIN_SEQ_LEN": "128",
    "EVAL_SEQ_LEN": "128",
    "EVAL_STRIDE": "32",
    "TRAIN_BATCH_TOKENS": "1024",
    "VAL_BATCH_TOKENS": "1024",
    "BATCH_SLICES": "4",
    "ITERATIONS": "12",
    "MAX_WALLCLOCK_SECONDS": "0",
    "WARMUP_STEPS": "1",
    "TRAIN_LOG_EVERY": "4",
    "EMA_DECAY": "0.5",
    "GPTQ_CALIBRATION_BATCHES": "4",
    "TTT_LORA_RANK": "4",
    "TTT_LORA_ALPHA": "6",
    "TTT_LORA_LR": "0.003",
    "TTT_EVAL_SEQ_LEN": "96",
    "TTT_BATCH_SIZE": "2",
    "PHASED_TTT_PREFIX_DOCS": "2",
    "PHASED_TTT_NUM_PHASES": "2",
    "GLOBAL_TTT_CHUNK_TOKENS": "256",
    "TTT_CHUNK_TOKENS": "512",
}

# Prints what is known of a run: argv is the program, the run's folder and its model blob.
FACTS = """
import dataclasses, importlib.util, json, re, sys
spec = importlib.util.spec_from_file_location("train_gpt", sys.argv[1])
module = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
try:
    cfg = module.load_config({"PRESET": sys.argv[2]})
    names = module.unpack_arrays(open(sys.argv[3], "rb").read(), sys.argv[3])
except module.UserError as error:
    sys.exit("error: " + str(error).replace("\\n", "; "))
fields = dataclasses.fields(cfg)
print("FACTS " + json.dumps({"values": {f.name: getattr(cfg, f.name) for f in fields}, "free": module.LOCAL_KNOBS,
    "choices": {f.name: f.metadata["choices"] for f in fields},
    "words": sorted(set(re.findall(r"\\w+", " ".join(names))))}))
"""


def known_facts(args: argparse.Namespace) -> Facts:
    """What the run's own program says of its knobs and of its artifact. UserError when it refuses them."""
    read_input(args.run_dir / "model.bin", "model blob")
    read_input(args.source, "source")
    command = [sys.executable, "-c", FACTS, *(str(p.resolve()) for p in (args.source, args.run_dir))]
    command.append(str((args.run_dir / "model.bin").resolve()))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1].removeprefix("error: ")
        raise UserError(f"--specialise cannot read the run with {args.source}: {reason}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("FACTS "))
    found = json.loads(line.removeprefix("FACTS "))
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in found["values"].items()}
    choices = {k: tuple(v) for k, v in found["choices"].items()}
    return Facts(values, frozenset(found["free"]), choices, frozenset(found["words"]), args.eval_only)


def write_toy_data(folder: Path, vocab: int, tokens: int) -> Path:
    """Shards of seeded documents for training and validation, with a byte sidecar, so that no tokenizer is needed."""
    rng = np.random.Generator(np.random.PCG64(vocab))
    lengths = rng.integers(20, 110, size=tokens // 20)
    lengths = lengths[: 1 + int(np.searchsorted(np.cumsum(lengths), tokens))]
    ids = rng.integers(4, vocab, size=int(lengths.sum()))
    repeated = rng.random(len(ids)) < 0.5  # something to learn
    ids[1:][repeated[1:]] = ids[:-1][repeated[1:]]
    ids[np.concatenate(([0], np.cumsum(lengths)[:-1]))] = 1
    folder.mkdir()
    for kind, values in (("train", ids), ("val", ids), ("val_bytes", np.where(ids == 1, 0, 3))):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(values)
        (folder / f"fineweb_{kind}_000000.bin").write_bytes(header.tobytes() + values.astype("<u2").tobytes())
    return folder


# Decodes the weights by the code in argv[1] and then runs it: argv[3] lists the runs, each by the environments that it
# may have, of which the first that the program accepts is taken.
PROVE = (
    PROBE
    + """
import os
for choices in json.loads(sys.argv[3]):
    for environ in choices:
        try:
            module.load_config(environ)
            break
        except module.UserError as error:
            problem = error
    else:
        sys.exit(f"error: the preset has no toy size: {problem}")
    os.environ.clear()
    os.environ.update(environ)
    if module.main([]):
        sys.exit(1)
"""
)


def run_program(source: Path, model: Path, runs: list[list[dict[str, str]]], room: Path, env: dict[str, str]) -> str:
    """Weights and runs of one program in one process. RuntimeError with the program's own words when it fails."""
    named = [[e | {"ARTIFACT_DIR": f"{source.parent.name}_{i}"} for e in choices] for i, choices in enumerate(runs)]
    command = [sys.executable, "-c", PROVE, str(source), str(model.resolve()), json.dumps(named)]
    done = subprocess.run(command, cwd=room, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1].removeprefix("error: "))
    return next(line for line in done.stdout.splitlines() if line.startswith("TENSORS "))


def prove(args: argparse.Namespace, facts: Facts, found: Gathered) -> dict[str, object]:
    """Run the plain minified program and the specialised one side by side; UserError when they differ anywhere.

    Compared bit for bit: the decoded weights; the scores of the artifact (on --data or, without, on seeded documents);
    and, unless the program only evaluates, the artifact and the scores of a whole toy run from random weights.
    """
    plain = gather(args.run_dir, args.source, found.parts.tokenizer).parts
    with tempfile.TemporaryDirectory(prefix="prove_") as name:
        room, sources = Path(name), []
        for kind, text in (("plain", plain.source), ("special", found.parts.source)):
            (room / kind).mkdir()
            sources.append(room / kind / SPLIT_SOURCE)
            sources[-1].write_bytes(text)
        data = args.data or write_toy_data(room / "data", facts.values["vocab_size"], facts.values["eval_seq_len"] + 64)
        env = clean_environment(room, data, args.tokenizer_path) | {"PRESET": str(args.run_dir.resolve())}
        env |= {} if args.data else {"DEVICE": "cpu"}
        model = args.run_dir / "model.bin"
        runs = [[env | {"STAGES": "eval", "MODEL_PATH": str(model.resolve())}]]
        if not facts.eval_only:
            documents = write_toy_data(room / "toy", int(TOY["VOCAB_SIZE"]), 2000)
            toy = env | {"DATA_PATH": str(documents), "DEVICE": "cpu"}
            runs.append([toy | TOY | TOY_DEPTH, toy | TOY])
        try:
            weights = [run_program(s, model, runs, room, env) for s in sources]
            count = len(json.loads(weights[0].removeprefix("TENSORS ")))
            rows = [("decoded weights", count > 0 and weights[0] == weights[1], f"{count} tensors, bit for bit")]
            for i, word in enumerate(("", "toy run: ")[: len(runs)]):
                ours, theirs = (room / f"{kind}_{i}" for kind in ("special", "plain"))
                found_rows = compare_scores(read_result(ours), read_result(theirs))
                if i:
                    blobs = [(folder / "model.bin").read_bytes() for folder in (ours, theirs)]
                    found_rows.insert(0, ("model.bin", blobs[0] == blobs[1], f"{len(blobs[0]):,} bytes"))
                rows += [(word + k, ok, note) for k, ok, note in found_rows]
        except RuntimeError as error:
            raise UserError(f"the specialised program cannot be proven, nothing is written: {error}") from error
    wrong = [f"{k} ({note})" for k, ok, note in rows if not ok]
    if wrong:
        raise UserError(f"the specialised program is not the plain one, nothing is written: {'; '.join(wrong)}")
    return {
        "plain": plain,
        "proof": {k: note for k, _, note in rows},
        "proof_data": str(args.data or "seeded"),
        "eval_only": facts.eval_only,
    }


def print_specialised(report: dict[str, object]) -> None:
    """What specialisation saved and how it was proven."""
    rows = [(k, f"{v:,}") for k, v in report.items() if isinstance(v, int) and not isinstance(v, bool)]
    print_table([("specialised", "count"), *rows])
    print_table([("equal to the plain program", "detail"), *report["proof"].items()])
    print()


# +---------------------------------------------------------------------------------------------------------------+
# | 11 COMMAND LINE                                                                                               |
# +---------------------------------------------------------------------------------------------------------------+

EPILOG = """examples:
  python pack_artifact.py pack logs/demo_seed1337
  python pack_artifact.py pack logs/demo_seed1337 --tokenizer embed --tokenizer-path data/sample/sp1024.model
  python pack_artifact.py pack logs/demo_seed1337 --format split --out submission
  python pack_artifact.py verify logs/demo_seed1337/artifact.pyz --run logs/demo_seed1337 --data data/sample
  DATA_PATH=data/sample python logs/demo_seed1337/artifact.pyz
  DATA_PATH=data/sample torchrun --nproc_per_node=8 logs/demo_seed1337/artifact.pyz

An artifact extracts to $XDG_CACHE_HOME (or ~/.cache)/train_gpt/<hash>/<preset>; that folder may be deleted at any time.
STAGES (default eval) and ARTIFACT_DIR (default logs/<name of the file>_eval) may be set in the environment;
PRESET is always the packed one.
Minified source needs the Python version that packed it, or a later one: pack with the oldest that shall run it.
exit codes: 0 done, 1 over the cap or not equal to the run, 2 wrong input"""


def positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def add_pack_options(sub: argparse.ArgumentParser, source: Path) -> None:
    """Options of `pack`."""
    sub.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder with model.bin, record.env, result.json")
    sub.add_argument("--source", type=Path, default=source, help="program to pack (default: train_gpt.py beside this)")
    sub.add_argument("--out", type=Path, help="file, or folder when split (RUN_DIR/artifact.pyz, RUN_DIR/submission)")
    sub.add_argument(
        "--format",
        choices=("single", "split"),
        default="single",
        help="one self-extracting file, or the contest's two files (default single)",
    )
    sub.add_argument(
        "--tokenizer",
        choices=("uncounted", "embed"),
        default="uncounted",
        help="leave it with the data, as the contest does, or let it travel (default uncounted)",
    )
    sub.add_argument("--tokenizer-path", type=Path, help="default: TOKENIZER_PATH, else the one *.model in DATA_PATH")
    sub.add_argument(
        "--specialise",
        action="store_true",
        help="drop what this configuration cannot reach, and prove that nothing else changed",
    )
    sub.add_argument("--eval-only", action="store_true", help="with --specialise: drop training too (no submission)")
    sub.add_argument(
        "--data",
        type=Path,
        metavar="DATA_PATH",
        help="with --specialise: shards to prove it on (default: seeded documents)",
    )
    sub.add_argument("--cap", type=positive, default=CAP_BYTES, help="decimal bytes allowed (default 16000000)")


def add_verify_options(sub: argparse.ArgumentParser, source: Path) -> None:
    """Options of `verify`."""
    sub.add_argument("file", type=Path, metavar="FILE", help="packed file, or the folder of the split form")
    sub.add_argument("--run", type=Path, metavar="RUN_DIR", help="run to compare with (without: only print the score)")
    sub.add_argument("--data", type=Path, metavar="DATA_PATH", help="validation shards (default: DATA_PATH)")
    sub.add_argument("--tokenizer", type=Path, metavar="PATH", help="default: TOKENIZER_PATH, else the one in the data")
    sub.add_argument("--source", type=Path, default=source, help="plain program of the run (default: beside this file)")
    sub.add_argument("--nproc", type=positive, default=1, help="processes, as many as the run's evaluation had (1)")


def command_line() -> argparse.ArgumentParser:
    """All subcommands and options."""
    parser = argparse.ArgumentParser(
        description="Pack a finished run into one self-extracting artifact under the size cap, and verify it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{pack,verify,inspect}")
    source = Path(__file__).resolve().with_name("train_gpt.py")

    def add(call: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        """Count one part."""
        sub = commands.add_parser(
            call.__name__,
            help=text,
            description=text,
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(call=call)
        return sub

    add_pack_options(add(pack, "write the artifact of a run, and its true size into the run's result.json"), source)
    add_verify_options(add(verify, "run the artifact alone in an empty directory; compare with the run"), source)
    sub = add(inspect, "check every byte of an artifact and print where its bytes are, without running it")
    sub.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="the packed file, the folder of the split form, a run folder, or a bare model.bin",
    )
    sub.add_argument("--source", type=Path, default=source, help="program that reads the model blob (default: beside)")
    sub.add_argument("--png", type=Path, metavar="PICTURE", help="draw the tables too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = command_line().parse_args(argv)
    try:
        return args.call(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
