"""The command `pretrain sync`: a run's record as one W&B run on disk, whatever its restarts."""

import dataclasses
import logging
import shutil
from pathlib import Path

from pretrain.compose import as_dict, thaw
from pretrain.config import SyncConfig
from pretrain.errors import DataError
from pretrain.loop.config import WandbMode
from pretrain.loop.curve import clean_curve
from pretrain.loop.metrics import read_metrics
from pretrain.loop.origin import read_origin
from pretrain.loop.sink import message
from pretrain.loop.wandb_file import count_points
from pretrain.loop.wandb_sink import start_wandb

log = logging.getLogger(__name__)

FOLDER = "sync"
# W&B writes some thousand records a second.
_STALL_S = 300.0
_FINISH_S = 600.0


def main(config: SyncConfig) -> None:
    """Write <run.dir>/sync/wandb/offline-run-*, in place of what an earlier call wrote.

    It has the run's own id, so that it is the same page. Nothing is uploaded; the command that does
    is printed. Raises DataError if there is no record, or W&B cannot write it.
    """
    run_dir = Path(config.run.dir)
    run = thaw(run_dir)
    records = clean_curve(read_metrics(run_dir / "metrics.jsonl"))
    folder = run_dir / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    sink = start_wandb(
        dataclasses.replace(run.logging, wandb=WandbMode.offline),
        run_dir,
        as_dict(run) | {"origin": read_origin(run_dir)},
        run_name=run.run.name,
        files_dir=folder,
        finish_s=_FINISH_S,
    )
    assert sink is not None
    for record in records:
        sink.send(message(record))
        sink.drain(_STALL_S)
    sink.close()
    found = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    points = sum(map(count_points, found))
    if sink.has_failed or points != len(records):
        raise DataError(
            f"W&B has {points} of the {len(records)} records of {run_dir}. Is the disk full? What "
            f"W&B says of it is above and in {folder / 'wandb' / 'sink.log'}."
        )
    print(f"{points} records as one W&B run; to upload it: wandb sync {found[0].parent}")
