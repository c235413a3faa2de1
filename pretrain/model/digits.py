"""Where a digit stands in its number, as a learned vector of each place (Abacus embeddings).

A number is a run of digit tokens. Its first digit has place 0, the next one place 1, and so on, so
places mean the same in all numbers only if these are written from their lowest digit on. In
training all places of a row are shifted by the same random amount, so that every place is learned
from short numbers too, and longer ones than any in the text meet places that are known. Source:
McLeish et al., arXiv 2405.17399; there one shift serves a whole batch and has a range of its own,
here each row has one, as far as its longest number leaves room.
"""

# B rows  T tokens  D width  V vocabulary  P places

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.model.cache import Span
from pretrain.model.config import ModelConfig
from pretrain.model.keyed import make_key, stack_keys, uniforms
from pretrain.model.parameter import unset


class DigitEmbedding(nn.Module):
    """A vector for every place of a number; other tokens, and places beyond P, get none.

    It is scaled as embedded tokens are, so that both begin alike and a step of the optimizer moves
    both by the same share. Which tokens are digits is the tokenizer's to say: `tell_digits`.
    """

    def __init__(self, config: ModelConfig, places: int) -> None:
        super().__init__()
        self.scale = math.sqrt(config.width) if config.embedding_scale else 1.0
        self.weight = unset(places, config.width)
        self._vocabulary_size = config.vocabulary_size
        self._is_digit_V: Tensor | None = None

    def tell_digits(self, ids: Sequence[int]) -> None:
        """Name the tokens that are one digit each. Raises ConfigError for ids outside of V."""
        if not ids or min(ids) < 0 or max(ids) >= self._vocabulary_size:
            raise ConfigError(
                f"digit ids {list(ids)} must be at least one and lie within 0 and "
                f"{self._vocabulary_size - 1}, the tokens that the model has."
            )
        self._is_digit_V = torch.zeros(self._vocabulary_size, dtype=torch.bool)
        self._is_digit_V[list(ids)] = True

    def forward(
        self, tokens_BT: Tensor, shift_B: Tensor | None = None, span: Span | None = None
    ) -> Tensor:
        """The vectors of the tokens' places [B, T, D]; a span continues numbers already begun.

        shift_B in [0, 1): by how much of the room that each row's longest number leaves its places
        are shifted; None: not at all.
        """
        counts_BT = self._count_digits(tokens_BT, span)
        places, place_BT = len(self.weight), counts_BT - 1
        if shift_B is not None:
            room_B = (places - counts_BT.amax(1)).clamp(min=0)
            # a draw that rounds up to 1 would leave the table
            shifts_B = torch.minimum((shift_B * (room_B + 1)).long(), room_B)
            place_BT = place_BT + shifts_B[:, None]
        is_placed_BT = (counts_BT > 0) & (place_BT < places)
        vectors_BTD = F.embedding(place_BT.clamp(0, places - 1), self.weight)
        return vectors_BTD.masked_fill(~is_placed_BT[..., None], 0.0) * self.scale

    def _count_digits(self, tokens_BT: Tensor, span: Span | None) -> Tensor:
        """Digits of the number that each token ends, the token included; 0 if it is no digit."""
        is_digit_BT = self._table(tokens_BT.device)[tokens_BT]
        index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        last_other_BT = torch.where(is_digit_BT, -1, index_T).cummax(1).values
        counts_BT = index_T - last_other_BT
        if span is not None:
            before_B1 = span.digits_before()[:, None]
            counts_BT = torch.where(last_other_BT < 0, counts_BT + before_B1, counts_BT)
            span.keep_digits(counts_BT)
        return counts_BT

    def _table(self, device: torch.device) -> Tensor:
        if self._is_digit_V is None:
            raise ConfigError(
                "model.digit_positions needs to know which tokens are digits; call "
                "model.digit_embedding.tell_digits with the tokenizer's ids of 0 to 9."
            )
        if self._is_digit_V.device != device:
            self._is_digit_V = self._is_digit_V.to(device)
        return self._is_digit_V


def digit_shifts(rows: Sequence[int], *, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The shift of each global row in training, float64 [B] in (0, 1).

    A pure function of (seed, global row), as everything that is drawn for a row.
    """
    keys = [make_key("digit places", seed, row) for row in rows]
    counter = torch.zeros(1, dtype=torch.int32, device=device)
    return uniforms(stack_keys(keys, torch.device(device)), counter)
