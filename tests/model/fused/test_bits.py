"""What must not change a bit: whether there is a gradient, what is kept, and another run.

On a CPU by the references, on a GPU (marker gpu) by the kernels.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.model.config import ComputePath, DocumentMask, ProductPrecision
from pretrain.model.depth import Depth
from pretrain.testing import load_module

PATHS = load_module(Path(__file__).with_name("both_paths.py"))
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
# heads of 96 channels on a GPU, as the published model's, and whole blocks for FlexAttention
SHAPES = {
    "cpu": {"width": 96, "context": 19},
    "cuda": {"width": 192, "context": 256},
}
PREFIX = {"no_grad_precision": ProductPrecision.fp8}
PRECISIONS = {"same": {}, "fp8": PREFIX | {"grad_precision": ProductPrecision.fp8}}
# rows that join, one without a prefix and one whose gradient ends inside
DEPTHS = [Depth(0, 2), Depth(4, 3), Depth(1, 3), Depth(2, 1)]

over_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
over_masks = pytest.mark.parametrize("documents", DocumentMask, ids=lambda mask: mask.value)
over_precisions = pytest.mark.parametrize("precisions", PRECISIONS.values(), ids=PRECISIONS.keys())


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Attention's backward pass, which alone may add in any order, is told not to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def new_model(device: str, **changes: Any) -> Any:
    return PATHS.model_of(
        ComputePath.fused, torch.bfloat16, **SHAPES[device] | changes
    ).to(device)  # fmt: skip


def inputs(device: str, rows: int = len(DEPTHS)) -> dict[str, Any]:
    made = PATHS.batch(rows, torch.bfloat16, **SHAPES[device])
    made["documents"] = torch.arange(SHAPES[device]["context"]).div(7).int().expand(rows, -1)
    return {k: v.to(device) if k != "keep_logits" else v for k, v in made.items()}


@over_devices
@over_precisions
@over_masks
def test_iterations_with_and_without_gradient(
    device: str, precisions: Any, documents: DocumentMask
) -> None:
    model, given = new_model(device, documents=documents, **precisions), inputs(device, rows=2)
    with_gradient = model(depths=[Depth(2, 3)] * 2, **given).state
    with torch.no_grad():
        without = model(depths=[Depth(5, 0)] * 2, **given).state
    assert with_gradient.requires_grad
    assert torch.equal(with_gradient, without)


@over_devices
@pytest.mark.parametrize(
    "precisions", [*PRECISIONS.values(), PREFIX], ids=[*PRECISIONS, "fp8 prefix"]
)
@over_masks
def test_recomputed_iterations_and_another_run(
    device: str, precisions: Any, documents: DocumentMask
) -> None:
    model, given = new_model(device, documents=documents, **precisions), inputs(device)
    loss, gradients = PATHS.gradients(model, given, DEPTHS)
    for kept_iterations in (0, 2, None):
        model.kept_iterations = kept_iterations
        again, found = PATHS.gradients(model, given, DEPTHS)
        assert torch.equal(again, loss)
        for name, gradient in gradients.items():
            assert torch.equal(found[name], gradient), f"{name}, {kept_iterations} kept"
