#!/usr/bin/env python3
"""Is this machine fit to train? One page, a line a check, each with its fix.

    python records/doctor.py                                          the machine: ten seconds, a minute with a GPU
    python records/doctor.py --data data/caseops                      and a data folder
    python records/doctor.py --preset records/<record> --price 24     and twenty real steps of a preset, on all GPUs

The machine: versions against requirements.txt, the compiler of kernels, memory, disk, data and tokenizer against their
manifest, ports, an all-reduce between ranks. With a GPU also the driver, the card's state, which attention backends
really run and give the exact values, the fused kernels, memory bandwidth and bf16 matmuls against the card's known
figures, clocks under load. A preset: the program itself runs twenty steps, quantises, and evaluates a sample of the
validation documents (records/rehearsal.py); the page projects steps in the budget, warm-up, evaluation and cost, and
compares with the published run where there is one. Knobs in the environment count, as for train_gpt.py.

Each line says OK, WARN (it runs, but not as well as it could), FAIL (a run would fail or be worth nothing), or "not
here" for what this machine or command line does not have. A check that itself fails is a FAIL line. The last line is
`DOCTOR {json}`; --json prints the JSON alone, --out writes it to a file instead. Exit status 1 if a line says FAIL, 2
for a wrong argument, otherwise 0.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

INTERRUPTED = "error: interrupted; the twenty steps, if they had begun, leave nothing behind"

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from interrupts import main_begins, quiet_until_main  # noqa: E402

if __name__ == "__main__":
    quiet_until_main(INTERRUPTED)

try:
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch import Tensor
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import train_gpt
    from records import rehearsal
    from records.black_box import free_port
    from records.claims import CANONICAL, INVALID_TOTAL
    from records.rehearsal import Published, Rehearsal
    from records.verify import at_least
    from train_gpt import Config, UserError
except ImportError as missing:  # what the rest of the page needs
    sys.exit(f"FAIL      python       {missing}  -> pip install -r requirements.txt")

OK, WARN, FAIL, NOT_HERE = "OK", "WARN", "FAIL", "not here"
GIB = 2**30
OLDEST_TORCH, OLDEST_DRIVER = (2, 11), 580
BANDWIDTH_SHARE, MATMUL_SHARE = 0.85, 0.65  # of the known figures: what a healthy card reaches
CLOCK_SHARE = 0.6  # of the highest clock, under load: below the power limit's usual effect
PACE_SHARE = 0.95  # of the published steps, on the published machine
MATMUL, LOAD_SECONDS = 8192, 3.0
MEMORY_A_RANK = 4 * GIB  # of the host: torch, the compiler and the weights (estimated)
RUNS = 3  # a record is three seeds
TOLERANCE = 0.03  # of bf16 results, over their largest value: right ones reach 0.01, wrong ones 0.5
REDUCE_MIB, REDUCE_SECONDS = 64, 180
SLOW_REDUCE = 100.0  # GB/s: NVLink has several times that, PCIe a fraction
PORT = 29500  # torchrun's own without --standalone
# Memory bandwidth in TB/s and dense bf16 TFLOP/s by the vendors' datasheets; of names that fit, the first counts.
CARDS = {
    "H100 PCIe": (2.0, 756),
    "H100 NVL": (3.9, 835),
    "H100": (3.35, 989),
    "H200 NVL": (4.8, 835),
    "H200": (4.8, 989),
    "B200": (8.0, 2250),
    "A100-SXM4-80GB": (2.04, 312),
    "L40S": (0.864, 362),
    "RTX 4090": (1.01, 165),
}
# Bits of clocks_event_reasons.active (NVML) that mean trouble. The power limit (0x4) is what ends every large matmul.
REASONS = {0x8: "hardware slowdown", 0x20: "too hot", 0x40: "too hot, by hardware", 0x80: "power brake"}
WHY = {  # what a check may need -> what the page says where it is missing
    "smi": "no nvidia-smi",
    "gpu": "no GPU",
    "gpus": "fewer than two GPUs",
    "preset": "no --preset",
    "data": "no usable data",
    "steps": "the twenty steps did not run",
    "price": "no --price",
}


class Finding(NamedTuple):
    """What a check says: its status, what was found, and the fix."""

    status: str
    found: str
    fix: str = ""


@dataclass
class Page:
    """What the page is about; have: which of WHY this machine and command line provide, as far as known."""

    cfg: Config
    room: Path
    preset: str = ""
    ranks: int = 1
    price: float | None = None
    disk_mib: int = 256
    data_named: bool = False
    have: set[str] = field(default_factory=set)
    card: str = "CPU"
    rehearsal: Rehearsal | None = None


def worst(findings: Iterable[Finding]) -> Finding:
    """Return one finding for several cards: the first of the worst status, and how many cards have it."""
    found = list(findings)
    status = min((one.status for one in found), key=[FAIL, WARN, OK].index)
    bad = [index for index, one in enumerate(found) if one.status == status]
    first = found[bad[0]]
    if len(found) == 1:
        return first
    return first._replace(found=f"card {bad[0]}: {first.found} ({len(bad)} of {len(found)} cards)")


# +---------------------------------------------------------------------------+
# | ANY MACHINE                                                               |
# +---------------------------------------------------------------------------+


def release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: 2.13.0+cu130 -> (2, 13, 0)."""
    return tuple(map(int, re.match(r"[\d.]*", version)[0].strip(".").split("."))) if version[:1].isdigit() else ()


def check_python(page: Page) -> Finding:
    """Python, and the packages that requirements.txt pins."""
    pins = re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    have = {}
    for name, _ in pins:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            have[name] = importlib.metadata.version(name)
    return judge_packages(platform.python_version(), dict(pins), have)


