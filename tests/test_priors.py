"""What the tokenizer and the document itself say about the next token: the canonical mask, copies and repeats."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import golden_rules as rules
import numpy as np
import pytest
import sentencepiece as spm
import torch
import ttt_rules
from conftest import TINY, call, environment

import train_gpt
from train_gpt import BOS_ID, UserError

PLAIN = next(iter(ttt_rules.STRUCTURES))
EVALUATORS: list[dict[str, Any]] = [  # all that score, with nothing learnt
    {"eval": "plain"},
    {"eval": "plain", "loader": "stream"},
    {"eval": "sliding"},
    {"eval": "chunk_sgd", "ttt_lr": 0.0},
    {"eval": "slot", "slot_lr": 0.0, "ttt_lr": 0.0},
    {"ttt_lora_lr": 0.0},
    {"ttt_lora_lr": 0.0, "ttt_context": "carry"},
    {"ttt_lora_lr": 0.0, "ttt_context": "carry", "embed_extras": ("bigram", "trigram", "smear")},
]


# The canonical mask


@pytest.fixture(scope="module")
def processor(tiny_data: Path) -> spm.SentencePieceProcessor:
    (model,) = tiny_data.glob("*.model")
    return spm.SentencePieceProcessor(model_file=str(model))


@pytest.fixture(scope="module")
def banned(processor: spm.SentencePieceProcessor) -> np.ndarray:
    """(V, V) bool of the mask of tiny_data's tokenizer."""
    packed = train_gpt.canonical_mask(processor)
    assert packed.shape == (320, 40) and packed.dtype == np.uint8
    return np.unpackbits(packed, axis=1, bitorder="little").astype(bool)


def test_mask_is_what_the_tokenizer_never_writes(processor: spm.SentencePieceProcessor, banned: np.ndarray) -> None:
    """All pairs of learnt pieces, encoded by SentencePiece itself; controls and bytes are left alone."""
    learnt = [i for i in range(320) if not (processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i))]
    texts = {i: processor.id_to_piece(i).replace("\u2581", " ") for i in learnt}
    other = np.ones(320, bool)
    other[learnt] = False
    assert not banned[other].any() and not banned[:, other].any()
    # a letter in front, since the normaliser strips spaces at the start and folds them elsewhere
    asked = [
        (p, x) for p, x in itertools.product(learnt, learnt) if not {texts[p][0], texts[x][0], texts[p][-1]} & {" "}
    ]
    for p, x in asked:
        assert banned[p, x] == (processor.encode(texts[p] + texts[x]) != [p, x]), (texts[p], texts[x])
    assert len(asked) > 500 and 0.02 < np.mean([banned[pair] for pair in asked]) < 0.98


def test_mask_bans_nothing_in_a_prepared_stream(tiny_data: Path, banned: np.ndarray) -> None:
    for path in tiny_data.glob("fineweb_*_000000.bin"):
        tokens = np.array(train_gpt.read_shard(path))
        assert len(tokens) > 200 and not banned[tokens[:-1], tokens[1:]].any(), path


