"""The same text gives the same bytes, however it was built; other text is not taken for it."""

import dataclasses
import fcntl
import json
import logging
import multiprocessing
import os
import random
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import webdataset as wds

from pretrain.data import progress, write
from pretrain.data.build import _Build, build, build_share
from pretrain.data.config import Corpus, DataConfig, SourceConfig
from pretrain.data.manifest import read_manifest
from pretrain.data.parts import is_held_out
from pretrain.data.sources import find_parts, read_documents
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import ConfigError, DataError

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "42", "birds", "in", "an", "oak")


def text(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + "\n"


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "raw"
    for source, files in (("books", 5), ("notes", 3)):
        (root / source).mkdir(parents=True)
        for file in range(files):
            records = [
                {"text": text(file * 100 + i, 3 + (i * 13 + file) % 90)} for i in range(12 * file)
            ]
            lines = [json.dumps(record) for record in records]
            (root / source / f"{file}.jsonl").write_text("\n".join(lines))
    (root / "notes" / "long.txt").write_text(text(5, 900))
    return root


@pytest.fixture
def config(corpus, tmp_path):
    return make_config(corpus, tmp_path / "shards")


def make_config(root, shards, **changes) -> DataConfig:
    values = {
        "name": "test",
        "corpus": Corpus.files,
        "root": str(root),
        "shards": str(shards),
        "context": 63,
        "rows_per_member": 4,
        "members_per_shard": 4,
        "pack_tokens": 1_500,
        "valid_fraction": 0.2,
        "build_workers": 1,
        "sources": {
            "books": SourceConfig(paths=["books/*"], weight=0.7, licence="CC0"),
            "notes": SourceConfig(paths=["notes/*"], weight=0.3),
        },
    }
    return DataConfig(**(values | changes))


def tree(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def stored_pieces(shards, split):
    for path in sorted(Path(shards).glob(f"*/{split}-*.tar")):
        for sample in wds.WebDataset(str(path), shardshuffle=False).decode():
            for row, lengths in zip(sample["tokens.npy"], sample["lengths.npy"], strict=True):
                at = 0
                for length in lengths[lengths > 0].tolist():
                    yield row[at : at + length].tolist()
                    at += length


def test_processes_do_not_change_the_bytes(config, tokenizer_folder, tmp_path):
    build(config, tokenizer_folder)
    config.shards, config.build_workers = str(tmp_path / "again"), 2
    build(config, tokenizer_folder)
    first, second = tree(tmp_path / "shards"), tree(tmp_path / "again")
    assert first == second
    assert {"manifest.json", "inputs.json", "books/train-000000.tar"} <= first.keys()
    assert not any(name.startswith(".build") for name in first)


def test_jobs_that_share_the_tokenizing_do_not_change_the_bytes(
    config, corpus, tokenizer_folder, tmp_path, caplog
):
    build(config, tokenizer_folder)
    there = tmp_path / "shared"
    for task in (2, 0, 1):
        build_share(make_config(corpus, there, build_tasks=3, build_task=task), tokenizer_folder)
        assert not (there / "manifest.json").exists()
    parts = list(there.glob(".build/*/parts/*/*.json"))
    assert len(parts) == sum(len(own) for own in find_parts(config).values()) == 9
    with caplog.at_level(logging.INFO):
        build(make_config(corpus, there), tokenizer_folder)
    assert "9 of 9 parts were tokenized before" in caplog.text
    assert tree(there) == tree(config.shards)


def test_what_a_missing_job_would_have_made_is_made_at_the_end(
    config, corpus, tokenizer_folder, tmp_path
):
    build(config, tokenizer_folder)
    there = tmp_path / "shared"
    build_share(make_config(corpus, there, build_tasks=2, build_task=1), tokenizer_folder)
    build(make_config(corpus, there), tokenizer_folder)
    assert tree(there) == tree(config.shards)


def test_jobs_share_a_folder_with_each_other_and_with_nobody_else(config, corpus, tokenizer_folder):
    share = make_config(corpus, config.shards, build_tasks=2, build_task=0)
    (Path(config.shards) / ".build").mkdir(parents=True)
    with open(Path(config.shards) / ".build/lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        build_share(share, tokenizer_folder)
        with pytest.raises(DataError, match="Another process builds"):
            build(config, tokenizer_folder)
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="Another process builds"):
            build_share(share, tokenizer_folder)


def test_every_token_of_every_document_is_in_its_split(config, tokenizer_folder):
    manifest = build(config, tokenizer_folder)
    tokenizer = Tokenizer.load(tokenizer_folder)
    begin, end = tokenizer.special.begin_text, tokenizer.special.end_text
    num_documents = 0
    for split in ("train", "valid"):
        expected = sorted(
            token
            for parts in find_parts(config).values()
            for part in parts
            for document in read_documents(part, config)
            if is_held_out(document.id, 0.2) == (split == "valid")
            for token in [begin, *tokenizer.encode(document.text), end]
        )
        stored = sorted(token for piece in stored_pieces(config.shards, split) for token in piece)
        assert stored == expected
        totals = [source.totals(split) for source in manifest.sources]
        assert sum(t.tokens for t in totals) == len(expected)
        num_documents += sum(t.documents for t in totals)
    # 12 x (0 + 1 + 2 + 3 + 4) and 12 x (0 + 1 + 2) records, and one text
    assert num_documents == 120 + 36 + 1


def test_files_that_are_held_out_by_name_are_so_as_a_whole(config, tokenizer_folder):
    config.valid_fraction, config.valid_paths = 0.0, ["books/2.jsonl", "notes/*.txt"]
    manifest = build(config, tokenizer_folder)
    held_out = {source.name: source.totals("valid").documents for source in manifest.sources}
    assert held_out == {"books": 24, "notes": 1}
    trained_on = {source.name: source.totals("train").documents for source in manifest.sources}
    assert trained_on == {"books": 120 - 24, "notes": 36}
    config.valid_paths = ["books/3.jsonl"]
    with pytest.raises(DataError, match=r"data.valid_paths: built with .*2.jsonl.*now .*3.jsonl"):
        build(config, tokenizer_folder)


def test_shards_know_nothing_of_held_out_files_where_none_are_named(config, tokenizer_folder):
    assert "data.valid_paths" not in build(config, tokenizer_folder).settings


def test_a_whole_document_decodes_to_its_text(config, tokenizer_folder):
    build(config, tokenizer_folder)
    tokenizer = Tokenizer.load(tokenizer_folder)
    special = tokenizer.special
    whole = {
        tokenizer.decode(piece)
        for split in ("train", "valid")
        for piece in stored_pieces(config.shards, split)
        if piece[0] == special.begin_text and piece[-1] == special.end_text
    }
    fitting = {
        document.text
        for parts in find_parts(config).values()
        for part in parts
        for document in read_documents(part, config)
        if len(tokenizer.encode(document.text)) + 2 <= config.context + 1
    }
    assert len(fitting) > 20
    assert whole == fitting


def build_quietly(config, tokenizer_folder):
    build(config, tokenizer_folder)
    os._exit(0)


@pytest.mark.parametrize("files", [1, 9, 14, 20, 24])
def test_a_killed_build_goes_on_to_the_same_bytes(config, tokenizer_folder, tmp_path, files):
    build(config, tokenizer_folder)
    expected = tree(config.shards)
    config.shards = str(tmp_path / "killed")
    process = multiprocessing.get_context("fork").Process(
        target=build_quietly, args=(config, tokenizer_folder)
    )
    process.start()
    work = Path(config.shards) / ".build"
    try:
        while process.is_alive() and sum(path.is_file() for path in work.rglob("*")) < files:
            time.sleep(0.0005)
    finally:
        process.kill()
    process.join()
    build(config, tokenizer_folder)
    assert tree(config.shards) == expected


@pytest.mark.parametrize("moved", [1, 3])
def test_a_build_killed_while_shards_find_their_place_writes_none_again(
    config, tokenizer_folder, tmp_path, monkeypatch, moved
):
    build(config, tokenizer_folder)
    expected = tree(config.shards)
    config.shards = str(tmp_path / "killed")

    class Killed(BaseException):
        pass

    move_shard, places = _Build._move, iter(range(moved))

    def move(self, shard):
        if next(places, None) is None:
            raise Killed
        move_shard(self, shard)

    with monkeypatch.context() as patched:
        patched.setattr(_Build, "_move", move)
        with pytest.raises(Killed):
            build(config, tokenizer_folder)
    assert len(list(Path(config.shards).glob("*/*.tar"))) == moved
    with monkeypatch.context() as patched:
        patched.setattr(write, "write_shard", None)
        build(config, tokenizer_folder)
    assert tree(config.shards) == expected


def test_a_build_killed_as_it_clears_away_leaves_nothing(config, tokenizer_folder, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda _: None)
        build(config, tokenizer_folder)
    assert list((Path(config.shards) / ".build").rglob("*.tokens"))
    build(config, tokenizer_folder)
    assert not (Path(config.shards) / ".build").exists()


def test_a_lock_that_nfs_keeps_while_it_is_open_stops_no_build(
    config, tokenizer_folder, monkeypatch
):
    unlink, kept = os.unlink, []

    def unlink_as_nfs_does(path, **more):
        if os.path.basename(path) == "lock":
            # renamed until the file is closed
            kept.append(Path(config.shards) / f".build/.nfs{len(kept)}")
            os.rename(Path(config.shards) / ".build/lock", kept[-1])
        else:
            unlink(path, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", unlink_as_nfs_does)
        for _ in range(2):
            assert build(config, tokenizer_folder) == read_manifest(Path(config.shards))
    assert sorted((Path(config.shards) / ".build").iterdir()) == kept
    for path in kept:
        path.unlink()
    build(config, tokenizer_folder)
    assert not (Path(config.shards) / ".build").exists()


def test_progress_counts_the_bytes_of_files_and_not_their_number(
    config, corpus, tokenizer_folder, monkeypatch, caplog
):
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    sizes = sorted((path.stat().st_size for path in corpus.rglob("*.*")), reverse=True)
    with caplog.at_level(logging.INFO):
        build(config, tokenizer_folder)
    # the largest file comes first
    assert f"tokenize {100 * sizes[0] / sum(sizes):.1f} %" in caplog.text


def test_a_finished_build_is_left_alone(config, tokenizer_folder):
    manifest = build(config, tokenizer_folder)
    before = {path: path.stat().st_mtime_ns for path in Path(config.shards).rglob("*")}
    assert build(config, tokenizer_folder) == manifest
    assert {path: path.stat().st_mtime_ns for path in Path(config.shards).rglob("*")} == before


def test_weights_are_no_reason_to_build_again(config, tokenizer_folder):
    fingerprint = build(config, tokenizer_folder).fingerprint
    config.sources["books"].weight = 0.9
    assert build(config, tokenizer_folder).fingerprint == fingerprint


@pytest.mark.parametrize(
    ("name", "value", "built"),
    [("context", 31, 63), ("valid_fraction", 0.1, 0.2), ("pack_tokens", 999, 1500)],
)
def test_other_settings_are_refused_by_name(config, tokenizer_folder, name, value, built):
    build(config, tokenizer_folder)
    setattr(config, name, value)
    with pytest.raises(DataError, match=rf"data\.{name}: built with {built}, now {value}"):
        build(config, tokenizer_folder)


def test_other_raw_text_is_refused_with_a_file_named(config, corpus, tokenizer_folder):
    build(config, tokenizer_folder)
    (corpus / "books" / "more.jsonl").write_text('{"text": "more"}')
    with pytest.raises(DataError, match=r"1 files of the raw text .* books/books/more\.jsonl"):
        build(config, tokenizer_folder)


def test_shards_serve_when_the_raw_text_is_gone(config, corpus, tokenizer_folder, caplog):
    fingerprint = build(config, tokenizer_folder).fingerprint
    shutil.rmtree(corpus)
    with caplog.at_level(logging.WARNING):
        assert build(config, tokenizer_folder).fingerprint == fingerprint
    assert "using the shards as built" in caplog.text


@pytest.mark.parametrize("size", [None, 0, 600])
def test_a_finished_build_that_lost_a_shard_is_not_called_finished(config, tokenizer_folder, size):
    build(config, tokenizer_folder)
    path = Path(config.shards) / "books/train-000001.tar"
    path.unlink() if size is None else os.truncate(path, size)
    there = "is missing" if size is None else f"has {size} bytes"
    with pytest.raises(DataError, match=rf"books/train-000001\.tar {there}"):
        build(config, tokenizer_folder)


def test_an_unfinished_build_of_other_settings_is_removed_aloud(
    config, tokenizer_folder, tmp_path, caplog
):
    stale = tmp_path / "shards" / ".build" / "0123456789abcdef"
    stale.mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        build(config, tokenizer_folder)
    assert f"removing an unfinished build of other settings or text: {stale}" in caplog.text


def test_the_split_of_a_document_does_not_depend_on_the_others(config, tokenizer_folder, corpus):
    ids = [f"books/books/{i}.jsonl#{j}" for i in range(100) for j in range(100)]
    held_out = [document_id for document_id in ids if is_held_out(document_id, 0.2)]
    # a binomial of 10,000 and 0.2 has a deviation of 40; five are allowed
    assert abs(len(held_out) - 2_000) < 200
    # a larger share holds out the same documents and more
    assert all(is_held_out(document_id, 0.3) for document_id in held_out)


def test_a_disk_that_fills_up_anywhere_is_told_and_built_on(
    config, corpus, tokenizer_folder, tmp_path, monkeypatch
):
    """Some of these sizes end in the tokens of a part, some in its table of documents."""
    (corpus / "notes/short.jsonl").write_text('{"text": "a"}\n' * 4_000)
    build(config, tokenizer_folder)
    expected = tree(config.shards)
    monkeypatch.setattr(_Build, "_check_space", lambda *_: None)
    config.shards = str(tmp_path / "disk")
    Path(config.shards).mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", config.shards], check=False
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a disk")
    try:
        for size in (*range(20, 300, 4), 2_000):
            subprocess.run(["mount", "-o", f"remount,size={size}k", config.shards], check=True)
            # while it is too small; anything but this error fails the test
            with suppress(DataError):
                build(config, tokenizer_folder)
        assert tree(config.shards) == expected
    finally:
        subprocess.run(["umount", "--lazy", config.shards], check=True)


def test_too_small_a_disk_is_told_before_it_is_full(config, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(DataError, match=r"need about \d+ more bytes, .* has 10 free"):
        build(config, tokenizer_folder)
    monkeypatch.undo()
    assert build(config, tokenizer_folder).sources


def test_one_build_at_a_time(config, tokenizer_folder):
    work = Path(config.shards) / ".build"
    work.mkdir(parents=True)
    with open(work / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="Another process builds shards"):
            build(config, tokenizer_folder)


@pytest.mark.parametrize("command", [build, build_share])
def test_a_build_that_another_overtakes_leaves_its_shards_alone(
    config, tokenizer_folder, monkeypatch, command
):
    """It looks for its text, which may take long, before it locks the folder."""
    slow = dataclasses.replace(config, context=31, build_tasks=2)
    if command is build_share:
        slow.build_task = 0

    def find_parts_while_another_builds(asked):
        parts = find_parts(asked)
        if asked is slow:
            build(config, tokenizer_folder)
        return parts

    monkeypatch.setattr("pretrain.data.build.find_parts", find_parts_while_another_builds)
    with pytest.raises(DataError, match=r"data\.context: built with 63, now 31"):
        command(slow, tokenizer_folder)
    assert read_manifest(Path(config.shards)).context == 63


def test_a_place_that_is_no_folder_is_refused(config, tokenizer_folder):
    Path(config.shards).write_text("a file")
    with pytest.raises(DataError, match=r"Shards cannot be built in .*: Not a directory"):
        build(config, tokenizer_folder)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b"])
def test_a_source_whose_name_is_no_folder_is_refused(config, tokenizer_folder, name):
    config.sources = {name: SourceConfig(paths=["books/*"])}
    with pytest.raises(ConfigError, match=f"Source {name!r} names a folder"):
        build(config, tokenizer_folder)


def test_bad_text_stops_a_parallel_build_with_its_place(config, corpus, tokenizer_folder):
    (corpus / "books" / "3.jsonl").write_bytes(b'{"text": "\xff"}\n')
    config.build_workers = 2
    with pytest.raises(DataError, match=r"3\.jsonl"):
        build(config, tokenizer_folder)
    assert not (Path(config.shards) / "manifest.json").exists()


def test_all_text_held_out_is_no_corpus(config, tokenizer_folder):
    config.valid_fraction = 0.9999999
    with pytest.raises(DataError, match="gives no rows to train on"):
        build(config, tokenizer_folder)


@pytest.mark.parametrize(("fraction", "is_said"), [(0.0, True), (0.5, False)])
def test_text_of_which_nothing_is_held_out_is_said_before_training_refuses_it(
    config, tokenizer_folder, caplog, fraction, is_said
):
    manifest = build(dataclasses.replace(config, valid_fraction=fraction), tokenizer_folder)
    assert any(source.valid for source in manifest.sources) != is_said
    assert ("raise data.valid_fraction=0" in caplog.text) == is_said


def test_a_url_is_no_place_to_build(config, tokenizer_folder):
    config.shards = "s3://bucket/shards"
    with pytest.raises(ConfigError, match="build into a folder, then copy it there"):
        build(config, tokenizer_folder)


def test_no_tokenizer_names_the_command(config, tmp_path):
    with pytest.raises(DataError, match="pretrain data tokenizer"):
        build(config, str(tmp_path / "none"))


def test_the_manifest_says_whose_text_it_is(config, tokenizer_folder):
    build(config, tokenizer_folder)
    manifest = read_manifest(Path(config.shards))
    books = manifest.source("books")
    assert (books.licence, books.weight) == ("CC0", 0.7)
    assert manifest.tokenizer.sha256 == Tokenizer.load(tokenizer_folder).sha256
    assert manifest.dtype == "uint16"


def test_the_corpus_hash_follows_the_text(config, corpus, tokenizer_folder, tmp_path):
    before = build(config, tokenizer_folder)
    path = corpus / "notes" / "long.txt"
    path.write_text(path.read_text().replace("cat", "dog", 1))
    config.shards = str(tmp_path / "changed")
    after = build(config, tokenizer_folder)
    assert after.source("books").corpus_sha256 == before.source("books").corpus_sha256
    assert after.source("notes").corpus_sha256 != before.source("notes").corpus_sha256
    assert after.fingerprint != before.fingerprint
