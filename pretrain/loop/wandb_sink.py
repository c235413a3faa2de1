"""A copy of the record on W&B, by a process of its own (`wandb_process`)."""

import hashlib
import logging
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pretrain.loop.config import LoggingConfig, WandbMode
from pretrain.loop.sink_process import SinkProcess

log = logging.getLogger(__name__)


def start_wandb(
    config: LoggingConfig,
    run_dir: Path,
    run_config: Mapping[str, Any],
    *,
    run_name: str,
    files_dir: Path | None = None,
    finish_s: float = 30.0,
) -> SinkProcess | None:
    """What sends messages to W&B, or None if it is disabled.

    `run_config` becomes the page's configuration; the environment, the code and the console are
    never uploaded. Lives of one run folder share one W&B run. `files_dir`: where W&B's files go;
    None: the run folder.
    """
    mode = choose_mode(config)
    if mode == "disabled":
        return None
    files_dir = files_dir or run_dir
    run = {
        "project": config.project,
        "entity": config.entity,
        "tags": config.tags,
        "name": run_name,
        "id": stored_run_id(run_dir, run_name),
        "dir": str(files_dir),
    }
    return SinkProcess(
        "W&B",
        Path(__file__).with_name("wandb_process.py"),
        {"mode": mode, "run": run, "config": run_config, "finish_timeout_s": finish_s},
        log_path=files_dir / "wandb" / "sink.log",
        finish_s=finish_s,
    )


def choose_mode(config: LoggingConfig) -> str:
    """online, offline or disabled: what the configuration, W&B's own WANDB_MODE and keys allow."""
    if config.wandb is not WandbMode.auto:
        return str(config.wandb.value)
    # a variable that a script leaves empty is no wish
    wish = os.environ.get("WANDB_MODE") or "online"
    return wish if wish != "online" or _has_key() else "offline"


def stored_run_id(run_dir: Path, run_name: str) -> str:
    """W&B's id of this run: derived once from name and place, then kept in the run folder.

    A folder that cannot be written, and a file that a full disk has left empty, give the derived
    one.
    """
    path = run_dir / "wandb" / "run-id.txt"
    digest = hashlib.sha256(f"{run_name}\0{run_dir.resolve()}".encode()).hexdigest()[:16]
    try:
        if path.exists() and (known := path.read_text().strip()):
            return known
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        draft.write_text(digest + "\n")
        draft.replace(path)
        return digest
    except OSError:
        return digest


def _has_key() -> bool:
    """Whether W&B would find an API key without asking a person."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except FileNotFoundError:
        return False
    except (OSError, netrc.NetrcParseError) as error:
        log.warning("W&B stays offline: the netrc file cannot be read (%s).", error)
        return False
