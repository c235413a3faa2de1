"""What the GPUs feel while they train, read beside the steps so that a driver can only be late."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One GPU at one moment; None: this model does not tell."""

    utilization: float | None
    """Share of the last moments in which a kernel ran."""
    power_w: float | None
    temperature_c: float | None
    clock_hz: float | None
    """Of its multiprocessors."""


NAMES = tuple(field.name for field in fields(Reading))


class Sensors:
    """Reads this rank's GPU every `every_s` seconds in a thread of its own.

    `read` gives None where there is nothing to read, now and for good; a call that hangs costs
    readings and nothing else.
    """

    def __init__(self, read: Callable[[], Reading | None], *, every_s: float) -> None:
        self._read, self._every_s = read, every_s
        self._latest: Reading | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="sensors")

    def __enter__(self) -> "Sensors":
        if self._every_s > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()

    def _run(self) -> None:
        while not self._is_over.is_set():
            try:
                reading = self._read()
            except Exception as error:
                log.warning("the GPU's sensors are read no more: %s", error)
                return
            if reading is None:
                return
            self._latest = reading
            self._is_over.wait(self._every_s)

    def take(self) -> list[float]:
        """For the step's sum: 1 and the value, or twice 0 if it was not read since, by name."""
        reading, self._latest = self._latest, None
        values = [None if reading is None else getattr(reading, name) for name in NAMES]
        return [x for value in values for x in ((0.0, 0.0) if value is None else (1.0, value))]


def sensor_metrics(sums: list[float]) -> dict[str, float]:
    """Means over the ranks that have read since the step before; nothing if none has."""
    named = zip(NAMES, sums[::2], sums[1::2], strict=True)
    return {f"gpu/{name}": total / readings for name, readings, total in named if readings}
