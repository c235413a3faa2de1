"""A trained model out of a run folder, without any engine: for evaluation and generation."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from pretrain.compose import thaw
from pretrain.config import TrainConfig
from pretrain.data.digits import digit_ids
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine.checkpoint import (
    load_weights,
    newest_checkpoint,
    read_state,
    whole_checkpoint,
)
from pretrain.engine.config import Precision
from pretrain.errors import CheckpointError, DataError
from pretrain.loop.state import check_same_tokenizer
from pretrain.model.recurrent import RecurrentModel


class Trained(NamedTuple):
    """One whole checkpoint of a run."""

    config: TrainConfig
    model: RecurrentModel
    step: int
    dtype: torch.dtype
    state: dict[str, Any]
    """What the loop saved with it: its counters, and hashes of shards and tokenizer."""
    folder: Path
    """Where it lies."""


def load_trained(
    run_dir: str | Path,
    device: torch.device,
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
) -> Trained:
    """The run's weights on `device`: the newest, in the precision that it trains in, unless told.

    Raises CheckpointError if the folder is no run, or has no such checkpoint.
    """
    run_dir = Path(run_dir)
    config = thaw(run_dir)
    newest = newest_checkpoint(run_dir) if step is None else whole_checkpoint(run_dir, step)
    if newest is None:
        raise CheckpointError(
            f"{run_dir} has no checkpoint yet: `pretrain train run.dir={run_dir}` writes the first "
            f"after {config.checkpoint.every_steps} steps (checkpoint.every_steps)."
        )
    if dtype is None:
        dtype = torch.bfloat16 if config.engine.precision is Precision.bf16 else torch.float32
    with torch.device("meta"):
        model = RecurrentModel(config.model).to(dtype)
    model = model.to_empty(device=device)
    weights = {name: weight.to(device, dtype) for name, weight in load_weights(newest).items()}
    model.load_state_dict(weights, strict=True)
    state = read_state(newest)
    if model.digit_embedding is not None:
        model.digit_embedding.tell_digits(find_digits(config, of=state))
    number = int(newest.name.removeprefix("step-"))
    return Trained(config, model.eval(), number, dtype, state, newest)


def check_is_here(run_dir: str | Path, key: str, folder: str) -> None:
    """Raise DataError if the folder that a run's setting names is not on this machine.

    Commands that read a run take no settings of it, so the remedy is its config.yaml.
    """
    if "://" not in folder and not Path(folder).is_dir():
        raise DataError(
            f"{run_dir} was trained with {key}={folder}, which is not here. Copy it here, or write "
            f"where it is into {Path(run_dir) / 'config.yaml'}; it is known by its hash."
        )


def find_digits(config: TrainConfig, *, of: dict[str, Any] | None = None) -> tuple[int, ...]:
    """The tokens that are digits; empty if the model gives digits no places.

    `of`: what a checkpoint saved; its tokenizer must then be the one that tokenizer.path has.
    Raises DataError if the tokenizer reads numbers otherwise than digit by digit.
    """
    if config.model.digit_positions is None:
        return ()
    tokenizer = Tokenizer.load(config.tokenizer.path)
    if of is not None:
        check_same_tokenizer(of, tokenizer.sha256, config.tokenizer.path)
    return digit_ids(tokenizer)
