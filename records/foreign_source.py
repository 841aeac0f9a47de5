"""A stranger's Python, read and never run: parsed files, unpacked wrappers, and what a statement depends on.

Everything here works on syntax trees. Self-extracting wrappers are opened by decoding the literals in them with limits
on size; nothing is imported, compiled or executed.
"""

from __future__ import annotations

import ast
import base64
import binascii
import bz2
import lzma
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import brotli
import zstandard

MAX_SOURCE = 4_000_000  # characters of a program; published ones have up to 250,000
MAX_UNPACKED = 8_000_000  # bytes out of one decompressor
MAX_LITERAL = 32_000_000  # bytes of a literal, or of some joined
MAX_LAYERS = 2  # wrappers inside one another
QUOTED = 90  # characters of a line that are shown
DICTIONARY = 2**26  # bytes that a decompressor may look back

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Loop = ast.For | ast.AsyncFor | ast.While
Block = ast.Module | FunctionNode | Loop | ast.If | ast.With | ast.AsyncWith | ast.Try | ast.ExceptHandler
ENTRY_METHODS = frozenset("forward __init__ __call__ __iter__ __next__ __enter__ backward".split())
# The name of what holds a program's settings, and words in the names of switches.
SETTINGS = frozenset("args cfg config conf h hp hps hparams hyperparameters self opts options flags".split())
SWITCH_WORDS = re.compile(r"enabled|enable_|^use_|_use_|flag|mode$|only$", re.IGNORECASE)


class Refused(Exception):
    """A literal that is not unpacked; the message says why."""


def names_in(*nodes: ast.AST | None) -> set[str]:
    """Return all variable and attribute names below some nodes."""
    found = set()
    for root in nodes:
        for node in ast.walk(root) if root is not None else ():
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
    return found


def variables(*nodes: ast.AST | None) -> set[str]:
    """Return the variables below some nodes, without attributes."""
    return {node.id for root in nodes if root is not None for node in ast.walk(root) if isinstance(node, ast.Name)}


