"""A run whose model and tokenizer are small, and files of items of every kind, made up here."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pretrain import adopt
from pretrain.compose import load

GOLDEN = Path(__file__).parent.parent / "golden/a_1_2_1_d96"

BIRDS = "The heron stands in the shallow water and waits. "
ITEMS: dict[str, list[dict[str, Any]]] = {
    "birds": [
        {"kind": "perplexity", "text": "Two herons."},
        # some three contexts long
        {"kind": "perplexity", "text": BIRDS * 12},
        {"kind": "perplexity", "text": "A café on the quay — closed."},
    ],
    "endings": [
        {"kind": "multiple_choice", "context": "He opens the window. He",
         "choices": ["breathes.", "is a ceiling made of very thin paper.", "sings"], "gold": 0},
        {"kind": "multiple_choice", "context": "Rain.", "question": "What falls?",
         "choices": ["water", "a piano"], "gold": 0},
        {"kind": "multiple_choice", "question": "Mara lent Ute her boat, so _ rowed home alone.",
         "choices": ["Mara", "Ute"], "gold": 1},
        # longer than the context: the beginning is left out
        {"kind": "multiple_choice", "context": BIRDS * 12, "question": "What waits?",
         "choices": ["the heron", "nobody"], "gold": 0},
    ],
    "sums": [
        {"kind": "generate", "question": f"{a}+{b}=", "answer": str(a + b)}
        for a, b in ((3, 4), (120, 7), (55, 66), (1, 1), (900, 99))
    ] + [{"kind": "generate", "question": "How many legs have two herons?", "answer": "4"}],
    "places": [
        {"kind": "exact", "question": "The heron", "answer": answer}
        for answer in (" stands in the water.\n", "s wait", "\n\nRain", " is a bird that waits")
    ],
    "programs": [
        {"kind": "code", "prompt": 'def twice(x):\n    """Two times x."""\n',
         "canonical_solution": "    return 2 * x\n", "entry_point": "twice",
         "test": "def check(function):\n    assert function(4) == 8\n"},
        {"kind": "code", "prompt": "Write a function that negates.", "entry_point": "minus",
         "canonical_solution": "def minus(x):\n    return -x", "test": "assert minus(3) == -3"},
    ],
}  # fmt: skip


def write_file(folder: Path, name: str, records: list[dict[str, Any]]) -> Path:
    """A task file; ids count from 0."""
    path = folder / f"{name}.jsonl"
    lines = [
        json.dumps({"task": name, "id": f"{name}/{at}"} | record, ensure_ascii=False)
        for at, record in enumerate(records)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tasks")
    return {name: write_file(folder, name, records) for name, records in ITEMS.items()}


@pytest.fixture(scope="session")
def run_dir(
    published_tokenizer: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of a model of 96 channels, context 128, that has taken no step."""
    folder = tmp_path_factory.mktemp("evaluated")
    published_tokenizer(folder / "published", 384)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / name, folder / "published" / name)
    words = [f"hf={folder / 'published'}", f"run.dir={folder / 'run'}", "data.name=none"]
    adopt.main(load("adopt", adopt.complete(words)))
    return folder / "run"


@pytest.fixture
def write_items(tmp_path: Path) -> Callable[[str, list[dict[str, Any]]], Path]:
    """Writes a task file of this test's own."""
    return partial(write_file, tmp_path)
