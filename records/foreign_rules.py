"""The static rules of the judge for strangers' programs: what each looks for in the source, and why.

A rule that finds nothing proves nothing, and most findings are suspicions. `proven` is said only where the statement
leaves no other reading; the judge makes a failure of it only if the program runs it by default.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from records.foreign_source import (
    FunctionNode,
    Loop,
    Source,
    assigned,
    called,
    calls,
    names_in,
    place,
    strings_in,
    variables,
)


class Finding(NamedTuple):
    """One suspicion: the node that shows it, words about it, and whether it leaves no other reading."""

    node: ast.AST
    words: str
    proven: bool = False


class Rule(NamedTuple):
    """A row of RULES. topic: C1 to C4, bytes, split, size, time or alone; settles: what would answer a suspicion."""

    topic: str
    name: str
    find: Callable[[Source], Iterator[Finding]]
    looks_for: str
    settles: str


# Context: what a score may depend on

TARGET_NAME = re.compile(r"^(tgts?|targets?|gold|labels?|next_(id|tok(en)?)|nxt)(_?(np|ids?|tok(en)?s?|flat|i))?$")
MASK_WORD = re.compile(r"bos|doc|mask|boundar|segment|cu_seqlens|first_tok|same_", re.IGNORECASE)
NATS_WORD = re.compile(r"nll|loss|bpb|nats|cross_entropy", re.IGNORECASE)


def is_hash(node: ast.AST | None) -> bool:
    """Return whether an expression makes a table index or a tuple of ids."""
    if isinstance(node, ast.Tuple):
        return len(node.elts) > 1
    if called(node) == "astype" and isinstance(node, ast.Call):
        return is_hash(node.func.value)
    if called(node) in ("tuple", "hash"):
        return True
    parts = [part for part in ast.walk(node) if isinstance(part, ast.BinOp)] if node is not None else []
    # `n % m` alone rounds a number; a hash mixes several before it takes the rest
    return any(
        isinstance(part.op, ast.BitXor) or (isinstance(part.op, ast.Mod) and isinstance(part.left, ast.BinOp))
        for part in parts
    )


def gold_reads(function: FunctionNode) -> set[str]:
    """Return the expressions `ids[t]` with which a function picks the right token's probability: probs[ids[t]]."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            inner = [part for part in ast.walk(node.slice) if isinstance(part, ast.Subscript)]
            if re.search(r"prob|logp|logit|nll", " ".join(names_in(node.value))):
                found |= {ast.dump(part) for part in inner}
    return found


def looked_up(source: Source, function: FunctionNode, key: str) -> ast.AST | None:
    """Return where a function reads a table with a key, None if it only counts with it: table[key] = table[key] + 1."""
    for node in ast.walk(function):
        reads = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load)
        reads = reads and not isinstance(node.slice, ast.Slice) and key in variables(node.slice)
        if not reads and not (called(node) == "get" and node.args and key in variables(node.args[0])):
            continue
        stored = [
            target for target, _ in assigned(source.enclosing(node, ast.stmt)) if isinstance(target, ast.Subscript)
        ]
        if not any(key in variables(target.slice) for target in stored):
            return node
    return None


COUNTS = re.compile(r"update|insert|learn|count|train|build|observe|add", re.IGNORECASE)


def every_id(function: FunctionNode) -> set[str]:
    """Return the variables that go through a range, as one that takes each id of the vocabulary does."""
    loops = [node for node in ast.walk(function) if isinstance(node, ast.For | ast.comprehension)]
    found = {name for loop in loops if called(loop.iter) in ("range", "arange") for name in variables(loop.target)}
    pairs = (pair for node in ast.walk(function) for pair in assigned(node) if called(pair[1]) == "arange")
    return found | {name for target, _ in pairs for name in variables(target)}


