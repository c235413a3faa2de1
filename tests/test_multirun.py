"""A sweep is one clean process for each combination, checked before the first one starts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import SMALL, run_cli
from pretrain.errors import ConfigError
from pretrain.multirun import combinations, run_jobs


def test_every_combination_is_a_job() -> None:
    jobs = combinations(["model=tiny", "run.seed=1,2", "depth.mean=range(4,8,2)", "run.name='a,b'"])
    assert jobs == [
        ["model=tiny", f"run.seed={seed}", f"depth.mean={mean}", "run.name='a,b'"]
        for seed in (1, 2)
        for mean in (4, 6)
    ]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run.seed=1,2"], "2 of 2 jobs would train in run.dir="),
        (["run.seed=1,2", "hydra/launcher=basic"], "no effect with --multirun"),
        (["run.seed=interval(1,2)"], "give them one by one"),
        (["run.seed=1,x", "run.name=${run.seed}"], "run.seed: Value 'x'"),
        (["run.name=a(b"], "two pairs of quotes"),
    ],
    ids=str,
)
def test_sweeps_that_cannot_be_are_refused_before_the_first_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        run_jobs("train", "train", overrides)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_sweep_of_several_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="by itself"):
        run_jobs("train", "train", ["run.seed=1"])


def test_plans_are_swept_and_the_worst_exit_code_counts(tmp_path: Path) -> None:
    done = run_cli(tmp_path, "plan", "-m", *SMALL[3:], "data=embedded", "batch.micro_rows=3,4")
    assert done.returncode == 64
    assert "batch.micro_rows=3" in done.stderr
    assert done.stdout.count("Expected speed") == 1
    last = done.stderr.splitlines()[-1]
    assert "1 of 2 jobs failed: job 1 with 64 (" in last
    assert "batch.micro_rows=3)" in last


def test_after_a_signal_no_other_job_starts(tmp_path: Path) -> None:
    words = ["plan", "-m", *SMALL[3:], "data=embedded", "batch.micro_rows=1,2,4"]
    with subprocess.Popen(
        [sys.executable, "-m", "pretrain", *words],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stderr is not None
            while "job 1 of 3" not in (line := process.stderr.readline()):
                assert line
            # to the sweep alone; its job imports for some seconds
            process.terminate()
            said = process.stderr.read()
            assert process.wait(timeout=240) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert "told to stop: the sweep ends at job 1 of 3" in said
    assert "job 2 of 3" not in said


@pytest.mark.slow  # two whole starts; the other tests cover all but the training
def test_two_runs_train_one_after_the_other(workspace: Path) -> None:
    done = run_cli(
        workspace, "train", "-m", *SMALL, "run.steps=1", "run.seed=5,6",
        "run.name=seed-${run.seed}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for seed in (5, 6):
        assert (workspace / f"out/runs/seed-{seed}/checkpoints/step-0000000001").is_dir()
