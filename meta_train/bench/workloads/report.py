"""A suite of workloads as files: ``results.json``, ``results.csv``, ``curves.png`` and the page ``report.html``."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from learned_opt.files import write_atomically

from .comparison import rows, summary
from .optimizers import REFERENCE
from .protocol import Result

Row = Mapping[str, Any]
_COLOURS = ("#b5202e", "#2e8b57", "#7b4fa3", "#d98b2b", "#17a2a2", "#8c6d46", "#d46a9f", "#6d7a1f", "#5f5f5f")
_REFERENCE_COLOUR = "#1f5f99"
_WORDS = {"better": "lower", "level": "level", "worse": "higher"}


def write(folder: Path, results: Sequence[Result], about: Mapping[str, Any]) -> dict[str, Any]:
    """Writes all files, each whole or not at all.

    Args:
        folder: made if it is not there.
        results: of :func:`meta_train.bench.workloads.protocol.run_suite`.
        about: what was run, JSON values.

    Returns:
        ``about``, ``summary`` and ``figures``, JSON values.
    """
    document = {"about": dict(about), "summary": summary(results), "figures": rows(results)}
    write_document(folder, document)
    return document


def write_document(folder: Path, document: Mapping[str, Any]) -> None:
    """Writes the files from what ``results.json`` holds; so a page can be made again without any run."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = document["figures"]
    flat = [{**row, "on_edge": " ".join(row["on_edge"]), **_told(row["settings"])} for row in figures]
    fields = [name for name in figures[0] if name not in ("settings", "looks", "valid_curves")]
    fields += sorted({name for row in flat for name in row if name.startswith("set_")})
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_atomically(folder / "results.csv", text.getvalue().encode())
    write_atomically(folder / "results.json", (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    write_atomically(folder / "curves.png", _image(document, "png", "steps"))
    write_atomically(folder / "report.html", page(document).encode())


def page(document: Mapping[str, Any]) -> str:
    """The page: one sentence, one table, one plot of loss against seconds; then the workloads, the worst lost first.

    Args:
        document: what ``results.json`` holds.

    Returns:
        The text of an HTML document without scripts and without anything from elsewhere.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"sig": significant, "percent": lambda ratio: _percent(ratio), "span": _duration}
    figures = document["figures"]
    names = list(dict.fromkeys(row["workload"] for row in figures))
    timed = all(row["milliseconds"] is not None for row in figures)
    return environment.get_template("page.html.j2").render(
        about=document["about"],
        sentence=sentence(document),
        summary=document["summary"],
        timed=timed,
        words=_WORDS,
        colours=_colours(document),
        reference=REFERENCE,
        overview=Markup(_image(document, "svg", "seconds" if timed else "steps").decode()),
        workloads=[
            (
                name,
                sorted((row for row in figures if row["workload"] == name), key=_by_loss),
                [
                    Markup(_one(document, name, against).decode())
                    for against in (("steps", "seconds") if timed else ("steps",))
                ],
            )
            for name in names
        ],
    )


def sentence(document: Mapping[str, Any]) -> str:
    """What the suite says of each learned rule, in one sentence; losses first."""
    parts = []
    ours = [row for row in document["summary"] if row["kind"] == "learned"]
    for row in sorted(ours, key=lambda row: -(row["ratio"] or math.inf)):
        if row["ratio"] is None:
            parts.append(f"{row['optimizer']} diverged")
            continue
        slower = "" if row["step_time"] is None else f", and its steps take {row['step_time']:.2f} times as long"
        parts.append(
            f"{row['optimizer']}'s validation loss ends at {row['ratio']:.3f} times {REFERENCE}'s "
            f"({_WORDS[row['verdict']]}; reaches {row['reached']} of {row['workloads']} targets){slower}"
        )
    return "; ".join(parts) + "." if parts else "No learned rule took part."


def table(document: Mapping[str, Any]) -> Table:
    """The summary for the terminal."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=document["about"]["suite"])
    shown.add_column("optimizer", overflow="fold")
    for name in ("loss", "verdict", "targets", "step", "spent"):
        shown.add_column(name, justify="right")
    for row in document["summary"]:
        shown.add_row(
            f"[bold]{row['optimizer']}[/]" if row["kind"] == "learned" else row["optimizer"],
            "diverged" if row["ratio"] is None else f"{row['ratio']:.3f}",
            _WORDS[row["verdict"]],
            f"{row['reached']}/{row['workloads']}",
            "–" if row["step_time"] is None else f"{row['step_time']:.2f}x",
            _duration(row["seconds_spent"]),
        )
    return shown


def significant(value: float | None) -> str:
    """Four figures; a dash for what is not there."""
    return "–" if value is None else f"{value:.4g}"


def _percent(ratio: float | None) -> str:
    return "diverged" if ratio is None else f"{100 * (ratio - 1):+.1f} %"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _told(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {f"set_{name}": value for name, value in settings.items()}


def _by_loss(row: Row) -> float:
    return math.inf if row["valid_loss"] is None else row["valid_loss"]


def _colours(document: Mapping[str, Any]) -> dict[str, str]:
    names = sorted({row["optimizer"] for row in document["figures"]} - {REFERENCE})
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)} | {REFERENCE: _REFERENCE_COLOUR}


def _image(document: Mapping[str, Any], kind: str, against: str) -> bytes:
    """All workloads side by side."""
    names = list(dict.fromkeys(row["workload"] for row in document["figures"]))
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4 * columns, 3.2 * lines + 0.6), layout="constrained")
        panels = iter(figure.subplots(lines, columns, squeeze=False).flat)
        for name, panel in zip(names, panels, strict=False):
            _draw(panel, document, name, against)
            panel.set_title(name, fontsize=10)
        for panel in panels:
            panel.axis("off")
        if kind == "png":  # the page has the colours in its table
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=2 * columns, frameon=False)
        return _saved(figure, kind)


