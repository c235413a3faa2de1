"""Mixtures that change at milestones: exact shares in each phase, no row lost or repeated."""

import logging
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.config import MilestoneConfig, SourceConfig
from pretrain.data.loader import stream_batches
from pretrain.data.mixture import Mixture, Phases
from pretrain.data.store import check_epochs, open_manifest, train_order
from pretrain.errors import ConfigError, DataError


@given(
    starts=st.lists(st.integers(1, 30_000), min_size=1, max_size=3, unique=True),
    weights=st.lists(
        st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3), min_size=4, max_size=4
    ),
)
def test_every_phase_has_its_shares_and_sources_go_on_where_they_were(
    starts: list[int], weights: list[list[float]]
) -> None:
    mixtures = [Mixture(of_phase) for of_phase in weights]
    phases = Phases(list(zip([0, *sorted(starts)], mixtures, strict=False)))
    rows = np.arange(40_000)
    sources, taken = phases.place(rows)
    for source in range(3):
        # the n-th row of a source is its n-th, through all phases
        assert (taken[sources == source] == np.arange((sources == source).sum())).all()
    for start, end, of_phase in zip(
        [0, *sorted(starts)], [*sorted(starts), 40_000], weights, strict=False
    ):
        mine = sources[start:end]
        for source, weight in enumerate(of_phase):
            share = weight / sum(of_phase)
            counts = np.cumsum(mine == source)
            ideal = share * np.arange(1, len(mine) + 1)
            # one row of the method, and weights rounded to ten-thousandths (largest remainder)
            assert (abs(counts - ideal) <= 1 + len(mine) / 10_000 + 1e-6).all()
    for row in (0, 1, *starts, 39_999):
        assert phases.counts(row).tolist() == [(sources[:row] == s).sum() for s in range(3)]


def with_milestone(make_shards, tokens: int = 31 * 40, **weights: float):
    return make_shards(
        {"a": (60, 0.5), "b": (60, 0.5)},
        milestones=[MilestoneConfig(from_tokens=tokens, weights=weights)],
    )


def sources_of(config, rows: int) -> list[int]:
    order = train_order(config, open_manifest(config), seed=1)
    return order.addresses(np.arange(rows)).source.tolist()


def test_a_run_reads_the_new_mixture_from_its_milestone_on(make_shards):
    config = with_milestone(make_shards, a=0.0, b=1.0)
    sources = sources_of(config, 80)
    assert sources[:40].count(0) == 20
    assert sources[40:] == [1] * 40


def test_the_stream_before_a_milestone_does_not_know_of_it(make_shards):
    config = with_milestone(make_shards, a=0.0, b=1.0)

    def rows(milestones, first_row=0):
        config.milestones = milestones
        stream = stream_batches(
            config, seed=1, first_row=first_row, rows_per_step=4, rank=0, ranks=1
        )
        taken = [batch.tokens_BS.tolist() for batch in islice(stream, 20 - first_row // 4)]
        stream.close()
        return taken

    milestones = config.milestones
    whole = rows(milestones)
    assert rows([])[:10] == whole[:10]
    assert rows([])[10:] != whole[10:]
    # taken up in the middle, before and behind the milestone
    for first_row in (24, 48):
        assert rows(milestones, first_row) == whole[first_row // 4 :]


def test_milestones_that_make_no_sense_are_refused(make_shards):
    with pytest.raises(ConfigError, match="from_tokens=0"):
        MilestoneConfig(from_tokens=0, weights={"a": 1.0})
    with pytest.raises(ConfigError, match="numbers of 0 or more"):
        MilestoneConfig(from_tokens=5, weights={"a": -1.0})
    with pytest.raises(ConfigError, match="the shards have a, b"):
        sources_of(with_milestone(make_shards, a=1.0), 5)
    late = MilestoneConfig(from_tokens=50, weights={"a": 1.0, "b": 1.0})
    with pytest.raises(ConfigError, match="must ascend"):
        make_shards({"a": (60, 0.5), "b": (60, 0.5)}, milestones=[late, late])


def test_a_source_that_only_a_milestone_reads_must_have_rows(make_shards):
    config = make_shards(
        {"a": (60, 1.0), "b": (0, 0.0)},
        milestones=[MilestoneConfig(from_tokens=31, weights={"a": 1.0, "b": 1.0})],
    )
    with pytest.raises(DataError, match=r"Source b has the weight 1\.0 but no train rows"):
        sources_of(config, 5)


def test_a_run_that_repeats_a_source_too_often_does_not_start(make_shards, caplog):
    config = make_shards({"a": (60, 0.9), "b": (60, 0.1)})
    manifest = open_manifest(config)
    held = manifest.sources[0].totals("train").rows
    order = train_order(config, manifest, seed=1)
    rows = held * 3
    assert order.epochs(rows)[0] == pytest.approx(2.7, abs=0.01)
    config.sources["a"] = SourceConfig(weight=0.9, max_epochs=3.0)
    check_epochs(config, order, rows)
    config.sources["a"] = SourceConfig(weight=0.9, max_epochs=2.0)
    with pytest.raises(ConfigError, match=r"max_epochs=2, but .* 2\.7\d times"):
        check_epochs(config, order, rows)
    config.sources["a"] = SourceConfig(weight=0.9)
    with caplog.at_level(logging.WARNING):
        check_epochs(config, order, 50 * rows)
    assert "source b will be read" in caplog.text
    with pytest.raises(ConfigError, match="must be above 0"):
        SourceConfig(max_epochs=0.0)
