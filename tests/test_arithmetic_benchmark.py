"""The benchmark of sums: what it asks, which words are its own, and what its pictures are of."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pretrain.tasks.records import Kind, read_task
from pretrain.testing import load_module

BENCHMARKS = Path(__file__).parent.parent / "kernels/benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return load_module(BENCHMARKS / "arithmetic.py")


def test_words_that_are_no_options_are_overrides(benchmark: ModuleType) -> None:
    options, words = benchmark.Options.read(["seconds=60", "model.width=64", "digits=3"])
    assert (options.seconds, options.digits, options.longest) == (60.0, 3, 20)
    assert words == ["model.width=64"]


def test_every_length_has_its_file_of_items(benchmark: ModuleType, tmp_path: Path) -> None:
    paths = benchmark.write_tasks(tmp_path / "tasks", benchmark.Options(longest=3, items=90))
    tasks = [read_task(path) for path in paths]
    # of one digit there are no more sums
    assert [len(task.items) for task in tasks] == [81, 90, 90]
    assert {task.kind for task in tasks} == {Kind.exact}


def test_a_table_has_a_row_for_every_cell_and_can_be_drawn(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    folder, options = tmp_path / "run", benchmark.Options(digits=2)
    found = folder / "evaluation/step-0000000007"
    found.mkdir(parents=True)
    record = {"step": 7, "tokens": 70, "loss/nats": 1.5}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    for length in (1, 2, 3):
        values = [0.25 * length, 0.3 * length]
        score = {"value": values, "standard_error": [0.01, 0.02]}
        summary = {"depths": [1, 4], "items": 50, "scores": {
            "exact_match": score, "token_accuracy": score | {"value": [0.9, 1.0]},
        }}  # fmt: skip
        (found / f"length-{length:02}.json").write_text(json.dumps(summary))
    runs = [benchmark.Run(name, 0, folder, []) for name in ("one", "two")]
    benchmark.write_rows(tmp_path / "rows.csv", runs, options)
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2
    assert {key: rows[5][key] for key in ("run", "length", "depth", "accuracy", "tokens")} == {
        "run": "one", "length": "3", "depth": "4", "accuracy": "0.9", "tokens": "70",
    }  # fmt: skip
    paths = benchmark.plot(tmp_path / "rows.csv", tmp_path / "images")
    assert [path.name for path in paths] == ["rows-depth.png", "rows-map.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic-highest"])
def test_the_tables_that_were_measured_can_be_drawn(
    benchmark: ModuleType, name: str, tmp_path: Path
) -> None:
    paths = benchmark.plot(BENCHMARKS / f"results/{name}.csv", tmp_path)
    assert [path.name for path in paths] == [f"{name}-depth.png", f"{name}-map.png"]


def test_the_lengths_that_are_drawn_reach_from_end_to_end(benchmark: ModuleType) -> None:
    spread = sys.modules["arithmetic_plots"]._spread
    drawn = spread(list(range(1, 21)), 9)
    assert (drawn[0], drawn[-1], len(drawn)) == (1, 20, 8)
    # the last that was trained, though it is none of seven even steps
    assert 9 in drawn
    assert spread([3], 10) == [3]


def test_a_run_is_asked_by_control_files(benchmark: ModuleType, tmp_path: Path) -> None:
    run = benchmark.Run("one", 0, tmp_path, [])
    # nothing to ask before the run has begun
    run.ask("pause", True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "control").mkdir()
    run.ask("pause", True)
    assert (tmp_path / "control/pause").is_file()
    run.ask("pause", False)
    assert not list((tmp_path / "control").iterdir())
    assert run.steps == 0
    assert not run.is_running


def test_a_failure_has_the_last_words_of_who_failed(benchmark: ModuleType, tmp_path: Path) -> None:
    options = [f"out={tmp_path / 'out'}", "digits=0", "threads=1"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "arithmetic.py"), *options],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert "data tokenizer failed" in done.stderr
    assert "it needs data.max_digits of 1 or more, not 0" in done.stderr
    assert not list((tmp_path / "out/lowest/runs").iterdir())
