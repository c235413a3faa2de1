"""`pretrain submit`: what a login node checks and writes, and a run started on this host."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from conftest import SMALL, run_cli
from pretrain.budget import make_plan
from pretrain.compose import load
from pretrain.loop.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
LARGE = ["experiment=huginn-3.5b", "cluster.nodes=32", "run.name=first"]


@pytest.fixture
def without_slurm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment that has git, and no SLURM."""
    folder = tmp_path_factory.mktemp("bin")
    if git := shutil.which("git"):
        (folder / "git").symlink_to(git)
    return {"PATH": str(folder)}


def test_the_login_node_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pretrain import submit\n"
        "from pretrain.sweep import collect, status\n"
        "from pretrain.compose import load\n"
        f"submit.main(load('submit', {[*LARGE, 'submit.dry_run=true']!r}, resumes=True))\n"
        "print([name for name in ('torch', 'deepspeed', 'webdataset') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_dry_run_shows_plan_script_and_command_and_writes_nothing(tmp_path: Path) -> None:
    done = run_cli(
        tmp_path, "submit", *LARGE, "submit.dry_run=true", "submit.chain=3", "submit.after=17"
    )
    assert done.returncode == 0, done.stderr
    step = make_plan(load("submit", LARGE).run_config()).estimate.step
    for said in (
        "256 on 32 hosts",
        "GiB a rank",
        "tokens/s expected",
        f"idle    {step.idle:.1%} of a step, {step.depth_wait_s / step.total_s:.1%} waiting for",
        "rank hours",
        "#SBATCH --nodes=32\n",
        "exec launch/job.sh run.dir=out/runs/first\n",
        "-m pretrain.jobs.progress",
        "sbatch --parsable --dependency=afterany:17 ",
        "and 2 more, each behind the one before",
    ):
        assert said in done.stdout
    assert "shards/manifest.json is not there yet" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_shown_command_names_the_commit(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no repository")
    head = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    done = run_cli(tmp_path, "submit", *LARGE, "submit.dry_run=true")
    assert f"commit {head[:12]}" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.widht=3"], "Did you mean model.width?"),
        (["cluster.partitoin=gpu"], "Did you mean cluster.partition?"),
        (["cluster.nodes=3"], "batch.global_tokens"),
        (["cluster.time=1", "cluster.grace_s=60"], "is not below cluster.time=1"),
        (["submit.chain=0"], "submit.chain=0 must be at least 1"),
        (["submit.after='$(x)'"], "is no SLURM job id"),
        (["submit.to=host", "submit.chain=2"], "has no queue"),
        (["submit.to=host", "cluster.nodes=2"], "submit.to=host is one host"),
        (["submit.to=hostfile"], "submit.hostfile=None"),
        (["submit.hostfile=hosts"], "is for submit.to=hostfile"),
        (
            ["submit.to=host", "cluster.container={kind: pyxis, image: a}"],
            "submit.to=host starts no containers",
        ),
        (["run.dir='a\nb'"], "choose another run.dir"),
        (["run.dir=/dev/null"], "/dev/null cannot be read: [Errno 20] Not a directory"),
    ],
    ids=str,
)
def test_mistakes_are_named_before_anything_is_written(
    overrides: list[str], said: str, tmp_path: Path
) -> None:
    done = run_cli(tmp_path, "submit", *overrides)
    assert done.returncode == 64, done.stdout + done.stderr
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_secret_is_not_frozen(tmp_path: Path) -> None:
    token = "abcdef0123456789"
    done = run_cli(tmp_path, "submit", f"+cluster.environment.A={token}", API_TOKEN=token)
    assert done.returncode == 64
    assert "cluster.environment.A holds a secret" in done.stderr
    assert token not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def test_without_slurm_the_other_ways_are_named(
    tmp_path: Path, without_slurm: dict[str, str]
) -> None:
    done = run_cli(tmp_path, "submit", **without_slurm)
    assert done.returncode == 64
    assert "no sbatch on this machine" in done.stderr
    assert "submit.to=host" in done.stderr


