"""The judge on a stranger's folder: its program is read, its logs are added up again, and nothing of it is run.

A folder as the contest's community submits them: train_gpt.py (a script or a self-extracting wrapper), logs, README.md
and submission.json, no record.env. A check fails only where arithmetic or the source itself proves it. A suspicion, and
every question that only a run could answer, is unknown, with what would settle it. So the verdict on such a folder is
"NOT legal" or "undecided", hardly ever "legal".
"""

from __future__ import annotations

import ast
import hashlib
import math
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pack_artifact import CAP_BYTES, MAGIC, SPLIT_MODEL
from records import papers
from records.claims import (
    BUDGET_SECONDS,
    CANONICAL,
    CLOCK_SLACK,
    FAIL,
    INVALID_TOTAL,
    NEAR,
    PASS,
    TARGETS,
    UNKNOWN,
    Candidate,
    Check,
    decide,
    number,
)
from records.foreign_rules import DATA_RULES, RULES, Finding, Rule
from records.foreign_source import QUOTED, Source, unpack
from train_gpt import UserError

PROGRAM, LARGEST = "train_gpt.py", 64_000_000  # bytes of a file that is read
MANY_FILES, LONGEST_LINE, HEAD = 2_000, 1_000, 4_000  # files, characters of a line, of a log's beginning
CODE_SUFFIXES = frozenset(".py .c .cc .cpp .cu .h .hpp .rs .so .pyx .sh".split())
VALIDATION_BYTES = 151_080_891  # of the contest's validation text, whatever the tokenizer; canonical totals lie within
FAR = 0.01  # share of them: the smallest miscounting known has 4 %
ALLOWED_MODULES = frozenset(
    "torch numpy sentencepiece triton brotli zstandard scipy tqdm flash_attn flash_attn_interface flash_attn_3 fla "
    "huggingface_hub tokenizers transformers datasets numba einops tiktoken lz4 psutil setuptools packaging".split()
)


def is_foreign(folder: Path) -> bool:
    """Return whether a folder holds somebody's program: Python, neither one of our presets or runs, nor packed here."""
    if not folder.is_dir() or (folder / "record.env").exists():
        return False
    if (folder / "result.json").exists() and (folder / "model.bin").exists():
        return False
    program = folder / PROGRAM
    if not program.is_file():
        return any(path.is_file() for path in folder.glob("*.py"))
    with program.open("rb") as file:
        head = file.read(LARGEST)
    split = (
        (folder / SPLIT_MODEL).exists()
        and b"b85decode" in head
        and head.rpartition(b"\n")[0].rpartition(b"\n")[2][:1] == b"#"
    )
    return not (head.startswith(MAGIC[:16]) or split)


# +---------------------------------------------------------------------------+
# | FOLDER                                                                    |
# +---------------------------------------------------------------------------+


@dataclass
class Folder:
    """Somebody's folder: its files, read within limits; findings say what could not be read."""

    path: Path
    findings: list[str] = field(default_factory=list)

    @cached_property
    def files(self) -> dict[str, int]:
        """Regular files, by their path inside the folder, with their sizes. Links are not followed."""
        found: dict[str, int] = {}
        for path in sorted(self.path.rglob("*")):
            if "__pycache__" in path.parts or any(part.startswith(".") for part in path.relative_to(self.path).parts):
                continue
            try:
                status = path.lstat()
            except OSError as error:
                self.findings.append(f"{path.name} cannot be read ({error.strerror})")
                continue
            if stat.S_ISLNK(status.st_mode):
                self.findings.append(f"{path.name} is a link, which is not followed")
            elif stat.S_ISREG(status.st_mode):
                found[path.relative_to(self.path).as_posix()] = status.st_size
            if len(found) == MANY_FILES:
                self.findings.append(f"only the first {MANY_FILES:,} files are read")
                break
        return found

    def read(self, name: str) -> str:
        """Return a file's text, "" without it; damage becomes a finding, once."""
        if name not in self.files:
            return ""
        if self.files[name] > LARGEST:
            wrong = [f"{name} has {self.files[name]:,} bytes, too many to read"]
            text = ""
        else:
            text, wrong = papers.read_text(self.path / name)
        wrong = [finding.replace(f"{self.path}/", "") for finding in wrong]
        self.findings += [finding for finding in wrong if finding not in self.findings]
        return text

    @cached_property
    def program(self) -> str:
        """The name of the program: train_gpt.py, else the largest file whose name has "train", else the largest."""
        scripts = [name for name in self.files if name.endswith(".py") and "/" not in name]
        if PROGRAM in scripts:
            return PROGRAM
        named = [name for name in scripts if "train" in name] or scripts
        return max(named, key=lambda name: self.files[name], default="")

    @cached_property
    def sources(self) -> list[Source]:
        """The program, what is packed in it, and the modules of the folder that it imports."""
        return [part for part in self.opened if isinstance(part, Source)]

    @cached_property
    def opened(self) -> list[Source | tuple[str, int, str]]:
        """The sources, and (file, line, reason) for wrappers that stay closed."""
        found, waiting, seen = [], [self.program] if self.program else [], set()
        while waiting:
            name = waiting.pop(0)
            if name in seen:
                continue
            seen.add(name)
            source = Source(name, self.read(name), self.told)
            parts = [source, *unpack(source)]
            found += parts
            for part in parts:
                waiting += self.local(part) if isinstance(part, Source) else []
        return found

    @cached_property
    def logs(self) -> list[RunLog]:
        """The logs of training or scoring."""
        found = []
        for name in self.files:
            path = Path(name)
            if path.suffix in (".log", ".txt", ".out") and path.name != "requirements.txt" and "tokenizer" not in name:
                log = read_log(name, self.read(name))
                found += [log] if log.hits["score"] or log.hits["step"] else []
        return found

    @cached_property
    def told(self) -> dict[str, str]:
        """The settings on which all logs that print them agree."""
        found: dict[str, set[str]] = {}
        for log in self.logs:
            for key, value in log.settings[0].items():
                found.setdefault(key, set()).add(value)
        return {key: values.pop() for key, values in found.items() if len(values) == 1}

    def local(self, source: Source) -> list[str]:
        """Return the files of the folder that a source imports as modules."""
        wanted = {module.replace(".", "/") for module, _ in imports(source)}
        return [name for name in self.files if name.removesuffix("/__init__.py").removesuffix(".py") in wanted]

    @cached_property
    def helpers(self) -> list[str]:
        """Files of code that the program uses besides itself: modules, and what its text names and reads (C, CUDA)."""
        used = {source.name.partition(">")[0] for source in self.sources} - {self.program}
        words = {text for source in self.sources for node in source.nodes for text in constant(node)}
        read = {name for name in self.files if Path(name).suffix in CODE_SUFFIXES - {".py", ".sh"}}
        return sorted(used | {name for name in read if Path(name).name in words})


