"""The runs of learning.py by name: what each differs in from experiment=huginn-100m-short.

Runs of a group share tokens, seed, batch and schedule, so that what differs is what is named.
"""

import dataclasses
from dataclasses import dataclass

from pretrain.compose import load
from pretrain.config import TrainConfig
from pretrain.model.cost import TokenFlops, mean_iterations

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
BASE = (
    "experiment=huginn-100m-short", "logging=quiet", "checkpoint.every_steps=100000",
    "checkpoint.keep_last=1", "validation.prompts=[]",
    # saved once, at the end: there is nothing to go back to
    "guards.spike.rewind_after=0",
)  # fmt: skip
FIXED = ("depth=fixed", "depth.mean=1", "depth.backprop=1")
# 32 M parameters, half of them the embedding: six of them fit beside each other
SMALL = (
    "model.name=huginn-30m", "model.width=480", "model.heads=5", "model.inner=1632",
    "model.core_layers=2",
)  # fmt: skip
# A step of one depth has the loss of that depth: to the guard, shallow steps would be spikes.
UNGUARDED = ("guards.spike.alert_score=1000", "guards.spike.skip_score=1000")
SAMPLING = {
    "rows-dealt": (),
    "rows-independent": ("depth.sampling=independent",),
    "one-depth-a-step": ("depth.scope=step",),
}
RATES = ("4e-4", "8e-4", "1.6e-3")
DEEP_RATES = ("1e-4", "3e-4")
SEEDS = (0, 1)
WARMUP, COOLDOWN = 0.1, 0.4
VALIDATIONS = 5


@dataclass(frozen=True, slots=True)
class Run:
    """One run: what it differs in, and the depths that its held-out loss is measured at."""

    overrides: tuple[str, ...] = ()
    seed: int = 0
    depths: tuple[int, ...] = DEPTHS
    size: tuple[str, ...] = ()
    """Overrides that those of the command line may change; the ones above stand after them."""


def all_runs(words: list[str]) -> dict[str, Run]:
    """Every run by name; `words` are overrides of all of them."""
    layers = layers_of_equal_flops(load("train", [*BASE, *words]))
    runs = {
        "recurrent": Run(),
        "fixed-equal-parameters": Run(FIXED),
        # twice and four times its own depth are far enough, and dear
        "fixed-equal-flops": Run((*FIXED, f"model.core_layers={layers}"), depths=(1, 2, 4)),
    }
    # eleven times as many layers in a row bear less
    for rate in DEEP_RATES:
        deep = (*FIXED, f"model.core_layers={layers}", f"optimizer.learning_rate={rate}")
        runs[f"fixed-equal-flops-{rate}"] = Run(deep, depths=(1, 2, 4))
    for name, overrides in SAMPLING.items():
        for seed in SEEDS:
            runs[f"{name}-{seed}"] = Run((*UNGUARDED, *overrides), seed, size=SMALL)
    for rate in RATES:
        runs[f"rate-{rate}"] = Run((f"optimizer.learning_rate={rate}",), depths=(1, 16))
    return runs


def is_fixed(run: Run) -> bool:
    """Whether all its rows have one depth, so that nothing is drawn."""
    return FIXED[0] in run.overrides


GROUPS = {
    "main": ["recurrent", "fixed-equal-parameters", "fixed-equal-flops"],
    "sampling": [f"{name}-{seed}" for seed in SEEDS for name in SAMPLING],
    "rates": [f"rate-{rate}" for rate in RATES],
    "deep-rates": [f"fixed-equal-flops-{rate}" for rate in DEEP_RATES],
}


def named(text: str, runs: dict[str, Run]) -> list[str]:
    """The runs that a list of names and groups means. Raises SystemExit for an unknown one."""
    found: list[str] = []
    for name in text.split(","):
        if name not in GROUPS and name not in runs:
            raise SystemExit(f"runs={name} is unknown; there are {', '.join([*GROUPS, *runs])}.")
        found += [own for own in GROUPS.get(name, [name]) if own not in found]
    return found


def layers_of_equal_flops(config: TrainConfig) -> int:
    """Layers of a core that runs once and then costs what the configured one costs in training."""
    wanted = TokenFlops.of(config.model).model(*mean_iterations(config.depth, rows=1))
    one, two = (
        TokenFlops.of(dataclasses.replace(config.model, core_layers=n)).model(0, 1) for n in (1, 2)
    )
    return max(1 + round((wanted - one) / (two - one)), 1)


def overrides_of(run: Run, *, tokens: int, words: list[str]) -> list[str]:
    """All that `pretrain train` is told of a run of so many tokens, but its folder."""
    said = [
        *BASE, *run.size, *words, *run.overrides, f"run.seed={run.seed}", f"run.tokens={tokens}",
        f"schedule.warmup_tokens={int(WARMUP * tokens)}",
        f"schedule.cooldown_tokens={int(COOLDOWN * tokens)}",
        f"validation.depths=[{','.join(map(str, run.depths))}]",
    ]  # fmt: skip
    steps = load("train", said).total_steps
    return [*said, f"validation.every_steps={-(-steps // VALIDATIONS)}"]
