"""Files of items: JSON lines, one item a line, all of one kind.

Every record has `task`, `kind` and `id`, and may have `meta`. The kinds and their fields are
those of `Kind` and the dataclasses below.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pretrain.errors import DataError


class Kind(Enum):
    """What is done with an item."""

    perplexity = "perplexity"
    multiple_choice = "multiple_choice"
    exact = "exact"
    generate = "generate"
    code = "code"


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A text whose likelihood is measured."""

    id: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A question or a beginning, and what may follow; `gold` counts from 0."""

    id: str
    context: str
    question: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question and its final answer; of kind `exact`, the text that must follow at once."""

    id: str
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """What is to be programmed, and how a program is judged.

    `test` makes assertions, or defines check(function); `solution` is one that passes.
    """

    id: str
    prompt: str
    test: str
    entry_point: str
    solution: str


Item = Text | Choice | Question | Program


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The items of one file that are used."""

    name: str
    kind: Kind
    items: tuple[Item, ...]
    total: int
    """Items in the file."""


_ALWAYS = {"task", "kind", "id", "meta"}
_FIELDS = {
    Kind.perplexity: {"text"},
    Kind.multiple_choice: {"context", "question", "choices", "gold"},
    Kind.exact: {"question", "answer"},
    Kind.generate: {"question", "answer", "solution"},
    Kind.code: {"prompt", "canonical_solution", "test", "entry_point"},
}


def read_task(path: str | Path, items: int | None = None) -> Task:
    """The items of a file, or so many of them, evenly spread from its first.

    Raises DataError with file, line and field for whatever does not follow the schema.
    """
    path = Path(path)
    found: list[Item] = []
    kinds: list[Kind] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        record = _Record(path, number, line)
        kind, item = record.kind(), record.item()
        if kinds and kind is not kinds[0]:
            raise record.wrong("kind", f"{kind.value!r}, but line 1 has {kinds[0].value!r}")
        if (before := lines.setdefault(item.id, number)) != number:
            raise record.wrong("id", f"{item.id!r} is that of line {before} already")
        kinds.append(kind)
        found.append(item)
    if not found:
        raise DataError(f"{path} has no items; write one JSON object a line.")
    total = len(found)
    count = total if items is None else min(items, total)
    chosen = tuple(found[index * total // count] for index in range(count))
    return Task(name=path.stem, kind=kinds[0], items=chosen, total=total)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Tasks are files of items (JSON lines)."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is no UTF-8 ({error.reason}).") from error
    # not splitlines: JSON strings may hold other line separators as they are
    return text.removesuffix("\n").split("\n") if text else []


class _Record:
    """One line of a file, and what is wrong with it."""

    def __init__(self, path: Path, number: int, line: str) -> None:
        self._where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"{self._where}: no JSON ({error}).") from error
        if not isinstance(values, dict):
            raise DataError(f"{self._where}: {line[:40]!r} is no JSON object.")
        self._values: dict[str, Any] = values

    def wrong(self, name: str, what: str) -> DataError:
        """The error about one field."""
        return DataError(f"{self._where}: field `{name}`: {what}.")

    def kind(self) -> Kind:
        """The kind it names."""
        name = self._text("kind")
        if name not in {kind.value for kind in Kind}:
            known = ", ".join(kind.value for kind in Kind)
            raise self.wrong("kind", f"{name!r} is none of {known}")
        return Kind(name)

    def item(self) -> Item:
        """The item, checked."""
        kind = self.kind()
        self._text("task")
        known = _ALWAYS | _FIELDS[kind]
        if unknown := sorted(self._values.keys() - known):
            raise self.wrong(
                unknown[0], f"unknown; kind {kind.value} has {', '.join(sorted(known))}"
            )
        makers: dict[Kind, Callable[[str], Item]] = {
            Kind.perplexity: self._perplexity,
            Kind.multiple_choice: self._multiple_choice,
            Kind.exact: self._generate,
            Kind.generate: self._generate,
            Kind.code: self._code,
        }
        return makers[kind](self._text("id"))

    def _perplexity(self, name: str) -> Text:
        return Text(id=name, text=self._text("text"))

    def _multiple_choice(self, name: str) -> Choice:
        context, question = self._text("context", ""), self._text("question", "")
        if not (context or question):
            raise self.wrong("question", "missing, and so is `context`; give one of the two")
        choices = self._values.get("choices")
        if not isinstance(choices, list) or len(choices) < 2:
            raise self.wrong("choices", f"{choices!r} is no list of two or more")
        for choice in choices:
            if not isinstance(choice, str) or not choice.strip():
                raise self.wrong("choices", f"{choice!r} is no text")
        gold = self._values.get("gold")
        if type(gold) is not int or not 0 <= gold < len(choices):
            raise self.wrong("gold", f"{gold!r} is no index from 0 to {len(choices) - 1}")
        return Choice(
            id=name, context=context, question=question, choices=tuple(choices), gold=gold
        )

    def _generate(self, name: str) -> Question:
        self._text("solution", "")
        return Question(id=name, question=self._text("question"), answer=self._text("answer"))

    def _code(self, name: str) -> Program:
        entry = self._text("entry_point")
        if not entry.isidentifier():
            raise self.wrong("entry_point", f"{entry!r} is no name of a function")
        return Program(
            id=name,
            prompt=self._text("prompt"),
            test=self._text("test"),
            entry_point=entry,
            solution=self._text("canonical_solution"),
        )

    def _text(self, name: str, default: str | None = None) -> str:
        """A field that must be text; without a default also there and not blank."""
        if name not in self._values and default is None:
            raise self.wrong(name, "missing")
        value = self._values.get(name, default)
        if not isinstance(value, str) or (default is None and not value.strip()):
            raise self.wrong(name, f"{value!r} is no text")
        return value
