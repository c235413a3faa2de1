"""Finding files and reading them: sources, ids, shares, and what is refused."""

import gzip
import http.server
import json
import logging
import os
import pickle
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import fsspec
import pytest

from pretrain.data.config import Corpus, DataConfig, SourceConfig
from pretrain.data.sources import Document, find_parts, read_documents
from pretrain.errors import ConfigError, DataError


def files_config(root: object, **values: object) -> DataConfig:
    return DataConfig(
        name="mine", corpus=Corpus.files, root=str(root), shards="unused", context=8, **values
    )  # type: ignore[arg-type]


def read_all(config: DataConfig) -> dict[str, list[Document]]:
    parts = find_parts(config)
    return {
        name: [document for part in source for document in read_documents(part, config)]
        for name, source in parts.items()
    }


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two folders with text, a README, a hidden folder, and a file beside them."""
    for folder in ("prose/deep", "code", ".git"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "prose/b.txt").write_text("b")
    (tmp_path / "prose/a.txt").write_text("a")
    (tmp_path / "prose/deep/c.txt").write_text("c")
    (tmp_path / ".git/config.txt").write_text("hidden")
    (tmp_path / "README.md").write_text("about")
    rows = [{"text": "x = 1\n"}, {"text": ""}, {"text": "y = 2\n"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "code/d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path


def test_every_folder_below_the_root_is_a_source(corpus: Path) -> None:
    assert read_all(files_config(corpus)) == {
        "code": [
            Document("code/code/d.jsonl.gz#0", "x = 1\n"),
            Document("code/code/d.jsonl.gz#2", "y = 2\n"),
        ],
        "prose": [
            Document("prose/prose/a.txt#0", "a"),
            Document("prose/prose/b.txt#0", "b"),
            Document("prose/prose/deep/c.txt#0", "c"),
        ],
    }


def test_files_beside_the_folders_are_a_source_named_like_the_corpus(corpus: Path) -> None:
    (corpus / "top.txt").write_text("top")
    assert read_all(files_config(corpus))["mine"] == [Document("mine/top.txt#0", "top")]


def test_other_files_are_counted_in_one_warning(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (corpus / "prose/MANIFEST.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        find_parts(files_config(corpus))
    (record,) = caplog.records
    assert "ignored 2 files that are none of .txt" in record.getMessage()


def test_globs_choose_files_and_a_source_has_its_own_text_key(corpus: Path) -> None:
    (corpus / "code/e.jsonl").write_text('{"body": "z"}\n')
    sources = {
        "flat": SourceConfig(paths=["prose/*.txt"]),
        # two globs of one source may meet
        "deep": SourceConfig(paths=["prose/deep/**/*", "prose/deep/c.txt"]),
        "bodies": SourceConfig(paths=["**/*.jsonl"], text_key="body"),
    }
    found = read_all(files_config(corpus, sources=sources))
    texts = {name: [d.text for d in documents] for name, documents in found.items()}
    assert texts == {"bodies": ["z"], "deep": ["c"], "flat": ["a", "b"]}
    assert list(find_parts(files_config(corpus, sources=sources))) == ["bodies", "deep", "flat"]


def test_an_object_store_is_read_like_a_folder() -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/raw/prose/a.txt", b"in memory")
    try:
        assert read_all(files_config("memory://raw")) == {
            "prose": [Document("prose/prose/a.txt#0", "in memory")]
        }
    finally:
        system.rm("/raw", recursive=True)


@pytest.fixture
def web_server(corpus: Path) -> Iterator[str]:
    """The corpus on a server that lists folders as Python's does; its URL."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with served(Handler, corpus) as url:
        yield url


@contextmanager
def served(handler: type[http.server.SimpleHTTPRequestHandler], folder: Path) -> Iterator[str]:
    place = partial(handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), place) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_web_server_is_read_like_a_folder(corpus: Path, web_server: str) -> None:
    assert read_all(files_config(web_server)) == read_all(files_config(corpus))
    sizes, expected = (
        {name: [part.stored_bytes for part in own] for name, own in find_parts(config).items()}
        for config in (files_config(web_server), files_config(corpus))
    )
    assert sizes == expected


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(corpus: Path) -> None:
    """As on a disk or file server that has an error; here, its path is longer than Linux takes."""
    folder = os.open(corpus, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=folder)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(os.open("lost.txt", os.O_CREAT, dir_fd=folder))
    os.close(folder)
    with pytest.raises(
        DataError, match=rf"data\.root={corpus} cannot be listed \(OSError: .*File name"
    ):
        find_parts(files_config(corpus))


