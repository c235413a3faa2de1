"""How far a unit of momentum moves a weight, by part of the model."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pretrain.optim.slices import Layout, Partition

PARTS = ("embedding", "prelude", "adapter", "core", "coda")
# Temporaries stay below 64 MiB each.
CHUNK_ELEMENTS = 1 << 24


@torch.no_grad()
def effective_rates(optimizer: Optimizer, layout: Layout) -> dict[str, float]:
    """Mean over a part's weights of rate / clip / sqrt(v), v bias-corrected, at the last update.

    Parts without second moments (before the first update, or updated by another rule) are left
    out. All ranks call it and get the same. Source: the effective rate of Adam, arXiv 2502.05171,
    appendix.
    """
    device = layout.partitions[0].flat.device
    sums = torch.zeros(2, len(PARTS), dtype=torch.float64, device=device)
    clips: dict[Tensor, Tensor] = getattr(optimizer, "clips", {})
    for partition in layout.partitions:
        state = optimizer.state.get(partition.flat, {})
        if "exp_avg_sq" in state:
            group = _group_of(optimizer, partition.flat)
            _add(sums, partition, group, state, clips.get(partition.flat))
    layout.reduce(sums)
    totals, counts = sums.tolist()
    return {
        f"optimizer/effective_rate_{part}": total / count
        for part, total, count in zip(PARTS, totals, counts, strict=True)
        if count
    }


def _group_of(optimizer: Optimizer, flat: Tensor) -> dict[str, Any]:
    """Its group, or under ZeRO-3, which empties them between steps, one with the same rate."""
    for group in optimizer.param_groups:
        if any(parameter is flat for parameter in group["params"]):
            return group
    return optimizer.param_groups[0]


def _add(
    sums: Tensor,
    partition: Partition,
    group: dict[str, Any],
    state: dict[str, Tensor],
    clip: Tensor | None,
) -> None:
    correction = (1 - group["beta2"] ** float(state["step"])) ** -0.5
    square = state["exp_avg_sq"].view(-1)
    for fragment in partition.fragments:
        part = PARTS.index(part_of(partition.tensors[fragment.tensor].name))
        rate = group["lr"] if clip is None else group["lr"] / clip[fragment.tensor]
        sums[1, part] += fragment.numel
        for chunk in partition.piece(fragment, square).split(CHUNK_ELEMENTS):
            deviation = chunk.sqrt().mul_(correction).add_(group.get("epsilon", 0.0))
            sums[0, part] += rate * deviation.reciprocal_().sum(dtype=torch.float64)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to; the final norm counts as the coda's.

    The places of digits are embedded too.
    """
    if name.endswith(".adapter"):
        return "adapter"
    head = name.split(".")[0].removeprefix("digit_")
    return head if head in PARTS else "coda"
