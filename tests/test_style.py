"""The countable part of the house style, checked over every Python file of the repository.

Each rule is a function from a parsed file to a list of violations ("file:line what"). `PLANTED` holds, for every rule,
a source that breaks it and one that does not, so that no rule can silently stop working.
"""

from __future__ import annotations

import ast
import functools
import io
import os
import re
import shutil
import subprocess
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "train_gpt.py"

MAX_FUNCTION_LINES, MAX_TEST_LINES = 80, 100
MAX_NESTING = 4
MAX_PARAMETERS = 8
MAX_UNDOCUMENTED_LINES = 5
MAX_LINE_LENGTH = 120
MAX_PROGRAM_LINES = 4_900  # of code: blank lines, comments and docstrings are there to be read, and are not counted
MAX_ENVIRON_READS = 2
MAX_FILE_BYTES = 1_000_000

LAYOUT = frozenset(
    "train_gpt.py pack_artifact.py requirements.txt README.md LICENSE pyproject.toml .gitignore .gitattributes "
    "records data tests .ci".split()
)
AXES = frozenset(
    "mixers attn_gate attn_extras embed_extras loader average qat matrix_quant embed_quant repair rotate compressor "
    "eval ttt_context".split()
)
# Calls that a module-level table may make: they build a value and touch nothing outside it.
PURE_CALLS = frozenset("dict float frozenset int len max min namedtuple range set sorted tuple TypeVar".split())
PURE_METHODS = frozenset(
    "compile device dtype encode finfo fromkeys log MappingProxyType signature split sqrt Struct".split()
)

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)


@dataclass(frozen=True)
class Source:
    """One parsed file; `path` is relative to the repository, with forward slashes."""

    path: str
    text: str
    tree: ast.Module

    @property
    def is_test(self) -> bool:
        return self.path.startswith("tests/")

    def at(self, node: ast.AST | int, what: str) -> str:
        line = node if isinstance(node, int) else getattr(node, "lineno", 0)
        return f"{self.path}:{line} {what}"

    def functions(self) -> Iterator[FunctionNode]:
        return (node for node in ast.walk(self.tree) if isinstance(node, FunctionNode))


def parse(path: str, text: str) -> Source:
    return Source(path, text, ast.parse(text, filename=path))


# Which files


def files_by_git(root: Path) -> list[str] | None:
    """Tracked and new files that git does not ignore, or None where `root` is no work tree or git is absent."""
    if shutil.which("git") is None or not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, check=False)
    if listing.returncode != 0:
        return None
    names = listing.stdout.decode("utf-8").split("\0")
    return sorted({name for name in names if name and (root / name).is_file()})


def files_by_walk(root: Path) -> list[str]:
    """The same without git: everything but caches, environments, and what .gitignore names as written by runs."""
    written_by_runs = r"(data/[^/]+|logs|records/[^/]+/run|\.git|\.venv)"
    caches = r"(.*/)?(__pycache__|\.[a-z]+_cache|\.hypothesis)"
    generated = re.compile(f"{written_by_runs}|{caches}")
    found = []
    for folder, subfolders, names in os.walk(root):
        here = Path(folder).relative_to(root)
        subfolders[:] = [name for name in subfolders if not generated.fullmatch((here / name).as_posix())]
        found += [(here / name).as_posix() for name in names if not name.endswith(".pyc")]
    return sorted(found)


def repository_files(root: Path = ROOT) -> list[str]:
    by_git = files_by_git(root)
    return files_by_walk(root) if by_git is None else by_git


FILES = repository_files()
PYTHON_FILES = [name for name in FILES if name.endswith(".py")]


@functools.cache
def load(path: str) -> Source:
    return parse(path, (ROOT / path).read_text(encoding="utf-8"))


# Rules for every Python file


def function_length(source: Source) -> list[str]:
    limit = MAX_TEST_LINES if source.is_test else MAX_FUNCTION_LINES
    sizes = ((node, (node.end_lineno or node.lineno) - node.lineno + 1) for node in source.functions())
    return [source.at(node, f"{node.name} has {size} lines, over {limit}") for node, size in sizes if size > limit]