def _one(document: Mapping[str, Any], workload: str, against: str) -> bytes:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 3.8), layout="constrained")
        _draw(figure.subplots(), document, workload, against)
        return _saved(figure, "svg")


_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "learned-opt",
}


def _saved(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "png":
        figure.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue().decode()
    return text[text.index("<svg") :].encode()


def _draw(panel: Any, document: Mapping[str, Any], workload: str, against: str) -> None:
    """Validation losses of one workload, the mean over seeds, and the target."""
    colours = _colours(document)
    mine = [row for row in document["figures"] if row["workload"] == workload]
    ends = []
    for row in sorted(mine, key=lambda row: (row["kind"] == "learned", row["optimizer"] == REFERENCE)):
        curves = np.array([[math.nan if v is None else v for v in curve] for curve in row["valid_curves"]])
        scale = row["milliseconds"] / 1000 if against == "seconds" else 1.0
        width = 2.0 if row["kind"] == "learned" or row["optimizer"] == REFERENCE else 1.0
        dashed = "--" if row["kind"] == "control" else "-"
        mean = curves.mean(axis=0)
        panel.plot(
            np.array(row["looks"]) * scale,
            mean,
            dashed,
            color=colours[row["optimizer"]],
            linewidth=width,
            label=row["optimizer"],
        )
        ends += [mean[np.isfinite(mean)]]
    panel.axhline(mine[0]["target"], color="#888888", linewidth=0.8, linestyle=":")
    values = np.concatenate(ends)
    if values.size:
        low, high = values.min(), np.percentile([end[0] for end in ends if end.size], 75)
        if low > 0 and high > 20 * low:
            panel.set_yscale("log")
            panel.set_ylim(low / 1.2, high * 1.2)
        elif high > low:
            panel.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    panel.set_xlabel("seconds of training steps" if against == "seconds" else "step")
    panel.set_ylabel("validation loss")
