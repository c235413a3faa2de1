"""docs/data-format.md says what is on the disk, and its example reads it."""

import hashlib
import math
import re
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.manifest import read_manifest
from pretrain.data.order import RowAddress
from pretrain.data.shards import ShardReader
from pretrain.data.store import train_order

TEXT = (Path(__file__).parents[2] / "docs/data-format.md").read_text(encoding="utf-8")


@pytest.fixture
def config(make_shards):
    return make_shards({"a": (60, 0.7), "b": (40, 0.3)})


def test_the_example_reads_every_row(config, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(Path(config.shards).parent)
    assert Path(config.shards).name == "shards"
    names: dict = {}
    exec(example, names)
    manifest = read_manifest(Path(config.shards))
    expected = []
    for source in manifest.sources:
        for shard in source.train:
            reader = ShardReader(manifest, shard, lambda s=shard: Path(config.shards) / s.name)
            for row in range(shard.rows):
                stored = reader.read(row)
                lengths = np.frombuffer(stored.lengths, np.uint32)
                tokens = np.frombuffer(stored.tokens, manifest.dtype)[: lengths.sum()]
                expected.append((tokens.tolist(), lengths[lengths > 0].tolist()))
            reader.close()
    assert [(t.tolist(), n.tolist()) for t, n in names["rows"]] == expected


def test_members_are_as_described(config):
    manifest = read_manifest(Path(config.shards))
    shard = manifest.sources[0].train[0]
    with tarfile.open(Path(config.shards) / shard.name) as tar:
        lengths, tokens = tar.getmembers()[:2]
        content = tar.extractfile(tokens).read()
    assert (lengths.name, tokens.name) == ("000000.lengths.npy", "000000.tokens.npy")
    assert lengths.offset_data == 512
    lengths_bytes = 128 + 4 * manifest.rows_per_member * shard.lengths_width
    assert tokens.offset_data == 512 + -(-lengths_bytes // 512) * 512 + 512
    assert tokens.size == 128 + 4 * manifest.rows_per_member * (manifest.context + 1)
    assert content[:8] == b"\x93NUMPY\x01\x00"
    assert struct.unpack("<H", content[8:10])[0] + 10 == 128
    assert zlib.crc32(content) == shard.tokens_crc32[0]


def test_every_key_of_the_manifest_is_explained(config):
    manifest = read_manifest(Path(config.shards))
    explained = set(re.findall(r"`(\w+)`", TEXT))
    source = manifest.sources[0]
    for described in (manifest, manifest.tokenizer, source, source.train[0]):
        assert {*described.__dataclass_fields__} - {"fingerprint"} <= explained
    assert set(manifest.tokenizer.special) <= explained


def mix(state):
    """The upper half of SplitMix64's output."""
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 32


def permuted(value, size, key):
    """The page's permutation, in whole numbers, one value at a time."""
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    digest = hashlib.blake2b(repr(key).encode(), digest_size=48).digest()
    while True:
        left, right = divmod(value, b)
        for number, round_key in enumerate(struct.unpack("<6Q", digest)):
            left, right = right, (left + mix(right ^ round_key)) % (b if number % 2 else a)
        value = left * b + right
        if value < size:
            return value


def test_the_order_is_as_described(config):
    manifest = read_manifest(Path(config.shards))
    seed, window_shards = 17, config.window_shards
    order = train_order(config, manifest, seed)
    taken = [0, 0]
    for global_row in range(300):
        address = order.address(global_row)
        source = manifest.sources[address.source]
        rows = [shard.rows for shard in source.train]
        epoch, position = divmod(taken[address.source], sum(rows))
        taken[address.source] += 1
        key = (seed, source.name, epoch)
        shards = [permuted(i, len(rows), (*key, None)) for i in range(len(rows))]
        window = 0
        while position >= (size := sum(rows[s] for s in shards[:window_shards])):
            position, shards, window = position - size, shards[window_shards:], window + 1
        place = permuted(position, size, (*key, window))
        shard = next(
            s for i, s in enumerate(shards) if place < sum(rows[t] for t in shards[: i + 1])
        )
        row = place - sum(rows[t] for t in shards[: shards.index(shard)])
        assert address == RowAddress(address.source, epoch, shard, row)
        # the share is kept to within one row
        assert abs(taken[0] - 0.7 * (global_row + 1)) < 1
    assert min(taken) > 2 * min(sum(s.rows for s in source.train) for source in manifest.sources)
