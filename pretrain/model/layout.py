"""Where each token of a batch stands, and which tokens it may attend to.

A mask is *specified* (causal, documents isolated, bidirectional prefix), never passed around as
a matrix: attention picks the kernel, and builds a matrix only where a kernel needs one.
"""

# B rows  T tokens  Q queries  P pairs of a head's channels

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from pretrain.model.rotary import angles


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees: those not after it and the prefix's, in its own document only."""

    segments_BT: Tensor | None = None
    """Documents isolated: tokens see each other only if their numbers agree."""
    prefixes_B: Tensor | None = None
    """Bidirectional prefix: every token of the row sees the first so many."""
    positions_BT: Tensor | None = None
    """Queries that follow cached keys: each sees the keys up to its own position."""

    @property
    def is_causal(self) -> bool:
        """Whether a query sees exactly the keys that are not after it."""
        return self.segments_BT is None and self.prefixes_B is None and self.positions_BT is None

    def rows(self, index: Tensor | slice) -> "Mask":
        """The mask of some rows, in a new order."""
        return Mask(
            None if self.segments_BT is None else self.segments_BT[index],
            None if self.prefixes_B is None else self.prefixes_B[index],
            None if self.positions_BT is None else self.positions_BT[index],
        )

    def sees(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """What the specification means: whether a query of a row sees a key.

        All three are indices, whose shapes broadcast against each other.
        """
        if self.positions_BT is not None:
            return key <= self.positions_BT[row, query]
        is_seen = key <= query
        if self.prefixes_B is not None:
            is_seen = is_seen | (key < self.prefixes_B[row])
        if self.segments_BT is not None:
            is_seen = is_seen & (self.segments_BT[row, query] == self.segments_BT[row, key])
        return is_seen

    def allowed(self, keys: int, device: torch.device) -> Tensor:
        """`sees` of all rows, queries and keys, as booleans [B or 1, 1, Q, T].

        The queries are the keys, but for those with positions, which may be fewer.
        """
        by_row = (self.segments_BT, self.prefixes_B, self.positions_BT)
        rows = max(1 if part is None else len(part) for part in by_row)
        queries = keys if self.positions_BT is None else self.positions_BT.shape[1]
        row_B11 = torch.arange(rows, device=device)[:, None, None]
        query_Q1 = torch.arange(queries, device=device)[:, None]
        allowed_BQT = self.sees(row_B11, query_Q1, torch.arange(keys, device=device))
        return allowed_BQT.expand(rows, queries, keys)[:, None]


@dataclass(frozen=True)
class Layout:
    """Rotary angles and mask of every token of a batch."""

    cos_BTP: Tensor
    sin_BTP: Tensor
    mask: Mask
    keys: int | None = None
    """Keys that the tokens attend to, cached ones first; None: the tokens themselves."""

    @staticmethod
    def at(positions_BT: Tensor, mask: Mask, *, head_width: int, base: float) -> "Layout":
        """The layout of tokens at the given positions."""
        cos_BTP, sin_BTP = angles(positions_BT, head_width=head_width, base=base)
        return Layout(cos_BTP, sin_BTP, mask)

    def rows(self, index: Tensor | slice) -> "Layout":
        """The layout of some rows, in a new order."""
        return replace(
            self,
            cos_BTP=self.cos_BTP[index],
            sin_BTP=self.sin_BTP[index],
            mask=self.mask.rows(index),
        )

    @cached_property
    def matrix(self) -> Tensor:
        """The mask as booleans over queries and keys; built once for all layers."""
        return self.mask.allowed(self.keys or self.cos_BTP.shape[1], self.cos_BTP.device)

    @cached_property
    def blocks(self) -> BlockMask:
        """The mask as FlexAttention takes it: which blocks of queries and keys to visit, and which
        of those need `sees`; built once for all layers.
        """
        mask, (rows, tokens, _) = self.mask, self.cos_BTP.shape

        def is_seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return mask.sees(row, query, key)

        return create_block_mask(is_seen, rows, None, tokens, tokens, self.cos_BTP.device)


def split_documents(documents_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Segment numbers and positions, [B, T] each, of rows packed with documents.

    A segment is a run of equal document indices; positions restart at 0 in each. A run of padding
    (-1) is a segment too, so its tokens see only padding, and softmax never meets an empty row.
    """
    is_start_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    is_start_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    start_BT = torch.where(is_start_BT, index_T, 0).cummax(1).values
    return is_start_BT.cumsum(1), index_T - start_BT
