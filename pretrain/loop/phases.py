"""Where the time of a step goes, phase by phase, on the clock of the device that works."""

import time
from collections import defaultdict
from itertools import pairwise

import torch


class PhaseClock:
    """Seconds of this rank in each phase of a step.

    A GPU runs behind its host, so there the marks are events on its stream: they wait for nobody
    until they are read.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def begin(self) -> None:
        """Forget the step before."""
        self._marks.clear()

    def enter(self, phase: str) -> None:
        """What was entered before ends here; a phase may be entered often."""
        if not self._is_cuda:
            self._marks.append((phase, time.monotonic()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((phase, event))

    def seconds(self) -> dict[str, float]:
        """Time in each phase that has ended; waits until the device has got to the last mark."""
        found: dict[str, float] = defaultdict(float)
        for (phase, began), (_, ended) in pairwise(self._marks):
            found[phase] += _between(began, ended)
        return dict(found)


def _between(began: "float | torch.cuda.Event", ended: "float | torch.cuda.Event") -> float:
    if isinstance(began, float) or isinstance(ended, float):
        assert isinstance(began, float)
        assert isinstance(ended, float)
        return ended - began
    ended.synchronize()
    milliseconds: float = began.elapsed_time(ended)
    return milliseconds / 1000
