"""What is said of a step: counted by hand."""

import time

import pytest
import torch

from pretrain.data.order import Order
from pretrain.loop.peak import DATASHEET_FLOPS, peak_flops
from pretrain.loop.phases import PhaseClock
from pretrain.loop.step_metrics import (
    HISTOGRAM_EDGES,
    depth_metrics,
    source_metrics,
    speed_metrics,
    split_metrics,
)
from pretrain.model.cost import TokenFlops
from pretrain.model.depth import Depth
from pretrain.testing import tiny_config, tiny_engine

DEPTHS = [Depth(0, 1), Depth(0, 3), Depth(5, 3), Depth(6, 3)]


def test_depths_are_counted_in_their_bins_and_the_slowest_rank_is_found() -> None:
    found = depth_metrics(DEPTHS, ranks=2)
    bins = dict(zip(HISTOGRAM_EDGES[1:], found["depth/histogram"], strict=True))
    # 1, 3, 8 and 9: a depth on an upper edge belongs to the bin below it
    assert {edge: count for edge, count in bins.items() if count} == {1: 1, 4: 1, 8: 1, 16: 1}
    assert (found["depth/mean"], found["depth/min"], found["depth/max"]) == (5.25, 1, 9)
    # no_grad + 4 with_grad: 4 + 12 on rank 0, 17 + 18 on rank 1
    assert found["depth/balance"] == pytest.approx(35 / ((16 + 35) / 2))
    assert depth_metrics(DEPTHS, ranks=1)["depth/balance"] == 1.0


def test_utilization_counts_what_ran_and_with_hfu_what_ran_again() -> None:
    flops = TokenFlops.of(tiny_config().model)
    speed = {"step_s": 0.5, "ranks": 2, "peak": 1e9}
    plain = speed_metrics(tiny_config(), DEPTHS, **speed)
    per_row = [
        3 * flops.once + flops.iteration * (depth.no_grad + 3 * depth.with_grad)
        for depth in DEPTHS
    ]  # fmt: skip
    tokens_per_s = 16 * 8 / 0.5
    assert plain["speed/tokens_per_s_per_rank"] == tokens_per_s / 2
    assert plain["speed/mfu"] == pytest.approx(tokens_per_s / 2 * sum(per_row) / 4 / 1e9)
    assert plain["speed/hfu"] == plain["speed/mfu"]
    recomputing = tiny_config(engine=tiny_engine(checkpoint_activations=True, kept_iterations=1))
    again = speed_metrics(recomputing, DEPTHS, **speed)
    assert again["speed/mfu"] == plain["speed/mfu"]
    # of 1, 3, 3 and 3 iterations with gradient all but one are run again: 0 + 2 + 2 + 2
    more = tokens_per_s / 2 * flops.iteration * 6 / 4 / 1e9
    assert again["speed/hfu"] == pytest.approx(plain["speed/mfu"] + more)


def test_a_listed_card_has_its_datasheet_peak_and_others_the_planned_one(monkeypatch) -> None:
    config = tiny_config()
    assert peak_flops(config, torch.device("cpu")) == config.cluster.gpu_flops
    bf16 = tiny_config(engine=tiny_engine(precision=type(config.engine.precision).bf16))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(bf16, torch.device("cuda", 0)) == DATASHEET_FLOPS["NVIDIA H200"] == 989.4e12
    assert peak_flops(config, torch.device("cuda", 0)) == config.cluster.gpu_flops
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H201")
    assert peak_flops(bf16, torch.device("cuda", 0)) == config.cluster.gpu_flops


def test_the_split_adds_up_to_the_step() -> None:
    times = {"data_s": 1.0, "forward_s": 2.0, "backward_s": 4.0, "met_s": 7.5, "step_s": 9.0}
    split = split_metrics(**times)
    assert split["time/wait_s"] == 0.5
    assert split["time/update_s"] == 1.5
    assert sum(split.values()) == 9.0
    # clocks of other ranks may have run a little longer than rank 0's
    late = split_metrics(**times | {"met_s": 6.9})
    assert late["time/wait_s"] == 0.0
    assert sum(late.values()) == 9.0


def test_the_clock_gives_each_phase_its_time_whenever_it_is_entered() -> None:
    clock = PhaseClock(torch.device("cpu"))
    clock.enter("old")
    clock.begin()
    started = time.monotonic()
    for phase, pause_s in (("a", 0.02), ("b", 0.05), ("a", 0.02), ("end", 0.0)):
        clock.enter(phase)
        time.sleep(pause_s)
    whole = time.monotonic() - started
    found = clock.seconds()
    assert list(found) == ["a", "b"]
    assert found["a"] >= 0.04
    assert found["b"] >= 0.05
    assert sum(found.values()) <= whole


def test_sources_have_the_share_and_the_epochs_of_the_rows_that_were_dealt() -> None:
    order = Order(
        {"books": [6, 4], "code": [5]}, [3.0, 1.0], seed=1, window_shards=1,
        milestones=[(40, [1.0, 1.0])],
    )  # fmt: skip
    for first_row, rows in ((0, 16), (16, 16), (32, 16), (48, 16)):
        found = source_metrics(order, first_row=first_row, rows=rows)
        dealt = [order.address(row) for row in range(first_row + rows)]
        for number, name in enumerate(("books", "code")):
            mine = [address for address in dealt if address.source == number]
            now = [address for address in dealt[first_row:] if address.source == number]
            assert found[f"data/share_{name}"] == len(now) / rows
            assert found[f"data/epochs_{name}"] == len(mine) / order.sources[number].rows
    assert found["data/share_code"] == 0.5


def test_edges_are_fixed() -> None:
    # what is in metrics.jsonl of old runs is read with them
    assert HISTOGRAM_EDGES == (0, 1, 2, 4, 8, 16, 24, 32, 40, 48, 64, 96, 128, 1 << 20)
