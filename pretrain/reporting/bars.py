"""Bars side by side as inline SVG: shares of a whole by class, and what was expected of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.reporting.numbers import in_percent
from pretrain.reporting.scale import Kind, fit
from pretrain.reporting.svg import text_of

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 40
# Of a class's width, what its bars fill.
_FILLED = 0.72


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """One share for each class."""

    shares: Sequence[float]
    colour: str
    """A CSS colour."""
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BarChart:
    """Classes on one axis, shares on the other."""

    classes: Sequence[str]
    bars: Sequence[Bars]
    expected: Bars | None
    """Drawn as a mark across each class."""
    x_label: str
    width: int = 520
    height: int = 250
    description: str = ""
    """For those who do not see it."""


def draw_bars(chart: BarChart) -> str:
    """The chart as an <svg> element; empty if there is nothing to draw."""
    drawn = [*chart.bars, *([chart.expected] if chart.expected else [])]
    shares = [share for bars in drawn for share in bars.shares]
    if not shares or not max(shares) > 0:
        return ""
    bottom, right = chart.height - _BOTTOM, chart.width - _RIGHT
    y = fit([0.0, *shares], Kind.linear, start=bottom, stop=_TOP, pad=0.06)
    parts = []
    for value in y.ticks(5):
        at = f"{y(value):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at}" y2="{at}"/>')
        shown = text_of(in_percent(value))
        parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{at}" dy=".32em">{shown}</text>')
    step = (right - _LEFT) / len(chart.classes)
    for index, name in enumerate(chart.classes):
        parts.append(_class(chart, index, y(0.0), [y(s.shares[index]) for s in drawn], step))
        middle = _LEFT + (index + 0.5) * step
        label = f'x="{middle:.1f}" y="{bottom + 16}"'
        parts.append(f'<text class="tick middle" {label}>{text_of(name)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    label = f'x="{(_LEFT + right) / 2}" y="{chart.height - 6}"'
    parts.append(f'<text class="label middle" {label}>{text_of(chart.x_label)}</text>')
    return (
        f'<svg viewBox="0 0 {chart.width} {chart.height}" role="img" '
        f'aria-label="{text_of(chart.description)}">{"".join(parts)}</svg>'
    )


def _class(
    chart: BarChart, index: int, bottom: float, heights: Sequence[float], step: float
) -> str:
    """The bars of one class and the mark across them; all say their values when pointed at."""
    drawn = [*chart.bars, *([chart.expected] if chart.expected else [])]
    said = [f"{each.label} {in_percent(each.shares[index])}" for each in drawn]
    title = f"<title>{text_of('; '.join([chart.classes[index], *said]))}</title>"
    left, wide = _LEFT + (index + (1 - _FILLED) / 2) * step, _FILLED * step / len(chart.bars)
    parts = [
        f'<rect style="fill:{bars.colour}" x="{left + at * wide:.1f}" width="{wide * 0.94:.1f}" '
        f'y="{top:.1f}" height="{bottom - top:.1f}">{title}</rect>'
        for at, (bars, top) in enumerate(zip(chart.bars, heights, strict=False))
    ]
    if chart.expected:
        at = f"{heights[-1]:.1f}"
        ends = f'x1="{_LEFT + index * step + 2:.1f}" x2="{_LEFT + (index + 1) * step - 2:.1f}"'
        style = f'style="stroke:{chart.expected.colour}"'
        parts.append(f'<line class="curve" {style} {ends} y1="{at}" y2="{at}">{title}</line>')
    return "".join(parts)