def nesting_depth(node: ast.AST, depth: int = 0) -> int:
    """Deepest block inside `node`; an elif counts as the if that it continues."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        opens = isinstance(child, BLOCKS) and not is_elif
        deepest = max(deepest, nesting_depth(child, depth + 1 if opens else depth))
    return deepest


def nesting(source: Source) -> list[str]:
    depths = ((node, nesting_depth(node)) for node in source.functions())
    deep = ((node, depth) for node, depth in depths if depth > MAX_NESTING)
    return [source.at(node, f"{node.name} nests {depth} deep, over {MAX_NESTING}") for node, depth in deep]


def methods_of(tree: ast.Module) -> set[int]:
    """Ids of the functions whose first parameter is self or cls by position."""
    found = set()
    for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in owner.body:
            decorators = {d.id for d in getattr(node, "decorator_list", []) if isinstance(d, ast.Name)}
            if isinstance(node, FunctionNode) and "staticmethod" not in decorators:
                found.add(id(node))
    return found


def parameters(node: FunctionNode, is_method: bool) -> list[ast.arg]:
    """All parameters that a caller fills in, *args and **kwargs included, self and cls not."""
    positional = [*node.args.posonlyargs, *node.args.args][1 if is_method else 0 :]
    variadic = [arg for arg in (node.args.vararg, node.args.kwarg) if arg is not None]
    return [*positional, *node.args.kwonlyargs, *variadic]


def parameter_count(source: Source) -> list[str]:
    methods = methods_of(source.tree)
    counts = ((node, len(parameters(node, id(node) in methods))) for node in source.functions())
    return [
        source.at(node, f"{node.name} takes {count} parameters, over {MAX_PARAMETERS}")
        for node, count in counts
        if count > MAX_PARAMETERS
    ]


def typed_signatures(source: Source) -> list[str]:
    methods, found = methods_of(source.tree), []
    for node in source.functions():
        bare = [arg.arg for arg in parameters(node, id(node) in methods) if arg.annotation is None]
        bare += ["return"] if node.returns is None else []
        if bare:
            found.append(source.at(node, f"{node.name} has no type for {', '.join(bare)}"))
    return found


def docstrings(source: Source) -> list[str]:
    """Tests are exempt (their names speak), and so is __init__ (its class's docstring speaks)."""
    if source.is_test:
        return []
    sizes = ((node, (node.end_lineno or node.lineno) - node.body[0].lineno + 1) for node in source.functions())
    return [
        source.at(node, f"{node.name} has {size} lines and no docstring")
        for node, size in sizes
        if size > MAX_UNDOCUMENTED_LINES and node.name != "__init__" and ast.get_docstring(node) is None
    ]


def is_idle(node: ast.stmt) -> bool:
    """pass, continue, ... or a lone string"""
    return isinstance(node, ast.Pass | ast.Continue) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )


def silent_excepts(source: Source) -> list[str]:
    """A bare except anywhere, and a handler that catches everything and does nothing."""
    found = []
    for node in (n for n in ast.walk(source.tree) if isinstance(n, ast.ExceptHandler)):
        names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else set()
        idle = all(is_idle(line) for line in node.body)
        if node.type is None:
            found.append(source.at(node, "bare except"))
        elif idle and names & {"Exception", "BaseException"}:
            found.append(source.at(node, "catches every exception and does nothing"))
    return found


def global_statements(source: Source) -> list[str]:
    return [source.at(node, "global statement") for node in ast.walk(source.tree) if isinstance(node, ast.Global)]


def local_imports(source: Source) -> list[str]:
    inside = (inner for node in source.functions() for inner in ast.walk(node))
    lines = {inner.lineno for inner in inside if isinstance(inner, ast.Import | ast.ImportFrom)}
    return [source.at(line, "import inside a function") for line in sorted(lines)]


def line_length(source: Source) -> list[str]:
    widths = enumerate(map(len, source.text.splitlines()), start=1)
    return [source.at(number, f"{w} columns, over {MAX_LINE_LENGTH}") for number, w in widths if w > MAX_LINE_LENGTH]


