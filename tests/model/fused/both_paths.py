"""A small model on the plain and on the fused path, and batches for it; imported by path."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.model.config import ComputePath, ModelConfig
from pretrain.model.depth import Depth
from pretrain.model.fused import weights
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel

SMALL = ModelConfig(
    name="small", width=96, heads=2, inner=160, prelude_layers=2, core_layers=2, coda_layers=1,
    vocabulary_size=61, context=19,
)  # fmt: skip
# float64 rounds at 1e-16; sums over a few hundred terms and six layers leave three digits less.
TOLERANCE = 1e-12


def model_of(path: ComputePath, dtype: torch.dtype, **changes: Any) -> RecurrentModel:
    """The small model, with `changes` of its configuration; equal weights on every path."""
    config = dataclasses.replace(SMALL, path=path, **changes)
    model = RecurrentModel(config).to(dtype)
    initialize(model, mean_depth=3, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            # gains are 1 and biases 0 at the start, which would hide a mistake
            if parameter.ndim != 2:
                generator = torch.Generator().manual_seed(parameter.numel())
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def models(dtype: torch.dtype = torch.float64, **changes: Any) -> list[RecurrentModel]:
    """The plain model and the fused one, with the same weights."""
    paths = (ComputePath.reference, ComputePath.fused)
    return [model_of(path, dtype, **changes) for path in paths]


def batch(
    rows: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    *,
    context: int = SMALL.context,
    width: int = SMALL.width,
) -> dict[str, Any]:
    """Random tokens, their labels and an initial state, as arguments of the model."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SMALL.vocabulary_size, (rows, context + 1), generator=generator)
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "initial_state": torch.randn(rows, context, width, generator=generator, dtype=dtype),
        "keep_logits": False,
    }


def gradients(
    model: RecurrentModel, inputs: dict[str, Any], depths: Sequence[Depth]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradient of every parameter."""
    model.zero_grad()
    output = model(depths=depths, **inputs)
    output.loss.backward()
    return output.loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def distances(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """|found - wanted| / |wanted| of each tensor."""
    return {
        name: float((found[name].double() - exact).norm() / exact.norm())
        for name, exact in wanted.items()
    }


@contextlib.contextmanager
def counted_copies() -> Iterator[Counter[str]]:
    """How many matrices are quantized inside, by the name of the op."""
    counter: Counter[str] = Counter()
    originals = {name: getattr(weights, name) for name in ("quantize_rows", "quantize_both_ways")}

    def counting(name: str) -> Any:
        def quantize(matrix: Tensor) -> Any:
            counter[name] += 1
            return originals[name](matrix)

        return quantize

    for name in originals:
        setattr(weights, name, counting(name))
    try:
        yield counter
    finally:
        for name, original in originals.items():
            setattr(weights, name, original)
