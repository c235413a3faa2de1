"""Which stored row is the g-th that a run reads: pure arithmetic over (seed, global row).

The mixture gives the source and the how-manieth of its rows. Inside a source, every epoch has its
own permutation of shards; the rows of `window_shards` shards in that order are permuted together,
so that a rank reads near what it has read before. State is the global row, nothing else.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.data.mixture import Mixture, Phases

Ints = npt.NDArray[np.int64]

# enough for a permutation that passes as random; measured in tests/data/test_order.py
ROUNDS = 6


class RowAddress(NamedTuple):
    """Where one row is stored: source and shard by number, row inside the shard."""

    source: int
    epoch: int
    shard: int
    row: int


class Addresses(NamedTuple):
    """Where rows are stored, each [rows]."""

    source: Ints
    epoch: Ints
    shard: Ints
    row: Ints


def permute(values: Ints, size: int, key: bytes) -> Ints:
    """Image of each value under a permutation of range(size) that `key` chooses.

    A Feistel network over a x b >= size, walked until the image is inside; a and b are near the
    square root, so that few images are outside. Memory and time do not depend on `size`.
    """
    a = max(int(np.ceil(np.sqrt(size))), 1)
    b = -(-size // a)
    rounds = np.frombuffer(hashlib.blake2b(key, digest_size=8 * ROUNDS).digest(), dtype="<u8")
    image = _feistel(values, a, b, rounds)
    while (outside := image >= size).any():
        image[outside] = _feistel(image[outside], a, b, rounds)
    return image


def _feistel(values: Ints, a: int, b: int, rounds: npt.NDArray[np.uint64]) -> Ints:
    left, right = np.divmod(values.astype(np.uint64), np.uint64(b))
    # `left` counts below `modulus`, `right` below `other`; they change places every round
    modulus, other = np.uint64(a), np.uint64(b)
    for key in rounds:
        left, right = right, (left + _mix(right ^ key)) % modulus
        modulus, other = other, modulus
    # after an even number of rounds each is back on its side
    return (left * np.uint64(b) + right).astype(np.int64)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64, a bijection of 64 bits, less its low half."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(32)


class SourceOrder:
    """The order of the rows of one source, epoch after epoch."""

    def __init__(
        self, name: str, shard_rows: Sequence[int], *, seed: int, window_shards: int
    ) -> None:
        self.rows = sum(shard_rows)
        self.name = name
        self._seed = seed
        self._shard_rows = np.array(shard_rows, dtype=np.int64)
        self._window_shards = window_shards
        # bounded: a run walks through epochs, it does not return to them
        self._epoch = lru_cache(maxsize=4)(self._permute_shards)

    def place(self, taken: Ints) -> tuple[Ints, Ints, Ints]:
        """Epoch, shard and row of the rows numbered `taken` in the life of the source."""
        epochs, positions = np.divmod(taken, self.rows)
        shards, rows = np.empty_like(taken), np.empty_like(taken)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            shards[mine], rows[mine] = self._place_in_epoch(epoch, positions[mine])
        return epochs, shards, rows

    def _place_in_epoch(self, epoch: int, positions: Ints) -> tuple[Ints, Ints]:
        order, starts = self._epoch(epoch)
        window_starts = starts[:: self._window_shards]
        windows = np.searchsorted(window_starts, positions, side="right") - 1
        images = np.empty_like(positions)
        for window in np.unique(windows).tolist():
            mine = windows == window
            first = window_starts[window]
            last = starts[min((window + 1) * self._window_shards, len(order))]
            key = self._key(epoch, window)
            images[mine] = first + permute(positions[mine] - first, int(last - first), key)
        at = np.searchsorted(starts, images, side="right") - 1
        return order[at], images - starts[at]

    def _permute_shards(self, epoch: int) -> tuple[Ints, Ints]:
        """Shards in the epoch's order, and the rows before each (one longer: the total)."""
        num = len(self._shard_rows)
        order = permute(np.arange(num), num, self._key(epoch, None))
        return order, np.concatenate([[0], np.cumsum(self._shard_rows[order])])

    def _key(self, epoch: int, window: int | None) -> bytes:
        return repr((self._seed, self.name, epoch, window)).encode()


class Order:
    """The order of all rows of a run.

    `shard_rows` has, by source, the rows of each of its shards; `weights` its share, and
    `milestones` the shares from later global rows on.
    """

    def __init__(
        self,
        shard_rows: dict[str, list[int]],
        weights: Sequence[float],
        *,
        seed: int,
        window_shards: int,
        milestones: Sequence[tuple[int, Sequence[float]]] = (),
    ) -> None:
        phases = [(0, weights), *milestones]
        self.mixture = Phases([(row, Mixture(of_phase)) for row, of_phase in phases])
        self.sources = [
            SourceOrder(name, rows, seed=seed, window_shards=window_shards)
            for name, rows in shard_rows.items()
        ]

    def epochs(self, rows: int, *, without: Sequence[tuple[int, int]] = ()) -> list[float]:
        """How often each source has been read through after so many rows of the run.

        `without`: stretches that do not count, each by its first row and the row behind its last.
        """
        counts = self.mixture.counts(rows)
        for first, behind in without:
            counts = counts - self.mixture.counts(behind) + self.mixture.counts(first)
        return [
            count / source.rows if source.rows else 0.0
            for count, source in zip(counts.tolist(), self.sources, strict=True)
        ]

    def address(self, global_row: int) -> RowAddress:
        """Where the row is stored."""
        return RowAddress(*(int(x[0]) for x in self.addresses(np.array([global_row]))))

    def addresses(self, global_rows: Ints) -> Addresses:
        """Where each of the rows is stored."""
        sources, taken = self.mixture.place(global_rows)
        found = Addresses(sources, *(np.empty_like(taken) for _ in range(3)))
        for source in np.unique(sources).tolist():
            mine = sources == source
            found.epoch[mine], found.shard[mine], found.row[mine] = self.sources[source].place(
                taken[mine]
            )
        return found