def test_another_run_in_the_folder_is_refused_early(
    tmp_path: Path, without_slurm: dict[str, str]
) -> None:
    # frozen and written, though nobody takes it
    run_cli(tmp_path, "submit", *SMALL, **without_slurm)
    frozen = (tmp_path / "out/runs/tiny/config.yaml").read_text()
    done = run_cli(tmp_path, "submit", *SMALL, "model.width=64", "model.inner=96")
    assert done.returncode == 64
    assert "model.width: 32 in the run folder, 64 asked for" in done.stderr
    assert (tmp_path / "out/runs/tiny/config.yaml").read_text() == frozen


def test_a_run_that_was_asked_to_stop_is_not_submitted(tmp_path: Path) -> None:
    stop = tmp_path / "out/runs/tiny/control/stop"
    stop.parent.mkdir(parents=True)
    stop.touch()
    done = run_cli(tmp_path, "submit", *SMALL, "submit.dry_run=true")
    assert done.returncode == 64
    assert f"{stop} asks the run to stop" in done.stderr


def test_a_job_that_waits_for_another_says_that_its_changes_do_not(tmp_path: Path) -> None:
    run_dir = tmp_path / "out/runs/tiny"
    programs = tmp_path / "bin"
    programs.mkdir()
    said = {"squeue": f"17|RUNNING|{run_dir}", "sbatch": "18"}
    for name, text in said.items():
        (programs / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    first = run_cli(tmp_path, "submit", *SMALL, "submit.after=17", PATH=path)
    assert first.returncode == 0, first.stderr
    assert "if that job queues itself again" not in first.stderr
    changed = run_cli(tmp_path, "submit", *SMALL, "run.steps=99", "submit.after=17", PATH=path)
    assert changed.returncode == 0, changed.stderr
    assert "17 is RUNNING. The changes are written to its config.yaml now" in changed.stderr
    refused = run_cli(tmp_path, "submit", *SMALL, PATH=path)
    assert refused.returncode == 64
    assert "submit.after=17" in refused.stderr


HOSTILE = 'it\'s $HOME; `touch pwned` & "more" \\'


def finished_steps(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return [row["step"] for row in rows if "loss/nats" in row]


def interrupt_after_steps(cwd: Path, run_dir: Path, *words: str) -> subprocess.Popen[str]:
    """Submit, and press Ctrl-C when the run has taken two steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain", "submit", *words],
        cwd=cwd,
        # so that the interpreter leaves traces beside the code that it runs
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while len(finished_steps(run_dir)) < 2:
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(process.communicate()[0])
        time.sleep(0.1)
    # a terminal sends it to everybody
    os.killpg(process.pid, signal.SIGINT)
    return process


# tests/launch has the signals of plain processes, tests/jobs the hosts, tests/slurm the snapshots
@pytest.mark.slow
def test_a_run_on_this_host_trains_from_its_snapshot_and_resumes(
    workspace: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / HOSTILE
    # Hydra's quotes: a single one and a backslash at the end need a backslash
    spelled = HOSTILE.replace("'", "\\'") + "\\"
    where = ["submit.to=host", f"run.dir='{tmp_path}/{spelled}'"]
    begin = [*SMALL, *where, f"logging.tags=['{spelled}']", "run.steps=5000"]
    process = interrupt_after_steps(workspace, run_dir, *begin)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 75, output
    frozen = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert frozen["run"]["dir"] == str(run_dir)
    assert frozen["logging"]["tags"] == [HOSTILE]
    (code,) = (run_dir / "code").iterdir()
    assert list(code.glob("pretrain/loop/__pycache__/steps.*.pyc"))
    assert not list(workspace.rglob("pwned"))
    assert not list(tmp_path.rglob("pwned"))
    saved = finished_steps(run_dir)[-1]
    done = run_cli(workspace, "submit", *where, f"run.steps={saved + 2}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"at step {saved} of {saved + 2}" in done.stdout
    assert f"changes run.steps={saved + 2} (was 5000)" in done.stdout
    assert finished_steps(run_dir) == list(range(1, saved + 3))
    done = run_cli(workspace, "submit", *where)
    assert done.returncode == 0
    assert f"has all its {saved + 2} steps" in done.stdout
