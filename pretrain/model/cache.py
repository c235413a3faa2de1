"""Keys and values of tokens already read, for generation.

Every layer of the core keeps one entry per token and iteration: an iteration attends to what the
same iteration wrote for earlier tokens. A token that stopped after r iterations shows later ones
its deepest entry, iteration r: it is copied forward into the entries it did not reach as it stops,
so that reading stays a plain slice. (Choosing entries while reading would copy every earlier token
in every iteration: 435 us a layer for 32 rows of 191 tokens of huginn-3.5b on an H200, where
filling 20 iterations takes 53 us, once.) With `cache_iterations` = s, iteration t writes
where t mod s did, which bounds memory by s iterations (arXiv 2502.05171, section 6.2).

Rows of a batch stand at lengths of their own; rolling back a row is setting its length.
"""

# B rows  A active rows  T new tokens  S all tokens so far  I iterations  C capacity
# H heads  K head width

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.model.config import ModelConfig
from pretrain.model.layout import Layout, Mask


class _Entries(NamedTuple):
    keys_IBCHK: Tensor
    values_IBCHK: Tensor


class KeyValueCache:
    """Room for `capacity` tokens of each row, read with at most `iterations`."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rows: int,
        capacity: int,
        iterations: int,
        cache_iterations: int | None = None,
    ) -> None:
        self.config = config
        self.capacity = capacity
        self.entries = min(iterations, cache_iterations or iterations)
        self.lengths = [0] * rows
        self._layers: dict[tuple[str, int], _Entries] = {}
        self._digits_BC: Tensor | None = None

    def span(self, tokens: int, device: torch.device) -> "Span":
        """The next `tokens` of every row. Raises ConfigError if there is no room for them."""
        stop = max(self.lengths) + tokens
        if stop > self.capacity:
            raise ConfigError(
                f"the cache has room for {self.capacity} tokens, {stop} are needed; "
                "generate fewer tokens or shorten the prompt."
            )
        lengths_B1 = torch.tensor(self.lengths, device=device)[:, None]
        positions_BT = lengths_B1 + torch.arange(tokens, device=device)
        is_even = len(set(self.lengths)) == 1
        return Span(self, positions_BT, stop, self.lengths[0] if is_even else None)

    def advance(self, counts_B: Sequence[int]) -> None:
        """Count tokens of each row as read, after all layers have written them."""
        self.lengths = [n + count for n, count in zip(self.lengths, counts_B, strict=True)]

    def keep(self, order: Sequence[int]) -> None:
        """Keep these rows in this order; row i of the new ones must be i or come from behind."""
        for new, old in enumerate(order):
            assert old == new or old >= len(order), "moves would overwrite each other"
            if new == old:
                continue
            for entries in self._layers.values():
                entries.keys_IBCHK[:, new] = entries.keys_IBCHK[:, old]
                entries.values_IBCHK[:, new] = entries.values_IBCHK[:, old]
            if self._digits_BC is not None:
                self._digits_BC[new] = self._digits_BC[old]
        self.lengths = [self.lengths[old] for old in order]

    def layer(self, part: str, index: int, like_BTHK: Tensor) -> _Entries:
        """One layer's memory; made when it is first written."""
        if (part, index) not in self._layers:
            entries = self.entries if part == "core" else 1
            shape = (entries, len(self.lengths), self.capacity, *like_BTHK.shape[2:])
            # Zeros, because a key that a mask hides still multiplies its value by 0.
            pair = _Entries(like_BTHK.new_zeros(shape), like_BTHK.new_zeros(shape))
            self._layers[part, index] = pair
        return self._layers[part, index]

    def digits(self, device: torch.device) -> Tensor:
        """How many digits of one number end at each token, [B, C]; made when first asked for."""
        if self._digits_BC is None:
            shape = (len(self.lengths), self.capacity)
            self._digits_BC = torch.zeros(shape, dtype=torch.int64, device=device)
        return self._digits_BC

    def core_layers(self) -> list[_Entries]:
        """The memory of the core's layers."""
        return [entries for (part, _), entries in self._layers.items() if part == "core"]


