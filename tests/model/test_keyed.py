"""Keyed random numbers: uniform, independent across keys and neighbouring counters, pure.

Statistics are of fixed draws, so they cannot flake: thresholds are those of a one-in-a-thousand
event per test for truly random numbers.
"""

import math

import pytest
import torch

from pretrain.model.keyed import make_key, truncated_normals, uniforms

N = 1 << 18


def counters(start: int = 0, count: int = N) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.int32)


def kolmogorov_smirnov(draws: torch.Tensor) -> float:
    """sqrt(N) times the largest distance of the empirical CDF from the uniform one."""
    ordered = draws.sort().values
    grid = torch.arange(1, len(draws) + 1, dtype=torch.float64) / len(draws)
    return (ordered - grid).abs().max().item() * math.sqrt(len(draws))


@pytest.mark.parametrize("key", [make_key("a", row) for row in range(4)] + [(0, 0), (1, -1)])
def test_draws_are_uniform(key):
    draws = uniforms(key, counters())
    assert draws.min() > 0.0
    assert draws.max() < 1.0
    # P(sqrt(N) D > 1.95) = 0.001
    assert kolmogorov_smirnov(draws) < 1.95


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 5280, 65536])
def test_neighbouring_counters_are_uncorrelated(lag):
    draws = truncated_normals(make_key("lag"), counters())
    correlation = torch.corrcoef(torch.stack((draws[:-lag], draws[lag:])))[0, 1].item()
    # The correlation of N independent pairs has std N^-1/2; 3.3 of them is one in a thousand.
    assert abs(correlation) < 3.3 / math.sqrt(N - lag)


def test_neighbouring_counters_fill_the_square_evenly():
    draws = uniforms(make_key("square"), counters())
    cells = (draws[:-1] * 32).long() * 32 + (draws[1:] * 32).long()
    counts = cells.bincount(minlength=1024).double()
    expected = (N - 1) / 1024
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    # 1023 degrees of freedom: mean 1023, std sqrt(2046) = 45; 3.3 of them.
    assert abs(chi_square - 1023) < 3.3 * 45.2


def test_rows_are_uncorrelated():
    rows = torch.stack([truncated_normals(make_key("row", row), counters()) for row in range(24)])
    correlations = torch.corrcoef(rows) - torch.eye(24, dtype=torch.float64)
    # The largest of 276 pairs: 4.6 std is one in a thousand.
    assert correlations.abs().max() < 4.6 / math.sqrt(N)


def test_every_bit_of_counter_and_key_flips_half_the_bits():
    draws = uniforms((123, 456), counters(count=4096))
    for bit in range(31):
        flipped = uniforms((123, 456), counters(count=4096) ^ (1 << bit))
        near = ((flipped - draws).abs() < 0.01).double().mean().item()
        # P(|u - v| < 0.01) = 0.0199 for independent u, v; std 0.0022 at 4096; 5 of them.
        assert abs(near - 0.0199) < 0.011
        other_key = uniforms((123 ^ (1 << bit), 456), counters(count=4096))
        near = ((other_key - draws).abs() < 0.01).double().mean().item()
        assert abs(near - 0.0199) < 0.011


def test_normals_are_cut_at_three_sigma_and_not_rescaled():
    draws = truncated_normals(make_key("normal"), counters())
    assert 2.99 < draws.max() <= 3.0
    assert -3.0 <= draws.min() < -2.99
    assert abs(draws.mean().item()) < 3.3 * 0.987 / math.sqrt(N)
    # The variance of a normal cut at 3; its estimate has a relative error of about sqrt(2 / N).
    density = math.exp(-4.5) / math.sqrt(2 * math.pi)
    variance = 1 - 6 * density / math.erf(3 / math.sqrt(2))
    assert abs(draws.var().item() / variance - 1) < 3.3 * math.sqrt(2 / N)


def test_draws_do_not_depend_on_how_counters_are_grouped():
    key = make_key("pure")
    whole = uniforms(key, counters(count=1000))
    assert torch.equal(torch.cat([uniforms(key, counters(i, 1)) for i in range(1000)]), whole)
    order = torch.randperm(1000)
    assert torch.equal(uniforms(key, counters(count=1000)[order]), whole[order])


def lowbias32(x: int) -> int:
    """The mixer in Python's whole numbers, from its published definition."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_bits_are_two_keyed_rounds_of_the_mixer():
    key = make_key("definition")
    words = [word % 2**32 for word in key]
    expected = []
    for counter in [*range(50), 2**31 - 1]:
        bits = lowbias32(lowbias32(counter ^ words[0]) ^ words[1])
        signed = bits - 2**32 if bits >= 2**31 else bits
        expected.append(((signed + 0.5) / 2**31 + 1) / 2)
    found = uniforms(key, torch.tensor([*range(50), 2**31 - 1], dtype=torch.int32))
    assert found.tolist() == expected


def test_known_values_stay():
    """Runs resume on these numbers: a change here changes every run."""
    draws = uniforms(make_key("initial state", 1, 2), counters(count=2))
    assert draws.tolist() == [0.23677978303749114, 0.0929335051914677]
