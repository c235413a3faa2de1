"""Run folders as training leaves them, made by the parts that write them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.compose import load, write_frozen
from pretrain.config import TrainConfig
from pretrain.loop.metrics import MetricLog
from pretrain.loop.passed_over import Rewind, append_rewind

BEGAN_S = 1_700_000_000.0


def step_record(step: int, loss: float) -> dict[str, float]:
    return {
        "step": step,
        "tokens": step * 1024,
        "loss/nats": loss,
        "loss/spikes": 0,
        "gradient/norm": 1.0 / step,
        "optimizer/learning_rate": 1e-3 * step,
        "speed/step_s": 2.0,
        "speed/tokens_per_s": 512.0 + step,
        "data/first_row": (step - 1) * 8,
        "data/rows": 8,
    }


def validation_record(step: int, losses: list[float]) -> dict[str, object]:
    return {
        "step": step,
        "tokens": step * 1024,
        "validation/depths": [1, 4, 16],
        "validation/loss_nats": losses,
        "validation/loss_at_mean_nats": losses[1],
        "validation/loss_at_1_nats": losses[0],
        "alarm/collapse": 0,
    }


def life(number: int, *, first_step: int, at_s: float) -> dict[str, object]:
    return {
        "event": "begin", "life": number, "time_s": BEGAN_S + at_s, "job_id": f"4{number}",
        "restart_count": number - 1, "nodes": ["node-a", "node-b"], "ranks": 16,
        "first_step": first_step,
    }  # fmt: skip


def end(number: int, *, last_step: int, at_s: float, reason: str) -> dict[str, object]:
    return {
        "event": "end", "life": number, "time_s": BEGAN_S + at_s, "last_step": last_step,
        "reason": reason, "goodput": 0.5,
    }  # fmt: skip


def write_lines(path: Path, *lines: dict[str, object]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def composed() -> TrainConfig:
    config: TrainConfig = load("train", [])
    return config


@pytest.fixture
def make_run(tmp_path: Path, composed: TrainConfig) -> MakeRun:
    """Writes a run folder of so many steps of the tiny preset."""

    def make(name: str = "first", *, steps: int = 40, seed: int = 0) -> Path:
        folder = tmp_path / name
        run = dataclasses.replace(composed.run, name=name, dir=str(folder), seed=seed)
        write_frozen(dataclasses.replace(composed, run=run), folder)
        if steps:
            record = MetricLog(folder / "metrics.jsonl")
            for step in range(1, steps + 1):
                record.write(step_record(step, 8.0 - 0.1 * step))
                if step % 10 == 0:
                    record.write(validation_record(step, [5.0 - step / 100, 4.25, 4.125]))
            record.close()
        return folder

    return make


@pytest.fixture
def troubled_run(make_run: MakeRun) -> Path:
    """A run with three lives, a rewind, a stall, lost rows, a lasting alarm and a NaN."""
    folder = make_run("troubled")
    record = MetricLog(folder / "metrics.jsonl", resumed_step=30)
    record.write(step_record(31, float("nan")) | {"data/first_row": 304})
    record.write(step_record(32, 4.5) | {"data/first_row": 312, "loss/spikes": 3})
    record.write(validation_record(32, [4.5, 4.25, 4.125]) | {"alarm/collapse": 1})
    record.close()
    write_lines(
        folder / "lineage.jsonl",
        life(1, first_step=0, at_s=0),
        end(1, last_step=20, at_s=50, reason="SIGUSR1"),
        life(2, first_step=20, at_s=60),
        life(3, first_step=30, at_s=90),
        end(3, last_step=32, at_s=128, reason="DivergenceError"),
    )
    append_rewind(folder, Rewind(from_step=38, to_step=30, first_row=240, next_row=304))
    write_lines(folder / "stalls.jsonl", {"step": 12, "verdict": "rank 3 on node-b is in backward"})
    write_lines(folder / "quarantine.jsonl", {"step": 5, "row": 34, "member": "code-00001.tar/3"})
    return folder


@pytest.fixture
def make_living_run(make_run: MakeRun) -> MakeRun:
    """The same, with a life that has begun and left no end."""

    def make(*, steps: int) -> Path:
        folder = make_run(steps=steps)
        write_lines(folder / "lineage.jsonl", life(1, first_step=0, at_s=0))
        return folder

    return make