def judge_packages(python: str, pins: Mapping[str, str], have: Mapping[str, str]) -> Finding:
    """An old Python fails. Other packages than pinned are a WARN: those that a run needs have checks of their own."""
    fix = "pip install -r requirements.txt"
    if release(python) < (3, 11):
        return Finding(FAIL, f"Python {python}", "install Python 3.11 or newer")
    # a build of torch has a suffix, +cpu or +cu130
    have = {name: version.partition("+")[0] for name, version in have.items()}
    other = [f"{name} {have.get(name, 'missing')} ({pin})" for name, pin in pins.items() if have.get(name) != pin]
    if other:
        return Finding(WARN, f"Python {python}; not as tested: {', '.join(other)}", fix)
    return Finding(OK, f"Python {python}, {len(pins)} packages as pinned")


def check_torch(page: Page) -> Finding:
    """The build of torch, and whether it sees the cards."""
    cards = smi("name") if "smi" in page.have else []
    seen = torch.cuda.device_count() if torch.version.cuda else 0
    kind = "sm_{}{}".format(*torch.cuda.get_device_capability()) if seen else ""
    return judge_torch(torch.__version__, torch.version.cuda, len(cards), seen, kind)


def judge_torch(version: str, cuda: str | None, cards: int, seen: int, kind: str = "") -> Finding:
    """torch too old, or cards that it does not see."""
    text = f"torch {version}, " + (f"CUDA {cuda}, sees {seen} GPUs {kind}".strip() if cuda else "built without CUDA")
    if release(version) < OLDEST_TORCH:
        return Finding(FAIL, text, "pip install -r requirements.txt (2.11 or newer)")
    if cards and not cuda:
        return Finding(FAIL, f"{text}, but nvidia-smi lists {cards}", "pip install torch from the package index alone")
    if cards and not seen:
        return Finding(FAIL, f"{text}, but nvidia-smi lists {cards}", "CUDA 13 needs driver 580; CUDA_VISIBLE_DEVICES?")
    return Finding(OK, text)


def check_triton(page: Page) -> Finding:
    """Triton, by compiling the cross-entropy kernel for an H100, which needs no GPU."""
    if train_gpt.triton is None:
        status = FAIL if "gpu" in page.have else WARN
        return Finding(status, "not installed: plain twins run", "pip install -r requirements.txt (Linux, x86_64)")
    compiler = sys.modules["triton.compiler"]
    target = sys.modules["triton.backends.compiler"].GPUTarget("cuda", 90, 32)
    kernel = train_gpt.softcap_ce_kernel
    types = {"z": "*bf16", "targets": "*i64", "loss": "*fp32", "lse": "*fp32", "softcap": "fp32", "vocab": "i32"}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = compiler.ASTSource(kernel, signature, {"BLOCK": train_gpt.CE_BLOCK, "banned": None})
    began = time.perf_counter()
    size = len(compiler.compile(source, target=target).asm["cubin"])
    seconds = time.perf_counter() - began
    return Finding(OK, f"Triton {train_gpt.triton.__version__}, a kernel for sm_90 has {size:,} bytes, {seconds:.1f} s")


def check_compressor(page: Page) -> Finding:
    """Whatever the preset's COMPRESSOR runs; without a preset, every one."""
    names = [page.cfg.compressor] if page.preset else list(train_gpt.CODECS)
    findings = []
    for name in names:
        try:
            train_gpt.CODECS[name].require()
            findings.append(Finding(OK, name))
        except UserError as error:
            text, _, fix = str(error).rpartition(": ")
            findings.append(Finding(FAIL if page.preset else WARN, text, fix))
    bad = [one for one in findings if one.status != OK]
    if bad:
        return bad[0]._replace(found="; ".join(one.found for one in bad))
    return Finding(OK, f"COMPRESSOR={'|'.join(names)} can run")


def memory_free() -> int:
    """Return bytes of memory that are free for this process: the machine's, or less in a container."""
    text = Path("/proc/meminfo").read_text(encoding="utf-8")
    free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", text)[1])
    group = Path("/sys/fs/cgroup")
    limit, used = (group / "memory.max", group / "memory.current")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free


def check_host(page: Page) -> Finding:
    """Cores and memory for the ranks."""
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    return judge_host(len(os.sched_getaffinity(0)), memory_free(), shared, page.ranks, os.getloadavg()[0])


def judge_host(cores: int, free: int, shared: int, ranks: int, load: float) -> Finding:
    """Fewer cores than ranks, other programs on them, little memory, or a container's small /dev/shm."""
    text = f"{cores} cores, load {load:.1f}, {free / GIB:.1f} GiB of memory free, {shared / GIB:.1f} GiB of /dev/shm"
    if free < MEMORY_A_RANK * ranks:
        return Finding(WARN, text, f"{ranks} ranks want {MEMORY_A_RANK * ranks / GIB:.0f} GiB; end other programs")
    if cores < ranks:
        return Finding(WARN, text, f"{ranks} ranks share them and wait for one another; start fewer")
    if load > cores:
        return Finding(WARN, text, "other programs are busy: what follows is slower than alone")
    if ranks > 1 and shared < GIB:
        return Finding(WARN, text, "NCCL wants more; start the container with --ipc=host or --shm-size=8g")
    return Finding(OK, text)


def check_disk(page: Page) -> Finding:
    """Write speed of the disk that runs go to, and its room."""
    page.room.mkdir(parents=True, exist_ok=True)
    # zeros might be compressed away
    block = np.random.default_rng(0).bytes(2**20)
    with tempfile.NamedTemporaryFile(dir=page.room, prefix="doctor_") as file:
        began = time.perf_counter()
        for _ in range(page.disk_mib):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed = page.disk_mib / (time.perf_counter() - began)
    return judge_disk(speed, shutil.disk_usage(page.room).free, train_gpt.bytes_on_disk(page.cfg))


