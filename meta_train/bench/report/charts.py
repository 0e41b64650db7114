"""A benchmark's charts, all of them Matplotlib's: SVG for the page, in colours of its style sheet, and one PNG."""

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import measures
from ..comparison import profiles, tasks_and_contenders
from ..contenders import REFERENCE
from ..tournament import Result

# Name in the style sheet -> colours on light and on dark paper. A contender keeps its colour in all charts.
PALETTE = {
    "soft": ("#667078", "#98a1a9"),
    "rule": ("#e3e5e3", "#2c3135"),
    "reference": ("#1f2328", "#e4e6e8"),
    **{
        f"ours{i}": pair
        for i, pair in enumerate(
            [
                *(("#c2253a", "#ff6b7d"), ("#7a3fb0", "#bd8cf0"), ("#b0307f", "#f07cc0"), ("#8a2b12", "#f0936b")),
                *(("#14807f", "#4fd1cf"), ("#6b7a10", "#c3d455"), ("#d4573a", "#ff9c80"), ("#50408f", "#a99bf5")),
            ]
        )
    },
    **{
        f"base{i}": pair
        for i, pair in enumerate(
            [
                *(("#3f7fbf", "#6ba6e0"), ("#2f9e8f", "#56c2b3"), ("#8a9a2c", "#b3c253"), ("#d08b1d", "#e6ae4f")),
                *(("#5b6fd0", "#8c9cf0"), ("#57a05a", "#7fc682"), ("#a98a4a", "#cdb077"), ("#4aa3c7", "#72c5e6")),
                *(("#94806f", "#b8a596"), ("#6c8ebf", "#94b1dc"), ("#77a88d", "#9dcbb2"), ("#b59b2e", "#d6bd57")),
            ]
        )
    },
}
_SVG: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": PALETTE["soft"][0],
    "axes.labelcolor": PALETTE["soft"][0],
    "xtick.color": PALETTE["soft"][0],
    "ytick.color": PALETTE["soft"][0],
    "grid.color": PALETTE["rule"][0],
}
_POINTS = 150  # of a line on the page, at most


class Style(NamedTuple):
    """How a contender is drawn.

    Attributes:
        colour: a key of :data:`PALETTE`.
        learned: whether it is a learned rule.
        dashed: at its default learning rate: drawn as at the tuned one, dashed.
    """

    colour: str
    learned: bool
    dashed: bool


def styles(overview: Sequence[Mapping[str, Any]]) -> dict[str, Style]:
    """A style for every contender.

    Args:
        overview: of :func:`meta_train.bench.comparison.summary`.
    """
    colours = {REFERENCE: "reference"}
    counts = {"ours": 0, "base": 0}
    most = {kind: sum(name.startswith(kind) for name in PALETTE) for kind in counts}
    for row in sorted(overview, key=lambda row: row["contender"]):
        name, kind = row["contender"].partition("@")[0], "base" if row["baseline"] else "ours"
        if name not in colours:
            colours[name] = f"{kind}{counts[kind] % most[kind]}"
            counts[kind] += 1
    return {
        row["contender"]: Style(
            colours[row["contender"].partition("@")[0]], not row["baseline"], "@" in row["contender"]
        )
        for row in overview
    }


def curves(results: Sequence[Result], drawn: Mapping[str, Style]) -> str:
    """The training losses of one task as SVG: smoothed, means over the seeds.

    Args:
        results: one task's.
        drawn: of :func:`styles`.

    Returns:
        An ``<svg>`` element.
    """
    means = {result.contender: result.curves.mean(axis=0) for result in results}

    def draw(axes: Axes) -> None:
        for name in sorted(means, key=lambda name: (drawn[name].learned, name == REFERENCE)):
            steps, values = thin(means[name])
            _line(axes, name, drawn[name], steps, values)
        _limits(axes, list(means.values()))
        axes.grid(axis="y")
        axes.set(xlabel="step", ylabel="training loss")

    return _svg(f"Training losses of {results[0].task}", draw)


def profile(results: Sequence[Result], drawn: Mapping[str, Style], by_clock: bool = False) -> str:
    """The performance profiles as SVG.

    Args:
        results: of all tasks.
        drawn: of :func:`styles`.
        by_clock: by time and not by steps.

    Returns:
        An ``<svg>`` element.
    """
    _, names = tasks_and_contenders(results)
    ratios = dict(zip(names, profiles(results, by_clock), strict=True))

    def draw(axes: Axes) -> None:
        for name in sorted(reversed(list(drawn)), key=lambda name: drawn[name].learned):
            inside = ratios[name][ratios[name] <= measures.MAX_RATIO]
            shares = np.arange(len(inside) + 1) / len(ratios[name])
            _line(
                axes,
                name,
                drawn[name],
                np.array([1.0, *inside, measures.MAX_RATIO]),
                np.array([*shares, shares[-1]]),
                drawstyle="steps-post",
            )
        axes.grid(axis="y")
        axes.set(xlim=(1, measures.MAX_RATIO), ylim=(0, 1.02))
        axes.set(xlabel="at most so many times the fastest's", ylabel="share of tasks")

    return _svg(f"Performance profile in {'time' if by_clock else 'steps'}", draw)


