"""Table and picture of a finished run.

    python records/demo/report.py RUN_DIR [--data DATA_PATH] [--out PICTURE.png]

Reads what the run and the packer left in RUN_DIR (`result.json`, `metrics.jsonl`, sizes of `model.pt` and `model.bin`),
prints one row per stage and draws three panels: the loss curve, bits per byte by stage, bytes by part. With the data
of the run it also shows where the bits are (by position in the document, by its length, by class of token) and a text
that the stored model wrote. Table and picture name the stages that the run did not reach. A file that cannot be read
gives exit status 2 and one line.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402
from pack_artifact import CAP_BYTES, print_rows, read_object  # noqa: E402
from records import sampling, token_losses  # noqa: E402
from train_gpt import UserError, atomic_write  # noqa: E402

STAGES = {"pre_quant": "float model", "quantized": "quantised", "final": "final"}
INK, MUTED, GRID = "#1f2933", "#6b7785", "#e3e7eb"
TRAIN_COLOR, VAL_COLOR, MARK_COLOR = "#4c78a8", "#d1495b", "#8a6d3b"
STAGE_COLORS = ("#9fb3c8", "#627d98", "#243b53")
SAMPLE_PROMPT, SAMPLE_TOKENS, SAMPLE_CHOICE = "The function", 150, sampling.Choice(temperature=0.8, top_p=0.95, seed=1)


@dataclass(frozen=True)
class Run:
    """What a run directory says: `result` (result.json), `steps` and `validations` (the two kinds of metrics lines)."""

    directory: Path
    result: dict[str, Any]
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    notes: list[str]

    def stage(self, name: str) -> dict[str, float] | None:
        """Scores of one stage, or None when the run did not get there."""
        scores = (self.result.get("stages") or {}).get(name)
        return scores if scores and scores.get("val_bpb") is not None else None

    def missing(self) -> list[str]:
        """Stages without a score, in running order."""
        return [name for name in STAGES if self.stage(name) is None]


def read_result(path: Path) -> dict[str, Any]:
    """The object in result.json. UserError when it is missing, no JSON object, or holds a score that is no number."""
    result = read_object(path, "result")
    check_numbers(path, result)
    return result


def check_numbers(path: Path, result: dict[str, Any]) -> None:
    """UserError for a score, time or size that is present but no number: the table would fail on it later."""
    values = {
        key: value for key, value in result.items() if key.startswith(("val_", "bytes_")) or key.endswith("_seconds")
    }
    for stage, scores in (result.get("stages") or {}).items():
        values |= {f"stages.{stage}.{key}": value for key, value in (scores or {}).items()}
    for key, value in values.items():
        if value is not None and not isinstance(value, int | float):
            raise UserError(f"{path}: {key} is {value!r}, not a number; repeat the run's last stage")


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Split metrics.jsonl into (training lines, validation lines, notes).

    A last line that an interruption cut short is left out and noted. Any other broken line is a UserError.
    """
    if not path.is_file():
        return [], [], [f"{path.name} is missing: no loss curve"]
    rows, notes = [], []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "step" not in row:
                raise ValueError("no object with a step")
            rows.append(row)
        except ValueError as problem:
            if number < len(lines):
                raise UserError(f"{path}:{number}: {problem}; remove the line or train again") from problem
            notes.append(f"{path.name}: the last line is incomplete and was left out")
    steps = [row for row in rows if "train_loss" in row]
    validations = [row for row in rows if "val_loss" in row]
    return steps, validations, notes


def read_run(directory: Path) -> Run:
    """Read everything that a run left. UserError names the file at fault."""
    result = read_result(directory / "result.json")
    steps, validations, notes = read_metrics(directory / "metrics.jsonl")
    return Run(directory, result, steps, validations, notes)


def size_of(path: Path) -> int | None:
    """Bytes on disk, or None for a file that is not there."""
    return path.stat().st_size if path.is_file() else None


def stage_bytes(run: Run, name: str) -> int | None:
    """Bytes that a stage leaves behind: float checkpoint, model blob, the whole submission."""
    if name == "pre_quant":
        return size_of(run.directory / "model.pt")
    return run.result.get("bytes_model" if name == "quantized" else "bytes_total")


