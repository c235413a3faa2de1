"""What the tutorials ask their reader to write is run as it stands on the page."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import run_cli
from pretrain import plan
from pretrain.budget import make_plan
from pretrain.compose import load
from pretrain.engine.memory import GIB
from test_readme import written_files

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = ROOT / "docs/tutorials"


@pytest.fixture
def copy_with_kernel(tmp_path: Path) -> Path:
    """The parts of the project that the tutorial about kernels adds to, with its files."""
    for name in ("kernels/pretrain_kernels", "kernels/benchmarks/micro_ops", "tests/kernels"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    page = TUTORIALS / "add-a-kernel.md"
    files = written_files(page)
    assert len(files) == 5
    for name, text in files.items():
        assert not (ROOT / name).exists(), f"{name} is there already"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (cases,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    compiled = tmp_path / "tests/kernels/test_compiled.py"
    text = compiled.read_text()
    assert text.count("CASES = {\n") == 1
    compiled.write_text(text.replace("CASES = {\n", "CASES = {\n" + cases))
    return tmp_path


def run_python(folder: Path, *arguments: str, **environment: str) -> None:
    paths = [folder / "kernels", folder / "kernels/benchmarks", ROOT]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
        | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.timeout(900)
def test_the_kernel_of_the_tutorial_is_right(copy_with_kernel: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    quiet = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    run_python(copy_with_kernel, *quiet, "tests/kernels/test_squared_relu.py", TRITON_INTERPRET="1")
    run_python(copy_with_kernel, *quiet, "tests/kernels/test_compiled.py", "-k", "squared")


def test_the_benchmark_of_the_tutorial_agrees_with_float64(copy_with_kernel: Path) -> None:
    code = """
from dataclasses import replace

import torch
from micro_ops.activations import cases
from micro_ops.case import Sizes
from micro_ops.check import find_faults

sizes = Sizes(tokens=40, width=96, inner=80, heads=4, head_width=24, vocabulary=300, elements=9)
found = list(cases(sizes))
assert len(found) == 2
for case in found:
    providers = {name: case.providers[name] for name in ("ours", "eager")}
    assert find_faults(replace(case, providers=providers), torch.device("cpu")) == {}
"""
    run_python(copy_with_kernel, "-c", code)


def shown_after(page: str, command: str) -> tuple[list[str], list[str]]:
    """The arguments of the first such command of a page that has output, and that output."""
    text, commands = (TUTORIALS / page).read_text(encoding="utf-8"), ""
    for language, block in re.findall(r"^```(sh|text)\n(.*?)^```", text, flags=re.M | re.S):
        if language == "sh":
            commands = block.replace("\\\n", " ")
            continue
        for line in commands.splitlines():
            if line.startswith(command):
                words = shlex.split(line, comments=True)[len(command.split()) :]
                return words, [" ".join(each.split()) for each in block.splitlines()]
    raise AssertionError(f"{page} shows nothing that comes of {command}")


@pytest.mark.parametrize("page", ["one-gpu.md", "slurm.md"])
def test_a_plan_of_a_tutorial_is_what_plan_prints(
    page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, shown = shown_after(page, "pretrain plan")
    plan.main(load("train", words))
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert len(shown) > 3
    assert [line for line in shown if not any(each.startswith(line) for each in printed)] == []


def test_what_submit_says_in_its_tutorial_is_what_it_prints(tmp_path: Path) -> None:
    words, shown = shown_after("slurm.md", "pretrain submit")
    assert "submit.dry_run=true" in words
    done = run_cli(tmp_path, "submit", *words)
    assert done.returncode == 0, done.stderr
    printed = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert len(shown) > 3
    assert [line for line in shown if line not in printed] == []


def test_the_memory_of_a_tutorial_is_what_a_plan_expects() -> None:
    text = (TUTORIALS / "one-gpu.md").read_text(encoding="utf-8")
    heading, _, *rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]]
        for line in re.findall(r"^\| `batch\.micro_rows`(?:.*\n)+?\n", text, flags=re.M)[0].split(
            "\n"
        )
        if line
    ]
    for row, overrides in zip(rows, ([], ["engine.checkpoint_activations=true"]), strict=True):
        for micro_rows, size in zip(heading[1:], row[1:], strict=True):
            cut = [f"batch.micro_rows={micro_rows}", *overrides]
            total = make_plan(load("train", ["experiment=huginn-100m", *cut])).memory.total
            assert f"{total / GIB:.1f}" == size, (row[0], micro_rows)


def test_the_memory_of_the_first_questions_is_what_a_plan_expects() -> None:
    text = (ROOT / "docs/questions.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(experiment=\S+)` \| (\d) \| (\S+) GiB \| (\S+) GiB \|$", text, re.M)
    assert len(rows) == 2
    alone = ["cluster.nodes=1", "cluster.gpus_per_node=1"]
    for experiment, micro_rows, kept, recomputed in rows:
        for size, is_recomputed in ((kept, "false"), (recomputed, "true")):
            cut = [
                f"batch.micro_rows={micro_rows}",
                f"engine.checkpoint_activations={is_recomputed}",
            ]
            total = make_plan(load("train", [experiment, *alone, *cut])).memory.total
            assert f"{total / GIB:.1f}" == size, (experiment, size)


def test_the_tutorial_about_reports_names_what_a_report_has() -> None:
    page = (TUTORIALS / "read-a-report.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text() for path in (ROOT / "pretrain/reporting").glob("*.py"))
    there = re.findall(r'section\("([^"]+)"', sources)
    head, *named = re.findall(r"^## (.*)", page, flags=re.M)
    assert head == "The head"
    assert [title for title in named if title not in there] == []
    charts = re.findall(r"\*\*([^*]+?)\.?\*\*", page[page.index("## Learning") :])
    assert len(charts) > 15
    assert [title for title in charts if f'"{title}"' not in sources] == []
