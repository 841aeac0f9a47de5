"""The sample corpus: the English prose that every Python installation carries.

`sample_documents` collects help topics, docstrings, longer comments and notes of the standard library, so that a data
directory can be made without a download (`python data/prepare.py sample`).
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import itertools
import os
import re
import sys
import sysconfig
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics as PYDOC_TOPICS

SKIPPED_DIRS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}
DOC_CHARS = 8000  # a document ends with the first paragraph that goes beyond
MIN_DOC_CHARS = 400
RULE = re.compile(r"[*=~^#\-_+|\s]{3,}")  # underlines of headings, borders of tables


class ProseFilter:
    """Cleans text into paragraphs, and lets every longer paragraph pass only once.

    Many classes repeat their parents' words, and help topics include one another: without this, validation would hold
    sentences of the training text.
    """

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def paragraphs(self, text: str) -> list[str]:
        """Return the paragraphs of prose in a text, each on one line with single spaces."""
        kept = []
        for block in re.split(r"\n\s*\n", text.expandtabs()):
            lines = [line.strip() for line in block.splitlines()]
            paragraph = " ".join(" ".join(line for line in lines if line and not RULE.fullmatch(line)).split())
            if self.is_new_prose(paragraph):
                kept.append(paragraph)
        return kept

    def titled(self, name: str, text: str) -> list[str]:
        """Return the paragraphs of a docstring, the first one behind the name of what it describes."""
        own = self.paragraphs(text)
        return [f"{name}: {own[0]}", *own[1:]] if own else []

    def is_new_prose(self, paragraph: str) -> bool:
        """Say whether a paragraph is mostly letters and spaces, is not a prompt, and was not seen before."""
        plain = sum(map(str.isalpha, paragraph)) + paragraph.count(" ")
        if len(paragraph) < 12 or plain < 0.78 * len(paragraph) or paragraph.startswith(">>>"):
            return False
        key = paragraph.casefold()
        if len(paragraph) >= 40 and key in self.seen:
            return False
        self.seen.add(key)
        return True


def docstrings(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) for the definitions in a syntax tree, in source order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{prefix}{child.name}"
            yield name, ast.get_docstring(child) or ""
            yield from docstrings(child, name + ".")
        elif isinstance(child, (ast.If, ast.Try)):
            yield from docstrings(child, prefix)


def comment_blocks(source: str) -> Iterator[str]:
    """Yield comments of three or more lines: those that explain rather than label."""
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
    """Return the docstrings, then the longer comments, of one module; nothing if it is not valid source."""
    if b'"""' not in source and b"'''" not in source:
        return []  # tables of encodings and the like: slow to parse, and without docstrings
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in old modules are not our concern
            tree = ast.parse(source)
        text = source.decode("utf-8")
    except (SyntaxError, ValueError):  # templates, and files in other encodings
        return []
    found = prose.paragraphs(ast.get_docstring(tree) or "")
    for name, doc in docstrings(tree):
        found += prose.titled(name, doc)
    for block in comment_blocks(text):
        found += prose.paragraphs(block)
    return found


def builtin_paragraphs(name: str, prose: ProseFilter) -> list[str]:
    """Return the docstrings of a module that is compiled into the interpreter."""
    module = importlib.import_module(name)
    found = prose.paragraphs(module.__doc__ or "")
    members = [("", module)]
    # Only what C defines: a hook that this process has replaced must not change the sample.
    members += [(f"{key}.", value) for key, value in sorted(vars(module).items()) if inspect.isclass(value)]
    for prefix, owner in members:
        for key, value in sorted(vars(owner).items(), key=lambda pair: pair[0]):
            fixed = inspect.isbuiltin(value) or inspect.ismethoddescriptor(value) or inspect.isgetsetdescriptor(value)
            if fixed and isinstance(value.__doc__, str):
                found += prose.titled(f"{prefix}{key}", value.__doc__)
    return found


def stdlib_paragraphs(prose: ProseFilter) -> Iterator[list[str]]:
    """Yield the paragraphs of the standard library, file by file, and of the wheels that ensurepip bundles."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_DIRS)
        # some distributions leave links there whose targets come with another package
        files += [path for name in sorted(names) if (path := Path(folder, name)).is_file()]
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
    """Return this Python's help topics, docstrings, comments and notes as documents of prose.

    A long text is cut at paragraphs into documents of about 8,000 characters. Documents are sorted by hash, so any
    split sees the same mix. The result depends on nothing but the Python installation.
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
