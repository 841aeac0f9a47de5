"""The fused kernels against their plain twins.

The Triton code itself runs three ways: here on the CPU under Triton's interpreter (in a child process, because the
variable that asks for it counts only before the import), ahead of time for sm_90 (Hopper), and, marked gpu, for real.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import golden_rules as rules
import numpy as np
import pytest
import torch
from conftest import ROOT, listener
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import pack_artifact
import train_gpt
from train_gpt import Config, Kernels, Log, Runtime, UserError

needs_triton = pytest.mark.skipif(train_gpt.triton is None, reason="triton is not installed")
HEADS = train_gpt.fused_norm_rotate, train_gpt.fused_self_value
FUSED = Kernels(train_gpt.fused_cross_entropy, train_gpt.fused_mlp, *HEADS)
SMALL = rules.toy_config("""
VOCAB_SIZE=320 NUM_LAYERS=4 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2 ROPE_DIMS=4
LOOP_START=1 LOOP_END=1 PARALLEL_START_LAYER=3 LOGIT_SOFTCAP=5
""")
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
CE_CASES = {  # rows, vocabulary (a block has 1024 columns), dtype, softcap, size of the logits; masked: banned ids
    "one-token": (1, 1, SINGLE, 30.0, 1.0),
    "odd-rows": (7, 1000, SINGLE, 30.0, 8.0),
    "one-block": (3, 1024, HALF, 30.0, 8.0),
    "ragged-blocks": (5, 2500, SINGLE, 7.5, 20.0),
    "ragged-half": (5, 2049, HALF, 30.0, 20.0),
    "saturated": (3, 1500, HALF, 15.0, 400.0),
    "masked": (5, 2050, SINGLE, 30.0, 8.0),
    "masked-half": (3, 1003, HALF, 30.0, 8.0),
}
MLP_CASES = {  # rows, model width, hidden width (a tile has 128 rows, 256 columns, depth 64), dtype, negative slope
    "one-row": (1, 8, 16, SINGLE, 0.5),
    "ragged": (150, 72, 328, SINGLE, 0.5),
    "ragged-half": (150, 72, 328, HALF, 0.5),
    "whole-tiles": (256, 128, 512, HALF, 0.3),
    "relu-square": (129, 64, 264, HALF, 0.0),
}
HEAD_CASES = {  # rows, tokens (a block has 32), heads, heads of keys, width, rotated pairs, dtype; tables of each row
    "one-token": (1, 1, 2, 1, 8, 2, SINGLE, False),
    "ragged": (2, 37, 4, 2, 16, 4, SINGLE, False),
    "ragged-half": (2, 37, 4, 2, 16, 4, HALF, False),
    "all-turn": (1, 40, 3, 3, 8, 4, SINGLE, False),
    "own-tables": (3, 21, 4, 1, 64, 8, SINGLE, True),
    "own-tables-half": (1, 64, 8, 4, 64, 8, HALF, True),
}
Pair = tuple[torch.Tensor, torch.Tensor]


def noise(seed: int, *shape: int, dtype: torch.dtype = SINGLE, size: float = 1.0) -> torch.Tensor:
    return (size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)).to(dtype)


def ce_inputs(rows: int, vocab: int, dtype: torch.dtype, size: float) -> tuple[torch.Tensor, ...]:
    """Logits, targets, and the gradient of each row's loss, some of it zero and negative."""
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(1))
    targets[-1] = vocab - 1
    return noise(2, rows, vocab, dtype=dtype, size=size), targets, noise(3, rows).relu() - 0.2


def banned_ids(name: str, targets: torch.Tensor) -> torch.Tensor | None:
    """Random bits for the masked cases; the first target is banned, the last one is not."""
    if not name.startswith("masked"):
        return None
    rows, vocab, *_ = CE_CASES[name]
    bits = noise(4, rows, vocab).numpy() > 0.5
    bits[0, targets[0]], bits[-1, targets[-1]] = True, False
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little"))


