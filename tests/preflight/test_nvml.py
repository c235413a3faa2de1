"""What of a driver's answers keeps a GPU from training."""

import dataclasses

import pytest
import torch

from pretrain.preflight.findings import Status
from pretrain.preflight.nvml import (
    GIB,
    GpuState,
    NoDriverError,
    judge_gpu,
    judge_load,
    read_driver,
)

HEALTHY = GpuState(
    index=3,
    name="NVIDIA H100",
    uuid="GPU-0",
    uncorrected_now=0,
    uncorrected_ever=0,
    has_pending_remap=False,
    has_failed_remap=False,
    faults=(),
    temperature_c=35,
    slowdown_c=87,
    power_limit_w=700.0,
    default_power_w=700.0,
    used_bytes=GIB // 2,
    total_bytes=80 * GIB,
)


def judged(**changes):
    return [*judge_gpu(dataclasses.replace(HEALTHY, **changes))]


def test_healthy_gpu_is_ok_in_one_line() -> None:
    (finding,) = judged()
    assert finding.status is Status.ok
    assert finding.subject == "gpu 3"
    assert "35 degrees, at most 700 W" in finding.detail
    assert not [*judge_load(HEALTHY)]


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"uncorrected_now": 2, "uncorrected_ever": 9}, Status.missing, "2 uncorrected"),
        ({"uncorrected_ever": 9}, Status.warn, "9 uncorrected memory errors in its life"),
        ({"has_pending_remap": True}, Status.missing, "wait to be replaced"),
        ({"has_failed_remap": True}, Status.missing, "no spare ones"),
        ({"used_bytes": 30 * GIB}, Status.missing, "30.0 of 80.0 GiB are in use"),
        ({"power_limit_w": 500.0}, Status.warn, "limited to 500 W"),
        ({"temperature_c": 84}, Status.warn, "84 degrees"),
    ],
)
def test_each_fault_is_named_with_a_remedy(changes, status, said) -> None:
    (finding,) = judged(**changes)
    assert finding.status is status
    assert said in finding.detail
    assert finding.remedy


def test_several_faults_are_all_told() -> None:
    found = judged(has_failed_remap=True, uncorrected_now=1, used_bytes=9 * GIB)
    assert [finding.status for finding in found] == [Status.missing] * 3


def test_a_model_that_tells_little_is_healthy_as_far_as_it_tells() -> None:
    (finding,) = judged(
        uncorrected_now=None,
        uncorrected_ever=None,
        temperature_c=None,
        slowdown_c=None,
        power_limit_w=None,
        default_power_w=None,
    )
    assert finding.status is Status.ok


@pytest.mark.parametrize(
    ("faults", "status"),
    [
        (("hardware slowdown",), Status.missing),
        (("power brake",), Status.missing),
        (("too hot (driver)",), Status.warn),
        (("too hot (driver)", "too hot (hardware)"), Status.missing),
    ],
)
def test_a_gpu_that_slows_down_under_load_is_named(faults, status) -> None:
    (finding,) = judge_load(dataclasses.replace(HEALTHY, faults=faults))
    assert finding.status is status
    assert ", ".join(faults) in finding.detail


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_without_a_driver_that_is_said() -> None:
    with pytest.raises(NoDriverError, match=r"\w"):
        read_driver()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_driver_here_tells_what_torch_sees() -> None:
    driver = read_driver()
    assert driver.version[0].isdigit()
    seen = {str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())}
    assert seen <= {gpu.uuid.removeprefix("GPU-") for gpu in driver.gpus}
    for gpu in driver.gpus:
        assert 0 < gpu.used_bytes < gpu.total_bytes
        assert gpu.temperature_c is None or 10 < gpu.temperature_c < 100
