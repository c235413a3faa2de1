"""One stream of rows, whatever the workers, the ranks and where it is taken up again."""

import hashlib
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import textwrap
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds

from pretrain.data.loader import Batch, stream_batches, valid_rows
from pretrain.data.manifest import read_manifest
from pretrain.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
SOURCES = {"a": (60, 0.5), "b": (30, 0.2), "c": (90, 0.3)}


def take(config, steps, *, first_row=0, rows_per_step=8, rank=0, ranks=1, seed=1) -> list[Batch]:
    stream = stream_batches(
        config, seed=seed, first_row=first_row, rows_per_step=rows_per_step, rank=rank, ranks=ranks
    )
    batches = list(islice(stream, steps))
    stream.close()
    return batches


def sha256(batches: list[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch.tokens_BS.numpy().tobytes())
        digest.update(batch.documents_BS.numpy().tobytes())
    return digest.hexdigest()


def stored_rows(config, split):
    folder = Path(config.shards)
    paths = sorted(str(path) for path in folder.glob(f"*/{split}-*.tar"))
    samples = wds.DataPipeline(wds.SimpleShardList(paths), wds.tarfile_to_samples(), wds.decode())
    return [tuple(row.tolist()) for sample in samples for row in sample["tokens.npy"]]


def rows_of(batches):
    return [tuple(row) for batch in batches for row in batch.tokens_BS.tolist()]


def test_an_epoch_of_one_source_is_every_stored_row_once(make_shards):
    config = make_shards({"a": (150, 1.0)})
    stored = stored_rows(config, "train")
    assert len(set(stored)) == len(stored)
    twice = rows_of(take(config, 2 * len(stored), rows_per_step=1))
    assert sorted(twice[: len(stored)]) == sorted(stored)
    assert sorted(twice[len(stored) :]) == sorted(stored)
    assert twice[: len(stored)] != twice[len(stored) :]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_do_not_change_the_stream(make_shards, workers):
    config = make_shards(SOURCES)
    expected = take(config, 20)
    config.loader_workers = workers
    batches = take(config, 20)
    assert [batch.first_row for batch in batches] == list(range(0, 160, 8))
    assert sha256(batches) == sha256(expected)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_take_contiguous_slices_of_the_same_stream(make_shards, ranks):
    config = make_shards(SOURCES)
    expected = take(config, 12)
    of_rank = [take(config, 12, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step, whole in enumerate(expected):
        slices = [of_rank[rank][step] for rank in range(ranks)]
        assert [s.first_row for s in slices] == [step * 8 + r * 8 // ranks for r in range(ranks)]
        assert torch.equal(torch.cat([s.tokens_BS for s in slices]), whole.tokens_BS)
        assert torch.equal(torch.cat([s.documents_BS for s in slices]), whole.documents_BS)


def test_a_stream_taken_up_twice_goes_on_where_it_was(make_shards):
    config = make_shards(SOURCES)
    whole = take(config, 12)
    # at other workers, ranks and steps of another size
    first = take(config, 5)
    config.loader_workers = 2
    second = take(config, 3, first_row=40)
    config.loader_workers = 0
    third = take(config, 8, first_row=64, rows_per_step=4)
    assert rows_of(first + second + third) == rows_of(whole)


def test_more_ranks_than_shards_read_every_row_once_across_a_resume(make_shards):
    config = make_shards({"a": (60, 1.0)}, members_per_shard=1000, window_shards=16)
    assert len(list(Path(config.shards).glob("a/train-*.tar"))) == 1
    stored = stored_rows(config, "train")
    epoch = len(stored)
    steps = -(-2 * epoch // 8)
    before = [take(config, 2, rank=rank, ranks=8) for rank in range(8)]
    after = [take(config, steps - 2, first_row=16, rank=rank, ranks=4) for rank in range(4)]
    read = rows_of([of[step] for step in range(2) for of in before])
    read += rows_of([of[step] for step in range(steps - 2) for of in after])
    assert sorted(read[:epoch]) == sorted(read[epoch : 2 * epoch]) == sorted(stored)


def test_seeds_give_other_streams(make_shards):
    config = make_shards(SOURCES)
    assert sha256(take(config, 4)) != sha256(take(config, 4, seed=2))


def test_documents_are_numbered_and_padding_is_none_of_them(make_shards):
    config = make_shards({"a": (150, 1.0)})
    manifest = read_manifest(Path(config.shards))
    special = manifest.tokenizer.special
    for batch in take(config, 20):
        assert batch.tokens_BS.dtype == batch.documents_BS.dtype == torch.int64
        is_padding = batch.tokens_BS == special["pad"]
        assert torch.equal(is_padding, batch.documents_BS == -1)
        for tokens, documents in zip(batch.tokens_BS, batch.documents_BS, strict=True):
            own = documents[documents >= 0]
            # a document goes on to the next token unless that begins another
            step = own[1:] - own[:-1]
            assert set(step.tolist()) <= {0, 1}
            begins = tokens[: len(own)] == special["begin_text"]
            # continued pieces of long documents begin without begin_text
            assert (step[begins[1:]] == 1).all()
            ends = tokens[: len(own)] == special["end_text"]
            assert (step[ends[:-1]] == 1).all()


def test_the_mixture_of_the_stream_is_that_of_the_weights(make_shards):
    config = make_shards(SOURCES)
    # sources follow each other in ids, see conftest
    owner = {
        row: name
        for name in SOURCES
        for row in [
            tuple(row.tolist())
            for path in Path(config.shards).glob(f"{name}/train-*.tar")
            for sample in wds.WebDataset(str(path), shardshuffle=False).decode()
            for row in sample["tokens.npy"]
        ]
    }
    read = [owner[row] for row in rows_of(take(config, 50))]
    for name, (_, weight) in SOURCES.items():
        for prefix in (10, 37, 100, 400):
            assert abs(read[:prefix].count(name) - weight * prefix) < 1


def test_a_damaged_shard_stops_the_stream_with_its_name(make_shards):
    config = make_shards({"a": (60, 1.0)})
    path = min(Path(config.shards).glob("a/train-*.tar"))
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    for workers in (0, 2):
        config.loader_workers = workers
        with pytest.raises(
            DataError, match=r"^a/train-000000\.tar: member .* is damaged"
        ) as caught:
            take(config, 100)
        assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 700])
def test_a_truncated_shard_stops_the_stream_with_both_sizes(make_shards, size):
    config = make_shards({"a": (60, 1.0)})
    path = min(Path(config.shards).glob("a/train-*.tar"))
    whole = path.stat().st_size
    os.truncate(path, size)
    with pytest.raises(DataError, match=f"has {size} bytes, the manifest says {whole}"):
        take(config, 100)


def test_settings_that_cannot_be_are_refused_at_once(make_shards):
    config = make_shards(SOURCES)
    with pytest.raises(ConfigError, match="8 rows of a step cannot be dealt to 3 ranks"):
        stream_batches(config, seed=0, first_row=0, rows_per_step=8, rank=0, ranks=3)
    config.context = 64
    with pytest.raises(DataError, match=r"context 31, data\.context=64"):
        stream_batches(config, seed=0, first_row=0, rows_per_step=8, rank=0, ranks=1)
    config.shards += "-elsewhere"
    with pytest.raises(DataError, match="run `pretrain data build`"):
        stream_batches(config, seed=0, first_row=0, rows_per_step=8, rank=0, ranks=1)


def test_closing_a_stream_ends_its_workers(make_shards):
    config = make_shards(SOURCES, loader_workers=2)
    before = set(multiprocessing.active_children())
    stream = stream_batches(config, seed=0, first_row=0, rows_per_step=4, rank=0, ranks=1)
    next(stream)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    stream.close()
    for worker in workers:
        worker.join(120)
        assert not worker.is_alive()


def test_workers_do_not_outlive_a_killed_parent(make_shards, tmp_path):
    config = make_shards(SOURCES, loader_workers=2)
    program = textwrap.dedent(f"""
        import multiprocessing, time
        from pretrain.data.config import *
        from pretrain.data.loader import stream_batches
        config = {config!r}
        stream = stream_batches(config, seed=0, first_row=0, rows_per_step=4, rank=0, ranks=1)
        next(stream)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        time.sleep(600)
    """)
    program = re.sub(r"<(\w+\.\w+): '\w+'>", r"\1", program)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as parent:
        try:
            assert parent.stdout is not None
            workers = [int(pid) for pid in parent.stdout.readline().split()]
            assert len(workers) == 2
        finally:
            parent.kill()
    # torch's workers look for their parent every five seconds: this test is slow
    deadline = time.monotonic() + 120
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, workers))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_valid_rows_are_the_same_for_any_number_of_ranks(make_shards):
    config = make_shards(SOURCES)
    whole = valid_rows(config, rows=15, rank=0, ranks=1)
    assert whole.tokens_BS.shape == (15, 32)
    for ranks in (2, 4, 16):
        slices = [valid_rows(config, rows=15, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat([s.tokens_BS for s in slices]), whole.tokens_BS)
        assert torch.equal(torch.cat([s.documents_BS for s in slices]), whole.documents_BS)
        ends = np.cumsum([len(s.tokens_BS) for s in slices])
        assert [s.first_row for s in slices] == [0, *ends[:-1].tolist()]


def test_valid_rows_are_held_out_and_spread_by_the_weights(make_shards):
    config = make_shards(SOURCES)
    rows = rows_of([valid_rows(config, rows=10, rank=0, ranks=1)])
    assert len(set(rows)) == 10
    assert set(rows) <= set(stored_rows(config, "valid"))
    assert not set(rows) & set(stored_rows(config, "train"))
    counts = [sum(row in set(stored_rows_of(config, name)) for row in rows) for name in SOURCES]
    assert counts == [5, 2, 3]


def stored_rows_of(config, source):
    return [
        tuple(row.tolist())
        for path in Path(config.shards).glob(f"{source}/valid-*.tar")
        for sample in wds.WebDataset(str(path), shardshuffle=False).decode()
        for row in sample["tokens.npy"]
    ]


def test_fewer_valid_rows_than_asked_are_all_there_are_and_said(make_shards, caplog):
    config = make_shards(SOURCES)
    with caplog.at_level(logging.WARNING):
        batch = valid_rows(config, rows=10_000, rank=0, ranks=1)
    stored = stored_rows(config, "valid")
    assert sorted(rows_of([batch])) == sorted(stored)
    assert f"only {len(stored)} rows are held out, of 10000 asked for" in caplog.text
