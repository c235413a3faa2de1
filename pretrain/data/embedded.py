"""The embedded corpus: real text that every machine with this project has, without a download.

- code: the standard library's sources
- prose: Python's documentation topics, descriptions and docstrings of installed packages
- scientific: docstrings, with their doctests, of numpy, sympy, networkx and mpmath
- math: generated arithmetic
- instruct: chats made of docstrings, doctests and word problems

Packages are found and parsed, never imported. Bytes vary with the versions that are installed,
so the manifest of the shards has hashes.
"""

import functools
import importlib.metadata
import importlib.util
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pretrain.data import arithmetic
from pretrain.data.chat import MODEL_ROLE, Message
from pretrain.data.config import DataConfig
from pretrain.data.docstrings import (
    Docstring,
    find_docstrings,
    find_session,
    first_paragraph,
    read_source,
)
from pretrain.data.documents import Document, Part, cut_at_blank_lines, number_parts
from pretrain.errors import DataError

log = logging.getLogger(__name__)

DOCUMENT_CHARACTERS = 60_000
BATCH_BYTES = 1 << 20

STANDARD_LIBRARY = "standard-library"
CODE = (STANDARD_LIBRARY,)
PROSE = (
    "deepspeed", "fsspec", "hydra", "matplotlib", "omegaconf", "rich", "torch/autograd",
    "torch/distributed", "torch/distributions", "torch/linalg", "torch/nn", "torch/optim",
    "torch/special", "torch/utils",
)  # fmt: skip
SCIENTIFIC = ("mpmath", "networkx", "numpy", "sympy")
INSTRUCT = ("numpy", STANDARD_LIBRARY)
DESCRIBED = ("deepspeed", "einops", "hydra-core", "matplotlib", "mpmath", "networkx", "ninja",
             "numpy", "omegaconf", "packaging", "pillow", "protobuf", "psutil", "pydantic",
             "requests", "rich", "safetensors", "sentencepiece", "setuptools", "sympy", "torch",
             "tqdm", "urllib3", "wandb", "webdataset", "zstandard")  # fmt: skip

# Test suites, generated tables, the data behind the topics, and other people's packages.
SKIPPED_FOLDERS = frozenset((
    "test", "tests", "testing", "idlelib", "encodings", "pydoc_data", "site-packages",
    "dist-packages", "benchmarks", "_vendor", "vendor", "__phello__", "__pycache__", "lib2to3",
    "distutils", "third_party",
))  # fmt: skip
TOPICS, DESCRIPTIONS = "topics", "descriptions"
ARITHMETIC_CHARACTERS = 1 << 18
ARITHMETIC_BATCHES = 16
STORY_BATCHES = 2
STORIES_PER_BATCH = 2500
# Of a source file, on average: 18 % in the packages for prose, 34 % in the scientific ones.
DOCSTRING_SHARE = 0.25
# A docstring is prose if this share of it are letters and spaces; the rest are tables and lists.
PROSE_SHARE = 0.8


class SourceFile(NamedTuple):
    """A Python file: where it is, its path below the package, its size."""

    path: Path
    name: str
    size: int


def find_parts(config: DataConfig) -> dict[str, list[Part]]:
    """The parts of the sources that the configuration names, or of all."""
    unknown = sorted(set(config.sources) - set(SOURCES))
    if unknown:
        raise DataError(
            f"data.sources names {', '.join(unknown)}; the embedded corpus has "
            f"{', '.join(SOURCES)}."
        )
    parts = {}
    for name in sorted(config.sources or SOURCES):
        sizes = SOURCES[name].sizes()
        if not sizes:
            raise DataError(
                f"The embedded source {name} is empty: its packages are not installed on this "
                "machine. Install the project again, or leave the source out of data.sources."
            )
        parts[name] = number_parts(name, sizes, config.max_bytes)
    return parts


def read_documents(part: Part, config: DataConfig) -> Iterator[Document]:
    """The documents of one part; longer ones are cut at blank lines to 60,000 characters."""
    number = 0
    for text, messages in SOURCES[part.source].read(part.path):
        pieces = [text] if messages else cut_at_blank_lines(text, DOCUMENT_CHARACTERS)
        for piece in pieces:
            yield Document(f"{part.source}/{part.path}#{number}", piece, messages)
            number += 1


Entry = tuple[str, tuple[Message, ...] | None]


class EmbeddedSource(NamedTuple):
    """What a source is made of: bytes by part path, and the entries of one part."""

    sizes: Callable[[], dict[str, int]]
    read: Callable[[str], Iterator[Entry]]


# Files of packages


@functools.lru_cache(maxsize=64)
def _batches(package: str) -> tuple[tuple[SourceFile, ...], ...]:
    """A package's files in the order of their names, in batches of about 1 MB."""
    batches: list[list[SourceFile]] = []
    size = BATCH_BYTES
    for file in _source_files(package):
        if size >= BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(file)
        size += file.size
    return tuple(map(tuple, batches))


def _source_files(package: str) -> list[SourceFile]:
    folder = _folder_of(package)
    if folder is None:
        log.warning("the embedded corpus goes without %s: it is not installed", package)
        return []
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [
            f for f in folders if f not in SKIPPED_FOLDERS and not f.startswith("config-")
        ]
        for name in names:
            path = Path(parent, name)
            if name.endswith(".py"):
                files.append(
                    SourceFile(path, path.relative_to(folder).as_posix(), path.stat().st_size)
                )
    return sorted(files, key=lambda file: file.name)


