"""Every command that a page shows exists, and its arguments compose; the README's tree is there."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import SMALL, run_cli, write_published_tokenizer
from pretrain.adopt import complete
from pretrain.cli import COMMANDS, reads_run_folder
from pretrain.compose import load, write_frozen
from pretrain.harness import run as harness_run
from pretrain.harness.config import model_options
from pretrain.loop.run_folder import log_file
from pretrain.multirun import combinations

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "slurm/README.md",
    ROOT / "kernels/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# a block with a title is a file that the page asks its reader to write
WRITTEN = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```', flags=re.M | re.S)
# of the shell and of other projects: nothing of ours is in their arguments
FOREIGN = {"git", "cd", "cp", "export", "hf", "scancel", "source", "squeue", "tail", "touch"}

# Hydra's, with what follows one
FLAGS = {"--multirun", "--cfg", "job"}


class Shown(NamedTuple):
    """A command and the page that shows it."""

    page: Path
    line: str


def lines_of(page: Path) -> list[Shown]:
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [line.split("  #")[0].strip() for line in lines if not line.startswith("#")]
    return [Shown(page, line) for line in commands if line]


SHOWN = list({shown.line: shown for page in PAGES for shown in lines_of(page)}.values())


def written_files(page: Path) -> dict[str, str]:
    """What a page asks its reader to write, by its path in the project."""
    return dict(WRITTEN.findall(page.read_text(encoding="utf-8")))


def words_of(line: str) -> list[str]:
    return [word for word in shlex.split(line) if "$" not in word]


def check_pretrain(words: list[str]) -> None:
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
            for job in combinations([word for word in overrides if word not in FLAGS]):
                load(command.primary, job, resumes=reads_run_folder(command, job))
            return
    raise AssertionError(f"there is no command {words[0]}")


def check_python(words: list[str]) -> None:
    """A file of the project, or a module and, for pytest, files of the project."""
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file()
        return
    assert importlib.util.find_spec(words[1])
    if words[1] == "pytest":
        paths = [word for word in words[2:] if word.endswith(".py")]
        assert paths
        assert all((ROOT / path).is_file() for path in paths)


def check_harness(words: list[str]) -> None:
    model = words[words.index("--model") + 1]
    given = dict(pair.split("=") for pair in words[words.index("--model_args") + 1].split(","))
    if model == "hf":
        # lm-evaluation-harness's own, on a folder that `pretrain export` wrote
        assert set(given) == {"pretrained", "trust_remote_code"}
        return
    assert model == harness_run.NAME
    model_options({name: int(value) if value.isdigit() else value for name, value in given.items()})


def check(words: list[str]) -> None:
    first = words[0]
    if first == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert words[1] in targets
    elif first.endswith("pretrain"):
        check_pretrain(words[1:])
    elif first == "torchrun":
        check_pretrain(words[words.index("pretrain") + 1 :])
    elif first == "sbatch" or first.startswith("launch/"):
        scripts = [word for word in words if word.endswith((".sbatch", ".sh"))]
        assert scripts
        assert (ROOT / scripts[0]).is_file()
        overrides = [word for word in words[words.index(scripts[0]) + 1 :] if "=" in word]
        load("evaluate" if "eval" in scripts[0] else "train", overrides)
    elif first.endswith("python"):
        check_python(words[1:])
    else:
        assert first in FOREIGN, f"untested kind of command: {shlex.join(words)}"


def test_pages_show_commands() -> None:
    assert len(lines_of(ROOT / "README.md")) > 10
    assert all(lines_of(page) for page in (ROOT / "docs/tutorials").glob("*.md"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that has been begun."""
    folder = tmp_path_factory.mktemp("run")
    write_frozen(load("train", []), folder)
    return folder


@pytest.mark.parametrize(
    "shown", SHOWN, ids=[f"{shown.page.relative_to(ROOT)}: {shown.line}" for shown in SHOWN]
)
def test_command_of_a_page_is_real(
    shown: Shown, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # where a command reads a run, there is one
    for folder in {"out/runs/tiny", *re.findall(r"out/runs/[\w-]+", shown.line)}:
        shutil.copytree(run, tmp_path / folder)
    for folder in re.findall(r" hf=(\S+)", shown.line):
        write_published_tokenizer(tmp_path / folder, 384)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(ROOT / "tests/golden/a_1_2_1_d96" / name, tmp_path / folder)
    settings = {n: text for n, text in written_files(shown.page).items() if n.startswith("conf/")}
    if settings:
        shutil.copytree(ROOT / "conf", tmp_path / "conf")
        for name, text in settings.items():
            assert name.startswith("conf/user/") or not (ROOT / name).exists(), name
            (tmp_path / name).write_text(text, encoding="utf-8")
        monkeypatch.setattr("pretrain.compose.config_source", lambda: str(tmp_path / "conf"))
    check(words_of(shown.line))


def test_logs_that_pages_follow_are_those_that_runs_write() -> None:
    words = {word for shown in SHOWN for word in shown.line.split() if "/logs/" in word}
    followed = [Path(word) for word in words if word.startswith("out/runs/")]
    assert followed
    assert followed == [log_file(path.parents[1], 0) for path in followed]


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
