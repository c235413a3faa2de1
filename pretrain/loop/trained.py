"""A trained model out of a run folder, without any engine: for evaluation and generation."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from pretrain.compose import thaw
from pretrain.config import TrainConfig
from pretrain.engine.checkpoint import load_weights, newest_checkpoint, read_state
from pretrain.engine.config import Precision
from pretrain.errors import CheckpointError
from pretrain.model.recurrent import RecurrentModel


class Trained(NamedTuple):
    """The newest whole checkpoint of a run."""

    config: TrainConfig
    model: RecurrentModel
    step: int
    dtype: torch.dtype
    state: dict[str, Any]
    """What the loop saved with it: its counters, and hashes of shards and tokenizer."""


def load_trained(run_dir: str | Path, device: torch.device) -> Trained:
    """The run's newest weights on `device`, in the precision that it trains in.

    Raises CheckpointError if the folder is no run or has no checkpoint yet.
    """
    run_dir = Path(run_dir)
    config = thaw(run_dir)
    newest = newest_checkpoint(run_dir)
    if newest is None:
        raise CheckpointError(
            f"{run_dir} has no checkpoint yet: `pretrain train run.dir={run_dir}` writes the first "
            f"after {config.checkpoint.every_steps} steps (checkpoint.every_steps)."
        )
    dtype = torch.bfloat16 if config.engine.precision is Precision.bf16 else torch.float32
    with torch.device("meta"):
        model = RecurrentModel(config.model).to(dtype)
    model = model.to_empty(device=device)
    weights = {name: weight.to(device, dtype) for name, weight in load_weights(newest).items()}
    model.load_state_dict(weights, strict=True)
    step = int(newest.name.removeprefix("step-"))
    return Trained(config, model.eval(), step, dtype, read_state(newest))
