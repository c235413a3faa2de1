"""Tensor pieces in safetensors files: written in one pass, read by slice. No pickle.

A file holds 1-D fp32 pieces under keys such as `master/core.iteration.adapter`. Writing streams:
no second copy of a shard in host memory, and the hash is of the bytes as they were written.
"""

import hashlib
import json
import os
import struct
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.errors import CheckpointError

# The section of the fp32 weights; the others are the optimizer's moments.
MASTER = "master"
CHUNK_ELEMENTS = 1 << 24
FP32_BYTES = 4


class FileRecord(NamedTuple):
    """What a file must look like to be whole."""

    bytes: int
    sha256: str


class Stored(NamedTuple):
    """Where a piece of a tensor is kept."""

    start: int
    """Its first element in the flattened tensor."""
    numel: int
    file: str


def write_pieces(path: Path, pieces: Sequence[tuple[str, Tensor]]) -> FileRecord:
    """Write 1-D fp32 tensors under their keys, and see them onto the disk. Raises OSError."""
    assert sys.byteorder == "little", "safetensors files are little-endian"
    digest = hashlib.sha256()
    with path.open("xb") as file:
        header = _header(pieces)
        digest.update(header)
        file.write(header)
        for _, piece in pieces:
            for chunk in torch.split(piece.detach(), CHUNK_ELEMENTS):
                data = chunk.cpu().contiguous().numpy().data.cast("B")
                digest.update(data)
                file.write(data)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def size_of(pieces: Sequence[tuple[str, Tensor]]) -> int:
    """Bytes of the file that `write_pieces` would write."""
    return len(_header(pieces)) + sum(FP32_BYTES * piece.numel() for _, piece in pieces)


def _header(pieces: Sequence[tuple[str, Tensor]]) -> bytes:
    entries, position = {}, 0
    for key, piece in pieces:
        assert piece.ndim == 1, key
        assert piece.dtype == torch.float32, key
        end = position + FP32_BYTES * piece.numel()
        entries[key] = {"dtype": "F32", "shape": [len(piece)], "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class PieceReader:
    """Reads any range of any tensor from the pieces that a number of files hold."""

    def __init__(self, folder: Path, stored: dict[str, list[Stored]]) -> None:
        """`stored` lists each tensor's pieces."""
        self._folder = folder
        self._stored = stored
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Files are opened as they are needed."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close all files."""
        self._stack.close()

    def read(self, section: str, name: str, start: int, target: Tensor) -> None:
        """Fill the 1-D `target` with elements start, start + 1, ... of `section/name`.

        Raises CheckpointError if a file lacks them.
        """
        end, filled = start + len(target), 0
        for piece in self._stored[name]:
            low, high = max(start, piece.start), min(end, piece.start + piece.numel)
            if low < high:
                data = self._slice(piece, f"{section}/{name}", low - piece.start, high - low)
                target[low - start : high - start].copy_(data)
                filled += high - low
        if filled != len(target):
            raise CheckpointError(
                f"{self._folder} holds {filled} of elements {start} to {end} of {name}."
            )

    def _slice(self, piece: Stored, key: str, start: int, numel: int) -> Tensor:
        path = self._folder / piece.file
        try:
            if piece.file not in self._open:
                self._open[piece.file] = self._stack.enter_context(safe_open(str(path), "pt"))
            data: Tensor = self._open[piece.file].get_slice(key)[start : start + numel]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read at {key}: {error}") from error
        return data
