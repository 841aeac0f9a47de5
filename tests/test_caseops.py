"""CaseOps: transform and inverse, tokenisation by words, byte sidecar, preparation and audit."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import caseops
import caseops_reference as reference
import fuse_shards
import numpy as np
import prepare
import pytest
import sentencepiece as spm
import word_bpe
from caseops import ALLCAPS, CAPNEXT, ESC, TITLE, CaseOps, CaseOpsError, decode, encode
from conftest import prepare_docs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pair_fusion import FUSED_PAIRS, FusedCaseOps, PairFusion, plain_stream
from prepare import Options
from word_bpe import WordBPE

import train_gpt
from records import judge
from records.claims import FAIL, Candidate
from train_gpt import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "caseops.json").read_text(encoding="utf-8"))
TOKENIZERS = "PARAMETER_GOLF_TOKENIZERS"  # a folder with the published models; they are not part of this project

# Letters of both cases, neighbours of the letter ranges, all operators, white space, and what NFKC changes.
ODD = "aabzABZ@[`{ '1-\n\t\u2581\u00a0\u200b\u200d\ue000\ue001\ue002\ue003\ue004\ue005éÉe\u0301ßſKİıⅧﬁ½™…ＡａΣς日😀"
ANY_TEXT = st.one_of(st.text(st.characters(codec=None)), st.text(ODD + "\ud800\udc00"), st.text("abAB'" + TITLE))
UTF8_TEXT = st.one_of(st.text(), st.text(ODD))
WORDS = "The quick NASA probe saw McDonald's iPhone there and the U.S. team said: it's only 42 km, or Half".split()
SENTENCES = st.lists(st.sampled_from([*WORDS, "\n\n", "  ", "É½", "ＡB", "日本", "", "of", "e\u0301"])).map(" ".join)


def documents(count: int) -> list[str]:
    """Distinct English-looking documents, some with white space at their ends."""
    rng = np.random.default_rng(5)
    rows = [" ".join(rng.choice(WORDS, 80)) for _ in range(count)]
    return [f"{' ' * (i % 3)}Document {i}. {row}\nLÉON {i} ½ ＡB{chr(10) * (i % 2)}" for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def processor() -> spm.SentencePieceProcessor:
    """A small tokenizer with the four operators, made as `prepare --caseops --vocab-size` does."""
    model = prepare.train_tokenizer(map(encode, documents(60)), 400, CaseOps.symbols)
    return spm.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module")
def by_words(processor: spm.SentencePieceProcessor) -> WordBPE:
    """One cache for all examples: later ones meet words that earlier ones left."""
    found = WordBPE(processor)
    assert found.exact
    return found


# Transform


def test_golden_rows() -> None:
    for row in GOLDEN["encode"]:
        text, encoded = row["text"], row["encoded"]
        assert encode(text) == encoded and decode(encoded) == text, ascii(text)
        assert caseops.original_bytes(encoded).tolist() == row["bytes"], ascii(text)
    for row in GOLDEN["decode"]:
        if row["text"] is not None:
            assert decode(row["encoded"]) == row["text"], ascii(row["encoded"])
            continue
        with pytest.raises(ValueError, match="malformed CaseOps string at character"):
            pytest.fail(f"{ascii(row['encoded'])} became {decode(row['encoded'])!a}")


@settings(max_examples=400)
@given(ANY_TEXT)
@example("iPhone ABc aBC HELLOworld helloWORLD A AB I'm FBI's USA2020 CAFÉ")
@example("A" * 70_000 + "b")
def test_transform_is_lossless_and_equals_the_character_loop(text: str) -> None:
    encoded, counts = encode(text), caseops.original_bytes(encode(text))
    assert decode(encoded) == text and counts.sum() == len(text.encode("utf-8", "surrogatepass"))
    assert not set(encoded) & set(reference.UPPER)
    if len(text) < 1000:  # the loop is quadratic in nothing, but slow
        assert encoded == reference.encode(text) and counts.tolist() == reference.original_bytes(encoded)


@settings(max_examples=600)
@given(st.text(f"abA 1é{TITLE}{ALLCAPS}{CAPNEXT}{ESC}", max_size=12))
def test_decoder_is_the_state_machine_on_any_string(text: str) -> None:
    expected = reference.decode(text)
    if expected is not None:
        assert decode(text) == expected
        return
    with pytest.raises(CaseOpsError) as caught:
        decode(text)
    position = caught.value.position
    assert 0 <= position <= len(text)
    # what stands before the position is not what is wrong
    assert any(reference.decode(text[:position] + rest) is not None for rest in ("", "b", " b"))


def test_malformed_strings_are_located() -> None:
    for text, position, message in (
        (f"ab {TITLE}{ALLCAPS}c", 4, "ALLCAPS after another operator"),
        (f"ab{TITLE}c", 2, "TITLE inside a word"),
        (f"x {ALLCAPS} a", 3, "not followed by a letter"),
        (f"{CAPNEXT}{CAPNEXT}a", 1, "CAPNEXT twice"),
        (f"a {TITLE}{ESC}{TITLE}b", 3, "escaped character"),
        (f"abc {ESC}", 5, "ends after an operator"),
    ):
        with pytest.raises(CaseOpsError, match=message) as caught:
            decode(text)
        assert caught.value.position == position, message


# Tokenisation by words


@settings(max_examples=250)
@given(st.one_of(UTF8_TEXT, SENTENCES))
def test_words_give_the_ids_and_surfaces_of_sentencepiece(
    processor: spm.SentencePieceProcessor, by_words: WordBPE, text: str
) -> None:
    for seen in (text, encode(text)):
        expected = processor.encode(seen, out_type="offset_mapping")
        assert by_words.ids(seen).tolist() == expected["ids"] == processor.encode(seen)
        pieces = by_words.pieces(seen)
        assert pieces.ids.tolist() == expected["ids"]
        assert pieces.ends.tolist() == [end for _, end in expected["offsets"]]
        assert not expected["offsets"] or pieces.start == expected["offsets"][0][0]


def test_real_sentences_are_tokenised_by_words_and_a_full_memory_is_emptied(
    processor: spm.SentencePieceProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = WordBPE(processor)
    for seen in map(encode, documents(20)):
        assert words.ids_by_word(processor.normalize(seen)).tolist() == processor.encode(seen)
    assert 20 < len(words.known) < 200
    monkeypatch.setattr(word_bpe, "MAX_WORDS", 5)
    monkeypatch.setattr(word_bpe, "BATCH", 3)
    words = WordBPE(processor)
    for text in documents(20):
        assert words.ids(text).tolist() == processor.encode(text) and len(words.known) < 60


def test_other_tokenizers_are_left_to_sentencepiece() -> None:
    plain = {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, "hard_vocab_limit": False}
    plain |= {"vocab_size": 600, "minloglevel": 2}
    for change in ({"model_type": "unigram"}, {"add_dummy_prefix": True}, {"split_by_whitespace": False}):
        model = io.BytesIO()
        lines = iter(documents(60))
        spm.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **plain | change)
        processor = spm.SentencePieceProcessor(model_proto=model.getvalue())
        words = WordBPE(processor)
        assert not words.exact, change
        for text in ["", " ", *documents(5)]:
            expected = processor.encode(text, out_type="offset_mapping")
            assert words.ids(text).tolist() == expected["ids"] == words.pieces(text).ids.tolist(), change
            assert words.pieces(text).ends.tolist() == [end for _, end in expected["offsets"]], change


# Byte sidecar


@settings(max_examples=250)
@given(st.one_of(UTF8_TEXT, SENTENCES))
@example("two  spaces\n\nnew")
@example(" \u200b ")
@example("hello\n")
@example(f"{TITLE}x{ESC}{ESC}Y")
def test_every_original_byte_is_on_a_piece_or_at_an_end(processor: spm.SentencePieceProcessor, text: str) -> None:
    encoded, counts = encode(text), CaseOps().piece_bytes(text, processor)
    spans = processor.encode(encoded, out_type="offset_mapping")["offsets"]
    assert counts.tolist() == reference.piece_bytes(encoded, spans)
    assert len(text.encode()) - counts.sum() == prepare.edge_bytes(encoded, processor)


def test_worked_examples_of_byte_counts(processor: spm.SentencePieceProcessor) -> None:
    sums = {"USA2020": 7, "Ü": 2, "日": 3, "\ue001x": 4, "two  spaces\n\nnew": 16, "  two": 3, "hello\n": 5, "Ａ": 3}
    assert {text: CaseOps().piece_bytes(text, processor).sum() for text in sums} == sums
    counts = CaseOps().piece_bytes("\ue001x", processor).tolist()
    assert counts[:2] == [0, 3]  # an escaped operator has the operator's id, but bytes
    assert processor.encode(encode("\ue001x"))[:2] == [7, 4]


@pytest.fixture(scope="session")
def published() -> spm.SentencePieceProcessor:
    """The published CaseOps tokenizer, if the environment says where it is."""
    if TOKENIZERS not in os.environ:
        pytest.skip(f"{TOKENIZERS} names no folder with the published tokenizers")
    for path in Path(os.environ[TOKENIZERS]).glob("*.model"):
        if hashlib.md5(path.read_bytes()).hexdigest() == GOLDEN["tokenizer_md5"]:
            return spm.SentencePieceProcessor(model_file=str(path))
    raise AssertionError(f"no model in {TOKENIZERS} has the MD5 {GOLDEN['tokenizer_md5']}")


def test_golden_ids_and_bytes_of_the_published_tokenizer(published: spm.SentencePieceProcessor) -> None:
    rows = [row for row in GOLDEN["encode"] if "ids" in row]
    assert len(rows) > 10
    for row in rows:
        assert WordBPE(published).ids(row["encoded"]).tolist() == row["ids"]
        assert CaseOps().piece_bytes(row["text"], published).tolist() == row["token_bytes"]
    assert PairFusion.of(published).aliases == {4: 200, 5: 201} and PairFusion.of(published).first == 8133


# Preparation and audit


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`prepare --caseops` over 40 documents, 12 of them validation, several shards."""
    folder, options = tmp_path_factory.mktemp("caseops"), "--vocab-size 400 --caseops --val-docs 12 --shard-tokens 1000"
    prepare_docs(folder, documents(40), *options.split())
    return folder / "shards"


