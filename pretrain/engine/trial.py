"""One real optimizer step of a small model through the configured engine."""

import dataclasses

import torch

from pretrain.config import TrainConfig
from pretrain.engine.deepspeed import Engine
from pretrain.engine.world import World
from pretrain.model.config import DepthConfig, Law, ModelConfig
from pretrain.model.depth import step_depths
from pretrain.model.init import initialize
from pretrain.model.initial_state import initial_states
from pretrain.model.recurrent import RecurrentModel

# Small, so that it ends soon on any machine.
ROWS, CONTEXT, VOCABULARY = 2, 32, 512


def take_trial_step(config: TrainConfig, world: World) -> tuple[float, float]:
    """Loss and gradient norm of one step of a small model, with everything else as configured."""
    small = trial_config(config, ranks=world.size)
    model = RecurrentModel(small.model)
    initialize(model, mean_depth=small.depth.mean, seed=0)
    model.to(world.device)
    engine = Engine(model, small, world, micro_steps=1)
    generator = torch.Generator().manual_seed(world.rank)
    tokens = torch.randint(VOCABULARY, (ROWS, CONTEXT + 1), generator=generator).to(world.device)
    rows = range(world.rank * ROWS, (world.rank + 1) * ROWS)
    depths = step_depths(small.depth, seed=0, first_row=0, rows=small.rows_per_step)
    state = initial_states(
        list(rows),
        seed=0,
        context=CONTEXT,
        width=small.model.width,
        device=world.device,
        dtype=next(engine.module.parameters()).dtype,
    )
    output = engine(
        tokens[:, :-1],
        [depths[row] for row in rows],
        initial_state=state,
        labels=tokens[:, 1:],
        keep_logits=False,
    )
    assert output.nats is not None
    count = ROWS * CONTEXT
    engine.backward(output.nats, scale=1 / (count * world.size))
    result = engine.step(small.optimizer.learning_rate)
    return float(output.nats.detach()) / count, result.grad_norm


def trial_config(config: TrainConfig, *, ranks: int) -> TrainConfig:
    """The same engine and optimizer around a model that any machine can hold."""
    head_width = config.model.head_width
    model = ModelConfig(
        name="trial",
        width=2 * head_width,
        heads=2,
        inner=4 * head_width,
        prelude_layers=1,
        core_layers=1,
        coda_layers=1,
        vocabulary_size=VOCABULARY,
        context=CONTEXT,
        path=config.model.path,
    )
    return dataclasses.replace(
        config,
        model=model,
        depth=DepthConfig(law=Law.poisson_lognormal, mean=4, backprop=2),
        data=dataclasses.replace(config.data, context=CONTEXT),
        tokenizer=dataclasses.replace(config.tokenizer, vocabulary_size=VOCABULARY),
        batch=dataclasses.replace(
            config.batch, global_tokens=ranks * ROWS * CONTEXT, micro_rows=ROWS
        ),
    )
