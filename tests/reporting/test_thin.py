import math

import numpy as np

from pretrain.reporting.scale import Kind, fit
from pretrain.reporting.thin import bucket_means, thin


def test_no_peak_no_dip_and_no_end_is_lost():
    values = np.sin(np.arange(100_000) / 1000.0)
    values[12_345], values[54_321], values[77_777] = 50.0, -50.0, math.nan
    kept = thin(values, 200)
    assert len(kept) <= 3 * 200 + 2
    assert {0, 12_345, 54_321, 77_777, 99_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()


def test_a_short_curve_is_kept_whole():
    assert thin([1.0, 2.0, 3.0], 1).tolist() == [0, 1, 2]
    assert thin([], 5).tolist() == []


def test_means_leave_out_what_is_not_finite():
    assert bucket_means([1.0, 3.0, math.nan, 5.0], 2) == [2.0, 5.0]
    assert bucket_means([7.0], 8) == [7.0]
    assert bucket_means([], 8) == []


def test_a_scale_maps_its_edges_and_takes_round_ticks():
    linear = fit([0.0, 10.0], Kind.linear, start=0, stop=100)
    assert (linear(0.0), linear(5.0), linear(10.0)) == (0, 50, 100)
    assert linear.ticks(5) == [0, 2, 4, 6, 8, 10]
    log = fit([0.01, 100.0, -1.0, math.inf], Kind.log, start=0, stop=100)
    np.testing.assert_allclose([log(0.01), log(1.0), log(100.0)], [0, 50, 100], atol=1e-9)
    np.testing.assert_allclose(log.ticks(6), [0.01, 0.1, 1, 10, 100])
    narrow = fit([0.3, 6.0], Kind.log, start=0, stop=100)
    np.testing.assert_allclose(narrow.ticks(5), [0.5, 1, 2, 5])


def test_a_constant_has_a_scale():
    for value in (0.0, 3.0, -2.0):
        scale = fit([value, value], Kind.linear, start=0, stop=100)
        assert scale.low < value < scale.high or value == 0.0 >= scale.low
