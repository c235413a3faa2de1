"""Rows come from their offsets as they were written, or not at all."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from pretrain.data.manifest import read_manifest
from pretrain.data.shards import Layout, ShardReader
from pretrain.errors import DamageError, DataError, UnreachableError


@pytest.fixture
def shard(make_shards):
    """(reader, path) of the last train shard, whose last member is not full."""
    config = make_shards({"a": (60, 1.0)})
    manifest = read_manifest(Path(config.shards))
    entry = manifest.sources[0].train[-1]
    path = Path(config.shards) / entry.name
    assert entry.rows % manifest.rows_per_member
    return ShardReader(manifest, entry, lambda: path), path


def read_with_webdataset(path):
    samples = list(wds.WebDataset(str(path), shardshuffle=False).decode())
    tokens = np.concatenate([sample["tokens.npy"] for sample in samples])
    lengths = np.concatenate([sample["lengths.npy"] for sample in samples])
    return tokens, lengths


def test_rows_by_offset_are_those_that_plain_webdataset_reads(shard):
    reader, path = shard
    tokens, lengths = read_with_webdataset(path)
    assert len(tokens) == reader.shard.rows
    for row in reversed(range(reader.shard.rows)):
        stored = reader.read(row)
        assert stored.tokens == tokens[row].tobytes()
        assert stored.lengths == lengths[row].tobytes()


def test_a_plain_webdataset_pipeline_reads_the_rows_too(shard):
    reader, path = shard
    pipeline = wds.DataPipeline(
        wds.SimpleShardList([str(path)]), wds.tarfile_to_samples(), wds.decode()
    )
    rows = [row for sample in pipeline for row in sample["tokens.npy"]]
    assert [row.tobytes() for row in rows] == [
        reader.read(i).tokens for i in range(reader.shard.rows)
    ]


def test_the_layout_is_where_tar_says_the_members_are(shard):
    reader, path = shard
    layout = reader.layout
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert [m.name.split(".")[1] for m in members] == ["lengths", "tokens"] * layout.members
    for number in range(layout.members):
        lengths, tokens = members[2 * number : 2 * number + 2]
        assert layout.lengths_member(number) == (lengths.offset_data, lengths.size)
        assert layout.tokens_member(number) == (tokens.offset_data, tokens.size)
    assert path.stat().st_size == layout.shard_bytes
    assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "pretrain")}


@pytest.mark.parametrize("kind", ["tokens", "lengths"])
def test_one_flipped_bit_is_noticed_in_its_member_and_nowhere_else(shard, kind):
    reader, path = shard
    offset, size = getattr(reader.layout, f"{kind}_member")(1)
    content = bytearray(path.read_bytes())
    content[offset + size - 1] ^= 0b100
    path.write_bytes(content)
    reader.read(0)
    with pytest.raises(DataError, match=rf"000001\.{kind}\.npy is damaged: its CRC32 is \w+, the"):
        reader.read(reader.layout.rows_per_member)


def test_every_truncation_is_noticed_with_both_sizes(shard):
    reader, path = shard
    content = path.read_bytes()
    for size in (0, 511, 512, len(content) // 2, len(content) - 512, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=rf"has {size} bytes, the manifest says {len(content)}"):
            reader.read(0)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(shard):
    reader, path = shard
    reader.read(0)
    with open(path, "r+b") as file:
        file.truncate(600)
    with pytest.raises(DataError, match="became shorter"):
        reader.read(1)


def test_a_missing_shard_is_named(shard):
    reader, path = shard
    path.unlink()
    with pytest.raises(DataError, match=r"a/train-\d+\.tar is missing \(looked at"):
        reader.read(0)


def test_a_shard_whose_folder_is_none_is_missing(shard):
    reader, path = shard
    path.unlink()
    for other in path.parent.iterdir():
        other.unlink()
    path.parent.rmdir()
    path.parent.write_text("a file")
    with pytest.raises(DamageError, match=r"a/train-\d+\.tar is missing \(looked at"):
        reader.read(0)


def test_a_disk_that_cannot_be_read_says_nothing_about_the_shard(shard):
    reader, path = shard
    path.unlink()
    # no other file gives an OSError as easily
    path.symlink_to(path.name)
    with pytest.raises(UnreachableError, match=r"a/train-\d+\.tar cannot be read: .*symbolic"):
        reader.read(0)


def test_a_closed_reader_opens_again(shard):
    reader, _ = shard
    before = reader.read(2)
    reader.close()
    assert reader.read(2) == before


def test_the_layout_of_a_full_size_shard():
    layout = Layout(rows=8192, rows_per_member=64, row_tokens=4097, token_bytes=2, lengths_width=30)
    # 64 rows of 4097 x 2 bytes, 64 x 30 lengths of 4 bytes, a header of 128 bytes for both,
    # each filled up to 512, with 512 of tar header
    assert layout.tokens_member(1)[0] - layout.tokens_member(0)[0] == 1024 + 524_800 + 8_192
    assert layout.tokens_member(0) == (512 + 8_192 + 512, 128 + 64 * 8194)
