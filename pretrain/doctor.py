"""`pretrain doctor`: is everything there that a run needs, on one machine or across a job.

doctor.scope says how far it looks; each scope is a module of pretrain/preflight.
"""

from importlib import import_module
from typing import cast

from pretrain.config import DoctorConfig


def main(config: DoctorConfig) -> int | None:
    """Print what was found. Raises ConfigError or DataError if training could not start.

    The ranks of a job but rank 0 say nothing, and return the exit code.
    """
    # comparing nodes takes no torch, whose import takes seconds
    scope = import_module(f"pretrain.preflight.{config.doctor.scope.value}")
    return cast(int | None, scope.run(config))
