"""What an optimizer step costs besides its forward and backward passes, on one GPU.

    python kernels/benchmarks/engine_profile.py data=files data.root=x data.name=x [overrides]

One row, one micro-step of huginn-3.5b through the engine: seconds of each phase at full depth, then
the kernels of a step at depth 1, where everything but the engine's own work is short. They go to
results/engine-profile.csv.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from pretrain.compose import load
from pretrain.engine.deepspeed import Engine
from pretrain.engine.world import join, leave
from pretrain.model.depth import Depth
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel
from step import RESULTS, Step
from step_profile import profile_step

REPEATS = 6


def main() -> None:
    """Time the phases, then list the kernels."""
    words = [
        "experiment=huginn-3.5b", "engine=zero1-bf16", "model.path=fused",
        "batch.global_tokens=4096", "batch.micro_rows=1", "schedule.warmup_tokens=0",
        "run.tokens=null", "run.steps=100", "validation.rows=1", *sys.argv[1:],
    ]  # fmt: skip
    config = load("train", words, resumes=False)
    world = join(config.engine)
    with torch.device(world.device):
        model = RecurrentModel(config.model)
    initialize(model, mean_depth=config.depth.mean, seed=0)
    engine = Engine(model, config, world, micro_steps=1)
    deep, shallow = Step(engine.module, 1, Depth(24, 8)), Step(engine.module, 1, Depth(0, 1))
    phases: dict[str, list[float]] = {"forward": [], "backward": [], "update": []}
    for _ in range(REPEATS):
        once(engine, deep, phases)
    for name, seconds in phases.items():
        print(f"{name}: {statistics.median(seconds[1:]) * 1e3:.1f} ms", flush=True)
    profile_step(lambda: once(engine, shallow, None), RESULTS / "engine-profile.csv")
    leave(world)


def once(engine: Engine, step: Step, phases: dict[str, list[float]] | None) -> None:
    """One optimizer step; the seconds of its phases, if asked for."""
    output = timed(phases, "forward", lambda: engine(
        step.tokens, step.depths, initial_state=step.state, labels=step.labels, keep_logits=False
    ))  # fmt: skip
    timed(phases, "backward", lambda: engine.backward(output.nats, scale=1 / 4096))
    timed(phases, "update", lambda: engine.step(1e-6))


def timed(phases: dict[str, list[float]] | None, name: str, deed: Callable[[], Any]) -> Any:
    """What the deed gives; how long it took is noted where there are phases."""
    if phases is None:
        return deed()
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = deed()
    torch.cuda.synchronize()
    phases[name].append(time.perf_counter() - started)
    return result


if __name__ == "__main__":
    main()
