"""A benchmark's tables on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from .. import glossary, measures
from ..contenders import REFERENCE

_BY_TASK = "By task: loss and, below it, steps. The worst for learned rules come first."


def tables(figures: Sequence[dict[str, Any]], overview: Sequence[dict[str, Any]], title: str) -> Group:
    """The figures for the terminal: over all tasks, a contender a row; then the learned rules by task.

    Args:
        figures: from :func:`rows`.
        overview: from :func:`summary`.
        title: the first table's.

    Returns:
        A Rich renderable, at most 80 columns wide for up to four learned rows.
    """
    timed = any("time" in row for row in overview)
    words = glossary.short("final loss", "validation", "steps", *(("clock",) if timed else ()), "score", "diverged")
    caption = f"{glossary.AVERAGES} {words} {glossary.LABELS}"
    first = Table(
        title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption_justify="left"
    )
    first.add_column("contender", overflow="fold", min_width=16)
    for name in ("final\nloss", "valid-\nation", "steps", *(("clock",) if timed else ()), "score", "diverged"):
        first.add_column(name, justify="right", no_wrap=True)
    for row in overview:
        first.add_row(
            row["contender"] if row["baseline"] else f"[bold]{row['contender']}[/]",
            _with_interval(row["loss"], 3),
            "–" if row["valid"] is None else f"{row['valid']:.2f}",
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


def _with_interval(values: Sequence[float], digits: int = 2) -> str:
    value, low, high = values
    return f"{value:.{digits}f}\n[dim]{low:.2f}–{high:.2f}[/]"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    progress = "diverged" if row["progress"] is None else f"{row['progress']:.3f}"
    steps = f"{row['speed_up']:.2f}x" if row["speed_up"] else "–"
    return f"{progress}\n{steps}"
