"""What the tests of evaluation and test-time training share: streams, models, and every score by its position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import golden_rules as rules
import numpy as np
import pytest
import torch
from conftest import TINY
from torch import Tensor

import train_gpt
from train_gpt import BOS_ID, GPT, ByteMeter, Cells, Config, Score, ValData, load_config

VOCAB = 64


def small_config(**knobs: object) -> Config:
    """A small looped model, short windows and chunks, and steps large enough to be seen."""
    base = {**TINY, "VOCAB_SIZE": VOCAB, "MODEL_DIM": 16, "EVAL_SEQ_LEN": 16, "EVAL_STRIDE": 4, "VAL_BATCH_TOKENS": 192}
    base |= {"TTT_CHUNK_TOKENS": 32, "TTT_LR": 0.05, "TTT_EPOCHS": 2}
    base |= {"TTT_EVAL_SEQ_LEN": 16, "TTT_CHUNK_SIZE": 4, "TTT_LORA_LR": 0.05}
    return load_config({key: str(value) for key, value in {**base, **knobs}.items()})


def random_stream(num_targets: int, seed: int = 0, document: float = 0.08) -> ValData:
    """Random tokens with document starts at this rate, the first at 0, and random bytes per token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, VOCAB, num_targets + 1)
    tokens[rng.random(num_targets + 1) < document] = BOS_ID
    tokens[0] = BOS_ID
    return ValData(tokens, rng.integers(0, 9, num_targets + 1).astype(np.int32))


def golden_stream(raw_lengths: list[int], vocab: int = 97) -> ValData:
    """The golden stream: documents of these lengths, and its rule of bytes."""
    starts = np.cumsum([0, *raw_lengths[:-1]])
    ids, position = rules.tokens(vocab, sum(raw_lengths), starts.tolist()), np.arange(sum(raw_lengths))
    return ValData(ids, np.where(ids == BOS_ID, 0, 1 + position % 5).astype(np.int32))


def strong_model(cfg: Config, dtype: torch.dtype = torch.float32, scale: float = 0.2) -> GPT:
    """Random weights everywhere, large enough that context matters; looping, as at the end of training."""
    model, generator = GPT(cfg, dtype=dtype).init_weights(1).to(dtype), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    model.set_looping(True)
    return model


