"""A small model's hand-written passes on the kernels, against its plain modules.

Elsewhere on a CPU those passes run on the references (tests/model/fused/). Marked gpu; on a CPU in
Triton's interpreter, which test_interpreter.py starts.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.model.config import ComputePath
from pretrain.model.depth import Depth
from pretrain.testing import load_module
from pretrain_kernels.dispatch import is_fused, is_interpreted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() or is_interpreted()), reason="no GPU, not interpreted"
    ),
]
PATHS = load_module(Path(__file__).parents[1] / "model" / "fused" / "both_paths.py")
DEVICE = "cpu" if is_interpreted() else "cuda"
# so small that the interpreter takes seconds; odd on purpose
SHAPE: dict[str, Any] = {
    "width": 20, "heads": 2, "inner": 28, "prelude_layers": 1, "core_layers": 2, "coda_layers": 1,
    "context": 5,
}  # fmt: skip
# a prefix, rows that join, and one whose gradient ends inside
DEPTHS = [Depth(1, 1), Depth(1, 2)]


def new_model(path: ComputePath, dtype: torch.dtype) -> Any:
    return PATHS.model_of(path, dtype, **SHAPE).to(DEVICE)


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    made = PATHS.batch(2, torch.float32, context=SHAPE["context"], width=SHAPE["width"])
    made["initial_state"] = made["initial_state"].to(dtype)
    return {k: v.to(DEVICE) if k != "keep_logits" else v for k, v in made.items()}


def test_losses_and_gradients_are_as_near_to_float64_as_the_plain_modules() -> None:
    plain, fused = (
        new_model(path, torch.float32) for path in (ComputePath.reference, ComputePath.fused)
    )
    exact = new_model(ComputePath.reference, torch.float64)
    for model in (exact, fused):
        model.load_state_dict(plain.state_dict())
    assert is_fused(*fused.parameters())
    wanted_loss, wanted = PATHS.gradients(exact, inputs(torch.float64), DEPTHS)
    errors = []
    for model in (plain, fused):
        loss, found = PATHS.gradients(model, inputs(torch.float32), DEPTHS)
        # sums of some ten numbers of float32, five layers in a row
        torch.testing.assert_close(loss.double(), wanted_loss, rtol=2e-6, atol=0)
        errors.append(PATHS.distances(found, wanted))
    for name, plain_error in errors[0].items():
        # Gradients of few terms err by luck on either path (tests/model/fused/test_rounding.py). On
        # a GPU, roots and exponentials are off by up to 2^-22 and quotients by two units in the
        # last place: in 200 drawings of such errors on both paths no gradient passed this limit,
        # the largest error was 1.9e-6. A wrong term would be of the order of 1.
        assert errors[1][name] <= 4 * plain_error + 5e-7, name


def test_what_is_kept_and_whether_there_is_a_gradient_changes_no_bit() -> None:
    fused = new_model(ComputePath.fused, torch.float32)
    loss, kept = PATHS.gradients(fused, inputs(torch.float32), DEPTHS)
    fused.kept_iterations = 0
    again, recomputed = PATHS.gradients(fused, inputs(torch.float32), DEPTHS)
    with torch.no_grad():
        without = fused(depths=DEPTHS, **inputs(torch.float32)).loss
    assert torch.equal(loss, again)
    assert torch.equal(loss, without)
    for name, gradient in kept.items():
        assert torch.equal(recomputed[name], gradient), name
