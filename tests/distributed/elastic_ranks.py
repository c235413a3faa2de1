"""What the ranks of the elastic tests run; imported by path or by name, in other processes."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.engine.checkpoint import load_checkpoint
from pretrain.engine.deepspeed import Engine
from pretrain.engine.saving import save_checkpoint
from pretrain.engine.world import World
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel
from pretrain.testing import tiny_config, tiny_engine


def first_save(world: World, run_dir: Path, stage: int) -> Path:
    """A checkpoint of an engine whose moments are not zero."""
    engine = _engine(world, stage)
    for partition in engine.layout.partitions:
        moments = {
            "exp_avg": partition.flat.detach() * 0.5 + 0.1,
            "exp_avg_sq": partition.flat.detach() ** 2,
        }
        engine.set_moments(partition.flat, moments, steps=7)
    engine.optimizer_steps = 7
    return save_checkpoint(engine, world, run_dir, step=7, state={"rows": 84})


def pass_on(world: World, source: Path, run_dir: Path, stage: int) -> Path:
    """Load a checkpoint and save it again, as another number of ranks under another stage."""
    engine = _engine(world, stage)
    state = load_checkpoint(engine, world, source)
    return save_checkpoint(engine, world, run_dir, step=7, state=state)


def _engine(world: World, stage: int) -> Engine:
    config = tiny_config(engine=tiny_engine(zero_stage=stage))
    model = RecurrentModel(config.model)
    initialize(model, mean_depth=4, seed=0)
    return Engine(model, config, world, micro_steps=1)


def write_down_rows() -> None:
    """Write a line for every row that this process trains on: its number, and hashes of it all."""
    from pretrain.loop import steps

    original = steps.micro_batches
    Path("rows").mkdir(exist_ok=True)
    # one small write a row, straight to the file
    file = os.open(f"rows/{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watched(batch: Any, depths: Any, **settings: Any) -> Iterator[Any]:
        order = sorted(range(len(depths)), key=lambda row: (-depths[row].total, row))
        taken = iter(order)
        for micro in original(batch, depths, **settings):
            for i in range(len(micro.depths)):
                number = batch.first_row + next(taken)
                contents = (
                    micro.tokens_BT[i], micro.labels_BT[i], micro.documents_BT[i],
                    micro.initial_state_BTD[i],
                )  # fmt: skip
                digest = hashlib.sha256(repr(micro.depths[i]).encode())
                for tensor in contents:
                    digest.update(tensor.contiguous().numpy().tobytes())
                os.write(file, f"{number} {digest.hexdigest()}\n".encode())
            yield micro

    steps.micro_batches = watched
