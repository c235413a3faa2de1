import io
import math
import os
import pty
import select
import signal
import subprocess
import sys
import time

from rich.console import Console

from conftest import run_cli
from pretrain.loop.metrics import encode_record
from pretrain.reporting.frame import frame, sparkline
from pretrain.reporting.run import read_run


def shown(run, width=120):
    console = Console(width=width, record=True, color_system=None, file=io.StringIO())
    console.print(frame(run, width=width))
    return console.export_text()


def test_one_frame_has_the_newest_values(make_run):
    text = shown(read_run(make_run(steps=40)))
    # the tiny preset has 320 steps; 280 of them at 2 s are left
    for part in ("step 40/320", "9m20s left", "552", "r=1 4.6000  r=4 4.2500  r=16 4.1250"):
        assert part in text


def test_what_a_watcher_asks_of_gpus_saves_and_texts_is_there(make_run):
    folder = make_run(steps=40)
    samples = [{"prompt": "def ", "depth": 8, "seed": 7, "text": "main():\n\x1b[2J" + "a" * 300}]
    values = {
        "gpu/utilization": 0.97, "gpu/power_w": 651.5, "gpu/temperature_c": 63.0,
        "gpu/clock_hz": 1.98e9, "speed/mfu": 0.412, "loss/nats": 4.0,
    }  # fmt: skip
    records = [
        {"step": 40, "tokens": 40_960, "validation/depths": [1], "validation/loss_nats": [3.0],
         "validation/samples": samples},
        {"step": 40, "tokens": 40_960, "checkpoint/step": 40, "checkpoint/written_s": 1.5},
        {"step": 42, "tokens": 43_008, **values},
    ]  # fmt: skip
    with (folder / "metrics.jsonl").open("ab") as file:
        file.writelines(map(encode_record, records))
    text = shown(read_run(folder))
    for part in (
        "97 %", "652 W", "63 °C", "1.98 GHz", "41.2 %", "held out at step 40, 2 steps ago",
        "sample  r=8  def main(): \ufffd[2Jaaa", "saved   step 40, written in 1.5 s",
    ):  # fmt: skip
        assert part in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_without_a_terminal_one_frame_is_shown_and_said_to_be_one(make_run, tmp_path):
    done = run_cli(tmp_path, "top", f"run.dir={make_run(steps=2)}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/320" in done.stdout
    assert "one frame, as with top.once=true" in done.stderr


def test_troubles_stand_in_the_frame(troubled_run):
    text = shown(read_run(troubled_run))
    for part in (
        "DivergenceError",
        "collapse since step 32",
        "no end was recorded",
        "Rewound from step 38 to 30",
        "Stood still at step 12",
    ):
        assert part in text


def test_a_record_that_is_being_written_goes_on(make_run):
    folder = make_run(steps=5)
    path = folder / "metrics.jsonl"
    line = encode_record({"step": 6, "tokens": 6144, "loss/nats": 1.25, "speed/step_s": 2.0})
    with path.open("ab") as file:
        file.write(line[:20])
    run = read_run(folder)
    assert "step 5/320" in shown(run)
    with path.open("ab") as file:
        file.write(line[20:])
    text = shown(read_run(folder, earlier=run))
    assert "step 6/320" in text
    assert "1.25" in text


def test_a_run_without_steps_has_a_frame(make_run):
    text = shown(read_run(make_run(steps=0)))
    assert "not started" in text
    assert "step 0/320" in text


def test_a_name_with_markup_is_text(make_run):
    folder = make_run("first", steps=2)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("name: first", "name: '[red]x[/nope]'"))
    assert "[red]x[/nope]" in shown(read_run(folder))


def test_a_sparkline_rises_with_its_values():
    assert sparkline([0.0, 1.0, 2.0, 7.0], 4) == "▁▂▃█"
    assert sparkline([1.0, 1.0], 9) == "▁▁"
    assert sparkline([1.0, math.nan, 2.0], 3) == "▁ █"
    assert sparkline([math.inf], 3) == ""


def read_until(terminal, has_come, *, limit_s=120):
    seen, ends = b"", time.monotonic() + limit_s
    while not has_come(seen):
        assert time.monotonic() < ends, seen.decode(errors="replace")
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 65536)


def test_a_terminal_follows_the_run_until_ctrl_c(make_run):
    folder = make_run(steps=5)
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain", "top", f"run.dir={folder}", "top.refresh_s=0.1"],
        stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"COLUMNS": "120"},
        # what a shell starts in the background ignores it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        read_until(terminal, lambda seen: b"step 5/320" in seen)
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write(encode_record({"step": 6, "tokens": 6144, "loss/nats": 1.25}))
        read_until(terminal, lambda seen: b"step 6/320" in seen)
        process.send_signal(signal.SIGINT)
        # on and on: who writes to a terminal that nobody reads waits when it is full
        read_until(terminal, lambda _: process.poll() is not None)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(theirs)
        os.close(terminal)
