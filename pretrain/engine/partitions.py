"""Where DeepSpeed keeps the fp32 master weights of this rank, and whose they are.

Reads the private maps of DeepSpeed 0.19: `_hp_mapping` on parameters under ZeRO-1 and 2 (both of
its classes), `grad_position` under ZeRO-3. `check_complete` proves on every start that the pieces
of all ranks tile every tensor exactly once, so a change in DeepSpeed cannot pass unseen.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import CheckpointError
from pretrain.optim.slices import Fragment, Partition, TensorInfo


def find_partitions(
    zero: Any, names: dict[nn.Parameter, str], *, rank: int
) -> tuple[Partition, ...]:
    """The flat fp32 partitions that the wrapped optimizer updates, in its order."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return _zero3(zero, names, rank)
    groups = _first(zero, "bit16_groups", "bf16_groups")
    flats = _first(zero, "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    return tuple(_zero12(group, flat, names) for group, flat in zip(groups, flats, strict=True))


def check_complete(pieces: Iterable[tuple[str, int, int]], sizes: dict[str, int]) -> None:
    """Assert that (name, start, numel) pieces tile every tensor of `sizes` exactly once.

    Raises CheckpointError naming the first tensor that is not covered.
    """
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for name, start, numel in pieces:
        found.setdefault(name, []).append((start, numel))
    for name, parts in found.items():
        position = 0
        for start, numel in sorted(parts):
            if start != position:
                break
            position += numel
        else:
            if position == sizes.get(name):
                continue
        raise CheckpointError(
            f"The pieces of {name} cover elements 0 to {position} of {sizes.get(name, 0)}; "
            "the ranks do not hold every element exactly once."
        )


def check_same_tensors(
    origin: str, stored: list[TensorInfo], wanted: list[TensorInfo], shown: int = 3
) -> None:
    """Raise CheckpointError, naming the first differences, if `origin` stored other tensors."""
    saved, ours = (
        {tensor.name: tensor.shape for tensor in tensors} for tensors in (stored, wanted)
    )
    differences = [
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, {ours.get(name, 'absent')} here"
        for name in sorted(saved.keys() | ours.keys())
        if saved.get(name) != ours.get(name)
    ]
    if differences:
        more = len(differences) - shown
        raise CheckpointError(
            f"{origin} is of another model: {len(differences)} tensors differ.\n  "
            + "\n  ".join(differences[:shown] + ([f"and {more} more"] if more > 0 else []))
            + "\n  Use the run's own model preset, or another run.dir."
        )


def _first(owner: Any, *names: str) -> Any:
    for name in names:
        if hasattr(owner, name):
            return getattr(owner, name)
    raise AssertionError(f"{type(owner).__name__} has none of {names}: DeepSpeed has changed")


def _zero12(
    group: Sequence[nn.Parameter], flat: Tensor, names: dict[nn.Parameter, str]
) -> Partition:
    infos, fragments = [], []
    for index, parameter in enumerate(group):
        infos.append(TensorInfo(names[parameter], tuple(parameter.shape)))
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            continue
        source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
        assert source.numel == target.numel
        fragments.append(Fragment(index, source.start, target.start, target.numel))
    return Partition(flat, tuple(infos), tuple(fragments))


def _zero3(zero: Any, names: dict[nn.Parameter, str], rank: int) -> tuple[Partition, ...]:
    partitions = []
    for index, (group, flat) in enumerate(
        zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
    ):
        infos, fragments = [], []
        for number, parameter in enumerate(group):
            shape = torch.Size(parameter.ds_shape)
            infos.append(TensorInfo(names[parameter], tuple(shape)))
            sub_group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
            assert sub_group == index
            start = rank * padded
            numel = min(padded, shape.numel() - start)
            if numel > 0:
                fragments.append(Fragment(number, start, offset, numel))
        partitions.append(Partition(flat, tuple(infos), tuple(fragments)))
    return tuple(partitions)


@torch.no_grad()
def refresh_weights(zero: Any) -> None:
    """Make the working weights the rounded master weights, on all ranks, by DeepSpeed's own way."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    for sub_group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(sub_group)
    persistent = zero.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)
