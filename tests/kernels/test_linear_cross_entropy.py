"""The linear layer's cross-entropy: chunks against the whole, kernels against float64.

Tests marked gpu run on CUDA, or on the CPU in Triton's interpreter: test_interpreter.py starts
that process.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.model import loss
from pretrain.testing import load_module
from pretrain_kernels.dispatch import has_triton, is_interpreted
from pretrain_kernels.linear_cross_entropy import IGNORED, linear_cross_entropy, reference

needs_kernels = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() or is_interpreted()), reason="no GPU, not interpreted"
    ),
]
needs_gpu = [*needs_kernels, pytest.mark.skipif(is_interpreted(), reason="needs a GPU")]
DEVICE = "cpu" if is_interpreted() else "cuda"
# the interpreter truncates to bfloat16 instead of rounding
DTYPES = [torch.float32, torch.float16] + ([] if is_interpreted() else [torch.bfloat16])
# half a unit in the last place of what is stored, and of float32 arithmetic on it
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(
    num_tokens: int, vocabulary: int, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, labels of which every fifth is ignored, upstream gradients."""
    hidden_ND = draw(num_tokens, 24, dtype=dtype).to(device).requires_grad_()
    weight_VD = (draw(vocabulary, 24, seed=1) / 3).to(dtype).to(device).requires_grad_()
    labels_N = torch.arange(num_tokens) * 7919 % vocabulary
    labels_N[::5] = IGNORED
    wide = torch.promote_types(dtype, torch.float32)
    return (
        hidden_ND,
        weight_VD,
        labels_N.to(device),
        draw(num_tokens, dtype=wide, seed=2).to(device),
    )


