"""Batches of rows for one rank, in the order of the run, from any global row on.

A webdataset pipeline: the source stage is ours and yields verified rows in order; decoding and
batching are webdataset's stages. Worker w of W makes the steps w, w + W, ..., which WebLoader
takes in turn, so the stream does not depend on the number of workers.
"""

# B rows  S tokens in a stored row, context + 1
import logging
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from pretrain.data.config import DataConfig
from pretrain.data.manifest import Manifest
from pretrain.data.mixture import apportion
from pretrain.data.order import Order, SourceOrder
from pretrain.data.prefetch import Prefetch
from pretrain.data.shards import RowBytes
from pretrain.data.store import (
    ShardStore,
    check_tokenizer,
    open_manifest,
    source_weights,
    train_order,
)
from pretrain.errors import ConfigError, DataError, PretrainError

__all__ = ["Batch", "check_tokenizer", "open_manifest", "stream_batches", "valid_rows"]

log = logging.getLogger(__name__)

# rows whose addresses are computed at once: the arithmetic is vectorised
ADDRESSED_ROWS = 1024
VALID_SEED = 0

Ints = npt.NDArray[np.int64]

Sample = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's rows of one step, on the CPU."""

    first_row: int
    """Global row of the first."""
    tokens_BS: torch.Tensor
    """int64 [rows, context + 1]"""
    documents_BS: torch.Tensor
    """int64 [rows, context + 1] number of the piece of a document inside the row, -1: padding"""
    lost: tuple[tuple[int, str], ...] = ()
    """Global row and member of each row that was damaged and is padding now."""


class StoredRows(NamedTuple):
    """A batch as workers send it: small, and without torch's shared memory."""

    first_row: int
    tokens: npt.NDArray[np.unsignedinteger]
    lengths: list[npt.NDArray[np.uint32]]
    lost: list[tuple[int, str]]


class Steps(NamedTuple):
    """Which rows a rank takes: of every step its own contiguous slice."""

    first_row: int
    rows_per_step: int
    rank: int
    ranks: int

    @property
    def rows(self) -> int:
        """Rows of one rank in one step."""
        return self.rows_per_step // self.ranks

    def first_rows(self, worker: int, workers: int) -> Iterator[int]:
        """The first global row of this rank in each step of a worker, without end."""
        start = self.first_row + self.rank * self.rows
        step = worker
        while True:
            yield start + step * self.rows_per_step
            step += workers


