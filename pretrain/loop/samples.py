"""What the model writes at a validation: the run's prompts, continued at several depths."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pretrain.config import TrainConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import ConfigError
from pretrain.loop.sink import SAMPLES
from pretrain.model.keyed import make_key
from pretrain.model.lockstep import continue_in_lockstep, row_tokens
from pretrain.model.recurrent import Output

log = logging.getLogger(__name__)


class Sampler:
    """Continues validation.prompts; every rank does the same, so that no collective waits."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer) -> None:
        """Raises ConfigError for a prompt that leaves no room in the context."""
        self._config, self._tokenizer = config, tokenizer
        self._prompts = [
            [tokenizer.special.begin_text, *ids]
            for ids in tokenizer.encode_batch(config.validation.prompts)
        ]
        self._new_tokens = _room(config, self._prompts)

    def take(self, forward: Callable[..., Output], *, step: int, device: torch.device) -> Any:
        """validation/samples: prompt, depth, seed and text of each sample; {} without prompts.

        All that is drawn is a function of run.seed and the step. From the same weights `pretrain
        generate` gives the same text for the prompt, depth, temperature and seed with top_p=1.
        """
        config = self._config.validation
        if not self._prompts:
            return {}
        seed = sample_seed(self._config.run.seed, step)
        depths = sorted(set(config.sample_depths))
        rows = [(number, depth) for number in range(len(self._prompts)) for depth in depths]
        found: list[dict[str, Any]] = []
        for part in self._parts(rows):
            ids = continue_in_lockstep(
                forward,
                self._config.model,
                [self._prompts[number] for number, _ in part],
                [depth for _, depth in part],
                new_tokens=self._new_tokens,
                temperature=config.sample_temperature,
                seed=seed,
                device=device,
            )
            found += [
                {
                    "prompt": config.prompts[number],
                    "depth": depth,
                    "seed": seed,
                    "text": self._tokenizer.decode(self._until_stop(new)),
                }
                for (number, depth), new in zip(part, ids, strict=True)
            ]
        return {SAMPLES: found}

    def _parts(self, rows: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """Rows that pass side by side: no more tokens than a micro-batch of training has."""
        tokens = row_tokens(self._prompts, self._new_tokens)
        at_once = max(1, self._config.batch.micro_rows * self._config.model.context // tokens)
        return [rows[start : start + at_once] for start in range(0, len(rows), at_once)]

    def _until_stop(self, ids: Sequence[int]) -> Sequence[int]:
        stops = set(self._tokenizer.special.stops())
        return ids[: next((at for at, token in enumerate(ids) if token in stops), len(ids))]


def sample_seed(run_seed: int, step: int) -> int:
    """What keys the samples of a step, in 31 bits."""
    return make_key("samples", run_seed, step)[0] & 0x7FFF_FFFF


def _room(config: TrainConfig, prompts: Sequence[Sequence[int]]) -> int:
    """New tokens of every sample: as many as asked for, or as there is room for."""
    if not prompts:
        return 0
    longest = max(range(len(prompts)), key=lambda number: len(prompts[number]))
    room = config.model.context - len(prompts[longest])
    if room < 1:
        raise ConfigError(
            f"validation.prompts[{longest}] has {len(prompts[longest])} tokens, which leaves no "
            f"room in model.context={config.model.context}. Shorten it, or leave it out."
        )
    if room < config.validation.sample_tokens:
        log.warning(
            "samples have %d new tokens, not validation.sample_tokens=%d: more do not fit into "
            "model.context=%d behind validation.prompts[%d]",
            room, config.validation.sample_tokens, config.model.context, longest,
        )  # fmt: skip
    return min(room, config.validation.sample_tokens)
