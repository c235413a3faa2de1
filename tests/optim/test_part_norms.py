"""The gradient's norm by part is that of the whole model's gradient, however it is sharded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.engine.config import Precision
from pretrain.engine.deepspeed import Engine, StepResult
from pretrain.engine.world import World
from pretrain.model.depth import Depth
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel
from pretrain.optim.config import AdamWConfig, EllisAdamConfig
from pretrain.optim.effective_rate import PARTS, part_of
from pretrain.testing import load_module, run_ranks, tiny_config, tiny_engine

ROWS, SCALE = 4, 1 / 32


def batch(share: slice) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(323, (ROWS, 9), generator=generator)[share]
    state = torch.randn(ROWS, 8, 24, generator=generator)[share]
    depths = [Depth(1, 2)] * len(tokens)
    return (tokens[:, :-1], depths), {"initial_state": state, "labels": tokens[:, 1:]}


def fresh_model() -> RecurrentModel:
    model = RecurrentModel(tiny_config().model)
    initialize(model, mean_depth=4, seed=0)
    return model


def step(world: World, stage: int, precision: Precision, optimizer: str, factor: float) -> Any:
    """Results of a step that measures and of one that does not."""
    options = {"learning_rate": 0.01, "weight_decay": 0.0, "gradient_clip": 0.5}
    chosen = AdamWConfig if optimizer == "adamw" else EllisAdamConfig
    config = tiny_config(
        engine=tiny_engine(zero_stage=stage, precision=precision),
        optimizer=chosen(name=optimizer, **options),
    )
    engine = Engine(fresh_model(), config, world, micro_steps=1)
    share = slice(world.rank * ROWS // world.size, (world.rank + 1) * ROWS // world.size)
    arguments, named = batch(share)
    results: list[StepResult] = []
    for measures in (True, False):
        output = engine(*arguments, **named)
        engine.backward(output.nats * factor, scale=SCALE)
        results.append(engine.step(0.01, measures_parts=measures))
    return results


def oracle() -> dict[str, float]:
    """From the gradient of the whole model in one process, tensor by tensor."""
    model = fresh_model()
    arguments, named = batch(slice(0, ROWS))
    (model(*arguments, **named).nats * SCALE).backward()
    squares = dict.fromkeys(PARTS, 0.0)
    for name, parameter in model.named_parameters():
        squares[part_of(name)] += float(parameter.grad.double().square().sum())
    return {f"gradient/norm_{part}": square**0.5 for part, square in squares.items()}


@pytest.mark.parametrize(
    ("ranks", "stage", "precision", "optimizer"),
    [
        (1, 1, "fp32", "ellis-adam"),
        (2, 1, "bf16", "ellis-adam"),
        (2, 2, "fp32", "adamw"),
        (2, 2, "bf16", "ellis-adam"),
        (2, 3, "fp32", "ellis-adam"),
        (2, 3, "fp32", "adamw"),
    ],
)
def test_every_stage_gives_the_norms_before_clipping(
    ranks: int, stage: int, precision: str, optimizer: str
) -> None:
    expected = oracle()
    # the clip of 0.5 must matter, or undoing it is not tested
    assert sum(norm**2 for norm in expected.values()) ** 0.5 > 0.6
    # float32: rounding; bf16 weights and activations have 8 bits, and layers add up
    tolerance = 1e-4 if precision == "fp32" else 0.05
    outcomes = run_ranks(
        load_module(Path(__file__)).step, ranks, stage, Precision(precision), optimizer, 1.0
    )
    for measured, unasked in outcomes:
        assert measured.part_norms == pytest.approx(expected, rel=tolerance)
        total = sum(norm**2 for norm in measured.part_norms.values()) ** 0.5
        assert total == pytest.approx(measured.grad_norm, rel=1e-4)
        assert unasked.part_norms == {}


def test_a_gradient_that_is_not_finite_has_no_norms() -> None:
    outcomes = run_ranks(
        load_module(Path(__file__)).step, 2, 1, Precision.bf16, "ellis-adam", float("nan")
    )
    for measured, _ in outcomes:
        assert not measured.is_applied
        assert measured.part_norms == {}
