"""What of a run is neither a curve over tokens nor an event: depths, scores, samples, software."""

import html
import json
import re

import numpy as np
import pytest

from conftest import SMALL, run_cli
from pretrain.loop.metrics import encode_record
from pretrain.loop.step_metrics import HISTOGRAM_EDGES, depth_metrics
from pretrain.model.config import Curriculum, DepthConfig, Law
from pretrain.model.depth import step_depths
from pretrain.reporting.depths import expected_shares
from pretrain.reporting.page import render
from pretrain.reporting.run import read_run

SAMPLES = [
    {"prompt": "<b>def</b>", "depth": 4, "seed": 7, "text": " main():\n\treturn '&'"},
    {"prompt": "<b>def</b>", "depth": 8, "seed": 7, "text": " deep"},
    {"prompt": "12 +", "depth": 4, "seed": 7, "text": " 30"},
    {"prompt": "12 +", "depth": 8, "seed": 7, "text": " 30 = 42"},
]


def add(folder, **record):
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(encode_record(record))


def drawn(config, steps, rows):
    """Depths of the rows of some steps, as training records them."""
    return [
        depth_metrics(step_depths(config, seed=0, first_row=rows * n, rows=rows), ranks=1)
        for n in range(steps)
    ]


@pytest.mark.parametrize(
    "config",
    [
        DepthConfig(law=Law.poisson_lognormal, mean=32, backprop=8),
        DepthConfig(law=Law.fixed, mean=32, backprop=8),
        DepthConfig(
            law=Law.poisson_lognormal, mean=32, backprop=8, curriculum=Curriculum.linear,
            ramp_rows=32_000,
        ),
    ],
    ids=["law", "fixed", "curriculum"],
)  # fmt: skip
def test_the_law_says_what_is_drawn(config):
    steps, rows = 1000, 64
    counts = sum(np.array(each["depth/histogram"]) for each in drawn(config, steps, rows))
    shares, expected = counts / counts.sum(), np.array(expected_shares(config, steps * rows))
    assert expected.sum() == pytest.approx(1.0)
    # 64,000 rows; plain draws have a deviation of at most 0.002, dealt ones less
    assert np.abs(shares - expected).max() < 0.006


def test_drawn_depths_stand_beside_their_law(make_run):
    folder = make_run(steps=1)
    config = read_run(folder).config.depth
    for step, metrics in enumerate(drawn(config, 50, 8), start=2):
        add(folder, step=step, tokens=1024 * step, **metrics)
    run = read_run(folder)
    assert sum(run.record.depth_counts) == 400
    page = render([run])
    chart = page[page.index("Depths of all rows") :].split("</figure>")[0]
    mean = np.mean([metrics["depth/mean"] for metrics in drawn(config, 50, 8)])
    assert f"mean {mean:.4g}".rstrip("0") in chart
    titles = [html.unescape(title) for title in re.findall(r"<rect[^>]*><title>(.*?)<", chart)]
    counts = run.record.depth_counts
    assert titles[3].startswith("5–8; drawn ")
    assert float(re.findall(r"drawn ([\d.]+)", titles[3])[0]) == pytest.approx(
        counts[3] / 4, abs=0.06
    )
    law = expected_shares(config, 400)
    assert float(re.findall(r"law ([\d.]+)", titles[3])[0]) == pytest.approx(100 * law[3], abs=0.06)
    # bars are as high as their shares
    heights = [float(h) for h in re.findall(r'<rect[^>]*height="([\d.]+)"', chart)]
    assert heights[3] / heights[2] == pytest.approx(counts[3] / counts[2], rel=0.01)
    both = render([run, run])
    assert "; law" not in both[both.index("Depths of all rows") :].split("</figure>")[0]


