"""The Triton kernels against float64, at most 1.1 times as far from it as plain PyTorch is.

On CUDA (marker gpu) in bfloat16. In a process with TRITON_INTERPRET=1 the same tests run on the
CPU in float32 and float16, because the interpreter truncates where it should round to bfloat16;
test_interpreter.py starts that process.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.rotary import angles, rotate
from pretrain_kernels.dispatch import is_fused, is_interpreted
from pretrain_kernels.fp8 import SMALLEST_SCALE, Fp8, empty_fp8
from pretrain_kernels.launch import next_power_of_2, num_walkers
from pretrain_kernels.norm_chain import (
    norm_chain,
    norm_chain_backward,
    norm_chain_output,
    reference,
)
from pretrain_kernels.qk_rope import qk_rope_, qk_rope_backward
from pretrain_kernels.quantize_both_ways import quantize_both_ways
from pretrain_kernels.quantize_rows import quantize_rows
from pretrain_kernels.quantize_rows import reference as quantize_reference
from pretrain_kernels.rms_norm import rms_norm, rms_norm_autograd
from pretrain_kernels.swiglu import swiglu, swiglu_backward

EPSILON = 1e-6
NAN = float("nan")
if is_interpreted():
    DEVICE = "cpu"
    DTYPES = [torch.float32, torch.float16]
    # each row is a program of its own, interpreted in milliseconds: more rows show nothing more
    SHAPES = [(1, 96), (7, 760)]
    ROPE_SHAPES = [(1, 1, 5, 96), (2, 7, 11, 96), (1, 71, 3, 10)]
    pytestmark: list[pytest.MarkDecorator] = []
else:
    DEVICE = "cuda"
    DTYPES = [torch.bfloat16, torch.float32]
    SHAPES = [(1, 96), (7, 760), (199, 96), (4096, 5280), (4097, 760)]
    ROPE_SHAPES = [(1, 1, 5, 96), (2, 7, 11, 96), (1, 199, 3, 10), (3, 1371, 55, 96)]
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    ]
# more rows than programs walk over them
WALKED = (137, 5280)

over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
over_shapes = pytest.mark.parametrize(("rows", "width"), SHAPES)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def gain(width: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (1 + 0.2 * draw(width, dtype=torch.float32, seed=seed)).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, NAN, dtype=dtype, device=DEVICE)


def error(value: Tensor, exact: Tensor) -> float:
    assert torch.isfinite(value).all(), "not finite, or not written"
    return ((value.double() - exact).norm() / exact.norm()).item()


def assert_as_exact(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Ours is at most 1.1 times as far from float64 as plain PyTorch in the storage dtype.

    Beside that ratio, 8 roundings of float32: both sum in float32, in orders of their own, and
    a GPU's roots, quotients and exponentials are off by up to 2 units in the last place each.
    Where nothing is rounded to 16 bits, that is all that the errors consist of.
    """
    assert error(ours, exact) <= 1.1 * error(plain, exact) + 8 * 2.0**-24


def eager_norm(x: Tensor, gain_D: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)).to(x.dtype) * gain_D


def test_the_kernels_run_here() -> None:
    assert is_fused(torch.zeros(1, device=DEVICE))
    assert not is_fused(torch.zeros(1, device=DEVICE, dtype=torch.float64))


@over_dtypes
@over_shapes
def test_chain_forward(rows: int, width: int, dtype: torch.dtype) -> None:
    branch, residual = draw(rows, width, dtype=dtype), draw(rows, width, dtype=dtype, seed=1)
    gains = [gain(width, dtype, seed) for seed in (2, 3, 4)]
    before, rstd_N = rms_norm(residual, gains[0], EPSILON)
    ours = norm_chain(
        branch, residual, rstd_N=rstd_N, gain_D=gains[0], gain_a_D=gains[1], gain_b_D=gains[2],
        epsilon=EPSILON, sum_out=poisoned(rows, width, dtype=dtype),
        out=poisoned(rows, width, dtype=dtype),
    )  # fmt: skip
    # x recomputed from (sum, rstd) is x, bit for bit, and so is the sum
    assert torch.equal(ours.sum_ND, branch + before)
    exact = eager_norm(eager_norm(ours.sum_ND.double(), gains[1].double()), gains[2].double())
    plain = eager_norm(eager_norm(ours.sum_ND, gains[1]), gains[2])
    assert_as_exact(ours.out_ND, plain, exact)
    for name, rstd in (("a", ours.rstd_a_N), ("b", ours.rstd_b_N)):
        assert rstd is not None, name
        assert torch.isfinite(rstd).all(), name
    again = norm_chain_output(
        ours.sum_ND, ours.rstd_a_N, gains[1], ours.rstd_b_N, gains[2],
        poisoned(rows, width, dtype=dtype),
    )  # fmt: skip
    assert torch.equal(again, ours.out_ND)
    # given the statistics, every rounding is the plain model's
    assert torch.equal(
        again,
        reference.norm_chain_output(ours.sum_ND, ours.rstd_a_N, gains[1], ours.rstd_b_N, gains[2]),
    )


