import json
import logging
import os
import re
import subprocess
import sys
import time

import pytest

from pretrain.errors import CheckpointError, ConfigError
from pretrain.loop.lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from pretrain.loop.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def holder(tmp_path):
    """Another live process that holds tmp_path."""
    environment = {**os.environ, "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def edit(tmp_path, **changes):
    """Rewrites the lock as if another kind of holder had made it."""
    path = tmp_path / "lock.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_lock_names_its_holder_and_goes_with_it(tmp_path):
    with RunLock(tmp_path / "run"):
        content = json.loads((tmp_path / "run/lock.json").read_text())
        assert content["pid"] == os.getpid()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock.last"]


def test_a_live_holder_is_refused_by_name(tmp_path, holder):
    message = f"process {holder.pid} on .*SLURM job 77 restart 1"
    with pytest.raises(ConfigError, match=message), RunLock(tmp_path):
        pass
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == holder.pid


@pytest.mark.faults
def test_a_killed_holder_is_taken_over_with_one_warning(tmp_path, holder, caplog):
    holder.kill()
    # Not reaped yet: a zombie is as dead as a process that is gone.
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with caplog.at_level(logging.WARNING), RunLock(tmp_path) as lock:
        lock.refresh()
    assert [record.message.count("that process has ended") for record in caplog.records] == [1]


def test_a_process_that_reuses_the_number_of_a_dead_holder_does_not_block(tmp_path, holder):
    edit(tmp_path, pid_start="1")
    with RunLock(tmp_path) as lock:
        lock.refresh()


@pytest.mark.parametrize(
    "changes", [{"host": "elsewhere"}, {"boot_id": "x"}, {"pid_namespace": ""}]
)
def test_the_number_of_a_process_on_another_system_says_nothing(tmp_path, holder, changes):
    holder.kill()
    edit(tmp_path, **changes)
    with pytest.raises(ConfigError, match="in use"), RunLock(tmp_path):
        pass


@pytest.mark.parametrize(
    ("job_id", "restart", "is_taken"), [("77", "2", True), ("77", "1", False), ("78", "2", False)]
)
def test_a_later_life_of_the_same_job_takes_over(
    tmp_path, holder, monkeypatch, job_id, restart, is_taken
):
    monkeypatch.setenv("SLURM_JOB_ID", job_id)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    if is_taken:
        with RunLock(tmp_path) as lock:
            lock.refresh()
    else:
        with pytest.raises(ConfigError, match="in use"), RunLock(tmp_path):
            pass


def test_a_silent_holder_is_taken_over_and_a_heartbeat_prevents_it(tmp_path, caplog):
    lock = RunLock(tmp_path, stale_s=100)
    with lock:
        edit(tmp_path, host="elsewhere")
        os.utime(tmp_path / "lock.json", (time.time() - 200, time.time() - 200))
        with RunLock(tmp_path, stale_s=100) as other:
            os.utime(tmp_path / "lock.json", (time.time() - 200, time.time() - 200))
            other.refresh()
            with pytest.raises(ConfigError, match="in use"), RunLock(tmp_path, stale_s=100):
                pass
    # the 200 s and what this machine took meanwhile
    (silent_s,) = re.findall(r"silent for (\d+) s, more than 100 s", caplog.text)
    assert 200 <= int(silent_s) < 260


@pytest.mark.faults
def test_an_orphan_that_was_replaced_stops_and_leaves_the_lock_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    orphan = RunLock(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    later = RunLock(tmp_path)
    with orphan, later:
        with pytest.raises(CheckpointError, match=r"job 77 restart 1.*stops without writing"):
            orphan.refresh()
        orphan.__exit__(None, None, None)
        later.refresh()
        assert (tmp_path / "lock.json").exists()


def test_an_orphan_stops_also_when_its_successor_has_ended(tmp_path):
    with RunLock(tmp_path) as orphan:
        edit(tmp_path, pid=1 << 30, pid_start="gone")
        with RunLock(tmp_path):
            pass
        assert not (tmp_path / "lock.json").exists()
        with pytest.raises(CheckpointError, match="now belongs to a later life"):
            orphan.refresh()
        assert not (tmp_path / "lock.json").exists()


def test_a_lock_removed_by_hand_is_made_again(tmp_path, caplog):
    with RunLock(tmp_path) as lock:
        (tmp_path / "lock.json").unlink()
        lock.refresh()
        assert (tmp_path / "lock.json").exists()
    assert "removed by hand" in caplog.text


@pytest.mark.faults
def test_a_damaged_lock_is_replaced(tmp_path):
    (tmp_path / "lock.json").write_text("{")
    with RunLock(tmp_path) as lock:
        lock.refresh()


def test_a_link_whose_answer_was_lost_is_our_own(tmp_path, monkeypatch):
    """A client of NFS asks again, and then hears that the name is there."""
    link = os.link

    def link_twice(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    with RunLock(tmp_path) as lock:
        lock.refresh()
        with pytest.raises(ConfigError, match="in use"), RunLock(tmp_path):
            pass


def test_a_holder_that_leaves_while_the_queue_is_asked_leaves_it_free(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "test")
    RunLock(tmp_path).__enter__()
    edit(tmp_path, host="elsewhere")

    def leave(job_id):
        (tmp_path / "lock.json").unlink()
        return False

    with RunLock(tmp_path, has_ended=leave) as lock:
        lock.refresh()
    assert "taken over: it has just left" in caplog.text


def test_of_many_that_start_together_one_gets_the_folder(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(6)
    ]
    deadline = time.monotonic() + 60
    try:
        while sum(process.poll() is None for process in processes) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)
        assert sum(process.poll() is None for process in processes) == 1
    finally:
        for process in processes:
            process.kill()
            process.communicate()