def test_a_folder_that_this_user_may_not_list_is_left_out_aloud(
    caplog: pytest.LogCaptureFixture,
) -> None:
    user = os.geteuid()
    # pytest's own folders are for one user
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "lost+found").mkdir(mode=0)
        (root / "prose").mkdir()
        (root / "prose/a.txt").write_text("a")
        root.chmod(0o755)
        try:
            os.seteuid(65534 if user == 0 else user)
            assert list(find_parts(files_config(root))) == ["prose"]
        finally:
            os.seteuid(user)
        (root / "lost+found").chmod(0o700)
    assert f"left out {root}/lost+found: Permission denied" in caplog.text


def test_a_web_server_that_hangs_up_is_not_taken_for_an_empty_one(corpus: Path) -> None:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/prose/":
                super().do_GET()
                return
            # a reset, not an end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

        def log_message(self, *_: object) -> None:
            pass

    with (
        served(Handler, corpus) as url,
        pytest.raises(DataError, match=r"data\.root=http.* cannot be listed \(Client"),
    ):
        find_parts(files_config(url))


def test_links_are_followed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of files and of folders, wherever those lie; hidden ones are not."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "deep").mkdir()
    (elsewhere / "deep/e.txt").write_text("e")
    (elsewhere / "f.txt").write_text("f")
    (corpus / "linked").symlink_to(elsewhere)
    (corpus / ".hidden").symlink_to(elsewhere)
    (corpus / "prose/g.txt").symlink_to(elsewhere / "f.txt")
    found = {name: [d.text for d in own] for name, own in read_all(files_config(corpus)).items()}
    assert found == {"code": ["x = 1\n", "y = 2\n"], "linked": ["e", "f"],
                     "prose": ["a", "b", "c", "f"]}  # fmt: skip