def test_a_record_that_was_taken_back_counts_no_depth_twice(make_run):
    folder = make_run(steps=2)
    bins = [0] * (len(HISTOGRAM_EDGES) - 1)
    before = (folder / "metrics.jsonl").read_bytes()
    add(folder, step=3, tokens=3072, **{"depth/histogram": [8, *bins[1:]]})
    run = read_run(folder)
    assert sum(run.record.depth_counts) == 8
    partial = folder / "metrics.jsonl.partial"
    partial.write_bytes(before)
    partial.replace(folder / "metrics.jsonl")
    add(folder, step=3, tokens=3072, **{"depth/histogram": [0, 8, *bins[2:]]})
    assert read_run(folder, earlier=run).record.depth_counts == [0, 8, *bins[2:]]


def write_scores(folder, step, task="letters", right=0.5, **changes):
    at = folder / f"evaluation/step-{step:010d}"
    at.mkdir(parents=True, exist_ok=True)
    summary = {
        "step": step, "task": task, "kind": "multiple_choice", "items": 40, "items_in_file": 40,
        "items_cut": 0, "depths": [1, 8],
        "scores": {
            "accuracy": {"value": [0.25, right], "standard_error": [0.0625, 0.0781]},
            "accuracy_normalized": {"value": [0.25, 0.375], "standard_error": [0.0625, None]},
        },
    }  # fmt: skip
    (at / f"{task}.json").write_text(json.dumps(summary | changes))


def test_scores_of_the_newest_evaluation_have_their_standard_errors(make_run):
    folder = make_run()
    write_scores(folder, 20, right=0.125)
    write_scores(folder, 40)
    write_scores(folder, 40, "broken", depths=[1, 8, 64])
    (folder / "evaluation/step-0000000040/torn.json").write_text("{")
    run = read_run(folder)
    assert [(each["task"], each["step"]) for each in run.scores] == [("letters", 40)]
    page = render([run])
    part = page[page.index("<h2>Tasks</h2>") :]
    for cell in ("50.0% ± 7.8%", "25.0% ± 6.2%", '<td class="number">37.5%</td>', "40 items"):
        assert cell in part
    assert "12.5%" not in part
    chart = part.split("</svg>")[0]
    bars = re.findall(
        r'<line style="[^"]*" x1="([\d.]+)" x2="\1" y1="([\d.]+)" y2="([\d.]+)"', chart
    )
    lengths = [float(low) - float(high) for _, low, high in bars]
    assert len(lengths) == 2
    # pixels are rounded to a tenth
    assert lengths[1] / lengths[0] == pytest.approx(0.0781 / 0.0625, rel=0.01)
    assert "Tasks" not in render([read_run(make_run("second"))])


def test_scores_of_two_runs_share_a_chart(make_run):
    runs = []
    for name, right in (("first", 0.5), ("second", 0.75)):
        folder = make_run(name)
        write_scores(folder, 40, right=right)
        runs.append(read_run(folder))
    part = render(runs)
    part = part[part.index("<h2>Tasks</h2>") :].split("</section>")[0]
    assert part.count("<svg") == 1
    assert "75.0% ± 7.8%" in part
    assert [part.count(f"<td>{run.name}</td>") for run in runs] == [2, 2]


def test_samples_are_shown_as_they_were_written(make_run):
    folder = make_run(steps=5)
    for step in (3, 5):
        texts = [each | {"text": f"{each['text']} {step}"} for each in SAMPLES]
        record = {"validation/depths": [1], "validation/loss_nats": [3.0]}
        add(folder, step=step, tokens=1024 * step, **record, **{"validation/samples": texts})
    page = render([read_run(folder)])
    part = page[page.index("<h2>Samples</h2>") :].split("</section>")[0]
    shown = [
        html.unescape(re.sub("<[^>]*>", "", pre))
        for pre in re.findall("<pre>(.*?)</pre>", part, re.S)
    ]
    wanted = [f"{each['prompt']}{each['text']}" for each in SAMPLES]
    assert shown == [f"{text} {step}" for step in (5, 3) for text in wanted]
    assert re.findall("<dt>(.*?)</dt>", part)[:2] == ["r = 4", "r = 8"]
    # the newest first, the others folded away
    assert part.index("Step 5") < part.index("<details>") < part.index("Step 3")
    assert "Samples" not in render([read_run(make_run("second"))])


