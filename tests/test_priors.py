"""What the tokenizer and the document itself say about the next token: the canonical mask, copies and repeats."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_rules as rules
import numpy as np
import pytest
import sentencepiece as spm
import torch
import ttt_rules
from conftest import TINY, Done, call, environment

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
            return train_gpt.merged(text, price)[0]

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
    # training multiplies in another order
    assert losses["always"] == pytest.approx([losses["always"][1]] * 2, rel=1e-6)
    assert losses["none"] == pytest.approx([losses["none"][1]] * 2, rel=1e-6)
    assert losses["always"][1] < losses["none"][1]


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


# Hints


def naive_copies(tokens: np.ndarray, lengths: tuple[int, ...], window: int) -> dict[int, tuple[int, int]]:
    """Target -> bucket and token, by comparing every pair of places in a document."""
    found, starts = {}, [*np.flatnonzero(tokens == BOS_ID), len(tokens)]
    for start, end in itertools.pairwise(starts):
        for t, (i, k) in itertools.product(range(start + 2, min(end + 1, len(tokens))), enumerate(lengths)):
            for s in range(start + 1 + k, t):
                if t - k > start and (tokens[s - k : s] == tokens[t - k : t]).all():
                    found[t] = 1 + 2 * i + (t - s > window), int(tokens[s])
    return found


def naive_tilts(tokens: np.ndarray, length: int, share: float) -> dict[int, int]:
    """Target -> token, by counting."""
    found, starts = {}, [*np.flatnonzero(tokens == BOS_ID), len(tokens)]
    for start, end in itertools.pairwise(starts):
        counts: dict[tuple, dict[int, int]] = {}
        leaders: dict[tuple, int] = {}
        for t in range(start + 1 + length, min(end + 1, len(tokens))):
            after = counts.setdefault(tuple(tokens[t - length : t]), {})
            if after:
                best = max(after.values())
                if np.float32(best) / np.float32(sum(after.values())) >= np.float32(share):
                    found[t] = leaders[tuple(tokens[t - length : t])]
            y = int(tokens[t])
            after[y] = after.get(y, 0) + 1
            if after[y] > max((n for x, n in after.items() if x != y), default=0):
                leaders[tuple(tokens[t - length : t])] = y
    return found


def random_text(seed: int, vocab: int = 12) -> np.ndarray:
    """Documents of random tokens with some of their own earlier spans again."""
    rng, parts = np.random.default_rng(seed), []
    for length in rng.integers(1, 60, 9):
        text = rng.integers(2, vocab, length)
        for _ in range(length // 10):
            a, b, n = rng.integers(0, length, 3)
            n = min(n, length - max(a, b))
            text[b : b + n] = text[a : a + n]
        parts += [[BOS_ID], text]
    return np.concatenate(parts)


def test_copies_and_tilts_are_what_counting_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt, "COPY_LENGTHS", (1, 3, 4, 7))
    cfg, count = train_gpt.Config(ttt_eval_seq_len=9), 0
    for seed, before in itertools.product(range(6), (False, True)):
        tokens = random_text(seed)[1 if before else 0 :]  # the stream may begin inside a document
        stream = torch.from_numpy(tokens)
        naive = np.r_[BOS_ID, tokens[1:]]
        bits = train_gpt.find_copies(cfg, stream, stream == BOS_ID).tolist()
        fields = [(b >> train_gpt.BUCKET_AT, b >> train_gpt.COPY_AT & train_gpt.ID_BITS) for b in bits]
        copies = naive_copies(naive, train_gpt.COPY_LENGTHS, 9)
        assert {t: f for t, f in enumerate(fields) if f[0]} == copies and not {f for f in fields if f[1] and not f[0]}
        for length, share in ((1, 0.5), (2, 0.8), (3, 0.0)):
            monkeypatch.setattr(train_gpt, "TILT_LENGTH", length)
            monkeypatch.setattr(train_gpt, "TILT_SHARE", share)
            found = (train_gpt.find_tilts(cfg, stream, stream == BOS_ID) >> train_gpt.TILT_AT) - 1
            tilts = naive_tilts(naive, length, share)
            assert {t: int(h) for t, h in enumerate(found) if h >= 0} == tilts, (seed, length)
            count += len(tilts)
    assert count > 300


@pytest.mark.parametrize("knobs", EVALUATORS, ids=lambda knobs: " ".join(map(str, knobs.values())))
def test_copies_are_mixed_into_the_scores_of_every_evaluator(
    knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_gpt, "COPY_LENGTHS", (1, 2))
    val = ttt_rules.ValData(random_text(3), np.ones(len(random_text(3)), np.int32))
    scores, weights = {}, torch.tensor([0.0, 0.3, 0.5, 0.7, 0.9])
    for hints in ((), ("copy",)):
        cfg = ttt_rules.structure_config(PLAIN, hints=hints, **knobs)
        model = ttt_rules.strong_model(cfg, scale=0.3)
        model.copy_weights.copy_(weights)
        scores[hints] = ttt_rules.scores_of(cfg, model, val)
    found = naive_copies(val.tokens, (1, 2), cfg.ttt_eval_seq_len)
    for t in range(1, len(val.tokens)):
        p = np.exp(-scores[()][t])
        bucket, copy = found.get(t, (0, -1))
        weight = weights[bucket].item()
        mixed = -np.log((1 - weight) * p + weight * (copy == val.tokens[t]))
        assert scores[("copy",)][t] == pytest.approx(mixed, abs=2e-5), t
    assert len(found) > 50


@pytest.mark.parametrize("context", train_gpt.TTT_CONTEXTS)
def test_what_learns_does_not_see_hints(context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets without a hint have the same score to the last bit, among adapters that learn."""
    monkeypatch.setattr(train_gpt, "COPY_LENGTHS", (1, 2))
    monkeypatch.setattr(train_gpt, "TILT_LENGTH", 1)
    tokens = random_text(4, vocab=40)
    val, scores = ttt_rules.ValData(tokens, np.ones(len(tokens), np.int32)), []
    for hints in ((), ("copy", "tilt")):
        cfg = ttt_rules.structure_config(PLAIN, hints=hints, ttt_context=context, ttt_grad_steps=2, ttt_lora_lr=0.05)
        model = ttt_rules.strong_model(cfg, scale=0.3)
        model.copy_weights[1:] = 0.5
        scores.append(ttt_rules.scores_of(cfg, model, val)[1:])
    hinted = np.isin(np.arange(1, len(tokens)), [*naive_copies(tokens, (1, 2), 1), *naive_tilts(tokens, 1, 0.8)])
    assert np.array_equal(scores[0][~hinted], scores[1][~hinted]) and (~hinted).sum() > 50
    assert (scores[0][hinted] != scores[1][hinted]).mean() > 0.9


