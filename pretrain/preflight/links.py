"""How fast the ranks of a job talk to each other, and which link is slow."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pretrain.engine.world import World
from pretrain.preflight.findings import Finding, Status
from pretrain.preflight.outliers import slow_ones

KIB, MIB = 2**10, 2**20
REDUCED_BYTES = {
    "cuda": (MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB),
    "cpu": (64 * KIB, MIB, 4 * MIB),
}
LINK_BYTES = {"cuda": 64 * MIB, "cpu": MIB}
# The best of so many, after one that opens connections: what else runs only makes it slower.
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Reduced:
    """One all-reduce among `ranks` ranks."""

    size_bytes: int
    ranks: int
    seconds: float
    """Of the slowest rank."""

    @property
    def algorithm_gb_per_s(self) -> float:
        """10^9 bytes of the tensor per second."""
        return self.size_bytes / self.seconds / 1e9

    @property
    def bus_gb_per_s(self) -> float:
        """What each link carries in a ring, comparable for any number of ranks.

        Every byte leaves a rank 2 (n - 1) / n times: once reduced, once spread.
        """
        return self.algorithm_gb_per_s * 2 * (self.ranks - 1) / self.ranks


@dataclass(frozen=True, slots=True)
class Link:
    """Two ranks that sent to each other at the same time."""

    first: int
    second: int
    gb_per_s: float
    """Each way."""


def check_links(world: World, hosts: Sequence[str]) -> Iterator[Finding]:
    """All-reduce in the job, in each node and across nodes, and every link of the ring of ranks.

    `hosts`: the node of each rank. All ranks call it and get the same findings.
    """
    if world.size == 1:
        yield Finding(Status.ok, "links", "one rank: nothing to talk to")
        return
    for size in REDUCED_BYTES[world.device.type]:
        done = time_all_reduce(world, size, range(world.size), None)[0]
        yield Finding(Status.ok, "all-reduce", f"{world.size} ranks, {_describe(done)}")
    for kind, groups in (("in node", by_node(hosts)), ("across nodes", across_nodes(hosts))):
        yield from _check_groups(world, kind, groups, hosts)
    yield from judge_links(measure_links(world), hosts, _severity(world.device.type))


def by_node(hosts: Sequence[str]) -> list[list[int]]:
    """The ranks of each node, in the order of their first ranks."""
    groups: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        groups.setdefault(host, []).append(rank)
    return list(groups.values())


def across_nodes(hosts: Sequence[str]) -> list[list[int]]:
    """Ranks with the same place on their nodes; nothing where a node has more than another."""
    nodes = by_node(hosts)
    if len({len(ranks) for ranks in nodes}) > 1:
        return []
    return [list(ranks) for ranks in zip(*nodes, strict=True)]


def ring_rounds(ranks: int) -> list[list[tuple[int, int]]]:
    """All neighbours in the ring of ranks, in rounds in which no rank occurs twice."""
    links = [(rank, (rank + 1) % ranks) for rank in range(ranks if ranks > 2 else ranks - 1)]
    last = [links.pop()] if ranks % 2 and ranks > 2 else []
    return [found for found in (links[::2], links[1::2], last) if found]


def time_all_reduce(
    world: World, size_bytes: int, members: Sequence[int], group: Any
) -> list[Reduced]:
    """All-reduces of float32 by each rank's own group, all groups at once; one result per rank."""
    data = torch.ones(size_bytes // 4, device=world.device)
    seconds = _best_time(world, lambda: dist.all_reduce(data, group=group))
    return [
        Reduced(size_bytes, ranks, slowest)
        for ranks, slowest in _slowest_of_each(world, seconds, members)
    ]


def measure_links(world: World) -> list[Link]:
    """Exchanges between all neighbours in the ring, round by round."""
    links = []
    for pairs in ring_rounds(world.size):
        peers = dict(pairs) | {b: a for a, b in pairs}
        peer = peers.get(world.rank)
        times = world.gather_objects(_exchange(world, peer))
        size = LINK_BYTES[world.device.type]
        links += [Link(a, b, size / max(times[a], times[b]) / 1e9) for a, b in pairs]
    return links


def judge_links(links: Sequence[Link], hosts: Sequence[str], severity: Status) -> Iterator[Finding]:
    """The slowest link in a node and between nodes, and those that are slower than their like.

    A rank all of whose links are slow is named itself. `severity`: of a slow link.
    """
    slow: list[Link] = []
    for kind in ("in node", "between nodes"):
        like = [link for link in links if _kind(link, hosts) == kind]
        found = [like[index] for index in slow_ones([link.gb_per_s for link in like])]
        slow += found
        if like and not found:
            slowest = min(like, key=lambda link: link.gb_per_s)
            detail = f"{len(like)} {kind}, slowest {_name(slowest, hosts)}"
            yield Finding(Status.ok, "links", detail)
    for link in slow:
        detail = f"slow {_kind(link, hosts)}: {_name(link, hosts)}"
        yield Finding(
            severity, "link", detail, "exclude one of the nodes; see which by another run"
        )
    for rank, host in enumerate(hosts):
        own = [link for link in links if rank in (link.first, link.second)]
        if len(own) > 1 and all(link in slow for link in own):
            detail = f"every link of rank {rank} on {host} is slow"
            yield Finding(severity, "link", detail, f"exclude {host}")


def _check_groups(
    world: World, kind: str, groups: list[list[int]], hosts: Sequence[str]
) -> Iterator[Finding]:
    """All-reduce in each group at once; groups that are slower than the others."""
    talking = [members for members in groups if len(members) > 1]
    if not talking or len(groups) == 1:
        # nobody to talk to, or the whole job again
        return
    mine: tuple[list[int], Any] = ([], None)
    for members in groups:
        # every rank makes every group
        group = dist.new_group(members)
        if world.rank in members:
            mine = (members, group)
    size = REDUCED_BYTES[world.device.type][-1]
    results = time_all_reduce(world, size, *mine)
    dist.destroy_process_group(mine[1])
    rates = [results[members[0]].bus_gb_per_s for members in talking]
    slow, least = slow_ones(rates), rates.index(min(rates))
    shown = _describe(results[talking[least][0]])
    yield Finding(Status.ok, f"sum {kind}", f"{len(talking)} groups at once, slowest {shown}")
    for index in slow:
        names = ", ".join(f"{rank} on {hosts[rank]}" for rank in talking[index])
        detail = f"slower than the other groups {kind}: {rates[index]:.3g} GB/s, ranks {names}"
        remedy = "exclude the node, and look at its links"
        yield Finding(_severity(world.device.type), "link", detail, remedy)


def _exchange(world: World, peer: int | None) -> float:
    """Seconds of sending to and receiving from a peer; without one, only meet the others."""
    size = LINK_BYTES[world.device.type]
    outgoing = torch.ones(size, dtype=torch.uint8, device=world.device)
    incoming = torch.empty_like(outgoing)

    def swap() -> None:
        if peer is None:
            return
        both = [dist.P2POp(dist.isend, outgoing, peer), dist.P2POp(dist.irecv, incoming, peer)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    return _best_time(world, swap)


def _best_time(world: World, action: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(REPEATS + 1):
        world.barrier()
        begin = time.perf_counter()
        action()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        best = min(best, time.perf_counter() - begin)
    return best


def _slowest_of_each(
    world: World, seconds: float, members: Sequence[int]
) -> list[tuple[int, float]]:
    """For each rank: how many are in its group, and the longest time there."""
    everyone = world.gather_objects((seconds, list(members)))
    return [(len(ranks), max(everyone[rank][0] for rank in ranks)) for _, ranks in everyone]


def _kind(link: Link, hosts: Sequence[str]) -> str:
    return "in node" if hosts[link.first] == hosts[link.second] else "between nodes"


def _name(link: Link, hosts: Sequence[str]) -> str:
    ends = " - ".join(f"rank {rank} on {hosts[rank]}" for rank in (link.first, link.second))
    return f"{ends}: {link.gb_per_s:.3g} GB/s each way"


def _describe(done: Reduced) -> str:
    unit, name = (MIB, "MiB") if done.size_bytes >= MIB else (KIB, "KiB")
    return (
        f"{done.size_bytes / unit:g} {name}: {done.algorithm_gb_per_s:.3g} GB/s, "
        f"bus {done.bus_gb_per_s:.3g} GB/s"
    )


def _severity(device_type: str) -> Status:
    """Ranks on CPUs share cores and memory with whatever else runs: a slow link proves little."""
    return Status.missing if device_type == "cuda" else Status.warn
