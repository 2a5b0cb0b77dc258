"""Line charts as inline SVG whose colours the page's style sheet gives, so that they follow light and dark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 190  # in CSS pixels on a phone; larger screens show several charts side by side
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 14, 24
MOST_POINTS = 300  # of a line; more are averaged, and their range is drawn behind them

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve."""

    label: str
    points: Sequence[Point]
    is_dots: bool = False


@dataclass(frozen=True)
class Chart:
    """One figure."""

    title: str
    series: Sequence[Series]
    level: tuple[float, str] | None = None
    marks: Sequence[tuple[float, str]] = field(default_factory=tuple)
    span: tuple[float, float] | None = None

    @property
    def drawn(self) -> list[Series]:
        """The series that have points."""
        return [series for series in self.series if series.points]

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Label and last value of each series."""
        return [(series.label, number(series.points[-1][1])) for series in self.drawn]

    def svg(self) -> Markup:
        """The drawing."""
        xs = self.span or [x for series in self.drawn for x, _ in series.points] + [x for x, _ in self.marks]
        ys = [y for series in self.drawn for _, y in series.points] + ([self.level[0]] if self.level else [])
        ticks = nice_ticks(min(ys), max(ys))
        x_ticks = [tick for tick in nice_ticks(min(xs), max(xs), 5) if min(xs) <= tick <= max(xs) and tick == int(tick)]
        scale = _Scale(min(xs), max(xs), ticks[0], ticks[-1])
        parts = [
            *(_line(scale, None, y, "grid", number(y)) for y in ticks),
            *(f'<text class="x" x="{scale.x(x):.1f}" y="{HEIGHT - 6}">{number(x)}</text>' for x in x_ticks),
            *(_line(scale, x, None, "mark", label) for x, label in self.marks),
        ]
        if self.level:
            parts.append(_line(scale, None, self.level[0], "level"))
        starts = [x for x, _ in self.marks]
        for index, series in enumerate(self.drawn):
            for points in [series.points] if series.is_dots else _split(series.points, starts):
                parts += _curve(scale, points, f"s{index}", series.is_dots)
        label = f"{self.title}: " + ", ".join(f"{name} {value}" for name, value in self.legend)
        head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        return Markup(head + "".join(parts) + "</svg>")  # nosec B704


@dataclass(frozen=True)
class _Scale:
    x_min: float
    x_max: float
    y_min: float
    y_max: float

    def x(self, value: float) -> float:
        along = (value - self.x_min) / (self.x_max - self.x_min) if self.x_max > self.x_min else 0.5
        return _LEFT + along * (WIDTH - _LEFT - _RIGHT)

    def path(self, points: Iterable[Point]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self.y_min) / (self.y_max - self.y_min) * (HEIGHT - _TOP - _BOTTOM)


def _line(scale: _Scale, x: float | None, y: float | None, kind: str, label: str = "") -> str:
    """A line across the figure, at an x or at a y, labelled at its end."""
    if y is not None:
        at = f"{scale.y(y):.1f}"
        ends = f'x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at}" y2="{at}"'
        text = f'<text class="y" x="{_LEFT - 5}" y="{scale.y(y) + 3.5:.1f}">{escape(label)}</text>'
    else:
        at = f"{scale.x(x or 0.0):.1f}"
        ends = f'x1="{at}" x2="{at}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"'
        text = f'<text class="top" x="{at}" y="{_TOP - 4}">{escape(label)}</text>'
    return f'<line class="{kind}" {ends}/>' + (text if label else "")


def _split(points: Sequence[Point], starts: Sequence[float]) -> list[list[Point]]:
    """The points between one start and the next."""
    bounds = itertools.pairwise([-math.inf, *starts, math.inf])
    parts = ([(x, y) for x, y in points if low <= x < high] for low, high in bounds)
    return [part for part in parts if part]


def _curve(scale: _Scale, points: Sequence[Point], name: str, is_dots: bool) -> list[str]:
    size = math.ceil(len(points) / MOST_POINTS)
    parts_of_line = [points[first : first + size] for first in range(0, len(points), size)]
    buckets = [(sum(x for x, _ in part) / len(part), [y for _, y in part]) for part in parts_of_line]
    middle = [(x, sum(ys) / len(ys)) for x, ys in buckets]
    parts = []
    if any(len(ys) > 1 for _, ys in buckets):
        outline = [(x, max(ys)) for x, ys in buckets] + [(x, min(ys)) for x, ys in reversed(buckets)]
        parts.append(f'<polygon class="{name}" points="{scale.path(outline)}"/>')
    parts.append(f'<polyline class="{name}" points="{scale.path(middle)}"/>')
    if is_dots or len(middle) == 1:
        parts += [f'<circle class="{name}" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="2.5"/>' for x, y in middle]
    return parts


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers, evenly spaced, that enclose a range."""
    if high - low < 1e-300:  # a quarter of less may be 0
        pad = abs(low) * 0.1 if abs(low) > 1e-290 else 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number as a person writes it, with about four digits."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return f"{value:.2g}"
