"""What only a GPU can show: flash attention against the exact twin, and the whole line compiled, in bf16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import golden_rules as rules
import numpy as np
import pytest
import torch
import ttt_rules
from conftest import Done

import train_gpt

pytestmark = pytest.mark.gpu


def random_heads(tokens: int, dim: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(1, tokens, heads, dim, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for heads in (8, 4, 4)
    ]


@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4"])
def test_flash_attention_over_segments_is_the_masked_twin(name: str, sunk: bool) -> None:
    runtime = train_gpt.Runtime(0, 1, torch.device("cuda"), train_gpt.Log(None, True), torch.bfloat16)
    try:
        attend = train_gpt.choose_attention(train_gpt.Config(attention=name), runtime)
    except train_gpt.UserError as error:
        pytest.skip(str(error))
    bounds = train_gpt.segment_bounds(np.array([5, 300, 301, 900]), 1024, 256)
    cu_seqlens = torch.from_numpy(train_gpt.pad_bounds(bounds)).cuda()
    cos, sin = train_gpt.rotary_tables(1024, 16, 1e4, cu_seqlens.device)
    flash = train_gpt.AttnMeta(cu_seqlens, 256, cos, sin, None)
    exact = flash._replace(mask=train_gpt.segment_mask(cu_seqlens, 1024, 256))
    q, k, v = random_heads(1024, 64)
    sink = torch.randn(4, 64, generator=torch.Generator("cuda").manual_seed(2), device="cuda").requires_grad_()
    leaves = (q, k, v, sink)[: 3 + sunk]
    weight = torch.randn(q.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    results = []
    for function, meta in ((attend, flash), (train_gpt.masked_attention, exact)):
        y = function(q, k, v, meta, *leaves[3:])
        results.append([y.float(), *(g.float() for g in torch.autograd.grad((y * weight).sum(), leaves))])
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).abs().max() <= 0.02 * wanted.abs().max()


@pytest.mark.skipif(train_gpt.chunk_gated_delta_rule is None, reason="flash-linear-attention is not installed")
@pytest.mark.parametrize("compiled", [False, True])
def test_fused_delta_rule_is_the_twin(compiled: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    shape, options = (2, 300, 4, 64), {"generator": generator, "device": "cuda"}
    q, k, v = (torch.randn(shape, **options).bfloat16() for _ in range(3))
    g, beta = (torch.rand(shape[:3], **options) for _ in range(2))
    inputs = [x.requires_grad_() for x in (torch.nn.functional.elu(q) + 1, k.relu() + 0.1, v, -0.3 * g, beta)]
    starts, state = torch.rand(shape[:2], **options) < 0.01, torch.zeros(2, 4, 64, 64, device="cuda")
    fused = torch.compile(train_gpt.fused_delta_rule, fullgraph=True) if compiled else train_gpt.fused_delta_rule
    results = []
    for rule in (fused, train_gpt.delta_rule):
        o, last = rule(*inputs, starts, state)
        gradients = torch.autograd.grad(o.float().square().sum() + last.square().sum(), inputs)
        results.append([x.float() for x in (o, last, *gradients)])
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).norm() <= 0.03 * wanted.norm()


def test_trellis_search_finds_as_good_paths_as_on_a_cpu() -> None:
    """Whole matrices, one and several side by side, of full and of short columns; a GPU replays a captured graph."""
    generator, errors = torch.Generator().manual_seed(0), {}
    cfg = train_gpt.Config(tcq_states=64, tcq_chunk_rows=64)
    weights = [torch.randn(rows, 96, generator=generator) for rows in (64, 1200, 300)]
    inputs = torch.randn(500, 96, generator=generator)
    rules_of = [train_gpt.QuantRule("gptq_tcq", 5, 12.0)] * 3
    for device in ("cpu", "cuda"):
        moved, H = [w.to(device) for w in weights], (inputs.T @ inputs).to(device)
        for some in (slice(0, 1), slice(0, 3)):
            encoded = train_gpt.encode_tcq(moved[some], [H] * len(moved[some]), rules_of[some], cfg)
            decoded = [train_gpt.decode_rows(parts).cpu() for parts in encoded]
            lost = sum(((w - d) @ inputs.T).square().sum() for w, d in zip(weights[some], decoded, strict=True))
            errors.setdefault(device, []).append(lost.item())
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=1e-3)


@pytest.mark.parametrize("hint", train_gpt.HINTS)
def test_hints_found_on_a_gpu_are_those_found_on_a_cpu(hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt, "TILT_LENGTH", 3)
    find, _ = train_gpt.HINTS[hint]
    tokens = torch.randint(4, 12, (200_000,), generator=torch.Generator().manual_seed(0))
    tokens[torch.rand(len(tokens), generator=torch.Generator().manual_seed(1)) < 0.002] = train_gpt.BOS_ID
    bits = [find(train_gpt.Config(), t, t == train_gpt.BOS_ID).cpu() for t in (tokens, tokens.cuda())]
    assert torch.equal(*bits) and (bits[0] > 0).sum() > 1000


def test_calibration_with_gradients_on_a_gpu_is_that_of_a_cpu(tiny_data: Path) -> None:
    """Sensitivities up to the noise of drawn targets, which no two devices draw alike."""
    cfg, found = rules.toy_config("VOCAB_SIZE=320 NUM_LAYERS=3 LOOP_START=1 LOOP_END=1", data_path=str(tiny_data)), []
    cfg = train_gpt.dataclasses.replace(
        cfg, model_dim=64, num_heads=2, num_kv_heads=1, parallel_start_layer=2, xsa_last_n=3, fisher_scales=1.0
    )
    cfg = train_gpt.dataclasses.replace(cfg, train_seq_len=64, train_batch_tokens=8192, gptq_calibration_batches=32)
    for device in map(torch.device, ("cpu", "cuda")):
        runtime = train_gpt.Runtime(0, 1, device, train_gpt.Log(None, True))
        model = train_gpt.GPT(cfg).init_weights(0).to(device)
        found.append(train_gpt.collect_hessians(cfg, runtime, model))
    exact, got = found
    assert exact.keys() == got.keys()
    for name, wanted in exact.items():
        noise = 0.2 if name.startswith(train_gpt.SENSITIVITY) or name == "tok_emb.weight" else 0.01
        assert (got[name] - wanted).norm() <= noise * wanted.norm(), name


EVALUATIONS = """
2 EVAL=phased_lora TTT_CHUNK_SIZE=30:8,16
3 EVAL=phased_lora TTT_CHUNK_SIZE=10:2,30:4,8
2 EVAL=phased_lora TTT_CONTEXT=carry TTT_CHUNK_SIZE=8
2 EVAL=chunk_sgd
1 EVAL=plain
"""


@pytest.mark.parametrize("case", EVALUATIONS.strip().splitlines())
def test_no_graph_is_made_inside_the_clock_of_an_evaluation(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask, hints and wide logits, by the real compiler; the numbers of graphs are those of test_graphs.py,
    and one more for widths that 8 does not divide."""
    graphs, knobs = case.split(" ", 1)
    sizes = "NUM_LAYERS=1 NUM_LOOPS=0 PARALLEL_START_LAYER=0 XSA_LAST_N=1 MODEL_DIM=64 NUM_HEADS=2 NUM_KV_HEADS=1"
    sizes += " TTT_BATCH_SIZE=5 TTT_EVAL_SEQ_LEN=48 PHASED_TTT_PREFIX_DOCS=3 GLOBAL_TTT_CHUNK_TOKENS=64 LOOP_END=0"
    sizes += " LOOP_START=0 TTT_LORA_RANK=8 HINTS=copy,tilt CANONICAL_MASK=eval"
    cfg = ttt_rules.small_config(**rules.knobs(sizes) | rules.knobs(knobs))
    runtime = train_gpt.Runtime.start(cfg, {})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    parts = train_gpt.flash_backend(), torch.bfloat16, train_gpt.choose_kernels(cfg, runtime)
    model = train_gpt.GPT(cfg, *parts).init_weights(0)
    model.canonical = torch.randint(256, (cfg.vocab_size, cfg.vocab_size // 8), dtype=torch.uint8)
    model.cuda().set_looping(False)
    stats, made, first = torch._dynamo.utils.counters["stats"], [], train_gpt.score_first
    monkeypatch.setattr(train_gpt, "score_first", lambda *args: made.append(stats["unique_graphs"]) or first(*args))
    val = ttt_rules.golden_stream([3, 9, 70, 26, 41, 12, 2], ttt_rules.VOCAB)
    train_gpt.EVALS[cfg.eval](cfg, runtime, model, val)
    assert [*made, stats["unique_graphs"]] == [int(graphs)] * 2
    assert not any("no CUDA graphs" in line for line in runtime.log.warnings)


def test_compiled_training_step_needs_one_graph_per_route(tiny_data: Path) -> None:
    shape = "VOCAB_SIZE=320 NUM_LAYERS=5 MODEL_DIM=128 NUM_HEADS=2 NUM_KV_HEADS=1"
    route = "LOOP_START=1 LOOP_END=2 PARALLEL_START_LAYER=3 ATTENTION=fa2 WARMUP_STEPS=2"
    sizes = "TRAIN_BATCH_TOKENS=1024 BATCH_SLICES=2 TRAIN_SEQ_LEN=256 EVAL_SEQ_LEN=256 VAL_BATCH_TOKENS=1024"
    cfg = rules.toy_config(f"{shape} {route} {sizes}", data_path=str(tiny_data))
    runtime = train_gpt.Runtime(0, 1, torch.device("cuda"), train_gpt.Log(None, True), torch.bfloat16, True)
    model = train_gpt.GPT(cfg, train_gpt.flash_backend(), torch.bfloat16).cuda()
    model.load_state_dict(train_gpt.GPT(cfg).init_weights(0).state_dict())
    trainer = train_gpt.Trainer(cfg, runtime, model, None)
    trainer.warm_up()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    batches = train_gpt.train_batches(cfg, runtime)
    for step in range(20):
        model.set_looping(step >= 10)
        trainer.step(next(batches), 1.0, step)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert torch.isfinite(trainer.loss)


def test_captured_optimiser_steps_are_the_plain_ones() -> None:
    """Several in a row, as momentum lives in the graph, with a clip and momenta that change, and after a clear."""
    cfg, found = rules.toy_config("VOCAB_SIZE=320 NUM_LAYERS=3 LOOP_START=1 LOOP_END=1 PARALLEL_START_LAYER=2"), []
    cfg = train_gpt.dataclasses.replace(cfg, grad_clip_norm=0.3, muon_momentum_warmup_steps=3, xsa_last_n=3)
    for compiled in (False, True):
        runtime = train_gpt.Runtime(0, 1, torch.device("cuda"), train_gpt.Log(None, True), torch.bfloat16, compiled)
        model = train_gpt.GPT(cfg).init_weights(0).cuda()
        optimisers, before = train_gpt.Optimisers(cfg, model, runtime), [p.detach().clone() for p in model.parameters()]
        for step in (0, 1, 2, 0, 1):
            if step == 0:
                optimisers.clear()
            generator = torch.Generator("cuda").manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            optimisers.step(1.0, step)
        found.append([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    for (name, _), got, wanted in zip(model.named_parameters(), *found[::-1], strict=True):
        assert wanted.norm() > 0 and (got - wanted).norm() <= 0.02 * wanted.norm(), name


LINES = {
    "published": "",
    "own": "FISHER_SCALES=0.7 GPTAQ_BATCHES=2 TUNE_STEPS=3 CANONICAL_MASK=always HINTS=copy,tilt "
    "TRAIN_SEQ_SCHEDULE=32@0.5 TTT_CHUNK_SIZE=40:8,16 LOOP_MIX=1,0,0.1,1,0.1,0",
}


@pytest.mark.parametrize("knobs", LINES.values(), ids=LINES)
def test_the_whole_line_runs_compiled_in_bf16(knobs: str, run_gpt: Callable[..., Done]) -> None:
    sizes = {"MODEL_DIM": 128, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "ITERATIONS": 30}
    stages = run_gpt(DEVICE="cuda", **sizes, **rules.knobs(knobs)).result["stages"]
    assert stages["quantized"]["val_loss"] < np.log(320)
    assert abs(stages["quantized"]["val_loss"] - stages["pre_quant"]["val_loss"]) < 0.1
