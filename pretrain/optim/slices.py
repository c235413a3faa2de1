"""How tensors lie in the flat partitions that a sharded optimizer receives.

ZeRO gives an optimizer 1-D fp32 partitions that hold pieces of many tensors, and cuts tensors
between ranks. A rule that needs a sum over a whole tensor looks up the pieces here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain_kernels.spans import Piece, Spans


class Fragment(NamedTuple):
    """A piece of one tensor that lies contiguously in a partition."""

    tensor: int
    """Index into the partition's `tensors`."""
    tensor_start: int
    """First element of the flattened tensor that the piece holds."""
    partition_start: int
    """Where the piece begins in the partition."""
    numel: int
    """Elements."""


class TensorInfo(NamedTuple):
    """A whole tensor of the model."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """One flat tensor that the optimizer updates, and what lies where in it."""

    flat: Tensor
    """1-D fp32; elements outside of all fragments are padding and are never touched."""
    tensors: tuple[TensorInfo, ...]
    """The tensors spread over this partition on all ranks, in the same order on every rank."""
    fragments: tuple[Fragment, ...]
    """The pieces on this rank."""

    def piece(self, fragment: Fragment, of: Tensor | None = None) -> Tensor:
        """View of a fragment in the partition, or in a tensor of the same layout (`of`)."""
        source = self.flat if of is None else of
        return source.narrow(0, fragment.partition_start, fragment.numel)

    def pieces(self) -> tuple[Piece, ...]:
        """The fragments, as kernels over the partition are told of them."""
        return tuple(
            Piece(fragment.tensor, fragment.partition_start, fragment.numel)
            for fragment in self.fragments
        )

    def spans(self) -> Spans:
        """A new table of the fragments for kernels, on the partition's device."""
        return Spans(self.pieces(), len(self.tensors), self.flat.device)


class Layout:
    """All partitions of this rank, and the sum over ranks."""

    def __init__(self, partitions: Sequence[Partition], reduce: Callable[[Tensor], None]) -> None:
        """`reduce` sums a tensor over all ranks in place."""
        self.partitions = tuple(partitions)
        self.reduce = reduce
        self._by_flat = {id(partition.flat): partition for partition in partitions}

    def partition_of(self, flat: Tensor) -> Partition:
        """The partition that `flat` is."""
        return self._by_flat[id(flat)]


def unsharded(parameters: Sequence[Tensor]) -> Layout:
    """The layout of an optimizer that holds whole tensors: one partition each, nothing to sum."""
    partitions = []
    for index, parameter in enumerate(parameters):
        info = TensorInfo(str(index), tuple(parameter.shape))
        whole = Fragment(tensor=0, tensor_start=0, partition_start=0, numel=parameter.numel())
        partitions.append(Partition(parameter, (info,), (whole,)))
    return Layout(partitions, lambda _: None)


class SpanTables:
    """Where the tensors of partitions lie, as kernels read it: made once for each partition."""

    def __init__(self) -> None:
        self._known: dict[Tensor, Spans] = {}

    def of(self, partition: Partition) -> Spans:
        """The same object as long as the same pieces lie in the same flat tensor."""
        flat = partition.flat
        known = self._known.get(flat)
        if known is None or known.pieces != partition.pieces():
            known = self._known[flat] = partition.spans()
        return known


def in_line(tensor: Tensor) -> Tensor:
    """The same memory in one dimension, without gradient."""
    return tensor.detach().view(-1)