def byte_parts(result: dict[str, Any]) -> dict[str, int]:
    """Bytes by part, {} when nothing was counted. Before packing, the code is the plain source; its label says so."""
    code = "code" if "artifact" in result else "code (not packed)"
    labels = {"bytes_code": code, "bytes_model": "model"}
    return {label: int(result[key]) for key, label in labels.items() if result.get(key) is not None}


def stage_label(name: str, result: dict[str, Any]) -> str:
    """Name of a stage in table and picture; the final stage is marked when its score is not legal."""
    illegal = name == "final" and result.get("legal") is False
    return STAGES[name] + (" (not legal)" if illegal else "")


def format_table(run: Run) -> str:
    """The table for the terminal, one row per stage; bpb change is against the row above."""
    head = f"{'stage':<22}{'val_loss':>10}{'val_bpb':>10}{'change':>10}{'seconds':>10}{'bytes':>14}"
    lines = [head, "-" * len(head)]
    before = None
    for name in STAGES:
        scores, size = run.stage(name), stage_bytes(run, name)
        if scores is None:
            lines.append(f"{stage_label(name, run.result):<22}{'missing':>10}")
            continue
        change = "" if before is None else f"{scores['val_bpb'] - before:+.4f}"
        loss, bpb, seconds = (scores.get(key, math.nan) for key in ("val_loss", "val_bpb", "seconds"))
        size_text = "-" if size is None else f"{size:,}"
        label = stage_label(name, run.result)
        lines.append(f"{label:<22}{loss:>10.4f}{bpb:>10.4f}{change:>10}{seconds:>10.1f}{size_text:>14}")
        before = bpb
    return "\n".join([*lines, "-" * len(head), *format_totals(run)])


def format_totals(run: Run) -> list[str]:
    """The lines under the table: time, what was scored, bytes against the cap, what is missing."""
    result, lines = run.result, []
    clocks = (("training", "train_seconds"), ("evaluation", "eval_seconds"))
    times = [f"{what} {result[key]:.1f} s" for what, key in clocks if result.get(key) is not None]
    if times:
        lines.append("time: " + ", ".join(times))
    if result.get("tokens_scored"):
        lines.append(f"scored: {result['tokens_scored']:,} tokens, {result.get('bytes_scored', 0):,} bytes of text")
    parts = byte_parts(result)
    if parts:
        total = sum(parts.values())
        listing = " + ".join(f"{label} {size:,}" for label, size in parts.items())
        verdict = "within the cap" if total <= CAP_BYTES else "OVER THE CAP"
        lines.append(f"bytes: {listing} = {total:,} of {CAP_BYTES:,} ({verdict})")
    if run.missing():
        lines.append("missing stages: " + ", ".join(run.missing()))
    return lines + [f"note: {note}" for note in run.notes]


def style_axes(ax: Axes, title: str) -> None:
    """One look for all panels: title at the left, light grid behind, no box."""
    ax.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ax.tick_params(colors=MUTED, labelsize=9)
    ax.set_axisbelow(True)