def ngram_target_key(source: Source) -> Iterator[Finding]:
    """A table of n-grams that is read with a key in which the token to be predicted takes part."""
    for function in source.functions:
        gold = gold_reads(function)
        for node in ast.walk(function):
            for target, value in assigned(node):
                if not isinstance(target, ast.Name) or isinstance(node, ast.AugAssign) or not is_hash(value):
                    continue
                inside = {ast.dump(part) for part in ast.walk(value) if isinstance(part, ast.Subscript)}
                named = sorted(n for n in variables(value) - every_id(function) if TARGET_NAME.match(n))
                if not named and not inside & gold:
                    continue
                if read := looked_up(source, function, target.id):
                    words = f"the key holds {named[0] if named else 'the token whose probability is read'}"
                    yield Finding(
                        node, f"{words}, and line {read.lineno} reads a table with it", not COUNTS.search(function.name)
                    )
                elif not isinstance(value, ast.Tuple) and returns(function, target.id):
                    yield Finding(node, f"the key holds {(named or ['the gold token'])[0]} and is handed on")


def returns(function: FunctionNode, name: str) -> bool:
    """Return whether a function returns a variable."""
    return any(isinstance(node, ast.Return) and name in variables(node.value) for node in ast.walk(function))


def is_shifted(part: ast.AST) -> bool:
    """Return whether an expression reads a tensor up to its last place: x[:, :-1]."""
    ends = (
        [n.upper for n in ast.walk(part.slice) if isinstance(n, ast.Slice)] if isinstance(part, ast.Subscript) else []
    )
    return any(isinstance(end, ast.UnaryOp) and getattr(end.operand, "value", None) == 1 for end in ends)


def shifted(node: ast.AST) -> set[str]:
    """Return the variables that an expression reads one place back."""
    return {name for part in ast.walk(node) if is_shifted(part) for name in variables(part.value)}


def in_place(node: ast.AST) -> set[str]:
    """Return the variables that an expression reads otherwise."""
    found, rest = set(), [node]
    while rest:
        part = rest.pop()
        found |= {part.id} if isinstance(part, ast.Name) else set()
        rest += [] if is_shifted(part) else ast.iter_child_nodes(part)
    return found


def smear_mask(source: Source) -> Iterator[Finding]:
    """x[t] mixed with x[t - 1] where no mask keeps documents apart."""
    for function in source.functions:
        # a row of another tensor that holds the shifted one: prev = cat([zeros, x[:, :-1]])
        held = {}
        for node in ast.walk(function):
            for target, value in assigned(node):
                if value is not None and isinstance(target, ast.Name) and not isinstance(node, ast.AugAssign):
                    held |= (
                        {target.id: shifted(value)} if called(value) in ("cat", "pad", "roll", "concatenate") else {}
                    )
        for node in ast.walk(function):
            mixes = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) or called(node) == "lerp"
            if not mixes or isinstance(source.parents.get(node), ast.BinOp):
                continue
            seen = in_place(node)
            back = shifted(node) | {name for key in seen & held.keys() for name in held[key]}
            # both the tensor itself and its past, and a product with a gate: no plain index arithmetic
            gated = called(node) == "lerp" or any(
                isinstance(p, ast.BinOp) and isinstance(p.op, ast.Mult) for p in ast.walk(node)
            )
            if back & seen and gated and not any(MASK_WORD.search(name) for name in names_in(function)):
                yield Finding(
                    node, "x[t] takes from x[t - 1], and nothing in this function knows where documents begin"
                )


def smear_switch(source: Source) -> Iterator[Finding]:
    """A mask at document starts that is off unless a knob says otherwise."""
    for name, nodes in source.loads.items():
        knob, default = source.defaults.get(name, ("", ""))
        if re.search(r"BOS.*(FIX|MASK)|(SMEAR|DOC).*MASK", knob) and default.lower() in ("0", "false"):
            yield Finding(nodes[0], f"the mask at document starts is off: {source.said(name)}")


# Order: score first, learn afterwards


def target_argument(call: ast.Call) -> ast.expr | None:
    """Return the targets that a loss is taken against: y in cross_entropy(logits, y) and in model(x, y)."""
    for word in call.keywords:
        if word.arg and re.match(r"(targets?|labels?|y)(_|$)", word.arg):
            return word.value
    return call.args[1] if len(call.args) > 1 and not isinstance(call.args[1], ast.Constant) else None


