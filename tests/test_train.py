"""The main job, run as people run it: the same run whatever stops it and however it is spread."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import pytest

from conftest import SMALL, run_cli, weights_of
from pretrain.loop.lineage import read_lives
from pretrain.testing import start_commands

STEADY = ["loss/nats", "gradient/norm", "optimizer/learning_rate", "data/checksum", "depth/mean"]


def read_steps(run_dir: Path) -> dict[int, list[float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: [r[key] for key in STEADY] for r in records if "loss/nats" in r}


def read_validations(run_dir: Path) -> dict[int, list[float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: r["validation/loss_nats"] for r in records if "validation/loss_nats" in r}


def train(workspace: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    return run_cli(workspace, "train", *SMALL, f"run.name={name}", *overrides)


@pytest.fixture(scope="module")
def finished(workspace: Path) -> Path:
    """An uninterrupted run of six steps."""
    done = train(workspace, "whole", "logging.part_norms_every_steps=2")
    assert done.returncode == 0, done.stderr
    return workspace / "out/runs/whole"


def test_training_learns_and_leaves_a_record(finished: Path) -> None:
    steps = read_steps(finished)
    assert list(steps) == [1, 2, 3, 4, 5, 6]
    assert steps[6][0] < steps[1][0] - 0.2
    assert sorted(read_validations(finished)) == [3, 6]
    assert (finished / "plots/loss-by-depth.png").stat().st_size > 10_000
    assert (finished / "checkpoints/latest").read_text().strip() == "step-0000000006"
    log = (finished / "logs/rank-00000.log").read_text()
    assert "step 6/6" in log
    assert "validation at step 6" in log


def test_each_step_says_where_its_time_tokens_and_gradient_went(finished: Path) -> None:
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "loss/nats" in record]
    began_s = read_lives(finished)[0].began_s
    for record in steps:
        split = [record[f"time/{name}_s"] for name in ("forward", "backward", "wait", "update")]
        assert min(split) >= 0
        assert sum(split) + record["data/wait_s"] == pytest.approx(record["speed/step_s"])
        assert sum(record["depth/histogram"]) == record["data/rows"] == 16
        assert record["data/share_prose"] + record["data/share_sums"] == 1
        assert record["speed/mfu"] * record["speed/peak_flops"] == pytest.approx(
            record["speed/model_flops_per_s_per_rank"]
        )
        parts = [record[key] ** 2 for key in record if key.startswith("gradient/norm_")]
        assert len(parts) == (5 if record["step"] % 2 == 0 else 0)
        if parts:
            assert sum(parts) ** 0.5 == pytest.approx(record["gradient/norm"], rel=1e-4)
        assert not any(key.startswith("gpu/") for key in record)
    # a process that is alone computes most of the time, however busy the machine is; of six steps,
    # so that neither the reader's start in the first one nor a pause in another one decides
    shares = [
        (record["time/forward_s"] + record["time/backward_s"]) / record["speed/step_s"]
        for record in steps
    ]
    assert statistics.median(shares) > 0.25
    assert steps[-1]["progress/left_s"] == 0 < steps[0]["progress/left_s"]
    epochs = [record["data/epochs_prose"] for record in steps]
    assert epochs == sorted(epochs)
    assert 0 < epochs[0] < epochs[-1]
    # of the time since the run began, what was in steps; so it says how long ago the run began,
    # which a step makes longer by itself at least (the wall clock may be slowed by 0.05 %)
    counted_s = list(accumulate(record["speed/step_s"] for record in steps))
    ages_s = [s / r["progress/goodput"] for s, r in zip(counted_s, steps, strict=True)]
    latest_s = (finished / "metrics.jsonl").stat().st_mtime - began_s
    assert counted_s[-1] < ages_s[-1] <= latest_s
    for record, (before_s, age_s) in zip(steps, pairwise([0.0, *ages_s]), strict=True):
        assert age_s - before_s > 0.999 * record["speed/step_s"]


def test_a_finished_run_does_not_start_over(workspace: Path, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    again = run_cli(workspace, "train", f"run.dir={finished}")
    assert again.returncode == 0, again.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_evaluate_and_generate_read_the_run(workspace: Path, finished: Path) -> None:
    done = run_cli(
        workspace, "evaluate", f"run.dir={finished}", "evaluate.depths=[1,2,4]", "evaluate.rows=8"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((finished / "evaluation/step-0000000006.json").read_text())
    assert result["validation/loss_nats"] == pytest.approx(read_validations(finished)[6], rel=1e-5)
    missing = run_cli(workspace, "evaluate", f"run.dir={finished}", "evaluate.step=7")
    assert missing.returncode == 65
    assert "has no checkpoint of step 7; it has 6, " in missing.stderr
    arguments = ["generate", f"run.dir={finished}", "generate.prompt='12 + 30 ='",
                 "generate.max_new_tokens=8", "generate.num_steps=4"]  # fmt: skip
    first, second = run_cli(workspace, *arguments), run_cli(workspace, *arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("12 + 30 =")
    assert len(first.stdout) > len("12 + 30 =\n")
    assert first.stdout == second.stdout


def kill_after(workspace: Path, name: str, step: int) -> None:
    """Start the run, and kill it without warning once it has logged `step`."""
    command = [sys.executable, "-m", "pretrain", "train", *SMALL, f"run.name={name}"]
    process = subprocess.Popen(
        command, cwd=workspace, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    metrics = workspace / f"out/runs/{name}/metrics.jsonl"
    deadline = time.monotonic() + 240
    try:
        while not (metrics.exists() and f'"step":{step},' in metrics.read_text()):
            assert process.poll() is None, f"{name} ended before step {step}"
            assert time.monotonic() < deadline, f"{name} did not reach step {step}"
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()


@pytest.mark.faults
def test_two_resumes_after_kill_are_bitwise_the_same_run(workspace: Path, finished: Path) -> None:
    kill_after(workspace, "killed", 3)
    kill_after(workspace, "killed", 5)
    done = train(workspace, "killed")
    assert done.returncode == 0, done.stderr
    killed = workspace / "out/runs/killed"
    assert read_steps(killed) == read_steps(finished)
    assert read_validations(killed) == read_validations(finished)
    assert weights_of(killed, 6) == weights_of(finished, 6)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_saves_and_asks_to_be_requeued(
    workspace: Path, finished: Path, number: signal.Signals
) -> None:
    name = f"signalled-{number.name}"
    run_dir = workspace / "out/runs" / name
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain", "train", *SMALL, f"run.name={name}", "run.steps=100000"],
        cwd=workspace, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not (run_dir / "metrics.jsonl").exists() or not read_steps(run_dir):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=240) == 75
    record = json.loads((run_dir / "requeue.json").read_text())
    newest = (run_dir / "checkpoints/latest").read_text().strip()
    assert newest == f"step-{record['step']:010d}"
    assert max(read_steps(run_dir)) == record["step"]
    log = (run_dir / "logs/rank-00000.log").read_text().strip()
    assert log.endswith(f"to go on: pretrain train run.dir=out/runs/{name}")
    assert not (run_dir / "lock.json").exists()


def test_ranks_share_the_work_without_changing_it(workspace: Path, finished: Path) -> None:
    reference = read_steps(finished)
    for ranks in (2, 4):
        name = f"ranks-{ranks}"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={ranks}", "-m", "pretrain", "train", *SMALL, f"run.name={name}",
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=workspace, env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        steps = read_steps(workspace / "out/runs" / name)
        for step, values in reference.items():
            # fp32 sums in another order: 6 steps of 16 rows of 32 tokens, each about 1e-6 off
            assert steps[step] == pytest.approx(values, rel=2e-5)
            assert steps[step][3] == values[3], "the rows of the step"
            assert steps[step][4] == values[4], "the depths of the step"


def test_a_run_on_two_ranks_resumes_on_one(workspace: Path, finished: Path) -> None:
    name = "elastic"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "pretrain", "train", *SMALL, f"run.name={name}", "run.steps=4",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=workspace, env=environment, timeout=400, check=True)
    done = train(workspace, name, "engine.zero_stage=2")
    assert done.returncode == 0, done.stderr
    steps = read_steps(workspace / "out/runs" / name)
    assert list(steps) == [1, 2, 3, 4, 5, 6]
    assert steps[5][3:] == read_steps(finished)[5][3:]


def _put_rank_1(elsewhere: Path) -> None:
    if os.environ["RANK"] == "1":
        os.chdir(elsewhere)


def test_ranks_with_other_shards_do_not_train_together(workspace: Path, tmp_path: Path) -> None:
    """A folder of a node's own disk may be left from an earlier build."""
    there = tmp_path / "node"
    shutil.copytree(workspace / "out/tokenizer", there / "out/tokenizer")
    shutil.copytree(workspace / "text/sums", there / "text/sums")
    assert run_cli(there, "data", "build", *SMALL).returncode == 0
    processes = start_commands(
        2, ["train", *SMALL, f"run.dir={tmp_path}/run"],
        cwd=workspace, output=tmp_path / "said", before=partial(_put_rank_1, there),
    )  # fmt: skip
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [65, 65]
    for rank in range(2):
        assert (
            "DataError: rank 1 has data_fingerprint " in (tmp_path / f"said/{rank}.txt").read_text()
        )
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.faults
def test_a_run_is_not_read_with_other_shards(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent.parent, tmp_path / "out")
    (manifest,) = (tmp_path / "out/data").rglob("manifest.json")
    manifest.write_text(manifest.read_text() + "\n")
    for command in (["evaluate", "evaluate.depths=[1]"], ["train", "run.steps=7"]):
        done = run_cli(tmp_path, *command, "run.dir=out/runs/whole")
        assert done.returncode == 65
        assert "The run has trained on data" in done.stderr
        assert "Traceback" not in done.stderr
    (tmp_path / "out/data").rename(tmp_path / "out/elsewhere")
    done = run_cli(tmp_path, "evaluate", "run.dir=out/runs/whole")
    assert done.returncode == 65
    assert "which is not here" in done.stderr
    assert "into out/runs/whole/config.yaml" in done.stderr


BAD = [
    (["model.width=64"], 64, "model.width: 32 in the run folder, 64 asked for"),
    (["model=tiny", "model.typo=1"], 64, "model.typo"),
    (["batch.micro_rows=5"], 64, "does not divide: 1 ranks x batch.micro_rows=5"),
    (["data.shards=nowhere"], 65, "pretrain data build"),
    (["tokenizer.path=nowhere"], 65, "pretrain data tokenizer"),
    (["data.sources.prose.weight=3"], 64, "data.sources"),
    (["run.seed=9"], 64, "run.seed: 0 in the run folder, 9 asked for"),
]


@pytest.mark.parametrize(("overrides", "code", "said"), BAD, ids=[bad[0][-1] for bad in BAD])
def test_mistakes_stop_before_training_and_harm_nothing(
    workspace: Path, finished: Path, overrides: list[str], code: int, said: str
) -> None:
    # lock.last only says which life looked at the folder last
    files = [p for p in finished.rglob("*") if p.is_file() and p.name != "lock.last"]
    before = {path: path.read_bytes() for path in files}
    done = train(workspace, "whole", *overrides)
    assert said in done.stderr
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    after = {path: path.read_bytes() for path in before}
    assert after == before
