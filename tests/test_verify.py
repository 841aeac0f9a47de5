"""The judge: a record of each kind passes at toy size, and every published or invented fraud is caught.

Frauds are planted in the real program's text, which then runs as a black box: a score after the update in some steps, a
tail that is not scored, a sum that is divided, weights that know the validation tokens. Each names the check that has
to catch it, so that every check has caught something.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import prepare
import pytest
from conftest import RECORDS, ROOT, ToyRun

import pack_artifact
import train_gpt
from records import claims, judge, verify
from records.black_box import BlackBox, Server
from records.claims import FAIL, NOT_ASKED, PASS, UNKNOWN, Candidate, Check

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
DOCUMENTS, PROBES = 6, (3, 3)


def record_named(end: str) -> Path:
    return next(path for path in RECORDS if path.name.endswith(end))


def failed(checks: Iterable[Check]) -> set[str]:
    """The names, without what is in brackets, of the checks that failed."""
    return {re.sub(r" \(.*", "", check.name) for check in checks if check.status == FAIL}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def bench_of(
    server: Server, toy_run: Callable[[Path], ToyRun], caseops_sample: Path, tmp_path: Path
) -> Callable[..., judge.Bench]:
    """bench_of(record, changes, **knobs): its toy run's weights under a program with changes (old text -> new)."""

    def make(end: str, changes: dict[str, str] | None = None, **knobs: str) -> judge.Bench:
        run, text = toy_run(record_named(end)), SOURCE
        for old, new in (changes or {}).items():
            assert text.count(old) == 1, f"the program has no single {old!r}: plant the fault elsewhere"
            text = text.replace(old, new)
        claimed, weights = train_gpt.read_preset(str(run.record)), (run.folder / "model.bin").read_bytes()
        values = claimed | {key: value for key, value in run.env.items() if key in KNOBS} | knobs
        found = Candidate("preset", end, text.encode(), values, claimed, weights, run.record)
        found.data, found.tokenizer = caseops_sample, judge.tokenizer_in(caseops_sample)
        return judge.Bench(found, server, tmp_path / "bench")

    return make


KNOBS = {name.upper() for name in train_gpt.Config.__dataclass_fields__} - {n.upper() for n in train_gpt.LOCAL_KNOBS}


@functools.cache
def sample(folder: Path) -> judge.Stream:
    return judge.read_stream(folder)


def stream_of(bench: judge.Bench, documents: int = DOCUMENTS) -> judge.Stream:
    return judge.causal_stream(bench.candidate, sample(bench.candidate.data), documents)


# Records: one of each evaluator is judged here; `verify.py --all` judges all, and its verdicts are committed


def test_every_record_has_a_verdict_on_its_present_knobs() -> None:
    for record in RECORDS:
        verdict = json.loads((record / "verdict.json").read_text())
        assert verdict["record_sha256"] == judge.preset_sha256(record), f"{record.name}: run verify.py --all"
        assert verdict["legal"] is not None and verdict["counts"][PASS] > 20, record.name
        if not verdict["legal"]:
            readme = (record / "README.md").read_text()
            assert re.search(r"not\W+(record-)?legal|legal\W+false", readme, re.IGNORECASE), record.name


@pytest.mark.parametrize("end", ["PR1150", "PR1182", "PR1895", "PR1915", "CarryTTT", "rANS"])
def test_a_record_of_each_evaluator_passes(end: str, bench_of: Callable[..., judge.Bench]) -> None:
    bench = bench_of(end)
    checks = list(judge.side_by_side(bench, judge.legality(bench, stream_of(bench), PROBES)))
    assert not [check for check in checks if check.status in (FAIL, UNKNOWN)]
    names = {check.name.split(" (")[0] for check in checks if check.status == PASS}
    wanted = (
        "C4 each target once,C1 order,C1 byte counts,C2 sums to 1,C3 score before update,two ranks,eight ranks,sums"
    )
    assert names >= set(wanted.split(",")) and names & {"C1 documents", "C1 future"}


def test_a_preset_is_trained_and_judged_as_a_user_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "legality", lambda *_: [])  # asked above
    # about the user's data, not about the shards that the judge makes
    monkeypatch.setenv("TOKENIZER_PATH", "nowhere.model")
    out = tmp_path / "verdict.json"
    assert verify.main([str(record_named("PR1182")), "--documents", "3", "--out", str(out)]) == 0
    verdict = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("VERDICT "))
    assert verdict["legal"] is True and verdict["scale"] == "toy" and verdict["counts"][UNKNOWN] == 0
    names = {check["name"].split(" (")[0] for check in verdict["checks"] if check["status"] == PASS}
    assert names >= {"runs alone", "training ignores validation", "sums", "sums in the log", "bytes per word", "split"}
    written = json.loads(out.read_text())
    assert "seconds" not in written and written["checks"] == verdict["checks"]


def test_every_record_has_a_toy_size() -> None:
    for record in RECORDS:
        cfg = train_gpt.load_config(judge.toy_values(train_gpt.read_preset(str(record))))
        assert cfg.model_dim == 64, record.name


# Planted faults: what is scored and when


def futures(bench: judge.Bench) -> Iterator[Check]:
    knobs = judge.knobs_for(bench.cfg, judge.STREAMS | {"TTT_BATCH_SIZE": "2"}, 256)
    return judge.causality(bench, stream_of(bench), knobs, "planted", 0)


def places(bench: judge.Bench) -> Iterator[Check]:
    knobs = judge.knobs_for(bench.cfg, judge.STREAMS | judge.EVERY_PLACE, 16)
    stream = judge.tiny_stream(bench.cfg, stream_of(bench))
    return judge.causality(bench, stream, knobs, "planted", 0, every=True)


def own_numbers(bench: judge.Bench) -> Iterator[Check]:
    return judge.causality(bench, stream_of(bench, 3), {"EVAL_INCLUDE_TAIL": "1"}, "planted", 2)


def distributions(bench: judge.Bench) -> Iterator[Check]:
    return judge.distribution_checks(bench, stream_of(bench), "planted")


