"""In bf16 the fused path is as near to exact gradients as the plain modules are."""

from pathlib import Path

import pytest
import torch

from pretrain.model.config import ComputePath, DocumentMask
from pretrain.model.depth import Depth
from pretrain.testing import load_module
from pretrain_kernels.dispatch import is_fused

PATHS = load_module(Path(__file__).with_name("both_paths.py"))
# heads of 96 channels, as the published model's
WIDTH = 192
# CPUs emulate bf16; FlexAttention takes whole blocks
CONTEXTS = {"cpu": 40, "cuda": 256}
DEPTHS = [Depth(0, 2), Depth(3, 2), Depth(1, 2), Depth(2, 1)]
# Both paths round at the same places but for the adapter, whose product is rounded in two parts,
# and sums over iterations, which only the fused path keeps wide: over all parameters it errs no
# more (measured: 0.89 to 0.96 of the plain modules' error). The gradient of a gain has few terms,
# so its error is a matter of luck on either path: up to 1.4 times was seen, twice is refused.
RATIO, RATIO_OF_SUM = 2.0, 1.05
# Below half a rounding of bf16 no ratio is asked for.
NOISE = 2.0**-9
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
]


@pytest.mark.parametrize("documents", DocumentMask, ids=lambda mask: mask.value)
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_err_no_more_than_the_plain_modules(device, documents):
    context = CONTEXTS[device]
    shape = {"width": WIDTH, "heads": 2, "inner": 320, "context": context}
    exact, plain, fused = (
        PATHS.model_of(path, dtype, documents=documents, **shape).to(device)
        for path, dtype in (
            (ComputePath.reference, torch.float64),
            (ComputePath.reference, torch.bfloat16),
            (ComputePath.fused, torch.bfloat16),
        )
    )
    for model in (exact, fused):
        model.load_state_dict(plain.state_dict())
    assert is_fused(next(fused.parameters())) == (device == "cuda")
    inputs = PATHS.batch(len(DEPTHS), torch.bfloat16, context=context, width=WIDTH)
    inputs = {k: v.to(device) if k != "keep_logits" else v for k, v in inputs.items()}
    if documents is DocumentMask.isolated:
        positions = torch.arange(context, device=device)
        inputs["documents"] = positions.div(23, rounding_mode="floor").expand(len(DEPTHS), -1)
    wide = {**inputs, "initial_state": inputs["initial_state"].double()}
    wanted_loss, wanted = PATHS.gradients(exact, wide, DEPTHS)
    results = [PATHS.gradients(model, inputs, DEPTHS) for model in (plain, fused)]
    # the state is bounded by its norms, so a loss errs by about one rounding
    for loss, _ in results:
        assert (loss.double() - wanted_loss).abs() < 2.0**-8 * wanted_loss
    plain_errors, fused_errors = (PATHS.distances(found, wanted) for _, found in results)
    for name, error in fused_errors.items():
        allowed = RATIO * max(plain_errors[name], NOISE)
        assert error <= allowed, f"{name}: {error:.2e}, plain {plain_errors[name]:.2e}"
    assert sum(fused_errors.values()) <= RATIO_OF_SUM * sum(plain_errors.values())
