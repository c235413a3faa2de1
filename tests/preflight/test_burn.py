"""The speed of a device is that of its products, and wrong products are seen."""

import pytest
import torch

from pretrain.preflight import burn as burning
from pretrain.preflight.burn import CPU_SIDE, burn, copy_rates
from pretrain.preflight.compare import judge
from pretrain.preflight.findings import Status
from pretrain.preflight.report import Measurements, NodeReport

CPU = torch.device("cpu")
MULTIPLY = torch.mm


class Clock:
    """Stands still but for products, of which the first, while a device warms up, take longer."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def multiply(self, *matrices: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        self.now += 4e-3 if self.now < 0.1 else 1e-3
        return MULTIPLY(*matrices, out=out)


def test_rate_is_operations_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = Clock(), []
    monkeypatch.setattr(burning, "time", clock)
    monkeypatch.setattr(torch, "mm", clock.multiply)
    (burnt,) = burn([CPU], 0.3, midway=lambda: seen.append(clock.now))
    assert burnt.is_exact
    (moment,) = seen
    assert moment >= 0.15
    # the first third of the time does not count
    assert burnt.tflops == pytest.approx(2 * CPU_SIDE**3 / 1e-3 / 1e12)
    assert 0.3 <= clock.now < 0.3 + burning.BATCH * 1e-3


def test_a_burn_shorter_than_a_batch_is_timed_all_the_same() -> None:
    (burnt,) = burn([CPU], 1e-9)
    assert burnt.is_exact
    assert burnt.tflops > 0


def test_a_device_that_computes_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(a, b, *, out):
        MULTIPLY(a, b, out=out)
        # one bit of one element
        out.view(torch.int32)[7, 7] ^= 1

    monkeypatch.setattr(torch, "mm", damaged)
    assert not burn([CPU], 0.05)[0].is_exact


def test_a_node_that_is_slow_for_real_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It multiplies everything eight times."""
    monkeypatch.setattr(burning, "BATCH", 2)
    # the best of three: what else runs here may take this core for most of one
    rates = [max(burn([CPU], 0.2)[0].tflops for _ in range(3))]
    monkeypatch.setattr(torch, "mm", lambda *a, out: [MULTIPLY(*a, out=out) for _ in range(8)])
    rates.append(burn([CPU], 0.2)[0].tflops)
    verdicts = judge(
        [
            NodeReport(
                node=node, findings=[], measurements=Measurements(rates={"gemm_tflops": [rate]})
            )
            for node, rate in zip(("quick", "slow"), rates, strict=True)
        ]
    )
    (finding,) = verdicts["slow"]
    assert finding.status is Status.missing
    assert "gemm_tflops" in finding.subject
    assert not verdicts["quick"]


def test_what_goes_wrong_midway_is_not_lost() -> None:
    def broken() -> None:
        raise RuntimeError("fallen off the bus")

    for seconds in (1e-9, 0.05):
        with pytest.raises(RuntimeError, match="fallen off"):
            burn([CPU], seconds, midway=broken)


def test_copies_have_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(burning.COPY_BYTES, "cpu", 1 << 20)
    (rate,) = copy_rates([CPU])["host_copy_gb_per_s"]
    # slower than any memory, and faster than any
    assert 0.01 < rate < 10_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpus_multiply_right_and_faster_than_any_cpu() -> None:
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    results = burn(devices, 1.0)
    assert all(result.is_exact and result.tflops > 5 for result in results)
    rates = copy_rates(devices)
    assert min(rates["host_copy_gb_per_s"]) > 1
    assert ("peer_copy_gb_per_s" in rates) == (len(devices) > 1)
