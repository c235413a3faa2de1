"""Optimizers on flat partitions: spans cover every element once, kernels against float64.

Tests marked gpu run on CUDA, or on the CPU in Triton's interpreter: test_interpreter.py starts
that process.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pretrain.optim.adamw import AdamW
from pretrain.optim.ellis_adam import EllisAdam
from pretrain.testing import load_module
from pretrain_kernels.adamw import adamw_
from pretrain_kernels.add_gradient import add_gradient
from pretrain_kernels.dispatch import has_triton, is_interpreted
from pretrain_kernels.ellis_adam import reference, update_moments, update_weights
from pretrain_kernels.spans import SPAN_ELEMENTS, Piece, Spans
from pretrain_kernels.square_sums import square_sums

needs_kernels = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() or is_interpreted()), reason="no GPU, not interpreted"
    ),
]
DEVICE = torch.device("cpu" if is_interpreted() else "cuda")
# between tensors and at both ends lies padding; one tensor is missing, one is in two pieces
PIECES = (
    Piece(2, 3, 17),
    Piece(0, 40, 2 * SPAN_ELEMENTS),
    Piece(3, 33_000, 999),
    Piece(2, 34_001, 7),
)
NUM_TENSORS, LENGTH = 4, 34_100
MOMENTS = {"beta1": 0.9, "beta2": 0.95, "floor": 1e-2}
WEIGHTS = {"keep": 0.99, "correction": 1.7}
ADAMW = {
    "rate": 3e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "step": 3
}  # fmt: skip


def spans_on(device: torch.device | str) -> Spans:
    return Spans(PIECES, NUM_TENSORS, torch.device(device))


def state(device: torch.device | str = "cpu") -> list[Tensor]:
    """weight, gradient, mean, square: float32, NaN where there is padding."""
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(LENGTH, generator=random) for _ in range(4)]
    tensors[3].square_()
    # some squares come to lie below the floor
    tensors[1][40:140] *= 1e-4
    tensors[3][40:140] *= 1e-8
    for tensor in tensors:
        tensor[~is_owned()] = torch.nan
    return [tensor.to(device) for tensor in tensors]


def is_owned() -> Tensor:
    owned = torch.zeros(LENGTH, dtype=torch.bool)
    for piece in PIECES:
        owned[piece.start : piece.start + piece.numel] = True
    return owned


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


@given(
    sizes=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 40_000), st.integers(0, 20_000)), max_size=6
    )
)
def test_spans_cover_every_element_of_a_piece_once(sizes: list[tuple[int, int, int]]) -> None:
    pieces, position = [], 0
    for tensor, numel, padding in sizes:
        pieces.append(Piece(tensor, position + padding, numel))
        position += padding + numel
    spans = Spans(pieces, 4, torch.device("cpu"))
    owner = torch.full((position,), -1)
    for piece in pieces:
        owner[piece.start : piece.start + piece.numel] = piece.tensor
    covered = torch.full((position,), -1)
    for number, low, high, tensor in spans.table_S4.tolist():
        assert 0 <= low < high <= SPAN_ELEMENTS
        part = covered[number * SPAN_ELEMENTS + low : number * SPAN_ELEMENTS + high]
        assert len(part) == high - low
        assert (part == -1).all()
        part.fill_(tensor)
    assert torch.equal(covered, owner)
    bounds = spans.bounds_T1.tolist()
    assert bounds[0] == 0
    for tensor in range(4):
        rows = spans.table_S4[bounds[tensor] : bounds[tensor + 1], 3]
        assert (rows == tensor).all()
    assert bounds[4] == len(spans.table_S4)


def test_moments_and_sums_follow_the_rule() -> None:
    _, gradient, mean, square = state()
    g, m, v = doubled([gradient, mean, square])
    sums = update_moments(gradient, mean, square, spans_on("cpu"), is_start=False, **MOMENTS)
    m = 0.9 * m + 0.1 * g
    v = (0.95 * v + 0.05 * g * g).clamp(min=1e-4)
    torch.testing.assert_close(mean.double(), m, rtol=1e-6, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(square.double(), v, rtol=1e-6, atol=0, equal_nan=True)
    ratio = (g * g / v).nan_to_num()
    parts = [ratio[piece.start : piece.start + piece.numel].sum() for piece in PIECES]
    expected = torch.stack([parts[1], torch.zeros_like(parts[0]), parts[0] + parts[3], parts[2]])
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0)


def test_a_factor_is_as_if_the_gradient_were_smaller() -> None:
    results = []
    for factor in (0.3, 1.0):
        _, gradient, mean, square = state()
        given = gradient.clone() if factor == 0.3 else gradient * 0.3
        before = given.clone()
        sums = update_moments(
            given, mean, square, spans_on("cpu"), is_start=False, factor=factor, **MOMENTS
        )
        assert torch.equal(given.nan_to_num(), before.nan_to_num())
        results.append(torch.cat([sums, mean.nan_to_num().double(), square.nan_to_num().double()]))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounded_weights_are_what_a_copy_gives(dtype: torch.dtype) -> None:
    weight, _, mean, square = state()
    rounded = torch.full((LENGTH,), 7.0, dtype=dtype)
    etas = torch.full((NUM_TENSORS,), 0.1)
    update_weights(weight, mean, square, etas, spans_on("cpu"), rounded=rounded, **WEIGHTS)
    expected = torch.where(is_owned(), weight.to(dtype), 7.0)
    assert torch.equal(rounded, expected)


def test_sums_of_squares_do_not_overflow() -> None:
    gradient = torch.tensor([3.0, 4.0, 3e38, 3e38, 1.0])
    spans = Spans([Piece(2, 0, 2), Piece(0, 2, 2)], 3, torch.device("cpu"))
    expected = torch.tensor([2 * float(gradient[2]) ** 2, 0.0, 25.0], dtype=torch.float64)
    torch.testing.assert_close(square_sums(gradient, spans), expected, rtol=1e-15, atol=0)


def test_a_first_gradient_starts_its_sum_and_the_next_is_added() -> None:
    random = torch.Generator().manual_seed(0)
    total = torch.full((100,), torch.nan)
    first, second = (torch.randn(100, generator=random).bfloat16() for _ in range(2))
    add_gradient(total, first, is_first=True)
    assert torch.equal(total, first.float())
    add_gradient(total, second, is_first=False)
    assert torch.equal(total, first.float() + second.float())


def test_adamw_follows_torch() -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(100, generator=random, dtype=torch.float64)
    theirs = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    spans = Spans([Piece(0, 0, 60), Piece(1, 60, 40)], 2, torch.device("cpu"))
    for step in (1, 2, 3):
        theirs.grad = torch.randn(100, generator=random, dtype=torch.float64)
        optimizer.step()
        sums = adamw_(weight, theirs.grad, mean, square, spans, **ADAMW | {"step": step})
        torch.testing.assert_close(weight, theirs.data, rtol=1e-13, atol=1e-14)
        parts = theirs.grad.square().split([60, 40])
        torch.testing.assert_close(sums, torch.stack([part.sum() for part in parts]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update(mean=t["mean"][:-1]), r"mean has shape \(34099,\)"),
        (lambda t: t.update(mean=t["mean"].repeat(2)[::2]), r"mean .* strides \(2,\)"),
        (lambda t: t.update(square=t["square"].double()), "square is torch.float64, gradient is"),
        (lambda t: t.update({k: t[k][:34_000] for k in t}), "reach element 34008, .* has 34000"),
        (lambda t: t.update(mean=t["mean"].to("meta")), "mean is on meta, gradient on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change, said: str) -> None:
    tensors = dict(zip(("gradient", "mean", "square"), state()[1:], strict=True))
    change(tensors)
    with pytest.raises(ValueError, match=said):
        update_moments(**tensors, spans=spans_on("cpu"), is_start=False, **MOMENTS)


def test_what_does_not_fit_a_partition_is_refused() -> None:
    weight, gradient, mean, square = state()
    for etas in (torch.ones(3), torch.ones(4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="one for each of 4 tensors"):
            update_weights(weight, mean, square, etas, spans_on("cpu"), **WEIGHTS)
    etas = torch.ones(NUM_TENSORS)
    for rounded in (weight.bfloat16()[:-1], weight.bfloat16().to("meta"), weight.int()):
        with pytest.raises(ValueError, match="ellis_adam: rounded"):
            update_weights(weight, mean, square, etas, spans_on("cpu"), rounded=rounded, **WEIGHTS)
    with pytest.raises(ValueError, match=r"\(34099,\) on cpu; it must be as total, \(34100,\)"):
        add_gradient(weight, gradient[:-1], is_first=True)
    with pytest.raises(ValueError, match=r"total of shape \(17050,\) has strides \(2,\)"):
        add_gradient(weight[::2], gradient[::2], is_first=True)
    with pytest.raises(ValueError, match="step=0, but steps are counted from 1"):
        adamw_(weight, gradient, mean, square, spans_on("cpu"), **ADAMW | {"step": 0})
    short = weight.bfloat16()[:-1]
    with pytest.raises(ValueError, match="adamw: rounded"):
        adamw_(weight, gradient, mean, square, spans_on("cpu"), rounded=short, **ADAMW)
    with pytest.raises(ValueError, match="does not fit 4 tensors"):
        Spans([Piece(4, 0, 1)], 4, torch.device("cpu"))


class TestKernels:
    pytestmark = needs_kernels

    @pytest.mark.parametrize("is_start", [True, False])
    def test_moments_equal_float64(self, is_start: bool) -> None:
        _, gradient, mean, square = state(DEVICE)
        if is_start:
            # what the moments hold does not matter
            mean.fill_(torch.nan)
            square.fill_(torch.nan)
        exact = doubled([gradient, mean, square])
        spans = spans_on(DEVICE)
        options = MOMENTS | {"is_start": is_start, "factor": 0.6}
        expected = reference.update_moments(*exact, spans, **options)
        sums = update_moments(gradient, mean, square, spans, **options)
        # at most four float32 roundings each, of numbers of which the larger is below 5; those of
        # the factor and of the product with it count twice in a square
        torch.testing.assert_close(mean.double(), exact[1], rtol=2e-7, atol=5e-7, equal_nan=True)
        torch.testing.assert_close(square.double(), exact[2], rtol=6e-7, atol=0, equal_nan=True)
        torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("rounds", [True, False])
    def test_weights_equal_float64(self, rounds: bool) -> None:
        weight, _, mean, square = state(DEVICE)
        exact = doubled([weight, mean, square])
        etas = torch.tensor([0.1, 0.2, 0.3, 0.4], device=DEVICE)
        spans = spans_on(DEVICE)
        # fp16 in the interpreter, which truncates where it makes bf16
        half = torch.float16 if is_interpreted() else torch.bfloat16
        rounded = torch.full((LENGTH,), 7.0, dtype=half, device=DEVICE) if rounds else None
        reference.update_weights(*exact, etas, spans, **WEIGHTS)
        update_weights(weight, mean, square, etas, spans, rounded=rounded, **WEIGHTS)
        if rounded is not None:
            owned = is_owned().to(DEVICE)
            assert torch.equal(rounded, torch.where(owned, weight.to(half), 7.0))
        torch.testing.assert_close(weight.double(), exact[0], rtol=2e-7, atol=5e-7, equal_nan=True)

    def test_square_sums_equal_float64(self) -> None:
        gradient = state(DEVICE)[1]
        spans = spans_on(DEVICE)
        # a float64 gradient takes the reference
        expected = square_sums(gradient.double(), spans)
        assert expected[1] == 0
        torch.testing.assert_close(square_sums(gradient, spans), expected, rtol=1e-14, atol=0)
        gradient[33_500] = torch.nan
        assert square_sums(gradient, spans).isnan().tolist() == [False, False, False, True]

    @pytest.mark.parametrize("numel", [1, 2048, 5000])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_gradients_are_added_in_float32(self, numel: int, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(0)
        first, second = (torch.randn(numel, generator=random).to(DEVICE, dtype) for _ in range(2))
        room = torch.full((numel + 1,), torch.nan, device=DEVICE)
        total = room[:numel]
        add_gradient(total, first, is_first=True)
        assert torch.equal(total, first.float())
        add_gradient(total, second, is_first=False)
        assert torch.equal(total, first.float() + second.float())
        assert room[numel].isnan()

    @pytest.mark.parametrize("rounds", [True, False])
    def test_adamw_equals_float64(self, rounds: bool) -> None:
        tensors = state(DEVICE)
        exact = doubled(tensors)
        spans = spans_on(DEVICE)
        # fp16 in the interpreter, which truncates where it makes bf16
        half = torch.float16 if is_interpreted() else torch.bfloat16
        rounded = torch.full((LENGTH,), 7.0, dtype=half, device=DEVICE) if rounds else None
        # a float64 partition takes the reference; float32 holds 0.625 exactly
        options = ADAMW | {"factor": 0.625}
        expected = adamw_(*exact, spans, **options)
        sums = adamw_(*tensors, spans, rounded=rounded, **options)
        if rounded is not None:
            owned = is_owned().to(DEVICE)
            assert torch.equal(rounded, torch.where(owned, tensors[0].to(half), 7.0))
        for got, wanted in zip(tensors, exact, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=5e-7, atol=5e-7, equal_nan=True)
        # the factor's product is rounded before it is squared
        torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0)

    def test_angles_are_right_to_a_few_units_in_the_last_place(self) -> None:
        exponents = torch.linspace(-18, 18, 701, dtype=torch.float64)
        roots = torch.tensor([1e-6, 1.0, 3e4], dtype=torch.float64)[:, None]
        mean = (torch.exp(exponents) * roots).flatten().float()
        mean = torch.cat([mean, -mean, torch.zeros(3)])
        square = roots.expand(3, 701).flatten().repeat(2)
        square = torch.cat([square, torch.tensor([0.0, 1.0, 5.0])]).square().float()
        spans = Spans([Piece(0, 0, len(mean))], 1, DEVICE)
        angle = torch.zeros(len(mean), device=DEVICE)
        update_weights(
            angle, mean.to(DEVICE), square.to(DEVICE), torch.tensor([-1.0], device=DEVICE), spans,
            keep=0.0, correction=1.0,
        )  # fmt: skip
        exact = torch.atan2(mean.double(), square.double().sqrt())
        # root, two divisions and the polynomial: 1 to 2 units of 1.2e-7 each
        torch.testing.assert_close(angle.cpu().double(), exact, rtol=8e-7, atol=0)

    def test_nan_stays_in_its_tensor(self) -> None:
        weight, gradient, mean, square = state(DEVICE)
        gradient[33_500] = torch.nan
        spans = spans_on(DEVICE)
        sums = update_moments(gradient, mean, square, spans, is_start=False, **MOMENTS)
        assert sums.isnan().tolist() == [False, False, False, True]
        etas = torch.ones(NUM_TENSORS, device=DEVICE)
        update_weights(weight, mean, square, etas, spans, **WEIGHTS)
        nan = weight.isnan().cpu() & is_owned()
        assert nan.nonzero().flatten().tolist() == [33_500]

    def test_twice_gives_the_same_bits(self) -> None:
        results = []
        for _ in range(2):
            weight, gradient, mean, square = state(DEVICE)
            spans = spans_on(DEVICE)
            sums = update_moments(gradient, mean, square, spans, is_start=False, **MOMENTS)
            norms = adamw_(weight, gradient, mean, square, spans, **ADAMW)
            results.append(torch.cat([sums, norms, weight.nan_to_num().double()]))
        assert torch.equal(*results)

    def test_sums_do_not_depend_on_the_cut(self) -> None:
        gradient, mean, square = (tensor[40:32_808].clone() for tensor in state(DEVICE)[1:])
        whole = Spans([Piece(0, 0, len(gradient))], 1, DEVICE)
        expected = update_moments(
            gradient, mean.clone(), square.clone(), whole, is_start=False, **MOMENTS
        )
        total = torch.zeros_like(expected)
        for first, end in ((0, 12_345), (12_345, 32_768)):
            part = [tensor[first:end].clone() for tensor in (gradient, mean, square)]
            spans = Spans([Piece(0, 0, end - first)], 1, DEVICE)
            total += update_moments(*part, spans, is_start=False, **MOMENTS)
        torch.testing.assert_close(total, expected, rtol=1e-14, atol=0)

    def test_a_partition_without_elements_has_sums_of_zero(self) -> None:
        spans = Spans([], 2, DEVICE)
        none = torch.empty(0, device=DEVICE)
        sums = update_moments(none, none, none, spans, is_start=True, **MOMENTS)
        assert sums.tolist() == [0.0, 0.0]

    @pytest.mark.parametrize(
        "build",
        [
            partial(EllisAdam, update_clipping=True),
            partial(EllisAdam, update_clipping=False),
            AdamW,
        ],
    )
    def test_the_optimizer_follows_float64(self, build: Callable[..., Any]) -> None:
        results = []
        for dtype in (torch.float32, torch.float64):
            random = torch.Generator().manual_seed(0)
            shapes = ((130, 129), (77,))
            weights = [
                torch.randn(shape, generator=random).to(DEVICE, dtype).requires_grad_()
                for shape in shapes
            ]
            optimizer = build(weights, lr=3e-3, weight_decay=0.05)
            for step in range(5):
                for weight in weights:
                    gradient = torch.randn(weight.shape, generator=random) * 4.0**step
                    weight.grad = gradient.to(DEVICE, dtype)
                optimizer.step()
            results.append(torch.cat([weight.detach().flatten().double() for weight in weights]))
        # five updates, each rounded a few times at the size of the weight, below 5
        torch.testing.assert_close(*results, rtol=1e-6, atol=2e-6)


class TestFarIn:
    """Elements beyond what 32 bits count; in the interpreter, which has no such memory, near 0."""

    pytestmark = needs_kernels
    # cut alike: spans lie at multiples of 2^14
    NEAR = 5
    START = 6 if is_interpreted() else (1 << 31) + NEAR
    NUMEL = 3 * SPAN_ELEMENTS

    @pytest.mark.parametrize("op", ["ellis_adam", "adamw", "square_sums"])
    def test_partitions_are_read_and_written_where_they_should(self, op: str) -> None:
        results = []
        for start in (self.START, self.NEAR):
            random = torch.Generator(DEVICE).manual_seed(0)
            tensors = [torch.zeros(start + self.NUMEL + 100, device=DEVICE) for _ in range(4)]
            tails = [tensor.narrow(0, start, self.NUMEL) for tensor in tensors]
            for tail in tails:
                tail.uniform_(0.5, 1.5, generator=random)
            sums = self.run(op, tensors, Spans([Piece(0, start, self.NUMEL)], 1, DEVICE))
            results.append([sums, *(tail.clone() for tail in tails)])
            # nothing else was written
            assert [int(tensor.count_nonzero()) for tensor in tensors] == [self.NUMEL] * 4
        for far, near in zip(*results, strict=True):
            # sums of float64, cut otherwise in the interpreter
            torch.testing.assert_close(far, near, rtol=1e-14 if far.numel() == 1 else 0, atol=0)

    def test_gradients_are_added_where_they_should(self) -> None:
        total = torch.zeros(self.START + self.NUMEL, device=DEVICE)
        gradient = torch.zeros(len(total), dtype=torch.float16, device=DEVICE)
        gradient[self.START :] = torch.arange(self.NUMEL, device=DEVICE) % 2000 + 1
        for count in (1, 2):
            add_gradient(total, gradient, is_first=count == 1)
            assert torch.equal(total[self.START :], count * gradient[self.START :].float())
            assert int(total.count_nonzero()) == self.NUMEL

    def run(self, op: str, tensors: list[Tensor], spans: Spans) -> Tensor:
        """The sums of a call of the op on weight, gradient and moments."""
        weight, gradient, mean, square = tensors
        if op == "square_sums":
            return square_sums(gradient, spans)
        if op == "adamw":
            return adamw_(weight, gradient, mean, square, spans, **ADAMW)
        sums = update_moments(gradient, mean, square, spans, is_start=False, **MOMENTS)
        etas = torch.full((1,), 0.1, device=DEVICE)
        update_weights(weight, mean, square, etas, spans, **WEIGHTS)
        return sums


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
@pytest.mark.skipif(is_interpreted(), reason="compiles")
@pytest.mark.parametrize(
    ("name", "loads", "stores", "registers"),
    [
        ("start", 1, 2, 64), ("moments", 3, 2, 64), ("weights", 3, 1, 40), ("adamw", 4, 3, 80),
        ("adamw rounded", 4, 3.5, 96), ("rounded", 3, 1.5, 64), ("first", 1, 2, 40),
        ("added", 3, 2, 64), ("squares", 16, 0, 64),
    ],
)  # fmt: skip
def test_compiled_for_hopper(
    name: str, loads: int, stores: float, registers: int, tmp_path: Path, monkeypatch
) -> None:
    from pretrain_kernels import spans_triton
    from pretrain_kernels.adamw import triton as adamw
    from pretrain_kernels.add_gradient import triton as adding
    from pretrain_kernels.ellis_adam import triton as ellis
    from pretrain_kernels.square_sums import triton as squares

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = load_module(Path(__file__).with_name("launches.py"))
    weight, gradient, mean, square = (torch.empty(LENGTH, device="meta") for _ in range(4))
    half = torch.empty(LENGTH, dtype=torch.bfloat16, device="meta")
    etas, spans = torch.empty(NUM_TENSORS, device="meta"), spans_on("meta")
    tensors = (gradient, mean, square, spans)
    calls = {
        "start": lambda: ellis.update_moments(*tensors, is_start=True, **MOMENTS),
        "moments": lambda: ellis.update_moments(*tensors, is_start=False, **MOMENTS),
        "weights": lambda: ellis.update_weights(weight, mean, square, etas, spans, **WEIGHTS),
        "rounded": lambda: ellis.update_weights(
            weight, mean, square, etas, spans, rounded=half, **WEIGHTS
        ),
        "adamw": lambda: adamw.adamw_(weight, *tensors, **ADAMW),
        "adamw rounded": lambda: adamw.adamw_(weight, *tensors, rounded=half, **ADAMW),
        "first": lambda: adding.add_gradient(weight, half, is_first=True),
        "added": lambda: adding.add_gradient(weight, half, is_first=False),
        "squares": lambda: squares.square_sums(gradient, spans),
    }
    with (
        launches.recorded(ellis) as of_ellis,
        launches.recorded(adamw) as of_adamw,
        launches.recorded(adding) as of_adding,
        launches.recorded(squares) as of_squares,
        launches.recorded(spans_triton) as of_sums,
    ):
        calls[name]()
    (launch,) = of_ellis + of_adamw + of_adding + of_squares
    machine = launches.compiled(launch)
    assert machine.spilled_accesses == 0
    assert machine.registers <= registers
    # 1024 numbers of 4 bytes over 128 threads: two accesses of 16 bytes of each array, one of a
    # bf16 one; adding takes 2048 numbers; sums of squares have their loop of 16 rolled out
    assert machine.vector_loads == 2 * loads
    assert machine.vector_stores == 2 * stores
    sums = {"start", "moments", "adamw", "adamw rounded", "squares"}
    assert len(of_sums) == (name in sums)
    assert all(launches.compiled(each).spilled_accesses == 0 for each in of_sums)
