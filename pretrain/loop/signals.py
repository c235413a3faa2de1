"""Signals that ask a run to save and stop."""

import signal
from types import FrameType, TracebackType
from typing import Any

_WATCHED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def keep_for_later() -> None:
    """Let SIGUSR1 wait until `StopSignals` is entered, be it ignored until then or deadly."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


class StopSignals:
    """While entered, SIGUSR1, SIGTERM and SIGINT only set `received`; a second SIGINT kills.

    The loop asks `received` at each step boundary. Enter it in the main thread, before loader
    workers are forked: SLURM sends the signal to every process of a job step,
    and its default action would end them.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in _WATCHED:
            self._previous[number] = signal.signal(number, self._receive)
        # what has come meanwhile is received now
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # The first signal names the reason; a SIGTERM that follows a SIGUSR1 changes nothing.
        if self.received is None:
            self.received = signal.Signals(number)
        if number == signal.SIGINT:
            # The kernel ends the process at the next one, even inside a collective.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