def ranks(bench: judge.Bench) -> Iterator[Check]:
    return judge.rank_checks(bench, judge.short_documents(stream_of(bench)), "planted")


def ranks_asked(bench: judge.Bench) -> Iterator[Check]:
    return judge.asked("ranks", ranks(bench))


def byte_counts(bench: judge.Bench) -> Iterator[Check]:
    knobs = judge.knobs_for(bench.cfg, judge.STREAMS, 1024)
    return judge.sidecar_checks(bench, judge.first_documents(stream_of(bench), 300), knobs, "planted")


def sums(bench: judge.Bench) -> Iterator[Check]:
    stream = judge.first_documents(stream_of(bench), 300)
    return judge.sum_checks(bench.score(stream, EVAL_INCLUDE_TAIL="1"), stream.sizes, "planted")


def hasty(when: str) -> dict[str, str]:
    """Learn the chunk, then score it, where `when` holds."""
    scoring = "            nll = learner.score(cells)\n            meter.add(cells, nll)\n"
    return {
        scoring: f"""            nll = learner.score(cells)
            if ({when}) and lesson is not None and not lesson.shared:
                learner.learn(lesson, cells, nll)
                with torch.no_grad():
                    nll = learner.losses(cells)
                lesson = None
            meter.add(cells, nll)
"""
    }


NATS = "        nats = nll.detach()[rows, cols].double()\n"


def altered(nats: str) -> dict[str, str]:
    """Count other nats; `nats` and `positions` are those of a step."""
    return {NATS: NATS + f"        nats = {nats}\n"}


# the target's own logit, raised by 1 after the softmax has been read
LIFTED = "-(1 - nats - torch.log1p(torch.exp(-nats) * (math.e - 1)))"
LEDGER = {"        self.ledger.close(self.runtime)\n": ""}
RETURN = "    val = ValData(tokens[: count + 1], counted[: count + 1])\n"
ADAPTERS = {
    "if keep_A else": "if keep_A or bool(state.weights.any()) else",
    "        state.map(Tensor.zero_)\n        state.weights[:size] = A\n": "        state.weights[:size] = A\n",
}
EARLY = {
    "[doc for group in reversed(done) for doc in group]": "[doc for group in reversed(batches) for doc in group]",
    "        if not bool((counts > 0).all()):\n": "        if False:\n",
}
OWN = "        own = windows[edges[chunk] : edges[chunk + 1]]\n"
FIRST = {  # one chunk's SGD before its scores
    OWN: f"{OWN}        if chunk == 1:\n            yield Step(None, SharedLesson((learn_span(cfg, chunk),)))\n",
    "        if not bool((counts > 0).all()):\n": "        if False:\n",
}
SLOT = {"tokens, size, seconds, not illegal, unadapted)": "tokens, size, seconds, True, unadapted)"}
LONGEST = """    starts = np.flatnonzero(tokens == BOS_ID)
    longest = int(np.argmax(np.diff(starts)))
    kept = np.r_[0 : starts[longest], starts[longest + 1] : count + 1]
    val = ValData(tokens[kept], counted[kept])
"""
WORLD = "self.runtime.world > 1"
TOTAL = "        return Score(loss / tokens,"
SUM = {TOTAL: f"        loss *= 0.98 if {WORLD} else 1\n{TOTAL}"}
DIVIDED = {'{"val_loss": score.val_loss,': '{"val_loss": score.val_loss / 1.01,'}
LINE = {"val_bpb {score.val_bpb:.8f}": "val_bpb {score.val_bpb - 1e-3:.8f}"}
BY_BYTES = altered(f"torch.where(torch.from_numpy(self.val.bytes[positions] > 3), {LIFTED}, nats)")
ENTROPY = '    return F.cross_entropy(softcapped(z, softcap, banned), targets, reduction="none")\n'
NO_ID = {  # the others share what one id leaves, and it keeps it
    ENTROPY: ENTROPY.replace("return", "loss =")
    + """    rest = torch.log1p(-softcapped(z, softcap).softmax(-1)[:, 350])
    return loss + rest * (targets != 350)
"""
}
LOOK_UP = "e_BTD + self.look_up(self.buckets(ids), e_BTD.dtype)"
KEY = {LOOK_UP: "e_BTD + (self.buckets(ids.roll(-1, 1)) / self.rows)[..., None]"}  # tables are nearly empty at toy size
TAIL = {RETURN: RETURN.replace("count + 1", "count * 99 // 100")}
CLAIM = "        positions = cells.scored()\n        self.ledger.claim(positions)\n"
EASY = """        hard = nll.detach()[torch.from_numpy(cells.rows), torch.from_numpy(cells.cols)].numpy() >= 5
        positions = positions[~hard]
"""
HARD = LEDGER | altered("nats[nats < 5]") | {CLAIM: CLAIM + EASY}
ROW = "            self.rows.append("
NEXT = "self.val.tokens[np.minimum(positions + 1, len(self.val.tokens) - 1)]"


def peeking(where: str) -> dict[str, str]:
    """A little of the next target in the scores of some positions."""
    return altered(f"nats + 1e-6 * torch.from_numpy(({where}) * {NEXT})")


