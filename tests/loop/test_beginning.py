"""A run begins in a folder of its own, and touches nobody else's."""

from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import SMALL, run_cli
from pretrain.compose import load, write_frozen
from pretrain.errors import ConfigError
from pretrain.loop.beginning import check_can_begin
from pretrain.testing import start_commands


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.faults
def test_a_folder_of_somebody_else_is_refused_by_every_rank_and_left_alone(
    workspace: Path,
) -> None:
    """As another program may leave it: its record, and a file that is being written."""
    folder = workspace / "theirs"
    (folder / "checkpoints/model.tmp-1").mkdir(parents=True)
    (folder / "checkpoints/model.tmp-1/weights").write_text("half")
    (folder / "metrics.jsonl").write_text('{"step": 7}\n')
    (folder / "thesis.txt").write_text("mine")
    before = files_in(folder)
    output = workspace / "said/theirs"
    words = ["train", *SMALL, "run.dir=theirs"]
    processes = start_commands(2, words, cwd=workspace, output=output)
    for process in processes:
        process.join(120)
        process.kill()
    said = (output / "0.txt").read_text()
    assert [process.exitcode for process in processes] == [64, 64], said
    assert "it holds checkpoints, metrics.jsonl, thesis.txt. Choose another run.dir" in said
    assert "Traceback" not in said
    submitted = run_cli(workspace, "submit", *SMALL, "run.dir=theirs", "submit.to=host")
    assert submitted.returncode == 64
    assert "run.dir=theirs is no run's folder" in submitted.stderr
    assert files_in(folder) == before


def prepare(folder: Path) -> None:
    (folder / "control").mkdir()
    (folder / "control/pause").touch()


def keep_output(folder: Path) -> None:
    """As `sbatch --output` and `| tee` do, before the command has begun."""
    for name in ("slurm-7.out", "slurm-7.err", "train.log"):
        (folder / name).touch()


def die_early(folder: Path) -> None:
    (folder / "logs").mkdir()
    for name in ("lock.json", "lock.last", "lock.0a.partial", "logs/rank-00000.log"):
        (folder / name).touch()


def build_shards(folder: Path) -> None:
    (folder / "shards").mkdir()
    (folder / "shards/manifest.json").touch()


def begin_before(folder: Path) -> None:
    write_frozen(load("train", [f"run.dir={folder}"]), folder)
    (folder / "notes").touch()


@pytest.mark.parametrize("deed", [prepare, keep_output, die_early, build_shards, begin_before])
def test_what_comes_before_a_run_is_no_obstacle(
    tmp_path: Path, deed: Callable[[Path], None]
) -> None:
    config = load("train", [f"run.dir={tmp_path}", f"data.shards={tmp_path}/shards"])
    deed(tmp_path)
    check_can_begin(config)


def test_a_lost_config_is_asked_for_and_the_first_names_are_told(tmp_path: Path) -> None:
    config = load("train", [f"run.dir={tmp_path}"])
    check_can_begin(config)
    for name in ("metrics.jsonl", "e", "d", "c", ".hidden"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"it holds c, d, e and 1 more\. .*put its config\.yaml"):
        check_can_begin(config)