def judge_disk(mib_a_second: float, free: int, need: int) -> Finding:
    """Too little room for one run, or for a record's seeds; a disk on which a checkpoint takes many seconds."""
    text = f"{mib_a_second:,.0f} MiB/s written and synced, {free / GIB:,.1f} GiB free, {need / GIB:.2f} GiB a run"
    if free < need:
        return Finding(FAIL, text, "make room, or name another disk with --room and ARTIFACT_DIR")
    if free < RUNS * need:
        return Finding(WARN, text, f"{RUNS} seeds need {RUNS * need / GIB:.1f} GiB")
    if mib_a_second < 100:
        return Finding(WARN, text, "keep runs on a local disk; data too")
    return Finding(OK, text)


def pieces_of(tokenizer: Path) -> int:
    """Return the number of pieces of a tokenizer. UserError if it is none."""
    try:
        return train_gpt.spm.SentencePieceProcessor(model_proto=tokenizer.read_bytes()).vocab_size()
    except RuntimeError as error:
        raise UserError(f"{tokenizer}: not a SentencePiece model ({train_gpt.first_line(error)})") from None


def check_data(page: Page) -> Finding:
    """Shards and tokenizer by the program's own readers, and fingerprints against the manifest."""
    cfg, folder = page.cfg, Path(page.cfg.data_path)
    how = "python data/download.py sp8192 --out data/sp8192 (or caseops), or data/prepare.py for your own text"
    if not folder.is_dir():
        return Finding(FAIL if page.data_named or page.preset else WARN, f"{folder}: no such folder", how)
    log = train_gpt.Log(None, quiet=True)
    try:
        tokenizer = train_gpt.find_tokenizer(cfg)
        if tokenizer and not page.preset:
            # without a preset nothing says what the vocabulary should be
            cfg = train_gpt.dataclasses.replace(cfg, vocab_size=pieces_of(tokenizer))
        mark = train_gpt.check_data(cfg, log)
        val = train_gpt.load_val(cfg)
        shards = [train_gpt.read_shard(path) for path in train_gpt.list_shards(cfg.data_path, "train")]
    except UserError as error:
        text, _, fix = str(error).rpartition("; ")
        return Finding(FAIL, text or fix, fix if text else "prepare or copy the data again")
    page.have.add("data")
    targets = len(val.tokens) - 1
    size = int(val.bytes[1:].sum())
    text = f"{targets:,} targets of {size:,} bytes, {cfg.vocab_size} pieces; training "
    text += f"{sum(map(len, shards)):,} tokens (shards: {len(shards)}); hash {mark}"
    return judge_data(text, targets, size, log.warnings)


def judge_data(text: str, targets: int, size: int, notes: list[str]) -> Finding:
    """Name a known denominator. An invalid one fails; what the program warns of is a WARN."""
    known = CANONICAL.get((size, targets)) or CANONICAL.get((size, 0))
    text += f"; {known}" if known else ""
    if size == INVALID_TOTAL:
        return Finding(FAIL, text, "download or prepare the data again, with the byte sidecar")
    if notes:
        said = notes[0].removeprefix("WARNING: ")
        return Finding(WARN, f"{text}; {said}", "python data/prepare.py audit DATA_PATH")
    return Finding(OK, text)


def check_ports(page: Page) -> Finding:
    """Can ranks meet on this machine?"""
    free = free_port()
    with socket.socket() as probe:
        taken = probe.connect_ex(("localhost", PORT)) == 0
    if taken:
        return Finding(WARN, f"{free} is free, {PORT} is taken", "start with torchrun --standalone")
    return Finding(OK, f"{PORT} and {free} are free")


# +---------------------------------------------------------------------------+
# | RANKS                                                                     |
# +---------------------------------------------------------------------------+


