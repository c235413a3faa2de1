import pytest

from pretrain.loop.console import Progress, format_duration, one_line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (187, "3m07s"),
        (3599.6, "1h00m"),
        (7500, "2h05m"),
        (86_400 * 3 + 4 * 3600, "3d04h"),
        (86_399, "1d00h"),
        (-1, "0s"),
    ],
)
def test_durations_read_as_a_person_says_them(seconds, text):
    assert format_duration(seconds) == text


def line(progress, step, step_s):
    return progress.line(
        step=step,
        left_s=progress.left_s(step=step, step_s=step_s),
        loss_nats=3.14159,
        mean_depth=8.25,
        tokens_per_s=12345.6,
        grad_norm=1.0,
        learning_rate=4e-5,
    )


def test_a_line_has_everything_a_watcher_needs():
    assert line(Progress(300), 7, 2.0) == (
        "step   7/300  loss 3.1416  depth  8.2  12,346 tokens/s  grad 1  lr 4.00e-05  left 9m46s"
    )


def test_time_left_forgets_a_slow_start():
    progress = Progress(1000)
    assert line(progress, 1, 600.0).endswith("left 6d22h")
    for step in range(2, 900):
        last = line(progress, step, 1.0)
    assert last.endswith("left 1m41s")


def test_a_resumed_run_counts_only_the_steps_that_are_left():
    assert line(Progress(1000), 991, 10.0).endswith("left 1m30s")


def test_a_text_on_one_line_cannot_command_the_terminal():
    assert one_line("def f():\n\treturn  1\n", 40) == "def f(): return 1"
    assert one_line("a\x1b[2Jb\x07\u202ec", 40) == "a\ufffd[2Jb\ufffd\ufffdc"
    assert one_line("twelve again", 6) == "twelv…"
