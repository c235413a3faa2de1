"""What the ranks of the parity matrix run; imported by path, in processes of their own.

A case has ranks, stage, accumulation, micro_rows, checkpointed, scope, precision and path. Rows,
depths and their order are those of the training loop: each rank its slice, deepest rows first.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import TrainConfig
from pretrain.engine.config import Precision
from pretrain.engine.deepspeed import Engine
from pretrain.engine.world import World
from pretrain.loop.config import BatchConfig
from pretrain.model.config import ComputePath, DepthConfig, Law, Scope
from pretrain.model.depth import Depth, step_depths
from pretrain.model.init import initialize
from pretrain.model.initial_state import initial_states
from pretrain.model.recurrent import RecurrentModel
from pretrain.optim.build import build_optimizer
from pretrain.optim.config import EllisAdamConfig
from pretrain.testing import tiny_config, tiny_engine, tiny_model

STEPS, RATE, CLIP = 3, 0.01, 0.1
Case = dict[str, Any]


def config_of(case: Case) -> TrainConfig:
    """The tiny configuration with a case's settings."""
    rows = case["ranks"] * case["accumulation"] * case["micro_rows"]
    return tiny_config(
        model=tiny_model(path=ComputePath[case["path"]]),
        engine=tiny_engine(
            zero_stage=case["stage"],
            precision=Precision[case["precision"]],
            checkpoint_activations=case["checkpointed"],
        ),
        depth=DepthConfig(
            law=Law.poisson_lognormal, mean=4, backprop=3, scope=Scope[case["scope"]],
            block_rows=2 if case["scope"] == "block" and rows > 1 else 1,
        ),
        batch=BatchConfig(
            global_tokens=rows * 8, micro_rows=case["micro_rows"]
        ),
        optimizer=EllisAdamConfig(
            name="ellis-adam", learning_rate=RATE, weight_decay=0.01, gradient_clip=CLIP
        ),
    )  # fmt: skip


