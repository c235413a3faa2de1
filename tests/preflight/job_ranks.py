"""What the ranks of tests/preflight run; imported by path, in processes of their own."""

import dataclasses
import time
from typing import Any

import torch.distributed as dist

from pretrain.compose import load
from pretrain.engine.deepspeed import Engine
from pretrain.engine.world import World
from pretrain.preflight.findings import Finding
from pretrain.preflight.job import check_equal
from pretrain.preflight.links import check_links
from pretrain.preflight.parity import check_parity


def links(world: World, hosts: str, late: int) -> list[Finding]:
    """The links of ranks on such nodes; rank `late` waits before it sends to a peer."""
    exchange = dist.batch_isend_irecv

    def late_exchange(operations: Any) -> Any:
        time.sleep(0.1 * (world.rank == late))
        return exchange(operations)

    dist.batch_isend_irecv = late_exchange
    return [*check_links(world, list(hosts))]


def parity(world: World, cases: list[list[str]]) -> list[Finding]:
    """The probe under each of some settings."""
    found = []
    for overrides in cases:
        found += check_parity(load("train", overrides), world)
    return found


def wrong_parity(world: World, overrides: list[str], switch: str, value: Any) -> list[Finding]:
    """The probe where rank 1 computes wrong gradients while a switch of the engine is set."""
    start, backward = Engine.__init__, Engine.backward

    def remembering(self: Any, model: Any, config: Any, *rest: Any, **named: Any) -> None:
        start(self, model, config, *rest, **named)
        self.is_wrong = world.rank == 1 and getattr(config.engine, switch) == value

    def wrong(self: Any, nats: Any, *, scale: float) -> None:
        backward(self, nats, scale=scale * (1.01 if self.is_wrong else 1.0))

    Engine.__init__, Engine.backward = remembering, wrong
    return [*check_parity(load("train", overrides), world)]


def unequal(world: World) -> list[Finding]:
    """Rank 1 was started with another seed."""
    config = load("doctor", [])
    if world.rank == 1:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=1))
    return [*check_equal(config, world, ["alpha", "beta"])]
