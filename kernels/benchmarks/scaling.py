"""What huginn-3.5b would do on 8, 512 and 4,096 GPUs, and how well the model meets measurement.

    python kernels/benchmarks/scaling.py

Writes results/scaling.csv, the pictures and the tables of docs/scaling.md; no GPU is needed. Run
it again whenever the model, a cluster's rates or a measured row changes: a test compares.
"""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.compose import load
from pretrain.config import TrainConfig
from pretrain.model.balance import Simulation, simulate
from pretrain.model.config import DepthConfig, Sampling, Scope
from pretrain.model.depth import step_totals
from pretrain.scaling.compute import DEEPSPEED, RowSeconds
from pretrain.scaling.estimate import Estimate, estimate, step_seconds
from pretrain.scaling.measured import (
    Comparison,
    compare,
    fitted,
    fitted_to_passes,
    read_passes,
    read_scaled,
    read_steps,
)
from pretrain.scaling.what_if import what_if

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "kernels/benchmarks/results"
PAGE = ROOT / "docs/scaling.md"
IMAGES = ROOT / "docs/images"

HUGINN = ["experiment=huginn-3.5b"]
GPUS = (8, 512, 4096)
SCOPES: dict[str, dict[str, Any]] = {
    "row, stratified and dealt": {},
    "row, independent": {"depth.sampling": Sampling.independent},
    "block of 2, stratified": {"depth.scope": Scope.block, "depth.block_rows": 2},
    "step": {"depth.scope": Scope.step},
}
ROW, STEP = "row, stratified and dealt", "step"
# of 4096 rows: the wait of one row a rank is then known to about 2 %
STEPS = 24
CAUSES = ("depth_wait", "straggler", "communication")

H200 = "NVIDIA H200"
ONE_GPU = [*HUGINN, "cluster.gpus_per_node=1", "batch.global_tokens=32768"]
# Records before 2026-11-26 are of the plain path without overlap, and predicted with the rates of
# the first.
PLAIN = [*ONE_GPU, "model.path=reference", "engine.overlap_comm=false"]
RECOMPUTED = "engine.checkpoint_activations=true"
FITTED = "2026-11-22-h200/huginn-3.5b.jsonl"
SMALL = "2026-11-22-h200/huginn-100m.jsonl"
RECORDS = {
    FITTED: [],
    "2026-11-22-h200/huginn-3.5b-checkpointed.jsonl": [RECOMPUTED],
    "2026-11-24-h200/huginn-3.5b-save.jsonl": [],
}
# Two H100s: the level of all rates is that of the same cards' run on one, nothing else is fitted.
LEVEL = "2026-11-25-2xh100/one.jsonl"
ON_TWO = {f"2026-11-25-2xh100/zero{stage}.jsonl": stage for stage in (1, 2, 3)}
# of reliability.py's runs, the steps whose speed its `zero` rows give
TIMED = range(2, 5)
# by what engine.csv calls a depth per row or step
DRAWS = {
    "row": ["depth.scope=row"],
    "independent": ["depth.scope=row", "depth.sampling=independent"],
    "step": ["depth.scope=step"],
}
# commits of rows of engine.csv whose runs took DeepSpeed's step, as all records before them did
BEFORE_OURS = {"6b15f55", "f177428"}

CHANGES: dict[str, dict[str, Any]] = {
    "as planned": {},
    "the failure rate of OPT-175B, 4.3 times as high": {
        "cluster.hardware.failures_per_gpu_hour": 8.4e-5
    },
    "a save every 16 steps": {"checkpoint.every_steps": 16},
    "saves that training waits for": {"checkpoint.asynchronous": False},
    "half the network": {"cluster.hardware.network_bytes_per_s": 2e10},
    "twice the latency of a hop": {
        "cluster.hardware.network_latency_s": 2.8e-5,
        "cluster.hardware.link_latency_s": 6.8e-6,
    },
    "buckets of 1 billion elements instead of 200 million": {
        "engine.bucket_elements": 1_000_000_000
    },
    "twice the spread between GPUs": {"cluster.hardware.gpu_spread": 0.03},
}
PLAIN_CHANGE = "the plain path instead of the fused one"
ON_FRONTIER = {
    "predicted from the published 87 % of one host": {
        "cluster.utilization": 0.87,
        "cluster.hardware.forward_utilization": 0.87,
    },
    "as shipped: 52.5 %, chosen to meet the published range": {},
}