def say_missing(ax: Axes, text: str) -> None:
    """Write into an empty panel why it is empty."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, color=MUTED, fontsize=10)


def draw_loss(ax: Axes, run: Run) -> None:
    """Training loss over steps, validation points on it, and the step from which depth recurrence is on."""
    style_axes(ax, "Training")
    if not run.steps and not run.validations:
        return say_missing(ax, "no metrics.jsonl: no curve")
    curves = (
        (run.steps, "train_loss", {"color": TRAIN_COLOR, "lw": 1.5, "label": "training"}),
        (run.validations, "val_loss", {"color": VAL_COLOR, "ls": "", "marker": "o", "ms": 5, "label": "validation"}),
    )
    for rows, key, look in curves:
        ax.plot([row["step"] for row in rows], [row[key] for row in rows], **look)
    looped = [r["step"] for r in run.steps if r.get("looping")]
    if looped:
        ax.axvline(looped[0], color=MARK_COLOR, ls="--", lw=1.2, label=f"looping on by step {looped[0]:,}")
    ax.set_xlabel("step", color=INK)
    ax.set_ylabel("loss (nats per token)", color=INK)
    ax.grid(color=GRID)
    ax.legend(frameon=False, fontsize=9, labelcolor=INK)


def draw_stages(ax: Axes, run: Run) -> None:
    """Bits per byte by stage as bars from zero; differences too small to see are written above the bars."""
    style_axes(ax, "Validation by stage")
    scores = [run.stage(name) for name in STAGES]
    heights = [s["val_bpb"] if s else 0.0 for s in scores]
    if not any(scores):
        return say_missing(ax, "no stage was scored")
    ax.bar(range(len(STAGES)), heights, width=0.62, color=STAGE_COLORS)
    top, before = max(heights), None
    for place, scored in enumerate(scores):
        if scored is None:
            ax.text(place, 0.02 * top, "missing", ha="center", va="bottom", color=MUTED, fontsize=10)
            continue
        change = "" if before is None else f"\n({scored['val_bpb'] - before:+.4f})"
        ax.text(
            place,
            scored["val_bpb"] + 0.02 * top,
            f"{scored['val_bpb']:.4f}{change}",
            ha="center",
            va="bottom",
            color=INK,
            fontsize=10,
        )
        before = scored["val_bpb"]
    ax.set_ylim(0, 1.2 * top)
    ax.set_xticks(range(len(STAGES)), [stage_label(name, run.result) for name in STAGES], fontsize=10, color=INK)
    ax.set_ylabel("bits per byte (axis starts at 0)", color=INK)
    ax.grid(axis="y", color=GRID)


def draw_bytes(ax: Axes, cap_ax: Axes, run: Run) -> None:
    """Bytes by part as bars on their own scale (`ax`), and the total on the scale of the cap (`cap_ax`)."""
    style_axes(ax, "Artifact by part")
    style_axes(cap_ax, "")
    parts = byte_parts(run.result)
    if not parts:
        cap_ax.set_axis_off()
        return say_missing(ax, "no artifact was written")
    sizes = list(parts.values())
    total = sum(sizes)
    ax.barh(range(len(parts)), [size / 1e3 for size in sizes], height=0.6, color=STAGE_COLORS[: len(parts)])
    for place, size in enumerate(sizes):
        ax.text((size + 0.02 * max(sizes)) / 1e3, place, f"{size:,} B", va="center", color=INK, fontsize=10)
    ax.set_yticks(range(len(parts)), list(parts), fontsize=10, color=INK)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.35 * max(sizes) / 1e3)
    ax.set_xlabel("kB (1 kB = 1,000 bytes)", color=INK)
    ax.grid(axis="x", color=GRID)
    over = total > CAP_BYTES
    cap_ax.barh([0], [total / 1e6], height=0.6, color=VAL_COLOR if over else STAGE_COLORS[2])
    cap_ax.axvline(CAP_BYTES / 1e6, color=VAL_COLOR, lw=1.5)
    share = f"total {total:,} B: {100 * total / CAP_BYTES:.1f} % of the cap (red line)" + (" - OVER" if over else "")
    cap_ax.set_title(share, loc="left", fontsize=10, color=VAL_COLOR if over else INK)
    cap_ax.set_xlim(0, 1.06 * max(total, CAP_BYTES) / 1e6)
    cap_ax.set_yticks([])
    cap_ax.set_xlabel("MB (1 MB = 1,000,000 bytes)", color=INK)


def sample(run: Run, data: Path) -> str:
    """A text that the stored model wrote."""
    cfg = train_gpt.load_config({"PRESET": str(run.directory), "DATA_PATH": str(data)})
    tokenizer = train_gpt.find_tokenizer(cfg)
    if tokenizer is None:
        raise UserError(f"{data} has no tokenizer; put its *.model there")
    script = sampling.Script(tokenizer.read_bytes(), sampling.is_fused(data))
    model = sampling.load_model(run.directory / "model.bin", cfg)
    return "".join(sampling.stream(model, cfg, script, SAMPLE_PROMPT, SAMPLE_TOKENS, SAMPLE_CHOICE))


def draw_losses(ax: Axes, rows: token_losses.Rows, key: str, title: str) -> None:
    """Nats per token of each group of tokens, before and after test-time training; the group's share of all bits."""
    style_axes(ax, title)
    places = range(len(rows))
    for name, shift, color in (("before", -0.2, STAGE_COLORS[0]), ("after", 0.2, STAGE_COLORS[2])):
        heights = [row[name] for row in rows]
        label = f"{name} test-time training"
        ax.barh([place + shift for place in places], heights, height=0.38, color=color, label=label)
    for place, row in enumerate(rows):
        ax.text(row["after"], place + 0.2, f" {100 * row['share']:.0f} %", va="center", color=MUTED, fontsize=9)
    ax.set_yticks(places, [row[key] for row in rows], fontsize=9, color=INK)
    ax.invert_yaxis()
    ax.set_xlabel("nats per token; %: share of all bits", color=INK)
    ax.grid(axis="x", color=GRID)


