"""What lm-evaluation-harness may ask for: the model to measure, and items as tasks. Torch-free."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pretrain.engine.config import Device
from pretrain.errors import ConfigError
from pretrain.model.decoding import Exit

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class HarnessOptions:
    """Which files of items become tasks, and where they are written."""

    tasks: list[str]
    """Files of items (JSON lines)."""
    to: str
    """Folder for lm-evaluation-harness's --include_path."""
    items: int | None = None
    """So many items of each task, evenly spread over the file; null: all."""
    max_new_tokens: int = 256
    """The longest answer or program."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("harness.tasks=[] names no file of items.")
        for name in ("items", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"harness.{name}={value} must be at least 1.")
        names = [Path(task).stem for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"harness.tasks names {', '.join(twice)} more than once; tasks are known by the "
                "file's name, so names must differ."
            )


@dataclass(kw_only=True, slots=True)
class ModelOptions:
    """The run behind `--model recurrent`: what --model_args may name, and three flags."""

    run_dir: str
    """The run folder."""
    num_steps: int = 32
    """Iterations of the core for every token; the most there may be where tokens exit."""
    checkpoint: int | None = None
    """The step of a checkpoint; None: the newest."""
    exit: Exit = Exit.none
    """What ends a token's iterations before num_steps, where text is written."""
    exit_threshold: float | None = None
    """Exit below it (argmax_stability: from it on); None: the published default."""
    batch_size: int | None = None
    """Rows of a whole context in one pass, and texts written side by side; None: what training
    held, and 16."""
    device: Device = Device.auto
    """What it is measured on."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1.")
        if self.exit is Exit.none and self.exit_threshold is not None:
            raise ConfigError(
                f"exit_threshold={self.exit_threshold} would do nothing with exit=none; name a "
                "criterion."
            )


# What lm-evaluation-harness passes beside them.
_FLAGS = ("max_batch_size",)
_WHOLE = ("num_steps", "checkpoint")


def model_options(given: Mapping[str, Any]) -> ModelOptions:
    """The options, from what lm-evaluation-harness makes of its command line.

    Raises ConfigError for unknown names and for values of the wrong kind.
    """
    known = [field.name for field in fields(ModelOptions)]
    if unknown := sorted(given.keys() - {*known, *_FLAGS}):
        raise ConfigError(
            f"--model_args {unknown[0]}={given[unknown[0]]!r} is unknown; --model recurrent takes "
            f"{', '.join(known)}."
        )
    if given.get("run_dir") is None:
        raise ConfigError("--model recurrent needs a run folder: --model_args run_dir=FOLDER.")
    found = {name: value for name, value in given.items() if value is not None}
    size = _batch_size(found.pop("batch_size", 1), found.pop("max_batch_size", None))
    for name in _WHOLE:
        if type(found.get(name, 0)) is not int:
            raise ConfigError(f"--model_args {name}={found[name]!r} must be a whole number.")
    if "exit_threshold" in found:
        found["exit_threshold"] = _number("exit_threshold", found["exit_threshold"])
    found["run_dir"] = str(found["run_dir"])
    found["exit"] = _exit(found.get("exit", Exit.none))
    found["device"] = _device(found.get("device", Device.auto))
    return ModelOptions(**found, batch_size=size)


def _batch_size(size: Any, most: Any) -> int | None:
    text = str(size)
    if text.split(":")[0] == "auto":
        return None if most is None else int(most)
    if not text.isdecimal():
        raise ConfigError(f"--batch_size {size} is neither a number nor auto.")
    if most is not None:
        raise ConfigError(f"--max_batch_size {most} would do nothing without --batch_size auto.")
    return int(text)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"--model_args {name}={value!r} must be a number.")
    return float(value)


def _exit(value: Any) -> Exit:
    if isinstance(value, Exit):
        return value
    names = {name: one for one in Exit for name in (one.value, one.name)}
    if value not in names:
        known = ", ".join(one.name for one in Exit)
        raise ConfigError(f"--model_args exit={value!r} is none of {known}.")
    return names[value]


def _device(value: Any) -> Device:
    """cuda:0 is what lm-evaluation-harness says if nobody says anything: a GPU, if there is one."""
    if isinstance(value, Device):
        return value
    devices = {"cpu": Device.cpu, "cuda": Device.auto, "cuda:0": Device.auto}
    if str(value) not in devices:
        raise ConfigError(
            f"--device {value}: give cpu or cuda. One of several GPUs is chosen by "
            "CUDA_VISIBLE_DEVICES, and under torchrun each rank takes its own."
        )
    return devices[str(value)]
