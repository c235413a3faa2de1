"""`pretrain doctor`: is everything there that a run needs, on one machine or across a job.

doctor.scope says how far it looks; each scope is a module of pretrain/preflight.
"""

from importlib import import_module

from pretrain.config import DoctorConfig


def main(config: DoctorConfig) -> None:
    """Print what was found. Raises ConfigError or DataError if training could not start."""
    # comparing nodes takes no torch, whose import takes seconds
    import_module(f"pretrain.preflight.{config.doctor.scope.value}").run(config)
