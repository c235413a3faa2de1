import json
import os
import time

import pytest

from pretrain.reporting.run import read_run


def test_a_run_whose_record_grows_is_running(make_living_run):
    run = read_run(make_living_run(steps=10))
    assert run.state == "running"
    # the tiny preset has 320 steps, and steps take 2 s
    assert run.left_s == 2.0 * (320 - 10)


def test_a_run_whose_record_stands_still_is_silent(make_living_run):
    folder = make_living_run(steps=10)
    old_s = time.time() - 61
    os.utime(folder / "metrics.jsonl", (old_s, old_s))
    assert read_run(folder).state == "silent"


@pytest.mark.parametrize("first_step", [0, 10])
@pytest.mark.parametrize(("age_s", "state"), [(90, "running"), (1300, "silent")])
def test_a_life_may_take_as_long_to_its_first_step_as_the_watchdog_allows(
    make_living_run, first_step, age_s, state
):
    folder = make_living_run(steps=first_step)
    began_s = time.time() - age_s
    (folder / "metrics.jsonl").touch()
    os.utime(folder / "metrics.jsonl", (began_s, began_s))
    path = folder / "lineage.jsonl"
    begun = json.loads(path.read_text()) | {"first_step": first_step, "time_s": began_s}
    path.write_text(json.dumps(begun) + "\n")
    # guards.stall_s=1200
    assert read_run(folder).state == state


def test_a_run_that_was_asked_to_pause_is_paused_while_its_heart_beats(make_living_run):
    folder = make_living_run(steps=10)
    old_s = time.time() - 61
    os.utime(folder / "metrics.jsonl", (old_s, old_s))
    (folder / "control").mkdir()
    (folder / "control/pause").touch()
    assert read_run(folder).state == "silent"
    (folder / "lock.json").touch()
    assert read_run(folder).state == "paused"
    (folder / "control/pause").unlink()
    assert read_run(folder).state == "running"


def test_a_run_with_all_its_steps_is_finished_although_its_end_is_missing(make_living_run):
    assert read_run(make_living_run(steps=320)).state == "finished"


def test_why_the_last_life_ended_is_the_state(troubled_run):
    assert read_run(troubled_run).state == "DivergenceError"
