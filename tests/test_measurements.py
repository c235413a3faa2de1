"""What rows of the benchmarks say of the code that was measured."""

import csv
import subprocess
from pathlib import Path

from pretrain.testing import load_module

BENCHMARKS = Path(__file__).parent.parent / "kernels/benchmarks"


def test_rows_name_the_code_that_was_measured(tmp_path, monkeypatch):
    """Tables that a benchmark adds to do not make it another code."""
    folder = tmp_path / "checkout/kernels/benchmarks"
    (folder / "results").mkdir(parents=True)
    program, table = folder / "measurements.py", folder / "results/step.csv"
    program.write_bytes((BENCHMARKS / "measurements.py").read_bytes())
    monkeypatch.delenv("PRETRAIN_COMMIT", raising=False)
    # no repository above it counts
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    measurements = load_module(program)
    assert measurements.commit() == "unknown"
    measurements.append(table, {"tokens_per_s": 1})
    git = ["git", "-C", tmp_path / "checkout", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    assert measurements.commit() == head.stdout.strip()
    measurements.append(table, {"tokens_per_s": 2})
    assert measurements.commit() == head.stdout.strip()
    program.write_text(program.read_text() + "\n")
    assert measurements.commit() == head.stdout.strip() + "-dirty"
    monkeypatch.setenv("PRETRAIN_COMMIT", "f952caa")
    assert measurements.commit() == "f952caa"
    with table.open() as file:
        assert [row["tokens_per_s"] for row in csv.DictReader(file)] == ["1", "2"]
