"""Shards in an S3-compatible object store, and shards that are fetched before they are needed."""

import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from conftest import SMALL, run_cli
from pretrain.data import cache, loader
from pretrain.data.loader import stream_batches
from pretrain.data.store import open_manifest
from pretrain.data.verify import verify
from pretrain.errors import UnreachableError

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


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and remembers what was asked for."""

    def do_GET(self) -> None:
        self.server.requested.append(self.path)  # type: ignore[attr-defined]
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


def test_shards_are_fetched_before_their_rows_are_read(make_shards, monkeypatch) -> None:
    monkeypatch.setattr(loader, "ADDRESSED_ROWS", 8)
    config = make_shards({"a": (200, 1.0)}, window_shards=1)
    handler = partial(Handler, directory=config.shards)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.requested = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        config.shards = f"http://127.0.0.1:{server.server_port}"
        stream = stream_batches(config, seed=3, first_row=0, rows_per_step=1, rank=0, ranks=1)
        # shards of 12 rows, of which 8 are addressed at once: rows 8 to 15 begin another shard
        next(stream)
        deadline = time.monotonic() + 120
        while len(shards := set(server.requested) - {"/manifest.json"}) < 2:  # type: ignore[attr-defined]
            assert time.monotonic() < deadline, shards
            time.sleep(0.01)
        stream.close()
        server.shutdown()
        thread.join()
