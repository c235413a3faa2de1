"""Line charts as inline SVG, without scripts: what is pointed at is shown by CSS alone."""

import html
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pretrain.reporting.numbers import plain
from pretrain.reporting.scale import Kind, Scale, fit
from pretrain.reporting.thin import thin

# what XML 1.0 cannot hold, not even escaped
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 40
# places that show their values when pointed at
_SLOTS = 64
_LINE_HEIGHT = 15
# beyond the usual ones; more do not fit beside the axis
_MOST_DIGITS = 4
_SHOWN_LINES = 9


class Show(Protocol):
    """How a value is written; `more` asks for so many digits beyond the usual ones."""

    def __call__(self, value: float, /, *, more: int = 0) -> str:
        """The text."""


def text_of(value: object) -> str:
    """Any value as text that HTML and SVG take for text, whatever is in it."""
    return html.escape(_ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", str(value)), quote=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    """A CSS colour."""
    label: str = ""
    is_faint: bool = False
    """Context behind the others; it has no place in what is shown on pointing."""
    is_dashed: bool = False
    has_dots: bool = False
    is_dots_only: bool = False
    errors: Sequence[float | None] = ()
    """Half the length of a bar at each point, or None for no bar; empty: no bars."""

    def reach(self) -> Iterator[float]:
        """The values and the ends of their bars: what an axis must hold."""
        yield from self.y
        for value, error in zip(self.y, self.errors, strict=False):
            yield from (value - (error or 0.0), value + (error or 0.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """An event at one place of the x axis."""

    x: float
    label: str
    colour: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Curves over one pair of axes."""

    lines: Sequence[Line]
    x_label: str
    marks: Sequence[Mark] = ()
    x_kind: Kind = Kind.linear
    y_kind: Kind = Kind.linear
    show_x: Show = plain
    show_y: Show = plain
    width: int = 520
    height: int = 250
    y_limits: tuple[float, float] = (-math.inf, math.inf)
    """Beyond them no value means anything: a linear axis and error bars end there at the latest."""
    x_ticks: Sequence[float] = field(default_factory=tuple)
    """In place of round ones."""
    is_labelled: bool = False
    """Write the values of the last line at its points."""
    has_pointers: bool = True
    """Show values when pointed at; only where every line's x ascends."""
    description: str = ""
    """For those who do not see it."""


def draw(chart: Chart) -> str:
    """The chart as an <svg> element; empty if no curve has a finite value."""
    drawable = [line for line in chart.lines if any(math.isfinite(value) for value in line.y)]
    if not drawable:
        return ""
    has_bars = any(line.errors for line in drawable)
    x = fit(
        (value for line in drawable for value in line.x),
        chart.x_kind,
        start=_LEFT,
        stop=chart.width - _RIGHT,
        # points in a plane may lie at any edge; a curve begins and ends at the axes
        pad=0.07 if chart.is_labelled or not chart.has_pointers or has_bars else 0.0,
    )
    y = fit(
        (value for line in drawable for value in line.reach()),
        chart.y_kind,
        start=chart.height - _BOTTOM,
        stop=_TOP,
        pad=0.14 if chart.is_labelled else 0.06,
        limits=chart.y_limits,
    )
    parts = [_axes(chart, x, y)]
    parts += [_mark(mark, x, chart) for mark in chart.marks if x.low <= mark.x <= x.high]
    parts += [_error_bars(line, x, y) for line in drawable]
    parts += [_curve(line, x, y, buckets=chart.width) for line in drawable]
    if chart.is_labelled:
        parts.append(_point_labels(drawable[-1], x, y, chart.show_y))
    if chart.has_pointers:
        parts.append(_pointers(chart, [line for line in drawable if not line.is_faint], x))
    return (
        f'<svg viewBox="0 0 {chart.width} {chart.height}" role="img" '
        f'aria-label="{text_of(chart.description)}">{"".join(parts)}</svg>'
    )


def _axes(chart: Chart, x: Scale, y: Scale) -> str:
    bottom, right = chart.height - _BOTTOM, chart.width - _RIGHT
    parts = []
    for value, shown in apart(y.ticks(5), chart.show_y):
        at = f"{y(value):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at}" y2="{at}"/>')
        shown = text_of(shown)
        parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{at}" dy=".32em">{shown}</text>')
    for value, shown in apart(chart.x_ticks or x.ticks(chart.width // 90), chart.show_x):
        at, shown = f"{x(value):.1f}", text_of(shown)
        parts.append(f'<text class="tick middle" x="{at}" y="{bottom + 16}">{shown}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    label = f'x="{(_LEFT + right) / 2}" y="{chart.height - 6}"'
    parts.append(f'<text class="label middle" {label}>{text_of(chart.x_label)}</text>')
    return "".join(parts)


def apart(values: Sequence[float], show: Show) -> list[tuple[float, str]]:
    """Values as they are shown, with as many digits as tell each from the others."""
    texts: list[str] = []
    for more in range(_MOST_DIGITS):
        texts = [show(value, more=more) for value in values]
        if len(set(texts)) == len(values):
            break
    return list(zip(values, texts, strict=True))


def _mark(mark: Mark, x: Scale, chart: Chart) -> str:
    at = f"{x(mark.x):.1f}"
    return (
        f'<line class="mark" style="stroke:{mark.colour}" x1="{at}" x2="{at}" y1="{_TOP}" '
        f'y2="{chart.height - _BOTTOM}"><title>{text_of(mark.label)}</title></line>'
    )


def _curve(line: Line, x: Scale, y: Scale, *, buckets: int) -> str:
    """The curve, broken where it is not finite; such places are crosses at the top."""
    pieces: list[list[str]] = [[]]
    crosses = []
    for index in thin(line.y, buckets).tolist():
        at, value = x(line.x[index]), line.y[index]
        if math.isfinite(value) and (value > 0 or y.kind is Kind.linear):
            pieces[-1].append(f"{at:.1f},{y(value):.1f}")
            continue
        pieces.append([])
        if not math.isfinite(value):
            title = f"<title>{text_of(line.label)}: {text_of(plain(value))}</title>"
            crosses.append(f'<text class="cross" x="{at:.1f}" y="{_TOP + 4}">×{title}</text>')
    classes = "curve" + " faint" * line.is_faint + " dashed" * line.is_dashed
    drawn = []
    for piece in pieces:
        if len(piece) > 1 and not line.is_dots_only:
            points = " ".join(piece)
            style = f'style="stroke:{line.colour}"'
            drawn.append(f'<polyline class="{classes}" {style} points="{points}"/>')
        if line.has_dots or line.is_dots_only or len(piece) == 1:
            drawn += [_dot(point, line.colour) for point in piece]
    return "".join(drawn + crosses)


def _error_bars(line: Line, x: Scale, y: Scale) -> str:
    return "".join(
        f'<line style="stroke:{line.colour}" x1="{x(at):.1f}" x2="{x(at):.1f}" '
        f'y1="{y(max(value - error, y.low)):.1f}" y2="{y(min(value + error, y.high)):.1f}"/>'
        for at, value, error in zip(line.x, line.y, line.errors, strict=False)
        if error and math.isfinite(value) and math.isfinite(error)
    )


def _dot(point: str, colour: str) -> str:
    at, height = point.split(",")
    return f'<circle r="2.6" cx="{at}" cy="{height}" style="fill:{colour}"/>'


def _point_labels(line: Line, x: Scale, y: Scale, show: Show) -> str:
    return "".join(
        f'<text class="tick middle strong" x="{x(at):.1f}" y="{y(value) - 9:.1f}">'
        f"{text_of(show(value))}</text>"
        for at, value in zip(line.x, line.y, strict=True)
        if math.isfinite(value)
    )


def _pointers(chart: Chart, lines: Sequence[Line], x: Scale) -> str:
    """Invisible stripes; the one that is pointed at shows the values there."""
    if not lines:
        return ""
    longest = max(lines, key=lambda line: len(line.x))
    slots = min(_SLOTS, len(longest.x))
    places = [longest.x[round(n * (len(longest.x) - 1) / max(1, slots - 1))] for n in range(slots)]
    pixels = [x(place) for place in places]
    parts = []
    for number, (place, pixel) in enumerate(zip(places, pixels, strict=True)):
        before = pixels[number - 1] if number else 2 * _LEFT - pixel
        after = pixels[number + 1] if number + 1 < slots else 2 * (chart.width - _RIGHT) - pixel
        left, right = sorted(((before + pixel) / 2, (after + pixel) / 2))
        parts.append(_pointer(chart, lines, place, pixel, left, max(right - left, 1.0)))
    return "".join(parts)


def _pointer(
    chart: Chart, lines: Sequence[Line], place: float, pixel: float, left: float, width: float
) -> str:
    bottom = chart.height - _BOTTOM
    rows = [f"{chart.x_label.split(' (')[0]} {chart.show_x(place)}"]
    for line in lines[:_SHOWN_LINES]:
        value = _nearest(line, place)
        rows.append(f"{line.label} {chart.show_y(value)}".strip())
    wide = 12 + 6.3 * max(len(row) for row in rows)
    box_x = pixel + 8 if pixel + 8 + wide < chart.width else pixel - 8 - wide
    texts = "".join(
        f'<text x="{box_x + 6:.0f}" y="{_TOP + 16 + n * _LINE_HEIGHT}">{text_of(row)}</text>'
        for n, row in enumerate(rows)
    )
    return (
        f'<g class="point"><rect class="hit" x="{left:.1f}" width="{width:.1f}" y="{_TOP}" '
        f'height="{bottom - _TOP}"/><g class="shown"><line class="rule" x1="{pixel:.1f}" '
        f'x2="{pixel:.1f}" y1="{_TOP}" y2="{bottom}"/><rect class="box" x="{box_x:.0f}" '
        f'y="{_TOP + 2}" width="{wide:.0f}" height="{8 + len(rows) * _LINE_HEIGHT}" rx="4"/>'
        f"{texts}</g></g>"
    )


def _nearest(line: Line, place: float) -> float:
    """The curve's value nearest to a place; its x ascends."""
    low, high = 0, len(line.x) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if line.x[middle] <= place else (low, middle)
    return line.y[low if abs(line.x[low] - place) <= abs(line.x[high] - place) else high]
