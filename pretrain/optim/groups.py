"""Which parameters decay: the embedding and the matrices do, norm gains and q/k biases do not."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter, by its name (arXiv 2502.05171, optimizer)."""
    if "norm" in name or "bias" in name:
        return False
    assert parameter.ndim == 2, f"{name} {tuple(parameter.shape)} is no norm, bias or matrix"
    return True


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: decayed tensors, then undecayed ones.

    Takes `model.named_parameters()`, which names a tied weight once.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in parameters:
        (decayed if is_decayed(name, parameter) else undecayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
