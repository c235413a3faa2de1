"""How fast rows are read: our stream beside plain webdataset with one row per member.

Both read the same rows from a warm page cache, in one process, in turns; ours in the shuffled
order of a run, verified against its checksums. What counts is the ratio of the two, in one run.

    make bench        # or: python kernels/benchmarks/loader.py
"""

import dataclasses
import hashlib
import http.server
import io
import logging
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset

from measurements import RESULTS, append, check_writable, commit
from pretrain import __version__
from pretrain.data.config import Corpus, DataConfig
from pretrain.data.loader import stream_batches
from pretrain.data.manifest import (
    MANIFEST_FILE,
    Manifest,
    ShardManifest,
    SourceManifest,
    TokenizerManifest,
)
from pretrain.data.pack import Rows, pack
from pretrain.data.special_ids import special_ids
from pretrain.data.write import Packing, write_shard

VOCABULARY_SIZE = 65_536
CONTEXT = 4096
ROWS_PER_STEP = 8
SHARDS, MEMBERS_PER_SHARD, ROWS_PER_MEMBER = 4, 8, 64
REPEATS = 15
TABLE, NEEDS = RESULTS / "loader.csv", RESULTS / "loader-needs.csv"
NEEDED = (
    ("huginn-3.5b", 4_800, "the boldest goal of the step on one H200"),
    ("huginn-100m", 100_000, "four times what the plain path does on one H200"),
)


OTHERS = (
    "pretrain stream_batches, cold cache",
    "webdataset, a row per member, cold cache",
    "pretrain stream_batches, over HTTP",
    "pretrain stream_batches, copies of HTTP",
)