def test_prepared_directory_accounts_for_every_byte(prepared: Path, capsys: pytest.CaptureFixture) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    texts = documents(40)[:12]
    assert manifest["settings"]["transform"] == "lossless_caps_caseops_v1"
    size, sidecar = (sum(len(text.encode()) for text in cut) for cut in (texts, [text.strip() for text in texts]))
    assert manifest["byte_audit"] == {
        "docs": 12,
        "utf8_bytes": size,
        "sidecar_bytes": sidecar,
        "edge_bytes": size - sidecar,
        "docs_with_edges": sum(text != text.strip() for text in texts),
        "unexplained_bytes": 0,
    }
    processor = spm.SentencePieceProcessor(model_file=str(prepared / "bpe_400.model"))
    assert [processor.piece_to_id(symbol) for symbol in CaseOps.symbols] == [4, 5, 6, 7]
    ids, counts = prepare.read_validation(prepared)
    assert ids.tolist() == [token for text in texts for token in [1, *processor.encode(encode(text))]]
    assert len(manifest["sidecars"]) > 1 and counts[ids == 1].sum() == 0
    assert prepare.main(["audit", str(prepared)]) == 0
    out = capsys.readouterr().out
    assert "12 documents" in out and f"bytes {sidecar:,};" in out and "lossy False" in out


