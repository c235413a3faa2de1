"""How far a run is: the few numbers that, with the configuration, name every later step."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.config import TrainConfig
from pretrain.errors import DataError


@dataclasses.dataclass(slots=True)
class TrainState:
    """Counters over the whole life of a run, whatever its restarts."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    rows: int = 0
    """Rows consumed: the global row of the next step's first row."""
    tokens: int = 0
    """Tokens consumed."""
    skipped_updates: int = 0
    """Steps without an update: the gradient was not finite, or the loss was far off."""
    skipped_in_a_row: int = 0
    """How many of those the last steps were."""
    not_finite_in_a_row: int = 0
    """How many of the last steps had a loss or a gradient that was not finite."""
    spikes: int = 0
    """Steps whose loss was a spike."""
    bad_in_a_row: int = 0
    """How many of the last steps were spikes or had no update."""
    good_losses: list[float] = dataclasses.field(default_factory=list)
    """Losses that the next one is compared with, in nats."""
    lost_rows: int = 0
    """Damaged rows that were padding instead (data.on_damage=quarantine)."""
    lives: int = 0
    """Times the run was started or resumed."""
    trained_s: float = 0.0
    """Seconds inside steps, over all lives."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        """The state that `as_dict` gave."""
        return cls(**values)


def last_step(config: TrainConfig, state: TrainState) -> int:
    """The step at which the run ends, if every later step has the configured size."""
    if config.run.steps is not None:
        return config.run.steps
    assert config.run.tokens is not None
    return state.step + -(-(config.run.tokens - state.tokens) // config.batch.global_tokens)


def total_tokens(config: TrainConfig, state: TrainState) -> int:
    """Tokens of the whole run: those consumed, and those of the steps to come."""
    return state.tokens + (last_step(config, state) - state.step) * config.batch.global_tokens


def total_rows(config: TrainConfig, state: TrainState) -> int:
    """Rows of the whole run, those that it went past included, as `total_tokens` counts."""
    return state.rows + max(0, last_step(config, state) - state.step) * config.rows_per_step


def check_same_on_all_ranks(everyone: Sequence[Mapping[str, str]]) -> None:
    """Raise DataError if a rank has other shards or another tokenizer than rank 0.

    `everyone`: their hashes, by rank. Folders of one name may differ from node to node.
    """
    for rank, identity in enumerate(everyone):
        for key, known in everyone[0].items():
            if identity[key] != known:
                raise DataError(
                    f"rank {rank} has {key} {identity[key][:12]}, rank 0 has {known[:12]}: a "
                    "folder of the same name holds something else on that node. Copy data.shards "
                    "and tokenizer.path of one node to all, or name a place that they share."
                )


def check_same_data(saved: dict[str, Any], fingerprint: str, shards: str) -> None:
    """Raise DataError if a checkpoint's state names other shards than those at `shards`.

    A run that was adopted, and has not trained yet, names none.
    """
    if saved.get("data_fingerprint", fingerprint) != fingerprint:
        raise DataError(
            f"The run has trained on data {saved['data_fingerprint'][:12]}, but {shards} holds "
            f"{fingerprint[:12]}: rows would be lost or repeated, and held-out text may have been "
            "trained on. Put the run's own shards back, or start another run."
        )


def check_same_tokenizer(saved: dict[str, Any], sha256: str, path: str) -> None:
    """Raise DataError if a checkpoint's state names another tokenizer than the one at `path`."""
    known = str(saved.get("tokenizer_sha256", "unknown"))
    if known != sha256:
        raise DataError(
            f"The run's weights know the ids of tokenizer {known[:12]}, but {path} holds "
            f"{sha256[:12]}: its text would be nonsense. Use the run's own tokenizer, and shards "
            "that were built with it."
        )
