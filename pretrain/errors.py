"""What can go wrong for a user, and the exit code of each.

Every message says what was given, with its numbers, and what would be right.
"""

EXIT_FINISHED = 0
EXIT_CONFIG = 64
EXIT_DATA = 65
EXIT_BUG = 70
EXIT_SAVED_ON_SIGNAL = 75
EXIT_STALLED = 76


class PretrainError(Exception):
    """A mistake that the user can mend; printed without a traceback."""

    exit_code = EXIT_BUG
    is_final = True
    """Whether another life would end in the same way until somebody mends the cause."""


class ConfigError(PretrainError):
    """The configuration asks for something impossible or unknown."""

    exit_code = EXIT_CONFIG


class DataError(PretrainError):
    """Text, tokenizer or shards are missing, damaged, or do not belong together."""

    exit_code = EXIT_DATA


class DamageError(DataError):
    """Stored rows are missing or not what the manifest says; data.on_damage decides."""


class UnreachableError(DataError):
    """Data could not be had this time, which says nothing about it; another life may get it."""

    is_final = False


class CheckpointError(PretrainError):
    """A checkpoint or run folder is damaged, or belongs to another run."""

    exit_code = EXIT_DATA


class DivergenceError(PretrainError):
    """Training cannot go on: its numbers are no longer finite."""
