"""Scatter plots as inline SVG, without scripts or dependencies. Knows numbers and labels, not what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

WIDTH, HEIGHT = 520, 420
LEFT, RIGHT, TOP, BOTTOM = 62, 120, 30, 46
# told apart by shape as well, for those who see no colours
COLOURS = ("#2e7d5b", "#b3541e", "#3b5b92", "#7a3b92")
INK, FAINT = "#1c2530", "#d7dde4"
TICKS = 6


@dataclass(frozen=True)
class Point:
    """A mark at (x, y) with a name beside it; ``kind`` chooses shape and colour and stands in the legend.

    ``low`` and ``high``: an interval of y, drawn as a whisker.
    """

    x: float
    y: float
    name: str
    kind: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Chart:
    """A plot's words, its diagonal and its lines.

    ``band`` = 0.15 draws y = x and shades what lies from 0.85 x to 1.15 x; None draws neither. ``joined`` draws a line
    through the points of each kind, in the order in which they are given.
    """

    title: str
    x: str
    y: str
    band: float | None = None
    joined: bool = False


def scatter(chart: Chart, points: Sequence[Point]) -> str:
    """One <svg> element."""
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    return f'<svg role="img" {size} xmlns="http://www.w3.org/2000/svg">{_inside(chart, points)}</svg>'


def page(charts: Sequence[tuple[Chart, Sequence[Point]]]) -> str:
    """A file of its own: the plots side by side on white."""
    width = WIDTH * len(charts)
    parts = [f'<g transform="translate({WIDTH * place} 0)">{_inside(*each)}</g>' for place, each in enumerate(charts)]
    return (
        f'<svg role="img" width="{width}" height="{HEIGHT}" xmlns="http://www.w3.org/2000/svg" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{INK}">'
        f'<rect width="{width}" height="{HEIGHT}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover ``low`` to ``high``, about ``TICKS`` of them."""
    raw = (high - low) / (TICKS - 1)
    power = 10.0 ** floor(log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = floor(low / step + 1e-9)
    found = [first * step]
    while found[-1] < high - 1e-9 * step:
        found.append((first + len(found)) * step)
    return found


@dataclass(frozen=True)
class _Axis:
    """A range of values on a range of pixels."""

    marks: list[float]
    start: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        low, high = min(values), max(values)
        room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
        return cls(ticks(low - room, high + room), start, end)

    def __call__(self, value: float) -> float:
        low, high = self.marks[0], self.marks[-1]
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def _inside(chart: Chart, points: Sequence[Point]) -> str:
    title = f'<text x="{LEFT}" y="18" font-weight="600">{escape(chart.title)}</text>'
    if not points:
        return f'{title}<text x="{LEFT}" y="{TOP + 30}">nothing to show</text>'
    xs = [point.x for point in points]
    ys = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    if chart.band is not None:
        # the same range on both axes, so that the diagonal is one
        xs = ys = xs + ys
    x, y = _Axis.of(xs, LEFT, WIDTH - RIGHT), _Axis.of(ys, HEIGHT - BOTTOM, TOP)
    parts = [title, *_frame(chart, x, y)]
    if chart.band is not None:
        parts += _diagonal(chart.band, x, y)
    kinds = list(dict.fromkeys(point.kind for point in points))
    if chart.joined:
        parts += [_line([p for p in points if p.kind == kind], x, y, place) for place, kind in enumerate(kinds)]
    parts += [_mark(point, x, y, kinds.index(point.kind)) for point in points]
    for place, kind in enumerate(kinds):
        middle = TOP + 12 + 18 * place
        parts.append(_shape(WIDTH - RIGHT + 14, middle, place))
        parts.append(f'<text x="{WIDTH - RIGHT + 24}" y="{middle + 4}" font-size="12">{escape(kind)}</text>')
    return "".join(parts)


def _frame(chart: Chart, x: _Axis, y: _Axis) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in x.marks:
        at = f"{x(value):.1f}"
        parts.append(f'<path d="M{at} {TOP}V{bottom}" stroke="{FAINT}"/>')
        parts.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="middle" font-size="11">{value:.4g}</text>')
    for value in y.marks:
        at = f"{y(value):.1f}"
        parts.append(f'<path d="M{LEFT} {at}H{right}" stroke="{FAINT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy="4" text-anchor="end" font-size="11">{value:.4g}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(chart.x)}</text>')
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(chart.y)}</text>'
    )
    return parts


def _diagonal(band: float, x: _Axis, y: _Axis) -> list[str]:
    """y = x and what lies within ``band`` of it, cut at the frame."""
    low, high = x.marks[0], x.marks[-1]
    steps = [low + (high - low) * i / 60 for i in range(61)]

    def line(slope: float) -> list[str]:
        return [f"{x(value):.1f},{y(min(max(slope * value, low), high)):.1f}" for value in steps]

    area = " ".join(line(1 - band) + line(1 + band)[::-1])
    ends = f"M{x(low):.1f} {y(low):.1f}L{x(high):.1f} {y(high):.1f}"
    return [
        f'<polygon points="{area}" fill="{INK}" fill-opacity="0.08"/>',
        f'<path d="{ends}" stroke="{INK}" stroke-dasharray="4 3"/>',
    ]


def _line(points: Sequence[Point], x: _Axis, y: _Axis, place: int) -> str:
    corners = " ".join(f"{x(point.x):.1f},{y(point.y):.1f}" for point in points)
    return f'<polyline points="{corners}" fill="none" stroke="{COLOURS[place % len(COLOURS)]}"/>'


def _mark(point: Point, x: _Axis, y: _Axis, place: int) -> str:
    across, up = x(point.x), y(point.y)
    tip = f"<title>{escape(f'{point.name}, {point.kind}: {point.x:.4g}, {point.y:.4g}')}</title>"
    whisker = ""
    if point.low is not None and point.high is not None:
        colour = COLOURS[place % len(COLOURS)]
        whisker = f'<path d="M{across:.1f} {y(point.low):.1f}V{y(point.high):.1f}" stroke="{colour}"/>'
    name = f'<text x="{across + 7:.1f}" y="{up - 5:.1f}" font-size="11">{escape(point.name)}</text>'
    return f"<g>{tip}{whisker}{_shape(across, up, place)}{name}</g>"


def _shape(x: float, y: float, place: int) -> str:
    colour = COLOURS[place % len(COLOURS)]
    if place % 2 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>'
