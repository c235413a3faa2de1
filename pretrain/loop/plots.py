"""Pictures of a run's record: loss against tokens, and held-out loss against depth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator, StrMethodFormatter

from pretrain.loop.metrics import read_metrics

_INK = "#1f2933"
_TRAINING = "#9aa5b1"
_MOST_EARLIER = 20
# Depths from shallow to deep, and validations from early to late, share one order of colours.
_SEQUENCE = matplotlib.colormaps["viridis_r"]


def plot_run(run_dir: Path) -> list[Path]:
    """Draws what <run_dir>/metrics.jsonl has so far into <run_dir>/plots; returns the files.

    Raises DataError if the record is missing or damaged.
    """
    records = read_metrics(run_dir / "metrics.jsonl")
    steps = [record for record in records if "loss/nats" in record]
    validations = [record for record in records if "validation/loss_nats" in record]
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    paths = []
    if steps:
        paths.append(_plot_tokens(folder / "loss-by-tokens.png", steps, validations))
    if validations:
        paths.append(_plot_depths(folder / "loss-by-depth.png", validations))
    return paths


def plot_depth_curve(
    path: Path, depths: Sequence[int], losses_nats: Sequence[float], *, title: str
) -> Path:
    """Draws held-out loss against depth, one measurement; returns `path`."""
    figure, axes = _figure(title)
    _draw_depth_curve(axes, depths, losses_nats, label=None)
    _finish_depth_axes(axes, depths)
    return _save(figure, path)


def smooth(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean over a centred window of about a fortieth of the curve; non-finite values are left out.

    The window shrinks at both ends, so the curve starts and ends where the data do.
    """
    array = np.asarray(values, dtype=np.float64)
    is_finite = np.isfinite(array)
    totals = np.concatenate([[0.0], np.cumsum(np.where(is_finite, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_finite)])
    centre = np.arange(len(array))
    reach = np.minimum(max(1, len(array) // 80), np.minimum(centre, len(array) - 1 - centre))
    first, last = centre - reach, centre + reach + 1
    window = counts[last] - counts[first]
    means = (totals[last] - totals[first]) / np.maximum(window, 1)
    return np.where(window > 0, means, np.nan)


def _plot_tokens(
    path: Path, steps: list[dict[str, Any]], validations: list[dict[str, Any]]
) -> Path:
    figure, axes = _figure("Loss during training")
    tokens = [record["tokens"] for record in steps]
    losses = [record["loss/nats"] for record in steps]
    axes.plot(tokens, losses, color=_TRAINING, alpha=0.35, linewidth=0.8)
    axes.plot(tokens, smooth(losses), color=_TRAINING, linewidth=2, label="training, random depth")
    depths = sorted({depth for record in validations for depth in record["validation/depths"]})
    for index, depth in enumerate(depths):
        at_depth = [
            (record["tokens"], nats)
            for record in validations
            for other, nats in zip(
                record["validation/depths"], record["validation/loss_nats"], strict=True
            )
            if other == depth
        ]
        axes.plot(
            *zip(*at_depth, strict=True),
            color=_colour(index, len(depths)),
            marker="o",
            markersize=4,
            linewidth=1.5,
            label=f"held out, depth {depth}",
        )
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=9)
    return _save(figure, path)


def _plot_depths(path: Path, validations: list[dict[str, Any]]) -> Path:
    figure, axes = _figure("Held-out loss by depth")
    *earlier, last = validations
    earlier = earlier[:: 1 + len(earlier) // _MOST_EARLIER]
    for index, record in enumerate(earlier):
        axes.plot(
            *_by_depth(record["validation/depths"], record["validation/loss_nats"]),
            color=_colour(index, len(earlier) + 1),
            alpha=0.45,
            linewidth=1.2,
            label=_moment(record) if index == 0 else None,
        )
    _draw_depth_curve(
        axes, last["validation/depths"], last["validation/loss_nats"], label=_moment(last)
    )
    _finish_depth_axes(axes, sorted({d for v in validations for d in v["validation/depths"]}))
    axes.legend(frameon=False, fontsize=9, title="after")
    return _save(figure, path)


def _draw_depth_curve(
    axes: Axes, depths: Sequence[int], losses: Sequence[float], *, label: str | None
) -> None:
    axes.plot(
        *_by_depth(depths, losses), color=_INK, marker="o", markersize=5, linewidth=2, label=label
    )
    for depth, nats in zip(depths, losses, strict=True):
        if np.isfinite(nats):
            axes.annotate(
                f"{nats:.3f}",
                (depth, nats),
                textcoords="offset points",
                xytext=(0, -9),
                ha="center",
                va="top",
                fontsize=8,
                color=_INK,
            )


def _by_depth(
    depths: Sequence[int], losses: Sequence[float]
) -> tuple[Sequence[int], Sequence[float]]:
    """From shallow to deep, in whatever order they were asked for."""
    ascending = sorted(zip(depths, losses, strict=True))
    return [depth for depth, _ in ascending], [nats for _, nats in ascending]


def _finish_depth_axes(axes: Axes, depths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(depths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("depth (iterations of the core)")
    axes.margins(y=0.12)


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, color=_INK)
    axes.set_ylabel("loss (nats per token)")
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    """A Figure without pyplot draws with Agg and touches no global state."""
    figure.savefig(path, dpi=150)
    return path


def _colour(index: int, count: int) -> tuple[float, float, float, float]:
    return _SEQUENCE(0.15 + 0.85 * index / max(1, count - 1))


def _moment(record: dict[str, Any]) -> str:
    return EngFormatter(unit="tokens", places=1)(record["tokens"])
