"""Packing keeps every token, wastes little, and takes no more than n log n."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.pack import Rows, best_fit, join, pack

PAD = 2**32 - 1

lengths_of_documents = st.lists(st.integers(1, 70), min_size=1, max_size=60)


def packed(lengths: list[int], row_tokens: int) -> Rows:
    return pack(
        np.arange(sum(lengths), dtype=np.uint32), np.array(lengths, dtype=np.int64), row_tokens, PAD
    )


def pieces_of(rows: Rows) -> list[list[int]]:
    pieces, next_length = [], iter(rows.lengths.tolist())
    for row, num in zip(rows.tokens, rows.pieces.tolist(), strict=True):
        at = 0
        for _ in range(num):
            length = next(next_length)
            pieces.append(row[at : at + length].tolist())
            at += length
        assert (row[at:] == PAD).all(), "only padding follows the last piece"
    return pieces


@given(lengths_of_documents, st.integers(1, 32))
def test_every_token_is_kept_once_and_every_document_can_be_put_together(lengths, row_tokens):
    # tokens count up over the documents, so sorted pieces end to end are the documents
    pieces = sorted(pieces_of(packed(lengths, row_tokens)))
    assert [token for piece in pieces for token in piece] == list(range(sum(lengths)))
    starts = {piece[0]: len(piece) for piece in pieces}
    at = 0
    for length in lengths:
        full, tail = divmod(length, row_tokens)
        expected = [row_tokens] * full + [tail] * bool(tail)
        assert [starts[at + i * row_tokens] for i in range(len(expected))] == expected
        at += length


@given(lengths_of_documents, st.integers(1, 32))
def test_documents_are_counted_where_they_begin(lengths, row_tokens):
    rows = packed(lengths, row_tokens)
    first_tokens = set((np.cumsum(lengths) - lengths).tolist())
    begun = [sum(token in first_tokens for token in row.tolist()) for row in rows.tokens]
    assert rows.begins.tolist() == begun


@given(st.lists(st.integers(1, 20), max_size=40))
def test_best_fit_takes_the_fullest_bin_that_has_room(lengths):
    bins, num_bins = best_fit(lengths, 20)
    # the definition, in quadratic time
    spaces: list[int] = []
    for piece in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [space for space in spaces if space >= lengths[piece]]
        if fitting:
            spaces[spaces.index(min(fitting))] -= lengths[piece]
        else:
            spaces.append(20 - lengths[piece])
    assert num_bins == len(spaces)
    used = np.bincount(bins, weights=lengths, minlength=num_bins) if lengths else np.array([])
    assert sorted(20 - used) == sorted(spaces)


@given(lengths_of_documents, st.integers(1, 32), st.data())
def test_rows_cut_and_joined_are_the_same_rows(lengths, row_tokens, data):
    rows = packed(lengths, row_tokens)
    cut = data.draw(st.integers(0, len(rows.pieces)))
    again = join([rows.slice(0, cut), rows.slice(cut, len(rows.pieces))])
    for before, after in zip(rows, again, strict=True):
        np.testing.assert_array_equal(before, after)


def test_lengths_are_padded_with_zeros():
    table = packed([2, 3, 8], 8).lengths_table()
    assert table.tolist() == [[2, 3], [8, 0]]
    assert table.dtype == np.uint32


def test_padding_of_ordinary_documents_is_below_one_in_five_hundred():
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, size=8_000).astype(np.int64) + 2
    rows = packed(lengths.tolist(), 1025)
    assert 1 - lengths.sum() / rows.tokens.size < 0.002


@pytest.mark.parametrize("row_tokens", [65, 4097])
def test_time_grows_about_linearly(row_tokens):
    # 16 times the pieces: a quadratic method would take 256 times as long
    def seconds(num: int) -> float:
        """Of this thread, and the least of three: the collector of garbage may come in between."""
        lengths = np.random.default_rng(1).integers(1, row_tokens, size=num).tolist()
        took = []
        for _ in range(3):
            started = time.thread_time()
            best_fit(lengths, row_tokens)
            took.append(time.thread_time() - started)
        return min(took)

    assert seconds(64_000) < 80 * seconds(4_000)