@contextmanager
def recorded() -> Iterator[dict[int, float]]:
    """Within, every score that a meter counts, by stream position, in the order of scoring."""
    scores, add = {}, ByteMeter.add

    def listen(meter: ByteMeter, cells: Cells, nll: Tensor) -> None:
        add(meter, cells, nll)
        scores.update(zip(cells.scored().tolist(), nll.detach()[cells.rows, cells.cols].tolist(), strict=True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ByteMeter, "add", listen)
        yield scores


def per_target(evaluate: Callable[[], object], length: int) -> np.ndarray:
    """Nats of each target of a real evaluation, by position; NaN where none was scored."""
    with recorded() as scores:
        evaluate()
    return np.array([scores.get(position, math.nan) for position in range(length)])


def evaluate(cfg: Config, model: GPT, val: ValData, dtype: torch.dtype = torch.float32) -> Score:
    """EVAL on one silent process."""
    return train_gpt.EVALS[cfg.eval](cfg, rules.runtime(dtype), model, val)


def scores_of(cfg: Config, model: GPT, val: ValData, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """per_target of EVAL."""
    return per_target(lambda: evaluate(cfg, model, val, dtype), len(val.tokens))


# Structures that adapters and caches meet

CHUNK = 8
LENGTHS = (30, 75, 45, 13, 52, 2, CHUNK + 1, 2 * CHUNK + 1, CHUNK, 80)  # 3 of 10 are longer than a window of 48
LOOPED = {"vocab_size": 97, "num_layers": 3, "model_dim": 16, "num_heads": 4, "num_kv_heads": 2, "mlp_mult": 2.0}
LOOPED |= {"rope_dims": 4, "xsa_last_n": 2, "attn_gate": "sparse", "gate_window": 4, "embed_extras": ("smear",)}
LOOPED |= {"num_loops": 1, "loop_start": 1, "loop_end": 1, "enable_looping_at": 0.5, "parallel_start_layer": 2}
LOOPED |= {"bigram_vocab_size": 64, "bigram_dim": 8, "trigram_vocab_size": 48, "trigram_dim": 8}
LOOPED |= {"ve_layers": (0, 2), "ve_dim": 6, "ttt_lora_rank": 3, "ttt_lora_alpha": 4.5, "ttt_lora_lr": 0.01}
LOOPED |= {
    "ttt_chunk_size": rules.always(CHUNK),
    "ttt_eval_seq_len": 96,
    "ttt_batch_size": 4,
    "eval": "doc_lora",
    "batch_slices": 1,
}
LOOPED |= {"eval_seq_len": 24, "eval_stride": 8, "val_batch_tokens": 96, "ttt_chunk_tokens": 48, "ttt_lr": 0.05}
LOOPED |= {"ttt_epochs": 2, "global_ttt_chunk_tokens": 32, "global_ttt_lr": 0.05, "train_seq_len": 1024}
BARE = {"num_loops": 0, "parallel_start_layer": 0, "attn_gate": "none", "embed_extras": (), "attn_extras": ()}
HASHES = {"embed_extras": ("bigram", "trigram", "smear", "smear_channel")}
STRUCTURES = {
    "loops, lanes, XSA, sparse gate, smear": {},
    "one lane, no loops, no extras": BARE,
    "smear over document starts": {"smear_bos_mask": False, "attn_gate": "dense_bias"},
    "hashes and both smears": HASHES,
    "the same over document starts": HASHES | {"hash_bos_mask": False, "smear_bos_mask": False, "attn_gate": "sparse"},
    "value embeddings and residuals": {"attn_extras": ("xsa", "value_residual", "value_embed")},
    "partial rotation of a stretched base": {"rope_reference_len": 8, "attn_gate": "dense_bias"},
}


def structure_config(structure: str, **knobs: object) -> Config:
    """The config of a structure."""
    cfg = Config(**LOOPED | STRUCTURES[structure] | knobs)
    assert cfg.problems() == []
    return cfg


# Every part of the other two published stacks, beside loops and lanes

STACKS = {
    "n-gram": """
VOCAB_SIZE=97 NUM_LAYERS=5 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=2 ROPE_DIMS=4 ROPE_REFERENCE_LEN=16
NUM_LOOPS=1 LOOP_START=0 LOOP_END=1 PARALLEL_START_LAYER=3 ATTN_GATE=dense_bias GATE_WINDOW=8 XSA_LAST_N=3
ATTN_EXTRAS=xsa,value_residual,value_embed VE_LAYERS=0,1,4 VE_DIM=12 EMBED_EXTRAS=bigram,trigram,smear,smear_channel
BIGRAM_VOCAB_SIZE=61 BIGRAM_DIM=12 TRIGRAM_VOCAB_SIZE=47 TRIGRAM_DIM=20
""",
    "delta": """
VOCAB_SIZE=97 NUM_LAYERS=5 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=2 ROPE_DIMS=4 MIXERS=GAAAG GDN_HEAD_DIM=8
NUM_LOOPS=1 LOOP_START=1 LOOP_END=2 PARALLEL_START_LAYER=3 PARALLEL_LANES=1 ATTN_EXTRAS=xsa,sink
""",
}


def stack_model(stack: str, looping: bool = True, **knobs: object) -> GPT:
    """A float32 model with every part of a stack, none of its tensors zero."""
    model = strong_model(rules.toy_config(STACKS[stack], **knobs), scale=0.1)
    model.set_looping(looping)
    return model


def sample(rows: int, length: int, bos: list[int]) -> Tensor:
    """Tokens of such a model, with document starts at some places of the whole."""
    return torch.from_numpy(rules.tokens(97, rows * length, bos)).view(rows, length)
