"""The cache refuses what it cannot hold."""

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.model.cache import KeyValueCache


def entry(tokens: int, value: float) -> torch.Tensor:
    return torch.full((1, tokens, 2, 3), value)


def test_slots_are_apart_and_tokens_follow_each_other():
    cache = KeyValueCache(capacity=4)
    for step, tokens in enumerate((3, 1)):
        for iteration in range(2):
            value = 10.0 * iteration + step
            keys, values = cache.slot("core", 0, iteration).write(
                entry(tokens, value), entry(tokens, -value)
            )
        cache.advance(tokens)
    assert keys[0, :, 0, 0].tolist() == [10.0, 10.0, 10.0, 11.0]
    assert values[0, :, 0, 0].tolist() == [-10.0, -10.0, -10.0, -11.0]


def test_shared_iterations_keep_the_last_of_each():
    cache = KeyValueCache(capacity=2, shared_iterations=2)
    for iteration in range(5):
        cache.slot("core", 0, iteration).write(entry(1, iteration), entry(1, iteration))
    cache.advance(1)
    seen = [cache.slot("core", 0, i).write(entry(1, 9.0), entry(1, 9.0))[0] for i in (0, 1)]
    assert [keys[0, 0, 0, 0].item() for keys in seen] == [4.0, 3.0]


def test_a_full_cache_is_an_error():
    cache = KeyValueCache(capacity=2)
    with pytest.raises(ConfigError, match="room for 2 tokens, 3 are needed"):
        cache.slot("coda", 0).write(entry(3, 0.0), entry(3, 0.0))


def test_an_iteration_that_missed_a_token_is_an_error():
    cache = KeyValueCache(capacity=4)
    cache.slot("core", 0, 0).write(entry(2, 0.0), entry(2, 0.0))
    cache.advance(2)
    with pytest.raises(ConfigError, match="holds 0 of 2 tokens"):
        cache.slot("core", 0, 1).write(entry(1, 0.0), entry(1, 0.0))
