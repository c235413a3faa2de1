"""Scores of tasks against depth: a chart for each task, and a table with standard errors."""

import math
from collections.abc import Sequence
from typing import Any

from pretrain.reporting.charts import figure, legend, run_colour
from pretrain.reporting.numbers import counted, in_percent, plain
from pretrain.reporting.run import Run
from pretrain.reporting.scale import Kind
from pretrain.reporting.svg import Chart, Line, draw
from pretrain.reporting.tables import table

_NATS = "nats_per_"


def score_charts(runs: Sequence[Run]) -> list[str]:
    """The first measure of each task, by depth, of the runs that have it; bars: standard errors."""
    names = sorted({each["task"] for run in runs for each in run.scores})
    return [_task_chart(name, runs) for name in names]


def _task_chart(name: str, runs: Sequence[Run]) -> str:
    found = [
        (index, run, each)
        for index, run in enumerate(runs)
        for each in run.scores
        if each["task"] == name
    ]
    measure = next(iter(found[0][2]["scores"]))
    lines = [
        _line(each, measure, run_colour(index), run.name)
        for index, run, each in found
        if measure in each["scores"]
    ]
    ticks = sorted({value for line in lines for value in line.x})
    is_share = not measure.startswith(_NATS)
    chart = Chart(
        lines=lines,
        x_label="depth (iterations of the core)",
        x_kind=Kind.log2,
        x_ticks=ticks[:: 1 + len(ticks) // 10],
        show_y=in_percent if is_share else plain,
        y_limits=(0.0, 1.0) if is_share else (-math.inf, math.inf),
        description=f"{name}: {measure} against depth",
    )
    items = counted(found[0][2].get("items", 0), "item")
    note = f"{measure.replace('_', ' ')}, {items}; bars: one standard error"
    return figure(name, draw(chart), note=note, keys=legend(lines) if len(runs) > 1 else "")


def _line(summary: dict[str, Any], measure: str, colour: str, label: str) -> Line:
    score = summary["scores"][measure]
    points = sorted(zip(summary["depths"], score["value"], score["standard_error"], strict=True))
    return Line(
        x=[depth for depth, _, _ in points],
        y=[value for _, value, _ in points],
        errors=[error for _, _, error in points],
        colour=colour,
        label=label,
        has_dots=True,
    )


def score_table(runs: Sequence[Run]) -> str:
    """Every measure of every task, a column for each depth."""
    summaries = [(run, each) for run in runs for each in run.scores]
    depths = sorted({depth for _, each in summaries for depth in each["depths"]})
    rows = [
        [
            *([run.name] if len(runs) > 1 else []),
            each["task"],
            measure.replace("_", " "),
            f"{each.get('items', 0):,}",
            f"{each['step']:,}",
            *(_cell(each["depths"], score, depth, measure) for depth in depths),
        ]
        for run, each in summaries
        for measure, score in each["scores"].items()
    ]
    who = ["run"] if len(runs) > 1 else []
    head = [*who, "task", "measure", "items", "step", *(f"r = {depth}" for depth in depths)]
    return table(head, rows, numbers=2 + len(depths))


def _cell(depths: Sequence[int], score: dict[str, Any], depth: int, measure: str) -> str:
    if depth not in depths:
        return "–"
    at = depths.index(depth)
    value, error = score["value"][at], score["standard_error"][at]
    if measure.startswith(_NATS):
        return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
    return f"{value:.1%}" + (f" ± {error:.1%}" if error is not None else "")
