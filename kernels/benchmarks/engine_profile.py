"""What an optimizer step costs besides its forward and backward passes, on one GPU or several.

    python kernels/benchmarks/engine_profile.py data=files data.root=x data.name=x [overrides]
    torchrun --standalone --nproc-per-node=4 kernels/benchmarks/engine_profile.py zero=2 ...

A row for each GPU, one micro-step of huginn-3.5b through the engine: seconds of each phase at full
depth and at depth 1, where everything but the engine's own work is short, then the kernels of a
step at depth 1. With update=deepspeed the same for DeepSpeed's own step (engine/takeover.py says
what differs). Phases of rank 0 go to results/engine-phases.csv, its kernels to
results/engine-profile-GPUSxzeroSTAGE-UPDATE.csv.

What to expect, at 4.1 TB/s and 3.56 B parameters (0.87 ms for a byte of each): the update is 4 + 20
+ 18 bytes or 36.5 ms; the backward pass adds 6 bytes or 5.2 ms. DeepSpeed's own: 4 + 8 + 36 + 6 + 8
bytes and what its element by element kernels take longer, 57 ms measured; backward 18 bytes, 22 ms
measured.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from measurements import RESULTS, append, commit
from pretrain.compose import load
from pretrain.engine.deepspeed import Engine
from pretrain.engine.world import join, leave
from pretrain.model.depth import Depth
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel
from step import Step
from step_profile import profile_step

REPEATS = 6
DEPTHS = (Depth(24, 8), Depth(0, 1))


def main() -> None:
    """Time the phases, then list the kernels."""
    options, overrides = {"update": "ours", "zero": "1"}, []
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        if key in options:
            options[key] = value
        else:
            overrides.append(word)
    update, gpus = options["update"], int(os.environ.get("WORLD_SIZE", "1"))
    words = [
        "experiment=huginn-3.5b", f"engine=zero{options['zero']}-bf16", "model.path=fused",
        f"batch.global_tokens={4096 * gpus}", "batch.micro_rows=1", "schedule.warmup_tokens=0",
        "run.tokens=null", "run.steps=100", f"validation.rows={gpus}", *overrides,
    ]  # fmt: skip
    config = load("train", words, resumes=False)
    world = join(config.engine)
    choose_update(update)
    with torch.device(world.device):
        model = RecurrentModel(config.model)
    initialize(model, mean_depth=config.depth.mean, seed=0)
    engine = Engine(model, config, world, micro_steps=1)
    steps = {depth: Step(engine.module, 1, depth) for depth in DEPTHS}
    for depth, step in steps.items():
        phases: dict[str, list[float]] = {"forward": [], "backward": [], "update": []}
        for _ in range(REPEATS):
            once(engine, step, phases)
        if world.is_main:
            what = {
                "update": update, "gpus": gpus, "zero": options["zero"],
                "overlap": config.engine.overlap_comm,
            }  # fmt: skip
            record(what, depth, {name: statistics.median(s[1:]) for name, s in phases.items()})
    name = f"engine-profile-{gpus}xzero{options['zero']}-{update}.csv"
    profile_step(lambda: once(engine, steps[DEPTHS[1]], None), RESULTS / name, world.is_main)
    leave(world)


def choose_update(update: str) -> None:
    """DeepSpeed's own step is what a version of it that nobody knows keeps."""
    # after world.join: it imports deepspeed
    from pretrain.engine import takeover

    if update == "deepspeed":
        takeover.KNOWN_VERSION = "none"
    elif update != "ours":
        raise SystemExit(f"update={update} is neither ours nor deepspeed.")


def record(what: dict[str, Any], depth: Depth, seconds: dict[str, float]) -> None:
    """Print and keep the phases of a step."""
    row = what | {
        "no_grad": depth.no_grad, "with_grad": depth.with_grad,
        **{f"{name}_ms": round(1e3 * value, 2) for name, value in seconds.items()},
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "commit": commit(),
    }  # fmt: skip
    print(", ".join(f"{name}: {value}" for name, value in row.items()), flush=True)
    append(RESULTS / "engine-phases.csv", row)


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
