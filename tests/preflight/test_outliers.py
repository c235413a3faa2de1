"""A part is slow if it is a tenth and three robust sigmas below its like."""

import random

import pytest

from pretrain.preflight.outliers import slow_ones


@pytest.mark.parametrize(
    ("rates", "slow"),
    [
        ([], []),
        ([5.0], []),
        # two: the slower by more than a tenth
        ([700.0, 640.0], []),
        ([620.0, 700.0], [0]),
        # the tenth alone: the others are equal
        ([700.0, 700.0, 640.0], []),
        ([700.0, 700.0, 620.0], [2]),
        # a tenth, but everything scatters as widely
        ([700.0, 630.0, 560.0], []),
        ([100.0, 80.0, 120.0, 60.0, 140.0], []),
        # three sigmas, but nobody would notice
        ([700.0, 701.0, 699.0, 700.0, 690.0], []),
        # two of eight
        ([700.0, 690.0, 705.0, 695.0, 702.0, 698.0, 500.0, 610.0], [6, 7]),
        # half of them: who is right?
        ([700.0, 700.0, 500.0, 500.0], []),
        # faster is no fault
        ([700.0, 700.0, 900.0], []),
        ([0.0, 700.0, 700.0], [0]),
    ],
)
def test_who_is_slow(rates: list[float], slow: list[int]) -> None:
    assert slow_ones(rates) == slow


def test_equal_parts_with_noise_are_seldom_accused() -> None:
    """Noise of 2 %: a tenth is five sigmas, 3e-7 for one part."""
    draw = random.Random(0)
    for _ in range(200):
        assert slow_ones([draw.gauss(700, 14) for _ in range(64)]) == []


def test_one_slow_part_is_found_in_noise_wherever_it_is() -> None:
    draw = random.Random(1)
    for _ in range(200):
        rates = [draw.gauss(700, 14) for _ in range(16)]
        index = draw.randrange(16)
        rates[index] *= 0.75
        assert slow_ones(rates) == [index]
