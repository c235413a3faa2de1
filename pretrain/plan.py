"""`pretrain plan`: what a run costs, before any GPU is asked for. Torch-free.

Counts are exact; memory of activations, speed and wait are estimates and are printed as such.
"""

import dataclasses
import math

import numpy as np
from rich.console import Console
from rich.table import Table

from pretrain.budget import RESERVED_SHARE, Plan, Price, advice, make_plan, usable_bytes
from pretrain.config import TrainConfig
from pretrain.engine.config import EngineConfig
from pretrain.engine.memory import GIB, Memory, checkpoint_bytes, rank_memory
from pretrain.model.balance import Wait
from pretrain.model.config import Curriculum
from pretrain.model.cost import count_parameters
from pretrain.model.depth import DepthLaw, settled

MICRO_ROWS = (1, 2, 4)
DEADLINES_DAYS = (1, 7, 30, 90)


def main(config: TrainConfig) -> None:
    """Print the plan of a run. Raises ConfigError where the batch does not divide."""
    plan = make_plan(config)
    # a terminal has its own width; elsewhere tables must not be cut
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=110)
    console.print(_model_table(plan))
    console.print(_run_table(plan))
    console.print(_memory_table(plan))
    console.print(_speed_table(plan))
    console.print(_wall_table(plan))
    if plan.alternatives:
        console.print(_wait_table(plan))
        console.print(_scope_table(plan))
    for line in advice(plan):
        console.print(line)


def _model_table(plan: Plan) -> Table:
    counts = count_parameters(plan.config.model)
    total = sum(counts.values())
    table = _table(f"Model {plan.config.model.name}", "part", "parameters", "share")
    for part, count in counts.items():
        table.add_row(part, f"{count:,}", f"{count / total:.1%}")
    table.add_section()
    table.add_row("total", f"{total:,}", "")
    return table


def _run_table(plan: Plan) -> Table:
    config, flops = plan.config, plan.flops
    law = DepthLaw.of(settled(config.depth))
    low, middle, high = law.quantile(np.array([0.01, 0.5, 0.99])).tolist()
    rows, ranks, nodes = config.rows_per_step, config.cluster.ranks, config.cluster.nodes
    hosts = f"{nodes} host{'s' * (nodes > 1)}"
    table = _table("Run", "what", "value")
    for name, value in (
        ("model GFLOP per token", f"{plan.model_flops / 1e9:,.4g} (no recomputation)"),
        (
            "  at n no-grad, k grad",
            f"{3 * flops.once / 1e9:.4g} + {flops.iteration / 1e9:.5g} (n + 3 k)",
        ),
        (
            "executed GFLOP per token",
            f"{plan.executed_flops / 1e9:,.4g}; {plan.recomputed:.3g} iterations recomputed",
        ),
        ("depth", f"mean {law.mean:.2f}; 1 % {low}, median {middle}, 99 % {high}"),
        ("  curriculum", _curriculum(config)),
        (
            "iterations",
            "{:.2f} without, {:.2f} with gradient, mean of the run".format(*plan.iterations),
        ),
        (
            "tokens per step",
            f"{config.batch.global_tokens:,} = {rows:,} rows of {config.model.context:,}",
        ),
        ("ranks", f"{ranks:,} on {hosts}; {rows // ranks} rows each"),
        ("micro-steps per step", f"{plan.micro_steps}, batch.micro_rows {config.batch.micro_rows}"),
        ("steps", f"{config.total_steps:,}"),
        ("tokens", f"{config.total_tokens:,}"),
    ):
        table.add_row(name, value)
    return table


def _curriculum(config: TrainConfig) -> str:
    depth = config.depth
    if depth.curriculum is Curriculum.none:
        return "none"
    share = depth.ramp_rows * config.model.context / config.total_tokens
    return f"{depth.curriculum.value} over {depth.ramp_rows:,} rows, {share:.0%} of the run"


