import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from pretrain.config import ReportConfig, RunFolderConfig
from pretrain.errors import CheckpointError, ConfigError
from pretrain.loop.metrics import encode_record
from pretrain.loop.passed_over import Rewind, append_rewind
from pretrain.report import main
from pretrain.reporting.charts import event_marks
from pretrain.reporting.config import ReportOptions
from pretrain.reporting.page import render
from pretrain.reporting.run import read_run, told_apart
from reporting.conftest import life, write_lines

VOID = {"meta", "link", "br"}


class Strict(HTMLParser):
    """Knows that every element is closed in order, and what is visible."""

    def __init__(self):
        super().__init__()
        self.open, self.names, self.text, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(page):
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def tiles(page):
    return dict(re.findall(r'<div class="tile"><span>(.*?)</span><b>(.*?)</b>', page))


def test_the_summary_has_the_values_of_the_record(make_run):
    page = render([read_run(make_run(steps=40))])
    # step 40: 8 - 0.1 x 40; 40 steps of 1,024 tokens in 2 s each
    expected = {
        "loss": "4.0000",
        "held out": "4.2500",
        "steps": "40",
        "tokens/s": "512",
        "time in steps": "1m20s",
    }
    assert expected.items() <= tiles(page).items()
    assert parse(page).names.count("svg") >= 6


def test_curves_lie_where_the_record_says(make_run):
    folder = make_run(steps=40)
    page = render([read_run(folder)])
    title = page.index("Learning rate")
    (points,) = re.findall(r'<polyline class="curve"[^>]*points="([^"]*)"', page[title:])[:1]
    drawn = np.array([pair.split(",") for pair in points.split()], dtype=float)
    rates = 1e-3 * np.arange(1, 41)
    # pixels are rounded to a tenth, over a range of more than 150 pixels: 0.05 / 150
    heights = (drawn[:, 1] - drawn[0, 1]) / (drawn[-1, 1] - drawn[0, 1])
    np.testing.assert_allclose(heights, (rates - rates[0]) / (rates[-1] - rates[0]), atol=7e-4)


def test_the_depth_curve_is_the_last_validation(make_run):
    text = "".join(parse(render([read_run(make_run(steps=40))])).text)
    for value in ("4.6", "4.25", "4.125"):
        assert value in text


def test_an_evaluation_is_on_the_page(make_run):
    folder = make_run()
    (folder / "evaluation").mkdir()
    found = {"step": 40, "validation/depths": [1, 64], "validation/loss_nats": [4.321, 3.217]}
    (folder / "evaluation/step-0000000040.json").write_text(json.dumps(found))
    page = render([read_run(folder)])
    assert "4.321" in page
    assert "3.217" in page


def test_an_evaluation_from_deep_to_shallow_shows_each_depth_its_own_value(make_run):
    folder = make_run()
    (folder / "evaluation").mkdir()
    found = {"step": 40, "validation/depths": [64, 8, 1], "validation/loss_nats": [3.2, 3.6, 4.3]}
    (folder / "evaluation/step-0000000040.json").write_text(json.dumps(found))
    page = render([read_run(folder)])
    shown = re.findall(r">depth (\d+)</text><text[^>]*>first, step 40 ([\d.]+)<", page)
    assert shown == [("1", "4.3"), ("8", "3.6"), ("64", "3.2")]


def test_a_name_with_a_script_is_text(make_run):
    folder = make_run("first", steps=12)
    config = folder / "config.yaml"
    evil = "<script>alert(1)</script><img src=http://x.invalid/a onerror=alert(2)>"
    config.write_text(config.read_text().replace("name: first", f"name: '{evil}'"))
    bad = encode_record({"step": 12, "tokens": 12288, evil: 1.5, "a": "\"'><svg onload=x>\x00"})
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(bad)
    for page in (render([read_run(folder)]), render([read_run(folder), read_run(folder)])):
        parsed = parse(page)
        assert evil in "".join(parsed.text)
        assert not {"script", "img", "iframe", "object"} & set(parsed.names)
        assert not [name for name, _ in parsed.attributes if name.startswith("on")]
        assert "\x00" not in page


