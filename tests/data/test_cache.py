"""Remote shards are copied once, whole and verified, by a real HTTP server and real processes."""

import errno
import fcntl
import hashlib
import http.server
import multiprocessing
import os
import tempfile
import threading
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from pretrain.compose import load, thaw, write_frozen
from pretrain.data.cache import ATTEMPTS, ShardCache, folder_here, read_remote
from pretrain.data.config import Corpus, DataConfig, OnDamage
from pretrain.data.loader import stream_batches
from pretrain.errors import ConfigError, DamageError, DataError, UnreachableError


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, counts requests, and fails as often as it is told to."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.requested.append(self.path)
        if server.failures:
            failure = server.failures.pop(0)
            if isinstance(failure, int):
                self.send_error(failure)
                return
            # promise more than is sent, then hang up
            content = Path(self.translate_path(self.path)).read_bytes()
            self.close_connection = True
            if failure == "no http":
                self.wfile.write(b"what?\r\n\r\n")
                return
            self.send_response(200)
            if failure == "cut off in a chunk":
                self.send_header("Transfer-Encoding", "chunked")
                content = b"%x\r\n%b" % (len(content), content)
            else:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:20])
            return
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir(exist_ok=True)
    handler = partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.requested, server.failures = [], []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def publish(tmp_path, name, size=5_000):
    content = hashlib.sha256(name.encode()).digest() * (size // 32)
    (tmp_path / "shards" / name).write_bytes(content)
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def cache_in(tmp_path, capacity=1_000_000):
    return ShardCache(tmp_path / "cache", capacity, retry_wait_s=0.01)


def test_a_shard_is_copied_once_and_served_without_the_server(server, tmp_path):
    expected = publish(tmp_path, "a.tar")
    cache = cache_in(tmp_path)
    path = cache.fetch(f"{server.url}/a.tar", **expected)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == expected["sha256"]
    assert cache.fetch(f"{server.url}/a.tar", **expected) == path
    assert server.requested == ["/a.tar"]


def test_the_same_url_with_another_content_is_another_copy(server, tmp_path):
    cache = cache_in(tmp_path)
    old = cache.fetch(f"{server.url}/a.tar", **publish(tmp_path, "a.tar"))
    new_size = publish(tmp_path, "a.tar", size=6_400)
    new = cache.fetch(f"{server.url}/a.tar", **new_size)
    assert old != new
    assert new.stat().st_size == new_size["size"]


PASSING = [503, 429, "cut off", "cut off in a chunk", "no http"]


@pytest.mark.parametrize("failure", PASSING)
def test_what_may_pass_is_tried_again(server, tmp_path, failure):
    expected = publish(tmp_path, "a.tar")
    server.failures = [failure, failure]
    path = cache_in(tmp_path).fetch(f"{server.url}/a.tar", **expected)
    assert path.stat().st_size == expected["size"]
    assert len(server.requested) == 3


@pytest.mark.parametrize("failure", PASSING)
def test_a_manifest_is_tried_again_too(server, tmp_path, failure):
    (tmp_path / "shards/manifest.json").write_text("{" + " " * 200 + "}")
    server.failures = [failure, failure]
    assert len(read_remote(f"{server.url}/manifest.json", retry_wait_s=0.01)) == 202
    assert len(server.requested) == 3


def test_a_missing_shard_is_damage_and_not_tried_again(server, tmp_path):
    with pytest.raises(DamageError, match="the server says 404"):
        cache_in(tmp_path).fetch(f"{server.url}/no.tar", sha256="0", size=1)
    assert len(server.requested) == 1


def test_what_a_server_forbids_is_neither_damage_nor_tried_again(server, tmp_path):
    server.failures = [403]
    with pytest.raises(DataError, match="the server says 403") as caught:
        cache_in(tmp_path).fetch(f"{server.url}/no.tar", sha256="0", size=1)
    assert (caught.type, len(server.requested)) == (DataError, 1)


def test_a_wrong_content_is_never_published(server, tmp_path):
    expected = publish(tmp_path, "a.tar")
    wrong = "f" * 64
    with pytest.raises(DataError, match=f"in {ATTEMPTS} attempts: received {expected['size']}"):
        cache_in(tmp_path).fetch(f"{server.url}/a.tar", sha256=wrong, size=expected["size"])
    assert [p for p in (tmp_path / "cache").iterdir() if p.name != "locks"] == []


def test_the_least_recently_used_copy_makes_room(server, tmp_path):
    cache = cache_in(tmp_path, capacity=11_000)
    shards = {name: publish(tmp_path, name) for name in ("a.tar", "b.tar", "c.tar")}

    def fetch(name):
        return cache.fetch(f"{server.url}/{name}", **shards[name])

    a, b = fetch("a.tar"), fetch("b.tar")
    os.utime(a, (1, 1))
    os.utime(b, (2, 2))
    assert fetch("a.tar") == a
    c = fetch("c.tar")
    assert (a.exists(), b.exists(), c.exists()) == (True, False, True)


def test_a_copy_that_leaves_as_it_is_asked_for_is_fetched_again(server, tmp_path, monkeypatch):
    """Another process of the node may need its room: it holds another shard's lock."""
    expected, cache = publish(tmp_path, "a.tar"), cache_in(tmp_path)
    path = cache.fetch(f"{server.url}/a.tar", **expected)
    touch = os.utime

    def leave_and_touch(copy):
        copy.unlink()
        touch(copy)

    monkeypatch.setattr(os, "utime", leave_and_touch)
    assert cache.fetch(f"{server.url}/a.tar", **expected).stat().st_size == expected["size"]
    assert path.exists()
    assert len(server.requested) == 2


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.cache=.*/file: Not a directory on "):
        ShardCache(tmp_path / "file", 1_000)


def test_a_folder_without_locks_is_refused(tmp_path, monkeypatch):
    """The answer of a shared file system that is mounted without them."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match=r"cache: Function not implemented on .* has file locks"):
        cache_in(tmp_path)


def test_what_a_killed_download_left_is_cleared_away(server, tmp_path):
    cache = cache_in(tmp_path)
    stale, young = tmp_path / "cache" / "a.part", tmp_path / "cache" / "b.part"
    for path in (stale, young):
        path.write_bytes(b"half")
    os.utime(stale, (1, 1))
    cache.fetch(f"{server.url}/a.tar", **publish(tmp_path, "a.tar"))
    assert (stale.exists(), young.exists()) == (False, True)


def test_a_shard_larger_than_the_cache_is_refused(server, tmp_path):
    expected = publish(tmp_path, "a.tar")
    with pytest.raises(DataError, match=r"4992 bytes, data\.cache_bytes=100"):
        cache_in(tmp_path, capacity=100).fetch(f"{server.url}/a.tar", **expected)


def test_processes_of_a_node_download_once(server, tmp_path):
    expected = publish(tmp_path, "a.tar", size=3_200_000)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    arguments = (tmp_path / "cache", f"{server.url}/a.tar", expected, barrier)
    (tmp_path / "cache").mkdir()
    processes = [context.Process(target=fetch_when_all_are_ready, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * 4
    finally:
        for process in processes:
            process.kill()
    assert server.requested == ["/a.tar"]


def fetch_when_all_are_ready(folder, url, expected, barrier):
    barrier.wait()
    ShardCache(folder, 10_000_000).fetch(url, **expected)


def test_a_run_reads_the_same_rows_through_the_cache(make_shards, server, tmp_path, monkeypatch):
    monkeypatch.setenv("NODE_DISK", str(tmp_path))
    local = make_shards({"a": (60, 0.6), "b": (60, 0.4)})
    remote = DataConfig(
        name="test",
        corpus=Corpus.files,
        root="unused",
        shards=server.url,
        context=local.context,
        window_shards=local.window_shards,
        loader_workers=2,
        sources=local.sources,
        cache="$NODE_DISK/cache",
        # less than all shards: copies leave and come back
        cache_bytes=60_000,
    )

    def rows(config):
        stream = stream_batches(config, seed=3, first_row=5, rows_per_step=4, rank=0, ranks=1)
        read = [batch.tokens_BS.tolist() for batch in islice(stream, 30)]
        stream.close()
        return read

    assert rows(remote) == rows(local)
    copies = list((tmp_path / "cache").glob("*.tar"))
    assert 0 < sum(copy.stat().st_size for copy in copies) <= 60_000


def take(config, steps=12):
    stream = stream_batches(config, seed=3, first_row=0, rows_per_step=4, rank=0, ranks=1)
    read = list(islice(stream, steps))
    stream.close()
    return [batch.tokens_BS.tolist() for batch in read], sum(len(batch.lost) for batch in read)


def spoil(folder):
    for path in folder.rglob("*.tar"):
        content = bytearray(path.read_bytes())
        for at in range(600, len(content), 600):
            content[at] ^= 4
        path.write_bytes(content)


def test_a_copy_that_a_disk_has_damaged_is_made_again(make_shards, server, caplog):
    config = make_shards({"a": (60, None)}, on_damage=OnDamage.quarantine)
    expected = take(config)
    config.shards = server.url
    assert take(config) == expected
    spoil(Path(config.cache))
    asked = len(server.requested)
    assert take(config) == expected
    assert len(set(server.requested[asked:])) == len(server.requested[asked:]) > 1
    assert "is damaged: its CRC32 is" in caplog.text
    assert "copy on this node is removed and made again" in caplog.text


def test_a_shard_that_is_damaged_at_its_origin_is_asked_for_once(make_shards, server, monkeypatch):
    monkeypatch.setattr("pretrain.data.cache.time.sleep", lambda _: None)
    config = make_shards({"a": (60, None)}, on_damage=OnDamage.quarantine)
    spoil(Path(config.shards))
    config.shards = server.url
    assert take(config)[1] == 48
    asked = Counter(path for path in server.requested if path.endswith(".tar"))
    # the thread that fetches ahead may ask at the same time
    assert 0 < max(asked.values()) <= 2 * ATTEMPTS


def test_the_folder_is_that_of_the_node_that_reads(tmp_path, monkeypatch):
    """The login node's TMPDIR is not in what it freezes."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "login"))
    write_frozen(load("train", ["data=huginn-mix"]), tmp_path)
    cache = thaw(tmp_path).data.cache
    (tmp_path / "node").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "node"))
    # what Python has looked up before
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert folder_here(cache) == tmp_path / "node/pretrain-shards"
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert folder_here(cache) == Path(tempfile.gettempdir()) / "pretrain-shards"


