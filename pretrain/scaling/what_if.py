"""The same run with other values, many times a second: what an override does, without composing."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pretrain.config import TrainConfig


def what_if(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The configuration with values by dotted name, such as cluster.hardware.gpu_spread.

    Raises ConfigError where a field's own checks do, TypeError for a name that there is not.
    """
    for name, value in changes.items():
        config = _replaced(config, name.split("."), value)
    return config


def _replaced(node: Any, path: list[str], value: Any) -> Any:
    first, *rest = path
    if rest:
        value = _replaced(getattr(node, first), rest, value)
    return dataclasses.replace(node, **{first: value})
