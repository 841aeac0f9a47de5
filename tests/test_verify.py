"""The judge: a record of each kind passes at toy size, and every published mistake is caught.

The mistakes are planted in the real program: a SLOT that fits on what it scores, a smear gate that reads across a
document's start, a denominator that counts case operators, a score after adaptation, a tail that is scored twice, a
wrapper that is counted but not shipped; and some that nobody published, so that every check has caught something.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import prepare
import pytest
import torch
from conftest import RECORDS, ROOT, ToyRun
from torch.nn.functional import cross_entropy

import pack_artifact
import train_gpt
from records import verify
from records.verify import FAIL, NOT_ASKED, PASS, UNKNOWN

RECORD = next(path for path in RECORDS if path.name.endswith("PR1915"))


def failed(checks: Iterable[verify.Check]) -> set[str]:
    """The names, without what is in brackets, of the checks that failed."""
    return {re.sub(r" \(.*", "", check.name) for check in checks if check.status == FAIL}


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[verify.Candidate]:
    """The record that adapts to each document, as the judge trains it; its program is not `train_gpt`, so patch it."""
    with pytest.MonkeyPatch.context() as patch:  # import no file twice
        patch.setattr(pack_artifact, "load_program", functools.cache(pack_artifact.load_program))
        yield verify.shrink(RECORD, ROOT / "train_gpt.py", tmp_path_factory.mktemp("toy"), None)


@pytest.fixture(scope="module")
def scorer(toy: verify.Candidate) -> verify.Scorer:
    val = toy.program.load_val(toy.cfg)
    return verify.Scorer(toy, toy.program.ValData(val.tokens[:513], val.bytes[:513]))


def examine(scorer: verify.Scorer, evaluate: Callable[..., Any], apart: str = "", sums: bool = False) -> list[Any]:
    """Whole distributions only where they are the topic: they take as many forward passes as there are ids."""
    return verify.examine(scorer, evaluate, "planted", 1, apart, sums)


def with_learner(program: Any, make: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The program's evaluator `name` with another learner."""
    return program.EVALS[name]._replace(learner=make)


def with_steps(program: Any, change: Callable[[list[Any]], list[Any]], name: str = "plain") -> Callable[..., Any]:
    """The program's evaluator `name` with other steps."""
    honest = program.EVALS[name].steps
    return program.EVALS[name]._replace(steps=lambda *args: change(list(honest(*args))))


# Records: one of each evaluator is judged here; `verify.py --all` judges all, and its verdicts are committed


def one_of_each_evaluator() -> dict[str, Path]:
    """The legal records, one of each EVAL and TTT_CONTEXT."""
    legal = [r for r in RECORDS if json.loads((r / "verdict.json").read_text())["legal"]]
    found = ((train_gpt.load_config({"PRESET": str(record)}), record) for record in reversed(legal))
    return {f"{cfg.eval} {cfg.ttt_context}": record for cfg, record in found}


EVALUATORS = one_of_each_evaluator()


def test_every_record_has_a_verdict_on_its_present_knobs() -> None:
    for record in RECORDS:
        verdict = json.loads((record / "verdict.json").read_text())
        assert verdict["record_sha256"] == verify.preset_sha256(record), f"{record.name}: run verify.py --all"
        assert verdict["legal"] is not None and verdict["counts"][PASS] > 20, record.name
        if not verdict["legal"]:
            readme = (record / "README.md").read_text()
            assert re.search(r"not\W+(record-)?legal|legal\W+false", readme, re.IGNORECASE), record.name


@pytest.mark.parametrize("record", EVALUATORS.values(), ids=EVALUATORS)
def test_a_record_of_each_evaluator_is_judged_legal_at_toy_size(
    record: Path,
    toy: verify.Candidate,
    toy_run: Callable[[Path], ToyRun],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trained(path: Path, *_: object) -> verify.Candidate:
        if path == RECORD:
            return toy
        run, program = toy_run(path), toy.program
        small, full = program.load_config(run.env), program.load_config({"PRESET": str(path)})
        blob, data = run.folder / "model.bin", Path(small.data_path)
        return verify.Candidate("preset", path.name, program, small, blob, folder=path, data=data, claimed=full)

    monkeypatch.setattr(verify, "shrink", trained)
    assert verify.main([str(record), "--documents", "2", "--probes", "1", "--out", str(tmp_path / "verdict.json")]) == 0
    verdict = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("VERDICT "))
    assert verdict["legal"] is True and verdict["scale"] == "toy" and verdict["counts"][UNKNOWN] == 0
    names = {check["name"].split(" (")[0] for check in verdict["checks"] if check["status"] == PASS}
    wanted = "C1 token,C1 future,C1 document,C2 sums to 1,C2 own target,C3 score before update,C4 each target once"
    assert names >= {*wanted.split(","), "bytes per word", "split", "claims in words"}
    assert "documents apart" in names or any("LOADER=" in check["detail"] for check in verdict["checks"])
    written = json.loads((tmp_path / "verdict.json").read_text())
    assert "seconds" not in written and written["checks"] == verdict["checks"]


