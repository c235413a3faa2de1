"""The main job, run as people run it: the same run whatever stops it and however it is spread."""

import json
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest

from conftest import SMALL, run_cli
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
        process.join(120)
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
