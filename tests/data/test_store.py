"""Which shards a configuration may read, and how much of each source."""

from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.data import store
from pretrain.data.config import Corpus, SourceConfig
from pretrain.data.manifest import read_manifest
from pretrain.data.store import (
    ShardStore,
    check_tokenizer,
    open_manifest,
    source_weights,
    train_order,
)
from pretrain.errors import ConfigError, DataError


def opened(config):
    return config, read_manifest(Path(config.shards))


def test_without_weights_sources_count_by_their_tokens(make_shards):
    config, manifest = opened(make_shards({"a": (60, None), "b": (20, None)}))
    tokens = {s.name: float(s.totals("train").tokens) for s in manifest.sources}
    assert source_weights(config, manifest) == tokens


def test_configured_weights_go_before_those_of_the_build(make_shards):
    config, manifest = opened(make_shards({"a": (60, 1.0), "b": (20, 3.0)}))
    config.sources["a"].weight = 7.0
    assert source_weights(config, manifest) == {"a": 7.0, "b": 3.0}
    config.sources = {}
    assert source_weights(config, manifest) == {"a": 1.0, "b": 3.0}


def test_sources_that_differ_from_the_shards_are_named(make_shards):
    config, manifest = opened(make_shards({"a": (60, 1.0), "b": (20, 1.0)}))
    config.sources = {"a": SourceConfig(weight=1.0), "c": SourceConfig(weight=1.0)}
    with pytest.raises(ConfigError, match=r"only configured: \['c'\], only built: \['b'\]. Give"):
        source_weights(config, manifest)
    config.corpus = Corpus.embedded
    manifest = replace(manifest, settings={"data.corpus": "files"})
    with pytest.raises(ConfigError, match=r"data\.corpus=files, and it is embedded here: choose"):
        source_weights(config, manifest)


def test_a_source_with_weight_but_no_rows_is_refused(make_shards):
    # its only document is held out
    config, manifest = opened(make_shards({"a": (60, 1.0), "b": (1, 1.0)}))
    with pytest.raises(DataError, match=r"Source b has the weight 1\.0 but no train rows"):
        train_order(config, manifest, 0)
    config.sources["b"].weight = 0.0
    assert train_order(config, manifest, 0).address(12_345).source == 0


def test_a_source_too_small_for_the_period_is_told_how_often_it_is_read(make_shards, caplog):
    config, manifest = opened(make_shards({"a": (60, 1.0), "b": (20, 1e-5)}))
    train_order(config, manifest, 0)
    assert "Source b has 0.001 % of the weights, but gets 1 row in 10000: 10 times" in caplog.text
    config.sources["b"].weight = 1e-4
    caplog.clear()
    train_order(config, manifest, 0)
    assert not caplog.text


def test_shards_of_another_tokenizer_are_refused(make_shards):
    _, manifest = opened(make_shards({"a": (60, 1.0)}))
    check_tokenizer(manifest, vocabulary_size=200_000, tokenizer_sha256=manifest.tokenizer.sha256)
    with pytest.raises(DataError, match=r"ids up to 199999 .* model.vocabulary_size=65536"):
        check_tokenizer(manifest, vocabulary_size=65_536)
    with pytest.raises(DataError, match=r"sha256 .* the one at hand has abc"):
        check_tokenizer(manifest, vocabulary_size=200_000, tokenizer_sha256="abc")


def test_a_context_of_another_length_is_refused(make_shards):
    config = make_shards({"a": (60, 1.0)})
    config.context = 63
    with pytest.raises(DataError, match=r"context 31, data\.context=63"):
        open_manifest(config)


def test_descriptors_are_bounded_and_reading_goes_on(make_shards, monkeypatch):
    monkeypatch.setattr(store, "OPEN_SHARDS", 2)
    config, manifest = opened(make_shards({"a": (150, 1.0)}))
    shards = len(manifest.sources[0].train)
    assert shards > 3
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    opened_store = ShardStore(config, manifest, "train")
    first = [opened_store.read(0, shard, 0) for shard in range(shards)]
    assert len(list(descriptors.iterdir())) == before + 2
    assert [opened_store.read(0, shard, 0) for shard in range(shards)] == first
    opened_store.close()
    assert len(list(descriptors.iterdir())) == before


def test_a_url_needs_a_cache(make_shards):
    config, manifest = opened(make_shards({"a": (60, 1.0)}, cache=""))
    config.shards = "s3://bucket/shards"
    with pytest.raises(ConfigError, match=r"set data\.cache"):
        ShardStore(config, manifest, "train")
