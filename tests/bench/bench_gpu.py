"""Time and memory of training steps, kernels, calibration, the head of test-time training, and hints.

    PRESET=records/<...> python tests/bench/bench_gpu.py step [--steps 20] [--attention fa2,fa3] [--profile DIR]
    python tests/bench/bench_gpu.py kernels|sdpa [--steps 20]
    PRESET=records/<...> python tests/bench/bench_gpu.py calibrate head hints [--steps 20] [--tokens 10000000]

step: a full-size training step of one micro-batch, looping off and on: ms, tokens per second, MFU, peak memory. Random
tokens, documents of the published mean length; knobs from the environment as for train_gpt.py.
kernels: forward with backward of each fused kernel beside its plain twin under torch.compile, at the contest's shapes;
the cross-entropy also with a mask of banned ids.
sdpa: which backend torch chooses for the attention of test-time training, and what each costs and gets wrong.
calibrate: time and memory of the calibration, with the sensitivities that FISHER_SCALES needs and without.
head: what a step of test-time training spends on the head, its adapter and the loss, with logits in bf16 as published,
then wide ones, then a mask too, then hints too.
hints: time and memory to find the hints of a stream.
`kernels` and `sdpa` need a GPU; on a CPU only the ratios of the others mean something. Medians, one JSON line each.
Several benches may be named, and run in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import bench
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_gpt

PEAK = 989e12  # dense bf16 operations a second of an H100 or H200


def measure(calls: dict[str, Callable[[], object]], repeats: int, warm_up: int = 5) -> dict[str, dict[str, float]]:
    """Median ms of each call, taken in turn so that a busy machine is busy for all, and its peak memory in MiB."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    memory = dict.fromkeys(calls, 0)
    wait = torch.cuda.synchronize if bench.CUDA else lambda: None
    for turn in range(warm_up + repeats):
        for name, call in calls.items():
            before = torch.cuda.memory_allocated() if bench.CUDA else 0
            if bench.CUDA:
                torch.cuda.reset_peak_memory_stats()
            wait()
            started = time.perf_counter()
            call()
            wait()
            if turn >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - started))
                memory[name] = (torch.cuda.max_memory_allocated() - before) // 2**20 if bench.CUDA else 0
    return {name: {"ms": round(statistics.median(times[name]), 3), "mib": memory[name]} for name in calls}


