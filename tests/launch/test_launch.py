"""One host: plain processes and torchrun, with the real program."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import SMALL
from pretrain.loop.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"PRETRAIN_PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


@pytest.fixture
def project(tmp_path: Path, workspace: Path) -> Path:
    """The launchers as a user has them, beside text, tokenizer and shards."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    for name in ("text", "out"):
        (tmp_path / name).symlink_to(workspace / name)
    return tmp_path


@pytest.fixture
def start(project: Path) -> Iterator:
    """Starts a launcher in the background; what still runs at the end is killed as a group."""
    processes: list[subprocess.Popen[str]] = []

    def begin(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            words,
            cwd=project,
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # not read to its end: torchrun's ranks have sessions of their own, and may hold it still
        process.stderr.close()


def finished_steps(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return [record["step"] for record in records if "loss/nats" in record]


def test_plain_processes_save_on_a_signal_and_torchrun_goes_on(project: Path, start) -> None:
    run_dir = project / "run"
    overrides = [*SMALL, f"run.dir={run_dir}", "run.steps=60"]
    process = start("launch/plain.sh", "2", *overrides)
    deadline = time.monotonic() + 240
    while len(finished_steps(run_dir)) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 75, errors
    assert len(finished_steps(run_dir)) < 60
    process = start("launch/local.sh", "2", *overrides)
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors
    assert finished_steps(run_dir) == list(range(1, 61))
    assert {path.name for path in (run_dir / "logs").iterdir()} == {
        "rank-00000.log",
        "rank-00001.log",
    }


def test_plain_processes_keep_the_code_of_the_failure(project: Path, start) -> None:
    process = start("launch/plain.sh", "2", *SMALL, "model.widht=3")
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 64, errors
    assert "widht" in errors


SLOW_TO_CHOOSE = """#!/bin/bash
# Instead of the interpreter: is slow to choose a port; as a rank it would stay for long.
if [[ $1 != -c ]]; then exec sleep 300; fi
touch "$0.begun"
until [[ -e $0.go ]]; do sleep 0.05; done
echo 1
"""


def test_a_signal_before_the_first_rank_is_not_lost(project: Path, start) -> None:
    program = project / "slow-to-choose"
    program.write_text(SLOW_TO_CHOOSE)
    program.chmod(0o755)
    process = start("env", f"PRETRAIN_PYTHON={program}", "launch/plain.sh", "2")
    deadline = time.monotonic() + 60
    while not program.with_name("slow-to-choose.begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    program.with_name("slow-to-choose.go").touch()
    assert process.wait(timeout=120) == 128 + signal.SIGTERM


DIES_OR_HANGS = """#!/bin/bash
# Instead of training: rank 1 dies, and rank 0 waits for it, as in a collective.
if [[ $1 == -c ]]; then echo 1; exit; fi
if [[ $RANK == 1 ]]; then kill -SEGV $$; fi
exec sleep 300
"""


def test_ranks_that_wait_for_a_dead_one_are_ended(project: Path) -> None:
    program = project / "dies-or-hangs"
    program.write_text(DIES_OR_HANGS)
    program.chmod(0o755)
    script = project / "launch/plain.sh"
    script.write_text(script.read_text().replace("patience_s=20", "patience_s=1"))
    done = subprocess.run(
        [script, "2"],
        env=os.environ | {"PRETRAIN_PYTHON": str(program)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 128 + signal.SIGSEGV
    assert "a rank ended with code 139" in done.stderr


@pytest.mark.parametrize("script", ["plain.sh", "local.sh"])
@pytest.mark.parametrize("arguments", [[], ["experiment=huginn-100m"], ["0"]])
def test_the_number_of_ranks_is_asked_for(script: str, arguments: list[str]) -> None:
    done = subprocess.run([ROOT / "launch" / script, *arguments], capture_output=True, text=True)
    assert done.returncode == 64
    assert "usage: launch/" in done.stderr


def test_an_interpreter_that_is_missing_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "launch/node.sh", "plan"],
        env=os.environ | {"PRETRAIN_PYTHON": str(tmp_path / "python")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 64
    assert str(tmp_path / "python") in done.stderr