def scoring_calls(node: ast.AST | None) -> Iterator[ast.Call]:
    """Yield calls that give losses: cross_entropy, nll_loss, and calls of what is named like a model."""
    for call in calls(node) if node is not None else ():
        name = called(call)
        if (
            re.search(r"cross_entropy|nll|(^|_)ce(_|$)|loss_fn|model$|^forward|criterion", name)
            and target_argument(call) is not None
        ):
            yield call


def loss_calls(function: FunctionNode, backward: ast.Call) -> tuple[list[ast.Call], list[ast.expr]]:
    """Return the calls whose losses a backward() differentiates, up to two assignments away, and what lies between."""
    found, names, between = list(scoring_calls(backward.func)), variables(backward.func), [backward.func]
    for _ in range(3):
        if found:
            break
        above, names = names, set()
        for node in ast.walk(function):
            pairs = assigned(node) if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) else []
            for target, value in pairs:
                if variables(target) & above and place(node) < place(backward):
                    found += scoring_calls(value)
                    between.append(value)
                    names |= variables(value)
    return found, between


def weighs(parts: list[ast.expr], losses: list[ast.Call]) -> bool:
    """Return whether losses are multiplied, picked or masked on their way, so that some may not count."""
    inside = {node for loss in losses for node in ast.walk(loss)}
    nodes = [node for part in parts for node in ast.walk(part) if node not in inside]
    product = any(isinstance(node, ast.Subscript | ast.Mult) or "mask" in called(node) for node in nodes)
    return product or any(word.arg in ("weight", "ignore_index") for loss in losses for word in loss.keywords)


class Fit(NamedTuple):
    """An update: its backward(), the last step() after it, the loop of both, and the losses that it is fitted on.

    whole: whether each of these losses counts fully.
    """

    backward: ast.Call
    step: ast.Call
    loop: ast.AST
    losses: list[ast.Call]
    whole: bool


def fits(source: Source, function: FunctionNode) -> Iterator[Fit]:
    """Yield the updates in a function, those in functions inside it apart."""
    inside = [call for call in calls(function) if source.function_of(call) is function]
    for backward in inside:
        if called(backward) != "backward" or not isinstance(backward.func, ast.Attribute):
            continue
        for loop in [*(above for above in source.above(backward) if isinstance(above, Loop | FunctionNode))]:
            within = set(ast.walk(loop))
            steps = [
                call for call in inside if called(call) == "step" and call in within and place(call) > place(backward)
            ]
            if steps:
                losses, between = loss_calls(function, backward)
                yield Fit(backward, max(steps, key=place), loop, losses, not weighs(between, losses))
                break
            if loop is function:
                break


def cut(node: ast.expr) -> tuple[str, str] | None:
    """Return how targets are cut, as (lower, upper) bounds of their last slice; ("", "") for all; None if by a mask."""
    bounds = ("", "")
    for part in ast.walk(node):
        if isinstance(part, ast.Subscript):
            inner = [n for n in ast.walk(part.slice) if isinstance(n, ast.Slice)]
            if not inner:
                return None
            bounds = tuple(ast.unparse(edge) if edge is not None else "" for edge in (inner[-1].lower, inner[-1].upper))
    # dropping the last target is no cut: it is the first one's neighbour in the next row
    return ("", "") if bounds == ("", "-1") else bounds


def renewed(function: FunctionNode, names: set[str], start: tuple[int, int], end: tuple[int, int]) -> bool:
    """Return whether one of the names is assigned between two places."""
    pairs = (pair for node in ast.walk(function) for pair in assigned(node) if start < place(pair[0]) < end)
    return any(variables(target) & names for target, _ in pairs)


EVALUATES = re.compile(r"eval|val_|ttt|score|slot|adapt|test", re.IGNORECASE)


def adds_up(source: Source, call: ast.Call, function: FunctionNode) -> bool:
    """Return whether a function still adds to a sum, or returns, after a call: what it gives is a score."""
    for node in ast.walk(function):
        summed = isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add)
        if (summed or called(node) in ("append", "add_", "index_add_") or isinstance(node, ast.Return)) and place(
            node
        ) >= place(source.enclosing(call, ast.stmt) or call):
            return True
    return False


