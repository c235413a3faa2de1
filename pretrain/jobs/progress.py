"""How far a run is, from its folder alone: checkpoints, record, configuration.

As a program, `python -m pretrain.jobs.progress FOLDER` ends with 0 if the run is finished and
with 1 if it is not; a chain's later jobs ask it before they occupy their nodes.
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from pretrain.compose import thaw
from pretrain.config import TrainConfig
from pretrain.errors import CheckpointError
from pretrain.loop.metrics import read_metrics
from pretrain.loop.outcome import describe_last_steps
from pretrain.loop.state import TrainState, last_step

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What a run has to show."""

    saved_step: int
    """Step of the newest checkpoint, 0 if there is none."""
    last_step: int
    """Step at which the run ends."""
    step: int = 0
    """Step of the newest record."""
    loss_nats: float | None = None
    """Of that step."""
    held_out_nats: float | None = None
    """Of the newest validation, at the mean depth."""
    trouble: str = ""
    """What was wrong with the last saved steps, if anything was."""

    @property
    def has_all_steps(self) -> bool:
        """Whether the last step is saved."""
        return self.saved_step >= self.last_step

    @property
    def is_finished(self) -> bool:
        """Whether the last step is saved, and all was well with it."""
        return self.has_all_steps and not self.trouble


def read_progress(folder: Path, config: TrainConfig | None = None) -> Progress:
    """Progress of the run in `folder`, towards the end that `config` (or the frozen one) sets.

    Raises CheckpointError if it is no run folder, or its newest checkpoint cannot be read.
    """
    config = thaw(folder) if config is None else config
    state = newest_state(folder)
    record = folder / "metrics.jsonl"
    records = read_metrics(record) if record.is_file() else []
    steps = [record for record in records if "loss/nats" in record]
    validations = [record for record in records if "validation/loss_at_mean_nats" in record]
    return Progress(
        saved_step=state.step,
        last_step=last_step(config, state),
        step=steps[-1]["step"] if steps else 0,
        loss_nats=steps[-1]["loss/nats"] if steps else None,
        held_out_nats=validations[-1]["validation/loss_at_mean_nats"] if validations else None,
        trouble=describe_last_steps(state) if state.not_finite_in_a_row else "",
    )


def newest_state(folder: Path, *, fingerprint: str | None = None) -> TrainState:
    """Counters of the newest checkpoint of the run in `folder`, all 0 if there is none.

    All 0, too, if the run has trained on shards of another `fingerprint`: then it is another run
    that has the folder. One that cannot be read is passed over, as training does; raises
    CheckpointError if none can.
    """
    # names of committed folders are step- and ten or more digits; temporary ones have a suffix
    found = {
        int(path.parent.name.removeprefix("step-")): path
        for path in (folder / "checkpoints").glob("step-*/state.json")
        if path.parent.name.removeprefix("step-").isdigit()
    }
    problem = None
    for step in sorted(found, reverse=True):
        try:
            saved = json.loads(found[step].read_text(encoding="utf-8"))
            state = TrainState.from_dict(saved["train"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"{found[step]} cannot be read: {error!r}."
            log.warning(problem)
            continue
        is_other = (
            fingerprint is not None and saved.get("data_fingerprint", fingerprint) != fingerprint
        )
        return TrainState() if is_other else state
    if problem is not None:
        raise CheckpointError(problem)
    return TrainState()


if __name__ == "__main__":
    run = Path(sys.argv[1])
    progress = read_progress(run)
    if progress.is_finished:
        print(f"{run} has all its {progress.saved_step} steps.")
    sys.exit(0 if progress.is_finished else 1)
