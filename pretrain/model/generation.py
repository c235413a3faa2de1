"""Text from the model: prefill with the prompts, then one token of every row at a time.

Tokens are a pure function of (weights, prompt, options, seed, row of the batch): initial states
and sampling draws are keyed by row and position, so neither the other prompts of a batch nor their
lengths change a row.
"""

# B rows  T tokens  V vocabulary

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.model.decoding import Decoding, StateStart
from pretrain.model.reading import Decoder
from pretrain.model.recurrent import RecurrentModel
from pretrain.model.sampling import choose

__all__ = ["Chosen", "Decoder", "Decoding", "StateStart", "collect", "generate", "generate_rows"]


class Chosen(NamedTuple):
    """A new token."""

    token: int
    """Its id."""
    steps: int
    """Iterations of the core that chose it: those of the token before."""


def generate(
    model: RecurrentModel, prompt_ids: Sequence[int], options: Decoding
) -> Iterator[Chosen]:
    """The tokens that follow one prompt, one by one."""
    steps = generate_rows(model, [prompt_ids], options)
    return (chosen for (chosen,) in steps if chosen is not None)


def generate_rows(
    model: RecurrentModel,
    prompts: Sequence[Sequence[int]],
    options: Decoding,
    *,
    numbers: Sequence[int] | None = None,
) -> Iterator[list[Chosen | None]]:
    """The next token of every row, step by step; None for rows that have met a stop id.

    Prompts may differ in length. `numbers` key the draws of the rows, in place of their place in
    the batch: equal ones start alike. Raises ConfigError if a prompt is empty, or leaves the
    context or the vocabulary.
    """
    check_prompts(model, prompts, options.max_new_tokens)
    if options.draft_steps is not None:
        raise ConfigError(
            f"draft_steps={options.draft_steps}: rows then grow unevenly; use speculate_rows."
        )
    longest = max(map(len, prompts))
    capacity = longest + options.max_new_tokens - 1
    decoder = Decoder(model, options, rows=len(prompts), capacity=capacity, numbers=numbers)
    return _steps(decoder, prompts)


def collect(steps: Iterable[Sequence[Chosen | None]]) -> list[list[int]]:
    """The new tokens of every row, a stop id included, from what `generate_rows` yields."""
    rows = zip(*steps, strict=True)
    return [[chosen.token for chosen in row if chosen is not None] for row in rows]


def read_prompts(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits [B, V] behind every prompt; shorter ones are padded at their end."""
    counts = [len(prompt) for prompt in prompts]
    tokens_BT = torch.zeros(len(prompts), max(counts), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = torch.tensor(list(prompt))
    is_even = len(set(counts)) == 1
    return decoder.read(tokens_BT.to(decoder.device), counts=None if is_even else counts)


def _steps(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> Iterator[list[Chosen | None]]:
    options = decoder.options
    depths = (options.num_steps, *options.schedule)
    logits_BV = read_prompts(decoder, prompts)
    for index in range(1, options.max_new_tokens + 1):
        lengths = decoder.cache.lengths
        chosen_B = choose(logits_BV, options, rows=decoder.numbers, positions=lengths)
        chosen: list[int] = chosen_B.tolist()
        step: list[Chosen | None] = [None] * len(prompts)
        for row, token, steps in zip(decoder.rows, chosen, decoder.steps, strict=True):
            step[row] = Chosen(token, steps)
        yield step
        alive = [at for at, token in enumerate(chosen) if token not in options.stop_ids]
        if not alive or index == options.max_new_tokens:
            return
        chosen_B = chosen_B[decoder.keep(alive)]
        depth = depths[index] if index < len(depths) else options.num_steps
        logits_BV = decoder.read(chosen_B[:, None], num_steps=depth)


def check_prompts(
    model: RecurrentModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Raises ConfigError if there is none, one is empty, or leaves the context or vocabulary."""
    lengths = sorted({len(prompt) for prompt in prompts})
    if not lengths or lengths[0] < 1:
        raise ConfigError(f"prompts of {lengths} tokens: give at least one prompt, none empty.")
    config = model.config
    total = lengths[-1] + max_new_tokens
    if total > config.context:
        raise ConfigError(
            f"{lengths[-1]} prompt tokens + max_new_tokens={max_new_tokens} = {total} exceed "
            f"model.context={config.context}."
        )
    lowest, highest = min(map(min, prompts)), max(map(max, prompts))
    if lowest < 0 or highest >= config.vocabulary_size:
        raise ConfigError(
            f"prompt ids from {lowest} to {highest} leave the vocabulary of "
            f"{config.vocabulary_size}; use the model's own tokenizer."
        )
