"""Shards have every token, and the same bytes whenever and however often they are begun."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.build import _explaining_full_disk
from pretrain.data.pack import pack
from pretrain.data.shards import Layout
from pretrain.data.write import Packing, write_shard, write_split
from pretrain.errors import DataError

PACKING = Packing(
    row_tokens=16, pad=99_999, pack_tokens=300, rows_per_member=4, members_per_shard=3
)


@pytest.fixture
def parts(tmp_path, write_parts):
    random = np.random.default_rng(0)
    lengths = [random.integers(3, 60, size=size).tolist() for size in (40, 1, 0, 30)]
    return write_parts(tmp_path / "parts", lengths, held_out_every=4)


def write(parts, folder, split="train"):
    return list(write_split(parts, PACKING, split=split, source="a", folder=folder))


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.tar"))}


def tokens_of(folder, split):
    import webdataset as wds

    found = []
    for path in sorted(folder.glob(f"a/{split}-*.tar")):
        for sample in wds.WebDataset(str(path), shardshuffle=False).decode():
            for row, lengths in zip(sample["tokens.npy"], sample["lengths.npy"], strict=True):
                found += row[: lengths.sum()].tolist()
                assert (row[lengths.sum() :] == PACKING.pad).all()
    return found


def test_both_splits_together_have_every_token_once(parts, tmp_path):
    shards = write(parts, tmp_path / "out") + write(parts, tmp_path / "out", "valid")
    stored = tokens_of(tmp_path / "out", "train") + tokens_of(tmp_path / "out", "valid")
    given = [token for part in parts for token in part.read_tokens().tolist()]
    assert sorted(stored) == sorted(given)
    assert sum(shard.tokens for shard in shards) == len(given)
    assert sum(shard.documents for shard in shards) == 71


def test_only_the_last_shard_is_not_full(parts, tmp_path):
    rows = [shard.rows for shard in write(parts, tmp_path / "out")]
    assert len(rows) > 3
    assert set(rows[:-1]) == {12}
    assert 0 < rows[-1] <= 12


def test_a_build_that_stopped_anywhere_ends_with_the_same_bytes(parts, tmp_path):
    whole = tmp_path / "whole"
    shards = write(parts, whole)
    for stop in range(len(shards) + 1):
        folder = tmp_path / f"stopped-{stop}"
        generator = write_split(parts, PACKING, split="train", source="a", folder=folder)
        for _ in range(stop):
            next(generator)
        generator.close()
        assert write(parts, folder) == shards
        assert tree(folder) == tree(whole)


def test_a_stopped_build_does_not_write_finished_shards_again(parts, tmp_path):
    folder = tmp_path / "out"
    write(parts, folder)
    last = sorted(folder.rglob("*.tar"))[-1]
    before = {path: path.stat().st_ino for path in folder.rglob("*.tar")}
    last.unlink()
    write(parts, folder)
    after = {path: path.stat().st_ino for path in folder.rglob("*.tar")}
    del before[last], after[last]
    assert before == after


def test_a_shard_whose_record_is_there_but_short_is_written_again(parts, tmp_path):
    folder = tmp_path / "out"
    write(parts, folder)
    before = tree(folder)
    (folder / "a/train-000001.tar").write_bytes(b"")
    write(parts, folder)
    assert tree(folder) == before


def test_a_full_disk_leaves_nothing_half_named(tmp_path):
    rows = pack(np.arange(100, dtype=np.uint32), np.array([60, 40]), 16, PACKING.pad)
    folder = tmp_path / "a"
    folder.mkdir()
    # the device that says "no space left" to every write
    (folder / "train-000000.tar.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_shard(folder / "train-000000.tar", "a/train-000000.tar", rows, PACKING)
    assert list(folder.iterdir()) == []


def test_the_manifest_entry_describes_the_file(tmp_path):
    rows = pack(np.arange(100, dtype=np.uint32), np.array([60, 40]), 16, PACKING.pad)
    path = Path(tmp_path / "a" / "train-000000.tar")
    shard = write_shard(path, "a/train-000000.tar", rows, PACKING)
    layout = Layout(
        rows=shard.rows,
        rows_per_member=4,
        row_tokens=16,
        token_bytes=4,
        lengths_width=shard.lengths_width,
    )
    # 60 = 3 x 16 + 12 and 40 = 2 x 16 + 8: five full rows, 12 and 8 in a row each
    assert (shard.rows, shard.tokens, shard.padding, shard.documents) == (7, 100, 12, 2)
    assert shard.bytes == layout.shard_bytes == path.stat().st_size
    shutil.rmtree(tmp_path / "a")
    assert write_shard(path, "a/train-000000.tar", rows, PACKING) == shard


def test_a_full_disk_is_told_with_what_is_free(tmp_path):
    with (
        pytest.raises(DataError, match=r"No space left for .* \d+ bytes free"),
        _explaining_full_disk(tmp_path),
    ):
        Path("/dev/full").write_bytes(b"x")
