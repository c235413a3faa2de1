"""Docstrings and doctests found in source text, without running it."""

import logging
from pathlib import Path

import pytest

from pretrain.data.docstrings import (
    Docstring,
    Session,
    find_docstrings,
    find_session,
    first_paragraph,
    read_source,
)

LONG = "Says a good deal about what this is. " * 8
SOURCE = f'''"""{LONG}"""
raise SystemExit("never run")


def short():
    """Too short."""


class Shelf:
    def put(self, book, *, at=0):
        """{LONG}

        >>> Shelf().put(1)
        2
        """


log = _add_docstr(_C.log, r"""
log(input) -> Tensor

{LONG}

Args:
    {{input}}
    base
""")
add_newdoc("numpy._core", "absolute", """{LONG}""")
'''


def test_long_docstrings_are_found_in_order_with_their_names() -> None:
    module, put, log, absolute = find_docstrings(SOURCE, "mod")
    assert module == Docstring("mod", "", LONG)
    assert (put.name, put.signature) == ("mod.Shelf.put", "(self, book, *, at=0)")
    assert put.text.endswith("\n\n>>> Shelf().put(1)\n2")
    assert log.name == "mod: _C.log"
    assert log.text.endswith("Args:\n    base")
    assert absolute == Docstring("mod: absolute", "", LONG.strip())


def test_source_that_is_not_python_is_left_out_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert list(find_docstrings('print "no"\n"""text"""', "old.module")) == []
    assert "left out old.module" in caplog.text


def test_source_is_decoded_as_it_declares(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9'\n")
    assert read_source(path).endswith("name = '\u00e9'\n")
    path.write_bytes(b"name = '\xe9'\n")
    with caplog.at_level(logging.WARNING):
        assert read_source(path) == ""
    assert "left out a.py" in caplog.text


def test_the_first_session_ends_with_what_is_printed() -> None:
    docstring = "Text.\n\n>>> a = [\n...     1]\n>>> a\n[1]\n>>> a[0]\n1\n"
    assert find_session(docstring) == Session(">>> a = [\n...     1]\n>>> a", "[1]")
    assert find_session("No examples, but > and >> signs.") is None
    assert find_session(">>> silent = 1\n") is None
    assert find_session("  >>> x\n broken indentation") is None


def test_the_first_paragraph_is_one_line() -> None:
    assert first_paragraph("One\n  and two.\n\nThree.") == "One and two."
