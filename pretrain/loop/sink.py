"""Where copies of the record go: what a copy is told, and the alerts that all copies are told."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pretrain.loop.metrics import encode_record
from pretrain.loop.step_metrics import HISTOGRAM_EDGES

HISTOGRAM = "depth/histogram"
CURVE = "validation/depth_curve"
SAMPLES = "validation/samples"


class Sink(Protocol):
    """A copy of the record. No method raises, and only `close` waits."""

    def send(self, line: bytes) -> None:
        """Hand over one message."""

    def close(self, exit_code: int = 0) -> None:
        """The run ends."""


class Alerts:
    """Tells every sink what somebody should know of, each kind at most once per `cooldown_s`."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        *,
        cooldown_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sinks, self._cooldown_s, self._clock = sinks, cooldown_s, clock
        self._last: dict[str, float] = {}

    def raise_(self, kind: str, text: str) -> bool:
        """Whether it was sent, or held back because the last of its kind is recent."""
        now = self._clock()
        if kind in self._last and now - self._last[kind] < self._cooldown_s:
            return False
        self._last[kind] = now
        line = json.dumps({"alert": {"title": kind, "text": text}}).encode() + b"\n"
        for sink in self._sinks:
            sink.send(line)
        return True


def message(record: Mapping[str, Any]) -> bytes:
    """A record as sinks take it: a number per key, and histograms and tables in their own keys.

    The line has `record`, and by name `histograms` (counts and edges), `tables` (columns of
    numbers) and `texts` (rows of columns, whose strings are no numbers whatever they spell).
    Raises TypeError for what JSON cannot spell.
    """
    numbers = {key: value for key, value in record.items() if not isinstance(value, list | tuple)}
    depths, losses = record.get("validation/depths", ()), record.get("validation/loss_nats", ())
    for depth, nats in zip(depths, losses, strict=True):
        numbers[f"validation/loss_nats_depth_{depth}"] = nats
    parts = [b'{"record":' + encode_record(numbers).rstrip()]
    if HISTOGRAM in record:
        named = json.dumps({HISTOGRAM: _histogram(record[HISTOGRAM])}).encode()
        parts.append(b'"histograms":' + named)
    if depths:
        columns = encode_record({"depth": depths, "loss_nats": losses}).rstrip()
        parts.append(b'"tables":{"' + CURVE.encode() + b'":' + columns + b"}")
    if record.get(SAMPLES):
        parts.append(b'"texts":' + json.dumps({SAMPLES: record[SAMPLES]}).encode())
    return b",".join(parts) + b"}\n"


def _histogram(counts: Sequence[int]) -> dict[str, Any]:
    """Without the empty bins at the end: the last one is open."""
    used = max((number for number, count in enumerate(counts, 1) if count), default=1)
    return {"counts": counts[:used], "edges": HISTOGRAM_EDGES[: used + 1]}
