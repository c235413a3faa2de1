"""No number that a person may write ends in a traceback: it is accepted or refused by name."""

import dataclasses
import math
from typing import Any, get_args, get_origin

import pytest

from pretrain.budget import make_plan
from pretrain.config import TrainConfig
from pretrain.errors import ConfigError
from pretrain.testing import tiny_config

SECTIONS = [
    "run", "model", "depth", "batch", "optimizer", "schedule", "engine", "checkpoint", "guards",
    "validation", "cluster",
]  # fmt: skip
# what a run may well have less than one of, or none
MAY_BE = {
    0: {
        "run.seed", "optimizer.weight_decay", "optimizer.beta1", "optimizer.beta2",
        "optimizer.gradient_clip", "schedule.warmup_tokens", "schedule.cooldown_tokens",
        "schedule.min_learning_rate", "engine.zero3_persistent_elements", "engine.kept_iterations",
        "checkpoint.keep_every_steps", "depth.ramp_rows", "cluster.max_requeues",
        "cluster.max_resubmits", "validation.sample_temperature",
    },
    -1: {"run.seed"},
    math.nan: set(),
}  # fmt: skip


def numbers() -> list[tuple[str, str, bool]]:
    """Section, field, and whether it is whole, of every number of a training configuration."""
    config = tiny_config()
    found = []
    for section in SECTIONS:
        for field in dataclasses.fields(getattr(config, section)):
            kinds = {field.type, *get_args(field.type)}
            if kinds & {int, float} and get_origin(field.type) not in (list, dict):
                found.append((section, field.name, int in kinds))
    return found


@pytest.mark.parametrize("value", MAY_BE, ids=str)
@pytest.mark.parametrize(("section", "name", "is_whole"), numbers(), ids=str)
def test_impossible_numbers_are_refused_by_name(
    section: str, name: str, is_whole: bool, value: float
) -> None:
    if is_whole and math.isnan(value):
        return
    config, key = tiny_config(), f"{section}.{name}"
    changes: dict[str, Any] = {name: value}
    if key == "run.tokens":
        changes["steps"] = None

    def make() -> TrainConfig:
        part = dataclasses.replace(getattr(config, section), **changes)
        made = dataclasses.replace(config, **{section: part})
        make_plan(made)
        return made

    if key in MAY_BE[value]:
        make()
        return
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        make()