def strings_in(node: ast.AST) -> Iterator[str]:
    """Yield the text constants below a node."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def called(node: ast.AST) -> str:
    """Return the last name of what a call calls, "" for anything else."""
    func = node.func if isinstance(node, ast.Call) else None
    return getattr(func, "attr", "") or getattr(func, "id", "")


def calls(node: ast.AST) -> Iterator[ast.Call]:
    """Yield the calls below a node."""
    return (part for part in ast.walk(node) if isinstance(part, ast.Call))


def place(node: ast.AST) -> tuple[int, int]:
    """Return where a node begins: line and column."""
    return node.lineno, node.col_offset


def assigned(node: ast.AST) -> list[tuple[ast.expr, ast.expr | None]]:
    """Return the targets of an assignment, each with its value; none for other statements."""
    match node:
        case ast.Assign(targets=targets, value=value):
            pairs = [(target, value) for target in targets]
        case ast.AnnAssign(target=target, value=value) | ast.AugAssign(target=target, value=value):
            pairs = [(target, value)]
        case ast.NamedExpr(target=target, value=value):
            pairs = [(target, value)]
        case ast.For(target=target):
            pairs = [(target, None)]
        case _:
            return []
    found = []
    for target, value in pairs:
        if not isinstance(target, ast.Tuple | ast.List):
            found.append((target, value))
            continue
        # a, b = c, d: each its own; a, b = f(): both the whole
        values = value.elts if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts) else None
        found += [(part, values[i] if values else value) for i, part in enumerate(target.elts)]
    return found


@dataclass(eq=False)
class Source:
    """One parsed file. name: as findings show it; told: settings that the logs print, which replace its defaults.

    wrong: why it does not parse (its tree is empty then).
    """

    name: str
    text: str
    told: dict[str, str] = field(default_factory=dict)
    tree: ast.Module = field(init=False)
    wrong: tuple[int, str] | None = field(init=False, default=None)  # line and reason

    def __post_init__(self) -> None:
        """Parse the text; what does not parse has an empty tree."""
        try:
            if len(self.text) > MAX_SOURCE:
                raise ValueError(f"{len(self.text):,} characters are too many to read")
            with warnings.catch_warnings(action="ignore"):
                self.tree = ast.parse(self.text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            self.tree = ast.Module(body=[], type_ignores=[])
            self.wrong = (
                getattr(error, "lineno", None) or 1,
                str(error).split(" (<unknown>")[0] or "nested too deeply",
            )

    @cached_property
    def lines(self) -> list[str]:
        """Its lines, as the parser counts them."""
        return re.split(r"\r\n|\r|\n", self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes."""
        return list(ast.walk(self.tree))

    @cached_property
    def parents(self) -> dict[ast.AST, ast.AST]:
        """The node above each node."""
        return {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}

    @cached_property
    def functions(self) -> list[FunctionNode]:
        """All functions and methods."""
        return [node for node in self.nodes if isinstance(node, FunctionNode)]

    @cached_property
    def aliases(self) -> dict[str, str]:
        """What imported names stand for: local name -> dotted name."""
        found = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found |= {
                    (a.asname or a.name.split(".")[0]): (a.name if a.asname else a.name.split(".")[0])
                    for a in node.names
                }
            elif isinstance(node, ast.ImportFrom):
                found |= {(a.asname or a.name): f"{node.module or ''}.{a.name}" for a in node.names}
        return found

    @cached_property
    def defaults(self) -> dict[str, tuple[str, str]]:
        """Settings that the environment may change: variable or attribute -> (its knob, its value in the logs, else its
        default)."""
        found = {}
        for node in self.nodes:
            for target, value in assigned(node):
                for call in calls(value) if value is not None else ():
                    words = [part.value for part in call.args if isinstance(part, ast.Constant)]
                    if self.dotted(call.func) in ("os.environ.get", "os.getenv", "environ.get") and len(words) == 2:
                        name = getattr(target, "id", "") or getattr(target, "attr", "")
                        found[name] = (str(words[0]), self.told.get(name, str(words[1])))
        return found

    @cached_property
    def loads(self) -> dict[str, list[ast.AST]]:
        """Every place that reads a name: variable or attribute -> nodes."""
        found: dict[str, list[ast.AST]] = {}
        for node in self.nodes:
            name = getattr(node, "id", None) or getattr(node, "attr", None)
            if name and isinstance(getattr(node, "ctx", None), ast.Load):
                found.setdefault(name, []).append(node)
        return found

    def said(self, name: str) -> str:
        """Return a setting with its value, and where that value stands."""
        knob, value = self.defaults[name]
        return f"{knob}={value or 'empty'} {'in the logs' if name in self.told else 'by default'}"

    def dotted(self, node: ast.AST) -> str:
        """Return the dotted name of an expression with import aliases resolved, "" if it is none."""
        match node:
            case ast.Name(id=name):
                return self.aliases.get(name, name)
            case ast.Attribute(value=value, attr=attr):
                base = self.dotted(value)
                return f"{base}.{attr}" if base else ""
            case ast.Call(func=ast.Name(id="__import__"), args=[ast.Constant(value=str(name)), *_]):
                return name
        return ""

    def quote(self, line: int) -> str:
        """Return a line, shortened."""
        text = " ".join(self.lines[line - 1].split()) if 0 < line <= len(self.lines) else ""
        return text if len(text) <= QUOTED else text[: QUOTED - 3] + "..."

    def above(self, node: ast.AST) -> Iterator[ast.AST]:
        """Yield the nodes that hold a node, from the inside out."""
        while (node := self.parents.get(node)) is not None:
            yield node

    def enclosing(self, node: ast.AST, kinds: type | tuple[type, ...]) -> ast.AST | None:
        """Return the innermost node of some kinds around a node."""
        return next((above for above in self.above(node) if isinstance(above, kinds)), None)

    def function_of(self, node: ast.AST) -> FunctionNode | None:
        """Return the function that a node is in."""
        return self.enclosing(node, (ast.FunctionDef, ast.AsyncFunctionDef))

    # What a statement depends on

    def switch(self, node: ast.AST, seen: frozenset[str] = frozenset()) -> str:
        """Return "" if a node runs whenever the program does with the settings of its logs, else of its defaults; else
        what it depends on."""
        function = self.function_of(node)
        own = self.condition(node, function)
        if own or function is None or function.name in ENTRY_METHODS:
            return own
        if function.name in seen:
            return f"{function.name} calls itself only"
        within = set(ast.walk(function))
        sites = [site for site in self.loads.get(function.name, []) if site not in within]
        if not sites:
            return f"nothing calls {function.name}"
        answers = (self.switch(site, seen | {function.name}) for site in sites)
        worst = ""
        for answer in answers:
            if not answer:
                return ""
            worst = worst or answer
        return worst

    def condition(self, node: ast.AST, function: FunctionNode | None) -> str:
        """Return the first setting, inside its function, that decides whether a node runs; "" without one."""
        child = node
        for above in self.above(node):
            if isinstance(above, ast.If | ast.IfExp) and child is not above.test:
                taken = child in above.body if isinstance(above.body, list) else child is above.body
                if text := self.undecided(above.test, taken):
                    return text
            elif isinstance(above, ast.For) and child is not above.iter and (text := self.undecided_loop(above)):
                return text
            elif isinstance(above, ast.ExceptHandler):
                return f"an exception (line {above.lineno})"
            if text := self.left_early(above, child):
                return text
            if above is function:
                break
            child = above
        return ""

    def left_early(self, above: ast.AST, child: ast.AST) -> str:
        """Return the setting under which a block is left before a statement of it: `if not args.x: return`."""
        for name in ("body", "orelse", "finalbody"):
            block = getattr(above, name, None)
            if not isinstance(block, list) or child not in block:
                continue
            for statement in block[: block.index(child)]:
                leaves = isinstance(statement, ast.If) and isinstance(
                    statement.body[-1], ast.Return | ast.Continue | ast.Break
                )
                if leaves and (text := self.undecided(statement.test, False)):
                    return text
        return ""

    def undecided(self, test: ast.expr, wanted: bool) -> str:
        """Return a test if it asks for a setting and does not come out as wanted by default, else ""."""
        while isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test, wanted = test.operand, not wanted
        bare = getattr(test, "id", "") or getattr(test, "attr", "")
        if bare in self.defaults:
            on = self.defaults[bare][1].strip().lower() not in ("", "0", "0.0", "false", "no", "off", "none")
            return "" if on == wanted else f"{self.said(bare)} (line {test.lineno})"
        asks = names_in(test)
        word = any(SWITCH_WORDS.search(name) for name in asks) or "environ" in asks or "getenv" in asks
        held = any(
            getattr(part.value, "id", "") in SETTINGS for part in ast.walk(test) if isinstance(part, ast.Attribute)
        )
        capital = any(name.isupper() and len(name) > 2 for name in variables(test))
        # a bare name is a parameter or a variable that somebody set; comparisons of data are no switches
        if "__name__" in asks or not (word or held or capital or isinstance(test, ast.Name)):
            return ""
        return f"`if {self.quote_node(test)}` (line {test.lineno})"

    def undecided_loop(self, loop: ast.For) -> str:
        """Return the setting that makes a loop of no turns by default, else ""."""
        off = sorted(name for name in names_in(loop.iter) & self.defaults.keys() if self.defaults[name][1] == "0")
        return f"{self.said(off[0])} (line {loop.lineno})" if off else ""

    def quote_node(self, node: ast.expr) -> str:
        """Return the text of an expression, shortened."""
        text = " ".join((ast.get_source_segment(self.text, node) or "").split())
        return text if len(text) <= 50 else text[:47] + "..."


