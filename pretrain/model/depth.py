"""How often the core runs for each row: the law of depths, and how its draws are dealt to rows.

Depths are a pure function of (seed, first global row of the step, rows in the step). No rank,
world size, clock or global generator enters, so any number of ranks, after any number of resumes,
repeats them. Only raw bits of Philox are used, which numpy promises to keep stable.

Source: arXiv 2502.05171 (the law); stratification and dealing are ours.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import ConfigError
from pretrain.model.config import Curriculum, DepthConfig, Law, Sampling, Scope
from pretrain.model.deal import even_groups

# Work of an iteration with gradient in units of one without: forward, recomputation, 2 x backward.
# An H200 measures 3.1 in bf16 to 4.9 with a float8 prefix. With 3 instead, up to 64 ranks would
# wait for the slowest by less than 0.2 % of a step less (4,096 rows); a run's depths would be
# others. EXPERIMENTS.md, "a model of wall time against measured steps", has 512 ranks too.
WITH_GRAD_COST = 4

# A default lane holds 8 rows: few enough to balance any rank count that divides rows / 8,
# enough that a deep row is averaged with seven others.
ROWS_PER_LANE = 8

# The tail of the lognormal rate is cut where its probability is below the spacing of uniforms.
_MAX_SIGMAS = 8.3
_MAX_DEPTH = 1_000_000
# 2^64 over the golden ratio: steps of this size cover the circle of 64-bit integers evenly.
_GOLDEN = 0x9E3779B97F4A7C15


class Depth(NamedTuple):
    """Iterations of the core for one row: a prefix without gradient, then a suffix with it."""

    no_grad: int
    """Iterations before the gradient starts."""
    with_grad: int
    """Iterations that gradient flows through."""

    @property
    def total(self) -> int:
        """All iterations."""
        return self.no_grad + self.with_grad


@dataclass(frozen=True, slots=True)
class DepthLaw:
    """A distribution over depths 1, 2, ..., tabulated once."""

    cdf: NDArray[np.float64]
    """cdf[i] is the probability of a depth of at most i + 1; the last entry is 1."""

    @staticmethod
    def of(config: DepthConfig) -> "DepthLaw":
        """The law that a configuration asks for; the table is shared between calls."""
        return _tabulate(config.law, config.mean, config.sigma)

    @property
    def pmf(self) -> NDArray[np.float64]:
        """pmf[i] is the probability of depth i + 1."""
        return np.diff(self.cdf, prepend=0.0)

    def quantile(self, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        """The smallest depth whose cumulative probability is above each uniform in [0, 1)."""
        return np.searchsorted(self.cdf, uniforms, side="right").astype(np.int64) + 1

    def expect(self, values: NDArray[np.float64]) -> float:
        """The mean of values[i] over depths i + 1."""
        return float(self.pmf @ values)

    @property
    def depths(self) -> NDArray[np.int64]:
        """1, 2, ... up to the end of the table."""
        return np.arange(1, len(self.cdf) + 1)

    @property
    def mean(self) -> float:
        """The mean depth; for poisson_lognormal one more than the mean rate."""
        return self.expect(self.depths.astype(np.float64))


def split(total: int, backprop: int) -> Depth:
    """A depth of `total` iterations whose last min(backprop, total) carry gradient."""
    return Depth(max(total - backprop, 0), min(total, backprop))


def core_work(totals: NDArray[np.int64], backprop: int) -> NDArray[np.int64]:
    """Work of each depth in forward passes of the core: n + 4 k."""
    work: NDArray[np.int64] = totals + (WITH_GRAD_COST - 1) * np.minimum(totals, backprop)
    return work


def at_row(config: DepthConfig, first_row: int) -> DepthConfig:
    """What a step that begins at a global row draws from: its curriculum's law, itself settled.

    The mean is the ramp's value rounded up, at least 1. Source: arXiv 2511.07384 and its code.
    """
    if config.curriculum is Curriculum.none:
        return config
    progress = min(first_row / config.ramp_rows, 1.0)
    if config.curriculum is Curriculum.one_minus_sqrt:
        progress = 1.0 - math.sqrt(1.0 - progress)
    return replace(
        config,
        mean=max(math.ceil(config.mean * progress), 1),
        curriculum=Curriculum.none,
        ramp_rows=0,
    )


def settled(config: DepthConfig) -> DepthConfig:
    """What steps draw from when the curriculum, if any, is over."""
    return at_row(config, config.ramp_rows)


def means_of_run(config: DepthConfig, rows: int) -> list[tuple[int, float]]:
    """Each mean that a run of so many rows draws from, and its share of the rows."""
    if config.curriculum is Curriculum.none:
        return [(config.mean, 1.0)]
    # the ramp's value is at most m / mean up to here
    shares = np.arange(config.mean + 1) / config.mean
    if config.curriculum is Curriculum.one_minus_sqrt:
        shares = 1.0 - (1.0 - shares) ** 2
    ends = np.minimum(shares * config.ramp_rows / rows, 1.0)
    ends[-1] = 1.0
    return list(zip(range(1, config.mean + 1), np.diff(ends).tolist(), strict=True))


def step_depths(config: DepthConfig, *, seed: int, first_row: int, rows: int) -> list[Depth]:
    """How often the core runs for each row of one step's global batch, in row order.

    Depends on the arguments alone. Marginally each row's depth follows the law; with stratified
    sampling the rows (or blocks, or steps) together cover its quantiles evenly.

    Raises ConfigError where rows cannot be cut into the blocks or lanes asked for.
    """
    totals = step_totals(config, seed=seed, first_row=first_row, rows=rows)
    no_grad = np.maximum(totals - config.backprop, 0).tolist()
    with_grad = np.minimum(totals, config.backprop).tolist()
    return [Depth(n, k) for n, k in zip(no_grad, with_grad, strict=True)]


def step_totals(config: DepthConfig, *, seed: int, first_row: int, rows: int) -> NDArray[np.int64]:
    """`step_depths` as an array of total iterations, int64 [rows]."""
    if rows < 1 or first_row < 0:
        raise ConfigError(f"A step of {rows} rows from global row {first_row} has no depths.")
    config = at_row(config, first_row)
    law = DepthLaw.of(config)
    key = f"{seed}:{first_row}:{rows}"
    if config.scope is Scope.step:
        uniform = _step_uniform(config.sampling, key, seed=seed, index=first_row // rows)
        return law.quantile(np.full(rows, uniform))
    shared = config.block_rows if config.scope is Scope.block else 1
    if rows % shared:
        raise ConfigError(
            f"depth.block_rows={shared} does not divide the {rows} rows of a step; "
            f"nearest: {_divisor_up_to(rows, shared)}."
        )
    draws = rows // shared
    if config.sampling is Sampling.independent:
        totals = law.quantile(_uniforms("draw", key, draws))
    else:
        strata = (np.arange(draws) + _uniforms("stratum", key, 1)) / draws
        totals = _deal(law.quantile(strata), config, key, lanes=num_lanes(config, rows))
    return np.repeat(totals, shared)


def num_lanes(config: DepthConfig, rows: int) -> int:
    """Equal blocks of a step's rows that get equal work.

    depth.lanes, or by default rows / 8; where 8 (or a block of shared depth) does not divide
    evenly, the largest possible number of lanes that is not above rows / 8, at least 1.
    """
    shared = config.block_rows if config.scope is Scope.block else 1
    draws = rows // shared
    if config.lanes is None:
        return _divisor_up_to(draws, rows // ROWS_PER_LANE)
    if draws % config.lanes:
        raise ConfigError(
            f"depth.lanes={config.lanes} does not divide the {draws} draws of a step "
            f"({rows} rows / {shared} that share one); "
            f"nearest: {_divisor_up_to(draws, config.lanes)}."
        )
    return config.lanes


def _deal(
    ascending: NDArray[np.int64], config: DepthConfig, key: str, *, lanes: int
) -> NDArray[np.int64]:
    """Give lanes equal work, then pairs of lanes, pairs of pairs and so on up to the whole step.

    Members of every group are permuted, so each place is exchangeable with every other.
    """
    loads = core_work(ascending, config.backprop)
    members = np.arange(len(ascending))[:, None]
    for groups in _group_counts(lanes):
        hands = even_groups(loads, groups)
        shuffle = _permutations(f"inside {groups}", key, *hands.shape)
        hands = np.take_along_axis(hands, shuffle, axis=1)
        loads = loads[hands].sum(axis=1)
        members = members[hands].reshape(groups, -1)
    dealt: NDArray[np.int64] = ascending[members[0]]
    return dealt


def _group_counts(lanes: int) -> list[int]:
    """lanes, then what is left after dividing by its prime factors one by one, down to 1."""
    counts = [lanes]
    while counts[-1] > 1:
        smallest = next(d for d in range(2, counts[-1] + 1) if counts[-1] % d == 0)
        counts.append(counts[-1] // smallest)
    return counts


def _step_uniform(sampling: Sampling, key: str, *, seed: int, index: int) -> float:
    """The one draw of a whole step: plain, or the next of a golden-ratio sequence over steps."""
    if sampling is Sampling.independent:
        return float(_uniforms("draw", key, 1)[0])
    offset = int(_raw("offset", str(seed), 1)[0])
    return (((offset + index * _GOLDEN) % 2**64) >> 11) * 2.0**-53


def _raw(purpose: str, key: str, count: int) -> NDArray[np.uint64]:
    """Random 64-bit words that depend on purpose and key alone."""
    digest = hashlib.blake2b(f"depth:{purpose}:{key}".encode(), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return np.asarray(words, dtype=np.uint64)


def _uniforms(purpose: str, key: str, count: int) -> NDArray[np.float64]:
    """Uniforms in [0, 1) with 53 bits."""
    return (_raw(purpose, key, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _permutations(purpose: str, key: str, count: int, size: int) -> NDArray[np.intp]:
    """`count` permutations of `size` places, one a row."""
    return np.argsort(_raw(purpose, key, count * size).reshape(count, size), axis=1, kind="stable")


def _divisor_up_to(number: int, limit: int) -> int:
    """The largest divisor of number that is at most limit, at least 1."""
    return max((d for d in range(1, min(number, limit) + 1) if number % d == 0), default=1)


# a curriculum passes through every mean up to its last
@lru_cache(maxsize=128)
def _tabulate(law: Law, mean: int, sigma: float) -> DepthLaw:
    if law is Law.fixed:
        cdf = np.zeros(mean)
        cdf[-1] = 1.0
    else:
        cdf = _poisson_lognormal_cdf(mean, sigma)
    cdf.flags.writeable = False
    return DepthLaw(cdf)


def _poisson_lognormal_cdf(mean: int, sigma: float) -> NDArray[np.float64]:
    """CDF of 1 + Poisson(rate), ln rate ~ Normal(ln mean - sigma^2 / 2, sigma).

    The trapezoid rule over the normal variable, whose error for a Gaussian weight falls faster
    than any power of the spacing; each node adds a Poisson mass within 12 of its deviations.
    """
    rates_log = math.log(mean) - sigma**2 / 2 + sigma * np.array([-_MAX_SIGMAS, _MAX_SIGMAS])
    largest_rate = math.exp(rates_log[1])
    size = int(largest_rate + 12 * math.sqrt(largest_rate)) + 40
    if size > _MAX_DEPTH:
        raise ConfigError(
            f"depth.mean={mean} with depth.sigma={sigma} reaches depths of {size}, "
            f"above {_MAX_DEPTH}; choose a smaller depth.sigma (0.5 is published) or depth.mean."
        )
    # Half the width that a Poisson mass has as a function of the node, at the largest rate.
    spacing = min(1 / 32, 0.5 / (sigma * math.sqrt(largest_rate)))
    nodes = np.arange(-_MAX_SIGMAS, _MAX_SIGMAS + spacing, spacing)
    weights = np.exp(-(nodes**2) / 2)
    weights /= weights.sum()
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, size)))])
    counts = np.arange(size, dtype=np.float64)
    mass = np.zeros(size)
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        log_rate = math.log(mean) - sigma**2 / 2 + sigma * node
        rate = math.exp(log_rate)
        reach = 12 * math.sqrt(rate) + 30
        near = slice(max(int(rate - reach), 0), min(int(rate + reach) + 1, size))
        mass[near] += weight * np.exp(counts[near] * log_rate - rate - log_factorial[near])
    cdf = np.cumsum(mass)
    cdf /= cdf[-1]
    # No uniform below 1 reaches past the first entry that is above the largest of them.
    cdf = cdf[: int(np.searchsorted(cdf, 1.0 - 2.0**-53)) + 1]
    cdf[-1] = 1.0
    return cdf