def test_the_environment_names_versions_devices_and_the_commit(make_run):
    folder = make_run()
    origin = {
        "commit": "c0ffee" * 6, "diff_sha256": "d1ff",
        "software": {"python": "3.12.9", "torch": "2.11.0+cu130"}, "devices": {"NVIDIA H200": 8},
    }  # fmt: skip
    (folder / "origin.json").write_text(json.dumps(origin))
    page = render([read_run(folder)])
    part = page[page.index("<h2>Environment</h2>") :]
    for cell in ("c0ffeec0ffee and changes", "2.11.0+cu130", "3.12.9", "8 x NVIDIA H200"):
        assert f"<td>{cell}</td>" in part
    other = render([read_run(folder), read_run(make_run("second"))])
    assert "<td>2.11.0+cu130</td><td>–</td>" in other
    assert "no word of it" in render([read_run(make_run("third"))])


def test_sources_without_weights_have_the_shares_that_were_recorded(make_run):
    folder = make_run(steps=1)
    config = folder / "config.yaml"
    config.write_text(re.sub(r"weight: [\d.]+", "weight: null", config.read_text()))
    for step, size in ((2, 8), (3, 16)):
        shares = {"data/share_code": 0.75, "data/share_math": 0.25, "data/rows": size}
        epochs = {"data/epochs_code": step / 4, "data/epochs_math": step / 8}
        add(folder, step=step, tokens=1024 * step, **shares, **epochs)
    page = render([read_run(folder)])
    part = page[page.index("<h2>Data</h2>") :].split("</section>")[0]
    rows = re.findall(r'<div class="bar"><span>(\w+)</span>.*?<small>(\d+) rows', part)
    # a step of eight rows, and one of sixteen after a life that changed the batch
    assert rows == [("code", "18"), ("math", "6")]
    assert part.count("<svg") == 1
    assert "data/share_code" not in page
    assert "data/epochs_code" not in page


def test_a_trained_and_evaluated_run_has_it_all(workspace):
    arguments = [*SMALL, "run.name=told", "run.steps=2", "validation.every_steps=1"]
    task = workspace / "letters.jsonl"
    items = [
        {"task": "letters", "kind": "perplexity", "id": str(n), "text": f"{n} + {n} = {2 * n}"}
        for n in range(6)
    ]
    task.write_text("".join(json.dumps(item) + "\n" for item in items))
    for words in (
        ["train", *arguments],
        ["evaluate", "run.dir=out/runs/told", "evaluate.depths=[1,4]", f"evaluate.tasks=[{task}]"],
        ["report", "run.dir=out/runs/told"],
    ):
        done = run_cli(workspace, *words)
        assert done.returncode == 0, done.stderr
    page = (workspace / "out/runs/told/report.html").read_text()
    for part in ("Depths of all rows", "<h2>Tasks</h2>", "<h2>Samples</h2>", "<td>torch</td>"):
        assert part in page
    assert read_run(workspace / "out/runs/told").scores[0]["items"] == 6


@pytest.mark.parametrize(
    ("value", "error", "edge"),
    [(0.0, 0.0, "0 %"), (0.0, 0.1, "0 %"), (1.0, 0.0, "100 %"), (0.95, 0.1, "100 %")],
    ids=str,
)
def test_no_axis_of_scores_goes_below_none_or_above_all(make_run, value, error, edge):
    folder = make_run()
    scores = {"exact_match": {"value": [value, value], "standard_error": [error, 0.0]}}
    write_scores(folder, 40, scores=scores)
    page = render([read_run(folder)])
    chart = page[page.index("<b>letters</b>") :].split("</figure>")[0]
    shown = re.findall(r'tick end"[^>]*>([^<]+)<', chart)
    assert edge in shown
    assert all(0 <= float(label.removesuffix(" %")) <= 100 for label in shown)
    ends = [
        float(end) for pair in re.findall(r'y1="([\d.]+)" y2="([\d.]+)"', chart) for end in pair
    ]
    # the figure's own edges: 12 above, 40 below
    assert min(ends) >= 12
    assert max(ends) <= 210
