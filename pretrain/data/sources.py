"""Where documents come from: text at hand, generated sums, or files below a folder or URL."""

import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from operator import itemgetter
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from pretrain.data import addition, embedded
from pretrain.data.config import Corpus, DataConfig
from pretrain.data.documents import Document, Part, number_parts
from pretrain.data.records import READERS, reader_of
from pretrain.errors import ConfigError, DataError, PretrainError

__all__ = ["Document", "Part", "find_parts", "read_documents"]

log = logging.getLogger(__name__)


def find_parts(config: DataConfig) -> dict[str, list[Part]]:
    """The parts of every source, by source name; both in a fixed order.

    Raises DataError for a missing root, a source without files, a file of two sources, a glob of
    held-out files that matches none, and a corpus without any text.
    """
    if config.corpus is Corpus.embedded:
        return embedded.find_parts(config)
    if config.corpus is Corpus.addition:
        return addition.find_parts(config)
    files = _list_files(config)
    if config.sources:
        sizes = {name: _matching(name, config, files) for name in config.sources}
        _check_disjoint(sizes)
    else:
        sizes = _by_folder(config, files)
    if not any(size for source in sizes.values() for size in source.values()):
        count = sum(map(len, sizes.values()))
        raise DataError(
            f"data.root={config.root} holds no text: all its {count} data files are empty."
            f" Expected {', '.join(READERS)}."
        )
    parts = {
        name: number_parts(name, source, config.max_bytes) for name, source in sorted(sizes.items())
    }
    held_out = _held_out_paths(parts, config)
    return {
        name: [replace(part, is_held_out=part.path in held_out) for part in own]
        for name, own in parts.items()
    }


def _held_out_paths(parts: dict[str, list[Part]], config: DataConfig) -> set[str]:
    """The files that data.valid_paths names."""
    paths, held_out = [part.path for own in parts.values() for part in own], set()
    for pattern in config.valid_paths:
        matched = set(filter(_compile(pattern).match, paths))
        if not matched:
            raise DataError(
                f"data.valid_paths: {pattern} matches none of the {len(paths)} files of the "
                f"sources below {config.root}; correct or remove it."
            )
        held_out |= matched
    return held_out


def read_documents(part: Part, config: DataConfig) -> Iterator[Document]:
    """The documents of one part, in order; records without text are left out.

    Raises DataError for a file that is not UTF-8 or damaged, a line that is no JSON, a record
    without text under the text key: each with file, record and remedy.
    """
    if config.corpus is Corpus.embedded:
        documents = embedded.read_documents(part, config)
    elif config.corpus is Corpus.addition:
        documents = addition.read_documents(part, config)
    else:
        documents = _read_file(part, config)
    read = 0
    for document in documents:
        if not document.text:
            continue
        yield document
        read += _utf8_bytes(document)
        if part.max_bytes is not None and read >= part.max_bytes:
            return


