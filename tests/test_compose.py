"""Every shipped configuration composes; a mistake is named before anything starts."""

import re
import shutil
from pathlib import Path

import pytest

from pretrain.compose import (
    check_resumable,
    differences,
    freeze,
    load,
    names_run,
    thaw,
    write_frozen,
)
from pretrain.config import TrainConfig
from pretrain.errors import CheckpointError, ConfigError

CONF = Path(__file__).resolve().parent.parent / "conf"
GROUPS = sorted(
    path.parent.name + "=" + path.stem
    for path in CONF.glob("*/*.yaml")
    if path.parent.name != "user"
)
# what an option cannot know by itself
NEEDS = {
    "data=files": ["data.root=texts"],
    "model=huginn-100m": ["batch.global_tokens=65536"],
    "model=huginn-3.5b": ["batch.global_tokens=65536"],
}


@pytest.mark.parametrize("option", GROUPS)
def test_every_shipped_option_composes(option: str) -> None:
    config = load("train", [option, *NEEDS.get(option, [])])
    assert isinstance(config, TrainConfig)


def test_huginn_has_every_published_value() -> None:
    config = load("train", ["experiment=huginn-3.5b"])
    model, depth, optimizer = config.model, config.depth, config.optimizer
    assert (model.width, model.heads, model.head_width, model.inner) == (5280, 55, 96, 17920)
    assert (model.prelude_layers, model.core_layers, model.coda_layers) == (2, 4, 2)
    assert (model.vocabulary_size, model.context) == (65536, 4096)
    assert (model.rope_base, model.norm_epsilon) == (50_000, 1e-6)
    assert (depth.mean, depth.backprop, depth.sigma) == (32, 8, 0.5)
    assert config.rows_per_step == 4096
    assert config.total_steps == 238_419  # 4e12 tokens, rounded up to whole steps
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == (
        "ellis-adam", 4e-5, 4e-5,
    )  # fmt: skip
    assert (optimizer.beta1, optimizer.beta2, optimizer.gradient_clip) == (0.9, 0.95, 1.0)
    assert config.schedule.warmup_tokens == config.schedule.cooldown_tokens == 4096 * 16_777_216
    shares = {name: source.weight for name, source in config.data.sources.items()}
    assert sum(shares.values()) == pytest.approx(99.99)
    assert shares["generic-text"] == 28.71
    assert len(shares) == 11


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.typo=1", "model.typo"),
        ("+model.typo=1", "typo"),
        ("+typo=1", "typo"),
        ("hydra.typo=1", "hydra.typo"),
        ("+hydra.run.typo=1", "hydra.run.typo"),
        ("batch.micro_row=3", "Did you mean batch.micro_rows?"),
        ("micro_rows=3", "Did you mean batch.micro_rows?"),
        ("steps=3", "Did you mean run.steps?"),
        ("optimizer.lr=3", "optimizer has name, learning_rate, weight_decay"),
        ("lr=3", "--help shows every key"),
        ("data.sources.code.path=x", "Did you mean data.sources.code.paths?"),
        ("data.sources.code.wieght=3", "wieght"),
        ("optimizer.epsilon=1e-8", "epsilon"),
        ("batch.global_tokens=many", "batch.global_tokens: Value 'many'"),
        ("run.steps=[1]", "run.steps"),
        ("schedule.warmup_tokens=2e9", "write schedule.warmup_tokens=2_000_000_000."),
        ("model=huge", "model=huge: model is one of addition, huginn-100m, huginn-3.5b, tiny."),
        ("optimizer=adam", "one of adamw, ellis-adam, ellis-adam-tiny. Did you mean adamw?"),
        ("checkpoint.tags.best=5", "'+checkpoint.tags={best: ...}' adds it"),
        ("+data.sources.mine.weight=1", "'+GROUP={NAME: {KEY: VALUE}}'"),
        (
            "validation.depths=4",
            "validation.depths takes a list: validation.depths='[4]'.",
        ),
        (
            "optimizer.learning_rate=1e-3,2e-3",
            "A list: optimizer.learning_rate='[1e-3,2e-3]'; a text: "
            "optimizer.learning_rate='\"1e-3,2e-3\"'; a sweep: add --multirun.",
        ),
        ("engine.precision=fp8", "bf16, fp32"),
        ("model.context=256 batch.global_tokens=8191", "Nearest: 7936 (31 rows) or 8192 (32 rows)"),
        ("run.tokens=5", "give one of the two"),
        ("model.heads=3", "head width"),
        (
            "model.context=256 batch.global_tokens=8192 depth.lanes=3",
            "32 rows or blocks of a step; take 2 or 4.",
        ),
        ("depth.scope=block depth.block_rows=16", "the 8 rows of a step; take 8."),
        ("depth.scope=block depth.block_rows=2 depth.lanes=8", "the 4 rows or blocks"),
        ("depth.lanes=0", "take 1."),
        ("depth.sigma=50", "at most 8"),
        ("depth.sigma=inf", "at most 8"),
        ("run.name=''", "run.name='' is empty; give run.name=NAME"),
        ("run.dir=", "run.dir='' is empty"),
        ("engine.zero_stage=4", "1, 2 or 3"),
        ("data=files", "data.root=FOLDER"),
        ("validation.depths=[0]", "depths of 1 or more"),
        ("generate.seed=1", "generate"),
        ("experiment=null", "~experiment"),
        ("run.name=a(b", "two pairs of quotes"),
    ],
)
def test_mistakes_are_refused_by_name(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("train", override.split())
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run:\n  name: mine\n", r"first line `# @package _global_`"),
        ("# @package _global_\nrun:\n  nme: mine\n", r"Did you mean run\.name\?"),
        ("# @package _global_\nrun:\n name: mine\n  x: 3\n", r"no YAML: .*mine\.yaml\", line 4"),
        ("# @package _global_\ndefaults:\n  - override depth: fixed\n", r"override /depth\."),
        ("# @package _global_\ndefaults:\n  - override /depth: fxed\n", r"Did you mean fixed\?"),
    ],
)
def test_mistakes_in_an_experiment_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "conf/experiment/mine.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr("pretrain.compose.config_source", lambda: str(tmp_path / "conf"))
    with pytest.raises(ConfigError, match=re.compile(said, re.S)):
        load("train", ["experiment=mine"])


