"""Does a path learn as the plain modules do: runs side by side on one GPU, from real shards.

    python kernels/benchmarks/convergence.py seconds=400 data=files data.root=x data.name=x \
        tokenizer.path=... data.shards=... model.context=1024

500 steps of huginn-100m for two seeds: the plain modules, and again (the spread of reruns), the
fused path, float8 without gradient, float8 everywhere. Losses of all steps go to
results/convergence-losses.csv, the summary to results/convergence.csv. All words but `seconds` are
overrides. The runs share the GPU, so their speeds say nothing.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from reliability import records
from step import RESULTS

FOLDER = Path("out/convergence")
STEPS, LAST = 500, 50
FUSED = ["model.path=fused"]
PREFIX = [*FUSED, "model.no_grad_precision=fp8"]
RUNS = {
    "reference": [],
    "reference again": [],
    "fused": FUSED,
    "fused, fp8 without gradient": PREFIX,
    "fused, fp8 everywhere": [*PREFIX, "model.grad_precision=fp8"],
}
SEEDS = (0, 1)


def main() -> None:
    """Start all runs, wait for them, compare."""
    words = [word for word in sys.argv[1:] if not word.startswith("seconds=")]
    seconds = float(next((w[8:] for w in sys.argv[1:] if w.startswith("seconds=")), "400"))
    FOLDER.mkdir(parents=True, exist_ok=True)
    processes = {}
    for seed in SEEDS:
        for name, overrides in RUNS.items():
            if seed != SEEDS[0] and name == "reference again":
                continue
            processes[name, seed] = start(name, seed, [*overrides, *words])
    deadline = time.monotonic() + seconds
    while any(p.poll() is None for p in processes.values()) and time.monotonic() < deadline:
        time.sleep(1)
    for process in processes.values():
        if process.poll() is None:
            process.terminate()
    for process in processes.values():
        process.wait()
    compare({key: records(folder(*key)) for key in processes})


def folder(name: str, seed: int) -> Path:
    """Of a run."""
    return FOLDER / f"{name.replace(' ', '-').replace(',', '')}-{seed}"


def start(name: str, seed: int, overrides: list[str]) -> subprocess.Popen[bytes]:
    """One run in the background."""
    command = [
        sys.executable, "-m", "pretrain", "train", "experiment=huginn-100m", "logging=quiet",
        "batch.global_tokens=2048", "batch.micro_rows=2", f"run.steps={STEPS}",
        "schedule.warmup_tokens=102400", "schedule.cooldown_tokens=0",
        "checkpoint.every_steps=100000",
        "validation.every_steps=100000", "validation.rows=128", "validation.depths=[1,8,32]",
        f"run.seed={seed}", f"run.dir={folder(name, seed)}", *overrides,
    ]  # fmt: skip
    with folder(name, seed).with_suffix(".log").open("wb") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def compare(found: dict[tuple[str, int], list[dict[str, Any]]]) -> None:
    """Losses of every step, and of the last ones against the plain modules' at the same seed."""
    losses = {
        key: {r["step"]: r["loss/nats"] for r in own if "loss/nats" in r}
        for key, own in found.items()
    }
    for name, seed in [key for key, own in losses.items() if not own]:
        print(f"{name}, seed {seed}: no step, see {folder(name, seed)}.log", flush=True)
        del losses[name, seed]
    last = min(max(own) for own in losses.values())
    with (RESULTS / "convergence-losses.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(f"{name}, seed {seed}" for name, seed in losses)])
        for step in range(1, last + 1):
            writer.writerow([step, *(f"{own[step]:.6f}" for own in losses.values())])
    rows = []
    for (name, seed), own in losses.items():
        wanted = losses["reference", seed]
        tail = range(max(last - LAST, 0) + 1, last + 1)
        difference = [own[step] - wanted[step] for step in tail]
        held_out = [r for r in found[name, seed] if "validation/loss_nats" in r]
        rows.append({
            "run": name, "seed": seed, "steps": last,
            "loss_of_the_last": round(statistics.mean(own[step] for step in tail), 5),
            "difference_mean": round(statistics.mean(difference), 5),
            "difference_largest": round(max(map(abs, difference)), 5),
            "difference_all_steps_largest": round(
                max(abs(own[step] - wanted[step]) for step in range(1, last + 1)), 5
            ),
            "held_out": json.dumps(held_out[-1]["validation/loss_nats"]) if held_out else "",
            "commit": os.environ.get("PRETRAIN_COMMIT", "unknown"),
        })  # fmt: skip
    with (RESULTS / "convergence.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*row.values(), sep=", ", flush=True)


if __name__ == "__main__":
    main()
