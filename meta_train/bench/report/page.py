"""The benchmark's report as one HTML file: the template ``report.html.j2`` and what it is filled with."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from .. import glossary, measures
from ..comparison import lost
from ..tournament import Result
from . import charts

Row = Mapping[str, Any]


def render(results: Sequence[Result], figures: Sequence[Row], overview: Sequence[Row], about: Mapping[str, Any]) -> str:
    """The whole report.

    Args:
        results: from :func:`meta_train.bench.tournament.run_suite`.
        figures: from :func:`meta_train.bench.comparison.rows`; tasks where learned rules do worst first.
        overview: from :func:`meta_train.bench.comparison.summary`.
        about: what was run, JSON values; ``contenders`` maps names to a line about each.

    Returns:
        The text of an HTML document.
    """
    tasks = list(dict.fromkeys(row["task"] for row in figures))
    styles, timed = charts.styles(overview), "time" in overview[0]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "anchor": _anchor,
        "significant": lambda value: "–" if value is None else f"{value:.3g}",
        "strength": lambda value: f"{min(abs(math.log2(value)) / 2, 1.0) if value else 1.0:.2f}",
        "three": _three,
        "times": _times,
    }
    return environment.get_template("report.html.j2").render(
        about={"manifest": None, "tuning_seeds": None, "machine": None, "versions": None, "command": None}
        | {"contenders": {}}
        | dict(about),
        averages=glossary.AVERAGES,
        by_task=[
            (
                task,
                sorted((row for row in figures if row["task"] == task), key=measures.rank, reverse=True),
                Markup(charts.curves([result for result in results if result.task == task], styles)),
            )
            for task in tasks
        ],
        charts=[(Markup(chart), caption) for chart, caption in _charts(results, overview, styles, timed)],
        css=Markup(environment.loader.get_source(environment, "style.css")[0]),  # type: ignore[union-attr]
        found={(row["task"], row["contender"]): row for row in figures},
        glossary=[(term.name, term.full) for term in glossary.TERMS],
        labels=glossary.LABELS,
        losing=[_losses(row["contender"], figures) for row in overview if not row["baseline"]],
        overview=overview,
        palette=charts.PALETTE,
        styles=styles,
        tasks=tasks,
        timed=timed,
    )


def _charts(results: Sequence[Result], overview: Sequence[Row], styles: Mapping[str, charts.Style], timed: bool):
    for by_clock in (False, True) if timed else (False,):
        what = "Time" if by_clock else "Steps"
        yield charts.profile(results, styles, by_clock), f"{what} to tuned Adam's best loss: performance profiles"
    for by_clock in (False, True) if timed else (False,):
        what = "How many times faster by the clock" if by_clock else "How many times fewer steps"
        yield charts.speed_ups(overview, styles, by_clock), f"{what}: interquartile means, 95% intervals"


def _losses(name: str, figures: Sequence[Row]) -> tuple[str, str, list[tuple[Row, list[str]]]]:
    """A learned rule, what is told of its losses, and each task that it lost with the reasons."""
    mine = [row for row in figures if row["contender"] == name]
    behind = [row for row in mine if lost(row)]
    diverged = sum(row["diverged"] for row in mine)
    told = f"lost {len(behind)} of {len(mine)} task{'s' if len(mine) > 1 else ''}" if behind else "lost no task"
    told += f"; {diverged} of its runs diverged." if diverged else "; no run diverged."
    return name, told, [(row, _why(row, figures)) for row in behind]


def _why(row: Row, figures: Sequence[Row]) -> list[str]:
    best = measures.best_baseline([other for other in figures if other["task"] == row["task"]])
    return [
        *([f"{row['diverged']} of {row['seeds']} seeds diverged"] if row["diverged"] else []),
        *([f"final loss {_three(row['progress'])}"] if row["progress"] is not None else []),
        f"{row['speed_up']:.2f}× in steps" if row["speed_up"] else "never at Adam's best loss",
        *([f"{best['contender']} {best['speed_up']:.2f}×"] if best and best["speed_up"] else []),
    ]


def _anchor(task: str) -> str:
    return "task-" + re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-")


def _three(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.2g}"


def _times(value: float | None, unit: str = "×") -> str:
    return f"{value:.2f}{unit}" if value else "–"