def scored_first(source: Source, function: FunctionNode, fit: Fit, names: set[str]) -> bool:
    """Return whether a function adds up or keeps scores of some targets before it learns from them."""
    kept = ("append", "add_", "index_add_")
    sums = [n for n in ast.walk(function) if isinstance(n, ast.AugAssign) or called(n) in kept]
    sums = [n for n in sums if place(n) < place(fit.backward)]
    inside = set(ast.walk(fit.loop))
    scores = [call for call in scoring_calls(function) if variables(target_argument(call)) & names]
    first = min((place(source.enclosing(call, ast.stmt)) for call in scores), default=place(fit.backward))
    return any(place(node) >= first and (node in inside or first < place(fit.loop)) for node in sums)


def rescored(source: Source, function: FunctionNode, fit: Fit) -> Iterator[tuple[ast.Call, bool]]:
    """Yield calls after an update that score what it was fitted on, and whether they surely score the same tokens."""
    outer = source.enclosing(fit.loop, (*Loop.__args__, *FunctionNode.__args__)) or function
    area = fit.loop if fit.loop is function else outer
    for call in scoring_calls(area):
        if place(call) < place(fit.step) or source.function_of(call) is not function:
            continue
        score = target_argument(call)
        differentiated = source.enclosing(call, ast.stmt) in set(ast.walk(fit.loop)) and place(call) < place(
            fit.backward
        )
        for loss in fit.losses:
            fitted = target_argument(loss)
            shared = variables(score) & variables(fitted)
            if not shared or differentiated or renewed(function, shared, place(fit.step), place(call)):
                continue
            a, b = cut(fitted), cut(score)
            if a and b and a[1] == b[0] != "":  # y[:n] is fitted, y[n:] is scored
                continue
            if adds_up(source, call, function):
                whole = a == ("", "") or (a is not None and a == b)
                # elsewhere it may be training that looks at its batch again, or a second look at what was scored
                sure = fit.whole and EVALUATES.search(function.name) and not scored_first(source, function, fit, shared)
                yield call, whole and bool(sure)
                break


def is_own_delta(source: Source, function: FunctionNode) -> str:
    """Return the tensor made in a function that an optimiser made there adapts, "" if there is none."""
    made = {}
    for node in ast.walk(function):
        for target, value in assigned(node):
            if isinstance(target, ast.Name) and called(value) in (
                "zeros",
                "zeros_like",
                "Parameter",
                "randn",
                "requires_grad_",
            ):
                made[target.id] = value
    for call in calls(function):
        if re.search(r"Adam|SGD|LBFGS|RMSprop|Muon", called(call)) and call.args:
            own = sorted(variables(call.args[0]) & made.keys())
            if own:
                return own[0]
    return ""


def updates(source: Source, slot: bool) -> Iterator[Finding]:
    """Yield scores of what an update has just been fitted on. slot: of a tensor made for it, else of the model."""
    for function in source.functions:
        delta = is_own_delta(source, function)
        if bool(delta) != slot:
            continue
        told = set()
        for fit in fits(source, function):
            for call, sure in rescored(source, function, fit):
                if call not in told:
                    told.add(call)
                    what = f"{delta} is" if slot else "weights are"
                    words = f"{what} fitted (line {fit.step.lineno}) on the targets that this line then scores"
                    yield Finding(call, words if sure else f"{words}, or on some of them", sure)


def slot_fit(source: Source) -> Iterator[Finding]:
    """SLOT: a shift that is fitted on the very targets that are scored with it."""
    return updates(source, slot=True)


def score_after_update(source: Source) -> Iterator[Finding]:
    """A chunk that is scored after the weights have learnt from it."""
    return updates(source, slot=False)


PREQUANT = re.compile(r"pre_?quant\w*(ttt|adapt|finetun|fine_tun)|(ttt|adapt|finetun)\w*pre_?quant", re.IGNORECASE)


def prequant_ttt(source: Source) -> Iterator[Finding]:
    """Adaptation on validation tokens before the weights are packed."""
    told = set()
    for node in source.nodes:
        name = getattr(node, "name", "") if isinstance(node, FunctionNode) else called(node)
        if PREQUANT.search(name or "") and name not in told:
            told.add(name)
            yield Finding(node, f"{name}: weights that are packed must not know validation tokens")


