"""Pictures of what learning.py found, from its tables alone.

    python kernels/benchmarks/learning_plots.py

Reads results/learning*.csv, writes docs/images/learning-*.png; what has no rows is not drawn.
`results=FOLDER` and `images=FOLDER` name others.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from learning_runs import DEEP_RATES, GROUPS, SEEDS
from measurements import RESULTS
from pretrain.loop.plots import smooth

IMAGES = Path(__file__).parents[2] / "docs/images"
MAIN = {
    "recurrent": "recurrent",
    "fixed-equal-parameters": "fixed depth, equal parameters",
    "fixed-equal-flops": "fixed depth, equal training FLOPs",
    **{f"fixed-equal-flops-{rate}": f"the same, rate {rate}" for rate in DEEP_RATES},
}
LAWS = {
    "rows-dealt": "rows, dealt",
    "rows-independent": "rows, independent",
    "one-depth-a-step": "one depth a step",
}

Row = dict[str, str]


def main(words: Sequence[str]) -> list[Path]:
    """Draw all that there are numbers for; returns the files."""
    told = dict(word.partition("=")[::2] for word in words)
    if unknown := told.keys() - {"results", "images"}:
        raise SystemExit(f"{', '.join(unknown)}: give results=FOLDER or images=FOLDER, or nothing.")
    results, images = Path(told.get("results", RESULTS)), Path(told.get("images", IMAGES))
    tables = {name: read(results / f"{name}.csv") for name in
              ("learning", "learning-losses", "learning-depths", "learning-noise")}  # fmt: skip
    names = {row["run"] for row in tables["learning"]}
    drawn = []
    if names & MAIN.keys():
        drawn += [plot_tokens(tables, images), plot_depths(tables, images)]
    if names & set(GROUPS["sampling"]):
        drawn.append(plot_sampling(tables, images))
    for path in drawn:
        print(path)
    return drawn


def read(path: Path) -> list[Row]:
    """The rows of a table; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def of(table: list[Row], run: str) -> list[Row]:
    """The rows of a run."""
    return [row for row in table if row["run"] == run]


def mean_depth(summary: Row) -> int:
    """Of a run: "poisson_lognormal 16/8 ..." has 16."""
    return int(summary["depth"].split()[1].split("/")[0])


def curve(depths: list[Row], run: str, depth: int) -> tuple[list[float], list[float]]:
    """Tokens and held-out loss at one depth, of the measurements during training."""
    rows = [row for row in of(depths, run) if int(row["depth"]) == depth]
    fewest = min((int(row["rows"]) for row in rows), default=0)
    rows = [row for row in rows if int(row["rows"]) == fewest]
    return [float(row["tokens"]) for row in rows], [float(row["loss"]) for row in rows]


def last(depths: list[Row], run: str) -> dict[int, float]:
    """Held-out loss by depth, at the end, of most rows."""
    rows = of(depths, run)
    most = max(((int(row["tokens"]), int(row["rows"])) for row in rows), default=(0, 0))
    return {int(row["depth"]): float(row["loss"]) for row in rows
            if (int(row["tokens"]), int(row["rows"])) == most}  # fmt: skip


def plot_tokens(tables: dict[str, list[Row]], images: Path) -> Path:
    """Loss against tokens, and against the FLOPs that they took."""
    figure, both = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for number, (run, name) in enumerate(MAIN.items()):
        for summary in of(tables["learning"], run):
            steps = of(tables["learning-losses"], run)
            tokens = [float(row["tokens"]) for row in steps]
            losses = smooth([float(row["loss"]) for row in steps])
            held_out = curve(tables["learning-depths"], run, mean_depth(summary))
            size = f"{int(summary['parameters']) / 1e6:.0f} M"
            per_token = float(summary["gflop_per_token"]) * 1e9
            for axes, scale in ((both[0], 1e-6), (both[1], per_token * 1e-15)):
                axes.plot([t * scale for t in tokens], losses, color=f"C{number}", linewidth=1,
                          label=f"{name} ({size})")  # fmt: skip
                axes.plot([t * scale for t in held_out[0]], held_out[1], "o", markersize=4,
                          color=f"C{number}")  # fmt: skip
    # the first tenth falls from ln(vocabulary) and would flatten all that follows
    later = [float(row["loss"]) for run in MAIN for row in skip_tenth(tables, run)]
    both[0].set(xlabel="million tokens", ylabel="nats per token", ylim=(
        min(later) - 0.1, max(later) + 0.1))  # fmt: skip
    both[1].set(xlabel="training PFLOPs", xscale="log")
    both[0].set_title("training loss; dots: held out, at the run's own depth", fontsize=9)
    for axes in both:
        axes.grid(alpha=0.3)
    both[0].legend(fontsize=8)
    return save(figure, images / "learning-tokens.png")