def constant(node: ast.AST) -> list[str]:
    """Return the text of a constant in a list, [] for anything else."""
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def imports(source: Source) -> Iterator[tuple[str, ast.AST]]:
    """Yield the modules that a source imports, and where; what it can do without (try) is left out."""
    for node in source.nodes:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(source.enclosing(node, (ast.Try, ast.FunctionDef)), ast.Try):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        else:
            yield (node.module or node.names[0].name), node


# +---------------------------------------------------------------------------+
# | SOURCE                                                                    |
# +---------------------------------------------------------------------------+


def found_check(rule: Rule, source: Source, finding: Finding) -> Check:
    """Return the check of one finding: FAIL if it is proven and runs with the logs' settings, else unknown."""
    line = finding.node.lineno
    where = f"{source.name}:{line}: `{source.quote(line)}`: {finding.words}"
    switch = source.switch(finding.node)
    if finding.proven and not switch:
        return Check(f"{rule.topic} {rule.name}", FAIL, where)
    depends = f"; depends on {switch}" if switch else ""
    return Check(f"{rule.topic} {rule.name}", UNKNOWN, f"{where}{depends}. Suspect; settled by {rule.settles}")


def rule_on(rule: Rule, source: Source) -> list[Check]:
    """Return the checks of what a rule finds in a source."""
    try:
        return [found_check(rule, source, finding) for finding in rule.find(source)]
    except RecursionError:
        return [Check(f"{rule.topic} {rule.name}", UNKNOWN, f"{source.name}: an expression is too long to be read")]


def rule_checks(folder: Folder) -> Iterator[Check]:
    """Every rule on every source; the rules of a topic that find nothing share a line."""
    others = [name for name in folder.files if name.endswith(".py") and name not in {s.name for s in folder.sources}]
    prepares = [Source(name, folder.read(name)) for name in others]
    silent: dict[str, list[str]] = {}
    for rule in (*RULES, *DATA_RULES):
        sources = [*folder.sources, *(prepares if rule in DATA_RULES else [])]
        checks = [check for source in sources for check in rule_on(rule, source)]
        yield from checks
        if not checks:
            silent.setdefault(rule.topic, []).append(rule.looks_for)
    whole = all(isinstance(part, Source) and not part.wrong for part in folder.opened)
    read = f"{sum(len(source.lines) for source in folder.sources):,} lines"
    for topic, looked in silent.items():
        words = f"not seen in {read}{'' if whole else ', and not all of the program can be read'}"
        yield Check(f"{topic} source", PASS if whole else UNKNOWN, f"{words}: {'; '.join(looked)}")


def form_checks(folder: Folder) -> Iterator[Check]:
    """Whether the program can be read at all, and stands alone."""
    if folder.program != PROGRAM:
        yield Check("size form", UNKNOWN, f"no {PROGRAM}; {folder.program or 'nothing'} is read in its place")
    wrong = [f"{s.name}:{s.wrong[0]}: `{s.quote(s.wrong[0])}`: {s.wrong[1]}" for s in folder.sources if s.wrong]
    names = ", ".join(f"{source.name} ({len(source.lines):,} lines)" for source in folder.sources)
    # a newer Python may parse it
    python = f"not the syntax of Python {sys.version_info.major}.{sys.version_info.minor}: "
    yield Check("source parses", UNKNOWN if wrong else PASS, python + "; ".join(wrong) if wrong else names)
    for name, line, reason in (part for part in folder.opened if not isinstance(part, Source)):
        yield Check("source wrapper", UNKNOWN, f"{name}:{line}: {reason}; ship the program as text beside it")
    required = set(
        re.findall(r"^\s*([A-Za-z][\w.-]*)", folder.read("requirements.txt").replace("-", "_"), re.MULTILINE)
    )
    known = sys.stdlib_module_names | ALLOWED_MODULES | {name.lower() for name in required}
    own = {name.partition("/")[0].removesuffix(".py") for name in folder.files}
    missing = []
    for source in folder.sources:
        for module, node in imports(source):
            top = module.partition(".")[0]
            relative = isinstance(node, ast.ImportFrom) and node.level
            if (relative or top.lower() not in known) and top not in own:
                missing.append(f"{source.name}:{node.lineno}: `{source.quote(node.lineno)}`")
    detail = f"{'; '.join(missing)}: in neither the folder nor requirements.txt"
    yield Check(
        "alone modules", UNKNOWN if missing else PASS, detail if missing else "each import is known or in the folder"
    )