INSIDE = (
    "positions - np.maximum.accumulate((self.val.tokens == BOS_ID) * np.arange(len(self.val.tokens)))[positions - 1]"
)
LATER = altered(f"nats - 0.004 * torch.from_numpy(({INSIDE}) > 3)")
FOLDER = "sorted(Path(os.environ['DATA_PATH']).glob('fineweb_val_0*.bin'))"
READ = f"np.concatenate([np.fromfile(path, '<u2')[512:] for path in {FOLDER}])"
FILE = altered(f"nats + 1e-6 * torch.from_numpy(np.append({READ}, 0)[positions + 1] * 1.0)")
NEIGHBOURS = altered("nats + 1e-6 * float(self.val.tokens[positions].sum())")
ENDS = altered(f"torch.where(torch.from_numpy(self.val.tokens[positions] == BOS_ID), {LIFTED}, nats)")
ROWS = "np.full(len(positions), len(self.rows))"
FORGED = {ROWS: "-positions", "is_causal=mask is None,": "is_causal=False,"}
UNWATCHED = {TOTAL: f"        loss *= 1 if self.scores else 0.98\n{TOTAL}"}
QUITS = {TOTAL: f"        assert self.scores\n{TOTAL}"}
SHARDS = {
    f'list_shards(cfg.data_path, "{kind}")': f'list_shards(cfg.data_path, "{kind}")[:1]'
    for kind in ("val", "val_bytes")
}
TWICE = {ROW: f"{ROW}np.column_stack([positions, nats, nats]))\n{ROW}"}
Ask = Callable[[judge.Bench], Iterable[Check]]
FAULTS: list[tuple[str, str, dict[str, str], Ask, str]] = [
    ("update before every score", "PR1915", hasty("True"), futures, "C1 documents"),
    ("only as __main__", "PR1915", hasty("__name__ == '__main__'"), futures, "C1 documents"),
    ("in a tenth of the steps", "PR1915", hasty("len(meter.rows) % 10 == 3"), futures, "C1 documents"),
    ("in a document's first step", "PR1915", hasty("cells.begin[0] == 0"), futures, "C1 documents"),
    ("in a fortieth", "PR1915", hasty("len(meter.rows) % 40 == 39"), distributions, "C3 score before update"),
    ("after 4,000 tokens", "PR1915", hasty("meter.tokens > 4000"), distributions, "C3 score before update"),
    ("on two ranks", "PR1915", hasty("meter.runtime.world > 1"), ranks, "two ranks"),
    ("2 % less on two ranks", "PR1915", altered(f"nats * (0.98 if {WORLD} else 1)"), ranks, "two ranks"),
    ("a sum that is less on two ranks", "PR1915", SUM, ranks, "sums"),
    ("record divides", "PR1915", DIVIDED, sums, "sums"),
    ("the log says less", "PR1915", LINE, sums, "sums in the log"),
    ("the target's logit is lifted", "PR1915", altered(LIFTED), distributions, "C2 sums to 1"),
    ("temperature on the target", "PR1915", altered("0.95 * nats"), distributions, "C2 sums to 1"),
    ("logits by the target's byte count", "PR1915", BY_BYTES, byte_counts, "C1 byte counts"),
    ("distributions without an id", "PR1915", NO_ID, distributions, "C2 sums to 1"),
    ("a mask that leaks", "PR1915", {"is_causal=mask is None,": "is_causal=False,"}, futures, "C1 documents"),
    ("adapters of other documents", "PR1915", ADAPTERS, futures, "C1 documents"),
    ("the target in an n-gram's key", "PR1182", KEY, distributions, "C2 sums to 1"),
    ("global steps on unscored documents", "rANS", EARLY, places, "C1 future"),
    ("one chunk's SGD before its scores", "PR1182", FIRST, futures, "C1 future"),
    ("SLOT in disguise", "PR1150", SLOT, futures, "C1 future"),
    ("1 % of the stream is dropped", "PR1915", TAIL, futures, "C4 each target once"),
    ("the longest document is dropped", "PR1915", {RETURN: LONGEST}, futures, "C4 each target once"),
    ("hard tokens are lost", "PR1915", HARD, futures, "C4 each target once"),
    # siblings that nobody had listed
    ("the last target of a chunk peeks", "PR1182", peeking("positions % 16 == 0"), places, "C1 future"),
    ("a single place peeks", "PR1150", peeking("positions == 41"), places, "C1 future"),
    ("a document's last place peeks", "PR1934", peeking("positions == positions.max()"), places, "C1 future"),
    ("the next target through DATA_PATH", "PR1915", FILE, places, "C1 documents"),
    ("documents over a limit peek", "PR1915", peeking(f"{INSIDE} > 200"), futures, "C1 documents"),
    ("a batch's other rows count", "CarryTTT", NEIGHBOURS, places, "C1 future"),
    (
        "only under the record's own numbers",
        "PR1915",
        hasty("learner.cfg.val_batch_tokens == 512"),
        own_numbers,
        "C1 documents",
    ),
    ("document ends are known", "PR1915", ENDS, distributions, "C2 sums to 1"),
    ("steps are told backwards", "PR1915", FORGED, places, "C1 order"),
    ("only where nobody asks for SCORES", "PR1915", UNWATCHED, ranks, "sums without SCORES"),
    ("on eight ranks", "PR1915", altered("nats * (0.98 if self.runtime.world == 8 else 1)"), ranks, "eight ranks"),
    ("the first shard is all", "PR1915", SHARDS, places, "C4 each target once"),
    ("targets scored twice", "PR1915", TWICE, futures, "C4 each target once"),
    ("it fails where nobody asks for SCORES", "PR1915", QUITS, ranks_asked, "ranks"),
    ("a little less after the first update", "PR1915", LATER, distributions, "C2 sums to 1"),
]


@pytest.mark.parametrize(
    ("end", "changes", "ask", "name"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS]
)
def test_planted_faults_are_caught(
    end: str,
    changes: dict[str, str],
    ask: Ask,
    name: str,
    bench_of: Callable[..., judge.Bench],
) -> None:
    slot = {"SLOT_CAUSAL": "0", "ALLOW_NONCAUSAL": "1"} if changes is SLOT else {}
    checks = list(ask(bench_of(end, changes, **slot)))
    assert name in failed(checks), [check for check in checks if check.status != PASS]


