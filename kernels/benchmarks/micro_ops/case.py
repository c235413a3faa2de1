"""What a micro-benchmark is: inputs, who computes what from them, and how much that moves."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Run = Callable[[], Outputs]
Prepare = Callable[[Inputs], Run]
"""Does what is not timed, and returns what is."""
Function = Callable[[Inputs], Outputs]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the model that the shapes come from."""

    tokens: int
    width: int
    inner: int
    heads: int
    head_width: int
    vocabulary: int
    elements: int
    """Of an optimizer's partition."""


HUGINN = Sizes(
    tokens=4096, width=5280, inner=17_920, heads=55, head_width=96, vocabulary=65_536,
    elements=1 << 28,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One op at one shape, done by several providers from the same inputs."""

    op: str
    shape: str
    dtype: torch.dtype
    size: int
    """What `make` takes: tokens, or elements of a partition."""
    amount: float
    """Least bytes (limit copy) or floating-point operations (others) of one call."""
    limit: str
    """What the op cannot be faster than: copy, gemm or fp8."""
    make: Callable[[int, torch.device], Inputs]
    providers: dict[str, Prepare]
    exact: Prepare | None = None
    """Truth from float64 inputs; none: the provider eager."""
    bound: float | None = None
    """Largest relative error; none: that of eager, times a factor."""
    compared: Callable[[Outputs], Outputs] = lambda outputs: outputs
    """What of the outputs is checked."""
    check_size: int | None = None
    """Size of the check; none: `size`."""


def forward_of(function: Function) -> Prepare:
    """Time the function alone."""
    return lambda inputs: lambda: function(inputs)


def backward_of(function: Function, wanted: tuple[str, ...], upstream: tuple[str, ...]) -> Prepare:
    """Time its backward pass: the gradients of the inputs `wanted`, from those of its outputs."""

    def prepare(inputs: Inputs) -> Run:
        leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
        outputs = function(inputs | leaves)
        given = tuple(inputs[name] for name in upstream)
        return lambda: torch.autograd.grad(
            outputs, tuple(leaves.values()), given, retain_graph=True
        )

    return prepare


def compiled(function: Function) -> Function:
    """By torch.compile, for these shapes."""
    result: Function = torch.compile(function, dynamic=False)
    return result


def with_liger(providers: dict[str, Prepare], make: Callable[[], Prepare]) -> dict[str, Prepare]:
    """These providers and, if it is installed, Liger's."""
    try:
        return providers | {"liger": make()}
    except ImportError:
        return providers


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, device=device, dtype=dtype)


def clone(inputs: Inputs) -> Inputs:
    """The same in memory of its own, which ops that work in place may change."""
    return {name: tensor.clone() for name, tensor in inputs.items()}


def doubled(inputs: Inputs) -> Inputs:
    """The same in float64; integers as they are."""
    return {
        name: tensor.double() if tensor.is_floating_point() else tensor.clone()
        for name, tensor in inputs.items()
    }
