"""The record tells its copies what somebody should know of, and where the run comes from."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from pretrain.loop.config import LoggingConfig, WandbMode
from pretrain.loop.metrics import read_metrics
from pretrain.loop.origin import origin, read_origin
from pretrain.loop.record import Record
from pretrain.loop.state import TrainState
from pretrain.loop.steps import StepRecord
from pretrain.testing import tiny_config
from wandb_files import history, values, wandb_records

CODE = {"commit": "c0ffee", "diff_sha256": "d1ff"}
ENVIRONMENT = {"software": {"torch": "2.11.0"}, "devices": {"NVIDIA H200": 8}}
IDENTITY = {"data_fingerprint": "f00d", "tokenizer_sha256": "70c3"}


def step(number: int, **changes: float) -> StepRecord:
    metrics: dict[str, Any] = {
        "loss/nats": 2.0, "loss/spikes": 0, "loss/spike_score": 0.0, "gradient/norm": 1.0,
        "speed/step_s": 0.5, "speed/tokens_per_s": 9.0, "depth/mean": 4.0,
        "optimizer/learning_rate": 1e-3, "optimizer/skipped_updates": 0,
    }  # fmt: skip
    metrics |= {name.replace("__", "/"): value for name, value in changes.items()}
    return StepRecord(number, number * 128, metrics, False, False, False, True)


def open_record(run_dir: Path, *, rank: int = 0) -> Record:
    logging = LoggingConfig(wandb=WandbMode.offline, alert_cooldown_s=0)
    config = tiny_config(logging=logging)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, name="first"))
    found = origin(CODE, IDENTITY, ENVIRONMENT)
    return Record(config, run_dir, TrainState(), rank=rank, origin=found)


def alerts_of(run_dir: Path) -> list[tuple[str, str]]:
    messages = wandb_records(run_dir)
    return [(m.alert.title, m.alert.text) for m in messages if m.HasField("alert")]


def test_every_mishap_is_an_alert_and_what_is_well_is_none(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    record = open_record(tmp_path)
    record.step(step(1))
    record.step(step(2, loss__nats=9.0, loss__spikes=1, loss__spike_score=7.0))
    record.step(step(3, loss__spikes=1))
    record.step(step(4, loss__spikes=1, gradient__norm=math.inf))
    healthy = {
        "validation/depths": [1, 4], "validation/loss_nats": [3.0, 2.0],
        "validation/loss_at_1_nats": 3.0, "validation/loss_at_mean_nats": 2.0,
        "state/token_correlation": 0.1, "hidden/token_correlation": 0.1,
    }  # fmt: skip
    state = TrainState(step=30, tokens=30 * 128)
    record.validation(state, healthy)
    record.validation(state, healthy | {"state/token_correlation": 0.99})
    record.save_failed(state, OSError("no room"))
    record.requeued(state, "SIGUSR1")
    record.stalled(30)
    record.finish(0)
    found = alerts_of(tmp_path)
    assert [kind for kind, _ in found] == [
        "spike", "non-finite", "collapse", "save failed", "requeue", "stall",
    ]  # fmt: skip
    assert found[0][1] == "first at step 2: loss 9.0000, 7.0 deviations up; updated all the same"
    assert "no room" in found[3][1]
    assert "SIGUSR1" in found[4][1]
    (run,) = [m.run for m in wandb_records(tmp_path) if m.HasField("run")]
    known = values(run.config.update)["origin"]
    slurm = {"slurm": {"job_id": "4711", "restart_count": "2"}}
    assert known == CODE | IDENTITY | ENVIRONMENT | slurm
    assert read_origin(tmp_path) == known
    # the copy has what the truth has
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert [row["step"] for row in history(tmp_path)] == steps == [1, 2, 3, 4, 30, 30]


def test_a_dropped_update_and_a_spike_are_warnings_on_the_console(tmp_path: Path, caplog) -> None:
    record = open_record(tmp_path)
    for number, changes in enumerate(
        (
            {"loss/spike_score": 5.9},
            {"loss/nats": math.nan, "loss/spike_score": math.inf},
            {"gradient/norm": math.inf},
            {"loss/nats": 7.0, "loss/spike_score": 6.0},
            {"loss/nats": 9.0, "loss/spike_score": 12.0},
        ),
        start=1,
    ):
        record.step(step(number, **changes))
    record.finish(0)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "non-finite at step 2: loss nan, gradient norm 1.0; no update",
        "non-finite at step 3: loss 2.0, gradient norm inf; no update",
        "spike at step 4: loss 7.0000, 6.0 deviations up; updated all the same",
        "spike at step 5: loss 9.0000, 12.0 deviations up; no update",
    ]


def test_other_ranks_write_and_tell_nothing(tmp_path: Path) -> None:
    record = open_record(tmp_path, rank=1)
    record.step(step(1, loss__nats=math.nan))
    record.alert("spike", "no")
    record.stalled(1)
    assert record.finish(0) == []
    assert not list(tmp_path.iterdir())


def test_an_origin_that_cannot_be_written_or_read_costs_a_warning(tmp_path: Path, caplog) -> None:
    (tmp_path / "origin.json").mkdir()
    record = open_record(tmp_path)
    record.finish(0)
    assert "origin.json cannot be written" in caplog.text
    assert read_origin(tmp_path) == {}
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/origin.json").write_text(json.dumps(CODE)[:-3])
    assert read_origin(tmp_path / "torn") == {}


def test_a_negative_cooldown_is_refused() -> None:
    with pytest.raises(Exception, match=r"logging\.alert_cooldown_s=-1 must be 0 or more"):
        LoggingConfig(wandb=WandbMode.offline, alert_cooldown_s=-1)