class Quantiles(NamedTuple):
    """Of the repeats."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> "Quantiles":
        """Of these values."""
        return cls(*np.quantile(values, [0.2, 0.5, 0.8]).tolist())


def packed_rows() -> Rows:
    """Rows of random documents, whose lengths spread over four orders of magnitude."""
    random = np.random.default_rng(0)
    special = special_ids(VOCABULARY_SIZE)
    wanted = SHARDS * MEMBERS_PER_SHARD * ROWS_PER_MEMBER
    lengths = np.exp(random.normal(6.5, 1.2, size=4 * wanted)).astype(np.int64) + 3
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), 1.1 * wanted * (CONTEXT + 1)))]
    tokens = random.integers(0, special.begin_text, size=int(lengths.sum()), dtype=np.uint16)
    ends = np.cumsum(lengths)
    tokens[ends - lengths], tokens[ends - 1] = special.begin_text, special.end_text
    rows = pack(tokens, lengths, CONTEXT + 1, special.pad)
    assert len(rows.pieces) >= wanted, f"{len(rows.pieces)} rows packed, {wanted} wanted"
    return rows.slice(0, wanted)


def write_ours(folder: Path, rows: Rows) -> DataConfig:
    """Shards and manifest as `pretrain data build` writes them."""
    packing = Packing(
        row_tokens=CONTEXT + 1,
        pad=special_ids(VOCABULARY_SIZE).pad,
        pack_tokens=1,
        rows_per_member=ROWS_PER_MEMBER,
        members_per_shard=MEMBERS_PER_SHARD,
    )
    shards: list[ShardManifest] = []
    for number in range(SHARDS):
        of_shard = rows.slice(number * packing.shard_rows, (number + 1) * packing.shard_rows)
        name = f"random/train-{number:06d}.tar"
        shards.append(write_shard(folder / name, name, of_shard, packing))
    source = SourceManifest(
        name="random", licence="", provenance="", weight=None, corpus_sha256="", train=shards,
        valid=[],
    )  # fmt: skip
    special = special_ids(VOCABULARY_SIZE)._asdict()
    manifest = Manifest(
        tool=f"pretrain {__version__}",
        context=CONTEXT,
        dtype="uint16",
        rows_per_member=ROWS_PER_MEMBER,
        tokenizer=TokenizerManifest(sha256="", vocabulary_size=VOCABULARY_SIZE, special=special),
        settings={},
        sources=[source],
    )
    (folder / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    return DataConfig(
        name="random", corpus=Corpus.files, root="unused", shards=str(folder), context=CONTEXT,
        loader_workers=0,
    )  # fmt: skip


def write_plain(folder: Path, rows: Rows) -> list[str]:
    """Tars with one row per member, as most webdatasets of text are."""
    folder.mkdir()
    paths = []
    for number, tokens in enumerate(np.array_split(rows.tokens, SHARDS)):
        paths.append(str(folder / f"{number:06d}.tar"))
        with webdataset.TarWriter(paths[-1]) as tar:
            for row, values in enumerate(tokens):
                stream = io.BytesIO()
                np.save(stream, values)
                tar.write({"__key__": f"{row:08d}", "tokens.npy": stream.getvalue()})
    return paths


def read_ours(config: DataConfig, rows: int) -> Iterator[torch.Tensor]:
    """One epoch of the run's stream."""
    stream = stream_batches(
        config, seed=0, first_row=0, rows_per_step=ROWS_PER_STEP, rank=0, ranks=1
    )
    with closing(stream):  # type: ignore[type-var]
        for _ in range(rows // ROWS_PER_STEP):
            yield next(stream).tokens_BS


def read_plain(paths: list[str], rows: int) -> Iterator[torch.Tensor]:
    """The same rows by webdataset's own sources and stages, not shuffled, not verified."""
    yield from (
        webdataset.WebDataset(paths, shardshuffle=False)
        .decode()
        .map(lambda sample: torch.from_numpy(sample["tokens.npy"].astype(np.int64)))
        .batched(ROWS_PER_STEP, collation_fn=torch.stack, partial=False)
    )


def row_hashes(batches: Iterator[torch.Tensor]) -> list[bytes]:
    """A hash of each row, sorted."""
    return sorted(
        hashlib.sha256(row.numpy().tobytes()).digest() for batch in batches for row in batch
    )


def time_us_per_row(read: Callable[[], Iterator[torch.Tensor]], rows: int) -> float:
    """Microseconds per row of reading all of them."""
    started = time.perf_counter()
    read_rows = sum(len(batch) for batch in read())
    passed_s = time.perf_counter() - started
    assert read_rows == rows, f"{read_rows} rows read, {rows} wanted"
    return passed_s / rows * 1e6


def forget(folder: Path) -> None:
    """Ask the kernel to drop the files of a folder from its page cache."""
    for path in folder.rglob("*.tar"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URL of a folder, for as long as it is needed."""
    handler = partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            # else an interrupted program waits for this thread, which asks a closed socket for ever
            server.shutdown()
            thread.join()


def time_http(config: DataConfig, folder: Path, rows: int) -> tuple[float, float]:
    """Microseconds per row of a first pass over HTTP, copies made, and of a second one."""
    with served(Path(config.shards)) as url:
        shutil.rmtree(folder, ignore_errors=True)
        remote = dataclasses.replace(config, shards=url, cache=str(folder))
        first, second = (time_us_per_row(lambda: read_ours(remote, rows), rows) for _ in range(2))
    return first, second


def print_needs(us_per_row: float) -> None:
    """What presets need of a loader process beside what one delivers here, in tokens/s."""
    delivered = CONTEXT / us_per_row * 1e6
    for preset, needed, why in NEEDED:
        times = delivered / needed
        append(NEEDS, {
            "preset": preset, "needed_tokens_per_s": needed,
            "delivered_tokens_per_s": f"{delivered:.0f}", "times": f"{times:.0f}", "why": why,
            "commit": commit(),
        })  # fmt: skip
        print(f"{preset}: needs {needed:,} tokens/s of a rank ({why}); {times:,.0f} times that")


def environment() -> dict[str, str]:
    """What a measurement depends on besides the code."""
    return {
        "cpu": f"{platform.machine()} x{os.cpu_count()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "webdataset": webdataset.__version__,
        "commit": commit(),
    }


def append_rows(measured: dict[str, list[float]]) -> None:
    """One row for each reader, with its ratio to webdataset from the page cache in the same run.

    Times alone say little on a CPU.
    """
    plain = list(measured.values())[1]
    for op, times_us in measured.items():
        times = Quantiles.of(times_us)
        ratio = Quantiles.of([b / a for a, b in zip(times_us, plain, strict=True)])
        row = {
            "op": op,
            "shape": f"{ROWS_PER_STEP}x{CONTEXT + 1}",
            "dtype": "uint16 to int64",
            "median_us": f"{times.median:.2f}",
            "p20": f"{times.p20:.2f}",
            "p80": f"{times.p80:.2f}",
            "rows_per_s": f"{1e6 / times.median:.0f}",
            "ratio": f"{ratio.median:.3f}",
            "ratio_p20": f"{ratio.p20:.3f}",
            "ratio_p80": f"{ratio.p80:.3f}",
        }
        append(TABLE, row | environment())


def main() -> None:
    """Check, measure in turns, print the ratio and keep it."""
    logging.basicConfig(level=logging.WARNING)
    check_writable(TABLE, NEEDS)
    torch.set_num_threads(1)
    packed = packed_rows()
    rows = len(packed.pieces)
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        config = write_ours(Path(folder, "ours"), packed)
        paths = write_plain(Path(folder, "plain"), packed)
        readers: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
            "pretrain stream_batches": lambda: read_ours(config, rows),
            "webdataset, a row per member": lambda: read_plain(paths, rows),
        }
        # the gate; it also brings every file into the page cache
        expected = row_hashes(iter([torch.from_numpy(packed.tokens.astype(np.int64))]))
        for op, read in readers.items():
            if row_hashes(read()) != expected:
                raise SystemExit(f"{op} does not read the rows that were packed; nothing measured.")
        measured: dict[str, list[float]] = {op: [] for op in readers}
        for op in OTHERS:
            measured[op] = []
        for repeat in range(REPEATS):
            # neither is always the one that goes first
            for op in list(readers)[:: 1 if repeat % 2 else -1]:
                measured[op].append(time_us_per_row(readers[op], rows))
            for op, (name, read) in zip(OTHERS, readers.items(), strict=False):
                assert name.split(",")[0] in op, (name, op)
                forget(Path(folder))
                measured[op].append(time_us_per_row(read, rows))
            times = time_http(config, Path(folder, "copies"), rows)
            for op, us_per_row in zip(OTHERS[2:], times, strict=True):
                measured[op].append(us_per_row)
    ours, plain, *_ = measured.values()
    ratio = Quantiles.of([b / a for a, b in zip(ours, plain, strict=True)])
    append_rows(measured)
    print_needs(Quantiles.of(ours).median)
    for op, times_us in measured.items():
        of_op = Quantiles.of([b / a for a, b in zip(times_us, plain, strict=True)])
        print(f"{op}: {of_op.median:.2f} times the rows/s of webdataset from the page cache")
    print(
        f"stream_batches reads {ratio.median:.2f} times as many rows/s as webdataset with a row "
        f"per member (p20 {ratio.p20:.2f}, p80 {ratio.p80:.2f}, {REPEATS} repeats of {rows} rows)"
    )
    print(f"appended to {os.path.relpath(TABLE)}")


if __name__ == "__main__":
    main()
