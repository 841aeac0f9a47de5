"""The fused kernels against their plain twins.

The Triton code itself runs three ways: here on the CPU under Triton's interpreter (in a child process, because the
variable that asks for it counts only before the import), ahead of time for sm_90 (Hopper), and, marked gpu, for real.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pack_artifact
import train_gpt
from train_gpt import Config, Kernels, Log, Runtime, UserError

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(train_gpt.triton is None, reason="triton is not installed")
FUSED = Kernels(train_gpt.fused_cross_entropy, train_gpt.fused_mlp)
SMALL = Config(
    vocab_size=320,
    num_layers=4,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    rope_dims=4,
    loop_start=1,
    loop_end=1,
    parallel_start_layer=3,
    logit_softcap=5.0,
)
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
CE_CASES = {  # rows, vocabulary (a block has 1024 columns), dtype, softcap, size of the logits
    "one-token": (1, 1, SINGLE, 30.0, 1.0),
    "odd-rows": (7, 1000, SINGLE, 30.0, 8.0),
    "one-block": (3, 1024, HALF, 30.0, 8.0),
    "ragged-blocks": (5, 2500, SINGLE, 7.5, 20.0),
    "ragged-half": (5, 2049, HALF, 30.0, 20.0),
    "saturated": (3, 1500, HALF, 15.0, 400.0),
}
MLP_CASES = {  # rows, model width, hidden width (a tile has 128 rows, 256 columns, depth 64), dtype, negative slope
    "one-row": (1, 8, 16, SINGLE, 0.5),
    "ragged": (150, 72, 328, SINGLE, 0.5),
    "ragged-half": (150, 72, 328, HALF, 0.5),
    "whole-tiles": (256, 128, 512, HALF, 0.3),
    "relu-square": (129, 64, 264, HALF, 0.0),
}
Pair = tuple[torch.Tensor, torch.Tensor]


def noise(seed: int, *shape: int, dtype: torch.dtype = SINGLE, size: float = 1.0) -> torch.Tensor:
    return (size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)).to(dtype)


def ce_inputs(rows: int, vocab: int, dtype: torch.dtype, size: float) -> tuple[torch.Tensor, ...]:
    """Logits, targets, and the gradient of each row's loss, some of it zero and negative."""
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(1))
    targets[-1] = vocab - 1
    return noise(2, rows, vocab, dtype=dtype, size=size), targets, noise(3, rows).relu() - 0.2


def exact_ce(z: torch.Tensor, targets: torch.Tensor, g: torch.Tensor, softcap: float) -> Pair:
    """The twin and its gradient in float64, by autograd."""
    z = z.double().requires_grad_()
    loss = train_gpt.softcapped_cross_entropy(z, targets, softcap)
    return loss.detach(), torch.autograd.grad(loss, z, g.double())[0]


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest deviation over the largest magnitude."""
    assert got.shape == wanted.shape and torch.isfinite(got).all()
    return ((got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30)).item()


def ce_errors(name: str) -> dict[str, float]:
    rows, vocab, dtype, softcap, size = CE_CASES[name]
    z, targets, g = ce_inputs(rows, vocab, dtype, size)
    loss, lse = train_gpt.launch_softcap_ce(z, targets, softcap)
    dz = train_gpt.launch_softcap_ce_back(g, z, targets, lse, softcap)
    assert loss.dtype == lse.dtype == SINGLE and dz.dtype == dtype
    exact_loss, exact_dz = exact_ce(z, targets, g, softcap)
    scale = max(1.0, exact_loss.abs().max().item())  # a lone token's loss and gradient are 0
    grad_scale = max(1e-3, exact_dz.abs().max().item())
    return {
        "loss": ((loss - exact_loss).abs().max() / scale).item(),
        "grad": ((dz.double() - exact_dz).abs().max() / grad_scale).item(),
    }


def mlp_errors(name: str) -> dict[str, float]:
    rows, width, hidden, dtype, slope = MLP_CASES[name]
    m, up = noise(1, rows, width, dtype=dtype), noise(2, hidden, width, dtype=dtype, size=width**-0.5)
    down, g = noise(3, width, hidden, dtype=dtype, size=hidden**-0.5), noise(4, rows, width, dtype=dtype)
    pre, post = train_gpt.launch_leaky_square(m, up, slope)
    dpre = train_gpt.launch_leaky_square_back(g, down, pre, slope)
    assert pre.dtype == post.dtype == dpre.dtype == dtype
    z = pre.double()
    return {
        "pre": relative(pre, m.double() @ up.double().T),
        "post": relative(post, torch.nn.functional.leaky_relu(z, slope).square()),
        "grad": relative(dpre, (g.double() @ down.double()) * torch.where(z > 0, 2 * z, 2 * slope**2 * z)),
    }


def widen(handle: object) -> object:
    """A bf16 value of the interpreter, which keeps it as raw bits, in float32."""
    language = train_gpt.tl
    if handle.dtype.scalar != language.bfloat16:
        return handle
    return type(handle)((handle.data.astype(np.uint32) << 16).view(np.float32), language.float32)


def all_errors() -> str:
    """What the child under the interpreter prints. Its dot product does not support bf16 (it multiplies the bits)."""
    builder = sys.modules["triton.runtime.interpreter"].InterpreterBuilder
    dot = builder.create_dot
    builder.create_dot = lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest)
    errors = {f"ce {name}": ce_errors(name) for name in CE_CASES}
    return json.dumps(errors | {f"mlp {name}": mlp_errors(name) for name in MLP_CASES})


def child(code: str, cache: Path, **environ: str) -> str:
    """Last line that python -c prints, in the tests' folder."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "data")])
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache), **environ}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    code = "import test_kernels; print(test_kernels.all_errors())"
    return json.loads(child(code, tmp_path_factory.mktemp("cache"), TRITON_INTERPRET="1"))