def _memory_table(plan: Plan) -> Table:
    config = plan.config
    usable = usable_bytes(config)
    configured = config.batch.micro_rows
    micro_rows = sorted({*MICRO_ROWS, max(1, configured // 2), configured})
    table = _table(
        f"Memory of one rank in GiB, {config.engine.precision.value}, model.path="
        f"{config.model.path.value}. Usable: {usable / GIB:.1f} "
        f"({RESERVED_SHARE:.0%} is left to libraries). Last: totals by batch.micro_rows, with "
        "activations, an estimate.",
        "ZeRO",
        "recompute",
        "weights",
        "gradients",
        "optimizer",
        "buffers",
        *(f"x {rows}" for rows in micro_rows),
    )
    for stage in (1, 2, 3):
        for is_checkpointed in (False, True):
            engine = _engine_at(config.engine, stage, is_checkpointed)
            memories = [_memory(plan, engine, rows) for rows in micro_rows]
            first = memories[0]
            states = (first.weights, first.gradients, first.masters + first.moments, first.buffers)
            table.add_row(
                f"{stage}{_mark(engine == config.engine)}",
                _recomputed(engine),
                *(f"{size / GIB:.2f}" for size in states),
                *(_fit(memory.total, usable) for memory in memories),
            )
    return table


def _engine_at(engine: EngineConfig, stage: int, is_checkpointed: bool) -> EngineConfig:
    """The engine at another stage, with the switches of that stage's own configuration."""
    return dataclasses.replace(
        engine,
        zero_stage=stage,
        overlap_comm=engine.overlap_comm and (stage < 3 or engine.zero_stage == 3),
        checkpoint_activations=is_checkpointed,
        kept_iterations=engine.kept_iterations if is_checkpointed else 0,
    )


def _recomputed(engine: EngineConfig) -> str:
    if not engine.checkpoint_activations:
        return "no"
    return f"all but {engine.kept_iterations}" if engine.kept_iterations else "yes"


def _memory(plan: Plan, engine: EngineConfig, micro_rows: int) -> Memory:
    config, ranks = plan.config, plan.config.cluster.ranks
    return rank_memory(
        config.model,
        engine,
        backprop=config.depth.backprop,
        ranks=ranks,
        micro_rows=micro_rows,
        # where that many do not divide the step, the nearest batch that they do divide
        micro_steps=math.ceil(config.rows_per_step / ranks / micro_rows),
    )


def _fit(needed: int, usable: float) -> str:
    size = f"{needed / GIB:.1f}"
    return size if needed <= usable else f"[red]over: {size}[/red]"


def _speed_table(plan: Plan) -> Table:
    config, cluster = plan.config, plan.config.cluster
    saved = checkpoint_bytes(config.model)
    days, expected = plan.hours / 24, plan.estimate
    # as shards store them
    token_bytes = 2 if config.tokenizer.vocabulary_size <= 2**16 else 4
    gone = expected.interruptions
    table = _table("Expected speed", "what", "value")
    for name, value in (
        (
            "one rank",
            f"{plan.tokens_per_s_per_gpu:,.0f} tokens/s; {cluster.gpu_flops / 1e12:,.4g} TFLOP/s "
            f"x {cluster.hardware.forward_utilization:.1%} without gradient, "
            f"x {cluster.utilization:.1%} with",
        ),
        ("all ranks", f"{plan.tokens_per_s:,.0f} tokens/s while steps are taken"),
        (
            "one step",
            f"{expected.step.total_s:,.2f} s, {expected.step.idle:.1%} of it idle",
        ),
        (
            "between failures",
            "none expected"
            if math.isinf(gone.mtbf_s)
            else f"{gone.mtbf_s / 3600:,.1f} hours of the job; {gone.recovery_s:,.0f} s to recover",
        ),
        ("goodput", f"{expected.goodput:.1%} of the time in steps that count"),
        (
            "saves",
            f"every {config.checkpoint.every_steps} steps, {gone.wait_s:.2g} s of waiting each; "
            f"every {expected.best_every_steps} steps would be near the best",
        ),
        (
            "whole run",
            f"{plan.hours:,.1f} hours = {days:,.1f} days"
            if plan.hours >= 1
            else f"{plan.hours * 60:,.1f} minutes",
        ),
        ("rank hours", f"{plan.hours * cluster.ranks:,.0f}"),
        (
            "loaders of a host",
            f"{plan.tokens_per_s / cluster.nodes:,.0f} tokens/s = "
            f"{plan.tokens_per_s / cluster.nodes * token_bytes / 1e6:,.3g} MB/s of shards",
        ),
        (
            "checkpoint",
            f"{saved / GIB:,.2f} GiB; {config.checkpoint.keep_last} kept and one in the making: "
            f"{saved * (config.checkpoint.keep_last + 1) / GIB:,.2f} GiB",
        ),
    ):
        table.add_row(name, value)
    for deadline in DEADLINES_DAYS:
        if plan.hours * cluster.ranks < 24 * deadline:
            continue
        needed = config.total_tokens / (deadline * 86400)
        gpus = math.ceil(needed / (plan.tokens_per_s_per_gpu * expected.goodput))
        table.add_row(f"to end in {deadline} d", f"{needed:,.0f} tokens/s needed: {gpus:,} ranks")
    return table


def _wall_table(plan: Plan) -> Table:
    table = _table("Expected wall time", "what", "share")
    for cause, share in plan.estimate.wall.items():
        table.add_row(cause, f"{share:.2%}")
    return table


def _scope_table(plan: Plan) -> Table:
    table = _table(
        f"The run under every scope, ZeRO {plan.config.engine.zero_stage}: idle shares are of a "
        "step, goodput of the run",
        "one depth per",
        "sampling",
        "tokens/s",
        "wait by depth",
        "stragglers",
        "communication",
        "goodput",
        "hours",
    )
    for price in plan.alternatives:
        expected = price.estimate
        step, total_s = expected.step, expected.step.total_s
        table.add_row(
            _scope(plan, price),
            price.depth.sampling.value,
            f"{expected.tokens_per_s:,.0f}",
            f"{step.depth_wait_s / total_s:.1%}",
            f"{step.straggler_s / total_s:.1%}",
            f"{step.communication_s / total_s:.1%}",
            f"{expected.goodput:.1%}",
            f"{expected.hours:,.0f}",
        )
    return table


def _scope(plan: Plan, price: Price) -> str:
    shared = price.depth.block_rows
    rows = f" of {shared} rows" if shared > 1 else ""
    return f"{price.depth.scope.value}{rows}{_mark(price.depth == plan.config.depth)}"


def _wait_table(plan: Plan) -> Table:
    config = plan.config
    steps = plan.alternatives[0].steps
    table = _table(
        f"Wait: work of the slowest rank over the mean, core only; {steps} steps simulated. "
        f"Under ZeRO 2, 3 ranks meet at every micro-step (micro_rows {config.batch.micro_rows}); "
        "what overlap hides of that is not taken off.",
        "one depth per",
        "sampling",
        "ZeRO 1",
        "ZeRO 2, 3",
        "steps differ by",
    )
    for price in plan.alternatives:
        table.add_row(
            _scope(plan, price),
            price.depth.sampling.value,
            _wait(price.once),
            _wait(price.often),
            f"{price.step_variation:.2%}",
        )
    return table


def _wait(wait: Wait) -> str:
    return f"{wait.slowest:.3f} +- {wait.error:.3f}"


def _mark(is_configured: bool) -> str:
    return " *" if is_configured else ""


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        is_text = column in ("part", "what", "value", "ZeRO", "one depth per", "sampling")
        table.add_column(column, justify="left" if is_text else "right")
    return table