@pytest.mark.parametrize("is_reversed", [False, True])
def test_of_links_to_one_folder_the_first_by_name_is_read(
    corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    is_reversed: bool,
) -> None:
    """In whichever order a disk lists them."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "e.txt").write_text("e")
    for number in range(3):
        (corpus / f"link-{number}").symlink_to(elsewhere)
    scan = os.scandir

    @contextmanager
    def scan_in_order(path: str) -> Iterator[list[os.DirEntry[str]]]:
        with scan(path) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=is_reversed)

    monkeypatch.setattr(os, "scandir", scan_in_order)
    assert sorted(find_parts(files_config(corpus))) == ["code", "link-0", "prose"]


@pytest.mark.parametrize("target", [".", "code", "../{corpus}/prose"])
def test_a_link_to_what_is_read_already_is_left_out_aloud(
    corpus: Path, caplog: pytest.LogCaptureFixture, target: str
) -> None:
    expected = read_all(files_config(corpus))
    (corpus / "prose/deep/link").symlink_to(corpus / target.format(corpus=corpus.name))
    assert read_all(files_config(corpus)) == expected
    assert "prose/deep/link: it links to" in caplog.text


def test_a_link_to_more_than_is_read_already_is_refused(corpus: Path) -> None:
    (corpus / "prose/up").symlink_to(corpus.parent)
    with pytest.raises(DataError, match=r"prose/up links to .*, of which .* is read already"):
        find_parts(files_config(corpus))


def test_a_name_that_is_no_utf8_is_refused_if_it_is_text(corpus: Path) -> None:
    os.close(os.open(os.fsencode(corpus) + b"/caf\xe9.png", os.O_CREAT))
    read_all(files_config(corpus))
    os.close(os.open(os.fsencode(corpus) + b"/caf\xe9.txt", os.O_CREAT))
    with pytest.raises(DataError, match=r"the name 'caf\\udce9\.txt' is not UTF-8; rename"):
        find_parts(files_config(corpus))


def test_a_glob_that_is_none_is_refused(corpus: Path) -> None:
    sources = {"s": SourceConfig(paths=["prose/**b"])}
    with pytest.raises(ConfigError, match=r"The glob prose/\*\*b of data is none: "):
        find_parts(files_config(corpus, sources=sources))
    with pytest.raises(ConfigError, match=r"The glob prose/\*\*b of data is none: "):
        find_parts(files_config(corpus, valid_paths=["prose/**b"]))


def test_a_root_with_glob_characters_in_its_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "a[1]*" / "s").mkdir(parents=True)
    (tmp_path / "a[1]*" / "s" / "t.txt").write_text("t")
    config = files_config(tmp_path / "a[1]*", sources={"s": SourceConfig(paths=["s/*.txt"])})
    assert [d.text for d in read_all(config)["s"]] == ["t"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["poems/**/*"], r"data.sources.s: no file of .txt.* matches \['poems/\*\*/\*'\]"),
        ([], r"data.sources.s: no file .* matches \[\]"),
        (["*.md"], "data.sources.s: \\*.md matches README.md, which is none of .txt"),
    ],
)
def test_a_source_without_text_is_refused(corpus: Path, paths: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_parts(files_config(corpus, sources={"s": SourceConfig(paths=paths)}))


def test_a_file_of_two_sources_is_refused(corpus: Path) -> None:
    # it would be read twice, and held out under one id while it is trained on under the other
    sources = {
        name: SourceConfig(paths=paths)
        for name, paths in {"all": ["**/*"], "deep": ["prose/deep/*"]}.items()
    }
    with pytest.raises(DataError, match=r"prose/deep/c\.txt belongs to all and to deep"):
        find_parts(files_config(corpus, sources=sources))


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(DataError, match=r"data.root=.*missing is no folder"):
        find_parts(files_config(missing))
    (tmp_path / "README.md").write_text("about")
    with pytest.raises(DataError, match=r"none of its 1 files is one of .txt"):
        find_parts(files_config(tmp_path))
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="all its 1 data files are empty"):
        find_parts(files_config(tmp_path))


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(DataError, match=r"data.root=nowhere://raw cannot be opened: .*nowhere"):
        find_parts(files_config("nowhere://raw"))


def test_a_lone_surrogate_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ab\\ud83d"}\n')
    with pytest.raises(DataError, match=r"mine/a.jsonl#0: character 2 is the lone surrogate"):
        read_all(files_config(tmp_path))


def test_a_file_that_vanished_is_named(corpus: Path) -> None:
    config = files_config(corpus)
    part = find_parts(config)["prose"][1]
    (corpus / "prose/b.txt").unlink()
    with pytest.raises(DataError, match=r"prose/b.txt: .*lost a file"):
        list(read_documents(part, config))


def test_a_file_that_cannot_be_read_to_its_end_is_named(corpus: Path, web_server: str) -> None:
    """Python's server gives no ranges, which fsspec wants of files beyond 5 MB."""
    (corpus / "prose/large.txt").write_text("a line\n" * 1_000_000)
    with pytest.raises(DataError, match=r"prose/large.txt cannot be read \(ValueError: The HTTP"):
        read_all(files_config(web_server))


def test_max_bytes_is_shared_by_size_and_ends_each_part(tmp_path: Path) -> None:
    line = json.dumps({"text": "0123456789"}) + "\n"
    (tmp_path / "large.jsonl").write_text(line * 300)
    (tmp_path / "small.jsonl").write_text(line * 100)
    config = files_config(tmp_path, max_bytes=400)
    large, small = find_parts(config)["mine"]
    assert (large.max_bytes, small.max_bytes) == (300, 100)
    assert len(list(read_documents(large, config))) == 30
    assert len(list(read_documents(small, config))) == 10


def test_parts_travel_between_processes(corpus: Path) -> None:
    parts = find_parts(files_config(corpus))
    assert pickle.loads(pickle.dumps(parts)) == parts
    assert [part.index for part in parts["prose"]] == [0, 1, 2]
    assert [part.stored_bytes for part in parts["prose"]] == [1, 1, 1]


def test_files_are_held_out_by_name(corpus: Path) -> None:
    config = files_config(corpus, valid_paths=["prose/deep/*", "**/b.*"])
    held_out = {part.path: part.is_held_out for own in find_parts(config).values() for part in own}
    assert held_out == {
        "code/d.jsonl.gz": False,
        "prose/a.txt": False,
        "prose/b.txt": True,
        "prose/deep/c.txt": True,
    }


def test_a_glob_of_held_out_files_that_matches_none_is_refused(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"valid_paths: \*\.valid matches none of the 4 files"):
        find_parts(files_config(corpus, valid_paths=["prose/**", "*.valid"]))