def test_audit_counts_what_the_normaliser_broke(prepared: Path) -> None:
    found = prepare.audit(prepared, seq_len=64)
    # every document ends with a wide capital before "B", which NFKC turns into the word "ab" with an operator inside
    assert found.docs == found.undecodable == 12
    ids, counts = prepare.read_validation(prepared)
    assert found.targets == (len(ids) - 1) // 64 * 64
    assert found.target_bytes == counts[1 : found.targets + 1].sum()
    assert found.decoded_bytes == pytest.approx(found.counted_bytes, rel=0.02)  # NFKC shortens Ａ and lengthens ½


def test_audit_refuses_what_does_not_belong_together(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sidecar = "fineweb_val_bytes_000000.bin"
    raw = (prepared / sidecar).read_bytes()
    more = [raw[:at] + bytes([raw[at] + 1]) + raw[at + 1 :] for at in (1024, 1030)]  # a byte more for token 0 or 3
    # without a manifest nothing has a hash, and only what does not fit together is found
    bare = {"manifest.json": None}
    for message, changes in {
        "fineweb_val_bytes_000001.bin is missing": {"fineweb_val_bytes_000001.bin": None},
        f"{sidecar}: SHA-256 is": {sidecar: more[1]},
        "other.model is not in manifest.json": {"other.model": b""},
        "is missing between its neighbours": bare | {"fineweb_val_bytes_000001.bin": None},
        "has no fineweb_val_*.bin": bare | {path.name: None for path in prepared.glob("fineweb_val_0*")},
        "has no fineweb_val_bytes_": bare | {path.name: None for path in prepared.glob("fineweb_val_bytes_*")},
        "has no *.model": bare | {"bpe_400.model": None},
        "holds 2 tokenizers": bare | {"other.model": b""},
        "gives bytes to BOS": bare | {sidecar: more[0]},
        "its manifest says": {"manifest.json": claimed(prepared)},
    }.items():
        folder = Path(shutil.copytree(prepared, tmp_path / message[:40].replace("*", "").replace(" ", "_")))
        for name, content in changes.items():
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        assert prepare.main(["audit", str(folder)]) == 2, message
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error


def claimed(folder: Path) -> bytes:
    """A directory's manifest with a byte more in the sidecar."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["byte_audit"]["sidecar_bytes"] += 1
    return json.dumps(manifest).encode()


def test_tokenizer_and_transform_must_match(prepared: Path, tmp_path: Path) -> None:
    docs, plain, fit = tmp_path / "docs.jsonl", tmp_path / "plain.model", prepared / "bpe_400.model"
    docs.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(9)), encoding="utf-8")
    plain.write_bytes(prepare.train_tokenizer(documents(60), 400))
    for model, transform, message in ((plain, CaseOps(), "needs its 4 symbols"), (fit, None, "add --caseops")):
        with pytest.raises(UserError, match=message):
            prepare.prepare(Options((docs,), tmp_path / "a", model, val_docs=3), transform)


def test_a_normaliser_that_loses_letters_is_found_behind_the_operators(tmp_path: Path) -> None:
    """ASCII capitals are operators before the tokenizer sees them, so folding them away loses only the others."""
    plain = {"model_type": "bpe", "vocab_size": 500, "byte_fallback": True, "add_dummy_prefix": False}
    plain |= {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "hard_vocab_limit": False, "minloglevel": 2}
    plain |= {"user_defined_symbols": list(CaseOps.symbols), "normalization_rule_name": "nmt_nfkc_cf"}
    lines = map(encode, documents(60))
    spm.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=str(tmp_path / "fold"), **plain)
    docs = tmp_path / "docs.jsonl"
    for word, lossy in (("NASA", False), ("\u00c9t\u00e9", True)):
        docs.write_text("".join(json.dumps({"text": f"The {word} of day {i}"}) + "\n" for i in range(9)))
        options = {"docs": (docs,), "out": tmp_path / word, "tokenizer": tmp_path / "fold.model", "val_docs": 3}
        if lossy:
            with pytest.raises(UserError, match="docs.jsonl:1: .*fold.model does not keep this text: .* comes back as"):
                prepare.prepare(Options(**options), CaseOps())
        found = prepare.prepare(Options(allow_lossy=lossy, **options), CaseOps())
        assert found["lossy"] is lossy and found["round_trip"]["lost_chars"] == 3 * lossy
        assert found["round_trip"]["counted_bytes"] == found["byte_audit"]["sidecar_bytes"]


# Pair fusion


def fusion_reference(ids: list[int], counts: list[int], fusion: PairFusion) -> tuple[list[int], list[int]]:
    """Token by token: a marker behind the first id takes its place."""
    out: list[list[int]] = []
    for token, count in zip(ids, counts, strict=True):
        if out and out[-1][0] == fusion.first and token in fusion.aliases:
            out[-1] = [fusion.aliases[token], out[-1][1] + count]
        else:
            out.append([token, count])
    return [token for token, _ in out], [count for _, count in out]


def test_golden_fused_pairs() -> None:
    golden = GOLDEN["mp3_fuse"]
    fusion = PairFusion(golden["space"], {int(marker): alias for marker, alias in golden["aliases"].items()})
    ids, counts = np.array(golden["ids"], np.uint16), np.array(golden["bytes"], np.uint16)
    fused = fusion.fuse(ids, counts)
    assert [row.tolist() for row in fused] == [golden["fused_ids"], golden["fused_bytes"]]
    plain, spread = fusion.unfuse(*fused)
    assert plain.tolist() == golden["ids"] and spread.sum() == counts.sum()


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9)), max_size=60), st.booleans())
def test_fusing_random_ids_is_undone_exactly_and_keeps_every_byte(rows: list[tuple[int, int]], wide: bool) -> None:
    """Ids 0 to 7 hold no alias: 3 is the first id, 4 and 5 are markers."""
    fusion, dtype = PairFusion(3, {4: 65_535, 5: 200}), np.int64 if wide else np.uint16
    ids, counts = np.array(rows, dtype).reshape(-1, 2).T
    fused, sums = fusion.fuse(ids, counts)
    assert (fused.tolist(), sums.tolist()) == fusion_reference(ids.tolist(), counts.tolist(), fusion)
    plain, spread = fusion.unfuse(fused, sums)
    assert plain.tolist() == ids.tolist() and plain.dtype == fused.dtype == dtype and spread.sum() == counts.sum()
    assert fusion.fuse(ids)[0].tolist() == fused.tolist() and fusion.fuse(ids)[1] is None
    # the other way round: of every stream without a pair
    again, _ = fusion.fuse(fusion.unfuse(fused)[0])
    assert again.tolist() == fused.tolist() and not len(fusion.places(fused))


@settings(max_examples=250)
@given(st.one_of(UTF8_TEXT, SENTENCES))
@example("The <0xC0> A \u00c0\u00ff \U0010ffff")
@example(f"a {TITLE}b {CAPNEXT}c  {ALLCAPS} D\n\nEF")
def test_encodings_hold_no_alias_and_no_third_pair(processor: spm.SentencePieceProcessor, text: str) -> None:
    fusion, space = PairFusion.of(processor), processor.piece_to_id(word_bpe.SPACE)
    ids, counts = word_bpe.word_bpe(processor).ids(encode(text)), CaseOps().piece_bytes(text, processor)
    assert not (fusion.marker_of[ids] >= 0).any()
    pairs = set(zip(ids.tolist(), ids[1:].tolist(), strict=False))
    assert (space, processor.piece_to_id(CAPNEXT)) not in pairs
    fused, sums = fusion.fuse(ids, counts)
    plain, spread = fusion.unfuse(fused, sums)
    # byte for byte, not only in sum: an operator behind a space stands for none
    assert plain.tolist() == ids.tolist() and spread.tolist() == counts.tolist()


def test_fusions_that_cannot_be_undone_are_refused(processor: spm.SentencePieceProcessor) -> None:
    fusion = PairFusion.of(processor)
    alias = next(iter(fusion.aliases.values()))
    assert [processor.id_to_piece(i) for i in fusion.aliases.values()] == ["<0xC0>", "<0xC1>"]
    for message, broken in {
        "fused already": lambda: fusion.fuse(np.array([5, alias])),
        "over the 65535 of a sidecar": lambda: PairFusion(3, {4: 9}).fuse(np.array([3, 4]), np.array([65_535, 1])),
        "give different ids from 0 to 65535": lambda: PairFusion(3, {4: 9, 5: 9}),
        "of the ids .3, 3, 9.": lambda: PairFusion(3, {3: 9}),
        "train one with --caseops": lambda: PairFusion.of(
            spm.SentencePieceProcessor(model_proto=prepare.train_tokenizer(documents(60), 400))
        ),
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            broken()
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepared` is, with fused pairs."""
    folder, options = tmp_path_factory.mktemp("fused"), "--vocab-size 400 --val-docs 12 --shard-tokens 1000"
    prepare_docs(folder, documents(40), "--caseops", "--fuse-pairs", *options.split())
    return folder / "shards"


def split_of(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([train_gpt.read_shard(path) for path in train_gpt.list_shards(str(folder), split)])


def test_fused_shards_are_the_fused_stream_of_plain_ones_with_the_same_bytes(
    prepared: Path, fused: Path, capsys: pytest.CaptureFixture
) -> None:
    before, after = (json.loads((folder / "manifest.json").read_text()) for folder in (prepared, fused))
    processor = spm.SentencePieceProcessor(model_file=str(fused / "bpe_400.model"))
    fusion = PairFusion.of(processor)
    assert after[FUSED_PAIRS] == fusion.rows(processor) and FUSED_PAIRS not in before
    assert after[FUSED_PAIRS][1]["pair_pieces"] == ["\u2581", ALLCAPS]
    assert after["settings"]["transform"] == FusedCaseOps.name != CaseOps.name == before["settings"]["transform"]
    # documents meet shards' ends anywhere, and still no pair is left
    for split in ("val", "train"):
        plain = split_of(prepared, split)
        assert split_of(fused, split).tolist() == fusion.fuse(plain)[0].tolist()
        assert after["splits"][split]["tokens"] < 0.95 * before["splits"][split]["tokens"] == 0.95 * len(plain)
    assert len(after["sidecars"]) > 1
    counts, sums = split_of(prepared, "val_bytes"), split_of(fused, "val_bytes")
    assert sums.tolist() == fusion.fuse(split_of(prepared, "val"), counts)[1].tolist()
    assert after["byte_audit"] == before["byte_audit"] and after["round_trip"] == before["round_trip"]
    assert after["val_document_sha256"] == before["val_document_sha256"]
    first, second = prepare.audit(prepared, seq_len=64), prepare.audit(fused, seq_len=64)
    assert second.tokens + second.fused == first.tokens and first.fused == 0
    same = ("counted_bytes", "decoded_bytes", "docs", "undecodable", "equal")
    assert [getattr(first, name) for name in same] == [getattr(second, name) for name in same]
    assert prepare.main(["audit", str(fused)]) == 0
    assert f"pairs {second.fused:,} fused; without that {first.tokens:,} tokens" in capsys.readouterr().out
    # the trainer needs to know nothing: the sidecar has the bytes
    val = train_gpt.load_val(train_gpt.Config(data_path=str(fused), vocab_size=400, eval_seq_len=64))
    assert val.bytes.sum() == second.target_bytes


def test_texts_come_back_from_fused_shards_byte_for_byte(tmp_path: Path) -> None:
    texts = [f"{text} NASA sent Ann O'Neil \u00e9 Home {i}" for i, text in enumerate([" ".join(WORDS)] * 30)]
    prepare_docs(tmp_path, texts, "--vocab-size", "400", "--caseops", "--fuse-pairs", "--val-docs", "9")
    found = prepare.audit(tmp_path / "shards", max_overlap=1.0)
    assert found.equal == found.docs == 9 and found.undecodable == 0 and found.fused > 60
    assert found.counted_bytes == found.decoded_bytes == sum(len(text.encode()) for text in texts[:9])


def test_finished_shards_are_fused_across_their_borders(
    prepared: Path, fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    plain = [prepare.read_shard(path) for path in train_gpt.list_shards(str(prepared), "train")]
    cut = np.concatenate(plain)
    fusion = PairFusion.of(prepare.load_tokenizer(str(prepared / "bpe_400.model")))
    # no manifest, and a shard that ends inside a pair
    bare = Path(shutil.copytree(prepared, tmp_path / "bare"))
    for path in [bare / "manifest.json", *bare.glob("fineweb_train_*")]:
        path.unlink()
    at = int(fusion.places(cut)[20]) + 1
    for number, part in enumerate((cut[:at], cut[at:])):
        prepare.write_shard(bare / f"fineweb_train_{number:06d}.bin", part)
    for folder in (prepared, bare):
        out = tmp_path / f"{folder.name}_fused"
        assert fuse_shards.main([str(folder), "--out", str(out)]) == 0
        for split in ("val", "val_bytes", "train"):
            assert split_of(out, split).tolist() == split_of(fused, split).tolist(), split
        assert prepare.main(["audit", str(out), "--max-overlap", "1"]) == 0
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["byte_audit"]["sidecar_bytes"] == split_of(prepared, "val_bytes").sum()
    assert prepare.check_hashes(tmp_path / "shards_fused") > 5
    capsys.readouterr()
    plain_text = tmp_path / "plain"
    plain_text.mkdir()
    prepare_docs(plain_text, documents(40), "--vocab-size", "400", "--val-docs", "12")
    for source, out, message in (
        (prepared, prepared, "is not empty; use another --out"),
        (fused, tmp_path / "twice", "they are fused already"),
        (plain_text / "shards", tmp_path / "x", "is for plain text, which has no pairs to fuse"),
        (tmp_path, tmp_path / "y", "has no *.model"),
    ):
        assert fuse_shards.main([str(source), "--out", str(out)]) == 2, message
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("error: ") and message in error[-1], error


def test_a_stopped_fusion_leaves_nothing(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out, write_json = tmp_path / "out", prepare.write_json
    for stop, status, message in (
        (KeyboardInterrupt(), 130, "interrupted; run again"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left"),
    ):

        def stopped(*arguments: object, stop: BaseException = stop) -> None:
            assert len(list(out.iterdir())) > 5
            raise stop

        monkeypatch.setattr(prepare, "write_json", stopped)
        assert fuse_shards.main([str(prepared), "--out", str(out)]) == status
        assert message in capsys.readouterr().err and not list(out.iterdir())
    monkeypatch.setattr(prepare, "write_json", write_json)
    assert fuse_shards.main([str(prepared), "--out", str(out)]) == 0


def spoilt(
    folder: Path, room: Path, sizes: np.ndarray | None = None, tokens: np.ndarray | None = None, **manifest: object
) -> Path:
    """A copy of a folder whose manifest has no hashes, other values if given, and perhaps another stream."""
    kept = {FUSED_PAIRS: json.loads((folder / "manifest.json").read_text())[FUSED_PAIRS]}
    room.mkdir()
    shutil.copy(folder / "bpe_400.model", room)
    for kind, given_row in (("val", tokens), ("val_bytes", sizes)):
        prepare.write_shard(
            room / f"fineweb_{kind}_000000.bin", split_of(folder, kind) if given_row is None else given_row
        )
    (room / "manifest.json").write_text(json.dumps({k: v for k, v in (kept | manifest).items() if v is not None}))
    return room


def test_audit_and_judge_refuse_fused_data_that_does_not_fit(
    fused: Path, prepared: Path, fused_sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, counts = split_of(fused, "val"), split_of(fused, "val_bytes")
    processor = prepare.load_tokenizer(str(fused / "bpe_400.model"))
    fusion = PairFusion.of(processor)
    alias, rows = fusion.marker_of[ids] >= 0, fusion.rows(processor)
    values = {"VOCAB_SIZE": "400", "EVAL_SEQ_LEN": "64"}

    def judged(folder: Path) -> dict[str, str]:
        found = Candidate("preset", "x", b"", values, values, data=folder, tokenizer=judge.tokenizer_in(folder))
        checks = judge.byte_checks(found, judge.read_stream(folder))
        return {check.name: check.detail for check in checks if check.status == FAIL}

    assert judged(fused) == judged(prepared)  # the same counts in every message
    assert not judged(fused_sample)
    monkeypatch.setattr(prepare, "check_hashes", lambda folder: 0)  # what a forger would mend
    left = fusion.unfuse(ids[:100], counts[:100])
    unfused = [np.concatenate((head, tail[100:])) for head, tail in zip(left, (ids, counts), strict=True)]
    for number, (message, changes) in enumerate(
        {
            "the shards hold <0xC": {FUSED_PAIRS: None},
            "not the pairs of this tokenizer": {FUSED_PAIRS: rows[::-1]},
            "and the shards hold some that are not": {"tokens": unfused[0], "sizes": unfused[1]},
            "gives no byte to a fused pair": {"sizes": counts * ~alias},
        }.items()
    ):
        folder = spoilt(fused, tmp_path / str(number), **changes)
        with pytest.raises(UserError, match=message):
            prepare.audit(folder)
        assert message in judged(folder)["bytes of fused pairs"]
    # operators that count as text: the manifest's sum tells the audit, the share of single spaces the judge
    folder = spoilt(fused, tmp_path / "more", counts + 3 * alias, byte_audit={"sidecar_bytes": int(counts.sum())})
    with pytest.raises(UserError, match="its manifest says"):
        prepare.audit(folder)
    assert "bytes of spaces before operators" in judged(folder)


def test_bytes_of_no_text_are_refused_in_plain_data_too() -> None:
    processor = spm.SentencePieceProcessor(model_proto=prepare.train_tokenizer(documents(60), 400))
    ids = np.array(processor.encode("plain text"))
    assert plain_stream({}, processor, ids)[0] is ids
    with pytest.raises(UserError, match="hold <0xF8>, a byte of no text"):
        plain_stream({}, processor, np.append(ids, processor.piece_to_id("<0xF8>")))
