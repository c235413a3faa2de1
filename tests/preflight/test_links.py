"""Links between ranks: how fast, which is slow, on whose node."""

from pathlib import Path

import pytest

from pretrain.preflight.findings import Status
from pretrain.preflight.links import (
    Link,
    Reduced,
    across_nodes,
    by_node,
    judge_links,
    ring_rounds,
)
from pretrain.testing import load_module, run_ranks

RANKS = load_module(Path(__file__).with_name("job_ranks.py"))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8, 9])
def test_rounds_of_the_ring_hold_every_link_once_and_no_rank_twice(ranks: int) -> None:
    rounds = ring_rounds(ranks)
    links = {frozenset(pair) for pairs in rounds for pair in pairs}
    expected = {frozenset((rank, (rank + 1) % ranks)) for rank in range(ranks)}
    assert links == {link for link in expected if len(link) == 2}
    assert sum(len(pairs) for pairs in rounds) == len(links)
    for pairs in rounds:
        members = [rank for pair in pairs for rank in pair]
        assert len(members) == len(set(members))
    assert len(rounds) <= 3


def test_ranks_are_grouped_by_node_and_across_nodes() -> None:
    assert by_node("aabb") == [[0, 1], [2, 3]]
    assert across_nodes("aabb") == [[0, 2], [1, 3]]
    assert by_node("abab") == [[0, 2], [1, 3]]
    # no place on b for the second of a
    assert across_nodes("aab") == []


def test_bus_bandwidth_is_what_a_ring_carries() -> None:
    """Two ranks send the tensor once each way; many send it nearly twice."""
    assert Reduced(10**9, 2, 0.1).algorithm_gb_per_s == pytest.approx(10)
    assert Reduced(10**9, 2, 0.1).bus_gb_per_s == pytest.approx(10)
    assert Reduced(10**9, 8, 0.1).bus_gb_per_s == pytest.approx(17.5)


def ring(hosts: str, slow: dict[tuple[int, int], float]) -> list[Link]:
    pairs = [pair for pairs in ring_rounds(len(hosts)) for pair in pairs]
    usual = {True: 300.0, False: 45.0}
    return [Link(a, b, slow.get((a, b), usual[hosts[a] == hosts[b]])) for a, b in pairs]


def test_links_in_a_node_are_not_compared_with_those_between_nodes() -> None:
    found = [*judge_links(ring("aaaabbbb", {}), "aaaabbbb", Status.missing)]
    assert [finding.status for finding in found] == [Status.ok, Status.ok]
    assert "6 in node" in found[0].detail
    assert "2 between nodes" in found[1].detail


def test_a_slow_link_is_named_by_its_ranks_and_nodes() -> None:
    hosts = "aabbccdd"
    found = [*judge_links(ring(hosts, {(3, 4): 20.0}), hosts, Status.missing)]
    (slow,) = [finding for finding in found if finding.status is Status.missing]
    assert "slow between nodes: rank 3 on b - rank 4 on c: 20 GB/s" in slow.detail


def test_a_rank_with_only_slow_links_is_named_itself() -> None:
    hosts = "abcdefgh"
    found = [*judge_links(ring(hosts, {(3, 4): 20.0, (4, 5): 21.0}), hosts, Status.missing)]
    details = [finding.detail for finding in found if finding.status is Status.missing]
    assert len(details) == 3
    assert details[-1] == "every link of rank 4 on e is slow"


def test_four_ranks_of_two_nodes_measure_their_links() -> None:
    """The exchange of rank 3 takes a tenth of a second more: a warning on CPUs, with its name."""
    everyone = run_ranks(RANKS.links, 4, "aabb", 3)
    assert all(found == everyone[0] for found in everyone)
    subjects = [finding.subject for finding in everyone[0]]
    assert subjects.count("all-reduce") == 3
    assert {"sum in node", "sum across nodes"} <= set(subjects)
    slow = [finding for finding in everyone[0] if finding.subject == "link"]
    assert all(finding.status is Status.warn for finding in slow)
    assert any("rank 3 on b" in finding.detail for finding in slow)


def test_one_rank_has_no_links() -> None:
    ((finding,),) = run_ranks(RANKS.links, 1, "a", -1)
    assert finding.status is Status.ok
    assert "one rank" in finding.detail