def test_the_page_asks_for_nothing(troubled_run):
    page = render([read_run(troubled_run)])
    addresses = [value for name, value in parse(page).attributes if name in ("src", "href")]
    assert addresses == ["data:,"]
    assert "url(" not in page
    assert "@import" not in page


def test_troubles_are_told(troubled_run):
    text = "".join(parse(render([read_run(troubled_run)])).text)
    for sentence in (
        "Rewound from step 38 to 30, past 64 rows from row 240 on",
        "Stood still at step 12: rank 3 on node-b is in backward",
        "Alarm collapse from step 32 on, and it lasts",
        "The loss was not finite in 1 step, first in 31",
        "1 row in quarantine, 1 from code-00001.tar/3",
        "Life 1 ended at step 20: SIGUSR1",
        "Life 2, from step 20 on, left no end: killed",
        "Life 3 ended at step 32: DivergenceError",
        "10 steps taken again",
        "3 loss spikes",
    ):
        assert sentence in text


def test_goodput_is_time_in_steps_over_time_alive(troubled_run):
    run = read_run(troubled_run)
    # 32 steps of 2 s; the folder was last written now, long after its first life began
    assert run.goodput == pytest.approx(64 / (run.seen_s - 1_700_000_000))


def test_passed_over_rows_are_no_share_of_the_data(troubled_run, make_run):
    """Nor are they less than none if the run has gone back to the same step twice."""
    append_rewind(troubled_run, Rewind(from_step=36, to_step=30, first_row=240, next_row=288))
    page = render([read_run(troubled_run)])
    shown = {name: int(rows) for name, rows in re.findall(
        r'<div class="bar"><span>(\w+)</span>.*?<small>([\d]+) rows', page)}  # fmt: skip
    # 32 steps of 8 rows; the last one ends at row 320, and 64 before it were passed over
    assert sum(shown.values()) == 32 * 8
    assert shown["code"] == pytest.approx(0.4 * 256, abs=3)


def test_an_empty_run_has_a_page(make_run):
    page = render([read_run(make_run(steps=0))])
    assert "not started" in "".join(parse(page).text)
    assert tiles(page)["loss"] == "–"


def test_damaged_and_torn_lines_are_counted_and_left_out(make_run):
    folder = make_run(steps=10)
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"\x00\x00{\n", *lines[3:], b'{"step":11,"tok']))
    page = render([read_run(folder)])
    assert tiles(page)["steps"] == "10"
    assert "1 damaged line of metrics.jsonl left out" in page


def test_two_runs_are_drawn_over_one_another(make_run):
    runs = [read_run(make_run("first")), read_run(make_run("second", steps=20, seed=7))]
    page = render(runs)
    text = "".join(parse(page).text)
    assert "2 runs" in text
    for run, colour in zip(runs, ("--r0", "--r1"), strict=True):
        assert run.name in text
        assert re.search(rf'<polyline class="curve" style="stroke:var\({colour}\)', page)
    differing = text[text.index("Settings that differ") : text.index("All settings")]
    assert "run.seed" in differing
    assert "model.width" not in differing


def test_runs_of_one_name_are_told_apart_by_their_folders(make_run):
    folders = [make_run("first"), make_run("second", seed=7), make_run("third", seed=8)]
    config = folders[1] / "config.yaml"
    config.write_text(config.read_text().replace("name: second", "name: first"))
    runs = told_apart([read_run(folder) for folder in folders])
    assert [run.name for run in runs] == [str(folders[0]), str(folders[1]), "third"]


def test_a_life_that_changed_the_batch_stands_where_its_tokens_begin(make_run):
    folder = make_run(steps=10)
    write_lines(
        folder / "lineage.jsonl",
        life(1, first_step=0, at_s=0),
        life(2, first_step=10, at_s=60),
        life(3, first_step=14, at_s=90),
    )
    with (folder / "metrics.jsonl").open("ab") as file:
        # four steps of twice the size, then two as the configuration has them again
        for step, tokens in ((11, 12), (12, 14), (13, 16), (14, 18), (15, 19), (16, 20)):
            rows = {"data/first_row": tokens * 8 - 16, "data/rows": 16 if step < 15 else 8}
            record = step_like(step, 4.0) | {"tokens": tokens * 1024} | rows
            file.write(encode_record(record))
    run = read_run(folder)
    assert [mark.x for mark in event_marks(run)] == [10 * 1024, 18 * 1024]
    # 320 steps in all, of which 304 are to come
    assert run.total_tokens == (20 + 304) * 1024


