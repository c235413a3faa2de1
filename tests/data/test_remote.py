"""Shards in an S3-compatible object store, and shards that are fetched before they are needed."""

import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from conftest import SMALL, run_cli
from pretrain.data import cache, loader
from pretrain.data.cache import read_remote
from pretrain.data.config import Corpus, DataConfig
from pretrain.data.loader import stream_batches
from pretrain.data.manifest import read_manifest
from pretrain.data.sources import find_parts
from pretrain.data.store import open_manifest
from pretrain.data.verify import verify
from pretrain.errors import DamageError, DataError, UnreachableError

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret"}


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """An S3 server on this machine; the environment that leads to it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                   "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield environment
    server.stop()


def upload(folder: Path, bucket: str) -> str:
    """Copy a folder of shards into a new bucket; its URL."""
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    store.mkdir(bucket)
    store.put(f"{folder}/", f"{bucket}/shards/", recursive=True)
    return f"s3://{bucket}/shards"


def rows(config, steps: int = 20) -> list[list[list[int]]]:
    stream = stream_batches(config, seed=3, first_row=4, rows_per_step=4, rank=0, ranks=1)
    read = [batch.tokens_BS.tolist() for batch in islice(stream, steps)]
    stream.close()
    return read


def test_rows_from_an_object_store_are_those_of_the_folder(make_shards, object_store) -> None:
    config = make_shards({"a": (60, 0.6), "b": (60, 0.4)})
    local = rows(config)
    config.shards = upload(Path(config.shards), "rows")
    assert rows(config) == local
    config.loader_workers = 2
    assert rows(config) == local
    assert verify(config, open_manifest(config)) == []


def test_an_object_store_that_goes_away_may_come_back(make_shards) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            patch.setenv(name, value)
        # fsspec would go on with the server of another test
        s3fs.S3FileSystem.clear_instance_cache()
        config = make_shards({"a": (20, None)})
        config.shards = upload(Path(config.shards), "gone")
        open_manifest(config)
        server.stop()
        patch.setattr(cache, "ATTEMPTS", 1)
        with pytest.raises(UnreachableError, match="could not be copied in 1 attempts"):
            open_manifest(config)


def test_a_run_trains_from_an_object_store(workspace: Path, tmp_path: Path, object_store) -> None:
    (manifest,) = (workspace / "out/data").rglob("manifest.json")
    url = upload(manifest.parent, "train")
    here = [f"data.cache={tmp_path}/cache", f"data.shards={url}"]
    done = run_cli(workspace, "train", *SMALL, *here, "run.name=from-s3", **object_store)
    assert done.returncode == 0, done.stderr
    done = run_cli(workspace, "train", *SMALL, "run.name=from-folder")
    assert done.returncode == 0, done.stderr

    def final(name: str) -> list[str]:
        folder = workspace / f"out/runs/{name}/checkpoints/step-0000000006"
        return [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("rank-*"))]

    assert final("from-s3") == final("from-folder")


class RefusingStore(http.server.SimpleHTTPRequestHandler):
    """A folder as buckets; says what it is told to say, as S3 does, before it gives anything."""

    def do_GET(self) -> None:
        self.server.requested.append(self.command)  # type: ignore[attr-defined]
        refusals = self.server.refusals  # type: ignore[attr-defined]
        refusal = refusals.pop(0) if refusals else None
        if refusal is None:
            (super().do_GET if self.command == "GET" else super().do_HEAD)()
            return
        status, code = refusal
        body = f"<Error><Code>{code}</Code><Message>words of it</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A server of the bucket `rows` with a manifest.json, and the environment that leads to it."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/manifest.json").write_bytes(b"all of it")
    handler = partial(RefusingStore, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.requested, server.refusals = [], []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        # ours are the only attempts
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint, "AWS_MAX_ATTEMPTS": "1"}.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
        server.shutdown()
        thread.join()


MANIFEST = "s3://rows/manifest.json"


@pytest.mark.parametrize(
    ("status", "code", "kind", "said"),
    [
        (401, "Unauthorized", DataError, "the server says 401 Unauthorized; check data.shards"),
        (403, "InvalidAccessKeyId", DataError, "the server says 403 Forbidden; check data.shards"),
        (400, "InvalidArgument", DataError, "the server says 400 Bad Request; check data.shards"),
        (404, "NoSuchBucket", DamageError, "the server says 404 NoSuchBucket: words of it; check"),
    ],
)
def test_what_a_store_refuses_for_good_is_said_at_once(
    refusing, caplog, status: int, code: str, kind: type[DataError], said: str
) -> None:
    refusing.refusals = [(status, code)] * 100
    with pytest.raises(DataError, match=said) as caught:
        read_remote(MANIFEST, retry_wait_s=0.01)
    assert (caught.type, caught.value.is_final) == (kind, True)
    assert "attempt 1 of" not in caplog.text
    # its client asks twice where it is in doubt about the region or the kind of a thing
    assert len(refusing.requested) <= 2


@pytest.mark.parametrize(
    ("status", "code"),
    [(429, "TooManyRequests"), (500, "InternalError"), (503, "SlowDown"), (409, "Conflict")],
)
def test_what_a_store_refuses_for_now_is_asked_again(refusing, caplog, status, code) -> None:
    refusing.refusals = [(status, code)] * 2
    assert read_remote(MANIFEST, retry_wait_s=0.01) == b"all of it"
    assert [line for line in caplog.text.splitlines() if "attempt 2 of" in line]
    assert refusing.requested == ["HEAD"] * 3 + ["GET"]


def test_a_store_that_grew_tired_is_asked_again(refusing, caplog) -> None:
    """Its status is 400, its name one that the client knows for a timeout."""
    # by no object of that name the client is led to list what begins with it
    refusing.refusals = [(404, "NoSuchKey"), (400, "RequestTimeout")]
    assert read_remote(MANIFEST, retry_wait_s=0.01) == b"all of it"
    assert "TimeoutError: " in caplog.text
    assert "attempt 1 of 5" in caplog.text
    assert refusing.requested == ["HEAD", "GET", "HEAD", "GET"]


@pytest.mark.parametrize(
    ("url", "settings", "said"),
    [
        ("s3://No Bucket/x", {}, "ParamValidationError: .*\nInvalid bucket name"),
        (MANIFEST, {"AWS_ENDPOINT_URL": "nowhere"}, "ValueError: Invalid endpoint: nowhere"),
        (MANIFEST, {"AWS_PROFILE": "nobody"}, r"ProfileNotFound: The config profile \(nobody\)"),
        ("http://127.0.0.1:port/x", {}, "InvalidURL: nonnumeric port: 'port'"),
    ],
)
def test_what_cannot_be_asked_for_is_said_at_once(
    refusing, caplog, monkeypatch, url: str, settings: dict[str, str], said: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match=f"cannot be asked for: {said}") as caught:
        read_remote(url, retry_wait_s=0.01)
    assert caught.type is DataError
    assert "attempt 1 of" not in caplog.text
    assert refusing.requested == []


@pytest.mark.parametrize(
    ("status", "endpoint", "said"),
    [
        (403, None, "PermissionError: words of it"),
        (503, None, r"OSError: \[Errno 16\] words of it"),
        (200, "http://127.0.0.1:9", "EndpointConnectionError: "),
        (200, "nowhere", "ValueError: Invalid endpoint: nowhere"),
    ],
)
def test_text_in_a_store_that_does_not_give_it_is_no_bug_of_ours(
    refusing, monkeypatch, status: int, endpoint: str | None, said: str
) -> None:
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    refusing.refusals = [(status, {403: "AccessDenied", 503: "SlowDown"}.get(status, ""))] * 100
    config = DataConfig(
        name="mine", corpus=Corpus.files, root="s3://rows/text", shards="unused", context=8
    )
    with pytest.raises(DataError, match=rf"data\.root=s3://rows/text cannot be listed \({said}"):
        find_parts(config)


def test_keys_that_are_missing_may_come_and_are_named(refusing, caplog, monkeypatch) -> None:
    """A node that has them from a service of its cloud gets none while that is overrun."""
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    with pytest.raises(
        UnreachableError, match=r"NoCredentialsError: Unable to .* this node's keys"
    ):
        read_remote(MANIFEST, retry_wait_s=0.01)
    assert "attempt 5 of 5" in caplog.text


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and remembers what was asked for."""

    def do_GET(self) -> None:
        self.server.requested.append(self.path)  # type: ignore[attr-defined]
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: str) -> Iterator[http.server.ThreadingHTTPServer]:
    handler = partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.requested = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_shards_are_fetched_before_their_rows_are_read(make_shards, monkeypatch) -> None:
    monkeypatch.setattr(loader, "ADDRESSED_ROWS", 8)
    config = make_shards({"a": (200, 1.0)}, window_shards=1)
    with served(config.shards) as server:
        config.shards = f"http://127.0.0.1:{server.server_port}"
        stream = stream_batches(config, seed=3, first_row=0, rows_per_step=1, rank=0, ranks=1)
        # shards of 12 rows, of which 8 are addressed at once: rows 8 to 15 begin another shard
        next(stream)
        deadline = time.monotonic() + 120
        while len(shards := set(server.requested) - {"/manifest.json"}) < 2:  # type: ignore[attr-defined]
            assert time.monotonic() < deadline, shards
            time.sleep(0.01)
        stream.close()