def draw_where(figure: Figure, tables: dict[str, token_losses.Rows], text: str) -> None:
    """The second part of the picture: three panels of losses, and a text that the model wrote."""
    panels = (
        ("positions", "position", "Loss by position in the document"),
        ("lengths", "length", "Loss by length of the document"),
        ("classes", "class", "Loss by class of token"),
    )
    grid = figure.add_gridspec(2, 3, height_ratios=(4, 1))
    for column, (key, label, title) in enumerate(panels):
        ax = figure.add_subplot(grid[0, column])
        draw_losses(ax, tables[key], label, title)
    figure.legend(*ax.get_legend_handles_labels(), loc="upper right", ncols=2, frameon=False, labelcolor=INK)
    ax = figure.add_subplot(grid[1, :])
    style_axes(ax, "A text that the stored model wrote (temperature 0.8, top-p 0.95)")
    ax.set_axis_off()
    # what the font lacks would be a warning for every letter
    shown = textwrap.fill(" ".join(text.split()), 190).encode("latin-1", "replace").decode("latin-1")
    ax.text(0, 1, shown.replace("$", r"\$"), va="top", family="monospace", fontsize=8, color=INK)


def draw(run: Run, out: Path, tables: dict[str, token_losses.Rows] | None = None, text: str = "") -> None:
    """Write the picture to `out` (PNG); a reader never sees half a file."""
    figure = Figure(figsize=(15, 10 if tables else 5), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    above = figure
    if tables:
        above, below = figure.subfigures(2, 1)
        draw_where(below, tables, text)
    grid = above.add_gridspec(2, 3, height_ratios=(3, 1), width_ratios=(1.25, 1, 1.1))
    draw_loss(above.add_subplot(grid[:, 0]), run)
    draw_stages(above.add_subplot(grid[:, 1]), run)
    draw_bytes(above.add_subplot(grid[0, 2]), above.add_subplot(grid[1, 2]), run)
    result = run.result
    score = result.get("val_bpb")
    score_text = "no final score" if score is None else f"{score:.4f} bits per byte"
    title = f"{result.get('preset') or 'run'}, seed {result.get('seed', '?')}: {score_text}"
    figure.suptitle(title, fontsize=14, color=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(out, buffer.getvalue())


def main(argv: list[str]) -> int:
    """Print the table, write the picture, return the exit status."""
    parser = argparse.ArgumentParser(description="Table and picture of a finished run.")
    parser.add_argument("run_dir", type=Path, help="directory with result.json and metrics.jsonl")
    text = "of the run, for its losses by token and a text from the model (default: DATA_PATH, else neither)"
    parser.add_argument("--data", type=Path, help=text)
    parser.add_argument("--out", type=Path, help="picture to write (default: RUN_DIR/report.png)")
    args = parser.parse_args(argv)
    out = args.out or args.run_dir / "report.png"
    data = args.data or (Path(os.environ["DATA_PATH"]) if os.environ.get("DATA_PATH") else None)
    tables, text = {}, ""
    try:
        run = read_run(args.run_dir)
        print(format_table(run))
        if data and not run.missing():
            tables, text = token_losses.measure(args.run_dir, data), sample(run, data)
            for key, rows in tables.items():
                print(f"\n{key}:")
                print_rows(rows, {next(iter(rows[0])): ""} | token_losses.FORMATS)
            print(f"\na text that the stored model wrote:\n{textwrap.indent(textwrap.fill(text, 110), '  ')}")
        draw(run, out, tables, text)
    except (UserError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print(f"picture: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
