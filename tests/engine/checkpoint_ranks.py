"""What the ranks of the checkpoint tests run; imported by path, in processes of their own."""

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.engine import checkpoint, commit, fragments
from pretrain.engine.checkpoint import load_checkpoint, newest_checkpoint
from pretrain.engine.deepspeed import Engine
from pretrain.engine.saving import prune_checkpoints, save_checkpoint
from pretrain.engine.world import World
from pretrain.errors import CheckpointError
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel
from pretrain.testing import tiny_config

# Every function of the save that changes the disk, and where it is looked up.
KILL_POINTS: list[tuple[Any, str]] = [
    (commit, "make_temporary"),
    (fragments, "write_pieces"),
    (commit, "write_json"),
    (commit, "write_manifest"),
    (commit, "sync_folder"),
    (commit, "publish"),
    (commit, "write_pointer"),
    (commit, "replace_pointer"),
    (commit, "delete"),
    (os, "fsync"),
    (os, "rename"),
]


def new_engine(world: World, width: int = 24) -> Engine:
    config = tiny_config()
    config.model.width = width
    model = RecurrentModel(config.model)
    initialize(model, mean_depth=4, seed=0)
    return Engine(model, config, world, micro_steps=1)


def change(engine: Engine) -> None:
    """Make the next checkpoint differ from the last."""
    with torch.no_grad():
        for partition in engine.layout.partitions:
            for fragment in partition.fragments:
                partition.piece(fragment).add_(1.0)


def die_at_every_point(world: World, folder: Path) -> list[tuple[str, str, int | None]]:
    """Save step 1; in a fork per point, save step 2 and prune, and die there.

    For each point: its name, what the newest checkpoint then is ("old", "new", or what is wrong
    with it), and the step that `latest` names.
    """
    engine = new_engine(world)
    base = folder / "base"
    save_checkpoint(engine, world, base, step=1, state={"step": 1})
    before = checkpoint.load_weights(commit.step_folder(base, 1))
    change(engine)
    outcomes = []
    for owner, name in KILL_POINTS:
        for when in ("before", "after"):
            for occurrence in range(1, 9):
                run_dir = folder / f"{name}-{when}-{occurrence}"
                shutil.copytree(base, run_dir)
                if not _dies(
                    lambda d=run_dir: _save_and_prune(engine, world, d),
                    owner,
                    name,
                    when,
                    occurrence,
                ):
                    break
                label = f"{name} {when} {occurrence}"
                outcomes.append((label, _judge(run_dir, before), _named_step(run_dir)))
                # The next life: sweep, save again, and all is well.
                commit.sweep_temporaries(run_dir)
                assert save_checkpoint(engine, world, run_dir, step=2, state={"step": 2})
                assert _judge(run_dir, before) == "new", label
                assert not [
                    p for p in commit.checkpoints_folder(run_dir).iterdir() if "." in p.name
                ]
                shutil.rmtree(run_dir)
    return outcomes


def _save_and_prune(engine: Engine, world: World, run_dir: Path) -> None:
    saved = save_checkpoint(engine, world, run_dir, step=2, state={"step": 2})
    config = tiny_config().checkpoint
    config.keep_last = 1
    prune_checkpoints(run_dir, config, saved=saved)


def _dies(action: Callable[[], None], owner: Any, name: str, when: str, occurrence: int) -> bool:
    """Whether a fork that kills itself at the n-th call of `owner.name` got there."""
    process = os.fork()
    if process == 0:
        original, calls = getattr(owner, name), [0]

        def deadly(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == occurrence and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if calls[0] == occurrence:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, deadly)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def _judge(run_dir: Path, before: dict[str, torch.Tensor]) -> str:
    newest = newest_checkpoint(run_dir)
    if newest is None:
        return "none"
    weights = checkpoint.load_weights(newest)
    step = commit.step_of(newest)
    if checkpoint.read_state(newest) != {"step": step}:
        return f"state of {newest.name}"
    shift = 0.0 if step == 1 else 1.0
    if not all(torch.equal(weights[name], before[name] + shift) for name in before):
        return f"weights of {newest.name}"
    return {1: "old", 2: "new"}[step or 0]


def _named_step(run_dir: Path) -> int | None:
    """The step that `latest` names, if that checkpoint is whole."""
    folder = commit.checkpoints_folder(run_dir)
    named = folder / (folder / "latest").read_text().strip()
    return None if commit.find_damage(named) else commit.step_of(named)


def survive_a_full_disk(world: World, run_dir: Path) -> dict[str, Any]:
    """Rank 1 may write only little: the save fails on all ranks, and the next one works."""
    engine = new_engine(world)
    first = save_checkpoint(engine, world, run_dir, step=1, state={"step": 1})
    change(engine)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        save_checkpoint(engine, world, run_dir, step=2, state={"step": 2})
        error = ""
    except CheckpointError as failure:
        error = str(failure)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    world.barrier()
    after_failure = sorted(path.name for path in commit.checkpoints_folder(run_dir).iterdir())
    whole = newest_checkpoint(run_dir, world) == first
    world.barrier()
    second = save_checkpoint(engine, world, run_dir, step=2, state={"step": 2})
    return {
        "error": error,
        "after_failure": after_failure,
        "old_is_whole": whole,
        "new_is_whole": newest_checkpoint(run_dir, world) == second,
    }


def refuse_a_small_disk(world: World, run_dir: Path, free: int) -> str:
    engine = new_engine(world)
    shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**12, 10**12 - free, free)  # type: ignore
    try:
        save_checkpoint(engine, world, run_dir, step=1, state={})
    except CheckpointError as error:
        return str(error)
    return ""


def die_on_rank_1(world: World, run_dir: Path) -> None:
    """Rank 1 is killed in the middle of its file."""
    engine = new_engine(world)
    save_checkpoint(engine, world, run_dir, step=1, state={"step": 1})
    if world.rank == 1:
        fsync = os.fsync
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        del fsync
    save_checkpoint(engine, world, run_dir, step=2, state={"step": 2})


def one_process(world: World, folder: Path) -> dict[str, Any]:
    """Cases that need an engine and one process."""
    engine = new_engine(world)
    run_dir = folder / "plain"
    first = save_checkpoint(engine, world, run_dir, step=1, state={"step": 1})
    written = (first / "manifest.json").stat().st_mtime_ns
    again = save_checkpoint(engine, world, run_dir, step=1, state={"step": "other"})
    found: dict[str, Any] = {
        "again": again == first and (first / "manifest.json").stat().st_mtime_ns == written
    }
    found["other_model"] = _error(lambda: load_checkpoint(new_engine(world, 32), world, first))
    change(engine)
    second = save_checkpoint(engine, world, run_dir, step=2, state={"step": 2})
    _flip_a_byte(next(second.glob("rank-*")))
    found["fallback"] = newest_checkpoint(run_dir, world) == first
    # The run goes on from step 1 and saves step 2 again.
    found["resaved"] = save_checkpoint(engine, world, run_dir, step=2, state={"step": 2}) == second
    found["resaved_whole"] = newest_checkpoint(run_dir) == second
    for path in (first, second):
        _flip_a_byte(next(path.glob("rank-*")))
    found["all_damaged"] = _error(lambda: newest_checkpoint(run_dir))
    found["none"] = newest_checkpoint(folder / "nothing") is None
    return found


def _flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _error(action: Callable[[], Any]) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""
