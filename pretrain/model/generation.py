"""Text from the model: prefill with the prompt, then one token at a time from the cache.

Tokens are a pure function of (weights, prompt, options, seed, row of the batch): initial states
and sampling draws are keyed by row and position, so splitting a batch changes no row.
"""

# B rows  T tokens  D width  V vocabulary

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.model.cache import KeyValueCache
from pretrain.model.depth import Depth
from pretrain.model.initial_state import initial_states
from pretrain.model.keyed import make_key, uniforms
from pretrain.model.recurrent import RecurrentModel


class StateStart(Enum):
    """random: s_0 as in training; zeros: s_0 = 0; warm: zeros for the prompt, then the last latent.

    The warm start is the paper's continuous chain of thought (arXiv 2502.05171, section 6.3).
    """

    random = "random"
    zeros = "zeros"
    warm = "warm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How to continue a prompt. Raises ConfigError for values out of range."""

    num_steps: int
    """Iterations of the core for every token."""
    max_new_tokens: int
    """Stop after so many tokens."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Choose among the k likeliest tokens."""
    top_p: float | None = None
    """Choose among the likeliest tokens whose probabilities sum to at least p."""
    seed: int = 0
    """Key of initial states and sampling draws."""
    stop_ids: Collection[int] = ()
    """A row ends with the first of these."""
    start: StateStart = StateStart.random
    """Where each token's recurrence starts."""
    shared_iterations: int | None = None
    """Bounds the cache to so many iterations (see `KeyValueCache`)."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "max_new_tokens", "top_k", "shared_iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1.")
        if not self.temperature >= 0.0:
            raise ConfigError(f"temperature={self.temperature} must be 0 (greedy) or above.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p={self.top_p} must lie in (0, 1], or be null.")


class Decoder:
    """Reads tokens of B rows in turn and gives the logits of the next one."""

    def __init__(
        self,
        model: RecurrentModel,
        *,
        num_steps: int,
        capacity: int,
        start: StateStart = StateStart.random,
        seed: int = 0,
        shared_iterations: int | None = None,
    ) -> None:
        self.model = model
        self.num_steps = num_steps
        self.start = start
        self.seed = seed
        self.cache = KeyValueCache(capacity, shared_iterations)
        self._latent_B1D: Tensor | None = None

    @torch.no_grad()
    def read(self, tokens_BT: Tensor) -> Tensor:
        """Float32 logits [B, V] of the token after the given ones."""
        output = self.model(
            tokens_BT,
            [Depth(self.num_steps, 0)] * tokens_BT.shape[0],
            initial_state=self._initial_state(tokens_BT),
            keep_logits=False,
            cache=self.cache,
        )
        self._latent_B1D = output.latent[:, -1:]
        # Only the last token's logits are wanted: a prompt's would fill memory.
        logits_B1V: Tensor = self.model.embedding(None, output.hidden[:, -1:])
        return logits_B1V[:, 0]

    def _initial_state(self, tokens_BT: Tensor) -> Tensor:
        rows, tokens = tokens_BT.shape
        if self.start is StateStart.random:
            return initial_states(
                range(rows),
                seed=self.seed,
                context=tokens,
                width=self.model.config.width,
                device=tokens_BT.device,
                first_position=self.cache.length,
            )
        if self.start is StateStart.warm and self._latent_B1D is not None:
            return self._latent_B1D.expand(-1, tokens, -1)
        return torch.zeros(rows, tokens, self.model.config.width, device=tokens_BT.device)


def generate(
    model: RecurrentModel,
    prompt_ids: Sequence[int],
    *,
    num_steps: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    start: StateStart = StateStart.random,
) -> Iterator[int]:
    """The tokens that follow one prompt, one by one; options as in `Decoding`."""
    options = Decoding(
        num_steps=num_steps,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_ids=stop_ids,
        start=start,
    )
    steps = generate_rows(model, [prompt_ids], options)
    return (token for (token,) in steps if token is not None)


def generate_rows(
    model: RecurrentModel, prompts: Sequence[Sequence[int]], options: Decoding
) -> Iterator[list[int | None]]:
    """The next token of every row, step by step; None for rows that have met a stop id.

    Raises ConfigError for prompts of unequal length, beyond the context or the vocabulary.
    """
    _check_prompts(model, prompts, options.max_new_tokens)
    decoder = Decoder(
        model,
        num_steps=options.num_steps,
        capacity=len(prompts[0]) + options.max_new_tokens,
        start=options.start,
        seed=options.seed,
        shared_iterations=options.shared_iterations,
    )
    tokens_BT = torch.tensor([list(prompt) for prompt in prompts])
    return _steps(decoder, tokens_BT.to(model.embedding.weight.device), options)


def collect(steps: Iterable[Sequence[int | None]]) -> list[list[int]]:
    """The new tokens of every row, a stop id included, from what `generate_rows` yields."""
    rows = zip(*steps, strict=True)
    return [[token for token in row if token is not None] for row in rows]


def _steps(decoder: Decoder, tokens_BT: Tensor, options: Decoding) -> Iterator[list[int | None]]:
    is_done = [False] * tokens_BT.shape[0]
    for _ in range(options.max_new_tokens):
        logits_BV = decoder.read(tokens_BT)
        chosen_B = _choose(logits_BV, options, position=decoder.cache.length)
        chosen: list[int] = chosen_B.tolist()
        yield [None if done else token for token, done in zip(chosen, is_done, strict=True)]
        is_done = [
            done or token in options.stop_ids for token, done in zip(chosen, is_done, strict=True)
        ]
        if all(is_done):
            return
        tokens_BT = chosen_B[:, None]


def _choose(logits_BV: Tensor, options: Decoding, *, position: int) -> Tensor:
    if options.temperature == 0.0:
        return logits_BV.argmax(-1)
    counter = torch.tensor([position], dtype=torch.int32)
    keys = [make_key("sample", options.seed, row) for row in range(logits_BV.shape[0])]
    return sample(
        logits_BV,
        torch.cat([uniforms(key, counter) for key in keys]).to(logits_BV.device),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )


def sample(
    logits_BV: Tensor,
    draws_B: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """One token of each row [B], by inverting the distribution's CDF at uniform float64 draws."""
    scaled_BV = logits_BV.double() / temperature
    sorted_BV, ids_BV = scaled_BV.sort(stable=True, dim=-1, descending=True)
    probabilities_BV = sorted_BV.softmax(-1)
    if top_k is not None:
        probabilities_BV[:, top_k:] = 0.0
        probabilities_BV /= probabilities_BV.sum(-1, keepdim=True)
    if top_p is not None:
        before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        probabilities_BV[before_BV >= top_p] = 0.0
    cumulative_BV = probabilities_BV.cumsum(-1)
    targets_B1 = draws_B[:, None] * cumulative_BV[:, -1:]
    ranks_B1 = torch.searchsorted(cumulative_BV, targets_B1, right=True)
    return ids_BV.gather(-1, ranks_B1.clamp_(max=ids_BV.shape[-1] - 1))[:, 0]


def _check_prompts(
    model: RecurrentModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    lengths = sorted({len(prompt) for prompt in prompts})
    if len(lengths) != 1 or lengths[0] < 1:
        raise ConfigError(
            f"prompts of {lengths} tokens: give at least one prompt, none empty, all of one "
            "length (one call for each length)."
        )
    config = model.config
    total = lengths[0] + max_new_tokens
    if total > config.context:
        raise ConfigError(
            f"{lengths[0]} prompt tokens + max_new_tokens={max_new_tokens} = {total} exceed "
            f"model.context={config.context}."
        )
    lowest, highest = min(map(min, prompts)), max(map(max, prompts))
    if lowest < 0 or highest >= config.vocabulary_size:
        raise ConfigError(
            f"prompt ids from {lowest} to {highest} leave the vocabulary of "
            f"{config.vocabulary_size}; use the model's own tokenizer."
        )
