"""Any mask, and whatever attention kernel torch takes for it."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch._dynamo.config as dynamo_config
import torch.nn.attention.flex_attention as torch_flex
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from pretrain.model.config import DocumentMask
from pretrain.model.depth import Depth
from pretrain.model.fused import attention, layer
from pretrain.model.fused.attention import CPU, CUDNN, FLASH, FLEX, REPLAYED, choose_backend
from pretrain.model.layout import Layout, Mask, split_documents
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

    def __init__(self, head_width, dtype=torch.bfloat16, tokens=256):
        self.shape, self.dtype = (1, 2, tokens, head_width), dtype


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
def test_the_kernel_goes_by_width_and_dtype(monkeypatch, queries, wanted):
    monkeypatch.setattr(attention, "has_triton", lambda: True)
    positions = torch.arange(8)[None]
    causal = Layout.at(positions, Mask(), head_width=12, base=1e4)
    assert choose_backend(queries, causal) is wanted
    isolated = Layout.at(positions, Mask(torch.zeros(1, 8)), head_width=12, base=1e4)
    assert choose_backend(queries, isolated) is (FLEX if wanted is CUDNN else REPLAYED)


@pytest.mark.parametrize(("has_triton", "wanted"), [(True, FLEX), (False, REPLAYED)])
def test_isolated_documents_go_to_flex_attention_on_a_gpu_alone(monkeypatch, has_triton, wanted):
    monkeypatch.setattr(attention, "has_triton", lambda: has_triton)
    isolated = Layout.at(torch.arange(8)[None], Mask(torch.zeros(1, 8)), head_width=96, base=1e4)
    assert choose_backend(OnCuda(96), isolated) is wanted
    # triton multiplies no fewer than 16 channels
    assert choose_backend(OnCuda(8), isolated) is REPLAYED
    # items of an evaluation have any length, and each would be compiled
    assert choose_backend(OnCuda(96, tokens=200), isolated) is REPLAYED
    assert choose_backend(torch.zeros(1, 2, 8, 96), isolated) is REPLAYED


def test_deterministic_algorithms_do_without_cudnn():
    causal = Layout.at(torch.arange(8)[None], Mask(), head_width=96, base=1e4)
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_backend(OnCuda(96), causal) is FLASH
        assert choose_backend(OnCuda(12), causal) is REPLAYED
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def compiled(monkeypatch):
    """FlexAttention on a CPU, compiled as on a GPU but for the kernel; counts what it compiles."""
    # torch refuses gradients on a CPU because its kernel there has none; the op itself has them
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(torch_flex.flex_attention, backend=counter, fullgraph=True)
    monkeypatch.setattr(attention, "_flex", lambda device: function)
    yield counter
    torch._dynamo.reset()


class Packed:
    """Random packed heads of rows of documents, whose last ones are padding."""

    def __init__(self, rows, tokens, head_width=24, heads=2, *, device="cpu", dtype=torch.float64):
        lengths = torch.randint(1, 1 + tokens // 2, (rows, tokens))
        ends = lengths.cumsum(1)
        index = torch.arange(tokens)
        documents = (ends[:, None] <= index[:, None]).sum(-1)
        documents[0, -tokens // 5 :] = -1
        segments, positions = split_documents(documents.to(device))
        self.layout = Layout.at(positions, Mask(segments), head_width=head_width, base=1e4)
        numbers = {"device": device, "dtype": dtype}
        self.qkv = torch.randn(rows * tokens, 3, heads, head_width, **numbers)
        self.upstream = torch.randn(rows, tokens, heads, head_width, **numbers).transpose(1, 2)

    def heads(self, dtype=None):
        rows = len(self.layout.cos_BTP)
        return self.qkv.to(dtype).unflatten(0, (rows, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def run(self, backend, dtype=None):
        """The output, and the gradients of queries, keys and values."""
        heads = self.heads(dtype)
        attended = backend.forward(*heads, self.layout)
        upstream = self.upstream.to(dtype)
        gradients = backend.backward(upstream, *heads, attended, self.layout)
        return attended.mixed_BHTK, *gradients


def test_flex_attention_isolates_documents_in_both_directions(compiled):
    torch.manual_seed(0)
    # more than one block of 128, a last block that is not full; rows come and go
    for rows in (3, 2, 1, 4, 5, 1):
        packed = Packed(rows, 300)
        for found, wanted in zip(packed.run(FLEX), packed.run(REPLAYED), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
            # token by token, as what follows needs it
            assert found.transpose(1, 2).is_contiguous()
    # the first number of rows, any number, and a single one
    assert compiled.frame_count == 3


def test_a_ninth_graph_of_flex_attention_is_made_in_any_thread(compiled):
    """torch makes eight of one function, unless told otherwise in that thread."""

    def run(heads):
        packed = Packed(1, 128, 16, heads, dtype=torch.float32)
        return FLEX.forward(*packed.heads(), packed.layout).mixed_BHTK.shape[1]

    with dynamo_config.patch(recompile_limit=8), ThreadPoolExecutor(1) as other:
        # a number of heads is never taken for any number
        assert run(1) == 1
        assert list(other.map(run, range(2, 10))) == list(range(2, 10))
    assert compiled.frame_count == 9


def test_flex_attention_keeps_no_more_than_other_kernels(compiled):
    packed, saved = Packed(2, 300), []
    with torch.no_grad(), saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        mixed, _ = FLEX.forward(*packed.heads(), packed.layout)
    ours = [x for x in saved if x.untyped_storage().data_ptr() == packed.qkv.data_ptr()]
    others = [x for x in saved if x.is_floating_point() and not any(x is y for y in ours)]
    assert len(ours) == 3
    # the output and the sums of exponentials
    assert sorted(x.shape for x in others) == [mixed.shape[:3], mixed.shape]
    assert mixed.untyped_storage().data_ptr() in {x.untyped_storage().data_ptr() for x in others}


def test_the_model_isolates_documents_by_flex_attention(compiled, monkeypatch):
    monkeypatch.setattr(layer, "choose_backend", lambda queries, layout: FLEX)
    built = []
    create = attention.Layout.blocks.func

    def counted(layout):
        built.append(len(layout.cos_BTP))
        return create(layout)

    monkeypatch.setattr(Layout.blocks, "func", counted)
    plain, fused = PATHS.models(documents=DocumentMask.isolated)
    inputs, depths = PATHS.batch(2) | DOCUMENTS, [Depth(1, 2), Depth(3, 2)]
    wanted_loss, wanted = PATHS.gradients(plain, inputs, depths)
    loss, found = PATHS.gradients(fused, inputs, depths)
    torch.testing.assert_close(loss, wanted_loss, rtol=PATHS.TOLERANCE, atol=0)
    for name, distance in PATHS.distances(found, wanted).items():
        assert distance < PATHS.TOLERANCE, f"{name}: {distance}"
    # the rows as they came, for prelude and coda; the deeper one alone; both, deepest first
    assert built == [2, 1, 2]


ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        (CPU, "cpu"),
        pytest.param(CUDNN, "cuda", marks=ON_GPU),
        pytest.param(FLASH, "cuda", marks=ON_GPU),
    ],
    ids=lambda each: each if isinstance(each, str) else each.name,
)
@pytest.mark.parametrize("tokens", [192, 777])
@pytest.mark.parametrize("factor", [1.0, 40.0], ids=["usual", "peaked"])
def test_causal_kernels_err_no_more_than_plain_products(backend, device, tokens, factor):
    """Also where logits are some hundreds apart, at lengths that fill no block of queries."""
    torch.manual_seed(0)
    packed = Packed(3, tokens, 96, 3, device=device, dtype=torch.bfloat16)
    packed.layout = dataclasses.replace(packed.layout, mask=Mask())
    packed.qkv[:, 0] *= factor
    exact, plain = (multiplied_out(packed, dtype) for dtype in (torch.float32, torch.bfloat16))
    for name, truth, ours, theirs in zip("oqkv", exact, packed.run(backend), plain, strict=True):
        error, allowed = ((x.float() - truth).norm() / truth.norm() for x in (ours, theirs))
        # written so that NaN fails
        assert error <= 1.1 * allowed, (name, float(error), float(allowed))


def multiplied_out(packed, dtype):
    """Causal attention as two products and a softmax, each rounded to the dtype; as Packed.run."""
    heads = [x.clone().requires_grad_() for x in packed.heads(dtype)]
    q, k, v = heads
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    is_later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    mixed = scores.masked_fill(is_later, -torch.inf).softmax(-1) @ v
    return mixed.detach(), *torch.autograd.grad(mixed, heads, packed.upstream.to(dtype))


class TestOnGpu:
    """The compiled kernel, at the head width of the large model, which is no power of 2."""

    pytestmark = ON_GPU

    @pytest.mark.parametrize("tokens", [1024, 777])
    def test_it_errs_no_more_than_attention_with_a_dense_mask(self, tokens):
        torch.manual_seed(0)
        for rows in (3, 1, 2, 4):
            packed = Packed(rows, tokens, 96, 3, device="cuda", dtype=torch.bfloat16)
            exact = packed.run(REPLAYED, torch.float32)
            found, dense = packed.run(FLEX), packed.run(REPLAYED)
            for name, truth, ours, plain in zip("oqkv", exact, found, dense, strict=True):
                error, allowed = ((x.float() - truth).norm() / truth.norm() for x in (ours, plain))
                # written so that NaN fails
                assert error <= 1.25 * allowed, (rows, name, float(error), float(allowed))

    def test_it_keeps_the_output_and_a_number_a_query(self):
        packed = Packed(2, 2048, 96, 8, device="cuda", dtype=torch.bfloat16)
        packed.run(FLEX)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        attended = FLEX.forward(*packed.heads(), packed.layout)
        kept = torch.cuda.memory_allocated() - before
        output = attended.mixed_BHTK
        assert kept <= output.numel() * 2 + output[..., 0].numel() * 4 + 4096

    def test_iterations_without_gradient_compute_the_same_bits_twice(self):
        packed = Packed(2, 777, 96, 3, device="cuda", dtype=torch.bfloat16)
        first, second = packed.run(FLEX), packed.run(FLEX)
        with torch.no_grad():
            third = FLEX.forward(*packed.heads(), packed.layout).mixed_BHTK
        assert torch.equal(first[0], third)
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other)