@pytest.mark.parametrize(
    ("cache", "said"),
    [("$NO_SUCH_DISK/x", "NO_SUCH_DISK is not set on "), ("/x/$/y", r"\$\$ is a \$")],
)
def test_a_folder_that_means_nothing_on_this_node_is_refused(cache, said):
    with pytest.raises(ConfigError, match=said):
        folder_here(cache)


def test_other_urls_go_through_fsspec(tmp_path):
    (tmp_path / "shards").mkdir()
    expected = publish(tmp_path, "a.tar")
    path = cache_in(tmp_path).fetch(f"file://{tmp_path}/shards/a.tar", **expected)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == expected["sha256"]
    with pytest.raises(DataError, match="does not exist"):
        read_remote(f"file://{tmp_path}/shards/no.tar")
    with pytest.raises(DataError, match="cannot be opened"):
        read_remote("nosuchprotocol://bucket/a.tar")


def test_commands_are_not_run_to_read_data():
    with pytest.raises(ConfigError, match="commands are not run"):
        DataConfig(name="x", corpus=Corpus.files, root="unused", shards="pipe:cat a.tar", context=8)


@pytest.mark.parametrize("name", ["My Texts", "50 %#1?", "caf\u00e9"])
def test_a_source_of_any_name_is_read_from_a_server(make_shards, server, name):
    config = make_shards({name: (60, None)})
    local = next(stream_batches(config, seed=3, first_row=0, rows_per_step=8, rank=0, ranks=1))
    config.shards = server.url
    remote = next(stream_batches(config, seed=3, first_row=0, rows_per_step=8, rank=0, ranks=1))
    assert remote.tokens_BS.tolist() == local.tokens_BS.tolist()


def test_a_server_that_stays_away_says_nothing_about_the_data():
    with pytest.raises(UnreachableError, match=f"in {ATTEMPTS} attempts: URLError") as caught:
        read_remote("http://127.0.0.1:9/manifest.json", retry_wait_s=0.01)
    # the job may queue again
    assert not caught.value.is_final