def micro_batches(config: TrainConfig, step: int, rank: int, ranks: int) -> list[list[int]]:
    """Rows of a rank's micro-steps, deepest first, as loop.micro_batches orders them."""
    depths = depths_of(config, step)
    rows = config.rows_per_step
    own = range(rank * rows // ranks, (rank + 1) * rows // ranks)
    order = sorted(own, key=lambda row: (-depths[row].total, row))
    micro_rows = config.batch.micro_rows
    return [order[start : start + micro_rows] for start in range(0, len(order), micro_rows)]


def depths_of(config: TrainConfig, step: int) -> list[Depth]:
    rows = config.rows_per_step
    return step_depths(config.depth, seed=0, first_row=rows * step, rows=rows)


def forward(model: Any, config: TrainConfig, step: int, rows: list[int]) -> Tensor:
    """The nats of some rows of a step."""
    generator, first = torch.Generator().manual_seed(step), config.rows_per_step * step
    shape = (config.rows_per_step, 9)
    tokens = torch.randint(0, config.model.vocabulary_size, shape, generator=generator)
    depths = depths_of(config, step)
    dtype = torch.bfloat16 if config.engine.precision is Precision.bf16 else torch.float32
    output = model(
        tokens[rows, :-1],
        [depths[row] for row in rows],
        initial_state=initial_states(
            [first + row for row in rows], seed=0, context=8, width=24, dtype=dtype
        ),
        labels=tokens[rows, 1:],
        keep_logits=False,
    )
    nats: Tensor = output.nats
    return nats


def new_model(config: TrainConfig) -> RecurrentModel:
    model = RecurrentModel(config.model)
    initialize(model, mean_depth=config.depth.mean, seed=0)
    return model


def run_cases(world: World, cases: list[Case]) -> list[dict[str, Any]]:
    """All cases of one number of ranks; results on rank 0."""
    found = [run_case(world, case) for case in cases]
    return found if world.is_main else []


def run_case(world: World, case: Case) -> dict[str, Any]:
    """Three steps through the engine."""
    config = config_of(case)
    invalidated = _count_invalid_traces()
    engine = Engine(new_model(config), config, world, micro_steps=case["accumulation"])
    results, first = [], {}
    for step in range(STEPS):
        nats = 0.0
        for rows in micro_batches(config, step, world.rank, world.size):
            loss = forward(engine, config, step, rows)
            nats += loss.item()
            engine.backward(loss, scale=1 / config.batch.global_tokens)
        result = engine.step(RATE)
        assert result.is_applied
        results.append((world.sum([nats])[0] / config.batch.global_tokens, result.grad_norm))
        if step == 0:
            first = _whole(engine, "exp_avg")
    return {
        "results": results,
        "first": first,
        "last": _whole(engine, "master"),
        "invalidated": world.sum([float(len(invalidated))])[0],
    }


def without_leaf(world: World, case: Case) -> float:
    """How often the trace is invalid if the core is no leaf; all ranks have the same depths."""
    import deepspeed.utils

    original = deepspeed.utils.set_z3_leaf_modules
    deepspeed.utils.set_z3_leaf_modules = lambda *_: None
    try:
        return float(run_case(world, case)["invalidated"])
    finally:
        deepspeed.utils.set_z3_leaf_modules = original


def _count_invalid_traces() -> list[int]:
    """A list that grows each time DeepSpeed throws its trace of modules away."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        PartitionedParameterCoordinator as Coordinator,
    )

    if not hasattr(Coordinator, "original_invalidate"):
        Coordinator.original_invalidate = Coordinator._invalidate_trace
    calls: list[int] = []

    def counted(self: Any) -> Any:
        # it also throws away what it has not finished recording: that is no event
        if self.is_complete_trace():
            calls.append(1)
        return Coordinator.original_invalidate(self)

    Coordinator._invalidate_trace = counted
    return calls


def _whole(engine: Engine, section: str) -> dict[str, Tensor]:
    """A section assembled from all ranks."""
    own = []
    for partition in engine.layout.partitions:
        flats = {"master": partition.flat, **engine.moments(partition.flat)}
        for fragment in partition.fragments:
            info = partition.tensors[fragment.tensor]
            piece = partition.piece(fragment, flats[section]).detach().clone()
            own.append((info.name, info.numel, fragment.tensor_start, piece))
    tensors: dict[str, Tensor] = {}
    everyone = engine.world.gather_objects(own)
    for name, numel, start, piece in (p for rank in everyone for p in rank):
        flat = tensors.setdefault(name, torch.full((numel,), torch.nan))
        flat[start : start + len(piece)] = piece
    return tensors


def oracle(case: Case) -> dict[str, Any]:
    """The same three steps by one plain process without DeepSpeed.

    bf16: fp32 masters, bf16 weights, each micro-batch's bf16 gradient added in fp32.
    """
    config = config_of(case)
    model = new_model(config)
    model.kept_iterations = None
    named = dict(model.named_parameters())
    masters = {name: nn.Parameter(p.detach().clone()) for name, p in named.items()}
    start = {name: p.detach().clone().flatten() for name, p in named.items()}
    optimizer = build_optimizer(masters.items(), config.optimizer)
    model.to(torch.bfloat16 if case["precision"] == "bf16" else torch.float32)
    results, first = [], {}
    for step in range(STEPS):
        nats, sums = 0.0, {name: torch.zeros_like(p) for name, p in masters.items()}
        for rank in range(case["ranks"]):
            for rows in micro_batches(config, step, rank, case["ranks"]):
                loss = forward(model, config, step, rows)
                nats += loss.item()
                # times the ranks, as the engine does: exact for powers of two
                (loss * (case["ranks"] / config.batch.global_tokens)).backward()
                for name, parameter in named.items():
                    sums[name] += parameter.grad.float() / case["ranks"]
                    parameter.grad = None
        norm = float(torch.cat([g.flatten() for g in sums.values()]).double().norm())
        for name, master in masters.items():
            master.grad = sums[name] * min(1.0, CLIP / norm)
        for group in optimizer.param_groups:
            group["lr"] = RATE
        optimizer.step()
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(masters[name])
        results.append((nats / config.batch.global_tokens, norm))
        if step == 0:
            first = {n: optimizer.state[m]["exp_avg"].flatten().clone() for n, m in masters.items()}
    last = {name: master.detach().flatten() for name, master in masters.items()}
    return {"results": results, "first": first, "last": last, "start": start}