# Distributions and passes


def gold_only_mix(source: Source) -> Iterator[Finding]:
    """exp(-nll) of the right token mixed with another probability, and the logarithm of that taken as the score."""
    for function in source.functions:
        gold = set()
        for node in ast.walk(function):
            for target, value in assigned(node):
                negative = called(value) == "exp" and value.args and isinstance(value.args[0], ast.UnaryOp)
                if negative and NATS_WORD.search(" ".join(names_in(value.args[0]))) and isinstance(target, ast.Name):
                    gold.add(target.id)
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and variables(node) & gold:
                products = [
                    part for part in ast.walk(node) if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Mult)
                ]
                if len(products) > 1 and any(called(call) in ("log", "log2", "log1p") for call in calls(function)):
                    yield Finding(node, "only the right token's probability is mixed: do all of them still sum to 1?")
                    break


def oracle_min(source: Source) -> Iterator[Finding]:
    """The smaller of several scores of one token or one run."""
    for call in calls(source.tree):
        if called(call) not in ("min", "minimum", "fmin", "amin") or len(call.args) < 2:
            continue
        if not all(re.search(r"nll|bpb|val_loss|nats", " ".join(names_in(arg))) for arg in call.args):
            continue
        statement = source.enclosing(call, ast.stmt)
        kept = set().union(*(names_in(target) for target, _ in assigned(statement)))
        if not any(kept & names_in(arg) and isinstance(arg, ast.Name | ast.Attribute) for arg in call.args):
            yield Finding(call, "the lower of several scores is taken")


def val_limit(source: Source) -> Iterator[Finding]:
    """Validation tokens that are cut to a number."""
    pattern = re.compile(r"VAL_(MAX_)?TOKENS|MAX_VAL|VAL_(DOC_)?(FRACTION|LIMIT|SUBSET)|VAL_DOCS")
    for name, (knob, default) in source.defaults.items():
        whole = default.strip() in ("", "0", "-1", "1", "1.0", "50000", "50_000")
        if pattern.search(knob) and not whole and name in source.loads:
            yield Finding(source.loads[name][0], f"{source.said(name)}: is all of validation scored?")


# Bytes


def byte_table(source: Source) -> Iterator[Finding]:
    """A table of bytes per token that counts the leading space twice, as three bytes, or byte pieces by their names."""
    for function in source.functions:
        # text.encode("utf-8"), not tokenizer.encode(text)
        measured = [
            call
            for call in calls(function)
            if called(call) == "len"
            and any(called(c) == "encode" and all(isinstance(a, ast.Constant) for a in c.args) for c in calls(call))
        ]
        pieces = any(called(call) in ("id_to_piece", "IdToPiece") for call in calls(function))
        words = [text for text in strings_in(function) if "\u2581" in text]
        if not measured or not pieces:
            continue
        where, names = measured[0], names_in(function)
        replaced = [
            c for c in calls(function) if called(c) == "replace" and any("\u2581" in text for text in strings_in(c))
        ]
        spaced = [call for call in replaced if " " in list(strings_in(call))]
        flags = any(re.search(r"leading_space|has_space", name) for name in names)
        if spaced and flags:
            yield Finding(spaced[0], "the space is in the piece's bytes and in a flag of its own: counted twice?")
        elif not words and "decode" not in {called(call) for call in calls(function)}:
            yield Finding(where, "U+2581 has three bytes where the text has one space")
        if not names & {"is_byte", "IsByte"} and not any("<0x" in text for text in strings_in(function)):
            yield Finding(where, "pieces such as <0x0A> stand for one byte, and nothing here says so")


def byte_guess(source: Source) -> Iterator[Finding]:
    """Bytes that are tokens times a number."""
    for node in source.nodes:
        for target, value in assigned(node):
            if not any("byte" in name for name in names_in(target)) or not isinstance(value, ast.BinOp):
                continue
            factor = [
                n.value for n in (value.left, value.right) if isinstance(n, ast.Constant) and isinstance(n.value, float)
            ]
            if (
                isinstance(value.op, ast.Mult)
                and factor
                and re.search(r"tok|numel|len|count", " ".join(names_in(value)))
            ):
                yield Finding(node, f"bytes are guessed as {factor[0]} a token")


