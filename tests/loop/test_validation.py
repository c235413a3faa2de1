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
        return validate(
            forward,
            config,
            world,
            held_out(world.rank, world.size),
            depths=[4, 2],
            diagnose_depth=3,
        )


def test_ranks_without_rows_change_nothing_under_zero_3() -> None:
    function = load_module(Path(__file__)).measure
    (alone,) = run_ranks(function, 1, 1)
    assert alone["validation/depths"] == [4, 2]
    assert (alone["validation/rows"], alone["validation/tokens"]) == (3, 8 + 8 + 4)
    for found in run_ranks(function, 4, 3):
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            # sums of 20 fp32 numbers in another order; a correlation near 0 has its absolute error
            assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-7), key


def test_losses_at_one_and_at_the_mean_are_those_of_their_depths() -> None:
    (alone,) = run_ranks(load_module(Path(__file__)).measure_all, 1)
    listed = dict(zip(alone["validation/depths"], alone["validation/loss_nats"], strict=True))
    assert alone["validation/loss_at_1_nats"] == listed[1]
    assert alone["validation/loss_at_mean_nats"] == listed[3]
    assert alone["validation/loss_at_1_nats"] != alone["validation/loss_at_mean_nats"]
    assert 0 < alone["state/relative_residual"] < 2
    # the last norm of the core leaves sqrt(width), width 24, but for epsilon
    assert alone["state/norm"] == pytest.approx(24**0.5, rel=1e-3)
    plain = {key: value for key, value in alone.items() if key.startswith("validation/")}
    assert plain.keys() == {
        "validation/depths", "validation/loss_nats", "validation/rows", "validation/tokens",
        "validation/loss_at_1_nats", "validation/loss_at_mean_nats",
        "validation/kl_depths", "validation/kl_nats",
    }  # fmt: skip
    # one number for each iteration; the last one's is the diagnosed one
    assert len(alone["state/moves"]) == 3
    assert alone["state/moves"][2] == pytest.approx(alone["state/relative_residual"], rel=1e-6)
    assert alone["validation/kl_depths"] == [2, 3]
    assert min(alone["validation/kl_nats"]) > 0


def measure_all(world: World) -> dict[str, Any]:
    """The same with every depth listed."""
    config = tiny_config()
    model = RecurrentModel(config.model)
    initialize(model, mean_depth=4, seed=0)
    rows = held_out(0, 1)
    return validate(model, config, world, rows, depths=[1, 2, 3], diagnose_depth=3)