def check_chain_backward(
    rows: int, width: int, dtype: torch.dtype, *, has_a: bool, has_b: bool, has_dx: bool
) -> None:
    total = draw(rows, width, dtype=dtype)
    gains = [gain(width, dtype, 1), gain(width, dtype, 2)]
    upstream = [draw(rows, width, dtype=dtype, seed=seed) for seed in (3, 4)]

    def gradients(wanted: torch.dtype) -> list[Tensor]:
        leaves = [t.to(wanted).clone().requires_grad_() for t in (total, *gains)]
        x = eager_norm(leaves[0], leaves[1]) if has_a else leaves[0]
        y = eager_norm(x, leaves[2]) if has_b else x
        outputs = [y, x][: 1 + has_dx]
        torch.autograd.backward(outputs, [u.to(wanted) for u in upstream[: 1 + has_dx]])
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    a_D, b_D = gains[0] if has_a else None, gains[1] if has_b else None
    made = norm_chain(None, total, gain_a_D=a_D, gain_b_D=b_D, epsilon=EPSILON)
    da, db = (torch.zeros(width, device=DEVICE) if has else None for has in (has_a, has_b))
    dgains = [buffer for buffer in (da, db) if buffer is not None]

    def ours(out: Tensor) -> Tensor:
        return norm_chain_backward(
            upstream[0], upstream[1] if has_dx else None, total, rstd_a_N=made.rstd_a_N,
            gain_a_D=a_D, rstd_b_N=made.rstd_b_N, gain_b_D=b_D, dgain_a_D=da, dgain_b_D=db,
            out=out,
        )  # fmt: skip

    plain, exact = gradients(dtype), gradients(torch.float64)
    dsum = ours(poisoned(rows, width, dtype=dtype))
    for mine, theirs, truth in zip((dsum, *dgains), plain, exact, strict=True):
        assert_as_exact(mine, theirs, truth)
    # the same bits again, in place; the gains' gradients are added to what is there
    firsts = [buffer.clone() for buffer in dgains]
    assert torch.equal(ours(upstream[0]), dsum)
    for buffer, first in zip(dgains, firsts, strict=True):
        assert torch.equal(buffer, 2 * first)