class RowStream(IterableDataset[Sample]):
    """The source stage: the rows of a rank, read and verified, as webdataset samples."""

    def __init__(self, store: ShardStore, order: Order, steps: Steps, padding: bytes) -> None:
        """`padding`: the tokens of a row that is lost."""
        super().__init__()
        self._store, self._order, self._steps = store, order, steps
        self._padding = padding

    def __iter__(self) -> Iterator[Sample]:
        """Samples with the keys __key__, __url__, row, tokens, lengths, lost.

        tokens and lengths are bytes; lost is the member of a damaged row, else empty.
        """
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first_rows = self._steps.first_rows(worker, workers)
        with Prefetch(self._store) as prefetch:
            coming = self._addresses(first_rows)
            while True:
                rows, addresses = coming
                coming = self._addresses(first_rows)
                prefetch.want(coming[1])
                for row, address in zip(rows.tolist(), addresses.tolist(), strict=True):
                    yield self._sample(row, *address)

    def _addresses(self, first_rows: Iterator[int]) -> tuple[Ints, Ints]:
        """The next rows of this rank, and where each is stored: [rows, 4]."""
        steps_at_once = -(-ADDRESSED_ROWS // self._steps.rows)
        starts = np.array([next(first_rows) for _ in range(steps_at_once)])
        rows = (starts[:, None] + np.arange(self._steps.rows)).reshape(-1)
        return rows, np.stack(self._order.addresses(rows), axis=1)

    def _sample(self, global_row: int, source: int, epoch: int, shard: int, row: int) -> Sample:
        stored = self._store.read_or_quarantine(source, shard, row)
        lost = stored if isinstance(stored, str) else ""
        if isinstance(stored, str):
            stored = RowBytes(self._padding, b"")
        name = self._store.name(source, shard)
        return {
            "__key__": f"{name}/{row}/{epoch}",
            "__url__": name,
            "row": global_row,
            "tokens": stored.tokens,
            "lengths": stored.lengths,
            "lost": lost,
        }


def stream_batches(
    config: DataConfig, *, seed: int, first_row: int, rows_per_step: int, rank: int, ranks: int
) -> Iterator[Batch]:
    """This rank's rows of the steps that begin at first_row, first_row + rows_per_step, ...

    Endless: sources begin a new epoch when they end. A generator: close() ends its workers.
    Raises ConfigError if ranks do not divide the rows of a step, DataError for missing shards;
    DataError comes while reading, too, if a shard is damaged.
    """
    if rows_per_step % ranks:
        raise ConfigError(
            f"The {rows_per_step} rows of a step cannot be dealt to {ranks} ranks; choose a "
            "batch.global_tokens whose rows the number of ranks divides."
        )
    manifest = open_manifest(config)
    store = ShardStore(config, manifest, "train")
    steps = Steps(first_row, rows_per_step, rank, ranks)
    pad = np.array(manifest.tokenizer.special["pad"], dtype=manifest.dtype)
    padding = np.tile(pad, manifest.context + 1).tobytes()
    rows = RowStream(store, train_order(config, manifest, seed), steps, padding)
    pipeline = wds.DataPipeline(
        rows,
        wds.map(_Decode(manifest)),
        wds.batched(steps.rows, collation_fn=_collate, partial=False),
        _carry_errors,
    )
    return _deliver(pipeline, store, config.loader_workers)


def _deliver(pipeline: Any, store: ShardStore, workers: int) -> Iterator[Batch]:
    loader = pipeline
    if workers:
        # fork: workers start at once and share the manifest; they use neither torch nor CUDA
        loader = wds.WebLoader(
            pipeline,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            multiprocessing_context="fork",
            worker_init_fn=_leave_signals_to_the_parent,
        )
    try:
        for item in loader:
            if isinstance(item, PretrainError):
                raise item
            yield _batch(item)
    finally:
        store.close()


def _as_it_is(item: Any) -> Any:
    return item


def _carry_errors(batches: Iterable[StoredRows]) -> Iterator[StoredRows | PretrainError]:
    """A worker's error as a value: torch would bury its message in a traceback."""
    try:
        yield from batches
    except PretrainError as error:
        yield error


class _Decode:
    """The map stage: bytes to arrays."""

    def __init__(self, manifest: Manifest) -> None:
        self._dtype = manifest.dtype

    def __call__(self, sample: Sample) -> Sample:
        lengths = np.frombuffer(sample["lengths"], dtype=np.uint32)
        return {
            **sample,
            "tokens": np.frombuffer(sample["tokens"], dtype=self._dtype),
            "lengths": lengths[lengths > 0],
        }


def _collate(samples: list[Sample]) -> StoredRows:
    return StoredRows(
        samples[0]["row"],
        np.stack([sample["tokens"] for sample in samples]),
        [sample["lengths"] for sample in samples],
        [(sample["row"], sample["lost"]) for sample in samples if sample["lost"]],
    )


def _batch(stored: StoredRows) -> Batch:
    tokens = stored.tokens.astype(np.int64)
    documents = np.full(tokens.shape, -1, dtype=np.int64)
    for row, lengths in zip(documents, stored.lengths, strict=True):
        row[: lengths.sum()] = np.repeat(np.arange(len(lengths)), lengths)
    return Batch(
        stored.first_row,
        torch.from_numpy(tokens),
        torch.from_numpy(documents),
        tuple(stored.lost),
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    """SLURM signals every process of a step; only training decides when its workers end.

    They end with their parent: the DataLoader's worker loop watches for it.
    """
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def valid_rows(config: DataConfig, *, rows: int, rank: int, ranks: int) -> Batch:
    """This rank's contiguous slice, maybe empty, of the same held-out rows in every run.

    Sources have their share of the mixture as far as they have rows. If all have fewer rows than
    asked, those are all, and rank 0 says so. Raises DataError if nothing is held out.
    """
    manifest = open_manifest(config)
    chosen = _choose_valid(config, manifest, rows)
    if len(chosen) < rows and rank == 0:
        log.warning(
            "only %d rows are held out, of %d asked for. For more, raise data.valid_fraction or "
            "add data.valid_paths, and build again under another data.shards.",
            len(chosen),
            rows,
        )
    start, stop = len(chosen) * rank // ranks, len(chosen) * (rank + 1) // ranks
    store = ShardStore(config, manifest, "valid")
    decode = _Decode(manifest)
    read = [store.read(*place) for place in chosen[start:stop]]
    store.close()
    if not read:
        empty = np.zeros((0, manifest.context + 1), dtype=manifest.dtype)
        return _batch(StoredRows(start, empty, [], []))
    samples = [decode({"row": start, "lost": "", **stored._asdict()}) for stored in read]
    return _batch(_collate(samples))


def _choose_valid(config: DataConfig, manifest: Manifest, rows: int) -> list[tuple[int, int, int]]:
    """Source, shard and row of the held-out rows, source by source."""
    held_out = [source.totals("valid").rows for source in manifest.sources]
    weights = list(source_weights(config, manifest).values())
    weights = [weight if held else 0.0 for weight, held in zip(weights, held_out, strict=True)]
    if not any(weights):
        raise DataError(
            f"The shards at {config.shards} hold out no rows for validation; raise "
            "data.valid_fraction, or name files in data.valid_paths, and build again under "
            "another data.shards."
        )
    chosen = []
    for number, count in enumerate(_within(held_out, weights, rows)):
        if not count:
            continue
        source = manifest.sources[number]
        order = SourceOrder(
            source.name,
            [shard.rows for shard in source.valid],
            seed=VALID_SEED,
            window_shards=len(source.valid),
        )
        _, shards, places = order.place(np.arange(count))
        chosen += [(number, int(s), int(p)) for s, p in zip(shards, places, strict=True)]
    return chosen


def _within(held_out: list[int], weights: list[float], rows: int) -> list[int]:
    """Rows of each source: by weight, what one lacks goes to those that have more."""
    counts = [0] * len(held_out)
    while missing := rows - sum(counts):
        left = [w if c < h else 0.0 for w, c, h in zip(weights, counts, held_out, strict=True)]
        if not any(left):
            break
        # fewer rows than sources: the heaviest get one each
        heaviest = sorted(range(len(left)), key=lambda i: -left[i])[:missing]
        more = apportion([w if i in heaviest else 0.0 for i, w in enumerate(left)], missing)
        counts = [min(c + m, h) for c, m, h in zip(counts, more, held_out, strict=True)]
    return counts
