"""What a run will cost: FLOPs, speed, hours, and how long ranks wait for each other. Torch-free.

Counts are exact; the speed rests on the rates of config.cluster, the wait on a simulation of the
run's own deal of depths, and what failures add on their rate (pretrain/scaling).
"""

import dataclasses

from pretrain.config import TrainConfig
from pretrain.engine.memory import GIB, Memory, rank_memory
from pretrain.model import balance
from pretrain.model.config import DepthConfig, Law, Sampling, Scope
from pretrain.model.cost import TokenFlops, mean_iterations, mean_recomputed
from pretrain.model.depth import num_lanes
from pretrain.scaling.estimate import Estimate, estimate

# Contexts and workspaces of libraries, and fragmentation: 7 of an H200's 140 GiB.
RESERVED_SHARE = 0.05
# The wait is simulated for about this long per scope and sampling.
SIMULATION_S = 0.05
# A share of the run's time that another interval between saves must gain to be advised.
WORTH_SAYING = 0.01
# The share of the run's time in validations above which that is said. `make train` is at 0.15.
MUCH_VALIDATION = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """One way to share depths, and how long ranks wait under it."""

    depth: DepthConfig
    """The scope, sampling and deal."""
    once: balance.Wait
    """Ranks meet once a step: ZeRO-1."""
    often: balance.Wait
    """Ranks meet at every micro-step: ZeRO-2 and 3."""
    step_variation: float
    """Coefficient of variation of whole steps' core work."""
    steps: int
    """Steps simulated."""
    estimate: Estimate
    """The run's wall time under it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The numbers that a run is decided by."""

    config: TrainConfig
    micro_steps: int
    """Backward passes of one rank in a step."""
    flops: TokenFlops
    """Forward FLOPs of one token."""
    iterations: tuple[float, float]
    """Mean iterations without and with gradient over the whole run."""
    recomputed: float
    """Mean iterations that the backward pass computes again."""
    price: Price
    """The wait as configured."""
    alternatives: list[Price]
    """The wait under every scope and sampling, the configured one among them."""

    @property
    def model_flops(self) -> float:
        """Training FLOPs per token of the mathematics, averaged over the law of depths."""
        return self.flops.model(*self.iterations)

    @property
    def executed_flops(self) -> float:
        """Training FLOPs per token that run."""
        return self.flops.executed(*self.iterations, recomputed=self.recomputed)

    @property
    def memory(self) -> Memory:
        """Bytes on one GPU as configured."""
        config = self.config
        return rank_memory(
            config.model,
            config.engine,
            backprop=config.depth.backprop,
            ranks=config.cluster.ranks,
            micro_rows=config.batch.micro_rows,
            micro_steps=self.micro_steps,
        )

    @property
    def estimate(self) -> Estimate:
        """Wall time as configured."""
        return self.price.estimate

    @property
    def wait(self) -> float:
        """Time of a step over what it would be if nobody waited for deeper rows."""
        step = self.estimate.step
        return step.total_s / (step.total_s - step.depth_wait_s)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Expected while steps are taken."""
        return self.tokens_per_s / self.config.cluster.ranks

    @property
    def tokens_per_s(self) -> float:
        """Expected of the whole cluster; what the loaders must deliver."""
        return self.estimate.tokens_per_s

    @property
    def hours(self) -> float:
        """Expected for the whole run, with saves, failures and validations."""
        return self.estimate.hours


def make_plan(config: TrainConfig) -> Plan:
    """Work out a plan. Raises ConfigError where the batch or the lanes do not divide."""
    cluster = config.cluster
    micro_steps = config.batch.micro_steps(context=config.model.context, ranks=cluster.ranks)
    total_rows = config.total_tokens // config.model.context
    alternatives = []
    if cluster.ranks > 1 and config.depth.law is not Law.fixed:
        is_block = config.depth.scope is Scope.block
        block_rows = config.depth.block_rows if is_block else max(config.batch.micro_rows, 2)
        alternatives = [
            price(config, depth)
            for depth in balance.alternatives(
                config.depth, rows=config.rows_per_step, block_rows=block_rows
            )
        ]
    configured = next((p for p in alternatives if p.depth == config.depth), None)
    return Plan(
        config=config,
        micro_steps=micro_steps,
        flops=TokenFlops.of(config.model),
        iterations=mean_iterations(config.depth, rows=total_rows),
        recomputed=mean_recomputed(
            config.depth, rows=total_rows, kept_iterations=config.engine.model_kept_iterations
        ),
        price=configured or price(config, config.depth),
        alternatives=alternatives,
    )


def price(config: TrainConfig, depth: DepthConfig) -> Price:
    """Simulate how long the ranks of a run would wait if it shared depths in this way."""
    rows = config.rows_per_step
    steps = balance.affordable_steps(rows, seconds=SIMULATION_S)
    simulation = balance.simulate(depth, seed=config.run.seed, rows=rows, steps=steps)
    once, often = (
        simulation.wait(
            balance.Layout(
                ranks=config.cluster.ranks, micro_rows=config.batch.micro_rows, zero_stage=stage
            )
        )
        for stage in (1, 2)
    )
    variation = simulation.step_variation
    return Price(
        depth=depth,
        once=once,
        often=often,
        step_variation=variation,
        steps=steps,
        estimate=estimate(config, simulation),
    )


def advice(plan: Plan) -> list[str]:
    """What to change, where the plan shows that something would be better."""
    config, found = plan.config, []
    needed, usable = plan.memory.total, usable_bytes(config)
    if needed > usable:
        found.append(
            f"Does not fit: {needed / GIB:.1f} GiB of {usable / GIB:.1f} GiB usable. Take a "
            "smaller batch.micro_rows, engine.checkpoint_activations=true, or a higher "
            "engine.zero_stage."
        )
    depth, rows, ranks = config.depth, config.rows_per_step, config.cluster.ranks
    is_dealt = depth.scope is not Scope.step and depth.sampling is Sampling.stratified
    if plan.alternatives and is_dealt and num_lanes(depth, rows) % ranks:
        found.append(_lanes_advice(plan, rows=rows, ranks=ranks))
    expected = plan.estimate
    if expected.best.useful - expected.shares.useful > WORTH_SAYING:
        found.append(
            f"checkpoint.every_steps={config.checkpoint.every_steps} leaves "
            f"{expected.shares.useful:.1%} of the time to work that counts; "
            f"{expected.best_every_steps} would leave {expected.best.useful:.1%}."
        )
    if expected.validating > MUCH_VALIDATION:
        found.append(
            f"Validation takes {expected.validating:.1%} of the time: lower validation.rows="
            f"{config.validation.rows} or the deepest of validation.depths, "
            f"{max(config.validation.depths)}, or raise validation.every_steps="
            f"{config.validation.every_steps}."
        )
    return found


def _lanes_advice(plan: Plan, *, rows: int, ranks: int) -> str:
    config = plan.config
    lanes = num_lanes(config.depth, rows)
    start = f"{ranks} ranks do not divide depth.lanes={lanes}, so ranks get unequal work"
    if rows // config.depth.block_rows == ranks:
        return f"{start}; with one draw a rank, depth.scope=step is the way not to wait."
    better = price(config, dataclasses.replace(config.depth, lanes=ranks))
    return (
        f"{start}; depth.lanes={ranks} would wait {better.once.slowest:.3f} "
        f"instead of {plan.price.once.slowest:.3f} where ranks meet once."
    )


def usable_bytes(config: TrainConfig) -> float:
    """Memory of one GPU less what libraries and fragmentation take."""
    return config.cluster.gpu_memory_bytes * (1 - RESERVED_SHARE)
