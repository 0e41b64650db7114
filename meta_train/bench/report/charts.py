"""The plot of a benchmark's curves."""

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..comparison import tasks_and_contenders
from ..tournament import Result

_COLOURS = {"adam": "#3b6fb6", "adam@0.001": "#9bb8dd", "adamw-cosine": "#e08e2b"}
_LEARNED_COLOURS = ("#b5202e", "#2e8b57", "#7b4fa3", "#8c6d46", "#d46a9f", "#17a2a2", "#7d8a1f", "#3d3d3d")


def plot(results: Sequence[Result]) -> bytes:
    """The smoothed training losses, means over the seeds, one panel a task.

    Args:
        results: from :func:`meta_train.bench.tournament.run_suite`.

    Returns:
        The bytes of a PNG file.
    """
    tasks, names = tasks_and_contenders(results)
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


def _first_other(names: Sequence[str], colours: Mapping[str, str]) -> str | None:
    return next((name for name in names if name not in colours), None)


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