def speed_ups(overview: Sequence[Mapping[str, Any]], drawn: Mapping[str, Style], by_clock: bool = False) -> str:
    """The speed-ups over tuned Adam as SVG, with their intervals, best score on top.

    Args:
        overview: of :func:`meta_train.bench.comparison.summary`.
        drawn: of :func:`styles`.
        by_clock: by time and not by steps.

    Returns:
        An ``<svg>`` element.
    """
    field, what = ("time", "faster by the clock") if by_clock else ("steps", "fewer steps")

    def draw(axes: Axes) -> None:
        axes.axvline(1.0, color=PALETTE["soft"][0], linewidth=0.8, linestyle=":")
        for place, row in enumerate(overview):
            value, low, high = row[field]
            style = drawn[row["contender"]]
            colour, width = PALETTE[style.colour][0], 2.4 if style.learned else 1.4
            axes.plot([low, high], [place, place], color=colour, linewidth=width, gid=_title(
                f"{row['contender']}: {value:.2f} ({low:.2f} to {high:.2f})"
            ))  # fmt: skip
            axes.plot([value], [place], "o", color=colour, markersize=5)
        axes.set_yticks(range(len(overview)), [row["contender"] for row in overview])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        highest = max(1.5, *(row[field][2] for row in overview))
        axes.set(xlim=(0, min(highest * 1.03, 6.0)), ylim=(len(overview) - 0.4, -0.6))
        axes.set(xlabel=f"times {what} than tuned Adam")

    return _svg(f"Speed-up: {what}", draw, height=0.75 + 0.22 * len(overview))


def overview_png(results: Sequence[Result], drawn: Mapping[str, Style]) -> bytes:
    """All tasks' training losses as one picture, a panel a task.

    Args:
        results: from :func:`meta_train.bench.tournament.run_suite`.
        drawn: of :func:`styles`.

    Returns:
        The bytes of a PNG file.
    """
    tasks, names = tasks_and_contenders(results)
    columns = min(3, max(len(tasks), 1))
    lines = -(-len(tasks) // columns)
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.4 * columns, 3.2 * lines + 0.9), layout="constrained")
        panels = list(figure.subplots(lines, columns, squeeze=False).flat)
        for task, panel in zip(tasks, panels, strict=False):
            means = {r.contender: r.curves.mean(axis=0) for r in results if r.task == task}
            for name, curve in means.items():
                _line(panel, name, drawn[name], np.arange(1, len(curve) + 1), curve)
            _limits(panel, list(means.values()))
            panel.set_title(task, fontsize=9)
            panel.set(xlabel="step", ylabel="training loss")
        for panel in panels[len(tasks) :]:
            panel.axis("off")
        handles = [_line(panels[-1], name, drawn[name], [], []) for name in names]
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 2 * columns, 5), frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def thin(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve by a few points: ``(steps from 1, values)``, the last step always among them.

    Example:
        >>> steps, values = thin(np.arange(1000.0))
        >>> len(steps), float(steps[-1]), float(values[-1])
        (150, 1000.0, 999.0)
    """
    steps = np.unique(np.round(np.linspace(1, len(values), min(_POINTS, len(values)))).astype(int))
    return steps.astype(float), values[steps - 1]


def _line(axes: Axes, name: str, style: Style, x: Any, y: Any, **options: Any):
    width = 2.0 if style.learned else 1.6 if style.colour == "reference" else 0.9
    if style.dashed:
        options["linestyle"], width = (0, (4, 3)), 1.2
    (line,) = axes.plot(
        x, y, color=PALETTE[style.colour][0], linewidth=width, zorder=2 + width, gid=_title(name), **options
    )
    return line


def _limits(axes: Axes, shown: Sequence[np.ndarray]) -> None:
    """Limits that show where the curves differ; logarithmic where all is positive. A diverged curve may leave them."""
    finite = [curve[np.isfinite(curve)] for curve in shown]
    finite = [curve for curve in finite if curve.size]
    if not finite:
        return
    low = min(float(curve.min()) for curve in finite)
    high = float(np.median([curve[0] for curve in finite]))
    if low > 0 and high > low:
        low = max(low, high * 1e-9)
        axes.set_yscale("log")
        axes.set_ylim(low / 1.1, high * 1.2)
        if high < 20 * low:  # plain numbers within a decade or so
            axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
            axes.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
            axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    elif high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _title(text: str) -> str:
    """What is shown when the pointer rests on a line; :func:`_svg` makes a ``<title>`` of it."""
    return f"title:{text}"


def _svg(label: str, draw: Callable[[Axes], None], height: float = 2.9) -> str:
    """A chart as an element of the page: its colours are variables of the style sheet."""
    with matplotlib.rc_context(_SVG | {"svg.hashsalt": label}):  # so that no two charts share an identifier
        figure = Figure(figsize=(4.6, height), layout="constrained")
        axes = figure.subplots()
        axes.set_axisbelow(True)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="title:([^"]*)">', r"<g><title>\1</title>", text)
    text = text.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    for name, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{name})")
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
