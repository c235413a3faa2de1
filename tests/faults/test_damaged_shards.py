"""Truncations and flipped bits of a shard: the same rows or a named loss, never other rows."""

import os
import random
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from lives import row

from pretrain.data.config import Corpus, DataConfig, OnDamage
from pretrain.data.loader import stream_batches
from pretrain.data.manifest import read_manifest
from pretrain.data.shards import Layout
from pretrain.data.store import open_manifest, train_order
from pretrain.errors import DamageError

pytestmark = pytest.mark.faults
ROWS = 64
FLIPS = 400


@pytest.fixture
def config(workspace: Path, tmp_path: Path) -> DataConfig:
    """The shards of the workspace, a copy to break."""
    (manifest,) = (workspace / "out/data").rglob("manifest.json")
    shutil.copytree(manifest.parent, tmp_path / "shards")
    return DataConfig(
        name="small", corpus=Corpus.files, root="unused", shards=str(tmp_path / "shards"),
        context=32, loader_workers=0,
    )  # fmt: skip


def read(config: DataConfig) -> tuple[dict[int, bytes], set[int]]:
    """Rows by number, and which are lost."""
    stream = stream_batches(config, seed=1, first_row=0, rows_per_step=8, rank=0, ranks=1)
    rows, lost = {}, set()
    for batch in islice(stream, ROWS // 8):
        lost |= {row for row, _ in batch.lost}
        for i, tokens in enumerate(batch.tokens_BS):
            rows[batch.first_row + i] = tokens.numpy().tobytes()
    stream.close()
    return rows, lost


def check(config: DataConfig, clean: dict[int, bytes], source: int, members: set[int]) -> None:
    """Both policies, where `members` of shard 0 of a source are damaged."""
    config.on_damage = OnDamage.error
    order = train_order(config, open_manifest(config), seed=1)
    places = order.addresses(np.arange(ROWS))
    hit = {
        row
        for row in range(ROWS)
        if (places.source[row], places.shard[row]) == (source, 0)
        and places.row[row] // 8 in members
    }
    if hit:
        with pytest.raises(DamageError, match=r"train-000000\.tar"):
            read(config)
    else:
        assert read(config) == (clean, set())
    config.on_damage = OnDamage.quarantine
    rows, lost = read(config)
    assert lost == hit
    assert {row for row in rows if rows[row] != clean[row]} == hit


@row(
    "a shard cut at every multiple of 512 bytes",
    "an error that names it; under data.on_damage=quarantine",
    "exactly the rows of that shard, counted",
)
def test_a_truncation_at_any_block_loses_the_shard_and_says_so(config: DataConfig) -> None:
    clean, _ = read(config)
    manifest = read_manifest(Path(config.shards))
    shard = manifest.sources[0].train[0]
    path, members = Path(config.shards, shard.name), set(range(len(shard.tokens_crc32)))
    whole = path.read_bytes()
    for size in range(0, len(whole), 512):
        path.write_bytes(whole[:size])
        check(config, clean, 0, members)
    path.write_bytes(whole)
    assert read(config) == (clean, set())


@row(
    "400 single flipped bits in a shard",
    "an error that names it, if rows are hit; under data.on_damage=quarantine",
    "exactly the rows of the member, counted; nothing if no row is hit",
)
def test_a_flipped_bit_anywhere_loses_its_member_or_nothing(config: DataConfig) -> None:
    """Bits of tar headers and padding are not rows; every bit of an array is under its CRC."""
    clean, _ = read(config)
    manifest = read_manifest(Path(config.shards))
    shard = manifest.sources[0].train[0]
    layout, path = Layout.of(manifest, shard), Path(config.shards, shard.name)
    whole = path.read_bytes()
    spans = [
        (*place, member)
        for member in range(layout.members)
        for place in (layout.tokens_member(member), layout.lengths_member(member))
    ]
    draw = random.Random(0)
    damaging = 0
    for _ in range(FLIPS):
        bit = draw.randrange(8 * len(whole))
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        members = {m for offset, size, m in spans if offset <= bit // 8 < offset + size}
        damaging += bool(members)
        check(config, clean, 0, members)
    # the arrays are a sixth of so small a tar, which is filled up to 10 kB
    assert damaging > FLIPS // 10
    path.write_bytes(whole)


@row(
    "a shard replaced by noise of its size",
    "an error that names it; under data.on_damage=quarantine",
    "exactly the rows of that shard, counted",
)
def test_another_file_of_the_same_size_is_not_read_as_the_shard(config: DataConfig) -> None:
    clean, _ = read(config)
    shard = read_manifest(Path(config.shards)).sources[0].train[0]
    path = Path(config.shards, shard.name)
    path.write_bytes(os.urandom(path.stat().st_size))
    check(config, clean, 0, set(range(len(shard.tokens_crc32))))
