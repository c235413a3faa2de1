"""The picture of the README's first screen: depths of rows, loss by depth, speed of a step.

    python kernels/benchmarks/overview.py

Deals the depths of one step, reads results/learning*.csv and results/step.csv, writes
docs/images/overview.png.
"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from learning_plots import last, of, read
from pretrain.model.config import DepthConfig, Law
from pretrain.model.depth import step_depths
from step_plots import SUSTAINED_S

HERE = Path(__file__).parent
IMAGE = HERE.parents[1] / "docs/images/overview.png"
RECURRENT, FIXED = "recurrent", "fixed-equal-parameters"
STEPS = HERE / "results/step.csv"
# path and precision of results/step.csv
PATHS = {
    "plain PyTorch": ("reference", "bf16"),
    "torch.compile": ("compiled", "bf16"),
    "ours, bf16": ("fused", "bf16"),
    "ours, float8 where\nno gradient flows": ("fused", "fp8-prefix"),
}
ROWS = 16
LIGHT, DARK, GREY = "#a9c1ea", "#2b4c9b", "#b8bcc6"


def main() -> None:
    """Draw it."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.3))
    plot_depths(left)
    plot_curve(middle)
    plot_speed(right)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    figure.tight_layout(w_pad=2.5)
    figure.savefig(IMAGE, dpi=110)
    plt.close(figure)


def plot_depths(axes: Axes) -> None:
    """The first rows of a step under the published law, deepest first, aligned at the end."""
    law = DepthConfig(law=Law.poisson_lognormal, mean=32, backprop=8)
    depths = step_depths(law, seed=0, first_row=0, rows=ROWS)
    for place, depth in enumerate(sorted(depths, reverse=True)):
        axes.barh(place, depth.no_grad, left=-depth.total, color=LIGHT)
        axes.barh(place, depth.with_grad, left=-depth.with_grad, color=DARK)
    axes.invert_yaxis()
    axes.set(
        title="a depth for every row, nothing wasted",
        xlabel="iterations before the end", ylabel=f"the {ROWS} rows of a step", yticks=[],
    )  # fmt: skip
    axes.text(0.03, 0.20, "no gradient", color="#5f83c7", transform=axes.transAxes)
    axes.text(0.03, 0.09, "gradient: the last 8", color=DARK, transform=axes.transAxes)


def plot_curve(axes: Axes) -> None:
    """Held-out loss of one model, iterated more or less often, and of one that never iterates."""
    results = HERE / "results"
    [summary] = of(read(results / "learning.csv"), RECURRENT)
    table = read(results / "learning-depths.csv")
    found, fixed = last(table, RECURRENT), last(table, FIXED)[1]
    depths, losses = list(found), list(found.values())
    axes.plot(depths, losses, marker="o", color=DARK)
    for place in (0, 1, 3, len(depths) - 1):
        axes.annotate(
            f"{losses[place]:.2f}", (depths[place], losses[place]),
            xytext=(4, 6), textcoords="offset points", fontsize=8,
        )  # fmt: skip
    axes.axhline(fixed, color=GREY)
    axes.text(depths[-1], fixed, f"same layers, trained to run once: {fixed:.2f}",
              fontsize=8, ha="right", va="bottom", color="grey")  # fmt: skip
    size, tokens = int(summary["parameters"]) / 1e6, int(summary["tokens"]) / 1e6
    said = f"{size:.0f} M parameters\nafter {tokens:.1f} M tokens"
    axes.text(0.55, 0.7, said, fontsize=9, transform=axes.transAxes)
    axes.set_xscale("log", base=2)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.set(
        title="the same weights, iterated longer",
        xlabel="iterations at test time", ylabel="held-out loss, nats a token",
        ylim=(min(losses) - 0.05, max(losses) + 0.1),
    )  # fmt: skip


def plot_speed(axes: Axes) -> None:
    """The newest sustained measurement of each path."""
    found = speeds()
    for place, (name, speed) in enumerate(found.items()):
        axes.barh(place, speed, color=DARK if name.startswith("ours") else GREY, height=0.65)
        axes.text(speed - 90, place, f"{speed:,.0f}", color="white", va="center", ha="right")
    axes.invert_yaxis()
    axes.set_yticks(range(len(found)), list(found))
    axes.set(title="a step of 3.5 B on one H200", xlabel="tokens/s, forward and backward")


def speeds() -> dict[str, float]:
    """tokens/s by path, at one row of 4,096 tokens on one H200: the newest of sustained work."""
    conditions = {
        "preset": "huginn-3.5b", "gpu": "NVIDIA H200", "zero": "0", "rows": "1",
        "no_grad": "24", "with_grad": "8",
    }  # fmt: skip
    with STEPS.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if conditions.items() <= row.items()]
    sustained = {
        (row["path"], row["precision"]): float(row["tokens_per_s_per_gpu"])
        for row in rows
        if float(row["sustained_s"]) >= SUSTAINED_S
    }
    return {name: sustained[key] for name, key in PATHS.items()}


if __name__ == "__main__":
    main()
