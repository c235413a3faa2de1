import json
import logging
import math
import os
import signal
import socket
import threading
import time

import pytest

from full_disk import small_files
from pretrain.loop import sink_process
from pretrain.loop.config import LoggingConfig, WandbMode
from pretrain.loop.sink import Alerts, message
from pretrain.loop.wandb_file import count_points
from pretrain.loop.wandb_sink import choose_mode, start_wandb, stored_run_id
from wandb_files import values, wandb_records

SECRET = "a" * 40
# Copying a record takes microseconds, and a busy machine may stop anybody for a second; a call that
# waited for a process that is stopped or has to finish would wait for ever, or for FINISH_S.
QUICK_S = 5.0
# Importing the package alone takes seconds of a core.
FINISH_S = 120.0


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def start(run_dir, mode=WandbMode.offline, finish_s=FINISH_S):
    config = LoggingConfig(wandb=mode, project="shelf", tags=["red"])
    return start_wandb(config, run_dir, {"run": {"seed": 7}}, run_name="first", finish_s=finish_s)


def record(step):
    return {"step": step, "tokens": step * 100, "loss/nats": 8.0 / step}


def test_an_offline_run_holds_every_record_and_the_configuration_and_no_secret(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("A_SECRET_OF_MINE", "swordfish")
    sink = start(tmp_path)
    for step in range(1, 401):
        sink.send(message(record(step)))
    sink.send(
        message(
            {
                "step": 400,
                "tokens": 40_000,
                "validation/depths": [1, 8],
                "validation/loss_nats": [3.0, 2.0],
            }
        )
    )
    sink.close()
    messages = list(wandb_records(tmp_path))
    history = [values(m.history.item) for m in messages if m.HasField("history")]
    assert [row["step"] for row in history] == [*range(1, 401), 400]
    assert [row["loss/nats"] for row in history[:400]] == [8.0 / step for step in range(1, 401)]
    assert history[-1]["validation/loss_nats_depth_8"] == 2.0
    (run,) = [m.run for m in messages if m.HasField("run")]
    assert (run.project, run.display_name, list(run.tags)) == ("shelf", "first", ["red"])
    assert run.run_id == stored_run_id(tmp_path, "first")
    assert values(run.config.update)["run"] == {"seed": 7}
    assert [m.metric.step_metric for m in messages if m.HasField("metric")] == ["tokens"]
    assert [m.exit.exit_code for m in messages if m.HasField("exit")] == [0]
    assert not any(m.HasField("environment") for m in messages)
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*.wandb"))
    for private in (SECRET, "swordfish", str(tmp_path)):
        assert private.encode() not in kept


def test_depths_are_a_histogram_the_curve_a_table_and_alerts_are_alerts(tmp_path):
    sink = start(tmp_path)
    alerts = Alerts([sink], cooldown_s=1000)
    sink.send(message({"step": 1, "tokens": 9, "depth/histogram": [0, 3, 5] + [0] * 10}))
    sink.send(message({"step": 2, "tokens": 18, "loss/nats": math.nan}))
    sink.send(
        message(
            {
                "step": 2,
                "tokens": 18,
                "validation/depths": [1, 8],
                "validation/loss_nats": [3.0, math.inf],
            }
        )
    )
    assert alerts.raise_("spike", "loss 9 at step 2")
    assert not alerts.raise_("spike", "loss 10 at step 3")
    sink.close()
    assert not sink.has_failed
    messages = list(wandb_records(tmp_path))
    first, second, third = [values(m.history.item) for m in messages if m.HasField("history")]
    # three bins are used, the open ones behind them are not drawn
    assert first["depth/histogram.values"] == [0, 3, 5]
    assert first["depth/histogram.bins"] == [0, 1, 2, 4]
    assert math.isnan(second["loss/nats"])
    assert first["depth/histogram._type"] == "histogram"
    assert third["validation/depth_curve._type"] == "table-file"
    (path,) = tmp_path.glob("wandb/offline-run-*/files/" + third["validation/depth_curve.path"])
    kept = json.loads(path.read_text())
    assert kept["columns"] == ["depth", "loss_nats"]
    assert kept["data"][0] == [1, 3.0]
    (alert,) = [m.alert for m in messages if m.HasField("alert")]
    assert (alert.title, alert.text, alert.level) == ("spike", "loss 9 at step 2", "WARN")


def test_samples_are_a_table_of_texts(tmp_path):
    sink = start(tmp_path)
    samples = [
        {"prompt": "NaN", "depth": 4, "seed": 7, "text": " is\nno number"},
        {"prompt": "def ", "depth": 8, "seed": 7, "text": "Infinity"},
    ]
    sink.send(message({"step": 1, "tokens": 9, "validation/samples": samples}))
    sink.close()
    assert not sink.has_failed
    (row,) = [values(m.history.item) for m in wandb_records(tmp_path) if m.HasField("history")]
    assert row["validation/samples._type"] == "table-file"
    (path,) = tmp_path.glob("wandb/offline-run-*/files/" + row["validation/samples.path"])
    kept = json.loads(path.read_text())
    assert kept["columns"] == ["prompt", "depth", "seed", "text"]
    assert kept["data"] == [list(sample.values()) for sample in samples]


@pytest.mark.faults
def test_a_full_disk_costs_points_of_the_copy_and_no_time(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sink_process, "_GRACE_S", 1.0)
    with small_files(1 << 14):
        sink = start(tmp_path, finish_s=5)
    write_quickly(sink, range(1, 3000))
    # W&B may or may not notice, so that it gets 5 s to finish, once it has begun
    deadline = time.monotonic() + FINISH_S
    while not any(path.stat().st_size for path in tmp_path.rglob("*.wandb")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sink.close()
    # `pretrain sync` makes the copy anew
    (path,) = tmp_path.rglob("*.wandb")
    assert 0 < path.stat().st_size <= 1 << 14
    assert count_points(path) < 2999
    assert len(warnings(caplog)) <= 1
    assert not sink.is_active


def test_both_lives_of_a_run_folder_share_one_id_even_after_it_moved(tmp_path):
    (tmp_path / "old/wandb").mkdir(parents=True)
    first = stored_run_id(tmp_path / "old", "first")
    (tmp_path / "old").rename(tmp_path / "new")
    assert stored_run_id(tmp_path / "new", "first") == first
    (tmp_path / "old/wandb").mkdir(parents=True)
    assert stored_run_id(tmp_path / "old", "second") != first


def test_an_id_that_a_full_disk_has_left_empty_is_written_again(tmp_path):
    path = tmp_path / "wandb/run-id.txt"
    first = stored_run_id(tmp_path, "first")
    path.write_text("")
    assert stored_run_id(tmp_path, "first") == first
    assert path.read_text().strip() == first
    assert [other.name for other in path.parent.iterdir()] == ["run-id.txt"]


def test_disabled_starts_nothing(tmp_path):
    assert start(tmp_path, WandbMode.disabled) is None
    assert list(tmp_path.iterdir()) == []


def test_auto_is_online_only_with_a_key(tmp_path, monkeypatch, caplog):
    auto = LoggingConfig(wandb=WandbMode.auto)
    assert choose_mode(auto) == "offline"
    (tmp_path / "netrc").write_text("machine my.server login user password secret\n")
    assert choose_mode(auto) == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "http://my.server:8080")
    assert choose_mode(auto) == "online"
    (tmp_path / "netrc").write_text("nonsense\n")
    assert choose_mode(auto) == "offline"
    assert "netrc file cannot be read" in caplog.text
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert choose_mode(auto) == "online"
    assert choose_mode(LoggingConfig(wandb=WandbMode.offline)) == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode(auto) == "disabled"


def test_an_empty_mode_in_the_environment_is_none(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "")
    assert choose_mode(LoggingConfig(wandb=WandbMode.auto)) == "offline"
    sink = start(tmp_path, WandbMode.auto)
    sink.send(message(record(1)))
    sink.close()
    assert [m for m in wandb_records(tmp_path) if m.HasField("history")]
    assert warnings(caplog) == []


def warnings(caplog):
    return [entry.message for entry in caplog.records if entry.levelno >= logging.WARNING]


def write_quickly(sink, steps):
    slowest = 0.0
    for step in steps:
        started = time.monotonic()
        sink.send(message(record(step)))
        slowest = max(slowest, time.monotonic() - started)
    assert slowest < QUICK_S


@pytest.mark.faults
def test_a_killed_process_costs_one_warning(tmp_path, caplog):
    sink = start(tmp_path)
    write_quickly(sink, range(1, 10))
    os.kill(sink.process_id, signal.SIGKILL)
    # its end of the pipe is gone a moment before itself
    os.waitid(os.P_PID, sink.process_id, os.WEXITED | os.WNOWAIT)
    write_quickly(sink, range(10, 2000))
    sink.close()
    assert not sink.is_active
    (warning,) = warnings(caplog)
    assert "W&B is disabled" in warning
    assert "-9" in warning


@pytest.mark.faults
def test_a_process_that_hangs_is_disabled_when_the_queue_is_full(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sink_process, "_MAX_WAITING", 100)
    sink = start(tmp_path)
    os.kill(sink.process_id, signal.SIGSTOP)
    write_quickly(sink, range(1, 5000))
    assert not sink.is_active
    (warning,) = warnings(caplog)
    assert "100 records wait" in warning


@pytest.mark.faults
def test_a_process_that_hangs_is_disabled_after_a_while(tmp_path, caplog, monkeypatch):
    sink = start(tmp_path)
    os.kill(sink.process_id, signal.SIGSTOP)
    write_quickly(sink, range(1, 3000))
    assert sink.is_active
    monkeypatch.setattr(sink_process, "_STALL_S", 0.05)
    time.sleep(0.1)
    write_quickly(sink, [3000])
    (warning,) = warnings(caplog)
    assert "taken nothing" in warning


@pytest.mark.faults
def test_a_process_that_hangs_at_the_end_delays_the_end_by_its_bound(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sink_process, "_GRACE_S", 0.5)
    sink = start(tmp_path, finish_s=0.5)
    os.kill(sink.process_id, signal.SIGSTOP)
    started = time.monotonic()
    sink.close()
    # finish_s and the grace are one second; the rest is for a slow machine
    assert 1.0 <= time.monotonic() - started < 20
    (warning,) = warnings(caplog)
    assert "did not finish in 0.5 s" in warning


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    (tmp_path / "wandb").write_text("in the way")
    sink = start(tmp_path)
    write_quickly(sink, range(1, 10))
    sink.close()
    (warning,) = warnings(caplog)
    assert "could not be started" in warning


@pytest.mark.slow  # W&B itself gives up only after about 26 s.
def test_a_server_that_never_answers_turns_the_run_offline(tmp_path, caplog, monkeypatch):
    server = socket.create_server(("127.0.0.1", 0))
    connections = []

    def accept():
        while True:
            try:
                connections.append(server.accept())
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    with caplog.at_level(logging.INFO):
        sink = start(tmp_path, WandbMode.auto, finish_s=60)
        write_quickly(sink, range(1, 10))
        sink.close()
    server.close()
    assert connections
    (warning,) = warnings(caplog)
    assert "cannot be reached" in warning
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"loss/nats" in path.read_bytes()
