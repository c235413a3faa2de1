"""What ranks exchange: nothing alone, more with the stage, as long as the slowest edge takes."""

import dataclasses

import pytest

from pretrain.compose import load
from pretrain.model.cost import count_parameters
from pretrain.scaling.collectives import Collectives
from pretrain.scaling.communication import communication
from pretrain.scaling.what_if import what_if

HUGINN = load("train", ["experiment=huginn-3.5b"])


def huginn(nodes, **engine):
    changes = {f"engine.{name}": value for name, value in engine.items()}
    return what_if(HUGINN, {"cluster.nodes": nodes, **changes})


def rings(nodes, gpus_per_node):
    cluster = dataclasses.replace(HUGINN.cluster, nodes=nodes, gpus_per_node=gpus_per_node)
    return Collectives.of(cluster)


def test_one_rank_exchanges_nothing():
    alone = rings(1, 1)
    assert alone.gather(1e9, pieces=5) == alone.all_reduce(1e9, pieces=5) == 0
    for stage in (1, 2, 3):
        config = what_if(huginn(1, zero_stage=stage), {"cluster.gpus_per_node": 1})
        assert communication(config).of_step(4096) == 0


def test_two_gpus_of_a_host_by_hand():
    """Each sends half of the bytes once to gather, twice to sum; one hop a round."""
    pair = rings(1, 2)
    rate, hop, call = pair.bytes_per_s, pair.link_latency_s, pair.call_s
    assert rate == 2.66e11
    assert pair.gather(8e9, pieces=3) == pytest.approx(4e9 / rate + 3 * (call + hop))
    assert pair.all_reduce(8e9, pieces=3) == pytest.approx(2 * 4e9 / rate + 3 * (call + 2 * hop))


def test_hosts_leave_through_all_their_network_cards_unless_links_are_slower():
    assert rings(2, 4).bytes_per_s == 4 * 4e10
    assert rings(2, 8).bytes_per_s == 2.66e11
    assert rings(2, 1).bytes_per_s == 4e10


def test_a_ring_has_a_hop_for_every_rank_and_a_tree_few():
    """512 hosts of 8: 511 hops between hosts and 3,584 inside, against 9 levels and 7."""
    many = rings(512, 8)
    ring = 511 * many.network_latency_s + 3584 * many.link_latency_s
    assert many.gather(0, pieces=2) == pytest.approx(2 * (many.call_s + ring))
    tree = 9 * many.network_latency_s + 7 * many.link_latency_s
    assert many.all_reduce(0, pieces=3) == pytest.approx(3 * (many.call_s + 2 * tree))


def test_stages_exchange_what_deepspeed_does():
    """At one rate and no latency: bytes over it. 2 (p - 1)/p of a sum, (p - 1)/p of a gather."""
    free = ("link_latency_s", "network_latency_s", "collective_call_s")
    at_once = {f"cluster.hardware.{name}": 0.0 for name in free}
    rate, part = 2.66e11, 31 / 32
    parameters = sum(count_parameters(HUGINN.model).values())
    by_stage = {
        stage: communication(what_if(huginn(4, zero_stage=stage, overlap_comm=False), at_once))
        for stage in (1, 2, 3)
    }
    assert by_stage[1].per_step_s == pytest.approx(parameters * (2 * 4 + 2) * part / rate)
    assert by_stage[1].per_micro_step_s == 0
    assert by_stage[2].per_step_s == pytest.approx(parameters * 2 * part / rate)
    assert by_stage[2].per_micro_step_s == pytest.approx(parameters * 2 * 4 * part / rate)
    assert by_stage[3].per_step_s == 0
    assert by_stage[3].per_micro_step_s == pytest.approx(parameters * (4 + 2 * 2) * part / rate)


def test_overlap_hides_its_share_of_what_fits_under_the_backward_pass():
    plain = communication(huginn(4, zero_stage=2, overlap_comm=False))
    over = communication(huginn(4, zero_stage=2, overlap_comm=True))
    # 0.09 s of reduction under a second of backward pass
    share = huginn(4).cluster.hardware.overlap_share
    assert share == pytest.approx(0.4)
    assert over.per_micro_step_s == pytest.approx((1 - share) * plain.per_micro_step_s)
    slow = {"cluster.hardware.network_bytes_per_s": 1e9}
    plain = communication(what_if(huginn(4, zero_stage=2, overlap_comm=False), slow))
    over = communication(what_if(huginn(4, zero_stage=2, overlap_comm=True), slow))
    assert 0.9 * plain.per_micro_step_s < over.per_micro_step_s < plain.per_micro_step_s


def test_stage_1_overlaps_once_a_step():
    plain = communication(huginn(4, zero_stage=1, overlap_comm=False))
    over = communication(huginn(4, zero_stage=1, overlap_comm=True))
    assert over.per_micro_step_s == 0
    reduced_s = communication(huginn(4, zero_stage=2, overlap_comm=False)).per_micro_step_s
    share = huginn(4).cluster.hardware.overlap_share
    assert over.per_step_s == pytest.approx(plain.per_step_s - share * reduced_s)


def test_larger_buckets_save_latency_only():
    small, large = (
        communication(huginn(512, bucket_elements=elements, overlap_comm=False))
        for elements in (200_000_000, 1_000_000_000)
    )
    many = rings(512, 8)
    saved = many.gather(0, pieces=14) + many.all_reduce(0, pieces=14)
    assert small.per_step_s - large.per_step_s == pytest.approx(saved)
