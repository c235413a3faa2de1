import json
from pathlib import Path

import pytest

from pretrain.engine import commit
from pretrain.errors import CheckpointError


def make(run_dir: Path, step: int) -> Path:
    """A committed checkpoint of one small file."""
    final = commit.step_folder(run_dir, step)
    temporary = final.with_name(f"{final.name}.tmp-abc")
    commit.make_temporary(temporary)
    record = commit.write_json(temporary / "data.json", {"step": step})
    manifest = {"format": commit.FORMAT, "files": {"data.json": record._asdict()}}
    commit.commit(temporary, final, manifest)
    return final


def names(folders: list[Path]) -> list[int | None]:
    return [commit.step_of(folder) for folder in folders]


def test_a_commit_leaves_one_whole_folder_that_latest_names(tmp_path: Path) -> None:
    final = make(tmp_path, 7)
    assert sorted(path.name for path in final.parent.iterdir()) == ["latest", "step-0000000007"]
    assert (final.parent / "latest").read_text() == "step-0000000007\n"
    assert commit.find_damage(final) == ""


def test_checkpoints_are_listed_newest_first_and_nothing_else_is(tmp_path: Path) -> None:
    for step in (5, 20, 10):
        make(tmp_path, step)
    (commit.checkpoints_folder(tmp_path) / "step-0000000030.tmp-x").mkdir()
    (commit.checkpoints_folder(tmp_path) / "step-40").mkdir()
    assert names(commit.committed(tmp_path)) == [20, 10, 5]
    assert commit.committed(tmp_path / "nowhere") == []


@pytest.mark.faults
def test_a_damaged_checkpoint_of_the_same_step_makes_way(tmp_path: Path) -> None:
    final = make(tmp_path, 3)
    (final / "data.json").write_text("{}")
    assert commit.find_damage(final)
    assert commit.find_damage(make(tmp_path, 3)) == ""
    assert len(list(final.parent.iterdir())) == 2


@pytest.mark.faults
@pytest.mark.parametrize("name", ["data.json", "manifest.json"])
def test_every_flipped_byte_and_every_truncation_is_found(tmp_path: Path, name: str) -> None:
    final = make(tmp_path, 1)
    whole = (final / name).read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << (position % 8)
        (final / name).write_bytes(flipped)
        # A manifest may survive a change of its white space.
        is_same = name == "manifest.json" and _loads(bytes(flipped)) == json.loads(whole)
        assert bool(commit.find_damage(final)) != is_same, position
        (final / name).write_bytes(whole[:position])
        if whole[position:].strip():
            assert commit.find_damage(final), position
    (final / name).unlink()
    assert commit.find_damage(final)


def _loads(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_shares_of_the_verification_cover_every_file(tmp_path: Path) -> None:
    final = commit.step_folder(tmp_path, 1)
    temporary = final.with_name("step-0000000001.tmp-a")
    commit.make_temporary(temporary)
    files = {f"f{i}": commit.write_json(temporary / f"f{i}", i)._asdict() for i in range(5)}
    commit.commit(temporary, final, {"format": commit.FORMAT, "files": files})
    for name in files:
        (final / name).write_text("x")
        found = [commit.find_damage(final, share=share, shares=3) for share in range(3)]
        assert sum(bool(damage) for damage in found) == 1
        (final / name).write_text(name[1:] + "\n")


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    final = make(tmp_path, 1)
    (final / "manifest.json").write_text('{"format": 99, "files": {}}')
    with pytest.raises(CheckpointError, match=r"format 99.*format 1"):
        commit.read_manifest(final)


@pytest.mark.faults
def test_what_dead_processes_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    final = make(tmp_path, 1)
    folder = final.parent
    (folder / "step-0000000002.tmp-aa").mkdir()
    (folder / "step-0000000002.tmp-aa" / "part").write_text("x")
    (folder / "step-0000000000.deleting-bb").mkdir()
    (folder / "latest.tmp-cc").write_text("x")
    assert commit.sweep_temporaries(tmp_path) == [
        "latest.tmp-cc",
        "step-0000000000.deleting-bb",
        "step-0000000002.tmp-aa",
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["latest", final.name]
    assert commit.sweep_temporaries(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("saved", "keep_last", "keep_every", "doomed"),
    [
        (50, 2, 0, [30, 20, 10]),
        (50, 1, 20, [30, 10]),
        (50, 9, 0, []),
        # 40 and 50 were found damaged, the run went on from 20 and has saved 30.
        (30, 1, 0, [20, 10]),
    ],
)
def test_the_last_and_every_nth_are_kept(
    saved: int, keep_last: int, keep_every: int, doomed: list[int]
) -> None:
    folders = [Path(f"step-{step:010d}") for step in (50, 40, 30, 20, 10)]
    found = commit.prunable(folders, saved=saved, keep_last=keep_last, keep_every=keep_every)
    assert names(found) == doomed


@pytest.mark.parametrize(
    ("first_bad", "doomed"),
    [
        # a run whose step 50 was good needs nothing older
        (51, [40, 30, 20, 10]),
        (50, [30, 20, 10]),
        (35, [40, 20, 10]),
        (20, [40, 30, 20]),
        (10, [40, 30, 20, 10]),
    ],
)
def test_the_last_one_before_bad_steps_is_kept(first_bad: int, doomed: list[int]) -> None:
    folders = [Path(f"step-{step:010d}") for step in (60, 50, 40, 30, 20, 10)]
    found = commit.prunable(folders, saved=50, keep_last=1, keep_every=0, first_bad=first_bad)
    assert names(found) == doomed
