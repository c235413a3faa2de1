"""Shards from servers that fail in every way, and shards that are damaged for good."""

import http.server
import json
import shutil
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lives import STEPS, Life, check_same, finish, read_steps, row, some

from pretrain.data import cache

pytestmark = pytest.mark.faults


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; every shard fails in each of the server's ways before it comes."""

    server: Any

    def do_GET(self) -> None:
        self.server.requested[self.path] += 1
        number = self.server.requested[self.path] - 1
        ways = self.server.ways if self.path.endswith(".tar") else []
        if number < len(ways) or ways == ["for ever"]:
            getattr(self, "fail_by_" + (ways[number] if ways != ["for ever"] else "error"))()
        else:
            super().do_GET()

    def fail_by_error(self) -> None:
        self.send_error(503)

    def fail_by_reset(self) -> None:
        self.send_part()
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True

    def fail_by_short(self) -> None:
        """A body shorter than its own Content-Length says."""
        self.send_part()
        self.close_connection = True

    def fail_by_stall(self) -> None:
        self.send_part()
        time.sleep(2.0)
        self.close_connection = True

    def fail_by_other(self) -> None:
        """Something else of the right size, such as a proxy's page."""
        size = Path(self.translate_path(self.path)).stat().st_size
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(b"<html>" + bytes(size - 6))

    def send_part(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 3])
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(workspace: Path) -> Iterator[Any]:
    (manifest,) = (workspace / "out/data").rglob("manifest.json")
    handler = partial(Handler, directory=str(manifest.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.requested, server.ways = Counter(), []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def be_impatient() -> None:
    """Wait less long for a server than a run on a cluster would."""
    cache.TIMEOUT_S = 0.5


def from_url(server: Any, folder: Path) -> list[str]:
    return [
        f"data.shards=http://127.0.0.1:{server.server_port}",
        f"data.cache={folder}/cache",
        "data.loader_workers=0",
    ]


@pytest.mark.parametrize(
    "way", some(["error", "reset", "short", "stall", "other"], ["reset", "short"])
)
@row(
    "a server answers 503, resets, stalls, sends short bodies or other content, then the shard",
    "retried with growing waits, one WARNING each; the run is the same",
)
def test_a_server_that_fails_and_recovers_costs_time_only(
    workspace: Path, whole: Callable[[int], Path], server: Any, tmp_path: Path, way: str
) -> None:
    server.ways = [way]
    run_dir = finish(workspace, f"server-{way}", *from_url(server, tmp_path), before=be_impatient)
    check_same(run_dir, whole(1))
    shards = [count for path, count in server.requested.items() if path.endswith(".tar")]
    assert shards
    assert min(shards) == 2


@row(
    "a server never gives a shard",
    "after five attempts an error with the URL, exit 65; the job queues again and goes on",
)
def test_a_server_that_stays_away_stops_the_run_cleanly(
    workspace: Path, whole: Callable[[int], Path], server: Any, tmp_path: Path
) -> None:
    name, here = "server-gone", from_url(server, tmp_path)
    server.ways = ["for ever"]
    with Life(workspace, name, *here, "validation.rows=8", before=be_impatient) as life:
        assert life.wait() == [65]
        assert "could not be copied in 5 attempts" in life.said()
        assert "Traceback" not in life.said()
    server.ways = []
    check_same(finish(workspace, name, *here), whole(1))


@row(
    "one bit of a shard is wrong for good; data.on_damage=quarantine",
    "its member's rows become padding on every rank, are listed and counted",
    "the rows of that member, by number in quarantine.jsonl",
)
def test_a_run_goes_on_without_a_damaged_member(workspace: Path, tmp_path: Path) -> None:
    (manifest,) = (workspace / "out/data").rglob("manifest.json")
    damaged = tmp_path / "shards"
    shutil.copytree(manifest.parent, damaged)
    for source in ("prose", "sums"):
        path = damaged / source / "train-000000.tar"
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 4
        path.write_bytes(content)
    here = [f"data.shards={damaged}"]
    with Life(workspace, "hurt-error", *here) as life:
        assert life.wait() == [65]
        assert "is damaged: its CRC32 is" in life.said()
    policy = ["data.on_damage=quarantine"]
    runs = [finish(workspace, f"hurt-{n}", *here, *policy, ranks=n) for n in (1, 2)]
    one, two = (sorted((run / "quarantine.jsonl").read_text().splitlines()) for run in runs)
    assert one == two
    lost = len(one)
    assert lost > 0
    records = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss/nats" in record]
    assert [record["data/lost_rows"] for record in steps][-1] == lost
    # the stream is the same, and so are depths and every row that is whole
    columns = [[values[3:] for values in read_steps(run).values()] for run in runs]
    assert columns[0] == columns[1]
    assert len(columns[0]) == STEPS
    with Life(workspace, "hurt-much", *here, *policy, "data.quarantine_rows=1") as life:
        assert life.wait() == [65]
        assert "more than data.quarantine_rows=1" in life.said()