@over_dtypes
@pytest.mark.parametrize(("has_a", "has_b"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("has_dx", [True, False])
@over_shapes
def test_chain_backward(
    rows: int, width: int, has_dx: bool, has_a: bool, has_b: bool, dtype: torch.dtype
) -> None:
    check_chain_backward(rows, width, dtype, has_a=has_a, has_b=has_b, has_dx=has_dx)


def test_chain_backward_of_more_rows_than_programs() -> None:
    rows, width = WALKED
    assert num_walkers(next_power_of_2(width), rows, programs=1) < rows
    check_chain_backward(rows, width, DTYPES[-1], has_a=True, has_b=True, has_dx=True)


@over_dtypes
def test_chain_in_place_of_its_operands(dtype: torch.dtype) -> None:
    rows, width = 7, 760
    branch, residual = draw(rows, width, dtype=dtype), draw(rows, width, dtype=dtype, seed=1)
    gain_D = gain(width, dtype, 2)
    apart = norm_chain(branch, residual, gain_a_D=gain_D, epsilon=EPSILON)
    buffers = branch.clone(), residual.clone()
    together = norm_chain(
        *buffers, gain_a_D=gain_D, epsilon=EPSILON, sum_out=buffers[1], out=buffers[0]
    )
    assert together.sum_ND is buffers[1]
    for ours, theirs in zip(together[:3], apart[:3], strict=True):
        assert torch.equal(ours, theirs)


@over_dtypes
def test_chain_of_nan_and_of_zeros(dtype: torch.dtype) -> None:
    x, gain_D = draw(3, 96, dtype=dtype), gain(96, dtype, 1)
    x[0] = 0
    x[1, 5] = NAN
    made = norm_chain(x, x, gain_a_D=gain_D, gain_b_D=gain_D, epsilon=EPSILON)
    assert (made.out_ND[0] == 0).all()
    assert made.out_ND[1].isnan().all()
    assert made.out_ND[2].isfinite().all()
    dgain = torch.zeros(96, device=DEVICE)
    dsum = norm_chain_backward(
        x, None, made.sum_ND, rstd_a_N=made.rstd_a_N, gain_a_D=gain_D, rstd_b_N=made.rstd_b_N,
        gain_b_D=gain_D, dgain_b_D=dgain,
    )  # fmt: skip
    assert dsum[1].isnan().all()
    assert dsum[::2].isfinite().all()
    assert dgain.isnan().all()


@over_dtypes
def test_differentiable_norm(dtype: torch.dtype) -> None:
    x = draw(2, 3, 96, dtype=dtype).transpose(0, 1).requires_grad_()
    gain_D = gain(96, dtype, 1).requires_grad_()
    dy = draw(3, 2, 96, dtype=dtype, seed=2)
    y = rms_norm_autograd(x, gain_D, EPSILON)
    ours = [y, *torch.autograd.grad(y, (x, gain_D), dy)]
    plain_y = eager_norm(x, gain_D)
    plain = [plain_y, *torch.autograd.grad(plain_y, (x, gain_D), dy)]
    leaves = x.detach().double().requires_grad_(), gain_D.detach().double().requires_grad_()
    exact_y = eager_norm(*leaves)
    exact = [exact_y, *torch.autograd.grad(exact_y, leaves, dy.double())]
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        assert_as_exact(mine, theirs, truth)


def rope_inputs(
    rows: int, tokens: int, heads: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions = torch.arange(rows * tokens, device=DEVICE).view(rows, tokens) % 4096
    cos, sin = angles(positions, head_width=width, base=50_000.0)
    qkv = draw(rows * tokens, 3, heads, width, dtype=dtype)
    return qkv, draw(2, heads, width, dtype=dtype, seed=1), cos, sin


@over_dtypes
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", ROPE_SHAPES, ids=str)
def test_rope_is_the_model_bit_for_bit(
    shape: tuple[int, int, int, int], has_bias: bool, dtype: torch.dtype
) -> None:
    qkv, bias_2HK, cos, sin = rope_inputs(*shape, dtype)
    bias = bias_2HK if has_bias else None
    expected = qkv.clone()
    for part in (0, 1):
        biased = qkv[:, part] if bias is None else qkv[:, part] + bias[part]
        expected[:, part] = rotate(biased.view(shape), cos, sin).flatten(0, 1)
    angles_NP = cos.flatten(0, 1), sin.flatten(0, 1)
    assert torch.equal(qk_rope_(qkv, bias, *angles_NP), expected)


@over_dtypes
@pytest.mark.parametrize("shape", ROPE_SHAPES, ids=str)
def test_rope_backward(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rows, tokens, heads, width = shape
    qkv, bias, cos, sin = rope_inputs(*shape, dtype)
    # as attention's backward returns them: [B, H, T, K] in memory
    upstream = [
        draw(rows, heads, tokens, width, dtype=dtype, seed=seed).transpose(1, 2)
        for seed in (2, 3, 4)
    ]

    def gradients(wanted: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf, bias_leaf = (t.to(wanted).clone().requires_grad_() for t in (qkv, bias))
        q, k, v = leaf.view(rows, tokens, 3, heads, width).unbind(2)
        turned = rotate(q + bias_leaf[0], cos, sin), rotate(k + bias_leaf[1], cos, sin), v
        torch.autograd.backward(turned, [gradient.to(wanted) for gradient in upstream])
        assert leaf.grad is not None
        assert bias_leaf.grad is not None
        return leaf.grad, bias_leaf.grad

    plain, exact = gradients(dtype), gradients(torch.float64)
    dbias = torch.zeros(2, heads, width, device=DEVICE)
    out = poisoned(*qkv.shape, dtype=dtype)
    angles_NP = cos.flatten(0, 1), sin.flatten(0, 1)
    dqkv = qk_rope_backward(*upstream, *angles_NP, dbias_2HK=dbias, out=out)
    assert dqkv is out
    for ours, theirs, truth in zip((dqkv, dbias), plain, exact, strict=True):
        assert_as_exact(ours, theirs, truth)
    first = dbias.clone()
    packed = [gradient.contiguous() for gradient in upstream]
    assert torch.equal(qk_rope_backward(*packed, *angles_NP, dbias_2HK=dbias), dqkv)
    assert torch.equal(dbias, 2 * first)


@over_dtypes
@over_shapes
def test_swiglu_both_directions(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = draw(rows, 2 * width, dtype=dtype)
    dh = draw(rows, width, dtype=dtype, seed=1)

    def results(wanted: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = gate_up.to(wanted).clone().requires_grad_()
        gate, up = leaf.chunk(2, 1)
        hidden = F.silu(gate) * up
        return hidden, torch.autograd.grad(hidden, leaf, dh.to(wanted))[0]

    plain, exact = results(dtype), results(torch.float64)
    hidden = swiglu(gate_up, out=poisoned(rows, width, dtype=dtype))
    hidden_again = poisoned(rows, width, dtype=dtype)
    out = poisoned(rows, 2 * width, dtype=dtype)
    gradient = swiglu_backward(dh, gate_up, out=out, hidden_out=hidden_again)
    for ours, theirs, truth in zip((hidden, gradient), plain, exact, strict=True):
        assert_as_exact(ours, theirs, truth)
    assert torch.equal(hidden_again, hidden)
    # A rounding to 11 bits or fewer turns out otherwise where 4 roundings of float32 in the
    # exponential cross a tie: for 2 x 4 x 2^-13 of the elements, 0.1 %.
    differing = (hidden != plain[0]).sum().item()
    assert dtype == torch.float32 or differing <= 1 + 0.01 * hidden.numel()
    buffers = gate_up.clone(), dh.clone()
    in_place = swiglu_backward(buffers[1], buffers[0], out=buffers[0], hidden_out=buffers[1])
    assert in_place is buffers[0]
    assert torch.equal(in_place, gradient)
    assert torch.equal(buffers[1], hidden)


@over_dtypes
def test_swiglu_far_from_zero(dtype: torch.dtype) -> None:
    gate_up = torch.tensor([[-3e4, -200.0, -0.0, 200.0, 3e4, NAN] + [1.0] * 6], device=DEVICE)
    hidden = swiglu(gate_up.to(dtype))
    expected = torch.tensor([[0.0, 0.0, 0.0, 200.0, 3e4, NAN]], device=DEVICE).to(dtype)
    torch.testing.assert_close(hidden, expected, equal_nan=True, rtol=0, atol=0)
    gradient = swiglu_backward(torch.ones_like(hidden), gate_up.to(dtype))
    assert gradient[0, :5].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert gradient[0, 5].isnan()


def narrow_buffer(rows: int, width: int) -> Fp8:
    """Where the Triton modules write float8, poisoned.

    The interpreter's cast to float8 drops the carry of a mantissa that rounds up, so there the
    kernels write the float32 values that they would cast, and PyTorch casts them.
    """
    values, scale = empty_fp8(rows, width, torch.device(DEVICE))
    if is_interpreted():
        values = values.to(torch.float32)
    return Fp8(values.fill_(NAN), scale.fill_(NAN))


def assert_same_fp8(ours: Fp8, theirs: Fp8) -> None:
    values = ours.values_ND.to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(values, theirs.values_ND.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours.scale_N1, theirs.scale_N1, rtol=0, atol=0, equal_nan=True)


@over_dtypes
@over_shapes
def test_fp8_is_the_reference_bit_for_bit(rows: int, width: int, dtype: torch.dtype) -> None:
    from pretrain_kernels.norm_chain import triton as fused_chain
    from pretrain_kernels.quantize_rows import triton as fused

    x = draw(rows, width, dtype=dtype) * 10.0 ** draw(rows, 1, dtype=dtype, seed=1)
    x[rows // 2, 3] = NAN
    x[0, :] = 0
    theirs = quantize_reference.quantize_rows(x)
    assert_same_fp8(fused.quantize_rows(x, narrow_buffer(rows, width)), theirs)
    norms = {"gain_a_D": gain(width, dtype, 1), "gain_b_D": gain(width, dtype, 2)}
    made = norm_chain(x, x, **norms, epsilon=EPSILON)
    narrow = fused_chain.norm_chain(
        x, x, **norms, epsilon=EPSILON, out=narrow_buffer(rows, width), fp8=True
    )
    torch.testing.assert_close(narrow.sum_ND, made.sum_ND, rtol=0, atol=0, equal_nan=True)
    assert_close_fp8(narrow.out_ND, quantize_reference.quantize_rows(made.out_ND))


@over_dtypes
@over_shapes
def test_both_ways_are_each_way_bit_for_bit(rows: int, width: int, dtype: torch.dtype) -> None:
    from pretrain_kernels.quantize_both_ways import triton as fused

    x = draw(rows, width, dtype=dtype) * 10.0 ** draw(rows, 1, dtype=dtype, seed=1)
    x[:, 0] = 0
    # 1e-40 is a subnormal number of float32 and of bfloat16, and zero in float16
    x[rows // 2] = 1e-40
    x[rows - 1, 7] = NAN
    x[rows - 1, 5] = math.inf
    ours = fused.quantize_both_ways(x, (narrow_buffer(rows, width), narrow_buffer(width, rows)))
    assert_same_fp8(ours[0], quantize_reference.quantize_rows(x))
    assert_same_fp8(ours[1], quantize_reference.quantize_rows(x.t().contiguous()))


def assert_close_fp8(ours: Fp8, theirs: Fp8) -> None:
    """Equal but where a row's mean square, summed in another order, rounds a tie the other way."""
    # a few units in the last place: the mean square's, the root's and the product's
    torch.testing.assert_close(ours.scale_N1, theirs.scale_N1, rtol=6e-7, atol=0, equal_nan=True)
    values = ours.values_ND.to(torch.float8_e4m3fn).float()
    # neighbours in e4m3: three bits of mantissa, and 2^-9 between the smallest
    torch.testing.assert_close(
        values, theirs.values_ND.float(), rtol=2**-3, atol=2**-9, equal_nan=True
    )
    is_other = (values != theirs.values_ND.float()) & ~values.isnan()
    assert is_other.sum() <= 1e-6 * values.numel() + 1


@over_dtypes
def test_fp8_swiglu_of_a_wide_row(dtype: torch.dtype) -> None:
    from pretrain_kernels.swiglu import triton as fused

    gate_up = draw(3, 2 * 17_920, dtype=dtype)
    # of one row a gate, of another an up
    gate_up[1, 5] = gate_up[2, -5] = NAN
    hidden = swiglu(gate_up)
    ours = fused.swiglu(gate_up, narrow_buffer(3, 17_920), fp8=True)
    assert_same_fp8(ours, quantize_reference.quantize_rows(hidden))


def test_fp8_through_the_front_door() -> None:
    x, gain_D = draw(2, 96, dtype=DTYPES[0]), gain(96, DTYPES[0], 1)
    for made in (
        quantize_rows(x),
        norm_chain(x, x, gain_b_D=gain_D, epsilon=EPSILON, fp8=True).out_ND,
        swiglu(x, fp8=True),
        *quantize_both_ways(x),
    ):
        assert isinstance(made, Fp8)
        assert made.values_ND.dtype == torch.float8_e4m3fn
        assert (made.values_ND.float().abs().amax(1) == 448).all()


@over_dtypes
def test_chain_agrees_with_its_reference(dtype: torch.dtype) -> None:
    x, gain_D = draw(7, 760, dtype=dtype), gain(760, dtype, 1)
    ours = norm_chain(x, x, gain_b_D=gain_D, epsilon=EPSILON)
    theirs = reference.norm_chain(x, x, gain_b_D=gain_D, epsilon=EPSILON)
    assert ours.rstd_a_N is None
    # 8 roundings of float32: 760 squares summed in another order, a root and a division
    torch.testing.assert_close(ours.rstd_b_N, theirs.rstd_b_N, rtol=8 * 2.0**-24, atol=0)


@over_dtypes
def test_no_rows_at_all(dtype: torch.dtype) -> None:
    x, gain_D = draw(0, 96, dtype=dtype), gain(96, dtype, 1)
    made = norm_chain(x, x, gain_a_D=gain_D, epsilon=EPSILON)
    assert made.out_ND.shape == (0, 96)
    dgain = torch.zeros(96, device=DEVICE)
    norm_chain_backward(
        x, None, x, rstd_a_N=made.rstd_a_N, gain_a_D=gain_D, rstd_b_N=None, gain_b_D=None,
        dgain_a_D=dgain,
    )  # fmt: skip
    assert (dgain == 0).all()
    assert swiglu(draw(0, 8, dtype=dtype), fp8=True).values_ND.shape == (0, 4)
    by_row, by_column = quantize_both_ways(x)
    assert by_row.scale_N1.shape == (0, 1)
    assert (by_column.scale_N1 == SMALLEST_SCALE).all()


@pytest.mark.skipif(is_interpreted(), reason="4 GiB a tensor")
def test_sizes_past_two_to_the_31() -> None:
    # 2^31 + 2^19 elements; the last rows lie beyond what 32 bits count
    width, dtype = 8192, torch.bfloat16
    rows = 2**18 + 64
    last = slice(rows - 64, rows)
    x = torch.zeros(rows, width, dtype=dtype, device=DEVICE)
    x[last] = draw(64, width, dtype=dtype)
    gain_D = gain(width, dtype, 1)
    made = norm_chain(x[last].clone(), x[last].clone(), gain_a_D=gain_D, epsilon=EPSILON)
    whole = norm_chain(x, x, gain_a_D=gain_D, epsilon=EPSILON)
    assert torch.equal(whole.sum_ND[last], made.sum_ND)
    assert torch.equal(whole.out_ND[last], made.out_ND)
    norm = {"gain_a_D": gain_D, "rstd_b_N": None, "gain_b_D": None}
    again = norm_chain_output(whole.sum_ND, whole.rstd_a_N, **norm)
    assert torch.equal(again, whole.out_ND)
    del again
    dsum = norm_chain_backward(x, None, x, rstd_a_N=whole.rstd_a_N, **norm, out=whole.out_ND)
    part = x[last].clone()
    rstd_N = whole.rstd_a_N[last].clone()
    assert torch.equal(dsum[last], norm_chain_backward(part, None, part, rstd_a_N=rstd_N, **norm))
    del whole, dsum
    assert torch.equal(swiglu(x)[last], swiglu(part))
    dh = torch.zeros(rows, width // 2, dtype=dtype, device=DEVICE)
    dh[last] = draw(64, width // 2, dtype=dtype, seed=2)
    few = dh[last].clone()
    assert torch.equal(swiglu_backward(dh, x)[last], swiglu_backward(few, part))
    assert_same_fp8(Fp8(*(t[last] for t in quantize_rows(x))), quantize_rows(part))
    by_row, by_column = quantize_both_ways(x)
    assert_same_fp8(Fp8(*(t[last] for t in by_row)), quantize_rows(part))
    # one program holds a row of quantize_rows, so PyTorch does the long columns
    columns = quantize_reference.quantize_rows(x[:, -4:].t().contiguous())
    assert_same_fp8(Fp8(*(t[-4:] for t in by_column)), columns)
    del by_row, by_column
    # 3 x 8,192 values a token; qk_rope_ writes in place
    tokens = rows // 3
    cos, sin = angles(torch.arange(tokens, device=DEVICE)[None], head_width=128, base=50_000.0)
    qkv = x.view(-1)[-tokens * 3 * 8192 :].view(tokens, 3, 64, 128)
    end = slice(tokens - 8, tokens)
    angles_NP, end_angles = (cos[0], sin[0]), (cos[0, end].clone(), sin[0, end].clone())
    expected = qk_rope_(qkv[end].clone(), None, *end_angles)
    assert torch.equal(qk_rope_(qkv, None, *angles_NP)[end], expected)
    gradients = [qkv[:, part_of_three][None] for part_of_three in range(3)]
    ends = [gradient[:, end].clone() for gradient in gradients]
    packed = qk_rope_backward(*gradients, *angles_NP)
    assert torch.equal(packed[end], qk_rope_backward(*ends, *end_angles))
