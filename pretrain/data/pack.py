"""Documents to rows of fixed length, with every token kept.

A document longer than a row is cut into full rows; its tail and short documents are best-fit
packed: each, longest first, into the row with the least space that still takes it. What no piece
fills is padding. O(n log n) in the pieces.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.unsignedinteger]


class Rows(NamedTuple):
    """Packed rows, and the pieces of documents in them, row by row, left to right."""

    tokens: Tokens
    """[rows, row_tokens]"""
    pieces: Ints
    """[rows] pieces in each row"""
    begins: Ints
    """[rows] documents that begin in each row"""
    lengths: Ints
    """[sum of pieces] tokens of each piece"""

    def slice(self, start: int, stop: int) -> "Rows":
        """Rows from start up to stop."""
        ends = np.concatenate([[0], np.cumsum(self.pieces)])
        return Rows(
            self.tokens[start:stop],
            self.pieces[start:stop],
            self.begins[start:stop],
            self.lengths[ends[start] : ends[min(stop, len(self.pieces))]],
        )

    def lengths_table(self) -> npt.NDArray[np.uint32]:
        """[rows, most pieces in a row] lengths, zero padded."""
        table = np.zeros((len(self.pieces), int(self.pieces.max())), dtype=np.uint32)
        table[np.arange(table.shape[1]) < self.pieces[:, None]] = self.lengths
        return table


def join(parts: Sequence[Rows]) -> Rows:
    """Rows of all parts, in order."""
    return Rows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def best_fit(lengths: Sequence[int], capacity: int) -> tuple[list[int], int]:
    """Bin of each piece, and how many bins there are; no piece is longer than `capacity`.

    Longest first, ties by position; each goes into the fullest bin that has room, of equally full
    ones into the one that became so last.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    bin_of = [0] * len(lengths)
    num_bins = 0
    # bins by the space they have left, and those spaces in order: at most `capacity` of them
    by_space: dict[int, list[int]] = {}
    spaces: list[int] = []
    for piece in order:
        length = lengths[piece]
        at = bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            bins = by_space[space]
            chosen = bins.pop()
            if not bins:
                del spaces[at]
        else:
            space, chosen = capacity, num_bins
            num_bins += 1
        bin_of[piece] = chosen
        left = space - length
        if left:
            waiting = by_space.setdefault(left, [])
            if not waiting:
                insort(spaces, left)
            waiting.append(chosen)
    return bin_of, num_bins


def pack(tokens: Tokens, document_lengths: Ints, row_tokens: int, pad: int) -> Rows:
    """Pack documents, laid end to end in `tokens`, into rows of `row_tokens`.

    Rows are in the order of their earliest piece, pieces inside a row in the order of the text.
    """
    pieces_of = -(-document_lengths // row_tokens)
    document = np.repeat(np.arange(len(document_lengths)), pieces_of)
    first_piece = np.cumsum(pieces_of) - pieces_of
    part = np.arange(len(document)) - first_piece[document]
    start = (np.cumsum(document_lengths) - document_lengths)[document] + part * row_tokens
    length = np.minimum(document_lengths[document] - part * row_tokens, row_tokens)

    row, num_rows = _rows_of(length, row_tokens)
    order = np.lexsort((np.arange(len(row)), row))
    row, start, length, part = row[order], start[order], length[order], part[order]
    pieces = np.bincount(row, minlength=num_rows)
    # where each piece goes: after those before it in the same row
    before = np.cumsum(length) - length
    row_start = before[np.cumsum(pieces) - pieces]
    target = row * row_tokens + before - row_start[row]

    packed = np.full(num_rows * row_tokens, pad, dtype=tokens.dtype)
    step = np.arange(int(length.sum())) - np.repeat(before, length)
    packed[np.repeat(target, length) + step] = tokens[np.repeat(start, length) + step]
    begins = np.bincount(row[part == 0], minlength=num_rows)
    return Rows(packed.reshape(num_rows, row_tokens), pieces, begins, length)


def _rows_of(length: Ints, row_tokens: int) -> tuple[Ints, int]:
    """Row of each piece: full pieces have one to themselves, the others are best-fit packed."""
    is_short = length < row_tokens
    bins, num_bins = best_fit(length[is_short].tolist(), row_tokens)
    label = np.empty(len(length), dtype=np.int64)
    label[is_short] = bins
    label[~is_short] = num_bins + np.arange(int((~is_short).sum()))
    # number rows by their earliest piece
    _, earliest, inverse = np.unique(label, return_index=True, return_inverse=True)
    rank = np.empty(len(earliest), dtype=np.int64)
    rank[np.argsort(earliest)] = np.arange(len(earliest))
    return rank[inverse], len(earliest)