# +---------------------------------------------------------------------------+
# | LOGS                                                                      |
# +---------------------------------------------------------------------------+

NUMBER = r"([-+]?\d[\d_,]*\.?\d*(?:[eE][-+]?\d+)?|[-+]?nan|[-+]?inf)"
# What the community's programs print: name -> pattern, on one line of a log.
LINES: dict[str, re.Pattern[str]] = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        "score": rf"^(.*?)\bval_loss\s*[:=]?\s*{NUMBER},?\s+val_bpb\s*[:=]?\s*{NUMBER}",
        "step": r"(?:^|[^\w])(?:step\s*[:=]\s*)?(\d+)/(\d+)\s+(?:train_loss|val_loss)",
        "stop": r"stopping_early.*?\bstep\s*[:=]\s*(\d+)/",
        "train_ms": rf"train_time\s*[:=]\s*{NUMBER}\s*(ms|s|m)\b",
        "eval_ms": rf"eval_time\s*[:=]\s*{NUMBER}\s*(ms|s)\b",
        "total_eval": rf"total_eval_(?:time|wallclock)\s*[:=]\s*{NUMBER}\s*(ms|s)\b",
        "hessians": rf"(?:hessian|calibrat)\w*\b.*?{NUMBER}\s*(ms|s)\b",
        "total": rf"total submission size([^:]*):\s*{NUMBER}\s*bytes",
        "model": rf"serialized model (\S+)\s*:\s*{NUMBER}\s*bytes",
        "code": rf"code size([^:]*):\s*{NUMBER}\s*bytes",
        "seed": r"(?:^|\s)seed\s*[:=]\s*(\d+)\b",
        "scored": rf"(?:target_tokens|scored_tokens|tokens_scored)\s*[:=]\s*{NUMBER}",
        "tokens": rf"(?:val_tokens|val_loader:.*?tokens)\s*[:=]\s*{NUMBER}",
        "bytes": rf"(?:scored_bytes|bytes_scored|val_bytes|byte_count)\s*[:=]\s*{NUMBER}",
        "gates": rf"\b(?:within|word)_gate\s*[:=]\s*{NUMBER}",
        "heading": r"^\W*hyper-?parameters\W*$",
        "rule": r"^[=-]{10,}$",
        "setting": r"^\s*([a-z][a-z0-9_]*)\s*:\s*(\S.*?)\s*$",
    }.items()
}
UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0}
PASSING = re.compile(r"^\W*(step\b|\d+/\d+|diagnostic|pre-?quant)|post.?ema|post_avg", re.IGNORECASE)
PRIVATE = re.compile(
    r"(^|_)(seeds?|run_id|paths?|dir|files?|host(name)?|device|date|time|log(file)?|port|uuid|ms|pid|tag)(_|$)|^(local_)?rank$"
)


class Hit(NamedTuple):
    """One line that a pattern matched: its number, and its groups."""

    line: int
    groups: tuple[str, ...]


def to_number(word: str) -> float:
    """Return the number in a word of a log; NaN if it is not finite."""
    try:
        found = float(word.replace(",", "").replace("_", ""))
    except ValueError:
        return math.nan
    return found if math.isfinite(found) else math.nan


def decimals(word: str) -> int:
    """Return how many digits a number has after its point."""
    return len(word.partition(".")[2])


