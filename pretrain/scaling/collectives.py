"""Seconds of collectives over all GPUs of a job.

The cost model of NCCL's own choice (src/graph/tuning.cc): a ring over all GPUs that is as fast as
its slowest edge, every host leaving through all of its network cards at once; an all-reduce may
instead run over a tree between hosts, whose latency grows with the logarithm of their number.
"""

import math
from dataclasses import dataclass

from pretrain.jobs.config import ClusterConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Collectives:
    """The GPUs that take part, and what connects them."""

    nodes: int
    """Hosts."""
    gpus_per_node: int
    """GPUs of a host."""
    bytes_per_s: float
    """What a ring over all of them moves."""
    link_latency_s: float
    """A hop inside a host."""
    network_latency_s: float
    """A hop between hosts."""
    call_s: float
    """Fixed cost of a call."""

    @staticmethod
    def of(cluster: ClusterConfig) -> "Collectives":
        """Over every GPU of a cluster."""
        hardware = cluster.hardware
        rate = hardware.link_bytes_per_s if cluster.gpus_per_node > 1 else math.inf
        if cluster.nodes > 1:
            rate = min(rate, hardware.network_bytes_per_s * cluster.gpus_per_node)
        return Collectives(
            nodes=cluster.nodes,
            gpus_per_node=cluster.gpus_per_node,
            bytes_per_s=rate,
            link_latency_s=hardware.link_latency_s,
            network_latency_s=hardware.network_latency_s,
            call_s=hardware.collective_call_s,
        )

    @property
    def ranks(self) -> int:
        """All GPUs."""
        return self.nodes * self.gpus_per_node

    def gather(self, size: float, *, pieces: int) -> float:
        """Seconds to give every rank `size` bytes of which each has its share, in `pieces` calls.

        A reduce-scatter of `size` bytes takes as long.
        """
        if self.ranks == 1:
            return 0.0
        moved = size * (self.ranks - 1) / self.ranks / self.bytes_per_s
        return moved + pieces * (self.call_s + self._ring_latency_s)

    def all_reduce(self, size: float, *, pieces: int) -> float:
        """Seconds to sum `size` bytes over all ranks, in `pieces` calls."""
        if self.ranks == 1:
            return 0.0
        moved = 2 * size * (self.ranks - 1) / self.ranks / self.bytes_per_s
        hops_s = 2 * min(self._ring_latency_s, self._tree_latency_s)
        return moved + pieces * (self.call_s + hops_s)

    @property
    def _ring_latency_s(self) -> float:
        between = self.nodes - 1
        inside = self.ranks - self.nodes
        return between * self.network_latency_s + inside * self.link_latency_s

    @property
    def _tree_latency_s(self) -> float:
        up = math.ceil(math.log2(self.nodes)) * self.network_latency_s
        return up + (self.gpus_per_node - 1) * self.link_latency_s