def sidecar(source: Source) -> Iterator[Finding]:
    """Case operators without a sidecar of bytes: by default, or at all."""
    told, speaks = (
        " ".join([*strings_in(source.tree), *source.loads]),
        re.compile(r"caseops|lossless_caps", re.IGNORECASE),
    )
    if not speaks.search(told):
        return
    for name, (knob, default) in source.defaults.items():
        if re.search(r"CASEOPS_ENABLED|SIDECAR", knob) and default.lower() in ("0", "false") and name in source.loads:
            yield Finding(source.loads[name][0], f"{source.said(name)}: operators would count as bytes")
    if re.search(r"bpb|base_bytes|byte_count", told) and not re.search(r"val_bytes|sidecar", told):
        words = [node for node in source.nodes if isinstance(node, ast.Constant | ast.Name | ast.Attribute)]
        told_by = [
            n
            for n in words
            if speaks.search(f"{getattr(n, 'value', '')} {getattr(n, 'id', '')} {getattr(n, 'attr', '')}")
        ]
        first = min(told_by, key=place)
        yield Finding(first, "it speaks of CaseOps and reads no sidecar (val_bytes): operators would count as bytes")


# Data


def val_docs(source: Source) -> Iterator[Finding]:
    """A preparation whose default puts validation documents into training."""
    for node in source.nodes:
        if called(node) == "add_argument" and "--val-docs" in list(strings_in(node)):
            value = next((word.value for word in node.keywords if word.arg == "default"), None)
            number = getattr(value, "value", None)
            if isinstance(value, ast.Constant) and number != 50_000:
                yield Finding(node, f"--val-docs is {number} by default, the contest's validation has 50,000 documents")
        for target, value in assigned(node):
            constant = isinstance(target, ast.Name) and re.fullmatch(r"(NUM_|N_)?VAL_DOCS", target.id)
            if constant and isinstance(value, ast.Constant) and value.value != 50_000:
                yield Finding(node, f"{target.id} is {value.value}, the contest's validation has 50,000 documents")


def lists_literals(node: ast.expr) -> bool:
    """Return whether an expression is nothing but literals, and lists of files by them: what it reads is certain."""
    listing = all(called(call) in ("glob", "iglob", "sorted", "list", "Path", "join") for call in calls(node))
    parts = ast.walk(node)
    return listing and not any(isinstance(part, ast.Compare | ast.IfExp | ast.comprehension) for part in parts)


def val_in_training(source: Source) -> Iterator[Finding]:
    """Training shards whose pattern names validation, or a training loader that is given validation shards."""
    pattern = re.compile(r"fineweb_val_(?!bytes)|/val[_/*]")
    for node in source.nodes:
        for target, value in assigned(node):
            if value is not None and any(
                re.match(r"train_(?!val)\w*(file|path|shard|glob|pattern)", n) for n in names_in(target)
            ):
                texts = [text for text in strings_in(value) if pattern.search(text)]
                if texts:
                    yield Finding(node, f"training reads {texts[0]}", lists_literals(value))
        if re.search(r"TrainLoader|train_loader|train_stream", called(node)):
            read = names_in(*node.args) & {"val_files", "val_tokens", "val_path", "val_data"}
            if read:
                yield Finding(node, f"a loader for training is given {min(read)}")


# Size, time and standing alone

COMPRESSORS = frozenset("brotli zstandard zstd pyzstd lz4 lrzip zopfli constriction".split())
PROGRAMS = re.compile(r"\b(lrzip|zpaq|xz|zstd|brotli|7z|cmix|paq8\w*)\b")


def ends_badly(body: list[ast.stmt]) -> bool:
    """Return whether statements end in an error."""
    nodes = [node for statement in body for node in ast.walk(statement)]
    return any(isinstance(node, ast.Raise) or called(node) in ("exit", "_exit", "abort") for node in nodes)


