"""What the ranks of the saving tests run; imported by path, in processes of their own."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.engine import commit, fragments, saving
from pretrain.engine.checkpoint import load_checkpoint, load_weights, newest_checkpoint
from pretrain.engine.config import Precision
from pretrain.engine.deepspeed import Engine
from pretrain.engine.saving import Saver, save_checkpoint
from pretrain.engine.world import World
from pretrain.errors import CheckpointError
from pretrain.model.depth import step_depths
from pretrain.model.init import initialize
from pretrain.model.initial_state import initial_states
from pretrain.model.recurrent import RecurrentModel
from pretrain.optim.config import AdamWConfig, EllisAdamConfig
from pretrain.testing import tiny_config, tiny_engine

RATE = 0.01


def new_engine(
    world: World, *, stage: int = 1, precision: str = "fp32", optimizer: str = "ellis-adam"
) -> Engine:
    kind = AdamWConfig if optimizer == "adamw" else EllisAdamConfig
    config = tiny_config(
        engine=tiny_engine(zero_stage=stage, precision=Precision[precision]),
        optimizer=kind(name=optimizer, learning_rate=RATE, weight_decay=0.1),
    )
    model = RecurrentModel(config.model)
    initialize(model, mean_depth=4, seed=0)
    return Engine(model, config, world, micro_steps=1)


def take_step(engine: Engine, number: int, **options: Any) -> bool:
    """One optimizer step on two rows; whether it was applied."""
    config = tiny_config()
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, 323, (2, 9), generator=generator)
    dtype = next(engine.module.parameters()).dtype
    output = engine(
        tokens[:, :-1],
        step_depths(config.depth, seed=0, first_row=2 * number, rows=2),
        initial_state=initial_states([0, 1], seed=0, context=8, width=24, dtype=dtype),
        labels=tokens[:, 1:],
        keep_logits=False,
    )
    assert output.nats is not None
    engine.backward(output.nats, scale=1 / 16)
    return engine.step(RATE, **options).is_applied


def whole(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of this rank's masters and moments."""
    return {key: piece.detach().clone() for key, piece in saving._own_pieces(engine)}


def is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def save_beside_training(world: World, folder: Path) -> dict[str, Any]:
    """A save that is held back until training has gone on; beside one that training waits for."""
    engine = new_engine(world, stage=2)
    take_step(engine, 0)
    waiting = save_checkpoint(engine, world, folder / "waiting", step=1, state={"x": 1})
    saver = Saver(engine, world, folder / "beside", asynchronous=True)
    may_write, write_pieces = threading.Event(), fragments.write_pieces

    def held_back(*args: Any) -> Any:
        may_write.wait(timeout=60)
        return write_pieces(*args)

    fragments.write_pieces = held_back
    saver.begin(1, {"x": 1})
    found: dict[str, Any] = {"writing": saver.is_writing}
    for number in (1, 2, 3):
        take_step(engine, number)
    found["nothing_yet"] = newest_checkpoint(folder / "beside", world) is None
    may_write.set()
    saved = saver.finish()
    fragments.write_pieces = write_pieces
    found["copied"] = saved.copied_s > 0
    found["hashes"] = [
        {
            name: entry["sha256"]
            for name, entry in commit.read_manifest(path)["files"].items()
            if name.endswith(".safetensors")
        }
        for path in (waiting, saved.path)
    ]
    # the buffers are used again
    saver.begin(4, {"x": 2})
    again = saver.finish()
    key = "head.norm.weight"
    weights = load_weights(again.path)
    key = next(iter(weights))
    found["second_is_newer"] = not torch.equal(weights[key], load_weights(saved.path)[key])
    found["second_is_whole"] = newest_checkpoint(folder / "beside", world) == again.path
    return found


def fail_in_the_background(world: World, folder: Path) -> dict[str, Any]:
    """The last rank's thread cannot write; then it can."""
    engine = new_engine(world)
    saver = Saver(engine, world, folder, asynchronous=True)
    saver.begin(1, {})
    first = saver.finish().path
    write_pieces = fragments.write_pieces

    def refuse(path: Path, pieces: Any) -> Any:
        if world.rank == world.size - 1:
            raise OSError(28, "No space left on device", str(path))
        return write_pieces(path, pieces)

    fragments.write_pieces = refuse
    saver.begin(2, {})
    error = _error(saver.finish)
    fragments.write_pieces = write_pieces
    world.barrier()
    left = sorted(path.name for path in commit.checkpoints_folder(folder).iterdir())
    old = newest_checkpoint(folder, world) == first
    world.barrier()
    saver.begin(2, {})
    return {"error": error, "left": left, "old": old, "new": saver.finish().step}


