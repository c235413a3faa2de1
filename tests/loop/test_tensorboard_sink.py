"""TensorBoard's copy: read back with its own reader, and free to fail."""

import logging
import os
import signal
import time

import pytest

from full_disk import small_files
from pretrain.loop import sink_process
from pretrain.loop.config import LoggingConfig, WandbMode
from pretrain.loop.sink import Alerts, message
from pretrain.loop.tensorboard_sink import start_tensorboard

ON = LoggingConfig(wandb=WandbMode.disabled, tensorboard=True)
# Copying a record takes microseconds, and a busy machine may stop anybody for a second; a call that
# waited for a process that is stopped or has to finish would wait for ever, or for FINISH_S.
QUICK_S = 5.0
# Importing the package alone takes seconds of a core.
FINISH_S = 120.0


def record(step):
    return {"step": step, "tokens": step * 100, "loss/nats": 8.0 / step}


def warnings(caplog):
    return [entry.message for entry in caplog.records if entry.levelno >= logging.WARNING]


def test_it_is_off_unless_asked_for(tmp_path):
    assert start_tensorboard(LoggingConfig(wandb=WandbMode.disabled), tmp_path, tokens=0) is None
    assert not list(tmp_path.iterdir())


def test_without_the_package_it_says_so_and_training_goes_on(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert start_tensorboard(ON, tmp_path, tokens=0) is None
    (warning,) = warnings(caplog)
    assert "pip install 'pretrain[tensorboard]'" in warning


def test_points_lie_at_their_tokens_and_a_resume_takes_back_what_was_lost(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = start_tensorboard(ON, tmp_path, tokens=0, finish_s=FINISH_S)
    for step in range(1, 41):
        first.send(message(record(step)))
    first.close()
    second = start_tensorboard(ON, tmp_path, tokens=3000, finish_s=FINISH_S)
    second.send(message(record(31) | {"loss/nats": 1.0, "depth/histogram": [2, 3] + [0] * 11}))
    second.send(
        message(record(32) | {"validation/depths": [1, 8], "validation/loss_nats": [3.0, 2.0]})
    )
    samples = [{"prompt": "def ", "depth": 8, "seed": 7, "text": "main():\n\treturn <b>"}]
    second.send(message({"step": 32, "tokens": 3200, "validation/samples": samples}))
    Alerts([second], cooldown_s=1).raise_("stall", "stands still")
    second.close()
    assert not first.has_failed
    assert not second.has_failed
    found = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(event.step, event.value) for event in found.Scalars("loss/nats")]
    assert [at for at, _ in points] == [step * 100 for step in range(1, 33)]
    assert points[-2] == (3100, 1.0)
    assert points[29][1] == pytest.approx(8 / 30)
    assert found.Scalars("validation/loss_nats_depth_8")[0].value == 2.0
    (histogram,) = found.Histograms("depth/histogram")
    assert (histogram.step, histogram.histogram_value.num) == (3100, 5)
    (alert,) = found.Tensors("alert/stall/text_summary")
    assert alert.tensor_proto.string_val == [b"stands still"]
    (sample,) = found.Tensors("validation/samples/text_summary")
    # Markdown that shows the text as it is
    shown = b"depth 8, seed 7\n\n    def main():\n    \treturn <b>"
    assert sample.tensor_proto.string_val == [shown]


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["killed", "hangs", "full", "in the way"])
def test_whatever_fails_costs_one_warning_and_no_time(tmp_path, caplog, monkeypatch, fault):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(sink_process, "_GRACE_S", 0.5)
    if fault == "in the way":
        (tmp_path / "tensorboard").write_text("a file")
    with small_files(1 << 14 if fault == "full" else 1 << 40):
        # who hangs is not waited for; a full disk is seen when the file is closed
        finish_s = 0.5 if fault == "hangs" else FINISH_S
        sink = start_tensorboard(ON, tmp_path, tokens=0, finish_s=finish_s)
    if fault in ("killed", "hangs"):
        os.kill(sink.process_id, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        os.waitid(os.P_PID, sink.process_id, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    slowest = 0.0
    for step in range(1, 2000):
        started = time.monotonic()
        sink.send(message(record(step)))
        slowest = max(slowest, time.monotonic() - started)
    sink.close()
    assert slowest < QUICK_S
    assert sink.has_failed
    assert not sink.is_active
    (warning,) = warnings(caplog)
    assert "TensorBoard is disabled" in warning