def exact_ce(
    z: torch.Tensor, targets: torch.Tensor, g: torch.Tensor, softcap: float, banned: torch.Tensor | None = None
) -> Pair:
    """The twin and its gradient in float64, by autograd."""
    z = z.double().requires_grad_()
    loss = train_gpt.softcapped_cross_entropy(z, targets, softcap, banned)
    return loss.detach(), torch.autograd.grad(loss, z, g.double())[0]


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest deviation over the largest magnitude."""
    assert got.shape == wanted.shape and torch.isfinite(got).all()
    return ((got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30)).item()


def ce_errors(name: str) -> dict[str, float]:
    rows, vocab, dtype, softcap, size = CE_CASES[name]
    z, targets, g = ce_inputs(rows, vocab, dtype, size)
    banned = banned_ids(name, targets)
    loss, lse = train_gpt.launch_softcap_ce(z, targets, softcap, banned)
    dz = train_gpt.launch_softcap_ce_back(g, z, targets, lse, softcap, banned)
    assert loss.dtype == lse.dtype == SINGLE and dz.dtype == dtype
    exact_loss, exact_dz = exact_ce(z, targets, g, softcap, banned)
    scale = max(1.0, exact_loss.abs().max().item())  # a lone token's loss and gradient are 0
    # the gradient is this slope times a probability less 0 or 1, which float32 rounds
    slope = g[:, None].double() * (1 - (z.double() / softcap).tanh().square())
    return {
        "loss": ((loss - exact_loss).abs().max() / scale).item(),
        "grad": ((dz.double() - exact_dz).abs().max() / slope.abs().max()).item(),
    }


def mlp_errors(name: str) -> dict[str, float]:
    rows, width, hidden, dtype, slope = MLP_CASES[name]
    m, up = noise(1, rows, width, dtype=dtype), noise(2, hidden, width, dtype=dtype, size=width**-0.5)
    down, g = noise(3, width, hidden, dtype=dtype, size=hidden**-0.5), noise(4, rows, width, dtype=dtype)
    y, pre, post = train_gpt.launch_leaky_square(m, up, down, slope)
    dpre = train_gpt.launch_leaky_square_back(g, down, pre, slope)
    assert y.dtype == pre.dtype == post.dtype == dpre.dtype == dtype
    assert torch.equal(y, torch.nn.functional.linear(post, down))
    z = pre.double()
    return {
        "pre": relative(pre, m.double() @ up.double().T),
        "post": relative(post, torch.nn.functional.leaky_relu(z, slope).square()),
        "grad": relative(dpre, (g.double() @ down.double()) * torch.where(z > 0, 2 * z, 2 * slope**2 * z)),
    }


def head_inputs(name: str) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Inputs of norm_rotate, with the gradients of its outputs; inputs of remove_self_value, with that of its output.

    One token's value is 0.
    """
    rows, tokens, heads, shared, width, pairs, dtype, own_tables = HEAD_CASES[name]
    many, few = (rows, tokens, heads, width), (rows, tokens, shared, width)
    angle = noise(1, *((rows,) if own_tables else ()), tokens, pairs, size=9.0)
    x = noise(2, rows, tokens, heads + 2 * shared, width, dtype=dtype, size=3.0)
    gq, y, g = (noise(i, *many, dtype=dtype, size=3.0) for i in range(3, 6))
    gk, gv, v = (noise(i, *few, dtype=dtype) for i in range(6, 9))
    v[0, 0, 0] = 0
    gain, gate = noise(9, heads, dtype=dtype), noise(10, rows, tokens, heads, 1, dtype=dtype).sigmoid()
    return (x, gain, angle.cos(), angle.sin(), gq, gk, gv), (y, v, gate, g)


def head_errors(name: str) -> dict[str, float]:
    rotary, xsa = head_inputs(name)
    inputs, grads = rotary[:4], rotary[4:]
    exact = [x.double().requires_grad_() for x in inputs[:2]]
    wide = train_gpt.norm_rotate(*exact, *(x.double() for x in inputs[2:]))
    wanted = dict(zip("qkv", wide, strict=True))
    got = dict(zip("qkv", train_gpt.launch_norm_rotate(*inputs), strict=True))
    found = train_gpt.launch_norm_rotate_back(*grads, *inputs)
    exact_grads = torch.autograd.grad(wide, exact, [g.double() for g in grads])
    for what, mine, other in zip(("dx", "dgain"), found, exact_grads, strict=True):
        got[what], wanted[what] = mine, other
    y, v, gate, g = xsa
    exact = [x.double().requires_grad_() for x in (y, v, gate)]
    got["xsa"], wanted["xsa"] = train_gpt.launch_self_value(y, v, gate), train_gpt.remove_self_value(*exact)
    found = train_gpt.launch_self_value(y, v, gate, g)
    exact_grads = torch.autograd.grad(wanted["xsa"], exact, g.double())
    for what, mine, other in zip(("dy", "dv", "dgate"), found, exact_grads, strict=True):
        got[what], wanted[what] = mine, other
    assert all(x.dtype == y.dtype for x in got.values())
    return {what: relative(x.detach(), wanted[what].detach()) for what, x in got.items()}


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
    errors |= {f"heads {name}": head_errors(name) for name in HEAD_CASES}
    return json.dumps(errors | {f"mlp {name}": mlp_errors(name) for name in MLP_CASES})


