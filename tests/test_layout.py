"""The shape of the project: what is shipped, who may import whom, and that imports do nothing."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    path
    for tree in ("pretrain", "kernels/pretrain_kernels")
    for path in (ROOT / tree).rglob("*.py")
)
# commands -> loop, engine -> model, data, optim -> kernels
LAYERS = {"pretrain_kernels": 0, "model": 1, "data": 1, "optim": 1, "engine": 2, "loop": 3}


# commands among what they show: they lie where their words say
HIGH_COMMANDS = {"pretrain.data.inspect"}


def module_name(path: Path) -> str:
    kernels = ROOT / "kernels"
    relative = path.relative_to(kernels if path.is_relative_to(kernels) else ROOT)
    return ".".join(relative.with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    nodes = ast.parse(path.read_text()).body
    walk = nodes if top_level_only else [n for node in nodes for n in ast.walk(node)]
    found: set[str] = set()
    for node in walk:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def layer(name: str) -> int:
    parts = name.split(".")
    if name in HIGH_COMMANDS:
        return 4
    if parts[0] == "pretrain_kernels":
        return LAYERS["pretrain_kernels"]
    if parts[0] == "pretrain" and len(parts) > 1:
        return LAYERS.get(parts[1], 4)
    return -1


# what configuration is made of, and what a command's main takes: known to every layer
BELOW_ALL = {
    "pretrain",
    "pretrain.errors",
    "pretrain.paths",
    "pretrain.secrets",
    "pretrain.config",
    "pretrain.compose",
}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    name = module_name(path)
    own = layer(name)
    for other in imports(path):
        if other in BELOW_ALL or not other.startswith("pretrain"):
            continue
        if own < 4 and not other.endswith(".config"):
            assert layer(other) <= own, f"{name} imports {other}, which lies above it"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_the_engine_imports_deepspeed(path: Path) -> None:
    uses = any(name.split(".")[0] == "deepspeed" for name in imports(path))
    assert not uses or path.parent.name == "engine"


def test_model_code_knows_no_distribution() -> None:
    for path in MODULES:
        if "model" in path.parts:
            assert not any("distributed" in name for name in imports(path)), path


def test_configuration_needs_neither_torch_nor_hydra() -> None:
    names = [module_name(path) for path in MODULES if path.name == "config.py"]
    code = (
        "import sys\n"
        f"import {', '.join(names)}, pretrain.model.depth, pretrain.plan\n"
        "print([name for name in ('torch', 'hydra', 'deepspeed') if name in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", ["kernels", "launch", "slurm", "tests"])
def test_folders_that_must_not_shadow_packages(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_every_package_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {module_name(path) for path in MODULES if path.name == "__init__.py"}
    assert listed == found | {"pretrain.conf"}


def test_wheel_holds_two_packages_and_the_configuration(tmp_path: Path) -> None:
    # a copy, because setuptools leaves build/ behind and would pack what is stale there
    source = tmp_path / "source"
    for name in ("pretrain", "kernels", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", str(tmp_path), str(source)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"pretrain", "pretrain_kernels"}
    shipped = {name.removeprefix("pretrain/conf/") for name in names if name.endswith(".yaml")}
    tracked = {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml")}
    assert shipped == {name for name in tracked if not name.startswith("user/")}


def test_files_and_functions_stay_readable() -> None:
    for path in MODULES:
        text = path.read_text()
        assert text.count("\n") <= 500, f"{path} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 60, f"{path}:{node.lineno} {node.name} has {lines} lines"


def test_nothing_is_printed_outside_commands() -> None:
    for path in MODULES:
        if not any(part in path.parts for part in ("model", "optim", "engine", "loop")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            is_print = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
            assert not is_print, f"{path}:{node.lineno} prints"
