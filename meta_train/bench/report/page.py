"""The benchmark's report as one HTML file: no network, no scripts, light and dark, for wide and narrow screens."""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from .. import measures
from ..comparison import profiles
from ..contenders import REFERENCE
from ..tournament import Result
from . import svg

_OURS, _BASELINES = 8, 12  # as many colours as style.css has of each
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
    styles = _styles(overview)
    seeds = f"{about['seeds']} seeds" if about["seeds"] > 1 else "one seed"
    lead = (
        f"{len(tasks)} tasks, {about['steps']:,} steps, {seeds}; every optimizer with a learning rate is tuned on each "
        f"task, by other seeds than those reported. Everything is relative to tuned Adam."
    )
    sections = [
        _losses(figures, overview),
        _overall(overview, styles),
        _charts(results, overview, styles),
        _matrix(figures, overview, tasks),
        _reading(),
        *(_task(task, results, figures, styles) for task in tasks),
        _colophon(about),
    ]
    style = resources.files(__package__).joinpath("style.css").read_text()
    return _DOCUMENT.format(
        title=f"Benchmark {html.escape(str(about['suite']))}", style=style, lead=lead, body="\n".join(sections)
    )


_DOCUMENT = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
<p class="lead">{lead}</p>
</header>
{body}
</main>
</body>
</html>
"""


# -- sections --------------------------------------------------------------------------------------------------------


def _losses(figures: Sequence[Row], overview: Sequence[Row]) -> str:
    """Where each learned rule loses, before anything else."""
    parts = []
    for name in (row["contender"] for row in overview if not row["baseline"]):
        mine = [row for row in figures if row["contender"] == name]
        behind = [row for row in mine if row["progress"] is None or row["progress"] < 1 or not row["speed_up"]]
        diverged = sum(row["diverged"] for row in mine)
        where = f"{len(behind)} of {len(mine)} tasks" if behind else "no task"
        lost = f"{diverged} of its runs diverged" if diverged else "no run diverged"
        told = f"<b>{html.escape(name)}</b> fell behind tuned Adam on {where}; {lost}."
        if not behind:
            parts.append(f"<p>{told}</p>")
            continue
        items = "".join(_loss(row, figures) for row in behind)
        opened = "" if "@" in name else " open"
        parts.append(f"<details{opened}><summary>{told}</summary><ul>{items}</ul></details>")
    return _section("losing", "Where it loses", "".join(parts) or "<p>No learned rule took part.</p>")


def _loss(row: Row, figures: Sequence[Row]) -> str:
    best = measures.best_baseline([other for other in figures if other["task"] == row["task"]])
    why = [
        *([f"{row['diverged']} of {row['seeds']} seeds diverged"] if row["diverged"] else []),
        *([f"final loss {_three(row['progress'])}"] if row["progress"] is not None else []),
        f"{row['speed_up']:.2f}× in steps" if row["speed_up"] else "never at Adam's best loss",
        *([f"{html.escape(best['contender'])} {best['speed_up']:.2f}×"] if best and best["speed_up"] else []),
    ]
    return f'<li>{_link(row["task"])} <span class="why">{", ".join(why)}</span></li>'


def _overall(overview: Sequence[Row], styles: Mapping[str, str]) -> str:
    timed = "time" in overview[0]
    heads = ["", "final loss", "≥ Adam", "steps", *(["clock"] if timed else []), "score"]
    heads += [
        *(["score<br>by clock"] if timed else []),
        "worst task",
        "diverged",
        *(["step"] if timed else []),
        "bytes a<br>parameter",
    ]
    lines = []
    for row in overview:
        worst, value = row["worst"]
        cells = [
            f'<th scope="row"><span class="dot {styles[row["contender"]]}"></span>{html.escape(row["contender"])}</th>',
            _estimate(row["loss"], 3),
            f"<td>{row['at_least_adam']:.0%}</td>",
            _estimate(row["steps"], 2, "×"),
            *([_estimate(row["time"], 2, "×")] if timed else []),
            f"<td>{row['score']:.2f}</td>",
            *([f"<td>{row['score_time']:.2f}</td>"] if timed else []),
            f"<td>{'–' if value is None else _three(value)}<small>{_link(worst, 26)}</small></td>",
            f"<td>{row['diverged']}<small>of {row['runs']}</small></td>",
            *([f"<td>{row['step_time']:.2f}×</td>"] if timed else []),
            f"<td>{row['state_bytes_per_param']:.1f}</td>",
        ]
        lines.append((row, cells))
    note = (
        "Interquartile means over tasks and seeds with 95% intervals; best score first. "
        "NAME is at the learning rate tuned for each task, NAME@RATE at that rate everywhere."
    )
    return _section("overall", "Over all tasks", _figures(heads, lines) + f'<p class="note">{note}</p>')


def _charts(results: Sequence[Result], overview: Sequence[Row], styles: Mapping[str, str]) -> str:
    timed = "time" in overview[0]
    names = list(dict.fromkeys(result.contender for result in results))
    x = svg.Axis("at most so many times the fastest's", 1.0, measures.MAX_RATIO)
    y = svg.Axis("share of tasks", 0.0, 1.0)
    figures = []
    for by_clock in (False, True) if timed else (False,):
        ratios = dict(zip(names, profiles(results, by_clock), strict=True))
        order = [row["contender"] for row in reversed(overview)]
        order.sort(key=lambda name: styles[name].startswith("ours"))
        series = [svg.Line(name, styles[name], *_stairs(ratios[name])) for name in order]
        what = "Time" if by_clock else "Steps"
        chart = svg.lines(series, x, y, f"Performance profile in {what.lower()}")
        figures.append(_figure(chart, f"{what} to tuned Adam's best loss: performance profiles"))
    for key, what in (("steps", "fewer steps"), *((("time", "faster by the clock"),) if timed else ())):
        rows = [svg.Span(row["contender"], styles[row["contender"]], *row[key]) for row in overview]
        high = min(max(1.5, *(row.high for row in rows)), 6.0)
        chart = svg.spans(rows, svg.Axis(f"times {what} than tuned Adam", 0.0, high), f"Speed-up: {what}", 1.0)
        figures.append(_figure(chart, f"How many times {what}: interquartile means, 95% intervals"))
    return _section("charts", "Speed", f'{_legend(overview, styles)}<div class="charts">{"".join(figures)}</div>')


def _matrix(figures: Sequence[Row], overview: Sequence[Row], tasks: Sequence[str]) -> str:
    names = [row["contender"] for row in overview]
    found = {(row["task"], row["contender"]): row for row in figures}
    head = "".join(f'<th scope="col"><span>{html.escape(name)}</span></th>' for name in names)
    lines = []
    for task in tasks:
        cells = "".join(_heat(found.get((task, name))) for name in names)
        lines.append(f'<tr><th scope="row">{_link(task)}</th>{cells}</tr>')
    note = "In how many times fewer steps tuned Adam's best loss was reached, the median over seeds; – where never."
    table = _scrolled("matrix", f"<th></th>{head}", lines)
    return _section("tasks", "By task", f'{table}<p class="note">{note}</p>')


def _task(task: str, results: Sequence[Result], figures: Sequence[Row], styles: Mapping[str, str]) -> str:
    mine = [result for result in results if result.task == task]
    rows = sorted(
        (row for row in figures if row["task"] == task),
        key=lambda row: (-(row["speed_up"] or 0), -(-math.inf if row["progress"] is None else row["progress"])),
    )
    timed = rows[0]["milliseconds"] is not None
    heads = ["", "steps", *(["clock"] if timed else []), "normalised", "final loss", "validation", "rate"]
    heads += ["ms/step"] if timed else []
    lines = []
    for row in rows:
        rate = "–" if row["learning_rate"] is None else f"{row['learning_rate']:.3g}"
        edge = '<abbr title="at the edge of its grid">*</abbr>' if row["on_grid_edge"] else ""
        lost = f'<small class="bad">{row["diverged"]}/{row["seeds"]} diverged</small>' if row["diverged"] else ""
        cells = [
            f'<th scope="row"><span class="dot {styles[row["contender"]]}"></span>{html.escape(row["contender"])}</th>',
            f"<td>{_times(row['speed_up'])}</td>",
            *([f"<td>{_times(row['speed_up_time'])}</td>"] if timed else []),
            f"<td>{'–' if row['progress'] is None else _three(row['progress'])}</td>",
            f"<td>{_sig(row['final_loss'])}{lost}</td>",
            f"<td>{_sig(row['valid_loss'])}</td>",
            f"<td>{rate}{edge}</td>",
            *([f"<td>{_sig(row['milliseconds'])}</td>"] if timed else []),
        ]
        lines.append((row, cells))
    facts = f"{rows[0]['num_params']:,} parameters, {len(mine[0].curves[0]):,} steps"
    if timed:
        facts += f", {_sig(rows[0]['gradient_milliseconds'])} ms for batch and gradient"
    chart = _curves(mine, styles)
    body = f'<p class="note">{facts}</p><div class="task"><figure>{chart}</figure>{_figures(heads, lines)}</div>'
    return _section(_anchor(task), task, body, level=3)


def _reading() -> str:
    return _section("reading", "How to read it", _terms(_READING))


_READING = {
    "final loss": "How far the training loss came down, tuned Adam's way being 1: (initial − final) / (initial − "
    "Adam's final), the final loss a mean over the last twentieth of the steps. A run that diverged counts as −1. "
    "Where every optimizer drives the loss to almost nothing this is 1 for all: look at the steps.",
    "≥ Adam": "The share of tasks on which that is at least 1.",
    "steps": "In how many times fewer steps than tuned Adam it reached the best loss that tuned Adam reached, of "
    "smoothed curves, each seed against Adam's run of the same seed; 0 where it never did.",
    "clock": "The same in time: divided by what a step costs beside a step of Adam, each compiled for a single run "
    "and timed alone, turn by turn. On tasks as small as these the update is a large part of a step; where gradients "
    "cost more, the clock comes closer to the steps.",
    "score": "The area under the performance profile: for every ratio from 1 to 4, on which share of the tasks was it "
    "at tuned Adam's best loss within that ratio of the fastest of all rows? 1 is fastest everywhere, 0 is never "
    "within 4.",
    "diverged": "Runs that ended above their start by more than a twentieth, or not finite.",
    "step, state": "The time of a step, Adam's being 1, a geometric mean over tasks; the optimizer's state, a mean "
    "over tasks.",
    "rate*": "The chosen learning rate is at the edge of its grid: a wider one might do better.",
}


def _colophon(about: Mapping[str, Any]) -> str:
    frozen = f", frozen as {about['manifest'][:12]}" if about.get("manifest") else ""
    facts = {
        "suite": f"{about['suite']}{frozen}",
        "tuning": f"rates chosen on {about.get('tuning_seeds', '–')} other seeds, the second among the best three",
        "machine": about.get("machine", "unknown"),
        "versions": about.get("versions", "unknown"),
        "made by": about.get("command", "learned-opt bench"),
    }
    took_part = f"<h3>Who took part</h3>{_terms(about['contenders'], 'short')}" if about.get("contenders") else ""
    return _section("about", "What was run", _terms(facts, "short") + took_part)


# -- pieces ----------------------------------------------------------------------------------------------------------


def _styles(overview: Sequence[Row]) -> dict[str, str]:
    """A class name for every row; a contender at its default rate is drawn as the contender, dashed."""
    bases: dict[str, str] = {}
    counts = {"ours": 0, "base": 0}
    for row in sorted(overview, key=lambda row: row["contender"]):
        name = row["contender"].partition("@")[0]
        if name in bases:
            continue
        if name == REFERENCE:
            bases[name] = "reference"
            continue
        kind, limit = ("base", _BASELINES) if row["baseline"] else ("ours", _OURS)
        bases[name] = f"{kind} {kind}{counts[kind] % limit}"
        counts[kind] += 1
    return {
        row["contender"]: bases[row["contender"].partition("@")[0]] + (" dashed" if "@" in row["contender"] else "")
        for row in overview
    }


def _curves(results: Sequence[Result], styles: Mapping[str, str]) -> str:
    curves = {result.contender: result.curves.mean(axis=0) for result in results}
    finite = [curve[np.isfinite(curve)] for curve in curves.values()]
    finite = [curve for curve in finite if curve.size]
    steps = len(next(iter(curves.values())))
    low = min((float(curve.min()) for curve in finite), default=0.1)
    high = float(np.median([curve[0] for curve in finite])) if finite else 1.0
    log = low > 0 and high > 1.5 * low
    if log:
        low = max(low, high * 1e-9)
        y = svg.Axis("training loss", low / 1.15, high * 1.2, log=True)
    else:
        slack = 0.05 * (high - low) or 1.0
        y = svg.Axis("training loss", low - slack, high + slack)
    order = sorted(curves, key=lambda name: (styles[name].startswith("ours"), styles[name] == "reference"))
    series = [svg.Line(name, styles[name], *svg.thin(curves[name])) for name in order]
    return svg.lines(series, svg.Axis("step", 0.0, float(steps)), y, "Training losses")


def _stairs(ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A profile as the corners of its steps, from 1 to the largest ratio."""
    inside = ratios[ratios <= measures.MAX_RATIO]
    x, y = [1.0], [0.0]
    for index, ratio in enumerate(inside):
        x += [float(ratio)] * 2
        y += [y[-1], (index + 1) / len(ratios)]
    return np.array([*x, measures.MAX_RATIO]), np.array([*y, y[-1]])


