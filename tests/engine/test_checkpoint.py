"""A checkpoint is whole or not there, whatever happens while it is written."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.engine import commit
from pretrain.engine.checkpoint import newest_checkpoint
from pretrain.engine.fragments import PieceReader, Stored, size_of, write_pieces
from pretrain.engine.partitions import check_complete
from pretrain.errors import CheckpointError
from pretrain.testing import RanksError, load_module, run_ranks

ranks = load_module(Path(__file__).with_name("checkpoint_ranks.py"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, int | None]]:
    folder = tmp_path_factory.mktemp("kills")
    found: list[tuple[str, str, int | None]] = run_ranks(ranks.die_at_every_point, 1, folder)[0]
    return found


@pytest.mark.faults
def test_killed_anywhere_in_a_save_a_whole_checkpoint_remains(
    outcomes: list[tuple[str, str, int | None]],
) -> None:
    assert [label for label, newest, _ in outcomes if newest not in ("old", "new")] == []


@pytest.mark.faults
def test_killed_anywhere_in_a_save_latest_names_a_whole_checkpoint(
    outcomes: list[tuple[str, str, int | None]],
) -> None:
    assert [label for label, _, named in outcomes if named is None] == []


@pytest.mark.faults
def test_the_kills_fell_on_both_sides_of_the_commit(
    outcomes: list[tuple[str, str, int | None]],
) -> None:
    labels = {label for label, _, _ in outcomes}
    for _, name in ranks.KILL_POINTS:
        assert {f"{name} before 1", f"{name} after 1"} <= labels
    newest = {label: found for label, found, _ in outcomes}
    assert newest["publish before 1"] == "old"
    assert newest["publish after 1"] == "new"
    assert len(outcomes) > 25


@pytest.mark.faults
def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_nothing_else(tmp_path: Path) -> None:
    for found in run_ranks(ranks.survive_a_full_disk, 2, tmp_path):
        assert "1 of 2 ranks failed" in found["error"]
        assert "rank 1: [Errno 27]" in found["error"]
        assert found["after_failure"] == ["latest", "step-0000000001"]
        assert found["old_is_whole"]
        assert found["new_is_whole"]


@pytest.mark.faults
def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    message = run_ranks(ranks.refuse_a_small_disk, 1, tmp_path, 1000)[0]
    assert "1,000 bytes free" in message
    assert "keep_last" in message
    assert not commit.checkpoints_folder(tmp_path).exists()


@pytest.mark.faults
def test_a_rank_that_dies_in_a_save_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RanksError, match="rank 1: ended by signal 9"):
        run_ranks(ranks.die_on_rank_1, 2, tmp_path)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert commit.step_of(newest) == 1


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    result: dict[str, Any] = run_ranks(ranks.one_process, 1, folder)[0]
    return result


def test_a_whole_checkpoint_is_not_written_twice(found: dict[str, Any]) -> None:
    assert found["again"]


def test_another_model_is_refused_with_the_differences(found: dict[str, Any]) -> None:
    message = found["other_model"]
    assert "is of another model" in message
    assert "coda.0.attention.output: (24, 24) in the checkpoint, (32, 32) here" in message
    assert "more" in message


@pytest.mark.faults
def test_a_damaged_checkpoint_is_passed_over_and_can_be_saved_again(found: dict[str, Any]) -> None:
    assert found["fallback"]
    assert found["resaved"]
    assert found["resaved_whole"]


@pytest.mark.faults
def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(found: dict[str, Any]) -> None:
    assert found["none"]
    assert "has no whole checkpoint" in found["all_damaged"]
    assert "step-0000000001: rank-00000-of-00001.safetensors has sha256" in found["all_damaged"]


def test_any_range_is_read_from_pieces_in_several_files(tmp_path: Path) -> None:
    whole = torch.randn(50)
    stored = {"a/b": []}
    for index, (start, end) in enumerate([(0, 13), (13, 14), (14, 50)]):
        pieces = [("x/other", torch.zeros(3)), ("master/a/b", whole[start:end])]
        record = write_pieces(tmp_path / str(index), pieces)
        assert record.bytes == size_of(pieces) == (tmp_path / str(index)).stat().st_size
        assert record.sha256 == commit.hash_file(tmp_path / str(index))
        stored["a/b"].append(Stored(start, end - start, str(index)))
    with PieceReader(tmp_path, stored) as reader:
        for start, end in [(0, 50), (5, 6), (12, 15), (13, 14), (40, 50)]:
            target = torch.empty(end - start)
            reader.read("master", "a/b", start, target)
            assert torch.equal(target, whole[start:end])
        with pytest.raises(CheckpointError, match="5 of elements 45 to 55"):
            reader.read("master", "a/b", 45, torch.empty(10))
        with pytest.raises(CheckpointError, match="exp_avg/a/b"):
            reader.read("exp_avg", "a/b", 0, torch.empty(10))


def test_written_files_are_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {"master/a": torch.randn(7), "exp_avg/a": torch.randn(7), "master/b": torch.ones(1)}
    write_pieces(tmp_path / "file", list(tensors.items()))
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([("w", 0, 4), ("w", 6, 4)], "w cover elements 0 to 4 of 10"),
        ([("w", 0, 6), ("w", 4, 6)], "w cover elements 0 to 6 of 10"),
        ([("w", 0, 9)], "w cover elements 0 to 9 of 10"),
        ([("w", 0, 10), ("v", 0, 1)], "v cover elements 0 to 1 of 0"),
        ([], "w cover elements 0 to 0 of 10"),
    ],
)
def test_pieces_that_do_not_tile_a_tensor_are_refused(
    pieces: list[tuple[str, int, int]], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_complete(pieces, {"w": 10})
    check_complete([("w", 6, 4), ("w", 0, 6)], {"w": 10})
