"""Small charts as SVG text: lines and intervals, coloured by the page's style sheet, readable on a telephone."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_WIDTH, _HEIGHT = 440, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 34
_POINTS = 150  # a line at most


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        label: shown when the pointer rests on it.
        style: class names for the style sheet.
        x: increasing.
        y: of the same length; gaps where not finite.
    """

    label: str
    style: str
    x: np.ndarray
    y: np.ndarray


class Span(NamedTuple):
    """An estimate with its interval, a row of a chart."""

    label: str
    style: str
    value: float
    low: float
    high: float


class Axis(NamedTuple):
    """An axis from ``low`` to ``high``, linear or logarithmic."""

    label: str
    low: float
    high: float
    log: bool = False

    def place(self, values: np.ndarray | float) -> np.ndarray:
        """Where values lie, 0 at ``low`` and 1 at ``high``."""
        values = np.asarray(values, float)
        if not self.log:
            return (values - self.low) / (self.high - self.low)
        with np.errstate(divide="ignore", invalid="ignore"):
            return (np.log(values) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))

    def ticks(self) -> list[float]:
        """Round values, three to about seven of them."""
        if self.log:
            low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            every = max((high - low) // 5, 1)
            mantissas = (
                (1,)
                if high - low > 3
                else (1, 3)
                if math.log10(self.high / self.low) > 1.3
                else (1, 1.5, 2, 3, 4, 5, 7)
            )
            candidates = [m * 10.0**power for power in range(low, high + 1, every) for m in mantissas]
        else:
            rough = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
            first = math.ceil(self.low / step - 1e-9)
            candidates = [step * (first + k) for k in range(20)]
        return [value for value in candidates if -1e-9 <= self.place(value) <= 1 + 1e-9]


def lines(series: Sequence[Line], x: Axis, y: Axis, title: str) -> str:
    """A chart of lines; what leaves the axes is cut off.

    Args:
        series: drawn in this order, the last on top.
        x: the horizontal axis.
        y: the vertical axis.
        title: for readers who cannot see it.

    Returns:
        An ``<svg>`` element.
    """
    body = [_frame(x, y)]
    for line in series:
        path = _path(x.place(line.x), y.place(line.y))
        body.append(f'<path class="line {line.style}" d="{path}"><title>{html.escape(line.label)}</title></path>')
    return _svg(title, _HEIGHT, "".join(body))


def spans(rows: Sequence[Span], x: Axis, title: str, mark: float) -> str:
    """A chart of estimates with intervals, one a row from the top.

    Args:
        rows: the estimates.
        x: the axis.
        title: for readers who cannot see it.
        mark: a value that gets a line from top to bottom.

    Returns:
        An ``<svg>`` element.
    """
    left, step = 128, 19
    height = _TOP + step * len(rows) + _BOTTOM
    bottom = height - _BOTTOM

    def across(value: float) -> float:
        return left + float(np.clip(x.place(value), 0, 1)) * (_WIDTH - _RIGHT - left)

    body = []
    for tick in x.ticks():
        body.append(_rule(across(tick), _TOP, across(tick), bottom) + _text(across(tick), bottom + 14, _number(tick)))
    body.append(f'<line class="mark" x1="{across(mark):.1f}" y1="{_TOP}" x2="{across(mark):.1f}" y2="{bottom}"/>')
    for index, row in enumerate(rows):
        height_of_row = _TOP + step * (index + 0.5)
        told = html.escape(f"{row.label}: {row.value:.2f} ({row.low:.2f} to {row.high:.2f})")
        body.append(
            f'<g class="{row.style}"><title>{told}</title>'
            f'<line class="span" x1="{across(row.low):.1f}" x2="{across(row.high):.1f}" '
            f'y1="{height_of_row:.1f}" y2="{height_of_row:.1f}"/>'
            f'<circle cx="{across(row.value):.1f}" cy="{height_of_row:.1f}" r="3.6"/></g>'
        )
        body.append(_text(left - 8, height_of_row + 4, row.label, "end"))
    body.append(_text((left + _WIDTH - _RIGHT) / 2, height - 4, x.label))
    return _svg(title, height, "".join(body))


def thin(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve by a few points: ``(steps from 1, values)``, the last step always among them."""
    steps = np.unique(np.round(np.linspace(1, len(values), min(_POINTS, len(values)))).astype(int))
    return steps.astype(float), values[steps - 1]


def _frame(x: Axis, y: Axis) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in y.ticks():
        height = _TOP + (1 - float(y.place(tick))) * (bottom - _TOP)
        parts.append(_rule(_LEFT, height, right, height) + _text(_LEFT - 6, height + 4, _number(tick), "end"))
    for tick in x.ticks():
        across = _LEFT + float(x.place(tick)) * (right - _LEFT)
        anchor = "end" if across > right - 12 else "middle"
        parts.append(_text(across, bottom + 14, _number(tick), anchor))
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 4, x.label))
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text transform="translate(11 {middle:.0f}) rotate(-90)" text-anchor="middle">{html.escape(y.label)}</text>'
    )
    return "".join(parts)


def _path(across: np.ndarray, up: np.ndarray) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    shown = np.isfinite(across) & np.isfinite(up) & (up <= 1.3)
    horizontal = _LEFT + across * (right - _LEFT)
    vertical = _TOP + (1 - np.clip(up, -0.02, 1.3)) * (bottom - _TOP)
    words, pen = [], "M"
    for ok, h, v in zip(shown, horizontal, vertical, strict=True):
        if not ok:
            pen = "M"
            continue
        words.append(f"{pen}{h:.1f} {max(v, _TOP):.1f}")
        pen = "L"
    return "".join(words)


def _svg(title: str, height: float, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{html.escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="rule" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _number(value: float) -> str:
    """A tick's label: as short as it can be, powers of ten where it would be long."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.6g}"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    superscript = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    mantissa = value / 10.0**power
    return f"10{superscript}" if abs(mantissa - 1) < 1e-6 else f"{mantissa:.3g}·10{superscript}"
