"""Does the configured engine compute what plain data parallelism computes, on these very ranks.

A small model takes a few steps twice: through the engine, under the configured ZeRO stage and its
switches, and by plain PyTorch with one all-reduce of the gradients. Some pairs of settings have
trained silently wrong: overlapped reduction, a compiled core under ZeRO-3.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.config import TrainConfig
from pretrain.engine.config import EngineConfig, Precision
from pretrain.engine.deepspeed import Engine
from pretrain.engine.trial import CONTEXT, ROWS, VOCABULARY, trial_config
from pretrain.engine.world import World
from pretrain.model.depth import Depth, step_depths
from pretrain.model.init import initialize
from pretrain.model.initial_state import initial_states
from pretrain.model.recurrent import RecurrentModel
from pretrain.optim.build import build_optimizer
from pretrain.preflight.findings import Finding, Status

STEPS, MICRO_STEPS = 3, 2
# As small as the model: buckets fill during the backward pass, as in training, and some tensors are
# larger than one.
BUCKET_ELEMENTS = 1 << 14
# Large, so that an update which is wrong or lost shows in the next loss.
RATE = 0.01


@dataclasses.dataclass(frozen=True, slots=True)
class Steps:
    """What some steps looked like."""

    losses: list[float]
    """Nats per token before each update."""
    norms: list[float]
    """Of the gradient, before clipping."""


@dataclasses.dataclass(frozen=True, slots=True)
class Distance:
    """Largest relative differences of two runs of the same steps."""

    first_norm: float
    loss: float
    norm: float

    def exceeds(self, limits: "Distance") -> bool:
        """Whether any is above its limit, or not a number."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(limits), strict=True)
        return any(not mine <= limit for mine, limit in pairs)


# First gradient: the same numbers (bf16 ones, then fp32) summed in another order; some hundred fp32
# summands of relative error 6e-8, and on GPUs atomic sums. Later steps start from weights that
# differ by that rounding; in bf16 a last-bit difference of a master may flip the rounding of a
# weight, 4e-3 of it. docs/parity.md has at most 2e-6, 2e-5 and 5e-5. A lost update moves the
# second loss by 3e-3 and the second norm by 9e-2.
LIMITS = {
    Precision.fp32: Distance(first_norm=1e-5, loss=1e-5, norm=1e-4),
    Precision.bf16: Distance(first_norm=1e-4, loss=5e-4, norm=1e-2),
}


def check_parity(config: TrainConfig, world: World) -> Iterator[Finding]:
    """The engine against plain data parallelism; if they differ, which setting is to blame."""
    begin = time.perf_counter()
    small = small_config(config, ranks=world.size)
    expected = plain_steps(small, world)
    apart = distance(engine_steps(small, world), expected)
    seconds = time.perf_counter() - begin
    detail = (
        f"{settings(config.engine)} on {world.size} ranks, {STEPS} steps: loss "
        f"{expected.losses[0]:.3f} -> {expected.losses[-1]:.3f}, relative differences from plain "
        f"data parallelism: loss {apart.loss:.1e}, gradient {apart.first_norm:.1e} and "
        f"{apart.norm:.1e} later ({seconds:.1f} s)"
    )
    if not _is_apart(apart, config, world):
        yield Finding(Status.ok, "parity", detail)
        return
    culprit, remedy = find_culprit(config, world, expected)
    yield Finding(Status.missing, "parity", f"{culprit} computes wrong here; {detail}", remedy)


def find_culprit(config: TrainConfig, world: World, expected: Steps) -> tuple[str, str]:
    """Which setting is wrong, and what is right instead, by leaving one out after the other."""
    for names, change in alternatives(config.engine):
        other = dataclasses.replace(config, engine=dataclasses.replace(config.engine, **change))
        apart = distance(engine_steps(small_config(other, ranks=world.size), world), expected)
        if not _is_apart(apart, config, world):
            remedy = " ".join(
                f"engine.{name}={str(value).lower()}" for name, value in change.items()
            )
            return f"{names} under {settings(config.engine)}", f"use {remedy}: it agrees"
    return settings(config.engine), "do not train here: no other setting agrees either"


def alternatives(engine: EngineConfig) -> list[tuple[str, dict[str, Any]]]:
    """Settings that may be to blame, with what to take instead; the cheapest change first."""
    found: list[tuple[str, dict[str, Any]]] = []
    if engine.overlap_comm:
        found.append(("engine.overlap_comm=true", {"overlap_comm": False}))
    if engine.checkpoint_activations:
        change: dict[str, Any] = {"checkpoint_activations": False}
        if engine.kept_iterations:
            # without recomputation all are kept, and a number is refused
            change["kept_iterations"] = 0
        found.append(("engine.checkpoint_activations=true", change))
    if engine.zero_stage > 1:
        change = {"zero_stage": 1, "overlap_comm": False}
        found.append((f"engine.zero_stage={engine.zero_stage}", change))
    return found


def small_config(config: TrainConfig, *, ranks: int) -> TrainConfig:
    """What the probe runs: the engine as configured, around a model and buckets of a small size."""
    small = trial_config(config, ranks=ranks)
    tokens = small.batch.global_tokens * MICRO_STEPS
    bucket = min(small.engine.bucket_elements, BUCKET_ELEMENTS)
    return dataclasses.replace(
        small,
        batch=dataclasses.replace(small.batch, global_tokens=tokens),
        engine=dataclasses.replace(small.engine, bucket_elements=bucket),
    )


