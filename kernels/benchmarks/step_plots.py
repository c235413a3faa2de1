"""Pictures of the measured step: tokens/s against rows, milliseconds of a row by class, and whole
steps on several GPUs.

    python kernels/benchmarks/step_plots.py

Reads results/step.csv, results/2026-11-26-h200/step-profile-*.csv and results/engine.csv, writes
docs/images/step-*.png.
"""

import csv
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from step_profile import class_of

HERE = Path(__file__).parent
IMAGES = HERE.parents[1] / "docs/images"
GPU = "NVIDIA H200"
SUSTAINED_S = 8.0
NAMES = {
    ("reference", "bf16"): "plain modules",
    ("compiled", "bf16"): "torch.compile",
    ("fused", "bf16"): "fused, bf16",
    ("fused", "fp8-prefix"): "fused, float8 without gradient",
    ("fused", "fp8"): "fused, float8 everywhere",
}
CLASSES = (
    "matrix product", "float8 product", "attention", "rotary and SwiGLU", "norm chain", "quantize",
    "copies and fills", "cross-entropy", "elementwise and other",
)  # fmt: skip
# of one row: what was profiled, by the name of its file
PROFILES = {"fused-1": ("fused", "bf16"), "fused-fp8-1": ("fused", "fp8-prefix"),
            "fused-fp8-all-1": ("fused", "fp8")}  # fmt: skip


def main() -> None:
    """Draw all."""
    plot_rows()
    plot_classes()
    plot_gpus()


def plot_rows() -> None:
    """The newest measurement of each path at each number of rows that was sustained for a while."""
    with (HERE / "results/step.csv").open() as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["preset"] == "huginn-3.5b"
            and float(row["sustained_s"]) >= SUSTAINED_S
            and (row["gpu"], row["zero"], row["no_grad"], row["with_grad"]) == (GPU, "0", "24", "8")
        ]
    curves: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        curves[row["path"], row["precision"]][int(row["rows"])] = float(row["tokens_per_s_per_gpu"])
    figure, axes = plt.subplots(figsize=(6, 3.4))
    for key, name in NAMES.items():
        points = sorted(curves[key].items())
        axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=name)
    axes.set(
        xlabel="rows of 4,096 tokens", ylabel="tokens/s", ylim=(0, 5200), xticks=[1, 2, 3, 4],
        title="huginn-3.5b, (24, 8) iterations, forward and backward, one H200",
    )  # fmt: skip
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")
    save(figure, "step-rows.png")


def plot_classes() -> None:
    """Milliseconds of kernels for one row."""
    figure, axes = plt.subplots(figsize=(6, 2.6))
    files = list(PROFILES)[::-1]
    for index, file in enumerate(files):
        own, left = classes(file), 0.0
        for number, name in enumerate(CLASSES):
            label = name if index == 0 else None
            axes.barh(index, own[name], left=left, color=f"C{number}", label=label)
            left += own[name]
        axes.text(left + 8, index, f"{left:.0f} ms", va="center", fontsize=8)
    axes.set_yticks(range(len(files)), [NAMES[PROFILES[file]] for file in files], fontsize=8)
    axes.set(xlabel="ms of kernels for a row of 4,096 tokens", xlim=(0, 1330))
    axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.4, 1.26), ncol=4)
    save(figure, "step-classes.png")


def classes(profile: str) -> dict[str, float]:
    """Milliseconds of each class of kernels; what a name says today, not when it was profiled."""
    found = dict.fromkeys(CLASSES, 0.0)
    with (HERE / f"results/2026-11-26-h200/step-profile-{profile}.csv").open() as file:
        for row in csv.DictReader(file):
            found[class_of(row["kernel"])] += float(row["total_us"]) / 1e3
    return found


def plot_gpus() -> None:
    """Where a step of one micro-step and of eight goes, by stage, on one to four GPUs."""
    with (HERE / "results/engine.csv").open(newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            # the parts of a step are there since cards are
            if (row["gpu"], row["precision"], row["scope"]) == (GPU, "bf16", "step")
            and row["cards"]
            and row["overlap"] == ("false" if row["zero"] == "3" else "true")
        ]
    figure, both = plt.subplots(1, 2, figsize=(9, 2.9), sharey=True)
    for axes, accumulation in zip(both, ("1", "8"), strict=True):
        alike: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
        for row in rows:
            if row["accumulation"] == accumulation:
                alike[row["gpus"], row["zero"]].append(parts(row))
        keys = sorted(alike, reverse=True)
        for index, key in enumerate(keys):
            left = 0.0
            for number, name in enumerate(alike[key][0]):
                width = 100 * statistics.mean(own[name] for own in alike[key])
                label = name if index == 0 and axes is both[0] else None
                axes.barh(index, width, left=left, color=f"C{number}", label=label)
                left += width
        names = [f"{gpus} GPU{'s' * (gpus != '1')}, ZeRO-{stage}" for gpus, stage in keys]
        axes.set_yticks(range(len(keys)), names, fontsize=8)
        steps = "one micro-step" if accumulation == "1" else "eight micro-steps"
        axes.set(xlabel="% of a step", xlim=(85, 100))
        axes.set_title(f"huginn-3.5b, a depth per step, {steps}", fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
    figure.legend(fontsize=7, loc="upper center", ncol=4, bbox_to_anchor=(0.5, 1.06))
    save(figure, "step-gpus.png")


def parts(row: dict[str, str]) -> dict[str, float]:
    """Shares of a step; they add up to 1."""
    step_s = float(row["seconds"]) / int(row["steps"])
    update, wait = float(row["update_s"]) / step_s, float(row["wait_s"]) / step_s
    passes = float(row["share_of_bare"])
    return {
        "bare passes": passes,
        "update, gathering weights": update,
        "meeting after the last pass": wait,
        "sums, reductions, slower cards": 1 - passes - update - wait,
    }


def save(figure: plt.Figure, name: str) -> None:
    """Small enough for a repository."""
    figure.savefig(IMAGES / name, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