# +---------------------------------------------------------------------------+
# | WRAPPERS                                                                  |
# +---------------------------------------------------------------------------+

DECODERS: dict[str, Callable[[bytes], bytes]] = {
    "base64.b85decode": base64.b85decode,
    "base64.a85decode": base64.a85decode,
    "base64.b64decode": base64.b64decode,
    "base64.b32decode": base64.b32decode,
    "base64.urlsafe_b64decode": base64.urlsafe_b64decode,
    "base64.decodebytes": base64.decodebytes,
    "binascii.unhexlify": binascii.unhexlify,
    "binascii.a2b_base64": binascii.a2b_base64,
    "bytes.fromhex": lambda data: bytes.fromhex(data.decode("ascii")),
}


def expand_lzma(data: bytes, call: ast.Call, limit: int) -> bytes:
    """Expand LZMA in a container, or raw LZMA2 if the call names filters."""
    if any(word.arg in ("filters", "format") for word in call.keywords) or len(call.args) > 1:
        if "FILTER_LZMA2" not in names_in(call) and 33 not in [getattr(n, "value", 0) for n in ast.walk(call)]:
            return lzma.LZMADecompressor(memlimit=2 * DICTIONARY).decompress(data, limit)
        filters = [{"id": lzma.FILTER_LZMA2, "dict_size": DICTIONARY}]
        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters).decompress(data, limit)
    return lzma.LZMADecompressor(memlimit=2 * DICTIONARY).decompress(data, limit)


def expand_zlib(data: bytes, call: ast.Call, limit: int) -> bytes:
    """Expand zlib, gzip or, if the call gives negative window bits, bare deflate."""
    bare = any(isinstance(part, ast.USub) for part in ast.walk(call))
    return zlib.decompressobj(-15 if bare else 47).decompress(data, limit)


