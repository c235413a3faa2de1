"""Where a life of a run comes from: code, data, tokenizer, software, devices and job.

For the pages about the run; nothing that trains reads it.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FILE = "origin.json"
_SLURM = ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "CLUSTER_NAME")


def origin(
    code: Mapping[str, str], identity: Mapping[str, str], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """`code` (commit and hash of its changes), hashes of data and tokenizer, `environment`
    (versions of software, and how many ranks have which device), and SLURM's ids.
    """
    names = {name.lower(): os.environ.get(f"SLURM_{name}") for name in _SLURM}
    slurm = {name: value for name, value in names.items() if value}
    return {**code, **identity, **environment, "slurm": slurm}


def write_origin(run_dir: Path, found: Mapping[str, Any]) -> None:
    """Keep it for `pretrain sync`; a disk that refuses costs a WARNING."""
    try:
        (run_dir / FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        log.warning("%s cannot be written: %s", run_dir / FILE, error)


def read_origin(run_dir: Path) -> dict[str, Any]:
    """Of the newest life; empty if there is none that can be read."""
    try:
        found: dict[str, Any] = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
