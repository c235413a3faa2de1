"""Docstrings and doctests of Python source files, read with `ast`: nothing is imported."""

import ast
import doctest
import gc
import logging
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

# Functions that attach a documentation string to a compiled object (numpy, torch).
ATTACHERS = ("add_docstr", "_add_docstr", "add_newdoc")
# Fields that these strings leave to str.format; alone on a line they say nothing.
EMPTY_FIELD = re.compile(r"^[ \t]*\{\w+\}[ \t]*\n", re.MULTILINE)
MIN_CHARACTERS = 200

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Docstring(NamedTuple):
    """One docstring: the dotted name it documents, its arguments, its text."""

    name: str
    signature: str
    text: str


class Session(NamedTuple):
    """One doctest: what is typed, and what the last line of it prints."""

    typed: str
    printed: str


def read_source(path: Path) -> str:
    """The text of a source file; empty, with a warning, if its encoding is broken."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError) as error:
        log.warning("left out %s: %s", path.name, error)
        return ""


def find_docstrings(source: str, module: str) -> Iterator[Docstring]:
    """Docstrings of a module, its classes and functions, of 200 characters or more, in order."""
    if '"""' not in source and "'''" not in source:
        return
    try:
        tree = _parse(source)
    except (SyntaxError, ValueError) as error:
        log.warning("left out %s: %s", module, error)
        return
    yield from _docstrings_of(tree, module, "")
    for statement in tree.body:
        yield from _attached(statement, module)


def _parse(source: str) -> ast.Module:
    # A tree is thousands of objects without cycles: pausing the collector saves a quarter of the
    # whole extraction (26 s to 19 s).
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if was_enabled:
            gc.enable()


def _docstrings_of(node: ast.Module | Documented, name: str, signature: str) -> Iterator[Docstring]:
    text = ast.get_docstring(node)
    if text and len(text) >= MIN_CHARACTERS:
        yield Docstring(name, signature, text)
    for child in node.body:
        if isinstance(child, Documented):
            arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
            yield from _docstrings_of(child, f"{name}.{child.name}", arguments)


def _attached(statement: ast.stmt, module: str) -> Iterator[Docstring]:
    call = getattr(statement, "value", None)
    if not isinstance(call, ast.Call) or getattr(call.func, "id", "") not in ATTACHERS:
        return
    strings = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant)]
    texts = [s for s in strings if isinstance(s, str)]
    text = max(texts, key=len, default="")
    if len(text) >= MIN_CHARACTERS:
        target = " ".join(s for s in texts if s != text and s.isidentifier())
        name = target or ast.unparse(call.args[0])
        yield Docstring(f"{module}: {name}", "", EMPTY_FIELD.sub("", text).strip())


def first_paragraph(docstring: str) -> str:
    """What a docstring says first, on one line."""
    return " ".join(docstring.split("\n\n", 1)[0].split())


def find_session(docstring: str) -> Session | None:
    """The first doctest that prints something, with what was typed before it."""
    try:
        examples = doctest.DocTestParser().get_examples(docstring)
    except ValueError:
        # Example blocks with broken indentation are prose that looks like a doctest.
        return None
    typed = []
    for example in examples:
        typed.append(_prompted(example.source))
        if example.want:
            return Session("\n".join(typed), example.want.rstrip())
    return None


def _prompted(source: str) -> str:
    first, *rest = source.rstrip("\n").split("\n")
    return "\n".join([f">>> {first}", *(f"... {line}" for line in rest)])
