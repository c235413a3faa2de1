"""AdamW is torch's, on whole tensors and on any partition of them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pretrain.optim.adamw import AdamW
from pretrain.optim.part_norms import PartNorms
from pretrain.optim.slices import Fragment, Layout, Partition, TensorInfo
from pretrain_kernels.adamw import reference

SHAPES = {"core.W": (6, 8), "coda.norm.gain": (8,)}
NUMEL = 56
RATE, DECAY = 3e-3, 0.1
FACTORS = (0.25, 0.5, 1.0, 1.0, 0.5)


def drawn(dtype: torch.dtype) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Weights, and their gradients of each step, of very different sizes."""
    random = torch.Generator().manual_seed(0)

    def once(scale: float) -> list[Tensor]:
        return [
            scale * torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
            for shape in SHAPES.values()
        ]

    return once(1.0), [once(10.0**-step) for step in range(len(FACTORS))]


def torch_trajectory(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """After each step: weights, means and squares, each in one line. The vector does not decay."""
    weights, gradients = drawn(dtype)
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters[:1], "weight_decay": DECAY},
            {"params": parameters[1:], "weight_decay": 0.0},
        ],
        lr=RATE, betas=(0.9, 0.95), eps=1e-8, foreach=False,
    )  # fmt: skip
    for factor, given in zip(FACTORS, gradients, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor
        for parameter, gradient in zip(parameters, given, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        states = [optimizer.state[parameter] for parameter in parameters]
        yield (
            in_line(parameters),
            in_line([state["exp_avg"] for state in states]),
            in_line([state["exp_avg_sq"] for state in states]),
        )


def in_line(tensors: list[Tensor] | list[torch.nn.Parameter]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_whole_tensors_follow_torch_to_the_bit(dtype: torch.dtype) -> None:
    weights, gradients = drawn(dtype)
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    optimizer = AdamW(
        [
            {"params": parameters[:1], "weight_decay": DECAY},
            {"params": parameters[1:], "weight_decay": 0.0},
        ],
        lr=RATE, weight_decay=DECAY,
    )  # fmt: skip
    for factor, given, wanted in zip(FACTORS, gradients, torch_trajectory(dtype), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor
        for parameter, gradient in zip(parameters, given, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        states = [optimizer.state[parameter] for parameter in parameters]
        assert torch.equal(in_line(parameters), wanted[0])
        assert torch.equal(in_line([state["exp_avg"] for state in states]), wanted[1])
        assert torch.equal(in_line([state["exp_avg_sq"] for state in states]), wanted[2])


class Sharded:
    """Both tensors in one line, padded with NaN and cut into equal partitions, one a rank."""

    def __init__(self, ranks: int, padding: int) -> None:
        self.padding = torch.full((padding,), torch.nan)
        self.infos = tuple(TensorInfo(name, shape) for name, shape in SHAPES.items())
        flat = torch.cat([in_line(drawn(torch.float32)[0]), self.padding])
        assert len(flat) % ranks == 0
        self.flats = [part.clone().requires_grad_() for part in flat.chunk(ranks)]
        self.optimizers = [self.optimizer_of(part) for part in self.flats]
        for rank, (part, optimizer) in enumerate(zip(self.flats, self.optimizers, strict=True)):
            partition = Partition(part, self.infos, self.fragments(rank))
            optimizer.layout = Layout([partition], lambda _: None)

    @staticmethod
    def optimizer_of(part: Tensor) -> AdamW:
        return AdamW([part], lr=RATE, weight_decay=DECAY)

    def fragments(self, rank: int) -> tuple[Fragment, ...]:
        size, start, found = len(self.flats[0]), 0, []
        for tensor, info in enumerate(self.infos):
            low, high = max(start, rank * size), min(start + info.numel, (rank + 1) * size)
            if low < high:
                found.append(Fragment(tensor, low - start, low - rank * size, high - low))
            start += info.numel
        return tuple(found)

    def step(self, gradients: list[Tensor], rate: float) -> None:
        flat = torch.cat([in_line(gradients), self.padding])
        for part, gradient, optimizer in zip(
            self.flats, flat.chunk(len(self.flats)), self.optimizers, strict=True
        ):
            part.grad = gradient.clone()
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()

    def whole(self) -> Tensor:
        return torch.cat([part.detach() for part in self.flats])


@pytest.mark.parametrize(("ranks", "padding"), [(1, 0), (2, 0), (4, 0), (3, 1), (8, 24)])
def test_any_partition_gives_the_unsharded_update(ranks: int, padding: int) -> None:
    one, many = Sharded(1, 0), Sharded(ranks, padding)
    for factor, gradients in zip(FACTORS, drawn(torch.float32)[1], strict=True):
        for each in (one, many):
            each.step(gradients, RATE * factor)
        # vectorized code and that for the rest of a piece may fuse a product and a sum, or not
        torch.testing.assert_close(many.whole()[:NUMEL], one.whole(), rtol=2.4e-7, atol=1e-10)
        pairs = zip(many.optimizers, many.flats, strict=True)
        squares = torch.stack([optimizer.squares[flat] for optimizer, flat in pairs]).sum(0)
        wanted = torch.stack([gradient.double().square().sum() for gradient in gradients])
        # fp64 sums in another order
        torch.testing.assert_close(squares, wanted, rtol=1e-14, atol=0)
    # padding is never touched, whatever its gradient
    assert many.whole()[NUMEL:].isnan().all()
    for optimizer in many.optimizers:
        for state in optimizer.state.values():
            assert state["exp_avg"].isfinite().all()


def test_a_new_optimizer_goes_on_from_saved_state() -> None:
    straight, resumed = Sharded(2, 0), Sharded(2, 0)
    steps = list(zip(FACTORS, drawn(torch.float32)[1], strict=True))
    for number, (factor, gradients) in enumerate(steps):
        straight.step(gradients, RATE * factor)
        if number in (1, 3):
            old = resumed
            resumed = Sharded(2, 0)
            for before, after, source, target in zip(
                old.flats, resumed.flats, old.optimizers, resumed.optimizers, strict=True
            ):
                after.data.copy_(before)
                state = source.state[before]
                assert state["step"].dtype == torch.float32
                assert float(state["step"]) == number
                target.state[after] = {key: value.clone() for key, value in state.items()}
        resumed.step(gradients, RATE * factor)
    assert torch.equal(straight.whole(), resumed.whole())


def test_a_held_step_changes_nothing_but_is_measured() -> None:
    sharded = Sharded(1, 0)
    [optimizer], [flat] = sharded.optimizers, sharded.flats
    assert optimizer.layout is not None
    norms = PartNorms(optimizer, optimizer.layout)
    gradients = drawn(torch.float32)[1]
    sharded.step(gradients[0], RATE)
    before = sharded.whole(), {k: v.clone() for k, v in optimizer.state[flat].items()}
    for is_held in (True, False):
        optimizer.is_held = is_held
        norms.begin()
        sharded.step(gradients[1], RATE)
        found = norms.take()
        # of what came now, not of the last update: its gradient is ten times as large
        for name, gradient in zip(("core", "coda"), gradients[1], strict=True):
            wanted = float(gradient.double().norm())
            assert found[f"gradient/norm_{name}"] == pytest.approx(wanted, rel=1e-6)
        if is_held:
            assert torch.equal(sharded.whole(), before[0])
            assert all(torch.equal(optimizer.state[flat][k], v) for k, v in before[1].items())
    assert not torch.equal(sharded.whole(), before[0])


def test_squares_are_not_summed_again_where_the_update_has_summed_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sharded = Sharded(1, 0)
    [optimizer] = sharded.optimizers
    assert optimizer.layout is not None
    norms = PartNorms(optimizer, optimizer.layout)
    read = []
    monkeypatch.setattr(norms, "_add_gradient", read.append)
    norms.begin()
    sharded.step(drawn(torch.float32)[1][0], RATE)
    assert read == []
    assert norms.take()["gradient/norm_core"] > 0


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Tensor:
        sharded = Sharded(1, 0)
        for gradients in drawn(torch.float32)[1]:
            sharded.step(gradients, RATE)
        return sharded.whole()

    whole = run()
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 7)
    # as in partitions
    torch.testing.assert_close(run(), whole, rtol=1.2e-7, atol=0)
