"""Published weights become a run: their shape and tokenizer, and no contradiction of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain import adopt
from pretrain.compose import load, thaw
from pretrain.config import AdoptConfig, TrainConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine.checkpoint import (
    load_weights,
    newest_checkpoint,
    read_optimizer_steps,
    read_state,
)
from pretrain.errors import CheckpointError, ConfigError, DataError
from pretrain.model.huggingface import load_pretrained
from pretrain.model.huggingface.moments import save_moments

GOLDEN = Path(__file__).parent / "golden/a_1_2_1_d96"


@pytest.fixture(scope="module")
def published(
    published_tokenizer: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A golden fixture's weights with a tokenizer of their vocabulary's size."""
    folder = tmp_path_factory.mktemp("hf") / "published"
    published_tokenizer(folder, 384, splits_digits=True, frames=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / name, folder / name)
    return folder


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "copy"))


def compose(*overrides: str) -> AdoptConfig:
    config = load("adopt", adopt.complete(overrides))
    assert isinstance(config, AdoptConfig)
    return config


def test_the_configuration_is_that_of_the_folder_and_the_published_run(published: Path) -> None:
    config = compose(f"hf={published}", "run.dir=R", "data.name=mine")
    assert config.run.name == "R"
    assert compose(f"hf={published}", "run.dir=runs/R", "run.name=mine").run.name == "mine"
    model, depth = config.model, config.depth
    raw = json.loads((published / "config.json").read_text())
    assert (model.name, model.width, model.heads) == ("published", raw["n_embd"], raw["n_heads"])
    assert (model.rope_base, model.norm_epsilon) == (raw["rope_base"], raw["norm_eps"])
    assert config.data.context == model.context == raw["block_size"]
    assert (depth.mean, depth.backprop) == (raw["mean_recurrence"], raw["mean_backprop_depth"])
    assert (depth.law.value, config.optimizer.name) == ("poisson_lognormal", "ellis-adam")
    assert (config.optimizer.learning_rate, config.schedule.warmup_tokens) == (4e-5, 0)
    assert config.rows_per_step == 8
    assert config.tokenizer.path == "R/tokenizer"
    assert config.data.shards == "out/data/mine-published"


def test_what_the_folder_does_not_decide_may_be_chosen(published: Path) -> None:
    config = compose(
        f"hf={published}", "run.dir=R", "model.context=32", "model.name=mine", "depth.mean=2",
        "model.documents=isolated", "batch.global_tokens=128", "optimizer=adamw",
    )  # fmt: skip
    assert (config.model.context, config.data.context, config.rows_per_step) == (32, 32, 4)
    assert (config.model.name, config.depth.mean, config.optimizer.name) == ("mine", 2, "adamw")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.width=48", r"model\.width=48 contradicts .*published, .* model\.width=96"),
        ("model.rope_base=10000", r"rope_base=10000 contradicts .*rope_base=50000"),
        ("model.block=pre_norm", r"model\.block=pre_norm contradicts .*model\.block=sandwich"),
        ("tokenizer.vocabulary_size=320", r"vocabulary_size=320 contradicts .*=384"),
        ("model=huginn-100m", r"model=huginn-100m contradicts hf="),
        ("model.typo=1", r"model\.typo"),
    ],
)
def test_what_contradicts_the_folder_is_refused(published: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(f"hf={published}", "run.dir=R", override)


@pytest.mark.parametrize("given", [[], ["hf="], ["hf=missing"], [f"hf={GOLDEN}/config.json"]])
def test_what_is_no_folder_is_refused(given: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"is no folder: `pretrain adopt hf=FOLDER"):
        compose(*given, "run.dir=R")


def test_a_run_folder_is_as_a_run_has_it_after_no_steps(published: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    adopt.main(compose(f"hf={published}", f"run.dir={run_dir}"))
    config = thaw(run_dir)
    assert type(config) is TrainConfig
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None
    assert checkpoint.name == "step-0000000000"
    expected = dict(load_pretrained(published).named_parameters())
    found = load_weights(checkpoint)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    state, tokenizer = read_state(checkpoint), Tokenizer.load(config.tokenizer.path)
    assert state["tokenizer_sha256"] == tokenizer.sha256
    assert (state["train"]["step"], state["adopted_from"]) == (0, "published")
    assert "data_fingerprint" not in state
    with pytest.raises(CheckpointError, match=r"holds no exp_avg; it holds master"):
        load_weights(checkpoint, "exp_avg")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_context_that_is_not_the_weights_own_is_said(
    published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adopt.main(compose(f"hf={published}", f"run.dir={tmp_path / 'run'}", "model.context=32"))
    assert "rows will have 32 tokens, the weights know 128" in caplog.text


def test_moments_are_taken_over(copy: Path, tmp_path: Path) -> None:
    weights = dict(load_pretrained(copy).named_parameters())
    moments = {
        name: (torch.full_like(weight, 0.5), weight.detach() ** 2)
        for name, weight in weights.items()
    }
    save_moments(copy, moments, 7)
    adopt.main(compose(f"hf={copy}", f"run.dir={tmp_path / 'run'}"))
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert read_optimizer_steps(checkpoint) == 7
    for i, section in enumerate(("exp_avg", "exp_avg_sq")):
        found = load_weights(checkpoint, section)
        assert all(torch.equal(found[name], pair[i]) for name, pair in moments.items())
    del moments["final_norm.gain"]
    save_moments(copy, moments, 7)
    with pytest.raises(CheckpointError, match=r"final_norm\.gain: absent"):
        adopt.main(compose(f"hf={copy}", f"run.dir={tmp_path / 'other'}"))
    assert not (tmp_path / "other").exists()


def test_a_folder_that_holds_something_is_refused(published: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"already holds something; adopt into a new folder"):
        adopt.main(compose(f"hf={published}", f"run.dir={tmp_path}"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_weights_that_are_damaged_leave_no_run(copy: Path, tmp_path: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        adopt.main(compose(f"hf={copy}", f"run.dir={tmp_path / 'run'}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_a_folder_without_tokenizer_needs_one_to_be_named(
    copy: Path, published: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: No such file.* tokenizer\.path="):
        compose(f"hf={copy}", "run.dir=R")
    with pytest.raises(DataError, match=r"No tokenizer at .*nowhere"):
        compose(f"hf={copy}", "run.dir=R", f"tokenizer.path={tmp_path}/nowhere")
    adopt.main(compose(f"hf={published}", f"run.dir={tmp_path / 'first'}"))
    known = tmp_path / "first/tokenizer"
    config = compose(f"hf={copy}", f"run.dir={tmp_path / 'run'}", f"tokenizer.path={known}")
    adopt.main(config)
    assert thaw(tmp_path / "run").tokenizer.path == str(known)
    assert not (tmp_path / "run/tokenizer").exists()


def test_a_tokenizer_with_ids_that_the_model_lacks_is_refused(
    copy: Path, published_tokenizer: Callable[..., None], tmp_path: Path
) -> None:
    published_tokenizer(copy, 385)
    with pytest.raises(DataError, match=r"Wrong vocabulary: .* ids up to 384, .* 384 embeddings"):
        compose(f"hf={copy}", "run.dir=R")
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json is damaged or no tokenizer"):
        compose(f"hf={copy}", "run.dir=R")


def test_a_smaller_tokenizer_leaves_rows_of_the_embedding_unused(
    copy: Path, published_tokenizer: Callable[..., None]
) -> None:
    published_tokenizer(copy, 300)
    config = compose(f"hf={copy}", "run.dir=R")
    assert (config.tokenizer.vocabulary_size, config.model.vocabulary_size) == (300, 384)
