"""What every copy of the record is told."""

import json
import math

import pytest

from pretrain.loop.metrics import decode_record, encode_record
from pretrain.loop.sink import Alerts, message


class Told:
    """A sink that remembers."""

    def __init__(self):
        self.lines = []

    def send(self, line: bytes) -> None:
        self.lines.append(json.loads(line))

    def close(self, exit_code: int = 0) -> None:
        pass


def test_numbers_are_flat_and_lists_are_histograms_and_tables() -> None:
    record = {
        "step": 3, "tokens": 30, "loss/nats": math.inf, "depth/histogram": [0, 2] + [0] * 11,
        "validation/depths": [1, 4], "validation/loss_nats": [3.0, 2.0], "state/moves": [0.5],
    }  # fmt: skip
    assert json.loads(message(record)) == {
        "record": {
            "step": 3, "tokens": 30, "loss/nats": "Infinity",
            "validation/loss_nats_depth_1": 3.0, "validation/loss_nats_depth_4": 2.0,
        },
        "histograms": {"depth/histogram": {"counts": [0, 2], "edges": [0, 1, 2]}},
        "tables": {"validation/depth_curve": {"depth": [1, 4], "loss_nats": [3.0, 2.0]}},
    }  # fmt: skip
    assert json.loads(message({"step": 1})) == {"record": {"step": 1}}
    with pytest.raises(TypeError):
        message({"step": 1, "object": object()})


def test_samples_are_texts_whatever_they_spell() -> None:
    samples = [
        {"prompt": "NaN", "depth": 4, "seed": 7, "text": "Infinity"},
        {"prompt": "", "depth": 8, "seed": 7, "text": 'a "quote"\n\x1b[31m'},
    ]
    line = message({"step": 3, "validation/samples": samples})
    assert json.loads(line) == {"record": {"step": 3}, "texts": {"validation/samples": samples}}
    # through the record as well
    record = decode_record(encode_record({"step": 3, "validation/samples": samples}))
    assert record == {"step": 3, "validation/samples": samples}


def test_an_alert_reaches_all_sinks_and_is_not_repeated_within_its_cooldown() -> None:
    now, sinks = [0.0], [Told(), Told()]
    alerts = Alerts(sinks, cooldown_s=60, clock=lambda: now[0])
    assert alerts.raise_("spike", "one")
    now[0] = 59.0
    assert not alerts.raise_("spike", "two")
    assert alerts.raise_("stall", "another kind")
    now[0] = 60.0
    assert alerts.raise_("spike", "three")
    for sink in sinks:
        texts = [(line["alert"]["title"], line["alert"]["text"]) for line in sink.lines]
        assert texts == [("spike", "one"), ("stall", "another kind"), ("spike", "three")]
