"""Numbers carry the unit that their metric's name ends with."""

import pytest

from pretrain.reporting.numbers import by_name


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("memory/host_bytes", 1010.4 * 2**20, "1,010 MiB"),
        ("memory/peak_bytes", 1.5 * 2**30, "1.5 GiB"),
        ("speed/tokens_per_s", 3464.0, "3.46 k"),
        ("speed/step_s", 0.12, "120 ms"),
        ("speed/mfu", 0.4123, "41.2 %"),
        ("gpu/utilization", 1.0, "100 %"),
        ("gpu/power_w", 651.6, "652 W"),
        ("gpu/temperature_c", 63.25, "63.2 °C"),
        ("gpu/clock_hz", 1.98e9, "1.98 GHz"),
        ("data/share_code", 0.005, "0.5 %"),
        ("depth/mean", 8.9453, "8.945"),
        ("loss/nats", float("nan"), "not a number"),
    ],
)
def test_a_value_is_shown_with_its_unit(metric, value, text):
    assert by_name(metric, value) == text
