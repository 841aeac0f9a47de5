"""Looking at what a model learnt: text from it, and where its bits are."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import caseops
import numpy as np
import pytest
import sentencepiece as spm
import torch
import ttt_rules
from conftest import RECORDS, ROOT, ToyRun, one_thread

import pack_artifact
import train_gpt
from records import sampling, token_losses
from records.sampling import Choice, Continuation, Printer, Script

PR1934, PR1895 = (next(path for path in RECORDS if path.name.endswith(name)) for name in ("PR1934", "PR1895"))


# Text


@pytest.mark.parametrize("stack", ttt_rules.STACKS)
def test_tokens_read_in_parts_give_the_logits_of_the_whole(stack: str) -> None:
    """With kept keys and values (n-gram), and with whole windows (delta)."""
    model = ttt_rules.stack_model(stack, eval_seq_len=32)
    ids = ttt_rules.sample(1, 24, [0])[0].tolist()
    reader, read = Continuation(model, model.cfg), 0
    assert reader.keeps is (stack == "n-gram")
    for count in (1, 7, 1, 1, 6, 8):
        z = reader.read(ids[read : read + count])
        read += count
        whole = torch.tensor([ids[:read]])
        with torch.no_grad():
            h = model.trunk(whole, model.plan(read, whole.device, max_len=32))
            torch.testing.assert_close(z, model.logits(h[:, -1]), rtol=1e-4, atol=1e-4, msg=f"after {read} tokens")
    for _ in range(3):  # beyond the window
        assert torch.isfinite(reader.read(ids[:5])).all()
    assert not reader.keeps or reader.cache.size(3) == 32


def test_draws_are_seeded_and_keep_to_the_likeliest() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    cases = ((0, 1, {1}), (1e-320, 1, {1}), (1, 0, {1}), (1, 0.5, {1, 3}), (1, 0.71, {1, 2, 3}), (9, 1, {0, 1, 2, 3}))
    for temperature, top_p, ids in cases:
        generator = torch.Generator().manual_seed(3)
        drawn = Counter(sampling.draw(logits, Choice(temperature, top_p, 0), generator) for _ in range(200))
        assert drawn.keys() == ids, (temperature, top_p)
    generator = torch.Generator().manual_seed(4)
    drawn = [sampling.draw(logits, Choice(0.5, 1.0, 0), generator) for _ in range(2000)]
    # temperature 1/2 squares the probabilities
    assert np.bincount(drawn) / 2000 == pytest.approx(np.array([1, 16, 4, 9]) / 30, abs=0.04)


@pytest.mark.parametrize("fused", [False, True])
def test_text_comes_out_as_it_went_in(fused: bool, caseops_sample: Path, tiny_data: Path) -> None:
    """Ids one by one, with capitals, signs of several bytes, and pairs of a space and a case operator as one id."""
    text = "The HTTPServer of Ärger, a naïve \u4e2d\u6587 iPhone; END. Next"
    for data in (caseops_sample,) if fused else (caseops_sample, tiny_data):
        (path,) = data.glob("*.model")
        script = Script(path.read_bytes(), fused)
        ids = script.encode(text)
        assert ids[0] == train_gpt.BOS_ID
        assert not fused or len(ids) < len(Script(path.read_bytes(), False).encode(text))
        plain = script.processor.decode(script.processor.encode(text)) if not script.case else text
        for cut in (1, 2, len(ids) // 2, len(ids)):
            printer = Printer(script, ids[:cut])
            parts = [printer.push(token) for token in ids[cut:]]
            assert plain.endswith("".join(parts)) and printer.impossible == 0, (data, cut)
            assert cut > 1 or "".join(parts) == plain


def test_case_operators_where_no_text_has_them_are_left_out_and_counted(caseops_sample: Path) -> None:
    (path,) = caseops_sample.glob("*.model")
    script = Script(path.read_bytes(), False)
    title = script.processor.piece_to_id(caseops.TITLE)
    word = script.processor.encode("and")
    printer = Printer(script, [train_gpt.BOS_ID])
    text = "".join(printer.push(token) for token in [title, title, *word, *word, title])
    # one after another operator, and one inside a word
    assert printer.impossible == 2 and text.replace(" ", "") == "andand"


def test_pairs_that_no_manifest_explains_are_said(caseops_sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = caseops_sample.glob("*.model")
    plain, fused = (Script(path.read_bytes(), known) for known in (False, True))
    drawn = [*fused.fusion.aliases.values(), *plain.processor.encode("and")]
    monkeypatch.setattr(sampling, "continued", lambda *args: iter(drawn))
    note = "\n[2 of these ids are fused pairs: give --data, whose manifest.json says so]"
    for script in (plain, fused):
        text = "".join(sampling.stream(None, train_gpt.Config(), script, "a", len(drawn), Choice(1, 1, 0)))
        assert text.endswith(note) == ("fused pairs" in text) == (script is plain), text


def test_sample_of_a_packed_record(
    packed_toy: Callable[[Path], ToyRun],
    toy_run: Callable[[Path], ToyRun],
    caseops_sample: Path,
    tiny_data: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DEVICE", "cpu")

    def sample(*argv: object) -> str:
        with one_thread():
            assert pack_artifact.main(["sample", *map(str, argv)]) == 0
        return capsys.readouterr().out

    file, data = packed_toy(PR1934).folder / "artifact.pyz", ("--data", caseops_sample)
    capsys.readouterr()
    first = sample(file, *data, "--prompt", "The Module", "--tokens", 20)
    assert first.startswith("The Module") and len(first) > 20
    assert sample(file, *data, "--prompt", "The Module", "--tokens", 20) == first
    assert sample(file, *data, "--prompt", "The Module", "--tokens", 20, "--seed", 2) != first
    assert sample(toy_run(PR1895).folder, *data, "--tokens", 5, "--temperature", 0), "a run, and no cache"
    for words, *argv in (
        ("does not travel", file),
        ("give a shorter one", file, *data, "--prompt", "word " * 500),
        ("no model blob", caseops_sample, *data),
        ("pieces, VOCAB_SIZE", file, "--data", tiny_data),
        ("not a SentencePiece model", file, "--tokenizer", ROOT / "README.md"),
    ):
        refused(words, pack_artifact.main, "sample", *argv)
    for option, value in (("--tokens", "0"), ("--temperature", "nan"), ("--top-p", "1.1"), ("--seed", "x")):
        with pytest.raises(SystemExit):
            pack_artifact.main(["sample", str(file), option, value])
        assert f"{value!r} must be a number from" in capsys.readouterr().err


# Losses of single tokens


def test_tables_of_losses_add_up_to_the_score(
    toy_run: Callable[[Path], ToyRun], caseops_sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(toy_run(PR1934).folder, folder)
    np.save(folder / "scores.after.0.npy", np.ones((9, 3)))  # of an older run
    png = tmp_path / "i.png"
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setenv("DEVICE", "cpu")
        options = ("--run", folder, "--data", caseops_sample, "--png", png)
        assert pack_artifact.main(["inspect", *map(str, options)]) == 0
    report = json.loads(capsys.readouterr().out.rpartition("INSPECT ")[2])
    scores = {which: np.load(folder / f"scores.{which}.0.npy") for which in token_losses.STAGE_OF}
    result = json.loads((folder / "result.json").read_text())
    assert scores["after"][:, 1].mean() == pytest.approx(result["val_loss"], rel=1e-9)
    assert scores["before"][:, 1].mean() == pytest.approx(result["stages"]["quantized"]["val_loss"], rel=1e-9)
    common = {*scores["before"][:, 0]} & {*scores["after"][:, 0]}
    for key in ("positions", "lengths", "classes"):
        rows = report[key]
        assert sum(row["targets"] for row in rows) == len(common) > 100, key
        assert sum(row["share"] for row in rows) == pytest.approx(1), key
        for which in ("before", "after"):
            nats = sum(row["targets"] * row[which] for row in rows)
            wanted = [loss for position, loss, _ in scores[which] if position in common]
            assert nats == pytest.approx(math.fsum(wanted)), key
    assert png.stat().st_size > 10_000
    # what is there is read, and not computed again
    stamps = [path.stat().st_mtime_ns for path in sorted(folder.glob("scores.*"))]
    token_losses.measure(folder, caseops_sample)
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("scores.*"))] == stamps
    with pytest.raises(train_gpt.UserError, match="has no tokenizer"):
        token_losses.measure(folder, tmp_path / "nowhere")
    # other data has other tokens at the scored places
    other = tmp_path / "other"
    shutil.copytree(caseops_sample, other)
    (other / "manifest.json").unlink()
    shard = other / "fineweb_val_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + np.uint16(7).tobytes())
    with pytest.raises(train_gpt.UserError, match="holds other validation data than"):
        token_losses.measure(folder, other)
    # half a file, of an evaluation that was killed, is none
    file = folder / "scores.after.0.npy"
    whole = file.read_bytes()
    assert token_losses.read_scores(folder, "after", result["val_loss"]) is not None
    for half in (b"", whole[:40], whole[:-9]):
        file.write_bytes(half)
        assert token_losses.read_scores(folder, "after", result["val_loss"]) is None, len(half)


def test_the_end_of_a_document_is_its_last_target(caseops_sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    val = train_gpt.load_val(train_gpt.Config(data_path=str(caseops_sample), vocab_size=400, eval_include_tail=True))
    places, start = [], 0
    for target in range(1, len(val.tokens)):
        places.append(target - start)
        start = target if val.tokens[target] == train_gpt.BOS_ID else start
    rows = np.stack([np.arange(1, len(val.tokens)), np.ones(len(places))], axis=1)
    monkeypatch.setattr(token_losses, "scores_of", lambda *args: {"before": rows, "after": rows})
    monkeypatch.setattr(token_losses.train_gpt, "load_val", lambda cfg: val)
    monkeypatch.setenv("VOCAB_SIZE", "400")
    (room := caseops_sample.parent / "end_of_document").mkdir(exist_ok=True)
    (room / "record.env").write_text("VOCAB_SIZE=400\n")
    found = {row["position"]: row["targets"] for row in token_losses.measure(room, caseops_sample)["positions"]}
    assert found["1-3"] == sum(1 <= place <= 3 for place in places) and sum(found.values()) == len(places)


def test_classes_of_tokens(caseops_sample: Path) -> None:
    (path,) = caseops_sample.glob("*.model")
    processor, classes = spm.SentencePieceProcessor(model_file=str(path)), token_losses.token_classes(path)
    for piece, name in (
        ("\u2581the", "word start"), ("e", "word part"), ("1", "digits"), ("\u2581", "space"), (".", "other signs"),
        (caseops.TITLE, "case operator"), ("<0x41>", "single byte"), ("<s>", "control"),
    ):  # fmt: skip
        token = processor.piece_to_id(piece)
        assert token != processor.unk_id(), piece
        assert token_losses.CLASSES[classes[token]] == name, piece
