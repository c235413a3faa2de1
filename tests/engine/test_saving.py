"""Saving beside training: the same checkpoint, and nothing that can harm the one before."""

from pathlib import Path

import pytest

from pretrain.engine import commit
from pretrain.testing import load_module, run_ranks

RANKS = load_module(Path(__file__).with_name("saving_ranks.py"))


def test_a_save_beside_training_has_the_weights_of_its_beginning(tmp_path: Path) -> None:
    for found in run_ranks(RANKS.save_beside_training, 2, tmp_path):
        assert found["writing"]
        assert found["nothing_yet"]
        assert found["copied"]
        waiting, beside = found["hashes"]
        assert waiting == beside
        assert len(waiting) == 2
        assert found["second_is_newer"]
        assert found["second_is_whole"]


@pytest.mark.faults
def test_a_rank_that_cannot_write_in_the_background_spoils_only_that_save(tmp_path: Path) -> None:
    for found in run_ranks(RANKS.fail_in_the_background, 2, tmp_path):
        assert "rank 1" in found["error"]
        assert "No space left" in found["error"]
        assert found["left"] == ["latest", "step-0000000001"]
        assert found["old"]
        assert found["new"] == 2


@pytest.mark.faults
def test_a_life_that_has_lost_the_folder_publishes_nothing(tmp_path: Path) -> None:
    for found in run_ranks(RANKS.fenced, 2, tmp_path):
        assert "belongs to another life" in found["error"]
        assert found["left"] == ["latest", "step-0000000001"]


def test_a_save_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    assert run_ranks(RANKS.abandon, 2, tmp_path) == [[], []]


def test_a_checkpoint_that_a_rewind_deleted_is_saved_again(tmp_path: Path) -> None:
    for found in run_ranks(RANKS.delete_and_save_again, 2, tmp_path):
        assert found == [False, True, False, True]


def test_going_back_takes_no_memory(tmp_path: Path) -> None:
    """DeepSpeed has views of the moments, and would keep the old ones beside the new ones."""
    for outcomes in run_ranks(RANKS.go_back, 2, tmp_path):
        assert [name for name, is_right in outcomes if not is_right] == []
        assert len(outcomes) == 6


def test_without_memory_for_copies_training_waits(tmp_path: Path) -> None:
    for found in run_ranks(RANKS.without_memory, 2, tmp_path):
        assert found == {"writing": False, "copied_s": 0.0, "whole": True}


def test_a_dropped_update_changes_nothing_under_any_stage() -> None:
    for outcomes in run_ranks(RANKS.drop_updates, 2):
        assert [name for name, is_right in outcomes if not is_right] == []
        assert len(outcomes) == 12


def test_a_tagged_checkpoint_stays_until_its_tag_goes(tmp_path: Path) -> None:
    folder = commit.checkpoints_folder(tmp_path)
    for step in (1, 2, 3, 4):
        commit.step_folder(tmp_path, step).mkdir(parents=True)
    commit.write_tag(tmp_path, "good", 1)
    commit.write_tag(tmp_path, "good", 2)
    (folder / "tags/typo").write_text("step 3\n")
    assert commit.read_tags(tmp_path) == {"good": 2}

    def doomed() -> list[str]:
        tagged = commit.read_tags(tmp_path).values()
        found = commit.prunable(
            commit.committed(tmp_path), saved=4, keep_last=1, keep_every=0, tagged=tagged
        )
        return [path.name[-1] for path in found]

    assert doomed() == ["3", "1"]
    (folder / "tags/good").unlink()
    assert doomed() == ["3", "2", "1"]
