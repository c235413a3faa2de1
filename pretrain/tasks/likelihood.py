"""Likelihoods of parts of texts, at many depths in one pass: perplexity, choices, exact answers."""

# B rows  T tokens  N depths  D width

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pretrain.data.tokenizer import Tokenizer
from pretrain.engine.world import World
from pretrain.loop.validation import STATE_SEED
from pretrain.model.depth import Depth
from pretrain.model.fixed import fixed_weights
from pretrain.model.initial_state import initial_states
from pretrain.model.loss import IGNORED
from pretrain.model.recurrent import RecurrentModel
from pretrain.tasks.prompts import Continuation
from pretrain.tasks.sharing import Batch, batches_by_length, share

# Rows are padded to a multiple of this, so that few shapes occur: kernels are tuned, and compiled
# code is made, for each.
_MULTIPLE = 64
_MOST_ROWS = 512

Found = TypeVar("Found")


class Row(NamedTuple):
    """Tokens of one forward pass; the nats of the last `scored` of them are asked for."""

    ids: tuple[int, ...]
    scored: int
    is_cut: bool = False
    """Whether its beginning did not fit into the context."""


class _Padded(NamedTuple):
    """Rows side by side, on the subject's device."""

    tokens_BT: Tensor
    labels_BT: Tensor
    documents_BT: Tensor
    state_BTD: Tensor


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
    return _in_batches(subject, rows, name, _nats)


def hits_of(subject: Subject, rows: Sequence[Row], name: str) -> list[tuple[int, ...]]:
    """How many of the tokens that each row scores are the likeliest, at each depth."""
    return _in_batches(subject, rows, name, _hits)


def greedy_nats_of(subject: Subject, rows: Sequence[Row], name: str) -> list[tuple[float, bool]]:
    """As `nats_of` for a subject of one depth, and whether greedy decoding would write the same."""
    return _in_batches(subject, rows, name, _greedy_nats)


def _in_batches(
    subject: Subject,
    rows: Sequence[Row],
    name: str,
    work: Callable[[Subject, _Padded], Sequence[Found]],
) -> list[Found]:
    lengths = [_padded_length(len(row.ids) - 1, subject.context) for row in rows]
    batches = batches_by_length(lengths, most_tokens=subject.batch_tokens, most_rows=_MOST_ROWS)
    state_1TD = one_state(subject)

    def run(batch: Batch) -> Sequence[Found]:
        return work(subject, _pad(subject, [rows[index] for index in batch], state_1TD))

    with fixed_weights(subject.model):
        return share(subject.world, name, batches, run)


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


def _pad(subject: Subject, rows: Sequence[Row], state_1TD: Tensor) -> _Padded:
    """Padding stands behind the text, where no token of it looks, and is a document of its own."""
    length = _padded_length(max(len(row.ids) for row in rows) - 1, subject.context)
    tokens_BT = torch.full((len(rows), length), subject.tokenizer.special.pad)
    labels_BT = torch.full((len(rows), length), IGNORED)
    documents_BT = torch.full((len(rows), length), -1)
    for at, row in enumerate(rows):
        ids, read = torch.tensor(row.ids), len(row.ids) - 1
        tokens_BT[at, :read] = ids[:-1]
        labels_BT[at, read - row.scored : read] = ids[len(ids) - row.scored :]
        documents_BT[at, :read] = 0
    device = subject.world.device
    return _Padded(
        tokens_BT.to(device),
        labels_BT.to(device),
        documents_BT.to(device),
        state_1TD[:, :length].expand(len(rows), -1, -1),
    )


def _nats(subject: Subject, rows: _Padded) -> list[tuple[float, ...]]:
    nats_NB, _ = subject.model.losses_at(
        rows.tokens_BT,
        subject.depths,
        initial_state=rows.state_BTD,
        labels=rows.labels_BT,
        documents=rows.documents_BT,
    )
    return [tuple(nats_N) for nats_N in nats_NB.T.double().tolist()]


def _hits(subject: Subject, rows: _Padded) -> list[tuple[int, ...]]:
    hits_NB = subject.model.hits_at(
        rows.tokens_BT,
        subject.depths,
        initial_state=rows.state_BTD,
        labels=rows.labels_BT,
        documents=rows.documents_BT,
    )
    return [tuple(map(int, hits_N)) for hits_N in hits_NB.T.tolist()]


@torch.no_grad()
def _greedy_nats(subject: Subject, rows: _Padded) -> list[tuple[float, bool]]:
    (depth,) = subject.depths
    output = subject.model(
        rows.tokens_BT,
        [Depth(depth, 0)] * len(rows.tokens_BT),
        initial_state=rows.state_BTD,
        labels=rows.labels_BT,
        documents=rows.documents_BT,
        evaluate_depths=subject.depths,
        measures_hits=True,
    )
    (nats_B,), (hits_B,) = output.nats_by_depth, output.hits_by_depth
    is_greedy_B = hits_B == output.labels_by_row
    return list(zip(nats_B.double().tolist(), is_greedy_B.tolist(), strict=True))


def _padded_length(length: int, context: int) -> int:
    return min(-(-max(length, 1) // _MULTIPLE) * _MULTIPLE, context)
