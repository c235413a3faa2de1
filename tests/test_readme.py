"""Every command that the README shows exists, and its arguments compose."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from conftest import SMALL, run_cli, write_published_tokenizer
from pretrain.adopt import complete
from pretrain.cli import COMMANDS
from pretrain.compose import load, write_frozen
from pretrain.harness import run as harness_run
from pretrain.harness.config import model_options
from pretrain.multirun import combinations

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.S)
LINES = [
    line.split("  #")[0].strip()
    for block in BLOCKS
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]


def words_of(line: str) -> list[str]:
    return [word for word in shlex.split(line) if "$" not in word]


def check_pretrain(words: list[str], tmp_path: Path) -> None:
    for command in COMMANDS:
        names = command.words.split()
        if words[: len(names)] == names:
            overrides = words[len(names) :]
            if not command.primary:
                check_harness(overrides)
                return
            if command.words == "adopt":
                overrides = complete(overrides)
            # what names a run by a swept value is not among the words
            for job in combinations([word for word in overrides if word != "--multirun"]):
                load(command.primary, job)
            return
    raise AssertionError(f"there is no command {words[0]}")


def check_harness(words: list[str]) -> None:
    assert words[words.index("--model") + 1] == harness_run.NAME
    given = [pair.split("=") for pair in words[words.index("--model_args") + 1].split(",")]
    model_options({name: int(value) if value.isdigit() else value for name, value in given})


def test_the_readme_shows_commands() -> None:
    assert len(LINES) > 15


@pytest.mark.parametrize("line", LINES)
def test_command_of_the_readme_is_real(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # where a command reads a run, there is one
    monkeypatch.chdir(tmp_path)
    write_frozen(load("train", []), tmp_path / "out/runs/tiny")
    if " hf=" in line:
        write_published_tokenizer(tmp_path / "huginn-0125", 384)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(ROOT / "tests/golden/a_1_2_1_d96" / name, tmp_path / "huginn-0125")
    words = words_of(line)
    first = words[0]
    if first == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert words[1] in targets
    elif first.endswith("pretrain"):
        check_pretrain(words[1:], tmp_path)
    elif first == "torchrun":
        check_pretrain(words[words.index("pretrain") + 1 :], tmp_path)
    elif first == "sbatch" or first.startswith("launch/"):
        scripts = [word for word in words if word.endswith((".sbatch", ".sh"))]
        assert scripts
        assert (ROOT / scripts[0]).is_file()
        overrides = [word for word in words[words.index(scripts[0]) + 1 :] if "=" in word]
        load("evaluate" if "eval" in scripts[0] else "train", overrides)
    else:
        assert first in {"git", "cd", "export"}, f"untested kind of command: {line}"


def test_tree_of_the_readme_is_the_tree() -> None:
    block = re.search(r"```\n(pyproject\.toml.*?)```", TEXT, flags=re.S)
    assert block
    shown = {line.split()[0].rstrip("/") for line in block.group(1).splitlines() if line[0] != " "}
    ignored = {
        ".git",
        ".venv",
        ".venv-transformers-4",
        ".venv-harness",
        "out",
        ".pytest_cache",
        ".mypy_cache",
        ".ruff_cache",
        ".hypothesis",
    }
    there = {
        path.name
        for path in ROOT.iterdir()
        if path.name not in ignored and not path.name.endswith(".egg-info")
    }
    there -= {"build", ".whl", ".carry", "__pycache__", ".gitignore"}
    assert shown == there


@pytest.mark.parametrize("command", ["plan", "doctor", "data verify", "data inspect"])
def test_commands_that_only_look_run(workspace: Path, command: str) -> None:
    done = run_cli(workspace, *command.split(), *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) > 5


def test_hydra_flags_keep_working(workspace: Path) -> None:
    done = run_cli(workspace, "train", *SMALL, "--cfg", "job")
    assert done.returncode == 0
    assert "width: 32" in done.stdout
    assert run_cli(workspace, "--help").returncode == 0
    assert run_cli(workspace, "tarin").returncode == 64