@dataclass
class RunLog:
    """What one log says. hits: by the names in LINES, in order; code: the program's text that it was opened with."""

    name: str
    hits: dict[str, list[Hit]]
    code: str
    text: str

    @property
    def final(self) -> Hit | None:
        """The line with the final score: the last that is not about a step or a diagnostic evaluation."""
        scores = self.hits["score"]
        ends = [hit for hit in scores if not PASSING.search(hit.groups[0])]
        return (ends or [None])[-1]

    @property
    def loss(self) -> float:
        """The final val_loss, NaN without one."""
        return to_number(self.final.groups[1]) if self.final else math.nan

    @property
    def bpb(self) -> float:
        """The final val_bpb, NaN without one."""
        return to_number(self.final.groups[2]) if self.final else math.nan

    @property
    def seed(self) -> str:
        """The seed that it names, else the one in its file's name, else ""."""
        if self.hits["seed"]:
            return self.hits["seed"][-1].groups[0]
        named = re.search(r"s(?:eed)?_?(\d+)", Path(self.name).stem)
        return named[1] if named else ""

    def numbers(self, what: str, group: int = 0) -> list[tuple[int, float]]:
        """Return the finite numbers of a kind, each with its line. Times come in seconds."""
        found = []
        for hit in self.hits[what]:
            unit = UNITS.get(hit.groups[group + 1].lower(), 1.0) if len(hit.groups) > group + 1 else 1.0
            found.append((hit.line, to_number(hit.groups[group]) * unit))
        return [(line, value) for line, value in found if math.isfinite(value)]

    def last(self, what: str, group: int = 0) -> tuple[int, float] | None:
        """Return the last finite number of a kind with its line, None without one."""
        return (self.numbers(what, group) or [None])[-1]

    def at(self, line: int) -> str:
        """Return the place of a line, with the line, shortened."""
        text = " ".join(self.lines[line - 1][:LONGEST_LINE].split())
        return f"{self.name}:{line}: `{text if len(text) <= QUOTED else text[: QUOTED - 3] + '...'}`"

    @cached_property
    def lines(self) -> list[str]:
        """Its lines."""
        return self.text.split("\n")

    @property
    def settings(self) -> tuple[dict[str, str], bool]:
        """The configuration that it prints before training, and whether a heading says that it is one.

        Left out is what may differ from run to run: names, paths, clocks.
        """
        start = min((hit.line for hit in [*self.hits["step"], *self.hits["score"]]), default=0)
        heading = [hit.line for hit in self.hits["heading"] if hit.line < start]
        if heading:
            rule = [hit.line for hit in self.hits["rule"] if hit.line > heading[0] + 1]
            start = min([start, *rule])
        pairs = [hit.groups for hit in self.hits["setting"] if (heading or [0])[0] < hit.line < start]
        kept = {key: value for key, value in pairs if not PRIVATE.search(key) and not re.search(r"/|\ds$", value)}
        return kept, bool(heading)


def split_code(text: str) -> tuple[str, int]:
    """Return the source that a log begins with, and how many lines it has; "" if it begins otherwise."""
    head = text[:HEAD]
    if not re.search(r"^(import|from) \w", head, re.MULTILINE):
        return "", 0
    end = re.search(r"^={20,}\s*$", text, re.MULTILINE)
    code = text[: end.start()] if end else ""
    # a line of a log may begin with "from"; a newer Python may parse what this one does not
    if "\ndef " not in code and Source("", code).wrong:
        return "", 0
    return code, code.count("\n")


def read_log(name: str, text: str) -> RunLog:
    """Read a log: every pattern of LINES on every line after the source that it may begin with."""
    code, skipped = split_code(text)
    hits: dict[str, list[Hit]] = {key: [] for key in LINES}
    for count, line in enumerate(text.split("\n"), 1):
        if count <= skipped:
            continue
        line = line[:LONGEST_LINE].rstrip()
        for key, pattern in LINES.items():
            if match := pattern.search(line):
                hits[key].append(Hit(count, tuple(group or "" for group in match.groups())))
    return RunLog(name, hits, code, text)


def token_counts(log: RunLog) -> list[int]:
    """Return how many targets a log says were scored; if it does not, how many tokens validation has."""
    said = log.numbers("scored")[-1:] or log.numbers("tokens")
    return [int(count) for _, count in said if count >= 1]


def denominator_check(log: RunLog) -> Check:
    """Bytes again from val_loss, val_bpb and the number of targets, against the canonical totals."""
    name, final = f"bytes denominator ({log.name})", log.final
    where = f"{log.at(final.line)}: "
    if not (math.isfinite(log.loss) and math.isfinite(log.bpb) and log.loss > 0 and log.bpb > 0):
        return Check(name, FAIL, f"{where}val_loss {final.groups[1]}, val_bpb {final.groups[2]}: no score")
    per_token = log.loss / (math.log(2) * log.bpb)
    # half a unit of the last decimal of each
    slack = 0.5 * (10.0 ** -decimals(final.groups[1]) / log.loss + 10.0 ** -decimals(final.groups[2]) / log.bpb)
    if slack > FAR / 10:
        return Check(name, UNKNOWN, f"{where}too few digits to count bytes; settled by four decimals or more")
    counts = token_counts(log)
    if not counts:
        known = [(abs(size / count / per_token - 1), count) for count, size in TARGETS.items()]
        miss, count = min(known)
        detail = f"{where}{per_token:.5f} bytes a token; the log does not say how many tokens were scored"
        if miss <= slack + NEAR:
            return Check(name, PASS, f"{detail}; as of the canonical {count:,} targets")
        return Check(name, UNKNOWN, f"{detail}; settled by that number, or SCORES")
    tokens = min(counts, key=lambda count: abs(count * per_token - VALIDATION_BYTES))
    total = tokens * per_token
    said = f"{where}{tokens:,} targets x val_loss / (ln 2 x val_bpb) = {total:,.0f} bytes (+- {total * slack:,.0f})"
    for (size, targets), words in CANONICAL.items():
        if abs(total / size - 1) <= slack + 2e-8 and targets in (0, tokens):
            return decide(name, size != INVALID_TOTAL, f"{said}: {words}")
    wanted = TARGETS.get(tokens, VALIDATION_BYTES)
    off = total / wanted - 1
    if abs(off) <= slack + NEAR:
        return Check(name, PASS, f"{said}: within {NEAR:.2%} of {wanted:,}")
    words = f"{said}: {off:+.2%} from the validation text's {wanted:,}"
    if abs(off) <= slack + FAR:
        return Check(name, UNKNOWN, f"{words}; settled by the sum of its byte counts")
    why = "bytes are counted twice, or are not the text's" if off > 0 else "a part of validation, or bytes not counted"
    return Check(name, FAIL, f"{words}: {why}")


