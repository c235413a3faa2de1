"""One part of the raw text, tokenized into the work folder of a build. Runs in many processes.

A part leaves three files: its tokens end to end, a table of its documents, and, last, a record
which says that the two are whole. Neither torch nor webdataset is imported: workers start fast.
"""

import hashlib
import io
import json
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pretrain.data.config import DataConfig
from pretrain.data.encode import encode_documents
from pretrain.data.sources import Document, Part, read_documents
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import DataError

# characters given to the tokenizer at once: enough to amortise the call, little to hold
BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True, slots=True)
class PartJob:
    """What a worker needs to tokenize one part; `stem` is where its files go."""

    part: Part
    config: DataConfig
    tokenizer_path: str
    dtype: str
    stem: str


@dataclass(frozen=True, slots=True)
class PartRecord:
    """A tokenized part."""

    tokens: int
    documents: int
    text_bytes: int
    corpus_sha256: str
    """Over the ids and texts of its documents, in order."""

    def to_bytes(self) -> bytes:
        """As the record's file has it."""
        return json.dumps(asdict(self)).encode()


class PartFiles:
    """The files of one tokenized part."""

    def __init__(self, stem: str | Path, dtype: str) -> None:
        self.tokens = Path(f"{stem}.tokens")
        self.documents = Path(f"{stem}.documents.npy")
        self.record = Path(f"{stem}.json")
        self._dtype = np.dtype(dtype)

    def read_record(self) -> PartRecord | None:
        """The record, if the part is finished and its files have the sizes they should."""
        try:
            record = PartRecord(**json.loads(self.record.read_bytes()))
            tokens, documents = self.tokens.stat().st_size, self.read_documents()
        except (OSError, ValueError, TypeError):
            return None
        is_whole = tokens == record.tokens * self._dtype.itemsize
        return record if is_whole and len(documents) == record.documents else None

    def read_tokens(self) -> npt.NDArray[np.unsignedinteger]:
        """All tokens of the part, mapped."""
        if not self.tokens.stat().st_size:
            return np.zeros(0, dtype=self._dtype)
        return np.memmap(self.tokens, dtype=self._dtype, mode="r")

    def read_documents(self) -> npt.NDArray[np.int64]:
        """[documents, 2]: tokens, and 1 if the document is held out."""
        table: npt.NDArray[np.int64] = np.load(self.documents, allow_pickle=False)
        return table


def is_held_out(document_id: str, fraction: float) -> bool:
    """Whether a document belongs to the valid split; its id alone decides."""
    digest = hashlib.blake2b(document_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def encode_part(job: PartJob) -> PartRecord:
    """Tokenize a part and commit its files. Raises DataError for bad text."""
    files = PartFiles(job.stem, job.dtype)
    tokenizer = _load_tokenizer(job.tokenizer_path)
    digest = hashlib.sha256()
    table: list[tuple[int, bool]] = []
    text_bytes = 0
    with open(files.tokens, "wb") as output:
        for documents in _batches(read_documents(job.part, job.config)):
            encoded = encode_documents(tokenizer, documents)
            for document, ids in zip(documents, encoded, strict=True):
                content = _content(document)
                text_bytes += len(content)
                digest.update(document.id.encode() + b"\0")
                digest.update(hashlib.sha256(content).digest())
                held_out = job.part.is_held_out or is_held_out(
                    document.id, job.config.valid_fraction
                )
                table.append((len(ids), held_out))
            output.write(np.fromiter(chain.from_iterable(encoded), dtype=job.dtype).tobytes())
        output.flush()
        os.fsync(output.fileno())
    documents_table = np.array(table, dtype=np.int64).reshape(-1, 2)
    # not into the file itself: numpy's error does not say so if the disk is full
    in_memory = io.BytesIO()
    np.save(in_memory, documents_table, allow_pickle=False)
    commit(files.documents, in_memory.getvalue())
    record = PartRecord(
        tokens=int(documents_table[:, 0].sum()),
        documents=len(table),
        text_bytes=text_bytes,
        corpus_sha256=digest.hexdigest(),
    )
    commit(files.record, record.to_bytes())
    return record


def _end_with(lifeline: Connection) -> None:
    """In a worker: end at once when the other end of `lifeline` closes, or its process dies."""

    def follow() -> None:
        # nothing is ever sent
        lifeline.poll(None)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def encode_parts(jobs: list[PartJob], workers: int) -> Iterator[tuple[PartJob, PartRecord]]:
    """Tokenize parts in several processes (0: one per core); yields them as they finish.

    After an error, or if the caller takes no more, parts that are under way are given up.
    """
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        yield from ((job, encode_part(job)) for job in jobs)
        return
    # spawn: a fork would copy whatever threads and locks the caller has
    spawn = multiprocessing.get_context("spawn")
    end_of_workers, lifeline = spawn.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, spawn, initializer=_end_with, initargs=(end_of_workers,))
    try:
        futures = {pool.submit(encode_part, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise DataError(
            f"One of {workers} tokenizing processes was killed, most likely for want of memory; "
            "lower data.build_workers and build again: it goes on where it stopped."
        ) from error
    finally:
        lifeline.close()
        pool.shutdown(wait=True, cancel_futures=True)
        end_of_workers.close()


def commit(path: Path, content: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as output:
        output.write(content)
        output.flush()
        os.fsync(output.fileno())
    os.replace(temporary, path)


def _content(document: Document) -> bytes:
    if document.messages:
        return json.dumps(document.messages, ensure_ascii=False).encode()
    return document.text.encode()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) == 1000:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=1)
def _load_tokenizer(path: str) -> Tokenizer:
    return Tokenizer.load(path)
