"""Settings of data that cannot be are refused when the configuration is composed."""

import math

import pytest

from pretrain.compose import load
from pretrain.data.config import Corpus, DataConfig, SourceConfig, TokenizerConfig
from pretrain.errors import ConfigError


def make(**changes) -> DataConfig:
    values = {
        "name": "test",
        "corpus": Corpus.files,
        "root": "text",
        "shards": "shards",
        "context": 8,
    }
    return DataConfig(**(values | changes))


def sources(**weights) -> dict[str, SourceConfig]:
    return {name: SourceConfig(paths=["*"], weight=weight) for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("valid_fraction", 1.0),
        ("valid_fraction", -0.1),
        ("rows_per_member", 0),
        ("members_per_shard", 0),
        ("window_shards", 0),
        ("context", 0),
        ("pack_tokens", 0),
        ("cache_bytes", 0),
        ("max_bytes", 0),
        ("build_workers", -1),
        ("loader_workers", -1),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"data\.{name}={value} must be"):
        make(**{name: value})


@pytest.mark.parametrize(("task", "tasks"), [(2, 2), (-1, 2), (0, 0), (None, 0)])
def test_a_job_of_a_shared_build_is_one_of_them(task, tasks):
    with pytest.raises(ConfigError, match=rf"build_task={task} is not one of .*={tasks} jobs"):
        make(build_task=task, build_tasks=tasks)
    assert make(build_task=1, build_tasks=2).build_task == 1


@pytest.mark.parametrize("corpus", [Corpus.embedded, Corpus.addition])
def test_a_corpus_without_files_has_none_to_hold_out(corpus):
    given = {"corpus": corpus, "root": None, "valid_paths": ["*"]}
    with pytest.raises(ConfigError, match=rf"data.valid_paths=\['\*'\] .* the {corpus.value}"):
        make(**given, **({"max_digits": 3, "max_bytes": 9} if corpus is Corpus.addition else {}))


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_weight_that_is_no_share_is_refused(weight):
    with pytest.raises(ConfigError, match="0 or more"):
        SourceConfig(weight=weight)


def test_weights_are_given_to_all_sources_or_to_none():
    assert make(sources=sources(a=None, b=None)).sources
    assert make(sources=sources(a=2.0, b=0.0)).sources
    with pytest.raises(ConfigError, match=r"data\.sources: b, c have no weight, a do"):
        make(sources=sources(a=1.0, b=None, c=None))
    with pytest.raises(ConfigError, match=r"a, b all have the weight 0"):
        make(sources=sources(a=0.0, b=0.0))


def test_a_weight_that_is_taken_from_one_source_is_said_before_anything_starts():
    with pytest.raises(ConfigError, match="code have no weight, instruct, math, prose, scien"):
        load("train", ["data.sources.code.weight=null"])


@pytest.mark.parametrize("setting", [{"paths": ["*.py"]}, {"text_key": "body"}])
def test_the_embedded_corpus_takes_no_settings_that_it_would_not_read(setting):
    name = next(iter(setting))
    with pytest.raises(ConfigError, match=rf"data\.sources\.code\.{name}=.* reads no files"):
        make(corpus=Corpus.embedded, root=None, sources={"code": SourceConfig(**setting)})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"root": None}, "needs data.root=FOLDER"),
        ({"shards": "pipe:cat x"}, "commands are not run"),
        ({"corpus": Corpus.embedded}, "the embedded corpus reads no folder"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        make(**changes)


def test_the_tokenizer_of_huginn_sees_a_megabyte_of_every_source():
    config = load("train", ["experiment=huginn-3.5b"])
    assert config.tokenizer.train_bytes is not None
    weights = [source.weight or 0 for source in config.data.sources.values()]
    assert config.tokenizer.train_bytes * min(weights) / sum(weights) > 1_000_000


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_bytes": 0}, r"train_bytes=0 must be 1 or more"),
        ({"character_coverage": 1.1}, r"character_coverage=1\.1 must be"),
        ({"vocabulary_size": 0}, r"vocabulary_size=0 must be at least 1"),
        ({"threads": -1}, r"threads=-1 must be 0 or more"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        TokenizerConfig(**({"path": "tokenizer", "vocabulary_size": 512} | changes))