def stated_checks(log: RunLog) -> Iterator[Check]:
    """Bytes that a log states against its own ratio; channels that ask for the target (within and word gates)."""
    stated, counts = log.last("bytes"), token_counts(log)
    if stated and counts and log.loss > 0 and log.bpb > 0:
        own = [count * log.loss / (math.log(2) * log.bpb) for count in counts]
        best = min(own, key=lambda total: abs(total - stated[1]))
        detail = f"{log.at(stated[0])}: states {stated[1]:,.0f}, its score has {best:,.0f}"
        yield decide(f"bytes stated ({log.name})", abs(best / max(stated[1], 1) - 1) <= 1e-3, detail)
    opened = log.numbers("gates")
    for line, count in opened:
        if count > 0:
            detail = f"{log.at(line)}: {count:,.0f} hints of channels that are gated by the token to be predicted"
            yield Check(f"C1 log-gates ({log.name})", FAIL, detail)
            break
    else:
        if opened:
            yield Check(f"C1 log-gates ({log.name})", PASS, "channels gated by the target are empty")


def size_checks(folder: Folder, log: RunLog) -> Iterator[Check]:
    """The log's total against the cap, against its own parts, and its code against the files."""
    total = log.last("total", 1)
    if total is None:
        yield Check(
            f"size cap ({log.name})", UNKNOWN, "the log has no `Total submission size`; settled by the artifact"
        )
        return
    line, size = total
    yield decide(f"size cap ({log.name})", size <= CAP_BYTES, f"{log.at(line)}: {size:,.0f} of {CAP_BYTES:,} bytes")
    code = {size for _, size in log.numbers("code", 1)}
    model = log.last("model", 1)
    if not (code and model):
        yield Check(f"size parts ({log.name})", UNKNOWN, "the log does not say what of it is code and what is model")
        return
    parts = {model[1] + part for part in code}
    detail = (
        f"{log.at(line)}: total {size:,.0f}, model {model[1]:,.0f}, code {', '.join(f'{c:,.0f}' for c in sorted(code))}"
    )
    state = PASS if size in parts else (FAIL if size < min(parts) else UNKNOWN)
    yield Check(f"size parts ({log.name})", state, detail)
    yield from shipped_checks(folder, log, model[1], size)


def shipped_checks(folder: Folder, log: RunLog, model: float, total: float) -> Iterator[Check]:
    """Code in the folder with the log's model against the cap: counted is not shipped, helpers are code."""
    own, counted = folder.files.get(folder.program, 0), total - model
    helpers = {name: folder.files[name] for name in folder.helpers}
    shipped = own + sum(helpers.values())
    words = f"{folder.program} {own:,}" + "".join(f" + {name} {size:,}" for name, size in helpers.items())
    detail = f"{words} + model {model:,.0f} = {shipped + model:,.0f} of {CAP_BYTES:,} bytes"
    detail += f"; {log.name} counts {counted:,.0f} of code"
    if shipped + model > CAP_BYTES:
        # maintainers let some such folders stand; the bytes are over all the same
        yield Check(f"size shipped ({log.name})", FAIL, f"{detail}: ship the wrapper that was counted")
    elif shipped > counted:
        yield Check(f"size shipped ({log.name})", UNKNOWN, f"{detail}: more is shipped than counted, and it fits")
    else:
        yield Check(f"size shipped ({log.name})", PASS, detail)


def time_checks(log: RunLog) -> Iterator[Check]:
    """Training and scoring against 600 s each, Hessians on top, and steps that only go up."""
    seconds, line = max(((value, at) for at, value in log.numbers("train_ms")), default=(math.nan, 0))
    if not math.isfinite(seconds):
        yield Check(f"time training ({log.name})", UNKNOWN, "the log has no train_time")
    else:
        state = PASS if seconds <= BUDGET_SECONDS else (UNKNOWN if seconds <= BUDGET_SECONDS + CLOCK_SLACK else FAIL)
        detail = f"{log.at(line)}: {seconds:.3f} of {BUDGET_SECONDS:.0f} s"
        over = "; less than half a second over, maybe one step; settled by a run with a reserve"
        yield Check(f"time training ({log.name})", state, detail + over * (state == UNKNOWN))
        late = [(value, at) for at, value in log.numbers("hessians") if at > line]
        spent, at = max(late, default=(0.0, 0))
        if spent:
            fits = seconds + spent <= BUDGET_SECONDS
            words = f"{log.at(at)}: {spent:.1f} s after {seconds:.1f} s of training"
            why = "" if fits else "; legal only if they read no training data"
            yield Check(f"time hessians ({log.name})", PASS if fits else UNKNOWN, words + why)
    given = [found for found in (log.last("total_eval"), log.last("eval_ms")) if found]
    if not given:
        yield Check(f"time evaluation ({log.name})", UNKNOWN, "the log has no eval_time")
    else:
        at, spent = max(given, key=lambda found: found[1])
        good = spent <= BUDGET_SECONDS
        yield decide(f"time evaluation ({log.name})", good, f"{log.at(at)}: {spent:.1f} of {BUDGET_SECONDS:.0f} s")
    yield from step_checks(log)


