#!/usr/bin/env python3
"""train_gpt.py: train, quantise, score and adapt a small GPT for Parameter Golf, in one self-contained file.

The contest: the best language model that fits, code and compressed weights together, in 16,000,000 bytes, trained in
10 minutes on 8xH100 and scored in 10 more by bits per byte (val_bpb) on FineWeb.

    python train_gpt.py --help                         every knob: default, bounds, meaning
    PRESET=records/demo python train_gpt.py --explain  what would run: knobs, parameters, route, optimisers, bits
    PRESET=records/demo python train_gpt.py            train, quantise, evaluate on whatever device is there
    torchrun --nproc_per_node=8 train_gpt.py           the same on eight GPUs (or, with gloo, on eight CPU processes)

A run writes log.txt, metrics.jsonl, model.pt, hessians.pt, model.bin, record.env and result.json into its folder;
STAGES=quantize,eval resumes from those files. What differs between systems is data: values of Config, rows of the
tables (ROLES, EVALS), keys into literal registries, and listeners at one seam (taps).

Sections: 01 CONFIG, 02 RUNTIME, 03 DATA, 04 ATTENTION, 05 KERNELS, 06 MODEL PARTS, 07 MODEL, 08 OPTIMISERS,
09 TRAINING, 10 QUANTISATION, 11 ARTIFACT, 12 TOKEN PRIORS, 13 EVALUATION, 14 TEST-TIME TRAINING, 15 MAIN.
Notation: B batch rows, T tokens of a row, D model width, H query heads, K key/value heads, V vocabulary, N all tokens.
Nouns: Config, Runtime, Route, AttnMeta, taps, QuantRule, Codec, ByteMeter, Learner.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import difflib
import fcntl
import fnmatch
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import json
import lzma
import math
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import ge, gt, le
from pathlib import Path
from typing import Any, NamedTuple, Protocol

if __name__ == "__main__":
    # Ctrl-C while modules load, here and in RUNTIME, ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class UserError(ValueError):
    """A mistake that the user can mend; main prints it as one line and exits with status 2."""


# +--------------------------------------------------------------------------------------------------------------------+
# | 01 CONFIG                                                                                                          |
# +--------------------------------------------------------------------------------------------------------------------+


def knob(default: Any, doc: str, allowed: str = "", when: str = "") -> Any:
    """A field of Config.

    `doc` is one line with the unit; `allowed` lists choices, "a|b|c", or bounds, ">= 0, <= 1"; `when` names the
    settings under which the knob matters.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, "allowed": allowed, "when": when})


Words = tuple[str, ...]  # the value of a knob that lists words, written with commas


class UpTo(NamedTuple):
    """An entry of a knob that is a table: a value, and up to which limit it holds; LIMIT:VALUE as text."""

    limit: float
    value: int

    def __str__(self) -> str:
        return str(self.value) if self.limit == math.inf else f"{self.limit:.12g}:{self.value}"

    @classmethod
    def parse(cls, text: str) -> UpTo:
        """Read LIMIT:VALUE, VALUE@LIMIT as some published scripts write it, or a VALUE without a limit."""
        found = re.fullmatch(r"(?:([\d.]+):)?([1-9]\d*)(?:@([\d.]+))?", text)
        if not found:
            raise ValueError("must list LIMIT:VALUE, with integers above 0 as values")
        before, value, after = found.groups()
        return cls(float(before or after or "inf"), int(value))


def up_to(table: tuple[UpTo, ...], x: float) -> int:
    """Return the value at the smallest limit that is not below x, or else at the largest limit."""
    return min((entry for entry in table if x <= entry.limit), default=max(table)).value


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """Every knob of a run. A knob's environment variable is its name in capitals."""

    run_id: str = knob("", "name of the run; empty: <preset>_seed<SEED>, and a hash if the environment sets knobs")
    artifact_dir: str = knob("", "run directory; empty: logs/<RUN_ID>")
    stages: Words = knob(
        ("train", "quantize", "eval"),
        "stages to run: all three, or the last one or two, which start from the files of an earlier run",
        "train|quantize|eval",
    )
    model_path: str = knob("", "artifact that STAGES=eval reads; empty: <run directory>/model.bin")
    scores: str = knob(
        "",
        "each evaluation writes SCORES.<rank>.npy, which the judge reads: float64 rows of a target's position in the "
        "validation stream, its nats, and the number of the step that scored it; empty: nothing is written",
    )
    device: str = knob("auto", "auto: a GPU if torch sees one", "auto|cpu|cuda")
    attention: str = knob(
        "auto",
        "attention backend; auto: the best flash attention installed, the masked reference on a CPU",
        "auto|masked|fa2|fa3|fa4",
    )
    fused_ce_enabled: str = knob(
        "auto",
        "Triton kernels for the softcapped cross-entropy; auto: on a GPU with triton",
        "auto|1|0",
    )
    fused_mlp_enabled: str = knob(
        "auto",
        "Triton kernels for the MLP, used while no tap listens inside it; auto: on a GPU in bf16 with triton",
        "auto|1|0",
    )
    fused_rotary_enabled: str = knob(
        "auto",
        "Triton kernel for the norm, rotation and gain of queries and keys; auto: on a GPU in bf16 with triton",
        "auto|1|0",
    )
    fused_xsa_enabled: str = knob(
        "auto",
        "Triton kernel for XSA and the gate after it; auto: on a GPU in bf16 with triton",
        "auto|1|0",
    )
    fused_gdn_enabled: str = knob(
        "auto",
        "gated delta rule of flash-linear-attention; auto: on a GPU in bf16 if it is installed",
        "auto|1|0",
        "MIXERS=G",
    )
    compute_dtype: str = knob("auto", "activation dtype; auto: bf16 on a GPU, fp32 elsewhere", "auto|bf16|fp32")
    compile: str = knob("auto", "torch.compile; auto: on a GPU only", "auto|on|off")
    overwrite: bool = knob(False, "train in the folder of a run that has another configuration; its files are lost")
    checkpoint_seconds: float = knob(
        0.0,
        "seconds between checkpoints of the training, whose time counts as training; the same command goes on from the "
        "last one; 0: none",
        ">= 0",
    )
    milestones: tuple[int, ...] = knob(
        (),
        "steps after which, with the clock stopped, a folder step<N> gets all that STAGES=quantize,eval reads",
    )
    seed: int = knob(1337, "seed of the initial weights and of the adapters", ">= 0, <= 4294967295")

    data_path: str = knob("data/sp8192", "folder with the shards")
    tokenizer_path: str = knob("", "SentencePiece model; empty: the one *.model file in DATA_PATH")
    vocab_size: int = knob(8192, "vocabulary size; must equal the tokenizer's", ">= 4, <= 65536")
    loader: str = knob(
        "packed_docs",
        "packed_docs: attention stays inside a document; stream: contiguous rows; shuffled: rows in random order",
        "packed_docs|stream|shuffled",
    )
    train_batch_tokens: int = knob(786_432, "tokens per optimiser step, over all ranks", "> 0")
    batch_slices: int = knob(
        8,
        "micro-batches per optimiser step, over all ranks; a multiple of the number of ranks",
        "> 0",
    )
    train_seq_len: int = knob(2048, "longest attention span in training, tokens", "> 1")
    train_seq_schedule: tuple[UpTo, ...] = knob(
        (),
        "other spans early in training, each up to a fraction of the run, as 1024@0.1,2048@0.7 or 0.1:1024,0.7:2048; "
        "then TRAIN_SEQ_LEN",
    )
    seq_change_warmup_steps: int = knob(
        32,
        "steps of a linear LR ramp after a change of the span; 1: none",
        ">= 1",
        "TRAIN_SEQ_SCHEDULE",
    )

    num_layers: int = knob(11, "physical layers", "> 0")
    model_dim: int = knob(512, "width of the residual stream", "> 0")
    num_heads: int = knob(8, "query heads", "> 0")
    num_kv_heads: int = knob(4, "key/value heads (GQA)", "> 0")
    mixers: str = knob(
        "",
        "mixer of each layer, A (attention) or G (gated delta net), e.g. G*2 A*8 G; empty: attention everywhere",
    )
    mlp_mult: float = knob(4.0, "hidden width of the MLP / MODEL_DIM", "> 0")
    mlp_slope: float = knob(0.5, "negative slope of LeakyReLU(slope)^2", ">= 0")
    tied_embed_init_std: float = knob(0.005, "std of the embedding at init", "> 0")
    logit_softcap: float = knob(30.0, "c in c*tanh(logits/c)", "> 0, <= 75")
    rope_base: float = knob(10_000.0, "base of the rotary frequencies", "> 1")
    rope_dims: int = knob(16, "leading dims of a head that rotate", ">= 0")
    rope_dtype: str = knob(
        "fp32",
        "dtype of rotary frequencies, positions and tables; bf16, as in PR 1895, rounds positions above 256",
        "fp32|bf16",
    )
    qk_gain_init: float = knob(5.0, "initial gain of each query head, after QK norm", "> 0")
    ln_scale: bool = knob(True, "multiply a layer's normed inputs by 1/sqrt(layer + 1)")
    attn_extras: Words = knob(
        ("xsa",),
        "xsa: remove from each head's output its component along the token's own value; value_residual: mix in "
        "the values of the first execution; value_embed: add a value embedding of the token; sink: a learnt key "
        "with value 0 before every context",
        "xsa|value_residual|value_embed|sink",
    )
    xsa_last_n: int = knob(11, "how many of the last layers use XSA", ">= 0", "ATTN_EXTRAS=xsa")
    attn_gate: str = knob(
        "none",
        "gate on each head's output; sparse: from GATE_WINDOW dims, half open at init; dense_bias: from the whole "
        "normed input with a bias of 4, nearly open at init",
        "none|sparse|dense_bias",
    )
    embed_extras: Words = knob(
        (),
        "bigram, trigram: add a hashed embedding of the last 2 or 3 tokens; smear: add a gated copy of the "
        "previous token's embedding; smear_channel: blend it in per channel, after the norm; applied in this "
        "order",
        "bigram|trigram|smear|smear_channel",
    )
    gate_window: int = knob(12, "leading dims that gates read", "> 0", "ATTN_GATE=sparse or EMBED_EXTRAS=smear")
    sparse_attn_gate_scale: float = knob(1.0, "factor inside the gate's sigmoid", "", "ATTN_GATE=sparse")
    smear_bos_mask: bool = knob(True, "no smear into a document's first token", "", "EMBED_EXTRAS=smear|smear_channel")
    skip_gates_enabled: bool = knob(True, "sigmoid gates on the U-net skips")
    num_loops: int = knob(2, "extra passes over the looped layers", ">= 0")
    loop_start: int = knob(3, "first looped layer", ">= 0", "NUM_LOOPS>0")
    loop_end: int = knob(5, "last looped layer, inclusive", ">= 0", "NUM_LOOPS>0")
    enable_looping_at: float = knob(0.35, "fraction of the run at which looping starts", ">= 0, <= 1", "NUM_LOOPS>0")
    loop_mix: tuple[float, ...] = knob(
        (),
        "frozen mix of the looped layers' extra passes: for each layer beta, then an alpha for each looped layer; its "
        "output becomes beta times itself plus the alphas times the layers' first outputs; empty: none",
        "",
        "NUM_LOOPS>0",
    )
    parallel_start_layer: int = knob(8, "first layer that runs attention and MLP in parallel; 0: none does", ">= 0")
    parallel_lanes: int = knob(
        2,
        "2: two learnt lanes in the decoder, one for attention and one for the MLP; 1: attention and MLP read "
        "and extend one stream",
        ">= 1, <= 2",
    )
    parallel_final_lane: str = knob("mean", "how the two lanes end", "mean|mlp|attn")
    bigram_vocab_size: int = knob(2048, "rows of the bigram table", "> 1", "EMBED_EXTRAS=bigram")
    bigram_dim: int = knob(128, "width of the bigram table", "> 0", "EMBED_EXTRAS=bigram")
    trigram_vocab_size: int = knob(1024, "rows of the trigram table", "> 1", "EMBED_EXTRAS=trigram")
    trigram_dim: int = knob(128, "width of the trigram table", "> 0", "EMBED_EXTRAS=trigram")
    trigram_trained: bool = knob(
        True,
        "train the trigram table; off, as published: it keeps its initial values",
        "",
        "EMBED_EXTRAS=trigram",
    )
    hash_bos_mask: bool = knob(True, "hashes stop at a document's first token", "", "EMBED_EXTRAS=bigram|trigram")
    ve_layers: tuple[int, ...] = knob((9, 10), "layers with value embeddings", "", "ATTN_EXTRAS=value_embed")
    ve_dim: int = knob(128, "width of the value embedding's table", "> 0", "ATTN_EXTRAS=value_embed")
    rope_reference_len: int = knob(
        0,
        "longer contexts raise the rotary base (NTK scaling); 0: never; published: 1024",
        ">= 0",
    )

    gdn_head_dim: int = knob(64, "width of a delta net's heads", "> 0")
    gdn_qk_heads: int = knob(2, "query and key heads of a delta net", "> 0")
    gdn_v_heads: int = knob(4, "value heads of a delta net", "> 0")
    gdn_conv_trained: bool = knob(
        True, "train the taps of the convolution; off, as published: they keep their initial values", ""
    )
    gdn_bos_reset: bool = knob(
        True,
        "reset state and convolution at every document's first token; off, as published: only at rows and segments",
        "",
    )

    matrix_lr: float = knob(0.026, "learning rate of Muon", ">= 0")
    tied_embed_lr: float = knob(0.03, "learning rate of the embedding", ">= 0")
    embed_dtype: str = knob(
        "fp32",
        "dtype of the embedding, its gradient and its AdamW moments; bf16: as published",
        "fp32|bf16",
    )
    scalar_lr: float = knob(0.02, "learning rate of gains, gates and scales", ">= 0")
    muon_momentum: float = knob(0.97, "momentum after warm-up", ">= 0, <= 1")
    muon_momentum_warmup_start: float = knob(0.92, "momentum at step 0", ">= 0, <= 1")
    muon_momentum_warmup_steps: int = knob(1500, "steps of the linear momentum warm-up", ">= 0")
    muon_backend_steps: int = knob(5, "orthogonalisation iterations", ">= 1, <= 10")
    muon_coefficients: str = knob(
        "polar_express",
        "coefficients of the orthogonalisation; polar_express_safe: with a safety factor of 1.05",
        "polar_express|polar_express_safe|quintic",
    )
    muon_row_normalize: bool = knob(True, "normalise rows before the orthogonalisation")
    muon_wd: float = knob(0.095, "decoupled weight decay of Muon", ">= 0")
    embed_wd: float = knob(0.085, "decoupled weight decay of the embedding", ">= 0")
    adam_wd: float = knob(0.02, "decoupled weight decay of gains, gates and scales", ">= 0")
    beta1: float = knob(0.9, "AdamW beta1", ">= 0, <= 1")
    beta2: float = knob(0.95, "AdamW beta2", ">= 0, <= 1")
    adam_eps: float = knob(1e-8, "AdamW epsilon", "> 0")
    grad_clip_norm: float = knob(0.3, "limit on the global norm of the averaged gradient; 0: none", ">= 0")
    average: Words = knob(
        ("ema",),
        "weight average to evaluate; ema,swa: SWA over snapshots of the EMA; none: the last weights",
        "ema|swa",
    )
    ema_decay: float = knob(0.9965, "decay per step", ">= 0, <= 1", "AVERAGE=ema")
    swa_every: int = knob(50, "steps between snapshots", "> 0", "AVERAGE=swa")
    swa_start_scale: float = knob(0.2, "take snapshots while the LR multiplier is below this", "> 0", "AVERAGE=swa")

    iterations: int = knob(20_000, "maximum number of steps", "> 0")
    max_wallclock_seconds: float = knob(600.0, "training budget, seconds; 0: none, and schedules follow steps", ">= 0")
    gptq_reserve_seconds: float = knob(8.0, "seconds of the budget reserved for calibration", ">= 0")
    warmup_steps: int = knob(20, "untimed compile warm-up steps per graph, rolled back afterwards", ">= 0")
    warmdown_frac: float = knob(0.75, "last fraction of the run, with linear LR decay", ">= 0, <= 1")
    warmdown_iters: int = knob(
        0,
        "last steps, with linear LR decay, converted to time by the measured step time; 0: WARMDOWN_FRAC counts",
        ">= 0",
    )
    min_lr: float = knob(0.1, "floor of the LR multiplier", ">= 0, <= 1")
    qat: str = knob(
        "none",
        "quantisation during late training; ste: weights on the grid of MATRIX_QUANT, straight-through gradient; "
        "noise: Gaussian noise, a fraction of the rounding error",
        "none|ste|noise",
    )
    late_qat_threshold: float = knob(
        0.15,
        "start once the LR multiplier is below this; above 1: from the start",
        ">= 0",
        "QAT=ste",
    )
    qat_noise_start_frac: float = knob(0.95, "fraction of the run at which noise starts", ">= 0, <= 1", "QAT=noise")
    qat_noise_mult: float = knob(0.05, "std of the noise / rounding error of a uniform grid", ">= 0", "QAT=noise")
    qat_noise_every: int = knob(1, "steps from one noisy step to the next", "> 0", "QAT=noise")
    qat_noise_patterns: Words = knob(
        ("attn.k.weight", "attn.o.weight"),
        "substrings or globs of the names of the noisy weights",
        "",
        "QAT=noise",
    )
    train_log_every: int = knob(500, "steps between log lines", "> 0")
    val_loss_every: int = knob(0, "steps between validations; 0: none", ">= 0")

    matrix_quant: str = knob(
        "gptq",
        "scheme of the matrices; gptq_tcq: GPTQ on a trellis, for COMPRESSOR=rans; gptq_lite: rounding with a "
        "clip search; row_quantile: clip at CLIP_QUANTILE",
        "gptq|gptq_tcq|rowwise|gptq_lite|row_quantile",
    )
    embed_quant: str = knob(
        "gptq",
        "scheme of the embedding and of hash and value tables (every gptq scheme rounds those tables to "
        "nearest); gptq_freqsplit: more bits for frequent tokens",
        "gptq|gptq_freqsplit|gptq_tcq|rowwise|gptq_lite|row_quantile",
    )
    matrix_bits: int = knob(6, "bits of the matrices", ">= 2, <= 8")
    matrix_bits_overrides: Words = knob(
        (),
        "other bits for some matrices, as name:bits; name is a substring or glob, the first match counts",
    )
    embed_bits: int = knob(7, "bits of the embedding", ">= 2, <= 8")
    embed_topk: int = knob(4025, "number of frequent tokens", ">= 1", "EMBED_QUANT=gptq_freqsplit")
    embed_top_bits: int = knob(8, "bits of their rows", ">= 2, <= 8", "EMBED_QUANT=gptq_freqsplit")
    embed_tail_bits: int = knob(7, "bits of the other rows", ">= 2, <= 8", "EMBED_QUANT=gptq_freqsplit")
    embed_freq_tokens: int = knob(
        100_000_000,
        "training tokens, from the first, over which frequencies are counted; 0: all",
        ">= 0",
        "EMBED_QUANT=gptq_freqsplit",
    )
    rotate: str = knob(
        "none",
        "hadamard_vo: rotate each head's values before quantisation, and its output weights back",
        "none|hadamard_vo",
    )
    attn_clip_sigmas: float = knob(13.0, "clip of q, k, v, o rows, in standard deviations", "> 0")
    mlp_clip_sigmas: float = knob(11.5, "clip of up, down rows, in standard deviations", "> 0")
    embed_clip_sigmas: float = knob(14.0, "clip of embedding rows, in standard deviations", "> 0")
    clip_quantile: float = knob(
        0.9999984,
        "clip of a row: this quantile of its magnitudes",
        "> 0, <= 1",
        "MATRIX_QUANT or EMBED_QUANT=row_quantile",
    )
    clip_floor: float = knob(
        0.0,
        "smallest clip of a row; 1, as published, makes rows of small weights share a scale",
        ">= 0",
        "MATRIX_QUANT or EMBED_QUANT=gptq_lite|row_quantile",
    )
    clip_search_rows: bool = knob(
        True,
        "search the best quantile per row; off, as published: one per matrix",
        "",
        "MATRIX_QUANT or EMBED_QUANT=gptq_lite",
    )
    scale_step: float = knob(
        0.0,
        "store row scales as multiples of this in log2, e.g. 0.02; 0: as float16",
        ">= 0, <= 1",
    )
    gptq_calibration_batches: int = knob(16, "calibration batches, over all ranks", "> 0")
    artifact_bytes: int = knob(
        0,
        "size of model.bin to fill: one factor on all clips is searched, in up to five rounds; 0: clips as they are",
        ">= 0",
    )
    gptq_damp: float = knob(0.01, "damping / mean of the Hessian's diagonal", "> 0")
    fisher_scales: float = knob(
        0.0,
        "how far row scales follow what an error costs the loss, by gradients of the calibration, instead of the "
        "row's standard deviation; the clips then set the mean; 0, as published: not at all; 1: alone",
        ">= 0, <= 1",
    )
    tcq_states: int = knob(
        8, "trellis states: 4, 8, 16, 32 or 64", ">= 4, <= 64", "MATRIX_QUANT or EMBED_QUANT=gptq_tcq"
    )
    tcq_chunk_rows: int = knob(1024, "rows per trellis path", ">= 16, <= 2048", "MATRIX_QUANT or EMBED_QUANT=gptq_tcq")
    gptaq_batches: int = knob(
        0,
        "calibration batches, over all ranks, by which matrices that are rounded later make up for those before them: "
        "first embeddings, then q, k, v of all layers, o, up, down; they count as training; 0: each for itself",
        ">= 0",
        "MATRIX_QUANT=gptq|gptq_tcq",
    )
    tune_steps: int = knob(
        0,
        "steps of Adam after quantisation, towards the float model on training text: row scales, and what is stored as "
        "float16, make up for the rounding of the integers; they count as training; 0: none",
        ">= 0",
    )
    tune_lr: float = knob(0.003, "their learning rate, linear to 0", ">= 0", "TUNE_STEPS>0")
    gated_attn_quant_gate: bool = knob(False, "store attention gates as int8 with a scale per row; off: fp16")
    repair: str = knob("none", "lqer: low-rank correction of the tensors with the largest error", "none|lqer")
    lqer_rank: int = knob(4, "rank of the correction", ">= 1", "REPAIR=lqer")
    lqer_top_k: int = knob(3, "number of corrected tensors, by Frobenius norm of the error", ">= 1", "REPAIR=lqer")
    lqer_asym_group: int = knob(64, "entries per scale of the 4-bit factor", "> 0", "REPAIR=lqer")
    awq_lite_enabled: bool = knob(False, "GPTQ with more bits for the most salient column groups")
    awq_lite_bits: int = knob(8, "bits of those columns", ">= 3, <= 8", "AWQ_LITE_ENABLED=1")
    awq_lite_group_top_k: int = knob(1, "number of groups, over all tensors", ">= 1", "AWQ_LITE_ENABLED=1")
    awq_lite_group_size: int = knob(64, "columns per group", "> 0", "AWQ_LITE_ENABLED=1")
    compressor: str = knob(
        "brotli",
        "layout and entropy coder of the artifact; pergroup: lrzip per group of roles; lzma6: preset 6, as "
        "published; rans: the built-in adaptive coder for integer matrices",
        "brotli|lzma|pergroup|lzma6|rans",
    )

    eval: str = knob("doc_lora", "how the final score is computed", "plain|sliding|chunk_sgd|slot|doc_lora|phased_lora")
    val_batch_tokens: int = knob(524_288, "tokens per evaluation batch, split into BATCH_SLICES forwards", "> 0")
    eval_seq_len: int = knob(2048, "longest context; the validation stream is cut to a multiple of it", "> 1")
    eval_stride: int = knob(64, "tokens scored per window", "> 0", "EVAL=sliding|chunk_sgd|slot")
    eval_budget_seconds: float = knob(
        600.0,
        "seconds of the last stage; if they run out, the rest of the stream is scored unadapted; 0: no limit",
        ">= 0",
    )
    eval_include_tail: bool = knob(False, "also score the last partial window (not the canonical token count)")
    allow_noncausal: bool = knob(
        False,
        "allow a score fitted on the targets it scores; the result then says legal: false",
    )
    score_dtype: str = knob("fp32", "at least that wide are logits in scoring; bf16: as published", "fp32|bf16")
    canonical_mask: str = knob(
        "none",
        "take 20 nats from pairs of tokens that the tokenizer never writes; eval: in scoring and test-time training; "
        "always: in training too",
        "none|eval|always",
    )
    canonical_check: bool = knob(
        True,
        "refuse shards with such a pair; off: for streams that no tokenizer wrote, as the judge's",
        "",
        "CANONICAL_MASK=eval|always",
    )
    hints: Words = knob(
        (),
        "what a document's own past says of its next token, in the final score; copy: some probability goes to what "
        "followed the latest longest repeat; tilt: what mostly followed the last 15 tokens gains 2.625 nats",
        "copy|tilt",
    )
    copy_fit_tokens: int = knob(
        1_048_576, "training tokens, of the first shard, on which copying is fitted", "> 0", "HINTS=copy"
    )

    ttt_lora_rank: int = knob(96, "rank of the per-document LoRA", ">= 1")
    ttt_lora_alpha: float = knob(144.0, "LoRA scale * rank", "> 0")
    ttt_lora_lr: float = knob(1e-4, "learning rate of the adapters", ">= 0")
    ttt_chunk_size: tuple[UpTo, ...] = knob(
        (UpTo(math.inf, 48),),
        "tokens per chunk: scored, then learnt; 256:8,2000:24,48: 8 where the longest document of a batch has at most "
        "256 tokens, 24 up to 2000, else 48",
    )
    ttt_eval_seq_len: int = knob(2048, "longest context of a chunk, tokens", "> 1")
    ttt_batch_size: int = knob(64, "documents adapted in parallel", "> 0")
    ttt_grad_steps: int = knob(1, "updates per chunk", ">= 1")
    ttt_weight_decay: float = knob(0.5, "decoupled weight decay of the adapters", ">= 0")
    ttt_beta1: float = knob(0.0, "AdamW beta1", ">= 0, <= 1")
    ttt_beta2: float = knob(0.99, "AdamW beta2", ">= 0, <= 1")
    ttt_lora_sites: Words = knob(
        ("q", "k", "v", "attn", "mlp", "head"),
        "where adapters act; attn, mlp: across the sublayer; any of q, k, v: the joint projection of a delta net",
        "q|k|v|attn|mlp|head",
    )
    ttt_warm_start_a: bool = knob(
        False,
        "start a document's A from the previous document in its row, as published; the score then depends on "
        "TTT_BATCH_SIZE and the ranks",
    )
    ttt_context: str = knob(
        "recompute",
        "how a chunk sees its document; recompute: the whole window runs again, with gradient, as published; "
        "carry: only the chunk runs, over the keys and values of earlier chunks (with TTT_LORA_LR=0: plain "
        "scoring that computes each token once and reaches back up to TTT_EVAL_SEQ_LEN tokens)",
        "recompute|carry",
    )
    phased_ttt_prefix_docs: int = knob(2000, "scored documents after which the last global update happens", ">= 0")
    phased_ttt_num_phases: int = knob(3, "number of global updates", ">= 1")
    global_ttt_lr: float = knob(1e-3, "peak learning rate, cosine to 0", ">= 0")
    global_ttt_momentum: float = knob(0.9, "momentum", ">= 0, <= 1")
    global_ttt_epochs: int = knob(1, "passes over the scored documents", ">= 1")
    global_ttt_chunk_tokens: int = knob(32_768, "tokens per step", "> 0")
    global_ttt_grad_clip: float = knob(1.0, "limit on the global norm of the gradient; 0: none", ">= 0")
    ttt_chunk_tokens: int = knob(32_768, "targets per chunk: scored, then learnt", "> 0")
    ttt_epochs: int = knob(3, "passes over a chunk", ">= 0")
    ttt_batch_seqs: int = knob(0, "sequences per step, over all ranks; 0: the whole chunk", ">= 0")
    ttt_lr: float = knob(0.002, "peak learning rate, cosine to 0", ">= 0")
    ttt_momentum: float = knob(0.9, "momentum, kept from chunk to chunk", ">= 0, <= 1")
    ttt_grad_clip: float = knob(1.0, "limit on the norm of a chunk's gradient; 0: none", ">= 0")
    ttt_trainable: Words = knob(
        ("all",),
        "weights to train: all, scalar (gains, gates, scales), or globs or substrings of names, e.g. mlp",
    )
    gdn_ttt_lr_mult: float = knob(1.0, "factor on TTT_LR for A_log, dt_bias, ba and taps of delta nets", ">= 0")
    slot_lr: float = knob(0.003, "learning rate", ">= 0")
    slot_steps: int = knob(5, "AdamW steps per batch of windows", ">= 1")
    slot_causal: bool = knob(
        True,
        "fit on targets before the batch's first scored one; off, as published: on those it scores (not legal)",
    )

    def problems(self) -> list[str]:
        """Everything wrong with these values, each as a sentence with the fix; empty when the run can start."""
        found = [p for f in dataclasses.fields(self) for p in bound_problems(f, getattr(self, f.name))]
        if found:  # the rules below may divide by what is out of bounds
            return found
        return [message.format(c=self) for predicate, message in ILLEGAL if predicate(self)]


KNOBS = Config.__slots__  # the names of the knobs, in their order
# Where and how a run happens, not what it is: these knobs are never written to record.env.
LOCAL_KNOBS = (
    "run_id artifact_dir stages model_path scores overwrite checkpoint_seconds milestones device attention "
    "fused_ce_enabled fused_mlp_enabled fused_rotary_enabled fused_xsa_enabled fused_gdn_enabled compute_dtype compile "
    "data_path tokenizer_path canonical_check"
).split()

GROUPS = {  # first knob -> the title that --help prints above it
    "run_id": "run",
    "data_path": "data",
    "num_layers": "model",
    "gdn_head_dim": "gated delta nets, when MIXERS has G",
    "matrix_lr": "optimisers",
    "iterations": "training schedule",
    "matrix_quant": "quantisation and artifact",
    "eval": "evaluation",
    "ttt_lora_rank": "test-time training of adapters (EVAL=doc_lora or phased_lora)",
    "phased_ttt_prefix_docs": "global phases of test-time training (EVAL=phased_lora)",
    "ttt_chunk_tokens": "test-time training by SGD (EVAL=chunk_sgd or slot)",
    "slot_lr": "fitted shift of the hidden state (EVAL=slot)",
}

ILLEGAL: tuple[tuple[Callable[[Config], bool], str], ...] = (
    (
        lambda c: c.model_dim % c.num_heads != 0,
        "MODEL_DIM={c.model_dim} is not a multiple of NUM_HEADS={c.num_heads}",
    ),
    (
        lambda c: c.num_heads % c.num_kv_heads != 0,
        "NUM_HEADS={c.num_heads} is not a multiple of NUM_KV_HEADS={c.num_kv_heads}",
    ),
    (
        lambda c: c.rope_dims % 2 == 1 or c.rope_dims > c.model_dim // c.num_heads,
        "ROPE_DIMS={c.rope_dims} must be even and at most MODEL_DIM/NUM_HEADS",
    ),
    (
        lambda c: c.num_loops > 0 and not c.loop_start <= c.loop_end < c.num_layers,
        "LOOP_START={c.loop_start}..LOOP_END={c.loop_end} must be layers below NUM_LAYERS={c.num_layers}",
    ),
    (
        lambda c: len(mixer_letters(c)) != c.num_layers,
        "MIXERS={c.mixers!r} must name a mixer, A or G, for each of NUM_LAYERS={c.num_layers} layers, e.g. G*2 A*8 G",
    ),
    (
        lambda c: c.gdn_v_heads % c.gdn_qk_heads != 0,
        "GDN_V_HEADS={c.gdn_v_heads} is not a multiple of GDN_QK_HEADS={c.gdn_qk_heads}",
    ),
    (
        lambda c: c.gate_window > c.model_dim,
        "GATE_WINDOW={c.gate_window} must be at most MODEL_DIM={c.model_dim}",
    ),
    (
        lambda c: (
            "value_embed" in c.attn_extras
            and not {*c.ve_layers} <= {i for i, letter in enumerate(mixer_letters(c)) if letter == "A"}
        ),
        "VE_LAYERS={c.ve_layers} must be attention layers below NUM_LAYERS={c.num_layers}",
    ),
    (
        lambda c: c.rope_reference_len > 0 and c.rope_dims == 2,
        "ROPE_REFERENCE_LEN={c.rope_reference_len} needs ROPE_DIMS above 2: a single frequency cannot be stretched",
    ),
    (
        lambda c: c.train_batch_tokens % c.batch_slices != 0,
        "TRAIN_BATCH_TOKENS={c.train_batch_tokens} is not a multiple of BATCH_SLICES={c.batch_slices}",
    ),
    (
        lambda c: any(c.train_batch_tokens // c.batch_slices % span for span, _ in graphs_of(c)),
        "TRAIN_BATCH_TOKENS/BATCH_SLICES must be a multiple of TRAIN_SEQ_LEN={c.train_seq_len} and of every span of "
        "TRAIN_SEQ_SCHEDULE",
    ),
    (
        lambda c: c.train_seq_schedule and c.loader != "packed_docs",
        "TRAIN_SEQ_SCHEDULE cuts documents; say LOADER=packed_docs",
    ),
    (
        lambda c: (
            c.loop_mix
            and (
                len(c.loop_mix) != (c.loop_end - c.loop_start + 1) * (c.loop_end - c.loop_start + 2)
                or 0 < c.parallel_start_layer <= c.loop_end
            )
        ),
        "LOOP_MIX must list n + 1 numbers for each of the n layers LOOP_START..LOOP_END, all before "
        "PARALLEL_START_LAYER={c.parallel_start_layer}",
    ),
    (
        lambda c: c.val_batch_tokens // c.batch_slices < c.eval_seq_len,
        "VAL_BATCH_TOKENS/BATCH_SLICES must be at least EVAL_SEQ_LEN={c.eval_seq_len}; raise VAL_BATCH_TOKENS",
    ),
    (
        lambda c: c.eval_stride > c.eval_seq_len,
        "EVAL_STRIDE={c.eval_stride} must be at most EVAL_SEQ_LEN={c.eval_seq_len}",
    ),
    (
        lambda c: not c.ttt_chunk_size or max(size for _, size in c.ttt_chunk_size) > c.ttt_eval_seq_len,
        "TTT_CHUNK_SIZE must be at most TTT_EVAL_SEQ_LEN={c.ttt_eval_seq_len}, and not empty",
    ),
    (
        lambda c: 0 < c.max_wallclock_seconds <= c.gptq_reserve_seconds,
        "GPTQ_RESERVE_SECONDS={c.gptq_reserve_seconds} uses up MAX_WALLCLOCK_SECONDS={c.max_wallclock_seconds}",
    ),
    (
        lambda c: c.awq_lite_enabled and "gptq" not in (c.matrix_quant, c.embed_quant),
        "AWQ_LITE_ENABLED=1 refines GPTQ; set MATRIX_QUANT=gptq or EMBED_QUANT=gptq",
    ),
    (
        lambda c: c.awq_lite_enabled and c.awq_lite_bits <= min(c.matrix_bits, c.embed_bits),
        "AWQ_LITE_BITS={c.awq_lite_bits} must be above MATRIX_BITS={c.matrix_bits} or EMBED_BITS={c.embed_bits}",
    ),
    (
        lambda c: 0 < c.scale_step < 0.005,
        "SCALE_STEP={c.scale_step} is too fine for 16 bits; say 0 (float16) or at least 0.005",
    ),
    (
        lambda c: not c.stages or c.stages != ("train", "quantize", "eval")[3 - len(c.stages) :],
        "STAGES must be train,quantize,eval or quantize,eval or eval",
    ),
    (
        lambda c: c.eval == "slot" and not c.slot_causal and not c.allow_noncausal,
        "SLOT_CAUSAL=0 fits on the targets it scores, which the contest forbids; to study it, say ALLOW_NONCAUSAL=1",
    ),
    (
        lambda c: c.eval in ("chunk_sgd", "slot") and c.ttt_epochs > 0 and c.ttt_chunk_tokens < c.eval_seq_len,
        "TTT_CHUNK_TOKENS={c.ttt_chunk_tokens} must be at least EVAL_SEQ_LEN={c.eval_seq_len}, one training sequence",
    ),
    (
        lambda c: c.eval == "phased_lora" and c.global_ttt_chunk_tokens < c.batch_slices,
        "GLOBAL_TTT_CHUNK_TOKENS={c.global_ttt_chunk_tokens} is fewer than BATCH_SLICES={c.batch_slices}",
    ),
    (
        lambda c: any(not re.fullmatch(r"[^:]+:\s*[2-8]", item) for item in c.matrix_bits_overrides),
        "MATRIX_BITS_OVERRIDES={c.matrix_bits_overrides} must be name:bits with 2 to 8 bits, e.g. attn.o.weight:7",
    ),
    (
        lambda c: c.rotate == "hadamard_vo" and (c.model_dim // c.num_heads).bit_count() != 1,
        "ROTATE=hadamard_vo needs MODEL_DIM/NUM_HEADS to be a power of two; say ROTATE=none",
    ),
    (
        lambda c: c.artifact_bytes > 0 and c.fisher_scales == 0,
        "ARTIFACT_BYTES={c.artifact_bytes} may need finer grids than reach a row's largest weight; set FISHER_SCALES, "
        "with which they always do",
    ),
    (
        lambda c: c.tune_steps > 0 and REPAIRS[c.repair] is not None,
        "TUNE_STEPS={c.tune_steps} changes scales of rows, which REPAIR={c.repair} does not have; say REPAIR=none",
    ),
    (
        lambda c: c.rotate == "hadamard_vo" and c.fisher_scales > 0,
        "FISHER_SCALES={c.fisher_scales} measures the rows of v as they are before ROTATE=hadamard_vo; say ROTATE=none",
    ),
    (
        lambda c: c.rotate == "hadamard_vo" and "value_embed" in c.attn_extras,
        "ROTATE=hadamard_vo cannot rotate what ATTN_EXTRAS=value_embed adds to the values; say ROTATE=none",
    ),
    (
        lambda c: (
            c.ttt_context == "carry"
            and not (len(c.ttt_chunk_size) == 1 and 8 <= c.ttt_chunk_size[0].value <= c.ttt_eval_seq_len // 2)
        ),
        "TTT_CONTEXT=carry scores documents of all lengths side by side: TTT_CHUNK_SIZE must be one number, between 8 "
        "(embeddings look back into the previous chunk) and half of TTT_EVAL_SEQ_LEN={c.ttt_eval_seq_len}",
    ),
    (
        lambda c: c.ttt_context == "carry" and c.ttt_warm_start_a,
        "TTT_CONTEXT=carry starts each document from an A of its own, as soon as a row is free; set TTT_WARM_START_A=0",
    ),
    (
        lambda c: c.ttt_context == "carry" and "G" in mixer_letters(c),
        "TTT_CONTEXT=carry keeps keys and values, not the state of a gated delta net; say TTT_CONTEXT=recompute, or "
        "MIXERS without G",
    ),
    (
        lambda c: c.ttt_context == "carry" and ("sink" in c.attn_extras or c.rope_dtype != "fp32"),
        "TTT_CONTEXT=carry goes on to positions beyond the window, where ATTN_EXTRAS=sink and ROPE_DTYPE=bf16, which "
        "depend on more than distances, were never trained; say TTT_CONTEXT=recompute",
    ),
    (
        lambda c: c.tcq_states not in TCQ_CODES,
        "TCQ_STATES={c.tcq_states} must be 4, 8, 16, 32 or 64",
    ),
    (
        lambda c: (
            ("gptq_tcq", 8) in ((c.matrix_quant, c.matrix_bits), (c.embed_quant, c.embed_bits))
            or (c.matrix_quant == "gptq_tcq" and any(item.endswith("8") for item in c.matrix_bits_overrides))
        ),
        "gptq_tcq stores points of a grid twice as fine in 8 bits; with it, MATRIX_BITS and EMBED_BITS are at most 7",
    ),
    (
        lambda c: "gptq_tcq" in (c.matrix_quant, c.embed_quant) and c.compressor != "rans",
        "COMPRESSOR={c.compressor} spends one more bit per weight on gptq_tcq, as it does not know the trellis; say "
        "COMPRESSOR=rans",
    ),
    (
        lambda c: any(not 0 < step <= c.iterations for step in c.milestones),
        "MILESTONES={c.milestones} must be steps of the training, 1 to ITERATIONS={c.iterations}",
    ),
    (lambda c: not c.ttt_lora_sites, "TTT_LORA_SITES is empty; to adapt nothing say TTT_LORA_LR=0"),
    (
        lambda c: not c.ttt_trainable,
        "TTT_TRAINABLE is empty; to train nothing at test time, say TTT_EPOCHS=0",
    ),
)

RENAMED = {  # names that became values of an axis, or that the published scripts read without effect
    "BASE": "PRESET (BASE is the first line of a preset)",
    "SPARSE_ATTN_GATE_ENABLED": "ATTN_GATE=sparse",
    "GATED_ATTN_ENABLED": "ATTN_GATE=sparse or dense_bias (no published system switches this gate on)",
    "ATTN_OUT_GATE_ENABLED": "ATTN_GATE=sparse or dense_bias (no published system switches this gate on)",
    "SMEAR_GATE_ENABLED": "EMBED_EXTRAS=smear",
    "TTT_ENABLED": "EVAL=doc_lora or EVAL=chunk_sgd (or EVAL=plain for none)",
    "SLIDING_WINDOW_ENABLED": "EVAL=sliding",
    "CASEOPS_ENABLED": "nothing: a byte sidecar in DATA_PATH is used when it is there",
    "TTT_EVAL_ONLY": "STAGES=eval",
    "EMA_ENABLED": "AVERAGE=ema",
    "SWA_ENABLED": "AVERAGE=ema,swa (the published snapshots were never used)",
    "QAT_ENABLED": "QAT=ste with LATE_QAT_THRESHOLD=2",
    "QAT_NOISE_ENABLED": "QAT=noise",
    "LZMA_PRESET": "COMPRESSOR=lzma6 (or COMPRESSOR=lzma: preset 9, extreme)",
    "VAL_BATCH_SIZE": "VAL_BATCH_TOKENS",
    "LQER_ENABLED": "REPAIR=lqer (or REPAIR=none)",
    "LQER_ASYM_ENABLED": "nothing (LQER factors are always asymmetric)",
    "LQER_SELECT": "REPAIR=lqer (the tensors of largest error are corrected)",
    "MATRIX_CLIP_SIGMAS": "ATTN_CLIP_SIGMAS and MLP_CLIP_SIGMAS",
    "SLOT_ENABLED": "EVAL=slot (as published: with SLOT_CAUSAL=0 and ALLOW_NONCAUSAL=1)",
    "TTT_FREEZE_BLOCKS": "TTT_TRAINABLE=<what is trained> (the published knob froze scales only, never a matrix)",
    "TTT_GDN_INCLUDE": "TTT_TRAINABLE=<what is trained>",
    "SMEAR_GATE_BOS_FIX": "SMEAR_BOS_MASK=1",
    "TTT_MASK": "TTT_LORA_SITES (default q,k,v,attn,mlp,head; no_qv: k,attn,mlp,head)",
    "TTT_Q_LORA": "TTT_LORA_SITES (default q,k,v,attn,mlp,head; without q: 0)",
    "TTT_V_LORA": "TTT_LORA_SITES (default q,k,v,attn,mlp,head; without v: 0)",
    "TTT_LOCAL_LR_MULT": "TTT_LORA_LR (the product of the two)",
    "TTT_SHORT_SCORE_FIRST_STEPS": "TTT_CHUNK_SIZE=256:8,2000:24,48",
    "TTT_K_LORA": "TTT_LORA_SITES (default q,k,v,attn,mlp,head; without k: 0)",
    "TTT_O_LORA": "TTT_LORA_SITES (default q,k,v,attn,mlp,head; without attn: 0)",
    "TTT_MLP_LORA": "TTT_LORA_SITES (default q,k,v,attn,mlp,head; without mlp: 0)",
    "NGRAM_TILT_ENABLED": "HINTS=tilt",
    "ASYM_LOGIT_RESCALE": "SCORE_DTYPE=fp32 (no published loss trained the two scalars: they stayed what they were)",
    "FULL_ATTENTION_START": "MIXERS (published: G*2 A*8 G)",
    "FULL_ATTENTION_END": "MIXERS (published: G*2 A*8 G)",
    "PARALLEL_RESIDUAL_START": "PARALLEL_START_LAYER and PARALLEL_LANES=1",
    "VALUE_RESIDUAL": "ATTN_EXTRAS=xsa,value_residual",
    "VE_ENABLED": "ATTN_EXTRAS=xsa,value_embed",
    "GATED_ATTENTION": "ATTN_GATE=dense_bias",
    "HADAMARD_VO_ROTATE": "ROTATE=hadamard_vo",
}


def mixer_letters(cfg: Config) -> str:
    """The mixer of each layer as a letter: MIXERS written out, G*2 A as GGA; empty when it is not of that form."""
    if not cfg.mixers:  # attention everywhere
        return "A" * cfg.num_layers
    if not re.fullmatch(r"(\s*[AG](\*\d{1,3})?)+\s*", cfg.mixers):
        return ""
    return "".join(letter * int(count or 1) for letter, count in re.findall(r"([AG])(?:\*(\d+))?", cfg.mixers))


COMPARE = {">": gt, ">=": ge, "<=": le}


def bound_problems(field: dataclasses.Field, value: Any) -> list[str]:
    """What is wrong with one value by itself: not finite, repeated, or not what its knob allows."""
    allowed, text = field.metadata["allowed"], f"{field.name.upper()}={format_knob(value)}"
    # a knob of several values is checked value by value
    items = value if isinstance(value, tuple) else (value,)
    if any(isinstance(item, float) and not math.isfinite(item) for item in items):
        return [f"{text} must be a finite number"]
    if len(set(items)) < len(items) and "float" not in field.type:
        return [f"{text} lists a value twice"]
    if "|" in allowed:
        good = set(items) <= set(allowed.split("|"))
    else:
        # bounds such as ">= 0, <= 1"
        limits = re.findall(r"([<>]=?) ([\d.]+)", allowed)
        good = all(COMPARE[sign](value, float(limit)) for sign, limit in limits)
    return [] if good else [f"{text} must be {allowed}"]


LISTS = {  # type of a knob of several values -> what reads one of them
    "Words": str,
    "tuple[int, ...]": int,
    "tuple[float, ...]": float,
    "tuple[UpTo, ...]": UpTo.parse,
}


def parse_knob(field: dataclasses.Field, text: str) -> Any:
    """Value of a knob from its text; raises ValueError with the reason."""
    kind = field.type
    if kind == "bool":
        if text not in ("0", "1"):
            raise ValueError("must be 0 or 1")
        return text == "1"
    if kind in LISTS:
        parts = [part.strip() for part in text.split(",") if part.strip() not in ("", "none")]
        return tuple(map(LISTS[kind], parts))
    return {"int": int, "float": float}.get(kind, str)(text)


def format_knob(value: Any) -> str:
    """The text that parse_knob reads back as value."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(int(value) if isinstance(value, bool) else value)


def parse_preset(path: Path) -> dict[str, str]:
    """KEY -> VALUE of a record.env: lines KEY=VALUE, each with an optional comment after a space."""
    values = {}
    try:
        # some editors begin a file with a byte-order mark
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        text = re.split(r"\s#|^#", line, maxsplit=1)[0].strip()
        if not text:
            continue
        key, sign, value = text.partition("=")
        if not sign or key != key.strip().upper():
            raise UserError(f"{path}:{number}: expected KEY=VALUE, got {line!r}")
        if key in values:
            raise UserError(f"{path}:{number}: {key} is set twice")
        if key == "BASE" and values:
            raise UserError(f"{path}:{number}: BASE={value.strip()} must be the first line")
        values[key] = value.strip()
    return values


def preset_layers(folder: str) -> dict[str, dict[str, str]]:
    """Folder -> its own KEY -> VALUE: the preset's BASE, if its record.env names one, then the preset.

    BASE names a folder from the repository root: the nearest folder above the preset, or else the working directory,
    under which it exists.
    """
    path = Path(folder) / "record.env"
    if not path.is_file():
        known = sorted(str(p.parent) for p in Path("records").glob("**/record.env") if p.parent.name != "run")
        raise UserError(
            f"PRESET={folder}: no record.env there; known presets: {', '.join(known) or 'none in records/'}"
        )
    # one level of BASE: a chain would hide where a value comes from
    own = parse_preset(path)
    base = own.pop("BASE", None)
    if base is None:
        return {folder: own}
    places = (root / base / "record.env" for root in (*path.resolve().parents, Path()))
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(f"{path}: BASE={base}: no record.env there; name a folder from the repository root")
    inherited = parse_preset(found)
    if "BASE" in inherited:
        raise UserError(f"{path}: BASE={base} has a BASE itself; only one level is allowed, so list what differs here")
    return {base: inherited, folder: own}


def read_preset(folder: str) -> dict[str, str]:
    """KEY -> VALUE of a preset, over the values of its BASE."""
    return {key: value for layer in preset_layers(folder).values() for key, value in layer.items()}


def name_problems(names: Iterable[str], knobs: Mapping[str, dataclasses.Field], strict: bool) -> list[str]:
    """Unknown, misspelt or renamed knob names; strict: every unknown name is wrong, not only a near miss."""
    found = []
    for name in names:
        # PRESET inside a preset would be ignored
        if name in knobs or (name == "PRESET" and not strict):
            continue
        # an environment holds many other names, so only a near miss counts there
        close = difflib.get_close_matches(name, knobs, n=1, cutoff=0.6 if strict else 0.9)
        if name in RENAMED:
            found.append(f"{name} is not a knob here; say {RENAMED[name]}")
        elif close:
            found.append(f"{name} is not a knob; did you mean {close[0]}?")
        elif strict:
            found.append(f"{name} is not a knob; `python train_gpt.py --help` lists them")
    return found


def resolve(environ: Mapping[str, str]) -> tuple[Config, dict[str, str]]:
    """Config from default < base < preset < environment, and where each non-default value came from.

    Raises UserError with every problem found, one a line.
    """
    knobs = {f.name.upper(): f for f in dataclasses.fields(Config)}
    layers = preset_layers(environ["PRESET"]) if environ.get("PRESET") else {}
    problems = [problem for layer in layers.values() for problem in name_problems(layer, knobs, strict=True)]
    problems += name_problems(environ, knobs, strict=False)
    values, origin = {}, {}
    # later layers win, and origin remembers which one it was
    for source, layer in (*layers.items(), ("environment", environ)):
        for name in sorted(knobs.keys() & layer.keys()):
            try:
                values[name.lower()] = parse_knob(knobs[name], layer[name])
                origin[name] = source
            except ValueError as error:
                problems.append(f"{name}={layer[name]!r} ({source}): {error}")
    cfg = Config(**values)
    problems += cfg.problems()
    if problems:
        raise UserError("\n".join(problems))
    return cfg, {name: source for name, source in origin.items() if values[name.lower()] != knobs[name].default}


def load_config(environ: Mapping[str, str]) -> Config:
    """The validated Config of an environment mapping; raises UserError."""
    return resolve(environ)[0]


def record_env(cfg: Config) -> str:
    """The non-default knobs that make a run what it is, as the text of a record.env."""
    return "".join(f"{name.upper()}={format_knob(getattr(cfg, name))}\n" for name in differing(cfg, Config()))


def differing(cfg: Config, other: Config) -> list[str]:
    """The knobs that make a run what it is and that have other values there, in the order of Config."""
    return [name for name in KNOBS if name not in LOCAL_KNOBS and getattr(cfg, name) != getattr(other, name)]


def fields_until(first: str, last: str) -> Words:
    """The names of the knobs from one to the one before another, in the order of Config."""
    return KNOBS[KNOBS.index(first) : KNOBS.index(last)]


def model_identity(cfg: Config) -> str:
    """A hash of the knobs that say what the weights compute; model.bin carries it."""
    names = ["vocab_size", *fields_until("num_layers", "matrix_lr")]
    return short_hash(str([(name, getattr(cfg, name)) for name in names]).encode())


def short_hash(data: bytes) -> str:
    """12 hexadecimal digits of a SHA-256."""
    return hashlib.sha256(data).hexdigest()[:12]


def check_trained(cfg: Config, folder: Path) -> None:
    """UserError if a run would go on from weights of other training knobs, or train over a run that has other knobs."""
    if not (folder / "record.env").is_file():
        return
    before = load_config(parse_preset(folder / "record.env"))
    trains = "train" in cfg.stages
    changed = other_knobs(cfg, before, KNOBS if trains else trained_by(cfg, before))
    if not changed or (trains and cfg.overwrite):
        return
    fix = "choose another RUN_ID or ARTIFACT_DIR, or say OVERWRITE=1" if trains else "leave that as it was"
    raise UserError(f"{folder} holds a run with other knobs: {changed}; {fix}")


def trained_by(*configs: Config) -> Words:
    """The knobs that set what model.pt and hessians.pt hold."""
    # a mask in scoring alone may come later
    mask = ("canonical_mask",) * any(True in MASKED_WHEN[cfg.canonical_mask] for cfg in configs)
    return (*fields_until("seed", "matrix_quant"), "gptq_calibration_batches", "embed_freq_tokens", *mask)


def other_knobs(cfg: Config, before: Config, names: Words) -> str:
    """The knobs among these names that differ from those of an earlier run, with both values."""
    return ", ".join(
        f"{name.upper()}={format_knob(getattr(cfg, name))} (there {format_knob(getattr(before, name))})"
        for name in differing(cfg, before)
        if name in names
    )


def help_text() -> str:
    """The knobs by group, for --help."""
    lines = [__doc__.split("\nSections:")[0].strip()]
    for f in dataclasses.fields(Config):
        allowed, when = f.metadata["allowed"], f.metadata["when"]
        notes = "; ".join(filter(None, (allowed, when and f"when {when}")))
        lines += [f"\n{GROUPS[f.name]}"] if f.name in GROUPS else []
        lines.append(f"  {f.name.upper()}={format_knob(f.default)}")
        lines.append(f"      {f.metadata['doc']}{notes and f' [{notes}]'}")
    return "\n".join(lines)


# +--------------------------------------------------------------------------------------------------------------------+
# | 02 RUNTIME                                                                                                         |
# +--------------------------------------------------------------------------------------------------------------------+

if __name__ == "__main__" and {"--help", "-h"} & {*sys.argv[1:]}:
    # CONFIG needs the standard library alone, so the answer does not wait until torch is loaded
    print(help_text())
    sys.exit()

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401 (now: later its defaults would keep the process group and its threads alive)
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import activate_flash_attention_impl
from torch.nn.utils.rnn import pad_sequence

try:  # only the codec of that name needs it, and says so
    import brotli
except ImportError:
    brotli = None
try:  # CUDA builds of torch on Linux bring it; without it the plain twins run
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = None

try:  # flash-linear-attention; without it the gated delta rule is the plain twin on a GPU too
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
except ImportError:
    chunk_gated_delta_rule = None

try:  # torch >= 2.13 names
    from torch.distributed import all_gather_single as all_gather
    from torch.distributed import reduce_scatter_single as reduce_scatter
except ImportError:
    from torch.distributed import all_gather_into_tensor as all_gather
    from torch.distributed import reduce_scatter_tensor as reduce_scatter

BOS_ID = 1
CASE_OPERATOR = "\ue001"  # a piece of every CaseOps tokenizer
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # values of EMBED_DTYPE, COMPUTE_DTYPE, SCORE_DTYPE
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
RMS_EPS = 2.0**-23  # float32 machine epsilon: what torch uses for an unset eps, made explicit


class Log:
    """Prints to stdout and appends to a file. Ranks other than 0 are quiet."""

    def __init__(self, path: Path | None, quiet: bool) -> None:
        self.path, self.quiet = path, quiet
        self.last = 0.0  # when progress last wrote a line
        self.warnings = []  # for result.json

    def __call__(self, message: str) -> None:
        """Write one message, which may have several lines. One that begins with WARNING also goes to result.json."""
        if message.startswith("WARNING"):
            self.warnings.append(message)
        if self.quiet:
            return
        print(message, flush=True)
        if self.path is not None:
            try:
                # Opened for each message, so the file is complete whatever ends the process.
                with self.path.open("a", encoding="utf-8", errors="backslashreplace") as handle:
                    handle.write(message + "\n")
            except OSError as error:
                # a run does not end for want of its log; Run.save finds another place for the weights
                self.path = None
                self(f"WARNING: the log goes on without its file: {error}")

    def progress(self, what: str, done: int, total: int, started: float) -> None:
        """Write how much is done and the estimated seconds left, at most one line every ten seconds."""
        now = time.perf_counter()
        if now - max(self.last, started) < 10 or done == 0:
            return
        self.last = now
        left = (now - started) / done * (total - done)
        self(f"{what}: {done}/{total} ({100 * done / total:.0f} %), {now - started:.0f} s, {left:.0f} s left")


RANK_MINUTES = 20  # how long ranks wait for one another; compressing an artifact takes minutes
LOST_RANK = "peer|timed out|timeout|connection"  # in what a collective says when another rank is gone


def first_line(error: BaseException) -> str:
    """The first line of a message, or the kind of an error that has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def launch_variables(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK of a launcher; 0, 1, 0 without one. UserError unless they fit together."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    said = {name: environ[name] for name in alone if name in environ}
    texts = (alone | said).values()
    # a world without a rank would wait for ever
    if all(map(str.isdecimal, texts)) and ("RANK" in said) == ("WORLD_SIZE" in said):
        rank, world, local_rank = map(int, texts)
        if rank < world:
            return rank, world, local_rank
    words = " ".join(f"{name}={text}" for name, text in said.items())
    raise UserError(f"{words}: not what a launcher sets; use torchrun, or unset {', '.join(alone)}")


@contextlib.contextmanager
def locked(folder: Path, other: str = "another RUN_ID or ARTIFACT_DIR") -> Iterator[None]:
    """Hold a folder for this process; UserError that names the process which holds it, and what else to choose."""
    path = folder / "lock"
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise UserError(f"{folder} is in use by {handle.read().strip()}; wait, or choose {other}") from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {platform.node()} since {time.ctime()}")
        handle.flush()
        try:
            yield
        finally:
            # a folder that takes no files may not give them up either, and what ended the run has to be told
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Rank, world size, device, log, activation dtype, and whether to compile. A single process has world = 1."""

    rank: int
    world: int
    device: torch.device
    log: Log
    dtype: torch.dtype = torch.float32
    compile: bool = False

    @classmethod
    def start(cls, cfg: Config, environ: Mapping[str, str], log_path: Path | None = None) -> Runtime:
        """Choose the device and dtype, and join the process group described by torchrun's variables in `environ`.

        Raises UserError for a world size that does not divide BATCH_SLICES and for a missing GPU.
        """
        rank, world, local_rank = launch_variables(environ)
        if cfg.batch_slices % world != 0:
            raise UserError(
                f"BATCH_SLICES={cfg.batch_slices} is not a multiple of the {world} ranks; make it one, or launch fewer"
            )
        calibrates = any(SCHEMES[name].hessian for name in (cfg.matrix_quant, cfg.embed_quant))
        if "train" in cfg.stages and calibrates and cfg.gptq_calibration_batches < world:
            raise UserError(
                f"GPTQ_CALIBRATION_BATCHES={cfg.gptq_calibration_batches} gives some of {world} ranks none; say "
                f"at least {world}"
            )
        if cfg.device == "cuda" and not torch.cuda.is_available():
            raise UserError("DEVICE=cuda, but torch sees no GPU; use DEVICE=cpu or install a CUDA build of torch")
        use_cuda = cfg.device != "cpu" and torch.cuda.is_available()
        if use_cuda and local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={local_rank}, but torch sees {torch.cuda.device_count()} GPUs; launch as many ranks as "
                "there are GPUs (--nproc_per_node), or look at CUDA_VISIBLE_DEVICES"
            )
        device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
        if use_cuda:
            torch.cuda.set_device(device)
            # Two routes, with and without gradients, for three models: more graphs than the default limit of 8.
            torch._dynamo.config.recompile_limit = 64
            # else sums over tokens join kernels that then spill registers: 147 instead of 143 ms a step on an H200
            torch._inductor.config.triton.mix_order_reduction = False
            # else windows shorter than GATE_WINDOW would need graphs of their own, which nobody has compiled
            torch._inductor.config.shape_padding = False
            torch.set_float32_matmul_precision("high")
        if world > 1:
            # CPU tensors go over gloo and never wait for the GPU.
            backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
            try:
                dist.init_process_group(backend, timeout=datetime.timedelta(minutes=RANK_MINUTES))
            except (ValueError, RuntimeError) as error:
                raise UserError(f"the {world} ranks do not meet: {first_line(error)}; launch with torchrun") from None
        dtype = DTYPES.get(cfg.compute_dtype, torch.bfloat16 if use_cuda else torch.float32)
        compiled = {"auto": use_cuda, "on": True, "off": False}[cfg.compile]
        return cls(rank, world, device, Log(log_path, rank != 0), dtype, compiled)

    def sum_(self, tensor: Tensor) -> Tensor:
        """All-reduce (sum) in place and return the tensor."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Fill the tensor with rank 0's and return it."""
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank."""
        # An all-reduce ends only when every rank has joined it.
        self.sum_(torch.zeros(1))

    def broadcast_from_rank0(self, value: float) -> float:
        """Broadcast a float from rank 0 over gloo, without synchronising the GPU."""
        return self.broadcast_(torch.tensor([value], dtype=torch.float64)).item()

    def gather(self, items: dict[str, Any]) -> dict[str, Any]:
        """Merge the dicts of all ranks; every rank gets the union."""
        if self.world == 1:
            return items
        parts = [None] * self.world
        dist.all_gather_object(parts, items)
        return {key: value for part in parts for key, value in part.items()}

    def claim_tickets(self, queue_name: str, length: int) -> Iterator[int]:
        """Yield the tickets 0 <= i < length that this rank claims; each ticket goes to exactly one rank."""
        if self.world == 1:
            yield from range(length)
            return
        # The store's counter is atomic, so a rank that finishes early simply claims the next ticket.
        store = dist.distributed_c10d._get_default_store()
        while (ticket := store.add(queue_name, 1) - 1) < length:
            yield ticket

    def is_late(self, says: bool) -> bool:
        """Return whether rank 0 says, or has ever said, that it is late; nobody waits."""
        if self.world == 1:
            return says
        store = dist.distributed_c10d._get_default_store()
        return store.add("late", int(says and self.rank == 0)) > 0

    def synchronize(self) -> None:
        """Wait until the GPU has finished what was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


class Clock:
    """Training time in seconds, the same number on every rank, without a GPU sync at every step.

    With budget = 0 the fraction done counts steps.
    """

    # Rank 0's clock is read at most EVERY steps apart, and every step near the end; between readings the time of the
    # last step is extrapolated. So schedules, the looping switch and the end fall on the same step everywhere.
    EVERY = 10

    def __init__(self, runtime: Runtime, budget: float, iterations: int) -> None:
        self.runtime, self.budget, self.iterations = runtime, budget, iterations
        self.started = 0.0
        self.mark_step, self.mark_time = 0, 0.0  # the last reading
        self.step_time, self.next_reading, self.done = 0.0, 0, 0.0

    def start(self, elapsed: float = 0.0) -> None:
        """Start, or resume after a pause, with `elapsed` seconds on the clock."""
        self.runtime.synchronize()
        self.runtime.barrier()
        self.started = time.perf_counter() - elapsed

    def read(self) -> float:
        """Return rank 0's seconds of training so far, after a GPU sync."""
        self.runtime.synchronize()
        return self.runtime.broadcast_from_rank0(time.perf_counter() - self.started)

    def fraction(self, step: int) -> float:
        """Return the fraction of the run that is done when `step` begins; 1 or more means stop."""
        if self.budget <= 0 or step >= self.iterations:
            return step / self.iterations
        if step >= self.next_reading:
            now = self.read()
            if step > self.mark_step:
                self.step_time = (now - self.mark_time) / (step - self.mark_step)
            self.mark_step, self.mark_time = step, now
            # Read again after half of the steps that still fit, so the last steps are measured one by one.
            left = (self.budget - now) / self.step_time if self.step_time > 0 else 2
            self.next_reading = step + max(1, min(self.EVERY, int(left / 2)))
        now = self.mark_time + (step - self.mark_step) * self.step_time
        # never back, where a reading corrects a guess: a stage that has begun would end
        self.done = max(self.done, now / self.budget)
        return self.done

    def expect_change(self) -> None:
        """Read the clock at the next step, because the time of a step is about to change."""
        self.next_reading = 0


def atomic_write(path: Path, data: bytes) -> None:
    """Write bytes under a temporary name, then rename: the final name never holds half a file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            # else a machine that loses power may keep the name and not the bytes
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        # a full disk gets its room back, which the log needs
        temporary.unlink(missing_ok=True)


def atomic_save(path: Path, value: Any) -> None:
    """torch.save through atomic_write."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    atomic_write(path, buffer.getvalue())


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or {} if there is no file. UserError for anything but an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); write it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object; it was not written by this project")
    return value


def load_saved(path: Path, *keys: str) -> dict[str, Any]:
    """Load a dict that atomic_save wrote, onto the CPU. UserError if it is missing, damaged, or has not all keys."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing; run the stage before (STAGES=train,quantize,eval), or name the run that has it by "
            "ARTIFACT_DIR: with other knobs it has another folder"
        )
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost anything
        raise UserError(f"{path} is damaged ({first_line(error)}); delete it and run its stage again") from None
    missing = set(keys) - value.keys() if isinstance(value, dict) else {"a dictionary"}
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}: it is of another program or version; train again")
    return value


def weights_hash(state: Weights) -> Tensor:
    """The SHA-256 of a state dict, (32,) uint8."""
    digest = hashlib.sha256()
    for name, weight in state.items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def compiled(runtime: Runtime, function: Callable) -> Callable:
    """Return the function compiled as one graph if this run compiles, else the function itself; see mark_dynamic."""
    return torch.compile(function, fullgraph=True, dynamic=False) if runtime.compile else function


def captured(runtime: Runtime, what: str, capture: Callable[[], Any], otherwise: Any) -> Any:
    """What `capture` returns. Where CUDA graphs cannot be captured: `otherwise`, and a warning in result.json; with
    several ranks, of which one would keep the others waiting, an error."""
    try:
        return capture()
    except RuntimeError as error:
        if runtime.world > 1:
            raise
        runtime.log(f"WARNING: {what}: no CUDA graphs ({first_line(error)})")
        return otherwise


# +--------------------------------------------------------------------------------------------------------------------+
# | 03 DATA                                                                                                            |
# +--------------------------------------------------------------------------------------------------------------------+


def read_shard(path: str | Path) -> np.ndarray:
    """Memory-map the tokens of a shard, (N,) uint16. UserError if the header or the file size is wrong.

    Format: 256 little-endian int32 (magic 20240520, version 1, token count, zeros), then the tokens as uint16.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such shard")
    size, header_bytes = path.stat().st_size, 4 * SHARD_HEADER_INTS
    header, known = np.fromfile(path, "<i4", 3).tolist(), [SHARD_MAGIC, SHARD_VERSION]
    if len(header) < 3 or header[:2] != known:
        raise UserError(
            f"{path}: not a shard: magic and version are {header[:2]}, expected {known}; prepare the data again"
        )
    count = header[2]
    expected = header_bytes + 2 * count
    if size != expected:
        raise UserError(
            f"{path}: {size} bytes, but its header promises {count} tokens = {expected} bytes; copy or prepare it again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=header_bytes, shape=(count,))


def list_shards(folder: str, kind: str) -> list[Path]:
    """List the shards of a kind (train, val, val_bytes) in order.

    UserError if a number is missing between two shards, or if there is no shard; only val_bytes is optional.
    """
    prefix = f"fineweb_{kind}_"
    # "fineweb_val_*" also finds the byte sidecars, so what follows the prefix must be a number.
    paths = sorted(p for p in Path(folder).glob(f"{prefix}*.bin") if p.stem.removeprefix(prefix).isdigit())
    if not paths and kind != "val_bytes":
        raise UserError(
            f"DATA_PATH={folder} has no {prefix}*.bin; make shards with data/prepare.py or fetch them with "
            "data/download.py"
        )
    numbers = [int(p.stem.removeprefix(prefix)) for p in paths]
    gaps = sorted(set(range(numbers[0], numbers[-1])) - set(numbers)) if numbers else []
    if gaps:
        raise UserError(f"DATA_PATH={folder}: {prefix}{gaps[0]:06d}.bin is missing between its neighbours")
    # training may begin anywhere; a score is of the whole stream
    if kind != "train" and numbers and numbers[0]:
        raise UserError(
            f"DATA_PATH={folder}: {prefix}000000.bin is missing, but {paths[0].name} is there; copy all of it"
        )
    return paths


def segment_bounds(starts: np.ndarray, total: int, cap: int) -> np.ndarray:
    """Return the boundaries of attention segments in `total` tokens, int32, from 0 to total.

    A segment begins at 0, at each document start in `starts`, and every `cap` tokens within a document (0: no cap).
    """
    edges = np.unique(np.concatenate(([0], starts, [total])))
    # arange starts again at every document, so the cap counts from the document start.
    parts = [np.arange(a, b, cap or total) for a, b in itertools.pairwise(edges)]
    return np.concatenate([*parts, [total]]).astype(np.int32)


def pad_bounds(bounds: np.ndarray, multiple: int = 64) -> np.ndarray:
    """Right-pad boundaries with their last entry to a multiple of `multiple` entries.

    Compiled code then sees few shapes; the added segments are empty.
    """
    missing = -len(bounds) % multiple
    return np.pad(bounds, (0, missing), mode="edge")


def to_device(array: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device; the host does not wait for it, as it would for memory that is not pinned."""
    # pinning keeps the strides, and a copy of anything with gaps goes through memory that is not pinned
    t = torch.as_tensor(array).contiguous()
    return (t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True)


def mapped(tensors: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same kind of named tuple, with the function applied to every tensor; None stays."""
    results = (None if t is None else function(t) for t in tensors)
    return type(tensors)(*results)


class Batch(NamedTuple):
    """A micro-batch: ids and targets (B, T) int64; padded segment boundaries over B*T tokens, or None."""

    # on the host they may be numpy arrays
    ids: Any
    targets: Any
    cu_seqlens: Tensor | None

    apply = mapped


def check_ids(tokens: np.ndarray, vocab_size: int, where: str | Path) -> None:
    """UserError if a token id is outside the vocabulary."""
    if tokens.size and tokens.max() >= vocab_size:
        raise UserError(
            f"{where}: token id {tokens.max()} is outside VOCAB_SIZE={vocab_size}; the shards were made with another "
            "tokenizer"
        )


class ShardWalker:
    """Reads the training shards in order, and starts over after the last one. Nothing is random.

    whole_docs=True is the published packing: it skips a shard's tokens before the first document and a tail that is
    shorter than a request. With False, a request continues in the next shard.
    """

    def __init__(self, paths: list[Path], vocab_size: int, whole_docs: bool) -> None:
        self.paths, self.vocab_size, self.whole_docs = paths, vocab_size, whole_docs
        # how many shards were opened, and what is left of the last one
        self.index, self.left = 0, np.empty(0, np.uint16)
        # Read every header now, so a bad shard cannot stop the run at a later step.
        sizes = [len(read_shard(path)) for path in paths]
        if not any(sizes):
            raise UserError(f"{paths[0].parent}: no training shard holds a token; prepare the data again")

    def open_next(self) -> None:
        """Put the next shard's tokens after those left, or with whole_docs in their place."""
        path = self.paths[self.index % len(self.paths)]
        self.index += 1
        tokens = read_shard(path)
        check_ids(tokens, self.vocab_size, path)
        if self.whole_docs:
            # a shard may begin inside a document
            starts = np.flatnonzero(tokens == BOS_ID)
            self.left = np.array(tokens[starts[0] if len(starts) else 0 :])
        else:
            self.left = np.concatenate((self.left, tokens))

    def next_tokens(self, count: int) -> np.ndarray:
        """Return the next `count` tokens, uint16. UserError if whole_docs and no shard holds that many."""
        last = self.index + len(self.paths)
        while len(self.left) < count:
            # All shards were opened without an answer: the next round would find nothing either.
            if self.whole_docs and self.index == last:
                raise UserError(
                    f"{self.paths[0].parent}: no training shard holds the {count} tokens of one step; lower "
                    "TRAIN_BATCH_TOKENS or prepare more text"
                )
            self.open_next()
        # a view: whoever makes batches copies
        taken, self.left = self.left[:count], self.left[count:]
        return taken


class ShuffledSequences:
    """Deals sequences of `length` + 1 tokens from pieces of text: each once in random order, then shuffles again."""

    # Published order (PR 1895): every piece gets a random phase and a random permutation of its sequences, which is
    # dealt from its end. The next sequence comes from a random piece, weighted by how many sequences each has left.

    def __init__(self, pieces: list[np.ndarray], length: int, seed: int) -> None:
        self.length = length
        self.pieces = [piece for piece in pieces if len(piece) > length]
        self.rng = np.random.Generator(np.random.PCG64(seed))
        # of the sequences that each piece has left
        self.starts = [np.empty(0, np.int64)]

    def shuffle(self) -> None:
        """Draw every piece's sequence starts; the last one is dealt first."""
        self.starts = []
        for piece in self.pieces:
            phase = self.rng.integers(min(self.length, len(piece) - self.length))
            count = (len(piece) - 1 - phase) // self.length
            self.starts.append(phase + self.length * self.rng.permutation(count))

    def next_sequence(self) -> np.ndarray:
        """Return the next sequence, (length + 1,) uint16."""
        if not any(map(len, self.starts)):
            self.shuffle()
        left = np.array([len(starts) for starts in self.starts])
        # Weighted by what is left, all pieces run out at about the same time.
        i = self.rng.choice(len(left), p=left / left.sum())
        start, self.starts[i] = self.starts[i][-1], self.starts[i][:-1]
        return self.pieces[i][start : start + self.length + 1]


def walked_spans(cfg: Config, slices: range) -> Iterator[list[np.ndarray]]:
    """Yield, for each step, the given slices of the text in order: spans of TRAIN_BATCH_TOKENS/BATCH_SLICES + 1."""
    span = cfg.train_batch_tokens // cfg.batch_slices + 1
    walker = ShardWalker(list_shards(cfg.data_path, "train"), cfg.vocab_size, LOADERS[cfg.loader].documents)
    while True:
        # Every rank reads the whole step and keeps its slices, so all ranks agree on where the next step begins.
        tokens = walker.next_tokens(cfg.batch_slices * span).reshape(cfg.batch_slices, span)
        yield [tokens[j] for j in slices]


def shuffled_rows(cfg: Config, slices: range) -> Iterator[list[np.ndarray]]:
    """Yield, for each step, rows (n, TRAIN_SEQ_LEN + 1) of the given slices.

    Slice j deals from shards j, j + BATCH_SLICES, ... alone; with 8 slices it is the published rank j. UserError if a
    slice gets no sequence.
    """
    length, count = cfg.train_seq_len, cfg.batch_slices
    shards = [read_shard(path) for path in list_shards(cfg.data_path, "train")]
    # With fewer shards than slices, cut every shard into equal pieces. A piece ends with the first token of the next,
    # which is the target of its last token.
    pieces, cuts = [], -(-count // len(shards))
    for shard in shards:
        edges = [(len(shard) - 1) * i // cuts for i in range(cuts + 1)]
        pieces += [shard[a : b + 1] for a, b in itertools.pairwise(edges)]
    dealers = [ShuffledSequences(pieces[j::count], length, j) for j in range(count)]
    if not all(dealer.pieces for dealer in dealers):
        raise UserError(
            f"DATA_PATH={cfg.data_path}: {len(shards)} training shards do not give each of BATCH_SLICES={count} a "
            f"sequence of TRAIN_SEQ_LEN={length}; lower one of these, or prepare more text"
        )
    rows = range(cfg.train_batch_tokens // count // length)
    while True:
        batches = [np.stack([dealers[j].next_sequence() for _ in rows]) for j in slices]
        check_ids(np.concatenate(batches), cfg.vocab_size, f"DATA_PATH={cfg.data_path}")
        yield batches


def rows_batch(rows: np.ndarray, seq_len: int) -> Batch:
    """Rows of seq_len + 1 tokens as they are; attention runs across documents."""
    # astype packs what it copies, one row too; compiled graphs tell strides apart
    ids, targets = (torch.from_numpy(part.astype(np.int64)) for part in (rows[:, :-1], rows[:, 1:]))
    return Batch(ids, targets, None)


def packed_docs_batch(span: np.ndarray, seq_len: int) -> Batch:
    """One row of all tokens; attention stays inside a document and inside pieces of seq_len tokens."""
    starts = np.flatnonzero(span[:-1] == BOS_ID)
    bounds = segment_bounds(starts, len(span) - 1, seq_len)
    row = rows_batch(span[None], seq_len)
    return row._replace(cu_seqlens=torch.from_numpy(pad_bounds(bounds)))


def stream_batch(span: np.ndarray, seq_len: int) -> Batch:
    """Contiguous rows of seq_len tokens; attention runs across documents."""
    windows = np.lib.stride_tricks.sliding_window_view(span, seq_len + 1)
    return rows_batch(windows[::seq_len], seq_len)


class Loader(NamedTuple):
    """A way to cut the training text.

    tokens yields each step's tokens for some slices; batch makes the micro-batch of one slice; documents says whether
    attention stops at document borders.
    """

    tokens: Callable[[Config, range], Iterator[list[np.ndarray]]]
    batch: Callable[[np.ndarray, int], Batch]
    documents: bool


LOADERS = {
    "packed_docs": Loader(walked_spans, packed_docs_batch, True),
    "stream": Loader(walked_spans, stream_batch, False),
    "shuffled": Loader(shuffled_rows, rows_batch, False),
}


def train_batches(cfg: Config, runtime: Runtime, first: int = 0) -> Iterator[dict[int, list[Batch]]]:
    """Yield this rank's micro-batches for each optimiser step from `first` on, without end, cut into each span of
    TRAIN_SEQ_SCHEDULE; a thread prepares two steps ahead, when nobody knows yet which span is due."""
    # Slice j goes to rank j mod world, so every world size sees the same tokens per step.
    loader, mine = LOADERS[cfg.loader], range(runtime.rank, cfg.batch_slices, runtime.world)
    settle = Tensor.pin_memory if runtime.device.type == "cuda" else Tensor.detach
    spans = {span for span, _ in graphs_of(cfg)}

    def steps() -> Iterator[dict[int, list[Batch]]]:
        # the steps before the first are read again: a position in the text is what they leave
        for parts in itertools.islice(loader.tokens(cfg, mine), first, None):
            cuts = {}
            for span in spans:
                cuts[span] = [loader.batch(tokens, span).apply(settle) for tokens in parts]
            yield cuts

    return prefetch(steps(), depth=2)


def prefetch(source: Iterator[Any], depth: int) -> Iterator[Any]:
    """Yield the items of an endless iterator, made `depth` ahead by a thread; its exceptions are raised here."""
    # One worker keeps the order. Leaving waits for it: a thread that is still inside torch when the program exits
    # aborts the process.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(next, source) for _ in range(depth)]
        while True:
            ahead.append(pool.submit(next, source))
            yield ahead.pop(0).result()


def calibration_rows(cfg: Config, index: int) -> np.ndarray:
    """Return calibration batch `index`: random training windows, (rows, TRAIN_SEQ_LEN) int64, for any world size."""
    # Seeded by the index alone, so the rows do not depend on which rank draws them.
    rng = np.random.Generator(np.random.PCG64(index))
    shards = [read_shard(path) for path in list_shards(cfg.data_path, "train")]
    length = cfg.train_seq_len
    room = np.maximum(0, [len(s) - length for s in shards])
    if not room.any():
        raise UserError(f"DATA_PATH={cfg.data_path}: no training shard holds TRAIN_SEQ_LEN={length} tokens")
    rows = cfg.train_batch_tokens // cfg.batch_slices // length
    # A shard is picked in proportion to its possible windows, so every window is equally likely.
    picks = rng.choice(len(shards), size=rows, p=room / room.sum())
    starts = [rng.integers(room[i]) for i in picks]
    windows = np.stack([shards[i][s : s + length] for i, s in zip(picks, starts, strict=True)])
    check_ids(windows, cfg.vocab_size, f"DATA_PATH={cfg.data_path}")
    return windows.astype(np.int64)


class ByteTable(NamedTuple):
    """What each token id adds to the text, by id (V,): its bytes at the start of a text (int32), whether it has a
    leading space that counts only elsewhere, and whether it is a boundary (a control id)."""

    bytes: np.ndarray
    space: np.ndarray
    boundary: np.ndarray

    def count(self, tokens: np.ndarray) -> np.ndarray:
        """Return the bytes credited to each token of a stream as a target, int32."""
        # The decoder drops a leading space at the start of a text, so it counts only if no control id precedes it.
        after_boundary = np.concatenate(([True], self.boundary[tokens[:-1]]))
        spaces = self.space[tokens] & ~after_boundary
        return self.bytes[tokens] + spaces


def find_tokenizer(cfg: Config) -> Path | None:
    """Return TOKENIZER_PATH, or the only *.model in DATA_PATH, or None. UserError if missing or ambiguous."""
    if cfg.tokenizer_path:
        if not Path(cfg.tokenizer_path).is_file():
            raise UserError(f"TOKENIZER_PATH={cfg.tokenizer_path}: no such file")
        return Path(cfg.tokenizer_path)
    models = sorted(Path(cfg.data_path).glob("*.model"))
    if len(models) > 1:
        raise UserError(f"DATA_PATH={cfg.data_path} holds {len(models)} tokenizers; choose one with TOKENIZER_PATH")
    return models[0] if models else None


def byte_table(path: Path, vocab_size: int) -> ByteTable:
    """Count the bytes of every id of a SentencePiece model. UserError if its vocabulary has another size."""
    try:
        # The bytes, not the path: a file name that is not UTF-8 does no harm.
        processor = spm.SentencePieceProcessor()
        processor.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a SentencePiece model ({error})") from None
    if processor.vocab_size() != vocab_size:
        raise UserError(f"{path}: the tokenizer has {processor.vocab_size()} pieces, VOCAB_SIZE={vocab_size}")
    # Without this piece a single space would become <unk>, and its byte would be lost.
    if processor.piece_to_id("\u2581") == processor.unk_id():
        raise UserError(f"{path}: the tokenizer has no bare U+2581 piece, so bytes cannot be counted")
    # White space as suffix with a dummy prefix: each text gets a space at its end that it does not have.
    if processor.normalize("a").endswith("\u2581"):
        raise UserError(
            f"{path}: the tokenizer adds a space to the end of a text; train it with add_dummy_prefix=False"
        )
    table = ByteTable(np.zeros(vocab_size, np.int32), np.zeros(vocab_size, bool), np.zeros(vocab_size, bool))
    for i in range(vocab_size):
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            table.boundary[i] = True
        elif processor.is_byte(i):
            table.bytes[i] = 1
        else:
            # U+2581 stands for a space, wherever it stands in a piece. At the start of a text the decoder may drop one.
            table.bytes[i] = len(processor.decode([i]).encode("utf-8"))
            inside = len(processor.id_to_piece(i).replace("\u2581", " ").encode("utf-8"))
            table.space[i] = inside > table.bytes[i]
    return table


def fingerprint(path: Path) -> str:
    """A fast hash of a file, as manifest.json has it: SHA-256 of its size and of its first and last MiB."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        first = handle.read(2**20)
        handle.seek(max(0, size - 2**20))
        return hashlib.sha256(struct.pack("<Q", size) + first + handle.read()).hexdigest()


def check_data(cfg: Config, log: Log) -> str:
    """Hold DATA_PATH against its manifest.json. UserError for a file that is not of this preparation, or missing.

    Returns a short hash of what scores depend on: validation shards, sidecars and tokenizer.
    """
    folder, tokenizer = Path(cfg.data_path), find_tokenizer(cfg)
    manifest = read_json(folder / "manifest.json")
    try:
        rows = [*manifest.get("shards", []), *manifest.get("sidecars", []), *filter(None, [manifest.get("tokenizer")])]
        listed = {row["name"]: row["fingerprint"] for row in rows if row.get("fingerprint")}
    except (AttributeError, KeyError, TypeError):
        raise UserError(
            f"{folder / 'manifest.json'} lists no files as data/prepare.py does; prepare or download the data again"
        ) from None
    scored = [*list_shards(folder, "val"), *list_shards(folder, "val_bytes"), *filter(None, [tokenizer])]
    found = {path: fingerprint(path) for path in (*scored, *folder.glob("fineweb_train_*.bin"))}
    if listed:
        # a shard in another's place is in the list too, so its name counts; a tokenizer may lie elsewhere
        foreign = [
            str(path)
            for path, mark in found.items()
            if mark not in (listed.values() if path == tokenizer else [listed.get(path.name)])
        ]
        missing = [name for name in listed if name.startswith("fineweb_val") and not (folder / name).is_file()]
        for problem, paths in (("not the file that", foreign), ("missing, though", missing)):
            if paths:
                raise UserError(
                    f"DATA_PATH={folder}: {', '.join(sorted(paths))}: {problem} manifest.json lists; prepare or "
                    "download the data again, or copy all of it"
                )
    else:
        log(f"WARNING: DATA_PATH={folder}: no manifest.json with fingerprints says that its files belong together")
    if manifest.get("lossy"):
        log(f"WARNING: DATA_PATH={folder}: the tokenizer loses text, so that bits per byte are not comparable")
    return short_hash("".join(found[path] for path in scored).encode())


class ValData(NamedTuple):
    """The validation stream: tokens (N,) int64, and the bytes credited to each token as a target, (N,) int32."""

    tokens: np.ndarray
    bytes: np.ndarray


def load_val(cfg: Config) -> ValData:
    """Load the validation tokens and their bytes: from the byte sidecar if there is one, else from the tokenizer.

    The stream is cut to a multiple of EVAL_SEQ_LEN targets, the canonical count, unless EVAL_INCLUDE_TAIL is set.
    UserError if the stream is too short, or if shards, sidecars, tokenizer and VOCAB_SIZE do not fit together.
    """
    where = f"DATA_PATH={cfg.data_path}"
    kinds = list_shards(cfg.data_path, "val"), list_shards(cfg.data_path, "val_bytes")
    shards, sidecars = ([read_shard(path) for path in paths] for paths in kinds)
    tokens = np.concatenate(shards).astype(np.int64)
    count = len(tokens) - 1
    if not cfg.eval_include_tail:
        count -= count % cfg.eval_seq_len
    if count < 1:
        raise UserError(
            f"{where}: {len(tokens)} validation tokens are fewer than EVAL_SEQ_LEN={cfg.eval_seq_len} + 1; lower "
            "EVAL_SEQ_LEN or prepare more --val-docs"
        )
    check_ids(tokens, cfg.vocab_size, where)
    # The tokenizer is checked against VOCAB_SIZE even where the sidecar has the bytes.
    tokenizer = find_tokenizer(cfg)
    table = byte_table(tokenizer, cfg.vocab_size) if tokenizer else None
    if sidecars:
        if list(map(len, sidecars)) != list(map(len, shards)):
            raise UserError(f"{where}: the byte sidecars do not match the validation shards")
        counted = np.concatenate(sidecars).astype(np.int32)
    elif table is not None:
        counted = table.count(tokens)
        # bytes of case operators are those of the text without them: a table cannot know
        processor = spm.SentencePieceProcessor(model_proto=tokenizer.read_bytes())
        if processor.piece_to_id(CASE_OPERATOR) != processor.unk_id():
            raise UserError(f"{where}: the tokenizer has case operators, so fineweb_val_bytes_*.bin must be there")
    else:
        raise UserError(f"{where} has neither a *.model nor a byte sidecar; set TOKENIZER_PATH")
    val = ValData(tokens[: count + 1], counted[: count + 1])
    if not val.bytes[1:].any():
        raise UserError(f"{where}: the validation targets count no byte; prepare the data again")
    return val


def val_documents(tokens: np.ndarray) -> list[tuple[int, int]]:
    """Return (start, length) of each document. The length includes the next document's BOS, which is a target too."""
    starts = np.flatnonzero(tokens == BOS_ID)
    if not len(starts):
        raise UserError("the validation stream has no document start (BOS); EVAL=doc_lora needs documents")
    # tokens before the first BOS join the first document, so every target is scored
    starts[0] = 0
    # + 1: the last token of a document predicts the BOS of the next one.
    lengths = np.diff(starts, append=len(tokens) - 1) + 1
    return list(zip(starts.tolist(), lengths.tolist(), strict=True))


def row_bounds(cfg: Config, ids: np.ndarray) -> Tensor | None:
    """Return padded segment boundaries for rows (B, T) as B*T flat tokens: every row start and document start. None
    where the model was trained across document borders."""
    if not LOADERS[cfg.loader].documents:
        return None
    starts = ids == BOS_ID
    starts[:, 0] = True
    bounds = segment_bounds(np.flatnonzero(starts), ids.size, 0)
    return torch.from_numpy(pad_bounds(bounds))


# +--------------------------------------------------------------------------------------------------------------------+
# | 04 ATTENTION                                                                                                       |
# +--------------------------------------------------------------------------------------------------------------------+


def at_least_fp32(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64: norms, softmax and losses never run in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dim, without a weight; computed in at least float32, returned as x."""
    y = F.rms_norm(at_least_fp32(x), (x.size(-1),), eps=RMS_EPS)
    return y.to(x.dtype)


def rotary_frequencies(dims: int, base: float, device: torch.device) -> Tensor:
    """(dims/2) float32: radians per token of each rotated pair (RoPE, Su et al. 2021)."""
    return 1.0 / base ** (torch.arange(0, dims, 2, dtype=torch.float32, device=device) / max(dims, 1))


def rotary_tables(
    length: int,
    dims: int,
    base: float,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin (length, dims/2) of positions 0..length-1, float32; pairs are dims (m, m + dims/2).

    Frequencies, positions, angles and results are rounded to `dtype`.
    """
    position = torch.arange(length, dtype=torch.float32, device=device).to(dtype)
    angle = position[:, None] * rotary_frequencies(dims, base, device).to(dtype)
    return angle.cos().float(), angle.sin().float()


def rotary_at(at: Tensor, dims: int, base: float, trained: int) -> tuple[Tensor, Tensor]:
    """cos and sin (B, T, dims/2), float32, of positions `at` (B, T). Positions below `trained` give the very rows of
    rotary_tables; beyond, angles are float64, because a large float32 angle loses its fraction."""
    frequency = rotary_frequencies(dims, base, at.device)
    at = at.unsqueeze(-1)
    near, far = at.float() * frequency, at.double() * frequency.double()
    inside = at < trained
    # both are computed for all positions, which costs less than telling them apart
    cos = torch.where(inside, near.cos(), far.cos().float())
    sin = torch.where(inside, near.sin(), far.sin().float())
    return cos, sin


def stretched_base(base: float, dims: int, span: int, reference: int) -> float:
    """The rotary base for contexts of `span` tokens. Past a reference length (0: never) it grows, so that the lowest
    frequency turns no further than at the reference (NTK-aware scaling, bloc97 2023)."""
    return base * (span / reference) ** (dims / (dims - 2)) if 0 < reference < span else base


def rotate(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.size(-1) dims of each head by tables of (T) or (B, T) rows; the rest passes through."""
    half = cos.size(-1)
    cos = cos.unsqueeze(-2)  # every head turns alike
    sin = sin.unsqueeze(-2)
    a, b, rest = x_BTHd.tensor_split([half, 2 * half], dim=-1)
    first = a * cos + b * sin
    second = b * cos - a * sin
    turned = torch.cat([first, second], dim=-1).to(x_BTHd.dtype)
    return torch.cat([turned, rest], dim=-1)


def head_counts(x: Tensor, gain: Tensor) -> tuple[int, int, int]:
    """How many heads of x (B, T, H + 2 K, d) are queries, keys and values: H is the size of gain."""
    shared = (x.size(2) - gain.size(0)) // 2
    return gain.size(0), shared, shared


def norm_rotate(
    x: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split heads x (B, T, H + 2 K, d) into queries, keys and values. Queries and keys get QK norm and are rotated by
    tables as in rotate; queries get a gain (H,) too."""
    q, k, v = x.split(head_counts(x, gain), dim=2)
    q, k = (rotate(rms_norm(t), cos, sin) for t in (q, k))
    return q * gain[:, None], k, v.clone()


def remove_self_value(y_BTHd: Tensor, v_BTKd: Tensor, gate: Tensor) -> Tensor:
    """XSA: remove from each head's output its component along the token's own value (that of its key/value head);
    then times a gate (B, T, H, 1)."""
    # a key/value head serves H/K query heads: (B, T, K, 1, d)
    own = F.normalize(at_least_fp32(v_BTKd), dim=-1, eps=1e-12).unsqueeze(3)
    # (B, T, K, H/K, d)
    y = at_least_fp32(y_BTHd).unflatten(2, (v_BTKd.size(2), -1))
    y = y - (y * own).sum(-1, keepdim=True) * own
    return y.flatten(2, 3).to(y_BTHd.dtype) * gate


class AttnMeta(NamedTuple):
    """What the mixers need to know about a batch besides its activations."""

    cu_seqlens: Tensor | None  # segment boundaries over the flattened B*T tokens; None: each row is one segment
    max_len: int  # the longest segment
    cos: Tensor  # rotary tables, float32: (T, rope_dims/2), or (B, T, rope_dims/2)
    sin: Tensor
    mask: Tensor | None  # segment_mask, for masked_attention
    starts: Tensor | None = None  # (B, T) bool, for recurrent mixers: tokens before which the state is cleared
    kv_cache: KVCache | None = None  # keys and values of the documents' earlier parts


Attend = Callable[[Tensor, Tensor, Tensor, AttnMeta, Tensor | None], Tensor]


def segments(cu_seqlens: Tensor, total: int) -> Tensor:
    """The segment, numbered from 1, of each of `total` tokens."""
    token = torch.arange(total, device=cu_seqlens.device).to(cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, token, right=True)


def segment_mask(cu_seqlens: Tensor, total: int, band: int) -> Tensor:
    """(total/band, 1, band, width) bool: a query sees the keys of its own segment up to itself.

    No segment is longer than `band`, so a block of `band` queries needs its own keys and those of the block before:
    width is 2 * band, or band when there is one block.
    """
    width, before = (2 * band, band) if total > band else (band, 0)
    query = torch.arange(total, device=cu_seqlens.device).view(-1, band, 1)
    # the first key of each block
    first = query[:, :1] - before
    key = first + torch.arange(width, device=cu_seqlens.device)
    segment = segments(cu_seqlens, total)
    same = segment[query] == segment[key.clamp_min(0)]
    seen = same & (key <= query) & (key >= 0)
    return seen.unsqueeze(1)


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
) -> Tensor:
    """SDPA of q (B, T, H, d), k and v (B, keys, K, d) under a mask (B, 1, T, keys); without one, causal in each row."""
    if sink is not None:
        k = torch.cat([sink.to(k.dtype).expand(k.size(0), 1, -1, -1), k], dim=1)
        v = F.pad(v, (0, 0, 0, 0, 1, 0))
        if mask is None:
            mask = q.new_ones(q.size(1), k.size(1), dtype=torch.bool).tril(1)
        else:
            mask = F.pad(mask, (1, 0), value=True)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return y.transpose(1, 2)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meta: AttnMeta,
    sink: Tensor | None = None,
) -> Tensor:
    """Exact causal attention on any device, by meta.mask: q (B, T, H, d), k and v (B, T, K, d) -> (B, T, H, d).

    A sink (K, d) is one more key, with value 0, that every query sees: y sigmoid(logsumexp(logits) - its logit).
    """
    if meta.mask is None:
        return exact_attention(q, k, v, None, sink)
    blocks, _, band, width = meta.mask.shape
    block_q, block_k, block_v = (t.reshape(blocks, band, *t.shape[2:]) for t in (q, k, v))
    # each block also sees the block before it; the first sees padding, which the mask hides
    if width > band:
        before_k, before_v = (F.pad(t[:-1], (0, 0, 0, 0, 0, 0, 1, 0)) for t in (block_k, block_v))
        block_k = torch.cat([before_k, block_k], dim=1)
        block_v = torch.cat([before_v, block_v], dim=1)
    return exact_attention(block_q, block_k, block_v, meta.mask, sink).reshape(q.shape)


class KVCache(NamedTuple):
    """Keys and values of earlier tokens, for rows that continue their documents.

    The ids of such a forward begin with the GPT.reach tokens before the row, for embeddings that look back.
    """

    # (B, 1, 1) bool, rows that begin a document: nothing before them counts, neither tokens nor cache
    first: Tensor
    # (B, T), of the rows' tokens in their documents
    positions: Tensor
    # (executions, 2, B, C, K, d), keys and values of earlier tokens
    cached: Tensor
    # (B, 1, H/K * T, C + T), added to the scores; the rows' own tokens are the last T columns
    mask: Tensor
    # what the executions so far have left, (2, B, T, K, d) each; attend appends
    new: list[Tensor]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        meta: AttnMeta,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Attention over the cached and the row's own keys. Shapes as masked_attention; there are no sinks here."""
        own = torch.stack((k, v))
        # cat copies the cache, so that it may be written before the backward
        whole = torch.cat((self.cached[len(self.new)], own), dim=2)
        self.new.append(own.detach())
        k, v = whole.transpose(2, 3)  # (B, K, C + T, d)
        # the queries of a key/value group lie side by side: a GPU's tiles are fuller, and no key is repeated for them
        # (B, K, H/K, T, d)
        rows = q.unflatten(2, (k.size(1), -1)).permute(0, 2, 3, 1, 4)
        y = F.scaled_dot_product_attention(rows.flatten(2, 3), k, v, attn_mask=self.mask)
        y = y.view(rows.shape).permute(0, 3, 1, 2, 4)
        return y.reshape(q.shape)


def with_sink(
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    sink: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """k and v (N, K, d) with a sink key, of value 0, in front of each segment, and the boundaries that result.

    The sink has to be a key: varlen_attn returns a log-sum-exp, but no gradient flows through it.
    """
    place = torch.arange(k.size(0), device=k.device) + segments(cu_seqlens, k.size(0))
    total = k.size(0) + cu_seqlens.size(0) - 1
    keys = sink.to(k.dtype).repeat(total, 1, 1).index_copy(0, place, k)
    values = torch.zeros_like(keys).index_copy(0, place, v)
    shift = torch.arange(cu_seqlens.size(0), device=k.device).to(cu_seqlens.dtype)
    return keys, values, cu_seqlens + shift


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meta: AttnMeta,
    sink: Tensor | None = None,
    *,
    varlen_attn: Callable,
    grouped: Mapping[str, bool],
) -> Tensor:
    """Flash attention over segments, or over rows without any. Shapes as masked_attention; where a segment has more
    keys than queries, causality is aligned to its end. flash_backend binds the last two."""
    cu_seqlens, longest = meta.cu_seqlens, meta.max_len
    if cu_seqlens is None:
        if sink is None:
            return exact_attention(q, k, v, None, None)
        # a sink needs segments: each row is one
        longest = q.size(1)
        cu_seqlens = torch.arange(q.size(0) + 1, dtype=torch.int32, device=q.device) * longest
    flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))
    cu_k, longest_k = cu_seqlens, longest
    if sink is not None:
        flat_k, flat_v, cu_k = with_sink(flat_k, flat_v, cu_seqlens, sink)
        longest_k += 1
    # the window: any earlier key, no later one; lengths are upper bounds, by which the kernel sizes its grid
    lengths = longest, longest_k
    y = varlen_attn(flat_q, flat_k, flat_v, cu_seqlens, cu_k, *lengths, window_size=(-1, 0), **grouped)
    return y.view_as(q)


def flash_backend() -> functools.partial:
    """flash_attention over torch's kernels."""
    # not imported at the top: it brings Dynamo, for which --explain need not wait
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    # query heads may share a key/value head: torch 2.13 wants to be told, 2.11 does not ask
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return functools.partial(flash_attention, varlen_attn=varlen_attn, grouped=grouped)


def choose_attention(cfg: Config, runtime: Runtime) -> Attend:
    """Choose and log the attention backend of a run. UserError: the one that ATTENTION names cannot run here."""
    wanted = cfg.attention
    half = runtime.device.type == "cuda" and runtime.dtype == torch.bfloat16
    if wanted == "masked" or (wanted == "auto" and not half):
        runtime.log("attention: masked twin (exact)")
        return masked_attention
    if not half:
        raise UserError(f"ATTENTION={wanted} needs a GPU and COMPUTE_DTYPE=bf16; set ATTENTION=auto or masked")
    backend = flash_backend()
    # FA3 is made for the contest's GPU, so it comes first
    for name in {"auto": ("fa3", "fa4"), "fa2": ()}.get(wanted, (wanted,)):
        try:
            if name == "fa4" and not backend.keywords["grouped"]:
                raise ImportError("torch before 2.13 cannot differentiate FA4")
            activate_flash_attention_impl(name.upper())
        except (ImportError, RuntimeError, ValueError) as error:
            if wanted != "auto":
                raise UserError(f"ATTENTION={wanted} cannot run here: {error}; set ATTENTION=auto") from None
            runtime.log(f"attention: {name} cannot run here ({first_line(error)})")
        else:
            runtime.log(f"attention: {name} through torch.nn.attention")
            return backend
    runtime.log("attention: fa2, built into torch")
    return backend


# +--------------------------------------------------------------------------------------------------------------------+
# | 05 KERNELS                                                                                                         |
# +--------------------------------------------------------------------------------------------------------------------+


kernel = triton.jit if triton is not None else lambda function: function  # without Triton nothing calls them

CE_BLOCK = 1024  # columns of a row of logits at a time
CE_BACK_BLOCK = 2048
MLP_TILE = 128, 256, 64  # rows, columns and depth of a matmul tile
HEAD_BLOCK = 32  # tokens of a program that works on one head


@kernel
def penalty(banned: tl.tensor | None, row: tl.tensor, vocab: int, column: tl.tensor) -> tl.tensor:
    """BANNED_NATS where a column's bit in a row of banned is set, else 0."""
    nats = 0.0
    if banned is not None:
        byte = tl.load(banned + row * tl.cdiv(vocab, 8) + column // 8, mask=column < vocab, other=0)
        nats = (byte.to(tl.int32) >> column % 8 & 1) * 20.0
    return nats


@kernel
def softcap_ce_kernel(
    z: tl.tensor,
    targets: tl.tensor,
    banned: tl.tensor | None,
    loss: tl.tensor,
    lse: tl.tensor,
    softcap: float,
    vocab: int,
    BLOCK: tl.constexpr,
) -> None:
    """Store the loss and the log-sum-exp of one row of logits z (N, vocab); banned: its bits (N, vocab / 8)."""
    row = tl.program_id(0).to(tl.int64)  # rows * vocab may pass 2^31
    z += row * vocab
    lanes = tl.arange(0, BLOCK)
    # A softcapped logit c tanh(z/c) = 2c sigmoid(2z/c) - c lies within +-c, and c is at most 75: the sum of the
    # exponentials fits float32 without the usual running maximum
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        inside = start + lanes < vocab
        x = tl.load(z + start + lanes, mask=inside, other=0.0).to(tl.float32)
        # the approximate division is much faster, and exact to about two units in the last place
        y = tl.fdiv(2 * softcap, 1 + tl.exp(-2 * x / softcap)) - softcap
        y -= penalty(banned, row, vocab, start + lanes)
        total += tl.where(inside, tl.exp(y), 0.0)
    result = tl.log(tl.sum(total, 0))
    target = tl.load(targets + row)
    chosen = 2 * softcap * tl.sigmoid(2 * tl.load(z + target).to(tl.float32) / softcap)
    tl.store(loss + row, result + softcap - chosen + penalty(banned, row, vocab, target))
    tl.store(lse + row, result)


@kernel
def softcap_ce_back_kernel(
    g_lse: tl.tensor,
    z: tl.tensor,
    targets: tl.tensor,
    banned: tl.tensor | None,
    dz: tl.tensor,
    softcap: float,
    vocab: int,
    BLOCK: tl.constexpr,
) -> None:
    """Store the gradient dz of one block of a row: g (p - [column is the target]) 4 s (1 - s).

    s = sigmoid(2z/c) and p = exp(2cs - c - penalty - lse). g_lse (2, N): g, then lse.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, place = column < vocab, row * vocab + column
    s = tl.sigmoid(2 * tl.load(z + place, mask=inside, other=0.0).to(tl.float32) / softcap)
    y = 2 * softcap * s - softcap - penalty(banned, row, vocab, column)
    p = tl.exp(y - tl.load(g_lse + tl.num_programs(0) + row))
    slope = tl.load(g_lse + row) * 4 * s * (1 - s)  # dy/dz = 4 s (1 - s)
    grad = slope * tl.where(column == tl.load(targets + row), p - 1, p)
    tl.store(dz + place, grad.to(dz.dtype.element_ty), mask=inside)


@kernel
def halves(tile_RC: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Split a tile into its left and right half."""
    # storing a whole float32 tile at once would need too much shared memory
    R: tl.constexpr = tile_RC.shape[0]
    C: tl.constexpr = tile_RC.shape[1]
    split = tl.reshape(tile_RC, (R, 2, C // 2))
    return tl.split(tl.permute(split, (0, 2, 1)))


@kernel
def leaky_square_kernel(
    x: tl.tensor_descriptor,
    w: tl.tensor_descriptor,
    pre: tl.tensor_descriptor,
    out: tl.tensor_descriptor,
    SLOPE: tl.constexpr,
    BACK: tl.constexpr,
) -> None:
    """Forward: pre = x w^T and out = f(pre), where f = LeakyReLU(., SLOPE)^2. Back: out = (x w) f'(pre).

    The descriptors' blocks set the tile: x (rows, depth), w (columns, depth), or back (depth, columns), pre and out
    (rows, columns / 2).
    """
    R: tl.constexpr = x.block_shape[0]
    K: tl.constexpr = x.block_shape[1]
    HALF: tl.constexpr = pre.block_shape[1]
    across = tl.cdiv(pre.shape[1], 2 * HALF)
    # persistent programs: each takes every num_programs-th tile, row by row; flatten lets a tile's first loads begin
    # while the tile before is stored
    tiles = tl.cdiv(x.shape[0], R) * across
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = tile // across * R, tile % across * (2 * HALF)
        total = tl.zeros((R, 2 * HALF), tl.float32)
        for k in tl.range(0, x.shape[1], K):
            if BACK:
                total = tl.dot(x.load([row, k]), w.load([k, column]), total)
            else:
                total = tl.dot(x.load([row, k]), w.load([column, k]).T, total)
        for half in tl.static_range(2):
            y = halves(total)[half]
            if BACK:
                z = pre.load([row, column + half * HALF]).to(tl.float32)
                y = y * tl.where(z > 0, 2 * z, 2 * SLOPE * SLOPE * z)
            else:
                # f sees the rounded pre, as in the twin
                z = y.to(pre.dtype)
                pre.store([row, column + half * HALF], z)
                a = z.to(tl.float32)
                a = tl.where(a > 0, a, SLOPE * a)
                y = a * a
            out.store([row, column + half * HALF], y.to(out.dtype))


@kernel
def load_wide(x: tl.tensor, place: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Entries of x in float32; 0 where masked."""
    return tl.load(x + place, mask=mask, other=0.0).to(tl.float32)


@kernel
def store_as(x: tl.tensor, place: tl.tensor, value: tl.tensor, mask: tl.tensor) -> None:
    """Store in x's dtype, but for masked places."""
    tl.store(x + place, value.to(x.dtype.element_ty), mask=mask)


@kernel
def norm_rotate_kernel(
    whole: tl.tuple,
    parts: tl.tuple,
    tables: tl.tuple,
    gain: tl.tensor,
    tokens: int,
    rows: int,
    eps: float,
    SHAPE: tl.constexpr,
) -> None:
    """One head of a block of tokens, of x (tokens, H + 2 K, width) and of its part: queries, keys or values.

    Forward: the part is gain R n, where n = x / rms(x) and R rotates pairs; values stay as they are. Back: the parts
    are gradients; with u = R^T g and r = 1 / rms(x), dx = gain r (u - r^2 mean(u x) x), and dgain (blocks, H) sums
    r u x. whole: x, and in the backward dx and dgain; tables: cos and sin (rows, pairs); SHAPE: width, pairs, tokens of
    a block, H, K.
    """
    x, dx, dgain = whole
    WIDTH: tl.constexpr = SHAPE[0]
    H: tl.constexpr = SHAPE[3]
    K: tl.constexpr = SHAPE[4]
    index, column, a = tl.program_id(1), tl.arange(0, WIDTH)[None, :], tl.arange(0, SHAPE[1])[None, :]
    query, turns = index < H, index < H + K
    part = tl.where(query, parts[0], tl.where(turns, parts[1], parts[2]))
    token = (tl.program_id(0) * SHAPE[2] + tl.arange(0, SHAPE[2]))[:, None]
    inside, b = token < tokens, a + SHAPE[1]
    passes = inside & (column >= 2 * SHAPE[1])
    # rows of one length share a table
    angle = token % rows * SHAPE[1] + a
    cos = tl.load(tables[0] + angle, mask=inside & turns, other=1.0)
    sin = tl.load(tables[1] + angle, mask=inside & turns, other=0.0)
    # the head's first entries, in x and in its part
    at = (token.to(tl.int64) * (H + 2 * K) + index) * WIDTH
    head = index - tl.where(query, 0, tl.where(turns, H, H + K))
    of = (token.to(tl.int64) * tl.where(query, H, K) + head) * WIDTH
    y = load_wide(x, at + column, inside)
    y_a = load_wide(x, at + a, inside)
    y_b = load_wide(x, at + b, inside)
    r = tl.where(turns, tl.rsqrt(tl.sum(y * y, 1, keep_dims=True) / WIDTH + eps), 1.0)
    scale = r * tl.load(gain + index, mask=query, other=1.0).to(tl.float32)
    if dx is None:
        store_as(part, of + column, scale * y, passes)
        store_as(part, of + a, scale * (y_a * cos + y_b * sin), inside)
        store_as(part, of + b, scale * (y_b * cos - y_a * sin), inside)
    else:
        u = load_wide(part, of + column, passes)
        g_a = load_wide(part, of + a, inside)
        g_b = load_wide(part, of + b, inside)
        u_a = g_a * cos - g_b * sin
        u_b = g_a * sin + g_b * cos
        along = tl.sum(y * u, 1, keep_dims=True) + tl.sum(y_a * u_a + y_b * u_b, 1, keep_dims=True)
        tl.store(dgain + tl.program_id(0) * H + index, tl.sum(r * along), mask=query)
        inward = tl.where(turns, r * r * along / WIDTH, 0.0)
        store_as(dx, at + column, scale * (u - inward * y), passes)
        store_as(dx, at + a, scale * (u_a - inward * y_a), inside)
        store_as(dx, at + b, scale * (u_b - inward * y_b), inside)


@kernel
def self_value_kernel(
    inputs: tl.tuple,
    outputs: tl.tuple,
    tokens: int,
    SHAPE: tl.constexpr,
) -> None:
    """One key/value head of a block of tokens, and the heads of y (tokens, heads, width) that it serves.

    inputs: y, v, gate and, in the backward, g; outputs: out, and in the backward dv and dgate; SHAPE: width, heads of y
    for one of v, tokens of a block. Forward: out = gate u, where u = y - c v and c = y.v / v.v. Back, from the gradient
    g of that: out is dy = h - e v, where h = gate g and e = h.v / v.v; dv sums 2 c e v - c h - e y, and dgate = g.u.
    """
    y, v, gate, g = inputs
    out, dv, dgate = outputs
    GROUP: tl.constexpr = SHAPE[1]
    token = tl.program_id(0) * SHAPE[2] + tl.arange(0, SHAPE[2])
    exists, column = token < tokens, tl.arange(0, SHAPE[0])[None, :]
    inside = exists[:, None]
    value_head = token.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    value_place = value_head[:, None] * SHAPE[0] + column
    own = load_wide(v, value_place, inside)
    # as in the twin, a value of length 0 removes nothing
    square = tl.maximum(tl.sum(own * own, 1, keep_dims=True), 1e-24)
    total = tl.zeros_like(own)
    for i in tl.static_range(GROUP):
        head = value_head * GROUP + i
        place = head[:, None] * SHAPE[0] + column
        whole, opening = load_wide(y, place, inside), load_wide(gate, head, exists)[:, None]
        c = tl.sum(whole * own, 1, keep_dims=True) / square
        result = whole - c * own
        if g is not None:
            h = load_wide(g, place, inside)
            store_as(dgate, head, tl.sum(h * result, 1), exists)
            h *= opening
            e = tl.sum(h * own, 1, keep_dims=True) / square
            total += 2 * c * e * own - c * h - e * whole
            store_as(out, place, h - e * own, inside)
        else:
            store_as(out, place, result * opening, inside)
    if g is not None:
        store_as(dv, value_place, total, inside)


def launch_softcap_ce(
    z: Tensor,
    targets: Tensor,
    softcap: float,
    banned: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """softcap_ce through Triton, one program a row."""
    z, (rows, vocab) = z.contiguous(), z.shape
    loss, lse = (z.new_empty(rows, dtype=torch.float32) for _ in range(2))
    softcap_ce_kernel[(rows,)](z, targets, banned, loss, lse, softcap, vocab, CE_BLOCK)
    return loss, lse


def launch_softcap_ce_back(
    g: Tensor,
    z: Tensor,
    targets: Tensor,
    lse: Tensor,
    softcap: float,
    banned: Tensor | None,
) -> Tensor:
    """softcap_ce_back through Triton, one program a block of a row."""
    z, (rows, vocab) = z.contiguous(), z.shape
    dz, grid = torch.empty_like(z), (rows, triton.cdiv(vocab, CE_BACK_BLOCK))
    softcap_ce_back_kernel[grid](torch.stack([g, lse]), z, targets, banned, dz, softcap, vocab, CE_BACK_BLOCK)
    return dz


def launch_tiles(x: Tensor, w: Tensor, pre: Tensor, out: Tensor, slope: float, back: bool) -> None:
    """Run leaky_square_kernel: one persistent program a multiprocessor, or a few under Triton's interpreter."""
    R, C, K = MLP_TILE
    half = [R, C // 2]
    blocks = [
        (x, [R, K]),
        (w, [K, C] if back else [C, K]),
        (pre, half),
        (out, half),
    ]
    # bulk copies: reads past the end of a matrix give zeros, and writes there do nothing
    tiles = [TensorDescriptor.from_tensor(matrix.contiguous(), block) for matrix, block in blocks]
    programs = 3
    if x.is_cuda:
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    # the backward also loads tiles of pre, which leaves shared memory for one stage less
    stages = 3 if back else 4
    leaky_square_kernel[(programs,)](*tiles, slope, back, num_warps=8, num_stages=stages)


def launch_leaky_square(
    m: Tensor,
    up: Tensor,
    down: Tensor,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """leaky_square through Triton."""
    pre, post = (m.new_empty(m.size(0), up.size(0)) for _ in range(2))
    launch_tiles(m, up, pre, post, slope, back=False)
    # the second matmul has nothing to fuse: cuBLAS
    return F.linear(post, down), pre, post


def launch_leaky_square_back(g: Tensor, down: Tensor, pre: Tensor, slope: float) -> Tensor:
    """leaky_square_back through Triton."""
    dpre = torch.empty_like(pre)
    launch_tiles(g, down, pre, dpre, slope, back=True)
    return dpre


def new_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors of these shapes and dtypes, not filled."""
    return tuple(t.new_empty(t.shape) for t in tensors)


def by_heads(x: Tensor) -> tuple[tuple[int, int], int]:
    """Grid and tokens of a kernel whose programs take one head of a block of tokens of x (..., heads, width)."""
    *_, heads, width = x.shape
    tokens = x.numel() // (heads * width)
    return (triton.cdiv(tokens, HEAD_BLOCK), heads), tokens


def launch_heads(whole: tuple, parts: tuple, gain: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Run norm_rotate_kernel."""
    grid, tokens = by_heads(whole[0])
    rows, pairs = cos.numel() // cos.size(-1), cos.size(-1)
    shape = (whole[0].size(-1), pairs, HEAD_BLOCK, *head_counts(whole[0], gain)[:2])
    norm_rotate_kernel[grid](whole, parts, (cos, sin), gain, tokens, rows, RMS_EPS, shape)


def launch_norm_rotate(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """norm_rotate through Triton."""
    parts = new_like(*x.split(head_counts(x, gain), dim=2))
    launch_heads((x.contiguous(), None, None), parts, gain, cos, sin)
    return parts


def launch_norm_rotate_back(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """norm_rotate_back through Triton."""
    *grads, x, gain, cos, sin = inputs
    (blocks, _), _ = by_heads(x)
    # each block of tokens leaves its part of the gain's gradient
    dx, dgain = *new_like(x), gain.new_empty(blocks, gain.size(0), dtype=torch.float32)
    parts = tuple(g.contiguous() for g in grads)
    launch_heads((x.contiguous(), dx, dgain), parts, gain, cos, sin)
    return dx, dgain.sum(0).to(gain.dtype)


def launch_self_value(y: Tensor, v: Tensor, gate: Tensor, g: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
    """remove_self_value through Triton; with a gradient g, self_value_back."""
    inputs = [y.contiguous(), v.contiguous(), gate.contiguous(), None]
    found = (*new_like(y), None, None)
    if g is not None:
        inputs[-1] = g.contiguous()
        found = new_like(y, v, gate)
    grid, tokens = by_heads(v)
    group = y.size(-2) // v.size(-2)
    self_value_kernel[grid](tuple(inputs), found, tokens, (v.size(-1), group, HEAD_BLOCK))
    return found[0] if g is None else found


def operator(
    launch: Callable | None = None,
    fake: Callable | None = None,
    backward: Callable | None = None,
    setup_context: Callable = lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
) -> Callable[[Callable], Callable]:
    """Decorator: turn a plain twin into the operator <this module>::<its name>, which a compiled graph keeps whole.

    launch: what runs on a GPU; fake: gives empty results while tracing; both default to the twin. setup_context and
    backward: as in torch.library.register_autograd. The twin stays reachable as `.twin`.
    """

    def register(twin: Callable) -> Callable:
        """Make the operator for one twin."""
        # A process may hold several copies of this program (the judge's, a packed one's), and torch keeps only the
        # younger of two operators of one name: hence the module's name in it.
        op = torch.library.custom_op(f"{__name__}::{twin.__name__}", twin, mutates_args=(), device_types="cpu")
        op.register_kernel("cuda")(launch or twin)
        op.register_fake(fake or twin)
        if backward is not None:
            op.register_autograd(backward, setup_context=setup_context)
        op.twin = twin
        # a copy of a model has the same operators
        op.__deepcopy__ = lambda memo: op
        return op

    return register


BANNED_NATS = 20.0  # what a banned id loses: so much that little is left, so little that any target keeps a finite loss


def softcapped(z: Tensor, softcap: float, banned: Tensor | None = None) -> Tensor:
    """softcap * tanh(z / softcap), in at least float32, less BANNED_NATS where the bits banned (N, V/8) are set."""
    y = softcap * torch.tanh(at_least_fp32(z) / softcap)
    if banned is None:
        return y
    bits = banned[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=z.device) & 1
    return y - BANNED_NATS * bits.flatten(1)[:, : z.size(1)]


def softcapped_cross_entropy(z: Tensor, targets: Tensor, softcap: float, banned: Tensor | None = None) -> Tensor:
    """Cross-entropy (N,) in nats for logits z (N, V), softcapped: the plain twin, in at least float32."""
    return F.cross_entropy(softcapped(z, softcap, banned), targets, reduction="none")


@operator(launch_softcap_ce_back)
def softcap_ce_back(
    g: Tensor,
    z: Tensor,
    targets: Tensor,
    lse: Tensor,
    softcap: float,
    banned: Tensor | None,
) -> Tensor:
    """Gradient (N, V) for the logits, in their dtype, from the gradient g (N,) for the losses."""
    s = torch.sigmoid(2 * at_least_fp32(z) / softcap)
    p = torch.exp(softcapped(z, softcap, banned) - lse[:, None])
    # size(0), not len: as a fake kernel this sees symbolic sizes, which len would make constants
    p.scatter_add_(1, targets[:, None], p.new_full((p.size(0), 1), -1.0))
    return (g[:, None] * p * 4 * s * (1 - s)).to(z.dtype)


def softcap_ce_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward of softcap_ce reads."""
    (z, targets, ctx.softcap, banned), (_, lse) = inputs, output
    # the logits as they are, in bf16, and one float a row: no float32 copy of the logits exists
    ctx.save_for_backward(z, targets, lse, banned)
    ctx.mark_non_differentiable(lse)


def softcap_ce_grad(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    """Gradients of softcap_ce's inputs."""
    *saved, banned = ctx.saved_tensors
    return softcap_ce_back(g, *saved, ctx.softcap, banned), None, None, None


@operator(launch_softcap_ce, setup_context=softcap_ce_setup, backward=softcap_ce_grad)
def softcap_ce(
    z: Tensor,
    targets: Tensor,
    softcap: float,
    banned: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """softcapped_cross_entropy (N,) of z (N, V), and the log-sum-exp (N,) for the backward; both float32."""
    y = softcapped(z, softcap, banned)
    lse = y.logsumexp(1)
    return (lse - y.gather(1, targets[:, None])[:, 0]).float(), lse.float()


def fused_cross_entropy(z: Tensor, targets: Tensor, softcap: float, banned: Tensor | None = None) -> Tensor:
    """softcapped_cross_entropy by kernels that read the logits once each way (idea: Liger, Hsu et al. 2024)."""
    return softcap_ce(z, targets, softcap, banned)[0]


@operator(launch_leaky_square_back)
def leaky_square_back(g: Tensor, down: Tensor, pre: Tensor, slope: float) -> Tensor:
    """Gradient (N, F) for pre from the gradient g (N, D) for LeakyReLU(pre, slope)^2 down^T; down (D, F)."""
    return (g @ down) * torch.where(pre > 0, 2 * pre, 2 * slope**2 * pre)


def leaky_square_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep what the backward of leaky_square reads."""
    (m, up, down, ctx.slope), (_, pre, post) = inputs, output
    # both activations: to recompute post, the backward would have to write it a second time
    ctx.save_for_backward(m, up, down, pre, post)
    ctx.mark_non_differentiable(pre, post)
    # no zeros of the size of pre and post
    ctx.set_materialize_grads(False)


def leaky_square_grad(ctx: Any, g: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    """Gradients of leaky_square's inputs."""
    m, up, down, pre, post = ctx.saved_tensors
    # frozen weights, as in test-time training, get no gradient
    _, trains_up, trains_down, _ = ctx.needs_input_grad
    dpre = leaky_square_back(g, down, pre, ctx.slope)
    dup = dpre.T @ m if trains_up else None
    ddown = g.T @ post if trains_down else None
    return dpre @ up, dup, ddown, None


@operator(launch_leaky_square, setup_context=leaky_square_setup, backward=leaky_square_grad)
def leaky_square(m: Tensor, up: Tensor, down: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """post down^T (N, D), pre = m up^T (N, F) and post = LeakyReLU(pre, slope)^2.

    m (N, D), up (F, D), down (D, F); pre and post are for the backward.
    """
    pre = F.linear(m, up)
    post = F.leaky_relu(pre, slope).square()
    return F.linear(post, down), pre, post


def fused_mlp(m: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """LeakyReLU(m up^T, slope)^2 down^T of m (..., D), up (F, D), down (D, F); its twin is MLP's own forward."""
    return leaky_square(m.flatten(0, -2), up, down, slope)[0].view_as(m)


@operator(launch_norm_rotate_back, lambda gq, gk, gv, x, gain, *tables: new_like(x, gain))
def norm_rotate_back(
    gq: Tensor,
    gk: Tensor,
    gv: Tensor,
    x: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of norm_rotate's x and gain from those of its outputs."""
    rotated = functools.partial(norm_rotate, cos=cos, sin=sin)
    # not autograd, which is off inside an operator
    return torch.func.vjp(rotated, x, gain)[1]((gq, gk, gv))


@operator(
    launch_norm_rotate,
    lambda x, gain, *_: new_like(*x.split(head_counts(x, gain), dim=2)),
    lambda ctx, *grads: (*norm_rotate_back(*grads, *ctx.saved_tensors), None, None),
)
def fused_norm_rotate(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """norm_rotate by one kernel each way."""
    return norm_rotate(x, gain, cos, sin)


@operator(launch_self_value, lambda y, v, gate, g: new_like(y, v, gate))
def self_value_back(y: Tensor, v: Tensor, gate: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of remove_self_value's inputs from that of its output."""
    return torch.func.vjp(remove_self_value, y, v, gate)[1](g)


@operator(
    launch_self_value,
    lambda y, v, gate: new_like(y)[0],
    lambda ctx, g: self_value_back(*ctx.saved_tensors, g),
)
def fused_self_value(y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """remove_self_value by one kernel each way."""
    return remove_self_value(y, v, gate)


def l2_normalize(x: Tensor) -> Tensor:
    """x over its length, in at least float32."""
    x = at_least_fp32(x)
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def chunk_states_grad(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of chunk_states' inputs: the same recurrence, backwards in time with transposed maps."""
    a, states = ctx.saved_tensors
    # of each state, through all later ones
    total = chunk_states(a.mT.flip(0), g[:-1].flip(0), g[-1]).flip(0)
    later = total[1:]
    return later @ states[:-1].mT, later, total[0]


@operator(
    fake=lambda a, b, first: b.new_empty(b.size(0) + 1, *first.shape),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], output),
    backward=chunk_states_grad,
)
def chunk_states(a: Tensor, b: Tensor, first: Tensor) -> Tensor:
    """S_0 = first (..., K, V), S_{i+1} = a_i S_i + b_i of a (n, ..., K, K), b (n, ..., K, V) -> all S, (n + 1, ...)."""
    states = [first]
    for a_i, b_i in zip(a, b, strict=True):
        states.append(b_i + a_i @ states[-1])
    return torch.stack(states)


def to_chunks(x: Tensor, size: int) -> Tensor:
    """(B, T, H, ...) -> (n, B, H, size, ...), padded with zeros, which write nothing and decay nothing."""
    missing = -x.size(1) % size
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.unflatten(1, (-1, size)).movedim((1, 3), (0, 2))


def chunked_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    starts: Tensor,
    state: Tensor,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule (Yang et al. 2024); the work inside chunks is parallel.

    S <- e^g S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q / sqrt(K), from `state` (B, H, K, V) and, at tokens that
    start (B, T), from 0. q and k (B, T, H, K), v (B, T, H, V), log decay g and beta (B, T, H). Returns all o
    (B, T, H, V) and the last S.
    """
    T, K = q.size(1), q.size(-1)
    chunk = min(chunk, T)
    columns = q * K**-0.5, k, v, g, beta.unsqueeze(-1), starts[..., None].int()
    q, k, v, g, beta, starts = (to_chunks(x, chunk) for x in columns)
    # What a read at token i keeps of a write at token j of its chunk, (n, B, H, chunk, chunk); a start clears it
    # both count from the chunk's first token
    restarts, total = starts.cumsum(-1), g.cumsum(-1)
    same = (restarts[..., :, None] == restarts[..., None, :]).tril()
    within = total[..., :, None] - total[..., None, :]
    # masked before exp, which may overflow where j > i: inf times a zero gradient is NaN
    within = within.masked_fill(~same, -math.inf).exp()
    # What it keeps of the state before the chunk, (n, B, H, chunk, 1)
    before = total.masked_fill(restarts > 0, -math.inf).exp().unsqueeze(-1)
    # In a chunk that begins with state S, token i writes k_i (U_i - W_i S)^T. Each write corrects what the earlier
    # ones left, so all of them solve one unit lower triangular system (WY form).
    system = (beta * (k @ k.mT) * within).tril(-1)
    right = torch.cat([beta * v, beta * before * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    U, W = solved.split([v.size(-1), K], dim=-1)
    # A chunk maps the state before it to the state after it, S -> A S + b. Only this runs chunk after chunk.
    # keys, with what the chunk's end keeps of their writes
    into = (k * within[..., -1, :, None]).mT
    identity = torch.eye(K, dtype=k.dtype, device=k.device)
    states = chunk_states(before[..., -1:, :] * identity - into @ W, into @ U, state)
    S = states[:-1]
    o = (before * q) @ S + (q @ k.mT * within) @ (U - W @ S)
    # without the padding
    return o.movedim((0, 2), (1, 3)).flatten(1, 2)[:, :T], states[-1]


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    starts: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """chunked_delta_rule with normalised queries and keys, output in v's dtype: the plain twin of fused_delta_rule."""
    wide = (at_least_fp32(x) for x in (v, g, beta))
    o, last = chunked_delta_rule(l2_normalize(q), l2_normalize(k), *wide, starts, at_least_fp32(state))
    return o.to(v.dtype), last


FORGET = -104.0  # a log decay whose exponential is 0 in float32


@operator(fake=lambda go, gs, *inputs: tuple(map(torch.empty_like, inputs)))
def fla_rule_back(
    go: Tensor,
    gs: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of fla_rule's inputs from those of its outputs."""
    # runs the forward again, on leaves: inside an operator autograd is off
    inputs = [x.detach().requires_grad_() for x in (q, k, v, g, beta, state)]
    with torch.enable_grad():
        return torch.autograd.grad(fla_rule.twin(*inputs), inputs, (go, gs))


# The library's own autograd.Function would break a compiled graph, so each direction is an operator.
@operator(
    fake=lambda q, k, v, g, beta, state: (torch.empty_like(v), torch.empty_like(state)),
    backward=lambda ctx, go, gs: fla_rule_back(go.contiguous(), gs.contiguous(), *ctx.saved_tensors),
)
def fla_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """delta_rule without starts, by flash-linear-attention."""
    return chunk_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )


def fused_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    starts: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """delta_rule by flash-linear-attention's kernels."""
    # the kernels know no starts: a start is a decay to nothing
    g = at_least_fp32(g).masked_fill(starts[..., None], FORGET)
    return fla_rule(*(x.contiguous() for x in (q, k, v, g, beta, state)))


class Kernels(NamedTuple):
    """The functions that a model computes its heavy parts with."""

    cross_entropy: Callable[..., Tensor]
    mlp: Callable[..., Tensor] | None  # None: the modules' own plain forward
    norm_rotate: Callable[..., tuple[Tensor, Tensor, Tensor]] = norm_rotate
    remove_self_value: Callable[..., Tensor] = remove_self_value
    delta_rule: Callable[..., tuple[Tensor, Tensor]] = delta_rule


PLAIN = Kernels(softcapped_cross_entropy, None)
FUSED = Kernels(fused_cross_entropy, fused_mlp, fused_norm_rotate, fused_self_value, fused_delta_rule)


def choose_kernels(cfg: Config, runtime: Runtime) -> Kernels:
    """Choose and log the kernels of a run. UserError if a knob asks for one that cannot run here."""
    gpu = triton is not None and runtime.device.type == "cuda"
    half = gpu and runtime.dtype == torch.bfloat16
    # a bulk copy moves multiples of 16 bytes: 8 numbers of bf16
    aligned = cfg.model_dim % 8 == 0 and int(cfg.mlp_mult * cfg.model_dim) % 8 == 0
    head = cfg.model_dim // cfg.num_heads
    # Triton's blocks are powers of 2
    turns = half and head.bit_count() == (cfg.rope_dims // 2).bit_count() == 1
    fla = chunk_gated_delta_rule is not None
    # in the order of Kernels: knob, whether its kernel can run here, what it needs beside a GPU and Triton
    needs = (
        ("fused_ce_enabled", gpu, ""),
        ("fused_mlp_enabled", half and aligned, ", COMPUTE_DTYPE=bf16 and widths that are multiples of 8"),
        ("fused_rotary_enabled", turns, ", COMPUTE_DTYPE=bf16, and powers of 2 as head width and as ROPE_DIMS"),
        ("fused_xsa_enabled", half and head.bit_count() == 1, ", COMPUTE_DTYPE=bf16 and a power of 2 as head width"),
        ("fused_gdn_enabled", half and fla, ", COMPUTE_DTYPE=bf16 and flash-linear-attention"),
    )
    chosen = []
    for (name, usable, needed), fused, plain in zip(needs, FUSED, PLAIN, strict=True):
        wanted = getattr(cfg, name)
        if wanted == "1" and not usable:
            raise UserError(f"{name.upper()}=1 needs a GPU, triton{needed}; set {name.upper()}=auto")
        chosen.append(fused if usable and wanted != "0" else plain)
        runtime.log(f"{name}: {'fused' if chosen[-1] is fused else 'plain'}")
    return Kernels(*chosen)


# +--------------------------------------------------------------------------------------------------------------------+
# | 06 MODEL PARTS                                                                                                     |
# +--------------------------------------------------------------------------------------------------------------------+


class Site(NamedTuple):
    """A place where a listener can read and change the model's activations."""

    # q k v o up down head (qkv and delta_z in a delta net): a matmul; attn, mlp: a whole sublayer; lookup: of ids
    name: str
    execution: int  # position in the route; the head's is -1
    layer: int


class Taps(Protocol):
    """A listener: called at each of its sites, it returns the output that goes on in place of y."""

    sites: frozenset[str]  # names of the sites that it hears

    def __call__(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """x and y: input and output of a matmul, or the normed input and the output of a sublayer."""


class LayerTap:
    """The listener as one layer execution calls it. Where it does not hear, outputs pass through."""

    def __init__(self, taps: Taps | None, execution: int = -1, layer: int = -1) -> None:
        self.taps, self.execution, self.layer = taps, execution, layer
        self.sites = frozenset() if taps is None else taps.sites

    def __call__(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        return self.taps(Site(name, self.execution, self.layer), x, y) if name in self.sites else y


Init = Callable[[Tensor, float, torch.Generator], Any]  # (weight, start, generator): fills the weight in place


def constant(w: Tensor, start: float, generator: torch.Generator) -> None:
    """Every entry is `start`."""
    w.fill_(start)


def normal(w: Tensor, start: float, generator: torch.Generator) -> None:
    """Standard deviation `start`. Drawn in float32 whatever the dtype, so that all dtypes start alike."""
    w.copy_(torch.randn(w.shape, generator=generator) * start)


def orthogonal(w: Tensor, start: float, generator: torch.Generator) -> None:
    """Orthonormal rows or columns, whichever are fewer."""
    nn.init.orthogonal_(w, generator=generator)


def uniform(w: Tensor, start: float, generator: torch.Generator) -> None:
    """Uniform in +-1/sqrt(columns), as torch's own linear layers and convolutions."""
    nn.init.uniform_(w, -(w.size(1) ** -0.5), w.size(1) ** -0.5, generator=generator)


def stream_alone(w: Tensor, start: float, generator: torch.Generator) -> None:
    """Residual mix (2, D): all of the stream, nothing of the embedding."""
    w[0] = 1
    w[1] = 0


def log_decay_rate(w: Tensor, start: float, generator: torch.Generator) -> None:
    """log A of a delta net, with A log-uniform in 1..8."""
    w.uniform_(0, math.log(8), generator=generator)


def decay_step(w: Tensor, start: float, generator: torch.Generator) -> None:
    """The bias whose softplus is a delta net's step, log-uniform in 0.001..0.1."""
    dt = w.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp()
    w.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


class Role(NamedTuple):
    """A kind of weight: everything that depends on the kind stands in its row of ROLES and nowhere else."""

    init: Init  # initial values
    start: float | str = 0.0  # what init gets: a number, or the knob that holds it
    optimiser: str = "adamw"  # muon or adamw
    lr: str = "scalar_lr"  # knob of the learning rate
    wd: str = "adam_wd"  # knob of the decoupled weight decay
    store: str = "fp16"  # how it is quantised: a key of STORES
    clip: str = ""  # knob of the clip, in standard deviations of a row
    hessian: str = ""  # tap site whose input it multiplies: GPTQ calibrates there
    stream: str = ""  # stream of the artifact that holds its integers; empty: the first, with all small things
    ttt_lr_mult: str = ""  # knob of a factor on TTT_LR


EMBED = ("adamw", "tied_embed_lr", "embed_wd")
MUON = ("muon", "matrix_lr", "muon_wd")
ATTN = (*MUON, "matrix", "attn_clip_sigmas")
MLP_MATRIX = (*MUON, "matrix", "mlp_clip_sigmas")
ROLES = {  # the tap at a matrix of a block has the name of its role
    "embed": Role(normal, "tied_embed_init_std", *EMBED, "embed", "embed_clip_sigmas", "head", "embed"),  # tied head
    "hash_table": Role(constant, 0.0, *EMBED, "table", "embed_clip_sigmas"),
    "value_table": Role(normal, 0.01, *EMBED, "table", "embed_clip_sigmas"),
    "q": Role(orthogonal, 0.0, *ATTN, "q", "q"),
    "k": Role(orthogonal, 0.0, *ATTN, "q", "k"),  # q, k and v read the same input
    "v": Role(orthogonal, 0.0, *ATTN, "q", "v"),
    "qkv": Role(orthogonal, 0.0, *ATTN, "qkv"),
    "delta_z": Role(orthogonal, 0.0, *ATTN, "qkv"),
    "o": Role(constant, 0.0, *ATTN, "o", "o"),
    "up": Role(orthogonal, 0.0, *MLP_MATRIX, "up", "up"),
    "down": Role(constant, 0.0, *MLP_MATRIX, "down", "down"),
    "delta_ba": Role(uniform, 0.0, *MUON, ttt_lr_mult="gdn_ttt_lr_mult"),
    "delta_taps": Role(uniform, ttt_lr_mult="gdn_ttt_lr_mult"),
    "delta_decay": Role(log_decay_rate, ttt_lr_mult="gdn_ttt_lr_mult"),
    "delta_step": Role(decay_step, ttt_lr_mult="gdn_ttt_lr_mult"),
    "projection": Role(orthogonal),
    "hash_scale": Role(constant, 0.05),
    "value_scale": Role(constant, 0.1),
    "half_open_gate": Role(constant, 0.0, store="gate"),
    "gate_bias": Role(constant, 4.0),  # nearly open
    "q_gain": Role(constant, "qk_gain_init"),
    "sink": Role(constant, 0.0),  # logit 0
    "value_lambda": Role(constant, 0.5),
    "scale": Role(constant, 1.0),
    "shut": Role(constant, 0.0),  # gates and scales that begin as the identity, or half open inside a sigmoid
    "residual_mix": Role(stream_alone),
    "lane_residual": Role(constant, 1.1),
}


def make_weight(role: str, *shape: int, dtype: torch.dtype = torch.float32, trained: bool = True) -> nn.Parameter:
    """A parameter that knows its role, a key of ROLES, and its layer (-1: of no layer; Block sets it)."""
    p = nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=trained)
    p.role, p.layer = role, -1
    return p


@torch.no_grad()
def init_weights(module: nn.Module, cfg: Config, generator: torch.Generator) -> None:
    """Fill every parameter by its role, on the CPU whatever the device, so that every rank draws the same."""
    for p in module.parameters():
        role = ROLES[p.role]
        role.init(p, getattr(cfg, role.start) if isinstance(role.start, str) else role.start, generator)


class Linear(nn.Module):
    """y = x W^T with W (out, in) kept in dtype and cast to x's dtype at use; no bias."""

    def __init__(self, role: str, d_in: int, d_out: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = make_weight(role, d_out, d_in, dtype=dtype)

    def scaled(self, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype, its rows times `rows` (out,) where there are any."""
        weight = self.weight if rows is None else rows[:, None] * self.weight
        return weight.to(dtype)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        return F.linear(x, self.scaled(rows, x.dtype))


class HeadGate(nn.Module):
    """sigmoid(scale * (W n[:window] + b)) per head, of the normed sublayer input n. b only when biased."""

    def __init__(self, role: str, shape: tuple[int, int], scale: float = 1.0, biased: bool = False) -> None:
        super().__init__()
        self.weight = make_weight(role, *shape)
        self.bias = make_weight("gate_bias", shape[0]) if biased else None
        self.scale = scale

    def forward(self, n_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, H, 1)."""
        source = n_BTD[..., : self.weight.size(1)]
        bias = None if self.bias is None else self.bias.to(source.dtype)
        logits = F.linear(source, self.weight.to(source.dtype), bias)
        return torch.sigmoid(self.scale * logits).unsqueeze(-1)


GATES = {
    "none": lambda c: None,
    "sparse": lambda c: HeadGate("half_open_gate", (c.num_heads, c.gate_window), c.sparse_attn_gate_scale),
    "dense_bias": lambda c: HeadGate("half_open_gate", (c.num_heads, c.model_dim), biased=True),
}


class Projected(nn.Module):
    """scale * P table[id]: an embedding in EMBED_DTYPE, projected to a width by P where it is narrower."""

    def __init__(self, role: str, rows: int, dim: int, width: int, cfg: Config) -> None:
        super().__init__()
        self.table = Linear(f"{role}_table", dim, rows, DTYPES[cfg.embed_dtype])
        self.proj = Linear("projection", dim, width) if dim != width else None
        self.scale = make_weight(f"{role}_scale", 1)

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T) rows of the table -> (B, T, width)."""
        e = F.embedding(ids, self.table.weight).to(dtype)
        return (e if self.proj is None else self.proj(e)) * self.scale.to(dtype)


class HashEmbedding(Projected):
    """Adds an embedding of the last `order` tokens, hashed into one table (BigramHash and TrigramHash of PR 1182).

    With HASH_BOS_MASK a document's first token has no predecessor.
    """

    # The hash is an XOR of the tokens times constants, taken as a signed 32-bit number, modulo all rows but the last,
    # which is for a token without a predecessor. With fewer than order - 1 predecessors it is the hash of those that
    # exist.

    # of the token itself, the one before it, and the one before that
    MULTIPLIERS = (36313, 27191, 51497)

    def __init__(self, cfg: Config, order: int, rows: int, dim: int, trained: bool = True) -> None:
        super().__init__("hash", rows, dim, cfg.model_dim, cfg)
        self.multipliers, self.rows, self.reach = self.MULTIPLIERS[:order], rows, order - 1
        self.first_id = BOS_ID if cfg.hash_bos_mask else -1
        self.requires_grad_(trained)

    def buckets(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T) rows of the table."""
        # whether a token has a predecessor
        follows = F.pad(ids[:, 1:] != self.first_id, (1, 0))
        # whether the token `back` before exists
        seen = torch.ones_like(follows)
        key = self.multipliers[0] * ids
        earlier = ids
        for multiplier in self.multipliers[1:]:
            seen = follows & F.pad(seen[:, :-1], (1, 0))
            earlier = F.pad(earlier[:, :-1], (1, 0))
            key = key ^ torch.where(seen, multiplier * earlier, 0)
        # wrap in 64 bits: compiled code may not rely on int32 overflow
        signed = (key + 2**31) % 2**32 - 2**31
        bucket = signed % (self.rows - 1)
        return torch.where(follows, bucket, self.rows - 1)

    def forward(self, ids: Tensor, e_BTD: Tensor) -> Tensor:
        return e_BTD + self.look_up(self.buckets(ids), e_BTD.dtype)


def previous(x_BTD: Tensor) -> Tensor:
    """Each token gets its predecessor's row; the first gets zeros."""
    return F.pad(x_BTD[:, :-1], (0, 0, 1, 0))


class Smear(nn.Module):
    """e_t + lambda * sigmoid(w . e_t[:window]) * e_{t-1}; with SMEAR_BOS_MASK a document's first token keeps e_t."""

    reach = 1  # earlier tokens that an output depends on

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.weight = make_weight("shut", 1, cfg.gate_window)
        self.scale = make_weight("shut", 1)
        self.bos_mask = cfg.smear_bos_mask

    def forward(self, ids: Tensor, e_BTD: Tensor) -> Tensor:
        window = e_BTD[..., : self.weight.size(1)]
        gate = torch.sigmoid(F.linear(window, self.weight.to(e_BTD.dtype)))
        gate = gate * self.scale.to(e_BTD.dtype)
        if self.bos_mask:
            gate = gate.masked_fill((ids == BOS_ID).unsqueeze(-1), 0)
        return e_BTD + gate * previous(e_BTD)


class ChannelSmear(nn.Module):
    """(1 - g) x_t + g x_{t-1}, g = sigmoid(gate) per channel; with SMEAR_BOS_MASK a document's first token keeps x_t.

    As published (PR 1182) it acts on the normed embedding, and position 0 blends with zeros.
    """

    reach = 1

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.gate = make_weight("shut", cfg.model_dim)
        self.first_id = BOS_ID if cfg.smear_bos_mask else -1

    def forward(self, ids: Tensor, x_BTD: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate.to(x_BTD.dtype))
        gate = gate * (ids != self.first_id).unsqueeze(-1)
        return (1 - gate) * x_BTD + gate * previous(x_BTD)


EMBED_EXTRAS = {  # what acts on the embedding, in this order
    "bigram": lambda c: HashEmbedding(c, 2, c.bigram_vocab_size, c.bigram_dim),
    "trigram": lambda c: HashEmbedding(c, 3, c.trigram_vocab_size, c.trigram_dim, c.trigram_trained),
    "smear": Smear,
    "smear_channel": ChannelSmear,
}
NORMED_EXTRAS = ("smear_channel",)  # those that act after the norm


@dataclasses.dataclass
class ValueContext:
    """What the layer executions of one forward pass share about attention's values: the tokens' value embedding
    (B, T, K * d), a scale for each layer that adds it, and the first execution's values once it has run."""

    embedded: Tensor | None = None
    scales: Tensor | None = None
    first: Tensor | None = None


class ValueEmbedding(Projected):
    """Attention values looked up by token (Zhou et al. 2024, as in PR 1182): one projected table, a scale per layer."""

    def __init__(self, cfg: Config) -> None:
        width = cfg.num_kv_heads * cfg.model_dim // cfg.num_heads
        super().__init__("value", cfg.vocab_size, cfg.ve_dim, width, cfg)
        self.layer_scales = make_weight("scale", len(cfg.ve_layers))

    def forward(self, ids: Tensor, dtype: torch.dtype) -> ValueContext:
        return ValueContext(self.look_up(ids, dtype), self.layer_scales.to(dtype))


class ValueResidual(nn.Module):
    """Adds the value embedding to a layer's values (layers in VE_LAYERS), then mixes in the first execution's values
    by two learnt factors (ResFormer, Zhou et al. 2024)."""

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        embedded = "value_embed" in cfg.attn_extras and layer in cfg.ve_layers
        self.scale_index = cfg.ve_layers.index(layer) if embedded else None
        self.lambdas = make_weight("value_lambda", 2) if "value_residual" in cfg.attn_extras else None

    def forward(self, v: Tensor, values: ValueContext) -> Tensor:
        """(B, T, K * d) values of this execution -> the same, mixed. The first execution only leaves its own."""
        if self.scale_index is not None:
            v = v + values.scales[self.scale_index] * values.embedded
        # no value residual: only the value embedding was asked for
        if self.lambdas is None:
            return v
        if values.first is None:
            # later executions mix these in
            values.first = v
            return v
        first, own = self.lambdas.to(v.dtype)  # two learnt numbers
        return first * values.first + own * v


class Attention(nn.Module):
    """Grouped-query attention with QK norm, partial RoPE and a query gain; then XSA and a gate on the outputs."""

    def __init__(self, cfg: Config, layer: int, attend: Attend, kernels: Kernels) -> None:
        super().__init__()
        D, head = cfg.model_dim, cfg.model_dim // cfg.num_heads
        self.q, self.o = Linear("q", D, D), Linear("o", D, D)
        self.k, self.v = (Linear(role, D, cfg.num_kv_heads * head) for role in ("k", "v"))
        self.q_gain = make_weight("q_gain", cfg.num_heads)
        self.sink = make_weight("sink", cfg.num_kv_heads, head) if "sink" in cfg.attn_extras else None
        self.gate = GATES[cfg.attn_gate](cfg)
        self.values = ValueResidual(cfg, layer)
        self.xsa = "xsa" in cfg.attn_extras and layer >= cfg.num_layers - cfg.xsa_last_n
        self.attend, self.kernels, self.head_dim = attend, kernels, head

    def forward(
        self,
        n: Tensor,
        meta: AttnMeta,
        tap: LayerTap,
        values: ValueContext,
        scale: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) normed input -> (B, T, D), times scale (D,)."""
        # one product for all three, which reads n once, and whose backward adds nothing up
        weights = self.q.weight, self.k.weight, self.v.weight
        x = F.linear(n, torch.cat(weights).to(n.dtype))
        sites = ("q", "k", "v")
        if not tap.sites.isdisjoint(sites):
            parts = x.split([len(w) for w in weights], dim=-1)
            x = torch.cat([tap(name, n, part) for name, part in zip(sites, parts, strict=True)], dim=-1)
        x = x.unflatten(-1, (-1, self.head_dim))
        # QK norm bounds the logits; the gain that follows is learnt for each head
        q, k, v = self.kernels.norm_rotate(x, self.q_gain.to(x.dtype), meta.cos, meta.sin)
        v = self.values(v.flatten(2), values).view_as(v)
        attend = self.attend if meta.kv_cache is None else meta.kv_cache.attend
        y = attend(q, k, v, meta, self.sink)
        gate = y.new_ones(*y.shape[:-1], 1) if self.gate is None else self.gate(n)
        y = self.kernels.remove_self_value(y, v, gate) if self.xsa else y * gate
        y = y.flatten(2)
        return tap("attn", n, tap("o", y, self.o(y, scale)))


class DeltaNet(nn.Module):
    """Gated delta net (Yang et al. 2024) as in PR 1895: a convolution over two tokens, ELU + 1 on queries and keys,
    SiLU on values, a decay and a write strength per head; outputs are gated by SiLU and not normed."""

    def __init__(self, cfg: Config, layer: int, attend: Attend, kernels: Kernels) -> None:
        super().__init__()
        D, d, value_heads = cfg.model_dim, cfg.gdn_head_dim, cfg.gdn_v_heads
        self.widths, self.head_dim = [cfg.gdn_qk_heads * d] * 2 + [value_heads * d], d
        self.qkv = Linear("qkv", D, sum(self.widths))
        self.ba = Linear("delta_ba", D, 2 * value_heads)
        self.z = Linear("delta_z", D, value_heads * d)
        self.o = Linear("o", value_heads * d, D)
        self.taps = make_weight("delta_taps", sum(self.widths), 2, trained=cfg.gdn_conv_trained)
        self.A_log = make_weight("delta_decay", value_heads)
        self.dt_bias = make_weight("delta_step", value_heads)
        self.groups, self.rule = value_heads // cfg.gdn_qk_heads, kernels.delta_rule

    def forward(
        self,
        n: Tensor,
        meta: AttnMeta,
        tap: LayerTap,
        values: ValueContext,
        scale: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) normed input -> (B, T, D), times scale (D,)."""
        # causal convolution over two tokens, which does not reach into the segment before
        qkv = tap("qkv", n, self.qkv(n))
        older, newer = self.taps.to(n.dtype).unbind(1)
        before = previous(qkv).masked_fill(meta.starts[..., None], 0)
        qkv = newer * qkv + older * before
        parts = qkv.split(self.widths, dim=-1)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in parts)
        q, k = (F.elu(x) + 1 for x in (q, k))
        q, k = (x.repeat_interleave(self.groups, dim=2) for x in (q, k))
        # write strength sigmoid(b), and Mamba-2's log decay -A softplus(a + dt_bias)
        b, a = at_least_fp32(self.ba(n)).chunk(2, dim=-1)
        rate = F.softplus(a + self.dt_bias)
        g = -self.A_log.exp() * rate
        beta = torch.sigmoid(b)
        state = g.new_zeros(n.size(0), g.size(-1), self.head_dim, self.head_dim)
        y, _ = self.rule(q, k, F.silu(v), g, beta, meta.starts, state)
        z = tap("delta_z", n, self.z(n))
        gate = F.silu(z)
        y = y.flatten(2) * gate
        out = tap("o", y, self.o(y, scale))
        return tap("attn", n, out)


MIXERS = {"A": Attention, "G": DeltaNet}


class MLP(nn.Module):
    """down(LeakyReLU(up(m), slope)^2), by the fused kernel if the run has it and nobody listens at up or down."""

    def __init__(self, cfg: Config, kernels: Kernels) -> None:
        super().__init__()
        hidden = int(cfg.mlp_mult * cfg.model_dim)
        self.up = Linear("up", cfg.model_dim, hidden)
        self.down = Linear("down", hidden, cfg.model_dim)
        self.slope, self.fused = cfg.mlp_slope, kernels.mlp

    def forward(self, m: Tensor, tap: LayerTap, scale: Tensor | None = None) -> Tensor:
        """(B, T, D) normed input -> (B, T, D), times scale (D,)."""
        if self.fused is not None and tap.sites.isdisjoint(("up", "down")):
            y = self.fused(m, self.up.scaled(None, m.dtype), self.down.scaled(scale, m.dtype), self.slope)
        else:
            pre = tap("up", m, self.up(m))
            a = F.leaky_relu(pre, self.slope).square()
            y = tap("down", a, self.down(a, scale))
        return tap("mlp", m, y)


class Block(nn.Module):
    """A layer: a mixer (attention or a delta net) and an MLP, each with a norm before it and a scale after it. The
    model puts them on its residual, one after the other, in parallel, or on two lanes."""

    def __init__(self, cfg: Config, layer: int, attend: Attend, kernels: Kernels) -> None:
        super().__init__()
        self.attn = MIXERS[mixer_letters(cfg)[layer]](cfg, layer, attend, kernels)
        self.mlp = MLP(cfg, kernels)
        self.attn_scale, self.mlp_scale = (make_weight("scale", cfg.model_dim) for _ in range(2))
        self.resid_mix = make_weight("residual_mix", 2, cfg.model_dim)
        # deeper layers read a residual that has grown
        self.input_scale = (layer + 1) ** -0.5 if cfg.ln_scale else 1.0
        for p in self.parameters():
            p.layer = layer

    def mix(self, x: Tensor, x0: Tensor) -> Tensor:
        """Mix the embedding into the residual."""
        m = self.resid_mix.to(x.dtype)
        return m[0] * x + m[1] * x0

    def attend(self, x: Tensor, tap: LayerTap, meta: AttnMeta, values: ValueContext) -> Tensor:
        """What the mixer adds to a residual that reads x, (B, T, D)."""
        return self.added(self.attn, self.attn_scale, x, tap, meta=meta, values=values)

    def transform(self, x: Tensor, tap: LayerTap) -> Tensor:
        """What the MLP adds, (B, T, D)."""
        return self.added(self.mlp, self.mlp_scale, x, tap)

    def added(self, sublayer: nn.Module, scale: Tensor, x: Tensor, tap: LayerTap, **context: Any) -> Tensor:
        """A sublayer's output for a residual x, (B, T, D), times a scale (D,); context: what else it reads."""
        n = rms_norm(x) * self.input_scale
        # Training scales the last matrix's rows and not its output: the same product, rounded once less, and no pass
        # over the tokens for its gradients. A listener wants the output as it is, and scores their published rounding
        if self.training and not tap.sites:
            return sublayer(n, tap=tap, scale=scale, **context)
        y = sublayer(n, tap=tap, **context)
        return scale.to(y.dtype) * y


class Skips(nn.Module):
    """U-net skips from encoder outputs s: x <- q x + (1 - q) w s, or x + w s ungated; a row of w and q per skip."""

    def __init__(self, rows: int, dim: int, gated: bool) -> None:
        super().__init__()
        self.weights = make_weight("scale", rows, dim)
        self.gates = make_weight("shut", rows, dim) if gated else None

    def forward(self, x: Tensor, source: Tensor, row: int) -> Tensor:
        # x and source are (B, T, D), a row of weights is (D,)
        skip = self.weights[row].to(x.dtype) * source
        if self.gates is None:
            return x + skip
        return torch.lerp(skip, x, torch.sigmoid(self.gates[row]).to(x.dtype))


class Lanes(nn.Module):
    """Two residual lanes: each becomes a weighted sum of itself and of both sublayers' outputs."""

    FINAL = {"mean": lambda a, b: 0.5 * (a + b), "mlp": lambda a, b: b, "attn": lambda a, b: a}

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        # layer, source (attention, MLP), lane
        self.post = make_weight("scale", cfg.num_layers, 2, 2)
        self.resid = make_weight("lane_residual", cfg.num_layers, 2)
        self.final = self.FINAL[cfg.parallel_final_lane]

    def forward(
        self,
        lanes: tuple[Tensor, Tensor],
        added: tuple[Tensor, Tensor],
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        # r (lane), p (source, lane): learnt numbers of this layer
        r, p = (w[layer].to(lanes[0].dtype) for w in (self.resid, self.post))
        attn, mlp = added
        first, second = (r[i] * lanes[i] + p[0, i] * attn + p[1, i] * mlp for i in range(2))
        return first, second


# +--------------------------------------------------------------------------------------------------------------------+
# | 07 MODEL                                                                                                           |
# +--------------------------------------------------------------------------------------------------------------------+


@dataclasses.dataclass(frozen=True)
class Route:
    """The order of layer executions, as data: one entry per execution in each tuple."""

    layers: tuple[int, ...]
    mix: tuple[tuple[float, ...], ...]  # LOOP_MIX: beta, and alpha of each execution from loop_start on; or nothing
    loop_start: int
    num_encoder: int  # the first executions, whose outputs the skips read
    skip_source: tuple[int, ...]  # the execution whose output the skip adds; -1: no skip
    parallel: tuple[bool, ...]  # attention and MLP on two lanes
    parallel_block: tuple[bool, ...]  # attention and MLP in parallel on one residual

    def __str__(self) -> str:
        """One line for people."""
        order = list(map(str, self.layers))
        skips = [f"{i}<-{s}" for i, s in enumerate(self.skip_source) if s >= 0]
        two_lanes = self.parallel.index(True) if any(self.parallel) else "none"
        beside = [str(i) for i, on in enumerate(self.parallel_block) if on]
        return (
            f"layers {' '.join(order[: self.num_encoder])} | {' '.join(order[self.num_encoder :])}"
            f"  skips (execution<-execution) {' '.join(skips)}  two lanes from execution {two_lanes}"
            + ("  attention beside MLP in executions " + " ".join(beside))
            * bool(beside)
        )


def plan_route(cfg: Config, looping: bool) -> Route:
    """The route of a model. With looping, layers LOOP_START..LOOP_END run NUM_LOOPS more times."""
    layers, mix = [*range(cfg.num_layers)], [()] * cfg.num_layers
    if looping:
        looped = slice(cfg.loop_start, cfg.loop_end + 1)
        count = len(layers[looped])
        rows = [cfg.loop_mix[i * (count + 1) : (i + 1) * (count + 1)] for i in range(count)]
        layers[looped] = layers[looped] * (cfg.num_loops + 1)
        mix[looped] = mix[looped] + rows * cfg.num_loops
    # the first half is the encoder, and decoder position j takes the j-th last encoder output
    encoder = len(layers) // 2
    skip_source = [-1] * encoder + [max(encoder - 1 - j, -1) for j in range(len(layers) - encoder)]
    # a looped layer keeps its number: what depends on depth follows the layer, not the execution
    late = [0 < cfg.parallel_start_layer <= layer for layer in layers]
    lanes = cfg.parallel_lanes == 2
    # once the residual has split into two lanes, in the decoder, they last to the end
    split = [lanes and any(late[encoder : i + 1]) for i in range(len(layers))]
    beside = [on and not lanes for on in late]
    parts = (skip_source, split, beside)
    return Route(tuple(layers), tuple(mix), cfg.loop_start, encoder, *map(tuple, parts))


def state_starts(ids: Tensor, cu_seqlens: Tensor | None, first_id: int) -> Tensor:
    """(B, T) bool: tokens before which a recurrent state is cleared: first_id, and the first of each segment."""
    starts = (ids == first_id).flatten()
    # boundaries include the end: one more place, cut off again
    if cu_seqlens is not None:
        starts = F.pad(starts, (0, 1)).index_fill(0, cu_seqlens.long(), True)[:-1]
    return starts.view(ids.shape)


def loops(cfg: Config) -> bool:
    """Does a run ever switch depth recurrence on?"""
    return cfg.num_loops > 0 and cfg.enable_looping_at < 1


# CANONICAL_MASK -> the values of Module.training at which the mask counts; whoever evaluates sets training to False
MASKED_WHEN = {"none": (), "eval": (False,), "always": (False, True)}


class GPT(nn.Module):
    """The language model: float32 parameters (the embedding: EMBED_DTYPE), activations in `dtype`; set_looping chooses
    the route."""

    def __init__(
        self,
        cfg: Config,
        attend: Attend = masked_attention,
        dtype: torch.dtype = torch.float32,
        kernels: Kernels = PLAIN,
    ) -> None:
        super().__init__()
        self.tok_emb = Linear("embed", cfg.model_dim, cfg.vocab_size, DTYPES[cfg.embed_dtype])
        self.embed_extras = nn.ModuleDict({n: make(cfg) for n, make in EMBED_EXTRAS.items() if n in cfg.embed_extras})
        self.reach = sum(extra.reach for extra in self.embed_extras.values())
        self.value_embed = ValueEmbedding(cfg) if "value_embed" in cfg.attn_extras else None
        self.blocks = nn.ModuleList(Block(cfg, i, attend, kernels) for i in range(cfg.num_layers))
        self.routes = {on: plan_route(cfg, on) for on in (False, True)}
        self.route = self.routes[False]
        # the looped route has the most skips, and is the one that may split into lanes
        self.skips = Skips(self.routes[True].num_encoder, cfg.model_dim, cfg.skip_gates_enabled)
        self.lanes = Lanes(cfg) if any(self.routes[True].parallel) else None
        # for init_weights alone: the forward pass looks at modules
        self.cfg = cfg
        self.softcap = cfg.logit_softcap
        self.rope = cfg.rope_dims, cfg.rope_base, cfg.rope_reference_len
        self.dtype, self.rope_dtype, self.score_dtype = dtype, DTYPES[cfg.rope_dtype], DTYPES[cfg.score_dtype]
        self.masked = attend is masked_attention
        # else only distances matter
        # a sink's logit and rounded positions depend on where a token stands, not on distances alone
        self.anchored = "sink" in cfg.attn_extras or cfg.rope_dtype != "fp32"
        # -1 is no id: nothing clears a state within a segment
        self.first_id = (BOS_ID if cfg.gdn_bos_reset else -1) if "G" in mixer_letters(cfg) else None
        self.cross_entropy = kernels.cross_entropy
        # (V, V/8) uint8: bit x % 8 of byte x // 8 in row p says that x never follows p; whoever runs the model sets it
        self.register_buffer("canonical", None, persistent=False)
        self.hints = [hint for name, hint in HINTS.items() if name in cfg.hints]
        # of copies by bucket, from the artifact; zeros change nothing
        self.register_buffer("copy_weights", torch.zeros(1 + 2 * len(COPY_LENGTHS)), persistent=False)
        self.masked_when = MASKED_WHEN[cfg.canonical_mask]

    def init_weights(self, seed: int) -> GPT:
        """Initial weights from a seed; the model itself."""
        init_weights(self, self.cfg, torch.Generator().manual_seed(seed))
        return self

    def set_looping(self, on: bool) -> None:
        """Depth recurrence on or off: another route over the same weights."""
        self.route = self.routes[on]

    def plan(
        self,
        length: int,
        device: torch.device,
        cu_seqlens: Tensor | None = None,
        max_len: int = 0,
        rows: int = 1,
        kv_cache: KVCache | None = None,
    ) -> AttnMeta:
        """The AttnMeta of rows of `length` tokens. With a cache, rows continue their documents.

        cu_seqlens: boundaries over the rows * length flattened tokens, row starts among them; max_len: no segment is
        longer (0: not known).
        """
        total, mask = rows * length, None
        if cu_seqlens is not None and self.masked:
            mask = segment_mask(cu_seqlens, total, max_len if max_len > 0 and total % max_len == 0 else total)
        dims, base, reference = self.rope
        stretched = stretched_base(base, dims, max_len or length, reference)
        if kv_cache is not None:
            cos, sin = rotary_at(kv_cache.positions, dims, stretched, max_len)
            return AttnMeta(None, max_len, cos, sin, None, kv_cache=kv_cache)
        # positions count from a document's start only where more than distances matter
        anchored = cu_seqlens is not None and self.anchored
        # published: a stretched table is float32
        dtype = self.rope_dtype if stretched == base else torch.float32
        cos, sin = rotary_tables(total if anchored else length, dims, stretched, device, dtype)
        if anchored:
            token = torch.arange(total, device=device)
            position = (token - cu_seqlens[segments(cu_seqlens, total) - 1]).view(rows, length)
            cos, sin = cos[position], sin[position]
        return AttnMeta(cu_seqlens, max_len, cos, sin, mask)

    def embed(self, ids: Tensor, taps: Taps | None = None) -> Tensor:
        """(B, T) ids -> (B, T, D): the embedding and its extras, normed, then the extras that act after the norm."""
        # tok_emb is the head's matrix: its rows are looked up here, and multiplied there
        x = F.embedding(ids, self.tok_emb.weight).to(self.dtype)
        x = LayerTap(taps)("lookup", ids, x)
        for name, extra in self.embed_extras.items():
            x = x if name in NORMED_EXTRAS else extra(ids, x)
        x = rms_norm(x)
        for name, extra in self.embed_extras.items():
            x = extra(ids, x) if name in NORMED_EXTRAS else x
        return x

    def trunk(self, ids: Tensor, meta: AttnMeta | None = None, taps: Taps | None = None) -> Tensor:
        """(B, T) ids -> (B, T, D) normed hidden states before the head. Without meta: plain causal rows."""
        meta = self.plan(ids.size(1), ids.device) if meta is None else meta
        if self.first_id is not None:
            meta = meta._replace(starts=state_starts(ids, meta.cu_seqlens, self.first_id))
        x = self.embed(ids, taps)
        # cut off what embeddings looked back at; a document's start looks at nothing
        if meta.kv_cache is not None:
            ids = ids[:, self.reach :]
            x = torch.where(meta.kv_cache.first, self.embed(ids), x[:, self.reach :])
        x0 = x
        values = ValueContext() if self.value_embed is None else self.value_embed(ids, self.dtype)
        # outputs: what later skips read, one for each execution
        lanes, outputs, route = (x,), [], self.route
        for execution, layer in enumerate(route.layers):
            lane0, block, tap = lanes[0], self.blocks[layer], LayerTap(taps, execution, layer)
            source = route.skip_source[execution]
            if source >= 0:
                # rows of Skips are in the order of the decoder, so the last encoder output comes first
                lane0 = self.skips(lane0, outputs[source], route.num_encoder - 1 - source)
            u = block.mix(lane0, x0)
            # the mixer reads the same in all three arrangements; what the MLP reads differs
            attended = block.attend(u, tap, meta, values)
            if route.parallel[execution]:
                added = (attended, block.transform(lanes[-1], tap))
                lanes = self.lanes((lane0, lanes[-1]), added, layer)
            else:
                y = u + attended
                lanes = (y + block.transform(u if route.parallel_block[execution] else y, tap),)
            if route.mix[execution]:
                beta, *alphas = route.mix[execution]
                # the first pass's outputs, into which no gradient flows this way
                first = zip(alphas, outputs[route.loop_start :], strict=False)
                lanes = (beta * lanes[0] + sum(alpha * output.detach() for alpha, output in first),)
            outputs.append(lanes[0])
        # shapes: x, lanes and every output are (B, T, D)
        x = self.lanes.final(*lanes) if len(lanes) == 2 else lanes[0]
        return rms_norm(x)

    def logits(self, h: Tensor, taps: Taps | None = None) -> Tensor:
        """Logits (..., V) of hidden states (..., D), before the softcap; but for training, at least in SCORE_DTYPE."""
        wide = h if self.training else h.to(torch.promote_types(h.dtype, self.score_dtype))
        return LayerTap(taps)("head", h, self.tok_emb(wide))

    def loss(self, z: Tensor, targets: Tensor, before: Tensor) -> Tensor:
        """Cross-entropy (n,) in nats for logits z (n, V), targets (n,) and the token before each, (n,): the one place
        where logits become losses, in training, test-time training and scoring. Not in training, targets may carry
        hints (see HINTS)."""
        banned = self.canonical[before] if self.training in self.masked_when else None
        score = functools.partial(self.cross_entropy, z, softcap=self.softcap, banned=banned)
        if self.training or not self.hints:
            return score(targets)
        nll = score(targets & ID_BITS)
        with torch.no_grad():
            mixed = nll
            for _, mix in self.hints:
                mixed = mix(mixed, targets, self.copy_weights, score)
            change = mixed - nll
        # scored with hints, differentiated without: what learns, learns from the plain loss
        return nll + change

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        meta: AttnMeta | None = None,
        taps: Taps | None = None,
        reduction: str = "mean",
        cells: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Softcapped logits (B, T, V) in at least float32, unmasked; with targets (B, T), their loss in nats: a scalar
        for reduction="mean", (B, T) for "none".

        The head may be computed for some positions only: columns (n,), and (B, n) takes the place of (B, T); or
        cells (n,), indices into the B*T flattened positions, and (n) takes their place.
        """
        h = self.trunk(ids, meta, taps)
        # rows that go on from a cache begin with what embeddings look back at, which predicts nothing
        ids = ids[:, ids.size(1) - h.size(1) :]
        if columns is not None:
            # by an index: the graph of a slice would not serve rows of just so many tokens
            h, ids, targets = h[:, columns], ids[:, columns], targets[:, columns]
        if cells is not None:
            # the head is the largest matrix: rows that nobody scores skip it
            h, ids = h.flatten(0, 1)[cells], ids.flatten()[cells]
            targets = targets if targets is None else targets.flatten()[cells]
        z = self.logits(h, taps)
        if targets is None:
            return softcapped(z, self.softcap)
        loss = self.loss(z.flatten(0, -2), targets.flatten(), ids.flatten())
        return loss.mean() if reduction == "mean" else loss.view_as(targets)


def weights_of(cfg: Config) -> dict[str, nn.Parameter]:
    """Name -> parameter of a configuration's model, without memory: shapes, roles and layers of a state dict."""
    with torch.device("meta"):  # shapes alone
        return dict(GPT(cfg).named_parameters())


def weights_by_role(cfg: Config, role: str) -> dict[int, str]:
    """Layer -> name of the weights of a role."""
    return {p.layer: name for name, p in weights_of(cfg).items() if p.role == role}


def on_device(model: GPT, batch: Batch, runtime: Runtime, max_len: int) -> tuple[Tensor, Tensor, AttnMeta]:
    """ids, targets and AttnMeta of a batch on the device. The number of boundaries is a dynamic size of the graph."""
    ids, targets, cu_seqlens = batch.apply(lambda t: to_device(t, runtime.device))
    if cu_seqlens is not None and runtime.compile:
        torch._dynamo.mark_dynamic(cu_seqlens, 0)
    return (
        ids,
        targets,
        model.plan(ids.size(1), ids.device, cu_seqlens, max_len, rows=ids.size(0)),
    )


# +--------------------------------------------------------------------------------------------------------------------+
# | 08 OPTIMISERS                                                                                                      |
# +--------------------------------------------------------------------------------------------------------------------+


def optimiser_groups(model: nn.Module) -> dict[tuple[str, str, str], dict[str, nn.Parameter]]:
    """The parameters of each (optimiser, learning-rate knob, weight-decay knob), by name."""
    groups = {}
    for name, p in model.named_parameters():
        role = ROLES[p.role]
        groups.setdefault((role.optimiser, role.lr, role.wd), {})[name] = p
    return groups


COEFFICIENTS = {  # a, b, c of X <- a X + (b A + c A A) X with A = X X^T; the last triple repeats
    "quintic": ((3.4445, -4.7750, 2.0315),),  # Jordan et al. 2024, Muon
    "polar_express": (  # Amsel et al. 2025, without its 1.02 safety factor
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    "polar_express_safe": tuple(  # the same paper's, of another accuracy, as the package gram-newton-schulz has them
        (a / 1.05, b / 1.05**3, c / 1.05**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        )
    ),
}


def orthogonalize(x: Tensor, coefficients: str, steps: int) -> Tensor:
    """Approximate U V^T of each matrix in x (k, rows, cols) by `steps` Newton-Schulz iterations in x's dtype."""
    triples = COEFFICIENTS[coefficients]
    plan = [triples[min(i, len(triples) - 1)] for i in range(steps)]
    tall = x.size(-2) > x.size(-1)
    # work on the side with fewer rows: products are then smaller
    x = x.mT if tall else x
    # a spectral norm of at most 1, where the polynomials converge
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    # With r rows and c columns, five steps cost 4 r^2 c + 14 r^3 on the Gram matrix and 10 r^2 c + 5 r^3 on x itself
    if 3 * x.size(-2) < 2 * x.size(-1):
        x = gram_iterations(x.half() if x.dtype == torch.bfloat16 else x, plan).to(x.dtype)
        return x.mT if tall else x
    for a, b, c in plan:
        A = x @ x.mT
        x = a * x + (b * A + c * A @ A) @ x
    return x.mT if tall else x


def gram_iterations(x: Tensor, plan: list[tuple[float, float, float]]) -> Tensor:
    """The same iterations on x (k, rows, cols) by products of (rows, rows) matrices alone: Gram Newton-Schulz.

    x becomes Q x, where Q is the product of p = a I + b R + c R R over the steps, and R = x x^T becomes p R p.
    """
    # Rounding errors grow in R, so it is computed again from x after two steps and then after every three. bfloat16
    # still overshoots by half on spectra of four decades; float16 does not, and at norm 1 its range suffices
    cuts = [0, *range(2, len(plan), 3), len(plan)]
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        R, Q = x @ x.mT, None
        for step, (a, b, c) in enumerate(plan[start:stop], start + 1):
            p = torch.baddbmm(R, R, R, beta=b, alpha=c)
            p.diagonal(dim1=-2, dim2=-1).add_(a)
            Q, R = p if Q is None else p @ Q, p @ R @ p if step < stop else R
        x = Q @ x
    return x


@torch.no_grad()
def muon_updates(
    cfg: Config,
    low: torch.dtype,
    shares: list[Tensor],
    buffers: list[Tensor],
    momentum: Tensor,
) -> list[Tensor]:
    """Take gradients (k, rows, cols) of several shapes into their momentum buffers; the orthogonalised directions."""
    updates = []
    for share, buffer in zip(shares, buffers, strict=True):
        # heavy-ball momentum, as in SGD
        buffer.mul_(momentum).add_(share)
        direction = share + momentum * buffer  # Nesterov
        if cfg.muon_row_normalize:
            direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-7)
        # the iterations tolerate bf16; tests in float64 keep it
        x = direction.to(low if direction.dtype == torch.float32 else direction.dtype)
        updates.append(orthogonalize(x, cfg.muon_coefficients, cfg.muon_backend_steps))
    return updates


class Muon:
    """Orthogonalised momentum on 2-D weights (Jordan et al. 2024), stacked by shape and sharded over the ranks.

    Each rank reduces, keeps momentum for, and orthogonalises its share of the matrices of a shape.
    """

    def __init__(self, params: Iterable[nn.Parameter], cfg: Config, runtime: Runtime) -> None:
        shapes = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        # the largest groups first: their communication overlaps the work on the others
        self.groups = sorted(shapes.values(), key=lambda g: -len(g) * g[0].numel())
        self.cfg, self.runtime = cfg, runtime
        # (k, rows, cols): this rank's share of the momentum and of the gradients of each group
        self.buffers = []
        for group in self.groups:
            count = -(-len(group) // runtime.world)
            self.buffers.append(group[0].new_zeros(count, *group[0].shape))
        self.shares = [torch.zeros_like(buffer) for buffer in self.buffers]
        self.momentum = torch.zeros((), dtype=next((b.dtype for b in self.buffers), None), device=runtime.device)
        update = compiled(runtime, muon_updates)
        self.updates = functools.partial(update, cfg, runtime.dtype, self.shares, self.buffers)
        if runtime.compile and runtime.device.type == "cuda":
            # All of these stay where they are, so what is computed between two exchanges is one CUDA graph. Captured
            # here, before there is an NCCL whose threads could spoil it
            capture = functools.partial(torch.cuda.make_graphed_callables, self.updates, (self.momentum,))
            self.updates = captured(runtime, "Muon", capture, self.updates)

    def reduce(self) -> list[Tensor]:
        """This rank's shares (k, rows, cols) of the gradients averaged over the ranks, in the parameters' dtype."""
        world, parts, waits = self.runtime.world, [], []
        for group, share in zip(self.groups, self.shares, strict=True):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            if world == 1:
                torch.stack(grads, out=share)
                continue
            # whole shares for every rank; sent in bf16 on a GPU, half the bytes
            missing = len(share) * world - len(group)
            padded = F.pad(torch.stack(grads), (0, 0, 0, 0, 0, missing)).to(self.runtime.dtype)
            parts.append(torch.empty_like(padded[: len(share)]))
            waits.append(reduce_scatter(parts[-1], padded, async_op=True))
        # every reduce is launched before the first is awaited
        for work, share, part in zip(waits, self.shares, parts, strict=False):
            work.wait()
            torch.div(part.to(share.dtype), world, out=share)
        return self.shares

    def step(self, lr: float, momentum: float) -> None:
        """One update from the shares, as they are now."""
        # each rank has orthogonalised its share; all need all of them
        updates = self.gather(self.updates(self.momentum.fill_(momentum)))
        for group, update in zip(self.groups, updates, strict=True):
            rows, cols = group[0].shape
            # decoupled weight decay, then a step whose size does not depend on the shape
            torch._foreach_mul_(group, 1 - lr * self.cfg.muon_wd)
            changes = update.to(group[0].dtype).unbind()
            torch._foreach_add_(group, changes, alpha=-lr * math.sqrt(max(1.0, rows / cols)))

    def gather(self, shares: list[Tensor]) -> list[Tensor]:
        """All k matrices (k, rows, cols) of each group, on every rank, from the shares of the ranks."""
        world, wholes, waits = self.runtime.world, shares, []
        if world > 1:
            wholes = [share.new_empty(len(share) * world, *share.shape[1:]) for share in shares]
            for whole, share in zip(wholes, shares, strict=True):
                waits.append(all_gather(whole, share.contiguous(), async_op=True))
        # every exchange is launched before the first is awaited
        for work in waits:
            work.wait()
        # without the padding, so that another number of ranks can share momenta out
        return [whole[: len(group)] for group, whole in zip(self.groups, wholes, strict=True)]

    def set_momenta(self, momenta: list[Tensor]) -> None:
        """Take this rank's share of all momenta (k, rows, cols), as gather returned them."""
        for momentum, buffer in zip(momenta, self.buffers, strict=True):
            share = momentum[self.runtime.rank * len(buffer) :][: len(buffer)]
            buffer[: len(share)].copy_(share)


class Optimisers:
    """Muon and AdamW by the parameters' roles, with one global-norm clip of the averaged gradient.

    A parameter that was built with requires_grad off is left alone.
    """

    def __init__(self, cfg: Config, model: nn.Module, runtime: Runtime) -> None:
        self.cfg, self.runtime = cfg, runtime
        muon, groups = [], []
        for (optimiser, lr, wd), named_params in optimiser_groups(model).items():
            params = [p for p in named_params.values() if p.requires_grad]
            if optimiser == "muon":
                muon += params
            else:
                groups.append({"params": params, "weight_decay": getattr(cfg, wd), "base_lr": getattr(cfg, lr)})
        self.muon = Muon(muon, cfg, runtime)
        self.adamw = torch.optim.AdamW(
            groups,
            lr=0.0,
            betas=(cfg.beta1, cfg.beta2),
            eps=cfg.adam_eps,
            fused=runtime.device.type == "cuda",
        )
        self.small = [p for group in self.adamw.param_groups for p in group["params"]]

    def reduce_small(self) -> None:
        """Average the AdamW gradients over the ranks, as one flat tensor."""
        for p in self.small:
            # not every weight is reached on every route, but every rank has to send the same number of bytes
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if self.runtime.world == 1:
            return
        flat = self.runtime.sum_(torch.cat([p.grad.flatten() for p in self.small])) / self.runtime.world
        parts = flat.split([p.numel() for p in self.small])
        for p, part in zip(self.small, parts, strict=True):
            p.grad.copy_(part.view_as(p))

    def clip(self, shares: list[Tensor]) -> None:
        """Scale shares and small gradients so that the global norm is at most GRAD_CLIP_NORM."""
        grads = [p.grad for p in self.small]
        # each rank has its own shares, but all of the small gradients
        share_norms = torch._foreach_norm(shares)
        squares = self.runtime.sum_(torch.stack(share_norms).square().sum())
        small_norms = torch._foreach_norm([at_least_fp32(g) for g in grads])
        norm = (squares + torch.stack(small_norms).square().sum()).sqrt()
        # the factor stays on the device, so the host waits for nothing
        factor = (self.cfg.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(shares, factor)
        # _foreach is fast on one dtype at a time
        for dtype in dict.fromkeys(g.dtype for g in grads):
            torch._foreach_mul_([g for g in grads if g.dtype == dtype], factor)

    @torch.no_grad()
    def step(self, multiplier: float, step: int) -> None:
        """One update from the parameters' .grad, which is cleared."""
        cfg = self.cfg
        shares = self.muon.reduce()
        self.reduce_small()
        if cfg.grad_clip_norm > 0:
            self.clip(shares)
        # AdamW knows no schedule: the rate is set for every step
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * multiplier
        self.adamw.step()
        # low at first: early gradients soon point elsewhere
        momentum = muon_momentum(
            step,
            cfg.muon_momentum_warmup_start,
            cfg.muon_momentum,
            cfg.muon_momentum_warmup_steps,
        )
        self.muon.step(cfg.matrix_lr * multiplier, momentum)
        for p in [*self.small, *(p for group in self.muon.groups for p in group)]:
            p.grad = None

    def clear(self) -> None:
        """Back to the state before the first step."""
        self.adamw.state.clear()
        for buffer in self.muon.buffers:
            buffer.zero_()


# +--------------------------------------------------------------------------------------------------------------------+
# | 09 TRAINING                                                                                                        |
# +--------------------------------------------------------------------------------------------------------------------+


def lr_multiplier(fraction: float, warmdown_frac: float, floor: float) -> float:
    """1, then linear decay over the last warmdown_frac of the run, not under the floor."""
    if fraction < 1 - warmdown_frac or warmdown_frac <= 0:
        return 1.0
    return max((1 - fraction) / warmdown_frac, floor)


def warmdown_share(cfg: Config, fraction: float, step: int) -> float:
    """Fraction of the run that the warmdown takes: WARMDOWN_FRAC, or WARMDOWN_ITERS steps at the mean pace so far."""
    if cfg.warmdown_iters and cfg.max_wallclock_seconds <= 0:
        # counted in steps, it may be longer than the run, and is so from the first step on
        return cfg.warmdown_iters / cfg.iterations
    return cfg.warmdown_iters * fraction / max(step, 1) if cfg.warmdown_iters else cfg.warmdown_frac


def muon_momentum(step: int, start: float, end: float, ramp_steps: int) -> float:
    """Linear warm-up of the momentum over ramp_steps."""
    return start + (end - start) * min(step / ramp_steps, 1.0) if ramp_steps > 0 else end


class Progress(NamedTuple):
    """Where a run is when a step begins."""

    step: int  # from 0
    fraction: float  # of the run that is done
    multiplier: float  # of the learning rates

    @classmethod
    def at(cls, cfg: Config, fraction: float, step: int) -> Progress:
        """The step with its LR multiplier."""
        warmdown = warmdown_share(cfg, fraction, step)
        return cls(step, fraction, lr_multiplier(fraction, warmdown, cfg.min_lr))


def graphs_of(cfg: Config) -> list[tuple[int, bool]]:
    """(longest attention span, looping?) of a run's steps, in their order; each needs a graph."""
    # both change at these fractions alone; a span holds up to its limit, so the next one begins just after it
    starts = [0.0, cfg.enable_looping_at, *(math.nextafter(x, 2) for x, _ in cfg.train_seq_schedule)]
    steps = [Progress(0, x, 1.0) for x in sorted(starts) if x < 1]
    found = ((STAGES["span"](cfg, now), loops(cfg) and STAGES["looping"](cfg, now)) for now in steps)
    return list(dict.fromkeys(found))


# What changes during a run, and at which steps it is on, or with which value: one row for each thing that a knob can
# switch on.
STAGES: dict[str, Callable[[Config, Progress], bool | int]] = {
    "span": lambda c, now: up_to((*c.train_seq_schedule, UpTo(math.inf, c.train_seq_len)), now.fraction),
    "looping": lambda c, now: now.fraction >= c.enable_looping_at,
    "ste": lambda c, now: now.multiplier < c.late_qat_threshold,
    "noise": lambda c, now: now.fraction >= c.qat_noise_start_frac and now.step % c.qat_noise_every == 0,
    "swa": lambda c, now: now.multiplier < c.swa_start_scale and (now.step + 1) % c.swa_every == 0,
}


class Ema:
    """Exponential moving average of tensors, float32, without bias correction: it starts at their initial values."""

    def __init__(self, cfg: Config, source: list[Tensor]) -> None:
        self.decay, self.source = cfg.ema_decay, source
        self.shadow = [at_least_fp32(p.detach()).clone() for p in source]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the tensors as they are after a step."""
        torch._foreach_lerp_(self.shadow, [at_least_fp32(p) for p in self.source], 1 - self.decay)


class Swa:
    """Mean of snapshots of tensors, float32 (Izmailov et al. 2018); without a snapshot, the tensors themselves."""

    def __init__(self, cfg: Config, source: list[Tensor]) -> None:
        self.source, self.shadow, self.count = source, source, 0

    @torch.no_grad()
    def update(self) -> None:
        """Take a snapshot."""
        if not self.count:
            # until the first snapshot the shadow is the weights
            self.shadow = [torch.zeros_like(at_least_fp32(p.detach())) for p in self.source]
        self.count += 1
        torch._foreach_lerp_(self.shadow, [at_least_fp32(p) for p in self.source], 1 / self.count)


AVERAGES = {"ema": Ema, "swa": Swa}  # in this order: each averages what the one before it holds


def averages_of(cfg: Config, params: list[Tensor]) -> dict[str, Ema | Swa]:
    """The chain of averages of AVERAGE; the `shadow` of the last is what training ends with."""
    chain, source = {}, params
    for name, average in AVERAGES.items():
        if name in cfg.average:
            chain[name] = average(cfg, source)
            source = chain[name].shadow
    return chain


class FakeQuantSTE:
    """Quantisation-aware training with the straight-through estimator (Bengio et al. 2013).

    The forward pass sees the weights on the grid that they will be stored on; their gradient goes to the weights
    themselves. For every weight that is stored in under 8 bits.
    """

    def __init__(self, cfg: Config, model: nn.Module) -> None:
        self.cfg, plan = cfg, quant_plan(cfg)
        # which rows are frequent, and so have more bits, is not known before the calibration
        rounded = {name for name, rule in plan.items() if rule.bits < 8 and not SCHEMES[rule.scheme].counts}
        self.jobs = [(p, plan[name]) for name, p in model.named_parameters() if name in rounded]
        self.params = [p for p, _ in self.jobs]

    @torch.no_grad()
    def values(self, step: int) -> list[Tensor]:
        """What the forward pass of a step sees instead of self.params."""
        rounded = []
        for p, rule in self.jobs:
            scheme = SCHEMES[rule.scheme]
            scale = (scheme.qat_scale or scheme.scale)(p, rule, self.cfg)
            rounded.append(fake_quantize(p, scale.float(), rule.bits).to(p.dtype))
        return rounded


class QuantNoise:
    """Quantisation-aware training by Gaussian noise, QAT_NOISE_MULT of the rounding error of a uniform grid.

    Weights are chosen by name; the noise is the same on every rank, and the optimiser sees the weights without it.
    """

    def __init__(self, cfg: Config, model: nn.Module) -> None:
        self.cfg = cfg
        matrices = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
        self.params = [p for name, p in matrices if any(fits(name, word) for word in cfg.qat_noise_patterns)]
        if not self.params:
            raise UserError(f"QAT_NOISE_PATTERNS={format_knob(cfg.qat_noise_patterns)} is in no name of a matrix")

    @torch.no_grad()
    def values(self, step: int) -> list[Tensor]:
        """What the forward pass of a step sees instead of self.params."""
        cfg, noisy = self.cfg, []
        generator = torch.Generator(self.params[0].device).manual_seed(cfg.seed * 2**20 + step)
        for p in self.params:
            # the grid of the weight's kind; small matrices, which have no clip, get that of attention
            bits = cfg.embed_bits if ROLES[p.role].store in ("embed", "table") else cfg.matrix_bits
            scale = sigma_clip_scale(p, bits, getattr(cfg, ROLES[p.role].clip or "attn_clip_sigmas"))
            # the error of rounding to a grid is uniform over one interval, whose variance is its square / 12
            rounding = scale / math.sqrt(12)
            draw = torch.randn(p.shape, generator=generator, device=p.device)
            noisy.append((p + draw * (cfg.qat_noise_mult * rounding)[:, None]).to(p.dtype))
        return noisy


QATS = {"none": None, "ste": FakeQuantSTE, "noise": QuantNoise}


@contextlib.contextmanager
@torch.no_grad()
def temporarily_set(params: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """Inside the block the parameters hold other values, in place, where a compiled graph reads them.

    What the block itself does to them is undone too. Its gradients are on as they were: no_grad ends at the yield.
    """
    # copies: the values are written into the parameters themselves
    kept = [p.clone() for p in params]
    torch._foreach_copy_(params, values)
    try:
        yield
    finally:
        torch._foreach_copy_(params, kept)


class TrainReport(NamedTuple):
    """How a training run ended."""

    steps: int
    seconds: float
    loss: float


class Hooks(NamedTuple):
    """What a training asks of the run that it belongs to."""

    evaluate: Callable[[], Score]  # the model as it is
    checkpoint: Callable[[dict[str, Any]], None]  # keep a Trainer.snapshot
    milestone: Callable[[TrainReport], None]  # keep the model as it is, for the later stages


class Trainer:
    """The training loop: warm-up outside the clock, then steps until rank 0's clock or ITERATIONS says stop."""

    def __init__(self, cfg: Config, runtime: Runtime, model: GPT, metrics: Path | None) -> None:
        self.cfg, self.runtime, self.model, self.metrics = cfg, runtime, model, metrics
        self.forward = compiled(runtime, model)
        self.optimisers = Optimisers(cfg, model, runtime)
        self.params = list(model.parameters())
        self.averages = averages_of(cfg, self.params)
        self.qat = QATS[cfg.qat](cfg, model) if QATS[cfg.qat] else None
        # a stage is on if a knob names it; looping has knobs of its own
        chosen = {cfg.qat, *cfg.average, *["looping"] * loops(cfg), "span"}
        self.stages, self.begun = chosen & STAGES.keys(), set()
        # calibration runs inside the budget too, so training ends that much earlier
        budget = cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds if cfg.max_wallclock_seconds > 0 else 0.0
        self.clock = Clock(runtime, budget, cfg.iterations)
        self.loss = torch.zeros((), device=runtime.device)
        self.reported_step = 0
        # the longest attention span, and the step at which it last changed
        self.span = self.changed = 0
        self.checkpointed = time.perf_counter()

    def step(self, batches: dict[int, list[Batch]], multiplier: float, step: int, rounded: bool = False) -> None:
        """Gradients of this rank's micro-batches and one optimiser step; self.loss is their mean loss.

        rounded: the forward pass sees the weights as QAT has them.
        """
        # of this step; other ranks' parts are added when somebody reads it
        self.loss = torch.zeros((), device=self.runtime.device)
        weights = contextlib.nullcontext()
        if rounded:
            weights = temporarily_set(self.qat.params, self.qat.values(step))
        with weights:
            for batch in batches[self.span]:
                inputs = on_device(self.model, batch, self.runtime, self.span)
                loss = self.forward(*inputs) / len(batches[self.span])
                loss.backward()
                # stays on the device: nobody waits for it
                self.loss += loss.detach()
        self.optimisers.step(multiplier, step)

    def stages_at(self, now: Progress) -> dict[str, bool | int]:
        """The stages that a step is in. The log says when one begins; looping changes the route, a span the batches."""
        on = {name: value for name in self.stages if (value := STAGES[name](self.cfg, now))}
        for name, value in sorted(on.items() - self.begun):
            what = "on" if value is True else value
            self.runtime.log(f"{name} {what} from step {now.step}, fraction {now.fraction:.3f}")
            # steps take longer or shorter from here on
            self.clock.expect_change()
        self.begun.update(on.items())
        self.model.set_looping("looping" in on)
        if on["span"] != self.span:
            self.span, self.changed = on["span"], now.step
        return on

    def advance(self, batches: dict[int, list[Batch]], fraction: float, step: int) -> None:
        """Step number `step`, from 0, with the stages that it is in, and the averages after it."""
        now = Progress.at(self.cfg, fraction, step)
        on = self.stages_at(now)
        # the run's first span is no change
        ramp = (step + 1 - self.changed) / self.cfg.seq_change_warmup_steps if self.changed else 1.0
        self.step(batches, now.multiplier * min(ramp, 1.0), step, rounded=not on.keys().isdisjoint(QATS))
        for name, average in self.averages.items():
            if name not in STAGES or name in on:
                average.update()

    def warm_up(self) -> None:
        """Compile every graph and let allocators settle, then roll back weights, moments and the order of the data."""
        started, rolled_back = time.perf_counter(), temporarily_set(self.params, self.params)
        # warm-up trains for real, on the data that the run begins with
        with rolled_back, contextlib.closing(train_batches(self.cfg, self.runtime)) as batches:
            for span, looping in graphs_of(self.cfg):
                self.span = span
                self.model.set_looping(looping)
                for step in range(self.cfg.warmup_steps):
                    self.step(next(batches), 1.0, step)
                    self.runtime.log.progress(
                        f"warm-up (span {span}, looping {looping})", step + 1, self.cfg.warmup_steps, started
                    )
        self.model.set_looping(False)
        self.optimisers.clear()
        self.runtime.log(
            f"warm-up: {self.cfg.warmup_steps} steps per graph, rolled back, "
            f"{time.perf_counter() - started:.1f} s outside the clock"
        )

    def mean_loss(self) -> float:
        """Loss of the last step over all ranks, nats per token; waits for the device."""
        return self.runtime.sum_(self.loss.clone()).item() / self.runtime.world

    def report(self, step: int, fraction: float, seconds: float) -> None:
        """Log line and metrics after `step` steps; stops the run on a loss that is not finite."""
        loss = self.mean_loss()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"training loss is {loss} at step {step}; the files of earlier stages are untouched. Lower "
                "MATRIX_LR, TIED_EMBED_LR or SCALAR_LR, or check the data"
            )
        due = step <= 5 or step % self.cfg.train_log_every == 0 or fraction >= 1
        if not due or step == self.reported_step:
            return
        self.reported_step = step
        tokens = step * self.cfg.train_batch_tokens
        # by the mean pace so far
        left = seconds / fraction * (1 - fraction) if fraction > 0 else math.nan
        self.runtime.log(
            f"step {step} train_loss {loss:.4f} {seconds:.1f} s {1e3 * seconds / step:.1f} ms/step "
            f"{tokens / seconds:,.0f} tok/s, about {max(left, 0):.0f} s left"
        )
        self.write_metrics(
            {
                "step": step,
                "train_loss": loss,
                "lr_mult": Progress.at(self.cfg, fraction, step).multiplier,
                "seconds": seconds,
                "looping": self.model.route is self.model.routes[True],
            }
        )

    def write_metrics(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self.metrics is not None:
            try:
                with self.metrics.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(record) + "\n")
            except OSError as error:
                self.metrics = None
                self.runtime.log(f"WARNING: the training goes on without its curve: {error}")

    def rewind_metrics(self, step: int) -> None:
        """Drop from metrics.jsonl what an interrupted run wrote after a step; at step 0, everything."""
        if self.metrics is None:
            return
        kept = ""
        # a curve that somebody has deleted is no reason to stop
        text = self.metrics.read_text(encoding="utf-8") if step and self.metrics.is_file() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError):  # the interruption may have cut the last line
                record = json.loads(line)
                # a step begins with its validation, so that of this step comes again
                if (record["step"], "val_loss" in record) <= (step, False):
                    kept += line + "\n"
        atomic_write(self.metrics, kept.encode())

    def snapshot(self, step: int, ended: bool) -> dict[str, Any]:
        """What the steps from `step` on depend on; every rank has to call it. The data's order needs the step alone."""
        swa, muon = self.averages.get("swa"), self.optimisers.muon
        return {
            "step": step,
            "ended": ended,
            "seconds": self.clock.read(),
            "stages": [self.span, self.changed, list(self.begun)],
            "loss": self.mean_loss(),
            "model": self.model.state_dict(),
            "adamw": self.optimisers.adamw.state_dict(),
            "momenta": muon.gather(muon.buffers),
            "averages": [average.shadow for average in self.averages.values()],
            "swa_count": swa.count if swa else 0,
        }

    @torch.no_grad()
    def restore(self, saved: dict[str, Any]) -> None:
        """Go back to a snapshot, in place."""
        self.model.load_state_dict(saved["model"])
        self.optimisers.adamw.load_state_dict(saved["adamw"])
        self.optimisers.muon.set_momenta(saved["momenta"])
        if saved["swa_count"]:
            # before its first snapshot SWA has no tensors of its own
            swa = self.averages["swa"]
            swa.update()
            swa.count = saved["swa_count"]
        for average, shadow in zip(self.averages.values(), saved["averages"], strict=True):
            torch._foreach_copy_(average.shadow, shadow)
        self.span, self.changed, begun = saved["stages"]
        self.begun = set(begun)
        self.loss = torch.full_like(self.loss, saved["loss"])
        self.reported_step = saved["step"]

    def checkpoint(self, step: int, ended: bool) -> None:
        """Give a snapshot to the run if one is due by rank 0's time, or at the end."""
        if not self.cfg.checkpoint_seconds:
            return
        age = self.runtime.broadcast_from_rank0(time.perf_counter() - self.checkpointed)
        if age >= self.cfg.checkpoint_seconds or ended:
            self.hooks.checkpoint(self.snapshot(step, ended))
            self.checkpointed = time.perf_counter()

    def milestone(self, step: int) -> None:
        """Give the weights as a run that ends here would have them to the run, with the clock stopped."""
        elapsed = self.clock.read()
        with temporarily_set(self.params, self.averaged()):
            self.model.set_looping(loops(self.cfg))
            self.hooks.milestone(TrainReport(step, elapsed, self.mean_loss()))
        self.clock.start(elapsed)

    def averaged(self) -> list[Tensor]:
        """The weights that a run which ends now has: the last average, or the last iterate."""
        return [self.params, *(average.shadow for average in self.averages.values())][-1]

    @torch.no_grad()
    def store_average(self) -> None:
        """Put the weight average into the model."""
        swa = self.averages.get("swa")
        if swa is not None:
            self.runtime.log(f"SWA: {swa.count} snapshots")
            if not swa.count:
                self.runtime.log(
                    "WARNING: no step was a multiple of SWA_EVERY with the LR multiplier under "
                    "SWA_START_SCALE: SWA averages nothing; lower SWA_EVERY or raise SWA_START_SCALE"
                )
        torch._foreach_copy_(self.params, self.averaged())

    def validate(self, step: int) -> None:
        """Score the live weights with the clock stopped."""
        elapsed = self.clock.read()
        score = self.hooks.evaluate()
        self.runtime.log(f"step {step} val_loss {score.val_loss:.4f} val_bpb {score.val_bpb:.4f}")
        self.write_metrics({"step": step, "val_loss": score.val_loss, "val_bpb": score.val_bpb})
        self.clock.start(elapsed)

    def run(self, hooks: Hooks, saved: dict[str, Any]) -> TrainReport:
        """Train, from a snapshot if there is one; afterwards the model holds the weight average."""
        cfg, clock, step, seconds, ended, self.hooks = self.cfg, self.clock, 0, 0.0, False, hooks
        self.warm_up()
        if saved:
            step, seconds, ended = saved["step"], saved["seconds"], saved["ended"]
            self.restore(saved)
        # not before: a run that cannot start keeps the curve of the run before it
        self.rewind_metrics(step)
        with contextlib.closing(train_batches(cfg, self.runtime, step)) as source:
            # reading up to the first step may take a while, so it is done before the clock starts
            batches = itertools.chain([next(source)], source)
            clock.start(seconds)
            while not ended and (fraction := clock.fraction(step)) < 1:
                if cfg.val_loss_every and step % cfg.val_loss_every == 0:
                    self.validate(step)
                self.advance(next(batches), fraction, step)
                step += 1
                if step <= 5 or step % 10 == 0 or step % cfg.train_log_every == 0:
                    self.report(step, clock.fraction(step), time.perf_counter() - clock.started)
                if step in cfg.milestones:
                    self.milestone(step)
                self.checkpoint(step, False)
            seconds = seconds if ended else clock.read()
        self.report(step, 1.0, seconds)
        self.checkpoint(step, True)
        self.store_average()
        self.model.set_looping(loops(cfg))
        weights = "+".join(cfg.average) or "last iterate"
        self.runtime.log(f"training stopped at step {step} after {seconds:.2f} s; weights: {weights}")
        return TrainReport(step, seconds, self.mean_loss())


# +--------------------------------------------------------------------------------------------------------------------+
# | 10 QUANTISATION                                                                                                    |
# +--------------------------------------------------------------------------------------------------------------------+


class QuantRule(NamedTuple):
    """How one tensor is stored."""

    scheme: str  # key of SCHEMES
    bits: int
    clip: float = 0.0  # in standard deviations of a row
    awq_groups: tuple[int, ...] = ()  # first columns of the groups that have AWQ_LITE_BITS
    frequent_rows: tuple[int, ...] = ()  # rows that have EMBED_TOP_BITS
    gains: tuple[float, ...] = ()  # factors on the scales of the rows


STORES = {  # Role.store -> (Config) -> its rule, before the clip
    "matrix": lambda c: QuantRule(c.matrix_quant, c.matrix_bits),
    "embed": lambda c: QuantRule(
        c.embed_quant,
        # a scheme that counts tokens gives the frequent rows EMBED_TOP_BITS, and the others these
        c.embed_tail_bits if SCHEMES[c.embed_quant].counts else c.embed_bits,
    ),
    # tables of ids have no input to calibrate on
    "table": lambda c: QuantRule("rowwise" if SCHEMES[c.embed_quant].hessian else c.embed_quant, c.embed_bits),
    "gate": lambda c: QuantRule("int8_row", 8) if c.gated_attn_quant_gate else QuantRule("fp16", 16),
    "fp16": lambda c: QuantRule("fp16", 16),
}
Plan = dict[str, QuantRule]  # every tensor of the model, by name


def quant_plan(cfg: Config) -> Plan:
    """The rule of every tensor, from its role and, for its bits, MATRIX_BITS_OVERRIDES."""
    plan, overrides = {}, bits_overrides(cfg)
    for name, p in weights_of(cfg).items():
        role = ROLES[p.role]
        rule = STORES[role.store](cfg)
        if role.store == "matrix":
            # of several overrides that fit a name, the first decides
            bits = next((bits for word, bits in overrides if fits(name, word)), rule.bits)
            rule = rule._replace(bits=bits)
        plan[name] = rule._replace(clip=getattr(cfg, role.clip)) if role.clip else rule
    return plan


def fits(name: str, word: str) -> bool:
    """Whether a knob's word is part of a tensor's name, or a glob that matches all of it."""
    return word in name or fnmatch.fnmatchcase(name, word)


def bits_overrides(cfg: Config) -> list[tuple[str, int]]:
    """MATRIX_BITS_OVERRIDES as pairs (part or glob of a name, bits)."""
    pairs = (item.rpartition(":") for item in cfg.matrix_bits_overrides)
    return [(part.strip(), int(bits)) for part, _, bits in pairs]


COUNTS = "token_counts"  # the name of token_counts among the Hessians
WEIGHTS_HASH = "weights sha256"  # beside Hessians: of the weights that they are of


def passes(cfg: Config, layer: int) -> int:
    """How often calibration ran a layer for each token; a Hessian sums over these passes."""
    # the head, layer -1, is in no route and runs once
    return max(1, plan_route(cfg, loops(cfg)).layers.count(layer))


def column_salience(weight: Tensor, hessian: Tensor, count: int) -> Tensor:
    """AWQ's measure of each column, (cols,) float64: RMS of its input, over `count` passes, times its mean |weight|."""
    # the number of calibration tokens stays in the RMS: all tensors share this factor
    return (hessian.diagonal().double() / count).sqrt() * weight.double().abs().mean(dim=0)


def refined_plan(cfg: Config, state: Weights, hessians: Weights) -> Plan:
    """quant_plan, with the EMBED_TOPK most frequent rows and AWQ-lite's column groups, which depend on the data."""
    plan = quant_plan(cfg)
    for name, rule in plan.items():
        if SCHEMES[rule.scheme].counts:
            if COUNTS not in hessians:
                raise UserError(f"EMBED_QUANT={rule.scheme} has no token counts; run STAGES=train,... again with it")
            # a stable sort: among equally frequent tokens the lowest ids are taken
            order = hessians[COUNTS].argsort(descending=True, stable=True)
            plan[name] = rule._replace(frequent_rows=tuple(order[: cfg.embed_topk].tolist()))
    if cfg.awq_lite_enabled:
        for name, start in salient_groups(cfg, plan, state, hessians):
            rule = plan[name]
            plan[name] = rule._replace(scheme="awq_lite", awq_groups=(*rule.awq_groups, start))
    return plan


def salient_groups(
    cfg: Config,
    plan: Plan,
    state: Weights,
    hessians: Weights,
) -> list[tuple[str, int]]:
    """(name, first column) of the AWQ_LITE_GROUP_TOP_K most salient groups of columns in the model, sorted."""
    groups, size, tensors = [], cfg.awq_lite_group_size, weights_of(cfg)
    for name in state.keys() & hessians.keys():
        if plan[name].scheme == "gptq" and plan[name].bits < cfg.awq_lite_bits:
            salience = column_salience(state[name], hessians[name], passes(cfg, tensors[name].layer))
            for i, part in enumerate(salience.split(size)):
                groups.append((-part.sum().item(), name, i * size))
    return sorted((name, start) for _, name, start in sorted(groups)[: cfg.awq_lite_group_top_k])


class HessianTap:
    """A taps listener that accumulates X^T X (float32) over the inputs X of every matrix with a Hessian.

    Matrices that read the same input share one Hessian. A layer that runs several times sums over its passes.
    """

    sites = frozenset(role.hessian for role in ROLES.values()) - {""}

    def __init__(self) -> None:
        self.sums = collections.defaultdict(int)

    def __call__(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """Listen at a site; the output passes through."""
        flat, key = x.detach().flatten(0, -2).float(), (site.name, site.layer)
        if key not in self.sums:
            self.sums[key] = flat.new_zeros(flat.size(1), flat.size(1))
        self.sums[key].addmm_(flat.T, flat)
        return y

    def hessians(self, model: nn.Module, batches: int, runtime: Runtime) -> Weights:
        """Name of a weight of the model -> X^T X / batches on the CPU, summed over the ranks. Call it once."""
        for key, total in self.sums.items():
            self.sums[key] = (runtime.sum_(total) / batches).cpu()
        inputs = {name: (ROLES[p.role].hessian, p.layer) for name, p in model.named_parameters()}
        return {name: self.sums[key] for name, key in inputs.items() if key in self.sums}

    def listen(self, model: GPT, ids: Tensor, meta: AttnMeta, seed: int) -> None:
        """Hear a batch."""
        with torch.no_grad():
            h = model.trunk(ids, meta, self)
            # the head's input is all that its Hessian needs: no logits
            LayerTap(self)("head", h, h)


class DriftTap:
    """A taps listener that accumulates [X - X', X']^T X' (2 cols, cols) float32 at one site, over a layer's passes.

    On each batch it hears first the float model, which reads X, then the model whose earlier matrices are rounded,
    which reads X'.
    """

    def __init__(self, site: str) -> None:
        self.sites, self.rounded = frozenset({site}), False
        self.inputs, self.sums = [], collections.defaultdict(int)

    def __call__(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """Listen at a site; the output passes through."""
        x = x.detach().flatten(0, -2).float()
        if self.rounded:
            self.sums[site.layer] += torch.cat([self.inputs.pop(0) - x, x], dim=1).T @ x
        else:
            self.inputs.append(x)
        return y


SENSITIVITY = "sensitivity of "  # before the name of a weight, among the Hessians
FISHER_TOKENS = 2**14  # tokens of a backward pass: 14 GiB for PR 1934
SENSITIVITY_FLOOR = 0.1  # of the mean of a weight's rows: a row that no gradient reached may still matter


class FisherTap(HessianTap):
    """A HessianTap that also measures what errors in the rows of each matrix cost: mean squares of output gradients.

    The gradients are those of targets that the model itself draws: their outer products, over inputs and outputs, are
    a Kronecker factorisation of the Fisher matrix (K-FAC, Martens and Grosse 2015), which is the curvature of the
    divergence that rounding causes. The embedding is read twice: by ids, and as the head.
    """

    # beside inputs: outputs of the matrices that share another's input, and the rows that ids look up
    sites = HessianTap.sites | {"k", "v", "delta_z", "lookup"}

    def __call__(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        if site.name in HessianTap.sites:
            super().__call__(site, x, y)
        if site.name != "head":
            y.register_hook(functools.partial(self.measure, site, x.detach()))
        return y

    def measure(self, site: Site, x: Tensor, g: Tensor) -> None:
        """Take in the gradient g of a site's output."""
        g = g.flatten(0, -2).float()
        if site.name == "lookup":
            self.sums["lookup"] += g.T @ g
            rows = torch.zeros_like(self.sums["squares", "head", -1])
            squares = rows.index_add(0, x.flatten(), g.square().sum(dim=1))
        else:
            squares = g.square().sum(dim=0)
        self.sums["squares", site.name, site.layer] += squares

    def listen(self, model: GPT, ids: Tensor, meta: AttnMeta, seed: int) -> None:
        """Hear a batch, and the gradients of its loss for targets drawn with a seed."""
        generator = torch.Generator(ids.device).manual_seed(seed)
        with torch.enable_grad():
            h = model.trunk(ids, meta, self)
            z = LayerTap(self)("head", h, model.tok_emb(h)).flatten(0, 1)
            y = softcapped(z.detach(), model.softcap)
            p = y.softmax(dim=1)
            # of the logits themselves, the mean over all draws is known: p (1 - p), times the square of dy/dz
            slope = 1 - (y / model.softcap).square()
            self.sums["squares", "head", -1] += (p * (1 - p) * slope.square()).sum(dim=0).float()
            drawn = p.multinomial(1, generator=generator)
            loss = softcapped_cross_entropy(z, drawn[:, 0], model.softcap).sum()
            # no weight's gradient is wanted: that of the embedding leads through all outputs
            torch.autograd.grad(loss, model.tok_emb.weight)
        self.sums["tokens"] += torch.tensor(ids.numel(), dtype=torch.float64)

    def hessians(self, model: nn.Module, batches: int, runtime: Runtime) -> Weights:
        """Those of HessianTap, the embedding's with its second use, and the sensitivity (rows,) of each weight."""
        found = super().hessians(model, batches, runtime)
        for name, p in model.named_parameters():
            key = "squares", "head" if p.role == "embed" else p.role, p.layer
            if name not in found or key not in self.sums:
                continue
            # Hessian and squares are both sums over the passes of a looped layer, so their product counts passes twice:
            # right if an error did the same harm in each, too much if the harms were independent. It is in between
            rows = self.sums[key] / math.sqrt(passes(model.cfg, p.layer))
            if p.role == "embed":
                tokens = self.sums["tokens"]
                H = rows.sum() * found[name] + tokens * self.sums["lookup"]
                rows = rows * found[name].trace() + tokens * self.sums["squares", "lookup", -1]
                rows, found[name] = rows / H.trace(), H
            found[SENSITIVITY + name] = rows
        return found


def collect_hessians(cfg: Config, runtime: Runtime, model: GPT) -> Weights:
    """Collect input Hessians over GPTQ_CALIBRATION_BATCHES random batches of training windows, split over the ranks."""
    tap, started = FisherTap() if cfg.fisher_scales else HessianTap(), time.perf_counter()
    # the batches depend on their index alone, so the sum is the same for any number of ranks
    mine = range(runtime.rank, cfg.gptq_calibration_batches, runtime.world)
    for done, index in enumerate(mine):
        rows = calibration_rows(cfg, index)
        # gradients need the activations of all layers, which is more than fits for a whole batch
        for part in np.array_split(rows, -(-rows.size // FISHER_TOKENS) if cfg.fisher_scales else 1):
            batch = Batch(part, part, row_bounds(cfg, part))
            ids, _, meta = on_device(model, batch, runtime, cfg.train_seq_len)
            tap.listen(model, ids, meta, index)
        runtime.log.progress("calibration", done + 1, len(mine), started)
    return tap.hessians(model, cfg.gptq_calibration_batches, runtime)


def token_counts(cfg: Config, runtime: Runtime) -> Tensor:
    """Count how often each id occurs in the first EMBED_FREQ_TOKENS training tokens: (V,) int64."""
    counts, left = np.zeros(cfg.vocab_size, np.int64), cfg.embed_freq_tokens or sys.maxsize
    for path in list_shards(cfg.data_path, "train"):
        tokens = read_shard(path)[:left]
        left -= len(tokens)
        counts += np.bincount(tokens[runtime.rank :: runtime.world], minlength=cfg.vocab_size)
    return runtime.sum_(torch.from_numpy(counts))


Parts = dict[str, Tensor]  # what a stored tensor consists of, such as its integers "q" and the scales "s" of its rows
Weights = dict[str, Tensor]  # by name
Bits = int | Tensor  # of every weight alike, or a tensor that broadcasts to (rows, cols)
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16: a row of zeros is divided by it, not by 0


def storable(scale: Tensor) -> Tensor:
    """Row scales as float16, never 0."""
    return scale.half().clamp_min(SMALLEST_SCALE)


def stored_scales(scale: Tensor, base_step: float, key: str = "s") -> Parts:
    """The parts that hold row scales: float16 or, with a base_step over 0, int16 and that step ("ss")."""
    if base_step == 0:
        return {key: storable(scale)}
    # log2 in multiples of base_step: the relative error is the same for all rows
    logarithm = scale.double().clamp_min(SMALLEST_SCALE).log2()
    return {
        key: (logarithm / base_step).round().to(torch.int16),
        "ss": torch.full((1,), base_step, device=scale.device),
    }


def scale_values(parts: Parts, key: str = "s") -> Tensor:
    """Row scales (rows,) float32 from stored_scales: what a decoder multiplies by, so what a quantiser divides by."""
    stored = parts[key]
    return stored.float() if stored.is_floating_point() else (stored.double() * parts["ss"].double()).exp2().float()


def awq_columns(groups: Tensor, cols: int) -> Tensor:
    """Indices of the columns in AWQ-lite's groups, which are given as [group size, first column, first column ...]."""
    size, *starts = groups.tolist()
    return torch.cat([torch.arange(start, min(start + size, cols)) for start in starts])


def weight_scales(parts: Parts, cols: int) -> Tensor:
    """What each integer is multiplied by: (rows, 1), or (rows, cols) if AWQ-lite's columns "hc" have scales "hs"."""
    scale = scale_values(parts)[:, None]
    if "hc" in parts:
        scale = scale.repeat(1, cols)
        scale[:, awq_columns(parts["hc"], cols)] = scale_values(parts, "hs")[:, None]
    return scale


def decode_rows(parts: Parts) -> Tensor:
    """Integers times their scales, float32."""
    return parts["q"].float() * weight_scales(parts, parts["q"].size(1))


def round_to_grid(weight: Tensor, scale: Tensor, bits: Bits) -> Tensor:
    """Nearest integer level within +-(2^(bits-1) - 1), as float32."""
    top = 2 ** (bits - 1) - 1
    return torch.clamp(torch.round(weight / scale), -top, top)


def fake_quantize(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Round a weight to a grid whose rows have scales (rows,)."""
    return round_to_grid(weight, scale[:, None], bits) * scale[:, None]


def sigma_clip_scale(weight: Tensor, bits: Bits, clip: float) -> Tensor:
    """Row scales (rows,) float32 for a grid that reaches `clip` standard deviations; bits: an int or (rows, 1)."""
    deviation = weight.float().std(dim=1, keepdim=True)
    return (clip * deviation / (2 ** (bits - 1) - 1)).squeeze(1)


def quantile_scale(weight: Tensor, bits: int, quantile: float, floor: float) -> Tensor:
    """Row scales (rows,) float32 for a grid that reaches a quantile of the row's magnitudes, and at least `floor`."""
    top, magnitude = 2 ** (bits - 1) - 1, weight.float().abs()
    clip = magnitude.amax(dim=1) if quantile == 1 else magnitude.quantile(quantile, dim=1)
    return (clip.clamp_min(floor) / top).clamp_min(SMALLEST_SCALE)


CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)


def searched_scales(weight: Tensor, bits: int, floor: float = 0.0, by_row: bool = True) -> Tensor:
    """Row scales (rows,) float16 from the older clip search ("GPTQ-lite").

    Rounding to nearest with this clip has the smallest squared error among CLIP_QUANTILES: for each row or, as
    published (by_row off), with one quantile for the whole matrix.
    """
    scales, errors = [], []
    for quantile in CLIP_QUANTILES:
        # rounded before the search, as it is stored
        scale = storable(quantile_scale(weight, bits, quantile, floor))
        error = weight - fake_quantize(weight, scale.float(), bits)
        scales.append(scale)
        errors.append(error.square().sum(dim=1))
    errors = torch.stack(errors)  # (quantiles, rows)
    if not by_row:
        errors = errors.sum(dim=1, keepdim=True).expand_as(errors)
    return torch.stack(scales).gather(0, errors.argmin(dim=0)[None])[0]


def inverse_factor(hessian: Tensor | None, percdamp: float) -> tuple[Tensor, Tensor, Tensor]:
    """Prepare a Hessian (cols, cols) for GPTQ. UserError if calibration did not collect it.

    Returns the order of the columns by falling diagonal, an upper Cholesky factor, and a mask of the columns that never
    had an input. The factor is that of the inverse of the damped Hessian, with its columns in that order. The damping
    grows tenfold until there is such a factor; FloatingPointError if there is none.
    """
    if hessian is None:
        raise UserError("GPTQ has no Hessian for a tensor; run STAGES=train,... again or set MATRIX_QUANT=rowwise")
    H = hessian.float().clone()
    diagonal = H.diagonal()  # a view: what is written to it changes H
    dead = diagonal == 0
    diagonal[dead] = 1
    order = diagonal.argsort(descending=True)
    damping = percdamp * diagonal.mean()
    for _ in range(6):
        diagonal += damping
        damping *= 10
        L, failed = torch.linalg.cholesky_ex(H[order][:, order])
        if failed:
            continue
        U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
        if not failed:
            return order, U, dead
    raise FloatingPointError("its Hessian has no Cholesky factor; raise GPTQ_DAMP or GPTQ_CALIBRATION_BATCHES")


GPTQ_BLOCKSIZE = 128  # columns per lazy update: only the speed depends on it


def gptq_columns(
    W: Tensor,
    Hinv: Tensor,
    blocksize: int,
    rounder: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> Tensor:
    """GPTQ's loop (Frantar et al. 2023): levels (..., rows, cols) of W, column by column. W is overwritten.

    rounder(column (..., rows), j) returns levels and the weights that they stand for. Each column's error is spread
    over the later columns through Hinv (..., cols, cols).
    """
    Q = torch.empty_like(W)
    for start in range(0, W.size(-1), blocksize):
        stop = min(start + blocksize, W.size(-1))
        errors = torch.empty_like(W[..., start:stop])
        for j in range(start, stop):
            Q[..., j], value = rounder(W[..., j], j)
            errors[..., j - start] = (W[..., j] - value) / Hinv[..., j, j, None]
            W[..., j:stop].addcmul_(errors[..., j - start, None], Hinv[..., j, None, j:stop], value=-1)
        # columns of later blocks get the errors of the whole block in one matrix product
        W[..., stop:] -= errors @ Hinv[..., start:stop, stop:]
    return Q


def gptq(
    weight: Tensor,
    hessian: Tensor | None,
    scale: Tensor,
    bits: Bits,
    percdamp: float,
    blocksize: int = GPTQ_BLOCKSIZE,
) -> Tensor:
    """Round (rows, cols) to int8 by GPTQ with activation order (Frantar et al. 2023).

    weight (rows, cols), hessian (cols, cols); scale and bits broadcast to (rows, cols).
    """
    order, Hinv, dead = inverse_factor(hessian, percdamp)
    W = torch.where(dead, 0.0, weight.float())[:, order]
    scales = scale.expand_as(W).T[order]  # (cols, rows), in GPTQ's order
    widths = [bits] * len(order) if isinstance(bits, int) else bits.expand_as(W).T[order]

    def nearest_level(column: Tensor, j: int) -> tuple[Tensor, Tensor]:
        """Return the nearest levels of a column, and their values."""
        levels = round_to_grid(column, scales[j], widths[j])
        return levels, levels * scales[j]

    q = gptq_columns(W, Hinv, blocksize, nearest_level)
    # back in the order of the weight
    return q[:, order.argsort()].to(torch.int8)


# A trellis is a shift register (Ungerboeck 1982, codes for amplitude modulation). State s goes by branch b to state
# (2 s + b) mod states, here for four states:
#
#     row r          row r + 1
#       0 ---b---> 0 or 1         Two states lead to each next state: s in the upper half, s + states / 2 in the lower.
#       1 ---b---> 2 or 3         A branch requires an integer that is d mod 4, where d depends on the state and on b.
#       2 ---b---> 0 or 1         Its parity depends on the state alone, which so allows even integers or odd ones.
#       3 ---b---> 2 or 3
#
# states -> masks of the bits of 2 s + b whose sums mod 2 are the high and the low bit of d; one state is no trellis
TCQ_CODES = {1: (64, 64), 4: (5, 2), 8: (13, 2), 16: (25, 4), 32: (41, 4), 64: (97, 20)}


def trellis(states: int) -> Tensor:
    """The subset d, an integer mod 4, that each state and branch requires: (states, 2)."""
    register = torch.arange(2 * states)
    high, low = (sum(register >> i & 1 for i in range(7) if taps >> i & 1) % 2 for taps in TCQ_CODES[states])
    return (2 * high + low).view(states, 2)


def viterbi(states: int, real: Tensor, top: Tensor) -> Callable[[Tensor], Tensor]:
    """Viterbi search for the trellis path with the smallest squared error (Marcellin and Fischer 1990).

    Columns are searched in parallel. Each path starts in state 0 and may end in any state. real (rows, columns): False
    in the padding below a short column; top (columns,): its largest integer. Returns the search.
    """
    # All buffers are allocated once: a search is two loops over rows, with a few small operations each
    rows, columns = real.shape
    # by 2 * state + branch
    subsets = trellis(states).flatten().to(top.device)
    residue = torch.arange(4.0, device=top.device)[:, None]
    # levels d + 4 n: the range of n, (4, columns)
    low, high = ((-top - residue) / 4).ceil(), ((top - residue) / 4).floor()
    # The least cost of a path to each state; the cost of each branch in each row, later of the path up to it
    best, costs = top.new_empty(states, columns), top.new_empty(rows, 2 * states, columns)
    # The branches of a row as [half, state in it, branch], then those from each half as [next state]
    by_half = costs.view(rows, 2, states, columns)
    forward = [(halves.view(2, states // 2, 2, columns), *halves) for halves in by_half]
    # A node is state * columns + column. back[row] holds the node before each node, and path the nodes of the best
    # paths; upper_node is the node before, if it is in the upper half, and half the distance to the one in the lower
    node = torch.arange(states * columns, dtype=torch.int32, device=top.device)
    upper_node = node // (2 * columns) * columns + node % columns
    half = states // 2 * columns
    back, path = node.new_empty(rows, states * columns), node.new_empty(rows + 1, columns)
    backward = list(zip(back, path[1:], path[:-1], strict=True))[::-1]

    def search(x: Tensor) -> Tensor:
        """Return the integers on the best paths for x (rows, columns), as float32 (rows, columns)."""
        # The nearest point of each subset, (rows, 4, columns), and what it costs
        points = (x[:, None] - residue).mul_(0.25).round_()
        points.clamp_(low, high).mul_(4).add_(residue)
        errors = (points - x[:, None]).square_().mul_(real[:, None])
        torch.index_select(errors, 1, subsets, out=costs)
        # Forward: add the cost of the path so far to the branches, keep the cheaper of two ways into each state
        before = best.fill_(math.inf).view(2, -1, 1, columns)
        best[0] = 0
        for branches, upper, lower in forward:
            branches += before
            torch.minimum(upper, lower, out=best)
        # Backward: from the cheapest last state along the ways that were kept
        upper, lower = costs.view(rows, 2, -1).unbind(1)
        torch.add(upper_node, lower < upper, alpha=half, out=back)
        path[-1] = best.argmin(dim=0).int() * columns + node[:columns]
        for nodes, after, here in backward:
            torch.index_select(nodes, 0, after, out=here)
        state = path // columns
        branch = state[1:] % 2  # the bit that was shifted in
        subset = subsets[(2 * state[:-1] + branch).long()]
        return points.gather(1, subset[:, None])[:, 0]

    return search


def row_bits(weight: Tensor, rule: QuantRule, cfg: Config) -> Bits:
    """Bits of all rows, or (rows, 1) if frequent rows have more."""
    if not rule.frequent_rows:
        return rule.bits
    bits = torch.full((len(weight), 1), rule.bits, device=weight.device)
    bits[list(rule.frequent_rows)] = cfg.embed_top_bits
    return bits


def sigma_clip(weight: Tensor, rule: QuantRule, cfg: Config) -> Tensor:
    """Row scales for a grid that reaches rule.clip standard deviations, times the rule's gains, as they are stored."""
    bits = row_bits(weight, rule, cfg)
    scale = sigma_clip_scale(weight, bits, rule.clip)
    if rule.gains:
        # however fine, a grid must reach the largest weight of its row
        reach = weight.float().abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        scale = torch.maximum(scale * scale.new_tensor(rule.gains), reach[:, 0])
    return scale_values(stored_scales(scale, cfg.scale_step))


class Scheme(NamedTuple):
    """How a tensor becomes parts and back: a scale for each row, then integers. Without a scale: float16."""

    scale: Callable | None  # (weight, rule, cfg) -> (rows,) float32
    hessian: bool = False  # GPTQ rounds, with the Hessians of a calibration; else to nearest
    counts: bool = False  # the calibration counts tokens
    decode: Callable[[Parts], Tensor] = decode_rows
    qat_scale: Callable | None = None  # the scale that training sees, if it is another one
    # (weights, hessians, rules, cfg) -> parts of each: encodes matrices of equal width at once
    batch_encoder: Callable | None = None
    repairable: bool = True  # REPAIR may correct the error

    def encode(self, weight: Tensor, hessian: Tensor | None, rule: QuantRule, cfg: Config) -> Parts:
        """Turn one tensor (rows, cols) into parts."""
        if self.scale is None:
            return {"w": weight.half()}
        if self.batch_encoder is not None:
            return self.batch_encoder([weight], [hessian], [rule], cfg)[0]
        cols, bits = weight.size(1), row_bits(weight, rule, cfg)
        parts = stored_scales(self.scale(weight, rule, cfg), cfg.scale_step)
        if rule.awq_groups:
            parts["hc"] = torch.tensor([cfg.awq_lite_group_size, *rule.awq_groups], dtype=torch.int32)
            finer = sigma_clip(weight, rule._replace(bits=cfg.awq_lite_bits), cfg)
            parts |= stored_scales(finer, cfg.scale_step, "hs")
            bits = torch.full((1, cols), rule.bits, device=weight.device)
            bits[:, awq_columns(parts["hc"], cols)] = cfg.awq_lite_bits
        scale = weight_scales(parts, cols)
        if self.hessian:
            q = gptq(weight, hessian, scale, bits, cfg.gptq_damp)
        else:
            q = round_to_grid(weight.float(), scale, bits).to(torch.int8)
        return {"q": q} | parts


TCQ_ERROR = 0.26  # mean squared error of 8 states in squared steps; a scalar quantiser's 1/12 (2 steps)^2, less 1.1 dB


def encode_tcq(
    weights: list[Tensor],
    hessians: list[Tensor | None],
    rules: list[QuantRule],
    cfg: Config,
) -> list[Parts]:
    """GPTQ with trellis-coded quantisation, for matrices of equal width side by side.

    Returns the parts of each: scales, int8 "q" (rows, cols) and "t", the states of the trellis and the rows of a chunk.
    """
    orders, found, chunks, steps, tops, factors = [], [], [], [], [], []
    for weight, hessian, rule in zip(weights, hessians, rules, strict=True):
        order, Hinv, dead = inverse_factor(hessian, cfg.gptq_damp)
        orders.append(order)
        # The grid is twice as fine as a scalar quantiser's of this rate; a state allows every other point
        found.append(stored_scales(sigma_clip(weight, rule, cfg) / 2, cfg.scale_step))
        steps += scale_values(found[-1]).split(cfg.tcq_chunk_rows)
        # The rows of a GPTQ column do not depend on one another, so each column is rounded to its best path, in chunks
        # of rows that each start in state 0
        pieces = torch.where(dead, 0.0, weight.float())[:, order].split(cfg.tcq_chunk_rows)
        chunks += pieces
        factors += [Hinv] * len(pieces)
        tops += [2**rule.bits - 2] * len(pieces)
    W = pad_sequence(chunks, batch_first=True)  # (chunks, rows, cols)
    scale = pad_sequence(steps, batch_first=True)
    real = scale > 0  # a stored scale is never 0
    scale = torch.where(real, scale, 1.0)
    rows = real.sum(dim=1)
    # a name of its own keeps the buffers alive: the graph below knows only where they are
    plain = search = viterbi(cfg.tcq_states, real.T.contiguous(), W.new_tensor(tops))
    if W.is_cuda:
        # a search is thousands of small kernels, whose launches would take four times as long as they do
        search = torch.cuda.make_graphed_callables(plain, (W.new_zeros(real.T.shape),))

    def on_trellis(column: Tensor, j: int) -> tuple[Tensor, Tensor]:
        x = (column / scale).T.contiguous()
        # Shrink the target, as a Gaussian source of this power asks for at the expected error (rate-distortion theory)
        power = x.square().sum(dim=0) / rows
        levels = search(x * (power / (power + TCQ_ERROR))).T
        return levels, levels * scale

    W = W.mT.contiguous().mT  # the rows of a column lie side by side
    levels = gptq_columns(W, torch.stack(factors), GPTQ_BLOCKSIZE, on_trellis)
    integers = levels[real].to(torch.int8).split(list(map(len, weights)))
    t = torch.tensor([cfg.tcq_states, cfg.tcq_chunk_rows], dtype=torch.int32)
    return [
        {"q": q[:, order.argsort()], "t": t} | parts for q, order, parts in zip(integers, orders, found, strict=True)
    ]


SCHEMES = {
    "gptq": Scheme(sigma_clip, hessian=True),
    "gptq_freqsplit": Scheme(sigma_clip, hessian=True, counts=True),
    "gptq_tcq": Scheme(sigma_clip, hessian=True, batch_encoder=encode_tcq),
    "awq_lite": Scheme(sigma_clip, hessian=True),
    "rowwise": Scheme(sigma_clip),
    "gptq_lite": Scheme(
        lambda w, rule, cfg: searched_scales(w.float(), rule.bits, cfg.clip_floor, cfg.clip_search_rows),
        # published: training does not search
        qat_scale=lambda w, rule, cfg: quantile_scale(w, rule.bits, 1.0, cfg.clip_floor),
    ),
    "row_quantile": Scheme(lambda w, rule, cfg: quantile_scale(w, rule.bits, cfg.clip_quantile, cfg.clip_floor)),
    "int8_row": Scheme(lambda w, rule, cfg: quantile_scale(w, rule.bits, 1.0, 0.0), repairable=False),
    "fp16": Scheme(None, decode=lambda parts: parts["w"].float(), repairable=False),
    "byte": Scheme(None, decode=lambda parts: parts["w"].float() / 256, repairable=False),
}


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack integers in [0, 2^bits), bits <= 8, into uint8 without gaps, lowest bit first; zeros fill the last byte."""
    column = values.cpu().numpy().astype(np.uint8).reshape(-1, 1)
    planes = np.unpackbits(column, axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(planes, bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of pack_bits, (count,) uint8."""
    # a row of bits for each integer
    planes = np.unpackbits(packed.numpy(), count=bits * count, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(planes, axis=1, bitorder="little")[:, 0])


class Grid(NamedTuple):
    """Grid for a factor of an LQER correction: all 2^bits levels, which are not symmetric about 0."""

    bits: int
    group: int  # entries, in row-major order, that share a scale

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return packed integers and float16 scales, on the CPU."""
        half = 2 ** (self.bits - 1)
        padding = -x.numel() % self.group
        rows = F.pad(x.flatten(), (0, padding)).view(-1, self.group)
        # levels go from -half to half - 1; the largest magnitude lies half a level over the top one
        largest = rows.abs().amax(dim=1)
        scale = storable(largest / (half - 0.5))
        q = torch.round(rows / scale.float()[:, None])
        q = q.clamp(-half, half - 1).flatten()
        return pack_bits(q[: x.numel()] + half, self.bits), scale.cpu()

    def decode(self, packed: Tensor, scale: Tensor, shape: tuple[int, int]) -> Tensor:
        """The float32 factor."""
        count = math.prod(shape)
        q = unpack_bits(packed, self.bits, count).float() - 2 ** (self.bits - 1)
        return (q * scale.float().repeat_interleave(self.group)[:count]).view(shape)


def encode_lqer(error: Tensor, cfg: Config) -> Parts:
    """LQER (Zhang et al. 2024): factors A (rows, r) and B (r, cols), the best rank-r fit to an error matrix."""
    U, S, Vh = torch.linalg.svd(error.float(), full_matrices=False)
    rank = min(cfg.lqer_rank, len(S))
    A = U[:, :rank] * S[:rank]
    B = Vh[:rank]
    # The grids are asymmetric, so the sign of a pair shows in the result, but the library's choice must not:
    # the largest entry of each row of B is made positive
    sign = B.gather(1, B.abs().argmax(dim=1, keepdim=True)).sign()
    grid_a = Grid(2, A.numel())  # bits and groups as published
    grid_b = Grid(4, cfg.lqer_asym_group)
    lqa, lqas = grid_a.encode(A * sign.T)
    lqb, lqbs = grid_b.encode(B * sign)
    layout = torch.tensor([rank, *grid_a, *grid_b], dtype=torch.int32)
    return {"lqa": lqa, "lqas": lqas, "lqb": lqb, "lqbs": lqbs, "lqm": layout}


def decode_lqer(parts: Parts) -> Tensor:
    """A B, to be added to the decoded weight."""
    rank, *grids = parts["lqm"].tolist()
    rows, cols = parts["q"].shape
    A = Grid(*grids[:2]).decode(parts["lqa"], parts["lqas"], (rows, rank))
    return A @ Grid(*grids[2:]).decode(parts["lqb"], parts["lqbs"], (rank, cols))


class Repair(NamedTuple):
    """encode(error, cfg) -> further parts, on the CPU; decode(parts) -> what they add to the decoded weight."""

    encode: Callable[[Tensor, Config], Parts]
    decode: Callable[[Parts], Tensor]


REPAIRS = {"none": None, "lqer": Repair(encode_lqer, decode_lqer)}


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A tensor as it is stored: all that the artifact says about it."""

    name: str
    role: str  # key of ROLES
    scheme: str  # key of SCHEMES
    repairs: tuple[str, ...]  # keys of REPAIRS
    parts: Parts

    def encoding(self) -> str:
        """Scheme and repairs as text, `scheme+repair`."""
        return "+".join((self.scheme, *self.repairs))

    def key(self) -> str:
        """Everything but the parts as text, `name:role:scheme+repair`."""
        return f"{self.name}:{self.role}:{self.encoding()}"

    @classmethod
    def parse(cls, key: str, parts: Parts) -> Stored:
        """The inverse of key; ValueError if the text has another form."""
        name, role, encoding = key.split(":")
        scheme, *repairs = encoding.split("+")
        return cls(name, role, scheme, tuple(repairs), parts)

    def decode(self) -> Tensor:
        """The float32 weight."""
        weight = SCHEMES[self.scheme].decode(self.parts)
        return sum((REPAIRS[name].decode(self.parts) for name in self.repairs), weight)


def dequantize(stored: list[Stored]) -> Weights:
    """The float32 state dict."""
    return {tensor.name: tensor.decode() for tensor in stored}


def deal_jobs(runtime: Runtime, what: str, jobs: list[Any], work: Callable[[Any], dict]) -> dict[str, Any]:
    """Share jobs among the ranks, in turn, and return the union of work(job) over all of them."""
    started, done = time.perf_counter(), {}
    # dealt like cards: costly jobs come first, so all ranks get some
    mine = jobs[runtime.rank :: runtime.world]
    for count, job in enumerate(mine):
        # jobs name what they make, so results never clash
        done |= work(job)
        runtime.log.progress(what, count + 1, len(mine), started)
    return runtime.gather(done)


def quantisation_jobs(plan: Plan, state: Weights, world: int) -> list[list[str]]:
    """Group the names of tensors that are encoded together, the costly ones first.

    A scheme that encodes a batch gets its matrices of equal width at once, split evenly over `world` ranks.
    """
    groups = {}
    # GPTQ takes time in proportion to rows * cols^2; ties by name, so that all ranks agree
    for name in sorted(state, key=lambda name: (-state[name].numel() * state[name].size(-1), name)):
        group, scheme = name, plan[name].scheme
        if SCHEMES[scheme].batch_encoder is not None:
            group = scheme, state[name].size(-1)
        groups.setdefault(group, []).append(name)
    # each rank gets every world-th matrix of a batch, so all have about as much to do
    shares = [names[rank::world] for names in groups.values() for rank in range(world)]
    # a lone tensor leaves the other ranks' shares empty
    return list(filter(None, shares))


def pivots(hessian: Tensor, percdamp: float) -> Tensor:
    """What is left of an error in each column once GPTQ's later columns have made up for it, per its square."""
    _, U, _ = inverse_factor(hessian, percdamp)
    return U.diagonal().double().pow(-2)


def fisher_gains(cfg: Config, runtime: Runtime, plan: Plan, state: Weights, hessians: Weights) -> Plan:
    """The plan with gains that let the same bytes cost less: FISHER_SCALES of the way to the cheapest scales.

    Rounding a row to a scale s costs about its sensitivity times s^2/24 times the sum of GPTQ's pivots, and each
    weight's entropy falls as log2 s. At a given size the sum over all rows is least where all rows cost the same.
    """
    names = [name for name, rule in plan.items() if cfg.fisher_scales and SCHEMES[rule.scheme].hessian]
    if any(SENSITIVITY + name not in hessians for name in names):
        raise UserError(f"FISHER_SCALES={cfg.fisher_scales:g} has no sensitivities; run STAGES=train,... again with it")

    def log_gains(name: str) -> Weights:
        """The wanted change of a weight's log scales, up to a constant for all weights."""
        rows = hessians[SENSITIVITY + name].double()
        rows = rows + SENSITIVITY_FLOOR * rows.mean()
        H = hessians[name].to(runtime.device)
        cost = rows * pivots(H, cfg.gptq_damp).mean().cpu()
        scale = sigma_clip(state[name].cpu(), plan[name], cfg)
        return {name: -cfg.fisher_scales * (cost.sqrt() * scale).log()}

    found = deal_jobs(runtime, "sensitivities", names, log_gains)
    # the mean over all weights stays, and with it the entropy
    sizes = {name: state[name].numel() for name in found}
    total = sum(logs.mean() * sizes[name] for name, logs in found.items())
    mean = total / max(1, sum(sizes.values()))
    rules = {}
    for name, logs in found.items():
        gains = (logs - mean).exp()
        rules[name] = plan[name]._replace(gains=tuple(gains.tolist()))
    return plan | rules


@dataclasses.dataclass
class Gptaq:
    """Asymmetric calibration (Li et al. 2025, arXiv 2504.02692): what is rounded makes up for what was rounded before.

    A matrix W reads X' where the float model reads X. The W' for which W' X' is nearest to W X is what gets rounded.
    """

    cfg: Config
    runtime: Runtime
    model: GPT  # with the float weights, in eval mode; left alone
    seconds: float = 0.0  # how long text was read so far

    def targets(self, site: str, stored: Iterable[Stored], state: Weights) -> tuple[Weights, Weights]:
        """W' of the matrices in `state`, which read the inputs at a site, and X'^T X', given what is stored so far."""
        cfg, runtime, started = self.cfg, self.runtime, time.perf_counter()
        rounded, tap = copy.deepcopy(self.model), DriftTap(site)
        rounded.load_state_dict(self.model.state_dict() | dequantize(stored))
        mine = range(runtime.rank, cfg.gptaq_batches, runtime.world)
        for done, index in enumerate(mine):
            rows = calibration_rows(cfg, index)
            for part in np.array_split(rows, -(-rows.size // FISHER_TOKENS)):
                ids, _, meta = on_device(rounded, Batch(part, part, row_bounds(cfg, part)), runtime, cfg.train_seq_len)
                for model in (self.model, rounded):
                    tap.rounded = model is rounded
                    with torch.no_grad():
                        model.trunk(ids, meta, tap)
            runtime.log.progress(f"calibration for {site}", done + 1, len(mine), started)
        found, hessians = {}, {}
        for name, p in self.model.named_parameters():
            if name in state:
                W = state[name].to(runtime.device, torch.float32)
                # of a rank without batches, 0
                sums = tap.sums[p.layer] + W.new_zeros(2 * W.size(1), W.size(1))
                drift, hessians[name] = (runtime.sum_(sums) / cfg.gptaq_batches).chunk(2)
                order, U, _ = inverse_factor(hessians[name], cfg.gptq_damp)
                # W' = W + W drift H^-1, where H^-1 = U^T U in GPTQ's order of the columns
                change = (W @ drift)[:, order] @ U.T @ U
                found[name] = W + change[:, order.argsort()]
        self.seconds += time.perf_counter() - started
        return found, hessians


def quantize(
    cfg: Config,
    runtime: Runtime,
    state: Weights,
    hessians: Weights,
    gptaq: Gptaq | None = None,
) -> list[Stored]:
    """Quantise a state dict: its tensors as they are stored, on the CPU, in the order of the model.

    All ranks share the work. FloatingPointError for weights that are not finite, UserError for a missing Hessian.
    """
    for name, weight in state.items():
        if not torch.isfinite(weight).all():
            raise FloatingPointError(f"{name} holds values that are not finite; train again")
    device, tensors = runtime.device, weights_of(cfg)
    plan = fisher_gains(cfg, runtime, refined_plan(cfg, state, hessians), state, hessians)

    def encode(names: list[str]) -> dict[str, Stored]:
        """Encode the tensors of one job; by name."""
        rules = [plan[name] for name in names]
        weights = [state[name].to(device) for name in names]
        inputs = [hessians[name].to(device) if name in hessians else None for name in names]
        scheme = SCHEMES[rules[0].scheme]
        try:
            if scheme.batch_encoder is None:
                encoded = [scheme.encode(weights[0], inputs[0], rules[0], cfg)]
            else:
                encoded = scheme.batch_encoder(weights, inputs, rules, cfg)
        except FloatingPointError as error:
            raise FloatingPointError(f"{', '.join(names)}: {error}") from None
        found = {}
        for name, rule, parts in zip(names, rules, encoded, strict=True):
            parts = {key: part.cpu() for key, part in parts.items()}
            found[name] = Stored(name, tensors[name].role, rule.scheme, (), parts)
        return found

    # all at once, or site by site in the order of ROLES: first the embedding, on which all inputs depend
    stages = {site: {} for site in dict.fromkeys(role.hessian for role in ROLES.values())}
    for name, weight in state.items():
        late = gptaq and SCHEMES[plan[name].scheme].hessian
        stages[ROLES[tensors[name].role].hessian if late else "head"][name] = weight
    stored = {}
    for site, weights in stages.items():
        if not weights:
            continue
        if stored:
            targets, inputs = gptaq.targets(site, stored.values(), weights)
            state, hessians = state | targets, hessians | inputs
        stored |= deal_jobs(runtime, "quantising", quantisation_jobs(plan, weights, runtime.world), encode)
    stored = repaired(cfg, runtime, state, stored)
    return [stored[name] for name in plan if name in stored]


def repaired(
    cfg: Config,
    runtime: Runtime,
    state: Weights,
    stored: dict[str, Stored],
) -> dict[str, Stored]:
    """Apply REPAIR to the LQER_TOP_K tensors with the largest error (Frobenius norm)."""
    repair = REPAIRS[cfg.repair]
    if repair is None:
        return stored

    errors = {  # what the stored tensors lack, on the CPU
        name: state[name].cpu().float() - tensor.decode()
        for name, tensor in stored.items()
        if SCHEMES[tensor.scheme].repairable
    }

    def correct(name: str) -> dict[str, Stored]:
        """The tensor with its correction."""
        parts = stored[name].parts | repair.encode(errors[name].to(runtime.device), cfg)
        return {name: dataclasses.replace(stored[name], repairs=(cfg.repair,), parts=parts)}

    # the largest error first; ties by name, so that all ranks agree
    worst = sorted(errors, key=lambda name: (-errors[name].double().norm().item(), name))[: cfg.lqer_top_k]
    return stored | deal_jobs(runtime, "repairing", worst, correct)


def rescaled(cfg: Config, tensor: Stored, factor: Tensor) -> Stored:
    """The tensor with the scales of its rows, or what is float16, times a factor each."""
    parts = dict(tensor.parts)
    if "w" in parts:
        parts["w"] = (parts["w"] * factor.view_as(parts["w"])).half()
    for key in parts.keys() & {"s", "hs"}:
        parts |= stored_scales(scale_values(parts, key) * factor, cfg.scale_step, key)
    return dataclasses.replace(tensor, parts=parts)


def tuned(
    cfg: Config,
    runtime: Runtime,
    teacher: GPT,
    model: GPT,
    stored: list[Stored],
) -> list[Stored]:
    """Fine-tune what is quantised, with the integers as they are: TUNE_STEPS of Adam on KL(teacher || model).

    `teacher` is the float model, `model` holds the stored weights. What is learnt are factors on the scales of rows and
    on every number in float16 (ideas: QuIP#, arXiv 2402.04396; EfficientQAT, arXiv 2407.11062). Every rank returns the
    same.
    """
    teacher.eval()
    weights, started = dict(model.eval().requires_grad_(True).named_parameters()), time.perf_counter()
    before = {name: p.detach().clone() for name, p in weights.items()}
    by_row = {tensor.name: "s" in tensor.parts for tensor in stored}
    shapes = [(p.size(0), 1) if by_row[name] else p.shape for name, p in weights.items()]
    sizes = list(map(math.prod, shapes))
    # the logarithms of all factors
    logs = torch.zeros(sum(sizes), device=runtime.device)
    divergence = torch.zeros(cfg.tune_steps, device=runtime.device)
    optimiser = torch.optim.Adam([logs], betas=(0.9, 0.99))
    for step in range(cfg.tune_steps):
        # text that the calibration has not seen
        rows, slope = calibration_rows(cfg, cfg.gptq_calibration_batches + step), torch.zeros_like(logs)
        mine = rows[runtime.rank :: runtime.world]
        count = -(-mine.size // FISHER_TOKENS)
        # uncompiled: these few steps take less time than compiling
        for part in (mine[i::count] for i in range(count)):
            batch = Batch(part, part, row_bounds(cfg, part))
            ids, _, meta = on_device(model, batch, runtime, cfg.train_seq_len)
            with torch.no_grad():
                wanted = teacher(ids, None, meta).log_softmax(-1)
            found = model(ids, None, meta).log_softmax(-1)
            loss = F.kl_div(found, wanted, reduction="sum", log_target=True) / rows.size
            divergence[step] += loss.detach()
            grads = torch.autograd.grad(loss, weights.values(), materialize_grads=True)
            own = []
            for g, p, shape in zip(grads, weights.values(), shapes, strict=True):
                own.append((g * p).sum_to_size(shape).flatten())
            slope += torch.cat(own)
        logs.grad = runtime.sum_(slope)
        optimiser.param_groups[0]["lr"] = cfg.tune_lr * (1 - step / cfg.tune_steps)
        optimiser.step()
        with torch.no_grad():
            for (name, p), factor, shape in zip(weights.items(), logs.exp().split(sizes), shapes, strict=True):
                p.copy_(before[name] * factor.view(shape))
        runtime.log.progress("tuning", step + 1, cfg.tune_steps, started)
    first, last = runtime.sum_(divergence)[[0, -1]].tolist()
    runtime.log(
        f"tuning: KL from the float model {first:.5f} nats per token at first, {last:.5f} in the last of "
        f"{cfg.tune_steps} steps, {time.perf_counter() - started:.1f} s"
    )
    factors = dict(zip(weights, logs.exp().cpu().split(sizes), strict=True))
    # what was fitted to hints is no weight
    return [rescaled(cfg, tensor, factors[tensor.name]) if tensor.name in weights else tensor for tensor in stored]


def sort_hidden(cfg: Config, runtime: Runtime, state: Weights, hessians: Weights) -> None:
    """Sort each MLP's hidden units, in place, so that similar rows of `up` are neighbours. The function stays."""
    # Sorted before quantisation, which so sees just another model: no scale or packed factor has to be permuted
    plan = quant_plan(cfg)

    def order(name: str) -> Weights:
        """Order the rows of one matrix by their levels."""
        q = SCHEMES["rowwise"].encode(state[name].to(runtime.device), None, plan[name], cfg)["q"]
        return {name: similarity_order(q)}

    ups, downs = weights_by_role(cfg, "up"), weights_by_role(cfg, "down")
    orders = deal_jobs(runtime, "sorting hidden units", list(ups.values()), order)
    for layer, up in ups.items():
        down, rows = downs[layer], orders[up]
        # An elementwise nonlinearity commutes with a permutation
        state[up], state[down] = state[up][rows], state[down][:, rows]
        if down in hessians:
            hessians[down] = hessians[down][rows][:, rows]
        if SENSITIVITY + up in hessians:
            hessians[SENSITIVITY + up] = hessians[SENSITIVITY + up][rows]


def hadamard(size: int) -> Tensor:
    """Sylvester's orthogonal matrix of a power of two, symmetric, float64."""
    # the sign is that of the parity of the bits that row and column share
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs).double() / math.sqrt(size)


def rotate_values(cfg: Config, runtime: Runtime, state: Weights, hessians: Weights) -> None:
    """Rotate each head's values by a Hadamard matrix, in place, which spreads outliers. The function stays."""
    # An output is a sum of values, so it rotates too, and the columns of `o` rotate back. XSA and value_residual see
    # dot products and sums of values, gates and sink one number per head.
    R = hadamard(cfg.model_dim // cfg.num_heads)

    def rotated(x: Tensor) -> Tensor:
        """Multiply each head's block of columns by R."""
        return (x.double().unflatten(-1, (-1, len(R))) @ R).flatten(-2).to(x.dtype)

    outputs = weights_by_role(cfg, "o")
    for layer, v in weights_by_role(cfg, "v").items():
        o = outputs[layer]
        # rows of v are outputs, columns of o are inputs
        state[v], state[o] = rotated(state[v].T).T.contiguous(), rotated(state[o])
        if o in hessians:  # R^T H R for the rotated inputs; R is symmetric
            hessians[o] = rotated(rotated(hessians[o]).T)


ROTATIONS = {"none": None, "hadamard_vo": rotate_values}
HIDDEN_ORDERS = {"pergroup": sort_hidden}  # COMPRESSOR -> what helps its coder; the others do not gain by it


def reparametrize(cfg: Config, runtime: Runtime, state: Weights, hessians: Weights) -> tuple[Weights, Weights]:
    """Return weights that compute the same and are easier to store, and their Hessians; before quantisation."""
    # new dicts: what the caller has stays as it is
    state, hessians = dict(state), dict(hessians)
    for step in (ROTATIONS[cfg.rotate], HIDDEN_ORDERS.get(cfg.compressor)):
        if step is not None:
            step(cfg, runtime, state, hessians)
    return state, hessians


def similarity_order(matrix: Tensor) -> Tensor:
    """Walk greedily over the rows of an integer matrix, from row 0 always to the nearest row left: (rows,) int64.

    Distances are L1; among equally near rows the first is taken.
    """
    # Sums of integers below 2^24 are exact in float32, so the order is the same on any machine
    rows = matrix.float()
    taken = rows.new_zeros(len(rows))  # infinity for a row in the walk
    order = [0][: len(rows)]
    while len(order) < len(rows):
        taken[order[-1]] = math.inf
        distances = torch.cdist(rows, rows[order[-1:]], p=1)[:, 0]
        order.append(int((distances + taken).argmin()))
    return torch.tensor(order, dtype=torch.int64)


# +--------------------------------------------------------------------------------------------------------------------+
# | 11 ARTIFACT                                                                                                        |
# +--------------------------------------------------------------------------------------------------------------------+

MAGIC, ARTIFACT_VERSION = b"PGLF", 4
MAX_RAW = 2**28  # bytes that a stream may decode to: several times the largest model that fits into the contest's cap
ARTIFACT_HEADER = struct.Struct("<4sBBII")  # magic, version, codec, payload bytes, CRC-32 of all that and the payload


def shuffle_bytes(array: np.ndarray, trellis: np.ndarray | None = None) -> bytes:
    """Lay out an array for a general coder: matrices column by column, wider items in planes by significance."""
    flat = array.flatten("F" if array.ndim == 2 else "C")
    return flat.view(np.uint8).reshape(-1, array.itemsize).T.tobytes()


def unshuffle_bytes(data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of shuffle_bytes."""
    planes = np.frombuffer(data, np.uint8).reshape(np.dtype(dtype).itemsize, -1)
    flat = np.frombuffer(planes.T.tobytes(), dtype)
    # torch wants a writable array
    return flat.reshape(shape, order="F" if len(shape) == 2 else "C").copy()


class Coder(NamedTuple):
    """An entropy coder, bytes <-> bytes, and how an array is laid out for it."""

    encode: Callable[[bytes], bytes]
    decode: Callable[[bytes], bytes]
    frame: Callable[..., bytes] = shuffle_bytes  # (array, its trellis or None) -> bytes
    unframe: Callable[..., np.ndarray] = unshuffle_bytes  # (bytes, dtype, shape) -> array
    head: int = 0  # bytes that a frame adds to those of the array
    require: Callable[[], Any] = lambda: None  # raises UserError if what it runs on is not installed


def require_brotli() -> Any:
    """The brotli module; UserError if it is not installed."""
    if brotli is None:
        raise UserError("COMPRESSOR=brotli, pergroup or rans needs the package brotli: pip install brotli")
    return brotli


def require_lrzip() -> str:
    """Path of the program lrzip; UserError if it is not installed."""
    program = shutil.which("lrzip")
    if program is None:
        raise UserError(
            "COMPRESSOR=pergroup needs the program lrzip, to write an artifact and to read it: apt install lrzip"
        )
    return program


def run_lrzip(data: bytes, *flags: str) -> bytes:
    """Run lrzip on data, through files in a temporary folder; UserError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.lrz", Path(folder) / "out"
        source.write_bytes(data)
        done = subprocess.run(
            # -N 0: by default it runs at the lowest priority, and starves on a busy machine
            [require_lrzip(), "-Q", "-f", "-N", "0", *flags, "-o", target, source],
            capture_output=True,
            env={"LRZIP": "NOCONFIG", "TMPDIR": folder},  # a user's lrzip.conf must not change the bytes
        )
        if done.returncode != 0 or not target.is_file():
            raise UserError(f"lrzip {' '.join(flags)} failed: {done.stderr.decode(errors='replace').strip()[-200:]}")
        return target.read_bytes()


# COMPRESSOR=rans. rans_model predicts each integer of a matrix from those before it; rans_encode and rans_decode turn
# the predictions into bits. rans_rows measures what the model could not learn in time, and the blob carries it as
# side information. The model computes with integers only, so that it predicts the same on every machine.

RANS_BITS, RANS_LANES = 14, 512  # a table's frequencies sum to 2^RANS_BITS; coder states that run side by side
RANS_HEAD = struct.Struct("<4i")  # rows, columns, states of the trellis (1: none), rows per trellis chunk
RANS_ONE, RANS_UNIT = 1 << 16, 64  # 1.0 in fixed point; the coarser unit leaves room for products
MAGNITUDE_VARIANCE = 0.57  # pi/2 - 1: the variance of |x| over (E |x|)^2 for Gaussian x
ROW_CLASSES, DRIFT_BITS = 4, 8  # classes of rows to an octave of scale; bits that a drift must save its row


def rans_frame(array: np.ndarray, trellis: np.ndarray | None) -> bytes:
    """RANS_HEAD and the bytes of an array, row by row. Anything but an int8 matrix counts as one row of bytes."""
    is_matrix = array.ndim == 2 and array.itemsize == 1
    rows, cols = array.shape if is_matrix else (1, array.nbytes)
    walk = [1, 1] if trellis is None else trellis.tolist()
    return RANS_HEAD.pack(rows, cols, *walk) + array.tobytes()


def rans_unframe(data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of rans_frame."""
    return np.frombuffer(data, dtype, offset=RANS_HEAD.size).reshape(shape).copy()


def rans_rows(
    matrix: np.ndarray,
    step: int,
    classes: int,
    drift_bits: float,
) -> tuple[float, np.ndarray, np.ndarray]:
    """What sets the rows of a matrix apart, if its integers keep to multiples of `step`.

    Returns about how many bits the matrix costs then; the class of each row's scale, `classes` to an octave, and its
    share of the drift, in quarters, (2, rows) int8; the rows without both. The drift is a moving average of the rows
    before, which must save a row drift_bits: the embeddings of rare tokens are much alike.
    """
    count, cols = matrix.shape
    rows, drift = matrix.astype(float), np.zeros(cols)
    side = np.zeros((2, count), np.int8)
    mean = np.abs(rows).sum() / max(1, rows.size) + 1e-9
    for i, row in enumerate(rows):
        along = row @ drift / (drift @ drift + 1e-9)
        # a Gaussian row costs half the logarithm of its energy in each column
        part = along * (row @ drift) / (row @ row + 1e-9)
        share = along * (part * cols > 2 * math.log(2) * drift_bits)
        magnitude = np.abs(row - share * drift).sum() / max(1, cols)
        octaves = np.log2(magnitude / mean + 1e-9)
        # what the edges of rans_model leave room for
        side[0, i] = np.clip(np.rint(classes * octaves), -16, 26)
        scale = 2 ** (side[0, i] / ROW_CLASSES)
        side[1, i] = np.clip(np.rint(4 * share / scale), -127, 127)
        offset = side[1, i] / 4 * scale * drift
        drift += (row / scale - drift) / 8
        row -= step * np.rint(offset / step)
        row /= scale
    magnitudes = np.abs(rows).sum() / max(1, rows.size) * 2 ** (side[0] / ROW_CLASSES)
    # integers that are nearly all 0 cost no less for a smaller scale
    cost = cols * np.log2(magnitudes + step / 4).sum()
    return cost + 8 * len(zlib.compress(side.tobytes(), 9)), side, rows


def rans_prior(rows: np.ndarray) -> tuple[int, int]:
    """Mean magnitude of what rans_rows left (in RANS_UNIT), and how many rows it is worth as a guess of a column's."""
    if not rows.size:
        return 0, 1
    columns = np.abs(rows).mean(axis=0)
    # Columns differ by what they are and by chance: the mean of n rows has a relative variance of
    # MAGNITUDE_VARIANCE / n. What remains is the error of the guess, and n rows of data would have the same
    spread = np.log(columns + 1 / len(rows)).var()
    error = spread - MAGNITUDE_VARIANCE / len(rows)
    return int(RANS_UNIT * columns.mean()), math.ceil(MAGNITUDE_VARIANCE / max(0.003, error))


def rans_tables(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn histograms (tables, 256) into the frequency and start of each key, and the key of each slot.

    A key is 256 * table + level + 128. Frequencies are proportional to the counts, and at least 1 where a count is not
    0; those of a table sum to 2^RANS_BITS, its number of slots.
    """
    total = 1 << RANS_BITS
    seen = counts > 0
    share = counts * (total - seen.sum(1)[:, None]) // counts.sum(1)[:, None]
    freq = np.maximum(seen, share)
    # rounding error goes to the largest
    freq[np.arange(len(freq)), freq.argmax(1)] += total - freq.sum(1)
    start = freq.cumsum(1) - freq
    keys = np.repeat(np.arange(freq.size, dtype=np.uint16), freq.ravel())
    return freq.ravel(), start.ravel(), keys


def rans_model(side_info: np.ndarray, sides: list[np.ndarray], flats: list[np.ndarray]) -> Iterator[tuple]:
    """Predict the symbols of matrices, in the same way for the encoder and the decoder.

    side_info (matrices, 6): RANS_HEAD and rans_prior. sides: of rans_rows. flats: the matrices as flat int8. Each step
    yields the integers of a row, for each its table and what to take off first, and rans_tables; the decoder must fill
    in the row before it asks for the next step.
    """
    # Classes of magnitude, 48 to an octave: edge i is 2^(i / 48) / 16
    root = 1014545335  # 2^(1 / 48) in billionths
    edges = [RANS_ONE // 16]
    while len(edges) < 512:
        edges.append(edges[-1] * root // 10**9)
    edges = np.array(edges)
    # Four classes form a context. It has a histogram for each kind of symbol (any, even, odd), which starts as the bell
    # (19 - (level / magnitude)^2)^2 / 19, in 256ths. Level -128 marks an escape: a level that the histogram has no
    # room for
    levels = np.arange(-128, 128)
    kinds = np.stack([levels < 128, levels % 2 == 0, levels % 2 == 1])
    sixteenths = levels * 16 * RANS_ONE // edges[2::4, None, None]
    counts = np.maximum(0, 19 * 16**2 - sixteenths**2) ** 2 // (19 * 16**2) * kinds
    counts[:, :, 0] = 1
    for info, side, flat in zip(side_info.tolist(), sides, flats, strict=True):
        yield from rans_matrix(info, side, flat, edges, counts)


def rans_matrix(
    info: list[int],
    side: np.ndarray,
    flat: np.ndarray,
    edges: np.ndarray,
    counts: np.ndarray,
) -> Iterator[tuple]:
    """Yield the steps of rans_model for one matrix, row by row. Updates the histograms `counts`."""
    rows, cols, states, chunk_rows, magnitude, prior_rows = info
    # sums start as if prior_rows had been seen
    sums = np.full(cols, prior_rows * magnitude // RANS_UNIT)
    subsets, state = trellis(states).numpy(), np.zeros(cols, int)
    follow = (2 * np.arange(states)[:, None] + (subsets[:, 1:] == np.arange(4))) % states  # [state, level mod 4]
    kinds = np.array([1, 2] if states > 1 else [0])
    row_class, drift_share = side.astype(int)
    row_class *= 48 // ROW_CLASSES
    scales = edges[row_class + 4 * 48]  # edge 4 * 48 is 1.0
    # what columns have shown so far, over the rows that they have seen, in rows of scale 1
    seen, drift, due = prior_rows * RANS_ONE, np.zeros(cols, int), 0
    for r in range(rows * (cols > 0)):
        # slow, so only now and then: the columns' classes, and tables for the contexts around them
        if r == due:
            due += max(2, min(64, r // 8))
            fine = np.searchsorted(edges, sums * RANS_ONE**2 // seen)
            low = max(0, (fine.min() + row_class.min()) // 4 - 3)
            high = min(127, (fine.max() + row_class.max()) // 4 + 3)
            tables = rans_tables(counts[low : high + 1, kinds].reshape(-1, 256))
        context = np.clip(fine + row_class[r] >> 2, low, high)
        here = state * (r % chunk_rows > 0)
        # a trellis keeps its parity
        unit = 4 * RANS_ONE * RANS_UNIT * len(kinds)
        offset = (drift * (drift_share[r] * scales[r]) + unit // 2) // unit * len(kinds)
        row = flat[r * cols : (r + 1) * cols]
        yield row, (context - low) * len(kinds) + (subsets[here, 0] & 1), offset, tables
        levels = row.astype(int)
        state = follow[here, levels & 3]
        drift += (levels * (RANS_ONE * RANS_UNIT) // scales[r] - drift) // 8
        levels = (levels - offset + 128 & 255) - 128
        histogram = 3 * context + kinds[levels % len(kinds)]
        # a symbol weighs 4, in 256ths
        np.add.at(counts.reshape(-1), histogram * 256 + levels + 128, 1024)
        sums += np.abs(levels)
        seen += scales[r]


def rans_encode(raw: bytes) -> bytes:
    """Code matrices framed by rans_frame with interleaved rANS (Duda 2013; Giesen 2014).

    The blob: side information, compressed by zlib; then 16-bit words: the lanes' first states, and what they read.
    """
    heads, matrices, at, log, words = [], [], 0, [], []
    while at < len(raw):
        head = rows, cols, *_ = RANS_HEAD.unpack_from(raw, at)
        at += RANS_HEAD.size
        heads.append(head)
        matrices.append(np.frombuffer(raw, np.int8, rows * cols, at).reshape(rows, cols))
        at += rows * cols
    ways, found = ((0, math.inf), (ROW_CLASSES, math.inf), (ROW_CLASSES, DRIFT_BITS)), []
    for matrix, (_, _, states, _) in zip(matrices, heads, strict=True):
        tried = (rans_rows(matrix, 1 + (states > 1), *way) for way in ways)
        found.append(min(tried, key=lambda way: way[0]))
    _, sides, left = zip(*found, strict=True)
    side_info = np.hstack([heads, [rans_prior(rows) for rows in left]]).astype("<i4")
    for row, table, offset, (freq, start, _) in rans_model(side_info, sides, [m.reshape(-1) for m in matrices]):
        level = row.astype(int) - offset + 128 & 255
        key = 256 * table + level
        escaped = (freq[key] == 0) | (level == 0)
        key[escaped] &= -256
        for a in range(0, len(key), RANS_LANES):
            part = slice(a, a + RANS_LANES)
            log.append((freq[key[part]], start[key[part]], level[part][escaped[part]]))
    lanes = np.full(min(RANS_LANES, side_info[:, 1].max()), 1 << 16)
    # a state is a stack: the decoder pops last what was pushed first
    for freq, start, escapes in reversed(log):
        lane = lanes[: len(freq)]
        full = lane >> (32 - RANS_BITS) >= freq
        words += [escapes, lane[full] & 0xFFFF]
        lane[full] >>= 16
        # rANS: push a symbol onto each lane
        quotient, slot = np.divmod(lane, freq)
        lane[:] = (quotient << RANS_BITS) + slot + start
    words = np.concatenate([lanes >> 16, lanes & 0xFFFF, *words[::-1]])
    side = b"".join(part.tobytes() for part in (side_info, *sides))
    return struct.pack("<I", len(side_info)) + zlib.compress(side, 9) + words.astype("<u2").tobytes()


def rans_decode(blob: bytes) -> bytes:
    """The inverse of rans_encode; raises some ordinary exception if the blob is damaged."""
    unzip = zlib.decompressobj()
    (count,) = struct.unpack_from("<I", blob)
    side = unzip.decompress(blob[4:], MAX_RAW)
    side_info = np.frombuffer(side, "<i4", 6 * count).reshape(-1, 6)
    bounds = 2 * side_info[:-1, 0].cumsum()
    sides = [part.reshape(2, -1) for part in np.split(np.frombuffer(side, np.int8, offset=24 * count), bounds)]
    words = np.frombuffer(unzip.unused_data, "<u2").astype(int)
    count = min(RANS_LANES, side_info[:, 1].max())
    lanes, at = words[:count] << 16 | words[count : 2 * count], 2 * count
    sizes = side_info[:, :2].prod(1)
    if sizes.sum() > MAX_RAW:
        raise ValueError(f"more than {MAX_RAW:,} bytes")
    flats = [np.empty(size, np.int8) for size in sizes]
    for row, table, offset, (freq, start, keys) in rans_model(side_info, sides, flats):
        for a in range(0, len(table), RANS_LANES):
            part = table[a : a + RANS_LANES]
            lane = lanes[: len(part)]
            slot = lane & (1 << RANS_BITS) - 1
            part[:] = keys[(part << RANS_BITS) + slot]
            # pop it again: the slot says which symbol it was
            lane[:] = freq[part] * (lane >> RANS_BITS) + slot - start[part]
            part &= 255
            # Lanes below 2^16 read a word each, then escapes, whose word is the level itself
            for array, empty in (lane, lane < 1 << 16), (part, part == 0):
                (chosen,) = empty.nonzero()
                array[chosen] = (array[chosen] << 16) + words[at : at + len(chosen)]
                at += len(chosen)
        row[:] = table - 128 + offset
    if at != len(words):
        raise ValueError("words left over")
    return b"".join(head[:4].tobytes() + flat.tobytes() for head, flat in zip(side_info, flats, strict=True))


def unbrotli(coded: bytes) -> bytes:
    """Decode brotli, up to MAX_RAW bytes; ValueError beyond, and for a truncated stream."""
    stream = require_brotli().Decompressor()
    raw = stream.process(coded, output_buffer_limit=MAX_RAW)
    if not stream.is_finished():
        raise ValueError(f"truncated, or more than {MAX_RAW:,} bytes")
    return raw


def unlzma(coded: bytes) -> bytes:
    """Decode LZMA, as unbrotli."""
    stream = lzma.LZMADecompressor()
    raw = stream.decompress(coded, max_length=MAX_RAW)
    if not stream.eof:
        raise ValueError(f"truncated, or more than {MAX_RAW:,} bytes")
    return raw


CODERS = {
    "brotli": Coder(
        lambda raw: require_brotli().compress(raw, quality=11, lgwin=24),
        unbrotli,
        require=require_brotli,
    ),
    "lzma": Coder(lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME), unlzma),
    "lzma6": Coder(lambda raw: lzma.compress(raw, preset=6), unlzma),
    # ZPAQ; -p 1: by default the block size, and so the bytes, depend on the number of processors
    "lrzip": Coder(
        lambda raw: run_lrzip(raw, "-z", "-L", "9", "-p", "1"),
        lambda coded: run_lrzip(coded, "-d"),
        require=require_lrzip,
    ),
    "rans": Coder(rans_encode, rans_decode, rans_frame, rans_unframe, RANS_HEAD.size),
}


class Codec(NamedTuple):
    """The streams that an artifact consists of, and the coder of each.

    The integers of a matrix are in the stream that stream_of(role) names. All else is in the first stream, "", which
    begins with the index.
    """

    number: int  # in the header of the artifact
    coder: str  # of the first stream
    integer_coder: str = ""  # of the other streams
    stream_of: Callable[[Role], str] = lambda role: ""
    sorted_rows: tuple[str, ...] = ()  # streams whose matrices are stored with similar rows side by side

    def coders(self, count: int) -> list[Coder]:
        """The coder of each of `count` streams."""
        return [CODERS[name] for name in (self.coder, *[self.integer_coder] * (count - 1))]

    def require(self) -> None:
        """UserError if a coder cannot run here."""
        for coder in self.coders(2 if self.integer_coder else 1):
            coder.require()


CODECS = {
    "brotli": Codec(1, "brotli", "brotli", lambda role: role.stream),  # streams are coded in parallel
    "lzma": Codec(2, "lzma"),
    "pergroup": Codec(3, "brotli", "lrzip", lambda role: role.stream, sorted_rows=("embed", "q")),
    "lzma6": Codec(4, "lzma6"),
    "rans": Codec(6, "brotli", "rans", lambda role: "integers"),  # 5 coded all rows of a matrix alike
}


def sort_rows(parts: Parts) -> Parts:
    """Put similar rows of "q" side by side, and where each came from into a further part, "order"."""
    order = similarity_order(parts["q"])
    assert len(order) <= 2**16, "too many rows for an order in uint16"
    return parts | {"q": parts["q"][order], "order": order.to(torch.uint16)}


def unsort_rows(parts: Parts) -> Parts:
    """The inverse of sort_rows, in place."""
    if "order" in parts:
        parts["q"] = parts["q"][parts.pop("order").long().argsort()]
    return parts


class Stream(NamedTuple):
    """One stream of an artifact: its coder, its coded bytes, and (Stored.key, part) -> array as it is stored."""

    name: str
    coder: str
    size: int
    arrays: dict[tuple[str, str], np.ndarray]


class Blob(NamedTuple):
    """What a model blob holds: the tensors, the streams that they were in, the text of the index, model_identity."""

    tensors: list[Stored]
    streams: list[Stream]
    index: bytes
    identity: str


def storage_order(index: list[Any]) -> dict[str, list[Any]]:
    """Map each stream to (key, part, dtype, shape) of its arrays, in the order in which they are stored.

    index: for each tensor its key and {part: [stream, dtype, shape]}.
    """
    streams = {"": []}
    for key, parts in index:
        for part, (stream, dtype, shape) in parts.items():
            streams.setdefault(stream, []).append((key, part, dtype, shape))
    # like parts of like weights together, layer after layer; the integers stay in the order of the model
    streams[""].sort(key=lambda row: (row[1], Stored.parse(row[0], {}).role))
    return streams


def pack_stored(stored: list[Stored], codec: str, identity: str = "") -> bytes:
    """Pack stored tensors, and the model_identity of what they are of, into one self-describing blob.

    Payload: number of streams (u8), their lengths (u32 each), the streams. The first one begins with the length of a
    JSON text (u32) and the text: [identity, index].
    """
    layout, index, arrays = CODECS[codec], [], {}
    for tensor in stored:
        key, stream, types = tensor.key(), layout.stream_of(ROLES[tensor.role]), {}
        parts = sort_rows(tensor.parts) if stream in layout.sorted_rows else tensor.parts
        for part, values in parts.items():
            array = arrays[key, part] = values.numpy()
            # only the integers have streams of their own
            types[part] = [stream if part == "q" else "", array.dtype.str, array.shape]
        index.append([key, types])
    text, streams = json.dumps([identity, index], separators=(",", ":")).encode(), storage_order(index)
    coders = layout.coders(len(streams))
    raws = [
        b"".join(coder.frame(arrays[key, part], arrays.get((key, "t"))) for key, part, *_ in rows)
        for coder, rows in zip(coders, streams.values(), strict=True)
    ]
    raws[0] = struct.pack("<I", len(text)) + text + raws[0]
    coded = in_parallel([coder.encode for coder in coders], raws)
    payload = struct.pack(f"<B{len(coded)}I", len(coded), *map(len, coded)) + b"".join(coded)
    return seal(layout.number, payload)


def seal(number: int, payload: bytes) -> bytes:
    """Put the header before a payload; number: of its codec."""
    # the checksum covers the header but for itself
    header = ARTIFACT_HEADER.pack(MAGIC, ARTIFACT_VERSION, number, len(payload), 0)[:-4]
    return header + struct.pack("<I", zlib.crc32(payload, zlib.crc32(header))) + payload


def in_parallel(functions: list[Callable[[bytes], bytes]], datas: list[bytes]) -> list[bytes]:
    """function(data) for each pair, on as many threads as there are processors; empty data stay empty."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda function, data: function(data) if data else b"", functions, datas))


def open_blob(blob: bytes, source: str = "artifact") -> Blob:
    """The inverse of pack_stored; UserError if the blob is foreign, of another version, truncated or damaged."""
    if len(blob) < ARTIFACT_HEADER.size or blob[:4] != MAGIC:
        raise UserError(f"{source}: not a model artifact of this program ({len(blob)} bytes, starts with {blob[:4]!r})")
    _, version, number, size, crc = ARTIFACT_HEADER.unpack_from(blob)
    if version != ARTIFACT_VERSION:
        raise UserError(f"{source}: artifact version {version}, this program reads {ARTIFACT_VERSION}; quantise again")
    payload = blob[ARTIFACT_HEADER.size :]
    if len(payload) != size:
        raise UserError(f"{source}: truncated or padded: {len(payload)} payload bytes, the header promises {size}")
    # the blob says how to open itself
    layouts = {codec.number: codec for codec in CODECS.values()}
    if number not in layouts:
        raise UserError(f"{source}: unknown codec number {number}; quantise again")
    if zlib.crc32(payload, zlib.crc32(blob[: ARTIFACT_HEADER.size - 4])) != crc:
        raise UserError(f"{source}: damaged: the checksum does not match; copy or quantise it again")
    try:
        return decode_payload(payload, layouts[number])
    except UserError:
        raise
    except Exception as error:  # each coder has errors of its own
        raise UserError(f"{source}: damaged: the payload does not decode ({error}); quantise again") from None


def decode_payload(payload: bytes, layout: Codec) -> Blob:
    """Decode a payload; raises some ordinary exception if it does not have this layout."""
    count = payload[0]
    sizes = struct.unpack_from(f"<{count}I", payload, 1)
    coders, rest = layout.coders(count), io.BytesIO(payload[1 + 4 * count :])
    if sum(sizes) != len(rest.getbuffer()):
        raise ValueError("the lengths of the streams do not add up to the payload")
    coded = [rest.read(size) for size in sizes]
    raws = list(map(io.BytesIO, in_parallel([coder.decode for coder in coders], coded)))
    (length,) = struct.unpack("<I", raws[0].read(4))
    text = raws[0].read(length)
    if len(text) != length:
        raise ValueError("the index is cut off")
    identity, index = json.loads(text)
    # in the order of the index, not of the streams
    parts = {key: dict.fromkeys(types) for key, types in index}
    streams = []
    for coder, size, raw, (name, rows) in zip(coders, sizes, raws, storage_order(index).items(), strict=True):
        arrays = {}
        for key, part, dtype, shape in rows:
            length = coder.head + np.dtype(dtype).itemsize * math.prod(shape)
            # an array that gets fewer bytes does not have its shape; read takes all for a negative number
            array = arrays[key, part] = coder.unframe(raw.read(max(0, length)), dtype, shape)
            parts[key][part] = torch.from_numpy(array)
        if raw.read(1):
            raise ValueError("the index does not account for all bytes")
        streams.append(Stream(name, layout.integer_coder if name else layout.coder, size, arrays))
    return Blob([Stored.parse(key, unsort_rows(parts[key])) for key in parts], streams, text, identity)


def read_artifact(path: str | Path, cfg: Config | None = None) -> list[Stored]:
    """The tensors in a model blob as they are stored; UserError if it cannot be read, or is of another model than
    the configuration's."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such artifact; run STAGES=train,quantize first or set MODEL_PATH")
    blob = open_blob(Path(path).read_bytes(), str(path))
    if cfg is not None and blob.identity not in ("", model_identity(cfg)):
        raise UserError(f"{path} is of a model with other knobs, such as LOGIT_SOFTCAP; use the record.env of its run")
    return blob.tensors


def load_artifact(path: str | Path, cfg: Config | None = None) -> Weights:
    """The float32 state dict in a model blob; UserError as read_artifact."""
    try:
        return dequantize(read_artifact(path, cfg))
    except (KeyError, IndexError) as error:
        raise UserError(f"{path}: written by another program or version: no {error}; quantise again") from None


def fill_model(model: GPT, state: Weights, source: str) -> None:
    """Load weights; UserError naming the first difference if they are of another model."""
    # what was fitted to hints is no weight: a state may lack it
    fitted = {name: buffer for name, buffer in model.named_buffers() if name in state}
    own = model.state_dict() | fitted
    # shapes are None where a weight is missing
    for name in sorted(own.keys() | state.keys()):
        a, b = (tuple(d[name].shape) if name in d else None for d in (own, state))
        if a != b:
            raise UserError(f"{source} is of another model: {name} has shape {b} there, {a} in this configuration")
    for name, buffer in fitted.items():
        buffer.copy_(state[name])
    model.load_state_dict(state, strict=False)


# +--------------------------------------------------------------------------------------------------------------------+
# | 12 TOKEN PRIORS                                                                                                    |
# +--------------------------------------------------------------------------------------------------------------------+


def merged(text: str, price: Mapping[str, int]) -> tuple[list[str], tuple[dict[str, int], dict[str, int]]]:
    """Merge a text's characters as SentencePiece's BPE does: the cheapest adjacent pair first, the leftmost of equals.

    Returns the symbols at the end, and all first and all last symbols, each with the clock at its birth: the highest
    price until then, -1 at the start.
    """
    symbols, clock, births = [*text], -1, ({}, {})
    while True:
        for side in (0, -1):
            births[side].setdefault(symbols[side], clock)
        pairs = enumerate(map("".join, itertools.pairwise(symbols)))
        options = [(price[pair], i) for i, pair in pairs if pair in price]
        if not options:
            return symbols, births
        due, i = min(options)
        clock = max(clock, due)
        symbols[i : i + 2] = ["".join(symbols[i : i + 2])]


def canonical_mask(processor: spm.SentencePieceProcessor) -> np.ndarray:
    """The pairs of tokens that a BPE tokenizer never writes: (V, V/8) uint8, bit x % 8 of byte x // 8 in row p.

    Between two borders of its result BPE does what it does to that span alone. So if the texts of p and x, joined,
    become something else than p and x, no text is encoded with x after p.
    """
    size = processor.vocab_size()
    # learnt pieces stand in the order of their merges, with scores from -0.0 down; controls, bytes and a user's own
    # symbols have 0.0
    learnt = (i for i in range(size) if math.copysign(1, processor.get_score(i)) < 0)
    names = {i: processor.id_to_piece(i) for i in learnt}
    price = {name: i for i, name in names.items()}
    spans = collections.defaultdict(list)
    # (side, symbol) -> pieces of which that is the first (0) or last (-1) symbol, from its birth to that of the next
    for name, i in price.items():
        _, births = merged(name, price)
        for side in (0, -1):
            clocks = [*births[side].values(), size]
            for symbol, life in zip(births[side], itertools.pairwise(clocks), strict=True):
                spans[side, symbol].append((i, *life))
    spans = {key: np.array(rows).T for key, rows in spans.items()}
    found = np.zeros((size, size), np.int8)
    # a piece across the border is made if both its halves stand there when its price is due
    for name, due in price.items():
        for cut in range(1, len(name)):
            left, right = spans.get((-1, name[:cut])), spans.get((0, name[cut:]))
            if left is not None and right is not None:
                p, start, stop = left[:, :, None]
                begin = np.maximum(np.maximum(start, right[1]), due)
                room = np.minimum(stop, right[2]) - begin
                found[p, right[0]] = np.maximum(found[p, right[0]], np.sign(room) + 1)
    # 1: a half is used up at that very price; which comes first, only BPE itself can say
    for p, x in np.argwhere(found == 1):
        found[p, x] = 2 * (merged(names[p] + names[x], price)[0] != [names[p], names[x]])
    return np.packbits(found > 1, axis=1, bitorder="little")


def checked_mask(cfg: Config, val: ValData) -> Tensor:
    """canonical_mask of the tokenizer. UserError if it bans a pair that is in the validation stream or, before a
    training, in the first 2^20 tokens of a training shard: they were not encoded document by document with it."""
    model = find_tokenizer(cfg)
    if model is None:
        raise UserError(f"CANONICAL_MASK={cfg.canonical_mask} needs the tokenizer; set TOKENIZER_PATH")
    mask = canonical_mask(spm.SentencePieceProcessor(model_proto=model.read_bytes()))
    streams = {f"DATA_PATH={cfg.data_path}, validation": val.tokens}
    if "train" in cfg.stages:
        streams |= {path: read_shard(path)[: 2**20] for path in list_shards(cfg.data_path, "train")}
    for where, tokens in streams.items() if cfg.canonical_check else ():
        before, after = tokens[:-1], tokens[1:]
        for at in np.flatnonzero(mask[before, after >> 3] >> (after & 7) & 1):
            document = np.count_nonzero(before[:at] == BOS_ID)
            raise UserError(
                f"{where}: in document {document} token {after[at]} follows {before[at]}, which {model} never writes; "
                "prepare the data again, or set CANONICAL_MASK=none"
            )
    return torch.from_numpy(mask)


# A target may carry hints: its id, the token to copy, the token to tilt to plus 1 (0: none), the bucket of the copy
ID_BITS, COPY_AT, TILT_AT, BUCKET_AT = 0xFFFF, 16, 32, 49
COPY_LENGTHS = (4, 6, 8, 12, 16, 24, 32)  # tokens of a repeat
TILT_LENGTH, TILT_SHARE, TILT_NATS = 15, 0.8, 2.625


def run_starts(values: Tensor) -> Tensor:
    """Where the run of equal neighbours begins that each value is in."""
    place = torch.arange(len(values), device=values.device)
    return torch.where(F.pad(values.diff(), (1, 0)) != 0, place, 0).cummax(0).values


def repeats(tokens: Tensor, starts: Tensor, lengths: Iterable[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Find the contexts that occur more than once in a document, whose first token does not count.

    starts (N,) bool: first tokens. For each length, ascending, yields it, the positions of the contexts' last tokens,
    sorted by context and then by position, and for each how often its context occurs before. Contexts that occur once
    may be among them. The last token of all ends none: nothing follows it.
    """
    documents = starts.cumsum(0)
    place = torch.arange(len(tokens), device=tokens.device)
    depth = place - run_starts(documents)
    depth[-1] = -1
    # numbers of the contexts of `size` tokens; 0: this one does not come again, and so no longer one does
    ids, size = documents + 1, 0
    # a context is two shorter ones that overlap, so that numbers are exact: nothing is hashed
    for k in sorted({*lengths, *(2**i for i in range(max(lengths).bit_length()))}):
        left, right = ids.roll(k - size), ids if size else tokens * min(k, 1)
        at = ((depth >= k) & (left > 0) & (ids > 0)).nonzero()[:, 0]
        keys, order = (left << 32 | right)[at].sort(stable=True)
        at, first = at[order], run_starts(keys)
        ids, size = torch.zeros_like(ids), k
        ids[at] = torch.where(first.bincount()[first] > 1, first + 1, 0)
        if k in lengths:
            yield k, at, place[: len(at)] - first


def find_tilts(cfg: Config, tokens: Tensor, starts: Tensor) -> Tensor:
    """(N,) int64 bits: the token that has most often followed the last TILT_LENGTH tokens in the document, of equals
    the first to lead, where its share is large (PR 1514; PR 2135, there over the whole stream)."""
    bits = torch.zeros_like(tokens)
    for _, at, seen in repeats(tokens, starts, [TILT_LENGTH]):
        place, followers, count = torch.arange(len(at), device=at.device), tokens[at + 1], torch.empty_like(at)
        context = place - seen << 32
        # how often the same token has followed the same context, this time included
        pairs, order = (context | followers).sort(stable=True)
        count[order] = 1 + place - run_starts(pairs)
        # the leader's count grows by 1, whenever a token is the first to reach it
        top = (context | count).cummax(0).values
        leader = followers[run_starts(top)]
        share = (top - context).roll(1).float() / seen.float()
        now = ((seen > 0) & (share >= TILT_SHARE)).nonzero()[:, 0]
        bits[at[now] + 1] = leader[now - 1] + 1 << TILT_AT
    return bits


def tilted(nll: Tensor, targets: Tensor, weights: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """nll (n,) under p(a) e^TILT_NATS / Z for a = the hint; score(ids) is the model's for other targets."""
    hint = (targets >> TILT_AT & 0x1FFFF) - 1
    grown = torch.exp(-score(hint.clamp_min(0))) * math.expm1(TILT_NATS)
    return torch.where(hint < 0, nll, nll - TILT_NATS * (hint == targets & ID_BITS) + grown.log1p())


def find_copies(cfg: Config, tokens: Tensor, starts: Tensor) -> Tensor:
    """(N,) int64 bits: what followed the latest occurrence of the longest context, of COPY_LENGTHS, that repeats in the
    document, and a bucket by length and by whether that is out of sight (idea: modded-nanogpt PR 376)."""
    bits = torch.zeros_like(tokens)
    for k, at, seen in repeats(tokens, starts, COPY_LENGTHS):
        again = seen.nonzero()[:, 0]
        target, source = at[again] + 1, at[again - 1] + 1
        bucket = 1 + 2 * COPY_LENGTHS.index(k) + (target - source > cfg.ttt_eval_seq_len)
        bits[target] = bucket << BUCKET_AT | tokens[source] << COPY_AT
    return bits


def copied(nll: Tensor, targets: Tensor, weights: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """nll (n,) under (1 - l) p(a) + l [a = hint]; weights: l by bucket."""
    weight = weights[targets >> BUCKET_AT]
    hit = targets >> COPY_AT & ID_BITS == targets & ID_BITS
    # torch 2.11 cannot compile logaddexp on a GPU
    return -torch.stack([(-weight).log1p() - nll, (weight * hit).log()]).logsumexp(0)


HINTS = {"tilt": (find_tilts, tilted), "copy": (find_copies, copied)}  # in the order in which they act


def hint_bits(cfg: Config, model: GPT, tokens: np.ndarray) -> np.ndarray:
    """What a stream's targets get from the model's hints: for each token, bits to add to it as a target."""
    stream = to_device(tokens, model.copy_weights.device)
    bits = sum(find(cfg, stream, stream == BOS_ID) for find, _ in model.hints)
    return bits.cpu().numpy()


class Hinted:
    """A learner that scores the targets of a stream with their hints; it learns as it would without."""

    def __init__(self, bits: np.ndarray, learner: Learner) -> None:
        self.bits, self.learner, self.learn = bits, learner, learner.learn

    def score(self, cells: Cells) -> Tensor:
        """(B, T) nats."""
        targets = cells.targets.copy()
        targets[cells.rows, cells.cols] |= self.bits[cells.scored()]
        return self.learner.score(cells._replace(targets=targets))


def fit_copies(cfg: Config, runtime: Runtime, model: GPT) -> Tensor:
    """Fit the weights of copies to the first COPY_FIT_TOKENS training tokens, as uint8 in 256ths.

    EM on the model's own losses: a weight becomes the mean share that copying has in the probability of what came.
    Nothing of the validation stream is read.
    """
    tokens = read_shard(list_shards(cfg.data_path, "train")[0])[: cfg.copy_fit_tokens].astype(np.int64)
    text, size = ValData(tokens, tokens), len(model.copy_weights)
    # uncompiled: the fit counts as training, and compiling would take longer
    plain = NoAdaptation(cfg, dataclasses.replace(runtime, compile=False), model.eval(), text)
    # the weights are zero still, so nothing is copied
    hints = hint_bits(cfg, model, tokens)
    meter = ByteMeter(text, runtime, scores="kept")
    score_first(plain_steps(cfg, runtime, text), Hinted(hints, plain), meter)
    position, nats, _ = np.concatenate(meter.rows).T
    bits, came = (values[position.astype(int)] for values in (hints, tokens))
    bucket, p = bits >> BUCKET_AT, np.exp(-nats)
    hit = bits >> COPY_AT & ID_BITS == came

    def total(values: np.ndarray) -> np.ndarray:
        """Sums by bucket, over all ranks."""
        return runtime.sum_(torch.from_numpy(np.bincount(bucket, values, size))).numpy()

    weight = np.full(size, 0.5)
    # with a miss more than was seen, so that a bucket of a few hits is not certain
    count = total(np.ones_like(p)) + 1
    for _ in range(100):
        own = weight[bucket]
        weight = total(hit * own / (p + own * (hit - p))) / count
    # bucket 0 is that of targets without a hint
    weight[0] = 0
    return torch.from_numpy((256 * weight).round().clip(0, 255).astype(np.uint8))


# +--------------------------------------------------------------------------------------------------------------------+
# | 13 EVALUATION                                                                                                      |
# +--------------------------------------------------------------------------------------------------------------------+


class Score(NamedTuple):
    """Result of an evaluation: nats per token, bits per byte, what was scored, how long it took, legal or not."""

    val_loss: float
    val_bpb: float
    tokens: int
    bytes: int
    seconds: float
    legal: bool
    unadapted: int = 0  # tokens that were scored without adaptation because EVAL_BUDGET_SECONDS ran out


class Cells(NamedTuple):
    """What is scored in one forward."""

    # (B, T) int64
    ids: np.ndarray
    targets: np.ndarray
    # the target in cell (row, col) is token origin[row] + col of the validation stream
    origin: np.ndarray
    # the cells that are scored
    rows: np.ndarray
    cols: np.ndarray
    # attention segments over the B*T cells; None: rows are the segments
    cu_seqlens: Tensor | None = None
    # where rows adapt to documents: which one each row holds; -1: the row is idle
    documents: np.ndarray | None = None
    # how many targets of its document come before a row's scored ones
    begin: np.ndarray | None = None
    # tokens of a chunk: the last columns, in which all that is scored lies
    chunk: int = 0
    # flattened cells whose targets the score itself is fitted on
    fit: np.ndarray | None = None

    def scored(self) -> np.ndarray:
        """Stream positions of the scored targets."""
        return self.origin[self.rows] + self.cols

    def fitted(self) -> np.ndarray:
        """Stream positions of the targets that the score is fitted on."""
        row, col = np.divmod(self.fit, self.ids.shape[1])
        return self.origin[row] + col


class Lesson(NamedTuple):
    """What may be learnt from the cells just scored: the targets of some rows in some columns, by this rank alone."""

    rows: np.ndarray
    cols: slice
    shared = False

    def targets(self, cells: Cells) -> np.ndarray:
        """Stream positions of the targets that are learnt."""
        cols = np.arange(self.cols.start, self.cols.stop)
        return (cells.origin[self.rows, None] + cols).reshape(-1)


class SharedLesson(NamedTuple):
    """What all ranks learn together: ranges of stream positions, whichever rank has scored them."""

    spans: tuple[range, ...]
    shared = True

    def targets(self, cells: None = None) -> np.ndarray:
        """Stream positions of the targets that are learnt."""
        # a document of one token has none
        return np.concatenate([np.arange(span.start, span.stop) for span in self.spans])

    def tokens(self) -> np.ndarray:
        """Stream positions of what is read: each span's targets, and the token before them."""
        whole = [range(span.start - 1, span.stop) for span in self.spans]
        return np.concatenate(whole)


class Step(NamedTuple):
    """What happens next in an evaluation: cells are scored, then a lesson is learnt; either may be missing."""

    cells: Cells | None
    lesson: Lesson | SharedLesson | None = None


class LegalityError(AssertionError):
    """A score that would break the contest's rules: raised, never only asserted, so that `python -O` keeps it."""


class Ledger:
    """Which targets have been scored. A second score, or learning from an unscored target, raises LegalityError.

    So does a score that is fitted on what it scores, unless `noncausal` scores are allowed; then `legal` turns False.
    """

    def __init__(self, length: int, noncausal: bool = False) -> None:
        self.count = np.zeros(length, np.uint8)
        # the first token of the stream is never a target
        self.count[0] = 1
        self.noncausal, self.legal = noncausal, True

    def admit(self, cells: Cells) -> None:
        """Check that a score is fitted only on targets before all that it scores."""
        # windows are scored in the order of the stream, so what comes before them is scored already
        if cells.fit is None or not len(cells.fit) or cells.fitted().max() < cells.scored().min():
            return
        if not self.noncausal:
            raise LegalityError("a score is fitted on a target that it scores, or on a later one")
        self.legal = False

    def claim(self, positions: np.ndarray) -> None:
        """Mark targets as scored."""
        if len(np.unique(positions)) != len(positions) or self.count[positions].any():
            raise LegalityError("a target is scored twice")
        self.count[positions] = 1

    def require(self, positions: np.ndarray) -> None:
        """Check that targets have been scored."""
        if not self.count[positions].all():
            raise LegalityError("learning would read a target that is not scored yet")

    def require_anywhere(self, positions: np.ndarray, runtime: Runtime) -> None:
        """Check that some rank has scored each target; every rank calls this."""
        counts = runtime.sum_(torch.from_numpy(self.count[positions].astype(np.int32)))
        if not bool((counts > 0).all()):
            raise LegalityError("a shared lesson would read a target that no rank has scored yet")

    def close(self, runtime: Runtime) -> None:
        """Check over all ranks that every target has been scored exactly once."""
        total = runtime.sum_(torch.from_numpy(self.count.astype(np.int32)))
        # the first token is nobody's target
        wrong = int((total[1:] != 1).sum())
        if wrong:
            raise LegalityError(f"{wrong} targets are not scored exactly once over the ranks")


class ByteMeter:
    """Sums of loss (float64, on the device), tokens and bytes over the scored targets, with their ledger."""

    def __init__(self, val: ValData, runtime: Runtime, noncausal: bool = False, scores: str = "") -> None:
        self.val, self.runtime, self.scores = val, runtime, scores
        self.rows = [np.empty((0, 3))]  # of SCORES
        self.ledger = Ledger(len(val.tokens), noncausal)
        self.loss = torch.zeros((), dtype=torch.float64, device=runtime.device)
        self.tokens, self.bytes = 0, 0
        # all cells computed, whether what is scored now is too late to be adapted, and how many tokens were
        self.cells, self.late, self.unadapted = 0, False, 0
        self.started = time.perf_counter()

    def add(self, cells: Cells, nll: Tensor) -> None:
        """Count the scored cells of nll (B, T)."""
        positions = cells.scored()
        self.ledger.claim(positions)
        rows, cols = (to_device(a, nll.device) for a in (cells.rows, cells.cols))
        nats = nll.detach()[rows, cols].double()
        self.loss += nats.sum()
        if self.scores:
            self.rows.append(np.column_stack([positions, nats.cpu(), np.full(len(positions), len(self.rows))]))
        self.tokens += len(positions)
        self.unadapted += self.late * len(positions)
        self.cells += cells.ids.size
        self.bytes += int(self.val.bytes[positions].sum())

    def close(self) -> Score:
        """The score over all ranks."""
        self.ledger.close(self.runtime)
        if self.scores:
            np.save(f"{self.scores}.{self.runtime.rank}.npy", np.concatenate(self.rows))
            # an earlier evaluation may have had more ranks
            beyond = (Path(f"{self.scores}.{rank}.npy") for rank in itertools.count(self.runtime.world))
            for path in itertools.takewhile(Path.is_file, beyond):
                path.unlink(missing_ok=True)
        loss = self.runtime.sum_(self.loss).item()
        tokens, size, illegal, unadapted = self.runtime.sum_(
            torch.tensor([self.tokens, self.bytes, not self.ledger.legal, self.unadapted])
        ).tolist()
        seconds = self.runtime.broadcast_from_rank0(time.perf_counter() - self.started)
        if not math.isfinite(loss):
            raise FloatingPointError(f"validation loss is {loss}; the model or the data is damaged")
        return Score(loss / tokens, loss / (math.log(2) * size), tokens, size, seconds, not illegal, unadapted)


class Learner(Protocol):
    """What test-time training does with cells. It is made, and compiles, before the clock of the evaluation runs."""

    model: GPT  # as adapted, but for what is a document's own

    def score(self, cells: Cells) -> Tensor:
        """(B, T) nats, at least of the scored cells, from what was learnt before; asking twice changes nothing."""

    def learn(self, lesson: Lesson | SharedLesson, cells: Cells | None, nll: Tensor | None) -> None:
        """Learn from what is scored; cells, and nll as score returned it, are those of the same step."""


def score_first(steps: Iterable[Step], learner: Learner, meter: ByteMeter) -> None:
    """The only loop that may adapt a model: cells are scored and in the ledger before anything learns from them."""
    for cells, lesson in steps:
        # score, then enter the score in the ledger ...
        nll = None
        if cells is not None:
            meter.ledger.admit(cells)
            nll = learner.score(cells)
            meter.add(cells, nll)
        # ... and only then let the learner see what the ledger has checked
        if lesson is None:
            continue
        if lesson.shared:
            meter.ledger.require_anywhere(lesson.targets(), meter.runtime)
        else:
            meter.ledger.require(lesson.targets(cells))
        learner.learn(lesson, cells, nll)


EVAL_RESERVE = 0.05  # share of EVAL_BUDGET_SECONDS that is kept free


def until_late(steps: Iterable[Step], meter: ByteMeter, limit: float) -> Iterator[Step]:
    """The steps, until a plain pass over the stream would just end within `limit` seconds of the meter's clock. Then
    every rank stops, by rank 0's clock, and meter.late is set. Logs progress by this rank's tokens, times the ranks."""
    runtime, total, busy = meter.runtime, len(meter.val.tokens) - 1, 0.0
    for step in itertools.chain(steps, [Step(None)]):
        begun = time.perf_counter()
        seconds = begun - meter.started
        # A plain pass computes each token once and has no gradient: at the pace of adaptation it is overestimated.
        # A pace that was measured over less than a tenth of the time means nothing yet
        plain = busy / max(1, meter.cells) * len(meter.val.tokens) / runtime.world
        late = runtime.is_late(seconds > limit / 10 and seconds + plain > limit)
        # the ranks meet at shared lessons and at the end, where each waits for the others, or right now
        if late or step.cells is None:
            meter.late = runtime.broadcast_from_rank0(late) > 0
        if meter.late:
            return
        yield step
        # in a shared lesson ranks wait for one another: that says nothing of the pace
        busy += (time.perf_counter() - begun) * (step.cells is not None)
        done = min(total, meter.tokens * runtime.world)
        runtime.log.progress("evaluation, tokens", done, total, meter.started)


class Evaluator(NamedTuple):
    """A way to evaluate, a row of EVALS: a rank's steps in their order, and the learner that scores them."""

    steps: Callable[[Config, Runtime, ValData], Iterator[Step]]
    learner: Callable[[Config, Runtime, GPT, ValData], Learner]

    def __call__(self, cfg: Config, runtime: Runtime, model: GPT, val: ValData, deadline: float = math.inf) -> Score:
        """Score a stream; whatever compiles does so before the clock runs. Adaptation ends where the rest, unadapted,
        is expected to be done by the deadline, a time of time.perf_counter."""
        model.eval()
        learner = self.learner(cfg, runtime, model, val)
        # who does not learn compiles by scoring the first cells, which changes nothing
        if runtime.compile and type(learner) is NoAdaptation:
            for cells, _ in itertools.islice(self.steps(cfg, runtime, val), 1):
                learner.score(cells)
        # the clock starts here, for all ranks at once: one may have compiled for longer
        runtime.barrier()
        meter = ByteMeter(val, runtime, cfg.allow_noncausal, cfg.scores)
        # searched once, for both passes below
        bits = hint_bits(cfg, learner.model, val.tokens) if cfg.hints else None
        hinted = functools.partial(Hinted, bits) if cfg.hints else lambda plain: plain
        steps = self.steps(cfg, runtime, val)
        score_first(until_late(steps, meter, deadline - meter.started), hinted(learner), meter)
        if meter.late:
            # uncompiled: compiling would take longer than the pass
            plain = NoAdaptation(cfg, dataclasses.replace(runtime, compile=False), learner.model, val)
            score_first(rest_steps(cfg, runtime, val, meter.ledger), hinted(plain), meter)
        model.train()
        return meter.close()


def mark_dynamic(runtime: Runtime, *tensors: Tensor, dim: int = 0) -> None:
    """Let one compiled graph serve every size of a dimension."""
    if runtime.compile:
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


class NoAdaptation:
    """The learner that does not learn."""

    def __init__(self, cfg: Config, runtime: Runtime, model: GPT, val: ValData) -> None:
        self.model, self.runtime, self.max_len = model, runtime, cfg.eval_seq_len
        self.forward = compiled(runtime, model)

    def inputs(self, cells: Cells) -> tuple[Tensor, Tensor, AttnMeta]:
        """ids, targets and AttnMeta on the device."""
        batch = Batch(cells.ids, cells.targets, cells.cu_seqlens)
        return on_device(self.model, batch, self.runtime, self.max_len)

    @torch.no_grad()
    def score(self, cells: Cells) -> Tensor:
        """(B, T) nats of the scored cells, which alone get the head."""
        ids, targets, meta = self.inputs(cells)
        scored = to_device(cells.rows * ids.size(1) + cells.cols, ids.device)
        mark_dynamic(self.runtime, scored)
        return scatter_losses(cells, scored, self.forward(ids, targets, meta, None, "none", scored))

    def learn(self, lesson: Lesson | SharedLesson, cells: Cells | None, nll: Tensor | None) -> None:
        """Nothing."""


def scatter_losses(cells: Cells, scored: Tensor, losses: Tensor) -> Tensor:
    """(B, T) with the losses of the `scored` flattened cells in place. Other cells are NaN, so an accidental use
    poisons the sum."""
    nll = losses.new_full(cells.ids.shape, math.nan)
    nll.view(-1)[scored] = losses
    return nll


def plain_steps(cfg: Config, runtime: Runtime, val: ValData) -> Iterator[Step]:
    """Non-overlapping spans: packed documents cut at EVAL_SEQ_LEN, or rows of it, as the model was trained."""
    make_batch = packed_docs_batch if LOADERS[cfg.loader].documents else stream_batch
    size = windows_per_batch(cfg) * cfg.eval_seq_len
    starts = range(0, len(val.tokens) - 1, size)
    for start in starts[runtime.rank :: runtime.world]:
        # the last span is padded with zeros: one shape, one graph
        real = val.tokens[start : start + size + 1]
        span = np.pad(real, (0, size + 1 - len(real)))
        batch = make_batch(span, cfg.eval_seq_len)
        width = batch.ids.size(1)
        rows, cols = np.divmod(np.arange(len(real) - 1), width)
        origin = start + 1 + np.arange(0, size, width)
        yield Step(Cells(batch.ids.numpy(), batch.targets.numpy(), origin, rows, cols, batch.cu_seqlens))


def rest_steps(cfg: Config, runtime: Runtime, val: ValData, ledger: Ledger) -> Iterator[Step]:
    """plain_steps of the targets that no rank has scored yet."""
    counts = runtime.sum_(torch.tensor(ledger.count, dtype=torch.int32)).numpy()
    for cells, _ in plain_steps(cfg, runtime, val):
        left = counts[cells.scored()] == 0
        rows, cols = cells.rows[left], cells.cols[left]
        if len(rows):
            yield Step(cells._replace(rows=rows, cols=cols))


def window_rows(num_targets: int, length: int, stride: int) -> np.ndarray:
    """(windows, 4) int64: start, length, first, last of sliding windows; their cells first..last are scored."""
    # The published n-gram scripts go on to the last start below num_targets and score the last `stride` targets again
    # with less and less context: length / stride - 1 windows more, whose scores here do not count twice.
    # one window, and another for every stride that begins beyond it
    count = 1 + max(0, -(-(num_targets - length) // stride))
    start = np.arange(count) * stride
    stop = np.minimum(start + length, num_targets)
    # the first window scores all its cells, each later one what no window before it reached
    reached = np.concatenate([[0], stop[:-1]])
    return np.stack([start, stop - start, reached - start, stop - start], axis=1)


def row_cells(
    val: ValData,
    first: np.ndarray,
    length: np.ndarray,
    offset: np.ndarray,
    width: int,
) -> Cells:
    """(rows, width) cells with `length` tokens from stream position `first` on, then zeros; they are scored from column
    `offset` on."""
    cols = np.arange(width)
    inside = cols < length[:, None]
    # cells outside a row read token 0, and are zeroed below
    where = np.where(inside, first[:, None] + cols, 0)
    ids, targets = (np.where(inside, val.tokens[where + inside * i], 0) for i in (0, 1))
    # row by row, so the losses come in the order of the stream within a row
    rows, scored = np.nonzero(inside & (cols >= offset[:, None]))
    return Cells(ids, targets, first + 1, rows, scored)


def window_cells(cfg: Config, val: ValData, windows: np.ndarray) -> Cells:
    """A batch of some of window_rows, zero-padded to full size. Context as the model was trained."""
    start, length, first, _ = windows.T
    cells = row_cells(val, start, length, first, cfg.eval_seq_len)
    # rows of zeros, which have no scored cell
    missing = windows_per_batch(cfg) - len(windows)
    padding = (0, missing), (0, 0)
    ids, targets = np.pad(cells.ids, padding), np.pad(cells.targets, padding)
    bounds = row_bounds(cfg, ids)
    return cells._replace(ids=ids, targets=targets, cu_seqlens=bounds)


def windows_per_batch(cfg: Config) -> int:
    """Windows that are scored in one forward, whatever the number of ranks."""
    return cfg.val_batch_tokens // cfg.batch_slices // cfg.eval_seq_len


def window_steps(cfg: Config, runtime: Runtime, val: ValData, windows: np.ndarray) -> Iterator[Step]:
    """This rank's batches of some windows. Batches do not depend on the ranks."""
    size = windows_per_batch(cfg)
    batches = range(0, len(windows), size)
    for first in batches[runtime.rank :: runtime.world]:
        yield Step(window_cells(cfg, val, windows[first : first + size]))


def sliding_steps(cfg: Config, runtime: Runtime, val: ValData) -> Iterator[Step]:
    """Windows of EVAL_SEQ_LEN every EVAL_STRIDE tokens, some per batch."""
    windows = window_rows(len(val.tokens) - 1, cfg.eval_seq_len, cfg.eval_stride)
    return window_steps(cfg, runtime, val, windows)


# +--------------------------------------------------------------------------------------------------------------------+
# | 14 TEST-TIME TRAINING                                                                                              |
# +--------------------------------------------------------------------------------------------------------------------+


def lora_shapes(cfg: Config, model: GPT) -> dict[str, tuple[int, int]]:
    """<site>_<execution> -> (out, in) of every adapter on the model's current route; by name, which is the order in
    which a document's A is drawn."""
    D, V, chosen = cfg.model_dim, cfg.vocab_size, {*cfg.ttt_lora_sites}
    if chosen & {"q", "k", "v"}:
        chosen.add("qkv")  # the joint projection of a delta layer
    found = {"head_0": (V, D)} if "head" in chosen else {}
    for execution, layer in enumerate(model.route.layers):
        shapes = {p.role: p.shape for p in model.blocks[layer].attn.parameters()}
        shapes |= {"attn": (D, D), "mlp": (D, D)}
        found |= {f"{site}_{execution}": shapes[site] for site in chosen & shapes.keys()}
    return dict(sorted(found.items()))


ADAPTER_EPS = 1e-10  # of AdamW, as published
SAME_INPUT = ("q", "k", "v", "qkv", "attn")  # sites that read the mixer's normed input


class AdapterState(NamedTuple):
    """Buffers of adapters, (rows, entries); a row holds one document's A of all sites, then its B of all sites."""

    # at least float32
    weights: Tensor
    # the copy that computes, in the activations' dtype; None where weights has that dtype
    live: Tensor | None
    # AdamW's moments; without beta1 there is no first one to keep
    first: Tensor | None
    second: Tensor
    # (rows, 1) float64
    steps: Tensor

    map = mapped


def bias_correction(cfg: Config, steps: Tensor) -> Tensor:
    """(rows, 2): what AdamW divides the rate and the second moment's root by, by the steps (rows, 1) of each row."""
    # float64: at step 1 float32 would lose four digits of 1 - 0.999; beta1 = 0 leaves 1 - 0^steps = 1
    return torch.cat([1 - cfg.ttt_beta1**steps, (1 - cfg.ttt_beta2**steps).sqrt()], dim=1)


@torch.no_grad()
def adapter_adamw_(cfg: Config, state: AdapterState, grad: Tensor, correction: Tensor) -> None:
    """A step of AdamW (Loshchilov & Hutter 2019) on every entry, with the bias_correction of its row."""
    weights, live, first, second, _ = state
    # compiled, this is one pass over the buffers: the gradient is read as the backward left it
    grad = grad.to(weights.dtype)
    first_bias, second_bias = correction.to(weights.dtype).split(1, dim=1)
    # decoupled decay first, as in torch
    weights.mul_(1 - cfg.ttt_lora_lr * cfg.ttt_weight_decay)
    second.mul_(cfg.ttt_beta2).addcmul_(grad, grad, value=1 - cfg.ttt_beta2)
    if first is not None:
        grad = first.lerp_(grad, 1 - cfg.ttt_beta1)
    weights.sub_(cfg.ttt_lora_lr / first_bias * grad / (second.sqrt() / second_bias + ADAPTER_EPS))
    if live is not None:
        live.copy_(weights)


class Adapters:
    """Low-rank adapters, one set per document, site and execution (Hu et al. 2021), with their AdamW: a taps listener
    that adds scale * x A^T B^T.

    A^T (rows, in, rank) is uniform in +-1/sqrt(in), drawn per document; B^T (rows, rank, out) starts at zero, so that
    fresh adapters leave the model bitwise unchanged. "attn" and "mlp" adapters read the sublayer's normed input. Both
    are stored transposed, as they multiply: then their gradients are contiguous. They are plain tensors, views of the
    rows in use: Dynamo would keep every dimension of an nn.Parameter static.
    """

    def __init__(self, cfg: Config, runtime: Runtime, model: GPT, rows: int) -> None:
        self.cfg, self.runtime, rank = cfg, runtime, cfg.ttt_lora_rank
        self.scale = cfg.ttt_lora_alpha / rank
        self.low = {}  # x A^T of the sites whose turn is still to come in this execution
        found = lora_shapes(cfg, model)
        self.sites = frozenset(key.partition("_")[0] for key in found)
        shapes_A = {key: (d_in, rank) for key, (_, d_in) in found.items()}
        shapes_B = {key: (rank, d_out) for key, (d_out, _) in found.items()}
        self.shapes = (shapes_A, shapes_B)
        self.sizes = [math.prod(shape) for half in self.shapes for shape in half.values()]
        weights = at_least_fp32(model.tok_emb.weight.new_zeros(rows, sum(self.sizes), dtype=model.dtype))
        self.all = AdapterState(
            weights,
            live=None if model.dtype == weights.dtype else weights.to(model.dtype),
            first=torch.zeros_like(weights) if cfg.ttt_beta1 > 0 else None,
            second=torch.zeros_like(weights),
            steps=weights.new_zeros(rows, 1, dtype=torch.float64),
        )
        self.bound = torch.cat([weights.new_full((rank * d_in,), d_in**-0.5) for d_in, _ in shapes_A.values()])
        self.adamw_ = compiled(runtime, adapter_adamw_)
        self.use_rows(rows)

    def use_rows(self, rows: int) -> None:
        """Let the first `rows` rows compute."""
        self.state = self.all.map(lambda t: t[:rows])
        live = self.state.weights if self.state.live is None else self.state.live
        views = iter(live.split(self.sizes, dim=1))
        # leaves of their own: the gradient of a view of a leaf would be as large as the whole buffer
        self.A, self.B = (
            {key: next(views).unflatten(1, shape).detach().requires_grad_() for key, shape in half.items()}
            for half in self.shapes
        )
        self.state.map(lambda t: mark_dynamic(self.runtime, t))
        mark_dynamic(self.runtime, *self.leaves())

    def leaves(self) -> list[Tensor]:
        """A of all sites, then B of all sites: the order of a buffer's entries."""
        return [*self.A.values(), *self.B.values()]

    @torch.no_grad()
    def keep_rows(self, index: Tensor) -> None:
        """Go on with some of the rows only, moved to the front."""
        rows = len(index)
        self.all.map(lambda t: t[:rows].copy_(t[index]))
        self.use_rows(rows)

    @torch.no_grad()
    def renew(self, row: int, document: int, keep_A: bool = False) -> None:
        """Fresh adapters for a row's new document; keep_A: but for A, which goes on from the row's document before."""
        state, size = self.all.map(lambda t: t[row]), len(self.bound)
        # what is left of the row, B, moments and steps, begins at zero
        A = state.weights[:size].clone() if keep_A else self.draw(document).mul_(self.bound)
        state.map(Tensor.zero_)
        state.weights[:size] = A
        if state.live is not None:
            state.live.copy_(state.weights)

    def draw(self, document: int) -> Tensor:
        """All entries of a document's A before their bound, uniform in +-1, by the seed and the document alone."""
        # 32 bits: torch's seeds on a CPU
        mixed = np.random.SeedSequence((self.cfg.seed, document)).generate_state(1)
        device = self.bound.device
        generator = torch.Generator(device).manual_seed(int(mixed[0]))
        return torch.rand(len(self.bound), generator=generator, device=device).mul_(2).sub_(1)

    def step(self, nll: Tensor, learns: Tensor) -> None:
        """Learn from nll (rows, chunk): each row the mean of its own, times learns (rows,), which is 0 or 1.

        AdamW moves the other rows too; their documents have ended.
        """
        # rows share no entry, so one backward of the sum gives each row its own gradient
        loss = (nll.mean(dim=1) * learns).sum()
        grads = torch.autograd.grad(loss, self.leaves())
        grad = torch.cat([g.flatten(1) for g in grads], dim=1)
        self.state.steps.add_(1)
        # outside the compiled pass, which would compute float64 powers for every entry
        correction = bias_correction(self.cfg, self.state.steps)
        mark_dynamic(self.runtime, grad, correction)
        self.adamw_(self.cfg, self.state, grad, correction)

    def __call__(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """y with what the site's adapters add to it, if it has any."""
        # the head has execution -1, and one adapter
        execution = max(site.execution, 0)
        key = f"{site.name}_{execution}"
        if key not in self.A:
            return y
        if key not in self.low:
            # one product for all sites that read this x: it is read once, and its gradient written once
            together = SAME_INPUT if site.name in SAME_INPUT else (site.name,)
            names = [f"{name}_{execution}" for name in together]
            keys = [name for name in names if name in self.A]
            low = x @ (self.scale * torch.cat([self.A[k] for k in keys], dim=-1))
            self.low.update(zip(keys, low.chunk(len(keys), dim=-1), strict=True))
        # each site takes its own away, so nothing is left behind
        low = self.low.pop(key)
        # in y's dtype, as logits are wider. The sum fuses into what reads it; baddbmm would copy y first
        return y + low.to(y.dtype) @ self.B[key].to(y.dtype)


def document_batches(docs: list[tuple[int, int]], size: int) -> list[list[int]]:
    """Documents grouped by length, `size` at a time: indices ascending by length in a group, longest group first."""
    order = sorted(range(len(docs)), key=lambda i: docs[i][1])
    starts = range(0, len(order), size)
    groups = [order[start : start + size] for start in starts]
    groups.sort(key=lambda group: -docs[group[-1]][1])
    return groups


def chunk_window(chunk: int, predictions: Any, size: int, window: int) -> tuple[Any, Any, Any, Any]:
    """For chunk number `chunk` of documents with so many predictions (an int, or an array): window start, window
    length, and the scored chunk's offset and length inside the window. The window ends with the chunk and is at most
    `window` long."""
    first = chunk * size
    stop = np.minimum(first + size, predictions)
    start = np.maximum(0, stop - window)
    return start, stop - start, first - start, stop - first


def document_step(
    val: ValData,
    documents: np.ndarray,
    begin: np.ndarray,
    first: np.ndarray,
    length: np.ndarray,
    offset: np.ndarray,
    lesson: Lesson,
) -> Step:
    """Rows of documents: row_cells of lesson.cols.stop columns. See Cells for documents and begin."""
    cells = row_cells(val, first, length, offset, lesson.cols.stop)
    chunk = lesson.cols.stop - lesson.cols.start
    cells = cells._replace(documents=documents, begin=begin, chunk=chunk)
    return Step(cells, lesson if len(lesson.rows) else None)


def rows_to_keep(unfinished: np.ndarray) -> np.ndarray:
    """The rows that go on: all of them, or half, a quarter ... where those hold every unfinished one. Few different
    numbers of rows, as each costs the attention backend a plan; never 1, which is a graph of its own."""
    rows = len(unfinished)
    while rows // 2 >= max(2, unfinished.sum()):
        rows //= 2
    return np.sort(np.argsort(~unfinished, kind="stable")[:rows])


def batch_steps(cfg: Config, val: ValData, docs: list[tuple[int, int]], batches: Iterable[list[int]]) -> Iterator[Step]:
    """The steps of batches of documents: chunk after chunk, the rows side by side, each with its window.

    Rows of finished documents are dropped, unless A lives on in them.
    """
    window, rows = cfg.ttt_eval_seq_len, min(cfg.ttt_batch_size, len(docs))
    starts, lengths = np.array(docs).T
    predictions = lengths - 1  # the first token of a document is none
    for batch in batches:
        # only the first batch, of the longest documents, may be smaller
        # the last batch is filled up with idle rows: one shape, one graph
        documents = np.pad(batch, (0, rows - len(batch)), constant_values=-1)
        # documents of a batch are of about one length
        size = up_to(cfg.ttt_chunk_size, lengths[batch].max())
        for c in range(-(-predictions[batch].max() // size)):
            # from this chunk on
            left = np.where(documents < 0, 0, predictions[documents] - c * size)
            if not cfg.ttt_warm_start_a:
                kept = rows_to_keep(left > 0)
                documents, left = documents[kept], left[kept]
            start, length, offset, _ = chunk_window(c, predictions[documents], size, window)
            width = min((c + 1) * size, window)
            yield document_step(
                val,
                documents,
                begin=np.full(len(documents), c * size),
                first=starts[documents] + start,
                length=np.where(left > 0, length, 0),
                offset=offset,
                lesson=Lesson(np.flatnonzero(left > size), slice(width - size, width)),
            )


def carried_steps(
    cfg: Config, val: ValData, docs: list[tuple[int, int]], batches: Iterable[list[int]]
) -> Iterator[Step]:
    """The next chunk of each row's document, over and over. A row whose document has ended takes the next of the queue;
    once the queue is empty, it is idle."""
    size, rows = cfg.ttt_chunk_size[0].value, min(cfg.ttt_batch_size, len(docs))
    queued = (document for batch in batches for document in batch)
    starts, lengths = np.array(docs).T
    documents, begin, offset = np.full(rows, -1), np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    while True:
        # rows without a document take the next one that this rank has claimed
        for row in np.flatnonzero(documents < 0):
            documents[row], begin[row] = next(queued, -1), 0
        if (documents < 0).all():
            return
        # predictions left; idle rows have none
        left = np.where(documents < 0, 0, lengths[documents] - 1 - begin)
        first = np.where(documents < 0, 0, starts[documents] + begin)
        lesson = Lesson(np.flatnonzero(left > size), slice(0, size))
        yield document_step(val, documents.copy(), begin.copy(), first, left, offset, lesson)
        # on to the next chunk; rows that have just scored their last one are free
        begin += size
        documents[left <= size] = -1


class DocLora:
    """Adapters per document: each chunk is scored, then learnt; every document starts from fresh adapters. A shared
    lesson is a global update of all weights (see global_update).

    Rows are independent: AdamW is elementwise and the loss is a sum over rows of a row's mean over its chunk. A score
    depends on its document alone, but with TTT_WARM_START_A on all documents that were in its row before.
    """

    def __init__(self, cfg: Config, runtime: Runtime, model: GPT, val: ValData) -> None:
        self.cfg, self.runtime, self.tokens = cfg, runtime, val.tokens
        self.model = model.requires_grad_(False)
        self.forward = compiled(runtime, model)
        self.num_rows = min(cfg.ttt_batch_size, len(val_documents(val.tokens)))
        self.adapters = None
        if cfg.ttt_lora_lr > 0:
            self.adapters = Adapters(cfg, runtime, model, self.num_rows)
        self.documents = np.full(self.num_rows, -1)
        # whether the rows hold an A that TTT_WARM_START_A keeps
        self.warm = False
        self.prepare()

    def prepare(self) -> None:
        """Compile, on random tokens: one graph serves all windows, chunks and rows."""
        if not self.runtime.compile:
            return
        rows, window = self.num_rows, self.cfg.ttt_eval_seq_len
        sizes = [size for _, size in self.cfg.ttt_chunk_size]
        # equal sizes would become one symbol
        widths = [window - (window == rows)]
        # the backward of attention on a GPU has another graph for widths that 8 does not divide
        if any(size % 8 for size in (window, *sizes)):
            other = widths[0] % 8 == 0
            widths += [n for n in range(window - 8, window) if (n % 8 > 0) == other and n != rows][-1:]
        for width in widths:
            size = next(size for size in itertools.count(max(sizes)) if size not in (rows, width))
            ids = np.random.default_rng(0).integers(0, self.cfg.vocab_size, (rows, width))
            zeros, none = np.zeros(rows, np.int64), np.empty(0, np.int64)
            cells = Cells(ids, ids, zeros, none, none, None, np.arange(rows), zeros, size)
            lesson = Lesson(np.arange(rows), slice(width - size, width))
            # what is learnt here is renewed when the first document begins
            self.learn(lesson, cells, self.score(cells))
        self.warm = False

    def place(self, cells: Cells) -> None:
        """Bring the adapters into the rows of their documents; those of documents that begin are fresh."""
        if cells.begin[0] == 0:  # a new batch
            self.adapters.use_rows(len(cells.documents))
        elif len(cells.documents) < len(self.documents):
            index = [np.flatnonzero(self.documents == document)[0] for document in cells.documents]
            self.adapters.keep_rows(torch.tensor(index, device=self.runtime.device))
        self.documents = cells.documents
        self.renew(cells)

    def renew(self, cells: Cells) -> None:
        """Fresh adapters for the documents that begin."""
        starting = np.flatnonzero((cells.begin == 0) & (cells.documents >= 0))
        # published: the rows of a full batch keep their A from the batch before
        full = self.cfg.ttt_warm_start_a and len(starting) == self.cfg.ttt_batch_size
        for row in starting:
            self.adapters.renew(row, cells.documents[row], keep_A=full and self.warm)
        self.warm = self.warm or full

    def losses(self, cells: Cells) -> Tensor:
        """(rows, T) nats with the adapters as they are, NaN before the chunk."""
        batch = Batch(cells.ids, cells.targets, None)
        ids, targets, meta = on_device(self.model, batch, self.runtime, self.cfg.ttt_eval_seq_len)
        mark_dynamic(self.runtime, ids, targets, meta.cos, meta.sin)
        mark_dynamic(self.runtime, ids, targets, dim=1)
        # a window ends with its chunk: the head is computed for no other column
        before = ids.size(1) - cells.chunk
        columns = torch.arange(before, ids.size(1), device=ids.device)
        mark_dynamic(self.runtime, columns)
        nll = self.forward(ids, targets, meta, self.adapters, "none", columns=columns)
        return F.pad(nll, (before, 0), value=math.nan)

    def score(self, cells: Cells) -> Tensor:
        """(rows, T) nats of the scored cells; the graph is kept even if nothing will be learnt, which saves another
        compilation."""
        if self.adapters is not None:
            self.place(cells)
        with torch.set_grad_enabled(self.adapters is not None):
            return self.losses(cells)

    def learn(self, lesson: Lesson | SharedLesson, cells: Cells | None, nll: Tensor | None) -> None:
        """TTT_GRAD_STEPS updates of the adapters, the first by the graph of the score itself; or a global update."""
        if lesson.shared:
            steps = global_update(self.cfg, self.runtime, self.model, self.tokens[lesson.tokens()])
            self.runtime.log(f"{steps} global steps on {len(lesson.spans)} scored documents")
            # the A that rows hold were learnt on other weights
            self.warm = False
        elif self.adapters is not None:
            # later updates need the losses of the adapters that the first has changed
            for number in range(self.cfg.ttt_grad_steps):
                self.step(lesson, nll if number == 0 else self.losses(cells))

    def step(self, lesson: Lesson, nll: Tensor) -> None:
        """One update of the adapters."""
        self.adapters.step(nll[:, lesson.cols], self.learning(lesson))

    def learning(self, lesson: Lesson) -> Tensor:
        """(rows,) bool: the rows that learn."""
        rows = np.arange(len(self.documents))
        return to_device(np.isin(rows, lesson.rows), self.runtime.device)


CACHE_WIDTHS = (256, 512, 1024, 2048, 4096)  # columns that attention may read, each a pair of CUDA graphs


class CarryLora(DocLora):
    """DocLora at a fraction of the work: a chunk attends to the keys and values that were kept when earlier chunks of
    its document ran, under older adapters, and no gradient goes there (Transformer-XL's recurrence, Dai et al. 2019).

    Rows go through their documents at their own pace, each with a cache of its own, a ring of whole chunks, one more
    than are in reach. What a chunk writes it does not read, so scoring it again changes nothing:

        column   0      8      16     24            chunks of 8 tokens, 3 in reach: chunk 6 is scored;
        chunk    4      5      2      3             it reads 3, 4, 5 and takes the place of 2

    With TTT_LORA_LR=0 nothing is learnt, and the model is scored as it is. On a GPU, forward and backward with step are
    two CUDA graphs per width of the cache; what they read lies in static tensors, and the host waits for nothing.
    """

    def prepare(self) -> None:
        """The cache, and what scores and learns for each number of its columns."""
        cfg, model, device = self.cfg, self.model, self.runtime.device
        self.size = cfg.ttt_chunk_size[0].value
        on_gpu = device.type == "cuda"
        # chunks in reach
        self.ring = cfg.ttt_eval_seq_len // self.size - 1
        self.columns = (self.ring + 1) * self.size
        head = (cfg.num_kv_heads, cfg.model_dim // cfg.num_heads)
        # a column more than is used: then every slice has the strides of a part, and one compiled graph serves all
        shape = (len(model.route.layers), 2, self.num_rows, self.columns + 1, *head)
        self.cache = torch.zeros(shape, dtype=model.dtype, device=device)
        # of each row: begin, the ids that embeddings look back at, ids, targets
        self.inputs = torch.zeros(self.num_rows, 1 + model.reach + 2 * self.size, dtype=torch.int64, device=device)
        self.learns = torch.zeros(self.num_rows, dtype=torch.bool, device=device)
        widths = CACHE_WIDTHS if on_gpu else range(self.size, self.columns, self.size)
        self.widths = [*(w for w in widths if w < self.columns), self.columns]
        self.programs = captured(self.runtime, "carry", self.graphs, {}) if on_gpu else {}
        how = "CUDA graphs" if self.programs else "eager"
        self.runtime.log(f"carry: {self.num_rows} documents at once, {self.ring} chunks of {self.size} kept, {how}")

    def visible(self, begin: Tensor, width: int) -> Tensor:
        """(rows, 1, H/K * chunk, width + chunk) bool: what a chunk from `begin` (rows, 1) on sees, first of the cache's
        columns, then of itself."""
        # column j holds the last position before `begin` that is j modulo the ring; negative: nothing yet
        column = torch.arange(width, device=begin.device)
        held = begin - 1 - (begin - 1 - column) % self.columns
        seen = held >= (begin - self.ring * self.size).clamp_min(0)
        chunk = torch.arange(self.size, device=begin.device)
        # each key/value head serves H/K query heads, whose queries KVCache.attend puts side by side
        groups = self.cfg.num_heads // self.cfg.num_kv_heads
        own = (chunk <= chunk[:, None]).repeat(groups, 1)
        shape = (self.num_rows, len(own), -1)
        both = (seen[:, None].expand(shape), own.expand(shape))
        return torch.cat(both, dim=2)[:, None]

    def forward_chunk(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """For what `inputs` holds, over the first `width` columns of the cache: (rows, chunk) nats, the keys and values
        (executions, 2, rows, chunk, K, d) that the chunk leaves, and the columns (rows, chunk) where they go."""
        size, model = self.size, self.model
        begin, ids, targets = self.inputs.split([1, model.reach + size, size], dim=1)
        positions = begin + torch.arange(size, device=begin.device)
        zero = begin.new_zeros((), dtype=model.dtype)
        kv_cache = KVCache(
            first=(begin == 0)[:, None],
            positions=positions,
            cached=self.cache[:, :, :, :width],
            mask=zero.where(self.visible(begin, width), -math.inf),
            new=[],
        )
        mark_dynamic(self.runtime, kv_cache.cached, kv_cache.mask, dim=3)
        max_len = self.cfg.ttt_eval_seq_len
        meta = model.plan(size, begin.device, max_len=max_len, kv_cache=kv_cache)
        nll = self.forward(ids, targets, meta, self.adapters, "none")
        return nll, torch.stack(kv_cache.new), positions % self.columns

    def learn_chunk(self, nll: Tensor) -> None:
        """One update of the adapters from what forward_chunk returned, in the rows that `learns` says."""
        self.adapters.step(nll, self.learns)

    def graphs(self) -> dict[int, tuple[Callable, Callable]]:
        """forward_chunk and learn_chunk for every width as CUDA graphs."""
        # one for all: graphs run in turn
        pool = torch.cuda.graph_pool_handle()
        return {width: self.capture(width, pool) for width in self.widths}

    def capture(self, width: int, pool: tuple[int, int]) -> tuple[Callable, Callable]:
        """Two graphs: the first keeps what the second's backward needs. What is trained here is renewed before it
        counts."""
        # a capture wants its allocations and its autograd warmed up on another stream
        side, learns = torch.cuda.Stream(), self.adapters is not None
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.set_grad_enabled(learns):
            for _ in range(2):
                nll, *_ = self.forward_chunk(width)
                if learns:
                    self.learn_chunk(nll)
        # its graph would keep the side stream in the captured backward
        del nll
        torch.cuda.current_stream().wait_stream(side)
        forward, learn = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local: what NCCL's own thread does meanwhile spoils nothing
        options = {"pool": pool, "capture_error_mode": "thread_local"}
        with torch.set_grad_enabled(learns):
            with torch.cuda.graph(forward, **options):
                nll, new, columns = self.forward_chunk(width)
            if learns:
                with torch.cuda.graph(learn, **options):
                    self.learn_chunk(nll)
        result = nll.detach(), new, columns

        def replay() -> tuple[Tensor, Tensor, Tensor]:
            forward.replay()
            return result

        return replay, lambda nll: learn.replay()

    def score(self, cells: Cells) -> Tensor:
        """(rows, chunk) nats; what the chunk leaves goes into the cache."""
        back = np.arange(-self.model.reach, 0)
        # at the start of the stream there is nothing before; first hides what is read instead
        before = np.maximum(0, cells.origin[:, None] - 1 + back)
        table = (cells.begin, self.tokens[before], cells.ids, cells.targets)
        self.inputs.copy_(to_device(np.column_stack(table), self.inputs.device))
        if self.adapters is not None:
            self.renew(cells)
        used = min(cells.begin.max(), self.columns)
        width = next(width for width in self.widths if width >= used)
        eager = (lambda: self.forward_chunk(width)), self.learn_chunk
        self.program = self.programs.get(width, eager)
        with torch.set_grad_enabled(self.adapters is not None):
            nll, new, columns = self.program[0]()
        rows = torch.arange(self.num_rows, device=new.device)
        self.cache[:, :, rows[:, None], columns] = new
        return nll

    def losses(self, cells: Cells) -> Tensor:
        """The same chunk again, with the adapters as they are; the cache keeps what the score left."""
        return self.program[0]()[0]

    def step(self, lesson: Lesson, nll: Tensor) -> None:
        """One update of the adapters."""
        self.learns.copy_(self.learning(lesson))
        self.program[1](nll)


def phase_boundaries(prefix_docs: int, phases: int, documents: int) -> list[int]:
    """Counts of scored documents at which a global update is made."""
    # a stream shorter than the prefix is all prefix
    prefix = min(prefix_docs, documents)
    return [prefix * (i + 1) // phases for i in range(phases)] if prefix else []


def phase_segments(batches: list[list[int]], boundaries: list[int]) -> list[tuple[list[list[int]], list[int]]]:
    """Batches in order, cut after each that reaches the next boundary, with the documents that are learnt there: the
    first `boundary` of those scored so far. The last segment ends with nothing to learn.
    """
    segments, segment, done, left = [], [], [], list(boundaries)
    for batch in batches:
        segment.append(batch)
        done.append(batch)
        # a boundary inside a batch waits for the batch to end
        if left and sum(map(len, done)) >= left[0]:
            # published: the queue runs from long to short documents, the selection from short to long
            # batches ran from long to short
            scored = [doc for group in reversed(done) for doc in group]
            segments.append((segment, scored[: left.pop(0)]))
            segment = []
    return [*segments, (segment, [])]


class Context(NamedTuple):
    """A way in which adapters see their documents: the learner, how documents queue, and the steps of those taken."""

    learner: type[DocLora]
    batches: Callable[[list[tuple[int, int]], int], list[list[int]]]
    steps: Callable[[Config, ValData, list[tuple[int, int]], Iterable[list[int]]], Iterator[Step]]


TTT_CONTEXTS = {
    "recompute": Context(DocLora, document_batches, batch_steps),
    # one by one, so that the last rows to work have short documents and none waits long for another
    "carry": Context(CarryLora, lambda docs, size: document_batches(docs, 1), carried_steps),
}


def document_steps(cfg: Config, runtime: Runtime, val: ValData, boundaries: Sequence[int] = ()) -> Iterator[Step]:
    """Documents by a queue that the ranks share, with a shared lesson at each boundary.

    With cold A the score does not depend on which rank takes which.
    """
    context, docs = TTT_CONTEXTS[cfg.ttt_context], val_documents(val.tokens)
    # a queue is used once
    # the store keeps its counters
    queue_id = f"ttt {runtime.broadcast_from_rank0(time.time())}"
    segments = phase_segments(context.batches(docs, cfg.ttt_batch_size), boundaries)
    for number, (batches, learnt) in enumerate(segments):
        tickets = runtime.claim_tickets(f"{queue_id}/{number}", len(batches))
        yield from context.steps(cfg, val, docs, (batches[ticket] for ticket in tickets))
        if learnt:
            spans = (range(docs[i][0] + 1, docs[i][0] + docs[i][1]) for i in learnt)
            yield Step(None, SharedLesson(tuple(spans)))


def phased_steps(cfg: Config, runtime: Runtime, val: ValData) -> Iterator[Step]:
    """document_steps with PHASED_TTT_NUM_PHASES boundaries."""
    documents = np.count_nonzero(val.tokens == BOS_ID)
    boundaries = phase_boundaries(cfg.phased_ttt_prefix_docs, cfg.phased_ttt_num_phases, documents)
    return document_steps(cfg, runtime, val, boundaries)


def cosine_to_zero(done: float) -> float:
    """Factor on a learning rate: 1 at the start, 0 when all is done."""
    return 0.5 * (1 + math.cos(math.pi * done))


class SpanSgd:
    """SGD with momentum on gradients that the ranks share out and sum.

    groups: parameters and their factor on the learning rate. A gradient lives in a flat buffer, one per dtype, whose
    views are the parameters' .grad, so that one all-reduce makes it the same everywhere.
    """

    def __init__(
        self,
        runtime: Runtime,
        model: GPT,
        forward: Callable,
        groups: list[tuple[list[nn.Parameter], float]],
        momentum: float,
        clip: float,
    ) -> None:
        self.runtime, self.model, self.forward, self.clip = runtime, model, forward, clip
        self.params = [p for params, _ in groups for p in params]
        self.grads = []
        for dtype in dict.fromkeys(p.dtype for p in self.params):
            own = [p for p in self.params if p.dtype == dtype]
            # one flat buffer for each dtype, in the order of its parameters
            sizes = [p.numel() for p in own]
            self.grads.append(torch.zeros(sum(sizes), dtype=dtype, device=runtime.device))
            for p, grad in zip(own, self.grads[-1].split(sizes), strict=True):
                p.requires_grad_(True).grad = grad.view_as(p)
        rated = [{"params": params, "factor": factor} for params, factor in groups]
        self.optimiser = torch.optim.SGD(rated, momentum=momentum)

    def gradient(self, batches: list[tuple[float, Batch]], max_len: int) -> Tensor:
        """The sum of share * mean loss over (share, batch), differentiated into the buffers; its norm."""
        # zeroed, not dropped: the views must stay the parameters' .grad
        for grad in self.grads:
            grad.zero_()
        for share, batch in batches[self.runtime.rank :: self.runtime.world]:
            (self.forward(*on_device(self.model, batch, self.runtime, max_len)) * share).backward()
        for grad in self.grads:
            self.runtime.sum_(grad)
        return torch.nn.utils.get_total_norm(self.grads)

    def step(self, rate: float, batches: list[tuple[float, Batch]], max_len: int) -> None:
        """One step at a learning rate, on a gradient of limited norm."""
        # of all buffers together
        norm = self.gradient(batches, max_len)
        # as torch.nn.utils.clip_grad_norm_, over the buffers
        if self.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.params, self.clip, norm)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimiser.step()


def global_update(cfg: Config, runtime: Runtime, model: GPT, tokens: np.ndarray) -> int:
    """SGD on all weights over concatenated documents, with an optimiser of its own; the number of steps.

    The last chunk is left out, as published. A chunk is cut into BATCH_SLICES packed rows that the ranks share out,
    whatever their number.
    """
    size, slices, length = cfg.global_ttt_chunk_tokens, cfg.batch_slices, cfg.eval_seq_len
    row, chunks = size // slices, -(-(len(tokens) - 1) // size)
    groups = [([*model.parameters()], 1.0)]
    sgd = SpanSgd(runtime, model, model, groups, cfg.global_ttt_momentum, cfg.global_ttt_grad_clip)
    # the cosine starts again with every epoch
    steps = [*range(chunks - 1)] * cfg.global_ttt_epochs
    for c in steps:
        starts = (c * size + j * row for j in range(slices))
        batches = [(1 / slices, packed_docs_batch(tokens[start : start + row + 1], length)) for start in starts]
        sgd.step(cfg.global_ttt_lr * cosine_to_zero(c / (chunks - 1)), batches, length)
    model.requires_grad_(False).zero_grad()
    return len(steps)


def trainable(cfg: Config, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that TTT_TRAINABLE selects; UserError for a word that selects none."""
    # the one place of test-time training where a user's word meets a name
    names, chosen = dict(model.named_parameters()), set()
    scalars = {name for name, p in names.items() if ROLES[p.role].lr == "scalar_lr"}
    for word in cfg.ttt_trainable:
        # all and scalar are words of their own; anything else is part of a name, or a glob
        hits = {"all": set(names), "scalar": scalars}.get(word) or {n for n in names if fits(n, word)}
        if not hits:
            some = ", ".join(sorted({re.sub(r"\d+", "*", name) for name in names}))
            raise UserError(f"TTT_TRAINABLE={word} matches no weight; say all, scalar, or parts or globs of: {some}")
        chosen |= hits
    return {name: p for name, p in names.items() if name in chosen}


def fp32_copy(model: GPT) -> GPT:
    """A copy with parameters in at least float32, which computes alike and loses no small step."""
    # the model itself stays as the artifact has it
    copied = copy.deepcopy(model)
    for p, original in zip(copied.parameters(), model.parameters(), strict=True):
        p.data = at_least_fp32(p.data)
        # deepcopy drops attributes of a parameter
        p.role, p.layer = original.role, original.layer
    return copied


class ChunkSgd:
    """Windows scored by `scorer` on weights that earlier chunks have trained; then SGD steps on the chunk just scored.

    The gradient of a chunk is a mean over its sequences, which the ranks share out by BATCH_SLICES. Works on a copy of
    the model.
    """

    def __init__(
        self,
        cfg: Config,
        runtime: Runtime,
        model: GPT,
        val: ValData,
        scorer: type[NoAdaptation] = NoAdaptation,
    ) -> None:
        self.cfg, self.runtime, self.tokens = cfg, runtime, val.tokens
        self.model = fp32_copy(model).requires_grad_(False)
        self.num_chunks = -(-(len(val.tokens) - 1) // cfg.ttt_chunk_tokens)
        chosen = trainable(cfg, self.model)
        groups = {}
        for p in chosen.values():
            groups.setdefault(ROLES[p.role].ttt_lr_mult, []).append(p)
        rated = [(params, getattr(cfg, knob) if knob else 1.0) for knob, params in groups.items()]
        self.scorer = scorer(cfg, runtime, self.model, val)
        self.sgd = SpanSgd(runtime, self.model, self.scorer.forward, rated, cfg.ttt_momentum, cfg.ttt_grad_clip)
        runtime.log(
            f"chunk SGD: {self.num_chunks} chunks of {cfg.ttt_chunk_tokens} targets, {cfg.ttt_epochs} passes over each "
            f"but the last, {sum(p.numel() for p in chosen.values()):,} weights in {len(chosen)} tensors"
        )
        if runtime.compile:
            self.warm_up()

    def warm_up(self) -> None:
        """Compile the scoring and the gradient, on random tokens."""
        cfg = self.cfg
        tokens = np.random.default_rng(0).integers(4, cfg.vocab_size, max(cfg.eval_seq_len, cfg.ttt_chunk_tokens) + 1)
        windows = window_rows(cfg.eval_seq_len, cfg.eval_seq_len, cfg.eval_stride)
        self.score(window_cells(cfg, ValData(tokens, tokens), windows))
        if cfg.ttt_epochs > 0:
            self.sgd.gradient(self.batches(tokens[: len(learn_span(cfg, 0)) + 1]), cfg.eval_seq_len)

    def score(self, cells: Cells) -> Tensor:
        """(B, T) nats of the scored cells."""
        return self.scorer.score(cells)

    def learn(self, lesson: SharedLesson, cells: None, nll: None) -> None:
        """TTT_EPOCHS passes over the span; momentum stays from chunk to chunk, the rate falls as a cosine."""
        cfg, (span,) = self.cfg, lesson.spans
        # targets begin at position 1
        chunk = (span.start - 1) // cfg.ttt_chunk_tokens
        rate = cfg.ttt_lr * cosine_to_zero(chunk / (self.num_chunks - 1))
        # 0 sequences: the whole chunk at once
        width = cfg.ttt_batch_seqs * cfg.eval_seq_len or len(span)
        for start in [*range(span.start, span.stop, width)] * cfg.ttt_epochs:
            tokens = self.tokens[start - 1 : min(start + width, span.stop)]
            self.sgd.step(rate, self.batches(tokens), cfg.eval_seq_len)

    def batches(self, tokens: np.ndarray) -> list[tuple[float, Batch]]:
        """Sequences of EVAL_SEQ_LEN, cut into BATCH_SLICES batches, each with its share of them; none is empty."""
        length, slices = self.cfg.eval_seq_len, self.cfg.batch_slices
        ids, targets = tokens[:-1].reshape(-1, length), tokens[1:].reshape(-1, length)
        made = []
        for j in range(slices):
            rows = slice(len(ids) * j // slices, len(ids) * (j + 1) // slices)
            if rows.start < rows.stop:
                bounds = row_bounds(self.cfg, ids[rows])
                batch = Batch(ids[rows], targets[rows], bounds)
                made.append((len(batch.ids) / len(ids), batch))
        return made


class Slot(NoAdaptation):
    """Scores with a shift of the last hidden state that is fitted for each batch (SLOT, sample-specific test-time
    parameters, Hu et al. 2025), by AdamW on the loss of the cells' `fit`, from zero."""

    def __init__(self, cfg: Config, runtime: Runtime, model: GPT, val: ValData) -> None:
        super().__init__(cfg, runtime, model, val)
        self.lr, self.steps = cfg.slot_lr, cfg.slot_steps
        self.trunk = compiled(runtime, model.trunk)

    @torch.no_grad()
    def score(self, cells: Cells) -> Tensor:
        """(B, T) nats of the scored cells."""
        ids, targets, meta = self.inputs(cells)
        h, ids = self.trunk(ids, meta).flatten(0, 1), ids.flatten()
        y = targets.flatten()
        scored = to_device(cells.rows * targets.size(1) + cells.cols, ids.device)
        z = at_least_fp32(self.model.logits(h[scored]))
        if cells.fit is not None and len(cells.fit):
            # The head is linear: a shift d that all cells share is a bias E d of the logits. They are computed once,
            # and a step costs no matrix product over the cells. Published: H + d in bf16 rounds small shifts away.
            fit = to_device(cells.fit, ids.device)
            shift = self.fitted_shift(self.model.logits(h[fit]), y[fit], ids[fit])
            z += self.model.tok_emb.weight @ shift
        return scatter_losses(cells, scored, self.model.loss(z, y[scored], ids[scored]))

    @torch.enable_grad()
    def fitted_shift(self, z: Tensor, targets: Tensor, before: Tensor) -> Tensor:
        """The shift (D,) after SLOT_STEPS on logits z (n, V) before the softcap; targets, tokens before them: (n,)."""
        head = self.model.tok_emb.weight.detach()
        # a shift of zero leaves the score as it is
        shift = head.new_zeros(head.size(1), requires_grad=True)
        optimiser = torch.optim.AdamW([shift], lr=self.lr, eps=1e-5, weight_decay=1e-8)
        for _ in range(self.steps):
            loss = self.model.loss(at_least_fp32(z) + head @ shift, targets, before).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return shift.detach()


def fit_cells(cells: Cells, causal: bool) -> np.ndarray:
    """Flattened cells that SLOT is fitted on: those of targets before the batch's first scored one; or, as published,
    all cells of its windows but the last of each, scored or not, padded or not."""
    cols = np.arange(cells.ids.shape[1])
    chosen = cells.origin[:, None] + cols < cells.scored().min()
    if not causal:
        chosen[:] = cols < len(cols) - 1
    return np.flatnonzero(chosen)


def learn_span(cfg: Config, chunk: int) -> range:
    """Targets of a chunk's whole sequences, which start where the chunk does."""
    first = 1 + chunk * cfg.ttt_chunk_tokens
    return range(first, first + cfg.ttt_chunk_tokens // cfg.eval_seq_len * cfg.eval_seq_len)


def windows_by_chunk(cfg: Config, num_targets: int) -> tuple[np.ndarray, np.ndarray]:
    """window_rows, and where each chunk's windows begin and end among them: a chunk has those whose first scored
    target is its own, so that its targets are scored when its last window is."""
    windows = window_rows(num_targets, cfg.eval_seq_len, cfg.eval_stride)
    first_scored = windows[:, 0] + windows[:, 2]
    chunks = -(-num_targets // cfg.ttt_chunk_tokens)
    edges = np.arange(chunks + 1) * cfg.ttt_chunk_tokens
    return windows, np.searchsorted(first_scored, edges)


def chunk_sgd_steps(cfg: Config, runtime: Runtime, val: ValData) -> Iterator[Step]:
    """For each chunk this rank's batches of windows, then, except after the last, the chunk as a lesson for all ranks.
    Batches do not depend on the ranks."""
    windows, edges = windows_by_chunk(cfg, len(val.tokens) - 1)
    chunks = len(edges) - 1
    for chunk in range(chunks):
        own = windows[edges[chunk] : edges[chunk + 1]]
        yield from window_steps(cfg, runtime, val, own)
        if chunk < chunks - 1 and cfg.ttt_epochs > 0:
            yield Step(None, SharedLesson((learn_span(cfg, chunk),)))


def slot_steps(cfg: Config, runtime: Runtime, val: ValData) -> Iterator[Step]:
    """chunk_sgd_steps that say which cells the score is fitted on (see Slot)."""
    for cells, lesson in chunk_sgd_steps(cfg, runtime, val):
        if cells is not None:
            cells = cells._replace(fit=fit_cells(cells, cfg.slot_causal))
        yield Step(cells, lesson)


EVALS = {
    "plain": Evaluator(plain_steps, NoAdaptation),
    "sliding": Evaluator(sliding_steps, NoAdaptation),
    "chunk_sgd": Evaluator(chunk_sgd_steps, ChunkSgd),
    "slot": Evaluator(slot_steps, lambda *args: ChunkSgd(*args, scorer=Slot)),
    "doc_lora": Evaluator(document_steps, lambda cfg, *rest: TTT_CONTEXTS[cfg.ttt_context].learner(cfg, *rest)),
    "phased_lora": Evaluator(phased_steps, lambda cfg, *rest: TTT_CONTEXTS[cfg.ttt_context].learner(cfg, *rest)),
}


# +--------------------------------------------------------------------------------------------------------------------+
# | 15 MAIN                                                                                                            |
# +--------------------------------------------------------------------------------------------------------------------+


def bytes_on_disk(cfg: Config) -> int:
    """About how many bytes a run writes: weights, a square Hessian for each matrix that has one, artifact and log."""
    weights = weights_of(cfg).values()
    need = sum(4 * p.numel() + 4 * p.size(-1) ** 2 * bool(ROLES[p.role].hessian) for p in weights) + 2**25
    need *= 1 + len(cfg.milestones)  # each has files of its own
    if cfg.checkpoint_seconds:
        # weights, momentum and two kinds of average, in the old checkpoint and in the new one
        need += sum(2 * 4 * 4 * p.numel() for p in weights)
    return need


CHECKPOINT = "checkpoint.pt"  # in a run's folder until the run has ended


class Run:
    """One run: its folder, files and result. The stages are methods; each starts from files of the one before."""

    trained_stage = "pre_quant"  # what result.json calls the score of the trained weights

    def __init__(self, cfg: Config, runtime: Runtime, preset: str, folder: Path) -> None:
        self.cfg, self.runtime, self.log, self.folder = cfg, runtime, runtime.log, folder
        # whatever can be missing is found here, before the training and not after it
        self.attend, self.kernels = choose_attention(cfg, runtime), choose_kernels(cfg, runtime)
        self.val, data = load_val(cfg), check_data(cfg, runtime.log)
        if "lora" in cfg.eval:
            val_documents(self.val.tokens)
        self.canonical = checked_mask(cfg, self.val) if MASKED_WHEN[cfg.canonical_mask] else None
        if "quantize" in cfg.stages:
            CODECS[cfg.compressor].require()
        self.moved = []  # files that the folder did not take
        # what earlier stages found stays
        self.result = {"preset": preset, "seed": cfg.seed, "stages": {}}
        if "train" not in cfg.stages:
            self.result |= read_json(folder / "result.json")
        else:
            self.check_space()
        if self.result.setdefault("data", data) != data:
            raise UserError(f"DATA_PATH={cfg.data_path} holds other validation data than {folder} was trained with")
        self.result["source_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

    def model(self) -> GPT:
        """A model of this configuration on the device, looping as at the end of training, weights not set."""
        model = GPT(self.cfg, self.attend, self.runtime.dtype, self.kernels)
        model.canonical = self.canonical
        model.to(self.runtime.device).set_looping(loops(self.cfg))
        return model

    def evaluate(self, name: str, model: GPT, hints: Words = (), deadline: float = math.inf) -> Score:
        """Score the validation stream by a row of EVALS."""
        cfg = dataclasses.replace(self.cfg, hints=hints)
        return EVALS[name](cfg, self.runtime, model, self.val, deadline)

    def record(self, stage: str, score: Score) -> None:
        """Log a stage's score and write result.json, with the configuration that it belongs to."""
        self.log(
            f"{stage}: val_loss {score.val_loss:.8f} val_bpb {score.val_bpb:.8f} ({score.tokens:,} tokens, "
            f"{score.bytes:,} bytes, {score.seconds:.1f} s)"
        )
        if not score.legal:
            self.log(f"WARNING: the {stage} score is not legal: it was fitted on the targets it scores (SLOT_CAUSAL=0)")
        if score.unadapted:
            self.log(
                f"WARNING: EVAL_BUDGET_SECONDS={self.cfg.eval_budget_seconds:g} did not suffice: {score.unadapted:,} "
                f"of {score.tokens:,} tokens of the {stage} score are unadapted"
            )
        # what every stage reports
        losses = {"val_loss": score.val_loss, "val_bpb": score.val_bpb}
        self.result["stages"][stage] = losses | {"seconds": score.seconds}
        # the last stage's score is the run's
        counts = {
            "tokens_scored": score.tokens,
            "tokens_unadapted": score.unadapted,
            "bytes_scored": score.bytes,
            "legal": score.legal,
        }
        self.result |= losses | counts
        if self.runtime.device.type == "cuda":
            self.result["peak_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
        # what was said of a score that this one replaces is no longer true
        before = [text for text in self.result.get("warnings", []) if f"the {stage} score" not in text]
        self.result["warnings"] = [*dict.fromkeys([*before, *self.log.warnings])]
        if self.runtime.rank == 0:
            atomic_write(self.folder / "record.env", record_env(self.cfg).encode())
            atomic_write(self.folder / "result.json", json.dumps(self.result, indent=1).encode() + b"\n")

    def check_space(self) -> None:
        """UserError if the disk has no room for what a run leaves."""
        need, free = bytes_on_disk(self.cfg), shutil.disk_usage(self.folder).free
        if free < need:
            raise UserError(f"{self.folder}: {free >> 20:,} MiB of disk are free, {need >> 20:,} MiB are needed")

    def save(self, name: str, value: Any) -> None:
        """torch.save into the run folder, by the first rank; the others wait. What the folder does not take goes to
        TMPDIR or the home folder, and `keep` ends the run with a UserError that says so."""
        if self.runtime.rank == 0:
            # asked one by one: without a place for temporary files, gettempdir raises as well
            for place in (lambda: self.folder, tempfile.gettempdir, Path.home):
                try:
                    path = Path(place())
                    # elsewhere, other runs may have lost their folders too
                    path /= name if path == self.folder else f"{short_hash(str(self.folder.resolve()).encode())}_{name}"
                    atomic_save(path, value)
                    break
                except (OSError, RuntimeError) as error:
                    self.log(f"WARNING: {name} cannot be written: {first_line(error)}")
            else:
                raise UserError(f"{name} could not be saved anywhere")
            if path.parent != self.folder:
                self.moved.append(path)
        self.runtime.barrier()

    def train(self) -> None:
        """Train, average and calibrate within the budget: model.pt, hessians.pt, the score before quantisation."""
        cfg, runtime = self.cfg, self.runtime
        model = self.model()
        # drawn on the CPU: the same initial weights on every rank and device
        model.load_state_dict(GPT(cfg).init_weights(cfg.seed).state_dict())
        model.set_looping(False)
        metrics = self.folder / "metrics.jsonl" if runtime.rank == 0 else None
        hooks = Hooks(
            lambda: self.evaluate("plain", model),
            self.save_checkpoint,
            lambda report: self.at_milestone(report).keep(model, report),
        )
        self.keep(model, Trainer(cfg, runtime, model, metrics).run(hooks, self.checkpoint()))

    def keep(self, model: GPT, report: TrainReport) -> None:
        """Write down a training that has ended, and calibrate."""
        if not all(torch.isfinite(p).all() for p in model.parameters()):
            raise FloatingPointError(
                "the trained weights are not all finite; earlier files are untouched. Lower MATRIX_LR, "
                "TIED_EMBED_LR or SCALAR_LR"
            )
        # before the calibration, which may fail: the training is not lost. The clock stands still meanwhile
        saved = {"config": record_env(self.cfg), "model": model.state_dict(), "steps": report.steps}
        self.save("model.pt", saved)
        clock = Clock(self.runtime, 0.0, 0)
        clock.start(report.seconds)
        self.calibrate(model)
        if self.runtime.broadcast_from_rank0(len(self.moved)):
            saved_as = ", ".join(f"{path.name[13:]} is saved as {path}" for path in self.moved)
            told = f"{self.folder} takes no files; {saved_as}: make room, and move them there under those names"
            if self.trained_stage == Run.trained_stage:
                raise UserError(f"{told}; then go on with STAGES=quantize,eval")
            # the training goes on without a milestone
            self.log(f"WARNING: {told}")
            return
        seconds = clock.read()
        self.log(f"calibration: {seconds - report.seconds:.2f} s, inside the training budget")
        self.count_training(seconds)
        self.result |= {"train_steps": report.steps, "train_loss": report.loss}
        self.record(self.trained_stage, self.evaluate("plain", model))

    def at_milestone(self, report: TrainReport) -> Run:
        """This run as if it had ended at a step, in a folder inside its own."""
        run = copy.copy(self)
        run.moved = []
        run.folder, run.result = self.folder / f"step{report.steps}", copy.deepcopy(self.result)
        # its name in the log, which has the score of the whole training too
        run.trained_stage = f"pre_quant_step{report.steps}"
        with contextlib.suppress(OSError):  # save finds another place
            run.folder.mkdir(exist_ok=True)
        self.log(f"milestone: step {report.steps}, files in {run.folder}")
        return run

    def save_checkpoint(self, snapshot: dict[str, Any]) -> None:
        """Write checkpoint.pt; a disk that takes no more is a WARNING, for the training goes on."""
        told = {"config": record_env(self.cfg), "data": self.result["data"], "source": self.result["source_sha256"]}
        if self.runtime.rank == 0:
            try:
                atomic_save(self.folder / CHECKPOINT, snapshot | told)
            except OSError as error:
                self.log(f"WARNING: {self.folder / CHECKPOINT} cannot be written: {error.strerror}")

    def checkpoint(self) -> dict[str, Any]:
        """The snapshot that an interrupted run left here, {} without one; UserError if it is of another run."""
        path, cfg = self.folder / CHECKPOINT, self.cfg
        if not path.is_file():
            return {}
        saved = load_saved(path, "step", "config", "data", "source")
        before = load_config(dict(line.split("=", 1) for line in saved["config"].splitlines()))
        wrong = other_knobs(cfg, before, KNOBS)
        wrong = wrong or (saved["data"] != self.result["data"] and f"other validation data than {cfg.data_path}")
        if wrong and cfg.overwrite:
            return {}
        if wrong:
            raise UserError(f"{path} is of an interrupted run with {wrong}; go on with that, or delete the file")
        if saved["source"] != self.result["source_sha256"]:
            self.log("WARNING: the training was begun by another version of this program")
        self.log(
            f"WARNING: the training was interrupted; it goes on from step {saved['step']}, with "
            f"{saved['seconds']:.1f} s on the clock"
        )
        return saved

    def count_training(self, seconds: float, fit: float = 0.0) -> None:
        """Note what training took, and the fits after it; a WARNING if that is over the budget."""
        self.result |= {"train_seconds": seconds + fit, "fit_seconds": fit}
        if 0 < self.cfg.max_wallclock_seconds < seconds + fit:
            self.log(
                f"WARNING: training took {seconds:.2f} s with calibration, {fit:.2f} s with fits after it, over "
                f"MAX_WALLCLOCK_SECONDS={self.cfg.max_wallclock_seconds:g}; raise GPTQ_RESERVE_SECONDS"
            )

    def calibrate(self, model: GPT) -> None:
        """What the quantisers need to know of the data: hessians.pt."""
        schemes = [SCHEMES[name] for name in (self.cfg.matrix_quant, self.cfg.embed_quant)]
        known = {}
        if any(scheme.hessian for scheme in schemes):
            known |= collect_hessians(self.cfg, self.runtime, model)
        if any(scheme.counts for scheme in schemes):
            known[COUNTS] = token_counts(self.cfg, self.runtime)
        known[WEIGHTS_HASH] = weights_hash(model.state_dict())
        self.save("hessians.pt", known)

    def filled(
        self,
        state: Weights,
        hessians: Weights,
        fitted: Sequence[Stored] = (),
        gptaq: Gptaq | None = None,
    ) -> list[Stored]:
        """Quantise, again with other clips until the artifact is almost as large as ARTIFACT_BYTES; `fitted` is stored
        with it. Only the last time is by GPTAQ, which reads text."""
        # tuned scales are less alike: up to a thousandth more bytes
        target = self.cfg.artifact_bytes * (0.999 if self.cfg.tune_steps else 1)
        coarser, before, best, found = 0.0, None, (), ()
        if not target:
            return [*quantize(self.cfg, self.runtime, state, hessians, gptaq), *fitted]
        # a scale that is twice as coarse takes about a bit off every weight
        slope = -sum(weight.numel() for weight in state.values()) / 8
        knobs = sorted({role.clip for role in ROLES.values()} - {""})

        def attempt(coarser: float, gptaq: Gptaq | None) -> tuple[int, list[Stored]]:
            """Bytes with all clips times 2^coarser, and what is stored then."""
            clips = {name: 2**coarser * getattr(self.cfg, name) for name in knobs}
            cfg = dataclasses.replace(self.cfg, **clips)
            stored = [*quantize(cfg, self.runtime, state, hessians, gptaq), *fitted]
            blob = pack_stored(stored, cfg.compressor, model_identity(self.cfg)) if self.runtime.rank == 0 else b""
            size = int(self.runtime.broadcast_from_rank0(len(blob)))
            self.log(f"{size:,} bytes with clips times {2**coarser:.4f}, of ARTIFACT_BYTES={self.cfg.artifact_bytes:,}")
            return size, stored

        for _ in range(5):
            size, stored = attempt(coarser, None)
            # the largest that fits, or else the smallest
            rank = (True, size) if size <= target else (False, -size)
            if rank > best:
                best, found = rank, (coarser, stored)
            # full enough, or as large as it gets: the grids are as fine as their bits allow
            if 0.998 * target <= size <= target or (before is not None and size == before[1] < target):
                break
            # sizes that are close differ by chance
            if before is not None and abs(size - before[1]) > 0.02 * target:
                slope = (size - before[1]) / (coarser - before[0])
            before = coarser, size
            # the middle of what is near enough
            coarser += (0.999 * target - size) / slope
        coarser, stored = found
        # other integers, other bytes: a little coarser if they are too many
        for _ in range(3 if gptaq else 0):
            size, stored = attempt(coarser, gptaq)
            if size <= target:
                break
            coarser += (0.999 * target - size) / slope
        return stored

    def quantize(self) -> None:
        """model.pt and hessians.pt -> model.bin, and the score of what model.bin holds."""
        cfg, runtime, started = self.cfg, self.runtime, time.perf_counter()
        trained, path = self.folder / "model.pt", self.folder / "model.bin"
        state = load_saved(trained, "model")["model"]
        model, fitted = self.model(), []
        fill_model(model, state, str(trained))
        hessians = load_saved(self.folder / "hessians.pt", WEIGHTS_HASH)
        if not torch.equal(hessians[WEIGHTS_HASH], weights_hash(state)):
            raise UserError(f"{self.folder}: hessians.pt is of other weights than model.pt; train again")
        fits = time.perf_counter()
        if "copy" in cfg.hints:
            weights = fit_copies(cfg, runtime, model)
            fitted.append(Stored("copy_weights", "scale", "byte", (), {"w": weights}))
            self.log(f"weights of copies in 256ths: {weights.tolist()}")
        seconds = time.perf_counter() - fits
        state, hessians = reparametrize(cfg, runtime, state, hessians)
        fill_model(model, state, "what is easier to store")
        gptaq = Gptaq(cfg, runtime, model.eval()) if cfg.gptaq_batches else None
        stored = self.filled(state, hessians, fitted, gptaq)
        seconds += gptaq.seconds if gptaq else 0.0
        if cfg.tune_steps:
            rounded = self.model()
            fill_model(rounded, dequantize(stored), "what is quantised")
            fits = time.perf_counter()
            stored = tuned(cfg, runtime, model, rounded, stored)
            seconds += time.perf_counter() - fits
        if fitted or gptaq or cfg.tune_steps:
            # what reads training text counts as training; quantisation does not
            trained = self.result.get("train_seconds", 0.0) - self.result.get("fit_seconds", 0.0)
            self.count_training(trained, runtime.broadcast_from_rank0(seconds))
        if runtime.rank == 0:
            counts = collections.Counter(tensor.encoding() for tensor in stored)
            self.log("stored tensors: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
            atomic_write(path, pack_stored(stored, cfg.compressor, model_identity(cfg)))
        runtime.barrier()
        size, code = path.stat().st_size, Path(__file__).stat().st_size
        self.log(f"artifact: {size:,} bytes ({cfg.compressor}), {time.perf_counter() - started:.1f} s")
        if 0 < cfg.artifact_bytes < size:
            self.log(
                f"WARNING: model.bin has {size:,} bytes, over ARTIFACT_BYTES={cfg.artifact_bytes:,}; raise the clips"
            )
        # what the packer noted is about an older model.bin
        self.result = {k: v for k, v in self.result.items() if not k.startswith("artifact")}
        self.result["stages"].pop("final", None)
        self.result |= {"bytes_code": code, "bytes_model": size, "bytes_total": code + size}
        self.record("quantized", self.evaluate("plain", self.from_artifact(path)))

    def from_artifact(self, path: Path) -> GPT:
        """A model with an artifact's weights, which the first rank decodes for all."""
        model = self.model()
        if self.runtime.rank == 0:
            state = load_artifact(path, self.cfg)
            if "copy" in self.cfg.hints and "copy_weights" not in state:
                raise UserError(f"{path} has no weights for HINTS=copy; fit them with STAGES=quantize,eval")
            fill_model(model, state, str(path))
        for t in (*model.parameters(), *model.buffers()):
            self.runtime.broadcast_(t.data)
        return model

    def eval(self) -> None:
        """The final score of the artifact, by EVAL; eval_seconds counts reading the artifact and compiling too."""
        started = time.perf_counter()
        # MODEL_PATH evaluates an artifact from anywhere
        path = Path(self.cfg.model_path or self.folder / "model.bin")
        deadline = started + (1 - EVAL_RESERVE) * (self.cfg.eval_budget_seconds or math.inf)
        score = self.evaluate(self.cfg.eval, self.from_artifact(path), self.cfg.hints, deadline)
        self.result["eval_seconds"] = self.runtime.broadcast_from_rank0(time.perf_counter() - started)
        # runs that share it are not different seeds
        self.result["model_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        self.record("final", score)


def explain(cfg: Config, origin: dict[str, str]) -> str:
    """The resolved run: non-default knobs with their origin, parameters, routes, optimiser table, quantisation plan."""
    lines = ["knobs that are not default:"]
    for name, source in sorted(origin.items()):
        lines.append(f"  {name}={format_knob(getattr(cfg, name.lower()))}  ({source})")
    with torch.device("meta"):
        model = GPT(cfg)
    lines += [f"parameters {sum(p.numel() for p in model.parameters())}", f"route, looping off: {model.routes[False]}"]
    if loops(cfg):
        lines.append(f"route, looping on from {cfg.enable_looping_at:g}: {model.routes[True]}")
    lines.append("optimisers:")
    for (optimiser, lr, wd), named in optimiser_groups(model).items():
        # knobs by name, so that a reader can set them
        rates = f"{optimiser:6} {lr.upper()}={getattr(cfg, lr):g} {wd.upper()}={getattr(cfg, wd):g}"
        lines.append(f"  {rates}  {summary(named.values())}: {roles_of(named.values())}")
    # published systems leave some weights as they were drawn
    frozen = [p for p in model.parameters() if not p.requires_grad]
    lines += [f"  of them not trained: {summary(frozen)}"] * bool(frozen)
    if EVALS[cfg.eval].learner in (EVALS["chunk_sgd"].learner, EVALS["slot"].learner):
        # a word of TTT_TRAINABLE that selects nothing is found here, before the training
        chosen = trainable(cfg, model).values()
        lines.append(f"test-time training: {summary(chosen)} (TTT_TRAINABLE={format_knob(cfg.ttt_trainable)})")
    return "\n".join([*lines, "quantisation plan:", *explain_plan(cfg)])


def summary(params: Iterable[Tensor]) -> str:
    """Tensors and weights, counted."""
    sizes = [p.numel() for p in params]
    return f"{len(sizes)} tensors, {sum(sizes):,} weights"


def roles_of(params: Iterable[nn.Parameter]) -> str:
    """The roles of parameters, each once."""
    return " ".join(dict.fromkeys(p.role for p in params))


def explain_plan(cfg: Config) -> list[str]:
    """A line for each rule: the roles that are stored so, tensors, bytes. UserError for an override without effect."""
    tensors, rules = weights_of(cfg), {}
    matrices = {name for name, p in tensors.items() if ROLES[p.role].store == "matrix"}
    for word, _ in bits_overrides(cfg):
        hits = {name for name in matrices if fits(name, word)}
        if not hits:
            raise UserError(f"MATRIX_BITS_OVERRIDES={word} is in no name of a matrix (or of none that is left for it)")
        # of several overrides the first that fits counts
        matrices -= hits
    for name, rule in quant_plan(cfg).items():
        rules.setdefault(rule, []).append(tensors[name])
    lines = []
    for rule, params in rules.items():
        # a clipped row has a scale of two bytes beside its integers
        size = sum(p.numel() * rule.bits / 8 + (2 * p.size(0) if rule.clip else 0) for p in params)
        lines.append(
            f"  {rule.scheme:14} {rule.bits:2} bits  clip {rule.clip:5.2f}  {len(params):3} tensors "
            f"{size:>12,.0f} bytes before entropy coding: {roles_of(params)}"
        )
    return lines


def versions(runtime: Runtime) -> str:
    """Versions and hardware, for the log."""
    gpu = f", {torch.cuda.get_device_name()}" if runtime.device.type == "cuda" else ""
    return (
        f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, sentencepiece "
        f"{spm.__version__}; {runtime.world} x {runtime.device.type}{gpu}, activations {runtime.dtype}, "
        f"compile {runtime.compile}, threads {torch.get_num_threads()}"
    )


def execute(cfg: Config, origin: dict[str, str], environ: Mapping[str, str]) -> None:
    """Run the stages of a configuration, in a folder that is this run's until it ends."""
    preset = environ.get("PRESET", "")
    run_id = cfg.run_id or f"{Path(preset).name or 'default'}_seed{cfg.seed}"
    # a preset with other knobs has a folder of its own
    own = {name for name in KNOBS if name.upper() in environ} - {"seed", *LOCAL_KNOBS}
    if not cfg.run_id and own:
        run_id += f"_{short_hash(record_env(cfg).encode())}"
    folder = Path(cfg.artifact_dir or Path("logs") / run_id)
    check_trained(cfg, folder)
    folder.mkdir(parents=True, exist_ok=True)
    rank, *_ = launch_variables(environ)
    with locked(folder) if rank == 0 else contextlib.nullcontext():
        runtime = Runtime.start(cfg, environ, folder / "log.txt")
        try:
            runtime.log(
                f"run {folder.name}, preset {preset or 'none'}, stages {','.join(cfg.stages)}, files in {folder}"
            )
            # a log begins with what runs: knobs, source, versions
            runtime.log(explain(cfg, origin))
            run = Run(cfg, runtime, preset, folder)
            runtime.log(f"source sha256 {run.result['source_sha256']}")
            runtime.log(versions(runtime))
            for stage in cfg.stages:
                # the names of the stages are those of the methods
                getattr(run, stage)()
            if "train" in cfg.stages and rank == 0:
                (folder / CHECKPOINT).unlink(missing_ok=True)
            runtime.log("RESULT " + json.dumps(run.result))
            # torchrun ends every rank when one ends badly, and rank 0 writes last
            runtime.barrier()
            # not after an error: NCCL's ranks leave together, so this one would wait for ranks that wait for it, and
            # its message would come after RANK_MINUTES or never
            runtime.close()
        except RuntimeError as error:
            if runtime.world == 1 or not re.search(LOST_RANK, str(error), re.IGNORECASE):
                raise
            raise ConnectionError(f"another rank has ended, and says why ({first_line(error)})") from None


# Exit status of what main reports in a line or a few instead of a traceback.
STATUS = {UserError: 2, FloatingPointError: 1, OSError: 1, KeyboardInterrupt: 130}
INTERRUPTED = (
    "interrupted; finished stages are on disk, resume with STAGES=quantize,eval or STAGES=eval; a training with "
    "CHECKPOINT_SECONDS goes on if the same command runs again"
)


def main(argv: list[str]) -> int:
    """Entry point; the exit status is 2 for a mistake the user can mend, 1 for a run that failed, 0 otherwise."""
    unknown = [a for a in argv if a != "--explain"]
    try:
        if unknown:
            raise UserError(f"unknown argument {unknown[0]}; knobs are environment variables, see --help")
        cfg, origin = resolve(os.environ)
        if "--explain" in argv:
            print(explain(cfg, origin))
        else:
            execute(cfg, origin, os.environ)
    except tuple(STATUS) as error:
        message = INTERRUPTED if isinstance(error, KeyboardInterrupt) else str(error)
        print("\n".join(f"error: {line}" for line in message.splitlines()), file=sys.stderr)
        return next(status for kind, status in STATUS.items() if isinstance(error, kind))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # a terminal that lacks a letter of a path gets an escape in its place
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        status = 1
    if status and dist.is_initialized():
        # what is wrong has been told; tidying up would wait for the other ranks, which wait for this one
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
