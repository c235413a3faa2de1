"""The gradient's norm by part of the model, from the pieces that a sharded optimizer is given."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretrain.optim.effective_rate import PARTS, part_of
from pretrain.optim.slices import Layout, Partition


class PartNorms:
    """Reads the gradient just before the optimizer does, in the steps that ask for it.

    There every ZeRO stage holds it in fp32, summed over ranks and once over all of them. A stage
    that calls the optimizer several times a step (ZeRO-3, once per piece) adds up.
    """

    def __init__(self, optimizer: Optimizer, layout: Layout) -> None:
        self._layout = layout
        self._sums = torch.zeros(
            len(PARTS), dtype=torch.float64, device=layout.partitions[0].flat.device
        )
        self._is_wanted = self._has_seen = False
        optimizer.register_step_pre_hook(self._see)

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
    def _see(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._is_wanted:
            return
        self._has_seen = True
        for group in optimizer.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._add(self._layout.partition_of(flat))

    def _add(self, partition: Partition) -> None:
        gradient = partition.flat.grad
        assert gradient is not None
        if not partition.fragments:
            return
        pieces = [partition.piece(piece, gradient.view(-1)) for piece in partition.fragments]
        names = [partition.tensors[piece.tensor].name for piece in partition.fragments]
        squares = torch.stack(torch._foreach_norm(pieces)).double().square()
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
