from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pretrain.optim.ellis_adam import EllisAdam
from pretrain.optim.slices import Fragment, Layout, Partition, TensorInfo
from pretrain_kernels.ellis_adam import reference

GOLDEN = Path(__file__).parents[1] / "golden" / "optimizer.safetensors"
FACTORS = [0.25, 0.5, 0.75, 1, 1, 0.5]
CASES = {"final": (4e-5, 4e-5), "amplified": (3e-3, 0.05)}
# Each update is a handful of fp32 roundings of numbers below 1 (the parameters); the file's own
# README puts the rule within 2.4e-7 of the reference.
RTOL, ATOL = 1e-6, 3e-7


def load(case: str) -> dict[str, torch.Tensor]:
    with safe_open(str(GOLDEN), "pt") as file:
        return {
            key.removeprefix(case + "."): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118
            if key.startswith(case + ".")
        }


def optimizer_for(case: str, decayed: torch.Tensor, undecayed: torch.Tensor) -> EllisAdam:
    rate, decay = CASES[case]
    groups = [
        {"params": [decayed], "weight_decay": decay},
        {"params": [undecayed], "weight_decay": 0.0},
    ]
    return EllisAdam(groups, lr=rate, weight_decay=decay)


@pytest.mark.parametrize("case", CASES)
def test_follows_the_reference_trajectory(case: str) -> None:
    golden = load(case)
    weight = torch.nn.Parameter(golden["W.0"].clone())
    bias = torch.nn.Parameter(golden["b.0"].clone())
    optimizer = optimizer_for(case, weight, bias)
    for step, factor in enumerate(FACTORS, start=1):
        for group in optimizer.param_groups:
            group["lr"] = CASES[case][0] * factor
        weight.grad, bias.grad = golden[f"gW.{step}"], golden[f"gb.{step}"]
        optimizer.step()
        for name, parameter in (("W", weight), ("b", bias)):
            state = optimizer.state[parameter]
            torch.testing.assert_close(
                parameter.data, golden[f"{name}.{step}"], rtol=RTOL, atol=ATOL
            )
            for key in ("exp_avg", "exp_avg_sq"):
                expected = golden[f"{name}.{key}.{step}"]
                torch.testing.assert_close(state[key], expected, rtol=1e-6, atol=1e-12)


def sharded(case: str, ranks: int, padding: int) -> tuple[list[torch.Tensor], list[EllisAdam]]:
    """The golden parameters concatenated and cut into equal partitions, one per rank."""
    golden = load(case)
    infos = (TensorInfo("W", (6, 8)), TensorInfo("b", (8,)))
    flat = torch.cat([golden["W.0"].flatten(), golden["b.0"], torch.zeros(padding)])
    size = len(flat) // ranks
    assert size * ranks == len(flat)
    starts = (0, 48)
    flats, optimizers = [], []
    for rank in range(ranks):
        part = flat[rank * size : (rank + 1) * size].clone().requires_grad_()
        fragments = []
        for tensor, start in enumerate(starts):
            low = max(start, rank * size)
            high = min(start + infos[tensor].numel, (rank + 1) * size)
            if low < high:
                fragments.append(Fragment(tensor, low - start, low - rank * size, high - low))
        optimizer = EllisAdam([part], lr=CASES[case][0], weight_decay=0.01)
        optimizer.layout = Layout([Partition(part, infos, tuple(fragments))], lambda _: None)
        flats.append(part)
        optimizers.append(optimizer)
    return flats, optimizers


def step_together(optimizers: list[EllisAdam]) -> None:
    """One step of all ranks in one process: the first pass finds each rank's sums."""
    total: list[torch.Tensor] = []
    for optimizer in optimizers:
        assert optimizer.layout is not None
        group, partition = optimizer.param_groups[0], optimizer.layout.partitions[0]
        optimizer._update_moments(group, partition)
        layout = Layout([partition], lambda sums: total.append(sums.clone()))
        optimizer._clips([(group, partition)], layout)
    summed = torch.stack(total).sum(0)
    for optimizer in optimizers:
        assert optimizer.layout is not None
        group, partition = optimizer.param_groups[0], optimizer.layout.partitions[0]
        layout = Layout([partition], lambda sums: sums.copy_(summed))  # type: ignore[arg-type]
        [clip] = optimizer._clips([(group, partition)], layout)
        optimizer._update_weights(group, partition, clip)