def child(code: str, cache: Path, **environ: str) -> Any:
    """What python -c prints last, as JSON, in the tests' folder."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "data")])
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache), **environ}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# The Triton code


@needs_triton
@pytest.mark.skipif(
    train_gpt.triton is not None
    and np.lib.NumpyVersion(train_gpt.triton.__version__) < "3.7.0"
    and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton before 3.7 turns arrays into numbers as numpy 2.4 refuses to: install numpy<2.4",
)
def test_kernels_under_the_interpreter_are_their_twins(tmp_path: Path) -> None:
    code = "import test_kernels; print(test_kernels.all_errors())"
    errors = child(code, tmp_path, TRITON_INTERPRET="1")
    cases = {"ce": CE_CASES, "mlp": MLP_CASES, "heads": HEAD_CASES}
    assert errors.keys() == {f"{kind} {name}" for kind, named in cases.items() for name in named}
    for name, found in errors.items():
        kind, case = name.split()
        half = HALF in cases[kind][case]
        for what, error in found.items():  # the interpreter truncates to bf16, where a GPU rounds
            assert error <= (2.0**-7 if half and what != "loss" else 3e-6), (name, what)


def ahead_of_time(program: object) -> dict[str, dict[str, Any]]:
    """Compile a program's kernels for sm_90: PTX, size of the cubin, shared memory in bytes, what ptxas says of spills.

    Scored logits are float32 (wide), trained ones bf16.
    """
    compiler = sys.modules["triton.compiler"]
    target = sys.modules["triton.backends.compiler"].GPUTarget("cuda", 90, 32)
    R, C, K = program.MLP_TILE
    columns = {"z": "*bf16", "targets": "*i64", "lse": "*fp32", "softcap": "fp32", "vocab": "i32"}
    masked, wide = columns | {"banned": "*u8"}, {"z": "*fp32", "banned": "*u8"}
    tiles = {"x": (R, K), "w": (C, K), "pre": (R, C // 2), "out": (R, C // 2)}
    forward, back = (
        {name: f"tensordesc<bf16[{rows}, {columns}]>" for name, (rows, columns) in shapes.items()}
        for shapes in (tiles, tiles | {"w": (K, C)})
    )
    ce, ce_back = program.softcap_ce_kernel, program.softcap_ce_back_kernel
    mlp, block = program.leaky_square_kernel, {"BLOCK": program.CE_BLOCK}
    free, built = block | {"banned": None}, {}
    rotary, value = program.norm_rotate_kernel, program.self_value_kernel
    four, block_of_heads = ("*bf16",) * 4, (program.HEAD_BLOCK,)
    heads = {"tables": ("*fp32", "*fp32"), "tokens": "i32", "rows": "i32", "eps": "fp32", "gain": "*bf16"}
    heads |= {"parts": four[:3], "whole": ("*bf16", "*bf16", "*fp32")}
    only_x, shape = {"whole": ("*bf16", "constexpr", "constexpr")}, {"SHAPE": (64, 8, *block_of_heads, 8, 4)}
    xsa = {"inputs": four, "outputs": four[:3], "tokens": "i32"}
    scored = {"inputs": (*four[:3], "constexpr"), "outputs": ("*bf16", "constexpr", "constexpr")}
    group = {"SHAPE": (64, 2, *block_of_heads)}
    for name, function, signature, constants, options in (
        ("ce", ce, columns | {"loss": "*fp32"}, free, {}),
        ("ce back", ce_back, columns | {"g_lse": "*fp32", "dz": "*bf16"}, free, {}),
        ("masked ce", ce, masked | {"loss": "*fp32"}, block, {}),
        ("masked ce back", ce_back, masked | {"g_lse": "*fp32", "dz": "*bf16"}, block, {}),
        ("wide ce", ce, columns | wide | {"loss": "*fp32"}, block, {}),
        ("wide ce back", ce_back, columns | wide | {"g_lse": "*fp32", "dz": "*fp32"}, block, {}),
        ("rotary", rotary, heads | only_x, shape | {(0, 1): None, (0, 2): None}, {}),
        ("rotary back", rotary, heads, shape, {}),
        ("xsa", value, xsa | scored, group | {(0, 3): None, (1, 1): None, (1, 2): None}, {}),
        ("xsa back", value, xsa, group, {}),
        ("mlp", mlp, forward, {"SLOPE": 0.5, "BACK": False}, {"num_warps": 8, "num_stages": 4}),
        ("mlp back", mlp, back, {"SLOPE": 0.5, "BACK": True}, {"num_warps": 8, "num_stages": 3}),
    ):
        ordered = {argument: signature.get(argument, "constexpr") for argument in function.arg_names}
        source = compiler.ASTSource(function, ordered, constants, aligned(list(ordered.values())))
        done = compiler.compile(source, target=target, options=options)
        built[name] = {"ptx": done.asm["ptx"], "cubin": len(done.asm["cubin"]), "shared": done.metadata.shared}
        built[name]["spills"] = spills(done.asm["ptx"])
    return built


def aligned(types: list[str | tuple[str, ...]]) -> dict[tuple[int, ...], list[list]]:
    """What a launch tells the compiler of pointers, which torch aligns: loads and stores of 16 bytes are possible."""
    places = {(i,): kind for i, kind in enumerate(types) if isinstance(kind, str)}
    places |= {(i, j): kind for i, kinds in enumerate(types) if (i,) not in places for j, kind in enumerate(kinds)}
    return {place: [["tt.divisibility", 16]] for place, kind in places.items() if kind.startswith("*")}


def spills(ptx: str) -> list[int]:
    """Bytes of registers that a kernel stores and loads because it has too few of them."""
    assembler = sys.modules["triton"].knobs.nvidia.ptxas.path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return [int(count) for count in re.findall(r"(\d+) bytes spill", report)]


def gradient_norms(program: object) -> list[float]:
    """Norms of the gradients through a program's operators."""
    z, targets, _ = ce_inputs(5, 33, SINGLE, 4.0)
    m, up, down = (noise(i, *shape).requires_grad_() for i, shape in enumerate(((6, 8), (24, 8), (8, 24))))
    program.fused_cross_entropy(z.requires_grad_(), targets, 30.0).sum().backward()
    program.fused_mlp(m, up, down, 0.5).sum().backward()
    return [float(x.grad.norm()) for x in (z, m, up, down)]


