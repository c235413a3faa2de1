"""s_0 is a pure function of seed, row, position and channel."""

import math
import time

import pytest
import torch

from pretrain.errors import ConfigError
from pretrain.model.initial_state import initial_states, state_keys, states_at


def test_a_row_starts_the_same_in_every_batch():
    whole = initial_states([3, 900, 2**40, 7], seed=1, context=5, width=6)
    for row, index in ((3, 0), (900, 1), (2**40, 2), (7, 3)):
        assert torch.equal(initial_states([row], seed=1, context=5, width=6)[0], whole[index])


def test_a_longer_row_begins_like_a_shorter_one():
    long = initial_states([4], seed=1, context=9, width=6)
    assert torch.equal(initial_states([4], seed=1, context=5, width=6), long[:, :5])
    late = initial_states([4], seed=1, context=4, width=6, first_position=5)
    assert torch.equal(late, long[:, 5:])


def test_seeds_and_rows_differ():
    one = initial_states([0, 1], seed=1, context=64, width=32)
    other = initial_states([0, 1], seed=2, context=64, width=32)
    for a, b in ((one[0], one[1]), (one[0], other[0]), (one[1], other[0])):
        # 2048 pairs: a correlation above 0.1 is 4.5 standard deviations.
        assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 0.1


def test_moments_and_cut_are_those_of_the_paper():
    state = initial_states(range(16), seed=0, context=64, width=96).double()
    sigma = math.sqrt(2 / 5)
    assert state.abs().max() <= 3 * sigma
    assert abs(state.mean().item()) < 3.3 * sigma / math.sqrt(state.numel())
    # The std of a cut normal is 0.98658 sigma; its estimate is off by about (2 N)^-1/2 of it.
    assert abs(state.std().item() / (0.986578 * sigma) - 1) < 3.3 / math.sqrt(2 * state.numel())


def test_bf16_is_float32_rounded():
    exact = initial_states([5], seed=1, context=50, width=8)
    rounded = initial_states([5], seed=1, context=50, width=8, dtype=torch.bfloat16)
    assert torch.equal(rounded, exact.bfloat16())


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    initial_states([0], seed=1, context=4, width=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_row_of_too_many_numbers_is_refused():
    with pytest.raises(ConfigError, match="exceeds the 2\\^31 - 1"):
        initial_states([0], seed=0, context=1 << 20, width=1 << 12)


def test_it_costs_little_beside_a_training_step():
    """A tiny row of 256 x 128 in 1 ms on one idle core; five times that on a busy one."""
    initial_states([0], seed=0, context=256, width=128)
    times = []
    for row in range(20):
        start = time.perf_counter()
        initial_states([row], seed=0, context=256, width=128)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3


def test_tokens_at_positions_of_their_own_get_the_states_of_their_rows():
    rows, positions = [5, 0, 7], [[0, 1], [9, 10], [3, 4]]
    keys = state_keys(rows, seed=3, context=11, width=6, device=torch.device("cpu"))
    found = states_at(torch.tensor(positions), keys, width=6, sigma=0.25)
    whole = initial_states(rows, seed=3, context=11, width=6, sigma=0.25)
    assert torch.equal(found, torch.stack([whole[row, at] for row, at in enumerate(positions)]))
    with pytest.raises(ConfigError, match="exceeds the 2"):
        state_keys(rows, seed=3, context=2**20, width=2**11, device=torch.device("cpu"))