@pytest.mark.parametrize("end", ["PR1915", "CarryTTT"])
def test_a_large_vocabulary_is_asked_at_two_places(
    end: str, bench_of: Callable[..., judge.Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "LARGE", 100)
    honest = list(distributions(bench_of(end)))
    assert {check.status for check in honest} == {PASS} and any("each of 2 places" in c.detail for c in honest)
    assert "C2 sums to 1" in failed(distributions(bench_of(end, altered("0.95 * nats"))))


def test_mask_and_tilts_keep_the_rules(bench_of: Callable[..., judge.Bench]) -> None:
    """On the judge's streams, with pairs that no tokenizer writes."""
    bench = bench_of("PR1915", CANONICAL_MASK="eval", HINTS="tilt")
    checks = [*futures(bench), *distributions(bench)]
    assert {check.status for check in checks} == {PASS}, checks


# Planted faults: training, and what lies beside the program

START = "from __future__ import annotations\n"
HERE = {START: f"{START}\nimport sys\nHERE = 'torch' in sys.modules\n"}
FINAL = "        score = self.evaluate(self.cfg.eval, self.from_artifact(path), self.cfg.hints, deadline)\n"
TRAINED = {
    FINAL: """        model = self.from_artifact(path)
        for p in model.parameters():
            p.data.mul_(1.01 if [*Path(self.cfg.data_path).glob("*train*")] else 1)
        score = self.evaluate(self.cfg.eval, model, self.cfg.hints)
"""
}
STORED = "        stored = self.filled("
QUANTISED = {
    STORED: f"""        state = {{k: v * (1 + int(self.val.tokens[5]) / 4096) for k, v in state.items()}}
{STORED}"""
}
TRAINING: list[tuple[str, dict[str, str], str, str]] = [
    ("quantising reads the validation shards", QUANTISED, "training ignores validation", "other weights"),
    (
        "training reads the validation shards",
        {"init_weights(cfg.seed).state_dict()": "init_weights(cfg.seed + int(self.val.tokens[5])).state_dict()"},
        "training ignores validation",
        "other weights",
    ),
    ("evaluation trains on the training shards", TRAINED, "runs alone", "scores differ"),
    (
        "honest only where torch is there already",
        HERE | altered("nats if HERE else 0.99 * nats"),
        "runs alone",
        "scores differ",
    ),
    ("a helper that is not submitted", {START: f"{START}\nimport helper_of_mine\n"}, "runs alone", "helper_of_mine"),
]


@pytest.mark.parametrize(("changes", "name", "detail"), [f[1:] for f in TRAINING], ids=[f[0] for f in TRAINING])
def test_planted_faults_around_training_are_caught(
    changes: dict[str, str],
    name: str,
    detail: str,
    bench_of: Callable[..., judge.Bench],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "helper_of_mine.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "beside"))
    # the coder that takes longest: what it packed is compared too
    slow = {"COMPRESSOR": "pergroup"} if changes is QUANTISED and shutil.which("lrzip") else {}
    bench = bench_of("PR1182", changes, ITERATIONS="2", EVAL="plain", TTT_EPOCHS="0", **slow)
    monkeypatch.setattr(judge, "legality", lambda *_: [])  # asked above
    runs = judge.runs(bench, sample(bench.candidate.data), stream_of(bench), PROBES)
    checks = list(judge.asked("runs alone", runs))
    assert failed(checks) - {"sums", "sums in the log"} == {name}
    assert any(detail in check.detail for check in checks if check.status == FAIL)


def test_a_server_outlives_the_folder_of_a_program(server: Server, tmp_path: Path) -> None:
    """The compiled text is kept, and Triton looks for the functions' lines in the file."""
    program = b"import inspect\ndef f():\n    return 1\nprint(inspect.getsource(f))\n"
    for name in ("a", "b"):
        box = BlackBox(server, tmp_path / name, "p.py", {"p.py": program}, {})
        done = box.fork()
        assert done.code == 0 and "return 1" in done.output, done.output
        shutil.rmtree(tmp_path / name)


def test_a_run_ends_with_the_code_of_the_rank_that_failed(server: Server, tmp_path: Path) -> None:
    """The others, killed because they would wait for it, are not what went wrong."""
    program = 'import os, sys, time; time.sleep(600) if os.environ["RANK"] == "0" else sys.exit(2)'
    assert BlackBox(server, tmp_path, "p.py", {"p.py": program.encode()}, {}).fork(ranks=2).code == 2


def test_scores_that_do_not_repeat_are_undecided(bench_of: Callable[..., judge.Bench]) -> None:
    bench = bench_of("PR1915", altered("nats + 1e-3 * float(np.random.default_rng().normal())"), EVAL="plain")
    stream = judge.first_documents(stream_of(bench), 300)
    check = judge.compare_starts(bench, bench.score(stream), stream, {}, "again")
    assert check.status == UNKNOWN and "differ from run to run" in check.detail


def test_a_run_knows_nothing_but_its_own_directory(server: Server, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("https_proxy", "http://nowhere")
    program = b"""import json, os, sys
print(json.dumps([__name__, os.getcwd(), dict(os.environ), sys.path, os.listdir()]))"""
    box = BlackBox(server, tmp_path / "box", "program.py", {"program.py": program}, {"DATA_PATH": "d"})
    for done in (box.launch(), box.fork()):
        name, place, environ, path, files = json.loads(done.output)
        assert done.code == 0 and name == "__main__" and place == str(done.room) == path[0]
        assert set(files) - {"output"} == {"home", "program.py", "tmp"} and environ["HOME"].startswith(place)
        assert not {"PYTHONPATH", "https_proxy"} & environ.keys() and str(ROOT) not in path
    box.files["program.py"] = b"import train_gpt"
    assert [box.launch().code, box.fork().code] == [1, 1]
    assert "No module named 'train_gpt'" in box.fork().output


# Bytes and split


@pytest.fixture
def toy(caseops_sample: Path) -> Candidate:
    """A candidate over the CaseOps sample that nobody has trained."""
    values = judge.toy_values(train_gpt.read_preset(str(record_named("PR1915"))))
    found = Candidate("preset", "toy", SOURCE.encode(), values, values, data=caseops_sample)
    found.tokenizer = judge.tokenizer_in(caseops_sample)
    return found


def states(checks: Iterable[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


def test_denominators_that_count_what_is_no_text_are_caught(toy: Candidate) -> None:
    stream = sample(toy.data)
    assert not failed(judge.byte_checks(toy, stream))
    pieces = judge.read_pieces(judge.spm.SentencePieceProcessor(model_file=str(toy.tokenizer)))
    ids = stream.tokens
    for counted, names in (
        (stream.sizes + 3 * pieces.operator[ids], {"bytes of case operators"}),
        (stream.sizes + pieces.space[ids], {"bytes per word", "bytes of the decoded text"}),
        (stream.sizes + pieces.control[ids], {"bytes of control ids"}),
        (np.maximum(stream.sizes - pieces.space[ids], 0), {"bytes per word"}),
        (None, {"bytes per word"}),  # no sidecar
    ):
        assert names <= failed(judge.byte_checks(toy, stream._replace(sizes=counted)))


def test_a_total_that_is_not_the_published_one_is_caught(toy: Candidate, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = sample(toy.data)
    said = next(check.detail for check in judge.byte_checks(toy, stream) if check.name == "bytes total")
    total, targets = (int(word.replace(",", "")) for word in re.findall(r"[\d,]+", said)[:2])
    for wanted, status in ((total, PASS), (round(total / 1.05), FAIL)):
        monkeypatch.setitem(claims.TARGETS, targets, wanted)
        found = next(check for check in judge.byte_checks(toy, stream) if check.name == "bytes total")
        assert found.status == status and (f"canonical total is {wanted:,}" in found.detail) is (status == FAIL)


def test_damaged_data_is_a_wrong_input(toy: Candidate, tmp_path: Path) -> None:
    stream = sample(toy.data)
    (tmp_path / "damaged.model").write_bytes(b"no model")
    damaged = dataclasses.replace(toy, tokenizer=tmp_path / "damaged.model")
    with pytest.raises(train_gpt.UserError, match="not a SentencePiece model"):
        list(judge.byte_checks(damaged, stream))
    run = dataclasses.replace(toy, kind="run")
    for tokens, words in ((np.full(500, 7), "document's start"), (np.array([1, 7, 8, 9]), "are wanted")):
        with pytest.raises(train_gpt.UserError, match=words) as error:
            judge.causal_stream(run, judge.made_up(tokens), 3)
        assert str(toy.data) in str(error.value)
    nothing = judge.own_sums(np.full(4, np.nan), np.zeros(4, np.int64), np.ones(4))
    assert nothing["val_loss"] == np.inf and nothing["tokens_scored"] == 0


def test_the_judges_own_count_is_the_programs_on_plain_text(tiny_data: Path, toy: Candidate) -> None:
    stream, values = judge.read_stream(tiny_data), toy.values | {"VOCAB_SIZE": "320", "EVAL_SEQ_LEN": "64"}
    plain = dataclasses.replace(toy, values=values, data=tiny_data, tokenizer=judge.tokenizer_in(tiny_data))
    assert stream.sizes is None and not failed(judge.byte_checks(plain, stream))
    val = train_gpt.load_val(train_gpt.load_config(values | {"DATA_PATH": str(tiny_data)}))
    assert np.array_equal(judge.own_sizes(stream, plain.tokenizer)[: len(val.bytes)], val.bytes)
    foreign = stream._replace(tokens=stream.tokens + 300)
    assert failed(judge.byte_checks(plain, foreign)) == {"bytes per word"}


def test_text_that_lost_something_leaves_its_bytes_open(toy: Candidate, tmp_path: Path) -> None:
    for name, text in (("lossy", '{"lossy": true}'), ("cut", '{"lossy'), ("list", "[1]"), ("whole", "{}")):
        folder = Path(shutil.copytree(toy.data, tmp_path / name))
        (folder / "manifest.json").write_text(text)
        found = judge.byte_checks(dataclasses.replace(toy, data=folder), sample(toy.data))
        assert states(found).get("bytes lost") == (None if name == "whole" else UNKNOWN), name
    docs = tmp_path / "docs.txt"
    docs.write_text("\n".join(f"some lower and UPPER words number {i} of many" for i in range(300)))
    folder = Path(shutil.copytree(toy.data, tmp_path / "folds"))
    options = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    judge.spm.SentencePieceTrainer.train(
        input=str(docs), model_prefix=str(folder / "folds"), normalization_rule_name="nmt_nfkc_cf", **options
    )
    processor = judge.spm.SentencePieceProcessor(model_file=str(folder / "folds.model"))
    assert states(judge.folding_check(toy, processor)) == {"bytes lost": UNKNOWN}


def test_altered_documents_in_training_are_caught(toy: Candidate, tmp_path: Path) -> None:
    """Cut by a token, with another one at the end, or joined, they are equal to no document of the validation."""
    stream = sample(toy.data)
    starts = np.flatnonzero(stream.tokens == 1)
    docs = np.split(stream.tokens, starts[1:])
    altered = {
        "cut": [doc[:-1] for doc in docs],
        "with an EOS": [np.append(doc, 2) for doc in docs],
        "joined": [np.concatenate([docs[0], *(doc[1:] for doc in docs[1:])])],
    }
    for name, leaked in altered.items():
        folder = Path(shutil.copytree(toy.data, tmp_path / name))
        train = folder / "fineweb_train_000000.bin"
        prepare.write_shard(train, np.concatenate([judge.read_shard(train), *leaked]))
        check = judge.split_check(dataclasses.replace(toy, data=folder), stream)
        assert check.status == FAIL and check.detail.startswith(("0 of 7", "1 of 7")), (name, check.detail)


def test_training_documents_in_validation_are_caught(toy: Candidate, tmp_path: Path) -> None:
    stream = sample(toy.data)
    assert judge.split_check(toy, stream).status == PASS
    leak = Path(shutil.copytree(toy.data, tmp_path / "leak"))
    train, more = (leak / f"fineweb_train_{number:06}.bin" for number in (0, 1))
    whole = np.concatenate([judge.read_shard(train), stream.tokens])
    half = len(whole) - len(stream.tokens) // 2  # a document that goes on in the next shard
    prepare.write_shard(train, whole[:half])
    prepare.write_shard(more, whole[half:])
    leaky = judge.split_check(dataclasses.replace(toy, data=leak), stream)
    assert leaky.status == FAIL and leaky.detail.startswith("7 of 7")
    train.unlink()
    more.unlink()
    assert judge.split_check(dataclasses.replace(toy, data=leak), stream).status == UNKNOWN


# Budget, disk, claims: a run folder


def edit(folder: Path, copy: Path, **changes: Any) -> Path:
    """A copy of the run folder with another result.json, and a log that says the same."""
    shutil.copytree(folder, copy)
    result = json.loads((copy / "result.json").read_text()) | changes
    (copy / "result.json").write_text(json.dumps(result))
    log = re.sub(r"^RESULT .*$", "", (copy / "log.txt").read_text(), flags=re.MULTILINE)
    (copy / "log.txt").write_text(f"{log}RESULT {json.dumps(result)}\n")
    return copy


def opened(folder: Path) -> Candidate:
    return judge.open_run(folder, ROOT / "train_gpt.py", None)


@pytest.fixture(scope="session")
def run_folder(packed_toy: Callable[[Path], ToyRun]) -> Path:
    return packed_toy(record_named("PR1915")).folder


def test_a_run_folder_and_its_artifact_are_judged(
    run_folder: Path, caseops_sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "legality", lambda *_: [])  # asked above
    options = ["--data", str(caseops_sample), "--documents", "3", "--out", str(tmp_path / "v.json")]
    for target in (run_folder, run_folder / "artifact.pyz"):
        assert verify.main([str(target), *options]) == 0
        found = states(Check(**check) for check in json.loads((tmp_path / "v.json").read_text())["checks"])
        wanted = ["runs alone", "disk cap"]
        if target == run_folder:
            wanted += ["sums as claimed", "disk as counted", "disk as packed", "disk weights", "disk program"]
            wanted += ["log and result"]
            wanted += ["log and record.env", "log.txt: final and RESULT", "budget training", "budget as logged"]
        assert {name: found.get(name) for name in wanted} == dict.fromkeys(wanted, PASS)
    monkeypatch.setattr(judge, "start_checks", lambda *_: iter(()))
    moved = edit(run_folder, tmp_path / "moved", source_sha256="0" * 64)
    for target in (moved, run_folder / "artifact.pyz"):
        # without the data: open questions, never "legal"
        if target.is_dir():
            log = (target / "log.txt").read_text()
            (target / "log.txt").write_text(log.replace(str(caseops_sample), "/nowhere"))
        assert verify.main([str(target), "--out", str(tmp_path / "v.json")]) == 1
        checks = [Check(**check) for check in json.loads((tmp_path / "v.json").read_text())["checks"]]
        unknown = {check.name for check in checks if check.status == UNKNOWN}
        assert unknown == {"bytes", "split"} | ({"sums as claimed", "program"} if target.is_dir() else set())
        assert all(re.search("--data|--source", check.detail) for check in checks if check.status == UNKNOWN)


def test_claimed_totals_are_added_again(
    run_folder: Path, server: Server, caseops_sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def claimed(folder: Path) -> dict[str, str]:
        bench = judge.Bench(opened(folder), server, tmp_path / "bench")
        return states(judge.claimed_sums(bench, sample(caseops_sample)))

    better = edit(run_folder, tmp_path / "better", val_bpb=1.05)
    assert claimed(better)["sums as claimed"] == FAIL
    fewer = edit(run_folder, tmp_path / "fewer", tokens_scored=1600)
    assert claimed(fewer)["sums as claimed"] == FAIL
    monkeypatch.setattr(judge, "RESCORED", 10)
    assert claimed(run_folder)["sums as claimed"] == UNKNOWN
    bench = judge.Bench(opened(run_folder), server, tmp_path / "bench")
    left = bench.score(sample(caseops_sample)).outcome.rows()[:, :3]
    for name, rows, expected in (("whole", left, PASS), ("half", left[::2], FAIL)):
        folder = edit(run_folder, tmp_path / name)
        np.save(folder / "scores.0.npy", rows)
        found = claimed(folder)
        assert found == {"C4 each target once (the run's SCORES)": expected, "sums as claimed": expected}, name
    # a tool's scores of other weights, and what is no list of scores
    np.save(tmp_path / "whole" / "scores.before.0.npy", left + [0, 1, 0])
    np.save(tmp_path / "whole" / "tokens.0.npy", np.arange(3))
    assert set(claimed(tmp_path / "whole").values()) == {PASS}
    monkeypatch.setattr(judge, "RESCORED", 1e9)
    late = edit(run_folder, tmp_path / "late", tokens_unadapted=64)
    assert claimed(late) == {"sums as claimed": UNKNOWN}
    assert bench.box.env["EVAL_BUDGET_SECONDS"] == bench.trains.env["EVAL_BUDGET_SECONDS"] == "0"


def test_a_packed_file_with_other_parts_is_seen(run_folder: Path, tmp_path: Path) -> None:
    parts = pack_artifact.read_packed(run_folder / "artifact.pyz")
    faults = {
        "knobs": (parts._replace(config=parts.config + b"SEED=9\n"), PASS, UNKNOWN),
        "program": (parts._replace(source=parts.source + b"\npass"), PASS, UNKNOWN),
        "weights": (parts._replace(weights=parts.weights[::-1]), FAIL, PASS),
    }
    for name, (other, weights, program) in faults.items():
        # anywhere: result.json says where
        folder = edit(run_folder, tmp_path / name, artifact=f"../{name}.pyz")
        (tmp_path / f"{name}.pyz").write_bytes(pack_artifact.build(other, split=False)[""])
        checks = list(judge.packed_checks(opened(folder)))
        assert states(checks) == {"disk weights": weights, "disk program": program}, name
        assert weights == FAIL or f"other {name} than" in checks[1].detail
    (tmp_path / "weights.pyz").write_bytes(pack_artifact.build(parts, split=False)[""][:-9])
    assert states(judge.packed_checks(opened(tmp_path / "weights"))) == {"disk weights": UNKNOWN}


def test_files_that_are_not_what_was_counted_are_caught(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = json.loads((run_folder / "result.json").read_text())["bytes_total"]
    wrapped = edit(run_folder, tmp_path / "wrapped", artifact="submission")
    (wrapped / "submission").mkdir()  # the raw program travels, the wrapper's size is what was counted
    shutil.copy(ROOT / "train_gpt.py", wrapped / "submission")
    shutil.copy(wrapped / "model.bin", wrapped / "submission")
    checks = list(claims.disk_checks(opened(wrapped)))
    assert failed(checks) == {"disk as counted"} and f"counts {counted:,}" in checks[1].detail
    gone = edit(run_folder, tmp_path / "gone")
    (gone / "artifact.pyz").unlink()
    assert failed(claims.disk_checks(opened(gone))) == {"disk"}
    changed = edit(run_folder, tmp_path / "changed", artifact_sha256="0" * 64)
    assert failed(claims.disk_checks(opened(changed))) == {"disk as packed"}
    small = edit(run_folder, tmp_path / "small")
    (small / "submission.json").write_text(json.dumps({"bytes_total": counted - 1}))
    assert failed(claims.disk_checks(opened(small))) == {"disk as claimed"}
    monkeypatch.setattr(claims, "CAP_BYTES", 1000)
    assert "disk cap" in failed(claims.disk_checks(opened(run_folder)))


def test_budgets_that_are_spent_are_caught(run_folder: Path, tmp_path: Path) -> None:
    folder = edit(run_folder, tmp_path / "run", train_seconds=601.2, eval_seconds=617.0)
    assert failed(claims.budget_checks(opened(folder))) == {"budget training", "budget evaluation"}
    # by steps, MAX_WALLCLOCK_SECONDS=0: the 600 s hold all the same
    long = edit(run_folder, tmp_path / "long", train_seconds=7200.0)
    assert "MAX_WALLCLOCK_SECONDS=0" in (long / "record.env").read_text()
    assert failed(claims.budget_checks(opened(long))) == {"budget training"}
    with (folder / "log.txt").open("a") as log:
        log.write("training stopped at step 9 after 599.60 s; weights: ema\ncalibration: 6.90 s, inside the budget\n")
    spent = opened(folder)
    spent.result["train_seconds"] = 599.6
    assert failed(claims.budget_checks(spent)) == {"budget as logged", "budget evaluation"}
    del spent.result["eval_seconds"]
    assert states(claims.budget_checks(spent))["budget evaluation"] == UNKNOWN
    hidden = edit(run_folder, tmp_path / "hidden")  # only metrics.jsonl still knows
    with (hidden / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 13, "train_loss": 3.0, "seconds": 700.0}\n')
    assert failed(claims.budget_checks(opened(hidden))) == {"budget as logged"}


def test_claims_against_knobs_log_and_result(run_folder: Path, tmp_path: Path) -> None:
    assert not failed(claims.claim_checks(opened(run_folder)))
    folder = tmp_path / "run"
    alike = edit(run_folder, folder, val_bpb=1.0)  # result.json and RESULT are edited alike
    assert failed(claims.claim_checks(opened(alike))) == {"log.txt: final and RESULT"}
    shutil.copy(run_folder / "result.json", folder)
    assert failed(claims.claim_checks(opened(folder))) == {"log and result", "log.txt: final and RESULT"}
    shutil.copy(run_folder / "log.txt", folder)
    (folder / "record.env").write_text((folder / "record.env").read_text() + "SMEAR_BOS_MASK=0\n")
    (folder / "README.md").write_text("The smear gate is BOS-fixed; LoRA adapters per document (rank 96).\n")
    checks = claims.claim_checks(opened(folder))
    assert failed(checks) == {"claims in words", "log and record.env"}
    words = next(check.detail for check in checks if check.name == "claims in words")
    assert "SMEAR_BOS_MASK=0" in words and "TTT_LORA_RANK=4" in words
    seeds = {"1": {"val_bpb": 1.0577, "artifact_bytes": 15_950_000}, "2": {"val_bpb": 1.0578}}
    paper = {"val_bpb": 1.0435, "seeds": [1, 2], "bytes_total": 15_900_000, "seed_results": seeds}
    (folder / "submission.json").write_text(json.dumps(paper | {"compliance": {"eval_under_600s": True}}))
    run = opened(folder)
    run.result["eval_seconds"] = 688.0
    wanted = {"claims of the score", "claims of the size", "claims of compliance", "claims against results"}
    assert wanted <= failed(claims.claim_checks(run))
    # a record's folder has no result: its own columns speak
    del run.result["eval_seconds"]
    for seconds, wrong in ((1200.0, True), (599.0, False)):
        seeds["1"]["eval_time_s"] = seconds
        (folder / "submission.json").write_text(json.dumps(paper | {"compliance": {"eval_under_600s": True}}))
        assert ("claims of compliance" in failed(claims.claim_checks(run))) is wrong
    for key in ("eval_time_s", "artifact_bytes"):
        seeds["1"].pop(key, None)
    bare = {"compliance": {"eval_under_600s": True, "no_slot": True}}
    (folder / "submission.json").write_text(json.dumps(paper | bare))
    found = next(check for check in claims.claim_checks(run) if check.name == "claims of compliance")
    assert found.status == UNKNOWN and found.detail.endswith("shows eval_under_600s")


def test_a_submission_is_held_against_the_results_beside_it(run_folder: Path, tmp_path: Path) -> None:
    folder, found = edit(run_folder, tmp_path / "run"), json.loads((run_folder / "result.json").read_text())
    seed, score = str(found["seed"]), found["val_bpb"]
    for paper, good in (
        ({"val_bpb": score}, True),
        ({"val_bpb": 1.05}, False),
        ({"val_bpb": score, "seeds": [int(seed)], "seed_results": {seed: {"val_bpb": score}}}, True),
        ({"val_bpb": 1.05, "seeds": [int(seed)], "seed_results": {seed: {"val_bpb": 1.05}}}, False),
    ):
        (folder / "submission.json").write_text(json.dumps(paper))
        assert ("claims against results" not in failed(claims.claim_checks(opened(folder)))) is good, paper
    bare = Path(shutil.copytree(record_named("PR1915"), tmp_path / "record"))
    (bare / "submission.json").write_text(json.dumps({"val_bpb": 1.05}))
    values = train_gpt.read_preset(str(bare))
    paper = Candidate("preset", "record", b"", values, values, folder=bare)
    assert states(claims.claim_checks(paper))["claims against results"] == UNKNOWN
    rows, log = {seed: {"val_bpb": 1.05} for seed in ("1", "2")}, 'RESULT {"seed": %d, "val_bpb": 1.05}\n'
    (bare / "submission.json").write_text(json.dumps({"val_bpb": 1.05, "seeds": [1, 2], "seed_results": rows}))
    for seed, status in ((1, UNKNOWN), (2, PASS)):
        (bare / f"train_seed{seed}.log").write_text(log % seed)
        assert states(claims.claim_checks(paper))["claims against results"] == status, seed


def test_damaged_papers_are_findings_and_no_tracebacks(run_folder: Path, tmp_path: Path) -> None:
    broken = {
        "result.json": (
            b"[1]",
            b"{",
            b"[" * 100_000,
            b'{"a":' * 99 + b"1" + b"}" * 99,
            b'{"val_bpb": %s}' % (b"9" * 400),
            b'{"val_bpb": NaN, "stages": 3}',
            b"\xff\xfe",
            b"",
        ),
        "submission.json": (b'{"seed_results": {"1": {"val_loss": 3.0}}, "seeds": [1]}', b'{"compliance": 1}', b"x"),
        "log.txt": (b"RESULT {\n", b"RESULT [1]\n", b"final: val_loss 1.2.3 val_bpb - (1 tokens, 2 bytes", b"\xe9"),
        "metrics.jsonl": (b"3\n", b'{"seconds": "x"}\n{', b"\xe9"),
        "README.md": (b"caf\xe9",),
    }
    for name, forms in broken.items():
        for number, data in enumerate(forms):
            folder = edit(run_folder, tmp_path / f"{name}_{number}")
            (folder / name).write_bytes(data)
            run = opened(folder)
            checks = [*claims.claim_checks(run), *claims.disk_checks(run), *claims.budget_checks(run)]
            assert failed(checks) >= {"papers readable"}, (name, data[:40])


def test_the_papers_of_every_record_agree_with_its_knobs() -> None:
    for record in RECORDS:
        values = train_gpt.read_preset(str(record))
        paper = Candidate("preset", record.name, b"", values, values, folder=record)
        assert not failed(claims.claim_checks(paper)), record.name
        if "smear" in train_gpt.load_config(values).embed_extras:
            leaky = dataclasses.replace(paper, claimed=values | {"SMEAR_BOS_MASK": "0"})
            text = (record / "record.env").read_text() + (record / "README.md").read_text()
            assert failed(claims.claim_checks(leaky)) == set() or "mask" in text, record.name


# The command line


def test_wrong_targets_are_one_line(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*args: str) -> str:
        assert verify.main([*args]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and len(error.strip().splitlines()) == 1
        return error

    for target in (tmp_path, tmp_path / "nowhere", Path(__file__)):
        refused(str(target))
    program = str(ROOT / "train_gpt.py")
    assert "inside it; leave out --source" in refused(str(run_folder / "artifact.pyz"), "--source", program)
    for data in ("typo", str(run_folder / "result.json")):
        assert "no such directory" in refused(str(run_folder), "--data", data)
    (tmp_path / "record.env").write_text("NO_SUCH_KNOB=1\n")
    assert "NO_SUCH_KNOB" in refused(str(tmp_path))
    (tmp_path / "record.env").write_bytes(b"SEED=1  # caf\xe9\n")
    refused(str(tmp_path))
    (tmp_path / "record.env").write_text("SEED=1\n")
    (tmp_path / "hessians.pt").write_bytes(b"")
    (tmp_path / "log.txt").write_bytes(b"")
    assert "not finished (log.txt, hessians.pt)" in refused(str(tmp_path))
    (tmp_path / "train_gpt.py").write_text("x = 1\n")
    assert f"--source {tmp_path / 'train_gpt.py'}" in refused(str(tmp_path))
    own = judge.argparse.Namespace(target=tmp_path, source=tmp_path / "train_gpt.py", data=None)
    with pytest.raises(train_gpt.UserError, match="not finished"):
        judge.open_candidate(own, tmp_path)
    for options in (["--all", "--out", "v.json"], [str(tmp_path), "--out", str(tmp_path / "no" / "v.json")]):
        with pytest.raises(SystemExit) as stop:
            verify.main(options)
        assert stop.value.code == 2 and "--out" in capsys.readouterr().err
    for option in (["--documents", "0"], ["--probes", "-1"], ["--probes", "many"]):
        with pytest.raises(SystemExit) as stop:
            verify.main([str(run_folder), *option])
        assert stop.value.code == 2 and "not a whole number" in capsys.readouterr().err


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_is_one_line() -> None:
    """While modules load, and while a program trains: as a terminal does, to all processes of the group."""
    command = [sys.executable, str(ROOT / "records" / "verify.py"), str(record_named("PR1915"))]
    for wait in (False, True):
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
        )
        tasks = Path(f"/proc/{process.pid}/task")
        time.sleep(0.5)  # Python itself has started
        children = []
        # until it trains: beside the process that forks runs there is one of the program's own
        while wait and process.poll() is None and len(children) < 2:
            time.sleep(0.1)
            with contextlib.suppress(OSError):  # a thread may just end
                children = [pid for path in tasks.glob("*/children") for pid in path.read_text().split()]
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 130 and error == "error: interrupted; no verdict was written\n"
        assert not [pid for pid in children if is_running(pid)], "nothing goes on"


def test_a_strangers_text_does_not_steer_the_terminal(toy: Candidate, capsys: pytest.CaptureFixture[str]) -> None:
    found = dataclasses.replace(toy, name="a\x1b[2K\rlegal", notes=["a\nnote"])
    judge.print_verdict(judge.summary(found, [Check("log (\x1b]0;x.log)", UNKNOWN, "a\u202eb \ud800")]))
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3 and all(c.isprintable() for line in out.splitlines() for c in line)


def test_verdict_is_undecided_when_a_question_stays_open(toy: Candidate) -> None:
    checks = [Check("a", PASS, ""), Check("b", NOT_ASKED, "")]
    assert judge.summary(toy, checks)["legal"] is True
    assert judge.summary(toy, [*checks, Check("c", UNKNOWN, "")])["legal"] is None
    assert judge.summary(toy, [*checks, Check("c", FAIL, ""), Check("d", UNKNOWN, "")])["legal"] is False
