"""What a benchmark shows: tables on the terminal, CSV and JSON files, a plot of the curves."""

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Group
from rich.table import Table

from . import measures
from .benchmark import Result
from .contenders import REFERENCE

_COLOURS = {"adam": "#3b6fb6", "adam@0.001": "#9bb8dd", "adamw-cosine": "#e08e2b"}
_LEARNED_COLOURS = ("#b5202e", "#2e8b57", "#7b4fa3", "#8c6d46", "#d46a9f", "#17a2a2", "#7d8a1f", "#3d3d3d")
_OVER_TASKS = """\
Over all tasks: interquartile means, with 95% intervals over tasks and seeds.
loss: how far the training loss came down, tuned Adam's way being 1. ≥ Adam: on
how many tasks at least as far. steps, time: in how many times fewer steps, and
how many times faster by the clock, tuned Adam's best loss was reached; 0 where
never. score: area under the performance profile in steps, 1 is best.
NAME: at the best of a grid of learning rates; NAME@RATE: at that one."""
_BY_TASK = "By task: loss and, below it, steps. Where learned rules do worst comes first."


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The benchmark's figures, one dict for each task and contender, tasks where learned rules do worst first.

    Args:
        results: from :func:`meta_train.benchmark.run_suite`.

    Returns:
        Dicts of JSON values. ``progress`` is the normalised final loss, how far the training loss came down, tuned
        Adam's way being 1: ``(initial - final) / (initial - Adam's final)``, of means over the seeds. ``speed_up`` is
        in how many times fewer steps than tuned Adam the best loss of tuned Adam is reached, the median over the seeds;
        0 where it is not reached. ``speed_up_time`` is the same by the clock.
    """
    table = []
    for result in results:
        timing = result.timing
        table.append(
            {
                "task": result.task,
                "contender": result.contender,
                "baseline": result.baseline,
                "learning_rate": _number(result.learning_rate),
                "on_grid_edge": bool(result.on_edge),
                "final_loss": _number(float(np.mean(result.final))),
                "final_loss_stderr": _number(_stderr(result.final)),
                "valid_loss": _number(float(np.mean(result.valid))),
                "valid_loss_stderr": _number(_stderr(result.valid)),
                "initial_loss": _number(float(np.mean(result.initial))),
                **_relative(result, reference_of(results, result.task)),
                "diverged": result.diverged,
                "seeds": len(result.final),
                "milliseconds": None if timing is None else _number(timing.step),
                "gradient_milliseconds": None if timing is None else _number(timing.gradient),
                "state_bytes": result.state_bytes,
                "num_params": result.num_params,
            }
        )
    return sorted(table, key=lambda row: _worst(table, row["task"]))


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One dict of JSON values for each contender, over all tasks, best score first.

    Args:
        results: from :func:`meta_train.benchmark.run_suite`; the reference must be among them.

    Returns:
        Dicts. ``loss``, ``steps`` and ``time`` are ``[interquartile mean, low, high]``; ``at_least_adam`` is the share
        of tasks whose ``progress`` is at least 1; ``score`` and ``score_time`` are areas under the performance
        profiles; ``worst`` is the task with the least progress and that.
    """
    tasks, names = _names(results)
    figures = {(row["task"], row["contender"]): row for row in rows(results)}
    found = {(result.task, result.contender): result for result in results}
    ratios = profiles(results)
    scores = dict(zip(names, measures.profile_scores(ratios), strict=True))
    timed = all(result.timing for result in results)
    by_clock = dict(zip(names, measures.profile_scores(profiles(results, by_clock=True)), strict=True)) if timed else {}
    table = []
    for name in names:
        mine = [found[task, name] for task in tasks]
        theirs = [found[task, REFERENCE] for task in tasks]
        pairs = list(zip(mine, theirs, strict=True))
        loss = [_per_seed(own, reference) for own, reference in pairs]
        steps = np.stack([measures.speed_ups(own.curves, reference.curves) for own, reference in pairs])
        progress = {task: figures[task, name]["progress"] for task in tasks}
        worst = min(tasks, key=lambda task: -math.inf if progress[task] is None else progress[task])
        entry = {
            "contender": name,
            "baseline": mine[0].baseline,
            "loss": _interval(np.stack(loss)),
            "at_least_adam": _number(float(np.mean([value is not None and value >= 1 for value in progress.values()]))),
            "steps": _interval(steps),
            "score": _number(scores[name]),
            "worst": [worst, progress[worst]],
            "diverged": sum(result.diverged for result in mine),
            "runs": sum(len(result.final) for result in mine),
            "state_bytes_per_param": _number(float(np.mean([r.state_bytes / max(r.num_params, 1) for r in mine]))),
        }
        if timed:
            slower = np.array([_slower(result) for result in mine])
            entry["time"] = _interval(steps / slower[:, None])
            entry["score_time"] = _number(by_clock[name])
            entry["step_time"] = _number(float(np.exp(np.mean(np.log(slower)))))  # geometric mean, Adam's being 1
        table.append(entry)
    return sorted(table, key=lambda row: -row["score"])


