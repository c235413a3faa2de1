"""What the ranks of the takeover tests run; imported by path, in processes of their own."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.engine import takeover
from pretrain.engine.config import Precision
from pretrain.engine.deepspeed import Engine
from pretrain.engine.reduction import EarlySums
from pretrain.engine.world import World
from pretrain.loop.config import BatchConfig
from pretrain.optim.config import EllisAdamConfig
from pretrain.testing import load_module, tiny_config, tiny_engine

RANKS = load_module(Path(__file__).parents[1] / "distributed" / "ranks.py")
Case = dict[str, Any]


def pairs(world: World, cases: list[Case]) -> list[dict[str, Any]]:
    """Four steps of each case, with our update and with DeepSpeed's own; results on rank 0."""
    found = []
    for case in cases:
        EarlySums.LEAST = case.get("least", 1 << 14)
        ours = steps(world, case)
        known, takeover.KNOWN_VERSION = takeover.KNOWN_VERSION, "0.0.0"
        try:
            theirs = steps(world, case)
        finally:
            takeover.KNOWN_VERSION = known
        found.append({"ours": ours, "theirs": theirs})
    return found if world.is_main else []


def steps(world: World, case: Case) -> dict[str, Any]:
    """Three applied steps and, after the first, one that is not finite and one that is held."""
    engine, config = RANKS.new_engine(world, case)
    late = late_sums(engine)
    results = [RANKS.train_step(engine, config, 0)]
    before = everything(engine)
    results.append(RANKS.train_step(engine, config, 1, poison))
    is_untouched = same(before, everything(engine))
    engine.step = held(engine.step)  # type: ignore[method-assign]
    results.append(RANKS.train_step(engine, config, 1))
    is_untouched &= same(before, everything(engine))
    del engine.step
    results += [RANKS.train_step(engine, config, step) for step in (1, 2)]
    return {
        "class": type(engine._engine.optimizer).__name__,
        "results": results,
        "untouched": bool(world.sum([float(is_untouched)])[0] == world.size),
        "late": late,
        "first": before,
        "last": everything(engine),
    }


def late_sums(engine: Engine) -> list[tuple[int, int]]:
    """Of each step to come: how many sums are left to its end, of how many."""
    early, found = getattr(engine._engine.optimizer, "early", None), []
    if early is not None:
        left = early.left

        def counted(totals: list[Tensor]) -> list[Tensor]:
            late = left(totals)
            found.append((len(late), len(totals)))
            return late  # type: ignore[no-any-return]

        early.left = counted
    return found


def everything(engine: Engine) -> dict[str, Tensor]:
    """Masters and moments of all ranks, and this rank's working weights."""
    working = {f"working/{n}": p.detach().clone() for n, p in engine.module.named_parameters()}
    return RANKS.whole(engine) | working


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def held(step: Any) -> Any:
    return lambda rate: step(rate, drops_update=True)


def poison(rank: int, micro_step: int, nats: Tensor) -> Tensor:
    return nats * torch.nan if (rank, micro_step) == (0, 0) else nats


class Switched(nn.Module):
    """Vectors of which each call uses only some; gradients are what the caller says."""

    def __init__(self) -> None:
        super().__init__()
        self.kept_iterations: int | None = None
        generator = torch.Generator().manual_seed(3)
        for name in ("norm_a", "norm_b", "norm_c"):
            self.register_parameter(name, nn.Parameter(torch.randn(5, generator=generator)))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        parts = [(getattr(self, name) * value).sum() for name, value in gradients.items()]
        return torch.stack(parts).sum()


def switched(world: World, stage: int, overlaps: bool) -> list[dict[str, Tensor]]:
    """Masters after each of three steps in which parameters come and go, on some ranks only."""
    EarlySums.LEAST = 1
    engine = vectors_engine(world, Switched(), micro_steps=2, stage=stage, overlaps=overlaps)
    found = []
    for step in range(3):
        for micro_step in range(2):
            is_everywhere = stage == 2 or overlaps
            nats = engine(gradients_of(step, micro_step, world.rank, is_everywhere=is_everywhere))
            engine.backward(nats, scale=1.0)  # type: ignore[arg-type]
        assert engine.step(0.1).is_applied
        found.append(RANKS.whole(engine))
    return found


def vectors_engine(
    world: World, module: nn.Module, *, micro_steps: int, stage: int, overlaps: bool
) -> Engine:
    """Under ZeRO in bf16, without clipping; four elements fill a bucket."""
    config = tiny_config(
        engine=tiny_engine(
            zero_stage=stage, precision=Precision.bf16, overlap_comm=overlaps, bucket_elements=4
        ),
        optimizer=EllisAdamConfig(
            name="ellis-adam", learning_rate=0.1, weight_decay=0.0, gradient_clip=0.0
        ),
        batch=BatchConfig(global_tokens=world.size * micro_steps * 8, micro_rows=1),
    )
    return Engine(module, config, world, micro_steps=micro_steps)  # type: ignore[arg-type]


def gradients_of(
    step: int, micro_step: int, rank: int, *, is_everywhere: bool
) -> dict[str, Tensor]:
    """Those of a call, exact in bf16: a always, b in step 0 and at first in step 2, c once.

    c has one on rank 1 only, unless it is to be the same everywhere: reductions during a backward
    pass, ours as DeepSpeed's, need that.
    """
    gradients = {"norm_a": torch.arange(5.0) + 1 + step}
    if step == 0 or (step, micro_step) == (2, 0):
        gradients["norm_b"] = torch.arange(5.0) - 2 + micro_step
    if (rank == 1 or is_everywhere) and step == 1 and micro_step == 1:
        gradients["norm_c"] = torch.ones(5)
    return {name: value.bfloat16() for name, value in gradients.items()}


class Repeated(nn.Module):
    """A vector that gets two gradients in one backward pass, x and 2 x: its hooks fire twice."""

    def __init__(self) -> None:
        super().__init__()
        self.kept_iterations: int | None = None
        self.norm_a = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        uses = [checkpoint(self._use, x * factor, use_reentrant=True) for factor in (1, 2)]
        return torch.stack(uses).sum()

    def _use(self, x: Tensor) -> Tensor:
        return (self.norm_a * x).sum()


def repeated(world: World, stage: int, overlaps: bool) -> float | str:
    """The norm of the gradient summed over ranks, where x is 0, 1, .. plus the rank; or why not."""
    EarlySums.LEAST = 1
    engine = vectors_engine(world, Repeated(), micro_steps=1, stage=stage, overlaps=overlaps)
    x = (torch.arange(5.0) + world.rank).bfloat16().requires_grad_()
    try:
        engine.backward(engine(x), scale=1.0)  # type: ignore[arg-type]
    except AssertionError as error:
        return str(error)
    return engine.step(0.1).grad_norm


def warned(world: World) -> list[str]:
    """What is said of a DeepSpeed that nobody knows."""
    import logging

    takeover.KNOWN_VERSION = "0.0.0"
    said: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(f"{record.levelname}: {record.getMessage()}")

    takeover.log.addHandler(Listening())
    for case in ({"stage": 3}, {"stage": 1}, {"stage": 1, "overlap": True}):
        RANKS.new_engine(world, {"precision": "bf16"} | case)
    return said
