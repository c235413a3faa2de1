"""Help says what there is; Hydra's flags check what they show, and leave nothing behind."""

import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from conftest import SMALL, run_cli
from pretrain.cli import COMMANDS, Command
from pretrain.compose import compose_to_show, load, write_frozen
from pretrain.help import describe


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cfg", "job", "+model.typo=1"], "Nothing reads this key"),
        (["--cfg", "job", "hydra.typo=1"], "hydra.typo"),
        (["--info", "defaults", "model.typo=1"], "typo"),
        (["--config-dir", ".", "+model.typo=1"], "Nothing reads this key"),
        (["--config-dir", ".", "batch.micro_rows=3"], "batch.micro_rows=3"),
        (["--steps", "4"], "There is no flag --steps: settings are key=value"),
        (["--cfg", "jobs"], "pretrain plan: error: argument --cfg"),
        (["-m", "--cfg", "job", "run.seed=1,2"], "--cfg cannot go with --multirun"),
    ],
    ids=str,
)
def test_mistakes_beside_flags_are_refused(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = run_cli(tmp_path, "plan", *arguments)
    assert said in done.stderr
    assert done.returncode == 64
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_shown_of_a_run_that_exists_is_what_it_would_use(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_frozen(load("train", ["model.width=64", f"run.dir={folder}"]), folder)
    done = run_cli(tmp_path, "train", f"run.dir={folder}", "run.steps=7", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    shown = OmegaConf.create(done.stdout)
    assert (shown.model.width, shown.run.steps, shown.run.dir) == (64, 7, str(folder))


def test_another_folder_of_options_is_read(tmp_path: Path) -> None:
    (tmp_path / "conf" / "batch").mkdir(parents=True)
    (tmp_path / "conf" / "batch" / "mine.yaml").write_text("global_tokens: 65536\nmicro_rows: 1\n")
    done = run_cli(tmp_path, "plan", "--config-dir", "conf", "batch=mine")
    assert done.returncode == 0, done.stderr
    assert "65,536" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


@pytest.mark.parametrize(
    ("arguments", "said", "shown"),
    [
        (["tarin"], "There is no command tarin. Did you mean train?", 20),
        (["data", "biuld", "data=files"], "no command data biuld. Did you mean data build?", 4),
        (["harness"], "usage", 2),
        (["run.dir=out"], "There is no command run.dir=out.", 20),
    ],
    ids=str,
)
def test_an_unknown_command_is_named_with_its_nearest(
    tmp_path: Path, arguments: list[str], said: str, shown: int
) -> None:
    done = run_cli(tmp_path, *arguments)
    assert done.returncode == 64
    assert said in done.stderr
    assert done.stderr.count("\n  pretrain ") == shown
    assert done.stdout == ""


def test_words_that_begin_commands_have_help(tmp_path: Path) -> None:
    done = run_cli(tmp_path, "data", "--help")
    assert done.returncode == 0
    assert re.findall(r"^  pretrain (\w+ \w+)", done.stdout, flags=re.M) == [
        "data tokenizer", "data build", "data verify", "data inspect",
    ]  # fmt: skip


def test_help_shows_a_setting_with_its_value_and_meaning(tmp_path: Path) -> None:
    done = run_cli(tmp_path, "evaluate", "--help", "evaluate.rows=7")
    assert done.returncode == 0, done.stderr
    assert "usage: pretrain evaluate run.dir=... [key=value]" in done.stdout
    assert "  evaluate.rows=7\n        Rows of the valid split to use.\n" in done.stdout
    assert "One of none, kl," in done.stdout
    assert "Hydra is" not in done.stdout
    assert not list(tmp_path.iterdir())
    wrong = run_cli(tmp_path, "evaluate", "--help", "evaluate.rws=7")
    assert wrong.returncode == 64
    assert "Did you mean evaluate.rows?" in wrong.stderr


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if command.primary], ids=lambda each: each.words
)
def test_every_setting_of_every_command_has_a_meaning(command: Command) -> None:
    node, groups = compose_to_show(command.primary, [])
    said = describe(command.words, command.purpose, node, groups)
    entries = re.findall(r"^  ([a-z]\S*?)=.*\n(        )?", said, flags=re.M)
    assert [key for key, meaning in entries if not meaning] == []
    assert {key for key, _ in entries} >= set(leaves(node))
    assert max(map(len, said.splitlines())) < 160
    if "model" in node:
        assert re.search(r"^  depth +curriculum, fixed, ", said, flags=re.M)
        assert "_schema" not in said


def leaves(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Keys that hold values, down to what a run names itself."""
    for key in map(str, node):
        value = None if OmegaConf.is_missing(node, key) else node._get_node(key)
        if isinstance(value, DictConfig) and dataclasses.is_dataclass(OmegaConf.get_type(value)):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_a_reader_that_leaves_early_gets_no_traceback(tmp_path: Path) -> None:
    # gone long before the interpreter has started
    command = f"{sys.executable} -m pretrain train --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "141\n"
    assert done.stderr == ""


def test_the_console_shows_news_plainly_and_warnings_by_name(
    workspace: Path, tmp_path: Path
) -> None:
    shutil.copytree(workspace, tmp_path / "here")
    few = ["run.steps=1", "validation.sample_tokens=99"]
    few += ["depth.curriculum=linear", "depth.ramp_rows=1000"]
    done = run_cli(tmp_path / "here", "train", *SMALL, *few)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert any(re.match(r"life 1 begins at step 0: 1 rank on \S+$", line) for line in lines)
    assert any(re.match(r"step 1/1  loss \d", line) for line in lines)
    assert any(re.match(r"sample at step 1, r=4: state", line) for line in lines)
    assert any(line.startswith("WARNING pretrain.loop.samples: samples have") for line in lines)
    too_short = (
        "WARNING pretrain.train: the run's 512 tokens are fewer than schedule.warmup_tokens=512"
    )
    assert any(line.startswith(too_short) for line in lines)
    ramp = r"WARNING pretrain\.train: the run's \d+ rows are fewer than depth\.ramp_rows=1,000: "
    assert any(re.match(ramp, line) for line in lines)


@pytest.mark.parametrize(
    ("given", "taken"), [({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77")], ids=str
)
def test_threads_that_wait_sleep_soon_unless_told_otherwise(
    tmp_path: Path, given: dict[str, str], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    # OpenMP itself says what it has read, when torch loads it
    done = run_cli(tmp_path, "evaluate", "run.dir=none", OMP_DISPLAY_ENV="VERBOSE", **given)
    if sys.platform != "linux":
        pytest.skip("this torch has another OpenMP, which does not say")
    assert set(re.findall(r"GOMP_SPINCOUNT\s*=\s*'(\w+)'", done.stderr)) == {taken}
