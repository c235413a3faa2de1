"""Whole optimizer steps of `pretrain train` against bare forward and backward passes.

    python kernels/benchmarks/step.py paths=fused rows=1 depths=8/8,56/8,24/4 parity=0
    python kernels/benchmarks/engine.py gpus=2 zero=1,2 accumulation=4 scope=step,row \
        overlap=false,true data=files data.root=... ...

A bare pass of a row takes a + b n + c k seconds, fitted to the rows of results/step.csv of this
card. share_of_bare is what the realised depths of the timed steps would take by that, on ranks that
do not wait for each other, over what they took: engine, optimizer, data and waiting cost the rest.
share_less_wait allows for the wait that the deal of these very steps implies: at the end of a step
under stage 1, at every micro-step under 2 and 3. Seconds by part (data, forward, ...) are a step's
means, as its records have them. Scope `independent` is a depth per row, drawn without strata or
deal. Rows go to results/step.csv and results/engine.csv; words that are no option are overrides of
the run.
"""

import csv
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from measurements import RESULTS, append, card, check_writable, commit
from pass_times import Fit
from pretrain.compose import load
from pretrain.config import TrainConfig
from pretrain.model.depth import Depth, step_depths
from reliability import FOLDER, records, train

PARTS = {
    "data_s": "data/wait_s", "forward_s": "time/forward_s", "backward_s": "time/backward_s",
    "wait_s": "time/wait_s", "update_s": "time/update_s",
}  # fmt: skip
"""By the name of the column: what a record of a step calls the seconds."""
OPTIONS = {
    "preset": "huginn-3.5b", "gpus": "1", "zero": "1", "accumulation": "1,8", "path": "fused",
    "scope": "row", "precision": "same", "overlap": "false", "seconds": "25",
    "results": str(RESULTS), "runs": str(FOLDER),
}  # fmt: skip
SCOPES = {
    "row": ["depth.scope=row"],
    "independent": ["depth.scope=row", "depth.sampling=independent"],
    "step": ["depth.scope=step"],
}
# by the name of the option: the name in step.csv, and what asks for it
PRECISIONS = {
    "same": ("bf16", []),
    "fp8": ("fp8-prefix", ["model.no_grad_precision=fp8"]),
    "fp8-all": ("fp8", ["model.no_grad_precision=fp8", "model.grad_precision=fp8"]),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One combination of the options, and the overrides of its run."""

    gpus: int
    zero: int
    accumulation: int
    scope: str
    overlap: str
    """engine.overlap_comm."""
    path: str
    precision: str
    """As in step.csv."""
    overrides: list[str]

    @property
    def warm_steps(self) -> int:
        """Before the timed ones; every kernel has run at every shape after one micro-step."""
        return 2 if self.accumulation < 4 else 1

    @property
    def name(self) -> str:
        """Of the folder of its run."""
        return "-".join(
            ["engine", self.path, self.precision, f"{self.gpus}-zero{self.zero}",
             f"{self.accumulation}-{self.scope}", *(["overlap"] * (self.overlap == "true"))]
        )  # fmt: skip


def main(words: list[str]) -> None:
    """Run, time and report every combination of stage, accumulation, scope and overlap."""
    options, overrides = dict(OPTIONS), []
    for word in words:
        key, _, value = word.partition("=")
        if key in options:
            options[key] = value
        else:
            overrides.append(word)
    if options["precision"] not in PRECISIONS:
        raise SystemExit(f"precision={options['precision']} is none of {', '.join(PRECISIONS)}.")
    results, runs = Path(options["results"]), Path(options["runs"]).absolute()
    check_writable(results / "step.csv", results / "engine.csv")
    runs.mkdir(parents=True, exist_ok=True)
    for setting in settings(options, overrides):
        config = load("train", setting.overrides, resumes=False)
        if config.batch.micro_rows != 1:
            raise SystemExit("A bare pass is fitted to one row; leave batch.micro_rows=1.")
        # before the run, because a table that lacks rows is cheaper to find out now
        bare = BarePass.read(results / "step.csv", setting, config)
        enough = Enough(float(options["seconds"]), setting.warm_steps)
        shutil.rmtree(runs / setting.name, ignore_errors=True)
        run_dir = train(
            setting.name, setting.overrides, gpus=setting.gpus, until=enough, folder=runs
        )
        taken = enough.timed(run_dir)
        if len(taken) < enough.steps:
            raise SystemExit(
                f"{setting.name} ended after {len(taken)} timed steps of the {enough.steps} that "
                f"are the least; {runs / setting.name}.log says why."
            )
        report(setting, config, bare, taken, results)


def settings(options: dict[str, str], overrides: list[str]) -> Iterator[Setting]:
    """Every combination that is asked for."""
    preset = [] if options["preset"] == "tiny" else [f"experiment={options['preset']}"]
    context = load("train", [*preset, *overrides], resumes=False).model.context
    gpus, (precision, narrow) = int(options["gpus"]), PRECISIONS[options["precision"]]
    for zero, accumulation, scope, overlap in product(
        map(int, options["zero"].split(",")),
        map(int, options["accumulation"].split(",")),
        options["scope"].split(","),
        options["overlap"].split(","),
    ):
        yield Setting(
            gpus=gpus, zero=zero, accumulation=accumulation, scope=scope, overlap=overlap,
            path=options["path"], precision=precision,
            overrides=[
                *preset, f"engine=zero{zero}-bf16", f"model.path={options['path']}", *narrow,
                f"batch.global_tokens={context * gpus * accumulation}", "batch.micro_rows=1",
                *SCOPES[scope], f"engine.overlap_comm={overlap}",
                "schedule.warmup_tokens=0", "schedule.cooldown_tokens=0",
                "run.tokens=null", "run.steps=4000", "checkpoint.every_steps=100000",
                "validation.every_steps=100000", f"validation.rows={gpus}",
                "validation.depths=[1]", *overrides,
            ],
        )  # fmt: skip


class Enough:
    """Whether the timed steps of a run have lasted long enough."""

    steps = 2
    """The least that are timed."""

    def __init__(self, seconds: float, warm_steps: int) -> None:
        self.seconds, self.warm_steps = seconds, warm_steps

    def __call__(self, run_dir: Path) -> bool:
        """Asked several times a second."""
        taken = self.timed(run_dir)
        lasted_s = sum(step["speed/step_s"] for step in taken)
        return lasted_s >= self.seconds and len(taken) >= self.steps

    def timed(self, run_dir: Path) -> list[dict[str, Any]]:
        """Records of steps that are warm."""
        found = records(run_dir)
        return [r for r in found if "loss/nats" in r and r["step"] > self.warm_steps]


@dataclass(frozen=True, slots=True)
class BarePass:
    """Seconds of a forward and backward pass of one row without engine: a + b n + c k."""

    fit: np.ndarray
    residual: float
    """The largest, relative."""

    @staticmethod
    def read(table: Path, setting: Setting, config: TrainConfig) -> "BarePass":
        """Fitted to the newest row of each (n, k) that was measured on this card."""
        kept = config.engine.model_kept_iterations
        wanted = {
            "preset": config.model.name, "path": setting.path, "precision": setting.precision,
            "rows": "1", "gpus": "1", "zero": "0", "gpu": card(),
            "kept_iterations": "" if kept is None else str(kept),
        }  # fmt: skip
        newest: dict[tuple[int, int], float] = {}
        with table.open() as file:
            for row in csv.DictReader(file):
                if all(row[key] == value for key, value in wanted.items()):
                    rate = float(row["tokens_per_s_per_gpu"])
                    depth = int(row["no_grad"]), int(row["with_grad"])
                    newest[depth] = config.model.context / rate
        found = Fit.of(newest)
        if found is None:
            asked = ", ".join(f"{key}={value}" for key, value in wanted.items())
            raise SystemExit(
                f"{table} has {len(newest)} depths with {asked}, too few to fit a + b n + c k; "
                "run step.py with depths=8/8,56/8,24/4 first."
            )
        return BarePass(found.terms, found.residual)

    def of_step(self, depths: list[Depth], *, gpus: int, zero: int) -> tuple[float, float]:
        """Seconds of a step on ranks with equal work, and on ranks that wait for each other.

        A rank has its consecutive share of the rows, one a micro-step, the deepest first.
        """
        costs = np.array([self.fit @ (1, d.no_grad, d.with_grad) for d in depths])
        by_rank = -np.sort(-costs.reshape(gpus, -1), axis=1)
        waiting = by_rank.sum(1).max() if zero == 1 else by_rank.max(0).sum()
        return float(costs.sum() / gpus), float(waiting)


def report(
    setting: Setting,
    config: TrainConfig,
    bare: BarePass,
    taken: list[dict[str, Any]],
    results: Path,
) -> None:
    """Print and keep what the steps took and would have taken bare."""
    seconds = sum(step["speed/step_s"] for step in taken)
    even = waiting = 0.0
    for step in taken:
        depths = step_depths(
            config.depth, seed=config.run.seed, first_row=step["data/first_row"],
            rows=step["data/rows"],
        )  # fmt: skip
        step_even, step_waiting = bare.of_step(depths, gpus=setting.gpus, zero=setting.zero)
        even, waiting = even + step_even, waiting + step_waiting
    tokens = config.model.context * sum(step["data/rows"] for step in taken)
    kept = config.engine.model_kept_iterations
    row = {
        "scope": setting.scope, "path": setting.path, "precision": setting.precision,
        "gpus": setting.gpus, "zero": setting.zero, "accumulation": setting.accumulation,
        "overlap": setting.overlap,
        "kept_iterations": "" if kept is None else kept,
        "warm_steps": setting.warm_steps, "steps": len(taken), "seconds": round(seconds, 2),
        "tokens_per_s_per_gpu": round(tokens / seconds / setting.gpus, 1),
        "share_of_bare": round(even / seconds, 4), "share_less_wait": round(waiting / seconds, 4),
        "fit_a_s": round(bare.fit[0], 5), "fit_b_s": round(bare.fit[1], 5),
        "fit_c_s": round(bare.fit[2], 5), "fit_residual": round(bare.residual, 4),
        **{name: round(float(np.mean([step[key] for step in taken])), 4)
           for name, key in PARTS.items()},
        "peak_bytes": taken[-1].get("memory/peak_bytes", ""),
        "cards": cards(setting.gpus), "gpu": card(), "torch": torch.__version__,
        "commit": commit(),
    }  # fmt: skip
    share_of_one = against_one_gpu(results / "engine.csv", row)
    append(results / "engine.csv", row)
    append(results / "step.csv", step_row(config, row, taken))
    print(json.dumps(row | {"share_of_one_gpu": share_of_one}), flush=True)


def cards(gpus: int) -> str:
    """The first digits of the used GPUs' UUIDs: cards of one model differ by a per cent or two."""
    if not torch.cuda.is_available():
        return ""
    uuids = [str(torch.cuda.get_device_properties(number).uuid) for number in range(gpus)]
    return " ".join(uuid.removeprefix("GPU-")[:8] for uuid in uuids)


def against_one_gpu(table: Path, row: dict[str, Any]) -> float | None:
    """The speed of this row over that of the newest row alike on one GPU, if there is one.

    Ranks move at the pace of the slowest card: of the row's own cards that were measured alone the
    slowest counts; if none was, the newest row of any card. Not tokens per second, because the
    realised depths of the two differ.
    """
    alike = ("scope", "path", "precision", "accumulation", "kept_iterations", "gpu")
    found: dict[str, float] = {}
    if table.exists():
        with table.open(newline="") as file:
            for other in csv.DictReader(file):
                if other["gpus"] == "1" and all(other[key] == str(row[key]) for key in alike):
                    # the newest last
                    found.pop(other["cards"], None)
                    found[other["cards"]] = _speed(other)
    if not found:
        return None
    own = [found[card] for card in str(row["cards"]).split() if card in found]
    alone = min(own) if own else list(found.values())[-1]
    return round(_speed(row) / alone, 4)


def _speed(row: dict[str, Any]) -> float:
    """Rows a second at (24, 8): the share of bare passes, which may be those of another card."""
    a, b, c = (float(row[f"fit_{term}_s"]) for term in "abc")
    return float(row["share_of_bare"]) / (a + 24 * b + 8 * c)


def step_row(
    config: TrainConfig, row: dict[str, Any], taken: list[dict[str, Any]]
) -> dict[str, Any]:
    """The same measurement in the columns of step.csv."""
    flops = [step["speed/model_flops_per_s_per_rank"] for step in taken]
    names = (
        "path", "precision", "gpus", "zero", "accumulation", "tokens_per_s_per_gpu", "peak_bytes",
        "gpu", "torch", "commit", "kept_iterations",
    )  # fmt: skip
    return {name: row[name] for name in names} | {
        "preset": config.model.name, "rows": config.batch.micro_rows,
        "sustained_s": row["seconds"], "no_grad": f"law, mean {config.depth.mean}",
        "with_grad": "", "first_second_tokens_per_s": "",
        "model_tflops_per_s": round(float(np.mean(flops)) / 1e12, 1),
    }  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
