"""Proportions are exact at every prefix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.mixture import PERIOD, Mixture, apportion
from pretrain.errors import ConfigError

weights_of_sources = st.lists(
    st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=12
).filter(lambda weights: sum(weights) > 1e-3)

# the shares of arXiv 2502.05171, figure 4
PUBLISHED = [28.71, 25.36, 18.73, 8.14, 7.50, 6.14, 2.09, 1.58, 1.51, 0.12, 0.11]


@settings(max_examples=30, deadline=None)
@given(weights_of_sources)
def test_every_prefix_has_every_share_to_within_one_row(weights):
    mixture = Mixture(weights)
    source, before = mixture.place(np.arange(2 * PERIOD))
    rows = np.arange(1, 2 * PERIOD + 1)
    for i, share in enumerate(mixture.shares):
        count = np.cumsum(source == i)
        # exact in integers: |count - rows * share / period| < 1
        assert (np.abs(count * PERIOD - rows * share) < PERIOD).all()
        np.testing.assert_array_equal(before[source == i], np.arange(count[-1]))


@given(weights_of_sources, st.integers(12, 20_000))
def test_apportioning_is_exact_and_forgets_no_source(weights, total):
    shares = apportion(weights, total)
    assert sum(shares) == total
    for weight, share in zip(weights, shares, strict=True):
        assert (share >= 1) == (weight > 0)


def test_the_published_shares_lose_nothing_to_rounding():
    mixture = Mixture(PUBLISHED)
    exact = np.array(PUBLISHED) / sum(PUBLISHED) * PERIOD
    assert np.abs(np.array(mixture.shares) - exact).max() < 1


def test_the_place_of_a_row_depends_on_nothing_but_the_row():
    mixture = Mixture([3, 1, 2])
    all_at_once = np.stack(mixture.place(np.arange(5 * PERIOD, 5 * PERIOD + 100)))
    one_by_one = [mixture.place(np.array([5 * PERIOD + i])) for i in reversed(range(100))]
    np.testing.assert_array_equal(all_at_once, np.hstack(one_by_one[::-1]))


def test_no_weight_at_all_is_refused():
    with pytest.raises(ConfigError, match="weight above 0"):
        Mixture([0.0, 0.0])
