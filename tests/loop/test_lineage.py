"""The lives of a run are on record, and so is how much of the time was worth something."""

import json
import logging
from pathlib import Path

import pytest
import torch

from pretrain.engine.world import World
from pretrain.errors import CheckpointError
from pretrain.loop.lineage import Lineage, goodput, read_lives, run_goodput

MAIN = World(0, 1, 0, torch.device("cpu"))


def keep() -> None:
    """The folder is ours."""


def lose() -> None:
    raise CheckpointError("now belongs to a later life")


def live(run_dir: Path, first: int, last: int, reason: str) -> None:
    with Lineage(run_dir, MAIN, first_step=first, tags={}, fence=keep) as lineage:
        lineage.last_step = last
        lineage.reason = reason


def test_a_life_leaves_where_it_ran_how_far_it_came_and_why_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURMD_NODENAME", "node9")
    live(tmp_path, 0, 5, "SIGUSR1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    live(tmp_path, 5, 9, "finished")
    first, second = read_lives(tmp_path)
    assert (first.number, first.first_step, first.last_step, first.reason) == (1, 0, 5, "SIGUSR1")
    assert (first.job_id, first.restart_count, first.nodes, first.ranks) == ("77", 2, ["node9"], 1)
    assert (second.number, second.first_step, second.last_step) == (2, 5, 9)
    assert (second.reason, second.restart_count) == ("finished", 3)
    assert first.ended_s is not None
    assert first.began_s <= first.ended_s <= second.began_s


def test_an_error_is_named_and_a_death_is_unknown(tmp_path: Path) -> None:
    def lose_a_peer() -> None:
        with Lineage(tmp_path, MAIN, first_step=3, tags={}, fence=keep) as lineage:
            lineage.last_step = 4
            raise RuntimeError("a peer is gone")

    with pytest.raises(RuntimeError):
        lose_a_peer()
    Lineage(tmp_path, MAIN, first_step=4, tags={}, fence=keep).__enter__()
    erred, died = read_lives(tmp_path)
    assert (erred.reason, erred.last_step) == ("RuntimeError", 4)
    assert (died.reason, died.last_step, died.ended_s) == ("unknown", None, None)


def test_the_first_word_about_an_end_counts(tmp_path: Path) -> None:
    with Lineage(tmp_path, MAIN, first_step=0, tags={}, fence=keep) as lineage:
        lineage.end("stalled")
    assert [life.reason for life in read_lives(tmp_path)] == ["stalled"]
    assert len((tmp_path / "lineage.jsonl").read_text().splitlines()) == 2


def test_an_orphan_writes_nothing_about_its_end(tmp_path: Path) -> None:
    with Lineage(tmp_path, MAIN, first_step=0, tags={}, fence=lose):
        before = (tmp_path / "lineage.jsonl").read_bytes()
    assert (tmp_path / "lineage.jsonl").read_bytes() == before


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = World(1, 2, 1, torch.device("cpu"))
    monkeypatch.setattr(World, "gather_objects", lambda world, value: [value] * world.size)
    with Lineage(tmp_path, other, first_step=0, tags={}, fence=lose):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_torn_line_costs_itself_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    live(tmp_path, 0, 5, "SIGUSR1")
    path = tmp_path / "lineage.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    live(tmp_path, 5, 9, "finished")
    with caplog.at_level(logging.WARNING):
        lives = read_lives(tmp_path)
    assert [(life.number, life.reason) for life in lives] == [(1, "unknown"), (2, "finished")]
    assert "torn or damaged" in caplog.text


def test_goodput_is_the_time_in_steps_that_count(tmp_path: Path) -> None:
    live(tmp_path, 0, 2, "SIGUSR1")
    (life,) = read_lives(tmp_path)
    records = [{"step": 1, "speed/step_s": 3.0}, {"step": 1, "validation/depths": [1]},
               {"step": 2, "speed/step_s": 1.5}]  # fmt: skip
    assert goodput([life], records, now_s=life.began_s + 9) == pytest.approx(0.5)
    # step 2 was taken back: its record has left metrics.jsonl
    assert goodput([life], records[:2], now_s=life.began_s + 9) == pytest.approx(1 / 3)
    assert goodput([life], records, now_s=life.began_s - 3600) == 1
    assert goodput([], records, now_s=life.began_s) == 0


def test_goodput_follows_from_the_run_folder(tmp_path: Path) -> None:
    assert run_goodput(tmp_path, now_s=1.0) == 0
    lines = [{"step": step, "speed/step_s": 2.0} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    live(tmp_path, 0, 3, "finished")
    (life,) = read_lives(tmp_path)
    assert life.goodput == 1
    assert run_goodput(tmp_path, now_s=life.began_s + 60) == pytest.approx(0.1)
