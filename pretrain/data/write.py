"""Tokenized parts to shards: windows of documents are packed, rows are cut into tars.

Finished shards are kept with the place in the text where the next one goes on, so that a killed
build continues, and gives the same bytes.
"""

import dataclasses
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from webdataset import TarWriter

from pretrain.data.manifest import ShardManifest
from pretrain.data.pack import Ints, Rows, Tokens, join, pack
from pretrain.data.parts import PartFiles, commit
from pretrain.data.shards import NPY_HEADER_BYTES


class Place(NamedTuple):
    """Where a window of packing begins: its first document, and the rows packed before it."""

    part: int
    document: int
    row: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How documents become rows and rows become shards."""

    row_tokens: int
    pad: int
    pack_tokens: int
    rows_per_member: int
    members_per_shard: int

    @property
    def shard_rows(self) -> int:
        """Rows of a full shard."""
        return self.rows_per_member * self.members_per_shard


def write_split(
    parts: Sequence[PartFiles],
    packing: Packing,
    *,
    split: str,
    source: str,
    folder: Path,
    final_folder: Path | None = None,
) -> Iterator[ShardManifest]:
    """Write the shards of one split of one source below `folder`, as far as they are missing.

    Yields those that were there already, too, also if they have moved on to `final_folder`.
    """
    place, written = Place(0, 0, 0), 0
    for shard, next_place in _finished(folder, final_folder or folder, source, split):
        place, written = next_place, written + 1
        yield shard
        if shard.rows < packing.shard_rows:
            # a split's last
            return
    skip = written * packing.shard_rows - place.row
    next_row = place.row
    pending: Rows | None = None
    for part, document, tokens, lengths in _windows(parts, packing, split, place):
        place = Place(part, document, next_row)
        packed = pack(tokens, lengths, packing.row_tokens, packing.pad)
        next_row += len(packed.pieces)
        packed, skip = packed.slice(skip, len(packed.pieces)), 0
        pending = join([pending, packed]) if pending else packed
        while len(pending.pieces) >= packing.shard_rows:
            full = pending.slice(0, packing.shard_rows)
            pending = pending.slice(packing.shard_rows, len(pending.pieces))
            name = f"{source}/{split}-{written:06d}.tar"
            yield _write_with_place(folder, name, full, packing, place)
            written += 1
    if pending and len(pending.pieces):
        name = f"{source}/{split}-{written:06d}.tar"
        yield _write_with_place(folder, name, pending, packing, place)


def _finished(
    folder: Path, final_folder: Path, source: str, split: str
) -> Iterator[tuple[ShardManifest, Place]]:
    for number in range(1_000_000):
        name = f"{source}/{split}-{number:06d}.tar"
        try:
            record = json.loads(_record_of(folder / name).read_bytes())
            shard = ShardManifest(**record["shard"])
            # the record was written after the shard: if that is gone, it has moved on
            path = folder / name if (folder / name).exists() else final_folder / name
            if path.stat().st_size != shard.bytes:
                return
        except FileNotFoundError:
            return
        yield shard, Place(**record["place"])


def _record_of(shard: Path) -> Path:
    return shard.with_suffix(".json")


def _write_with_place(
    folder: Path, name: str, rows: Rows, packing: Packing, place: Place
) -> ShardManifest:
    shard = write_shard(folder / name, name, rows, packing)
    record = {"shard": dataclasses.asdict(shard), "place": place._asdict()}
    commit(_record_of(folder / name), json.dumps(record).encode())
    return shard


def write_shard(path: Path, name: str, rows: Rows, packing: Packing) -> ShardManifest:
    """Write one tar; it appears under its name when it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    lengths = rows.lengths_table()
    crc32: dict[str, list[int]] = {"tokens": [], "lengths": []}
    try:
        with open(temporary, "wb") as output:
            with TarWriter(output, user="pretrain", group="pretrain", mtime=0) as tar:
                for member, start in enumerate(range(0, len(lengths), packing.rows_per_member)):
                    stop = start + packing.rows_per_member
                    arrays = {"tokens": rows.tokens[start:stop], "lengths": lengths[start:stop]}
                    contents = {kind: _npy(array) for kind, array in arrays.items()}
                    for kind, content in contents.items():
                        crc32[kind].append(zlib.crc32(content))
                    named = {f"{kind}.npy": content for kind, content in contents.items()}
                    tar.write({"__key__": f"{member:06d}", **named})
            output.flush()
            os.fsync(output.fileno())
        with open(temporary, "rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    tokens = int(rows.lengths.sum())
    return ShardManifest(
        name=name,
        bytes=path.stat().st_size,
        sha256=digest,
        rows=len(rows.pieces),
        tokens=tokens,
        padding=rows.tokens.size - tokens,
        documents=int(rows.begins.sum()),
        lengths_width=lengths.shape[1],
        tokens_crc32=crc32["tokens"],
        lengths_crc32=crc32["lengths"],
    )


def _npy(array: npt.NDArray[np.generic]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0))
    content = stream.getvalue()
    assert len(content) == NPY_HEADER_BYTES + array.nbytes
    return content


def _windows(
    parts: Sequence[PartFiles], packing: Packing, split: str, start: Place
) -> Iterator[tuple[int, int, Tokens, Ints]]:
    """Documents of a split, about `pack_tokens` of their tokens at a time, end to end.

    Each window comes with the part and the document that it begins with.
    """
    part, document = start.part, start.document
    window: list[tuple[Tokens, Ints]] = []
    room = packing.pack_tokens
    for number in range(start.part, len(parts)):
        documents = _SplitOfPart(parts[number], split)
        at = start.document if number == start.part else 0
        while at < documents.num:
            stop = documents.reaching(at, room)
            window.append(documents.take(at, stop))
            room -= len(window[-1][0])
            at = stop
            if room <= 0:
                yield part, document, *_end_to_end(window)
                part, document = number, at
                window, room = [], packing.pack_tokens
    if room < packing.pack_tokens:
        yield part, document, *_end_to_end(window)


def _end_to_end(window: list[tuple[Tokens, Ints]]) -> tuple[Tokens, Ints]:
    tokens, lengths = zip(*window, strict=True)
    return np.concatenate(tokens), np.concatenate(lengths)


class _SplitOfPart:
    """The documents of a part that belong to one split, by their number in the part."""

    def __init__(self, files: PartFiles, split: str) -> None:
        table = files.read_documents()
        self.num = len(table)
        self._tokens = files.read_tokens()
        self._lengths = table[:, 0]
        self._is_mine = table[:, 1] == (split == "valid")
        self._ends = np.concatenate([[0], np.cumsum(self._lengths)])
        self._my_ends = np.concatenate([[0], np.cumsum(self._lengths * self._is_mine)])

    def reaching(self, start: int, tokens: int) -> int:
        """One past the document with which those from `start` have so many tokens, or the end."""
        wanted = self._my_ends[start] + tokens
        return min(int(np.searchsorted(self._my_ends, wanted)), self.num)

    def take(self, start: int, stop: int) -> tuple[Tokens, Ints]:
        """Tokens of the split's documents among these, end to end, and their lengths."""
        is_mine, lengths = self._is_mine[start:stop], self._lengths[start:stop]
        tokens = self._tokens[self._ends[start] : self._ends[stop]]
        return tokens[np.repeat(is_mine, lengths)], lengths[is_mine]
