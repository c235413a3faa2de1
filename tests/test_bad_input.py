"""Bad input, as a person meets it: one message with the number and the remedy, nothing lost.

Wrong types, unknown keys, indivisible batches and folders of other models: tests/test_compose.py,
tests/test_train.py. A disk that fills up while a checkpoint is written: tests/engine.
"""

import gzip
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from conftest import SMALL, run_cli

pytestmark = pytest.mark.faults
SMALL_FILES = [setting for setting in SMALL if not setting.startswith("data.root")]


def make_text(root: Path, kind: str) -> None:
    """A corpus with one thing wrong with it."""
    if kind == "missing":
        return
    root.mkdir()
    line = (json.dumps({"text": "a state that is iterated " * 20}) + "\n").encode()
    if kind == "not utf-8":
        (root / "part.jsonl").write_bytes(line + b'{"text": "caf\xe9"}\n')
    elif kind == "corrupt gzip":
        whole = gzip.compress(line * 50)
        (root / "part.jsonl.gz").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", ["data.root=broken"]),
        ("empty", ["no text"]),
        ("not utf-8", ["part.jsonl", "line 2", "UTF-8"]),
        ("corrupt gzip", ["part.jsonl.gz"]),
    ],
)
def test_bad_text_is_named_and_nothing_is_built(
    workspace: Path, tmp_path: Path, kind: str, said: list[str]
) -> None:
    shutil.copytree(workspace / "out/tokenizer", tmp_path / "out/tokenizer")
    make_text(tmp_path / "broken", kind)
    done = run_cli(tmp_path, "data", "build", *SMALL_FILES, "data.root=broken")
    assert done.returncode == 65, done.stderr
    assert "Traceback" not in done.stderr
    for part in said:
        assert part in done.stderr
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.fixture
def broken(workspace: Path, tmp_path: Path) -> Path:
    """A workspace of one's own to break."""
    shutil.copytree(workspace / "out/tokenizer", tmp_path / "out/tokenizer")
    shutil.copytree(workspace / "out/data", tmp_path / "out/data")
    return tmp_path


def train(folder: Path, *overrides: str) -> str:
    done = run_cli(folder, "train", *SMALL_FILES, "data.root=text", *overrides)
    assert done.returncode == 65, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_truncated_shard_stops_training_with_both_sizes(broken: Path) -> None:
    shards = sorted((broken / "out/data").rglob("valid-*.tar"))
    assert shards
    size = shards[0].stat().st_size
    os.truncate(shards[0], size - 512)
    said = train(broken)
    assert shards[0].name in said
    assert str(size) in said.replace(",", "")
    assert str(size - 512) in said.replace(",", "")


def test_another_tokenizer_than_that_of_the_shards_is_refused(broken: Path) -> None:
    (model,) = (broken / "out/tokenizer").rglob("tokenizer.model")
    shutil.rmtree(model.parent)
    (broken / "other").mkdir()
    letters = random.Random(1).choices("abcdefghij ", k=30_000)
    (broken / "other" / "part.txt").write_text("".join(letters))
    made = run_cli(broken, "data", "tokenizer", *SMALL_FILES, "data.root=other")
    assert made.returncode == 0, made.stderr
    said = train(broken)
    assert "made by a tokenizer with sha256" in said
    assert "tokenizer.path" in said


def test_a_run_folder_that_cannot_be_written_names_the_remedy(broken: Path) -> None:
    (broken / "out/runs").write_text("a file where folders belong")
    done = run_cli(broken, "train", *SMALL_FILES, "data.root=text")
    assert done.returncode == 64
    assert "choose another run.dir" in done.stderr
    assert "Traceback" not in done.stderr