def test_a_metric_that_nobody_foresaw_is_drawn(make_run):
    folder = make_run(steps=5)
    with (folder / "metrics.jsonl").open("ab") as file:
        for step in (6, 7):
            file.write(
                encode_record({"step": step, "tokens": step * 1024, "novel/share": 1 / step})
            )
    page = render([read_run(folder)])
    assert "novel/share" in page[page.index("Further metrics") :]


def test_how_states_settle_is_drawn_from_the_last_validation(make_run):
    folder = make_run(steps=5)
    lists = {
        "validation/depths": [1, 4],
        "validation/loss_nats": [3.0, 2.0],
        "validation/kl_depths": [4],
        "validation/kl_nats": [0.03125],
        "state/moves": [0.5, 0.25, 0.0625],
    }
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(encode_record({"step": 5, "tokens": 5120, **lists}))
    page = render([read_run(folder)])
    moves = page[page.index("How far each iteration moves the states") :]
    # halving, then a quarter: on a logarithmic axis the second step is twice the first
    (points,) = re.findall(r'<polyline class="curve"[^>]*points="([^"]*)"', moves)[:1]
    heights = [float(pair.split(",")[1]) for pair in points.split()]
    assert (heights[2] - heights[1]) / (heights[1] - heights[0]) == pytest.approx(2, abs=0.01)
    assert "0.03125" in page[page.index("How much a prediction still changes") :]


def test_a_long_record_stays_small_and_keeps_its_spike(make_run):
    folder = make_run(steps=1)
    with (folder / "metrics.jsonl").open("ab") as file:
        for step in range(2, 30_001):
            loss = 97.5 if step == 17_003 else 3.0 + (step % 7) / 10
            file.write(encode_record(step_like(step, loss)))
    page = render([read_run(folder)])
    assert len(page) < 1_500_000
    wide = re.search(r'<polyline class="curve faint"[^>]*points="([^"]*)"', page)
    assert wide
    heights = [float(pair.split(",")[1]) for pair in wide.group(1).split()]
    # the spike is the highest point by far
    assert sorted(heights)[1] - sorted(heights)[0] > 200


def step_like(step, loss):
    norm = 1.0 + step % 3
    return {"step": step, "tokens": step * 1024, "loss/nats": loss, "gradient/norm": norm}


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"), [({"iterations": 1}, "iterations"), ({"prompt": " "}, "prompt")]
)
def test_options_that_cannot_be_are_refused(change, named):
    options = {"to": None, "compare": [], "states": True, "prompt": "a", "iterations": 8}
    with pytest.raises(ConfigError, match=named):
        ReportOptions(**options | change)


@pytest.mark.parametrize(
    ("to", "said"), [("", "is a folder"), ("report.html/page.html", "cannot be written")]
)
def test_a_page_that_cannot_be_written_is_named_and_leaves_nothing(make_run, tmp_path, to, said):
    folder, place = make_run(steps=3), tmp_path / "pages"
    place.mkdir()
    (place / "report.html").write_text("a page")
    options = ReportOptions(to=str(place / to), compare=[], states=False, prompt="", iterations=2)
    with pytest.raises(ConfigError, match=f"{place}.*{said}.*report.to="):
        main(ReportConfig(run=RunFolderConfig(dir=str(folder)), report=options))
    assert [path.name for path in tmp_path.rglob("*.html*")] == ["report.html"]


def test_the_command_needs_no_torch(make_run):
    folder = make_run(steps=3)
    code = (
        "import sys\nfrom pretrain.cli import _run\n"
        f"assert _run(['report', 'run.dir={folder}']) == 0\n"
        f"assert _run(['top', 'run.dir={folder}', 'top.once=true']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