def test_mask_of_learnt_pieces_that_only_brute_force_explains() -> None:
    """Random vocabularies, whose pieces are often made out of order; ties of price are common there."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        texts = {"".join(rng.choice([*"abc"], rng.integers(2, 6))) for _ in range(14)}
        names = [*rng.permutation(sorted(texts)).tolist(), *"abc"]
        price = {name: i for i, name in enumerate(names)}

        def made(text: str, price: dict[str, int] = price) -> list[str]:
            *_, (symbols, _) = train_gpt.merges(text, price)
            return symbols

        found = np.unpackbits(train_gpt.canonical_mask(rules.Toyenizer(names)), axis=1, bitorder="little")
        for (p, a), (x, b) in itertools.product(enumerate(names), repeat=2):
            if made(a) == [a] and made(b) == [b]:  # the others are in no text at all
                assert found[p, x] == (made(a + b) != [a, b]), (names, a, b)


def masked_model(cfg: train_gpt.Config, tokens: np.ndarray) -> train_gpt.GPT:
    """A model that bans all pairs but those of a stream."""
    bits = np.ones((cfg.vocab_size, -(-cfg.vocab_size // 8) * 8), bool)
    bits[tokens[:-1], tokens[1:]] = False
    model = ttt_rules.strong_model(cfg, scale=0.3)
    model.canonical = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little"))
    return model


@pytest.mark.parametrize("knobs", EVALUATORS, ids=lambda knobs: " ".join(map(str, knobs.values())))
def test_mask_never_raises_the_loss_of_a_canonical_stream(knobs: dict[str, Any]) -> None:
    """In every evaluator, so each gives every target the token before it; and it takes all that can be taken."""
    val = ttt_rules.golden_stream([30, 61, 22, 13, 9, 2, 17])
    scores = {}
    for mode in ("none", "eval", "always"):
        cfg = ttt_rules.structure_config(PLAIN, canonical_mask=mode, **knobs)
        scores[mode] = ttt_rules.scores_of(cfg, masked_model(cfg, val.tokens), val)[1:]
    assert (scores["eval"] <= scores["none"] + 1e-5).all() and np.array_equal(scores["eval"], scores["always"])
    # few tokens follow each token here, and the rest is gone
    assert scores["eval"].mean() < 0.7 * scores["none"].mean()


def test_mask_counts_in_training_only_if_always() -> None:
    val = ttt_rules.golden_stream([40, 41])
    ids = torch.from_numpy(val.tokens)[None]
    losses = {}
    for mode in ("none", "eval", "always"):
        model = masked_model(ttt_rules.structure_config(PLAIN, canonical_mask=mode), val.tokens)
        losses[mode] = [model.train(on)(ids[:, :-1], ids[:, 1:]).item() for on in (True, False)]
    assert losses["eval"] == [losses["none"][0], losses["always"][1]]
    assert losses["always"][0] == losses["always"][1] < losses["none"][0] == losses["none"][1]


def test_runs_with_the_mask_and_refuses_other_encodings(
    tiny_data: Path, tmp_path: Path, processor: spm.SentencePieceProcessor, banned: np.ndarray
) -> None:
    free, masked = (
        call(env, Path(env["ARTIFACT_DIR"]))
        for env in (
            environment(tiny_data, tmp_path / mode, CANONICAL_MASK=mode, EVAL="plain") for mode in ("none", "eval")
        )
    )
    assert free.code == masked.code == 0, masked.err
    for name, weight in free.weights().items():
        assert torch.equal(weight, masked.weights()[name]), "trained without it"
    assert masked.bpb("final") < free.bpb("final") and masked.bpb("pre_quant") < free.bpb("pre_quant")
    assert masked.result["bytes_model"] == free.result["bytes_model"]
    # a canonical text with one word's pieces torn apart
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    (data / "manifest.json").unlink()
    p, x = np.argwhere(banned)[0]
    for kind, stages in (("val", "eval"), ("train", "train,quantize,eval")):
        path = data / f"fineweb_{kind}_000000.bin"
        before = path.read_bytes()
        tokens = np.array(train_gpt.read_shard(path))
        tokens[np.flatnonzero(tokens == BOS_ID)[2] + np.array([1, 2])] = p, x
        path.write_bytes(before[:1024] + tokens.tobytes())
        env = environment(data, tmp_path / kind, CANONICAL_MASK="eval", MODEL_PATH=masked.folder / "model.bin")
        done = call(env | {"STAGES": stages, "EVAL": "plain"}, tmp_path / kind)
        assert done.code == 2 and f"document 3 token {x} follows {p}" in done.err and "CANONICAL_MASK=none" in done.err
        assert call(env | {"STAGES": "eval", "EVAL": "plain", "CANONICAL_CHECK": "0"}, tmp_path / kind).code == 0
        path.write_bytes(before)
    no_model = train_gpt.load_config(TINY | {"DATA_PATH": str(tmp_path), "CANONICAL_MASK": "eval"})
    with pytest.raises(UserError, match="CANONICAL_MASK=eval needs the tokenizer; set TOKENIZER_PATH"):
        train_gpt.checked_mask(no_model, ttt_rules.golden_stream([9]))