EXPANDERS: dict[str, Callable[[bytes, ast.Call, int], bytes]] = {
    "lzma.decompress": expand_lzma,
    "zlib.decompress": expand_zlib,
    "gzip.decompress": expand_zlib,
    "bz2.decompress": lambda data, _, limit: bz2.BZ2Decompressor().decompress(data, limit),
    "brotli.decompress": lambda data, _, limit: brotli.Decompressor().process(data, output_buffer_limit=limit),
    "zstandard.decompress": lambda data, _, limit: (
        zstandard.ZstdDecompressor(max_window_size=DICTIONARY).stream_reader(data).read(limit)
    ),
}
DAMAGED = (ValueError, lzma.LZMAError, zlib.error, OSError, EOFError, brotli.error, zstandard.ZstdError, LookupError)


class Literals:
    """Values of expressions that consist of literals, decoders and decompressors. Nothing else has a value here."""

    def __init__(self, source: Source) -> None:
        self.source, self.known = source, {}
        for node in source.tree.body:
            for target, value in assigned(node):
                if isinstance(target, ast.Name):
                    # a name that is assigned twice has no single value
                    self.known[target.id] = None if target.id in self.known else value
        self.values: dict[str, bytes | str | None] = {}

    def value(self, node: ast.AST | None) -> bytes | str | None:
        """Return the bytes or text of an expression, None if it has anything else in it. Refused if it is too large."""
        match node:
            case ast.Constant(value=bytes() | str() as found):
                return found
            case ast.Name(id=name) if name in self.values or name in self.known:
                if name not in self.values:
                    self.values[name] = None  # a name that is made of itself has none
                    self.values[name] = self.value(self.known[name])
                return self.values[name]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                a, b = self.value(left), self.value(right)
                if type(a) is not type(b) or a is None:
                    return None
                if len(a) + len(b) > MAX_LITERAL:
                    raise Refused(f"its literals have over {MAX_LITERAL:,} bytes")
                return a + b
            case ast.Call():
                return self.call(node)
        return None

    def call(self, node: ast.Call) -> bytes | str | None:
        """Return what a decoder, a decompressor or .decode() makes of a literal."""
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("decode", "encode"):
            inner = self.value(node.func.value)
            words = [word.value for word in node.args if isinstance(word, ast.Constant)]
            coding = words[0] if words and isinstance(words[0], str) else "utf-8"
            return getattr(inner, node.func.attr)(coding) if isinstance(inner, bytes | str) else None
        name = self.source.dotted(node.func)
        if name not in DECODERS | EXPANDERS or not node.args:
            return None
        inner = self.value(node.args[0])
        data = inner.encode("latin-1") if isinstance(inner, str) else inner
        if data is None:
            return None
        if name in DECODERS:
            return DECODERS[name](data)
        found = EXPANDERS[name](data, node, MAX_UNPACKED + 1)
        if len(found) > MAX_UNPACKED:
            raise Refused(f"{name} gives over {MAX_UNPACKED:,} bytes from {len(data):,}")
        return found


def unpack(source: Source, layers: int = MAX_LAYERS) -> Iterator[Source | tuple[str, int, str]]:
    """Yield the programs inside a program's literals, layer by layer; (file, line, reason) for what stays closed."""
    literals, number = Literals(source), 0
    for node in source.nodes:
        runs = called(node) in ("exec", "eval") and isinstance(node.func, ast.Name) and node.args
        opens = isinstance(node, ast.Call) and source.dotted(node.func) in EXPANDERS
        inside = opens and any(called(above) in ("exec", "eval", "decompress") for above in source.above(node))
        if not runs and (not opens or inside):
            continue
        inner, line = node.args[0] if runs else node, f"`{source.quote(node.lineno)}`"
        if called(inner) == "compile" and inner.args:
            inner = inner.args[0]
        try:
            found = literals.value(inner)
            text = found.decode("utf-8") if isinstance(found, bytes) else found
        except (Refused, RecursionError, MemoryError, *DAMAGED) as error:
            yield source.name, node.lineno, f"{line}: {str(error) or type(error).__name__}"
            continue
        if text is None:
            if runs:
                yield source.name, node.lineno, f"{line}: it runs code that is not a literal of this file"
            continue
        if layers == 0:
            yield source.name, node.lineno, f"{line}: more than {MAX_LAYERS} wrappers inside one another"
            continue
        number += 1
        whole = Source(f"{source.name}>{number}", text, source.told)
        if runs or (whole.tree.body and not whole.wrong):  # other literals may be tables
            yield whole
            yield from unpack(whole, layers - 1)