def settings(engine: EngineConfig) -> str:
    """The settings that the probe is about, in words."""
    switches = [
        name for name in ("overlap_comm", "checkpoint_activations") if getattr(engine, name)
    ]
    return ", ".join([f"ZeRO-{engine.zero_stage} {engine.precision.value}", *switches])


def distance(got: Steps, expected: Steps) -> Distance:
    """How far two runs are apart."""
    losses, norms = (
        [
            abs(a - b) / abs(b) if b and math.isfinite(b) else math.nan
            for a, b in zip(mine, theirs, strict=True)
        ]
        for mine, theirs in ((got.losses, expected.losses), (got.norms, expected.norms))
    )
    # a NaN anywhere must not hide behind max()
    worst = [math.nan if any(map(math.isnan, some)) else max(some) for some in (losses, norms)]
    return Distance(norms[0], *worst)


def engine_steps(config: TrainConfig, world: World) -> Steps:
    """Through the engine, as training takes them."""
    engine = Engine(_new_model(config, world), config, world, micro_steps=MICRO_STEPS)
    losses, norms = [], []
    for step in range(STEPS):
        nats = 0.0
        for rows in _micro_batches(config, step, world):
            loss = _forward(engine, config, step, rows, world)
            nats += float(loss.detach())
            engine.backward(loss, scale=1 / config.batch.global_tokens)
        losses.append(world.sum([nats])[0] / config.batch.global_tokens)
        norms.append(engine.step(RATE).grad_norm)
    return Steps(losses, norms)


def plain_steps(config: TrainConfig, world: World) -> Steps:
    """By plain PyTorch: whole fp32 masters on every rank, one all-reduce of fp32 gradients.

    bf16: each micro-batch's bf16 gradient is added in fp32, as the engine does.
    """
    model = _new_model(config, world)
    named = dict(model.named_parameters())
    masters = {name: nn.Parameter(p.detach().clone()) for name, p in named.items()}
    optimizer = build_optimizer(masters.items(), config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    model.to(_dtype(config))
    losses, norms = [], []
    for step in range(STEPS):
        nats, sums = 0.0, {name: torch.zeros_like(p) for name, p in masters.items()}
        for rows in _micro_batches(config, step, world):
            loss = _forward(model, config, step, rows, world)
            nats += float(loss.detach())
            (loss * (world.size / config.batch.global_tokens)).backward()
            _move_gradients(named, sums)
        losses.append(world.sum([nats])[0] / config.batch.global_tokens)
        norms.append(_average(sums, world))
        clip = config.optimizer.gradient_clip
        factor = min(1.0, clip / norms[-1]) if clip else 1.0
        for name, master in masters.items():
            master.grad = sums[name] * factor
        optimizer.step()
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(masters[name])
    return Steps(losses, norms)


def _move_gradients(named: dict[str, nn.Parameter], sums: dict[str, Tensor]) -> None:
    for name, parameter in named.items():
        if parameter.grad is not None:
            sums[name] += parameter.grad.float()
            parameter.grad = None


def _average(sums: dict[str, Tensor], world: World) -> float:
    """Average gradients over ranks, in place; their norm."""
    squares = 0.0
    for total in sums.values():
        if world.size > 1:
            dist.all_reduce(total)
        total /= world.size
        squares += float(total.double().square().sum())
    return math.sqrt(squares)


def _is_apart(apart: Distance, config: TrainConfig, world: World) -> bool:
    """The same verdict on all ranks, or they would go separate ways."""
    return world.any(apart.exceeds(LIMITS[config.engine.precision]))


def _new_model(config: TrainConfig, world: World) -> RecurrentModel:
    model = RecurrentModel(config.model)
    initialize(model, mean_depth=config.depth.mean, seed=0)
    return model.to(world.device)


def _depths(config: TrainConfig, step: int) -> list[Depth]:
    rows = config.rows_per_step
    return step_depths(config.depth, seed=0, first_row=rows * step, rows=rows)


def _micro_batches(config: TrainConfig, step: int, world: World) -> list[list[int]]:
    """Rows of this rank's micro-steps, deepest first, as the training loop orders them."""
    depths, count = _depths(config, step), ROWS * MICRO_STEPS
    own = range(world.rank * count, (world.rank + 1) * count)
    order = sorted(own, key=lambda row: (-depths[row].total, row))
    return [order[start : start + ROWS] for start in range(0, count, ROWS)]


def _forward(model: Any, config: TrainConfig, step: int, rows: list[int], world: World) -> Tensor:
    """Nats of some rows of a step; tokens and states depend on step and row alone."""
    depths, first = _depths(config, step), config.rows_per_step * step
    generator = torch.Generator().manual_seed(step)
    shape = (config.rows_per_step, CONTEXT + 1)
    tokens = torch.randint(VOCABULARY, shape, generator=generator)[rows].to(world.device)
    state = initial_states(
        [first + row for row in rows],
        seed=0,
        context=CONTEXT,
        width=config.model.width,
        device=world.device,
        dtype=_dtype(config),
    )
    output = model(
        tokens[:, :-1],
        [depths[row] for row in rows],
        initial_state=state,
        labels=tokens[:, 1:],
        keep_logits=False,
    )
    nats: Tensor = output.nats
    return nats


def _dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.engine.precision is Precision.bf16 else torch.float32