def test_copies_that_left_the_cache_leave_the_disk(make_shards, monkeypatch) -> None:
    """A file that somebody has open keeps its room when it is removed."""
    monkeypatch.setattr(loader, "ADDRESSED_ROWS", 8)
    config = make_shards({"a": (200, 1.0)}, window_shards=1)
    shards = read_manifest(Path(config.shards)).sources[0].train
    assert len(shards) > 12
    # of rows 8 at hand and 8 to come there are three shards of 12 at most
    config.cache_bytes = 5 * shards[0].bytes
    with served(config.shards) as server:
        config.shards = f"http://127.0.0.1:{server.server_port}"
        stream = stream_batches(config, seed=3, first_row=0, rows_per_step=1, rank=0, ranks=1)
        for _ in range(12 * 12):
            next(stream)
            assert bytes_taken(Path(config.cache)) <= config.cache_bytes
        stream.close()
        copied = [path for path in server.requested if path.endswith(".tar")]  # type: ignore[attr-defined]
    # one that is still needed does not leave, to be asked for again with every row
    assert 12 <= len(set(copied)) <= len(copied) < 2 * len(set(copied))


def bytes_taken(folder: Path) -> int:
    """Bytes of copies in a folder, also of those that are removed but open in this process."""
    sizes: dict[Path, int] = {}
    for path in [*Path("/proc/self/fd").iterdir(), *folder.glob("*.tar")]:
        # the thread that fetches ahead opens and removes, too
        with suppress(FileNotFoundError):
            target = path.readlink() if path.is_symlink() else path
            if target.parent == folder and target.name.endswith((".tar", ".tar (deleted)")):
                sizes[target] = path.stat().st_size
    return sum(sizes.values())