# The Triton code


@needs_triton
@pytest.mark.parametrize("name", [f"ce {n}" for n in CE_CASES] + [f"mlp {n}" for n in MLP_CASES])
def test_kernel_under_the_interpreter_is_its_twin(interpreted: dict[str, dict[str, float]], name: str) -> None:
    kind, case = name.split()
    half = (CE_CASES if kind == "ce" else MLP_CASES)[case][2 if kind == "ce" else 3] == HALF
    for what, error in interpreted[name].items():  # the interpreter truncates to bf16, where a GPU rounds
        assert error <= (2.0**-7 if half and what != "loss" else 3e-6), what


def desc(rows: int, columns: int) -> str:
    return f"tensordesc<bf16[{rows}, {columns}]>"


def ahead_of_time(name: str, program: object = train_gpt) -> dict[str, object]:
    """Compile one kernel of a program's module for sm_90: its PTX, size of its cubin, shared memory in bytes."""
    compiler = sys.modules["triton.compiler"]
    target = sys.modules["triton.backends.compiler"].GPUTarget("cuda", 90, 32)
    R, C, K = program.MLP_TILE
    columns = {"z": "*bf16", "targets": "*i64", "lse": "*fp32", "softcap": "fp32", "vocab": "i32"}
    signature, constants, options = {
        "softcap_ce_kernel": (columns | {"loss": "*fp32"}, {"BLOCK": program.CE_BLOCK}, {}),
        "softcap_ce_back_kernel": (columns | {"g": "*fp32", "dz": "*bf16"}, {"BLOCK": program.CE_BLOCK}, {}),
        "leaky_square_kernel": (
            {"m": desc(R, K), "up": desc(C, K), "pre": desc(R, C // 2), "post": desc(R, C // 2)},
            {"SLOPE": 0.5},
            {"num_warps": 8, "num_stages": 4},
        ),
        "leaky_square_back_kernel": (
            {"g": desc(R, K), "down": desc(K, C), "pre": desc(R, C // 2), "dpre": desc(R, C // 2)},
            {"SLOPE": 0.5},
            {"num_warps": 8, "num_stages": 3},
        ),
    }[name]
    function = getattr(program, name)
    ordered = {argument: signature.get(argument, "constexpr") for argument in function.arg_names}
    done = compiler.compile(compiler.ASTSource(function, ordered, constants), target=target, options=options)
    return {"ptx": done.asm["ptx"], "cubin": len(done.asm["cubin"]), "shared": done.metadata.shared}


@needs_triton
@pytest.mark.parametrize(
    "name", ["softcap_ce_kernel", "softcap_ce_back_kernel", "leaky_square_kernel", "leaky_square_back_kernel"]
)
def test_kernel_compiles_ahead_of_time_for_hopper(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    built = ahead_of_time(name)
    assert ".target sm_90a" in built["ptx"] and built["cubin"] > 1000
    assert built["shared"] <= 232_448  # what a block may have there
    if "leaky" in name:  # tensor cores by warp group, and bulk copies
        assert "wgmma.mma_async" in built["ptx"] and "cp.async.bulk.tensor" in built["ptx"]


@needs_triton
def test_kernels_survive_the_packer(tmp_path: Path) -> None:
    text = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    (tmp_path / "packed_gpt.py").write_text(pack_artifact.minify(text), encoding="utf-8")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport packed_gpt, test_kernels\n"
        "names = 'softcap_ce_kernel', 'softcap_ce_back_kernel', 'leaky_square_kernel', 'leaky_square_back_kernel'\n"
        "print(min(test_kernels.ahead_of_time(name, packed_gpt)['cubin'] for name in names))"
    )
    assert int(child(code, tmp_path)) > 1000


# The gradients that the kernels implement, and the operators around them


def test_backward_formula_of_the_loss_is_the_twins_in_float64() -> None:
    for rows, vocab, _, softcap, size in CE_CASES.values():
        z, targets, g = ce_inputs(rows, vocab, DOUBLE, size)
        lse = (train_gpt.softcapped(z, softcap) + softcap).logsumexp(1)
        got = train_gpt.softcap_ce_back.twin(g.double(), z, targets, lse, softcap)
        torch.testing.assert_close(got, exact_ce(z, targets, g, softcap)[1], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("slope", [0.0, 0.3, 0.5])
def test_fused_mlp_is_the_twin_in_float64(slope: float) -> None:
    model = train_gpt.GPT(SMALL).init_weights(1).double()
    mlp = model.blocks[0].mlp
    mlp.slope = slope
    torch.nn.init.normal_(mlp.down.weight, generator=torch.Generator().manual_seed(5))
    m, g = noise(6, 2, 9, 32, dtype=DOUBLE).requires_grad_(), noise(7, 2, 9, 32, dtype=DOUBLE)
    inputs = (m, mlp.up.weight, mlp.down.weight)
    results = []
    for fused in (None, train_gpt.fused_mlp):
        mlp.fused = fused
        y = mlp(m, train_gpt.untapped)
        results.append([y, *torch.autograd.grad(y, inputs, g)])
    for plain, got in zip(*results, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CE_CASES)
def test_fused_loss_through_the_operators_is_the_twin(name: str) -> None:
    rows, vocab, dtype, softcap, size = CE_CASES[name]
    z, targets, g = ce_inputs(rows, vocab, dtype, size)
    z.requires_grad_()
    loss = train_gpt.fused_cross_entropy(z, targets, softcap)
    (dz,) = torch.autograd.grad(loss, z, g)
    exact_loss, exact_dz = exact_ce(z.detach(), targets, g, softcap)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=3e-6, atol=1e-5)
    torch.testing.assert_close(dz.double(), exact_dz, rtol=2.0**-8 if dtype == HALF else 1e-4, atol=1e-5)


def test_operators_keep_their_promises_to_the_compiler() -> None:
    z, targets, g = ce_inputs(5, 33, HALF, 4.0)
    m, up, down = noise(1, 6, 8, dtype=HALF), noise(2, 24, 8, dtype=HALF), noise(3, 8, 24, dtype=HALF)
    loss_and_lse = train_gpt.softcap_ce(z, targets, 30.0)
    pre, _ = train_gpt.leaky_square(m, up, 0.5)
    for operator, arguments in (
        (train_gpt.softcap_ce, (z, targets, 30.0)),
        (train_gpt.softcap_ce_back, (g, z, targets, loss_and_lse[1], 30.0)),
        (train_gpt.leaky_square, (m, up, 0.5)),
        (train_gpt.leaky_square_back, (noise(4, 6, 8, dtype=HALF), down, pre, 0.5)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


# In the model


def small_model(kernels: Kernels, cfg: Config = SMALL) -> train_gpt.GPT:
    """Random weights everywhere, so that nothing is multiplied by the zeros of the initial model."""
    model = train_gpt.GPT(cfg, kernels=kernels).init_weights(1)
    for i, p in enumerate(model.parameters()):
        p.data = noise(10 + i, *p.shape, size=0.3)
    return model


def loss_and_grads(model: train_gpt.GPT, forward: object, reduction: str) -> list[torch.Tensor]:
    ids = torch.randint(2, 320, (2, 25), generator=torch.Generator().manual_seed(8))
    loss = forward(ids[:, :-1], ids[:, 1:], reduction=reduction)
    assert loss.shape == (() if reduction == "mean" else (2, 24))
    return [loss.detach(), *torch.autograd.grad(loss.mean(), list(model.parameters()), allow_unused=True)]


def assert_all_close(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_model_with_fused_kernels_is_the_plain_model(reduction: str) -> None:
    plain, fused = small_model(train_gpt.PLAIN), small_model(FUSED)
    assert_all_close(loss_and_grads(fused, fused, reduction), loss_and_grads(plain, plain, reduction))


def test_model_with_fused_kernels_compiles_to_one_graph() -> None:
    shallow = dataclasses.replace(SMALL, num_layers=1, num_loops=0, parallel_start_layer=0)
    model = small_model(FUSED, shallow)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_all_close(loss_and_grads(model, compiled, "mean"), loss_and_grads(model, model, "mean"))


def test_fused_mlp_runs_only_where_nobody_listens() -> None:
    calls, sites = [], []

    def counting(*arguments: object) -> torch.Tensor:
        calls.append(1)
        return train_gpt.fused_mlp(*arguments)

    def listen(site: train_gpt.Site, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sites.append(site.name)
        return y

    model = small_model(Kernels(train_gpt.fused_cross_entropy, counting))
    ids = torch.randint(2, 320, (1, 12), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        alone, tapped = model(ids), model(ids, taps=listen)
    assert len(calls) == len(model.route.layers) == sites.count("up") == sites.count("down")
    torch.testing.assert_close(alone, tapped, rtol=1e-5, atol=1e-5)


# The choice


def runtime(device: str, dtype: torch.dtype = HALF) -> Runtime:
    return Runtime(0, 1, torch.device(device), Log(None, True), dtype)


def test_plain_twins_are_chosen_without_a_gpu_or_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_gpt.choose_kernels(SMALL, runtime("cpu", SINGLE)) == train_gpt.PLAIN
    monkeypatch.setattr(train_gpt, "triton", None)
    assert train_gpt.choose_kernels(SMALL, runtime("cuda")) == train_gpt.PLAIN


@needs_triton
def test_fused_kernels_are_chosen_where_they_can_run() -> None:
    ce, mlp = FUSED[:2]
    assert train_gpt.choose_kernels(SMALL, runtime("cuda")) == FUSED
    assert train_gpt.choose_kernels(SMALL, runtime("cuda", SINGLE)) == Kernels(ce, None)
    odd = Config(model_dim=36, num_heads=9, num_kv_heads=3, rope_dims=4)
    assert train_gpt.choose_kernels(odd, runtime("cuda")) == Kernels(ce, None)
    off = Config(fused_ce_enabled="0", fused_mlp_enabled="0")
    assert train_gpt.choose_kernels(off, runtime("cuda")) == train_gpt.PLAIN
    asked = Config(fused_ce_enabled="1", fused_mlp_enabled="1")
    assert train_gpt.choose_kernels(asked, runtime("cuda")) == FUSED


@pytest.mark.parametrize("name", ["fused_ce_enabled", "fused_mlp_enabled"])
def test_a_kernel_that_is_asked_for_and_cannot_run_is_an_error(name: str) -> None:
    with pytest.raises(UserError, match=f"{name.upper()}=1 needs a GPU"):
        train_gpt.choose_kernels(Config(**{name: "1"}), runtime("cpu"))


# The embedding's dtype


def short_run(embed_dtype: str, steps: int = 3) -> tuple[train_gpt.GPT, train_gpt.Optimisers, train_gpt.Ema]:
    cfg = dataclasses.replace(SMALL, embed_dtype=embed_dtype)
    model = train_gpt.GPT(cfg).init_weights(1)
    optimisers = train_gpt.Optimisers(cfg, model, runtime("cpu", SINGLE))
    ema = train_gpt.Ema(cfg, list(model.parameters()))
    ids = torch.randint(2, 320, (4, 25), generator=torch.Generator().manual_seed(8))
    for step in range(steps):
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimisers.step(1.0, step)
        ema.update(step + 1, 1.0)
    return model, optimisers, ema


def test_bf16_embedding_takes_its_moments_along_and_nothing_else() -> None:
    model, optimisers, ema = short_run("bf16")
    embedding = model.tok_emb.weight
    assert {n for n, p in model.named_parameters() if p.dtype == HALF} == {"tok_emb.weight"}
    for parameter, state in optimisers.adamw.state.items():
        wanted = HALF if parameter is embedding else SINGLE
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == wanted
    assert all(shadow.dtype == SINGLE for shadow in ema.shadow)
    assert model.state_dict()["tok_emb.weight"].dtype == HALF


def test_bf16_embedding_starts_as_the_float32_one_rounded_and_stays_near() -> None:
    first, wide = (train_gpt.GPT(dataclasses.replace(SMALL, embed_dtype=d)).init_weights(1) for d in ("bf16", "fp32"))
    for (name, low), high in zip(first.named_parameters(), wide.parameters(), strict=True):
        assert torch.equal(low.float(), high.to(low.dtype).float()), name
    (low, _, low_ema), (high, _, high_ema) = short_run("bf16"), short_run("fp32")
    moved = (high.tok_emb.weight - wide.tok_emb.weight).norm()
    assert 0 < (low.tok_emb.weight.float() - high.tok_emb.weight).norm() < 0.1 * moved
    assert (low_ema.shadow[0] - high_ema.shadow[0]).norm() < 0.01 * high_ema.shadow[0].norm()


def test_average_of_a_bf16_embedding_keeps_what_bf16_would_lose() -> None:
    model, _, ema = short_run("bf16")
    assert not torch.equal(ema.shadow[0], ema.shadow[0].to(HALF).float())
    torch._foreach_copy_([p.detach() for p in model.parameters()], ema.shadow)
    assert torch.equal(model.tok_emb.weight, ema.shadow[0].to(HALF))


def test_bf16_embedding_is_clipped_by_the_norm_in_float32() -> None:
    cfg = dataclasses.replace(SMALL, embed_dtype="bf16", grad_clip_norm=0.25)
    model = train_gpt.GPT(cfg).init_weights(1)
    optimisers = train_gpt.Optimisers(cfg, model, runtime("cpu", SINGLE))
    for i, p in enumerate(model.parameters()):
        p.grad = noise(i, *p.shape, dtype=p.dtype)
    shares = optimisers.muon.reduce()
    before = model.tok_emb.weight.grad.float().clone()
    everything = [*shares, *(p.grad.clone() for p in optimisers.small)]
    norm = torch.stack([g.double().square().sum() for g in everything]).sum().sqrt()
    optimisers.clip(shares)
    assert model.tok_emb.weight.grad.dtype == HALF
    assert relative(model.tok_emb.weight.grad, before * (0.25 / norm)) < 2.0**-8


@pytest.mark.parametrize("scheme", ["rowwise", "gptq"])
def test_bf16_embedding_is_quantised_as_floats(scheme: str) -> None:
    cfg = dataclasses.replace(SMALL, embed_dtype="bf16", embed_quant=scheme)
    weight, inputs = train_gpt.GPT(cfg).init_weights(2).state_dict()["tok_emb.weight"], noise(3, 400, 32)
    rule = train_gpt.quant_plan(cfg)["tok_emb.weight"]
    coded = [train_gpt.SCHEMES[scheme].encode(w, inputs.T @ inputs / 400, rule, cfg) for w in (weight, weight.float())]
    assert all(torch.equal(coded[0][key], coded[1][key]) for key in coded[1])
    restored = train_gpt.SCHEMES[scheme].decode(coded[0])
    assert restored.dtype == SINGLE and relative(restored, weight) < 0.1


# On a GPU, at the contest's shapes: 98,304 tokens of a rank, width 512, hidden 2048, vocabulary 8192


@pytest.mark.gpu
@needs_triton
def test_fused_loss_on_a_gpu_is_the_twin() -> None:
    z = torch.randn(98_304, 8192, device="cuda", dtype=HALF).mul_(5).requires_grad_()
    targets = torch.randint(8192, (98_304,), device="cuda")
    results = []
    for function in (train_gpt.fused_cross_entropy, train_gpt.softcapped_cross_entropy):
        loss = function(z, targets, 30.0)
        results.append((loss.detach(), torch.autograd.grad(loss.mean(), z)[0]))
    (loss, dz), (twin_loss, twin_dz) = results
    torch.testing.assert_close(loss, twin_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dz, twin_dz, rtol=2.0**-7, atol=1e-10)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("rows", [98_304, 1001])
def test_fused_mlp_on_a_gpu_is_the_twin(rows: int) -> None:
    m, up, down = (
        torch.randn(shape, device="cuda", dtype=HALF).mul_(size).requires_grad_()
        for shape, size in (((rows, 512), 1.0), ((2048, 512), 512**-0.5), ((512, 2048), 2048**-0.5))
    )
    g = torch.randn(rows, 512, device="cuda", dtype=HALF)

    def twin(m: torch.Tensor, up: torch.Tensor, down: torch.Tensor, slope: float) -> torch.Tensor:
        linear = torch.nn.functional.linear
        return linear(torch.nn.functional.leaky_relu(linear(m, up), slope).square(), down)

    compiled = torch.compile(train_gpt.fused_mlp, fullgraph=True)
    exact = [t.detach().float().requires_grad_() for t in (m, up, down)]
    y = twin(*exact, 0.5)
    wanted = [y, *torch.autograd.grad(y, exact, g.float())]
    for function in (train_gpt.fused_mlp, compiled):
        y = function(m, up, down, 0.5)
        for got, want in zip([y, *torch.autograd.grad(y, (m, up, down), g)], wanted, strict=True):
            assert relative(got, want) <= 0.02
