"""Every rank leaves its own exit code for the batch script, with what is behind it."""

import json
from pathlib import Path

import pytest

from conftest import SMALL, run_cli
from pretrain.loop.exit_record import note_exit


def test_a_user_s_mistake_is_final_and_named(workspace: Path, tmp_path: Path) -> None:
    done = run_cli(
        workspace, "train", *SMALL, "model.widht=3",
        PRETRAIN_EXIT_FOLDER=str(tmp_path / "ended"), SLURM_PROCID="3",
    )  # fmt: skip
    assert done.returncode == 64
    record = json.loads((tmp_path / "ended/3.json").read_text())
    assert record == {"code": 64, "error": "ConfigError", "is_final": True}
    assert [path.name for path in (tmp_path / "ended").iterdir()] == ["3.json"]


def test_a_store_that_is_away_is_not_final(workspace: Path, tmp_path: Path) -> None:
    done = run_cli(
        workspace, "train", *SMALL, "data.shards=http://127.0.0.1:9", "data.cache=cache",
        PRETRAIN_EXIT_FOLDER=str(tmp_path), SLURM_PROCID="0",
    )  # fmt: skip
    assert done.returncode == 65
    assert "Traceback" not in done.stderr
    record = json.loads((tmp_path / "0.json").read_text())
    assert record == {"code": 65, "error": "UnreachableError", "is_final": False}


def test_an_unforeseen_error_may_go_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRAIN_EXIT_FOLDER", str(tmp_path))
    monkeypatch.setenv("SLURM_PROCID", "0")
    note_exit(70, RuntimeError("connection closed by peer"))
    assert json.loads((tmp_path / "0.json").read_text()) == {
        "code": 70,
        "error": "RuntimeError",
        "is_final": False,
    }


def test_no_folder_no_record_and_a_bad_one_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRETRAIN_EXIT_FOLDER", raising=False)
    note_exit(0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("PRETRAIN_EXIT_FOLDER", str(tmp_path / "file/below"))
    note_exit(0)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
