"""The cache keeps rows, layers and iterations apart, and refuses what it cannot hold."""

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.model.cache import KeyValueCache, Span
from pretrain.model.config import ModelConfig

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    name="small",
    width=6,
    heads=1,
    inner=4,
    prelude_layers=1,
    core_layers=1,
    coda_layers=1,
    vocabulary_size=8,
    context=8,
)


def cache_of(**shape: int) -> KeyValueCache:
    return KeyValueCache(CONFIG, **shape)


def entry(*values: float, tokens: int = 1) -> torch.Tensor:
    """Keys [rows, tokens, heads, width] with one value for each row."""
    return torch.tensor(values)[:, None, None, None].expand(-1, tokens, 2, 3)


def write(span: Span, *values: float, iteration: int = 0) -> list[list[float]]:
    """Keys of every row after writing; values must be their negatives."""
    new = entry(*values, tokens=span.positions_AT.shape[1])
    keys, negatives = span.slot("core", 0, iteration).write(new, -new)
    assert torch.equal(keys, -negatives)
    return keys[:, :, 1, 2].tolist()


def test_slots_are_apart_and_tokens_follow_each_other():
    cache = cache_of(rows=1, capacity=4, iterations=2)
    for step, tokens in enumerate((3, 1)):
        span = cache.span(tokens, CPU)
        for iteration in range(2):
            found = write(span, 10.0 * iteration + step, iteration=iteration)
        cache.advance([tokens])
    assert found == [[10.0, 10.0, 10.0, 11.0]]


def test_rows_stand_at_lengths_of_their_own_and_see_no_further():
    cache = cache_of(rows=2, capacity=5, iterations=1)
    write(cache.span(3, CPU), 1.0, 2.0)
    cache.advance([1, 3])
    span = cache.span(1, CPU)
    assert span.positions_AT.tolist() == [[1], [3]]
    # Row 0 writes over its padding; what follows is hidden by the mask.
    assert write(span, 5.0, 6.0) == [[1.0, 5.0, 1.0, 0.0], [2.0, 2.0, 2.0, 6.0]]
    allowed = span.layout.matrix[:, 0, 0]
    assert allowed.tolist() == [[True, True, False, False], [True, True, True, True]]


def test_rolling_back_a_row_writes_over_it():
    cache = cache_of(rows=2, capacity=4, iterations=1)
    write(cache.span(3, CPU), 1.0, 2.0)
    cache.advance([3, 3])
    cache.lengths[1] -= 2
    assert write(cache.span(1, CPU), 5.0, 6.0) == [[1.0, 1.0, 1.0, 5.0], [2.0, 6.0, 2.0, 0.0]]


def test_some_rows_write_and_read_in_their_own_places():
    cache = cache_of(rows=3, capacity=2, iterations=1)
    write(cache.span(1, CPU), 1.0, 2.0, 3.0)
    cache.advance([1, 1, 1])
    whole = cache.span(1, CPU)
    some = whole.rows(torch.tensor([0, 2]))
    assert write(some, 5.0, 6.0) == [[1.0, 5.0], [3.0, 6.0]]
    assert write(some.rows(torch.tensor([1])), 7.0) == [[3.0, 7.0]]
    assert write(whole, 8.0, 9.0, 9.5) == [[1.0, 8.0], [2.0, 9.0], [3.0, 9.5]]


def test_rows_that_end_make_room_without_moving_the_others():
    cache = cache_of(rows=4, capacity=3, iterations=2)
    for iteration in range(2):
        write(cache.span(2, CPU), 1.0, 2.0, 3.0, 4.0, iteration=iteration)
    cache.advance([2, 1, 2, 1])
    cache.keep([0, 3])
    assert cache.lengths == [2, 1]
    assert write(cache.span(1, CPU), 8.0, 9.0, iteration=1) == [[1.0, 1.0, 8.0], [4.0, 9.0, 0.0]]


def test_a_token_that_stopped_early_shows_its_deepest_entry():
    cache = cache_of(rows=2, capacity=3, iterations=4)
    span = cache.span(1, CPU)
    for iteration in range(2):
        write(span, 10.0 + iteration, 20.0 + iteration, iteration=iteration)
    # Row 0 stops after 2 iterations, row 1 after 3.
    span.rows(torch.tensor([0])).fill(2)
    late = span.rows(torch.tensor([1]))
    write(late, 22.0, iteration=2)
    late.fill(3)
    cache.advance([1, 1])
    for iteration, expected in enumerate([(10, 20), (11, 21), (11, 22), (11, 22)]):
        found = write(cache.span(1, CPU), 0.0, 0.0, iteration=iteration)
        assert [row[0] for row in found] == list(expected)


def test_cache_iterations_keep_the_last_of_each():
    cache = cache_of(rows=1, capacity=2, iterations=5, cache_iterations=2)
    span = cache.span(1, CPU)
    for iteration in range(5):
        write(span, float(iteration), iteration=iteration)
    span.fill(5)
    cache.advance([1])
    seen = [write(cache.span(1, CPU), 9.0, iteration=i)[0][0] for i in (0, 1)]
    assert seen == [4.0, 3.0]


def test_a_full_cache_is_an_error():
    cache = cache_of(rows=2, capacity=3, iterations=1)
    cache.lengths = [0, 2]
    with pytest.raises(ConfigError, match="room for 3 tokens, 4 are needed"):
        cache.span(2, CPU)
