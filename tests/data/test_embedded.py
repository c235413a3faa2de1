"""The embedded corpus: real text from this machine, the same twice, nothing imported."""

import dataclasses
import hashlib
import json
import json.decoder
import logging
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.data import embedded
from pretrain.data.config import Corpus, DataConfig, SourceConfig
from pretrain.data.documents import Document, Part
from pretrain.data.sources import find_parts, read_documents
from pretrain.errors import DataError


def embedded_config(*sources: str, max_bytes: int | None = None) -> DataConfig:
    return DataConfig(
        name="embedded", corpus=Corpus.embedded, shards="unused", context=8, max_bytes=max_bytes,
        sources={name: SourceConfig() for name in sources},
    )  # fmt: skip


@pytest.fixture(scope="module")
def parts() -> dict[str, list[Part]]:
    return find_parts(embedded_config())


def read(part: Part) -> list[Document]:
    return list(read_documents(part, embedded_config()))


def one_of_each_kind(parts: dict[str, list[Part]]) -> Iterator[Part]:
    """The smallest part of every source and package: all code runs, few files are parsed."""
    kinds: dict[tuple[str, str], Part] = {}
    for part in sorted((p for own in parts.values() for p in own), key=lambda p: -p.stored_bytes):
        kinds[part.source, part.path.split("/")[0]] = part
    yield from kinds.values()


def test_there_are_five_sources_of_tens_of_megabytes(parts: dict[str, list[Part]]) -> None:
    assert list(parts) == ["code", "instruct", "math", "prose", "scientific"]
    for source, own in parts.items():
        assert [part.path for part in own] == sorted({part.path for part in own}), source
        # Batches of about 1 MB, so that cores share the work.
        assert all(0 < part.stored_bytes < 4e6 for part in own), source
    stored = {source: sum(part.stored_bytes for part in own) for source, own in parts.items()}
    assert stored["code"] > 5e6
    assert stored["scientific"] > 5e6
    assert 20e6 < sum(stored.values()) < 60e6


def test_every_kind_of_part_has_documents_of_bounded_length(parts: dict[str, list[Part]]) -> None:
    for part in one_of_each_kind(parts):
        documents = read(part)
        assert documents, part
        assert len({document.id for document in documents}) == len(documents)
        for document in documents:
            assert document.id.startswith(f"{part.source}/{part.path}#")
            assert 0 < len(document.text) <= embedded.DOCUMENT_CHARACTERS
            assert bool(document.messages) == (part.source == "instruct")


def test_code_is_the_standard_library_uncut(parts: dict[str, list[Part]]) -> None:
    code = "".join(document.text for part in parts["code"] for document in read(part))
    for module in (json.decoder, dataclasses, textwrap, subprocess):
        assert Path(str(module.__file__)).read_text(encoding="utf-8") in code
    assert "class TestCase(object):" in code
    assert "import idlelib" not in code


def test_prose_and_science_read_as_such(parts: dict[str, list[Part]]) -> None:
    topics = next(part for part in parts["prose"] if part.path == "topics")
    text = "\n".join(document.text for document in read(topics))
    assert "statement" in text
    assert len(text) > 100_000
    numpy = [part for part in parts["scientific"] if part.path.startswith("numpy/")]
    science = "\n".join(document.text for part in numpy for document in read(part))
    assert science.count(">>> ") > 1000
    assert "numpy.linalg._linalg.svd(a, full_matrices=True" in science


def test_chats_ask_and_answer(parts: dict[str, list[Part]]) -> None:
    path = "standard-library/000"
    documents = read(next(part for part in parts["instruct"] if part.path == path))
    assert len(documents) > 300
    questions = set()
    for document in documents:
        assert document.messages is not None
        question, answer = document.messages
        assert (question.role, answer.role) == ("user", "Huginn")
        assert document.text == f"{question.content}\n\n{answer.content}"
        questions.add(re.sub(r"`.*`|>>>.*", "", question.content, flags=re.DOTALL))
    assert "What does Python print?\n\n" in questions
    assert {"What does  do?", "What is  for?", "How is  called?"} <= questions
    stories = next(part for part in parts["instruct"] if part.path.startswith("arithmetic/"))
    assert all("The answer is " in document.text for document in read(stories))


def digest(config: DataConfig, part: Part) -> str:
    texts = [(d.id, d.text, d.messages) for d in read_documents(part, config)]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


CHILD = """
import hashlib, json, sys
from pretrain.data.config import Corpus, DataConfig
from pretrain.data.sources import find_parts, read_documents
config = DataConfig(name="embedded", corpus=Corpus.embedded, shards="unused", context=8)
wanted = set(sys.argv[1:])
digests = {}
for own in find_parts(config).values():
    for part in own:
        if f"{part.source}/{part.path}" in wanted:
            texts = [(d.id, d.text, d.messages) for d in read_documents(part, config)]
            digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
            digests[f"{part.source}/{part.path}"] = digest
loaded = sorted({"numpy", "sympy", "networkx", "torch", "mpmath", "matplotlib"} & set(sys.modules))
print(json.dumps([digests, loaded]))
"""


def test_another_process_reads_the_same_and_imports_no_package(
    parts: dict[str, list[Part]],
) -> None:
    smallest = (min(own, key=lambda part: part.stored_bytes) for own in parts.values())
    chosen = {f"{part.source}/{part.path}": part for part in smallest}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *chosen],
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    digests, loaded = json.loads(child.stdout)
    assert digests == {name: digest(embedded_config(), part) for name, part in chosen.items()}
    assert loaded == []


def test_sources_can_be_chosen_and_cut_short() -> None:
    config = embedded_config("math", max_bytes=160_000)
    parts = find_parts(config)
    assert list(parts) == ["math"]
    read_bytes = [sum(len(d.text) for d in read_documents(part, config)) for part in parts["math"]]
    # Sixteen parts of the same size share it; the last document of each may exceed its share.
    assert all(10_000 <= size < 13_000 for size in read_bytes)


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(DataError, match="names poems; the embedded corpus has code, prose"):
        find_parts(embedded_config("poems"))


def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embedded, "SCIENTIFIC", ("no_such_package",))
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match="scientific is empty"):
        find_parts(embedded_config("scientific"))
    assert "goes without no_such_package: it is not installed" in caplog.text
