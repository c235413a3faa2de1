"""The references: equal to the plain model bit for bit, and to autograd in float64 backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.norm import RMSNorm
from pretrain.model.rotary import angles, rotate
from pretrain_kernels.norm_chain import norm_chain, norm_chain_backward, norm_chain_output
from pretrain_kernels.qk_rope import qk_rope_, qk_rope_backward
from pretrain_kernels.quantize_both_ways import quantize_both_ways
from pretrain_kernels.quantize_rows import quantize_rows
from pretrain_kernels.rms_norm import rms_norm, rms_norm_autograd, rms_norm_backward
from pretrain_kernels.swiglu import swiglu, swiglu_backward

EPSILON = 1e-6
ROWS, WIDTH = 7, 96
DTYPES = [torch.bfloat16, torch.float32]


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gain(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (1 + 0.2 * draw(WIDTH, seed=seed)).to(dtype)


def model_norm(gain_D: Tensor) -> RMSNorm:
    norm = RMSNorm(WIDTH, EPSILON)
    norm.gain = torch.nn.Parameter(gain_D)
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
def test_chain_equals_the_model(dtype: torch.dtype) -> None:
    branch, residual = draw(ROWS, WIDTH, dtype=dtype), draw(ROWS, WIDTH, dtype=dtype, seed=1)
    gains = [gain(seed, dtype) for seed in (2, 3, 4)]
    before, norm_a, norm_b = map(model_norm, gains)
    _, rstd_N = rms_norm(residual, gains[0], EPSILON)
    chained = norm_chain(
        branch, residual, rstd_N=rstd_N, gain_D=gains[0], gain_a_D=gains[1], gain_b_D=gains[2],
        epsilon=EPSILON,
    )  # fmt: skip
    summed = branch + before(residual)
    assert torch.equal(chained.sum_ND, summed)
    assert torch.equal(chained.out_ND, norm_b(norm_a(summed)))
    only_b = norm_chain(branch, residual, gain_b_D=gains[2], epsilon=EPSILON)
    assert torch.equal(only_b.out_ND, norm_b(branch + residual))
    assert only_b.rstd_a_N is None
    only_a = norm_chain(branch, residual, gain_a_D=gains[1], epsilon=EPSILON)
    assert torch.equal(only_a.out_ND, norm_a(branch + residual))
    assert torch.equal(rms_norm(residual, gains[0], EPSILON)[0], before(residual))


@pytest.mark.parametrize(("has_a", "has_b"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("has_dx", [True, False])
def test_chain_gradients_equal_autograd(has_a: bool, has_b: bool, has_dx: bool) -> None:
    total = draw(ROWS, WIDTH).requires_grad_()
    gains = {name: gain(seed).requires_grad_() for name, seed in (("a", 2), ("b", 3))}
    x = F.rms_norm(total, (WIDTH,), gains["a"], EPSILON) if has_a else total
    y = F.rms_norm(x, (WIDTH,), gains["b"], EPSILON) if has_b else x
    dout, dx = draw(ROWS, WIDTH, seed=4), draw(ROWS, WIDTH, seed=5)
    torch.autograd.backward((y, x), (dout, dx if has_dx else torch.zeros_like(dx)))
    detached = {name: value.detach() for name, value in gains.items()}
    a_D = detached["a"] if has_a else None
    b_D = detached["b"] if has_b else None
    forward = norm_chain(None, total.detach(), gain_a_D=a_D, gain_b_D=b_D, epsilon=EPSILON)
    # the buffers are added to, not overwritten
    da = torch.full((WIDTH,), 3.0, dtype=torch.float64) if has_a else None
    db = torch.full((WIDTH,), 5.0, dtype=torch.float64) if has_b else None
    dsum = norm_chain_backward(
        dout, dx if has_dx else None, total.detach(), rstd_a_N=forward.rstd_a_N, gain_a_D=a_D,
        rstd_b_N=forward.rstd_b_N, gain_b_D=b_D, dgain_a_D=da, dgain_b_D=db,
    )  # fmt: skip
    torch.testing.assert_close(dsum, total.grad)
    if da is not None:
        torch.testing.assert_close(da - 3.0, gains["a"].grad)
    if db is not None:
        torch.testing.assert_close(db - 5.0, gains["b"].grad)
    again = norm_chain_output(total.detach(), forward.rstd_a_N, a_D, forward.rstd_b_N, b_D)
    assert torch.equal(again, forward.out_ND)


def test_norm_gradients_equal_autograd() -> None:
    x, gain_D = draw(ROWS, WIDTH).requires_grad_(), gain(1).requires_grad_()
    dy = draw(ROWS, WIDTH, seed=2)
    F.rms_norm(x, (WIDTH,), gain_D, EPSILON).backward(dy)
    plain_x, plain_gain = x.detach(), gain_D.detach()
    _, rstd_N = rms_norm(plain_x, plain_gain, EPSILON)
    dgain = torch.zeros_like(plain_gain)
    dx = rms_norm_backward(dy, plain_x, rstd_N, plain_gain, dgain)
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(dgain, gain_D.grad)


def test_differentiable_norm_passes_gradcheck_on_strided_rows() -> None:
    x = draw(WIDTH, 2, 3).permute(1, 2, 0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, gain_D: rms_norm_autograd(x, gain_D, EPSILON), (x, gain(1).requires_grad_())
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_rope_equals_the_model(dtype: torch.dtype, has_bias: bool) -> None:
    cos, sin = angles(torch.arange(ROWS)[None] * 3, head_width=8, base=50_000.0)
    qkv = draw(ROWS, 3, 5, 8, dtype=dtype)
    bias = draw(2, 5, 8, dtype=dtype, seed=1) if has_bias else None
    expected = qkv.clone()
    for part in (0, 1):
        biased = qkv[:, part] if bias is None else qkv[:, part] + bias[part]
        expected[:, part] = rotate(biased[None], cos, sin)[0]
    assert qk_rope_(qkv, bias, cos[0], sin[0]) is qkv
    assert torch.equal(qkv, expected)


def test_rope_gradients_equal_autograd() -> None:
    rows, tokens = 2, 5
    positions = torch.arange(rows * tokens).view(rows, tokens)
    cos, sin = (a.double() for a in angles(positions, head_width=8, base=50_000.0))
    qkv = draw(rows * tokens, 3, 3, 8).requires_grad_()
    bias = draw(2, 3, 8, seed=1).requires_grad_()
    q, k, v = qkv.view(rows, tokens, 3, 3, 8).unbind(2)
    outputs = (rotate(q + bias[0], cos, sin), rotate(k + bias[1], cos, sin), v)
    # as attention's backward returns them: [B, H, T, K] in memory
    gradients = [draw(rows, 3, tokens, 8, seed=seed).transpose(1, 2) for seed in (2, 3, 4)]
    torch.autograd.backward(outputs, gradients)
    dbias = torch.full((2, 3, 8), 2.0, dtype=torch.float64)
    angles_NP = cos.flatten(0, 1), sin.flatten(0, 1)
    dqkv = qk_rope_backward(*gradients, *angles_NP, dbias_2HK=dbias)
    torch.testing.assert_close(dqkv, qkv.grad)
    torch.testing.assert_close(dbias - 2.0, bias.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_equals_the_model(dtype: torch.dtype) -> None:
    gate_up = draw(ROWS, 2 * WIDTH, dtype=dtype)
    gate, up = gate_up.chunk(2, 1)
    assert torch.equal(swiglu(gate_up), F.silu(gate) * up)


@pytest.mark.parametrize("in_place", [True, False])
def test_swiglu_gradients_equal_autograd(in_place: bool) -> None:
    gate_up = draw(ROWS, 2 * WIDTH).requires_grad_()
    gate, up = gate_up.chunk(2, 1)
    dh = draw(ROWS, WIDTH, seed=1)
    (F.silu(gate) * up).backward(dh)
    buffer = gate_up.detach().clone()
    forward = swiglu(buffer)
    hidden = torch.full_like(dh, float("nan"))
    out = swiglu_backward(dh, buffer, out=buffer if in_place else None, hidden_out=hidden)
    assert (out is buffer) == in_place
    torch.testing.assert_close(out, gate_up.grad)
    assert torch.equal(hidden, forward)


def test_quantized_rows_are_within_half_a_step() -> None:
    x = draw(ROWS, WIDTH, dtype=torch.float32) * 10.0 ** torch.arange(-3, 4)[:, None]
    values, scale = quantize_rows(x)
    assert torch.equal(values.float().abs().amax(1), torch.full((ROWS,), 448.0))
    # 3 bits of mantissa: half a step is 2^-4 of the value, 2^-10 of the scale below 2^-6
    bound = torch.maximum(x.abs() * 2.0**-4, scale * 2.0**-10)
    # one fp32 rounding each in the scale, its reciprocal and the product
    assert ((values.float() * scale - x).abs() <= bound * (1 + 2.0**-20)).all()


def test_quantized_rows_of_zeros_and_of_nan() -> None:
    x = draw(3, WIDTH, dtype=torch.bfloat16)
    x[0] = 0.0
    x[1, 5] = float("nan")
    values, scale = quantize_rows(x)
    assert (values[0].float() == 0).all()
    assert torch.isfinite(scale[0])
    assert scale[0] > 0
    assert values[1].float().isnan().all()
    assert scale[1].isnan()
    assert values[2].float().isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_quantized_both_ways_is_each_way(dtype: torch.dtype) -> None:
    x = draw(ROWS, WIDTH, dtype=dtype) * torch.arange(1, WIDTH + 1).to(dtype)
    by_row, by_column = quantize_both_ways(x)
    for ours, theirs in ((by_row, x), (by_column, x.t().contiguous())):
        for one, other in zip(ours, quantize_rows(theirs), strict=True):
            assert torch.equal(one.float(), other.float())
    assert by_column.values_ND.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_outputs_are_the_quantized_outputs(dtype: torch.dtype) -> None:
    x, gain_D = draw(ROWS, WIDTH, dtype=dtype), gain(1, dtype)
    plain = norm_chain(x, x, gain_b_D=gain_D, epsilon=EPSILON).out_ND
    chained = norm_chain(x, x, gain_b_D=gain_D, epsilon=EPSILON, fp8=True).out_ND
    for ours, theirs in zip(chained, quantize_rows(plain), strict=True):
        assert torch.equal(ours.float(), theirs.float())
    for ours, theirs in zip(swiglu(x, fp8=True), quantize_rows(swiglu(x)), strict=True):
        assert torch.equal(ours.float(), theirs.float())
