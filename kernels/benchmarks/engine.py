"""Whole optimizer steps of `pretrain train` against bare forward and backward passes.

    python kernels/benchmarks/step.py paths=fused rows=1 depths=8/8,56/8,24/4 parity=0
    python kernels/benchmarks/engine.py gpus=1 zero=1 accumulation=1,8 data=files data.root=... ...

A bare pass of a row takes a + b n + c k seconds, fitted to the rows of results/step.csv of this
machine. The share is what the realised depths of the timed steps would take by that, on ranks that
do not wait for each other, over what they took: engine, optimizer, data and waiting cost the rest.
The wait that the deal of these very steps implies is given beside it. Rows go to results/step.csv
and results/engine.csv; all words with a dot or a group are overrides of the run.
"""

import csv
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.compose import load
from pretrain.config import TrainConfig
from pretrain.model.depth import Depth, step_depths
from reliability import records, train
from step import RESULTS, append

WARM_STEPS = 2


def main() -> None:
    """Every combination of stage and accumulation."""
    options = {
        "gpus": "1", "zero": "1", "accumulation": "1,8", "path": "fused", "scope": "row",
        "seconds": "25", "precision": "same",
    }  # fmt: skip
    overrides = []
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        if key in options:
            options[key] = value
        else:
            overrides.append(word)
    gpus = int(options["gpus"])
    for stage in options["zero"].split(","):
        for accumulation in map(int, options["accumulation"].split(",")):
            setting = [
                "experiment=huginn-3.5b", f"engine=zero{stage}-bf16",
                f"model.path={options['path']}", f"model.no_grad_precision={options['precision']}",
                f"batch.global_tokens={4096 * gpus * accumulation}", "batch.micro_rows=1",
                f"depth.scope={options['scope']}", "schedule.warmup_tokens=0", "run.tokens=null",
                "run.steps=4000", "checkpoint.every_steps=100000", "validation.every_steps=100000",
                f"validation.rows={gpus}", "validation.depths=[1]", *overrides,
            ]  # fmt: skip
            name = f"engine-{gpus}-zero{stage}-{accumulation}-{options['scope']}"
            enough = Enough(float(options["seconds"]))
            run_dir = train(name, setting, gpus=gpus, until=enough)
            config = load("train", setting, resumes=False)
            report(config, records(run_dir), options, gpus, int(stage), accumulation)


class Enough:
    """Whether the timed steps of a run have lasted long enough."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.started = seconds, time.monotonic()

    def __call__(self, run_dir: Path) -> bool:
        """Asked several times a second."""
        taken = timed(records(run_dir))
        return sum(step["speed/step_s"] for step in taken) >= self.seconds and len(taken) > 2


def timed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of steps that are warm."""
    return [r for r in found if "loss/nats" in r and r["step"] > WARM_STEPS]


def bare_seconds(path: str, precision: str, kept: int | None) -> tuple[np.ndarray, float]:
    """(a, b, c) of a bare pass of one row on this card, and the largest relative residual."""
    with (RESULTS / "step.csv").open() as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["path"], row["precision"], row["rows"], row["gpus"], row["zero"])
            == (path, precision, "1", "1", "0")
            and row["gpu"] == torch.cuda.get_device_name()
            and row["kept_iterations"] == ("" if kept is None else str(kept))
        ]
    terms = np.array([[1, int(r["no_grad"]), int(r["with_grad"])] for r in rows], dtype=float)
    seconds = np.array([4096 / float(r["tokens_per_s_per_gpu"]) for r in rows])
    if np.linalg.matrix_rank(terms) < 3:
        raise SystemExit(
            f"results/step.csv has {len(rows)} rows of path={path}, precision={precision}, "
            f"kept={kept} on this card, too few to fit a + b n + c k; run step.py with depths=."
        )
    fit, *_ = np.linalg.lstsq(terms, seconds, rcond=None)
    residual = float(np.abs(terms @ fit / seconds - 1).max())
    return fit, residual


def report(
    config: TrainConfig,
    found: list[dict[str, Any]],
    options: dict[str, str],
    gpus: int,
    stage: int,
    accumulation: int,
) -> None:
    """Print and keep what the steps took and would have taken bare."""
    precision = "bf16" if options["precision"] == "same" else "fp8-prefix"
    kept = config.engine.model_kept_iterations
    fit, residual = bare_seconds(options["path"], precision, kept)
    taken = timed(found)
    seconds = sum(step["speed/step_s"] for step in taken)
    ideal = waiting = tokens = 0.0
    for step in taken:
        depths = step_depths(
            config.depth, seed=config.run.seed, first_row=step["data/first_row"],
            rows=step["data/rows"],
        )  # fmt: skip
        costs = np.array([fit @ (1, d.no_grad, d.with_grad) for d in depths]).reshape(gpus, -1)
        ideal += costs.sum() / gpus
        deepest_first = -np.sort(-costs, axis=1)
        waiting += costs.sum(1).max() if stage == 1 else deepest_first.max(0).sum()
        tokens += step["data/rows"] * 4096
    row = {
        "scope": options["scope"], "path": options["path"], "precision": precision, "gpus": gpus,
        "zero": stage, "accumulation": accumulation,
        "kept_iterations": "" if kept is None else kept,
        "steps": len(taken), "seconds": round(seconds, 2),
        "tokens_per_s_per_gpu": round(tokens / seconds / gpus, 1),
        "share_of_bare": round(ideal / seconds, 4), "share_less_wait": round(waiting / seconds, 4),
        "fit_a_s": round(fit[0], 5), "fit_b_s": round(fit[1], 5), "fit_c_s": round(fit[2], 5),
        "fit_residual": round(residual, 4), "peak_bytes": taken[-1]["memory/peak_bytes"],
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "commit": os.environ.get("PRETRAIN_COMMIT", "unknown"),
    }  # fmt: skip
    path = RESULTS / "engine.csv"
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    depth = Depth(config.depth.mean, config.depth.backprop)
    append(RESULTS / "step.csv", {
        "preset": config.model.name, "path": options["path"], "precision": precision,
        "rows": config.batch.micro_rows, "gpus": gpus, "zero": stage, "accumulation": accumulation,
        "tokens_per_s_per_gpu": row["tokens_per_s_per_gpu"], "sustained_s": row["seconds"],
        "peak_bytes": row["peak_bytes"], "gpu": row["gpu"], "torch": row["torch"],
        "commit": row["commit"], "no_grad": f"law, mean {depth.total}", "with_grad": "",
        "kept_iterations": row["kept_iterations"], "first_second_tokens_per_s": "",
        "model_tflops_per_s": round(
            float(np.mean([s["speed/model_flops_per_s_per_rank"] for s in taken])) / 1e12, 1
        ),
    })  # fmt: skip
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