def step_checks(log: RunLog) -> Iterator[Check]:
    """Steps of a log go up."""
    steps = [(hit.line, int(hit.groups[0][:12])) for hit in log.hits["step"]]
    back = next((b for a, b in zip(steps, steps[1:], strict=False) if b[1] < a[1]), None)
    if not steps:
        yield Check(f"log steps ({log.name})", UNKNOWN, "the log shows no training")
    elif back:
        detail = f"{log.at(back[0])}: step {back[1]} after a later one: two runs in one log, or lines that were moved"
        yield Check(f"log steps ({log.name})", UNKNOWN, f"{detail}; settled by a log of one run")
    else:
        yield Check(f"log steps ({log.name})", PASS, f"{len(steps)} lines, up to step {steps[-1][1]:,}")


def bare(text: str) -> str:
    """Return a text without what editors change: white space at the ends of lines and of the text."""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def origin_check(folder: Folder, log: RunLog) -> Check:
    """Whether this script wrote this log: its source or hash in the log, else the words of its final line."""
    name, texts = f"log origin ({log.name})", {s.name: s.text for s in folder.sources}
    plain, said = {key: bare(text) for key, text in texts.items()}, bare(log.text)
    for key, text in plain.items():
        if text and text in said:
            return Check(name, PASS, f"the log holds the text of {key}")
        raw = hashlib.sha256(texts[key].encode("utf-8", "surrogatepass")).hexdigest()
        if raw[:16] in log.text:
            return Check(name, PASS, f"the log holds the hash of {key}")
    if log.code:
        theirs = bare(log.code).splitlines()
        nearest = min(plain, key=lambda key: abs(len(plain[key]) - len(log.code)), default="")
        ours = plain[nearest].splitlines() if nearest else []
        differ = (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b)
        at = next(differ, min(len(theirs), len(ours)))
        words = f"line {at + 1}: `{theirs[at][:60] if at < len(theirs) else 'its end'}`"
        return Check(name, FAIL, f"{log.name} begins with another program than {nearest}: {words}")
    label = log.final.groups[0] if log.final else ""
    pieces = [piece for piece in re.findall(r"[A-Za-z_]{6,}", label) if piece.lower() not in ("val_loss", "val_bpb")]
    absent = [piece for piece in pieces if not any(piece in text for text in texts.values())]
    if absent:
        detail = f"{log.at(log.final.line)}: no source here holds the words `{absent[0]}` of the final line"
        return Check(name, UNKNOWN, f"{detail}; settled by the hash of the source in the log")
    detail = "the log holds neither the program's text nor its hash"
    return Check(name, UNKNOWN, f"{detail}; settled by either")


def seed_checks(logs: list[RunLog], listed: list[str]) -> Iterator[Check]:
    """Seeds differ, and nothing else does. listed: the seeds that the papers list."""
    runs = [log for log in logs if log.final]
    seeds = [log.seed for log in runs]
    if len(runs) < 2:
        detail = f"{len(runs)} logs with a final score; a row wants three seeds of one configuration"
        yield Check("seeds", UNKNOWN, detail)
        return
    named = ", ".join(f"{log.name}: seed {log.seed or 'not named'}" for log in runs)
    clear = len(set(seeds)) == len(seeds) >= 3 and "" not in seeds
    why = "" if clear else "; three different seeds are wanted: settled by which logs count"
    yield Check("seeds", PASS if clear else UNKNOWN, named + why)
    (first, headed), different = runs[0].settings, []
    for log in runs[1:]:
        theirs, both = log.settings
        headed &= both
        wrong = sorted(key for key in first.keys() & theirs.keys() if first[key] != theirs[key])
        different += [f"{log.name}: {key} {theirs[key]}, in {runs[0].name} {first[key]}" for key in wrong]
        codes = [{hit.groups[1] for hit in each.hits["code"]} for each in (runs[0], log)]
        if codes[0] != codes[1]:
            different.append(f"{log.name} counts other code than {runs[0].name}")
            headed &= bool(wrong)
    # logs beside those of the listed seeds may be of other experiments
    headed &= not listed or sorted(listed) == sorted(seeds)
    if different:
        settled = "" if headed else "; settled by the knobs of each run"
        yield Check("seeds configuration", FAIL if headed else UNKNOWN, "; ".join(different[:5]) + settled)
    elif not first:
        yield Check("seeds configuration", UNKNOWN, "the logs print no configuration; settled by their knobs")
    else:
        yield Check("seeds configuration", PASS, f"{len(first)} settings are the same in {len(runs)} logs")


# +---------------------------------------------------------------------------+
# | PAPERS                                                                    |
# +---------------------------------------------------------------------------+


