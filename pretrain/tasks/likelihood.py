"""Likelihoods of parts of texts, at many depths in one pass: perplexity, choices, exact answers."""

# B rows  T tokens  N depths  D width

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.data.tokenizer import Tokenizer
from pretrain.engine.world import World
from pretrain.loop.validation import STATE_SEED
from pretrain.model.initial_state import initial_states
from pretrain.model.loss import IGNORED
from pretrain.model.recurrent import RecurrentModel
from pretrain.tasks.prompts import Continuation
from pretrain.tasks.sharing import Batch, batches_by_length, share

# Rows are padded to a multiple of this, so that few shapes occur: kernels are tuned, and compiled
# code is made, for each.
_MULTIPLE = 64
_MOST_ROWS = 512


class Row(NamedTuple):
    """Tokens of one forward pass; the nats of the last `scored` of them are asked for."""

    ids: tuple[int, ...]
    scored: int
    is_cut: bool = False
    """Whether its beginning did not fit into the context."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """The model that is measured, where, and how much of it at once."""

    model: RecurrentModel
    tokenizer: Tokenizer
    world: World
    depths: tuple[int, ...]
    batch_tokens: int
    """Tokens of one pass: what fitted into memory in training fits without gradients."""

    @property
    def context(self) -> int:
        """The longest row the model can read."""
        return self.model.config.context


def continuation_row(tokenizer: Tokenizer, part: Continuation, context: int) -> Row:
    """Both parts as one text; what is scored begins where it and the first part's ids differ."""
    given, whole = tokenizer.encode_batch([part.given, part.given + part.scored])
    shared = 0
    while shared < min(len(given), len(whole)) and given[shared] == whole[shared]:
        shared += 1
    scored = min(len(whole) - shared, context)
    # the last token is only predicted, so that so many and one fit
    kept = whole[-context:]
    return Row((tokenizer.special.begin_text, *kept), scored, is_cut=len(kept) < len(whole))


def text_rows(tokenizer: Tokenizer, text: str, context: int) -> list[Row]:
    """Windows over one text that score each of its tokens once.

    The first starts with the token that begins texts; each later one moves on by half a context,
    so that every token but the first ones is predicted from at least half a context.
    """
    ids = (tokenizer.special.begin_text, *tokenizer.encode(text))
    stride = max(context // 2, 1)
    rows, done = [], 1
    while done < len(ids):
        stop = min(done + (context if done == 1 else stride), len(ids))
        rows.append(Row(ids[max(stop - context - 1, 0) : stop], stop - done))
        done = stop
    return rows


def nats_of(subject: Subject, rows: Sequence[Row], name: str) -> list[tuple[float, ...]]:
    """Nats of what each row scores, at each depth; all rows start from the same states.

    So a row's nats depend on nothing but itself, up to the rounding of products of another shape.
    """

    def measure(tokens_BT: Tensor, **given: Tensor) -> Tensor:
        nats_NB, _ = subject.model.losses_at(tokens_BT, subject.depths, **given)
        return nats_NB

    return _of_rows(subject, rows, name, measure)


def hits_of(subject: Subject, rows: Sequence[Row], name: str) -> list[tuple[int, ...]]:
    """How many of the tokens that each row scores are the likeliest, at each depth."""

    def measure(tokens_BT: Tensor, **given: Tensor) -> Tensor:
        return subject.model.hits_at(tokens_BT, subject.depths, **given)

    return [tuple(map(int, hits)) for hits in _of_rows(subject, rows, name, measure)]


def _of_rows(
    subject: Subject, rows: Sequence[Row], name: str, measure: Callable[..., Tensor]
) -> list[tuple[float, ...]]:
    """What `measure` finds of each row, at each depth, from batches of similar length."""
    lengths = [_padded(len(row.ids) - 1, subject.context) for row in rows]
    batches = batches_by_length(lengths, most_tokens=subject.batch_tokens, most_rows=_MOST_ROWS)
    state_1TD = one_state(subject)

    def work(batch: Batch) -> list[tuple[float, ...]]:
        chosen, length = [rows[index] for index in batch], lengths[batch[0]]
        return _pass(subject, chosen, length, state_1TD, measure)

    return share(subject.world, name, batches, work)


def one_state(subject: Subject) -> Tensor:
    """s_0 [1, T, D] of a whole context, from which every item starts."""
    config = subject.model.config
    return initial_states(
        [0],
        seed=STATE_SEED,
        context=config.context,
        width=config.width,
        sigma=config.state_sigma,
        device=subject.world.device,
    )


def _pass(
    subject: Subject,
    rows: Sequence[Row],
    length: int,
    state_1TD: Tensor,
    measure: Callable[..., Tensor],
) -> list[tuple[float, ...]]:
    """Padding stands behind the text, where no token of it looks, and is a document of its own."""
    tokens_BT = torch.full((len(rows), length), subject.tokenizer.special.pad)
    labels_BT = torch.full((len(rows), length), IGNORED)
    documents_BT = torch.full((len(rows), length), -1)
    for at, row in enumerate(rows):
        ids, read = torch.tensor(row.ids), len(row.ids) - 1
        tokens_BT[at, :read] = ids[:-1]
        labels_BT[at, read - row.scored : read] = ids[len(ids) - row.scored :]
        documents_BT[at, :read] = 0
    device = subject.world.device
    found_NB = measure(
        tokens_BT.to(device),
        initial_state=state_1TD[:, :length].expand(len(rows), -1, -1),
        labels=labels_BT.to(device),
        documents=documents_BT.to(device),
    )
    return [tuple(found_N) for found_N in found_NB.T.double().tolist()]


def _padded(length: int, context: int) -> int:
    return min(-(-length // _MULTIPLE) * _MULTIPLE, context)
