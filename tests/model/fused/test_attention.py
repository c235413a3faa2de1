"""Any mask, and whatever attention kernel torch takes for it."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pretrain.model.config import DocumentMask
from pretrain.model.depth import Depth
from pretrain.model.fused.attention import CUDNN, FLASH, REPLAYED, choose_backend
from pretrain.model.layout import Layout, Mask
from pretrain.testing import load_module

PATHS = load_module(Path(__file__).with_name("both_paths.py"))
DEPTHS = [Depth(1, 2), Depth(2, 1)]
DOCUMENTS = {"documents": torch.arange(19).div(7, rounding_mode="floor").expand(2, 19)}
PREFIXES = {"prefixes": torch.tensor([5, 0])}
MASKS = {
    "prefixes": (DocumentMask.causal, PREFIXES),
    "documents": (DocumentMask.isolated, DOCUMENTS),
    "both": (DocumentMask.isolated, DOCUMENTS | PREFIXES),
}


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], ids=str)
@pytest.mark.parametrize(("documents", "mask"), MASKS.values(), ids=MASKS.keys())
def test_masks_are_those_of_the_plain_modules(documents, mask, kernel):
    plain, fused = PATHS.models(documents=documents)
    inputs = PATHS.batch(2) | mask
    wanted_loss, wanted = PATHS.gradients(plain, inputs, DEPTHS)
    with sdpa_kernel(kernel):
        loss, found = PATHS.gradients(fused, inputs, DEPTHS)
    torch.testing.assert_close(loss, wanted_loss, rtol=PATHS.TOLERANCE, atol=0)
    for name, distance in PATHS.distances(found, wanted).items():
        assert distance < PATHS.TOLERANCE, f"{name}: {distance}"


class OnCuda:
    """As much of a CUDA tensor as the choice looks at."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def __init__(self, head_width, dtype=torch.bfloat16):
        self.shape, self.dtype = (1, 2, 8, head_width), dtype


@pytest.mark.parametrize(
    ("queries", "wanted"),
    [
        (OnCuda(96), CUDNN),
        # 12 channels are 24 bytes: no kernel reads them in 16-byte accesses
        (OnCuda(12), REPLAYED),
        (OnCuda(96, torch.float32), REPLAYED),
    ],
    ids=["16 bits", "odd width", "32 bits"],
)
def test_the_kernel_goes_by_width_and_dtype(queries, wanted):
    positions = torch.arange(8)[None]
    causal = Layout.at(positions, Mask(), head_width=12, base=1e4)
    assert choose_backend(queries, causal) is wanted
    isolated = Layout.at(positions, Mask(torch.zeros(1, 8)), head_width=12, base=1e4)
    assert choose_backend(queries, isolated) is REPLAYED


def test_deterministic_algorithms_do_without_cudnn():
    causal = Layout.at(torch.arange(8)[None], Mask(), head_width=96, base=1e4)
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_backend(OnCuda(96), causal) is FLASH
        assert choose_backend(OnCuda(12), causal) is REPLAYED
    finally:
        torch.use_deterministic_algorithms(False)