def _legend(overview: Iterable[Row], styles: Mapping[str, str]) -> str:
    items = "".join(
        f'<li><span class="dot {styles[row["contender"]]}"></span>{html.escape(row["contender"])}</li>'
        for row in overview
    )
    return f'<ul class="legend">{items}</ul>'


def _heat(row: Row | None) -> str:
    if row is None:
        return "<td></td>"
    value = row["speed_up"] or 0.0
    strength = min(abs(math.log2(value)) / 2, 1.0) if value else 1.0
    kind = "good" if value > 1 else "bad"
    return f'<td class="{kind}" style="--s:{strength:.2f}">{_times(row["speed_up"], "")}</td>'


def _estimate(values: Sequence[float], digits: int, unit: str = "") -> str:
    value, low, high = values
    return f"<td>{value:.{digits}f}{unit}<small>{low:.2f} to {high:.2f}</small></td>"


def _terms(terms: Mapping[str, str], style: str = "") -> str:
    items = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in terms.items())
    return f'<dl class="{style}">{items}</dl>'


def _figure(chart: str, caption: str) -> str:
    return f"<figure>{chart}<figcaption>{caption}</figcaption></figure>"


def _figures(heads: Sequence[str], lines: Iterable[tuple[Row, Sequence[str]]]) -> str:
    """A table of contenders, the learned ones set off."""
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    rows = [f'<tr class="{"" if row["baseline"] else "ours"}">{"".join(cells)}</tr>' for row, cells in lines]
    return _scrolled("figures", head, rows)


def _scrolled(style: str, head: str, lines: Sequence[str]) -> str:
    """A table that scrolls inside the page where it is too wide for it."""
    body = "".join(lines)
    return f'<div class="wide"><table class="{style}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _link(task: str, most: int = 99) -> str:
    shown = task if len(task) <= most else f"{task[: most - 1]}…"
    return f'<a href="#{_anchor(task)}">{html.escape(shown)}</a>'


def _section(anchor: str, title: str, body: str, level: int = 2) -> str:
    return f'<section id="{anchor}"><h{level}>{html.escape(title)}</h{level}>{body}</section>'


def _anchor(task: str) -> str:
    return "task-" + re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-")


def _times(value: float | None, unit: str = "×") -> str:
    return f"{value:.2f}{unit}" if value else "–"


def _three(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.2g}"


def _sig(value: float | None) -> str:
    return "–" if value is None else f"{value:#.3g}".rstrip(".")
