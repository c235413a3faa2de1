"""The account of rows that were damaged and became padding: `quarantine.jsonl`, and a limit."""

import json
import logging
from pathlib import Path

from pretrain.config import TrainConfig
from pretrain.data.loader import Batch
from pretrain.engine.world import World
from pretrain.errors import DataError
from pretrain.loop.state import TrainState

log = logging.getLogger(__name__)


def note_lost_rows(config: TrainConfig, world: World, state: TrainState, batch: Batch) -> None:
    """Count a step's lost rows of all ranks and write them down; all ranks call it together.

    Raises DataError, on every rank, if the run has lost more than data.quarantine_rows.
    """
    lost = sorted(entry for part in world.gather_objects(batch.lost) for entry in part)
    state.lost_rows += len(lost)
    if world.is_main:
        members = sorted({member for _, member in lost})
        log.warning(
            "%d rows (up to %s tokens) of step %d are lost to damage in %s; %d of at most %d so "
            "far (data.quarantine_rows)",
            len(lost),
            f"{len(lost) * config.model.context:,}",
            state.step + 1,
            ", ".join(members),
            state.lost_rows,
            config.data.quarantine_rows,
        )
        with (Path(config.run.dir) / "quarantine.jsonl").open("a", encoding="utf-8") as file:
            for row, member in lost:
                entry = {"step": state.step + 1, "row": row, "member": member}
                file.write(json.dumps(entry) + "\n")
    if state.lost_rows > config.data.quarantine_rows:
        raise DataError(
            f"{state.lost_rows} rows are lost to damaged shards, more than data.quarantine_rows="
            f"{config.data.quarantine_rows}. `pretrain data verify` lists all damage; copy those "
            "shards again and resume, or raise the limit."
        )
