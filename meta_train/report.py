"""What a benchmark shows: a table on the terminal, CSV and JSON files, a plot of the curves."""

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from .benchmark import REFERENCE, Result, speed_up

_COLOURS = {"adam-tuned": "#3b6fb6", "adam@0.001": "#9bb8dd", "adamw-cosine-tuned": "#e08e2b"}
_LEARNED_COLOURS = ("#b5202e", "#2e8b57", "#7b4fa3", "#8c6d46", "#d46a9f")


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The benchmark's figures, one dict for each task and contender, tasks where learned rules do worst first.

    Args:
        results: from :func:`meta_train.benchmark.run_suite`.

    Returns:
        Dicts of JSON values. ``relative`` is the final training loss over tuned Adam's, ``speed_up`` how many times
        fewer steps than tuned Adam the best loss of tuned Adam takes; 0 where it is not reached.
    """
    table = []
    for result in results:
        reference = _reference(results, result.task)
        final = float(np.mean(result.final))
        table.append(
            {
                "task": result.task,
                "contender": result.contender,
                "baseline": result.baseline,
                "learning_rate": result.learning_rate,
                "on_grid_edge": bool(result.on_edge),
                "final_loss": _number(final),
                "final_loss_stderr": _number(_stderr(result.final)),
                "valid_loss": _number(float(np.mean(result.valid))),
                "valid_loss_stderr": _number(_stderr(result.valid)),
                "relative": None if reference is None else _number(final / float(np.mean(reference.final))),
                "speed_up": None if reference is None else _number(speed_up(result.curve, reference.curve)),
                "diverged": result.diverged,
                "seeds": len(result.final),
            }
        )
    return sorted(table, key=lambda row: -_worst(table, row["task"]))


def table(figures: Sequence[dict[str, Any]], title: str) -> Table:
    """The figures as a table for the terminal: a task a row, final loss relative to tuned Adam and the speed-up.

    Args:
        figures: from :func:`rows`.
        title: the table's.

    Returns:
        A Rich table.
    """
    contenders = list(dict.fromkeys(row["contender"] for row in figures))
    shown = Table(title=title, caption="final training loss over tuned Adam's (speed-up in steps to Adam's best loss)")
    shown.add_column("task")
    for name in contenders:
        shown.add_column(name, justify="right")
    for task in dict.fromkeys(row["task"] for row in figures):
        by_name = {row["contender"]: row for row in figures if row["task"] == task}
        shown.add_row(task, *(_cell(by_name.get(name)) for name in contenders))
    means = [_geometric_mean([row["relative"] for row in figures if row["contender"] == name]) for name in contenders]
    shown.add_section()
    shown.add_row("geometric mean", *("–" if mean is None else f"{mean:.3f}" for mean in means))
    return shown


def write(folder: Path, results: Sequence[Result], about: dict[str, Any]) -> list[dict[str, Any]]:
    """Writes ``results.csv``, ``results.json`` and ``curves.png``, each whole or not at all.

    Args:
        folder: made if it is not there.
        results: from :func:`meta_train.benchmark.run_suite`.
        about: what was run, JSON values, for ``results.json``.

    Returns:
        The figures of :func:`rows`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = rows(results)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(figures[0]) if figures else [])
    writer.writeheader()
    writer.writerows(figures)
    _replace(folder / "results.csv", text.getvalue().encode())
    document = {"about": about, "figures": figures}
    _replace(folder / "results.json", (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    _replace(folder / "curves.png", plot(results))
    return figures


def plot(results: Sequence[Result]) -> bytes:
    """The smoothed training losses, one panel a task.

    Args:
        results: from :func:`meta_train.benchmark.run_suite`.

    Returns:
        The bytes of a PNG file.
    """
    tasks = list(dict.fromkeys(result.task for result in results))
    columns = min(3, max(len(tasks), 1))
    lines = math.ceil(len(tasks) / columns)
    names = list(dict.fromkeys(result.contender for result in results))
    ours = [name for name in names if name not in _COLOURS]
    colours = _COLOURS | {name: _LEARNED_COLOURS[i % len(_LEARNED_COLOURS)] for i, name in enumerate(ours)}
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.4 * columns, 3.2 * lines + 0.6), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).flat
        for panel, task in zip(panels, tasks, strict=False):
            for result in (r for r in results if r.task == task):
                width = 2.2 if result.contender in ours else 1.3
                label = f"{result.contender}"
                panel.plot(result.curve, label=label, color=colours[result.contender], linewidth=width)
            _scale(panel, [r.curve for r in results if r.task == task])
            panel.set_title(task)
            panel.set_xlabel("step")
            panel.set_ylabel("training loss")
        for panel in panels:
            panel.axis("off")
        handles, labels = figure.axes[0].get_legend_handles_labels() if tasks else ([], [])
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6) or 1, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _scale(panel, curves: Sequence[np.ndarray]) -> None:
    """Limits that show where the curves differ; logarithmic where all is positive. A diverged curve may leave them."""
    finite = [curve[np.isfinite(curve)] for curve in curves]
    finite = [curve for curve in finite if curve.size]
    if not finite:
        return
    low = min(curve.min() for curve in finite)
    high = float(np.median([curve[0] for curve in finite]))
    if low > 0:
        panel.set_yscale("log")
        panel.set_ylim(low / 1.1, high * 1.2)
    elif high > low:
        panel.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    relative = "diverged" if row["relative"] is None else f"{row['relative']:.3f}"
    speed = "–" if not row["speed_up"] else f"{row['speed_up']:.2f}x"
    return f"{relative} ({speed})"


def _reference(results: Sequence[Result], task: str) -> Result | None:
    return next((r for r in results if r.task == task and r.contender == REFERENCE), None)


def _worst(table: Sequence[dict[str, Any]], task: str) -> float:
    """The largest relative loss of a learned rule on the task: infinite if one diverged."""
    ours = [row["relative"] for row in table if row["task"] == task and not row["baseline"]]
    return max((math.inf if value is None else value for value in ours), default=0.0)


def _geometric_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and value > 0]
    return math.exp(float(np.mean(np.log(known)))) if known and len(known) == len(values) else None


def _stderr(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _number(value: float) -> float | None:
    """A JSON number; ``None`` for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _replace(path: Path, contents: bytes) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(contents)
    os.replace(beside, path)