def names_axis(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in AXES


def compares_axis(node: ast.AST) -> bool:
    """`cfg.eval == ...` either way round, `cfg.eval in ...`, `match cfg.eval`.

    Allowed: a test for None, which asks about structure, and `... in cfg.attn_extras`, which is how an axis that is a
    set gets read.
    """
    if isinstance(node, ast.Match):
        return names_axis(node.subject)
    if not isinstance(node, ast.Compare) or all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
        return False
    equal_to = [side for op, side in zip(node.ops, node.comparators, strict=True) if isinstance(op, ast.Eq | ast.NotEq)]
    return any(names_axis(side) for side in (node.left, *equal_to))


def axis_comparisons(source: Source) -> list[str]:
    """Axes index tables. Exempt: tests, the module-level list of illegal pairs, and the method `problems` over it."""
    if source.is_test:
        return []
    exempt_roots = [node for node in source.tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    exempt_roots += [node for node in source.functions() if node.name == "problems"]
    exempt = {id(inner) for node in exempt_roots for inner in ast.walk(node)}
    hits = (node for node in ast.walk(source.tree) if id(node) not in exempt and compares_axis(node))
    return [source.at(getattr(n, "subject", n), "compares an axis; index a table of its values instead") for n in hits]


# Rules for train_gpt.py alone


def is_pure_call(node: ast.Call) -> bool:
    """Constructors (capitalised names) and the few builders in PURE_CALLS and PURE_METHODS."""
    if isinstance(node.func, ast.Name):
        return node.func.id in PURE_CALLS or node.func.id.lstrip("_")[:1].isupper()
    return isinstance(node.func, ast.Attribute) and node.func.attr in PURE_METHODS


def evaluated(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that runs when `node` does: lambda bodies do not."""
    yield node
    if not isinstance(node, ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from evaluated(child)


def is_constant_assignment(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    plain = all(isinstance(target, ast.Name | ast.Tuple) for target in targets)
    calls = (inner for inner in evaluated(node) if isinstance(inner, ast.Call))
    return plain and all(is_pure_call(call) for call in calls)


def is_optional_import(node: ast.stmt) -> bool:
    """try: import x / except ImportError: x = None"""
    if not isinstance(node, ast.Try):
        return False
    handled = [line for handler in node.handlers for line in handler.body]
    lines = [*node.body, *handled, *node.orelse, *node.finalbody]
    return all(isinstance(line, ast.Import | ast.ImportFrom) or is_constant_assignment(line) for line in lines)


def is_allowed_at_top(node: ast.stmt) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef | FunctionNode):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
    return is_constant_assignment(node) or is_optional_import(node)


def module_level_work(source: Source) -> list[str]:
    found = [node for node in source.tree.body if not is_allowed_at_top(node)]
    return [source.at(node, f"module-level work: {ast.unparse(node).splitlines()[0][:60]}") for node in found]


def environment_reads(source: Source) -> list[str]:
    """os.environ in any form, os.getenv, os.putenv; allowed in two places (Config, Runtime)."""
    banned = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    attributes = [n for n in ast.walk(source.tree) if isinstance(n, ast.Attribute) and n.attr in banned]
    imports = [n for n in ast.walk(source.tree) if isinstance(n, ast.ImportFrom) and {a.name for a in n.names} & banned]
    hits = sorted(node.lineno for node in [*attributes, *imports])
    return [source.at(line, "reads the environment outside Config and Runtime") for line in hits[MAX_ENVIRON_READS:]]


def code_lines(source: Source) -> set[int]:
    """Numbers of the lines that hold code."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source.text).readline)
    held = {n for t in tokens if t.type not in silent for n in range(t.start[0], t.end[0] + 1)}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    owners = (node for node in ast.walk(source.tree) if isinstance(node, documented) and ast.get_docstring(node))
    return held - {n for node in owners for n in range(node.body[0].lineno, node.body[0].end_lineno + 1)}


def program_length(source: Source) -> list[str]:
    count = len(code_lines(source))
    return [source.at(count, f"{count} lines of code, over {MAX_PROGRAM_LINES}")] if count > MAX_PROGRAM_LINES else []


def banners(source: Source) -> list[str]:
    """Boxed banners, three lines of equal width at column 0, numbered 01, 02, 03 ... without a gap."""
    lines, numbers, found = source.text.splitlines(), [], []
    for index, line in enumerate(lines):
        if not line.startswith("# |"):
            continue
        title = re.fullmatch(r"# \| (\d\d) \S.*\|", line)
        box = [lines[index - 1] if index else "", lines[index + 1] if index + 1 < len(lines) else ""]
        boxed = all(re.fullmatch(r"# \+-+\+", edge) and len(edge) == len(line) for edge in box)
        if not title or not boxed:
            found.append(source.at(index + 1, "a banner is `# | NN NAME |` between two `# +---+` lines of its width"))
            continue
        numbers.append(int(title[1]))
        if numbers[-1] != len(numbers):
            found.append(source.at(index + 1, f"section {numbers[-1]:02d} stands where {len(numbers):02d} is due"))
    return found if numbers or found else [source.at(1, "no section banner")]


Rule = Callable[[Source], list[str]]
GENERAL_RULES: tuple[Rule, ...] = (
    function_length,
    nesting,
    parameter_count,
    typed_signatures,
    docstrings,
    silent_excepts,
    global_statements,
    local_imports,
    line_length,
    axis_comparisons,
)
PROGRAM_RULES: tuple[Rule, ...] = (module_level_work, environment_reads, program_length, banners)


def rule_name(rule: Rule) -> str:
    return rule.__name__


@pytest.mark.parametrize("path", PYTHON_FILES)
@pytest.mark.parametrize("rule", GENERAL_RULES, ids=rule_name)
def test_python_file_keeps_rule(rule: Rule, path: str) -> None:
    violations = rule(load(path))
    assert not violations, "\n" + "\n".join(violations)


@pytest.mark.skipif(PROGRAM not in FILES, reason=f"no {PROGRAM} yet")
@pytest.mark.parametrize("rule", PROGRAM_RULES, ids=rule_name)
def test_program_keeps_rule(rule: Rule) -> None:
    violations = rule(load(PROGRAM))
    assert not violations, "\n" + "\n".join(violations)


# Rules for the repository as a whole


def layout_violations(files: list[str]) -> list[str]:
    top = {name.split("/", 1)[0] for name in files}
    return [f"{name} is not part of the agreed layout" for name in sorted(top - LAYOUT)]


def oversized(root: Path, files: list[str]) -> list[str]:
    sizes = ((name, (root / name).stat().st_size) for name in files)
    return [f"{name}: {size:,} bytes, over {MAX_FILE_BYTES:,}" for name, size in sizes if size > MAX_FILE_BYTES]


def machine_paths(root: Path, files: list[str], home: Path) -> list[str]:
    """Lines with this checkout's path, this user's home, or anything below a home directory of a usual shape."""
    places = [str(place) for place in (root, home) if len(place.parts) > 1]
    exact = "|".join(re.escape(place) for place in places) or "(?!)"
    usual = "|".join(("/" + "home/[a-z]", "/" + "Users/[A-Za-z]", "/" + "root/"))
    pattern = re.compile(rf"(?<![\w./$}}*-])(?:(?:{exact})(?![\w-])|{usual})")
    found = []
    for name in files:
        content = (root / name).read_bytes()
        if b"\0" in content:
            continue
        lines = enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1)
        found += [f"{name}:{number} names a path of one machine" for number, line in lines if pattern.search(line)]
    return found


def test_top_level_is_the_agreed_layout() -> None:
    assert not layout_violations(FILES)


def test_no_file_is_large() -> None:
    assert not oversized(ROOT, FILES)


def test_no_file_names_a_path_of_one_machine() -> None:
    violations = machine_paths(ROOT, FILES, Path.home())
    assert not violations, "\n" + "\n".join(violations)


# The rules themselves: each must find what breaks it, and only that


def lines_of(template: str, count: int) -> str:
    return "".join(template.format(i=i) for i in range(count))


DOCUMENTED = '# Why.\n\ndef f():\n    """What.\n\n    Why."""\n'
BOX = "# +" + "-" * 20 + "+\n"
TITLE_1, TITLE_2, TITLE_3 = (f"# | {number:02d} {'NAME':<16}|\n" for number in (1, 2, 3))
TYPED = "def f() -> None:\n"

# rule -> (source that breaks it, line of the violation, source that keeps it)
PLANTED: dict[Rule, tuple[str, int, str]] = {
    function_length: (
        TYPED + lines_of("    x{i} = {i}\n", MAX_FUNCTION_LINES),
        1,
        TYPED + lines_of("    x{i} = {i}\n", MAX_FUNCTION_LINES - 1),
    ),
    nesting: (
        "x = 1\ndef f(a):\n for b in a:\n  if b:\n   with b:\n    while b:\n     try: b()\n     finally: b()\n",
        2,
        "def f(a):\n for b in a:\n  if b:\n   with b:\n    if b: b()\n    elif a: a()\n    elif f: b()\n",
    ),
    parameter_count: (
        "def f(a, b, c, d, e, f, g, /, h, *i): ...\n",
        1,
        "class C:\n def m(self, a, b, c, d, *, e, f, g, h): ...\n",
    ),
    typed_signatures: (
        "class C:\n def m(self, a: int, *rest) -> None: ...\n",
        2,
        "class C:\n def m(self, a: int) -> None: ...\n @staticmethod\n def s(b: int) -> int: ...\ng = lambda x: x\n",
    ),
    docstrings: (
        TYPED + lines_of("    x{i} = {i}\n", 6),
        1,
        TYPED + lines_of("    x{i} = {i}\n", 5) + "def g() -> None:\n    'Why.'\n" + lines_of("    x{i} = {i}\n", 6),
    ),
    silent_excepts: (
        "try:\n    f()\nexcept (ValueError, Exception):\n    pass\n",
        3,
        "try:\n    f()\nexcept ValueError:\n    pass\nexcept Exception as problem:\n    raise KeyError from problem\n",
    ),
    global_statements: ("x = 0\ndef f():\n    global x\n    x = 1\n", 3, "x = 0\ndef f():\n    x = 1\n    return x\n"),
    local_imports: ("def f():\n    if f:\n        from os import path\n", 3, "import os\ndef f():\n    return os\n"),
    line_length: ("\nx = '" + "y" * 115 + "'\n", 2, "x = '" + "y" * 114 + "'\n"),
    axis_comparisons: (
        "def f(cfg):\n    return cfg.eval == 'plain'\n",
        2,
        "ILLEGAL = [(lambda c: c.average == 'swa', 'no')]\n"
        "def f(cfg):\n    return TABLE[cfg.eval], cfg.loader is None, 'xsa' in cfg.attn_extras, cfg.lr == 1\n"
        "class C:\n    def problems(self):\n        return self.qat == 'ste'\n",
    ),
    module_level_work: (
        "import torch\ntorch.manual_seed(1)\n",
        2,
        "'''Map.'''\nfrom __future__ import annotations\nimport re\n"
        "try:\n    import brotli\nexcept ImportError:\n    brotli = None\n"
        "A, B = 1, 2\nPATTERN = re.compile('x')\nT: dict = {'a': Row(1), 'b': lambda x: open(x)}\n"
        "class C:\n    x = knob(1)\n"
        "if __name__ == '__main__':\n    main()\n",
    ),
    environment_reads: (
        "import os\na = os.environ\nb = os.environ['X']\nc = os.getenv('Y')\n",
        4,
        "import os\na = os.environ\nb = os.environ['X']\n",
    ),
    program_length: ("x = 1\n" * (MAX_PROGRAM_LINES + 1), MAX_PROGRAM_LINES + 1, DOCUMENTED * MAX_PROGRAM_LINES),
    banners: (
        BOX + TITLE_1 + BOX + BOX + TITLE_3 + BOX,
        5,
        BOX + TITLE_1 + BOX + "x = 1\n" + BOX + TITLE_2 + BOX,
    ),
}
# Further sources that break a rule in a way of their own.
ALSO_PLANTED: tuple[tuple[Rule, str, int], ...] = (
    (silent_excepts, "try:\n    f()\nexcept:\n    raise\n", 3),
    (silent_excepts, "for x in y:\n    try:\n        f()\n    except BaseException:\n        ...\n", 4),
    (typed_signatures, "def f(a: int):\n    return a\n", 1),
    (typed_signatures, "class C:\n @staticmethod\n def s(b) -> int: ...\n", 3),
    (axis_comparisons, "def f(cfg):\n    return 'ste' != cfg.qat\n", 2),
    (axis_comparisons, "def f(cfg):\n    return cfg.eval in ('slot', 'plain')\n", 2),
    (axis_comparisons, "def f(cfg):\n    match cfg.compressor:\n        case 'lzma':\n            return 1\n", 2),
    (
        axis_comparisons,
        "class C:\n    def f(self, x):\n        if self.cfg.attn_gate != 'none':\n            return x\n",
        3,
    ),
    (module_level_work, "x = open('y')\n", 1),
    (module_level_work, "x = {'a': [torch.zeros(1)]}\n", 1),
    (module_level_work, "for x in range(3):\n    pass\n", 1),
    (module_level_work, "try:\n    import a\nexcept ImportError:\n    install('a')\n", 1),
    (module_level_work, "import torch\ntorch.x.y = 3\n", 2),
    (environment_reads, "from os import environ\na = b.environ\nc = d.environ\n", 3),
    (banners, "x = 1\n", 1),
    (banners, TITLE_1, 1),
    (banners, BOX + TITLE_1 + "# +--+\n", 2),
)
BREAKING = [(rule, bad, line) for rule, (bad, line, _) in PLANTED.items()] + list(ALSO_PLANTED)


def planted_id(value: object) -> str:
    return rule_name(value) if callable(value) else ""


@pytest.mark.parametrize("rule", [*GENERAL_RULES, *PROGRAM_RULES], ids=rule_name)
def test_every_rule_has_a_planted_violation(rule: Rule) -> None:
    assert rule in PLANTED


@pytest.mark.parametrize(("rule", "bad", "line"), BREAKING, ids=planted_id)
def test_rule_finds_planted_violation(rule: Rule, bad: str, line: int) -> None:
    violations = rule(parse("planted.py", bad))
    assert len(violations) == 1, violations
    assert violations[0].startswith(f"planted.py:{line} "), violations


@pytest.mark.parametrize("rule", PLANTED, ids=rule_name)
def test_rule_accepts_clean_source(rule: Rule) -> None:
    assert rule(parse("planted.py", PLANTED[rule][2])) == []


def test_test_files_may_have_longer_functions_without_docstrings() -> None:
    body = lines_of("    x{i} = {i}\n", MAX_FUNCTION_LINES)
    planted = parse("tests/test_x.py", TYPED + body)
    assert function_length(planted) == docstrings(planted) == []
    assert function_length(parse("tests/test_x.py", TYPED + body + lines_of("    y{i} = {i}\n", 20)))


def test_layout_rule_finds_a_stray_file() -> None:
    assert layout_violations(["train_gpt.py", "notes/a.md", "notes/b.md", "x.py"]) == [
        "notes is not part of the agreed layout",
        "x.py is not part of the agreed layout",
    ]


def test_size_rule_finds_a_large_file(tmp_path: Path) -> None:
    (tmp_path / "fits").write_bytes(bytes(MAX_FILE_BYTES))
    (tmp_path / "large").write_bytes(bytes(MAX_FILE_BYTES + 1))
    assert oversized(tmp_path, ["fits", "large"]) == ["large: 1,000,001 bytes, over 1,000,000"]


def test_path_rule_finds_checkout_home_and_usual_homes(tmp_path: Path) -> None:
    home = Path("/") / "srv" / "people" / "ada"
    text = f"ok /usr/bin\nx = '{tmp_path}/data'\ncd {home}\n{home}-else\n$X/home/y\nsee {'/' + 'home'}/bob/z\n"
    (tmp_path / "log.txt").write_text(text, encoding="utf-8")
    (tmp_path / "blob").write_bytes(b"\0" + bytes(home))
    found = [violation.split()[0] for violation in machine_paths(tmp_path, ["log.txt", "blob"], home)]
    assert found == ["log.txt:2", "log.txt:3", "log.txt:6"]
    # a home of "/" must not match every path, nor break the rule
    assert len(machine_paths(tmp_path, ["log.txt"], Path("/"))) == 2


def test_walk_and_git_agree_on_python_files() -> None:
    if files_by_git(ROOT) is None:
        pytest.skip("this checkout is not under git")
    walked = {name for name in files_by_walk(ROOT) if name.endswith(".py")}
    assert set(PYTHON_FILES) <= walked