def reduce_as_rank(backend: str) -> int:
    """One of torchrun's ranks: reduce REDUCE_MIB of float32, check the sum; rank 0 prints the bus bandwidth."""
    rank, world, local_rank = train_gpt.launch_variables(os.environ)
    device = torch.device("cuda", local_rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # the group of a GPU is the one that training has
    group = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend
    dist.init_process_group(group, timeout=train_gpt.datetime.timedelta(seconds=REDUCE_SECONDS / 3))
    x = torch.full((REDUCE_MIB * 2**18,), rank + 1.0, device=device)
    dist.all_reduce(x)
    good = bool((x == world * (world + 1) / 2).all())
    runtime = train_gpt.Runtime(rank, world, device, train_gpt.Log(None, True))
    repeats = 20 if device.type == "cuda" else 2
    runtime.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(x)
    runtime.synchronize()
    seconds = (time.perf_counter() - began) / repeats
    # a ring sends each byte 2 (n - 1) / n times
    speed = 2 * (world - 1) / world * x.nbytes / seconds / 1e9
    if rank == 0:
        print("REDUCED " + json.dumps({"good": good, "ranks": world, "gb_a_second": speed}))
    dist.destroy_process_group()
    return 0


def all_reduce(backend: str, ranks: int) -> dict[str, Any]:
    """Return what rank 0 of an all-reduce under torchrun says. UserError if it fails or hangs."""
    command = rehearsal.launched(Path(__file__), ranks, "--as-rank", backend)
    env = rehearsal.user_environment() | {"OMP_NUM_THREADS": "1"}
    output = rehearsal.run_group(command, env, REDUCE_SECONDS)
    return json.loads(output.partition("REDUCED ")[2].splitlines()[0])


def judge_reduce(name: str, said: Mapping[str, Any]) -> Finding:
    """A wrong sum fails; NCCL over PCIe is worth a look."""
    text = f"{name} all-reduce between {said['ranks']} ranks, {said['gb_a_second']:.1f} GB/s of bus bandwidth"
    if not said["good"]:
        return Finding(FAIL, f"{text}, a wrong sum", "run again with NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 may help")
    if name == "NCCL" and said["gb_a_second"] < SLOW_REDUCE:
        return Finding(WARN, text, "no NVLink? see nvidia-smi topo -m; unset NCCL_P2P_DISABLE")
    return Finding(OK, text)


# +---------------------------------------------------------------------------+
# | CARDS                                                                     |
# +---------------------------------------------------------------------------+


def smi(fields: str, what: str = "gpu") -> list[dict[str, str]]:
    """Return a row of fields for each visible card. UserError if nvidia-smi fails."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["nvidia-smi", f"--query-{what}={fields}", "--format=csv,noheader,nounits"]
    command += ["-i", visible] if visible else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise UserError(f"nvidia-smi: {rehearsal.last_line(done.stdout + done.stderr)}")
    if what == "gpu" and not done.stdout.strip():
        raise UserError("nvidia-smi lists no card; look at its whole output, and at CUDA_VISIBLE_DEVICES")
    names = fields.split(",")
    rows = (line.split(",") for line in done.stdout.splitlines() if line.strip())
    return [dict(zip(names, map(str.strip, row), strict=False)) for row in rows]


def smi_number(row: Mapping[str, str], name: str) -> float | None:
    """Return a number of nvidia-smi, None where it has none ([N/A])."""
    text = row.get(name, "")
    try:
        return float(int(text, 16) if text.startswith("0x") else text)
    except ValueError:
        return None


def judge_driver(version: str) -> Finding:
    """Older drivers run, some of them a third slower without a word."""
    if not release(version):
        return Finding(WARN, f"driver {version!r}", "nvidia-smi tells no version; look at its whole output")
    if release(version)[0] < OLDEST_DRIVER:
        return Finding(
            WARN, f"driver {version}", f"{OLDEST_DRIVER} or newer; an older one cost a third of the speed elsewhere"
        )
    return Finding(OK, f"driver {version}")


ECC = "ecc.errors.uncorrected.volatile.total"
CARD_FIELDS = f"name,memory.total,memory.used,power.limit,power.default_limit,{ECC},mig.mode.current"


def check_cards(page: Page) -> Finding:
    """State of each card before this process uses it."""
    apps = [", ".join(row.values()) for row in smi("pid,process_name,used_memory", "compute-apps")]
    return worst(judge_card(row, apps) for row in smi(CARD_FIELDS))


def judge_card(row: Mapping[str, str], apps: list[str]) -> Finding:
    """Memory errors, other processes, a lowered power limit, a card in slices."""
    used, total = (smi_number(row, f"memory.{name}") or 0.0 for name in ("used", "total"))
    limit, default = (smi_number(row, f"power.{name}") for name in ("limit", "default_limit"))
    text = f"{row['name']}, {used:,.0f} of {total:,.0f} MiB used" + (f", {limit:.0f} W" if limit else "")
    errors = smi_number(row, ECC)
    if errors:
        return Finding(FAIL, f"{text}, {errors:.0f} uncorrected memory errors", "take another machine")
    if used > 1024:
        listed = "; ".join(apps) or "nvidia-smi lists none"
        return Finding(WARN, f"{text} by others", f"end them (process, name, MiB): {listed}")
    if limit and default and limit < 0.97 * default:
        return Finding(WARN, f"{text} of {default:.0f} W", f"nvidia-smi -pl {default:.0f} as root")
    if row.get("mig.mode.current") == "Enabled":
        return Finding(WARN, f"{text}, cut into slices (MIG)", "take a whole card; the figures below are of a slice")
    return Finding(OK, text)


def figures_of(name: str) -> tuple[float, float] | None:
    """Return TB/s and TFLOP/s of a card by its name, None for an unknown one."""
    return next((figures for part, figures in CARDS.items() if part in name), None)


def judge_speed(what: str, unit: str, measured: float, known: float | None, share: float) -> Finding:
    """A speed against the known figure."""
    if known is None:
        return Finding(OK, f"{what} {measured:.3g} {unit}, no known figure for this card")
    text = f"{what} {measured:.3g} of {known:g} {unit}, {100 * measured / known:.0f} %"
    if measured < share * known:
        return Finding(WARN, text, f"healthy is {100 * share:.0f} %: look at clocks and cards")
    if measured > 1.1 * known:
        return Finding(WARN, text, "no card is that fast: is the table, the clock or the driver wrong?")
    return Finding(OK, text)


def device_seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the device's seconds for one call, after a few that warm up."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        work()
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def visible_cards() -> Iterator[str]:
    """Make each visible card the current one in turn; yield its name."""
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            yield torch.cuda.get_device_name(index)


def check_bandwidth(page: Page) -> Finding:
    """Copies of 1 GiB, which is read and written."""
    findings = []
    for name in visible_cards():
        source = torch.ones(GIB, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        speed = 2 * GIB / device_seconds(lambda a=target, b=source: a.copy_(b), 20) / 1e12
        known = figures_of(name)
        findings.append(judge_speed("copies", "TB/s", speed, known and known[0], BANDWIDTH_SHARE))
        del source, target
    torch.cuda.empty_cache()
    return worst(findings)


def squares(size: int) -> list[Tensor]:
    """Return two random bf16 matrices and room for their product, on the current card."""
    return [torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(3)]


def check_matmul(page: Page) -> Finding:
    """Square bf16 matmuls."""
    findings = []
    for name in visible_cards():
        a, b, c = squares(MATMUL)
        speed = 2 * MATMUL**3 / device_seconds(lambda x=a, y=b, z=c: torch.mm(x, y, out=z), 50) / 1e12
        known = figures_of(name)
        findings.append(judge_speed("bf16 matmuls", "TFLOP/s", speed, known and known[1], MATMUL_SHARE))
    return worst(findings)


CLOCK_FIELDS = "clocks.sm,clocks.max.sm,power.draw,temperature.gpu"


def check_clocks(page: Page) -> Finding:
    """What nvidia-smi says while every card multiplies."""
    for _ in visible_cards():
        # large ones: a card queues about a thousand calls, and the next card waits meanwhile
        a, b, c = squares(2 * MATMUL)
        seconds = device_seconds(lambda x=a, y=b, z=c: torch.mm(x, y, out=z), 5)
        # the calls return at once, and the card works on
        for _ in range(int(LOAD_SECONDS / seconds)):
            torch.mm(a, b, out=c)
    try:
        rows = smi(f"{CLOCK_FIELDS},clocks_event_reasons.active")
    except UserError:  # the name before driver 535
        rows = smi(f"{CLOCK_FIELDS},clocks_throttle_reasons.active")
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)
    return worst(map(judge_clocks, rows))


def judge_clocks(row: Mapping[str, str]) -> Finding:
    """Throttling for another reason than the power limit, or a low clock."""
    clock, highest, watts, celsius = (smi_number(row, name) or 0.0 for name in CLOCK_FIELDS.split(","))
    mask = int(smi_number(row, "clocks_event_reasons.active") or smi_number(row, "clocks_throttle_reasons.active") or 0)
    reasons = [text for bit, text in REASONS.items() if mask & bit]
    text = f"under load {clock:,.0f} of {highest:,.0f} MHz, {watts:.0f} W, {celsius:.0f} C"
    if reasons:
        return Finding(WARN, f"{text}; throttled: {', '.join(reasons)}", "cooling or power: take another machine")
    if clock < CLOCK_SHARE * highest:
        return Finding(WARN, f"{text}; that is low", "nvidia-smi -rgc and -rac as root, or another machine")
    return Finding(OK, text)


# +---------------------------------------------------------------------------+
# | KERNELS                                                                   |
# +---------------------------------------------------------------------------+


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return random bf16 numbers on the CPU, the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def values_of(function: Callable[..., Tensor], inputs: list[Tensor], device: torch.device) -> list[Tensor]:
    """Return a function's result on a device, and its gradients, as float32 on the CPU."""
    leaves = [x.detach().to(device).requires_grad_() for x in inputs]
    y = function(*leaves)
    weight = noise(y.shape, 9).to(device)
    return [x.detach().float().cpu() for x in (y, *torch.autograd.grad((y.float() * weight).sum(), leaves))]


def exact_values(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return the same by the CPU in float32: a device that computes nothing must not be compared with itself."""
    return values_of(lambda *x: function(*(t.float() for t in x)), inputs, torch.device("cpu"))


def error_of(
    function: Callable[..., Tensor], exact: list[Tensor], inputs: list[Tensor], device: torch.device
) -> float | str:
    """Return the largest error of a result and its gradients, over their largest values; or why it cannot run."""
    try:
        got = values_of(function, inputs, device)
    except (RuntimeError, ImportError, NotImplementedError) as error:
        return train_gpt.first_line(error)
    # numpy's maximum, unlike Python's, is NaN if any of them is
    return float(np.max([float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, exact, strict=True)]))


def segmented(device: torch.device, tokens: int, longest: int) -> train_gpt.AttnMeta:
    """Return the meta of a packed row of short documents, without a mask."""
    bounds = train_gpt.segment_bounds(np.array([5, 300, 301, 900]), tokens, longest)
    cu_seqlens = torch.from_numpy(train_gpt.pad_bounds(bounds)).to(device)
    return train_gpt.AttnMeta(cu_seqlens, longest, *train_gpt.rotary_tables(tokens, 16, 1e4, device), None)


def attention_errors(device: torch.device) -> dict[str, float | str]:
    """Return backend -> error or why not: SDPA's over a causal row, flash attention over a row of segments."""
    tokens, longest, found = 1024, 256, {}
    inputs = [noise((1, tokens, heads, 64), heads + place) for place, heads in enumerate((8, 4, 4))]

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return train_gpt.exact_attention(q, k, v, None, None)

    exact = exact_values(whole, inputs)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        # torch warns of every reason why another backend was not taken
        with sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            name = "sdpa " + backend.name.removesuffix("_ATTENTION").lower()
            found[name] = error_of(whole, exact, inputs, device)
    host, flash = segmented(torch.device("cpu"), tokens, longest), segmented(device, tokens, longest)
    masked = host._replace(mask=train_gpt.segment_mask(host.cu_seqlens, tokens, longest))
    exact = exact_values(lambda *x: train_gpt.masked_attention(*x, masked), inputs)
    runtime = train_gpt.Runtime(0, 1, device, train_gpt.Log(None, True), torch.bfloat16)
    # FA3 and FA4 come last: once chosen, they take the place of torch's own kernels in this process
    for name in ("fa2", "fa3", "fa4"):
        try:
            attend = train_gpt.choose_attention(Config(attention=name), runtime)
            found[name] = error_of(lambda *x, run=attend: run(*x, flash), exact, inputs, device)
        except UserError as error:
            said = str(error).removesuffix("; set ATTENTION=auto")
            found[name] = said.partition("cannot run here: ")[2] or said
    return found


def check_attention(page: Page) -> Finding:
    """Every way to attend, forward and backward."""
    return judge_attention(attention_errors(torch.device("cuda")), torch.cuda.get_device_capability()[0])


def judge_attention(found: Mapping[str, float | str], generation: int) -> Finding:
    """Wrong values fail, and so does no FA2; Hopper and Blackwell, of this generation, should have FA3 or FA4."""
    cannot = {name: error[:60] for name, error in found.items() if isinstance(error, str)}
    errors = {name: error for name, error in found.items() if name not in cannot}
    # NaN is wrong too
    wrong = [f"{name} off by {error:.3f}" for name, error in errors.items() if not error <= TOLERANCE]
    good = [name for name, error in errors.items() if error <= TOLERANCE]
    text = f"right: {', '.join(good) or 'none'}"
    text += f"; WRONG: {', '.join(wrong)}" if wrong else ""
    text += "; not here: " + ", ".join(f"{name} ({why})" for name, why in cannot.items()) if cannot else ""
    if wrong:
        return Finding(FAIL, text, "choose another with ATTENTION=; its build does not fit torch or the card")
    if "fa2" not in good:
        return Finding(FAIL, text, "a CUDA build of torch that knows this card")
    if generation in (9, 10) and not {"fa3", "fa4"} & {*good}:
        return Finding(WARN, text, 'pip install "flash-attn-4[cu13]": attention by FA2 is a third of a step')
    return Finding(OK, text)


KERNEL_KNOBS = {"cross-entropy": "CE", "MLP": "MLP", "rotation": "ROTARY", "XSA": "XSA"}  # FUSED_<...>_ENABLED


def kernel_errors(device: torch.device) -> dict[str, float | str]:
    """Return fused kernel -> its error against the plain twin, in bf16."""
    targets = torch.arange(256)

    def turn(rotate: Callable[..., tuple[Tensor, ...]]) -> Callable[[Tensor, Tensor], Tensor]:
        def heads(x: Tensor, gain: Tensor) -> Tensor:
            return torch.cat(rotate(x, gain, *train_gpt.rotary_tables(256, 16, 1e4, x.device)), dim=2)

        return heads

    def plain_mlp(m: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return train_gpt.F.leaky_relu(m @ up.T, 0.5).square() @ down.T

    cases = {  # the kernel, its twin, shapes of what they get
        "cross-entropy": (
            lambda z: train_gpt.fused_cross_entropy(z, targets.to(device), 30.0),
            lambda z: train_gpt.softcapped_cross_entropy(z, targets, 30.0),
            [(256, 1000)],
        ),
        "MLP": (lambda *x: train_gpt.fused_mlp(*x, 0.5), plain_mlp, [(256, 128), (512, 128), (128, 512)]),
        "rotation": (turn(train_gpt.fused_norm_rotate), turn(train_gpt.norm_rotate), [(2, 256, 16, 64), (8,)]),
        "XSA": (
            train_gpt.fused_self_value,
            train_gpt.remove_self_value,
            [(2, 256, 8, 64), (2, 256, 4, 64), (2, 256, 8, 1)],
        ),
    }
    found = {}
    for name, (fused, plain, shapes) in cases.items():
        inputs = [noise(shape, seed) for seed, shape in enumerate(shapes)]
        found[name] = error_of(fused, exact_values(plain, inputs), inputs, device)
    return found


def judge_kernels(found: Mapping[str, float | str]) -> Finding:
    """A kernel that cannot run, or is wrong."""
    said = {name: error if isinstance(error, str) else f"off by {error:.4f}" for name, error in found.items()}
    text = ", ".join(f"{name} {error}" for name, error in said.items())
    bad = [name for name, error in found.items() if isinstance(error, str) or not error <= TOLERANCE]
    if bad:
        off = " ".join(f"FUSED_{KERNEL_KNOBS[name]}_ENABLED=0" for name in bad)
        return Finding(FAIL, text, f"Triton of this torch; or {off}")
    return Finding(OK, f"{text}, against their twins")


# +---------------------------------------------------------------------------+
# | A PRESET                                                                  |
# +---------------------------------------------------------------------------+


def milliseconds(found: Rehearsal) -> str:
    """Return a step's milliseconds, in words."""
    parts = {"before looping": found.before_ms, "looping": found.looped_ms}
    return ", ".join(f"{value:,.1f} ms {name}" for name, value in parts.items() if value == value)


def check_steps(page: Page) -> Finding:
    """Run them."""
    # the program needs the memory that this process keeps
    torch.cuda.empty_cache()
    # minutes without a line would look like the end
    print(f"running {rehearsal.STEPS} steps of {page.preset} on {page.ranks} ranks", file=sys.stderr, flush=True)
    try:
        page.rehearsal = rehearsal.rehearse(page.preset, page.cfg, page.ranks, page.room)
    except UserError as error:
        memory = "raise BATCH_SLICES, lower TTT_BATCH_SIZE"
        fix = memory if "out of memory" in str(error).lower() else "run the preset by hand with ITERATIONS=20"
        return Finding(FAIL, str(error), fix)
    page.have.add("steps")
    page.card = torch.cuda.get_device_name() if "gpu" in page.have else page.card
    found = page.rehearsal
    return Finding(OK, f"{milliseconds(found)} (medians, each step waits for its loss), {found.wall:.0f} s in all")


def judge_budget(page: Page, known: Published | None) -> Finding:
    """Steps in the training budget; fewer than published, on the published machine, are a WARN."""
    cfg, found = page.cfg, page.rehearsal
    seconds = rehearsal.training_seconds(cfg, found)
    if cfg.max_wallclock_seconds <= 0:
        return Finding(OK, f"ITERATIONS={cfg.iterations} take {seconds:,.0f} s; no budget is set")
    steps = rehearsal.steps_in(cfg, found)
    text = f"{steps:,.0f} steps in {cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds:g} s"
    if known is None:
        return Finding(OK, text)
    text += f", published {known.steps:,.0f}"
    pairs = ((known.before, "before looping"), (known.looped, "looping"))
    paces = [f"{value:g} ms {name}" for value, name in pairs if value]
    text += f" ({', '.join(paces)})" if paces else ""
    # a rank's card must be the published one too
    if page.ranks != 8 or figures_of(page.card) != CARDS["H100"]:
        return Finding(OK, f"{text} on 8 x H100; this is {page.ranks} x {page.card}")
    if steps < PACE_SHARE * known.steps:
        return Finding(WARN, text, "look at attention, clocks and nccl above")
    return Finding(OK, text)


def judge_calibration(cfg: Config, found: Rehearsal) -> Finding:
    """Calibration that would overrun the training budget."""
    text = f"{found.calibration:.1f} s of calibration"
    if cfg.max_wallclock_seconds <= 0:
        return Finding(OK, f"{text}; no budget is set")
    text += f", {cfg.gptq_reserve_seconds:g} s reserved"
    if found.calibration > cfg.gptq_reserve_seconds:
        return Finding(WARN, text, f"GPTQ_RESERVE_SECONDS={found.calibration + 1:.0f}")
    return Finding(OK, text)


def check_warm_up(page: Page) -> Finding:
    """Compilation before the clock."""
    found, cfg = page.rehearsal, page.cfg
    whole = rehearsal.warm_up_seconds(cfg, found)
    text = f"{found.warm_up:.1f} s with {rehearsal.WARM_UP} steps a graph"
    return Finding(OK, f"{text}, about {whole:.1f} s with the run's {cfg.warmup_steps}, before the clock starts")


def card_mib() -> int:
    """Return the first card's memory."""
    return torch.cuda.get_device_properties(0).total_memory // 2**20


def judge_peak(peak: int | None, total: int) -> Finding:
    """Little room left; the CUDA context and NCCL need one or two GiB beside the allocator."""
    if peak is None:
        return Finding(WARN, "result.json has no peak_memory_mib", "did the steps run on the GPU? DEVICE=cuda")
    text = f"training and evaluation take {peak:,} of {total:,} MiB; context and NCCL come on top"
    if peak > 0.9 * total:
        return Finding(WARN, text, "raise BATCH_SLICES, whose step stays the same, or lower TTT_BATCH_SIZE")
    return Finding(OK, text)


def judge_evaluation(page: Page, known: Published | None) -> Finding:
    """The final evaluation, projected; one that does not fit its budget is a WARN."""
    cfg, found = page.cfg, page.rehearsal
    seconds, sample = rehearsal.evaluation_seconds(found), found.sample
    text = f"EVAL={cfg.eval} about {seconds:,.0f} s: {found.start:.1f} s to start, and {found.scoring:.1f} s for "
    times = sample.of_work / sample.work
    text += f"{sample.documents} of {sample.of:,} documents times {times:,.1f}, by computed tokens"
    if known and known.evaluation:
        text += f"; published {known.evaluation:g} s on 8 x H100"
    if 0 < cfg.eval_budget_seconds < seconds:
        fix = "fewer TTT_LORA_SITES, a lower TTT_LORA_RANK, TTT_CONTEXT=carry, or more GPUs"
        return Finding(WARN, f"{text}; the budget is {cfg.eval_budget_seconds:g} s", fix)
    return Finding(OK, text)


def check_cost(page: Page) -> Finding:
    """Seconds and dollars of one run."""
    cfg, found = page.cfg, page.rehearsal
    parts = {
        "warm-up": rehearsal.warm_up_seconds(cfg, found),
        "training": rehearsal.training_seconds(cfg, found),
        "quantisation": found.quantisation,
        "evaluation": rehearsal.evaluation_seconds(found),
    }
    seconds = sum(parts.values())
    listed = " + ".join(f"{value:,.0f} s {name}" for name, value in parts.items())
    return Finding(OK, f"${page.price * seconds / 3600:,.2f} a run: {listed} at ${page.price:g} an hour")


# +---------------------------------------------------------------------------+
# | THE PAGE                                                                  |
# +---------------------------------------------------------------------------+


class Row(NamedTuple):
    """A check: its name, what of WHY it needs, and the function."""

    name: str
    needs: str
    check: Callable[[Page], Finding]
    fix: str = "the check itself failed"  # when it raises


NO_SMI = "see what nvidia-smi says by itself; the driver may need a restart"
NO_GLOO = "localhost must resolve; GLOO_SOCKET_IFNAME=lo may help"
NO_NCCL = "NCCL_DEBUG=INFO says why; NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 may help"
# In the order of the page. "cards" comes before whatever puts a context of this process on a card.
ROWS = (
    Row("python", "", check_python),
    Row("driver", "smi", lambda page: judge_driver(smi("driver_version")[0]["driver_version"]), NO_SMI),
    Row("cards", "smi", check_cards, NO_SMI),
    Row("torch", "", check_torch, NO_SMI),
    Row("triton", "", check_triton, "pip install -r requirements.txt"),
    Row("compressor", "", check_compressor),
    Row("host", "", check_host),
    Row("disk", "", check_disk, "name a folder that can be written with --room"),
    Row("data", "", check_data),
    Row("ports", "", check_ports),
    Row("ranks", "", lambda page: judge_reduce("gloo", all_reduce("gloo", 2)), NO_GLOO),
    Row("nccl", "gpus", lambda page: judge_reduce("NCCL", all_reduce("nccl", torch.cuda.device_count())), NO_NCCL),
    Row("attention", "gpu", check_attention),
    Row("kernels", "gpu", lambda page: judge_kernels(kernel_errors(torch.device("cuda")))),
    Row("bandwidth", "gpu", check_bandwidth, "is the card free? see cards"),
    Row("matmul", "gpu", check_matmul, "is the card free? see cards"),
    Row("clocks", "gpu smi", check_clocks),
    Row("steps", "preset data", check_steps),
    Row("budget", "preset data steps", lambda page: judge_budget(page, rehearsal.published(page.preset))),
    Row("warm-up", "preset data steps", check_warm_up),
    Row("calibration", "preset data steps", lambda page: judge_calibration(page.cfg, page.rehearsal)),
    Row("memory", "gpu preset data steps", lambda page: judge_peak(page.rehearsal.peak_mib, card_mib())),
    Row("evaluation", "preset data steps", lambda page: judge_evaluation(page, rehearsal.published(page.preset))),
    Row("cost", "price preset data steps", check_cost),
)


def examine(row: Row, page: Page) -> Finding:
    """Run one check. Whatever it raises is its finding."""
    missing = [need for need in row.needs.split() if need not in page.have]
    if missing:
        return Finding(NOT_HERE, WHY[missing[0]])
    try:
        return row.check(page)
    except Exception as error:  # one check must not end the page
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return Finding(FAIL, kind + train_gpt.first_line(error), row.fix)


def line_of(name: str, finding: Finding) -> str:
    """Return the page's line."""
    fix = f"  -> {finding.fix}" if finding.fix else ""
    return f"{finding.status:8}  {name:11}  {finding.found}{fix}"


def print_page(page: Page, rows: Iterable[Row], show: Callable[[str], object]) -> dict[str, Any]:
    """Run the checks, show each line when it is known, and return the page as JSON holds it."""
    began, checks = time.perf_counter(), []
    for row in rows:
        finding = examine(row, page)
        checks.append({"name": row.name, **finding._asdict()})
        show(line_of(row.name, finding))
    counts = {status: sum(check["status"] == status for check in checks) for status in (OK, WARN, FAIL, NOT_HERE)}
    seconds = time.perf_counter() - began
    show(", ".join(f"{count} {status}" for status, count in counts.items()) + f"; {seconds:.0f} s")
    found = page.rehearsal
    measured = found and found._asdict() | {"sample": found.sample._asdict()}
    # JSON has no NaN
    measured = measured and {name: None if value != value else value for name, value in measured.items()}
    return {"preset": page.preset, "ranks": page.ranks, "checks": checks, "counts": counts, "steps": measured}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are the user's, in one line."""

    def error(self, message: str) -> None:
        """UserError instead of the usage."""
        raise UserError(f"{message}; --help says more")


def dollars(word: str) -> float:
    """Return a price from 0 up."""
    value = float(word)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{word} is no price")
    return value


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line. UserError for a wrong one."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="data folder (default: DATA_PATH, as for train_gpt.py)")
    add("--preset", type=Path, metavar="P", help="record folder: run twenty steps of it")
    add("--price", type=dollars, metavar="DOLLARS", help="dollars an hour for the machine")
    add("--ranks", type=at_least(1), metavar="N", help="processes for the twenty steps (default: one a GPU)")
    add("--room", type=Path, default=Path("logs"), metavar="DIR", help="where runs are written (default logs)")
    add("--disk-mib", type=at_least(1), default=256, metavar="N", help="what the disk check writes (default 256)")
    add("--json", action="store_true", help="print nothing but the JSON object")
    add("--out", type=Path, metavar="FILE", help="write the JSON object there")
    add("--as-rank", choices=("gloo", "nccl"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def open_page(args: argparse.Namespace) -> Page:
    """Resolve what the page is about. UserError for knobs, preset or ranks that cannot be."""
    preset = str(args.preset or "")
    knobs = rehearsal.user_environment() | {"PRESET": preset}
    knobs |= {"DATA_PATH": str(args.data)} if args.data else {}
    cfg = train_gpt.load_config(knobs)
    cards = torch.cuda.device_count() if cfg.device != "cpu" and torch.cuda.is_available() else 0
    ranks = args.ranks or max(1, cards)
    if cards and ranks > cards:
        raise UserError(f"--ranks {ranks}: there are {cards} GPUs; give at most so many")
    if preset and cfg.batch_slices % ranks:
        raise UserError(f"--ranks {ranks} does not divide BATCH_SLICES={cfg.batch_slices}; change one of them")
    present = {
        "smi": shutil.which("nvidia-smi"),
        "gpu": cards,
        "gpus": cards > 1,
        "preset": preset,
        "price": args.price is not None,
    }
    named = args.data is not None or "DATA_PATH" in knobs
    have = {name for name, there in present.items() if there}
    return Page(cfg, args.room, preset, ranks, args.price, args.disk_mib, named, have)


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status."""
    try:
        args = parse(argv)
        if args.as_rank:
            return reduce_as_rank(args.as_rank)
        if args.out and not args.out.absolute().parent.is_dir():
            # now, and not after the twenty steps
            raise UserError(f"--out {args.out}: there is no folder {args.out.parent}; make it first")
        page = open_page(args)
        found = print_page(page, ROWS, (lambda line: None) if args.json else lambda line: print(line, flush=True))
        text = json.dumps(found)
        if args.out:
            train_gpt.atomic_write(args.out, text.encode() + b"\n")
        elif args.json:
            print(text)
        else:
            print(f"DOCTOR {text}")
    except (UserError, OSError) as error:
        print(f"error: {error}".replace("\n", "; "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130
    return int(found["counts"][FAIL] > 0)


if __name__ == "__main__":
    main_begins()
    for number in (signal.SIGTERM, signal.SIGHUP):
        # like Ctrl-C, which ends the twenty steps and removes their folder; nohup and torchrun's ranks keep their own
        if "--as-rank" not in sys.argv and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
