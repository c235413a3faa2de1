"""Does a path learn as the plain modules do: runs one after another on one GPU, from real shards.

    python kernels/benchmarks/convergence.py seeds=0,1 tokens=8192 data=files data.root=x \
        data.name=x tokenizer.path=... data.shards=... model.context=1024 batch.micro_rows=8

500 steps of huginn-100m for each seed: the plain modules and the fused path, for the first seed
both again (the spread of reruns), float8 without gradient, float8 everywhere. Losses of all steps
go to results/convergence-losses.csv, the summary to results/convergence.csv. A run that is finished
is not made again, so a call that was cut off goes on. All other words are overrides.
"""

import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from measurements import RESULTS, commit
from reliability import records, train

FOLDER = Path("out/convergence").absolute()
STEPS, LAST = 500, 50
FUSED = ["model.path=fused"]
PREFIX = [*FUSED, "model.no_grad_precision=fp8"]
RUNS = {
    "reference": ["model.path=reference"],
    "reference again": ["model.path=reference"],
    "fused": FUSED,
    "fused again": FUSED,
    "fused, fp8 without gradient": PREFIX,
    "fused, fp8 everywhere": [*PREFIX, "model.grad_precision=fp8"],
}
OPTIONS = {"seeds": "0,1", "tokens": "8192"}


def main() -> None:
    """Make all runs, compare."""
    options, overrides = dict(OPTIONS), []
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        if key in options:
            options[key] = value
        else:
            overrides.append(word)
    seeds = [int(seed) for seed in options["seeds"].split(",")]
    FOLDER.mkdir(parents=True, exist_ok=True)
    keys = [
        (name, seed)
        for seed in seeds
        for name in RUNS
        if seed == seeds[0] or not name.endswith("again")
    ]
    for name, seed in keys:
        words = [*run_words(name, seed, int(options["tokens"])), *overrides]
        train(folder(name, seed).name, words, until=ended, folder=FOLDER)
    compare({key: records(folder(*key)) for key in keys})


def run_words(name: str, seed: int, tokens: int) -> list[str]:
    """The overrides of a run with so many tokens a step."""
    return [
        "experiment=huginn-100m", f"run.seed={seed}", f"batch.global_tokens={tokens}",
        f"run.steps={STEPS}", "run.tokens=null", f"schedule.warmup_tokens={50 * tokens}",
        "schedule.cooldown_tokens=0", "checkpoint.every_steps=100000",
        "validation.every_steps=100000", "validation.rows=256", "validation.depths=[1,8,32]",
        *RUNS[name],
    ]  # fmt: skip


def folder(name: str, seed: int) -> Path:
    """Of a run."""
    return FOLDER / f"{name.replace(' ', '-').replace(',', '')}-{seed}"


def ended(run_dir: Path) -> bool:
    """Whether a run has been validated after its last step."""
    return any("validation/loss_nats" in r and r["step"] == STEPS for r in records(run_dir))


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
            "commit": commit(),
        })  # fmt: skip
    with (RESULTS / "convergence.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*row.values(), sep=", ", flush=True)


if __name__ == "__main__":
    main()