def near(claimed: float, found: float) -> bool:
    """Return whether a number agrees with another to its own last decimal, but to 4 at least: JSON drops zeros."""
    return abs(claimed - found) <= max(6e-6, 0.501 * 10.0 ** -max(decimals(repr(claimed)), 4))


def paper_checks(folder: Folder, logs: list[RunLog]) -> Iterator[Check]:
    """submission.json against the logs, the README against submission.json."""
    text, readme = folder.read("submission.json"), folder.read("README.md")
    paper, wrong = papers.parse_object(text, "submission.json") if text else ({}, [])
    rows = {} if papers.submission_findings(paper, "") else paper.get("seed_results") or {}
    wrong += papers.submission_findings(paper, "submission.json") if rows or paper.get("seed_results") else []
    if not text:
        wrong.append("no submission.json")
    wrong += folder.findings
    yield Check("papers readable", UNKNOWN if wrong else PASS, "; ".join(wrong) or "nothing is damaged")
    runs = {log.seed or log.name: log for log in logs if log.final and math.isfinite(log.bpb)}
    listed = paper.get("seeds")
    yield from seed_checks(logs, [str(seed) for seed in listed] if isinstance(listed, list) else [])
    yield from score_claims(paper, runs)
    yield from row_claims(rows, runs)
    sizes = [found[1] for log in runs.values() if (found := log.last("total", 1))]
    claimed = number(paper.get("bytes_total"))
    if claimed is not None and sizes:
        state = PASS if claimed == max(sizes) else (FAIL if claimed < min(sizes) else UNKNOWN)
        yield Check("claims size", state, f"bytes_total {claimed:,.0f}, logs {min(sizes):,.0f} to {max(sizes):,.0f}")
    yield from significance(paper, runs)
    yield readme_check(readme, number(paper.get("val_bpb")))


def score_claims(paper: Mapping[str, Any], runs: Mapping[str, RunLog]) -> Iterator[Check]:
    """val_bpb and its spread against the logs."""
    claimed = number(paper.get("val_bpb", paper.get("mean_val_bpb")))
    if claimed is None or not runs:
        yield Check(
            "claims score",
            UNKNOWN,
            "no val_bpb in submission.json" if claimed is None else "no log shows a final score",
        )
        return
    scores = [log.bpb for log in runs.values()]
    mean = sum(scores) / len(scores)
    detail = f"val_bpb {claimed}, mean of {len(scores)} logs {mean:.8f}"
    best = len(scores) > 1 and not near(claimed, mean) and any(near(claimed, score) for score in scores)
    listed = paper.get("seeds")
    count = len(listed) if isinstance(listed, list) else len(scores)
    other = other_score(claimed, list(runs.values()))
    if count > len(scores) or (count < len(scores) and not near(claimed, mean)):
        yield Check(
            "claims score", UNKNOWN, f"{detail}; {count} seeds are listed: settled by a log of each, and no other"
        )
    elif other and not near(claimed, mean):
        yield Check(
            "claims score", UNKNOWN, f"{detail}; it is that of `{other}`: settled by which of them is the score"
        )
    else:
        yield decide("claims score", near(claimed, mean), detail + "; it is one seed's" * best)
    spread = number(paper.get("val_bpb_std"))
    if spread is not None and len(scores) > 1 and count == len(scores):
        squares = sum((score - mean) ** 2 for score in scores)
        both = [math.sqrt(squares / (len(scores) - 1)), math.sqrt(squares / len(scores))]
        detail = f"val_bpb_std {spread}, of the sample {both[0]:.6f}, of the population {both[1]:.6f}"
        yield decide("claims spread", any(near(spread, value) for value in both), detail)


def other_score(claimed: float, logs: list[RunLog]) -> str:
    """Return the label of another score in all logs whose mean is the claimed one, "" if there is none."""
    labels = [{hit.groups[0].strip(): to_number(hit.groups[2]) for hit in log.hits["score"]} for log in logs]
    for label in labels[0]:
        values = [found.get(label, math.nan) for found in labels]
        if label and not re.search(r"step|^\d", label) and near(claimed, sum(values) / len(values)):
            return label
    return ""


def row_claims(rows: Mapping[str, Any], runs: Mapping[str, RunLog]) -> Iterator[Check]:
    """Each seed's row against its log."""
    wrong, count, missing = [], 0, sorted(rows.keys() - runs.keys())
    for seed in sorted(rows.keys() & runs.keys()):
        log, row = runs[seed], rows[seed]
        # an artifact's bytes are said with and without the code
        sizes = [found[1] for found in (log.last("total", 1), log.last("model", 1)) if found]
        steps = [found[1] for found in (log.last("stop"),) if found]
        kinds = {"val_bpb": [log.bpb], "val_loss": [log.loss], "artifact_bytes": sizes, "steps": steps}
        for key, values in kinds.items():
            claimed = number(row.get(key))
            if claimed is not None and values:
                count += 1
                agree = any(near(claimed, value) for value in values)
                wrong += [] if agree else [f"seed {seed}: {key} {row[key]}, its log {values[0]:.8g}"]
    if wrong:
        yield Check("claims seeds", FAIL, "; ".join(wrong[:5]))
    elif missing:
        yield Check("claims seeds", UNKNOWN, f"no log of seed {', '.join(missing)}; settled by it")
    elif rows:
        yield Check("claims seeds", PASS, f"{count} numbers agree with the logs")