class Clusters:
    """Configurations of the run, and the simulated depths that they share."""

    def __init__(self, steps: int = STEPS) -> None:
        """Simulate so many steps of each law."""
        self._steps = steps
        self._base: TrainConfig = load("train", HUGINN)
        self._simulations: list[tuple[DepthConfig, Simulation]] = []

    def estimate(self, gpus: int, changes: dict[str, Any]) -> Estimate:
        """The run on so many GPUs in hosts of eight."""
        config = what_if(self._base, {"cluster.nodes": gpus // 8, **changes})
        return estimate(config, self.simulate(config))

    def simulate(self, config: TrainConfig) -> Simulation:
        """The depths of the law of a configuration, simulated once."""
        for depth, simulation in self._simulations:
            if depth == config.depth:
                return simulation
        rows, seed = config.rows_per_step, config.run.seed
        made = simulate(config.depth, seed=seed, rows=rows, steps=self._steps)
        self._simulations.append((config.depth, made))
        return made


def scope_rows(clusters: Clusters) -> list[dict[str, str]]:
    """One row per number of GPUs, ZeRO stage and scope; the columns of results/scaling.csv."""
    rows = []
    for gpus in GPUS:
        for stage in (1, 2, 3):
            for scope, changes in SCOPES.items():
                if stage > 1 and scope not in (ROW, STEP):
                    continue
                engine = {"engine.zero_stage": stage, "engine.overlap_comm": stage < 3}
                expected = clusters.estimate(gpus, {**engine, **changes})
                rows.append(
                    {"gpus": f"{gpus}", "zero": f"{stage}", "scope": scope, **_row(expected)}
                )
    return rows


def _row(expected: Estimate) -> dict[str, str]:
    step, total_s = expected.step, expected.step.total_s
    shares = {cause: f"{getattr(step, f'{cause}_s') / total_s:.4f}" for cause in CAUSES}
    return {
        "tokens_per_s": f"{expected.tokens_per_s:.0f}",
        "step_s": f"{total_s:.3f}",
        "idle": f"{step.idle:.4f}",
        **shares,
        "mtbf_hours": f"{expected.interruptions.mtbf_s / 3600:.1f}",
        "best_every_steps": f"{expected.best_every_steps}",
        "goodput": f"{expected.goodput:.4f}",
        "hours": f"{expected.hours:.1f}",
    }


def scope_table(rows: Iterable[dict[str, str]]) -> str:
    """Scopes at each number of GPUs under ZeRO-1."""
    lines = [
        "| GPUs | one depth per | tokens/s | of a GPU | idle | wait by depth | stragglers "
        "| communication | goodput | days |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["zero"] != "1":
            continue
        gpus, speed = int(row["gpus"]), float(row["tokens_per_s"])
        lines.append(
            f"| {gpus:,} | {row['scope']} | {speed:,.0f} | {speed / gpus:,.0f} | "
            f"{_percent(row['idle'])} | "
            + " | ".join(_percent(row[cause]) for cause in CAUSES)
            + f" | {_percent(row['goodput'])} | {float(row['hours']) / 24:,.1f} |"
        )
    return "\n".join(lines)


def stage_table(rows: Iterable[dict[str, str]]) -> str:
    """ZeRO stages at each number of GPUs, the best of the scopes and the default."""
    found = {(row["gpus"], row["zero"], row["scope"]): row for row in rows}
    lines = [
        "| GPUs | one depth per | ZeRO-1 | ZeRO-2 | ZeRO-3 |",
        "|---|---|---|---|---|",
    ]
    for gpus in GPUS:
        for scope in (ROW, STEP):
            cells = []
            for stage in (1, 2, 3):
                row = found[f"{gpus}", f"{stage}", scope]
                cells.append(f"{float(row['tokens_per_s']):,.0f} ({_percent(row['idle'])} idle)")
            lines.append(f"| {gpus:,} | {scope} | {' | '.join(cells)} |")
    return "\n".join(lines)


def change_table(clusters: Clusters) -> str:
    """What another assumption would do at 4,096 GPUs with scope `step`."""
    lines = [
        "| at 4,096 GPUs, scope step | tokens/s | idle | goodput | saves near the best | days |",
        "|---|---|---|---|---|---|",
    ]
    for change, changes in (CHANGES | {PLAIN_CHANGE: plain_rates()}).items():
        found = clusters.estimate(GPUS[-1], SCOPES[STEP] | changes)
        lines.append(
            f"| {change} | {found.tokens_per_s:,.0f} | {found.step.idle:.1%} | "
            f"{found.goodput:.1%} | every {found.best_every_steps} steps "
            f"| {found.hours / 24:,.1f} |"
        )
    return "\n".join(lines)


def plain_rates() -> dict[str, float]:
    """The plain path's utilizations, by the first record, as changes of a configuration."""
    config = load("train", PLAIN)
    found = fitted(config, read_steps(RESULTS / FITTED, config), DEEPSPEED).cluster
    return {
        "cluster.utilization": found.utilization,
        "cluster.hardware.forward_utilization": found.hardware.forward_utilization,
    }


def plain(overrides: list[str]) -> TrainConfig:
    """A run of the plain path on one GPU at its own rates."""
    return what_if(load("train", [*PLAIN, *overrides]), plain_rates())


def comparisons() -> dict[str, Comparison]:
    """Predicted and measured seconds of every recorded step."""
    found = {}
    for name, overrides in RECORDS.items():
        config = plain(overrides)
        found[name] = compare(config, read_steps(RESULTS / name, config), DEEPSPEED)
    small = ["experiment=huginn-100m", "batch.global_tokens=65536", "model.path=reference"]
    config = load("train", small)
    found[SMALL] = compare(config, read_steps(RESULTS / SMALL, config), DEEPSPEED)
    one = plain([RECOMPUTED])
    level = 1 + compare(one, read_steps(RESULTS / LEVEL, one), DEEPSPEED).bias
    for name, stage in ON_TWO.items():
        changes = {"cluster.gpus_per_node": 2, "engine.zero_stage": stage}
        two = what_if(one, {"cluster.gpu_flops": level * one.cluster.gpu_flops, **changes})
        found[name] = compare(two, read_steps(RESULTS / name, two), DEEPSPEED)
    return found


def check_table(found: dict[str, Comparison]) -> str:
    """How well steps of one H200 and of two H100s are predicted."""
    lines = [
        "| record | rates | steps | measured | predicted | error of the total | largest of a step "
        "| R2 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, comparison in found.items():
        measured, predicted = comparison.measured, comparison.predicted
        rates = "fitted to it" if name == FITTED else "the same"
        if name in ON_TWO or name == SMALL:
            rates = f"the same, level {'of one card' if name in ON_TWO else 'fitted to it'}"
        lines.append(
            f"| `{name}` | {rates} | {len(measured)} "
            f"| {measured.mean():.2f} s | {predicted.mean():.2f} s | {comparison.bias:+.1%} "
            f"| {np.abs(comparison.errors).max():.1%} | {comparison.explained:.3f} |"
        )
    return "\n".join(lines)


def scaled_table(path: Path) -> str:
    """Speed on several GPUs against one, measured and predicted; says so where nothing is."""
    found = read_scaled(path, plain([RECOMPUTED]), steps=TIMED, moved=DEEPSPEED)
    if not found:
        return (
            "No run on several GPUs has rows in `kernels/benchmarks/results/reliability.csv` yet."
        )
    lines = [
        "| GPUs | stage | tokens/s over as many times one GPU's: measured | predicted |",
        "|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row.gpus} x {row.gpu} | ZeRO-{row.zero_stage} | {row.measured:.3f} "
            f"| {row.predicted:.3f} |"
        )
    return "\n".join(lines)


def published_table(clusters: Clusters) -> str:
    """The published run on 4,096 half MI250X, from its own speed on one host."""
    lines = ["| 4,096 half MI250X, scope step, recomputed | tokens/s of each |", "|---|---|"]
    words = ["cluster=frontier", RECOMPUTED, "engine.overlap_comm=false"]
    frontier = load("train", [*HUGINN, *words])
    for name, changes in ON_FRONTIER.items():
        config = what_if(frontier, SCOPES[STEP] | changes)
        speed = estimate(config, clusters.simulate(config)).tokens_per_s / config.cluster.ranks
        lines.append(f"| {name} | {speed:,.0f} |")
    lines.append("| published (arXiv 2502.05171) | 244 to 293 |")
    return "\n".join(lines)


def fit_table() -> str:
    """The two rates of each path, what they were fitted to, and how far off they are there."""
    lines = [
        "| path | fitted to | TFLOP/s without gradient | with | seconds of a row "
        "| largest residual |",
        "|---|---|---|---|---|---|",
    ]
    config = load("train", ONE_GPU)
    passes = read_passes(RESULTS / "step.csv", config, gpu=H200)
    found = fitted_to_passes(config, passes)
    ideal = RowSeconds.of(found).at(passes.no_grad, passes.with_grad, 0)
    worst = np.abs(ideal / passes.seconds - 1).max()
    source = f"{len(passes.seconds)} passes of one row, `step.csv`"
    lines.append(f"| fused | {source} | {_rates(found)} | {worst:.2%} |")
    config = plain([])
    errors = compare(config, read_steps(RESULTS / FITTED, config), DEEPSPEED).errors
    lines.append(
        f"| plain | {len(errors)} steps of 8 rows, `{Path(FITTED).name}` | {_rates(config)} "
        f"| {np.abs(errors).max():.2%} |"
    )
    return "\n".join(lines)


def _rates(config: TrainConfig) -> str:
    peak = config.cluster.gpu_flops / 1e12
    shares = (config.cluster.hardware.forward_utilization, config.cluster.utilization)
    row = RowSeconds.of(config)
    terms = f"{row.once_s:.4f} + {row.no_grad_s:.4f} n + {row.with_grad_s:.4f} k"
    rates = [f"{share * peak:.0f} ({share:.3f} of {peak:.0f})" for share in shares]
    return " | ".join([*rates, terms])


def engine_runs() -> list[tuple[dict[str, str], float]]:
    """Rows of results/engine.csv, with what is predicted for their steps at the realised depths."""
    with (RESULTS / "engine.csv").open(encoding="utf-8", newline="") as file:
        rows = [
            row for row in csv.DictReader(file) if row["gpu"] == H200 and row["precision"] == "bf16"
        ]
    found = []
    for row in rows:
        gpus, accumulation = int(row["gpus"]), int(row["accumulation"])
        config = load("train", [
            *HUGINN, f"engine=zero{row['zero']}-bf16", *DRAWS[row["scope"]],
            f"engine.overlap_comm={row['overlap']}",
            f"cluster.gpus_per_node={gpus}", f"batch.global_tokens={4096 * gpus * accumulation}",
        ])  # fmt: skip
        count, first = config.rows_per_step, int(row["warm_steps"])
        totals = np.stack([
            step_totals(config.depth, seed=config.run.seed, first_row=step * count, rows=count)
            for step in range(first, first + int(row["steps"]))
        ])  # fmt: skip
        moved = DEEPSPEED if row["commit"] in BEFORE_OURS else None
        found.append((row, float(step_seconds(config, totals, moved).sum())))
    return found


def engine_table() -> str:
    """Whole steps of the fused path through the engine, whose passes alone were fitted.

    Runs alike are one line.
    """
    lines = [
        "| GPUs | stage | overlap | one depth per | micro-steps | update | runs | tokens/s of a "
        "GPU: measured | predicted | error of the total time | outside of passes: measured "
        "| predicted |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    alike: dict[tuple[str, ...], list[tuple[dict[str, str], float]]] = {}
    for row, predicted_s in engine_runs():
        key = (
            row["gpus"], f"ZeRO-{row['zero']}", "yes" if row["overlap"] == "true" else "no",
            "row, independent" if row["scope"] == "independent" else row["scope"],
            row["accumulation"], "DeepSpeed" if row["commit"] in BEFORE_OURS else "ours",
        )  # fmt: skip
        # on one GPU nothing is reduced
        key = (*key[:2], "", *key[3:]) if key[0] == "1" else key
        alike.setdefault(key, []).append((row, predicted_s))
    for key, runs in sorted(alike.items(), key=lambda item: (item[0][5], item[0])):
        seconds = sum(float(row["seconds"]) for row, _ in runs)
        tokens = sum(float(r["tokens_per_s_per_gpu"]) * float(r["seconds"]) for r, _ in runs)
        ideal_s = sum(float(row["share_of_bare"]) * float(row["seconds"]) for row, _ in runs)
        predicted_s = sum(predicted for _, predicted in runs)
        lines.append(
            f"| {' | '.join(key)} | {len(runs)} | {tokens / seconds:,.0f} "
            f"| {tokens / predicted_s:,.0f} | {predicted_s / seconds - 1:+.1%} "
            f"| {1 - ideal_s / seconds:.1%} "
            f"| {1 - ideal_s / predicted_s:.1%} |"
        )
    return "\n".join(lines)


def _percent(share: str) -> str:
    return f"{float(share):.1%}"


def tables(clusters: Clusters, rows: list[dict[str, str]]) -> dict[str, str]:
    """Everything between the markers of the page, by marker."""
    return {
        "scopes": scope_table(rows),
        "stages": stage_table(rows),
        "changes": change_table(clusters),
        "fit": fit_table(),
        "engine": engine_table(),
        "check": check_table(comparisons()),
        "several": scaled_table(RESULTS / "reliability.csv"),
        "published": published_table(clusters),
    }


def replace_tables(page: str, found: dict[str, str]) -> str:
    """The page with other tables between its markers."""
    for name, text in found.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        assert page.count(begin) == page.count(end) == 1, name
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def plot(rows: list[dict[str, str]], found: dict[str, Comparison], folder: Path) -> None:
    """Two small pictures: idle shares by scope and size; predicted against measured steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    for axes, gpus in zip(figure.subplots(1, len(GPUS), sharey=True), GPUS, strict=True):
        chosen = [row for row in rows if row["gpus"] == f"{gpus}" and row["zero"] == "1"]
        base: NDArray[np.float64] = np.zeros(len(chosen))
        for cause in CAUSES:
            shares = np.array([float(row[cause]) for row in chosen])
            axes.bar(range(len(chosen)), shares, bottom=base, label=cause.replace("_", " "))
            base = base + shares
        axes.set_title(f"{gpus:,} GPUs, ZeRO-1", fontsize=9)
        names = [row["scope"].replace(", ", "\n").replace(" and dealt", "") for row in chosen]
        axes.set_xticks(range(len(chosen)), names, fontsize=6)
        axes.tick_params(axis="y", labelsize=7)
    figure.axes[0].set_ylabel("idle share of a step", fontsize=8)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(folder / "scaling-idle.png", dpi=110)

    figure = Figure(figsize=(4.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, comparison in found.items():
        if "100m" not in name:
            cards = "2 x H100, " if name in ON_TWO else ""
            label = f"{cards}{Path(name).stem} {'fitted' if name == FITTED else 'predicted'}"
            axes.plot(comparison.measured, comparison.predicted, "o", markersize=4, label=label)
    axes.axline((12, 12), slope=1, color="grey", linewidth=0.8)
    axes.set_xlabel("measured seconds of a step", fontsize=8)
    axes.set_ylabel("predicted", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=6)
    figure.savefig(folder / "scaling-check.png", dpi=110)


def main() -> None:
    """Write the rows, the pictures and the page's tables."""
    clusters = Clusters()
    rows = scope_rows(clusters)
    with (RESULTS / "scaling.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, comparisons(), IMAGES)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(replace_tables(page, tables(clusters, rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
