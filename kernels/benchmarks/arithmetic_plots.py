"""Pictures of results/arithmetic.csv: exact answers against depth and length.

    python kernels/benchmarks/arithmetic_plots.py [table=FILE] [into=FOLDER]

arithmetic-depth.png  accuracy against depth for some lengths, one panel a run
arithmetic-map.png    accuracy over length and depth, one panel a run
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

HERE = Path(__file__).parent
IMAGES = HERE.parents[1] / "docs/images"
TABLE = HERE / "results/arithmetic.csv"
SHOWN_LENGTHS = 7

Cell = tuple[float, float]
"""Accuracy and its standard error."""
Runs = dict[str, dict[int, dict[int, Cell]]]
"""Cells by run, length and depth."""


def main() -> None:
    """Draw both from the table."""
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    for path in plot(Path(words.get("table", TABLE)), Path(words.get("into", IMAGES))):
        print(path)


def plot(table: Path, into: Path) -> list[Path]:
    """Both pictures; their paths."""
    with table.open() as file:
        rows = list(csv.DictReader(file))
    runs: Runs = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        cell = (float(row["accuracy"]), float(row["standard_error"]))
        name = f"{row['run']}, seed {row['seed']}"
        runs[name][int(row["length"])][int(row["depth"])] = cell
    trained, items = int(rows[0]["trained_digits"]), max(int(row["n"]) for row in rows)
    # tables without the column are of sums that begin with their lowest digit
    order = rows[0].get("order", "lowest")
    about = (
        f"{order} digit first, trained on operands of up to {trained} digits; "
        f"{items} sums of each length"
    )
    into.mkdir(parents=True, exist_ok=True)
    return [
        _plot_depths(runs, trained, about, into / f"{table.stem}-depth.png"),
        _plot_map(runs, trained, about, into / f"{table.stem}-map.png"),
    ]


def _plot_depths(runs: Runs, trained: int, about: str, path: Path) -> Path:
    """Lengths that training never saw are dashed."""
    figure, panels = _panels(runs, 3.4, f"Exact answers against depth, {about}")
    for name, axes in zip(runs, panels, strict=True):
        lengths = _spread(sorted(runs[name]), trained)
        for length in lengths:
            cells = sorted(runs[name][length].items())
            axes.errorbar(
                [depth for depth, _ in cells], [cell[0] for _, cell in cells],
                yerr=[cell[1] for _, cell in cells], marker="o", markersize=3, capsize=2,
                linewidth=1.3, linestyle="-" if length <= trained else "--",
                color=_color(length, lengths), label=f"{length} digits",
            )  # fmt: skip
        _name_depths(axes, [depth for depth, _ in cells])
        axes.set(title=name, ylim=(-0.03, 1.03))
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of sums that are right")
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
    return path


def _plot_map(runs: Runs, trained: int, about: str, path: Path) -> Path:
    """A cell for each length and depth; the line parts trained lengths from longer ones."""
    figure, panels = _panels(runs, 4.2, f"Exact answers by length and depth, {about}")
    for name, axes in zip(runs, panels, strict=True):
        lengths, depths = sorted(runs[name]), sorted(next(iter(runs[name].values())))
        image = axes.imshow(
            [[runs[name][length][depth][0] for depth in depths] for length in lengths],
            origin="lower", aspect="auto", cmap="viridis", norm=Normalize(0, 1),
        )  # fmt: skip
        axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
        axes.set_yticks(range(len(lengths)), [str(length) for length in lengths], fontsize=7)
        if trained in lengths[:-1]:
            axes.axhline(lengths.index(trained) + 0.5, color="white", linewidth=1.5)
        axes.set(title=name, xlabel="depth")
        axes.title.set_fontsize(9)
    panels[0].set_ylabel("digits of each operand")
    figure.colorbar(image, ax=panels, label="share of sums that are right")
    figure.savefig(path, dpi=110)
    return path


def _panels(runs: Runs, height: float, title: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(3.2 * len(runs) + 1.2, height), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    return figure, list(panels)


def _spread(lengths: list[int], trained: int) -> list[int]:
    """Some lengths from the least to the greatest, the last that was trained among them."""
    count = min(SHOWN_LENGTHS, len(lengths))
    last = len(lengths) - 1
    chosen = {lengths[round(at * last / max(count - 1, 1))] for at in range(count)}
    return sorted(chosen | ({trained} & set(lengths)))


def _color(length: int, lengths: list[int]) -> tuple[float, float, float]:
    """From blue for short ones to red for long ones."""
    share = lengths.index(length) / max(len(lengths) - 1, 1)
    return (0.15 + 0.7 * share, 0.35 * (1 - share) + 0.15, 0.75 * (1 - share) + 0.1)


def _name_depths(axes: Axes, depths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(depths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("depth")


if __name__ == "__main__":
    main()