def profiles(results: Sequence[Result], by_clock: bool = False) -> np.ndarray:
    """The corners of all performance profiles.

    Args:
        results: from :func:`meta_train.benchmark.run_suite`.
        by_clock: by the time that the steps take, and not by their number.

    Returns:
        ``[contenders, tasks]`` as :func:`meta_train.measures.profile`, contenders in the order of the results. A task's
        target is tuned Adam's best loss; the time to it is the median over seeds.
    """
    tasks, names = _names(results)
    found = {(result.task, result.contender): result for result in results}
    matrix = np.full((len(names), len(tasks)), np.inf)
    for column, task in enumerate(tasks):
        targets = measures.envelope(found[task, REFERENCE].curves)[:, -1]
        for line, name in enumerate(names):
            cost = _slower(found[task, name]) if by_clock else 1.0
            matrix[line, column] = cost * np.median(measures.steps_to(found[task, name].curves, targets))
    return measures.profile(matrix)


def tables(figures: Sequence[dict[str, Any]], overview: Sequence[dict[str, Any]], title: str) -> Group:
    """The figures for the terminal: over all tasks, a contender a row; then the learned rules by task.

    Args:
        figures: from :func:`rows`.
        overview: from :func:`summary`.
        title: the first table's.

    Returns:
        A Rich renderable, at most 80 columns wide for up to four learned rows.
    """
    first = Table(title=title, caption=_OVER_TASKS, box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    first.add_column("contender", overflow="fold", min_width=16)
    timed = any("time" in row for row in overview)
    for name in ("loss", "≥ Adam", "steps", *(("time",) if timed else ()), "score", "diverged"):
        first.add_column(name, justify="right", no_wrap=True)
    for row in overview:
        first.add_row(
            row["contender"] if row["baseline"] else f"[bold]{row['contender']}[/]",
            _with_interval(row["loss"], 3),
            f"{row['at_least_adam']:.0%}",
            _with_interval(row["steps"]),
            *((_with_interval(row["time"]),) if timed else ()),
            f"{row['score']:.2f}",
            f"{row['diverged']}/{row['runs']}",
        )
    second = Table(caption=_BY_TASK, box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    second.add_column("task", overflow="fold")
    ours = [row["contender"] for row in overview if not row["baseline"]]
    for name in ours or [REFERENCE]:
        second.add_column(name, justify="right", overflow="fold")
    second.add_column("best baseline", justify="right", overflow="fold")
    for task in dict.fromkeys(row["task"] for row in figures):
        by_name = {row["contender"]: row for row in figures if row["task"] == task}
        best = measures.best_baseline(list(by_name.values()))
        cells = [_cell(by_name.get(name)) for name in ours or [REFERENCE]]
        second.add_row(task.replace("/", "/\n"), *cells, "–" if best is None else f"{best['contender']}\n{_cell(best)}")
    return Group(first, second)


def write(
    folder: Path, results: Sequence[Result], about: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Writes ``results.csv``, ``results.json`` and ``curves.png``, each whole or not at all.

    Args:
        folder: made if it is not there.
        results: from :func:`meta_train.benchmark.run_suite`.
        about: what was run, JSON values, for ``results.json``.

    Returns:
        The figures of :func:`rows` and of :func:`summary`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures, overview = rows(results), summary(results)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(figures[0]) if figures else [])
    writer.writeheader()
    writer.writerows(figures)
    replace(folder / "results.csv", text.getvalue().encode())
    document = {"about": about, "summary": overview, "figures": figures}
    replace(folder / "results.json", (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    replace(folder / "curves.png", plot(results))
    return figures, overview


def plot(results: Sequence[Result]) -> bytes:
    """The smoothed training losses, means over the seeds, one panel a task.

    Args:
        results: from :func:`meta_train.benchmark.run_suite`.

    Returns:
        The bytes of a PNG file.
    """
    tasks, names = _names(results)
    columns = min(3, max(len(tasks), 1))
    lines = math.ceil(len(tasks) / columns)
    ours = list(dict.fromkeys(result.contender for result in results if not result.baseline))
    colours = {name: _LEARNED_COLOURS[i % len(_LEARNED_COLOURS)] for i, name in enumerate(ours)} | _COLOURS
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.4 * columns, 3.2 * lines + 0.9), layout="constrained")
        panels = iter(figure.subplots(lines, columns, squeeze=False).flat)
        for task in tasks:
            panel = next(panels)
            curves = {r.contender: r.curves.mean(axis=0) for r in results if r.task == task}
            for name, curve in curves.items():
                label = name if name in colours else "other baselines" if name == _first_other(names, colours) else None
                width = 2.2 if name in ours else 1.3 if name in colours else 0.8
                panel.plot(curve, label=label, color=colours.get(name, "#b8b8b8"), linewidth=width, zorder=width)
            _scale(panel, list(curves.values()))
            panel.set_title(task, fontsize=9)
            panel.set_xlabel("step")
            panel.set_ylabel("training loss")
        for panel in panels:
            panel.axis("off")
        handles, labels = figure.axes[0].get_legend_handles_labels() if tasks else ([], [])
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6) or 1, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def reference_of(results: Sequence[Result], task: str) -> Result | None:
    """Tuned Adam's result on a task."""
    return next((r for r in results if r.task == task and r.contender == REFERENCE), None)


def replace(path: Path, contents: bytes) -> None:
    """Writes a file beside and renames it."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(contents)
    os.replace(beside, path)


def _names(results: Sequence[Result]) -> tuple[list[str], list[str]]:
    """Tasks and contenders, in the order of the results."""
    return list(dict.fromkeys(r.task for r in results)), list(dict.fromkeys(r.contender for r in results))


def _first_other(names: Sequence[str], colours: Mapping[str, str]) -> str | None:
    return next((name for name in names if name not in colours), None)


def _slower(result: Result) -> float:
    """A step's time, Adam's being 1."""
    return result.timing.step / result.timing.reference if result.timing else math.nan


def _relative(result: Result, reference: Result | None) -> dict[str, float | None]:
    """What is told relative to tuned Adam."""
    if reference is None:
        return {"progress": None, "speed_up": None, "speed_up_time": None}
    means = [np.mean(values) for values in (result.initial, result.final, reference.final)]
    steps = float(np.median(measures.speed_ups(result.curves, reference.curves)))
    return {
        "progress": _number(float(measures.normalised(*means))),
        "speed_up": _number(steps),
        "speed_up_time": _number(steps / _slower(result)),
    }


def _per_seed(result: Result, reference: Result) -> np.ndarray:
    """``[seeds]``, normalised losses for the means; a run that diverged counts as -1, and none counts as less."""
    values = measures.normalised(result.initial, result.final, reference.final)
    return np.maximum(np.nan_to_num(values, nan=measures.WORST), measures.WORST)


def _interval(values: np.ndarray) -> list[float | None]:
    return [_number(value) for value in measures.bootstrap(values)]


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


def _with_interval(values: Sequence[float], digits: int = 2) -> str:
    value, low, high = values
    return f"{value:.{digits}f}\n[dim]{low:.2f}–{high:.2f}[/]"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    progress = "diverged" if row["progress"] is None else f"{row['progress']:.3f}"
    steps = f"{row['speed_up']:.2f}x" if row["speed_up"] else "–"
    return f"{progress}\n{steps}"


def _worst(table: Sequence[dict[str, Any]], task: str) -> tuple[float, float]:
    """The rank of the learned rule that did worst on the task, at its tuned rate where it has one."""
    ours = [row for row in table if row["task"] == task and not row["baseline"]]
    tuned = [row for row in ours if "@" not in row["contender"]]
    return min(map(measures.rank, tuned or ours), default=(math.inf, math.inf))


def _stderr(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _number(value: float) -> float | None:
    """A JSON number; ``None`` for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
