"""A copy of the record for TensorBoard, by a process of its own (`tensorboard_process`)."""

import importlib.util
import logging
from pathlib import Path

from pretrain.loop.config import LoggingConfig
from pretrain.loop.sink_process import SinkProcess

log = logging.getLogger(__name__)


def start_tensorboard(
    config: LoggingConfig, run_dir: Path, *, tokens: int, finish_s: float = 30.0
) -> SinkProcess | None:
    """What writes <run.dir>/tensorboard, or None if logging.tensorboard is false.

    `tokens`: what the run has consumed; points from there on are of a life that was cut short, and
    TensorBoard drops them. Warns, and gives None, if the package is not installed.
    """
    if not config.tensorboard:
        return None
    if importlib.util.find_spec("tensorboard") is None:
        log.warning(
            "TensorBoard is off: logging.tensorboard=true needs the package tensorboard; "
            "pip install 'pretrain[tensorboard]'."
        )
        return None
    folder = run_dir / "tensorboard"
    return SinkProcess(
        "TensorBoard",
        Path(__file__).with_name("tensorboard_process.py"),
        {"dir": str(folder), "purge_from": tokens + 1},
        log_path=folder / "sink.log",
        finish_s=finish_s,
    )