def test_every_record_has_a_toy_size() -> None:
    for record in RECORDS:
        assert verify.toy_config(train_gpt, train_gpt.read_preset(str(record))).model_dim == 64, record.name


# C1 to C4


def test_the_untouched_evaluators_pass(scorer: verify.Scorer) -> None:
    for evaluate in (scorer.final, scorer.packed):
        checks = examine(scorer, evaluate)
        assert not failed(checks) and UNKNOWN not in {check.status for check in checks}


def test_a_slot_that_fits_on_what_it_scores_is_caught(scorer: verify.Scorer) -> None:
    program = scorer.program

    class Slot(program.NoAdaptation):
        """A shift of the logits, fitted on the targets of the unit that it then scores: the published mistake."""

        def score(self, unit: Any) -> torch.Tensor:
            ids, targets, meta = self.inputs(unit)
            with torch.no_grad():
                logits = self.model(ids, None, meta).transpose(1, 2)
            delta = torch.zeros(logits.size(1), 1, requires_grad=True)
            for _ in range(3):
                (gradient,) = torch.autograd.grad(cross_entropy(logits + delta, targets), delta)
                delta = (delta - 10 * gradient).detach().requires_grad_(True)
            return cross_entropy(logits + delta, targets, reduction="none").detach()

    checks = examine(scorer, with_learner(program, Slot, "plain"), "adapts", sums=True)
    assert {"C1 token", "C1 future", "C2 sums to 1"} <= failed(checks)


def test_the_programs_own_noncausal_slot_is_caught(scorer: verify.Scorer) -> None:
    values = {"eval": "slot", "slot_causal": False, "allow_noncausal": True, "ttt_epochs": 0, "eval_stride": 32}
    cfg = dataclasses.replace(scorer.cfg, **values)
    fitted = dataclasses.replace(cfg, slot_causal=True)
    for config, bad in ((cfg, True), (fitted, False)):
        checks = examine(scorer, lambda _, *rest, c=config: scorer.program.EVALS["slot"](c, *rest), "adapts")
        assert ("C1 token" in failed(checks)) is bad and ("C3 the program's word" in failed(checks)) is bad


def test_a_smear_gate_without_the_document_mask_is_caught(scorer: verify.Scorer) -> None:
    leaky = dataclasses.replace(scorer.cfg, smear_bos_mask=False)
    leaky_scorer = verify.Scorer.__new__(verify.Scorer)
    leaky_scorer.__dict__ |= scorer.__dict__ | {"cfg": leaky}
    assert abs(float(scorer.state["embed_extras.smear.scale"])) > 0, "a gate that is off could leak nothing"
    assert failed(examine(leaky_scorer, scorer.packed)) == {"documents apart"}
    assert not failed(examine(scorer, scorer.packed))


def test_attention_across_documents_is_caught(scorer: verify.Scorer) -> None:
    def borderless(steps: list[Any]) -> list[Any]:
        return [step._replace(cells=step.cells._replace(cu_seqlens=None)) for step in steps]

    assert failed(examine(scorer, with_steps(scorer.program, borderless))) == {"documents apart"}


def test_a_score_after_adaptation_is_caught(scorer: verify.Scorer) -> None:
    program = scorer.program

    class Hasty(program.DocLora):
        """Learns the chunk, then scores it."""

        def score(self, unit: Any) -> torch.Tensor:
            first = super().score(unit)
            width = unit.ids.shape[1]
            rows = np.flatnonzero(unit.documents >= 0)
            lesson = program.Lesson(rows, slice(width - self.cfg.ttt_chunk_size, width))
            super().learn(lesson, unit, first)
            with torch.no_grad():
                return self.losses(unit)

        def learn(self, lesson: Any, unit: Any, nll: torch.Tensor) -> None:
            """Done already."""

    checks = examine(scorer, with_learner(program, Hasty, "doc_lora"))
    assert {"C1 token", "C1 future", "C2 own target", "C3 scoring learns"} <= failed(checks)


