"""The run folder: what one run keeps on disk, and how a life of it begins and ends.

config.yaml           the frozen configuration
metrics.jsonl         one object per step and per validation, samples with it
metrics.discarded.jsonl   records of steps that a later life took again, or that were taken back
quarantine.jsonl      rows that damage has cost (data.on_damage=quarantine)
lineage.jsonl         one line when a life begins, one when it ends
rewinds.jsonl         which rows were passed over after loss spikes
stalls.jsonl          who held up the others when a life stood still
control/              touch stop, save or pause in it to ask for that
checkpoints/          whole checkpoints, `latest`, tags/ that keep some, damaged/ set aside
logs/rank-00000.log   one log per rank, appended to by every life; after a stall .stacks, and
                      .flight.json: its last collectives
plots/                pictures of the record
evaluation/           what `pretrain evaluate` found
replay/               what `pretrain replay` found
report.html           what `pretrain report` made of all this
wandb/                W&B's files; tensorboard/: TensorBoard's; sync/: what `pretrain sync` wrote
origin.json           code, data, tokenizer, software, devices and job of the newest life
lock.json             who is writing here now; lock.last: the token of who did last
code/                 copies of the code that `pretrain submit` made, and jobs run from
job.sbatch, job.sh    the script that it made; container.sh, hosts/: what goes with it
submit.json           the jobs that it submitted
requeue.json          left by a life that was told to stop: job, restart, step
"""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from pretrain.compose import (
    as_dict,
    check_resumable,
    differences,
    refuse_secrets,
    thaw,
    write_frozen,
)
from pretrain.config import TrainConfig
from pretrain.engine.world import World
from pretrain.errors import ConfigError, PretrainError
from pretrain.loop.beginning import check_can_begin
from pretrain.secrets import Redacting

log = logging.getLogger(__name__)

T = TypeVar("T")
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def check_run_folder(config: TrainConfig, world: World) -> None:
    """Refuse, on every rank, ranks that disagree and a folder that holds another run, or no run.

    Changes nothing. Raises ConfigError, also for a secret in the configuration, which would be
    written there.
    """
    refuse_secrets(config)
    everyone = world.gather_objects(as_dict(config))
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            keys = [key for key in other if other[key] != everyone[0][key]]
            raise ConfigError(
                f"rank {rank} was started with another configuration than rank 0: "
                f"{', '.join(keys)} differ. Start all ranks with the same arguments."
            )
    run_dir = Path(config.run.dir)
    on_rank_0(world, lambda: check_can_begin(config))
    if (run_dir / "config.yaml").is_file():
        check_resumable(thaw(run_dir), config)
    # rank 0 may write the folder only when everybody has looked at it
    world.barrier()


def begin_life(config: TrainConfig, run_dir: Path) -> None:
    """Freeze the configuration, and forget that the life before asked to be requeued.

    What differs from the life before is said in one WARNING each.
    """
    if (run_dir / "config.yaml").is_file():
        for key, (was, now) in differences(thaw(run_dir), config).items():
            log.warning("resuming with %s=%s (was %s)", key, now, was)
    write_frozen(config, run_dir)
    (run_dir / "requeue.json").unlink(missing_ok=True)
    if named := os.environ.get("PRETRAIN_RUN_RECORD"):
        # a batch script cannot know the folder, and judges progress by its checkpoints
        _write_whole(Path(named), f"{run_dir.resolve()}\n")


def log_file(run_dir: Path, rank: int) -> Path:
    """Where a rank's log is, of all its lives."""
    return run_dir / "logs" / f"rank-{rank:05d}.log"


def log_to_folder(run_dir: Path, rank: int) -> None:
    """Send this rank's log to its own file; only rank 0 also shows its progress."""
    path = log_file(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(Redacting(_FORMAT))
    root = logging.getLogger()
    root.addHandler(to_file)
    for handler in root.handlers:
        if handler is not to_file and rank != 0:
            handler.setLevel(logging.WARNING)


def on_rank_0(world: World, deed: Callable[[], object]) -> None:
    """Do on rank 0 what may fail, and fail on every rank if it did, instead of hanging there."""
    on_all_ranks(world, deed if world.is_main else lambda: None)


def on_all_ranks(world: World, deed: Callable[[], T]) -> T:
    """Do on every rank what may fail on one; all fail with the first rank's error if one did.

    A disk that refuses becomes a ConfigError: another folder, or more room, is the remedy.
    """
    result: T | None = None
    problem: PretrainError | None = None
    try:
        result = deed()
    except PretrainError as error:
        problem = error
    except OSError as error:
        problem = ConfigError(
            f"rank {world.rank}: {error}. Make room or give permission there, or choose another "
            "run.dir."
        )
    problems = [error for error in world.gather_objects(problem) if error is not None]
    if problems:
        raise problems[0]
    return cast(T, result)


def try_folder(folder: Path) -> None:
    """Make a folder and write into it, before time is spent on what is to go there.

    Raises OSError.
    """
    folder.mkdir(exist_ok=True)
    trial = folder / f"trial.tmp-{os.getpid()}"
    trial.touch()
    trial.unlink()


def write_requeue_record(run_dir: Path, step: int) -> None:
    """Tell the batch script that this life was stopped after saving `step` and may go on.

    PRETRAIN_REQUEUE_RECORD names the file if the batch script cannot know the run folder.
    """
    record = {
        "job_id": os.environ.get("SLURM_JOB_ID", ""),
        "restart_count": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "step": step,
    }
    for path in _requeue_paths(run_dir):
        try:
            _write_whole(path, json.dumps(record) + "\n")
        except OSError as error:
            # the save has filled the disk, say, and is good all the same
            log.error("%s cannot be written; who reads it sees a crash: %s", path, error)


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _requeue_paths(run_dir: Path) -> list[Path]:
    named = os.environ.get("PRETRAIN_REQUEUE_RECORD")
    return [run_dir / "requeue.json", *([Path(named)] if named else [])]