@pytest.mark.parametrize(("ranks", "padding"), [(1, 0), (2, 0), (4, 0), (3, 1), (8, 24)])
def test_any_partition_gives_the_unsharded_update(ranks: int, padding: int) -> None:
    golden = load("amplified")
    weight = torch.nn.Parameter(golden["W.0"].clone())
    bias = torch.nn.Parameter(golden["b.0"].clone())
    whole = EllisAdam([weight, bias], lr=CASES["amplified"][0], weight_decay=0.01)
    flats, optimizers = sharded("amplified", ranks, padding)
    for step in range(1, 7):
        weight.grad, bias.grad = golden[f"gW.{step}"], golden[f"gb.{step}"]
        whole.step()
        flat = torch.cat([weight.grad.flatten(), bias.grad, torch.zeros(padding)])
        for part, gradient in zip(flats, flat.chunk(ranks), strict=True):
            part.grad = gradient.clone()
        step_together(optimizers)
        got = torch.cat([part.detach() for part in flats])
        expected = torch.cat([weight.data.flatten(), bias.data, torch.zeros(padding)])
        # fp64 sums differ in order only, so the fp32 results agree to the last bit or two.
        torch.testing.assert_close(got, expected, rtol=2.4e-7, atol=1e-10)


def test_clipping_a_partition_by_its_own_rms_would_be_wrong() -> None:
    """The oracle is sharp: without the sum over ranks the same comparison fails."""
    golden = load("amplified")
    flats, optimizers = sharded("amplified", 2, 0)
    weight = torch.nn.Parameter(golden["W.0"].clone())
    bias = torch.nn.Parameter(golden["b.0"].clone())
    whole = EllisAdam([weight, bias], lr=CASES["amplified"][0], weight_decay=0.01)
    for step in range(1, 5):
        weight.grad, bias.grad = golden[f"gW.{step}"], golden[f"gb.{step}"]
        whole.step()
        flat = torch.cat([weight.grad.flatten(), bias.grad])
        for part, gradient, optimizer in zip(flats, flat.chunk(2), optimizers, strict=True):
            part.grad = gradient.clone()
            optimizer.step()
    got = torch.cat([part.detach() for part in flats])
    expected = torch.cat([weight.data.flatten(), bias.data])
    assert (got - expected).abs().max() > 1e-4


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> torch.Tensor:
        golden = load("amplified")
        weight = torch.nn.Parameter(golden["W.0"].clone())
        optimizer = EllisAdam([weight], lr=3e-3, weight_decay=0.05)
        for step in range(1, 7):
            weight.grad = golden[f"gW.{step}"]
            optimizer.step()
        return weight.data

    whole = run()
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 7)
    torch.testing.assert_close(run(), whole, rtol=1.2e-7, atol=0)


def test_options_change_the_update() -> None:
    golden = load("amplified")

    def run(**options: bool) -> torch.Tensor:
        weight = torch.nn.Parameter(golden["W.0"].clone())
        optimizer = EllisAdam([weight], lr=3e-3, weight_decay=0.05, **options)
        for step in range(1, 5):
            weight.grad = golden[f"gW.{step}"]
            optimizer.step()
        return weight.data

    base = run()
    assert not torch.equal(run(update_clipping=False), base)
    assert not torch.equal(run(running_init=False), base)


def test_padding_is_never_touched() -> None:
    flats, optimizers = sharded("amplified", 1, 4)
    flats[0].grad = torch.ones_like(flats[0])
    flats[0].grad[-4:] = torch.nan
    optimizers[0].step()
    assert torch.equal(flats[0][-4:], torch.zeros(4))
    assert torch.isfinite(flats[0]).all()
