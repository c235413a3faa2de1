"""What fails on one rank fails on all of them, and nobody waits."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pretrain.compose import load
from pretrain.engine.world import World
from pretrain.errors import ConfigError, DataError
from pretrain.loop.run_folder import begin_life, on_all_ranks, on_rank_0, write_requeue_record
from pretrain.testing import load_module, run_ranks

SELF = Path(__file__)


def fail_by_rank(world: World) -> dict[str, Any]:
    """What each rank learns when one of them fails, in four ways."""

    def fail(number: int, error: Exception) -> int:
        if world.rank == number:
            raise error
        return world.rank

    found: dict[str, Any] = {"result": on_all_ranks(world, lambda: world.rank)}
    for name, number, error in (
        ("data", 1, DataError("shard 7 is damaged")),
        ("disk", 0, OSError(28, "No space left on device", "run/logs")),
    ):
        try:
            on_all_ranks(world, lambda n=number, e=error: fail(n, e))
        except (ConfigError, DataError) as problem:
            found[name] = (type(problem).__name__, str(problem))
    try:
        on_rank_0(world, lambda: fail(0, PermissionError(13, "Permission denied", "run")))
    except ConfigError as problem:
        found["main"] = str(problem)
    return found


@pytest.mark.faults
def test_every_rank_hears_of_one_rank_s_failure() -> None:
    function = load_module(SELF).fail_by_rank
    for rank, found in enumerate(run_ranks(function, 2)):
        assert found["result"] == rank
        assert found["data"] == ("DataError", "shard 7 is damaged")
        kind, said = found["disk"]
        assert kind == "ConfigError"
        assert "rank 0: [Errno 28] No space left on device: 'run/logs'" in said
        assert "choose another run.dir" in said
        assert "Permission denied" in found["main"]


def test_what_changed_since_the_last_life_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = f"run.dir={tmp_path}"
    begin_life(load("train", [folder, "run.steps=7"]), tmp_path)
    assert not caplog.records
    (tmp_path / "requeue.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        begin_life(load("train", [folder, "run.steps=9"]), tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        "resuming with run.steps=9 (was 7)"
    ]
    assert not (tmp_path / "requeue.json").exists()


@pytest.mark.faults
def test_a_record_for_the_batch_script_that_cannot_be_written_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    named = tmp_path / "of-the-job.json"
    monkeypatch.setenv("PRETRAIN_REQUEUE_RECORD", str(named))
    (tmp_path / "requeue.json").mkdir()
    write_requeue_record(tmp_path, 7)
    assert json.loads(named.read_text())["step"] == 7
    assert "requeue.json cannot be written" in caplog.text
