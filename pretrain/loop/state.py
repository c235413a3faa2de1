"""How far a run is: the few numbers that, with the configuration, name every later step."""

import dataclasses
from typing import Any


@dataclasses.dataclass(slots=True)
class TrainState:
    """Counters over the whole life of a run, whatever its restarts."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    rows: int = 0
    """Rows consumed: the global row of the next step's first row."""
    tokens: int = 0
    """Tokens consumed."""
    skipped_updates: int = 0
    """Steps whose gradient was not finite, so nothing was updated."""
    skipped_in_a_row: int = 0
    """How many of those the last steps were."""
    lives: int = 0
    """Times the run was started or resumed."""
    trained_s: float = 0.0
    """Seconds inside steps, over all lives."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        """The state that `as_dict` gave."""
        return cls(**values)
