"""What `pretrain doctor` looks at. Torch-free."""

import math
from dataclasses import dataclass
from enum import Enum

from pretrain.errors import ConfigError


class Scope(Enum):
    """How far `pretrain doctor` looks; each is a module of pretrain/preflight."""

    machine = "machine"
    """This machine, in one process: can it train, and what is missing."""
    node = "node"
    """One node of a job, in one process: is it as healthy and as fast as it should be."""
    compare = "compare"
    """What the nodes have left in doctor.folder: do they agree, is one of them slow."""
    job = "job"
    """All ranks of a job together: links, clocks, and the mathematics of the engine."""


@dataclass(kw_only=True, slots=True)
class DoctorOptions:
    """What `pretrain doctor` looks at, and how long."""

    scope: Scope
    """machine, node, compare or job."""
    folder: str | None
    """Where each node leaves NODE.json, and where compare reads them; null: nowhere."""
    burn_s: float
    """Seconds of matrix products on every GPU, or on the CPU if the run trains there."""
    shards: int
    """Shards whose first member each node reads; other ones on every node."""
    stale_lock_s: float
    """Compile locks that are older were left behind by a process that is gone."""

    def __post_init__(self) -> None:
        for name in ("burn_s", "stale_lock_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"doctor.{name}={getattr(self, name):g} must be above 0 and finite (seconds)."
                )
        if self.shards < 1:
            raise ConfigError(f"doctor.shards={self.shards} must be at least 1.")
        if self.scope is Scope.compare and not self.folder:
            raise ConfigError(
                "doctor.scope=compare reads what doctor.scope=node has written; say where: "
                "doctor.folder=FOLDER, or PRETRAIN_PREFLIGHT_DIR in the environment."
            )
