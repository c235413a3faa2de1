"""Measured steps beside what the model says of the same steps: fit, prediction, residuals.

A run's record names its steps, and its law gives the depth of every row of them, so nothing
about a step is averaged before it is compared.
"""

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.config import TrainConfig
from pretrain.errors import DataError
from pretrain.model.cost import TokenFlops
from pretrain.model.depth import step_totals
from pretrain.scaling.compute import UpdateBytes, optimizer_s, recomputed_iterations
from pretrain.scaling.estimate import step_seconds


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps of a record: the depths of their rows, and how long they took."""

    totals: NDArray[np.int64]
    """Iterations, [steps, rows]."""
    seconds: NDArray[np.float64]
    """Measured, [steps]."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Predicted and measured seconds of the same steps."""

    predicted: NDArray[np.float64]
    """By the model, [steps]."""
    measured: NDArray[np.float64]
    """By the run, [steps]."""

    @property
    def errors(self) -> NDArray[np.float64]:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1

    @property
    def bias(self) -> float:
        """Total predicted time over total measured time, less 1."""
        return float(self.predicted.sum() / self.measured.sum() - 1)

    @property
    def explained(self) -> float:
        """R^2: share of the variance between steps that the prediction explains; may be below 0."""
        residual = ((self.measured - self.predicted) ** 2).sum()
        return 1 - float(residual / ((self.measured - self.measured.mean()) ** 2).sum())


def read_steps(path: Path, config: TrainConfig) -> Steps:
    """The steps of a metrics.jsonl but the first, which warms up.

    Raises DataError where the record's depths are not those of the configuration.
    """
    with path.open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    records = [record for record in records if "speed/step_s" in record][1:]
    totals = [_totals(path, record, config) for record in records]
    return Steps(np.stack(totals), np.array([record["speed/step_s"] for record in records]))


def _totals(path: Path, record: dict[str, Any], config: TrainConfig) -> NDArray[np.int64]:
    rows, step = config.rows_per_step, record["step"]
    totals = step_totals(config.depth, seed=config.run.seed, first_row=(step - 1) * rows, rows=rows)
    if abs(totals.mean() - record["depth/mean"]) > 1e-9:
        raise DataError(
            f"{path}: step {step} has mean depth {record['depth/mean']}, this configuration gives "
            f"{totals.mean()} for {rows} rows and run.seed={config.run.seed}."
        )
    return totals


def compare(config: TrainConfig, steps: Steps, moved: UpdateBytes | None = None) -> Comparison:
    """What the model says of steps, without any spread between GPUs.

    `moved`: by the update of a recorded run; None: by that of today.
    """
    return Comparison(step_seconds(config, steps.totals, moved), steps.seconds)


def fitted(config: TrainConfig, steps: Steps, moved: UpdateBytes | None = None) -> TrainConfig:
    """The configuration with the two utilizations that fit the steps of one GPU best.

    Least squares on seconds = iterations without gradient / rate + the rest / other rate; the
    optimizer's time is taken from the model (`moved`: as in `compare`). Raises DataError if the
    steps were not one GPU's, or too few or too alike to tell the two rates apart.
    """
    if config.cluster.ranks != 1:
        raise DataError(f"Rates are fitted to one GPU's steps, not {config.cluster.ranks} GPUs'.")
    with_grad = np.minimum(steps.totals, config.depth.backprop)
    recomputed = recomputed_iterations(with_grad, config.engine.model_kept_iterations)
    no_grad = steps.totals - with_grad + recomputed
    rows, each = steps.totals.shape[1], (no_grad.sum(axis=1), with_grad.sum(axis=1))
    return _with_rates(config, rows, *each, steps.seconds - optimizer_s(config, moved))


@dataclass(frozen=True, slots=True)
class Passes:
    """Bare forward and backward passes of one row on one GPU: no engine, no optimizer."""

    no_grad: NDArray[np.int64]
    """Iterations without gradient, [passes]."""
    with_grad: NDArray[np.int64]
    """Iterations with gradient, [passes]."""
    seconds: NDArray[np.float64]
    """Measured, [passes]."""


