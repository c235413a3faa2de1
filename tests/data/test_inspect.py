"""What is shown is what a run reads."""

from pathlib import Path

import numpy as np
import pytest

from pretrain.data.inspect import mixture_table, row_documents, spell
from pretrain.data.loader import stream_batches
from pretrain.data.manifest import read_manifest
from pretrain.data.shards import RowBytes
from pretrain.data.store import ShardStore, train_order
from pretrain.data.tokenizer import Tokenizer


def test_the_mixture_counts_the_rows_that_the_order_gives(make_shards):
    config = make_shards({"a": (60, 0.6), "b": (60, 0.4)})
    manifest = read_manifest(Path(config.shards))
    order = train_order(config, manifest, 0)
    table = mixture_table(manifest, order, 25_003)
    columns = [list(column.cells) for column in table.columns]
    sources = order.addresses(np.arange(25_003)).source
    held = [source.totals("train").rows for source in manifest.sources]
    counts = np.bincount(sources).tolist()
    assert columns[0] == ["a", "b"]
    assert columns[1] == ["60.00%", "40.00%"]
    assert columns[2] == [f"{count:,}" for count in counts]
    assert columns[4] == [f"{c / h:.3f}" for c, h in zip(counts, held, strict=True)]


def test_a_row_is_shown_as_the_stream_has_it(make_shards):
    config = make_shards({"a": (60, 1.0)})
    manifest = read_manifest(Path(config.shards))
    stream = stream_batches(config, seed=4, first_row=3, rows_per_step=1, rank=0, ranks=1)
    batch = next(stream)
    address = train_order(config, manifest, 4).address(3)
    store = ShardStore(config, manifest, "train")
    stored = store.read(address.source, address.shard, address.row)
    assert np.frombuffer(stored.tokens, np.uint32).tolist() == batch.tokens_BS[0].tolist()
    store.close()


@pytest.mark.parametrize(
    ("lengths", "headings"),
    [
        ([6, 4], ["document 0: 6 tokens, whole", "document 1: 4 tokens, begins"]),
        ([7], ["document 0: 7 tokens, begins", "padding: 3 tokens"]),
    ],
)
def test_documents_of_a_row_are_told_apart(make_shards, tokenizer_folder, lengths, headings):
    tokenizer = Tokenizer.load(tokenizer_folder)
    manifest = read_manifest(Path(make_shards({"a": (60, 1.0)}).shards))
    special = tokenizer.special
    ids = []
    for number, length in enumerate(lengths):
        last = special.end_text if headings[number].endswith("whole") else 65
        ids += [special.begin_text, *[65] * (length - 2), last]
    ids += [special.pad] * (10 - len(ids))
    stored = RowBytes(
        np.array(ids, dtype=manifest.dtype).tobytes(), np.array([*lengths, 0], np.uint32).tobytes()
    )
    assert [heading for heading, _ in row_documents(manifest, tokenizer, stored)] == headings


def test_special_tokens_are_spelled_between_the_text(tokenizer_folder):
    tokenizer = Tokenizer.load(tokenizer_folder)
    special = tokenizer.special
    ids = [special.begin_text, *tokenizer.encode("the cat "), special.end_turn, special.pad]
    assert spell(tokenizer, ids) == "<|begin_text|>the cat <|end_turn|><|pad|>"