def test_indivisible_batch_names_the_nearest() -> None:
    config = load("train", ["model.context=256", "batch.global_tokens=8192", "batch.micro_rows=16"])
    with pytest.raises(ConfigError, match=r"3 ranks x batch.micro_rows=16 x model.context=256"):
        config.batch.micro_steps(context=256, ranks=3)
    assert config.batch.micro_steps(context=256, ranks=2) == 1


@pytest.mark.parametrize("primary", ["evaluate", "generate"])
def test_commands_on_a_run_need_its_folder(primary: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir"):
        load(primary, [])


def test_frozen_configuration_is_the_same_one(tmp_path: Path) -> None:
    config = load("train", ["optimizer=adamw", "depth.scope=step", f"run.dir={tmp_path}"])
    write_frozen(config, tmp_path)
    assert thaw(tmp_path) == config
    assert "${" not in freeze(config)


def test_a_run_folder_remembers_its_configuration(tmp_path: Path) -> None:
    folder = f"run.dir={tmp_path}"
    write_frozen(load("train", ["model.width=64", "run.steps=7", folder]), tmp_path)
    again = load("train", [folder, "run.steps=9"], resumes=True)
    assert (again.model.width, again.run.steps) == (64, 9)
    assert load("train", [folder]).model.width == 128, "only a resume reads the folder"
    with pytest.raises(ConfigError, match="typo"):
        load("train", [folder, "model.typo=1"], resumes=True)
    with pytest.raises(ConfigError, match=r"give run\.name="):
        load("train", [folder, "model.context=64"], resumes=True)


def test_a_run_is_renamed_only_where_its_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_frozen(load("train", ["run.dir=out/runs/a"]), Path("out/runs/a"))
    renamed = load("train", ["run.dir=out/runs/a", "run.name=other"], resumes=True)
    assert (renamed.run.name, renamed.run.dir) == ("other", "out/runs/a")
    found = load("train", ["run.name=a"], resumes=True)
    assert (found.run.name, found.run.dir) == ("tiny", "out/runs/a")


def test_a_run_that_exists_takes_new_tags_and_nothing_away(tmp_path: Path) -> None:
    folder = f"run.dir={tmp_path}"
    write_frozen(load("train", [folder]), tmp_path)
    config = load("train", [folder, "+checkpoint.tags.good=6"], resumes=True)
    assert config.checkpoint.tags == {"good": 6}
    with pytest.raises(ConfigError, match="typo"):
        load("train", [folder, "+model.typo=1"], resumes=True)
    with pytest.raises(ConfigError, match=r"key=value and \+key=value only"):
        load("train", [folder, "~data.sources.code"], resumes=True)


def test_what_a_command_asks_for_goes_on_top_of_a_run_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = f"run.dir={tmp_path}"
    write_frozen(load("train", ["model.width=64", folder]), tmp_path)
    config = load("data", [folder, "inspect.row=3"], resumes=True)
    assert (config.model.width, config.inspect.row) == (64, 3)
    assert load("data", [folder, "batch=tiny"], resumes=True).model.width == 128
    assert f"conf/ counts and {tmp_path}/config.yaml does not" in caplog.text
    assert names_run([folder])
    assert names_run(["a.b=1", "run.name=mine"])
    assert not names_run(["run.steps=4", "data.name=run.dir=x"])


def test_another_model_in_the_folder_is_refused(tmp_path: Path) -> None:
    folder = f"run.dir={tmp_path}"
    old = load("train", ["model.width=64", folder])
    write_frozen(old, tmp_path)
    new = load("train", ["model=tiny", folder])
    assert differences(old, new) == {"model.width": (64, new.model.width)}
    with pytest.raises(ConfigError, match=r"(?s)model\.width: 64 in the run folder.*remove it\."):
        check_resumable(thaw(tmp_path), new)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"started with\.$"):
        check_resumable(thaw(tmp_path), new)


def test_other_sources_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = f"run.dir={tmp_path}"
    old = load("train", ["data=files", "data.root=texts", folder])
    with pytest.raises(ConfigError) as caught:
        check_resumable(old, load("train", ["depth=fixed", folder]))
    assert "  data.sources: none in the run folder, code, prose, " in str(caught.value)
    assert "weight" not in str(caught.value)


def test_a_name_where_a_folder_is_needed_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"takes a run's folder: run\.dir=out/runs/NAME\."):
        load("evaluate", ["run.name=tiny"])


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.yaml"):
        thaw(tmp_path)
