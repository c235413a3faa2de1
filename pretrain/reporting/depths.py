"""The depths that were drawn, beside the law that they are drawn from."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from pretrain.loop.step_metrics import HISTOGRAM_EDGES
from pretrain.model.config import DepthConfig
from pretrain.model.depth import DepthLaw, means_of_run, settled
from pretrain.reporting.bars import BarChart, Bars, draw_bars
from pretrain.reporting.charts import figure, legend_key, run_colour
from pretrain.reporting.numbers import plain
from pretrain.reporting.run import Run

# A class at the end is left out if no run has so much of its rows there.
_LEAST_SHARE = 5e-4
_LAW_COLOUR = "var(--ink)"


def depth_chart(runs: Sequence[Run]) -> str:
    """Shares of rows by depth, of all steps that count; of one run also what its law says."""
    counted = [(index, run) for index, run in enumerate(runs) if sum(run.record.depth_counts)]
    if not counted:
        return ""
    drawn = [
        Bars(
            shares=[count / sum(run.record.depth_counts) for count in run.record.depth_counts],
            colour=run_colour(index),
            label="drawn" if len(runs) == 1 else run.name,
        )
        for index, run in counted
    ]
    law, note = None, "share of rows, so far"
    if len(runs) == 1:
        rows = sum(runs[0].record.depth_counts)
        expected = expected_shares(runs[0].config.depth, rows)
        law = Bars(shares=expected, colour=_LAW_COLOUR, label="law")
        note = f"{note}; {_means(runs[0])}"
    shown = _used([*drawn, *([law] if law else [])])
    chart = BarChart(
        classes=_classes()[:shown],
        bars=[dataclasses.replace(bars, shares=bars.shares[:shown]) for bars in drawn],
        expected=law and dataclasses.replace(law, shares=law.shares[:shown]),
        x_label="depth (iterations of the core)",
        description="share of rows by depth",
    )
    keys = "".join(
        legend_key(bars.label, bars.colour) for bars in [*drawn, *([law] if law else [])]
    )
    return figure(
        "Depths of all rows", draw_bars(chart), note=note, keys=f'<span class="keys">{keys}</span>'
    )


def expected_shares(config: DepthConfig, rows: int) -> list[float]:
    """What the law of a run of so many rows says of each bin of depth/histogram."""
    total = np.zeros(len(HISTOGRAM_EDGES) - 1)
    for mean, share in means_of_run(config, rows):
        law = DepthLaw.of(dataclasses.replace(settled(config), mean=mean))
        below = [0.0 if edge == 0 else _cdf(law, edge) for edge in HISTOGRAM_EDGES]
        total += share * np.diff(below)
    found: list[float] = total.tolist()
    return found


def _cdf(law: DepthLaw, depth: int) -> float:
    return float(law.cdf[min(depth, len(law.cdf)) - 1])


def _means(run: Run) -> str:
    series, rows = run.record.series.get("depth/mean"), sum(run.record.depth_counts)
    means = means_of_run(run.config.depth, rows)
    law = settled(run.config.depth)
    expected = sum(
        share * DepthLaw.of(dataclasses.replace(law, mean=mean)).mean for mean, share in means
    )
    drawn = plain(sum(series.values) / len(series)) if series else "–"
    return f"mean {drawn}, by the law {plain(expected)}"


def _used(bars: Sequence[Bars]) -> int:
    """Classes up to the last that matters to one of them."""
    return max(
        number
        for each in bars
        for number, share in enumerate(each.shares, start=1)
        if share >= _LEAST_SHARE
    )


def _classes() -> list[str]:
    names = []
    for below, last in pairwise(HISTOGRAM_EDGES):
        names.append(str(last) if last == below + 1 else f"{below + 1}–{last}")
    names[-1] = f"> {HISTOGRAM_EDGES[-2]}"
    return names
