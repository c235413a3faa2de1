"""What the ranks of the accumulation tests run; imported by path, in processes of their own."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pretrain.config import TrainConfig
from pretrain.data.loader import Batch
from pretrain.engine.config import Precision
from pretrain.engine.deepspeed import Engine
from pretrain.engine.world import World
from pretrain.loop.config import BatchConfig
from pretrain.loop.steps import _forward_and_backward
from pretrain.loop.validation import validate
from pretrain.model.config import ComputePath, DepthConfig, Law, ProductPrecision
from pretrain.model.depth import step_depths
from pretrain.model.fixed import has_fixed_weights
from pretrain.testing import load_module, tiny_config, tiny_engine, tiny_model

TESTS = Path(__file__).parents[1]
RANKS = load_module(TESTS / "distributed" / "ranks.py")
PATHS = load_module(TESTS / "model" / "fused" / "both_paths.py")
ROWS, CONTEXT, RATE, STEPS = 8, 8, 0.01, 3
Case = dict[str, Any]


def pairs(world: World, cases: list[Case]) -> list[dict[str, Any]]:
    """Of each case, what the engine does and what it would do if no copy stayed; on rank 0."""
    found = [{"ours": steps(world, case), "anew": steps(world, case, anew=True)} for case in cases]
    return found if world.is_main else []


def config_of(case: Case, ranks: int) -> TrainConfig:
    """A model whose sizes float8 products take; rows enough for the case's micro-steps."""
    precisions = dict.fromkeys(case["float8"], ProductPrecision.fp8)
    model = tiny_model(width=32, path=ComputePath.fused, **precisions)
    return tiny_config(
        model=model,
        # so deep that every row has a prefix
        depth=DepthConfig(law=Law.poisson_lognormal, mean=12, backprop=2),
        engine=tiny_engine(zero_stage=case["stage"], precision=Precision.bf16),
        batch=BatchConfig(
            global_tokens=ROWS * CONTEXT, micro_rows=ROWS // (ranks * case["accumulation"])
        ),
    )


def steps(world: World, case: Case, *, anew: bool = False) -> dict[str, Any]:
    """Steps as the training loop takes them, each followed by a validation; counts by step."""
    config = config_of(case, world.size)
    engine = Engine(RANKS.new_model(config), config, world, micro_steps=case["accumulation"])
    if anew:
        engine.accumulation = contextlib.nullcontext  # type: ignore[method-assign]
    session = SimpleNamespace(config=config, engine=engine, world=world, enter=lambda _: None)
    found: dict[str, Any] = {"results": [], "tensors": [], "counts": [], "validated": []}
    for step in range(STEPS):
        batch, depths = rows_of(config, step, world)
        with PATHS.counted_copies() as counted:
            nats = _forward_and_backward(session, batch, depths, scale=1 / (ROWS * CONTEXT))
        result = engine.step(RATE)
        found["counts"].append(dict(counted))
        found["results"].append((world.sum([nats])[0], result.grad_norm, result.is_applied))
        found["tensors"].append(RANKS.whole(engine))
        with PATHS.counted_copies() as counted, engine.evaluation() as model:
            # two passes: idle ones on ranks that have no rows
            losses = validate(model, config, world, held_out(config, world), depths=[1, 3])
        found["validated"].append((losses["validation/loss_nats"], dict(counted)))
    with engine.accumulation():
        found["stays"] = has_fixed_weights(engine.module)
    return found


def rows_of(config: TrainConfig, step: int, world: World) -> tuple[Batch, Any]:
    """This rank's rows of a step and their depths."""
    first, count = ROWS * step, ROWS // world.size
    own = slice(world.rank * count, (world.rank + 1) * count)
    depths = step_depths(config.depth, seed=0, first_row=first, rows=ROWS)[own]
    return Batch(first + own.start, tokens_of(config, ROWS, step)[own], documents(count)), depths


def held_out(config: TrainConfig, world: World) -> Batch:
    """Two micro-batches, of rank 0."""
    rows = 2 * config.batch.micro_rows if world.is_main else 0
    return Batch(0, tokens_of(config, rows, seed=99), documents(rows))


def tokens_of(config: TrainConfig, rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.model.vocabulary_size, (rows, CONTEXT + 1), generator=generator)


def documents(rows: int) -> Tensor:
    return torch.zeros(rows, CONTEXT + 1, dtype=torch.int64)


def refused(world: World, stage: int) -> list[str]:
    """What is said of an update, and of new weights, inside of where weights do not change."""
    config = config_of({"stage": stage, "accumulation": 4, "float8": FLOAT8}, world.size)
    engine = Engine(RANKS.new_model(config), config, world, micro_steps=4)
    batch, depths = rows_of(config, 0, world)
    session = SimpleNamespace(config=config, engine=engine, world=world, enter=lambda _: None)
    before, said = RANKS.whole(engine), []
    _forward_and_backward(session, batch, depths, scale=1 / (ROWS * CONTEXT))
    for inside in (engine.accumulation, engine.evaluation):
        for change in (lambda: engine.step(RATE), engine.refresh):
            try:
                with inside():
                    change()
            except AssertionError as error:
                said.append(str(error))
    assert all(torch.equal(before[key], value) for key, value in RANKS.whole(engine).items())
    # and nothing stays refused
    assert engine.step(RATE).is_applied
    return said


FLOAT8 = ["no_grad_precision", "grad_precision"]