def significance(paper: Mapping[str, Any], runs: Mapping[str, RunLog]) -> Iterator[Check]:
    """A claimed p against a test of the logs' scores and the claimed baseline."""
    claims = [(key, number(value)) for key, value in paper.items() if re.search(r"(^|_)p(_?val(ue)?)?$|welch", key)]
    claims = [(key, value) for key, value in claims if value is not None]
    base, scores = number(paper.get("comparison_baseline_bpb")), [log.bpb for log in runs.values()]
    if not claims:
        return
    if base is None or len(scores) < 2 or len(set(scores)) < 2:
        yield Check("claims p", UNKNOWN, f"{claims[0][0]} {claims[0][1]}; settled by the seeds on both sides")
        return
    # a second, which the judge's other targets need not wait for
    from scipy import stats  # noqa: PLC0415

    p = float(stats.ttest_1samp(scores, base, alternative="less").pvalue)
    # against one number: with the baseline's own spread p is larger, in pairs it may be smaller
    good = claims[0][1] >= 0.5 * p
    detail = f"{claims[0][0]} {claims[0][1]}, against comparison_baseline_bpb {base} as a constant {p:.2g}"
    yield Check("claims p", PASS if good else UNKNOWN, detail + "; settled by the baseline's seeds" * (not good))


def readme_check(text: str, claimed: float | None) -> Check:
    """The README's headline number against submission.json."""
    title = next((line for line in text.splitlines() if line.startswith("# ")), "")
    pattern = r"(?<![\d.#])([01]\.\d{3,})(?!\d)"
    # a title may name a decay or a rate too
    numbers = [word for word in re.findall(pattern, title) if claimed and abs(float(word) / claimed - 1) <= 0.03]
    words = [
        match
        for line in text.splitlines()
        if re.search(r"bpb", line, re.IGNORECASE)
        for match in re.findall(pattern, line)
    ]
    if claimed is None or not (numbers or words):
        return Check("claims README", UNKNOWN, "no score to hold against the other")
    agree = [word for word in numbers or words if near(float(word), claimed)]
    where = f"title says {', '.join(numbers)}" if numbers else f"first score {words[0]}"
    # 1.10 says less than 1.1000: the digits of the word count, not those of the number
    agree += [word for word in numbers or words if abs(float(word) - claimed) <= 0.501 * 10.0 ** -decimals(word)]
    state = PASS if agree else (FAIL if numbers else UNKNOWN)
    return Check("claims README", state, f"{where}, submission.json {claimed}")


# +---------------------------------------------------------------------------+
# | VERDICT                                                                   |
# +---------------------------------------------------------------------------+

# Questions that reading cannot answer, and why; each run of our own programs answers them.
RUN_QUESTIONS = (
    ("C1 run", "do scores change with what comes after them? Runs on changed streams show it"),
    ("C2 run", "do the probabilities of all ids sum to 1? A run that scores every id shows it"),
    ("C3 run", "is each score taken before anything learns from it? The order of scores (SCORES) shows it"),
    ("C4 run", "is each target scored once? A list of all scores (SCORES) shows it"),
    ("split run", "did training hold validation documents? The shards that it read show it"),
    ("bytes run", "how many bytes has each target? The ids and the tokenizer show it"),
    ("time run", "how long does it take on 8xH100? Such a machine shows it, the log is its author's word"),
    ("size run", "does the program read an artifact of that size? The file itself shows it"),
)


def judge(folder: Folder) -> Iterator[Check]:
    """Run all checks on somebody's folder."""
    yield from form_checks(folder)
    yield from rule_checks(folder)
    logs = folder.logs
    if not logs:
        yield Check("log", UNKNOWN, "no log of a training or a score; settled by one log for each seed")
    for log in logs:
        if log.final is None:
            yield Check(f"log score ({log.name})", UNKNOWN, "it has no final val_loss and val_bpb")
        else:
            yield denominator_check(log)
            yield from stated_checks(log)
        yield from size_checks(folder, log)
        yield from time_checks(log)
        yield origin_check(folder, log)
    yield from paper_checks(folder, logs)
    for name, why in RUN_QUESTIONS:
        yield Check(name, UNKNOWN, f"not run: {why}")


def open_foreign(path: Path) -> tuple[Candidate, list[Check]]:
    """Judge a folder; return what the judge's summary takes. UserError if it holds no program."""
    folder = Folder(path.resolve())
    if not folder.program:
        why = f" ({'; '.join(folder.findings)})" if folder.findings else ""
        raise UserError(f"{path} holds no Python program{why}; give a folder with a {PROGRAM}")
    found = Candidate("foreign", folder.path.name, folder.read(folder.program).encode("utf-8", "replace"), {}, {})
    found.notes.append("read only: nothing of this folder was run or imported; `unknown` says what would settle it")
    # what fails first, then suspicions, what holds, and what only a run could tell; in each the order of asking
    asked, order = list(judge(folder)), (FAIL, UNKNOWN, PASS)
    questions = {name for name, _ in RUN_QUESTIONS}
    return found, sorted(asked, key=lambda check: (check.name in questions, order.index(check.status)))