def _utf8_bytes(document: Document) -> int:
    try:
        return len(document.text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DataError(
            f"{document.id}: character {error.start} is the lone surrogate "
            f"{error.object[error.start]!r}, which UTF-8 cannot write; correct or remove it."
        ) from error


def _read_file(part: Part, config: DataConfig) -> Iterator[Document]:
    system, root = _open_root(config)
    source = config.sources.get(part.source)
    text_key = (source.text_key if source else None) or config.text_key
    path = f"{root}/{part.path}"
    reader = reader_of(path)
    assert reader is not None, f"find_parts admits no {path}"
    with _explained(system, f"{path} cannot be read", "try again, or copy it to another disk."):
        try:
            file = system.open(path, "rb")
        except OSError as error:
            said = error.strerror or error
            raise DataError(f"{path}: {said}; the corpus lost a file.") from error
        with file:
            for record in reader(file, path, text_key):
                name = f"{part.source}/{part.path}#{record.number}"
                yield Document(name, record.text, record.messages)


@contextmanager
def _explained(system: Any, problem: str, remedy: str) -> Iterator[None]:
    """What a disk or store raises, as a DataError."""
    # what stores raise, their libraries decide
    errors = OSError if isinstance(system, LocalFileSystem) else Exception
    try:
        yield
    except PretrainError:
        raise
    except errors as error:
        raise DataError(f"{problem} ({type(error).__name__}: {error}); {remedy}") from error


def _open_root(config: DataConfig) -> tuple[Any, str]:
    try:
        system, root = fsspec.core.url_to_fs(config.root)
    except (ValueError, ImportError) as error:
        raise DataError(
            f"data.root={config.root} cannot be opened: {error}. For object stores install "
            "pretrain[remote]."
        ) from error
    return system, root.rstrip("/")


def _list_files(config: DataConfig) -> dict[str, int]:
    """Bytes of every file below the root, by relative path; hidden files and folders are not."""
    system, root = _open_root(config)
    remedy = "look at that disk, or at the store's name, this node's keys and the network."
    with _explained(system, f"data.root={config.root} cannot be listed", remedy):
        return _sizes(config, system, root)


def _sizes(config: DataConfig, system: Any, root: str) -> dict[str, int]:
    if not system.isdir(root):
        raise DataError(f"data.root={config.root} is no folder; set it to the one with the text.")
    found = dict(sorted(_walk(system, root, root, [os.path.realpath(root)])))
    _check_names(config, found)
    # a web server lists names alone
    unknown = [path for path, size in found.items() if size is None and reader_of(path)]
    sizes = dict(zip(unknown, system.sizes([f"{root}/{path}" for path in unknown]), strict=True))
    if unsaid := [path for path, size in sizes.items() if size is None]:
        raise DataError(
            f"data.root={config.root}: the server does not say how long {unsaid[0]} is; copy the "
            "text into a folder."
        )
    return {path: int(size or 0) for path, size in (found | sizes).items()}


def _walk(
    system: Any, root: str, folder: str, walked: list[str]
) -> Iterator[tuple[str, int | None]]:
    """Files below a folder of the root and their bytes, if those are known; links are followed.

    `walked`: where folders that were entered really are. Raises DataError if text would be read
    twice.
    """
    # in an order that no disk decides: of two links to one folder the first is read
    for path, info in sorted(_find(system, folder), key=itemgetter(0)):
        name = path[len(root) + 1 :]
        if _is_hidden(name):
            continue
        if not (info.get("islink") and system.isdir(path)):
            yield name, info["size"]
            continue
        target = os.path.realpath(path)
        if any(_is_below(target, other) for other in walked):
            log.warning("left out %s: it links to %s, which is read already", path, target)
            continue
        if inner := [other for other in walked if _is_below(other, target)]:
            raise DataError(
                f"{path} links to {target}, of which {inner[0]} is read already; remove one of the "
                "two."
            )
        walked.append(target)
        yield from _walk(system, root, path, walked)


def _find(system: Any, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Files below a folder and what is known of each; links are not followed.

    Raises what the file system raises, where its own `find` takes a folder that has an error for
    an empty one. Those of a disk that are another user's, such as lost+found, are left out.
    """
    if isinstance(system, AsyncFileSystem) and type(system)._find is not AsyncFileSystem._find:
        # an object store: it has no folders, and lists all objects at once
        yield from system.find(folder, detail=True).items()
        return
    try:
        listing = system.ls(folder, detail=True)
    except PermissionError as error:
        # of a store it says that keys are wrong
        if not isinstance(system, LocalFileSystem):
            raise
        log.warning("left out %s: %s", folder, error.strerror or error)
        return
    for info in listing:
        path = info["name"].rstrip("/")
        if info["type"] != "directory" or path == folder:
            yield path, info
        elif not _is_hidden(path.rsplit("/", maxsplit=1)[-1]):
            yield from _find(system, path)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _check_names(config: DataConfig, files: Iterable[str]) -> None:
    """Ids of documents are UTF-8, and have the file's name in them."""
    for path in files:
        try:
            path.encode()
        except UnicodeEncodeError:
            if reader_of(path):
                raise DataError(
                    f"data.root={config.root}: the name {path!r} is not UTF-8; rename the file."
                ) from None


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(glob_translate(pattern))
    except (ValueError, re.error) as error:
        raise ConfigError(f"The glob {pattern} of data is none: {error}.") from error


def _is_hidden(path: str) -> bool:
    return any(name.startswith(".") for name in path.split("/"))


def _matching(name: str, config: DataConfig, files: dict[str, int]) -> dict[str, int]:
    """The files of a source that is written down.

    A glob that ends in `*` asks for whatever text there is; one that says more must match text.
    """
    source, ignored, matched = config.sources[name], 0, {}
    for pattern in source.paths:
        for path in filter(_compile(pattern).match, files):
            if reader_of(path) is not None:
                matched[path] = files[path]
            elif pattern.endswith("/*") or pattern.endswith("/**"):
                ignored += 1
            else:
                raise DataError(
                    f"data.sources.{name}: {pattern} matches {path}, which is none of "
                    f"{', '.join(READERS)}; narrow the glob."
                )
    if not matched:
        raise DataError(
            f"data.sources.{name}: no file of {', '.join(READERS)} below {config.root} matches "
            f"{source.paths}; correct the globs, or remove the source."
        )
    _warn_of_ignored(ignored, f"data.sources.{name}")
    return matched


def _check_disjoint(sizes: dict[str, dict[str, int]]) -> None:
    """A file of two sources would be trained on twice, and be held out of only one of them."""
    owners: dict[str, str] = {}
    for name, paths in sizes.items():
        for path in paths:
            owner = owners.setdefault(path, name)
            if owner != name:
                raise DataError(
                    f"data.sources: {path} belongs to {owner} and to {name}; narrow the globs so "
                    "that every file has one source."
                )


def _by_folder(config: DataConfig, files: dict[str, int]) -> dict[str, dict[str, int]]:
    """Every folder directly below the root as a source; files beside them make one more."""
    sizes: dict[str, dict[str, int]] = {}
    ignored = 0
    for path, size in files.items():
        folder, slash, _ = path.partition("/")
        if reader_of(path) is None:
            ignored += 1
        else:
            sizes.setdefault(folder if slash else config.name, {})[path] = size
    if not sizes:
        raise DataError(
            f"data.root={config.root} holds no text: none of its {len(files)} files is one of "
            f"{', '.join(READERS)}."
        )
    _warn_of_ignored(ignored, f"data.root={config.root}")
    return sizes


def _warn_of_ignored(count: int, where: str) -> None:
    if count:
        log.warning("%s: ignored %d files that are none of %s", where, count, ", ".join(READERS))
