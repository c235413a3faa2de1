"""Where each token of a batch stands, and which tokens it may attend to.

A mask is *specified* (causal, documents isolated, bidirectional prefix), never passed around as
a matrix: attention picks the kernel, and builds a matrix only where a kernel needs one.
"""

# B rows  T tokens  Q queries  P pairs of a head's channels

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pretrain.model.rotary import angles


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees: those not after it and the prefix's, in its own document only."""

    segments_BT: Tensor | None = None
    """Documents isolated: tokens see each other only if their numbers agree."""
    prefixes_B: Tensor | None = None
    """Bidirectional prefix: every token of the row sees the first so many."""

    @property
    def is_causal(self) -> bool:
        """Whether a query sees exactly the keys that are not after it."""
        return self.segments_BT is None and self.prefixes_B is None

    def rows(self, index: Tensor | slice) -> "Mask":
        """The mask of some rows, in a new order."""
        return Mask(
            None if self.segments_BT is None else self.segments_BT[index],
            None if self.prefixes_B is None else self.prefixes_B[index],
        )

    def allowed(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """What the specification means, as booleans [B or 1, 1, Q, T]; the queries come last."""
        key_T = torch.arange(keys, device=device)
        query_Q1 = key_T[keys - queries :, None]
        allowed_BQT = (key_T <= query_Q1)[None]
        if self.prefixes_B is not None:
            allowed_BQT = allowed_BQT | (key_T < self.prefixes_B[:, None, None])
        if self.segments_BT is not None:
            query_segment_BQ1 = self.segments_BT[:, keys - queries :, None]
            allowed_BQT = allowed_BQT & (query_segment_BQ1 == self.segments_BT[:, None, :])
        return allowed_BQT[:, None]


@dataclass(frozen=True)
class Layout:
    """Rotary angles and mask of every token of a batch."""

    cos_BTP: Tensor
    sin_BTP: Tensor
    mask: Mask

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
    def square_mask(self) -> Tensor:
        """The mask as a matrix over the tokens themselves; built once for all layers."""
        tokens = self.cos_BTP.shape[1]
        return self.mask.allowed(tokens, tokens, self.cos_BTP.device)


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
