"""Files of items are read as they are meant, or refused with file, line and field."""

import json
from pathlib import Path

import pytest

from pretrain.errors import DataError
from pretrain.tasks.records import Choice, Kind, read_task

CHOICE = {"task": "t", "kind": "multiple_choice", "id": "1", "question": "Up or down?",
          "choices": ["up", "down"], "gold": 1, "meta": {"any": "thing"}}  # fmt: skip
ANSWER = {"task": "t", "kind": "generate", "id": "1", "question": "1+1=", "answer": "2"}
CODE = {"task": "t", "kind": "code", "id": "1", "prompt": "p", "test": "t", "entry_point": "f",
        "canonical_solution": "s"}  # fmt: skip


def write(folder: Path, *lines: object) -> Path:
    path = folder / "mine.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def test_items_are_read_whole(tmp_path: Path, task_files: dict[str, Path]) -> None:
    # a line separator within a string ends no line of the file
    odd = CHOICE | {"question": "Up\u2028or down?"}
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(odd, ensure_ascii=False), encoding="utf-8")
    task = read_task(path)
    assert (task.name, task.kind, task.total) == ("mine", Kind.multiple_choice, 1)
    assert task.items == (
        Choice(id="1", context="", question="Up\u2028or down?", choices=("up", "down"), gold=1),
    )
    kinds = {name: read_task(file).kind.value for name, file in task_files.items()}
    assert kinds == {
        "birds": "perplexity",
        "endings": "multiple_choice",
        "sums": "generate",
        "places": "exact",
        "programs": "code",
    }


def test_some_items_are_spread_over_the_whole_file(tmp_path: Path) -> None:
    path = write(tmp_path, *(ANSWER | {"id": str(at)} for at in range(10)))
    assert [item.id for item in read_task(path, 4).items] == ["0", "2", "5", "7"]
    assert len(read_task(path, 99).items) == 10


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{", "no JSON"),
        ("", "no JSON"),
        ("[1]", "no JSON object"),
        (CHOICE | {"kind": "riddle"}, "field `kind`: 'riddle' is none of perplexity, multiple_"),
        ({"task": "t", "kind": "perplexity", "id": "1"}, "field `text`: missing"),
        (CHOICE | {"id": 7}, "field `id`: 7 is no text"),
        (CHOICE | {"task": " "}, "field `task`: ' ' is no text"),
        (CHOICE | {"choices": ["one"]}, "field `choices`: .* is no list of two or more"),
        (CHOICE | {"choices": ["one", " "]}, "field `choices`: ' ' is no text"),
        (CHOICE | {"gold": 2}, "field `gold`: 2 is no index from 0 to 1"),
        (CHOICE | {"gold": True}, "field `gold`: True is no index"),
        (CHOICE | {"gold": -1}, "field `gold`: -1 is no index"),
        (CHOICE | {"question": ""}, "field `question`: missing, and so is `context`"),
        (CHOICE | {"answer": "up"}, "field `answer`: unknown; kind multiple_choice has choices"),
        (ANSWER | {"answer": 2}, "field `answer`: 2 is no text"),
        (CODE | {"entry_point": "f()"}, r"field `entry_point`: 'f\(\)' is no name"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, record: object, said: str) -> None:
    good = CHOICE | {"id": "0"}
    first = [] if isinstance(record, dict) and record.get("kind") != CHOICE["kind"] else [good]
    path = write(tmp_path, *first, record)
    with pytest.raises(DataError, match=rf"mine\.jsonl:{len(first) + 1}: .*{said}"):
        read_task(path)


def test_files_are_of_one_kind_with_ids_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r":2: field `kind`: 'generate', but line 1 has 'multiple"):
        read_task(write(tmp_path, CHOICE, ANSWER | {"id": "2"}))
    with pytest.raises(DataError, match=r":3: field `id`: '1' is that of line 1 already"):
        read_task(write(tmp_path, CHOICE, CHOICE | {"id": "2"}, CHOICE))
    with pytest.raises(DataError, match=r"absent\.jsonl cannot be read: No such file"):
        read_task(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl has no items"):
        read_task(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"task": "caf\xe9"}')
    with pytest.raises(DataError, match=r"latin\.jsonl: byte 13 is no UTF-8"):
        read_task(tmp_path / "latin.jsonl")
