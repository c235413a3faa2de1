"""Which folder may become a run's: an empty one, or one with what comes before a first life.

A run would write among whatever else is there, rewrite a metrics.jsonl that is not its own, and
sweep checkpoints/ of what looks like a dead process's.
"""

import os
from pathlib import Path

from pretrain.config import TrainConfig
from pretrain.errors import ConfigError

# Prepared by hand or by `pretrain submit`, or left by a life that ended before it froze its
# configuration; and what a disk has of its own.
_BEFORE = ("code", "control", "lock.json", "lock.last", "logs", "rewinds.jsonl", "lost+found")
_DRAFTS = (".partial", ".tmp-")
# what a shell or sbatch writes there of the output of this very process
_OUTPUTS = (".log", ".out", ".err")
_SHOWN = 3


def check_can_begin(config: TrainConfig) -> None:
    """Raise ConfigError if run.dir is no run's folder and holds something. Changes nothing.

    The configuration's own data and tokenizer may lie there, and files of output. Raises OSError if
    it cannot be read.
    """
    folder = Path(config.run.dir)
    if not folder.exists() or (folder / "config.yaml").exists():
        return
    found = sorted(
        name for name in os.listdir(folder) if not _is_known(name) and not _has(config, name)
    )
    if found:
        more = len(found) - _SHOWN
        shown = ", ".join(found[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        raise ConfigError(
            f"run.dir={folder} is no run's folder, since it has no config.yaml, and is not empty: "
            f"it holds {shown}. Choose another run.dir, such as {folder / 'run'}; if it was a "
            "run's, put its config.yaml back."
        )


def _is_known(name: str) -> bool:
    is_draft = any(part in name for part in _DRAFTS)
    return name in _BEFORE or name.startswith(".") or name.endswith(_OUTPUTS) or is_draft


def _has(config: TrainConfig, name: str) -> bool:
    """Whether this entry of run.dir holds something that the configuration names."""
    entry = (Path(config.run.dir) / name).resolve()
    named = (config.data.root, config.data.shards, config.data.cache, config.tokenizer.path)
    return any(Path(path).resolve().is_relative_to(entry) for path in named if path)
