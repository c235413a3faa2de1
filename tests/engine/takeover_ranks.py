"""What the ranks of the takeover tests run; imported by path, in processes of their own."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


def switched(world: World, stage: int) -> list[dict[str, Tensor]]:
    """Masters after each of three steps in which parameters come and go, on some ranks only."""
    config = tiny_config(
        engine=tiny_engine(zero_stage=stage, precision=Precision.bf16),
        optimizer=EllisAdamConfig(
            name="ellis-adam", learning_rate=0.1, weight_decay=0.0, gradient_clip=0.0
        ),
        batch=BatchConfig(global_tokens=world.size * 16, micro_rows=1),
    )
    engine = Engine(Switched(), config, world, micro_steps=2)  # type: ignore[arg-type]
    found = []
    for step in range(3):
        for micro_step in range(2):
            nats = engine(gradients_of(step, micro_step, world.rank, stage))
            engine.backward(nats, scale=1.0)  # type: ignore[arg-type]
        assert engine.step(0.1).is_applied
        found.append(RANKS.whole(engine))
    return found


def gradients_of(step: int, micro_step: int, rank: int, stage: int) -> dict[str, Tensor]:
    """Those of a call, exact in bf16: a always, b in every other step, c once.

    Under ZeRO-1 c has one on rank 1 only; under ZeRO-2 DeepSpeed cannot do that.
    """
    gradients = {"norm_a": torch.arange(5.0) + 1 + step}
    if step % 2 == 0:
        gradients["norm_b"] = torch.arange(5.0) - 2 + micro_step
    if (rank == 1 or stage == 2) and step == 1 and micro_step == 1:
        gradients["norm_c"] = torch.ones(5)
    return {name: value.bfloat16() for name, value in gradients.items()}


def warned(world: World) -> list[str]:
    """What is said of a DeepSpeed that nobody knows."""
    import logging

    takeover.KNOWN_VERSION = "0.0.0"
    said: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(f"{record.levelname}: {record.getMessage()}")

    takeover.log.addHandler(Listening())
    for stage in (1, 3):
        RANKS.new_engine(world, {"stage": stage, "precision": "bf16"})
    return said
