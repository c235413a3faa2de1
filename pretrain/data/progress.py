"""Progress of a long data command: a bar on a terminal, a log line now and then elsewhere."""

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

LOG_EVERY_S = 30.0


class Progress:
    """Counts steps out of `total`, and tokens and bytes per second beside them."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total = name, max(total, 1)
        self._done = self._tokens = self._bytes = 0
        self._started = self._logged = time.monotonic()
        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description:<9}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=self._total, rate="")

    @property
    def done(self) -> int:
        """Steps counted so far."""
        return self._done

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, *, steps: int = 1, tokens: int = 0, read_bytes: int = 0) -> None:
        """Count what has been done since the last call."""
        self._done += steps
        self._tokens += tokens
        self._bytes += read_bytes
        self._bar.update(self._task, advance=steps, rate=self._rate())
        now = time.monotonic()
        if self._bar.disable and now - self._logged >= LOG_EVERY_S:
            self._logged = now
            left_s = (now - self._started) * (self._total - self._done) / max(self._done, 1)
            log.info(
                "%s %.1f %%, %s, %.0f s left",
                self._name,
                100 * self._done / self._total,
                self._rate(),
                left_s,
            )

    def _rate(self) -> str:
        passed_s = max(time.monotonic() - self._started, 1e-6)
        rates = []
        if self._bytes:
            rates.append(f"{self._bytes / passed_s / 1e6:.1f} MB/s")
        if self._tokens:
            rates.append(f"{self._tokens / passed_s / 1e6:.2f} M tokens/s")
        return ", ".join(rates)