def test_weights_of_copies_are_fitted_stored_and_needed(
    tiny_data: Path, tmp_path: Path, call_ranks: Callable[..., Done]
) -> None:
    """One byte a bucket in the artifact; two ranks find the same, though only one of them has a batch for GPTAQ; the
    last score alone has hints. With tuned scales."""
    fits = {"HINTS": "copy,tilt", "TUNE_STEPS": 3, "GPTAQ_BATCHES": 1}
    env = environment(tiny_data, tmp_path / "run", EVAL="plain", MAX_WALLCLOCK_SECONDS=600, **fits)
    done = call(env, tmp_path / "run")
    assert done.code == 0, done.err
    (stored,) = (t for t in train_gpt.read_artifact(done.folder / "model.bin") if t.name == "copy_weights")
    weights = stored.parts["w"]
    assert weights.dtype == torch.uint8 and len(weights) == 15 and weights[0] == 0 and (weights[1:] > 0).any()
    assert done.bpb("final") < done.bpb("quantized") and done.result["legal"]
    assert 0 < done.result["fit_seconds"] < done.result["train_seconds"] < 600

    def again(name: str, **knobs: str) -> Done:
        folder = tmp_path / name
        shutil.copytree(done.folder, folder)
        return call(env | {"ARTIFACT_DIR": str(folder)} | knobs, folder)

    plain = again("plain", STAGES="eval", HINTS="none")
    assert plain.code == 0 and plain.bpb("final") == plain.bpb("quantized")
    twice = again("twice", STAGES="quantize,eval")
    assert twice.bpb("final") == done.bpb("final")
    fits = [run.result["train_seconds"] - run.result["fit_seconds"] for run in (done, twice)]
    assert fits[0] == pytest.approx(fits[1]), "the second fit takes the place of the first"
    ranks = tmp_path / "ranks"
    shutil.copytree(done.folder, ranks)
    pair = call_ranks(env | {"ARTIFACT_DIR": str(ranks), "STAGES": "quantize,eval"}, ranks)
    assert pair.code == 0, pair.err
    found, wanted = ({t.name: t for t in train_gpt.read_artifact(f / "model.bin")} for f in (ranks, done.folder))
    assert (found.pop("copy_weights").parts["w"].int() - wanted.pop("copy_weights").parts["w"].int()).abs().max() <= 1
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.decode(), wanted[name].decode(), rtol=2e-3, atol=1e-5)
    assert pair.bpb("final") == pytest.approx(done.bpb("final"), abs=1e-4)
    assert again("without", STAGES="quantize,eval", HINTS="none").code == 0
    rounded = again("rounded", STAGES="quantize,eval", TUNE_STEPS="0")
    assert rounded.bpb("quantized") != done.bpb("quantized") and rounded.result["fit_seconds"] > 0
    env |= {"MODEL_PATH": str(tmp_path / "without" / "model.bin"), "STAGES": "eval"}
    refused = call(env, done.folder)
    assert refused.code == 2 and "no weights for HINTS=copy; fit them with STAGES=quantize,eval" in refused.err


def test_em_finds_the_weights_that_made_the_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A uniform model, and documents of which a quarter of the tokens are copied: the best weight of a bucket."""
    monkeypatch.setattr(train_gpt, "COPY_LENGTHS", (1,))
    cfg = rules.toy_config("VOCAB_SIZE=64 NUM_LAYERS=1 NUM_LOOPS=0 MODEL_DIM=16 NUM_HEADS=2 NUM_KV_HEADS=1 ROPE_DIMS=4")
    cfg = train_gpt.dataclasses.replace(
        cfg, hints=("copy",), data_path=str(tmp_path), ttt_eval_seq_len=10_000, eval_seq_len=64, val_batch_tokens=8192
    )
    rng, last, text = np.random.default_rng(1), {}, [BOS_ID]
    for _ in range(8191):
        fresh = int(rng.integers(2, 64))
        text.append(last.get(text[-1], fresh) if rng.random() < 0.25 else fresh)
        last[text[-2]] = text[-1]
    rules.write_shards(tmp_path, np.array(text))
    model = train_gpt.GPT(cfg).init_weights(1)
    model.tok_emb.weight.data.zero_()
    weights = train_gpt.fit_copies(cfg, rules.runtime(), model)
    # where nothing is copied, one token in 62 is the copied one all the same, which the model knows
    assert weights.tolist()[::2] == [0, 0] and weights[1].item() / 256 == pytest.approx(0.25, abs=0.03)
