"""Twenty real steps of a preset, and what they say about the whole run: records/doctor.py asks for it.

`rehearse` runs the program as a user does, all its stages, in a folder of its own, on the user's training shards and a
sample of whole validation documents. `Rehearsal` holds what was measured; the functions below it project. Nothing here
judges: that is the doctor's part.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import prepare  # noqa: E402  (data/ is not a package)

import train_gpt  # noqa: E402
from records import papers  # noqa: E402
from records.black_box import TIME_LIMIT  # noqa: E402
from train_gpt import Config, UserError  # noqa: E402

STEPS = 20
WARM_UP = 2  # steps for each graph before the clock: the first compiles, the second lets the allocator settle
GRACE = 45  # seconds from SIGTERM to SIGKILL: torchrun needs 30 to end its ranks
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class Published(NamedTuple):
    """What is known of a system's run on 8xH100 SXM: steps within the budget, and seconds of its final evaluation."""

    steps: float
    evaluation: float | None
    before: float | None = None  # milliseconds of a step before looping, or of every step
    looped: float | None = None  # milliseconds of a step with looping


# By record folder. Means over the published seeds, from the logs that came with each system.
PUBLISHED = {
    "2026-05-01_Tilt_PR2135": Published(4994, 558.1),
    # its evaluation: the mean of two seeds; reading the artifact and compiling are not in it
    "2026-04-29_CaseOps_PhasedTTT_PR1934": Published(4980, 519.5, 95.0, 139.8),
    "2026-04-28_CaseOps_PerDocTTT_PR1915": Published(4974, None, 94.9, 140.1),
    "2026-04-28_GDN_Hybrid_PR1895": Published(4350, 295.2, 109.0, 162.7),
    "2026-03-30_SLOT_TTT_PR1150": Published(7123, 664.7, 84.3),
    "2026-03-31_XSA7_Ngram_TTT_PR1182": Published(6438, 580.0, 92.5),
}


def published(preset: str) -> Published | None:
    """Return what is known of a preset, or of its BASE."""
    names = [Path(folder).resolve().name for folder in reversed(train_gpt.preset_layers(preset))]
    return next((PUBLISHED[name] for name in names if name in PUBLISHED), None)


# +---------------------------------------------------------------------------+
# | PROCESSES                                                                 |
# +---------------------------------------------------------------------------+


def last_line(output: str) -> str:
    """Return the line of an output that says why it ended: the last error, else the last line."""
    lines = [re.sub(r"^\[rank\d+\]:\s*", "", line.strip()) for line in output.splitlines() if line.strip()]
    # torchrun's own report comes after the error that it reports
    errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception)\b", line)]
    return (errors[:1] or lines[-1:] or ["no output"])[0][:300]