def fenced(world: World, folder: Path) -> dict[str, Any]:
    """Another life has taken the folder while the save was on its way."""
    engine = new_engine(world)
    save_checkpoint(engine, world, folder, step=1, state={})

    is_lost: list[bool] = []

    def fence() -> None:
        if is_lost:
            raise CheckpointError("this folder belongs to another life")

    saver = Saver(engine, world, folder, asynchronous=True, fence=fence)
    saver.begin(2, {})
    is_lost.append(True)
    error = _error(saver.finish)
    assert "belongs to another life" in _error(lambda: saver.begin(3, {}))
    world.barrier()
    return {"error": error, "left": sorted(p.name for p in (folder / "checkpoints").iterdir())}


def abandon(world: World, folder: Path) -> list[str]:
    engine = new_engine(world)
    saver = Saver(engine, world, folder, asynchronous=True)
    saver.begin(1, {})
    saver.abandon()
    assert not saver.is_in_flight
    saver.abandon()
    world.barrier()
    left = [path.name for path in (folder / "checkpoints").iterdir()]
    saver.begin(2, {})
    saver.finish()
    return left


def delete_and_save_again(world: World, folder: Path) -> list[bool]:
    """Whether the last step counts as saved: before, then, when a rewind deleted it, at last."""
    engine = new_engine(world)
    saver = Saver(engine, world, folder)

    def is_saved() -> bool:
        return saver.has_saved(1) is not None

    found = [is_saved()]
    saver.begin(1, {})
    saved = saver.finish()
    found.append(is_saved())
    if world.is_main:
        commit.delete(saved.path)
    found.append(is_saved())
    saver.begin(1, {})
    saver.finish()
    return [*found, is_saved()]


def go_back(world: World, folder: Path) -> list[tuple[str, bool]]:
    """Whether masters and moments that are loaded into a trained engine lie where they lay."""
    outcomes = []
    for stage in (1, 2, 3):
        for precision in ("fp32", "bf16"):
            engine = new_engine(world, stage=stage, precision=precision)
            take_step(engine, 0)
            name = f"ZeRO-{stage} {precision}"
            saved = save_checkpoint(engine, world, folder / name, step=1, state={})
            before = whole(engine)
            take_step(engine, 1)
            places = addresses(engine)
            is_right = not is_equal(before, whole(engine))
            load_checkpoint(engine, world, saved)
            is_right &= is_equal(before, whole(engine)) and addresses(engine) == places
            outcomes.append((name, is_right))
    return outcomes


def addresses(engine: Engine) -> dict[str, int]:
    return {key: piece.data_ptr() for key, piece in saving._own_pieces(engine)}


def without_memory(world: World, folder: Path) -> dict[str, Any]:
    """Too little memory on one host: training waits, and nothing else changes."""
    engine = new_engine(world)
    saving.available_bytes = lambda: 1_000 if world.rank else 1 << 40
    saver = Saver(engine, world, folder, asynchronous=True)
    saver.begin(1, {})
    is_writing = saver.is_writing
    saved = saver.finish()
    whole_one = newest_checkpoint(folder, world) == saved.path
    shutil.rmtree(folder, ignore_errors=True)
    return {"writing": is_writing, "copied_s": saved.copied_s, "whole": whole_one}


def drop_updates(world: World) -> list[tuple[str, bool]]:
    """A dropped update changes nothing, and the steps after it are as if it had not been."""
    outcomes = []
    for stage in (1, 2, 3):
        for precision in ("fp32", "bf16"):
            for optimizer in ("ellis-adam", "adamw"):
                kind = {"stage": stage, "precision": precision, "optimizer": optimizer}
                engine, clean = new_engine(world, **kind), new_engine(world, **kind)
                is_right = take_step(engine, 0) and take_step(clean, 0)
                before = whole(engine)
                is_right &= not take_step(engine, 1, drops_update=True)
                is_right &= is_equal(before, whole(engine))
                is_right &= take_step(engine, 2) and take_step(clean, 2)
                is_right &= is_equal(whole(engine), whole(clean))
                is_right &= not is_equal(before, whole(engine))
                is_right &= engine.optimizer_steps == 2
                outcomes.append((f"ZeRO-{stage} {precision} {optimizer}", bool(is_right)))
    return outcomes


def _error(action: Callable[[], Any]) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""
