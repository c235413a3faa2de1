import json
import math
import subprocess
import sys

import pytest

from pretrain.errors import DataError
from pretrain.loop.metrics import MetricLog, read_metrics


def write(path, steps, *, resumed_step=0):
    log = MetricLog(path, resumed_step=resumed_step)
    for step in steps:
        log.write({"step": step, "tokens": step * 100, "loss/nats": 5.0 / step})
    log.close()


def test_every_line_is_strict_json_and_non_finite_floats_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path)
    values = [math.inf, -math.inf, 1.5, math.nan]
    log.write({"step": 1, "loss/nats": math.nan, "validation/loss_nats": values})
    log.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (record,) = read_metrics(path)
    assert math.isnan(record["loss/nats"])
    assert record["validation/loss_nats"][:3] == values[:3]
    assert math.isnan(record["validation/loss_nats"][3])


def test_a_record_can_be_read_before_the_log_is_closed(tmp_path):
    log = MetricLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
    log.close()


def test_resuming_moves_later_records_aside_and_loses_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    write(path, range(5, 10), resumed_step=4)
    write(path, range(7, 9), resumed_step=6)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    discarded = read_metrics(tmp_path / "metrics.discarded.jsonl")
    assert [record["step"] for record in discarded] == [5, 6, 7, 7, 8, 9]
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "metrics.discarded.jsonl",
        "metrics.jsonl",
    ]


def test_resuming_at_the_last_record_rewrites_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    before = path.stat()
    MetricLog(path, resumed_step=3).close()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.faults
def test_a_torn_last_line_is_ignored_by_readers_and_moved_aside_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    torn = path.read_bytes()[:-9]
    path.write_bytes(torn)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    write(path, [3, 4], resumed_step=2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]
    aside = (tmp_path / "metrics.discarded.jsonl").read_bytes()
    assert aside == torn.splitlines(keepends=True)[2] + b"\n"


def test_a_damaged_line_in_the_middle_is_named_with_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1}\ngarbage\n{"step":3}\n')
    with pytest.raises(DataError, match="line 2 of 3 is not a record: b'garbage"):
        read_metrics(path)
    MetricLog(path, resumed_step=3).close()
    assert [record["step"] for record in read_metrics(path)] == [1, 3]


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(DataError, match=r"is .* the folder of a run"):
        read_metrics(tmp_path / "metrics.jsonl")


FULL_DISK = """
import logging, resource, signal, sys
from pathlib import Path
from pretrain.loop.metrics import MetricLog
logging.basicConfig(level=logging.WARNING)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = MetricLog(Path(sys.argv[1]))
for step in range(1, 31):
    room = 200 if 3 <= step <= int(sys.argv[2]) else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    log.write({"step": step, "loss/nats": 1.0})
log.close()
"""


def write_on_full_disk(path, last_refused_step):
    """Thirty records, while the kernel refuses to let the file grow beyond 200 bytes."""
    program = [sys.executable, "-c", FULL_DISK, str(path), str(last_refused_step)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    return [record["step"] for record in read_metrics(path)], done.stderr


@pytest.mark.faults
def test_a_full_disk_delays_records_without_tearing_or_losing_one(tmp_path):
    steps, errors = write_on_full_disk(tmp_path / "metrics.jsonl", last_refused_step=20)
    assert steps == list(range(1, 31))
    assert errors.count("cannot be written") == 1
    assert errors.count("can be written again") == 1


@pytest.mark.faults
def test_records_that_never_reached_a_full_disk_are_counted_at_the_end(tmp_path):
    steps, errors = write_on_full_disk(tmp_path / "metrics.jsonl", last_refused_step=30)
    assert 0 < len(steps) < 30
    assert steps == list(range(1, len(steps) + 1))
    assert f"{30 - len(steps)} records never reached" in errors
