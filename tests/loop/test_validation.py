"""Held-out loss is the same on any number of ranks, also on ranks that have no rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.data.loader import Batch
from pretrain.engine.deepspeed import Engine
from pretrain.engine.world import World
from pretrain.loop.validation import validate
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel
from pretrain.testing import load_module, run_ranks, tiny_config, tiny_engine

ROWS = 3


def held_out(rank: int, ranks: int) -> Batch:
    """The rank's slice of three rows; the last row is half padding."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(323, (ROWS, 9), generator=generator)
    documents = torch.zeros(ROWS, 9, dtype=torch.int64)
    documents[2, 5:] = -1
    start, stop = ROWS * rank // ranks, ROWS * (rank + 1) // ranks
    return Batch(start, tokens[start:stop], documents[start:stop])


def measure(world: World, zero_stage: int) -> dict[str, Any]:
    """The loss of an engine's model; micro-batches of two rows."""
    config = tiny_config(engine=tiny_engine(zero_stage=zero_stage))
    model = RecurrentModel(config.model)
    initialize(model, mean_depth=4, seed=0)
    engine = Engine(model, config, world, micro_steps=1)
    with engine.evaluation() as forward:
        return validate(forward, config, world, held_out(world.rank, world.size), depths=[4, 1])


def test_ranks_without_rows_change_nothing_under_zero_3() -> None:
    function = load_module(Path(__file__)).measure
    (alone,) = run_ranks(function, 1, 1)
    assert alone["validation/depths"] == [4, 1]
    assert (alone["validation/rows"], alone["validation/tokens"]) == (3, 8 + 8 + 4)
    for found in run_ranks(function, 4, 3):
        # sums of 20 fp32 numbers in another order
        assert found.pop("validation/loss_nats") == pytest.approx(
            alone["validation/loss_nats"], rel=1e-6
        )
        assert found == {key: value for key, value in alone.items() if key in found}