def refused_later(source: Source, handler: ast.ExceptHandler) -> bool:
    """Return whether what a handler sets stops the program later: `brotli = None`, and a raise under a test of it."""
    names = {name for statement in handler.body for target, _ in assigned(statement) for name in variables(target)}
    tests = [node for node in source.nodes if isinstance(node, ast.If) and variables(node.test) & names]
    return any(ends_badly(node.body) or ends_badly(node.orelse) for node in tests)


def compressor_fallback(source: Source) -> Iterator[Finding]:
    """Another compressor in silence where one is missing."""
    for node in source.nodes:
        if isinstance(node, ast.Try):
            inner = [part for statement in node.body for part in ast.walk(statement)]
            imported = {a.name.split(".")[0] for part in inner if isinstance(part, ast.Import) for a in part.names}
            imported |= {str(part.module).split(".")[0] for part in inner if isinstance(part, ast.ImportFrom)}
            ran = [part for part in inner if called(part) in ("run", "check_call", "check_output", "Popen")]
            program = next((m[0] for call in ran for text in strings_in(call) if (m := PROGRAMS.search(text))), "")
            missing = sorted(imported & COMPRESSORS) or ([program] if program else [])
            for handler in node.handlers if missing else ():
                if not ends_badly(handler.body) and not refused_later(source, handler):
                    yield Finding(handler, f"without {missing[0]} it goes on: the artifact may be over the cap")
        elif isinstance(node, ast.If) and any(called(call) == "which" for call in calls(node.test)):
            program = next((m[0] for text in strings_in(node.test) if (m := PROGRAMS.search(text))), "")
            if program and not ends_badly(node.body) and not ends_badly(node.orelse):
                yield Finding(node, f"without {program} it goes on: the artifact may be over the cap")


CALIBRATION = re.compile(r"hessian|calib", re.IGNORECASE)
RESERVE_SECONDS = 8  # 32 calibration batches took 3.5 to 6.9 s in published logs


def hessian_reserve(source: Source) -> Iterator[Finding]:
    """Hessians from training data, and no time kept for them inside the training clock."""
    used = [
        call
        for call in calls(source.tree)
        if CALIBRATION.search(called(call)) and re.search(r"train|loader", " ".join(names_in(*call.args)))
    ]
    if not used:
        return
    kept = [(knob, value) for knob, value in source.defaults.values() if re.search(r"RESERVE", knob)]
    seconds = [float(value) for _, value in kept if re.fullmatch(r"\d+(\.\d*)?", value)]
    if not kept:
        yield Finding(used[0], "Hessians read training data, and no knob keeps seconds of the training clock for them")
    elif seconds and max(seconds) < RESERVE_SECONDS:
        yield Finding(used[0], f"{kept[0][0]}={kept[0][1]}: Hessians took 3.5 to 6.9 s in published logs")


CLOCK = re.compile(r"wallclock|max_seconds|time_limit|train_budget", re.IGNORECASE)


def train_after_clock(source: Source) -> Iterator[Finding]:
    """A loop that trains on, after the loop that watches the clock."""
    for function in source.functions:
        loops = [node for node in ast.walk(function) if isinstance(node, Loop) and source.function_of(node) is function]
        outer = [loop for loop in loops if not isinstance(source.enclosing(loop, Loop), Loop)]
        trains = [loop for loop in outer if {"backward", "step"} <= {called(call) for call in calls(loop)}]
        for first, later in pairwise(sorted(trains, key=place)):
            if any(CLOCK.search(name) for name in names_in(first)) and not any(
                CLOCK.search(n) for n in names_in(later)
            ):
                yield Finding(later, f"it trains after the loop at line {first.lineno}, which watches the clock")


NETWORK = re.compile(  # imported names
    r"^(requests|httpx|urllib3|aiohttp|wget|gdown|boto3|ftplib|paramiko)\.|^urllib\.request\.|^http\.client\."
    r"|^datasets\.load_dataset$|^torch\.hub\.(load|download)|^wandb\.init$"
)
DOWNLOADS = ("hf_hub_download", "snapshot_download", "load_state_dict_from_url", "urlretrieve", "urlopen")
FETCHERS = re.compile(r"\b(curl|wget|aria2c|pip3? install|git clone|huggingface-cli|apt(-get)? install)\b")
RUNNERS = ("run", "call", "check_call", "check_output", "Popen", "system", "popen")


