"""Self-speculative decoding: the model drafts with few iterations and verifies with many.

A draft is the beginning of what verifies it. From the same initial state, the first iterations of
the deep pass are those of the draft, so verification goes on from the drafted states: iterations
draft_steps..num_steps of all drafted tokens, side by side in one pass. No iteration of an accepted
token is wasted, and only those of rejected ones run twice. A token is accepted if the deep model
chooses the same one, greedily or by the same draw, so the text is exactly the deep model's.
Source: arXiv 2502.05171, section 6.4; going on from the drafted state is ours.
"""

# B rows  T drafted tokens  V vocabulary

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.model.decoding import Decoding
from pretrain.model.generation import Chosen, check_prompts, read_prompts
from pretrain.model.reading import Decoder, Reading
from pretrain.model.recurrent import RecurrentModel
from pretrain.model.sampling import choose


class Round(NamedTuple):
    """What one draft and its verification gave, by row of the batch."""

    chosen: list[list[Chosen]]
    """New tokens; none for rows that have ended."""
    drafted: int
    """Tokens that were drafted for all rows."""
    accepted: int
    """Of these, as the deep model chose."""


def speculate_rows(
    model: RecurrentModel, prompts: Sequence[Sequence[int]], options: Decoding
) -> Iterator[Round]:
    """The tokens that `generate_rows` would give without draft_steps, several at a time.

    Equal up to rounding: a matrix product over several tokens may round unlike one over each.
    Raises ConfigError as `generate_rows` does, or if draft_steps is None.
    """
    if options.draft_steps is None:
        raise ConfigError("draft_steps=null drafts nothing; use generate_rows.")
    check_prompts(model, prompts, options.max_new_tokens)
    capacity = max(map(len, prompts)) + options.max_new_tokens + options.lookahead
    decoder = Decoder(model, options, rows=len(prompts), capacity=capacity)
    return _rounds(decoder, prompts)


def _rounds(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> Iterator[Round]:
    options = decoder.options
    left = [options.max_new_tokens] * len(prompts)
    # Before anything is drafted, the prompt chooses one token of every row.
    logits_BV = read_prompts(decoder, prompts)
    found_B1 = choose(logits_BV, options, rows=decoder.rows, positions=decoder.cache.lengths)
    found, drafted, accepted = found_B1[:, None].tolist(), 0, 0
    while True:
        for place, row in enumerate(decoder.rows):
            found[place] = _until_stop(found[place][: left[row]], options)
            left[row] -= len(found[place])
        chosen: list[list[Chosen]] = [[] for _ in prompts]
        for row, tokens in zip(decoder.rows, found, strict=True):
            chosen[row] = [Chosen(token, options.num_steps) for token in tokens]
        yield Round(chosen, drafted, accepted)
        alive = [
            place
            for place, row in enumerate(decoder.rows)
            if left[row] and found[place][-1] not in options.stop_ids
        ]
        if not alive:
            return
        order = decoder.keep(alive)
        last_B = torch.tensor([found[place][-1] for place in order], device=decoder.device)
        found, drafted, accepted = _round(decoder, last_B)


def _until_stop(tokens: list[int], options: Decoding) -> list[int]:
    for index, token in enumerate(tokens):
        if token in options.stop_ids:
            return tokens[: index + 1]
    return tokens


@torch.no_grad()
def _round(decoder: Decoder, last_B: Tensor) -> tuple[list[list[int]], int, int]:
    """New tokens by place, how many were drafted, and how many of these were accepted."""
    options, rows = decoder.options, decoder.rows
    before = decoder.cache.lengths
    drafts, drafted_BT = _draft(decoder, last_B)
    decoder.cache.lengths = before
    deep = _side_by_side(decoder, drafts)
    deep.iterate(options.num_steps)
    logits_BTV = deep.logits()
    verified_BT = torch.stack(
        [
            choose(logits_BV, options, rows=rows, positions=[length + at for length in before])
            for at, logits_BV in enumerate(logits_BTV.unbind(1), start=1)
        ],
        dim=1,
    )
    is_same_BT = (drafted_BT == verified_BT).long().cumprod(1)
    agreed: list[int] = is_same_BT.sum(1).tolist()
    # The deep model's own choice follows what it agreed to, if the draft had not ended there.
    counts = [min(count + 1, options.lookahead) for count in agreed]
    decoder.cache.advance(counts)
    found = [row[:count] for row, count in zip(verified_BT.tolist(), counts, strict=True)]
    return found, drafted_BT.numel(), sum(agreed)


def _draft(decoder: Decoder, last_B: Tensor) -> tuple[list[Reading], Tensor]:
    """Readings at draft_steps, the last known token first, and the drafts [B, T]."""
    options = decoder.options
    assert options.draft_steps is not None
    drafts, tokens = [], [last_B]
    for _ in range(options.lookahead):
        reading = decoder.begin(tokens[-1][:, None])
        reading.iterate(options.draft_steps)
        decoder.cache.advance([1] * len(decoder.rows))
        logits_BV = reading.logits()[:, -1]
        lengths = decoder.cache.lengths
        tokens.append(choose(logits_BV, options, rows=decoder.rows, positions=lengths))
        drafts.append(reading)
    return drafts, torch.stack(tokens[1:], dim=1)


def _side_by_side(decoder: Decoder, drafts: Sequence[Reading]) -> Reading:
    """Drafted tokens as one reading, after the iterations that they have had."""
    return replace(
        drafts[0],
        span=decoder.cache.span(len(drafts), decoder.device),
        embedded_ATD=torch.cat([draft.embedded_ATD for draft in drafts], dim=1),
        state_ATD=torch.cat([draft.state_ATD for draft in drafts], dim=1),
    )