def built_and_trained(program: object) -> str:
    """What the child with a packed program prints."""
    return json.dumps({"kernels": ahead_of_time(program), "gradients": gradient_norms(program)})


@needs_triton
def test_packed_kernels_compile_for_hopper_and_train(tmp_path: Path) -> None:
    """The imports and sections 04 and 05 minified, which is faster than the whole program."""
    text = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    parts = re.split(r"# \+-+\+\n# \| (\d\d) .*\n# \+-+\+\n", text)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    imports = sections["02"].partition("\nclass ")[0]
    packed = pack_artifact.minify(parts[0] + imports + sections["04"] + sections["05"])
    (tmp_path / "packed_gpt.py").write_text(packed, encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport packed_gpt, test_kernels\n"
    built = child(code + "print(test_kernels.built_and_trained(packed_gpt))", tmp_path)
    for name, kernel in built["kernels"].items():
        assert ".target sm_90a" in kernel["ptx"] and kernel["cubin"] > 1000, name
        assert kernel["shared"] <= 232_448, f"{name}: more than a block may have there"
        assert kernel["spills"] == [0, 0], name
        if name.startswith(("rotary", "xsa")):  # a head's rows move 16 bytes at a time
            assert "ld.global.v4" in kernel["ptx"] and "st.global.v4" in kernel["ptx"], name
        if "mlp" in name:  # tensor cores by warp group, and bulk copies
            assert "wgmma.mma_async" in kernel["ptx"] and "cp.async.bulk.tensor" in kernel["ptx"], name
    assert built["gradients"] == gradient_norms(train_gpt)


# The gradients that the kernels implement, and the operators around them


def test_backward_formula_of_the_loss_is_the_twins_in_float64() -> None:
    for name, (rows, vocab, _, softcap, size) in CE_CASES.items():
        z, targets, g = ce_inputs(rows, vocab, DOUBLE, size)
        banned = banned_ids(name, targets)
        lse = train_gpt.softcapped(z, softcap, banned).logsumexp(1)
        got = train_gpt.softcap_ce_back.twin(g.double(), z, targets, lse, softcap, banned)
        torch.testing.assert_close(got, exact_ce(z, targets, g, softcap, banned)[1], rtol=1e-9, atol=1e-14, msg=name)


def test_fused_heads_through_the_operators_are_the_twins_in_float64() -> None:
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    for name in HEAD_CASES:
        rotary, xsa = ([x.double() for x in inputs] for inputs in head_inputs(name))
        for fused, inputs, trained, grads in ((HEADS[0], rotary[:4], 2, rotary[4:]), (HEADS[1], xsa[:3], 3, xsa[3:])):
            leaves, results = [x.requires_grad_() for x in inputs[:trained]], []
            for function in (fused, fused.twin):
                outputs = function(*inputs)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                results.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
            for got, wanted in zip(*results, strict=True):
                close(got, wanted, msg=name)


def test_fused_mlp_is_the_twin_in_float64() -> None:
    mlp = train_gpt.GPT(SMALL).init_weights(1).double().blocks[0].mlp
    torch.nn.init.normal_(mlp.down.weight, generator=torch.Generator().manual_seed(5))
    m, g = noise(6, 2, 9, 32, dtype=DOUBLE).requires_grad_(), noise(7, 2, 9, 32, dtype=DOUBLE)
    for frozen, mlp.slope in itertools.product((False, True), (0.0, 0.3, 0.5)):
        mlp.requires_grad_(not frozen)
        inputs, results = [m] if frozen else [m, mlp.up.weight, mlp.down.weight], []
        for mlp.fused in (None, train_gpt.fused_mlp):
            y = mlp(m, train_gpt.LayerTap(None))
            results.append([y, *torch.autograd.grad(y, inputs, g)])
        for plain, got in zip(*results, strict=True):
            torch.testing.assert_close(got, plain, rtol=1e-12, atol=1e-13)


def test_fused_loss_through_the_operators_is_the_twin() -> None:
    for name, (rows, vocab, dtype, softcap, size) in CE_CASES.items():
        z, targets, g = ce_inputs(rows, vocab, dtype, size)
        banned = banned_ids(name, targets)
        loss = train_gpt.fused_cross_entropy(z.requires_grad_(), targets, softcap, banned)
        (dz,) = torch.autograd.grad(loss, z, g)
        exact_loss, exact_dz = exact_ce(z.detach(), targets, g, softcap, banned)
        close, rel = torch.testing.assert_close, 2.0**-8 if dtype == HALF else 1e-4
        close(loss.double(), exact_loss, rtol=3e-6, atol=1e-5, msg=name)
        close(dz.double(), exact_dz, rtol=rel, atol=1e-5, msg=name)


def test_operators_keep_their_promises_to_the_compiler() -> None:
    z, targets, g = ce_inputs(5, 33, HALF, 4.0)
    m, up, down = noise(1, 6, 8, dtype=HALF), noise(2, 24, 8, dtype=HALF), noise(3, 8, 24, dtype=HALF)
    a, b, first = noise(5, 3, 2, 4, 4), noise(6, 3, 2, 4, 5), noise(7, 2, 4, 5)
    banned = torch.randint(256, (5, 5), generator=torch.Generator().manual_seed(8), dtype=torch.uint8)
    _, lse = train_gpt.softcap_ce(z, targets, 30.0, None)
    trained = [x.clone().requires_grad_() for x in (z, m, up, down, a, b, first)]
    rotary, (y, v, gate, gy) = head_inputs("ragged")
    heads = [x.clone().requires_grad_() for x in (*rotary[:2], y, v, gate)]
    for operator, arguments in (
        (train_gpt.softcap_ce, (trained[0], targets, 30.0, None)),
        (train_gpt.softcap_ce, (trained[0], targets, 30.0, banned)),
        (train_gpt.softcap_ce_back, (g, z, targets, lse, 30.0, None)),
        (train_gpt.softcap_ce_back, (g, z, targets, lse, 30.0, banned)),
        (train_gpt.leaky_square, (*trained[1:4], 0.5)),
        (train_gpt.leaky_square, (trained[1], up, down, 0.5)),
        (train_gpt.leaky_square_back, (noise(4, 6, 8, dtype=HALF), down, m @ up.T, 0.5)),
        (train_gpt.chunk_states, tuple(trained[4:])),
        (train_gpt.fused_norm_rotate, (*heads[:2], *rotary[2:4])),
        (train_gpt.fused_self_value, tuple(heads[2:])),
    ):
        torch.library.opcheck(operator, arguments)
    # torch's checks do not go together with the vjp by which these run on a CPU
    for operator, arguments in (
        (train_gpt.norm_rotate_back, (*rotary[4:], *rotary[:4])),
        (train_gpt.self_value_back, (y, v, gate, gy)),
    ):
        with FakeTensorMode() as mode:
            promised = operator(*map(mode.from_tensor, arguments))
        for fake, real in zip(promised, operator(*arguments), strict=True):
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_operators_have_one_graph_for_all_sizes() -> None:
    """A fake kernel that asks a tensor for its len makes a symbolic size a constant, and every size a graph."""

    def loss(z: torch.Tensor, targets: torch.Tensor, m: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        parts = train_gpt.fused_cross_entropy(z, targets, 30.0), train_gpt.fused_mlp(m, up, up.T, 0.5)
        parts += train_gpt.fused_norm_rotate(a, up[:1, 0], up[:1, :1], up[:1, 1:2])
        parts += (train_gpt.fused_self_value(a, a, a[..., :1]),)
        return sum(x.square().sum() for x in (*parts, train_gpt.chunk_states(a, a, a[0])))

    torch._dynamo.reset()
    counter, up = CompileCounterWithBackend("aot_eager"), noise(1, 16, 8)
    step = torch.compile(loss, fullgraph=True, backend=counter)
    for rows in (7, 13):
        z, targets, _ = ce_inputs(rows, 33, SINGLE, 4.0)
        leaves = [x.requires_grad_() for x in (z, noise(2, rows, 8), noise(3, rows, 2, 3, 3, size=0.3))]
        for x in (targets, *leaves):
            torch._dynamo.mark_dynamic(x, 0)
        results = [torch.autograd.grad(f(z, targets, *leaves[1:]), leaves) for f in (step, loss)]
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted)
    assert counter.frame_count == 1


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
    assert [x is None for x in got] == [x is None for x in wanted]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(*(torch.zeros(0) if x is None else x for x in (a, b)), rtol=1e-4, atol=1e-6)


def test_model_with_fused_kernels_is_the_plain_model() -> None:
    plain, fused = small_model(train_gpt.PLAIN), train_gpt.fp32_copy(small_model(FUSED))
    assert fused.blocks[0].attn.kernels == FUSED
    for reduction in ("mean", "none"):
        assert_all_close(loss_and_grads(fused, fused, reduction), loss_and_grads(plain, plain, reduction))


def test_model_with_fused_kernels_compiles_to_one_graph() -> None:
    shallow = dataclasses.replace(SMALL, num_layers=1, num_loops=0, parallel_start_layer=0)
    model = small_model(FUSED, shallow)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_all_close(loss_and_grads(model, compiled, "mean"), loss_and_grads(model, model, "mean"))


def test_fused_mlp_runs_unless_somebody_listens_inside_it() -> None:
    """A listener at the sublayer, as LoRA is, leaves it on; one at a matrix of it, as Hessians need, turns it off."""
    calls = []

    def counting(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return train_gpt.fused_mlp(*arguments)

    model, plain = small_model(Kernels(train_gpt.fused_cross_entropy, counting)), small_model(train_gpt.PLAIN)
    ids = torch.randint(2, 320, (2, 12), generator=torch.Generator().manual_seed(9))
    lora = train_gpt.Adapters(dataclasses.replace(SMALL, ttt_lora_rank=2), rules.runtime(), model, 2)
    with torch.no_grad():
        for i, p in enumerate(lora.leaves()):
            p.copy_(noise(100 + i, *p.shape, size=0.3))
        for taps, fused in ((None, True), (lora, True), (train_gpt.HessianTap(), False)):
            calls.clear()
            got, wanted = model(ids, taps=taps), plain(ids, taps=taps)
            assert len(calls) == (len(model.route.layers) if fused else 0), type(taps)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        heard = model(ids, taps=lora)
        lora.sites -= {"mlp"}
        assert not torch.allclose(model(ids, taps=lora), heard, atol=1e-3), "the site across the sublayer is heard"
    for site in ("up", "down"):
        calls.clear()
        model(ids, taps=listener(lambda site, x, y: y, site))
        assert not calls, site


# The choice


def runtime(device: str, dtype: torch.dtype = HALF) -> Runtime:
    return Runtime(0, 1, torch.device(device), Log(None, True), dtype)


def test_plain_twins_are_chosen_without_a_gpu_or_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_gpt.choose_kernels(SMALL, runtime("cpu", SINGLE)) == train_gpt.PLAIN
    monkeypatch.setattr(train_gpt, "triton", None)
    assert train_gpt.choose_kernels(SMALL, runtime("cuda")) == train_gpt.PLAIN


@needs_triton
def test_fused_kernels_are_chosen_where_they_can_run() -> None:
    names = [f"fused_{name}_enabled" for name in ("ce", "mlp", "rotary", "xsa")]
    off, asked = (Config(**dict.fromkeys(names, word)) for word in "01")
    odd, loss_alone = (
        Config(model_dim=36, num_heads=3, num_kv_heads=3, rope_dims=4),
        train_gpt.PLAIN._replace(cross_entropy=FUSED[0]),
    )
    for cfg, dtype, wanted in (
        (SMALL, HALF, FUSED),
        (SMALL, SINGLE, loss_alone),
        (odd, HALF, loss_alone),
        (off, HALF, train_gpt.PLAIN),
        (asked, HALF, FUSED),
    ):
        assert train_gpt.choose_kernels(cfg, runtime("cuda", dtype)) == wanted, (cfg, dtype)


def test_a_kernel_that_is_asked_for_and_cannot_run_is_an_error() -> None:
    for kernel in ("ce", "mlp", "rotary", "xsa", "gdn"):
        name = f"fused_{kernel}_enabled"
        with pytest.raises(UserError, match=f"{name.upper()}=1 needs a GPU, triton.*; set {name.upper()}=auto"):
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
        ema.update()
    return model, optimisers, ema


def test_bf16_embedding_takes_its_moments_along_and_nothing_else() -> None:
    """And its average keeps what bf16 would lose."""
    model, optimisers, ema = short_run("bf16")
    embedding = model.tok_emb.weight
    assert {n for n, p in model.named_parameters() if p.dtype == HALF} == {"tok_emb.weight"}
    for parameter, state in optimisers.adamw.state.items():
        wanted = HALF if parameter is embedding else SINGLE
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == wanted
    assert all(shadow.dtype == SINGLE for shadow in ema.shadow)
    assert model.state_dict()["tok_emb.weight"].dtype == HALF
    assert not torch.equal(ema.shadow[0], ema.shadow[0].to(HALF).float())
    torch._foreach_copy_([p.detach() for p in model.parameters()], ema.shadow)
    assert torch.equal(embedding, ema.shadow[0].to(HALF))


def test_bf16_embedding_starts_as_the_float32_one_rounded_and_stays_near() -> None:
    first, wide = (train_gpt.GPT(dataclasses.replace(SMALL, embed_dtype=d)).init_weights(1) for d in ("bf16", "fp32"))
    for (name, low), high in zip(first.named_parameters(), wide.parameters(), strict=True):
        assert torch.equal(low.float(), high.to(low.dtype).float()), name
    (low, _, low_ema), (high, _, high_ema) = short_run("bf16"), short_run("fp32")
    moved = (high.tok_emb.weight - wide.tok_emb.weight).norm()
    assert 0 < (low.tok_emb.weight.float() - high.tok_emb.weight).norm() < 0.1 * moved
    assert (low_ema.shadow[0] - high_ema.shadow[0]).norm() < 0.01 * high_ema.shadow[0].norm()


def test_bf16_embedding_is_clipped_by_the_norm_in_float32() -> None:
    cfg = dataclasses.replace(SMALL, embed_dtype="bf16", grad_clip_norm=0.25)
    model = train_gpt.GPT(cfg).init_weights(1)
    optimisers = train_gpt.Optimisers(cfg, model, runtime("cpu", SINGLE))
    for i, p in enumerate(model.parameters()):
        p.grad = noise(i, *p.shape, dtype=p.dtype)
    shares, grad = optimisers.muon.reduce(), model.tok_emb.weight.grad
    before = grad.float().clone()
    norm = torch.stack([g.double().square().sum() for g in (*shares, *(p.grad for p in optimisers.small))]).sum().sqrt()
    optimisers.clip(shares)
    assert model.tok_emb.weight.grad.dtype == HALF
    assert relative(model.tok_emb.weight.grad, before * (0.25 / norm)) < 2.0**-8


def test_bf16_embedding_is_quantised_as_floats() -> None:
    for name in ("rowwise", "gptq"):
        cfg, scheme = dataclasses.replace(SMALL, embed_dtype="bf16", embed_quant=name), train_gpt.SCHEMES[name]
        weight, inputs = train_gpt.GPT(cfg).init_weights(2).state_dict()["tok_emb.weight"], noise(3, 400, 32)
        rule = train_gpt.quant_plan(cfg)["tok_emb.weight"]
        coded, wide = (scheme.encode(w, inputs.T @ inputs / 400, rule, cfg) for w in (weight, weight.float()))
        assert all(torch.equal(coded[key], wide[key]) for key in wide), name
        restored = scheme.decode(coded)
        assert restored.dtype == SINGLE and relative(restored, weight) < 0.1, name


# On a GPU, at the contest's shapes: 98,304 tokens of a rank, width 512, 8 heads, hidden 2048, vocabulary 8192


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(("rows", "tokens", "own_tables"), [(1, 98_304, False), (64, 48, True), (3, 1001, False)])
def test_fused_heads_on_a_gpu_are_the_twins(rows: int, tokens: int, own_tables: bool) -> None:
    """And compiled, with gradients that come in another order of dimensions, as attention over rows leaves them."""
    y, gq, gy = (torch.randn(rows, tokens, 8, 64, device="cuda", dtype=HALF) for _ in range(3))
    v, gk, gv = (torch.randn(rows, tokens, 4, 64, device="cuda", dtype=HALF) for _ in range(3))
    gq, gy = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (gq, gy))
    gain, gate = torch.randn(8, device="cuda", dtype=HALF), torch.rand(rows, tokens, 8, 1, device="cuda", dtype=HALF)
    x = torch.randn(rows, tokens, 16, 64, device="cuda", dtype=HALF)
    angle = 9 * torch.randn(*((rows,) if own_tables else ()), tokens, 8, device="cuda")
    tables, inputs = (angle.cos(), angle.sin()), [t.requires_grad_() for t in (x, gain, y, v, gate)]

    def both(rotate: Any, remove: Any, wide: bool) -> list[torch.Tensor]:
        leaves = [t.detach().float().requires_grad_() for t in inputs] if wide else inputs
        outputs = (*rotate(*leaves[:2], *tables), remove(*leaves[2:]))
        return [*outputs, *torch.autograd.grad(outputs, leaves, [g.to(leaves[0].dtype) for g in (gq, gk, gv, gy)])]

    wanted = both(train_gpt.norm_rotate, train_gpt.remove_self_value, True)
    for functions in (HEADS, [torch.compile(f, fullgraph=True) for f in HEADS]):
        for got, want in zip(both(*functions, False), wanted, strict=True):
            assert relative(got, want) <= 0.01


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "dtype"), [(98_304, HALF), (32_768, SINGLE)])
def test_fused_loss_on_a_gpu_is_the_twin(rows: int, dtype: torch.dtype, masked: bool) -> None:
    z = torch.randn(rows, 8192, device="cuda", dtype=dtype).mul_(5).requires_grad_()
    targets = torch.randint(8192, (rows,), device="cuda")
    banned = torch.randint(256, (rows, 1024), device="cuda", dtype=torch.uint8) if masked else None
    results = []
    for function in (train_gpt.fused_cross_entropy, train_gpt.softcapped_cross_entropy):
        loss = function(z, targets, 30.0, banned)
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
