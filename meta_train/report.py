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
from rich import box
from rich.table import Table

from .benchmark import REFERENCE, Result, speed_up

_COLOURS = {"adam": "#3b6fb6", "adam@0.001": "#9bb8dd", "adamw-cosine": "#e08e2b"}
_CAPTION = """\
Above: how far the training loss came down, tuned Adam's way being 1.
Below: in how many times fewer steps it reached tuned Adam's best loss.
NAME: at the best of a grid of learning rates; NAME@RATE: at that one."""
_LEARNED_COLOURS = ("#b5202e", "#2e8b57", "#7b4fa3", "#8c6d46", "#d46a9f")


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The benchmark's figures, one dict for each task and contender, tasks where learned rules do worst first.

    Args:
        results: from :func:`meta_train.benchmark.run_suite`.

    Returns:
        Dicts of JSON values. ``progress`` is how far the training loss came down, tuned Adam's way being 1:
        ``(initial - final) / (initial - Adam's final)``. ``speed_up`` is how many times fewer steps than tuned Adam the
        best loss of tuned Adam takes; 0 where it is not reached.
    """
    table = []
    for result in results:
        reference = _reference(results, result.task)
        table.append(
            {
                "task": result.task,
                "contender": result.contender,
                "baseline": result.baseline,
                "learning_rate": result.learning_rate,
                "on_grid_edge": bool(result.on_edge),
                "final_loss": _number(float(np.mean(result.final))),
                "final_loss_stderr": _number(_stderr(result.final)),
                "valid_loss": _number(float(np.mean(result.valid))),
                "valid_loss_stderr": _number(_stderr(result.valid)),
                "initial_loss": _number(result.initial),
                "progress": None if reference is None else _number(_progress(result, reference)),
                "speed_up": None if reference is None else _number(speed_up(result.curve, reference.curve)),
                "diverged": result.diverged,
                "seeds": len(result.final),
            }
        )
    return sorted(table, key=lambda row: -_worst(table, row["task"]))


def table(figures: Sequence[dict[str, Any]], title: str) -> Table:
    """The figures as a table for the terminal: a task a row, progress and speed-up.

    Args:
        figures: from :func:`rows`.
        title: the table's.

    Returns:
        A Rich table.
    """
    contenders = list(dict.fromkeys(row["contender"] for row in figures))
    shown = Table(title=title, caption=_CAPTION, box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    shown.add_column("task", overflow="fold")
    for name in contenders:
        shown.add_column(name, justify="right", overflow="fold")
    for task in dict.fromkeys(row["task"] for row in figures):
        by_name = {row["contender"]: row for row in figures if row["task"] == task}
        shown.add_row(task.replace("/", "/\n"), *(_cell(by_name.get(name)) for name in contenders))
    shown.add_section()
    shown.add_row("median", *(_median(figures, name) for name in contenders))
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
        panels = iter(figure.subplots(lines, columns, squeeze=False).flat)
        for task in tasks:
            panel = next(panels)
            for result in (r for r in results if r.task == task):
                width = 2.2 if result.contender in ours else 1.3
                panel.plot(result.curve, label=result.contender, color=colours[result.contender], linewidth=width)
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
    progress = "diverged" if row["progress"] is None else f"{row['progress']:.3f}"
    return f"{progress}\n{_times(row['speed_up'])}"


def _times(speed_up: float | None) -> str:
    return f"{speed_up:.2f}x" if speed_up else "–"


def _reference(results: Sequence[Result], task: str) -> Result | None:
    return next((r for r in results if r.task == task and r.contender == REFERENCE), None)


def _progress(result: Result, reference: Result) -> float:
    way = reference.initial - float(np.mean(reference.final))
    return (result.initial - float(np.mean(result.final))) / way if way > 0 else math.nan


def _worst(table: Sequence[dict[str, Any]], task: str) -> float:
    """How little progress the worst learned rule made on the task; the less, the larger."""
    ours = [row["progress"] for row in table if row["task"] == task and not row["baseline"]]
    return max((math.inf if value is None else -value for value in ours), default=0.0)


def _median(figures: Sequence[dict[str, Any]], name: str) -> str:
    mine = [row for row in figures if row["contender"] == name]
    progress = [-math.inf if row["progress"] is None else row["progress"] for row in mine]
    return f"{np.median(progress):.3f}\n{_times(float(np.median([row['speed_up'] or 0 for row in mine])))}"


def _stderr(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _number(value: float) -> float | None:
    """A JSON number; ``None`` for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _replace(path: Path, contents: bytes) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(contents)
    os.replace(beside, path)
