import math

from pretrain.loop.metrics import MetricLog, encode_record
from pretrain.reporting.record import RunRecord


def test_a_growing_file_is_read_on_and_its_torn_line_waits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = encode_record({"step": 1, "tokens": 10, "loss/nats": 2.5})
    second = encode_record({"step": 2, "tokens": 20, "loss/nats": math.nan})
    path.write_bytes(line + second[:9])
    record = RunRecord(path)
    assert record.series["loss/nats"].values.tolist() == [2.5]
    assert not record.refresh()
    with path.open("ab") as file:
        file.write(second[9:])
    assert record.refresh()
    values = record.series["loss/nats"].values.tolist()
    assert values[0] == 2.5
    assert math.isnan(values[1])
    assert (record.step, record.tokens, record.num_damaged) == (2, 20.0, 0)


def test_a_resume_that_takes_steps_back_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path)
    for step in range(1, 6):
        log.write({"step": step, "tokens": step, "loss/nats": float(step)})
    log.close()
    record = RunRecord(path)
    assert record.step == 5
    log = MetricLog(path, resumed_step=2)
    # more than there was before, so that the size alone would tell nothing
    for step in range(3, 9):
        log.write({"step": step, "tokens": step, "loss/nats": 10.0 * step})
    log.close()
    assert record.refresh()
    expected = [1.0, 2.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0]
    assert record.series["loss/nats"].values.tolist() == expected
    assert record.step == 8


def test_a_file_that_was_cut_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = encode_record({"step": 1, "tokens": 1, "a/b": 1.0})
    path.write_bytes(line * 3)
    record = RunRecord(path)
    with path.open("r+b") as file:
        file.truncate(len(line))
    assert record.refresh()
    assert len(record.series["a/b"]) == 1


def test_a_damaged_line_in_the_middle_is_counted_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = encode_record({"step": 1, "tokens": 1, "a/b": 1.0})
    path.write_bytes(line + b"{]\n" + line)
    record = RunRecord(path)
    record.refresh()
    assert record.num_damaged == 1
    assert len(record.series["a/b"]) == 2


def test_a_validation_whose_lists_do_not_match_has_no_depth_curve(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lists = {"validation/depths": [1, 2], "validation/loss_nats": [3.0]}
    path.write_bytes(encode_record({"step": 1, "tokens": 1, **lists}))
    assert RunRecord(path).validations == []
