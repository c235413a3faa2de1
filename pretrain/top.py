"""The command `pretrain top`: a run as it goes, in the terminal."""

import logging
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from pretrain.config import TopConfig
from pretrain.loop.lineage import FINISHED
from pretrain.reporting.frame import frame
from pretrain.reporting.run import Run, read_run

log = logging.getLogger(__name__)


def main(config: TopConfig) -> None:
    """Show the run until it has finished or Ctrl-C; one frame if asked, or if no terminal looks on.

    Raises CheckpointError if the folder is no run.
    """
    console = Console()
    run = read_run(Path(config.run.dir))
    is_once = config.top.once
    if not is_once and not console.is_terminal:
        log.warning("no terminal looks on: one frame, as with top.once=true")
        is_once = True
    if is_once:
        console.print(frame(run, width=console.width))
        return
    _watch(console, run, config.top.refresh_s)


def _watch(console: Console, run: Run, refresh_s: float) -> None:
    # the first reading has said what is damaged; said again it would tear the picture
    logging.disable(logging.WARNING)
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                live.update(frame(run, width=console.width), refresh=True)
                if run.state == FINISHED:
                    return
                time.sleep(refresh_s)
                run = read_run(run.folder, earlier=run)
        except KeyboardInterrupt:
            # the way to leave
            return
