"""Signals that ask a run to save and stop."""

import signal
from types import FrameType, TracebackType
from typing import Any

_WATCHED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def keep_for_later() -> None:
    """Let SIGUSR1 wait until `StopSignals` asks for it, be it ignored until then or deadly."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


class StopSignals:
    """While entered, SIGUSR1, SIGTERM and SIGINT only set `received`; a second SIGINT kills.

    The loop asks `received` at each step boundary. Enter it in the main thread, before loader
    workers are forked: SLURM sends the signal to every process of a job step.

    SIGUSR1 stays blocked and is looked for. Compilers and whatever else training starts inherit
    that; of a handler they would inherit the default action, which ends them.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._mask: set[signal.Signals | int] = set()

    @property
    def received(self) -> signal.Signals | None:
        """The first signal, None before; for the main thread."""
        if self._received is None and signal.SIGUSR1 in signal.sigpending():
            self._received = signal.SIGUSR1
        return self._received

    def __enter__(self) -> "StopSignals":
        # a thread that is older than the block may take SIGUSR1, so that has a handler too
        for number in _WATCHED:
            self._previous[number] = signal.signal(number, self._receive)
        self._mask = set(signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1}))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # it has been obeyed, or comes too late; a thread older than the block may be quicker
        while signal.sigtimedwait({signal.SIGUSR1}, 0):
            pass
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # The first signal names the reason; a SIGTERM that follows a SIGUSR1 changes nothing.
        if self.received is None:
            self._received = signal.Signals(number)
        if number == signal.SIGINT:
            # The kernel ends the process at the next one, even inside a collective.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
