"""Where tensors lie in a flat partition, for kernels that need a sum over each of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of a partition that one program handles. Spans lie at multiples of it, so that all but
# those at the edge of a tensor are read in whole, aligned 16-byte accesses.
SPAN_ELEMENTS = 1 << 14


class Piece(NamedTuple):
    """A part of one tensor that lies contiguously in a partition."""

    tensor: int
    """Index of the tensor."""
    start: int
    """First element in the partition."""
    numel: int
    """Elements."""


class Spans:
    """The pieces of a partition, and the same cut at multiples of SPAN_ELEMENTS.

    `table_S4` (int32): number of the span, first and last + 1 element in it, tensor; in the order
    of tensors. `bounds_T1` (int32): rows of tensor t are bounds[t] to bounds[t + 1].
    """

    def __init__(self, pieces: Sequence[Piece], num_tensors: int, device: torch.device) -> None:
        for piece in pieces:
            if not 0 <= piece.tensor < num_tensors or piece.start < 0 or piece.numel < 0:
                raise ValueError(f"{piece} does not fit {num_tensors} tensors of a partition.")
        self.pieces, self.num_tensors = tuple(pieces), num_tensors
        ordered = sorted(pieces)
        tables = [_cut(piece) for piece in ordered if piece.numel]
        table_S4 = torch.cat([torch.empty(0, 4, dtype=torch.int64), *tables])
        counts_T = torch.bincount(table_S4[:, 3], minlength=num_tensors)
        bounds_T1 = torch.cat([torch.zeros(1, dtype=torch.int64), counts_T.cumsum(0)])
        self.table_S4 = table_S4.to(torch.int32).to(device)
        self.bounds_T1 = bounds_T1.to(torch.int32).to(device)

    @property
    def end(self) -> int:
        """One past the last element of any piece."""
        return max((piece.start + piece.numel for piece in self.pieces), default=0)


def _cut(piece: Piece) -> Tensor:
    """Rows of the table for one piece, int64."""
    end = piece.start + piece.numel
    number_S = torch.arange(piece.start // SPAN_ELEMENTS, -(-end // SPAN_ELEMENTS))
    low_S = (piece.start - number_S * SPAN_ELEMENTS).clamp(min=0)
    high_S = (end - number_S * SPAN_ELEMENTS).clamp(max=SPAN_ELEMENTS)
    return torch.stack([number_S, low_S, high_S, torch.full_like(number_S, piece.tensor)], 1)


def check_partition(op: str, spans: Spans, **tensors: Tensor) -> None:
    """Raise ValueError unless all are 1-D, contiguous, of one type and length, and hold `spans`."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.ndim != 1 or not tensor.is_contiguous() or tensor.shape != first.shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; all "
                f"must be 1-D and contiguous, as long as {first_name} with {first.numel()}."
            )
        if tensor.dtype != first.dtype or not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} is {tensor.dtype}, {first_name} is {first.dtype}.")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first_name} on {first.device}.")
    if spans.end > first.numel():
        raise ValueError(
            f"{op}: pieces reach element {spans.end}, but {first_name} has {first.numel()}."
        )
    if spans.table_S4.device != first.device:
        raise ValueError(f"{op}: spans are on {spans.table_S4.device}, {first_name} not.")
