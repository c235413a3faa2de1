"""The gradient's norm by part of the model, from the pieces that a sharded optimizer is given."""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretrain.optim.adamw import AdamW
from pretrain.optim.effective_rate import PARTS, part_of
from pretrain.optim.slices import Layout, Partition


class PartNorms:
    """The gradient as the optimizer gets it, in the steps that ask for it.

    Every ZeRO stage holds it there in fp32, summed over ranks and once over all of them. A stage
    that calls the optimizer several times a step (ZeRO-3, once per piece) adds up. AdamW sums
    squares while it updates; for others, and where an update is held, they are read just before.
    """

    def __init__(self, optimizer: Optimizer, layout: Layout) -> None:
        self._layout = layout
        self._sums = torch.zeros(
            len(PARTS), dtype=torch.float64, device=layout.partitions[0].flat.device
        )
        self._is_wanted = self._has_seen = False
        optimizer.register_step_pre_hook(self._read)
        optimizer.register_step_post_hook(self._take_over)

    def begin(self) -> None:
        """Measure the step that comes; all ranks must."""
        self._is_wanted, self._has_seen = True, False
        self._sums.zero_()

    def take(self) -> dict[str, float]:
        """gradient/norm_PART of the step since `begin`, as the optimizer got it.

        Empty if the step never reached the optimizer, because its gradient was not finite. One sum
        over ranks of five numbers; all ranks get the same.
        """
        self._is_wanted = False
        if not self._has_seen:
            return {}
        self._layout.reduce(self._sums)
        return named_norms(self._sums)

    @torch.no_grad()
    def _read(self, optimizer: Optimizer, *_: Any) -> None:
        if self._is_wanted and not _sums_squares(optimizer):
            for partition in self._with_gradient(optimizer):
                self._add_gradient(partition)

    @torch.no_grad()
    def _take_over(self, optimizer: Optimizer, *_: Any) -> None:
        if self._is_wanted and _sums_squares(optimizer):
            for partition in self._with_gradient(optimizer):
                self._add(
                    optimizer.squares[partition.flat], range(len(partition.tensors)), partition
                )

    def _with_gradient(self, optimizer: Optimizer) -> list[Partition]:
        self._has_seen = True
        flats = [flat for group in optimizer.param_groups for flat in group["params"]]
        return [self._layout.partition_of(flat) for flat in flats if flat.grad is not None]

    def _add_gradient(self, partition: Partition) -> None:
        gradient = partition.flat.grad
        assert gradient is not None
        if partition.fragments:
            pieces = [partition.piece(piece, gradient.view(-1)) for piece in partition.fragments]
            squares = torch.stack(torch._foreach_norm(pieces)).double().square()
            self._add(squares, [piece.tensor for piece in partition.fragments], partition)

    def _add(self, squares: Tensor, tensors: Sequence[int], partition: Partition) -> None:
        """Sums of squares, fp64, and which of the partition's tensors each belongs to."""
        names = [partition.tensors[tensor].name for tensor in tensors]
        self._sums += sum_by_part(names, squares)


def sum_by_part(names: Sequence[str], squares: Tensor) -> Tensor:
    """Of a number for each tensor of these names, the sum over each of PARTS, float64."""
    parts = torch.tensor([PARTS.index(part_of(name)) for name in names], device=squares.device)
    sums = torch.zeros(len(PARTS), dtype=torch.float64, device=squares.device)
    return sums.index_add_(0, parts, squares)


def named_norms(sums: Tensor) -> dict[str, float]:
    """gradient/norm_PART, from each part's sum of squares."""
    norms = sums.sqrt().tolist()
    return {f"gradient/norm_{part}": norm for part, norm in zip(PARTS, norms, strict=True)}


def _sums_squares(optimizer: Optimizer) -> TypeGuard[AdamW]:
    return isinstance(optimizer, AdamW) and not optimizer.is_held
