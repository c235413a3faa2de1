import math

import numpy as np
import pytest

from pretrain.errors import DataError
from pretrain.loop.metrics import MetricLog
from pretrain.loop.plots import plot_depth_curve, plot_run, smooth


def write_run(folder, *, steps, validations):
    log = MetricLog(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        nats = math.nan if step == 3 else 8.0 / step
        log.write({"step": step, "tokens": step * 1000, "loss/nats": nats})
        if validations and step % 5 == 0:
            log.write(
                {
                    "step": step,
                    "tokens": step * 1000,
                    "validation/depths": [1, 4, 16],
                    "validation/loss_nats": [3.0, 2.0, math.nan],
                }
            )
    log.close()


def test_a_run_gets_one_picture_by_tokens_and_one_by_depth(tmp_path):
    write_run(tmp_path, steps=20, validations=True)
    paths = plot_run(tmp_path)
    assert [path.name for path in paths] == ["loss-by-tokens.png", "loss-by-depth.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_run_without_validation_gets_the_picture_that_it_has_data_for(tmp_path):
    write_run(tmp_path, steps=4, validations=False)
    assert [path.name for path in plot_run(tmp_path)] == ["loss-by-tokens.png"]


def test_new_records_change_the_picture(tmp_path):
    write_run(tmp_path, steps=5, validations=True)
    before = [path.read_bytes() for path in plot_run(tmp_path)]
    write_run(tmp_path, steps=10, validations=True)
    after = [path.read_bytes() for path in plot_run(tmp_path)]
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path)):
        plot_run(tmp_path)


def test_one_measurement_can_be_drawn_alone(tmp_path):
    path = plot_depth_curve(tmp_path / "a.png", [1, 32], [3.0, 2.0], title="step 7")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_order_in_which_depths_were_measured_changes_no_picture(tmp_path):
    found = [(1, 4.0), (4, 2.0), (16, 3.0)]
    pictures = []
    for name, points in (("a", found), ("b", [found[2], found[0], found[1]])):
        depths, losses = [list(each) for each in zip(*points, strict=True)]
        alone = plot_depth_curve(tmp_path / f"{name}.png", depths, losses, title="step 7")
        (tmp_path / name).mkdir()
        log = MetricLog(tmp_path / name / "metrics.jsonl")
        for step in (1, 2):
            validation = {"validation/depths": depths, "validation/loss_nats": losses}
            log.write({"step": step, "tokens": step * 1000} | validation)
        log.close()
        pictures.append([path.read_bytes() for path in (alone, *plot_run(tmp_path / name))])
    assert pictures[0] == pictures[1]


def test_smoothing_keeps_straight_lines_and_ends_and_skips_what_is_not_finite():
    straight = np.linspace(5.0, 1.0, 400)
    # Sums of up to 400 numbers below 5: 400 x 5 x 2^-52, divided by the window, is below 1e-12.
    np.testing.assert_allclose(smooth(straight), straight, atol=1e-12)
    assert smooth([1.0, math.inf, 3.0]).tolist() == [1.0, 2.0, 3.0]
    assert math.isnan(smooth([1.0, math.nan])[1])
