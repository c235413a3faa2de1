"""The manifest survives writing and reading, and is refused when it is not what was written."""

import json
from pathlib import Path

import pytest

from pretrain.data.manifest import Manifest, read_manifest
from pretrain.errors import DataError


@pytest.fixture
def folder(make_shards):
    return Path(make_shards({"a": (40, 1.0), "b": (20, 2.0)}).shards)


def change(folder, edit):
    path = folder / "manifest.json"
    content = json.loads(path.read_bytes())
    edit(content)
    path.write_text(json.dumps(content))


def test_reading_gives_what_was_written(folder):
    manifest = read_manifest(folder)
    content = manifest.to_bytes()
    again = Manifest.from_bytes(content, "copy")
    assert again == manifest
    assert again.to_bytes() == content
    assert again.fingerprint == manifest.fingerprint


def test_the_fingerprint_is_the_sha256_of_the_file(folder):
    import hashlib

    expected = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert read_manifest(folder).fingerprint == expected


def test_totals_for_other_readers_are_sums(folder):
    written = json.loads((folder / "manifest.json").read_bytes())
    for source in written["sources"]:
        for split in ("train", "valid"):
            rows = sum(shard["rows"] for shard in source[split])
            assert source["totals"][split]["rows"] == rows


def test_no_shards_names_the_command(tmp_path):
    with pytest.raises(DataError, match="run `pretrain data build`"):
        read_manifest(tmp_path)


def test_another_schema_is_refused(folder):
    change(folder, lambda content: content.update(schema=9))
    with pytest.raises(DataError, match="schema 9; this version reads 1"):
        read_manifest(folder)


def test_totals_that_are_no_sums_are_refused(folder):
    change(folder, lambda content: content["sources"][0]["totals"]["train"].update(tokens=1))
    with pytest.raises(DataError, match="totals of a/train"):
        read_manifest(folder)


def test_a_shard_outside_its_source_is_refused(folder):
    def escape(content):
        content["sources"][0]["train"][0]["name"] = "../train-000000.tar"

    change(folder, escape)
    with pytest.raises(DataError, match=r"'\.\./train-000000\.tar' is no name of a shard of a"):
        read_manifest(folder)


def test_a_missing_checksum_is_refused(folder):
    change(folder, lambda content: content["sources"][0]["train"][0]["tokens_crc32"].pop())
    with pytest.raises(DataError, match="checksums"):
        read_manifest(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema": 1}', b"\xff\xfe"])
def test_what_is_no_manifest_is_called_damaged(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        read_manifest(folder)


def test_no_changed_byte_is_more_than_a_damaged_manifest(folder):
    path = folder / "manifest.json"
    content = path.read_bytes()
    refused = 0
    for at in range(len(content)):
        for byte in b'0-"x':
            changed = content[:at] + bytes([byte]) + content[at + 1 :]
            try:
                Manifest.from_bytes(changed, str(path))
            except DataError:
                refused += 1
    assert refused > len(content)


def test_an_unknown_source_names_those_there_are(folder):
    with pytest.raises(DataError, match="no source 'c'; they have a, b"):
        read_manifest(folder).source("c")