def skip_tenth(tables: dict[str, list[Row]], run: str) -> list[Row]:
    """The steps of a run without the first of them."""
    steps = of(tables["learning-losses"], run)
    return steps[len(steps) // 10 :]


def plot_depths(tables: dict[str, list[Row]], images: Path) -> Path:
    """Held-out loss against the depth at test time; of equal FLOPs the best rate."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    ends = {run: last(tables["learning-depths"], run) for run in MAIN}
    ends = {run: found for run, found in ends.items() if found}
    deep = [run for run in ends if run.startswith("fixed-equal-flops")]
    best = min(deep, key=lambda run: ends[run][1], default="")
    ticks: set[int] = set()
    for number, run in enumerate(run for run in ends if run not in deep or run == best):
        found, summary = ends[run], of(tables["learning"], run)[0]
        ticks |= found.keys()
        tokens = max(float(row["tokens"]) for row in of(tables["learning-depths"], run)) / 1e6
        at = f", rate {float(summary['learning_rate']):.0e}" if run == best else ""
        name = MAIN["fixed-equal-flops"] + at if run == best else MAIN[run]
        axes.plot(list(found), list(found.values()), marker="o", color=f"C{number}",
                  label=f"{name}, {tokens:.1f} M tokens")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [str(depth) for depth in sorted(ticks)])
    # who was trained at depth 1 may be lost behind it; the picture is of the others
    shown = list(ends.get("recurrent", {}).values())
    shown += [ends[run][1] for run in ends if run not in deep or run == best]
    margin = 0.1 * (max(shown) - min(shown)) + 0.01
    axes.set_ylim(min(shown) - margin, max(shown) + 4 * margin)
    axes.set(xlabel="iterations of the core at test time", ylabel="held-out nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return save(figure, images / "learning-depths.png")


def plot_sampling(tables: dict[str, list[Row]], images: Path) -> Path:
    """Ways to draw depths: held-out loss, the noise of the gradient, the time of a pass."""
    figure, (losses, noise, times) = plt.subplots(1, 3, figsize=(12, 3.8))
    for number, (law, name) in enumerate(LAWS.items()):
        for seed in SEEDS:
            run = f"{law}-{seed}"
            for summary in of(tables["learning"], run):
                losses.plot(*curve(tables["learning-depths"], run, mean_depth(summary)),
                            marker="o", markersize=3, color=f"C{number}",
                            linestyle=("-", "--")[seed],
                            label=name if seed == SEEDS[0] else None)  # fmt: skip
    losses.set(xlabel="tokens", ylabel="held-out nats at the mean depth")
    losses.set_title("solid and dashed: two seeds", fontsize=9)
    losses.legend(fontsize=8)
    for number, name in enumerate(LAWS.values()):
        rows = [row for row in tables["learning-noise"] if row["depths"] == name]
        for shift, run in enumerate(sorted({row["run"] for row in rows})):
            own = {row["rows"]: row for row in of(rows, run)}
            share = float(own["same"]["noise"]) / float(own["other"]["noise"])
            error = float(own["same"]["standard_error"]) / float(own["other"]["noise"])
            place = number + 0.4 * shift
            noise.bar(place, share, 0.35, yerr=error, color=f"C{number}", alpha=1 - 0.4 * shift)
            noise.text(place, share + error, run, fontsize=6, rotation=90, va="bottom", ha="center")
            pass_s, deviation = (float(own["other"][key]) for key in ("pass_s", "pass_s_deviation"))
            times.bar(place, pass_s, 0.35, yerr=deviation, color=f"C{number}",
                      alpha=1 - 0.4 * shift)  # fmt: skip
    noise.set_title("share of a step's gradient noise that depths make", fontsize=9)
    noise.margins(y=0.4)
    times.set_title("s of a pass, and its deviation from step to step", fontsize=9)
    for axes in (noise, times):
        axes.set_xticks(range(len(LAWS)), [name.replace(", ", ",\n") for name in LAWS.values()])
        axes.tick_params(axis="x", labelsize=8)
    for axes in (losses, noise, times):
        axes.grid(alpha=0.3)
    return save(figure, images / "learning-sampling.png")


def save(figure: plt.Figure, path: Path) -> Path:
    """Small enough for a repository."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
