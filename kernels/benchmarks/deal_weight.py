"""What another weight of the deal would be worth: the wait of the slowest rank, simulated.

    python kernels/benchmarks/deal_weight.py

Rows are dealt to ranks by n + w k, and take a + b n + c k, fitted to one row of the commit in
step.csv that has most depths. Ranks meet once a step (ZeRO-1). Rows go to deal-weight.csv below
`results`, which is written anew. No GPU is needed, and every machine finds the same.
"""

import csv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from measurements import RESULTS, append
from pass_times import Fit
from pretrain.compose import load
from pretrain.model import depth as depths
from pretrain.model.balance import Layout, simulate, slowest_rank

TABLE = RESULTS / "deal-weight.csv"
WEIGHTS = (4, 3)
RANKS = {"huginn-3.5b": (2, 8, 64, 512), "huginn-100m": (8,)}
STEPS, SEED = 64, 0


def fits(table: Path) -> dict[str, tuple[Fit, str]]:
    """Of the fused 3.5 B model by what it multiplies in, and the commit that was measured."""
    measured: dict[tuple[str, str], dict[tuple[int, int], float]] = defaultdict(dict)
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            is_one = (
                row["preset"] == "huginn-3.5b" and row["path"] == "fused" and row["rows"] == "1"
            )
            if is_one and "H200" in row["gpu"] and row["no_grad"].isdigit():
                precision = row["precision"] + " recomputed" * bool(row["kept_iterations"])
                pair = int(row["no_grad"]), int(row["with_grad"])
                measured[precision, row["commit"]][pair] = 4096 / float(row["tokens_per_s_per_gpu"])
    found: dict[str, tuple[Fit, str]] = {}
    # of equally many depths the last, which is the newest
    for (precision, commit), seconds in sorted(measured.items(), key=lambda item: len(item[1])):
        if fit := Fit.of(seconds):
            found[precision] = fit, commit
    return found


def waits(preset: str, ranks: int, found: dict[str, tuple[Fit, str]]) -> Iterator[dict[str, Any]]:
    """One row for each weight and precision."""
    config = load("train", [f"experiment={preset}"], resumes=False)
    layout = Layout(ranks=ranks, micro_rows=1, zero_stage=1)
    for weight in WEIGHTS:
        with patch.object(depths, "WITH_GRAD_COST", weight):
            dealt = simulate(config.depth, seed=SEED, rows=config.rows_per_step, steps=STEPS)
        with_grad = np.minimum(dealt.totals, config.depth.backprop)
        for precision, (fit, commit) in found.items():
            a, b, c = fit.terms
            seconds = a + b * (dealt.totals - with_grad) + c * with_grad
            slowest = slowest_rank(seconds, layout).sum() * ranks / seconds.sum()
            yield {
                "preset": preset, "rows": config.rows_per_step, "ranks": ranks,
                "precision": precision, "gradient_over_none": f"{c / b:.2f}", "weight": weight,
                "wait_percent": f"{100 * (slowest - 1):.2f}", "steps": STEPS, "passes_of": commit,
            }  # fmt: skip


def main() -> None:
    """Simulate, print and keep."""
    found = fits(RESULTS / "step.csv")
    TABLE.unlink(missing_ok=True)
    for preset, counts in RANKS.items():
        for ranks in counts:
            for row in waits(preset, ranks, found):
                append(TABLE, row)
                print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