def is_network(source: Source, node: ast.AST) -> str:
    """Return what a call fetches with, "" if it fetches nothing."""
    if not isinstance(node, ast.Call):
        return ""
    name, root = source.dotted(node.func), node.func
    while isinstance(root, ast.Attribute):
        root = root.value
    imported = getattr(root, "id", "") in source.aliases or called(root) == "__import__"
    last = (name or called(node)).rpartition(".")[2]
    if last in DOWNLOADS or (imported and NETWORK.search(name)):
        return name or last
    command = " ".join(strings_in(node))
    if called(node) in RUNNERS and FETCHERS.search(command.replace("-m ", "")):
        return FETCHERS.search(command.replace("-m ", ""))[0]
    remote = called(node) == "from_pretrained" and node.args and isinstance(node.args[0], ast.Constant)
    return f"{name}({node.args[0].value!r})" if remote else ""


def network(source: Source) -> Iterator[Finding]:
    """Anything fetched while the program runs."""
    for node in source.nodes:
        if what := is_network(source, node):
            yield Finding(node, f"{what}: nothing may be fetched while it is scored")


def fetched_pickle(source: Source) -> Iterator[Finding]:
    """torch.load or pickle in a function that also fetches."""
    for function in source.functions:
        fetches = [node for node in ast.walk(function) if is_network(source, node)]
        for call in calls(function) if fetches else ():
            if source.dotted(call.func) in ("torch.load", "pickle.load", "pickle.loads", "joblib.load", "dill.load"):
                yield Finding(call, f"it unpickles in a function that fetches (line {fetches[0].lineno})")


RULES = (
    Rule(
        "C1",
        "ngram-target-key",
        ngram_target_key,
        "the target in the key of an n-gram table",
        "SCORES under changed futures",
    ),
    Rule(
        "C1",
        "smear-mask",
        smear_mask,
        "x[t] mixed with x[t - 1] across documents",
        "a run with another document before",
    ),
    Rule("C1", "smear-switch", smear_switch, "a document mask that is off by default", "the knob in the run's log"),
    Rule(
        "C1",
        "slot-fit",
        slot_fit,
        "a shift fitted on the targets that it scores (SLOT)",
        "SCORES under a changed target",
    ),
    Rule("C2", "gold-only-mix", gold_only_mix, "only the right token's probability mixed", "the sum over every id"),
    Rule(
        "C3",
        "score-after-update",
        score_after_update,
        "a chunk scored after learning from it",
        "SCORES with their steps",
    ),
    Rule(
        "C3", "prequant-ttt", prequant_ttt, "adaptation on validation before packing", "weights beside other validation"
    ),
    Rule("C4", "oracle-min", oracle_min, "the lower of several scores", "how often each target is scored"),
    Rule("C4", "val-limit", val_limit, "a part of validation scored", "tokens and bytes in the log"),
    Rule("bytes", "byte-table", byte_table, "spaces or byte pieces miscounted", "the denominator in the log"),
    Rule("bytes", "byte-guess", byte_guess, "bytes guessed from tokens", "the denominator in the log"),
    Rule("bytes", "sidecar", sidecar, "case operators counted as bytes", "the denominator in the log"),
    Rule(
        "split", "val-in-training", val_in_training, "validation shards in training", "weights beside other validation"
    ),
    Rule(
        "size",
        "compressor-fallback",
        compressor_fallback,
        "another compressor in silence",
        "a run without the compressor",
    ),
    Rule(
        "time", "hessian-reserve", hessian_reserve, "no time kept for Hessians", "the end of the Hessians on the clock"
    ),
    Rule("time", "train-after-clock", train_after_clock, "training after the clock", "the clock at the last update"),
    Rule("alone", "network", network, "fetching while it runs", "a run without a network"),
    Rule("alone", "fetched-pickle", fetched_pickle, "pickles that were fetched", "a run without a network"),
)
# for files that prepare data, which are not run when scoring
DATA_RULES = (
    Rule("split", "val-docs", val_docs, "--val-docs that is not 50,000", "hashes of training and validation documents"),
)