def random_batch(cfg: train_gpt.Config, rng: np.random.Generator) -> train_gpt.Batch:
    """One micro-batch of random tokens with document starts at the published density."""
    total, loader = cfg.train_batch_tokens // cfg.batch_slices, train_gpt.LOADERS[cfg.loader]
    rows = loader.tokens is train_gpt.shuffled_rows
    span = rng.integers(4, cfg.vocab_size, (total // cfg.train_seq_len, cfg.train_seq_len + 1) if rows else total + 1)
    span[rng.random(span.shape) < 1 / bench.MEAN_DOCUMENT] = train_gpt.BOS_ID
    return loader.batch(span.astype(np.uint16), cfg.train_seq_len)


def flops_per_token(cfg: train_gpt.Config, route: train_gpt.Route) -> float:
    """6 per weight that a token meets (matrices of every execution and the head), attention left out."""
    with torch.device("meta"):
        model = train_gpt.GPT(cfg)
    per_layer = [sum(p.numel() for n, p in b.named_parameters() if n.endswith("weight")) for b in model.blocks]
    return 6 * (sum(per_layer[layer] for layer in route.layers) + cfg.vocab_size * cfg.model_dim)


def bench_step(args: argparse.Namespace) -> None:
    """Every attention backend asked for, looping off and on; then, with --then-run, the program itself."""
    environment = train_gpt.load_config(os.environ)
    for attention, looping in ((a, looping) for a in args.attention.split(",") for looping in (False, True)):
        cfg = dataclasses.replace(environment, attention=attention)
        runtime = train_gpt.Runtime.start(cfg, {})
        model = bench.model_of(cfg, runtime)
        model.set_looping(looping)
        trainer, rng = train_gpt.Trainer(cfg, runtime, model, None), np.random.default_rng(0)
        trainer.span = cfg.train_seq_len
        batches = itertools.cycle(enumerate([random_batch(cfg, rng) for _ in range(4)]))

        def step(trainer: train_gpt.Trainer = trainer, batches: Iterator = batches) -> None:
            number, batch = next(batches)
            trainer.step({trainer.span: [batch]}, 1.0, number)

        _, seconds = bench.timed(step)
        with bench.alone():
            (found,) = measure({"step": step}, args.steps).values()
            kernels = bench.profiled(step, args.profile / f"step_{attention}_{looping}.txt") if args.profile else {}
        tokens = cfg.train_batch_tokens // cfg.batch_slices
        rate = tokens / found["ms"] * 1e3
        mfu = flops_per_token(cfg, model.route) * rate / PEAK
        speed = {"tokens_per_second": round(rate), "mfu": round(mfu, 4), "compile_seconds": round(seconds, 1)}
        bench.say(bench="step", attention=attention, looping=looping, tokens=tokens, **found, **speed, **kernels)
        del model, trainer, step, batches
        torch.cuda.empty_cache()
    if args.then_run:
        with bench.alone():
            status, seconds = bench.timed(train_gpt.main, [])
        bench.say(bench="run", status=status, seconds=round(seconds, 1), graphs=bench.graphs())


def plain_mlp(m: torch.Tensor, up: torch.Tensor, down: torch.Tensor, slope: float) -> torch.Tensor:
    """The twin of train_gpt.fused_mlp."""
    return F.linear(F.leaky_relu(F.linear(m, up), slope).square(), down)


def gaussian(*shape: int, size: float = 1.0) -> torch.Tensor:
    """A bf16 leaf on the GPU."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(size).requires_grad_()


def gradients(function: Callable, leaves: tuple[torch.Tensor, ...], others: tuple, g: torch.Tensor) -> Callable:
    """Compiled forward and backward of a function of leaves and others, as a call without arguments."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    return lambda: torch.autograd.grad(compiled(*leaves, *others), leaves, g)


def joined(rotate: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., torch.Tensor]:
    """The parts that rotate returns, as one tensor: one gradient comes back."""
    return lambda *inputs: torch.cat(rotate(*inputs), dim=2)


def bench_kernels(args: argparse.Namespace) -> None:
    """Every kernel, fused and plain; the loss without and with banned ids."""
    if train_gpt.triton is None or not bench.CUDA:
        raise SystemExit("error: needs a GPU and triton")
    torch.manual_seed(0)
    N, D, H, V = 98_304, 512, 2048, 8192
    logits, targets = gaussian(N, V, size=5), torch.randint(V, (N,), device="cuda")
    mlp = gaussian(N, D), gaussian(H, D, size=D**-0.5), gaussian(D, H, size=H**-0.5)
    rows, hidden = torch.full((N,), 1 / N, device="cuda"), torch.randn(N, D, device="cuda", dtype=torch.bfloat16)
    ce = train_gpt.fused_cross_entropy, train_gpt.softcapped_cross_entropy
    banned = torch.randint(256, (N, V // 8), device="cuda", dtype=torch.uint8)
    x, gate = gaussian(1, N, 16, 64), gaussian(1, N, 8, 1)
    gain, (y, v) = gaussian(8), (gaussian(1, N, heads, 64) for heads in (8, 4))
    tables = train_gpt.rotary_tables(N, 16, 1e4, torch.device("cuda"))
    rotary = [joined(f) for f in (train_gpt.fused_norm_rotate, train_gpt.norm_rotate)]
    xsa = train_gpt.fused_self_value, train_gpt.remove_self_value
    pairs = {
        "softcapped cross-entropy": [gradients(f, (logits,), (targets, 30.0), rows) for f in ce],
        "masked cross-entropy": [gradients(f, (logits,), (targets, 30.0, banned), rows) for f in ce],
        "mlp": [gradients(f, mlp, (0.5,), hidden) for f in (train_gpt.fused_mlp, plain_mlp)],
        "norm, rotation, gain": [gradients(f, (x, gain), tables, torch.randn_like(x)) for f in rotary],
        "XSA and gate": [gradients(f, (y, v, gate), (), torch.randn_like(y)) for f in xsa],
    }
    for name, calls in pairs.items():
        found = measure(dict(zip(("fused", "plain"), calls, strict=True)), args.steps)
        bench.say(kernel=name, tokens=N, **found, triton=train_gpt.triton.__version__)


def random_windows(cfg: train_gpt.Config, index: int) -> np.ndarray:
    """As train_gpt.calibration_rows, of random tokens."""
    rng, rows = np.random.default_rng(index), cfg.train_batch_tokens // cfg.batch_slices // cfg.train_seq_len
    windows = rng.integers(4, cfg.vocab_size, (rows, cfg.train_seq_len))
    windows[rng.random(windows.shape) < 1 / bench.MEAN_DOCUMENT] = train_gpt.BOS_ID
    return windows


def bench_calibrate(args: argparse.Namespace) -> None:
    """What one rank of eight calibrates, with and without gradients."""
    train_gpt.calibration_rows, environment = random_windows, train_gpt.load_config(os.environ)
    share = max(1, environment.gptq_calibration_batches // 8)
    for scales in (0.0, 1.0):
        cfg = dataclasses.replace(environment, gptq_calibration_batches=share, fisher_scales=scales)
        runtime = train_gpt.Runtime.start(cfg, {})
        collect = functools.partial(train_gpt.collect_hessians, cfg, runtime, bench.model_of(cfg, runtime))
        with bench.alone():
            (found,) = measure({"calibrate": collect}, max(1, args.steps // 4), warm_up=1).values()
        bench.say(bench="calibrate", fisher_scales=scales, batches=share, **found)


HEAD_CHOICES = (
    ("published", "score_dtype", "bf16"),
    ("wide", "score_dtype", "fp32"),
    ("masked", "canonical_mask", "eval"),
    ("hinted", "hints", tuple(train_gpt.HINTS)),
)


def head_call(cfg: train_gpt.Config) -> Callable[[], object]:
    """Head, its adapter and the loss on the last columns of every row, forward and backward, compiled."""
    cfg = dataclasses.replace(cfg, ttt_lora_sites=("head",))
    runtime, rng, V = train_gpt.Runtime.start(cfg, {}), np.random.default_rng(0), cfg.vocab_size
    model = bench.model_of(cfg, runtime).eval().requires_grad_(False)
    if train_gpt.MASKED_WHEN[cfg.canonical_mask]:
        model.canonical = torch.from_numpy(rng.integers(0, 256, (V, V // 8), np.uint8)).to(runtime.device)
    shape = cfg.ttt_batch_size, max(size for _, size in cfg.ttt_chunk_size)
    adapters = train_gpt.Adapters(cfg, runtime, model, shape[0])
    h = torch.randn(*shape, cfg.model_dim, device=runtime.device).to(model.dtype).requires_grad_()
    ids, before = (torch.from_numpy(rng.integers(4, V, shape)).to(runtime.device) for _ in range(2))
    hinted = 1 << train_gpt.BUCKET_AT | ids + 1 << train_gpt.TILT_AT | ids << train_gpt.COPY_AT
    targets, leaves = ids | hinted if cfg.hints else ids, [h, *adapters.leaves()]

    def losses(h: torch.Tensor) -> torch.Tensor:
        return model.loss(model.logits(h, adapters).flatten(0, -2), targets.flatten(), before.flatten())

    function = train_gpt.compiled(runtime, losses)
    return lambda: torch.autograd.grad(function(h).sum(), leaves)


def bench_head(args: argparse.Namespace) -> None:
    """One choice after the other switched on."""
    chosen, calls = {"canonical_mask": "none", "hints": ()}, {}
    for name, knob, value in HEAD_CHOICES:
        chosen[knob] = value
        calls[name] = head_call(dataclasses.replace(train_gpt.load_config(os.environ), **chosen))
    for call in calls.values():
        call()
    with bench.alone():
        found = measure(calls, args.steps)
    bench.say(bench="head", **found)


def repetitive_tokens(count: int, vocab: int) -> np.ndarray:
    """Documents of frequent and rare tokens, where every third stretch of 40 is what stood 200 tokens before."""
    rng, place = np.random.default_rng(0), np.arange(200, count)
    tokens = 4 + ((vocab - 4) * rng.random(count) ** 3).astype(np.int64)
    again = place[place // 40 % 3 == 0]
    tokens[again] = tokens[again - 200]
    tokens[rng.random(count) < 1 / bench.MEAN_DOCUMENT] = train_gpt.BOS_ID
    return tokens


def bench_hints(args: argparse.Namespace) -> None:
    """Each kind of hint in turn."""
    cfg, count = train_gpt.load_config(os.environ), args.tokens or (10_000_000 if bench.CUDA else 100_000)
    tokens = torch.from_numpy(repetitive_tokens(count, cfg.vocab_size)).to("cuda" if bench.CUDA else "cpu")
    for name, (find, _) in train_gpt.HINTS.items():
        with bench.alone():
            call = functools.partial(find, cfg, tokens, tokens == train_gpt.BOS_ID)
            (found,) = measure({name: call}, max(1, args.steps // 4), warm_up=1).values()
        bench.say(bench="hints", hints=name, tokens=count, **found)


BACKENDS = {name: getattr(SDPBackend, f"{name.upper()}_ATTENTION") for name in ("cudnn", "flash", "efficient")}


def attention_cases() -> dict[str, tuple[tuple[torch.Tensor, ...], torch.Tensor | None, bool]]:
    """Calls of F.scaled_dot_product_attention as test-time training makes them: (q, k, v), mask, causal."""

    def heads(rows: int, tokens: int, count: int) -> torch.Tensor:
        return torch.randn(rows, tokens, count, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    cases = {}
    for rows, tokens in ((64, 96), (64, 480), (64, 2016)):
        qkv = heads(rows, tokens, 8), heads(rows, tokens, 4), heads(rows, tokens, 4)
        cases[f"recompute, {rows} rows of {tokens}"] = (qkv, None, True)
    for width, chunk in ((256, 24), (2040, 24), (2040, 48)):
        mask = torch.zeros(64, 1, 2 * chunk, width + chunk, device="cuda", dtype=torch.bfloat16)
        # documents that begin: nothing is kept yet
        mask[:32, :, :, :width] = -torch.inf
        own = torch.ones(chunk, chunk, dtype=torch.bool, device="cuda").tril().repeat(2, 1)
        mask[..., width:].masked_fill_(~own, -torch.inf)
        qkv = heads(64, 2 * chunk, 4), heads(64, width + chunk, 4), heads(64, width + chunk, 4)
        cases[f"carry, chunks of {chunk} over {width}"] = (qkv, mask, False)
    return cases


def attend_by(backend: SDPBackend, case: tuple) -> list[torch.Tensor]:
    """Output and gradients."""
    qkv, mask, causal = case
    leaves = [x.detach().requires_grad_() for x in qkv]
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(*leaves, attn_mask=mask, is_causal=causal, enable_gqa=True)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]


def bench_sdpa(args: argparse.Namespace) -> None:
    """Each backend: relative errors of y, dq, dk and dv to float32, ms of a shape's first call and of later ones."""
    for name, case in attention_cases().items():
        (q, k, v), mask, causal = case
        chosen = torch._fused_sdp_choice(q, k, v, mask, 0.0, causal, enable_gqa=True)
        # the exact one is slow and large: rows are independent, so a few of both kinds will do
        some = slice(28, 36)
        wide = [x[some].float() for x in (q, k, v)]
        exact = attend_by(SDPBackend.MATH, (wide, None if mask is None else mask[some].float(), causal))
        found = {}
        for backend, kind in BACKENDS.items():
            try:
                got, first = bench.timed(attend_by, kind, case)
                torch.cuda.synchronize()
                errors = [((a[some].float() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]
                call = functools.partial(attend_by, kind, case)
                times = measure({backend: call}, args.steps)[backend]
                found[backend] = times | {"first_ms": round(1e3 * first, 1), "errors": [round(e, 4) for e in errors]}
            except RuntimeError as error:
                found[backend] = str(error).splitlines()[0][:80]
        bench.say(bench="sdpa", case=name, chosen=SDPBackend(chosen).name, **found)


def main() -> None:
    """The benchmark that was asked for."""
    parser = bench.arguments(__doc__)
    benches = {"step": bench_step, "kernels": bench_kernels, "sdpa": bench_sdpa}
    benches |= {"calibrate": bench_calibrate, "head": bench_head, "hints": bench_hints}
    parser.add_argument("bench", choices=tuple(benches), nargs="+")
    parser.add_argument("--steps", type=int, default=20, help="timed repetitions")
    parser.add_argument("--attention", default="auto", help="step: comma-separated values of ATTENTION")
    parser.add_argument("--profile", type=Path, help="step: folder for a table of the kernels of a step")
    parser.add_argument("--then-run", action="store_true", help="step: then run the program, in the same process")
    parser.add_argument("--tokens", type=int, default=0, help="hints: length of the stream (default 10 M)")
    args = parser.parse_args()
    for name in args.bench:
        benches[name](args)


if __name__ == "__main__":
    main()