@dataclass(frozen=True)
class Span:
    """New tokens of some rows, each row's behind those that it has read."""

    cache: KeyValueCache
    positions_AT: Tensor
    keys: int
    """Tokens of the longest row, the new ones included: what attention runs over."""
    first: int | None
    """The position of the first new token, where all rows agree."""
    rows_A: Tensor | None = None
    """Places in the cache; None: all rows in their order."""

    def rows(self, index_A: Tensor) -> "Span":
        """Some of the rows."""
        rows_A = index_A if self.rows_A is None else self.rows_A[index_A]
        return replace(self, positions_AT=self.positions_AT[index_A], rows_A=rows_A)

    def anywhere(self, positions_AT: Tensor) -> "Span":
        """The same rows at positions that are known to the device alone."""
        return replace(self, positions_AT=positions_AT, keys=self.cache.capacity, first=None)

    @cached_property
    def layout(self) -> Layout:
        """Where the tokens stand and what they see; needs a mask only where rows differ."""
        tokens = self.positions_AT.shape[1]
        is_plain = self.first is not None and (tokens == 1 or self.first == 0)
        mask = Mask() if is_plain else Mask(positions_BT=self.positions_AT)
        config = self.cache.config
        layout = Layout.at(
            self.positions_AT, mask, head_width=config.head_width, base=config.rope_base
        )
        return replace(layout, keys=self.keys)

    def digits_before(self) -> Tensor:
        """Digits of the number that the tokens before the new ones end with, [A]."""
        first_A = self.positions_AT[:, 0]
        rows_A1, _ = _places(self)
        digits_A = self.cache.digits(first_A.device)[rows_A1[:, 0], (first_A - 1).clamp(min=0)]
        return torch.where(first_A > 0, digits_A, 0)

    def keep_digits(self, digits_AT: Tensor) -> None:
        """Store what `digits_before` tells of the new tokens to those that follow."""
        self.cache.digits(digits_AT.device)[_places(self)] = digits_AT

    def slot(self, part: str, layer: int, iteration: int = 0) -> "Slot":
        """Where one layer, in one iteration, writes and reads."""
        return Slot(self, part, layer, iteration)

    def fill(self, iterations: int) -> None:
        """Let later tokens see the last of these iterations where they iterate deeper."""
        if iterations >= self.cache.entries:
            return
        for layer in self.cache.core_layers():
            for entries_IBCHK in layer:
                _write(self, entries_IBCHK[iterations:], _read(self, entries_IBCHK[iterations - 1]))


def _read(span: Span, x_BCHK: Tensor) -> Tensor:
    if span.rows_A is None and span.first is not None:
        rows, tokens = span.positions_AT.shape
        return x_BCHK[:rows, span.first : span.first + tokens]
    return x_BCHK[_places(span)]


def _write(span: Span, x_IBCHK: Tensor, new_ATHK: Tensor) -> None:
    if span.rows_A is None and span.first is not None:
        rows, tokens = span.positions_AT.shape
        x_IBCHK[:, :rows, span.first : span.first + tokens] = new_ATHK
    else:
        x_IBCHK[:, *_places(span)] = new_ATHK


def _places(span: Span) -> tuple[Tensor, Tensor]:
    rows_A = span.rows_A
    if rows_A is None:
        rows_A = torch.arange(len(span.positions_AT), device=span.positions_AT.device)
    return rows_A[:, None], span.positions_AT


class Slot(NamedTuple):
    """One layer's place in the cache, in one iteration, for the rows of a span."""

    span: Span
    part: str
    layer: int
    iteration: int

    def write(self, k_ATHK: Tensor, v_ATHK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens; all keys and values so far, [A, S, H, K] each."""
        span = self.span
        layer = span.cache.layer(self.part, self.layer, k_ATHK)
        place = self.iteration % len(layer.keys_IBCHK)
        found = []
        for entries_IBCHK, new_ATHK in zip(layer, (k_ATHK, v_ATHK), strict=True):
            _write(span, entries_IBCHK[place : place + 1], new_ATHK)
            seen_BSHK = entries_IBCHK[place, :, : span.keys]
            if span.rows_A is None:
                found.append(seen_BSHK[: len(k_ATHK)])
            else:
                found.append(seen_BSHK[span.rows_A])
        return found[0], found[1]