def test_learning_from_targets_without_a_score_is_caught(
    scorer: verify.Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = scorer.program

    def eager(steps: list[Any]) -> list[Any]:
        """The first cells of a batch: nothing but the last one is scored, and all are learnt."""
        return [
            program.Step(cells._replace(rows=cells.rows[-1:], cols=cells.cols[-1:]), lesson)
            if cells and cells.begin[0] == 0
            else program.Step(cells, lesson)
            for cells, lesson in steps
        ]

    evaluate = with_steps(program, eager, scorer.cfg.eval)
    checks = examine(scorer, evaluate)
    assert "C4 each target once" in failed(checks)  # the program's own ledger stops it
    for method in ("require", "close"):
        monkeypatch.setattr(program.Ledger, method, lambda self, _: None)
    assert {"C3 score before update", "C4 each target once"} <= failed(examine(scorer, evaluate))


def test_a_tail_that_is_scored_twice_or_never_is_caught(scorer: verify.Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    program = scorer.program
    for steps_of in (lambda steps: steps + steps[-1:], lambda steps: steps[:-1]):
        evaluate = with_steps(program, steps_of)
        stopped = examine(scorer, evaluate)
        assert failed(stopped) == {"C4 each target once"} and "the program stops" in stopped[-1].detail
        with monkeypatch.context() as patch:
            patch.setattr(program.Ledger, "claim", lambda self, positions: None)
            patch.setattr(program.Ledger, "close", lambda self, runtime: None)
            assert {"C4 each target once", "sums"} <= failed(examine(scorer, evaluate))


def test_a_context_that_holds_its_own_target_is_caught(scorer: verify.Scorer) -> None:
    """Enumerating targets alone would not show it: the ids stay. The foretold score of a changed token does."""
    program = scorer.program

    class Peeking(program.NoAdaptation):
        def score(self, unit: Any) -> torch.Tensor:
            real = self.val_tokens[unit.origin[:, None] + np.arange(unit.ids.shape[1])]
            return super().score(unit) + 1e-3 * torch.from_numpy(real).float()

    def evaluate(cfg: Any, runtime: Any, model: Any, val: Any) -> Any:
        Peeking.val_tokens = np.pad(val.tokens, (0, 4096))
        return with_learner(program, Peeking, "plain")(cfg, runtime, model, val)

    assert "C2 own target" in failed(examine(scorer, evaluate))


def test_scores_that_are_no_distribution_are_caught(scorer: verify.Scorer, toy: verify.Candidate) -> None:
    program = scorer.program

    class Blended(program.NoAdaptation):
        """Scales the target's own loss, as a mixture that looks only at the target's mass does."""

        def score(self, unit: Any) -> torch.Tensor:
            return self.factor * super().score(unit)

    short = verify.Scorer(toy, toy.program.ValData(scorer.val.tokens[:129], scorer.val.bytes[:129]))
    short.cfg = dataclasses.replace(short.cfg, val_batch_tokens=512)  # a batch is one row of 128
    for factor in (0.95, 1.05):
        Blended.factor = factor
        assert failed(examine(short, with_learner(program, Blended, "plain"), sums=True)) == {"C2 sums to 1"}, factor


def test_a_queue_ordered_by_the_text_is_caught(scorer: verify.Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    program = scorer.program

    def evaluate(cfg: Any, runtime: Any, model: Any, val: Any) -> Any:
        def batches(docs: list[tuple[int, int]], size: int) -> list[list[int]]:
            keys = [val.tokens[start + 2 : start + 9].sum() for start, _ in docs]
            return [[doc] for doc in np.argsort(keys)]

        context = program.TTT_CONTEXTS["recompute"]
        monkeypatch.setitem(program.TTT_CONTEXTS, "recompute", context._replace(batches=batches))
        return program.EVALS["doc_lora"](cfg, runtime, model, val)

    checks = examine(scorer, evaluate)
    assert "C1 future" in failed(checks) and any("depends on the tokens" in check.detail for check in checks)


def test_a_global_update_that_reads_the_future_is_caught(
    scorer: verify.Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = scorer.program
    changed = {"eval": "phased_lora", "global_ttt_chunk_tokens": 128, "ttt_batch_size": 1, "ttt_chunk_size": 64}
    cfg = dataclasses.replace(scorer.cfg, **changed)
    evaluate = lambda _, *rest: program.EVALS["phased_lora"](cfg, *rest)  # noqa: E731
    assert not failed(examine(scorer, evaluate, "adapts"))
    segments = program.phase_segments

    def greedy(parts: list[list[int]], boundaries: list[int]) -> list[tuple[list[list[int]], list[int]]]:
        everything = sorted(doc for group in parts for doc in group)
        return [(group, everything if learnt else []) for group, learnt in segments(parts, boundaries)]

    monkeypatch.setattr(program, "phase_segments", greedy)
    assert failed(examine(scorer, evaluate, "adapts")) == {"C4 each target once"}  # stopped by the program
    monkeypatch.setattr(program.Ledger, "require_anywhere", lambda self, positions, runtime: None)
    assert "C1 token" in failed(examine(scorer, evaluate, "adapts"))


def test_an_evaluator_that_hides_from_the_meter_is_not_passed(scorer: verify.Scorer) -> None:
    score = scorer.program.Score(1.0, 1.0, 512, 999, 0.1, True)
    assert [c.status for c in examine(scorer, lambda *args: score)] == [UNKNOWN]


def test_scores_that_do_not_repeat_are_undecided(scorer: verify.Scorer) -> None:
    rng = np.random.default_rng(0)

    class Noisy(scorer.program.NoAdaptation):
        def score(self, unit: Any) -> torch.Tensor:
            return super().score(unit) + float(rng.normal()) * 1e-3

    checks = examine(scorer, with_learner(scorer.program, Noisy, "plain"))
    assert [check.status for check in checks if check.name.startswith("C1 repeat")] == [UNKNOWN]


# Bytes and split


def test_denominators_that_count_what_is_no_text_are_caught(toy: verify.Candidate) -> None:
    val = toy.program.load_val(toy.cfg)
    assert not failed(verify.byte_checks(toy, val))
    model = str(toy.program.find_tokenizer(toy.cfg))
    pieces = verify.read_pieces(verify.spm.SentencePieceProcessor(model_file=model))
    for counted, names in (
        (val.bytes + 3 * pieces.operator[val.tokens], {"bytes of case operators"}),
        (val.bytes + pieces.space[val.tokens], {"bytes per word", "bytes of the decoded text"}),
        (val.bytes + pieces.control[val.tokens], {"bytes of control ids"}),
        (np.maximum(val.bytes - pieces.space[val.tokens], 0), {"bytes per word"}),
    ):
        assert names <= failed(verify.byte_checks(toy, val._replace(bytes=counted)))


def test_caseops_without_its_sidecar_is_caught(toy: verify.Candidate, tmp_path: Path) -> None:
    for path in toy.data.iterdir():
        if "val_bytes" not in path.name:
            shutil.copy(path, tmp_path)
    cfg = dataclasses.replace(toy.cfg, data_path=str(tmp_path))
    bare = dataclasses.replace(toy, cfg=cfg, data=tmp_path)
    with pytest.raises(toy.program.UserError, match="case operators"):
        toy.program.load_val(cfg)
    val = toy.program.ValData(*map(np.copy, toy.program.load_val(toy.cfg)))
    val.bytes[:] += 3
    assert "bytes of the decoded text" in failed(verify.byte_checks(bare, val))


def test_canonical_totals_are_recognised(toy: verify.Candidate) -> None:
    tokens = np.concatenate([[1], np.full(512, 300)])

    def total_check(total: int) -> verify.Check:
        counted = np.zeros(513, np.int64)
        counted[1] = total
        return next(verify.byte_checks(toy, toy.program.ValData(tokens, counted)))

    assert total_check(164_594_398).status == FAIL and "INVALID" in total_check(164_594_398).detail
    assert total_check(151_080_891).status == PASS and "canonical SP8192" in total_check(151_080_891).detail
    assert "no canonical total" in total_check(151_074_499).detail, "the CaseOps total is one of 47,851,520 targets"


def test_the_tokenizer_table_is_checked_to_the_byte(tiny_data: Path, toy: verify.Candidate) -> None:
    cfg = dataclasses.replace(toy.cfg, data_path=str(tiny_data), vocab_size=320, eval_seq_len=64)
    plain = dataclasses.replace(toy, cfg=cfg, data=tiny_data)
    val = toy.program.load_val(cfg)
    assert not failed(verify.byte_checks(plain, val))
    one = val.bytes.copy()
    one[np.flatnonzero(one > 1)[5]] += 1
    assert failed(verify.byte_checks(plain, val._replace(bytes=one))) == {"bytes per word", "bytes of the decoded text"}


def test_training_documents_in_validation_are_caught(toy: verify.Candidate, tmp_path: Path) -> None:
    assert verify.split_check(toy).status == PASS
    shutil.copytree(toy.data, tmp_path / "leak")
    train, val = (tmp_path / "leak" / f"fineweb_{kind}_000000.bin" for kind in ("train", "val"))
    prepare.write_shard(train, np.concatenate([train_gpt.read_shard(path) for path in (train, val)]))
    leaky = verify.split_check(dataclasses.replace(toy, data=tmp_path / "leak"))
    assert leaky.status == FAIL and leaky.detail.startswith("7 of 7")
    train.unlink()
    assert verify.split_check(dataclasses.replace(toy, data=tmp_path / "leak")).status == UNKNOWN


# Budget, disk, claims: a run folder


@pytest.fixture(scope="module")
def run_folder(toy: verify.Candidate, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy as a packed run, with an evaluated score and a log; tests copy it."""
    folder = tmp_path_factory.mktemp("run") / "toy_seed1337"
    shutil.copytree(toy.blob.parent, folder)
    env = {"PRESET": folder, "ARTIFACT_DIR": folder, "DATA_PATH": toy.data, "DEVICE": "cpu", "STAGES": "eval"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, str(value))
        assert toy.program.main([]) == 0
    assert pack_artifact.main(["pack", str(folder)]) == 0
    return folder


@pytest.fixture
def reopen(toy: verify.Candidate, tmp_path: Path) -> Callable[[Path], verify.Candidate]:
    return lambda folder: verify.open_run(folder, ROOT / "train_gpt.py", tmp_path, toy.data)


def edit(folder: Path, copy: Path, **changes: Any) -> Path:
    """A copy of the run folder with another result.json."""
    shutil.copytree(folder, copy)
    result = json.loads((copy / "result.json").read_text()) | changes
    (copy / "result.json").write_text(json.dumps(result))
    return copy


def test_a_run_folder_and_its_artifact_are_judged(
    run_folder: Path, toy: verify.Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = verify.examine  # distributions are summed in the tests of the records
    monkeypatch.setattr(verify, "examine", lambda *args, sums=True: whole(*args, sums=False))
    options = ["--data", str(toy.data), "--documents", "2", "--probes", "1"]
    assert verify.main([str(run_folder), *options, "--out", str(tmp_path / "v.json")]) == 0
    names = {c["name"]: c["status"] for c in json.loads((tmp_path / "v.json").read_text())["checks"]}
    for name in ("disk cap", "disk as counted", "disk as packed", "log and result", "log and record.env"):
        assert names[name] == PASS
    assert names["budget training"] == NOT_ASKED and names["budget evaluation"] == PASS
    assert verify.main([str(run_folder / "artifact.pyz"), *options]) == 0


def test_files_that_are_not_what_was_counted_are_caught(
    run_folder: Path, reopen: Callable[[Path], verify.Candidate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = json.loads((run_folder / "result.json").read_text())["bytes_total"]
    wrapped = edit(run_folder, tmp_path / "wrapped", artifact="submission")
    (wrapped / "submission").mkdir()  # the raw program travels, the wrapper's size is what was counted
    shutil.copy(ROOT / "train_gpt.py", wrapped / "submission")
    shutil.copy(wrapped / "model.bin", wrapped / "submission")
    checks = list(verify.disk_checks(reopen(wrapped)))
    assert failed(checks) == {"disk as counted"} and f"counts {counted:,}" in checks[1].detail
    gone = edit(run_folder, tmp_path / "gone")
    (gone / "artifact.pyz").unlink()
    assert failed(verify.disk_checks(reopen(gone))) == {"disk"}
    changed = edit(run_folder, tmp_path / "changed", artifact_sha256="0" * 64)
    assert failed(verify.disk_checks(reopen(changed))) == {"disk as packed"}
    monkeypatch.setattr(verify, "CAP_BYTES", 1000)
    assert "disk cap" in failed(verify.disk_checks(reopen(run_folder)))


def test_budgets_that_are_spent_are_caught(
    run_folder: Path, reopen: Callable[[Path], verify.Candidate], tmp_path: Path
) -> None:
    folder = edit(run_folder, tmp_path / "run", train_seconds=601.2, eval_seconds=617.0)
    spent = reopen(folder)
    spent.cfg = dataclasses.replace(spent.cfg, max_wallclock_seconds=600.0)
    assert failed(verify.budget_checks(spent)) == {"budget training", "budget evaluation"}
    (folder / "log.txt").write_text(
        "training stopped at step 9 after 599.60 s; weights: ema\ncalibration: 6.90 s, inside the training budget\n"
    )
    spent.result["train_seconds"] = 599.6
    assert failed(verify.budget_checks(spent)) == {"budget as logged", "budget evaluation"}
    del spent.result["eval_seconds"]
    unknown = [check.name for check in verify.budget_checks(spent) if check.status == UNKNOWN]
    assert unknown == ["budget evaluation"]


def test_claims_against_knobs_log_and_result(
    run_folder: Path, reopen: Callable[[Path], verify.Candidate], tmp_path: Path
) -> None:
    folder = edit(run_folder, tmp_path / "run", val_bpb=1.0)
    assert failed(verify.claim_checks(reopen(folder))) == {"log and result"}
    shutil.copy(run_folder / "result.json", folder)
    record = (folder / "record.env").read_text()
    (folder / "record.env").write_text(record + "SMEAR_BOS_MASK=0\n")
    (folder / "README.md").write_text("The smear gate is BOS-fixed; LoRA adapters per document (rank 96).\n")
    run = reopen(folder)
    checks = verify.claim_checks(run)
    assert failed(checks) == {"claims in words", "log and record.env"}
    assert "SMEAR_BOS_MASK=0" in checks[0].detail and "TTT_LORA_RANK=4" in checks[0].detail
    seeds = {"1": {"val_bpb": 1.0577, "artifact_bytes": 15_950_000}, "2": {"val_bpb": 1.0578}}
    paper = {"val_bpb": 1.0435, "seeds": [1, 2], "bytes_total": 15_900_000, "seed_results": seeds}
    paper["compliance"] = {"eval_under_600s": True}
    (folder / "submission.json").write_text(json.dumps(paper))
    run.result["eval_seconds"] = 688.0
    assert {"claims of the score", "claims of the size", "claims of compliance"} <= failed(verify.claim_checks(run))


def test_the_papers_of_every_record_agree_with_its_knobs() -> None:
    for record in RECORDS:
        cfg = train_gpt.load_config({"PRESET": str(record)})
        paper = verify.Candidate("preset", record.name, train_gpt, cfg, folder=record)
        assert not failed(verify.claim_checks(paper)), record.name
        if "smear" in cfg.embed_extras:
            leaky = dataclasses.replace(paper, cfg=dataclasses.replace(cfg, smear_bos_mask=False))
            text = (record / "record.env").read_text() + (record / "README.md").read_text()
            assert failed(verify.claim_checks(leaky)) == set() or "mask" in text, record.name


# The command line


def test_wrong_targets_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in (tmp_path, tmp_path / "nowhere", Path(__file__)):
        assert verify.main([str(target)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and len(error.strip().splitlines()) == 1
    (tmp_path / "record.env").write_text("NO_SUCH_KNOB=1\n")
    assert verify.main([str(tmp_path), "--data", str(tmp_path)]) == 2
    assert "NO_SUCH_KNOB" in capsys.readouterr().err


def test_verdict_is_undecided_when_a_question_stays_open(toy: verify.Candidate) -> None:
    checks = [verify.Check("a", PASS, ""), verify.Check("b", NOT_ASKED, "")]
    assert verify.summary(toy, checks)["legal"] is True
    assert verify.summary(toy, [*checks, verify.Check("c", UNKNOWN, "")])["legal"] is None
    assert verify.summary(toy, [*checks, verify.Check("c", FAIL, ""), verify.Check("d", UNKNOWN, "")])["legal"] is False
