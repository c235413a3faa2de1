"""Damaged members become padding: exactly theirs, on any number of ranks, and are accounted for."""

import logging
import os
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.data.config import OnDamage
from pretrain.data.loader import Batch, stream_batches
from pretrain.data.manifest import read_manifest
from pretrain.data.shards import Layout
from pretrain.data.store import open_manifest, train_order
from pretrain.errors import DamageError
from pretrain.loop.micro_batches import labels_of
from pretrain.model.config import DocumentMask
from pretrain.model.loss import IGNORED

SOURCES = {"a": (60, 0.6), "b": (60, 0.4)}
ROWS = 120


def take(config, *, ranks=1, workers=0) -> list[list[Batch]]:
    """Each rank's batches of the first rows."""
    config.loader_workers = workers
    found = []
    for rank in range(ranks):
        stream = stream_batches(
            config, seed=1, first_row=0, rows_per_step=8, rank=rank, ranks=ranks
        )
        found.append(list(islice(stream, ROWS // 8)))
        stream.close()
    return found


def rows_of(batches: list[list[Batch]]) -> dict[int, list[int]]:
    return {
        batch.first_row + i: row
        for of_rank in batches
        for batch in of_rank
        for i, row in enumerate(batch.tokens_BS.tolist())
    }


def damage_member(config, name: str, member: int) -> None:
    """Flip one bit in the middle of a member of tokens."""
    manifest = read_manifest(Path(config.shards))
    (shard,) = [s for source in manifest.sources for s in source.train if s.name == name]
    offset, size = Layout.of(manifest, shard).tokens_member(member)
    path = Path(config.shards, name)
    content = bytearray(path.read_bytes())
    content[offset + size // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def damaged(make_shards):
    """A configuration, its rows as they were, and which of them lie in the damaged member."""
    config = make_shards(SOURCES, window_shards=1)
    clean = rows_of(take(config))
    order = train_order(config, open_manifest(config), seed=1)
    places = order.addresses(np.arange(ROWS))
    hit = {
        row
        for row in range(ROWS)
        if (places.source[row], places.shard[row], places.row[row] // 4) == (0, 1, 2)
    }
    assert hit
    damage_member(config, "a/train-000001.tar", 2)
    return config, clean, hit


def test_damage_is_an_error_that_names_the_member(damaged):
    config, _, _ = damaged
    with pytest.raises(DamageError, match=r"a/train-000001.tar: member 000002.tokens.npy"):
        take(config)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 1), (4, 0)])
def test_the_rows_of_a_damaged_member_and_no_others_become_padding(damaged, ranks, workers):
    config, clean, hit = damaged
    config.on_damage = OnDamage.quarantine
    batches = take(config, ranks=ranks, workers=workers)
    found, pad = rows_of(batches), read_manifest(Path(config.shards)).tokenizer.special["pad"]
    for row, tokens in found.items():
        assert tokens == ([pad] * 32 if row in hit else clean[row])
    lost = {entry for of_rank in batches for batch in of_rank for entry in batch.lost}
    assert lost == {(row, "a/train-000001.tar/000002") for row in hit}


@pytest.mark.parametrize("mask", list(DocumentMask))
def test_a_lost_row_teaches_nothing(damaged, mask):
    config, _, hit = damaged
    config.on_damage = OnDamage.quarantine
    for batch in take(config)[0]:
        labels = labels_of(batch, mask)
        for i, row in enumerate(labels):
            is_lost = batch.first_row + i in hit
            assert bool((row == IGNORED).all()) is is_lost
            assert bool((batch.documents_BS[i] == -1).all()) is is_lost


def test_a_member_is_warned_of_once(damaged, caplog):
    config, _, hit = damaged
    config.on_damage = OnDamage.quarantine
    with caplog.at_level(logging.WARNING):
        take(config)
    said = [record.getMessage() for record in caplog.records if "quarantine" in record.getMessage()]
    assert len(said) == 1 < len(hit)
    assert "CRC32" in said[0]


@pytest.mark.parametrize("what", ["missing", "truncated"])
def test_a_shard_that_is_missing_or_short_loses_all_its_rows(make_shards, what):
    config = make_shards(SOURCES, window_shards=1)
    clean = rows_of(take(config))
    path = Path(config.shards, "a/train-000001.tar")
    if what == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 512)
    config.on_damage = OnDamage.quarantine
    batches = take(config)
    places = train_order(config, open_manifest(config), seed=1).addresses(np.arange(ROWS))
    hit = {row for row in range(ROWS) if (places.source[row], places.shard[row]) == (0, 1)}
    assert {row for batch in batches[0] for row, _ in batch.lost} == hit
    found = rows_of(batches)
    assert all(found[row] == clean[row] for row in range(ROWS) if row not in hit)


def test_rows_are_whole_again_when_the_shard_is(damaged, tmp_path):
    config, clean, _ = damaged
    config.on_damage = OnDamage.quarantine
    assert rows_of(take(config)) != clean
    damage_member(config, "a/train-000001.tar", 2)
    assert rows_of(take(config)) == clean
    shutil.rmtree(config.shards)


def test_an_empty_batch_has_lost_nothing() -> None:
    empty = torch.zeros(0, 9, dtype=torch.int64)
    assert Batch(0, empty, empty).lost == ()
