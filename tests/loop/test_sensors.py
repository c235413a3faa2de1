"""Sensors are read beside the steps: late, broken or absent ones cost nothing."""

import threading
import time

import pytest

from pretrain.loop.sensors import NAMES, Reading, Sensors, sensor_metrics
from pretrain.preflight.nvml import NoDriverError, read_driver, read_sensors

WARM = Reading(utilization=0.9, power_w=600.0, temperature_c=60.0, clock_hz=1.9e9)
COOL = Reading(utilization=0.5, power_w=None, temperature_c=40.0, clock_hz=1.1e9)
NOTHING = [0.0] * (2 * len(NAMES))


def soon(sensors: Sensors) -> list[float]:
    """What the next reading gives."""
    deadline = time.monotonic() + 60
    while (found := sensors.take()) == NOTHING:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def test_ranks_add_up_to_means_of_those_that_have_read() -> None:
    with Sensors(lambda: WARM, every_s=1000) as one, Sensors(lambda: COOL, every_s=1000) as two:
        sums = [sum(values) for values in zip(soon(one), soon(two), NOTHING, strict=True)]
        assert sensor_metrics(sums) == {
            "gpu/utilization": pytest.approx(0.7),
            "gpu/power_w": 600.0,
            "gpu/temperature_c": 50.0,
            "gpu/clock_hz": 1.5e9,
        }
        # once: a reading is not said again by later steps
        assert one.take() == NOTHING
    assert sensor_metrics(NOTHING) == {}


def test_a_reader_that_hangs_or_raises_leaves_steps_alone(caplog) -> None:
    release = threading.Event()

    def hangs() -> None:
        release.wait(60)

    def raises() -> Reading:
        raise NoDriverError("fallen off the bus")

    with Sensors(hangs, every_s=0.001) as hanging, Sensors(raises, every_s=0.001) as broken:
        started = time.monotonic()
        for _ in range(100):
            assert hanging.take() == broken.take() == NOTHING
        assert time.monotonic() - started < 5
        deadline = time.monotonic() + 60
        while "fallen off the bus" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        release.set()
    assert caplog.text.count("read no more") == 1


def test_none_is_read_where_none_is_wanted() -> None:
    with Sensors(lambda: pytest.fail("read"), every_s=0) as sensors:
        assert sensors.take() == NOTHING


def test_this_machine_tells_of_gpus_that_it_has_and_of_no_other() -> None:
    assert read_sensors("GPU-00000000-0000-0000-0000-000000000000") is None
    try:
        gpus = read_driver().gpus
    except NoDriverError:
        return
    for gpu in gpus:
        found = read_sensors(gpu.uuid)
        assert found is not None
        assert 0 < found.temperature_c < 120
