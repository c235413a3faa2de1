"""All damage is found and told, whatever it is."""

import json
from pathlib import Path

import pytest

from pretrain.data.manifest import read_manifest
from pretrain.data.shards import Layout
from pretrain.data.verify import verify


@pytest.fixture
def config(make_shards):
    return make_shards({"a": (150, 0.6), "b": (60, 0.4)})


def problems(config):
    return verify(config, read_manifest(Path(config.shards)))


def change(config, edit):
    path = Path(config.shards) / "manifest.json"
    content = json.loads(path.read_bytes())
    edit(content)
    path.write_text(json.dumps(content))


def test_whole_shards_have_no_problems(config):
    assert problems(config) == []


def test_all_damage_is_listed(config):
    folder = Path(config.shards)
    manifest = read_manifest(folder)
    (folder / "a/train-000001.tar").unlink()
    (folder / "a/train-000002.tar").write_bytes(b"")
    flipped = folder / "b/valid-000000.tar"
    content = bytearray(flipped.read_bytes())
    content[Layout.of(manifest, manifest.source("b").valid[0]).tokens_member(0)[0] + 200] ^= 1
    flipped.write_bytes(content)
    found = problems(config)
    assert len(found) == 4
    assert "a/train-000001.tar is missing" in found[0]
    assert "a/train-000002.tar has 0 bytes" in found[1]
    assert "b/valid-000000.tar: sha256 is" in found[2]
    assert "member 000000.tokens.npy is damaged" in found[3]


def test_a_shard_that_cannot_be_read_does_not_hide_the_others(config):
    """As on a disk with bad blocks; no other file gives an OSError as easily."""
    for number in range(2):
        path = Path(config.shards) / f"a/train-{number:06d}.tar"
        path.unlink()
        path.symlink_to(path.name)
    assert [problem.partition(":")[0] for problem in problems(config)] == [
        f"a/train-{number:06d}.tar cannot be read" for number in range(2)
    ]


def test_a_changed_tar_header_is_found_by_the_hash_of_the_shard(config):
    path = Path(config.shards) / "a/train-000000.tar"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    (found,) = problems(config)
    assert "sha256" in found


def test_ids_beyond_the_vocabulary_are_found(config):
    change(config, lambda content: content["tokenizer"].update(vocabulary_size=1000))
    found = problems(config)
    assert "has the id 199973, the vocabulary 1000" in found[0]


def test_padding_that_is_no_padding_is_found(config):
    change(config, lambda content: content["tokenizer"]["special"].update(pad=5))
    assert any("tokens other than padding" in problem for problem in problems(config))


def test_counts_that_are_not_those_of_the_rows_are_found(config):
    def edit(content):
        shard = content["sources"][0]["train"][0]
        totals = content["sources"][0]["totals"]["train"]
        shard["documents"] += 1
        totals["documents"] += 1

    change(config, edit)
    (found,) = problems(config)
    assert found.startswith("a/train-000000.tar: ")
    assert " documents, the manifest says " in found