def gradients(nats_N: Tensor, upstream_N: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(nats_N, inputs, upstream_N)


def error(got: Tensor, expected: Tensor) -> float:
    """Relative, of the whole tensor."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def test_equals_the_loss_of_the_model() -> None:
    hidden_ND, weight_VD, labels_N, upstream_N = problem(13, 31)
    expected_N = loss.linear_cross_entropy(hidden_ND, weight_VD, labels_N, chunk_tokens=4)
    got_N = linear_cross_entropy(hidden_ND, weight_VD, labels_N, chunk_tokens=4)
    torch.testing.assert_close(got_N, expected_N, rtol=1e-13, atol=1e-13)
    wanted = gradients(expected_N, upstream_N, hidden_ND, weight_VD)
    for ours, theirs in zip(
        gradients(got_N, upstream_N, hidden_ND, weight_VD), wanted, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 8, 100])
def test_chunks_equal_the_whole(chunk_tokens: int) -> None:
    hidden_ND, weight_VD, labels_N, upstream_N = problem(14, 31)
    expected_N = reference.linear_cross_entropy(hidden_ND, weight_VD, labels_N, z_loss=0.3)
    got_N = linear_cross_entropy(
        hidden_ND, weight_VD, labels_N, z_loss=0.3, chunk_tokens=chunk_tokens
    )
    torch.testing.assert_close(got_N, expected_N, rtol=1e-13, atol=1e-13)
    wanted = gradients(expected_N, upstream_N, hidden_ND, weight_VD)
    first = torch.autograd.grad(got_N, (hidden_ND, weight_VD), upstream_N, retain_graph=True)
    # the kept logits are gone by now
    second = gradients(got_N, upstream_N, hidden_ND, weight_VD)
    for once, twice, theirs in zip(first, second, wanted, strict=True):
        torch.testing.assert_close(once, theirs, rtol=1e-12, atol=1e-13)
        assert torch.equal(once, twice)


def test_z_loss_is_the_square_of_the_log_sum_of_exponentials() -> None:
    hidden_ND, weight_VD, labels_N, _ = problem(6, 31)
    plain_N = linear_cross_entropy(hidden_ND, weight_VD, labels_N)
    added_N = linear_cross_entropy(hidden_ND, weight_VD, labels_N, z_loss=0.25) - plain_N
    lse_N = torch.log(torch.exp(hidden_ND @ weight_VD.T).sum(1))
    expected_N = torch.where(labels_N == IGNORED, 0.0, 0.25 * lse_N**2)
    torch.testing.assert_close(added_N, expected_N, rtol=1e-12, atol=1e-12)


def test_gradients_equal_differences() -> None:
    hidden_ND, weight_VD, labels_N, _ = problem(6, 11)

    def of(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        return linear_cross_entropy(hidden_ND, weight_VD, labels_N, z_loss=0.1, chunk_tokens=4)

    assert torch.autograd.gradcheck(of, (hidden_ND, weight_VD))


def test_only_wanted_gradients_are_computed() -> None:
    hidden_ND, weight_VD, labels_N, upstream_N = problem(6, 11)
    both = gradients(
        linear_cross_entropy(hidden_ND, weight_VD, labels_N, chunk_tokens=4), upstream_N,
        hidden_ND, weight_VD,
    )  # fmt: skip
    for inputs, wanted in (
        ((hidden_ND, weight_VD.detach()), both[0]), ((hidden_ND.detach(), weight_VD), both[1])
    ):  # fmt: skip
        nats_N = linear_cross_entropy(*inputs, labels_N, chunk_tokens=4)
        [got] = gradients(nats_N, upstream_N, *(one for one in inputs if one.requires_grad))
        assert torch.equal(got, wanted)


def test_no_tokens_give_no_nats_and_zero_gradients() -> None:
    hidden_ND, weight_VD, labels_N, upstream_N = problem(0, 11)
    nats_N = linear_cross_entropy(hidden_ND, weight_VD, labels_N)
    dhidden_ND, dweight_VD = gradients(nats_N, upstream_N, hidden_ND, weight_VD)
    assert nats_N.shape == (0,)
    assert dhidden_ND.shape == (0, 24)
    assert torch.equal(dweight_VD, torch.zeros(11, 24, dtype=torch.float64))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_logits_of_one_chunk_are_the_largest_tensor() -> None:
    hidden_ND, weight_VD, labels_N, upstream_N = problem(64, 100)
    with Largest() as largest:
        nats_N = linear_cross_entropy(hidden_ND, weight_VD, labels_N, chunk_tokens=26)
        gradients(nats_N, upstream_N, hidden_ND, weight_VD)
    assert largest.elements == 26 * 100 < 64 * 100


def test_the_weight_gradient_of_many_chunks_is_rounded_once() -> None:
    inputs = problem(512, 64, torch.bfloat16)
    hidden_ND, weight_VD, labels_N, upstream_N = inputs
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs[:2]]
    exact = gradients(
        reference.linear_cross_entropy(*doubles, labels_N), upstream_N.double(), doubles[1]
    )
    whole, chunks = (
        gradients(
            linear_cross_entropy(hidden_ND, weight_VD, labels_N, chunk_tokens=size), upstream_N,
            weight_VD,
        )[0]
        for size in (512, 2)
    )  # fmt: skip
    # 256 roundings to bfloat16 would be several times as far away as one
    assert error(chunks, exact[0]) <= 1.1 * error(whole, exact[0])


@pytest.mark.parametrize("label", [31, -1, -101, 1 << 40])
def test_a_label_out_of_range_gives_nan_to_its_token_alone(label: int) -> None:
    hidden_ND, weight_VD, labels_N, upstream_N = problem(6, 31)
    labels_N[2] = label
    nats_N = linear_cross_entropy(hidden_ND, weight_VD, labels_N, chunk_tokens=4)
    dhidden_ND, dweight_VD = gradients(nats_N, upstream_N, hidden_ND, weight_VD)
    is_bad_N = torch.arange(6) == 2
    assert torch.equal(nats_N.isnan(), is_bad_N)
    assert torch.equal(dhidden_ND.isnan().any(1), is_bad_N)
    assert dweight_VD.isnan().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h, w, y: (h.float(), w, y), "hidden is torch.float32 and weight torch.float64"),
        (lambda h, w, y: (h.int(), w.int(), y), "hidden is torch.int32"),
        (lambda h, w, y: (h, w, y.int()), "labels are torch.int32, not torch.int64"),
        (lambda h, w, y: (h, w[:, 1:].contiguous(), y), r"weight \(31, 23\).* must be \(N, D\)"),
        (lambda h, w, y: (h, w, y[1:]), r"labels \(5,\)"),
        (lambda h, w, y: (h[None], w, y), r"hidden \(1, 6, 24\)"),
        (lambda h, w, y: (h.t().contiguous().t(), w, y), "hidden .* must be contiguous"),
        (lambda h, w, y: (h, w.to("meta"), y), "weight is on meta, hidden on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        linear_cross_entropy(*change(*problem(6, 31)[:3]))


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk_tokens=0 must be at least 1"):
        linear_cross_entropy(*problem(6, 31)[:3], chunk_tokens=0)


class TestKernels:
    pytestmark = needs_kernels

    @pytest.mark.parametrize("vocabulary", [1, 37, 4096, 9001])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_passes_equal_float64(self, vocabulary: int, dtype: torch.dtype) -> None:
        from pretrain_kernels.linear_cross_entropy import triton as fused

        logits_NV = (3 * draw(7, vocabulary)).to(dtype).to(DEVICE)
        labels_N = torch.tensor([0, vocabulary - 1, IGNORED, vocabulary, -1, vocabulary // 2, 0])
        labels_N = labels_N.to(DEVICE)
        upstream_N = draw(7, dtype=torch.float32, seed=1).to(DEVICE)
        exact_N, exact_lse_N = reference.nats_and_lse(logits_NV.double(), labels_N, z_loss=0.1)
        nats_N, lse_N = fused.nats_and_lse(logits_NV, labels_N, z_loss=0.1)
        # a sum of float32 exponentials, its logarithm, and a square of numbers up to 20
        torch.testing.assert_close(lse_N.double(), exact_lse_N, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(nats_N.double(), exact_N, rtol=1e-6, atol=1e-5, equal_nan=True)
        exact_NV = logits_NV.double()
        reference.logits_to_gradient_(
            exact_NV, labels_N, exact_lse_N, upstream_N.double(), z_loss=0.1
        )
        again_NV = logits_NV.clone()
        for one_NV in (logits_NV, again_NV):
            fused.logits_to_gradient_(one_NV, labels_N, lse_N, upstream_N, z_loss=0.1)
        torch.testing.assert_close(
            logits_NV.double(), exact_NV, rtol=max(2e-5, ROUNDING[dtype]), atol=1e-6, equal_nan=True
        )
        assert torch.equal(logits_NV[2], torch.zeros_like(logits_NV[2]))
        assert torch.equal(logits_NV.nan_to_num(), again_NV.nan_to_num())

    def test_nan_comes_through_and_masked_out_logits_do_not_matter(self) -> None:
        from pretrain_kernels.linear_cross_entropy import triton as fused

        logits_NV = draw(3, 5000, dtype=torch.float32).to(DEVICE)
        logits_NV[0, 4999] = torch.nan
        logits_NV[1, 100:] = -torch.inf
        labels_N = torch.tensor([1, 2, 3], device=DEVICE)
        nats_N, lse_N = fused.nats_and_lse(logits_NV, labels_N, z_loss=0.0)
        assert nats_N.isnan().tolist() == [True, False, False]
        torch.testing.assert_close(lse_N[1], logits_NV[1, :100].logsumexp(0), rtol=1e-6, atol=1e-6)
        fused.logits_to_gradient_(
            logits_NV, labels_N, lse_N, torch.ones(3, device=DEVICE), z_loss=0.0
        )
        assert logits_NV[0].isnan().all()
        assert torch.equal(logits_NV[1, 100:], torch.zeros_like(logits_NV[1, 100:]))

    @pytest.mark.parametrize("num_tokens", [1, 11] if is_interpreted() else [1, 199, 4097])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_errors_are_no_larger_than_eager_ones(
        self, num_tokens: int, dtype: torch.dtype
    ) -> None:
        inputs = problem(num_tokens, 5003, dtype, DEVICE)
        hidden_ND, weight_VD, labels_N, upstream_N = inputs
        labels_N[0] = 1
        doubles = [tensor.detach().double().requires_grad_() for tensor in inputs[:2]]
        exact_N = reference.linear_cross_entropy(*doubles, labels_N)
        exact = [exact_N, *gradients(exact_N, upstream_N.double(), *doubles)]
        results = []
        for function in (linear_cross_entropy, loss.linear_cross_entropy):
            nats_N = function(
                hidden_ND, weight_VD, labels_N, chunk_tokens=4 if is_interpreted() else 1000
            )
            results.append([nats_N, *gradients(nats_N, upstream_N, hidden_ND, weight_VD)])
        for ours, eager, truth in zip(*results, exact, strict=True):
            # 6e-7: on a GPU an exponential is 2 to the power of a float32 product of about 10
            assert error(ours, truth) <= 1.1 * error(eager, truth) + 6e-7


class TestOnGpu:
    pytestmark = needs_gpu

    def test_offsets_go_past_2_to_the_31(self) -> None:
        from pretrain_kernels.linear_cross_entropy import triton as fused

        num_tokens, vocabulary = (1 << 15) + 1, 1 << 16
        logits_NV = torch.zeros(num_tokens, vocabulary, dtype=torch.bfloat16, device=DEVICE)
        logits_NV[-1] = draw(vocabulary, dtype=torch.bfloat16)
        last_1V = logits_NV[-1:].clone()
        labels_N = torch.full((num_tokens,), 5, device=DEVICE)
        upstream_N = torch.ones(num_tokens, device=DEVICE)
        nats_N, lse_N = fused.nats_and_lse(logits_NV, labels_N, z_loss=0.0)
        nats_1, lse_1 = fused.nats_and_lse(last_1V, labels_N[:1], z_loss=0.0)
        assert torch.equal(nats_N[-1:], nats_1)
        fused.logits_to_gradient_(logits_NV, labels_N, lse_N, upstream_N, z_loss=0.0)
        fused.logits_to_gradient_(last_1V, labels_N[:1], lse_1, upstream_N[:1], z_loss=0.0)
        assert torch.equal(logits_NV[-1:], last_1V)
        assert float(logits_NV[0, 5]) == -1.0


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
@pytest.mark.skipif(is_interpreted(), reason="compiles")
def test_compiled_for_hopper(tmp_path: Path, monkeypatch) -> None:
    from pretrain_kernels.linear_cross_entropy import triton as fused

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = load_module(Path(__file__).with_name("launches.py"))
    with torch.device("meta"):
        logits_NV = torch.empty(4096, 65_536, dtype=torch.bfloat16)
        labels_N, upstream_N = torch.empty(4096, dtype=torch.int64), torch.empty(4096)
    with launches.recorded(fused) as recorded:
        _, lse_N = fused.nats_and_lse(logits_NV, labels_N, z_loss=0.0)
        fused.logits_to_gradient_(logits_NV, labels_N, lse_N, upstream_N, z_loss=0.0)
    nats, gradient = (launches.compiled(launch) for launch in recorded)
    for machine in (nats, gradient):
        assert machine.spilled_accesses == 0
        # six programs of 128 threads share the 65,536 registers of a multiprocessor
        assert machine.registers <= 80
        # 4096 logits of 2 bytes over 128 threads: four accesses of 16 bytes each
        assert machine.vector_loads == 4
    assert nats.vector_stores == 0
    # nats and log-sum-exp of the row
    assert nats.stores == 2
    assert gradient.vector_stores == gradient.stores == 4