def _folder_of(package: str) -> Path | None:
    """Where a package or a folder inside it lies; finding the top-level package imports nothing."""
    if package == STANDARD_LIBRARY:
        return Path(os.__file__).parent
    top, _, inner = package.partition("/")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)), inner)
    return folder if folder.is_dir() else None


def _package_sizes(packages: tuple[str, ...], text_share: float) -> dict[str, int]:
    """About how many bytes of text the parts of some packages give."""
    return {
        f"{package}/{index:03}": int(text_share * sum(file.size for file in batch))
        for package in packages
        for index, batch in enumerate(_batches(package))
    }


def _read_batch(path: str) -> Iterator[tuple[str, str]]:
    """Name and text of every file of a part."""
    package, _, index = path.rpartition("/")
    for file in _batches(package)[int(index)]:
        yield f"{package}/{file.name}", read_source(file.path)


def _docstrings_by_file(path: str) -> Iterator[list[Docstring]]:
    for name, source in _read_batch(path):
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        module = module.removeprefix(f"{STANDARD_LIBRARY}.")
        yield list(find_docstrings(source, module))


def _joined(docstrings: list[Docstring]) -> str:
    return "\n\n\n".join(f"{d.name}{d.signature}\n\n{d.text}" for d in docstrings) + "\n"


# The five sources


def _read_code(path: str) -> Iterator[Entry]:
    for _, source in _read_batch(path):
        yield source, None


def _prose_sizes() -> dict[str, int]:
    topics, descriptions = sum(map(len, _topics())), sum(map(len, _descriptions()))
    extra = {TOPICS: topics, DESCRIPTIONS: descriptions}
    return _package_sizes(PROSE, DOCSTRING_SHARE) | {
        path: size for path, size in extra.items() if size
    }


def _read_prose(path: str) -> Iterator[Entry]:
    if path in (TOPICS, DESCRIPTIONS):
        for text in _topics() if path == TOPICS else _descriptions():
            yield text, None
        return
    for docstrings in _docstrings_by_file(path):
        prose = [docstring for docstring in docstrings if _reads_as_prose(docstring.text)]
        if prose:
            yield _joined(prose), None


def _reads_as_prose(text: str) -> bool:
    return sum(map(str.isalpha, text)) + text.count(" ") >= PROSE_SHARE * len(text)


def _topics() -> list[str]:
    """Python's documentation topics; the module that holds them is a table of strings."""
    if importlib.util.find_spec("pydoc_data.topics") is None:
        log.warning("the embedded corpus goes without Python's topics: pydoc_data is not installed")
        return []
    from pydoc_data.topics import topics

    return [topics[name].strip() + "\n" for name in sorted(topics)]


def _descriptions() -> list[str]:
    """What installed distributions say of themselves; those that are missing are left out."""
    texts = []
    for name in DESCRIBED:
        try:
            metadata = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            log.info("the embedded corpus goes without the description of %s", name)
            continue
        text = metadata.get_payload() or metadata.get("Description") or ""  # type: ignore[attr-defined]
        if text.strip():
            texts.append(text.strip() + "\n")
    return texts


def _read_scientific(path: str) -> Iterator[Entry]:
    for docstrings in _docstrings_by_file(path):
        if docstrings:
            yield _joined(docstrings), None


def _math_sizes() -> dict[str, int]:
    return {f"arithmetic/{i:03}": ARITHMETIC_CHARACTERS for i in range(ARITHMETIC_BATCHES)}


def _read_math(path: str) -> Iterator[Entry]:
    for text in arithmetic.documents(path, ARITHMETIC_CHARACTERS):
        yield text, None


def _instruct_sizes() -> dict[str, int]:
    stories = {f"arithmetic/{i:03}": STORIES_PER_BATCH * 100 for i in range(STORY_BATCHES)}
    return _package_sizes(INSTRUCT, DOCSTRING_SHARE) | stories


def _read_instruct(path: str) -> Iterator[Entry]:
    chats = _stories(path) if path.startswith("arithmetic/") else _docstring_chats(path)
    for question, answer in chats:
        yield f"{question}\n\n{answer}", (Message("user", question), Message(MODEL_ROLE, answer))


def _stories(path: str) -> Iterator[tuple[str, str]]:
    draw = arithmetic.Draw(f"instruct/{path}")
    for _ in range(STORIES_PER_BATCH):
        problem = arithmetic.word_problem(draw)
        yield problem.question, f"{problem.steps}\nThe answer is {problem.answer}."


def _docstring_chats(path: str) -> Iterator[tuple[str, str]]:
    asked = ("What does `{}` do?", "What is `{}` for?", "Explain `{}` in a few words.")
    for docstrings in _docstrings_by_file(path):
        for name, signature, text in docstrings:
            # The same question for the same name on every machine, whatever comes before it.
            ask = asked[zlib.crc32(name.encode()) % len(asked)]
            yield ask.format(name), first_paragraph(text)
            if signature:
                yield f"How is `{name}` called?", f"`{name}{signature}`"
            session = find_session(text)
            if session is not None:
                yield f"What does Python print?\n\n{session.typed}", session.printed


SOURCES = {
    "code": EmbeddedSource(lambda: _package_sizes(CODE, 1.0), _read_code),
    "prose": EmbeddedSource(_prose_sizes, _read_prose),
    "scientific": EmbeddedSource(
        lambda: _package_sizes(SCIENTIFIC, DOCSTRING_SHARE), _read_scientific
    ),
    "math": EmbeddedSource(_math_sizes, _read_math),
    "instruct": EmbeddedSource(_instruct_sizes, _read_instruct),
}
"""What the corpus is made of."""