def stop_group(process: subprocess.Popen) -> None:
    """End a process and its group. torchrun's workers have sessions of their own, and only torchrun ends them."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return


def run_group(command: list[str], env: Mapping[str, str], seconds: float) -> str:
    """Run a command and return what it printed. UserError if it fails or takes longer; nothing of it stays behind."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "text": True}
    # a group of its own, so that Ctrl-C reaches this process first and ends the whole group
    with subprocess.Popen(command, env=env, start_new_session=True, errors="replace", **options) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except BaseException as error:
            stop_group(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise UserError(f"no end after {seconds:.0f} s") from None
            raise
    if process.returncode:
        raise UserError(f"exit status {process.returncode}: {last_line(output)}")
    return output


def launched(script: Path, ranks: int, *args: str) -> list[str]:
    """Return the command that starts a script on some ranks, as a user would."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *torchrun, str(script), *args]


def user_environment() -> dict[str, str]:
    """Return this process's environment without a launcher's variables."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER}


# +---------------------------------------------------------------------------+
# | SAMPLE OF THE VALIDATION STREAM                                           |
# +---------------------------------------------------------------------------+


def window_tokens(cfg: Config, predictions: np.ndarray) -> np.ndarray:
    """Return the tokens that TTT_CONTEXT=recompute computes for documents with so many predictions."""
    sizes = np.array([train_gpt.up_to(cfg.ttt_chunk_size, length) for length in predictions + 1])
    chunks = -(-predictions // sizes)
    # windows grow by a chunk until they are full
    growing = np.minimum(chunks, cfg.ttt_eval_seq_len // sizes)
    return sizes * growing * (growing + 1) // 2 + (chunks - growing) * cfg.ttt_eval_seq_len


COMPUTED = {"recompute": window_tokens, "carry": lambda cfg, predictions: predictions}  # by TTT_CONTEXT


def work(cfg: Config, predictions: np.ndarray) -> np.ndarray:
    """Return how much each document costs the final evaluation, in tokens computed; all documents alike count."""
    return COMPUTED[cfg.ttt_context](cfg, predictions) if "lora" in cfg.eval else predictions


def pick(cfg: Config, docs: list[tuple[int, int]], ranks: int) -> list[int]:
    """Return documents for a short evaluation: two whole batches a rank that divide the work evenly, or, where weights
    adapt over the stream, its first documents up to a few chunks a rank."""
    lengths = np.array([length for _, length in docs])
    if "lora" not in cfg.eval:
        wanted = ranks * max(2 * cfg.ttt_chunk_tokens, cfg.val_batch_tokens // cfg.batch_slices)
        return list(range(int(np.searchsorted(np.cumsum(lengths), wanted)) + 1))[: len(docs)]
    groups = train_gpt.document_batches(docs, cfg.ttt_batch_size)
    # the longest documents would take minutes, and a token of theirs costs no more than that of a full window
    short = [group for group in groups if lengths[group].max() <= 4 * cfg.ttt_eval_seq_len] or groups[-1:]
    reached = np.cumsum([work(cfg, lengths[group] - 1).sum() for group in short])
    quantiles = (np.arange(2 * ranks) + 0.5) / (2 * ranks)
    chosen = np.unique(np.searchsorted(reached, quantiles * reached[-1]))
    return sorted(document for index in chosen for document in short[index])


class Sample(NamedTuple):
    """A part of the validation stream: its documents and all of them, and their work."""

    documents: int
    of: int
    work: int
    of_work: int


def write_sample(folder: Path, cfg: Config, ranks: int) -> Sample:
    """Fill a data folder: sampled validation documents with their bytes, the same training shards and tokenizer."""
    source = Path(cfg.data_path)
    linked = {path.name: path for path in source.glob("fineweb_train_*.bin")}
    if tokenizer := train_gpt.find_tokenizer(cfg):
        # the program looks for *.model; TOKENIZER_PATH may have any name
        linked[tokenizer.name if tokenizer.suffix == ".model" else "tokenizer.model"] = tokenizer
    for name, path in linked.items():
        (folder / name).symlink_to(path.resolve())
    parts = {
        kind: [train_gpt.read_shard(path) for path in train_gpt.list_shards(cfg.data_path, kind)]
        for kind in ("val", "val_bytes")
    }
    tokens = np.concatenate(parts["val"])
    docs = train_gpt.val_documents(tokens)
    chosen = pick(cfg, docs, ranks)
    # a document's length counts the BOS after it, which is the next one's
    edges = [start for start, _ in docs] + [len(tokens)]
    where = np.concatenate([np.arange(edges[i], edges[i + 1]) for i in chosen])
    for kind, values in parts.items():
        if values:
            prepare.write_shard(folder / f"fineweb_{kind}_000000.bin", np.concatenate(values)[where])
    costs = work(cfg, np.array([length for _, length in docs]) - 1)
    return Sample(len(chosen), len(docs), int(costs[chosen].sum()), int(costs.sum()))


# +---------------------------------------------------------------------------+
# | TWENTY STEPS                                                              |
# +---------------------------------------------------------------------------+


class Rehearsal(NamedTuple):
    """What twenty steps showed. Seconds, except for the steps themselves; sample: what was evaluated."""

    before_ms: float  # a step before looping; NaN if every step loops
    looped_ms: float  # a step with looping; NaN without any
    warm_up: float  # compilation of the training graphs, with WARM_UP steps each
    calibration: float  # Hessians and the fit of hints, inside the training budget
    quantisation: float
    start: float  # of the final evaluation: reading the artifact, compiling
    scoring: float  # of the sample
    sample: Sample
    peak_mib: int | None  # of the allocator over all stages, on a GPU
    wall: float


def pace(rows: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """Return milliseconds of a step (before looping, with it) from the rows of metrics.jsonl; NaN where none ran.

    A row's clock is read while the device still computes its step, so the time to the next row is that of the step.
    """
    steps = [row for row in rows if "train_loss" in row]
    found: dict[bool, list[float]] = {False: [], True: []}
    for row, after in zip(steps[1:], steps[2:], strict=False):
        if row["looping"] == after["looping"]:
            found[row["looping"]].append(1e3 * (after["seconds"] - row["seconds"]))
    medians = [statistics.median(times) if times else float("nan") for times in found.values()]
    return medians[0], medians[1]


def knobs_of(cfg: Config, sample: Sample, data: Path, folder: Path) -> dict[str, str]:
    """Return the knobs of a rehearsal: few steps, each logged, both routes, every document of the sample."""
    mixed = 0 < cfg.enable_looping_at < 1
    prefix = max(cfg.phased_ttt_num_phases, round(cfg.phased_ttt_prefix_docs * sample.documents / sample.of))
    return {
        "ITERATIONS": str(STEPS),
        "MAX_WALLCLOCK_SECONDS": "0",
        "ENABLE_LOOPING_AT": "0.5" if mixed else str(cfg.enable_looping_at),
        "WARMUP_STEPS": str(WARM_UP),
        "TRAIN_SEQ_SCHEDULE": "none",  # the last and longest span
        "WARMDOWN_ITERS": str(min(cfg.warmdown_iters, STEPS // 4)),
        "SWA_EVERY": "1",
        "TRAIN_LOG_EVERY": "1",
        "VAL_LOSS_EVERY": "0",
        "EVAL_BUDGET_SECONDS": "0",
        "EVAL_INCLUDE_TAIL": "1",
        "PHASED_TTT_PREFIX_DOCS": str(prefix if cfg.phased_ttt_prefix_docs else 0),
        "STAGES": "train,quantize,eval",
        "DATA_PATH": str(data),
        "TOKENIZER_PATH": "",
        "ARTIFACT_DIR": str(folder),
        "MODEL_PATH": "",
        "SCORES": "",
        "CHECKPOINT_SECONDS": "0",
        "MILESTONES": "none",
    }


def said(pattern: str, log: str) -> float:
    """Return the number that a pattern finds in a log, which must have it."""
    found = re.search(pattern, log)
    if found is None:
        raise UserError(
            f"the log of twenty steps has no line {pattern!r}; doctor.py and train_gpt.py do not fit together"
        )
    return float(found[1])


def read_rehearsal(folder: Path, sample: Sample, wall: float) -> Rehearsal:
    """Read what the run left in its folder."""
    log, (rows, _) = papers.read_log(folder / "log.txt"), papers.read_metrics(folder / "metrics.jsonl")
    result = log.result
    before, looped = pace(rows)
    scoring = result["stages"]["final"]["seconds"]
    return Rehearsal(
        before_ms=before,
        looped_ms=looped,
        warm_up=said(r"rolled back, ([\d.]+) s outside the clock", log.text),
        calibration=said(r"calibration: ([\d.]+) s", log.text) + result.get("fit_seconds", 0.0),
        quantisation=said(r"artifact: [\d,]+ bytes \(\w+\), ([\d.]+) s", log.text),
        start=max(0.0, result["eval_seconds"] - scoring),
        scoring=scoring,
        sample=sample,
        peak_mib=result.get("peak_memory_mib"),
        wall=wall,
    )


@contextlib.contextmanager
def scratch(room: Path) -> Iterator[Path]:
    """Make a folder in a folder, and remove it with all that a run left."""
    room.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="doctor_", dir=room))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def rehearse(preset: str, cfg: Config, ranks: int, room: Path) -> Rehearsal:
    """Run twenty steps of a preset and its last stages on a sample. UserError with the program's own words if it fails.

    Compiled graphs are made from nothing, as on a new machine.
    """
    with scratch(room) as place:
        (data := place / "data").mkdir()
        sample = write_sample(data, cfg, ranks)
        env = user_environment() | knobs_of(cfg, sample, data, place / "run")
        env |= {"PRESET": preset, "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"), "PYTHONUNBUFFERED": "1"}
        began = time.perf_counter()
        run_group(launched(ROOT / "train_gpt.py", ranks), env, TIME_LIMIT)
        return read_rehearsal(place / "run", sample, time.perf_counter() - began)


# +---------------------------------------------------------------------------+
# | PROJECTIONS                                                               |
# +---------------------------------------------------------------------------+


def step_share(cfg: Config) -> float:
    """Return the fraction of the run before looping."""
    return cfg.enable_looping_at if train_gpt.loops(cfg) else 1.0


def part(share: float, value: float) -> float:
    """Return share times value; a share of nothing is nothing, whatever the value."""
    return share * value if share else 0.0


def steps_in(cfg: Config, found: Rehearsal) -> float:
    """Return the steps that fit into the training budget: schedules follow the clock, so looping begins by time."""
    seconds = cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds
    share = step_share(cfg)
    steps = 1e3 * seconds * (part(share, 1 / found.before_ms) + part(1 - share, 1 / found.looped_ms))
    return min(steps, cfg.iterations)


def training_seconds(cfg: Config, found: Rehearsal) -> float:
    """Return the seconds of training with calibration: the budget, or that of ITERATIONS where no budget is set."""
    if cfg.max_wallclock_seconds > 0 and steps_in(cfg, found) < cfg.iterations:
        return cfg.max_wallclock_seconds
    share = step_share(cfg)
    step = part(share, found.before_ms) + part(1 - share, found.looped_ms)
    return cfg.iterations * step / 1e3 + found.calibration


def warm_up_seconds(cfg: Config, found: Rehearsal) -> float:
    """Return the seconds before the clock starts, with WARMUP_STEPS for each graph."""
    graphs = train_gpt.graphs_of(cfg)
    times = [found.looped_ms if looping else found.before_ms for _, looping in graphs]
    # spans of TRAIN_SEQ_SCHEDULE have graphs of their own, which the rehearsal did not compile
    measured = len({looping for _, looping in graphs})
    longer = sum(times) / 1e3 * max(0, cfg.warmup_steps - WARM_UP)
    return found.warm_up * len(graphs) / measured + longer


def evaluation_seconds(found: Rehearsal) -> float:
    """Return the seconds of the whole final evaluation on as many ranks: what it costs to start, and the sample's
    scoring scaled by the tokens that all documents make the program compute."""
    return found.start + found.scoring * found.sample.of_work / found.sample.work
