"""What learning.py keeps of its runs: tables in which each run's rows replace those it had."""

import csv
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from measurements import card, commit
from pretrain.compose import load
from pretrain.config import TrainConfig
from pretrain.model.cost import TokenFlops, count_parameters, mean_iterations
from reliability import records

# the share of the steps, at the end, whose losses are averaged
TAIL = 0.05


def merge(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows to a table, in place of those of the same runs; the columns are the rows' own."""
    if not rows:
        return
    kept: list[dict[str, Any]] = []
    if path.exists():
        new = {row["run"] for row in rows}
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["run"] not in new]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows([*kept, *rows])


def write_results(folders: dict[str, Path], results: Path) -> None:
    """All tables, from the records of these runs, as far as they came."""
    results.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[dict[str, Any]]] = {
        "learning": [], "learning-losses": [], "learning-depths": [], "learning-tasks": [],
    }  # fmt: skip
    for name, folder in folders.items():
        own = [record for record in records(folder) if "loss/nats" in record]
        if not own:
            continue
        config = load("train", [f"run.dir={folder}"], resumes=True)
        depths = [*validations(name, folder), *final(name, folder, own[-1]["tokens"])]
        tables["learning"].append(summary(name, config, own, depths))
        tables["learning-losses"] += map(lambda record, run=name: loss_row(run, record), own)
        tables["learning-depths"] += depths
        tables["learning-tasks"] += scores(name, folder)
    for name, rows in tables.items():
        merge(results / f"{name}.csv", rows)
    for row in tables["learning"]:
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)


def loss_row(run: str, record: dict[str, Any]) -> dict[str, Any]:
    """One step."""
    return {
        "run": run, "step": record["step"], "tokens": record["tokens"],
        "loss": f"{record['loss/nats']:.5f}", "gradient_norm": f"{record['gradient/norm']:.5g}",
        "depth": f"{record['depth/mean']:.4g}", "step_s": f"{record['speed/step_s']:.4g}",
    }  # fmt: skip


def depth_rows(run: str, tokens: int, result: dict[str, Any]) -> list[dict[str, Any]]:
    """One measurement of the held-out loss, a row for each depth."""
    pairs = zip(result["validation/depths"], result["validation/loss_nats"], strict=True)
    return [
        {"run": run, "tokens": tokens, "rows": result["validation/rows"],
         "held_out_tokens": result["validation/tokens"], "depth": depth, "loss": f"{loss:.5f}"}
        for depth, loss in pairs
    ]  # fmt: skip


def validations(run: str, folder: Path) -> Iterable[dict[str, Any]]:
    """Those during training."""
    for record in records(folder):
        if "validation/loss_nats" in record:
            yield from depth_rows(run, record["tokens"], record)


def final(run: str, folder: Path, tokens: int) -> Iterable[dict[str, Any]]:
    """That of `pretrain evaluate` on more rows, if it got there."""
    for path in sorted((folder / "evaluation").glob("step-*.json")):
        yield from depth_rows(run, tokens, json.loads(path.read_text()))


def scores(run: str, folder: Path) -> Iterable[dict[str, Any]]:
    """Every measure of every task at every depth."""
    for path in sorted((folder / "evaluation").glob("step-*/*.json")):
        found = json.loads(path.read_text())
        for measure, own in found["scores"].items():
            for depth, value, error in zip(
                found["depths"], own["value"], own["standard_error"], strict=True
            ):
                yield {"run": run, "task": found["task"], "items": found["items"],
                       "measure": measure, "depth": depth, "value": value,
                       "standard_error": error}  # fmt: skip


def summary(
    run: str, config: TrainConfig, steps: list[dict[str, Any]], depths: list[dict[str, Any]]
) -> dict[str, Any]:
    """What was run, how far it came, how it did at its own depth on most held-out rows."""
    iterations = mean_iterations(config.depth, rows=1)
    tail = steps[-max(round(TAIL * len(steps)), 1) :]
    at_own = [row for row in depths if row["depth"] == config.depth.mean]
    last = max(at_own, key=lambda row: (row["tokens"], row["rows"]), default={"loss": ""})
    depth = config.depth
    return {
        "run": run, "seed": config.run.seed, "parameters": sum(
            count_parameters(config.model).values()),
        "width": config.model.width, "core_layers": config.model.core_layers,
        "depth": f"{depth.law.value} {depth.mean}/{depth.backprop} {depth.scope.value} "
                 f"{depth.sampling.value}",
        "gflop_per_token": round(TokenFlops.of(config.model).model(*iterations) / 1e9, 4),
        "step_tokens": config.batch.global_tokens, "learning_rate": config.optimizer.learning_rate,
        "steps": steps[-1]["step"], "of_steps": config.total_steps, "tokens": steps[-1]["tokens"],
        "loss_of_the_last": round(statistics.mean(r["loss/nats"] for r in tail), 5),
        "held_out_at_own_depth": last["loss"],
        "skipped": steps[-1]["optimizer/skipped_updates"], "spikes": steps[-1]["loss/spikes"],
        "step_s_side_by_side": round(statistics.median(r["speed/step_s"] for r in steps), 4),
        "peak_bytes": steps[-1].get("memory/peak_bytes", ""), "device": card(),
        "torch": torch.__version__, "commit": commit(),
    }  # fmt: skip
