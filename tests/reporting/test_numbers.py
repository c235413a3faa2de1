"""Numbers carry the unit that their metric's name ends with."""

from functools import partial

import pytest

from pretrain.reporting.numbers import by_name
from pretrain.reporting.svg import apart


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


@pytest.mark.parametrize(
    ("metric", "values", "texts"),
    [
        ("state/norm", [11.317, 11.3175, 11.318], ["11.317", "11.3175", "11.318"]),
        ("memory/host_bytes", [1.501 * 2**30, 1.502 * 2**30], ["1.501 GiB", "1.502 GiB"]),
        ("speed/step_s", [0.1201, 0.1202], ["120.1 ms", "120.2 ms"]),
        ("speed/step_s", [1000.2, 1000.4], ["1,000.2 s", "1,000.4 s"]),
        ("speed/mfu", [0.41231, 0.41232], ["41.231 %", "41.232 %"]),
        ("speed/tokens_per_s", [3464.0, 3465.0], ["3.464 k", "3.465 k"]),
        ("gpu/clock_hz", [1.981e9, 1.982e9], ["1.981 GHz", "1.982 GHz"]),
        ("gpu/power_w", [651.6, 651.7], ["651.6 W", "651.7 W"]),
        # told apart by the usual digits: none are added
        ("loss/nats", [3.5, 3.6], ["3.5", "3.6"]),
        # equal for good: the usual ones would have told them apart if anything could
        ("loss/nats", [3.5, 3.5], ["3.5", "3.5"]),
    ],
)
def test_an_axis_has_as_many_digits_as_tell_its_labels_apart(metric, values, texts):
    assert [text for _, text in apart(values, partial(by_name, metric))] == texts