def read_passes(path: Path, config: TrainConfig, *, gpu: str) -> Passes:
    """What kernels/benchmarks/step.py measured of this model and path with one row in bf16.

    Nothing is recomputed in them. Raises DataError where there is none.
    """
    model = config.model
    wanted = {
        "preset": model.name, "path": model.path.value, "precision": "bf16", "rows": "1",
        "zero": "0", "kept_iterations": "", "gpu": gpu,
    }  # fmt: skip
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if wanted.items() <= row.items()]
    if not rows:
        raise DataError(f"{path}: no row with {wanted}.")
    return Passes(
        np.array([int(row["no_grad"]) for row in rows]),
        np.array([int(row["with_grad"]) for row in rows]),
        np.array([model.context / float(row["tokens_per_s_per_gpu"]) for row in rows]),
    )


def fitted_to_passes(config: TrainConfig, passes: Passes) -> TrainConfig:
    """As `fitted`, to bare passes."""
    return _with_rates(config, 1, passes.no_grad, passes.with_grad, passes.seconds)


def _with_rates(
    config: TrainConfig,
    rows: int,
    no_grad: NDArray[np.int64],
    with_grad: NDArray[np.int64],
    seconds: NDArray[np.float64],
) -> TrainConfig:
    """The utilizations of work that `rows` rows each do: iterations [n] of all of them together."""
    flops = TokenFlops.of(config.model)
    forward = flops.iteration * no_grad
    training = 3 * flops.once * rows + 3 * flops.iteration * with_grad
    # at the peak rate, so that the solution is the inverse of a utilization
    scale = config.model.context / config.cluster.gpu_flops
    work = np.stack([forward, training], axis=1) * scale
    inverse = np.linalg.lstsq(work, seconds, rcond=None)[0]
    if not (inverse >= 1).all():
        raise DataError(
            f"{len(seconds)} measurements give utilizations of {1 / inverse[0]:.3g} without and "
            f"{1 / inverse[1]:.3g} with gradient, which must be in (0, 1]: give more, whose "
            "depths differ more."
        )
    hardware = replace(config.cluster.hardware, forward_utilization=float(1 / inverse[0]))
    cluster = replace(config.cluster, utilization=float(1 / inverse[1]), hardware=hardware)
    return replace(config, cluster=cluster)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Speed on several GPUs over as many times that of one."""

    gpus: int
    """GPUs of one host."""
    gpu: str
    """Their name."""
    zero_stage: int
    """ZeRO stage."""
    predicted: float
    """By the model."""
    measured: float
    """By the run."""


def read_scaled(
    path: Path, config: TrainConfig, *, steps: range, moved: UpdateBytes | None = None
) -> list[Scaled]:
    """What kernels/benchmarks/reliability.py measured as part `zero`; none: an empty list.

    `config` is that of the runs on one GPU, `steps` those that were timed. The GPU's rate is taken
    from the one-GPU run in the same rows, so only waiting and communication are predicted; `moved`
    is as in `compare`.

    Raises DataError where several GPUs of a kind were measured but not one.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "zero"]
    single = {row["gpu"]: row for row in rows if row["what"] == "ZeRO-1, one GPU"}
    found = []
    for row in rows:
        stage = row["what"].removeprefix("ZeRO-")
        if row["unit"] != "tokens/s" or stage not in ("1", "2", "3"):
            continue
        if row["gpu"] not in single:
            raise DataError(f"{path}: no row 'ZeRO-1, one GPU' for {row['gpu']}.")
        one, gpus = float(single[row["gpu"]]["value"]), int(row["gpus"])
        predicted = _predict_scaled(config, one, gpus, int(stage), steps, moved)
        measured = float(row["value"]) / one / gpus
        found.append(Scaled(gpus, row["gpu"], int(stage), predicted, measured))
    return found


def _predict_scaled(
    config: TrainConfig,
    tokens_per_s: float,
    gpus: int,
    stage: int,
    steps: range,
    moved: UpdateBytes | None,
) -> float:
    rows, seed = config.rows_per_step, config.run.seed
    totals = np.stack(
        [
            step_totals(config.depth, seed=seed, first_row=(step - 1) * rows, rows=rows)
            for step in steps
        ]
    )
    expected = config.batch.global_tokens * len(totals) / step_seconds(config, totals, moved).sum()
    cluster = replace(config.cluster, gpu_flops=config.cluster.gpu_flops * tokens_per_s / expected)
    one = replace(config, cluster=cluster)
    many = replace(
        config,
        cluster=replace(cluster, gpus_per_node=gpus),
        engine=replace(config.engine, zero_stage=stage),
    )
    alone, together = (step_seconds(each, totals, moved).sum() for each in (one, many))
    return float(alone / together / gpus)
