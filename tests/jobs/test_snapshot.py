"""A job's code is the checkout's at the moment of submission, and stays so."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from pretrain.errors import ConfigError
from pretrain.jobs import snapshot
from pretrain.jobs.snapshot import checkout, describe, take


def git(root: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", "-C", root, *identity, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small repository."""
    folder = tmp_path / "checkout"
    for name in ("pretrain/code.py", "conf/train.yaml", "launch/job.sh", "tests/test_code.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n")
    (folder / "launch/job.sh").chmod(0o755)
    (folder / ".gitignore").write_text("*.log\n")
    git(tmp_path, "init", "-q", str(folder))
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "start")
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_it_holds_what_git_tracks_with_the_changes_and_what_is_new(
    root: Path, tmp_path: Path
) -> None:
    (root / "pretrain/code.py").write_text("changed = 1\n")
    (root / "pretrain/new name.py").write_text("new = 1\n")
    (root / "conf/train.yaml").unlink()
    (root / "pretrain/noise.log").write_text("ignored")
    snapshot = take(root, tmp_path / "code")
    assert files(snapshot.folder) == [
        "launch/job.sh", "pretrain/code.py", "pretrain/new name.py", "snapshot.json"
    ]  # fmt: skip
    assert (snapshot.folder / "pretrain/code.py").read_text() == "changed = 1\n"
    assert (snapshot.folder / "launch/job.sh").stat().st_mode & 0o111
    record = json.loads((snapshot.folder / "snapshot.json").read_text())
    assert record["commit"] == snapshot.commit == git(root, "rev-parse", "HEAD")
    assert record["diff_sha256"] == snapshot.diff_sha256 != ""


def test_a_clean_checkout_has_no_difference_and_every_change_another_one(
    root: Path, tmp_path: Path
) -> None:
    clean = describe(root, tmp_path)
    assert clean.diff_sha256 == ""
    (root / "pretrain/code.py").write_text("changed = 1\n")
    changed = describe(root, tmp_path)
    (root / "pretrain/more.py").write_text("")
    added = describe(root, tmp_path)
    assert len({clean.diff_sha256, changed.diff_sha256, added.diff_sha256}) == 3
    assert len({clean.tree_sha256, changed.tree_sha256, added.tree_sha256}) == 3
    assert clean.commit == changed.commit == added.commit


def test_later_edits_do_not_reach_it_and_equal_code_is_stored_once(
    root: Path, tmp_path: Path
) -> None:
    first = take(root, tmp_path / "code")
    (root / "pretrain/code.py").write_text("changed = 1\n")
    second = take(root, tmp_path / "code")
    assert (first.folder / "pretrain/code.py").read_text() == "# pretrain/code.py\n"
    (root / "pretrain/code.py").write_text("# pretrain/code.py\n")
    assert take(root, tmp_path / "code") == first
    assert {path.name for path in (tmp_path / "code").iterdir()} == {
        first.folder.name,
        second.folder.name,
    }


def test_a_copy_that_was_edited_is_refused(root: Path, tmp_path: Path) -> None:
    snapshot = take(root, tmp_path / "code")
    (snapshot.folder / "pretrain/code.py").write_text("edited = 1\n")
    with pytest.raises(ConfigError, match="was edited"):
        take(root, tmp_path / "code")


def test_an_unpacked_archive_has_no_commit_but_a_hash(root: Path, tmp_path: Path) -> None:
    in_git = describe(root, tmp_path)
    shutil.rmtree(root / ".git")
    (root / "pretrain/__pycache__").mkdir()
    (root / "pretrain/__pycache__/code.pyc").write_text("")
    snapshot = take(root, tmp_path / "code")
    assert snapshot.commit == snapshot.diff_sha256 == ""
    assert snapshot.tree_sha256 == in_git.tree_sha256


def test_what_jobs_say_in_an_unpacked_archive_is_no_part_of_the_code(
    root: Path, tmp_path: Path
) -> None:
    shutil.rmtree(root / ".git")
    before = describe(root, tmp_path / "code")
    log = root / "slurm/logs/pretrain-17/rank-0.log"
    log.parent.mkdir(parents=True)
    log.write_text("step 1\n")
    assert describe(root, tmp_path / "code") == before


def test_this_checkout_is_found() -> None:
    assert checkout() == Path(__file__).resolve().parents[2]


def test_running_code_knows_its_commit_here_and_in_a_copy(tmp_path, monkeypatch) -> None:
    here = snapshot.code_origin()
    copied = snapshot.take(snapshot.checkout(), tmp_path)
    assert here == {"commit": copied.commit, "diff_sha256": copied.diff_sha256}
    monkeypatch.setattr(snapshot, "checkout", lambda: copied.folder)
    assert snapshot.code_origin() == here
    (copied.folder / "snapshot.json").write_text("torn {")
    assert snapshot.code_origin() == {}
